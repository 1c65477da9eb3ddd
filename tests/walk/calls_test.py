"""`packed` through jit and functions with derivatives of their own, and under
the settings of JAX: names, donation, effects, export, checks and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import ops
from tests.ops.products import data, make
from tests.walk import programs

D, L = 64, 3
X = data(4, D)
W, U = make('mxfp4', D, D), make('mxfp4', D, D, seed=2)
STACK = make('mxfp4', L, D, D)


def why(report) -> list[str]:
  """Why weights are decoded."""
  return [row.how for row in report if row.decoded]


def layer(dot):
  return lambda x, w: jnp.tanh(dot(x, w))


def layers(x, ws):
  """Layers that are computed again for their gradient."""
  step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
  return lax.scan(step, x, ws)[0]


class JitTest(parameterized.TestCase):
  def test_a_body_with_many_weights_is_one_function(self):
    @jax.jit
    def block(x, w):
      return jnp.tanh(x @ w)

    def model(params, x):
      for w in params:
        x = block(x, w)
      return x

    text = programs.lowered(lowbit.packed(model), [W, U, W], X)
    self.assertEqual(text.count('func.func private @block('), 1)
    self.assertEqual(text.count('call @block('), 3)
    report = lowbit.packed(model).report([W, U, W], X)
    self.assertEqual([row.site for row in report], ['0', '1', '2'])
    self.assertEqual(report.decoded, 0)

  def test_a_body_is_traced_once(self):
    traces = 0

    @jax.jit
    def block(x, w):
      nonlocal traces
      traces += 1
      return jnp.tanh(x @ w)

    run = jax.jit(lowbit.packed(lambda x, *ws: [block(x, w) for w in ws]))
    run(X, W, U)
    run(X, U, W)
    self.assertEqual(traces, 1)

  def test_donates(self):
    @functools.partial(jax.jit, donate_argnums=(0, 3))
    def step(count, x, w, total):
      y = x @ w
      return count + 1, y, total + y

    args = jnp.zeros((7,)), X, W, jnp.zeros((4, D))
    _, y, total = lowbit.packed(step)(*args)
    self.assertTrue(args[0].is_deleted() and args[3].is_deleted())
    self.assertFalse(W.codes.is_deleted())
    programs.assert_same_bits(total, y)

  def test_scopes_and_names_stay(self):
    @jax.jit
    def block(x, w):
      with jax.named_scope('mlp'):
        return x @ w

    def model(x, ws):
      with jax.named_scope('model'):
        return lax.scan(lambda x, w: (block(x, w), None), x, ws)[0]

    (row,) = lowbit.packed(model).report(X, STACK)
    self.assertEqual(row.scope, 'model/mlp')
    lowered = jax.jit(lowbit.packed(model)).lower(X, STACK)
    text = lowered.as_text(debug_info=True)
    self.assertRegex(text, '"mlp/.*dot_general')
    self.assertIn('model/', text)
    self.assertIn('calls_test.py', text)


def twice(x, w):
  return 2 * (x @ w)


class CustomTest(parameterized.TestCase):
  """A function with a derivative of its own keeps it."""

  def functions(self):
    with_jvp = jax.custom_jvp(twice)
    with_jvp.defjvp(lambda p, t: (with_jvp(*p), 5 * (t[0] @ p[1])))
    with_vjp = jax.custom_vjp(twice)
    with_vjp.defvjp(
      lambda x, w: (twice(x, w), w), lambda w, g: (5 * (g @ w.T), None)
    )
    return with_jvp, with_vjp

  def test_values_are_packed(self):
    want = jax.jit(lambda x, w: 2 * ops.dot(x, w))(X, W)
    for fn in self.functions():
      packed = lowbit.packed(fn)
      self.assertEqual(why(packed.report(X, W)), [])
      programs.assert_same_bits(jax.jit(packed)(X, W), want)

  def test_derivatives_are_its_own(self):
    for fn in self.functions():

      def total(fn):
        return jax.jit(jax.grad(lambda x, w: fn(x, w).sum()))

      def inside(x, w, fn=fn):
        return total(fn)(x, w)

      want = total(fn)(X, programs.dense(W))
      programs.assert_same_bits(total(lowbit.packed(fn))(X, W), want)
      programs.assert_same_bits(jax.jit(lowbit.packed(inside))(X, W), want)

  def test_a_library_function_keeps_its_derivative(self):
    def fn(x, w):
      return jax.nn.silu(jax.nn.relu(x @ w)).sum()

    def by_ops(x, w):
      return jax.nn.silu(jax.nn.relu(ops.dot(x, w))).sum()

    packed, hand = (jax.jit(jax.grad(f)) for f in (lowbit.packed(fn), by_ops))
    programs.assert_same_bits(packed(X, W), hand(X, W))


class EnvironmentTest(parameterized.TestCase):
  def test_effects_happen_once_and_in_order(self):
    seen = []

    def fn(x, ws):
      def step(c, x):
        i, w = x
        y = jnp.tanh(c @ w)
        jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=True)
        return y, None

      y = lax.scan(step, x, (jnp.arange(L), ws))[0]
      jax.debug.callback(lambda: seen.append('end'), ordered=True)
      return y

    jax.block_until_ready(jax.jit(lowbit.packed(fn))(X, STACK))
    jax.effects_barrier()
    self.assertEqual(seen, [*range(L), 'end'])
    lowbit.packed(fn).report(X, STACK)
    jax.effects_barrier()
    self.assertLen(seen, L + 1)

  def test_effects_of_a_weight(self):
    seen = []

    def fn(x, w):
      jax.debug.callback(seen.append, w[0])
      return x @ w

    jax.block_until_ready(jax.jit(lowbit.packed(fn))(X, W))
    jax.effects_barrier()
    programs.assert_same_bits(seen, [programs.dense(W)[0]])

  def test_export(self):
    leaves, structure = jax.tree.flatten(STACK)

    def fn(x, *leaves):
      ws = structure.unflatten(leaves)
      return lowbit.packed(layers)(x, ws)

    exported = jax.export.export(jax.jit(fn))(X, *leaves)
    again = jax.export.deserialize(exported.serialize())
    got, want = again.call(X, *leaves), jax.jit(fn)(X, *leaves)
    programs.assert_same_bits(got, want)

  def test_checks_of_jax(self):
    fn = lowbit.packed(layers)
    with jax.checking_leaks(), jax.enable_checks(True):
      jax.jit(jax.grad(lambda *args: fn(*args).sum())).lower(X, STACK)

  def test_x64(self):
    """Products of float64 activations are those of the decoded weight."""
    with jax.enable_x64(True):
      x = np.float64(X)
      packed = lowbit.packed(jnp.matmul)
      got = jax.jit(packed)(x, W)
      want = jax.jit(jnp.matmul)(x, programs.dense(W).astype(jnp.float64))
      programs.assert_same_bits(got, want)
      self.assertEqual(got.dtype, jnp.float64)
      self.assertNotEmpty(why(packed.report(x, W)))
      # Of float32 they stay packed.
      self.assertEmpty(why(packed.report(X, W)))
      self.assertEqual(jax.eval_shape(packed, X, W).dtype, jnp.float32)

  def test_without_jit(self):
    fn = lowbit.packed(layer(jnp.matmul))
    want = layer(ops.dot)(X, W)
    programs.assert_same_bits(fn(X, W), want)


if __name__ == '__main__':
  absltest.main()
