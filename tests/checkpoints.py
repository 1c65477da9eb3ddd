"""Tensors and weights in safetensors files, for the tests of them.

The goldens in io_goldens were made of random numbers: plain.safetensors by
safetensors 0.8.0, and quantized.npz, with how each package decodes it, by
compressed-tensors 0.20.0, transformers 5.24, ModelOpt 0.47, GPTQModel 7.7 and
bitsandbytes 0.50.2. make_foreign.py made foreign.npz in the same way.
"""

import functools
import json
import os
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import parameterized

from lowbit_jax import qarray
from lowbit_jax.io import safetensors

GOLDENS = pathlib.Path(__file__).parent / 'io_goldens'
MODULE = 'model.layers.0.mlp.up_proj'
GPTQ = {'quant_method': 'gptq', 'bits': 4, 'group_size': 32}
AWQ = {
  'quant_method': 'awq',
  'bits': 4,
  'group_size': 32,
  'zero_point': True,
  'version': 'gemm',
}
MODELOPT = {'quant_method': 'modelopt', 'quant_algo': 'NVFP4'}
TILES = {'quant_method': 'fp8', 'weight_block_size': [16, 16]}
# Other configurations with which their goldens are read.
SETTINGS = {
  'bnb_int8': {'quant_method': 'bitsandbytes'},
  'deepseek_fp8_block16': TILES,
  'fp8_8x16': {'quant_method': 'fp8', 'weight_block_size': [8, 16]},
  'fp8_1x32': {'quant_method': 'fp8', 'weight_block_size': [1, 32]},
  'fp8_experts': {**TILES, 'expert_dtype': 'fp4'},
  'modelopt_fp8_rows': {**MODELOPT, 'quant_algo': 'FP8_PER_CHANNEL_PER_TOKEN'},
  'modelopt_fp8_tiles': {**MODELOPT, 'quant_algo': 'fp8_pb_wo'},
  'modelopt_int8': {**MODELOPT, 'quant_algo': 'W8A16'},
  'modelopt_int4': {
    **MODELOPT,
    'quant_algo': 'W4A16_AWQ',
    'group_size': 128,
    'has_zero_point': False,
  },
}


class FolderTest(parameterized.TestCase):
  """A test with a folder, and in it the path of a file."""

  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.folder = directory.name
    self.path = os.path.join(self.folder, 'model.safetensors')

  def write(self, tensors, config=None, name='model.safetensors'):
    safetensors.save(os.path.join(self.folder, name), tensors, overwrite=True)
    if config is not None:
      text = json.dumps({'quantization_config': config})
      pathlib.Path(self.folder, 'config.json').write_text(text)


def codes_of(q) -> np.ndarray:
  """Codes, bit by bit."""
  bits = q.fmt.element.bits
  axis = q.axes[0]
  data = np.moveaxis(np.asarray(q.codes), axis, -1)
  stream = np.unpackbits(data, axis=-1, bitorder='little')
  weights = 1 << np.arange(bits)
  codes = (stream.reshape(*data.shape[:-1], -1, bits) * weights).sum(-1)
  return np.moveaxis(codes, -1, axis)


def decode(q) -> np.ndarray:
  """What a QArray stands for, in NumPy: element by element as documented."""
  shape, q = q.shape, qarray.flat(q)
  values = q.fmt.element.values().astype(np.float32)[codes_of(q)]

  def spread(leaf):
    for axis, block in zip(q.axes, q.fmt.block, strict=True):
      leaf = np.repeat(leaf, block or values.shape[axis], axis)
    return leaf

  if q.zero_point is not None:
    values = values - spread(q.zero_point.astype(np.float32))
  if q.scale is not None:
    scale = q.scale
    if q.fmt.scale.bits <= 8:
      scale = q.fmt.scale.values().astype(np.float32)[scale]
    values = values * spread(scale.astype(np.float32))
  if q.tensor_scale is not None:
    values = values * q.tensor_scale
  return values[tuple(slice(n) for n in q.shape)].reshape(shape)


@functools.cache
def goldens():
  meta, arrays = {}, {}
  for name in ('quantized', 'foreign'):
    meta |= json.loads((GOLDENS / f'{name}.json').read_text())
    arrays |= np.load(GOLDENS / f'{name}.npz')
  return meta, arrays


def golden(case: str):
  """The stored tensors of a case and how its package decodes them."""
  meta, arrays = goldens()
  parts = {
    end: arrays[f'{case}/{end}'].view(np.dtype(getattr(ml_dtypes, name, name)))
    for end, name in meta[case]['dtypes'].items()
  }
  decoded = {
    k.split('/')[-1]: v for k, v in arrays.items() if k.startswith(f'{case}/y')
  }
  return parts, next(iter(decoded.values()))


def configuration(case: str):
  return goldens()[0][case]['config']


def changed(config, **changes):
  """A configuration of compressed-tensors with other fields of its group, of
  its weights, or of itself."""
  config = json.loads(json.dumps(config))
  group = config['config_groups']['group_0']
  for name, value in changes.items():
    places = (config, group, group['weights'])
    is_own = name.endswith('config')
    place = next((p for p in places if name in p or is_own), places[-1])
    place[name] = value
  return config


def random_qarray(fmt, shape, random):
  """A QArray of random codes and scales, made without JAX."""
  axes = qarray.block_axes(fmt, None, len(shape))
  pad = qarray.padding(shape, fmt, axes)
  padded = list(shape)
  for axis, n in zip(axes, pad, strict=True):
    padded[axis] += n
  packed = list(padded)
  packed[axes[0]] = packed[axes[0]] * fmt.element.bits // 8
  blocks = qarray.scale_shape(padded, fmt, axes)
  leaves = dict.fromkeys(('scale', 'tensor_scale', 'zero_point'))
  if fmt.scale is not None and fmt.scale.bits <= 8:
    leaves['scale'] = random.randint(0, 120, blocks).astype(np.uint8)
  elif fmt.scale is not None:
    leaves['scale'] = random.rand(*blocks).astype(np.dtype(fmt.scale.name))
  if fmt.tensor_scale:
    leaves['tensor_scale'] = np.full((1,) * len(shape), 0.25, np.float32)
  if fmt.zero_point:
    zeros = random.randint(0, 2**fmt.element.bits, blocks)
    leaves['zero_point'] = zeros.astype(np.uint8)
  q = qarray.QArray(
    random.randint(0, 120, packed).astype(np.uint8),
    **leaves,
    fmt=fmt,
    axis=axes if fmt.is_tile else axes[0],
    pad=pad,
    dtype=np.dtype(np.float32),
  )
  return qarray.validate(q)


def dense_words(codes, bits):
  """Codes (rows, n) in words of 32 bits, from one to the next."""
  stream = (codes[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1)
  stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
  data = np.packbits(stream.astype(np.uint8), axis=-1, bitorder='little')
  return data.view(np.int32)


def padded_words(codes, bits):
  """Codes (rows, n), as many in each word as fit."""
  count = 32 // bits
  codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % count)))
  codes = codes.reshape(len(codes), -1, count).astype(np.uint64)
  shifts = (np.arange(count) * bits).astype(np.uint64)
  return (codes << shifts).sum(-1, dtype=np.uint64).astype(np.uint32).view('i4')


def file_of(header, data=bytes(8), size=None) -> bytes:
  """A file with this header, as text or as what JSON writes."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if size is None else size
  return length.to_bytes(8, 'little') + text + data
