"""Finished runs of a sweep, which an interruption does not lose."""

import pathlib
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from lowbit_jax import _results
from support import checkpoints, command

Key = TypeVar('Key', bound=Hashable)


class Store:
  """Finished runs, a JSON file with a checksum each.

  Args:
    directory: where they are; made if it does not exist.
    result: what a file calls the result of its run, a JSON value.
    flag: that names the directory of the sweep on the command line.
  """

  def __init__(
    self, directory: pathlib.Path, result: str, flag: str = '--workdir'
  ):
    self.directory = directory
    self._result, self._flag = result, flag
    self._kind = f'run with {result} 1'
    directory.mkdir(parents=True, exist_ok=True)

  def load(self, name: str, run: Mapping[str, Any]) -> Any:
    """Returns the result of a finished run, or None.

    Args:
      name: of the run and its file.
      run: what decides the result, as JSON values.

    Raises:
      DamagedFileError: where the file is damaged; it is left as it is.
      CheckpointError: where it belongs to another sweep.
    """
    path = self.directory / f'{name}.json'
    if not path.exists():
      return None
    remedy = f'move it away to repeat the run, or give another {self._flag}'
    content = _results.read_json(path, self._kind, remedy)
    if changed := checkpoints.differences(content['run'], run):
      raise checkpoints.CheckpointError(
        f'{path} belongs to another sweep ({changed}). It was left as it is: '
        f'repeat the flags of that sweep, or give another {self._flag}.'
      )
    return content[self._result]

  def save(self, name: str, run: Mapping[str, Any], result: Any) -> None:
    content = {'run': run, self._result: result}
    _results.write_json(self.directory / f'{name}.json', self._kind, content)


def complete(
  store: Store,
  plan: Mapping[Key, tuple[str, Mapping[str, Any]]],
  train: Callable[[Key], Any],
) -> dict[Key, Any]:
  """Returns the results of all runs, in order, training those that are missing.

  Args:
    store: where finished runs are kept.
    plan: name and description of each run, as `Store.load` takes them.
    train: returns the result of a run.
  """
  results = {key: store.load(*run) for key, run in plan.items()}
  done = sum(result is not None for result in results.values())
  if done:
    print(f'{done} of {len(results)} runs reused')
  with command.progress(
    total=len(results),
    initial=done,
    desc='training',
    unit='run',
  ) as bar:
    for key, (name, run) in plan.items():
      if results[key] is None:
        try:
          results[key] = train(key)
        except KeyboardInterrupt:
          print_kept(store)
          raise
        store.save(name, run, results[key])
        loss = np.mean(results[key])
        bar.set_postfix_str(f'{name} {loss:.3f}', refresh=False)
        bar.update()
  return results


def print_kept(store: Store) -> None:
  """Says after an interruption what was not lost."""
  kept = len(list(store.directory.glob('*.json')))
  print(
    f'\ninterrupted: {kept} finished runs are kept in {store.directory}; '
    'the same command goes on from there',
    file=sys.stderr,
  )
