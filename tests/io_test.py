"""Tests of saving, loading, and serialization by jax.export."""

import copy
import functools
import io as streams
import itertools
import json
import os
import pathlib
import struct
import tempfile
import time
import zipfile
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, io, qarray
from lowbit_jax.lora import Adapter
from lowbit_jax.ops import LowRank

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def stored(fmt, shape, random):
  """A QArray of random codes and scales, made without JAX."""
  axes = qarray.block_axes(fmt, None, len(shape))
  pad = qarray.padding(shape, fmt, axes)
  padded = list(shape)
  for axis, n in zip(axes, pad, strict=True):
    padded[axis] += n
  packed = list(padded)
  packed[axes[0]] = packed[axes[0]] * fmt.element.bits // 8
  blocks = qarray.scale_shape(padded, fmt, axes)
  codes = lambda shape: random.randint(0, 99, shape).astype(np.uint8)
  scale = codes(blocks)
  return qarray.QArray(
    codes(packed),
    scale if fmt.scale.bits <= 8 else scale.astype(fmt.scale.name),
    np.ones((1,) * len(shape), np.float32) if fmt.tensor_scale else None,
    codes(blocks) if fmt.zero_point else None,
    fmt,
    axes if fmt.is_tile else axes[0],
    pad,
    np.dtype(np.float32),
  )


@functools.cache
def tree():
  random = np.random.RandomState(1)
  names = ('mxfp4', 'nvfp4', 'uint4_g32', 'nf4_g64', 'nvfp4_16x16')
  return {
    'quantized': {n: stored(formats.get(n), (50, 24), random) for n in names},
    'half': [np.ones((2, 3), ml_dtypes.bfloat16), (np.float16([1]), None)],
    'fp8': np.ones(3, ml_dtypes.float8_e4m3fn),
    'int4': np.arange(-8, 8).astype(ml_dtypes.int4),
    'empty': np.zeros((0, 4), np.float32),
    'wide': np.arange(3, dtype=np.int64) + 2**40,
    'big_endian': np.arange(5, dtype='>f4'),
    'fortran': np.arange(6.0).reshape(3, 2).astype(ml_dtypes.bfloat16).T,
    'step': 3,
    'name': 'run',
  }


class IoTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.path = os.path.join(directory.name, 'tree.lowbit')

  def assert_same(self, after, before):
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(before))
    for a, b in zip(
      jax.tree.leaves(after), jax.tree.leaves(before), strict=True
    ):
      np.testing.assert_array_equal(a, b)
      if isinstance(b, np.ndarray):
        self.assertEqual(a.dtype.name, b.dtype.name)
        self.assertTrue(a.dtype.isnative)

  def test_round_trip(self):
    numbered = {'layers': {0: {10: np.ones(3)}, 2: {}}}
    # Blocks of 32 through the axes (16, 4) together.
    spanned = stored(formats.mxfp4, (3, 64), np.random.RandomState(0))
    spanned = qarray.replace(spanned, merged=(4,))
    before = {**tree(), **numbered, 'spanned': spanned}
    before['scalar'] = np.float64(1.5)
    io.save(self.path, before)
    after = io.load(self.path)
    self.assertEqual(list(after['layers']), [0, 2])
    self.assertIsInstance(after['half'][0], jax.Array)
    self.assertIsInstance(after['wide'], np.ndarray)
    self.assertTrue(after['wide'].flags.writeable)
    self.assertEqual(after.pop('scalar').dtype, np.float64)
    before.pop('scalar')
    self.assert_same(after, before)

  def test_files_of_version_1_load(self):
    self.assert_same(io.load(GOLDEN / 'tree_v1.lowbit'), tree())

  def test_equal_trees_give_equal_bytes(self):
    before = tree()
    files = []
    for year in (1970, 2026, 2120):
      before = dict(reversed(before.items()))
      now = (year, 1, 1, 0, 0, 0, 0, 1, 0)
      with mock.patch.object(time, 'localtime', return_value=now):
        io.save(self.path, before, overwrite=True)
      files.append(pathlib.Path(self.path).read_bytes())
    self.assertEqual(files[0], files[1])
    self.assertEqual(files[0], files[2])

  @parameterized.parameters(
    np.str_('text'),
    np.bytes_(b'bytes'),
    np.datetime64('2026-01-01'),
    np.zeros((), [('a', np.float32)])[()],
    np.longdouble(1),
    ml_dtypes.float6_e2m3fn(1),
  )
  def test_dtypes_that_would_not_come_back_are_refused(self, x):
    with self.assertRaisesRegex(TypeError, r"tree\['a'\]\[0\] has dtype"):
      io.save(self.path, {'a': [x]})
    self.assertFalse(os.path.exists(self.path))

  @parameterized.parameters(
    ({'scale': np.ones((50, 1), ml_dtypes.bfloat16)}, 'scale.dtype=bfloat16'),
    ({'scale': None}, 'scale of a uint4_g32 array must be given'),
    ({'codes': 3}, 'codes is a int'),
    ({'pad': (-7,)}, 'pad='),
    ({'pad': (32,)}, 'pad='),
    ({'dtype': np.dtype(object)}, 'dtype=object'),
    ({'dtype': np.dtype(np.longdouble)}, 'has dtype'),
    ({'axis': 1}, 'axis=1 must count from the end'),
  )
  def test_broken_qarrays_are_refused(self, changes, message):
    q = qarray.replace(tree()['quantized']['uint4_g32'], **changes)
    with self.assertRaisesRegex((TypeError, ValueError), message) as raised:
      io.save(self.path, {'a': q})
    self.assertStartsWith(str(raised.exception), "tree['a']")

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
    ({1: 2, 'a': 3}, 'keys are all strings or all ints'),
    ({True: 2}, 'keys are all strings or all ints'),
    ({'a': np.ma.ones(2)}, r"tree\['a'\] is a MaskedArray"),
    ({'a': jax.eval_shape(lambda: 1.0)}, r"tree\['a'\] is a ShapeDtypeStruct"),
    ({'a': jax.random.key(0)}, 'jax.random.key_data'),
    ({'a': {'b': object()}}, r"tree\['a'\]\['b'\] is a object"),
    ({'a': [set()]}, r"tree\['a'\]\[0\] is a set"),
  )
  def test_unknown_nodes_are_named(self, value, message):
    with self.assertRaisesRegex(TypeError, message):
      io.save(self.path, value)
    self.assertFalse(os.path.exists(self.path))

  def test_other_files_are_refused(self):
    np.savez(self.path + '.npz', a=np.ones(3))
    with self.assertRaisesRegex(io.DamagedFileError, 'not written by'):
      io.load(self.path + '.npz')
    with self.assertRaises(FileNotFoundError):
      io.load(self.path)
    os.mkfifo(self.path)
    for path in (self.path, '/dev/zero', os.path.dirname(self.path)):
      with self.assertRaisesRegex(io.DamagedFileError, 'no regular file'):
        io.load(path)

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


def rewritten(data: bytes, change) -> bytes:
  """An archive with valid checksums whose entries went through `change`."""
  with zipfile.ZipFile(streams.BytesIO(data)) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  entries['manifest.json'] = json.loads(entries['manifest.json'])
  entries = change(entries) or entries
  entries['manifest.json'] = json.dumps(entries['manifest.json'], indent=1)
  out = streams.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  return out.getvalue()


def places(node):
  """(parent, key) of everything in a manifest."""
  items = node.items() if isinstance(node, dict) else enumerate(node)
  for key, value in items:
    yield node, key
    if isinstance(value, dict | list):
      yield from places(value)


def edited(data: bytes, place: int, value) -> bytes:
  def change(entries):
    parent, key = list(places(entries['manifest.json']))[place]
    if value is None:
      del parent[key]
    else:
      parent[key] = copy.deepcopy(value)

  return rewritten(data, change)


NONSENSE = (
  None,  # deleted
  True,
  0,
  1,
  -7,
  1.5,
  float('nan'),
  10**30,
  '',
  'object',
  'float64',
  'dict',
  [],
  [0],
  {},
  {'kind': 'value', 'value': None},
)


def factors():
  return np.ones((2, 1, 1), np.float32), np.ones((1, 3, 1), np.float32)


class DamageTest(parameterized.TestCase):
  """Whatever happens to a file: its tree comes back, or DamagedFileError."""

  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.path = os.path.join(directory.name, 'tree.lowbit')
    random = np.random.RandomState(0)
    io.save(
      self.path,
      {
        'layers': {
          0: stored(formats.nvfp4_16x16, (3, 20), random),
          1: stored(formats.uint4_g32, (3, 20), random),
        },
        'codebook': stored(formats.nf4_g64, (2, 64), random),
        'list': [np.arange(3, dtype=np.float32), (None, 1.5)],
        'swap': np.arange(3, 6, dtype=np.float32),
        'half': np.ones(3, ml_dtypes.bfloat16),
        'factors': LowRank(np.ones((2, 3), np.float32), *factors(), 0.5),
        'adapter': Adapter(*factors(), 0.5),
      },
    )
    self.data = pathlib.Path(self.path).read_bytes()

  def load(self, data: bytes):
    """What comes of a file: its tree, or None where it is refused."""
    pathlib.Path(self.path).write_bytes(data)
    try:
      return io.load(self.path)
    except io.DamagedFileError as error:
      self.assertIn(repr(self.path), str(error))
      return None

  def check_bytes(self, data: bytes):
    loaded = self.load(data)
    if loaded is not None:
      io.save(self.path, loaded, overwrite=True)
      self.assertEqual(pathlib.Path(self.path).read_bytes(), self.data)

  def check_edit(self, data: bytes):
    """An edit may make another tree, but a whole one."""
    try:
      loaded = self.load(data)
    except ValueError as error:
      self.assertRegex(str(error), 'upgrade lowbit_jax')
    else:
      io.save(self.path, loaded, overwrite=True)

  def damage(self, count: int):
    random = np.random.RandomState(count)
    size = len(self.data)
    for _ in range(count):
      yield self.data[: random.randint(size)]
      flipped = bytearray(self.data)
      flipped[random.randint(size)] ^= 1 << random.randint(8)
      yield bytes(flipped)
      start, length = random.randint(size), random.randint(1, 64)
      yield self.data[:start] + self.data[start + length :]
      yield self.data[:start] + random.bytes(length) + self.data[start:]
      yield (self.data[:start] + bytes(length) + self.data[start + length :])[
        :size
      ]

  def edits(self):
    """The file with each field of its manifest replaced by each nonsense."""
    with zipfile.ZipFile(streams.BytesIO(self.data)) as archive:
      manifest = json.loads(archive.read('manifest.json'))
    for place in range(len(list(places(manifest)))):
      for value in NONSENSE:
        yield place, value

  def test_damaged_bytes(self):
    for data in self.damage(40):
      self.check_bytes(data)

  def test_edits_with_valid_checksums(self):
    # A step that shares no factor with the number of nonsense values.
    for place, value in itertools.islice(self.edits(), 0, None, 61):
      self.check_edit(edited(self.data, place, value))

  @pytest.mark.slow
  @pytest.mark.long('one load for each bit of a file')
  def test_every_flip_and_edit(self):
    for i in range(len(self.data)):
      self.check_bytes(self.data[:i])
      for bit in range(8):
        flipped = bytearray(self.data)
        flipped[i] ^= 1 << bit
        self.check_bytes(bytes(flipped))
    for place, value in self.edits():
      self.check_edit(edited(self.data, place, value))

  def refused(self, change, message):
    pathlib.Path(self.path).write_bytes(rewritten(self.data, change))
    with self.assertRaisesRegex(io.DamagedFileError, message):
      io.load(self.path)

  def test_leaves_that_changed_places(self):
    def swap_entries(entries):
      tree = entries['manifest.json']['tree']['items']
      a, b = tree['swap']['entry'], tree['list']['items'][0]['entry']
      a, b = f'{a}.npy', f'{b}.npy'
      entries[a], entries[b] = entries[b], entries[a]

    def swap_names(entries):
      tree = entries['manifest.json']['tree']['items']
      a, b = tree['swap'], tree['list']['items'][0]
      a['entry'], b['entry'] = b['entry'], a['entry']

    def share(entries):
      tree = entries['manifest.json']['tree']['items']
      tree['swap'] = tree['list']['items'][0]

    for change in (swap_entries, swap_names):
      self.refused(change, r"tree\['list'\]\[0\] has another checksum")
    self.refused(share, r"tree\['swap'\] has no entry")

  @parameterized.parameters(
    ('pad', [-7, 0], 'pad='),
    ('pad', [1.5, 0], 'pad='),
    ('pad', [29, 0], 'pad='),
    ('axis', [0, 1], 'must count from the end'),
    ('merged', [4], 'merged='),
    ('dtype', 'object', "unknown dtype 'object'"),
    ('dtype', 'int8', 'real floating-point'),
  )
  def test_fields_of_qarrays(self, field, value, message):
    def change(entries):
      layers = entries['manifest.json']['tree']['items']['layers']
      layers['items']['0'][field] = value

    self.refused(change, r"tree\['layers'\]\[0\].*" + message)

  @parameterized.parameters(
    (['scale_rule'], 5),
    (['block'], [16, True]),
    (['block'], [16, -16]),
    (['tensor_scale'], 1),
    (['zero_point'], None),
    (['name'], 7),
    (['element'], 'e2m1'),
    (['scale'], {'kind': 'IntFormat', 'name': 'int8', 'width': 8}),
    (['element', 'exponent_bits'], 2.0),
    (['element', 'exponent_bits'], 10**9),
    (['element', 'bias'], 10**9),
    (['element', 'special'], ['fn']),
    (['element', 'signed'], 1),
    (['element', 'kind'], 'object'),
    (['element', 'more'], 0),
  )
  def test_fields_of_formats(self, names, value):
    def change(entries):
      layers = entries['manifest.json']['tree']['items']['layers']
      fmt = layers['items']['0']['fmt']
      for name in names[:-1]:
        fmt = fmt[name]
      fmt[names[-1]] = value

    self.refused(change, r"tree\['layers'\]\[0\]: ")

  @parameterized.parameters('<f8', '<i4', '>u4', '|V4', '>b1', '<f3')
  def test_a_view_of_another_type(self, descr):
    def change(entries):
      tree = entries['manifest.json']['tree']['items']
      name = f'{tree["swap"]["entry"]}.npy'
      entries[name] = entries[name].replace(b'<f4', descr.encode())
      del tree['swap']['crc32']
      entries['manifest.json']['version'] = 1

    self.refused(change, r"tree\['swap'\] is .* in place of float32")

  @parameterized.parameters('(4,)', '(-3,)', '(3, 1.0)', '(10**9,)', '(3)')
  def test_a_shape_that_its_bytes_do_not_fill(self, shape):
    def change(entries):
      tree = entries['manifest.json']['tree']['items']
      name = f'{tree["swap"]["entry"]}.npy'
      entries[name] = entries[name].replace(b'(3,)', shape.encode())
      del tree['swap']['crc32']
      entries['manifest.json']['version'] = 1

    self.refused(change, r"tree\['swap'\] has")

  def test_archives_that_save_does_not_write(self):
    def zipped(method=zipfile.ZIP_STORED, more=()):
      out = streams.BytesIO()
      with (
        zipfile.ZipFile(streams.BytesIO(self.data)) as archive,
        zipfile.ZipFile(out, 'w', method) as copy,
      ):
        for name in [*archive.namelist(), *more]:
          copy.writestr(name, archive.read(name) if name != 'x' else b'')
      return out.getvalue()

    with mock.patch('warnings.warn'):
      twice = zipped(more=['0.npy'])
    encrypted = bytearray(zipped())
    encrypted[encrypted.rindex(b'PK\1\2') + 8] |= 1
    # The directory claims an entry of 2 GB, whose bytes are not there.
    long = bytearray(zipped())
    struct.pack_into('<2L', long, long.rindex(b'PK\1\2') + 20, 2**31, 2**31)
    for data, message in (
      (zipped(zipfile.ZIP_DEFLATED), "entry '.*' is compressed"),
      (bytes(encrypted), 'compressed or encrypted'),
      (twice, 'two entries of one name'),
      (zipped(more=['x']), "names its entry 'x'"),
      (bytes(long), 'longer'),
      (b'', 'no whole zip archive'),
    ):
      pathlib.Path(self.path).write_bytes(data)
      with self.assertRaisesRegex(io.DamagedFileError, message):
        io.load(self.path)

  def test_deep_manifests(self):
    def change(entries):
      node = entries['manifest.json']['tree']
      for _ in range(300):
        node = {'kind': 'list', 'items': [node]}
      entries['manifest.json']['tree'] = node

    with self.assertRaisesRegex(TypeError, '100 levels deep'):
      io.save(
        self.path,
        functools.reduce(lambda x, _: [x], range(101), 0),
        overwrite=True,
      )
    io.save(
      self.path,
      functools.reduce(lambda x, _: [x], range(100), 0),
      overwrite=True,
    )
    io.load(self.path)
    self.refused(change, 'levels deep')


if __name__ == '__main__':
  absltest.main()
