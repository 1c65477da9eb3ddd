"""Quantized layouts in safetensors files, bit for bit, or refused by name."""

import itertools
import json
import os
import pathlib
import re
import tempfile

import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, ops, qarray
from lowbit_jax.io import safetensors
from tests import checkpoints


class LayoutsTest(checkpoints.FolderTest):
  def read(self, parts, config=None, module=checkpoints.MODULE):
    """The weight of a module, of which these are the parts."""
    prefix = f'{module}.' if module else ''
    self.write({prefix + end: part for end, part in parts.items()}, config)
    checkpoint = safetensors.open(self.folder)
    self.assertEqual(list(checkpoint), [prefix + 'weight'])
    return checkpoint[prefix + 'weight']

  def assert_bits(self, q, expected):
    self.assertEqual(q.shape, expected.shape)
    actual = checkpoints.decode(q)
    self.assertEqual(actual.dtype, expected.dtype)
    np.testing.assert_array_equal(
      actual.view(np.uint32), expected.view(np.uint32)
    )

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
    parts, expected = checkpoints.golden(f'ct/{case}')
    q = self.read(parts, checkpoints.configuration(f'ct/{case}'))
    self.assertEqual(q.fmt.name, name)
    self.assert_bits(q, expected)

  def test_nvfp4_with_a_divisor(self):
    parts, expected = checkpoints.golden('ct/nvfp4')
    q = self.read(parts, checkpoints.configuration('ct/nvfp4'))
    self.assertEqual(q.fmt, formats.nvfp4)
    np.testing.assert_array_equal(
      q.tensor_scale, 1 / parts['weight_global_scale'].reshape(1, 1)
    )
    # The reference decodes in bfloat16.
    np.testing.assert_allclose(checkpoints.decode(q), expected, rtol=2**-7)

  def test_nvfp4_with_a_factor(self):
    parts, expected = checkpoints.golden('modelopt_nvfp4')
    for settings in (
      {'quant_method': 'modelopt', 'quant_algo': 'NVFP4'},
      {
        'quant_method': 'modelopt',
        'quant_algo': 'MIXED_PRECISION',
        'quantized_layers': {
          checkpoints.MODULE: {'quant_algo': 'NVFP4', 'group_size': 16},
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
      np.testing.assert_array_max_ulp(checkpoints.decode(q), expected)

  def test_settings_in_a_file_of_their_own(self):
    parts, expected = checkpoints.golden('modelopt_mxfp4')
    node = {'producer': {}, 'quantization': {'quant_algo': 'MXFP4'}}
    path = pathlib.Path(self.folder, 'hf_quant_config.json')
    path.write_text(json.dumps(node))
    self.assert_bits(self.read(parts), expected)

  def test_modelopt_fp8(self):
    parts, expected = checkpoints.golden('ct/fp8_tensor')
    parts['weight_scale'] = parts['weight_scale'].reshape(())
    q = self.read(parts, {'quant_method': 'modelopt', 'quant_algo': 'FP8'})
    self.assert_bits(q, expected)

  @parameterized.parameters(
    ('modelopt_fp8_rows', 'e4m3fn_channel'),
    ('modelopt_fp8_tiles', 'fp8_128x128'),
    ('modelopt_int8', 'int8_channel'),
    ('modelopt_int4', 'int4_g128'),
  )
  def test_modelopt(self, case, name):
    parts, expected = checkpoints.golden(case)
    settings = checkpoints.SETTINGS[case]
    q = self.read(parts, settings)
    self.assertEqual(q.fmt.name, name)
    self.assert_bits(q, expected)
    other = {'W8A16': 'W8A8_SQ_PER_CHANNEL', 'fp8_pb_wo': 'FP8_PB_WO'}
    name = settings['quant_algo']
    settings = {**settings, 'quant_algo': other.get(name, name)}
    self.assert_bits(self.read(parts, settings), expected)

  def test_modelopt_mxfp8(self):
    parts, expected = checkpoints.golden('modelopt_mxfp8')
    settings = {**checkpoints.MODELOPT, 'quant_algo': 'MXFP8', 'group_size': 32}
    q = self.read(parts, settings)
    self.assertEqual(q.fmt, formats.mxfp8_e4m3)
    self.assert_bits(q, expected)

  def test_fp8_tiles(self):
    parts, expected = checkpoints.golden('deepseek_fp8_block16')
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
    self.assert_bits(powers, checkpoints.decode(same))

  def test_fp8_with_one_scale(self):
    parts, expected = checkpoints.golden('ct/fp8_tensor')
    q = self.read(parts, {'quant_method': 'fp8', 'activation_scheme': 'static'})
    self.assert_bits(q, expected)
    # Another name for the scale.
    parts['weight_scale_inv'] = parts.pop('weight_scale').reshape(())
    settings = {'quant_method': 'fp8', 'weight_block_size': None}
    self.assert_bits(self.read(parts, settings), expected)

  @parameterized.parameters(
    ('fp8_8x16', 'e4m3fn_8x16_e8m0'),
    ('fp8_1x32', 'mxfp8_e4m3'),
    ('fp8_experts', 'mxfp4'),
  )
  def test_fp8_with_powers_of_two(self, case, name):
    parts, expected = checkpoints.golden(case)
    for dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
      scale = parts['weight_scale_inv'].view(dtype)
      q = self.read(
        {**parts, 'weight_scale_inv': scale}, checkpoints.SETTINGS[case]
      )
      self.assertEqual(q.fmt.name, name)
      self.assert_bits(q, expected)

  def test_fp8_of_fbgemm(self):
    parts, expected = checkpoints.golden('ct/fp8_dynamic')
    q = self.read(parts, {'quant_method': 'fbgemm_fp8'})
    self.assertEqual(q.fmt.element, formats.e4m3fn)
    self.assert_bits(q, expected)

  def test_gpt_oss(self):
    parts, expected = checkpoints.golden('hf_mxfp4')
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
    parts, expected = checkpoints.golden('bnb_nf4')
    for settings in (None, {'quant_method': 'bitsandbytes'}):
      q = self.read(parts, settings)
      self.assertEqual(q.fmt, formats.nf4_g64)
      self.assertEqual(q.dtype, np.float16)
      rounded = checkpoints.decode(q).astype(np.float16).astype(np.float32)
      np.testing.assert_array_equal(rounded, expected)

  @parameterized.parameters(
    ('bnb_nf4_nested', 'nf4_g64', ()),
    ('bnb_nf4_nested2', 'nf4_g32', ()),
    ('bnb_nf4_merged', 'nf4_g64', (48,)),
    ('bnb_nf4_odd', 'nf4_g64', (11, 15)),
    ('bnb_fp4', 'bnb_fp4_g64', ()),
    ('bnb_fp4_nested', 'bnb_fp4_g32', (48,)),
  )
  def test_four_bits_of_bitsandbytes(self, case, name, merged):
    parts, expected = checkpoints.golden(case)
    q = self.read(parts)
    self.assertEqual((q.fmt.name, q.merged), (name, merged))
    rounded = checkpoints.decode(q).astype(q.dtype).astype(np.float32)
    self.assertEqual(q.shape, expected.shape)
    np.testing.assert_array_equal(rounded, expected)  # FP4 has two zeros
    np.testing.assert_array_equal(np.asarray(q, np.float32), expected)

  def test_four_bits_stored_as_numbers(self):
    parts, _ = checkpoints.golden('bnb_nf4')
    expected = checkpoints.decode(self.read(parts))
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
      stored = parts['weight'].reshape(-1).view(dtype)[:, None]
      self.assert_bits(self.read({**parts, 'weight': stored}), expected)

  def test_int8_of_bitsandbytes(self):
    parts, expected = checkpoints.golden('bnb_int8')
    for end in ('weight_format', 'bias'):  # old files do not have the first
      q = self.read(parts, {'quant_method': 'bitsandbytes'})
      self.assertEqual(q.fmt, formats.int8_channel)
      # Each side rounds twice.
      np.testing.assert_array_max_ulp(checkpoints.decode(q), expected, 2)
      parts.pop(end, None)

  @parameterized.parameters(3, 4, 8)
  def test_gptq(self, bits):
    parts, expected = checkpoints.golden(f'gptq{bits}_g32')
    zeros = parts.pop('qzeros_v2')
    settings = {'quant_method': 'gptq', 'bits': bits, 'group_size': 32}
    second = {**settings, 'checkpoint_format': 'gptq_v2'}
    q = self.read({**parts, 'qzeros': zeros}, second)
    self.assertEqual(q.fmt.name, f'uint{bits}_g32_float16')
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
    parts, expected = checkpoints.golden('awq_gemm_g32')
    settings = {
      'quant_method': 'awq',
      'bits': 4,
      'group_size': 32,
      'zero_point': True,
      'version': 'gemm',
    }
    q = self.read(parts, settings)
    self.assertEqual(q.fmt.name, 'uint4_g32_float16')
    self.assert_bits(q, expected)

  def test_old_packing_of_odd_bits(self):
    random = np.random.RandomState(0)
    settings = json.loads(
      json.dumps(checkpoints.configuration('ct/int3_g32_asym'))
    )
    weights = settings['config_groups']['group_0']['weights']
    for bits, symmetric in ((3, False), (5, True), (6, False), (7, True)):
      weights.update(num_bits=bits, symmetric=symmetric)
      codes = random.randint(0, 2**bits, (96, 64))
      zeros = random.randint(0, 2**bits, (96, 2))
      for pack in (checkpoints.padded_words, checkpoints.dense_words):
        parts = {
          'weight_packed': pack(codes, bits),
          'weight_scale': np.ones((96, 2), np.float32),
          'weight_shape': np.array([96, 64]),
        }
        if not symmetric:
          parts['weight_zero_point'] = pack(zeros.T, bits).T
        q = self.read(parts, settings)
        middle = 2 ** (bits - 1) if symmetric else np.repeat(zeros, 32, 1)
        self.assert_bits(q, (codes - middle).astype(np.float32))

  def test_groups_in_order(self):
    parts, expected = checkpoints.golden('ct/int4_g32_sym')
    settings = checkpoints.configuration('ct/int4_g32_sym')
    for index in (np.arange(64) // 32, np.full(64, -1)):
      stored = {**parts, 'weight_g_idx': index.astype(np.int32)}
      self.assert_bits(self.read(stored, settings), expected)

  def test_packing_that_may_be_either(self):
    settings = json.loads(
      json.dumps(checkpoints.configuration('ct/int5_g32_sym'))
    )
    settings['config_groups']['group_0']['weights'].update(strategy='channel')
    parts = {
      'weight_packed': checkpoints.dense_words(np.zeros((4, 12), int), 5),
      'weight_scale': np.ones((4, 1), np.float32),
      'weight_shape': np.array([4, 12]),
    }
    with self.assertRaisesRegex(
      ValueError, 'may be packed as in old or in new'
    ):
      self.read(parts, settings)

  def test_rows_that_fill_no_words(self):
    settings = json.loads(
      json.dumps(checkpoints.configuration('ct/int8_channel_pack'))
    )
    weights = settings['config_groups']['group_0']['weights']
    random = np.random.RandomState(0)
    for bits, size in ((4, 13), (2, 5), (3, 111), (8, 9)):
      weights.update(num_bits=bits)
      codes = random.randint(0, 2**bits, (3, size))
      q = self.read(
        {
          'weight_packed': checkpoints.dense_words(codes, bits),
          'weight_scale': np.ones((3, 1), np.float32),
          'weight_shape': np.array([3, size]),
        },
        settings,
      )
      expected = (codes - 2 ** (bits - 1)).astype(np.float32)
      self.assert_bits(q, expected)

  def test_asymmetric_bytes(self):
    settings = json.loads(json.dumps(checkpoints.configuration('ct/int8_w8a8')))
    settings['config_groups']['group_0']['weights']['symmetric'] = False
    random = np.random.RandomState(0)
    weight = random.randint(-128, 128, (4, 6)).astype(np.int8)
    zeros = random.randint(-128, 128, (4, 1)).astype(np.int8)
    scale = random.rand(4, 1).astype(ml_dtypes.bfloat16)
    parts = {
      'weight': weight,
      'weight_scale': scale,
      'weight_zero_point': zeros,
    }
    q = self.read(parts, settings)
    self.assertEqual(q.scale.dtype, ml_dtypes.bfloat16)
    difference = weight.astype(np.float32) - zeros.astype(np.float32)
    self.assert_bits(q, difference * scale.astype(np.float32))

  def test_stacks_of_experts(self):
    parts, expected = checkpoints.golden('ct/int3_g32_asym')
    stack = {end: np.stack([part] * 2) for end, part in parts.items()}
    stack['weight_shape'] = np.array([2, 16, 64])
    q = self.read(stack, checkpoints.configuration('ct/int3_g32_asym'))
    self.assert_bits(q, np.stack([expected] * 2))

  def test_groups_targets_and_formats(self):
    four, four_y = checkpoints.golden('ct/int4_g32_sym')
    eight, eight_y = checkpoints.golden('ct/fp8_dynamic')

    def weights(case):
      return checkpoints.configuration(f'ct/{case}')['config_groups'][
        'group_0'
      ]['weights']

    settings = {
      'quant_method': 'compressed-tensors',
      'format': 'mixed-precision',
      'ignore': ['lm_head', 're:.*router', 'Embedding'],
      'config_groups': {
        'attention': {'targets': ['LlamaAttention'], 'weights': None},
        'other': {
          'targets': ['Linear'],
          'format': 'pack-quantized',
          'weights': weights('int4_g32_sym'),
        },
        'down': {
          'targets': [r're:.*down_proj$', 'layers.1.up_proj'],
          'format': 'float-quantized',
          'weights': weights('fp8_dynamic'),
        },
      },
    }
    tensors = {'lm_head.weight': np.ones((3, 4), ml_dtypes.bfloat16)}
    modules = {
      'layers.0.up_proj': four,
      'layers.0.down_proj': eight,
      'layers.1.up_proj': eight,
    }
    for module, parts in modules.items():
      tensors |= {f'{module}.{end}': part for end, part in parts.items()}
    tensors['layers.0.up_proj.bias'] = np.ones(16, np.float16)
    tensors['layers.0.down_proj.input_scale'] = np.ones(1, np.float32)
    tensors['layers.0.self_attn.k_scale'] = np.ones(1, np.float32)
    self.write(tensors, settings)
    checkpoint = safetensors.open(self.folder)
    plain = {
      n for n in tensors if n.endswith(('bias', 'input_scale', 'k_scale'))
    }
    self.assertCountEqual(
      checkpoint,
      {'lm_head.weight', *(f'{m}.weight' for m in modules), *plain},
    )
    self.assert_bits(checkpoint['layers.0.up_proj.weight'], four_y)
    self.assert_bits(checkpoint['layers.0.down_proj.weight'], eight_y)
    self.assert_bits(checkpoint['layers.1.up_proj.weight'], eight_y)
    text = checkpoint.describe()
    self.assertRegex(text, r'compressed-tensors float-quantized +2 +2,048 ')
    self.assertEqual(
      sum(t.nbytes for t in checkpoint.tensors.values()),
      sum(t.nbytes for t in tensors.values()),
    )

  def test_shards(self):
    parts, expected = checkpoints.golden('ct/nvfp4')
    shards = {'model-00001-of-00002.safetensors': {}, 'b.safetensors': {}}
    for k, (end, part) in enumerate(parts.items()):
      shards[sorted(shards)[k % 2]][f'up.{end}'] = part
    for name, tensors in shards.items():
      self.write(tensors, checkpoints.configuration('ct/nvfp4'), name)
    self.index(shards)
    with safetensors.open(self.folder) as checkpoint:
      self.assertEqual(list(checkpoint), ['up.weight'])
      q = checkpoint['up.weight']
    np.testing.assert_allclose(checkpoints.decode(q), expected, rtol=2**-7)

  def index(self, shards, **changes):
    names = {name: shard for shard, part in shards.items() for name in part}
    path = pathlib.Path(self.folder, 'model.safetensors.index.json')
    path.write_text(json.dumps({'weight_map': {**names, **changes}}))


class FailClosedTest(parameterized.TestCase):
  """What is not known is refused by name, and never served as it is."""

  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.folder = directory.name

  def refused(self, tensors, settings, message):
    path = os.path.join(self.folder, 'model.safetensors')
    safetensors.save(path, tensors, overwrite=True)
    config = pathlib.Path(self.folder, 'config.json')
    config.unlink(missing_ok=True)
    if settings is not None:
      config.write_text(json.dumps({'quantization_config': settings}))
    with self.assertRaisesRegex(ValueError, message) as raised:
      dict(safetensors.open(self.folder))
    self.assertStartsWith(str(raised.exception), repr(self.folder))
    self.assertRegex(str(raised.exception), f"^'.*', '.*{checkpoints.MODULE}")

  def refused_parts(self, parts, settings, message):
    tensors = {
      f'{checkpoints.MODULE}.{end}': part for end, part in parts.items()
    }
    self.refused(tensors, settings, message)

  @parameterized.parameters(
    ('int4_g32_sym', {'num_bits': 5}, 'rows of 8 words; 64 numbers of 5 bits'),
    ('int4_g32_sym', {'num_bits': 1}, 'num_bits=1'),
    ('int4_g32_sym', {'num_bits': True}, 'num_bits=True'),
    ('int4_g32_sym', {'num_bits': None}, 'num_bits=None'),
    ('int4_g32_sym', {'num_bits': 4.0}, 'num_bits=4.0'),
    ('int4_g32_sym', {'type': 'float'}, "type='float'"),
    ('int4_g32_sym', {'group_size': 16}, r'expected F16/BF16/F32 \(16, 4\)'),
    ('int4_g32_sym', {'group_size': 0}, 'blocks have the size 0'),
    ('int4_g32_sym', {'group_size': 2**80}, 'blocks have the size'),
    ('int4_g32_sym', {'strategy': 'channel'}, r'expected .* \(16, 1\)'),
    ('int4_g32_sym', {'strategy': 'tensor'}, r'expected .* \(\) or \(1,\)'),
    ('int4_g32_sym', {'strategy': 'block'}, "strategy='block'"),
    ('int4_g32_sym', {'strategy': 'token'}, "strategy='token'"),
    ('int4_g32_sym', {'symmetric': False}, 'weight_zero_point is missing'),
    ('int4_g32_asym', {'symmetric': True}, 'symmetric weight is not zero'),
    ('int4_g32_sym', {'symmetric': 1}, 'symmetric=1 .* of type bool'),
    ('int4_g32_sym', {'format': 'marlin-24'}, "format='marlin-24'"),
    ('int4_g32_sym', {'format': 'mixed-precision'}, "format='mixed-precision'"),
    ('int4_g32_sym', {'format': 'int-quantized'}, 'its weight is missing'),
    ('int8_w8a8', {'format': 'float-quantized'}, "type='int'"),
    ('fp8_dynamic', {'format': 'int-quantized'}, "type='float'"),
    ('fp8_dynamic', {'symmetric': False}, 'floats with zero points'),
    ('fp8_dynamic', {'num_bits': 4}, 'num_bits=4'),
    ('fp8_block', {'block_structure': [4]}, 'is no tile'),
    ('fp8_block', {'block_structure': [4, 0]}, 'blocks have the size 0'),
    ('fp8_block', {'block_structure': [8, 32]}, r'expected .* \(2, 2\)'),
    ('nvfp4', {'strategy': 'group'}, "strategy='group'"),
    ('nvfp4', {'format': 'mxfp4-pack-quantized'}, 'group_size=16'),
    ('mxfp4', {'format': 'nvfp4-pack-quantized'}, "strategy='group'"),
    ('mxfp8', {'format': 'float-quantized'}, 'weight_scale.* is U8'),
    ('mxfp6', {'num_bits': 4}, 'num_bits=4'),
    ('int4_g32_sym', {'ignore': [checkpoints.MODULE]}, 'ignores its module'),
    ('int4_g32_sym', {'ignore': ['re:.*up_proj']}, 'ignores its module'),
    ('int4_g32_sym', {'ignore': [3]}, 'the target 3 is no string'),
    ('int4_g32_sym', {'targets': ['lm_head']}, 'no group'),
    ('int4_g32_sym', {'targets': []}, 'no group'),
    ('int4_g32_sym', {'targets': ['re:(']}, r"pattern '\('"),
    ('int4_g32_sym', {'targets': ['re:(a*)*b']}, 'too long to match'),
    ('int4_g32_sym', {'targets': ['re:' + '.*' * 12]}, 'too long to match'),
    ('int4_g32_sym', {'targets': ['re:' + '(o|o)' * 40]}, 'too long to match'),
    ('int4_g32_sym', {'targets': ['re:' + '(?:o?o)?' * 40]}, 'too long'),
    ('int4_g32_sym', {'config_groups': {'a': 1}}, 'a group .* is no object'),
    ('int4_g32_sym', {'config_groups': {}}, 'no group'),
    ('int4_g32_sym', {'config_groups': [1]}, 'of type dict'),
    ('int4_g32_sym', {'transform_config': {'a': 1}}, 'with transforms'),
    ('int4_g32_sym', {'sparsity_config': {'format': 's'}}, "format='s'"),
    ('int4_g32_sym', {'actorder': 'group'}, 'weight_g_idx is missing'),
  )
  def test_compressed_tensors(self, case, changes, message):
    parts, _ = checkpoints.golden(f'ct/{case}')
    config = checkpoints.changed(
      checkpoints.configuration(f'ct/{case}'), **changes
    )
    self.refused_parts(parts, config, message)

  def test_weights_that_are_there_twice(self):
    parts, _ = checkpoints.golden('gptq4_g32')
    parts['qzeros'] = parts.pop('qzeros_v2')
    parts['weight'] = np.ones((32, 64), np.float32)
    self.refused_parts(parts, checkpoints.GPTQ, 'two layouts claim')
    parts, _ = checkpoints.golden('deepseek_fp8_block16')
    parts['weight_scale'] = np.ones((), np.float32)
    self.refused_parts(parts, checkpoints.TILES, 'two layouts claim')

  def test_classes_that_cannot_be_told_apart(self):
    config = checkpoints.configuration('ct/int4_g32_sym')
    other = json.loads(json.dumps(config['config_groups']['group_0']))
    other |= {'targets': ['Embedding'], 'format': 'int-quantized'}
    config = checkpoints.changed(config)
    config['config_groups']['other'] = other
    parts, _ = checkpoints.golden('ct/int4_g32_sym')
    self.refused_parts(parts, config, 'several groups')

  @parameterized.parameters(
    ('ct/int4_g32_sym', 'weight_shape', np.array([16, 65]), '65 numbers'),
    ('ct/int4_g32_sym', 'weight_shape', np.array([8, 64]), 'weight_shape'),
    ('ct/int4_g32_sym', 'weight_shape', np.array([16, -64]), 'weight_shape'),
    ('ct/int4_g32_sym', 'weight_shape', np.array([16, 2**62]), 'numbers of'),
    ('ct/int4_g32_sym', 'weight_shape', np.array([1024]), 'weight_shape'),
    ('ct/int4_g32_sym', 'weight_scale', np.ones((16, 2), 'f8'), 'is F64'),
    ('ct/int4_g32_sym', 'weight', np.ones(3), 'weight is not known'),
    ('ct/int4_g32_asym', 'weight_zero_point', np.ones((2, 2)), 'is F64'),
    ('ct/int4_g32_sym', 'weight_g_idx', np.arange(64) % 3, 'g_idx.* 32 col'),
    ('ct/int4_g32_sym', 'weight_g_idx', np.ones(64, 'i4'), 'g_idx.* 32 col'),
    ('ct/int4_g32_sym', 'weight_g_idx', 1 - np.arange(64) // 22, 'g_idx.* col'),
    ('ct/int4_g32_sym', 'weight_g_idx', np.arange(64) // 32 - 1, 'g_idx.* col'),
    ('ct/int4_g32_sym', 'weight_g_idx', np.arange(63) // 32, r'expected .*64'),
    ('ct/int4_g32_sym', 'weight_g_idx', np.ones(64, 'f4'), 'is F32'),
    ('ct/int8_channel_pack', 'weight_g_idx', np.zeros(64, 'i4'), 'strategy='),
    ('ct/fp8_block', 'weight_g_idx', np.zeros(64, 'i4'), 'strategy='),
    ('ct/mxfp4', 'weight_g_idx', np.zeros(64, 'i4'), 'g_idx is not known to'),
    ('ct/int4_g32_sym', 'weight_global_scale', np.ones(1), 'not known to'),
    ('ct/nvfp4', 'weight_global_scale', np.zeros(1, 'f4'), 'it divides'),
    ('ct/nvfp4', 'weight_global_scale', np.float32([np.nan]), 'it divides'),
    ('ct/nvfp4', 'weight_global_scale', np.float32([1e-40]), 'scale is'),
    ('ct/nvfp4', 'weight_global_scale', None, 'global_scale is missing'),
    ('ct/mxfp4', 'weight_scale', np.ones((16, 2), 'f4'), 'expected U8'),
    ('ct/fp8_tensor', 'weight_scale', np.float32([np.inf]), 'tensor scale is'),
  )
  def test_parts(self, case, end, part, message):
    parts, _ = checkpoints.golden(case)
    parts[end] = part
    parts = {end: part for end, part in parts.items() if part is not None}
    self.refused_parts(parts, checkpoints.configuration(case), message)

  @parameterized.parameters(
    ({'bits': 5}, {}, 'bits=5'),
    ({'bits': 8}, {}, 'expected'),
    ({'group_size': 64}, {}, r'expected F16 \(1, 32\)'),
    ({'group_size': 0}, {}, 'no size of a group'),
    ({'group_size': True}, {}, 'group_size=True .* of type int'),
    ({'checkpoint_format': 'marlin'}, {}, "checkpoint_format='marlin'"),
    ({'dynamic': {'-:a': {}}}, {}, 'dynamic'),
    ({'desc_act': True}, {'g_idx': None}, 'g_idx is missing'),
    ({}, {'g_idx': np.arange(64, dtype=np.int32) % 3}, 'g_idx.* 32 columns'),
    ({}, {'g_idx': np.int32([2, *[0] * 31, *[1] * 32])}, 'g_idx.* 32 columns'),
    ({}, {'g_idx': np.int32([-1, *[0] * 31, *[1] * 32])}, 'g_idx.* 32 columns'),
    ({}, {'g_idx': np.int32([2**31 - 1] * 64)}, 'g_idx.* 32 columns'),
    ({}, {'g_idx': np.arange(64, dtype=np.int16) // 32}, 'is I16'),
    ({'static_groups': 1, 'desc_act': True}, {}, 'static_groups=1'),
    ({}, {'qzeros': None}, 'qzeros is missing'),
    ({}, {'qzeros': np.full((2, 4), -1, np.int32)}, 'stands for 16 in some'),
  )
  def test_gptq(self, settings, changes, message):
    parts, _ = checkpoints.golden('gptq4_g32')
    parts['qzeros'] = parts.pop('qzeros_v2')
    parts = {k: v for k, v in {**parts, **changes}.items() if v is not None}
    self.refused_parts(parts, {**checkpoints.GPTQ, **settings}, message)

  @parameterized.parameters(
    ({'version': 'gemv'}, "version='gemv'"),
    ({'bits': 3}, 'bits=3'),
    ({'zero_point': False}, 'zero_point=False'),
    ({'group_size': 128}, r'expected F16 \(1, 16\)'),
  )
  def test_awq(self, settings, message):
    self.refused_parts(
      checkpoints.golden('awq_gemm_g32')[0],
      {**checkpoints.AWQ, **settings},
      message,
    )

  @parameterized.parameters(
    ({'quant_algo': 'NVFP4_AWQ'}, "quant_algo='NVFP4_AWQ'"),
    ({'quant_algo': None}, 'quant_algo=None'),
    ({'quant_algo': 'FP8'}, 'is U8'),
    ({'quant_algo': 'MXFP4'}, 'weight_scale.* is F8_E4M3'),
    ({'group_size': 8}, 'group_size=8'),
    ({'quantized_layers': {'a': {}}}, 'lacks its module'),
  )
  def test_modelopt(self, settings, message):
    parts, _ = checkpoints.golden('modelopt_nvfp4')
    self.refused_parts(parts, {**checkpoints.MODELOPT, **settings}, message)
    parts['pre_quant_scale'] = np.ones(64, np.float32)
    self.refused_parts(
      parts, checkpoints.MODELOPT, 'pre_quant_scale is not known'
    )

  @parameterized.parameters(
    ('fp8_rows', {'weight_scale': np.ones((8, 1), 'f4')}, r'expected F32 .8,'),
    ('fp8_rows', {'weight_scale': np.ones(24, 'f4')}, r'expected F32 .8,'),
    ('fp8_rows', {'weight_scale': np.ones((), 'f4')}, r'expected F32 .8,'),
    ('fp8_rows', {'weight': np.ones((8, 24), 'i1')}, 'is I8'),
    (
      'fp8_rows',
      {'weight': np.ones((2, 8, 24), ml_dtypes.float8_e4m3fn)},
      'two axes',
    ),
    ('fp8_tiles', {'weight_scale': np.ones((2, 1), 'f4')}, r'2, 1, 1, 1'),
    (
      'fp8_tiles',
      {'weight': np.ones((255, 128), ml_dtypes.float8_e4m3fn)},
      'no whole tiles',
    ),
    ('int8', {'weight': np.ones((8, 24), 'u1')}, 'is U8'),
    ('int8', {'weight_scale': np.ones((1, 8), 'f4')}, r'expected F32 .8,'),
    ('int4', {'weight_scale': np.ones((4, 2), 'f4')}, r'expected F32 .8, 2'),
    ('int4', {'weight_scale': np.ones((8, 4), 'f4')}, r'expected F32 .8, 2'),
    ('int4', {'weight': np.ones((4, 256), 'i1')}, 'is I8'),
    ('int4', {'weight_scale_2': np.float32(1)}, 'scale_2 is not known'),
    ('int4', {'pre_quant_scale': np.ones(256, 'f4')}, 'pre_quant_scale is not'),
    ('int8', {'pre_quant_scale': np.ones(24, 'f4')}, 'pre_quant_scale is not'),
  )
  def test_parts_of_modelopt(self, case, changes, message):
    case = f'modelopt_{case}'
    parts, _ = checkpoints.golden(case)
    self.refused_parts(
      {**parts, **changes}, checkpoints.SETTINGS[case], message
    )

  @parameterized.parameters(
    ({'group_size': 48}, 'groups of 48 do not fill rows of 256'),
    ({'group_size': 0}, 'groups of 0'),
    ({'group_size': None}, 'groups of 0'),
    ({'group_size': True}, 'of type int'),
    ({'group_size': 64}, r'expected F32 \(8, 4\)'),
    ({'has_zero_point': True}, 'has_zero_point=True'),
    ({'quant_algo': 'W4A8_AWQ'}, "quant_algo='W4A8_AWQ'"),
    ({'quant_algo': 'FP8_PB_REAL'}, "quant_algo='FP8_PB_REAL'"),
  )
  def test_int4_of_modelopt(self, settings, message):
    parts, _ = checkpoints.golden('modelopt_int4')
    settings = {**checkpoints.SETTINGS['modelopt_int4'], **settings}
    self.refused_parts(parts, settings, message)

  @parameterized.parameters(
    ({'weight_block_size': None}, r'expected .* \(\) or \(1,\)'),
    ({'weight_block_size': []}, 'is no tile'),
    ({'weight_block_size': [16, -16]}, 'is no tile'),
    ({'weight_block_size': [128, 128]}, r'expected F32 \(1, 1\)'),
    ({'fmt': 'e5m2'}, "fmt='e5m2'"),
  )
  def test_tiles(self, settings, message):
    parts, _ = checkpoints.golden('deepseek_fp8_block16')
    self.refused_parts(parts, {**checkpoints.TILES, **settings}, message)

  @parameterized.parameters(
    ({'expert_dtype': None}, {}, 'expert_dtype=None'),
    ({'expert_dtype': 'fp8'}, {}, "expert_dtype='fp8'"),
    ({}, {'weight_scale_inv': np.ones((4, 2), np.float32)}, 'is F32'),
    ({}, {'weight_scale_inv': np.ones((2, 4), np.uint8)}, r'expected .*4, 2'),
    ({}, {'weight': np.ones((4, 32), np.uint8)}, 'is U8'),
  )
  def test_experts(self, settings, changes, message):
    parts, _ = checkpoints.golden('fp8_experts')
    settings = {**checkpoints.SETTINGS['fp8_experts'], **settings}
    self.refused_parts({**parts, **changes}, settings, message)

  @parameterized.parameters(
    ('weight_scale', np.ones(16, np.float32), r'expected F32 \(16, 1\)'),
    ('weight_scale', np.ones((1, 64), np.float32), r'expected F32 \(16, 1\)'),
    ('weight_scale', np.ones((16, 1), np.uint8), 'is U8'),
    ('weight', np.ones((16, 64), np.int8), 'is I8'),
    ('weight', np.ones((2, 8, 64), ml_dtypes.float8_e4m3fn), 'two axes'),
  )
  def test_fbgemm(self, end, part, message):
    parts, _ = checkpoints.golden('ct/fp8_dynamic')
    settings = {'quant_method': 'fbgemm_fp8'}
    self.refused_parts({**parts, end: part}, settings, message)

  def test_bitsandbytes(self):
    for case, end, message in (
      ('bnb_nf4', 'weight.absmax', 'absmax is missing'),
      ('bnb_nf4', 'weight.quant_map', 'is not the table of NF4'),
      ('bnb_fp4', 'weight.quant_map', 'is not the table of FP4'),
      ('bnb_nf4_nested', 'weight.nested_absmax', 'nested_absmax is missing'),
      ('bnb_nf4_nested', 'weight.nested_quant_map', 'quant_map is missing'),
      (
        'bnb_nf4',
        'weight.quant_state.bitsandbytes__nf4',
        'part of a quantized',
      ),
    ):
      parts, _ = checkpoints.golden(case)
      if end == 'weight.quant_map':
        parts[end] = parts[end][::-1]
      else:
        parts.pop(end, None)
      self.refused_parts(parts, None, message)
    parts, _ = checkpoints.golden('bnb_nf4')
    state = parts['weight.quant_state.bitsandbytes__nf4'].tobytes()
    for before, after, message in (
      (b'"nf4"', b'"fp4"', "quant_type='fp4'"),
      (b'[32, 64]', b'[32, 65]', 'numbers'),
      (b'[32, 64]', b'[2048]', 'numbers'),
      (b'[32, 64]', b'[1e9,1]', 'numbers'),
      (b'[32, 64]', b'[22, 93]', 'has 2048 numbers'),
      (b': 64', b': 48', 'blocksize=48'),
      (b': 64', b': 0', 'blocksize=0'),
      (b': 64', b': 32', r'expected F32 \(64,\)'),
      (b'float16', b'int8', "dtype='int8'"),
      (b'{', b'[', 'delimiter'),
      (b'{', b'[' * 10_000, 'too deeply'),
    ):
      text = np.frombuffer(state.replace(before, after, 1), np.uint8)
      again = {**parts, 'weight.quant_state.bitsandbytes__nf4': text}
      self.refused_parts(again, None, message)
    parts, _ = checkpoints.golden('bnb_nf4_nested')
    state = parts['weight.quant_state.bitsandbytes__nf4'].tobytes()
    for before, after, message in (
      (b'"nested_blocksize": 256', b'"nested_blocksize": 128', 'size=128'),
      (b'"nested_dtype": "float32"', b'"nested_dtype": "float16"', 'float16'),
      (b'"nested_offset": ', b'"nested_offset": 1e99, "x": ', 'no float32'),
      (b'"nested_offset"', b'"x"', 'nested_offset=nan'),
      (b'"nested_blocksize"', b'"x"', 'absmax.* is U8'),
    ):
      self.assertIn(before, state)
      text = np.frombuffer(state.replace(before, after, 1), np.uint8)
      again = {**parts, 'weight.quant_state.bitsandbytes__nf4': text}
      self.refused_parts(again, None, message)
    plain, _ = checkpoints.golden('bnb_nf4')
    plain['weight.nested_absmax'] = parts['weight.nested_absmax']
    self.refused_parts(plain, None, 'nested_absmax is not known')

  @parameterized.parameters(
    ('SCB', np.ones(11, np.float32), r'expected F32 \(12,\)'),
    ('SCB', np.ones(12, np.float16), 'is F16'),
    ('weight', np.ones((12, 20), np.uint8), 'is U8'),
    ('weight', np.ones(12, np.int8), 'expected rows'),
    ('weight_format', np.uint8(1), 'not in rows'),
    ('weight_format', np.float32(0), 'is F32'),
  )
  def test_int8_of_bitsandbytes(self, end, part, message):
    parts, _ = checkpoints.golden('bnb_int8')
    settings = {'quant_method': 'bitsandbytes'}
    self.refused_parts({**parts, end: part}, settings, message)

  @parameterized.parameters(
    'ct/int4_g32_sym',
    'ct/int8_w8a8',
    'ct/fp8_tensor',
    'ct/nvfp4',
    'ct/mxfp4',
    'ct/mxfp8',
    'modelopt_nvfp4',
    'modelopt_mxfp4',
    'deepseek_fp8_block16',
    'awq_gemm_g32',
    'gptq4_g32',
  )
  def test_nothing_is_known_of_it(self, case):
    parts, _ = checkpoints.golden(case)
    self.refused_parts(parts, None, 'no config.json')
    settings = {'quant_method': 'mxfp4'}
    self.refused_parts(parts, settings, 'has no place for it')

  @parameterized.parameters(
    ({'_blocks': 'u1', '_scales': 'u1'}, None),
    ({'.blocks': 'u1', '.scales': 'u1'}, None),
    ({'.weight': 'u4', '.scales': 'f2', '.biases': 'f2'}, None),
    ({'.weight': 'u1', '.scale': 'f4'}, None),
    ({'': 'u1', '_scale': 'f4'}, None),
    ({'': 'i1', '_scale_inv': 'f4'}, None),
    ({'._weight_qdata': 'i1'}, None),
    ({'.weight.absmax': 'f4'}, None),
    ({'.weight.quant_state.bitsandbytes__int4': 'u1'}, None),
    ({'.weight': 'i1', '.SCB': 'f4'}, None),
    ({'.weight': 'i1'}, checkpoints.GPTQ),
    ({'.weight': 'i4'}, checkpoints.AWQ),
    ({'.weight': ml_dtypes.float8_e4m3fn}, checkpoints.TILES),
    ({'.gate_up_proj': ml_dtypes.float8_e4m3fn}, checkpoints.TILES),
    ({'.gate_up_proj': ml_dtypes.float4_e2m1fn}, checkpoints.MODELOPT),
    ({'.gate_up_proj_packed': 'i4', '.gate_up_proj_scale': 'f4'}, None),
    ({'.gate_up_proj': 'i1'}, checkpoints.TILES),
    ({'.gate_up_proj': 'u4'}, checkpoints.TILES),
  )
  def test_layouts_of_others(self, ends, settings):
    tensors = {
      checkpoints.MODULE + end: np.ones((2, 4), dtype)
      for end, dtype in ends.items()
    }
    self.refused(tensors, settings, 'quantized')


NONSENSE = (
  *(None, True, 0, 1, -7, 1.5, 10**30, '', 'int', 'Linear', 're:.*'),
  *([], [0], [[]], {}, {'a': 1}),
)


def places(node):
  """(parent, key) of everything in a JSON value."""
  items = node.items() if isinstance(node, dict) else enumerate(node)
  for key, value in items:
    yield node, key
    if isinstance(value, dict | list):
      yield from places(value)


def edits(node):
  """A JSON value with each of its parts replaced by each nonsense."""
  for place in range(len(list(places(node)))):
    for value in NONSENSE:
      edited = json.loads(json.dumps(node))
      parent, key = list(places(edited))[place]
      parent[key] = value
      yield edited


class FuzzTest(parameterized.TestCase):
  """Damaged files give a ValueError, or tensors that are whole."""

  def folders(self):
    """(tensors, checkpoints.configuration) of every layout."""
    for case in checkpoints.goldens()[0]:
      parts, _ = checkpoints.golden(case)
      if case.startswith('ct/'):
        yield parts, checkpoints.configuration(case)
      elif case in checkpoints.SETTINGS:
        yield parts, checkpoints.SETTINGS[case]
      elif case.startswith('bnb'):
        yield parts, None
      elif case.startswith('gptq'):
        parts['qzeros'] = parts.pop('qzeros_v2')
        yield parts, {**checkpoints.GPTQ, 'bits': int(case[4])}
      elif case == 'hf_mxfp4':
        parts = {f'x_{end}': part for end, part in parts.items()}
        yield parts, {'quant_method': 'mxfp4'}
      elif case == 'awq_gemm_g32':
        yield parts, checkpoints.AWQ
      else:
        yield (
          parts,
          {**checkpoints.MODELOPT, 'quant_algo': case.split('_')[1].upper()},
        )

    parts, _ = checkpoints.golden('ct/int4_g32_sym')
    parts['weight_g_idx'] = np.arange(64, dtype=np.int32) % 2
    config = checkpoints.configuration('ct/int4_g32_sym')
    yield parts, checkpoints.changed(config, actorder='group')

  def mutations(self, data: bytes, random):
    start, length = random.randint(len(data)), random.randint(1, 32)
    flipped = bytearray(data)
    flipped[start] ^= 1 << random.randint(8)
    digits = [m.start() for m in re.finditer(rb'\d', data[:4096])]
    edited = bytearray(data)
    if digits:
      edited[digits[random.randint(len(digits))]] = random.randint(48, 58)
    yield data[:start]
    yield bytes(flipped)
    yield bytes(edited)
    yield data[:start] + data[start + length :]
    yield data[:start] + random.bytes(length) + data[start:]
    yield data[:start] + data[start : start + length] + data[start:]

  def check(self, folder):
    try:
      for tensor in safetensors.open(folder).values():
        if isinstance(tensor, qarray.QArray):
          qarray.validate(tensor)
        elif isinstance(tensor, ops.Transformed):
          qarray.validate(tensor.weight)
    except ValueError as error:
      self.assertIn(str(folder), str(error))

  def edit(self, step):
    """Nonsense in configurations and headers, every so often."""
    with tempfile.TemporaryDirectory() as name:
      path = pathlib.Path(name, 'model.safetensors')
      config = pathlib.Path(name, 'config.json')
      for tensors, settings in self.folders():
        config.unlink(missing_ok=True)
        safetensors.save(path, tensors, overwrite=True)
        whole = path.read_bytes()
        size = 8 + int.from_bytes(whole[:8], 'little')
        header = json.loads(whole[8:size])
        if settings:
          for edited in itertools.islice(edits(settings), 0, None, step):
            config.write_text(json.dumps({'quantization_config': edited}))
            self.check(name)
          config.write_text(json.dumps({'quantization_config': settings}))
        for edited in itertools.islice(edits(header), 0, None, step):
          path.write_bytes(checkpoints.file_of(edited, whole[size:]))
          self.check(name)

  def fuzz(self, rounds):
    random = np.random.RandomState(rounds)
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      for tensors, settings in self.folders():
        for file in folder.iterdir():
          file.unlink()
        path = folder / 'model.safetensors'
        safetensors.save(path, tensors)
        files = {path: path.read_bytes()}
        if settings:
          config = folder / 'config.json'
          files[config] = json.dumps({'quantization_config': settings}).encode()
        for _ in range(rounds):
          for damaged, data in files.items():
            for file, whole in files.items():
              file.write_bytes(whole)
            for mutation in self.mutations(data, random):
              damaged.write_bytes(mutation)
              self.check(folder)

  def test_some_mutations(self):
    self.fuzz(1)
    self.edit(37)  # shares no factor with the number of nonsense values

  @pytest.mark.slow
  @pytest.mark.long('thousands of files')
  def test_thousands_of_mutations(self):
    self.fuzz(30)
    self.edit(1)


if __name__ == '__main__':
  absltest.main()
