"""quantize_params: selection, block axes, mixed formats, boxes, refusals."""

import functools
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import linen as flax_linen, nnx as flax_nnx
from flax.core import freeze, meta

import lowbit_jax as lowbit
from lowbit_jax import QArray, formats, nn, testing

IS_Q = dict(is_leaf=lambda x: isinstance(x, QArray))


# Tracing and compiling op by op is what costs time here.
_quantize_params = jax.jit(
  nn.quantize_params,
  static_argnames=('select', 'fmt', 'axis', 'stacked', 'scale_rule'),
)


def _shapes(params, *args, **kwargs):
  """The result with shapes in place of arrays."""
  return jax.eval_shape(
    lambda params: nn.quantize_params(params, *args, **kwargs), params
  )


@functools.partial(jax.jit, static_argnames=('fmt', 'axis', 'scale_rule'))
def _quantize(x, fmt, axis, scale_rule=None):
  return lowbit.quantize(x, fmt, axis=axis, scale_rule=scale_rule)


def _rand(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _attention(*stack):
  kernels = {
    n: {'kernel': _rand(*stack, 64, 2, 32)} for n in ('query', 'key', 'value')
  }
  kernels['out'] = {
    'kernel': _rand(*stack, 2, 32, 64),
    'bias': _rand(*stack, 64),
  }
  return kernels


class LayoutTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('dense', ('Dense_0', 'kernel'), (64, 8), -2),
    ('root', ('kernel',), (64, 8), -2),
    ('conv', ('Conv_1', 'kernel'), (3, 3, 32, 8), -2),
    ('own_conv', ('down_conv', 'kernel'), (3, 32, 8), -2),
    ('embedding', ('Embed_0', 'embedding'), (16, 64), -1),
  )
  def test_axis_by_name(self, path, shape, axis):
    x = _rand(*shape)
    tree = x
    for name in reversed(path):
      tree = {name: tree}
    q = _shapes(tree, '', formats.mxfp4)
    for name in path:
      q = q[name]
    expected = jax.eval_shape(
      functools.partial(lowbit.quantize, fmt=formats.mxfp4, axis=axis), x
    )
    self.assertEqual(q.axis, axis)
    self.assertEqual(q.codes, expected.codes)
    self.assertEqual(q.scale, expected.scale)

  def test_codes_and_scales_are_those_of_quantize(self):
    x = _rand(3, 3, 32, 8)
    tree = {'Conv_1': {'kernel': x}}
    q = _quantize_params(tree, '', formats.mxfp4)['Conv_1']['kernel']
    expected = _quantize(x, formats.mxfp4, axis=-2)
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.scale, expected.scale)

  def test_attention(self):
    q = _shapes({'self': _attention()}, None, formats.mxfp4)['self']
    axes = {name: q[name]['kernel'].axis for name in q}
    self.assertEqual(axes, {'query': -3, 'key': -3, 'value': -3, 'out': -2})
    self.assertNotIsInstance(q['out']['bias'], QArray)

  def test_names_of_attention_with_other_shapes_are_refused(self):
    params = _attention()
    params['out']['kernel'] = _rand(3, 32, 64)
    with self.assertRaisesRegex(
      ValueError, r"'query/kernel' with shape \(64, 2, 32\) is not known"
    ):
      nn.quantize_params(params, 'query', formats.mxfp4)

  def test_tiles_span_the_last_axis_too(self):
    params = {
      'a': {'kernel': _rand(64, 32)},
      'query': {'kernel': _rand(64, 32)},
    }
    q = _shapes(params, None, formats.get('mxfp4_32x32'))
    self.assertEqual(q['a']['kernel'].axis, (-2, -1))
    attention = _shapes(_attention(), None, formats.get('mxfp4_32x32'))
    self.assertEqual(attention['query']['kernel'].axis, (-3, -1))

  def test_stacked_layers_are_quantized_one_by_one(self):
    kernel = _rand(3, 64, 8) * np.float32([1.0, 10.0, 100.0])[:, None, None]
    params = {'layers': {'Dense_0': {'kernel': kernel}}}
    q = _quantize_params(params, None, formats.nvfp4, stacked='^layers/')
    dense = q['layers']['Dense_0']['kernel']
    self.assertEqual(dense.tensor_scale.shape, (3, 1, 1))
    layers = jax.jit(lambda q: [q[i] for i in range(3)])(dense)
    for layer, values in zip(layers, kernel, strict=True):
      one = _quantize(values, formats.nvfp4, axis=-2)
      np.testing.assert_array_equal(layer.tensor_scale, one.tensor_scale)
      np.testing.assert_array_equal(layer.codes, one.codes)
    params = {'layers': _attention(3)}
    q = _shapes(params, None, formats.nvfp4, stacked='^layers/')
    self.assertEqual(q['layers']['query']['kernel'].axis, -3)
    self.assertEqual(q['layers']['query']['kernel'].shape, (3, 64, 2, 32))

  @parameterized.named_parameters(
    ('dense_general', 'DenseGeneral_0', 'kernel', (4, 64, 8)),
    ('einsum', 'Einsum_0', 'kernel', (64, 8)),
    ('unknown_name', 'Lora_0', 'w_a', (64, 8)),
    ('stack_not_declared', 'Dense_0', 'kernel', (3, 64, 8)),
  )
  def test_refuses_what_it_does_not_know(self, module, name, shape):
    params = {module: {name: _rand(*shape)}}
    message = (
      f"block axis of '{module}/{name}' with shape .*{shape[0]}, .* is not"
      ' known:'
      ' pass axis=, narrow select=, or name stacked layers in stacked='
    )
    with self.assertRaisesRegex(ValueError, message):
      nn.quantize_params(params, name, formats.mxfp4)

  def test_axis_argument(self):
    params = {'DenseGeneral_0': {'kernel': _rand(64, 4, 8)}}
    q = _shapes(params, None, formats.mxfp4, axis=-3)
    self.assertEqual(q['DenseGeneral_0']['kernel'].axis, -3)
    params['Dense_0'] = {'kernel': _rand(64, 8)}
    axis = lambda path, leaf: -3 if leaf.ndim == 3 else None
    q = _shapes(params, None, formats.mxfp4, axis=axis)
    self.assertEqual(q['DenseGeneral_0']['kernel'].axis, -3)
    self.assertEqual(q['Dense_0']['kernel'].axis, -2)
    with self.assertRaisesRegex(ValueError, "axis=0 of '.*' must count from"):
      nn.quantize_params(params, None, formats.mxfp4, axis=0)


class SelectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = {
      'Embed_0': {'embedding': _rand(16, 32)},
      'Dense_0': {'kernel': _rand(32, 8), 'bias': _rand(8)},
      'Dense_1': {'kernel': _rand(32, 8)},
      'LayerNorm_0': {'scale': _rand(32)},
    }

  def _selected(self, select, fmt=formats.mxfp4):
    q = _shapes(self.params, select, fmt)
    leaves = jax.tree_util.tree_leaves_with_path(q, **IS_Q)
    return {
      jax.tree_util.keystr(p, simple=True, separator='/'): leaf.fmt.name
      for p, leaf in leaves
      if isinstance(leaf, QArray)
    }

  def test_default_is_kernels(self):
    self.assertCountEqual(
      self._selected(None), ['Dense_0/kernel', 'Dense_1/kernel']
    )

  def test_regular_expression(self):
    self.assertCountEqual(self._selected('_1/kernel$'), ['Dense_1/kernel'])

  def test_predicate(self):
    chosen = self._selected(lambda path, leaf: leaf.shape == (16, 32))
    self.assertCountEqual(chosen, ['Embed_0/embedding'])

  def test_mixed_formats(self):
    chosen = self._selected(
      'kernel|embedding',
      lambda path, leaf: {
        'Embed_0/embedding': formats.int8_channel,
        'Dense_0/kernel': formats.nvfp4,
      }.get(path),
    )
    self.assertEqual(
      chosen, {'Embed_0/embedding': 'int8_channel', 'Dense_0/kernel': 'nvfp4'}
    )

  def test_nothing_selected(self):
    with self.assertRaisesRegex(
      ValueError, "select='Kernel' selects none of the leaves .*Dense_0/kernel"
    ):
      nn.quantize_params(self.params, 'Kernel', formats.mxfp4)

  def test_a_second_time_changes_nothing(self):
    once = _quantize_params(self.params, None, formats.mxfp4)
    twice = nn.quantize_params(once, None, formats.int8_channel)
    self.assertIs(twice['Dense_0']['kernel'], once['Dense_0']['kernel'])

  def test_errors_name_the_parameter(self):
    with self.assertRaises(ValueError) as caught:
      nn.quantize_params(self.params, None, formats.mxfp4, scale_rule='absmax')
    self.assertIn("'Dense_0/kernel'", ' '.join(caught.exception.__notes__))
    with self.assertRaisesRegex(TypeError, 'must be a block format'):
      nn.quantize_params(self.params, None, 'mxfp4')

  def test_scale_rule(self):
    q = _quantize_params(
      self.params, 'Dense_0/kernel', formats.mxfp4, scale_rule='rceil'
    )
    expected = _quantize(
      self.params['Dense_0']['kernel'],
      formats.mxfp4,
      axis=-2,
      scale_rule='rceil',
    )
    np.testing.assert_array_equal(q['Dense_0']['kernel'].scale, expected.scale)

  def test_under_jit_and_eval_shape(self):
    run = lambda p: nn.quantize_params(p, None, formats.mxfp4)
    q, eager = jax.jit(run)(self.params), run(self.params)
    np.testing.assert_array_equal(
      q['Dense_0']['kernel'].codes, eager['Dense_0']['kernel'].codes
    )
    shapes = jax.eval_shape(run, self.params)
    self.assertEqual(shapes['Dense_0']['kernel'].shape, (32, 8))


class ContainerTest(absltest.TestCase):
  def test_frozen_dict(self):
    params = freeze({'Dense_0': {'kernel': _rand(32, 8)}})
    q = _quantize_params(params, None, formats.mxfp4)
    self.assertIs(type(q), type(params))
    self.assertIsInstance(q['Dense_0']['kernel'], QArray)

  def test_partitioned_boxes_stay(self):
    box = meta.Partitioned(_rand(32, 8), ('a', None))
    logical = flax_linen.LogicallyPartitioned(_rand(32, 8), ('embed', 'mlp'))
    q = _quantize_params(
      {'a': {'kernel': box}, 'b': {'kernel': logical}}, None, formats.mxfp4
    )
    self.assertIs(type(q['a']['kernel']), meta.Partitioned)
    self.assertEqual(q['a']['kernel'].names, ('a', None))
    self.assertIsInstance(q['a']['kernel'].value, QArray)
    self.assertIs(type(q['b']['kernel']), flax_linen.LogicallyPartitioned)
    again = nn.quantize_params(q, None, formats.int8_channel)
    self.assertEqual(again['a']['kernel'].value.fmt, formats.mxfp4)

  def test_nnx_state(self):
    model = flax_nnx.Linear(32, 8, rngs=flax_nnx.Rngs(0))
    graph, state = flax_nnx.split(model)
    q = nn.quantize_params(state, None, formats.mxfp4)
    self.assertIsInstance(q, flax_nnx.State)
    self.assertIsInstance(q['kernel'], nn.nnx.QuantizedParam)
    merged = flax_nnx.merge(graph, q)
    x = _rand(2, 32)
    dense = lowbit.dequantize(q['kernel'].get_value())
    np.testing.assert_array_equal(merged(x), x @ dense + model.bias[...])

  def test_save_and_load(self):
    params = {'Dense_0': {'kernel': _rand(40, 8), 'bias': _rand(8)}}
    q = _quantize_params(params, None, formats.nvfp4)
    directory = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, directory)
    path = os.path.join(directory, 'model.lowbit')
    lowbit.io.save(path, q)
    loaded = lowbit.io.load(path)
    testing.assert_trees_bits_equal(loaded, q)


class OptaxTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    params = {'kernel': _rand(32, 8), 'bias': _rand(8), 'steps': jnp.int32(0)}
    self.params = _quantize_params(params, None, formats.mxfp4)

  def test_mask(self):
    self.assertEqual(
      nn.trainable_mask(self.params),
      {'kernel': False, 'bias': True, 'steps': False},
    )

  def test_masked_adam_has_moments_for_arrays_only(self):
    state = optax.masked(optax.adam(1e-3), nn.trainable_mask).init(self.params)
    shapes = sorted(x.shape for x in jax.tree.leaves(state))
    self.assertEqual(shapes, [(), (8,), (8,)])
    careless = optax.adam(1e-3).init(self.params)
    self.assertGreater(len(jax.tree.leaves(careless)), 3)

  def test_partitioned_training_step(self):
    trainable, frozen = lowbit.partition(self.params)
    x = _rand(4, 32)

    def loss(t):
      p = lowbit.combine(t, frozen)
      return jnp.sum((lowbit.dot(x, p['kernel']) + p['bias']) ** 2)

    optimizer = optax.adam(1e-1)
    state = optimizer.init(trainable)
    shapes = sorted(x.shape for x in jax.tree.leaves(state))
    self.assertEqual(shapes, [(), (8,), (8,)])
    grads = jax.jit(jax.grad(loss))(trainable)
    updates, _ = optimizer.update(grads, state, trainable)
    after = optax.apply_updates(trainable, updates)
    self.assertLess(loss(after), loss(trainable))
    whole = lowbit.combine(after, frozen)
    np.testing.assert_array_equal(
      whole['kernel'].codes, self.params['kernel'].codes
    )


class SiteTest(absltest.TestCase):
  def test_a_bias_tells_what_is_contracted(self):
    shape = jax.ShapeDtypeStruct
    for kernel, bias, axis in (
      ((8, 8, 32, 16), (16,), (-2,)),  # a convolution of any name
      ((64, 4, 8), (4, 8), (-3,)),  # DenseGeneral to (heads, size)
      ((4, 64, 8), (8,), (-2,)),  # and from two axes
    ):
      params = {
        'patch': {
          'kernel': shape(kernel, jnp.float32),
          'bias': shape(bias, jnp.float32),
        }
      }
      q = jax.eval_shape(
        lambda p: nn.quantize_params(p, None, formats.mxfp4), params
      )['patch']['kernel']
      self.assertEqual((q.axes, q.merged), (axis, ()))
    del params['patch']['bias']
    with self.assertRaisesRegex(ValueError, 'patch/kernel.*not known'):
      jax.eval_shape(
        lambda p: nn.quantize_params(p, None, formats.mxfp4), params
      )


class UnboxTest(absltest.TestCase):
  def test_qarrays_stay_packed(self):
    box = flax_linen.Partitioned(np.ones((64, 8), np.float32), (None, 'model'))
    params = {'kernel': box, 'bias': np.zeros(8)}
    q = nn.quantize_params(params, None, formats.mxfp4)
    for tree in (q, flax_linen.unbox(q), nn.unbox(q)):
      got = nn.unbox(tree)
      self.assertIsInstance(got['kernel'], QArray)
      self.assertIs(got['bias'], params['bias'])


if __name__ == '__main__':
  absltest.main()
