"""Transforms that change nothing."""

from collections.abc import Callable

import jax
import numpy as np

from lowbit_jax.transforms._affine import BlockAffine
from lowbit_jax.transforms._base import Transform
from lowbit_jax.transforms._permutation import Permutation
from lowbit_jax.transforms._smoothing import DiagonalSmoothing


def _scale(scale: jax.Array) -> np.ndarray:
  return np.ones(scale.shape, scale.dtype)


def _matrix(matrix: jax.Array) -> np.ndarray:
  own = np.eye(matrix.shape[-1], dtype=matrix.dtype)
  return np.broadcast_to(own, matrix.shape)


def _order(order: jax.Array) -> np.ndarray:
  own = np.arange(order.shape[-1], dtype=order.dtype)
  return np.broadcast_to(own, order.shape)


# What the leaf of each class becomes.
_LEAVES: dict[type, Callable[[jax.Array], np.ndarray]] = {
  BlockAffine: _matrix,
  DiagonalSmoothing: _scale,
  Permutation: _order,
}


def unit(transform: Transform) -> Transform | None:
  """The transform of the same kind and shape, also that of a stack, that
  changes nothing; None where no leaf says what is done, as in a Hadamard."""
  leaf = _LEAVES.get(type(transform))
  return None if leaf is None else jax.tree.map(leaf, transform)
