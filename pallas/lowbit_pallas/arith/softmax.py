"""The algebra of a softmax in pieces: pairs (m, n) that stand for m 2^n.

A softmax over a long row is a sum of exponentials that must be taken in
pieces: blocks of columns, lanes, devices. Two representations of a partial
sum are given here, each with an identity, a merge and a normalisation.

Pair form. A nonnegative real is a pair ``(m, n)``, worth ``m * 2**n``, with
``m`` a float32 that is *not* normalised and ``n`` an integer held in float32,
so that no exponential overflows and no maximum has to be known beforehand:

  exp(x) = 2^n e^t,   n = rint(x log2 e),   t = x - n ln 2
  (m, n) + (p, q) = (m 2^(n-e) + p 2^(q-e), e),   e = max(n, q)

Rescaling multiplies by a power of two and is therefore exact unless it
underflows, so a sum in any order and any grouping carries only the rounding
of its additions. Valid for finite ``|x| <= DOMAIN``.

Online form. ``(peak, total)`` is worth ``total * exp(peak)`` with the running
maximum in real units. Valid for every float32 `x`; its merge factors are
rounded exponentials.

In both forms an entry of -inf (or one that is masked out) adds nothing, a NaN
makes the partial sum NaN for good, and +inf makes it infinite: NaN and
infinity live in ``m`` (``total``), so no separate flag has to be carried
through a kernel, and every merge keeps them by itself. Normalising by such a
sum gives NaN everywhere in its row.

Only elementwise operations, maxima and sums along one axis, and broadcasts
are used, all of which lower in Pallas kernels for TPU (Mosaic) and GPU
(Mosaic GPU) as well as in XLA. In the docstrings u = 2^-24, half an ulp of
float32 at one, and h is the longest chain of additions in a sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_pallas.arith import bits, elementary

# float32 nearest to log2(e).
_LOG2_E = float.fromhex('0x1.715476p+0')

# ln 2 = _LN2[0] + _LN2[1] + _LN2[2] to 8.8e-17. The first two parts have nine
# significant bits, so their products with an integer up to 2^15 are exact and
# it does not matter whether the compiler contracts them into FMAs.
_LN2 = (
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
_N_ZERO = -3.0e38
_N_INF = 3.0e38

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


class Peak(NamedTuple):
  """Reals ``total * exp(peak)``: float32 arrays of one shape."""

  peak: jax.Array
  total: jax.Array


def exact_factor(d: jax.Array) -> jax.Array:
  """Returns 2^d exactly, for differences of exponents.

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
  """Returns exp(x + low) as a pair, without ever forming the power of two.

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
  t = ((x - n * _LN2[0]) - n * _LN2[1]) - n * _LN2[2]
  if low is not None:
    t = t + low
  return Pair(_exp_of_rest(t, exp), n)


def identity(shape: tuple[int, ...]) -> Pair:
  """Returns pairs worth zero, the identity of `merge`, exactly."""
  return Pair(
    jnp.zeros(shape, jnp.float32), jnp.full(shape, _N_ZERO, jnp.float32)
  )


def exp_pair(x: jax.Array, where: jax.Array | None = None) -> Pair:
  """Returns exp(x) as pairs for any `x`, with the entries that need guards.

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
  x = _masked(x, where)
  usable = jnp.abs(x) <= DOMAIN
  m, n = ext_exp(jnp.where(usable, x, 0.0))
  zero_inf_nan = jnp.where(
    x == -_INF, 0.0, jnp.where(jnp.abs(x) < _INF, _NAN, x)
  )
  no_n = jnp.where(x == _INF, _N_INF, jnp.full_like(x, _N_ZERO))
  return Pair(jnp.where(usable, m, zero_inf_nan), jnp.where(usable, n, no_n))


def row_exponent(top: jax.Array) -> jax.Array:
  """Returns the exponent E that `scaled_exp` takes for a row.

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
  bad = jnp.where(top == -_INF, _N_ZERO, jnp.full_like(top, _N_INF))
  return jnp.where(jnp.abs(top) <= DOMAIN, n, bad)


def scaled_exp(x: jax.Array, n: jax.Array, exp: str = 'degree5') -> jax.Array:
  """Returns exp(x) 2^-E, by `ext_exp` and an exact power of two.

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
  """Tells whether `scaled_exp_near` holds for entries in [low, top].

  Where there is a NaN the extremes may be NaN, or -inf and +inf as on XLA:CPU,
  which is not near, or leave it out, and then it goes the way of a number.
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


def row_pair(m: jax.Array, n: jax.Array) -> Pair:
  """The sum of a row as a pair with M near 1, which has a small logarithm.

  Args:
    m: the sum of the `scaled_exp` of the row.
    n: its `row_exponent`.
  """
  return Pair(0.5 * m, n + 1.0)


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


def in_domain(
  x: jax.Array, where: jax.Array | None = None, axis: int | None = None
) -> jax.Array:
  """Tells whether the pair form covers all finite live entries along `axis`.

  NaN and infinities count as covered: both forms treat them alike.

  Args:
    x: floating-point array.
    where: boolean array of the shape of `x`, or None.
    axis: axis to reduce, None for all of them.

  Returns:
    Boolean array without `axis`.
  """
  size = jnp.abs(_masked(x, where))
  return jnp.max(jnp.where(size < _INF, size, 0.0), axis, initial=0) <= DOMAIN


def merge(a: Pair, b: Pair) -> Pair:
  """Returns the sum of two pairs.

    (m, n) + (p, q) = (m 2^(n-e) + p 2^(q-e), e),   e = max(n, q)

  Commutative bit for bit. Associative up to the rounding of the additions,
  at most u relative per merge, and exactly so where the sums are exact; a
  term that is 2^-126 or less of the other is dropped. An accumulator that
  belongs to the sum, such as the weighted values of attention, is rescaled by
  the same exact factor ``exact_factor(n - e)``.

  Args:
    a: Pair.
    b: Pair of the same shape.

  Returns:
    Pair of that shape.
  """
  n = jnp.maximum(a.n, b.n)
  return Pair(a.m * exact_factor(a.n - n) + b.m * exact_factor(b.n - n), n)


def reduce(pair: Pair, axis: int) -> Pair:
  """Returns the sum of the pairs along one axis.

    E = max_i n_i,   M = sum_i m_i 2^(n_i - E)

  M is within h u of the sum of the m_i 2^(n_i), relative, and lies in
  [0.706, 1.416 k] for k terms that are not all zero.

  Args:
    pair: Pair of shape ``(..., k, ...)``.
    axis: the axis of size k; k = 0 gives the identity.

  Returns:
    Pair without that axis.
  """
  shape = pair.m.shape
  axis %= len(shape)
  if shape[axis] == 0:
    return identity(shape[:axis] + shape[axis + 1 :])
  n = jnp.max(pair.n, axis=axis)
  scaled = pair.m * exact_factor(pair.n - _spread(n, shape, axis))
  return Pair(jnp.sum(scaled, axis=axis), n)


def normalise(
  pair: Pair, total: Pair, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """Returns the softmax m_i 2^(n_i) / (M 2^E).

    y_i = (m_i (1/M)) 2^(n_i - E)

  Error for y >= 2^-120: numerator and denominator 3.4u each, h u for the sum,
  u for the reciprocal, u for the product, together (9 + h) u relative, or
  (8 + h) u where multiply-add is fused. Smaller results may be flushed to
  zero: 2^-126 absolute.

  A row whose total is zero gives NaN, as 0/0; a row with a live NaN or +inf
  gives NaN; masked entries are zero in every row.

  Args:
    pair: `exp_pair` of the inputs, ``(..., k, ...)``.
    total: `reduce` of all pairs of the row, without `axis`, or with as many
      axes as `pair` and broadcastable to it.
    where: boolean array of the shape of `pair`, or None.
    axis: the axis that `total` lacks, where it does.

  Returns:
    float32 array of the shape of `pair`.
  """
  shape = pair.m.shape
  inverse = jnp.where(total.m < _INF, 1.0 / total.m, _NAN)
  factor = exact_factor(pair.n - _spread(total.n, shape, axis))
  y = (pair.m * _spread(inverse, shape, axis)) * factor
  return y if where is None else jnp.where(where, y, 0.0)


def logsumexp(total: Pair) -> jax.Array:
  """Returns ln(M 2^E) = ((ln M + E P3) + E P2) + E P1.

  E P1 and E P2 are exact, so the error is that of ln M, (4 + h) u and the
  rounding of the logarithm, plus two roundings of the result. A zero total
  gives -inf, an infinite one +inf.

  Args:
    total: Pair, `reduce` of the pairs of a row.

  Returns:
    float32 array of the shape of `total`.
  """
  n = total.n
  return ((jnp.log(total.m) + n * _LN2[2]) + n * _LN2[1]) + n * _LN2[0]


def log_normalise(
  x: jax.Array, total: Pair, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """Returns the log softmax (x_i - E ln 2) - ln M.

  E ln 2 is subtracted in the same three parts as in `ext_exp`, of which the
  first two lose nothing where x_i is near E ln 2: the error is relative to
  the result, not to x_i. Forming logsumexp first would lose |x_i| u.

  Error: (5 + h) u for M, 2u |ln M| for its logarithm and 4u |result|.

  Args:
    x: the inputs, ``(..., k, ...)``.
    total: as in `normalise`.
    where: boolean array of the shape of `x`, or None; masked entries give
      -inf.
    axis: the axis that `total` lacks, where it does.

  Returns:
    float32 array of the shape of `x`; NaN where `normalise` gives NaN.
  """
  x = x.astype(jnp.float32)
  n = _spread(total.n, x.shape, axis)
  log_m = jnp.where(total.m < _INF, jnp.log(total.m), _NAN)
  centred = ((x - n * _LN2[0]) - n * _LN2[1]) - n * _LN2[2]
  y = centred - _spread(log_m, x.shape, axis)
  return y if where is None else jnp.where(where, y, -_INF)


def exp_difference(x: jax.Array, a: jax.Array) -> jax.Array:
  """Returns exp(x - a) for ``x <= a`` within 4u relative.

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


def online_identity(shape: tuple[int, ...]) -> Peak:
  """Returns sums worth zero, the identity of `online_merge`, exactly."""
  return Peak(
    jnp.full(shape, -_INF, jnp.float32), jnp.zeros(shape, jnp.float32)
  )


def online_reduce(
  x: jax.Array, where: jax.Array | None = None, axis: int = -1
) -> Peak:
  """Returns the sum of exp(x) along one axis.

    A = max_i x_i,   s = sum_i exp(x_i - A)

  The sum s is within (4 + h) u, relative. A NaN among the live entries makes
  it NaN, +inf makes the peak infinite.

  Args:
    x: floating-point array ``(..., k, ...)``; taken as float32.
    where: boolean array of the shape of `x`, or None.
    axis: the axis of size k; k = 0 gives the identity.

  Returns:
    Peak without that axis.
  """
  x = _masked(x, where)
  axis %= x.ndim
  if x.shape[axis] == 0:
    return online_identity(x.shape[:axis] + x.shape[axis + 1 :])
  number = jnp.where(x == x, x, -_INF)
  peak = jnp.max(number, axis=axis)
  terms = exp_difference(number, _spread(peak, x.shape, axis))
  terms = jnp.where(x > -_INF, terms, jnp.where(x == -_INF, 0.0, x))
  return Peak(peak, jnp.sum(terms, axis=axis))


def online_exp(x: jax.Array, where: jax.Array | None = None) -> Peak:
  """Returns exp(x) entry by entry: the peak is x itself, exactly.

  Args:
    x: floating-point array; taken as float32.
    where: boolean array of the shape of `x`, or None.

  Returns:
    Peak of the shape of `x`; NaN has the total NaN, -inf the total 0.
  """
  x = _masked(x, where)
  number = jnp.where(x == x, x, -_INF)
  one = jnp.where(x == -_INF, 0.0, jnp.ones_like(x))
  return Peak(number, jnp.where(x == x, one, x))


def online_merge(a: Peak, b: Peak) -> Peak:
  """Returns the sum of two partial sums.

    A = max(A1, A2),   s = s1 exp(A1 - A) + s2 exp(A2 - A)

  One of the factors is exactly 1, so the sum is taken as the larger side plus
  the rescaled smaller one, which makes it commutative bit for bit. The other
  factor is within 4u and its product rounds once: in the worst case, peaks
  that rise with every block, each merge costs the older terms 5u. Other
  accumulators of the row are rescaled by ``exp_difference(A1, A)``.

  Args:
    a: Peak.
    b: Peak of the same shape.

  Returns:
    Peak of that shape.
  """
  peak = jnp.maximum(a.peak, b.peak)
  first = a.peak >= b.peak
  larger = jnp.where(first, a.total, b.total)
  smaller = jnp.where(first, b.total, a.total)
  factor = exp_difference(jnp.minimum(a.peak, b.peak), peak)
  return Peak(peak, larger + smaller * factor)


def online_total(state: Peak, axis: int) -> Peak:
  """Returns the sum of partial sums along one axis.

    A = max_i A_i,   s = sum_i s_i exp(A_i - A)

  Every term is off by at most 5u more than the partial sum it comes from, and
  the sum by h u.

  Args:
    state: Peak of shape ``(..., k, ...)``.
    axis: the axis of size k > 0.

  Returns:
    Peak without that axis.
  """
  shape = state.peak.shape
  peak = jnp.max(state.peak, axis=axis)
  factor = exp_difference(state.peak, _spread(peak, shape, axis))
  return Peak(peak, jnp.sum(state.total * factor, axis=axis))


def online_normalise(
  x: jax.Array, state: Peak, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """Returns the softmax exp(x_i - A) (1/s).

  Error for y >= 2^-120: (10 + h) u relative and 5u for every merge that
  raised the peak. Zero totals, NaN, +inf and masked entries behave as in
  `normalise`.

  Args:
    x: the inputs, ``(..., k, ...)``.
    state: `online_reduce` of the row, without `axis`, or with as many axes
      as `x` and broadcastable to it.
    where: boolean array of the shape of `x`, or None.
    axis: the axis that `state` lacks, where it does.

  Returns:
    float32 array of the shape of `x`.
  """
  x = x.astype(jnp.float32)
  inverse = jnp.where(state.peak < _INF, 1.0 / state.total, _NAN)
  number = jnp.where(x == x, x, -_INF)
  y = exp_difference(number, _spread(state.peak, x.shape, axis))
  y = y * _spread(inverse, x.shape, axis)
  y = jnp.where(number == -_INF, _spread(0.0 * inverse, x.shape, axis), y)
  return y if where is None else jnp.where(where, y, 0.0)


def online_logsumexp(state: Peak) -> jax.Array:
  """Returns A + ln s; -inf for a zero total, +inf for an infinite one."""
  return state.peak + jnp.log(state.total)


def online_log_normalise(
  x: jax.Array, state: Peak, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """Returns the log softmax (x_i - A) - ln s.

  Error: (5 + h) u for s, 2u |ln s| for its logarithm and 2u |result|.

  Args:
    x: the inputs, ``(..., k, ...)``.
    state: as in `online_normalise`.
    where: boolean array of the shape of `x`, or None; masked entries give
      -inf.
    axis: the axis that `state` lacks, where it does.

  Returns:
    float32 array of the shape of `x`; NaN where `online_normalise` gives NaN.
  """
  x = x.astype(jnp.float32)
  log_total = jnp.where(state.peak < _INF, jnp.log(state.total), _NAN)
  y = x - _spread(state.peak, x.shape, axis)
  y = y - _spread(log_total, x.shape, axis)
  return y if where is None else jnp.where(where, y, -_INF)


def _masked(x: jax.Array, where: jax.Array | None) -> jax.Array:
  x = x.astype(jnp.float32)
  return x if where is None else jnp.where(where, x, -_INF)


def _spread(v: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """Broadcasts `v` along the axis it lacks; with equal ranks it is kept."""
  rank = len(shape)
  if v.ndim == rank:
    return v
  axis %= rank
  return lax.broadcast_in_dim(
    v, shape, tuple(d for d in range(rank) if d != axis)
  )
