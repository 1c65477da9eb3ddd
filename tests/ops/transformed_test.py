"""Products with weights whose activations take a transform.

The oracle is the float64 product of the dense weight, `inverse_dual` of the
dequantized one. A rotation in blocks of 32 rounds both sides five times more
than a plain product, relative to the norms of what it mixes.

What rewrites a product is tested without the product that it leads to, whose
operands are a QArray and an array: that saves the compilations.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import ops, qarray, transforms
from lowbit_jax.ops import Transformed, _dot, _operand, _ragged
from tests import compilation
from tests.ops import products

K, N = 64, 8
ORDER = np.random.RandomState(0).permutation(K)
TRANSFORMS = {
  'permutation': transforms.Permutation(ORDER),
  'hadamard': transforms.random_hadamard(jax.random.key(0), K, 32),
  'smoothing': transforms.DiagonalSmoothing(
    np.random.RandomState(1).uniform(0.5, 2, K).astype(np.float32)
  ),
  'aimed_elsewhere': transforms.Permutation(ORDER, axis=-2),
  'chain': transforms.Chain(
    (transforms.Permutation(ORDER), transforms.Hadamard(32))
  ),
}
NAMED = [(name, t) for name, t in TRANSFORMS.items()]
X = products.data(3, K)


def weight(transform, fmt='mxfp4', *shape) -> Transformed:
  return Transformed(products.make(fmt, *(shape or (K, N))), transform, -2)


def stack(transform, n=2) -> Transformed:
  """Members of different codes, whose transforms differ where they can."""
  members = [
    Transformed(products.make('mxfp4', K, N, seed=i), t, -2)
    for i, t in enumerate((transform, _turned(transform)) * n)
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members[:n])


def _turned(transform):
  return jax.tree.map(lambda leaf: leaf[::-1], transform)


def dense(w: Transformed) -> np.ndarray:
  """The dense weight by its definition, one member at a time."""
  if w.ndim > 2:
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], w) for i in range(len(w))]
    return np.stack([dense(part) for part in parts])
  values = qarray.dequantize(w.weight, jnp.float32)
  return np.asarray(w.transform.inverse_dual(values, w.axis), np.float64)


def product(subscripts: str, lhs, rhs) -> np.ndarray:
  """An einsum whose operands the library rewrites, then in float64."""
  dims, _ = _dot.einsum_dims(subscripts, lhs.ndim, rhs.ndim)
  operands = _operand.untransformed(lhs, rhs, dims)
  operands = (np.asarray(_operand.dense(x), np.float64) for x in operands)
  return np.einsum(subscripts, *operands)


def assert_close(test, y, x, w):
  """y is x @ w."""
  x = np.asarray(x, np.float64)
  norms = np.linalg.norm(x, axis=-1)[..., None]
  bound = (
    (K + 16) * products.U * norms * np.linalg.norm(w, axis=-2)[..., None, :]
  )
  test.assertEqual(np.shape(y), (x @ w).shape)
  test.assertTrue((np.abs(y - x @ w) <= bound).all())


class ValueTest(parameterized.TestCase):
  @parameterized.named_parameters(NAMED)
  def test_dense_value(self, transform):
    w = weight(transform)
    got = lowbit_jax.dequantize(w)
    self.assertEqual((got.shape, got.dtype), ((K, N), np.float32))
    np.testing.assert_allclose(got, dense(w), rtol=1e-6, atol=1e-6)
    self.assertEqual(lowbit_jax.dequantize(w, jnp.bfloat16).dtype, 'bfloat16')
    np.testing.assert_array_equal(got, jnp.asarray(w))
    np.testing.assert_array_equal(got, np.asarray(w))
    np.testing.assert_allclose(w.dual(got), w.weight, rtol=1e-5, atol=1e-5)

  def test_views(self):
    w = Transformed(products.make('mxfp4', 3, K, N), TRANSFORMS['hadamard'], -2)
    whole = dense_of(w)
    for view, expected in (
      (w.mT, whole.swapaxes(1, 2)),
      (w[1], whole[1]),
      (w[..., 2:5], whole[..., 2:5]),
      (w[jnp.array([2, 0])], whole[[2, 0]]),
    ):
      self.assertIsInstance(view, Transformed)
      self.assertEqual(view.shape, expected.shape)
      self.assertEqual(view.stacked, 0)
      np.testing.assert_allclose(dense_of(view), expected, rtol=1e-6, atol=1e-6)
    self.assertEqual((w.T.shape, w.T.axis), ((N, K, 3), -2))
    self.assertEqual(w[1:].shape, (2, K, N))
    self.assertEqual((w.size, len(w), w.dtype), (whole.size, 3, np.float32))
    self.assertEqual(w.nbytes, w.weight.nbytes + K)
    self.assertStartsWith(repr(w), 'Transformed(QArray(mxfp4, shape=(3, 64, 8)')
    for index in ((0, 3), (0, slice(32)), (..., 0), (slice(None), [1, 2])):
      with self.assertRaisesRegex(IndexError, 'axis -2 stays whole'):
        w[index]

  @parameterized.named_parameters(NAMED[:2])
  def test_members_of_a_stack(self, transform):
    w = stack(transform)
    self.assertEqual((w.shape, w.stacked), ((2, K, N), 1))
    np.testing.assert_allclose(dense_of(w), dense(w), rtol=1e-6, atol=1e-6)
    for k in (1, jnp.int32(1)):
      np.testing.assert_allclose(dense_of(w[k]), dense(w)[1], rtol=1e-6)
    np.testing.assert_allclose(dense_of(w.mT), dense(w).mT, rtol=1e-6)
    with self.assertRaisesRegex(ValueError, 'is a stack'):
      _ = w.T
    with self.assertRaisesRegex(IndexError, 'stacks take indices'):
      w[0, 0]

  def test_stack(self):
    q, other = (products.make('mxfp4', K, N, seed=i) for i in range(2))
    parts = q, weight(TRANSFORMS['permutation']), other
    made = ops.stack(parts)
    self.assertEqual((made.shape, made.stacked), ((3, K, N), 1))
    for part, member in zip(parts, made, strict=True):
      np.testing.assert_array_equal(jnp.asarray(member), jnp.asarray(part))
    self.assertEqual(ops.stack([q, other]).fmt, q.fmt)
    np.testing.assert_array_equal(ops.stack([X, -X]), np.stack([X, -X]))
    with self.assertRaisesRegex(ValueError, 'parts is empty'):
      ops.stack([])
    with self.assertRaisesRegex(TypeError, 'quantize all or none'):
      ops.stack([q, jnp.asarray(q)])

  def test_wrong_arguments(self):
    q, t = products.make('mxfp4', K, N), TRANSFORMS['permutation']
    for arguments, error, message in (
      ((X, t, -2), TypeError, 'weight must be a QArray'),
      ((q, X, -2), TypeError, 'transform must be one of .*got ndarray'),
      ((q, t, 0), ValueError, 'axis=0 must count from the end'),
      ((q, t, -3), ValueError, 'axis=-3 is out of range'),
      ((q, t, 'a'), TypeError, "axis='a' must be an int"),
      ((q, t, -1), ValueError, r'order of shape \(64,\) does not fit'),
      ((q, t, -2, 3), ValueError, 'rank=3 must be'),
      ((q, transforms.Hadamard(128), -2), ValueError, 'multiple of block=128'),
    ):
      with self.assertRaisesRegex(error, message):
        Transformed(*arguments)

  def test_what_takes_no_transform(self):
    w = weight(TRANSFORMS['permutation'])
    for f in (
      lambda: lowbit_jax.prepack(w, implementation='tpu'),
      lambda: ops.update_slice(w, jnp.ones((K, N)), (0, 0)),
      lambda: lowbit_jax.dequantize(w, dither=jnp.ones((K, N))),
    ):
      with self.assertRaisesRegex(TypeError, 'QArray, got Transformed'):
        f()


class RewritingTest(parameterized.TestCase):
  @parameterized.named_parameters(NAMED)
  def test_weights_stay_packed(self, transform):
    w = weight(transform)
    for side, subscripts in enumerate(('nk,mk->nm', 'mk,kn->mn')):
      operands = (X, w) if side else (w.mT, X)
      dims, _ = _dot.einsum_dims(subscripts, 2, 2)
      rewritten = _operand.untransformed(*operands, dims)
      self.assertIs(rewritten[side], w.weight) if side else None
      self.assertIsInstance(rewritten[side], qarray.QArray)
      self.assertIsInstance(rewritten[1 - side], jax.Array)
    plain = lowbit_jax.select_implementation('dot', X, w.weight)
    self.assertEqual(lowbit_jax.select_implementation('dot', X, w), plain)
    shapes = jax.eval_shape(lambda: (X, w))
    choice = lowbit_jax.select_implementation('einsum', 'mk,kn->nm', *shapes)
    self.assertEqual(choice, plain)

  @parameterized.named_parameters(NAMED[1:4])
  def test_products(self, transform):
    w, y = weight(transform), products.data(3, N)
    q = products.make('mxfp4', 3, K, axis=-1)
    assert_close(self, product('mk,kn->mn', X, w), X, dense(w))
    assert_close(self, product('nk,amk->amn', w.mT, X[None])[0], X, dense(w))
    assert_close(self, product('k,kn->n', X[0], w)[None], X[:1], dense(w))
    # Dense: another axis, none, two stored operands, of which one stays.
    dims, _ = _dot.einsum_dims('mk,kn->mn', 2, 2)
    self.assertIs(_operand.untransformed(q, w, dims)[0], q)
    assert_close(self, product('mn,kn->mk', y, w), y, dense(w).T)
    assert_close(self, product('mk,kn->mn', q, w), np.asarray(q), dense(w))
    np.testing.assert_allclose(
      product('mk,kn->kmn', X, w),
      np.einsum('mk,kn->kmn', X, dense(w)),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_two_transforms(self):
    w, v = (weight(TRANSFORMS[name]) for name in ('permutation', 'hadamard'))
    got = product('nk,km->nm', w.mT, v)
    assert_close(self, got, dense(w).T, dense(v))

  def test_several_contracted_axes(self):
    w = Transformed(products.make('mxfp4', 4, K, N), TRANSFORMS['hadamard'], -2)
    x, whole = products.data(3, 4, K), dense_of(w)
    got = product('mhk,hkn->mn', x, w)
    assert_close(self, got, x.reshape(3, -1), whole.reshape(-1, N))
    # One transform of all members of a batch.
    got = product('mhk,hkn->hmn', x, w)
    assert_close(self, got, x.swapaxes(0, 1), whole)

  @parameterized.named_parameters(NAMED[:2])
  def test_stacks(self, transform):
    w, x = stack(transform), products.data(2, 3, K)
    assert_close(self, product('gmk,gkn->gmn', x, w), x, dense(w))
    turned = x.transpose(1, 2, 0)
    assert_close(self, product('mkg,gnk->gmn', turned, w.mT), x, dense(w))
    assert_close(self, product('mk,gkn->gmn', X, w), X, dense(w))
    dims, _ = _dot.einsum_dims('gmk,gkn->gmn', 3, 3)
    self.assertIs(_operand.untransformed(x, w, dims)[1], w.weight)

  @parameterized.named_parameters(NAMED[:2])
  def test_ragged(self, transform):
    x, sizes = products.data(6, K), np.array([1, 3])
    for w in (stack(transform), weight(transform, 'mxfp4', 2, K, N)):
      left, right, *_ = _ragged.operands(x, w, sizes)
      self.assertIs(right, w.weight)
      left, values = (np.asarray(v, np.float64) for v in (left, right))
      self.assertEqual(left.shape, x.shape)
      for rows, group in ((slice(0, 1), 0), (slice(1, 4), 1)):
        y = left[rows] @ values[group]
        assert_close(self, y, x[rows], dense_of(w)[group])
      shapes = jax.eval_shape(lambda w=w: (jnp.asarray(x), w, sizes))
      choice = lowbit_jax.select_implementation('ragged_dot', *shapes)
      self.assertIn('one window of rows', choice.note)

  def test_ragged_of_other_sides(self):
    w, sizes = stack(TRANSFORMS['permutation']).mT, np.array([1, 2])
    _, right, *_ = _ragged.operands(products.data(3, N), w, sizes)
    np.testing.assert_array_equal(right, w)
    q = products.make('mxfp4', 3, K, axis=-1)
    left = Transformed(q, TRANSFORMS['smoothing'], -1)
    first, right, *_ = _ragged.operands(left, products.data(2, K, N), sizes)
    self.assertIs(first, q)
    got = np.asarray(q, np.float64) @ np.asarray(right, np.float64)
    assert_close(self, got, dense_of(left)[None], products.data(2, K, N))

  def test_dtypes(self):
    w = weight(TRANSFORMS['hadamard'])
    for x, v, kwargs, expected in (
      (X, w, {}, 'float32'),
      (X.astype(jnp.bfloat16), w, {}, 'float32'),
      (X.astype(jnp.bfloat16), w.astype(jnp.bfloat16), {}, 'bfloat16'),
      (X, w, {'preferred_element_type': jnp.float16}, 'float16'),
    ):
      for f in (
        lambda x, w, kwargs=kwargs: lowbit_jax.dot(x, w, **kwargs),
        lambda x, w, kwargs=kwargs: lowbit_jax.einsum(
          'mn,kn->mk', x[:, :N], w, **kwargs
        ),
      ):
        self.assertEqual(jax.eval_shape(f, x, v).dtype, expected)
    with jax.enable_x64(True), self.assertRaisesRegex(TypeError, 'float64'):
      lowbit_jax.dot(X.astype(np.float64), w)


class WholeTest(parameterized.TestCase):
  """Through to the end."""

  def test_scan_and_map(self):
    w = stack(TRANSFORMS['permutation'])

    def f(x, w):
      rows = jax.lax.scan(lambda _, w: (None, lowbit_jax.dot(x, w)), None, w)[1]
      return rows, jax.vmap(lowbit_jax.dot, (None, 0))(x, w)

    for y in compilation.quick_jit(f)(X, w):
      assert_close(self, y, X, dense(w))

  @parameterized.named_parameters(NAMED[0], NAMED[2])
  def test_derivatives(self, transform):
    w = weight(transform, 'int4_g32')
    # Integer leaves of a transform do not move.
    moving = (0, 1, 2) if transform is TRANSFORMS['smoothing'] else (0, 1)

    def values(scale):
      return dataclasses.replace(w.weight, scale=scale)

    def packed(x, scale, transform):
      y = lowbit_jax.dot(x, Transformed(values(scale), transform, -2))
      return jnp.sum(jnp.sin(y))

    def of_dense(x, scale, transform):
      decoded = qarray.dequantize(values(scale), jnp.float32)
      y = x @ transform.inverse_dual(decoded, -2)
      return jnp.sum(jnp.sin(y))

    arguments = jnp.asarray(X), w.weight.scale, transform
    got, want = (
      compilation.quick_jit(jax.grad(f, moving))(*arguments)
      for f in (packed, of_dense)
    )
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

  def test_forward_mode(self):
    w = weight(TRANSFORMS['permutation'])
    x, tangent = jnp.asarray(X), jnp.asarray(X[::-1])
    f = lambda x: jax.jvp(lambda x: lowbit_jax.dot(x, w), (x,), (tangent,))
    y, moves = compilation.quick_jit(f)(x)
    assert_close(self, y, X, dense(w))
    assert_close(self, moves, X[::-1], dense(w))


def dense_of(w: Transformed) -> np.ndarray:
  """The dense weight as the library gives it."""
  return np.asarray(lowbit_jax.dequantize(w), np.float64)


if __name__ == '__main__':
  absltest.main()
