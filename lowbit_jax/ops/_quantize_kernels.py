"""Quantization by kernels that write packed codes and scales in one pass.

They take blocks along the last axis of a format with block scales. A tensor
scale is a reduction in XLA before.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import _quantize as core, qarray
from lowbit_jax.numerics import _rounding
from lowbit_jax.numerics._codec import blocked
from lowbit_jax.ops import _partition
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.qarray import QArray
from lowbit_jax.transforms import Hadamard
from lowbit_pallas import _support
from lowbit_pallas._support import Kernel


def plan(
  implementation: str,
  x: jax.Array | jax.ShapeDtypeStruct,
  extras: Any,
  options: Any,
) -> Plan:
  """Plans `quantize` of an array by a kernel.

  Args:
    implementation: 'tpu' or 'mosaic_gpu'.
    x: array or `jax.ShapeDtypeStruct`.
    extras, options: what `_quantize.operands` returns beside x.
  """
  kernel = _support.require('quantize', implementation)
  if why := _why_not(x, extras, options):
    raise NotImplementedError(why)
  module = kernel.load()
  task = module.Task(
    blocked(options.fmt),
    options.rule,
    options.rounding,
    options.random_bits,
    options.rotation,
  )
  matrix = math.prod(x.shape[:-1]), x.shape[-1]
  why = module.why_not(matrix, x.dtype, task)
  if why is not None:
    raise NotImplementedError(why)

  def run(x, extras):
    return _run(kernel, task, x, extras, options)

  return Plan('one pass over the rows, packed codes and scales', run)


def _why_not(x, extras, options) -> str | None:
  fmt = options.fmt
  if callable(options.rule):
    return f'scale_rule={options.rule!r} is a function'
  if options.axes != (-1,):
    return f'blocks lie along axes {options.axes}, not along the last one'
  if fmt.scale is None or fmt.zero_point or not fmt.block[0]:
    return f'{fmt} has no blocks with a scale and without a zero point'
  if fmt.minimum or fmt.scale_blocks:
    return f'{fmt} has minima or two levels of scales'
  held = extras.tensor_scale
  if held is not None and (not fmt.tensor_scale or jnp.size(held) != 1):
    return f'tensor_scale={held} does not fit {fmt}'
  if fmt.scale.bits == 16:
    return f'{fmt} has {fmt.scale} scales'
  if options.full_shape is not None and len(x.shape) != 2:
    return 'origin= with an array that is not a matrix'
  return None


def _run(kernel: Kernel, task, x, extras, options) -> QArray:
  fmt = options.fmt
  arguments = {}
  if fmt.tensor_scale:
    arguments['tensor_scale'] = tensor_scale_of(x, extras, options)
  if extras.signs is not None:
    n, signs = x.shape[-1], jnp.asarray(extras.signs, jnp.float32)
    arguments['signs'] = jnp.tile(signs, n // signs.size)
  if options.rounding == 'stochastic':
    arguments['key_words'] = _rounding.key_words(extras.key)
  origin = None
  if options.full_shape is not None:
    origin = extras.start, options.full_shape

  def run(x, *values):
    named = dict(zip(arguments, values, strict=True))
    return kernel.load().run(x, task, origin=origin, **named)

  # The bits of a row depend on where it stands, which a shard does not know.
  split = options.rounding != 'stochastic'
  lead = x.shape[:-1]
  matrix = x.reshape(math.prod(lead), x.shape[-1])
  packed, scale = _partition.rows_and_extras(
    run,
    matrix,
    *arguments.values(),
    split=split,
    has_rules=kernel.has_rules,
  )
  tensor_scale = arguments.get('tensor_scale')
  if tensor_scale is not None:
    tensor_scale = tensor_scale.reshape((1,) * x.ndim)
  return QArray(
    codes=packed.reshape(*lead, packed.shape[-1]),
    scale=scale.reshape(*lead, scale.shape[-1]),
    tensor_scale=tensor_scale,
    zero_point=None,
    fmt=fmt,
    axis=-1,
    pad=qarray.padding(x.shape, fmt, options.axes),
    dtype=x.dtype,
  )


def tensor_scale_of(x: jax.Array, extras: Any, options: Any) -> jax.Array:
  """The tensor scale, held or of the data, as a scalar."""
  if extras.tensor_scale is not None:
    return jnp.asarray(extras.tensor_scale, jnp.float32).reshape(())
  if options.rotation:
    x = Hadamard(options.rotation, -1, extras.signs).apply(x)
  job = core.from_data(
    x, options.fmt, options.axes, options.rule, core.Rounding()
  )
  return job.scales.tensor_scale.reshape(())
