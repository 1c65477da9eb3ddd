"""Products of rows of int8 in blocks with packed matrices.

Products are summed as integers within a unit, which is a block of x and of the
matrix or a part of them; such sums are exact. What units give is scaled and
added in float32, in an order that depends on the layout of the matrix alone.
Where each row of x and each column has one scale, the integers are summed over
all of k, and the caller scales.
"""

import functools
from typing import NamedTuple

from lowbit_jax.cpu import (
  _integer_columns,
  _integer_rows,
  _integers,
  _matmul,
  _registry,
  _stages,
)
from lowbit_jax.cpu._code import Module
from lowbit_jax.cpu._compiler import Target, compiled, host
from lowbit_jax.cpu._frame import Specification, handler
from lowbit_jax.cpu._part import SIZES, Part
from lowbit_jax.cpu._weights import LANES, Kind, Weights


class Task(NamedTuple):
  """What a kernel multiplies.

  Attributes:
    kind: of the matrices.
    unit: elements along k that share a scale of x, and one of the matrix.
    is_exact: whether results are int32 sums without scales.
  """

  kind: Kind
  unit: int
  is_exact: bool = False

  @property
  def side(self) -> int:
    """Bytes that codes of a matrix (n, k) are in as they are multiplied."""
    return _integer_rows.WIDTH

  @property
  def multiple(self) -> int:
    """What k must be a multiple of."""
    if self.kind.layout == 'kn':
      return self.unit
    return _integer_rows.length(self.kind)


def task(
  kind: Kind, block: int, k: int, n: int, *, is_exact: bool = False
) -> Task | str:
  """The product with x in blocks of so many elements, or why there is none."""
  if (why := _integers.why_not(kind, host())) is not None:
    return why
  blocks = [size or k for size in (block, kind.block)]
  if kind.layout == 'kn':
    if n < _integer_columns.WIDTH:
      return f'n={n} is less than {_integer_columns.WIDTH}'
    unit = _integers.UNIT
    # Pairs of groups lie in one unit.
    while unit % (2 * kind.group) == 0 and any(b % unit for b in blocks):
      unit //= 2
    fits = unit % (2 * kind.group) == 0
  else:
    length = _integer_rows.length(kind)
    unit = length // LANES
    fits = not any(b % unit for b in blocks)
    fits &= not kind.block or not (kind.block % length and length % kind.block)
  out = Task(kind, unit, is_exact)
  if not fits:
    return f'blocks of {blocks} elements have no part in common'
  if k % out.multiple:
    return f'k={k} is no multiple of {out.multiple}'
  return out


def offset(kind: Kind) -> int:
  """What is to be subtracted from the integers u of a kind of matrices."""
  return int(_integers.planes(kind, host(), is_exact=True).ordinal.offset)


def arrays(task: Task) -> tuple[list[Specification], list[Specification]]:
  """What a kernel takes and gives: as `_matmul.arrays`, but x is of bytes in
  the order of `_integer_rows` or `_integer_columns`, and beside it lie the
  scales of units and the sums of x in them, (batch, m, k / unit). An exact one
  takes neither and gives the int32 sums of x u."""
  (x, *others), (out,) = _matmul.arrays(task.kind)
  x = x._replace(dtype='uint8')
  if task.is_exact:
    return [x, *others], [out._replace(dtype='int32')]
  units = [Specification(name, 'float32', 3) for name in _integers.OF_X]
  return [x, *units, *others], [out]


@functools.cache
def kernel(task: Task, target: Target) -> int:
  """The address of a kernel."""
  module = Module('integer_matmul')
  kind, unit, is_exact = task
  weights = Weights(kind, module, target, keeps_integers=True)
  planes = _integers.planes(kind, target, is_exact)
  inputs, outputs = arrays(task)
  names = [array.name for array in (*inputs, *outputs)]

  def write(words, i):
    part = Part(words, i)
    if kind.layout == 'nk':
      _integer_rows.write(weights, part, planes)
    else:
      _integer_columns.write(weights, part, planes, unit)

  _stages.define(module, [*names, *SIZES], write)
  with handler(module, 'integer_matmul', inputs, outputs) as frame:
    batch, m, nbytes = (frame['x'].size(axis) for axis in range(3))
    copies = 2 if kind.layout == 'kn' else 1
    k = nbytes // copies
    frame.require((nbytes % copies).equals(0), 'x has half an element')
    sizes = ('the size of the batch', batch), ('m', m), ('k / unit', k // unit)
    for name in () if is_exact else _integers.OF_X:
      for axis, (what, size) in enumerate(sizes):
        frame.require_size(name, axis, size, what)
    _matmul.run(
      frame, kind, (batch, m, k), task.multiple, _integer_columns.WIDTH
    )
  return compiled(module, target)


target_name = functools.partial(_registry.target_name, 'integer_matmul', kernel)
