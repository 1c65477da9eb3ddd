"""ragged_dot on Array | QArray: rows in groups, each with a matrix of its own.

Windows of at most ROWS rows of one group follow each other, and each is a
product with the matrix of its group. So a matrix is read once for each window,
those of groups without rows never, and of one matrix no more is decoded at a
time than in `dot`. The derivative stands above the choice of implementation, as
that of `dot`; it dequantizes the matrix of one group at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit
from lowbit_jax._low_rank import LowRank
from lowbit_jax._member import Member
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import (
  ArrayLike,
  DTypeLike,
  Implementation,
  Precision,
  PyTree,
)
from lowbit_jax.numerics._codec import promoted
from lowbit_jax.ops import _dispatch, _dot_xla, _low_rank, _operand
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Operand, Shaped
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith import loops

# Rows of a window.
ROWS = 64
_DIMS = ((1,), (0,)), ((), ())

# (lhs, rhs, group_sizes, precision).
PlanArguments = tuple[Any, Any, Any, Precision]


def ragged_dot(
  lhs: Operand,
  rhs: Operand,
  group_sizes: ArrayLike,
  *,
  precision: Precision = None,
  preferred_element_type: DTypeLike | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """`lax.ragged_dot` on arrays and QArrays: rows sorted by group times the
  matrix of their group.

  For mixtures of experts: rows are tokens, groups are experts. A quantized
  `rhs` stays packed, and matrices of groups without rows are not read.

  Args:
    lhs: `(m, k)` array or QArray; the first `group_sizes[0]` rows are of group
      0, the next `group_sizes[1]` of group 1, and so on.
    rhs: `(g, k, n)` array or QArray, of one format for all groups. Blocks along
      k are what is fast; of other layouts one matrix at a time is dequantized.
      Either operand may also be an `ops.Transformed`, `rhs` with one transform
      or a stack of them, or an `ops.LowRank`.
    group_sizes: `(g,)` integers of 0 or more.
    precision: as in `lax.dot_general`.
    preferred_element_type: dtype of the result; None for the promoted dtype.
    implementation: 'cpu', 'xla', or a list of names, as in `dot`.

  Returns:
    `(m, n)`, accumulated in float32. Rows after the last group are zero.

  Raises:
    ValueError: for shapes that do not match.
    TypeError: for group sizes that are no integers, or a `Prepacked` operand.

  Derivative: that of the product of the dequantized operands, with respect to
  arrays and to the float scales of QArrays; forward and reverse mode.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = jnp.ones((4, 64, 8))
    >>> q = lowbit.quantize(w, lowbit.formats.mxfp4, axis=-2)
    >>> y = lowbit.ragged_dot(jnp.ones((6, 64)), q, jnp.array([3, 0, 2, 0]))
    >>> y[:, 0].tolist()
    [64.0, 64.0, 64.0, 64.0, 64.0, 0.0]
  """
  left, right, sizes = _checked(lhs, rhs, group_sizes)
  dtype = preferred_element_type
  if dtype is None:
    dtype = jnp.promote_types(left.dtype, right.dtype)
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  if isinstance(left, LowRank) or isinstance(right, LowRank):
    return _with_term(left, right, sizes, precision, implementation, dtype)
  left, right, sizes, _ = operands(left, right, sizes)
  if not (_operand.is_stored(left) or _operand.is_stored(right)):
    _dispatch.select(
      'ragged_dot', TABLE, implementation, left, right, sizes, precision
    )
    return lax.ragged_dot(
      left, right, sizes, precision=precision, preferred_element_type=dtype
    )
  out = _compiled(left, right, sizes, precision, implementation)
  return out.astype(dtype)


def _with_term(
  lhs: Any, rhs: Any, sizes: jax.Array, precision, implementation, dtype
) -> jax.Array:
  """The product of operands of which one is a LowRank, or both are."""
  large = ragged_dot(
    *_without_terms(lhs, rhs),
    sizes,
    precision=precision,
    preferred_element_type=promoted(dtype, jnp.float32),
    implementation=implementation,
  )
  small = 0.0
  if isinstance(rhs, LowRank):
    small = _low_rank.small_by_group(lhs, rhs, sizes, precision)
  return (large + small).astype(dtype)


def _without_terms(lhs: Any, rhs: Any) -> tuple[Any, Any]:
  """As `_low_rank.plain`. A term of the rows is none of their product with
  several matrices: rows are dense."""
  if isinstance(lhs, LowRank):
    lhs = _operand.computed(_low_rank.decoded, lhs)
  if isinstance(rhs, LowRank):
    by_group = ((1,), (1,)), ((0,), (0,))
    lhs, rhs = _low_rank.large(lhs, rhs, 1, by_group)
  return lhs, rhs


def operands(
  lhs: Operand | jax.ShapeDtypeStruct,
  rhs: Operand | jax.ShapeDtypeStruct,
  group_sizes: ArrayLike | jax.ShapeDtypeStruct,
  *,
  precision: Precision = None,
  **_: Any,
) -> PlanArguments:
  """Arguments of the plan of a `ragged_dot`."""
  left, right, sizes = _checked(lhs, rhs, group_sizes)
  left, right = _without_terms(left, right)
  left, right = _untransformed(left, right, sizes)
  if isinstance(right, QArray) and (right.merged or -3 in right.axes):
    raise ValueError(
      f'blocks of rhs lie on axis {right.axis} or through several axes, not'
      ' within the columns of one matrix; quantize it with axis=-2'
    )
  return left, right, sizes, precision


def _checked(lhs, rhs, group_sizes) -> tuple[Any, Any, Any]:
  """The arguments of a `ragged_dot`, or an error that says what is wrong."""
  left, right = _operand.checked(lhs, 'lhs'), _operand.checked(rhs, 'rhs')
  left, right = (
    _operand.computed(Member.unpack, x) if isinstance(x, Member) else x
    for x in (left, right)
  )
  sizes = group_sizes
  if not isinstance(sizes, jax.ShapeDtypeStruct):
    sizes = jnp.asarray(sizes)
  matches = (
    left.ndim == 2 and right.ndim == 3 and left.shape[1] == right.shape[1]
  )
  if _operand.is_stored(right) and not isinstance(right, QArray):
    raise TypeError(
      f'rhs is a {type(right).__name__} matrix; ragged_dot takes a QArray of'
      ' shape (g, k, n)'
    )
  if not matches:
    raise ValueError(
      f'lhs.shape={left.shape} and rhs.shape={right.shape} must be (m, k) and'
      ' (g, k, n)'
    )
  if not jnp.issubdtype(sizes.dtype, jnp.integer):
    raise TypeError(f'group_sizes has dtype {sizes.dtype}, not an integer one')
  if sizes.shape != right.shape[:1]:
    raise ValueError(
      f'group_sizes.shape={sizes.shape} must be {right.shape[:1]}, one for each'
      f' matrix of rhs.shape={right.shape}'
    )
  return left, right, sizes


def _untransformed(lhs: Any, rhs: Any, sizes: Any) -> tuple[Any, Any]:
  """As `_operand.untransformed`, by a transform for each group too."""
  own = isinstance(rhs, Transformed) and rhs.stacked == 1 and rhs.axis == -2
  if own and not isinstance(lhs, Transformed) and not _operand.is_stored(lhs):
    return _operand.computed(_by_group, rhs, lhs, sizes), rhs.weight
  return _operand.untransformed(lhs, rhs, (((1,), (1,)), ((), ())))


def _by_group(t: Transformed, x: jax.Array, sizes: jax.Array) -> jax.Array:
  """The rows of x, each in the transform of its group."""

  def run(x, t, sizes):
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(len(x), dtype=ends.dtype)
    group = jnp.searchsorted(ends, rows, side='right')
    take = functools.partial(jnp.take, indices=group, axis=0, mode='clip')
    return t.with_transform(take).facing(x, 1, (0,))

  return _explicit.automatic(run, _explicit.as_first, x, t, sizes)


def plan_xla(
  lhs: Shaped, rhs: Shaped, group_sizes: Any, precision: Precision
) -> Plan:
  """Plans a ragged product with a float32 result."""
  del group_sizes
  if not isinstance(rhs, QArray):
    return Plan('rhs is not quantized: lax.ragged_dot', _dense_product)
  m, k = lhs.shape
  window = jax.ShapeDtypeStruct((_window_rows(m), k), jnp.float32)
  matrix = jax.eval_shape(lambda q: _member(q, 0), rhs)
  note, multiply, _ = _dot_xla.plan_dot_general(
    window, matrix, _DIMS, precision
  )

  def run(lhs, rhs, group_sizes):
    return _by_windows(_operand.dense(lhs), rhs, group_sizes, multiply)

  return Plan(f'one window of rows of a group after the other: {note}', run)


def plan_cpu(
  lhs: Shaped, rhs: Shaped, group_sizes: Any, precision: Precision
) -> Plan:
  """Plans a ragged product by the kernel of `dot` for CPUs, which reads the
  matrix of a group where it lies."""
  from lowbit_jax.ops import _dot_cpu

  del group_sizes
  if not isinstance(rhs, QArray):
    raise NotImplementedError('rhs is not quantized')
  m, k = lhs.shape
  window = jax.ShapeDtypeStruct((_window_rows(m), k), jnp.float32)
  matrix = jax.eval_shape(lambda q: Member(q, jnp.int32(0)), rhs)
  plan = _dot_cpu.plan(window, matrix, _DIMS, precision)

  def run(lhs, rhs, group_sizes):
    x = _operand.dense(lhs)
    return _by_windows(x, rhs, group_sizes, plan.run, Member)

  note = f'one window of rows of a group after the other: {plan.note}'
  return Plan(note, run, plan.is_portable)


TABLE = {'cpu': plan_cpu, 'xla': plan_xla}


def _dense_product(lhs, rhs, group_sizes):
  return lax.ragged_dot(
    _operand.dense(lhs),
    rhs,
    group_sizes,
    preferred_element_type=jnp.float32,
  )


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _compiled(lhs, rhs, group_sizes, precision, implementation):
  def contract(lhs, rhs, group_sizes):
    return _dispatch.run(
      'ragged_dot',
      TABLE,
      implementation,
      (lhs, rhs, group_sizes),
      precision,
    )

  def run(lhs, rhs, group_sizes):
    return _ragged(lhs, rhs, group_sizes, precision, contract)

  return _explicit.automatic(run, _free_parts, lhs, rhs, group_sizes)


def _free_parts(
  result, lhs: Operand, rhs: Operand, group_sizes
) -> PartitionSpec:
  """The spec of a product: rows and columns stay split."""
  del result, group_sizes
  return PartitionSpec(_operand.parts(lhs)[0], _operand.parts(rhs)[2])


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(3, 4))
def _ragged(lhs, rhs, group_sizes, precision, contract):
  del precision
  return contract(lhs, rhs, group_sizes)


def _ragged_jvp(precision, contract, primals, tangents):
  lhs, rhs, sizes = primals
  out = _ragged(lhs, rhs, sizes, precision, contract)

  def of_dense(a, b):
    return lax.dot_general(
      a, b, _DIMS, precision=precision, preferred_element_type=jnp.float32
    )

  if (tangent := _operand.moving(lhs, tangents[0])) is None:
    part = jnp.zeros_like(out)
  else:
    tangent = _operand.dense_tangent(lhs, tangent)
    part = _by_windows(
      tangent, rhs, sizes, lambda a, w: of_dense(a, _operand.dense(w))
    )
  if (moves := _operand.moving(rhs, tangents[1])) is not None:
    part = part + _by_windows(
      _operand.dense(lhs),
      (rhs, moves),
      sizes,
      lambda a, pair: of_dense(a, _operand.dense_tangent(*pair)),
    )
  return out, part


_ragged.defjvp(_ragged_jvp, symbolic_zeros=True)


def _by_windows(
  x: jax.Array,
  weights: PyTree,
  group_sizes: jax.Array,
  multiply: Callable,
  member: Callable | None = None,
) -> jax.Array:
  """The rows of each group times the matrix of the group.

  Args:
    x: (m, k).
    weights: tree with leaves (g, ...), or (1, ...) for what groups share.
    group_sizes: (g,).
    multiply: of (rows, k) and a member of `weights`, (rows, n) in float32.
    member: of `weights` and the number of a group; None takes a copy.
  """
  member = member or _member
  m, rows = x.shape[0], _window_rows(x.shape[0])
  x = x.astype(jnp.float32)
  window = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
  matrix = jax.eval_shape(lambda w: member(w, jnp.int32(0)), weights)
  n = jax.eval_shape(multiply, window, matrix).shape[1]
  out = jnp.zeros((m, n), jnp.float32)
  if 0 in (m, n, len(group_sizes)):
    return out
  sizes = group_sizes.astype(jnp.int32)
  ends = jnp.cumsum(sizes)
  windows = -(-sizes // rows)
  last = jnp.cumsum(windows)

  def add_window(out, i):
    group = jnp.searchsorted(last, i, side='right')
    count = i - (last - windows)[group]
    first = (ends - sizes)[group] + count * rows
    index = jnp.minimum(first, m - rows) + jnp.arange(rows, dtype=jnp.int32)
    is_ours = ((index >= first) & (index < ends[group]))[:, None]
    # Other rows are left out before, and after: the matrix may hold NaN.
    part = jnp.where(is_ours, x[index], 0)
    part = jnp.where(is_ours, multiply(part, member(weights, group)), 0)
    return out.at[index].add(part)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(out, i):
    return lax.cond(i < last[-1], add_window, lambda out, i: out, out, i), None

  out = loops.carry(out, x, weights, sizes)
  most = len(group_sizes) + m // rows
  return lax.scan(step, out, jnp.arange(most, dtype=jnp.int32))[0]


def _window_rows(m: int) -> int:
  return max(1, min(ROWS, m))


def _member(tree: PyTree, group: Any) -> PyTree:
  """The part of a group of each leaf; what all share has one for all."""
  return jax.tree.map(
    lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), tree
  )
