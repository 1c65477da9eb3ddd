"""The layouts of bitsandbytes: NF4, FP4 and LLM.int8.

Blocks of 4-bit codes run through a whole weight, from the end of a row into the
next one. Where rows are whole blocks, a weight has its blocks along its rows as
other weights do; where not, its axes are merged.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit_jax import formats, qarray
from lowbit_jax.formats import CodebookFormat
from lowbit_jax.io import _container, _layouts
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._layouts import Layout, Leaf, Parts, choice, expect, field
from lowbit_jax.qarray import QArray

_STATE = 'weight.quant_state.bitsandbytes__'
_STATE_BYTES = 2**16
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
# Codes may be stored as numbers of another dtype, for programs that split the
# weights of a model by their dtype.
_STORAGE = ('U8', 'BF16', 'F16', 'F32')

# What codes 0 to 7 of FP4 stand for, and with a minus sign 8 to 15. Zero is
# there twice. A table of ours is ascending and has 16 numbers: the one that is
# left is a twelfth, which no file has.
_FP4_HALF = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3], np.float32) / 12
_FP4_CODES = np.concatenate([_FP4_HALF, 0 - _FP4_HALF])
_FP4 = CodebookFormat(
  'bnb_fp4',
  tuple(np.unique([*_FP4_CODES, np.float32(1) / np.float32(12)]).tolist()),
)
# The element of each type, and what its codes stand for in files.
_TYPES = {
  'nf4': (formats.nf4, np.array(formats.nf4.table, np.float32)),
  'fp4': (_FP4, _FP4_CODES),
}


def _four_bits(kind: str) -> Layout:
  """The layout of a type of 4 bits."""
  element, stands_for = _TYPES[kind]
  ours = np.searchsorted(element.table, stands_for).astype(np.uint8)
  pairs = np.arange(256)
  # The first number is in the high bits of a byte there, in the low ones here.
  ours = ours[pairs >> 4] | ours[pairs & 15] << 4

  def plan(module: str, parts: Parts, settings: Any) -> Tensor:
    del module, settings
    state = _state(parts, _STATE + kind)
    choice(state, 'quant_type', (kind,))
    block = choice(state, 'blocksize', _BLOCKS)
    dtype = choice(state, 'dtype', ('float16', 'bfloat16', 'float32'))
    weight = expect(parts['weight'], _STORAGE)
    shape = _shape(state, 2 * weight.nbytes)
    size = math.prod(shape)
    scale = _absmax(parts, state, -(-size // block))
    table = expect(parts['weight.quant_map'], ('F32',), (16,))

    def codes() -> np.ndarray:
      if not np.array_equal(table.read(), stands_for):
        raise ValueError(f'{table.name!r} is not the table of {kind.upper()}')
      return ours[weight.read().reshape(-1).view(np.uint8)]

    fmt = formats.grouped(element, block)
    if shape[-1] % block:
      leaves = _layouts.Leaves(codes, scale)
      tensor = _merged(
        _layouts.tensor(parts, (size,), fmt, leaves, dtype), shape
      )
    else:
      counts = _layouts.blocks(shape, (block,))
      leaves = _layouts.Leaves(
        lambda: codes().reshape(*shape[:-1], shape[-1] // 2),
        lambda: scale().reshape(counts),
      )
      tensor = _layouts.tensor(parts, shape, fmt, leaves, dtype)
    return tensor._replace(layout=f'bitsandbytes {kind.upper()}')

  return Layout(_STATE + kind, _ROLES, plan)


def _state(parts: Parts, role: str) -> dict[str, Any]:
  """What is said of a weight, in JSON."""
  part = expect(parts[role], ('U8',))
  if part.nbytes > _STATE_BYTES:
    raise ValueError(f'{part.name!r} has {part.nbytes} bytes')
  state = _container.parse(part.read().tobytes())
  if not isinstance(state, dict):
    raise ValueError(f'{part.name!r} is no JSON object')
  return state


def _shape(state: Mapping[str, Any], size: int) -> tuple[int, ...]:
  """The shape of a weight, for which there is room for `size` codes."""
  shape = field(state, 'shape', list, [])
  if (
    not 2 <= len(shape) <= 8
    or not all(type(n) is int and 0 < n <= size for n in shape)
    or size - math.prod(shape) not in (0, 1)
  ):
    raise ValueError(f'its weight has {size} numbers, no {shape!r:.80}')
  return tuple(shape)


def _absmax(parts: Parts, state: Mapping[str, Any], count: int) -> Leaf:
  """The scales of so many blocks, which may be quantized in their turn."""
  name = 'weight.absmax'
  if 'nested_blocksize' not in state:
    return expect(parts[name], ('F32',), (count,)).read
  choice(state, 'nested_blocksize', (_NESTED_BLOCK,))
  choice(state, 'nested_dtype', ('float32',))
  number = field(state, 'nested_offset', float, math.nan)
  with np.errstate(over='ignore'):
    offset = np.float32(number)
  if not np.isfinite(offset):
    raise ValueError(f'nested_offset={number} of its state is no float32')
  codes = expect(parts[name], ('U8',), (count,))
  table = expect(parts['weight.nested_quant_map'], ('F32',), (256,))
  counts = _layouts.blocks((count,), (_NESTED_BLOCK,))
  scale = expect(parts['weight.nested_absmax'], ('F32',), counts)

  def read() -> np.ndarray:
    # Float32 after each step, as the package has it.
    factors = np.repeat(scale.read(), _NESTED_BLOCK)[:count]
    return table.read()[codes.read()] * factors + offset

  return read


def _merged(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
  """A weight whose blocks run through all its axes, from one without them."""

  def read() -> QArray:
    whole = flat.read()
    assert isinstance(whole, QArray)
    return qarray.validate(qarray.replace(whole, merged=shape[1:]))

  return flat._replace(shape=shape, read=read)


def _int8(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How a weight of LLM.int8 is read: code * SCB / 127.

  The package rounds the product with SCB before it divides.
  """
  del module, settings
  weight = expect(parts['weight'], ('I8',))
  shape = _layouts.rows(weight)
  part = expect(parts['SCB'], ('F32',), shape[:1])
  if 'weight_format' in parts:
    order = expect(parts['weight_format'], ('U8',), (), (1,))
    if order.read().any():
      raise ValueError(f'{order.name!r} is not 0: its codes are not in rows')

  def scale() -> np.ndarray:
    return part.read()[:, None] / np.float32(127)

  leaves = _layouts.Leaves(_layouts.raw(weight), scale)
  tensor = _layouts.tensor(parts, shape, formats.int8_channel, leaves)
  return tensor._replace(layout='bitsandbytes LLM.int8')


_ROLES = (
  *('weight', 'weight.absmax', 'weight.quant_map'),
  *('weight.nested_absmax', 'weight.nested_quant_map'),
)
NF4 = _four_bits('nf4')
FP4 = _four_bits('fp4')
INT8 = Layout('SCB', ('weight', 'weight_format'), _int8)
