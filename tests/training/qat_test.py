"""LSQ and PACT: the worked examples, their rules, and training with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.training import qat
from lowbit_jax.training.qat import Lsq, Pact


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(quantizer, params, x, g):
  """The value, and the cotangent g pulled back to parameters and x."""
  y, vjp = jax.vjp(quantizer, params, x)
  return y, *vjp(g)


@functools.partial(jax.jit, static_argnums=0)
def jacobian(quantizer, params, x):
  """One cotangent at a time: the derivative of each element."""
  return jax.jacrev(quantizer)(params, x)


W = np.float32([-1.3, -0.42, -0.05, 0.11, 0.26, 0.9])


class LsqTest(parameterized.TestCase):
  def params(self, lsq, step):
    step = np.float32(step)
    if lsq.parameter == 'log':
      return {'log_step': np.log(step)}
    return {'step': step}

  @parameterized.parameters('log', 'clipped')
  def test_worked_example(self, parameter):
    lsq = Lsq(3, parameter=parameter)
    params = self.params(lsq, 0.2)
    (ds,) = map(np.asarray, jax.tree.leaves(jacobian(lsq, params, W)))
    ds = ds / 0.2 if parameter == 'log' else ds  # d log s = ds / s
    want = np.array([-3, 0.1, 0.25, 0.45, -0.3, 3])
    scale = 1 / np.sqrt(6 * 3)
    self.assertAlmostEqual(scale, 0.2357, places=4)
    np.testing.assert_allclose(ds, want * scale, rtol=2e-5)
    y, _, dw = pulled_back(lsq, params, W, np.ones_like(W))
    np.testing.assert_allclose(y, [-0.6, -0.4, 0, 0.2, 0.2, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(dw, [0, 1, 1, 1, 1, 0])

  def test_levels_are_those_of_the_packed_weight(self):
    w = np.random.default_rng(2).standard_normal((64, 4)).astype(np.float32)
    pairs = [(Lsq(b, axis=-2), f'int{b}') for b in (2, 3, 8)]
    pairs.append((Lsq(4, signed=False, axis=-2), 'uint4'))

    @jax.jit
    def both(w):
      out = []
      for lsq, name in pairs:
        element = formats.IntFormat(name, lsq.bits, signed=lsq.signed)
        fmt = formats.BlockFormat(name, element, (64,), formats.float32)
        params = {'log_step': jnp.full((1, 4), -1.5)}  # saturates both ends
        packed = lowbit.quantize_with(w, lsq.step(params), fmt, axis=-2)
        out.append((lsq(params, w), lowbit.dequantize(packed)))
      return out

    for trained, packed in both(w):
      # The step of the trained one is not rounded by a reciprocal.
      np.testing.assert_allclose(packed, trained, rtol=1e-6)

  def test_initial_step(self):
    for lsq in (Lsq(3), Lsq(3, parameter='clipped')):
      self.assertAlmostEqual(float(lsq.step(lsq.init(W))), 0.5850, places=4)
      nothing = lsq.init(np.zeros((0, 4), np.float32))
      self.assertLess(float(lsq.step(nothing)), 1e-7)

  def test_one_step_per_output(self):
    w = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    w *= np.float32([0.1, 1, 10])
    lsq = Lsq(4, axis=-2)
    params = jax.jit(lsq.init)(w)
    self.assertEqual(params['log_step'].shape, (1, 3))
    single = Lsq(4)
    init = jax.jit(single.init)
    y, ds, _ = pulled_back(lsq, params, w, w)
    y, ds = np.asarray(y), np.asarray(ds['log_step'])
    for j in range(3):
      column = w[:, j]
      want, own, _ = pulled_back(single, init(column), column, column)
      np.testing.assert_allclose(y[:, j], want, rtol=1e-6)
      np.testing.assert_allclose(ds[0, j], own['log_step'], rtol=1e-4)

  def test_unsigned_range(self):
    lsq = Lsq(2, signed=False)
    y = lsq(self.params(lsq, 0.5), np.float32([-1, 0.3, 0.9, 9]))
    np.testing.assert_allclose(y, [0, 0.5, 1.0, 1.5], rtol=1e-6)

  def test_clipped_step_stays_positive_and_can_grow_back(self):
    lsq = Lsq(3, parameter='clipped')
    params = {'step': np.float32(-0.1)}
    self.assertEqual(float(lsq.step(params)), qat.LEAST_STEP)
    _, slope, _ = pulled_back(lsq, params, W, np.sign(W))
    self.assertGreater(float(slope['step']), 0)

  def test_training_lowers_the_error(self):
    w = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    lsq = Lsq(3)
    params = lsq.init(w) | {}
    params = {'log_step': params['log_step'] + 1.0}  # e times too large

    @jax.jit
    def error(params):
      return jnp.mean((lsq(params, w) - w) ** 2)

    optimizer = optax.adam(0.05)
    state, before = optimizer.init(params), error(params)
    gradient = jax.jit(jax.grad(error))
    for _ in range(60):
      updates, state = optimizer.update(gradient(params), state)
      params = optax.apply_updates(params, updates)
    # The best step of seven levels has an error of .0450 for these numbers.
    self.assertLess(float(error(params)), 0.046)
    self.assertGreater(float(before), 0.09)

  def test_dtype_is_kept(self):
    lsq = Lsq(4)
    w = jnp.asarray(W, jnp.bfloat16)
    y, ds, dw = jax.eval_shape(
      functools.partial(pulled_back, lsq), lsq.init(w), w, w
    )
    self.assertEqual(y.dtype, jnp.bfloat16)
    self.assertEqual(
      (ds['log_step'].dtype, dw.dtype), (jnp.float32, jnp.bfloat16)
    )


class PactTest(absltest.TestCase):
  X = np.float32([-1, 0.3, 1.2, 2.5])

  def test_worked_example(self):
    pact, params = Pact(2), {'alpha': np.float32(1.5)}
    twos = np.full(4, 2, np.float32)
    y, _, dx = pulled_back(pact, params, self.X, twos)
    np.testing.assert_allclose(y, [0, 0.5, 1.0, 1.5], rtol=1e-6)
    slopes = jacobian(pact, params, self.X)['alpha']
    np.testing.assert_array_equal(slopes, [0, 0, 0, 1])
    np.testing.assert_array_equal(dx, [0, 2, 2, 0])

  def test_penalty(self):
    pact = Pact(4, decay=0.1)
    params = pact.init(3.0)
    self.assertAlmostEqual(float(pact.penalty(params)), 0.9, places=6)
    slope = jax.grad(pact.penalty)(params)['alpha']
    self.assertAlmostEqual(float(slope), 0.6, places=6)

  def test_alpha_below_zero_is_finite(self):
    pact = Pact(2)
    params = {'alpha': np.float32(-1)}
    y, _, dx = pulled_back(pact, params, self.X, np.ones_like(self.X))
    self.assertTrue(np.isfinite(y).all())
    self.assertTrue(np.isfinite(dx).all())


class ArgumentsTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: Lsq(1), 'bits=1 must be an int in 2..16'),
    (lambda: Lsq(0, signed=False), 'in 1..16'),
    (lambda: Lsq(4, parameter='exp'), 'parameter='),
    (lambda: Lsq(4)({'step': 1.0}, W), 'log_step'),
    (lambda: Pact(0), 'bits=0'),
    (lambda: Pact(2, -1.0), 'decay=-1.0'),
    (lambda: Pact(2).init(0.0), 'alpha=0.0'),
  )
  def test_refuses(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()

  def test_decay_mask_leaves_steps_alone(self):
    params = {
      'dense': {'kernel': W, 'quantizer': Lsq(4).init(W)},
      'other': Lsq(4, parameter='clipped').init(W),
      'pact': Pact(2).init(),
    }
    mask = qat.decay_mask(params)
    self.assertEqual(
      mask,
      {
        'dense': {'kernel': True, 'quantizer': {'log_step': False}},
        'other': {'step': False},
        'pact': {'alpha': True},
      },
    )


if __name__ == '__main__':
  absltest.main()
