"""take against `jnp.take` on the dequantized table, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, ops, qarray, transforms
from lowbit_jax.ops import Transformed
from tests.ops import products

N, K = 8, 64
# The first and the last row from either end, and just beyond.
IDS = np.array([[0, N - 1, N], [-1, -N, -N - 1]])
OUTSIDE = np.array([[False, False, True], [False, False, True]])
REVERSED = transforms.Permutation(np.arange(K)[::-1].copy())

take = jax.jit(ops.take)


def looked_up(table, ids=IDS):
  """By the definition, of all that the table stands for."""
  return jnp.take(lowbit_jax.dequantize(table), ids, axis=0)


def sizes(f, *args) -> list[int]:
  """Elements of each float array that a program makes."""
  found = []

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      for v in equation.outvars:
        if jnp.issubdtype(v.aval.dtype, jnp.floating):
          found.append(v.aval.size)
      for inner in jax.tree.leaves(
        equation.params, is_leaf=lambda p: hasattr(p, 'jaxpr')
      ):
        if hasattr(inner, 'jaxpr'):
          visit(inner.jaxpr)

  visit(jax.make_jaxpr(f)(*args).jaxpr)
  return found


def stack_of_transformed() -> Transformed:
  """Matrices that have a transform each."""
  members = [
    Transformed(products.make('int8_g32', K, 4, seed=i), t, -2)
    for i, t in enumerate((REVERSED, transforms.Permutation(np.arange(K))))
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


# Only the rows are decoded.
ROWS = {
  'block scales': products.make('mxfp4', N, K, axis=-1),
  'two levels': products.make('nvfp4', N, K, axis=-1),
  'zero points': products.make('uint4_g32', N, K, axis=-1),
  'a scale for each row': products.make('int8_channel', N, K, axis=-1),
  'a scale for all': products.make('int8_tensor', N, K, axis=-1),
  'padded': products.make('mxfp4', N, 40, axis=-1),
  'matrices': products.make('mxfp4', N, K, 4, axis=-2),
  'a tensor scale for each': products.stacked(
    *(products.make('nvfp4', 2, 32, axis=-1, seed=i) for i in range(N))
  ),
  'tiles': products.make('mxfp4_32x32', N, 32, 32),
  'permuted': Transformed(
    products.make('int8_g32', N, K, axis=-1), REVERSED, -1
  ),
}
# The whole table is decoded.
WHOLE = {
  'blocks of rows': products.make('mxfp4', 64, 4, axis=-2),
  'a vector': products.make('mxfp4', 64, axis=-1),
  'tiles of rows': products.make('mxfp4_32x32', 64, 32),
  'rows permuted': Transformed(
    products.make('int8_g32', N, K, axis=-1),
    transforms.Permutation(np.arange(N)[::-1].copy()),
    -2,
  ),
}


class TakeTest(parameterized.TestCase):
  @parameterized.named_parameters(ROWS.items())
  def test_only_the_rows_are_decoded(self, table):
    got = take(table, IDS)
    self.assertEqual(got.shape, (*IDS.shape, *table.shape[1:]))
    np.testing.assert_array_equal(got, looked_up(table))
    rows = np.isnan(got).reshape(*IDS.shape, -1)
    np.testing.assert_array_equal(rows.all(-1), OUTSIDE)
    np.testing.assert_array_equal(rows.any(-1), OUTSIDE)
    # Of one row, no array is larger than the row with its padding.
    row = table.size // N
    largest = max(sizes(lambda t: ops.take(t, 3), table))
    self.assertLess(largest, 2 * row)

  @parameterized.named_parameters(WHOLE.items())
  def test_tables_that_have_no_rows_of_their_own(self, table):
    ids = np.array([0, 5, -1, len(table)])
    np.testing.assert_array_equal(take(table, ids), looked_up(table, ids))

  def test_members_of_a_stack_of_transformed(self):
    table, ids = stack_of_transformed(), np.array([[1, 0], [-1, 2]])
    np.testing.assert_array_equal(take(table, ids), looked_up(table, ids))

  def test_blocks_through_several_axes(self):
    w = products.data(N, 4, 8)
    for axis in ((-2, -1), (-3, -2)):
      table = lowbit_jax.quantize(w, formats.mxfp4, axis=axis)
      np.testing.assert_array_equal(take(table, IDS), looked_up(table))

  def test_arrays(self):
    x = products.data(N, K)
    np.testing.assert_array_equal(take(x, IDS), jnp.take(x, IDS, axis=0))
    narrow = ops.take(x, 3, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(narrow, jnp.asarray(x[3], jnp.bfloat16))

  def test_dtypes(self):
    table = ROWS['two levels']
    for ids in (np.uint8([2, 7]), np.int16([2, -1]), [2, 7]):
      np.testing.assert_array_equal(
        ops.take(table, ids), looked_up(table, np.asarray(ids))
      )
    narrow = ops.take(table, IDS[0], dtype=jnp.bfloat16)
    whole = lowbit_jax.dequantize(table, jnp.bfloat16)
    self.assertEqual(narrow.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      np.float32(narrow), np.float32(jnp.take(whole, IDS[0], axis=0))
    )
    table = table.astype(jnp.float16)
    self.assertEqual(jax.eval_shape(ops.take, table, IDS).dtype, jnp.float16)

  def test_no_indices(self):
    table = ROWS['two levels']
    none = np.zeros((3, 0), int)
    self.assertEqual(jax.eval_shape(ops.take, table, none).shape, (3, 0, K))

  def test_derivative(self):
    table, ids = ROWS['zero points'], np.array([[0, 3], [3, 5]])
    weights = products.data(*ids.shape, K)

    def loss(look_up, scale):
      rows = look_up(qarray.replace(table, scale=scale), ids)
      return jnp.sum(rows * weights)

    got, want = (
      jax.jit(jax.grad(lambda s, f=f: loss(f, s)))(table.scale)
      for f in (ops.take, looked_up)
    )
    # Sums of 32 products in float32, in any order.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    self.assertTrue(np.any(want))

  def test_vmap_over_tables_and_indices(self):
    tables = products.stacked(
      *(products.make('mxfp4', N, K, axis=-1, seed=i) for i in range(2))
    )
    got = jax.jit(jax.vmap(ops.take))(tables, IDS)
    want = [looked_up(tables[i], IDS[i]) for i in range(2)]
    np.testing.assert_array_equal(got, want)

  def test_explicit_axes(self):
    mesh = jax.make_mesh(
      (2, 2), ('a', 'b'), axis_types=(AxisType.Explicit,) * 2
    )
    for name in ('block scales', 'permuted'):
      table = ROWS[name]
      with jax.set_mesh(mesh):
        ids = jax.device_put(IDS, NamedSharding(mesh, P('a')))
        spec = P('b') if name == 'permuted' else P('a', 'b')
        places = lowbit_jax.shardings(table, NamedSharding(mesh, spec))
        got = take(jax.device_put(table, places), ids)
      columns = None if name == 'permuted' else 'b'
      self.assertEqual(got.sharding.spec, P('a', None, columns))
      np.testing.assert_array_equal(got, looked_up(table))

  def test_refusals(self):
    table = ROWS['block scales']
    for error, message, *args in (
      (TypeError, 'table must be an array.*got str', 'nonsense', IDS),
      (TypeError, 'table has dtype int32', np.zeros(3, np.int32), IDS),
      (ValueError, r'table.shape=\(\) has no rows', 1.0, IDS),
      (ValueError, 'has no rows', products.make('mxfp4', 0, K, axis=-1), IDS),
      (TypeError, 'indices has dtype float32', table, np.float32([1])),
      (TypeError, 'indices has dtype bool', table, np.array([True])),
      (TypeError, 'indices must be .* got object', table, object()),
    ):
      with self.assertRaisesRegex(error, message):
        ops.take(*args)
    with self.assertRaisesRegex(TypeError, 'dtype='):
      ops.take(table, IDS, dtype='none')


if __name__ == '__main__':
  absltest.main()
