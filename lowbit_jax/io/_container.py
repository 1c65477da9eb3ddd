"""The container of safetensors files: a JSON header, then bare tensors.

A file is the length of the header as eight bytes, little end first, then
{name: {dtype, shape, data_offsets}}, where '__metadata__' maps strings to
strings, then the bytes of the tensors, without holes and in any order. A file
is refused where the header says anything else, before a tensor is read.
"""

import collections
import json
import math
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from lowbit_jax._files import DamagedFileError
from lowbit_jax.io import _bits

_HEADER_BYTES = 100_000_000  # of the reference implementation
_NUMBERS = 2**60
_NAME = 1000
_METADATA = '__metadata__'
_REMEDY = 'fetch it again, or convert the model again'

# In the order of the reference implementation, which writes the last first.
_DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'F4': np.dtype(ml_dtypes.float4_e2m1fn),
  'F6_E2M3': np.dtype(ml_dtypes.float6_e2m3fn),
  'F6_E3M2': np.dtype(ml_dtypes.float6_e3m2fn),
  'U8': np.dtype('u1'),
  'I8': np.dtype('i1'),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'F8_E4M3FNUZ': np.dtype(ml_dtypes.float8_e4m3fnuz),
  'F8_E5M2FNUZ': np.dtype(ml_dtypes.float8_e5m2fnuz),
  'I16': np.dtype('<i2'),
  'U16': np.dtype('<u2'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype('<i4'),
  'U32': np.dtype('<u4'),
  'F32': np.dtype('<f4'),
  'C64': np.dtype('<c8'),
  'F64': np.dtype('<f8'),
  'I64': np.dtype('<i8'),
  'U64': np.dtype('<u8'),
}
_NARROW = {'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6}  # bits of packed elements
_ORDER = {name: k for k, name in enumerate(_DTYPES)}
_NAMES = {dtype.newbyteorder('='): name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
  """A tensor as it lies in a file.

  Attributes:
    name: of the tensor.
    dtype: as the header has it, such as 'BF16'.
    shape: in elements.
    nbytes: in the file.
    read: gives the array, mapped where its elements fill whole bytes.
  """

  name: str
  dtype: str
  shape: tuple[int, ...]
  nbytes: int
  read: Callable[[], np.ndarray]


class _Entry(NamedTuple):
  dtype: str
  shape: tuple[int, ...]
  start: int
  stop: int


class File:
  """An open file.

  Attributes:
    path: of the file.
    metadata: the strings of its header.
    tensors: by name, in the order of their bytes.
  """

  def __init__(self, path: str) -> None:
    """Maps the file and reads its header.

    Raises:
      DamagedFileError: if it is no whole safetensors file.
    """
    self.path = path
    handle, size = _opened(path)
    # A file that nobody closes is closed when it is forgotten.
    self._closed = weakref.finalize(self, os.close, handle)
    self._handle = handle
    data = _mapped(handle, 0, size)
    try:
      start, header = _header(data)
      self.metadata = header.pop(_METADATA, {})
      _check_metadata(self.metadata)
      entries = {name: _entry(name, node) for name, node in header.items()}
      _check_cover(entries, len(data) - start)
    except ValueError as error:
      raise DamagedFileError(path, str(error), _REMEDY) from error
    self.tensors = {
      name: self._stored(name, entry, start)
      for name, entry in sorted(entries.items(), key=lambda item: item[1][2:])
    }

  def close(self) -> None:
    """Closes the file; arrays that were read keep their maps."""
    self._closed()

  def _stored(self, name: str, entry: _Entry, start: int) -> Stored:
    dtype, shape = entry.dtype, entry.shape

    def read() -> np.ndarray:
      if not self._closed.alive:
        raise ValueError(f'{self.path!r} was closed; open it again')
      size = entry.stop - entry.start
      data = _mapped(self._handle, start + entry.start, size)
      if dtype == 'BOOL' and data.size and data.max() > 1:
        raise DamagedFileError(
          self.path, f'{name!r} has booleans other than 0 and 1', _REMEDY
        )
      return _array(data, dtype, shape)

    return Stored(name, dtype, shape, entry.stop - entry.start, read)


def write(
  file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Writes a file with the bytes that the reference implementation gives it."""
  names = sorted(
    tensors, key=lambda name: (-_ORDER[_NAMES[tensors[name].dtype]], name)
  )
  header: dict[str, Any] = {}
  if metadata:
    header[_METADATA] = dict(sorted(metadata.items()))
  end = 0
  for name in names:
    dtype, shape = _NAMES[tensors[name].dtype], tensors[name].shape
    start, end = end, end + _nbytes(dtype, shape)
    header[name] = {
      'dtype': dtype,
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  if len(text) > _HEADER_BYTES:
    raise ValueError(
      f'the header of these tensors has {len(text)} bytes, of which readers'
      f' take {_HEADER_BYTES}; write several files'
    )
  file.write(len(text).to_bytes(8, 'little') + text)
  for name in names:
    file.write(_bytes(tensors[name]).data)


def dtype(name: str) -> np.dtype:
  """The dtype of arrays that the container calls so."""
  return _DTYPES[name]


def check_writable(name: object, array: np.ndarray) -> None:
  """Refuses what the container cannot hold."""
  if not isinstance(name, str) or name == _METADATA:
    raise TypeError(f'{name!r} is no name of a tensor')
  dtype = _NAMES.get(array.dtype.newbyteorder('='))
  if dtype is None:
    raise TypeError(
      f'{name!r} has dtype {array.dtype}, which safetensors files do not have;'
      ' convert it'
    )
  if array.size * _NARROW.get(dtype, 8) % 8:
    raise ValueError(
      f'{name!r} has {array.size} elements of {_NARROW[dtype]} bits, which fill'
      ' no whole bytes; pad it'
    )


def _opened(path: str) -> tuple[int, int]:
  """An open file, and its size."""
  # Asked before it is opened, which would wait for the writer of a pipe.
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):
    raise DamagedFileError(path, 'it is no regular file', 'name another')
  if status.st_size < 8:
    raise DamagedFileError(path, 'it ends before its header', _REMEDY)
  flags = os.O_RDONLY | getattr(os, 'O_BINARY', 0)
  return os.open(path, flags), status.st_size


def _mapped(handle: int, start: int, size: int) -> np.ndarray:
  """Bytes of a file, mapped for themselves: the pages of what was read go when
  nothing refers to them."""
  if not size:
    return np.empty(0, np.uint8)
  skipped = start % mmap.ALLOCATIONGRANULARITY
  pages = mmap.mmap(
    handle, skipped + size, access=mmap.ACCESS_READ, offset=start - skipped
  )
  return np.frombuffer(pages, np.uint8, size, skipped)


def _header(data: np.ndarray) -> tuple[int, dict[str, Any]]:
  """Where the tensors begin, and the object before them."""
  size = int.from_bytes(data[:8].tobytes(), 'little')
  if size > _HEADER_BYTES or size > len(data) - 8:
    raise ValueError(
      f'its header claims {size} bytes; there are {len(data) - 8}, and at most'
      f' {_HEADER_BYTES} are read'
    )
  header = parse(data[8 : 8 + size].tobytes())
  if not isinstance(header, dict):
    raise ValueError('its header is no JSON object')
  return 8 + size, header


def parse(text: bytes) -> Any:
  """JSON of which no object has two fields of one name.

  Raises:
    ValueError: for anything else.
  """
  try:
    return json.loads(
      text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
    )
  except RecursionError:
    raise ValueError('its JSON is nested too deeply') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    raise ValueError(f'{names.most_common(1)[0][0]!r:.200} is there twice')
  return result


def _refuse_constant(text: str) -> None:
  raise ValueError(f'{text} is no number of JSON')


def _check_metadata(metadata: Any) -> None:
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise ValueError(f'its {_METADATA!r} does not map strings to strings')


def _entry(name: str, node: Any) -> _Entry:
  """What the header says of one tensor, checked."""
  name.encode()  # Refuses what UTF-8 cannot hold.
  if len(name) > _NAME:
    raise ValueError(f'a tensor has a name of {len(name)} characters')
  if not isinstance(node, dict) or set(node) != {
    'dtype',
    'shape',
    'data_offsets',
  }:
    raise ValueError(f'its header has no dtype, shape and offsets of {name!r}')
  dtype, shape, offsets = node['dtype'], node['shape'], node['data_offsets']
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise ValueError(
      f'{name!r} has the dtype {dtype!r:.40}; known are {", ".join(_DTYPES)}'
    )
  if not _are_counts(shape) or math.prod(n or 1 for n in shape) > _NUMBERS:
    raise ValueError(f'{name!r} has a shape that no array has')
  if not _are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f'the offsets of {name!r} are no two counts')
  start, stop = offsets
  if math.prod(shape) * _NARROW.get(dtype, 8) % 8:
    raise ValueError(f'{name!r}, {dtype} {shape}, fills no whole bytes')
  if stop - start != _nbytes(dtype, shape):
    raise ValueError(
      f'{name!r} has {stop - start} bytes; {dtype} {shape} has'
      f' {_nbytes(dtype, shape)}'
    )
  return _Entry(dtype, tuple(shape), start, stop)


def _are_counts(values: Any) -> bool:
  return (
    isinstance(values, list)
    and len(values) <= 32
    and all(type(n) is int and 0 <= n <= _NUMBERS for n in values)
  )


def _check_cover(entries: dict[str, _Entry], size: int) -> None:
  """Refuses tensors that overlap, leave holes or end elsewhere."""
  end = 0
  for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
    if entry.start != end:
      kind = 'overlaps' if entry.start < end else 'leaves a hole after'
      raise ValueError(f'{name!r} {kind} the tensor before it')
    end = entry.stop
  if end != size:
    raise ValueError(
      f'its tensors have {end} bytes, after its header are {size}'
    )


def _nbytes(dtype: str, shape: Any) -> int:
  size = math.prod(shape)
  if dtype in _NARROW:
    return size * _NARROW[dtype] // 8
  return size * _DTYPES[dtype].itemsize


def _array(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  if dtype in _NARROW:
    data = _bits.unpack(data, _NARROW[dtype])
  elif data.ctypes.data % _DTYPES[dtype].alignment:
    data = data.copy()
  return data.view(_DTYPES[dtype]).reshape(shape)


def _bytes(array: np.ndarray) -> np.ndarray:
  """The bytes of an array as the container holds them."""
  dtype = _NAMES[array.dtype]
  array = array.astype(_DTYPES[dtype], copy=False)
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  if dtype in _NARROW:
    return np.ascontiguousarray(_bits.pack(data, _NARROW[dtype]))
  return data
