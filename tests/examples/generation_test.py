"""Tokens after tokens: what is drawn, and that a cache changes nothing."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from support import generation, language_models
from tests.examples import families

_CASE = families.CASES['llama2']


@functools.cache
def _model():
  with tempfile.TemporaryDirectory() as folder:
    return language_models.load(families.write(pathlib.Path(folder), _CASE))


@functools.cache
def _generator(temperature):
  """One for all tests, which share what it compiles."""
  sampling = generation.Sampling(temperature)
  return generation.Generator(_model().model, sampling)


@functools.cache
def _greedy(count):
  """The most likely tokens one by one, each from all before it."""
  model, logits = _model().model, jax.jit(lambda model, ids: model(ids))
  ids = families.tokens()[0, :5].tolist()
  for _ in range(count):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    ids.append(int(logits(model, padded)[0, len(ids) - 1].argmax()))
  return ids


class SamplingTest(parameterized.TestCase):
  def draws(self, logits, **sampling):
    """How often each token is drawn, of 4096 times."""
    logits = jnp.broadcast_to(jnp.log(jnp.array(logits)), (4096, len(logits)))
    drawn = generation.Sampling(**sampling).draw(logits, jax.random.key(0))
    return np.bincount(drawn, minlength=logits.shape[-1])

  @parameterized.parameters(
    ({'temperature': 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({'temperature': 1.0, 'top_k': 2}, [0, 4 / 7, 0, 3 / 7]),
    ({'temperature': 1.0, 'top_k': 9}, [0.1, 0.4, 0.2, 0.3]),
    ({'temperature': 1.0, 'top_p': 0.5}, [0, 4 / 7, 0, 3 / 7]),
    ({'temperature': 1.0, 'top_p': 0.0}, [0, 1, 0, 0]),
    ({'temperature': 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({'temperature': 0.0}, [0, 1, 0, 0]),
  )
  def test_frequencies(self, sampling, want):
    got = self.draws([0.1, 0.4, 0.2, 0.3], **sampling)
    # Five standard deviations of a binomial distribution.
    bound = 5 * np.sqrt(4096 * np.array(want) * (1 - np.array(want)))
    self.assertTrue((abs(got - 4096 * np.array(want)) <= bound).all(), got)


class GeneratorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(self.pieces())
    self.generator = _generator(0.0)
    self.generator.seen = []
    self.generator.prompt_tokens = self.generator.tokens = 0

  def pieces(self):
    """Short pieces of prompts and a small cache, so that both are outgrown."""
    return absltest.mock.patch.multiple(
      generation, _LENGTHS=(2, 4), _CAPACITY=8
    )

  def test_tokens_are_those_of_the_whole_text(self):
    want = _greedy(12)
    got = list(self.generator.generate(want[:5], 12))
    self.assertEqual(got, want[5:])
    self.assertEqual(self.generator.prompt_tokens, 5)
    self.assertEqual(self.generator.tokens, 11)  # the first is the prompt's

  def test_a_second_prompt_reads_only_what_is_new(self):
    want = _greedy(12)
    first = list(self.generator.generate(want[:5], 2))
    self.assertEqual(first, want[5:7])
    got = list(self.generator.generate(want[:8], 3))
    self.assertEqual(got, want[8:11])
    self.assertEqual(self.generator.prompt_tokens, 5 + 2)
    # What was seen after the place where a prompt goes another way is void.
    other = [*want[:3], (want[3] + 1) % 96]
    list(self.generator.generate(other, 1))
    self.assertEqual(self.generator.seen, other)
    self.assertEqual(list(self.generator.generate(want[:5], 2)), want[5:7])

  def test_ends(self):
    want = _greedy(12)
    end = want[7]
    got = list(self.generator.generate(want[:5], 12, frozenset({end})))
    first = want.index(end, 5)
    self.assertEqual(got, want[5 : first + 1])

  def test_the_context_ends(self):
    prompt = families.tokens()[0].tolist() * 3
    got = list(self.generator.generate(prompt[:60], 99))
    self.assertLen(got, 4)
    with self.assertRaisesRegex(generation.PromptTooLong, '64 tokens.* 64 pos'):
      list(self.generator.generate(prompt[:64], 1))
    with self.assertRaisesRegex(ValueError, 'empty'):
      list(self.generator.generate([], 1))

  def test_equal_seeds_draw_equal_tokens(self):
    prompt = _greedy(12)[:5]

    def drawn(seed):
      return list(_generator(2.0).generate(prompt, 8, seed=seed))

    self.assertEqual(drawn(0), drawn(0))
    self.assertNotEqual(drawn(0), drawn(1))


if __name__ == '__main__':
  absltest.main()
