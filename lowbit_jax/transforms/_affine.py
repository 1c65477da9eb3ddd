"""An invertible matrix for every block of an axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import _explicit
from lowbit_jax.transforms import _base


@_base.pytree
@dataclasses.dataclass(frozen=True, eq=False)
class BlockAffine:
  """Multiplies every block b of an axis, as a row, by its own matrix P_b.

    apply(x)_b = x_b P_b        apply_dual(w)_b = inv(P_b) w_b
    x @ w = sum_b (x_b P_b) (inv(P_b) w_b)

  More general than a rotation: P_b may be learned, also through the inverse.
  A round trip is accurate to about cond(P_b)^2 B u at worst, u the unit
  roundoff of the dtype it is computed in (float32, or float64 for float64
  operands).

  The inverse is computed where it is used. Only the weight needs it, once;
  the activation's side is one batched product.

  Attributes:
    matrix: ``(k, B, B)`` for an axis of length k B, or ``(B, B)`` for one
      matrix shared by all blocks. A NumPy array is checked for singularity; a
      JAX array, which may be traced, is not.
    axis: negative.

  Raises:
    ValueError: if the matrices are not square, or singular in float32.

  Reference: FlatQuant, arXiv:2410.09426, for the learned affine maps.
  """

  matrix: jax.Array
  axis: int = dataclasses.field(default=-1, metadata={'static': True})

  def __post_init__(self) -> None:
    _base.check_axis(self.axis)
    host = not isinstance(self.matrix, jax.Array)
    if host:
      object.__setattr__(self, 'matrix', np.asarray(self.matrix))
    _check_square(self.matrix)
    if host:
      _check_condition(self.matrix)

  @property
  def block(self) -> int:
    """B, the size of a block."""
    return self.matrix.shape[-1]

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns x_b P_b along `axis`."""
    return self._multiply(x, self.axis, lambda p: p)

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns x_b inv(P_b) along `axis`."""
    return self._multiply(x, self.axis, jnp.linalg.inv)

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns inv(P_b) w_b along the contracted axis of a weight."""
    return self._multiply(w, axis, lambda p: jnp.linalg.inv(p).mT)

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns P_b w_b along the contracted axis of a weight."""
    return self._multiply(w, axis, lambda p: p.mT)

  def _multiply(self, x, axis, derive):
    n = _base.check_operand(x, axis)
    _check_square(self.matrix)
    block = self.block
    if n % block:
      raise ValueError(
        f'{axis=} of length {n} is not a multiple of the block {block} of '
        f'matrix with shape {self.matrix.shape}; pad it to '
        f'{-(-n // block) * block}'
      )
    count = n // block
    if self.matrix.ndim == 3 and self.matrix.shape[0] != count:
      raise ValueError(
        f'matrix of shape {self.matrix.shape} has {self.matrix.shape[0]} '
        f'blocks, but {axis=} of length {n} has {count} of {block}; use '
        f'shape ({count}, {block}, {block}) or ({block}, {block})'
      )
    compute = _base.compute_dtype(x)

    def multiply(x, matrix):
      matrix = derive(jnp.asarray(matrix).astype(compute))
      rows = jnp.moveaxis(x.astype(compute), axis, -1)
      blocks = rows.reshape(*rows.shape[:-1], count, block)
      spec = '...ki,kij->...kj' if matrix.ndim == 3 else '...ki,ij->...kj'
      y = jnp.einsum(spec, blocks, matrix, precision=lax.Precision.HIGHEST)
      return jnp.moveaxis(y.reshape(rows.shape), -1, axis).astype(x.dtype)

    return _explicit.automatic(multiply, _explicit.as_first, x, self.matrix)


def _check_square(matrix):
  shape = matrix.shape
  if len(shape) not in (2, 3) or shape[-1] != shape[-2] or not shape[-1]:
    raise ValueError(
      f'matrix has shape {shape}; it must be (block, block) or '
      '(blocks, block, block), square so that it can be inverted'
    )


def _check_condition(matrix):
  condition = np.atleast_1d(np.linalg.cond(matrix.astype(np.float64)))
  singular = np.flatnonzero(~(condition < 2.0**24))
  if singular.size:
    raise ValueError(
      f'matrix is singular in float32: blocks {singular[:4].tolist()} have '
      f'condition numbers {condition[singular[:4]].tolist()}'
    )
