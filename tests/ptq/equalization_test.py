"""Ranges of weights that both sides share, and what that is good for."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from tests.ptq import blocks, language_models

_DOWN = {'up/kernel': ('down/kernel',)}


def relu_network():
  """(params, x): rows of the first layer have very different ranges."""
  source = np.random.default_rng(0)
  ranges = np.exp(1.5 * source.standard_normal(64))
  params = {
    'up/kernel': source.standard_normal((32, 64)) * ranges,
    'up/bias': source.standard_normal(64) * ranges,
    'down/kernel': source.standard_normal((64, 16)),
  }
  x = source.standard_normal((512, 32))
  return jax.tree.map(jnp.float32, (params, x))


def relu(params, x):
  x = jax.nn.relu(x @ params['up/kernel'] + params['up/bias'])
  return x @ params['down/kernel']


class EqualizationTest(parameterized.TestCase):
  def test_by_hand(self):
    """Ranges 8 and 2 become 4, and so do 1 and 16; nothing meets nothing."""
    params = {
      'up/kernel': jnp.array([[8.0, 1.0, 5.0], [-4.0, -0.5, 0.0]]),
      'up/bias': jnp.array([2.0, 1.0, 1.0]),
      'down/kernel': jnp.array([[2.0, -1.0], [4.0, 16.0], [0.0, 0.0]]),
    }
    got = ptq.equalize(params, _DOWN)
    np.testing.assert_array_equal(got['up/kernel'], [[4, 4, 5], [-2, -2, 0]])
    np.testing.assert_array_equal(got['up/bias'], [1, 4, 1])
    np.testing.assert_array_equal(got['down/kernel'], [[4, -2], [1, 4], [0, 0]])

  def test_ranges_of_stacks_and_shared_heads(self):
    params = blocks.params()
    got = ptq.equalize(params, blocks.FOLLOWERS, head_size=blocks.HEAD_SIZE)
    kernels = {
      tree: {
        name: np.asarray(leaves[f'blocks/{name}/kernel'], np.float64)
        for name in ('value', 'out', 'up', 'down')
      }
      for tree, leaves in (('old', params), ('new', got))
    }

    def ranges(w):
      outputs = {name: abs(w[name]).max(-2) for name in ('value', 'up')}
      rows = {name: abs(w[name]).max(-1) for name in ('out', 'down')}
      groups = blocks.HEADS // blocks.KV_HEADS
      heads = -1, blocks.KV_HEADS, groups, blocks.HEAD_SIZE
      out = rows['out'].reshape(heads).max(2)
      out = out.reshape(blocks.BLOCKS, -1)
      return (outputs['value'], out), (outputs['up'], rows['down'])

    old, new = ranges(kernels['old']), ranges(kernels['new'])
    for (r1, r2), after in zip(old, new, strict=True):
      for side in after:
        np.testing.assert_allclose(side, np.sqrt(r1 * r2), rtol=1e-5)
    for path in ('blocks/norm/scale', 'blocks/norm/bias', 'blocks/gate/kernel'):
      np.testing.assert_array_equal(got[path], params[path])

  def test_outputs_stay(self):
    params, x = blocks.params(), blocks.activations()
    got = ptq.equalize(params, blocks.FOLLOWERS, head_size=blocks.HEAD_SIZE)
    self.assertLess(
      blocks.relative(blocks.apply(got, x), blocks.apply(params, x)), 1e-5
    )
    params, x = relu_network()
    got = ptq.equalize(params, _DOWN)
    self.assertLess(blocks.relative(relu(got, x), relu(params, x)), 1e-5)

  def test_llama(self):
    model, params = language_models.logits(language_models.llamas())
    x = language_models.tokens()
    got = ptq.equalize(
      params, language_models.OF_LLAMA, head_size=language_models.HEAD_SIZE
    )
    self.assertLess(blocks.relative(model(got, x), model(params, x)), 1e-5)

  def test_passes_until_chains_are_even(self):
    """Of a -> b -> c, b's ranges change twice in each pass."""
    source = np.random.default_rng(0)
    params = {
      f'{name}/kernel': jnp.float32(
        source.standard_normal((16, 16)) * np.exp(source.standard_normal(16))
      )
      for name in 'abc'
    }
    followers = {'a/kernel': ('b/kernel',), 'b/kernel': ('c/kernel',)}

    def unevenness(params):
      a, b, c = (abs(np.asarray(params[f'{name}/kernel'])) for name in 'abc')
      ratios = a.max(0) / b.max(1), b.max(0) / c.max(1)
      return abs(np.log(ratios)).max()

    once = ptq.equalize(params, followers, iterations=1)
    often = ptq.equalize(params, followers, threshold=1e-4)
    self.assertGreater(unevenness(once), 0.05)
    self.assertLess(unevenness(often), 1e-3)
    chain = lambda p: p['a/kernel'] @ p['b/kernel'] @ p['c/kernel']
    self.assertLess(blocks.relative(chain(often), chain(params)), 1e-5)

  def test_errors_of_one_scale_for_a_tensor_become_less(self):
    params, x = relu_network()
    want = np.asarray(relu(params, x))

    def error(params, bits):
      fmt = formats.per_tensor(formats.get(f'int{bits}'))
      kernels = {
        path: jnp.asarray(lowbit.quantize(leaf, fmt, axis=-2))
        for path, leaf in params.items()
        if path.endswith('kernel')
      }
      got = np.asarray(relu(params | kernels, x))
      return ((got - want) ** 2).sum() / (want**2).sum()

    got = ptq.equalize(params, _DOWN)
    for bits in (8, 4):
      before, after = error(params, bits), error(got, bits)
      self.assertLess(after, 0.5 * before)

  def test_wrong_calls(self):
    params = blocks.params()
    for message, options in (
      ('iterations=0', {'iterations': 0}),
      ('threshold=0', {'threshold': 0}),
      ('threshold=nan', {'threshold': float('nan')}),
      ('head_size=None', {'followers': blocks.FOLLOWERS}),
      ('leaders none folds nothing', {'followers': {'norm/scale': ()}}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        ptq.equalize(params, **{'followers': _DOWN} | options)


if __name__ == '__main__':
  absltest.main()
