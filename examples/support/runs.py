"""Finished runs of a sweep, which an interruption does not lose."""

import json
import pathlib
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from support import checkpoints, command, report

Key = TypeVar('Key', bound=Hashable)


class Store:
  """Finished runs, a JSON file each, written whole or not at all.

  Args:
    directory: where they are; made if it does not exist.
    result: what a file calls the result of its run, a float or list of floats.
  """

  def __init__(self, directory: pathlib.Path, result: str):
    self.directory = directory
    self._result = result
    directory.mkdir(parents=True, exist_ok=True)

  def load(self, name: str, run: Mapping[str, Any]) -> Any:
    """Returns the result of a finished run, or None.

    Args:
      name: of the run and its file.
      run: what decides the result, as JSON values.

    Raises:
      CheckpointError: where the file is damaged or belongs to another sweep.
    """
    path = self.directory / f'{name}.json'
    if not path.exists():
      return None
    try:
      content = json.loads(path.read_text())
      found = dict(content['run'])
      result = jax.tree.map(float, content[self._result])
    except (ValueError, KeyError, TypeError, OSError) as error:
      raise checkpoints.CheckpointError(
        f'{path} is damaged or was written by something else. It was left as '
        'it is: move it away to repeat the run, or give another --workdir.'
      ) from error
    if changed := checkpoints.differences(found, run):
      raise checkpoints.CheckpointError(
        f'{path} belongs to another sweep ({changed}). It was left as it is: '
        'repeat the flags of that sweep, or give another --workdir.'
      )
    return result

  def save(self, name: str, run: Mapping[str, Any], result: Any) -> None:
    content = {'run': run, self._result: result}
    report.write_json(self.directory / f'{name}.json', content)


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
