"""The numerics one number at a time, in plain Python: what the arrays must do.

Every rule of this package is written here a second time with `Fraction`, so
that each step can be read beside the standard that defines it and checked by
hand. Values are `Fraction` or Python floats (which hold every float32 exactly);
a float stands for Inf, NaN and -0.0, which `Fraction` does not have. Nothing
here is fast; the array versions in `lowbit_jax.numerics` and
`lowbit_jax.quantize` are bit-equal to it.

Two conventions are shared by everything that works in float32:
  * a subnormal float32 counts as a zero of the same sign, where it is read and
    where it is produced, as on XLA's CPU and TPU back ends (`flush`);
  * x / s is computed as x * r with r = 1 / s, each rounded to float32, because
    XLA may do so anyway.
"""

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from lowbit_jax.formats import (
  BlockFormat,
  CodebookFormat,
  ElementFormat,
  FloatFormat,
  IntFormat,
  float32 as FLOAT32,
)

Number = Fraction | float | int

RANDOM_BITS = 23  # of stochastic rounding, by default
ROUNDINGS = ('nearest_even', 'toward_zero', 'stochastic')
OVERFLOWS = ('saturate', 'special')
EXPONENT_RULES = ('floor', 'ceil', 'even', 'rceil', 'round')
UNEVEN_RULES = ('signed_absmax', 'full_range')

E8M0_BIAS = 127
E8M0_NAN = 255
FLOAT32_MIN_NORMAL = Fraction(1, 2**126)


# Signs, exponents, whole numbers.


def is_finite(value: Number) -> bool:
  """False for Inf and NaN."""
  return isinstance(value, Fraction) or math.isfinite(value)


def is_negative(value: Number) -> bool:
  """The sign bit; True for -0.0."""
  if isinstance(value, Fraction):
    return value < 0
  return math.copysign(1.0, value) < 0


def with_sign(magnitude: Number, negative: bool) -> Number:
  """`magnitude` with that sign; the negative zero is the float -0.0."""
  if not negative:
    return magnitude
  return -magnitude if magnitude else -0.0


def power_of_two(e: int) -> Fraction:
  """2^e."""
  return Fraction(2**e) if e >= 0 else Fraction(1, 2**-e)


def floor_log2(value: Fraction) -> int:
  """The e with 2^e <= value < 2^(e+1), for value > 0."""
  n, d = value.numerator, value.denominator
  e = n.bit_length() - d.bit_length()
  return e if value >= power_of_two(e) else e - 1


def round_to_integer(
  u: Fraction,
  rounding: str = 'nearest_even',
  *,
  odd: bool | None = None,
  random: int = 0,
  random_bits: int = RANDOM_BITS,
) -> int:
  """Rounds u to one of the two whole numbers around it.

  nearest_even: the nearer one, the even one on a tie.
  toward_zero: the one of smaller magnitude.
  stochastic: the upper one iff j + 1/2 < frac(u) * 2^n for the n-bit integer j,
  that is for round(frac(u) * 2^n) of the 2^n equally likely j: unbiased up to
  half a random bit, and exact values never move.

  Args:
    u: the number.
    rounding: one of `ROUNDINGS`.
    odd: whether the lower whole number counts as odd; None: its own parity.
    random: j, for 'stochastic'.
    random_bits: n, for 'stochastic'.
  """
  lower = math.floor(u)
  fraction = u - lower
  if rounding == 'nearest_even':
    lower_is_odd = lower % 2 == 1 if odd is None else odd
    up = fraction > Fraction(1, 2) or (
      fraction == Fraction(1, 2) and lower_is_odd
    )
  elif rounding == 'toward_zero':
    up = fraction > 0 and u < 0
  elif rounding == 'stochastic':
    if not 0 <= random < 2**random_bits:
      raise ValueError(f'{random=} must be an integer of {random_bits=} bits')
    up = random + Fraction(1, 2) < fraction * 2**random_bits
  else:
    raise ValueError(f'{rounding=} is not one of {ROUNDINGS}')
  return lower + up


# Elements.


def decode(code: int, element: ElementFormat) -> Number:
  """The number that `code` stands for.

  Returns:
    A Fraction, or a float for -0.0, Inf and NaN.
  """
  if not 0 <= code < 2**element.bits:
    raise ValueError(
      f'{code=} is not a code of {element} ({element.bits} bits)'
    )
  if isinstance(element, CodebookFormat):
    return Fraction(element.table[code])
  if isinstance(element, IntFormat):
    negative = element.signed and code >= 2 ** (element.bits - 1)
    integer = code - 2**element.bits if negative else code
    return Fraction(integer, 2**element.fraction_bits)
  assert isinstance(element, FloatFormat)
  return _decode_float(code, element)


def _decode_float(code: int, element: FloatFormat) -> Number:
  field_bits = element.exponent_bits + element.mantissa_bits
  sign, magnitude = divmod(code, 2**field_bits)
  e, m = divmod(magnitude, 2**element.mantissa_bits)
  all_ones = magnitude == 2**field_bits - 1
  top_exponent = e == 2**element.exponent_bits - 1
  if element.special == 'fnuz' and sign and magnitude == 0:
    return math.nan
  if element.special == 'fn' and all_ones:
    return math.nan
  if element.special == 'ieee' and top_exponent:
    return math.nan if m else -math.inf if sign else math.inf
  significand = Fraction(m, 2**element.mantissa_bits)
  if e == 0 and element.zero:
    value = significand * power_of_two(1 - element.bias)
  else:
    value = (1 + significand) * power_of_two(e - element.bias)
  return with_sign(value, bool(sign))


def values(element: ElementFormat) -> list[Number]:
  """The numbers of all codes, in the order of the codes."""
  return [decode(code, element) for code in range(2**element.bits)]


def encode(
  value: Number,
  element: ElementFormat,
  rounding: str = 'nearest_even',
  overflow: str = 'saturate',
  *,
  random: int = 0,
  random_bits: int = RANDOM_BITS,
  lowest: bool = False,
) -> int:
  """The code of `value` rounded to `element`.

  Args:
    value: any number; Inf, NaN and -0.0 as floats.
    element: the format.
    rounding: one of `ROUNDINGS`. In a codebook a tie goes to the lower entry.
    overflow: 'saturate': what rounds beyond the largest finite number, Inf
      included, becomes that number. 'special': it becomes the format's Inf or
      else NaN where it has one, as in a cast. Neither matters to NaN, which
      becomes the format's NaN, or (the code nearest to) zero without one.
    random: the uniform integer of 'stochastic', below 2**random_bits.
    random_bits: its width.
    lowest: whether signed integers reach -2^(b-1), which has no opposite.

  Returns:
    The code, an integer in [0, 2**bits).
  """
  if overflow not in OVERFLOWS:
    raise ValueError(f'{overflow=} is not one of {OVERFLOWS}')
  to_integer = lambda u, odd=None: round_to_integer(  # noqa: E731
    u, rounding, odd=odd, random=random, random_bits=random_bits
  )
  if isinstance(element, CodebookFormat):
    return _encode_codebook(value, element, rounding, to_integer)
  if isinstance(element, IntFormat):
    return _encode_int(value, element, to_integer, lowest)
  assert isinstance(element, FloatFormat)
  return _encode_float(value, element, to_integer, overflow)


def _encode_float(
  value: Number, element: FloatFormat, to_integer: Callable, overflow: str
) -> int:
  negative = is_negative(value)
  if value != value:
    return element.nan_code or 0
  if negative and not element.signed:
    return 0
  sign = negative << (element.exponent_bits + element.mantissa_bits)
  magnitude = _magnitude_code(value, element, to_integer)
  if magnitude <= element.code_max:
    return sign | magnitude if magnitude or element.special != 'fnuz' else 0
  if overflow == 'saturate':
    return sign | element.code_max
  special = element.nan_code if element.inf_code is None else element.inf_code
  return sign | (element.code_max if special is None else special)


def _magnitude_code(
  value: Number, element: FloatFormat, to_integer: Callable
) -> int:
  """Code of |value| if the exponent field had no upper end.

  With 2^e <= |value| < 2^(e+1) (e = emin below the normal numbers) and
  u = |value| / 2^(e - M), the rounded u is the mantissa with its leading bit,
  and adding (e - emin) * 2^M puts the exponent field in place. A carry out of
  the mantissa lands in the exponent, as it should.
  """
  if not is_finite(value):
    return element.code_max + 2**element.mantissa_bits
  x = abs(Fraction(value))
  if not x:
    return 0
  e = max(floor_log2(x), element.emin)
  exponent_part = (e - element.emin) * 2**element.mantissa_bits
  u = x / power_of_two(e - element.mantissa_bits)
  code = lambda q: q + exponent_part - (not element.zero)  # noqa: E731
  q = to_integer(u, odd=code(math.floor(u)) % 2 == 1)
  return max(code(q), 0)


def _encode_int(
  value: Number, element: IntFormat, to_integer: Callable, lowest: bool
) -> int:
  if value != value:
    return 0
  largest = element.code_max
  smallest = -largest - lowest if element.signed else 0
  if is_finite(value):
    q = to_integer(Fraction(value) * 2**element.fraction_bits)
    q = min(max(q, smallest), largest)
  else:
    q = largest if value > 0 else smallest
  return q % 2**element.bits


def _encode_codebook(
  value: Number, element: CodebookFormat, rounding: str, to_integer: Callable
) -> int:
  table = [Fraction(entry) for entry in element.table]
  if value != value:
    return _nearest(Fraction(0), table)
  if value <= table[0]:
    return 0
  if value >= table[-1]:
    return len(table) - 1
  x = Fraction(value)
  if rounding == 'nearest_even':
    return _nearest(x, table)
  index = max(i for i, entry in enumerate(table) if entry <= x)
  low, high = table[index : index + 2]
  if low < 0:  # Away from zero is down: the fraction counts from `high`.
    return index + 1 - to_integer((high - x) / (high - low))
  return index + to_integer((x - low) / (high - low))


def _nearest(x: Fraction, table: Sequence[Fraction]) -> int:
  distance = [abs(x - entry) for entry in table]
  return distance.index(min(distance))


# float32 arithmetic.


def float32_bits(value: float) -> int:
  """The 32 bits of a float32."""
  return struct.unpack('<I', struct.pack('<f', value))[0]


def flush(value: Number) -> Number:
  """`value`, or a zero of its sign if it is a subnormal float32."""
  if is_finite(value) and abs(value) < FLOAT32_MIN_NORMAL:
    return with_sign(Fraction(0), is_negative(value))
  return value


def to_float32(value: Number) -> float:
  """`value` rounded to nearest even in float32, subnormals flushed."""
  code = encode(value, FLOAT32, overflow='special')
  return float(flush(decode(code, FLOAT32)))


def multiply(a: float, b: float) -> float:
  """a * b in float32."""
  a, b = float(flush(a)), float(flush(b))
  if not (is_finite(a) and is_finite(b)):
    return a * b
  return _product(a, b)


def _product(a: float, b: float) -> float:
  """The exact product, rounded once."""
  product = abs(Fraction(a)) * abs(Fraction(b))
  return to_float32(with_sign(product, is_negative(a) != is_negative(b)))


def reciprocal(a: float) -> float:
  """1 / a in float32."""
  a = float(flush(a))
  if a == 0:
    return math.copysign(math.inf, a)
  if not is_finite(a):
    return math.copysign(0.0, a) if a == a else a
  return to_float32(1 / Fraction(a))


# Shared exponents (MX and block floating point).


def shared_exponent(amax: float, element: ElementFormat, rule: str) -> int:
  """The exponent k of the block scale 2^k, before it is clamped to E8M0.

  floor: floor(log2 amax) - emax, the OCP rule; may saturate the block maximum.
  ceil: ceil(log2 amax) - emax; never saturates.
  even: floor of amax rounded half up to the element's mantissa bits, done on
    the bits of the float32. Floats only.
  rceil: ceil(log2(amax / max)), the smallest k with amax <= max * 2^k. The
    quotient is exact here, and the array version gets the same k by comparing
    integer mantissas. Rounding amax / max to float32 first, as cuBLAS and
    TransformerEngine do, gives the same k for every element format of this
    package unless the quotient is a subnormal float32.
  round: round(log2(amax / max)), no tie being possible.

  Args:
    amax: finite, positive.
    element: its largest number is used, and its mantissa bits for 'even'.
    rule: one of `EXPONENT_RULES`.
  """
  emax = floor_log2(Fraction(element.max))
  if rule == 'floor':
    return floor_log2(Fraction(amax)) - emax
  if rule == 'ceil':
    return _ceil_log2(Fraction(amax)) - emax
  if rule == 'even':
    if not isinstance(element, FloatFormat):
      raise ValueError(
        f"rule='even' rounds to the mantissa of a float; {element} has none"
      )
    half = 2 ** (23 - element.mantissa_bits - 1)
    exponent_field = (float32_bits(amax) + half) >> 23
    return exponent_field - 127 - emax
  ratio = Fraction(amax) / Fraction(element.max)
  if rule == 'rceil':
    return _ceil_log2(ratio)
  if rule == 'round':
    k = floor_log2(ratio)
    remainder = ratio / power_of_two(k)
    return k + (remainder**2 > 2)
  raise ValueError(f'{rule=} is not one of {EXPONENT_RULES}')


def _ceil_log2(value: Fraction) -> int:
  e = floor_log2(value)
  return e + (value != power_of_two(e))


def block_amax(block: Sequence[Number]) -> float:
  """max |x| of the block, subnormals read as zero; NaN for any Inf or NaN."""
  if not all(is_finite(x) for x in block):
    return math.nan
  return float(max((abs(flush(x)) for x in block), default=0.0))


def exponent_scale_code(amax: float, element: ElementFormat, rule: str) -> int:
  """E8M0 code of the block scale: 255 if amax is NaN, 0 for a zero block.

  Clamped from above so that the largest element times the scale is finite.
  """
  if amax != amax:
    return E8M0_NAN
  if amax == 0:
    return 0
  k = shared_exponent(amax, element, rule)
  top = min(E8M0_BIAS, E8M0_BIAS - floor_log2(Fraction(element.max)))
  return min(max(k, -E8M0_BIAS), top) + E8M0_BIAS


# Scales that are numbers.


def inverse_scale(scale: float) -> float:
  """1 / scale to 24 bits; 0 for scale 0, so that zero blocks get zero codes.

  Unlike `reciprocal` it has no smallest number: for scale > 2^126, where 1 /
  scale is a subnormal float32, the array version divides in two steps.
  """
  if scale == 0 or not is_finite(scale):
    return 0.0
  exact = 1 / Fraction(scale)
  unit = power_of_two(floor_log2(abs(exact)))
  return float(Fraction(to_float32(exact / unit)) * unit)


def block_scale(
  amax: float, fmt: BlockFormat, tensor_scale: float | None = None
) -> int | float:
  """The scale of a block as stored: a code of at most 8 bits, or a number.

  amax * (1 / element.max), and with a tensor scale amax * (1 / tensor_scale *
  1 / element.max), rounded to the scale format, where codes saturate. NaN, or
  its code, if amax is NaN. Scales of blocks that are not zero are at least
  2^-126, or 2^-125 / tensor_scale before rounding, and without a tensor scale
  at most `largest_scale`.
  """
  assert fmt.scale is not None
  factor = reciprocal(fmt.element.max)
  least = float(FLOAT32_MIN_NORMAL)
  if tensor_scale is not None:
    inverse = inverse_scale(tensor_scale)
    factor, least = multiply(inverse, factor), multiply(inverse, 2 * least)
  scale = multiply(amax, factor)
  if amax > 0:
    scale = max(scale, least)
    if tensor_scale is None:
      scale = bounded_scale(scale, fmt)
  if fmt.scale.bits <= 8:
    return encode(scale, fmt.scale)
  return round_scale(scale, fmt.scale)


def uneven_scale(
  values: Sequence[Number], fmt: BlockFormat, rule: str
) -> float:
  """The scale of a block whose elements reach further on one side of zero.

  With e the element of the largest magnitude, -8 of int4:
  signed_absmax: m / e, m the first of the numbers of the largest magnitude.
  full_range: amax / ((largest - smallest element) / 2), amax / 7.5 of int4.

  Args:
    values: of the block.
    fmt: its element is an integer or a codebook.
    rule: one of `UNEVEN_RULES`.
  """
  assert fmt.scale is not None
  numbers = [Fraction(v) for v in fmt.element.values().tolist()]
  end = max(numbers, key=abs)
  if -end in numbers:
    raise ValueError(f'{fmt.element} reaches as far on both sides of zero')
  amax = block_amax(values)
  if not amax > 0:
    return amax
  if rule == 'full_range':
    divisor = (max(numbers) - min(numbers)) / 2
  elif rule == 'signed_absmax':
    divisor = abs(end)
  else:
    raise ValueError(f'{rule=} is not one of {UNEVEN_RULES}')
  scale = to_float32(Fraction(amax) / divisor)
  scale = round_scale(bounded_scale(scale, fmt, float(abs(end))), fmt.scale)
  first = next(x for x in values if abs(x) == amax)
  is_opposite = rule == 'signed_absmax' and (first < 0) != (end < 0)
  return -scale if is_opposite else scale


def bounded_scale(
  scale: float, fmt: BlockFormat, largest: float | None = None
) -> float:
  """The scale nearest to a positive one that is a normal float32, no less than
  numbers of the scale format, and keeps the largest element finite."""
  assert fmt.scale is not None
  bits = min(fmt.scale.mantissa_bits, FLOAT32.mantissa_bits)
  least = float(FLOAT32_MIN_NORMAL)
  if fmt.scale.bits > 8:
    least = max(least, fmt.scale.min_subnormal)
  top = min(largest_scale(largest or fmt.element.max, bits), fmt.scale.max)
  return min(max(scale, least), top)


def largest_scale(
  largest: float, mantissa_bits: int = FLOAT32.mantissa_bits
) -> float:
  """The largest scale of so many mantissa bits for which largest * scale, and
  the scale, are finite float32."""
  top = Fraction(FLOAT32.max)
  scale = min(top / Fraction(largest), top)
  unit = power_of_two(floor_log2(scale) - mantissa_bits)
  return float(scale // unit * unit)


def round_scale(scale: float, fmt: FloatFormat) -> float:
  """A scale rounded to the float format that it is stored in."""
  return float(flush(decode(encode(scale, fmt, overflow='special'), fmt)))


def scale_value(
  scale: int | float | None, fmt: BlockFormat, tensor_scale: float | None
) -> float:
  """scale * tensor_scale in float32, either of which may be missing."""
  if scale is None:
    return 1.0 if tensor_scale is None else tensor_scale
  if isinstance(scale, int):
    assert fmt.scale is not None
    scale = float(decode(scale, fmt.scale))
  return scale if tensor_scale is None else multiply(scale, tensor_scale)


def tensor_scale(values: Sequence[Number], fmt: BlockFormat) -> float:
  """The float32 scale of a whole tensor, in the direction of decoding.

  With a block scale (NVFP4), as TransformerEngine computes it: 1 / (M / A) with
  M = element.max * scale.max and A the largest finite |x|. Without one:
  A * (1 / element.max), NaN if any value is not finite. 1 if A = 0. At least
  2^-126, and at most `largest_scale` of the largest product.
  """
  if fmt.scale is not None:
    values = [x for x in values if is_finite(x)]
  amax = block_amax(values)
  if amax == 0:
    return 1.0
  if amax != amax:
    return amax
  largest = fmt.element.max
  if fmt.scale is None:
    scale = multiply(amax, reciprocal(largest))
  else:
    largest *= fmt.scale.max
    scale = reciprocal(to_float32(Fraction(largest) / Fraction(amax)))
  return min(max(scale, float(FLOAT32_MIN_NORMAL)), largest_scale(largest))


# Blocks.


class Block(NamedTuple):
  """One quantized block.

  Attributes:
    codes: element codes.
    scale: a code where the scale format has at most 8 bits, else the number;
      None without block scale.
    tensor_scale: float32 number, or None.
    zero_point: z of asymmetric integers, or None.
    minimum: m of formats with minima, or None.
  """

  codes: tuple[int, ...]
  scale: int | float | None
  tensor_scale: float | None = None
  zero_point: int | None = None
  minimum: float | None = None


class _Rounding(NamedTuple):
  """The rounding of the elements of a block."""

  name: str
  random: Sequence[int] | None
  random_bits: int
  lowest: bool

  def keywords(self, i: int) -> dict:
    """Arguments of `encode` and `round_to_integer` for element i."""
    random = self.random[i] if self.random is not None else 0
    return dict(rounding=self.name, random=random, random_bits=self.random_bits)

  def encode(self, values: Sequence[Number], element: ElementFormat):
    return tuple(
      encode(x, element, lowest=self.lowest, **self.keywords(i))
      for i, x in enumerate(values)
    )


def quantize_block(
  values: Sequence[Number],
  fmt: BlockFormat,
  scale_rule: str | None = None,
  *,
  tensor_scale: float | None = None,
  rounding: str = 'nearest_even',
  random: Sequence[int] | None = None,
  random_bits: int = RANDOM_BITS,
) -> Block:
  """Quantizes the values of one block (of one tile, in row-major order).

  A block that holds Inf or NaN is poisoned: its scale becomes NaN, its codes 0.

  Args:
    values: float32 numbers.
    fmt: the block format; `fmt.block` is not looked at.
    scale_rule: 'floor', 'ceil', 'even', 'rceil' or 'round' for power-of-two
      scales, 'absmax', (with zero point) 'minmax' or one of `UNEVEN_RULES` for
      the others; None: the format's own.
    tensor_scale: for formats that have one; see `tensor_scale`.
    rounding: of the elements, one of `ROUNDINGS`.
    random: for 'stochastic', a uniform integer for each element.
    random_bits: their width.
  """
  rule = fmt.scale_rule if scale_rule is None else scale_rule
  values = [float(flush(x)) for x in values]
  is_uneven = rule in UNEVEN_RULES
  rounder = _Rounding(rounding, random, random_bits, is_uneven)
  if is_uneven and not (fmt.zero_point or fmt.minimum):
    return _quantize_uneven(values, fmt, rule, rounder)
  if fmt.has_exponent_scale:
    return _quantize_exponent(values, fmt, rule, rounder)
  if fmt.zero_point:
    _require_rule(rule, 'minmax', fmt)
    return _quantize_zero_point(values, fmt, rounder)
  if fmt.minimum:
    _require_rule(rule, 'minmax', fmt)
    return _quantize_minimum(values, fmt, rounder)
  _require_rule(rule, 'absmax', fmt)
  if fmt.tensor_scale != (tensor_scale is not None):
    raise ValueError(f'{fmt} has {fmt.tensor_scale=}, got {tensor_scale=}')
  amax = block_amax(values)
  scale = None
  if fmt.scale is not None:
    scale = block_scale(amax, fmt, tensor_scale)
  elif amax != amax:
    tensor_scale = math.nan
  return _quantize_float(values, fmt, scale, tensor_scale, rounder)


def _require_rule(rule: str, known: str, fmt: BlockFormat) -> None:
  if rule != known:
    raise ValueError(
      f'scale_rule={rule!r} of {fmt} has no oracle; {known!r} has'
    )


def _quantize_exponent(values, fmt, rule, rounder) -> Block:
  code = exponent_scale_code(block_amax(values), fmt.element, rule)
  if code == E8M0_NAN:
    return Block(_zeros(values, fmt), code)
  scale = power_of_two(code - E8M0_BIAS)
  scaled = [with_sign(abs(Fraction(x)) / scale, is_negative(x)) for x in values]
  return Block(rounder.encode(scaled, fmt.element), code)


def _quantize_uneven(values, fmt, rule, rounder) -> Block:
  if fmt.scale is None or fmt.scale.bits <= 8 or fmt.tensor_scale:
    raise ValueError(f'scale_rule={rule!r} of {fmt} needs plain float scales')
  scale = uneven_scale(values, fmt, rule)
  return _quantize_float(values, fmt, scale, None, rounder)


def _quantize_float(values, fmt, scale, tensor_scale, rounder) -> Block:
  s = scale_value(scale, fmt, tensor_scale)
  if s != s:
    return Block(_zeros(values, fmt), scale, tensor_scale)
  r = inverse_scale(s)
  codes = rounder.encode([_product(x, r) for x in values], fmt.element)
  return Block(codes, scale, tensor_scale)


def _zeros(values, fmt) -> tuple[int, ...]:
  """The codes of a poisoned block."""
  return (encode(0, fmt.element),) * len(values)


def _quantize_zero_point(values, fmt, rounder) -> Block:
  if not all(is_finite(x) for x in values):
    return Block((0,) * len(values), math.nan, zero_point=0)
  levels = fmt.element.code_max
  slack = 1 / levels + 2.0 ** (1 - fmt.scale.mantissa_bits)
  limit = to_float32(FLOAT32.max * (1 - slack))
  low = max(min(0.0, *map(float, values)), -limit)
  high = min(max(0.0, *map(float, values)), limit)
  step = reciprocal(levels)
  span = to_float32(Fraction(high) - Fraction(low))
  if is_finite(span):
    scale = multiply(span, step)
  else:
    scale = to_float32(
      Fraction(multiply(high, step)) - Fraction(multiply(low, step))
    )
  if high != low:
    scale = max(scale, float(FLOAT32_MIN_NORMAL))
  scale = round_scale(scale, fmt.scale)
  r = inverse_scale(scale)
  zero_point = round_to_integer(Fraction(_product(-low, r)))
  zero_point = min(max(zero_point, 0), levels)
  codes = (
    round_to_integer(Fraction(_product(x, r)), **rounder.keywords(i))
    + zero_point
    for i, x in enumerate(values)
  )
  codes = tuple(min(max(q, 0), levels) for q in codes)
  return Block(codes, scale, zero_point=zero_point)


def _quantize_minimum(values, fmt, rounder) -> Block:
  scale, minimum = _range_of(values, fmt)
  return _with_scales(values, fmt, scale, minimum, rounder)


def _range_of(values, fmt) -> tuple[float, float]:
  """Scale and minimum of a block as stored, NaN and 0 if it is poisoned."""
  if not all(is_finite(x) for x in values):
    return math.nan, 0.0
  limit = to_float32(FLOAT32.max / 2 * (1 - 2.0**-7))
  low = min(max(min(values), -limit), limit)
  high = min(max(max(values), -limit), limit)
  if fmt.scale_blocks is not None:
    low = min(low, 0.0)
  if block_amax(values) == 0:
    return 0.0, 0.0
  span = to_float32(Fraction(high) - Fraction(low))
  scale = multiply(span, reciprocal(fmt.element.max))
  if scale > 0:
    scale = bounded_scale(scale, fmt)
  low = min(max(low, -fmt.scale.max), fmt.scale.max)
  return round_scale(scale, fmt.scale), round_scale(low, fmt.scale)


def _with_scales(values, fmt, scale, minimum, rounder) -> Block:
  """A block of scale and minimum that are given."""
  if scale != scale:
    return Block(_zeros(values, fmt), scale, minimum=minimum)
  r = inverse_scale(scale)
  shift = Fraction(minimum or 0)
  above = [to_float32(Fraction(x) - shift) if shift else x for x in values]
  scaled = [_product(x, r) if is_finite(x) else x for x in above]
  return Block(rounder.encode(scaled, fmt.element), scale, minimum=minimum)


def dequantize_block(block: Block, fmt: BlockFormat) -> list[float]:
  """The float32 numbers that the block stands for.

  (element - zero_point) * scale * tensor_scale from left to right in float32;
  the product with a power of two is exact before its one rounding, so that
  2^-127, a subnormal float32, is a scale like any other.
  """
  elements = [decode(code, fmt.element) for code in block.codes]
  if fmt.has_exponent_scale:
    assert isinstance(block.scale, int)
    return [_times_power_of_two(e, block.scale) for e in elements]
  z = block.zero_point or 0
  values = [float(e - z if z else e) for e in elements]
  if block.scale is not None:
    scale = scale_value(block.scale, fmt, None)
    values = [multiply(x, scale) for x in values]
  if block.tensor_scale is not None:
    values = [multiply(x, block.tensor_scale) for x in values]
  if block.minimum is not None:
    assert block.scale is not None
    values = [_plus(e, block.scale, block.minimum) for e in elements]
  return values


def _plus(element: Number, scale: float, minimum: float) -> float:
  """element * scale + minimum, rounded once: with scales of at most 16 bits the
  product is exact in float32."""
  if scale != scale:
    return scale
  return to_float32(Fraction(element) * Fraction(scale) + Fraction(minimum))


def _times_power_of_two(element: Number, scale_code: int) -> float:
  if scale_code == E8M0_NAN:
    return math.nan
  if not is_finite(element):
    return float(element)
  scale = power_of_two(scale_code - E8M0_BIAS)
  magnitude = abs(Fraction(element)) * scale
  return to_float32(with_sign(magnitude, is_negative(element)))


def quantize(
  values: Sequence[Number],
  fmt: BlockFormat,
  scale_rule: str | None = None,
  *,
  rounding: str = 'nearest_even',
) -> list[Block]:
  """Quantizes a vector: the tensor scale, then block after block.

  The last block may be short; padding it with zeros would change nothing, but
  for a minimum. With two levels of scales those of blocks, and minima, which
  are at most 0, are quantized in their turn.
  """
  if fmt.scale_blocks is not None:
    return _quantize_two_levels(values, fmt, scale_rule or fmt.scale_rule)
  size = math.prod(fmt.block) or len(values)
  if fmt.scale is None:
    size = len(values)
  scale = tensor_scale(values, fmt) if fmt.tensor_scale else None
  return [
    quantize_block(
      values[i : i + size],
      fmt,
      scale_rule,
      tensor_scale=scale,
      rounding=rounding,
    )
    for i in range(0, len(values), size)
  ]


def _quantize_two_levels(values, fmt: BlockFormat, rule: str) -> list[Block]:
  """Blocks whose scales are what the quantized scales stand for."""
  values = [float(flush(x)) for x in values]
  (size,), flat = fmt.block, fmt.one_level
  parts = [values[i : i + size] for i in range(0, len(values), size)]
  minima: list[float | None] = [None] * len(parts)
  if fmt.minimum:
    _require_rule(rule, 'minmax', fmt)
    ranges = [_range_of(part, fmt) for part in parts]
    scales = [scale for scale, _ in ranges]
    minima = [-m for m in _requantized([-m for _, m in ranges], fmt)]
  else:
    scales = [quantize_block(part, flat, rule).scale for part in parts]
  is_uneven = rule in UNEVEN_RULES
  rounder = _Rounding('nearest_even', None, RANDOM_BITS, is_uneven)
  return [
    _with_scales(part, flat, scale, minimum, rounder)
    for part, scale, minimum in zip(
      parts, _requantized(scales, fmt), minima, strict=True
    )
  ]


def _requantized(scales, fmt: BlockFormat) -> list[float]:
  """The numbers that scales stand for once they are quantized."""
  assert fmt.scale_blocks is not None
  blocks = quantize(scales, fmt.scale_blocks)
  return [
    x for block in blocks for x in dequantize_block(block, fmt.scale_blocks)
  ]
