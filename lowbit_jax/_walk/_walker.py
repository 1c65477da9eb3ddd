"""The walk: evaluates a jaxpr, equation by equation, on values with sites.

An equation that meets no such value, and holds nothing that matters to the use
of the walk, is bound as it is. Views give a value with the same site; products
go to the use; control flow runs a walk of its body; any other equation gets the
dense value.

Three kinds of state travel with the values, and through control flow: a key
(for products that draw random bits), what is held for each site (read), and
what products observe at each site (written).
"""

import abc
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from lowbit_jax import _decoders
from lowbit_jax._typing import Key, PyTree
from lowbit_jax._walk import _named, _products, _versions
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._products import Call
from lowbit_jax._walk._report import Row

# What a rule returns if it has no form for its operands.
NONE = NotImplemented
RULES: dict[str, Callable] = {}


class Use(abc.ABC):
  """What is done with the products of a function.

  Attributes:
    names_arrays: whether arrays are weights too, not stored operands alone;
      then all products matter.
    observes: whether products observe something.
    joins_devices: whether observations of the devices of a shard_map are joined
      by their maximum; otherwise there is one for each device.
    is_anonymous: whether sites do not matter, so that a body which is called
      more than once is walked once.
  """

  names_arrays = True
  observes = False
  joins_devices = False
  is_anonymous = False

  @abc.abstractmethod
  def product(self, walk: 'Walk', call: Call) -> jax.Array:
    """The result of a product."""

  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    """Joins two observations of one site, magnitudes unless said otherwise;
    zeros are those of nothing."""
    return jax.tree.map(jnp.maximum, a, b)

  def look_up(self, walk: 'Walk', eqn: Any, x: Named, indices: Any) -> Any:
    """Rows of a table that is an array: the results, or NONE."""
    return NONE

  def custom(
    self, walk: 'Walk', eqn: Any, operands: list, body: Callable
  ) -> Any:
    """A function that holds products and has a derivative of its own: its
    results, or NONE for it as it is."""
    return NONE

  def decodes(self, walk: 'Walk', eqn: Any, x: Named, reason: str) -> None:
    """Called where a whole weight is decoded, and why."""
    del walk, eqn, x, reason

  def looks_up(self, walk: 'Walk', eqn: Any, x: Named) -> None:
    """Called where rows of a stored table are decoded."""
    del walk, eqn, x


@dataclasses.dataclass
class State:
  """What travels with the values.

  Attributes:
    key: a PRNG key or None.
    held: trees by site, read by products.
  """

  key: Key | None = None
  held: dict[str, PyTree] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(State, ['key', 'held'], [])


@dataclasses.dataclass
class Trace:
  """What is noted while a function is traced; shared by all parts of a walk.

  An equation is known by the way to it, the calls around it included: JAX may
  trace a body twice, and the second time finds what was noted the first.

  Attributes:
    names: the sites of products without a weight, by the way to them.
    counts: how many have a site with the same beginning.
    rows: what became of a weight, by the way to the equation.
    choices: see `Call`.
    closures: numbers of stored weights that the function closes over.
    bodies: jitted walks that several calls share.
    holding: whether a jaxpr holds something that counts.
    alive: what is known by its id, so that no other object gets this id.
  """

  names: dict[tuple, str] = dataclasses.field(default_factory=dict)
  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  rows: dict[tuple, Row] = dataclasses.field(default_factory=dict)
  choices: dict[Any, Any] = dataclasses.field(default_factory=dict)
  closures: dict[int, int] = dataclasses.field(default_factory=dict)
  bodies: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
  holding: dict[int, tuple[Any, bool]] = dataclasses.field(default_factory=dict)
  alive: list[Any] = dataclasses.field(default_factory=list)


class Walk:
  """The walk of one jaxpr."""

  def __init__(
    self,
    use: Use,
    trace: Trace,
    state: State,
    way: tuple[int, ...] = (),
    scope: str = '',
  ) -> None:
    self.use, self.trace, self.state = use, trace, state
    self.way, self.outer = way, scope
    self.scope = scope
    self.seen: dict[str, PyTree] = {}
    self.draws = 0

  def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr, arrays or Named."""
    inside = _versions.body(jaxpr)
    constants = map(self._constant, _versions.constants(jaxpr))
    variables = *inside.constvars, *inside.invars
    env = dict(zip(variables, (*constants, *values), strict=True))
    decoded: dict[Any, jax.Array] = {}  # each weight once

    def read(v):
      return v.val if isinstance(v, jax_core.Literal) else env[v]

    for eqn in inside.eqns:
      operands = [read(v) for v in eqn.invars]
      self.scope = '/'.join(filter(None, [self.outer, _versions.scope(eqn)]))
      with _versions.place(eqn):
        outputs = NONE
        rule = RULES.get(eqn.primitive.name)
        if rule is not None and self.concerns(eqn, operands):
          outputs = rule(self, eqn, operands)
        if outputs is NONE:
          outputs = self._as_it_is(eqn, operands, decoded)
      env.update(zip(eqn.outvars, outputs, strict=True))
    self.scope = self.outer
    return [read(v) for v in inside.outvars]

  def _constant(self, x: Any) -> Any:
    """What a function closes over may be a weight, without a path."""
    is_matrix = getattr(x, 'ndim', 0) >= 2
    if self.use.names_arrays and is_matrix:
      if jnp.issubdtype(x.dtype, jnp.floating):
        return Named(x, '')
    return x

  def concerns(self, eqn: Any, operands: Sequence[Any]) -> bool:
    """Whether an equation is more than its operands show to JAX."""
    return any(map(_named.is_named, operands)) or self.holds(eqn)

  def holds(self, eqn: Any) -> bool:
    """Whether an equation is, or holds, a product or a decoder that counts."""
    if eqn.primitive.name in _products.PRIMITIVES:
      return self.use.names_arrays
    if eqn.params.get('name') in _decoders.DECODERS:
      return True
    return any(map(self._any_holds, _versions.inner(eqn)))

  def _any_holds(self, jaxpr: Any) -> bool:
    known = self.trace.holding.get(id(jaxpr))
    if known is None:
      found = any(map(self.holds, _versions.body(jaxpr).eqns))
      known = jaxpr, found  # kept alive, so that its id stays its own
      self.trace.holding[id(jaxpr)] = known
    return known[1]

  def _as_it_is(self, eqn: Any, operands, decoded: dict) -> list[Any]:
    values = []
    for v, x in zip(eqn.invars, operands, strict=True):
      if _named.is_packed(x):
        self.tell(eqn, x, f'{eqn.primitive.name} has no packed form')
        if v not in decoded:
          decoded[v] = _named.dense(x)
        x = decoded[v]
      values.append(_named.dense(x))
    return _versions.bind(eqn, values)

  def dense(self, eqn: Any, x: Any, reason: str) -> Any:
    """The array that a value stands for; that a weight is decoded is noted.

    Args:
      eqn: what needs the array; None for the end of the function.
      x: any value.
      reason: why it has to be decoded.
    """
    self.tell(eqn, x, reason)
    return _named.dense(x)

  def tell(self, eqn: Any, x: Any, reason: str) -> None:
    """Tells the use that a weight is decoded, if x is a whole one."""
    if _named.is_packed(x) and not x.is_part:
      self.use.decodes(self, eqn, x, reason)

  # Products and their sites.

  def name(self, eqn: Any, op: str) -> str:
    """The site of a product without a weight: its scopes, and a number where
    there are several."""
    key = (*self.way, id(eqn))
    if key not in self.trace.names:
      base = '/'.join(filter(None, [self.scope, op]))
      count = self.trace.counts[base]
      self.trace.counts[base] += 1
      self.trace.names[key] = f'{base}_{count}' if count else base
    return self.trace.names[key]

  def observe(self, site: str, observation: PyTree) -> None:
    """Adds what a product observed at a site."""
    number, name = 1, site
    while name in self.seen and not _alike(self.seen[name], observation):
      number += 1
      name = f'{site}#{number}'
    if name in self.seen:
      observation = self.use.merge(self.seen[name], observation)
    self.seen[name] = observation

  def next_key(self) -> Key | None:
    """A key for one product or body; None without a key."""
    self.draws += 1
    return folded(self.state.key, self.draws)

  def note(self, eqn: Any, site: str, row: tuple) -> None:
    """Notes what became of an equation at a site; None for the end."""
    self.trace.alive.append(eqn)
    key = (*self.way, id(eqn), site)
    self.trace.rows.setdefault(key, Row(site, self.scope, *row))

  def closure(self, leaf: Any) -> str:
    """The site of a stored weight that the function closes over."""
    if self.use.is_anonymous or self.use.names_arrays:
      return ''
    numbers = self.trace.closures
    self.trace.alive.append(leaf)
    return f'closure {numbers.setdefault(id(leaf), len(numbers))}'

  # Bodies.

  def body(self, jaxpr: Any, eqn: Any) -> Callable:
    """A function (values, state) -> (results, observations) of an inner jaxpr.

    Values and results are arrays or Named, and pass through JAX as pytrees.
    """
    way, scope = (*self.way, id(eqn), id(jaxpr)), self.scope
    self.trace.alive.append((eqn, jaxpr))

    def run(values, state):
      inside = Walk(self.use, self.trace, state, way, scope)
      return inside.run(jaxpr, values), inside.seen

    return run

  def for_body(self) -> State:
    """The state that a body starts from."""
    return State(self.next_key(), self.state.held)

  def observe_all(self, seen: dict[str, PyTree]) -> None:
    for site, observation in seen.items():
      self.observe(site, observation)


def folded(key: Key | None, number: Any) -> Key | None:
  """The key folded with a number, if there is one."""
  return None if key is None else jax.random.fold_in(key, number)


def rule(*names: str) -> Callable:
  """Registers a function (walk, eqn, operands) for primitives."""

  def register(f: Callable) -> Callable:
    for name in names:
      RULES[name] = f
    return f

  return register


def _alike(a: PyTree, b: PyTree) -> bool:
  def form(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]

  return form(a) == form(b)


@rule(*_products.PRIMITIVES)
def _product(walk: Walk, eqn: Any, operands: list) -> list[Any]:
  call = _products.call_of(
    eqn, operands, lambda op: walk.name(eqn, op), walk.trace.choices
  )
  return [walk.use.product(walk, call)]
