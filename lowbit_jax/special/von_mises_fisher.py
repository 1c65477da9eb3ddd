"""The von Mises-Fisher distribution on the unit sphere in p dimensions.

Its density, with respect to area, at a unit vector x is C_p(kappa) exp(kappa
mean . x). With v = p / 2 - 1 it is taken relative to the uniform distribution,

  log C_p(kappa) = -log area(S^{p-1}) - log 0F1(; p / 2; kappa^2 / 4),

where the usual difference of (p / 2 - 1) log kappa and log I_v(kappa) would
cancel most digits for large p. The mean resultant length is A_p(kappa) =
I_{p/2}(kappa) / I_{p/2-1}(kappa). Where kappa is large, kappa mean . x and log
0F1 are nearly equal to it, and A_p to 1: all are computed by what is missing,
kappa (1 - mean . x) from the distance |x - mean|.

- `log_prob`: Log density with respect to the area of the unit sphere.
- `fit`: Maximum likelihood: the mean direction, and kappa with A_p(kappa) = R.
- `sample`: Unit vectors from the distribution.
- `entropy`: Differential entropy with respect to the area of the unit sphere.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import _derivative
from lowbit_jax._typing import ArrayLike, Key
from lowbit_jax.special import _bessel

_NEWTON_STEPS = 5


def log_prob(x: ArrayLike, mean: ArrayLike, kappa: ArrayLike) -> jax.Array:
  """Log density with respect to the area of the unit sphere.

  Args:
    x: (..., p) unit vectors, p at least 2.
    mean: (..., p) unit vectors, the mean directions.
    kappa: (...) concentrations, 0 or more and finite; 0 is uniform.

  Returns:
    (...) log densities, where leading axes broadcast, in the dtype that the
    arguments promote to, float32 or float64. NaN for negative kappa. The error
    from rounding is that of numbers of the size of p and kappa |x - mean|^2.

  Raises:
    TypeError: for other dtypes.
    ValueError: for shapes that do not fit.

  Derivative: in all arguments, of any order, taken as if x and mean were free
  vectors; in kappa it is mean . x - A_p(kappa).

  Examples:
    >>> e = jnp.array([0.0, 0.0, 1.0])
    >>> round(float(log_prob(e, e, 0.0)), 4)  # -log(4 pi)
    -2.531
  """
  x, mean, kappa = _floats(x=x, mean=mean, kappa=kappa)
  p = _dimension('x', x)
  if _dimension('mean', mean) != p:
    raise ValueError(
      f'mean.shape={mean.shape} and x.shape={x.shape} must agree in the last'
      ' axis, the dimension p'
    )
  _broadcast(x=x.shape[:-1], mean=mean.shape[:-1], kappa=kappa.shape)
  rank = max(x.ndim, mean.ndim, kappa.ndim + 1)
  x, mean = (lax.broadcast_to_rank(a, rank) for a in (x, mean))
  return _log_prob(x, mean, lax.broadcast_to_rank(kappa, rank - 1))


@functools.partial(jax.jit, inline=True)
def _log_prob(x, mean, kappa):
  p = x.shape[-1]
  kappa = _valid(kappa)
  fall = kappa * _one_minus_dot(x, mean)
  return -fall - _bessel.log_0f1e(p / 2 - 1, kappa) - _log_area(p)


def entropy(kappa: ArrayLike, p: int) -> jax.Array:
  """Differential entropy with respect to the area of the unit sphere.

  It is -log C_p(kappa) - kappa A_p(kappa): the logarithm of the area for kappa
  = 0, the largest, and negative for concentrated distributions (Mardia and
  Jupp, "Directional Statistics", 2000, 9.3.2).

  Args:
    kappa: (...) concentrations, 0 or more and finite.
    p: dimension, at least 2.

  Returns:
    (...) in nats, in the dtype of kappa, float32 or float64. NaN for negative
    kappa. The error is below 2e-6 max(p, |entropy|) in float32 and 1e-14 of
    that in float64, measured against mpmath.

  Raises:
    TypeError: for other dtypes, or p that is no integer.
    ValueError: for p below 2.

  Derivative: -kappa A_p'(kappa), of any order.

  Examples:
    >>> round(float(entropy(0.0, 3)), 4)  # log(4 pi)
    2.531
  """
  (kappa,) = _floats(kappa=kappa)
  p = operator.index(p)
  if p < 2:
    raise ValueError(f'{p=} must be at least 2: it is the dimension')
  return _entropy(kappa, p)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _entropy(kappa, p: int):
  kappa = _valid(kappa)
  return _log_area(p) + _spread(p / 2 - 1, kappa)


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(0,))
def _spread(v: float, kappa):
  """log 0F1 - kappa A, without what cancels."""
  missing = _bessel.iv_ratio_below_1(v, kappa)
  return _bessel.log_0f1e(v, kappa) + kappa * missing


@_spread.defjvp
def _spread_jvp(v, primals, tangents):
  (kappa,), (tangent,) = primals, tangents
  slope = jax.jvp(
    lambda kappa: _bessel.iv_ratio_below_1(v, kappa),
    (kappa,),
    (jnp.ones_like(kappa),),
  )[1]
  return _spread(v, kappa), kappa * slope * tangent


@_derivative.custom_jvp
def _one_minus_dot(x, y):
  """1 - x . y of unit vectors, by their distance.

  To first order it does not depend on lengths that are 1 but for rounding.
  """
  return 0.5 * jnp.sum((x - y) ** 2, -1)


@_one_minus_dot.defjvp
def _one_minus_dot_jvp(primals, tangents):
  (x, y), (dx, dy) = primals, tangents
  return _one_minus_dot(x, y), -jnp.sum(x * dy, -1) - jnp.sum(y * dx, -1)


def fit(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Maximum likelihood: the mean direction, and kappa with A_p(kappa) = R.

  R is the length of the mean of the samples, and 1 - R^2 their variance about
  it. kappa starts from R (p - R^2) / (1 - R^2) (Banerjee, Dhillon, Ghosh and
  Sra, "Clustering on the Unit Hypersphere using von Mises-Fisher
  Distributions", 2005) and takes a fixed number of Newton steps (compare Sra,
  "A short note on parameter approximation for von Mises-Fisher distributions",
  2012), of log(A / (1 - A)) as a function of log kappa, which is nearly linear.

  Args:
    x: (..., n, p) unit vectors, n at least 1 and p at least 2.

  Returns:
    mean (..., p) and kappa (...). The relative error of kappa from rounding is
    that of the variance, or of R where that is small. For samples that coincide
    kappa is inf. Where the samples add up to exactly zero it is 0, and mean the
    first of them: every direction is as likely.

  Raises:
    TypeError: for dtypes other than float32 and float64.
    ValueError: for shapes that do not fit.

  Derivative: of the solution itself (the last Newton steps have it), in x along
  the sphere.

  Examples:
    >>> key, e = jax.random.key(0), jnp.eye(8)[0]
    >>> mean, kappa = fit(sample(key, e, 20.0, (4000,)))
    >>> bool(abs(kappa / 20 - 1) < 0.05), bool(mean @ e > 0.99)
    (True, True)
  """
  (x,) = _floats(x=x)
  _dimension('x', x)
  if x.ndim < 2 or x.shape[-2] == 0:
    raise ValueError(
      f'x.shape={x.shape} must be (..., n, p) with at least one sample'
    )
  return _fit(x)


@functools.partial(jax.jit, inline=True)
def _fit(x):
  # Differences from one of the samples vanish where all are equal.
  first = x[..., :1, :]
  off = x - first
  mean_off = jnp.mean(off, -2, keepdims=True)
  variance = jnp.mean(jnp.sum((off - mean_off) ** 2, -1), -1)
  average = (first + mean_off)[..., 0, :]
  square = jnp.sum(average * average, -1)
  is_zero = square == 0
  average = jnp.where(is_zero[..., None], x[..., 0, :], average)
  R = jnp.linalg.norm(average, axis=-1)
  kappa = _concentration(R, variance, x.shape[-1])
  return average / R[..., None], jnp.where(is_zero, 0.0, kappa)


def sample(
  key: Key,
  mean: ArrayLike,
  kappa: ArrayLike,
  shape: Sequence[int] | None = None,
) -> jax.Array:
  """Unit vectors from the distribution.

  By rejection along the mean (Wood, "Simulation of the von Mises Fisher
  distribution", 1994), which accepts about two in three whatever p and kappa,
  and a uniform direction across it. The same key gives the same bits.

  Args:
    key: of jax.random.
    mean: (..., p) unit vectors, p at least 2.
    kappa: (...) concentrations, 0 or more. inf gives the mean.
    shape: of the result without its last axis; the leading axes of `mean` and
      `kappa` broadcast to it. None for the shape that these broadcast to.

  Returns:
    (*shape, p) unit vectors, in the dtype that mean and kappa promote to. NaN
    where kappa is negative or NaN.

  Raises:
    TypeError: for dtypes other than float32 and float64.
    ValueError: for shapes that do not fit.

  Derivative: none; samples are constants.

  Examples:
    >>> sample(jax.random.key(0), jnp.eye(8)[0], 20.0, (4000,)).shape
    (4000, 8)
  """
  mean, kappa = _floats(mean=mean, kappa=kappa)
  _dimension('mean', mean)
  natural = _broadcast(mean=mean.shape[:-1], kappa=kappa.shape)
  shape = natural if shape is None else _sizes(shape)
  if not _expands(natural, shape):
    raise ValueError(
      f'{shape=} must be one that the leading axes of mean and kappa,'
      f' {natural}, broadcast to'
    )
  mean, kappa = lax.stop_gradient((mean, kappa))
  mean = lax.broadcast_to_rank(mean, len(shape) + 1)
  return _sample(key, mean, kappa, shape)


@functools.partial(jax.jit, static_argnames='shape', inline=True)
def _sample(key, mean, kappa, shape):
  p = mean.shape[-1]
  along_key, across_key = jax.random.split(key)
  below = _one_minus_cosine(along_key, jnp.broadcast_to(kappa, shape), p)
  normal = jax.random.normal(across_key, (*shape, p), mean.dtype)
  normal = normal - jnp.sum(normal * mean, -1, keepdims=True) * mean
  length = jnp.linalg.norm(normal, axis=-1)
  sine = jnp.sqrt(below * (2 - below))
  across = (sine / length)[..., None] * normal
  return (1 - below)[..., None] * mean + across


def _sizes(shape) -> tuple[int, ...]:
  try:
    return tuple(map(operator.index, shape))
  except TypeError:
    raise TypeError(f'{shape=} must be a sequence of ints or None') from None


def _expands(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  ends = zip(reversed(shape), reversed(to), strict=False)
  return len(shape) <= len(to) and all(n in (1, m) for n, m in ends)


def _concentration(R, variance, p: int):
  """kappa with A_p(kappa) = R, for R > 0 and the variance 1 - R^2."""
  v = p / 2 - 1
  start = R * (p - R * R) / variance
  # There the start is exact but for rounding, and inf where R is 1.
  is_sharp = variance < jnp.finfo(R.dtype).eps
  R = jnp.where(is_sharp, 0.5, R)
  variance = jnp.where(is_sharp, 0.75, variance)
  target = jnp.log(R) + jnp.log1p(R) - jnp.log(variance)

  def step(_, kappa):
    length = _bessel.iv_ratio(v, kappa)
    missing, slope = jax.jvp(
      lambda kappa: _bessel.iv_ratio_below_1(v, kappa),
      (kappa,),
      (jnp.ones_like(R),),
    )
    gap = target - jnp.log(length / missing)
    return kappa * jnp.exp(gap * (length * missing / (-slope * kappa)))

  kappa = lax.fori_loop(0, _NEWTON_STEPS, step, R * (p - R * R) / variance)
  return jnp.where(is_sharp, start, kappa)


def _one_minus_cosine(key, kappa, p: int):
  """1 - W for W = mean . x, by Wood's rejection.

  With b = (p - 1) / (2 kappa + sqrt(4 kappa^2 + (p - 1)^2)),
  x0 = (1 - b) / (1 + b) and Z ~ Beta((p - 1) / 2, (p - 1) / 2), the proposal is
  W = (1 - (1 + b) Z) / (1 - (1 - b) Z). As kappa = (p - 1) x0 / (1 - x0^2), the
  logarithm of the probability to accept is, with u = kappa (W - x0) / (p - 1),

    kappa (W - x0) + (p - 1) log((1 - x0 W) / (1 - x0^2))
      = (p - 1) (u + log(1 - u)),

  which has no large terms.
  """
  n = p - 1.0
  r = kappa * (2 / n)
  # sqrt(r^2 + 1) is r long before the square overflows.
  b = 1 / (r + jnp.maximum(r, jnp.sqrt(jnp.minimum(r, 2.0**40) ** 2 + 1)))

  def propose(state):
    key, below, is_done = state
    key, beta_key, uniform_key = jax.random.split(key, 3)
    z = jax.random.beta(beta_key, n / 2, n / 2, kappa.shape, kappa.dtype)
    proposal = 2 * b * z / (1 - (1 - b) * z)
    u = kappa / n * (2 * b / (1 + b) - proposal)
    log_accept = n * (u + jnp.log1p(-u))
    uniform = jax.random.uniform(uniform_key, kappa.shape, kappa.dtype)
    accepts = jnp.log(uniform) <= log_accept
    below = jnp.where(is_done, below, proposal)
    return key, below, is_done | accepts

  # 0 for inf, and NaN for what is no concentration, neither by rejection.
  below = jnp.where(kappa >= 0, jnp.zeros_like(kappa), jnp.nan)
  start = key, below, ~((kappa >= 0) & (kappa < jnp.inf))
  return lax.while_loop(lambda state: ~jnp.all(state[2]), propose, start)[1]


def _log_area(p: int) -> float:
  """Of the unit sphere in p dimensions: 2 pi^(p/2) / Gamma(p/2)."""
  return math.log(2) + p / 2 * math.log(math.pi) - math.lgamma(p / 2)


def _valid(kappa):
  """kappa, NaN where it is negative."""
  return jnp.where(kappa >= 0, kappa, jnp.nan)


def _floats(**arrays) -> list[jax.Array]:
  arrays = {name: jnp.asarray(a) for name, a in arrays.items()}
  dtype = jnp.result_type(*arrays.values(), 1.0)
  if dtype.name not in ('float32', 'float64'):
    dtypes = ', '.join(f'{name}.dtype={a.dtype}' for name, a in arrays.items())
    raise TypeError(f'{dtypes}: cast to float32 or float64 first')
  return [a.astype(dtype) for a in arrays.values()]


def _dimension(name: str, x) -> int:
  if x.ndim == 0 or x.shape[-1] < 2:
    raise ValueError(
      f'{name}.shape={x.shape} must end in the dimension p, at least 2'
    )
  return x.shape[-1]


def _broadcast(**shapes) -> tuple[int, ...]:
  try:
    return np.broadcast_shapes(*shapes.values())
  except ValueError as error:
    named = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
    raise ValueError(
      f'leading axes do not broadcast: {named}; add axes of size 1'
    ) from error
