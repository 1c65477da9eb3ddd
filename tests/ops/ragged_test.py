"""ragged_dot on Array | QArray, and its derivatives.

The oracle is the float64 product of the rows of each group with the dequantized
matrix of the group, within the bound of `products`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, qarray
from tests.ops.products import (
  assert_product,
  data,
  dense,
  make,
  one_device,
  stacked,
)  # fmt: skip

M, K, N = 90, 64, 5
# Groups without rows, of one row, of more than a window; five rows are left.
SIZES = np.array([0, 3, 70, 0, 1, 11], np.int32)
ENDS = np.cumsum(SIZES)


@functools.cache
def weights(name: str):
  return stacked(*(make(name, K, N, seed=i) for i in range(len(SIZES))))


@functools.partial(jax.jit, static_argnames='moves')
def derivatives(x, q, sizes, g, moves):
  """The product, its gradients by x and the float leaves, and a tangent."""

  def f(x, leaves):
    return lowbit_jax.ragged_dot(x, qarray.replace(q, **leaves), sizes)

  leaves = {name: getattr(q, name) for name in moves}
  y, vjp = jax.vjp(f, x, leaves)
  _, tangent = jax.jvp(lambda x: f(x, leaves), (x,), (2 * x,))
  return y, vjp(g), tangent


class RaggedTest(parameterized.TestCase):
  def test_equals_float64(self):
    self.check('uint4_g32', 'scale')

  @parameterized.parameters(
    ('nvfp4', 'tensor_scale'), ('int8_channel', 'scale'), ('mxfp4_32x32', None)
  )
  @pytest.mark.slow
  def test_more_formats_equal_float64(self, name, leaf):
    self.check(name, leaf)

  def check(self, name, leaf):
    q, x, g = weights(name), data(M, K), data(M, N, seed=5)
    out, (dx, moved), tangent = derivatives(
      x, q, SIZES, g, (leaf,) if leaf else ()
    )
    w = dense(q)
    for e, (end, size) in enumerate(zip(ENDS, SIZES, strict=True)):
      rows = slice(end - size, end)
      assert_product(out[rows], 'mk,kn->mn', x[rows], w[e])
      assert_product(tangent[rows], 'mk,kn->mn', 2 * x[rows], w[e])
      assert_product(dx[rows], 'mn,kn->mk', g[rows], w[e])
      if leaf:
        # The sum of gradient times scale: each block is linear in its scale.
        got = np.sum(np.float64(moved[leaf][e]) * getattr(q, leaf)[e])
        want = np.sum(g[rows] * (np.float64(x[rows]) @ w[e]))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    for rest in (out, dx, tangent):
      np.testing.assert_array_equal(rest[ENDS[-1] :], 0)

  def test_poison_stays_in_its_group(self):
    q = weights('uint4_g32')
    scale = np.array(q.scale)
    scale[[0, 2]] = np.nan  # one of them has no rows
    q, x, g = qarray.replace(q, scale=scale), data(M, K), data(M, N, seed=5)
    out, (dx, _), _ = derivatives(x, q, SIZES, g, ('scale',))
    for got in (out, dx):
      rows = np.isnan(got).any(1)
      np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(3, 73))

  def test_few_rows_and_none(self):
    q = weights('mxfp4')
    sizes = np.array([0, 1, 0, 2, 0, 0])
    x = data(3, K)
    out = jax.jit(lowbit_jax.ragged_dot)(x, q, sizes)
    for row, e in ((0, 1), (1, 3), (2, 3)):
      assert_product(out[row], 'k,kn->n', x[row], dense(q)[e])
    empty = lowbit_jax.ragged_dot(x[:0], q, 0 * sizes)
    self.assertEqual(empty.shape, (0, N))

  def test_arrays_and_a_quantized_left_operand(self):
    x, w = data(M, K), data(len(SIZES), K, N, seed=3)
    left = make('int8_channel', M, K, axis=-1)

    @jax.jit
    def f(left, x, w):
      d = lowbit_jax.ragged_dot
      return d(x, w, SIZES), d(left, w, SIZES)

    for out, a in zip(f(left, x, w), (x, left), strict=True):
      for e, (end, size) in enumerate(zip(ENDS, SIZES, strict=True)):
        rows = slice(end - size, end)
        assert_product(out[rows], 'mk,kn->mn', dense(a)[rows], w[e])

  def test_one_tile_is_decoded_at_a_time(self):
    """The backward pass decodes one matrix."""
    quantize = functools.partial(
      lowbit_jax.quantize, fmt=formats.mxfp4, axis=-2
    )
    w = jax.ShapeDtypeStruct((32, 512, 512), jnp.float32)
    q = jax.eval_shape(jax.vmap(quantize), w)
    x = jax.ShapeDtypeStruct((80, 512), jnp.float32)
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)

    def slope(x, q, sizes):
      return jax.grad(lambda x: jnp.sum(lowbit_jax.ragged_dot(x, q, sizes)))(x)

    with one_device():
      for f in (lowbit_jax.ragged_dot, slope):
        compiled = jax.jit(f).lower(x, q, sizes).compile()
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, 2**22)  # weights: 2^25

  def test_refusals(self):
    x, q = data(M, K), weights('mxfp4')
    f = lowbit_jax.ragged_dot
    packed = lowbit_jax.prepack(make('mxfp4', K, N), implementation='tpu')
    turned = make('mxfp4', 32, K, N, axis=-3)
    through = jax.eval_shape(
      lambda w: lowbit_jax.quantize(w, formats.mxfp4, axis=(-2, -1)),
      jax.ShapeDtypeStruct((6, K, N), jnp.float32),
    )
    for error, message, args in (
      (ValueError, r'\(90, 32\).*\(6, 64, 5\)', (x[:, :32], q, SIZES)),
      (ValueError, 'must be .m, k. and', (x, make('mxfp4', K, N), SIZES)),
      (ValueError, r'group_sizes.shape=\(5,\)', (x, q, SIZES[1:])),
      (TypeError, 'group_sizes has dtype float32', (x, q, np.float32(SIZES))),
      (TypeError, 'Prepacked', (x, packed, SIZES)),
      (ValueError, 'axis=-2', (x, turned, np.zeros(32, int))),
      (ValueError, 'axis=-2', (x, through, SIZES)),
    ):
      with self.assertRaisesRegex(error, message):
        f(*args)
    with self.assertRaisesRegex(NotImplementedError, "no 'tpu' impl"):
      f(x, q, SIZES, implementation='tpu')
    choice = lowbit_jax.select_implementation('ragged_dot', x, q, SIZES)
    self.assertEqual(choice.implementation, 'xla')
    self.assertIn('scan over tiles', choice.note)


if __name__ == '__main__':
  absltest.main()
