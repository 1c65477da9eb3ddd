"""Block Walsh-Hadamard rotations, plain and with random signs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit
from lowbit_jax._typing import Key
from lowbit_jax.transforms import _base
from lowbit_pallas.arith import hadamard as _core


@_base.pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Hadamard:
  """Rotation of every block along an axis by a Walsh-Hadamard matrix.

    T = diag(H, ..., H) diag(s),   H = 2^(-k/2) (+-1 matrix of order B = 2^k)

  It spreads an outlier over its block, and is orthogonal: both operands of a
  product take the same map. Where blocks also share a scale, B should be the
  scale's block or a multiple of it, on the same axis.

  Attributes:
    block: B, a power of two.
    axis: negative; its length must be a multiple of B.
    signs: None, or the +-1 of s: ``(n,)`` for the whole axis, or ``(B,)`` for
      the same signs in every block. Integers or floats; not validated.

  Examples:
    >>> import jax.numpy as jnp
    >>> Hadamard(4).apply(jnp.array([8.0, 0, 0, 0]))
    Array([4., 4., 4., 4.], dtype=float32)
  """

  block: int = dataclasses.field(metadata={'static': True})
  axis: int = dataclasses.field(default=-1, metadata={'static': True})
  signs: jax.Array | None = None

  def __post_init__(self) -> None:
    _core.check_power_of_two(self.block)
    _base.check_axis(self.axis)
    if self.signs is not None and np.ndim(self.signs) != 1:
      raise ValueError(
        f'signs must be a vector, not of shape {np.shape(self.signs)}'
      )

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns H (s x) along `axis`."""
    return self._rotate(x, self.axis)

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns s (H x) along `axis`; a sign flip is exact."""
    return self._rotate_back(x, self.axis)

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns H (s w) along the contracted axis of a weight."""
    return self._rotate(w, axis)

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns s (H w) along the contracted axis of a weight."""
    return self._rotate_back(w, axis)

  def _rotate(self, x, axis):
    n = self._check(x, axis)

    def rotate(x, t):
      return _core.hadamard(t._flip(x, n, axis), t.block, axis)

    return _explicit.automatic(rotate, _explicit.as_first, x, self)

  def _rotate_back(self, x, axis):
    n = self._check(x, axis)

    def rotate_back(x, t):
      return t._flip(_core.hadamard(x, t.block, axis), n, axis)

    return _explicit.automatic(rotate_back, _explicit.as_first, x, self)

  def _check(self, x, axis):
    n = _base.check_operand(x, axis)
    if n % self.block:
      raise ValueError(
        f'{axis=} of length {n} is not a multiple of block={self.block}; pad '
        f'it to {-(-n // self.block) * self.block}, or use a block that '
        f'divides {n & -n}'
      )
    return n

  def _flip(self, x, n, axis):
    if self.signs is None:
      return x
    signs = jnp.asarray(self.signs)
    if signs.shape not in ((n,), (self.block,)):
      raise ValueError(
        f'signs of shape {signs.shape} fit neither {axis=} of length {n} nor '
        f'block={self.block}; draw them with that size'
      )
    signs = jnp.tile(signs.astype(x.dtype), n // signs.size)
    return x * _base.along(signs, x, axis)


def random_hadamard(
  key: Key, size: int, block: int, axis: int = -1
) -> Hadamard:
  """Returns a Hadamard rotation with `size` random signs.

  Args:
    key: a JAX random key. Under ``vmap`` over keys each gives its own signs,
      the same as outside.
    size: length of the transformed axis, or `block` for signs that repeat in
      every block.
    block: a power of two that divides `size`.
    axis: negative axis.

  Returns:
    Hadamard with int8 signs, so that gradients leave them alone.

  Raises:
    ValueError: if `block` is not a power of two or does not divide `size`.
  """
  _core.check_power_of_two(block)
  if not isinstance(size, int):
    raise TypeError(f'{size=} must be an int')
  if size % block:
    raise ValueError(f'{size=} is not a multiple of {block=}')
  words = jax.random.bits(key, (2,), jnp.uint32)
  signs = _core.random_signs(words, size).astype(jnp.int8)
  return Hadamard(block, axis, signs)
