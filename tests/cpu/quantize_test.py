"""Kernels that quantize on CPU have the bits of XLA's quantizer."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import cpu, formats
from lowbit_jax.ops import _quantize_cpu

# One format of each kind of element, scale and width of codes.
FORMATS = (
  formats.mxfp4,
  formats.mxfp6_e2m3,
  formats.mxfp6_e3m2,
  formats.mxfp8_e4m3,
  formats.mxint8,
  formats.nvfp4,
  formats.nvint4,
  formats.nvlloyd3,
  formats.get('int4_g128'),
  formats.get('uint4_g128'),
  formats.get('nf4_g64'),
  formats.get('int8_channel'),
  formats.get('fp8_1x128'),
  formats.grouped(formats.int5, 40),
  formats.grouped(formats.int7, 24, formats.bfloat16),
  formats.grouped(formats.uint3, 32, formats.float16),
  formats.grouped(formats.int2, 16, formats.e5m2),
  formats.grouped(formats.e4m3fnuz, 32),
  formats.grouped(formats.ue4m3, 32, formats.float16),
)
SHAPE = (160, 264)  # ragged blocks, and columns beyond whole vectors
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@functools.cache
def normal(shape=SHAPE) -> np.ndarray:
  return np.random.RandomState(0).randn(*shape).astype(np.float32)


@functools.cache
def special() -> np.ndarray:
  """Numbers of all sizes, and blocks of special ones in rows and columns."""
  random = np.random.RandomState(1)
  x = np.ldexp(normal(), random.randint(-20, 20, SHAPE)).astype(np.float32)
  rare = (
    np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, -1e-40, 2.0**-126, 2.0**-149,
    3.4e38, -3.4e38,
  )  # fmt: skip
  for value in rare:
    places = random.randint(0, SHAPE[0], 2), random.randint(0, SHAPE[1], 2)
    x[places] = value
  for lines in (x, x.T):
    lines[:4] = np.array([0, -0.0, 1e-41, 1])[:, None]
    lines[4] = 3.4e38
    lines[4, ::2] = -3.4e38
    lines[5] = 2.0**-125 * random.rand(lines.shape[1])
    lines[6] = 2.0**-120 * random.randn(lines.shape[1])
    lines[7] = np.arange(lines.shape[1]) / 4  # ties
  return x


@functools.partial(
  jax.jit,
  static_argnames=('fmt', 'implementation', 'axis', 'scale_rule', 'rounding'),
)
def quantized(x, fmt, implementation, axis=-1, **options):
  return lowbit.quantize(
    x, fmt, axis=axis, implementation=implementation, **options
  )


class QuantizeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if why := cpu.why_not():
      self.skipTest(why)

  def assert_same(self, ours, xlas):
    self.assertEqual(jax.tree.structure(ours), jax.tree.structure(xlas))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
      a, b = np.asarray(a), np.asarray(b)
      self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype))
      word = BITS[a.dtype.itemsize]
      np.testing.assert_array_equal(a.view(word), b.view(word))

  def check(self, x, fmt, **options):
    ours, xlas = (quantized(x, fmt, i, **options) for i in ('cpu', 'xla'))
    self.assert_same(ours, xlas)

  @parameterized.product(fmt=FORMATS, axis=(-1, -2))
  def test_bits_are_those_of_xla(self, fmt, axis):
    for x in (normal(), special()):
      self.check(jnp.asarray(x), fmt, axis=axis)

  @parameterized.product(
    fmt=(formats.mxfp4, formats.get('uint4_g128')),
    dtype=('bfloat16', 'float16'),
    axis=(-1, -2),
  )
  def test_narrow_floats_are_read_as_they_are(self, fmt, dtype, axis):
    with np.errstate(over='ignore'):
      x = special().astype(jnp.dtype(dtype))
    self.check(jnp.asarray(x), fmt, axis=axis)

  @parameterized.parameters('floor', 'ceil', 'even', 'rceil', 'round')
  def test_powers_of_two_follow_their_rule(self, rule):
    for fmt in (formats.mxfp6_e3m2, formats.mxfp8_e5m2):
      self.check(jnp.asarray(special()), fmt, scale_rule=rule)

  @parameterized.parameters(
    ((64,), -1), ((3, 64, 24), 1), ((2, 3, 5, 40), -1), ((2, 40, 3, 5), 1),
    ((5, 1000), -1), ((100, 1030), 0), ((0, 64), -1),
  )  # fmt: skip
  def test_any_shape(self, shape, axis):
    x = np.random.RandomState(2).randn(*shape).astype(np.float32)
    self.check(jnp.asarray(x), formats.mxfp6_e2m3, axis=axis)

  def test_tensor_scale_may_be_held(self):
    x = jnp.asarray(normal())
    for scale in (0.01, 0.0, 3e38, 1e-40, np.inf, np.nan):
      held = jnp.float32(scale)
      self.check(x, formats.nvfp4, tensor_scale=held)

  @parameterized.parameters((0, 'nvfp4', -2), (1, 'uint4_g128', -1))
  def test_members_of_a_batch_are_those_alone(self, along, name, axis):
    x = jnp.asarray(np.random.RandomState(3).randn(4, 64, 96), jnp.float32)

    def run(x, implementation):
      return quantized(x, formats.get(name), implementation, axis=axis)

    ours, xlas = (
      jax.vmap(functools.partial(run, implementation=i), along)(x)
      for i in ('cpu', 'xla')
    )
    self.assert_same(ours, xlas)

  def test_tensor_scales_of_a_batch(self):
    x, held = jnp.asarray(normal()), jnp.float32([0.01, 0.02, 0.5])

    def run(scale, implementation):
      return quantized(x, formats.nvfp4, implementation, tensor_scale=scale)

    ours, xlas = (
      jax.vmap(functools.partial(run, implementation=i))(held)
      for i in ('cpu', 'xla')
    )
    self.assert_same(ours, xlas)

  def test_wide_types_change_nothing(self):
    with jax.enable_x64(True):
      for axis in (-1, -2):
        self.check(jnp.asarray(special()), formats.nvfp4, axis=axis)

  def test_large_arrays_are_shared_by_threads(self):
    x = jax.random.normal(jax.random.key(0), (1024, 1280))
    self.check(x, formats.mxfp6_e2m3, axis=-1)
    self.check(x, formats.get('uint4_g128'), axis=-2)


class ChoiceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if why := cpu.why_not():
      self.skipTest(why)

  def lowered(self, x, **options):
    run = functools.partial(lowbit.quantize, fmt=formats.mxfp4, **options)
    return jax.jit(run).lower(x).as_text()

  def test_large_arrays_take_the_kernel_unasked(self):
    if why := cpu.why_unproven():
      self.skipTest(why)
    with mock.patch.object(jax, 'device_count', return_value=1):
      few, many = (self.lowered(jnp.ones((n, n))) for n in (64, 128))
    self.assertIn('lowbit_jax.quantize', many)
    self.assertNotIn('lowbit_jax.quantize', few)

  def test_exported_programs_hold_no_kernel(self):
    x = jnp.asarray(normal())
    run = functools.partial(
      lowbit.quantize, fmt=formats.mxfp4, implementation='cpu'
    )
    exported = jax.export.export(jax.jit(run))(x)
    self.assertNotIn('lowbit_jax.quantize', exported.mlir_module())
    np.testing.assert_array_equal(exported.call(x).codes, run(x).codes)

  def test_partitioned_programs_hold_no_kernel(self):
    if jax.device_count() < 2:
      self.skipTest('needs two devices')
    mesh = jax.make_mesh((2,), ('a',), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.asarray(normal()), NamedSharding(mesh, P('a')))
    ours, xlas = (quantized(x, formats.mxfp4, i) for i in ('cpu', 'xla'))
    np.testing.assert_array_equal(ours.codes, xlas.codes)

  @parameterized.parameters(
    ('mxfp4', {'rounding': 'toward_zero'}, 'not to nearest'),
    ('mxfp4', {'scale_rule': 'mse'}, "scale_rule='mse'"),
    ('int4_g128', {'scale_rule': 'absmean'}, "scale_rule='absmean'"),
    ('mxfp4_32x32', {}, 'blocks along one axis'),
    ('e4m3fn_tensor', {}, 'no scales'),
    ('q4_k', {}, 'two levels'),
  )
  def test_refusals_say_why(self, name, options, why):
    with self.assertRaisesRegex(NotImplementedError, why):
      lowbit.quantize(
        normal(), formats.get(name), implementation='cpu', **options
      )

  def test_random_bits_are_those_of_xla(self):
    with self.assertRaisesRegex(NotImplementedError, 'not to nearest'):
      quantized(
        normal(),
        formats.mxfp4,
        'cpu',
        rounding='stochastic',
        key=jax.random.key(0),
      )

  def test_few_columns_are_refused(self):
    with self.assertRaisesRegex(NotImplementedError, 'fewer than 8'):
      quantized(normal((64, 4)), formats.mxfp4, 'cpu', axis=0)

  def test_few_elements_are_those_of_xla(self):
    self.assertGreater(_quantize_cpu.FEW, 0)
    choice = lowbit.ops.select_implementation(
      'quantize', jnp.ones((2, 64)), formats.mxfp4
    )
    self.assertEqual(choice.implementation, 'xla')
    self.assertIn('cpu', choice.refusals)


if __name__ == '__main__':
  absltest.main()
