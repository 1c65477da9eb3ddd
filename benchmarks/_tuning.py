"""Choosing tile sizes by time, and the tables that keep the choice.

The heuristic is timed first. A candidate counts if its result is right, and is
kept if it is faster by 2 % at least, so that a table holds what pays only.
"""

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from lowbit_pallas import _tuned

_GAIN = 0.98


class Job(NamedTuple):
  """What is tuned together: all numbers of rows share one entry.

  Attributes:
    op: folder of the kernel.
    key: of its entry.
    candidates: sizes to try.
    trials: functions that run the kernel as it is chosen then, raise where the
      result is wrong, and return seconds.
  """

  op: str
  key: str
  candidates: Sequence[dict[str, int]]
  trials: Sequence[Callable[[], float]]


@contextlib.contextmanager
def entry(op: str, key: str, sizes: dict[str, int] | None):
  """Within, the table of a kernel holds this entry alone; None for nothing."""
  read = _tuned.read
  entries = {} if sizes is None else {key: sizes}

  def replaced(table: pathlib.Path):
    return entries if table.parts[-3] == op else read(table)

  _tuned.read = replaced
  jax.clear_caches()
  try:
    yield
  finally:
    _tuned.read = read
    jax.clear_caches()


def best(job: Job, report: Callable[[str], None] = print):
  """The sizes to keep, or None for the heuristic.

  Candidates are compared by the geometric mean of the times of all trials.
  """

  def seconds(sizes) -> float:
    with entry(job.op, job.key, sizes):
      times = [trial() for trial in job.trials]
    return math.exp(sum(map(math.log, times)) / len(times))

  plain = seconds(None)
  kept, least = None, _GAIN * plain
  for sizes in job.candidates:
    try:
      time = seconds(sizes)
    except Exception as error:  # whatever fails is no candidate
      report(f'  {sizes}: {type(error).__name__}: {str(error)[:200]}')
      continue
    report(f'  {sizes}: {plain / time:.2f}x of the heuristic')
    if time < least:
      kept, least = sizes, time
  return kept


def write(table: pathlib.Path, found: dict[str, dict[str, int] | None]) -> None:
  """Replaces entries of a table, and removes those that are None, at once."""
  entries = {**_tuned.read.__wrapped__(table), **found}
  entries = {k: v for k, v in sorted(entries.items()) if v is not None}
  table.parent.mkdir(parents=True, exist_ok=True)
  descriptor, name = tempfile.mkstemp(dir=table.parent, suffix='.tmp')
  try:
    with os.fdopen(descriptor, 'w', encoding='utf-8') as file:
      file.write(json.dumps(entries, indent=1) + '\n')
    os.chmod(name, 0o644)
    os.replace(name, table)
  except BaseException:
    os.unlink(name)
    raise
