"""qsgd and ef_sign."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax.training import optimizers


def gradient(seed: int = 0, shape=(6, 50)) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


class QSGDTest(parameterized.TestCase):
  @parameterized.parameters((2, 64), (4, 512), (8, 64))
  def test_is_unbiased(self, bits, bucket):
    self.check_mean(bits, bucket)

  @parameterized.parameters((2, 512), (4, 64), (8, 512))
  @pytest.mark.slow
  def test_is_unbiased_in_other_pairs(self, bits, bucket):
    self.check_mean(bits, bucket)

  def check_mean(self, bits, bucket):
    g, draws = gradient(), 400
    tx = optimizers.qsgd(bits, bucket=bucket)

    @jax.jit
    def run(state):
      def step(state, _):
        out, state = tx.update(g, state)
        return state, out

      return jax.lax.scan(step, state, length=draws)[1]

    out = np.asarray(run(tx.init(g)), np.float64)
    error = out.mean(0) - g
    deviation = np.sqrt(out.var(0).sum() / draws)
    self.assertLess(abs(error.sum()), 5 * deviation)
    # The norm of independent errors is their deviation, within 5 of its own.
    norm = np.linalg.norm(error)
    self.assertBetween(norm, 0.7 * deviation, 1.3 * deviation)

  @parameterized.parameters(2, 4, 8)
  def test_levels_and_variance(self, bits):
    g = gradient(shape=(512,))
    encode = jax.jit(optimizers.qsgd_encode, static_argnames='bits')
    q = encode(g, jax.random.key(0), bits=bits)
    lowbit_jax.qarray.validate(q)
    levels = 2 ** (bits - 1) - 1
    norm = np.linalg.norm(g.astype(np.float64))
    k = np.asarray(jax.jit(lowbit_jax.dequantize)(q), np.float64)
    k = k / norm * levels
    np.testing.assert_allclose(k, np.rint(k), atol=1e-4)
    self.assertLessEqual(np.abs(k - g / norm * levels).max(), 1 + 1e-4)
    self.assertEqual(q.nbytes, 512 * bits // 8 + 4)
    # QSGD, lemma 3.1: E ||Q(g) - g||^2 <= min(n / s^2, sqrt(n) / s) ||g||^2.
    error = np.sum((k / levels * norm - g) ** 2) / norm**2
    self.assertLess(error, 1.2 * min(512 / levels**2, 512**0.5 / levels))

  def test_any_magnitude(self):
    encode = jax.jit(lambda x: optimizers.qsgd_encode(x, jax.random.key(0)))
    g = np.random.RandomState(1).uniform(0.5, 1, 64).astype(np.float32)
    usual = encode(g)
    for power in (-100, 100):
      q = encode(np.ldexp(g, power))
      np.testing.assert_array_equal(q.codes, usual.codes)
      np.testing.assert_array_equal(q.scale, np.ldexp(usual.scale, power))
    # The norm is beyond float32, or its part below.
    for top in (np.finfo(np.float32).max, np.float32(2.0**-125)):
      value = np.float64(lowbit_jax.dequantize(encode(top * g)))
      self.assertTrue(np.all(np.isfinite(value)))
      # Rounding is by up to one step, of seven in the largest number or more.
      step = max(float(encode(top * g).scale[0]), 2.0**-126)
      self.assertLessEqual(np.abs(value - np.float64(top) * g).max(), step)

  def test_refuses_complex_numbers(self):
    for tx in (optimizers.qsgd(), optimizers.ef_sign()):
      g = {'w': jnp.ones(3, jnp.complex64)}
      with self.assertRaisesRegex(TypeError, 'w is complex64'):
        tx.update(g, tx.init({'w': jnp.ones(3)}))

  def test_seeds_steps_and_leaves_differ(self):
    g = {'a': gradient(), 'b': gradient()}

    def first_steps(seed):
      tx = optimizers.qsgd(seed=seed)
      state, out = jax.jit(tx.init)(g), []
      update = jax.jit(tx.update)
      for _ in range(2):
        u, state = update(g, state)
        out += [u['a'], u['b']]
      return out

    everything = first_steps(0) + first_steps(1)
    for i, x in enumerate(everything):
      for y in everything[:i]:
        self.assertFalse(np.array_equal(x, y))
    for x, y in zip(first_steps(0), first_steps(0), strict=True):
      np.testing.assert_array_equal(x, y)

  @parameterized.parameters(((3,), 4), ((1, 1), 3), ((7, 9), 2), ((513,), 5))
  def test_odd_shapes_and_dtypes(self, shape, bits):
    g = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    tx = optimizers.qsgd(bits)
    out, _ = jax.eval_shape(tx.update, g, jax.eval_shape(tx.init, g))
    self.assertEqual((out.shape, out.dtype), (g.shape, g.dtype))

  def test_zeros_and_nan(self):
    tx = optimizers.qsgd()
    first = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
    g = np.zeros((5, 5), np.float32)
    np.testing.assert_array_equal(first(g), 0)
    g[1, 1] = np.nan
    self.assertTrue(np.isnan(first(g)[1, 1]))

  @parameterized.parameters(
    (dict(bits=1), 'bits=1'), (dict(bits=9), 'bits=9'),
    (dict(bucket=0), 'bucket=0'),
  )  # fmt: skip
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.qsgd(**options)
    with self.assertRaisesRegex(ValueError, message):
      optimizers.qsgd_encode(gradient(), jax.random.key(0), **options)


class EFSignTest(absltest.TestCase):
  def test_what_is_sent_and_what_is_left_is_everything(self):
    tx = optimizers.ef_sign()
    state, update = tx.init(gradient()), jax.jit(tx.update)
    sent = total = np.zeros((6, 50))
    for step in range(50):
      g = gradient(step)
      out, state = update(g, state)
      self.assertLen(np.unique(np.abs(out)), 1)
      sent = sent + np.asarray(out, np.float64)
      total = total + g
    np.testing.assert_allclose(sent + state.error, total, atol=1e-4)
    # The rest does not grow: its norm is bounded by that of some gradients.
    self.assertLess(np.linalg.norm(state.error), 20 * np.linalg.norm(g))

  def test_the_mean_does_not_overflow(self):
    tx = optimizers.ef_sign()
    g = jnp.full(8, 3e38)
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], g, rtol=1e-6)

  def test_equation(self):
    tx = optimizers.ef_sign()
    g = jnp.array([3.0, -1.0, 0.0, 0.5])
    out, state = tx.update(g, tx.init(g))
    scale = 4.5 / 4
    np.testing.assert_allclose(out, scale * np.array([1, -1, 1, 1]))
    np.testing.assert_allclose(state.error, g - out)
    out, _ = tx.update(-g, state)
    p = -g + state.error
    np.testing.assert_allclose(
      out, jnp.mean(jnp.abs(p)) * jnp.where(p < 0, -1, 1)
    )

  def test_feedback_reaches_the_minimum_that_signs_alone_miss(self):
    # Karimireddy et al., counterexample 1, in one dimension of stochastic
    # gradients 4 (one in four) and -1: mean 1/4, sign of the mean -1/2.
    random = np.random.RandomState(0)
    g = np.where(random.rand(400) < 0.25, 4.0, -1.0).astype(np.float32)
    tx = optimizers.ef_sign()
    state = tx.init(np.zeros(1, np.float32))
    outs = jax.jit(lambda g: jax.lax.scan(
      lambda state, value: tx.update(value, state)[::-1], state, g
    ))(g[:, None])[1]  # fmt: skip
    x = -0.01 * np.sum(np.float64(outs))
    self.assertAlmostEqual(x, -0.01 * g.sum(), delta=0.1)
    self.assertGreater(-0.01 * np.sign(g).sum(), 1)

  def test_keeps_dtypes(self):
    g = jnp.ones(4, jnp.bfloat16)
    tx = optax.chain(optimizers.ef_sign())
    self.assertEqual(tx.update(g, tx.init(g))[0].dtype, jnp.bfloat16)


if __name__ == '__main__':
  absltest.main()
