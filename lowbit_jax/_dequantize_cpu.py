"""Decoding of large arrays by kernels for CPUs, where XLA is slow at it.

Those are codes that do not divide a byte, with scales that are powers of two:
XLA does not vectorise three bytes for four codes. Such an array has no float
leaf, and so no derivative. The primitive is lowered as that of
`ops._quantize_cpu`.
"""

import math

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from lowbit_jax import cpu
from lowbit_jax._typing import DTypeLike
from lowbit_jax.cpu import _primitive
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _packing, _scaling
from lowbit_jax.numerics._codec import spec
from lowbit_pallas.arith import codec

FEW = 1 << 14  # elements that are not worth a kernel


def takes(
  codes: jax.Array, fmt: BlockFormat, axes: tuple[int, ...], dtype: DTypeLike
) -> bool:
  """Whether `values` is to decode an array.

  Args:
    codes: packed.
    fmt: the format.
    axes: its negative block axes.
    dtype: of the result.
  """
  if 8 % fmt.element.bits == 0 or not fmt.has_exponent_scale or fmt.is_tile:
    return False
  if fmt.tensor_scale or fmt.zero_point or fmt.minimum or fmt.scale_blocks:
    return False
  if jnp.dtype(dtype) != jnp.float32 or not fmt.block[0]:
    return False
  if not all(isinstance(n, int) for n in codes.shape):
    return False
  if math.prod(codes.shape) * 8 < FEW * fmt.element.bits:
    return False
  if jax.device_count() > 1 or cpu.why_not() or cpu.why_unproven():
    return False
  from lowbit_jax.cpu import _dequantize as kernels

  return kernels.why_not(*_task(codes, fmt, axes)) is None


def values(
  codes: jax.Array, scale: jax.Array, fmt: BlockFormat, axes: tuple[int, ...]
) -> jax.Array:
  """float32 numbers, with their padding, of what `takes` accepts.

  Args:
    codes: packed.
    scale: uint8 codes of the scales of blocks.
    fmt, axes: as in `takes`.
  """
  (axis,) = axes
  task, n = _task(codes, fmt, axes)
  shape = list(codes.shape)
  shape[axis] = _packing.unpacked_size(shape[axis], fmt.element.bits)
  if task.layout == 'rows':
    codes = codes.reshape(1, -1, task.block_bytes)
    scale = scale.reshape(1, -1, 1)
  else:
    codes = codes.reshape(-1, codes.shape[axis], n)
    scale = scale.reshape(-1, scale.shape[axis], n)
  return _dequantize.bind(codes, scale, task=task, fmt=fmt).reshape(shape)


def _task(codes, fmt: BlockFormat, axes: tuple[int, ...]):
  """What the kernel must know, and the columns beside the block axis."""
  from lowbit_jax.cpu._dequantize import Task

  (axis,) = axes
  layout = 'rows' if axis == -1 else 'columns'
  n = 1 if axis == -1 else math.prod(codes.shape[axis + 1 :])
  return Task(layout, fmt.block[0], fmt.element), n


def _shape(codes, scale, *, task, fmt):
  del scale
  batch, height, n = codes.shape
  if task.layout == 'rows':
    return ShapedArray((batch, height, task.block), jnp.dtype(jnp.float32))
  height = _packing.unpacked_size(height, fmt.element.bits)
  return ShapedArray((batch, height, n), jnp.dtype(jnp.float32))


def _by_xla(codes, scale, *, task, fmt):
  axis = -1 if task.layout == 'rows' else -2
  codes = _packing.unpack_unchecked(codes, fmt.element.bits, axis)
  x = codec.decode(codes, spec(fmt.element))
  batch, height, n = x.shape
  if task.layout == 'columns':
    x = x.reshape(batch, height // task.block, task.block, n)
    scale = scale[:, :, None]
  for factor in _scaling.factors(scale, fmt.scale):
    x = x * factor
  return x.reshape(batch, height, n)


def _by_kernel(codes, scale, *, task, fmt):
  from lowbit_jax.cpu import _dequantize as kernels

  out = _shape(codes, scale, task=task, fmt=fmt)
  out = jax.ShapeDtypeStruct(out.shape, out.dtype)
  return jax.ffi.ffi_call(kernels.target_name(task), out)(codes, scale)


def _batched(operands, axes, **how):
  """Members of a batch are folded into the batch of the kernel."""
  size, arrays = _primitive.folded(operands, axes)
  out = _dequantize.bind(*arrays, **how)
  return out.reshape(size, -1, *out.shape[1:]), 0


# Numbers of codes and scales as a kernel takes them.
_dequantize = _primitive.primitive(
  'lowbit_dequantize', _shape, _by_xla, _by_kernel, _batched
)
