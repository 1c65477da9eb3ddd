"""Tests of partition, combine and shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.qarray import is_qarray

P = PartitionSpec


def weights(*shape) -> np.ndarray:
  random = np.random.RandomState(0)
  return random.standard_normal(shape).astype(np.float32)


def abstract(w, axis=-1):
  """Shapes of `w` in mxfp4."""
  quantize = functools.partial(lowbit.quantize, fmt=formats.mxfp4, axis=axis)
  return jax.eval_shape(quantize, w)


@functools.cache
def mixed_tree():
  return {
    'frozen': lowbit.quantize(weights(64, 8), formats.int4_g32, axis=-2),
    'bias': np.arange(8, dtype=np.float32),
    'steps': np.int32(3),
    'none': None,
  }


class PartitionTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_combine_inverts_partition(self, scales):
    tree = mixed_tree()
    joined = lowbit.combine(*lowbit.partition(tree, scales=scales))
    self.assertEqual(jax.tree.structure(joined), jax.tree.structure(tree))
    jax.tree.map(np.testing.assert_array_equal, joined, tree)

  def test_floats_are_trainable_and_quantized_arrays_are_not(self):
    trainable, frozen = lowbit.partition(mixed_tree())
    self.assertLen(jax.tree.leaves(trainable), 1)
    self.assertIsNone(frozen['bias'])
    self.assertTrue(is_qarray(frozen['frozen']))
    self.assertIsNone(trainable['steps'])

  def test_gradient_of_a_mixed_tree(self):
    x = np.ones((2, 64), np.float32)

    def loss(trainable, frozen):
      params = lowbit.combine(trainable, frozen)
      return jnp.sum(lowbit.dot(x, params['frozen']) + params['bias'])

    grads = jax.jit(jax.grad(loss))(*lowbit.partition(mixed_tree()))
    np.testing.assert_array_equal(grads['bias'], np.full(8, 2.0))

  def test_gradient_of_scales(self):
    tree = mixed_tree()
    q, x = tree['frozen'], weights(2, 64)

    def loss(trainable, frozen):
      params = lowbit.combine(trainable, frozen)
      return jnp.sum(lowbit.dot(x, params['frozen']))

    grads = jax.jit(jax.grad(loss))(*lowbit.partition(tree, scales=True))
    unscaled = np.asarray(lowbit.dequantize(q)) / np.repeat(q.scale, 32, 0)
    terms = np.sum(x, 0)[:, None] * unscaled
    expected = terms.reshape(2, 32, 8).sum(1)
    np.testing.assert_allclose(grads['frozen'].scale, expected, atol=1e-4)
    self.assertIsNone(grads['frozen'].codes)


class ShardingsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if len(jax.devices()) < 8:
      self.skipTest('needs 8 devices (see tests/conftest.py)')
    auto = (jax.sharding.AxisType.Auto,) * 2
    self.mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=auto)

  @parameterized.parameters(
    ('int3_g32', -2, P(('data', 'model'))),
    ('nvfp4_16x16', None, P('data', 'model')),
  )
  def test_every_shard_is_a_quantized_array(self, name, axis, spec):
    self._every_shard_is_a_quantized_array(name, axis, spec)

  @parameterized.parameters(
    ('nvfp4', -1, P('data', 'model')),
    ('mxfp4', -2, P('model', 'data')),
    ('mxfp4', -2, P(None, 'model')),
    ('int8_channel', -2, P('model', None)),
    ('e4m3fn_tensor', -1, P('model', 'data')),
  )
  @pytest.mark.slow
  def test_every_shard_of_more_formats(self, name, axis, spec):
    self._every_shard_is_a_quantized_array(name, axis, spec)

  def _every_shard_is_a_quantized_array(self, name, axis, spec):
    w = weights(256, 128)
    shapes = jax.eval_shape(
      lambda w: lowbit.quantize(w, formats.get(name), axis=axis), w
    )
    random = np.random.RandomState(1)
    q = jax.tree.map(
      lambda s: random.randint(0, 99, s.shape).astype(s.dtype), shapes
    )
    whole = NamedSharding(self.mesh, spec)
    placed = jax.device_put(q, lowbit.shardings(q, whole))
    self.assertTrue(placed.sharding.is_equivalent_to(whole, q.ndim))
    want = np.asarray(lowbit.dequantize(q))
    np.testing.assert_array_equal(lowbit.dequantize(placed), want)
    inside = jax.shard_map(
      lowbit.dequantize,
      mesh=self.mesh,
      in_specs=(lowbit.shardings(q, spec),),
      out_specs=spec,
    )
    np.testing.assert_array_equal(jax.jit(inside)(placed), want)

  def test_shapes_alone_will_do(self):
    q = abstract(weights(64, 8), axis=-2)
    placed = lowbit.shardings(q, P('model', None))
    self.assertEqual(placed.scale, P('model', None))

  def test_trees_take_a_tree_that_may_end_earlier(self):
    q = abstract(weights(64, 8), axis=-2)
    tree = {'layer': {'kernel': q, 'bias': np.zeros(8)}, 'rest': [q, q]}
    rule = {
      'layer': {'kernel': P('model'), 'bias': P()},
      'rest': P(None, 'model'),
    }
    placed = lowbit.shardings(tree, rule)
    self.assertEqual(placed['layer']['kernel'].scale, P('model', None))
    self.assertEqual(placed['layer']['bias'], P())
    for part in placed['rest']:
      self.assertEqual(part.codes, P(None, 'model'))
    rule['layer']['bias'] = P('model', None)
    with self.assertRaisesRegex(ValueError, 'more axes') as caught:
      lowbit.shardings(tree, rule)
    self.assertIn('bias', caught.exception.__notes__[0])

  def test_padded_axis_is_refused(self):
    q = abstract(weights(50, 8), axis=-2)
    with self.assertRaisesRegex(ValueError, 'padding and cannot be sharded'):
      lowbit.shardings(q, NamedSharding(self.mesh, P('model')))
    lowbit.shardings(q, NamedSharding(self.mesh, P(None, 'model')))

  def test_cut_blocks_are_refused(self):
    q = abstract(weights(64, 8), axis=-2)
    with self.assertRaisesRegex(ValueError, 'would cut blocks of 32'):
      lowbit.shardings(q, NamedSharding(self.mesh, P('model')))

  def test_other_arguments_are_refused(self):
    q = abstract(weights(64, 8))
    with self.assertRaisesRegex(TypeError, 'NamedSharding or a PartitionSpec'):
      lowbit.shardings(q, 'model')
    with self.assertRaisesRegex(ValueError, 'more axes'):
      lowbit.shardings(q, P(None, None, 'model'))


if __name__ == '__main__':
  absltest.main()
