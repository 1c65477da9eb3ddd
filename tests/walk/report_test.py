"""What `packed` reports, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax.ops import Transformed
from tests.ops.products import assert_product, data, dense as values, make
from tests.walk import programs

K, N = 64, 12
X = data(4, K)
W = make('mxfp4', K, N)


def shapes(tree):
  return jax.eval_shape(lambda: tree)


def model(params, x, *, scale):
  """Two layers, of which the second decodes its weight."""
  with jax.named_scope('block'):
    h = jnp.tanh(x @ params['up'])
    with jax.named_scope('mlp'):
      return h @ (params['down'] * scale)


PARAMS = {'up': W, 'down': make('int4_g32', N, K, axis=-1)}
TABLE = """\
site  scope      operation    shapes                            decoded  how
up    block      dot_general  float32[4, 64] · float32[64, 12]  -        xla: scan over tiles of the weight
down  block/mlp  mul          float32[12, 64]                   3 KiB    mul has no packed form
2 uses, 1 of them decode a weight: 3 KiB"""  # noqa: E501


class ReportTest(parameterized.TestCase):
  def test_table(self):
    report = lowbit.packed(model).report(PARAMS, X, scale=2.0)
    self.assertEqual(repr(report), TABLE)
    self.assertLen(report, 2)
    self.assertEqual(report.decoded, 4 * N * K)
    self.assertEqual([row.decoded for row in report], [0, 4 * N * K])

  def test_of_shapes(self):
    report = lowbit.packed(model).report(shapes(PARAMS), shapes(X), scale=2.0)
    self.assertEqual(repr(report), TABLE)

  def test_of_no_weights(self):
    report = lowbit.packed(jnp.dot).report(X, X.T)
    self.assertEqual(repr(report), 'no use of a stored weight')
    self.assertEqual((len(report), report.decoded), (0, 0))

  def test_sizes(self):
    w = shapes(make('mxfp4', 1024, 1024))
    report = lowbit.packed(lambda w: w * 2).report(w)
    self.assertIn('1 of them decode a weight: 4 MiB', repr(report))

  def test_a_weight_that_is_used_twice(self):
    packed = lowbit.packed(lambda w, x: (x @ w, (x + 1) @ w))
    rows = packed.report(W, X)
    self.assertEqual([row.site for row in rows], ['w', 'w'])

  def test_each_decoded_use_has_a_row(self):
    report = lowbit.packed(lambda w: (w * 2, jnp.sin(w), w.T)).report(W)
    operations = [row.operation for row in report]
    self.assertEqual(operations, ['mul', 'sin', 'return'])
    self.assertEqual(report[2].how, 'the function returns it')
    self.assertEqual(report.decoded, 3 * 4 * K * N)

  @parameterized.parameters(
    (lambda w: w * 2, 'mul', 'mul has no packed form'),
    (jnp.sum, 'reduce_sum', 'reduce_sum has no packed form'),
    (jnp.argmax, 'reshape', 'its block axis is not the last of a group'),
    (lambda w: jnp.where(w[0, 0] > 0, w, 0.0), 'select_n', 'no packed form'),
    (lambda w: w.at[0].set(1.0), 'scatter', 'scatter has no packed form'),
    (lambda w: w.astype(int), 'convert_element_type', 'a cast to int'),
    (lambda w: w @ w.T, 'dot_general', 'dequantizes'),
    (
      lambda w: lax.conv(jnp.ones((1, K, 4)), w.T[:, :, None], (1,), 'VALID'),
      'conv_general_dilated',
      'conv_general_dilated has no packed form',
    ),
    (
      lambda w: jnp.ones(N, int) @ w.T.astype(jnp.bfloat16).astype(int),
      'convert_element_type',
      'a cast to int',
    ),
    (lambda w: jnp.ones((4, N)) @ w.T, 'dot_general', 'dequantizes'),
  )
  def test_reasons(self, fn, operation, reason):
    dense = [row for row in lowbit.packed(fn).report(W) if row.decoded]
    found = {row.operation: row.how for row in dense}
    self.assertIn(operation, found)
    self.assertIn(reason, found[operation])

  def test_decoded_uses_have_the_dense_value(self):
    def fn(w):
      return w * 2, w.sum(), w.at[0].set(1.0), w[8:], w

    got = jax.jit(lowbit.packed(fn))(W)
    programs.assert_same_bits(got, jax.jit(fn)(programs.dense(W)))


class SitesTest(parameterized.TestCase):
  """The path of a weight in the first argument, else with the argument."""

  def sites(self, fn, *args, **kwargs):
    return [r.site for r in lowbit.packed(fn).report(*args, **kwargs)]

  def test_of_the_first_argument(self):
    def fn(params, x):
      return x @ params['a'][0].T @ params['a'][1]['b']

    params = {'a': [make('mxfp4', 8, K, axis=-1), {'b': make('mxfp4', 8, N)}]}
    self.assertEqual(self.sites(fn, params, X), ['a/0', 'a/1/b'])

  def test_of_other_arguments(self):
    def fn(x, w, *rest, also):
      return x @ w, x @ rest[0]['v'], x @ also['u']

    found = self.sites(fn, X, W, {'v': W}, also={'u': W})
    self.assertEqual(found, ['w', '2/v', 'also/u'])

  def test_of_closures(self):
    other = make('mxfp4', K, N, seed=3)

    def fn(x):
      return jax.jit(lambda x: x @ W)(x) + x @ other, x @ W

    self.assertEqual(self.sites(fn, X), ['closure 0', 'closure 1', 'closure 0'])
    packed = jax.jit(lowbit.packed(fn))
    programs.assert_same_bits(
      packed(X),
      jax.jit(
        lambda x: (lowbit.dot(x, W) + lowbit.dot(x, other), lowbit.dot(x, W))
      )(X),
    )

  def test_of_what_is_concatenated(self):
    def fn(a, b, x):
      return x @ jnp.concatenate([a, b], axis=-1)

    self.assertEqual(self.sites(fn, W, W, X), ['a + b'])


class ArgumentsTest(parameterized.TestCase):
  def test_leaves_that_are_no_arrays(self):
    def fn(x, params, name, times, *, gain=1, on=None):
      assert (name, times, gain, on) == ('tanh', 2, 3, None)
      for _ in range(times):
        x = getattr(jnp, name)(x @ params['w']) @ params['v'].T
      return {'y': x, 'none': None}

    params = {'w': W, 'v': make('mxfp4', K, N)}
    out = lowbit.packed(fn)(X, params, 'tanh', 2, gain=3)
    self.assertEqual(out['y'].shape, X.shape)

  def test_any_callable(self):
    class Model:
      def __call__(self, x, w):
        return 2 * (x @ w)

      def method(self, x, w):
        return self(x, w)

    def times(n, x, w):
      return n * (x @ w)

    jitted = jax.jit(times, static_argnums=0)
    for fn in (
      Model(),
      Model().method,
      functools.partial(times, 2),
      functools.partial(jitted, 2),
      lowbit.packed(Model()),
    ):
      packed = lowbit.packed(fn, strict=True)
      y = jax.jit(packed)(X, W)
      assert_product(y, 'mk,kn->mn', 2 * X, values(W))

  def test_weights_by_keyword(self):
    packed = lowbit.packed(model)
    by_keyword = programs.lowered(
      lambda p, x: packed(params=p, x=x, scale=2.0), PARAMS, X
    )
    self.assertEqual(
      by_keyword,
      programs.lowered(lambda p, x: packed(p, x, scale=2.0), PARAMS, X),
    )

  def test_keeps_the_name_of_the_function(self):
    self.assertEqual(lowbit.packed(model).__name__, 'model')
    self.assertEqual(lowbit.packed(model).__doc__, model.__doc__)


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda w: {'a': w}, r"mul of the weight 'a', QArray\(mxfp4.*, in 'deep'"),
    (
      lambda w: {'t': Transformed(w, lowbit.transforms.Hadamard(32), -2)},
      r"mul of the weight 't', Transformed",
    ),
  )
  def test_strict(self, tree, message):
    def fn(params, x):
      with jax.named_scope('deep'):
        return x @ (jax.tree.leaves(params)[0] * 2)

    strict = lowbit.packed(fn, strict=True)
    message += '.*decode all of it: mul has no packed form; change this use'
    for run in (strict, jax.jit(strict)):
      with self.assertRaisesRegex(TypeError, message):
        run(tree(W), X)

  def test_strict_lets_packed_uses_pass(self):
    def fn(x, w):
      return x @ w.astype(jnp.float32)[:, ::2], jnp.take(w.T, 1, axis=0)

    strict = programs.lowered(lowbit.packed(fn, strict=True), X, W)
    self.assertEqual(strict, programs.lowered(lowbit.packed(fn), X, W))

  def test_strict_refuses_in_a_scan(self):
    def fn(x, w):
      return lax.scan(lambda c, _: (c @ (w + 1) @ w.T, None), x, None, 2)[0]

    with self.assertRaisesRegex(TypeError, "add of the weight 'w'"):
      lowbit.packed(fn, strict=True)(X, W)

  @parameterized.parameters(3, None, 'name')
  def test_no_function(self, fn):
    with self.assertRaisesRegex(TypeError, f'fn={fn!r} must be a function'):
      lowbit.packed(fn)

  def test_strict_is_a_bool(self):
    with self.assertRaisesRegex(TypeError, "strict='yes' must be a bool"):
      lowbit.packed(model, strict='yes')

  def test_two_weights_with_one_path(self):
    params = {'a': {'b': W}, 'a/b': W}
    with self.assertRaisesRegex(ValueError, "two weights have the site 'a/b'"):
      lowbit.packed(lambda params: params['a']['b'] * 1)(params)

  def test_a_tracer_that_is_kept(self):
    kept = []

    def fn(x, w):
      kept.append(w)
      return x @ kept[0]

    packed = lowbit.packed(fn)
    packed(X, W)
    with self.assertRaises(jax.errors.UnexpectedTracerError) as caught:
      packed(X, W)
    self.assertIn("place of its weights ['w']", caught.exception.__notes__[-1])

  def test_a_static_weight(self):
    packed = lowbit.packed(lambda x, w: x @ w)
    with self.assertRaisesRegex((TypeError, ValueError), '(?i)hash'):
      jax.jit(packed, static_argnums=1)(X, W)

  def test_errors_of_the_function_are_its_own(self):
    with self.assertRaisesRegex(TypeError, 'dot_general requires contracting'):
      lowbit.packed(lambda x, w: x @ w.T)(X, W)
    with self.assertRaisesRegex(KeyError, 'missing'):
      lowbit.packed(lambda params: params['missing'])({'w': W})


if __name__ == '__main__':
  absltest.main()
