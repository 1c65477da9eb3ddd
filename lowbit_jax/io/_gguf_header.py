"""Headers of GGUF files: what they say of tensors, read and written.

A header is taken for hostile: counts are compared with the bytes that are left
before anything is made of them, and the offset of each tensor must be where
those before it end, which is how files are written. So a type whose blocks have
another size in this file than here is found out, as are holes and overlaps.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from lowbit_jax._files import DamagedFileError
from lowbit_jax.io import _gguf_values as values
from lowbit_jax.io._gguf_layouts import CODES, LAYOUTS, Layout

ALIGNMENT = 'general.alignment'
_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
# Far more than files have; a Python object takes many times its bytes there.
_HEADER_BYTES = 2**26
_TENSORS, _PAIRS = 2**18, 2**16
_RANK = 4
_NAME_BYTES = 64
_SIZE = 2**60  # bytes of a tensor; more would not fit into 64-bit offsets


class Info(NamedTuple):
  """What a header says of a tensor; `start` is its first byte in the file."""

  name: str
  shape: tuple[int, ...]
  layout: Layout
  start: int

  @property
  def nbytes(self) -> int:
    return self.layout.size(self.shape)


class Header(NamedTuple):
  """A header; `order` is '<' or '>', the byte order of all numbers."""

  order: values.Order
  metadata: dict[str, Any]
  infos: list[Info]


def damaged(path: str, fault: str) -> DamagedFileError:
  return DamagedFileError(
    path, fault, 'restore it from a copy, or download it again'
  )


def read(path: str, file: BinaryIO) -> Header:
  """The header of an open file.

  Raises:
    DamagedFileError: if the file is no GGUF file or not a whole one.
    ValueError: if it is of a version, or has tensors of a type, that is not
      known.
  """
  size = os.fstat(file.fileno()).st_size
  if size < 24:
    raise damaged(path, f'it has {size} bytes, too few for a GGUF file')
  length = min(size, _HEADER_BYTES)
  with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as data:
    order = _order(path, data[:8])
    reader = values.Reader(data, 8, order)
    where = 'its header'
    try:
      tensors, pairs = reader.count(24, _TENSORS), reader.count(13, _PAIRS)
      metadata: dict[str, Any] = {}
      for i in range(pairs):
        where = f'key {i} of its metadata'
        key = reader.text()
        where = f'its metadata {key!r}'
        if key in metadata:
          raise ValueError('it is there twice')
        metadata[key] = reader.value()
      where = 'its metadata'
      alignment = _alignment(metadata)
      rows: dict[str, tuple] = {}
      for i in range(tensors):
        where = f'the description of its tensor {i}'
        name = reader.text()
        where = f'the description of its tensor {name!r}'
        if name in rows:
          raise ValueError('it is there twice')
        rows[name] = _row(reader)
    except ValueError as error:
      cut = '' if length == size else f'; headers up to {length} bytes are read'
      raise damaged(path, f'{where}: {error}{cut}') from error
    start = _aligned(reader.position, alignment)
    infos, end = [], start
    for name, (shape, code, offset) in rows.items():
      info = Info(name, shape, _layout(path, name, code), start + offset)
      infos.append(info)
      _check_place(path, info, offset, _aligned(end, alignment) - start, size)
      end = info.start + info.nbytes
    end = end if infos else reader.position
    if size > _aligned(end, alignment):
      raise damaged(path, f'its tensors end at byte {end} of {size}')
  return Header(order, metadata, infos)


def written(
  metadata: Mapping[str, Any],
  tensors: Iterable[tuple[str, tuple[int, ...], Layout]],
) -> tuple[bytes, int]:
  """A header, padded up to the data, and the alignment of tensors.

  Args:
    metadata: values by key.
    tensors: (name, shape, layout) of each.

  Raises:
    TypeError: for values that files do not hold.
    ValueError: for names, shapes and an alignment that files cannot have.
  """
  pairs, infos, offset, count = [], [], 0, 0
  alignment = 32
  for key, value in metadata.items():
    if type(key) is not str:
      raise TypeError(f'metadata has the key {key!r}; keys are strings')
    try:
      code, data = values.encoded(value)
      if key == ALIGNMENT:
        alignment = _alignment(metadata)
    except (TypeError, ValueError) as error:
      kind = TypeError if isinstance(error, TypeError) else ValueError
      raise kind(f'metadata[{key!r}]: {error}') from error
    pairs += [values.string(key.encode()), struct.pack('<I', code), data]
  for name, shape, layout in tensors:
    encoded = name.encode()
    if not encoded or len(encoded) > _NAME_BYTES:
      raise ValueError(
        f'tensors[{name!r}] has a name of {len(encoded)} bytes, not 1 to'
        f' {_NAME_BYTES}'
      )
    _check_shape(f'tensors[{name!r}]', shape)
    infos.append(values.string(encoded) + struct.pack('<I', len(shape)))
    infos.append(struct.pack(f'<{len(shape)}Q', *reversed(shape)))
    infos.append(struct.pack('<IQ', CODES[layout.name], offset))
    offset += _aligned(layout.size(shape), alignment)
    count += 1
  start = _MAGIC + struct.pack('<IQQ', _VERSIONS[-1], count, len(metadata))
  data = start + b''.join(pairs + infos)
  return data + padding(len(data), alignment), alignment


def padding(position: int, alignment: int) -> bytes:
  """Zeros up to the next multiple."""
  return bytes(-position % alignment)


def _aligned(position: int, alignment: int) -> int:
  return position + -position % alignment


def _order(path: str, start: bytes) -> values.Order:
  if start[:4] != _MAGIC:
    raise damaged(path, f'it starts with {start[:4]!r}, a GGUF file with GGUF')
  little = int.from_bytes(start[4:], 'little')
  if little in _VERSIONS:
    return '<'
  if int.from_bytes(start[4:], 'big') in _VERSIONS:
    return '>'
  raise ValueError(
    f'{path!r} is a GGUF file of version {little}; versions 2 and 3 are read'
  )


def _alignment(metadata: Mapping[str, Any]) -> int:
  value = metadata.get(ALIGNMENT, 32)
  code, _ = values.encoded(value)
  if code != values.UINT32 or not 8 <= value <= 2**20 or value & (value - 1):
    raise ValueError(
      f'{ALIGNMENT} is {value!r}, not a power of two in 8..2^20 as uint32'
    )
  return int(value)


def _row(reader: values.Reader) -> tuple[tuple[int, ...], int, int]:
  """Shape, type and offset of a tensor."""
  rank = reader.u32()
  if rank > _RANK:
    raise ValueError(f'it has {rank} axes, and at most {_RANK} are possible')
  shape = tuple(reader.u64() for _ in range(rank))[::-1]
  _check_shape('it', shape)
  return shape, reader.u32(), reader.u64()


def _check_shape(where: str, shape: tuple[int, ...]) -> None:
  if len(shape) > _RANK or 0 in shape or math.prod(shape) > _SIZE:
    raise ValueError(
      f'{where} has the shape {shape}, not at most {_RANK} axes without empty'
      ' ones'
    )


def _layout(path: str, name: str, code: int) -> Layout:
  if code not in LAYOUTS:
    raise ValueError(
      f'{path!r} has the tensor {name!r} of type {code}, which is not known;'
      f' known are {", ".join(CODES)}'
    )
  return LAYOUTS[code]


def _check_place(
  path: str, info: Info, offset: int, expected: int, size: int
) -> None:
  where = f'its tensor {info.name!r} of type {info.layout.name}'
  try:
    nbytes = info.nbytes
  except ValueError as error:
    raise damaged(path, f'{where} {error}') from error
  if offset != expected:
    raise damaged(
      path,
      f'{where} starts at byte {offset} of the data, and {expected} is where'
      ' tensors of these types and shapes before it end',
    )
  if info.start + nbytes > size:
    raise damaged(path, f'{where} ends at byte {info.start + nbytes} of {size}')
