"""NNX: unmodified modules, quantize in place, gradients and optimizers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx

import lowbit_jax as lowbit
from lowbit_jax import QArray, formats, nn
from lowbit_jax.recipe import QuantSpec


def _rand(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x, fmt, axis):
  return lowbit.quantize(x, fmt, axis=axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fake_quant(x, fmt, axis):
  return lowbit.fake_quant(x, fmt, axis=axis)


def _assert_close(actual, expected, magnitude, terms=256):
  """Two float32 sums of `terms` products whose magnitudes add up to at most
  `magnitude`: each is off by at most terms * 2^-24 * magnitude."""
  bound = 2 * terms * 2.0**-24 * float(np.max(np.abs(magnitude)))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def _rngs():
  return flax_nnx.Rngs(params=0, quant=1)


_run = flax_nnx.jit(lambda module, x: module(x))
_attend = flax_nnx.jit(lambda module, x: module.attend(x))
_decode = jax.jit(lowbit.dequantize)


def _normal(key, shape, dtype, **kwargs):
  """Kernels like those of `lecun_normal`, without compiling it."""
  return jnp.asarray(_rand(*shape) / math.sqrt(shape[0]), dtype)


def _zeros(key, shape, dtype, **kwargs):
  return jnp.asarray(np.zeros(shape), dtype)


_INIT = {'kernel_init': _normal, 'bias_init': _zeros}


def _make(make, *args, **kwargs):
  return make(*args, rngs=_rngs(), **kwargs)


class Model(flax_nnx.Module):
  def __init__(self, rngs):
    self.embed = flax_nnx.Embed(16, 64, embedding_init=_normal, rngs=rngs)
    self.attention = flax_nnx.MultiHeadAttention(
      2, 64, decode=False, rngs=rngs, **_INIT
    )
    self.mix = flax_nnx.Einsum('bti,ijk->btjk', (64, 2, 32), rngs=rngs, **_INIT)
    self.layers = flax_nnx.List(
      [flax_nnx.Linear(64, 64, rngs=rngs, **_INIT) for _ in range(2)]
    )
    self.tied = flax_nnx.Linear(64, 64, rngs=rngs, **_INIT)
    self.tied.kernel = self.layers[0].kernel

  def __call__(self, ids):
    x = self.attention(self.embed(ids))
    x = self.mix(x).reshape(x.shape)
    for layer in self.layers:
      x = layer(x)
    return self.tied(x)


@functools.cache
def _split_model():
  return flax_nnx.split(_make(Model))


def _model():
  """A new copy of the model."""
  return flax_nnx.merge(*_split_model())


class UnmodifiedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (
      'linear',
      lambda rngs: flax_nnx.Linear(64, 8, rngs=rngs, **_INIT),
      (3, 64),
      -2,
    ),
    (
      'conv',
      lambda rngs: flax_nnx.Conv(32, 4, (3,), rngs=rngs, **_INIT),
      (2, 8, 32),
      -2,
    ),
  )
  def test_module_equals_that_of_decoded_weights(self, make, shape, axis):
    self._equals_that_of_decoded_weights(make, shape, axis)

  @parameterized.named_parameters(
    (
      'linear_general',
      lambda rngs: flax_nnx.LinearGeneral(
        (2, 32), 8, axis=(-2, -1), rngs=rngs, **_INIT
      ),
      (3, 2, 32),
      -2,
    ),
    (
      'einsum',
      lambda rngs: flax_nnx.Einsum(
        'bi,iho->bho', (64, 4, 8), rngs=rngs, **_INIT
      ),
      (3, 64),
      -3,
    ),
  )
  @pytest.mark.slow
  def test_another_module_equals_that_of_decoded_weights(
    self, make, shape, axis
  ):
    self._equals_that_of_decoded_weights(make, shape, axis)

  def _equals_that_of_decoded_weights(self, make, shape, axis):
    layer = _make(make)
    dense = flax_nnx.clone(layer)
    q = _quantize(layer.kernel[...], formats.nvfp4, axis)
    layer.kernel = nn.nnx.frozen(layer.kernel, q)
    dense.kernel[...] = _decode(q)
    x = _rand(*shape)

    def loss(x, module):
      y = module(x)
      return jnp.sum(y), y

    slope = flax_nnx.jit(jax.grad(loss, has_aux=True))
    (grad, y), (dense_grad, dense_y) = slope(x, layer), slope(x, dense)
    _assert_close(y, dense_y, 64 * np.max(np.abs(x)))
    _assert_close(grad, dense_grad, 64.0)

  def test_embed(self):
    layer = _make(flax_nnx.Embed, 10, 32, embedding_init=_normal)
    q = _quantize(layer.embedding[...], formats.mxfp4, -1)
    layer.embedding = nn.nnx.frozen(layer.embedding, q)
    table = np.asarray(_decode(q))
    ids = np.array([0, 9])
    np.testing.assert_array_equal(_run(layer, ids), table[ids])
    x = _rand(3, 32)
    _assert_close(_attend(layer, x), x @ table.T, np.abs(x) @ np.abs(table.T))

  def test_bfloat16(self):
    layer = _make(flax_nnx.Linear, 64, 8, dtype=jnp.bfloat16, **_INIT)
    nn.nnx.quantize(layer, None, formats.mxfp4)
    x = _rand(3, 64)
    y = _run(layer, x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    kernel = np.asarray(_decode(layer.kernel.get_value()))
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(
      np.float32(y), x @ kernel, rtol=2.0**-8, atol=1e-4
    )


class QuantizeTest(parameterized.TestCase):
  def test_model(self):
    model = _model()
    self.assertIs(nn.nnx.quantize(model, None, formats.mxfp4), model)
    attention = model.attention
    kernels = (
      (attention.query, -3),
      (attention.key, -3),
      (attention.value, -3),
      (attention.out, -2),
      (model.mix, -3),
      (model.layers[0], -2),
      (model.layers[1], -2),
    )
    for layer, axis in kernels:
      self.assertIsInstance(layer.kernel, nn.nnx.QuantizedParam)
      self.assertEqual(layer.kernel.get_value().axis, axis)
    self.assertIs(model.tied.kernel, model.layers[0].kernel)
    self.assertIs(type(model.embed.embedding), flax_nnx.Param)

  def test_result_is_that_of_decoded_weights(self):
    model, dense = _model(), _model()
    nn.nnx.quantize(model, None, formats.mxfp4)
    for path, module in flax_nnx.iter_modules(model):
      kernel = vars(module).get('kernel')
      if isinstance(kernel, nn.nnx.QuantizedParam):
        other = functools.reduce(
          lambda m, k: m[k] if isinstance(k, int) else getattr(m, k),
          path,
          dense,
        )
        other.kernel[...] = _decode(kernel.get_value())
    ids = np.array([[0, 1, 2], [3, 4, 5]])
    expected = _run(dense, ids)
    scale = float(jnp.max(np.abs(expected)))
    np.testing.assert_allclose(_run(model, ids), expected, atol=1e-4 * scale)

  def test_selection(self):
    model = _model()
    nn.nnx.quantize(
      model,
      '^layers/1/kernel$|^embed/',
      lambda path, leaf: formats.nvfp4 if 'layers' in path else formats.mxfp4,
    )
    self.assertEqual(model.layers[1].kernel.get_value().fmt, formats.nvfp4)
    self.assertEqual(model.embed.embedding.get_value().axis, -1)
    self.assertIs(type(model.layers[0].kernel), flax_nnx.Param)
    with self.assertRaisesRegex(ValueError, "select='nothing' selects none"):
      nn.nnx.quantize(model, 'nothing', formats.mxfp4)

  def test_unknown_parameter(self):
    class Own(flax_nnx.Module):
      def __init__(self):
        self.w = flax_nnx.Param(_rand(64, 8))

    with self.assertRaisesRegex(ValueError, "block axis of 'w' .* pass axis="):
      nn.nnx.quantize(Own(), 'w', formats.mxfp4)
    model = nn.nnx.quantize(Own(), 'w', formats.mxfp4, axis=-2)
    self.assertIsInstance(model.w.get_value(), QArray)

  def test_stacked_layers(self):
    @flax_nnx.split_rngs(splits=3)
    @flax_nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
      return flax_nnx.Linear(64, 8, rngs=rngs, **_INIT)

    layers = make(_rngs())
    nn.nnx.quantize(layers, None, formats.nvfp4)
    q = layers.kernel.get_value()
    self.assertEqual(q.shape, (3, 64, 8))
    self.assertEqual(q.tensor_scale.shape, (3, 1, 1))

  def test_metadata_stays(self):
    layer = _make(
      flax_nnx.Linear, 64, 8, kernel_metadata={'note': 'mine'}, **_INIT
    )
    nn.nnx.quantize(layer, None, formats.mxfp4)
    self.assertEqual(layer.kernel.get_metadata('note'), 'mine')

  def test_products_of_its_own_stay(self):
    product = nn.dot_general(lhs=QuantSpec(formats.int8_channel))
    layer = _make(flax_nnx.Linear, 64, 8, dot_general=product, **_INIT)
    nn.nnx.quantize(layer, None, formats.mxfp4)
    self.assertIs(layer.dot_general, product)
    other = _make(flax_nnx.Linear, 64, 8, **_INIT)
    nn.nnx.quantize(other, None, formats.mxfp4)
    self.assertEqual(other.dot_general, nn.dot_general())

  def test_packed_product(self):
    k, n = 2048, 8
    layer = _make(flax_nnx.Linear, k, n, use_bias=False, **_INIT)
    nn.nnx.quantize(layer, None, formats.mxfp4)
    x = _rand(1, k)

    def sizes(jaxpr):
      for eqn in jaxpr.eqns:
        for v in eqn.outvars:
          if jnp.issubdtype(v.aval.dtype, jnp.floating):
            yield v.aval.size
        for param in eqn.params.values():
          for inner in param if isinstance(param, tuple | list) else (param,):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
              yield from sizes(inner)

    jaxpr = jax.make_jaxpr(lambda x: layer(x))(x).jaxpr
    self.assertLess(max(sizes(jaxpr)), k * n)


class AssignTest(parameterized.TestCase):
  def test_packed_and_dense_values(self):
    """A QArray is contracted packed, an array that comes after it as it is."""
    layer, x = _make(flax_nnx.Linear, 64, 8, **_INIT), _rand(3, 64)
    q = _quantize(_rand(64, 8), formats.mxfp4, -2)
    nn.nnx.assign(layer, {'kernel': q})
    self.assertIsInstance(layer.kernel, nn.nnx.QuantizedParam)
    want = x @ np.asarray(q)
    _assert_close(_run(layer, x), want, abs(x) @ abs(np.asarray(q)))
    nn.nnx.assign(layer, {'kernel': _rand(64, 8), 'bias': jnp.ones(8)})
    self.assertIs(type(layer.kernel), flax_nnx.Param)
    want = x @ _rand(64, 8) + 1
    _assert_close(_run(layer, x), want, abs(x) @ abs(_rand(64, 8)) + 1)

  def test_abstract_model_and_shared_variables(self):
    model = flax_nnx.eval_shape(lambda: Model(_rngs()))
    q = _quantize(_rand(64, 64), formats.nvfp4, -2)
    nn.nnx.assign(model, {'layers/0/kernel': q})
    self.assertIs(model.tied.kernel, model.layers[0].kernel)
    self.assertEqual(model.tied.dot_general, nn.dot_general())

  @parameterized.parameters(
    ('kernal', (64, 8), "no 'kernal'; similar are kernel"),
    ('kernel', (8, 64), r"'kernel' has the shape \(64, 8\), its value \(8, 64"),
  )
  def test_refusals(self, path, shape, message):
    layer = _make(flax_nnx.Linear, 64, 8, **_INIT)
    with self.assertRaisesRegex(ValueError, message):
      nn.nnx.assign(layer, {path: _rand(*shape)})
    with self.assertRaisesRegex(TypeError, 'must be an nnx.Module'):
      nn.nnx.assign({}, {path: _rand(*shape)})


class TrainingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.layer = _make(flax_nnx.Linear, 64, 8, **_INIT)
    nn.nnx.quantize(self.layer, None, formats.mxfp4)
    self.x = _rand(3, 64)

  def test_gradient_passes_frozen_weights_by(self):
    loss = lambda m, x: jnp.sum(m(x))
    grads = flax_nnx.jit(flax_nnx.grad(loss))(self.layer, self.x)
    self.assertEqual(list(grads), ['bias'])
    np.testing.assert_array_equal(grads['bias'][...], np.full(8, 3.0))

  def test_optimizer_has_moments_for_arrays_only(self):
    optimizer = flax_nnx.Optimizer(
      self.layer, optax.adam(1e-2), wrt=flax_nnx.Param
    )
    shapes = sorted(x.shape for x in jax.tree.leaves(optimizer.opt_state))
    self.assertEqual(shapes, [(), (8,), (8,)])
    codes = self.layer.kernel.get_value().codes

    @flax_nnx.jit
    def step(layer, optimizer, x):
      grads = flax_nnx.grad(lambda m, x: jnp.sum(m(x)))(layer, x)
      optimizer.update(layer, grads)

    step(self.layer, optimizer, self.x)
    np.testing.assert_array_equal(self.layer.kernel.get_value().codes, codes)
    self.assertTrue(np.all(self.layer.bias[...] < 0))

  def test_straight_through_gradient(self):
    spec = QuantSpec(formats.mxfp4)
    layer = _make(
      flax_nnx.Linear, 64, 8, dot_general=nn.dot_general(rhs=spec), **_INIT
    )
    c = _rand(3, 8)
    loss = lambda m, x: jnp.sum(c * m(x))
    grads = flax_nnx.jit(flax_nnx.grad(loss))(layer, self.x)
    _assert_close(
      grads['kernel'][...], self.x.T @ c, np.abs(self.x.T) @ np.abs(c)
    )
    w = np.asarray(_fake_quant(layer.kernel[...], spec.fmt, -2))
    _assert_close(_run(layer, self.x), self.x @ w, np.abs(self.x) @ np.abs(w))

  def test_random_rounding_draws_new_bits(self):
    spec = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')
    product = nn.nnx.DotGeneral(rhs=spec, rngs=_rngs())
    layer = flax_nnx.Linear(64, 8, dot_general=product, rngs=_rngs(), **_INIT)
    first, second = _run(layer, self.x), _run(layer, self.x)
    self.assertFalse(np.array_equal(first, second))


class EmbedTest(absltest.TestCase):
  def test_rows_and_scores(self):
    layer = _make(nn.nnx.Embed, 512, 32, embedding_init=_normal)
    nn.nnx.quantize(layer, 'embedding', formats.mxfp4)
    table = np.asarray(_decode(layer.embedding.get_value()))
    ids = np.array([[0, 511], [-1, 512]])
    np.testing.assert_array_equal(
      _run(layer, ids), jax.jit(lambda t: jnp.take(t, ids, axis=0))(table)
    )
    x = _rand(3, 32)
    _assert_close(_attend(layer, x), x @ table.T, np.abs(x) @ np.abs(table.T))

  def test_fake_quantized_rows(self):
    spec = QuantSpec(formats.mxfp4)
    layer = _make(nn.nnx.Embed, 16, 32, rhs=spec, embedding_init=_normal)
    table = _fake_quant(layer.embedding[...], spec.fmt, -1)
    ids = np.array([3, 1])
    np.testing.assert_array_equal(_run(layer, ids), np.asarray(table)[ids])

  def test_ids_are_integers(self):
    layer = _make(nn.nnx.Embed, 16, 32, embedding_init=_normal)
    with self.assertRaisesRegex(ValueError, 'must be an integer type'):
      layer(jnp.ones(3))


class AbstractTest(absltest.TestCase):
  def test_shardings_reach_the_leaves(self):
    """What a checkpoint is restored into on a mesh."""
    sharded = {'kernel_metadata': {'out_sharding': (None, 'model')}}

    def make():
      model = flax_nnx.Linear(64, 8, rngs=flax_nnx.Rngs(0), **sharded)
      return nn.nnx.quantize(model, None, formats.mxfp4)

    mesh = jax.make_mesh(
      (1,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    with jax.set_mesh(mesh):
      abstract = [
        flax_nnx.as_abstract(flax_nnx.eval_shape(make)),
        flax_nnx.eval_shape(make, graph=True, graph_updates=True),
      ]
    for model in abstract:
      q = model.kernel.get_raw_value()
      self.assertIsInstance(q, QArray)
      self.assertEqual(q.shape, (64, 8))
      for leaf in jax.tree.leaves(q):
        self.assertEqual(tuple(leaf.sharding.spec), (None, 'model'))


if __name__ == '__main__':
  absltest.main()
