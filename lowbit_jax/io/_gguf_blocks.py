"""Blocks of GGUF files taken apart into codes and scales, and put together.

A file interleaves each scale with the codes of its block, and stores codes in
planes: byte j of 16 may hold the elements j and j + 16. A QArray has codes in
order, packed little end first, apart from the scales. Both directions work on
words of 64 bits that hold one code in each byte, eight elements at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_WORD = np.dtype('<u8')
_ONES = 0x0101010101010101  # times n: n in each byte of a word
# Elements at a time, so that words stay in the cache and memory is bounded.
CHUNK = 2**18


class Parts(NamedTuple):
  """Blocks taken apart; the first axis of each array counts blocks.

  x = element * (scale * sub_scale) + minimum * sub_minimum, without those that
  are None.

  Attributes:
    codes: of the elements in order, packed little end first, uint8.
    scale: float16 numbers, or uint8 codes of E8M0 or E4M3.
    sub_scale: integers, one for each part of a block.
    minimum: float16.
    sub_minimum: integers like `sub_scale`.
  """

  codes: np.ndarray
  scale: np.ndarray
  sub_scale: np.ndarray | None = None
  minimum: np.ndarray | None = None
  sub_minimum: np.ndarray | None = None


class Codes(NamedTuple):
  """How blocks hold their codes.

  Attributes:
    read: from blocks to words of shape (elements / 8, blocks).
    write: the inverse, into blocks that are all zero.
  """

  read: Callable[[np.ndarray], np.ndarray]
  write: Callable[[np.ndarray, np.ndarray], None]


class Integers(NamedTuple):
  """How blocks hold the integers of two-level scales.

  Attributes:
    read: from blocks to `sub_scale` and `sub_minimum` or None.
    write: the inverse, into blocks that are all zero.
  """

  read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
  write: Callable[[Any, Any, np.ndarray], None]


class Block(NamedTuple):
  """A block type.

  Attributes:
    elements: in a block.
    bits: of a code.
    fields: of a block in a file. The scale is `d`, the minimum `m`, or `dmin`
      where it is subtracted.
    codes: None where the field `qs` holds packed codes in order.
    zero: what is subtracted from a stored code, modulo 2^bits.
    integers: of two-level scales.
  """

  elements: int
  bits: int
  fields: np.dtype
  codes: Codes | None
  zero: int = 0
  integers: Integers | None = None


def split(blocks: np.ndarray, block: Block) -> Parts:
  """Takes blocks apart.

  Args:
    blocks: of the dtype `block.fields` in either byte order, shape (n,).
    block: their type.
  """
  step = CHUNK // block.elements
  first = _split_chunk(blocks[:step], block)
  if len(blocks) <= step:
    return first
  rooms: list[Any] = [_for_all(part, len(blocks)) for part in first]
  for start in range(0, len(blocks), step):
    parts = _split_chunk(blocks[start : start + step], block)
    for target, part in zip(rooms, parts, strict=True):
      if target is not None:
        target[start : start + step] = part
  return Parts(*rooms)


def join(parts: Parts, block: Block) -> np.ndarray:
  """The inverse of `split`, in little-endian order; for a few blocks at once.

  Raises:
    ValueError: for integers of scales that do not fit their bits.
  """
  blocks = np.zeros(len(parts.codes), block.fields)
  if block.codes is None:
    blocks['qs'] = parts.codes
  else:
    words = _unpack(parts.codes, block.bits)
    block.codes.write(_shifted(words, block.zero, block.bits), blocks)
  blocks['d'] = parts.scale.reshape(blocks['d'].shape)
  if block.integers is not None:
    block.integers.write(parts.sub_scale, parts.sub_minimum, blocks)
  if parts.minimum is not None:
    field, sign = _minimum(block)
    blocks[field] = sign(parts.minimum[:, 0])
  return blocks


def _for_all(part: np.ndarray | None, n: int) -> np.ndarray | None:
  """Room for this part of n blocks."""
  return None if part is None else np.empty((n, *part.shape[1:]), part.dtype)


def _split_chunk(blocks: np.ndarray, block: Block) -> Parts:
  if block.codes is None:
    codes = np.ascontiguousarray(blocks['qs'])
  else:
    words = block.codes.read(blocks)
    codes = _pack(_shifted(words, -block.zero, block.bits), block.bits)
  sub_scale = sub_minimum = minimum = None
  field, sign = _minimum(block)
  if block.integers is not None:
    sub_scale, sub_minimum = block.integers.read(blocks)
  if field:
    minimum = sign(_native(blocks[field]))
  return Parts(codes, _native(blocks['d']), sub_scale, minimum, sub_minimum)


def _minimum(block: Block) -> tuple[str, Callable[[Any], Any]]:
  """The field of the minimum, '' where there is none, and its sign."""
  names = block.fields.names or ()
  if 'dmin' in names:
    return 'dmin', np.negative
  return 'm' if 'm' in names else '', np.positive


def _native(field: np.ndarray) -> np.ndarray:
  """A contiguous copy in the machine's byte order, with an axis for parts."""
  field = field.astype(field.dtype.newbyteorder('='))
  return field[:, None] if field.ndim == 1 else field


def _shifted(words: np.ndarray, by: int, bits: int) -> np.ndarray:
  """Adds `by` to each code, modulo 2^bits."""
  by %= 2**bits
  # A code of less than 8 bits leaves room for the carry in its byte.
  return (words + by * _ONES) & (2**bits - 1) * _ONES if by else words


# Eight codes in the bytes of a word, and side by side in its low bits.


def _halves(bits: int) -> list[tuple[int, int, int]]:
  """(mask of even lanes, of odd lanes, shift) for lanes of 8, 16, 32 bits.

  A lane holds its codes side by side at its low end. Joining two moves those of
  the odd one down to those of the even one.
  """
  steps = []
  for width in (8, 16, 32):
    used = bits * width // 8
    even = sum((2**used - 1) << i for i in range(0, 64, 2 * width))
    steps.append((even, even << used, width - used))
  return steps


def _pack(words: np.ndarray, bits: int) -> np.ndarray:
  """Words of codes, (words, n), to bytes of packed codes, (n, words * bits)."""
  for even, odd, shift in _halves(bits) if bits < 8 else ():
    words = (words & even) | ((words >> shift) & odd)
  if bits in (1, 2, 4, 8):
    short = words.astype(f'<u{bits}')
    return np.ascontiguousarray(short.T).view(np.uint8)
  data = np.ascontiguousarray(words.T).view(np.uint8)
  n, size = data.shape
  return data.reshape(n, size // 8, 8)[..., :bits].reshape(n, size // 8 * bits)


def _unpack(data: np.ndarray, bits: int) -> np.ndarray:
  """The inverse of `_pack`."""
  n, size = data.shape
  padded = np.zeros((n, size // bits, 8), np.uint8)
  padded[..., :bits] = data.reshape(n, size // bits, bits)
  words = np.ascontiguousarray(padded.view(_WORD)[..., 0].T)
  for even, odd, shift in reversed(_halves(bits)) if bits < 8 else ():
    words = (words & even) | ((words & odd) << shift)
  return words


# Where blocks keep the bits of their codes.


def planar(field: str, bits: int, group: int) -> Codes:
  """Codes in planes: of `group` bytes, the low bits come first, in order."""
  shifts = np.arange(0, 8, bits).astype(_WORD)[:, None, None]
  mask = (2**bits - 1) * _ONES

  def read(blocks):
    n, size = blocks[field].shape
    words = np.ascontiguousarray(blocks[field].view(_WORD).T)
    words = words.reshape(size // group, 1, group // 8, n)
    return ((words >> shifts) & mask).reshape(size // 8 * len(shifts), n)

  def write(words, blocks):
    n, size = blocks[field].shape
    planes = words.reshape(size // group, len(shifts), group // 8, n)
    joined = np.bitwise_or.reduce(planes << shifts, axis=1)
    data = np.ascontiguousarray(joined.reshape(size // 8, n).T)
    blocks[field] = data.view(np.uint8)

  return Codes(read, write)


def in_order(field: str, bits: int) -> Codes:
  """Codes side by side, in order."""

  def read(blocks):
    return _unpack(np.ascontiguousarray(blocks[field]), bits)

  def write(words, blocks):
    blocks[field] = _pack(words, bits)

  return Codes(read, write)


def with_high(low: Codes, bits: int, high: Codes) -> Codes:
  """Codes whose bits above `bits` are kept apart."""
  mask = (2**bits - 1) * _ONES

  def read(blocks):
    return low.read(blocks) | (high.read(blocks) << bits)

  def write(words, blocks):
    low.write(words & mask, blocks)
    high.write((words & ~np.uint64(mask)) >> bits, blocks)

  return Codes(read, write)


def ternary(*fields: tuple[str, int]) -> Codes:
  """Digits to the base 3: fields with the digits in each of their bytes.

  A byte holds up to five digits as the number 256 / 243 of them, rounded up, so
  that multiples of 3 move digit after digit into the bits above the byte.
  """
  weights = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]

  def read(blocks):
    planes = []
    for field, count in fields:
      rest = blocks[field][:, None, :] * weights[:count]
      digits = (rest.astype(np.uint16) * 3 >> 8).astype(np.uint8)
      planes.append(digits.reshape(len(blocks), count * rest.shape[2]))
    return np.ascontiguousarray(np.concatenate(planes, -1).view(_WORD).T)

  def write(words, blocks):
    digits = np.ascontiguousarray(words.T).view(np.uint8).astype(np.uint16)
    for field, count in fields:
      size = blocks[field].shape[1]
      part, digits = np.split(digits, [size * count], axis=1)
      part = part.reshape(len(blocks), count, size)
      number = (part * weights[::-1][:count]).sum(1, dtype=np.uint16)
      blocks[field] = (number * np.uint32(256) + 242) // 243

  return Codes(read, write)
