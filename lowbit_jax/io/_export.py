"""Folders in the layouts of compressed-tensors: what other programs serve.

The layout of a weight follows from its format, and the configuration names
every quantized module, so that nothing else is taken for quantized.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lowbit_jax import _files, formats, qarray
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax.formats import BlockFormat, ElementFormat, IntFormat
from lowbit_jax.io import (
  _bits,
  _compressed_tensors,
  _container,
  _layouts,
  _qarrays,
)
from lowbit_jax.qarray import QArray
from lowbit_jax.transforms import Permutation

# Ends of the names of files that hold weights, or say how they are quantized.
_WEIGHTS = (
  *('.safetensors', '.index.json', '.bin', '.pt', '.pth', '.gguf', '.onnx'),
  *('.h5', '.msgpack', '.ckpt', 'quant_config.json', 'quantize_config.json'),
)
_MICROSCALING: dict[ElementFormat, tuple[str, str]] = {
  formats.e2m1: ('mxfp4-pack-quantized', 'weight_packed'),
  formats.e2m3: ('mxfp6-pack-quantized', 'weight_packed'),
  formats.e4m3fn: ('mxfp8-quantized', 'weight'),
}
# Elements whose layouts hold no stacks.
_SINGLE = (formats.e2m1, formats.e2m3)


class _Weight(NamedTuple):
  """A weight as compressed-tensors has it.

  Attributes:
    layout: its name.
    settings: what the configuration says of its group.
    parts: its tensors by the ends of their names.
  """

  layout: str
  settings: dict[str, Any]
  parts: dict[str, np.ndarray]


def write(
  folder: str,
  tensors: Mapping[str, Any],
  source: str | None,
  shard_bytes: int,
) -> None:
  """Writes a folder that appears complete or not at all.

  Args:
    folder: that does not exist yet.
    tensors: arrays and QArrays by name.
    source: folder of which other files are copied, or None.
    shard_bytes: after which another file begins.
  """
  with _files.building(folder) as partial:
    config = _copied(source, partial)
    shards, groups = _shards(partial, tensors, shard_bytes)
    if groups:
      config['quantization_config'] = _settings(groups)
    if config:
      _put(partial, 'config.json', config)
    _name_shards(partial, shards)


def _copied(source: str | None, folder: str) -> dict[str, Any]:
  """Copies files that hold no weights of the model, and its other modules;
  gives the configuration, without what it says of a quantization."""
  if source is None:
    return {}
  config: dict[str, Any] = {}
  for file in sorted(pathlib.Path(source).iterdir()):
    if file.name == 'config.json':
      config = _container.parse(file.read_bytes())
    elif file.is_file() and not file.name.endswith(_WEIGHTS):
      shutil.copyfile(file, os.path.join(folder, file.name))
  for name in _modules(source):
    shutil.copytree(os.path.join(source, name), os.path.join(folder, name))
  for name in ('quantization_config', 'compression_config', 'quantization'):
    config.pop(name, None)
  return config


def _modules(source: str) -> list[str]:
  """Folders in a folder of sentence-transformers that hold its other modules,
  such as what pools states."""
  path = pathlib.Path(source, 'modules.json')
  if not path.is_file():
    return []
  modules = json.loads(path.read_bytes())
  if not isinstance(modules, list) or not all(
    isinstance(module, dict) for module in modules
  ):
    raise ValueError(f'{str(path)!r} is no list of modules; download it again')
  names = dict.fromkeys(str(module.get('path', '')) for module in modules)
  return [
    name
    for name in names
    if re.fullmatch(r'\w+', name) and os.path.isdir(os.path.join(source, name))
  ]


def _shards(
  folder: str, tensors: Mapping[str, Any], shard_bytes: int
) -> tuple[list[dict[str, int]], list[dict[str, Any]]]:
  """Writes numbered files; gives their tensors with bytes, and the groups."""
  shards: list[dict[str, int]] = []
  groups: dict[str, dict[str, Any]] = {}
  held: dict[str, np.ndarray] = {}
  seen: set[str] = set()
  for name in tensors:
    value = tensors[name]
    if is_quantized(value):
      module = name.removesuffix('weight').removesuffix('.')
      weight = _weight(name, value)
      key = json.dumps([weight.layout, weight.settings])
      group = {'targets': [], 'weights': weight.settings}
      group |= {'input_activations': None, 'output_activations': None}
      group['format'] = weight.layout
      groups.setdefault(key, group)['targets'].append(module)
      prefix = name.removesuffix('weight')
      found = {prefix + end: part for end, part in weight.parts.items()}
    else:
      found = {name: _qarrays.as_array(name, value)}
    if twice := found.keys() & seen:
      raise ValueError(f'{min(twice)!r} stands for two tensors')
    seen |= found.keys()
    for part, array in found.items():
      _container.check_writable(part, array)
    held |= found
    if sum(array.nbytes for array in held.values()) >= shard_bytes:
      shards.append(_shard(folder, len(shards), held))
      held = {}
  if held or not shards:
    shards.append(_shard(folder, len(shards), held))
  return shards, list(groups.values())


def _shard(folder: str, k: int, held: dict[str, np.ndarray]) -> dict[str, int]:
  with pathlib.Path(folder, str(k)).open('wb') as file:
    _container.write(file, held, {'format': 'pt'})
  return {name: array.nbytes for name, array in held.items()}


def _name_shards(folder: str, shards: list[dict[str, int]]) -> None:
  """Gives numbered files their names, and says what is where."""
  if len(shards) == 1:
    os.rename(
      os.path.join(folder, '0'), os.path.join(folder, 'model.safetensors')
    )
    return
  index = {}
  for k, shard in enumerate(shards):
    name = f'model-{k + 1:05}-of-{len(shards):05}.safetensors'
    os.rename(os.path.join(folder, str(k)), os.path.join(folder, name))
    index |= dict.fromkeys(shard, name)
  total = sum(sum(shard.values()) for shard in shards)
  _put(
    folder,
    'model.safetensors.index.json',
    {'metadata': {'total_size': total}, 'weight_map': index},
  )


def _put(folder: str, name: str, node: dict[str, Any]) -> None:
  text = json.dumps(node, indent=2, ensure_ascii=False) + '\n'
  pathlib.Path(folder, name).write_text(text, 'utf-8')


def _settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
  layouts = {group['format'] for group in groups}
  return {
    'quant_method': 'compressed-tensors',
    'format': 'mixed-precision' if len(layouts) > 1 else min(layouts),
    'quantization_status': 'compressed',
    'config_groups': {f'group_{k}': group for k, group in enumerate(groups)},
    'ignore': [],
    'kv_cache_scheme': None,
    'global_compression_ratio': None,
  }


def _weight(name: str, weight: QArray | Transformed) -> _Weight:
  """A weight in the layout that its format has."""
  if isinstance(weight, QArray):
    return _plain(name, weight)
  t, q = weight, weight.weight
  if not isinstance(t.transform, Permutation) or t.axis != -1 or t.stacked:
    raise ValueError(
      f'{name!r} is {t!r}; compressed-tensors knows no transform but an order'
      ' of the inputs of (outputs, inputs): pass dequantize(w), or its mT'
    )
  # Codes go back to their places, where those beyond the row stay.
  own: Any = np.asarray(t.transform.order)
  order = np.asarray(Permutation(own).order)  # checked
  bits, codes = q.fmt.element.bits, np.asarray(q.codes)
  places = np.arange(codes.shape[-1] * 8 // bits)
  places[: order.size] = np.argsort(order)
  codes = _layouts.reordered(codes, bits, places)
  plain = _plain(name, qarray.replace(q, codes=codes))
  if (plain.layout, plain.settings['strategy']) != ('pack-quantized', 'group'):
    raise ValueError(
      f'{name!r} is {q.fmt} with its inputs in another order, which'
      ' compressed-tensors knows for integers in groups alone'
    )
  groups = np.empty(order.size, np.int32)
  groups[order] = np.arange(order.size) // q.fmt.block[0]
  return plain._replace(
    settings={**plain.settings, 'actorder': 'group'},
    parts={**plain.parts, 'weight_g_idx': groups},
  )


def _plain(name: str, q: QArray) -> _Weight:
  """A QArray in the layout that its format has."""
  fmt, ndim = q.fmt, q.ndim
  qarray.validate(q)
  if name != 'weight' and not name.endswith('.weight'):
    raise ValueError(
      f'{name!r} is quantized; it must be the weight of a module'
    )
  lasts = (-1,) if len(q.axes) == 1 else (-2, -1)
  if ndim < 2 or q.axes != lasts or q.merged:
    raise ValueError(
      f'{name!r} has its blocks along {q.axis}; they must lie along the inputs'
      ' of (outputs, inputs): pass its mT'
    )
  make = _maker(fmt)
  if make is None:
    raise ValueError(
      f'{name!r} is {fmt}, for which compressed-tensors has no layout; it has'
      ' them for nvfp4, mxfp4, mxfp6_e2m3 and mxfp8_e4m3, for integers of 2 to'
      ' 8 bits and e4m3fn in groups, in channels and in one tensor, and for'
      ' tiles of e4m3fn'
    )
  _check_shape(name, q)
  return make(name, q)


def _maker(fmt: BlockFormat) -> Callable[[str, QArray], _Weight] | None:
  """What brings weights of a format into its layout, if there is one."""
  scale = fmt.scale
  one_level = not fmt.tensor_scale and fmt.scale_blocks is None
  if scale == formats.e8m0 and fmt.block == (32,):
    if fmt.element in _MICROSCALING and not fmt.tensor_scale:
      return _microscaling
  elif (fmt.element, fmt.block, scale, fmt.tensor_scale) == (
    *(formats.e2m1, (16,), formats.e4m3fn, True),
  ):
    return _nvfp4
  elif scale is None or (scale.bits > 8 and one_level):
    if fmt.element == formats.e4m3fn:
      return _float
    if _is_packable(fmt):
      return _packed
  return None


def _check_shape(name: str, q: QArray) -> None:
  """Refuses what compressed-tensors does not decompress."""
  fmt = q.fmt
  has_many_scales = q.tensor_scale is not None and q.tensor_scale.size > 1
  if q.ndim > 2 and (has_many_scales or fmt.is_tile or fmt.element in _SINGLE):
    raise ValueError(f'{name!r} is a stack of tensors; pass its members')
  size = 0 if fmt.is_tile else fmt.block[0]
  if size and q.shape[-1] % size:
    raise ValueError(
      f'{name!r} has rows of {q.shape[-1]}, no whole blocks of {size}; give'
      ' each row one scale (formats.per_channel), or leave it dense'
    )


def _is_packable(fmt: BlockFormat) -> bool:
  element = fmt.element
  return (
    isinstance(element, IntFormat)
    and not fmt.is_tile
    and element.fraction_bits == 0
    and element.bits > 1
    and element.signed != fmt.zero_point
  )


def _arguments(fmt: BlockFormat, kind: str) -> dict[str, Any]:
  """What the configuration says of a format."""
  sizes: dict[str, Any] = {'group_size': None, 'strategy': 'tensor'}
  if fmt.is_tile:
    sizes |= {'strategy': 'block', 'block_structure': list(fmt.block)}
  elif fmt.scale is not None:
    size = fmt.block[0]
    sizes['strategy'] = 'group' if size else 'channel'
    sizes['group_size'] = size or None
  return {
    'num_bits': fmt.element.bits,
    'type': kind,
    'symmetric': not fmt.zero_point,
    **sizes,
    'dynamic': False,
  }


def _scales(q: QArray) -> np.ndarray:
  if q.fmt.scale is None:
    return np.asarray(q.tensor_scale).reshape(1)
  return np.asarray(q.scale)


def _microscaling(name: str, q: QArray) -> _Weight:
  del name
  layout, role = _MICROSCALING[q.fmt.element]
  codes = np.asarray(q.codes)
  if role == 'weight':
    codes = codes.view(_container.dtype('F8_E4M3'))
  settings = _arguments(q.fmt, 'float') | {'scale_dtype': 'torch.uint8'}
  parts = {role: codes, 'weight_scale': np.asarray(q.scale)}
  return _Weight(layout, settings, parts)


def _nvfp4(name: str, q: QArray) -> _Weight:
  settings = _arguments(q.fmt, 'float') | {
    'strategy': 'tensor_group',
    'scale_dtype': 'torch.float8_e4m3fn',
  }
  scale = np.asarray(q.scale).view(_container.dtype('F8_E4M3'))
  parts = {
    'weight_packed': np.asarray(q.codes),
    'weight_scale': scale,
    'weight_global_scale': _divisor(
      name, np.asarray(q.tensor_scale).reshape(1)
    ),
  }
  return _Weight('nvfp4-pack-quantized', settings, parts)


def _divisor(name: str, factor: np.ndarray) -> np.ndarray:
  """The float32 number whose reciprocal is `factor`, or is nearest to it."""
  with np.errstate(all='ignore'):
    near = 1 / factor
  if not 0 < near[0] < np.inf:
    raise ValueError(f'{name!r} has the tensor scale {factor[0]}')
  candidates = [near, np.nextafter(near, 0), np.nextafter(near, np.inf)]
  return min(candidates, key=lambda n: abs(float(1 / n[0]) - float(factor[0])))


def _float(name: str, q: QArray) -> _Weight:
  del name
  codes = np.asarray(q.codes)[..., : q.shape[-2], : q.shape[-1]]
  parts = {
    'weight': codes.view(_container.dtype('F8_E4M3')),
    'weight_scale': _scales(q),
  }
  return _Weight('float-quantized', _arguments(q.fmt, 'float'), parts)


def _packed(name: str, q: QArray) -> _Weight:
  bits, size = q.fmt.element.bits, q.shape[-1]
  if _compressed_tensors.is_ambiguous(size, bits):
    raise ValueError(
      f'{name!r} has rows of {size} numbers of {bits} bits, of which readers'
      ' cannot tell in which of two ways they are packed'
    )
  data = np.asarray(q.codes)
  if not q.fmt.zero_point:
    data = data ^ _compressed_tensors.sign_bits(bits, data.shape[-1])
  parts = {
    'weight_packed': _words(_bits.unpack(data, bits)[..., :size], bits),
    'weight_scale': _scales(q),
    'weight_shape': np.array(q.shape),
  }
  if q.fmt.zero_point:
    zeros = np.asarray(q.zero_point).swapaxes(-1, -2)
    words = _words(np.ascontiguousarray(zeros), bits).swapaxes(-1, -2)
    parts['weight_zero_point'] = np.ascontiguousarray(words)
  return _Weight('pack-quantized', _arguments(q.fmt, 'int'), parts)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
  """Codes along the last axis in words of 32 bits, from one to the next."""
  data = _bits.pack(codes, bits)
  filled = [(0, 0)] * (data.ndim - 1) + [(0, -data.shape[-1] % 4)]
  return np.ascontiguousarray(np.pad(data, filled)).view(np.int32)
