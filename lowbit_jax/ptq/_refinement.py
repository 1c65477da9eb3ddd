"""Blocks of weights that are rounded anew, scale and all, for the outputs.

With D = Q - W, the error of the outputs of a layer is tr(D' H D). Where the
numbers of one block change by d, it changes by

  2 d' G + d' H_b d,   G = (H D)_b,

with the part H_b of H that belongs to the block. Without a grid d = - H_b^-1 G
would be best. For each of some scales that is rounded, and then one number
after the other is replaced by its best neighbour while the rest stays, a few
times. The best of all is kept if the error falls.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import ops
from lowbit_jax.formats import ElementFormat
from lowbit_jax.ptq import _gptq, _grid, _scales
from lowbit_jax.ptq._grid import Grid
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.qarray import QArray

# Shares of scales that lie a step or two of E4M3 apart, and of powers of two.
FRACTIONS = 1.0, 0.94, 1.0625, 0.88, 1.125
NEIGHBOURS = 1.0, 0.5, 2.0
_PASSES = 3  # through the numbers of a block


def refine(
  *,
  sweeps: int = 2,
  damping: float = 0.01,
  fractions: Sequence[float] | None = None,
) -> Step:
  """Tries scales of blocks anew, each with the numbers that suit it best.

  It starts from what the layer has, best from `gptq`, and never makes the error
  of the outputs larger but by `damping`. Scales that are quantized in their
  turn stay as they are. So does a layer without statistics.

  Args:
    sweeps: through all blocks, at least 1.
    damping: as in `gptq`.
    fractions: of each scale; by default those next to it. The first is 1.
  """
  if not isinstance(sweeps, int) or sweeps < 1:
    raise ValueError(f'{sweeps=} must be an integer of at least 1')
  if not 0 <= damping < float('inf'):
    raise ValueError(f'{damping=} must be a number of at least 0')
  if fractions is not None and not (
    len(fractions) and fractions[0] == 1 and min(fractions) > 0
  ):
    raise ValueError(f'{fractions=} must be positive numbers that begin with 1')

  def step(layer: Layer) -> Layer:
    like = layer.rounded()
    if layer.statistics is None:
      return layer._replace(quantized=like)
    own = NEIGHBOURS if layer.fmt.has_exponent_scale else FRACTIONS
    shares = tuple(fractions or own)
    if like.scale is None or layer.fmt.scale_blocks is not None:
      shares = shares[:1]
    moments = _gptq.damped(np.asarray(layer.statistics.moments), damping)
    moments = jnp.asarray(moments, jnp.float32)
    quantized = refined(layer.weight, like, moments, shares, sweeps)
    return layer._replace(quantized=quantized)

  return step


def refined(
  weight: jax.Array,
  like: QArray,
  moments: jax.Array,
  shares: tuple[float, ...],
  sweeps: int,
) -> QArray:
  """A weight (in, out) in other scales and numbers than `like`.

  Args:
    weight: W.
    like: Q at first, in blocks along axis -2.
    moments: H (in, in), positive definite.
    shares: of the scales of `like`, 1 first.
    sweeps: through all blocks.
  """
  if like.scale is None:
    grids = [_grid.grid(like)]
  else:
    candidates = [like] + [
      _scales.with_shares(weight, like, share) for share in shares[1:]
    ]
    grids = list(map(_grid.grid, candidates))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grids)
  size = _grid.block_size(like.fmt, len(weight))
  values, chosen = _refined(
    weight,
    ops.dequantize(like, jnp.float32),
    moments,
    stacked,
    like.fmt.element,
    size,
    sweeps,
  )
  if len(shares) == 1:
    return _grid.with_values(values, like)
  share = jnp.asarray(shares, jnp.float32)[chosen]
  return _grid.with_values(values, _scales.with_shares(weight, like, share))


class _State(NamedTuple):
  """In the course of a sweep.

  Attributes:
    values: Q (in, out), padded to whole blocks.
    products: H (Q - W).
    chosen: (blocks, out), which scale a block has.
  """

  values: jax.Array
  products: jax.Array
  chosen: jax.Array


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _refined(
  weight: jax.Array,
  values: jax.Array,
  moments: jax.Array,
  grids: Grid,
  element: ElementFormat,
  size: int,
  sweeps: int,
) -> tuple[jax.Array, jax.Array]:
  inputs, pad = len(weight), -len(weight) % size
  blocks = (inputs + pad) // size
  # Inputs of padding have no activations: whatever they become costs nothing.
  h = jnp.pad(moments, ((0, pad), (0, pad)))
  h = h + jnp.diag(jnp.where(jnp.arange(inputs + pad) < inputs, 0, 1))
  weight, values = (jnp.pad(x, ((0, pad), (0, 0))) for x in (weight, values))
  chosen = jnp.zeros((blocks, weight.shape[1]), jnp.int32)
  state = _State(values, _product(h, values - weight), chosen)

  def body(i, state):
    return _refine_block(h, grids, element, size, i % blocks, state)

  state = lax.fori_loop(0, sweeps * blocks, body, state)
  return state.values[:inputs], state.chosen


def _refine_block(
  h: jax.Array,
  grids: Grid,
  element: ElementFormat,
  size: int,
  block: jax.Array,
  state: _State,
) -> _State:
  first = block * size
  rows = lax.dynamic_slice_in_dim(h, first, size)
  own = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
  values, slope = (
    lax.dynamic_slice_in_dim(x, first, size)
    for x in (state.values, state.products)
  )
  target = values - jnp.linalg.solve(own, slope)

  def change(share):
    """What a scale makes of the block, and of the error."""
    scales = jax.tree.map(lambda leaf: leaf[share, block], grids)
    new = _descend(own, target, scales, element)
    d = new - values
    return new, jnp.sum(d * (2 * slope + _product(own, d)), 0)

  count = len(grids.scale)
  made, gains = lax.map(change, jnp.arange(count))
  # Nothing changes where nothing is gained.
  made = jnp.concatenate([values[None], made])
  best = jnp.argmin(jnp.concatenate([jnp.zeros_like(gains[:1]), gains]), 0)
  new = jnp.take_along_axis(made, best[None, None], 0)[0]
  chosen = jnp.where(best > 0, best - 1, state.chosen[block])
  return _State(
    lax.dynamic_update_slice_in_dim(state.values, new, first, 0),
    state.products + _product(rows.T, new - values),
    state.chosen.at[block].set(chosen),
  )


def _descend(
  own: jax.Array, target: jax.Array, scales: Grid, element: ElementFormat
) -> jax.Array:
  """Numbers of a grid near a target (size, out), in the metric H_b."""
  diagonal = jnp.diagonal(own)

  def round_row(i, values):
    row = i % len(target)
    # What the others leave of the target, for this number.
    rest = _product(own[row][None], target - values)[0] / diagonal[row]
    value = scales.nearest(values[row] + rest, element)
    return values.at[row].set(value)

  start = jax.vmap(lambda row: scales.nearest(row, element))(target)
  return lax.fori_loop(0, _PASSES * len(target), round_row, start)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return lax.dot(a, b, precision=lax.Precision.HIGHEST)
