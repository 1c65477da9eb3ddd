"""Exact scales from exponent bits.

Scales are never built with log2 or exp2, which XLA evaluates inexactly at
powers of two. Functions take the bit pattern of amax = max |x| as int32: its
order is the order of the numbers, and Inf and NaN are the patterns from `INF`
on, so one integer maximum over a block finds amax and poison together.

Power-of-two scales are E8M0 codes: 2**(code - 127), 255 for NaN.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_pallas.arith import bits as fb

# Float scales are 0 or at least this: hardware that flushes subnormals would
# make zeros of a smaller one, and of its block.
SMALLEST = 2.0**-126

EXPONENT_RULES = ('floor', 'ceil', 'even', 'rceil', 'round')
NAN_CODE = 255


def magnitude_bits(x: jax.Array) -> jax.Array:
  """Bits of |x| as int32."""
  return fb.to_bits(x) & fb.MAGNITUDE


def magnitude(x: jax.Array) -> jax.Array:
  """|x| with NaN as Inf: its float maximum has the bits of `block_max`."""
  size = jnp.abs(x)
  return jnp.where(x == x, size, jnp.float32(math.inf))


def block_max(b: jax.Array, axes: Sequence[int]) -> jax.Array:
  """Maximum of non-negative int32 `b` over `axes`, kept with size 1.

  XLA:CPU reduces many axes element by element. Folding an axis in halves first
  is the same maximum at vector speed: the minor axis as rows of 16 lanes, other
  axes from 128 on, down to 64 where they are longer (measured: the loops that
  are left vectorise at these sizes).
  """
  axes = sorted(a % b.ndim for a in axes)
  for axis in axes:
    n = b.shape[axis]
    if axis < b.ndim - 1:
      b = _fold_max(b, axis) if n >= 128 else _reduce_max(b, axis)
    elif n % 32 == 0:
      rows = _fold_max(b.reshape(*b.shape[:-1], n // 16, 16), axis)
      b = jnp.max(rows, axis=-1)
    else:
      b = _reduce_max(b, axis)
  return b


def _fold_max(b, axis: int):
  least = 1 if b.shape[axis] <= 128 else 64
  while b.shape[axis] % 2 == 0 and b.shape[axis] > least:
    half = b.shape[axis] // 2
    low = lax.slice_in_dim(b, 0, half, axis=axis)
    b = jnp.maximum(low, lax.slice_in_dim(b, half, 2 * half, axis=axis))
  return b if b.shape[axis] == 1 else _reduce_max(b, axis)


def _reduce_max(b, axis: int):
  return jnp.max(b, axis=axis, keepdims=True, initial=0)


def largest_scale(largest: float, mantissa_bits: int = 23) -> float:
  """The largest scale whose product with `largest` is a finite float32.

  Args:
    largest: the largest element, or product of elements and inner scales.
    mantissa_bits: of the scale.
  """
  top = float(np.finfo(np.float32).max)
  scale = min(top / largest, top)
  unit = 2.0 ** (math.frexp(scale)[1] - 1 - mantissa_bits)
  return math.floor(scale / unit) * unit


def largest_exponent_code(emax: int) -> int:
  """The largest E8M0 code for which elements of exponent `emax` are finite."""
  return min(254, 254 - emax)


def exponent_code(
  amax_bits: jax.Array, rule: str, emax: int, max_value: float, m: int
) -> jax.Array:
  """E8M0 code of the shared scale.

  Args:
    amax_bits: int32 bits of the block maxima.
    rule: 'floor': floor(log2 amax) - emax. 'ceil': ceil(log2 amax) - emax.
      'even': floor after amax is rounded half up to m mantissa bits. 'rceil':
      ceil(log2(amax / max_value)), the smallest scale that does not saturate.
      'round': round(log2(amax / max_value)).
    emax: exponent of the largest element.
    max_value: largest element.
    m: mantissa bits of the element, for 'even'.

  Returns:
    int32 in [0, 254 - emax], so that every number of the block is finite: where
    another rule asks for more, the scale of 'floor', and the maximum saturates.
    0 for zero blocks (amax < 2^-126), 255 for Inf or NaN.
  """
  fraction = amax_bits & 0x7FFFFF
  e = amax_bits >> 23
  lead = math.frexp(max_value)[0] * 2  # in [1, 2)
  if rule == 'floor':
    code = e - emax
  elif rule == 'ceil':
    code = e - emax + (fraction > 0).astype(jnp.int32)
  elif rule == 'even':
    code = ((amax_bits + (1 << (22 - m))) >> 23) - emax
  elif rule == 'rceil':
    top = int((lead - 1) * (1 << 23))
    code = e - emax + (fraction > top).astype(jnp.int32)
  elif rule == 'round':
    # amax = (1 + fraction / 2^23) 2^e; compare its square with 2 lead^2 and
    # lead^2 / 2 in integers. Neither is a square of such a number: no ties.
    square = Fraction(lead) ** 2 * (1 << 46)
    up = fraction >= math.isqrt(int(square * 2)) + 1 - (1 << 23)
    down = fraction < math.isqrt(int(square / 2)) + 1 - (1 << 23)
    code = e - emax + up.astype(jnp.int32) - down.astype(jnp.int32)
  else:
    raise ValueError(f'{rule=} is not one of {EXPONENT_RULES}')
  code = jnp.clip(code, 0, largest_exponent_code(emax))
  code = jnp.where(amax_bits < fb.MIN_NORMAL, 0, code)
  return jnp.where(amax_bits >= fb.INF, NAN_CODE, code)


def exponent_factors(code: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two normal float32 factors whose product is 2**(code - 127).

  2^-127 itself is subnormal and would be flushed to zero. Code 255 gives NaN.
  """
  code = code.astype(jnp.int32)
  main = fb.from_bits(jnp.maximum(code, 1) << 23)
  main = jnp.where(code == NAN_CODE, jnp.float32(math.nan), main)
  return main, jnp.where(code == 0, jnp.float32(0.5), jnp.float32(1))


def inverse_exponent_factors(code: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two normal float32 factors whose product is 2**(127 - code)."""
  code = code.astype(jnp.int32)
  main = fb.from_bits((254 - jnp.minimum(code, 253)) << 23)
  main = jnp.where(code == NAN_CODE, jnp.float32(math.nan), main)
  return main, jnp.where(code == 254, jnp.float32(0.5), jnp.float32(1))


def reciprocal(s: jax.Array) -> jax.Array:
  """1 / s in float32, 0 for s = 0 and for subnormal s."""
  tiny = jnp.abs(s) < jnp.float32(2.0**-126)
  return jnp.where(tiny, 0.0, 1 / jnp.where(tiny, 1.0, s))
