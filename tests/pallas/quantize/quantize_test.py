"""Quantization kernels against lowbit_jax.quantize, bit for bit.

The data hold zero blocks, signed zeros, subnormals, NaN, Inf, the largest
float32, and numbers on ties of the scaled grid, besides ordinary ones.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, transforms
from lowbit_jax.numerics import oracle
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas.arith import block, codec, hadamard, packing
from lowbit_pallas.quantize import mosaic_gpu, reference, task as tasks, tpu
from lowbit_pallas.quantize.task import Task
from lowbit_pallas.quantize.tpu import Config
from tests.pallas import races

FORMATS = (
  'mxfp4', 'mxfp8_e4m3', 'mxfp8_e5m2', 'mxfp6_e2m3', 'mxfp6_e3m2', 'mxint8',
  'mxint4', 'nvfp4', 'nvint4', 'int4_g32', 'int8_g128', 'int2_g64', 'int3_g32',
  'int7_g32', 'fp8_1x128', 'nf4_g64', 'bfp5_g16',
)  # fmt: skip

KEY = 7


def data(shape, dtype='float32', seed: int = 0) -> np.ndarray:
  """Numbers of many sizes, ties, and in places what needs care."""
  random = np.random.RandomState(seed)
  x = random.randn(*shape) * np.exp2(random.randint(-20, 20, shape[0]))[:, None]
  x[:, ::3] = np.round(x[:, ::3] * 4) / 4  # ties where the scale is near one
  flat = x.astype(np.float32).reshape(-1)
  special = [0.0, -0.0, 3e38, -3.4e38, 1e-40, -1e-40, 2e-38, 6.0, 448.0, -0.25]
  for i, v in enumerate(special):
    flat[i * 37 % flat.size] = v
  if flat.size > 2000:
    flat[100:260] = 0.0
    flat[300:460] = 3e-39 * random.randn(160)
    flat[700], flat[901], flat[1103] = np.nan, np.inf, -np.inf
  with np.errstate(over='ignore'):
    return flat.reshape(shape).astype(jnp.dtype(dtype))


def task_of(name: str, **kwargs) -> Task:
  fmt = formats.get(name)
  return Task(blocked(fmt), kwargs.pop('rule', fmt.scale_rule), **kwargs)


@functools.cache
def _library(name: str, task: Task, origin):
  stochastic = task.rounding == 'stochastic'

  @jax.jit
  def quantize(x):
    return lowbit_jax.quantize(
      x,
      formats.get(name),
      scale_rule=task.rule,
      rounding=task.rounding,
      key=jax.random.key(KEY) if stochastic else None,
      random_bits=task.random_bits,
      **({} if origin is None else {'origin': origin}),
    )

  return quantize


def want(x, name: str, task: Task, origin=None):
  """(packed, scales, tensor scale) of the library."""
  q = _library(name, task, origin)(x)
  scale = q.tensor_scale
  return q.codes, q.scale, None if scale is None else scale.reshape(())


def _compiled(module, task: Task, **kwargs):
  words = np.array([0, KEY], np.uint32)
  if module is tpu:
    kwargs['interpret'] = races.TPU
  if module is mosaic_gpu:
    kwargs['interpret'] = races.GPU

  @jax.jit
  def quantize(x, tensor_scale, signs):
    return module.run(
      x,
      task,
      key_words=words if task.rounding == 'stochastic' else None,
      tensor_scale=tensor_scale,
      signs=signs,
      **kwargs,
    )

  return quantize


_compiled_once = functools.cache(_compiled)


def run(module, x, task: Task, *, tensor_scale=None, signs=None, **kwargs):
  return _compiled_once(module, task, **kwargs)(x, tensor_scale, signs)


def run_traced_anew(module, x, task: Task, *, tensor_scale=None, signs=None):
  """With whatever is patched."""
  return _compiled(module, task)(x, tensor_scale, signs)


def differences(module, x, name: str, task: Task, run=run, **kwargs) -> int:
  """Bytes and scales that differ from the library, in bits."""
  origin = kwargs.get('origin')
  codes, scale, tensor_scale = want(x, name, task, origin)
  got = run(module, x, task, tensor_scale=tensor_scale, **kwargs)
  out = 0
  for a, b in zip(got, (codes, scale), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape)
    same = (a.view(np.uint8) == b.view(np.uint8)).reshape(*a.shape, -1)
    same = same.all(-1) | ((a != a) & (b != b))
    out += int(np.sum(~same))
  return out


@functools.partial(jax.jit, static_argnums=1)
def _unpack(packed, bits: int):
  return packing.unpack(packed, bits)


@functools.partial(jax.jit, static_argnums=2)
def _decoded(packed, scales, spec):
  """Elements and the factors of their scales."""
  values = codec.decode(packing.unpack(packed, spec.bits), spec.element)
  return values, block.scale_factors(scales, spec.scale)


@functools.partial(jax.jit, static_argnums=0)
def _elements(spec):
  """Every element."""
  return codec.decode(jnp.arange(1 << spec.bits), spec.element)


def check_rotated(test, task, x, signs, tensor_scale, a, b):
  """Results differ seldom, by one step, and only where a number is on a tie.

  A float32 rotation is within (order + 1) u |x| of the exact one, with |x| the
  2-norm of the rotation block; see `arith.hadamard`. The number that is rounded
  carries the rounding of 1 / scale and of the product besides, 2u of itself.
  """
  order, size = task.rotation, task.spec.block
  rows, cols = x.shape
  blocks = np.asarray(x, np.float64) * np.asarray(signs)
  blocks = blocks.reshape(rows, -1, order)
  y = (blocks @ hadamard.hadamard_matrix(order) * order**-0.5).reshape(x.shape)
  norm = np.linalg.norm(blocks, axis=-1).repeat(order, -1)
  scales = np.asarray(a[1]).astype(int), np.asarray(b[1]).astype(int)
  test.assertLessEqual(np.abs(scales[0] - scales[1]).max(), 1)
  test.assertLessEqual(np.mean(scales[0] != scales[1]), 0.01)
  live = (scales[0] == scales[1]).repeat(size, -1)[:, :cols]
  live &= np.isfinite(y)
  values, factors = zip(
    *(_decoded(*result, task.spec) for result in (a, b)), strict=True
  )
  s = np.ones((rows, cols // size, 1))
  for f in factors[0]:
    s = s * np.asarray(f, np.float64)[..., None]
  s = s.repeat(size, -1).reshape(x.shape) * float(tensor_scale or 1)
  live &= s > 0
  t = y[live] / s[live]
  slack = norm[live] / s[live] * (order + 1) * 2.0**-24 + np.abs(t) * 2.0**-23
  values = [np.asarray(v)[live] for v in values]
  test.assertLessEqual(np.mean(values[0] != values[1]), 1e-4)
  table = np.unique(_elements(task.spec))
  for v in values:
    at = np.searchsorted(table, v)
    above = np.append((table[1:] + table[:-1]) / 2, np.inf)[at]
    below = np.append(-np.inf, (table[1:] + table[:-1]) / 2)[at]
    test.assertTrue((t <= above + slack).all())
    test.assertTrue((t >= below - slack).all())


def check_rotation(test, module, name, order, rows, cols):
  x = data((rows, cols))
  # Sums stay finite, and none of their terms is flushed to zero.
  x = np.where(np.abs(x) < 1e30, x, x * np.float32(2.0**-30))
  x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
  task = task_of(name, rotation=order)
  signs = np.where(np.arange(cols) % 3 == 0, -1, 1)
  scale = np.float32(2.0**-3) if name == 'nvfp4' else None
  a, b = (
    run(m, x, task, signs=signs, tensor_scale=scale)
    for m in (reference, module)
  )
  check_rotated(test, task, x, signs, scale, a, b)


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp8_e5m2', (20, 300), 'float32'),
    ('int2_g64', (3, 70), 'bfloat16'),
  )
  def test_bits_of_the_library(self, name, shape, dtype):
    x = data(shape, dtype)
    self.assertEqual(differences(reference, x, name, task_of(name)), 0)

  @pytest.mark.slow
  def test_every_format(self):
    for name in FORMATS:
      for shape, dtype in (((20, 300), 'float32'), ((3, 70), 'bfloat16')):
        with self.subTest(name=name, shape=shape):
          x = data(shape, dtype)
          self.assertEqual(differences(reference, x, name, task_of(name)), 0)

  def test_rounding_and_scale_rule(self):
    self.check_rounding('mxfp4', 'stochastic', rule='round')

  @parameterized.parameters(
    ('mxfp4', 'toward_zero'),
    ('mxfp4', 'stochastic'),
    ('nvfp4', 'stochastic'),
    ('nf4_g64', 'toward_zero'),
  )
  @pytest.mark.slow
  def test_roundings(self, name, rounding):
    self.check_rounding(name, rounding)

  def check_rounding(self, name, rounding, **how):
    task = task_of(name, rounding=rounding, random_bits=11, **how)
    x = data((20, 300), 'float16')
    self.assertEqual(differences(reference, x, name, task), 0)

  @parameterized.parameters('floor', 'ceil', 'even', 'rceil', 'round')
  @pytest.mark.slow
  def test_scale_rules(self, rule):
    task = task_of('mxfp4', rule=rule)
    self.assertEqual(differences(reference, data((20, 320)), 'mxfp4', task), 0)

  @parameterized.parameters('mxfp4', 'nvfp4', 'int3_g32')
  def test_oracle(self, name):
    x = data((2, 128), seed=3)
    fmt, task = formats.get(name), task_of(name)
    scale = None
    if fmt.tensor_scale:
      scale = oracle.tensor_scale(np.asarray(x).ravel().tolist(), fmt)
    packed, scales = run(
      reference,
      x,
      task,
      tensor_scale=None if scale is None else np.float32(scale),
    )
    codes = np.asarray(_unpack(packed, fmt.element.bits))
    blocks = np.asarray(x).reshape(-1, fmt.block[0])
    blocks_of_codes = codes.reshape(blocks.shape)
    for i, numbers in enumerate(blocks):
      b = oracle.quantize_block(numbers.tolist(), fmt, tensor_scale=scale)
      self.assertSequenceEqual(blocks_of_codes[i].tolist(), b.codes)
      np.testing.assert_array_equal(
        np.asarray(scales).reshape(-1)[i], np.asarray(b.scale, scales.dtype)
      )


class TpuTest(parameterized.TestCase):
  def check(self, name, x, task, **kwargs):
    self.assertEqual(differences(tpu, x, name, task, **kwargs), 0)

  # Every kind of element but integers, which are wide below, and of scales.
  @parameterized.parameters(
    ('mxfp6_e2m3', (9, 500), 'float16', {'rule': 'rceil'}),
    ('fp8_1x128', (20, 200), 'float32', {'rounding': 'toward_zero'}),
    ('nf4_g64', (20, 250), 'float32', {}),
  )
  def test_bits_of_the_library(self, name, shape, dtype, how):
    self.check(name, data(shape, dtype), task_of(name, **how))

  @parameterized.parameters(
    ('mxfp4', (33, 300), 'float32', {'rule': 'even'}),
    ('mxfp8_e4m3', (5, 513), 'bfloat16', {'rule': 'rceil'}),
    ('mxint8', (16, 160), 'float32', {'rule': 'round'}),
    ('nf4_g64', (20, 256), 'float32', {'rounding': 'stochastic'}),
    ('int3_g32', (3, 300), 'bfloat16', {}),
    ('mxfp6_e2m3', (9, 500), 'float16', {'rounding': 'stochastic'}),
    ('nvfp4', (20, 310), 'float32', {}),
  )
  @pytest.mark.slow
  def test_more_bits_of_the_library(self, name, shape, dtype, how):
    self.check(name, data(shape, dtype), task_of(name, **how))

  @pytest.mark.slow
  def test_more_scales_than_lanes(self):
    x = data((2, 2100), 'bfloat16')
    self.check('bfp8_g16', x, task_of('bfp8_g16', rule='ceil'))

  @pytest.mark.slow
  def test_tiles_of_a_slice_of_a_large_array(self):
    origin = ((2**20 - 70, 2**15), (2**20, 2**16))
    self.check_tiles('nvfp4', (70, 4200), 4096, origin=origin)

  @parameterized.parameters('nvfp4', 'nvint4')
  @pytest.mark.slow
  def test_tiles_in_both_directions(self, name):
    self.check_tiles(name, (70, 2100), 2048)

  def check_tiles(self, name, shape, columns, **kwargs):
    task = task_of(name, rounding='stochastic', random_bits=5)
    tiles = Config(32, columns, 32)
    self.check(name, data(shape), task, config=tiles, **kwargs)

  @pytest.mark.slow
  def test_random_bits_of_a_slice_of_a_large_array(self):
    task = task_of('mxfp4', rounding='stochastic', rule='even')
    origin = ((2**20 - 9, 2**15), (2**20, 2**16))
    self.check('mxfp4', data((9, 64)), task, origin=origin)

  @pytest.mark.slow
  def test_every_format(self):
    for name in FORMATS:
      for rounding in tasks.ROUNDINGS:
        for shape in ((1, 1), (31, 33), (40, 1030)):
          with self.subTest(name=name, rounding=rounding, shape=shape):
            task = task_of(name, rounding=rounding)
            self.check(name, data(shape), task)

  @pytest.mark.slow
  def test_every_rule(self):
    for name in ('mxfp4', 'mxfp8_e5m2', 'mxint8'):
      for rule in block.scale_rules(blocked(formats.get(name))):
        with self.subTest(name=name, rule=rule):
          task = task_of(name, rule=rule)
          self.check(name, data((40, 300)), task)

  @parameterized.parameters(reference, tpu)
  def test_nothing(self, module):
    for shape in ((0, 64), (4, 0)):
      x = np.zeros(shape, np.float32)
      packed, scales = run(module, x, task_of('mxfp4'))
      self.assertEqual(packed.shape, (shape[0], shape[1] // 2))
      self.assertEqual(scales.shape, (shape[0], shape[1] // 32))


class RotationTest(parameterized.TestCase):
  def test_reference_rotates_then_quantizes(self):
    self.check_reference('nvfp4', 128)

  @parameterized.parameters(('mxfp4', 64), ('fp8_1x128', 32))
  @pytest.mark.slow
  def test_reference_rotates_other_blocks(self, name, order):
    self.check_reference(name, order)

  def check_reference(self, name, order):
    x = data((20, 384)) * np.float32(2.0**-20)
    task = task_of(name, rotation=order)

    @jax.jit
    def rotate(x):
      rotation = transforms.random_hadamard(jax.random.key(1), 384, order)
      return rotation.apply(x), rotation.signs

    y, signs = rotate(x)
    codes, scales, tensor_scale = want(y, name, task)
    got = run(reference, x, task, tensor_scale=tensor_scale, signs=signs)
    np.testing.assert_array_equal(got[0], codes)
    np.testing.assert_array_equal(got[1], scales)

  @parameterized.parameters(16, 128)
  def test_rotation_stays_below_half_of_its_bound(self, order):
    x = np.random.RandomState(order).randn(64, 384).astype(np.float32)
    transform = jax.jit(hadamard.hadamard, static_argnums=1)
    y = np.asarray(transform(x, order), np.float64)
    blocks = x.astype(np.float64).reshape(64, -1, order)
    exact = blocks @ hadamard.hadamard_matrix(order) * order**-0.5
    norm = np.linalg.norm(blocks, axis=-1, keepdims=True)
    error = np.abs(y.reshape(blocks.shape) - exact)
    self.assertTrue(np.all(error <= norm * (order + 1) * 2.0**-25))

  def test_kernel_differs_at_ties_only(self):
    check_rotation(self, tpu, 'mxfp4', 16, 40, 384)

  @pytest.mark.slow
  def test_rotation_over_many_blocks(self):
    check_rotation(self, tpu, 'nvfp4', 128, 40, 384)

  def test_poison_stays_in_its_blocks(self):
    # Integers: sums are exact in any order.
    random = np.random.RandomState(0)
    x = random.randint(-99, 99, (40, 384)).astype(np.float32)
    signs = np.where(np.arange(384) % 3 == 0, -1, 1)
    task = task_of('mxfp4', rotation=16)
    clean = run(reference, x, task, signs=signs)
    x[2, 40] = np.nan
    x[3, 100] = -np.inf
    packed, scales = run(tpu, x, task, signs=signs)
    bad = np.zeros((40, 12), bool)
    bad[2, 1] = bad[3, 3] = True
    clean_packed, clean_scales = map(np.asarray, clean)
    packed, scales = np.asarray(packed), np.asarray(scales)
    np.testing.assert_array_equal(scales == 255, bad)
    np.testing.assert_array_equal(scales[~bad], clean_scales[~bad])
    blocks = packed.reshape(40, 12, 16)
    self.assertFalse(blocks[bad].any())
    np.testing.assert_array_equal(
      blocks[~bad], clean_packed.reshape(40, 12, 16)[~bad]
    )


def _product(shape, pairs):
  """Stands for the matrix unit, whose registers the interpreter lacks."""
  total = jnp.zeros(shape, jnp.float32)
  for a, b in pairs:
    total = total + a.astype(jnp.float32) @ b[...].astype(jnp.float32).T
  return total


@pytest.mark.skipif(
  not races.GPU,
  reason='the interpreter of this JAX cannot load from tiled shared memory',
)
class MosaicGpuTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(mosaic_gpu, '_sum_of_products', _product)
    )

  @parameterized.parameters(
    ('mxfp4', (64, 128), 'float32', {'rule': 'ceil'}),
    ('mxfp8_e4m3', (64, 256), 'bfloat16', {'rounding': 'toward_zero'}),
    ('nvfp4', (128, 128), 'float16', {}),
    ('int3_g32', (64, 384), 'float32', {'rounding': 'stochastic'}),
    ('fp8_1x128', (64, 128), 'float32', {}),
  )
  def test_bits_of_the_library(self, name, shape, dtype, how):
    x, task = data(shape, dtype), task_of(name, **how)
    self.assertEqual(differences(mosaic_gpu, x, name, task), 0)

  def test_rotation(self):
    check_rotation(self, mosaic_gpu, 'nvfp4', 32, 64, 128)

  @pytest.mark.slow
  def test_rotation_over_two_blocks(self):
    check_rotation(self, mosaic_gpu, 'mxfp4', 64, 128, 256)


class MutantTest(parameterized.TestCase):
  """Faults that the comparison must see."""

  def caught(self, x, name, **how):
    task = task_of(name, **how)
    found = differences(tpu, x, name, task, run=run_traced_anew)
    self.assertGreater(found, 0)

  @pytest.mark.slow
  def test_swapped_nibbles(self):
    plan = packing.products(4)
    m = plan.matrices
    swapped = m.reshape(len(m), 64, 2, 128)[:, :, ::-1].reshape(m.shape)
    with mock.patch.object(
      packing, 'products', lambda bits: plan._replace(matrices=swapped)
    ):
      self.caught(data((9, 300)), 'mxfp4')

  @pytest.mark.slow
  def test_ties_away_from_zero(self):
    def away(t, odd=None):
      del odd
      return jnp.floor(t + 0.5)

    x = data((9, 300))
    task = task_of('mxfp4')
    codes, scales, _ = want(x, 'mxfp4', task)
    with mock.patch.object(codec, 'rule', lambda *_: away):
      got = run_traced_anew(tpu, x, task)
    np.testing.assert_array_equal(got[1], scales)
    self.assertGreater(np.sum(np.asarray(got[0]) != np.asarray(codes)), 0)

  @pytest.mark.slow
  def test_scale_of_the_neighbouring_block(self):
    whole = tpu._spread_matrix

    def shifted(width, size):
      return np.roll(whole(width, size), size, 1)

    with mock.patch.object(tpu, '_spread_matrix', shifted):
      self.caught(data((20, 200)), 'fp8_1x128', rounding='toward_zero')

  @pytest.mark.slow
  def test_random_bits_of_the_tile(self):
    task = task_of('mxfp4', rounding='stochastic')
    x = data((40, 64))
    codes, _, _ = want(x, 'mxfp4', task)
    whole = tpu._random

    def local(task, shape, full, inputs, top, left, i, col, piece):
      return whole(task, shape, full, inputs, 0 * top, left, 0 * i, col, piece)

    with mock.patch.object(tpu, '_random', local):
      got = run_traced_anew(tpu, x, task)
    self.assertGreater(np.sum(np.asarray(got[0]) != np.asarray(codes)), 0)


class RefusalTest(parameterized.TestCase):
  def test_accepts_what_the_library_has(self):
    for name in FORMATS:
      self.assertIsNone(tpu.why_not((5, 70), 'float32', task_of(name)))

  @parameterized.parameters(
    ((4, 4, 4), 'float32', {}, 'two axes'),
    ((4, 64), 'float64', {}, 'dtype'),
    ((4, 64), 'float32', {'rule': 'absmax'}, 'rule'),
    ((4, 64), 'float32', {'rounding': 'dithered'}, 'rounding'),
    ((4, 64), 'float32', {'rotation': 8}, 'rotation=8'),
    ((4, 80), 'float32', {'rotation': 32}, 'does not divide 80'),
  )
  def test_says_why(self, shape, dtype, how, reason):
    task = task_of('mxfp4', **how)
    self.assertRegex(tpu.why_not(shape, dtype, task), reason)

  def test_more_rows_than_a_gpu_launches(self):
    most, dtype, task = 65535 * 64, 'bfloat16', task_of('mxfp4')
    self.assertIsNone(mosaic_gpu.why_not((most, 64), dtype, task))
    refusal = mosaic_gpu.why_not((most + 1, 64), dtype, task)
    self.assertIn('65535 blocks', refusal)
    with self.assertRaisesRegex(NotImplementedError, '65535 blocks'):
      x = jax.ShapeDtypeStruct((most + 1, 64), dtype)
      jax.eval_shape(lambda x: mosaic_gpu.run(x, task), x)

  @parameterized.parameters(reference.run, tpu.run, mosaic_gpu.run)
  def test_stochastic_rounding_needs_a_key(self, run):
    task, x = task_of('mxfp4', rounding='stochastic'), jnp.zeros((32, 512))
    with self.assertRaisesRegex(ValueError, 'key_words='):
      jax.eval_shape(lambda x: run(x, task), x)

  @parameterized.parameters('int4_channel', 'uint4_g32')
  def test_refuses_formats(self, name):
    fmt = formats.get(name)
    task = Task(blocked(fmt), 'absmax')
    self.assertIsNotNone(tpu.why_not((4, 64), 'float32', task))

  @parameterized.parameters(
    Config(40, 512, 40), Config(32, 128, 32), Config(64, 4096, 48),
    Config(32, 1024, 32),
  )  # fmt: skip
  def test_refuses_tiles(self, bad):
    with self.assertRaisesRegex(NotImplementedError, 'must be a multiple'):
      tpu.run(jnp.zeros((64, 9000)), task_of('mxfp4'), config=bad)


if __name__ == '__main__':
  absltest.main()
