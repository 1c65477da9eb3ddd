"""From the maxima of eight blocks to their scales, as `quantize` stores them.

Every formula is that of `lowbit_pallas.arith.scale` and `.block`, operation by
operation: numbers are multiplied by the float32 1 / scale, never divided.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from lowbit_jax.cpu import _decode, _encode
from lowbit_jax.cpu._code import (
  F32x8,
  I32x8,
  Module,
  Value,
  choose,
  intrinsic,
  least,
  most,
)
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.cpu._decode import Codes
from lowbit_jax.cpu._encode import INFINITE, LEAST_NORMAL, MAGNITUDE
from lowbit_jax.formats import ElementFormat, FloatFormat

RULES = ('floor', 'ceil', 'even', 'rceil', 'round', 'absmax', 'minmax')
_SMALLEST = 2.0**-126
_NAN_CODE = 255  # of a power of two
_NANS = {'float32': 0x7FC00000, 'bfloat16': 0x7FC0, 'float16': 0x7E00}


class Rule(NamedTuple):
  """How scales follow from the numbers of a block.

  Attributes:
    name: one of RULES.
    element: format of the elements.
    scale: format of the scales.
    least, most: bounds of float scales.
    has_tensor: whether there is a tensor scale as well.
  """

  name: str
  element: ElementFormat
  scale: FloatFormat
  least: float
  most: float
  has_tensor: bool

  @property
  def is_coded(self) -> bool:
    return self.scale.bits <= 8

  @property
  def dtype(self) -> str:
    """Of the stored scales."""
    return 'uint8' if self.is_coded else self.scale.name

  @property
  def has_zero(self) -> bool:
    """Whether there are zero points."""
    return self.name == 'minmax'


class Maxima(NamedTuple):
  """Of eight blocks: bits of the largest magnitude, which are above those of
  Inf where there is a NaN, and for zero points the largest and the smallest
  number, 0 included."""

  magnitude: Value
  high: Value | None = None
  low: Value | None = None


class Scales(NamedTuple):
  """Of eight blocks.

  Attributes:
    stored: in lanes of 32 bits.
    inverse: factors whose product is 1 / scale.
    is_good: all bits, or none in blocks that hold NaN or Inf.
    zero_point: integers, or None.
  """

  stored: Value
  inverse: list[Value]
  is_good: Value
  zero_point: Value | None


class Writer:
  """Writes the code that computes scales by a rule.

  Args:
    rule: of the scales.
    module: of the kernel, which gets the table of the scales.
    target: the processor.
  """

  def __init__(self, rule: Rule, module: Module, target: Target) -> None:
    self.rule, self.target = rule, target
    self._decoder = None
    if rule.is_coded and rule.scale.zero:
      self._decoder = _decode.decoder(rule.scale, 'scales', module, target)

  @property
  def factors(self) -> int:
    """How many inverse factors there are."""
    element = self.rule.element
    if not self.rule.scale.zero:
      return 2 if _exponent(element) <= 0 else 1
    return 2 if element.max < 4 else 1

  def of(self, maxima: Maxima, tensor_scale: Value | None) -> Scales:
    """The scales of eight blocks; `tensor_scale` in all lanes, or None."""
    if not self.rule.scale.zero:
      return self._powers(maxima.magnitude)
    if self.rule.has_zero:
      return self._with_zero_points(maxima)
    return self._floats(maxima.magnitude, tensor_scale)

  def _powers(self, magnitude: Value) -> Scales:
    """E8M0 scales."""
    element = self.rule.element
    emax = _exponent(element)
    code = _exponent_code(magnitude, self.rule.name, element)
    code = most(least(code, min(254, 254 - emax)), 0)
    is_good = magnitude < INFINITE
    code = choose(magnitude < LEAST_NORMAL, I32x8.constant(0), code)
    code = choose(is_good, code, I32x8.constant(_NAN_CODE))
    inverse = [((254 - least(code, 253)) << 23).bits(F32x8)]
    if self.factors == 2:
      half, one = F32x8.constant(0.5), F32x8.constant(1.0)
      inverse.append(choose(code.equals(254), half, one))
    return Scales(code, inverse, is_good.signed(I32x8), None)

  def _floats(self, magnitude: Value, tensor_scale: Value | None) -> Scales:
    """Scales that map the largest magnitude to the largest element."""
    rule = self.rule
    is_good = magnitude < INFINITE
    is_live = (magnitude >= LEAST_NORMAL) & is_good
    top = choose(is_live, magnitude, I32x8.constant(0)).bits(F32x8)
    factor = float(np.float32(1 / rule.element.max))
    if tensor_scale is None:
      scale = most(top * factor, rule.least)
    else:
      inverse = _reciprocal(tensor_scale)
      scale = most(top * (inverse * factor), inverse * (2 * _SMALLEST))
      if not rule.is_coded:
        scale = most(scale, rule.least)
    if tensor_scale is None or not rule.is_coded:
      scale = least(scale, rule.most)
    scale = choose(is_live, scale, F32x8.constant(0.0))
    stored, value = self._stored(scale, is_good)
    if tensor_scale is not None:
      value = value * tensor_scale
    inverse = self._inverse(value)
    is_good = is_good & inverse[0].equals(inverse[0])
    return Scales(stored, inverse, is_good.signed(I32x8), None)

  def _with_zero_points(self, maxima: Maxima) -> Scales:
    """Scales of the range of a block; 0 stays exact."""
    element, top = self.rule.element, self.rule.element.max
    assert maxima.high is not None and maxima.low is not None
    slack = 1 / top + 2.0 ** (1 - self.rule.scale.mantissa_bits)
    limit = float(np.float32(float(np.finfo(np.float32).max) * (1 - slack)))
    high, low = least(maxima.high, limit), most(maxima.low, -limit)
    is_good = maxima.magnitude < INFINITE
    is_live = (maxima.magnitude >= LEAST_NORMAL) & is_good
    step = float(np.float32(1 / top))
    span = high - low
    is_finite = span < float('inf')
    scale = choose(is_finite, span * step, high * step - low * step)
    scale = choose(is_live, most(scale, _SMALLEST), F32x8.constant(0.0))
    stored, value = self._stored(scale, is_good)
    inverse = self._inverse(value)
    zero = 0.0 - low
    for factor in inverse:
      zero = zero * factor
    zero = most(least(intrinsic('llvm.rint', F32x8, zero), top), 0.0)
    zero = choose(is_good, zero, F32x8.constant(0.0))
    assert element.bits <= 8
    # Of a number below 256 the sum with 2^23 holds the integer.
    point = (zero + 2.0**23).bits(I32x8) & 0xFF
    return Scales(stored, inverse, is_good.signed(I32x8), point)

  def _stored(self, scale: Value, is_good: Value) -> tuple[Value, Value]:
    """Scales as they are stored, and the numbers that those stand for."""
    fmt = self.rule.scale
    if self.rule.is_coded:
      assert fmt.nan_code is not None and self._decoder is not None
      nan = I32x8.constant(fmt.nan_code)
      code = choose(scale.equals(scale), _encode.encode_float(scale, fmt), nan)
      code = choose(is_good, code, nan)
      value = self._decoder.values(Codes(code, 0, fmt.bits))
      if self._decoder.factor != 1:
        value = value * self._decoder.factor
      return code, value
    nan = I32x8.constant(_NANS[fmt.name])
    if fmt.bits == 32:
      stored = choose(is_good, scale.bits(I32x8), nan)
      return stored, stored.bits(F32x8)
    stored = choose(is_good, _encode.half_bits(scale, fmt.name), nan)
    halves = self.target.has_halves
    return stored, _decode.float_of(stored, fmt.name, halves)

  def _inverse(self, scale: Value) -> list[Value]:
    if self.factors == 1:
      return [_reciprocal(scale)]
    # 1 / scale of a large one would be a subnormal number.
    is_large = _size(scale) > 2.0**125
    one = F32x8.constant(1.0)
    shrink = choose(is_large, F32x8.constant(1 / 16), one)
    return [_reciprocal(scale * shrink), shrink]


def _size(x: Value) -> Value:
  return (x.bits(I32x8) & MAGNITUDE).bits(F32x8)


def _reciprocal(x: Value) -> Value:
  """1 / x, 0 for 0 and for subnormal numbers."""
  is_tiny = _size(x) < _SMALLEST
  one = F32x8.constant(1.0)
  return choose(is_tiny, F32x8.constant(0.0), one / choose(is_tiny, one, x))


def _exponent(element: ElementFormat) -> int:
  """Of the largest element."""
  return math.frexp(element.max)[1] - 1


def _exponent_code(magnitude: Value, rule: str, element: ElementFormat):
  """The code of a power of two by a rule, see `arith.scale.exponent_code`."""
  fraction = magnitude & 0x7FFFFF
  bits = element.mantissa_bits if isinstance(element, FloatFormat) else 0
  exponent, lead = magnitude >> 23, math.frexp(element.max)[0] * 2
  code = exponent - _exponent(element)

  def one_where(condition):
    return condition.unsigned(I32x8)

  if rule == 'floor':
    return code
  if rule == 'ceil':
    return code + one_where(fraction > 0)
  if rule == 'even':
    return ((magnitude + (1 << (22 - bits))) >> 23) - _exponent(element)
  if rule == 'rceil':
    return code + one_where(fraction > int((lead - 1) * (1 << 23)))
  square = Fraction(lead) ** 2 * (1 << 46)
  up = math.isqrt(int(square * 2)) + 1 - (1 << 23)
  down = math.isqrt(int(square / 2)) + 1 - (1 << 23)
  return code + one_where(fraction >= up) - one_where(fraction < down)
