"""Formats with minima, float16 scales and two levels of scales.

The oracle is the scalar one in plain Python, block by block and row by row, and
float64 where sums are rounded.
"""

import functools
import math
import os
import tempfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import serialization

import lowbit_jax as lowbit
from lowbit_jax import formats, io, numerics, ops, qarray, testing
from lowbit_jax.io import safetensors
from lowbit_jax.nn import linen  # noqa: F401  (which tells Flax of QArrays)
from tests.ops import products

FLOAT16 = ('int4_g32_float16', 'uint4_g32_min_float16')
K_QUANTS = ('q2_k', 'q3_k', 'q4_k', 'q5_k', 'q6_k', 'iq4_xs')
EVERY_DAY = ('uint4_g32_min_float16', 'q4_k')
ALL = (
  *FLOAT16, *K_QUANTS,
  'int5_g32_float16', 'int8_g32_float16', 'uint5_g32_min_float16', 'iq4_nl',
  'sign_g128_float16', 'ternary_g256_float16', 'quaternary_g64_float16',
)  # fmt: skip


def data(*shape, seed: int = 0, shift: float = 0.0) -> np.ndarray:
  x = np.random.default_rng(seed).standard_normal(shape) + shift
  return x.astype(np.float32)


def quantized(name: str, *shape, axis: int = -1, **kwargs):
  x = data(*shape, **kwargs)
  return ops.quantize(x, formats.get(name), axis=axis, scale_rule=rule(name))


def rule(name: str) -> str:
  """The rule that the oracle knows."""
  return 'minmax' if formats.get(name).minimum else 'absmax'


class OracleTest(parameterized.TestCase):
  @parameterized.parameters(*EVERY_DAY)
  def test_quantize(self, name):
    self.check(name)

  @parameterized.parameters(*sorted({*ALL} - {*EVERY_DAY}))
  @pytest.mark.slow
  def test_quantize_more_formats(self, name):
    self.check(name)

  def check(self, name):
    fmt = formats.get(name)

    def quantize(x):
      return ops.quantize(x, fmt, scale_rule=rule(name))

    testing.check_quantizer(quantize, fmt, scale_rule=rule(name))

  def test_numbers_that_are_all_above_zero_use_all_codes(self):
    fmt = formats.get('uint4_g32_min_float16')
    x = 100 + np.linspace(0, 15, 32, dtype=np.float32)
    q = ops.quantize(x, fmt)
    self.assertEqual((float(q.minimum[0]), float(q.scale[0])), (100.0, 1.0))
    codes = numerics.unpack(q.codes, 4)
    self.assertEqual((int(codes.min()), int(codes.max())), (0, 15))
    # Padding is not in the range: 100 is still the least of four numbers.
    self.assertEqual(float(ops.quantize(x[:4], fmt).minimum[0]), 100.0)

  def test_equal_numbers_are_their_minimum(self):
    fmt = formats.get('uint4_g32_min_float16')
    q = ops.quantize(np.full(32, -1.5, np.float32), fmt)
    self.assertEqual(float(q.scale[0]), 0.0)
    np.testing.assert_array_equal(ops.dequantize(q), np.full(32, -1.5))

  def test_float16_scales_end_where_float16_does(self):
    x = np.repeat(np.float32([1e30, 1e-30, 0.0]), 32)
    q = ops.quantize(x, formats.get('int4_g32_float16'))
    top, least = 65504.0, 2.0**-24
    self.assertEqual(np.asarray(q.scale).tolist(), [top, least, 0.0])
    values = np.asarray(ops.dequantize(q))[::32]
    self.assertEqual(values.tolist(), [7 * top, 0.0, 0.0])

  def test_least_squares_never_lose(self):
    fmt, x = formats.q2_k.one_level, data(4, 512, shift=0.5)
    fmt = formats.BlockFormat('x', fmt.element, fmt.block, formats.float32,
                              minimum=True)  # fmt: skip

    def errors(rule):
      y = ops.dequantize(ops.quantize(x, fmt, scale_rule=rule))
      error = np.asarray(y, np.float64) - x
      return np.square(error).reshape(-1, fmt.block[0]).sum(1)

    plain, fitted = errors('minmax'), errors('least_squares')
    self.assertTrue((fitted <= plain * (1 + 1e-5)).all())
    self.assertLess(fitted.sum(), 0.9 * plain.sum())

  @parameterized.parameters(*ALL)
  def test_bits(self, name):
    # Bytes of 256 elements in a GGUF file.
    block = {
      'int4_g32_float16': 144, 'int5_g32_float16': 176, 'iq4_nl': 144,
      'int8_g32_float16': 272, 'uint4_g32_min_float16': 160,
      'uint5_g32_min_float16': 192, 'q2_k': 84, 'q3_k': 110, 'q4_k': 144,
      'q5_k': 176, 'q6_k': 210, 'iq4_xs': 136, 'sign_g128_float16': 36,
      'ternary_g256_float16': 66, 'quaternary_g64_float16': 72,
    }  # fmt: skip
    fmt = formats.get(name)
    self.assertEqual(fmt.bits_per_element * 32, block[name])
    q = jax.eval_shape(lambda x: ops.quantize(x, fmt), jnp.zeros((2, 512)))
    self.assertEqual(q.nbytes, 4 * block[name])


class ArrayTest(parameterized.TestCase):
  def test_parts_and_transposes(self):
    q = quantized('q4_k', 3, 2, 576)  # 576 cuts a block of eight scales
    x = np.asarray(ops.dequantize(q))
    np.testing.assert_array_equal(ops.dequantize(q[1]), x[1])
    np.testing.assert_array_equal(ops.dequantize(q[:, 1, 256:]), x[:, 1, 256:])
    np.testing.assert_array_equal(ops.dequantize(q.T), x.T)
    np.testing.assert_array_equal(ops.dequantize(q[0].mT), x[0].T)
    np.testing.assert_array_equal(ops.dequantize(q.reshape(6, 576)),
                                  x.reshape(6, 576))  # fmt: skip
    for part in (q, q.T, q[:, ::-1], q[jnp.array([2, 0])], q.reshape(1, 6, -1)):
      qarray.validate(part)

  def test_blocks_of_scales_stay_whole(self):
    q = quantized('q4_k', 2, 512)
    with self.assertRaisesRegex(IndexError, 'multiples of 256'):
      q[:, 32:]
    with self.assertRaisesRegex(ValueError, 'without breaking blocks'):
      q.reshape(2, 4, 128)
    self.assertEqual(q.reshape(2, 2, 256).scale.shape, (2, 2, 8))
    with self.assertRaisesRegex(ValueError, 'multiples of 256'):
      ops.update_slice(q, jnp.ones((2, 32)), (0, 32))

  @parameterized.parameters('q4_k', 'uint4_g32_min_float16')
  def test_update_slice(self, name):
    q = quantized(name, 3, 576)
    new = data(2, 256, seed=5)
    got = ops.update_slice(q, new, (1, 256), scale_rule='minmax')
    want = np.array(ops.dequantize(q))
    part = ops.quantize(new, q.fmt, scale_rule='minmax')
    want[1:, 256:512] = ops.dequantize(part)
    np.testing.assert_array_equal(ops.dequantize(qarray.validate(got)), want)

  def test_vmap_and_scan(self):
    x = data(3, 4, 256)
    fmt = formats.q4_k
    quantize = functools.partial(
      ops.quantize, fmt=fmt, axis=0, scale_rule='minmax'
    )
    q = jax.vmap(quantize)(x.swapaxes(1, 2))
    self.assertEqual(q.scale.axis, -2)
    y = jax.lax.scan(lambda c, q: (c, ops.dequantize(q)), 0, q)[1]
    np.testing.assert_array_equal(ops.dequantize(q), y)

  def test_given_scales_are_kept(self):
    q = quantized('q4_k', 2, 512, shift=-0.5)
    x = np.asarray(ops.dequantize(q))
    again = ops.quantize_with(x, q.scale, q.fmt, minimum=q.minimum)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    fmt = formats.get('uint4_g32_min_float16')
    q = quantized(fmt.name, 2, 64)
    again = ops.quantize_with(
      ops.dequantize(q), q.scale, fmt, minimum=q.minimum.astype(jnp.float32)
    )
    jax.tree.map(np.testing.assert_array_equal, again, q)
    with self.assertRaisesRegex(ValueError, 'minimum is needed'):
      ops.quantize_with(x[:, :64], q.scale, fmt)
    with self.assertRaisesRegex(ValueError, 'not a part of the format'):
      ops.quantize_with(x[:, :64], q.scale, formats.int4_g32, minimum=q.minimum)

  def test_from_codes(self):
    q = quantized('q4_k', 2, 512)
    codes = numerics.unpack(q.codes, 4)
    again = lowbit.QArray.from_codes(codes, q.scale, q.fmt, minimum=q.minimum)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    with self.assertRaisesRegex(TypeError, 'scale of a q4_k array'):
      numbers = ops.dequantize(q.scale)
      lowbit.QArray.from_codes(codes, numbers, q.fmt, minimum=q.minimum)

  def test_trainable_scales(self):
    q = quantized('q4_k', 2, 512)
    trainable, frozen = lowbit.partition({'w': q, 'b': 1.0}, scales=True)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(trainable['w'])}
    self.assertEqual(dtypes, {np.dtype(np.float16)})
    self.assertLen(jax.tree.leaves(trainable['w']), 2)  # scales, and minima
    back = lowbit.combine(trainable, frozen)
    testing.assert_bits_equal(back['w'], q)
    grads = jax.grad(
      lambda t: jnp.sum(ops.dequantize(lowbit.combine(t, frozen)['w']))
    )(trainable)
    self.assertTrue(jnp.all(grads['w'].scale.scale > 0))

  def test_flax_state(self):
    for q in (
      quantized('q4_k', 2, 512),
      ops.quantize(data(2, 4, 16), formats.mxfp4, axis=(-2, -1)),
    ):
      state = serialization.to_bytes({'w': q})
      empty = jax.tree.map(jnp.zeros_like, q)
      back = serialization.from_bytes({'w': empty}, state)
      testing.assert_bits_equal(back['w'], q)

  def test_files_and_exports(self):
    q = quantized('q4_k', 3, 576)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'q.lowbit')
      io.save(path, {'w': q})
      back = io.load(path)['w']
    self.assertEqual((back.fmt, back.axis, back.pad), (q.fmt, q.axis, q.pad))
    jax.tree.map(np.testing.assert_array_equal, back, q)
    exported = jax.export.export(jax.jit(ops.dequantize))(q).serialize()
    y = jax.export.deserialize(exported).call(q)
    np.testing.assert_array_equal(y, ops.dequantize(q))


class ProductTest(parameterized.TestCase):
  @parameterized.parameters(*EVERY_DAY)
  def test_few_and_many_rows(self, name):
    self.check(name, 512, (1, 40))

  def test_scales_with_padding(self):
    self.check('q4_k', 576, (3,))

  @parameterized.parameters(*sorted({*ALL} - {*EVERY_DAY}))
  @pytest.mark.slow
  def test_more_formats(self, name):
    self.check(name, 576, (1, 40))

  def check(self, name, k: int, rows):
    w = quantized(name, k, 24, axis=0)
    for m in rows:
      x = data(m, k, seed=m)
      note = lowbit.select_implementation('dot', x, w)
      self.assertIn('scan over tiles', str(note))
      products.assert_product(ops.dot(x, w), 'mk,kn->mn', x, w)

  def test_one_scale_for_a_column(self):
    fmt = formats.BlockFormat(
      'x', formats.uint4, (0,), formats.float16,
      scale_rule='minmax', minimum=True,
    )  # fmt: skip
    w, x = ops.quantize(data(640, 8, shift=1), fmt, axis=0), data(2, 640)
    products.assert_product(ops.dot(x, w), 'mk,kn->mn', x, w)

  def test_the_derivative_by_minimum_and_scale(self):
    w, x = quantized('uint4_g32_min_float16', 64, 4, axis=0), data(3, 64)
    wide = qarray.replace(
      w,
      scale=w.scale.astype(jnp.float32),
      minimum=w.minimum.astype(jnp.float32),
      fmt=formats.BlockFormat(
        'x', w.fmt.element, (32,), formats.float32, minimum=True
      ),
    )

    def loss(product):
      def run(scale, minimum):
        q = qarray.replace(wide, scale=scale, minimum=minimum)
        return jnp.sum(product(x, q) ** 2)

      return jax.grad(run, (0, 1))(wide.scale, wide.minimum)

    got = loss(ops.dot)
    want = loss(lambda x, q: x @ ops.dequantize(q))
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)

  def test_the_derivative_by_scales_of_scales(self):
    w, x = quantized('q4_k', 256, 4, axis=0), data(3, 256)

    def gradient(product):
      def run(scale):
        level = qarray.replace(w.scale, scale=scale)
        return jnp.sum(product(x, qarray.replace(w, scale=level)) ** 2)

      return jax.grad(run)(w.scale.scale)

    want = gradient(lambda x, q: x @ ops.dequantize(q))
    got = gradient(ops.dot)
    np.testing.assert_allclose(got, want, rtol=2e-3)

  def test_experts(self):
    fmt, sizes = formats.q4_k, jnp.array([2, 0, 3])
    w = products.make(fmt.name, 3, 256, 8)
    x = data(5, 256)
    got = ops.ragged_dot(x, w, sizes)
    for rows, i in ((slice(0, 2), 0), (slice(2, 5), 2)):
      products.assert_product(got[rows], 'mk,kn->mn', x[rows], w[i])


class FakeQuantTest(absltest.TestCase):
  def test_the_gradient_stops_outside_of_the_range(self):
    fmt = formats.get('uint4_g32_min_float16')
    x = jnp.linspace(-2.0, 17.0, 32)
    scale, minimum = jnp.ones(1), jnp.zeros(1)

    def run(x):
      return ops.fake_quant_with(
        x, scale, fmt, minimum=minimum, backward='clipped'
      )

    y, pullback = jax.vjp(run, x)
    np.testing.assert_array_equal(y, np.clip(np.round(x), 0, 15))
    (dx,) = pullback(jnp.ones(32))
    inside = (x >= 0) & (x <= 15)
    np.testing.assert_array_equal(dx, inside.astype(jnp.float32))

  def test_a_learned_scale(self):
    fmt = formats.get('uint4_g32_min_float16')
    x = jnp.linspace(-9.0, 40.0, 32)  # from 5 below the range to 14 above
    scale, minimum = jnp.full(1, 2.0), jnp.full(1, -4.0)

    def run(scale):
      return ops.fake_quant_with(x, scale, fmt, minimum=minimum, backward='lsq')

    slopes = jax.jacfwd(run)(scale)[:, 0] * math.sqrt(32 * 15)
    exact = (x + 4.0) / 2.0
    want = jnp.where(
      (exact >= 0) & (exact <= 15),
      jnp.round(exact) - exact,
      jnp.clip(exact, 0, 15),  # the element, by which the scale is multiplied
    )
    np.testing.assert_allclose(slopes, want, rtol=1e-5, atol=1e-5)
    q = quantized('q4_k', 2, 256)
    with self.assertRaisesRegex(TypeError, 'learns float block scales'):
      ops.fake_quant_with(
        data(2, 256), q.scale, q.fmt, minimum=q.minimum, backward='lsq'
      )

  def test_it_is_the_quantized_value(self):
    x = data(2, 576, shift=0.3)
    fmt = formats.q4_k
    got = ops.fake_quant(x, fmt, scale_rule='minmax')
    want = ops.dequantize(ops.quantize(x, fmt, scale_rule='minmax'))
    np.testing.assert_array_equal(got, want)


class FormatTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('signed', dict(element=formats.int4, minimum=True), 'unsigned integer'),
    ('coded', dict(scale=formats.e4m3fn, minimum=True), 'minimum needs'),
    (
      'narrow',
      dict(scale=formats.float16, scale_blocks=formats.q6_k.scale_blocks),
      'scale_blocks=',
    ),
    ('deep', dict(scale_blocks=formats.q6_k), 'scale_blocks='),
    ('named', dict(scale_blocks='q6_k'), 'must be a block format'),
  )
  def test_refusals(self, fields, message):
    fields = (
      dict(name='x', element=formats.uint4, block=(32,), scale=formats.float32)
      | fields
    )
    with self.assertRaisesRegex((TypeError, ValueError), message):
      formats.BlockFormat(**fields)

  @parameterized.parameters(*ALL)
  def test_descriptions(self, name):
    fmt = formats.get(name)
    self.assertEqual(formats.from_dict(formats.to_dict(fmt)), fmt)

  def test_a_function_gives_no_minimum(self):
    with self.assertRaisesRegex(ValueError, 'minima'):
      ops.quantize(
        data(32), formats.q4_k, scale_rule=lambda x, mask: x.max(axis=-1)
      )

  @parameterized.parameters('q4_k', 'q6_k', 'uint4_g32_min_float16')
  def test_folders_have_no_layout_for_them(self, name):
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'model')
      with self.assertRaisesRegex(ValueError, 'has no layout'):
        safetensors.export(path, {'a.weight': quantized(name, 4, 256)})
      self.assertEqual(os.listdir(folder), [])

  def test_prepack_is_refused(self):
    w = quantized('q4_k', 256, 8, axis=0)
    with self.assertRaisesRegex(ValueError, 'two levels of scales'):
      ops.prepack(w, implementation='tpu')

  def test_prepacked_float16_scales_come_back(self):
    w = quantized('int4_g32_float16', 512, 128, axis=0)
    back = ops.unpack(ops.prepack(w, implementation='tpu'))
    self.assertEqual(back.scale.dtype, jnp.float16)
    jax.tree.map(np.testing.assert_array_equal, back, w)
    self.assertTrue(math.isclose(w.bits_per_element, 4.5))


if __name__ == '__main__':
  absltest.main()
