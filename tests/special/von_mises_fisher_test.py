"""The von Mises-Fisher distribution: closed forms, and its own samples."""

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import special

from lowbit_jax.special import von_mises_fisher

MANY = (10, 2000)

log_prob = jax.jit(von_mises_fisher.log_prob)
fit = jax.jit(von_mises_fisher.fit)
_sample = jax.jit(von_mises_fisher.sample, static_argnums=3)


def sample(seed: int, mean, kappa: float, shape) -> np.ndarray:
  """Compiled, one program for each shape."""
  key = jax.random.key(seed)
  return np.asarray(_sample(key, mean, np.float32(kappa), shape))


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
    got = von_mises_fisher.log_prob(x, mean, kappa)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-5)

  @parameterized.parameters((2, 1.0), (10, 4.0), (64, 200.0))
  def test_float64_against_scipy(self, p, kappa):
    v = p / 2 - 1
    log_iv = np.log(special.ive(v, kappa)) + kappa
    log_c = v * np.log(kappa) - p / 2 * np.log(2 * np.pi) - log_iv
    with jax.enable_x64(True):
      x, mean = (np.float64(unit(p, s)) for s in (0, 1))
      got = log_prob(x, mean, kappa)
      np.testing.assert_allclose(got, log_c + kappa * (x @ mean), rtol=1e-12)

  @parameterized.parameters(2, 3, 2048, 32768)
  def test_float32_agrees_with_float64(self, p):
    x, mean, kappa = unit(p, 0), unit(p, 1), np.float32(0.25 * p)
    got = log_prob(x, mean, kappa)
    with jax.enable_x64(True):
      wide = [np.float64(a) for a in (x, mean, kappa)]
      want = log_prob(*wide)
    np.testing.assert_allclose(got, want, rtol=2e-6)

  def test_derivatives(self):
    with jax.enable_x64(True):
      x, mean, kappa = np.float64(unit(16, 0)), np.float64(unit(16, 1)), 9.0
      f = von_mises_fisher.log_prob
      d_mean, d_kappa = jax.jit(jax.grad(f, (1, 2)))(x, mean, kappa)
      np.testing.assert_allclose(d_mean, kappa * x, rtol=1e-12)
      ratio = special.ive(8, kappa) / special.ive(7, kappa)
      np.testing.assert_allclose(d_kappa, x @ mean - ratio, rtol=1e-10)


class SampleTest(parameterized.TestCase):
  def assert_fit_recovers_kappa(self, p, kappa, shape):
    # The standard error of kappa is 1 / sqrt(n A'(kappa)), below 0.1 % in high
    # dimensions, where the likelihood is biased by p^2 / (2 n kappa^2), 0.4 %.
    # For p = 3 it is 2 %, and that of the mean of ten sets 0.7 %.
    mean = unit(p)
    x = sample(0, mean, kappa, shape)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    direction, fitted = map(np.asarray, fit(x))
    self.assertGreater((direction @ mean).min(), 0.95)
    self.assertLess(abs(fitted.mean() / kappa - 1), 0.03 if p == 3 else 0.01)

  @parameterized.parameters((3, 5.0, MANY), (2048, 500.0, (2000,)))
  def test_fit_recovers_kappa(self, p, kappa, shape):
    self.assert_fit_recovers_kappa(p, kappa, shape)

  @pytest.mark.slow
  def test_fit_recovers_kappa_in_the_highest_dimension(self):
    self.assert_fit_recovers_kappa(32768, 8000.0, (2000,))

  def test_cosines_of_the_sphere(self):
    # p = 3: the cosine has the distribution (e^{kw} - e^-k) / (e^k - e^-k).
    kappa, mean = 2.0, unit(3)
    w = np.sort((sample(1, mean, kappa, MANY) @ mean).ravel())
    cdf = np.expm1(kappa * (w + 1)) / np.expm1(2 * kappa)
    distance = np.max(np.abs(cdf - (np.arange(w.size) + 0.5) / w.size))
    self.assertLess(distance, 1.95 / w.size**0.5)  # Kolmogorov-Smirnov, 0.1 %

  def test_uniform(self):
    x = sample(2, unit(3), 0.0, MANY).reshape(-1, 3)
    np.testing.assert_allclose(x.mean(0), 0, atol=5 / (3 * len(x)) ** 0.5)

  def test_the_key_alone_decides(self):
    def draw(seed):
      key = jax.random.key(seed)
      return von_mises_fisher.sample(key, unit(3), np.float32(3), MANY)

    a, b = draw(3), sample(3, unit(3), 3.0, MANY)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    self.assertFalse(np.array_equal(a, draw(4)))


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
