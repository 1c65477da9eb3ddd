"""Weights with a low-rank term under `packed`: views move both, products keep
them apart."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import formats

K, N, RANK = 64, 96, 4
EPS = 2.0**-24


def weight(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  q = lowbit.quantize(
    jax.random.normal(keys[0], (K, N)), formats.mxfp4, axis=-2
  )
  a = jax.random.normal(keys[1], (K, 1, RANK))
  b = jax.random.normal(keys[2], (1, N, RANK))
  return lowbit.ops.LowRank(q.astype(dtype), a, b, scale=0.5)


VIEWS = {
  'as it is': lambda w, x: x @ w,
  'left': lambda w, x: (w.T @ x.T).T,
  'reshape': lambda w, x: jnp.einsum('bk,khn->bhn', x, w.reshape(K, 4, -1)),
  'split': lambda w, x: jnp.concatenate(
    [x @ part for part in jnp.split(w, 3, axis=1)], axis=1
  ),
  'slice': lambda w, x: x @ w[:, 8:40],
  'blocks': lambda w, x: x[:, :32] @ w[:32],
  'one more axis': lambda w, x: x @ w[None].squeeze(0),
  'transposed': lambda w, x: jnp.einsum('bk,nk->bn', x, w.T),
  'dynamic': lambda w, x: x @ lax.dynamic_slice_in_dim(w, x.shape[0], 16, 1),
  'stop': lambda w, x: x @ lax.stop_gradient(w),
  'scan': lambda w, x: lax.scan(lambda c, _: (c, c @ w), x, None, 2)[1],
}


class LowRankTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in VIEWS)
  def test_stays_apart(self, name):
    fn, w = VIEWS[name], weight()
    x = jax.random.normal(jax.random.key(1), (3, K))
    got = lowbit.packed(fn, strict=True)(w, x)
    want = fn(lowbit.dequantize(w), x)
    # Sums of K terms, and of K and RANK terms behind each other.
    factors = jnp.abs(w.a[:, 0] * w.scale) @ jnp.abs(w.b[0]).T
    terms = jnp.abs(lowbit.dequantize(w.weight)) + factors
    bound = (2 * K + RANK + 16) * EPS * jnp.max(jnp.abs(x) @ terms)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)

  def test_only_the_factors_have_a_gradient(self):
    x = jax.random.normal(jax.random.key(1), (3, K))
    fn = lowbit.packed(lambda w: jnp.sum((x @ w) ** 2), strict=True)
    trainable, frozen = lowbit.partition(weight())
    grads = jax.grad(lambda t: fn(lowbit.combine(t, frozen)))(trainable)
    self.assertIsNone(grads.weight)
    dense = lowbit.dequantize(frozen.weight)

    def by_hand(a, b):
      return jnp.sum((x @ (dense + 0.5 * a[:, 0] @ b[0].T)) ** 2)

    want = jax.grad(by_hand, (0, 1))(trainable.a, trainable.b)
    np.testing.assert_allclose(grads.a, want[0], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(grads.b, want[1], rtol=1e-3, atol=1e-2)

  def test_axes_of_both_factors_that_become_one_are_dense(self):
    packed = lowbit.packed(lambda w: w.reshape(-1) * 2)
    (row,) = packed.report(weight())
    self.assertEqual(row.decoded, 4 * K * N)
    self.assertIn('reshape', row.how)


if __name__ == '__main__':
  absltest.main()
