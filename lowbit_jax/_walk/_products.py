"""Products as a walk sees them, and how they run on stored operands.

Three primitives are products: `dot_general`, `ragged_dot_general` and
`conv_general_dilated`. Each has a form on arrays, the equation as it is, and
where `ops` has one, a form that takes stored operands packed.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import ops
from lowbit_jax._walk import _named, _versions
from lowbit_jax._walk._named import Named

PRIMITIVES = ('dot_general', 'ragged_dot_general', 'conv_general_dilated')


class Product(NamedTuple):
  """One product of a function, as policies and observers see it.

  Attributes:
    site: the path of its weight, such as 'block_0/up/kernel', else where it
      stands in the function: its scopes, its operation and a number.
    op: 'dot_general', 'ragged_dot', 'conv_general_dilated', or
      'ragged_dot_general' for forms of it that are not `lax.ragged_dot`.
    lhs: shape and dtype of the left operand.
    rhs: shape and dtype of the right operand.
    weight: which operand is the weight, 'lhs' or 'rhs'; None if neither is.
    params: of the operation, as in `jax.lax`: `dimension_numbers` and so on. A
      'ragged_dot' is always one of (m, k), (g, k, n) and group sizes (g,).
  """

  site: str
  op: str
  lhs: jax.ShapeDtypeStruct
  rhs: jax.ShapeDtypeStruct
  weight: str | None
  params: Mapping[str, Any]


class Unsupported(Exception):
  """Why a product has no packed form."""


@dataclasses.dataclass(frozen=True)
class Call:
  """A product in the course of a walk.

  Attributes:
    product: what policies and observers see.
    operands: values, Named where they have a site; those of `product.op`.
    eqn: the equation.
    choices: what computes products of the same form; filled on the way.
  """

  product: Product
  operands: tuple[Any, ...]
  eqn: Any
  choices: dict[Hashable, Any]

  @property
  def contents(self) -> tuple[Any, ...]:
    """Operands without their sites."""
    return tuple(
      x.content if isinstance(x, Named) else x for x in self.operands
    )

  @property
  def is_packed(self) -> bool:
    return any(map(_named.is_packed, self.operands))

  def of(self, *operands: Any) -> 'Call':
    """The same product of other operands."""
    return dataclasses.replace(self, operands=operands)

  def plain(self) -> jax.Array:
    """The equation of dense operands."""
    (out,) = _versions.bind(self.eqn, [_named.dense(x) for x in self.operands])
    return out

  def packed(self) -> jax.Array:
    """The product of stored operands as they are.

    Raises:
      Unsupported: if it would decode a whole weight, or has no such form.
    """
    self.choice()
    return self.by_ops(*self.contents)

  def choice(self) -> ops.Choice:
    """What computes it packed.

    Raises:
      Unsupported: as `packed`.
    """
    form = self._form()
    if form not in self.choices:
      self.choices[form] = self._choose()
    choice = self.choices[form]
    if isinstance(choice, Unsupported):
      raise choice
    return choice

  def _form(self) -> Hashable:
    """All that the choice depends on."""
    leaves, structure = jax.tree.flatten(self.contents)
    types = tuple(map(jax.typeof, leaves))
    return self.product.op, repr(self.product.params), structure, types

  def _choose(self) -> 'ops.Choice | Unsupported':
    try:
      operation, arguments, options = self._arguments(*self.contents)
      choice = ops.select_implementation(operation, *arguments, **options)
    except Unsupported as refusal:
      return refusal
    except (NotImplementedError, TypeError, ValueError) as refusal:
      return Unsupported(str(refusal))
    decodes = 'dequantizes' in choice.note
    return Unsupported(choice.note) if decodes else choice

  def by_ops(self, *contents: Any) -> jax.Array:
    """The result of `ops` on arrays and stored operands, in the place of that
    of the equation."""
    operation, arguments, options = self._arguments(*contents)
    run = getattr(ops, operation)
    out = self.eqn.outvars[0].aval
    y = run(*arguments, preferred_element_type=out.dtype, **options)
    if self._is_exchanged(*contents):
      y = jnp.moveaxis(y, *self._moved_axes(*contents))
    return resharded(y, out)

  def _is_exchanged(self, *contents: Any) -> bool:
    """Whether the left operand alone is a stored weight: `ops` would take it
    for activations where the right one is larger."""
    left, right, *_ = map(_named.is_stored, contents)
    is_dot = self.product.op == 'dot_general'
    return is_dot and left and not right and self.product.weight == 'lhs'

  def _moved_axes(self, *contents: Any) -> tuple[range, range]:
    """From where to where the axes of the right operand go in the result of the
    exchanged product, in which they stand before those of the left one."""
    (_, contracted), (_, batch) = self.product.params['dimension_numbers']
    count = len(contents[1].shape) - len(contracted) - len(batch)
    return range(len(batch), len(batch) + count), range(-count, 0)

  def _arguments(self, *contents: Any) -> tuple[str, tuple, dict]:
    params = self.product.params
    if self.product.op not in ('dot_general', 'ragged_dot'):
      raise Unsupported(f'{self.product.op} has no packed form')
    for x in contents[:2]:
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unsupported(f'an operand is {x.dtype}')
      if x.dtype == jnp.float64 and not _named.is_stored(x):
        raise Unsupported('an operand is float64')
    options = {'precision': params['precision']}
    if self.product.op == 'ragged_dot':
      return 'ragged_dot', contents, options
    (contracted, batch), (x, w) = params['dimension_numbers'], contents
    if self._is_exchanged(*contents):
      x, w, contracted, batch = w, x, contracted[::-1], batch[::-1]
    return 'dot_general', (x, w, (contracted, batch)), options


def resharded(y: jax.Array, out: Any) -> jax.Array:
  """`y` with the sharding that the program states on explicit mesh axes."""
  mesh = out.sharding.mesh
  if jax.sharding.AxisType.Explicit not in mesh.axis_types:
    return y
  return jax.sharding.reshard(y, out.sharding)


def call_of(
  eqn: Any, values: list, site: Callable[[str], str], choices: dict
) -> Call:
  """The product that an equation is.

  Args:
    eqn: an equation of a primitive in PRIMITIVES.
    values: its operands.
    site: gives a site to a product of an operation that has no weight.
    choices: as in `Call`.
  """
  op = eqn.primitive.name
  if op == 'ragged_dot_general' and _is_ragged_dot(eqn.params):
    op = 'ragged_dot'
  weights = [
    side
    for side, x in zip(('lhs', 'rhs'), values, strict=False)
    if isinstance(x, Named)
  ]
  # One with a path comes before one that the function closes over.
  weights.sort(key=lambda side: bool(values[side == 'rhs'].site))
  weight = weights[-1] if weights else None
  own = values[weight == 'rhs'].site if weight else ''
  lhs, rhs = map(_named.shape_of, values[:2])
  product = Product(own or site(op), op, lhs, rhs, weight, dict(eqn.params))
  return Call(product, tuple(values), eqn, choices)


def _is_ragged_dot(params: Mapping[str, Any]) -> bool:
  """Whether it is a product (m, k), (g, k, n), (g,)."""
  numbers = params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  return (
    tuple(map(tuple, contracted)) == ((1,), (1,))
    and not any(map(tuple, batch))
    and tuple(numbers.lhs_ragged_dimensions) == (0,)
    and tuple(numbers.rhs_group_dimensions) == (0,)
    and params.get('group_offset') is None
  )
