"""Safetensors files: every dtype, byte for byte, and what is damaged."""

import json
import mmap
import os
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import DamagedFileError, _qarrays, safetensors
from tests import checkpoints
from tests.ops import products


class SafetensorsTest(checkpoints.FolderTest):
  def test_every_dtype_byte_for_byte(self):
    with safetensors.open(
      checkpoints.GOLDENS / 'plain.safetensors'
    ) as checkpoint:
      tensors = dict(checkpoint)
      metadata = checkpoint.metadata
    self.assertEqual(metadata, {'format': 'pt é"\n'})
    self.assertEqual(tensors['int64'].dtype, np.int64)
    self.assertEqual(tensors['float4_e2m1fn_x2'].shape, (2, 6))
    safetensors.save(self.path, tensors, metadata)
    expected = (checkpoints.GOLDENS / 'plain.safetensors').read_bytes()
    self.assertEqual(pathlib.Path(self.path).read_bytes(), expected)

  def test_bytes_stay_in_the_file(self):
    self.write({'x': np.ones((1000, 8), np.float32)})
    checkpoint = safetensors.open(self.path)
    x = checkpoint['x']
    self.assertFalse(x.flags.owndata)
    self.assertFalse(x.flags.writeable)
    checkpoint.close()
    with self.assertRaisesRegex(ValueError, "'x'.* was closed"):
      _ = checkpoint['x']
    np.testing.assert_array_equal(x, 1)

  def test_pages_of_one_tensor_go_without_those_of_others(self):
    self.write({'x': np.ones(9, np.int8), 'y': np.ones((1000, 8), np.float32)})
    x = safetensors.open(self.path)['x']
    while isinstance(x, np.ndarray):
      x = x.base
    self.assertLess(len(x), 9 + mmap.ALLOCATIONGRANULARITY)

  def test_single_file_of_another_name(self):
    self.write({'x': np.ones(3)}, name='adapter.safetensors')
    self.assertEqual(list(safetensors.open(self.folder)), ['x'])

  @parameterized.parameters(
    'mxfp4', 'nvfp4', 'uint4_g32', 'q4_k', 'fp8_128x128', 'int4_g32_float16'
  )
  def test_qarrays_in_the_layout_of_this_library(self, name):
    q = products.make(name, 130, 256, axis=-1).astype(jnp.bfloat16)
    tensors = {'a.weight': q, 'a.bias': np.ones(3)}
    safetensors.save(self.path, tensors, {'made': 'here'})
    with safetensors.open(self.path) as checkpoint:
      self.assertEqual(list(checkpoint), ['a.weight', 'a.bias'])
      self.assertEqual(checkpoint.metadata, {'made': 'here'})
      self.assertEqual(checkpoint.tensors['a.weight'].nbytes, q.nbytes)
      back = checkpoint['a.weight']
      copy = os.path.join(self.folder, 'copy.safetensors')
      safetensors.save(copy, checkpoint, checkpoint.metadata)
    self.assertEqual(
      (back.fmt, back.axis, back.pad, back.dtype),
      (q.fmt, q.axis, q.pad, q.dtype),
    )
    jax.tree.map(np.testing.assert_array_equal, back, q)
    self.assertEqual(
      pathlib.Path(copy).read_bytes(), pathlib.Path(self.path).read_bytes()
    )

  @parameterized.named_parameters(
    (
      'format',
      {'fmt': {'kind': 'BlockFormat'}},
      'a BlockFormat has the fields',
    ),
    ('axis', {'axis': 'x'}, 'axis'),
    ('pad', {'pad': [40]}, 'pad='),
    ('pad_no_int', {'pad': ['x']}, 'pad='),
    ('dtype', {'dtype': 'int8'}, 'dtype='),
    ('merged', {'merged': [7]}, 'merged='),
    ('leaf', {'leaves': {'codes': None, 'bytes': None}}, "no leaf 'bytes'"),
    ('no_codes', {'leaves': {'scale': None}}, 'no codes'),
    ('missing', {'leaves': {'codes': None, 'minimum': None}}, 'is missing'),
    ('level', {'leaves': {'codes': None, 'scale': {}}}, 'no object of'),
    ('unknown', {'more': 1}, 'no object of'),
  )
  def test_descriptions_that_no_qarray_has(self, change, message):
    x = lowbit.quantize(jnp.ones((2, 32)), formats.mxfp4)
    node = _qarrays.description(x) | change
    text = json.dumps({'a': node})
    parts = {name: np.asarray(v) for name, v in _qarrays.arrays('a', x)}
    safetensors.save(self.path, parts, {_qarrays.KEY: text})
    with self.assertRaisesRegex(ValueError, f"model.safetensors'.*{message}"):
      safetensors.open(self.path)

  def test_leaves_that_do_not_fit(self):
    x = lowbit.quantize(jnp.ones((2, 32)), formats.mxfp4)
    text = json.dumps({'a': _qarrays.description(x)})
    for codes in (np.ones((2, 16), np.int8), np.ones((3, 16), np.uint8)):
      parts = {'a.codes': codes, 'a.scale': np.asarray(x.scale)}
      metadata = {_qarrays.KEY: text}
      safetensors.save(self.path, parts, metadata, overwrite=True)
      with self.assertRaisesRegex(ValueError, "'a': "):
        safetensors.open(self.path)
    with self.assertRaisesRegex(ValueError, 'stands for two tensors'):
      twice = {'a': x, 'a.codes': np.ones(2)}
      safetensors.save(self.path, twice, overwrite=True)

  def test_what_save_refuses(self):
    int4 = np.ones(2, ml_dtypes.int4)
    for tensors, metadata, error, message in (
      ({'x': int4}, None, TypeError, "'x' has dtype int4"),
      ({'x': np.array('text')}, None, TypeError, "'x' has dtype <U4"),
      ({'x': np.float64(1) + 1j}, None, TypeError, "'x' has dtype complex128"),
      ({3: np.ones(2)}, None, TypeError, '3 is no name'),
      ({'__metadata__': np.ones(2)}, None, TypeError, 'is no name'),
      ({'x': np.ones(2)}, {'a': 1}, TypeError, 'must map strings'),
      (
        {'x': np.ones(3, ml_dtypes.float4_e2m1fn)},
        *(None, ValueError, "'x' has 3 elements of 4 bits"),
      ),
    ):
      with self.assertRaisesRegex(error, message):
        safetensors.save(self.path, tensors, metadata)
    self.assertEqual(os.listdir(self.folder), [])
    safetensors.save(self.path, {'x': np.ones(2)})
    with self.assertRaisesRegex(FileExistsError, 'overwrite=True'):
      safetensors.save(self.path, {'y': np.ones(2)})
    safetensors.save(self.path, {'y': np.ones(2)}, overwrite=True)
    self.assertEqual(list(safetensors.open(self.path)), ['y'])

  def test_saves_big_endian_fortran_jax_and_packed(self):
    x = np.arange(6, dtype='>f4').reshape(2, 3)
    six = np.arange(8).astype(ml_dtypes.float6_e2m3fn).reshape(2, 4)
    other = np.arange(8).astype(ml_dtypes.float6_e3m2fn)
    four = np.arange(4).astype(ml_dtypes.float4_e2m1fn)
    tensors = {'x': x, 't': x.T, 'six': six, 'other': other, 'four': four}
    tensors['jax'] = jnp.arange(3)
    tensors['flag'] = np.array(True)
    safetensors.save(self.path, tensors)
    checkpoint = safetensors.open(self.path)
    self.assertEqual(checkpoint.tensors['six'].nbytes, 6)
    for name, before in tensors.items():
      after = checkpoint[name]
      self.assertEqual(after.dtype, before.dtype.newbyteorder('='))
      np.testing.assert_array_equal(after, before)


def entry(dtype='F32', shape=(2,), offsets=(0, 8), **more):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets, **more}


HOSTILE = (
  (b'', 'ends before its header'),
  (bytes(7), 'ends before its header'),
  (bytes(8), 'Expecting value'),
  (checkpoints.file_of({}, b'', 2**60), 'its header claims'),
  (checkpoints.file_of({}, b'', 3), 'its header claims'),
  (checkpoints.file_of([], b''), 'no JSON object'),
  (checkpoints.file_of(b'{"x":1', b''), 'delimiter'),
  (checkpoints.file_of(b'\xff{}', b''), 'decode'),
  (checkpoints.file_of(b'[' * 100_000, b''), 'too deeply'),
  (checkpoints.file_of(b'{"a":' * 100_000, b''), 'too deeply'),
  (checkpoints.file_of(b'{"x":NaN}', b''), 'NaN is no number'),
  (checkpoints.file_of(b'{"x":' + b'9' * 5000 + b'}', b''), 'integer'),
  (checkpoints.file_of(b'{"x":{},"x":{}}', b''), "'x' is there twice"),
  (checkpoints.file_of({'__metadata__': {'a': 1}}, b''), 'strings to strings'),
  (checkpoints.file_of({'__metadata__': []}, b''), 'strings to strings'),
  (checkpoints.file_of({'x': []}), "no dtype, shape and offsets of 'x'"),
  (
    checkpoints.file_of({'x': {'dtype': 'F32'}}),
    "no dtype, shape and offsets of 'x'",
  ),
  (
    checkpoints.file_of({'x': entry(more=1)}),
    "no dtype, shape and offsets of 'x'",
  ),
  (checkpoints.file_of({'x': entry('F33')}), "'x' has the dtype 'F33'"),
  (checkpoints.file_of({'x': entry([])}), "'x' has the dtype"),
  (checkpoints.file_of({'x': entry('F' * 10**6)}), "'x' has the dtype"),
  (checkpoints.file_of({'x' * 10**6: entry()}), 'a name of 1000000 characters'),
  (checkpoints.file_of({'\ud800': entry()}), 'surrogates'),
  (
    checkpoints.file_of({'x': entry(shape=(2.0,))}),
    "'x' has a shape that no array has",
  ),
  (
    checkpoints.file_of({'x': entry(shape=(True, 2))}),
    "'x' has a shape that no array",
  ),
  (
    checkpoints.file_of({'x': entry(shape=(-2,))}),
    "'x' has a shape that no array has",
  ),
  (
    checkpoints.file_of({'x': entry(shape=2)}),
    "'x' has a shape that no array has",
  ),
  (
    checkpoints.file_of({'x': entry(shape=(1,) * 33)}),
    "'x' has a shape that no array",
  ),
  (
    checkpoints.file_of({'x': entry(shape=(2**60, 2))}),
    "'x' has a shape that no array",
  ),
  (
    checkpoints.file_of({'x': entry(shape=(0, 2**40, 2**40))}),
    "'x' has a shape",
  ),
  (checkpoints.file_of({'x': entry(shape=(2**60,))}), "'x' has 8 bytes"),
  (checkpoints.file_of({'x': entry(shape=(3,))}), "'x' has 8 bytes"),
  (checkpoints.file_of({'x': entry(offsets=(0, 2**63))}), "offsets of 'x'"),
  (checkpoints.file_of({'x': entry(offsets=(8, 0))}), "'x' has -8 bytes"),
  (checkpoints.file_of({'x': entry(offsets=(0,))}), "offsets of 'x'"),
  (checkpoints.file_of({'x': entry(offsets=(0.0, 8.0))}), "offsets of 'x'"),
  (checkpoints.file_of({'x': entry(offsets=None)}), "offsets of 'x'"),
  (
    checkpoints.file_of({'x': entry('F4', (3,), (0, 1))}),
    'fills no whole bytes',
  ),
  (
    checkpoints.file_of({'x': entry(offsets=(8, 16))}, bytes(16)),
    "'x' leaves a hole",
  ),
  (checkpoints.file_of({'x': entry(offsets=(8, 16))}), "'x' leaves a hole"),
  (checkpoints.file_of({'x': entry()}, bytes(9)), 'its tensors have 8 bytes'),
  (checkpoints.file_of({'x': entry()}, bytes(7)), 'its tensors have 8 bytes'),
  (checkpoints.file_of({'x': entry(), 'y': entry()}), "'y' overlaps"),
  (
    checkpoints.file_of({'x': entry(), 'y': entry(offsets=(4, 12))}, bytes(12)),
    "'y' overlaps",
  ),
)


class DamageTest(checkpoints.FolderTest):
  """Whatever is in a file: a whole checkpoint, or an error that names it."""

  def put(self, data, name='model.safetensors'):
    if not isinstance(data, bytes):
      data = json.dumps(data).encode()
    pathlib.Path(self.folder, name).write_bytes(data)

  @parameterized.parameters(*HOSTILE)
  def test_refused(self, data, message):
    self.put(data)
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    with self.assertRaisesRegex(DamagedFileError, message) as raised:
      safetensors.open(self.path)
    self.assertIn(self.path, str(raised.exception))
    self.assertLess(len(str(raised.exception)), 1000)
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**24)

  def test_booleans_of_other_bytes(self):
    self.put(
      checkpoints.file_of(
        {'x': entry('BOOL', (8,))}, bytes([0, 1, 2] + [0] * 5)
      )
    )
    with self.assertRaisesRegex(DamagedFileError, "'x' has booleans"):
      _ = safetensors.open(self.path)['x']

  def test_numbers_at_odd_places(self):
    data = np.arange(2, dtype=np.float32).tobytes()
    header = {'b': entry('U8', (1,), (0, 1)), 'x': entry(offsets=(1, 9))}
    self.put(checkpoints.file_of(header, b'7' + data))
    x = safetensors.open(self.path)['x']
    self.assertTrue(x.flags.aligned)
    self.assertEqual(x.tolist(), [0, 1])

  def test_what_is_no_file(self):
    os.mkfifo(self.path)
    for path in (self.path, '/dev/zero', self.folder):
      with self.assertRaisesRegex(DamagedFileError, 'no regular file'):
        safetensors.open(path)
    os.unlink(self.path)
    with self.assertRaises(FileNotFoundError):
      safetensors.open(self.path)
    with self.assertRaisesRegex(FileNotFoundError, 'has no file'):
      safetensors.open(self.folder)

  @parameterized.parameters(
    '../x.safetensors',
    '/elsewhere/x.safetensors',
    'a/x.safetensors',
    'a\\x.safetensors',
    '.x.safetensors',
    'x.safetensors\n',
    'x.safetensors\0',
    'x.bin',
    '',
    'C:x.safetensors',
    3,
    None,
  )
  def test_paths_in_an_index(self, shard):
    self.put(checkpoints.file_of({'x': entry()}), 'x.safetensors')
    self.put({'weight_map': {'x': shard}}, 'model.safetensors.index.json')
    with self.assertRaisesRegex(DamagedFileError, "'x' is in .* no plain file"):
      safetensors.open(self.folder)

  def test_shards_that_differ_from_the_index(self):
    index = 'model.safetensors.index.json'
    one, two = 'a.safetensors', 'b.safetensors'
    self.put(checkpoints.file_of({'x': entry()}), one)
    self.put(
      checkpoints.file_of(
        {'y': entry(), 'z': entry(offsets=(8, 16))}, bytes(16)
      ),
      two,
    )
    for names, message in (
      ({'x': one, 'y': two}, "b.safetensors.* has the tensor 'z'"),
      ({'x': one, 'y': two, 'z': one}, "a.safetensors.* misses the tensor 'z'"),
      ({}, 'no weight_map'),
      ([], 'no weight_map'),
    ):
      self.put({'weight_map': names}, index)
      with self.assertRaisesRegex(DamagedFileError, message):
        safetensors.open(self.folder)
    self.put({'weight_map': {'x': 'c.safetensors'}}, index)
    with self.assertRaises(FileNotFoundError):
      safetensors.open(self.folder)
    self.put(b'[' * 10**5, index)
    with self.assertRaisesRegex(DamagedFileError, 'index.json.*too deeply'):
      safetensors.open(self.folder)
    os.unlink(os.path.join(self.folder, index))
    with self.assertRaisesRegex(ValueError, 'has 2 files, such as'):
      safetensors.open(self.folder)
    self.put({'weight_map': {'x': one}}, index)
    self.put(checkpoints.file_of({'x': entry()}))
    with self.assertRaisesRegex(ValueError, 'has both'):
      safetensors.open(self.folder)

  @parameterized.parameters(
    ([], 'content is no object'),
    ({'quantization_config': []}, 'quantization_config is no object'),
    (b'{', 'config.json'),
    ({'quantization': {'bits': 4}}, 'quant_method=None'),
    ({'quantization_config': {'quant_method': 'aqlm'}}, "'aqlm' is not read"),
    ({'quantization_config': {'quant_method': 4}}, 'of type str'),
  )
  def test_configurations(self, config, message):
    self.put(checkpoints.file_of({'x': entry()}))
    self.put(config, 'config.json')
    with self.assertRaisesRegex(ValueError, message):
      safetensors.open(self.path)


if __name__ == '__main__':
  absltest.main()
