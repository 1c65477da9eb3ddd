"""Ranges of activations that are shared out with the weights they meet.

References: SmoothQuant, arXiv:2211.10438.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowbit_jax._tree import by_name
from lowbit_jax._typing import PyTree
from lowbit_jax.ptq import _folding, _statistics
from lowbit_jax.ptq._folding import Fold, Followers, Leaves
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.transforms import DiagonalSmoothing

Statistic = Literal['rms', 'amax']

# How far the scale of 'rms' may be from 1, as a factor.
_LIMIT = 64


def smooth(
  params: PyTree,
  observed: Mapping[str, Any],
  followers: Followers,
  *,
  strength: float = 0.5,
  statistic: Statistic = 'rms',
  head_size: int | None = None,
) -> tuple[PyTree, dict[str, Any]]:
  """Moves ranges of activations into the weights that they meet.

  Channel j of the activations is divided by s_j, and row j of the weights is
  multiplied by it:

    s_j = a_j^strength / b_j^(1 - strength)

  The division is folded into what stands before, kernels first and then norms,
  so that the function of the model stays the same: see `fold`.

  With 'rms', a_j is the root mean square of the channel and b_j the norm of the
  row. At strength .5 that makes the noise of activations times that of weights
  least, as far as noise is in proportion to the mean square of a block. The
  geometric mean of s is 1, and it lies in 1/64 to 64. With 'amax', a_j and b_j
  are the largest magnitudes, as in SmoothQuant. Followers of one leader count
  together, and so do experts and heads that share a channel. A channel without
  activations or without weights stays.

  Args:
    params: as in `fold`.
    observed: what `calibrate` returned for these parameters.
    followers: as in `fold`.
    strength: in [0, 1]. At 1 channels of activations become alike, at 0 rows of
      weights.
    statistic: 'rms' or 'amax'.
    head_size: as in `fold`.

  Returns:
    The same tree, and what `calibrate` would return for it.

  Raises:
    ValueError: as `fold` does, for an argument out of its range, and for a
      follower that was not observed, or not for each layer of a stack.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from lowbit_jax import ptq
    >>> def model(params, x):
    ...   x = (x @ params['up']['kernel']) * jax.nn.sigmoid(x)
    ...   return x @ params['down']['kernel']
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
    >>> params = {'up': {'kernel': w}, 'down': {'kernel': w}}
    >>> observed = ptq.calibrate(model, params, [x])
    >>> params, observed = ptq.smooth(
    ...   params, observed, {'up/kernel': ('down/kernel',)}
    ... )
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'{strength=} must lie in [0, 1]')
  if statistic not in get_args(Statistic):
    raise ValueError(f"{statistic=} must be 'rms' or 'amax'")
  leaves, structure = by_name(params)
  folds = _folding.find(leaves, followers, head_size)
  observed = dict(observed)
  # Norms last: their scales depend on kernels that lead others.
  folds.sort(key=lambda fold: not _folding.is_kernel(fold.leader))
  for fold in folds:
    ranges = _ranges(fold, leaves, observed, statistic)
    scale = _scale(ranges, strength, statistic == 'rms')
    leaves = fold.apply(leaves, scale)
    observed |= _divided(fold, leaves, observed, scale)
  return structure.unflatten(leaves.values()), observed


def scale_inputs(*, strength: float = 0.5) -> Step:
  """Divides inputs so that activations and weights lose alike.

  It does what `smooth` does by 'rms', for one layer alone and where nothing
  that stands before it can take the division: inputs are divided when the layer
  runs. A layer without statistics stays as it is.

  Args:
    strength: as in `smooth`.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'{strength=} must lie in [0, 1]')

  def step(layer: Layer) -> Layer:
    if layer.statistics is None:
      return layer
    norms = jnp.linalg.norm(layer.weight, axis=1)
    scale = _scale(_Ranges(layer.statistics.rms, norms), strength, True)
    return layer.transformed(DiagonalSmoothing(scale))

  return step


class _Ranges(NamedTuple):
  """Of the channels of a leader, (*stack, channels) each."""

  activations: jax.Array
  weights: jax.Array


def _ranges(
  fold: Fold, leaves: Leaves, observed: Mapping[str, Any], statistic: Statistic
) -> _Ranges:
  """Largest magnitudes, or roots of sums of squares, in which a factor that all
  channels have does not count."""
  pairs = []
  for path in fold.followers:
    kernel = jnp.asarray(leaves[path], jnp.float32)
    seen = _statistics.of_kernel(observed, path, kernel.shape)
    if statistic == 'amax':
      pairs.append((seen.amax, abs(kernel).max(-1)))
    else:
      squares = seen.seen[..., None] * seen.rms**2
      pairs.append((squares, (kernel**2).sum(-1)))
  reduce = jnp.max if statistic == 'amax' else jnp.sum
  ranges = (
    reduce(jnp.stack([fold.to_channels(x, reduce) for x in side]), axis=0)
    for side in zip(*pairs, strict=True)
  )
  return _Ranges(*(ranges if statistic == 'amax' else map(jnp.sqrt, ranges)))


def _scale(ranges: _Ranges, strength: float, normalized: bool) -> jax.Array:
  is_live = (ranges.activations > 0) & (ranges.weights > 0)
  a, b = (jnp.log(jnp.where(is_live, x, 1)) for x in ranges)
  exponent = strength * a - (1 - strength) * b
  if normalized:
    count = jnp.maximum(is_live.sum(-1, keepdims=True), 1)
    exponent -= exponent.sum(-1, keepdims=True) / count
    exponent = jnp.clip(exponent, -math.log(_LIMIT), math.log(_LIMIT))
  return jnp.where(is_live, jnp.exp(exponent), 1)


def _divided(
  fold: Fold, leaves: Leaves, observed: Mapping[str, Any], scale: jax.Array
) -> dict[str, Any]:
  """What is recorded for the followers after the fold."""
  out = {}
  for path in fold.followers:
    shape = leaves[path].shape[:-1]
    along = fold.to_inputs(scale, len(shape), shape[-1])
    along = jnp.broadcast_to(along, shape)
    out[path] = _statistics.divided(observed[path], along)
  return out
