"""ragged_dot by kernels for CPUs, which read the matrix of a group in place.

The oracle is the float64 product of the rows of each group with the dequantized
matrix of the group, within the bound of `products`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import qarray
from tests.ops import products

M, K, N = 90, 64, 24
# Groups without rows, of one row, of more than a window; five rows are left.
SIZES = np.array([0, 3, 70, 0, 1, 11], np.int32)
ENDS = np.cumsum(SIZES)
_by_kernel = functools.partial(lowbit.ragged_dot, implementation='cpu')


@functools.cache
def _weights(name: str):
  members = (products.make(name, K, N, seed=i) for i in range(len(SIZES)))
  return products.stacked(*members)


class RaggedTest(parameterized.TestCase):
  @parameterized.parameters('mxfp4', 'nvfp4', 'int8_channel', 'uint4_g32')
  def test_equals_float64(self, name):
    q, x = _weights(name), products.data(M, K)
    out = jax.jit(_by_kernel)(x, q, SIZES)
    w = products.dense(q)
    for e, (end, size) in enumerate(zip(ENDS, SIZES, strict=True)):
      rows = slice(end - size, end)
      products.assert_product(out[rows], 'mk,kn->mn', x[rows], w[e])
    np.testing.assert_array_equal(out[ENDS[-1] :], 0)

  def test_row_has_the_bits_of_its_product(self):
    """With one window a group, each row meets its matrix as in `dot`."""
    q, x = _weights('mxfp4'), products.data(4, K)
    out = _by_kernel(x, q, np.array([1, 0, 0, 2, 0, 1]))
    for row, e in ((0, 0), (1, 3), (2, 3), (3, 5)):
      want = lowbit.dot(x[row : row + 1], q[e], implementation='cpu')
      np.testing.assert_array_equal(out[row : row + 1], want)

  def test_poison_stays_in_its_group(self):
    q = _weights('uint4_g32')
    scale = np.array(q.scale)
    scale[[0, 2]] = np.nan  # one of them has no rows
    q = qarray.replace(q, scale=scale)
    out = np.asarray(_by_kernel(products.data(M, K), q, SIZES))
    rows = np.isnan(out).any(1)
    np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(3, 73))

  def test_gradient_is_that_of_xla(self):
    q, x = _weights('nvfp4'), products.data(M, K)

    def loss(x, implementation):
      out = lowbit.ragged_dot(x, q, SIZES, implementation=implementation)
      return jnp.sum(out)

    got, want = (jax.grad(loss)(x, name) for name in ('cpu', 'xla'))
    np.testing.assert_array_equal(got, want)


if __name__ == '__main__':
  absltest.main()
