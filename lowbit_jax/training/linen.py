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
from lowbit_jax.recipe import Policy, Recipe, check_policy
from lowbit_jax.training import monitors, scaling

COLLECTION = 'lowbit'
WATCHED = 'watched'


class QDotGeneral(flax_linen.Module):
  """A `dot_general` that trains by a recipe.

  Random bits come from the rng stream 'quant'. A recipe that draws some in its
  forward or backward products raises without it: to evaluate, name the products
  that need none, `recipe.forward_only()`. `init` needs no stream.

  Held tensor scales are in the collection 'lowbit', which `init` makes and
  `apply` needs; `apply` records magnitudes in it if `mutable` names it, and
  `scaling.advance` moves it to the next step.

  In `nn.scan`, give both an axis, because Flax drops what has none:
  `variable_axes={'params': 0, 'lowbit': 0}, split_rngs={'params': True,
  'quant': True}`.

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
    key = self._key(recipe) if recipe.needs_key else None
    # Held tensor scales. Initialization must leave them as they start.
    state, amax = scaling.init_dot(recipe), (None, None)
    if state != (None, None):
      self._check_collection(COLLECTION, 'scales', f'recipe {recipe.name!r}')
      scales = self.variable(COLLECTION, 'scales', lambda: state)
      recorded, amax = scaling.record(x, w, scales.value)
      if self.is_mutable_collection(COLLECTION) and not self.is_initializing():
        scales.value = recorded
    y = ops.qdot(x, w, recipe, key=key, tensor_amax=amax, precision=precision)
    if self.watch:
      self._check_collection(WATCHED, 'lost', 'watch=True')
      probe = self.variable(WATCHED, 'lost', monitors.zeros).value
      y = cast(jax.Array, monitors.tap(recipe, y, x, w, key, amax, probe))
    y = y.reshape(shape)
    dtype = preferred_element_type
    return y if dtype is None else y.astype(dtype)

  def _key(self, recipe: Recipe):
    """A key of the stream; in `init` Flax gives one of 'params' without it."""
    if self.has_rng(RNG) or self.is_initializing():
      return self.make_rng(RNG)
    raise ValueError(
      f'recipe {recipe.name!r} of {_name(self)} draws random bits, and there is'
      f' no rng stream {RNG!r}: pass rngs={{{RNG!r}: key}} to apply (in nn.scan'
      f' also split_rngs={{{RNG!r}: True}}), or evaluate with'
      ' recipe.forward_only()'
    )

  def _check_collection(self, collection: str, name: str, owner: str) -> None:
    """Says what to do where a variable neither exists nor can be made."""
    if not (
      self.has_variable(collection, name)
      or self.is_mutable_collection(collection)
    ):
      raise ValueError(
        f'{owner} of {_name(self)} needs the collection {collection!r}, which'
        ' `init` makes: pass it to apply beside the params (in nn.scan also'
        f' variable_axes={{{collection!r}: 0}})'
      )


def _name(module: flax_linen.Module) -> str:
  return repr('/'.join(map(str, module.path[:-1])))


def dot_general_cls(
  recipe: Recipe | Policy | None, fraction: float = 0.0, *, watch: bool = False
) -> Callable[[], QDotGeneral]:
  """For the `dot_general_cls` argument of Dense, DenseGeneral and attention.

  Args:
    recipe: as in `QDotGeneral`.
    fraction: as in `QDotGeneral`.
    watch: as in `QDotGeneral`.
  """
  return functools.partial(QDotGeneral, check_policy(recipe), fraction, watch)


@contextlib.contextmanager
def quantized(
  recipe: Recipe | Policy | None, fraction: float = 0.0
) -> Iterator[dict[str, Recipe | None]]:
  """Dense and DenseGeneral layers train by `recipe` inside this context.

  Layers with a `dot_general` of their own keep it. Trace inside the context; if
  the recipe holds tensor scales, also initialize inside it.

  Args:
    recipe: a recipe, or a policy that picks one by the path of the layer.
    fraction: as in `QDotGeneral`.

  Yields:
    A dict that tracing fills: the recipe of each module with a kernel by its
    path, None for what stays in high precision. That is what the policy says so
    of, convolutions, `Einsum`, and layers with a product of their own; products
    that a module calls by itself (`jnp.einsum` of parameters or activations)
    also stay, and are not listed.

  Raises:
    ValueError: at the end, for a rule of the policy that no layer matched.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from lowbit_jax.training import linen as low, recipes
    >>> model = linen.Sequential([linen.Conv(4, (3,)), linen.Dense(8)])
    >>> key, x = jax.random.key(0), jnp.ones((2, 8, 4))
    >>> with low.quantized(recipes.get('mxfp8')) as layers:
    ...   shapes = jax.eval_shape(model.init, key, x)
    >>> {path: r and r.name for path, r in layers.items()}
    {'layers_0': None, 'layers_1': 'mxfp8'}
  """
  make = dot_general_cls(recipe, fraction)
  layers: dict[str, Recipe | None] = {}

  def intercept(call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    path = '/'.join(map(str, module.path))
    if not _takes_recipe(module):
      y = call(*args, **kwargs)
      if module.has_variable('params', 'kernel'):
        layers.setdefault(path, None)
      return y
    layers[path] = recipe_at(recipe, module.path, fraction)
    object.__setattr__(module, 'dot_general_cls', make)
    try:
      return call(*args, **kwargs)
    finally:
      object.__setattr__(module, 'dot_general_cls', None)

  with flax_linen.intercept_methods(intercept):
    yield layers
  if isinstance(recipe, Policy) and layers:
    recipe.check_rules(layers)


def _takes_recipe(module: flax_linen.Module) -> bool:
  return (
    isinstance(module, flax_linen.Dense | flax_linen.DenseGeneral)
    and module.dot_general is None
    and module.dot_general_cls is None
  )


def recipe_at(
  recipe: Recipe | Policy | None, path: Iterable, fraction: float
) -> Recipe | None:
  """The recipe of the layer at `path`."""
  chosen = check_policy(recipe)
  if isinstance(chosen, Policy):
    return chosen.at('/'.join(map(str, path)), fraction)
  return None if chosen is None else chosen.at(fraction)


def check_keywords(kwargs: Mapping[str, Any]) -> None:
  """Raises TypeError for keywords that a training product does not take."""
  unknown = sorted(k for k, v in kwargs.items() if v is not None)
  if unknown:
    raise TypeError(f'a training product has no keywords {unknown}')
