"""Transforms one after the other."""

import dataclasses

import jax

from lowbit_jax._typing import as_tuple
from lowbit_jax.transforms import _base


@_base.pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
  """The composition of transforms of one axis, the first one applied first.

    T = T_k ... T_2 T_1,   inv(T)' = inv(T_k)' ... inv(T_2)' inv(T_1)'

  so `apply` and `apply_dual` go through the transforms in the same order, the
  inverses in the opposite one.

  Attributes:
    transforms: one or more, all with the same axis.

  Raises:
    TypeError: if one of them is not a transform.
    ValueError: if there is none, or their axes differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax.transforms import Chain, Hadamard, Permutation
    >>> t = Chain((Permutation([3, 2, 1, 0]), Hadamard(4)))
    >>> x, w = jnp.arange(8.0).reshape(2, 4), jnp.ones((4, 1))
    >>> t.apply(x) @ t.apply_dual(w)  # x @ w
    Array([[ 6.],
           [22.]], dtype=float32)
  """

  transforms: tuple[_base.Transform, ...]

  def __post_init__(self) -> None:
    object.__setattr__(
      self, 'transforms', as_tuple('transforms', self.transforms)
    )
    if not self.transforms:
      raise ValueError('transforms is empty; a Chain needs at least one')
    for i, t in enumerate(self.transforms):
      if not isinstance(t, _base.Transform):
        raise TypeError(
          f'transforms[{i}] is a {type(t).__name__}, not a transform'
        )
    axes = [t.axis for t in self.transforms]
    if len(set(axes)) > 1:
      raise ValueError(
        f'the transforms act on different axes {axes}; a Chain has one axis'
      )

  @property
  def axis(self) -> int:
    """The axis of all transforms."""
    return self.transforms[0].axis

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns T_k ... T_1 x along `axis`."""
    for t in self.transforms:
      x = t.apply(x)
    return x

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns inv(T_1) ... inv(T_k) x along `axis`."""
    for t in reversed(self.transforms):
      x = t.inverse(x)
    return x

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns the duals of T_1, ..., T_k, in turn, of w along `axis`."""
    for t in self.transforms:
      w = t.apply_dual(w, axis)
    return w

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns w with the duals undone, the last one first."""
    for t in reversed(self.transforms):
      w = t.inverse_dual(w, axis)
    return w
