"""AWQ: scales of inputs, by how large their activations are.

Weights that meet large activations cost most when they are rounded. Multiplied
by s > 1 they are rounded more finely, as long as others of the block are the
largest; activations take 1 / s. The scales are powers of what the activations
are, s = x^a, with the exponent a for which the outputs change least.

The paper has mean magnitudes for x, which calibration does not record; here x
are roots of mean squares. They are the same up to a factor for channels of the
same distribution, and give more to those with outliers.

Reference: AWQ, arXiv:2306.00978.
"""

import functools

import jax
import jax.numpy as jnp

from lowbit_jax import ops
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _scales
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.transforms import DiagonalSmoothing

# Of scales of inputs; those without activations have the least one.
_LEAST, _LARGEST = 1e-4, 1e4


def awq(*, grid: int = 20, clip: bool = True) -> Step:
  """Scales inputs up whose activations are large, so that their weights lose
  less.

  Activations are divided by the scales when the layer runs. Exponents are
  i / grid; with 0, where others gain nothing, there is no transform. It goes in
  front of steps that look for scales of blocks or round. A layer without
  statistics stays as it is.

  Args:
    grid: how many exponents in [0, 1) are tried.
    clip: also tries shares of the scale of each block, down to a half, for what
      its own inputs add to the error, and keeps them if the layer gains.
  """
  if not (isinstance(grid, int) and grid >= 1):
    raise ValueError(f'{grid=} must be an integer of at least 1')

  def step(layer: Layer) -> Layer:
    if layer.statistics is None:
      return layer
    weight, moments = layer.weight, layer.statistics.moments
    rms = layer.statistics.rms
    exponents = jnp.arange(grid, dtype=jnp.float32) / grid
    best = int(jnp.argmin(_errors(weight, moments, rms, exponents, layer.fmt)))
    if best:
      scale = input_scales(rms, exponents[best])
      layer = layer.transformed(DiagonalSmoothing(scale))
    return min(layer, _clipped(layer), key=Layer.error) if clip else layer

  return step


def input_scales(rms: jax.Array, exponent: jax.Array | float) -> jax.Array:
  """Powers of activations, whose least and largest have the product 1.

  Args:
    rms: (in,), root of the mean square of each channel, 0 or more.
    exponent: 0 or more; 0 gives ones.

  Returns:
    (in,), from 1e-4 to 1e4.
  """
  is_live = rms > 0
  least = jnp.min(jnp.where(is_live, rms, jnp.inf))
  middle = jnp.sqrt(least) * jnp.sqrt(jnp.max(rms))
  share = jnp.where(is_live.any(), rms / middle, 1)
  return jnp.clip(share**exponent, _LEAST, _LARGEST)


@functools.partial(jax.jit, static_argnums=4)
def _errors(
  weight: jax.Array,
  moments: jax.Array,
  rms: jax.Array,
  exponents: jax.Array,
  fmt: BlockFormat,
) -> jax.Array:
  """tr(D' H D) for each exponent, D being what the weight changes by."""

  def error(exponent):
    scale = input_scales(rms, exponent)[:, None]
    q = ops.quantize(weight * scale, fmt, axis=-2)
    difference = ops.dequantize(q, jnp.float32) / scale - weight
    return jnp.sum(difference * (moments @ difference))

  return jax.lax.map(error, exponents)


def _clipped(layer: Layer) -> Layer:
  assert layer.statistics is not None
  quantized = _scales.clipped_for_outputs(
    layer.weight, layer.rounded(), layer.statistics.moments
  )
  return layer._replace(quantized=quantized)
