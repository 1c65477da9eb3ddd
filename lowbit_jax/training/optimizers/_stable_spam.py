"""StableSPAM: Adam for gradients with spikes, as in 4-bit training.

Source: Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
Adam (2025).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowbit_jax.training.optimizers._common import (
  check_dense,
  check_range,
  check_steps,
  in_float32,
  increment,
  safe_norm,
  wide,
)

# Its square is finite in float32.
_LARGEST_NORM = 2.0**63


class AdaClipState(NamedTuple):
  """Steps so far, and M for each tensor."""

  steps: jax.Array
  peak: optax.Updates


class AdaGNState(NamedTuple):
  """Steps so far, and m and v for each tensor."""

  steps: jax.Array
  norm: optax.Updates
  square: optax.Updates


class MomentumResetState(NamedTuple):
  """Steps since the last reset, and the state that is reset."""

  steps: jax.Array
  inner: optax.OptState


def adaclip(theta: float = 0.999) -> optax.GradientTransformation:
  """Scales down the elements of a gradient beyond its usual maximum.

  For each tensor, in step t = 1, 2, ...:

    M_t = theta M_{t-1} + (1 - theta) max |g|,  M^ = M_t / (1 - theta^t)
    g_i <- g_i M^ / max |g|  where |g_i| > M^

  Args:
    theta: decay of the running mean of max |g|, in [0, 1).

  Returns:
    A transformation with one number of state per tensor.
  """
  check_range('theta', theta, 0, 1)

  def init(params):
    check_dense('params', params)
    return AdaClipState(jnp.zeros([], jnp.int32), _scalars(params))

  def update(updates, state, params=None):
    del params
    check_dense('updates', updates)
    count = increment(state.steps)
    top = jax.tree.map(_largest, updates)
    peak = optax.tree.update_moment(top, state.peak, theta, 1)
    limit = optax.tree.bias_correction(peak, theta, count)

    def clip(g, top, limit):
      scale = limit / jnp.where(top > 0, top, 1)
      x = wide(g)
      return jnp.where(jnp.abs(x) > limit, x * scale, x).astype(g.dtype)

    return jax.tree.map(clip, updates, top, limit), AdaClipState(count, peak)

  return optax.GradientTransformation(init, update)


def adagn(
  gamma1: optax.ScalarOrSchedule = 0.7, gamma2: float = 0.9, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Gives each gradient the norm that its history suggests.

  For each tensor, with m^ and v^ corrected for bias as in Adam:

    n = ||g||,  m = gamma1 m + (1 - gamma1) n,  v = gamma2 v + (1 - gamma2) n^2
    g <- g / n  m^ / (sqrt(v^) + eps)

  Args:
    gamma1: decay of the mean of norms, in [0, 1), or a schedule of it.
    gamma2: decay of the mean of squared norms.
    eps: added to the root of the latter.

  Returns:
    A transformation with two numbers of state per tensor. A gradient of zeros
    stays one. The history counts norms beyond 2^63 as 2^63, so that their
    squares stay finite.
  """
  if not callable(gamma1):
    check_range('gamma1', gamma1, 0, 1)
  check_range('gamma2', gamma2, 0, 1)

  def init(params):
    zero = jnp.zeros([], jnp.int32)
    return AdaGNState(zero, _scalars(params), _scalars(params))

  def update(updates, state, params=None):
    del params
    decay = gamma1(state.steps) if callable(gamma1) else gamma1
    count = increment(state.steps)
    n = jax.tree.map(_norm, updates)
    norm = optax.tree.update_moment(n, state.norm, decay, 1)
    square = optax.tree.update_moment(n, state.square, gamma2, 2)
    m = optax.tree.bias_correction(norm, decay, count)
    v = optax.tree.bias_correction(square, gamma2, count)

    def scale(g, m, v):
      x = wide(g)
      power, n = safe_norm(x)
      factor = m / (jnp.sqrt(v) + eps) / jnp.where(n > 0, n, 1)
      return (x * power * factor).astype(g.dtype)

    updates = jax.tree.map(scale, updates, m, v)
    return updates, AdaGNState(count, norm, square)

  return optax.GradientTransformation(init, update)


def momentum_reset(
  inner: optax.GradientTransformation, every: int = 1000
) -> optax.GradientTransformationExtraArgs:
  """Starts a transformation again after every `every` steps.

  Steps 1 ... every are those of `inner`; step every + 1 begins with its initial
  state, hence with new moments and bias correction, and so on.

  Args:
    inner: a transformation whose initial state depends on shapes only, such as
      `optax.scale_by_adam()`; it computes in at least float32. Schedules inside
      it start again too.
    every: steps between resets.
  """
  check_steps('every', every)
  inner = in_float32(inner)

  def init(params):
    return MomentumResetState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(updates, state, params=None, **extra_args):
    restart = state.steps == every
    fresh = inner.init(updates if params is None else params)
    start = jax.tree.map(
      lambda new, old: jnp.where(restart, new, old), fresh, state.inner
    )
    updates, new = inner.update(updates, start, params, **extra_args)
    count = jnp.where(restart, 1, state.steps + 1)
    return updates, MomentumResetState(count, new)

  return optax.GradientTransformationExtraArgs(init, update)


def stable_spam(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Any = None,
  *,
  gamma1: float = 0.7,
  gamma2: float = 0.9,
  theta: float = 0.999,
  every: int | None = None,
  decay_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """StableSPAM: `adaclip`, `adagn`, and Adam within `momentum_reset`.

  Gradients are clipped, then normalized; the moments and the bias correction of
  Adam start again every `every` steps.

  Args:
    learning_rate: a number or a schedule.
    b1: as in `optax.adamw`, as are `b2`, `eps`, `weight_decay` and `mask`.
    gamma1: as in `adagn`.
    gamma2: as in `adagn`.
    theta: as in `adaclip`.
    every: as in `momentum_reset`; None for 1000.
    decay_steps: None, or the steps T over which `b1` and `gamma1` fall to half
      of their values: both are multiplied by (3 + cos(pi t / T)) / 4.
  """
  every = 1000 if every is None else every
  adam = optax.scale_by_adam(b1, b2, eps)
  momentum = momentum_reset(adam, every)
  decay = gamma1
  if decay_steps is not None:
    check_steps('decay_steps', decay_steps)
    decay = optax.cosine_decay_schedule(gamma1, decay_steps, 0.5)
    # Outside of the reset, so that the schedule of b1 goes on.
    momentum = optax.inject_hyperparams(
      lambda b1: momentum_reset(optax.scale_by_adam(b1, b2, eps), every)
    )(b1=optax.cosine_decay_schedule(b1, decay_steps, 0.5))
  return optax.chain(
    adaclip(theta),
    adagn(decay, gamma2),
    momentum,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _largest(g):
  """max |g|."""
  return jnp.max(jnp.abs(wide(g)), initial=0).astype(jnp.float32)


def _norm(g):
  """||g||, at most `_LARGEST_NORM`."""
  scale, norm = safe_norm(wide(g))
  norm = jnp.minimum(norm, _LARGEST_NORM * scale) / scale
  return norm.reshape(()).astype(jnp.float32)


def _scalars(params):
  return jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params)
