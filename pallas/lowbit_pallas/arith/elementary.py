"""Elementary functions of float32: reductions of the range, and their cores.

A core approximates a function on a short interval. A reduction turns a core
into a function of every float32 by exact steps around it:

  exp2_split   2^x = 2^n 2^r             r = x - n in [-1/2, 1/2]
  exp_split    e^x = 2^n e^r             r = x - n ln 2, |r| <= 0.3466
  log2_split   log2(x) = n + log2(m)     m in [sqrt(1/2), sqrt(2))
  sin_pio2     sin(x) by x = n pi/2 + r  |r| <= 0.7854, |x| <= 1e5
  odd_clamp    f(-x) = -f(x), +-1 beyond a limit

All steps are elementwise, without tables, and lower in Pallas kernels for TPU
and GPU. Subnormal numbers count as zero, as arguments and as results, on every
back end.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits

Core = Callable[[jax.Array], jax.Array]

# Adding 1.5 2^23 leaves the nearest integer in the low bits, for |n| < 2^22.
_INTEGER = 12582912.0
_INTEGER_BITS = 0x4B400000
_ONE_BITS = 0x3F800000
_SQRT_HALF_BITS = 0x3F3504F3
_SIGN = -(2**31)
_MIN_NORMAL = 2.0**-126
_INF = float('inf')

_LOG2_E = float.fromhex('0x1.715476p+0')
# ln 2 = _LN2[0] + _LN2[1] to 2.3e-14. The first has 15 significant bits, so its
# product with an integer below 2^9 is exact.
_LN2 = (float.fromhex('0x1.62E4p-1'), float.fromhex('0x1.7F7D1Cp-20'))
# Largest x with finite e^x, and smallest with e^x >= 2^-126.
_EXP_MAX = float.fromhex('0x1.62e42ep+6')
_EXP_MIN = float.fromhex('-0x1.5d589ep+6')

# pi/2 to 2^-68. All parts but the last have 8 significant bits or less, so that
# their products with an integer below 2^16 are exact, and none is negative, so
# that -0 stays -0.
_PI_2 = (
  float.fromhex('0x1.92p+0'),
  float.fromhex('0x1.f8p-12'),
  float.fromhex('0x1.a8p-19'),
  float.fromhex('0x1.1p-26'),
  float.fromhex('0x1.0ap-34'),
  float.fromhex('0x1.4611a6p-42'),
)
_TWO_OVER_PI = float.fromhex('0x1.45f306p-1')
SIN_LIMIT = 1e5


def exp2_split(core: Core) -> Core:
  """2^x for every float32 from 2^r on [-1/2, 1/2].

  Args:
    core: approximates 2^r; positive and within a factor of two of it, and
      exactly 1 at zero, so that whole numbers have exact powers.

  Returns:
    Function of a float32 array. 0 where x < -126, inf where x >= 128, NaN for
    NaN. The scaling by 2^n is exact.
  """

  def exp2(x: jax.Array) -> jax.Array:
    shifted, n = _nearest(x)
    return _guarded(x, -126.0, 128.0, _scaled(core(x - n), shifted))

  return exp2


def exp_split(core: Core) -> Core:
  """e^x for every float32 from e^r on [-0.3466, 0.3466].

  ln 2 is subtracted in two parts (Cody and Waite, "Software Manual for the
  Elementary Functions", 1980).

  Args:
    core: approximates e^r; as in `exp2_split`.

  Returns:
    Function of a float32 array. 0 where e^x < 2^-126, inf where it exceeds the
    largest float32, NaN for NaN.
  """

  def exp(x: jax.Array) -> jax.Array:
    shifted, n = _nearest(x * _LOG2_E)
    r = (x - n * _LN2[0]) - n * _LN2[1]
    above = float.fromhex('0x1.62e430p+6')
    return _guarded(x, _EXP_MIN, above, _scaled(core(r), shifted))

  return exp


def log2_split(core: Core) -> Core:
  """log2(x) for every float32 from log2(m) on [sqrt(1/2), sqrt(2)].

  Args:
    core: approximates log2(m); exactly 0 at one, so that powers of two have
      exact logarithms.

  Returns:
    Function of a float32 array. -inf for zero and subnormal numbers, NaN below
    and for NaN, inf for inf.
  """

  def log2(x: jax.Array) -> jax.Array:
    n, m = binade(x)
    return guarded_log(x, n + core(m))

  return log2


def sin_pio2(sin_core: Core, cos_core: Core, quarters: int = 0) -> Core:
  """sin(x + quarters pi/2) for |x| <= SIN_LIMIT.

  Args:
    sin_core: approximates sin(r) on [-pi/4, pi/4].
    cos_core: approximates cos(r) there.
    quarters: 0 for the sine of x, 1 for its cosine.

  Returns:
    Function of a float32 array. Beyond the limit it is meaningless, and NaN for
    infinities and NaN.
  """

  def sin(x: jax.Array) -> jax.Array:
    r, excess, k = reduce_pio2(x)
    r = r - excess
    return quadrant(sin_core(r), cos_core(r), k + quarters)

  return sin


def odd_clamp(core: Core, limit: float) -> Core:
  """An odd function that is +-1 from a limit on.

  Args:
    core: the function on [0, limit); what it gives elsewhere is not used.
    limit: positive.

  Returns:
    Function of a float32 array; NaN for NaN, and of the sign of x otherwise.
  """

  def odd(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    y = jnp.where(size >= limit, jnp.ones_like(x), core(size))
    sign = bits.to_bits(x) & _SIGN
    return bits.from_bits(bits.to_bits(y) ^ sign)

  return odd


def binade(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n, m) with x = 2^n m and m in [sqrt(1/2), sqrt(2)), for positive normal x.

  Returns:
    Two float32 arrays, `n` integer-valued; anything for other x.
  """
  b = bits.to_bits(x)
  n = (b - _SQRT_HALF_BITS) >> 23
  return n.astype(jnp.float32), bits.from_bits(b - (n << 23))


def guarded_log(x: jax.Array, y: jax.Array) -> jax.Array:
  """The logarithm `y` of positive normal x, and the limits elsewhere."""
  y = jnp.where(x < _INF, y, x)
  low = jnp.where(x > -_MIN_NORMAL, -_INF, jnp.full_like(x, float('nan')))
  return jnp.where(x < _MIN_NORMAL, low, y)


def reduce_pio2(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(r, excess, k): x = k pi/2 + r - excess, |r| < 0.7855, |x| <= SIN_LIMIT.

  Cody and Waite's reduction in six parts. The first three leave no error. The
  next two take the rounding of their differences along, since x may be as near
  to a multiple of pi/2 as 2^-27.8 (found by visiting them all).

  Returns:
    `r` and `excess` float32, with |excess| <= 2^-25; `k` int32. For x = -0, `r`
    is -0 and `excess` +0, whose difference is -0.
  """
  shifted, n = _nearest(x * _TWO_OVER_PI)
  a = ((x - n * _PI_2[0]) - n * _PI_2[1]) - n * _PI_2[2]  # exact
  b, from_b = _less(a, n * _PI_2[3])
  c, from_c = _less(b, n * _PI_2[4])
  return c, n * _PI_2[5] - (from_b + from_c), shifted


def quadrant(sin: jax.Array, cos: jax.Array, k: jax.Array) -> jax.Array:
  """sin(r + k pi/2) from sin(r), cos(r) and int32 `k`."""
  y = jnp.where((k & 1) == 0, sin, cos)
  return bits.from_bits(bits.to_bits(y) ^ ((k & 2) << 30))


def _nearest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The nearest integer n to |x| < 2^22: bits of 1.5 2^23 + n, and n itself.

  By way of integers, because XLA simplifies (x + c) - c to x, and
  lax.reduce_precision, which keeps it from that, has no lowering in Pallas.
  """
  shifted = bits.to_bits(x + _INTEGER)
  return shifted, (shifted - _INTEGER_BITS).astype(jnp.float32)


def _scaled(p: jax.Array, shifted: jax.Array) -> jax.Array:
  """p 2^n for p in (1/2, 2), by addition to the exponent bits."""
  return bits.from_bits(bits.to_bits(p) + (shifted << 23))


def _guarded(x, lowest: float, above: float, y: jax.Array) -> jax.Array:
  """y, but 0 for x < lowest, inf for x >= above, and NaN for NaN."""
  y = jnp.where(x < above, y, x + _INF)
  return jnp.where(x < lowest, 0.0, y)


def _less(a: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """a - w and what its rounding lost (Dekker), for |a| >= |w|."""
  difference = a - w
  return difference, (a - difference) - w
