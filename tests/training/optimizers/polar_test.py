"""newton_schulz and randomized_polar against float64 decompositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from optax.contrib import _muon as optax_muon

from lowbit_jax.training import optimizers

newton_schulz = jax.jit(optimizers.newton_schulz, static_argnums=(1, 2))
randomized_polar = jax.jit(
  optimizers.randomized_polar,
  static_argnames=(
    'rank', 'oversample', 'power_iterations', 'coefficients', 'steps', 'sketch',
  ),
)  # fmt: skip


@functools.cache
def normal(shape=(256, 512), seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


@functools.cache
def ill_conditioned(
  shape=(256, 512), decades: int = 4
) -> tuple[np.ndarray, np.ndarray]:
  """A matrix with singular values 1 ... 10^-decades, and its polar factor."""
  n = min(shape)
  random = np.random.RandomState(1)
  u = np.linalg.qr(random.randn(shape[0], n))[0]
  v = np.linalg.qr(random.randn(shape[1], n))[0]
  x = (u * np.logspace(0, -decades, n)) @ v.T
  return x.astype(np.float32), u @ v.T


def singular_values(x) -> np.ndarray:
  return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def oracle(x, triples, margin=1.0, eps=1e-8) -> np.ndarray:
  """The steps on singular values, float64."""
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  s = s / (margin * np.sqrt(np.sum(s**2)) + eps)
  for a, b, c in triples:
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ vt


class MagnitudeTest(absltest.TestCase):
  def test_magnitudes_do_not_count(self):
    # Powers of two change no bit: norms neither overflow nor underflow.
    x = np.random.RandomState(0).uniform(1, 2, (8, 12)).astype(np.float32)
    powers = {
      jnp.float32: (-60, 0, 60, 120),
      jnp.bfloat16: (-60, 0, 60, 120),
      jnp.float16: (-4, 0, 6, 14),
    }
    rule = optimizers.NewtonSchulz(((2.0, -1.5, 0.5),), eps=0.0)
    polar = functools.partial(
      optimizers.randomized_polar,
      key=jax.random.key(0),
      rank=4,
      oversample=0,
      coefficients=rule,
    )

    @jax.jit
    def factors(stacks):
      full = {k: optimizers.newton_schulz(x, rule) for k, x in stacks.items()}
      zeros = [optimizers.newton_schulz(0 * x[:2]) for x in stacks.values()]
      return full, zeros, jax.vmap(polar)(stacks['float32'])

    full, zeros, low = factors(
      {
        jnp.dtype(dtype).name: np.stack([np.ldexp(x, p) for p in own]).astype(
          dtype
        )
        for dtype, own in powers.items()
      }
    )
    for y in (*full.values(), low):
      y = np.asarray(y, np.float32)
      self.assertTrue(np.all(np.isfinite(y)))
      self.assertGreater(np.abs(y[0]).max(), 0.1)
      for i in range(1, len(y)):
        np.testing.assert_array_equal(y[i], y[0])
    for y in zeros:
      np.testing.assert_array_equal(np.asarray(y, np.float32), 0)


class NewtonSchulzTest(parameterized.TestCase):
  # Ends of the interval of singular values of normal 256 x 512 matrices, found
  # with another draw; their edges vary by about .01 from draw to draw. The
  # lowest depends on how small the smallest one is.
  @parameterized.parameters(
    ('quintic_empirical', 5, 0.682, 1.134),
    ((15 / 8, -10 / 8, 3 / 8), 7, 0.937, 1.000),
  )
  def test_singular_values_of_normal_matrices(self, *case):
    self.check_normal(*case)

  @parameterized.parameters(
    (optax_muon._NS_COEFFS_PRESET_DICT['dion'], 5, 0.978, 1.032),
    ('quintic_theory', 7, 1.000, 1.002),
  )
  @pytest.mark.slow
  def test_singular_values_of_normal_matrices_by_more_rules(self, *case):
    self.check_normal(*case)

  def check_normal(self, rule, steps, low, high):
    rule = tuple(rule) if isinstance(rule, list) else rule
    s = singular_values(newton_schulz(normal(), rule, steps))
    self.assertAlmostEqual(s.min(), low, delta=0.02)
    self.assertAlmostEqual(s.max(), high, delta=0.02)

  # Exact in the singular values: no draw enters but through rounding.
  @pytest.mark.slow
  def test_ill_conditioned_matrices(self):
    x, _ = ill_conditioned()
    s = singular_values(newton_schulz(x, 'quintic_empirical', 5))
    self.assertAlmostEqual(s.max(), 1.202, delta=2e-3)
    self.assertAlmostEqual(np.median(s), 0.70, delta=1e-2)
    self.assertAlmostEqual(s.min(), 0.013, delta=1e-3)
    s = singular_values(newton_schulz(x, 'quintic_theory', 7))
    self.assertAlmostEqual(np.median(s), 0.33, delta=1e-2)

  @parameterized.parameters(3, 11)  # a part of the triples, and more
  def test_steps_against_the_oracle(self, steps):
    self.check_steps('polar_express', steps)

  @parameterized.product(name=tuple(optimizers.COEFFICIENTS), steps=(3, 11))
  @pytest.mark.slow
  def test_steps_of_every_rule_against_the_oracle(self, name, steps):
    self.check_steps(name, steps)

  def check_steps(self, name, steps):
    rule = optimizers.COEFFICIENTS[name]
    # The rule: a prefix, padded with the last triple.
    triples = (rule.triples + (rule.triples[-1],) * steps)[:steps]
    x = normal((24, 40))
    actual = newton_schulz(x, name, steps)
    expected = oracle(x, triples, rule.margin, rule.eps)
    np.testing.assert_allclose(actual, expected, atol=2e-5)

  @parameterized.parameters('cubic', 'quintic_theory', 'polar_express')
  def test_converges_to_the_polar_factor(self, name):
    u, _, vt = np.linalg.svd(normal((16, 48)).astype(np.float64), False)
    actual = newton_schulz(normal((16, 48)), name, 20)
    np.testing.assert_allclose(actual, u @ vt, atol=1e-5)

  @pytest.mark.slow
  def test_polar_express_is_ahead_of_the_others(self):
    x, factor = ill_conditioned((64, 96), 2)

    def error(name):
      return np.linalg.norm(newton_schulz(x, name, 7) - factor)

    self.assertLess(error('polar_express'), 1e-3)
    self.assertGreater(error('quintic_empirical'), 1)
    self.assertGreater(error('quintic_theory'), 1)

  def test_equals_optax(self):
    self.check_optax(40, 24)

  @pytest.mark.slow
  def test_equals_optax_of_wide_matrices(self):
    self.check_optax(24, 40)

  def check_optax(self, *shape):
    theirs = jax.jit(optax_muon.orthogonalize_via_newton_schulz)
    expected = theirs(normal(shape), np.float32([3.4445, -4.7750, 2.0315]))
    actual = newton_schulz(normal(shape), 'quintic_empirical', 5)
    np.testing.assert_allclose(actual, expected, atol=1e-6)

  def test_batches_and_dtypes(self):
    x = normal((2, 3, 16, 24))
    y = newton_schulz(x, 'quintic_empirical', 5)
    single = newton_schulz(x[1, 2], 'quintic_empirical', 5)
    np.testing.assert_allclose(y[1, 2], single, atol=1e-6)
    low = newton_schulz(x.astype(jnp.bfloat16), 'quintic_empirical', 5)
    self.assertEqual(low.dtype, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(low, np.float32), y, atol=0.1)

  def test_zeros_stay_zeros(self):
    y = newton_schulz(np.zeros((8, 8), np.float32), 'polar_express', 5)
    np.testing.assert_array_equal(y, 0)

  @parameterized.parameters(
    (normal((8,)), 'cubic', 5, ValueError, r'x.shape=\(8,\)'),
    (np.ones((8, 8), np.int32), 'cubic', 5, TypeError, 'x.dtype=int32'),
    (normal((8, 8)), 'quartic', 5, ValueError, "'quartic'.*quintic_theory"),
    (normal((8, 8)), ((1.0, 2.0),), 5, ValueError, 'triple'),
    (normal((8, 8)), 'cubic', -1, ValueError, 'steps=-1'),
  )
  def test_errors(self, x, rule, steps, error, message):
    with self.assertRaisesRegex(error, message):
      optimizers.newton_schulz(jnp.asarray(x), rule, steps)


class RandomizedPolarTest(parameterized.TestCase):
  # <O, X> / ||X||_* and the number of singular values above 1/2 for another
  # draw of the sketch, and of the matrix around these singular values.
  def test_share_of_the_nuclear_norm(self):
    self.check_share(32, 0.773, 42, 0.0179)

  @parameterized.parameters((64, 0.928, 74, 0.0238), (128, 0.981, 115, 0.0283))
  @pytest.mark.slow
  def test_share_of_the_nuclear_norm_of_larger_ranks(self, *case):
    self.check_share(*case)

  def check_share(self, rank, share, count, rms):
    x, _ = ill_conditioned()
    o = randomized_polar(x, jax.random.key(0), rank=rank)
    s = singular_values(o)
    self.assertAlmostEqual(
      np.vdot(o, x) / singular_values(x).sum(), share, delta=0.015
    )
    self.assertAlmostEqual(np.sum(s > 0.5), count, delta=4)
    self.assertAlmostEqual(np.sqrt(np.mean(np.square(o))), rms, delta=5e-4)
    self.assertLessEqual(np.sum(s > 1e-5), rank + 10)

  @pytest.mark.slow
  def test_columns(self):
    x, _ = ill_conditioned()
    nuclear = singular_values(x).sum()
    shares = [
      np.vdot(
        randomized_polar(x, jax.random.key(seed), rank=64, sketch='columns'),
        x,
      )
      / nuclear
      for seed in range(2)
    ]
    self.assertGreater(min(shares), 0.9)
    self.assertNotEqual(*shares)

  def test_columns_without_power_iterations_span_the_sample(self):
    x = np.zeros((64, 12), np.float32)
    x[:12] = np.diag(np.arange(1, 13))
    o = randomized_polar(
      x, jax.random.key(0), rank=5, oversample=0, power_iterations=0,
      sketch='columns', steps=30,
    )  # fmt: skip
    # Orthogonal columns: their polar factor has five of the twelve.
    norms = np.linalg.norm(o, axis=0)
    np.testing.assert_allclose(np.sort(norms), [0] * 7 + [1] * 5, atol=1e-5)

  def test_full_rank_is_the_polar_factor(self):
    self.check_full_rank(20, 48)

  @pytest.mark.slow
  def test_full_rank_is_the_polar_factor_of_tall_matrices(self):
    self.check_full_rank(48, 20)

  def check_full_rank(self, *shape):
    x = normal(shape)
    u, _, vt = np.linalg.svd(x.astype(np.float64), False)
    o = randomized_polar(x, jax.random.key(0), rank=100, steps=20)
    # The condition of Y is about 5^3 of A times 50 of Omega.
    np.testing.assert_allclose(o, u @ vt, atol=6250 * 2.0**-24)

  def test_low_rank_input_is_found_exactly(self):
    x = normal((60, 6)) @ normal((6, 40), 1)
    u, _, vt = np.linalg.svd(x.astype(np.float64), False)
    o = randomized_polar(x, jax.random.key(0), rank=6, oversample=0, steps=20)
    np.testing.assert_allclose(o, u[:, :6] @ vt[:6], atol=1e-4)

  def test_batches_and_dtypes(self):
    x = normal((3, 16, 24))
    o = randomized_polar(
      x.astype(jnp.bfloat16), jax.random.key(0), rank=4, oversample=2
    )
    self.assertEqual(o.shape, x.shape)
    self.assertEqual(o.dtype, jnp.bfloat16)
    ranks = np.linalg.matrix_rank(np.asarray(o, np.float32), tol=0.02)
    np.testing.assert_array_equal(ranks, 6)

  @parameterized.parameters(
    (dict(rank=0), 'rank=0'),
    (dict(rank=4, oversample=-1), 'oversample=-1'),
    (dict(rank=4, power_iterations=1.5), 'power_iterations=1.5'),
    (dict(rank=4, sketch='rows'), "sketch='rows'"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.randomized_polar(
        jnp.ones((8, 8)), jax.random.key(0), **options
      )


if __name__ == '__main__':
  absltest.main()
