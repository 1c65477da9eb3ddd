"""Products with matrices that are stored as (n, k).

Lanes are eight elements along k of one row of the matrix. A sum has a part in
each lane, and the lanes are added at the end.
"""

from lowbit_jax.cpu._code import (
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
  LINE,
  VECTOR,
  Part,
  clear,
  in_groups,
  in_sizes,
  in_steps,
  zeros,
)
from lowbit_jax.cpu._weights import Factors, Weights

# Rows of the matrix side by side, and rows of x that meet them side by side.
ROWS, FEW = 4, 3
# Rows of a tile, its elements along k, and the rows of x that it meets before
# the next one is decoded.
TILE_ROWS, TILE_LENGTH, PANEL = 16, 256, 96


def write(weights: Weights, part: Part) -> None:
  """Writes the code of a part."""
  with otherwise(part.m.equals(1)) as (one, several):
    with one:
      count = part.end - part.first
      whole = count // ROWS * ROWS
      with loop(whole, step=ROWS) as i:
        _one_row(weights, part, part.first + i, ROWS)
      with loop(count, start=whole) as i:
        _one_row(weights, part, part.first + i, 1)
    with several:
      _several_rows(weights, part)


def _address(weights: Weights, part: Part, row: Value, k: Value) -> Value:
  """Of the codes of a row from element k on."""
  offset = k * weights.kind.element.bits // 8
  return part.codes + row * part.row_bytes + offset


def _factors(weights: Weights, part: Part, row: Value, block: Value) -> Factors:
  entry = part.entries + row * part.blocks + block
  return weights.row_factors(part.words, entry)


def _one_row(weights: Weights, part: Part, first: Value, count: int) -> None:
  """One row of x with `count` rows of the matrix."""
  kind = weights.kind
  rows = [first + r for r in range(count)]
  sums = [Variable(zeros()) for _ in rows]
  # Rows that follow lie behind these: whole groups of them are asked for.
  bits, group_bytes = kind.element.bits, most(part.row_bytes * count, 1)
  ahead = (group_bytes + (AHEAD - 1)) // group_bytes * group_bytes
  ahead = ahead + _address(weights, part, first, I64.constant(0))

  def add_stretch(start, length, blocks):
    """Elements from `start` on, in blocks of one number or several."""
    own = [
      [_factors(weights, part, row, block) for block in blocks] for row in rows
    ]
    codes = [_address(weights, part, row, start) for row in rows]
    x = part.x + start * FLOAT

    def add(i, size):
      nbytes = count * size * bits // 8
      if 2 * nbytes >= LINE:
        prefetch(ahead + (start + i) * count * bits // 8)
      inputs = [
        load(x + i * FLOAT + j * VECTOR, F32x8) for j in range(size // LANES)
      ]
      for total, address, factors in zip(sums, codes, own, strict=True):
        eights = _in_row(weights, address + i * bits // 8, size, factors)
        for eight, x_eight in zip(eights, inputs, strict=True):
          total.set(fma(eight, x_eight, total.get()))

    in_sizes(length, _sizes(weights, len(blocks)), add)

  if not kind.block:
    add_stretch(I64.constant(0), part.k, [I64.constant(0)])
  else:
    is_half = kind.block * bits // 8 == LANES and kind.is_bytes
    side = 2 if is_half else 1  # blocks in 16 bytes

    def add_blocks(block, number):
      blocks = [block + i for i in range(number)]
      add_stretch(block * kind.block, kind.block * number, blocks)

    in_sizes(part.blocks, [side, 1][:side], add_blocks)
  for row, total in zip(rows, sums, strict=True):
    store(total.get().sum(), part.out + row * FLOAT)


def _sizes(weights: Weights, blocks: int = 1) -> list[int]:
  """Elements that are decoded at once, the most first."""
  kind = weights.kind
  if not kind.is_bytes:
    return [LANES]
  unit = LANES * kind.order
  return [2 * unit] if blocks == 2 else [2 * unit, unit]


def _in_row(
  weights: Weights, address: Value, size: int, factors: list[Factors]
) -> list[Value]:
  """So many weights of a row, one of `_sizes`."""
  kind = weights.kind
  if not kind.is_bytes:
    return [weights.eight_in_row(address, factors[0])]
  count = size // kind.order
  parts = count // LANES
  return weights.in_row(address, count, (factors * parts)[:parts])


def _several_rows(weights: Weights, part: Part) -> None:
  """Rows of x with tiles that are decoded once for a panel of them."""
  stretch = weights.kind.stretch(TILE_LENGTH)
  tile = scratch(TILE_ROWS * stretch * FLOAT)
  sums = scratch(PANEL * TILE_ROWS * VECTOR)
  with loop(part.m, step=PANEL) as top:
    m = least(part.m - top, PANEL)
    with loop(part.end, start=part.first, step=TILE_ROWS) as first:
      rows = least(part.end - first, TILE_ROWS)
      clear(sums, m * TILE_ROWS)
      with loop(part.k, step=stretch) as start:
        length = least(part.k - start, stretch)
        with loop(rows) as r:
          row = tile + r * (stretch * FLOAT)
          _decode_row(weights, part, first + r, start, length, row)
        x = part.x + (top * part.k + start) * FLOAT
        _add_tile(part, x, m, tile, stretch, rows, length, sums)
      # The lanes of each sum become one number.
      with loop(m) as i:
        out = part.out + ((top + i) * part.n + first) * FLOAT
        with loop(rows) as r:
          total = load(sums + (i * TILE_ROWS + r) * VECTOR, F32x8)
          store(total.sum(), out + r * FLOAT)


def _decode_row(
  weights: Weights,
  part: Part,
  row: Value,
  start: Value,
  length: Value,
  out: Value,
) -> None:
  """Weights of a row from `start` on, a number of blocks or a part of one."""
  kind, bits = weights.kind, weights.kind.element.bits
  is_whole = kind.block and kind.block <= TILE_LENGTH
  run = kind.block if is_whole else length
  with loop(length // run if is_whole else 1) as i:
    first = start + i * run
    block = first // kind.block if kind.block else I64.constant(0)
    factors = _factors(weights, part, row, block)
    address = _address(weights, part, row, first)
    place = out + i * run * FLOAT

    def decode(j, size):
      eights = _in_row(weights, address + j * bits // 8, size, [factors])
      for i, eight in enumerate(eights):
        store(eight, place + j * FLOAT + i * VECTOR)

    in_sizes(run, _sizes(weights), decode)


def _add_tile(
  part: Part,
  x: Value,
  m: Value,
  tile: Value,
  stretch: int,
  rows: Value,
  length: Value,
  sums: Value,
) -> None:
  """Adds the products of m rows of x with a tile to their sums."""

  def add(i, few, r, count):
    places = [
      [sums + ((i + a) * TILE_ROWS + r + b) * VECTOR for b in range(count)]
      for a in range(few)
    ]
    totals = [[Variable(load(p, F32x8)) for p in row] for row in places]
    lines = [x + (i + a) * part.k * FLOAT for a in range(few)]
    columns = [tile + (r + b) * (stretch * FLOAT) for b in range(count)]

    def step(j):
      inputs = [load(line + j * VECTOR, F32x8) for line in lines]
      for b, column in enumerate(columns):
        eight = load(column + j * VECTOR, F32x8)
        for a, own in enumerate(inputs):
          totals[a][b].set(fma(eight, own, totals[a][b].get()))

    in_steps(length // LANES, 2, step)
    for row, own in zip(places, totals, strict=True):
      for place, total in zip(row, own, strict=True):
        store(total.get(), place)

  in_groups(m, FEW, rows, ROWS, add)
