"""Metadata of GGUF files: values whose types survive, read and written.

Numbers are NumPy scalars and arrays of one axis, so that a uint8 is written as
one again. Strings are str; bytes of theirs that are no UTF-8 come back as
surrogates, which are written as these bytes. Lists hold strings, or arrays and
lists.
"""

import struct
from typing import Any, Literal

import numpy as np

Order = Literal['<', '>']  # of the bytes in a number

DEPTH = 8  # of lists in lists
UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_NUMBERS = {
  code: np.dtype(name)
  for code, name in enumerate(
    ('u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'f4', '?', '', '', 'u8', 'i8', 'f8')
  )
  if name
}
_PLAIN = (bool, int, float)
_CODES = {dtype: code for code, dtype in _NUMBERS.items()}


class Reader:
  """Takes numbers and strings from bytes, one after another.

  Args:
    data: what can be sliced into bytes.
    position: of the first byte to take.
    order: '<' or '>', the byte order of numbers.

  Raises:
    ValueError: from each method, where the bytes do not hold what is asked for.
  """

  def __init__(self, data: Any, position: int, order: Order) -> None:
    self._data = data
    self._size = len(data)
    self._order: Order = order
    self.position = position
    self._unpack_u32 = struct.Struct(f'{order}I').unpack
    self._unpack_u64 = struct.Struct(f'{order}Q').unpack

  @property
  def rest(self) -> int:
    """Bytes that were not taken."""
    return self._size - self.position

  def take(self, size: int) -> bytes:
    if size > self.rest:
      raise ValueError(f'{size} bytes are to follow, and {self.rest} are left')
    start = self.position
    self.position = start + size
    return self._data[start : self.position]

  def u32(self) -> int:
    return self._unpack_u32(self.take(4))[0]

  def u64(self) -> int:
    return self._unpack_u64(self.take(8))[0]

  def count(self, smallest: int, most: int = 2**64) -> int:
    """A number of things, at most `most` of at least `smallest` bytes each."""
    count = self.u64()
    if count * smallest > self.rest:
      raise ValueError(f'{count} entries do not fit into {self.rest} bytes')
    if count > most:
      raise ValueError(f'{count} entries are more than {most}')
    return count

  def string(self) -> bytes:
    return self.take(self.u64())

  def text(self) -> str:
    """A string that must be UTF-8, as names are."""
    return self.string().decode()

  def numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
    data = self.take(count * dtype.itemsize)
    if dtype.kind == 'b' and data.strip(b'\0\1'):
      raise ValueError('a bool is neither 0 nor 1')
    stored = dtype.newbyteorder(self._order)
    return np.frombuffer(data, stored).astype(dtype)

  def value(self) -> Any:
    """A value after its type."""
    code = self.u32()
    if code in _NUMBERS:
      return self.numbers(_NUMBERS[code], 1)[0]
    if code == _STRING:
      return self._lossless()
    if code == _ARRAY:
      return self._array(0)
    raise ValueError(f'its type is {code}, and 0 to 12 are known')

  def _lossless(self) -> str:
    return self.string().decode('utf-8', 'surrogateescape')

  def _array(self, depth: int) -> Any:
    if depth >= DEPTH:
      raise ValueError(f'its lists are more than {DEPTH} levels deep')
    code = self.u32()
    if code in _NUMBERS:
      dtype = _NUMBERS[code]
      return self.numbers(dtype, self.count(dtype.itemsize))
    if code == _STRING:
      return [self._lossless() for _ in range(self.count(8))]
    if code != _ARRAY:
      raise ValueError(f'its entries are of type {code}, and 0 to 12 are known')
    count = self.count(12)
    if not count:
      raise ValueError('it is a list of lists without any, which has no type')
    return [self._array(depth + 1) for _ in range(count)]


def encoded(value: Any) -> tuple[int, bytes]:
  """The type of a value and its bytes, little-endian.

  Raises:
    TypeError: for values that files do not hold.
    ValueError: for ints beyond 64 bits, deep lists, and text that is no UTF-8.
  """
  return _encoded(value, 0)


def string(data: bytes) -> bytes:
  """A string as files hold it."""
  return struct.pack('<Q', len(data)) + data


def _encoded(value: Any, depth: int) -> tuple[int, bytes]:
  if isinstance(value, str):
    return _STRING, string(value.encode('utf-8', 'surrogateescape'))
  if type(value) in _PLAIN:
    value = np.dtype(_dtype_of([value])).type(value)
  if isinstance(value, np.generic):
    return _code(value.dtype), _little(value)
  if isinstance(value, np.ndarray) and value.ndim == 1:
    return _ARRAY, _array(_code(value.dtype), len(value), _little(value))
  if isinstance(value, list | tuple):
    return _ARRAY, _list(list(value), depth)
  raise TypeError(
    f'it is a {type(value).__name__}; a file holds str, bool, int, float, NumPy'
    ' scalars and arrays of one axis, and lists of these'
  )


def _list(values: list, depth: int) -> bytes:
  kinds = {type(v) for v in values}
  if depth >= DEPTH:
    raise ValueError(f'its lists are more than {DEPTH} levels deep')
  if all(isinstance(v, str) for v in values):
    code = _STRING
  elif kinds <= {int, float} or kinds == {bool}:
    return _encoded(np.array(values, _dtype_of(values)), depth)[1]
  elif all(isinstance(v, np.ndarray | list | tuple) for v in values):
    code = _ARRAY
  else:
    names = ', '.join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(
      f'its entries are of the types {names}; a list is all strings,'
      ' all plain numbers, or all lists and arrays'
    )
  entries = (_encoded(v, depth + 1)[1] for v in values)
  return _array(code, len(values), b''.join(entries))


def _dtype_of(values: list) -> str:
  """The type of plain numbers: bool, uint32 or else int64, float32."""
  kinds = {type(v) for v in values}
  if kinds == {bool}:
    return '?'
  if kinds != {int}:
    return 'f4'
  if all(0 <= v < 2**32 for v in values):
    return 'u4'
  if all(-(2**63) <= v < 2**63 for v in values):
    return 'i8'
  raise ValueError('it does not fit into an int64; pass np.uint64 of it')


def _code(dtype: np.dtype) -> int:
  code = _CODES.get(dtype.newbyteorder('='))
  if code is None:
    known = ', '.join(d.name for d in _CODES)
    raise TypeError(f'it is {dtype}; a file holds {known}')
  return code


def _little(value: np.ndarray | np.generic) -> bytes:
  return value.astype(value.dtype.newbyteorder('<')).tobytes()


def _array(code: int, count: int, data: bytes) -> bytes:
  return struct.pack('<IQ', code, count) + data
