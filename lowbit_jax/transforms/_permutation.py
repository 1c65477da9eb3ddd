"""Reordering of an axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit
from lowbit_jax.transforms import _base


@_base.pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Permutation:
  """Reorders an axis: ``apply(x)[..., i] = x[..., order[i]]``.

  Orthogonal and exact: both operands of a product take the same map, and the
  result differs from the unpermuted one only in the order of its additions.
  Used to put entries of similar size into the same scale block.

  Attributes:
    order: integers ``(n,)``, each of 0 ... n - 1 once. A list or NumPy array
      is checked for that; a JAX array, which may be traced, is not, and out
      of range entries then give NaN.
    axis: negative.

  Raises:
    ValueError: if `order` is not a vector or not a permutation.
    TypeError: if `order` is not of integers.

  Examples:
    >>> import jax.numpy as jnp
    >>> w = jnp.array([[3.0, 4.0], [1.0, 0.0]])
    >>> by_norm = Permutation(jnp.argsort(jnp.linalg.norm(w, axis=1)))
    >>> by_norm.apply(jnp.array([10.0, 20.0]))
    Array([20., 10.], dtype=float32)
  """

  order: jax.Array
  axis: int = dataclasses.field(default=-1, metadata={'static': True})

  def __post_init__(self) -> None:
    _base.check_axis(self.axis)
    if not isinstance(self.order, jax.Array):
      object.__setattr__(self, 'order', _check_host_order(self.order))
    if self.order.ndim != 1:
      raise ValueError(
        f'order must be a vector, not of shape {self.order.shape}; build '
        'stacked permutations with vmap'
      )
    if not jnp.issubdtype(self.order.dtype, jnp.integer):
      raise TypeError(f'order must hold integers, not {self.order.dtype}')

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns x reordered along `axis`."""
    return _take(x, self.order, self.axis)

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns x with the order undone along `axis`, exactly."""
    return _take(x, jnp.argsort(self.order), self.axis)

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns w reordered along its contracted axis."""
    return _take(w, self.order, axis)

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns w with the order undone along its contracted axis."""
    return _take(w, jnp.argsort(self.order), axis)


def _take(x, order, axis):
  n = _base.check_operand(x, axis)
  if order.shape != (n,):
    raise ValueError(
      f'order of shape {order.shape} does not fit {axis=} of length {n} of an '
      f'array of shape {x.shape}; it must have shape ({n},)'
    )

  def take(x, order):
    return jnp.take(x, order, axis=axis)

  return _explicit.automatic(take, _explicit.as_first, x, order)


def _check_host_order(order):
  order = np.asarray(order)
  if order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
    return order
  wrong = np.flatnonzero(np.sort(order) != np.arange(order.size))
  if wrong.size:
    raise ValueError(
      f'order is not a permutation of 0 ... {order.size - 1}: sorted, it '
      f'differs from them first at {wrong[0]}; use every index once'
    )
  return order.astype(np.int32)
