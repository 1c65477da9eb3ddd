"""Scales of weights: how far the largest of a block is from what it becomes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowbit_jax import ops, qarray
from lowbit_jax._typing import ScaleRule
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _grid
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.qarray import QArray

# Shares of the range of a block that scales are tried for, those of the OptQ
# family: 1 - .8 i / 100.
FRACTIONS = tuple(1 - 0.8 * i / 100 for i in range(100))
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
    fractions: of the scale, the ordinary one first. By default `FRACTIONS`, of
      scales that are powers of two the neighbours.
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
    if like.scale is None and like.minimum is None:
      return layer._replace(quantized=like)
    ordinary = NEIGHBOURS if layer.fmt.has_exponent_scale else FRACTIONS
    shares = ordinary if given is None else given
    found = _searched(layer.weight, like, importance, shares, power)
    return layer._replace(quantized=found)

  return step


@functools.partial(jax.jit, static_argnums=(3, 4))
def _searched(
  weight: jax.Array,
  like: QArray,
  importance: jax.Array | None,
  shares: tuple[float, ...],
  power: float,
) -> QArray:
  level = qarray.one_level(like)
  # Of formats whose scales are stored as codes, the numbers.
  scale = _grid.grid(qarray.replace(level, tensor_scale=None)).scale
  minimum = level.minimum

  def with_share(share):
    return ops.quantize_with(
      weight,
      scale * share,
      like.fmt,
      axis=-2,
      tensor_scale=like.tensor_scale,
      zero_point=like.zero_point,
      minimum=None if minimum is None else minimum * share,
    )

  def errors(q):
    difference = jnp.abs(ops.dequantize(q, jnp.float32) - weight) ** power
    if importance is not None:
      difference = difference * importance[:, None]
    return _by_block(difference, like.fmt, len(scale))

  def better(best, share):
    least, kept = best
    error = errors(with_share(share))
    is_less = error < least
    return (
      jnp.where(is_less, error, least),
      jnp.where(is_less, share, kept),
    ), ()

  first, *others = shares
  start = errors(with_share(first)), jnp.full(scale.shape, first)
  (_, share), _ = jax.lax.scan(better, start, jnp.array(others, jnp.float32))
  return with_share(share)


def _by_block(x: jax.Array, fmt: BlockFormat, blocks: int) -> jax.Array:
  """Sums over blocks: from (in, out) to (blocks, out)."""
  size = _grid.block_size(fmt, len(x))
  x = jnp.pad(x, ((0, blocks * size - len(x)), (0, 0)))
  return x.reshape(blocks, size, -1).sum(1)
