"""ops.member: one member of a stack, in products and elsewhere.

What it stands for is `stack[i]`: the same implementation gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ops
from tests.ops import products

K, N, COUNT = 64, 48, 3


def _stack(name: str):
  matrices = [products.make(name, K, N, seed=i) for i in range(COUNT)]
  return products.stacked(*matrices)


class MemberTest(parameterized.TestCase):
  @parameterized.product(
    name=('mxfp4', 'nvfp4', 'int8_channel', 'uint4_g32_min_float16', 'q4_k'),
    implementation=('cpu', 'xla'),
  )
  def test_product_is_that_of_the_copy(self, name, implementation):
    if name == 'q4_k':
      make = functools.partial(products.make, name, 256, N)
      stack, x = products.stacked(make(), make(seed=3)), products.data(2, 256)
    else:
      stack, x = _stack(name), products.data(2, K)
    dot = functools.partial(lowbit.dot, implementation=implementation)
    for i in range(2):
      got = jax.jit(lambda x, q, i: dot(x, ops.member(q, i)))(x, stack, i)
      np.testing.assert_array_equal(got, jax.jit(dot)(x, stack[i]))

  def test_nothing_is_copied_on_cpu(self):
    """A copy would be a temporary of the size of a member."""
    stack = products.stacked(
      *(products.make('mxfp4', 512, 512, seed=i) for i in range(2))
    )

    def run(x, q, take):
      def layer(x, i):
        return lowbit.dot(x, take(q, i), implementation='cpu'), None

      return jax.lax.scan(layer, x, jnp.arange(2))[0]

    def temporaries(take):
      f = jax.jit(functools.partial(run, take=take))
      compiled = f.lower(jnp.ones((1, 512)), stack).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    self.assertLess(temporaries(ops.member), stack.nbytes // 8)
    self.assertGreater(temporaries(lambda q, i: q[i]), stack.nbytes // 4)

  def test_members_of_a_tree(self):
    tree = {'w': _stack('mxfp4'), 'b': jnp.arange(6.0).reshape(COUNT, 2)}
    got = ops.member(tree, 1)
    self.assertIsInstance(got['w'], ops.Member)
    np.testing.assert_array_equal(got['b'], tree['b'][1])
    np.testing.assert_array_equal(jnp.asarray(got['w']), tree['w'][1])
    self.assertEqual(got['w'].shape, (K, N))
    self.assertEqual(got['w'].ndim, 2)
    self.assertEqual(got['w'].astype(jnp.bfloat16).dtype, jnp.bfloat16)
    self.assertIn('Member(QArray(mxfp4', repr(got['w']))

  def test_numbers_outside_are_those_of_the_nearest(self):
    stack, x = _stack('mxfp4'), products.data(1, K)
    for implementation in ('cpu', 'xla'):
      dot = functools.partial(lowbit.dot, implementation=implementation)
      for i, nearest in ((-1, 0), (COUNT, COUNT - 1)):
        got = dot(x, ops.member(stack, i))
        np.testing.assert_array_equal(got, dot(x, stack[nearest]))

  def test_derivative_by_the_other_operand(self):
    stack, x = _stack('nvfp4'), products.data(2, K)

    def f(x, q):
      return jnp.sum(lowbit.dot(x, q) ** 2)

    got = jax.grad(lambda x: f(x, ops.member(stack, 2)))(x)
    np.testing.assert_array_equal(got, jax.grad(f)(x, stack[2]))

  def test_scales_have_no_derivative(self):
    stack, x = _stack('int4_g32'), products.data(2, K)

    def f(scale):
      q = lowbit.qarray.replace(stack, scale=scale)
      return jnp.sum(lowbit.dot(x, ops.member(q, 0)))

    with self.assertRaisesRegex(TypeError, 'scales of a Member weight'):
      jax.grad(f)(stack.scale)

  def test_vmap_over_numbers(self):
    stack, x = _stack('mxfp4'), products.data(2, K)
    numbers = jnp.array([2, 0, 1])
    got = jax.vmap(lambda i: lowbit.dot(x, ops.member(stack, i)))(numbers)
    for i, number in enumerate(numbers):
      np.testing.assert_array_equal(got[i], lowbit.dot(x, stack[number]))

  def test_groups_of_a_member(self):
    """A layer of experts is one of a stack of stacks."""
    layers = products.stacked(_stack('mxfp4'), _stack('mxfp4'))
    x, sizes = products.data(4, K), jnp.array([1, 0, 3])
    got = lowbit.ragged_dot(x, ops.member(layers, 1), sizes)
    np.testing.assert_array_equal(got, lowbit.ragged_dot(x, layers[1], sizes))

  def test_wrong_arguments(self):
    stack = _stack('mxfp4')
    with self.assertRaisesRegex(ValueError, 'must be one integer'):
      ops.member(stack, jnp.arange(2))
    with self.assertRaisesRegex(TypeError, 'must be an integer'):
      ops.member(stack, 1.0)
    blocks = lowbit.quantize(jnp.ones((64, 8)), formats.mxfp4, axis=0)
    with self.assertRaisesRegex(ValueError, 'blocks along its leading axis'):
      ops.member(blocks, 0)


if __name__ == '__main__':
  absltest.main()
