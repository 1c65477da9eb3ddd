"""Sub-byte storage: the checked face of the shared packing arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lowbit_jax._typing import ArrayLike
from lowbit_pallas.arith import packing
from lowbit_pallas.arith.packing import (
  codes_per_group as codes_per_group,
  packed_size as packed_size,
  unpacked_size as unpacked_size,
)

lanes = packing.lanes
pack_unchecked = packing.pack
unpack_unchecked = packing.unpack
pack_lanes = packing.pack_lanes


def pack(codes: ArrayLike, bits: int, axis: int = -1) -> jax.Array:
  """Packs codes of `bits` bits into bytes along `axis`, little end first.

  Element i occupies bits [i * bits, (i + 1) * bits) of the byte stream, so the
  even element of a 4-bit pair is the low nibble.

  Args:
    codes: uint8 codes below 2**bits, of which traced ones are cut to their
      bits; the size of `axis` must be a multiple of 8 / gcd(8, bits).
    bits: 1 to 8.
    axis: axis that shrinks to bits / 8 of its size.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax import numerics
    >>> numerics.pack(jnp.arange(4, dtype=jnp.uint8), 4).tolist()
    [16, 50]
  """
  codes = _check('codes', codes, bits, axis)
  group = codes_per_group(bits)
  if codes.shape[axis] % group:
    raise ValueError(
      f'codes.shape[{axis}]={codes.shape[axis]} is no multiple of {group},'
      f' the {bits}-bit codes that fill whole bytes; pad it'
    )
  codes = check_codes(codes, 0, 2**bits - 1)
  return packing.pack(codes & (2**bits - 1), bits, axis)


def unpack(packed: ArrayLike, bits: int, axis: int = -1) -> jax.Array:
  """The inverse of `pack`: uint8 codes."""
  packed = _check('packed', packed, bits, axis)
  group = codes_per_group(bits) * bits // 8
  if packed.shape[axis] % group:
    raise ValueError(
      f'packed.shape[{axis}]={packed.shape[axis]} is no multiple of {group},'
      f' the bytes of one group of {bits}-bit codes'
    )
  return packing.unpack(packed, bits, axis)


def check_codes(codes: Any, low: int, high: int) -> jax.Array:
  """Refuses codes outside low ... high, where their values are known."""
  if not isinstance(codes, Tracer) and codes.size:
    least, most = int(np.min(codes)), int(np.max(codes))
    if least < low or most > high:
      raise ValueError(
        f'codes from {least} to {most} do not fit into {low} ... {high}'
      )
  return jnp.asarray(codes)


def _check(name: str, x, bits: int, axis: int) -> jax.Array:
  x = jnp.asarray(x)
  if x.dtype != jnp.uint8:
    raise TypeError(f'{name} must be uint8, got {x.dtype}')
  if not 1 <= bits <= 8:
    raise ValueError(f'{bits=} must be in 1..8')
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f'{axis=} is out of range for shape {x.shape}')
  return x
