"""Integer products of a row with matrices (k, n) of 1 or 2 bits: lookups.

Half a byte of the matrix holds the codes of four elements along k, or of two.
It is an index into a table of 16 sums, all that these elements of x can give.
A table is made once for many columns, and read for 32 of them at a time.

Sums in a table are those of digits, which are weights without a factor and an
offset that all have in common. With a bias they lie in [0, 1024), so that they
fit in two halves of five bits. Each half is in a byte of its own, where eight
of them can be added.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowbit_jax.cpu._code import (
  I8,
  I32,
  Value,
  load,
  scratch,
  store,
)
from lowbit_jax.cpu._decode import BYTES, PAIRS, codes_in_bytes, picked
from lowbit_jax.cpu._integers import LAID, Planes, multiplied
from lowbit_jax.cpu._weights import Kind

_INDEX = 4  # bits
_ENTRIES = I8.vector(1 << _INDEX)
_TABLE = 2 * _ENTRIES.nbytes  # of the lower halves and the upper ones
_HALF = 5  # bits
_BIAS = 512  # what makes sums of signed products positive
_MOST = 4  # rows of bytes whose halves are added as bytes
_FLIP = 128  # from signed bytes to unsigned ones
_X = 4  # bytes of x for each pair of elements


class Digits(NamedTuple):
  """Weights as (digit + offset) * factor.

  Attributes:
    of_codes: the digits.
    offset: an integer.
    factor: an integer.
    bits: of a code.
  """

  of_codes: np.ndarray
  offset: int
  factor: int
  bits: int

  def of_indices(self) -> np.ndarray:
    """(indices, elements): the digits that an index stands for."""
    indices = np.arange(1 << _INDEX)[:, None]
    codes = indices >> np.arange(0, _INDEX, self.bits)
    return self.of_codes[codes & ((1 << self.bits) - 1)]


def digits(kind: Kind, planes: Planes) -> Digits | None:
  """Those of the integers of matrices; None where tables do not fit."""
  bits, ordinal = kind.element.bits, planes.ordinal
  if kind.layout != 'kn' or bits > 2:
    return None
  integers = kind.element.values() / ordinal.step + ordinal.offset
  integers = np.rint(integers).astype(int)
  factor, offset = max(int(np.gcd.reduce(integers)), 1), bits - 1
  of_codes = integers // factor - offset
  largest = 128 * int(of_codes.max()) * (_INDEX // bits)
  if largest > _BIAS or factor > 2:  # or sums would need more bits
    return None
  return Digits(of_codes, offset, factor, bits)


class Tables:
  """Tables of a unit of x, which lie on the stack.

  Args:
    digits: of the weights.
    unit: elements along k.
  """

  def __init__(self, digits: Digits, unit: int) -> None:
    self._digits = digits
    self._rows = range(unit * digits.bits // 8)
    self._place = scratch(2 * len(self._rows) * _TABLE + PAIRS.nbytes)
    # What is to be added to the sums of lookups.
    self._rest = self._place + 2 * len(self._rows) * _TABLE

  def make(self, x: Value) -> None:
    """Makes those of the pairs of x at an address."""
    digits, total = self._digits, PAIRS.constant(0)
    for row in self._rows[::2]:
      total = total + _make_two(digits, row, x, self._place)
    bias = 2 * len(self._rows) * _BIAS
    store((total * digits.offset - bias) * digits.factor, self._rest)

  def products(
    self, starts: Sequence[Value], stride: Value
  ) -> list[list[Value]]:
    """Products with 32 columns from each address on, in 16 bits: those of
    columns 0-7 and 16-23, and those of the others.

    Args:
      starts: addresses of the first row of bytes.
      stride: bytes between rows of bytes.
    """
    rest, factor = load(self._rest, PAIRS), self._digits.factor
    weights = BYTES.constant([factor, factor << _HALF] * _ENTRIES.lanes)
    out = [[rest, rest] for _ in starts]
    for top in range(0, len(self._rows), _MOST):
      rows = self._rows[top : top + _MOST]
      lookups = _looked_up(rows, self._place, starts, stride)
      for sums, (lower, upper) in zip(out, lookups, strict=True):
        for half, places in enumerate(LAID):
          laid = lower.lanes_at(places, upper)
          sums[half] = sums[half] + multiplied(laid, weights)
    return out


def _make_two(digits: Digits, row: int, x: Value, tables: Value) -> Value:
  """The tables of two rows of bytes; gives the sum of x in all lanes."""
  weights, total = digits.of_indices(), PAIRS.constant(0)
  count = weights.shape[1]
  # Bytes of x become unsigned ones, which are multiplied by signed digits.
  bias = PAIRS.constant((_BIAS - _FLIP * weights.sum(1)).tolist())
  for nibble in range(2):
    first = row // 2 * (8 // digits.bits) + nibble * count
    pairs = [
      load(x + (first + i) * _X, I32).everywhere().bits(BYTES)
      for i in range(count)
    ]
    for own in pairs:
      total = total + multiplied(BYTES.constant(1), own)
    for side in range(2):  # of the pairs
      sums = bias
      for own, column in zip(pairs, weights.T, strict=True):
        factors = np.zeros((len(column), 2), int)
        factors[:, side] = column
        signed = BYTES.constant(factors.ravel().tolist())
        sums = sums + multiplied(own ^ -_FLIP, signed)
      place = tables + (2 * (row + side) + nibble) * _TABLE
      store((sums & ((1 << _HALF) - 1)).low(_ENTRIES), place)
      store((sums >> _HALF).low(_ENTRIES), place + _ENTRIES.nbytes)
  return total


def _looked_up(
  rows: Sequence[int], tables: Value, starts: Sequence[Value], stride: Value
) -> list[tuple[Value, Value]]:
  """The lower and the upper halves for each address, added over some rows."""
  totals = []
  for row in rows:
    codes = [
      codes_in_bytes([load(start + stride * row, BYTES)], _INDEX)
      for start in starts
    ]
    for nibble in range(2):
      place = tables + (2 * row + nibble) * _TABLE
      halves = [
        load(place + i, _ENTRIES).lanes_at([*range(_ENTRIES.lanes)] * 2)
        for i in (0, _ENTRIES.nbytes)
      ]
      found = [picked(half, own[nibble]) for own in codes for half in halves]
      totals = list(map(operator.add, totals, found)) if totals else found
  return list(zip(totals[::2], totals[1::2], strict=True))
