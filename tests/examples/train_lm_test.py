"""The trainer: resume, meshes, processes, guards, and what it writes."""

import csv
import dataclasses
import errno
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import _results, formats
from lowbit_jax._files import DamagedFileError
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import optimizers, recipes
from models import byte_lm
from support import data, trainer
from support.checkpoints import Checkpoints
from tests.examples import scripts

_ROOT = pathlib.Path(__file__).resolve().parents[2]
script = scripts.load('train_lm')
_INIT, _MAKE_STEP = trainer.init, trainer.make_step
_GET = recipes.get


def _recipe(name: str) -> Recipe:
  """Where it is 'fixed_sr', one that rounds x, w and dy only once each."""
  recipe = _GET(name)
  if name != 'fixed_sr':
    return recipe
  backward = GemmSpec(recipe.dgrad.lhs, None)
  return dataclasses.replace(recipe, dgrad=backward, wgrad=GemmSpec())


def setUpModule():
  """Runs of equal settings share what they trace."""
  recipes.get = _recipe
  trainer.init = jax.jit(_INIT, static_argnums=0)
  trainer.make_step = functools.cache(_MAKE_STEP)


def tearDownModule():
  trainer.init, trainer.make_step = _INIT, _MAKE_STEP
  recipes.get = _GET


TINY = byte_lm.Config(width=64, heads=2, blocks=1, context=32, batch=8, steps=6)
STACKED = dataclasses.replace(TINY, blocks=2)


def settings(recipe: str = 'fixed_sr', **options) -> trainer.Settings:
  """A run of one block, which compiles faster than a scan over two.

  The default rounds operands of two of its products at random.
  """
  return trainer.Settings(TINY, recipe=recipe, **options)


def stacked(recipe: str) -> trainer.Settings:
  return trainer.Settings(STACKED, recipe=recipe, scan=True)


def corpus() -> data.Corpus:
  text = np.random.RandomState(0).randint(97, 123, 1 << 14).astype(np.uint8)
  return data.Corpus(text, text[: 1 << 12], 1, 'test')


def one_device():
  return jax.make_mesh(
    (1, 1, 1),
    trainer.AXES,
    (jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )


@functools.cache
def trained(run: trainer.Settings):
  """The state and the log of an uninterrupted run on one device."""
  return trainer.train(run, corpus(), mesh=one_device())


class Interrupted(Exception):
  pass


class ResumeTest(absltest.TestCase):
  def test_a_changed_recipe_is_another_run(self):
    run, text = settings(), corpus()
    before = trainer.identity(run, text)
    self.assertEqual(before, trainer.identity(run, text))
    changed = dataclasses.replace(recipes.get(run.recipe), center=True)
    with mock.patch.object(recipes, 'get', return_value=changed):
      self.assertNotEqual(before, trainer.identity(run, text))

  def test_ends_in_the_same_bits(self):
    self.check_resume(settings())

  @pytest.mark.slow
  def test_with_rotations_ends_in_the_same_bits(self):
    self.check_resume(settings('mxfp4_sr_rht'))

  @pytest.mark.slow
  def test_stacked_blocks_end_in_the_same_bits(self):
    self.check_resume(stacked('mxfp4_sr_rht'))

  @pytest.mark.slow
  def test_held_scales_end_in_the_same_bits(self):
    self.check_resume(stacked('fp8_delayed'))

  def check_resume(self, run):
    text = corpus()
    want, records = trained(run)
    with tempfile.TemporaryDirectory() as directory:
      directory = pathlib.Path(directory)
      options = {
        'mesh': one_device(),
        'save_every': 2,
        'log': directory / 'log.csv',
      }

      def checkpoints():
        return Checkpoints(
          directory / 'checkpoints', trainer.identity(run, text)
        )

      first = checkpoints()
      save = first.save

      def stop_after_four(step, state):
        save(step, state)
        if step == 4:
          raise Interrupted

      first.save = stop_after_four
      with self.assertRaises(Interrupted):
        trainer.train(run, text, first, **options)
      first.close()
      second = checkpoints()
      got, resumed = trainer.train(run, text, second, **options)
      second.close()
      with (directory / 'log.csv').open(newline='') as file:
        log = list(csv.DictReader(file))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)
    self.assertEqual(resumed, records)
    self.assertEqual([int(row['step']) for row in log], list(range(6)))


class MeshTest(parameterized.TestCase):
  # Sums over devices round differently. In float32 that is all; with a recipe
  # numbers next to a tie then round to the other side, and training goes on
  # from there, while the first loss is of the same weights.
  def test_losses_are_those_of_one_device(self):
    self.check_losses('data=2,fsdp=2,model=2', settings('float32'), 1e-4)

  @pytest.mark.slow
  def test_losses_of_stacked_blocks_are_those_of_one_device(self):
    self.check_losses('data=2,fsdp=2,model=2', stacked('float32'), 1e-4)

  @parameterized.parameters(
    ('fsdp=8', settings('mxfp4_sr_rht')),
    ('fsdp=8', stacked('mxfp4_sr_rht')),
    ('data=8', stacked('mxfp8')),
  )
  @pytest.mark.slow
  def test_losses_of_recipes_are_those_of_one_device(self, mesh, run):
    self.check_losses(mesh, run, 2e-2)

  def check_losses(self, mesh, run, limit):
    _, want = trained(run)
    mesh = trainer.make_mesh(mesh)
    state, got = trainer.train(run, corpus(), mesh=mesh)
    if mesh.shape['fsdp'] > 1:
      name = 'blocks' if run.scan else 'block_0'
      kernel = state.params[name]['up']['kernel']
      self.assertLess(kernel.addressable_shards[0].data.size, kernel.size)
    self.assertLess(abs(got[0].loss - want[0].loss), 1e-5)
    for a, b in zip(got, want, strict=True):
      self.assertLess(abs(a.loss - b.loss), limit)

  def test_microbatches(self):
    self.check_microbatches(settings('float32'))

  @pytest.mark.slow
  def test_microbatches_of_a_recipe(self):
    self.check_microbatches(settings('mxfp4_forward'))

  def check_microbatches(self, run):
    """Gradients of a batch in two parts, where tokens are not blocked."""
    _, want = trained(run)
    _, got = trained(dataclasses.replace(run, accumulate=2))
    for a, b in zip(got, want, strict=True):
      self.assertLess(abs(a.loss - b.loss), 2e-3)

  @parameterized.parameters(
    ('data=3', '3 places for 8 devices'),
    ('rows=8', "'rows=8' is not AXIS=SIZE"),
    ('data=x', 'AXIS=SIZE'),
  )
  def test_refusals(self, mesh, message):
    with self.assertRaisesRegex(byte_lm.ConfigError, message):
      trainer.make_mesh(mesh)


class GuardTest(absltest.TestCase):
  def test_names_what_is_not_finite(self):
    start = trainer.init

    def large(run):
      state = start(run)
      return state._replace(
        params=jax.tree.map(lambda p: 1e30 * p, state.params)
      )

    run = settings('float32')
    with (
      mock.patch.object(trainer, 'init', large),
      self.assertRaisesRegex(
        trainer.NonFiniteError, r'step \d: not finite: .*learning_rate'
      ),
    ):
      trainer.train(run, corpus(), mesh=one_device())

  def test_settings(self):
    for options, message in (
      ({'recipe': 'mxfp9'}, 'mxfp8'),
      ({'optimizer': 'sgd'}, 'adamw8'),
      ({'accumulate': 3}, 'must divide batch=8'),
      ({'exempt_last': 1, 'scan': True}, 'scan'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        settings(**options)


class OptimizerTest(absltest.TestCase):
  def test_state_of_eight_bits(self):
    def state_bytes(optimizer):
      run = trainer.Settings(recipe='float32', optimizer=optimizer, scan=True)
      state = jax.eval_shape(lambda: trainer.init(run))
      return optimizers.state_bytes(state.optimizer)

    ratio = state_bytes('adamw8') / state_bytes('adamw')
    self.assertBetween(ratio, 0.25, 0.3)


class MonitorTest(absltest.TestCase):
  def measure(self, recipe):
    windows = data.train_batch(corpus(), TINY, 0)
    run = settings(recipe)
    state = jax.jit(lambda: trainer.init(run))()
    monitored = trainer.make_monitor(run)(state, jnp.asarray(windows))
    return trainer._summary(monitored)

  @pytest.mark.slow
  def test_four_bits(self):
    spec = QuantSpec(formats.mxfp4)
    recipe = Recipe('mxfp4', *[GemmSpec(spec, spec)] * 3)
    with mock.patch.object(recipes, 'get', return_value=recipe):
      self.check_four_bits(self.measure('mxfp4_rtn'))

  @pytest.mark.slow
  def test_four_bits_of_a_recipe(self):
    self.check_four_bits(self.measure('mxfp4_rtn'))

  def check_four_bits(self, measured):
    self.assertBetween(measured['snr_db'], 3, 20)
    for operand in ('x', 'w', 'dy'):
      self.assertBetween(measured[f'{operand}_flushed'], 0.05, 0.9)
      self.assertGreater(measured[f'{operand}_clipped'], 0)

  @pytest.mark.slow
  def test_eight_bits(self):
    measured = self.measure('mxfp8')
    self.assertGreater(measured['snr_db'], 20)
    self.assertLess(measured['w_flushed'], 0.01)
    self.assertEqual(measured['dy_clipped'], 0)

  def test_log_keeps_what_was_measured(self):
    records = [
      trainer.Record(0, 2.5, 1.0, snr_db=7.5, dy_flushed=0.25),
      trainer.Record(1, 2.25, 0.5),
    ]
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'log.csv'
      trainer._write_log(path, records)
      self.assertEqual(trainer._read_log(path, 2), records)
    self.assertEqual(records[1].monitored, {})
    self.assertEqual(
      trainer._postfix(2.5, records[0].monitored),
      {'loss': '2.500', 'snr': '7.5dB', 'flushed': '25.0%'},
    )


class LogTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory) / 'log.csv'
    self.records = [trainer.Record(i, 2.5 - i, 1.0) for i in range(6)]

  def test_damage_is_refused(self):
    trainer._write_log(self.path, self.records)
    whole = self.path.read_text()
    header, *rows = whole.splitlines(keepends=True)
    for lines in (
      [],
      [header],
      [header, *rows[:3]],
      [header, *rows[:3], *rows[4:]],
      [header, rows[0], *rows],
      [header, rows[1], rows[0], *rows[2:]],
      [header, *rows, '6,0.5,1.0'],
      [whole.replace('1.5', '1.25')],
      [whole.replace(',', ';')],
    ):
      self.path.write_text(''.join(lines))
      with self.assertRaisesRegex(DamagedFileError, 'starts at step 6'):
        trainer._read_log(self.path, 6)

  def test_log_of_an_earlier_time_is_refused(self):
    trainer._write_log(self.path, self.records[:4])
    with self.assertRaisesRegex(DamagedFileError, 'ends before step 5'):
      trainer._read_log(self.path, 6)

  def test_deleted_log_starts_late(self):
    self.assertEqual(trainer._read_log(self.path, 3), [])
    trainer._write_log(self.path, self.records[3:])
    self.assertEqual(trainer._read_log(self.path, 5), self.records[3:5])
    self.assertEqual(trainer._read_log(self.path, 2), [])


class RefusalTest(absltest.TestCase):
  """What a user can ask for and not get ends without a traceback."""

  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.directory = pathlib.Path(directory)
    self.enterContext(mock.patch.object(data, 'load_corpus', corpus))
    self.enterContext(
      mock.patch.object(trainer, 'make_mesh', return_value=one_device())
    )

  def check(self, message, *flags, workdir='out'):
    own = f'--workdir={self.directory / workdir}'
    code, out = scripts.run(script, *ScriptTest.FLAGS, own, *flags)
    self.assertEqual(code, 1, out)
    self.assertRegex(out, f'^train_lm: .*{message}')

  def test_flags(self):
    self.check('exempt_last=9 are more than', '--blocks=2', '--exempt_last=9')
    message = "recipe='mxfp4_lowbit' cannot train.*principal=.*other sizes"
    sizes = ('--width=4', '--heads=2')
    self.check(message, *sizes, '--recipe=mxfp4_lowbit')
    self.check('seed=9223372036854775808 must', f'--seed={1 << 63}')

  def test_work_folders(self):
    (self.directory / 'file').write_text('')
    self.check('File exists: .*file', workdir='file')
    self.check('Not a directory: .*file', workdir='file/out')
    with _results.lock(self.directory, 'wait'):
      message = f'in use by process {os.getpid()}; wait.*--workdir'
      self.check(message, workdir='')
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'run.json')
    with mock.patch.object(os, 'replace', side_effect=full):
      self.check('No space left on device', workdir='full')
    self.assertEqual(os.listdir(self.directory / 'full' / 'checkpoints'), [])


class ScriptTest(absltest.TestCase):
  FLAGS = ('--width=64', '--heads=2', '--context=32', '--batch=8', '--steps=6')
  FLAGS += ('--eval_windows=8',)

  def test_one_process(self):
    mesh = mock.patch.object(trainer, 'make_mesh', return_value=one_device())
    text = mock.patch.object(data, 'load_corpus', corpus)
    with mesh, text, tempfile.TemporaryDirectory() as directory:
      code, out = scripts.run(
        script,
        *self.FLAGS,
        f'--workdir={directory}',
        '--recipe=fixed_sr',
        '--monitor_every=5',
        '--blocks=1',
      )
      self.assertEqual(code, 0, out)
      self.assertIn('held-out loss', out)
      summary = json.loads(
        (pathlib.Path(directory) / 'summary.json').read_text()
      )
      curve = (pathlib.Path(directory) / 'curve.png').read_bytes()
      with (pathlib.Path(directory) / 'log.csv').open(newline='') as file:
        log = list(csv.DictReader(file))
      self.assertEqual(summary['recipe'], 'fixed_sr')
      self.assertEqual(
        [bool(row['x_flushed']) for row in log], [1, 0, 0, 0, 0, 1]
      )
      self.assertEqual(summary['x_flushed'], float(log[5]['x_flushed']))
      # Half a step of 12 fractional bits is small beside inputs of variance 1
      # and weights of 1 / 64 or 1 / 512, not beside cotangents.
      self.assertBetween(summary['snr_db'], 3, 20)
      self.assertBetween(summary['x_flushed'], 1e-5, 0.01)
      self.assertBetween(summary['w_flushed'], 1e-5, 0.01)
      self.assertBetween(summary['dy_flushed'], 0.05, 0.9)
      self.assertTrue(curve.startswith(b'\x89PNG'))
      code, out = scripts.run(
        script, *self.FLAGS, f'--workdir={directory}', '--recipe=float32'
      )
      self.assertEqual(code, 1, out)
      self.assertIn('belongs to another run', out)

  @pytest.mark.slow
  def test_two_processes(self):
    command = [sys.executable, str(_ROOT / 'examples' / 'train_lm.py')]
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
      processes = [
        subprocess.Popen(
          [
            *command,
            *self.FLAGS,
            f'--workdir={directory}',
            '--mesh=data=2',
            '--recipe=fp8_current',
            '--blocks=1',
            f'--coordinator=localhost:{port}',
            '--processes=2',
            f'--process={i}',
          ],
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          env=_environment(),
        )
        for i in range(2)
      ]
      outputs = [p.communicate(timeout=600)[0] for p in processes]
    for process, out in zip(processes, outputs, strict=True):
      self.assertEqual(process.returncode, 0, out)
    self.assertIn('held-out loss', outputs[0])


def _environment():
  names = ('PATH', 'HOME', 'TMPDIR')
  kept = {n: v for n, v in os.environ.items() if n in names or 'JAX_' in n}
  return kept | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': f'{_ROOT}:{_ROOT / "pallas"}',
  }


if __name__ == '__main__':
  absltest.main()
