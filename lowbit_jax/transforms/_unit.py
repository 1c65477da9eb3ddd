"""Transforms that change nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowbit_jax.transforms._affine import BlockAffine
from lowbit_jax.transforms._base import Transform
from lowbit_jax.transforms._permutation import Permutation
from lowbit_jax.transforms._smoothing import DiagonalSmoothing


def _order(order: jax.Array) -> jax.Array:
  own = jnp.arange(order.shape[-1], dtype=order.dtype)
  return jnp.broadcast_to(own, order.shape)


def _matrix(matrix: jax.Array) -> jax.Array:
  own = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  return jnp.broadcast_to(own, matrix.shape)


# What the leaf of each class becomes.
_LEAVES: dict[type, Callable[[jax.Array], jax.Array]] = {
  BlockAffine: _matrix,
  DiagonalSmoothing: jnp.ones_like,
  Permutation: _order,
}


def unit(transform: Transform) -> Transform | None:
  """The transform of the same kind and shape, also that of a stack, that
  changes nothing; None where no leaf says what is done, as in a Hadamard."""
  leaf = _LEAVES.get(type(transform))
  return None if leaf is None else jax.tree.map(leaf, transform)
