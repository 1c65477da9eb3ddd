"""StableSPAM against its equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from lowbit_jax.training import optimizers

SHAPES = {'a': (7, 5), 'b': (11,)}
EVERY = 4


def gradient(step: int) -> dict[str, np.ndarray]:
  """Normal gradients with a spike in every third step."""
  random = np.random.RandomState(step)
  g = {k: random.randn(*shape) for k, shape in SHAPES.items()}
  if step % 3 == 2:
    g['a'][1, 2] = 50.0
    g['b'] *= 30.0
  return {k: v.astype(np.float32) for k, v in g.items()}


class Oracle:
  """The equations, one tensor, float64."""

  def __init__(self, b1=0.9, b2=0.999, gamma1=0.7, gamma2=0.9, theta=0.999):
    self.b1, self.b2 = b1, b2
    self.gamma1, self.gamma2, self.theta = gamma1, gamma2, theta
    self.t = self.peak = self.norm = self.square = 0
    self.m = self.v = self.k = 0

  def clip(self, g, t):
    top = np.abs(g).max()
    self.peak = self.theta * self.peak + (1 - self.theta) * top
    limit = self.peak / (1 - self.theta**t)
    return np.where(np.abs(g) > limit, g * limit / top, g)

  def normalize(self, g, t, gamma1):
    n = np.sqrt(np.sum(g**2))
    self.norm = gamma1 * self.norm + (1 - gamma1) * n
    self.square = self.gamma2 * self.square + (1 - self.gamma2) * n**2
    m = self.norm / (1 - gamma1**t)
    v = self.square / (1 - self.gamma2**t)
    return g / n * m / (np.sqrt(v) + 1e-8)

  def step(self, g, decay=1.0):
    g = g.astype(np.float64)
    t = self.t = self.t + 1
    g = self.clip(g, t)
    g = self.normalize(g, t, self.gamma1 * decay)
    if (t - 1) % EVERY == 0:
      self.m = self.v = self.k = 0
    self.k += 1
    b1 = self.b1 * decay
    self.m = b1 * self.m + (1 - b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g**2
    m = self.m / (1 - b1**self.k)
    v = self.v / (1 - self.b2**self.k)
    return -0.1 * m / (np.sqrt(v) + 1e-8)


class StableSpamTest(parameterized.TestCase):
  @parameterized.parameters(None, 10)
  def test_equations(self, decay_steps):
    tx = optimizers.stable_spam(0.1, every=EVERY, decay_steps=decay_steps)
    w = gradient(0)
    state = jax.jit(tx.init)(w)
    update = jax.jit(tx.update)
    oracles = {k: Oracle() for k in SHAPES}
    for step in range(3 * EVERY + 1):
      g = gradient(step)
      decay = 1.0
      if decay_steps:
        phase = min(step, decay_steps) / decay_steps
        decay = (3 + np.cos(np.pi * phase)) / 4
      updates, state = update(g, state, w)
      for k, u in updates.items():
        expected = oracles[k].step(g[k], decay)
        # float32 sums and powers: theta^t loses 1e-4 of 1 - theta^t at t = 1.
        np.testing.assert_allclose(u, expected, rtol=2e-4, atol=1e-6)

  def test_clips_only_what_exceeds_the_usual_maximum(self):
    tx = optimizers.adaclip(0.5)
    g = jnp.array([1.0, -0.5])
    out, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(out, g)
    out, _ = tx.update(jnp.array([8.0, -5.5, 4.0]), state)
    # M = .5 (.5 1) + .5 8 = 4.25, M^ = 4.25 / .75 = 17 / 3
    limit = 17 / 3
    np.testing.assert_allclose(out, [limit, -5.5, 4.0], rtol=1e-6)

  def test_zeros_stay_zeros(self):
    g = jnp.zeros((3, 3))
    tx = optax.chain(optimizers.adaclip(), optimizers.adagn())
    out, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(out, g)

  def test_norms_of_any_magnitude(self):
    tx = optimizers.adagn()
    update = jax.jit(tx.update)
    g = np.random.RandomState(0).randn(4, 4).astype(np.float32)
    state = tx.init(g)
    for power in (100, 0):
      out, state = update(np.ldexp(g, power), state)
      self.assertTrue(all(np.isfinite(x) for x in jax.tree.leaves(state)))
      if power:  # m^ = sqrt(v^) in the first step
        np.testing.assert_allclose(out, g / np.linalg.norm(g), rtol=1e-5)
    self.assertTrue(np.all(np.asarray(out) * g > 0))

  def test_complex_gradients_keep_both_parts(self):
    g = np.complex64([3.0 - 4.0j, 0.3j])
    clip, normalize = optimizers.adaclip(0.5), optimizers.adagn()

    @jax.jit
    def both(g):
      _, state = clip.update(g, clip.init(g))
      clipped, _ = clip.update(2 * g, state)
      return clipped, normalize.update(g, normalize.init(g))[0]

    clipped, normalized = both(g)
    # M^ = (.5 2.5 + .5 10) / .75 = 25 / 3
    expected = np.array([2 * g[0] * (25 / 3) / 10, 2 * g[1]])
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)
    np.testing.assert_allclose(normalized, g / np.linalg.norm(g), rtol=1e-5)

  def test_keeps_dtypes_of_gradients(self):
    g = jnp.ones((3, 3), jnp.bfloat16)
    tx = optax.chain(optimizers.adaclip(), optimizers.adagn())
    self.assertEqual(tx.update(g, tx.init(g))[0].dtype, jnp.bfloat16)

  def test_reset_restarts_the_moments_and_their_correction(self):
    inner = optax.scale_by_adam()
    tx = optimizers.momentum_reset(inner, 3)
    w = np.ones(5, np.float32)
    init, state = jax.jit(inner.init), jax.jit(tx.init)(w)
    inner_update, update = jax.jit(inner.update), jax.jit(tx.update)
    for step in range(9):
      g = np.random.RandomState(step).randn(5).astype(np.float32)
      if step % 3 == 0:
        expected_state = init(w)
      expected, expected_state = inner_update(g, expected_state)
      actual, state = update(g, state, w)
      np.testing.assert_array_equal(actual, expected)
      jax.tree.map(np.testing.assert_array_equal, state.inner, expected_state)

  def test_reset_of_quantized_moments(self):
    tx = optimizers.momentum_reset(
      optimizers.quantized_state(
        optax.scale_by_adam(), first='e4m3', second='e5m2', min_size=0
      ),
      2,
    )
    w = np.ones((4, 64), np.float32)
    state, update = jax.jit(tx.init)(w), jax.jit(tx.update)
    for _ in range(3):
      updates, state = update(w, state, w)
    self.assertEqual(int(state.steps), 1)
    np.testing.assert_allclose(updates, 1.0, rtol=1e-5)

  @parameterized.parameters(
    (lambda: optimizers.adaclip(1.0), 'theta=1.0'),
    (lambda: optimizers.adagn(gamma2=-0.1), 'gamma2=-0.1'),
    (lambda: optimizers.adagn(gamma1=2.0), 'gamma1=2.0'),
    (lambda: optimizers.momentum_reset(optax.identity(), 0), 'every=0'),
    (lambda: optimizers.stable_spam(0.1, decay_steps=0), 'decay_steps=0'),
  )
  def test_errors_name_the_argument(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


if __name__ == '__main__':
  absltest.main()
