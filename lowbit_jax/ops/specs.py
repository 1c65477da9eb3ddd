"""QuantSpecs as functions: the one place that reads all of their fields."""

import jax
import jax.numpy as jnp

from lowbit_jax import _quantize as core, qarray
from lowbit_jax._typing import Key
from lowbit_jax.numerics import _scaling
from lowbit_jax.ops import _fake_quant, _quantize
from lowbit_jax.recipe import QuantSpec
from lowbit_pallas.arith import bits as fb


def quantization(
  x: jax.Array,
  spec: QuantSpec,
  axis: int | tuple[int, ...],
  *,
  key: Key | None = None,
  tensor_amax: jax.Array | None = None,
) -> core.Job:
  """The quantization of an array that a spec describes, not yet run.

  Args:
    x: float16, bfloat16 or float32.
    spec: every field of it counts, but `tensor_scaling`, which is the caller's:
      see `tensor_amax` and `check_stateless`.
    axis: block axis, two for tiles.
    key: PRNG key, used only if the rounding of the spec draws random bits.
    tensor_amax: the largest magnitude that the tensor scale follows, if it is
      held; None for that of x.

  Returns:
    A job whose elements are prescaled: its values are `spec.prescale` times
    those of x.
  """
  axes = qarray.block_axes(spec.fmt, axis, x.ndim)
  extras = _extras(x, spec, axes, key, tensor_amax)
  return _quantize.data_job(x, extras, _options(spec, axes))


def fake_quant(
  x: jax.Array,
  spec: QuantSpec,
  axis: int | tuple[int, ...],
  *,
  key: Key | None = None,
  tensor_amax: jax.Array | None = None,
) -> jax.Array:
  """The values of `quantization` with the gradient of the spec.

  Args:
    x: as in `quantization`, 0-d too; also the other arguments.

  Returns:
    An array of the shape and dtype of `x`, a prescale undone.
  """
  key = key if spec.needs_key else None
  x, shape, axes = _fake_quant.prepare(
    x, spec.fmt, axis, spec.rounding, key, spec.random_bits
  )
  extras = _extras(x, spec, axes, key, tensor_amax)
  y = _fake_quant.compiled(x, extras, _options(spec, axes))
  return jnp.reshape(y, shape)


def check_stateless(name: str, spec: QuantSpec) -> None:
  """Refuses a held tensor scale where there is no state to hold it."""
  if spec.tensor_scaling is not None:
    raise ValueError(
      f'{name}.tensor_scaling={spec.tensor_scaling} holds a scale from step to'
      ' step, and there is no state for it here: drop it for the scale of the'
      ' data, or train with training.linen or training.nnx'
    )


def _options(spec: QuantSpec, axes: tuple[int, ...]) -> _quantize.Options:
  assert spec.scale_rule is not None  # filled in by QuantSpec
  return _quantize.Options(
    spec.fmt,
    axes,
    spec.scale_rule,
    spec.rounding,
    spec.random_bits,
    full_shape=None,
    backward=spec.backward,
    prescale=spec.prescale,
  )


def _extras(x, spec: QuantSpec, axes, key, tensor_amax) -> _quantize.Extras:
  scale = None
  is_given = tensor_amax is not None or spec.target is not None
  if spec.fmt.tensor_scale and (is_given or spec.row_scales):
    scale = _tensor_scale(x, spec, axes, tensor_amax)
  return _quantize.Extras(key if spec.needs_key else None, (), scale)


def _tensor_scale(x, spec: QuantSpec, axes, amax) -> jax.Array:
  """That of all elements, or of each row."""
  if amax is None:
    magnitude = jnp.abs(x.astype(jnp.float32))
    magnitude = jnp.where(jnp.isfinite(magnitude), magnitude, 0)
    rows = axes if spec.row_scales else None
    amax = jnp.max(magnitude, rows, keepdims=spec.row_scales, initial=0)
  else:
    amax = jnp.asarray(amax, jnp.float32).reshape(())
  return _scaling.tensor_scale_from(fb.to_bits(amax), spec.fmt, spec.target)
