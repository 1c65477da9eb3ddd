"""Linen: recipes in the linear layers of any model.

A recipe, or a policy of several, goes in as `dot_general_cls`:

  linen.Dense(8, dot_general_cls=linen.dot_general_cls(recipe))

or, without changes to the model, `with quantized(policy): model.apply(...)`.
Layers keep the names and shapes of their parameters.

- `QDotGeneral`: A `dot_general` that trains by a recipe.
- `check_keywords`: Raises TypeError for keywords that a training product does
  not take.
- `dot_general_cls`: For the `dot_general_cls` argument of Dense, DenseGeneral
  and attention.
- `quantized`: Dense and DenseGeneral layers train by `recipe` inside this
  context.
- `recipe_at`: The recipe of the layer at `path`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
from flax import linen as flax_linen

from lowbit_jax import ops
from lowbit_jax._typing import DotDims, DTypeLike, Precision
from lowbit_jax.nn.linen import RNG
from lowbit_jax.ops import _qdot
from lowbit_jax.recipe import Policy, Recipe
from lowbit_jax.training import monitors, scaling

COLLECTION = 'lowbit'
WATCHED = 'watched'


class QDotGeneral(flax_linen.Module):
  """A `dot_general` that trains by a recipe.

  Random bits come from the rng stream 'quant', needed only if the recipe draws
  some. Held tensor scales are in the collection 'lowbit'; `apply` records
  magnitudes in it if `mutable` names it, and `scaling.advance` moves it to the
  next step. In `nn.scan`, give both an axis: `variable_axes={'params': 0,
  'lowbit': 0}, split_rngs={'params': True, 'quant': True}`.

  Attributes:
    recipe: a recipe, a policy that picks one by the path of the layer, or None.
    fraction: finished share of the training, for recipes that switch.
    watch: whether the collection 'watched' has a `monitors.Lost` for each
      layer, whose gradient is the shares that the layer clips and flushes.
  """

  recipe: Recipe | Policy | None = None
  fraction: float = 0.0
  watch: bool = False

  @flax_linen.compact
  def __call__(
    self,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDims,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    recipe = recipe_at(self.recipe, self.path[:-1], self.fraction)
    if recipe is None:
      return jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
      )
    check_keywords(kwargs)
    x, w, shape = _qdot.matrices(lhs, rhs, dimension_numbers)
    key = None
    if recipe.forward_needs_key or self.has_rng(RNG):
      key = self.make_rng(RNG) if recipe.needs_key else None
    elif recipe.needs_key:
      # Evaluation without random bits: the forward product needs none.
      recipe = recipe.forward_only()
    # Held tensor scales. Initialization must leave them as they start.
    state, amax = scaling.init_dot(recipe), (None, None)
    if state != (None, None):
      scales = self.variable(COLLECTION, 'scales', lambda: state)
      recorded, amax = scaling.record(x, w, scales.value)
      if self.is_mutable_collection(COLLECTION) and not self.is_initializing():
        scales.value = recorded
    y = ops.qdot(x, w, recipe, key=key, tensor_amax=amax, precision=precision)
    if self.watch:
      probe = self.variable(WATCHED, 'lost', monitors.zeros).value
      y = cast(jax.Array, monitors.tap(recipe, y, x, w, key, amax, probe))
    y = y.reshape(shape)
    dtype = preferred_element_type
    return y if dtype is None else y.astype(dtype)


def dot_general_cls(
  recipe: Recipe | Policy | None, fraction: float = 0.0, *, watch: bool = False
) -> Callable[[], QDotGeneral]:
  """For the `dot_general_cls` argument of Dense, DenseGeneral and attention.

  Args:
    recipe: as in `QDotGeneral`.
    fraction: as in `QDotGeneral`.
    watch: as in `QDotGeneral`.
  """
  return functools.partial(QDotGeneral, recipe, fraction, watch)


@contextlib.contextmanager
def quantized(
  recipe: Recipe | Policy | None, fraction: float = 0.0
) -> Iterator[None]:
  """Dense and DenseGeneral layers train by `recipe` inside this context.

  Layers with a `dot_general` of their own keep it. Trace inside the context; if
  the recipe holds tensor scales, also initialize inside it.

  Args:
    recipe: a recipe, or a policy that picks one by the path of the layer.
    fraction: as in `QDotGeneral`.
  """
  make = dot_general_cls(recipe, fraction)

  def intercept(call, args, kwargs, context):
    module = context.module
    if (
      context.method_name != '__call__'
      or not isinstance(module, flax_linen.Dense | flax_linen.DenseGeneral)
      or module.dot_general is not None
      or module.dot_general_cls is not None
    ):
      return call(*args, **kwargs)
    object.__setattr__(module, 'dot_general_cls', make)
    try:
      return call(*args, **kwargs)
    finally:
      object.__setattr__(module, 'dot_general_cls', None)

  with flax_linen.intercept_methods(intercept):
    yield


def recipe_at(
  recipe: Recipe | Policy | None, path: Iterable, fraction: float
) -> Recipe | None:
  """The recipe of the layer at `path`."""
  if isinstance(recipe, Policy):
    return recipe.at('/'.join(map(str, path)), fraction)
  if isinstance(recipe, Recipe):
    return recipe.at(fraction)
  if recipe is None:
    return None
  raise TypeError(
    f'recipe={recipe!r} must be a Recipe, a Policy or None; by name it is'
    ' lowbit_jax.training.recipes.get(name)'
  )


def check_keywords(kwargs: Mapping[str, Any]) -> None:
  """Raises TypeError for keywords that a training product does not take."""
  unknown = sorted(k for k, v in kwargs.items() if v is not None)
  if unknown:
    raise TypeError(f'a training product has no keywords {unknown}')
