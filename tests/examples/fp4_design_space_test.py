"""Tests of examples/fp4_design_space.py and of its tasks."""

import csv
import importlib.util
import json
import math
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import testing
from models import byte_lm
from support import data, tasks
from tests.examples import scripts

study = scripts.load('fp4_design_space')


def _traced_once():
  """`make_train`, where equal runs share what they trace."""
  make, known = study.make_train, {}

  def make_train(task, changed, steps):
    key = task.name, None if changed is None else study._label(changed), steps
    if key not in known:
      known[key] = jax.jit(make(task, changed, steps))
    return known[key]

  return make_train


class SettingsTest(parameterized.TestCase):
  def test_all_settings_are_different_recipes(self):
    changes = [study.parse(text) for text in study.SETTINGS]
    self.assertEqual([study._label(c) for c in changes], list(study.SETTINGS))
    # The optimizer and the loss scale are no part of a recipe.
    same = {'optimizer', 'loss_scale'}
    recipes = [study.make_recipe(c) for c in changes if not same & c.keys()]
    products = {(r.fwd, r.dgrad, r.wgrad) for r in recipes}
    self.assertLen(products, len(recipes))

  def test_every_value_is_swept(self):
    for name, values in study.CHOICES.items():
      swept = {study.parse(text).get(name) for text in study.SETTINGS}
      # These are the same number, or a matter of size.
      left = {'full', 'zero', 'auto', '16', '32', '64'}
      self.assertEmpty(set(values[1:]) - swept - left, name)

  def test_sites(self):
    recipe = study.make_recipe(
      study.parse('sr=grads+hadamard=wgrad+step_grad=dge')
    )
    sites = [s for g in recipe.gemms for s in (g.lhs, g.rhs)]
    self.assertEqual([s.needs_key for s in sites], [0, 0, 1, 0, 0, 1])
    self.assertEqual([g.hadamard for g in recipe.gemms], [0, 0, 16])
    plain = study.micro_scaling.Identity()
    self.assertEqual([s.step_grad == plain for s in sites], [0, 0, 1, 1, 1, 1])

  def test_blocks_of_power_of_two_scales_are_longer(self):
    for text, block in (('base', 16), ('scale=E8M0', 32), ('block=64', 64)):
      recipe = study.make_recipe(study.parse(text))
      self.assertEqual(recipe.fwd.lhs.block, block)

  @parameterized.parameters(
    ('rounding=up', 'scale_round'),
    ('sr=sometimes', 'grads_x'),
    ('scale=ideal', "tensor_scale.*leave it at 'off'"),
    ('scale_grad=dge', 'stat_grad'),
  )
  def test_refuses_and_lists_what_is_valid(self, text, message):
    with self.assertRaisesRegex(byte_lm.ConfigError, message):
      study.parse(text)

  @parameterized.parameters(
    ('base', 5, 1),
    ('tensor_scale=off', 4, 0),
    ('sr=grads', 5 + 2 / 6, 1),
    ('hadamard=all', 5 + 4, 1),
    ('step_grad=dge', 5 + 1, 1),
    ('stat_grad=absmax', 5 + 2 / 3, 1),
  )
  def test_overhead(self, text, operations, passes):
    cost = study.overhead(study.parse(text))
    self.assertAlmostEqual(cost.operations, operations)
    self.assertEqual(cost.passes, passes)


class TasksTest(parameterized.TestCase):
  @parameterized.parameters('regression', 'diffusion')
  def test_float32_learns(self, name):
    self.check_learns(name)

  @pytest.mark.slow
  def test_float32_learns_digits(self):
    if importlib.util.find_spec('sklearn') is None:
      self.skipTest('scikit-learn is not installed')
    self.check_learns('digits')

  def check_learns(self, name):
    task = tasks.TASKS[name]()
    params = task.init(0)
    loss = jax.jit(lambda params, batch: task.loss(params, batch, jnp.matmul))
    before = float(loss(params, task.held_out()))
    (after,) = study.train_seeds(task, None, 1, 60)
    self.assertLess(after, 0.9 * before)
    testing.assert_trees_bits_equal(params, task.init(0))
    testing.assert_trees_bits_equal(task.batches(1, 2), task.batches(1, 2))

  def test_language_model_goes_through_the_linear_layer(self):
    text = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8)
    corpus = data.Corpus(text[:3000], text[3000:], 2, 'toy')
    with mock.patch.object(data, 'load_corpus', return_value=corpus):
      task = tasks.TASKS['lm']()
    calls = []

    def linear(x, w):
      calls.append(w.shape)
      return x @ w

    windows = task.held_out()[:2, :9]
    loss = float(jax.jit(lambda: task.loss(task.init(0), windows, linear))())
    self.assertAlmostEqual(loss, math.log(256), delta=1.5)
    self.assertLen(calls, 8)


class TableTest(absltest.TestCase):
  LOSSES = {
    'float32': [1.0, 2.0],
    'base': [1.2, 2.4],
    'tensor_scale=off': [1.5, 2.5],
    'sr=all': [1.3, 2.4],
    'step_grad=dge': [math.nan, 2.0],
  }

  def rows(self):
    settings = {n: study.parse(n) for n in self.LOSSES if n != 'float32'}
    return study.make_rows('digits', self.LOSSES, settings)

  def test_gaps_are_paired_and_the_front_is_not_beaten(self):
    rows = {row.setting: row for row in self.rows()}
    self.assertAlmostEqual(rows['base'].gap, 0.3)
    self.assertAlmostEqual(rows['base'].standard_error, 0.1)
    front = [name for name, row in rows.items() if row.on_front]
    self.assertEqual(front, ['base', 'tensor_scale=off'])

  def test_plot(self):
    if importlib.util.find_spec('matplotlib') is None:
      self.skipTest('matplotlib is not installed')
    directory = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(directory) / 'plot.png'
    study.write_plot(path, {'digits': self.rows(), 'lm': self.rows()})
    self.assertEqual(path.read_bytes()[:8], b'\x89PNG\r\n\x1a\n')


class ScriptTest(absltest.TestCase):
  """Runs the script at toy size."""

  def _run(self, *flags):
    own = ('--tasks=regression', '--seeds=2', '--steps=3')
    return scripts.run(study, f'--workdir={self.workdir}', *own, *flags)

  def test_trains_reports_and_resumes(self):
    self.enterContext(mock.patch.object(study, 'make_train', _traced_once()))
    plot = self.enterContext(mock.patch.object(study, 'write_plot'))
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory)
    status, out = self._run('--settings=base')
    self.assertEqual(status, 0, out)
    self.assertIn('float32', out)
    plot.assert_called_once()
    rows = self._table()
    self.assertEqual(list(rows), ['float32', 'base'])
    self.assertEqual(float(rows['float32']['gap']), 0)
    self.assertNotEqual(float(rows['base']['gap']), 0)
    record = self.workdir / 'runs' / 'regression_base.json'
    losses = json.loads(record.read_text())['losses']
    self.assertAlmostEqual(
      float(rows['base']['loss']), float(np.mean(losses)), places=5
    )

    # What is there is not trained again; what is missing comes back the same.
    record.unlink()
    with mock.patch.object(
      study, 'train_seeds', wraps=study.train_seeds
    ) as train:
      study.run(['regression'], {'base': {}}, 2, 3, self.workdir)
    train.assert_called_once()
    self.assertEqual(self._table(), rows)
    self.assertEqual(json.loads(record.read_text())['losses'], losses)

    for flag, message in (
      ('--settings=hadamard=some', 'none, fwd, bwd, all, wgrad'),
      ('--tasks=', '--tasks names nothing'),
    ):
      status, out = self._run(flag)
      self.assertEqual(status, 1)
      self.assertIn(message, out)

  def _table(self):
    with open(self.workdir / 'table.csv', newline='') as file:
      return {row['setting']: row for row in csv.DictReader(file)}


if __name__ == '__main__':
  absltest.main()
