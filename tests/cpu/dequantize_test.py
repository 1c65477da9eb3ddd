"""Kernels that decode on CPU have the bits of XLA's decoding."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import cpu, formats, qarray
from lowbit_jax.formats import BlockFormat

ELEMENTS = (
  formats.e2m3,
  formats.e3m2,
  formats.minifloat(2, 2, 'none'),
  formats.minifloat(3, 3, 'ieee'),
  formats.int3,
  formats.int5,
  formats.bfp(6, 32).element,
)


def fmt_of(element) -> BlockFormat:
  name = f'mx_{element.name}'
  return BlockFormat(name, element, (32,), formats.e8m0, scale_rule='floor')


def stored(fmt, axis, shape=(160, 288)) -> lowbit.QArray:
  """Any codes with all scales, NaN and the smallest among them."""
  random = np.random.RandomState(0)
  like = jax.eval_shape(
    lambda x: lowbit.quantize(x, fmt, axis=axis),
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )
  codes = random.randint(0, 256, like.codes.shape).astype(np.uint8)
  scale = random.randint(0, 256, like.scale.shape).astype(np.uint8)
  scale.flat[:4] = 0, 1, 254, 255
  return qarray.replace(
    like, codes=jnp.asarray(codes), scale=jnp.asarray(scale)
  )


class DequantizeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if why := cpu.why_not() or cpu.why_unproven():
      self.skipTest(why)
    one = mock.patch.object(jax, 'device_count', return_value=1)
    self.enter_context(one)

  def dequantized(self, q, is_kernel=True):
    run = jax.jit(lambda q: lowbit.dequantize(q))
    is_called = 'lowbit_jax.dequantize' in run.lower(q).as_text()
    self.assertEqual(is_called, is_kernel)
    return np.asarray(run(q))

  def assert_same(self, ours, xlas):
    # Any NaN is as good as another.
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(xlas))
    words = [np.where(np.isnan(x), 0, x).view(np.uint32) for x in (ours, xlas)]
    np.testing.assert_array_equal(*words)

  @parameterized.product(element=ELEMENTS, axis=(-1, -2))
  def test_bits_are_those_of_xla(self, element, axis):
    q = stored(fmt_of(element), axis)
    self.assert_same(self.dequantized(q), np.asarray(qarray.decode(q)))

  @parameterized.parameters(
    ((3, 5, 1200), -1), ((2, 100, 7, 13), 1), ((1000, 1030), 0),
  )  # fmt: skip
  def test_any_shape(self, shape, axis):
    x = np.random.RandomState(1).randn(*shape).astype(np.float32)
    q = lowbit.quantize(x, formats.mxfp6_e2m3, axis=axis)
    self.assert_same(self.dequantized(q), np.asarray(qarray.decode(q)))

  @parameterized.parameters(-1, -2)
  def test_members_of_a_batch_are_those_alone(self, axis):
    x = np.random.RandomState(2).randn(3, 128, 160).astype(np.float32)
    q = jax.vmap(lambda x: lowbit.quantize(x, formats.mxfp6_e3m2, axis=axis))(x)
    ours = jax.jit(jax.vmap(lowbit.dequantize))(q)
    xlas = jax.vmap(qarray.decode)(q)
    self.assert_same(np.asarray(ours), np.asarray(xlas))

  def test_other_arrays_are_left_to_xla(self):
    x = jnp.ones((128, 160))
    for q in (
      lowbit.quantize(x, formats.mxfp4),
      lowbit.quantize(x, formats.get('int4_g128')),
      lowbit.quantize(x[:2], formats.mxfp6_e2m3),
      lowbit.quantize(x.astype(jnp.bfloat16), formats.mxfp6_e2m3),
    ):
      self.dequantized(q, is_kernel=False)

  def test_exported_programs_hold_no_kernel(self):
    q = lowbit.quantize(jnp.ones((128, 160)), formats.mxfp6_e2m3)

    def run(codes, scale):
      return lowbit.dequantize(qarray.replace(q, codes=codes, scale=scale))

    exported = jax.export.export(jax.jit(run))(q.codes, q.scale)
    self.assertNotIn('lowbit_jax.dequantize', exported.mlir_module())
    out = exported.call(q.codes, q.scale)
    self.assert_same(np.asarray(out), np.asarray(qarray.decode(q)))


if __name__ == '__main__':
  absltest.main()
