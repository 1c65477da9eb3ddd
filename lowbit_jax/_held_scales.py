"""The states of tensor scales that are held or delayed.

`training.scaling` offers and describes them. They stand here for whatever runs
a recipe in a lower layer.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import _serialization, ops
from lowbit_jax._typing import Key, PyTree
from lowbit_jax.numerics._codec import as_float_array
from lowbit_jax.recipe import (
  QuantSpec,
  Recipe,
  TensorScaling,
  check_recipe,
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('history', 'amax', 'count', 'seen'),
  meta_fields=('scaling',),
)
@dataclasses.dataclass(frozen=True)
class ScaleState:
  """The state of one tensor scale, or of a stack of them; a pytree.

  Attributes:
    history: float32 (..., window), largest magnitudes, newest first.
    amax: float32, the magnitude that scales are made of; 0 before the first.
    count: int32, finished steps.
    seen: float32, the largest magnitude recorded in the current step.
    scaling: the rule, delayed or sample and hold.
  """

  history: jax.Array
  amax: jax.Array
  count: jax.Array
  seen: jax.Array
  scaling: TensorScaling

  def record(self, amax: jax.Array) -> tuple['ScaleState', jax.Array]:
    """Records `amax`; also returns the magnitude to quantize with."""
    state = dataclasses.replace(self, seen=jnp.maximum(self.seen, amax))
    renewed = self.amax == 0
    if self.scaling.every > 1:
      renewed |= self.count % self.scaling.every == 0
    return state, jnp.where(renewed, amax, self.amax)

  def advanced(self) -> 'ScaleState':
    """The state of the next step."""
    older = self.history[..., :-1]
    history = jnp.concatenate([self.seen[..., None], older], axis=-1)
    top = jnp.max(history, axis=-1)
    keep = (top == 0) | ~jnp.isfinite(top)
    if self.scaling.every > 1:
      keep |= self.count % self.scaling.every != 0
    return ScaleState(
      history,
      jnp.where(keep, self.amax, top),
      self.count + 1,
      jnp.zeros_like(self.seen),
      self.scaling,
    )


_serialization.know(
  ScaleState, ('history', 'amax', 'count', 'seen'), ('scaling',)
)


class DotScales(NamedTuple):
  """States of the tensor scales of one product; None for current scales."""

  x: ScaleState | None
  w: ScaleState | None


def init(scaling: TensorScaling) -> ScaleState:
  """The state before the first step, each leaf in a buffer of its own."""
  if not isinstance(scaling, TensorScaling):
    raise TypeError(f'{scaling=} must be a TensorScaling')
  _serialization.know_all()

  def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)

  count = jnp.zeros((), jnp.int32)
  return ScaleState(zeros(scaling.window), zeros(), count, zeros(), scaling)


def init_dot(recipe: Recipe) -> DotScales:
  """States for the operands of a recipe that hold their tensor scales."""
  check_recipe(recipe)

  def state(*sites):
    for spec in sites:
      if isinstance(spec, QuantSpec) and spec.tensor_scaling is not None:
        return init(spec.tensor_scaling)
    return None

  return DotScales(
    state(recipe.fwd.lhs, recipe.wgrad.lhs),
    state(recipe.fwd.rhs, recipe.dgrad.rhs),
  )


def qdot(
  x: jax.Array,
  w: jax.Array,
  recipe: Recipe,
  state: DotScales,
  *,
  key: Key | None = None,
  **options: Any,
) -> tuple[jax.Array, DotScales]:
  """`ops.qdot` with held tensor scales.

  Args:
    x: activations (..., K).
    w: weight (K, N).
    recipe: a recipe whose QuantSpecs with `tensor_scaling` use the state;
      gradients take current scales.
    state: from `init_dot(recipe)`, or the one that the previous call returned.
    key: as in `ops.qdot`.
    **options: further arguments of `ops.qdot`.

  Returns:
    The product, and the state with the magnitudes of these operands. Under vmap
    or shard_map, `merge` joins the states of the parts.
  """
  check_state(recipe, state)
  state, amax = record(x, w, state)
  y = ops.qdot(x, w, recipe, key=key, tensor_amax=amax, **options)
  return y, state


def check_state(recipe: Recipe, state: DotScales) -> None:
  """Refuses states that are not those of `init_dot(recipe)`."""
  _check_scales(state)
  for name, own, wanted in zip(
    DotScales._fields, state, init_dot(recipe), strict=True
  ):
    held = None if own is None else own.scaling
    rule = None if wanted is None else wanted.scaling
    if held != rule:
      raise ValueError(
        f'state.{name} holds a scale by {held}, and recipe {recipe.name!r} by'
        f' {rule}: start with scaling.init_dot(recipe)'
      )


def _check_scales(state: object) -> None:
  if not isinstance(state, DotScales):
    raise TypeError(
      f'{state=} must be DotScales: start with scaling.init_dot(recipe)'
    )


def record(
  x: jax.Array, w: jax.Array, state: DotScales
) -> tuple[DotScales, tuple]:
  """Records both operands; also returns the `tensor_amax` of `ops.qdot`."""
  _check_scales(state)
  states, magnitudes = [], []
  for operand, s in zip((x, w), state, strict=True):
    new, amax = (None, None) if s is None else s.record(largest(operand))
    states.append(new)
    magnitudes.append(amax)
  return DotScales(*states), tuple(magnitudes)


def largest(x: jax.Array) -> jax.Array:
  """The largest finite magnitude, float32, without gradient."""
  x = as_float_array(x)
  magnitude = jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32))
  finite = jnp.where(jnp.isfinite(magnitude), magnitude, 0)
  return jnp.max(finite, initial=0)


def merge(a: PyTree, b: PyTree) -> PyTree:
  """Joins two trees of states that recorded different parts of a step.

  Args:
    a: tree of states after one part of a step, such as a microbatch.
    b: the same states after another part.
  """
  return _map(
    lambda s, t: dataclasses.replace(s, seen=jnp.maximum(s.seen, t.seen)), a, b
  )


def advance(states: PyTree) -> PyTree:
  """A tree with its states moved to the next step; other leaves are kept."""
  return _map(ScaleState.advanced, states)


def _map(f, tree, *rest):
  def is_state(leaf):
    return isinstance(leaf, ScaleState)

  def apply(leaf, *others):
    return f(leaf, *others) if is_state(leaf) else leaf

  return jax.tree.map(apply, tree, *rest, is_leaf=is_state)
