"""Quantization by kernels for CPUs.

It is a primitive. On CPU it is lowered to a kernel; on other platforms, where a
partitioner splits its operands, and in programs that are exported, since other
processes do not know the kernel, to the quantizer of XLA, of which it has the
bits.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from lowbit_jax import _quantize as core, cpu, qarray
from lowbit_jax.cpu import _primitive
from lowbit_jax.numerics import _scaling
from lowbit_jax.ops import _quantize_kernels
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith import scale as exact

# Elements of an array for which a kernel is not worth its compilation, unasked.
FEW = 1 << 14
# Elements of a block of columns that are read twice from the cache. XLA, which
# reads whole rows, is faster with more of them.
HIGH = 1 << 10


def plan(
  x: jax.Array | jax.ShapeDtypeStruct, extras: Any, options: Any
) -> Plan:
  """Plans `quantize` of an array on CPU.

  Args:
    x: array or `jax.ShapeDtypeStruct`.
    extras, options: what `_quantize.operands` returns beside x.
  """
  if (why := cpu.why_not()) is None:
    why = _why_not(x, extras, options)
  if why is not None:
    raise NotImplementedError(why)

  def run(x, extras):
    return _run(x, extras, options)

  return Plan(
    'maxima, scales and packed codes in one pass, on the threads of XLA',
    run,
    is_portable=True,
  )


def _why_not(x, extras, options) -> str | None:
  """Why there is no kernel for these operands, or None."""
  fmt, rule = options.fmt, options.rule
  if not all(isinstance(n, int) for n in x.shape):
    return 'shapes are symbolic'
  if callable(rule):
    return f'scale_rule={rule!r} is a function'
  if options.rounding != 'nearest_even':
    return f'rounding={options.rounding!r} is not to nearest'
  if options.rotation or options.prescale != 1:
    return 'x is rotated or prescaled'
  if fmt.scale is None or fmt.is_tile:
    return f'{fmt} has no scales of blocks along one axis'
  if fmt.minimum or fmt.scale_blocks:
    return f'{fmt} has minima or two levels of scales'
  held = extras.tensor_scale
  if held is not None and (not fmt.tensor_scale or jnp.size(held) != 1):
    return f'tensor_scale={held} does not fit {fmt}'
  from lowbit_jax.cpu import _compiler, _quantize as kernels

  task, n = _task(x, options)
  if options.implementation is None:
    if math.prod(x.shape) < FEW:
      return f'x.shape={x.shape} has fewer than {FEW} elements: name it'
    if task.layout == 'columns' and task.block > HIGH:
      return f'blocks of columns have more than {HIGH} elements: name it'
  return kernels.why_not(task, n, _compiler.host())


def _task(x, options):
  """What the kernel must know, and the columns beside the block axis."""
  from lowbit_jax.cpu._quantize import Task
  from lowbit_jax.cpu._scales import Rule

  fmt, (axis,) = options.fmt, options.axes
  least = exact.SMALLEST
  most = exact.largest_scale(fmt.element.max)
  if not _scaling.is_coded(fmt.scale):
    least, most = _scaling.bounds(fmt)
  rule = Rule(
    options.rule, fmt.element, fmt.scale, least, most, fmt.tensor_scale
  )
  layout = 'rows' if axis == -1 else 'columns'
  block = fmt.block[0] or x.shape[axis]
  n = 1 if axis == -1 else math.prod(x.shape[axis + 1 :])
  return Task(layout, x.dtype.name, block, rule), n


def _run(x: jax.Array, extras, options) -> QArray:
  """The array as (batch, blocks, block) or (batch, k, n), and back."""
  fmt, (axis,) = options.fmt, options.axes
  task, n = _task(x, options)
  (pad,) = qarray.padding(x.shape, fmt, options.axes)
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, pad)
  padded = jnp.pad(x, widths) if pad else x
  k = padded.shape[axis]
  lead = x.shape[: x.ndim + axis]
  if task.layout == 'rows':
    view = padded.reshape(1, -1, task.block)
  else:
    view = padded.reshape(-1, k, n)
  operands, tensor_scale = [view], None
  if fmt.tensor_scale:
    tensor_scale = _quantize_kernels.tensor_scale_of(x, extras, options)
    operands.append(jnp.broadcast_to(tensor_scale, view.shape[:1]))
    tensor_scale = tensor_scale.reshape((1,) * x.ndim)
  codes, scale, *zero_point = _quantize.bind(*operands, task=task, fmt=fmt)

  def shaped(leaf, size):
    return leaf.reshape(*lead, size, *x.shape[x.ndim + axis + 1 :])

  blocks = k // task.block
  return QArray(
    codes=shaped(codes, k * task.bits // 8),
    scale=shaped(scale, blocks),
    tensor_scale=tensor_scale,
    zero_point=shaped(zero_point[0], blocks) if zero_point else None,
    fmt=fmt,
    axis=axis,
    pad=(pad,),
    dtype=x.dtype,
  )


def _shapes(x, *tensor_scale, task, fmt):
  del tensor_scale, fmt
  batch, height, n = x.shape
  if task.layout == 'rows':
    codes, scale = (batch, height, n * task.bits // 8), (batch, height, 1)
  else:
    codes = batch, height * task.bits // 8, n
    scale = batch, height // task.block, n
  return [
    ShapedArray(codes if name == 'codes' else scale, jnp.dtype(dtype))
    for name, dtype in task.results.items()
  ]


def _by_xla(x, *tensor_scale, task, fmt):
  axes = (-1,) if task.layout == 'rows' else (-2,)

  def member(x, *tensor_scale):
    rounding = core.Rounding()
    job = core.from_data(x, fmt, axes, task.rule.name, rounding, *tensor_scale)
    q = core.pack(job, x.dtype)
    return [getattr(q, name) for name in task.results]

  return jax.vmap(member)(x, *tensor_scale)


def _by_kernel(x, *tensor_scale, task, fmt):
  from lowbit_jax.cpu import _quantize as kernels

  out = [
    jax.ShapeDtypeStruct(a.shape, a.dtype)
    for a in _shapes(x, *tensor_scale, task=task, fmt=fmt)
  ]
  return jax.ffi.ffi_call(kernels.target_name(task), out)(x, *tensor_scale)


def _batched(operands, axes, **how):
  """Members of a batch are folded into the batch of the kernel."""
  size, arrays = _primitive.folded(operands, axes)
  out = _quantize.bind(*arrays, **how)
  out = [leaf.reshape(size, -1, *leaf.shape[1:]) for leaf in out]
  return out, [0] * len(out)


# Of x as a kernel takes it, and the tensor scale of each member of the batch.
_quantize = _primitive.primitive(
  'lowbit_quantize', _shapes, _by_xla, _by_kernel, _batched, several=True
)
