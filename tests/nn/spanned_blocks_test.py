"""Blocks that run through several contracted axes of a weight."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, qarray

HEADS, SIZE, OUT = 8, 4, 16


def data(*shape, seed: int = 0) -> np.ndarray:
  x = np.random.RandomState(seed).standard_normal(shape)
  return x.astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(w, fmt, axis):
  return lowbit.quantize(w, fmt, axis=axis)


einsum = jax.jit(lowbit.einsum, static_argnums=0)


class SpannedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.w = data(HEADS, SIZE, OUT)
    self.x = data(5, HEADS, SIZE, seed=1)

  def check(self, name):
    """As one axis of heads * size, in all that a weight is used for."""
    fmt = formats.get(name)
    rows = quantize(self.w.reshape(-1, OUT), fmt, 0)
    q = quantize(self.w, fmt, (0, 1))
    self.assertIs(qarray.validate(q), q)
    self.assertEqual((q.shape, q.nbytes), (self.w.shape, rows.nbytes))
    dense = np.asarray(rows).reshape(q.shape)
    np.testing.assert_array_equal(q, dense)
    np.testing.assert_array_equal(q[..., 3], dense[..., 3])
    want = lowbit.dot(self.x.reshape(5, -1), rows)
    got = einsum('bhs,hso->bo', self.x, q)
    np.testing.assert_allclose(got, want, 1e-6, 1e-6 * np.abs(want).max())

  @parameterized.parameters('nvfp4', 'uint4_g32')
  def test_is_one_axis_of_heads_and_sizes(self, name):
    self.check(name)

  @parameterized.parameters('mxfp4', 'int8_channel', 'e4m3fn_tensor')
  @pytest.mark.slow
  def test_is_one_axis_in_more_formats(self, name):
    self.check(name)

  def test_products_find_the_axes_wherever_they_are(self):
    q = quantize(self.w, formats.mxfp4, (0, 1))
    for subscripts, x in (
      ('bhs,hso->ob', self.x),
      ('hbs,hso->bo', self.x.transpose(1, 0, 2)),  # apart in x: decoded
      ('sbh,hso->bo', self.x.transpose(2, 0, 1)),
      ('bh,hso->bso', self.x[..., 0]),
    ):
      with self.subTest(subscripts):
        want = np.einsum(subscripts, x.astype(np.float64), np.asarray(q))
        got = einsum(subscripts, x, q)
        np.testing.assert_allclose(got, want, 1e-5, 1e-5)
    choice = lowbit.select_implementation('einsum', 'bhs,hso->bo', self.x, q)
    self.assertEqual(choice.note, 'scan over tiles of the weight')
    free = ('bh,hso->bso', self.x[..., 0], q)
    choice = lowbit.select_implementation('einsum', *free)
    self.assertIn('not contracted together', choice.note)

  def test_stacks_shards_and_gradients(self):
    quantize_one = lambda w: lowbit.quantize(w, formats.mxfp4, axis=(-3, -2))
    stack = jax.eval_shape(jax.vmap(quantize_one), np.stack([self.w] * 3))
    self.assertEqual(stack.shape, (3, HEADS, SIZE, OUT))
    q = jax.eval_shape(quantize_one, np.zeros((64, 32, 16), np.float32))
    placed = lowbit.shardings(q, P('model', None, None))
    self.assertEqual(placed.scale, P('model', None))
    with self.assertRaisesRegex(ValueError, 'shard the first'):
      lowbit.shardings(q, P(None, 'model'))
    x, w = jnp.asarray(self.x), jnp.asarray(self.w)
    fake = lambda w: lowbit.fake_quant(w, formats.mxfp4, axis=(0, 1))
    y, pull = jax.vjp(jax.jit(fake), w)
    np.testing.assert_array_equal(y, quantize(self.w, formats.mxfp4, (0, 1)))
    np.testing.assert_array_equal(pull(w)[0], w)
    q = quantize(self.w, formats.mxfp4, (0, 1))
    grad = jax.grad(lambda x: jnp.sum(lowbit.einsum('bhs,hso->bo', x, q)))(x)
    want = np.broadcast_to(np.asarray(q).sum(-1), x.shape)
    np.testing.assert_allclose(grad, want, 1e-5, 1e-5)

  def test_refusals_name_the_remedy(self):
    q = quantize(self.w, formats.mxfp4, (0, 1))
    with self.assertRaisesRegex(ValueError, 'adjacent axes in ascending'):
      lowbit.quantize(self.w, formats.mxfp4, axis=(0, 2))
    with self.assertRaisesRegex(IndexError, 'span axes .* dequantize'):
      _ = q[2:]
    with self.assertRaisesRegex(ValueError, 'dequantize'):
      _ = q.T
    self.assertEqual(q.reshape(HEADS * SIZE, OUT).shape, (32, OUT))


class ModelTest(parameterized.TestCase):
  def test_attention_of_small_heads(self):
    """Heads of 4 would be padded to blocks of 32: 34 bits per element."""
    model = linen.MultiHeadDotProductAttention(num_heads=8)
    x = data(2, 3, 32)
    params = jax.jit(model.init)(jax.random.key(0), x)['params']
    q = nn.quantize_params(params, None, formats.mxfp4)
    for leaf in jax.tree.leaves(q, is_leaf=qarray.is_qarray):
      if qarray.is_qarray(leaf):
        self.assertEqual(leaf.bits_per_element, 4.25)
    dense = jax.tree.map(np.asarray, q, is_leaf=qarray.is_qarray)
    want = jax.jit(model.apply)({'params': dense}, x)
    packed = lowbit.packed(model.apply, strict=True)
    got = jax.jit(packed)({'params': q}, x)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)

  def test_convolution(self):
    model = nnx.Conv(4, 8, (4, 8), rngs=nnx.Rngs(0))
    before = model.kernel.get_raw_value()
    nn.nnx.quantize(model, None, formats.get('int4_g128'))
    q = model.kernel.get_raw_value()
    self.assertEqual(q.shape, before.shape)
    self.assertEqual(q.bits_per_element, 4.25)
    plain = nnx.Conv(4, 8, (4, 8), rngs=nnx.Rngs(0))
    plain.kernel.set_value(jnp.asarray(q))
    x = data(1, 8, 8, 4)
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(run(model, x), run(plain, x))

  def test_costly_padding_is_said_with_the_format_that_fits(self):
    for rows, name, message in (
      (192, 'int4_g128', "33 % to 'kernel'.*use int4_g64"),
      (50, 'mxfp8_e4m3_32x32', 'bfloat16'),
    ):
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        nn.quantize_params({'kernel': data(rows, 8)}, None, formats.get(name))
      self.assertRegex(str(caught[0].message), message)


if __name__ == '__main__':
  absltest.main()
