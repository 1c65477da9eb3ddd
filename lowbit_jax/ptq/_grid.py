"""The numbers that a block format offers for each weight, once scales are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import ops, qarray
from lowbit_jax.formats import BlockFormat, ElementFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.numerics._codec import spec
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith import codec


class Grid(NamedTuple):
  """Scales of a matrix (in, out) as float32 numbers; (blocks, out) each.

  Attributes:
    scale: of the elements, that of the tensor included.
    zero_point: None, or what is subtracted from integers.
    minimum: None, or what is added to the product.
  """

  scale: jax.Array
  zero_point: jax.Array | None = None
  minimum: jax.Array | None = None

  def rows(self, block: jax.Array) -> 'Grid':
    """The scales of some blocks, by number."""
    return jax.tree.map(lambda leaf: leaf[block], self)

  def nearest(self, w: jax.Array, element: ElementFormat) -> jax.Array:
    """The numbers next to weights of the shape of the scales."""
    y = self.levels(w)
    if self.zero_point is None:
      coder = spec(element)
      levels = codec.decode(codec.encode(y, coder), coder)
    else:
      code = jnp.round(y) + self.zero_point
      levels = jnp.clip(code, 0, element.code_max) - self.zero_point
    return self.values(levels)

  def neighbours(
    self, w: jax.Array, element: ElementFormat
  ) -> tuple[jax.Array, jax.Array]:
    """The levels on both sides of weights of the shape of the scales.

    Both are the same for a weight that has a level, and beyond the last one.
    """
    table = _numbers(element)
    zero = 0 if self.zero_point is None else self.zero_point
    y = jnp.clip(self.levels(w) + zero, table[0], table[-1])
    low = jnp.searchsorted(table, y, side='right') - 1
    high = jnp.searchsorted(table, y)
    return table[low] - zero, table[high] - zero

  def levels(self, w: jax.Array) -> jax.Array:
    """Weights in units of their scale; 0 where that is 0."""
    shifted = w if self.minimum is None else w - self.minimum
    is_zero = self.scale == 0
    return jnp.where(is_zero, 0, shifted / jnp.where(is_zero, 1, self.scale))

  def values(self, levels: jax.Array) -> jax.Array:
    """What elements of some levels stand for."""
    out = levels * self.scale
    return out if self.minimum is None else out + self.minimum


def _numbers(element: ElementFormat) -> jax.Array:
  """All that encoding to an element produces, ascending; float32."""
  values = element.values()
  values = values[np.isfinite(values)]
  # Of signed integers -2^(b - 1) is decoded only.
  return jnp.asarray(
    np.unique(np.clip(values, -element.max, element.max)), jnp.float32
  )


def grid(q: QArray) -> Grid:
  """Of a QArray (in, out) in blocks along axis -2."""
  q = qarray.one_level(q)
  shape = 1, q.codes.shape[-1]
  scale = jnp.ones(shape, jnp.float32)
  if q.scale is not None:
    assert q.fmt.scale is not None
    for factor in _scaling.factors(q.scale, q.fmt.scale):
      scale = scale * factor
  if q.tensor_scale is not None:
    scale = scale * q.tensor_scale
  zero_point, minimum = (
    None if leaf is None else leaf.astype(jnp.float32)
    for leaf in (q.zero_point, q.minimum)
  )
  return Grid(scale, zero_point, minimum)


def block_size(fmt: BlockFormat, inputs: int) -> int:
  """Inputs that share a scale."""
  return fmt.block[0] or inputs


def grid_of_inputs(q: QArray) -> Grid:
  """Of a QArray (in, out), with the scales of each input: (in, out)."""
  inputs = q.shape[-2]
  return grid(q).rows(jnp.arange(inputs) // block_size(q.fmt, inputs))


def with_values(values: jax.Array, like: QArray) -> QArray:
  """The numbers (in, out) of a grid, in the scales of another QArray."""
  return ops.quantize_with(
    values,
    like.scale,
    like.fmt,
    axis=-2,
    tensor_scale=like.tensor_scale,
    zero_point=like.zero_point,
    minimum=like.minimum,
  )
