"""Linen: unmodified modules, packed products, fake quantization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import errors as flax_errors, linen as flax_linen
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import QArray, formats, nn, testing
from lowbit_jax.nn._view import ArrayView
from lowbit_jax.recipe import QuantSpec

MATRIX = (((1,), (0,)), ((), ()))


# Tracing and compiling op by op is what costs time here.
_decode = jax.jit(lowbit.dequantize)
_quantize_params = jax.jit(
  nn.quantize_params, static_argnames=('select', 'fmt', 'axis', 'stacked')
)


def _rand(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fake_quant(x, fmt, axis):
  return lowbit.fake_quant(x, fmt, axis=axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x, fmt, axis):
  return lowbit.quantize(x, fmt, axis=axis)


def _params(module, *args):
  """Parameters like those of `init`, without compiling it."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)['params']
  scale = lambda shape: 0.2 * _rand(*shape) if len(shape) > 1 else _rand(*shape)
  return jax.tree.map(lambda leaf: scale(leaf.shape), shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def _apply(module, params, *args, **kwargs):
  return module.apply({'params': params}, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_slope(module, params, x, *args):
  """The result, and the gradient in x of the sum of its squares."""

  def loss(x):
    y = module.apply({'params': params}, x, *args)
    y = y[0] if args else y
    return jnp.sum(y**2), y

  slope, y = jax.grad(loss, has_aux=True)(x)
  return y, slope


@jax.jit
def _dense(tree):
  """The tree with arrays in place of QArrays."""
  is_q = lambda x: isinstance(x, QArray)
  return jax.tree.map(
    lambda x: lowbit.dequantize(x) if is_q(x) else x, tree, is_leaf=is_q
  )


def _absolute(tree):
  return jax.tree.map(np.abs, tree)


def _assert_close(actual, expected, magnitude, terms=256):
  """Two float32 sums of `terms` products whose magnitudes add up to at most
  `magnitude`: each is off by at most terms * 2^-24 * magnitude."""
  bound = 2 * terms * 2.0**-24 * float(np.max(np.abs(magnitude)))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def _largest_float(f, *args) -> int:
  """Elements of the largest float array that `f` computes."""

  def visit(jaxpr):
    sizes = [0]
    for eqn in jaxpr.eqns:
      for v in eqn.outvars:
        if jnp.issubdtype(v.aval.dtype, jnp.floating):
          sizes.append(v.aval.size)
      for param in eqn.params.values():
        for x in param if isinstance(param, tuple | list) else (param,):
          inner = getattr(x, 'jaxpr', x)
          if hasattr(inner, 'eqns'):
            sizes.append(visit(inner))
    return max(sizes)

  return visit(jax.make_jaxpr(f)(*args).jaxpr)


class Block(flax_linen.Module):
  @flax_linen.compact
  def __call__(self, x, _):
    return x + flax_linen.Dense(32, name='dense')(x), None


def _assert_equal_to_decoded(module, q, x, *args):
  """Results and gradients are those of decoded weights."""
  dense = _dense(q)
  got = _value_and_slope(module, q, x, *args)
  want = _value_and_slope(module, dense, x, *args)
  bounds = _value_and_slope(module, _absolute(dense), np.abs(x), *args)
  for y, expected, magnitude, terms in zip(
    got, want, bounds, (256, 512), strict=True
  ):
    _assert_close(y, expected, magnitude, terms)


@functools.cache
def _attention():
  """Attention, its input, quantized parameters, and the result."""
  module = flax_linen.MultiHeadDotProductAttention(2)
  x = _rand(2, 5, 64)
  q = _quantize_params(_params(module, x), None, formats.mxfp4)
  return module, x, q, _apply(module, _dense(q), x)


class UnmodifiedTest(parameterized.TestCase):
  def test_a_program_with_packed_weights_serves_every_batch(self):
    module, _, q, _ = _attention()
    batch = jax.export.symbolic_shape('b,5,64')

    def f(x):
      return lowbit.packed(module.apply)({'params': q}, x)

    x = jax.ShapeDtypeStruct(batch, jnp.float32)
    (out,) = jax.export.export(jax.jit(f))(x).out_avals
    self.assertEqual(str(out.shape), str(batch))

  @parameterized.named_parameters(
    ('conv', flax_linen.Conv(4, (3,)), (2, 8, 32), -2),
    ('padded', flax_linen.Dense(8), (3, 40), -2),
  )
  def test_module_equals_that_of_decoded_weights(self, module, shape, axis):
    self._equals_that_of_decoded_weights(module, shape, axis)

  @parameterized.named_parameters(
    ('dense', flax_linen.Dense(8), (3, 64), -2),
    ('dense_general', flax_linen.DenseGeneral((4, 8)), (3, 64), -3),
    (
      'dense_general_2',
      flax_linen.DenseGeneral(8, axis=(-2, -1)),
      (3, 2, 32),
      -2,
    ),
    ('einsum', flax_linen.Einsum((64, 4, 8), 'bi,iho->bho'), (3, 64), -3),
  )
  @pytest.mark.slow
  def test_another_module_equals_that_of_decoded_weights(
    self, module, shape, axis
  ):
    self._equals_that_of_decoded_weights(module, shape, axis)

  def _equals_that_of_decoded_weights(self, module, shape, axis):
    x = _rand(*shape)
    q = _quantize_params(_params(module, x), None, formats.nvfp4, axis=axis)
    _assert_equal_to_decoded(module, q, x)

  def test_embed(self):
    module = flax_linen.Embed(10, 32)
    q = {'embedding': _quantize(_rand(10, 32), formats.mxfp4, -1)}
    table = np.asarray(_decode(q['embedding']))
    ids = np.array([[0, 9], [3, 3]])
    rows = _apply(module, q, ids)
    np.testing.assert_array_equal(rows, table[ids])
    x = _rand(3, 32)
    scores = _apply(module, q, x, method='attend')
    _assert_close(scores, x @ table.T, np.abs(x) @ np.abs(table.T))

  def test_attention(self):
    module, x, q, expected = _attention()
    axes = {name: q[name]['kernel'].axis for name in q}
    self.assertEqual(axes, {'query': -3, 'key': -3, 'value': -3, 'out': -2})
    np.testing.assert_allclose(_apply(module, q, x), expected, atol=1e-5)

  def test_bfloat16(self):
    # mxfp4 values are exact in bfloat16, so both round the same product.
    module = flax_linen.Dense(8, dtype=jnp.bfloat16)
    x = _rand(3, 64)
    q = {'kernel': _quantize(_rand(64, 8), formats.mxfp4, -2), 'bias': _rand(8)}
    y = _apply(module, q, x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    expected = _apply(module, _dense(q), x)
    np.testing.assert_array_equal(y, expected)

  def test_own_module(self):
    class Own(flax_linen.Module):
      @flax_linen.compact
      def __call__(self, x):
        w = self.param('w', flax_linen.initializers.ones, (64, 8))
        return 2 * (x @ w) + w[0] - w.T[:, 1]

    q = {'w': _quantize(_rand(64, 8), formats.mxfp4, -2)}
    w = np.asarray(_decode(q['w']))
    x = _rand(3, 64)
    y = _apply(Own(), q, x)
    magnitude = 2 * np.abs(x) @ np.abs(w) + 20
    _assert_close(y, 2 * (x @ w) + w[0] - w[1], magnitude)

  def test_wrong_shape_is_still_an_error(self):
    q = {'kernel': _quantize(_rand(64, 4), formats.mxfp4, -2)}
    with self.assertRaisesRegex(flax_errors.ScopeParamShapeError, r'\(64, 4\)'):
      flax_linen.Dense(8, use_bias=False).apply({'params': q}, _rand(3, 64))

  def test_partitioned(self):
    init = flax_linen.with_partitioning(
      flax_linen.initializers.lecun_normal(), (None, 'model')
    )
    module = flax_linen.Dense(8, kernel_init=init)
    x = _rand(3, 64)
    params = _params(module, x)
    q = _quantize_params(params, None, formats.nvfp4)
    self.assertIsInstance(q['kernel'], flax_linen.Partitioned)
    kernel = np.asarray(_decode(q['kernel'].value))
    y = _apply(module, q, x)
    bias = params['bias']
    _assert_close(y, x @ kernel + bias, np.abs(x) @ np.abs(kernel) + 4)


class LiftedTest(parameterized.TestCase):
  def test_scan(self):
    self._scan(remat=True)

  @pytest.mark.slow
  def test_scan_without_remat(self):
    self._scan(remat=False)

  def _scan(self, remat):
    body = flax_linen.remat(Block) if remat else Block
    module = flax_linen.scan(
      body, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
    )()
    x = _rand(2, 32)
    params = _params(module, x, None)
    q = _quantize_params(params, None, formats.nvfp4, stacked='')
    self.assertEqual(q['dense']['kernel'].shape, (3, 32, 32))
    _assert_equal_to_decoded(module, q, x, None)

  def test_vmap(self):
    module = flax_linen.vmap(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, None),
    )()
    x = _rand(3, 2, 32)
    params = _params(module, x, None)
    q = _quantize_params(params, None, formats.nvfp4, stacked='')
    _assert_equal_to_decoded(module, q, x, None)

  def test_layers_along_another_axis_are_refused(self):
    module = flax_linen.scan(
      Block, variable_axes={'params': 1}, split_rngs={'params': True}, length=3
    )()
    kernel = _quantize(_rand(32, 3, 32), formats.mxfp4, -3)
    params = {'dense': {'kernel': kernel, 'bias': _rand(32, 3)}}
    with self.assertRaisesRegex(ValueError, 'lifted over axis 1: stack the'):
      module.apply({'params': params}, _rand(2, 32), None)


class PackedTest(parameterized.TestCase):
  K, N = 2048, 8

  def setUp(self):
    super().setUp()
    self.x = _rand(1, self.K)

  def _check(self, module, q, x, walks=False):
    """The result is right, and no decoded weight is as large as the whole."""
    kernel = np.asarray(_decode(q['kernel']))
    plain = lambda p, x: module.apply({'params': p}, x)

    packed = lowbit.packed(plain, strict=True) if walks else plain

    self.assertLess(_largest_float(packed, q, x), self.K * self.N)
    y = jax.jit(packed)(q, x)
    axes = x.ndim - 1
    magnitude = np.tensordot(np.abs(x), np.abs(kernel), axes)
    _assert_close(y, np.tensordot(x, kernel, axes), magnitude, self.K)

  def _injected(self):
    return {
      'use_bias': False,
      'dot_general': nn.dot_general(),
      'promote_dtype': nn.promote_dtype,
    }

  def test_without_injection_the_weight_is_decoded(self):
    q = {'kernel': _quantize(_rand(self.K, self.N), formats.mxfp4, -2)}
    module = flax_linen.Dense(self.N, use_bias=False)
    plain = lambda p, x: module.apply({'params': p}, x)
    size = _largest_float(plain, q, self.x)
    self.assertGreaterEqual(size, self.K * self.N)

  @parameterized.parameters('nvfp4', 'mxfp4', 'int8_channel', 'uint4_g32')
  @pytest.mark.slow  # test_thin_dense has mxfp4, test_heads an injected product
  def test_dense(self, name):
    q = {'kernel': _quantize(_rand(self.K, self.N), formats.get(name), -2)}
    self._check(flax_linen.Dense(self.N, **self._injected()), q, self.x)

  def test_heads(self):
    q = {'kernel': _quantize(_rand(self.K, 2, 4), formats.nvfp4, -3)}
    module = flax_linen.DenseGeneral((2, 4), **self._injected())
    self._check(module, q, self.x)

  def test_two_contracted_axes(self):
    q = {'kernel': _quantize(_rand(4, 512, self.N), formats.nvfp4, -2)}
    module = flax_linen.DenseGeneral(self.N, axis=(-2, -1), **self._injected())
    self._check(module, q, self.x.reshape(1, 4, 512))

  def test_two_contracted_axes_that_cannot_merge(self):
    # One scale for each slice along axis -2 does not cover axis -3 as well.
    q = {'kernel': _quantize(_rand(3, 40, 8), formats.int8_channel, -2)}
    module = flax_linen.DenseGeneral(8, axis=(-2, -1), **self._injected())
    x = _rand(2, 3, 40)
    kernel = np.asarray(_decode(q['kernel']))
    y = _apply(module, q, x)
    expected = np.einsum('bij,ijo->bo', x, kernel)
    magnitude = np.einsum('bij,ijo->bo', np.abs(x), np.abs(kernel))
    _assert_close(y, expected, magnitude)

  def test_einsum(self):
    q = {'kernel': _quantize(_rand(self.K, 2, 4), formats.mxfp4, -3)}
    module = nn.linen.Einsum((self.K, 2, 4), 'bi,iho->bho', use_bias=False)
    self._check(module, q, self.x)

  def test_thin_dense(self):
    q = {'kernel': _quantize(_rand(self.K, self.N), formats.mxfp4, -2)}
    self._check(nn.linen.Dense(self.N, use_bias=False), q, self.x)

  def test_walk(self):
    q = {'kernel': _quantize(_rand(self.K, self.N), formats.mxfp4, -2)}
    module = flax_linen.Dense(self.N, use_bias=False)
    self._check(module, q, self.x, walks=True)
    plain = lambda p, x: module.apply({'params': p}, x)
    size = _largest_float(plain, q, self.x)
    self.assertGreaterEqual(size, self.K * self.N)  # as before

  @pytest.mark.slow
  def test_walk_with_heads(self):
    q = {'kernel': _quantize(_rand(self.K, 2, 4), formats.mxfp4, -3)}
    module = flax_linen.DenseGeneral((2, 4), use_bias=False)
    self._check(module, q, self.x, walks=True)

  @pytest.mark.slow
  def test_walk_with_attention(self):
    module, x, q, expected = _attention()

    packed = jax.jit(lowbit.packed(module.apply, strict=True))
    y = packed({'params': q}, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)

  def test_gradient_of_the_packed_product(self):
    q = {'kernel': _quantize(_rand(64, 8), formats.nvfp4, -2)}
    module = flax_linen.Dense(8, **self._injected())
    kernel = np.asarray(_decode(q['kernel']))
    c = _rand(3, 8)
    x = _rand(3, 64)
    loss = lambda x: jnp.sum(c * module.apply({'params': q}, x))
    _assert_close(
      jax.jit(jax.grad(loss))(x), c @ kernel.T, np.abs(c) @ np.abs(kernel.T)
    )

  def test_bfloat16(self):
    module = flax_linen.Dense(8, dtype=jnp.bfloat16, **self._injected())
    q = {'kernel': _quantize(_rand(64, 8), formats.mxfp4, -2)}
    x = _rand(3, 64)
    y = _apply(module, q, x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    kernel = np.asarray(_decode(q['kernel']))
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    # The float32 sum is rounded once: half an ulp, 2^-9 of the result.
    np.testing.assert_allclose(
      np.float32(y), x @ kernel, rtol=2.0**-8, atol=1e-4
    )


class EmbedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.q = {'embedding': _quantize(_rand(512, 32), formats.mxfp4, -1)}
    self.table = np.asarray(_decode(self.q['embedding']))

  @parameterized.parameters(jnp.int32, jnp.int16, jnp.uint8)
  def test_rows(self, dtype):
    ids = np.array([[0, 3], [127, 3]], dtype)
    module = nn.linen.Embed(512, 32)
    look_up = lambda q, ids: _apply(module, q, ids)
    np.testing.assert_array_equal(
      jax.jit(look_up)(self.q, ids), self.table[ids]
    )
    self.assertLess(_largest_float(look_up, self.q, ids), 512 * 32)

  def test_rows_outside_are_those_of_take(self):
    ids = np.array([-1, -512, -513, 511, 512])
    rows = _apply(nn.linen.Embed(512, 32), self.q, ids)
    np.testing.assert_array_equal(
      rows, jax.jit(lambda t: jnp.take(t, ids, axis=0))(self.table)
    )
    self.assertTrue(np.isnan(rows[2]).all())

  def test_scalar(self):
    row = _apply(nn.linen.Embed(512, 32), self.q, np.int32(5))
    np.testing.assert_array_equal(row, self.table[5])

  def test_blocks_along_the_rows(self):
    q = {'embedding': _quantize(_rand(64, 32), formats.mxfp4, -2)}
    rows = _apply(nn.linen.Embed(64, 32), q, np.array([1, 63]))
    table = np.asarray(_decode(q['embedding']))
    np.testing.assert_array_equal(rows, table[np.array([1, 63])])

  def test_attend(self):
    module = nn.linen.Embed(512, 32)
    x = _rand(3, 32)
    y = _apply(module, self.q, x, method='attend')
    _assert_close(y, x @ self.table.T, np.abs(x) @ np.abs(self.table.T))

  def test_walk(self):
    module = flax_linen.Embed(512, 32)

    def look_up(q, ids):
      return lowbit.packed(module.apply)({'params': q}, ids)

    ids = np.array([5, 6])
    np.testing.assert_array_equal(
      jax.jit(look_up)(self.q, ids), self.table[ids]
    )
    self.assertLess(_largest_float(look_up, self.q, ids), 512 * 32)

  def test_fake_quantized_rows_are_those_of_the_table(self):
    self._fake_quantized_rows('nvfp4')

  @pytest.mark.slow
  def test_fake_quantized_rows_without_tensor_scale(self):
    self._fake_quantized_rows('mxfp4')

  def _fake_quantized_rows(self, name):
    spec = QuantSpec(formats.get(name))
    module = nn.linen.Embed(16, 32, rhs=spec)
    params = {'embedding': _rand(16, 32)}
    ids = np.array([3, 1])
    table = np.asarray(_fake_quant(params['embedding'], spec.fmt, -1))
    np.testing.assert_array_equal(_apply(module, params, ids), table[ids])


class FakeQuantTest(parameterized.TestCase):
  LHS = QuantSpec(formats.int8_channel)
  RHS = QuantSpec(formats.mxfp4)

  def setUp(self):
    super().setUp()
    self.x, self.c = _rand(3, 64), _rand(3, 8)
    self.params = {'kernel': _rand(64, 8), 'bias': _rand(8)}

  def _operands(self):
    x = np.asarray(_fake_quant(self.x, self.LHS.fmt, -1))
    w = np.asarray(_fake_quant(self.params['kernel'], self.RHS.fmt, -2))
    return x, w

  @parameterized.named_parameters(
    ('injected', flax_linen.Dense(8, dot_general=nn.dot_general(LHS, RHS))),
    ('thin', nn.linen.Dense(8, lhs=LHS, rhs=RHS)),
    ('einsum', nn.linen.Einsum((64, 8), 'bi,io->bo', lhs=LHS, rhs=RHS)),
    (
      'class',
      flax_linen.Dense(
        8, dot_general_cls=functools.partial(nn.linen.DotGeneral, LHS, RHS)
      ),
    ),
  )
  def test_value_and_straight_through_gradient(self, module):
    x, w = self._operands()

    def loss(params):
      y = module.apply({'params': params}, self.x)
      return jnp.sum(self.c * y), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(self.params)
    expected = x @ w + self.params['bias']
    _assert_close(y, expected, np.abs(x) @ np.abs(w) + 8)
    _assert_close(grads['kernel'], x.T @ self.c, np.abs(x.T) @ np.abs(self.c))

  def test_parameters_are_those_of_linen(self):
    key = jax.random.key(0)
    ours = jax.jit(nn.linen.Dense(8, rhs=self.RHS).init)(key, self.x)
    theirs = jax.jit(flax_linen.Dense(8).init)(key, self.x)
    testing.assert_trees_bits_equal(ours, theirs)

  def test_modules_compare_and_hash(self):
    make = lambda: nn.linen.Dense(8, lhs=self.LHS, rhs=self.RHS)
    self.assertEqual(make(), make())
    self.assertEqual(hash(make()), hash(make()))
    self.assertEqual(nn.dot_general(self.LHS), nn.dot_general(self.LHS))
    self.assertNotEqual(nn.dot_general(self.LHS), nn.dot_general())

  def test_quantized_weights_are_not_quantized_again(self):
    kernel = _quantize(_rand(64, 8), formats.int8_channel, -2)
    q = {**self.params, 'kernel': kernel}
    module = nn.linen.Dense(8, rhs=self.RHS)
    w = np.asarray(_decode(q['kernel']))
    y = _apply(module, q, self.x)
    magnitude = np.abs(self.x) @ np.abs(w) + 8
    _assert_close(y, self.x @ w + q['bias'], magnitude)

  def test_tiles(self):
    fmt = formats.get('mxfp4_32x32')
    product = jax.jit(nn.dot_general(rhs=QuantSpec(fmt)), static_argnums=2)
    y = product(self.x, self.params['kernel'], MATRIX)
    w = np.asarray(_fake_quant(self.params['kernel'], fmt, (0, 1)))
    _assert_close(y, self.x @ w, np.abs(self.x) @ np.abs(w))
    with self.assertRaisesRegex(ValueError, 'mxfp4_32x32 has no place in'):
      nn.dot_general(rhs=QuantSpec(fmt))(
        self.x, _rand(64), (((1,), (0,)), ((), ()))
      )

  def test_random_rounding(self):
    spec = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')
    module = nn.linen.Dense(8, rhs=spec)
    run = lambda key: _apply(module, self.params, self.x, rngs={'quant': key})
    a, b = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(run(a), run(a))
    self.assertFalse(np.array_equal(run(a), run(b)))
    with self.assertRaisesRegex(flax_errors.InvalidRngError, 'quant'):
      _apply(module, self.params, self.x)

  def test_refusals(self):
    spec = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')
    with self.assertRaisesRegex(
      ValueError, "rhs has rounding='stochastic', .* use nn.linen.DotGeneral"
    ):
      nn.dot_general(rhs=spec)
    with self.assertRaisesRegex(TypeError, 'lhs=.* must be a QuantSpec'):
      nn.einsum(formats.mxfp4)
    q = _quantize(_rand(64, 8), formats.mxfp4, -2)
    with self.assertRaisesRegex(TypeError, r"no keywords \['algorithm'\]"):
      nn.dot_general()(self.x, q, MATRIX, algorithm='fast')


class ShardingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    if jax.device_count() < 8:
      self.skipTest('needs eight devices')
    self.x, self.q = _rand(4, 64), _quantize(_rand(64, 32), formats.nvfp4, -2)

  def _run(self, kind):
    mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
      x = jax.device_put(self.x, NamedSharding(mesh, P('a', None)))
      own = lowbit.shardings(self.q, NamedSharding(mesh, P(None, 'b')))
      q = jax.device_put(self.q, own)
      product = nn.dot_general()
      return jax.jit(
        lambda x, q: product(x, q, MATRIX, out_sharding=P('a', 'b'))
      )(x, q)

  def test_out_sharding_on_explicit_axes(self):
    y = self._run(AxisType.Explicit)
    self.assertEqual(y.sharding.spec, P('a', 'b'))
    w = np.asarray(_decode(self.q))
    magnitude = np.abs(self.x) @ np.abs(w)
    _assert_close(np.asarray(y), np.asarray(self.x @ w), magnitude)

  def test_out_sharding_on_automatic_axes_is_refused_as_in_lax(self):
    with self.assertRaisesRegex(ValueError, 'Auto'):
      self._run(AxisType.Auto)


class PromoteTest(absltest.TestCase):
  def test_linen_and_nnx(self):
    q = _quantize(_rand(64, 8), formats.mxfp4, -2)
    x = _rand(3, 64).astype(jnp.bfloat16)
    out = nn.promote_dtype(x, ArrayView(q), None)
    self.assertIsInstance(out, list)
    self.assertEqual([x.dtype for x in out[:2]], [jnp.float32] * 2)
    self.assertIsInstance(out[1], QArray)
    self.assertIsNone(out[2])
    out = nn.promote_dtype((x, q), dtype=jnp.bfloat16)
    self.assertIsInstance(out, tuple)
    self.assertEqual([x.dtype for x in out], [jnp.bfloat16] * 2)


if __name__ == '__main__':
  absltest.main()
