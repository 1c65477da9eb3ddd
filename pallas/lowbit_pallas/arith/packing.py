"""Packing of b-bit codes into bytes, little end first.

Element i of the packed axis occupies bits [i*b, (i+1)*b) of the byte stream,
least significant bit first, so 4-bit codes put the even element into the low
nibble. Eight codes fill b bytes.

The minor axis is packed through 32-bit words, because strided loads and stores
of bytes do not vectorise; other axes are packed slice by slice.
"""

import math

import jax.numpy as jnp
from jax import lax


def codes_per_group(bits: int) -> int:
  """Codes in the smallest run that fills whole bytes."""
  return 8 // math.gcd(8, bits)


def packed_size(n: int, bits: int) -> int:
  """Bytes that `n` codes occupy; `n` is a multiple of `codes_per_group`."""
  return n * bits // 8


def unpacked_size(n: int, bits: int) -> int:
  """Codes in `n` bytes."""
  return n * 8 // bits


def pack(codes, bits: int, axis: int = -1):
  """Packs uint8 codes below 2**bits along `axis`.

  Args:
    codes: uint8, the size of `axis` a multiple of `codes_per_group(bits)`.
    bits: 1 to 8.
    axis: the axis that shrinks by bits / 8.
  """
  if bits == 8:
    return codes
  axis %= codes.ndim
  if axis == codes.ndim - 1:
    return _pack_minor(codes, bits)
  return pack_lanes(_split(codes, axis, codes_per_group(bits)), bits, axis)


def pack_lanes(lanes_, bits: int, axis: int):
  """Packs codes that are already split into the lanes of `lanes`.

  Args:
    lanes_: `codes_per_group(bits)` uint8 arrays.
    bits: 1 to 8.
    axis: non-negative axis of the lanes.

  Returns:
    uint8, `axis` grown by bits * len(lanes_) / 8.
  """
  return _join(_lanes_to_bytes(lanes_, bits), axis)


def unpack(packed, bits: int, axis: int = -1):
  """The inverse of `pack`: uint8 codes."""
  if bits == 8:
    return packed
  axis %= packed.ndim
  if axis == packed.ndim - 1:
    return _unpack_minor(packed, bits).astype(jnp.uint8)
  return _join([c.astype(jnp.uint8) for c in lanes(packed, bits, axis)], axis)


def lanes(packed, bits: int, axis: int):
  """Codes by their place in a packing group, without interleaving them.

  Args:
    packed: uint8.
    bits: 1 to 8.
    axis: the packed axis.

  Returns:
    `codes_per_group(bits)` uint32 arrays; array j holds codes j, j + group,
    j + 2 * group, ...
  """
  group = codes_per_group(bits)
  stream = _split(packed, axis % packed.ndim, group * bits // 8)
  stream = [b.astype(jnp.uint32) for b in stream]
  mask = jnp.uint32((1 << bits) - 1)
  out = []
  for j in range(group):
    byte, shift = divmod(j * bits, 8)
    code = stream[byte] >> shift
    if shift + bits > 8:
      code = code | stream[byte + 1] << (8 - shift)
    out.append(code & mask)
  return out


def _lanes_to_bytes(lanes_, bits: int):
  out = []
  for byte in range(len(lanes_) * bits // 8):
    acc = None
    for j, code in enumerate(lanes_):
      shift = j * bits - byte * 8
      if -bits < shift < 8:
        part = code << shift if shift >= 0 else code >> -shift
        acc = part if acc is None else acc | part
    out.append(acc)
  return out


def _split(x, axis: int, k: int):
  """x[..., 0::k, ...], x[..., 1::k, ...], ... along `axis`."""
  if k == 1:
    return [x]
  shape = x.shape
  x = x.reshape(*shape[:axis], shape[axis] // k, k, *shape[axis + 1 :])
  return [lax.index_in_dim(x, j, axis + 1, keepdims=False) for j in range(k)]


def _join(parts, axis: int):
  """The inverse of `_split`."""
  if len(parts) == 1:
    return parts[0]
  x = jnp.stack(parts, axis + 1)
  shape = x.shape
  size = shape[axis] * shape[axis + 1]
  return x.reshape(*shape[:axis], size, *shape[axis + 2 :])


def _pack_minor(codes, bits: int):
  lead, n = codes.shape[:-1], codes.shape[-1]
  if bits == 1:
    w = _bitcast_groups(codes, 2, jnp.uint16)
    return _pack_minor(((w | w >> 7) & 3).astype(jnp.uint8), 2)
  if bits == 2:
    w = _bitcast_groups(codes, 4, jnp.uint32)
    return (w | w >> 6 | w >> 12 | w >> 18).astype(jnp.uint8)
  if bits == 4:
    w = _bitcast_groups(codes, 2, jnp.uint16)
    return (w | w >> 4).astype(jnp.uint8)
  words = _words_of_four(codes, bits)
  if bits == 6:
    stream = [words >> (8 * j) for j in range(3)]
  else:
    low, high = _split(words, words.ndim - 1, 2)
    stream = []
    for j in range(bits):
      shift = 4 * bits - 8 * j
      if shift >= 8:
        stream.append(low >> (8 * j))
      elif shift > 0:
        stream.append(low >> (8 * j) | high << shift)
      else:
        stream.append(high >> -shift)
  out = jnp.stack([b.astype(jnp.uint8) for b in stream], -1)
  return out.reshape(*lead, n * bits // 8)


def _bitcast_groups(x, k: int, dtype):
  """Reads k neighbouring bytes of the minor axis as one word."""
  x = x.reshape(*x.shape[:-1], x.shape[-1] // k, k)
  return lax.bitcast_convert_type(x, dtype)


def _words_of_four(codes, bits: int):
  """uint32 words that hold four b-bit codes each, first code lowest."""
  w = _bitcast_groups(codes, 4, jnp.uint32)
  mask = (1 << bits) - 1
  out = w & mask
  for j in range(1, 4):
    out = out | (w >> (j * (8 - bits))) & (mask << (j * bits))
  return out


def _unpack_minor(packed, bits: int):
  lead, n = packed.shape[:-1], packed.shape[-1]
  if bits not in (1, 2, 4):
    words, per_word = _words_from_bytes(packed, bits), 4
  elif n % 4 == 0:
    words, per_word = _bitcast_groups(packed, 4, jnp.uint32), 32 // bits
  else:
    words, per_word = packed.astype(jnp.uint32), 8 // bits
  shifts = lax.iota(jnp.uint32, per_word) * bits
  codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
  return codes.reshape(*lead, unpacked_size(n, bits))


def _words_from_bytes(packed, bits: int):
  """The words of `_words_of_four`, read back from the byte stream."""
  if bits == 6:
    starts, size = (0,), 3
  else:
    starts, size = (0, 4 * bits), bits
  b = _split(packed, packed.ndim - 1, size)
  b = [c.astype(jnp.uint32) for c in b]
  words = []
  for start in starts:
    byte, shift = divmod(start, 8)
    word = b[byte] >> shift
    for j in range(byte + 1, -(-(start + 4 * bits) // 8)):
      word = word | b[j] << (8 * (j - byte) - shift)
    words.append(word)
  return _join(words, packed.ndim - 1)
