"""The file format of this library: trees of arrays and QArrays in one file.

A file is a zip archive with one `.npy` entry per array and `manifest.json`, all
uncompressed. The manifest describes the tree and, for each QArray, the whole
format, axis, padding and dtype, so a file can be read without knowing the
format by name; a bare restore of the leaves would lose it. It also holds the
CRC-32 of each entry. Types that NumPy files do not know (bfloat16, float8, ...)
are stored as unsigned integers of their width, all numbers little-endian.

Version 2 added the checksums, dicts with integer keys, minima and two levels of
scales, version 3 weights behind transforms, version 4 low-rank terms; files of
earlier versions are read as well.

A file is taken for hostile until it has been read: entries may not overlap or
be compressed, so no more memory is used than the file is long, and nothing is
parsed but JSON and one fixed form of the `.npy` header.
"""

import contextlib
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from importlib import metadata
from io import BufferedReader
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from lowbit_jax import _files, formats, qarray
from lowbit_jax._files import DamagedFileError
from lowbit_jax._low_rank import Adapter, LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import PathLike, PyTree
from lowbit_jax.io import _transforms
from lowbit_jax.qarray import QArray

VERSION = 4
_MAGIC = 'lowbit_jax tree'
_MANIFEST = 'manifest.json'
_MANIFEST_BYTES = 2**28
_DEPTH = 100
_REMEDY = 'restore it from a copy, or save it again'

# The arrays that come back as they were: those of JAX and NumPy's wide ones.
_DTYPES = {
  name: np.dtype(getattr(ml_dtypes, name, name))
  for name in (
    'bool',
    *(f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)),
    *('float16', 'float32', 'float64', 'complex64', 'complex128'),
    *('bfloat16', 'float4_e2m1fn', 'int2', 'int4', 'uint2', 'uint4'),
    *('float8_e3m4', 'float8_e4m3', 'float8_e4m3b11fnuz', 'float8_e4m3fn'),
    *('float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz', 'float8_e8m0fnu'),
  )
}

# What NumPy writes before the numbers of an array, after magic and length.
_MAGIC_NPY = b'\x93NUMPY\x01\x00'
_HEADER = re.compile(
  r"\{'descr': '([^']+)', 'fortran_order': (True|False),"
  r" 'shape': (\([\d, ]*\)), \} *\n"
)


def save(path: PathLike, tree: PyTree, *, overwrite: bool = False) -> None:
  """Writes a tree to a file, atomically.

  Whatever it writes `load` returns, except that arrays come back as jax arrays
  and keys in sorted order. Equal trees give equal bytes.

  Args:
    path: file to write; its directory must exist. A file that is replaced keeps
      its mode, and a symbolic link keeps pointing to it.
    tree: nested dicts with string or with integer keys, lists and tuples of
      arrays, QArrays, `ops.Transformed`, `ops.LowRank`, adapters of `lora`,
      Python scalars, strings and None, at most 100 deep. Arrays have a dtype
      that JAX knows, or a NumPy one of 64 or 128 bits.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if the file exists and `overwrite` is False.
    OSError: if the file cannot be written, with its name and the reason.
    TypeError: for a node, leaf or dtype of another kind, with its place in the
      tree.
    ValueError: for a QArray or array that is not whole, with its place.
  """
  path = os.fspath(path)
  if os.path.exists(path) and not overwrite:
    raise FileExistsError(
      f'path={path!r} exists; pass overwrite=True or choose another name'
    )
  arrays: list[tuple[dict, Any]] = []
  node = _describe(tree, arrays, 'tree', 0)
  manifest = {
    'magic': _MAGIC,
    'version': VERSION,
    'library': _library_version(),
    'tree': node,
  }
  with (
    _files.replacing(path) as f,
    zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED) as archive,
  ):
    for node, array in arrays:
      info = _zip_info(f'{node["entry"]}.npy')
      with archive.open(info, 'w', force_zip64=True) as entry:
        data = _storable(np.asarray(array))
        np.lib.format.write_array(entry, data, allow_pickle=False)
      node['crc32'] = info.CRC
    text = json.dumps(manifest, indent=1).encode()
    if len(text) > _MANIFEST_BYTES:
      raise ValueError(
        f'the description of tree has {len(text)} bytes, at most'
        f' {_MANIFEST_BYTES} are read: save parts of it'
      )
    archive.writestr(_zip_info(_MANIFEST), text)


def load(path: PathLike) -> Any:
  """Reads a tree that `save` wrote.

  Nothing in the file is run, and no more memory is taken than it is long, so a
  file from elsewhere can be tried.

  Returns:
    The tree with jax arrays; 64-bit arrays stay NumPy arrays unless x64 is on.

  Raises:
    FileNotFoundError: if there is no such file.
    DamagedFileError: a ValueError, if the file does not hold what `save` wrote
      or is of another kind, with the leaf and what to do.
    ValueError: if the file is of a newer version.
  """
  path = os.fspath(path)
  # Asked before it is opened, which would wait for the writer of a pipe.
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise DamagedFileError(path, 'it is no regular file', 'name another')
  with open(path, 'rb') as file:
    try:
      version, tree = _read(file)
    except MemoryError:
      raise
    except Exception as error:
      # What zipfile, json and the formats raise for damage has many types.
      raise DamagedFileError(path, str(error), _REMEDY) from error
  if version > VERSION:
    raise ValueError(
      f'path={path!r} has version {version}, and this library reads up to'
      f' {VERSION}: upgrade lowbit_jax'
    )
  return jax.tree.map(_to_jax, tree)


def _describe(x, arrays: list, where: str, depth: int) -> dict:
  if depth > _DEPTH:
    raise TypeError(f'{where} is more than {_DEPTH} levels deep; flatten it')
  if x is None or type(x) in (bool, int, float, str):
    return {'kind': 'value', 'value': x}
  if isinstance(x, QArray):
    return _describe_qarray(x, arrays, where)
  if isinstance(x, Transformed):
    return _describe_transformed(x, arrays, where)
  if isinstance(x, LowRank | Adapter):
    return _describe_low_rank(x, arrays, where)
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    _check_array(x, where)
    node = {'kind': 'array', 'entry': len(arrays), 'dtype': x.dtype.name}
    arrays.append((node, x))
    return node
  if type(x) is dict:
    kinds = {type(key) for key in x}
    if not (kinds <= {str} or kinds <= {int}):
      raise TypeError(
        f'{where} has the keys {list(x)}; keys are all strings or all ints'
      )
    items = {
      str(k): _describe(x[k], arrays, f'{where}[{k!r}]', depth + 1)
      for k in sorted(x)
    }
    return {'kind': 'int_dict' if int in kinds else 'dict', 'items': items}
  if type(x) in (list, tuple):
    items = [
      _describe(v, arrays, f'{where}[{i}]', depth + 1) for i, v in enumerate(x)
    ]
    return {'kind': type(x).__name__, 'items': items}
  raise TypeError(
    f'{where} is a {type(x).__name__}; save takes dicts, lists and tuples of'
    ' arrays, QArrays and scalars (flax: unbox metadata, nnx.to_pure_dict)'
  )


def _describe_qarray(q: QArray, arrays: list, where: str) -> dict:
  leaves = {}
  for name in qarray.LEAVES:
    leaf = getattr(q, name)
    kinds = np.ndarray | jax.Array
    if q.fmt.scale_blocks is not None and name in ('scale', 'minimum'):
      kinds = QArray
    if leaf is not None and not isinstance(leaf, kinds):
      raise TypeError(
        f'{where}.{name} is a {type(leaf).__name__} in place of an array'
      )
    leaves[name] = _describe(leaf, arrays, f'{where}.{name}', 0)
  with _at(where):
    qarray.validate(q)
    fmt = formats.to_dict(q.fmt)
    if formats.from_dict(fmt) != q.fmt:
      raise TypeError(f'{q.fmt!r} is of a class that files do not know')
  _check_dtype(q.dtype, where)
  return {
    'kind': 'qarray',
    'fmt': fmt,
    'axis': q.axis,
    'pad': q.pad,
    'dtype': q.dtype.name,
    'merged': q.merged,
    'leaves': leaves,
  }


def _describe_transformed(t: Transformed, arrays: list, where: str) -> dict:
  with _at(where):
    node, leaves = _transforms.split(t.transform)
  place = f'{where}.transform'
  return {
    'kind': 'transformed',
    'weight': _describe(t.weight, arrays, f'{where}.weight', 0),
    'transform': node,
    'arrays': {
      name: _describe(leaf, arrays, f'{place}.{name}', 0)
      for name, leaf in leaves.items()
    },
    'axis': t.axis,
    'rank': t.rank,
  }


def _describe_low_rank(x: LowRank | Adapter, arrays: list, where: str) -> dict:
  with _at(where):
    if isinstance(x, LowRank):
      LowRank(x.weight, x.a, x.b, x.scale)  # what `load` will make
    for name in ('a', 'b'):
      if not isinstance(getattr(x, name), np.ndarray | jax.Array):
        raise TypeError(f'its {name} is no array')
  leaves = {
    name: _describe(getattr(x, name), arrays, f'{where}.{name}', 0)
    for name in _children(type(x))
  }
  kind = 'low_rank' if isinstance(x, LowRank) else 'adapter'
  return {'kind': kind, 'leaves': leaves, 'scale': float(x.scale)}


def _children(cls: type) -> tuple[str, ...]:
  return ('weight', 'a', 'b') if cls is LowRank else ('a', 'b')


def _check_array(x: Any, where: str) -> None:
  """Raises for an array that `load` could not return."""
  if isinstance(x, Tracer):
    raise TypeError(f'{where} is traced; save outside of jit')
  subclass = type(x) not in (np.ndarray, np.memmap)
  if isinstance(x, np.ndarray) and subclass:
    raise TypeError(f'{where} is a {type(x).__name__}; pass np.asarray of it')
  _check_dtype(x.dtype, where)
  if isinstance(x, jax.Array) and x.is_deleted():
    raise ValueError(f'{where} was deleted, perhaps donated to a jitted call')
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    raise ValueError(f'{where} is spread over several processes; gather it')


def _check_dtype(dtype: Any, where: str) -> None:
  if dtype.name not in _DTYPES:
    raise TypeError(
      f'{where} has dtype {dtype}, which a file cannot hold; convert it'
      ' (PRNG keys: jax.random.key_data)'
    )


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
  """Puts the place in the tree before the messages of errors."""
  try:
    yield
  except (TypeError, ValueError) as error:
    raise type(error)(f'{where}: {error}') from error


def _stored(dtype: np.dtype) -> np.dtype:
  """The dtype of the file: NumPy's own, or unsigned integers of the width."""
  return dtype if dtype.isbuiltin == 1 else np.dtype(f'u{dtype.itemsize}')


def _storable(array: np.ndarray) -> np.ndarray:
  array = np.ascontiguousarray(array).reshape(array.shape)
  if array.dtype.isbuiltin == 2:  # of ml_dtypes
    array = array.view(_stored(array.dtype))
  return array.astype(array.dtype.newbyteorder('<'), copy=False)


def _zip_info(name: str) -> zipfile.ZipInfo:
  """An entry without the traces of a clock or a system: dated 1980."""
  info = zipfile.ZipInfo(name)
  info.create_system = 3
  info.external_attr = 0o644 << 16
  return info


class _Archive(NamedTuple):
  """An open file and those of its entries that were not read yet."""

  file: BufferedReader
  version: int
  entries: dict[str, zipfile.ZipInfo]


def _read(file: BufferedReader) -> tuple[int, Any]:
  """The version and, where this library reads it, the tree of NumPy arrays."""
  try:
    with zipfile.ZipFile(file) as archive:
      infos = archive.infolist()
  except Exception as error:
    raise ValueError(f'it is no whole zip archive ({error})') from error
  entries = {info.filename: info for info in infos}
  if len(entries) < len(infos):
    raise ValueError('it has two entries of one name')
  if _MANIFEST not in entries:
    raise ValueError('it was not written by lowbit_jax.io.save')
  manifest = _manifest(file, entries.pop(_MANIFEST))
  if not isinstance(manifest, dict) or manifest.get('magic') != _MAGIC:
    raise ValueError('it was not written by lowbit_jax.io.save')
  version = _field(manifest, 'version', 'its manifest', int)
  if version > VERSION:
    return version, None
  if sum(info.file_size for info in infos) > os.fstat(file.fileno()).st_size:
    raise ValueError('its entries are longer than itself')
  tree = _field(manifest, 'tree', 'its manifest', dict)
  result = _restore(tree, _Archive(file, version, entries), 'tree', 0)
  if entries:
    raise ValueError(f'nothing in its tree names its entry {min(entries)!r}')
  return version, result


def _manifest(file: BufferedReader, info: zipfile.ZipInfo) -> Any:
  if info.file_size > _MANIFEST_BYTES:
    raise ValueError(f'its manifest is longer than {_MANIFEST_BYTES} bytes')
  _seek(file, info)
  data = file.read(info.file_size)
  if zlib.crc32(data) != info.CRC:
    raise ValueError('its manifest has another checksum than was saved')
  return json.loads(data.decode(), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    raise ValueError('its manifest has an object with two fields of one name')
  return result


def _seek(file: BufferedReader, info: zipfile.ZipInfo) -> None:
  """Moves to the bytes of an entry, after checks that they are all there."""
  name, size = info.filename, info.file_size
  if info.compress_type or info.flag_bits or size != info.compress_size:
    raise ValueError(f'its entry {name!r} is compressed or encrypted')
  file.seek(info.header_offset)
  header = file.read(30)
  signature, *_, name_size, extra_size = struct.unpack('<4s5H3L2H', header)
  if signature != b'PK\3\4' or file.read(name_size) != name.encode():
    raise ValueError(f'its entry {name!r} is not where its directory says')
  if file.seek(extra_size, 1) + size > os.fstat(file.fileno()).st_size:
    raise ValueError(f'its entry {name!r} is cut')


def _field(node: Any, name: str, where: str, *types: type) -> Any:
  """A field of an object of the manifest, of one of the types."""
  if not isinstance(node, dict) or type(node.get(name)) not in types:
    raise ValueError(f'the manifest gives {where} no right field {name!r}')
  return node[name]


def _restore(node: Any, archive: _Archive, where: str, depth: int) -> Any:
  if depth > _DEPTH:
    raise ValueError(f'{where} is more than {_DEPTH} levels deep')
  kind = _field(node, 'kind', where, str)
  if kind == 'value':
    types = (type(None), bool, int, float, str)
    return _field(node, 'value', where, *types)
  if kind == 'array':
    return _array(node, archive, where)
  if kind == 'qarray':
    return _restore_qarray(node, archive, where)
  if kind == 'transformed':
    return _restore_transformed(node, archive, where)
  if kind in ('low_rank', 'adapter'):
    return _restore_low_rank(node, archive, where)
  if kind in ('dict', 'int_dict'):
    items = _field(node, 'items', where, dict)
    keys = list(items) if kind == 'dict' else [int(k) for k in items]
    if [str(key) for key in keys] != list(items):
      raise ValueError(f'the manifest gives {where} keys that are no ints')
    return {
      key: _restore(v, archive, f'{where}[{key!r}]', depth + 1)
      for key, v in zip(keys, items.values(), strict=True)
    }
  if kind in ('list', 'tuple'):
    items = [
      _restore(v, archive, f'{where}[{i}]', depth + 1)
      for i, v in enumerate(_field(node, 'items', where, list))
    ]
    return items if kind == 'list' else tuple(items)
  raise ValueError(f'the manifest gives {where} the unknown {kind=}')


def _restore_qarray(node: dict, archive: _Archive, where: str) -> QArray:
  none = {'kind': 'value', 'value': None}
  leaves = {'minimum': none, **_field(node, 'leaves', where, dict)}
  if leaves.keys() != set(qarray.LEAVES):
    raise ValueError(f'the manifest gives {where} the leaves {list(leaves)}')
  arrays: dict[str, Any] = {
    n: None if leaf == none else _leaf(leaf, archive, f'{where}.{n}')
    for n, leaf in leaves.items()
  }
  axis = _field(node, 'axis', where, int, list)
  merged = []  # Version 1 knew blocks along one axis only.
  if archive.version > 1:
    merged = _field(node, 'merged', where, list)
  with _at(where):
    q = QArray(
      **arrays,
      fmt=formats.from_dict(_field(node, 'fmt', where, dict)),
      axis=tuple(axis) if isinstance(axis, list) else axis,
      pad=tuple(_field(node, 'pad', where, list)),
      dtype=_dtype(node, where),
      merged=tuple(merged),
    )
    return qarray.validate(q)


def _restore_transformed(
  node: dict, archive: _Archive, where: str
) -> Transformed:
  weight = _field(node, 'weight', where, dict)
  q = _restore_qarray(weight, archive, f'{where}.weight')
  leaves = _field(node, 'arrays', where, dict)
  arrays = {
    name: _array(leaf, archive, f'{where}.transform.{name}')
    for name, leaf in leaves.items()
  }
  axis, rank = (_field(node, name, where, int) for name in ('axis', 'rank'))
  with _at(where):
    stacked = q.ndim - rank
    transform = _transforms.joined(node.get('transform'), arrays, stacked)
    return Transformed(q, transform, axis, rank)


def _restore_low_rank(
  node: dict, archive: _Archive, where: str
) -> LowRank | Adapter:
  cls = LowRank if node['kind'] == 'low_rank' else Adapter
  leaves = _field(node, 'leaves', where, dict)
  if leaves.keys() != set(_children(cls)):
    raise ValueError(f'the manifest gives {where} the leaves {list(leaves)}')
  values: dict[str, Any] = {
    name: _array(leaves[name], archive, f'{where}.{name}')
    for name in ('a', 'b')
  }
  if cls is LowRank:
    place = f'{where}.weight'
    values['weight'] = _restore(leaves['weight'], archive, place, _DEPTH)
  with _at(where):
    return cls(**values, scale=_field(node, 'scale', where, float))


def _leaf(node: Any, archive: _Archive, where: str) -> Any:
  """An array, or a QArray of scales that have none below them."""
  if _field(node, 'kind', where, str) == 'array':
    return _array(node, archive, where)
  q = _restore_qarray(node, archive, where)
  if q.fmt.scale_blocks is not None:
    raise ValueError(f'{where} has more than two levels of scales')
  return q


def _dtype(node: dict, where: str) -> np.dtype:
  name = _field(node, 'dtype', where, str)
  if name not in _DTYPES:
    raise ValueError(f'the manifest gives {where} the unknown dtype {name!r}')
  return _DTYPES[name]


def _array(node: dict, archive: _Archive, where: str) -> np.ndarray:
  dtype = _dtype(node, where)
  name = f'{_field(node, "entry", where, int)}.npy'
  info = archive.entries.pop(name, None)
  if info is None:
    raise ValueError(f'{where} has no entry {name!r} for itself')
  _seek(archive.file, info)
  header = archive.file.read(10)
  header += archive.file.read(int.from_bytes(header[8:], 'little'))
  descr, order, shape = _parse_header(header, where)
  stored = _stored(dtype)
  if archive.version == 1 and descr == f'<u{dtype.itemsize}' != stored.str:
    # How version 1 wrote big-endian numbers: as integers of the same bytes.
    stored = dtype.newbyteorder('>')
  elif descr != stored.newbyteorder('<').str:
    raise ValueError(f'{where} is {descr} in place of {dtype}')
  size = info.file_size - len(header)
  if math.prod(shape) * stored.itemsize != size:
    raise ValueError(f'{where} has {size} bytes for the shape {shape}')
  data = np.empty(size, np.uint8)
  read = archive.file.readinto(data.data)
  checksum = zlib.crc32(data.data, zlib.crc32(header))
  saved = info.CRC
  if archive.version > 1:
    saved = _field(node, 'crc32', where, int)
  if read != size or not checksum == info.CRC == saved:
    raise ValueError(f'{where} has another checksum than was saved')
  array = data.view(stored).reshape(shape, order=order)
  return array.astype(_stored(dtype), copy=False).view(dtype)


def _parse_header(
  header: bytes, where: str
) -> tuple[str, Literal['C', 'F'], tuple[int, ...]]:
  """Element type, order and shape of an array, as NumPy writes them."""
  match = _HEADER.fullmatch(header[10:].decode('latin-1'))
  if header[:8] != _MAGIC_NPY or match is None:
    raise ValueError(f'{where} has a header that NumPy does not write')
  descr, fortran, text = match.groups()
  shape = tuple(int(n) for n in text[1:-1].split(',') if n.strip())
  if text != repr(shape):
    raise ValueError(f'{where} has the shape {text}')
  return descr, 'F' if fortran == 'True' else 'C', shape


def _to_jax(leaf: Any) -> Any:
  if not isinstance(leaf, np.ndarray):
    return leaf
  if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
    return leaf
  return jnp.asarray(leaf)


def _library_version() -> str:
  try:
    return metadata.version('lowbit-jax')
  except metadata.PackageNotFoundError:
    return 'source checkout'
