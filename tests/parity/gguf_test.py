"""Files of GGUF, against the package `gguf` of llama.cpp.

Both write files that the other reads, and decode blocks to the same numbers.
"""

import argparse
import os
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import gguf
from lowbit_jax.io._gguf_layouts import CODES, LAYOUTS
from tests import checkpoints
from tests.parity import packages

pytestmark = pytest.mark.slow

PACKED = tuple(x.name for x in LAYOUTS.values() if x.fmt is not None)
DENSE = tuple(x.name for x in LAYOUTS.values() if x.dtype is not None)
GRIDS = tuple(x.name for x in LAYOUTS.values() if x.is_decoded)
SHAPE = (2, 3, 512)  # whole blocks of every type
INTEGERS = 'uint8 int8 uint16 int16 uint32 int32 uint64 int64'.split()
METADATA = {
  'text': 'é\n',
  'texts': ['a', '', '😀'],
  'bool': np.True_,
  'bools': np.array([True, False]),
  **{name: np.dtype(name).type(np.iinfo(name).max) for name in INTEGERS},
  **{f'{name}s': np.array([np.iinfo(name).min, 1], name) for name in INTEGERS},
  **{name: np.dtype(name).type(0.1) for name in ('float32', 'float64')},
  'float32s': np.float32([-np.inf, 1e-40]),
  'float64s': np.array([-np.inf, 1e-310]),
}


def plain(value):
  """A value of metadata as Python has it."""
  return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def data(shape=SHAPE) -> np.ndarray:
  return np.random.RandomState(0).randn(*shape).astype(np.float32)


def random_bytes(name: str, shape=SHAPE) -> np.ndarray:
  """Random blocks with finite scales, as uint8 (..., bytes of a row)."""
  random = np.random.RandomState(0)
  layout = LAYOUTS[CODES[name]]
  blocks = np.frombuffer(random.bytes(layout.size(shape)), np.uint8).copy()
  if layout.block is not None:
    fields = blocks.view(layout.block.fields)
    for field in {'d', 'dmin', 'm'} & set(layout.block.fields.names or ()):
      stored = fields[field]
      if stored.dtype == np.float16:
        stored[...] = random.randn(*stored.shape)
      else:  # E8M0 or E4M3 without a sign, away from the ends of the range
        stored[...] = random.randint(64, 127, stored.shape)
  return blocks.reshape(*shape[:-1], -1)


@packages.needs('gguf')
class GgufTest(checkpoints.FolderTest):
  def setUp(self):
    super().setUp()
    import gguf as package

    self.package = package
    self.path = os.path.join(self.folder, 'model.gguf')

  def type_of(self, name):
    """The type in the package; skips what it does not know or decode."""
    kind = getattr(self.package.GGMLQuantizationType, name, None)
    if kind is None:
      self.skipTest(f'gguf does not know {name}')
    try:
      self.decoded(random_bytes(name), kind)
    except NotImplementedError:
      self.skipTest(f'gguf does not decode {name}')
    return kind

  def decoded(self, blocks, kind):
    return self.package.quants.dequantize(blocks, kind)

  def encoded(self, name, kind):
    """Blocks that the package makes of numbers, or else random ones."""
    try:
      return self.package.quants.quantize(data(), kind)
    except NotImplementedError:
      return random_bytes(name)

  def write(self, tensors, metadata=(), alignment=None, **options):
    """A file of the package.

    Args:
      tensors: by name an array, or blocks and their type.
      metadata: (type, key, value) of each.
      alignment: of tensors.
      **options: of GGUFWriter.
    """
    writer = self.package.GGUFWriter(self.path, 'llama', **options)
    if alignment is not None:
      writer.add_custom_alignment(alignment)
    for name, key, value in metadata:
      getattr(writer, f'add_{name}')(key, value)
    for name, tensor in tensors.items():
      array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
      writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

  def read(self):
    """The tensors of a file by name, and its fields, as the package has it."""
    reader = self.package.GGUFReader(self.path)
    return {t.name: t for t in reader.tensors}, reader.fields


class SavedTest(GgufTest):
  @parameterized.parameters(*PACKED)
  def test_packed_types(self, name):
    kind = self.type_of(name)
    q = lowbit.quantize(data(), LAYOUTS[CODES[name]].fmt)
    gguf.save(self.path, {'x.weight': q})
    tensors, _ = self.read()
    tensor = tensors['x.weight']
    if name != 'TQ1_0':  # TQ2_0 is written, which holds the same numbers.
      self.assertEqual(tensor.tensor_type, kind)
    self.assertEqual(tuple(tensor.shape), SHAPE[::-1])
    decoded = self.decoded(tensor.data, tensor.tensor_type)
    if 'x.scale' in tensors:
      decoded = decoded * tensors['x.scale'].data[0]
    expected = np.asarray(lowbit.dequantize(q))
    if name == 'NVFP4':
      np.testing.assert_array_max_ulp(decoded, expected)
    else:
      np.testing.assert_array_equal(decoded, expected)

  def test_scales_of_experts(self):
    many = jax.vmap(lambda x: lowbit.quantize(x, formats.nvfp4))(
      data() * np.float32([[[1]], [[7]]])
    )
    gguf.save(self.path, {'x.weight': many})
    tensors, _ = self.read()
    scale = tensors['x.scale'].data
    self.assertEqual(scale.shape, (2,))
    tensor = tensors['x.weight']
    decoded = self.decoded(tensor.data, tensor.tensor_type)
    np.testing.assert_array_max_ulp(
      decoded * scale[:, None, None], np.asarray(lowbit.dequantize(many))
    )

  def test_dense_types(self):
    random = np.random.RandomState(0)
    arrays = {}
    for name in DENSE:
      layout = LAYOUTS[CODES[name]]
      for k, shape in enumerate(((2, 1, 3, 4), (5,))):
        bits = random.bytes(layout.size(shape))
        arrays[f'{name}.{k}'] = np.frombuffer(bits, layout.dtype).reshape(shape)
    gguf.save(self.path, arrays)
    tensors, _ = self.read()
    self.assertEqual(list(tensors), list(arrays))
    for name, array in arrays.items():
      self.assertEqual(tensors[name].tensor_type.name, name.split('.')[0])
      self.assertEqual(tuple(tensors[name].shape), array.shape[::-1])
      self.assertEqual(tensors[name].data.tobytes(), array.tobytes())

  @parameterized.parameters(8, 32, 256)
  def test_metadata(self, alignment):
    metadata = METADATA | {'general.alignment': np.uint32(alignment)}
    arrays = {'x': np.ones(3, np.float32), 'y': np.ones((1, 5), np.int8)}
    gguf.save(self.path, arrays, metadata=metadata)
    tensors, fields = self.read()
    for key, value in metadata.items():
      self.assertEqual(fields[key].contents(), plain(value), key)
      dtype = getattr(value, 'dtype', None)
      kind = fields[key].types[-1].name
      names = {'string': 'STRING', 'bool': 'BOOL'}
      name = 'string' if dtype is None else dtype.name
      self.assertEqual(kind, names.get(name, name.upper()), key)
    for name, array in arrays.items():
      np.testing.assert_array_equal(tensors[name].data, array)


class OpenedTest(GgufTest):
  def opened(self, path=None):
    checkpoint = gguf.open(path or self.path)
    self.addCleanup(checkpoint.close)
    return checkpoint

  @parameterized.parameters(*PACKED)
  def test_packed_types(self, name):
    kind = self.type_of(name)
    blocks = self.encoded(name, kind)
    self.write({'x.weight': (blocks, kind)})
    q = self.opened()['x.weight']
    self.assertEqual((q.fmt, q.shape), (LAYOUTS[CODES[name]].fmt, SHAPE))
    actual = np.asarray(lowbit.dequantize(q))
    np.testing.assert_array_equal(actual, self.decoded(blocks, kind))

  @parameterized.parameters(*GRIDS)
  def test_grids(self, name):
    kind = self.type_of(name)
    blocks = random_bytes(name)
    self.write({'x.weight': (blocks, kind)})
    checkpoint = self.opened()
    self.assertNotIn('not read', checkpoint.describe())
    x = checkpoint['x.weight']
    self.assertEqual((x.shape, x.dtype), (SHAPE, np.float32))
    np.testing.assert_array_equal(x, self.decoded(blocks, kind))
    self.assertGreater(np.isfinite(x).mean(), 0.9)
    copy = os.path.join(self.folder, 'copy.gguf')
    gguf.save(copy, checkpoint, metadata=checkpoint.metadata)
    self.assertEqual(
      pathlib.Path(copy).read_bytes(), pathlib.Path(self.path).read_bytes()
    )

  def test_metadata(self):
    # Of lists of numbers the package writes int32, float32 and bool only.
    metadata = {
      key: value
      for key, value in METADATA.items()
      if not isinstance(value, np.ndarray)
      or key in ('bools', 'int32s', 'float32s')
    }
    added = []
    for key, value in metadata.items():
      kind = 'array' if key.endswith('s') else key
      added.append((kind.replace('text', 'string'), key, plain(value)))
    self.write({'x': data()}, added)
    actual = self.opened().metadata
    metadata['general.architecture'] = 'llama'
    self.assertCountEqual(actual, metadata)
    for key, value in metadata.items():
      self.assertEqual(type(actual[key]), type(value), key)
      self.assertEqual(plain(actual[key]), plain(value), key)
      if isinstance(value, np.ndarray):
        self.assertEqual(actual[key].dtype, value.dtype, key)

  @parameterized.parameters(8, 32, 256)
  def test_alignment(self, alignment):
    tensors = {f'x{k}': data((k + 1,)) for k in range(5)}
    self.write(tensors, alignment=alignment)
    checkpoint = self.opened()
    for name, array in tensors.items():
      np.testing.assert_array_equal(checkpoint[name], array)

  @parameterized.parameters({}, {'small_first_shard': True})
  def test_split_models(self, **options):
    tensors = {f'blk.{k}.x': data((k + 1, 8)) for k in range(7)}
    metadata = [('uint32', 'n', 3)]
    self.write(tensors, metadata, split_max_tensors=3, **options)
    first = min(pathlib.Path(self.folder).glob('*-00001-of-*'))
    checkpoint = self.opened(first)
    self.assertEqual(list(checkpoint), list(tensors))
    for name, array in tensors.items():
      np.testing.assert_array_equal(checkpoint[name], array)
    self.assertEqual(
      checkpoint.metadata, {'general.architecture': 'llama', 'n': 3}
    )

  def test_big_endian_files(self):
    from gguf.scripts import gguf_convert_endian

    tensors = {'F32': data(), 'F16': data().astype(np.float16)}
    for name in ('Q4_0', 'Q8_0', 'Q4_K', 'Q6_K', 'MXFP4', 'NVFP4'):
      kind = self.type_of(name)
      tensors[name] = self.encoded(name, kind), kind
    self.write(tensors, [('uint32', 'n', 3), ('array', 'a', [1, 2])])
    copy = os.path.join(self.folder, 'little.gguf')
    shutil.copyfile(self.path, copy)
    with mock.patch('builtins.input', return_value='YES'):
      gguf_convert_endian.convert_byteorder(
        self.package.GGUFReader(self.path, 'r+'),
        argparse.Namespace(order='big', dry_run=False),
      )
    self.assertEqual(pathlib.Path(self.path).read_bytes()[4:8], b'\0\0\0\3')
    big, little = self.opened(), self.opened(copy)
    self.assertEqual(plain(big.metadata['a']), [1, 2])
    for name in tensors:
      jax.tree.map(np.testing.assert_array_equal, big[name], little[name])


if __name__ == '__main__':
  absltest.main()
