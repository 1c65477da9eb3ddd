"""Dynamic loss scaling for float16 gradients.

Source: Micikevicius et al., Mixed Precision Training (2018).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowbit_jax._typing import PyTree
from lowbit_jax.training.optimizers._common import (
  check_dense,
  check_steps,
  widened,
)

# Smaller ones vanish in float16.
_SMALLEST = 2.0**-24


class LossScaleState(NamedTuple):
  """The scale, finite steps since it changed, the state of the optimizer."""

  loss_scale: jax.Array
  finite_steps: jax.Array
  inner: optax.OptState


def dynamic_loss_scale(
  inner: optax.GradientTransformation,
  *,
  initial: float = 2.0**15,
  period: int = 2000,
  factor: float = 2.0,
  smallest: float = 1.0,
  largest: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer that is given gradients of the scaled loss.

  Small gradients underflow in float16. The loss is multiplied by a scale, see
  `scale_loss`, and the gradients are divided by it in float32. The scale is
  multiplied by `factor` after `period` finite steps and divided by it after a
  step that is not finite, which is skipped.

  Args:
    inner: the whole optimizer; it sees gradients of the loss itself, and
      parameters, in at least float32.
    initial: first scale, a power of two so that scaling is exact.
    period: finite steps after which the scale grows.
    factor: by which it grows and shrinks; it stays between `smallest` and
      `largest`.
    smallest: at least 2^-24; below 1 for losses whose gradients overflow as
      they are, which would otherwise be skipped for ever.
    largest: see `factor`.

  Returns:
    A transformation that skips a step whose gradients are not finite: updates
    of zero, the state of `inner` as it was.
  """
  check_steps('period', period)
  if not factor > 1:
    raise ValueError(f'factor={factor!r} must be larger than 1, such as 2.0')
  if not smallest >= _SMALLEST:
    raise ValueError(
      f'smallest={smallest!r} must be at least 2^-24: float16 has no smaller'
      ' numbers'
    )
  if not smallest <= initial <= largest:
    raise ValueError(
      f'initial={initial!r} must be between smallest={smallest!r} and'
      f' largest={largest!r}'
    )
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return LossScaleState(
      jnp.asarray(initial, jnp.float32),
      jnp.zeros([], jnp.int32),
      inner.init(widened(params)),
    )

  def update(updates, state, params=None, **extra_args):
    check_dense('updates', updates)
    scale = state.loss_scale
    finite = all_finite(updates)
    # Not in float16, where the quotient may underflow again.
    grads = jax.tree.map(lambda g: g / scale, widened(updates))
    updates, new = inner.update(
      grads, state.inner, widened(params), **extra_args
    )
    updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.inner)
    steps = jnp.where(finite, state.finite_steps + 1, 0)
    grows = steps >= period
    up = jnp.minimum(scale * factor, largest)
    down = jnp.maximum(scale / factor, smallest)
    scale = jnp.where(finite, jnp.where(grows, up, scale), down)
    return updates, LossScaleState(scale, jnp.where(grows, 0, steps), new)

  return optax.GradientTransformationExtraArgs(init, update)


def scale_loss(loss: jax.Array, state: PyTree) -> jax.Array:
  """The loss times the scale of an optimizer state, in the dtype of the loss.

  Args:
    loss: a number.
    state: a state that holds one of `dynamic_loss_scale`, at any depth.
  """
  scale = optax.tree.get(state, 'loss_scale')
  if scale is None:
    raise ValueError(
      'state has no loss_scale; make it with dynamic_loss_scale(...).init'
    )
  return loss * scale.astype(loss.dtype)


def all_finite(tree: PyTree) -> jax.Array:
  """Whether no array of a tree holds NaN or Inf, as a boolean array."""
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)
