"""Checkpoints of a training run that are checked before they are trusted.

A directory belongs to one run: a manifest names the run (its configuration),
each checkpoint carries the digests of its content and of its files. A directory
or checkpoint that does not match is reported, and neither overwritten nor
deleted. A process may be killed at any point: the newest checkpoint that was
complete is the one that the next process goes on from.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lowbit_jax import _files, _results

_MANIFEST = 'run.json'
_SEAL = 'files.json'
_KIND = 'lowbit_jax example checkpoints, version 1'
_MANIFEST_KIND = 'checkpoints 2'
_SEAL_KIND = 'checkpoint files 2'
_KEPT = 2
_DELETED = '.deleted-'  # of a step that is no longer one
_UNFINISHED = '.orbax-checkpoint-tmp'


class CheckpointError(Exception):
  """A checkpoint directory cannot be used; the message says what to do."""


@contextlib.contextmanager
def _deferred_interrupt():
  """Holds Ctrl-C back until the end of the block."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  received = []
  previous = signal.signal(
    signal.SIGINT, lambda number, frame: received.append(number)
  )
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)
  if received:
    raise KeyboardInterrupt


def _digest(state: Any) -> str:
  """Returns the SHA-256 of names, types, shapes and bytes of all leaves."""
  result = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.asarray(leaf)
    name = f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'
    result.update(name.encode())
    result.update(np.ascontiguousarray(array).tobytes())
  return result.hexdigest()


def _file_digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each file under a directory, except the seal."""
  paths = [
    path
    for path in sorted(directory.rglob('*'))
    if path.is_file()
    and path.name != _SEAL
    and not _results.is_left_over(path.name)
  ]
  return {
    path.relative_to(directory).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in paths
  }


def _read_manifest(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns the run that a directory belongs to, or None for a new one."""
  if not directory.exists():
    return None
  if not directory.is_dir():
    raise CheckpointError(
      f'{directory} is a file, not a checkpoint directory. '
      'Give another --workdir.'
    )
  manifest = directory / _MANIFEST
  if not manifest.exists():
    names = sorted(entry.name for entry in directory.iterdir())
    foreign = [name for name in names if not _results.is_left_over(name)]
    if foreign:
      raise CheckpointError(
        f'{directory} holds files of something else ("{foreign[0]}", and no '
        f'{_MANIFEST}). It was left as it is: give another --workdir.'
      )
    return None
  remedy = f'move {directory} away to train anew, or give another --workdir'
  return _results.read_json(manifest, _MANIFEST_KIND, remedy)['run']


def differences(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
  """What one run has otherwise than another, '' where they are the same."""
  missing = 'unset'
  return '; '.join(
    f'{name}: {found.get(name, missing)} there, {run.get(name, missing)} now'
    for name in sorted(found.keys() | run.keys())
    if found.get(name, missing) != run.get(name, missing)
  )


class Checkpoints:
  """The checkpoints of one training run, newest last.

  Args:
    directory: where they are; made if it does not exist.
    run: what decides the trained weights, as JSON values. A directory made
      with other values is refused.

  Raises:
    DamagedFileError: if the manifest or a checkpoint is damaged. An older
      checkpoint from which files are missing is no error: it is ignored.
    CheckpointError: if the directory belongs to another run.
  """

  def __init__(self, directory: str | pathlib.Path, run: dict[str, Any]):
    self._directory = pathlib.Path(directory)
    run = json.loads(json.dumps(run))
    found = _read_manifest(self._directory)
    if found is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      manifest = self._directory / _MANIFEST
      _results.write_json(manifest, _MANIFEST_KIND, {'run': run})
    elif changed := differences(found, run):
      raise CheckpointError(
        f'{directory} belongs to another run ({changed}). It was left as it '
        'is: repeat the flags of that run, or give another --workdir.'
      )
    self._sweep()
    self._manager = ocp.CheckpointManager(
      self._directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None, create=False, enable_async_checkpointing=False
      ),
    )
    self._steps: list[int] = []
    try:
      self._check_steps()
    except _files.DamagedFileError:
      self.close()
      raise

  def steps(self) -> list[int]:
    """Returns the steps whose checkpoints are complete, in rising order."""
    return list(self._steps)

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _sweep(self) -> None:
    """Removes what processes that were killed left behind."""
    if jax.process_index() == 0:
      for entry in self._directory.iterdir():
        if entry.name.startswith(_DELETED) or _UNFINISHED in entry.name:
          shutil.rmtree(entry)

  def _check_steps(self) -> None:
    found = sorted(
      int(entry.name)
      for entry in self._directory.iterdir()
      if entry.name.isdecimal() and entry.is_dir()
    )
    for step in found:
      lost, changed = self._faults(step)
      if changed or (lost and step == found[-1]):
        raise self._damaged(step, changed or lost)
      if not lost:  # else of a deletion that was interrupted
        self._steps.append(step)

  def _damaged(self, step: int, fault: str) -> _files.DamagedFileError:
    earlier = [kept for kept in self._steps if kept < step]
    start = f'step {earlier[-1]}' if earlier else 'the start'
    return _files.DamagedFileError(
      self._path(step),
      fault,
      f'it was left as it is: move it away to go on from {start}, or give '
      'another --workdir',
    )

  def _faults(self, step: int) -> tuple[str, str]:
    """What a checkpoint lacks, and what else is wrong with it."""
    path = self._path(step)
    try:
      sealed = _results.read_json(path / _SEAL, _SEAL_KIND, '')['files']
    except FileNotFoundError:  # Killed before sealing: the digest decides.
      return self._faults_of_unsealed(step)
    except _files.DamagedFileError:
      return '', f'{_SEAL} was changed'
    found = _file_digests(path)
    changed = [name for name in found if found[name] != sealed.get(name)]
    lost = sorted(sealed.keys() - found.keys())
    return (
      f'{lost[0]} is missing' if lost else '',
      f'{changed[0]} was changed' if changed else '',
    )

  def _faults_of_unsealed(self, step: int) -> tuple[str, str]:
    try:
      self._read_info(step)
    except FileNotFoundError:
      return 'files are missing', ''
    except ValueError as error:
      return '', str(error)
    return '', ''

  def _restore(self, step: int, **items: Any) -> Any:
    """The items of a step; ValueError or FileNotFoundError where damaged."""
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except FileNotFoundError:
      raise
    except Exception as error:  # Orbax and TensorStore raise many types.
      raise ValueError('it cannot be read') from error

  def _read_info(self, step: int) -> str:
    """The digest of the state of a step, '' for none; errors of `_restore`."""
    info = self._restore(step, info=ocp.args.JsonRestore())['info']
    if not isinstance(info, dict) or info.get('kind') != _KIND:
      raise ValueError('it was written by something else')
    return info.get('digest', '')

  def save(self, step: int, state: Any) -> None:
    """Writes the state after `step` steps and drops the oldest checkpoint.

    Ctrl-C takes effect when the checkpoint is complete.
    """
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      info=ocp.args.JsonSave({'kind': _KIND, 'digest': _digest(state)}),
    )
    with _deferred_interrupt():
      try:
        self._manager.save(step, args=items, force=True)
      except Exception as error:  # Orbax and TensorStore raise many types.
        raise CheckpointError(
          f'{self._path(step)} cannot be written. What was saved before is '
          f'whole. {error}'
        ) from error
      if jax.process_index() == 0:
        self._seal(step)
      self._steps.append(step)
      while len(self._steps) > _KEPT:
        self._delete(self._steps.pop(0))

  def _seal(self, step: int) -> None:
    path = self._path(step)
    content = {'files': _file_digests(path)}
    _results.write_json(path / _SEAL, _SEAL_KIND, content)

  def _delete(self, step: int) -> None:
    """Renames a step first, so that a kill leaves all of it or none."""
    if jax.process_index() == 0:
      path = self._directory / f'{_DELETED}{step}'
      self._path(step).rename(path)
      shutil.rmtree(path)

  def restore(self, template: Any, shardings: Any = None) -> tuple[int, Any]:
    """Reads the newest checkpoint.

    Args:
      template: the state's structure, as jax.ShapeDtypeStruct leaves.
      shardings: where each leaf goes; None for the default device.

    Returns:
      The number of steps done and the state; (0, None) if there is none.

    Raises:
      DamagedFileError: if the newest checkpoint is damaged.
    """
    if not self._steps:
      return 0, None
    step = self._steps[-1]
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: device, template)
    target = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding), template, shardings
    )
    try:
      state = self._restore(step, state=ocp.args.StandardRestore(target))
      state = state['state']
      if _digest(state) != self._read_info(step):
        raise ValueError('its numbers were changed')
    except (FileNotFoundError, ValueError) as error:
      raise self._damaged(step, str(error)) from error
    if not (self._path(step) / _SEAL).exists() and jax.process_index() == 0:
      self._seal(step)
    return step, state

  def close(self) -> None:
    self._manager.close()
