"""Quantized weights of a checkpoint, in parts that outlive an interruption.

Weights are quantized part by part. A finished part is a file in a folder beside
the output, whose name the settings decide, with the digest of its bytes: a run
with the same settings goes on from there.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

import lowbit_jax as lowbit
from lowbit_jax import _files, _results, formats
from lowbit_jax.io import gguf, safetensors
from lowbit_jax.io._checkpoint import Checkpoint, Leaf, Tensor
from support import command

PART = 2**26  # numbers that one part holds, or one weight that has more
CHUNK = 2**22  # numbers that are quantized at once

# Matrices that are no linear layers inside of a block.
_OTHERS = re.compile(
  r'embed|embd|norm|rope|position|token_type|router|gate_inp|conv'
  r'|^output\.|pooler|(^|\.)(wte|wpe|lm_head|classifier|score)\.'
  r'|(mlp|moe|feed_forward)\.gate\.'
)
_FLOATS = ('F32', 'F16', 'BF16')


class ConversionError(ValueError):
  """A conversion that cannot be done; the message says what to change."""


class Method(Protocol):
  """How weights are quantized."""

  @property
  def fmt(self) -> formats.BlockFormat:
    """Of the results."""
    ...

  def settings(self) -> dict[str, Any]:
    """What decides the numbers, as JSON values."""
    ...

  def quantized(
    self, source: Checkpoint, name: str, folder: pathlib.Path
  ) -> Leaf:
    """A weight with NumPy leaves.

    Args:
      source: that has it.
      name: of the weight.
      folder: for what an interruption should not lose.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Rounding to the nearest.

  Attributes:
    fmt: of the results.
    scale_rule: None for that of the format.
  """

  fmt: formats.BlockFormat
  scale_rule: str | None = None

  def settings(self) -> dict[str, Any]:
    return {
      'name': 'rtn',
      'format': formats.to_dict(self.fmt),
      'scale_rule': self.scale_rule,
    }

  def quantized(
    self, source: Checkpoint, name: str, folder: pathlib.Path
  ) -> lowbit.QArray:
    del folder
    return _round_to_nearest(read(source, name), self.fmt, self.scale_rule)


def _round_to_nearest(
  leaf: Leaf, fmt: formats.BlockFormat, scale_rule: str | None
) -> lowbit.QArray:
  """Quantizes rows by rows, for which less memory is enough."""
  rows = len(leaf)
  # Numbers of one scale are quantized together.
  if leaf.ndim > 1 and not (fmt.is_tile or fmt.tensor_scale):
    rows = max(CHUNK * rows // leaf.size, 1)
  parts = []
  for k in range(0, len(leaf), rows):
    x = leaf[k : k + rows]
    x = lowbit.dequantize(x) if isinstance(x, lowbit.QArray) else x
    q = lowbit.quantize(x, fmt, scale_rule=scale_rule)
    parts.append(jax.device_get(q))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def open_source(path: pathlib.Path) -> Checkpoint:
  """The checkpoint in a GGUF file or in a folder.

  Raises:
    ConversionError: if there is none, or it is not understood.
  """
  if path.suffix == '.safetensors':
    raise ConversionError(
      f'--model={path} has no configuration; name its folder: {path.parent}'
    )
  try:
    return safetensors.open(path) if path.is_dir() else gguf.open(path)
  except FileNotFoundError as error:
    fault = error if path.is_dir() else f'{path} does not exist'
    raise ConversionError(
      f'{fault}; --model is a folder with files *.safetensors, or a GGUF file'
    ) from error
  except ValueError as error:
    raise ConversionError(str(error)) from error


def read(source: Checkpoint, name: str) -> Leaf:
  """A tensor of a checkpoint.

  Raises:
    ConversionError: if its numbers are not as its layout wants them.
  """
  try:
    return source[name]
  except ValueError as error:
    raise ConversionError(str(error)) from error


def selected(source: Checkpoint, pattern: str | None) -> list[str]:
  """The names of the weights to quantize.

  Args:
    source: that has them.
    pattern: a regular expression that is found in them, None for the weights of
      linear layers: not embeddings, the head, norms and routers.

  Raises:
    ConversionError: if there is none, or one that holds no numbers to quantize.
  """
  if pattern is None:
    names = [n for n, t in source.tensors.items() if _is_linear(n, t)]
  else:
    names = [n for n in source if re.search(pattern, n)]
  if not names:
    wanted = 'is a linear layer' if pattern is None else f'matches {pattern!r}'
    raise ConversionError(
      f'{source.path}: no tensor {wanted}; choose weights by --select, such as'
      f' {next(iter(source), "weight")!r}'
    )
  for name in names:
    tensor = source.tensors[name]
    if not _is_quantizable(tensor):
      raise ConversionError(
        f'{source.path}, {name!r}: it is {tensor.layout} of shape'
        f' {tensor.shape}, which cannot be quantized; leave it out of --select'
      )
  return names


def _is_quantizable(tensor: Tensor) -> bool:
  has_floats = tensor.layout in _FLOATS or tensor.layout.startswith('IQ')
  is_full = math.prod(tensor.shape) > 0 and bool(tensor.shape)
  return is_full and (has_floats or tensor.fmt is not None)


def _is_linear(name: str, tensor: Tensor) -> bool:
  # With three axes, experts in one tensor.
  is_matrix = len(tensor.shape) in (2, 3) and 1 not in tensor.shape[-2:]
  is_weight = name.endswith('weight') and not _OTHERS.search(name)
  return is_matrix and is_weight and _is_quantizable(tensor)


def check(
  source: Checkpoint,
  names: Sequence[str],
  fmt: formats.BlockFormat,
  scale_rule: str | None = None,
) -> None:
  """Refuses what cannot be quantized to a format, before anything is read.

  Raises:
    ConversionError: with the weight, if blocks do not fill its rows.
  """
  for name in names:
    shape = source.tensors[name].shape
    try:
      q = jax.eval_shape(
        lambda x: lowbit.quantize(x, fmt, scale_rule=scale_rule),
        jax.ShapeDtypeStruct(shape, np.float32),
      )
    except (TypeError, ValueError) as error:
      raise ConversionError(f'{name!r}: {error}') from error
    if not (fmt.is_tile or _is_filled(q)):
      raise ConversionError(
        f'{source.path}, {name!r}: blocks of {fmt} do not fill its rows'
        f' of {shape[-1]} numbers; leave it out by --select, or give a --format'
        ' of smaller blocks'
      )


def _is_filled(q: lowbit.QArray) -> bool:
  """Whether blocks fill rows, and blocks of blocks too."""
  has_levels = isinstance(q.scale, lowbit.QArray)
  return not any(q.pad) and (not has_levels or _is_filled(q.scale))


class Parts:
  """Weights of a checkpoint, quantized into files.

  Args:
    source: that has the weights.
    names: of the weights.
    method: that quantizes them.
    out: the output, beside which the folder of the parts is.
  """

  def __init__(
    self,
    source: Checkpoint,
    names: Sequence[str],
    method: Method | None,
    out: pathlib.Path,
  ):
    self._source, self._method, self._out = source, method, out
    self._groups = list(_groups(source, names))
    self._done = 0
    settings = {
      'library': lowbit.__version__,
      'source': _files_of(pathlib.Path(source.path)),
      'method': method and method.settings(),
      'parts': self._groups,
    }
    text = json.dumps(settings, sort_keys=True).encode()
    name = f'{out.name}.parts-{hashlib.sha256(text).hexdigest()[:12]}'
    self.folder = out.with_name(name)
    self.output = self.folder / 'output'

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it."""
    self.folder.mkdir(exist_ok=True)
    with _results.lock(self.folder, 'wait for it, or give another --out'):
      for left in self.folder.glob('*output*'):  # by a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
      yield

  def complete(self) -> dict[str, Checkpoint]:
    """Makes the parts that are missing; the part of each weight, open."""
    parts: dict[str, Checkpoint] = {}
    with command.progress(
      total=sum(map(len, self._groups)), desc='quantizing', unit='weight'
    ) as bar:
      for k, names in enumerate(self._groups):
        path = self.folder / f'{k:05}.safetensors'
        if _is_whole(path):
          bar.update(len(names))
        else:
          weights = {}
          for name in names:
            weights[name] = self._quantized(name)
            bar.update()
          safetensors.save(path, weights, overwrite=True)
          _seal(path)
        parts |= dict.fromkeys(names, safetensors.open(path))
        self._done = k + 1
    return parts

  def _quantized(self, name: str) -> Leaf:
    assert self._method is not None  # without which there are no parts
    return self._method.quantized(self._source, name, self.folder)

  def finish(self) -> None:
    """Gives the output, which is whole, its name, and removes the parts."""
    if os.path.lexists(self._out):
      raise FileExistsError(errno.EEXIST, 'something has this name', self._out)
    os.rename(self.output, self._out)
    shutil.rmtree(self.folder)

  def kept(self) -> str:
    """What an interruption does not lose."""
    return (
      f'{self._done} of {len(self._groups)} parts are kept in {self.folder};'
      ' the same command goes on from there'
    )


class Merged(Mapping[str, Leaf]):
  """A checkpoint with some of its weights from others.

  Args:
    source: that says which tensors there are.
    others: the checkpoint of each weight that is not read from the source.
  """

  def __init__(self, source: Checkpoint, others: Mapping[str, Checkpoint]):
    self._source, self._others = source, others

  def __getitem__(self, name: str) -> Leaf:
    return read(self._others.get(name, self._source), name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._source)

  def __len__(self) -> int:
    return len(self._source)


def _groups(source: Checkpoint, names: Sequence[str]) -> Iterator[list[str]]:
  """Names in groups that have `PART` numbers, if not one weight has more."""
  group, size = [], 0
  for name in names:
    count = math.prod(source.tensors[name].shape)
    if group and size + count > PART:
      yield group
      group, size = [], 0
    group.append(name)
    size += count
  if group:
    yield group


def _files_of(path: pathlib.Path) -> list[Any]:
  """Names, sizes and times of the files of a checkpoint."""
  if path.is_dir():
    files = [file for file in path.iterdir() if file.is_file()]
  else:
    others = glob.escape(path.name).replace('-00001-of-', '-*-of-')
    files = list(path.parent.glob(others))
  return [
    [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    for file in sorted(files)
  ]


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _seal(path: pathlib.Path) -> None:
  with _files.replacing(path.with_suffix('.sha256')) as file:
    file.write(_digest(path).encode())


def _is_whole(path: pathlib.Path) -> bool:
  seal = path.with_suffix('.sha256')
  return (
    path.exists()
    and seal.exists()
    and seal.read_bytes() == _digest(path).encode()
  )
