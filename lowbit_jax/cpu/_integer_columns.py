"""Integer products with matrices that are stored as (k, n).

Lanes are columns. Two rows of bytes, or groups of rows where codes lie across
bytes, are laid between each other, so that a pair of neighbouring bytes belongs
to a column; the activations that meet such pairs lie twice side by side, as
four bytes that are read at once.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence

from lowbit_jax.cpu import _decode, _integers
from lowbit_jax.cpu._code import (
  F32,
  I32,
  I64,
  LANES,
  F32x8,
  I32x8,
  Value,
  least,
  load,
  loop,
  most,
  otherwise,
  prefetch,
  scratch,
  store,
)
from lowbit_jax.cpu._decode import BYTES, PAIRS
from lowbit_jax.cpu._integers import Planes
from lowbit_jax.cpu._part import (
  AHEAD,
  FLOAT,
  Part,
  clear,
  in_sizes,
)
from lowbit_jax.cpu._weights import Numbers, Weights

# Columns that are decoded together, and how often that is written in a row.
WIDTH, SIDE = BYTES.nbytes, 2
# Columns of a part at most, and of one with several rows of x; rows of x whose
# sums stay in the cache.
WIDEST, NARROW, PANEL = 1024, SIDE * WIDTH, 64
_X = 4  # bytes of x for each pair of elements
# Of sixteen lanes those that instructions lay between those of others at once.
_FOURS = [*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]


def write(weights: Weights, part: Part, planes: Planes, unit: int) -> None:
  """Writes the code of a part, whose sums are of `unit` elements along k."""
  sums = scratch(max(WIDEST * 2, PANEL * NARROW) * FLOAT)
  with otherwise(part.m.equals(1)) as (one, several):
    with one:
      columns = part.end - part.first
      _add(weights, part, planes, unit, sums, part.first, columns, None)
    with several:
      count = part.end - part.first
      with loop(part.m, step=PANEL) as top:
        m = least(part.m - top, PANEL)
        with loop(count, step=NARROW) as c:
          columns = least(count - c, NARROW)
          first = part.first + c
          rows = top, m
          _add(weights, part, planes, unit, sums, first, columns, rows)


def _add(
  weights: Weights,
  part: Part,
  planes: Planes,
  unit: int,
  sums: Value,
  first: Value,
  columns: Value,
  rows: tuple[Value, Value] | None,
) -> None:
  """The products with some columns: of one row of x, or of m from `top` on."""
  vectors = (columns + (WIDTH - 1)) // WIDTH
  top, m = rows or (I64.constant(0), I64.constant(1))
  line = vectors * (WIDTH * FLOAT)  # bytes of the sums of a row
  clear(sums, m * vectors * (WIDTH // LANES))
  bits = weights.kind.element.bits
  height = unit * bits // 8  # rows of bytes
  ahead = most(I64.constant(AHEAD) // columns, height) * part.n

  def column(vector):
    return least(first + vector * WIDTH, part.end - WIDTH)

  def add(k, vector, side):
    places = [column(vector + s) for s in range(side)]
    starts = [part.codes + k * bits // 8 * part.n + place for place in places]
    if rows is None:
      for row in range(height):
        prefetch(starts[0] + part.n * row + ahead)
    numbers = [
      [_numbers(weights, part, k, place + i) for i in range(0, WIDTH, LANES)]
      for place in places
    ]
    pairs = [_pairs(weights, part, planes, start, height) for start in starts]
    if rows is not None:  # decoded once, before the rows
      pairs = [list(own) for own in pairs]
    own = part.member * part.m + top
    with loop(m) as i:
      _add_row(
        part, planes, unit, pairs, numbers, own + i, k, sums + i * line, vector
      )

  with loop(part.k, step=unit) as k:
    in_sizes(vectors, [SIDE, 1], lambda v, side: add(k, v, side))
  with loop(m) as i:
    out = part.words['out'] + (part.member * part.m + top + i) * part.n * FLOAT
    with loop(vectors) as v:
      for j in range(0, WIDTH, LANES):
        total = load(sums + i * line + (v * WIDTH + j) * FLOAT, F32x8)
        store(total, out + (column(v) + j) * FLOAT)


def _numbers(weights: Weights, part: Part, k: Value, column: Value) -> Numbers:
  block = k // weights.kind.block if weights.kind.block else 0
  entry = part.entries + part.n * block + column
  return weights.column_numbers(part.words, entry)


def _pairs(
  weights: Weights, part: Part, planes: Planes, start: Value, height: int
) -> Iterator[list[list[Value]]]:
  """For each pair of elements along k the planes of 16 columns, twice: those of
  columns 0-7 and 16-23, and those of the others."""
  bits = weights.kind.element.bits
  group = weights.kind.group * bits // 8  # rows of bytes
  for top in range(0, height, 2 * group):
    rows = [load(start + part.n * (top + i), BYTES) for i in range(2 * group)]
    codes = []
    for half in range(2):
      places = [
        16 * quarter + 8 * half + i + WIDTH * other
        for quarter in range(2)
        for i in range(8)
        for other in range(2)
      ]
      laid = [
        a.lanes_at(places, b)
        for a, b in zip(rows[:group], rows[group:], strict=True)
      ]
      codes.append(
        [planes.split(c) for c in _decode.codes_in_bytes(laid, bits)]
      )
    yield from map(list, zip(*codes, strict=True))


def _add_row(
  part: Part,
  planes: Planes,
  unit: int,
  pairs: Sequence[Iterable[list[list[Value]]]],
  numbers: Sequence[Sequence[Numbers]],
  row: Value,
  k: Value,
  sums: Value,
  vector: Value,
) -> None:
  """Adds the products of a unit of a row of x to their sums."""
  x = part.words['x'] + row * part.k * (_X // 2) + k * (_X // 2)
  entry, of_x = row * (part.k // unit) + k // unit, ()
  if not planes.is_exact:
    of_x = [
      load(part.words[name] + entry * FLOAT, F32).everywhere()
      for name in _integers.OF_X
    ]
  for s, (own, own_numbers) in enumerate(zip(pairs, numbers, strict=True)):
    sums_of_pairs = _sums_of_pairs(own, x, planes)
    halves = [_wide(half, planes) for half in sums_of_pairs]
    quarters = [halves[i % 2][i // 2] for i in range(4)]
    for i, products in enumerate(quarters):
      place = sums + ((vector + s) * WIDTH + i * LANES) * FLOAT
      own_unit = _integers.Unit(own_numbers[i], *of_x) if of_x else None
      total = load(place, planes.sums)
      store(_integers.added(total, products, planes, own_unit), place)


def _sums_of_pairs(
  pairs: Iterable[list[list[Value]]], x: Value, planes: Planes
) -> list[list[list[Value]]]:
  """The products with x of each half and plane, in sums of 16 bits."""
  out = [[[] for _ in planes.shifts] for _ in range(2)]
  for i, pair in enumerate(pairs):
    inputs = load(x + i * _X, I32).everywhere().bits(BYTES)
    for sums_of_half, half in zip(out, pair, strict=True):
      for sums, weights in zip(sums_of_half, half, strict=True):
        product = _integers.multiplied(weights, inputs)
        if i % planes.most:
          sums[-1] = sums[-1] + product
        else:
          sums.append(product)
  return out


def _wide(sums_of_half: list[list[Value]], planes: Planes) -> list[Value]:
  """The sums of the first eight columns, and of the others, in 32 bits."""
  terms = [
    (total, 1 << shift)
    for sums, shift in zip(sums_of_half, planes.shifts, strict=True)
    for total in sums
  ]
  if len(terms) == 1:
    only, _ = terms[0]
    places = range(LANES), range(LANES, 2 * LANES)
    return [only.lanes_at(own).signed(I32x8) for own in places]
  if len(terms) % 2:
    terms.append((PAIRS.constant(0), 0))

  def added(columns):
    between = [c + 2 * LANES * other for c in columns for other in range(2)]
    products = [
      _integers.neighbours(a.lanes_at(between, b), factor, other)
      for (a, factor), (b, other) in zip(terms[::2], terms[1::2], strict=True)
    ]
    return functools.reduce(operator.add, products)

  low, high = (added(columns) for columns in _FOURS)
  return [low.lanes_at(own, high) for own in _FOURS]
