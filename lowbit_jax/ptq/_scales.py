"""Scales of weights: how far the largest of a block is from what it becomes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import ops, qarray
from lowbit_jax._typing import ScaleRule
from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.ptq import _grid
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.qarray import QArray

# Shares of the range of a block that scales are tried for, those of the OptQ
# family: 1 - .8 i / 100.
FRACTIONS = tuple(1 - 0.8 * i / 100 for i in range(100))
# The same for elements that are floats: the distances of their largest numbers
# are large, so that a block may lose less where its largest one lies lower.
FRACTIONS_OF_FLOATS = (1.0, *(i / 16 for i in range(12, 29) if i != 16))
# Those of AWQ: 1 - i / 20 down to a half.
CLIPPED_FRACTIONS = tuple(1 - i / 20 for i in range(10))
# Shares of scales that are powers of two.
NEIGHBOURS = 1.0, 2.0, 0.5


def rtn(scale_rule: ScaleRule | None = None) -> Step:
  """Rounds weights to the nearest number of the format.

  Args:
    scale_rule: as in `quantize`; None for that of the format.
  """

  def step(layer: Layer) -> Layer:
    quantized = ops.quantize(
      layer.weight, layer.fmt, axis=-2, scale_rule=scale_rule
    )
    return layer._replace(quantized=quantized)

  return step


def search_scales(
  *,
  power: float = 2.0,
  weighted: bool = False,
  fractions: Sequence[float] | None = None,
) -> Step:
  """Scales for which the weights of a block change least.

  For each block it tries shares of the scale that the layer has and keeps the
  one with the least sum of |w - q|^power; the first of equal ones. Minima are
  shared out as scales are, zero points stay.

  Args:
    power: of differences, positive; 2.4 in GPTQ's own search.
    weighted: whether differences count as much as the mean square of the
      activations that they meet (the importance matrix of GGML). A layer
      without statistics is not weighted.
    fractions: of the scale, the ordinary one first. By default 1 to .21; for
      elements that are floats, such as those of NVFP4, .75 to 1.75; of scales
      that are powers of two the neighbours.
  """
  if not 0 < power < float('inf'):
    raise ValueError(f'{power=} must be a positive number')
  given = None if fractions is None else tuple(map(float, fractions))
  if given is not None and not (
    given and all(0 < f < float('inf') for f in given)
  ):
    raise ValueError(f'{fractions=} must be positive numbers, one at least')

  def step(layer: Layer) -> Layer:
    importance = None
    if weighted and layer.statistics is not None:
      importance = jnp.diagonal(layer.statistics.moments)
    like = layer.rounded()
    if like.scale is None:
      return layer._replace(quantized=like)
    shares = given or _ordinary(layer.fmt)
    found = _searched(layer.weight, like, importance, shares, power)
    return layer._replace(quantized=found)

  return step


def _ordinary(fmt: BlockFormat) -> tuple[float, ...]:
  """Shares that are tried where none are given."""
  if fmt.has_exponent_scale:
    return NEIGHBOURS
  is_float = isinstance(fmt.element, FloatFormat)
  return FRACTIONS_OF_FLOATS if is_float else FRACTIONS


def clip(percentile: float) -> Step:
  """Scales that clip the largest magnitudes of each block.

  A block has the share of its scale that the percentile of its magnitudes is of
  the largest one, so that what lies above is clipped. Minima are shared out as
  scales are, zero points stay. A block whose percentile is 0 keeps its scale.
  Scales that are powers of two change by factors of two only.

  Args:
    percentile: above 0 and at most 100; between two magnitudes it is linear.
  """
  if not 0 < percentile <= 100:
    raise ValueError(f'{percentile=} must be above 0 and at most 100')

  def step(layer: Layer) -> Layer:
    like = layer.rounded()
    if like.scale is None:
      return layer._replace(quantized=like)
    shape = _BlockShape.of(like)
    shares = _shares_of_percentile(layer.weight, percentile, shape)
    return layer._replace(quantized=with_shares(layer.weight, like, shares))

  return step


class _BlockShape(NamedTuple):
  """How the inputs of a weight fill its blocks.

  Attributes:
    blocks: how many there are, with those of padding.
    size: inputs of each.
  """

  blocks: int
  size: int

  @classmethod
  def of(cls, q: QArray) -> '_BlockShape':
    q = qarray.one_level(q)
    size = _grid.block_size(q.fmt, q.shape[-2])
    return cls(len(q.scale), size)

  def split(self, x: jax.Array, fill: float = 0) -> jax.Array:
    """From (in, out) to (blocks, size, out)."""
    pad = self.blocks * self.size - len(x)
    x = jnp.pad(x, ((0, pad), (0, 0)), constant_values=fill)
    return x.reshape(self.blocks, self.size, x.shape[-1])

  def diagonal(self, moments: jax.Array) -> jax.Array:
    """From (in, in) to the blocks on the diagonal, (blocks, size, size)."""
    rows = self.split(moments)
    columns = jax.vmap(lambda own: self.split(own.T))(rows)
    return columns[jnp.arange(self.blocks), jnp.arange(self.blocks)]


@functools.partial(jax.jit, static_argnums=2)
def _shares_of_percentile(
  weight: jax.Array, percentile: float, shape: _BlockShape
) -> jax.Array:
  """(blocks, out): percentile of the magnitudes over the largest of them."""
  magnitude = shape.split(jnp.abs(weight), jnp.nan)
  largest = jnp.nanmax(magnitude, 1)
  bound = jnp.nanpercentile(magnitude, percentile, 1)
  return jnp.where(bound > 0, bound / largest, 1)


def clipped_for_outputs(
  weight: jax.Array, like: QArray, moments: jax.Array
) -> QArray:
  """The shares of scales for which the outputs of each block change least.

  Args:
    weight: (in, out).
    like: a QArray of that shape in blocks along axis -2.
    moments: H (in, in), of which the products of inputs of one block count.
  """
  if like.scale is None:
    return like
  exponents = like.fmt.has_exponent_scale
  shares = NEIGHBOURS if exponents else CLIPPED_FRACTIONS
  products = _BlockShape.of(like).diagonal(moments)
  return _searched(weight, like, products, shares, 2.0)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _searched(
  weight: jax.Array,
  like: QArray,
  importance: jax.Array | None,
  shares: tuple[float, ...],
  power: float,
) -> QArray:
  """With the share for each block whose error is least.

  Args:
    weight: (in, out).
    like: with the whole scales.
    importance: (in,), of each difference; (blocks, size, size), products of
      activations, for the error of outputs; None for differences alone.
    shares: of scales.
    power: of differences, without products.
  """
  shape = _BlockShape.of(like)

  def errors(q):
    difference = ops.dequantize(q, jnp.float32) - weight
    if importance is not None and importance.ndim == 3:
      blocks = shape.split(difference)
      outputs = jnp.einsum('bst,bto->bso', importance, blocks)
      return (blocks * outputs).sum(1)
    difference = jnp.abs(difference) ** power
    if importance is not None:
      difference = difference * importance[:, None]
    return shape.split(difference).sum(1)

  def better(best, share):
    least, kept = best
    error = errors(with_shares(weight, like, share))
    is_less = error < least
    return (
      jnp.where(is_less, error, least),
      jnp.where(is_less, share, kept),
    ), ()

  first, *others = shares
  least = errors(with_shares(weight, like, first))
  start = least, jnp.full(least.shape, first)
  (_, share), _ = jax.lax.scan(better, start, jnp.array(others, jnp.float32))
  return with_shares(weight, like, share)


def with_shares(
  weight: jax.Array, like: QArray, share: jax.Array | float
) -> QArray:
  """A weight in shares (blocks, out) of the scales and minima of a QArray."""
  level = qarray.one_level(like)
  # Of formats whose scales are stored as codes, the numbers.
  scale = _grid.grid(qarray.replace(level, tensor_scale=None)).scale
  return ops.quantize_with(
    weight,
    scale * share,
    like.fmt,
    axis=-2,
    tensor_scale=like.tensor_scale,
    zero_point=like.zero_point,
    minimum=None if level.minimum is None else level.minimum * share,
  )
