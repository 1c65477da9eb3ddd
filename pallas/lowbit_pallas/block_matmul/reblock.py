"""From MX blocks of 32 to the FP8 blocks of 128 that 'fp8_128' multiplies."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits as fb, codec, packing, scale as exact
from lowbit_pallas.arith.block import Blocked, is_exponent
from lowbit_pallas.block_matmul import reference

BLOCK = reference.PROMOTION


class Reblocked(NamedTuple):
  """An operand in FP8 with float32 scales.

  Attributes:
    codes: uint8 (rows, K).
    scale: float32 (ceil(rows / high), K / 128).
    lossless: bool scalar, whether every value is what it was. Where it is
      False, codes and scales are the nearest ones, and 'exact' is the mode.
  """

  codes: jax.Array
  scale: jax.Array
  lossless: jax.Array


def why_not(shape: Sequence[int], spec: Blocked) -> str | None:
  """Why an operand of packed codes (rows, K) cannot be reblocked, or None."""
  if not is_exponent(spec.scale):
    return f'scales {spec.scale} are not powers of two'
  if not isinstance(spec.element, codec.Float):
    return f'FP8 does not hold the integers {spec.element}'
  if BLOCK % spec.block:
    return f'blocks of {spec.block} do not fill {BLOCK}'
  k = packing.unpacked_size(shape[1], spec.bits)
  return f'K={k} is not whole blocks of {BLOCK}' if k % BLOCK else None


def reblock(
  codes: jax.Array,
  scale: jax.Array,
  spec: Blocked,
  element: codec.Float,
  *,
  high: int = 1,
) -> Reblocked:
  """Gives each 1 x 128 or 128 x 128 one scale, the smallest that fits.

  The scale puts the largest element at the top of the FP8 format, so values
  survive that lie within its range below and have few enough bits: all four
  exponents may agree, but need not. MXFP4 survives in E4M3 where the exponents
  of a block differ by up to 14.

  Args:
    codes: uint8 (rows, K), packed along K.
    scale: E8M0 codes (rows, K / block).
    spec: static description of codes and scale.
    element: the 8-bit floating-point format to go to.
    high: 1 for scales of 1 x 128 (lhs), 128 for 128 x 128 (rhs).

  Raises:
    ValueError: for operands that `why_not` refuses.
  """
  reason = why_not(codes.shape, spec)
  if reason is not None:
    raise ValueError(f'reblock: {reason}')
  x = codec.decode(packing.unpack(codes, spec.bits, 1), spec.element)
  rows, k = x.shape
  exponent = jnp.repeat(scale.astype(jnp.int32), spec.block, axis=1)
  poisoned = jnp.any(exponent == exact.NAN_CODE)

  def tiles(leaf):
    leaf = jnp.pad(leaf, ((0, -rows % high), (0, 0)))
    return leaf.reshape(-1, high, k // BLOCK, BLOCK)

  x, exponent = tiles(x), tiles(exponent)
  top = jnp.max(
    jnp.where(x == 0, 0, exponent), (1, 3), keepdims=True, initial=0
  )
  # In units of the largest scale; what underflows here is found lossy below.
  y = x * fb.power_of_two(jnp.clip(exponent - top, -126, 0))
  field, fraction = divmod(element.code_max, 1 << element.mantissa_bits)
  emax = field - 1 + element.emin
  largest = (1 + fraction / (1 << element.mantissa_bits)) * 2.0**emax
  amax = exact.block_max(exact.magnitude_bits(y), (1, 3))
  shift = exact.exponent_code(
    amax, 'rceil', emax, largest, element.mantissa_bits
  )
  for factor in exact.inverse_exponent_factors(shift):
    y = y * factor
  out = codec.encode_float(y, element)
  same = codec.decode_float(out, element) == y
  same = same & ((y != 0) | (x == 0))
  total = top + shift - 254
  in_range = (amax == 0) | ((total >= -126) & (total <= 127))
  scale = fb.power_of_two(jnp.clip(total, -126, 127))
  scale = jnp.where(amax == 0, 1, scale)
  return Reblocked(
    out.reshape(-1, k)[:rows],
    scale[:, 0, :, 0],
    jnp.all(same) & jnp.all(in_range) & ~poisoned,
  )
