"""Checkpoints of a training run that are checked before they are trusted.

A directory belongs to one run: a manifest names the run (its configuration),
each checkpoint carries the digests of its content and of its files. A directory
or checkpoint that does not match is reported, and neither overwritten nor
deleted.
"""

import contextlib
import hashlib
import json
import pathlib
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from support import report

_MANIFEST = 'run.json'
_SEAL = 'files.json'
_KIND = 'lowbit_jax example checkpoints, version 1'
_KEPT = 2


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
  return {
    path.relative_to(directory).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in sorted(directory.rglob('*'))
    if path.is_file() and path.name != _SEAL
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
    foreign = sorted(entry.name for entry in directory.iterdir())
    if foreign:
      raise CheckpointError(
        f'{directory} holds files of something else ("{foreign[0]}", and no '
        f'{_MANIFEST}). It was left as it is: give another --workdir.'
      )
    return None
  try:
    content = json.loads(manifest.read_text())
    if content['kind'] != _KIND:
      raise ValueError(content['kind'])
    return dict(content['run'])
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise CheckpointError(
      f'{manifest} is damaged or was written by something else. It was left '
      f'as it is: move {directory} away to train anew, or give another '
      '--workdir.'
    ) from error


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
    CheckpointError: if the directory is damaged or belongs to another run.
  """

  def __init__(self, directory: str | pathlib.Path, run: dict[str, Any]):
    self._directory = pathlib.Path(directory)
    run = json.loads(json.dumps(run))
    found = _read_manifest(self._directory)
    if found is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      manifest = {'kind': _KIND, 'run': run}
      report.write_json(self._directory / _MANIFEST, manifest)
    elif changed := differences(found, run):
      raise CheckpointError(
        f'{directory} belongs to another run ({changed}). It was left as it '
        'is: repeat the flags of that run, or give another --workdir.'
      )
    for step in self.steps():
      self._check_files(step)
    self._manager = ocp.CheckpointManager(
      self._directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_KEPT, create=False, enable_async_checkpointing=False
      ),
    )
    try:
      for step in self.steps():
        self._read_info(step)
    except CheckpointError:
      self.close()
      raise

  def steps(self) -> list[int]:
    """Returns the steps that are on disk, in rising order."""
    return sorted(
      int(entry.name)
      for entry in self._directory.iterdir()
      if entry.name.isdecimal()
    )

  def _damaged(self, step: int) -> CheckpointError:
    path = self._directory / str(step)
    earlier = [kept for kept in self.steps() if kept < step]
    start = f'step {earlier[-1]}' if earlier else 'the start'
    return CheckpointError(
      f'The checkpoint {path} is damaged or was written by something else. '
      f'It was left as it is: move it away to go on from {start}, or give '
      'another --workdir.'
    )

  def _check_files(self, step: int) -> None:
    path = self._directory / str(step)
    try:
      sealed = json.loads((path / _SEAL).read_text())
    except FileNotFoundError:  # Killed before sealing: the digest decides.
      return
    except (ValueError, OSError) as error:
      raise self._damaged(step) from error
    if sealed != _file_digests(path):
      raise self._damaged(step)

  def _restore(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many types.
      raise self._damaged(step) from error

  def _read_info(self, step: int) -> str:
    info = self._restore(step, info=ocp.args.JsonRestore())['info']
    if not isinstance(info, dict) or info.get('kind') != _KIND:
      raise self._damaged(step)
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
      self._manager.save(step, args=items, force=True)
      path = self._directory / str(step)
      report.write_json(path / _SEAL, _file_digests(path))

  def restore(self, template: Any, shardings: Any = None) -> tuple[int, Any]:
    """Reads the newest checkpoint.

    Args:
      template: the state's structure, as jax.ShapeDtypeStruct leaves.
      shardings: where each leaf goes; None for the default device.

    Returns:
      The number of steps done and the state; (0, None) if there is none.

    Raises:
      CheckpointError: if the newest checkpoint is damaged.
    """
    steps = self.steps()
    if not steps:
      return 0, None
    step = steps[-1]
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: device, template)
    target = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding), template, shardings
    )
    restored = self._restore(step, state=ocp.args.StandardRestore(target))
    state = restored['state']
    if _digest(state) != self._read_info(step):
      raise self._damaged(step)
    return step, state

  def close(self) -> None:
    self._manager.close()
