"""Contractions by kernels for CPUs, on any number of matrices of a stack.

A product is a primitive. On CPU it is lowered to a kernel; on other platforms,
where a partitioner splits its operands, and in programs that are exported,
since other processes do not know the kernel, to the scan over tiles of
`_dot_xla`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from lowbit_jax import cpu, qarray
from lowbit_jax._member import Member
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.cpu import _primitive
from lowbit_jax.formats import BlockFormat, IntFormat
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
  note = 'decodes weights next to the product, on the threads of XLA'
  why_floats = _why_not_integers(lhs, rhs, dims)
  is_integer = why_floats is None
  if is_integer:
    note = 'multiplies integers, exactly within blocks, on the threads of XLA'
  elif isinstance(lhs, QArray):
    note = f'{note}; lhs as float32: {why_floats}'

  def run(lhs, rhs):
    arrays, multiply, scales = None, _product, []
    if is_integer:
      lhs, *scales = _dot_xla.without_tensor_scale(lhs)
      arrays = _integers_and_scales
      multiply = functools.partial(_integer_product, block=lhs.fmt.block[0])
    multiply = functools.partial(multiply, precision=precision)
    if isinstance(rhs, Member):
      if _is_in_place(rhs, dims):
        multiply = functools.partial(multiply, member=rhs)
      rhs = rhs.unpack()
    out = _dot_xla.Tiles(dims, multiply, arrays)(lhs, _along_k(rhs))
    return _dot_xla.times(out, *scales)

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
    if not _dot_xla.is_few(_dot_xla.rows(lhs, dims)):
      return 'XLA multiplies the integers of many rows'
    if (why := _why_not_integers(lhs, rhs, dims)) is not None:
      return f'XLA multiplies the integers of both operands: {why}'
  if rhs.fmt.is_tile and rhs.pad[1]:
    return 'tiles are padded along an axis that is not contracted'
  matrices = jax.eval_shape(_along_k, rhs)
  if (why := _dot_xla.why_not_tiles(lhs, matrices, dims)) is not None:
    return why
  return _matmul.why_not(*_sizes(lhs, matrices, dims))


def _sizes(lhs: Shaped, rhs: QArray, dims: DotDims) -> tuple[Any, int, int]:
  """The kind of the matrices of a product, its k with padding and its n."""
  x, q, _ = jax.eval_shape(
    lambda x, q: _dot_xla.as_matrices(x, q, dims),
    jax.ShapeDtypeStruct(lhs.shape, jnp.float32),
    rhs,
  )
  n = q.shape[-1 if q.axes == (-2,) else -2]
  return _kind(q), x.shape[-1] + q.pad[0], n


def _why_not_integers(lhs: Shaped, rhs: Shaped, dims: DotDims) -> str | None:
  """Why integers of both operands are not multiplied, or None."""
  from lowbit_jax.cpu import _integer_matmul

  if not isinstance(lhs, QArray):
    return 'it is no QArray'
  element, ((contracted, _), _) = lhs.fmt.element, dims
  if not isinstance(element, IntFormat) or not element.signed:
    return f'{element} is no signed integer'
  if lhs.merged or lhs.fmt.is_tile or lhs.fmt.scale_blocks:
    return 'its blocks are not runs with a scale each'
  if lhs.fmt.zero_point or lhs.fmt.minimum:
    return 'it has zero points or minima'
  if contracted != (lhs.ndim + lhs.axes[0],):
    return f'its blocks lie on axis {lhs.axis}, which is not contracted alone'
  if lhs.tensor_scale is not None and math.prod(lhs.tensor_scale.shape) != 1:
    return 'it is a stack of tensors'
  if isinstance(rhs, Member):
    rhs = jax.eval_shape(Member.unpack, rhs)
  kind, k, n = _sizes(lhs, jax.eval_shape(_along_k, rhs), dims)
  found = _integer_matmul.task(kind, lhs.fmt.block[0], k, n)
  return found if isinstance(found, str) else None


def _integers_and_scales(q: QArray) -> list[jax.Array]:
  """The integers of an operand, int8, and what each is to be multiplied by."""
  along, element = q.axes[0], q.fmt.element
  assert isinstance(element, IntFormat)
  scale = jnp.full((1,) * q.ndim, element.step, jnp.float32)
  if q.scale is not None:
    assert q.fmt.scale is not None
    for factor in _scaling.factors(q.scale, q.fmt.scale):
      scale = scale * factor
    if scale.shape[along] > 1:
      scale = jnp.repeat(scale, q.fmt.block[0], along)
      scale = lax.slice_in_dim(scale, 0, q.shape[along], axis=along)
  return [_dot_xla.int8(q), jnp.broadcast_to(scale, q.shape)]


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

  kind = _kind(q)
  x = jnp.pad(x, ((0, 0), (0, q.pad[0])))
  if kind.order > 1:
    m, k = x.shape
    groups = x.reshape(m, -1, LANES, kind.order)
    x = groups.swapaxes(-1, -2).reshape(m, k)
  how = {'kind': kind, 'precision': precision}
  return _with_stack(
    functools.partial(_multiply.bind, x[None], **how), q, member
  )


def _integer_product(
  x: jax.Array,
  scale: jax.Array,
  q: QArray,
  block: int,
  precision: Precision,
  member: Member | None = None,
) -> jax.Array:
  """Integers x (m, k), times their scales, times a matrix, float32.

  Args:
    x: int8 (m, k).
    scale: float32 (m, k), the same for all elements of a block.
    q: the matrix.
    block: elements along k of a block of x, 0 for all.
    precision: as in `lax.dot_general`.
    member: as in `_product`.
  """
  from lowbit_jax.cpu import _integer_matmul

  x, scale = (jnp.pad(a, ((0, 0), (0, q.pad[0]))) for a in (x, scale))
  n = q.shape[-1 if q.axes == (-2,) else -2]
  task = _integer_matmul.task(_kind(q), block, x.shape[1], n)
  assert isinstance(task, _integer_matmul.Task)  # or there is no plan
  multiply = functools.partial(
    _multiply_integers.bind,
    x[None],
    scale[None, :, :: task.unit],
    task=task,
    precision=precision,
  )
  return _with_stack(multiply, q, member)


def _with_stack(
  multiply: Callable, q: QArray, member: Member | None
) -> jax.Array:
  """multiply(index, *leaves) by a matrix, of a batch of one.

  A scale that a column has for all of k multiplies the result instead.
  """
  kind, along, scale = _kind(q), q.axes[0], q.scale
  if _is_after(q):
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


def _integer_shape(x, scale, *arrays, task, precision):
  del scale
  return _shape(x, *arrays, kind=task.kind, precision=precision)


def _integer_by_xla(x, scale, *arrays, task, precision):
  x = x.astype(jnp.float32) * jnp.repeat(scale, task.unit, -1)
  return _by_xla(x, *arrays, kind=task.kind, precision=precision)


def _integer_by_kernel(x, scale, index, *leaves, task, precision):
  del precision
  from lowbit_jax.cpu import _integer_matmul as kernels

  n = leaves[0].shape[1 if task.kind.layout == 'nk' else 2]
  out = jax.ShapeDtypeStruct((*x.shape[:2], n), jnp.float32)
  units = x.reshape(*scale.shape, task.unit).astype(jnp.int32)
  sums = jnp.sum(units, -1).astype(jnp.float32)
  x = _in_order(lax.bitcast_convert_type(x, jnp.uint8), task)
  call = jax.ffi.ffi_call(kernels.target_name(task), out)
  return call(x, scale, sums, index, *leaves)


def _in_order(x: jax.Array, task) -> jax.Array:
  """Bytes of x (batch, m, k) in the order in which the kernel reads them."""
  codes_of_byte = 8 // task.kind.element.bits
  if task.kind.layout == 'nk':  # bytes that are read together
    groups = x.reshape(*x.shape[:2], -1, task.side, codes_of_byte)
    return groups.swapaxes(-1, -2).reshape(x.shape)
  pairs = x.reshape(*x.shape[:2], -1, 2, codes_of_byte).swapaxes(-1, -2)
  return jnp.tile(pairs, 2).reshape(*x.shape[:2], -1)


def _batched(operands, axes, rows=1, **how):
  """Rows of x are folded where matrices are shared; else stacks grow.

  Args:
    operands: those of the primitive, of which the first `rows` are (batch, m,
      ...).
    axes: of vmap.
    rows: 1, or 2 where scales of x lie beside it.
    **how: parameters of the primitive.
  """
  multiply = _multiply if rows == 1 else _multiply_integers
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


# Products of x (batch, m, k) with the members `index` (batch,) of a stack.
_multiply = _primitive.primitive(
  'lowbit_matmul', _shape, _by_xla, _by_kernel, _batched
)
# The same of integers, with scales (batch, m, k / unit) after them.
_multiply_integers = _primitive.primitive(
  'lowbit_integer_matmul',
  _integer_shape,
  _integer_by_xla,
  _integer_by_kernel,
  functools.partial(_batched, rows=2),
)
