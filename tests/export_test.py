"""Folders of compressed-tensors that are written."""

import dataclasses
import json
import os
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import formats, qarray
from lowbit_jax.io import safetensors
from tests import checkpoints

GROUPED = (
  *(formats.grouped(formats.get(f'int{b}'), 32) for b in range(2, 9)),
  *(formats.grouped(formats.get(f'uint{b}'), 16) for b in range(2, 9)),
  formats.grouped(formats.int4, 64, formats.bfloat16),
  formats.fp8_1x128,
)
UNGROUPED = (
  *(formats.int8_channel, formats.int4_channel, formats.int8_tensor),
  *(formats.e4m3fn_tensor, formats.e4m3fn_channel, formats.fp8_128x128),
)


class ExportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.source = pathlib.Path(directory.name, 'source')
    self.source.mkdir()
    self.target = pathlib.Path(directory.name, 'target')

  def imported(self, case):
    parts, _ = checkpoints.golden(case)
    config = checkpoints.configuration(case)
    tensors = {
      f'{checkpoints.MODULE}.{end}': part for end, part in parts.items()
    }
    path = self.source / 'model.safetensors'
    safetensors.save(path, tensors, {'format': 'pt'}, overwrite=True)
    text = json.dumps({'hidden_size': 64, 'quantization_config': config})
    (self.source / 'config.json').write_text(text)
    return safetensors.open(self.source)

  @parameterized.parameters(
    *('int4_g32_sym', 'int4_g32_asym', 'int3_g32_asym', 'int5_g32_sym'),
    *('int8_channel_pack', 'fp8_dynamic', 'fp8_tensor', 'fp8_block'),
    *('nvfp4', 'mxfp4', 'mxfp6', 'mxfp8'),
  )
  def test_byte_for_byte(self, case):
    with self.imported(f'ct/{case}') as checkpoint:
      safetensors.export(self.target, checkpoint, self.source)
    before, after = (
      (folder / 'model.safetensors').read_bytes()
      for folder in (self.source, self.target)
    )
    if case == 'nvfp4':  # Several numbers have one reciprocal.
      name = f'{checkpoints.MODULE}.weight'
      again = safetensors.open(self.target)[name]
      with self.imported('ct/nvfp4') as checkpoint:
        np.testing.assert_array_equal(
          again.tensor_scale, checkpoint[name].tensor_scale
        )
      self.assertLess(
        sum(a != b for a, b in zip(after, before, strict=True)), 3
      )
    else:
      self.assertEqual(after, before)
    config = json.loads((self.target / 'config.json').read_text())
    self.assertEqual(config['hidden_size'], 64)
    expected = checkpoints.configuration(f'ct/{case}')
    group = expected['config_groups']['group_0']
    group = {
      **group,
      'targets': [checkpoints.MODULE],
      'format': expected['format'],
    }
    group['input_activations'] = None
    settings = config['quantization_config']
    self.assertEqual(settings['config_groups'], {'group_0': group})

  def exported(self, **options):
    """Exports weights of many formats; gives them, and what comes back."""
    random = np.random.RandomState(0)
    tensors = {
      f'{fmt.name}.weight': checkpoints.random_qarray(fmt, shape, random)
      for formats_, shape in ((GROUPED, (3, 4, 256)), (UNGROUPED, (13, 221)))
      for fmt in formats_
    }
    tensors['nvfp4.weight'] = checkpoints.random_qarray(
      formats.nvfp4, (4, 64), random
    )
    tensors['norm.weight'] = random.rand(7).astype(ml_dtypes.bfloat16)
    tensors['nvfp4.input_scale'] = np.array(3, np.float32)
    safetensors.export(self.target, tensors, self.source, **options)
    return tensors, safetensors.open(self.target)

  def assert_same(self, after, before):
    self.assertEqual(type(after), type(before))
    if isinstance(before, np.ndarray):
      np.testing.assert_array_equal(after, before)
      return
    self.assertEqual(after.fmt, before.fmt)
    self.assertEqual(after.shape, before.shape)
    np.testing.assert_array_equal(
      checkpoints.decode(after), checkpoints.decode(before)
    )

  def test_many_formats_in_shards(self):
    for name in ('tokenizer.json', 'LICENSE', 'config.json', 'model.bin'):
      (self.source / name).write_text('{"a": 1, "quantization": {}}')
    (self.source / 'tokenizer_config.json').write_text('{}')
    for name in (
      'hf_quant_config.json',
      'quantize_config.json',
      'a.safetensors',
    ):
      (self.source / name).write_text('{}')
    (self.source / 'folder').mkdir()
    before, after = self.exported(shard_bytes=10_000)
    self.assertCountEqual(after, before)
    for name in before:
      self.assert_same(after[name], before[name])
    names = sorted(path.name for path in self.target.iterdir())
    shards = [name for name in names if name.startswith('model-000')]
    self.assertGreater(len(shards), 3)
    self.assertEqual(
      [name for name in names if name not in shards],
      [
        *('LICENSE', 'config.json', 'model.safetensors.index.json'),
        *('tokenizer.json', 'tokenizer_config.json'),
      ],
    )
    config = json.loads((self.target / 'config.json').read_text())
    self.assertEqual(set(config), {'a', 'quantization_config'})
    settings = config['quantization_config']
    self.assertEqual(settings['format'], 'mixed-precision')
    self.assertLen(settings['config_groups'], len(before) - 2)

  def test_dense_models_and_nothing_to_copy(self):
    tensors = {'x': np.float32(1)}
    safetensors.export(self.target, tensors)
    self.assertEqual(os.listdir(self.target), ['model.safetensors'])
    self.assertEqual(dict(safetensors.open(self.target)), tensors)
    with self.assertRaisesRegex(FileExistsError, 'exists; choose another'):
      safetensors.export(self.target, tensors)

  @parameterized.parameters(
    ('nf4_g64', 'a.weight', 'has no layout'),
    ('mxfp8_e5m2', 'a.weight', 'has no layout'),
    ('mxfp4_32x32', 'a.weight', 'has no layout'),
    ('int4_g32', 'a.bias', 'must be the weight of a module'),
    ('mxfp4', 'a.weight', 'no whole blocks of 32; give each row one scale'),
    ('int4_g32', 'a.weight', 'no whole blocks of 32'),
    ('fp8_1x128', 'a.weight', 'no whole blocks of 128'),
  )
  def test_refused(self, fmt, name, message):
    q = checkpoints.random_qarray(
      formats.get(fmt), (4, 70), np.random.RandomState(0)
    )
    with self.assertRaisesRegex(ValueError, f"'{name}'.*({message})"):
      safetensors.export(self.target, {name: q})
    self.assertEqual(os.listdir(self.target.parent), ['source'])

  def test_refused_places(self):
    random = np.random.RandomState(0)
    int3 = formats.per_channel(formats.get('int3'))
    q = checkpoints.random_qarray(int3, (64, 70), random)
    with self.assertRaisesRegex(ValueError, "'weight' .* in which of two ways"):
      safetensors.export(self.target, {'weight': q})
    q = checkpoints.random_qarray(formats.int4_g32, (64, 64), random)
    with self.assertRaisesRegex(ValueError, "'weight'.* pass its mT"):
      safetensors.export(self.target, {'weight': q.mT})
    four = checkpoints.random_qarray(formats.nvfp4, (4, 64), random)
    for number in (0, -1, np.nan, np.inf, 1e-45):
      scale = np.full((1, 1), number, np.float32)
      tensors = {'weight': qarray.replace(four, tensor_scale=scale)}
      with self.assertRaisesRegex(ValueError, "'weight' has the tensor scale"):
        safetensors.export(self.target, tensors)
    tensors = {'a.weight': q, 'a.weight_scale': np.ones(3)}
    for options in ({}, {'shard_bytes': 1}):
      with self.assertRaisesRegex(ValueError, "'a.weight_scale' stands for"):
        safetensors.export(self.target, tensors, **options)
    scaled = dataclasses.replace(formats.mxfp4, tensor_scale=True)
    q = checkpoints.random_qarray(scaled, (4, 64), random)
    with self.assertRaisesRegex(ValueError, 'has no layout'):
      safetensors.export(self.target, {'a.weight': q})

  @parameterized.parameters('nvfp4', 'mxfp4', 'mxfp6_e2m3', 'fp8_128x128')
  def test_stacks_that_are_refused(self, name):
    random = np.random.RandomState(0)
    q = checkpoints.random_qarray(formats.get(name), (2, 4, 128), random)
    with self.assertRaisesRegex(ValueError, "'a.weight' is a stack"):
      safetensors.export(self.target, {'a.weight': q})


if __name__ == '__main__':
  absltest.main()
