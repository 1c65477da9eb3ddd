"""The weights of a matrix in memory, eight at a time, as float32.

A stack of matrices lies as (stack, n, k) or (stack, k, n), packed along k, with
an entry for each block of k in the arrays beside the codes. Weights come out as
`dequantize` gives them, except for factors that all weights of a column have,
which the caller multiplies into the sum.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lowbit_jax.cpu import _decode
from lowbit_jax.cpu._code import (
  F32,
  I8,
  I16,
  I32,
  I64,
  LANES,
  F32x8,
  I8x8,
  I16x8,
  I32x8,
  Module,
  Value,
  address_of,
  fma,
  load,
)
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.cpu._decode import Codes
from lowbit_jax.formats import ElementFormat, FloatFormat, IntFormat


class Kind(NamedTuple):
  """How the weights of a stack of matrices are stored.

  Attributes:
    layout: 'nk' or 'kn', the order of the axes of a matrix.
    element: format of the elements.
    block: elements along k that share a scale; 0 for all.
    scale: format of the scales, None without any.
    has_zero: whether zero points are subtracted, uint8.
    has_minimum: whether minima are added, stored as scales are.
  """

  layout: str
  element: ElementFormat
  block: int
  scale: FloatFormat | None
  has_zero: bool
  has_minimum: bool

  @property
  def arrays(self) -> dict[str, str]:
    """The arrays of a stack, and their dtypes."""
    out = {'codes': 'uint8'}
    if self.scale is not None:
      is_coded = self.scale.bits <= 8
      out['scale'] = 'uint8' if is_coded else self.scale.name
    if self.has_zero:
      out['zero_point'] = 'uint8'
    if self.has_minimum:
      out['minimum'] = out['scale']
    return out

  @property
  def group(self) -> int:
    """Elements along k that share whole bytes."""
    return _decode.rows_of_group(self.element.bits)

  @property
  def is_bytes(self) -> bool:
    """Whether codes are read byte by byte, all of whose codes are in the same
    blocks as those of the seven bytes after it."""
    group = 8 // self.element.bits
    fits = self.layout == 'kn' or self.block % (LANES * group) == 0
    return 8 % self.element.bits == 0 and fits

  @property
  def order(self) -> int:
    """How x must be ordered along k: of each LANES * order elements those whose
    number is 0 modulo `order` come first, then those with 1, and so on."""
    in_rows = self.layout == 'nk' and self.is_bytes
    return 8 // self.element.bits if in_rows else 1

  @property
  def step(self) -> float:
    """What integers are multiplied by; 1 of other elements."""
    element = self.element
    return element.step if isinstance(element, IntFormat) else 1.0

  def along_k(self, k: int) -> int:
    """Elements along k of a block."""
    return self.block or k

  def stretch(self, most: int) -> int:
    """Elements along k that are decoded together: a whole number of blocks or
    a part of one, `most` or fewer."""
    if not self.block:
      return most
    if self.block <= most:
      return most // self.block * self.block
    return math.gcd(self.block, most)


class Numbers(NamedTuple):
  """What is stored for eight weights, vectors or None.

  Attributes:
    zero_point: an integer.
    scale: of the integers or numbers that come of the codes.
    minimum: what is added at last.
  """

  zero_point: Value | None
  scale: Value | None
  minimum: Value | None


class Factors(NamedTuple):
  """What eight weights are shifted and multiplied by, vectors or None.

  Attributes:
    zero_point: subtracted first.
    scale: of the integers or numbers that come of the codes.
    shift: added to the product.
  """

  zero_point: Value | None
  scale: Value | None
  shift: Value | None


_SIZES = {'uint8': 1, 'float16': 2, 'bfloat16': 2, 'float32': 4}
_WORDS = {1: (I8, I8x8), 2: (I16, I16x8), 4: (I32, I32x8)}


class Weights:
  """Writes the code that reads weights of a kind.

  Args:
    kind: of the weights.
    module: of the kernel, which gets the tables of the formats.
    target: the processor.
    keeps_integers: whether the caller takes elements as integers, for which
      they must be integers.
  """

  def __init__(
    self,
    kind: Kind,
    module: Module,
    target: Target,
    *,
    keeps_integers: bool = False,
  ) -> None:
    self.kind, self.target = kind, target
    self._ordinal = _decode.ordinal(kind.element, target)
    if not keeps_integers and not (kind.is_bytes and self._is_exact()):
      self._ordinal = None
    step = kind.step
    if self._ordinal is None:
      decoder = _decode.decoder(kind.element, 'elements', module, target)
      self._element = decoder.values
    else:
      step = self._ordinal.step
    self._step = step
    self._halves = _decode.halves_in_bytes(kind.element, target)
    self._is_coded = kind.arrays.get('scale') == 'uint8'
    if self._is_coded and kind.scale is not None:
      if kind.layout == 'nk':
        table = _decode.scale_table(kind.scale, step)
        module.table('scales', table)
      else:
        self._scale = _decode.decoder(kind.scale, 'scales', module, target)

  def _is_exact(self) -> bool:
    """Whether offset times scale is a float32, as the product must be rounded
    once."""
    kind, ordinal = self.kind, self._ordinal
    if ordinal is None or kind.scale is None or kind.scale.bits <= 16:
      return ordinal is not None
    is_power = ordinal.offset & (ordinal.offset - 1) == 0
    return is_power and not kind.has_zero and not kind.has_minimum

  def in_row(
    self, address: Value, count: int, factors: list[Factors]
  ) -> list[Value]:
    """The weights of 8 or 16 bytes of a row, in the order of `Kind.order`.

    Args:
      address: of the bytes.
      count: of the bytes.
      factors: those of each eight bytes.
    """
    groups = self._in_bytes(address, count)
    return [
      self._scaled(group[i], own)
      for group, own in zip(groups, factors, strict=True)
      for i in range(self.kind.order)
    ]

  def eight_in_row(self, address: Value, factors: Factors) -> Value:
    """Eight weights of a row, one after the other."""
    codes = _decode.codes_in_row(address, self.kind.element.bits)
    return self._scaled(self._element(codes), factors)

  def in_columns(
    self, address: Value, stride: Value, factors: list[Factors]
  ) -> list[list[Value]]:
    """The weights of 8 or 16 columns: of each row of the matrix one or two
    vectors, for as many rows as share bytes.

    Args:
      address: of the first byte.
      stride: bytes of a row.
      factors: those of each eight columns.
    """
    bits = self.kind.element.bits
    if self.kind.is_bytes:
      groups = self._in_bytes(address, LANES * len(factors))
    else:
      groups = [
        [
          self._element(codes)
          for codes in _decode.codes_in_columns(address + i, stride, bits)
        ]
        for i in range(0, LANES * len(factors), LANES)
      ]
    rows = zip(*groups, strict=True)
    return [
      [self._scaled(w, own) for w, own in zip(row, factors, strict=True)]
      for row in rows
    ]

  def _in_bytes(self, address: Value, count: int) -> list[list[Value]]:
    """What becomes of codes in whole bytes: for each eight bytes the first
    codes of all, the second ones and so on."""
    whole = _decode.whole_bytes(address, count)
    if self._halves is not None:
      return [[part] for part in self._halves(whole)[: count // LANES]]
    codes = _decode.codes_in_bytes([whole], self.kind.element.bits)
    if self._ordinal is not None:
      codes = [self._ordinal.integers(c) for c in codes]

    def numbers(codes, part):
      eight = _decode.eight_of(codes, part, self.target)
      if self._ordinal is not None:
        return eight.number(F32x8)
      return self._element(Codes(eight, 0, self.kind.element.bits))

    parts = range(count // LANES)
    return [[numbers(c, part) for c in codes] for part in parts]

  def _scaled(self, number: Value, factors: Factors) -> Value:
    """A weight from what its code became."""
    if factors.zero_point is not None:
      number = number - factors.zero_point
    if factors.scale is None:
      if self._ordinal is not None and self._ordinal.offset:
        number = number - float(self._ordinal.offset)
      return _times(number, self._step)
    if factors.shift is None:
      return number * factors.scale
    if self.kind.has_minimum and self.kind.scale.bits > 16:
      # As `dequantize`, which rounds the product.
      return number * factors.scale + factors.shift
    return fma(number, factors.scale, factors.shift)

  def row_factors(self, arrays: Mapping[str, Value], entry: Value) -> Factors:
    """Those of a block of a row of (n, k), which all its weights share."""
    return self._factors(*self.row_numbers(arrays, entry))

  def row_numbers(self, arrays: Mapping[str, Value], entry: Value) -> Numbers:
    """What is stored for a block of a row of (n, k), in all lanes.

    Args:
      arrays: addresses of the arrays of a stack.
      entry: number of the block in the stack.
    """

    def at(name):
      if name not in self.kind.arrays:
        return None
      size = _SIZES[self.kind.arrays[name]]
      word = load(arrays[name] + entry * size, _WORDS[size][0])
      if name == 'zero_point':
        return word.unsigned(I32).number(F32).everywhere()
      if self._is_coded:
        place = address_of('scales') + word.unsigned(I64) * 4
        return load(place, F32).everywhere()
      return self._number(word, name).everywhere()

    return Numbers(at('zero_point'), at('scale'), at('minimum'))

  def column_factors(
    self, arrays: Mapping[str, Value], entry: Value
  ) -> Factors:
    """Those of a block of eight columns of (k, n)."""
    return self._factors(*self.column_numbers(arrays, entry))

  def column_numbers(
    self, arrays: Mapping[str, Value], entry: Value
  ) -> Numbers:
    """What is stored for a block of eight columns of (k, n).

    Args:
      arrays: addresses of the arrays of a stack.
      entry: number of the first of them in the stack.
    """

    def at(name):
      if name not in self.kind.arrays:
        return None
      size = _SIZES[self.kind.arrays[name]]
      word = load(arrays[name] + entry * size, _WORDS[size][1])
      if name == 'zero_point':
        return word.unsigned(I32x8).number(F32x8)
      if self._is_coded:
        scale = self._scale.values(Codes(word.unsigned(I32x8), 0, 8))
        return _times(scale, self._step)
      return self._number(word, name)

    return Numbers(at('zero_point'), at('scale'), at('minimum'))

  def _factors(
    self, zero_point: Value | None, scale: Value | None, minimum: Value | None
  ) -> Factors:
    """What is subtracted from integers, where that is exact, is scaled once for
    a block, not with each of them."""
    if self._ordinal is None or scale is None or minimum is not None:
      return Factors(zero_point, scale, minimum)
    if zero_point is not None:
      return Factors(None, scale, 0.0 - zero_point * scale)
    offset = float(self._ordinal.offset)
    return Factors(None, scale, scale * -offset if offset else None)

  def _number(self, word: Value, name: str) -> Value:
    """A scale or a minimum that is stored as a number."""
    if self.kind.scale.bits == 32:
      number = word.bits(F32x8 if word.type.lanes == LANES else F32)
    else:
      wide = I32x8 if word.type.lanes == LANES else I32
      number = _decode.float_of(
        word.unsigned(wide), self.kind.scale.name, self.target.has_halves
      )
    return _times(number, self._step if name == 'scale' else 1.0)


def _times(value: Value, factor: float) -> Value:
  return value if factor == 1 else value * factor
