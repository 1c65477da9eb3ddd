"""Sums of products of integers: those of activations with those of weights.

Activations are signed integers of 8 bits, and weights what `_decode.ordinal`
makes of their codes: unsigned integers, from which an offset or a zero point is
to be subtracted. With z for that, x for activations and u for weights

    sum of x (u - z)  =  sum of x u  -  z times the sum of x,

so that kernels multiply unsigned bytes with signed ones, as processors like it,
and take the sums of x from the caller. Bytes are multiplied in pairs, whose
sums have 16 bits. They are added there as long as none can overflow. Weights
that are too large for that are cut into two planes of four bits. All sums of a
block are below 2^24, so that float32 holds them exactly. Where scales are those
of all of k, sums of x u stay integers to the end.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from lowbit_jax.cpu import _decode
from lowbit_jax.cpu._code import (
  I32,
  F32x8,
  I32x8,
  Type,
  Value,
  fma,
  intrinsic,
)
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.cpu._decode import BYTES, PAIRS
from lowbit_jax.cpu._weights import Kind, Numbers

# Elements whose products are summed as integers; at most, for (k, n).
UNIT = 32
# Arrays of what units of x have.
OF_X = 'x_scale', 'x_sum'
_MOST = 2**15 - 1  # of a sum of 16 bits
_PAIR = 2 * 128  # the largest product of a pair, relative to its weights
_PLANE = 4  # bits


def why_not(kind: Kind, target: Target) -> str | None:
  """Why weights are no integers for this, or None."""
  if not target.has_permutations:
    return 'the processor has no avx2'
  if _decode.ordinal(kind.element, target) is None:
    return f'{kind.element} is no integer of 8 bits times a power of two'
  return None


class Planes(NamedTuple):
  """How weights become bytes that are multiplied.

  Attributes:
    ordinal: weights as unsigned integers.
    shifts: the place of the lowest bit of each plane.
    most: products of pairs that are added in 16 bits.
    sums: of what type the sums of all units are.
  """

  ordinal: _decode.Ordinal
  shifts: tuple[int, ...]
  most: int
  sums: Type

  @property
  def is_exact(self) -> bool:
    """Whether sums are those of integers, without scales."""
    return not self.sums.is_float

  def split(self, codes: Value) -> list[Value]:
    """The planes of codes, one a byte."""
    integers = self.ordinal.integers(codes)
    if len(self.shifts) == 1:
      return [integers]
    high = (integers.bits(PAIRS) >> _PLANE).bits(BYTES)
    mask = (1 << _PLANE) - 1
    return [integers & mask, high & mask]


def planes(kind: Kind, target: Target, is_exact: bool) -> Planes:
  """Those of weights that `why_not` takes."""
  ordinal = _decode.ordinal(kind.element, target)
  assert ordinal is not None
  values = kind.element.values() / ordinal.step + ordinal.offset
  largest, shifts = int(values.max()), (0,)
  if largest * _PAIR > _MOST:
    largest, shifts = (1 << _PLANE) - 1, (0, _PLANE)
  most = _MOST // (largest * _PAIR)
  return Planes(ordinal, shifts, most, I32x8 if is_exact else F32x8)


def multiplied(weights: Value, x: Value) -> Value:
  """Unsigned bytes times signed ones; the products of neighbours added."""
  name = 'llvm.x86.avx2.pmadd.ub.sw'
  return intrinsic(name, PAIRS, weights, x, is_overloaded=False)


def sums_of_pairs(
  weights: Sequence[Value], x: Sequence[Value], most: int
) -> list[Value]:
  """Products of pairs, added in 16 bits: `most` of them in each sum."""
  sums = []
  for start in range(0, len(weights), most):
    products = [
      multiplied(u, own)
      for u, own in zip(
        weights[start : start + most], x[start : start + most], strict=True
      )
    ]
    sums.append(functools.reduce(operator.add, products))
  return sums


def neighbours(pairs: Value, *factors: int) -> Value:
  """Sums of neighbours in 32 bits, times a factor, or each with its own."""
  name = 'llvm.x86.avx2.pmadd.wd'
  lanes = PAIRS.constant(list(factors) * (PAIRS.lanes // len(factors)))
  return intrinsic(name, I32.vector(8), pairs, lanes, is_overloaded=False)


class Unit(NamedTuple):
  """What belongs to the products of a unit, in eight lanes.

  Attributes:
    numbers: what is stored for the weights.
    x_scale: of the activations.
    x_sum: their sums.
  """

  numbers: Numbers
  x_scale: Value
  x_sum: Value


def added(
  total: Value, products: Value, planes: Planes, unit: Unit | None
) -> Value:
  """A sum and what a unit adds to it, in eight lanes.

  Args:
    total: of the type of the sums.
    products: the sums of x u, int32.
    planes: of the weights.
    unit: None where sums are those of integers.
  """
  if unit is None:
    return total + products
  (numbers, x_scale, x_sum), ordinal = unit, planes.ordinal
  products = products.number(F32x8)
  if numbers.zero_point is not None:
    products = fma(numbers.zero_point, 0.0 - x_sum, products)
  if ordinal.offset:
    products = products - x_sum * float(ordinal.offset)
  # The scale of weights has their step in it.
  scale = x_scale * (ordinal.step if numbers.scale is None else numbers.scale)
  total = fma(products, scale, total)
  if numbers.minimum is not None:
    total = fma(x_sum * x_scale, numbers.minimum, total)
  return total
