"""`with_policy`: low-bit products in any function."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import _held_scales
from lowbit_jax._held_scales import DotScales
from lowbit_jax._typing import Key
from lowbit_jax._walk import _arguments, _named, _trace, _treatments, _views
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._products import Call, Product, Unsupported
from lowbit_jax._walk._report import Report
from lowbit_jax._walk._walker import NONE, State, Use, Walk
from lowbit_jax.ops import specs
from lowbit_jax.recipe import GemmSpec, Policy, QuantSpec, Recipe

Treatment = Recipe | GemmSpec | QuantSpec | None
PolicyLike = Recipe | Policy | GemmSpec | QuantSpec | Callable[[Product], Any]


class WithPolicy:
  """What `with_policy` returns: the function, its report, and its first held
  scales."""

  def __init__(
    self,
    fn: Callable,
    policy: PolicyLike,
    key: Key | None,
    scales: Mapping[str, DotScales] | None,
    argnums: Sequence[int],
    fraction: float,
  ) -> None:
    functools.update_wrapper(self, fn)
    self.fn, self.policy, self.argnums = fn, policy, argnums
    self.key, self.scales, self.fraction = key, scales, fraction

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    use = Applying(self.policy, self.fraction, self.scales is not None)
    out, seen, _ = self._run(
      use, State(self.key, dict(self.scales or {})), args, kwargs
    )
    use.check_scales(self.scales)
    if self.scales is None:
      return out
    return out, _recorded(self.scales, seen)

  def init(self, *args: Any, **kwargs: Any) -> dict[str, DotScales]:
    """Held scales before the first step, by site.

    Args:
      *args: those of the function; `jax.ShapeDtypeStruct` leaves will do.
      **kwargs: the same.

    Returns:
      A dict of `training.scaling.DotScales`, with an entry for each layer on a
      leading axis where the weights of a site are scanned.
    """
    use = Applying(self.policy, self.fraction, observes=True)
    use.is_first = True

    def run(*args, **kwargs):
      return self._run(use, State(self._any_key()), args, kwargs)

    seen, _ = _trace.shapes(run, args, kwargs)
    return {site: _first(use.recipes[site], seen[site]) for site in seen}

  def report(self, *args: Any, **kwargs: Any) -> Report:
    """Every product and look-up of a weight, and what is done to it, without
    running the function.

    Args:
      *args: those of the function; `jax.ShapeDtypeStruct` leaves will do.
      **kwargs: the same.

    Returns:
      A `Report`, which prints as a table.
    """
    use = Applying(self.policy, self.fraction, observes=True)
    use.is_first = True

    def run(*args, **kwargs):
      return self._run(use, State(self._any_key()), args, kwargs)

    return _trace.shapes(run, args, kwargs)[1]

  def _any_key(self) -> Key:
    """A key for programs that are not run."""
    return jax.random.key(0) if self.key is None else self.key

  def _run(
    self, use: 'Applying', state: State, args: tuple, kwargs: dict
  ) -> tuple[Any, dict, Any]:
    traced = _trace.trace(
      self.fn, args, kwargs, self.argnums, names_arrays=True
    )
    done = _trace.evaluate(traced, use, state)
    use.check_matches()
    return done


def _first(recipe: Recipe, seen: Any) -> DotScales:
  """States before the first step, with the leading axes of observations."""

  def stacked(state, amax):
    if state is None:
      return None
    return jax.tree.map(
      lambda leaf: jnp.zeros((*amax.shape, *leaf.shape), leaf.dtype), state
    )

  states = _held_scales.init_dot(recipe)
  return DotScales(*map(stacked, states, seen))


def _recorded(scales: Mapping[str, DotScales], seen: Mapping[str, Any]) -> dict:
  """States that recorded the magnitudes of a step."""

  def record(state, amax):
    if state is None:
      return None
    seen = jnp.maximum(state.seen, amax)
    return dataclasses.replace(state, seen=seen)

  after = {
    site: DotScales(*map(record, scales[site], amax))
    for site, amax in seen.items()
  }
  return {**scales, **after}


class Applying(Use):
  """Does to each product what a policy says."""

  joins_devices = True
  is_first = False

  def __init__(
    self, policy: PolicyLike, fraction: float, observes: bool
  ) -> None:
    self.policy, self.fraction, self.observes = policy, fraction, observes
    self.recipes: dict[str, Recipe] = {}
    self.sites: dict[str, bool] = {}

  def product(self, walk: Walk, call: Call) -> jax.Array:
    product = call.product
    treatment = self.treatment(call)
    self.sites[product.site] = (
      self.sites.get(product.site, False) or treatment is not None
    )
    self._note(walk, call.eqn, product, treatment)
    if treatment is None:
      return self._untouched(call)
    key = self._key(walk, product.site, treatment)
    try:
      return self._treated(walk, call, treatment, key)
    except (TypeError, ValueError) as error:
      error.add_note(f'This is the site {product.site!r}.')
      raise

  def _treated(
    self, walk: Walk, call: Call, treatment: Any, key: Key | None
  ) -> jax.Array:
    if isinstance(treatment, Recipe):
      return self._train(walk, call, treatment, key)
    if isinstance(treatment, GemmSpec):
      return _treatments.quantized(call, treatment, key)
    return _treatments.fake(call, treatment, key)

  def look_up(self, walk: Walk, eqn: Any, x: Named, indices: Any) -> Any:
    """A table takes part where its weight is fake-quantized."""
    table = _named.shape_of(x)
    product = Product(
      x.site or walk.name(eqn, 'gather'),
      'gather',
      table,
      _named.shape_of(indices),
      'lhs',
      dict(eqn.params),
    )
    spec = self.choose(product)
    if not isinstance(spec, QuantSpec):
      return NONE
    self.sites[product.site] = True
    self._note(walk, eqn, product, spec)
    key = self._key(walk, product.site, spec)
    return [_views.quantized_rows(eqn, x, indices, spec, key)]

  def custom(self, walk: Walk, eqn: Any, operands: list, body: Callable) -> Any:
    """It stays as it is, which is noted."""
    del operands, body
    name = eqn.primitive.name
    row = name, (), 'as it is: it has a derivative of its own'
    walk.note(eqn, walk.name(eqn, name), row)
    return NONE

  def treatment(self, call: Call) -> Treatment:
    """What is done to a product; None if nothing is."""
    product, chosen = call.product, self.choose(call.product)
    explicit = callable(self.policy)
    if not isinstance(chosen, Recipe):
      if isinstance(chosen, QuantSpec) and product.weight is None:
        raise ValueError(
          f'site {product.site!r} has no weight that {chosen} could be for:'
          ' a product of activations takes a GemmSpec or None'
        )
      return chosen
    if product.op == 'dot_general' and not call.is_packed:
      return chosen
    if explicit:
      kind = 'of a stored weight' if call.is_packed else product.op
      raise ValueError(
        f'site {product.site!r} ({kind}) has no training product: a recipe is'
        ' for dot_general of arrays; use a GemmSpec, a QuantSpec or None'
      )
    return None

  def choose(self, product: Product) -> Treatment:
    """What the policy says of a product."""
    policy = self.policy
    if isinstance(policy, Policy | Recipe | GemmSpec | QuantSpec):
      if product.weight is None:
        return None
      if isinstance(policy, Policy):
        return policy.at(product.site, self.fraction)
      is_recipe = isinstance(policy, Recipe)
      return policy.at(self.fraction) if is_recipe else policy
    chosen = policy(product)
    if chosen is not None and not isinstance(
      chosen, Recipe | GemmSpec | QuantSpec
    ):
      raise TypeError(
        f'the policy gives {chosen!r} for site {product.site!r}; it must be a'
        ' Recipe, a GemmSpec, a QuantSpec or None'
      )
    return chosen.at(self.fraction) if isinstance(chosen, Recipe) else chosen

  def check_matches(self) -> None:
    """Refuses a policy that selects no product."""
    if isinstance(self.policy, Policy):
      self.policy.check_rules(self.sites)
    if not any(self.sites.values()):
      found = ', '.join(self.sites) or 'none'
      raise ValueError(
        f'the policy selects no product of the function, whose sites are:'
        f' {found}; correct it, or name the arguments with weights by argnums='
      )

  def check_scales(self, scales: Mapping[str, DotScales] | None) -> None:
    """Refuses held scales of sites that do not hold any."""
    lost = sorted(set(scales or ()) - set(self.recipes))
    if lost:
      raise ValueError(
        f'scales has entries for {lost}, where no scale is held: make them by'
        ' init(*args) of this policy'
      )

  def _untouched(self, call: Call) -> jax.Array:
    if not call.is_packed:
      return call.plain()
    try:
      return call.packed()
    except Unsupported:
      return call.plain()

  def _key(self, walk: Walk, site: str, treatment: Any) -> Key | None:
    draws = treatment.needs_key
    if draws and walk.state.key is None:
      raise ValueError(
        f'site {site!r}: {_treatments.describe(treatment)}, which draws random'
        ' bits; pass with_policy(..., key=jax.random.key(seed)), folded with'
        ' the step'
      )
    return walk.next_key() if draws else None

  def _train(self, walk, call: Call, recipe: Recipe, key) -> jax.Array:
    site, first = call.product.site, _held_scales.init_dot(recipe)
    if first == DotScales(None, None):
      return _treatments.train(call, recipe, key, None)[0]
    self.recipes[site] = recipe
    scales = first if self.is_first else walk.state.held.get(site)
    if scales is None:
      raise ValueError(
        f'site {site!r}: recipe {recipe.name!r} holds tensor scales; pass'
        ' with_policy(..., scales=), at first with_policy(...).init(*args)'
      )
    y, seen = _treatments.train(call, recipe, key, scales)
    walk.observe(site, seen)
    return y

  def _note(
    self, walk: Walk, eqn: Any, product: Product, treatment: Treatment
  ) -> None:
    how = 'as it is' if treatment is None else _treatments.describe(treatment)
    shapes = product.lhs, product.rhs
    walk.note(eqn, product.site, (product.op, shapes, how))


def with_policy(
  fn: Callable,
  policy: PolicyLike,
  *,
  key: Key | None = None,
  scales: Mapping[str, DotScales] | None = None,
  argnums: int | Sequence[int] = 0,
  fraction: float = 0.0,
) -> WithPolicy:
  """`fn` with low-bit products in place of those that a policy selects.

  For training, wrap the loss, not its gradient: `jax.grad(with_policy(loss,
  recipe))`, so that the backward products are those of the recipe.

  Args:
    fn: as in `packed`.
    policy: what is done to products, by what it is or returns:

      `Recipe`: trained by it, as `ops.qdot` does; for `dot_general` of arrays.
      `GemmSpec`: its operands are quantized while the program runs, and
        multiplied packed by `ops`: `lhs` is for activations, `rhs` for weights;
        for inference, such as int8 products. Weights that are stored stay as
        they are. In convolutions both are fake-quantized.
      `QuantSpec`: its weight is fake-quantized: quantization-aware training of
        any product and look-up.
      None: it stays as it is; stored weights run packed.

      One of the first three, or a `Policy` of recipes by site, holds for all
      products with a weight that it can be for. A function of a `Product`
      returns one of the four for any product.
    key: PRNG key, needed if random bits are drawn. Fold it with the step. Each
      site and each layer of a scan gets its own; the devices of a shard_map
      share one.
    scales: held tensor scales by site, needed if a recipe has some: at first
      `with_policy(...).init(*args)`, later what the function returned, moved on
      by `training.scaling.advance`.
    argnums: positions of the arguments that hold weights; their paths are the
      sites, as in `record`.
    fraction: finished share of the training, for recipes that switch.

  Returns:
    A function of the arguments of `fn`. With `scales` it returns (result,
    scales). Its method `report(*args)` lists what is done to each product, and
    `init(*args)` makes held scales. Functions with a derivative of their own
    keep it, and their products stay as they are.

  Raises:
    ValueError: for a policy that selects no product, and rules of a `Policy`
      that match none; for a missing key or scale, with its site; if two weights
      have the same path.
    TypeError: for a policy of another type.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> from lowbit_jax.training import recipes
    >>> def loss(params, x):
    ...   return jnp.sum((x @ params['w']) ** 2)
    >>> low = lowbit.with_policy(loss, recipes.get('mxfp8'))
    >>> grads = jax.grad(low)({'w': jnp.ones((32, 8))}, jnp.ones((4, 32)))
    >>> grads['w'].shape
    (32, 8)
  """
  _arguments.check_function(fn)
  known = isinstance(policy, Policy | Recipe | GemmSpec | QuantSpec)
  if not known and (not callable(policy) or isinstance(policy, type)):
    raise TypeError(
      f'policy={policy!r} must be a Recipe, Policy, GemmSpec, QuantSpec or a'
      ' function of a Product; a recipe by name is'
      ' lowbit_jax.training.recipes.get(name)'
    )
  if isinstance(policy, GemmSpec) and policy.hadamard:
    raise ValueError(
      f'policy={policy}: hadamard rotates both operands before they are'
      ' quantized; store the rotated weight as ops.Transformed instead'
    )
  if isinstance(policy, QuantSpec):
    specs.check_stateless('policy', policy)
  if key is not None and not _arguments.is_key(key):
    raise TypeError(f'{key=} must be a PRNG key, such as jax.random.key(0)')
  if scales is not None and not isinstance(scales, Mapping):
    raise TypeError(
      f'scales must be a dict by site, got {type(scales).__name__}'
    )
  positions = _arguments.positions(argnums)
  return WithPolicy(fn, policy, key, scales, positions, fraction)
