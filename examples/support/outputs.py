"""Checkpoints written in a layout, with what is beside their weights.

- 'compressed-tensors': a folder as programs that serve models read it.
- 'gguf': a file of llama.cpp.
- 'own': a folder that this library alone reads, in which every format has room.
"""

import collections
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import gguf, safetensors
from lowbit_jax.io._checkpoint import Checkpoint, Leaf, Tensor
from support.conversion import ConversionError

LAYOUTS = ('compressed-tensors', 'gguf', 'own')

_FILE_TYPE, _VERSION = 'general.file_type', 'general.quantization_version'
# What llama.cpp calls a file most of whose matrices have a type, `llama_ftype`.
_FILE_TYPES = {
  **{'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q8_0': 7, 'Q5_0': 8},
  **{'Q5_1': 9, 'Q2_K': 10, 'Q3_K': 12, 'Q4_K': 15, 'Q5_K': 17, 'Q6_K': 18},
  **{'IQ4_NL': 25, 'IQ4_XS': 30, 'BF16': 32, 'TQ1_0': 36, 'TQ2_0': 37},
  **{'MXFP4': 38, 'NVFP4': 39, 'Q1_0': 40, 'Q2_0': 41},
}
_SCALE = 1 + 2**-20
_BLOCK_TYPES = 2  # their version, `GGML_QNT_VERSION`


class Beside(NamedTuple):
  """What a checkpoint has beside its weights.

  Attributes:
    folder: whose other files are copied, None for none.
    metadata: of a GGUF file.
  """

  folder: str | None
  metadata: Mapping[str, Any]


def write(
  out: pathlib.Path, layout: str, tensors: Mapping[str, Leaf], rest: Beside
) -> None:
  """Writes a file or folder that does not exist yet.

  Raises:
    ConversionError: with the name of a tensor that the layout cannot hold.
  """
  try:
    if layout == 'gguf':
      gguf.save(out, tensors, metadata=rest.metadata)
    elif layout == 'own':
      safetensors.export(out, {}, rest.folder)
      weights = out / 'model.safetensors'
      safetensors.save(weights, tensors, {'format': 'pt'}, overwrite=True)
    else:
      safetensors.export(out, tensors, rest.folder)
  except (TypeError, ValueError) as error:
    raise ConversionError(f'--layout={layout}: {error}') from error


def rehearsed(
  source: Checkpoint,
  fmts: Mapping[str, formats.BlockFormat],
  layout: str,
  rest: Beside,
) -> Beside:
  """Refuses what a layout cannot hold, by writing one row of each tensor.

  Args:
    source: of the tensors.
    fmts: of those that will be quantized otherwise than in the source.
    layout: one of `LAYOUTS`.
    rest: what is beside the weights.

  Returns:
    `rest` as it is to be written.

  Raises:
    ConversionError: with the name of the tensor.
  """
  rows = {name: _row(source, name, fmts.get(name)) for name in source}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'rehearsal')
    write(path, layout, rows, rest._replace(folder=None))
    if layout != 'gguf':
      return rest
    with gguf.open(path) as file:
      types = _types(source, file.tensors)
  before = _types(source, source.tensors)
  return rest._replace(metadata=_described(rest.metadata, before, types))


def _row(
  source: Checkpoint, name: str, fmt: formats.BlockFormat | None
) -> Leaf:
  """A row of the kind of a tensor."""
  tensor = source.tensors[name]
  fmt = fmt or tensor.fmt
  if fmt is None:
    if tensor.layout.startswith('IQ'):
      raise ConversionError(
        f'{source.path}, {name!r}: it is {tensor.layout}, which is read as'
        ' floats only; have it quantized by --select'
      )
    leaf = source[name]
    return leaf[(slice(1),) * (leaf.ndim - 1)] if leaf.ndim else leaf
  shape = (*(1 for _ in tensor.shape[:-1]), tensor.shape[-1])
  like = jax.eval_shape(
    lambda x: lowbit.quantize(x, fmt), jax.ShapeDtypeStruct(shape, np.float32)
  )
  # Scales of float32 are in general no float16 numbers.
  return jax.tree.map(lambda x: np.full(x.shape, _SCALE, x.dtype), like)


def _types(
  source: Checkpoint, tensors: Mapping[str, Tensor]
) -> collections.Counter[str]:
  """How many matrices of a source have a type."""
  return collections.Counter(
    tensors[name].layout
    for name, tensor in source.tensors.items()
    if len(tensor.shape) > 1
  )


def _most(types: collections.Counter[str]) -> str:
  return max(types, key=types.__getitem__, default='F32')


def _described(
  metadata: Mapping[str, Any],
  before: collections.Counter[str],
  after: collections.Counter[str],
) -> dict[str, Any]:
  """Metadata that say how weights are quantized now."""
  result = dict(metadata)
  most = _most(after)
  if most != _most(before):
    result.pop(_FILE_TYPE, None)
    if most in _FILE_TYPES:
      result[_FILE_TYPE] = np.uint32(_FILE_TYPES[most])
  if after.keys() - {'F32', 'F16', 'BF16', 'F64'}:
    result[_VERSION] = np.uint32(_BLOCK_TYPES)
  if before != after:  # Another quantization had another calibration.
    for key in [k for k in result if k.startswith('quantize.imatrix.')]:
      del result[key]
  return result
