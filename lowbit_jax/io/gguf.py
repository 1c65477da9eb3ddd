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
from collections.abc import Callable, Iterator, Mapping
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _GgufCheckpoint(Checkpoint):
  """A checkpoint that can be written as the same bytes again.

  Attributes:
    stored: all tensors of the file in its order, companions included.
  """

  stored: tuple[Info, ...]


class _Place(NamedTuple):
  """Where a tensor lies."""

  path: str
  file: BinaryIO
  order: Order
  info: Info


class _Entry(NamedTuple):
  """A tensor to write."""

  name: str
  shape: tuple[int, ...]
  layout: Layout
  read: Callable[[], Any]


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
    if _number(metadata, 'count') > 1:
      for name, place in _other_places(path, metadata, stack):
        if name in places:
          raise damaged(place.path, f'its tensor {name!r} is in another part')
        places[name] = place
      expected = _number(metadata, 'tensors.count')
      if len(places) != expected:
        raise damaged(
          path, f'its parts have {len(places)} of {expected} tensors'
        )
      metadata = _unsplit(metadata)
    stored = tuple(place.info for place in places.values())
    tensors = _tensors(places)
    release = stack.pop_all().close
  return _GgufCheckpoint(path, tensors, metadata, release, stored)


def save(
  path: PathLike,
  tensors: Mapping[str, Leaf | jax.Array],
  *,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a GGUF file, atomically: version 3, little-endian.

  What `open` made of one file, with its metadata, becomes the same bytes again.
  QArrays are written in the block type that has their codes and scales, without
  rounding; tensors are read and written one at a time.

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
  if _number(metadata, 'count') > 1:
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
        for piece in layouts.write(entry.layout, entry.read()):
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


def _number(metadata: Mapping[str, Any], key: str) -> int:
  """A number of the keys that describe a split, 0 where it is not there."""
  value = metadata.get(_SPLIT + key, 0)
  is_number = isinstance(value, int | np.integer)
  return int(value) if is_number else 0


def _unsplit(metadata: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in metadata.items() if not k.startswith(_SPLIT)}


def _other_places(
  path: str, metadata: Mapping[str, Any], stack: contextlib.ExitStack
) -> Iterator[tuple[str, _Place]]:
  """The tensors of the second and further parts of a split model."""
  count = _number(metadata, 'count')
  match = _SPLIT_NAME.fullmatch(path)
  if match is None or match[2] != '00001' or match[3] != f'{count:05}':
    raise ValueError(
      f'{path!r} is part {_number(metadata, "no") + 1} of {count}; open the'
      f' first by a name that ends in -00001-of-{count:05}.gguf'
    )
  for number in range(count):
    part = f'{match[1]}-{number + 1:05}-of-{count:05}.gguf'
    places, more = _part(part, stack) if number else ([], metadata)
    found = _number(more, 'no'), _number(more, 'count')
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
  if scale.info.layout != _F32 or shape not in ((), (1,), stack):
    raise damaged(
      scale.path,
      f'its tensor {scale.info.name!r}, of type {scale.info.layout.name} and'
      f' shape {shape}, is to be an F32 scale of {weight.name!r}, of shape (1,)'
      f' or {stack}',
    )


def _read(place: _Place, scale: _Place | None) -> Leaf:
  tensor_scale: Any = None if scale is None else _read(scale, None)
  info = place.info
  if place.file.closed:
    raise ValueError(f'{place.path!r} is closed: open it again')
  # Mapped for itself, so that its pages go when nothing refers to them.
  data = np.memmap(
    place.file, np.uint8, 'r', offset=info.start, shape=(info.nbytes,)
  ).view(np.ndarray)
  try:
    return layouts.read(
      info.layout, data, info.shape, place.order, tensor_scale
    )
  except ValueError as error:
    raise ValueError(f'{place.path!r}: its {info.name!r} {error}') from error


def _entries(tensors: Mapping[str, Any]) -> Iterator[_Entry]:
  """What is to be written, in its order."""
  if isinstance(tensors, _GgufCheckpoint):
    yield from _stored_entries(tensors)
    return
  for name, leaf in tensors.items():
    with _at(name):
      _check_leaf(name, leaf)
      layout = layouts.layout_of(leaf)
      read = functools.partial(tensors.__getitem__, name)
      yield _Entry(name, tuple(leaf.shape), layout, read)
      if isinstance(leaf, QArray) and leaf.tensor_scale is not None:
        scale = _flat_scale(leaf)
        companion = _companion(name)
        if companion in tensors:
          raise ValueError(f'has a tensor scale, and so has {companion!r}')
        if (scale != 1).any():
          yield _Entry(companion, scale.shape, _F32, lambda s=scale: s)


def _stored_entries(checkpoint: _GgufCheckpoint) -> Iterator[_Entry]:
  """Those of a file that was read: types, order and companions as there."""
  weights = {_companion(name): name for name in checkpoint}
  for info in checkpoint.stored:
    layout = _F32 if info.layout.is_decoded else info.layout
    read = functools.partial(checkpoint.__getitem__, info.name)
    if info.name not in checkpoint:
      read = functools.partial(_scale_of, checkpoint, weights[info.name])
    yield _Entry(info.name, info.shape, layout, read)


def _scale_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
  leaf = checkpoint[name]
  assert isinstance(leaf, QArray)
  return _flat_scale(leaf)


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
