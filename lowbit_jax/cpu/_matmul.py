"""Products of float32 rows with packed matrices.

Each weight becomes the float32 that `dequantize` gives, and is multiplied and
added in one rounding (`fma`). Of a matrix that is stored as (n, k) a sum has
eight parts, one for each k modulo 8, which are added at the end; of one that is
stored as (k, n) it runs through all k. So the order of a sum depends on the
layout of the matrix alone, and its result neither on threads nor on what other
rows or columns there are.

One row meets weights as they are decoded. Of more rows, a tile of the matrix is
decoded into the cache first, and a few rows at a time meet a few columns.
"""

import functools
import math

from lowbit_jax.cpu import _columns, _registry, _rows, _stages
from lowbit_jax.cpu._code import (
  I64,
  LANES,
  Module,
  Value,
  choose,
  least,
  most,
)
from lowbit_jax.cpu._compiler import Target, compiled
from lowbit_jax.cpu._frame import Frame, Specification, handler
from lowbit_jax.cpu._part import SIZES, Part
from lowbit_jax.cpu._weights import Kind, Weights

# Bytes of packed weights in a chunk of rows, chunks of columns for each thread,
# and the work that is not worth another thread, in bytes that are read once.
CHUNK, CHUNKS, SOLO = 1 << 15, 2, 100_000


def why_not(kind: Kind, k: int, n: int) -> str | None:
  """Why there is no kernel for a padded k and n, or None."""
  along, multiple = kind.along_k(k), kind.group
  if kind.layout == 'nk':
    multiple = LANES * kind.order
  elif n < LANES:
    return f'n={n} is less than {LANES}'
  if along % multiple or k % multiple:
    return f'blocks of {along} elements are no multiples of {multiple}'
  if kind.has_zero and kind.step != 1:
    return f'zero points beside elements of step {kind.step}'
  return None


def arrays(kind: Kind) -> tuple[list[Specification], list[Specification]]:
  """What a kernel takes and gives: products of x (batch, m, k) with matrices of
  a stack, of which `index` (batch,) says which, are `out` (batch, m, n)."""
  stored = [Specification(*pair, 3) for pair in kind.arrays.items()]
  x = Specification('x', 'float32', 3)
  index = Specification('index', 'int32', 1)
  return [x, index, *stored], [Specification('out', 'float32', 3)]


@functools.cache
def kernel(kind: Kind, target: Target) -> int:
  """The address of a kernel."""
  module = Module('wq_matmul')
  weights = Weights(kind, module, target)
  inputs, outputs = arrays(kind)
  names = [array.name for array in (*inputs, *outputs)]
  write = (_rows if kind.layout == 'nk' else _columns).write
  _stages.define(
    module, [*names, *SIZES], lambda words, i: write(weights, Part(words, i))
  )
  multiple = LANES * kind.order if kind.layout == 'nk' else kind.group
  with handler(module, 'wq_matmul', inputs, outputs) as frame:
    batch, m, k = (frame['x'].size(axis) for axis in range(3))
    run(frame, kind, (batch, m, k), multiple, LANES)
  return compiled(module, target)


def run(
  frame: Frame,
  kind: Kind,
  sizes: tuple[Value, Value, Value],
  multiple: int,
  fewest: int,
) -> None:
  """Checks sizes, cuts the products into chunks and runs them.

  Args:
    frame: of the call, whose result is (batch, m, n).
    kind: of the matrices.
    sizes: batch, m and k.
    multiple: of which k must be one.
    fewest: columns of a matrix (k, n).
  """
  batch, m, k = sizes
  at_n, at_k = (1, 2) if kind.layout == 'nk' else (2, 1)
  stack, n = frame['codes'].size(0), frame['codes'].size(at_n)
  if kind.block:
    multiple = math.lcm(multiple, kind.block)
  frame.require((k % multiple).equals(0), f'k is no multiple of {multiple}')
  blocks = k // kind.block if kind.block else I64.constant(1)
  row_bytes = k * kind.element.bits // 8
  frame.require_size('index', 0, batch, 'the size of the batch')
  for name in kind.arrays:
    along_k = row_bytes if name == 'codes' else blocks
    frame.require_size(name, 0, stack, 'the size of the stack')
    frame.require_size(name, at_n, n, 'n')
    frame.require_size(name, at_k, along_k, 'what k needs')
  for axis, size in enumerate((batch, m, n)):
    name = ('the size of the batch', 'm', 'n')[axis]
    frame.require_size('out', axis, size, name)
  is_empty = (batch * m * n).equals(0)
  frame.require((stack > 0) | is_empty, 'the stack is empty')
  if kind.layout == 'kn':
    frame.require((n >= fewest) | is_empty, f'n is less than {fewest}')

  # Chunks are whole tiles of a matrix; the last one takes what is left. Rows of
  # a matrix (k, n) are read in long stretches: few chunks for each thread.
  if kind.layout == 'nk':
    tile = _rows.TILE_ROWS
    fitting = I64.constant(CHUNK) // most(row_bytes, 1)
  else:
    tile = _columns.TILE_VECTORS * LANES
    fitting = n // (frame.threads() * CHUNKS)
  fitting = least(fitting, _columns.WIDEST)
  width = most(fitting // tile * tile, tile)
  chunks = most(n // width, 1)
  words = m, k, n, blocks, stack, row_bytes, width, chunks
  shared = {name: frame[name].data for name in (*frame.arguments, 'out')}
  shared |= dict(zip(SIZES, words, strict=True))
  # A further row of x costs about as much as an eighth of the decoding.
  work = row_bytes * n * batch * (m + 7) // 8
  count = choose(is_empty, I64.constant(0), batch * chunks)
  _stages.run(frame, count, shared, work > SOLO)


target_name = functools.partial(_registry.target_name, 'wq_matmul', kernel)
