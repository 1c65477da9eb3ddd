"""Scales that move from one layer into the next, with outputs as they were."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax._tree import by_name
from lowbit_jax.ptq import _folding
from tests.ptq import blocks, language_models

_UP = {'up/kernel': ('down/kernel',)}


def random_scales(leaves, followers, head_size=None):
  random = np.random.default_rng(2)
  return {
    fold.leader: np.exp(random.standard_normal(fold.shape)).astype(np.float32)
    for fold in _folding.find(leaves, followers, head_size)
  }


class FunctionTest(parameterized.TestCase):
  """What a model computes stays the same."""

  def check(self, model, params, x, followers, head_size=None):
    scales = random_scales(by_name(params)[0], followers, head_size)
    folded = ptq.fold(params, followers, scales, head_size=head_size)
    self.assertEqual(jax.tree.structure(folded), jax.tree.structure(params))
    self.assertLess(blocks.relative(model(folded, x), model(params, x)), 1e-5)
    before, after = by_name(params)[0], by_name(folded)[0]
    changed = {k for k in before if np.any(np.asarray(before[k]) != after[k])}
    self.assertContainsSubset(scales, changed)
    return changed

  def test_blocks(self):
    changed = self.check(
      blocks.apply,
      blocks.params(),
      blocks.activations(),
      blocks.FOLLOWERS,
      blocks.HEAD_SIZE,
    )
    self.assertEqual(changed, set(blocks.params()))

  @parameterized.named_parameters(
    ('plain', {}),
    ('biases', {'biases': ('query', 'key', 'value', 'out', 'up', 'down')}),
    ('experts', {'experts': 4, 'chosen': 2}),
    ('tied', {'tied': True}),
  )
  def test_llama(self, options):
    model, params = language_models.logits(language_models.llamas(**options))
    changed = self.check(
      model,
      params,
      language_models.tokens(),
      language_models.OF_LLAMA,
      language_models.HEAD_SIZE,
    )
    self.assertEqual('norm/scale' in changed, 'tied' not in options)

  def test_bert(self):
    model, params = language_models.states(language_models.berts())
    x = language_models.tokens()
    self.check(model, params, x, language_models.OF_BERT)

  def test_values_by_path(self):
    """As `nn.nnx.assign` takes them."""
    model = language_models.berts()
    run, params = language_models.states(model)
    x = language_models.tokens()
    want = run(params, x)
    values = {
      '/'.join(map(str, path)): variable.get_raw_value()
      for path, variable in nnx.to_flat_state(params)
    }
    scales = random_scales(values, language_models.OF_BERT)
    values = ptq.fold(values, language_models.OF_BERT, scales)
    lowbit.nn.nnx.assign(model, values)
    got = run(nnx.state(model), x)
    self.assertLess(blocks.relative(got, want), 1e-5)


class NumbersTest(parameterized.TestCase):
  def test_heads_that_several_share(self):
    """Channels 0 and 1 are of the first head, which two heads share."""
    params = {
      'value': {'kernel': jnp.ones((1, 4)), 'bias': jnp.ones(4)},
      'out': {'kernel': jnp.ones((8, 1))},
    }
    scale = {'value/kernel': np.array([1, 2, 4, 8])}
    folded = ptq.fold(
      params, {'value/kernel': ('out/kernel',)}, scale, head_size=2
    )
    inverse = [1, 0.5, 0.25, 0.125]
    np.testing.assert_array_equal(folded['value']['kernel'], [inverse])
    np.testing.assert_array_equal(folded['value']['bias'], inverse)
    np.testing.assert_array_equal(
      folded['out']['kernel'][:, 0], [1, 2, 1, 2, 4, 8, 4, 8]
    )

  def test_layers_of_a_stack_one_by_one(self):
    params = blocks.params()
    scales = random_scales(params, blocks.FOLLOWERS, blocks.HEAD_SIZE)

    def folded(params, scales):
      return ptq.fold(
        params, blocks.FOLLOWERS, scales, head_size=blocks.HEAD_SIZE
      )

    whole = folded(params, scales)
    for i in range(blocks.BLOCKS):
      one = folded(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, scales)))
      for path, leaf in one.items():
        np.testing.assert_array_equal(whole[path][i], leaf)

  def test_powers_of_two_are_exact_in_bfloat16(self):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), blocks.params())
    scale = 2.0 ** np.random.default_rng(0).integers(
      -3, 3, (blocks.BLOCKS, blocks.HIDDEN)
    )
    there = ptq.fold(params, _UP, {'blocks/up/kernel': scale})
    back = ptq.fold(there, _UP, {'blocks/up/kernel': 1 / scale})
    jax.tree.map(np.testing.assert_array_equal, back, params)
    self.assertEqual(there['blocks/up/kernel'].dtype, jnp.bfloat16)

  def test_under_jit(self):
    params = blocks.params()
    scale = {'blocks/up/kernel': np.full((blocks.BLOCKS, blocks.HIDDEN), 2.0)}
    want = ptq.fold(params, _UP, scale)
    got = jax.jit(lambda p, s: ptq.fold(p, _UP, s))(params, scale)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_names_end_at_a_slash(self):
    params = {
      name: jnp.ones((2, 2)) for name in ('up/kernel', 'group/kernel', 'x/up')
    }
    with self.assertRaisesRegex(ValueError, "'p/kernel' folds nothing"):
      _folding.find(params, {'p/kernel': ('up/kernel',)})


class WrongCallsTest(absltest.TestCase):
  def check(self, message, params=None, followers=None, scales=None, **options):
    params = blocks.params() if params is None else params
    with self.assertRaisesRegex(ValueError, message):
      ptq.fold(params, followers or _UP, scales or {}, **options)

  def test_followers(self):
    self.check('folds nothing', followers={'a/kernel': ('b/kernel',)})
    self.check('must be a tuple', followers={'up/kernel': 'down/kernel'})
    self.check(
      'does not take the outputs', followers={'up/kernel': ('gate/kernel',)}
    )
    values = {'value/kernel': ('out/kernel',)}
    self.check('24 rows for the 12 outputs', followers=values)
    self.check('head_size=5 must be', followers=values, head_size=5)
    self.check('head_size=0 must be', head_size=0)

  def test_parameters(self):
    params = blocks.params()
    q = lowbit.quantize(params['blocks/down/kernel'], formats.mxfp4, axis=-2)
    self.check('before weights', {**params, 'blocks/down/kernel': q})
    self.check(
      'array of floats',
      {**params, 'blocks/up/kernel': params['blocks/up/kernel'].astype(int)},
    )
    self.check(
      'does not fit the outputs', {**params, 'blocks/up/bias': jnp.ones(3)}
    )
    self.check(
      'must have 2 axes', {'up/kernel': jnp.ones(3), 'down/kernel': jnp.eye(3)}
    )
    twice = {'up/kernel': jnp.eye(3), 'up': {'kernel': jnp.eye(3)}}
    self.check("two leaves have the path 'up/kernel'", twice)

  def test_scales(self):
    ones = np.ones((blocks.BLOCKS, blocks.HIDDEN))
    self.check('leads nothing', scales={'blocks/gate/kernel': ones})
    self.check('must have the shape', scales={'blocks/up/kernel': ones[0]})
    for bad in (0, -1, np.inf, np.nan):
      self.check('positive and finite', scales={'blocks/up/kernel': bad * ones})


if __name__ == '__main__':
  absltest.main()
