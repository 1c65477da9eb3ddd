"""Dynamic loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from lowbit_jax.training import optimizers


class LossScaleTest(parameterized.TestCase):
  def _scales(self, tx, finite):
    w = jnp.ones(3)
    state, out = tx.init(w), []
    update = jax.jit(tx.update)
    for ok in finite:
      g = w if ok else w.at[1].set(jnp.inf)
      _, state = update(g, state, w)
      out.append(float(state.loss_scale))
    return out

  def test_schedule_of_the_scale(self):
    tx = optimizers.dynamic_loss_scale(optax.sgd(1.0), period=3)
    finite = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1]
    top = 2.0**15
    expected = [
      *(top, top, 2 * top, 2 * top, 2 * top, top, top, top),
      *(top / 2, top / 4, top / 4, top / 4, top / 2),
    ]
    self.assertEqual(self._scales(tx, finite), expected)

  def test_defaults(self):
    tx = optimizers.dynamic_loss_scale(optax.identity())
    state = tx.init(jnp.ones(1))
    self.assertEqual(float(state.loss_scale), 2.0**15)
    state = state._replace(finite_steps=jnp.asarray(1998))
    _, state = tx.update(jnp.ones(1), state)
    self.assertEqual(float(state.loss_scale), 2.0**15)
    _, state = tx.update(jnp.ones(1), state)
    self.assertEqual(float(state.loss_scale), 2.0**16)
    self.assertEqual(int(state.finite_steps), 0)

  def test_ends_of_the_range(self):
    tx = optimizers.dynamic_loss_scale(
      optax.identity(), initial=2.0, period=1, largest=8.0
    )
    self.assertEqual(self._scales(tx, [1] * 4), [4, 8, 8, 8])
    self.assertEqual(self._scales(tx, [0] * 3), [1, 1, 1])

  def test_scales_below_one(self):
    tx = optimizers.dynamic_loss_scale(
      optax.identity(), initial=0.5, smallest=0.125, largest=8.0
    )
    self.assertEqual(self._scales(tx, [0] * 4), [0.25, 0.125, 0.125, 0.125])

  def test_complex_gradients_keep_both_parts(self):
    tx = optimizers.dynamic_loss_scale(optax.identity(), initial=4.0)
    g = jnp.array([4.0 - 8.0j])
    out, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(out, g / 4)

  def test_a_step_that_is_not_finite_changes_nothing(self):
    tx = optimizers.dynamic_loss_scale(optax.adam(0.1))
    w = np.ones(3, np.float32)
    update = jax.jit(tx.update)
    _, state = update(w, jax.jit(tx.init)(w), w)
    for bad in (np.nan, np.inf, -np.inf):
      updates, after = update(np.float32([bad, 1, 1]), state, w)
      np.testing.assert_array_equal(updates, 0)
      jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)

  def test_rescues_gradients_below_float16(self):
    tx = optimizers.dynamic_loss_scale(optax.sgd(1.0))
    w = jnp.ones(3, jnp.float16)
    state = tx.init(w)
    tiny = 2.0**-20  # times 2^-6 below the smallest float16, 2^-24

    def loss(w):
      return jnp.sum(w * jnp.float16(2.0**-6)) * jnp.float16(tiny)

    def scaled(w):
      return optimizers.scale_loss(loss(w), state)

    np.testing.assert_array_equal(jax.grad(loss)(w), 0)
    updates, _ = tx.update(jax.grad(scaled)(w), state, w)
    np.testing.assert_array_equal(updates, -(2.0**-26))
    self.assertEqual(updates.dtype, jnp.float32)

  def test_finds_the_scale_in_a_chain(self):
    tx = optax.chain(
      optax.identity(), optimizers.dynamic_loss_scale(optax.sgd(0.1))
    )
    state = tx.init(jnp.ones(2))
    loss = optimizers.scale_loss(jnp.float32(3.0), state)
    self.assertEqual(float(loss), 3 * 2.0**15)
    with self.assertRaisesRegex(ValueError, 'dynamic_loss_scale'):
      optimizers.scale_loss(jnp.float32(1.0), optax.sgd(0.1).init(1.0))

  def test_keeps_quantized_moments(self):
    tx = optimizers.dynamic_loss_scale(
      optimizers.adamw(0.1, first='e4m3', second='e5m2', min_size=0)
    )
    w = np.ones((4, 64), np.float32)
    state = jax.jit(tx.init)(w)
    update = jax.jit(tx.update)
    for g in (w, w * np.float32('nan'), w):
      updates, state = update(g, state, w)
    self.assertTrue(bool(jax.jit(optimizers.all_finite)(updates)))
    self.assertTrue(np.all(np.asarray(updates) < 0))

  @parameterized.parameters(
    (dict(period=0), 'period=0'),
    (dict(factor=1.0), 'factor=1.0'),
    (dict(initial=2.0**30), 'initial=.*largest='),
    (dict(initial=0.5), 'initial=0.5.*smallest=1.0'),
    (dict(smallest=2.0**-30), 'smallest='),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.dynamic_loss_scale(optax.identity(), **options)


if __name__ == '__main__':
  absltest.main()
