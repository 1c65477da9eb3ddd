"""Biases that make up for mean errors, and the trap that held_out is for."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, ptq, transforms
from tests.ptq import blocks, language_models

_UP = 'up/kernel'


def model(params, x):
  return x @ params[_UP] + params['up/bias']


def layer(seed=0):
  """(params, x) behind a ReLU, so that means of activations are not 0."""
  source = np.random.default_rng(seed)
  params = {
    _UP: source.standard_normal((64, 32)),
    'up/bias': source.standard_normal(32),
  }
  x = np.maximum(source.standard_normal((1024, 64)), 0)
  return jax.tree.map(jnp.float32, (params, x))


def quantized(params, fmt=None):
  fmt = fmt or formats.per_tensor(formats.int4)
  return nn.quantize_params(params, None, fmt, axis=-2)


def dense(q):
  return np.asarray(lowbit.dequantize(q, jnp.float32), np.float64)


def error(x, params, q):
  x, w = (np.asarray(a, np.float64) for a in (x, params[_UP]))
  lost = x @ (dense(q[_UP]) - w)
  change = np.asarray(q['up/bias'], np.float64) - np.asarray(params['up/bias'])
  return ((lost + change) ** 2).mean()


class CorrectionTest(parameterized.TestCase):
  def test_against_float64(self):
    params, x = layer()
    q = quantized(params)
    got = ptq.correct_biases(params, q, ptq.calibrate(model, params, [x]))
    mean = np.asarray(x, np.float64).mean(0)
    lost = np.asarray(params[_UP], np.float64) - dense(q[_UP])
    want = np.asarray(params['up/bias']) + mean @ lost
    np.testing.assert_allclose(got['up/bias'], want, atol=1e-5)
    self.assertIs(got[_UP], q[_UP])
    # The mean of the outputs is that of the float model.
    outputs = x @ dense(got[_UP]) + got['up/bias']
    np.testing.assert_allclose(
      outputs.mean(0), model(params, x).mean(0), atol=1e-4
    )

  def test_errors_become_less(self):
    """On other activations: .73 of the error (int4, one scale)."""
    params, x = layer()
    _, other = layer(1)
    q, observed = quantized(params), ptq.calibrate(model, params, [x])
    before = error(other, params, q)
    for held_out in (None, ptq.calibrate(model, params, [other])):
      got = ptq.correct_biases(params, q, observed, held_out=held_out)
      self.assertLess(error(other, params, got), 0.8 * before)

  def test_twice_is_once(self):
    params, x = layer()
    observed = ptq.calibrate(model, params, [x])
    once = ptq.correct_biases(params, quantized(params), observed)
    twice = ptq.correct_biases(params, once, observed)
    np.testing.assert_array_equal(once['up/bias'], twice['up/bias'])

  def test_trap(self):
    """One token in 20 has a huge activation on a weight that rounds badly.

    The mean error of all tokens is its own: corrected, it has a little less and
    all others have what they did not have. Batches without it refuse.
    """
    params, x = layer()
    params = {**params, _UP: params[_UP].at[0].set(7.9)}
    others = x.at[:, 0].set(0)
    x = others.at[::20, 0].set(100)
    q = quantized(params, formats.mxfp4)
    observed, without = (
      ptq.calibrate(model, params, [batch]) for batch in (x, others)
    )
    plain = ptq.correct_biases(params, q, observed)
    guarded = ptq.correct_biases(params, q, observed, held_out=without)
    np.testing.assert_array_equal(guarded['up/bias'], params['up/bias'])
    # Batches with it do not: the error of the layer is less.
    passed = ptq.correct_biases(params, q, observed, held_out=observed)
    np.testing.assert_array_equal(passed['up/bias'], plain['up/bias'])
    self.assertLess(error(x, params, plain), error(x, params, q))
    self.assertGreater(
      error(others, params, plain), 10 * error(others, params, q)
    )

  def test_of_few_tokens(self):
    """The mean of 2 tokens helps them, and not others."""
    params, x = layer()
    x = x - 0.4  # of a mean that is near 0
    q = quantized(params)
    observed = ptq.calibrate(model, params, [x[:2]])
    held_out = ptq.calibrate(model, params, [x[2:]])
    plain = ptq.correct_biases(params, q, observed)
    self.assertGreater(error(x[2:], params, plain), error(x[2:], params, q))
    guarded = ptq.correct_biases(params, q, observed, held_out=held_out)
    np.testing.assert_array_equal(guarded['up/bias'], params['up/bias'])


class TreesTest(parameterized.TestCase):
  def test_layers_of_a_stack_one_by_one(self):
    """Each has its mean, and each is judged by itself."""
    params = blocks.params()
    path, bias = 'blocks/up/kernel', 'blocks/up/bias'
    observed = blocks.observed(params)
    q = nn.quantize_params(
      params, 'kernel', formats.int4_channel, axis=-2, stacked='kernel'
    )
    got = ptq.correct_biases(params, q, observed)
    lost = np.asarray(params[path], np.float64) - dense(q[path])
    mean = np.asarray(observed[path]['spread'].mean, np.float64)
    change = np.einsum('li,lio->lo', mean, lost)
    np.testing.assert_allclose(got[bias], params[bias] + change, atol=1e-5)
    np.testing.assert_array_equal(
      got['blocks/norm/bias'], params['blocks/norm/bias']
    )
    # Batches whose second layer meets the opposite refuse its correction.
    seen = observed[path]
    opposite = seen['spread'].mean * jnp.array([[1.0], [-1.0]])
    spread = seen['spread']._replace(mean=opposite)
    held_out = {**observed, path: {**seen, 'spread': spread}}
    guarded = ptq.correct_biases(params, q, observed, held_out=held_out)
    np.testing.assert_array_equal(guarded[bias][0], got[bias][0])
    np.testing.assert_array_equal(guarded[bias][1], params[bias][1])

  def test_state_of_a_quantized_model(self):
    """All linear layers of an encoder have biases; norms keep theirs."""
    model = language_models.berts()
    run, params = language_models.states(model)
    observed = ptq.calibrate(run, params, [language_models.tokens()])
    made = lowbit.nn.nnx.quantize(model, 'kernel', formats.mxfp4)
    before = nnx.state(made)
    after = ptq.correct_biases(params, before, observed)
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(before))
    changed = {
      '/'.join(map(str, path[2:-1]))
      for (path, old), (_, new) in zip(
        nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True
      )
      if path[-1] == 'bias' and (old[...] != new[...]).any()
    }
    attention = ('query', 'key', 'value', 'out')
    linears = {f'attention/{name}' for name in attention}
    self.assertEqual(changed, linears | {'mlp/up', 'mlp/down'})

  def test_behind_a_transform(self):
    params, x = layer()
    rotation = transforms.Hadamard(32)
    kernel = lowbit.quantize(
      rotation.apply_dual(params[_UP]), formats.mxfp4, axis=-2
    )
    q = {**params, _UP: lowbit.ops.Transformed(kernel, rotation, -2)}
    got = ptq.correct_biases(params, q, ptq.calibrate(model, params, [x]))
    outputs = x @ dense(got[_UP]) + got['up/bias']
    np.testing.assert_allclose(
      outputs.mean(0), model(params, x).mean(0), atol=1e-4
    )

  def test_heads_and_windows(self):
    """Kernels that contract, or give, several axes."""
    source = np.random.default_rng(0)
    x = jnp.float32(source.random((20, 8, 4)))
    params = {
      'dense/kernel': jnp.float32(source.standard_normal((8, 4, 2, 16))),
      'dense/bias': jnp.zeros((2, 16)),
      'conv/kernel': jnp.float32(source.standard_normal((3, 4, 16))),
      'conv/bias': jnp.zeros(16),
    }

    def model(params, x):
      heads = jnp.einsum('bij,ijhs->bhs', x, params['dense/kernel'])
      windows = jax.lax.conv_general_dilated(
        x,
        params['conv/kernel'],
        (1,),
        'VALID',
        None,
        None,
        ('NWC', 'WIO', 'NWC'),
      )
      return heads + params['dense/bias'], windows + params['conv/bias']

    fmt = formats.per_tensor(formats.int4)
    q = nn.quantize_params(params, None, fmt, axis=-2)
    got = ptq.correct_biases(params, q, ptq.calibrate(model, params, [x]))
    dense = {path: jnp.asarray(leaf) for path, leaf in got.items()}
    old, new = (
      [out.reshape(-1, *out.shape[-rank:]).mean(0) for out, rank in outs]
      for outs in (
        zip(model(tree, x), (2, 1), strict=True) for tree in (params, dense)
      )
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), old, new
    )

  def test_kernels_without_a_bias_stay(self):
    params, x = layer()
    del params['up/bias']
    q = quantized(params)
    got = ptq.correct_biases(params, q, {})
    self.assertIs(got[_UP], q[_UP])

  def test_in_the_dtype_of_the_bias(self):
    params, x = layer()
    observed = ptq.calibrate(model, params, [x])
    params['up/bias'] = params['up/bias'].astype(jnp.bfloat16)
    got = ptq.correct_biases(params, quantized(params), observed)['up/bias']
    self.assertEqual(got.dtype, jnp.bfloat16)
    self.assertTrue((got != params['up/bias']).any())

  def test_wrong_calls(self):
    params, x = layer()
    q, observed = quantized(params), ptq.calibrate(model, params, [x])
    for message, floats, seen in (
      ('before they were', q, observed),
      ('has nothing at', {}, observed),
      ('before they were', {**params, 'up/bias': jnp.ones(3)}, observed),
      ('no activations were recorded', params, {'other': observed[_UP]}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        ptq.correct_biases(floats, q, seen)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
    q = nn.quantize_params(stack, _UP, formats.mxfp4, axis=-2, stacked=_UP)
    with self.assertRaisesRegex(ValueError, 'scans over the layers'):
      ptq.correct_biases(stack, q, observed)


if __name__ == '__main__':
  absltest.main()
