"""Machine code written as Python: values that stand for what will be computed.

A kernel is a Python function that runs once and, while it runs, writes down
instructions. `a + b` of two `Value`s computes nothing: it notes an addition,
and gives the `Value` that stands for its result. Python's own `for` and `if`
repeat and choose what is written, `loop` and `when` what will be run:

    with module.function(ENTRY, [I64, I64], F32) as (address, count):
      total = Variable(F32x8.constant(0.0))
      with loop(count) as i:
        x = load(address + i * 32, F32x8)
        total.set(fma(x, x, total.get()))
      result(total.get().sum())

Addresses are 64-bit integers in bytes. Vectors have 8 lanes, whatever the
processor has: LLVM splits them where its registers are shorter. Nothing here is
checked when it runs; who writes a kernel keeps addresses within buffers, and
`_frame` checks the shapes of buffers before any kernel runs.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import llvmlite.ir
import numpy as np

ir: Any = llvmlite.ir  # which declares the types of few attributes

LANES = 8
ENTRY = 'handler'  # the function of a module that others may call

_writer: contextvars.ContextVar[Any] = contextvars.ContextVar('writer')


class Type:
  """A type of values: integers or floats, one or LANES of them."""

  def __init__(self, element: Any, size: int, lanes: int = 1) -> None:
    self.element, self.size, self.lanes = element, size, lanes
    self.llvm = element if lanes == 1 else ir.VectorType(element, lanes)
    self.is_float = not isinstance(element, ir.IntType)

  def constant(self, value: float | Sequence[float]) -> 'Value':
    """A number in all lanes, or one for each."""
    if self.lanes == 1:
      return Value(ir.Constant(self.element, value), self)
    values = value if isinstance(value, Sequence) else [value] * self.lanes
    lanes = [ir.Constant(self.element, v) for v in values]
    return Value(ir.Constant(self.llvm, lanes), self)

  def scalar(self) -> 'Type':
    """The type of a lane."""
    return Type(self.element, self.size)

  def vector(self, lanes: int = LANES) -> 'Type':
    """The type of so many of them."""
    return Type(self.element, self.size, lanes)

  @property
  def nbytes(self) -> int:
    return self.size * self.lanes

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Type) and str(self.llvm) == str(other.llvm)

  def __hash__(self) -> int:
    return hash(str(self.llvm))

  def __repr__(self) -> str:
    return str(self.llvm)


BOOL = Type(ir.IntType(1), 1)
I8 = Type(ir.IntType(8), 1)
I16 = Type(ir.IntType(16), 2)
I32 = Type(ir.IntType(32), 4)
I64 = Type(ir.IntType(64), 8)
F16 = Type(ir.HalfType(), 2)
F32 = Type(ir.FloatType(), 4)
I8x8, I16x8, I32x8, F16x8, F32x8 = (
  t.vector() for t in (I8, I16, I32, F16, F32)
)

Number = 'Value | int | float'


class Value:
  """What an instruction will give. Operators note further instructions.

  Integers are neither signed nor unsigned: `>>` fills with zeros and
  `shifted_right` with the sign; comparisons are signed.
  """

  def __init__(self, llvm: Any, type: Type) -> None:
    self.llvm, self.type = llvm, type

  def _with(self, other: Any) -> 'Value':
    if not isinstance(other, Value):
      return self.type.constant(other)
    if other.type != self.type:
      raise TypeError(f'{self.type} and {other.type} in one instruction')
    return other

  def _binary(self, other: Any, on_integers: str, on_floats: str) -> 'Value':
    name = on_floats if self.type.is_float else on_integers
    operation = getattr(_writer.get(), name)
    return Value(operation(self.llvm, self._with(other).llvm), self.type)

  def __add__(self, other: Any) -> 'Value':
    return self._binary(other, 'add', 'fadd')

  __radd__ = __add__

  def __sub__(self, other: Any) -> 'Value':
    return self._binary(other, 'sub', 'fsub')

  def __rsub__(self, other: Any) -> 'Value':
    return self._with(other) - self

  def __mul__(self, other: Any) -> 'Value':
    return self._binary(other, 'mul', 'fmul')

  __rmul__ = __mul__

  def __truediv__(self, other: Any) -> 'Value':
    return self._binary(other, 'sdiv', 'fdiv')

  def __floordiv__(self, other: Any) -> 'Value':
    """Of integers of 0 or more."""
    return self._binary(other, 'udiv', 'fdiv')

  def __mod__(self, other: Any) -> 'Value':
    """Of integers of 0 or more."""
    return self._binary(other, 'urem', 'frem')

  def __and__(self, other: Any) -> 'Value':
    return self._binary(other, 'and_', '')

  def __or__(self, other: Any) -> 'Value':
    return self._binary(other, 'or_', '')

  def __xor__(self, other: Any) -> 'Value':
    return self._binary(other, 'xor', '')

  def __lshift__(self, other: Any) -> 'Value':
    return self._binary(other, 'shl', '')

  def __rshift__(self, other: Any) -> 'Value':
    return self._binary(other, 'lshr', '')

  def shifted_right(self, bits: Any) -> 'Value':
    """Filled with the sign."""
    return self._binary(bits, 'ashr', '')

  def _compared(self, sign: str, other: Any) -> 'Value':
    writer = _writer.get()
    compare = writer.fcmp_ordered if self.type.is_float else writer.icmp_signed
    truth = compare(sign, self.llvm, self._with(other).llvm)
    return Value(truth, Type(BOOL.element, 1, self.type.lanes))

  def __lt__(self, other: Any) -> 'Value':
    return self._compared('<', other)

  def __le__(self, other: Any) -> 'Value':
    return self._compared('<=', other)

  def __gt__(self, other: Any) -> 'Value':
    return self._compared('>', other)

  def __ge__(self, other: Any) -> 'Value':
    return self._compared('>=', other)

  def equals(self, other: Any) -> 'Value':
    return self._compared('==', other)

  def differs(self, other: Any) -> 'Value':
    return self._compared('!=', other)

  def _converted(self, operation: str, type: Type) -> 'Value':
    if self.type == type:
      return self
    convert = getattr(_writer.get(), operation)
    return Value(convert(self.llvm, type.llvm), type)

  def unsigned(self, type: Type) -> 'Value':
    """As a wider integer, filled with zeros."""
    return self._converted('zext', type)

  def signed(self, type: Type) -> 'Value':
    """As a wider integer, filled with the sign."""
    return self._converted('sext', type)

  def low(self, type: Type) -> 'Value':
    """The low bits, as a narrower integer."""
    return self._converted('trunc', type)

  def number(self, type: Type) -> 'Value':
    """A signed integer as a float."""
    return self._converted('sitofp', type)

  def widened(self, type: Type) -> 'Value':
    """A float as a wider float."""
    return self._converted('fpext', type)

  def narrowed(self, type: Type) -> 'Value':
    """A float as a narrower float, rounded to the nearest even."""
    return self._converted('fptrunc', type)

  def bits(self, type: Type) -> 'Value':
    """The same bits as another type of this size."""
    return self._converted('bitcast', type)

  def everywhere(self, lanes: int = LANES) -> 'Value':
    """A scalar in all lanes."""
    vector = self.type.vector(lanes)
    start = ir.Constant(vector.llvm, ir.Undefined)
    first = _writer.get().insert_element(start, self.llvm, I32.constant(0).llvm)
    return Value(first, vector).lanes_at([0] * lanes)

  def lanes_at(self, places: Sequence[int], other: Any = None) -> 'Value':
    """The lanes at these places; places after the last are in `other`."""
    second = self.llvm if other is None else other.llvm
    order = I32.vector(len(places)).constant(list(places)).llvm
    lanes = _writer.get().shuffle_vector(self.llvm, second, order)
    return Value(lanes, self.type.vector(len(places)))

  def lane(self, place: int) -> 'Value':
    """One lane."""
    place = I32.constant(place).llvm
    return Value(
      _writer.get().extract_element(self.llvm, place), self.type.scalar()
    )

  def sum(self) -> 'Value':
    """The lanes added in halves: always in the same order."""
    return self._reduced(lambda a, b: a + b)

  def greatest(self) -> 'Value':
    """The greatest lane; a NaN in any lane may be passed over."""
    return self._reduced(lambda a, b: choose(b > a, b, a))

  def _reduced(self, combine) -> 'Value':
    total, width = self, LANES // 2
    while width:
      places = [(i + width) % LANES for i in range(LANES)]
      total = combine(total, total.lanes_at(places))
      width //= 2
    return total.lane(0)


class Variable:
  """A place on the stack for a value that changes, in a register if it can."""

  def __init__(self, value: Value) -> None:
    writer = _writer.get()
    # Reserved where the function begins, so that loops reserve it once.
    with writer.goto_entry_block():
      self._place = writer.alloca(value.type.llvm)
    self._type = value.type
    self.set(value)

  def get(self) -> Value:
    return Value(_writer.get().load(self._place), self._type)

  def set(self, value: Value) -> None:
    _writer.get().store(value.llvm, self._place)


def scratch(nbytes: int) -> Value:
  """The address of so many bytes on the stack, aligned for vectors."""
  writer = _writer.get()
  with writer.goto_entry_block():
    place = writer.alloca(ir.ArrayType(I8.element, nbytes))
    place.align = 64
    return Value(writer.ptrtoint(place, I64.llvm), I64)


def load(address: Value, type: Type) -> Value:
  """What stands at an address, which needs no alignment."""
  writer = _writer.get()
  value = writer.load(_pointer(address, type))
  value.align = 1
  return Value(value, type)


def store(value: Value, address: Value) -> None:
  """Puts a value at an address, which needs no alignment."""
  _writer.get().store(value.llvm, _pointer(address, value.type)).align = 1


def _pointer(address: Value, type: Type) -> Any:
  return _writer.get().inttoptr(address.llvm, type.llvm.as_pointer())


def choose(condition: Value, yes: Value, no: Value) -> Value:
  """`yes` where the condition holds, else `no`; both are computed."""
  return Value(
    _writer.get().select(condition.llvm, yes.llvm, no.llvm), yes.type
  )


def least(a: Value, b: Any) -> Value:
  b = a._with(b)
  return choose(b < a, b, a)


def most(a: Value, b: Any) -> Value:
  b = a._with(b)
  return choose(b > a, b, a)


def fma(a: Value, b: Value, c: Value) -> Value:
  """a * b + c, rounded once."""
  return intrinsic('llvm.fma', a.type, a, b, c)


def intrinsic(
  name: str, type: Type, *arguments: Value, is_overloaded: bool = True
) -> Value:
  """An operation of LLVM, by its name."""
  if is_overloaded:
    letter = 'f' if type.is_float else 'i'
    lanes = f'v{type.lanes}' if type.lanes > 1 else ''
    name = f'{name}.{lanes}{letter}{8 * type.size}'
  return call(name, type, *arguments)


def call(name: str, type: Type | None, *arguments: Value) -> Value:
  """Calls a function of the C library, of LLVM or of this module."""
  returned = ir.VoidType() if type is None else type.llvm
  known = _writer.get().module.globals.get(name)
  kinds = [a.type.llvm for a in arguments]
  callee = known or ir.Function(
    _writer.get().module, ir.FunctionType(returned, kinds), name
  )
  out = _writer.get().call(callee, [a.llvm for a in arguments])
  return Value(out, type or I64)


def call_address(address: Value, type: Type | None, *arguments: Value) -> Value:
  """Calls the function at an address."""
  returned = ir.VoidType() if type is None else type.llvm
  kind = ir.FunctionType(returned, [a.type.llvm for a in arguments])
  writer = _writer.get()
  callee = writer.inttoptr(address.llvm, kind.as_pointer())
  return Value(writer.call(callee, [a.llvm for a in arguments]), type or I64)


def prefetch(address: Value) -> None:
  """Asks for a line of memory that will be read, wherever it is."""
  kinds = [I8.llvm.as_pointer(), I32.llvm, I32.llvm, I32.llvm]
  writer = _writer.get()
  name = 'llvm.prefetch.p0'
  callee = writer.module.globals.get(name) or ir.Function(
    writer.module, ir.FunctionType(ir.VoidType(), kinds), name
  )
  read_once_as_data = [I32.constant(v).llvm for v in (0, 2, 1)]
  writer.call(callee, [_pointer(address, I8), *read_once_as_data])


def atomic_add(address: Value, value: Any) -> Value:
  """Adds to an integer that threads share; gives what it was before."""
  value = value if isinstance(value, Value) else I64.constant(value)
  pointer = _pointer(address, I64)
  writer = _writer.get()
  return Value(writer.atomic_rmw('add', pointer, value.llvm, 'seq_cst'), I64)


def atomic_load(address: Value) -> Value:
  """An integer that other threads may change meanwhile."""
  pointer = _pointer(address, I64)
  return Value(_writer.get().load_atomic(pointer, 'seq_cst', 8), I64)


@contextlib.contextmanager
def loop(
  count: Value | int, start: Value | int = 0, step: int = 1
) -> Iterator[Value]:
  """What it holds runs for i = start, start + step, ... below `count`."""
  writer = _writer.get()
  begin, end = (
    v if isinstance(v, Value) else I64.constant(v) for v in (start, count)
  )
  before = writer.block
  test = writer.append_basic_block('test')
  body = writer.append_basic_block('body')
  after = writer.append_basic_block('after')
  writer.branch(test)
  writer.position_at_end(test)
  index = writer.phi(I64.llvm)
  index.add_incoming(begin.llvm, before)
  writer.cbranch(writer.icmp_signed('<', index, end.llvm), body, after)
  writer.position_at_end(body)
  yield Value(index, I64)
  following = writer.add(index, I64.constant(step).llvm)
  index.add_incoming(following, writer.block)
  writer.branch(test)
  writer.position_at_end(after)


@contextlib.contextmanager
def repeat() -> Iterator[Any]:
  """What it holds runs until `stop(condition)` inside of it holds."""
  writer = _writer.get()
  body = writer.append_basic_block('repeat')
  after = writer.append_basic_block('after')
  writer.branch(body)
  writer.position_at_end(body)

  def stop(condition: Value) -> None:
    rest = writer.append_basic_block('rest')
    writer.cbranch(condition.llvm, after, rest)
    writer.position_at_end(rest)

  yield stop
  writer.branch(body)
  writer.position_at_end(after)


@contextlib.contextmanager
def when(condition: Value) -> Iterator[None]:
  """What it holds runs if the condition holds; it may return."""
  with _writer.get().if_then(condition.llvm):
    yield


@contextlib.contextmanager
def otherwise(condition: Value) -> Iterator[tuple[Any, Any]]:
  """Two contexts: what runs if the condition holds, and what runs if not."""
  with _writer.get().if_else(condition.llvm) as (yes, no):
    yield yes, no


def result(value: Value | int) -> None:
  """Returns from the function."""
  writer = _writer.get()
  value = value if isinstance(value, Value) else I64.constant(value)
  writer.ret(value.llvm)


def done() -> None:
  """Returns from a function without a result."""
  _writer.get().ret_void()


class Module:
  """Functions and constants that are compiled together."""

  def __init__(self, name: str) -> None:
    self.llvm = ir.Module(name)

  @contextlib.contextmanager
  def function(
    self, name: str, arguments: Sequence[Type], returned: Type | None = None
  ) -> Iterator[list[Value]]:
    """A function whose body is what the context holds; gives its arguments."""
    kind = ir.FunctionType(
      ir.VoidType() if returned is None else returned.llvm,
      [a.llvm for a in arguments],
    )
    function = ir.Function(self.llvm, kind, name)
    if name != ENTRY:
      function.linkage = 'internal'
    writer = ir.IRBuilder(function.append_basic_block('entry'))
    token = _writer.set(writer)
    try:
      yield [Value(a, t) for a, t in zip(function.args, arguments, strict=True)]
    finally:
      _writer.reset(token)

  def table(self, name: str, values: np.ndarray) -> None:
    """A constant array, whose address `address_of` gives."""
    kinds = {'float32': F32, 'int32': I32, 'uint8': I8}
    kind = kinds[values.dtype.name]
    array = ir.ArrayType(kind.llvm, values.size)
    table = ir.GlobalVariable(self.llvm, array, name)
    table.global_constant, table.align = True, 64
    table.linkage = 'internal'
    table.initializer = ir.Constant(
      array, [ir.Constant(kind.llvm, v) for v in values.ravel().tolist()]
    )

  def counter(self, name: str) -> None:
    """An integer that is 0 at first and lives as long as the code."""
    place = ir.GlobalVariable(self.llvm, I64.llvm, name)
    place.linkage, place.align = 'internal', 64
    place.initializer = I64.constant(0).llvm


def address_of(name: str) -> Value:
  """The address of a function, a table or a counter of the module."""
  writer = _writer.get()
  return Value(writer.ptrtoint(writer.module.globals[name], I64.llvm), I64)


def text(message: str) -> Value:
  """The address of a constant string, ended by a zero."""
  module = _writer.get().module
  data = bytearray(message.encode() + b'\0')
  name = f'text{len(module.globals)}'
  kind = ir.ArrayType(I8.llvm, len(data))
  place = ir.GlobalVariable(module, kind, name)
  place.global_constant, place.linkage = True, 'internal'
  place.initializer = ir.Constant(kind, data)
  return address_of(name)
