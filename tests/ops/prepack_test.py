"""Prepacked weights: reversible, and operands of products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats


@functools.cache
def make(name: str, k: int = 96, n: int = 24, seed: int = 0):
  w = np.random.RandomState(seed).randn(k, n).astype(np.float32)
  return _quantize(w, formats.get(name))


@functools.partial(jax.jit, static_argnums=1)
def _quantize(w, fmt):
  return lowbit_jax.quantize(w, fmt, axis=-2)


dot = jax.jit(lowbit_jax.dot)
prepack = jax.jit(functools.partial(lowbit_jax.prepack, implementation='tpu'))
unpack = jax.jit(lowbit_jax.unpack)


class PrepackTest(parameterized.TestCase):
  @parameterized.parameters(('int3_g32', 100), ('uint4_g32', 100))
  def test_round_trip(self, name, k):
    self.check_round_trip(name, k)

  @parameterized.parameters(
    ('mxfp4', 96), ('mxfp4', 100), ('nvfp4', 96), ('nvfp4', 100),
    ('mxfp6_e2m3', 96),
    ('mxfp6_e2m3', 100), ('int3_g32', 96), ('uint4_g32', 96),
    ('int5_g128', 96), ('int5_g128', 100), ('int8_channel', 96),
    ('int8_channel', 100), ('nf4_g64', 96), ('nf4_g64', 100),
    ('int4_tensor', 96), ('int4_tensor', 100),
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_round_trips(self, name, k):
    self.check_round_trip(name, k)

  @pytest.mark.slow
  def test_round_trip_without_jit(self):
    q = make('int8_channel')
    back = lowbit_jax.unpack(lowbit_jax.prepack(q, implementation='tpu'))
    np.testing.assert_array_equal(back.codes, q.codes)

  def check_round_trip(self, name, k):
    q = make(name, k)
    p = prepack(q)
    self.assertEqual((p.shape, p.ndim, p.dtype), (q.shape, 2, q.dtype))
    back = unpack(p)
    self.assertEqual(jax.tree.structure(back), jax.tree.structure(q))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_product_and_gradient_are_those_of_the_qarray(self):
    x = jnp.asarray(np.random.RandomState(1).randn(5, 96), jnp.float32)
    q = make('mxfp4')
    p = prepack(q)
    self.assertIn('unpacks', lowbit_jax.select_implementation('dot', x, p).note)

    @jax.jit
    def slope(x, w):
      y, pull = jax.vjp(lambda x: lowbit_jax.dot(x, w), x)
      return y, pull(jnp.cos(y))[0]

    for got, want in zip(slope(x, p), slope(x, q), strict=True):
      np.testing.assert_array_equal(got, want)

  def test_stacks(self):
    w = np.random.RandomState(0).randn(3, 96, 8).astype(np.float32)
    q = jax.vmap(lambda w: _quantize(w, formats.mxfp4))(w)
    p = jax.vmap(prepack)(q)
    back = jax.vmap(unpack)(p)
    np.testing.assert_array_equal(back.codes, q.codes)
    x = np.ones((2, 96), np.float32)
    dots = jax.vmap(dot, in_axes=(None, 0))
    np.testing.assert_array_equal(dots(x, p), dots(x, q))

  def test_scales_have_no_derivative(self):
    p = prepack(make('uint4_g32', 100))

    def loss(scale):
      weight = dataclasses.replace(p.weight, scale=scale)
      moved = dataclasses.replace(p, weight=weight)
      return lowbit_jax.dot(jnp.ones((2, 100)), moved).sum()

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
        lambda: lowbit_jax.dot(prepack(q), np.ones((24, 2), np.float32)),
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
      prepack(make('mxfp4')),
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
