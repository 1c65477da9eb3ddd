"""Models of sentences: folders, GGUF files, a mesh, embeddings."""

import collections
import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import Mesh

import lowbit_jax as lowbit
from lowbit_jax.io import gguf, safetensors
from models import bert, bert_config, bert_names
from support import sentence_models, weights
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
_Encoding = collections.namedtuple('_Encoding', 'ids')


class _Letters:
  """A tokenizer of one token for each letter, between two others."""

  def encode_batch(self, texts):
    return [
      _Encoding([1, *(4 + ord(c) % 36 for c in text), 2]) for text in texts
    ]


class SentencesTest(berts.FolderTest, parameterized.TestCase):
  def write(self, name, content):
    """Text or JSON into a file of the folder."""
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)

  def load(self, **options):
    with mock.patch.object(
      sentence_models, '_tokenizer', return_value=_Letters()
    ):
      return sentence_models.load(self.folder, **options)

  def small(self, pooling, stages=('Transformer', 'Pooling', 'Normalize')):
    """A folder of sentence-transformers."""
    shapes = {
      name: value.shape
      for name, value in berts.golden('bert')['weights'].items()
    }
    shapes['embeddings.position_embeddings.weight'] = 16, 32
    berts.save(self.folder, berts.parameters(shapes))
    paths = {'Transformer': '', 'Pooling': '1_Pooling'}
    modules = [
      {'type': f'sentence_transformers.models.{k}', 'path': paths.get(k, k)}
      for k in stages
    ]
    self.write('config.json', _MODEL)
    self.write('modules.json', modules)
    self.write('1_Pooling/config.json', pooling)

  def test_reads_folders_of_sentence_transformers(self):
    self.small({'pooling_mode_cls_token': False, 'pooling_mode_mean_tokens': 1})
    config = self.load().config
    self.assertEqual((config.pooling, config.normalized), ('mean', True))
    self.small({'pooling_mode': 'cls'}, ['Transformer', 'Pooling'])
    config = self.load().config
    self.assertEqual((config.pooling, config.normalized), ('cls', False))
    (self.folder / 'modules.json').unlink()
    self.assertEqual(self.load().config.pooling, 'mean')

  def test_each_sentence_gets_its_own_embedding(self):
    model = sentence_models.SentenceModel(
      nnx.eval_shape(lambda: bert.Bert(_PLAIN, rngs=nnx.Rngs(0))),
      dataclasses.replace(_PLAIN, context=50),
      _Letters(),
      {},
    )
    shapes = []

    def ids(graph, state, tokens, mask):
      del graph, state
      shapes.append(tokens.shape)
      self.assertFalse(tokens[~mask].any())
      return np.pad(tokens, [(0, 0), (0, 32)])[:, :32] * 1.0

    sentences = ['red', '', 'x' * 20, 'red and', 'y' * 15, 'z' * 14, 'w' * 40]
    with mock.patch.object(sentence_models, '_embeddings', ids):
      got = model.embed(sentences, batch=2)
      self.assertEqual(model.embed([]).shape, (0, 32))
    for row, encoding in zip(
      got, model.tokenizer.encode_batch(sentences), strict=True
    ):
      want = (encoding.ids + [0] * 32)[:32]
      np.testing.assert_array_equal(row, want)
    self.assertEqual(shapes, [(2, 16)] * 2 + [(2, 32), (2, 50)])
    with self.assertRaisesRegex(ValueError, "sentences='red'"):
      model.embed('red')

  def test_split_over_a_mesh(self):
    found = berts.golden('roberta')
    berts.save(self.folder, found['weights'])
    self.write('config.json', found['config'])
    mesh = Mesh(np.array(jax.devices()[:2]), ('model',))
    model = self.load(mesh=mesh)
    kernel = model.model.stacks[0].mlp.up.kernel.get_raw_value()
    self.assertLen(kernel.sharding.device_set, 2)
    self.assertFalse(kernel.sharding.is_fully_replicated)
    kept = found['mask'] == 1
    states, _ = berts.run(model.model, found['tokens'], kept, found['types'])
    self.assertLess(berts.relative(states[kept], found['states'][kept]), 2e-5)

  @parameterized.parameters(
    ({'pooling_mode_max_tokens': True}, r"pooling \['max'\] is not supported"),
    ({'pooling_mode': ['mean', 'cls']}, 'only one of mean and cls'),
  )
  def test_refuses_pooling(self, pooling, words):
    self.small(pooling)
    with self.assertRaisesRegex(sentence_models.FolderError, words):
      self.load()

  def test_refuses_folders(self):
    load = sentence_models.load
    error = sentence_models.FolderError
    with self.assertRaisesRegex(error, 'config.json does not exist'):
      load(self.folder)
    for text, words in (('{', 'is not JSON'), ('[]', 'must hold a dict')):
      self.write('config.json', text)
      with self.assertRaisesRegex(error, f'config.json {words}'):
        load(self.folder)
    self.small({})
    self.write('modules.json', [{'type': 'Transformer'}])
    with self.assertRaisesRegex(error, 'modules.json: a module lacks'):
      load(self.folder)
    self.small({}, ['Transformer', 'Pooling', 'Dense'])
    with self.assertRaisesRegex(error, 'Transformer, Pooling, Dense are not'):
      load(self.folder)

  @parameterized.named_parameters(
    ('missing', None, r"no tensor 'encoder.layer.1.output.dense.weight'"),
    (
      'shape',
      np.zeros((32, 60), np.float32),
      r"'encoder.layer.1.output.dense.weight' has the shape \(32, 60\).*64\)",
    ),
  )
  def test_refuses_tensors(self, value, words):
    self.small({})
    with safetensors.open(self.folder) as checkpoint:
      tensors = dict(checkpoint)
    name = 'encoder.layer.1.output.dense.weight'
    kept = {k: v for k, v in tensors.items() if k != name}
    berts.save(self.folder, kept if value is None else {**kept, name: value})
    with self.assertRaisesRegex(weights.CheckpointMismatch, words):
      self.load()

  def test_refuses_what_the_encoder_does_not_have(self):
    self.small({})
    with safetensors.open(self.folder) as checkpoint:
      tensors = dict(checkpoint)
    extra = np.zeros(4, np.float32)
    head = {'cls.bias': extra, 'embeddings.position_ids': extra}
    berts.save(self.folder, tensors | head)
    self.load()
    name = 'encoder.layer.2.output.dense.bias'
    berts.save(self.folder, tensors | {name: extra})
    with self.assertRaisesRegex(weights.CheckpointMismatch, name):
      self.load()
    berts.save(self.folder, {'model.embed_tokens.weight': extra})
    with self.assertRaisesRegex(weights.CheckpointMismatch, 'has 0 tensors'):
      self.load()

  def test_tokenizer_of_a_folder(self):
    tokenizers = pytest.importorskip('tokenizers')
    words = {'[PAD]': 0, '[UNK]': 1, 'red': 2, 'blue': 3}
    made = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(words, unk_token='[UNK]')
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=8)
    self.small({})
    with self.assertRaisesRegex(
      sentence_models.FolderError, 'tokenizer.json does not exist'
    ):
      sentence_models.load(self.folder)
    self.write('tokenizer.json', '{}')
    with self.assertRaisesRegex(
      sentence_models.FolderError, 'tokenizer.json cannot be used'
    ):
      sentence_models.load(self.folder)
    made.add_tokens([f'w{k}' for k in range(37)])
    made.save(str(self.folder / 'tokenizer.json'))
    with self.assertRaisesRegex(
      sentence_models.FolderError, 'has 41 tokens and the model 40'
    ):
      sentence_models.load(self.folder)
    made = tokenizers.Tokenizer(made.model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=8)
    made.save(str(self.folder / 'tokenizer.json'))
    settings = {'max_seq_length': 3, 'do_lower_case': True}
    self.write('sentence_bert_config.json', settings)
    model = sentence_models.load(self.folder)
    encodings = model.tokenizer.encode_batch(['Red blue', 'red ' * 9])
    self.assertEqual([e.ids for e in encodings], [[2, 3], [2, 2, 2]])

  def test_mean_cosine(self):
    a = np.array([[1.0, 0], [3, 4]])
    b = np.array([[2.0, 0], [4, -3]])
    self.assertEqual(sentence_models.mean_cosine(a, b), 0.5)
    with self.assertRaisesRegex(ValueError, r'a.shape=\(2, 2\)'):
      sentence_models.mean_cosine(a, b[:1])


class GgufTest(berts.FolderTest):
  def metadata(self, **changes):
    values = {
      'general.architecture': 'bert',
      'bert.block_count': 2,
      'bert.context_length': 12,
      'bert.embedding_length': 32,
      'bert.feed_forward_length': 64,
      'bert.attention.head_count': 4,
      'bert.attention.layer_norm_epsilon': 1e-12,
      'bert.attention.causal': False,
      'bert.pooling_type': 2,
      'tokenizer.ggml.tokens': [f't{k}' for k in range(40)],
      'tokenizer.ggml.token_type_count': 3,
    }
    return values | changes

  def tensors(self) -> dict[str, np.ndarray]:
    """The weights of a model by the names of GGUF."""
    whole, block = bert_names.gguf()
    tensors = {}
    for path, value in berts.leaves(berts.model('bert_with_head')).items():
      value = value.mT if path.endswith('kernel') else value
      if path in whole:
        tensors[whole[path].name] = value
      elif path.startswith('stacks/0/'):
        source = block[path.removeprefix('stacks/0/')]
        for k, member in enumerate(value):
          tensors[source.name.format(block=k)] = member
    return tensors

  def load(self, tensors, **changes):
    path = self.folder / 'model.gguf'
    metadata = self.metadata(**changes)
    gguf.save(path, tensors, metadata=metadata, overwrite=True)
    with mock.patch.object(sentence_models, '_tokenizer'):
      return sentence_models.load(path).model

  def test_names_are_those_of_the_format(self):
    whole, block = bert_names.gguf()
    names = {source.name.rpartition('.')[0] for source in block.values()}
    self.assertEqual(
      names,
      {
        f'blk.{{block}}.{name}'
        for name in (
          'attn_q',
          'attn_k',
          'attn_v',
          'attn_output',
          'attn_output_norm',
          'ffn_up',
          'ffn_down',
          'layer_output_norm',
        )
      },
    )
    self.assertEqual(
      {source.name.rpartition('.')[0] for source in whole.values()},
      {'token_embd', 'position_embd', 'token_types', 'token_embd_norm'},
    )

  def test_packed_and_float_blocks(self):
    found = berts.golden('bert_with_head')
    config = bert_config.from_huggingface(found['config'])
    tensors = self.tensors()
    model = self.load(tensors)
    want = dataclasses.replace(
      config, epsilon=float(np.float32(1e-12)), pooling='cls'
    )
    self.assertEqual(model.config, want)
    floats = berts.leaves(model)
    for path, value in berts.leaves(berts.model('bert_with_head')).items():
      np.testing.assert_array_equal(floats[path], value, path)

    fmt = lowbit.formats.get('int8_g32_float16')
    packed = {
      name: lowbit.quantize(jnp.asarray(value), fmt)
      if name.startswith('blk.1.') and value.ndim == 2
      else value
      for name, value in tensors.items()
    }
    model = self.load(packed)
    self.assertLen(model.stacks, 2)
    kernel = model.stacks[1].mlp.up.kernel.get_raw_value()
    self.assertIsInstance(kernel, lowbit.QArray)
    kept = found['mask'] == 1
    states, _ = berts.run(model, found['tokens'], kept, found['types'])
    error = berts.relative(states[kept], found['states'][kept])
    self.assertBetween(error, 1e-5, 0.03)

  def test_refusals(self):
    tensors = self.tensors()
    for changes, words in (
      ({'general.architecture': 'nomic-bert'}, "model.gguf': .*'nomic-bert'"),
      ({'bert.pooling_type': 3}, 'pooling_type is .*3'),
      ({'bert.attention.causal': True}, 'causal is .*True'),
      ({'bert.attention.head_count': 5}, 'heads=5 must divide width=32'),
      ({'bert.embedding_length_out': 8}, 'embedding_length_out is .*8'),
    ):
      with self.assertRaisesRegex(bert_config.ConfigError, words):
        self.load(tensors, **changes)
    with self.assertRaisesRegex(
      weights.CheckpointMismatch, r"'blk.1.ffn_up.bias'"
    ):
      self.load({k: v for k, v in tensors.items() if k != 'blk.1.ffn_up.bias'})


if __name__ == '__main__':
  absltest.main()
