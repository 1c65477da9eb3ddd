"""Act-order: columns of a weight in groups of any order, read and written.

The oracle is the definition of the layouts, column by column: with g the group
of column i, w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]. Codes are small
and scales are float16, so the products are exact in float32.
"""

import contextlib
import io
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, ops, transforms
from lowbit_jax.io import __main__ as command, safetensors
from tests import checkpoints

OUTPUTS, INPUTS, GROUP = 32, 96, 64  # the last group has 32 columns
COUNT = 2
# What is exported has whole groups.
WHOLE = mock.patch.dict(globals(), INPUTS=2 * GROUP)
NAME = f'{checkpoints.MODULE}.weight'
OTHERS = (
  transforms.Permutation(np.arange(64)[::-1].copy()),
  transforms.Hadamard(32),
  transforms.Hadamard(32, signs=np.resize(np.int8([1, -1, 1]), 64)),
  transforms.DiagonalSmoothing(np.linspace(1, 2, 64, dtype=np.float32)),
  transforms.BlockAffine(2 * np.eye(32, dtype=np.float32)),
  transforms.Chain(
    (
      transforms.DiagonalSmoothing(np.linspace(1, 2, 64, dtype=np.float32)),
      transforms.Permutation(np.arange(64)[::-1].copy()),
      transforms.Hadamard(32),
    )
  ),
)


def numbers(bits):
  """Codes, zero points, scales, and the group of each column."""
  random = np.random.RandomState(bits)
  codes = random.randint(0, 2**bits, (OUTPUTS, INPUTS))
  zeros = random.randint(1, 2**bits, (OUTPUTS, COUNT))
  scales = random.uniform(0.5, 2, (OUTPUTS, COUNT)).astype(np.float16)
  groups = random.permutation(INPUTS) // GROUP
  return codes, zeros, scales, groups.astype(np.int32)


def dense(codes, zeros, scales, groups):
  out = np.empty(codes.shape)
  for i, g in enumerate(groups):
    out[:, i] = (codes[:, i] - zeros[:, g]) * scales[:, g].astype(np.float64)
  return out


def gptq(bits, version=2):
  """The parts of a weight, the configuration, and the weight."""
  codes, zeros, scales, groups = numbers(bits)
  parts = {
    'qweight': np.ascontiguousarray(checkpoints.dense_words(codes, bits).T),
    'qzeros': checkpoints.dense_words(zeros.T - (version == 1), bits),
    'scales': np.ascontiguousarray(scales.T),
    'g_idx': groups,
  }
  config = {
    **{'quant_method': 'gptq', 'bits': bits, 'group_size': GROUP},
    **{'desc_act': True, 'checkpoint_format': 'gptq' + '_v2' * (version == 2)},
  }
  return parts, config, dense(codes, zeros, scales, groups)


def pack_quantized(bits, symmetric):
  """The same of compressed-tensors."""
  codes, zeros, scales, groups = numbers(bits)
  parts = {
    'weight_packed': checkpoints.dense_words(codes, bits),
    'weight_scale': scales,
    'weight_shape': np.array([OUTPUTS, INPUTS]),
    'weight_g_idx': groups,
  }
  if symmetric:
    zeros = np.full_like(zeros, 2 ** (bits - 1))
  else:
    words = checkpoints.dense_words(zeros.T, bits).T
    parts['weight_zero_point'] = np.ascontiguousarray(words)
  config = checkpoints.changed(
    checkpoints.configuration('ct/int4_g32_sym'),
    **{'num_bits': bits, 'symmetric': symmetric},
    **{'group_size': GROUP, 'actorder': 'group'},
  )
  return parts, config, dense(codes, zeros, scales, groups)


class ActOrderTest(checkpoints.FolderTest):
  def open(self, parts, config, folder=None):
    if parts is not None:
      prefix = f'{checkpoints.MODULE}.'
      self.write({prefix + end: part for end, part in parts.items()}, config)
    checkpoint = safetensors.open(folder or self.folder)
    self.addCleanup(checkpoint.close)
    return checkpoint

  def assert_is(self, t, expected):
    """Checks a weight by the definition of a permutation, in NumPy."""
    self.assertIsInstance(t, ops.Transformed)
    self.assertEqual((t.axis, t.transform.axis), (-1, -1))
    self.assertTrue(all(isinstance(x, np.ndarray) for x in jax.tree.leaves(t)))
    order = t.transform.order
    np.testing.assert_array_equal(
      checkpoints.decode(t.weight), expected[:, order]
    )

  def assert_same(self, a, b):
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
      self.assertEqual(x.dtype, y.dtype)
      np.testing.assert_array_equal(x, y)

  @parameterized.parameters((2, 2), (3, 1), (3, 2), (4, 1), (4, 2), (8, 2))
  def test_gptq(self, bits, version):
    parts, config, expected = gptq(bits, version)
    checkpoint = self.open(parts, config)
    layout = f'GPTQ {bits} bits, version {version}, act-order'
    self.assertEqual(checkpoint.tensors[NAME].layout, layout)
    self.assertEqual(checkpoint.tensors[NAME].shape, (OUTPUTS, INPUTS))
    t = checkpoint[NAME]
    self.assertEqual(t.weight.fmt.name, f'uint{bits}_g64_float16')
    self.assert_is(t, expected)

  @parameterized.product(bits=(2, 3, 4, 5, 8), symmetric=(False, True))
  def test_compressed_tensors(self, bits, symmetric):
    parts, config, expected = pack_quantized(bits, symmetric)
    checkpoint = self.open(parts, config)
    self.assertEqual(
      checkpoint.tensors[NAME].layout,
      'compressed-tensors pack-quantized, act-order',
    )
    self.assert_is(checkpoint[NAME], expected)

  def test_weights_of_whole_bytes(self):
    parts, config, expected = pack_quantized(8, True)
    codes = parts.pop('weight_packed').view(np.uint8) ^ 0x80
    parts = {**parts, 'weight': codes.view(np.int8)}
    del parts['weight_shape']
    config = checkpoints.changed(config, format='int-quantized')
    self.assert_is(self.open(parts, config)[NAME], expected)

  def test_the_product_in_jax(self):
    parts, config, expected = gptq(4)
    t = self.open(parts, config)[NAME]
    np.testing.assert_array_equal(lowbit_jax.dequantize(t), expected)
    # Small integers, so that sums are exact in every order.
    x = np.random.RandomState(0).randint(-2, 3, (3, INPUTS)).astype(np.float32)
    t = ops.Transformed(t.weight.astype(jnp.float32), t.transform, t.axis)
    y = lowbit_jax.dot(x, t.mT)
    bound = INPUTS * 2**-24 * (abs(x).astype('f8') @ abs(expected).T)
    self.assertTrue((abs(y - x @ expected.T) <= bound).all())

  def test_columns_of_a_group_keep_their_order(self):
    parts, config, _ = gptq(4)
    order = self.open(parts, config)[NAME].transform.order
    self.assertEqual(order.dtype, np.int32)
    np.testing.assert_array_equal(
      order,
      [
        i for g in range(COUNT) for i in range(INPUTS) if parts['g_idx'][i] == g
      ],
    )

  def test_groups_in_order_stay_plain(self):
    parts, config, _ = gptq(4)
    for groups in (np.arange(INPUTS) // GROUP, np.full(INPUTS, -1)):
      parts['g_idx'] = groups.astype(np.int32)
      static = {**config, 'static_groups': True}
      checkpoint = self.open(parts, static)
      self.assertNotIn('act-order', checkpoint.describe())
      self.assertIsInstance(checkpoint[NAME], lowbit_jax.QArray)

  def test_the_command_says_so(self):
    for parts, config, _ in (gptq(4), pack_quantized(4, True)):
      self.write(
        {f'{checkpoints.MODULE}.{k}': v for k, v in parts.items()}, config
      )
      text = io.StringIO()
      with contextlib.redirect_stdout(text):
        self.assertEqual(command.main([self.folder]), 0)
      self.assertIn('act-order', text.getvalue())

  @parameterized.product(bits=(3, 4, 5), symmetric=(False, True))
  @WHOLE
  def test_export_gives_the_same_bytes(self, bits, symmetric):
    parts, config, _ = pack_quantized(bits, symmetric)
    checkpoint = self.open(parts, config)
    folder = f'{self.folder}/out'
    safetensors.export(folder, checkpoint)
    again = self.open(None, None, folder)
    self.assert_same(again[NAME], checkpoint[NAME])
    stored = safetensors._container.File(f'{folder}/model.safetensors').tensors
    self.assertLen(stored, len(parts))
    for end, part in parts.items():
      found = stored[f'{checkpoints.MODULE}.{end}'].read()
      self.assertEqual(found.dtype, part.dtype)
      np.testing.assert_array_equal(found, part)
    text = pathlib.Path(folder, 'config.json').read_text()
    groups = json.loads(text)['quantization_config']['config_groups']
    self.assertEqual(groups['group_0']['weights']['actorder'], 'group')

  @WHOLE
  def test_export_of_gptq(self):
    parts, config, expected = gptq(4)
    folder = f'{self.folder}/out'
    safetensors.export(folder, self.open(parts, config))
    self.assert_is(self.open(None, None, folder)[NAME], expected)

  @parameterized.parameters(
    (formats.grouped(formats.int4, 32), OTHERS[1], -1, 'no transform but'),
    (formats.grouped(formats.int4, 32), OTHERS[0], -2, 'no transform but'),
    (formats.mxfp4, OTHERS[0], -1, 'integers in groups'),
    (formats.int8_channel, OTHERS[0], -1, 'integers in groups'),
    (formats.nf4_g64, OTHERS[0], -1, 'nf4_g64'),
  )
  def test_export_refuses(self, fmt, transform, axis, message):
    q = checkpoints.random_qarray(fmt, (64, 64), np.random.RandomState(0))
    t = ops.Transformed(q, transform, axis)
    with self.assertRaisesRegex(ValueError, f"'a.weight'.*{message}"):
      safetensors.export(f'{self.folder}/out', {'a.weight': t})


class OwnLayoutsTest(checkpoints.FolderTest):
  """Weights behind transforms in the files of this library."""

  def weight(self, transform):
    q = checkpoints.random_qarray(
      formats.nvfp4, (16, 64), np.random.RandomState(0)
    )
    return ops.Transformed(q, transform, -1)

  def assert_same(self, a, b):
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
      self.assertEqual(x.dtype, y.dtype)
      np.testing.assert_array_equal(x, y)

  @parameterized.parameters(*OTHERS)
  def test_round_trip(self, transform):
    t = self.weight(transform)
    tree = {'one': t, 'stack': jax.tree.map(lambda x: np.stack([x, x]), t)}
    safetensors.save(self.path, tree)
    with safetensors.open(self.path) as checkpoint:
      self.assertEqual(checkpoint.tensors['stack'].shape, (2, 16, 64))
      self.assert_same(dict(checkpoint), tree)
    lowbit_jax.io.save(self.path, tree, overwrite=True)
    self.assert_same(lowbit_jax.io.load(self.path), tree)

  def test_transforms_of_other_classes(self):
    t = self.weight(transforms.Chain((transforms.Chain(OTHERS[:2]),)))
    for save in (safetensors.save, lowbit_jax.io.save):
      with self.assertRaisesRegex(TypeError, 'is a Chain; files know'):
        save(self.path, {'a': t})

  def test_chains_that_no_weight_has(self):
    node = {'class': 'Hadamard', 'block': 32, 'axis': -1}
    chain = {'class': 'Chain', 'transforms': [node]}
    signs = np.ones(64, np.int8)
    joined = lowbit_jax.io._transforms.joined
    self.assertLen(joined(chain, {'0.signs': signs}, 0).transforms, 1)
    for message, changes, arrays in (
      ('is no Chain of transforms', {'class': 'Hadamard'}, {}),
      ('is no Chain of transforms', {'axis': -1}, {}),
      ('not of 1 to', {'transforms': []}, {}),
      ('not of 1 to', {'transforms': [node] * 101}, {}),
      ('not of 1 to', {'transforms': 'Hadamard'}, {}),
      ("'Chain' is none of", {'transforms': [chain]}, {}),
      ("an array '1.signs' too many", {}, {'1.signs': signs}),
      ("an array 'signs' too many", {}, {'signs': signs}),
      ('no Hadamard of', {}, {'0.scale': signs}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        joined(chain | changes, arrays, 0)

  @parameterized.parameters(
    ({'axis': 0}, 'count from the end'),
    ({'axis': -3}, 'out of range'),
    ({'axis': -2}, 'does not fit'),
    ({'axis': None}, 'must be ints'),
    ({'rank': 3}, 'rank=3'),
    ({'rank': -1}, 'no Permutation'),
    ({'rank': 1}, 'vector'),
    ({'transform': None}, 'transform None is none of'),
    ({'transform': {'class': 'Chain'}}, "transform 'Chain' is none of"),
    ({'transform': {'class': 'Permutation'}}, 'no Permutation of'),
    ({'transform': {'class': 'Permutation', 'axis': '-1'}}, 'no Permutation'),
    ({'transform': {'class': 'Permutation', 'axis': 1}}, 'must be negative'),
    ({'transform': {'class': 'Hadamard', 'axis': -1, 'block': 3}}, 'no Hada'),
    ({'arrays': []}, 'no Permutation'),
    ({'arrays': ['other']}, 'other.* is missing'),
    ({'arrays': 3}, 'arrays=3'),
    ({'weight': {}}, 'no object of'),
    ({'order': np.zeros(64, np.int32)}, 'not a permutation'),
    ({'order': np.zeros(64, np.float32)}, 'integers'),
    ({'order': np.arange(63)}, 'does not fit'),
    ({'order': np.arange(64).reshape(8, 8)}, 'vector'),
  )
  def test_descriptions_that_no_weight_has(self, changes, message):
    t = self.weight(OTHERS[0])
    safetensors.save(self.path, {'a': t})
    file = safetensors._container.File(self.path)
    key = safetensors._qarrays.KEY
    node = json.loads(file.metadata[key])
    parts = {name: np.array(part.read()) for name, part in file.tensors.items()}
    file.close()
    changes = dict(changes)
    if 'order' in changes:
      parts['a.transform.order'] = changes.pop('order')
    node['a'].update(changes)
    text = {key: json.dumps(node)}
    safetensors.save(self.path, parts, text, overwrite=True)
    with self.assertRaisesRegex(ValueError, f"'a'.*{message}"):
      safetensors.open(self.path)['a']

  def test_jax_export(self):
    t = self.weight(OTHERS[0])
    exported = jax.export.export(jax.jit(lambda t: t.mT))(t)
    again = jax.export.deserialize(exported.serialize())
    self.assertEqual(again.in_tree, exported.in_tree)
    self.assert_same(again.call(t), jax.tree.map(np.asarray, t.mT))


if __name__ == '__main__':
  absltest.main()
