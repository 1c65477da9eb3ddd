"""Contractions by kernels for CPUs, on any number of matrices of a stack.

A product is a primitive. On CPU it is lowered to a kernel; on other platforms,
where a partitioner splits its operands, and in programs that are exported,
since other processes do not know the kernel, to the scan over tiles of
`_dot_xla`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from lowbit_jax import cpu, qarray
from lowbit_jax._member import Member
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.cpu import _primitive
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.ops import _dot_xla
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.qarray import QArray

_INDEX = jnp.int32


def plan(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product on CPU with a float32 result."""
  dims = dimension_numbers
  if (why := cpu.why_not()) is None:
    why = _why_not(lhs, rhs, dims)
  if why is not None:
    raise NotImplementedError(why)

  def run(lhs, rhs):
    multiply = functools.partial(_product, precision=precision)
    if isinstance(rhs, Member):
      if _is_in_place(rhs, dims):
        multiply = functools.partial(multiply, member=rhs)
      rhs = rhs.unpack()
    return _dot_xla.Tiles(dims, multiply)(lhs, _along_k(rhs))

  note = 'decodes weights next to the product, on the threads of XLA'
  return Plan(note, run, is_portable=True)


def _is_in_place(rhs: Member, dims: DotDims) -> bool:
  """Whether a member lies in its stack as the kernel reads a matrix."""
  fmt, ((_, contracted), _) = rhs.stack.fmt, dims
  is_matrix = rhs.ndim == 2 and len(contracted) == 1 and not rhs.stack.merged
  return is_matrix and not fmt.is_tile and fmt.scale_blocks is None


def _why_not(lhs: Shaped, rhs: Shaped, dims: DotDims) -> str | None:
  """Why there is no kernel for these operands, or None."""
  from lowbit_jax.cpu import _matmul

  if isinstance(rhs, Member):
    rhs = jax.eval_shape(Member.unpack, rhs)
  if not isinstance(rhs, QArray):
    return _dot_xla.why_not_tiles(lhs, rhs, dims)
  if not all(isinstance(n, int) for n in (*lhs.shape, *rhs.shape)):
    return 'shapes are symbolic'
  if _dot_xla.why_not_integer(lhs, rhs, dims) is None:
    return 'XLA multiplies the integers of both operands'
  if rhs.fmt.is_tile and rhs.pad[1]:
    return 'tiles are padded along an axis that is not contracted'
  matrices = jax.eval_shape(_along_k, rhs)
  if (why := _dot_xla.why_not_tiles(lhs, matrices, dims)) is not None:
    return why
  x, q, _ = jax.eval_shape(
    lambda x, q: _dot_xla.as_matrices(x, q, dims),
    jax.ShapeDtypeStruct(lhs.shape, jnp.float32),
    matrices,
  )
  n = q.shape[-1 if q.axes == (-2,) else -2]
  return _matmul.why_not(_kind(q), x.shape[-1] + q.pad[0], n)


def _along_k(q: QArray) -> QArray:
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


def _kind(q: QArray):
  """What the kernel for a matrix must know of its format."""
  from lowbit_jax.cpu._weights import Kind

  fmt, layout = q.fmt, 'nk' if q.axes == (-1,) else 'kn'
  along = q.axes[0]
  scale, block = fmt.scale, fmt.block[0]
  if q.scale is None or q.scale.shape[along] == 1:
    block = 0
  if _is_after(q):
    scale = None
  return Kind(layout, fmt.element, block, scale, fmt.zero_point, fmt.minimum)


def _is_after(q: QArray) -> bool:
  """Whether each column has one scale, which multiplies its sum."""
  if q.scale is None or q.minimum is not None:
    return False
  return q.scale.shape[q.axes[0]] == 1


def _product(
  x: jax.Array,
  q: QArray,
  precision: Precision,
  member: Member | None = None,
) -> jax.Array:
  """x (m, k) times a matrix (k, n) or (n, k), float32.

  Args:
    x: float32 (m, k).
    q: the matrix.
    precision: as in `lax.dot_general`.
    member: where q lies in a stack, None for one that lies by itself.
  """
  from lowbit_jax.cpu._weights import LANES

  kind, along = _kind(q), q.axes[0]
  x = jnp.pad(x, ((0, 0), (0, q.pad[0])))
  if kind.order > 1:
    m, k = x.shape
    groups = x.reshape(m, -1, LANES, kind.order)
    x = groups.swapaxes(-1, -2).reshape(m, k)
  scale = q.scale
  if _is_after(q):
    q = qarray.replace(q, scale=None)
  stack, index = jax.tree.map(lambda leaf: leaf[None], q), jnp.zeros(1, _INDEX)
  if member is not None:
    stack, index = member.stack, member.index[None]
  leaves = [getattr(stack, name) for name in kind.arrays]
  how = {'kind': kind, 'precision': precision}
  out = _matmul.bind(x[None], index, *leaves, **how)[0]
  if scale is not None and q.scale is None:
    assert q.fmt.scale is not None
    for f in _scaling.factors(scale, q.fmt.scale):
      out = out * (f.T if along == -1 else f)
  return out


def _shape(x, index, codes, *leaves, kind, precision):
  del index, leaves, precision
  n = codes.shape[1 if kind.layout == 'nk' else 2]
  return ShapedArray((*x.shape[:2], n), jnp.float32)


def _by_xla(x, index, *leaves, kind, precision):
  """The product by a scan over tiles of one matrix after the other."""

  index = _within(index, leaves[0].shape[0])

  def member(i):
    pick = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    q = _matrix(kind, [pick(leaf, index[i]) for leaf in leaves])
    return _dot_xla.product(x[i], q, precision)

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


def _by_kernel(x, index, *leaves, kind, precision):
  del precision
  from lowbit_jax.cpu import _matmul as kernels

  n = leaves[0].shape[1 if kind.layout == 'nk' else 2]
  out = jax.ShapeDtypeStruct((*x.shape[:2], n), jnp.float32)
  return jax.ffi.ffi_call(kernels.target_name(kind), out)(x, index, *leaves)


def _batched(operands, axes, **how):
  """Rows of x are folded where matrices are shared; else stacks grow."""
  x, index, *leaves = (
    a if d is None else jnp.moveaxis(a, d, 0)
    for a, d in zip(operands, axes, strict=True)
  )
  size = next(
    a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None
  )
  if all(d is None for d in axes[1:]):
    _, batch, m, k = x.shape
    rows = jnp.moveaxis(x, 0, 1).reshape(batch, size * m, k)
    out = _matmul.bind(rows, index, *leaves, **how)
    return jnp.moveaxis(out.reshape(batch, size, m, -1), 1, 0), 0

  def spread(array, axis):
    if axis is not None:
      return array
    return jnp.broadcast_to(array, (size, *array.shape))

  x, index = spread(x, axes[0]), spread(index, axes[1])
  if any(d is not None for d in axes[2:]):
    leaves = [spread(a, d) for a, d in zip(leaves, axes[2:], strict=True)]
    stack = leaves[0].shape[1]
    first = stack * jnp.arange(size, dtype=index.dtype)[:, None]
    index = first + _within(index, stack)
    leaves = [a.reshape(size * stack, *a.shape[2:]) for a in leaves]
  shape = x.shape[:2]
  x = x.reshape(math.prod(shape), *x.shape[2:])
  out = _matmul.bind(x, index.reshape(-1), *leaves, **how)
  return out.reshape(*shape, *out.shape[1:]), 0


# Products of x (batch, m, k) with the members `index` (batch,) of a stack.
_matmul = _primitive.primitive(
  'lowbit_matmul', _shape, _by_xla, _by_kernel, _batched
)
