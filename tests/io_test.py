"""Tests of saving, loading, and serialization by jax.export."""

import functools
import json
import os
import tempfile
import zipfile
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, io


@functools.cache
def tree():
  w = np.random.RandomState(0).standard_normal((50, 24)).astype(np.float32)
  names = ('mxfp4', 'nvfp4', 'uint4_g32', 'nf4_g64', 'nvfp4_16x16')
  shapes = jax.eval_shape(
    lambda w: {name: lowbit.quantize(w, formats.get(name)) for name in names},
    w,
  )
  random = np.random.RandomState(1)
  leaf = lambda s: jnp.asarray(random.randint(0, 99, s.shape).astype(s.dtype))
  return {
    'quantized': jax.tree.map(leaf, shapes),
    'half': [jnp.ones((2, 3), jnp.bfloat16), (jnp.float16(1), None)],
    'fp8': jnp.ones(3, jnp.float8_e4m3fn),
    'empty': jnp.zeros((0, 4)),
    'wide': np.arange(3, dtype=np.int64) + 2**40,
    'step': 3,
    'name': 'run',
  }


class IoTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.path = os.path.join(directory.name, 'tree.lowbit')

  def test_round_trip(self):
    before = tree()
    io.save(self.path, before)
    after = io.load(self.path)
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(before))
    for a, b in zip(
      jax.tree.leaves(after), jax.tree.leaves(before), strict=True
    ):
      np.testing.assert_array_equal(a, b)
      self.assertEqual(getattr(a, 'dtype', None), getattr(b, 'dtype', None))

  def test_format_needs_no_registry(self):
    custom = formats.BlockFormat(
      'mine', formats.minifloat(3, 1, 'none'), (24,), formats.bfloat16
    )
    q = jax.jit(lambda x: lowbit.quantize(x, custom))(np.arange(48.0))
    io.save(self.path, {'q': q})
    self.assertEqual(io.load(self.path)['q'].fmt, custom)

  def test_nothing_is_overwritten_silently(self):
    io.save(self.path, {'a': 1})
    with self.assertRaisesRegex(FileExistsError, 'overwrite=True'):
      io.save(self.path, {'a': 2})
    self.assertEqual(io.load(self.path), {'a': 1})
    io.save(self.path, {'a': 2}, overwrite=True)
    self.assertEqual(io.load(self.path), {'a': 2})

  def test_an_interrupted_save_keeps_the_old_file(self):
    io.save(self.path, {'a': 1})
    with mock.patch.object(
      np.lib.format, 'write_array', side_effect=KeyboardInterrupt
    ):
      with self.assertRaises(KeyboardInterrupt):
        io.save(self.path, {'a': jnp.ones(3)}, overwrite=True)
    self.assertEqual(io.load(self.path), {'a': 1})
    self.assertEqual(os.listdir(os.path.dirname(self.path)), ['tree.lowbit'])

  @parameterized.parameters(
    ({1: 2}, 'keys are strings'),
    ({'a': {'b': object()}}, r"tree\['a'\]\['b'\] is a object"),
    ({'a': [set()]}, r"tree\['a'\]\[0\] is a set"),
  )
  def test_unknown_nodes_are_named(self, value, message):
    with self.assertRaisesRegex(TypeError, message):
      io.save(self.path, value)
    self.assertFalse(os.path.exists(self.path))

  @parameterized.parameters(0, 10, 200, -30)
  def test_a_truncated_file_is_a_clear_error(self, size):
    io.save(self.path, tree())
    with open(self.path, 'rb') as f:
      data = f.read()
    with open(self.path, 'wb') as f:
      f.write(data[:size])
    with self.assertRaisesRegex(ValueError, 'cannot load path=.*tree.lowbit'):
      io.load(self.path)

  def test_a_flipped_bit_is_noticed(self):
    io.save(self.path, {'a': jnp.zeros(1000)})
    with open(self.path, 'r+b') as f:
      data = f.read()
      f.seek(data.index(b'\0' * 400) + 200)
      f.write(b'\1')
    with self.assertRaisesRegex(ValueError, 'cannot load'):
      io.load(self.path)

  def test_other_files_are_refused(self):
    np.savez(self.path + '.npz', a=np.ones(3))
    with self.assertRaisesRegex(ValueError, 'cannot load'):
      io.load(self.path + '.npz')
    with self.assertRaises(FileNotFoundError):
      io.load(self.path)

  def test_newer_versions_are_refused(self):
    io.save(self.path, {'a': 1})
    with zipfile.ZipFile(self.path) as archive:
      manifest = json.loads(archive.read('manifest.json'))
    manifest['version'] += 1
    with zipfile.ZipFile(self.path, 'w') as archive:
      archive.writestr('manifest.json', json.dumps(manifest))
    with self.assertRaisesRegex(ValueError, 'upgrade lowbit_jax'):
      io.load(self.path)

  def test_export_keeps_the_format(self):
    random = np.random.RandomState(0)
    w = random.standard_normal((64, 8)).astype(np.float32)
    q = lowbit.quantize(w, formats.mxfp4, axis=-2)
    x = jnp.ones((2, 64))
    exported = jax.export.export(jax.jit(lowbit.dot))(x, q)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(x, q), lowbit.dot(x, q))
    other = lowbit.quantize(w, formats.mxfp8_e4m3, axis=-2)
    with self.assertRaises(ValueError):
      restored.call(x, other)

  def test_narrow_dtypes_keep_their_bits(self):
    x = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2)
    io.save(self.path, {'x': x})
    after = np.asarray(io.load(self.path)['x']).view(np.uint8)
    np.testing.assert_array_equal(after, np.arange(256))


if __name__ == '__main__':
  absltest.main()
