"""The evaluation script: on tiny models here, on the real one if asked for."""

import csv
import json
import math
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip('tokenizers', reason='of the extra `examples`')

import tokenizers  # noqa: E402
from flax import nnx  # noqa: E402

import lowbit_jax as lowbit  # noqa: E402
from lowbit_jax import formats  # noqa: E402
from lowbit_jax.recipe import QuantSpec  # noqa: E402
from support import (  # noqa: E402
  language_models,
  post_training,
  quality,
  report,
  smollm2,
  variants,
)
from support.variants import Pair  # noqa: E402
from tests.examples import berts, families, scripts  # noqa: E402

evaluate = scripts.load('evaluate')

_WORDS = np.random.RandomState(18).randint(0, 40, 150)


def _save_tokenizer(folder: pathlib.Path) -> None:
  """Tokens are the words w0 ... w39."""
  words = {f'w{k}': k for k in range(40)}
  model = tokenizers.models.WordLevel(words, unk_token='w0')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(folder / 'tokenizer.json'))


def _table(out: pathlib.Path) -> list[dict[str, str]]:
  with (out / 'evaluate.csv').open(newline='') as file:
    return list(csv.DictReader(file))


class EvaluateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.model = pathlib.Path(root, 'model')
    families.write(cls.model, families.CASES['llama3'])
    _save_tokenizer(cls.model)
    (cls.model / 'tokenizer_config.json').write_text('{"eos_token": "w39"}')
    cls.text = pathlib.Path(root, 'text.txt')
    cls.text.write_text(' '.join(f'w{k}' for k in _WORDS))

  def setUp(self):
    super().setUp()
    self.out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def run_script(self, *arguments):
    return scripts.run(
      evaluate,
      f'--model={self.model}',
      f'--text={self.text}',
      f'--out={self.out}',
      *arguments,
    )

  def test_table_and_what_goes_on(self):
    arguments = '--weights=none,mxfp4', '--activations=same'
    with mock.patch.object(report, 'can_plot', return_value=False):
      status, text = self.run_script(*arguments)
    self.assertEqual(status, 0, text)
    rows = _table(self.out)
    pairs = [(row['weights'], row['activations']) for row in rows]
    self.assertEqual(pairs, [('none', 'none'), ('mxfp4', 'mxfp4')])
    self._compare_with_numpy(rows)
    # Of the next run, only what is new is measured.
    judged = []
    scores = quality.Judge.scores

    def counted(judge, program, window):
      judged.append(window)
      return scores(judge, program, window)

    with mock.patch.object(quality.Judge, 'scores', counted):
      status, text = self.run_script(
        '--weights=mxfp4', '--activations=same', '--windows=2'
      )
    self.assertEqual(status, 0, text)
    self.assertEqual(judged, [1, 1])
    more = _table(self.out)
    self.assertEqual([row['weights'] for row in more], ['none', 'mxfp4'])
    self.assertNotEqual(more[1]['nll'], rows[1]['nll'])
    self.assertEqual(more[1]['bits'], rows[1]['bits'])
    self.assertTrue((self.out / 'evaluate.png').exists())
    # Results of another model, or with the head, are no part of this table.
    status, text = self.run_script(*arguments, '--head')
    self.assertEqual(status, 1)
    self.assertRegex(text, 'head: False there, True now.*give another --out')

  def _compare_with_numpy(self, rows):
    """Losses in float64, from logits of models whose weights are rounded."""
    tokens = np.asarray(_WORDS[:64])
    floats = variants.decoded(language_models.load(self.model).model)
    packed = variants.quantized(floats, formats.get('mxfp4'))
    rounded = variants.with_activations(
      variants.decoded(packed), QuantSpec(formats.mxfp4)
    )
    logs = []
    for model in (floats, rounded):
      logits = np.asarray(nnx.jit(model)(tokens[None])[0], np.float64)
      logs.append(logits - np.logaddexp.reduce(logits, axis=-1)[:, None])
    places = np.arange(63)
    losses = [-log[places, tokens[1:]] for log in logs]
    expected = logs[0][:-1]
    for row, log, loss in zip(rows, logs, losses, strict=True):
      log, gap = log[:-1], loss - losses[0]
      wanted = {
        'nll': loss.mean(),
        'delta': gap.mean(),
        'stderr': gap.std(ddof=1) / math.sqrt(63),
        'kl': (np.exp(expected) * (expected - log)).sum(-1).mean(),
        'top1': np.mean(log.argmax(-1) == expected.argmax(-1)),
      }
      for name, want in wanted.items():
        self.assertAlmostEqual(float(row[name]), want, 4, (row, name))
    # Rows of 64 are whole blocks of 32, and rows of 96 as well.
    self.assertEqual([float(row['bits']) for row in rows], [32, 4.25])
    self.assertEqual(int(rows[1]['bytes']), variants.nbytes(packed))
    self.assertEqual(int(rows[0]['bytes']), variants.nbytes(floats))

  @pytest.mark.long('calibrates two models, block after block')
  def test_a_method(self):
    self.check_methods('rtn', 'recommended')

  @pytest.mark.slow
  @pytest.mark.long('calibrates sixteen models, block after block')
  def test_methods(self):
    self.check_methods('rtn', *post_training.METHODS)

  def check_methods(self, *methods):
    arguments = (
      '--weights=mxfp4',
      f'--method={",".join(methods)}',
      f'--calibration={self.text}',
      '--calibration_windows=2',
    )
    status, text = self.run_script(*arguments)
    self.assertEqual(status, 0, text)
    rows = _table(self.out)
    self.assertEqual(
      [(row['method'], row['activations']) for row in rows],
      [
        ('none', 'none'),
        *((method, 'none') for method in methods),
        *((method, 'mxfp4') for method in methods),
      ],
    )
    kl = {(row['method'], row['activations']): float(row['kl']) for row in rows}
    for method in methods:
      if 'gptq' in method or method in ('duquant', 'recommended'):
        self.assertLess(kl[method, 'none'], kl['rtn', 'none'])
    made = self.out / 'layers' / f'mxfp4.none.{methods[-1]}.csv'
    with made.open(newline='') as file:
      layers = list(csv.DictReader(file))
    self.assertLen(layers, 14)
    for layer in layers:
      self.assertLess(float(layer['error']), float(layer['nearest']))
    # Other tokens are other results.
    status, text = self.run_script(*arguments[:-1])
    self.assertEqual(status, 1)
    self.assertRegex(text, 'windows|calibration')

  def test_interrupted(self):
    one = quality.Scores([1.0, 2.0], 0.0, 1.0, 1.0)
    with mock.patch.object(
      quality.Judge, 'scores', side_effect=[one, KeyboardInterrupt]
    ):
      status, text = self.run_script('--weights=mxfp4')
    self.assertEqual(status, 130)
    self.assertIn('1 finished runs are kept', text)
    self.assertFalse((self.out / 'evaluate.csv').exists())

  @parameterized.parameters(
    (('--windows=3',), 'text has 150 tokens, so 2 windows of 64 fit, not 3'),
    (('--text=nowhere',), 'No such file.*nowhere'),
    (('--weights=int4_g128',), 'int4_g128.*none: padding adds'),
    (('--method=gptq', '--scale_rule=mse'), 'scale_rule is for --method=rtn'),
    (('--method=gptq', '--calibration=nowhere'), 'No such file.*nowhere'),
    (('--method=gptq', '--calibration_windows=9999'), 'not 9999'),
    (('--weights=mxfp4', '--scale_rule=sweep'), "'sweep' does not fit mxfp4"),
    (('--sentences=nowhere', '--model='), None),
  )
  def test_mistakes_are_told_without_a_traceback(self, arguments, said):
    if said is None:
      status, text = scripts.run(
        evaluate, f'--out={self.out}', '--sentences=nowhere'
      )
      said = '--sentences needs --model'
    else:
      status, text = self.run_script(*arguments)
    self.assertEqual(status, 1)
    self.assertRegex(text, said)
    self.assertNotIn('Traceback', text)

  @parameterized.parameters(
    ('--weights=mxfp5', 'did you mean'),
    ('--weights=e4m3', 'element format'),
    ('--activations=e4m3', 'element format'),
    ('--method=gptq3', 'must be some of rtn'),
    ('--method=', 'must be some of rtn'),
  )
  def test_flags(self, flag, said):
    with self.assertRaisesRegex(evaluate.flags.IllegalFlagValueError, said):
      scripts.run(evaluate, flag)

  def test_sentences(self):
    golden = berts.golden('bert')
    folder = self.out / 'bert'
    folder.mkdir()
    berts.save(folder, golden['weights'])
    (folder / 'config.json').write_text(json.dumps(golden['config']))
    _save_tokenizer(folder)
    file = self.out / 'sentences.txt'
    file.write_text('w1 w2 w3\n\nw4 w5\n')
    status, text = scripts.run(
      evaluate,
      f'--model={folder}',
      f'--sentences={file}',
      f'--out={self.out}',
      '--weights=int8_channel',
      '--activations=same',
    )
    self.assertEqual(status, 0, text)
    first, second = _table(self.out)
    self.assertEqual(float(first['cosine']), 1)
    self.assertBetween(float(second['cosine']), 0.99, 1 - 1e-7)


class VariantsTest(absltest.TestCase):
  def test_each_pair_once(self):
    got = variants.pairs(['none', 'mxfp4'], ['none', 'same', 'mxfp8_e4m3'])
    every = [
      ('none', 'none'),
      ('none', 'mxfp8_e4m3'),
      ('mxfp4', 'none'),
      ('mxfp4', 'mxfp4'),
      ('mxfp4', 'mxfp8_e4m3'),
    ]
    self.assertEqual(got, [Pair(*pair) for pair in every])

  def test_activations_of_experts_are_refused(self):
    with tempfile.TemporaryDirectory() as folder:
      path = families.write(pathlib.Path(folder), families.CASES['mixtral'])
      made = variants.Variants(language_models.load(path).model)
    tokens = np.zeros((1, 8), np.int32)
    made.check(Pair('mxfp4', 'none'), lambda model: model(tokens))
    with self.assertRaisesRegex(ValueError, 'mixture of experts'):
      made.check(Pair('mxfp4', 'mxfp4'), lambda model: model(tokens))

  def test_head_stays_packed_or_is_quantized(self):
    with tempfile.TemporaryDirectory() as folder:
      path = families.write(pathlib.Path(folder), families.CASES['llama3'])
      loaded = language_models.load(path).model
    packed = lowbit.quantize(
      loaded.embed.embedding.get_raw_value(), formats.get('int8_channel')
    )
    lowbit.nn.nnx.assign(loaded, {'embed/embedding': packed})
    for head, name in ((False, 'int8_channel'), (True, 'mxfp4')):
      made = variants.Variants(loaded, head)(Pair('mxfp4', 'none'))
      got = made.embed.embedding.get_raw_value()
      self.assertEqual(got.fmt, formats.get(name))

  def test_a_scale_rule_is_that_of_weights_and_of_activations_like_them(self):
    with tempfile.TemporaryDirectory() as folder:
      path = families.write(pathlib.Path(folder), families.CASES['llama2'])
      loaded = language_models.load(path).model
    made = variants.Variants(loaded, scale_rule='mse')
    fmt = formats.get('mxfp4')
    w = loaded.stacks[0].mlp.up.kernel.get_raw_value()
    for activations, rule in (('mxfp4', 'mse'), ('mxfp8_e4m3', 'floor')):
      layer = made(Pair('mxfp4', activations)).stacks[0].mlp.up
      want = lowbit.quantize(w, fmt, axis=-2, scale_rule='mse')
      q = layer.kernel.get_raw_value()
      np.testing.assert_array_equal(q.codes, want.codes)
      self.assertEqual(layer.dot_general.specs.lhs.scale_rule, rule)


@pytest.mark.slow
@pytest.mark.long('compiles and runs a published model')
class SmolLM2Test(absltest.TestCase):
  def rows(self, *arguments):
    try:
      path = smollm2.fetch()
    except smollm2.FetchError as error:
      raise absltest.SkipTest(str(error)) from error
    with tempfile.TemporaryDirectory() as out:
      status, text = scripts.run(
        evaluate, f'--model={path}', f'--out={out}', *arguments
      )
      self.assertEqual(status, 0, text)
      return _table(pathlib.Path(out))

  # Perplexities are those of a forward pass in NumPy and float64.

  def test_one_window(self):
    floats, eight = self.rows('--weights=int8_channel', '--activations=none')
    perplexity = math.exp(float(floats['nll']))
    self.assertAlmostEqual(perplexity, 40.52297, delta=1e-4)
    self.assertLess(float(eight['delta']), 0.015)

  def test_two_windows(self):
    floats, eight, four = self.rows(
      '--weights=int8_channel,mxfp4', '--activations=none', '--windows=2'
    )
    perplexity = math.exp(float(floats['nll']))
    self.assertAlmostEqual(perplexity, 38.61764, delta=1e-4)
    self.assertLess(float(eight['delta']), 0.015)
    self.assertBetween(float(four['delta']), 0.4, 0.6)


if __name__ == '__main__':
  absltest.main()
