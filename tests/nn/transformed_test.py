"""Flax, trees and reports on weights whose activations take a transform."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, nn, recipe, transforms
from lowbit_jax.nn import nnx as lowbit_nnx
from lowbit_jax.ops import Transformed
from lowbit_jax.training import optimizers
from tests.ops import products

K, N = 64, 8
X = products.data(3, K)
ORDER = transforms.Permutation(np.random.RandomState(0).permutation(K))


def weight(axis=-2, transform=ORDER) -> Transformed:
  shape = (K, N) if axis == -2 else (N, K)
  q = products.make('int8_g32', *shape, axis=axis)
  return Transformed(q, transform, axis)


class ModulesTest(parameterized.TestCase):
  def assert_product(self, f, w):
    """f is the product with w, in the operations of the packed one."""
    plain = jax.make_jaxpr(lambda x: lowbit_jax.dot(x, w))(X)
    self.assertEqual(str(jax.make_jaxpr(f)(X)), str(plain))

  def test_nnx(self):
    w = weight()
    model = nnx.Linear(
      *(K, N),
      use_bias=False,
      rngs=nnx.Rngs(0),
      dot_general=nn.dot_general(),
      promote_dtype=nn.promote_dtype,
    )
    model.kernel = lowbit_nnx.frozen(model.kernel, w)
    self.assert_product(model, w)
    model.kernel = lowbit_nnx.frozen(model.kernel, w)
    graph, state = nnx.split(model)
    again = nnx.merge(graph, state)
    self.assertIsInstance(again.kernel.get_raw_value(), Transformed)
    plain = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    plain.kernel = lowbit_nnx.frozen(plain.kernel, w)
    dense = np.asarray(w)
    np.testing.assert_allclose(plain(X), X @ dense, rtol=1e-4, atol=1e-4)

  def test_nnx_einsum(self):
    w = weight()
    model = nnx.Einsum(
      'bk,kn->bn',
      (K, N),
      rngs=nnx.Rngs(0),
      einsum_op=nn.einsum(),
      promote_dtype=nn.promote_dtype,
    )
    model.kernel = lowbit_nnx.frozen(model.kernel, w)
    self.assert_product(model, w)

  def test_linen(self):
    w = weight()
    variables = {'params': {'kernel': w}}
    packed = linen.Dense(
      N,
      use_bias=False,
      dot_general=nn.dot_general(),
      promote_dtype=nn.promote_dtype,
    )
    self.assert_product(lambda x: packed.apply(variables, x), w)
    plain = linen.Dense(N, use_bias=False)
    packed = lowbit_jax.packed(plain.apply, strict=True)
    np.testing.assert_array_equal(packed(variables, X), lowbit_jax.dot(X, w))
    y = plain.apply(variables, X)
    np.testing.assert_allclose(y, X @ np.asarray(w), rtol=1e-4, atol=1e-4)
    box = linen.Partitioned(w, (None, 'model'))
    self.assertIs(nn.unbox({'a': box, 'b': w})['a'], w)

  @parameterized.parameters(
    (-1, ORDER),
    (-1, transforms.Hadamard(32)),
    (-2, transforms.Permutation([1, 0, 2, 7, 6, 5, 4, 3])),
  )
  def test_embeddings(self, axis, transform):
    q = products.make('int8_g32', N, K, axis=-1)
    w = Transformed(q, transform, axis)
    table, ids = np.asarray(w), np.array([[1, 7], [0, 7]])
    model = nn.linen.Embed(N, K)
    rows = model.apply({'params': {'embedding': w}}, ids)
    np.testing.assert_allclose(rows, table[ids], rtol=1e-6, atol=1e-6)
    unknown = model.apply({'params': {'embedding': w}}, np.array([9]))
    self.assertTrue(np.isnan(unknown).all())
    query = products.data(2, K)
    attended = model.apply({'params': {'embedding': w}}, query, method='attend')
    np.testing.assert_allclose(attended, query @ table.T, rtol=1e-4, atol=1e-4)

  def test_quantize_params_leaves_it(self):
    params = {'a': {'kernel': weight()}, 'b': {'kernel': jnp.ones((K, N))}}
    got = nn.quantize_params(params, None, formats.mxfp4)
    self.assertIs(got['a']['kernel'], params['a']['kernel'])
    self.assertIsInstance(got['b']['kernel'], lowbit_jax.QArray)
    with self.assertRaisesRegex(TypeError, 'returned int'):
      nn.quantize_params(params, None, formats.mxfp4, method=lambda *_: 3)

  def test_quantize_params_takes_it_from_a_method(self):
    params = {'a': {'kernel': jnp.ones((3, K, N))}}
    got = nn.quantize_params(
      params,
      None,
      formats.mxfp4,
      stacked='kernel',
      method=lambda *_: weight(transform=transforms.Hadamard(32)),
    )['a']['kernel']
    self.assertIsInstance(got, Transformed)
    self.assertEqual((got.shape, got.stacked), ((3, K, N), 1))

  def test_activations_are_quantized_behind_the_transform(self):
    rotation, x = transforms.Hadamard(32), products.data(5, K)
    w = weight(transform=rotation)
    product = nn.dot_general(lhs=recipe.QuantSpec(formats.mxfp4))
    got = product(x, w, (((1,), (0,)), ((), ())))
    behind = lowbit_jax.fake_quant(rotation.apply(x), formats.mxfp4, axis=-1)
    want = lowbit_jax.dot(behind, w.weight)
    np.testing.assert_array_equal(got, want)
    before = lowbit_jax.fake_quant(x, formats.mxfp4, axis=-1)
    self.assertGreater(abs(lowbit_jax.dot(before, w) - want).max(), 1e-2)


class TreesTest(parameterized.TestCase):
  def params(self):
    scale = np.linspace(1, 2, K, dtype=np.float32)
    smoothing = transforms.DiagonalSmoothing(scale)
    return {'w': weight(transform=smoothing), 'b': jnp.ones(N)}

  def assert_same(self, a, b):
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def test_partition(self):
    params = self.params()
    for scales, count in ((False, 1), (True, 2)):
      trainable, frozen = lowbit_jax.partition(params, scales=scales)
      self.assertLen(jax.tree.leaves(trainable), count)
      self.assert_same(lowbit_jax.combine(trainable, frozen), params)
    mask = nn.trainable_mask(params)
    self.assertEqual(mask, {'w': False, 'b': True})

  def test_direct_updates_refuse_it(self):
    params = self.params()
    updates = {'w': jnp.ones((K, N)), 'b': jnp.ones(N)}
    self.assertEqual(optimizers.dequantized(params)['w'].shape, (K, N))
    with self.assertRaisesRegex(TypeError, 'w is Transformed'):
      optimizers.apply_updates(params, updates, jax.random.key(0))

  def test_shardings(self):
    w = weight()
    mesh = jax.make_mesh((2,), ('d',))
    places = lowbit_jax.shardings(w, NamedSharding(mesh, P(None, 'd')))
    self.assertEqual(places.weight.codes.spec, P(None, 'd'))
    self.assertEqual(places.transform.order.spec, P())
    placed = jax.device_put(w, places)
    np.testing.assert_array_equal(placed, w)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), w)
    specs = lowbit_jax.shardings(stack, P('d'))
    self.assertEqual(specs.transform.order, P('d'))
    with self.assertRaisesRegex(ValueError, "axis -2 .* sharded over 'd'"):
      lowbit_jax.shardings({'w': w}, P('d'))

  def test_abstract_variables_keep_their_leaves(self):
    variable = nnx.Param(jnp.ones((K, N)))
    q = lowbit_nnx.frozen(variable, weight())
    mesh = jax.make_mesh((2,), ('d',))
    place = NamedSharding(mesh, P(None, 'd'))
    q.set_value(jax.ShapeDtypeStruct((K, N), jnp.float32, sharding=place))
    self.assertEqual(q.get_raw_value().weight.codes.sharding, place)

  def test_flax_serialization(self):
    params = self.params()
    data = flax.serialization.to_bytes(params)
    target = jax.tree.map(jnp.zeros_like, params)
    self.assert_same(flax.serialization.from_bytes(target, data), params)

  def test_report(self):
    w, x = weight(transform=transforms.Hadamard(32)), products.data(K, N)
    row = lowbit_jax.doctor.report({'w': w}, reference={'w': x})['w']
    plain = lowbit_jax.doctor.report(
      {'w': w.weight}, reference={'w': w.transform.apply_dual(x)}
    )['w']
    self.assertEqual((row.shape, row.fmt), ((K, N), 'int8_g32'))
    self.assertEqual(row.measures, plain.measures)


if __name__ == '__main__':
  absltest.main()
