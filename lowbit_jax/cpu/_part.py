"""A part of a product: some columns of its result, computed by one thread."""

from collections.abc import Callable, Mapping, Sequence

from lowbit_jax.cpu._code import (
  F32,
  I32,
  I64,
  LANES,
  F32x8,
  Value,
  choose,
  least,
  load,
  loop,
  most,
  store,
)

FLOAT = 4  # bytes
VECTOR = FLOAT * LANES
LINE = 64  # bytes that memory gives at once
AHEAD = 1 << 13  # bytes between what is read and what is asked for
SIZES = ('m', 'k', 'n', 'blocks', 'stack', 'row_bytes', 'width', 'chunks')


class Part:
  """Where a part lies in memory.

  Args:
    words: addresses of the arrays, and SIZES: those of x (m, k) and the result
      (m, n), blocks along k, matrices of the stack, bytes along k, columns of
      a part and parts of a product.
    i: number of the part among those of all products.
  """

  def __init__(self, words: Mapping[str, Value], i: Value) -> None:
    self.words = words
    self.m, self.k, self.n = words['m'], words['k'], words['n']
    self.blocks, self.row_bytes = words['blocks'], words['row_bytes']
    member = self.member = i // words['chunks']
    number = i - member * words['chunks']
    # As in JAX, a number outside of the stack is that of the nearest matrix.
    index = load(words['index'] + member * 4, I32).signed(I64)
    index = most(least(index, words['stack'] - 1), 0)
    self.first = number * words['width']
    is_last = number.equals(words['chunks'] - 1)
    self.end = choose(is_last, self.n, self.first + words['width'])
    self.x = words['x'] + member * self.m * self.k * FLOAT
    self.out = words['out'] + member * self.m * self.n * FLOAT
    self.codes = words['codes'] + index * self.n * self.row_bytes
    self.entries = index * self.n * self.blocks


def in_steps(count: Value | int, step: int, body: Callable) -> None:
  """body(i) for 0 <= i < count: `step` of them in a row, then one by one.

  `body` is written so often, for fewer jumps; `count` may be known here.
  """
  if isinstance(count, int):
    step = max(s for s in range(1, step + 1) if count % s == 0)
  whole = count // step * step
  with loop(whole, step=step) as i:
    for j in range(step):
      body(i + j)
  if not isinstance(count, int) and step > 1:
    with loop(count, start=whole) as i:
      body(i)


def in_sizes(
  count: Value | int, sizes: Sequence[int], body: Callable[[Value, int], None]
) -> None:
  """body(i, size) for pieces of 0 ... count - 1, of the largest sizes that fit.

  Args:
    count: a multiple of the last size.
    sizes: each a multiple of the next one.
    body: writes the code of a piece from i on.
  """
  start = 0
  for size in sizes:
    whole = count // size * size
    if not isinstance(whole, int) or whole > start:
      with loop(whole, start=start, step=size) as i:
        body(i, size)
    start = whole


def zeros() -> Value:
  return F32x8.constant(0.0)


def clear(address: Value, vectors: Value | int) -> None:
  """Sets so many vectors to zero."""
  with loop(vectors) as i:
    store(zeros(), address + i * VECTOR)


def copy_tile(
  part: Part, first: Value, m: Value, start: Value, length: Value, tile: Value
) -> None:
  """Copies a tile of x to an address, without the gaps between its rows.

  Rows that lie a power of two apart would push each other out of the cache.
  """
  x = part.x + (first * part.k + start) * FLOAT
  with loop(m) as i:
    row, place = x + i * part.k * FLOAT, tile + i * length * FLOAT

    def copy(j, size):
      kind = F32.vector(size)
      store(load(row + j * FLOAT, kind), place + j * FLOAT)

    in_sizes(length, [4 * LANES, LANES, 1], copy)


def in_groups(
  m: Value, few: int, n: Value, several: int, body: Callable
) -> None:
  """body(i, a, j, b) for groups of a x b of m x n, from few x several down."""
  end = m // few * few
  for first, last, a in ((0, end, few), (end, m, 1)):
    with loop(last, start=first, step=a) as i:
      whole = n // several * several
      for begin, stop, b in ((0, whole, several), (whole, n, 1)):
        with loop(stop, start=begin, step=b) as j:
          body(i, a, j, b)
