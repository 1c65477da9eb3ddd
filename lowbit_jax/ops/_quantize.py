"""quantize, quantize_with and dequantize: arrays to QArrays and back.

Arguments are checked here; the work is one compiled program per shape, format
and options, also where the caller does not jit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit, _quantize as core, qarray
from lowbit_jax._typing import (
  ArrayLike,
  Axis,
  Implementation,
  Key,
  Origin,
  ScaleRule,
  Shape,
)
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _rounding, _scaling
from lowbit_jax.ops import _dispatch, _quantize_kernels
from lowbit_jax.qarray import QArray, dequantize as dequantize
from lowbit_jax.transforms import Hadamard
from lowbit_pallas.arith.codec import RANDOM_BITS


class Options(NamedTuple):
  """Everything about a quantization that is not an array."""

  fmt: BlockFormat
  axes: tuple[int, ...]
  rule: ScaleRule
  rounding: str
  random_bits: int
  full_shape: tuple[int, ...] | None
  backward: str = 'identity'
  implementation: Implementation = None
  rotation: int = 0
  prescale: float = 1.0


class Extras(NamedTuple):
  """Its array arguments besides x and given scales, all without gradient."""

  key: Key | None
  start: tuple
  tensor_scale: ArrayLike | None
  signs: jax.Array | None = None


def quantize(
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
  rotation: Hadamard | None = None,
  implementation: Implementation = None,
) -> QArray:
  """Quantizes an array into packed codes and stored scales.

  x ~ element * scale * tensor_scale, with one scale per block of `fmt` and the
  elements rounded by `rounding`.

  Args:
    x: float16, bfloat16 or float32, of any shape but 0-d.
    fmt: a block format; its name alone fixes the block geometry.
    axis: the block axis; two axes for tiles, the first of which is packed. None
      stands for the last axis (the last two for tiles). Other formats take
      adjacent axes in a tuple, such as (heads, size) of an attention, through
      which blocks run as through one. A size that blocks do not divide is
      padded with zeros inside.
    scale_rule: how scales follow from the data; None for the format's own.
      Powers of two: 'floor', 'ceil', 'even', 'rceil', 'round', 'mse'. Float
      scales: 'absmax', 'absmean', 'sweep', 'least_squares', and for integers
      and uneven tables 'signed_absmax' and 'full_range'. NVFP4: 'absmax',
      'four_over_six', 'sweep'. Zero points: 'minmax'. Minima: 'minmax',
      'least_squares'. Or a hashable function `(x, mask)` of
      the blocks, float32 (..., n) with zeros in place of padding, and of a mask
      of this shape that is False there, to the float scale of each block
      (...): it is rounded to the scale format, after a division by the tensor
      scale where there is one. Without block scales it gets all elements as one
      block.
    rounding: 'nearest_even', 'toward_zero', 'stochastic', or 'dithered' for
      integer elements (subtractive: give the key to `dequantize` as well).
    key: PRNG key for 'stochastic' and 'dithered'.
    random_bits: random bits per element for 'stochastic', 1 to 23 (all).
    tensor_scale: a held tensor scale in place of the current one, for formats
      that have one.
    origin: `(start, full_shape)` where x is a slice of a larger array, so that
      random bits agree with those of the whole; for `shard_map`.
    rotation: `transforms.Hadamard` along the block axis that x goes through
      first, in the same pass where a kernel does it; the result stands for the
      rotated array.
    implementation: 'tpu', 'mosaic_gpu', 'cpu' or 'xla', or a list of names; the
      first that supports the operands runs. None tries all of them, kernels
      first. All give the same bits, but for the order of the sums of a
      rotation.

  Returns:
    A QArray of the shape and dtype of `x`. A block that holds NaN or Inf is
    NaN, others are not affected; a block below 2^-126 is zero. Elements beyond
    the range saturate. On explicit mesh axes it is split as `x`, along block
    axes only where every shard is a QArray without padding.

  Raises:
    TypeError, ValueError: for formats, dtypes, axes, rules and keys that do
      not fit, with the remedy.

  The result carries no gradient with respect to `x`; `fake_quant` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> q = lowbit.quantize(jnp.ones((2, 64)), lowbit.formats.mxfp4)
    >>> q.shape, q.nbytes
    ((2, 64), 68)
  """
  rows, extras, options = operands(
    x,
    fmt,
    axis=axis,
    scale_rule=scale_rule,
    rounding=rounding,
    key=key,
    random_bits=random_bits,
    tensor_scale=tensor_scale,
    origin=origin,
    rotation=rotation,
    implementation=implementation,
  )
  return unmerged(_quantize(rows, extras, options), np.shape(x), axis)


def operands(
  x: ArrayLike | jax.ShapeDtypeStruct,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  scale_rule: ScaleRule | None = None,
  rounding: str = 'nearest_even',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
  tensor_scale: ArrayLike | None = None,
  origin: Origin | None = None,
  rotation: Hadamard | None = None,
  implementation: Implementation = None,
) -> tuple[Any, Extras, Options]:
  """Arguments of `quantize`, checked: (x, extras, options)."""
  core.check_format(fmt)
  if not isinstance(x, jax.ShapeDtypeStruct):
    x = jax.lax.stop_gradient(core.check_array(x, fmt))
  x, axes = merged(x, fmt, axis, origin)
  rule = _scaling.check_scale_rule(fmt, scale_rule)
  _rounding.check_rounding(rounding, key, random_bits)
  core.check_tensor_scale(tensor_scale)
  start, full_shape = split_origin(origin)
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  options = Options(
    fmt,
    axes,
    rule,
    rounding,
    random_bits,
    full_shape,
    implementation=implementation,
    rotation=_check_rotation(rotation, x, axes),
  )
  signs = None if rotation is None else rotation.signs
  return x, Extras(key, start, tensor_scale, signs), options


def merged(
  x: Any, fmt: BlockFormat, axis: Axis, origin: Origin | None = None
) -> tuple[Any, tuple[int, ...]]:
  """`x` with one axis for those that blocks span together, and the block axes.

  Args:
    x: an array or a `jax.ShapeDtypeStruct`.
    fmt: the format.
    axis: as in `quantize`.
    origin: as in `quantize`, refused where axes are merged.
  """
  spanned = qarray.spanned_axes(fmt, axis, x.ndim)
  if spanned is None:
    return x, qarray.block_axes(fmt, axis, x.ndim)
  if origin is not None:
    raise ValueError(
      f'{origin=} counts in axes that blocks span together, axis={axis}: merge'
      ' them in x and in origin first'
    )
  x = qarray.merge(x, spanned)
  return x, qarray.block_axes(fmt, spanned[-1], x.ndim)


def unmerged(q: QArray, shape: Shape, axis: Axis) -> QArray:
  """The QArray of what `merged` made of an array of `shape`, in that shape."""
  spanned = qarray.spanned_axes(q.fmt, axis, len(shape))
  if spanned is None:
    return q
  return qarray.replace(q, merged=tuple(shape[a] for a in spanned[1:]))


def _check_rotation(rotation: Hadamard | None, x, axes) -> int:
  """The block of a rotation along the block axis, 0 for none."""
  if rotation is None:
    return 0
  if not isinstance(rotation, Hadamard):
    raise TypeError(
      f'rotation={rotation!r} must be a transforms.Hadamard; apply other'
      ' transforms before'
    )
  if axes != (rotation.axis,):
    raise ValueError(
      f'rotation.axis={rotation.axis} must be the block axis, {axes}'
    )
  jax.eval_shape(rotation.apply, jax.ShapeDtypeStruct(x.shape, x.dtype))
  return rotation.block


def quantize_with(
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
) -> QArray:
  """Quantizes with given scales: calibrated, learned or held.

  Args:
    x: float16, bfloat16 or float32.
    scale: block scales of the shape that `quantize` makes, either float numbers
      (rounded to the scale format) or, for formats of at most 8 bits, uint8
      codes. None for formats without block scale.
    fmt: a block format.
    axis: as in `quantize`.
    tensor_scale: the tensor scale, for formats that have one.
    zero_point: integer zero points of the shape of `scale`, for formats that
      have them; clipped to 0 ... 2^bits - 1, the codes of the element.
    minimum: float minima of the shape of `scale`, for formats that have them,
      rounded as scales are. With two levels of scales, scale and minimum are
      quantized in their turn, minima above 0 to 0, or QArrays that are kept.
    rounding: as in `quantize`; also `key`, `random_bits`, `origin`.

  Returns:
    A QArray. Inf saturates, and NaN becomes zero, or NaN in elements that have
    it: poison is a matter of scales, and these are given.
  """
  core.check_format(fmt)
  x = jax.lax.stop_gradient(core.check_array(x, fmt))
  rows, axes = merged(x, fmt, axis, origin)
  _rounding.check_rounding(rounding, key, random_bits)
  leaves = scale, tensor_scale, zero_point, minimum
  scales = check_scales(rows.shape, fmt, axes, leaves)
  start, full_shape = split_origin(origin)
  options = Options(fmt, axes, '', rounding, random_bits, full_shape)
  q = _quantize_with(rows, scales, Extras(key, start, None), options)
  return unmerged(q, x.shape, axis)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _quantize(x, extras: Extras, options: Options) -> QArray:
  def run(x, extras):
    return _dispatch.run(
      'quantize', TABLE, options.implementation, (x, extras), options
    )

  return _explicit.automatic(run, _specs, x, extras)


def _specs(q: QArray, x, *rest) -> QArray:
  """Specs of the leaves: split as x is, where shards are whole QArrays."""
  del rest
  sizes = jax.typeof(x).sharding.mesh.shape
  parts = _explicit.parts(x)
  for k, axis in enumerate(q.axes):
    shards = _explicit.shards(parts[axis], sizes)
    if shards > 1 and (q.pad[k] or qarray.cuts(q, k, shards)):
      parts[axis] = None
  return qarray.leaf_specs(q, parts)


def _plan_xla(x, extras: Extras, options: Options) -> _dispatch.Plan:
  del x, extras

  def run(x, extras: Extras):
    if options.rotation:
      (axis,) = options.axes
      x = Hadamard(options.rotation, axis, extras.signs).apply(x)
    return core.pack(data_job(x, extras, options), x.dtype)

  return _dispatch.Plan('block maxima, scales, codes, packing', run)


def data_job(x: jax.Array, extras: Extras, options: Options) -> core.Job:
  """The quantization of an array with scales from its data, not yet run."""
  rounding = rounding_of(options, extras)
  fmt, axes, rule = options.fmt, options.axes, options.rule
  job = core.from_data(x, fmt, axes, rule, rounding, extras.tensor_scale)
  return job.prescaled(options.prescale)


def _plan_cpu(*arguments: Any) -> _dispatch.Plan:
  from lowbit_jax.ops import _quantize_cpu

  return _quantize_cpu.plan(*arguments)


TABLE = {
  'tpu': functools.partial(_quantize_kernels.plan, 'tpu'),
  'mosaic_gpu': functools.partial(_quantize_kernels.plan, 'mosaic_gpu'),
  'cpu': _plan_cpu,
  'xla': _plan_xla,
}


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _quantize_with(x, scales, extras: Extras, options: Options) -> QArray:
  def run(x, scales, extras):
    rounding = rounding_of(options, extras)
    job = core.from_scales(x, options.fmt, options.axes, scales, rounding)
    return core.pack(job, x.dtype)

  return _explicit.automatic(run, _specs, x, scales, extras)


def split_origin(origin: Origin | None) -> tuple[tuple, tuple[int, ...] | None]:
  """Starts as arguments of a compiled function, and the full shape."""
  if origin is None:
    return (), None
  start, full_shape = _rounding.check_origin(origin)
  # Python ints beyond int32 cannot be arguments.
  start = (np.uint32(s) if isinstance(s, int) else s for s in start)
  return tuple(start), tuple(full_shape)


def rounding_of(options: Options, extras: Extras) -> core.Rounding:
  full_shape = options.full_shape
  origin = None if full_shape is None else (extras.start, full_shape)
  bits = options.random_bits
  return core.Rounding(options.rounding, extras.key, bits, origin)


def check_scales(
  shape: Shape,
  fmt: BlockFormat,
  axes: tuple[int, ...],
  leaves: tuple[Any, ...],
) -> core.Scales:
  """Given scales in stored form, or an error that says what they should be.

  Args:
    shape: of the array.
    fmt: the format.
    axes: its block axes.
    leaves: scale, tensor_scale, zero_point and minimum, each or None.
  """
  scale, tensor_scale, zero_point, minimum = leaves
  padded = list(shape)
  pads = qarray.padding(shape, fmt, axes)
  for axis, pad in zip(axes, pads, strict=True):
    padded[axis] += pad
  expected = qarray.scale_shape(padded, fmt, axes)

  def check(name, leaf, wanted, leaf_shape) -> Any:
    if (leaf is not None) != wanted:
      state = 'needed' if wanted else 'not a part of the format'
      raise ValueError(f'{name} is {state} for {fmt}')
    if leaf is None:
      return None
    if not (isinstance(leaf, QArray) and fmt.scale_blocks):
      leaf = jnp.asarray(leaf)
    if leaf.shape != leaf_shape:
      raise ValueError(
        f'{name}.shape={leaf.shape} must be {leaf_shape} for x.shape={shape} in'
        f' {fmt}'
      )
    return leaf

  scale = check('scale', scale, fmt.scale is not None, expected)
  minimum = check('minimum', minimum, fmt.minimum, expected)
  zero_point = check('zero_point', zero_point, fmt.zero_point, expected)
  if tensor_scale is not None:
    if np.iscomplexobj(tensor_scale):
      raise TypeError(f'{tensor_scale=} must be a real number')
    tensor_scale = jnp.asarray(tensor_scale, jnp.float32)
    if tensor_scale.size == 1:
      tensor_scale = tensor_scale.reshape((1,) * len(shape))
  tensor_scale = check(
    'tensor_scale', tensor_scale, fmt.tensor_scale, (1,) * len(shape)
  )
  levels = [q for q in (scale, minimum) if isinstance(q, QArray)]
  if levels:
    if len(levels) != 1 + fmt.minimum or any(
      q.fmt != fmt.scale_blocks for q in levels
    ):
      raise ValueError(f'scales {levels} of {fmt} must be {fmt.scale_blocks}')
    return core.Scales(stored=(scale, minimum))
  if scale is not None:
    assert fmt.scale is not None
    coded = _scaling.is_coded(fmt.scale)
    if jnp.issubdtype(scale.dtype, jnp.floating):
      scale = _scaling.from_values(scale, fmt.scale)
    elif not coded or scale.dtype != jnp.uint8:
      codes = ' or uint8 codes' if coded else ''
      raise TypeError(f'scale.dtype={scale.dtype} must be float{codes}')
  if minimum is not None:
    if not jnp.issubdtype(minimum.dtype, jnp.floating):
      raise TypeError(f'minimum.dtype={minimum.dtype} must be float')
    assert fmt.scale is not None
    minimum = _scaling.from_values(minimum, fmt.scale)
  if zero_point is not None:
    if not jnp.issubdtype(zero_point.dtype, jnp.integer):
      raise TypeError(
        f'zero_point.dtype={zero_point.dtype} must be an integer type; round'
        f' zero points to 0 ... {fmt.element.code_max} first'
      )
    top = fmt.element.code_max
    zero_point = zero_point.astype(jnp.float32)  # holds 0 to 255, and beyond
    zero_point = jnp.clip(zero_point, 0, top).astype(jnp.uint8)
  return core.Scales(scale, tensor_scale, zero_point, minimum)
