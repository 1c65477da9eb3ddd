"""GPTQ: rounding of one input after the other, each making up for those before.

The error of the outputs of a layer is tr(D' H D), with D = W - Q and H the mean
products of the activations. With H = R R' for an upper triangular R,

  D' H D  =  sum over k of R[k, k]^2 e_k^2,
  e_k     =  d_k + sum over j < k of d_j R[j, k] / R[k, k],

so that, once the rows before k are rounded, the best number for row k is the
one next to w_k + sum over j < k of d_j R[j, k] / R[k, k]. That is the same as
GPTQ's loop over the inverse of H, without an inverse (QuIP, appendix B).

References: GPTQ, arXiv:2210.17323; QuIP, arXiv:2307.13304; static reordering of
activations: arXiv:2509.23202.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.formats import ElementFormat
from lowbit_jax.ptq import _grid
from lowbit_jax.ptq._grid import Grid
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.qarray import QArray

# Rows that are rounded one by one before their errors reach the others, and in
# how many parts of different size those others are summed.
_ROWS, _PARTS = 64, 4


def gptq(damping: float = 0.01, *, ordered: bool = True) -> Step:
  """Rounds weights so that the outputs of a layer change least.

  Scales are those that the layer has, by default of the nearest neighbour. One
  without statistics stays as it is.

  Args:
    damping: share of the mean of the diagonal of H that is added to it, at
      least 0.
    ordered: takes inputs with large activations first; scales and blocks are
      those of the order in the weight.

  Returns:
    A step. It raises ValueError for a layer whose H is singular and not damped.
  """
  if not 0 <= damping < float('inf'):
    raise ValueError(f'{damping=} must be a number of at least 0')

  def step(layer: Layer) -> Layer:
    if layer.statistics is None:
      return layer._replace(quantized=layer.rounded())
    moments = np.asarray(layer.statistics.moments, np.float64)
    like = layer.rounded()
    order = _order(moments) if ordered else np.arange(len(moments))
    try:
      factor = feedback(moments[np.ix_(order, order)], damping)
    except np.linalg.LinAlgError as error:
      raise ValueError(
        f'the mean products of the activations of {layer.path!r} are singular:'
        f' give more batches, or a larger {damping=}'
      ) from error
    quantized = round_with_feedback(layer.weight, like, factor, order)
    return layer._replace(quantized=quantized)

  return step


def _order(moments: np.ndarray) -> np.ndarray:
  return np.argsort(-np.diagonal(moments), kind='stable')


def damped(moments: np.ndarray, damping: float) -> np.ndarray:
  """H with a share of the mean of its diagonal added to that; float64.

  Inputs without activations get a 1 first.
  """
  h = np.array(moments, np.float64)
  diagonal = np.einsum('ii->i', h)
  diagonal[diagonal <= 0] = 1
  diagonal += damping * diagonal.mean()
  return h


def feedback(moments: np.ndarray, damping: float) -> np.ndarray:
  """How much of the error of each input later ones make up for.

  Args:
    moments: H (in, in). An input without activations has none to make up for.
    damping: as in `gptq`.

  Returns:
    R[j, k] / R[k, k] above the diagonal, zeros elsewhere; float32 (in, in).

  Raises:
    numpy.linalg.LinAlgError: for a matrix that is not positive definite.
  """
  h = damped(moments, damping)
  upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
  upper = upper / np.diagonal(upper)
  return np.triu(upper, 1).astype(np.float32)


def round_with_feedback(
  weight: jax.Array, like: QArray, factor: np.ndarray, order: np.ndarray
) -> QArray:
  """Rounds one input after the other.

  Args:
    weight: (in, out).
    like: a QArray of the same shape in blocks along axis -2, whose scales are
      kept.
    factor: (in, in), what `feedback` returns for inputs in that order.
    order: (in,), a permutation of the inputs.

  Returns:
    A QArray with the scales of `like`.
  """
  size = _grid.block_size(like.fmt, len(weight))
  blocks = jnp.asarray(order // size)
  rounded = _rounded(
    weight[order], _grid.grid(like), blocks, factor, like.fmt.element
  )
  values = jnp.zeros_like(rounded).at[order].set(rounded)
  return _grid.with_values(values, like)


class _Padded(NamedTuple):
  """Rows in their order, padded to a multiple of _ROWS by rows of zeros."""

  weight: jax.Array
  blocks: jax.Array
  factor: jax.Array


@functools.partial(jax.jit, static_argnums=4)
def _rounded(weight, grid: Grid, blocks, factor, element) -> jax.Array:
  inputs = len(weight)
  pad = -inputs % _ROWS
  rows = _Padded(
    jnp.pad(weight, ((0, pad), (0, 0))),
    jnp.pad(blocks, (0, pad)),
    jnp.pad(factor, ((0, pad), (0, pad))),
  )
  groups = len(rows.weight) // _ROWS
  # Parts of the loop, so that sums have as many rows as are rounded, or a few
  # more.
  bounds = sorted({groups * i // _PARTS for i in range(_PARTS + 1)})
  out = jnp.zeros_like(rows.weight)
  for first, last in zip(bounds, bounds[1:], strict=False):
    body = functools.partial(_round_group, rows, grid, element, last * _ROWS)
    out = lax.fori_loop(first, last, body, out)
  return out[:inputs]


def _round_group(
  rows: _Padded,
  grid: Grid,
  element: ElementFormat,
  seen: int,
  group: jax.Array,
  out: jax.Array,
) -> jax.Array:
  """Rounds _ROWS rows after those before them, which are in `out`; none behind
  the first `seen` rows is."""
  first = group * _ROWS
  cut = functools.partial(
    lax.dynamic_slice_in_dim, start_index=first, slice_size=_ROWS
  )
  weight, blocks = cut(rows.weight), cut(rows.blocks)
  factor = cut(rows.factor[:seen], axis=1)

  # What the rows before the group leave: later ones have no error yet.
  is_done = jnp.arange(seen, dtype=jnp.int32)[:, None] < first
  left = jnp.where(is_done, rows.weight[:seen] - out[:seen], 0)
  target = weight + lax.dot(factor.T, left, precision=lax.Precision.HIGHEST)

  # One row after the other, each of which changes those that follow.
  own = lax.dynamic_slice_in_dim(factor, first, _ROWS)

  def round_row(i, carry):
    target, rounded = carry
    value = grid.rows(blocks[i]).nearest(target[i], element)
    target = target + own[i][:, None] * (weight[i] - value)
    return target, rounded.at[i].set(value)

  _, rounded = lax.fori_loop(0, _ROWS, round_row, (target, weight))
  return lax.dynamic_update_slice_in_dim(out, rounded, first, 0)
