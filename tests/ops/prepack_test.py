"""Prepacked weights: reversible, and operands of products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats


def make(name: str, k: int = 96, n: int = 24, seed: int = 0):
  w = np.random.RandomState(seed).randn(k, n).astype(np.float32)
  return lowbit_jax.quantize(w, formats.get(name), axis=-2)


class PrepackTest(parameterized.TestCase):
  @parameterized.product(
    name=(
      'mxfp4', 'nvfp4', 'mxfp6_e2m3', 'int3_g32', 'uint4_g32', 'int5_g128',
      'int8_channel', 'nf4_g64', 'int4_tensor',
    ),
    k=(96, 100),
  )  # fmt: skip
  def test_round_trip(self, name, k):
    q = make(name, k)
    p = lowbit_jax.prepack(q, implementation='tpu')
    self.assertEqual((p.shape, p.ndim, p.dtype), (q.shape, 2, q.dtype))
    back = lowbit_jax.unpack(p)
    self.assertEqual(jax.tree.structure(back), jax.tree.structure(q))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_product_and_gradient_are_those_of_the_qarray(self):
    x = jnp.asarray(np.random.RandomState(1).randn(5, 96), jnp.float32)
    q = make('nvfp4')
    p = lowbit_jax.prepack(q, implementation='tpu')
    self.assertIn('unpacks', lowbit_jax.select_implementation('dot', x, p).note)
    np.testing.assert_array_equal(lowbit_jax.dot(x, p), lowbit_jax.dot(x, q))

    def loss(x, w):
      return jnp.sum(jnp.sin(lowbit_jax.dot(x, w)))

    np.testing.assert_array_equal(
      jax.jit(jax.grad(loss))(x, p), jax.jit(jax.grad(loss))(x, q)
    )

  def test_stacks(self):
    w = np.random.RandomState(0).randn(3, 96, 8).astype(np.float32)
    q = jax.vmap(lambda w: lowbit_jax.quantize(w, formats.mxfp4, axis=-2))(w)
    p = jax.vmap(lambda q: lowbit_jax.prepack(q, implementation='tpu'))(q)
    back = jax.vmap(lowbit_jax.unpack)(p)
    np.testing.assert_array_equal(back.codes, q.codes)
    x = jnp.ones((2, 96))
    np.testing.assert_array_equal(
      jax.vmap(lowbit_jax.dot, in_axes=(None, 0))(x, p),
      jax.vmap(lowbit_jax.dot, in_axes=(None, 0))(x, q),
    )

  def test_scales_have_no_derivative(self):
    p = lowbit_jax.prepack(make('int4_g32'), implementation='tpu')

    def loss(scale):
      weight = dataclasses.replace(p.weight, scale=scale)
      moved = dataclasses.replace(p, weight=weight)
      return lowbit_jax.dot(jnp.ones((2, 96)), moved).sum()

    with self.assertRaisesRegex(TypeError, 'of the QArray, unpack'):
      jax.grad(loss)(p.weight.scale)

  def test_mistakes(self):
    q = make('mxfp4')
    for f, error, message in (
      (lambda: lowbit_jax.prepack(q, implementation='xla'), ValueError, 'xla'),
      (
        lambda: lowbit_jax.prepack(jnp.ones((2, 2)), implementation='tpu'),
        TypeError,
        'QArray',
      ),
      (
        lambda: lowbit_jax.prepack(q.T, implementation='tpu'),
        ValueError,
        'axis -2',
      ),
      (
        lambda: lowbit_jax.dot(
          lowbit_jax.prepack(q, implementation='tpu'), jnp.ones((24, 2))
        ),
        TypeError,
        'right operand',
      ),
    ):
      with self.assertRaisesRegex(error, message):
        f()

  def test_a_kernel_is_chosen_by_name_wherever_it_is(self):
    x = jnp.ones((2, 96), jnp.bfloat16)
    for w in (
      make('mxfp4'),
      lowbit_jax.prepack(make('mxfp4'), implementation='tpu'),
    ):
      choice = lowbit_jax.select_implementation(
        'dot', x, w, implementation='tpu'
      )
      self.assertEqual(choice.implementation, 'tpu')
      choice = lowbit_jax.select_implementation('dot', x, w)
      self.assertEqual(choice.implementation, 'xla')
      self.assertIn('cpu', choice.refusals['tpu'])


if __name__ == '__main__':
  absltest.main()
