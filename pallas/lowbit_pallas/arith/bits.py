"""Float32 bit patterns and exact powers of two."""

import jax.numpy as jnp
from jax import lax

MAGNITUDE = 0x7FFFFFFF
INF = 0x7F800000
MIN_NORMAL = 0x00800000


def to_bits(x):
  """The bit pattern of float32 `x` as int32."""
  return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(b):
  """The float32 with bit pattern `b` (int32 or uint32)."""
  return lax.bitcast_convert_type(b, jnp.float32)


def power_of_two(e):
  """2**e as float32 for int32 `e` in [-126, 127], from the exponent bits.

  exp2 is inexact for most integers on XLA:CPU; the bits are exact everywhere.
  """
  return from_bits((e + 127) << 23)


def round_half_even(x):
  """Nearest integer, ties to even, as float32."""
  return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
