"""Integer products with matrices that are stored as (n, k).

Lanes are what 32 bytes of one row of the matrix hold, four bytes in each. Where
codes lie across bytes, these 32 are made of fewer ones. The activations of 32
bytes are ordered by the place of their code in a byte.
"""

import functools
import operator

from lowbit_jax.cpu import _decode, _integers
from lowbit_jax.cpu._code import (
  I64,
  F32x8,
  Value,
  Variable,
  load,
  loop,
  most,
  otherwise,
  prefetch,
  store,
)
from lowbit_jax.cpu._decode import BYTES
from lowbit_jax.cpu._integers import Planes
from lowbit_jax.cpu._part import (
  AHEAD,
  FLOAT,
  LINE,
  VECTOR,
  Part,
  in_groups,
)
from lowbit_jax.cpu._weights import LANES, Kind, Numbers, Weights

WIDTH = BYTES.nbytes
# Rows of the matrix side by side, of one row of x and of several, and these.
ROWS, PAIR, FEW = 4, 2, 4


def length(kind: Kind) -> int:
  """Elements of 32 bytes."""
  return WIDTH * (8 // kind.element.bits)


def write(weights: Weights, part: Part, planes: Planes) -> None:
  """Writes the code of a part."""
  count = part.end - part.first
  with otherwise(part.m.equals(1)) as (one, several):
    with one:
      in_groups(
        part.m,
        1,
        count,
        ROWS,
        lambda i, a, r, b: _add(weights, part, planes, i, a, r, b),
      )
    with several:
      # A few rows of the matrix stay in the cache for all rows of x.
      whole = count // PAIR * PAIR
      for start, stop, b in ((0, whole, PAIR), (whole, count, 1)):
        with loop(stop, start=start, step=b) as r:
          in_groups(
            part.m,
            FEW,
            I64.constant(1),
            1,
            lambda i, a, _, __, r=r, b=b: _add(
              weights, part, planes, i, a, r, b
            ),
          )


def _add(
  weights: Weights,
  part: Part,
  planes: Planes,
  i: Value,
  few: int,
  r: Value,
  count: int,
) -> None:
  """The products of `few` rows of x from i on with `count` rows from r on."""
  kind, first = weights.kind, part.first + r
  bits = kind.element.bits
  read, size = _decode.bytes_of_row(bits), length(kind)
  zero = planes.sums.constant(0)
  totals = [[Variable(zero) for _ in range(count)] for _ in range(few)]
  codes = [part.codes + (first + b) * part.row_bytes for b in range(count)]
  lines = [part.member * part.m + i + a for a in range(few)]
  groups = part.k // (size // LANES)  # scales of a row of x
  group_bytes = most(part.row_bytes * count, 1)
  ahead = (group_bytes + (AHEAD - 1)) // group_bytes * group_bytes
  with loop(part.row_bytes // read) as step:
    if few == 1:
      for byte in range(0, read * count, LINE):
        prefetch(codes[0] + ahead + step * read * count + byte)
    x = [
      [
        load(part.words['x'] + line * part.k + step * size + c * WIDTH, BYTES)
        for c in range(8 // bits)
      ]
      for line in lines
    ]
    scales, sums = (
      [
        load(part.words[name] + line * groups * FLOAT + step * VECTOR, F32x8)
        for line in (() if planes.is_exact else lines)
      ]
      for name in _integers.OF_X
    )
    for b in range(count):
      whole = _decode.bytes_in_row(codes[b] + step * read, bits)
      split = [planes.split(c) for c in _decode.codes_in_bytes([whole], bits)]
      numbers = _numbers(weights, part, first + b, step * size)
      for a in range(few):
        parts = [
          _integers.neighbours(total, 1 << shift)
          for plane, shift in enumerate(planes.shifts)
          for total in _integers.sums_of_pairs(
            [own[plane] for own in split], x[a], planes.most
          )
        ]
        products, total = functools.reduce(operator.add, parts), totals[a][b]
        unit = None
        if not planes.is_exact:
          unit = _integers.Unit(numbers, scales[a], sums[a])
        total.set(_integers.added(total.get(), products, planes, unit))
  for row, line in zip(totals, lines, strict=True):
    for b, total in enumerate(row):
      place = part.words['out'] + (line * part.n + first + b) * FLOAT
      store(total.get().sum(), place)


def _numbers(weights: Weights, part: Part, row: Value, k: Value) -> Numbers:
  """What is stored for the weights of 32 bytes of a row from k on, by lane."""
  kind = weights.kind
  entry = part.entries + row * part.blocks
  if kind.block:
    entry = entry + k // kind.block
  side = length(kind) // kind.block if kind.block else 1
  if side <= 1:
    return weights.row_numbers(part.words, entry)
  each = [weights.row_numbers(part.words, entry + i) for i in range(side)]
  return Numbers(*(_side_by_side(values) for values in zip(*each, strict=True)))


def _side_by_side(values: tuple) -> Value | None:
  """One of values in the first lanes, the next one in the next ones, ..."""
  if values[0] is None:
    return None
  out, width = values[0], LANES // len(values)
  for i, value in enumerate(values[1:], 1):
    order = [LANES + j if j >= i * width else j for j in range(LANES)]
    out = out.lanes_at(order, value)
  return out
