"""Packing of b-bit codes into bytes, little end first.

Element i of the packed axis occupies bits [i*b, (i+1)*b) of the byte stream,
least significant bit first, so 4-bit codes put the even element into the low
nibble. Eight codes fill b bytes.

The minor axis is packed through 32-bit words, because strided loads and stores
of bytes do not vectorise; other axes are packed slice by slice.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Integers = TypeVar('_Integers', jax.Array, np.ndarray)


def codes_per_group(bits: int) -> int:
  """Codes in the smallest run that fills whole bytes."""
  return 8 // math.gcd(8, bits)


def packed_size(n: int, bits: int) -> int:
  """Bytes that `n` codes occupy; `n` is a multiple of `codes_per_group`."""
  return n * bits // 8


def unpacked_size(n: int, bits: int) -> int:
  """Codes in `n` bytes."""
  return n * 8 // bits


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
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


def pack_lanes(lanes_: Sequence[jax.Array], bits: int, axis: int) -> jax.Array:
  """Packs codes that are already split into the lanes of `lanes`.

  Args:
    lanes_: `codes_per_group(bits)` uint8 arrays.
    bits: 1 to 8.
    axis: non-negative axis of the lanes.

  Returns:
    uint8, `axis` grown by bits * len(lanes_) / 8.
  """
  return _join(lanes_to_planes(lanes_, bits), axis)


def unpack(packed: jax.Array, bits: int, axis: int = -1) -> jax.Array:
  """The inverse of `pack`: uint8 codes."""
  if bits == 8:
    return packed
  axis %= packed.ndim
  if axis == packed.ndim - 1:
    return _unpack_minor(packed, bits).astype(jnp.uint8)
  return _join([c.astype(jnp.uint8) for c in lanes(packed, bits, axis)], axis)


def lanes(packed: jax.Array, bits: int, axis: int) -> list[jax.Array]:
  """Codes by their place in a packing group, without interleaving them.

  Args:
    packed: uint8.
    bits: 1 to 8.
    axis: the packed axis.

  Returns:
    `codes_per_group(bits)` uint32 arrays; array j holds codes j, j + group,
    j + 2 * group, ...
  """
  size = codes_per_group(bits) * bits // 8
  return planes_to_lanes(_split(packed, axis % packed.ndim, size), bits)


def planes_to_lanes(planes: Sequence[jax.Array], bits: int) -> list[jax.Array]:
  """Codes of packing groups whose bytes lie in arrays of their own.

  Args:
    planes: `codes_per_group(bits) * bits / 8` uint8 arrays; array b holds byte
      b of every packing group.
    bits: 1 to 8.

  Returns:
    `codes_per_group(bits)` uint32 arrays of the same shape; array j holds code
    j of every packing group.
  """
  mask = jnp.uint32((1 << bits) - 1)
  return [
    field >> shift if shift + bits == 8 else field >> shift & mask
    for field, shift in planes_to_fields(planes, bits)
  ]


def planes_to_fields(
  planes: Sequence[jax.Array], bits: int
) -> list[tuple[jax.Array, int]]:
  """As `planes_to_lanes`, with codes where they are: (uint32 array, place of
  the lowest bit). Other bits of the first 16 hold something else."""
  stream = [b.astype(jnp.uint32) for b in planes]
  out = []
  for j in range(codes_per_group(bits)):
    byte, shift = divmod(j * bits, 8)
    field = stream[byte]
    if shift + bits > 8:
      field = field | stream[byte + 1] << 8
    out.append((field, shift))
  return out


def lanes_to_planes(lanes_: Sequence[jax.Array], bits: int) -> list[jax.Array]:
  """The inverse of `planes_to_lanes`, in the dtype of the lanes."""
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
  if all(isinstance(n, int) for n in x.shape):
    return lax.bitcast_convert_type(x, dtype)
  # Of symbolic shapes XLA casts elements of one width only.
  parts = [x[..., j].astype(dtype) << 8 * j for j in range(k)]
  return functools.reduce(operator.or_, parts)


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
  words = words[..., None]
  shape = (1,) * (words.ndim - 1) + (per_word,)
  shifts = lax.broadcasted_iota(jnp.uint32, shape, words.ndim - 1) * bits
  codes = (words >> shifts) & ((1 << bits) - 1)
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


class Products(NamedTuple):
  """How matrix units pack tiles of 128 codes into tiles of 128 bytes.

  A code c at bit o of its byte has low = c & (2^(8-o) - 1) in that byte, as
  low 2^o, and c - low in the next one, as (c - low) 2^(o-8). These are
  multiples of powers of two below 256 that no two codes share, so float32 sums
  of bfloat16 products are exact.

  Attributes:
    masks: int32 ``(code tiles, 128)``, the bits of `low`; None where no code
      crosses a byte.
    steps: for each byte tile, its (code tile, matrix) of the low parts.
    carries: the same for the rest.
    matrices: float32 ``(k, 128, 128)``, exact in bfloat16.
  """

  masks: np.ndarray | None
  steps: tuple[tuple[tuple[int, int], ...], ...]
  carries: tuple[tuple[tuple[int, int], ...], ...]
  matrices: np.ndarray


def byte_matrices(bits: int, size: int) -> tuple:
  """The matrices A and B with bytes = low A + (code - low) B, see `Products`.

  Args:
    bits: 1 to 8.
    size: codes, in whole bytes.

  Returns:
    float32 A and B ``(size, size * bits / 8)``, exact in bfloat16; B is None
    where no code crosses a byte.
  """
  byte, offset = np.divmod(np.arange(size) * bits, 8)
  low = np.zeros((size, size * bits // 8), np.float32)
  carry = np.zeros_like(low)
  low[np.arange(size), byte] = 2.0**offset
  crosses = offset + bits > 8
  carry[crosses, byte[crosses] + 1] = 2.0 ** (offset[crosses] - 8)
  return low, carry if crosses.any() else None


def low_mask(column: _Integers, bits: int) -> _Integers:
  """The bits of the code at an int32 column that stay in its first byte."""
  return (1 << (8 - (column * bits & 7))) - 1


@functools.cache
def products(bits: int) -> Products:
  """The products that pack `bits`-bit codes, for the fewest whole tiles."""
  size = 8 // math.gcd(bits, 8) * 128
  low, carry = byte_matrices(bits, size)
  matrices: list[np.ndarray] = []

  def tiles(matrix, j):
    if matrix is None:
      return ()
    out = []
    for i in range(size // 128):
      tile = matrix[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
      if not tile.any():
        continue
      same = [k for k, m in enumerate(matrices) if np.array_equal(m, tile)]
      if not same:
        matrices.append(tile)
      out.append((i, same[0] if same else len(matrices) - 1))
    return tuple(out)

  count = size * bits // 1024
  steps = tuple(tiles(low, j) for j in range(count))
  carries = tuple(tiles(carry, j) for j in range(count))
  masks = low_mask(np.arange(size, dtype=np.int32), bits).reshape(-1, 128)
  return Products(
    None if carry is None else masks, steps, carries, np.stack(matrices)
  )
