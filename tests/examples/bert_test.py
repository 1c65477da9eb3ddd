"""The BERT family: parity with transformers, tables, pooling, refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import lowbit_jax as lowbit
from models import bert, bert_config, bert_names
from tests.examples import berts

_PLAIN = bert_config.Config(40, 32, 64, 2, 4, 16)
_MODEL = {
  'model_type': 'bert',
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 16,
  'type_vocab_size': 2,
  'layer_norm_eps': 1e-12,
  'hidden_act': 'gelu',
}


class ParityTest(berts.FolderTest, parameterized.TestCase):
  @parameterized.parameters(*berts.CASES)
  def test_states_are_those_of_transformers(self, case):
    found = berts.golden(case)
    kept = found['mask'] == 1
    states, pooled = berts.run(
      berts.model(case), found['tokens'], kept, found['types']
    )
    self.assertLess(berts.relative(states[kept], found['states'][kept]), 2e-5)
    if 'pooled' in found:
      self.assertLess(berts.relative(pooled, found['pooled']), 2e-5)

  def test_only_what_is_not_masked_matters(self):
    found, model = berts.golden('bert'), berts.model('bert')
    tokens, types = found['tokens'], found['types']
    kept = found['mask'] == 1
    want = berts.run(model, tokens, kept, types)[0][kept]
    other = np.where(kept, tokens, 9), kept, np.where(kept, types, 1)
    np.testing.assert_array_equal(berts.run(model, *other)[0][kept], want)
    for changed in (
      (tokens, np.ones_like(kept), types),
      (tokens, kept, 1 - types),
    ):
      got, _ = berts.run(model, *changed)
      self.assertGreater(berts.relative(got[kept], want), 0.01)

  def test_scales_can_be_folded_into_followers(self):
    found, model = berts.golden('bert'), berts.model('bert')
    inputs = found['tokens'], found['mask'], found['types']
    want, _ = berts.run(model, *inputs)
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    values = berts.leaves(model)
    scale = 2.0 ** np.arange(-16, 16, dtype=np.float32)
    changed = {}
    for path, followers in bert_names.FOLLOWERS.items():
      for name in (path, path.replace('kernel', 'bias')):
        changed[name] = values[f'stacks/0/{name}'] * scale
      for name in followers:
        changed[name] = values[f'stacks/0/{name}'] / scale[:, None]
    changed = {f'stacks/0/{k}': jnp.array(v) for k, v in changed.items()}
    got, _ = berts.run(lowbit.nn.nnx.assign(model, changed), *inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  def test_old_names_and_prefixes(self):
    found = berts.golden('bert')
    want = berts.leaves(berts.model('bert'))
    old = {}
    for name, value in found['weights'].items():
      if 'LayerNorm' in name:
        name = name.replace('weight', 'gamma').replace('bias', 'beta')
      old[f'encoders.bert.{name}'] = value
    old['cls.predictions.bias'] = np.zeros(40, np.float32)
    berts.save(self.folder, old)
    got = berts.leaves(berts.read(berts.model('bert').config, self.folder))
    self.assertEqual(got.keys(), want.keys())
    for path, value in want.items():
      np.testing.assert_array_equal(got[path], value, path)


class ModelTest(parameterized.TestCase):
  def shapes_of(self, config):
    """A model without numbers."""
    return nnx.eval_shape(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))

  @parameterized.parameters('mean', 'cls')
  def test_pooling(self, pooling):
    config = dataclasses.replace(_PLAIN, pooling=pooling)
    unit = self.shapes_of(dataclasses.replace(config, normalized=True))
    random = np.random.RandomState(0)
    states = random.standard_normal((3, 5, 32)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2], [1]])
    want = whole = states[:, 0]
    if pooling == 'mean':
      rows = [s[m].mean(axis=0) for s, m in zip(states, mask, strict=True)]
      want, whole = np.array(rows), states.mean(axis=1)
    plain = self.shapes_of(config)
    np.testing.assert_allclose(plain.pooled(states), whole, atol=1e-6)
    np.testing.assert_allclose(plain.pooled(states, mask), want, atol=1e-6)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(unit.pooled(states, mask), want, atol=1e-6)

  def test_stacks_hold_all_blocks(self):
    with self.assertRaisesRegex(bert_config.ConfigError, 'blocks=2'):
      bert.Bert(_PLAIN, [1, 2], rngs=nnx.Rngs(0))

  def test_refuses_what_it_has_no_tables_for(self):
    model = self.shapes_of(dataclasses.replace(_PLAIN, types=0))
    tokens = np.zeros((1, 17), np.int32)
    with self.assertRaisesRegex(ValueError, '17 tokens.*context=16; cut'):
      model.states(tokens)
    with self.assertRaisesRegex(ValueError, 'pass types=None'):
      model.states(tokens[:, :3], types=tokens[:, :3])


class ConfigTest(parameterized.TestCase):
  def test_positions_after_padding(self):
    values = _MODEL | {'model_type': 'roberta', 'pad_token_id': 2}
    config = bert_config.from_huggingface(values)
    self.assertEqual((config.context, config.offset), (13, 3))

  @parameterized.parameters(
    ({'model_type': 'mpnet'}, "model_type is 'mpnet'.*'bert' or 'camembert'"),
    ({'position_embedding_type': 'relative_key'}, "is read is 'absolute'"),
    ({'is_decoder': True}, 'is_decoder is True'),
    ({'hidden_act': 'swish'}, "hidden_act is 'swish'.*'gelu' or"),
    ({'hidden_size': 30}, 'heads=4 must divide width=30'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0.* at least 1'),
    ({'vocab_size': '40'}, "vocab_size is '40'"),
    ({'hidden_size': None}, 'hidden_size is missing'),
    (
      {'model_type': 'roberta', 'max_position_embeddings': 2},
      'context=0 must be at least 1',
    ),
  )
  def test_refusals(self, changes, words):
    with self.assertRaisesRegex(bert_config.ConfigError, words):
      bert_config.from_huggingface(_MODEL | changes)


if __name__ == '__main__':
  absltest.main()
