"""What XLA hands to a kernel, and how a kernel answers.

A kernel is a function that takes the address of a call frame and returns 0, or
the address of an error, which XLA raises as a Python exception. Offsets are
those of the structs in `xla/ffi/api/c_api.h` of the versions 0.1 to 0.4 of this
interface, in words of 8 bytes; newer versions only add words at the end, and
XLA refuses to register a kernel of another major version.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lowbit_jax.cpu._code import (
  I32,
  I64,
  Module,
  Value,
  call_address,
  load,
  result,
  scratch,
  store,
  text,
  when,
)

# Of the frame; buffers are lists of addresses.
_EXTENSION, _API, _CONTEXT = 1, 2, 3
_ARGUMENT_COUNT, _ARGUMENTS, _RESULT_COUNT, _RESULTS = 7, 9, 12, 14
# Of a buffer.
_DTYPE, _DATA, _RANK, _DIMS = 2, 3, 4, 5
# Of the functions of XLA.
_ERROR_CREATE, _ERROR_DESTROY, _SCHEDULE, _NUM_THREADS = 6, 8, 17, 18
_INVALID_ARGUMENT = 3
_METADATA = 1  # the kind of an extension that asks for the version
_VERSION = 0, 1  # of the interface that this module was written for

# XLA's numbers of the dtypes that kernels read.
DTYPES = {
  'int8': 2,
  'int16': 3,
  'int32': 4,
  'uint8': 6,
  'float16': 10,
  'float32': 11,
  'bfloat16': 16,
}


def _word(address: Value, number: int) -> Value:
  return load(address + 8 * number, I64)


class Buffer(NamedTuple):
  """An array of a call: its struct, and what stands at fixed places of it."""

  name: str
  struct: Value

  @property
  def data(self) -> Value:
    """The address of the first element."""
    return _word(self.struct, _DATA)

  def size(self, axis: int) -> Value:
    """The number of elements along an axis."""
    return _word(_word(self.struct, _DIMS), axis)


class Specification(NamedTuple):
  """What an array of a call must be: a name, a dtype and a number of axes."""

  name: str
  dtype: str
  ndim: int


class Frame:
  """The arrays of a call, and the way to refuse it.

  Attributes:
    address: of XLA's struct.
    arguments: arrays to read, by name.
    results: arrays to write, by name.
  """

  def __init__(self, kernel: str, address: Value) -> None:
    self.kernel, self.address = kernel, address
    self.arguments: dict[str, Buffer] = {}
    self.results: dict[str, Buffer] = {}

  def __getitem__(self, name: str) -> Buffer:
    return self.arguments.get(name) or self.results[name]

  def require(self, condition: Value, problem: str) -> None:
    """Ends the call with an error unless the condition holds."""
    with when(condition.equals(0)):
      message = text(f'lowbit_jax {self.kernel}: {problem}')
      request = scratch(32)
      words = I64.constant(32), I64.constant(0), message
      for i, value in enumerate(words):
        store(value, request + 8 * i)
      store(I64.constant(_INVALID_ARGUMENT), request + 24)
      result(call_address(self.function(_ERROR_CREATE), I64, request))

  def require_size(self, name: str, axis: int, size: Value, what: str) -> None:
    """Ends the call with an error unless an array has a size along an axis."""
    problem = f'{name}.shape[{axis}] is not {what}'
    self.require(self[name].size(axis).equals(size), problem)

  def function(self, number: int) -> Value:
    """The address of a function of XLA."""
    return _word(_word(self.address, _API), number)

  def threads(self) -> Value:
    """How many threads XLA has for the work of a call; 1 if it says none."""
    count, request = scratch(8), scratch(40)
    store(I64.constant(1), count)
    words = I64.constant(32), I64.constant(0), self._context(), count
    for i, value in enumerate(words):
      store(value, request + 8 * i)
    self._free(call_address(self.function(_NUM_THREADS), I64, request))
    return load(count, I64)

  def schedule(self, task: Value, data: Value) -> Value:
    """Lets a thread of XLA call `task(data)` at some time; 1 if it will."""
    request = scratch(40)
    words = I64.constant(40), I64.constant(0), self._context(), task, data
    for i, value in enumerate(words):
      store(value, request + 8 * i)
    error = call_address(self.function(_SCHEDULE), I64, request)
    self._free(error)
    return error.equals(0).unsigned(I64)

  def _context(self) -> Value:
    return _word(self.address, _CONTEXT)

  def _free(self, error: Value) -> None:
    with when(error.differs(0)):
      request = scratch(24)
      words = I64.constant(24), I64.constant(0), error
      for i, value in enumerate(words):
        store(value, request + 8 * i)
      call_address(self.function(_ERROR_DESTROY), None, request)


@contextlib.contextmanager
def handler(
  module: Module,
  kernel: str,
  arguments: Sequence[Specification],
  results: Sequence[Specification],
) -> Iterator[Frame]:
  """The function `handler` of a module, which XLA calls.

  What the context holds runs after the number of arrays, their dtypes and their
  numbers of axes have been checked.
  """
  with module.function('handler', [I64], I64) as (address,):
    _answer_for_metadata(address)
    frame = Frame(kernel, address)
    for specifications, count, first, buffers in (
      (arguments, _ARGUMENT_COUNT, _ARGUMENTS, frame.arguments),
      (results, _RESULT_COUNT, _RESULTS, frame.results),
    ):
      expected = len(specifications)
      frame.require(
        _word(address, count).equals(expected),
        f'takes {len(arguments)} arrays and gives {len(results)}',
      )
      for i, (name, dtype, ndim) in enumerate(specifications):
        buffer = Buffer(name, _word(_word(address, first), i))
        buffers[name] = buffer
        number = load(buffer.struct + 8 * _DTYPE, I32)
        frame.require(number.equals(DTYPES[dtype]), f'{name} is not {dtype}')
        rank = _word(buffer.struct, _RANK)
        frame.require(rank.equals(ndim), f'{name}.ndim is not {ndim}')
    yield frame
    result(0)


def _answer_for_metadata(address: Value) -> None:
  """Answers the call in which XLA only asks for the version."""
  extension = _word(address, _EXTENSION)
  with when(extension.differs(0)):
    kind = load(extension + 8, I32)
    with when(kind.equals(_METADATA)):
      metadata = _word(extension, 3)
      for i, value in enumerate((*_VERSION, 0)):
        store(I32.constant(value), metadata + 24 + 4 * i)
      result(0)
