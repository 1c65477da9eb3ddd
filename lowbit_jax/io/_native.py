"""The file format of this library: trees of arrays and QArrays in one file.

A file is a zip archive with `manifest.json` and one `.npy` entry per array. The
manifest describes the tree and, for each QArray, the whole format, axis,
padding and dtype, so a file can be read without knowing the format by name; a
bare restore of the leaves would lose it. Types that NumPy files do not know
(bfloat16, float8, ...) are stored as unsigned integers of their width.
"""

import io
import json
import os
import zipfile
from importlib import metadata
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowbit_jax import _files, formats, qarray
from lowbit_jax._typing import PathLike, PyTree
from lowbit_jax.qarray import QArray

VERSION = 1
_MAGIC = 'lowbit_jax tree'


def save(path: PathLike, tree: PyTree, *, overwrite: bool = False) -> None:
  """Writes a tree to a file, atomically.

  Args:
    path: file to write; its directory must exist.
    tree: nested dicts with string keys, lists and tuples of arrays, QArrays,
      Python scalars, strings and None.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if the file exists and `overwrite` is False.
    TypeError: for a node or leaf of another kind, with its place in the tree.
  """
  path = os.fspath(path)
  if os.path.exists(path) and not overwrite:
    raise FileExistsError(
      f'path={path!r} exists; pass overwrite=True or choose another name'
    )
  entries: list[np.ndarray] = []
  node = _describe(tree, entries, 'tree')
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
    archive.writestr('manifest.json', json.dumps(manifest, indent=1))
    for i, array in enumerate(entries):
      with archive.open(f'{i}.npy', 'w', force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def load(path: PathLike) -> Any:
  """Reads a tree that `save` wrote.

  Returns:
    The tree with jax arrays; 64-bit arrays stay NumPy arrays unless x64 is on.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged, of another kind, or of a newer version.
  """
  path = os.fspath(path)
  try:
    with zipfile.ZipFile(path) as archive:
      manifest = json.loads(archive.read('manifest.json'))
      if manifest.get('magic') != _MAGIC:
        raise ValueError('it is not a lowbit_jax file')
      if manifest['version'] > VERSION:
        raise ValueError(
          f'it has version {manifest["version"]}, and this library reads up to'
          f' {VERSION}: upgrade lowbit_jax'
        )
      return _restore(manifest['tree'], archive)
  except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
    raise ValueError(f'cannot load path={path!r}: {error}') from error


def _describe(x, entries: list, where: str) -> dict:
  if x is None or isinstance(x, bool | int | float | str):
    return {'kind': 'value', 'value': x}
  if isinstance(x, QArray):
    leaves = {
      name: _describe(getattr(x, name), entries, f'{where}.{name}')
      for name in qarray.LEAVES
    }
    return {
      'kind': 'qarray',
      'fmt': formats.to_dict(x.fmt),
      'axis': x.axis,
      'pad': x.pad,
      'dtype': x.dtype.name,
      'leaves': leaves,
    }
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    array = np.asarray(x)
    entries.append(_storable(array))
    return {
      'kind': 'array',
      'entry': len(entries) - 1,
      'dtype': array.dtype.name,
    }
  if isinstance(x, dict):
    if bad := [k for k in x if not isinstance(k, str)]:
      raise TypeError(f'{where} has the key {bad[0]!r}; keys are strings')
    items = {k: _describe(v, entries, f'{where}[{k!r}]') for k, v in x.items()}
    return {'kind': 'dict', 'items': items}
  if type(x) in (list, tuple):
    items = [_describe(v, entries, f'{where}[{i}]') for i, v in enumerate(x)]
    return {'kind': type(x).__name__, 'items': items}
  raise TypeError(
    f'{where} is a {type(x).__name__}; save takes dicts, lists and tuples of'
    ' arrays, QArrays and scalars (flax: unbox metadata, nnx.to_pure_dict)'
  )


def _restore(node: dict, archive: zipfile.ZipFile):
  kind = node['kind']
  if kind == 'value':
    return node['value']
  if kind == 'array':
    return _array(node, archive)
  if kind == 'qarray':
    axis = node['axis']
    q = QArray(
      **{n: _restore(leaf, archive) for n, leaf in node['leaves'].items()},
      fmt=formats.from_dict(node['fmt']),
      axis=tuple(axis) if isinstance(axis, list) else axis,
      pad=tuple(node['pad']),
      dtype=np.dtype(_dtype(node['dtype'])),
    )
    return qarray.validate(q)
  if kind == 'dict':
    return {k: _restore(v, archive) for k, v in node['items'].items()}
  if kind in ('list', 'tuple'):
    items = [_restore(v, archive) for v in node['items']]
    return items if kind == 'list' else tuple(items)
  raise ValueError(f'unknown node kind {kind!r}')


def _array(node: dict, archive: zipfile.ZipFile):
  data = io.BytesIO(archive.read(f'{node["entry"]}.npy'))
  array = np.lib.format.read_array(data, allow_pickle=False)
  dtype = _dtype(node['dtype'])
  array = array if array.dtype == dtype else array.view(dtype)
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    return array
  return jnp.asarray(array)


def _storable(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind in 'biufc' and array.dtype.isbuiltin == 1:
    return np.ascontiguousarray(array).reshape(array.shape)
  return array.view(f'u{array.dtype.itemsize}')


def _dtype(name: str) -> np.dtype:
  return np.dtype(getattr(ml_dtypes, name, name))


def _library_version() -> str:
  try:
    return metadata.version('lowbit-jax')
  except metadata.PackageNotFoundError:
    return 'source checkout'


def _serialize_static(static) -> bytes:
  fmt, axis, pad, dtype = static
  description = [formats.to_dict(fmt), axis, pad, np.dtype(dtype).name]
  return json.dumps(description).encode()


def _deserialize_static(data: bytes):
  fmt, axis, pad, dtype = json.loads(data)
  axis = tuple(axis) if isinstance(axis, list) else axis
  return formats.from_dict(fmt), axis, tuple(pad), np.dtype(_dtype(dtype))


jax.export.register_pytree_node_serialization(
  QArray,
  serialized_name='lowbit_jax.QArray',
  serialize_auxdata=_serialize_static,
  deserialize_auxdata=_deserialize_static,
)
