"""NNX: recipes in the linear layers of any model.

- `LowBit`: State of held tensor scales; not a Param.
- `QDotGeneral`: A `dot_general` that trains by a recipe, for Linear and
  LinearGeneral.
- `advance`: Moves all held tensor scales of a model to the next step, in place.
- `quantize`: Gives every Linear and LinearGeneral of a model its recipe, in
  place.
"""

from typing import Any

import jax
from flax import nnx as flax_nnx

from lowbit_jax import ops
from lowbit_jax._typing import DotDims, DTypeLike, OutSharding, Precision
from lowbit_jax.ops import _qdot
from lowbit_jax.recipe import Policy, Recipe, check_recipe
from lowbit_jax.training import scaling
from lowbit_jax.training.linen import check_keywords, recipe_at


class LowBit(flax_nnx.Variable):
  """State of held tensor scales; not a Param."""


class QDotGeneral(flax_nnx.Module):
  """A `dot_general` that trains by a recipe, for Linear and LinearGeneral.

  Args:
    recipe: a recipe or None.
    rngs: source of a stream of keys, forked from its stream 'quant'; needed
      only if the recipe draws random bits.
  """

  def __init__(
    self, recipe: Recipe | None, *, rngs: flax_nnx.Rngs | None = None
  ) -> None:
    if recipe is not None:
      check_recipe(recipe)
    if recipe is not None and recipe.needs_key and rngs is None:
      raise ValueError(
        f'recipe {recipe.name!r} draws random bits: pass rngs=nnx.Rngs(quant=0)'
      )
    self.recipe = recipe
    draws = recipe is not None and recipe.needs_key
    self.rngs = rngs.fork() if draws else None
    state = scaling.DotScales(None, None)
    if recipe is not None:
      state = scaling.init_dot(recipe)
    self.scales = None if state == (None, None) else LowBit(state)

  def __call__(
    self,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDims,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    **kwargs: Any,
  ) -> jax.Array:
    if self.recipe is None:
      return jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        **kwargs,
      )
    check_keywords({'out_sharding': out_sharding, **kwargs})
    x, w, shape = _qdot.matrices(lhs, rhs, dimension_numbers)
    key = None if self.rngs is None else self.rngs.quant()
    options = {'key': key, 'precision': precision}
    if self.scales is None:
      y = ops.qdot(x, w, self.recipe, **options)
    else:
      y, state = scaling.qdot(
        x, w, self.recipe, self.scales.get_value(), **options
      )
      self.scales.set_value(state)
    y = y.reshape(shape)
    dtype = preferred_element_type
    return y if dtype is None else y.astype(dtype)


def quantize(
  model: flax_nnx.Module,
  recipe: Recipe | Policy,
  *,
  rngs: flax_nnx.Rngs | None = None,
  fraction: float = 0.0,
) -> dict[str, Recipe | None]:
  """Gives every Linear and LinearGeneral of a model its recipe, in place.

  Args:
    model: an NNX module. Layers that have a `dot_general` of their own keep it,
      unless it is a QDotGeneral.
    recipe: a recipe, or a policy that picks one by the path of the layer.
    rngs: as in `QDotGeneral`.
    fraction: finished share of the training, for recipes that switch.

  Returns:
    The recipe of each module with a kernel by its path, None for what stays in
    high precision: what the policy says so of, convolutions, `Einsum`, and
    layers with a product of their own.

  Raises:
    TypeError: for what is no module.
    ValueError: for a model without such layers, and a rule of the policy that
      none of them matches.
  """
  _check_model(model)
  layers: dict[str, Recipe | None] = {}
  takers = []
  for path, module in flax_nnx.iter_modules(model):
    name = '/'.join(map(str, path))
    if _takes_recipe(module):
      layers[name] = recipe_at(recipe, path, fraction)
      takers.append((module, layers[name]))
    elif isinstance(getattr(module, 'kernel', None), flax_nnx.Variable):
      layers[name] = None
  if not takers:
    raise ValueError(
      f'{type(model).__name__} has no Linear or LinearGeneral that could take a'
      ' recipe'
    )
  if isinstance(recipe, Policy):
    recipe.check_rules(layers)
  for module, layer_recipe in takers:
    if layer_recipe is not None or isinstance(module.dot_general, QDotGeneral):
      module.dot_general = flax_nnx.data(QDotGeneral(layer_recipe, rngs=rngs))
  return layers


def _check_model(model: object) -> None:
  if not isinstance(model, flax_nnx.Module):
    raise TypeError(f'{model=} must be an nnx.Module')


def _takes_recipe(module: Any) -> bool:
  """Whether a module has a product that a recipe may replace."""
  if not isinstance(module, flax_nnx.Linear | flax_nnx.LinearGeneral):
    return False
  own = module.dot_general
  return own in (None, jax.lax.dot_general) or isinstance(own, QDotGeneral)


def advance(model: flax_nnx.Module) -> None:
  """Moves all held tensor scales of a model to the next step, in place."""
  _check_model(model)
  for _, module in flax_nnx.iter_modules(model):
    if isinstance(module, QDotGeneral) and module.scales is not None:
      module.scales.set_value(scaling.advance(module.scales.get_value()))
