"""Quantizers of named recipes: published examples, rules, and use in qdot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import quantizers
from lowbit_jax.training.micro_scaling import MicroScaling
from lowbit_jax.training.quantizers import (
  DoReFaActivation,
  DoReFaGradient,
  DoReFaWeight,
  Eden,
  FixedPoint,
  OutlierCompensated,
  Quartet,
  Quest,
  RowScaled,
  Sign,
)
from tests.compilation import quick_jit

KEY = jax.random.key(3)
MXFP4 = QuantSpec(formats.mxfp4, 'rceil')
MXFP4_TILES = QuantSpec(formats.get('mxfp4_32x32'), 'rceil')
EVERY = (
  DoReFaWeight(2),
  DoReFaActivation(2),
  DoReFaGradient(2),
  Sign('one'),
  Sign('mean'),
  Quartet(),
  Quest(),
  OutlierCompensated(MXFP4),
  RowScaled(MXFP4, 2),
  Eden(MXFP4),
  FixedPoint(3, 4),
  FixedPoint(3, 4, 'nearest_even'),
  MicroScaling(rounding='stochastic'),
)
# Draws no bits; recipes of `recipes_test` have quantizers that do.
IN_PRODUCTS = (FixedPoint(3, 4, 'nearest_even'),)


@functools.cache
def normal(shape=(6, 64), seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _pulled_back(quantizer, x, g, axis, key):
  y, vjp = jax.vjp(lambda x: quantizer(x, axis, key), x)
  return y, vjp(g)[0]


@functools.partial(quick_jit, static_argnums=0)
def quickly_pulled_back(quantizer, x, g, key=None):
  y, vjp = jax.vjp(lambda x: quantizer(x, -1, key), x)
  return y, vjp(g)[0]


def pulled_back(quantizer, x, g, axis=-1, key=None):
  return map(np.asarray, _pulled_back(quantizer, x, g, axis, key))


quantize = jax.jit(lowbit_jax.quantize, static_argnums=1)


@functools.partial(quick_jit, static_argnums=(1, 2))
def fake_quant(x, fmt, scale_rule):
  return lowbit_jax.fake_quant(x, fmt, scale_rule=scale_rule)


@functools.partial(quick_jit, static_argnums=0)
def apply(spec, x):
  return quantizers.apply(spec, x)


class EveryQuantizerTest(parameterized.TestCase):
  @parameterized.parameters(*((q,) for q in EVERY))
  def test_is_a_static_function_of_shape_and_dtype(self, quantizer):
    self.assertIsInstance(hash(quantizer), int)
    self.check_shape_and_dtype(quantizer, jnp.bfloat16)

  @parameterized.parameters(*((q,) for q in EVERY))
  @pytest.mark.slow  # other tests see values of float32
  def test_is_a_static_function_of_float32(self, quantizer):
    self.check_shape_and_dtype(quantizer, jnp.float32)

  def check_shape_and_dtype(self, quantizer, dtype):
    key = KEY if quantizer.needs_key else None
    zeros = np.zeros_like(normal())  # an ordinary tensor
    for x in (normal().astype(dtype), zeros.astype(dtype)):
      y, dx = quickly_pulled_back(quantizer, x, x, key)
      self.assertEqual((y.shape, y.dtype), (x.shape, x.dtype))
      self.assertEqual((dx.shape, dx.dtype), (x.shape, x.dtype))
      for leaf in (y, dx):
        self.assertTrue(np.isfinite(np.asarray(leaf, np.float32)).all())

  @parameterized.parameters(*((q,) for q in EVERY))
  @pytest.mark.slow
  def test_nan_is_never_hidden(self, quantizer):
    x = normal().copy()
    x[2, 5] = np.nan
    key = KEY if quantizer.needs_key else None
    y, _ = quickly_pulled_back(quantizer, x, x, key)
    self.assertTrue(np.isnan(y[2, 5]))

  @parameterized.parameters(Sign('mean'), OutlierCompensated(Sign()))
  def test_empty_axes(self, quantizer):
    self.check_empty_axes(quantizer)

  @parameterized.parameters(*((q,) for q in EVERY))
  @pytest.mark.slow
  def test_empty_axes_of_every_quantizer(self, quantizer):
    self.check_empty_axes(quantizer)

  def check_empty_axes(self, quantizer):
    key = KEY if quantizer.needs_key else None
    for shape in ((0, 64), (64, 0)):
      x = np.zeros(shape, np.float32)
      for y in quickly_pulled_back(quantizer, x, x, key):
        self.assertEqual(y.shape, shape)

  @parameterized.parameters(*((q,) for q in EVERY))
  def test_axis_is_the_axis_of_the_blocks(self, quantizer):
    if quantizer.needs_key:
      return  # random bits follow the layout
    x = normal((64, 64), 1)
    # Sums along an axis may take another order: the last bit of a scale.
    both = quick_jit(lambda x: (quantizer(x.T, 0).T, quantizer(x, -1)))
    along_0, along_1 = both(x)
    self.assertEqual(along_1.dtype, x.dtype)
    np.testing.assert_allclose(along_0, along_1, rtol=1e-6)

  @parameterized.parameters(*((q,) for q in IN_PRODUCTS))
  def test_qdot_takes_it(self, quantizer):
    self.check_qdot_takes_it(quantizer)

  @parameterized.parameters(*((q,) for q in EVERY if q not in IN_PRODUCTS))
  @pytest.mark.slow
  def test_qdot_takes_every_other(self, quantizer):
    self.check_qdot_takes_it(quantizer)

  def check_qdot_takes_it(self, quantizer):
    # The other side draws no bits: it is handed a key all the same.
    other = Sign()
    recipe = Recipe(
      'test',
      GemmSpec(quantizer, other),
      GemmSpec(quantizer, other),
      GemmSpec(other, quantizer),
    )
    x, w = normal((32, 64), 2), normal((64, 32), 3)
    key = KEY if recipe.needs_key else None

    def f(x, w):
      return lowbit_jax.qdot(x, w, recipe, key=key)

    @quick_jit
    def run(x, w):
      y, vjp = jax.vjp(f, x, w)
      return y, *vjp(y)

    y, dx, dw = run(x, w)
    self.assertEqual((dx.shape, dw.shape), (x.shape, w.shape))
    for leaf in (y, dx, dw):
      self.assertTrue(np.isfinite(leaf).all())
    if not quantizer.needs_key:
      product = quick_jit(lambda x, w: quantizer(x, 1) @ other(w, 0))
      want = product(x, w)
      np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)


class DoReFaTest(parameterized.TestCase):
  @parameterized.parameters(1, 4)
  def test_weights(self, bits):
    self.check_weights(bits)

  @pytest.mark.slow
  def test_weights_of_two_bits(self):
    self.check_weights(2)

  def check_weights(self, bits):
    x, n = normal(), 2**bits - 1
    t = np.tanh(x.astype(np.float64))
    r = t / (2 * np.abs(t).max()) + 0.5
    y, dx = pulled_back(DoReFaWeight(bits), x, np.ones_like(x))
    np.testing.assert_allclose(y, 2 * np.round(r * n) / n - 1, atol=1e-6)
    # dy = d(tanh x / max |tanh x|), whose maximum takes part.
    k = np.unravel_index(np.argmax(np.abs(t)), t.shape)
    want = (1 - t**2) / np.abs(t[k])
    want[k] -= want[k] * np.sum(t) / t[k]
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-5)

  def test_activations(self):
    x = np.float32([-0.3, 0.0, 0.2, 0.6, 1.0, 1.4])
    y, dx = pulled_back(DoReFaActivation(2), x, np.full(6, 3, np.float32))
    np.testing.assert_allclose(y, [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(dx, [0, 3, 3, 3, 3, 0])

  def test_gradients_are_unbiased_and_on_the_grid(self):
    x, n = normal((4, 32), 4), 7
    keys = jax.random.split(KEY, 1000)
    y = jax.jit(jax.vmap(lambda k: DoReFaGradient(3)(x, -1, k)))(keys)
    y, top = np.asarray(y), np.abs(x).max()
    k = (y / (2 * top) + 0.5) * n
    np.testing.assert_allclose(k, np.round(k), atol=1e-5)
    # One step is 2 top / n; the error of a mean, 5 of its standard deviations.
    bound = 5 * (2 * top / n) * 0.5 / 1000**0.5
    np.testing.assert_array_less(np.abs(y.mean(0) - x), bound)
    _, dx = pulled_back(DoReFaGradient(3), x, x, key=KEY)
    np.testing.assert_array_equal(dx, x)


class SignTest(absltest.TestCase):
  def test_binary_connect(self):
    x = np.float32([-2, -1, -0.1, 0, 0.5, 1.5, np.nan])
    y, dx = pulled_back(Sign(), x, np.full(7, 2, np.float32))
    np.testing.assert_array_equal(y, [-1, -1, -1, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(dx, [0, 2, 2, 2, 2, 0, 0])

  def test_xnor(self):
    w = np.float32([[0.5, -2.0], [-0.1, 0.4]])  # 2 inputs, 2 outputs
    g = np.float32([[1, 1], [2, -1]])
    y, dx = pulled_back(Sign('mean'), w, g, axis=0)
    np.testing.assert_allclose(y, [[0.3, -1.2], [-0.3, 1.2]], rtol=1e-6)
    slope = 1 / 2 + np.array([[0.3, 0], [0.3, 1.2]])
    np.testing.assert_allclose(dx, g * slope, rtol=1e-6)


class QuartetTest(parameterized.TestCase):
  def test_equation(self):
    x, g = normal((8, 64), 5) * 3 + 1, normal((8, 64), 6)
    x[0, :32] *= 1e-6
    blocks = x.reshape(8, 2, 32).astype(np.float64)
    s = 2 ** np.floor(
      np.log2(2.92247856 / 6 * blocks.std(-1, keepdims=True) + 1e-8)
    )
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid[:0:-1], grid])
    v = blocks / s
    want = grid[np.argmin(np.abs(v[..., None] - grid), -1)] * s
    mask = (np.abs(v) < 6).reshape(8, 64)
    self.assertBetween(mask.mean(), 0.5, 0.999)
    y, dx = pulled_back(Quartet(), x, g)
    np.testing.assert_allclose(y, want.reshape(8, 64), rtol=1e-6)
    np.testing.assert_array_equal(dx, g * mask)

  def test_scale_of_a_power_of_two_is_not_its_half(self):
    # std = 2^k 6 / 2.92.. from above: log2 is just above an integer.
    std = np.float32(4 * 6 / 2.92247856 * (1 + 1e-6))
    x = np.tile(np.float32([std, -std]), (1, 16))
    y = np.asarray(jax.jit(Quartet())(x))
    np.testing.assert_array_equal(np.abs(y), 8)  # 4 e2m1(2.05)

  def test_refuses_sizes_that_blocks_do_not_divide(self):
    with self.assertRaisesRegex(ValueError, 'block=32 does not divide axis 1'):
      Quartet()(normal((3, 40)))


class QuestTest(parameterized.TestCase):
  @parameterized.parameters(*quantizers.GAUSSIAN_CLIPS)
  def test_clip_is_best_for_a_gaussian(self, bits):
    clip, n = quantizers.GAUSSIAN_CLIPS[bits], 2**bits - 1
    x = np.linspace(-8, 8, 400_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])

    def error(c):
      step = 2 * c / n
      y = step * (np.floor(np.clip(x, -c, c) / step + (n % 2) * 0.5 + 0.5))
      y = np.clip(y - (n % 2) * step / 2, -c, c)
      return np.sum(density * (y - x) ** 2)

    # Within 1 % of the clip the error is flat: half a percent of it.
    best = min(error(c) for c in clip * np.linspace(0.9, 1.1, 41))
    self.assertLess(error(clip), best * 1.005)

  @parameterized.parameters(1, 4)
  def test_equation(self, bits):
    self.check_equation(bits)

  @pytest.mark.slow
  def test_equation_of_three_bits(self):
    self.check_equation(3)

  def check_equation(self, bits):
    x, g = normal((5, 96), 7) * 2, normal((5, 96), 8)
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True))
    clip, n = quantizers.GAUSSIAN_CLIPS[bits], 2**bits - 1
    grid = rms * clip * (2 * np.arange(n + 1) - n) / n  # centred: no zero
    at = np.argmin(np.abs(x[..., None] - grid[:, None]), -1)
    want = np.take_along_axis(grid, at, -1)
    y, dx = pulled_back(Quest(bits), x, g)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    mask = np.abs(want - x) <= clip / n * rms
    np.testing.assert_array_equal(dx, g * mask)
    self.assertBetween(mask.mean(), 0.5, 0.999)
    # Half a step beyond the end of the grid: what rounding explains.
    edge = rms * clip * (1 + 1 / n)
    np.testing.assert_array_equal(mask, np.abs(x) <= edge)

  def test_trust_decides_the_mask(self):
    x = normal((5, 96), 9)
    _, none = pulled_back(Quest(4, 1e-6), x, np.ones_like(x))
    _, all_ = pulled_back(Quest(4, 100.0), x, np.ones_like(x))
    self.assertLess(none.mean(), 0.1)
    self.assertEqual(all_.mean(), 1)


class OutlierCompensatedTest(parameterized.TestCase):
  def test_residual_is_added_back(self):
    x, g = normal((4, 256), 10), normal((4, 256), 11)
    t = np.quantile(np.abs(x), 0.9)
    clamped = np.clip(x, -t, t).astype(np.float32)
    inner = np.asarray(fake_quant(clamped, formats.mxfp4, 'rceil'))
    y, dx = quickly_pulled_back(OutlierCompensated(MXFP4, 0.9), x, g)
    np.testing.assert_allclose(y, inner + (x - clamped), atol=1e-5)
    np.testing.assert_array_equal(dx, g)
    self.assertAlmostEqual(np.mean(x != clamped), 0.1, delta=0.01)

  def test_outliers_do_not_use_the_mask_of_the_inner_rule(self):
    x = normal((1, 256), 12)
    inner = Sign()  # no gradient beyond 1
    _, dx = quickly_pulled_back(
      OutlierCompensated(inner, 0.95), x, np.ones_like(x)
    )
    t = np.quantile(np.abs(x), 0.95)
    want = (np.abs(x) <= 1) | (np.abs(x) > t)
    np.testing.assert_array_equal(dx, want)

  @pytest.mark.slow
  def test_error_is_smaller_than_without(self):
    rng = np.random.default_rng(13)
    x = rng.standard_t(3, (1, 8192)).astype(np.float32)
    spec = OutlierCompensated(MXFP4)
    plain = np.mean((np.asarray(apply(MXFP4, x)) - x) ** 2)
    better = np.mean((np.asarray(apply(spec, x)) - x) ** 2)
    self.assertLess(better, 0.8 * plain)


class RowScaledTest(parameterized.TestCase):
  def test_takes_the_best_candidate_of_each_row(self):
    x = normal((16, 64), 14)
    y, dx = quickly_pulled_back(RowScaled(MXFP4, 3), x, x)
    np.testing.assert_array_equal(dx, x)
    scales = np.float32(2.0 ** (np.arange(3) / 3))
    every = np.stack([np.asarray(apply(MXFP4, x * c)) / c for c in scales])
    errors = np.sum((every.astype(np.float64) - x) ** 2, -1)
    self.assertGreater(len(set(errors.argmin(0))), 1)
    got = np.sum((np.asarray(y, np.float64) - x) ** 2, -1)
    np.testing.assert_allclose(got, errors.min(0), rtol=1e-5)

  @pytest.mark.slow
  def test_does_not_depend_on_where_in_a_binade_the_data_lies(self):
    x = normal((256, 32), 15)
    quantized = quick_jit(lambda x: quantizers.apply(RowScaled(MXFP4, 8), x))
    errors = [
      np.mean((np.asarray(quantized(x * c)) / c - x) ** 2)
      for c in np.float32([1, 1.25, 1.5, 1.75])
    ]
    self.assertLess(max(errors) / min(errors), 1.02)
    plain = np.mean((np.asarray(apply(MXFP4, x)) - x) ** 2)
    self.assertLess(max(errors), 0.9 * plain)


class EdenTest(parameterized.TestCase):
  def test_error_is_orthogonal_at_any_magnitude(self):
    x = normal((8, 96), 20)
    q = np.float64(apply(MXFP4, x))
    wide = np.float64(x)
    want = q * np.sum(wide**2, -1, keepdims=True)
    want /= np.sum(wide * q, -1, keepdims=True)
    for scale in (1.0, 2.0**-80, 2.0**70):  # squares leave the range
      y, dx = quickly_pulled_back(Eden(MXFP4), x * np.float32(scale), x)
      np.testing.assert_allclose(y / scale, want, rtol=1e-5)
      np.testing.assert_array_equal(dx, x)
    y, _ = quickly_pulled_back(Eden(MXFP4), np.zeros_like(x), x)
    np.testing.assert_array_equal(y, 0)

  NOISY = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')

  def moments(self, spec):
    """Noise and bias behind a new rotation in every call, one tensor."""
    x, eye = normal((64, 128), 21), np.eye(128, dtype=np.float32)
    recipe = Recipe('rotated', fwd=GemmSpec(spec, None, 32, 'per_call'))

    @quick_jit
    def error(i):
      key = jax.random.fold_in(KEY, i)
      return lowbit_jax.qdot(x, eye, recipe, key=key) - x

    errors = np.stack([np.float64(error(i)) for i in range(100)])
    return np.mean(errors**2), np.mean(errors.mean(0) * np.float64(x))

  @parameterized.parameters('even', 'mse')
  @pytest.mark.slow
  def test_less_noise_than_stochastic_rounding_and_little_bias(self, rule):
    nearest = QuantSpec(formats.mxfp4, rule)
    noise, _ = self.moments(self.NOISY)
    less, along = self.moments(Eden(nearest))
    _, shrunk = self.moments(nearest)
    self.assertLess(less, 0.5 * noise)
    self.assertLess(abs(along), 1e-3)
    self.assertLess(shrunk, -5e-3)


class FixedPointTest(parameterized.TestCase):
  def test_lattice_and_saturation(self):
    x = np.float32([-9, -4, -0.3, 0.26, 3.7, 3.8, 9])
    y, dx = pulled_back(
      FixedPoint(3, 2, 'nearest_even'), x, np.ones(7, np.float32)
    )
    np.testing.assert_array_equal(y, [-4, -4, -0.25, 0.25, 3.75, 3.75, 3.75])
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 1, 0, 0])

  def test_stochastic_rounding_is_unbiased(self):
    x = np.clip(normal((3, 32), 14), -3, 3)
    keys = jax.random.split(KEY, 1000)
    y = np.asarray(
      jax.jit(jax.vmap(lambda k: FixedPoint(3, 2)(x, -1, k)))(keys)
    )
    np.testing.assert_array_less(np.abs(y - x), 0.25)
    bound = 5 * 0.25 * 0.5 / 1000**0.5
    np.testing.assert_array_less(np.abs(y.mean(0) - x), bound)


class FormatsTest(absltest.TestCase):
  """What the block formats of the library already say exactly."""

  def test_bitnet_weights(self):
    w = np.float32([[0.5, -0.1, 0.02], [-0.9, 0.3, -0.25]])
    q = quantize(w, formats.ternary_tensor)
    np.testing.assert_allclose(q.tensor_scale, [[0.345]], rtol=1e-6)
    y = apply(QuantSpec(formats.ternary_tensor), w)
    codes = np.array([[1, 0, 0], [-1, 1, -1]])
    np.testing.assert_allclose(y, 0.345 * codes, rtol=1e-6)

  @pytest.mark.slow
  def test_bitnet_product(self):
    x, w = normal((5, 64), 15), normal((64, 16), 16) * 0.02
    recipe = Recipe(
      'bitnet',
      GemmSpec(
        QuantSpec(formats.int8_channel), QuantSpec(formats.ternary_tensor)
      ),
    )
    y = jax.jit(lambda x, w: lowbit_jax.qdot(x, w, recipe))(x, w)
    gamma = np.mean(np.abs(w.astype(np.float64)))
    codes = np.clip(np.round(w / (gamma + 1e-5)), -1, 1)
    top = np.abs(x).max(-1, keepdims=True)
    want = np.round(x * (127 / top)) @ codes * gamma * top / 127
    # One code of x may round the other way: by gamma top / 127.
    np.testing.assert_allclose(y, want, atol=1.01 * gamma * top.max() / 127)

  def test_integers_are_symmetric(self):
    x = normal((64, 64), 17)
    for fmt in (formats.mxint8, formats.int8_channel):
      q = quantize(x, fmt)
      codes = np.asarray(q.codes).view(np.int8)
      self.assertGreaterEqual(codes.min(), -127)
      self.assertLess(codes.min(), -60)

  def test_apply_scales_elements_once_their_scale_is_chosen(self):
    fmt = formats.mxfp4
    x = normal((8, 64), 18)
    late_x = x * np.float32(0.75)

    @quick_jit
    def held(x, late_x):
      scale = lowbit_jax.quantize(x, fmt).scale  # of x, and not of 0.75 x
      q = lowbit_jax.quantize_with(late_x, scale, fmt)
      return lowbit_jax.dequantize(q)

    want = np.asarray(held(x, late_x)) / 0.75
    got = apply(QuantSpec(fmt, 'floor', prescale=0.75), x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    late = np.asarray(fake_quant(late_x, fmt, 'floor')) / 0.75
    self.assertGreater(np.max(np.abs(late - want)), 0.1)
    self.assertIs(quantizers.apply(None, x), x)


class ArgumentsTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: DoReFaWeight(0), ValueError, 'bits=0'),
    (lambda: DoReFaGradient(2.0), ValueError, 'bits=2.0'),
    (lambda: Sign('row'), ValueError, 'scale='),
    (lambda: Quartet(0), ValueError, 'block=0'),
    (lambda: Quest(9), ValueError, 'bits=9'),
    (lambda: Quest(4, 0.0), ValueError, 'trust=0.0'),
    (lambda: OutlierCompensated(None), TypeError, 'inner=None'),
    (lambda: OutlierCompensated('mxfp4'), TypeError, 'inner='),
    (lambda: OutlierCompensated(MXFP4, 99), ValueError, 'quantile=99'),
    (lambda: RowScaled(None), TypeError, 'inner=None'),
    (
      lambda: RowScaled(QuantSpec(formats.mxfp4, rounding='stochastic')),
      ValueError,
      'round to nearest',
    ),
    (lambda: Eden(None), TypeError, 'inner=None'),
    (lambda: Eden(MXFP4_TILES), ValueError, 'blocks along one axis'),
    (lambda: RowScaled(MXFP4, 1), ValueError, 'candidates=1'),
    (lambda: FixedPoint(20, 8), ValueError, '1..24'),
    (lambda: FixedPoint(3, 2, 'up'), ValueError, "rounding='up'"),
    (lambda: FixedPoint(3, 2)(np.float32([1])), ValueError, 'needs key'),
    (lambda: DoReFaGradient(2)(np.float32([1])), ValueError, 'needs key'),
    (lambda: Sign()(np.arange(3)), TypeError, 'astype'),
  )
  def test_refuses(self, call, error, message):
    with self.assertRaisesRegex(error, message):
      call()


if __name__ == '__main__':
  absltest.main()
