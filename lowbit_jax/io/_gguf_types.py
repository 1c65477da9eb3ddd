"""The block types of GGUF files: their fields, codes and scales.

Source: `ggml-common.h` and `ggml-quants.c` of ggml.
"""

import numpy as np

from lowbit_jax.io._gguf_blocks import (
  Block,
  Integers,
  in_order,
  planar,
  ternary,
  with_high,
)

# How blocks keep the integers of two-level scales.


def _check_range(name: str, x: np.ndarray, low: int, high: int) -> np.ndarray:
  if x.size and (x.min() < low or x.max() > high):
    raise ValueError(f'{name} from {x.min()} to {x.max()}, not {low} to {high}')
  return x


def _read_nibbles(blocks):
  packed = blocks['scales']
  return packed & 15, packed >> 4


def _write_nibbles(scale, minimum, blocks):
  _check_range('scales', scale, 0, 15)
  blocks['scales'] = scale | _check_range('minima', minimum, 0, 15) << 4


def _read_six(blocks):
  """Eight pairs of 6 bits; those of the last four are in two pieces."""
  a, b, c = np.split(blocks['scales'], 3, axis=1)
  scale = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], -1)
  return scale, np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], -1)


def _write_six(scale, minimum, blocks):
  scale = _check_range('scales', scale, 0, 63)
  minimum = _check_range('minima', minimum, 0, 63)
  (s, t), (m, k) = (np.split(x, 2, axis=1) for x in (scale, minimum))
  a, b = s | (t >> 4) << 6, m | (k >> 4) << 6
  blocks['scales'] = np.concatenate([a, b, (t & 15) | (k & 15) << 4], -1)


def _read_signed_six(blocks):
  """Sixteen of 6 bits: nibbles in 8 bytes, pairs of bits in planes of 4."""
  low, high = np.split(blocks['scales'], [8], axis=1)
  low = np.concatenate([low & 15, low >> 4], -1)
  high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
  return (low | high << 4).astype(np.int8) - np.int8(32), None


def _write_signed_six(scale, minimum, blocks):
  del minimum
  scale = (_check_range('scales', scale, -32, 31) + 32).astype(np.uint8)
  low, high = scale & 15, np.split(scale >> 4, 4, axis=1)
  high = np.bitwise_or.reduce([h << 2 * k for k, h in enumerate(high)])
  blocks['scales'] = np.concatenate([low[:, :8] | low[:, 8:] << 4, high], -1)


def _read_int8(blocks):
  return np.ascontiguousarray(blocks['scales']), None


def _write_int8(scale, minimum, blocks):
  del minimum
  blocks['scales'] = _check_range('scales', scale, -128, 127)


def _read_split_six(blocks):
  """Eight of 6 bits: nibbles in 4 bytes, pairs of bits in a 16-bit number."""
  low = blocks['low'][:, :, None] >> np.array([0, 4], np.uint8) & 15
  high = blocks['high'][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
  scale = low.reshape(len(blocks), 8) | high.astype(np.uint8) << 4
  return scale.astype(np.int8) - np.int8(32), None


def _write_split_six(scale, minimum, blocks):
  del minimum
  scale = (_check_range('scales', scale, -32, 31) + 32).astype(np.uint8)
  blocks['low'] = scale[:, ::2] & 15 | (scale[:, 1::2] & 15) << 4
  high = (scale >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
  blocks['high'] = high.sum(1, dtype=np.uint16)


def _fields(**fields: str | int) -> np.dtype:
  """Fields of a block in their order: a dtype, or a number of bytes."""
  return np.dtype(
    [(k, v) if isinstance(v, str) else (k, 'u1', v) for k, v in fields.items()]
  )


_HALF = '<f2'
_NIBBLES = planar('qs', 4, 16)
_FIVE_BITS = with_high(_NIBBLES, 4, in_order('qh', 1))
_PAIRS = planar('qs', 2, 32)
_WIDE_NIBBLES = planar('qs', 4, 32)
_SIX = Integers(_read_six, _write_six)

BLOCKS = {
  'Q4_0': Block(32, 4, _fields(d=_HALF, qs=16), _NIBBLES, 8),
  'Q4_1': Block(32, 4, _fields(d=_HALF, m=_HALF, qs=16), _NIBBLES),
  'Q5_0': Block(32, 5, _fields(d=_HALF, qh=4, qs=16), _FIVE_BITS, 16),
  'Q5_1': Block(32, 5, _fields(d=_HALF, m=_HALF, qh=4, qs=16), _FIVE_BITS),
  'Q8_0': Block(32, 8, _fields(d=_HALF, qs=32), None),
  'Q2_K': Block(
    256,
    2,
    _fields(scales=16, qs=64, d=_HALF, dmin=_HALF),
    _PAIRS,
    integers=Integers(_read_nibbles, _write_nibbles),
  ),
  'Q3_K': Block(
    256,
    3,
    _fields(qh=32, qs=64, scales=12, d=_HALF),
    with_high(_PAIRS, 2, planar('qh', 1, 32)),
    4,
    Integers(_read_signed_six, _write_signed_six),
  ),
  'Q4_K': Block(
    256,
    4,
    _fields(d=_HALF, dmin=_HALF, scales=12, qs=128),
    _WIDE_NIBBLES,
    integers=_SIX,
  ),
  'Q5_K': Block(
    256,
    5,
    _fields(d=_HALF, dmin=_HALF, scales=12, qh=32, qs=128),
    with_high(_WIDE_NIBBLES, 4, planar('qh', 1, 32)),
    integers=_SIX,
  ),
  'Q6_K': Block(
    256,
    6,
    _fields(qs=128, qh=64, scales='16i1', d=_HALF),
    with_high(planar('qs', 4, 64), 4, planar('qh', 2, 32)),
    32,
    Integers(_read_int8, _write_int8),
  ),
  'IQ4_NL': Block(32, 4, _fields(d=_HALF, qs=16), _NIBBLES),
  'IQ4_XS': Block(
    256,
    4,
    _fields(d=_HALF, high='<u2', low=4, qs=128),
    _NIBBLES,
    integers=Integers(_read_split_six, _write_split_six),
  ),
  'TQ1_0': Block(
    256,
    2,
    _fields(qs=32, qt=16, qh=4, d=_HALF),
    ternary(('qs', 5), ('qt', 5), ('qh', 4)),
    1,
  ),
  'TQ2_0': Block(256, 2, _fields(qs=64, d=_HALF), _PAIRS, 1),
  'MXFP4': Block(32, 4, _fields(d='u1', qs=16), _NIBBLES),
  'NVFP4': Block(64, 4, _fields(d=4, qs=32), planar('qs', 4, 8)),
  'Q1_0': Block(128, 1, _fields(d=_HALF, qs=16), None),
  'Q2_0': Block(64, 2, _fields(d=_HALF, qs=16), None),
}
