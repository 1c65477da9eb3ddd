"""The algebra of a softmax in pieces: sums of exponentials, and quotients.

A softmax over a long row is a sum of exponentials that must be taken in
pieces: blocks of columns, lanes, devices. Two representations of a partial
sum are given here, each with an identity, a merge and a normalisation.

Pair form. The pairs of `exponential`, worth ``m * 2**n``:

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

from lowbit_pallas.arith.exponential import (
  LN2,
  N_ZERO,
  Pair,
  exact_factor,
  exp_difference,
  masked,
  scaled_exp,
)

_INF = float('inf')
_NAN = float('nan')


class Peak(NamedTuple):
  """Reals ``total * exp(peak)``: float32 arrays of one shape."""

  peak: jax.Array
  total: jax.Array


def identity(shape: tuple[int, ...]) -> Pair:
  """Pairs worth zero, the identity of `merge`, exactly."""
  return Pair(
    jnp.zeros(shape, jnp.float32), jnp.full(shape, N_ZERO, jnp.float32)
  )


def row_peak(
  m: jax.Array, n: jax.Array, top: jax.Array, exp: str = 'degree5'
) -> Peak:
  """The sum of a row relative to its largest entry, for its logarithm.

    A = top,   s = M / (exp(top) 2^-E),   s >= 1

  The exponential of the largest entry is rounded in M as it is here, so that a
  row of one live entry has s = 1 exactly, and ln s = 0. Otherwise s is within
  (8 + h) u, relative.

  Args:
    m: the sum of the `scaled_exp` of the row.
    n: its `row_exponent`.
    top: its largest live entry.
    exp: one of EXPONENTIALS, that of the sum.

  Returns:
    Peak of the same shape; NaN and infinity stay in the total, and a row whose
    entries are all -inf has the total 0.
  """
  s = jnp.maximum(m / scaled_exp(top, n, exp), 1.0)
  return Peak(top, jnp.where((m > 0.0) & (m < _INF), s, m))


def merge(a: Pair, b: Pair) -> Pair:
  """The sum of two pairs.

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
  """The sum of the pairs along one axis.

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
  """The softmax m_i 2^(n_i) / (M 2^E).

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
  """ln(M 2^E) = ((ln M + E P3) + E P2) + E P1.

  E P1 and E P2 are exact, so the error is that of ln M, (4 + h) u and the
  rounding of the logarithm, plus two roundings of the result: absolute near
  zero, where the two parts cancel. A zero total gives -inf, an infinite one
  +inf.

  Args:
    total: Pair, `reduce` of the pairs of a row.

  Returns:
    float32 array of the shape of `total`.
  """
  n = total.n
  return ((jnp.log(total.m) + n * LN2[2]) + n * LN2[1]) + n * LN2[0]


def log_normalise(
  x: jax.Array, total: Pair, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """The log softmax (x_i - E ln 2) - ln M.

  E ln 2 is subtracted in the same three parts as in `ext_exp`, of which the
  first two lose nothing where x_i is near E ln 2: no error is relative to x_i.
  Forming logsumexp first would lose |x_i| u.

  Error: (5 + h) u for M, 2u |ln M| for its logarithm and 4u |result|: absolute
  near zero. The result is never positive.

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
  centred = ((x - n * LN2[0]) - n * LN2[1]) - n * LN2[2]
  y = centred - _spread(log_m, x.shape, axis)
  y = jnp.where(y > 0.0, 0.0, y)
  return y if where is None else jnp.where(where, y, -_INF)


def online_identity(shape: tuple[int, ...]) -> Peak:
  """Sums worth zero, the identity of `online_merge`, exactly."""
  return Peak(
    jnp.full(shape, -_INF, jnp.float32), jnp.zeros(shape, jnp.float32)
  )


def online_reduce(
  x: jax.Array, where: jax.Array | None = None, axis: int = -1
) -> Peak:
  """The sum of exp(x) along one axis.

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
  x = masked(x, where)
  axis %= x.ndim
  if x.shape[axis] == 0:
    return online_identity(x.shape[:axis] + x.shape[axis + 1 :])
  number = jnp.where(x == x, x, -_INF)
  peak = jnp.max(number, axis=axis)
  terms = exp_difference(number, _spread(peak, x.shape, axis))
  terms = jnp.where(x > -_INF, terms, jnp.where(x == -_INF, 0.0, x))
  return Peak(peak, jnp.sum(terms, axis=axis))


def online_exp(x: jax.Array, where: jax.Array | None = None) -> Peak:
  """exp(x) entry by entry: the peak is x itself, exactly.

  Args:
    x: floating-point array; taken as float32.
    where: boolean array of the shape of `x`, or None.

  Returns:
    Peak of the shape of `x`; NaN has the total NaN, -inf the total 0.
  """
  x = masked(x, where)
  number = jnp.where(x == x, x, -_INF)
  one = jnp.where(x == -_INF, 0.0, jnp.ones_like(x))
  return Peak(number, jnp.where(x == x, one, x))


def online_merge(a: Peak, b: Peak) -> Peak:
  """The sum of two partial sums.

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
  """The sum of partial sums along one axis.

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
  """The softmax exp(x_i - A) (1/s).

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
  """A + ln s; -inf for a zero total, +inf for an infinite one.

  Error: that of s, 2u |ln s| for its logarithm and u |result|; none for a row
  of one live entry.
  """
  return state.peak + jnp.log(state.total)


def online_log_normalise(
  x: jax.Array, state: Peak, where: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """The log softmax (x_i - A) - ln s.

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


def _spread(v: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """Broadcasts `v` along the axis it lacks; with equal ranks it is kept."""
  rank = len(shape)
  if v.ndim == rank:
    return v
  axis %= rank
  return lax.broadcast_in_dim(
    v, shape, tuple(d for d in range(rank) if d != axis)
  )
