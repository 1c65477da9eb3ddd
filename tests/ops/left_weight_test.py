"""Products with a weight on the left: those of one on the right, transposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, ops, qarray, transforms
from lowbit_jax.ops import Transformed
from tests.ops.products import assert_product, data, dense, make, stacked

K, N, M = 64, 8, 3

# Subscripts, a weight, and the shape of the array on the right.
CASES = {
  'rows': ('nk,km->nm', make('uint4_g32', N, K, axis=-1), (K, M)),
  'several axes': ('akb,mkc->abmc', make('mxfp4', 4, K, 2), (2, K, 2)),
  'batch within': ('kgn,mkg->gnm', make('mxfp4', K, 2, N, axis=-3), (M, K, 2)),
}
MORE_CASES = {
  'columns': ('kn,km->nm', make('mxfp4', K, N), (K, M)),
  'one row': ('nk,k->n', make('nvfp4', N, K, axis=-1), (K,)),
  'batch in front': ('gkn,gkm->gnm', make('nvfp4', 2, K, N), (2, K, M)),
  'batch alone': ('gk,gk->g', make('mxfp4', 4, K, axis=-1), (4, K)),
  'two contracted': ('hkn,mhk->nm', make('mxfp4', 2, 32, N), (M, 2, 32)),
}


def transposed(spec: str) -> str:
  """The same product with the operands exchanged."""
  inputs, output = spec.split('->')
  lhs, rhs = inputs.split(',')
  return f'{rhs},{lhs}->{output}'


def note(spec: str, *operands, **kwargs) -> str:
  choice = lowbit_jax.select_implementation('einsum', spec, *operands, **kwargs)
  return choice.note


def assert_as_on_the_right(f, q, x, spec):
  """f(spec, q, x), whose bits are those of the operands exchanged."""
  got, want = (
    jax.jit(f, static_argnums=0)(*args)
    for args in ((spec, q, x), (transposed(spec), x, q))
  )
  np.testing.assert_array_equal(got, want)
  return got


class LeftWeightTest(parameterized.TestCase):
  @parameterized.named_parameters((n, *case) for n, case in CASES.items())
  def test_products(self, *case):
    self.check(*case)

  @parameterized.named_parameters((n, *case) for n, case in MORE_CASES.items())
  @pytest.mark.slow
  def test_more_products(self, *case):
    self.check(*case)

  def check(self, spec, q, shape):
    x = data(*shape)
    got = assert_as_on_the_right(lowbit_jax.einsum, q, x, spec)
    assert_product(got, spec, q, x)
    right = note(transposed(spec), x, q, implementation='xla')
    self.assertIn('scan over tiles', right)
    left = note(spec, q, x, implementation='xla')
    self.assertEqual(left, f'exchanges the operands: {right}')

  def test_axes_of_one_size_keep_their_order(self):
    q, x = make('mxfp4', K, 2, N, axis=-3), data(N, 2, K)
    dims = ((0,), (2,)), ((1,), (1,))
    got = jax.jit(lambda q, x: ops.dot_general(q, x, dims))(q, x)
    assert_product(got, 'kgn,mgk->gnm', q, x)

  def test_dot(self):
    q, x = make('mxfp4', N, K, axis=-1), data(K, M)
    assert_product(jax.jit(lowbit_jax.dot)(q, x), 'nk,km->nm', q, x)
    choice = lowbit_jax.select_implementation('dot', q, x)
    self.assertStartsWith(choice.note, 'exchanges the operands: scan')

  def test_weights_that_are_dequantized(self):
    for q, spec, x in (
      (make('mxfp4', N, K), 'nk,km->nm', data(K, M)),
      (make('mxfp4_32x32', K, 32), 'kn,km->nm', data(K, M)),
    ):
      self.assertRegex(note(spec, q, x), 'exchanges.*dequantizes to float32')
      got = jax.jit(lowbit_jax.einsum, static_argnums=0)(spec, q, x)
      assert_product(got, spec, q, x)

  def test_kernels_take_them(self):
    q = make('int8_channel', 128, 128, axis=-1)
    x = jnp.ones((128, 2), jnp.bfloat16)
    for name in ('tpu', 'mosaic_gpu'):
      right = note('mk,nk->nm', x.T, q, implementation=name)
      self.assertIn('decodes tiles', right)
      left = note('nk,km->nm', q, x, implementation=name)
      self.assertEqual(left, f'exchanges the operands: {right}')

  def test_stored_activations_stay_on_the_left(self):
    q, w = make('mxfp4', 2, K, axis=-1), data(K, N)
    how = 'dequantizes to float32 first: only the left operand is quantized'
    self.assertEqual(note('mk,kn->mn', q, w, implementation='xla'), how)
    with self.assertRaisesRegex(NotImplementedError, 'only the left'):
      lowbit_jax.dot(q, w, implementation='tpu')

  def test_symbolic_sizes_are_those_of_activations(self):
    (m,) = jax.export.symbolic_shape('m')
    q, x = make('mxfp4', N, K, axis=-1), jax.ShapeDtypeStruct((K, m), 'float32')
    self.assertIn('exchanges', note('nk,km->nm', q, x))
    f = jax.export.export(jax.jit(lambda x: lowbit_jax.dot(q, x)))(x)
    x = data(K, 200)
    assert_product(f.call(x), 'nk,km->nm', q, x)

  def test_blocks_through_several_axes(self):
    w, x = data(2, 16, N), data(M, 2, 16)
    q = jax.jit(lambda w: ops.quantize(w, formats.mxfp4, axis=(0, 1)))(w)
    spec = 'abn,mab->nm'
    got = assert_as_on_the_right(lowbit_jax.einsum, q, x, spec)
    assert_product(got, spec, np.asarray(q), x)
    self.assertIn('exchanges the operands: scan', note(spec, q, x))

  def test_transformed(self):
    order = transforms.Permutation(np.random.RandomState(0).permutation(K))
    w, x = Transformed(make('mxfp4', K, N), order, -2), data(K, M)
    got = assert_as_on_the_right(lowbit_jax.einsum, w, x, 'kn,km->nm')
    assert_product(got, 'kn,km->nm', np.asarray(w), x)
    self.assertIn('exchanges the operands: scan', note('kn,km->nm', w, x))

  def test_prepacked_weights_stay_on_the_right(self):
    q = ops.prepack(make('int4_g32', 96, 128), implementation='tpu')
    with self.assertRaisesRegex(TypeError, 'is the right operand'):
      lowbit_jax.dot(q, data(128, 2))

  def test_dtypes(self):
    q, x = make('mxfp4', K, N), data(K, M)

    def product(dtype):
      return lambda *args: lowbit_jax.einsum(
        *args, preferred_element_type=dtype
      )

    narrow = assert_as_on_the_right(product(jnp.bfloat16), q, x, 'kn,km->nm')
    self.assertEqual(narrow.dtype, jnp.bfloat16)
    # Half an ulp of bfloat16.
    assert_product(np.float32(narrow), 'kn,km->nm', q, x, extra=2.0**-9)
    for a, b in (('float32', 'bfloat16'), ('bfloat16', 'float32')):
      got = jax.eval_shape(
        lambda q, x: product(None)('kn,km->nm', q, x), q.astype(a), x.astype(b)
      )
      self.assertEqual(got.dtype, jnp.float32)

  def test_vmap(self):
    stack, x = (
      stacked(*(make('nvfp4', K, N, seed=i) for i in (1, 2))),
      data(K, M),
    )
    many = data(2, K, M, seed=3)

    @jax.jit
    def mapped(stack, x, many):
      f = lambda q, x: lowbit_jax.einsum('kn,km->nm', q, x)
      return (
        jax.vmap(f, (0, None))(stack, x),
        jax.vmap(f, (None, 0))(jax.tree.map(lambda leaf: leaf[0], stack), many),
        jax.vmap(f)(stack, many),
      )

    by_weight, by_array, by_both = mapped(stack, x, many)
    values = np.stack([dense(make('nvfp4', K, N, seed=i)) for i in (1, 2)])
    assert_product(by_weight, 'gkn,km->gnm', values, x)
    assert_product(by_array, 'kn,gkm->gnm', values[0], many)
    assert_product(by_both, 'gkn,gkm->gnm', values, many)

  def test_derivatives(self):
    q, x, c = make('int4_g32', 2, K, N), data(2, K, M), data(2, N, M, seed=5)
    tangent = data(2, K, M, seed=6)

    @jax.jit
    def derivatives(scale, x, c):
      def f(scale, x):
        w = qarray.replace(q, scale=scale)
        return lowbit_jax.einsum('gkn,gkm->gnm', w, x)

      y, vjp = jax.vjp(f, scale, x)
      moves = [
        jax.jvp(lambda x: f(scale, x), (x,), (tangent,))[1],
        jax.jvp(lambda s: f(s, x), (scale,), (scale,))[1],
      ]
      return y, *moves, *vjp(c)

    y, by_x, by_scale, dscale, dx = derivatives(q.scale, x, c)
    assert_product(y, 'gkn,gkm->gnm', q, x)
    assert_product(by_x, 'gkn,gkm->gnm', q, tangent)
    # The product is linear in the scales: its derivative along them is itself.
    assert_product(by_scale, 'gkn,gkm->gnm', q, x)
    assert_product(dx, 'gkn,gnm->gkm', q, c)
    total = np.einsum('gkn,gkm,gnm->', dense(q), x, c)
    bound = np.einsum('gkn,gkm,gnm->', *map(np.abs, (dense(q), x, c)))
    got = np.vdot(np.float64(dscale), np.float64(q.scale))
    self.assertLess(abs(got - total), bound * 2.0**-16)

  def test_explicit_axes(self):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=kinds)
    q, x = make('mxfp4', 2, K, N), data(2, K, 4)
    f = jax.jit(lambda q, x: lowbit_jax.einsum('gkn,gkm->gnm', q, x))
    for weight, array, spec in (
      (P(None, None, 'b'), P(None, None, 'a'), P(None, 'b', 'a')),
      (P('a'), P(None, 'a', 'b'), P('a', None, 'b')),
    ):
      with jax.set_mesh(mesh):
        places = lowbit_jax.shardings(q, NamedSharding(mesh, weight))
        y = f(
          jax.device_put(q, places),
          jax.device_put(x, NamedSharding(mesh, array)),
        )
      self.assertEqual(y.sharding.spec, spec)
      assert_product(y, 'gkn,gkm->gnm', q, x)


if __name__ == '__main__':
  absltest.main()
