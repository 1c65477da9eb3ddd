"""Training of QArrays without master copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.training import optimizers

DRAWS = 512
INT8 = formats.get('int8_g64')


# Eager calls would compile every operation on its own.
quantize = jax.jit(lowbit_jax.quantize, static_argnames=('fmt', 'axis'))
dequantize = jax.jit(lowbit_jax.dequantize)
apply_updates = jax.jit(optimizers.apply_updates, static_argnames='scales')


def weights(shape=(4, 64)) -> np.ndarray:
  return np.random.RandomState(0).randn(*shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames='scales')
def mean(q, u, scales):
  """Mean and variance over draws of the new values."""

  def draw(key):
    new = optimizers.apply_updates(q, u, key, scales=scales)
    return lowbit_jax.dequantize(new)

  values = jax.vmap(draw)(jax.random.split(jax.random.key(0), DRAWS))
  return jnp.mean(values, 0), jnp.var(values, 0)


class ApplyUpdatesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('int8_g64', 'held'), ('mxfp4', 'current'), ('nf4_g64', 'current')
  )
  def test_is_unbiased(self, name, scales):
    self.check_mean(name, scales)

  @parameterized.parameters(
    ('int8_g64', 'current'), ('mxfp8_e4m3', 'current'), ('int4_g32', 'current')
  )
  @pytest.mark.slow
  def test_is_unbiased_with_new_scales(self, name, scales):
    self.check_mean(name, scales)

  def check_mean(self, name, scales):
    q = quantize(weights(), formats.get(name))
    w = np.asarray(dequantize(q))
    # Towards zero, so that held scales suffice.
    u = np.float32(-0.003) * np.sign(w)
    got, variance = mean(q, u, scales)
    expected = np.asarray(w + u, np.float64)
    # Six standard errors of each element, and of the sum of all.
    error = np.asarray(got) - expected
    variance = np.asarray(variance)
    step = np.abs(w).max()
    bound = 6 * np.sqrt(variance / DRAWS) + 1e-6 * step
    self.assertLessEqual(np.max(np.abs(error) - bound), 6 * step / DRAWS)
    total = 6 * np.sqrt(np.sum(variance) / DRAWS)
    self.assertLess(abs(error.sum()), total + 1e-4)
    self.assertGreater(np.mean(variance > 0), 0.5)

  def test_rounding_to_nearest_would_lose_the_updates(self):
    q = quantize(weights(), formats.int4_g32)
    w = np.asarray(dequantize(q))
    new = quantize(w * np.float32(0.999), formats.int4_g32)
    np.testing.assert_array_equal(new.codes, q.codes)

  def test_held_scales_change_codes_with_the_probability_of_a_step(self):
    q = quantize(weights(), INT8)
    u = np.where(np.arange(64) % 2, -0.1, 0.0) * np.asarray(q.scale)
    u = np.float32(u * np.sign(np.asarray(dequantize(q))))

    @jax.jit
    def codes(keys):
      draw = lambda key: (
        optimizers.apply_updates(q, u, key, scales='held').codes
      )
      return jax.vmap(draw)(keys)

    keys = jax.random.split(jax.random.key(1), 64)
    changed = np.asarray(codes(keys)) != np.asarray(q.codes)
    changed = np.mean(changed, axis=(0, 1))
    # Products with 1 / s leave integers by 2^-23 relative, 2^-16 of a step.
    self.assertLess(changed[::2].mean(), 1e-3)
    # 64 x 4 x 32 draws with probability .1: five standard deviations.
    sigma = np.sqrt(0.1 * 0.9 / (64 * 4 * 32))
    self.assertAlmostEqual(changed[1::2].mean(), 0.1, delta=5 * sigma)

  @parameterized.parameters('current', 'held')
  def test_layout_stays(self, scales):
    fmt = formats.nvfp4
    q = jax.eval_shape(
      lambda w: lowbit_jax.quantize(w, fmt, axis=0), weights((10, 70))
    )
    ones = np.ones(3, np.float32)
    tree = {'w': q, 'b': ones}
    updates = {'w': np.full((10, 70), 0.01, np.float32), 'b': ones}
    key = jax.random.key(0)
    apply = functools.partial(optimizers.apply_updates, scales=scales)
    new = jax.eval_shape(apply, tree, updates, key)
    self.assertEqual(jax.tree.structure(new), jax.tree.structure(tree))
    self.assertEqual(
      [x.shape for x in jax.tree.leaves(new)],
      [x.shape for x in jax.tree.leaves(tree)],
    )
    plain = apply_updates({'b': ones}, {'b': ones}, key, scales=scales)
    np.testing.assert_array_equal(plain['b'], 2.0)

  def test_leaves_draw_their_own_numbers(self):
    q = quantize(weights(), formats.int4_g32)
    u = np.float32(0.1) * weights()
    tree = apply_updates({'a': q, 'b': q}, {'a': u, 'b': u}, jax.random.key(0))
    a, b = (np.asarray(tree[name].codes) for name in 'ab')
    self.assertGreater(np.mean(a != b), 0.02)

  def test_errors(self):
    q = quantize(weights(), formats.int4_g32)
    key = jax.random.key(0)
    with self.assertRaisesRegex(ValueError, "scales='new'.*held"):
      optimizers.apply_updates(q, weights(), key, scales='new')
    with self.assertRaisesRegex(ValueError, r'w have shape \(3,\)'):
      optimizers.apply_updates({'w': q}, {'w': jnp.ones(3)}, key)
    with self.assertRaisesRegex(ValueError, 'w is a QArray.*key='):
      optimizers.apply_updates({'w': q}, {'w': weights()})

  def test_frozen_weights_stay(self):
    q = quantize(weights(), formats.int4_g32)
    params = {'w': q, 'b': np.ones(3, np.float32)}
    trainable, frozen = lowbit_jax.partition(params)
    tx = optax.sgd(1.0)
    updates, _ = tx.update(trainable, tx.init(trainable), trainable)
    new = optimizers.apply_updates(params, updates)
    self.assertIs(new['w'], q)
    np.testing.assert_array_equal(new['b'], 0)

  def test_scales_alone_are_trained(self):
    w = np.ones((4, 64), np.float32)
    params = {'w': quantize(w, formats.int4_g32)}
    trainable, _ = lowbit_jax.partition(params, scales=True)
    tx = optimizers.dynamic_loss_scale(optimizers.adamw(0.1, min_size=0))
    state = jax.eval_shape(tx.init, trainable)
    updates, new = jax.eval_shape(tx.update, trainable, state, trainable)
    self.assertEqual(jax.tree.structure(new), jax.tree.structure(state))
    self.assertEqual(updates['w'].scale.shape, params['w'].scale.shape)

  def test_codes_are_not_updated(self):
    q = quantize(weights(), formats.int4_g32)
    params = {'w': q, 'b': np.ones(3, np.float32)}
    trainable, frozen = lowbit_jax.partition(params)
    filled = lowbit_jax.combine(trainable, frozen)
    with self.assertRaisesRegex(TypeError, "QArray at 'w'.*partition"):
      optimizers.apply_updates(params, filled)
    for tx in (
      optimizers.adamw(1.0), optimizers.muon(1.0), optimizers.stable_spam(1.0),
      optimizers.ef_sign(), optimizers.qsgd(),
    ):  # fmt: skip
      with self.assertRaisesRegex(TypeError, "QArray at 'w'"):
        jax.eval_shape(lambda: tx.update(filled, tx.init(params), params))
    for tx in (
      optimizers.direct(optax.sgd(1.0)),
      optimizers.dynamic_loss_scale(optax.sgd(1.0)),
    ):
      with self.assertRaisesRegex(TypeError, "updates holds a QArray at 'w'"):
        jax.eval_shape(lambda: tx.update(filled, tx.init(params), params))


class DirectTest(absltest.TestCase):
  def test_trains_without_a_master_copy(self):
    target = weights((16, 64))
    tx = optimizers.direct(optax.sgd(0.02))
    params = {'w': quantize(np.float32(0.1) * target, INT8)}

    @jax.jit
    def train(params, key):
      def step(carry, key):
        params, state = carry
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p['w'] - target) ** 2))(
          optimizers.dequantized(params)
        )
        updates, state = tx.update(grads, state, params)
        return (optimizers.apply_updates(params, updates, key), state), None

      keys = jax.random.split(key, 300)
      return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    params = train(params, jax.random.key(0))
    self.assertIsInstance(params['w'], lowbit_jax.QArray)
    error = np.asarray(dequantize(params['w'])) - target
    # Steps of 1 / 50 of the error per update, noise of about a quantization
    # step (3 / 127) each: its variance is step^2 / 4 / (2 .02), or less.
    self.assertLess(np.sqrt(np.mean(error**2)), 0.06)

  def test_weight_decay_sees_values(self):
    q = quantize(weights(), INT8)
    tx = optimizers.direct(optax.add_decayed_weights(0.1))
    zeros = np.zeros((4, 64), np.float32)
    updates, _ = jax.jit(lambda g, q: tx.update(g, tx.init(q), q))(zeros, q)
    want = np.float32(0.1) * np.asarray(dequantize(q))
    np.testing.assert_allclose(updates, want)


if __name__ == '__main__':
  absltest.main()
