"""Exponentials as pairs (m, n) that stand for m 2^n.

A nonnegative real is a pair ``(m, n)``, worth ``m * 2**n``, with ``m`` a
float32 that is *not* normalised and ``n`` an integer held in float32, so that
no exponential overflows and no maximum has to be known beforehand:

  exp(x) = 2^n e^t,   n = rint(x log2 e),   t = x - n ln 2

Where the maximum of a row is known, its exponentials are taken relative to it,
which are plain float32 numbers.

Only elementwise operations and broadcasts are used, which lower in Pallas
kernels for TPU (Mosaic) and GPU (Mosaic GPU) as well as in XLA. In the
docstrings u = 2^-24, half an ulp of float32 at one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits, elementary

# float32 nearest to log2(e).
_LOG2_E = float.fromhex('0x1.715476p+0')

# ln 2 = LN2[0] + LN2[1] + LN2[2] to 8.8e-17. The first two parts have nine
# significant bits, so their products with an integer up to 2^15 are exact and
# it does not matter whether the compiler contracts them into FMAs.
LN2 = (
  float.fromhex('0x1.63p-1'),
  float.fromhex('-0x1.bdp-13'),
  float.fromhex('-0x1.05C61p-29'),
)

# The same in two parts to 2.3e-14, the first of 15 significant bits: enough for
# integers below 2^9.
_LN2_SHORT = (float.fromhex('0x1.62E4p-1'), float.fromhex('0x1.7F7D1Cp-20'))

# Minimax in relative error for exp on [-ln2/2, ln2/2] with float32
# coefficients and the constant fixed to 1, degree five (XNNPACK,
# f32-raddextexp). Polynomial error 1.55u there, 1.66u on |t| <= 0.3476.
_EXP = (
  1.0,
  float.fromhex('0x1.FFFFF6p-1'),
  float.fromhex('0x1.FFFDC6p-2'),
  float.fromhex('0x1.555A80p-3'),
  float.fromhex('0x1.573A1Ap-5'),
  float.fromhex('0x1.0F9F9Cp-7'),
)

# Polynomials for e^t: that above, or that of `elementary.exp`, of degree six.
EXPONENTIALS = ('degree5', 'certified')

# Largest |x| of the pair form: rint(x log2 e) stays below 2^15.
DOMAIN = 22712.0

# `scaled_exp_near`: largest |x|, for which |n| <= 505, and largest difference
# of two entries, for which their exponents differ by at most 125.
_NEAR = 350.0
_NEAR_SPREAD = 86.0

# Exponents of zero and of infinity: finite, so that differences of exponents
# are never inf - inf.
N_ZERO = -3.0e38
N_INF = 3.0e38

# 1.5 2^23: adding it leaves an integer in the low bits, for |n| < 2^22.
_INTEGER = 12582912.0
_INTEGER_BITS = 0x4B400000

_INF = float('inf')
_NAN = float('nan')

# exp(d) is below half the smallest float32 from here on.
_LOWEST = -128.0


class Pair(NamedTuple):
  """Reals ``m * 2**n``: float32 arrays of one shape, `n` integer-valued."""

  m: jax.Array
  n: jax.Array


def masked(x: jax.Array, where: jax.Array | None) -> jax.Array:
  """`x` in float32, with -inf where it is masked out."""
  x = x.astype(jnp.float32)
  return x if where is None else jnp.where(where, x, -_INF)


def exact_factor(d: jax.Array) -> jax.Array:
  """2^d exactly, for differences of exponents.

  Args:
    d: integer-valued float32, not NaN. Below -126 the result is 0, above 127
      it is 2^127.

  Returns:
    float32 array.
  """
  d = jnp.minimum(jnp.maximum(d, -127.0), 127.0)
  return bits.from_bits(bits.to_bits(d + (_INTEGER + 127.0)) << 23)


def ext_exp(
  x: jax.Array, low: jax.Array | None = None, exp: str = 'degree5'
) -> Pair:
  """exp(x + low) as a pair, without ever forming the power of two.

  Derivation. With ``n = rint(x log2 e)`` and ln 2 = P1 + P2 + P3, the steps
  ``a = x - n P1`` and ``b = a - n P2`` are exact: for |n| <= 2^15 the products
  are, `a` is a multiple of ulp(x) or of 2^-9 and at most about |x|, `b` is a
  multiple of ulp(x) or of 2^-21 and below 1/2. Only ``t = b - n P3`` rounds,
  by at most 2^-26 = u/4. The rounding of x log2 e moves `n` off the nearest
  integer by at most 2^-10, so |t| <= 0.3476 and m lies in [0.706, 1.416].
  The polynomial in Horner form is within 3.07u of e^t for every float32 t in
  that range (2.65u where multiply-add is fused), found by visiting them all.

  Error: at most 3.4u relative, 2.9u with fused multiply-add; u/4 more with
  `low`; about 1u less where `exp` is 'certified'. The pair (1, 0) for x = 0 is
  exact.

  Args:
    x: float32, finite with |x| <= DOMAIN. Beyond it the result is
      meaningless, see `exp_pair` for the guarded form.
    low: float32 or None, a correction with |low| <= 2^-17.
    exp: one of EXPONENTIALS.

  Returns:
    Pair with `m` in [0.706, 1.416] and `n` a whole number.
  """
  n = bits.round_half_even(x * _LOG2_E)
  t = ((x - n * LN2[0]) - n * LN2[1]) - n * LN2[2]
  if low is not None:
    t = t + low
  return Pair(_exp_of_rest(t, exp), n)


def exp_pair(x: jax.Array, where: jax.Array | None = None) -> Pair:
  """exp(x) as pairs for any `x`, with the entries that need guards.

  | entry                            | pair            | worth |
  |----------------------------------|-----------------|-------|
  | `where` false, or -inf           | (0, -3e38)      | 0     |
  | finite with |x| <= DOMAIN        | `ext_exp`       | e^x   |
  | +inf                             | (inf, 3e38)     | inf   |
  | NaN, or finite beyond the domain | (NaN, -3e38)    | NaN   |

  Args:
    x: floating-point array; taken as float32.
    where: boolean array of the shape of `x`, or None for all true.

  Returns:
    Pair of float32 arrays of the shape of `x`.
  """
  x = masked(x, where)
  usable = jnp.abs(x) <= DOMAIN
  m, n = ext_exp(jnp.where(usable, x, 0.0))
  zero_inf_nan = jnp.where(
    x == -_INF, 0.0, jnp.where(jnp.abs(x) < _INF, _NAN, x)
  )
  no_n = jnp.where(x == _INF, N_INF, jnp.full_like(x, N_ZERO))
  return Pair(jnp.where(usable, m, zero_inf_nan), jnp.where(usable, n, no_n))


def row_exponent(top: jax.Array) -> jax.Array:
  """The exponent E that `scaled_exp` takes for a row.

  | largest live entry of the row | E                        |
  |-------------------------------|--------------------------|
  | finite with |top| <= DOMAIN   | rint(top log2 e) - 1     |
  | -inf, or no live entry        | -3e38, as in `identity`  |
  | NaN, +inf or beyond           | 3e38                     |

  Args:
    top: float32, the largest live entry of each row.

  Returns:
    float32 array of its shape. One below the largest exponent, so that the
    sum is at least 1.41 and an entry that underflows is below 2^-126 of it.
  """
  n = bits.round_half_even(top * _LOG2_E) - 1.0
  bad = jnp.where(top == -_INF, N_ZERO, jnp.full_like(top, N_INF))
  return jnp.where(jnp.abs(top) <= DOMAIN, n, bad)


def scaled_exp(x: jax.Array, n: jax.Array, exp: str = 'degree5') -> jax.Array:
  """exp(x) 2^-E, by `ext_exp` and an exact power of two.

    m_i 2^(n_i - E),   E = `row_exponent` of the row

  Their sum M with E is the pair of the row, and they times 1/M its softmax,
  so that a row whose maximum is at hand is exponentiated once. Entries are
  those of `exp_pair`, rescaled: 0 for -inf, NaN for NaN and beyond the domain,
  inf for +inf.

  Error: 3.4u relative, 2.9u with fused multiply-add; less than 2^-126 is 0.

  Args:
    x: float32, -inf where masked.
    n: `row_exponent`, broadcastable with `x`.
    exp: one of EXPONENTIALS.

  Returns:
    float32 array of the shape of `x`.
  """
  special = jnp.where(jnp.abs(x) < _INF, _NAN, x)
  special = jnp.where(x == -_INF, 0.0, special)
  pair = ext_exp(x, exp=exp)
  return jnp.where(jnp.abs(x) <= DOMAIN, _scaled(pair, n), special)


def is_near(top: jax.Array, low: jax.Array) -> jax.Array:
  """Whether `scaled_exp_near` holds for entries in [low, top].

  Where there is a NaN the extremes may be NaN, or -inf and +inf as on XLA:CPU,
  which is not near, or leave it out, as if it were a finite number.
  """
  inside = (top <= _NEAR) & (low >= -_NEAR) & (low <= top)
  return inside & (top - low <= _NEAR_SPREAD)


def scaled_exp_near(x: jax.Array, n: jax.Array) -> jax.Array:
  """`scaled_exp` of entries that are near each other and near zero.

  No guards; ln 2 in two parts, of which the first times n and its difference
  from x are exact, and the rest rounds as in `ext_exp`; and the exponent is
  taken from the bits in which adding 1.5 2^23 leaves it. The error is the same.

  Args:
    x: float32 with `is_near` of its largest and smallest entry.
    n: `row_exponent`, broadcastable with `x`.

  Returns:
    float32 array of the shape of `x`; NaN where it is NaN.
  """
  shifted = bits.to_bits(x * _LOG2_E + _INTEGER)
  # As integers, because XLA simplifies (x + c) - c to x.
  k = (shifted - _INTEGER_BITS).astype(jnp.float32)
  t = (x - k * _LN2_SHORT[0]) - k * _LN2_SHORT[1]
  biased = shifted + (127 - n.astype(jnp.int32))
  return _exp_of_rest(t) * bits.from_bits(biased << 23)


def in_domain(
  x: jax.Array, where: jax.Array | None = None, axis: int | None = None
) -> jax.Array:
  """Whether the pair form covers all finite live entries along `axis`.

  NaN and infinities count as covered: both forms treat them alike.

  Args:
    x: floating-point array.
    where: boolean array of the shape of `x`, or None.
    axis: axis to reduce, None for all of them.

  Returns:
    Boolean array without `axis`.
  """
  size = jnp.abs(masked(x, where))
  return jnp.max(jnp.where(size < _INF, size, 0.0), axis, initial=0) <= DOMAIN


def exp_difference(x: jax.Array, a: jax.Array) -> jax.Array:
  """exp(x - a) for ``x <= a`` within 4u relative.

  The difference is taken as d + low by the error-free transformation of a
  sum (Knuth), so a large |x - a| costs no accuracy: exp(fl(x - a)) alone
  would be off by up to u |x - a|, 64u at the low end.

  Equal arguments give exactly 1, infinite ones included. Results below
  2^-126 are flushed to zero.

  Args:
    x: float32 without NaN, at most `a`.
    a: float32 without NaN, broadcastable with `x`.

  Returns:
    float32 array.
  """
  d = jnp.where(x == a, 0.0, x - a)
  back = d - x
  low = (x - (d - back)) - (a + back)
  near = (d > _LOWEST) & (d < 0.0)
  m, n = ext_exp(jnp.maximum(d, _LOWEST), jnp.where(near, low, 0.0))
  return m * exact_factor(n)


def _exp_of_rest(t: jax.Array, exp: str = 'degree5') -> jax.Array:
  """The polynomial for e^t, |t| <= 0.3476."""
  if exp == 'certified':
    return elementary.exp_core(t)
  m = _EXP[5] * t + _EXP[4]
  for c in _EXP[3::-1]:
    m = m * t + c
  return m


def _scaled(pair: Pair, n: jax.Array) -> jax.Array:
  """m_i 2^(n_i - E) for n_i - E < 128; where that is below -126 it is 0."""
  biased = jnp.maximum(pair.n + ((_INTEGER + 127.0) - n), _INTEGER)
  return pair.m * bits.from_bits(bits.to_bits(biased) << 23)
