"""Rules of calls and control flow: they hold jaxprs, of which a walk runs.

Each re-emits the public function of JAX around the walk of its body. Named
values and the state of the walk go through as pytrees.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _decoders, _tree, qarray
from lowbit_jax._low_rank import LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import PyTree
from lowbit_jax._walk import _moves, _named, _versions
from lowbit_jax._walk._moves import NotAView
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._walker import NONE, State, Walk, folded, rule


@rule('jit', 'pjit', 'closed_call', 'core_call')
def _jit(walk: Walk, eqn: Any, operands: list) -> Any:
  params = eqn.params
  if params.get('name') in _decoders.DECODERS:
    return _decoder(walk, eqn, operands)
  jaxpr = params.get('jaxpr', params.get('call_jaxpr'))
  function = _shared(walk, eqn, jaxpr)
  operands = _placed(operands, params.get('in_shardings'))
  results, seen = function(operands, walk.for_body())
  walk.observe_all(seen)
  return _placed(results, params.get('out_shardings'))


def _shared(walk: Walk, eqn: Any, jaxpr: Any) -> Callable:
  """The jitted walk of a body, one for all calls where sites do not matter."""
  if not walk.use.is_anonymous:
    return _jitted(walk, eqn, jaxpr)
  params, bodies = eqn.params, walk.trace.bodies
  form = id(jaxpr), params.get('name'), params.get('donated_invars')
  if form not in bodies:
    bodies[form] = _jitted(walk, eqn, jaxpr)
  function = bodies[form]

  def call(values, state):
    return function([_without_site(x) for x in values], state)

  return call


def _without_site(x: Any) -> Any:
  return x.of(x.content, site='') if isinstance(x, Named) else x


def _jitted(walk: Walk, eqn: Any, jaxpr: Any) -> Callable:
  """The walk of the body under a jit of the same name and donation."""
  body, donated = walk.body(jaxpr, eqn), eqn.params.get('donated_invars', ())
  kept = [i for i, is_donated in enumerate(donated) if not is_donated]

  def run(kept_values, donated_values, state):
    rest = iter(kept_values), iter(donated_values)
    count = len(kept_values) + len(donated_values)
    values = [next(rest[i not in kept]) for i in range(count)]
    return body(values, state)

  if not any(donated):
    named = _renamed(lambda values, state: body(values, state), eqn)
    return jax.jit(named)
  function = jax.jit(_renamed(run, eqn), donate_argnums=1)

  def call(values, state):
    groups = [], []
    for i, x in enumerate(values):
      groups[i not in kept].append(x)
    return function(*groups, state)

  return call


def _renamed(f: Callable, eqn: Any) -> Callable:
  f.__name__ = f.__qualname__ = str(eqn.params.get('name', 'call'))
  return f


def _placed(values: Sequence[Any], shardings: Sequence[Any] | None) -> list:
  """Values with the shardings that a jit states."""
  if shardings is None:
    return list(values)
  out = []
  for x, sharding in zip(values, shardings, strict=True):
    if not _versions.is_unspecified(sharding):
      x = _constrained(x, sharding)
    out.append(x)
  return out


def _constrained(x: Any, sharding: Any) -> Any:
  if not _named.is_packed(x):
    place = lax.with_sharding_constraint
    content = place(_named.dense(x), sharding)
    return x.of(content) if isinstance(x, Named) else content
  move = _moves.placed(lax.with_sharding_constraint, sharding)
  try:
    return x.of(_moves.apply(move, _named.viewed(x)))
  except NotAView:
    return x  # the compiler places what it is made of


def _decoder(walk: Walk, eqn: Any, operands: list) -> Any:
  """A stored operand that the function decodes by itself, as one that it
  closes over is."""
  structure, dtype = _decoders.DECODERS[eqn.params['name']]
  leaves = [_named.dense(x) for x in operands]
  try:
    stored = _checked(structure.unflatten(leaves)).astype(dtype)
  except (TypeError, ValueError, AttributeError):
    return NONE  # what derivatives and vmap have made of it
  (out,) = eqn.outvars
  if stored.shape != out.aval.shape:
    return NONE
  return [Named(stored, walk.closure(leaves[0]))]


def _checked(stored: Any) -> Any:
  """A stored operand whose QArray is one."""
  weight = stored
  while isinstance(weight, Transformed | LowRank):
    weight = weight.weight
  if isinstance(weight, qarray.QArray):
    qarray.validate(weight)
  return stored


@rule('remat2', 'checkpoint', 'remat')
def _remat(walk: Walk, eqn: Any, operands: list) -> Any:
  params = eqn.params
  state = walk.for_body()
  if params[_versions.DIFFERENTIATED] and params['prevent_cse']:
    # What JAX does when it lowers a body that is recomputed.
    operands, state = lax.optimization_barrier((operands, state))
  function = jax.checkpoint(
    walk.body(params['jaxpr'], eqn),
    prevent_cse=params['prevent_cse'],
    policy=params['policy'],
  )
  results, seen = function(operands, state)
  walk.observe_all(seen)
  return results


@rule('scan')
def _scan(walk: Walk, eqn: Any, operands: list) -> Any:
  params = eqn.params
  length, body = params['length'], walk.body(params['jaxpr'], eqn)
  constants, count = _versions.scanned(eqn)
  fixed, carry = operands[:constants], operands[constants:][:count]
  xs = [_stacked(walk, eqn, x, length) for x in operands[constants + count :]]
  state = walk.for_body()

  # What is held for a weight that is scanned has an entry for each step.
  scanned = _named.sites(xs)
  held = _split_sites(state.held, scanned)
  steps = None if state.key is None else jnp.arange(length)

  def step(carry, x):
    values, held_here, i = x
    inside = State(folded(state.key, i), {**held[1], **held_here})
    results, seen = body([*fixed, *carry, *values], inside)
    return results[:count], results[count:], seen

  def trial(carry):
    first = jax.tree.map(_first, (xs, held[0], steps))
    return step(carry, first)

  carry, restore = _carried(walk, eqn, lambda c: trial(c)[0], carry)
  total = _zeros(walk, lambda: _split_sites(trial(carry)[2], scanned)[1])

  def run(state, x):
    carry, total = state
    carry, ys, seen = step(carry, x)
    each, merged = _split_sites(seen, scanned)
    return (restore(carry), _merged(walk, total, merged)), (ys, each)

  (last, total), (ys, each) = lax.scan(
    run,
    (carry, total),
    (xs, held[0], steps),
    length=length,
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  walk.observe_all({**total, **each})
  return [*last, *ys]


def _first(stack: jax.Array) -> jax.Array:
  """A member of a stack, or what one would be."""
  return stack[0] if len(stack) else jnp.zeros(stack.shape[1:], stack.dtype)


def _stacked(walk: Walk, eqn: Any, x: Any, length: int) -> Any:
  """What is scanned over: each leaf has an entry for each step."""
  if not _named.is_packed(x):
    return x
  try:
    return x.of(_moves.stacked(_named.viewed(x), length))
  except NotAView as reason:
    return walk.dense(eqn, x, f'scan: {reason}')


def _split_sites(
  trees: dict[str, PyTree], sites: set[str]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Trees of these sites, and the others."""
  inside = {k: v for k, v in trees.items() if k.split('#')[0] in sites}
  return inside, {k: v for k, v in trees.items() if k not in inside}


def _zeros(walk: Walk, observations: Callable) -> dict[str, PyTree]:
  """Observations of nothing, of the shapes of others."""
  if not walk.use.observes:
    return {}
  shapes = jax.eval_shape(observations)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _merged(walk: Walk, total: dict, seen: dict) -> dict:
  return {site: walk.use.merge(total[site], seen[site]) for site in total}


def _carried(
  walk: Walk, eqn: Any, step: Callable, carry: list
) -> tuple[list, Callable]:
  """What a loop carries, decoded where a step does not give it back stored as
  it was, and a function that brings the results of a step into this form."""

  def form(x):
    if not _named.is_packed(x):
      return None
    leaves, structure = jax.tree.flatten(x.content)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

  why = 'a loop that carries it changes it'
  notes = dict(walk.trace.rows)
  carry = [x if _named.is_packed(x) else _named.dense(x) for x in carry]
  while any(map(_named.is_packed, carry)):
    after = jax.eval_shape(step, carry)
    changed = [form(a) != form(b) for a, b in zip(carry, after, strict=True)]
    lost = [
      c and _named.is_packed(x) for c, x in zip(changed, carry, strict=True)
    ]
    if not any(lost):
      break
    walk.trace.rows = dict(notes)  # without those of a step that is not run
    carry = [
      walk.dense(eqn, x, why) if c else x
      for c, x in zip(lost, carry, strict=True)
    ]

  def restore(results):
    return [
      x.of(y.content) if _named.is_packed(x) else walk.dense(eqn, y, why)
      for x, y in zip(carry, results, strict=True)
    ]

  return carry, restore


@rule('while')
def _while(walk: Walk, eqn: Any, operands: list) -> Any:
  params = eqn.params
  a = params['cond_nconsts']
  b = a + params['body_nconsts']
  test_fixed, fixed, carry = operands[:a], operands[a:b], operands[b:]
  test, body = (
    walk.body(params[name], eqn) for name in ('cond_jaxpr', 'body_jaxpr')
  )
  state = walk.for_body()

  def step(carry, i):
    inside = State(folded(state.key, i), state.held)
    return body([*fixed, *carry], inside)

  zero = jnp.int32(0)
  carry, restore = _carried(walk, eqn, lambda c: step(c, zero)[0], carry)
  total = _zeros(walk, lambda: step(carry, zero)[1])
  count = None if state.key is None else zero

  def condition(loop):
    carry, count, _ = loop
    inside = State(folded(state.key, count), state.held)
    results, _ = test([*test_fixed, *carry], inside)
    return _named.dense(results[0])

  def run(loop):
    carry, count, total = loop
    results, seen = step(carry, count)
    count = None if count is None else count + 1
    return restore(results), count, _merged(walk, total, seen)

  loop = carry, count, total
  last, _, total = lax.while_loop(condition, run, loop)
  walk.observe_all(total)
  return last


@rule('cond')
def _cond(walk: Walk, eqn: Any, operands: list) -> Any:
  params = eqn.params
  if params.get('branches_platforms') is not None:
    return NONE  # one program for each platform: JAX has to choose
  index, *values = operands
  state = walk.for_body()
  bodies = [walk.body(jaxpr, eqn) for jaxpr in params['branches']]

  def dense_results(body):
    def run(values, state):
      results, seen = body(values, state)
      why = 'it is a result of cond'
      return [walk.dense(eqn, x, why) for x in results], seen

    return run

  branches = [dense_results(body) for body in bodies]
  if walk.use.observes:
    branches = _with_all_sites(branches, values, state)
  results, seen = lax.switch(_named.dense(index), branches, values, state)
  walk.observe_all(seen)
  return results


def _with_all_sites(branches: list, values: list, state: State) -> list:
  """Branches that have the same observations: those of others are zeros."""
  every: dict[str, Any] = {}
  for branch in branches:
    every.update(jax.eval_shape(branch, values, state)[1])

  def complete(branch):
    def run(values, state):
      results, seen = branch(values, state)
      zeros = {
        site: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        for site, shapes in every.items()
      }
      return results, {**zeros, **seen}

    return run

  return [complete(branch) for branch in branches]


@rule('custom_jvp_call', 'custom_vjp_call')
def _custom(walk: Walk, eqn: Any, operands: list) -> Any:
  """The value by the walk, the derivative by the function's own rule."""
  body = walk.body(eqn.params['call_jaxpr'], eqn)
  if walk.use.names_arrays:
    holds = walk.holds(eqn)
    return walk.use.custom(walk, eqn, operands, body) if holds else NONE

  def own(*values):
    return _versions.bind(eqn, [_named.dense(x) for x in values])

  def run(*values):
    results, _ = body(values, State())
    why = 'a function with its own derivative returns it'
    return [walk.dense(eqn, x, why) for x in results]

  if eqn.primitive.name == 'custom_jvp_call':
    function = jax.custom_jvp(run)
    function.defjvp(lambda primals, tangents: jax.jvp(own, primals, tangents))
  else:
    function = jax.custom_vjp(run)
    function.defvjp(
      lambda *values: jax.vjp(own, *values), lambda pull, ct: pull(ct)
    )
  return function(*operands)


@rule('shard_map')
def _shard_map(walk: Walk, eqn: Any, operands: list) -> Any:
  params, body = eqn.params, walk.body(eqn.params['jaxpr'], eqn)
  mesh = params['mesh']
  values, specs = [], []
  for x, spec in zip(operands, params['in_specs'], strict=True):
    if _named.is_packed(x):
      try:
        x, spec = _sharded(x, mesh, spec)
      except ValueError as error:
        x = walk.dense(eqn, x, f'shard_map: {error}')
    elif isinstance(x, Named):
      spec = x.of(spec)
    values.append(x)
    specs.append(spec)
  state = walk.for_body()
  manual = params['newly_manual_axes']
  axes = tuple(axis for axis in mesh.axis_names if axis in manual)

  def run(values, state):
    results, seen = body(values, state)
    arrays = [walk.dense(eqn, x, 'shard_map returns it') for x in results]
    return arrays, jax.tree.map(device, seen)

  # What devices observe is joined, or has an axis of devices in front.
  if walk.use.joins_devices:
    device, everywhere = functools.partial(_largest, axes), PartitionSpec()
  else:
    device, everywhere = (lambda leaf: leaf[None]), PartitionSpec(axes)
  results, seen = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=(list(params['out_specs']), everywhere),
    axis_names=set(manual),
    check_vma=params['check_vma'],
  )(values, state)
  walk.observe_all(seen)
  return results


def _largest(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
  """The maximum over devices, the same on all of them."""
  varying = getattr(jax.typeof(x), 'vma', frozenset(axes))
  for axis in axes:
    if axis in varying:
      x = lax.pmax(x, axis)
  return x


def _sharded(x: Named, mesh: Any, spec: PartitionSpec) -> tuple[Named, Named]:
  """A value, and the spec of each of its leaves."""
  content = _named.viewed(x)
  placed = _tree.shardings(content, jax.sharding.NamedSharding(mesh, spec))
  return x.of(content), x.of(jax.tree.map(lambda s: s.spec, placed))
