"""Decoding of packed codes with scales that are powers of two.

Each number is the element times the two factors of its scale, as `dequantize`
multiplies them. Blocks lie as they do in `_quantize`.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from lowbit_jax.cpu import _decode, _registry, _stages
from lowbit_jax.cpu._code import (
  I8,
  I32,
  I64,
  LANES,
  F32x8,
  I8x8,
  I32x8,
  Module,
  Type,
  Value,
  choose,
  least,
  load,
  loop,
  store,
  when,
)
from lowbit_jax.cpu._compiler import Target, compiled
from lowbit_jax.cpu._decode import Codes
from lowbit_jax.cpu._frame import Frame, Specification, handler
from lowbit_jax.cpu._part import FLOAT, VECTOR, in_steps
from lowbit_jax.formats import ElementFormat

# Bytes of the result in a chunk, about, and those that are not worth another
# thread.
CHUNK, SOLO = 1 << 16, 1 << 17
_NAN_CODE, _NAN = 255, 0x7FC00000
_SIZES = ('count', 'n', 'chunks')


class Task(NamedTuple):
  """What a kernel is emitted for.

  Attributes:
    layout: 'rows', of codes (batch, blocks, bytes of a block), or 'columns', of
      codes (batch, bytes of all blocks, n).
    block: elements of a block.
    element: their format.
  """

  layout: str
  block: int
  element: ElementFormat

  @property
  def block_bytes(self) -> int:
    return self.block * self.element.bits // 8


def why_not(task: Task, n: int) -> str | None:
  """Why there is no kernel, or None; `n` are the columns."""
  multiple = LANES
  if task.layout == 'columns':
    multiple = _decode.rows_of_group(task.element.bits)
    if n < LANES:
      return f'there are {n} columns, fewer than {LANES}'
  if not task.block or task.block % multiple:
    return f'blocks of {task.block} elements are no multiples of {multiple}'
  return None


@functools.cache
def kernel(task: Task, target: Target) -> int:
  """The address of a kernel."""
  module = Module('dequantize')
  element = _decode.decoder(task.element, 'elements', module, target)
  write = _rows if task.layout == 'rows' else _columns
  inputs = [Specification(name, 'uint8', 3) for name in ('codes', 'scale')]
  outputs = [Specification('out', 'float32', 3)]
  names = [array.name for array in (*inputs, *outputs)]
  _stages.define(
    module, [*names, *_SIZES], functools.partial(write, task, element)
  )
  with handler(module, 'dequantize', inputs, outputs) as frame:
    _check_and_run(task, frame)
  return compiled(module, target)


def _check_and_run(task: Task, frame: Frame) -> None:
  """Checks sizes, cuts the work into chunks and runs them."""
  batch, height, n = (frame['out'].size(axis) for axis in range(3))
  if task.layout == 'rows':
    frame.require(n.equals(task.block), 'out.shape[2] is not the block')
    count, scale_sizes = batch * height, (height, I64.constant(1))
    code_sizes = height, I64.constant(task.block_bytes)
    chunks = (count + (_in_chunk(task) - 1)) // _in_chunk(task)
  else:
    whole = (height % task.block).equals(0)
    frame.require(whole, f'out.shape[1] is no multiple of {task.block}')
    count = batch * (height // task.block)
    scale_sizes = height // task.block, n
    code_sizes = height // task.block * task.block_bytes, n
    is_empty = (batch * height * n).equals(0)
    frame.require((n >= LANES) | is_empty, f'n is less than {LANES}')
    chunks = count
  for name, sizes in (('codes', code_sizes), ('scale', scale_sizes)):
    for axis, size in enumerate((batch, *sizes)):
      frame.require_size(name, axis, size, 'what out needs')
  shared = {name: frame[name].data for name in ('codes', 'scale', 'out')}
  shared |= {'count': count, 'n': n, 'chunks': chunks}
  nbytes = batch * height * n * FLOAT
  total = choose(nbytes.equals(0), I64.constant(0), chunks)
  _stages.run(frame, total, shared, nbytes > SOLO)


def _in_chunk(task: Task) -> int:
  """Blocks of a chunk of rows."""
  return max(1, CHUNK // (task.block * FLOAT))


def _factors(code: Value, number: Type) -> list[Value]:
  """Normal numbers whose product is the scale, as `exponent_factors` has them:
  2^-127 itself is one that processors may flush to zero."""
  word = code.type
  one = choose(code < 1, word.constant(1), code)
  power = choose(code.equals(_NAN_CODE), word.constant(_NAN), one << 23)
  half, whole = number.constant(0.5), number.constant(1.0)
  return [power.bits(number), choose(code.equals(0), half, whole)]


def _number(element, codes: Codes, factors: list[Value]) -> Value:
  x = element.values(codes)
  for factor in (
    factors if element.factor == 1 else [_in_all(element), *factors]
  ):
    x = x * factor
  return x


def _in_all(element) -> Value:
  return F32x8.constant(element.factor)


def _rows(task: Task, element, words: Mapping[str, Value], i: Value) -> None:
  """A chunk of blocks in rows."""
  bits = task.element.bits
  first = i * _in_chunk(task)
  end = least(words['count'], first + _in_chunk(task))
  with loop(end, start=first) as b:
    code = load(words['scale'] + b, I8).unsigned(I32)
    factors = [f.everywhere() for f in _factors(code, F32x8.scalar())]
    codes = words['codes'] + b * task.block_bytes
    out = words['out'] + b * (task.block * FLOAT)

    def decode(j, codes=codes, out=out, factors=factors):
      eight = _decode.codes_in_row(codes + j * bits, bits)
      store(_number(element, eight, factors), out + j * VECTOR)

    in_steps(task.block // LANES, 4, decode)


def _columns(task: Task, element, words: Mapping[str, Value], i: Value) -> None:
  """A block of all columns, row by row."""
  n, bits = words['n'], task.element.bits
  group = _decode.rows_of_group(bits)
  scale = words['scale'] + i * n
  codes = words['codes'] + i * task.block_bytes * n
  out = words['out'] + i * task.block * n * FLOAT
  with loop(task.block // group) as g:
    line = codes + g * (group * bits // 8) * n
    place = out + g * group * n * FLOAT

    def decode(c, line=line, place=place):
      code = load(scale + c, I8x8).unsigned(I32x8)
      factors = _factors(code, F32x8)
      rows = _decode.codes_in_columns(line + c, n, bits)
      for r, eight in enumerate(rows):
        address = place + (n * r + c) * FLOAT
        store(_number(element, eight, factors), address)

    in_steps(n // LANES, 2, lambda v, decode=decode: decode(v * LANES))
    with when((n % LANES) > 0):
      decode(n - LANES)


target_name = functools.partial(_registry.target_name, 'dequantize', kernel)
