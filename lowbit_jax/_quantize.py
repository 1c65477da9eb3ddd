"""Quantization core: arrays in, QArray leaves out, no derivative rules.

One way through: pad, split into blocks, find block maxima, pick scales, encode,
merge blocks, pack. The public functions and their derivatives are in
`lowbit_jax.ops`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import qarray
from lowbit_jax._typing import ArrayLike, DTypeLike, Key, Origin, ScaleRule
from lowbit_jax.formats import BlockFormat
from lowbit_jax.formats._types import check_format as check_format
from lowbit_jax.numerics import _packing, _rounding, _scaling
from lowbit_jax.numerics._codec import as_float_array, dither_step, spec
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith import bits as fb, block, codec
from lowbit_pallas.arith.codec import RANDOM_BITS

# Levels that 'least_squares' adds to those of the element.
LEAST_SQUARES_STEPS = tuple(k / 4 for k in range(-4, 5))


class Rounding(NamedTuple):
  """How elements are rounded: the rounding arguments of `quantize`."""

  rounding: str = 'nearest_even'
  key: Key | None = None
  random_bits: int = RANDOM_BITS
  origin: Origin | None = None


def check_array(x: ArrayLike, fmt: BlockFormat) -> jax.Array:
  """`x` as a float array of rank at least that of a block."""
  x = as_float_array(x)
  if x.ndim < len(fmt.block):
    raise ValueError(
      f'x.shape={x.shape} has fewer axes than the blocks of {fmt} span;'
      ' round_to and fake_quant take scalars'
    )
  return x


class Blocks(NamedTuple):
  """An array split into blocks, and the way back."""

  view: jax.Array
  inner: tuple[int, ...]
  axes: tuple[int, ...]
  pad: tuple[int, ...]
  shape: tuple[int, ...]

  @property
  def packed(self) -> int:
    """The axis of the view along which codes are packed."""
    return self.inner[sorted(self.axes).index(self.axes[0])]

  @property
  def size(self) -> int:
    """Elements without padding."""
    shape = list(self.shape)
    for axis, pad in zip(self.axes, self.pad, strict=True):
      shape[axis] -= pad
    return math.prod(shape)

  def scale_shape(self) -> tuple[int, ...]:
    view = self.view.shape
    return tuple(n for i, n in enumerate(view) if i not in self.inner)

  def positions(self) -> list[tuple[int, int, int]]:
    """(axis of the array, its padding, its inner axis in the view), sorted:
    `inner` is in the order of positions, `axes` in that of the caller."""
    pads = sorted(zip(self.axes, self.pad, strict=True))
    return [(a, p, i) for (a, p), i in zip(pads, self.inner, strict=True)]

  def without_padding(self, x: jax.Array) -> jax.Array:
    """`x` in the shape of the view, with zeros in place of padding."""
    for axis, pad, inner in self.positions():
      if pad:
        shape = [1] * x.ndim
        shape[inner - 1 : inner + 1] = x.shape[inner - 1 : inner + 1]
        index = jnp.arange(self.shape[axis], dtype=jnp.int32).reshape(shape)
        x = jnp.where(index < self.shape[axis] - pad, x, 0)
    return x

  def expand(self, leaf: ArrayLike) -> jax.Array:
    """Gives a per-block array the axes of the view."""
    return jnp.expand_dims(leaf, self.inner)

  def squeeze(self, x: jax.Array) -> jax.Array:
    """Drops the block-inner axes, all of size 1."""
    return x.reshape(self.scale_shape())


def split(x: jax.Array, fmt: BlockFormat, axes: tuple[int, ...]) -> Blocks:
  """Pads `x` with zeros to whole blocks and splits it."""
  pad = qarray.padding(x.shape, fmt, axes)
  if any(pad):
    widths = [(0, 0)] * x.ndim
    for axis, p in zip(axes, pad, strict=True):
      widths[axis] = (0, p)
    x = jnp.pad(x, widths)
  view, inner = qarray.split_blocks(x.shape, fmt, axes)
  return Blocks(x.reshape(view), inner, axes, pad, x.shape)


class Scales(NamedTuple):
  """Scales as stored; those of blocks have the axes of the view.

  With two levels of scales `scale` and `minimum` are what the stored ones stand
  for, in float32, and `stored` is what they are.
  """

  scale: jax.Array | None = None
  tensor_scale: jax.Array | None = None
  zero_point: jax.Array | None = None
  minimum: jax.Array | None = None
  stored: tuple[QArray, QArray | None] | None = None


class Elements(NamedTuple):
  """What is rounded, and the random numbers that rounding uses, all in the
  shape of the view or of a lane of it."""

  x: jax.Array
  random: jax.Array | None
  offset: jax.Array | None

  def lane(self, axis: int, group: int, j: int) -> 'Elements':
    """Elements j, j + group, j + 2 * group, ... along `axis`."""

    def take(leaf):
      shape = leaf.shape
      split_ = (shape[axis] // group, group)
      leaf = leaf.reshape(*shape[:axis], *split_, *shape[axis + 1 :])
      return jax.lax.index_in_dim(leaf, j, axis + 1, keepdims=False)

    return jax.tree.map(take, self)


class Job(NamedTuple):
  """One quantization: what is quantized, and with what.

  `fmt` has one level of scales, see `Scales`; `encoder` is its element with the
  codes that are used.
  """

  blocks: Blocks
  fmt: BlockFormat
  scales: Scales
  elements: Elements
  rounding: Rounding
  encoder: codec.Element

  def codes(self, elements: Elements) -> jax.Array:
    """Element codes, unpacked."""
    fmt, scales, rounding = self.fmt, self.scales, self.rounding
    rule = _rounding.rule(
      rounding.rounding, elements.random, rounding.random_bits
    )
    x = elements.x
    if scales.minimum is not None:
      x = x - scales.minimum.astype(jnp.float32)
    y = _scaled(x, self.blocks, fmt, scales.scale, scales.tensor_scale)
    if elements.offset is not None:
      y = y + elements.offset
    if scales.zero_point is None:
      return codec.encode(y, self.encoder, rule)
    # round(x / s) + z, not round(x / s + z): they differ at ties.
    k = rule(y) + scales.zero_point.astype(jnp.float32)
    k = jnp.clip(k, 0, fmt.element.code_max)
    return jnp.where(k != k, 0, k).astype(jnp.int32).astype(jnp.uint8)

  def prescaled(self, factor: float) -> 'Job':
    """The same scales for elements multiplied by `factor`."""
    if factor == 1:
      return self
    x = self.elements.x * jnp.float32(factor)
    return self._replace(elements=self.elements._replace(x=x))

  def values(self, scales: Scales | None = None) -> jax.Array:
    """Dequantized float32 values in the shape of the view.

    Args:
      scales: those to multiply by, None for the ones of the quantization.
    """
    codes = self.codes(self.elements)
    offset = self.elements.offset
    scales = self.scales if scales is None else scales
    return _decode(codes, self.fmt, scales, offset, self.blocks)

  def packed(self) -> jax.Array:
    """Packed codes in the shape of the padded array.

    Along the minor axis, lanes are encoded one by one: encoding whole blocks
    and then picking every other code would make XLA:CPU encode in the strided
    packing loop. Along other axes packing is not strided and encodes once.
    """
    blocks, bits = self.blocks, self.fmt.element.bits
    group = _packing.codes_per_group(bits)
    axis = blocks.packed
    view = blocks.view.shape
    if group == 1 or axis != len(view) - 1 or view[axis] % group:
      codes = self.codes(self.elements).reshape(blocks.shape)
      return _packing.pack_unchecked(codes, bits, blocks.axes[0])
    lanes = [
      self.codes(self.elements.lane(axis, group, j)) for j in range(group)
    ]
    shape = list(blocks.shape)
    shape[blocks.axes[0]] = _packing.packed_size(shape[blocks.axes[0]], bits)
    return _packing.pack_lanes(lanes, bits, axis).reshape(shape)


def check_tensor_scale(tensor_scale: ArrayLike | None) -> None:
  """Refuses what is not one number."""
  if tensor_scale is not None and np.size(tensor_scale) != 1:
    raise ValueError(
      f'tensor_scale.shape={np.shape(tensor_scale)} must hold one number; use'
      ' vmap for a stack of tensors'
    )


def from_data(
  x: jax.Array,
  fmt: BlockFormat,
  axes: tuple[int, ...],
  rule: ScaleRule,
  rounding: Rounding,
  tensor_scale: ArrayLike | None = None,
) -> Job:
  """A quantization whose scales come from the data.

  Args:
    x: the array.
    fmt: the block format.
    axes: block axes, negative.
    rule: how block scales follow.
    rounding: of elements.
    tensor_scale: one number, or one for each row with size 1 along block axes;
      None for that of the data.
  """
  blocks = split(x.astype(jnp.float32), fmt, axes)
  elements = _elements(x.shape, blocks, fmt, rounding)
  amax = _scaling.block_max(_scaling.magnitude_bits(blocks.view), blocks.inner)
  if fmt.tensor_scale:
    tensor_scale = _tensor_scale(blocks, amax, fmt, rule, tensor_scale)
  elif tensor_scale is not None:
    raise ValueError(f'{fmt} has no tensor scale; drop tensor_scale=')
  scale, zero_point, minimum = None, None, None
  if fmt.zero_point:
    scale, zero_point = _minmax(blocks, amax, fmt)
  elif fmt.minimum:
    scale, minimum = _affine(blocks, amax, fmt, str(rule))
  elif fmt.scale is None:
    pass
  elif callable(rule):
    scale = _by_function(blocks, amax, fmt, rule, tensor_scale)
  elif rule == 'absmean':
    scale = _absmean(blocks, amax, fmt)
  elif rule in _scaling.UNEVEN_RULES:
    scale = _uneven(blocks, amax, fmt, rule)
  elif rule == 'least_squares':
    scale = _fitted(blocks, amax, fmt)
  else:
    outer = None if tensor_scale is None else blocks.expand(tensor_scale)
    options = _scaling.candidates(amax, fmt, rule, outer)
    scale = _best(blocks, fmt, options, tensor_scale)
  scales = Scales(scale, tensor_scale, zero_point, minimum)
  scales = _two_levels(scales, fmt, blocks)
  encoder = _scaling.encoder(fmt.element, rule)
  return Job(blocks, fmt.one_level, scales, elements, rounding, encoder)


def from_scales(
  x: jax.Array,
  fmt: BlockFormat,
  axes: tuple[int, ...],
  scales: Scales,
  rounding: Rounding,
) -> Job:
  """A quantization with given scales, those of blocks in `scale_shape`."""
  blocks = split(x.astype(jnp.float32), fmt, axes)
  elements = _elements(x.shape, blocks, fmt, rounding)
  scale, tensor_scale, zero_point, minimum, stored = scales
  if stored is None:
    scale, zero_point, minimum = (
      None if leaf is None else blocks.expand(leaf)
      for leaf in (scale, zero_point, minimum)
    )
    scales = Scales(scale, tensor_scale, zero_point, minimum)
    scales = _two_levels(scales, fmt, blocks)
  else:
    scales = _from_stored(*stored, blocks)
  encoder = spec(fmt.element)
  return Job(blocks, fmt.one_level, scales, elements, rounding, encoder)


def _two_levels(scales: Scales, fmt: BlockFormat, blocks: Blocks) -> Scales:
  """Scales and minima quantized in their turn, where the format does so."""
  if fmt.scale_blocks is None:
    return scales
  scale, minimum = _stored(scales.scale, fmt.scale_blocks, blocks), None
  if scales.minimum is not None:
    # Minima are at most 0: unsigned elements have a scale below 0.
    minimum = _stored(-scales.minimum, fmt.scale_blocks, blocks)
    minimum = qarray.replace(minimum, scale=-minimum.scale)
  return _from_stored(scale, minimum, blocks)


def _from_stored(scale: QArray, minimum: QArray | None, blocks) -> Scales:
  def values(q):
    return None if q is None else blocks.expand(qarray.decode(q))

  stored = scale, minimum
  return Scales(values(scale), minimum=values(minimum), stored=stored)


def _stored(scale, fmt: BlockFormat, blocks: Blocks) -> QArray:
  x = blocks.squeeze(scale)
  job = from_data(x, fmt, blocks.axes, fmt.scale_rule, Rounding())
  return pack(job, jnp.float32)


def pack(job: Job, dtype: DTypeLike) -> QArray:
  """Runs a quantization into packed storage."""
  blocks, fmt, scales = job.blocks, job.fmt, job.scales

  def squeeze(leaf):
    return None if leaf is None else blocks.squeeze(leaf)

  scale, minimum = squeeze(scales.scale), squeeze(scales.minimum)
  if scales.stored is not None:
    scale, minimum = scales.stored
    fmt = dataclasses.replace(fmt, scale_blocks=scale.fmt)
  return QArray(
    codes=job.packed(),
    scale=scale,
    tensor_scale=scales.tensor_scale,
    zero_point=squeeze(scales.zero_point),
    minimum=minimum,
    fmt=fmt,
    axis=blocks.axes if fmt.is_tile else blocks.axes[0],
    pad=blocks.pad,
    dtype=np.dtype(dtype),
  )


def restore(view: jax.Array, blocks: Blocks, dtype: DTypeLike) -> jax.Array:
  """A view back in the shape of the array, without padding."""
  x = view.reshape(blocks.shape)
  x = qarray.unpadded(x, blocks.axes, blocks.pad)
  return x.astype(dtype)


def _elements(shape, blocks: Blocks, fmt, rounding: Rounding) -> Elements:
  """The view, and the random numbers of its rounding by logical index."""
  name, key, _, origin = rounding
  random = offset = None
  if name == 'stochastic':
    assert key is not None
    random = _rounding.random_words(key, shape, origin)
    random = split(random, fmt, blocks.axes).view
  if name == 'dithered':
    assert key is not None
    step = dither_step(fmt.element)
    offset = _rounding.dither(key, shape, origin) * step
    offset = split(offset, fmt, blocks.axes).view
  return Elements(blocks.view, random, offset)


def _scaled(y, blocks: Blocks, fmt: BlockFormat, scale, tensor_scale):
  """y / scale as y * (1 / scale), 0 in poisoned blocks."""
  if scale is None and tensor_scale is None:
    return y
  outer = None if tensor_scale is None else blocks.expand(tensor_scale)
  inverse = map(once, _scaling.inverse_factors(scale, fmt, outer))
  return block.scaled(y, tuple(inverse))


def once(factor: jax.Array) -> jax.Array:
  """A factor of blocks, in a form that is computed once for each.

  XLA:CPU computes what it broadcasts for every element anew, unless there is a
  division in it. This one is by 1, because nothing is less than -Inf, and of
  integers, which is exact on every device.
  """
  one = jnp.where(factor < -math.inf, jnp.int32(2), jnp.int32(1))
  return fb.from_bits(jax.lax.div(fb.to_bits(factor), one))


def _decode(codes, fmt, scales: 'Scales', offset, blocks: Blocks):
  """Values of codes in the shape of the view."""
  y = codec.decode(codes, spec(fmt.element))
  if offset is not None:
    y = y - offset
  if scales.zero_point is not None:
    y = y - scales.zero_point.astype(jnp.float32)
  if scales.scale is not None:
    for factor in _scaling.factors(scales.scale, fmt.scale):
      y = y * once(factor)
  if scales.tensor_scale is not None:
    y = y * blocks.expand(scales.tensor_scale)
  if scales.minimum is not None:
    y = y + once(scales.minimum.astype(jnp.float32))
  return y


def _tensor_scale(blocks, amax, fmt, rule, given):
  """The tensor scale with the axes of the array; poisoned only where it is the
  only scale, because block scales confine NaN and Inf to their block."""
  ones = (1,) * len(blocks.shape)
  if given is not None:
    scale = jnp.asarray(given, jnp.float32)
    scale = scale.reshape(ones) if scale.size == 1 else scale
    if fmt.scale is not None:
      return scale
    return jnp.where(jnp.any(amax >= fb.INF), math.nan, scale)
  if callable(rule) and fmt.scale is None:
    top = jnp.max(amax, initial=0)
    scale = _rule_values(blocks, rule, tuple(range(blocks.view.ndim)))
    return jnp.where(top >= fb.INF, math.nan, scale).reshape(ones)
  if rule == 'absmean':
    top = jnp.max(amax, initial=0)
    mean = _mean_magnitude(blocks.view, top, None, 1 / max(blocks.size, 1))
    mean = jnp.where(top < fb.MIN_NORMAL, 0, _scaling.bounded(mean, fmt))
    return jnp.where(top >= fb.INF, math.nan, mean).reshape(ones)
  if fmt.scale is None:
    top = jnp.max(amax, initial=0)
    scale = _scaling.tensor_scale_from(top, fmt)
    return jnp.where(top >= fb.INF, math.nan, scale).reshape(ones)

  def finite_max():
    b = _scaling.magnitude_bits(blocks.view)
    return jnp.max(jnp.where(b < fb.INF, b, 0), initial=0)

  top = jnp.max(amax, initial=0)
  top = jax.lax.cond(top < fb.INF, lambda: top, finite_max)
  return _scaling.tensor_scale_from(top, fmt).reshape(ones)


def _minmax(blocks: Blocks, amax, fmt: BlockFormat):
  """Asymmetric scale and zero point; 0 is always representable exactly."""
  x = blocks.view
  top = fmt.element.code_max
  high = jnp.max(x, axis=blocks.inner, keepdims=True, initial=0)
  low = jnp.min(x, axis=blocks.inner, keepdims=True, initial=0)
  # Rounding the zero point and the scale moves the ends of the range, which
  # must not pass the largest float32.
  slack = 1 / top + 2.0 ** (1 - fmt.scale.mantissa_bits)
  limit = float(np.finfo(np.float32).max) * (1 - slack)
  high, low = jnp.minimum(high, limit), jnp.maximum(low, -limit)
  bad = amax >= fb.INF
  step = jnp.float32(1 / top)
  span = high - low
  scale = jnp.where(jnp.isinf(span), high * step - low * step, span * step)
  scale = jnp.maximum(scale, jnp.float32(_scaling.SMALLEST))
  scale = jnp.where(bad | (amax < fb.MIN_NORMAL), 0, scale)
  dtype = jnp.dtype(fmt.scale.name)
  scale = scale.astype(dtype)
  zero = -low
  for factor in _scaling.inverse_factors(scale, fmt):
    zero = zero * factor
  zero = jnp.clip(fb.round_half_even(zero), 0, top)
  zero = jnp.where(bad, 0, zero).astype(jnp.int32).astype(jnp.uint8)
  return jnp.where(bad, jnp.asarray(math.nan, dtype), scale), zero


def _affine(blocks: Blocks, amax, fmt: BlockFormat, rule: str):
  """Scale and minimum of each block, stored in the format of the scale.

  The range of the block for 'minmax'. 'least_squares' rounds with scales near
  that of 'minmax' and fits scale and minimum to the codes, as GGML does for its
  K-quants; the pair with the least squared error is kept.
  """
  assert fmt.scale is not None
  x, top = blocks.view, fmt.element.max
  inner = {'axis': blocks.inner, 'keepdims': True}
  # Padding is not in the range, and products of elements and scales are finite.
  limit = float(np.finfo(np.float32).max) / 2 * (1 - 2.0**-7)
  real = blocks.without_padding(jnp.ones_like(x)) > 0
  low = jnp.min(jnp.where(real, x, math.inf), **inner)
  high = jnp.max(jnp.where(real, x, -math.inf), **inner)
  if fmt.scale_blocks is not None:  # whose minima are at most 0
    low = jnp.minimum(low, 0)
  low, high = jnp.clip(low, -limit, limit), jnp.clip(high, -limit, limit)
  scale = jnp.maximum(high - low, 0) * jnp.float32(1 / top)
  if rule == 'least_squares':
    scale, low = _least_squares(blocks, fmt, scale, low, real)
  bad, live = amax >= fb.INF, amax >= fb.MIN_NORMAL
  scale = jnp.where(scale > 0, _scaling.bounded(scale, fmt), 0)
  scale = jnp.where(bad, math.nan, jnp.where(live, scale, 0))
  low = jnp.where(live & ~bad, low, 0)
  return tuple(_scaling.from_values(v, fmt.scale) for v in (scale, low))


def _least_squares(blocks: Blocks, fmt: BlockFormat, scale, low, real):
  """The pair (scale, minimum) of the least squared error of several."""
  x, top = jnp.where(real, blocks.view, low), fmt.element.max

  def total(terms):
    return jnp.sum(jnp.where(real, terms, 0), axis=blocks.inner, keepdims=True)

  def error(scale, low, codes):
    return total(jnp.square(codes * scale + low - x))

  def codes_of(scale):
    y = (x - low) * _scaling.reciprocal(scale)
    return jnp.clip(fb.round_half_even(y), 0, top)

  n, above = total(jnp.ones_like(x)), x - low

  def try_step(best, step):
    # The range on `step` levels more or less, and the line through the codes.
    codes = codes_of(scale * (top / (top + step)))
    a, aa, b, ab = map(total, (codes, codes**2, above, codes * above))
    inverse = _scaling.reciprocal(n * aa - a * a)
    slope, start = (n * ab - a * b) * inverse, (aa * b - a * ab) * inverse + low
    if fmt.scale_blocks is not None:
      # A line through 0 where the best one starts above.
      from_zero = (ab + low * a) * _scaling.reciprocal(aa)
      slope = jnp.where(start > 0, from_zero, slope)
      start = jnp.minimum(start, 0)
    found = slope, start, error(slope, start, codes)
    is_better = (found[2] < best[2]) & (slope > 0)
    choose = functools.partial(jnp.where, is_better)
    return jax.tree.map(choose, found, best), None

  first = scale, low, error(scale, low, codes_of(scale))
  steps = jnp.asarray(LEAST_SQUARES_STEPS, jnp.float32)
  return jax.lax.scan(try_step, first, steps)[0][:2]


def _uneven(blocks: Blocks, amax, fmt: BlockFormat, rule: str):
  """The scale of 'signed_absmax' or 'full_range' of each block."""
  assert fmt.scale is not None
  live = (amax >= fb.MIN_NORMAL) & (amax < fb.INF)
  # A quotient, as in the libraries whose bits these are: compilers make a
  # product of a division by a number that they know.
  end = _scaling.reach(fmt.element, rule)
  divisor = jnp.where(live, jnp.float32(abs(end)), 1)
  scale = fb.from_bits(jnp.where(live, amax, 0)) / divisor
  scale = jnp.where(live, _scaling.bounded(scale, fmt, _widest(fmt)), 0)
  if rule == 'signed_absmax':
    is_opposite = _first_is_negative(blocks, amax) != (end < 0)
    scale = jnp.where(live & is_opposite, -scale, scale)
  scale = jnp.where(amax >= fb.INF, math.nan, scale)
  return _scaling.from_values(scale, fmt.scale)


def _widest(fmt: BlockFormat) -> float:
  """The largest magnitude of all codes."""
  return abs(_scaling.longer_end(fmt.element) or fmt.element.max)


def _first_is_negative(blocks: Blocks, amax):
  """Whether the first of the largest magnitudes of each block is negative."""
  view, inner = blocks.view, blocks.inner
  sizes = [n if d in inner else 1 for d, n in enumerate(view.shape)]
  place = jnp.arange(math.prod(sizes), dtype=jnp.int32).reshape(sizes)
  mark = 2 * place + (view < 0).astype(jnp.int32)
  last = np.iinfo(np.int32).max
  mark = jnp.where(_scaling.magnitude_bits(view) == amax, mark, last)
  return jnp.min(mark, axis=inner, keepdims=True, initial=last) % 2 == 1


def _fitted(blocks: Blocks, amax, fmt: BlockFormat):
  """The scale of the least squared error of those that fit codes best.

  Codes are those of the largest magnitude at the longer end of the elements,
  times `FIT_FACTORS`: the best scale of codes q is sum(x q) / sum(q q).
  """
  assert fmt.scale is not None
  x, scale_format = blocks.view, fmt.scale
  if _scaling.longer_end(fmt.element):
    first = _uneven(blocks, amax, fmt, 'signed_absmax')
  else:
    (first,) = _scaling.candidates(amax, fmt, 'absmax')
  start = first.astype(jnp.float32)
  encoder = _scaling.encoder(fmt.element, 'least_squares')

  def error(scale):
    return _squared_error(blocks, fmt, scale, None, encoder)

  def total(terms):
    terms = blocks.without_padding(terms)
    return jnp.sum(terms, axis=blocks.inner, keepdims=True)

  def try_factor(best, factor):
    y = _scaled(x, blocks, fmt, start * factor, None)
    q = codec.decode(codec.encode(y, encoder), spec(fmt.element))
    fit = total(x * q) * _scaling.reciprocal(total(q * q))
    size = _scaling.bounded(jnp.abs(fit), fmt, _widest(fmt))
    scale = _scaling.from_values(jnp.where(fit < 0, -size, size), scale_format)
    found = scale, error(scale)
    choose = functools.partial(jnp.where, found[1] < best[1])
    return jax.tree.map(choose, found, best), None

  factors = jnp.asarray(_scaling.FIT_FACTORS, jnp.float32)
  (scale, _), _ = jax.lax.scan(try_factor, (first, error(first)), factors)
  return jnp.where(first == 0, first, scale)


def _absmean(blocks: Blocks, amax, fmt: BlockFormat):
  """Mean magnitude of each block (BitNet b1.58)."""
  assert fmt.scale is not None
  share = blocks.expand(1 / jnp.maximum(block_counts(blocks), 1))
  mean = _mean_magnitude(blocks.view, amax, blocks.inner, share)
  mean = jnp.where(amax < fb.MIN_NORMAL, 0, _scaling.bounded(mean, fmt))
  scale = jnp.where(amax >= fb.INF, math.nan, mean)
  return _scaling.from_values(scale, fmt.scale)


def _by_function(blocks: Blocks, amax, fmt: BlockFormat, rule, tensor_scale):
  """The scale that a user's function gives each block, as it is stored."""
  assert fmt.scale is not None
  scale = _rule_values(blocks, rule, blocks.inner)
  if tensor_scale is not None:
    scale = scale * blocks.expand(_scaling.reciprocal(tensor_scale))
  scale = jnp.where(scale > 0, jnp.maximum(scale, _scaling.SMALLEST), scale)
  return _scaling.from_values(
    jnp.where(amax >= fb.INF, math.nan, scale), fmt.scale
  )


def _rule_values(blocks: Blocks, rule: Callable, inner: tuple[int, ...]):
  """rule(blocks, mask), with axes of size 1 in place of `inner`."""
  view = blocks.view
  outer = [d for d in range(view.ndim) if d not in inner]
  lead = tuple(view.shape[d] for d in outer)

  def rows(x):
    return x.transpose(*outer, *inner).reshape(*lead, -1)

  mask = blocks.without_padding(jnp.ones(view.shape, jnp.float32)) > 0
  x, mask = rows(view), rows(mask)
  scale = jnp.asarray(rule(x, mask))
  if scale.shape != lead or not jnp.issubdtype(scale.dtype, jnp.floating):
    raise ValueError(
      f'scale_rule={rule!r} made {scale.dtype}{list(scale.shape)} of blocks'
      f' {x.shape}; it must return one float for each, such as'
      ' jnp.max(x, axis=-1)'
    )
  return jnp.expand_dims(scale.astype(jnp.float32), inner)


def _mean_magnitude(x, amax, axes, share: ArrayLike):
  """sum |x| * share over `axes`, kept with size 1; `amax` are bits of max |x|.

  Blocks of large numbers, whose sum may overflow, are summed in units of 2^64.
  """
  is_large = amax >= 191 << 23

  def mean(unit):
    terms = jnp.abs(x) if unit is None else jnp.abs(x) * (1 / unit)
    return jnp.sum(terms, axis=axes, keepdims=True) * share

  def careful():
    unit = jnp.where(is_large, jnp.float32(2.0**64), 1)
    return mean(unit) * unit

  return jax.lax.cond(jnp.any(is_large), careful, lambda: mean(None))


def block_counts(blocks: Blocks) -> np.ndarray:
  """Elements of each block that are not padding, in `scale_shape`."""
  ones = np.ones([1] * len(blocks.shape), np.float32)
  view = blocks.view.shape
  for axis, pad, inner in blocks.positions():
    count, size = view[inner - 1], view[inner]
    n = blocks.shape[axis] - pad
    sizes = np.clip(n - size * np.arange(count), 0, size).astype(np.float32)
    shape = [1] * len(blocks.shape)
    shape[axis] = count
    ones = ones * sizes.reshape(shape)
  return ones


def _best(blocks: Blocks, fmt: BlockFormat, options, tensor_scale):
  """The candidate scale with the least squared error, for each block.

  Earlier candidates win ties. Errors are those of rounding to nearest.
  """
  if len(options) == 1:
    return options[0]
  best, least = options[0], None
  for scale in options:
    error = _squared_error(blocks, fmt, scale, tensor_scale, spec(fmt.element))
    if least is None:
      least = error
      continue
    better = error < least
    best = jnp.where(better, scale, best)
    least = jnp.where(better, error, least)
  return best


def _squared_error(
  blocks: Blocks, fmt: BlockFormat, scale, tensor_scale, encoder
):
  y = _scaled(blocks.view, blocks, fmt, scale, tensor_scale)
  codes = codec.encode(y, encoder)
  y = _decode(codes, fmt, Scales(scale, tensor_scale, None), None, blocks)
  error = blocks.without_padding(y - blocks.view)
  return sum_of_squares(error, blocks.inner)


def sum_of_squares(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
  """Sum of the squares of `x` over `axes`, kept with size 1.

  Masking a sign that is not there keeps the arithmetic of x out of the
  reduction, where XLA:CPU is slow at it.
  """
  square = fb.from_bits(_scaling.magnitude_bits(jnp.square(x)))
  return jnp.sum(square, axis=axes, keepdims=True)
