"""Rounding rules by name, and the random bits of the stochastic ones."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowbit_jax._typing import Key, Origin, Shape, as_tuple
from lowbit_pallas.arith import codec, hashing

RANDOM_BITS = codec.RANDOM_BITS
ROUNDINGS = ('nearest_even', 'toward_zero', 'stochastic', 'dithered')


def check_rounding(rounding: str, key: Key | None, random_bits: int) -> None:
  """Refuses unknown rules, missing keys and impossible bit counts."""
  if rounding not in ROUNDINGS:
    raise ValueError(f'rounding={rounding!r} is not one of {ROUNDINGS}')
  needs_key = rounding in ('stochastic', 'dithered')
  if needs_key and key is None:
    raise ValueError(f'rounding={rounding!r} needs key=jax.random.key(seed)')
  if not needs_key and key is not None:
    raise ValueError(
      f"rounding={rounding!r} takes no key; drop key= or use 'stochastic'"
    )
  if not isinstance(random_bits, int) or not 1 <= random_bits <= 23:
    raise ValueError(f'random_bits={random_bits!r} must be an int in 1..23')


def key_words(key: Key) -> jax.Array:
  """The data of a JAX PRNG key as uint32 of shape (2,).

  Args:
    key: a typed key (`jax.random.key`) or raw uint32 key data.
  """
  if isinstance(key, jax.Array) and jnp.issubdtype(
    key.dtype, jax.dtypes.prng_key
  ):
    words = jax.random.key_data(key)
  else:
    words = jnp.asarray(key)
  if words.dtype != jnp.uint32 or words.ndim != 1 or words.shape[0] % 2:
    raise TypeError(
      f'key must be one JAX PRNG key, got dtype {words.dtype} and shape'
      f' {words.shape}; use jax.vmap for a batch of keys'
    )
  words = words.reshape(-1, 2)
  out = words[0]
  for i in range(1, words.shape[0]):
    out = out ^ words[i]
  return out


def check_origin(origin: Origin) -> Origin:
  """Refuses what is not a pair of sequences."""
  pair = isinstance(origin, tuple | list) and len(origin) == 2
  if not pair or not all(isinstance(part, Sequence) for part in origin):
    raise TypeError(
      f'{origin=} must be (start, full_shape), an int for each axis in both'
    )
  return origin


def random_words(
  key: Key, shape: Shape, origin: Origin | None = None
) -> jax.Array:
  """32 random bits for each element, a hash of key and row-major index.

  The bits depend on nothing else, so they agree under jit, vmap over keys and
  every sharding. One key shared by all members of a vmap repeats its bits.

  Args:
    key: a JAX PRNG key.
    shape: shape of the array that is rounded.
    origin: None, or `(start, full_shape)`: the array is the slice of a larger
      one that begins at `start`. Needed inside `shard_map`, where each shard
      would otherwise count from zero.
  """
  shape = as_tuple('shape', shape)
  if origin is not None:
    start, full = check_origin(origin)
    if len(start) != len(shape) or len(full) != len(shape):
      raise ValueError(
        f'origin={origin!r} must hold a start and a full shape of rank'
        f' {len(shape)} each'
      )
    if any(not isinstance(n, int) for n in full):
      raise TypeError(f'the full shape in {origin=} must be static ints')
  low, high = hashing.element_index(shape, origin)
  return hashing.random_bits(key_words(key), low, high)


def dither(key: Key, shape: Shape, origin: Origin | None = None) -> jax.Array:
  """Uniform offsets in [-1/2, 1/2), known to whoever holds the key."""
  words = random_words(key, shape, origin)
  u = (words >> 8).astype(jnp.int32).astype(jnp.float32)
  return u * jnp.float32(2.0**-24) - jnp.float32(0.5)


# Dithering adds its offset before and rounds to nearest.
rule = codec.rule
