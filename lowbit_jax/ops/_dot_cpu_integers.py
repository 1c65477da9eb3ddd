"""Products of integers with packed matrices, by kernels for CPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from lowbit_jax._member import Member
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.cpu import _primitive
from lowbit_jax.formats import IntFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.ops import _dot_cpu_matrices as matrices, _dot_xla
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.qarray import QArray


def why_not(
  lhs: Shaped, rhs: Shaped, dims: DotDims, *, is_exact: bool = False
) -> str | None:
  """Why integers of both operands are not multiplied, or None.

  An exact product sums them over all of k.
  """
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
  kind, k, n = matrices.sizes(lhs, jax.eval_shape(matrices.along_k, rhs), dims)
  if is_exact:
    found = _exact_task(kind, k, n)
  else:
    found = _integer_matmul.task(kind, lhs.fmt.block[0], k, n)
  return found if isinstance(found, str) else None


def _exact_task(kind: Any, k: int, n: int) -> Any:
  """The product with the integers of a matrix alone, or why there is none."""
  from lowbit_jax.cpu import _integer_matmul

  bare = kind._replace(scale=None, block=0)
  return _integer_matmul.task(bare, 0, k, n, is_exact=True)


def codes_and_scales(q: QArray) -> list[jax.Array]:
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


def product(
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
    member: where q lies in a stack, None for one that lies by itself.
  """
  from lowbit_jax.cpu import _integer_matmul

  x, scale = (jnp.pad(a, ((0, 0), (0, q.pad[0]))) for a in (x, scale))
  kind = matrices.kind_of(q)
  task = _integer_matmul.task(kind, block, *matrices.k_and_n(q))
  assert isinstance(task, _integer_matmul.Task)  # or there is no plan
  multiply = functools.partial(
    _multiply.bind,
    x[None],
    scale[None, :, :: task.unit],
    task=task,
    precision=precision,
  )
  return matrices.with_stack(multiply, q, member)


def exact_product(
  x: jax.Array, codes: QArray, member: Member | None = None
) -> jax.Array:
  """Integers x (m, k) times a matrix of integers without scale, int32."""
  from lowbit_jax.cpu import _integer_matmul

  x = jnp.pad(x, ((0, 0), (0, codes.pad[0])))
  task = _exact_task(matrices.kind_of(codes), *matrices.k_and_n(codes))
  assert isinstance(task, _integer_matmul.Task)  # or there is no plan
  multiply = functools.partial(_multiply_exactly.bind, x[None], task=task)
  return matrices.with_stack(multiply, codes, member)


def _shape(x, scale, index, codes, *leaves, task, precision):
  del scale, index, leaves, precision
  return ShapedArray(
    matrices.shape_of_product(task.kind, x, codes), jnp.float32
  )


def _by_xla(x, scale, *arrays, task, precision):
  x = x.astype(jnp.float32) * jnp.repeat(scale, task.unit, -1)
  multiply = functools.partial(_dot_xla.product, precision=precision)
  return matrices.by_xla(multiply, task.kind, x, *arrays)


def _by_kernel(x, scale, index, *leaves, task, precision):
  del precision
  units = x.reshape(*scale.shape, task.unit).astype(jnp.int32)
  sums = jnp.sum(units, -1).astype(jnp.float32)
  return _call(task, jnp.float32, x, scale, sums, index, *leaves)


def _exact_shape(x, index, codes, *, task):
  del index
  return ShapedArray(matrices.shape_of_product(task.kind, x, codes), jnp.int32)


def _exact_by_xla(x, *arrays, task):
  return matrices.by_xla(_dot_xla.integers_of_tiles, task.kind, x, *arrays)


def _exact_by_kernel(x, index, codes, *, task):
  from lowbit_jax.cpu import _integer_matmul

  sums = jnp.sum(x.astype(jnp.int32), -1, keepdims=True)
  products = _call(task, jnp.int32, x, index, codes)
  return products - _integer_matmul.offset(task.kind) * sums


def _call(task, dtype, x, *arrays):
  from lowbit_jax.cpu import _integer_matmul

  codes = arrays[-len(task.kind.arrays)]
  shape = matrices.shape_of_product(task.kind, x, codes)
  out = jax.ShapeDtypeStruct(shape, dtype)
  x = _in_order(lax.bitcast_convert_type(x, jnp.uint8), task)
  return jax.ffi.ffi_call(_integer_matmul.target_name(task), out)(x, *arrays)


def _in_order(x: jax.Array, task) -> jax.Array:
  """Bytes of x (batch, m, k) in the order in which the kernel reads them."""
  if task.kind.layout == 'nk':  # bytes that are multiplied together
    codes_of_byte = 8 // task.kind.element.bits
    groups = x.reshape(*x.shape[:2], -1, task.side, codes_of_byte)
    return groups.swapaxes(-1, -2).reshape(x.shape)
  pairs = x.reshape(*x.shape[:2], -1, 2, task.kind.group).swapaxes(-1, -2)
  return jnp.tile(pairs, 2).reshape(*x.shape[:2], -1)


# Products of x (batch, m, k), beside which lie scales (batch, m, k / unit),
# with the members `index` (batch,) of a stack.
_multiply = _primitive.primitive(
  'lowbit_integer_matmul',
  _shape,
  _by_xla,
  _by_kernel,
  lambda *args, **how: matrices.batched(_multiply, 2, *args, **how),
)
# The same without scales: sums of integers.
_multiply_exactly = _primitive.primitive(
  'lowbit_exact_matmul',
  _exact_shape,
  _exact_by_xla,
  _exact_by_kernel,
  lambda *args, **how: matrices.batched(_multiply_exactly, 1, *args, **how),
)
