"""QArrays as the matrices that kernels for CPUs multiply with.

A matrix is (k, n) or (n, k), in blocks along k, with one level of scales. It
lies in a stack of such, and a product names its place there, so that those of a
model's layers are read where they lie.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax import qarray
from lowbit_jax._member import Member
from lowbit_jax._typing import DotDims
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.ops import _dot_xla
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.qarray import QArray

_INDEX = jnp.int32


def along_k(q: QArray) -> QArray:
  """The same numbers, with one level of scales, in blocks along one axis."""
  q = qarray.one_level(q)
  if not q.fmt.is_tile:
    return q
  (first, second), (along, across) = q.axes, q.fmt.block
  size = q.codes.shape[second]
  fmt = BlockFormat(
    f'{q.fmt.name}_along_k',
    q.fmt.element,
    (along,),
    q.fmt.scale,
    q.fmt.tensor_scale,
    q.fmt.zero_point,
  )

  def repeated(leaf):
    if leaf is None:
      return None
    return jnp.repeat(leaf, across or size, second, total_repeat_length=size)

  return qarray.replace(
    q,
    scale=repeated(q.scale),
    zero_point=repeated(q.zero_point),
    fmt=fmt,
    axis=first,
    pad=q.pad[:1],
  )


def is_in_place(rhs: Member, dims: DotDims) -> bool:
  """Whether a member lies in its stack as the kernel reads a matrix."""
  fmt, ((_, contracted), _) = rhs.stack.fmt, dims
  is_matrix = rhs.ndim == 2 and len(contracted) == 1 and not rhs.stack.merged
  return is_matrix and not fmt.is_tile and fmt.scale_blocks is None


def sizes(lhs: Shaped, rhs: QArray, dims: DotDims) -> tuple[Any, int, int]:
  """The kind of the matrices of a product, its k with padding and its n."""
  _, q, _ = jax.eval_shape(
    lambda x, q: _dot_xla.as_matrices(x, q, dims),
    jax.ShapeDtypeStruct(lhs.shape, jnp.float32),
    rhs,
  )
  return kind_of(q), *k_and_n(q)


def k_and_n(q: QArray) -> tuple[int, int]:
  """The sizes of a matrix, with the padding of k."""
  along, across = (-2, -1) if q.axes == (-2,) else (-1, -2)
  return q.shape[along] + q.pad[0], q.shape[across]


def shape_of_product(
  kind: Any, x: jax.Array, codes: jax.Array
) -> tuple[int, int, int]:
  """(batch, m, n) of the product of x (batch, m, k) with members of a stack."""
  batch, m, _ = x.shape
  return batch, m, codes.shape[1 if kind.layout == 'nk' else 2]


def kind_of(q: QArray) -> Any:
  """What the kernel for a matrix must know of its format."""
  from lowbit_jax.cpu._weights import Kind

  fmt, layout = q.fmt, 'nk' if q.axes == (-1,) else 'kn'
  along = q.axes[0]
  scale, block = fmt.scale, fmt.block[0]
  if q.scale is None or q.scale.shape[along] == 1:
    block = 0
  if is_after(q):
    scale = None
  return Kind(layout, fmt.element, block, scale, fmt.zero_point, fmt.minimum)


def is_after(q: QArray) -> bool:
  """Whether each column has one scale, which multiplies its sum."""
  if q.scale is None or q.minimum is not None:
    return False
  return q.scale.shape[q.axes[0]] == 1


def with_stack(
  multiply: Callable, q: QArray, member: Member | None
) -> jax.Array:
  """multiply(index, *leaves) by a matrix, of a batch of one.

  A scale that a column has for all of k multiplies the result instead.
  """
  kind, along, scale = kind_of(q), q.axes[0], q.scale
  if is_after(q):
    q = qarray.replace(q, scale=None)
  stack, index = jax.tree.map(lambda leaf: leaf[None], q), jnp.zeros(1, _INDEX)
  if member is not None:
    stack, index = member.stack, member.index[None]
  out = multiply(index, *(getattr(stack, name) for name in kind.arrays))[0]
  if scale is not None and q.scale is None:
    assert q.fmt.scale is not None
    for f in _scaling.factors(scale, q.fmt.scale):
      out = out * (f.T if along == -1 else f)
  return out


def by_xla(
  multiply: Callable, kind: Any, x: jax.Array, index: jax.Array, *leaves: Any
) -> jax.Array:
  """Products (batch, m, n) with one matrix after the other.

  Args:
    multiply: x (m, k) with a QArray.
    kind: of the matrices.
    x: (batch, m, k).
    index: (batch,), numbers of matrices.
    *leaves: of the stack.
  """
  index = _within(index, leaves[0].shape[0])

  def member(i):
    pick = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    q = _matrix(kind, [pick(leaf, index[i]) for leaf in leaves])
    return multiply(x[i], q)

  if x.shape[0] == 1:
    return member(0)[None]
  return lax.map(member, jnp.arange(x.shape[0]))


def _within(index: jax.Array, stack: int) -> jax.Array:
  """Numbers of the nearest matrices, as the kernel takes them."""
  return jnp.clip(index, 0, max(stack - 1, 0))


def _matrix(kind, leaves) -> QArray:
  """A member of a stack as a QArray."""
  leaves = dict(zip(kind.arrays, leaves, strict=True))
  fmt = BlockFormat(
    'matrix',
    kind.element,
    (kind.block,),
    kind.scale,
    zero_point=kind.has_zero,
    minimum=kind.has_minimum,
  )
  return QArray(
    leaves['codes'],
    leaves.get('scale'),
    None,
    leaves.get('zero_point'),
    fmt,
    -1 if kind.layout == 'nk' else -2,
    (0,),
    jnp.dtype(jnp.float32),
    minimum=leaves.get('minimum'),
  )


def batched(
  multiply: Any, rows: int, operands: Sequence, axes: Sequence, **how: Any
) -> tuple[jax.Array, int]:
  """Rows of x are folded where matrices are shared; else stacks grow.

  Args:
    multiply: the primitive.
    rows: how many operands are (batch, m, ...), the first ones; an index and
      leaves follow.
    operands: of the primitive.
    axes: of vmap.
    **how: parameters of the primitive.
  """
  size = next(
    a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None
  )

  def spread(array, axis):
    if axis is not None:
      return jnp.moveaxis(array, axis, 0)
    return jnp.broadcast_to(array, (size, *array.shape))

  xs = [spread(*pair) for pair in zip(operands[:rows], axes, strict=False)]
  others = list(zip(operands[rows:], axes[rows:], strict=True))
  if all(d is None for _, d in others):
    _, batch, m, _ = xs[0].shape
    xs = [jnp.moveaxis(x, 0, 1).reshape(batch, size * m, -1) for x in xs]
    out = multiply.bind(*xs, *(a for a, _ in others), **how)
    return jnp.moveaxis(out.reshape(batch, size, m, -1), 1, 0), 0
  index, leaves = spread(*others[0]), [a for a, _ in others[1:]]
  if any(d is not None for _, d in others[1:]):
    leaves = [spread(*pair) for pair in others[1:]]
    stack = leaves[0].shape[1]
    first = stack * jnp.arange(size, dtype=index.dtype)[:, None]
    index = first + _within(index, stack)
    leaves = [a.reshape(size * stack, *a.shape[2:]) for a in leaves]
  shape = xs[0].shape[:2]
  xs = [x.reshape(math.prod(shape), *x.shape[2:]) for x in xs]
  out = multiply.bind(*xs, index.reshape(-1), *leaves, **how)
  return out.reshape(*shape, *out.shape[1:]), 0
