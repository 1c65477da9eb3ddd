"""Safetensors files and folders, and the quantized layouts that they hold.

- `export`: Writes a folder as programs that serve models read it.
- `open`: Opens a file, or a folder as it is published with a model.
- `save`: Writes arrays to a file, atomically.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit_jax import _files
from lowbit_jax._files import DamagedFileError
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._typing import ArrayLike, PathLike
from lowbit_jax.io import _container, _export, _folding, _qarrays
from lowbit_jax.io._checkpoint import Checkpoint
from lowbit_jax.qarray import QArray

_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_SHARD = re.compile(r'[\w-][\w.-]*\.safetensors', re.ASCII)
_JSON_BYTES = 2**27
_REMEDY = 'fetch it again, or convert the model again'


def open(path: PathLike) -> Checkpoint:
  """Opens a file, or a folder as it is published with a model.

  Weights in a quantized layout become QArrays without a detour through floats:
  one entry under the name of the weight, of shape (..., outputs, inputs), into
  which its scales and zero points are folded. Scales of activations and caches
  stay entries of their own, and other tensors are arrays of their dtype. How
  weights are quantized says config.json or hf_quant_config.json in the folder
  of the files. Nothing is read before it is asked for, and bytes that can be
  used as they are stay in the file.

  Args:
    path: a file, or a folder with model.safetensors.index.json, with
      model.safetensors, or with one file of another name.

  Returns:
    The checkpoint; its metadata are the strings in the headers of the files.

  Raises:
    FileNotFoundError: if there is no such file.
    DamagedFileError: a ValueError, if a file is not whole.
    ValueError: for a tensor in a quantized layout that is not known, by name.
      Reading a tensor raises it too, where its numbers are not as the layout
      wants them.
  """
  path = os.fspath(path)
  is_folder = os.path.isdir(path)
  folder = path if is_folder else os.path.dirname(path)
  files = _files_of(path) if is_folder else [_container.File(path)]
  stored = {
    name: tensor for file in files for name, tensor in file.tensors.items()
  }
  metadata: dict[str, Any] = {}
  for file in reversed(files):
    metadata.update(file.metadata)

  def release() -> None:
    for file in files:
      file.close()

  try:
    own = dict(_qarrays.tensors(stored, metadata.pop(_qarrays.KEY, None)))
  except ValueError as error:
    raise ValueError(f'{path!r}, {error}') from error
  own = {name: _folding.located(own[name], path, name) for name in own}
  tensors = _folding.tensors(stored, _settings(folder), path)
  if twice := own.keys() & tensors.keys():
    raise ValueError(f'{path!r}, {min(twice)!r}: it is there twice')
  tensors = own | tensors
  return Checkpoint(path, tensors, metadata, release)


def save(
  path: PathLike,
  tensors: Mapping[str, ArrayLike | QArray | Transformed],
  metadata: Mapping[str, str] | None = None,
  *,
  overwrite: bool = False,
) -> None:
  """Writes arrays and QArrays to a file, atomically.

  For arrays the bytes are those that the reference implementation writes.
  Elements of 4 and 6 bits are packed. QArrays of every format, also behind a
  transform, are written in a layout that this library alone reads: their leaves
  are tensors, and the metadata says of which format, see
  docs/howto/read_safetensors.md. For other programs there is `export`.

  Args:
    path: file to write; its directory must exist.
    tensors: arrays of any shape and QArrays by name.
    metadata: strings by name, or None.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if the file exists and `overwrite` is False.
    OSError: if the file cannot be written, with its name and the reason.
    TypeError: for names that are no strings, and dtypes that the files do not
      have.
    ValueError: for elements that fill no whole bytes, QArrays that are not
      whole, and names that are taken twice.
  """
  path = os.fspath(path)
  if os.path.exists(path) and not overwrite:
    raise FileExistsError(
      f'path={path!r} exists; pass overwrite=True or choose another name'
    )
  arrays, descriptions = {}, {}
  for name, value in tensors.items():
    parts = [(name, value)]
    if is_quantized(value):
      descriptions[name] = _described(name, value)
      parts = list(_qarrays.arrays(name, value))
    for part, array in parts:
      if part in arrays or (part in tensors and part != name):
        raise ValueError(f'{part!r} stands for two tensors')
      arrays[part] = _array(part, array)
  metadata = {**(metadata or {}), **_qarrays.encoded(descriptions)}
  if not all(isinstance(v, str) for v in (*metadata, *metadata.values())):
    raise TypeError(f'metadata={metadata!r:.200} must map strings to strings')
  with _files.replacing(path) as file:
    _container.write(file, arrays, metadata)


def export(
  path: PathLike,
  tensors: Mapping[str, ArrayLike | QArray | Transformed],
  source: PathLike | None = None,
  *,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a folder as programs that serve models read it.

  QArrays are written in the layouts of compressed-tensors, in which `open`
  gives them back as they are, and the configuration names their modules. The
  folder appears complete or not at all; what an export that was killed left
  beside it, the next one deletes.

  Args:
    path: folder to write, which does not exist yet.
    tensors: arrays and QArrays by name, such as a checkpoint that `open` gave,
      read one after the other. A QArray is the weight of a module, named
      '....weight', of shape (..., outputs, inputs), with its blocks along the
      inputs. The tensor scale of NVFP4 is written as its reciprocal, which may
      differ in the last place.
    source: folder whose config.json is kept and whose other files are copied,
      except for weights, with the folders that its modules.json names; or None.
    shard_bytes: a file that has so many bytes is followed by another.

  Raises:
    FileExistsError: if there is something of that name.
    TypeError: for dtypes that the files do not have.
    ValueError: for a QArray that compressed-tensors has no layout for, or whose
      shape it does not decompress: rows that are no whole blocks, and stacks of
      4-bit and 6-bit floats and of tiles.
  """
  path = os.fspath(path)
  if os.path.lexists(path):
    raise FileExistsError(f'path={path!r} exists; choose another name')
  folder = None if source is None else os.fspath(source)
  _export.write(path, tensors, folder, shard_bytes)


def _described(name: str, value: QArray | Transformed) -> dict[str, Any]:
  try:
    return _qarrays.description(value)
  except (TypeError, ValueError) as error:
    error.add_note(f'This is the tensor {name!r}.')
    raise


def _array(name: object, value: object) -> np.ndarray:
  array = _qarrays.as_array(name, value)
  _container.check_writable(name, array)
  return array.astype(array.dtype.newbyteorder('='), copy=False)


def _files_of(folder: str) -> list[_container.File]:
  """The files of a folder, each of which has what the index says."""
  index = os.path.join(folder, _INDEX)
  single = os.path.join(folder, _SINGLE)
  if not os.path.exists(index):
    path = single if os.path.exists(single) else _only(folder)
    return [_container.File(path)]
  if os.path.exists(single):
    raise ValueError(
      f'{folder!r} has both {_SINGLE} and {_INDEX}; remove the one that is not'
      ' wanted'
    )
  homes: dict[str, set[str]] = {}
  for name, home in _index(index).items():
    homes.setdefault(home, set()).add(name)
  files = [
    _container.File(os.path.join(folder, home)) for home in sorted(homes)
  ]
  for home, file in zip(sorted(homes), files, strict=True):
    if odd := homes[home] ^ file.tensors.keys():
      where = 'misses' if min(odd) in homes[home] else 'has'
      raise DamagedFileError(
        file.path,
        f'it {where} the tensor {min(odd)!r:.200}, other than {_INDEX} says',
        _REMEDY,
      )
  return files


def _only(folder: str) -> str:
  names = sorted(n for n in os.listdir(folder) if n.endswith('.safetensors'))
  if not names:
    raise FileNotFoundError(f'{folder!r} has no file *.safetensors')
  if len(names) > 1:
    raise ValueError(
      f'{folder!r} has {len(names)} files, such as {names[0]!r}, and no'
      f' {_INDEX}; name the one to open'
    )
  return os.path.join(folder, names[0])


def _index(path: str) -> dict[str, str]:
  """The file of each tensor."""
  names = _json(path).get('weight_map')
  if not isinstance(names, dict) or not names:
    raise DamagedFileError(path, 'it has no weight_map', _REMEDY)
  for name, home in names.items():
    if not isinstance(home, str) or not _SHARD.fullmatch(home):
      raise DamagedFileError(
        path,
        f'{name!r:.200} is in {home!r:.200}, which is no plain file name',
        _REMEDY,
      )
  return names


def _settings(folder: str) -> dict[str, Any] | None:
  """The configuration of the quantization beside the files, if any."""
  config = os.path.join(folder, 'config.json')
  if os.path.exists(config):
    node = _json(config)
    for name in ('quantization_config', 'compression_config', 'quantization'):
      if node.get(name) is not None:
        return _object(config, name, node[name])
  config = os.path.join(folder, 'hf_quant_config.json')
  if os.path.exists(config):
    node = _json(config).get('quantization')
    return {'quant_method': 'modelopt', **_object(config, 'quantization', node)}
  return None


def _object(path: str, name: str, node: Any) -> dict[str, Any]:
  if not isinstance(node, dict):
    raise DamagedFileError(path, f'its {name} is no object', _REMEDY)
  return node


def _json(path: str) -> dict[str, Any]:
  """The JSON object in a file."""
  if not os.path.isfile(path) or os.path.getsize(path) > _JSON_BYTES:
    raise DamagedFileError(
      path, f'it is no file of at most {_JSON_BYTES} bytes', 'name another'
    )
  try:
    node = _container.parse(pathlib.Path(path).read_bytes())
  except ValueError as error:
    raise DamagedFileError(path, str(error), _REMEDY) from error
  return _object(path, 'content', node)
