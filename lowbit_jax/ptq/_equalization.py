"""Ranges of weights that are shared out between layers.

References: Data-Free Quantization, arXiv:1906.04721.
"""

import jax
import jax.numpy as jnp

from lowbit_jax._tree import by_name
from lowbit_jax._typing import PyTree
from lowbit_jax.ptq import _folding
from lowbit_jax.ptq._folding import Fold, Followers, Leaves

# Channels whose weights are not larger stay as they are.
_NOTHING = 1e-9


def equalize(
  params: PyTree,
  followers: Followers,
  *,
  iterations: int = 20,
  threshold: float = 0.05,
  head_size: int | None = None,
) -> PyTree:
  """Gives outputs of a kernel and the rows that take them the same range.

  Cross-layer equalization: with r1 the largest magnitude of the weights of an
  output and r2 that of the rows of its followers, both become sqrt(r1 r2). It
  needs no data, and helps formats with one scale for a tensor. The function of
  the model stays the same, see `fold`; behind a leader there may be a ReLU.

  Args:
    params: as in `fold`.
    followers: as in `fold`. Leaders that are no kernels, such as scales of
      norms, stay.
    iterations: passes over all leaders at most; one is enough where no follower
      leads others.
    threshold: passes end when the scales of one are as near to 1.
    head_size: as in `fold`.

  Returns:
    The same tree.

  Raises:
    ValueError: as `fold` does, for fewer iterations than 1 and for a threshold
      that is not positive.
  """
  if iterations < 1:
    raise ValueError(f'{iterations=} must be at least 1')
  if not threshold > 0:
    raise ValueError(f'{threshold=} must be positive')
  leaves, structure = by_name(params)
  kernels = {k: v for k, v in followers.items() if _folding.is_kernel(k)}
  folds = _folding.find(leaves, kernels, head_size)
  for _ in range(iterations):
    change = 0.0
    for fold in folds:
      scale = _scale(fold, leaves)
      leaves = fold.apply(leaves, scale)
      change = max(change, float(abs(scale - 1).max()))
    if change < threshold:
      break
  return structure.unflatten(leaves.values())


def _scale(fold: Fold, leaves: Leaves) -> jax.Array:
  def largest(path, axis):
    return abs(jnp.asarray(leaves[path], jnp.float32)).max(axis)

  of_outputs = largest(fold.leader, -2)
  of_rows = [
    fold.to_channels(largest(path, -1), jnp.max) for path in fold.followers
  ]
  of_rows = jnp.stack(of_rows).max(0)
  is_live = (of_outputs > _NOTHING) & (of_rows > _NOTHING)
  ratio = of_outputs / jnp.where(is_live, of_rows, 1)
  return jnp.where(is_live, jnp.sqrt(ratio), 1)
