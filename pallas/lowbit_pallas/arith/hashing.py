"""Counter-based random bits: a hash of key, site and element index.

Bits are a pure function of where an element stands, so they are the same under
jit, vmap and every sharding, and a kernel draws them without any state. The
mixer is the 32-bit finalizer `lowbias32` (bias found by search, C. Wellons,
"Prospecting for Hash Functions"), applied twice to each index.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# (start, full shape) of the larger array that an array is a slice of.
Origin = tuple[Sequence[ArrayLike], Sequence[int]]

_SITE = 0x9E3779B9
_HIGH = 0x85EBCA6B


def _mix(h):
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)


def random_bits(
  key_words: jax.Array,
  index: jax.Array,
  index_hi: jax.Array | None = None,
  *,
  site: int = 0,
) -> jax.Array:
  """32 random bits for each element.

  Args:
    key_words: uint32, last axis of size 2.
    index: uint32 array, the low word of the 64-bit element index.
    index_hi: uint32 array, the high word; None stands for zero.
    site: static number of the place that draws, so that several places can
      share a key.

  Returns:
    uint32 array of the shape of `index`.
  """
  return bits_of(streams(key_words, site), index, index_hi)


def streams(key_words: jax.Array, site: int = 0) -> tuple[jax.Array, jax.Array]:
  """The two uint32 constants through which a key and a site enter."""
  k0, k1 = key_words[..., 0], key_words[..., 1]
  # Both words and the site go into both constants, so that neighbouring keys
  # are not one stream shifted by an element.
  a = _mix(k0 + _mix(k1 + jnp.uint32((site * _SITE) & 0xFFFFFFFF)))
  return a, _mix(k1 ^ a)


def bits_of(
  constants: tuple[jax.Array, jax.Array],
  index: jax.Array,
  index_hi: jax.Array | None = None,
) -> jax.Array:
  """`random_bits` from the `streams` of its key and site."""
  a, b = constants
  h = _mix(index + a)
  if index_hi is not None:
    h = _mix(h + index_hi * jnp.uint32(_HIGH))
  return _mix(h ^ b)


def _multiply_wide(a, b: int):
  """The 64-bit product of uint32 `a` and a Python int as (low, high)."""
  low, high = b & 0xFFFFFFFF, (b >> 32) & 0xFFFFFFFF
  a0, a1 = a & 0xFFFF, a >> 16
  b0, b1 = low & 0xFFFF, low >> 16
  mid = a1 * jnp.uint32(b0) + ((a0 * jnp.uint32(b0)) >> 16)
  carry = a0 * jnp.uint32(b1) + (mid & 0xFFFF)
  upper = a1 * jnp.uint32(b1) + (mid >> 16) + (carry >> 16)
  return a * jnp.uint32(low), upper + a * jnp.uint32(high)


def _low_word(n) -> jax.Array:
  """The low 32 bits of a size, which may be symbolic."""
  if isinstance(n, int | np.integer):
    return jnp.uint32(n & 0xFFFFFFFF)
  return jnp.asarray(n).astype(jnp.uint32)


def element_index(
  shape: Sequence[int], origin: Origin | None = None
) -> tuple[jax.Array, jax.Array | None]:
  """Row-major index of each element as (low word, high word or None).

  Args:
    shape: shape of the array.
    origin: None, or (start, full_shape) where this array is the slice of a
      larger one that begins at `start`; starts may be traced.

  A symbolic size is taken to be below 2**32: the bits of larger arrays repeat.

  Returns:
    uint32 arrays of that shape; the high word is None below 2**32 elements.
  """
  start, full = ((0,) * len(shape), shape) if origin is None else origin
  size = 1
  strides = []
  for n in reversed(full):
    strides.append(size)
    size *= n
  strides.reverse()
  low = jnp.zeros(shape, jnp.uint32)
  is_large = isinstance(size, int | np.integer) and size > 1 << 32
  high = jnp.zeros(shape, jnp.uint32) if is_large else None
  for d, stride in enumerate(strides):
    i = lax.broadcasted_iota(jnp.uint32, shape, d)
    offset = start[d]
    if isinstance(offset, int):
      offset = np.uint32(offset)
    i = i + jnp.asarray(offset).astype(jnp.uint32)
    if high is None:
      low = low + i * _low_word(stride)
      continue
    product, upper = _multiply_wide(i, stride)
    low = low + product
    high = high + upper + (low < product).astype(jnp.uint32)
  return low, high
