"""Orthogonal polar factors by Newton-Schulz, exact in rank or low-rank.

The polar factor of X = U S V^T is U V^T. With A = X X^T on the smaller side,
X <- a X + (b A + c A^2) X maps each singular value s to a s + b s^3 + c s^5.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import _explicit
from lowbit_jax._typing import Key, Shape
from lowbit_jax.training.optimizers._common import (
  check_steps,
  safe_norm,
  wide,
)

Triple = tuple[float, float, float]


class NewtonSchulz(NamedTuple):
  """Coefficients of a Newton-Schulz iteration.

  Step i uses triple i; the last triple is used for all further steps.

  Attributes:
    triples: (a, b, c) of each step.
    margin: X is divided by margin ||X||_F + eps.
    eps: see `margin`.
  """

  triples: tuple[Triple, ...]
  margin: float = 1.0
  eps: float = 1e-8


# cubic and quintic_theory map 1 to 1 with vanishing derivative. Of the others,
# quintic_empirical is K. Jordan's, which trades accuracy for slope at zero, and
# polar_express that of Amsel et al. (2025): minimax for the interval that is
# left after each step, ending in the theoretical (15/8, -10/8, 3/8).
COEFFICIENTS = {
  'cubic': NewtonSchulz(((1.5, -0.5, 0.0),)),
  'quintic_theory': NewtonSchulz(((2.0, -1.5, 0.5),)),
  'quintic_empirical': NewtonSchulz(((3.4445, -4.7750, 2.0315),)),
  'polar_express': NewtonSchulz(
    (
      (8.156554524902464, -22.483292925577953, 15.878769915207462),
      (4.042929935166731, -2.8089174659087077, 0.5000178451051304),
      (3.8916678022926643, -2.772484153217687, 0.5060648178503396),
      (3.285753657755654, -2.368129493342538, 0.46449024233003117),
      (2.3005307116270957, -1.6111665557258397, 0.3833374427545274),
      (1.8631210546382577, -1.204216062100269, 0.3421879560523365),
      (1.838257215225469, -1.1779263289551445, 0.33965130386439135),
      (1.8382353249446173, -1.1779029764506115, 0.3396490812110979),
      (1.875, -1.25, 0.375),
    ),
    margin=1.02,
    eps=1e-6,
  ),
}

Coefficients = str | NewtonSchulz | Triple | Sequence[Triple]


def newton_schulz(
  x: jax.Array,
  coefficients: Coefficients = 'quintic_empirical',
  steps: int = 5,
) -> jax.Array:
  """An approximate polar factor of each matrix.

  X <- X / (margin ||X||_F + eps), then `steps` times
  X <- a X + (b A + c A^2) X with A = X X^T, of the smaller side.

  Args:
    x: (..., m, n) float of any magnitude. The norm is computed in float32, the
      steps in the dtype of `x`, so not in less than bfloat16.
    coefficients: 'cubic', 'quintic_theory', 'quintic_empirical',
      'polar_express', one triple (a, b, c), several of them, or a
      `NewtonSchulz`.
    steps: number of steps.

  Returns:
    An array of the shape and dtype of `x`: U f(S) V^T with f the composition of
    the steps. Zeros give zeros.
  """
  _check_matrices(x)
  rule = _coefficients(coefficients)
  check_steps('steps', steps, 0)
  run = functools.partial(_newton_schulz, rule=rule, steps=steps)
  return _explicit.automatic(run, _explicit.as_first, x)


def _newton_schulz(x, rule: NewtonSchulz, steps: int) -> jax.Array:
  tall = x.shape[-2] > x.shape[-1]
  if tall:
    x = x.mT
  x = _normalized(x, rule.margin, rule.eps)
  for i in range(steps):
    a, b, c = rule.triples[min(i, len(rule.triples) - 1)]
    square = x @ x.mT
    x = a * x + (b * square + c * square @ square) @ x
  return x.mT if tall else x


def _normalized(x, margin: float, eps: float):
  """X / (margin ||X||_F + eps) for any magnitude, in the dtype of X."""
  y = wide(x)
  scale, norm = safe_norm(y, (-2, -1))
  return (y * scale / (margin * norm + eps * scale)).astype(x.dtype)


def randomized_polar(
  x: jax.Array,
  key: Key,
  *,
  rank: int,
  oversample: int = 10,
  power_iterations: int = 1,
  coefficients: Coefficients = 'quintic_theory',
  steps: int = 7,
  sketch: Literal['gaussian', 'columns'] = 'gaussian',
) -> jax.Array:
  """The polar factor of a random low-rank approximation of each matrix.

  With A the tall one of X and X^T and k = rank + oversample: Y = A Omega;
  Y <- A (A^T Y) `power_iterations` times; Q R = Y; B = Q^T A (k x n);
  O = Q polar(B), of rank at most k.

  Args:
    x: (..., m, n) float of any magnitude; computed in at least float32.
    key: PRNG key of the sketch.
    rank: r, at least 1. k is at most the smaller side, where O is the whole
      polar factor.
    oversample: additional columns.
    power_iterations: h; each turns the sketch to large singular values.
    coefficients: as in `newton_schulz`.
    steps: as in `newton_schulz`.
    sketch: 'gaussian' for Omega of normal entries, 'columns' for k columns of
      A, chosen uniformly without replacement.

  Returns:
    O in the shape and dtype of `x`. Its norm grows with k: multiply by
    sqrt(min(m, n) / k) for the root mean square of a full polar factor.

  Source: Muon with Nesterov Momentum: Heavy-Tailed Noise and (Randomized)
  Inexact Polar Decomposition.
  """
  _check_matrices(x)
  check_steps('rank', rank)
  check_steps('oversample', oversample, 0)
  check_steps('power_iterations', power_iterations, 0)
  k = sketch_size(x.shape, rank, oversample)
  if sketch not in ('gaussian', 'columns'):
    raise ValueError(f"sketch={sketch!r} is not one of ('gaussian', 'columns')")

  def run(x, key):
    return _randomized(x, key, k, power_iterations, coefficients, steps, sketch)

  return _explicit.automatic(run, _explicit.as_first, x, key)


def _randomized(x, key, k, power_iterations, coefficients, steps, sketch):
  a = wide(x)
  is_wide = x.shape[-2] < x.shape[-1]
  if is_wide:
    a = a.mT
  *batch, n = a.shape[:-2] + a.shape[-1:]
  # The power iterations would cube the magnitude of A; any multiple will do.
  unit = _normalized(a, 1.0, float(jnp.finfo(a.dtype).tiny))
  if sketch == 'gaussian':
    y = unit @ jax.random.normal(key, (*batch, n, k), a.dtype)
  else:
    draws = jax.random.uniform(key, (*batch, 1, n), jnp.float32)
    order = jnp.argsort(draws, axis=-1)
    y = jnp.take_along_axis(unit, order[..., :k], axis=-1)
  for _ in range(power_iterations):
    y = unit @ (unit.mT @ y)
  q, _ = jnp.linalg.qr(y)
  o = q @ newton_schulz(q.mT @ a, coefficients, steps)
  return (o.mT if is_wide else o).astype(x.dtype)


def sketch_size(shape: Shape, rank: int, oversample: int) -> int:
  """Columns of the sketch of matrices (..., m, n)."""
  return min(rank + oversample, *shape[-2:])


def _coefficients(value: Coefficients) -> NewtonSchulz:
  if isinstance(value, NewtonSchulz):
    return value
  if isinstance(value, str):
    if value not in COEFFICIENTS:
      raise ValueError(
        f'coefficients={value!r} is not one of {tuple(COEFFICIENTS)}; use'
        ' one, or triples (a, b, c)'
      )
    return COEFFICIENTS[value]
  triples: tuple[Any, ...] = tuple(value)
  if len(triples) == 3 and all(isinstance(t, int | float) for t in triples):
    triples = (triples,)
  if not triples or any(len(tuple(t)) != 3 for t in triples):
    raise ValueError(
      f'coefficients={value!r} must be one triple (a, b, c) or several'
    )
  return NewtonSchulz(
    tuple((float(a), float(b), float(c)) for a, b, c in triples)
  )


def _check_matrices(x) -> None:
  if jnp.ndim(x) < 2:
    raise ValueError(
      f'x.shape={jnp.shape(x)} must be (..., m, n): only matrices have a polar'
      ' factor'
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x.dtype={x.dtype} must be a float type')
