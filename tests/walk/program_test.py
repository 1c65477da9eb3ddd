"""Packed programs are those that one would write by hand with `ops`.

Compared after compilation, without names and lines of source; and by the
memory that they need, where a decoded copy of a weight would show.
"""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lowbit_jax as lowbit
from lowbit_jax import ops
from tests.ops.products import data, make
from tests.walk import programs

D, L = 128, 4
X = data(4, D)
W = make('mxfp4', D, D)
STACK = make('mxfp4', L, D, D)


def matmul(dot):
  return lambda x, w: jnp.tanh(dot(x, w))


def scan(dot, wrap=lambda f: f):
  @wrap
  def step(x, w):
    return jnp.tanh(dot(x, w)), None

  return lambda x, ws: lax.scan(step, x, ws)[0]


def gradient_of_scan_of_remat(dot, around=lambda f: f):
  fn = around(scan(dot, jax.checkpoint))
  return jax.grad(lambda x, ws: jnp.sum(fn(x, ws) ** 2))


class ProgramTest(parameterized.TestCase):
  def assert_equal(self, packed, by_ops, *args):
    got, want = (programs.compiled(f, *args) for f in (packed, by_ops))
    self.assertEqual(got, want)
    self.assertIn('ENTRY', got)

  def test_matmul(self):
    packed, by_ops = lowbit.packed(matmul(jnp.matmul)), matmul(ops.dot)
    self.assert_equal(packed, by_ops, X, W)

  def test_scan(self):
    packed, by_ops = lowbit.packed(scan(jnp.matmul)), scan(ops.dot)
    self.assert_equal(packed, by_ops, X, STACK)

  def test_gradient_of_scan_of_remat(self):
    packed = gradient_of_scan_of_remat(jnp.matmul, lowbit.packed)
    by_ops = gradient_of_scan_of_remat(ops.dot)
    self.assert_equal(packed, by_ops, X, STACK)

  def test_gradient_of_remat_with_a_policy(self):
    """Of two values one is saved and one computed again."""

    def gradient(dot, around=lambda f: f):
      def layer(x, w):
        y = checkpoint_name(jnp.tanh(dot(x, w)), 'saved')
        return jnp.tanh(dot(y, w))

      policy = jax.checkpoint_policies.save_only_these_names('saved')
      fn = around(jax.checkpoint(layer, policy=policy, prevent_cse=False))
      return jax.grad(lambda x, w: jnp.sum(fn(x, w)))

    packed = gradient(jnp.matmul, lowbit.packed)
    by_ops = gradient(ops.dot)
    got, want = (programs.lowered(f, X, W) for f in (packed, by_ops))
    self.assertEqual(got, want)

  def test_the_comparison_sees_a_difference(self):
    dense = matmul(jnp.matmul)

    def by_hand(x, w):
      return dense(x, lowbit.dequantize(w))

    packed = lowbit.packed(dense)
    self.assertNotEqual(
      programs.compiled(packed, X, W), programs.compiled(by_hand, X, W)
    )

  def test_untouched_parts_are_as_they_were(self):
    """What meets no weight is the program of the function."""

    def fn(x, w):
      key = jax.random.key(0)
      y = jax.nn.softmax(x + jax.random.normal(key, x.shape), axis=-1)
      y = lax.scan(lambda c, row: (c + row @ x.T, c.sum()), x[:, :4], y)
      return y, jnp.sort(x), jax.lax.top_k(x, 3), x.astype(jnp.bfloat16)

    packed = lowbit.packed(fn)
    self.assertEqual(programs.lowered(packed, X, W), programs.lowered(fn, X, X))

  def test_a_function_without_weights_is_as_it_was(self):
    fn = gradient_of_scan_of_remat(jnp.matmul)
    dense = programs.dense(STACK)
    self.assertEqual(
      programs.lowered(lowbit.packed(fn), X, dense),
      programs.lowered(fn, X, dense),
    )


class MemoryTest(parameterized.TestCase):
  LAYER = 4 * D * D

  @parameterized.named_parameters(
    ('scan', scan),
    ('gradient', gradient_of_scan_of_remat),
  )
  def test_no_stack_is_decoded(self, build):
    fn = build(jnp.matmul)

    def decoded(x, ws):
      return fn(x, lax.optimization_barrier(programs.dense(ws)))

    layers = [
      programs.temporaries(f, X, STACK) / self.LAYER
      for f in (lowbit.packed(fn), decoded)
    ]
    self.assertLess(layers[0], 3)
    self.assertGreater(layers[1], L)


if __name__ == '__main__':
  absltest.main()
