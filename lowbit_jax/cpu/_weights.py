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


class Factors(NamedTuple):
  """What eight weights are shifted and multiplied by, vectors or None."""

  zero_point: Value | None
  scale: Value | None
  minimum: Value | None


_SIZES = {'uint8': 1, 'float16': 2, 'bfloat16': 2, 'float32': 4}
_WORDS = {1: (I8, I8x8), 2: (I16, I16x8), 4: (I32, I32x8)}


class Weights:
  """Writes the code that reads weights of a kind.

  Args:
    kind: of the weights.
    module: of the kernel, which gets the tables of the formats.
    target: the processor.
  """

  def __init__(self, kind: Kind, module: Module, target: Target) -> None:
    self.kind, self.target = kind, target
    self._element = _decode.decoder(kind.element, 'elements', module, target)
    self._is_coded = kind.arrays.get('scale') == 'uint8'
    if self._is_coded and kind.scale is not None:
      if kind.layout == 'nk':
        factor = self._element.factor
        module.table('scales', _decode.scale_table(kind.scale, factor))
      else:
        self._scale = _decode.decoder(kind.scale, 'scales', module, target)

  def of(self, codes: Codes, factors: Factors) -> Value:
    """Eight weights."""
    weights = self._element.values(codes)
    if factors.zero_point is not None:
      weights = weights - factors.zero_point
    if factors.scale is None:
      factor = self._element.factor
      return weights if factor == 1 else weights * factor
    if factors.minimum is None:
      return weights * factors.scale
    if self.kind.scale.bits > 16:  # as `dequantize`: the product is rounded
      return weights * factors.scale + factors.minimum
    return fma(weights, factors.scale, factors.minimum)

  def row_factors(self, arrays: Mapping[str, Value], entry: Value) -> Factors:
    """Those of a block of a row of (n, k), which eight weights share.

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
        number = word.unsigned(I32).number(F32)
      elif self._is_coded:
        table = address_of('scales')
        number = load(table + word.unsigned(I64) * 4, F32)
      else:
        number = self._number(word, name)
      return number.everywhere()

    return Factors(at('zero_point'), at('scale'), at('minimum'))

  def column_factors(
    self, arrays: Mapping[str, Value], entry: Value
  ) -> Factors:
    """Those of a block of eight columns of (k, n).

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
        return _times(scale, self._element.factor)
      return self._number(word, name)

    return Factors(at('zero_point'), at('scale'), at('minimum'))

  def _number(self, word: Value, name: str) -> Value:
    """A scale or a minimum that is stored as a number."""
    if self.kind.scale.bits == 32:
      number = word.bits(F32x8 if word.type.lanes == LANES else F32)
    else:
      wide = I32x8 if word.type.lanes == LANES else I32
      number = _decode.float_of(
        word.unsigned(wide), self.kind.scale.name, self.target.has_halves
      )
    return _times(number, self._element.factor if name == 'scale' else 1.0)


def _times(value: Value, factor: float) -> Value:
  return value if factor == 1 else value * factor
