"""The von Mises-Fisher distribution: closed forms, and its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from lowbit_jax.special import von_mises_fisher


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
      got = von_mises_fisher.log_prob(x, mean, kappa)
      np.testing.assert_allclose(got, log_c + kappa * (x @ mean), rtol=1e-12)

  @parameterized.parameters(2, 3, 2048, 32768)
  def test_float32_agrees_with_float64(self, p):
    x, mean, kappa = unit(p, 0), unit(p, 1), np.float32(0.25 * p)
    got = von_mises_fisher.log_prob(x, mean, kappa)
    with jax.enable_x64(True):
      wide = [np.float64(a) for a in (x, mean, kappa)]
      want = von_mises_fisher.log_prob(*wide)
    np.testing.assert_allclose(got, want, rtol=2e-6)

  def test_derivatives(self):
    with jax.enable_x64(True):
      x, mean, kappa = np.float64(unit(16, 0)), np.float64(unit(16, 1)), 9.0
      f = von_mises_fisher.log_prob
      d_mean, d_kappa = jax.grad(f, (1, 2))(x, mean, kappa)
      np.testing.assert_allclose(d_mean, kappa * x, rtol=1e-12)
      ratio = special.ive(8, kappa) / special.ive(7, kappa)
      np.testing.assert_allclose(d_kappa, x @ mean - ratio, rtol=1e-10)


class SampleTest(parameterized.TestCase):
  @parameterized.parameters(
    (3, 5.0, 6), (2048, 500.0, 1), (32768, 8000.0, 1)
  )  # fmt: skip
  def test_fit_recovers_kappa(self, p, kappa, groups):
    # The standard error of kappa is 1 / sqrt(n A'(kappa)), below 0.1 % in high
    # dimensions, where the likelihood is biased by p^2 / (2 n kappa^2), 0.4 %.
    # For p = 3 it is 2 %, and that of the mean of six sets 0.9 %.
    n = 2000
    keys = jax.random.split(jax.random.key(0), groups)
    mean = unit(p)
    fitted = []
    for key in keys:
      x = von_mises_fisher.sample(key, mean, kappa, (n,))
      np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, atol=1e-5)
      direction, k = von_mises_fisher.fit(x)
      self.assertGreater(float(direction @ mean), 0.95)
      fitted.append(float(k))
    self.assertLess(abs(np.mean(fitted) / kappa - 1), 0.03 if p == 3 else 0.01)

  def test_cosines_of_the_sphere(self):
    # p = 3: the cosine has the distribution (e^{kw} - e^-k) / (e^k - e^-k).
    kappa, n = 2.0, 20000
    mean = unit(3)
    x = von_mises_fisher.sample(jax.random.key(1), mean, kappa, (n,))
    w = np.sort(np.asarray(x @ mean))
    cdf = np.expm1(kappa * (w + 1)) / np.expm1(2 * kappa)
    distance = np.max(np.abs(cdf - (np.arange(n) + 0.5) / n))
    self.assertLess(distance, 1.95 / n**0.5)  # Kolmogorov-Smirnov, 0.1 %

  def test_uniform(self):
    x = von_mises_fisher.sample(jax.random.key(2), unit(4), 0.0, (20000,))
    np.testing.assert_allclose(jnp.mean(x, 0), 0, atol=5 / (4 * 20000) ** 0.5)

  def test_the_key_alone_decides(self):
    def draw(key):
      return von_mises_fisher.sample(key, unit(5), 3.0, (7,))

    a, b = draw(jax.random.key(3)), jax.jit(draw)(jax.random.key(3))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    self.assertFalse(np.array_equal(a, draw(jax.random.key(4))))


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
