"""Straight-through estimators: quantize and dequantize with a stated gradient.

The equations stand in the docstring of `fake_quant`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit, _quantize as core
from lowbit_jax._typing import ArrayLike, Axis, Key, Origin
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _rounding, _scaling
from lowbit_jax.numerics._codec import as_float_array
from lowbit_jax.ops._quantize import (
  Extras,
  Options,
  check_scales,
  data_job,
  merged,
  rounding_of,
  split_origin,
)
from lowbit_jax.recipe import BACKWARDS
from lowbit_pallas.arith.codec import RANDOM_BITS

BACKWARDS_WITH = ('identity', 'clipped', 'lsq', 'trust')


def fake_quant(
  x: ArrayLike,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  scale_rule: str | None = None,
  rounding: str = 'nearest_even',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
  tensor_scale: ArrayLike | None = None,
  origin: Origin | None = None,
  backward: str = 'identity',
) -> jax.Array:
  """`dequantize(quantize(x, ...))` with a straight-through gradient.

  The forward pass is y = dequantize(quantize(x)). The backward pass never
  touches the storage type: the cotangent g of y stays in the dtype of x. With s
  the scale that was used, q = y / s the rounded element and F the largest
  element, `backward` is one of

    identity  dx = g
    clipped   dx = g where |x| <= F s, else 0: no gradient where x saturated
    trust     dx = g where |x - y| <= T s, else 0, with T half of the largest
              distance of neighbouring elements: the error is explained by
              rounding (the trust estimator of QuEST)
    absmax    dx_i = g_i, and at the maximum k of a block in addition
              sign(x_k) (F s^2 / amax^2) sum_j g_j (q_j - x_j / s),
              which is sign(x_k) / F times the sum for s = amax / F: the scale
              follows the block maximum (absmax-aware estimator; rounding of
              elements and scales counted as the identity, ties share evenly)

  Args:
    x: float16, bfloat16 or float32, 0-d too.
    fmt: a block format.
    axis: as in `quantize`; also `scale_rule`, `rounding`, `key`,
      `random_bits`, `tensor_scale`, `origin`.
    backward: 'identity', 'clipped', 'absmax' or 'trust', see above. A learned
      scale ('lsq') is a matter of `fake_quant_with`.

  Returns:
    An array of the shape and dtype of `x`.

  The gradient is in the dtype of `x`: `grad(sum(c * fake_quant(x)))` is exactly
  c where nothing is masked. Reverse mode only.
  """
  if backward not in BACKWARDS:
    hint = '; use fake_quant_with' if backward == 'lsq' else ''
    raise ValueError(f'backward={backward!r} is not one of {BACKWARDS}{hint}')
  x, shape, axes = prepare(x, fmt, axis, rounding, key, random_bits)
  rule = _scaling.check_scale_rule(fmt, scale_rule)
  if backward == 'absmax' and rule in ('minmax', 'absmean'):
    raise ValueError(
      f"backward='absmax' differentiates a scale that follows the largest"
      f' magnitude; that of scale_rule={rule!r} does not: use another backward'
    )
  start, full = split_origin(origin)
  options = Options(fmt, axes, rule, rounding, random_bits, full, backward)
  y = compiled(x, Extras(key, start, tensor_scale), options)
  return jnp.reshape(y, shape)


def fake_quant_with(
  x: ArrayLike,
  scale: ArrayLike | None,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  tensor_scale: ArrayLike | None = None,
  zero_point: ArrayLike | None = None,
  rounding: str = 'nearest_even',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
  origin: Origin | None = None,
  backward: str = 'identity',
) -> jax.Array:
  """`dequantize(quantize_with(x, ...))` with a straight-through gradient.

  The gradients are those of `fake_quant`; with backward='lsq', dx is that of
  'clipped' and the given scale gets

    ds = sum_j g_j d_j / sqrt(n F)    (learned step size)

  where d_j = q_j - x_j / s inside the range and sign(x_j) F outside, and n
  elements share a scale. Its rounding to the scale format counts as the
  identity.

  Args:
    x: float16, bfloat16 or float32.
    scale: block scales as in `quantize_with`; for formats with only a tensor
      scale, None.
    fmt: a block format.
    axis: as in `quantize_with`; also `tensor_scale`, `zero_point`, `rounding`,
      `key`, `random_bits`, `origin`.
    backward: 'identity', 'clipped', 'trust', or 'lsq', which also gives the
      float `scale` a gradient.

  Returns:
    An array of the shape and dtype of `x`.
  """
  if backward not in BACKWARDS_WITH:
    hint = '; use fake_quant' if backward == 'absmax' else ''
    raise ValueError(
      f'backward={backward!r} is not one of {BACKWARDS_WITH}{hint}'
    )
  x, shape, axes = prepare(x, fmt, axis, rounding, key, random_bits)
  check_scales(x.shape, fmt, axes, scale, tensor_scale, zero_point)
  if backward == 'lsq' and (
    scale is None or not jnp.issubdtype(jnp.asarray(scale).dtype, jnp.floating)
  ):
    raise TypeError("backward='lsq' learns float block scales; scale has none")
  start, full = split_origin(origin)
  options = Options(fmt, axes, '', rounding, random_bits, full, backward)
  extras = Extras(key, start, tensor_scale)
  y = _compiled_with(x, scale, extras, zero_point, options)
  return jnp.reshape(y, shape)


def prepare(
  x: ArrayLike,
  fmt: BlockFormat,
  axis: Axis,
  rounding: str,
  key: Key | None,
  random_bits: int,
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
  core.check_format(fmt)
  x = as_float_array(x)
  shape = x.shape
  if x.ndim == 0:
    x = x.reshape((1,) * len(fmt.block))
  rows, axes = merged(core.check_array(x, fmt), fmt, axis)
  _rounding.check_rounding(rounding, key, random_bits)
  return rows, shape, axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake(x, extras: Extras, options: Options):
  return _fake_forward(x, extras, options)[0]


def _fake_forward(x, extras, options):
  job = data_job(x, extras, options)
  y = job.values()
  if options.prescale != 1:
    y = y * jnp.float32(1 / options.prescale)
  if options.backward == 'identity':
    residual = None
  elif options.backward == 'absmax':
    residual = _absmax_residual(job, y)
  else:
    residual = core.restore(_mask(job, y, options.backward), job.blocks, bool)
  return core.restore(y, job.blocks, x.dtype), residual


def _fake_backward(options, residual, g):
  if options.backward == 'absmax':
    direction, error = residual
    blocks = core.split(g.astype(jnp.float32), options.fmt, options.axes)
    inner = _scale_axes(options.fmt, blocks)
    total = jnp.sum(blocks.view * error, axis=inner, keepdims=True)
    step = core.restore(direction * total, blocks, jnp.float32)
    dx = (g.astype(jnp.float32) + step).astype(g.dtype)
  else:
    dx = _masked(g, residual)
  return dx, None


_fake.defvjp(_fake_forward, _fake_backward)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def compiled(x: jax.Array, extras: Extras, options: Options) -> jax.Array:
  """The fake quantization of an array whose arguments are checked."""
  run = functools.partial(_fake, options=options)
  return _explicit.automatic(run, _explicit.as_first, x, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fake_with(x, scale, extras: Extras, zero_point, options: Options):
  return _fake_with_forward(x, scale, extras, zero_point, options)[0]


def _fake_with_forward(x, scale, extras, zero_point, options):
  fmt = options.fmt
  scales = check_scales(
    x.shape, fmt, options.axes, scale, extras.tensor_scale, zero_point
  )
  rounding = rounding_of(options, extras)
  job = core.from_scales(x, fmt, options.axes, scales, rounding)
  y = job.values()
  mask = d_scale = None
  if options.backward != 'identity':
    rule = 'clipped' if options.backward == 'lsq' else options.backward
    mask = core.restore(_mask(job, y, rule), job.blocks, bool)
  if options.backward == 'lsq':
    d_scale = _lsq_residual(job, y)
  zero = None if scale is None else jnp.zeros((), jnp.asarray(scale).dtype)
  residual = (mask, d_scale, zero, scales.scale)
  return core.restore(y, job.blocks, x.dtype), residual


def _fake_with_backward(options, residual, g):
  mask, d_scale, zero, stored = residual
  dx = _masked(g, mask)
  if zero is None:
    ds = None
  elif not jnp.issubdtype(zero.dtype, jnp.floating):
    ds = np.zeros(stored.shape, jax.dtypes.float0)
  elif d_scale is None:
    ds = jnp.zeros(stored.shape, zero.dtype)
  else:
    blocks = core.split(g.astype(jnp.float32), options.fmt, options.axes)
    ds = jnp.sum(blocks.view * d_scale, axis=blocks.inner).astype(zero.dtype)
  return dx, ds, None, None


_fake_with.defvjp(_fake_with_forward, _fake_with_backward)


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _compiled_with(x, scale, extras: Extras, zero_point, options: Options):
  run = functools.partial(_fake_with, options=options)
  operands = x, scale, extras, zero_point
  return _explicit.automatic(run, _explicit.as_first, *operands)


def _masked(g, mask):
  return g if mask is None else jnp.where(mask, g, jnp.zeros((), g.dtype))


def _scale_value(job: core.Job):
  """The whole scale in float32, in the axes of the view."""
  scale, tensor_scale, _ = job.scales
  s = jnp.float32(1)
  if scale is not None:
    assert job.fmt.scale is not None
    for factor in _scaling.factors(scale, job.fmt.scale):
      s = s * factor
  if tensor_scale is not None:
    s = s * job.blocks.expand(tensor_scale)
  return s


def _range(job: core.Job):
  """Smallest and largest value that the scales can represent."""
  s, element = _scale_value(job), job.fmt.element
  low = -element.max if element.is_signed else 0.0
  zero = job.scales.zero_point
  if zero is None:
    return low * s, element.max * s
  zero = zero.astype(jnp.float32)
  return -zero * s, (element.max - zero) * s


def _mask(job: core.Job, y, backward: str):
  x = job.blocks.view
  if backward == 'clipped':
    low, high = _range(job)
    return (x >= low) & (x <= high)
  trust = _largest_step(job.fmt) / 2
  return jnp.abs(x - y) <= trust * _scale_value(job)


def _scale_axes(fmt: BlockFormat, blocks: core.Blocks) -> tuple[int, ...]:
  """The axes of the view that share a scale."""
  return blocks.inner if fmt.scale else tuple(range(blocks.view.ndim))


def _largest_step(fmt: BlockFormat) -> float:
  values = fmt.element.values()
  values = np.unique(values[np.isfinite(values)])
  return float(np.max(np.diff(values)))


def _absmax_residual(job: core.Job, y):
  """Per element: where the scale's gradient goes, and q_j - x_j / s."""
  x, inner = job.blocks.view, _scale_axes(job.fmt, job.blocks)
  s = _scale_value(job)
  inverse = _scaling.reciprocal(s)
  magnitude = jnp.abs(x)
  amax = jnp.max(magnitude, axis=inner, keepdims=True, initial=0)
  at_max = (magnitude == amax) & (amax > 0)
  count = jnp.sum(at_max, axis=inner, keepdims=True)
  weight = job.fmt.element.max * jnp.square(s * _scaling.reciprocal(amax))
  share = weight * _scaling.reciprocal(count.astype(jnp.float32))
  direction = jnp.where(at_max, jnp.sign(x) * share, 0)
  return direction, (y - x) * inverse


def _lsq_residual(job: core.Job, y):
  """d y / d scale, times the learned-step-size factor 1 / sqrt(n F)."""
  x, blocks = job.blocks.view, job.blocks
  tensor = job.scales.tensor_scale
  outer = 1.0 if tensor is None else blocks.expand(tensor)
  inverse = _scaling.reciprocal(_scale_value(job))
  inside = _mask(job, y, 'clipped')
  slope = jnp.where(inside, (y - x) * inverse, y * inverse)
  n = np.maximum(core.block_counts(blocks), 1)
  return slope * outer / blocks.expand(np.sqrt(n * job.fmt.element.max))
