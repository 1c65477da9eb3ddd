"""Products with matrices that are stored as (k, n).

Lanes are eight columns of the matrix, and a sum runs through all k.
"""

import math

from lowbit_jax.cpu._code import (
  F32,
  I64,
  LANES,
  F32x8,
  Value,
  Variable,
  fma,
  least,
  load,
  loop,
  most,
  otherwise,
  prefetch,
  scratch,
  store,
)
from lowbit_jax.cpu._part import (
  AHEAD,
  FLOAT,
  VECTOR,
  Part,
  clear,
  copy_tile,
  in_groups,
  in_steps,
)
from lowbit_jax.cpu._weights import Factors, Weights

# Vectors of columns that one row of x meets side by side, and the elements
# along k for which their sums stay in registers; columns of a part at most.
VECTORS, PIECE, WIDEST = 8, 32, 1024
# Vectors of a tile and its elements along k; vectors and rows of x side by
# side, and the rows of x that a tile meets before the next one is decoded.
TILE_VECTORS, TILE_HEIGHT, PAIR, MANY, PANEL = 8, 128, 2, 6, 96


def write(weights: Weights, part: Part) -> None:
  """Writes the code of a part."""
  with otherwise(part.m.equals(1)) as (one, several):
    with one:
      _one_row(weights, part)
    with several:
      _several_rows(weights, part)


def _vectors(part: Part) -> Value:
  """How many vectors the columns of a part fill; the last one may overlap."""
  return (part.end - part.first + (LANES - 1)) // LANES


def _column(part: Part, vector: Value) -> Value:
  """The first column of a vector."""
  return least(part.first + vector * LANES, part.end - LANES)


def _address(part: Part, weights: Weights, k: Value, column: Value) -> Value:
  """Of the codes of a column from element k on."""
  row = k * weights.kind.element.bits // 8
  return part.codes + row * part.n + column


def _factors(weights: Weights, part: Part, k: Value, column: Value) -> Factors:
  block = k // weights.kind.block if weights.kind.block else 0
  entry = part.entries + part.n * block + column
  return weights.column_factors(part.words, entry)


def _one_row(weights: Weights, part: Part) -> None:
  """One row of x: a piece of all columns after the other.

  So rows of the matrix are read from end to end, as memory likes it.
  """
  kind, bits = weights.kind, weights.kind.element.bits
  piece = math.gcd(kind.block, PIECE) if kind.block else PIECE
  sums = scratch((2 * WIDEST + LANES) * FLOAT)
  count, vectors = part.end - part.first, _vectors(part)
  wide = count // (VECTORS * LANES) * VECTORS
  clear(sums, vectors)
  ahead = most(I64.constant(AHEAD) // count, piece * bits // 8) * part.n

  def add(start, length, vector, column, size, fetches):
    """Adds `length` products to the sums of `size` vectors."""
    columns = [column + v * LANES for v in range(size)]
    places = [sums + (vector + v) * VECTOR for v in range(size)]
    totals = [Variable(load(place, F32x8)) for place in places]
    factors = [_factors(weights, part, start, c) for c in columns]

    def add_group(i):
      k = start + i * kind.group
      address = _address(part, weights, k, column)
      if fetches:
        for row in range(kind.group * bits // 8):
          prefetch(address + part.n * row + ahead)
      side = 2 if size % 2 == 0 else 1  # vectors that are decoded together
      eights = [
        weights.in_columns(address + v * LANES, part.n, factors[v : v + side])
        for v in range(0, size, side)
      ]
      for j in range(kind.group):
        x = load(part.x + (k + j) * FLOAT, F32).everywhere()
        row = [eight for pair in eights for eight in pair[j]]
        for total, eight in zip(totals, row, strict=True):
          total.set(fma(eight, x, total.get()))

    in_steps(length // kind.group, max(1, 2 // kind.group), add_group)
    for place, total in zip(places, totals, strict=True):
      store(total.get(), place)

  def add_columns(start, length):
    with loop(wide, step=VECTORS) as v:
      add(start, length, v, part.first + v * LANES, VECTORS, True)
    with loop(vectors, start=wide) as v:
      add(start, length, v, _column(part, v), 1, False)

  whole = part.k // piece * piece
  with loop(whole, step=piece) as start:
    add_columns(start, piece)
  if not kind.block:
    with loop(part.k, start=whole, step=kind.group) as start:
      add_columns(start, kind.group)
  with loop(vectors) as v:
    total = load(sums + v * VECTOR, F32x8)
    store(total, part.out + _column(part, v) * FLOAT)


def _several_rows(weights: Weights, part: Part) -> None:
  """Rows of x with tiles that are decoded once for a panel of them."""
  stretch = weights.kind.stretch(TILE_HEIGHT)
  line = TILE_VECTORS * VECTOR
  tile = scratch(stretch * line)
  x, sums = scratch(PANEL * stretch * FLOAT), scratch(PANEL * line)
  end = _vectors(part)
  with loop(part.m, step=PANEL) as top:
    m = least(part.m - top, PANEL)
    with loop(end, step=TILE_VECTORS) as first:
      vectors = least(end - first, TILE_VECTORS)
      clear(sums, m * TILE_VECTORS)
      with loop(part.k, step=stretch) as start:
        height = least(part.k - start, stretch)
        with loop(vectors) as v:
          place = _column(part, first + v)
          _decode_vector(weights, part, start, height, place, tile + v * VECTOR)
        copy_tile(part, top, m, start, height, x)
        _add_tile(x, m, tile, vectors, height, sums)
      with loop(m) as i:
        out = part.out + (top + i) * part.n * FLOAT
        with loop(vectors) as v:
          total = load(sums + (i * TILE_VECTORS + v) * VECTOR, F32x8)
          store(total, out + _column(part, first + v) * FLOAT)


def _decode_vector(
  weights: Weights,
  part: Part,
  start: Value,
  height: Value,
  column: Value,
  out: Value,
) -> None:
  """Eight columns from `start` on, a number of blocks or a part of one."""
  kind = weights.kind
  is_whole = kind.block and kind.block <= TILE_HEIGHT
  run = kind.block if is_whole else height
  with loop(height // run if is_whole else 1) as i:
    first = i * run
    factors = _factors(weights, part, start + first, column)

    def decode(j):
      k = first + j * kind.group
      address = _address(part, weights, start + k, column)
      rows = weights.in_columns(address, part.n, [factors])
      for r, (eight,) in enumerate(rows):
        place = out + (k + r) * (TILE_VECTORS * VECTOR)
        store(eight, place)

    in_steps(run // kind.group, 2, decode)


def _add_tile(
  x: Value,
  m: Value,
  tile: Value,
  vectors: Value,
  height: Value,
  sums: Value,
) -> None:
  """Adds the products of m rows of x with a tile to their sums."""

  def add(i, many, v, count):
    places = [
      [sums + ((i + a) * TILE_VECTORS + v + b) * VECTOR for b in range(count)]
      for a in range(many)
    ]
    totals = [[Variable(load(p, F32x8)) for p in row] for row in places]
    lines = [x + (i + a) * height * FLOAT for a in range(many)]

    def step(j):
      row = tile + (j * TILE_VECTORS + v) * VECTOR
      eights = [load(row + b * VECTOR, F32x8) for b in range(count)]
      for own, line in zip(totals, lines, strict=True):
        inputs = load(line + j * FLOAT, F32).everywhere()
        for total, eight in zip(own, eights, strict=True):
          total.set(fma(eight, inputs, total.get()))

    in_steps(height, 2, step)
    for row, own in zip(places, totals, strict=True):
      for place, total in zip(row, own, strict=True):
        store(total.get(), place)

  in_groups(m, MANY, vectors, PAIR, add)
