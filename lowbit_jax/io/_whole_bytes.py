"""Layouts of FP8, MXFP4 and NVFP4 beside those of compressed-tensors.

ModelOpt, the FP8 of DeepSeek and of others, gpt-oss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowbit_jax import formats
from lowbit_jax.formats import ElementFormat
from lowbit_jax.io import _bits, _layouts
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.io._layouts import Layout, Parts, choice, expect, field

_FP8 = ('F8_E4M3',)


def _modelopt(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How one weight of ModelOpt is read."""
  named = field(settings, 'quantization', dict, settings)
  if layers := field(named, 'quantized_layers', dict):
    named = field(layers, module, dict)
    if named is None:
      raise ValueError('quantized_layers of its configuration lacks its module')
  algorithm = choice(named, 'quant_algo', ('W4A16_AWQ', *_MODELOPT))
  if algorithm == 'W4A16_AWQ':
    tensor = _int4(parts, named)
  else:
    choice({'group_size': 16} | dict(named), 'group_size', (16, 32))
    tensor = _MODELOPT[algorithm](parts)
  return tensor._replace(layout=f'ModelOpt {algorithm}')


def _nvfp4(parts: Parts) -> Tensor:
  weight = expect(parts['weight'], ('U8',))
  *lead, width = _layouts.rows(weight)
  shape = (*lead, 2 * width)
  counts = _layouts.blocks(shape, (16,))
  scale = expect(parts['weight_scale'], _FP8, counts)
  factor = expect(parts['weight_scale_2'], ('F32',), (), (1,))
  leaves = _layouts.Leaves(
    _layouts.raw(weight), _layouts.raw(scale), factor.read
  )
  return _layouts.tensor(parts, shape, formats.nvfp4, leaves)


def _mxfp4(
  parts: Parts, role: str = 'weight_scale', dtypes: Sequence[str] = ('U8',)
) -> Tensor:
  weight = expect(parts['weight'], dtypes)
  *lead, width = _layouts.rows(weight)
  shape = (*lead, 2 * width)
  counts = _layouts.blocks(shape, (32,))
  flat = (math.prod(counts), 1)
  # The reference implementation forgets the shape of the scales.
  part = expect(parts[role], _layouts.EXPONENT_SCALES, counts, flat)
  leaves = _layouts.Leaves(
    _layouts.raw(weight), lambda: part.read().view(np.uint8).reshape(counts)
  )
  return _layouts.tensor(parts, shape, formats.mxfp4, leaves)


def _fp8(parts: Parts, role: str = 'weight_scale') -> Tensor:
  weight = expect(parts['weight'], _FP8)
  factor = _layouts.numbers(_layouts.scalar(parts[role]))
  leaves = _layouts.Leaves(_layouts.raw(weight), tensor_scale=factor)
  shape = _layouts.rows(weight)
  return _layouts.tensor(parts, shape, formats.e4m3fn_tensor, leaves)


def _mxfp8(parts: Parts) -> Tensor:
  weight = expect(parts['weight'], _FP8)
  shape = _layouts.rows(weight)
  scale = expect(parts['weight_scale'], ('U8',), _layouts.blocks(shape, (32,)))
  leaves = _layouts.Leaves(_layouts.raw(weight), scale.read)
  return _layouts.tensor(parts, shape, formats.mxfp8_e4m3, leaves)


def _tiles(parts: Parts) -> Tensor:
  """FP8 in tiles of 128 x 128, whose scales have two more axes of one."""
  weight = expect(parts['weight'], _FP8)
  height, width = shape = _matrix(weight)
  if height % 128 or width % 128:
    raise ValueError(f'{weight.name!r} has the shape {shape}, no whole tiles')
  counts = height // 128, width // 128
  part = expect(parts['weight_scale'], ('F32',), (counts[0], 1, counts[1], 1))
  leaves = _layouts.Leaves(
    _layouts.raw(weight), lambda: part.read().reshape(counts)
  )
  return _layouts.tensor(parts, shape, formats.fp8_128x128, leaves)


def _rows(element: ElementFormat, dtype: str) -> Callable[[Parts], Tensor]:
  """A scale for each row, in one axis."""

  def plan(parts: Parts) -> Tensor:
    weight = expect(parts['weight'], (dtype,))
    shape = _matrix(weight)
    part = expect(parts['weight_scale'], ('F32',), shape[:1])
    fmt = _layouts.channel(element, formats.float32, False)
    leaves = _layouts.Leaves(_layouts.raw(weight), lambda: part.read()[:, None])
    return _layouts.tensor(parts, shape, fmt, leaves)

  return plan


def _int4(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """Signed integers of 4 bits, those of two rows in each byte."""
  choice({'has_zero_point': False} | dict(settings), 'has_zero_point', (False,))
  size = field(settings, 'group_size', int, 0)
  weight = expect(parts['weight'], ('U8',))
  height, width = _matrix(weight)
  if size < 1 or width % size:
    raise ValueError(f'groups of {size} do not fill rows of {width}')
  shape = 2 * height, width
  part = parts['weight_scale']
  scale = _layouts.float_scale(part)
  expect(part, (part.dtype,), (2 * height, width // size))

  def codes() -> np.ndarray:
    data = weight.read()
    nibbles = np.stack([data & 15, data >> 4], axis=1).reshape(shape)
    return _bits.pack(nibbles, 4)

  leaves = _layouts.Leaves(codes, _layouts.numbers(part))
  fmt = _layouts.group(formats.int4, size, scale)
  return _layouts.tensor(parts, shape, fmt, leaves)


def _matrix(part: Stored) -> tuple[int, ...]:
  """The shape of a weight that is no stack of experts."""
  shape = _layouts.rows(part)
  if len(shape) != 2:
    raise ValueError(f'{part.name!r} has the shape {shape}, not two axes')
  return shape


_MODELOPT = {
  'FP8': _fp8,
  'FP8_PER_CHANNEL_PER_TOKEN': _rows(formats.e4m3fn, 'F8_E4M3'),
  'FP8_PB_WO': _tiles,
  'fp8_pb_wo': _tiles,  # as the exporter spells it
  'W8A16': _rows(formats.int8, 'I8'),
  'W8A8_SQ_PER_CHANNEL': _rows(formats.int8, 'I8'),
  'NVFP4': _nvfp4,
  'W4A16_NVFP4': _nvfp4,
  'MXFP4': _mxfp4,
  'W4A8_MXFP4_FP8': _mxfp4,
  'MXFP8': _mxfp8,
}


def _fp8_tensor(
  module: str, parts: Parts, settings: Mapping[str, Any]
) -> Tensor:
  """How an FP8 weight with one scale is read."""
  del module
  _check_fp8(settings)
  return _fp8(parts)._replace(layout='FP8')


def _fp8_rows(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How an FP8 weight of FBGEMM is read, which has a scale for each row."""
  del module, settings
  weight = expect(parts['weight'], _FP8)
  shape = _matrix(weight)
  part = parts['weight_scale']
  fmt = _layouts.channel(formats.e4m3fn, _layouts.float_scale(part), False)
  expect(part, (part.dtype,), (shape[0], 1))
  leaves = _layouts.Leaves(_layouts.raw(weight), _layouts.numbers(part))
  return _layouts.tensor(parts, shape, fmt, leaves)._replace(
    layout='FBGEMM FP8'
  )


def _fp8_tiles(
  module: str, parts: Parts, settings: Mapping[str, Any]
) -> Tensor:
  """How an FP8 weight with a scale for each tile, as of DeepSeek, is read.

  The scale multiplies, in spite of its name. Experts may be FP4, two in each
  signed byte, with a scale for 32 inputs.
  """
  del module
  _check_fp8(settings)
  if parts['weight'].dtype == 'I8':
    choice(settings, 'expert_dtype', ('fp4',))
    tensor = _mxfp4(parts, 'weight_scale_inv', ('I8',))
    return tensor._replace(layout='FP8, experts of MXFP4')
  if settings.get('weight_block_size') is None:
    return _fp8(parts, 'weight_scale_inv')._replace(layout='FP8')
  sizes = field(settings, 'weight_block_size', list, [])
  if len(sizes) != 2 or not all(
    type(n) is int and 0 < n < 2**31 for n in sizes
  ):
    raise ValueError(f'weight_block_size={sizes!r:.80} is no tile')
  block = tuple(sizes)
  weight = expect(parts['weight'], _FP8)
  shape = _layouts.rows(weight)
  part = parts['weight_scale_inv']
  expect(part, (part.dtype,), _layouts.blocks(shape, block))
  if part.dtype in _layouts.EXPONENT_SCALES:
    scale, leaf = formats.e8m0, _layouts.raw(part)
  else:
    scale, leaf = _layouts.float_scale(part), _layouts.numbers(part)
  fmt = _layouts.tile(formats.e4m3fn, block, scale)
  leaves = _layouts.Leaves(_layouts.raw(weight), leaf)
  tensor = _layouts.tensor(parts, shape, fmt, leaves)
  return tensor._replace(layout=f'FP8 {block[0]}x{block[1]}')


def _check_fp8(settings: Mapping[str, Any]) -> None:
  choice({'fmt': 'e4m3'} | dict(settings), 'fmt', ('e4m3', 'float8_e4m3fn'))


def _gpt_oss(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How MXFP4 weights of experts are read: (experts, outputs, inputs)."""
  del module, settings
  part = expect(parts['_blocks'], ('U8',))
  *lead, count, size = _layouts.rows(part)
  if size != 16 or not lead:
    raise ValueError(
      f'{part.name!r} has the shape {part.shape}; expected blocks of 16 bytes'
    )
  scale = expect(parts['_scales'], ('U8',), (*lead, count))
  leaves = _layouts.Leaves(
    lambda: part.read().reshape(*lead, 16 * count), scale.read
  )
  shape = (*lead, 32 * count)
  tensor = _layouts.tensor(parts, shape, formats.mxfp4, leaves)
  return tensor._replace(layout='gpt-oss MXFP4')


MODELOPT = Layout(
  'weight_scale', ('weight', 'weight_scale_2', 'pre_quant_scale'), _modelopt
)
FP8 = Layout('weight_scale', ('weight',), _fp8_tensor)
FP8_TILES = Layout('weight_scale_inv', ('weight',), _fp8_tiles)
FBGEMM = Layout('weight_scale', ('weight',), _fp8_rows)
GPT_OSS = Layout('_blocks', ('_scales',), _gpt_oss, '')
