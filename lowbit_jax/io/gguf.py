"""GGUF: the files of llama.cpp, read into packed QArrays and written.

- `open`: Opens a GGUF file, or the first of a split model, as a mapping.
- `save`: Writes a GGUF file, atomically.
"""

import builtins
import contextlib
import dataclasses
import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from lowbit_jax import _files
from lowbit_jax._typing import PathLike
from lowbit_jax.io import _gguf_header as header, _gguf_layouts as layouts
from lowbit_jax.io._checkpoint import Checkpoint, Leaf, Tensor
from lowbit_jax.io._gguf_header import Info, damaged
from lowbit_jax.io._gguf_layouts import CODES, LAYOUTS, Layout
from lowbit_jax.io._gguf_values import Order, encoded
from lowbit_jax.qarray import QArray

_SPLIT_NAME = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf', re.DOTALL)
_SPLIT = 'split.'
_F32 = LAYOUTS[CODES['F32']]


class _Place(NamedTuple):
  """Where a tensor lies."""

  path: str
  file: BinaryIO
  order: Order
  info: Info


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _GgufCheckpoint(Checkpoint):
  """A checkpoint that can be written as the same bytes again.

  Attributes:
    places: of all tensors in their order, companions included.
  """

  places: tuple[_Place, ...]


class _Entry(NamedTuple):
  """A tensor to write, and what makes its bytes, piece by piece."""

  name: str
  shape: tuple[int, ...]
  layout: Layout
  pieces: Callable[[], Iterable[Any]]


def open(path: PathLike) -> Checkpoint:
  """Opens a GGUF file, or the first of a split model, as a mapping.

  Nothing but the header is read yet. Each tensor is read from the file when it
  is asked for: dense ones as arrays that are mapped where the machine's byte
  order allows, block types as QArrays of the codes and scales of the file,
  which decode to the numbers of llama.cpp. The types IQ1 to IQ3 are decoded to
  float32 arrays by the package `gguf`. Shapes are those of NumPy, the reverse
  of the file's.

  NVFP4 is one entry per weight: `X.scale` becomes the tensor scale of
  `X.weight`. An `X.input_scale` belongs to activations and stays an entry.

  Numbers of the metadata are NumPy scalars and arrays, so that their types
  survive; strings are str, and lists hold strings, arrays or lists.

  Args:
    path: of the file. Of a split model `name-00001-of-00005.gguf`, the others
      stand beside it.

  Raises:
    FileNotFoundError: if there is no such file, or a part of a split is not
      there.
    DamagedFileError: a ValueError, if a file is no GGUF file or not whole.
    ValueError: if a file is of an unknown version or has a tensor of an unknown
      type; and when a tensor of a known type that is not read is asked for.
  """
  path = os.fspath(path)
  with contextlib.ExitStack() as stack:
    first, metadata = _part(path, stack)
    places = {place.info.name: place for place in first}
    if _number(path, metadata, 'count') > 1:
      for name, place in _other_places(path, metadata, stack):
        if name in places:
          raise damaged(place.path, f'its tensor {name!r} is in another part')
        places[name] = place
      expected = _number(path, metadata, 'tensors.count')
      if len(places) != expected:
        raise damaged(
          path, f'its parts have {len(places)} of {expected} tensors'
        )
      metadata = _unsplit(metadata)
    tensors = _tensors(places)
    release = stack.pop_all().close
  return _GgufCheckpoint(
    path, tensors, metadata, release, tuple(places.values())
  )


def save(
  path: PathLike,
  tensors: Mapping[str, Leaf | jax.Array],
  *,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a GGUF file, atomically: version 3, little-endian.

  What `open` returned is copied as it is: with its metadata, the bytes of a
  little-endian file of version 3 come back. Otherwise QArrays are written in
  the block type that has their codes and scales, without rounding. Tensors are
  read and written one at a time.

  Args:
    path: of the file; its directory must exist.
    tensors: arrays and QArrays by name, of at most 4 axes. QArrays have whole
      blocks along the last axis, and scales that are float16 numbers where the
      block type has such. A tensor scale other than 1 becomes `X.scale`.
    metadata: values by key. A plain int is written as uint32, else int64, a
      float as float32; NumPy scalars and arrays keep their types.
      `general.alignment` is that of the tensors, 32 without it.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if the file exists and `overwrite` is False.
    OSError: if the file cannot be written, with its name and the reason.
    TypeError: for a dtype, format or value that a file cannot hold, with its
      name.
    ValueError: for a tensor, name or value that does not fit, with its name.
  """
  path = os.fspath(path)
  if os.path.exists(path) and not overwrite:
    raise FileExistsError(
      f'path={path!r} exists; pass overwrite=True or choose another name'
    )
  metadata = {} if metadata is None else metadata
  if _number(path, metadata, 'count') > 1:
    raise ValueError(
      f'metadata says that it is of a split model, and save writes one file:'
      f' leave out the keys {_SPLIT}*'
    )
  entries = list(_entries(tensors))
  start, alignment = header.written(
    metadata, [(entry.name, entry.shape, entry.layout) for entry in entries]
  )
  with _files.replacing(path) as file:
    file.write(start)
    for entry in entries:
      size = 0
      with _at(entry.name):
        for piece in entry.pieces():
          size += file.write(piece)
      file.write(header.padding(size, alignment))


def _part(
  path: str, stack: contextlib.ExitStack
) -> tuple[list[_Place], dict[str, Any]]:
  """The tensors and metadata of one file, which the stack will close."""
  # Asked before it is opened, which would wait for the writer of a pipe.
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise damaged(path, 'it is no regular file')
  file = stack.enter_context(builtins.open(path, 'rb'))
  order, metadata, infos = header.read(path, file)
  return [_Place(path, file, order, info) for info in infos], metadata


def _number(path: str, metadata: Mapping[str, Any], key: str) -> int:
  """A number of the keys that describe a split, 0 where it is not there."""
  value = metadata.get(_SPLIT + key, 0)
  if isinstance(value, int | np.integer):
    return int(value)
  raise ValueError(f'{path!r}: {_SPLIT}{key} is {value!r}, and no integer')


def _unsplit(metadata: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in metadata.items() if not k.startswith(_SPLIT)}


def _other_places(
  path: str, metadata: Mapping[str, Any], stack: contextlib.ExitStack
) -> Iterator[tuple[str, _Place]]:
  """The tensors of the second and further parts of a split model."""
  count = _number(path, metadata, 'count')
  match = _SPLIT_NAME.fullmatch(path)
  if match is None or match[2] != '00001' or match[3] != f'{count:05}':
    number = _number(path, metadata, 'no') + 1
    raise ValueError(
      f'{path!r} is part {number} of {count}; open the first by a name that'
      f' ends in -00001-of-{count:05}.gguf'
    )
  for number in range(count):
    part = f'{match[1]}-{number + 1:05}-of-{count:05}.gguf'
    places, more = _part(part, stack) if number else ([], metadata)
    found = _number(part, more, 'no'), _number(part, more, 'count')
    if found != (number, count):
      raise damaged(
        part, f'it says that it is part {found[0] + 1} of {found[1]}'
      )
    for key, value in _unsplit(more).items():
      known = key in metadata and encoded(value) == encoded(metadata[key])
      if not known:
        raise damaged(part, f'its metadata {key!r} is not that of the first')
    for place in places:
      yield place.info.name, place


def _companion(name: str) -> str:
  """The name of a tensor scale."""
  return f'{name.removesuffix(".weight")}.scale'


def _tensors(places: Mapping[str, _Place]) -> dict[str, Tensor]:
  """An entry for each tensor that is no companion."""
  scales = {}
  for name, place in places.items():
    scale = places.get(_companion(name))
    fmt = place.info.layout.fmt
    if scale is not None and fmt is not None and fmt.tensor_scale:
      _check_scale(scale, place.info)
      scales[name] = scale
  folded = {place.info.name for place in scales.values()}
  tensors = {}
  for name, place in places.items():
    if name not in folded:
      info, scale = place.info, scales.get(name)
      nbytes = info.nbytes + (0 if scale is None else scale.info.nbytes)
      layout = info.layout
      read = functools.partial(_read, place, scale)
      tensors[name] = Tensor(
        layout.arrival, info.shape, nbytes, layout.fmt, read
      )
  return tensors


def _check_scale(scale: _Place, weight: Info) -> None:
  shape = scale.info.shape
  stack = weight.shape[:1] if len(weight.shape) > 2 else (1,)
  if scale.info.layout is not _F32 or shape not in ((), (1,), stack):
    raise damaged(
      scale.path,
      f'its tensor {scale.info.name!r}, of type {scale.info.layout.name} and'
      f' shape {shape}, is to be an F32 scale of {weight.name!r}, of shape (1,)'
      f' or {stack}',
    )


@contextlib.contextmanager
def _mapped(place: _Place) -> Iterator[np.ndarray]:
  """The bytes of a tensor; errors about them name the file and the tensor."""
  info = place.info
  if place.file.closed:
    raise ValueError(f'{place.path!r} is closed: open it again')
  try:
    # Mapped for itself, so that its pages go when nothing refers to them.
    mapped = np.memmap(
      place.file, np.uint8, 'r', offset=info.start, shape=(info.nbytes,)
    )
    yield mapped.view(np.ndarray)
  except ValueError as error:
    raise ValueError(f'{place.path!r}: its {info.name!r} {error}') from error


def _read(place: _Place, scale: _Place | None) -> Leaf:
  tensor_scale: Any = None if scale is None else _read(scale, None)
  info = place.info
  with _mapped(place) as data:
    return layouts.read(
      info.layout, data, info.shape, place.order, tensor_scale
    )


def _copied(place: _Place) -> Iterator[Any]:
  with _mapped(place) as data:
    yield layouts.little(place.info.layout, data, place.order)


def _entries(tensors: Mapping[str, Any]) -> Iterator[_Entry]:
  """What is to be written, in its order."""
  if isinstance(tensors, _GgufCheckpoint):
    # As it is, types and companions included.
    for place in tensors.places:
      name, shape, layout, _ = place.info
      yield _Entry(name, shape, layout, functools.partial(_copied, place))
    return
  for name, leaf in tensors.items():
    with _at(name):
      _check_leaf(name, leaf)
      layout, shape = layouts.layout_of(leaf), tuple(leaf.shape)
      layout.size(shape)
      pieces = functools.partial(_written, layout, tensors, name)
      yield _Entry(name, shape, layout, pieces)
      if isinstance(leaf, QArray) and leaf.tensor_scale is not None:
        scale = _flat_scale(leaf)
        companion = _companion(name)
        if companion in tensors:
          raise ValueError(f'has a tensor scale, and so has {companion!r}')
        if (scale != 1).any():
          pieces = functools.partial(layouts.write, _F32, scale)
          yield _Entry(companion, scale.shape, _F32, pieces)


def _written(
  layout: Layout, tensors: Mapping[str, Any], name: str
) -> Iterator[Any]:
  # Asked for again, so that one at a time is in memory where they are read.
  yield from layouts.write(layout, tensors[name])


def _flat_scale(q: QArray) -> np.ndarray:
  """A tensor scale as a file has it: one, or one for each of a stack."""
  scale = np.asarray(q.tensor_scale)
  if scale.size not in (1, scale.shape[0]) or (q.ndim < 3 and scale.size > 1):
    raise ValueError(
      f'has a tensor scale of shape {scale.shape}, and a file one or one for'
      ' each of the first of three axes'
    )
  return scale.reshape(-1)


def _check_leaf(name: str, leaf: Any) -> None:
  if type(name) is not str:
    raise TypeError('is no string, as names are')
  plain = type(leaf) in (np.ndarray, np.memmap)
  if not plain and not isinstance(leaf, QArray | jax.Array):
    raise TypeError(f'is a {type(leaf).__name__}, and no array or QArray')


@contextlib.contextmanager
def _at(name: str) -> Iterator[None]:
  """Puts the name of a tensor before the messages of errors."""
  try:
    yield
  except (TypeError, ValueError) as error:
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f'tensors[{name!r}] {error}') from error
