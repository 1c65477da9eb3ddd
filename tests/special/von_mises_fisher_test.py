"""The von Mises-Fisher distribution: closed forms, and its own samples."""

import functools

import jax
import mpmath
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import special

from lowbit_jax.special import von_mises_fisher

MANY = (10, 2000)
# From where the power series holds to where the uniform expansion does.
KAPPA = np.float32(np.geomspace(2, 200, 10))[:, None]

log_prob = jax.jit(von_mises_fisher.log_prob)
fit = jax.jit(von_mises_fisher.fit)
_sample = jax.jit(von_mises_fisher.sample, static_argnums=3)


def sample(seed: int, mean, kappa, shape) -> np.ndarray:
  """Compiled, one program for each shape."""
  key = jax.random.key(seed)
  return np.asarray(_sample(key, mean, np.float32(kappa), shape))


@functools.cache
def sets() -> np.ndarray:
  """2000 samples in 8 dimensions for each of 10 kappas (KAPPA)."""
  return sample(0, unit(8), KAPPA, MANY)


def unit(p: int, seed: int = 0, shape=()) -> np.ndarray:
  x = np.random.default_rng(seed).standard_normal((*shape, p))
  return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


class LogProbTest(parameterized.TestCase):
  def test_on_the_sphere(self):
    # p = 3: kappa / (4 pi sinh kappa) exp(kappa cos).
    kappa = np.float32([0.5, 2, 20, 80])
    mean, x = unit(3, 0), unit(3, 1)
    want = np.log(kappa / (2 * np.pi * -np.expm1(-2.0 * kappa)))
    want = want + kappa * (np.float64(x) @ mean - 1)
    got = log_prob(x, mean, kappa)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-5)

  def assert_is_that_of_scipy(self, p, kappa):
    v = p / 2 - 1
    log_iv = np.log(special.ive(v, kappa)) + kappa
    log_c = v * np.log(kappa) - p / 2 * np.log(2 * np.pi) - log_iv
    with jax.enable_x64(True):
      x, mean = (np.float64(unit(p, s)) for s in (0, 1))
      x, mean = x / np.linalg.norm(x), mean / np.linalg.norm(mean)
      got = log_prob(x, mean, kappa)
      np.testing.assert_allclose(got, log_c + kappa * (x @ mean), rtol=1e-12)

  @parameterized.parameters((2, 1.0), (2, 100.0), (64, 200.0))
  def test_float64_against_scipy(self, p, kappa):
    self.assert_is_that_of_scipy(p, kappa)

  @pytest.mark.slow
  def test_float64_against_scipy_in_ten_dimensions(self):
    self.assert_is_that_of_scipy(10, 4.0)

  def assert_float32_agrees_with_float64(self, p):
    x, mean, kappa = unit(p, 0), unit(p, 1), np.float32(0.25 * p)
    got = log_prob(x, mean, kappa)
    with jax.enable_x64(True):
      wide = [np.float64(a) for a in (x, mean, kappa)]
      want = log_prob(*wide)
    np.testing.assert_allclose(got, want, rtol=2e-6)

  @parameterized.parameters(2, 32768)
  def test_float32_agrees_with_float64(self, p):
    self.assert_float32_agrees_with_float64(p)

  @parameterized.parameters(3, 2048)
  @pytest.mark.slow
  def test_float32_agrees_with_float64_between(self, p):
    self.assert_float32_agrees_with_float64(p)

  def test_derivatives_in_float32(self):
    x, mean, kappa = unit(16, 0), unit(16, 1), np.float32(9)
    f = von_mises_fisher.log_prob
    d_mean, d_kappa = jax.jit(jax.grad(f, (1, 2)))(x, mean, kappa)
    np.testing.assert_allclose(d_mean, kappa * x, rtol=2.0**-22)
    # A difference of two numbers below 1, each of a few roundings.
    ratio = special.ive(8, 9.0) / special.ive(7, 9.0)
    want = np.float64(x) @ mean - ratio
    np.testing.assert_allclose(d_kappa, want, atol=16 * 2.0**-24)

  def test_concentrated(self):
    # p = 2: exp(kappa (cos - 1)) / (2 pi e^-kappa I_0(kappa)).
    mean, kappa = unit(2, 1), np.float32(1e6)
    for angle in (0, 1e-4, 1e-3):
      turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
      x = np.float32(turn @ np.float64(mean))
      wide, exact = np.float64(x), np.float64(mean)
      wide, exact = (a / np.linalg.norm(a) for a in (wide, exact))
      want = -0.5e6 * np.sum((wide - exact) ** 2)
      want -= np.log(2 * np.pi * special.ive(0, 1e6))
      np.testing.assert_allclose(log_prob(x, mean, kappa), want, rtol=1e-5)
    self.assertTrue(np.isnan(log_prob(x, mean, np.float32(-2))))

  @pytest.mark.slow
  def test_derivatives(self):
    with jax.enable_x64(True):
      x, mean, kappa = np.float64(unit(16, 0)), np.float64(unit(16, 1)), 9.0
      f = von_mises_fisher.log_prob
      d_mean, d_kappa = jax.jit(jax.grad(f, (1, 2)))(x, mean, kappa)
      np.testing.assert_allclose(d_mean, kappa * x, rtol=1e-12)
      ratio = special.ive(8, kappa) / special.ive(7, kappa)
      np.testing.assert_allclose(d_kappa, x @ mean - ratio, rtol=1e-10)


class SampleTest(parameterized.TestCase):
  def test_fit_recovers_kappa(self):
    p, n, kappa = 8, MANY[1], np.float64(KAPPA[:, 0])
    x = sets()
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    direction, fitted = map(np.asarray, fit(x))
    self.assertGreater((direction @ unit(p)).min(), 0.95)
    # The standard error of kappa is 1 / sqrt(n A'(kappa)), and the likelihood
    # is biased by p^2 / (2 n kappa).
    ratio = special.ive(p / 2, kappa) / special.ive(p / 2 - 1, kappa)
    slope = 1 - ratio * ratio - (p - 1) / kappa * ratio
    bound = 4 / np.sqrt(n * slope) + p * p / (2 * n * kappa)
    np.testing.assert_array_less(np.abs(fitted - kappa), bound)

  def test_fit_inverts_the_mean_length(self):
    # Half of the points at either side of the mean; their mean has length A.
    p, kappa = 8, np.float64(KAPPA)
    mean, other = np.eye(p)[:2]
    ratio = special.ive(p / 2, kappa) / special.ive(p / 2 - 1, kappa)
    side = np.resize([1, -1], MANY) * np.sqrt(1 - ratio * ratio)
    x = ratio[..., None] * mean + side[..., None] * other
    direction, fitted = map(np.asarray, fit(np.float32(x)))
    np.testing.assert_allclose(direction, np.tile(mean, (10, 1)), atol=1e-6)
    # A few roundings of A to float32, over A'(kappa).
    slope = 1 - ratio * ratio - (p - 1) / kappa * ratio
    bound = 16 * 2.0**-24 / slope[:, 0]
    np.testing.assert_array_less(np.abs(fitted - kappa[:, 0]), bound)

  def test_fit_of_samples_that_nearly_coincide(self):
    spread = np.r_[0, np.geomspace(1e-6, 2e-3, 8), 0][:, None, None]
    noise = np.random.default_rng(5).standard_normal((*MANY, 8))
    x = unit(8) + spread * noise
    x[-1] = unit(8) * np.resize([1, -1], MANY[1])[:, None]
    x = np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))
    direction, kappa = map(np.asarray, fit(x))
    self.assertTrue(np.isfinite(direction).all())
    self.assertEqual(kappa[0], np.inf)
    self.assertLess(kappa[-1], 1e-5)
    # With the variance V: R = sqrt(1 - V), and 1 - R = (p - 1) / (2 kappa)
    # (1 - (p - 3) / (4 kappa)), but for terms in kappa^-3.
    wide = np.float64(x[1:-1])
    wide = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    off = wide - wide.mean(1, keepdims=True)
    variance = np.sum(off * off, -1).mean(-1)
    missing = variance / (1 + np.sqrt(1 - variance))
    want = 7 / (2 * missing) * (1 - 5 / 14 * missing)
    # Lengths that are not quite 1 add to the variance.
    bound = 2.0**-20 + 2.0**-50 / variance
    np.testing.assert_array_less(np.abs(kappa[1:-1] / want - 1), bound)

  def test_extreme_concentrations(self):
    kappa = np.full((10, 1), 1e30)
    kappa[:5, 0] = np.inf, np.nan, -1, 1e8, 1e18
    mean = np.float32(np.eye(8)[0])
    x = sample(6, mean, kappa, MANY)
    np.testing.assert_array_equal(x[0], np.tile(mean, (MANY[1], 1)))
    self.assertTrue(np.isnan(x[1:3]).all())
    # 1 - cos^2 has the mean (p - 1) / kappa and a seventh as large a variance.
    across = np.sum(np.float64(x[3:, :, 1:]) ** 2, -1).mean(-1) * kappa[3:, 0]
    np.testing.assert_allclose(across, 7, rtol=5 * (2 / 7 / MANY[1]) ** 0.5)

  @parameterized.parameters(
    (3, 5.0, MANY), (2048, 500.0, (2000,)), (32768, 8000.0, (2000,))
  )
  @pytest.mark.slow
  def test_fit_recovers_kappa_in_other_dimensions(self, p, kappa, shape):
    # The standard error of kappa is 1 / sqrt(n A'(kappa)), below 0.1 % in high
    # dimensions, where the likelihood is biased by p^2 / (2 n kappa^2), 0.4 %.
    # For p = 3 it is 2 %, and that of the mean of ten sets 0.7 %.
    mean = unit(p)
    x = sample(0, mean, kappa, shape)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    direction, fitted = map(np.asarray, fit(x))
    self.assertGreater((direction @ mean).min(), 0.95)
    self.assertLess(abs(fitted.mean() / kappa - 1), 0.03 if p == 3 else 0.01)

  def assert_uniform(self, probabilities):
    u = np.sort(np.ravel(probabilities))
    distance = np.max(np.abs(u - (np.arange(u.size) + 0.5) / u.size))
    self.assertLess(distance, 1.95 / u.size**0.5)  # Kolmogorov-Smirnov, 0.1 %

  def test_cosines(self):
    # Their density is e^{kw} (1 - w^2)^((p - 3) / 2).
    w = np.linspace(-1, 1, 20001)
    steps = (1 - w[1:] * w[:-1]) ** 2.5 * np.exp(KAPPA * (w[1:] - 1))
    below = np.cumsum(steps / steps.sum(-1, keepdims=True), -1)
    cosines = zip(sets() @ unit(8), below, strict=True)
    self.assert_uniform([np.interp(x, w[1:], b) for x, b in cosines])

  @pytest.mark.slow
  def test_cosines_of_the_sphere(self):
    # p = 3: the cosine has the distribution (e^{kw} - e^-k) / (e^k - e^-k).
    kappa, mean = 2.0, unit(3)
    w = sample(1, mean, kappa, MANY) @ mean
    self.assert_uniform(np.expm1(kappa * (w + 1)) / np.expm1(2 * kappa))

  def test_uniform(self):
    x = sample(2, unit(8), 0 * KAPPA, MANY).reshape(-1, 8)
    np.testing.assert_allclose(x.mean(0), 0, atol=5 / (8 * len(x)) ** 0.5)

  def test_the_key_alone_decides(self):
    np.testing.assert_array_equal(sample(0, unit(8), KAPPA, MANY), sets())
    other = sample(4, unit(8), KAPPA, MANY)
    self.assertFalse(np.array_equal(other, sets()))

  @pytest.mark.slow
  def test_is_the_same_without_jit(self):
    key = jax.random.key(3)
    a = von_mises_fisher.sample(key, unit(3), np.float32(3), MANY)
    b = sample(3, unit(3), 3.0, MANY)
    np.testing.assert_array_equal(a, b)


class EntropyTest(parameterized.TestCase):
  def assert_on_the_sphere(self, dtype, bound):
    # p = 3: log(4 pi sinh(kappa) / kappa) + 1 - kappa coth(kappa).
    kappa = np.r_[0, np.geomspace(1e-3, 1e12, 46)].astype(dtype)
    f = lambda kappa: von_mises_fisher.entropy(kappa, 3)
    both = jax.jit(
      lambda kappa: jax.jvp(f, (kappa,), (jax.numpy.ones_like(kappa),)),
      compiler_options={'xla_disable_hlo_passes': 'fusion'},
    )
    with jax.enable_x64(dtype == np.float64):
      got, slope = map(np.asarray, both(kappa))
    np.testing.assert_allclose(got[0], np.log(4 * np.pi), rtol=bound)
    self.assertEqual(slope[0], 0)
    k = kappa[1:].astype(np.float64)
    with mpmath.workdps(60):
      k = [mpmath.mpf(v) for v in k]
      want = [
        mpmath.log(4 * mpmath.pi * mpmath.sinh(v) / v) + 1 - v * mpmath.coth(v)
        for v in k
      ]
      # With A = coth(kappa) - 1 / kappa it is -kappa A'(kappa).
      want_slope = [v * mpmath.csch(v) ** 2 - 1 / v for v in k]
    want, want_slope = np.float64(want), np.float64(want_slope)
    np.testing.assert_allclose(got[1:], want, atol=3 * bound, rtol=bound)
    # Below kappa = 10 A' is a difference of numbers up to 1, and 1/100 or more.
    np.testing.assert_allclose(slope[1:], want_slope, rtol=100 * bound)

  def test_float32(self):
    self.assert_on_the_sphere(np.float32, 2e-6)

  @pytest.mark.slow
  def test_float64(self):
    self.assert_on_the_sphere(np.float64, 1e-14)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'p=1 must be at least 2'):
      von_mises_fisher.entropy(1.0, 1)
    with self.assertRaisesRegex(TypeError, 'cast to float32'):
      von_mises_fisher.entropy(np.float16(1), 3)


class ArgumentsTest(parameterized.TestCase):
  def test_refuses(self):
    f = von_mises_fisher
    with self.assertRaisesRegex(ValueError, 'must agree in the last'):
      f.log_prob(unit(3), unit(4), 1.0)
    with self.assertRaisesRegex(ValueError, 'dimension p, at least 2'):
      f.log_prob(np.ones(1), np.ones(1), 1.0)
    with self.assertRaisesRegex(ValueError, 'at least one sample'):
      f.fit(np.ones((0, 3)))
    with self.assertRaisesRegex(TypeError, 'cast to float32'):
      f.fit(np.ones((4, 3), np.float16))
    with self.assertRaisesRegex(ValueError, 'must be one that the leading'):
      f.sample(jax.random.key(0), unit(3, shape=(2,)), 1.0, (3,))


if __name__ == '__main__':
  absltest.main()
