"""Block-scaled arrays as kernels see them: codes, scales, static values."""

from typing import NamedTuple

import jax.numpy as jnp

from lowbit_pallas.arith import codec
from lowbit_pallas.arith import scale as exact


class Blocked(NamedTuple):
  """Static description of an array in blocks along one axis.

  The value of an element is element(code) * scale, or
  (code - zero point) * scale for unsigned integers with a zero point.

  Attributes:
    element: what a code stands for.
    bits: width of a code, 1 to 8.
    block: elements that share a scale; 0 for the whole axis.
    scale: format of scales that are stored as uint8 codes; None for float32 or
      bfloat16 numbers, and where there are no block scales.
  """

  element: codec.Float | codec.Int | codec.Codebook
  bits: int
  block: int
  scale: codec.Float | None


def is_exponent(scale: codec.Float | None) -> bool:
  """Whether scales are powers of two in E8M0: no zero, no subnormals."""
  return scale is not None and not scale.subnormals


def scale_factors(stored, scale: codec.Float | None) -> tuple:
  """Float32 factors whose product is the stored scale.

  E8M0 gives two, so that 2^-127 survives hardware that flushes subnormals.
  """
  if scale is None:
    return (stored.astype(jnp.float32),)
  if is_exponent(scale):
    return exact.exponent_factors(stored)
  return (codec.decode_float(stored, scale),)


def times_scale(x, stored, scale: codec.Float | None):
  """x * scale in float32, `stored` broadcastable to x."""
  for factor in scale_factors(stored, scale):
    x = x * factor
  return x
