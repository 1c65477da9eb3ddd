"""Quantization in one pass through memory: maxima, scales, codes, packing.

Blocks along the last axis ('rows') lie in memory one after the other. Of eight
of them the maxima are found first, then the scales of all eight in lanes, then
the codes of each, while the numbers are still in the cache.

Blocks along another axis ('columns') lie side by side, a column in a lane. Of a
stripe of columns the maxima grow row by row, as memory likes it, and the codes
follow row by row too.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from lowbit_jax.cpu import _encode, _registry, _scales, _stages
from lowbit_jax.cpu._code import (
  F32,
  I8,
  I16,
  I32,
  I64,
  LANES,
  F32x8,
  I8x8,
  I16x8,
  I32x8,
  Module,
  Value,
  Variable,
  choose,
  least,
  load,
  loop,
  most,
  otherwise,
  scratch,
  store,
  when,
)
from lowbit_jax.cpu._compiler import Target, compiled
from lowbit_jax.cpu._decode import rows_of_group
from lowbit_jax.cpu._encode import MAGNITUDE, Zero
from lowbit_jax.cpu._frame import Frame, Specification, handler
from lowbit_jax.cpu._part import FLOAT, VECTOR, in_steps
from lowbit_jax.cpu._scales import Maxima, Rule

# Bytes of x in a chunk of rows, about, and columns of a stripe.
CHUNK, STRIPE = 1 << 16, 512
# Bytes of x that are not worth another thread.
SOLO = 1 << 17
QUAD = 4  # vectors whose codes are packed together

_SIZES = ('count', 'n', 'chunks')
_BYTES = {'uint8': 1, 'float16': 2, 'bfloat16': 2, 'float32': 4}
_WORDS = {1: (I8, I8x8), 2: (I16, I16x8), 4: (I32, I32x8)}


class Task(NamedTuple):
  """What a kernel is emitted for.

  Attributes:
    layout: 'rows', of x (batch, blocks, block), or 'columns', of x
      (batch, blocks * block, n).
    dtype: of x.
    block: elements of a block.
    rule: of the scales; holds the formats.
  """

  layout: str
  dtype: str
  block: int
  rule: Rule

  @property
  def bits(self) -> int:
    return self.rule.element.bits

  @property
  def results(self) -> dict[str, str]:
    """The arrays that come out, and their dtypes."""
    out = {'codes': 'uint8', 'scale': self.rule.dtype}
    if self.rule.has_zero:
      out['zero_point'] = 'uint8'
    return out


def why_not(task: Task, n: int, target: Target) -> str | None:
  """Why there is no kernel, or None; `n` are the columns."""
  rule = task.rule
  if why := _encode.why_not(rule.element):
    return why
  if rule.name not in _scales.RULES:
    return f'scale_rule={rule.name!r} is not one of {_scales.RULES}'
  if rule.is_coded and rule.scale.zero:
    if _encode.why_not(rule.scale) or rule.scale.nan_code is None:
      return f'{rule.scale.name} scales have no NaN'
  if 'float16' in (task.dtype, rule.scale.name) and not target.has_halves:
    return 'the processor has no float16'
  multiple = LANES
  if task.layout == 'columns':
    multiple = rows_of_group(task.bits)
    if n < LANES:
      return f'there are {n} columns, fewer than {LANES}'
  if not task.block or task.block % multiple:
    return f'blocks of {task.block} elements are no multiples of {multiple}'
  return None


def arrays(task: Task) -> tuple[list[Specification], list[Specification]]:
  """What a kernel takes, x and the tensor scale (batch,), and gives."""
  inputs = [Specification('x', task.dtype, 3)]
  if task.rule.has_tensor:
    inputs.append(Specification('tensor_scale', 'float32', 1))
  return inputs, [Specification(*pair, 3) for pair in task.results.items()]


@functools.cache
def kernel(task: Task, target: Target) -> int:
  """The address of a kernel."""
  module = Module('quantize')
  writer = _Writer(task, module, target)
  write = writer.rows if task.layout == 'rows' else writer.columns
  inputs, outputs = arrays(task)
  names = [array.name for array in (*inputs, *outputs)]
  _stages.define(module, [*names, *_SIZES], write)
  with handler(module, 'quantize', inputs, outputs) as frame:
    _check_and_run(task, frame)
  return compiled(module, target)


def _check_and_run(task: Task, frame: Frame) -> None:
  """Checks sizes, cuts the work into chunks and runs them."""
  batch, height, n = (frame['x'].size(axis) for axis in range(3))
  if task.layout == 'rows':
    frame.require_size('x', 2, I64.constant(task.block), 'the block')
    count, code_sizes = height, (height, n * task.bits // 8)
    scale_sizes = height, I64.constant(1)
    chunks = (count + (_packs(task) * LANES - 1)) // (_packs(task) * LANES)
  else:
    whole = (height % task.block).equals(0)
    frame.require(whole, f'x.shape[1] is no multiple of {task.block}')
    count, code_sizes = height // task.block, (height * task.bits // 8, n)
    scale_sizes = count, n
    is_empty = (batch * height * n).equals(0)
    frame.require((n >= LANES) | is_empty, f'n is less than {LANES}')
    chunks = count * most(n // STRIPE, 1)
  if task.rule.has_tensor:
    frame.require_size('tensor_scale', 0, batch, 'the size of the batch')
  for name in task.results:
    sizes = code_sizes if name == 'codes' else scale_sizes
    for axis, size in enumerate((batch, *sizes)):
      frame.require_size(name, axis, size, 'what x needs')
  shared = {b.name: b.data for b in frame.arguments.values()}
  shared |= {b.name: b.data for b in frame.results.values()}
  shared |= {'count': count, 'n': n, 'chunks': chunks}
  nbytes = batch * height * n * _BYTES[task.dtype]
  total = choose(nbytes.equals(0), I64.constant(0), batch * chunks)
  _stages.run(frame, total, shared, nbytes > SOLO)


def _packs(task: Task) -> int:
  """Packs of eight blocks in a chunk of rows."""
  return max(1, CHUNK // (LANES * task.block * _BYTES[task.dtype]))


class _Factors(NamedTuple):
  """What eight numbers go through before they are encoded."""

  inverse: list[Value]
  is_good: Value
  zero: Zero | None


class _Writer:
  """Writes the code of chunks."""

  def __init__(self, task: Task, module: Module, target: Target) -> None:
    self.task, self.target = task, target
    self.has_zero = task.rule.has_zero
    self.size = _BYTES[task.dtype]
    self.encode = _encode.encoder(task.rule.element, target)
    self.scales = _scales.Writer(task.rule, module, target)
    # Lists of numbers of blocks, in scratch memory.
    self.extremes = ['magnitude', *(['high', 'low'] if self.has_zero else [])]
    inverse = [f'inverse{i}' for i in range(self.scales.factors)]
    self.kept = [*inverse, 'is_good', *(['zero'] if self.has_zero else [])]

  def rows(self, words: Mapping[str, Value], i: Value) -> None:
    """A chunk of blocks in rows."""
    member = i // words['chunks']
    first = (i - member * words['chunks']) * (_packs(self.task) * LANES)
    lists = self._lists(1)
    end = least(words['count'], first + _packs(self.task) * LANES)
    tensor_scale = self._tensor_scale(words, member)
    block_bytes = self.task.block * self.size
    code_bytes = self.task.block * self.task.bits // 8
    with loop(end, start=first, step=LANES) as pack:
      count = least(end - pack, LANES)
      top = member * words['count'] + pack
      x = words['x'] + top * block_bytes
      self._clear(lists, 1)
      with loop(count) as r:
        self._row_maxima(x + r * block_bytes, lists, r)
      self._finish(words, lists, I64.constant(0), top, count, tensor_scale)
      codes = words['codes'] + top * code_bytes
      with loop(count) as r:
        factors = self._factors(lists, r * FLOAT, is_shared=True)
        line, out = x + r * block_bytes, codes + r * code_bytes
        self._row_codes(line, factors, out)

  def _row_maxima(self, line: Value, lists: dict[str, Value], r: Value) -> None:
    """Those of a block, into place r of the lists."""
    vectors = self.task.block // LANES
    several = max(s for s in range(1, QUAD + 1) if vectors % s == 0)
    best = [
      {name: Variable(_start(name)) for name in self.extremes}
      for _ in range(several)
    ]
    with loop(vectors, step=several) as j:
      for i, own in enumerate(best):
        x = self._eight(line + (j + i) * (LANES * self.size))
        for name, variable in own.items():
          variable.set(_better(name, variable.get(), x))
    for name in self.extremes:
      total = best[0][name].get()
      for own in best[1:]:
        total = _best_of(name, total, own[name].get())
      if name == 'low':
        total = 0.0 - (0.0 - total).greatest()
      else:
        total = total.greatest()
      store(total, lists[name] + r * FLOAT)

  def _row_codes(self, line: Value, factors: _Factors, out: Value) -> None:
    """The codes of a block."""
    vectors, bits = self.task.block // LANES, self.task.bits

    def encode(j, several):
      codes = [
        self._code(line + (j + i) * (LANES * self.size), factors)
        for i in range(several)
      ]
      store(_encode.packed(codes, bits), out + j * bits)

    whole = vectors // QUAD * QUAD
    in_steps(whole // QUAD, 2, lambda j: encode(j * QUAD, QUAD))
    place = whole
    for several in (2, 1):
      if (vectors - place) >= several:
        encode(I64.constant(place), several)
        place += several

  def columns(self, words: Mapping[str, Value], i: Value) -> None:
    """A block of a stripe of columns."""
    n, block = words['n'], self.task.block
    stripes = most(n // STRIPE, 1)
    row = i // stripes  # of blocks, through the batch
    stripe = i - row * stripes
    first = stripe * STRIPE
    is_last = stripe.equals(stripes - 1)
    width = choose(is_last, n, first + STRIPE) - first
    vectors = width // LANES
    # The last stripe is wider; columns beyond whole vectors are the last one's.
    most_vectors = 2 * STRIPE // LANES
    lists = self._lists(most_vectors)
    member = row // words['count']
    tensor_scale = self._tensor_scale(words, member)
    line = n * self.size
    x = words['x'] + row * block * line + first * self.size
    entry = row * n + first
    code_rows = block * self.task.bits // 8
    codes = words['codes'] + row * code_rows * n + first

    def each_vector(body):
      """body(column, place in the lists) for all vectors of the stripe."""
      with loop(vectors) as v:
        body(v * LANES, v)
      with when((width % LANES) > 0):
        body(width - LANES, vectors)

    self._clear(lists, vectors + 1)
    group = rows_of_group(self.task.bits)
    several = max(s for s in range(1, 9) if block % s == 0)
    with loop(block, step=several) as r:
      each_vector(
        lambda c, v: self._column_maxima(
          x + r * line + c * self.size, line, several, lists, v
        )
      )
    each_vector(
      lambda c, v: self._finish(
        words, lists, v * VECTOR, entry + c, I64.constant(LANES), tensor_scale
      )
    )
    whole = vectors // QUAD * QUAD
    with loop(block // group) as g:
      start = x + g * group * line
      out = codes + g * (group * self.task.bits // 8) * n
      with loop(whole, step=QUAD) as v:
        c = v * LANES
        self._column_codes(
          start + c * self.size, line, lists, v, QUAD, out + c, n
        )
      with loop(vectors, start=whole) as v:
        c = v * LANES
        self._column_codes(start + c * self.size, line, lists, v, 1, out + c, n)
      with when((width % LANES) > 0):
        c = width - LANES
        place = start + c * self.size
        self._column_codes(place, line, lists, vectors, 1, out + c, n)

  def _column_maxima(self, x, line, several, lists, v) -> None:
    """Takes some rows of eight columns into their maxima."""
    places = {name: lists[name] + v * VECTOR for name in self.extremes}
    best = {name: load(place, _type(name)) for name, place in places.items()}
    for r in range(several):
      eight = self._eight(x + line * r)
      best = {name: _better(name, old, eight) for name, old in best.items()}
    for name, place in places.items():
      store(best[name], place)

  def _column_codes(self, x, line, lists, v, several, out, n) -> None:
    """Codes of rows that share bytes, of one or four vectors of columns."""
    bits, size = self.task.bits, LANES * self.size
    columns = []
    for i in range(several):
      factors = self._factors(lists, (v + i) * VECTOR, is_shared=False)
      codes = [
        self._code(x + i * size + line * r, factors)
        for r in range(rows_of_group(bits))
      ]
      columns.append(_encode.byte_rows(codes, bits))
    for byte, vectors in enumerate(zip(*columns, strict=True)):
      store(_encode.joined(vectors), out + n * byte)

  def _lists(self, vectors: int) -> dict[str, Value]:
    names = (*self.extremes, *self.kept)
    return {name: scratch(vectors * VECTOR) for name in names}

  def _clear(self, lists: dict[str, Value], vectors: Value | int) -> None:
    with loop(vectors) as v:
      for name in self.extremes:
        store(_start(name), lists[name] + v * VECTOR)

  def _tensor_scale(self, words, member: Value) -> Value | None:
    if not self.task.rule.has_tensor:
      return None
    return load(words['tensor_scale'] + member * FLOAT, F32).everywhere()

  def _finish(self, words, lists, place, entry, count, tensor_scale) -> None:
    """From the maxima of eight blocks to their scales: stores `count` of them,
    from `entry` on, and keeps what encoding needs."""
    maxima = Maxima(*(load(lists[n] + place, _type(n)) for n in self.extremes))
    scales = self.scales.of(maxima, tensor_scale)
    kept = [*scales.inverse, scales.is_good]
    outputs = {'scale': scales.stored}
    if scales.zero_point is not None:
      kept.append(scales.zero_point)
      outputs['zero_point'] = scales.zero_point
    for name, value in zip(self.kept, kept, strict=True):
      store(value, lists[name] + place)
    for name, value in outputs.items():
      size = _BYTES[self.task.results[name]]
      word, vector = _WORDS[size]
      value = value.low(vector)
      address = words[name] + entry * size
      with otherwise(count.equals(LANES)) as (whole, part):
        with whole:
          store(value, address)
        with part:
          own = scratch(VECTOR)
          store(value, own)
          with loop(count) as i:
            store(load(own + i * size, word), address + i * size)

  def _factors(self, lists, place: Value, is_shared: bool) -> _Factors:
    """Those of eight numbers; of one block, or of eight."""

    def at(name, type):
      if is_shared:
        return load(lists[name] + place, type.scalar()).everywhere()
      return load(lists[name] + place, type)

    count = self.scales.factors
    inverse = [at(f'inverse{i}', F32x8) for i in range(count)]
    zero = None
    if self.has_zero:
      point = at('zero', I32x8)
      low = 0.0 - point.number(F32x8)
      zero = Zero(point, low, low + self.task.rule.element.max)
    return _Factors(inverse, at('is_good', I32x8), zero)

  def _eight(self, address: Value) -> Value:
    return _encode.eight(address, self.task.dtype, self.target.has_halves)

  def _code(self, address: Value, factors: _Factors) -> Value:
    """Eight codes; those of 0 in blocks that hold NaN or Inf."""
    x = self._eight(address)
    for factor in factors.inverse:
      x = x * factor
    x = (x.bits(I32x8) & factors.is_good).bits(F32x8)
    return self.encode(x, factors.zero)


def _type(name: str):
  return I32x8 if name == 'magnitude' else F32x8


def _start(name: str) -> Value:
  return I32x8.constant(0) if name == 'magnitude' else F32x8.constant(0.0)


def _better(name: str, best: Value, x: Value) -> Value:
  """The maximum or minimum, with eight further numbers."""
  if name == 'magnitude':
    x = x.bits(I32x8) & MAGNITUDE
  return _best_of(name, best, x)


def _best_of(name: str, a: Value, b: Value) -> Value:
  return least(a, b) if name == 'low' else most(a, b)


target_name = functools.partial(_registry.target_name, 'quantize', kernel)
