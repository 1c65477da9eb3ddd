"""From packed codes to float32, eight at a time.

What comes out, times the step of integers, is exactly what `dequantize` gives
for an element, NaN and Inf included. There are four ways, and `decoder` takes
the first that a format and a processor allow:

  integers   are converted.
  tables     of up to 16 numbers lie in one or two registers.
  halves     are minifloats with the exponent moved to that of a float16, which
             differs from the number by a power of two, subnormals included.
  memory     is a table of all codes, for everything else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lowbit_jax.cpu._code import (
  F32,
  I8,
  I16,
  I32,
  I64,
  LANES,
  F16x8,
  F32x8,
  I8x8,
  I16x8,
  I32x8,
  Module,
  Type,
  Value,
  address_of,
  choose,
  intrinsic,
  load,
)
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.formats import ElementFormat, FloatFormat, IntFormat

_HALF_MANTISSA, _HALF_BIAS, _HALF_EXPONENT = 10, 15, 5


class Codes(NamedTuple):
  """Eight codes of some bits, each within a lane of 32 bits.

  Attributes:
    word: lanes that hold the code from bit `start` on, and anything elsewhere.
    start: a number, or one for each lane.
    bits: of a code.
  """

  word: Value
  start: int | Sequence[int]
  bits: int

  def loose(self) -> Value:
    """The code in the lowest bits, anything above."""
    return self.word >> self._by(0, 1) if self._moves() else self.word

  def plain(self) -> Value:
    """The code as a number."""
    return self.loose() & ((1 << self.bits) - 1)

  def at_the_top(self) -> Value:
    """The code in the highest bits, anything below."""
    return self.word << self._by(32 - self.bits, -1)

  def _moves(self) -> bool:
    return not isinstance(self.start, int) or self.start != 0

  def _by(self, base: int, sign: int) -> Value:
    starts = self.start
    if isinstance(starts, int):
      return I32x8.constant(base + sign * starts)
    return I32x8.constant([base + sign * s for s in starts])


def codes_in_row(address: Value, bits: int) -> Codes:
  """Eight codes that follow each other, from an address on: `bits` bytes."""
  if bits == 8:
    return Codes(load(address, I8x8).unsigned(I32x8), 0, bits)
  # Two words of four codes where one of 32 bits cannot hold eight.
  low = _bytes(address, min(bits, 4))
  if bits <= 4:
    word, starts = low.everywhere(), [i * bits for i in range(LANES)]
    return Codes(word, starts, bits)
  whole = low.unsigned(I64) | (
    _bytes(address + 4, bits - 4).unsigned(I64) << 32
  )
  high = (whole >> 4 * bits).low(I32)
  places = [0] * 4 + [LANES] * 4
  word = low.everywhere().lanes_at(places, high.everywhere())
  return Codes(word, [i % 4 * bits for i in range(LANES)], bits)


def _bytes(address: Value, count: int) -> Value:
  """So many bytes, 1 to 4, as an integer; none beside them is read."""
  byte = Type(I8x8.element, 1)
  if count == 4:
    return load(address, I32)
  if count == 1:
    return load(address, byte).unsigned(I32)
  low = load(address, I16).unsigned(I32)
  if count == 2:
    return low
  return low | (load(address + 2, byte).unsigned(I32) << 16)


# Sixteen bytes, twice: AVX2 moves bytes within each half of a vector only; and
# the same in pairs, which it can shift.
BYTES, PAIRS = I8.vector(32), I16.vector(16)
_UNIT = 8  # bytes that become LANES numbers


def whole_bytes(address: Value, count: int) -> Value:
  """8 or 16 bytes from an address on, as BYTES; 8 are there four times."""
  if count == _UNIT:
    return load(address, I64).everywhere(4).bits(BYTES)
  return load(address, I8.vector(16)).lanes_at([*range(16)] * 2)


def codes_in_bytes(rows: Sequence[Value], bits: int) -> list[Value]:
  """The first codes of all bytes, the second ones, and so on, one a byte.

  Args:
    rows: bytes, and those that follow each of them, so that codes may lie
      across two rows; bits that are left at the end are no code.
    bits: of a code.
  """
  out = []
  for i in range(8 * len(rows) // bits):
    row, start = divmod(i * bits, 8)
    low = min(bits, 8 - start)  # bits of the code that are in this byte
    code = _shifted(rows[row], -start) & ((1 << low) - 1)
    if low < bits:
      rest = (1 << bits) - (1 << low)
      code = code | (_shifted(rows[row + 1], low) & rest)
    out.append(code)
  return out


def _shifted(whole: Value, by: int) -> Value:
  """Bytes shifted to the left by some bits, or to the right, so that bits of
  their neighbours come in."""
  pairs = whole.bits(PAIRS)
  if by < 0:
    return (pairs >> -by).bits(BYTES)
  return (pairs << by).bits(BYTES) if by else whole


def bytes_in_row(address: Value, bits: int) -> Value:
  """The codes that follow in a row, as many in each of 32 bytes as fit into it.

  Bits beside them may be anything. `bytes_of_row` is how many bytes hold these
  codes; none beside them is read.
  """
  if 8 % bits == 0:
    return load(address, BYTES)
  field = 8 // bits * bits  # what becomes a byte
  words = _words_in_row(address, 4 * field)
  # The fields of a word are moved apart, first two by two.
  apart = (words << (16 - 2 * field)).bits(PAIRS)
  lanes = PAIRS.lanes
  order = [i + lanes if i % 2 else i for i in range(lanes)]
  pairs = words.bits(PAIRS).lanes_at(order, apart)
  return ((pairs & 0xFF) | ((pairs << (8 - field)) & 0xFF00)).bits(BYTES)


def _words_in_row(address: Value, bits: int) -> Value:
  """The bits that follow in a row, so many of them, 20, 24 or 28, in each of
  eight words of 32."""
  half = I8.vector(16)
  nbytes = 4 * bits // 8  # of four words
  low = load(address, half)
  high = load(address + 2 * nbytes - half.nbytes, half)
  places, starts = [], []
  for first in (0, half.nbytes - nbytes):
    for i in range(4):
      byte, start = divmod(bits * i, 8)
      places += [min(first + byte + j, half.nbytes - 1) for j in range(4)]
      starts.append(start)
  whole = low.lanes_at(range(BYTES.lanes), high)
  words = _picked(whole, BYTES.constant(places)).bits(I32x8)
  return words >> I32x8.constant(starts) if any(starts) else words


def bytes_of_row(bits: int) -> int:
  """Bytes of the codes that `bytes_in_row` gives."""
  return BYTES.nbytes * (8 // bits) * bits // 8


def eight_of(whole: Value, part: int, target: Target) -> Value:
  """Bytes 8 part ... 8 part + 7 as integers of 32 bits."""
  first = _UNIT * part
  if not target.has_permutations:
    return whole.lanes_at(range(first, first + LANES)).unsigned(I32x8)
  places = [0x80] * 32  # of a zero
  places[::4] = range(first, first + LANES)
  return _picked(whole, BYTES.constant(places)).bits(I32x8)


def _picked(whole: Value, places: Value) -> Value:
  """Bytes at the places within 16 bytes, on processors with AVX2."""
  name = 'llvm.x86.avx2.pshuf.b'
  return intrinsic(name, BYTES, whole, places, is_overloaded=False)


class Ordinal(NamedTuple):
  """Elements as unsigned integers: element = (integer - offset) * step.

  Attributes:
    integers: from codes, one a byte, to such integers of 8 bits.
    offset: an integer.
    step: a power of two.
  """

  integers: Callable[[Value], Value]
  offset: int
  step: float


def ordinal(fmt: ElementFormat, target: Target) -> Ordinal | None:
  """Elements as integers of 8 bits, None where they are none."""
  if isinstance(fmt, IntFormat):
    if np.frexp(fmt.step)[0] != 0.5:
      return None
    if not fmt.signed:
      return Ordinal(lambda codes: codes, 0, float(fmt.step))
    sign = 1 << (fmt.bits - 1)  # two's complement, seen from the least number
    return Ordinal(lambda codes: codes ^ sign, sign, float(fmt.step))
  if fmt.bits > 6 or not target.has_permutations:
    return None
  values = fmt.values()
  for step in 2.0 ** np.arange(8, -9, -1):
    integers = np.rint(values / step)
    if np.array_equal(integers * step, values) and np.ptp(integers) < 256:
      return _in_tables(integers.astype(int), step)
  return None


def _in_tables(integers: np.ndarray, step: float) -> Ordinal:
  """Lookup of integers in registers, 16 in each."""
  offset = -int(integers.min())
  whole = np.resize(integers + offset, max(16, len(integers)))
  tables = [
    BYTES.constant(np.tile(table, 2).tolist())
    for table in whole.reshape(-1, 16)
  ]

  def integers_of(codes):
    found, bit = [_picked(table, codes) for table in tables], 4
    while len(found) > 1:
      # A byte is negative where the bit is set that says which table holds it.
      is_second = _shifted(codes, 7 - bit) < 0
      twos = zip(found[::2], found[1::2], strict=True)
      found, bit = [choose(is_second, b, a) for a, b in twos], bit + 1
    return found[0]

  return Ordinal(integers_of, offset, float(step))


def codes_in_columns(address: Value, stride: Value, bits: int) -> list[Codes]:
  """Codes of eight columns: those of as many rows as share whole bytes.

  Args:
    address: of the first byte of the first column.
    stride: bytes between rows of bytes.
    bits: of a code.
  """
  count = rows_of_group(bits)
  rows = [
    load(address + stride * i, I8x8).unsigned(I32x8)
    for i in range(count * bits // 8)
  ]
  out = []
  for i in range(count):
    row, start = divmod(i * bits, 8)
    word = rows[row]
    if start + bits > 8:
      word = word | (rows[row + 1] << 8)
    out.append(Codes(word, start, bits))
  return out


def rows_of_group(bits: int) -> int:
  """How many codes share whole bytes."""
  return 8 // int(np.gcd(8, bits))


class Decoder(NamedTuple):
  """How codes of a format become numbers.

  Attributes:
    values: from codes to float32.
    factor: what they are to be multiplied by, a power of two.
  """

  values: Callable[[Codes], Value]
  factor: float


def decoder(
  fmt: ElementFormat, name: str, module: Module, target: Target
) -> Decoder:
  """The decoder of a format of at most 8 bits.

  Args:
    fmt: the format.
    name: of the table of the format, if it needs one, in the module.
    module: of the kernel.
    target: the processor.
  """
  if isinstance(fmt, IntFormat) and np.frexp(fmt.step)[0] == 0.5:
    return Decoder(_signed if fmt.signed else _unsigned, float(fmt.step))
  if fmt.bits <= 4 and target.has_permutations:
    return Decoder(_in_registers(fmt.values().astype(np.float32)), 1.0)
  if isinstance(fmt, FloatFormat) and not fmt.zero:
    if fmt.exponent_bits == 8 and fmt.bias == 127:
      return Decoder(_powers, 1.0)
  elif isinstance(fmt, FloatFormat) and target.has_halves and _is_half(fmt):
    return Decoder(_halves(fmt), 1.0)
  module.table(name, fmt.values().astype(np.float32))
  return Decoder(lambda codes: _gathered(name, codes), 1.0)


def _signed(codes: Codes) -> Value:
  return codes.at_the_top().shifted_right(32 - codes.bits).number(F32x8)


def _unsigned(codes: Codes) -> Value:
  return codes.plain().number(F32x8)


def _in_registers(values: np.ndarray) -> Callable[[Codes], Value]:
  """Lookup in a table of at most 16 numbers."""
  size = len(values)
  table = [float(v) for v in np.tile(values, max(1, 2 * LANES // size))]
  low, high = table[:LANES], table[LANES:]
  is_mirrored = all(
    np.float32(a).tobytes() == np.float32(-b).tobytes()
    for a, b in zip(low, high, strict=True)
  )

  def pick(numbers, codes):
    # Of each lane the lowest three bits are read.
    return intrinsic(
      'llvm.x86.avx2.permps',
      F32x8,
      F32x8.constant(numbers),
      codes.loose(),
      is_overloaded=False,
    )

  def values_of(codes):
    if size < 2 * LANES:
      return pick(low, codes)
    top = codes.at_the_top()
    if is_mirrored:
      sign = top & I32x8.constant(-(2**31))
      return (pick(low, codes).bits(I32x8) ^ sign).bits(F32x8)
    return choose(top < 0, pick(high, codes), pick(low, codes))

  return values_of


def _powers(codes: Codes) -> Value:
  """Powers of two, and NaN for the last code."""
  code = codes.plain()
  is_nan = code.equals(255)
  power = choose(is_nan, I32x8.constant(-1), code << 23)
  return power.bits(F32x8)


def _is_half(fmt: FloatFormat) -> bool:
  """Whether a float16 has room for its exponents, of which the greatest one is
  that of Inf and NaN alone."""
  if fmt.exponent_bits == _HALF_EXPONENT:
    return fmt.special == 'ieee'
  return fmt.exponent_bits < _HALF_EXPONENT


def _halves(fmt: FloatFormat) -> Callable[[Codes], Value]:
  """Minifloats as float16 with another bias."""
  magnitude_bits = fmt.bits - fmt.signed
  largest = (1 << magnitude_bits) - 1
  shift = _HALF_MANTISSA - fmt.mantissa_bits
  top_exponent = largest >> fmt.mantissa_bits << fmt.mantissa_bits

  def values_of(codes):
    code = codes.plain().low(I16x8)
    magnitude = code & largest
    half = magnitude << shift
    if fmt.signed:
      half = half | ((code & (1 << magnitude_bits)) << (15 - magnitude_bits))
    # Codes that are not finite.
    ones, none = I16x8.constant(-1), I16x8.constant(0)
    if fmt.special == 'fn':
      half = half | choose(magnitude.equals(largest), ones, none)
    elif fmt.special == 'fnuz':
      half = half | choose(code.equals(1 << magnitude_bits), ones, none)
    elif fmt.special == 'ieee' and fmt.exponent_bits < _HALF_EXPONENT:
      is_top = (magnitude & top_exponent).equals(top_exponent)
      half = half | choose(is_top, I16x8.constant(0x7C00), none)
    value = half.bits(F16x8).widened(F32x8)
    factor = 2.0 ** (_HALF_BIAS - fmt.bias)
    return value if factor == 1 else value * factor

  return values_of


def halves_in_bytes(
  fmt: ElementFormat, target: Target
) -> Callable[[Value], list[Value]] | None:
  """A decoder of 16 bytes at once, into two vectors; None where there is none.

  A code of 8 bits is moved to the top of 16, where its sign is that of a
  float16, and its exponent to the low bits of the exponent there.
  """
  if not isinstance(fmt, FloatFormat) or not _is_half(fmt):
    return None
  if fmt.bits != 8 or not fmt.signed or not fmt.zero:
    return None
  if not (target.has_permutations and target.has_halves):
    return None
  shift = _HALF_EXPONENT - fmt.exponent_bits
  magnitude = 0x7F00 >> shift
  exponent = magnitude & 0x7C00
  wide = I16.vector(16)
  none, ones = wide.constant(0), wide.constant(-1)
  factor = 2.0 ** (_HALF_BIAS - fmt.bias)
  places = [0x80] * 32  # of a zero
  places[1:16:2], places[17::2] = range(8), range(8, 16)

  def numbers(whole):
    top = _picked(whole, BYTES.constant(places)).bits(wide)
    half = top.shifted_right(shift) & wide.constant(magnitude - 0x8000)
    if fmt.special == 'fn':
      is_nan = (half & magnitude).equals(magnitude)
      half = half | choose(is_nan, ones, none)
    elif fmt.special == 'fnuz':
      half = half | choose(top.equals(-0x8000), ones, none)
    elif fmt.special == 'ieee' and shift:
      is_top = (half & exponent).equals(exponent)
      half = half | choose(is_top, wide.constant(0x7C00), none)
    parts = [half.lanes_at(range(i, i + LANES)) for i in (0, LANES)]
    parts = [part.bits(F16x8).widened(F32x8) for part in parts]
    return parts if factor == 1 else [part * factor for part in parts]

  return numbers


def _gathered(name: str, codes: Codes) -> Value:
  """Lookup in a table in memory, lane by lane."""
  code, table = codes.plain(), address_of(name)
  lanes = [
    load(table + code.lane(i).unsigned(I64) * 4, F32) for i in range(LANES)
  ]
  out = lanes[0].everywhere()
  for i, value in enumerate(lanes[1:], 1):
    order = [LANES + j if j == i else j for j in range(LANES)]
    out = out.lanes_at(order, value.everywhere())
  return out


def scale_table(fmt: ElementFormat, factor: float) -> np.ndarray:
  """All 256 scales of at most 8 bits, times a factor."""
  values = fmt.values() * factor
  return np.resize(values, 256).astype(np.float32)


def float_of(bits: Value, name: str, has_halves: bool) -> Value:
  """float16 or bfloat16, given as integers of 32 bits, as float32."""
  lanes = bits.type.lanes
  number, word = (F32x8, I32x8) if lanes == LANES else (F32, I32)
  if name == 'bfloat16':
    return (bits << 16).bits(number)
  if has_halves:
    half = I16x8 if lanes == LANES else I16
    kind = F16x8 if lanes == LANES else F16x8.scalar()
    return bits.low(half).bits(kind).widened(number)
  # Subnormal numbers are integers times 2^-24; some processors drop others.
  magnitude = bits & 0x7FFF
  sign = (bits & 0x8000) << 16
  normal = (magnitude << 13) + (112 << 23)
  top = choose(magnitude < 0x7C00, normal, (magnitude << 13) | (255 << 23))
  small = (magnitude.number(number) * 2.0**-24).bits(word)
  value = choose(magnitude < 0x400, small, top)
  return (value | sign).bits(number)
