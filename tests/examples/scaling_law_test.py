"""Tests of examples/scaling_law.py at toy size."""

import csv
import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from lowbit_jax.training import laws
from models import byte_lm
from support import data
from support.checkpoints import CheckpointError
from tests.examples import scripts

scaling_law = scripts.load('scaling_law')


_make_program = scaling_law.make_program


@functools.cache
def _program(config, width, element, scale_block):
  setting = scaling_law.Setting(width, 1, element, scale_block, 0)
  return _make_program(config, setting)


def _remembered(config, setting):
  """`make_program`, where settings of one kind share a program."""
  config = dataclasses.replace(config, steps=1, learning_rate=1e-3, seed=0)
  return _program(config, setting.width, setting.element, setting.scale_block)


def setUpModule():
  scaling_law.make_program = _remembered


def tearDownModule():
  scaling_law.make_program = _make_program


def _sweep(steps=(2, 4)):
  settings = scaling_law.make_settings([16], steps, ['e2m1'], [4], 1)
  return scaling_law.Sweep(settings, 8, 2, 1e-3, 6)


def _toy_corpus() -> data.Corpus:
  text = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8)
  return data.Corpus(text[:3000], text[3000:], 2, 'toy')


def _new_directory(test: absltest.TestCase) -> pathlib.Path:
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


class SettingsTest(parameterized.TestCase):
  def test_grid_has_a_baseline_for_each_run(self):
    settings = scaling_law.make_settings([32, 16], [4, 2], ['e2m1'], [4, 8], 2)
    self.assertLen(settings, 2 * 2 * 2 * 3)
    self.assertLen(set(setting.name for setting in settings), len(settings))
    for setting in settings:
      self.assertIn(setting.baseline, settings)
      self.assertEqual(setting.baseline.bits, (8, 23))

  def test_weights_are_those_of_the_model(self):
    sweep = _sweep()
    config = sweep.config(sweep.settings[0])
    params = jax.eval_shape(lambda: byte_lm.init(config))
    kernels = byte_lm.linear_kernels(params).values()
    self.assertEqual(
      sum(kernel.size for kernel in kernels),
      scaling_law.weights(sweep.settings[0]),
    )

  @parameterized.parameters(
    (['e2x1'], [4], "'e2x1'"), (['e2m1'], [5], 'scale_blocks has 5')
  )
  def test_errors(self, elements, blocks, expected):
    with self.assertRaisesRegex(byte_lm.ConfigError, expected):
      scaling_law.make_settings([16], [2], elements, blocks, 1)

  @parameterized.parameters(4, 30, 128)
  def test_schedule_is_that_of_the_model(self, steps):
    config = byte_lm.Config(steps=steps, learning_rate=4e-3)
    warmup = steps // 8
    schedule = optax.warmup_cosine_decay_schedule(
      0.0 if warmup else 4e-3, 4e-3, warmup, steps, 4e-4
    )
    np.testing.assert_allclose(
      scaling_law.learning_rates(config),
      [float(schedule(step)) for step in range(steps)],
      atol=4e-3 * 2.0**-20,
    )


class SweepTest(absltest.TestCase):
  def test_interrupted_sweep_goes_on(self):
    self.enterContext(mock.patch.object(scaling_law, '_LAYERS', 1))
    sweep, corpus = _sweep(), _toy_corpus()
    directory = _new_directory(self)
    train, trained = scaling_law.train, []

    def interrupted(program, config, *args):
      if len(trained) == 3:
        raise KeyboardInterrupt
      trained.append(config.steps)
      return train(program, config, *args)

    with mock.patch.object(scaling_law, 'train', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        scaling_law.run_sweep(sweep, corpus, directory)
    self.assertLen(list(directory.glob('*.json')), 3)
    with mock.patch.object(scaling_law, 'train', side_effect=train) as spy:
      losses = scaling_law.run_sweep(sweep, corpus, directory)
    self.assertEqual(spy.call_count, 1)
    self.assertEqual(list(losses), list(sweep.settings))
    for loss in losses.values():
      self.assertBetween(loss, 4.0, 8.0)
    # Quantized weights make another model from the same start.
    first, _, quantized, _ = losses.values()
    self.assertNotEqual(first, quantized)
    # Another sweep does not take them for its own.
    with self.assertRaisesRegex(CheckpointError, 'context: 8 there, 16 now'):
      scaling_law.run_sweep(sweep._replace(context=16), corpus, directory)


class SignsTest(parameterized.TestCase):
  def _signs(self, gap):
    settings = scaling_law.make_settings(
      [16, 32], [2, 4], ['e1m1', 'e2m1', 'e2m2'], [4, 8], 1
    )
    sweep = scaling_law.Sweep(settings, 8, 2, 1e-3, 6)
    gaps = {}
    for setting in settings:
      if setting != setting.baseline:
        N, D, E, M, B, _ = scaling_law.make_record(sweep, setting, 1.0)
        gaps[setting] = gap(N, D, E, M, B)
    return {sign.factor: sign for sign in scaling_law.check_signs(gaps, sweep)}

  def test_the_law_has_its_signs(self):
    signs = self._signs(laws.FloatLaw().gap)
    pairs = {factor: sign.pairs for factor, sign in signs.items()}
    self.assertEqual(pairs, {'D': 12, 'N': 12, 'B': 12, 'E': 8, 'M': 8})
    for sign in signs.values():
      self.assertEqual(sign.verdict, 'yes', sign)
      self.assertEqual(sign.right, sign.pairs)

  def test_noise_is_mostly_unresolved(self):
    resolved = 0
    for seed in range(20):
      generator = np.random.default_rng(seed)
      signs = self._signs(lambda *_: generator.standard_normal())
      resolved += sum(s.verdict != 'unresolved' for s in signs.values())
    # Two standard errors of 8 to 12 pairs are exceeded with probability .07
    # to .09: more than 25 times in 100 with probability 1e-6.
    self.assertBetween(resolved, 1, 25)

  def test_one_level_is_not_varied(self):
    settings = scaling_law.make_settings([16], [2], ['e2m1'], [4], 1)
    gaps = {settings[1]: 0.1}
    for sign in scaling_law.check_signs(gaps, _sweep()):
      self.assertEqual(sign.verdict, 'not varied', sign)

  def test_the_opposite_has_none(self):
    law = laws.FloatLaw()
    for sign in self._signs(lambda *at: -law.gap(*at)).values():
      self.assertEqual(sign.verdict, 'NO', sign)
      self.assertEqual(sign.right, 0)


class ScriptTest(absltest.TestCase):
  def test_refusals(self):
    workdir = _new_directory(self)
    losses = {s: 1.0 for s in _sweep().settings}
    for flag, message in (
      ('--widths=', '--widths names nothing'),
      ('--steps=a', 'lists of integers'),
      ('--steps=2', 'records has 4 entries; the law has 8 constants'),
    ):
      with (
        mock.patch.object(data, 'load_corpus', _toy_corpus),
        mock.patch.object(scaling_law, 'run_sweep', return_value=losses),
      ):
        status, out = scripts.run(scaling_law, f'--workdir={workdir}', flag)
      self.assertEqual(status, 1, out)
      self.assertIn(message, out)

  def test_table_and_plot(self):
    workdir = _new_directory(self)
    flags = (
      f'--workdir={workdir}',
      '--widths=16',
      '--steps=1,2,3,4,5',
      '--formats=e2m1',
      '--scale_blocks=4',
      '--context=8',
      '--batch=2',
      '--eval_windows=4',
    )
    text = mock.patch.object(data, 'load_corpus', _toy_corpus)
    with text, mock.patch.multiple(scaling_law, _RESAMPLES=2, _LAYERS=1):
      status, out = scripts.run(scaling_law, *flags)
    self.assertEqual(status, 0, out)
    self.assertIn('rises with D', out)
    with open(workdir / 'table.csv', newline='') as file:
      rows = list(csv.DictReader(file))
    self.assertLen(rows, 10)
    self.assertEqual(rows[0]['element'], 'float32')
    self.assertEqual(float(rows[0]['gap']), 0)
    plot = (workdir / 'plot.png').read_bytes()
    self.assertEqual(plot[:8], b'\x89PNG\r\n\x1a\n')


if __name__ == '__main__':
  absltest.main()
