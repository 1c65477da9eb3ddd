"""MicroScaling: published figures, a float64 reference, and its surrogates."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.training import micro_scaling as ms
from lowbit_jax.training.micro_scaling import (
  SCALES,
  Dge,
  MicroScaling,
  Sigmoid,
  Spline,
)
from tests.compilation import quick_jit

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ZERO_SLOPE = Sigmoid(low=0.0, high=0.0)  # the true derivative of a rounder
IDEAL = dict(scale=SCALES['ideal'], tensor_scale='off')
E8M0 = dict(scale=SCALES['E8M0'], tensor_scale='off')
NARROW = dict(tensor_scale='off', allow_underflow=True)


@functools.cache
def normal(shape=(1, 131072), seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def student(size: float = 1.0) -> np.ndarray:
  rng = np.random.default_rng(0)
  rng.standard_normal((1, 131072))
  t = rng.standard_t(3, (1, 131072))
  return (size * t).astype(np.float32)


def snr(x, quantizer) -> float:
  """Signal to noise in dB."""
  y, x = np.asarray(quantizer(x), np.float64), np.asarray(x, np.float64)
  return 10 * np.log10(np.sum(x**2) / np.sum((y - x) ** 2))


def assert_bits(got, want):
  got, want = np.asarray(got), np.asarray(want)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


# The reference: the equations in float64, rounders by table, jax.grad.


def positive_table(scale) -> np.ndarray:
  if scale.bits > 8:  # BF16 and E8M3: the binades that the tests touch
    m = scale.mantissa_bits
    steps = 1 + np.arange(1 << m) / (1 << m)
    table = (steps * 2.0 ** np.arange(-60, 61)[:, None]).ravel()
    return np.concatenate([[0.0], table])
  values = scale.values()
  return np.unique(values[np.isfinite(values) & (values >= 0)])


def bin_of(v, table):
  """Ends of the bin of |v| in a table of non-negative numbers."""
  size = jnp.clip(jnp.abs(v), table[0], table[-1])
  i = jnp.clip(jnp.sum(size[..., None] >= table, -1) - 1, 0, len(table) - 2)
  table = jnp.asarray(table)
  return size, table[i], table[i + 1]


def rounded(v, table, how='nearest_even'):
  size, low, high = bin_of(v, table)
  up = {
    'nearest_even': size - low > high - size,
    'up': size > low,
    'down': size == high,
    'zero': size == high,
  }[how]
  return jnp.sign(v) * jnp.where(up, high, low)


def slope_of(surrogate, v, table, span=None):
  size, low, high = bin_of(v, table)
  width, middle = high - low, (high + low) / 2
  if isinstance(surrogate, Dge):
    k = surrogate.power
    slope = jnp.abs(2 * (size - middle) / width) ** (1 / k - 1) / k
    return jnp.minimum(slope, surrogate.ceiling)
  if isinstance(surrogate, Sigmoid):
    s = jax.nn.sigmoid(12 * (size - middle) / (width * surrogate.temperature))
    slope = 12 * s * (1 - s) / surrogate.temperature
    return jnp.clip(slope, surrogate.low, surrogate.high)
  if isinstance(surrogate, Spline):
    if span is None:  # over the binade of the number
      start = 2.0 ** jnp.floor(jnp.log2(size))
      knots = start[..., None] * (1 + np.linspace(0, 1, surrogate.points))
    else:
      knots = np.linspace(-span, span, surrogate.points)
      knots = jnp.broadcast_to(knots, (*v.shape, surrogate.points))
      size = jnp.clip(v, -span, span)
    slopes = jnp.diff(rounded(knots, table)) / jnp.diff(knots)
    i = jnp.sum(knots[..., 1:-1] <= size[..., None], -1)
    slope = jnp.take_along_axis(slopes, i[..., None], -1)[..., 0]
    return jnp.clip(slope, surrogate.low, surrogate.high)
  return jnp.ones_like(v)


def through(value, slope, v):
  """`value` with the derivative `slope` with respect to v."""
  stop = jax.lax.stop_gradient
  return stop(value) + stop(slope) * (v - stop(v))


def reference(x, how: MicroScaling):
  """x (blocks, B) in float64, one block per row."""
  stop, largest = jax.lax.stop_gradient, how.element.max
  size = jnp.abs(x)
  amax = jnp.max(size, axis=-1, keepdims=True)
  soft = jax.nn.logsumexp(how.alpha * size, -1, keepdims=True) / how.alpha
  z = {
    'ignore': stop(amax),
    'absmax': amax,
    'hardsoftmax': stop(amax) + soft - stop(soft),
    'softsoftmax': soft,
  }[how.stat_grad]
  t = 1.0
  if how.tensor_scale == 'current':
    g = jnp.max(z if how.stat_grad == 'softsoftmax' else size)
    g = stop(g) if how.tensor_scale_grad == 'ignore' else g
    top = 1.0 if how.scale.exponent_bits >= 8 else how.scale.max
    t = g / (largest * top)

  ideal = how.scale == SCALES['ideal']
  table = None if ideal else positive_table(how.scale)

  def q(u):
    if ideal:
      return u
    value = rounded(u, table, how.scale_round)
    zero = 1.0 if how.zero_scale == 'to_one' else table[table > 0][0]
    value = jnp.where(value == 0, zero, value)
    return through(value, slope_of(how.scale_grad, u, table), u)

  exact = z / largest
  if how.tensor_scale_grad == 'absmax':
    # q' = 1 for the way through t, that of scale_grad for the way through Z.
    via_z = q_of(how, q, exact, stop(t))
    straight = dataclasses.replace(
      how, stat_grad='absmax', scale_grad='identity'
    )

    def q_straight(u):
      return through(q(u), jnp.ones_like(u), u)

    via_t = q_of(straight, q_straight, stop(exact), t)
    decode = via_z + via_t - stop(via_t)
  else:
    decode = q_of(how, q, exact, t)
  payload = exact if how.payload == 'unrounded' else decode
  v = x / payload
  elements = rounded(v, E2M1)
  slope = slope_of(how.step_grad, v, E2M1, largest)
  return through(elements, slope, v) * decode


def q_of(how, q, exact, t):
  return q(exact / t) * t if how.scale_form == 'decode' else t / q(t / exact)


VARIANTS = (  # Every value of every option but E8M3 appears.
  IDEAL | dict(stat_grad='softsoftmax', step_grad='sigmoid', alpha=3.0),
  E8M0 | dict(stat_grad='absmax', scale_grad='spline', step_grad='dge'),
  dict(
    scale=SCALES['UE5M3'], scale_round='zero', stat_grad='hardsoftmax',
    scale_grad=Dge(power=3.0), payload='unrounded',
  ),
  dict(
    tensor_scale_grad='full', scale_grad='sigmoid', scale_form='encode',
    scale_round='down',
  ),
  dict(
    scale=SCALES['BF16'], tensor_scale_grad='absmax', step_grad='spline',
    scale_round='up',
  ),
  NARROW
  | dict(
    scale=SCALES['E5M2'], zero_scale='to_one', scale_form='encode',
    step_grad=Spline(9),
  ),
)  # fmt: skip
MORE_VARIANTS = (
  {},
  dict(stat_grad='absmax', scale_grad=Dge(power=3.0), payload='unrounded'),
  dict(tensor_scale_grad='full', scale_grad='sigmoid', scale_form='encode'),
  dict(scale=SCALES['UE5M3'], scale_round='zero', stat_grad='hardsoftmax'),
  dict(scale=SCALES['E8M3'], tensor_scale_grad='absmax', scale_round='down'),
  dict(scale=SCALES['BF16'], step_grad='spline', scale_round='up'),
  IDEAL | dict(stat_grad='absmax'),
  IDEAL | dict(stat_grad='hardsoftmax', step_grad='dge', scale_form='encode'),
  E8M0 | dict(scale_round='up', step_grad='spline'),
  E8M0 | dict(scale_form='encode', scale_round='down', stat_grad='absmax'),
  E8M0 | dict(stat_grad='absmax', scale_grad='dge'),
  dict(stat_grad='absmax', scale_form='encode', payload='unrounded'),
  dict(scale_form='encode', stat_grad='absmax', scale_grad='sigmoid'),
  dict(tensor_scale_grad='absmax', stat_grad='absmax', scale_grad='sigmoid'),
  dict(tensor_scale_grad='full', stat_grad='absmax', scale_grad='sigmoid'),
  dict(tensor_scale_grad='full', scale_grad='dge', payload='unrounded'),
  dict(tensor_scale_grad='full', scale_grad='spline'),
  dict(scale=SCALES['UE5M3'], stat_grad='softsoftmax', scale_form='encode'),
  dict(scale=SCALES['E5M2'], tensor_scale='off', stat_grad='absmax'),
  dict(scale=SCALES['BF16'], stat_grad='absmax', scale_round='up'),
  NARROW | dict(zero_scale='to_one', scale_form='encode', step_grad=Spline(9)),
)


@functools.partial(quick_jit, static_argnums=0)
def pulled_back(quantizer, x, g):
  """The value and the pulled-back cotangent g."""
  y, vjp = jax.vjp(quantizer, x)
  return y, vjp(g)[0]


class ReferenceTest(parameterized.TestCase):
  def _check_value_and_gradient(self, options):
    how = MicroScaling(**options)
    x, g = normal((6, 16), 3), normal((6, 16), 4)
    y, dx = pulled_back(how, x, g)
    with jax.enable_x64(True):
      want, want_dx = pulled_back(
        lambda x: reference(x, how), np.float64(x), np.float64(g)
      )
    # Sums of 16 terms of a few roundings each; surrogates raise 1e-7 errors of
    # v to slopes of up to 15 per bin, and 12^2 for the logistic.
    np.testing.assert_allclose(y, want, rtol=2e-6)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-4)

  @parameterized.parameters(*({'options': o} for o in VARIANTS))
  def test_value_and_gradient(self, options):
    self._check_value_and_gradient(options)

  @parameterized.parameters(*({'options': o} for o in MORE_VARIANTS))
  @pytest.mark.slow
  def test_value_and_gradient_of_more_variants(self, options):
    self._check_value_and_gradient(options)

  def test_published_example(self):
    self._check_published_example('decode')

  @pytest.mark.slow
  def test_published_example_of_encode_scales(self):
    self._check_published_example('encode')

  def _check_published_example(self, form):
    x = np.array([[0.3, -0.7, 1.1, -2.0]], np.float32)
    g = np.array([[1, 2, -1, 0.5]], np.float32)
    how = MicroScaling(block=4, stat_grad='absmax', scale_form=form, **IDEAL)
    y, dx = pulled_back(how, x, g)
    np.testing.assert_allclose(y, [[1 / 3, -2 / 3, 1, -2]], rtol=1e-6)
    np.testing.assert_allclose(dx, [[1, 2, -1, 0.4]], rtol=1e-6)

  def test_plain_estimator_is_the_identity(self):
    x, g = normal((4, 20)), normal((4, 20), 5)
    for c in (1e-8, 1.0, 1e8):
      _, dx = pulled_back(MicroScaling(), x, g * np.float32(c))
      assert_bits(dx, g * np.float32(c))

  def _check_padding_takes_no_part(self, stat):
    how = MicroScaling(stat_grad=stat, alpha=0.1, **IDEAL)
    x, g = normal((3, 10), 6), normal((3, 10), 7)
    y, dx = pulled_back(how, x, g)
    want, want_dx = pulled_back(dataclasses.replace(how, block=10), x, g)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-5)

  def test_plain_estimator_differentiates_again(self):
    """As x + stop_gradient(f(x) - x)."""
    x, t = normal((2, 16)), normal((2, 16), seed=1)

    def gradient(x):
      return jax.grad(lambda x: jnp.sum(MicroScaling()(x) ** 3))(x)

    f, both = (
      jax.jit(MicroScaling()),
      jax.jit(
        lambda x, t: (
          jax.jvp(gradient, (x,), (t,))[1],
          jax.vjp(gradient, x)[1](t)[0],
        )
      ),
    )
    for got in both(x, t):
      np.testing.assert_allclose(got, 6 * f(x) * t, rtol=1e-5)

  @pytest.mark.slow
  def test_forward_mode_is_the_transpose(self):
    how = MicroScaling(step_grad='dge', stat_grad='absmax')
    x, t, g = (normal((2, 16), seed=i) for i in range(3))

    @jax.jit
    def products(x, t, g):
      forward = jax.jvp(how, (x,), (t,))[1]
      return jnp.vdot(forward, g), jnp.vdot(jax.vjp(how, x)[1](g)[0], t)

    a, b = products(x, t, g)
    np.testing.assert_allclose(a, b, rtol=1e-4)

  def test_slopes_that_depend_on_x_have_no_derivative(self):
    for options in ({'step_grad': 'dge'}, {'stat_grad': 'absmax'}):
      f = MicroScaling(**options)
      gradient = jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))
      x = normal((1, 16))
      with self.assertRaisesRegex(NotImplementedError, 'step_grad=Identity'):
        jax.eval_shape(lambda x, g=gradient: jax.jvp(g, (x,), (x,)), x)

  def test_padding_takes_no_part(self):
    self._check_padding_takes_no_part('softsoftmax')

  @parameterized.parameters('absmax', 'hardsoftmax')
  @pytest.mark.slow
  def test_padding_takes_no_part_in_more_statistics(self, stat):
    self._check_padding_takes_no_part(stat)


class PublishedFiguresTest(parameterized.TestCase):
  def _check_snr(self, scale, form, rounding, want):
    how = MicroScaling(
      scale=SCALES[scale], scale_form=form, scale_round=rounding
    )
    self.assertAlmostEqual(snr(normal(), how), want, delta=0.15)

  def test_snr_of_encode_scales(self):
    self._check_snr('E4M3', 'encode', 'up', 17.14)

  @parameterized.parameters(
    ('E4M3', 'decode', 'nearest_even', 20.42),
    ('UE5M3', 'encode', 'nearest_even', 19.92),
    ('UE5M3', 'decode', 'nearest_even', 20.42),
    ('E4M3', 'encode', 'nearest_even', 19.03),
    ('UE5M3', 'encode', 'up', 19.18),
  )
  @pytest.mark.slow
  def test_snr_of_more_scale_forms(self, scale, form, rounding, want):
    self._check_snr(scale, form, rounding, want)

  @pytest.mark.slow
  def test_snr_of_exact_and_power_of_two_scales(self):
    ceil = MicroScaling(block=32, scale_round='up', **E8M0)
    self.assertAlmostEqual(
      snr(normal(), MicroScaling(**IDEAL)), 20.52, delta=0.15
    )
    self.assertAlmostEqual(snr(normal(), ceil), 18.73, delta=0.15)
    self.assertAlmostEqual(snr(student(), MicroScaling()), 20.83, delta=0.15)
    self.assertAlmostEqual(snr(student(), ceil), 16.37, delta=0.15)

  @parameterized.parameters(('E4M3', 0.05), ('UE5M3', 17.6))
  def test_snr_of_small_data_without_tensor_scale(self, scale, want):
    how = MicroScaling(scale=SCALES[scale], **NARROW)
    self.assertAlmostEqual(snr(student(1e-5), how), want, delta=0.15)

  @parameterized.parameters(0.25, 0.5)
  @pytest.mark.slow
  def test_unrounded_payload_is_worse(self, seed):
    x = normal(seed=int(seed * 4))
    how = MicroScaling(scale_form='encode', scale_round='up')
    other = dataclasses.replace(how, payload='unrounded')
    self.assertLess(snr(x, other), snr(x, how))


slope_on = quick_jit(
  lambda surrogate, lattice, v: surrogate.slope(v, lattice),
  static_argnums=(0, 1),
)


class SurrogateTest(parameterized.TestCase):
  """Surrogates are derivatives of stated functions, on every lattice."""

  def mean_slope(self, surrogate, lattice, low, high, n=50_001):
    # Midpoints of cells: no cell reaches over an end of the range.
    v = low + (high - low) * (np.arange(n) + 0.5) / n
    return float(np.mean(slope_on(surrogate, lattice, np.float32(v))))

  @parameterized.parameters((-6, 6), (0.5, 1), (2, 3), (4, 6))
  def test_dge_mean_is_that_of_the_clipped_power(self, low, high):
    mean = self.mean_slope(Dge(), element_lattice(), low, high)
    # ∫ min(|t|^(-4/5) / 5, 3) dt over (0, 1), cut at t = 15^(-5/4).
    cut = 15**-1.25
    self.assertAlmostEqual(mean, 3 * cut + 1 - cut**0.2, delta=1e-4)
    self.assertAlmostEqual(mean, 0.593, delta=1e-3)

  def test_dge_is_the_derivative_of_its_power(self):
    v = np.float32([0.6, 2.2, 3.9, 5.9, -0.1, -4.3])
    low = np.array([0.5, 2, 3, 4, -0.5, -6])
    high = np.array([1, 3, 4, 6, 0, -4])

    def power(v):  # f(v) = m + (delta / 2) sign(.) |2 (v - m) / delta|^(1/k)
      t = 2 * (v - (low + high) / 2) / (high - low)
      return (high - low) / 2 * np.sign(t) * np.abs(t) ** (1 / 5)

    h = 1e-6
    want = (power(np.float64(v) + h) - power(np.float64(v) - h)) / (2 * h)
    got = slope_on(Dge(ceiling=100.0), element_lattice(), v)
    np.testing.assert_allclose(got, want, rtol=1e-4)

  @parameterized.parameters(0.5, 1.0, 4.0)
  def test_sigmoid_climbs_one_bin(self, temperature):
    wide = Sigmoid(temperature, low=0.0, high=100.0)
    rise = np.tanh(3 / temperature)  # sigma(6 / T) - sigma(-6 / T)
    for low, high in itertools.pairwise(E2M1):
      mean = self.mean_slope(wide, element_lattice(), low, high)
      self.assertAlmostEqual(mean, rise, delta=1e-3)

  def test_sigmoid_is_clipped(self):
    slope = slope_on(Sigmoid(), element_lattice(), np.float32([2.5, 2, 6]))
    np.testing.assert_allclose(slope, [1.5, 0.3, 0.3])

  @parameterized.parameters(2, 7, 40)
  def test_spline_climbs_the_whole_range(self, points):
    free = Spline(points, low=0.0, high=1e6)
    mean = self.mean_slope(free, element_lattice(), -6, 6)
    self.assertAlmostEqual(mean, 1.0, delta=2e-3)

  @parameterized.parameters('E8M0', 'E4M3', 'UE5M3', 'E8M3', 'BF16')
  def test_spline_of_scales_climbs_a_binade(self, scale):
    lattice = ms.Lattice(ms._scale_spec(SCALES[scale]), None)
    mean = self.mean_slope(Spline(low=0.0, high=1e6), lattice, 0.25, 0.5)
    self.assertAlmostEqual(mean, 1.0, delta=2e-3)

  def test_slope_beyond_the_range_is_that_of_the_end(self):
    for surrogate in (Dge(), Sigmoid(), Spline()):
      v = np.float32([6, 60, -6, -60])
      slope = slope_on(surrogate, element_lattice(), v)
      self.assertEqual(float(slope[0]), float(slope[1]))
      self.assertEqual(float(slope[2]), float(slope[3]))

  def _check_differences(self, stat):
    how = MicroScaling(stat_grad=stat, step_grad=ZERO_SLOPE, **IDEAL)
    x, g = normal((2, 16), 8).astype(np.float64), normal((2, 16), 9)
    dx = np.asarray(pulled_back(how, np.float32(x), g)[1])
    # f is linear in S between jumps of its codes, of which there are none
    # within the step.
    h = 2.0**-10
    for i in np.ndindex(2, 16):
      step = np.zeros_like(x)
      step[i] = h
      high, low = how(np.float32(x + step)), how(np.float32(x - step))
      slope = np.sum(g * (np.float64(high) - np.float64(low))) / (2 * h)
      self.assertAlmostEqual(dx[i], slope, delta=2e-2 * np.abs(g).max())

  @parameterized.parameters('softsoftmax', 'absmax')
  @pytest.mark.slow
  def test_true_derivative_agrees_with_differences(self, stat):
    self._check_differences(stat)

  @pytest.mark.slow
  def test_true_derivative_of_the_tensor_scale(self):
    how = MicroScaling(
      tensor_scale_grad='full', step_grad=ZERO_SLOPE, scale_grad=ZERO_SLOPE
    )
    x, g = normal((2, 32), 10), normal((2, 32), 11)
    y, dx = pulled_back(how, x, g)
    # With codes held, f is proportional to the largest magnitude.
    k = np.unravel_index(np.argmax(np.abs(x)), x.shape)
    want = np.zeros_like(x)
    want[k] = np.sum(np.float64(g) * np.asarray(y)) / x[k]
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-6)


def element_lattice():
  return ms.Lattice(ms.spec(formats.e2m1), 6.0)


class AgreementTest(parameterized.TestCase):
  """Where it says the same as the formats of the library, bits agree."""

  PAIRS = (
    (dict(), formats.nvfp4, {}),
    (
      E8M0 | dict(block=32, scale_round='up'),
      formats.mxfp4,
      dict(scale_rule='rceil'),
    ),
    (dict(block=(16, 16)), formats.nvfp4_16x16, {}),
    (
      E8M0 | dict(block=32, scale_round='up', element=formats.e4m3fn),
      formats.mxfp8_e4m3,
      dict(scale_rule='rceil'),
    ),
  )

  def data(self):
    x = normal((33, 100), 12) * np.exp(normal((33, 100), 13))
    x[3, 20:60] = 0
    x[4, 5] = 6 * 2.0**-3
    return x

  def _check_values(self, pair, axis):
    options, fmt, arguments = pair
    x, other = self.data(), axis
    if fmt.is_tile:
      other = (axis, 1 - axis)
    dtype = (jnp.float32, jnp.bfloat16)[axis]
    x = jnp.asarray(x, dtype)
    got = MicroScaling(**options)(x, axis)
    want = lowbit_jax.fake_quant(x, fmt, axis=other, **arguments)
    self.assertEqual(got.dtype, dtype)
    assert_bits(np.asarray(got, np.float32), np.asarray(want, np.float32))

  @parameterized.parameters(*zip(PAIRS[:3], (0, 1, 0), strict=True))
  def test_values(self, pair, axis):
    self._check_values(pair, axis)

  @parameterized.parameters(
    *zip(PAIRS, (1, 0, 1, 0), strict=True), (PAIRS[3], 1)
  )
  @pytest.mark.slow
  def test_values_along_other_axes(self, pair, axis):
    self._check_values(pair, axis)

  def test_stochastic_values(self):
    key = jax.random.key(7)
    got = MicroScaling(rounding='stochastic')(self.data(), -1, key)
    want = lowbit_jax.fake_quant(
      self.data(), formats.nvfp4, rounding='stochastic', key=key
    )
    assert_bits(got, want)

  @pytest.mark.slow
  def test_absmax_gradient(self):
    x, g = self.data(), normal((33, 100), 14)
    how = MicroScaling(
      block=32, scale_form='encode', scale_round='down', stat_grad='absmax',
      **E8M0,
    )  # fmt: skip
    y, dx = pulled_back(how, x, g)
    want, want_dx = pulled_back(
      lambda x: lowbit_jax.fake_quant(
        x, formats.mxfp4, scale_rule='rceil', backward='absmax'
      ),
      x,
      g,
    )
    assert_bits(y, want)
    np.testing.assert_allclose(dx, want_dx, rtol=2e-5, atol=1e-5)

  def test_poison_stays_in_its_block(self):
    x = self.data()
    x[3, 0], x[20, 40] = np.nan, np.inf
    got = MicroScaling()(x, 0)
    np.testing.assert_array_equal(
      got, lowbit_jax.fake_quant(x, formats.nvfp4, axis=0), strict=True
    )
    self.assertEqual(np.isnan(got).sum(), 32)


def draws(how, x, seed: int, n: int) -> np.ndarray:
  """n independent roundings of x."""

  @quick_jit
  def run(key):
    return jax.vmap(lambda k: how(x, -1, k))(jax.random.split(key, n))

  return np.asarray(run(jax.random.key(seed)))


class RoundingTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_stochastic_rounding_has_no_bias(self):
    how = MicroScaling(rounding='stochastic', scale_round='up', **E8M0)
    x = normal((4, 64), 16)
    y = draws(how, x, 0, 400)
    mean = np.mean(y, 0)
    # A step is at most a third of the block maximum, its variance at most 1/4
    # of the square; 5 standard deviations of the mean.
    amax = np.abs(x).reshape(4, 4, 16).max(-1).repeat(16, -1)
    bound = 5 * (2 / 3 * amax) * 0.5 / 20
    np.testing.assert_array_less(np.abs(mean - x), bound)
    self.assertGreater(np.abs(mean - y[0]).max(), 0)

  def test_stochastic_scales_are_unbiased_neighbours(self):
    how = MicroScaling(scale_round='stochastic', scale=SCALES['UE5M3'])
    x = np.full((1, 32), 1.0, np.float32)
    x[0, 16:] = 1 / 2.9
    y = draws(how, x, 1, 2000)[:, 0, 16:]
    self.assertLen(np.unique(y), 2)
    # Neighbouring scales differ by at most 1/8.
    self.assertAlmostEqual(y.mean() * 2.9, 1, delta=5 * 0.5 / 8 / 2000**0.5)

  def _check_bound_of_the_block(self, form):
    x = np.abs(normal((64, 16), 17))
    amax = x.max(-1)
    upper, lower = ('up', 'down') if form == 'decode' else ('down', 'up')
    for rounding, holds in ((upper, True), (lower, False)):
      how = MicroScaling(
        scale=SCALES['UE5M3'], tensor_scale='off', scale_form=form,
        scale_round=rounding,
      )  # fmt: skip
      saturates = np.asarray(how(x)).max(-1) < amax * (1 - 1e-6)
      # A scale that is too small loses the maximum, one that is large enough
      # may round it either way.
      self.assertEqual(bool(saturates.all()), not holds)

  @parameterized.parameters(*ms.SCALE_FORMS)
  @pytest.mark.slow
  def test_rounded_up_or_down_scales_bound_the_block(self, form):
    self._check_bound_of_the_block(form)

  @parameterized.parameters(('nearest_subnormal', 2.0**-9), ('to_one', 1.0))
  def test_scale_that_rounds_to_zero(self, zero_scale, scale):
    x = np.full((1, 16), 2.0**-9 * 2, np.float32)  # Z / F = 2^-9 / 3
    how = MicroScaling(zero_scale=zero_scale, **NARROW)
    # Up to 2 the steps of E2M1 are 1 / 2.
    want = np.round(x / scale * 2) / 2 * scale
    np.testing.assert_array_equal(how(x), want)

  @pytest.mark.slow
  def test_ideal_scales_reach_the_largest_element(self):
    x = normal((8, 16), 18)
    y = np.asarray(MicroScaling(**IDEAL)(x))
    at = np.argmax(np.abs(x), -1)[:, None]
    np.testing.assert_allclose(
      np.take_along_axis(y, at, -1), np.take_along_axis(x, at, -1), rtol=1e-6
    )

  def _check_zero_and_tiny_blocks(self, **options):
    how = MicroScaling(**options)
    x = np.zeros((3, 16), np.float32)
    x[1] = 2.0**-126
    x[2] = 1e-30
    # Six rows: the programs of `test_value_and_gradient`.
    for rows in ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 1, 2, 0, 1, 2]):
      y, dx = pulled_back(how, x[rows], np.ones((6, 16), np.float32))
      self.assertTrue(np.isfinite(y).all())
      self.assertTrue(np.isfinite(dx).all())
      np.testing.assert_array_equal(y[0], 0)

  @parameterized.parameters(*({'options': o} for o in VARIANTS))
  def test_zero_and_tiny_blocks_are_finite(self, options):
    self._check_zero_and_tiny_blocks(**options)

  @parameterized.parameters(*itertools.product(SCALES, ms.SCALE_FORMS))
  @pytest.mark.slow
  def test_zero_and_tiny_blocks_of_all_scales_are_finite(self, scale, form):
    off = 'off' if scale == 'ideal' else 'current'
    self._check_zero_and_tiny_blocks(
      scale=SCALES[scale], scale_form=form, tensor_scale=off, stat_grad='absmax'
    )


class ArgumentsTest(parameterized.TestCase):
  def test_is_a_static_value(self):
    how = MicroScaling(step_grad='dge')
    self.assertEqual(how, MicroScaling(step_grad=Dge()))
    self.assertEqual(hash(how), hash(MicroScaling(step_grad=Dge())))
    self.assertFalse(how.needs_key)
    self.assertTrue(MicroScaling(rounding='stochastic').needs_key)
    self.assertTrue(MicroScaling(scale_round='stochastic').needs_key)

  @parameterized.parameters(
    (dict(scale_round='rne'), 'scale_round.*nearest_even'),
    (dict(step_grad='ste'), 'step_grad.*identity'),
    (dict(stat_grad='ste'), 'stat_grad.*ignore'),
    (dict(step_grad='tanh'), 'step_grad.*dge'),
    (dict(tensor_scale='off'), 'allow_underflow'),
    (dict(tensor_scale_grad='full', **E8M0), "tensor_scale='current'"),
    (dict(tensor_scale_grad='full', stat_grad='softsoftmax'), 'ignore'),
    (dict(scale_grad='dge'), 'stat_grad'),
    (dict(IDEAL, scale_round='up'), 'scale_round.*no effect'),
    (dict(scale=SCALES['ideal']), 'tensor_scale.*no effect'),
    (dict(E8M0, zero_scale='to_one'), 'zero_scale.*no effect'),
    (dict(element=formats.bfloat16), 'at most 8 bits'),
    (dict(element=formats.ue5m3), 'a sign'),
    (dict(block=0), 'block=0'),
    (dict(alpha=0.0), 'alpha'),
  )
  def test_refuses_what_makes_no_sense(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      MicroScaling(**options)

  def test_refuses_bad_parameters(self):
    for make in (
      lambda: Dge(power=0.5),
      lambda: Sigmoid(temperature=0.0),
      lambda: Sigmoid(low=2.0),
      lambda: Spline(points=1),
    ):
      with self.assertRaises(ValueError):
        make()
    with self.assertRaisesRegex(TypeError, 'FloatFormat'):
      MicroScaling(element=formats.int4)

  def test_refuses_bad_calls(self):
    x = np.ones((4, 16), np.float32)
    with self.assertRaisesRegex(ValueError, 'needs key'):
      MicroScaling(rounding='stochastic')(x)
    with self.assertRaisesRegex(TypeError, 'float64|astype'):
      MicroScaling()(np.ones((4, 16)).astype(np.int32))
    with self.assertRaisesRegex(ValueError, 'last two'):
      MicroScaling(block=(2, 2))(np.ones((4, 4, 4), np.float32), 0)


if __name__ == '__main__':
  absltest.main()
