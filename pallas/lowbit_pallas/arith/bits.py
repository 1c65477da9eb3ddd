"""Float32 bit patterns and exact powers of two."""

import jax
import jax.numpy as jnp
from jax import lax

MAGNITUDE = 0x7FFFFFFF
INF = 0x7F800000
MIN_NORMAL = 0x00800000


def to_bits(x: jax.Array) -> jax.Array:
  """The bit pattern of float32 `x` as int32."""
  return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(b: jax.Array) -> jax.Array:
  """The float32 with bit pattern `b` (int32 or uint32)."""
  return lax.bitcast_convert_type(b, jnp.float32)


def power_of_two(e: jax.Array) -> jax.Array:
  """2**e as float32 for int32 `e` in [-126, 127], from the exponent bits.

  exp2 is inexact for most integers on XLA:CPU; the bits are exact everywhere.
  """
  return from_bits((e + 127) << 23)


def floor(x: jax.Array) -> jax.Array:
  """The largest integer <= x, as float32.

  By way of rounding to nearest, because Mosaic GPU has no floor.
  """
  near = round_half_even(x)
  return near - (near > x).astype(x.dtype)


def round_half_even(x: jax.Array) -> jax.Array:
  """Nearest integer, ties to even, as float32."""
  return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def nearest_integer(x: jax.Array) -> jax.Array:
  """Nearest integer, ties to even, as int32, for `x` in [0, 2^22).

  Adding 2^23 leaves no fraction bits. Two cheap operations where rounding and
  conversion take many (TPU) or slow ones (GPU).
  """
  return to_bits(x + jnp.float32(1 << 23)) & 0x7FFFFF


def bfloat16_parts(x: jax.Array) -> list[jax.Array]:
  """Three bfloat16 arrays whose sum is float32 `x`, in any order.

  Numbers so small that a part is subnormal lose it where hardware flushes.
  """
  parts = []
  for _ in range(3):
    part = x.astype(jnp.bfloat16)
    x = x - part.astype(jnp.float32)
    parts.append(part)
  return parts
