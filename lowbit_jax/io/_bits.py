"""Codes of 1 to 8 bits in bytes along the last axis, little end first."""

import numpy as np


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
  """The codes in uint8 (..., bytes): uint8 (..., 8 * bytes // bits)."""
  if bits == 8:
    return data
  *lead, size = data.shape
  groups = -(-size // bits)
  # Eight codes are `bits` bytes: one word of 64 bits, of which these are low.
  words = np.zeros((*lead, groups, 8), np.uint8)
  words[..., :bits] = _filled(data, groups * bits).reshape(*lead, groups, bits)
  words = words.view('<u8')[..., 0]
  codes = np.empty((*lead, groups, 8), np.uint8)
  for k in range(8):
    codes[..., k] = words >> (k * bits) & (2**bits - 1)
  return codes.reshape(*lead, groups * 8)[..., : 8 * size // bits]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """The inverse: uint8 (..., n) below 2^bits in ceil(n * bits / 8) bytes."""
  if bits == 8:
    return codes
  *lead, size = codes.shape
  groups = -(-size // 8)
  codes = _filled(codes, groups * 8).reshape(*lead, groups, 8)
  words = np.zeros((*lead, groups, 1), '<u8')
  for k in range(8):
    words[..., 0] |= codes[..., k].astype(np.uint64) << np.uint64(k * bits)
  data = words.view(np.uint8)[..., :bits]
  return data.reshape(*lead, groups * bits)[..., : -(-size * bits // 8)]


def _filled(x: np.ndarray, size: int) -> np.ndarray:
  """`x` with zeros at the end of its last axis, up to `size`."""
  missing = size - x.shape[-1]
  if not missing:
    return x
  return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
