"""Codecs of optimizer states: a moment of any shape to a few bits per element.

`quantized_state` lists them. Second moments have tables of positive numbers:
k / 2^b for the uniform ones and D = b decades without 0 for the dynamic ones.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from lowbit_jax import _quantize as core, _serialization, ops, qarray
from lowbit_jax.formats import (
  BlockFormat,
  CodebookFormat,
  FloatFormat,
  e4m3fn as _e4m3,
  e5m2 as _e5m2,
  float32 as _float32,
  int4 as _int4,
  int8 as _int8,
)
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray
from lowbit_jax.training.optimizers._common import has_codes
from lowbit_pallas.arith import bits as fb

FIRST = ('lin8', 'dyn8', 'e4m3', 'e5m2', 'coat', 'lin4', 'de4')
SECOND = (*FIRST, 'rank1_lin4', 'rank1_de4')

# Elements of the last axis, of one output or input, tend to be alike.
_WORTH = 1.1

_E4M3_RANGE = math.log(_e4m3.max / _e4m3.min_subnormal)


def dynamic_map(bits: int, signed: bool = True) -> CodebookFormat:
  """The dynamic tree of 2^bits numbers in [-1, 1], or in (0, 1].

  Args:
    bits: b, 2 to 8.
    signed: if True, b - 1 decades of 2^i numbers for each sign, 0 and 1; else b
      decades of 2^i numbers and 1, without 0.

  Returns:
    A format whose table is in ascending order.

  Examples:
    >>> dynamic_map(3).table[3:]
    (0.0, 0.055, 0.325, 0.775, 1.0)
    >>> dynamic_map(2, signed=False).table[1:]
    (0.325, 0.775, 1.0)
  """
  _check_bits(bits, 2)
  if not isinstance(signed, bool):
    raise TypeError(f'{signed=} must be a bool')
  decades = bits - signed
  positive = [
    float(
      Fraction(10) ** (i - decades + 1)
      * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 << i))
    )
    for i in range(decades)
    for j in range(1 << i)
  ]
  positive.append(1.0)
  if not signed:
    return CodebookFormat(f'dynamic{bits}_positive', tuple(positive))
  table = [-v for v in reversed(positive[:-1])] + [0.0] + positive
  return CodebookFormat(f'dynamic{bits}', tuple(table))


def linear_map(bits: int) -> CodebookFormat:
  """k / 2^bits for k = 1 ... 2^bits: uniform numbers in (0, 1] without 0."""
  _check_bits(bits, 1)
  size = 1 << bits
  table = tuple(k / size for k in range(1, size + 1))
  return CodebookFormat(f'linear{bits}_positive', table)


def _check_bits(bits: int, least: int) -> None:
  if not isinstance(bits, int) or not least <= bits <= 8:
    raise ValueError(f'bits={bits!r} must be an int in {least}..8')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Companded:
  """E4M3 codes of sign(x) c |x / c|^k with c and k per block.

  Attributes:
    array: the companded numbers; c is 448 times their scale.
    power: k, float32 of the shape of the scales.
  """

  array: QArray
  power: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankOne:
  """Codes of x / s with s the least of one maximum per axis.

  Attributes:
    array: the quotients, without any scale.
    maxima: one float32 array per axis n: max |x| over the other axes, of size 1
      along those.
  """

  array: QArray
  maxima: tuple[jax.Array, ...]


_serialization.know(Companded, ('array', 'power'))
_serialization.know(RankOne, ('array', 'maxima'))

Encoded = QArray | Companded | RankOne


def is_encoded(x: object) -> bool:
  """Whether `x` is an encoded leaf; the `is_leaf` of tree functions."""
  return has_codes(x) or isinstance(x, Companded | RankOne)


@dataclasses.dataclass(frozen=True)
class Codec:
  """A format for blocks along some axis, and what is done around it."""

  fmt: BlockFormat
  kind: str = 'block'
  fits: bool = True


def find(
  name: str | BlockFormat, second: bool, argument: str, block: int | None = None
) -> Codec:
  """The codec of a name or a block format.

  Args:
    name: one of `FIRST` or `SECOND`, or a block format, used as it is.
    second: whether it is for a second moment.
    argument: what to call it in errors.
    block: elements per scale, None for the usual number.
  """
  if isinstance(name, BlockFormat):
    return Codec(name, fits=False)
  known = SECOND if second else FIRST
  if name not in known:
    hint = ''
    if name in SECOND:
      hint = '; a scale per row and column is for second moments'
    raise ValueError(
      f'{argument}={name!r} is not one of {known}, a block format such as'
      f' lowbit_jax.formats.mxfp8_e4m3, or None{hint}'
    )
  return _codec(name, second, block)


@functools.cache
def _codec(name: str, second: bool, block: int | None = None) -> Codec:
  kind, _, rest = name.partition('_')
  bits = {'8': 8, '4': 4}.get(name[-1])
  if name in ('e4m3', 'coat'):
    element = _e4m3
  elif name == 'e5m2':
    element = _e5m2
  elif (rest or name).startswith('lin'):
    assert bits is not None
    element = linear_map(bits) if second else {8: _int8, 4: _int4}[bits]
  else:
    assert bits is not None
    element = dynamic_map(bits, signed=not second)
  if kind == 'rank1':
    return Codec(BlockFormat(name, element, (0,), None), 'rank1')
  block = block or (256 if bits == 8 else 128)
  fmt = BlockFormat(f'{element}_g{block}', element, (block,), _float32)
  return Codec(fmt, 'coat' if name == 'coat' else 'block')


def encode(x: jax.Array, codec: Codec, positive: bool) -> Encoded:
  """Encodes a moment.

  Blocks lie along the last axis, or along another one if that saves a tenth of
  the bytes, and are shortened so that they divide it as evenly as they can.

  Args:
    x: float array of rank at least 1.
    codec: how.
    positive: whether positive numbers have to stay positive.
  """
  kind = codec.kind
  if kind == 'rank1' and x.ndim < 2:
    # One row has the elements themselves as column maxima.
    codec, kind = _codec(codec.fmt.name.partition('_')[2], True), 'block'
  if kind == 'rank1':
    return _encode_rank_one(x, codec.fmt)
  fmt, axis = codec.fmt, None
  if codec.fits and not fmt.is_tile:
    fmt, axis = _fitted(x.shape, fmt)
  axes = qarray.block_axes(fmt, axis, x.ndim)
  if kind == 'coat':
    return _encode_companded(x, fmt, axes)
  return _encode_blocks(x, fmt, axes, positive)


def encode_like(leaf: Encoded, x: jax.Array, positive: bool) -> Encoded:
  """Encodes `x` into the layout of an encoded leaf of its shape."""
  if isinstance(leaf, RankOne):
    return _encode_rank_one(x, leaf.array.fmt)
  if isinstance(leaf, Companded):
    return _encode_companded(x, leaf.array.fmt, leaf.array.axes)
  return _encode_blocks(x, leaf.fmt, leaf.axes, positive)


def decode(leaf: Encoded) -> jax.Array:
  """The moment that an encoded leaf stands for."""
  if isinstance(leaf, QArray):
    return qarray.dequantize(leaf)
  if isinstance(leaf, Companded):
    return _decode_companded(leaf)
  x = qarray.dequantize(leaf.array, jnp.float32) * _bound(leaf.maxima)
  return x.astype(leaf.array.dtype)


def _fitted(shape, fmt: BlockFormat) -> tuple[BlockFormat, int]:
  """The format with blocks that suit `shape`, and their axis."""
  group = 8 // math.gcd(8, fmt.element.bits)

  def block(n: int) -> int:
    count = -(-n // fmt.block[0])
    size = -(-n // (count * group)) * group if n else group
    return min(size, fmt.block[0])

  def bits(n: int) -> float:
    size = block(n)
    return -(-n // size) * (size * fmt.element.bits + 32) / max(n, 1)

  last = len(shape) - 1
  axis = min(reversed(range(len(shape))), key=lambda a: bits(shape[a]))
  if bits(shape[last]) <= _WORTH * bits(shape[axis]):
    axis = last
  size = block(shape[axis])
  name = f'{fmt.element}_g{size}'
  return dataclasses.replace(fmt, name=name, block=(size,)), axis - len(shape)


def _encode_blocks(x, fmt: BlockFormat, axes, positive: bool) -> QArray:
  axis = axes if fmt.is_tile else axes[0]
  q = ops.quantize(x, fmt, axis=axis)
  element = fmt.element
  if not positive or not isinstance(element, FloatFormat) or not element.zero:
    return q
  if element.bits != 8:
    raise ValueError(
      f'second={fmt}: its elements include zero, which a second moment must not'
      f' become; use one of {SECOND} or a format with 8-bit elements'
    )
  pad = [(0, 0)] * x.ndim
  for a, n in zip(axes, q.pad, strict=True):
    pad[a] = (0, n)
  lost = jnp.pad(x > 0, pad) & (q.codes == 0)
  return qarray.replace(q, codes=jnp.where(lost, jnp.uint8(1), q.codes))


def _encode_companded(x, fmt: BlockFormat, axes) -> Companded:
  blocks = core.split(x.astype(jnp.float32), fmt, axes)
  a = jnp.abs(blocks.view)
  high = jnp.max(a, axis=blocks.inner, keepdims=True)
  least = jnp.where(a > 0, a, jnp.inf)
  low = jnp.min(least, axis=blocks.inner, keepdims=True)
  span = jnp.log(high) - jnp.log(low)
  # A block of equal magnitudes has no range to expand.
  power = _E4M3_RANGE / jnp.maximum(span, math.log(2))
  power = jnp.where(high > 0, power, 1.0)
  y = _compand(blocks.view, high, power)
  y = core.restore(y, blocks, jnp.float32)
  q = ops.quantize(y, fmt, axis=axes[0]).astype(x.dtype)
  return Companded(q, blocks.squeeze(power))


def _decode_companded(leaf: Companded) -> jax.Array:
  q = leaf.array
  blocks = core.split(qarray.dequantize(q, jnp.float32), q.fmt, q.axes)
  high = blocks.expand(q.scale * jnp.float32(_e4m3.max))
  power = blocks.expand(leaf.power)
  x = _compand(blocks.view, high, 1 / power)
  return core.restore(x, blocks, q.dtype)


def _compand(x, high, power):
  """sign(x) high |x / high|^power, 0 for 0."""
  a = jnp.abs(x)
  log = jnp.log(jnp.where(a > 0, a, 1)) - jnp.log(jnp.where(a > 0, high, 1))
  # Its square may underflow where high times it does not.
  root = jnp.exp(power * log * 0.5)
  y = jnp.where(a > 0, high * root * root, a)
  return jnp.where(x < 0, -y, y)


def _encode_rank_one(x, fmt: BlockFormat) -> RankOne:
  y = x.astype(jnp.float32)
  bits = _scaling.magnitude_bits(y)
  maxima = tuple(
    fb.from_bits(
      _scaling.block_max(bits, tuple(a for a in range(x.ndim) if a != axis))
    )
    for axis in range(x.ndim)
  )
  bound = _bound(maxima)
  y = jnp.where(bound > 0, y / jnp.where(bound > 0, bound, 1), 0)
  q = ops.quantize(y, fmt, axis=-1).astype(x.dtype)
  return RankOne(q, maxima)


def _bound(maxima) -> jax.Array:
  """The least maximum of each element, NaN where all of them are."""
  # As integers: XLA on CPU drops NaN from the minimum of floats.
  return fb.from_bits(
    functools.reduce(jnp.minimum, map(_scaling.magnitude_bits, maxima))
  )
