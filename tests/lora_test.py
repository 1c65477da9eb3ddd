"""Low-rank adapters: made, attached, trained, merged, saved."""

import os
import tempfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats, io, lora, nn, testing, transforms
from lowbit_jax.io import gguf, safetensors
from lowbit_jax.lora import Adapter
from lowbit_jax.nn import nnx as lowbit_nnx
from lowbit_jax.ops import LowRank, Transformed
from lowbit_jax.training import optimizers
from tests import compilation
from tests.ops import products

K, N = 64, 8
U = products.U
KEY = jax.random.key(0)
ORDER = transforms.Permutation(np.random.RandomState(0).permutation(K))


def trained(adapters, seed: int = 3):
  """Adapters with random numbers in place of zeros."""
  return {
    path: Adapter(x.a, 0.1 * products.data(*x.b.shape, seed=seed + i), x.scale)
    for i, (path, x) in enumerate(adapters.items())
  }


def params():
  """Weights of all kinds, and others."""
  return {
    'up': {'kernel': products.make('mxfp4', K, N), 'bias': np.ones(N, 'f')},
    'down': {'kernel': products.data(K, N)},
    'act_order': Transformed(products.make('int8_g32', K, N), ORDER, -2),
    'steps': np.int32(3),
  }


def attached():
  adapters = lora.init(KEY, params(), 'kernel|act_order', rank=3, alpha=6)
  return lora.attach(params(), trained(adapters))


def term(x) -> np.ndarray:
  """What factors add to a weight, in float64."""
  a, b = (np.asarray(factor, np.float64) for factor in (x.a, x.b))
  return x.scale * np.sum(a * b, -1)


class InitTest(parameterized.TestCase):
  @parameterized.parameters(
    # The names of Flax, also where layers are stacked.
    ('up/kernel', (K, N), -2, None, (K, 1), (1, N)),
    ('conv_1/kernel', (3, 4, K, N), -2, None, (3, 4, K, 1), (1, 1, 1, N)),
    ('embedding', (N, K), -1, None, (1, K), (N, 1)),
    ('mlp/kernel', (5, K, N), -2, 'mlp', (5, K, 1), (5, 1, N)),
    # Others: where blocks lie, and the axis behind them or in front.
    ('w', (K, N), -2, None, (K, 1), (1, N)),
    ('w', (N, K), -1, None, (1, K), (N, 1)),
    ('w', (K, 2, N), -3, None, (K, 1, 1), (1, 2, N)),
    ('w', (2, 8, N), (-3, -2), None, (2, 8, 1), (1, 1, N)),
    ('w', (5, K, N), -2, None, (5, K, 1), (5, 1, N)),
    ('w', (5, N, K), -1, None, (5, 1, K), (5, N, 1)),
    ('w', (2, 5, K, N), None, None, (2, 5, K, 1), (2, 5, 1, N)),
  )
  def test_factors_have_the_axes_of_the_weight(
    self, path, shape, axis, stacked, a, b
  ):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    if axis is not None:
      quantize = lambda w: lowbit.quantize(w, formats.int4_g32, axis=axis)
      w = jax.eval_shape(quantize, w)
    tree = {path: w}
    init = lambda key: lora.init(key, tree, path, rank=2, stacked=stacked)
    adapter = jax.eval_shape(init, KEY)[path]
    self.assertEqual(adapter.a.shape, (*a, 2))
    self.assertEqual(adapter.b.shape, (*b, 2))

  def test_attention_of_flax(self):
    kernels = {
      **{n: (5, K, 2, 4) for n in ('query', 'key', 'value')},
      'out': (5, 2, 4, K),
    }
    tree = {
      'attention': {
        n: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
        for n, shape in kernels.items()
      }
    }
    init = lambda key: lora.init(key, tree, 'kernel', rank=2, stacked='att')
    adapters = jax.eval_shape(init, KEY)
    shapes = {n: x.a.shape for n, x in adapters.items()}
    self.assertEqual(shapes['attention/query/kernel'], (5, K, 1, 1, 2))
    self.assertEqual(shapes['attention/out/kernel'], (5, 2, 4, 1, 2))
    b = adapters['attention/out/kernel'].b
    self.assertEqual(b.shape, (5, 1, 1, K, 2))

  def test_numbers(self):
    tree = {'a': products.data(256, N), 'b': products.data(256, N)}
    adapters = lora.init(KEY, tree, '', rank=16, alpha=4)
    a, b = adapters['a'], adapters['b']
    self.assertEqual((a.scale, a.a.dtype), (0.25, 'float32'))
    self.assertFalse(np.any(a.b))
    # Uniform within 1/16: the mean of 4096 squares is 1/768 within 5 sigma,
    # which is (4/45)^(1/2) / 64 of the square of the bound.
    self.assertLessEqual(np.abs(a.a).max(), 1 / 16)
    error = np.mean(np.square(a.a)) * 256 - 1 / 3
    self.assertLess(abs(error), 5 * np.sqrt(4 / 45) / 64)
    self.assertFalse(np.any(np.asarray(a.a) == np.asarray(b.a)))
    again = lora.init(KEY, tree, 'b', rank=16)['b']
    np.testing.assert_array_equal(again.a, b.a)
    self.assertEqual(again.scale, 1.0)

  def test_selection(self):
    tree = params()
    self.assertCountEqual(lora.init(KEY, tree), ['up/kernel', 'act_order'])
    by_name = lora.init(KEY, tree, r'down/kernel$')
    self.assertCountEqual(by_name, ['down/kernel'])
    found = lora.init(KEY, tree, lambda path, w: w.shape == (K, N))
    self.assertLen(found, 3)

  def test_errors(self):
    tree = params()
    for arguments, kwargs, error, message in (
      (('nothing',), {}, ValueError, "select='nothing' selects none .*up/bias"),
      (('bias',), {}, ValueError, "'up/bias' with shape .* no inputs"),
      (('steps',), {}, TypeError, "'steps' is int32; adapters go beside float"),
      ((3,), {}, TypeError, 'select=3 must be a regular expression'),
      ((), {'rank': 0}, ValueError, 'rank=0 must be an int of 1 or more'),
      ((), {'rank': 2.0}, ValueError, 'rank=2.0 must be an int'),
      ((), {'alpha': '1'}, TypeError, "alpha='1' must be a Python number"),
      ((), {'stacked': 1}, TypeError, 'stacked=1 must be a regular'),
    ):
      with self.assertRaisesRegex(error, message):
        lora.init(KEY, tree, *arguments, **kwargs)
    with self.assertRaisesRegex(ValueError, "'up/kernel' has an adapter"):
      lora.init(KEY, attached(), 'up/kernel')


class AttachTest(absltest.TestCase):
  def test_leaves(self):
    tree, got = params(), attached()
    for path in (('up', 'kernel'), ('down', 'kernel'), ('act_order',)):
      weight, w = tree, got
      for key in path:
        weight, w = weight[key], w[key]
      self.assertIsInstance(w, LowRank)
      self.assertEqual((w.rank, w.scale), (3, 2.0))
    self.assertEqual(got['steps'], 3)

  def test_errors(self):
    tree = params()
    adapters = lora.init(KEY, tree)
    x = adapters['up/kernel']
    for new, error, message in (
      ({'up/kernels': x}, ValueError, "no leaf 'up/kernels' .* up/kernel"),
      ({'up/kernel': (x.a, x.b)}, TypeError, r"'up/kernel'\] is a tuple"),
      ({'up/kernel': Adapter(x.b, x.b)}, ValueError, "of 'up/kernel' does not"),
      ({'up/bias': x}, ValueError, "of 'up/bias' does not fit: a.shape"),
      ({'steps': x}, TypeError, "'steps' is int32"),
    ):
      with self.assertRaisesRegex(error, message):
        lora.attach(tree, new)
    with self.assertRaisesRegex(ValueError, 'adapter already: lora.merge'):
      lora.attach(attached(), adapters)


class TrainingTest(absltest.TestCase):
  def test_only_adapters_train(self):
    tree = params()
    before = jax.tree.map(np.array, tree)
    adapters = lora.init(KEY, tree, 'kernel|act_order', rank=2)
    tx = optax.adam(0.01)
    x, target = products.data(16, K), products.data(16, N)

    def loss(adapters, tree):
      tree = lora.attach(tree, adapters)
      y = lowbit.dot(x, tree['up']['kernel']) + tree['up']['bias']
      y = y + lowbit.dot(x, tree['down']['kernel'])
      return jnp.mean((y + lowbit.dot(x, tree['act_order']) - target) ** 2)

    @compilation.quick_jit
    def train(adapters, tree):
      def step(carry, _):
        adapters, state = carry
        value, grads = jax.value_and_grad(loss)(adapters, tree)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(adapters, updates), state), value

      carry = adapters, tx.init(adapters)
      (adapters, _), losses = jax.lax.scan(step, carry, length=30)
      return adapters, tree, losses

    new, after, losses = train(adapters, tree)
    self.assertLess(losses[-1], 0.8 * losses[0])
    testing.assert_trees_bits_equal(after, before)
    self.assertEqual(jax.tree.structure(new), jax.tree.structure(adapters))
    for path, x in new.items():
      self.assertTrue(np.all(np.any(x.a != adapters[path].a)), path)
      self.assertTrue(np.all(x.b != 0), path)

  def test_trainable_half(self):
    tree = attached()
    trainable, frozen = lowbit.partition(tree)
    x = products.data(2, K)

    def loss(trainable):
      tree = lowbit.combine(trainable, frozen)
      y = lowbit.dot(x, tree['up']['kernel']) + tree['up']['bias']
      return jnp.sum(y + lowbit.dot(x, tree['down']['kernel']))

    grads = compilation.quick_jit(jax.grad(loss))(trainable)
    for part in (grads['up']['kernel'], grads['down']['kernel']):
      self.assertIsNone(part.weight)
      self.assertTrue(np.any(part.a) and np.any(part.b))
    self.assertIsNone(grads['steps'])
    self.assertFalse(np.any(grads['act_order'].a))
    joined = lowbit.combine(trainable, frozen)
    self.assertEqual(jax.tree.structure(joined), jax.tree.structure(tree))
    jax.tree.map(self.assertIs, joined, tree)
    # The scales of a QArray beside the factors, but no array.
    trainable, frozen = lowbit.partition(tree, scales=True)
    self.assertIsNotNone(trainable['act_order'].weight.weight.scale)
    self.assertIsNone(trainable['down']['kernel'].weight)
    jax.tree.map(self.assertIs, lowbit.combine(trainable, frozen), tree)

  def test_other_optimizers(self):
    tree = attached()
    mask = nn.trainable_mask(tree)
    for w in (mask['up']['kernel'], mask['down']['kernel']):
      self.assertEqual((w.weight, w.a, w.b), (False, True, True))
    self.assertEqual((mask['up']['bias'], mask['steps']), (True, False))
    trainable, _ = lowbit.partition(tree)
    updates = jax.tree.map(jnp.ones_like, trainable)
    new = optimizers.apply_updates(tree, updates)
    w, old = new['down']['kernel'], tree['down']['kernel']
    self.assertIs(w.weight, old.weight)
    np.testing.assert_array_equal(w.a, old.a + 1)
    self.assertIs(new['up']['kernel'].weight, tree['up']['kernel'].weight)


class MergeTest(parameterized.TestCase):
  def test_arrays(self):
    w = products.data(2, K, N)
    for dtype, unit in (('float32', U), ('bfloat16', 2.0**-8)):
      tree = {'w': jnp.asarray(w, dtype)}
      adapters = trained(lora.init(KEY, tree, 'w', rank=3, alpha=6))
      got = lora.merge(tree, adapters)['w']
      self.assertEqual(got.dtype, dtype)
      x = adapters['w']
      want = np.asarray(tree['w'], np.float64) + term(x)
      parts = np.abs(tree['w']) + term(Adapter(abs(x.a), abs(x.b), x.scale))
      bound = unit * np.abs(want) + 6 * U * parts
      error = np.abs(np.asarray(got, np.float64) - want)
      self.assertTrue((error <= bound).all())

  @parameterized.parameters(
    ('mxfp4', (K, N), -2),
    ('uint4_g32', (N, K), -1),
    ('int8_g32', (2, 16, N), (-3, -2)),
    ('mxfp4_32x32', (K, 32), (-2, -1)),
  )
  def test_quantized(self, fmt, shape, axis):
    fmt = formats.get(fmt)
    q = lowbit.quantize(products.data(*shape), fmt, axis=axis)
    q = q.astype(jnp.bfloat16)
    adapters = trained(lora.init(KEY, {'w': q}, rank=3))
    got = lora.merge({'w': q}, adapters)['w']
    whole = np.asarray(lowbit.dequantize(q, jnp.float32), np.float64)
    whole = np.float32(whole + term(adapters['w']))
    want = lowbit.quantize(whole, fmt, axis=axis).astype(jnp.bfloat16)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
    # The sums are in float32 there: another rounding of a tie may differ.
    a, b = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    self.assertGreater(np.mean(a == b), 0.99)
    self.assertLess(np.abs(a - whole).max(), np.abs(b - whole).max() * 1.01)

  def test_stacks_keep_their_tensor_scales(self):
    w = products.data(3, K, N) * np.array([1, 10, 100], 'f')[:, None, None]
    quantize = lambda w: lowbit.quantize(w, formats.nvfp4, axis=-2)
    q = jax.vmap(quantize)(w)
    adapters = trained(lora.init(KEY, {'w': q}, rank=3))
    merge = lambda q: lora.merge({'w': q}, adapters)['w']
    got = compilation.quick_jit(merge)(q)
    shapes = ([leaf.shape for leaf in jax.tree.leaves(x)] for x in (got, q))
    self.assertEqual(*shapes)
    one = {'w': jax.tree.map(lambda leaf: leaf[1], adapters['w'])}
    alone = lora.merge({'w': q[1]}, one)['w']
    np.testing.assert_array_equal(got[1], alone)

  def test_behind_a_transform(self):
    smoothing = transforms.DiagonalSmoothing(
      np.random.RandomState(1).uniform(0.5, 2, K).astype('f')
    )
    tree = {'w': Transformed(products.make('int8_g32', K, N), smoothing, -2)}
    adapters = trained(lora.init(KEY, tree, rank=3))
    got = lora.merge(tree, adapters)['w']
    self.assertIsInstance(got, Transformed)
    want = np.asarray(tree['w'], np.float64) + term(adapters['w'])
    # Half a step of int8 in each block of 32, behind the smoothing.
    dual = np.abs(smoothing.apply_dual(np.float32(want), -2))
    step = dual.reshape(2, 32, N).max(1, keepdims=True) / 127
    error = np.abs(smoothing.apply_dual(np.asarray(got) - np.float32(want), -2))
    self.assertTrue((error.reshape(2, 32, N) <= 0.51 * step).all())

  def test_what_was_attached(self):
    tree = params()
    adapters = trained(lora.init(KEY, tree, 'kernel', rank=3))
    merged = lora.merge(lora.attach(tree, adapters))
    testing.assert_trees_bits_equal(merged, lora.merge(tree, adapters))
    self.assertIs(merged['act_order'], tree['act_order'])

  def test_scale_rules(self):
    tree = {'w': lowbit.quantize(products.data(K, N), formats.mxfp4, axis=-2)}
    adapters = trained(lora.init(KEY, tree))
    got = lora.merge(tree, adapters, scale_rule='rceil')['w']
    whole = lowbit.dequantize(lora.attach(tree, adapters)['w'])
    want = lowbit.quantize(whole, formats.mxfp4, axis=-2, scale_rule='rceil')
    np.testing.assert_array_equal(got.scale, want.scale)
    with self.assertRaisesRegex(ValueError, "scale_rule='none'") as caught:
      lora.merge(tree, adapters, scale_rule='none')
    self.assertIn("This is the parameter 'w'.", caught.exception.__notes__)


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.path = os.path.join(directory.name, 'adapters')

  def test_save_and_load(self):
    adapters = trained(lora.init(KEY, params(), rank=2, alpha=3))
    tree = {'adapters': adapters, 'params': attached()}
    io.save(self.path, tree)
    after = io.load(self.path)
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(tree))
    testing.assert_trees_bits_equal(after, tree)
    for half in lowbit.partition(attached()['up']['kernel']):
      with self.assertRaisesRegex(TypeError, 'tree: .* got NoneType'):
        io.save(self.path, half, overwrite=True)

  def test_other_files(self):
    w = attached()['down']['kernel']
    with self.assertRaisesRegex(TypeError, "'w' is LowRank.*lora.merge"):
      safetensors.save(self.path, {'w': w})
    with self.assertRaisesRegex(TypeError, "'w.weight' is LowRank"):
      safetensors.export(self.path, {'w.weight': w})
    with self.assertRaisesRegex(TypeError, 'is a LowRank, and no array'):
      gguf.save(self.path, {'w': w})

  def test_flax_serialization(self):
    tree = {'w': attached()['down'], 'adapters': lora.init(KEY, params())}
    data = flax.serialization.to_bytes(tree)
    target = jax.tree.map(jnp.zeros_like, tree)
    after = flax.serialization.from_bytes(target, data)
    testing.assert_trees_bits_equal(after, tree)

  def test_exported_programs(self):
    w, x = attached()['up']['kernel'], products.data(2, K)
    exported = jax.export.export(jax.jit(lowbit.dot))(x, w)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(x, w), lowbit.dot(x, w))


class ModulesTest(absltest.TestCase):
  def test_linen(self):
    model, x = linen.Dense(N), products.data(3, K)
    tree = model.init(KEY, x)
    tree = nn.quantize_params(tree, None, formats.mxfp4)
    adapters = trained(lora.init(KEY, tree))
    w = lora.attach(tree, adapters)
    kernel = w['params']['kernel']
    no_bias = linen.Dense(N, use_bias=False)
    packed = lowbit.packed(no_bias.apply, strict=True)
    y = packed({'params': {'kernel': kernel}}, x)
    np.testing.assert_array_equal(y, lowbit.dot(x, kernel))
    y = model.apply(w, x)  # decodes it
    np.testing.assert_allclose(y, x @ np.asarray(kernel), rtol=1e-5, atol=1e-5)
    box = linen.Partitioned(kernel, (None, 'model'))
    self.assertIs(nn.unbox({'a': box})['a'], kernel)
    with self.assertRaisesRegex(ValueError, 'kernel.* quantize the weight'):
      nn.quantize_params(w, None, formats.mxfp4)

  def test_nnx_refuses_them(self):
    model = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(TypeError, "'kernel' is LowRank.*lora.merge"):
      lowbit_nnx.assign(model, {'kernel': attached()['down']['kernel']})

  def test_shardings(self):
    mesh = jax.make_mesh((2,), ('d',))
    tree = attached()
    for spec, a, b in (
      (P('d', None), P('d', None), P(None, None)),
      (P(None, 'd'), P(None, None), P(None, 'd')),
    ):
      places = lowbit.shardings(tree['up']['kernel'], NamedSharding(mesh, spec))
      specs = places.weight.codes.spec, places.a.spec, places.b.spec
      self.assertEqual(specs, (spec, a, b))
      placed = jax.device_put(tree['up']['kernel'], places)
      np.testing.assert_array_equal(placed, tree['up']['kernel'])
    specs = lowbit.shardings(tree['down']['kernel'], P('d'))
    self.assertEqual((specs.weight, specs.a), (P('d'), P('d', None)))
    with self.assertRaisesRegex(ValueError, 'sharded over') as caught:
      lowbit.shardings({'w': tree['act_order']}, P('d'))
    self.assertIn("This is the leaf 'w'.", caught.exception.__notes__)

  def test_report(self):
    report = lowbit.doctor.report(attached(), formats.mxfp4)
    self.assertEqual(report['up/kernel'].fmt, 'mxfp4')


if __name__ == '__main__':
  absltest.main()
