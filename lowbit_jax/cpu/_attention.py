"""Attention of a few tokens to the filled part of a cache.

A chunk is one token of a sequence with the queries that share a head of the
cache, QUERIES of them at most. It goes through the positions that the token
sees in pieces; of each query it keeps the largest score so far, the sum of the
exponentials of scores less that one, and, where its result will stand, that sum
with the values as weights. The last two shrink when a piece has a larger score.

How positions are cut depends on the first one that is seen and the last one, so
results depend neither on threads nor on what other sequences there are.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from lowbit_jax.cpu import _decode, _registry, _stages
from lowbit_jax.cpu._code import (
  F32,
  I32,
  I64,
  LANES,
  F32x8,
  I16x8,
  I32x8,
  Module,
  Value,
  Variable,
  choose,
  fma,
  least,
  load,
  loop,
  most,
  prefetch,
  scratch,
  store,
  when,
)
from lowbit_jax.cpu._compiler import Target, compiled
from lowbit_jax.cpu._exponential import exponential
from lowbit_jax.cpu._frame import Frame, Specification, handler
from lowbit_jax.cpu._part import (
  FLOAT,
  VECTOR,
  clear,
  in_steps,
  zeros,
)

# Queries of a chunk, positions of a piece, and vectors of values whose sums
# stay in registers, at most.
QUERIES, PIECE, SEVERAL = 8, 128, 8
# The widest keys: eight of them are converted on the stack.
WIDEST = 1024
# Positions between keys that are read and those that are asked for.
AHEAD = 16
# The work that is not worth another thread, in bytes of the cache.
SOLO = 100_000
SIZES = (
  'layers',
  'batch',
  'tokens',
  'heads',
  'positions',
  'kv_heads',
  'groups',
  'blocks',
)
_LINE = 64  # of the cache of the processor, bytes
_BYTES = {'float32': 4, 'float16': 2, 'bfloat16': 2}


class Kind(NamedTuple):
  """A kind of cache.

  Attributes:
    keys: dtype of the keys.
    values: dtype of the values.
    size: elements of a key.
    value_size: elements of a value.
  """

  keys: str
  values: str
  size: int
  value_size: int

  @property
  def key_bytes(self) -> int:
    """Bytes of a key."""
    return self.size * _BYTES[self.keys]

  @property
  def value_bytes(self) -> int:
    """Bytes of a value."""
    return self.value_size * _BYTES[self.values]


def why_not(kind: Kind) -> str | None:
  """Why there is no kernel for a kind of cache, or None."""
  for name, dtype in (('keys', kind.keys), ('values', kind.values)):
    if dtype not in _BYTES:
      return f'{name} are {dtype}'
  for name, size in (('keys', kind.size), ('values', kind.value_size)):
    if size % LANES or not 0 < size <= WIDEST:
      return (
        f'the size of {name}, {size}, is no multiple of {LANES} up to {WIDEST}'
      )
  return None


def arrays(kind: Kind) -> tuple[list[Specification], list[Specification]]:
  """What a kernel takes and gives: of `query` (batch, tokens, heads, size) and
  the layer `layer` (1,) of `keys` and `values` (layers, batch, positions,
  kv_heads, size), of which `lengths` (batch,) are filled and tokens see
  `window` (1,), the result `out`, as `query`."""
  integers = [Specification(n, 'int32', 1) for n in ('lengths', 'layer')]
  window = Specification('window', 'int32', 1)
  query = Specification('query', 'float32', 4)
  keys = Specification('keys', kind.keys, 5)
  values = Specification('values', kind.values, 5)
  out = Specification('out', 'float32', 4)
  return [query, keys, values, *integers, window], [out]


@functools.cache
def kernel(kind: Kind, target: Target) -> int:
  """The address of a kernel."""
  module = Module('decode_attention')
  inputs, outputs = arrays(kind)
  names = [array.name for array in (*inputs, *outputs)]
  _stages.define(
    module,
    [*names, *SIZES],
    lambda words, i: _write(_Part(kind, target, words, i)),
  )
  with handler(module, 'decode_attention', inputs, outputs) as frame:
    _check_and_run(kind, frame)
  return compiled(module, target)


def _check_and_run(kind: Kind, frame: Frame) -> None:
  """Checks sizes, and runs the chunks."""
  batch, tokens, heads = (frame['query'].size(axis) for axis in range(3))
  layers, _, positions, kv_heads, _ = (
    frame['keys'].size(axis) for axis in range(5)
  )
  for name, axis, size, what in (
    ('query', 3, I64.constant(kind.size), 'the size of a key'),
    ('keys', 1, batch, 'the size of the batch'),
    ('keys', 4, I64.constant(kind.size), 'the size of a key'),
    ('values', 0, layers, 'the number of layers'),
    ('values', 1, batch, 'the size of the batch'),
    ('values', 2, positions, 'the number of positions'),
    ('values', 3, kv_heads, 'the number of heads of the keys'),
    ('values', 4, I64.constant(kind.value_size), 'the size of a value'),
    ('lengths', 0, batch, 'the size of the batch'),
    ('layer', 0, I64.constant(1), '1'),
    ('window', 0, I64.constant(1), '1'),
    ('out', 0, batch, 'the size of the batch'),
    ('out', 1, tokens, 'the number of tokens'),
    ('out', 2, heads, 'the number of heads'),
    ('out', 3, I64.constant(kind.value_size), 'the size of a value'),
  ):
    frame.require_size(name, axis, size, what)
  groups = heads // most(kv_heads, 1)
  is_whole = (groups * kv_heads).equals(heads)
  frame.require(is_whole, 'heads are no multiple of those of the cache')
  is_empty = (batch * tokens * heads).equals(0)
  frame.require((layers > 0) | is_empty, 'there are no layers')

  blocks = (groups + (QUERIES - 1)) // QUERIES
  sizes = layers, batch, tokens, heads, positions, kv_heads, groups, blocks
  shared = {name: frame[name].data for name in (*frame.arguments, 'out')}
  shared |= dict(zip(SIZES, sizes, strict=True))
  seen = Variable(I64.constant(0))
  with loop(batch) as member:
    length = load(frame['lengths'].data + member * 4, I32).signed(I64)
    window = load(frame['window'].data, I32).signed(I64)
    length = least(least(length, window), positions)
    seen.set(seen.get() + most(length, 0))
  of_position = kind.key_bytes + kind.value_bytes
  work = seen.get() * tokens * kv_heads * blocks * of_position
  count = batch * tokens * kv_heads * blocks
  _stages.run(frame, count, shared, work > SOLO)


class _Part:
  """A token of a sequence with queries that share a head of the cache.

  Args:
    kind: of the cache.
    target: the processor.
    words: addresses of the arrays, and SIZES.
    i: number of the chunk.

  Attributes:
    low, high: the first position that is seen, and that after the last one.
    keys, values: addresses at the position 0, from which the next one is
      `key_step` and `value_step` bytes away.
    query, out: addresses of the first query and its result, which the others
      follow.
    count: of the queries.
  """

  def __init__(
    self, kind: Kind, target: Target, words: Mapping[str, Value], i: Value
  ) -> None:
    self.kind, self.has_halves = kind, target.has_halves
    turn, block = i // words['blocks'], i % words['blocks']
    turn, head = turn // words['kv_heads'], turn % words['kv_heads']
    member, token = turn // words['tokens'], turn % words['tokens']

    # What the token sees.
    length = load(words['lengths'] + member * 4, I32).signed(I64)
    window = load(words['window'], I32).signed(I64)
    after = length - words['tokens'] + token + 1
    self.low = most(after - window, 0)
    self.high = least(after, words['positions'])

    # As in JAX, a layer that there is not is the nearest one.
    layer = load(words['layer'], I32).signed(I64)
    layer = most(least(layer, words['layers'] - 1), 0)
    rows = (layer * words['batch'] + member) * words['positions']
    row = rows * words['kv_heads'] + head
    self.keys = words['keys'] + row * kind.key_bytes
    self.values = words['values'] + row * kind.value_bytes
    self.key_step = words['kv_heads'] * kind.key_bytes
    self.value_step = words['kv_heads'] * kind.value_bytes

    self.count = least(words['groups'] - block * QUERIES, QUERIES)
    first = head * words['groups'] + block * QUERIES
    place = turn * words['heads'] + first
    self.query = words['query'] + place * (kind.size * FLOAT)
    self.out = words['out'] + place * (kind.value_size * FLOAT)

  def eight(self, address: Value, i: Value | int, dtype: str) -> Value:
    """The i-th eight elements of a row, as float32."""
    address = address + i * (LANES * _BYTES[dtype])
    if dtype == 'float32':
      return load(address, F32x8)
    bits = load(address, I16x8).unsigned(I32x8)
    return _decode.float_of(bits, dtype, self.has_halves)


def _write(part: _Part) -> None:
  """Writes the code of a chunk."""
  scores = scratch(QUERIES * PIECE * FLOAT)
  tops, totals, kept = (scratch(QUERIES * FLOAT) for _ in range(3))
  tile = scratch(LANES * part.kind.size * FLOAT)
  vectors = part.kind.value_size // LANES
  clear(part.out, part.count * vectors)
  with loop(part.count) as q:
    store(F32.constant(-math.inf), tops + q * FLOAT)
    store(F32.constant(0.0), totals + q * FLOAT)

  with loop(part.high, start=part.low, step=PIECE) as start:
    length = least(part.high - start, PIECE)
    with loop(length, step=LANES) as i:
      _score(part, start + i, length - i, tile, scores + i * FLOAT)
    with loop(part.count) as q:
      places = (x + q * FLOAT for x in (tops, totals, kept))
      _weigh(scores + q * (PIECE * FLOAT), length, *places)
    _add(part, start, length, scores, kept)

  with when(part.low < part.high):
    with loop(part.count) as q:
      total = load(totals + q * FLOAT, F32).everywhere()
      with loop(vectors) as i:
        place = part.out + (q * vectors + i) * VECTOR
        store(load(place, F32x8) / total, place)


def _score(
  part: _Part, start: Value, length: Value, tile: Value, scores: Value
) -> None:
  """Scores of eight positions; -inf of those from `length` on, for which the
  last position is read again."""
  dtype, vectors = part.kind.keys, part.kind.size // LANES
  rows = [
    part.keys + least(start + i, part.high - 1) * part.key_step
    for i in range(LANES)
  ]
  if dtype != 'float32':
    own = [tile + i * (vectors * VECTOR) for i in range(LANES)]

    def convert(i):
      for row, place in zip(rows, own, strict=True):
        store(part.eight(row, i, dtype), place + i * VECTOR)

    in_steps(vectors, 2, convert)
    rows = own
  ahead = part.keys + (start + AHEAD) * part.key_step
  for i in range(LANES):
    _expect(ahead + i * part.key_step, part.kind.key_bytes)
  places = I32x8.constant(list(range(LANES)))
  is_live = places < length.low(I32).everywhere()

  with loop(part.count) as q:
    query = part.query + q * (vectors * VECTOR)
    sums = [Variable(zeros()) for _ in rows]

    def add(i, query=query, sums=sums):
      x = load(query + i * VECTOR, F32x8)
      for row, total in zip(rows, sums, strict=True):
        total.set(fma(load(row + i * VECTOR, F32x8), x, total.get()))

    in_steps(vectors, 8, add)
    score = _summed([total.get() for total in sums])
    score = choose(is_live, score, F32x8.constant(-math.inf))
    store(score, scores + q * (PIECE * FLOAT))


def _expect(address: Value, nbytes: int) -> None:
  """Asks for a row that will be read, or that is not there."""
  for offset in range(0, nbytes, _LINE):
    prefetch(address + offset)


def _summed(vectors: list[Value]) -> Value:
  """The sums of the lanes of eight vectors, in a vector."""
  for low, high in (
    ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
    ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
  ):
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    vectors = [a.lanes_at(low, b) + a.lanes_at(high, b) for a, b in pairs]
  return vectors[0]


def _weigh(
  scores: Value, length: Value, top: Value, total: Value, kept: Value
) -> None:
  """Replaces scores of a query by their exponentials.

  Args:
    scores: their address.
    length: of the piece.
    top: address of the largest score so far.
    total: of the sum of exponentials.
    kept: where what earlier sums are multiplied by shall stand.
  """
  vectors = (length + (LANES - 1)) // LANES
  tops = Variable(F32x8.constant(-math.inf))
  with loop(vectors) as i:
    tops.set(most(tops.get(), load(scores + i * VECTOR, F32x8)))
  old = load(top, F32)
  new = most(old, tops.get().greatest())
  # -inf less -inf would be NaN.
  shift = choose(new.equals(-math.inf), F32.constant(0.0), new)
  sums, shifts = Variable(zeros()), shift.everywhere()
  with loop(vectors) as i:
    place = scores + i * VECTOR
    weights = exponential(load(place, F32x8) - shifts)
    store(weights, place)
    sums.set(sums.get() + weights)
  factor = exponential(old - shift)
  store(new, top)
  store(factor, kept)
  store(fma(load(total, F32), factor, sums.get().sum()), total)


def _add(
  part: _Part, start: Value, length: Value, weights: Value, kept: Value
) -> None:
  """Adds the values of a piece, times their weights, to what is kept."""
  vectors, dtype = part.kind.value_size // LANES, part.kind.values
  first = part.values + start * part.value_step
  several = max(n for n in range(1, SEVERAL + 1) if vectors % n == 0)
  with loop(part.count) as q:
    own = weights + q * (PIECE * FLOAT)
    factor = load(kept + q * FLOAT, F32).everywhere()
    with loop(vectors, step=several) as i:
      places = [
        part.out + (q * vectors + i + j) * VECTOR for j in range(several)
      ]
      sums = [Variable(load(place, F32x8) * factor) for place in places]
      with loop(length) as s:
        row = first + s * part.value_step
        weight = load(own + s * FLOAT, F32).everywhere()
        for j, total in enumerate(sums):
          value = part.eight(row, i + j, dtype)
          total.set(fma(weight, value, total.get()))
      for place, total in zip(places, sums, strict=True):
        store(total.get(), place)


target_name = functools.partial(
  _registry.target_name, 'decode_attention', kernel
)
