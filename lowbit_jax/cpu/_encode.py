"""From float32 to packed codes, eight at a time.

Numbers are rounded to the nearest, ties to the even code, and saturate; the
codes are those of `quantize`. What is encoded is never NaN.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lowbit_jax.cpu import _decode
from lowbit_jax.cpu._code import (
  I8,
  I16,
  I32,
  I64,
  LANES,
  F32x8,
  I8x8,
  I16x8,
  I32x8,
  Type,
  Value,
  choose,
  intrinsic,
  least,
  load,
  most,
)
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.formats import (
  CodebookFormat,
  ElementFormat,
  FloatFormat,
  IntFormat,
)

MAGNITUDE, INFINITE, LEAST_NORMAL = 0x7FFFFFFF, 0x7F800000, 0x00800000
_MANTISSA = 23  # bits of float32
_TO_INTEGER = 1.5 * 2.0**_MANTISSA  # whose sums keep no fraction
_MOST_ENTRIES = 2 * LANES  # of a codebook


class Zero(NamedTuple):
  """Zero points: integers, and what numbers are clipped to before they are
  added, which are the ends of the range less the zero point."""

  point: Value
  low: Value
  high: Value


Encoder = Callable[[Value, Zero | None], Value]


def why_not(fmt: ElementFormat) -> str | None:
  """Why there is no encoder for elements, or None."""
  if isinstance(fmt, FloatFormat):
    if not fmt.mantissa_bits or not fmt.zero:
      return f'{fmt.name} has no mantissa, or no zero'
  elif isinstance(fmt, IntFormat):
    if fmt.fraction_bits not in range(31):
      return f'{fmt.name} has {fmt.fraction_bits} fraction bits'
  elif isinstance(fmt, CodebookFormat):
    if len(fmt.table) > _MOST_ENTRIES:
      return f'{fmt.name} has more than {_MOST_ENTRIES} entries'
  else:
    return f'{fmt.name} is of an unknown kind'
  return None


def encoder(fmt: ElementFormat, target: Target) -> Encoder:
  """A function from float32 and zero points to codes in lanes of 32 bits."""
  if isinstance(fmt, FloatFormat):
    return lambda x, zero: encode_float(x, fmt)
  if isinstance(fmt, IntFormat):
    return lambda x, zero: _encode_int(x, fmt, zero)
  assert isinstance(fmt, CodebookFormat)
  bounds = _bounds(fmt)
  search = _by_halves if target.has_permutations else _by_counting
  return lambda x, zero: search(x, bounds)


def encode_float(x: Value, fmt: FloatFormat) -> Value:
  """Codes of a minifloat.

  The sum of |x| and 2^(e + 23 - m), where 2^e is at most |x| or the smallest
  normal number, is |x| rounded to m bits: what the low bits of the sum count is
  the mantissa, with its leading one unless the number is subnormal.
  """
  m, exponent_step = fmt.mantissa_bits, 1 << _MANTISSA
  first = (fmt.emin + 127) << _MANTISSA
  largest = F32x8.constant(float(fmt.max))
  size = least((x.bits(I32x8) & MAGNITUDE).bits(F32x8), largest)
  exponent = most(size.bits(I32x8) & INFINITE, I32x8.constant(first))
  anchor = exponent + (_MANTISSA - m) * exponent_step
  count = (size + anchor.bits(F32x8)).bits(I32x8) - anchor
  code = (exponent >> (_MANTISSA - m)) - (first >> (_MANTISSA - m)) + count
  if not fmt.signed:
    return choose(x.bits(I32x8) < 0, I32x8.constant(0), code)
  place = fmt.exponent_bits + m
  sign = (x.bits(I32x8) >> (31 - place)) & (1 << place)
  if fmt.special == 'fnuz':
    sign = choose(code.equals(0), I32x8.constant(0), sign)
  return code | sign


def _encode_int(x: Value, fmt: IntFormat, zero: Zero | None) -> Value:
  if fmt.fraction_bits:
    x = x * float(1 << fmt.fraction_bits)
  top = float(fmt.code_max)
  low = (
    F32x8.constant(-top if fmt.signed else 0.0) if zero is None else zero.low
  )
  high = F32x8.constant(top) if zero is None else zero.high
  # The low bits of the sum are those of the rounded number.
  x = most(least(x, high), low) + _TO_INTEGER
  code = x.bits(I32x8)
  if zero is not None:
    code = code + zero.point
  return code & ((1 << fmt.bits) - 1)


def _bounds(fmt: CodebookFormat) -> list[float]:
  """The largest float32 that still gets each code but the last one."""
  bounds = []
  for a, b in zip(fmt.table, fmt.table[1:], strict=False):
    middle = (a + b) / 2
    bound = np.float32(middle)
    if float(bound) > middle:
      bound = np.nextafter(bound, np.float32(-np.inf))
    bounds.append(float(bound))
  return bounds


def _by_counting(x: Value, bounds: Sequence[float]) -> Value:
  """How many bounds lie below x."""
  code = I32x8.constant(0)
  for bound in bounds:
    code = code - (x > bound).signed(I32x8)
  return code


def _by_halves(x: Value, bounds: Sequence[float]) -> Value:
  """The same, by comparisons with one bound for each bit of the code."""
  bits = len(bounds).bit_length()
  padded = [*bounds, *[float('inf')] * ((1 << bits) - 1 - len(bounds))]
  code = None
  for bit in reversed(range(bits)):
    options = padded[(1 << bit) - 1 :: 2 << bit]
    if code is None:
      bound = F32x8.constant(options[0])
    else:
      table = F32x8.constant(list(np.resize(options, LANES)))
      name = 'llvm.x86.avx2.permps'
      bound = intrinsic(name, F32x8, table, code, is_overloaded=False)
    above = (x > bound).signed(I32x8)
    code = I32x8.constant(0) - above if code is None else code + code - above
  assert code is not None
  return code


def joined(vectors: Sequence[Value]) -> Value:
  """The low bytes of the lanes of 1 to 4 vectors, in order.

  Args:
    vectors: of 32 bits, of which all but the last hold nothing above 8 bits.
  """
  if len(vectors) == 1:
    return vectors[0].low(I8x8)
  words = vectors[0]
  for j, vector in enumerate(vectors[1:], 1):
    words = words | (vector << (8 * j))
  size = I32.size
  places = [size * i + j for j in range(len(vectors)) for i in range(LANES)]
  return words.bits(_bytes(size * LANES)).lanes_at(places)


def packed(vectors: Sequence[Value], bits: int) -> Value:
  """The bytes of codes of 1 to 4 vectors that follow each other."""
  count, count_bytes = len(vectors), LANES * len(vectors)
  data = joined(vectors)
  if bits == 8:
    return data
  wide = I64 if count == 1 else Type(I64.element, I64.size, count)
  words = data.bits(wide)
  # Neighbours move together until they fill whole bytes.
  span, width = 8, bits
  while width % 8:
    fields = range(0, 64, 2 * span)
    low = sum(((1 << width) - 1) << start for start in fields)
    high = low << width
    words = (words & low) | ((words >> (span - width)) & high)
    span, width = 2 * span, 2 * width
  places = [
    start + i
    for start in range(0, count_bytes, span // 8)
    for i in range(width // 8)
  ]
  return words.bits(_bytes(count_bytes)).lanes_at(places)


def byte_rows(codes: Sequence[Value], bits: int) -> list[Value]:
  """Bytes of the codes of rows that share whole bytes, in lanes of 32 bits."""
  out = []
  for byte in range(len(codes) * bits // 8):
    total = None
    for j, code in enumerate(codes):
      shift = j * bits - 8 * byte
      if -bits < shift < 8:
        part = code << shift if shift >= 0 else code >> -shift
        total = part if total is None else total | part
    assert total is not None
    out.append(total & 0xFF)
  return out


def _bytes(count: int) -> Type:
  return Type(I8.element, I8.size, count)


def eight(address: Value, dtype: str, has_halves: bool) -> Value:
  """Eight numbers of an array, as float32."""
  if dtype == 'float32':
    return load(address, F32x8)
  word = load(address, I16x8).unsigned(I32x8)
  return _decode.float_of(word, dtype, has_halves)


def half_bits(number: Value, name: str) -> Value:
  """float32 as the bits of float16 or bfloat16, rounded to the nearest even, in
  lanes of 32 bits; not for NaN."""
  if name == 'bfloat16':
    word = number.bits(I32x8)
    return (word + 0x7FFF + ((word >> 16) & 1)) >> 16
  half = Type(_decode.F16x8.element, I16.size, LANES)
  return number.narrowed(half).bits(I16x8).unsigned(I32x8)
