"""Files of safetensors, against the package of that name.

Ours are byte for byte those that it writes, and whatever it refuses is refused.
"""

import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax.io import DamagedFileError, safetensors
from tests import checkpoints
from tests.parity import packages

pytestmark = pytest.mark.slow

# The names of NumPy's, ml_dtypes' and the package's dtypes agree, but for one.
DTYPES = (
  *('bool', 'uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64'),
  *('int64', 'float16', 'bfloat16', 'float32', 'float64', 'complex64'),
  *('float8_e5m2', 'float8_e4m3fn', 'float8_e8m0fnu', 'float8_e4m3fnuz'),
  *('float8_e5m2fnuz', 'float4_e2m1fn'),
)
PAIRS = 'float4_e2m1fn_x2'  # two numbers in an element
SHAPES = ((2, 3, 4), (6,), (0, 4), ())


def arrays() -> dict[str, np.ndarray]:
  """Random bits of every dtype in several shapes."""
  random = np.random.RandomState(0)
  result = {}
  for name in DTYPES:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    for k, shape in enumerate(SHAPES):
      if name == 'float4_e2m1fn' and shape == ():
        continue  # fills no byte
      data = random.bytes(int(np.prod(shape)) * dtype.itemsize)
      array = np.frombuffer(data, np.uint8)
      array = array % 2 if name == 'bool' else array
      array = array % 16 if name == 'float4_e2m1fn' else array
      result[f'{k}.{name}'] = array.view(dtype).reshape(shape)
  return result


def reference(tensors, metadata=None) -> bytes:
  """The file that the package writes."""
  import safetensors as package

  specs, kept = {}, []
  for name, array in tensors.items():
    dtype, shape = array.dtype.name, list(array.shape)
    data = np.ascontiguousarray(array).reshape(-1)
    if dtype == 'float4_e2m1fn':
      dtype, shape[-1] = PAIRS, shape[-1] // 2
      codes = data.view(np.uint8)
      data = codes[0::2] | codes[1::2] << 4
    kept.append(data)  # until the pointer was used
    specs[name] = package.TensorSpec(
      dtype=dtype,
      shape=shape,
      data_ptr=data.ctypes.data,
      data_len=data.nbytes,
    )
  return bytes(package.serialize(specs, metadata))


@packages.needs('safetensors')
class FilesTest(checkpoints.FolderTest):
  @parameterized.parameters(
    (None,), ({'format': 'pt'},), ({'é"\n\u2028\\/': '\x01'},)
  )
  def test_saved_byte_for_byte(self, metadata):
    tensors = arrays()
    safetensors.save(self.path, tensors, metadata)
    written = pathlib.Path(self.path).read_bytes()
    self.assertEqual(written, reference(tensors, metadata))

  def test_names_byte_for_byte(self):
    for name in ('', 'a.b', 'é"\n\u2028\\/\x7f\x01', '😀', 'x' * 900):
      tensors = {name: np.ones(3, np.float32), 'other': np.ones(2)}
      safetensors.save(self.path, tensors, overwrite=True)
      written = pathlib.Path(self.path).read_bytes()
      self.assertEqual(written, reference(tensors))

  def test_opened(self):
    tensors = arrays()
    pathlib.Path(self.path).write_bytes(reference(tensors, {'format': 'pt'}))
    with safetensors.open(self.path) as checkpoint:
      self.assertCountEqual(checkpoint, tensors)
      self.assertEqual(checkpoint.metadata, {'format': 'pt'})
      for name, before in tensors.items():
        after = checkpoint[name]
        self.assertEqual(
          (after.dtype, after.shape), (before.dtype, before.shape)
        )
        self.assertEqual(after.tobytes(), before.tobytes())

  def test_six_bits_are_a_dtype_of_the_package(self):
    import safetensors as package

    codes = np.arange(64, dtype=np.uint8).reshape(2, 32)
    for name, dtype in (
      ('F6_E2M3', 'float6_e2m3fn'),
      ('F6_E3M2', 'float6_e3m2fn'),
    ):
      array = codes.view(getattr(ml_dtypes, dtype))
      safetensors.save(self.path, {'x': array}, overwrite=True)
      whole = pathlib.Path(self.path).read_bytes()
      ((key, value),) = package.deserialize(whole)
      self.assertEqual(
        (key, value['dtype'], value['shape']), ('x', name, [2, 32])
      )
      self.assertEqual(bytes(value['data']), whole[-48:])


class Damage:
  """Bytes that may be a file, and what both make of them."""

  def __init__(self, folder: str) -> None:
    self._path = pathlib.Path(folder, 'damaged.safetensors')

  def refused(self, data: bytes) -> str | None:
    """Why we refuse these bytes, or None."""
    self._path.write_bytes(data)
    try:
      with safetensors.open(self._path) as checkpoint:
        for name in checkpoint:
          _ = checkpoint[name]
    except DamagedFileError as error:
      return str(error)
    return None

  def refused_by_package(self, data: bytes) -> str | None:
    import safetensors as package

    try:
      package.deserialize(data)
    except package.SafetensorError as error:
      return str(error)
    return None


@packages.needs('safetensors')
class DamageTest(parameterized.TestCase):
  """What the package refuses is refused; little else is."""

  STRICTER = (
    *('booleans other than 0 and 1', 'no dtype, shape and offsets'),
    *('does not map strings', 'a name of'),
  )

  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.damage = Damage(directory.name)
    self.whole = (checkpoints.GOLDENS / 'plain.safetensors').read_bytes()

  def check(self, data: bytes) -> bool:
    ours = self.damage.refused(data)
    theirs = self.damage.refused_by_package(data)
    if ours is None or not any(reason in ours for reason in self.STRICTER):
      self.assertEqual(ours is None, theirs is None, f'{ours} / {theirs}')
    return theirs is not None

  def test_truncated_files(self):
    self.assertFalse(self.check(self.whole))
    for size in range(len(self.whole)):
      self.assertTrue(self.check(self.whole[:size]), size)
    self.assertTrue(self.check(self.whole + b'\0'))

  def test_flipped_bits(self):
    random = np.random.RandomState(0)
    count = 0
    for _ in range(2000):
      data = bytearray(self.whole)
      data[random.randint(len(data))] ^= 1 << random.randint(8)
      count += self.check(bytes(data))
    self.assertBetween(count, 400, 1900)  # both kinds are there

  def test_holes_and_overlaps(self):
    size = 8 + int.from_bytes(self.whole[:8], 'little')
    header, data = json.loads(self.whole[8:size]), self.whole[size:]
    names = [name for name in header if name != '__metadata__']
    for k in range(1, len(names)):
      place = header[names[k]]['data_offsets'][0]
      for moved in (-8, 0, 8):
        edited = json.loads(json.dumps(header))
        for name in names[k:]:
          begin, end = header[name]['data_offsets']
          edited[name]['data_offsets'] = [begin + moved, end + moved]
        filled = data[: place + min(moved, 0)] + bytes(max(moved, 0))
        whole = checkpoints.file_of(edited, filled + data[place:])
        self.assertEqual(self.check(whole), moved != 0, (names[k], moved))

  def test_edited_shapes_and_offsets(self):
    random = np.random.RandomState(0)
    size = 8 + int.from_bytes(self.whole[:8], 'little')
    header, data = json.loads(self.whole[8:size]), self.whole[size:]
    names = [name for name in header if name != '__metadata__']
    count = 0
    for _ in range(2000):
      edited = json.loads(json.dumps(header))
      for name in random.choice(names, random.randint(1, 3)):
        entry = edited[name]
        part = entry[random.choice(['data_offsets', 'shape'])]
        if part:
          k = random.randint(len(part))
          part[k] = max(0, part[k] + int(random.randint(-8, 9)))
      first, second = random.choice(names, 2)
      if random.randint(2):
        edited[first], edited[second] = edited[second], edited[first]
      count += self.check(checkpoints.file_of(edited, data))
    self.assertBetween(count, 400, 1900)


if __name__ == '__main__':
  absltest.main()
