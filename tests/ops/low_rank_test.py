"""Products with weights that have a low-rank term.

The oracle is the float64 product of the dense weight: of the dequantized one
and the factors. A float32 sum of k products is within (k + 8) 2^-24 of it,
relative to the sum of the absolute products; the small products sum twice, over
k numbers and over the rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import ops, transforms
from lowbit_jax.ops import LowRank, Transformed, _dot, _low_rank, _ragged
from tests import compilation
from tests.ops import products

K, N, R = 64, 8, 3
SCALE = 0.5
X = products.data(3, K)
BFLOAT16 = jnp.bfloat16


def beside(weight, inputs=(-2,), outputs=(-1,), scale=SCALE) -> LowRank:
  """A weight with random factors."""
  shape = weight.shape

  def factor(away, seed):
    sizes = [1 if d - len(shape) in away else n for d, n in enumerate(shape)]
    return products.data(*sizes, R, seed=seed)

  return LowRank(weight, factor(outputs, 5), factor(inputs, 6), scale)


def packed(*shape, axis=-2):
  return products.make('mxfp4', *(shape or (K, N)), axis=axis)


def behind() -> Transformed:
  order = np.random.RandomState(0).permutation(K)
  return Transformed(packed(), transforms.Permutation(order), -2)


WEIGHTS = {
  'array': products.data(K, N, seed=7),
  'packed': packed(),
  'behind': behind(),
}


def dense(w: LowRank, f=lambda x: x) -> np.ndarray:
  """The weight in float64, of f of its parts."""
  weight, a, b = (f(np.asarray(x, np.float64)) for x in (w.weight, w.a, w.b))
  return weight + abs(w.scale) * np.sum(a * b, -1)


def assert_product(test, y, subscripts: str, lhs, rhs):
  """y is the product of operands, of which some are LowRank."""

  def product(f):
    values = (
      dense(x, f) if isinstance(x, LowRank) else f(np.asarray(x, np.float64))
      for x in (lhs, rhs)
    )
    return np.einsum(subscripts, *values)

  want = product(lambda x: x)
  terms = K * lhs.ndim * rhs.ndim  # at most so many are summed
  bound = (terms + R + 16) * products.U * product(np.abs)
  test.assertEqual(np.shape(y), want.shape)
  test.assertTrue((np.abs(np.asarray(y, np.float64) - want) <= bound).all())


class ValueTest(parameterized.TestCase):
  @parameterized.named_parameters(WEIGHTS.items())
  def test_dense_value(self, weight):
    w = beside(weight)
    got = lowbit_jax.dequantize(w)
    self.assertEqual((got.shape, got.dtype), ((K, N), np.float32))
    bound = (R + 3) * products.U * dense(w, np.abs)
    error = np.abs(np.asarray(got, np.float64) - dense(w))
    self.assertTrue((error <= bound).all())
    for same in (jnp.asarray(w), np.asarray(w), w + 0.0):
      np.testing.assert_array_equal(got, same)
    self.assertEqual(lowbit_jax.dequantize(w, BFLOAT16).dtype, 'bfloat16')
    self.assertEqual(w.astype(BFLOAT16).dtype, 'bfloat16')

  def test_views(self):
    w = beside(packed(3, K, N))
    whole = dense(w)
    for view, expected in (
      (w.T, whole.T),
      (w.mT, whole.mT),
      (w[1], whole[1]),
      (w[-1, :, 2], whole[-1, :, 2]),
      (w[..., 2:5], whole[..., 2:5]),
      (w[1:, 32:], whole[1:, 32:]),
      (w[np.array([2, 0])], whole[[2, 0]]),
      (w[np.array([2, 0]), :, 5], whole[[2, 0], :, 5]),
    ):
      self.assertIsInstance(view, LowRank)
      np.testing.assert_array_equal(dense(view), expected)
    self.assertEqual((w.size, len(w), w.ndim), (whole.size, 3, 3))
    self.assertEqual((w.rank, w.dtype), (R, np.float32))
    self.assertLen(list(beside(WEIGHTS['array'])), K)
    self.assertEqual(w.nbytes, w.weight.nbytes + 4 * R * 3 * (K + N))
    self.assertStartsWith(repr(w), 'LowRank(QArray(mxfp4, shape=(3, 64, 8)')
    self.assertEqual(
      repr(beside(WEIGHTS['array'])),
      'LowRank(Array(float32, shape=(64, 8)), rank=3, scale=0.5)',
    )
    with self.assertRaisesRegex(IndexError, 'single elements of block axis'):
      w[0, 3]
    with self.assertRaisesRegex(IndexError, 'must be an int, a slice'):
      beside(WEIGHTS['array'])[np.ones(K, bool)]

  def test_wrong_arguments(self):
    q = packed()
    a, b = products.data(K, 1, R), products.data(1, N, R)
    prepacked = jax.eval_shape(
      lambda q: lowbit_jax.prepack(q, implementation='tpu'), q
    )
    for arguments, error, message in (
      (('w', a, b), TypeError, 'weight must be .* got str'),
      ((prepacked, a, b), TypeError, 'weight must be .* got Prepacked'),
      ((np.arange(3), a, b), TypeError, 'weight must be a float array'),
      ((q, a.tolist(), b), TypeError, 'a must be a float array, got list'),
      ((q, a, np.ones((1, N, R), int)), TypeError, 'b must be a float array'),
      ((q, a, b, '1'), TypeError, "scale='1' must be a Python number"),
      ((q, a[:, 0], b), ValueError, r'a.shape=\(64, 3\) must have the axes'),
      ((q, a, b[..., :2]), ValueError, 'must agree in the rank'),
      ((q, a[:32], b), ValueError, r'a.shape=\(32, 1, 3\) and .* size or 1'),
      ((q, a[:1], b), ValueError, 'one of them its size'),
    ):
      with self.assertRaisesRegex(error, message):
        LowRank(*arguments)

  def test_stacks(self):
    members = [beside(packed()), beside(products.make('mxfp4', K, N, seed=2))]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    self.assertEqual(w.shape, (2, K, N))

    def f(x, w):
      rows = jax.lax.scan(lambda _, w: (None, lowbit_jax.dot(x, w)), None, w)[1]
      return rows, jax.vmap(lowbit_jax.dot, (None, 0))(x, w)

    for y in compilation.quick_jit(f)(X, w):
      assert_product(self, y, 'mk,gkn->gmn', X, w)


# Subscripts, axes of inputs and outputs, and shapes.
APART = (
  ('mk,kn->mn', (-2,), (-1,), (3, K), (K, N)),
  ('mn,kn->mk', (-2,), (-1,), (3, N), (K, N)),
  ('amk,kn->nam', (-2,), (-1,), (2, 3, K), (K, N)),
  ('gmk,gkn->gmn', (-2,), (-1,), (2, 3, K), (2, K, N)),
  ('mkg,gkn->mgn', (-2,), (-1,), (3, K, 2), (2, K, N)),
  ('mk,khs->mhs', (-3,), (-2, -1), (3, K), (K, 2, N)),
  ('mhs,khs->mk', (-3,), (-2, -1), (3, 2, N), (K, 2, N)),
  ('mhk,hkn->mn', (-3, -2), (-1,), (3, 2, K), (2, K, N)),
  ('k,kn->n', (-2,), (-1,), (K,), (K, 1)),
)
# The factors do not go beside these products.
TOGETHER = (
  ('mk,gkn->gmn', (-2,), (-1,), (3, K), (2, K, N)),
  ('kn,kn->', (-2,), (-1,), (K, N), (K, N)),
  ('mg,gkn->mkn', (-2,), (-1,), (3, 2), (2, K, N)),
  ('mk,hkn->hmn', (-3, -2), (-1,), (3, K), (2, K, N)),
)


class ProductTest(parameterized.TestCase):
  def test_products(self):
    cases = []
    for subscripts, inputs, outputs, left, right in APART + TOGETHER:
      axis = inputs[-1]
      w = beside(packed(*right, axis=axis), inputs, outputs)
      cases.append((subscripts, products.data(*left), w))
      terms, output = subscripts.split('->')
      lhs, rhs = terms.split(',')
      cases.append((f'{rhs},{lhs}->{output}', w, products.data(*left)))

    def run(operands):
      return [
        lowbit_jax.einsum(case[0], *pair)
        for case, pair in zip(cases, operands, strict=True)
      ]

    operands = [case[1:] for case in cases]
    ys = compilation.quick_jit(run)(operands)
    for y, case in zip(ys, cases, strict=True):
      with self.subTest(case[0]):
        assert_product(self, y, *case)

  @parameterized.parameters(
    *((*case, True) for case in APART), *((*case, False) for case in TOGETHER)
  )
  def test_weights_stay_packed(self, subscripts, *case):
    inputs, outputs, left, right, apart = case
    w = beside(packed(*right, axis=inputs[-1]), inputs, outputs)
    x = products.data(*left)
    dims, _ = _dot.einsum_dims(subscripts, x.ndim, w.ndim)
    _, weight = _low_rank.large(x, w, 1, dims)
    self.assertEqual(weight is w.weight, apart)
    if apart:
      plain = lowbit_jax.select_implementation('einsum', subscripts, x, weight)
      shapes = jax.eval_shape(lambda: (x, w))
      for operands in ((x, w), shapes):
        choice = lowbit_jax.select_implementation(
          'einsum', subscripts, *operands
        )
        self.assertEqual(choice, plain)

  def test_the_term_is_never_made(self):
    def sizes(w):
      program = str(jax.make_jaxpr(lambda x: lowbit_jax.dot(x, w))(X))
      return program.count(f'f32[{K},{N}]')

    w = beside(packed())
    self.assertEqual(sizes(w), sizes(w.weight))

  @parameterized.named_parameters(WEIGHTS.items())
  def test_kinds_of_weights(self, weight):
    w = beside(weight)
    assert_product(self, lowbit_jax.dot(X, w), 'mk,kn->mn', X, w)

  def test_two_stored_operands(self):
    q = packed(3, K, axis=-1)
    w, v = beside(packed()), beside(packed(3, K, axis=-1), (-1,), (-2,))
    for lhs in (q, v):
      y = lowbit_jax.dot(lhs, w)
      assert_product(self, y, 'mk,kn->mn', lhs, w)

  @parameterized.parameters(
    ('float32', 'mxfp4', lowbit_jax.dot),
    ('float32', 'mxfp4', jax.jit(lowbit_jax.dot)),
    ('bfloat16', 'int8_channel', lowbit_jax.dot),
  )
  def test_zero_factors_leave_the_bits(self, dtype, fmt, dot):
    x, weight = jnp.asarray(X, dtype), products.make(fmt, K, N).astype(dtype)
    w = LowRank(weight, products.data(K, 1, R), np.zeros((1, N, R), 'f'))
    got, plain = dot(x, w), dot(x, weight)
    self.assertEqual(got.dtype, dtype)
    bits = (np.asarray(y).view(f'u{y.dtype.itemsize}') for y in (got, plain))
    np.testing.assert_array_equal(*bits)

  def test_small_products_are_in_float32(self):
    """In bfloat16 operands, a sum in it would be far off."""
    x = jnp.ones((1, 512), BFLOAT16)
    w = LowRank(
      jnp.zeros((512, 1), BFLOAT16),
      jnp.full((512, 1, 2), 1.0, BFLOAT16),
      jnp.array([[[1.0, -1.0]]], BFLOAT16),
    )
    a = w.a.at[0, 0, 0].set(1.0078125)  # the next bfloat16
    y = lowbit_jax.dot(
      x, LowRank(w.weight, a, w.b), preferred_element_type=jnp.float32
    )
    self.assertEqual(float(y[0, 0]), 0.0078125)

  def test_dtypes(self):
    w = beside(packed())
    narrow = X.astype(BFLOAT16)
    for x, v, kwargs, expected in (
      (X, w, {}, 'float32'),
      (narrow, w, {}, 'float32'),
      (narrow, w.astype(BFLOAT16), {}, 'bfloat16'),
      (X, w, {'preferred_element_type': jnp.float16}, 'float16'),
    ):
      f = lambda x, w, kwargs=kwargs: lowbit_jax.dot(x, w, **kwargs)
      self.assertEqual(jax.eval_shape(f, x, v).dtype, expected)
    with jax.enable_x64(True):
      with self.assertRaisesRegex(TypeError, 'float64'):
        lowbit_jax.dot(X.astype(np.float64), w)
      x, v = X.astype(np.float64), beside(WEIGHTS['array'].astype(np.float64))
      y = lowbit_jax.dot(x, v)
      np.testing.assert_allclose(y, x @ dense(v), rtol=1e-12, atol=1e-12)

  def test_wrong_products(self):
    w = beside(packed())
    with self.assertRaisesRegex(ValueError, r'contracting axes .*\(64, 8\)'):
      lowbit_jax.dot(X[:, :5], w)
    with self.assertRaisesRegex(ValueError, "implementation='none'"):
      lowbit_jax.dot(X, w, implementation='none')
    with self.assertRaisesRegex(TypeError, 'QArray, got LowRank'):
      lowbit_jax.prepack(w, implementation='tpu')


class RaggedTest(absltest.TestCase):
  def test_rows_by_group(self):
    sizes = np.array([2, 0, 3])
    x, w = products.data(6, K), beside(packed(3, K, N))
    exchanged = beside(packed(3, N, K, axis=-1), (-1,), (-2,))
    shared = LowRank(w.weight, w.a[:1], w.b, SCALE)

    def run(x, w, other, shared):
      return (
        lowbit_jax.ragged_dot(x, w, sizes),
        lowbit_jax.ragged_dot(x, other.mT, sizes),
        lowbit_jax.ragged_dot(x, shared, sizes),
      )

    ys = compilation.quick_jit(run)(x, w, exchanged, shared)
    for y, v in zip(ys, (w, exchanged.mT, shared), strict=True):
      leaves = [np.asarray(leaf) for leaf in (v.weight, v.a, v.b)]
      for rows, group in ((slice(0, 2), 0), (slice(2, 5), 2)):
        member = LowRank(*(leaf[group % len(leaf)] for leaf in leaves), SCALE)
        assert_product(self, y[rows], 'mk,kn->mn', x[rows], member)
      self.assertFalse(np.any(y[5:]))

  def test_what_stays_packed(self):
    sizes, x = np.array([2, 0, 3]), products.data(6, K)
    w = beside(packed(3, K, N))
    self.assertIs(_ragged.operands(x, w, sizes)[1], w.weight)
    plain = lowbit_jax.select_implementation('ragged_dot', x, w.weight, sizes)
    self.assertEqual(
      lowbit_jax.select_implementation('ragged_dot', x, w, sizes), plain
    )
    # A term over the groups is none of the rows: the dense value.
    across = beside(packed(3, K, N), (-3,), (-2, -1))
    _, right, *_ = _ragged.operands(x, across, sizes)
    np.testing.assert_array_equal(right, lowbit_jax.dequantize(across))
    rows = beside(packed(6, K, axis=-1), (-1,), (-2,))
    left, right, *_ = _ragged.operands(rows, w, sizes)
    np.testing.assert_array_equal(left, lowbit_jax.dequantize(rows))
    self.assertIs(right, w.weight)
    with self.assertRaisesRegex(ValueError, r'must be \(m, k\) and'):
      lowbit_jax.ragged_dot(x, beside(packed()), sizes)


class DerivativeTest(absltest.TestCase):
  def test_gradients(self):
    q, sizes = packed(2, K, N), np.array([1, 2])
    w = beside(q)

    def loss(product):
      def f(x, a, b):
        y = product(x, LowRank(q, a, b, SCALE))
        return jnp.sum(jnp.sin(y))

      return jax.grad(f, (0, 1, 2))

    def of_dense(subscripts):
      return lambda x, w: jnp.einsum(subscripts, x, lowbit_jax.dequantize(w))

    def ragged(x, w):
      return lowbit_jax.ragged_dot(x, w, sizes)

    def of_rows(x, w):
      w = lowbit_jax.dequantize(w)
      return jnp.concatenate([x[:1] @ w[0], x[1:] @ w[1]])

    batch = 'gmk,gkn->gmn'
    einsum = lambda x, w: lowbit_jax.einsum(batch, x, w)
    x = products.data(2, 3, K)

    def run(x, a, b):
      return [
        (loss(einsum)(x, a, b), loss(of_dense(batch))(x, a, b)),
        (loss(ragged)(x[0], a, b), loss(of_rows)(x[0], a, b)),
      ]

    # Sines of sums of 64 products of about one: their last digits, times the
    # sums of |a| |b| that derivatives go through.
    for got, want in compilation.quick_jit(run)(x, w.a, w.b):
      for u, v in zip(got, want, strict=True):
        self.assertGreater(np.abs(v).max(), 0.1)
        np.testing.assert_allclose(u, v, rtol=0, atol=2e-4)

  def test_forward_mode(self):
    w = beside(packed())
    tangent = w.a[::-1]

    def f(a):
      return lowbit_jax.dot(X, LowRank(w.weight, a, w.b, SCALE))

    run = compilation.quick_jit(lambda a: jax.jvp(f, (a,), (tangent,))[1])
    zero = LowRank(np.zeros((K, N), np.float32), tangent, w.b, SCALE)
    assert_product(self, run(w.a), 'mk,kn->mn', X, zero)


class TakeTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('packed', packed(N, K, axis=-1)),
    ('array', products.data(N, K)),
    ('columns', products.make('mxfp4', N, K, axis=-2)),
  )
  def test_rows(self, weight):
    table = beside(weight, (-1,), (-2,))
    ids = np.array([[3, 0], [7, N]])
    rows = np.asarray(ops.take(table, ids))
    self.assertEqual(rows.shape, (2, 2, K))
    self.assertTrue(np.isnan(rows[1, 1]).all())
    bound = (R + 3) * products.U * dense(table, np.abs)
    for k, n in ((0, 3), (1, 0), (2, 7)):
      error = np.abs(rows.reshape(4, K)[k] - dense(table)[n])
      self.assertTrue((error <= bound[n]).all())


if __name__ == '__main__':
  absltest.main()
