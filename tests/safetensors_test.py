"""Safetensors files against those of the reference packages.

The goldens in io_goldens were made of random numbers: plain.safetensors by
safetensors 0.8.0, and quantized.npz, with how each package decodes it, by
compressed-tensors 0.20.0, transformers 5.24, ModelOpt 0.47, GPTQModel 7.7 and
bitsandbytes 0.50.2.
"""

import functools
import json
import os
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.io import safetensors

GOLDENS = pathlib.Path(__file__).parent / 'io_goldens'
MODULE = 'model.layers.0.mlp.up_proj'


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
  return values[tuple(slice(n) for n in q.shape)]


@functools.cache
def goldens():
  meta = json.loads((GOLDENS / 'quantized.json').read_text())
  return meta, dict(np.load(GOLDENS / 'quantized.npz'))


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


class SafetensorsTest(parameterized.TestCase):
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

  def read(self, parts, config=None, module=MODULE):
    """The weight of a module, of which these are the parts."""
    prefix = f'{module}.' if module else ''
    self.write({prefix + end: part for end, part in parts.items()}, config)
    checkpoint = safetensors.open(self.folder)
    self.assertEqual(list(checkpoint), [prefix + 'weight'])
    return checkpoint[prefix + 'weight']

  def assert_bits(self, q, expected):
    self.assertEqual(q.shape, expected.shape)
    actual = decode(q)
    self.assertEqual(actual.dtype, expected.dtype)
    np.testing.assert_array_equal(
      actual.view(np.uint32), expected.view(np.uint32)
    )

  def test_every_dtype_byte_for_byte(self):
    with safetensors.open(GOLDENS / 'plain.safetensors') as checkpoint:
      tensors = dict(checkpoint)
      metadata = checkpoint.metadata
    self.assertEqual(metadata, {'format': 'pt é"\n'})
    self.assertEqual(tensors['int64'].dtype, np.int64)
    self.assertEqual(tensors['float4_e2m1fn_x2'].shape, (2, 6))
    safetensors.save(self.path, tensors, metadata)
    expected = (GOLDENS / 'plain.safetensors').read_bytes()
    self.assertEqual(pathlib.Path(self.path).read_bytes(), expected)

  @parameterized.parameters(
    ('int4_g32_sym', 'int4_g32'),
    ('int4_g32_asym', 'uint4_g32'),
    ('int3_g32_asym', 'uint3_g32'),
    ('int5_g32_sym', 'int5_g32'),
    ('int8_channel_pack', 'int8_channel'),
    ('int8_w8a8', 'int8_channel'),
    ('fp8_dynamic', 'e4m3fn_channel'),
    ('fp8_tensor', 'e4m3fn_tensor'),
    ('fp8_block', 'e4m3fn_4x32'),
    ('mxfp4', 'mxfp4'),
    ('mxfp6', 'mxfp6_e2m3'),
    ('mxfp8', 'mxfp8_e4m3'),
  )
  def test_compressed_tensors(self, case, name):
    parts, expected = golden(f'ct/{case}')
    q = self.read(parts, configuration(f'ct/{case}'))
    self.assertEqual(q.fmt.name, name)
    self.assert_bits(q, expected)

  def test_nvfp4_with_a_divisor(self):
    parts, expected = golden('ct/nvfp4')
    q = self.read(parts, configuration('ct/nvfp4'))
    self.assertEqual(q.fmt, formats.nvfp4)
    np.testing.assert_array_equal(
      q.tensor_scale, 1 / parts['weight_global_scale'].reshape(1, 1)
    )
    # The reference decodes in bfloat16.
    np.testing.assert_allclose(decode(q), expected, rtol=2**-7)

  def test_nvfp4_with_a_factor(self):
    parts, expected = golden('modelopt_nvfp4')
    for settings in (
      {'quant_method': 'modelopt', 'quant_algo': 'NVFP4'},
      {
        'quant_method': 'modelopt',
        'quant_algo': 'MIXED_PRECISION',
        'quantized_layers': {
          MODULE: {'quant_algo': 'NVFP4', 'group_size': 16},
          'other': {'quant_algo': 'FP8'},
        },
      },
    ):
      q = self.read(parts, settings)
      self.assertEqual(q.fmt, formats.nvfp4)
      np.testing.assert_array_equal(
        q.tensor_scale, parts['weight_scale_2'].reshape(1, 1)
      )
      # The reference multiplies the scales first.
      np.testing.assert_array_max_ulp(decode(q), expected)

  def test_settings_in_a_file_of_their_own(self):
    parts, expected = golden('modelopt_mxfp4')
    node = {'producer': {}, 'quantization': {'quant_algo': 'MXFP4'}}
    path = pathlib.Path(self.folder, 'hf_quant_config.json')
    path.write_text(json.dumps(node))
    self.assert_bits(self.read(parts), expected)

  def test_modelopt_fp8(self):
    parts, expected = golden('ct/fp8_tensor')
    parts['weight_scale'] = parts['weight_scale'].reshape(())
    q = self.read(parts, {'quant_method': 'modelopt', 'quant_algo': 'FP8'})
    self.assert_bits(q, expected)

  def test_fp8_tiles(self):
    parts, expected = golden('deepseek_fp8_block16')
    settings = {'quant_method': 'fp8', 'weight_block_size': [16, 16]}
    q = self.read(parts, settings)
    self.assertEqual(q.fmt.name, 'e4m3fn_16x16')
    self.assert_bits(q, expected)
    # Partial tiles at both ends, as in published files.
    cut = {**parts, 'weight': parts['weight'][:30, :50]}
    q = self.read(cut, settings)
    self.assertEqual(q.pad, (2, 14))
    self.assert_bits(q, expected[:30, :50])
    # Scales that are powers of two.
    exponents = np.arange(120, 128, dtype=np.uint8).reshape(2, 4)
    exponents = exponents.view(ml_dtypes.float8_e8m0fnu)
    powers = self.read({**parts, 'weight_scale_inv': exponents}, settings)
    same = self.read(
      {**parts, 'weight_scale_inv': exponents.astype(np.float32)}, settings
    )
    self.assertEqual(powers.fmt.scale, formats.e8m0)
    self.assert_bits(powers, decode(same))

  def test_fp8_with_one_scale(self):
    parts, expected = golden('ct/fp8_tensor')
    q = self.read(parts, {'quant_method': 'fp8', 'activation_scheme': 'static'})
    self.assert_bits(q, expected)

  def test_gpt_oss(self):
    parts, expected = golden('hf_mxfp4')
    name = 'model.layers.0.mlp.experts.gate_up_proj'
    bias = np.ones((2, 4), ml_dtypes.bfloat16)
    tensors = {f'{name}_{end}': part for end, part in parts.items()}
    tensors[f'{name}_bias'] = bias
    self.write(tensors, {'quant_method': 'mxfp4'})
    checkpoint = safetensors.open(self.folder)
    self.assertCountEqual(checkpoint, [name, f'{name}_bias'])
    self.assertEqual(checkpoint[name].fmt, formats.mxfp4)
    self.assert_bits(checkpoint[name], np.ascontiguousarray(expected.mT))
    np.testing.assert_array_equal(checkpoint[f'{name}_bias'], bias)

  def test_bitsandbytes(self):
    parts, expected = golden('bnb_nf4')
    parts = {
      'weight' if end == 'weight' else f'weight.{end}': part
      for end, part in parts.items()
    }
    for settings in (None, {'quant_method': 'bitsandbytes'}):
      q = self.read(parts, settings)
      self.assertEqual(q.fmt, formats.nf4_g64)
      self.assertEqual(q.dtype, np.float16)
      rounded = decode(q).astype(np.float16).astype(np.float32)
      np.testing.assert_array_equal(rounded, expected)

  @parameterized.parameters(3, 4, 8)
  def test_gptq(self, bits):
    parts, expected = golden(f'gptq{bits}_g32')
    zeros = parts.pop('qzeros_v2')
    settings = {'quant_method': 'gptq', 'bits': bits, 'group_size': 32}
    second = {**settings, 'checkpoint_format': 'gptq_v2'}
    q = self.read({**parts, 'qzeros': zeros}, second)
    self.assertEqual(q.fmt.name, f'uint{bits}_g32')
    self.assert_bits(q, expected)
    # Version 1 stores each field less by one; none is 0, so none borrows.
    ones = np.packbits(
      np.tile(np.arange(bits) == 0, 32), bitorder='little'
    ).view(np.int32)
    fields = zeros.view(np.uint32) - np.resize(ones, zeros.shape[1]).view('u4')
    if bits == 3:  # Fields run on from word to word.
      stream = int.from_bytes(zeros.tobytes(), 'little')
      less = int.from_bytes(np.resize(ones, zeros.size).tobytes(), 'little')
      data = (stream - less).to_bytes(zeros.nbytes, 'little')
      fields = np.frombuffer(data, np.uint32).reshape(zeros.shape)
    first = {**parts, 'qzeros': fields.view(np.int32)}
    for named in ({}, {'checkpoint_format': 'gptq'}, {'format': 'gptq'}):
      self.assert_bits(self.read(first, {**settings, **named}), expected)

  def test_awq(self):
    parts, expected = golden('awq_gemm_g32')
    settings = {
      'quant_method': 'awq',
      'bits': 4,
      'group_size': 32,
      'zero_point': True,
      'version': 'gemm',
    }
    q = self.read(parts, settings)
    self.assertEqual(q.fmt.name, 'uint4_g32')
    self.assert_bits(q, expected)


if __name__ == '__main__':
  absltest.main()
