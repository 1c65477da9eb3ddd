"""Block-scaled arrays as kernels see them: codes, scales, static values."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits as fb, codec, scale as exact


class Blocked(NamedTuple):
  """Static description of an array in blocks along one axis.

  The value of an element is element(code) * scale, or
  (code - zero point) * scale for unsigned integers with a zero point.

  Attributes:
    element: what a code stands for.
    bits: width of a code, 1 to 8.
    block: elements that share a scale; 0 for the whole axis.
    scale: format of scales that are stored as uint8 codes; None for float32 or
      bfloat16 numbers, and where there are no block scales.
  """

  element: codec.Element
  bits: int
  block: int
  scale: codec.Float | None


def is_exponent(scale: codec.Float | None) -> bool:
  """Whether scales are powers of two in E8M0: no zero, no subnormals."""
  return scale is not None and not scale.subnormals


def scale_factors(
  stored: jax.Array, scale: codec.Float | None
) -> tuple[jax.Array, ...]:
  """Float32 factors whose product is the stored scale.

  E8M0 gives two, so that 2^-127 survives hardware that flushes subnormals.
  """
  if scale is None:
    return (stored.astype(jnp.float32),)
  if is_exponent(scale):
    return exact.exponent_factors(stored)
  return (codec.decode_float(stored, scale),)


def times_scale(
  x: jax.Array, stored: jax.Array, scale: codec.Float | None
) -> jax.Array:
  """x * scale in float32, `stored` broadcastable to x."""
  for factor in scale_factors(stored, scale):
    x = x * factor
  return x


def scale_rules(spec: Blocked) -> tuple[str, ...]:
  """Rules of `stored_scale` that fit `spec`.

  'even' rounds the maximum to the mantissa of the element; only minifloats
  have one.
  """
  if not is_exponent(spec.scale):
    return ('absmax',)
  has_mantissa = isinstance(spec.element, codec.Float)
  return tuple(r for r in exact.EXPONENT_RULES if has_mantissa or r != 'even')


def stored_scale(
  amax_bits: jax.Array,
  spec: Blocked,
  rule: str,
  tensor_scale: jax.Array | None = None,
) -> jax.Array:
  """The scale of blocks from their maxima, by a rule in closed form.

  Args:
    amax_bits: int32 bits of max |x| of each block; INF or more if poisoned.
    spec: static description.
    rule: a name from `scale_rules`.
    tensor_scale: float32 or None.

  Returns:
    int32 codes or float32 numbers: the NaN code or NaN for poisoned blocks.
  """
  largest = codec.largest(spec.element)
  if is_exponent(spec.scale):
    emax = math.frexp(largest)[1] - 1
    element = spec.element
    m = element.mantissa_bits if isinstance(element, codec.Float) else 0
    return exact.exponent_code(amax_bits, rule, emax, largest, m)
  bad = amax_bits >= fb.INF
  scale = absmax(amax_bits, largest, tensor_scale)
  if spec.scale is None:
    return jnp.where(bad, jnp.float32(math.nan), scale)
  code = codec.encode_float(scale, spec.scale, dtype=jnp.int32)
  nan = spec.scale.nan_code
  return jnp.where(bad, nan, code)  # pyright: ignore[reportArgumentType]


def absmax(
  amax_bits: jax.Array, largest: float, tensor_scale: jax.Array | None = None
) -> jax.Array:
  """max |x| / largest / tensor_scale in float32, 0 for poison and subnormals.

  Multiplications by 1 / largest and by 1 / tensor_scale, in this order. At
  least 2^-126, because blocks with a smaller scale would be flushed to zero;
  with a tensor scale 2^-125 / tensor_scale, as the code may be rounded down.
  Without a tensor scale at most what keeps `largest` finite.
  """
  live = (amax_bits >= fb.MIN_NORMAL) & (amax_bits < fb.INF)
  amax = fb.from_bits(jnp.where(live, amax_bits, 0))
  factor = jnp.float32(1 / largest)
  if tensor_scale is None:
    top = exact.largest_scale(largest)
    scale = jnp.clip(amax * factor, exact.SMALLEST, top)
  else:
    inverse = exact.reciprocal(tensor_scale)
    least = inverse * jnp.float32(2 * exact.SMALLEST)
    scale = jnp.maximum(amax * (inverse * factor), least)
  return jnp.where(live, scale, 0.0)


def inverse_factors(
  stored: jax.Array | None,
  scale: codec.Float | None,
  largest: float,
  tensor_scale: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
  """Float32 factors that quantize: their product is 1 / scale.

  1 / 0 counts as 0, so blocks without a scale become zero. The contract of
  every implementation is r = 1 / s in float32, then x * r.

  Args:
    stored: block scales as `scale_factors` takes them; None where the tensor
      scale is the only one.
    scale: their format.
    largest: the largest element.
    tensor_scale: float32 or None.

  Returns:
    Factors; the first is NaN for poisoned blocks.
  """
  if is_exponent(scale):
    assert stored is not None
    return exact.inverse_exponent_factors(stored)
  s = tensor_scale
  if stored is not None:
    (s,) = scale_factors(stored, scale)
    if tensor_scale is not None:
      s = s * tensor_scale
  assert s is not None
  if largest >= 4:
    return (exact.reciprocal(s),)
  # s can exceed 2^126 here, and 1 / s would be flushed: split the factor.
  large = jnp.abs(s) > jnp.float32(2.0**125)
  shrink = jnp.where(large, jnp.float32(1 / 16), jnp.float32(1))
  return exact.reciprocal(s * shrink), shrink


def scaled(x: jax.Array, inverse: tuple[jax.Array, ...]) -> jax.Array:
  """x / scale from the `inverse_factors`, 0 in poisoned blocks."""
  for factor in inverse:
    x = x * factor
  bad = inverse[0] != inverse[0]
  return jnp.where(bad, jnp.float32(0), x)
