"""Comparison of recipes: its tables, and what it keeps."""

import dataclasses
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from lowbit_jax import _files
from models import byte_lm
from support import data, trainer
from support.checkpoints import CheckpointError
from tests.examples import scripts

script = scripts.load('compare_recipes')

_TINY = byte_lm.Config(
  width=64, heads=2, blocks=1, context=32, batch=8, steps=3
)


def _corpus() -> data.Corpus:
  text = np.random.RandomState(0).randint(97, 123, 1 << 14).astype(np.uint8)
  return data.Corpus(text, text[: 1 << 12], 1, 'test')


def _settings(recipe: str, optimizer: str, seed: int) -> trainer.Settings:
  model = dataclasses.replace(_TINY, seed=seed)
  return trainer.Settings(model, recipe=recipe, optimizer=optimizer)


class CompareTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory)
    self.flags(_WORKDIR=directory)
    for name, value in (('_settings', _settings), ('_EVAL_WINDOWS', 16)):
      self.enter_context(mock.patch.object(script, name, value))

  def flags(self, **values):
    for name, value in values.items():
      holder = mock.Mock(value=value)
      self.enter_context(mock.patch.object(script, name, holder))

  def test_forward_products_of_one_network(self):
    mesh = jax.make_mesh(
      (1, 1, 1),
      trainer.AXES,
      (jax.sharding.AxisType.Auto,) * 3,
      devices=jax.devices()[:1],
    )
    self.enter_context(
      mock.patch.object(trainer, 'make_mesh', return_value=mesh)
    )
    self.flags(_RECIPES=['fp8_delayed'], _OPTIMIZERS=['adamw'])
    header, row = script.compare_forward(_corpus(), [1])
    self.assertEqual(header[0], 'forward product')
    trained = _settings('float32', 'adamw', 1)
    with mock.patch.object(trainer, 'make_step', side_effect=AssertionError):
      state, _ = script._train(trained, _corpus())  # That on disk.
    # Its scales are those of the data before the first step.
    current = _settings('fp8_current', 'adamw', 1)
    base, want = (
      trainer.evaluate(run, state, _corpus(), 16).mean()
      for run in (trained, current)
    )
    self.assertEqual(row[:2], ['fp8_delayed', f'{want - base:+.4f}'])

  def test_gaps_to_the_first_optimizer(self):
    self.flags(
      _RECIPES=['float32', 'switchback'], _OPTIMIZERS=['adamw', 'adamw8']
    )

    def one_run(run, corpus):
      del corpus
      loss = 2.0 + run.model.seed
      loss += 0.25 * (run.recipe == 'switchback') * run.model.seed
      loss += 0.125 * (run.optimizer == 'adamw8')
      return {'loss': loss, 'float32': loss - 0.0625}

    init = jax.jit(trainer.init, static_argnums=0)
    with (
      mock.patch.object(script, 'one_run', one_run),
      mock.patch.object(trainer, 'init', init),
    ):
      header, *rows = script.compare(_corpus(), [0, 2])
    self.assertEqual(
      header,
      ['recipe', 'optimizer', 'state bytes per weight', 'seed 0', 'seed 2',
       'mean gap', 'spread', 'float32 forward'],
    )  # fmt: skip
    self.assertEqual(
      [[row[0], row[1], *row[3:]] for row in rows],
      [
        ['float32', 'adamw', '+0.0000', '+0.0000', '+0.0000', '0.0000',
         '-0.0625'],
        ['float32', 'adamw8', '+0.1250', '+0.1250', '+0.1250', '0.0000',
         '+0.0625'],
        ['switchback', 'adamw', '+0.0000', '+0.5000', '+0.2500', '0.3536',
         '+0.1875'],
        ['switchback', 'adamw8', '+0.1250', '+0.6250', '+0.3750', '0.3536',
         '+0.3125'],
      ],
    )  # fmt: skip
    full, low = (float(row[2]) for row in rows[:2])
    self.assertBetween(full, 8, 8.01)  # Two float32 moments and a count.
    self.assertBetween(low, 2, 8)

  def test_finished_runs(self):
    run, record = _settings('mxfp8', 'adamw', 0), trainer.Record(0, 1.5, 1.0)
    trained = mock.Mock(return_value=(None, [record]))
    losses = mock.Mock(return_value=np.array([1.0, 2.0]))
    with (
      mock.patch.object(script, '_train', trained),
      mock.patch.object(trainer, 'evaluate', losses),
    ):
      first = script.one_run(run, _corpus())
      self.assertEqual(script.one_run(run, _corpus()), first)
      self.assertEqual(trained.call_count, 1)
      with self.assertRaisesRegex(CheckpointError, 'corpus: test there, other'):
        script.one_run(run, _corpus()._replace(digest='other'))
      path = self.workdir / 'mxfp8-adamw-3-0.json'
      path.write_text(path.read_text().replace('"loss": 1.5', '"loss": 1.0'))
      with self.assertRaisesRegex(_files.DamagedFileError, 'repeat the run'):
        script.one_run(run, _corpus())
      self.assertEqual(trained.call_count, 1)
    self.assertEqual(first['loss'], 1.5)
    self.assertEqual(first['training_loss'], 1.5)


class FlagsTest(absltest.TestCase):
  def test_settings_that_no_run_can_have(self):
    directory = self.enter_context(tempfile.TemporaryDirectory())
    workdir = pathlib.Path(directory) / 'out'
    for flag, message in (
      ('--seeds=0,x', '--seeds=0,x are not integers'),
      ('--seeds=-1', '--seeds=-1 are not integers'),
      ('--seeds=', '--seeds names nothing'),
      ('--recipes=', '--recipes names nothing'),
      ('--recipes=mxfp9', "'mxfp9' is not one of"),
      ('--optimizers=sgd', "'sgd' is not one of"),
      ('--steps=0', 'steps must be at least 1'),
      ('--exempt_last=9', 'exempt_last=9 are more than blocks=6'),
    ):
      code, out = scripts.run(script, f'--workdir={workdir}', flag)
      self.assertEqual(code, 1, out)
      self.assertIn(message, out)
    self.assertFalse(workdir.exists())


if __name__ == '__main__':
  absltest.main()
