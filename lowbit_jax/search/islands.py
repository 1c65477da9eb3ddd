"""Exchange of good programs between searches that run side by side.

`ring` is for processes under `jax.distributed`: all take part at the same
generation, each gets what its left neighbour sent, and the result is the same
in every run. `directory` is for any processes that share a file system: each
leaves a snapshot and takes those of the others as they are, so runs differ.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lowbit_jax import _results
from lowbit_jax._typing import PathLike
from lowbit_jax.search import archive as archives, evolve
from lowbit_jax.search.archive import Entry

_KIND = 'island 1'
_TOP = 4  # programs of a bucket that travel
_SENT = 256  # the most of all buckets


def emigrants(state: evolve.State) -> list[Entry]:
  """The best few of every bucket, those of cheap buckets first."""
  return archives.entries(state.archive, _TOP)[:_SENT]


def ring(search: evolve.Search, state: evolve.State) -> evolve.State:
  """Adds the programs that the process before this one sends to the state.

  Every process of `jax.distributed` must call it at the same generation; with
  one process it changes nothing.
  """
  count = jax.process_count()
  if count == 1:
    return state
  items = emigrants(state)
  padding = Entry(items[0].program, items[0].cost, np.inf)  # is not inserted
  items += [padding] * (_SENT - len(items))
  sent = archives.to_arrays(items, search.rows, search.constants)
  # As 32-bit words, since float64 does not pass without x64.
  words = {key: value.view(np.int32) for key, value in sent.items()}
  everyone = multihost_utils.process_allgather(words)
  left = (jax.process_index() - 1) % count
  received = {
    key: np.ascontiguousarray(value[left]).view(sent[key].dtype)
    for key, value in everyone.items()
  }
  return evolve.merge(search, state, archives.from_arrays(received))


def directory(
  search: evolve.Search, state: evolve.State, path: PathLike, island: int
) -> evolve.State:
  """Writes a snapshot of this island and adds those of others to the state.

  A snapshot is written completely or not at all. Files that are damaged, cannot
  be read, or are not snapshots of this search are ignored.

  Args:
    search: the same for all islands.
    state: of this island.
    path: the shared directory, which must exist.
    island: number of this island.
  """
  path = pathlib.Path(path)
  sent: dict[str, Any] = {}
  sent |= archives.to_arrays(emigrants(state), search.rows, search.constants)
  sent['search'] = np.array(evolve.identity(search))
  snapshot = path / f'island_{island}.npz'
  _results.write_npz(snapshot, _KIND, sent)
  for other in sorted(path.glob('island_*.npz')):
    if other != snapshot:
      state = evolve.merge(search, state, _read(other, search))
  return state


def _read(path, search) -> list[Entry]:
  try:
    arrays = _results.read_npz(path, _KIND, 'delete it')
  except (OSError, ValueError):
    return []
  if str(arrays['search']) != evolve.identity(search):
    return []
  return archives.from_arrays(arrays)
