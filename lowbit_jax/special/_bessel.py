"""Logarithms of the modified Bessel functions I_v and K_v, and their ratio.

Every point is evaluated in a fixed number of steps, without loops, so that the
functions fuse, vmap and differentiate like elementary ones. With h = sqrt(v^2 +
x^2):

- `v >= v_uniform` or `x >= x_uniform`: the uniform expansion for large order
  (DLMF 10.41.3-4). Its terms u_k(p) / v^k, p = v / h, are q_k(p^2) / h^k with
  polynomials q_k: so written it needs no division by v, holds at v = 0 too, and
  contains Hankel's expansion for large x.
- otherwise I_v by its power series, of positive terms (DLMF 10.25.2);
- K_v for x < 2 by Temme's series ("On the numerical evaluation of the modified
  Bessel function of the third kind", 1975) at an order within 1/2 of zero, and
  upward recurrence, which is stable for K;
- K_v for x >= 2 by the trapezoidal rule on its integral (DLMF 10.32.9), which
  converges geometrically in the step and has positive terms only.

The plan for the domain is that of Plesner, Sorensen and Hauberg, "Accurate
Computation of the Logarithm of Modified Bessel Functions on GPUs" (ICS 2024),
with fewer branches.

Error of the logarithm over max(1, |logarithm|), for all normal v and x: below
2e-14 in float64 and 2e-6 in float32, measured against mpmath; `docs/
log_bessel.md` has the figures. Subnormal arguments count as zero.
"""

import fractions
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lowbit_jax import _derivative
from lowbit_jax._typing import ArrayLike

_DTYPES = ('float32', 'float64')
_LOG_2 = math.log(2)


class _Plan(NamedTuple):
  """Where the expansions hold for a dtype, and the number of their terms."""

  v_uniform: float
  x_uniform: float
  orders: int  # of the uniform expansion
  series: int  # terms of I
  temme: int  # terms of K below x = 2
  step: float  # of the trapezoidal rule
  nodes: int


_PLANS = {
  'float32': _Plan(5.0, 10.0, 5, 26, 8, 0.32, 13),
  'float64': _Plan(12.0, 25.0, 13, 60, 14, 0.146, 38),
}


def log_iv(v: ArrayLike, x: ArrayLike) -> jax.Array:
  """log I_v(x), the modified Bessel function of the first kind.

  Args:
    v: order, 0 or more.
    x: argument, 0 or more; broadcasts with `v`.

  Returns:
    Natural logarithm in the dtype that the arguments promote to, float32 or
    float64. At x = 0 it is -inf, or 0 for v = 0; NaN, with its derivatives,
    where v or x is negative.

  Raises:
    TypeError: for dtypes other than float32, float64 and integers.
    ValueError: for shapes that do not broadcast.

  Derivative: forward and reverse mode in both arguments, of any order. A
  reverse pass keeps two numbers per element. In x it is v / x + I_{v+1} / I_v.

  Examples:
    >>> round(float(log_iv(2.0, 100.0)), 4)
    96.7596
  """
  v, x = _operands(v, x)
  return _log_iv_everywhere(v, x)


def log_kv(v: ArrayLike, x: ArrayLike) -> jax.Array:
  """log K_v(x), the modified Bessel function of the second kind.

  Args:
    v: order, of any sign: K is even in it.
    x: argument, 0 or more; broadcasts with `v`.

  Returns:
    Natural logarithm in the dtype that the arguments promote to, float32 or
    float64. At x = 0 it is +inf; NaN where x is negative.

  Raises:
    TypeError, ValueError: as `log_iv`.

  Derivative: as `log_iv`; that in v is exactly 0 at v = 0.

  Examples:
    >>> round(float(log_kv(2.5, 1.0)), 5)
    1.1717
  """
  v, x = _operands(v, x)
  return _log_kv_everywhere(v, x)


def iv_ratio(v: ArrayLike, x: ArrayLike) -> jax.Array:
  """I_{v+1}(x) / I_v(x), to a few units in the last place.

  It is never formed from a difference of logarithms. For points in p dimensions
  it is the mean resultant length of a von Mises-Fisher distribution with
  v = p / 2 - 1.

  Args:
    v: order, 0 or more.
    x: argument, 0 or more and finite; broadcasts with `v`.

  Returns:
    A number in [0, 1) in the dtype that the arguments promote to.
  """
  v, x = _operands(v, x)
  return _iv_ratio(v, x)


def iv_ratio_below_1(v: ArrayLike, x: ArrayLike) -> jax.Array:
  """1 - I_{v+1}(x) / I_v(x), to a few units in the last place.

  Args:
    v: order, 0 or more.
    x: argument, 0 or more and finite; broadcasts with `v`.
  """
  v, x = _operands(v, x)
  return _iv_ratio_below_1(v, x)


def log_0f1e(v: ArrayLike, x: ArrayLike) -> jax.Array:
  """log(e^-x 0F1(; v + 1; x^2 / 4)) = log(Gamma(v + 1) (2 / x)^v e^-x I_v(x)).

  It is what remains of log I_v when its behaviour at x = 0 and its growth are
  taken off, where that would cancel nearly all digits. Its derivative in x is
  -`iv_ratio_below_1`.

  Args:
    v: order, 0 or more.
    x: argument, 0 or more and finite; broadcasts with `v`.
  """
  v, x = _operands(v, x)
  return _log_0f1e(v, x)


def _operands(v, x):
  v, x = jnp.asarray(v), jnp.asarray(x)
  for name, value in (('v', v), ('x', x)):
    if value.dtype.name not in _DTYPES and not jnp.issubdtype(
      value.dtype, jnp.integer
    ):
      raise TypeError(
        f'{name}.dtype={value.dtype} is not float32 or float64: cast it first'
      )
  try:
    np.broadcast_shapes(v.shape, x.shape)
  except ValueError as error:
    raise ValueError(
      f'v.shape={v.shape} does not broadcast with x.shape={x.shape}; add axes'
      ' of size 1'
    ) from error
  dtype = jnp.result_type(v, x, 1.0)
  return jnp.broadcast_arrays(v.astype(dtype), x.astype(dtype))


def _kept_partials(f):
  """f(v, x), elementwise, whose linearization keeps its partials alone."""
  g = _derivative.custom_jvp(f)

  def rule(primals, tangents):
    v, x = primals
    along = (lambda v: f(v, x), lambda x: f(v, x))
    terms = [
      jax.jvp(h, (primal,), (jnp.ones_like(primal),))[1] * tangent
      for h, primal, tangent in zip(along, primals, tangents, strict=True)
      if not isinstance(tangent, SymbolicZero)
    ]
    out = g(v, x)
    return out, sum(terms, jnp.zeros_like(out))

  g.defjvp(rule, symbolic_zeros=True)
  return g


def _choose(first, f, g, v, x, in_g=(1.0, 1.0)):
  """f(v, x) where `first` holds and g(v, x) elsewhere.

  The one that is not chosen sees a harmless point, lest its NaN reach the
  derivative.
  """
  plan = _PLANS[x.dtype.name]
  at_f = jnp.where(first, v, plan.v_uniform), jnp.where(first, x, 2.0)
  at_g = jnp.where(first, in_g[0], v), jnp.where(first, in_g[1], x)
  # In float64 XLA of JAX 0.11.2 merges such selections without end.
  at_f, at_g = lax.optimization_barrier((at_f, at_g))
  return jnp.where(first, f(*at_f), g(*at_g))


def _is_uniform(v, x):
  plan = _PLANS[x.dtype.name]
  return (v >= plan.v_uniform) | (x >= plan.x_uniform)


def _either(where, a: float, b: float, like: jax.Array) -> jax.Array:
  """One of two numbers, in the dtype of an array."""
  return jnp.where(where, np.asarray(a, like.dtype), np.asarray(b, like.dtype))


# Powers of two, by dtype: with numbers up to the first, and with any number
# times the second, sums of squares are finite.
_LARGE = {'float32': (2.0**60, 2.0**-66), 'float64': (2.0**508, 2.0**-514)}


def _norm(v, x):
  """(h, c) with sqrt(v^2 + x^2) = h / c, c a power of two, 1 if they allow."""
  large, unit = _LARGE[x.dtype.name]
  c = _either(jnp.maximum(v, x) > large, unit, 1.0, x)
  return jnp.sqrt((c * v) ** 2 + (c * x) ** 2), c


def _log_norm(h, c):
  """log sqrt(v^2 + x^2) of a norm (h, c)."""
  unit = _LARGE[h.dtype.name][1]
  return jnp.log(h) - _either(c < 1, math.log(unit), 0.0, h)


def _log_half(x):
  """log(x / 2), also where x / 2 would be subnormal, which counts as zero."""
  small = x < 2.0**-60
  return jnp.log(jnp.where(small, x, 0.5 * x)) - _either(small, _LOG_2, 0.0, x)


# The uniform expansion.


@functools.cache
def _debye(orders: int) -> tuple[tuple[float, ...], ...]:
  """Coefficients in p^2 of q_1 ... q_orders, u_k(p) = p^k q_k(p^2).

  In exact arithmetic from DLMF 10.41.9,
  u_{k+1}(p) = p^2 (1 - p^2) u_k'(p) / 2 + int_0^p (1 - 5 s^2) u_k(s) ds / 8.
  """
  out, q = [], [fractions.Fraction(1)]
  for k in range(orders):
    following = [fractions.Fraction(0)] * (k + 2)
    for i, c in enumerate(q):
      n = k + 2 * i  # c p^n
      following[i] += c * (
        fractions.Fraction(n, 2) + fractions.Fraction(1, 8 * (n + 1))
      )
      following[i + 1] -= c * (
        fractions.Fraction(n, 2) + fractions.Fraction(5, 8 * (n + 3))
      )
    q = following
    out.append(tuple(float(c) for c in q))
  return tuple(out)


def _tail(w, y):
  """sum_{k >= 1} q_k(y) w^k, which for K has a negative w."""
  total = jnp.zeros_like(w)
  for q in reversed(_debye(_PLANS[w.dtype.name].orders)):
    total = w * (_polynomial(q, y) + total)
  return total


def _polynomial(coefficients, y):
  total = coefficients[-1]
  for c in coefficients[-2::-1]:
    total = total * y + c
  return total


# t tanh t = 1 at t = _T, where sinh t = _S and cosh t = _C.
_T = 1.1996786402577338339
_S = 1.5088795615383199289
_C = 1.8101705806989772745
_S_TAIL = {
  'float32': (12, 1.5087890625, 9.0499038319928909884e-05),
  'float64': (26, 1.5088795721530914, -1.0614771501754178e-08),
}


# From here on asinh(v / x) is log(2 v / x), and the quotient may overflow.
_FAR = 2.0**40


def _distance(v, x):
  """Whether x is far below v, and x, or v where it is."""
  far = x * _FAR < v
  return far, jnp.where(far, v, x)


def _asinh(v, x):
  """asinh(v / x)."""
  far, near = _distance(v, x)
  quotient = jnp.log(jnp.where(far, v, 1.0)) - jnp.log(jnp.where(far, x, 1.0))
  return jnp.where(far, quotient + _LOG_2, jnp.arcsinh(v / near))


@_derivative.custom_jvp
def _exponent(v, x):
  """h - v asinh(v / x), with an error relative to itself, not to h.

  With t = asinh(v / x) it is h (1 - t tanh t), which changes sign at t = _T. In
  d = t - _T and T = tanh(_T) = 1 / _T

    1 - t tanh t = -(tanh(d) (_T - T) + d (T + tanh d)) / (1 + T tanh d),
    sinh d = (v _C - h _S) / x = (v - _S x) (v + _S x) / (x (v _C + h _S)),

  where nothing cancels once v - _S x is taken in two pieces whose products with
  those of x are exact. Where v is far above x, h is v and t is log(2 v / x).
  """
  far, near = _distance(v, x)
  h, c = _norm(v, near)
  cv, cx = c * v, c * near
  difference = _minus_s_times(cv, cx)
  s = difference / cx * ((cv + _S * cx) / (cv * _C + h * _S))
  root = jnp.sqrt(1 + s * s)
  excess = jnp.abs(s) + s * s / (1 + root)  # log1p(excess) = asinh |s|

  # v / x, or its product with a power of two that makes it finite.
  bits = jnp.finfo(x.dtype).maxexp
  over = x * 2.0 ** (bits - 2) < v
  quotient = jnp.where(over, v * 2.0 ** (1 - bits // 2), v)
  quotient /= jnp.where(over, x * 2.0 ** (bits // 2), x)
  taken = _either(over, (bits - 1) * _LOG_2, 0.0, x)

  log = jnp.log1p(jnp.where(far, 2 * quotient - 1, excess))
  d, tanh = jnp.copysign(log, s), s / root
  numerator = tanh * (_T - 1 / _T) + d * (1 / _T + tanh)
  return jnp.where(
    far,
    -v * ((log - 1) + taken),
    -h * numerator / (1 + tanh / _T) / c,
  )


def _exponent_jvp(primals, tangents):
  v, x = primals
  dv, dx = tangents
  out = _exponent(v, x)
  total = jnp.zeros_like(out)
  if not isinstance(dv, SymbolicZero):
    total -= _asinh(v, x) * dv
  if not isinstance(dx, SymbolicZero):
    far, near = _distance(v, x)
    h, c = _norm(v, near)
    slope = jnp.where(far, v / jnp.where(far, x, 1.0), h / (c * near))
    total += slope * dx
  return out, total


_exponent.defjvp(_exponent_jvp, symbolic_zeros=True)


def _minus_s_times(v, x):
  """v - _S x to about twice the precision where it cancels."""
  bits, head, tail = _S_TAIL[x.dtype.name]
  exponent_bits = jnp.finfo(x.dtype).nexp
  x_head = lax.reduce_precision(x, exponent_bits, bits - 2)
  return ((v - head * x_head) - head * (x - x_head)) - tail * x


def _log_iv_uniform(v, x):
  h, c = _norm(v, x)
  tail = jnp.log1p(_tail(c / h, (c * v / h) ** 2))
  return _exponent(v, x) - 0.5 * _log_norm(2 * math.pi * h, c) + tail


def _log_kv_uniform(v, x):
  h, c = _norm(v, x)
  tail = jnp.log1p(_tail(-c / h, (c * v / h) ** 2))
  return -_exponent(v, x) - 0.5 * _log_norm(2 / math.pi * h, c) + tail


# I elsewhere.


def _series(v, x):
  """0F1(; v + 1; x^2 / 4) - 1, positive terms."""
  q = 0.25 * x * x
  term, total = jnp.ones_like(x), jnp.zeros_like(x)
  for k in range(1, _PLANS[x.dtype.name].series):
    term = term * (q / (k * (v + k)))
    total = total + term
  return total


def _log_iv_series(v, x):
  leading = v * _log_half(x) - lax.lgamma(v + 1)
  return leading + jnp.log1p(_series(v, x))


@_kept_partials
def _log_iv(v, x):
  return _choose(_is_uniform(v, x), _log_iv_uniform, _log_iv_series, v, x)


# K elsewhere.


def _log_kv_trapezoid(v, x):
  """K_v(x) = int_0^inf exp(-x cosh t) cosh(v t) dt.

  cosh(v t) at equal steps by summing its second differences, 2 (cosh(v step) -
  1) cosh(v t): of one sign, and even in v with all derivatives.
  """
  plan = _PLANS[x.dtype.name]
  growth = 4 * jnp.sinh((0.5 * plan.step) * v) ** 2
  slope, cosh, total = 0.5 * growth, jnp.ones_like(v), jnp.full_like(v, 0.5)
  for j in range(1, plan.nodes):
    cosh = cosh + slope
    slope = slope + growth * cosh
    drop = 2 * math.sinh(0.5 * plan.step * j) ** 2
    total = total + jnp.exp(-drop * x) * cosh
  return jnp.log(plan.step * total) - x


# 1 / Gamma(1 + z) = _EVEN(z^2) + z _ODD(z^2), by Taylor.
_EVEN = (
  1.0,
  -0.65587807152025388108,
  0.1665386113822914895,
  -0.0096219715278769735621,
  -0.0011651675918590651121,
  0.00012805028238811618615,
  -1.2504934821426706573e-6,
  -2.0563384169776071035e-7,
  5.0020076444692229301e-9,
  1.0434267116911005105e-10,
  -3.6968056186422057082e-12,
)
_ODD = (
  0.57721566490153286061,
  -0.042002635034095235529,
  -0.042197734555544336748,
  0.0072189432466630995424,
  -0.00021524167411495097282,
  -0.000020134854780788238656,
  1.1330272319816958824e-6,
  6.1160951044814158179e-9,
  -1.1812745704870201446e-9,
  7.782263439905071254e-12,
)


def _log_kv_temme(v, x):
  """K_mu and K_{mu+1}, |mu| <= 1/2, and upward recurrence to v = mu + n.

  Of L_i = (x/2)^i K_{mu+i}, which stays in range: L_{i+1} = (mu + i) L_i +
  (x/2)^2 L_{i-1}. All are divided by (x/2)^-|mu|, which leaves the range of
  derivatives to 1 / x.
  """
  plan = _PLANS[x.dtype.name]
  n = jnp.round(v)
  mu = v - n
  log_half, q = _log_half(x), 0.25 * x * x

  even, odd = _polynomial(_EVEN, mu * mu), _polynomial(_ODD, mu * mu)
  reciprocal_plus, reciprocal_minus = even + mu * odd, even - mu * odd
  sigma = -mu * log_half
  scale = lax.stop_gradient(jnp.abs(sigma))
  up, down = jnp.exp(sigma - scale), jnp.exp(-sigma - scale)
  sinhc = _sinhc(sigma, jnp.exp(-scale), up, down)
  f = -odd * (0.5 * (up + down)) - even * log_half * sinhc
  f = f / (reciprocal_plus * reciprocal_minus)
  a, b = 0.5 * up / reciprocal_plus, 0.5 * down / reciprocal_minus

  c, first, second = jnp.ones_like(x), f, a
  for k in range(1, plan.temme):
    inverse = 1 / (k * k - mu * mu)
    f = (k * f + (a + b)) * inverse
    a, b = a * ((k + mu) * inverse), b * ((k - mu) * inverse)
    c = c * (q / k)
    first, second = first + c * f, second + c * (a - k * f)

  lower, upper = first, second
  for i in range(1, int(plan.v_uniform)):
    following = (mu + i) * upper + q * lower
    lower = jnp.where(i < n, upper, lower)
    upper = jnp.where(i < n, following, upper)
  return jnp.log(jnp.where(n > 0, upper, first)) + (scale - n * log_half)


def _sinhc(s, unit, up, down):
  """unit sinh(s) / s, smooth at 0, from unit e^s and unit e^-s."""
  small = jnp.abs(s) < 1
  inverse_factorials = tuple(1 / math.factorial(2 * i + 1) for i in range(10))
  near = _polynomial(inverse_factorials, jnp.where(small, s, 0.0) ** 2)
  away = 0.5 * (up - down) / jnp.where(small, 1.0, s)
  return jnp.where(small, unit * near, away)


@_kept_partials
def _log_kv(v, x):
  def small(v, x):
    return _choose(x >= 2, _log_kv_trapezoid, _log_kv_temme, v, x)

  return _choose(_is_uniform(v, x), _log_kv_uniform, small, v, x)


# The ratio of I, and I without its behaviour at 0 and its growth.


@_kept_partials
def _iv_ratio(v, x):
  return _choose(_is_uniform(v, x), _iv_ratio_uniform, _iv_ratio_series, v, x)


@_kept_partials
def _iv_ratio_below_1(v, x):
  def from_series(v, x):
    return 1 - _iv_ratio_series(v, x)

  def uniform(v, x):
    h, c = _norm(v, x)
    cv, cx = c * v, c * x
    # 1 - x / (h + v), as h - x = v^2 / (h + x).
    leading = cv * (1 + cv / (h + cx)) / (h + cv)
    return leading - _ratio_tail(v, x)

  return _choose(_is_uniform(v, x), uniform, from_series, v, x)


def _iv_ratio_uniform(v, x):
  """d/dx log I - v / x, term by term: each has a factor x."""
  h, c = _norm(v, x)
  return c * x / (h + c * v) + _ratio_tail(v, x)


def _ratio_tail(v, x):
  """The ratio less x / (h + v)."""
  h, c = _norm(v, x)
  w, y = c / h, (c * v / h) ** 2
  tail, slope = jax.jvp(_tail, (w, y), (-w * w, -2 * y * w))
  return c * x / h * (slope / (1 + tail) - 0.5 * w)


def _iv_ratio_series(v, x):
  return 0.5 * x / (v + 1) * ((1 + _series(v + 1, x)) / (1 + _series(v, x)))


@_kept_partials
def _log_0f1e(v, x):
  plan = _PLANS[x.dtype.name]

  def small_v(v, x):
    def large_x(v, x):
      h, c = _norm(v, x)
      tail = jnp.log1p(_tail(c / h, (c * v / h) ** 2))
      exponent = v * (c * v / (h + c * x) - _asinh(v, x))  # less x
      leading = v * _log_half(x) - lax.lgamma(v + 1)
      return exponent - 0.5 * _log_norm(2 * math.pi * h, c) + tail - leading

    def from_series(v, x):
      return jnp.log1p(_series(v, x)) - x

    return _choose(_is_uniform(v, x), large_x, from_series, v, x)

  return _choose(v >= plan.v_uniform, _log_0f1e_uniform, small_v, v, x)


def _log_0f1e_uniform(v, x):
  """The uniform expansion less its limit at x = 0, and less x.

  h - v = x^2 / (h + v), and h - v - x = -v (h - v + x) / (h + x).
  """
  h, c = _norm(v, x)
  cv, cx = c * v, c * x
  excess = cx * (cx / (h + cv))
  tail = _tail(c / h, (cv / h) ** 2)
  tail_at_0 = _tail(1 / v, jnp.ones_like(v))
  return (
    -v * ((excess + cx) / (h + cx))
    - v * jnp.log1p(excess / (2 * cv))
    - 0.5 * jnp.log1p(excess / cv)
    + jnp.log1p((tail - tail_at_0) / (1 + tail_at_0))
  )


# Everywhere, with the limits at the edges of the domain.


def _at_edges(f, limit, v, x, is_valid):
  """f inside the domain, limit(v, x) at its edges, and NaN elsewhere.

  Derivatives are those of the limit, and NaN outside of the domain.
  """
  inside = is_valid & (v < jnp.inf) & ~_is_zero(x) & (x < jnp.inf)
  value = f(jnp.where(inside, v, 1.0), jnp.where(inside, x, 1.0))
  is_valid &= ~((v == jnp.inf) & (x == jnp.inf))
  invalid = _either(is_valid, 0.0, jnp.nan, x)
  invalid = invalid * jnp.where(is_valid, 0.0, v + x)
  return jnp.where(inside, value, limit(v, x)) + invalid


def _is_zero(x):
  """Whether x is zero or subnormal: not all back ends flush in comparisons."""
  return jnp.abs(x) < jnp.finfo(x.dtype).tiny


def _at(where, f, *operands):
  """f of the operands where `where` holds, and 0 with its slope elsewhere."""
  return jnp.where(where, f(*(jnp.where(where, a, 1.0) for a in operands)), 0.0)


def _log_iv_limit(v, x):
  at_0 = _is_zero(x)
  return (
    _at(at_0 & ~_is_zero(v), lambda v, x: v * jnp.log(x), v, x)
    + _at(~at_0 & (v == jnp.inf), lambda v: -v * v, v)
    + _at(~at_0 & (x == jnp.inf), lambda x: x, x)
  )


def _log_kv_limit(v, x):
  at_0 = _is_zero(x)
  return (
    _at(at_0 & _is_zero(v), lambda x: -jnp.log(x), x)
    + _at(at_0 & ~_is_zero(v), lambda v, x: -jnp.abs(v) * jnp.log(x), v, x)
    + _at(~at_0 & (v == jnp.inf), lambda v: v * v, v)
    + _at(~at_0 & (x == jnp.inf), lambda x: -x, x)
  )


@functools.partial(jax.jit, inline=True)
def _log_iv_everywhere(v, x):
  is_valid = (v >= 0) & ((x >= 0) | _is_zero(x))
  return _at_edges(_log_iv, _log_iv_limit, v, x, is_valid)


@functools.partial(jax.jit, inline=True)
def _log_kv_everywhere(v, x):
  # Folded away from 0, where the fold would spoil the second derivative.
  v = jnp.where(v < -0.25, -v, v)
  is_valid = ~jnp.isnan(v) & ((x >= 0) | _is_zero(x))
  return _at_edges(_log_kv, _log_kv_limit, v, x, is_valid)
