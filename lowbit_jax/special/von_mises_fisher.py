"""The von Mises-Fisher distribution on the unit sphere in p dimensions.

Its density, with respect to area, at a unit vector x is C_p(kappa) exp(kappa
mean . x). With v = p / 2 - 1 it is taken relative to the uniform distribution,

  log C_p(kappa) = -log area(S^{p-1}) - log 0F1(; p / 2; kappa^2 / 4),

where the usual difference of (p / 2 - 1) log kappa and log I_v(kappa) would
cancel most digits for large p. The mean resultant length is A_p(kappa) =
I_{p/2}(kappa) / I_{p/2-1}(kappa).
"""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax._typing import ArrayLike, Key
from lowbit_jax.special import _bessel

_NEWTON_STEPS = 8


def log_prob(x: ArrayLike, mean: ArrayLike, kappa: ArrayLike) -> jax.Array:
  """Log density with respect to the area of the unit sphere.

  Args:
    x: (..., p) unit vectors, p at least 2.
    mean: (..., p) unit vectors, the mean directions.
    kappa: (...) concentrations, 0 or more and finite; 0 is uniform.

  Returns:
    (...) log densities, where leading axes broadcast, in the dtype that the
    arguments promote to, float32 or float64.

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
  kappa = lax.broadcast_to_rank(kappa, rank - 1)
  cosine = jnp.sum(x * mean, -1)
  return kappa * cosine - _bessel.log_0f1(p / 2 - 1, kappa) - _log_area(p)


def fit(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Maximum likelihood: the mean direction, and kappa with A_p(kappa) = R.

  R is the length of the mean of the samples. kappa starts from R (p - R^2) /
  (1 - R^2) (Banerjee, Dhillon, Ghosh and Sra, "Clustering on the Unit
  Hypersphere using von Mises-Fisher Distributions", 2005) and takes a fixed
  number of Newton steps (Sra, "A short note on parameter approximation for von
  Mises-Fisher distributions", 2012).

  Args:
    x: (..., n, p) unit vectors, n at least 1 and p at least 2.

  Returns:
    mean (..., p) and kappa (...). The relative error of kappa from rounding is
    that of R times (p + 2 kappa) / p in size: where kappa is far above p, use
    float64. Samples that coincide have no finite kappa.

  Raises:
    TypeError: for dtypes other than float32 and float64.
    ValueError: for shapes that do not fit.

  Derivative: of the solution itself (the last Newton step has it), in x.

  Examples:
    >>> key, e = jax.random.key(0), jnp.eye(8)[0]
    >>> mean, kappa = fit(sample(key, e, 20.0, (4000,)))
    >>> bool(abs(kappa / 20 - 1) < 0.05), bool(mean @ e > 0.99)
    (True, True)
  """
  (x,) = _floats(x=x)
  p = _dimension('x', x)
  if x.ndim < 2 or x.shape[-2] == 0:
    raise ValueError(
      f'x.shape={x.shape} must be (..., n, p) with at least one sample'
    )
  average = jnp.mean(x, -2)
  R = jnp.linalg.norm(average, axis=-1)
  return average / R[..., None], _concentration(R, p)


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
    kappa: (...) concentrations, 0 or more and finite.
    shape: of the result without its last axis; the leading axes of `mean` and
      `kappa` broadcast to it. None for the shape that these broadcast to.

  Returns:
    (*shape, p) unit vectors, in the dtype that mean and kappa promote to.

  Raises:
    TypeError: for dtypes other than float32 and float64.
    ValueError: for shapes that do not fit.

  Derivative: none; samples are constants.

  Examples:
    >>> sample(jax.random.key(0), jnp.eye(8)[0], 20.0, (4000,)).shape
    (4000, 8)
  """
  mean, kappa = _floats(mean=mean, kappa=kappa)
  p = _dimension('mean', mean)
  natural = _broadcast(mean=mean.shape[:-1], kappa=kappa.shape)
  shape = natural if shape is None else tuple(map(operator.index, shape))
  if not _expands(natural, shape):
    raise ValueError(
      f'{shape=} must be one that the leading axes of mean and kappa,'
      f' {natural}, broadcast to'
    )
  mean, kappa = lax.stop_gradient((mean, kappa))
  mean = lax.broadcast_to_rank(mean, len(shape) + 1)
  along_key, across_key = jax.random.split(key)
  below = _one_minus_cosine(along_key, jnp.broadcast_to(kappa, shape), p)
  normal = jax.random.normal(across_key, (*shape, p), mean.dtype)
  normal = normal - jnp.sum(normal * mean, -1, keepdims=True) * mean
  length = jnp.linalg.norm(normal, axis=-1)
  sine = jnp.sqrt(below * (2 - below))
  across = (sine / length)[..., None] * normal
  return (1 - below)[..., None] * mean + across


def _expands(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  ends = zip(reversed(shape), reversed(to), strict=False)
  return len(shape) <= len(to) and all(n in (1, m) for n, m in ends)


def _concentration(R, p: int):
  """kappa with A_p(kappa) = R, for 0 <= R < 1."""
  v = p / 2 - 1
  R2 = R * R
  kappa = R * (p - R2) / ((1 - R) * (1 + R))

  def step(_, kappa):
    mean_length, slope = jax.jvp(
      lambda kappa: _bessel.iv_ratio(v, kappa), (kappa,), (jnp.ones_like(R),)
    )
    return jnp.maximum(kappa - (mean_length - R) / slope, 0)

  return lax.fori_loop(0, _NEWTON_STEPS, step, kappa)


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
  b = n / (2 * kappa + jnp.sqrt(4 * kappa * kappa + n * n))

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

  start = key, jnp.zeros_like(kappa), kappa != kappa
  return lax.while_loop(lambda state: ~jnp.all(state[2]), propose, start)[1]


def _log_area(p: int) -> float:
  """Of the unit sphere in p dimensions: 2 pi^(p/2) / Gamma(p/2)."""
  return math.log(2) + p / 2 * math.log(math.pi) - math.lgamma(p / 2)


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
