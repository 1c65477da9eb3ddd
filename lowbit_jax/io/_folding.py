"""From tensors as they lie in files to one entry for each weight."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from lowbit_jax._files import DamagedFileError
from lowbit_jax.io import (
  _bitsandbytes,
  _compressed_tensors,
  _whole_bytes,
  _words,
)
from lowbit_jax.io._checkpoint import Leaf, Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.io._layouts import Layout, Parts, field

Settings = Mapping[str, Any] | None

_BITSANDBYTES = _bitsandbytes.NF4, _bitsandbytes.FP4
_METHODS = {
  'compressed-tensors': (_compressed_tensors.LAYOUT,),
  'gptq': (_words.GPTQ,),
  'awq': (_words.AWQ,),
  'modelopt': (_whole_bytes.MODELOPT,),
  'fp8': (_whole_bytes.FP8_TILES, _whole_bytes.FP8),
  'fbgemm_fp8': (_whole_bytes.FBGEMM,),
  'mxfp4': (_whole_bytes.GPT_OSS,),
  'bitsandbytes': (*_BITSANDBYTES, _bitsandbytes.INT8),
}
_WITHOUT_SETTINGS = _BITSANDBYTES  # say all in their tensors

# Ends of names that only parts of quantized weights have, and pairs of ends:
# the first is a part where the second is there too.
_PARTS = (
  *('weight_packed', 'weight_scale', 'weight_scale_inv', 'weight_scale_2'),
  *('weight_global_scale', 'weight_zero_point', 'weight_shape'),
  *('weight_g_idx', 'pre_quant_scale', 'qweight', 'qzeros', 'g_idx'),
  *('.absmax', '.quant_map', '.nested_absmax', '.nested_quant_map', '.SCB'),
  *('_weight_qdata', '.W_q', '.q_weight', '.Qidxs', '.trellis', '.codebooks'),
  *('.weight._data', '.weight._scale', '.scale_weight', 'scaled_fp8'),
)
_PAIRS = {
  '_scale': ('', '_packed'),
  '_scales': ('', '_blocks'),
  '_scale_inv': ('',),
  '_zero_point': ('',),
  '.scale': ('', '.weight'),
  '.scales': ('', '.weight', '.blocks'),
}
# What a quantized model may hold beside its weights, as masks and positions.
_DENSE = ('F64', 'F32', 'F16', 'BF16', 'C64', 'I64', 'BOOL')


def tensors(
  stored: Mapping[str, Stored], settings: Settings, path: str
) -> dict[str, Tensor]:
  """One entry for each weight, its parts folded in; others as they are.

  Args:
    stored: the tensors of all files, by name.
    settings: the configuration of the quantization, None if there is none.
    path: of the file or folder, for errors.

  Raises:
    ValueError: for a tensor of a layout that is not known, by name.
  """
  result: dict[str, Tensor] = {}
  parts_of: dict[str, set[str]] = {}
  for layout in _layouts(settings, path):
    for marker in (n for n in stored if n.endswith(layout.marker)):
      prefix = marker.removesuffix(layout.marker)
      if layout.weight and not (prefix == '' or prefix.endswith('.')):
        continue
      name = prefix + layout.weight
      with _at(path, name):
        ends = {layout.marker, *layout.roles}
        parts = Parts(
          {end: stored[prefix + end] for end in ends if prefix + end in stored}
        )
        names = {part.name for part in parts.values()}
        if name in result or (name in stored and name not in names):
          raise ValueError('two layouts claim this name')
        result[name] = located(
          layout.plan(prefix.removesuffix('.'), parts, settings), path, name
        )
      parts_of[name] = names
  folded = set().union(*parts_of.values())
  for name in stored.keys() - folded:
    with _at(path, name):
      result[name] = located(_dense(stored, name, settings), path, name)
  order = {name: k for k, name in enumerate(stored)}
  first = {n: min(map(order.__getitem__, parts_of.get(n, {n}))) for n in result}
  return dict(sorted(result.items(), key=lambda item: first[item[0]]))


def _layouts(settings: Settings, path: str) -> tuple[Layout, ...]:
  if settings is None:
    return _WITHOUT_SETTINGS
  with _at(path, 'its configuration'):
    method = field(settings, 'quant_method', str)
    if method not in _METHODS:
      raise ValueError(
        f'quant_method={method!r:.80} is not read; known are'
        f' {", ".join(_METHODS)}'
      )
  return _METHODS[method]


def _dense(
  stored: Mapping[str, Stored], name: str, settings: Settings
) -> Tensor:
  """A tensor that is served as it is, unless it belongs to another one."""
  part = stored[name]
  known = (
    'its folder has no config.json that says how it is quantized'
    if settings is None
    else 'the layout of the configuration has no place for it'
  )
  for end, others in _PAIRS.items():
    base = name.removesuffix(end)
    if base != name and any(base + other in stored for other in others):
      raise ValueError(f'it is part of a quantized weight, but {known}')
  if name.endswith(_PARTS) or '.quant_state.' in name:
    raise ValueError(f'it is part of a quantized weight, but {known}')
  if settings is not None and part.dtype not in _DENSE:
    if len(part.shape) > 1 or name.endswith('weight'):
      raise ValueError(f'it is quantized ({part.dtype}), but {known}')
  return Tensor(part.dtype, part.shape, part.nbytes, None, part.read)


def located(tensor: Tensor, path: str, name: str) -> Tensor:
  """`tensor`, whose errors name file and tensor."""

  def read() -> Leaf:
    with _at(path, name):
      return tensor.read()

  return tensor._replace(read=read)


@contextlib.contextmanager
def _at(path: str, name: str) -> Iterator[None]:
  """Puts file and tensor before the messages of errors."""
  try:
    yield
  except DamagedFileError:
    raise
  except ValueError as error:
    raise ValueError(f'{path!r}, {name!r}: {error}') from error
