"""Tests of examples/quantize_lm.py and the modules beside it."""

import contextlib
import csv
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax._files import DamagedFileError
from models import byte_lm
from support import data, loop, report, timing
from support.checkpoints import CheckpointError, Checkpoints
from tests.examples import scripts

_ROOT = pathlib.Path(__file__).resolve().parents[2]
script = scripts.load('quantize_lm')

_INIT = loop.init


def setUpModule():
  """Runs of equal sizes share what they trace."""
  loop.init = jax.jit(_INIT, static_argnums=0)


def tearDownModule():
  loop.init = _INIT


_TOY = byte_lm.Config(width=16, heads=2, blocks=1, context=8, batch=2, steps=6)
_RUN = {'seed': 0}


def _toy_corpus() -> data.Corpus:
  text = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8)
  return data.Corpus(text[:3000], text[3000:], 2, 'toy')


def _new_directory(test: absltest.TestCase) -> pathlib.Path:
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


def _contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob('*'))
    if path.is_file()
  }


def _assert_same_bits(expected, actual):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
    ),
    expected,
    actual,
  )


class ModelTest(parameterized.TestCase):
  def test_batches_are_functions_of_seed_and_step(self):
    corpus = _toy_corpus()
    first = data.train_batch(corpus, _TOY, 3)
    data.train_batch(corpus, _TOY, 4)
    np.testing.assert_array_equal(first, data.train_batch(corpus, _TOY, 3))
    self.assertTrue(np.any(first != data.train_batch(corpus, _TOY, 4)))
    other = byte_lm.Config(context=8, batch=2, seed=1)
    self.assertTrue(np.any(first != data.train_batch(corpus, other, 3)))
    self.assertEqual(first.shape, (2, 9))

  def test_held_out_windows_reach_both_ends(self):
    corpus = _toy_corpus()
    windows = data.held_out_windows(corpus, 8, 5)
    np.testing.assert_array_equal(windows[0], corpus.held_out[:9])
    np.testing.assert_array_equal(windows[-1], corpus.held_out[-9:])

  def test_default_model_has_the_stated_size(self):
    params = jax.eval_shape(lambda: byte_lm.init(byte_lm.Config()))
    self.assertEqual(
      sum(leaf.size for leaf in jax.tree.leaves(params)), 1246848
    )
    kernels = byte_lm.linear_kernels(params).values()
    self.assertLen(kernels, 24)
    self.assertEqual(sum(kernel.size for kernel in kernels), 1179648)

  def test_model_is_causal(self):
    apply = jax.jit(byte_lm.ByteLM(_TOY).apply)
    params = byte_lm.init(_TOY)
    tokens = np.arange(8, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 5] = 200
    before = apply({'params': params}, tokens)
    after = apply({'params': params}, changed)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    self.assertTrue(np.all(np.any(before[0, 5:] != after[0, 5:], axis=-1)))

  def test_odd_head_size_is_refused(self):
    with self.assertRaisesRegex(byte_lm.ConfigError, 'width=33'):
      byte_lm.Config(width=33)


class ResumeTest(absltest.TestCase):
  def test_interrupted_training_ends_in_the_same_bits(self):
    corpus = _toy_corpus()
    whole = Checkpoints(_new_directory(self), _RUN)
    expected = loop.train(_TOY, corpus, whole, 2)
    directory = _new_directory(self)
    batch = data.train_batch

    def interrupted(corpus, config, step):
      if step == 5:
        raise KeyboardInterrupt
      return batch(corpus, config, step)

    with mock.patch.object(data, 'train_batch', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        checkpoints = Checkpoints(directory, _RUN)
        loop.train(_TOY, corpus, checkpoints, 2)
    checkpoints = Checkpoints(directory, _RUN)
    self.assertEqual(checkpoints.steps(), [2, 4])
    steps = []

    def recorded(corpus, config, step):
      steps.append(step)
      return batch(corpus, config, step)

    with mock.patch.object(data, 'train_batch', recorded):
      actual = loop.train(_TOY, corpus, checkpoints, 2)
    self.assertEqual(steps, [4, 5])
    _assert_same_bits(expected, actual)

    with mock.patch.object(data, 'train_batch', recorded):
      reused = loop.train(_TOY, corpus, checkpoints, 2)
    self.assertEqual(steps, [4, 5])
    _assert_same_bits(expected, reused)


class Killed(BaseException):
  pass


_CHANGES = ('mkdir', 'remove', 'rename', 'replace', 'rmdir', 'unlink')


def _die_at(n: int, work) -> bool:
  """Whether `work` made more than n changes of files: no later one happens."""
  count = 0

  def mortal(change):
    def call(*args, **options):
      nonlocal count
      count += 1
      if count > n:
        raise Killed
      return change(*args, **options)

    return call

  changes = {name: mortal(getattr(os, name)) for name in _CHANGES}
  with mock.patch.multiple(os, **changes):
    try:
      work()
    except (Killed, CheckpointError):  # Orbax wraps what its threads raise.
      return True
  return False


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = _new_directory(self) / 'kept'
    self.state = {'w': np.arange(64, dtype=np.float32), 'n': np.int32(7)}
    self.template = jax.eval_shape(lambda: self.state)

  def _save(self, *steps):
    checkpoints = Checkpoints(self.directory, _RUN)
    for step in steps:
      checkpoints.save(step, self.state)
    checkpoints.close()

  def _restore(self, run=None):
    checkpoints = Checkpoints(self.directory, run or _RUN)
    with contextlib.closing(checkpoints):
      return checkpoints.restore(self.template)

  def _assert_refused_untouched(self, pattern, run=None):
    before = _contents(self.directory)
    with self.assertRaisesRegex((CheckpointError, DamagedFileError), pattern):
      self._restore(run)
    self.assertEqual(_contents(self.directory), before)

  def _remove(self, *names):
    for name in names:
      (self.directory / name).unlink()

  def test_round_trip_keeps_the_newest_two(self):
    self._save(1, 2, 3)
    step, state = self._restore()
    self.assertEqual(step, 3)
    np.testing.assert_array_equal(state['w'], self.state['w'])
    kept = Checkpoints(self.directory, _RUN).steps()
    self.assertEqual(kept, [2, 3])

  def test_interrupt_waits_for_the_save(self):
    checkpoints = Checkpoints(self.directory, _RUN)
    save = checkpoints._manager.save

    def interrupted(*args, **kwargs):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.01)
      save(*args, **kwargs)

    with mock.patch.object(checkpoints._manager, 'save', interrupted):
      with self.assertRaises(KeyboardInterrupt):
        checkpoints.save(1, self.state)
    self.assertEqual(self._restore()[0], 1)

  def test_new_directory_holds_nothing(self):
    self.assertEqual(self._restore(), (0, None))

  def test_any_damaged_file_is_noticed(self):
    self._save(1, 2)
    pristine = _contents(self.directory)
    damaged = [name for name in pristine if name.startswith('2/')]
    self.assertGreater(len(damaged), 5)
    for name in damaged:
      content = pristine[name]
      half = len(content) // 2
      flipped = content[:half] + b'?' + content[half + 1 :]
      for damage in {content[:half], flipped} - {content}:
        (self.directory / name).write_bytes(damage)
        self._assert_refused_untouched("2' is damaged.*go on from step 1")
      (self.directory / name).write_bytes(content)
    self.assertEqual(self._restore()[0], 2)

  def test_missing_file_is_noticed(self):
    self._save(1)
    self._remove('1/state/_METADATA')
    self._assert_refused_untouched("1' is damaged.*go on from the start")

  def test_checkpoint_without_seal_is_still_checked(self):
    self._save(1, 2)
    self._remove('2/files.json')
    self.assertEqual(self._restore()[0], 2)  # and sealed now
    (self.directory / '2' / 'info' / 'metadata').write_text('{')
    self._assert_refused_untouched("2' is damaged: info/metadata was changed")
    self._remove('2/files.json')
    self._assert_refused_untouched("2' is damaged")

  def test_newest_whole_checkpoint_is_taken(self):
    self._save(1, 2)
    self._remove('1/info/metadata')
    self.assertEqual(self._restore()[0], 2)
    self._remove('1/files.json')
    self.assertEqual(self._restore()[0], 2)
    self._remove('2/info/metadata')
    self._assert_refused_untouched("2' is damaged.*go on from the start")
    shutil.rmtree(self.directory / '2')
    self._assert_refused_untouched("1' is damaged.*go on from the start")

  def check_kills(self, points):
    """A process that dies at its n-th change of the directory, for some n."""
    self._save(1, 2)
    pristine = self.directory.with_name('pristine')
    self.directory.rename(pristine)
    for n in points:
      shutil.rmtree(self.directory, ignore_errors=True)
      shutil.copytree(pristine, self.directory)
      died = _die_at(n, lambda: self._save(3))
      step, state = self._restore()
      self.assertIn(step, (2, 3) if died else (3,))
      np.testing.assert_array_equal(state['w'], self.state['w'])
      self._save(4)
      self.assertEqual(self._restore()[0], 4)
      names = {path.name for path in self.directory.iterdir()}
      self.assertEqual(names, {'run.json', str(step), '4'})
    return died

  def test_kills_while_saving(self):
    self.check_kills((5, 10, 11, 13))

  @pytest.mark.slow
  def test_all_kills_while_saving(self):
    self.assertFalse(self.check_kills(range(60)))

  def test_kills_at_the_start(self):
    for n in range(8):
      shutil.rmtree(self.directory, ignore_errors=True)
      died = _die_at(n, lambda: Checkpoints(self.directory, _RUN).close())
      self.assertEqual(self._restore(), (0, None))
    self.assertFalse(died)

  def test_full_disk(self):
    self._save(1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with contextlib.closing(Checkpoints(self.directory, _RUN)) as checkpoints:
      with (
        mock.patch.object(checkpoints._manager, 'save', side_effect=full),
        self.assertRaisesRegex(CheckpointError, 'No space left on device'),
      ):
        checkpoints.save(2, self.state)
    self.assertEqual(self._restore()[0], 1)

  def test_changed_values_are_noticed(self):
    self._save(1)
    manager = ocp.CheckpointManager(self.directory)
    info = manager.restore(
      1, args=ocp.args.Composite(info=ocp.args.JsonRestore())
    )['info']
    self.state['w'] = self.state['w'] + 1
    manager.save(
      2,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(self.state), info=ocp.args.JsonSave(info)
      ),
    )
    manager.close()
    self._assert_refused_untouched("2' is damaged.*go on from step 1")

  def test_other_run_is_refused(self):
    self._save(1)
    self._assert_refused_untouched('seed: 0 there, 3 now', {'seed': 3})

  @parameterized.parameters('{', '[]', '{"kind": "other", "run": {}}', '\xff')
  def test_damaged_manifest_is_refused(self, text):
    self._save(1)
    (self.directory / 'run.json').write_bytes(text.encode('latin-1'))
    self._assert_refused_untouched("run.json' is damaged.*another --workdir")

  def test_other_files_are_refused(self):
    self.directory.mkdir()
    (self.directory / 'thesis.tex').write_text('hello')
    self._assert_refused_untouched('thesis.tex.*another --workdir')

  def test_other_orbax_directory_is_refused(self):
    with ocp.CheckpointManager(self.directory) as manager:
      manager.save(5, args=ocp.args.StandardSave(self.state))
    self._assert_refused_untouched('something else')

  def test_other_step_in_own_directory_is_refused(self):
    self._save(1)
    with ocp.CheckpointManager(self.directory) as manager:
      manager.save(5, args=ocp.args.StandardSave(self.state))
    self._assert_refused_untouched("5' is damaged")

  @parameterized.parameters(({'kind': 'other'},), (['kind'],))
  def test_older_step_of_another_kind_is_refused(self, info):
    self._save(5)  # A later save would delete step 1 as the oldest.
    with ocp.CheckpointManager(self.directory) as manager:
      manager.save(
        1,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(self.state), info=ocp.args.JsonSave(info)
        ),
        force=True,
      )
    self._assert_refused_untouched("1' is damaged.*something else")

  def test_file_in_place_of_directory_is_refused(self):
    self.directory.write_text('')
    with self.assertRaisesRegex(CheckpointError, 'is a file'):
      self._restore()


class ReportTest(parameterized.TestCase):
  def _row(self, name='a', bits=4.0, difference=0.1):
    return report.Row(name, 1000, bits, 2.1, difference, 0.01, 3.0, 1.2)

  def test_failed_write_keeps_the_old_file(self):
    directory = _new_directory(self)
    path = directory / 'table.csv'
    path.write_text('old')
    with mock.patch.object(os, 'replace', side_effect=OSError):
      with self.assertRaises(OSError):
        report.write_csv(path, [self._row()])
    self.assertEqual(_contents(directory), {'table.csv': b'old'})

  def test_csv_has_one_line_per_row(self):
    path = _new_directory(self) / 'table.csv'
    report.write_csv(path, [self._row('a'), self._row('b', difference=-0.5)])
    with open(path, newline='') as file:
      rows = list(csv.DictReader(file))
    self.assertEqual([row['format'] for row in rows], ['a', 'b'])
    self.assertEqual(float(rows[1]['difference']), -0.5)
    self.assertEqual(int(rows[1]['bytes']), 1000)

  def test_rows_line_up_with_the_header(self):
    self.assertLen(report.format_row(self._row()), len(report.HEADER))

  def test_plot_labels_are_apart(self):
    matplotlib = self._import_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(9, 6))
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(2, 9)
    axes.set_ylim(0, 1)
    points = [(4.25, 0.5 + 0.001 * index) for index in range(12)]
    report.place_labels(axes, points, ['mxfp4_label'] * 12, 8.5)
    renderer = figure.canvas.get_renderer()
    boxes = [
      text.get_window_extent(renderer) for text in axes.texts if text.get_text()
    ]
    self.assertLen(boxes, 12)
    for index, box in enumerate(boxes):
      self.assertFalse(box.count_overlaps(boxes[:index]))

  @parameterized.parameters(
    [[]], [[(4.0, float('nan')), (8.0, -0.2), (32.0, 0.0)]]
  )
  def test_plot_is_written(self, points):
    self.check_plot(points)

  @pytest.mark.slow
  def test_plot_of_one_point_is_written(self):
    self.check_plot([(4.0, 0.1)])

  def check_plot(self, points):
    self._import_matplotlib()
    path = _new_directory(self) / 'plot.png'
    rows = [self._row(bits=bits, difference=gap) for bits, gap in points]
    report.write_plot(path, rows, 'title')
    self.assertEqual(path.read_bytes()[:8], b'\x89PNG\r\n\x1a\n')

  def _import_matplotlib(self):
    try:
      import matplotlib.backends.backend_agg
      import matplotlib.figure
    except ImportError:
      self.skipTest('matplotlib is not installed')
    return matplotlib


class TimingTest(absltest.TestCase):
  def test_losses_are_those_of_the_candidate_in_order(self):
    calls = []

    def loss(params, batch):
      calls.append(params)
      return params + batch

    batches = [np.full(2, 10.0), np.full(2, 20.0), np.full(2, 30.0)]
    losses, seconds, ratio = timing.measure(
      (loss, 1.0), (loss, 2.0), batches, 2
    )
    np.testing.assert_array_equal(losses, [12, 12, 22, 22, 32, 32])
    self.assertGreater(seconds, 0)
    self.assertGreater(ratio, 0)
    self.assertEqual(calls, [1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0])


class ScriptTest(absltest.TestCase):
  """Runs the script at toy size."""

  _FLAGS = (
    '--workdir=out',
    '--width=32',
    '--blocks=1',
    '--context=32',
    '--batch=4',
    '--eval_windows=6',
    '--timing_rounds=1',
    '--sample_bytes=8',
    '--sample_format=mxfp4',
  )

  def setUp(self):
    super().setUp()
    self.cwd = _new_directory(self)

  def _run(self, *extra):
    with contextlib.chdir(self.cwd):
      status, out = scripts.run(script, *self._FLAGS, *extra)
    self._assert_no_paths(out)
    return status, out

  def _assert_no_paths(self, out):
    for path in (str(self.cwd), str(_ROOT), sys.prefix, sys.base_prefix):
      self.assertNotIn(path, out)

  def _start(self, *extra):
    paths = [*filter(None, sys.path), str(_ROOT), str(_ROOT / 'pallas')]
    return subprocess.Popen(
      [
        sys.executable,
        str(_ROOT / 'examples' / 'quantize_lm.py'),
        *self._FLAGS,
        *extra,
      ],
      cwd=self.cwd,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def _finish(self, process):
    out, err = process.communicate(timeout=300)
    self._assert_no_paths(out + err)
    return process.returncode, err

  def test_table_plot_sample_and_reuse(self):
    rows = self.check_run('--formats=mxfp4')
    self.assertEqual(list(rows), ['float32', 'mxfp4'])

  @pytest.mark.slow
  def test_wider_formats_lose_less(self):
    rows = self.check_run('--formats=mxfp4,int8_channel')
    self.assertEqual(list(rows), ['float32', 'mxfp4', 'int8_channel'])
    self.assertLess(
      abs(float(rows['int8_channel']['difference'])),
      0.5 * abs(float(rows['mxfp4']['difference'])) + 1e-3,
    )

  def check_run(self, *flags):
    corpus = data.load_corpus()
    self.enterContext(
      mock.patch.object(data, 'load_corpus', return_value=corpus)
    )
    status, out = self._run('--steps=12', *flags)
    self.assertEqual(status, 0, out)
    self.assertIn('loss=', out)
    self.assertIn('sample of the mxfp4 model', out)
    with open(self.cwd / 'out' / 'table.csv', newline='') as file:
      rows = {row['format']: row for row in csv.DictReader(file)}
    weights = 32 * 96 + 32 * 32 + 2 * 32 * 128
    self.assertEqual(int(rows['float32']['bytes']), 4 * weights)
    self.assertEqual(int(rows['mxfp4']['bytes']), weights // 2 + weights // 32)
    self.assertLess(float(rows['float32']['loss']), 5.4)
    self.assertNotEqual(float(rows['mxfp4']['difference']), 0)
    self.assertTrue((self.cwd / 'out' / 'plot.png').exists())
    row = report.Row('float32', 1000, 32.0, 2.1, 0.0, 0.0, 3.0, 1.0)
    with (
      mock.patch.object(script, 'evaluate', return_value=[row]),
      mock.patch.object(report, 'write_plot'),
    ):
      status, out = self._run('--steps=12', '--sample_bytes=0')
    self.assertEqual(status, 0, out)
    self.assertIn('step 12 of 12 reused', out)
    return rows

  def test_interrupt_says_what_was_kept_and_no_other_run_takes_it(self):
    flags = ('--save_every=2', '--width=16', '--heads=2', '--context=8')
    flags += ('--batch=2',)
    self.enterContext(mock.patch.object(data, 'load_corpus', _toy_corpus))
    batch = data.train_batch

    def interrupted(corpus, config, step):
      if step == 5:
        signal.raise_signal(signal.SIGINT)
      return batch(corpus, config, step)

    # In the background interrupts are ignored, unless they are handled.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    self.addCleanup(signal.signal, signal.SIGINT, previous)
    with mock.patch.object(data, 'train_batch', interrupted):
      status, out = self._run('--steps=6', *flags)
    self.check_interrupted(status, out, 6, flags)

  @pytest.mark.slow
  def test_interrupted_process_says_what_was_kept(self):
    flags = ('--save_every=5', '--learning_rate=1e-4')
    flags += ('--width=16', '--context=8', '--batch=2')
    # A process that was started in the background passes on that it ignores
    # interrupts, unless it handles them.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = self._start('--steps=100000', *flags)
    signal.signal(signal.SIGINT, previous)
    kept = self.cwd / 'out' / 'checkpoints'
    while process.poll() is None and not (kept / '5').exists():
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    self.check_interrupted(*self._finish(process), 100000, flags)

  def check_interrupted(self, status, err, steps, flags):
    kept = self.cwd / 'out' / 'checkpoints'
    self.assertEqual(status, 130, err)
    done = max(int(path.name) for path in kept.iterdir() if path.is_dir())
    self.assertIn(f'step {done} of {steps} is kept in out', err)
    self.assertNotIn('Traceback', err)

    before = _contents(kept)
    status, out = self._run('--steps=12', *flags)
    self.assertEqual(status, 1)
    self.assertIn(f'steps: {steps} there, 12 now', out)
    self.assertEqual(_contents(kept), before)


if __name__ == '__main__':
  absltest.main()
