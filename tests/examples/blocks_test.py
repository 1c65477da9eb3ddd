"""Models block by block, and methods that go through them."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

pytest.importorskip('tokenizers', reason='of the extra `examples`')

from lowbit_jax import formats, io, quantize  # noqa: E402
from lowbit_jax.ops import Transformed  # noqa: E402
from lowbit_jax.recipe import QuantSpec  # noqa: E402
from lowbit_jax.transforms import DiagonalSmoothing  # noqa: E402
from models import bert_config  # noqa: E402
from support import (  # noqa: E402
  blocks,
  language_models,
  post_training,
  sentence_models,
  weights,
)
from support.weights import Rows, Source  # noqa: E402
from tests.examples import berts, families  # noqa: E402


class _Encoding:
  def __init__(self, ids):
    self.ids = ids


class _Letters:
  """A tokenizer whose tokens are letters, between two of its own."""

  def encode_batch(self, texts):
    return [
      _Encoding([1, *(4 + ord(c) % 36 for c in text), 2]) for text in texts
    ]


def _bert():
  config = bert_config.from_huggingface(berts.golden('bert')['config'])
  return sentence_models.SentenceModel(
    berts.model('bert'), config, _Letters(), {}
  )


def _llama(folder, case='llama3'):
  path = families.write(pathlib.Path(folder), families.CASES[case])
  return language_models.load(path)


class BlocksTest(absltest.TestCase):
  def test_language_model(self):
    with tempfile.TemporaryDirectory() as folder:
      model = _llama(folder).model
    tokens = np.arange(36).reshape(6, 6) % 40
    found = blocks.of_llama(model, None, tokens)
    states = found.states
    self.assertLen(states, 2)  # batches of four windows
    for parameters in found:
      states = [jax.jit(found.run)(parameters, state) for state in states]
    got = jnp.concatenate([x for x, _ in states])
    want, _ = nnx.jit(lambda m, t: m.states(t))(model, tokens)
    np.testing.assert_allclose(model.norm(got), want, rtol=1e-5, atol=1e-5)
    self.assertEqual([int(number) for _, number in states], [len(found)] * 2)

  def test_sentences_in_one_window_do_not_see_each_other(self):
    model = _bert()
    sentences = ['red', 'blue']
    packed = model.packed(sentences, 8)
    self.assertEqual(packed.tokens.shape, (1, 5 + 6))
    found = blocks.of_bert(model.model, None, packed)
    (state,) = found.states
    for parameters in found:
      state = jax.jit(found.run)(parameters, state)
    got = np.split(np.asarray(state[0][0]), [5])
    for sentence, part in zip(sentences, got, strict=True):
      (encoding,) = model.tokenizer.encode_batch([sentence])
      tokens = jnp.asarray(encoding.ids)[None]
      (want,) = nnx.jit(lambda m, t: m.states(t))(model.model, tokens)
      np.testing.assert_allclose(part, want, rtol=1e-5, atol=1e-5)

  def test_windows_are_full(self):
    model = _bert()
    length = model.config.context
    sentence = 'x' * (length - 3)  # of one token less
    packed = model.packed([sentence] * 4, 2)
    self.assertEqual(packed.tokens.shape, (2, length))
    self.assertEqual(packed.sentences[0, -1], 1)
    self.assertEqual(packed.places[0, -1], 0)
    self.assertEqual(packed.places[1, 0], 1)
    self.assertEqual(model.packed([sentence] * 4, 99).tokens.shape[0], 3)
    with self.assertRaisesRegex(ValueError, 'no token'):
      model.packed([], 1)


class OneByOneTest(absltest.TestCase):
  """With a small BERT."""

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder, 'blocks')
    model = _bert()
    packed = model.packed(['red', 'blue green', 'x' * 9, 'zebra'], 8)
    self.blocks = blocks.of_bert(model.model, None, packed)

  def quantized(self, name='gptq', **options):
    fmt = formats.get('mxfp4')
    recipe = post_training.recipe(name, fmt, self.blocks)
    return post_training.one_by_one(self.blocks, fmt, recipe, **options)

  def test_what_is_done_is_not_done_again(self):
    want = list(self.quantized())
    started = self.quantized(folder=self.folder)
    next(started)
    started.close()
    self.assertLen(list(self.folder.iterdir()), 1)
    seen = []

    def select(number, path):
      seen.append(number)
      return True

    got = list(self.quantized(folder=self.folder, select=select))
    self.assertEqual(min(seen), 1)
    self.assertLen(list(self.folder.iterdir()), len(self.blocks))
    self.assertEqual(got[0].errors, want[0].errors)
    for a, b in zip(got, want, strict=True):
      jax.tree.map(np.testing.assert_array_equal, a.parameters, b.parameters)
    first = sorted(self.folder.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-9])
    with self.assertRaises(io.DamagedFileError):
      list(self.quantized(folder=self.folder))

  def test_what_is_left_out_stays(self):
    path = 'mlp/down/kernel'
    done = list(self.quantized(select=lambda n, p: (n, p) == (1, path)))
    stored = post_training.stacked(done, [1] * len(done))
    packed = [p for p, x in stored.items() if not isinstance(x, jax.Array)]
    self.assertEqual(packed, [f'stacks/1/{path}'])

  @pytest.mark.long('compiles rotations of layers of several shapes')
  def test_errors_of_layers(self):
    done = list(self.quantized('mr_gptq'))
    self.assertLen(done[0].errors, 6)
    self.assertEqual(done[1].errors[0].path, '1/attention/key/kernel')
    for own in done:
      for error in own.errors:
        self.assertLess(error.error, error.nearest)
    kernel = done[0].parameters['mlp/up/kernel']
    self.assertIsInstance(kernel, Transformed)


class StackedTest(absltest.TestCase):
  def test_layers_that_take_a_transform_beside_such_that_do_not(self):
    key = jax.random.key(0)
    kernels = [quantize(x, formats.mxfp4, axis=-2) for x in
               jax.random.normal(key, (3, 32, 8))]  # fmt: skip
    scale = DiagonalSmoothing(jnp.arange(1.0, 33.0))
    kernels[1] = Transformed(kernels[1], scale, -2)
    norms = jax.random.normal(key, (3, 8))
    done = [
      post_training.Block({'kernel': kernel, 'norm': norm}, [])
      for kernel, norm in zip(kernels, norms, strict=True)
    ]
    made = post_training.stacked(done, [1, 2])
    self.assertIs(type(made['stacks/0/kernel']), type(kernels[0]))
    np.testing.assert_array_equal(made['stacks/1/norm'], norms[1:])
    pair = made['stacks/1/kernel']
    for k in (0, 1):
      np.testing.assert_array_equal(
        jnp.asarray(pair[k]), jnp.asarray(kernels[1 + k])
      )


class RecipeTest(absltest.TestCase):
  """What is recommended, by what a format and a model allow."""

  def recommended(self, made, name, quantized=False, **options):
    fmt = formats.get(name)
    spec = QuantSpec(fmt) if quantized else None
    return post_training.recipe('recommended', fmt, made, spec, **options)

  def test_models_in_which_ranges_can_move(self):
    with tempfile.TemporaryDirectory() as folder:
      model = _llama(folder).model
    made = blocks.of_llama(model, None, np.zeros((1, 4), int))
    self.assertTrue(made.folds)
    for name, quantized, rotation, smooths in (
      ('mxfp4', False, 32, False),
      ('mxfp4', True, 32, True),
      ('nvfp4', False, 0, True),
      ('nvfp4', True, 0, True),
      ('int4_g32', False, 32, False),
      ('int4_g32', True, 32, True),
      ('nvlloyd3', False, 16, False),
      ('int8_channel', True, 0, True),
      ('int8_tensor', False, 0, True),
    ):
      recipe = self.recommended(made, name, quantized)
      self.assertTrue(recipe.is_known)
      self.assertEqual((recipe.rotation, recipe.smooths), (rotation, smooths))
    recipe = self.recommended(made, 'mxfp4', has_transforms=False)
    self.assertFalse(recipe.transforms)

  def test_models_in_which_they_cannot(self):
    made = blocks.of_bert(_bert().model, None, _bert().packed(['red'], 1))
    self.assertFalse(made.folds)
    for name in ('mxfp4', 'nvfp4'):
      self.assertTrue(self.recommended(made, name).is_known)
      self.assertFalse(self.recommended(made, name, True).is_known)
      recipe = self.recommended(made, name, True, has_transforms=False)
      self.assertFalse(recipe.transforms)
    awq = post_training.recipe('awq', formats.mxfp4, made)
    self.assertTrue(awq.transforms)


class TensorsTest(parameterized.TestCase):
  """From kernels back to the tensors that they are read from."""

  def check_tables(self, table, shapes):
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype('f') for n, s in shapes.items()}
    kernels = {p: source.read(tensors, 1).mT for p, source in table.items()}
    got = weights.tensors(table, 1, kernels)
    self.assertEqual(got.keys(), tensors.keys())
    for name, want in tensors.items():
      np.testing.assert_array_equal(got[name], want)

  def test_names_rows_heads_and_experts(self):
    table = {
      'a/kernel': Source('b{block}.a', heads=2),
      'c/kernel': Source('b{block}.cd', rows=Rows(4, 10, 10)),
      'd/kernel': Source('b{block}.cd', rows=Rows(0, 4, 10)),
      'e/kernel': Source('b{block}.{expert}.e', experts=2),
    }
    shapes = {'b1.a': (8, 5), 'b1.cd': (10, 5)}
    self.check_tables(table, {**shapes, 'b1.0.e': (3, 5), 'b1.1.e': (3, 5)})

  def test_a_scale_of_the_tensor_is_of_one_kernel(self):
    q = jax.device_get(quantize(np.ones((32, 4), 'f'), formats.nvfp4, axis=-2))
    table = {
      'c/kernel': Source('cd', rows=Rows(0, 4, 8)),
      'd/kernel': Source('cd', rows=Rows(4, 8, 8)),
    }
    with self.assertRaisesRegex(ValueError, "'cd' holds 2 kernels"):
      weights.tensors(table, 0, dict.fromkeys(table, q))
    table['c/kernel'] = Source('c', heads=2)
    del table['d/kernel']
    got = weights.tensors(table, 0, {'c/kernel': q})['c']
    np.testing.assert_array_equal(got.tensor_scale, q.tensor_scale)


if __name__ == '__main__':
  absltest.main()
