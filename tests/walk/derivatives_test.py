"""Derivatives of packed functions, and of what is packed.

Each case is written for a product `dot`. Derivatives of the packed function of
`jnp.matmul` are those of the same function of `ops.dot`, bit for bit. Those
that a function takes inside are products of their own, which sum in another
order: rounding errors of (D + 8) 2^-24 for each sum, here at most ten in a row,
relative to the largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import ops
from tests.ops import products
from tests.ops.products import data, make
from tests.walk import programs

D, L = 64, 3
X, V = data(4, D), data(4, D, seed=3)
W = make('mxfp4', D, D)
STACK = make('mxfp4', L, D, D)


def layer(dot):
  return lambda x, w: jnp.tanh(dot(x, w))


def scan(dot):
  def step(x, w):
    return jnp.tanh(dot(x, w)), None

  return lambda x, ws: lax.scan(step, x, ws)[0]


def scan_of_remat(dot):
  @jax.checkpoint
  def step(x, w):
    return jnp.tanh(dot(x, w)), None

  return lambda x, ws: lax.scan(step, x, ws)[0]


def cond(dot):
  def fn(x, w):
    return lax.cond(x[0, 0] > 0, lambda: dot(x, w), lambda: x)

  return fn


def jit(dot):
  return jax.jit(layer(dot))


def vmap(dot):
  return lambda x, w: jax.vmap(lambda row: jnp.sin(dot(row, w)))(x)


CASES = {
  'layer': (layer, W),
  'scan': (scan, STACK),
  'scan_of_remat': (scan_of_remat, STACK),
  'cond': (cond, W),
  'jit': (jit, W),
  'vmap': (vmap, W),
}


def loss(fn):
  return lambda x, w: jnp.sum(fn(x, w) ** 2)


def gradient(fn):
  return jax.value_and_grad(loss(fn))


def forward(fn):
  return lambda x, w: jax.jvp(lambda x: fn(x, w), (x,), (V,))


def hessian_vector(fn):
  """Forward over reverse."""
  return lambda x, w: jax.jvp(
    lambda x: jax.grad(loss(fn))(x, w), (x,), (V,)
  )[1]  # fmt: skip


def curvature(fn):
  """Reverse over reverse."""
  return jax.grad(lambda x, w: jnp.vdot(jax.grad(loss(fn))(x, w), V))


FIRST = gradient, forward
SECOND = hessian_vector, curvature


class DerivativesTest(parameterized.TestCase):
  def check(self, name, derivative):
    """Of a packed function."""
    build, w = CASES[name]
    by_ops = derivative(build(ops.dot))
    packed = derivative(lowbit.packed(build(jnp.matmul)))
    if programs.lowered(packed, X, w) != programs.lowered(by_ops, X, w):
      got, want = jax.jit(packed)(X, w), jax.jit(by_ops)(X, w)
      programs.assert_same_bits(got, want)

  @parameterized.product(name=['layer', 'scan_of_remat'], derivative=FIRST)
  def test_of_packed_functions(self, name, derivative):
    self.check(name, derivative)

  @parameterized.product(name=['scan', 'cond', 'jit', 'vmap'], derivative=FIRST)
  @pytest.mark.slow
  def test_of_more_packed_functions(self, name, derivative):
    self.check(name, derivative)

  @parameterized.product(name=['layer'], derivative=SECOND)
  def test_second_of_packed_functions(self, name, derivative):
    self.check(name, derivative)

  @parameterized.parameters('scan', 'scan_of_remat')
  def test_curvature_of_scan(self, name):
    self.check(name, curvature)

  @parameterized.parameters('scan', 'scan_of_remat')
  @pytest.mark.slow
  def test_hessian_vector_of_scan(self, name):
    self.check(name, hessian_vector)

  @parameterized.product(name=['cond', 'jit', 'vmap'], derivative=SECOND)
  @pytest.mark.slow
  def test_more_second_of_packed_functions(self, name, derivative):
    self.check(name, derivative)

  def check_inside(self, name, derivative):
    """Inside of a packed function."""
    build, w = CASES[name]
    packed = lowbit.packed(derivative(build(jnp.matmul)))
    got = jax.jit(packed)(X, w)
    want = jax.jit(derivative(build(jnp.matmul)))(X, programs.dense(w))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      error = np.max(np.abs(np.float64(a) - b))
      size = np.max(np.abs(np.float64(b)))
      self.assertLess(error, 10 * (D + 8) * products.U * size)

  @parameterized.product(name=['layer', 'scan_of_remat'], derivative=FIRST)
  def test_inside(self, name, derivative):
    self.check_inside(name, derivative)

  @parameterized.product(
    name=['scan', 'cond', 'jit', 'vmap'], derivative=FIRST + SECOND
  )
  @pytest.mark.slow
  def test_more_inside(self, name, derivative):
    self.check_inside(name, derivative)

  def test_inside_reports_the_transposed_product(self):
    """It contracts an axis along which no blocks lie."""
    report = lowbit.packed(gradient(layer(jnp.matmul))).report(X, W)
    self.assertEqual(
      [row.scope for row in report], ['jvp()', 'transpose(jvp())']
    )
    self.assertEqual([row.decoded for row in report], [0, 4 * D * D])
    self.assertIn('which is not contracted', report[1].how)

  def test_inside_by_the_weight(self):
    def by_weight(x, w):
      return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    def by_hand(x, w):
      return x.T @ (1 - jnp.tanh(ops.dot(x, w)) ** 2)

    got = jax.jit(lowbit.packed(by_weight))(X, W)
    want = jax.jit(by_hand)(X, W)
    bound = 10 * (D + 8) * products.U * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)

  @parameterized.parameters(('int4_g32', 1), ('nvfp4', 1))
  def test_scales_are_trained(self, fmt, count):
    self.check_scales(fmt, count)

  @pytest.mark.slow
  def test_scales_of_two_levels_are_trained(self):
    self.check_scales('q4_k', 2)

  def check_scales(self, fmt, count):
    """As leaves of QArrays, packed or not."""
    params = {'w': make(fmt, D, D), 'b': data(D)}
    trained, rest = lowbit.partition(params, scales=True)
    self.assertLen(jax.tree.leaves(trained), count + 1)

    def of_scales(dot):
      def model(params, x):
        return jnp.tanh(dot(x, params['w']) + params['b'])

      packed = lowbit.packed(model) if dot is jnp.matmul else model

      def run(trained, x):
        return jnp.sum(packed(lowbit.combine(trained, rest), x) ** 2)

      return jax.grad(run)

    got, want = (of_scales(dot) for dot in (jnp.matmul, ops.dot))
    if programs.lowered(got, trained, X) != programs.lowered(want, trained, X):
      got, want = jax.jit(got)(trained, X), jax.jit(want)(trained, X)
      programs.assert_same_bits(got, want)


if __name__ == '__main__':
  absltest.main()
