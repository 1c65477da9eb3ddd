"""Straight-through estimators: quantize and dequantize with a stated gradient.

The equations stand in the docstring of `fake_quant`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import _derivative, _explicit, _quantize as core
from lowbit_jax._typing import ArrayLike, Axis, Key, Origin, ScaleRule
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
from lowbit_jax.qarray import QArray
from lowbit_jax.recipe import BACKWARDS
from lowbit_pallas.arith.codec import RANDOM_BITS

BACKWARDS_WITH = ('identity', 'clipped', 'lsq', 'trust')


def fake_quant(
  x: ArrayLike,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  scale_rule: ScaleRule | None = None,
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
              (with one end of elements longer, where x / s is between them).
              The rounding of s, and of a zero point, to its format counts as
              the identity: it clips no block maximum
    trust     dx = g where |x - y| <= T s, else 0, with T half of the largest
              distance of neighbouring elements: the error is explained by
              rounding (the trust estimator of QuEST)
    absmax    dx_i = g_i, and at the maximum k of a block in addition
              sign(x_k) (F s |s| / amax^2) sum_j g_j (q_j - x_j / s),
              which is sign(x_k) / F times the sum for s = amax / F: the scale
              follows the block maximum (absmax-aware estimator; rounding of
              elements and scales counted as the identity, ties share evenly).
              By 'signed_absmax' F is the longer end's magnitude, by
              'full_range' the mean of both

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
  c where nothing is masked. Forward and reverse mode, of any order: what g is
  multiplied by, such as the mask, counts as a constant, as in
  `x + stop_gradient(fake_quant(x) - x)`.
  """
  if backward not in BACKWARDS:
    hint = '; use fake_quant_with' if backward == 'lsq' else ''
    raise ValueError(f'backward={backward!r} is not one of {BACKWARDS}{hint}')
  x, shape, axes = prepare(x, fmt, axis, rounding, key, random_bits)
  rule = _scaling.check_scale_rule(fmt, scale_rule)
  if backward == 'absmax' and not _scaling.follows_maximum(rule):
    raise ValueError(
      f"backward='absmax' differentiates a scale that follows the largest"
      f' magnitude; that of scale_rule={rule!r} does not: use another backward'
    )
  core.check_tensor_scale(tensor_scale)
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
  minimum: ArrayLike | None = None,
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
  identity. Both modes and any order, as for `fake_quant`.

  Args:
    x: float16, bfloat16 or float32.
    scale: block scales as in `quantize_with`; for formats with only a tensor
      scale, None.
    fmt: a block format.
    axis: as in `quantize_with`; also `tensor_scale`, `zero_point`, `minimum`,
      `rounding`, `key`, `random_bits`, `origin`.
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
  check_scales(x.shape, fmt, axes, (scale, tensor_scale, zero_point, minimum))
  if backward == 'lsq' and (
    scale is None
    or isinstance(scale, QArray)
    or not jnp.issubdtype(jnp.asarray(scale).dtype, jnp.floating)
  ):
    raise TypeError("backward='lsq' learns float block scales; scale has none")
  start, full = split_origin(origin)
  options = Options(fmt, axes, '', rounding, random_bits, full, backward)
  extras = Extras(key, start, tensor_scale)
  y = _compiled_with(x, scale, extras, (zero_point, minimum), options)
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


class _Slopes(NamedTuple):
  """What the derivative multiplies, each None where it plays no part.

  Attributes:
    mask: bool, where the tangent of x passes, in the shape of x.
    at_maximum: per element in the axes of the view of blocks, the slope of the
      scale in it and q_j - x_j / s.
    of_scale: d y / d scale in the axes of the view.
  """

  mask: jax.Array | None = None
  at_maximum: tuple[jax.Array, jax.Array] | None = None
  of_scale: jax.Array | None = None


def _fake(x, extras: Extras, options: Options):
  fixed, extras = _fixed((x, extras))
  job = data_job(fixed, extras, options)
  y = job.values()
  if options.prescale != 1:
    y = y * jnp.float32(1 / options.prescale)
  slopes = _Slopes()
  if options.backward == 'absmax':
    assert isinstance(options.rule, str)
    slopes = _Slopes(at_maximum=_absmax_slopes(job, y, options.rule))
  elif options.backward != 'identity':
    slopes = _Slopes(_whole_mask(job, y, options.backward))
  y = core.restore(y, job.blocks, x.dtype)
  return _straight(y, x, None, slopes, options)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def compiled(x: jax.Array, extras: Extras, options: Options) -> jax.Array:
  """The fake quantization of an array whose arguments are checked."""
  run = functools.partial(_fake, options=options)
  return _explicit.automatic(run, _explicit.as_first, x, extras)


def _fake_with(x, scale, extras: Extras, offsets, options: Options):
  fmt, axes, backward = options.fmt, options.axes, options.backward
  fixed, given, extras, offsets = _fixed((x, scale, extras, offsets))
  leaves = given, extras.tensor_scale, *offsets
  scales = check_scales(x.shape, fmt, axes, leaves)
  job = core.from_scales(fixed, fmt, axes, scales, rounding_of(options, extras))
  y = job.values()
  slopes = _Slopes()
  if backward == 'lsq':
    mask = _whole_mask(job, y, 'clipped', held=True)
    slopes = _Slopes(mask, of_scale=_lsq_slope(job, y))
  elif backward != 'identity':
    slopes = _Slopes(_whole_mask(job, y, backward, held=True))
  y = core.restore(y, job.blocks, x.dtype)
  return _straight(y, x, scale if backward == 'lsq' else None, slopes, options)


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _compiled_with(x, scale, extras: Extras, offsets, options: Options):
  run = functools.partial(_fake_with, options=options)
  operands = x, scale, extras, offsets
  return _explicit.automatic(run, _explicit.as_first, *operands)


def _fixed(tree):
  """The arrays of a tree without their derivatives."""
  return jax.tree.map(lax.stop_gradient, tree)


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(4,))
def _straight(y, x, scale, slopes: _Slopes, options: Options):
  """The value y, with a derivative in x and scale that is linear in theirs.

  Differentiated again it is the same: slopes count as constants.
  """
  del x, scale, slopes, options
  return y


def _straight_jvp(options: Options, primals, tangents):
  y, x, scale, slopes = primals
  _, dx, ds, _ = tangents
  dx, ds = (None if _is_zero(t) else t for t in (dx, ds))
  out = _straight(y, x, scale, slopes, options)
  if dx is None and ds is None:
    return out, jnp.zeros_like(y)
  if not jax.tree.leaves(slopes):
    return out, dx
  # Saved are the slopes alone: without the checkpoint also what else the
  # equations take, such as the zeros beside a mask.
  tangent = functools.partial(_tangent, options, y.dtype)
  return out, jax.checkpoint(tangent, prevent_cse=False)(slopes, dx, ds)


_straight.defjvp(_straight_jvp, symbolic_zeros=True)


def _tangent(options: Options, dtype, slopes: _Slopes, dx, ds):
  """The derivative of fake_quant times the tangents, of which one is given."""
  fmt, axes = options.fmt, options.axes
  dy = jnp.zeros((), dtype) if dx is None else dx
  if slopes.mask is not None:
    dy = jnp.where(slopes.mask, dy, jnp.zeros((), dtype))
  if slopes.at_maximum is not None:
    direction, error = slopes.at_maximum
    # One cast, so that cotangents too are added before they are rounded.
    wide = dy.astype(jnp.float32)
    blocks = core.split(wide, fmt, axes)
    inner = _scale_axes(fmt, blocks)
    total = jnp.sum(blocks.view * direction, axis=inner, keepdims=True)
    step = core.restore(error * total, blocks, jnp.float32)
    dy = (wide + step).astype(dtype)
  if ds is not None:
    wide = dy.astype(jnp.float32)
    blocks = core.split(wide, fmt, axes)
    step = slopes.of_scale * blocks.expand(ds.astype(jnp.float32))
    step = core.restore(step, blocks, jnp.float32)
    dy = (wide + step).astype(dtype)
  return dy


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(0,))
def differentiable_once(why: str, x: jax.Array) -> jax.Array:
  """x where a derivative is taken that cannot be differentiated again.

  Raises:
    NotImplementedError: with `why`, when it is.
  """
  del why
  return x


def _differentiable_once_jvp(why: str, primals, tangents):
  if _is_zero(tangents[0]):
    return primals[0], jnp.zeros_like(primals[0])
  raise NotImplementedError(why)


differentiable_once.defjvp(_differentiable_once_jvp, symbolic_zeros=True)


def _is_zero(tangent) -> bool:
  is_symbol = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
  return tangent is None or is_symbol


def _whole_mask(job: core.Job, y, backward: str, held: bool = False):
  """`_mask` in the shape of the array."""
  return core.restore(_mask(job, y, backward, held), job.blocks, bool)


def _scale_value(job: core.Job, number: float = 1.0):
  """`number` times the whole scale in float32, in the axes of the view."""
  scale, tensor_scale = job.scales.scale, job.scales.tensor_scale
  s = jnp.float32(number)
  if scale is not None:
    assert job.fmt.scale is not None
    for factor in _scaling.factors(scale, job.fmt.scale):
      s = s * factor
  if tensor_scale is not None:
    s = s * job.blocks.expand(tensor_scale)
  return s


def _range(job: core.Job):
  """Smallest and largest value that the scales can represent."""
  element, zero = job.fmt.element, job.scales.zero_point
  if job.scales.minimum is not None:
    low = job.scales.minimum.astype(jnp.float32)
    return low, low + _scale_value(job, element.max)
  if zero is None:
    ends = [_scale_value(job, end) for end in _scaling.ends(job.encoder)]
    return jnp.minimum(*ends), jnp.maximum(*ends)  # a scale may be negative
  s, zero = _scale_value(job), zero.astype(jnp.float32)
  return -zero * s, (element.max - zero) * s


def _mask(job: core.Job, y, backward: str, held: bool = False):
  """Where the gradient passes; `held` if the scales do not follow from x."""
  x = job.blocks.view
  if backward == 'clipped':
    low, high = _range(job)
    slack = jnp.abs(x) * _scale_slack(job.fmt, held)
    if (job.fmt.zero_point or job.fmt.minimum) and not held:
      slack = slack + _scale_value(job, 0.5)
    return (x >= low - slack) & (x <= high + slack)
  trust = _largest_step(job.fmt) / 2
  return jnp.abs(x - y) <= jnp.abs(_scale_value(job, trust))


def _scale_slack(fmt: BlockFormat, held: bool) -> float:
  """The share of x by which rounding may move the ends of the range.

  Four roundings of float32 lie between a block maximum and F s, and where the
  scale follows from it, the rounding of the scale to its format. Powers of two
  are chosen by a rule, and exact.
  """
  if fmt.has_exponent_scale:
    return 0.0
  bits = 23 if fmt.scale is None else fmt.scale.mantissa_bits
  return 2.0**-21 + (0.0 if held else 2.0 ** -(bits + 1))


def _scale_axes(fmt: BlockFormat, blocks: core.Blocks) -> tuple[int, ...]:
  """The axes of the view that share a scale."""
  return blocks.inner if fmt.scale else tuple(range(blocks.view.ndim))


def _largest_step(fmt: BlockFormat) -> float:
  values = fmt.element.values()
  values = np.unique(values[np.isfinite(values)])
  return float(np.max(np.diff(values)))


def _absmax_slopes(job: core.Job, y, rule: str):
  """Per element: where the scale's gradient goes, and q_j - x_j / s."""
  x, inner = job.blocks.view, _scale_axes(job.fmt, job.blocks)
  s = _scale_value(job)
  inverse = _scaling.reciprocal(s)
  magnitude = jnp.abs(x)
  amax = jnp.max(magnitude, axis=inner, keepdims=True, initial=0)
  at_max = (magnitude == amax) & (amax > 0)
  count = jnp.sum(at_max, axis=inner, keepdims=True)
  ratio = s * _scaling.reciprocal(amax)
  weight = abs(_scaling.reach(job.fmt.element, rule)) * ratio * jnp.abs(ratio)
  share = weight * _scaling.reciprocal(count.astype(jnp.float32))
  direction = jnp.where(at_max, jnp.sign(x) * share, 0)
  return direction, (y - x) * inverse


def _lsq_slope(job: core.Job, y):
  """d y / d scale, times the learned-step-size factor 1 / sqrt(n F)."""
  x, blocks = job.blocks.view, job.blocks
  tensor = job.scales.tensor_scale
  outer = 1.0 if tensor is None else blocks.expand(tensor)
  inverse = _scaling.reciprocal(_scale_value(job))
  inside = _mask(job, y, 'clipped', held=True)
  element = y
  if job.scales.minimum is not None:
    element = y - job.scales.minimum.astype(jnp.float32)
  slope = jnp.where(inside, (y - x) * inverse, element * inverse)
  n = np.maximum(core.block_counts(blocks), 1)
  return slope * outer / blocks.expand(np.sqrt(n * job.fmt.element.max))
