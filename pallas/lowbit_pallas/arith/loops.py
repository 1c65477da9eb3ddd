"""Loop carries inside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp


def carry(start: jax.Array, *operands: Any) -> jax.Array:
  """`start` as the first carry of a loop whose body adds in `operands`.

  Inside `shard_map` a value that is the same on all devices has another type
  than one that varies over a mesh axis, and a carry must have one type. So this
  is `start` with the type of a value that could have come from `operands`.

  Args:
    start: array.
    *operands: trees of arrays.
  """
  for leaf in jax.tree.leaves(operands):
    if leaf.size:
      first = leaf[(0,) * leaf.ndim].astype(start.dtype)
      start = jnp.where(False, first, start)
  return start
