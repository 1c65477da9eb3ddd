"""Tests of examples/evolve.py at toy size."""

import contextlib
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from lowbit_jax import _results
from lowbit_jax._files import DamagedFileError
from lowbit_jax.search import certify, emit, evolve, targets
from tests.examples import scripts

_ROOT = pathlib.Path(__file__).resolve().parents[2]
script = scripts.load('evolve')

_TOY = (
  '--rows=3', '--constants=3', '--batch=32', '--islands=2', '--exchange=2',
)  # fmt: skip


def _start(directory, *flags):
  names = ('PATH', 'HOME', 'TMPDIR')
  kept = {n: v for n, v in os.environ.items() if n in names or 'JAX_' in n}
  environment = kept | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',  # A search takes longer to run.
    'PYTHONPATH': f'{_ROOT}:{_ROOT / "pallas"}',
  }
  script = str(_ROOT / 'examples' / 'evolve.py')
  return subprocess.Popen(
    [sys.executable, script, *_TOY, f'--workdir={directory}', *flags],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _run(directory, *flags):
  process = _start(directory, *flags)
  out, _ = process.communicate(timeout=600)
  return process.returncode, out


class EvolveTest(absltest.TestCase):
  def test_islands_resume_and_report(self):
    """One island after the other, in one process, with fewer starts."""

    def run(directory, *flags):
      for island in (1, 0):
        own = (*_TOY, f'--workdir={directory}', f'--island={island}')
        code, out = scripts.run(script, *own, *flags)
        if code:
          break
      return code, out

    changes = (
      (evolve, '_SCREEN', (32, 24)),
      (evolve, '_STARTS', 8),
      (evolve, '_STEPS', 24),  # as in `_SCREEN`: one program fits all
      (script, 'started', lambda count: contextlib.nullcontext([])),
      (targets, 'core_reference', lambda target: np.exp2),
    )
    for owner, name, value in changes:
      self.enterContext(mock.patch.object(owner, name, value))
    self.check_islands(run, 1, 2)

  @pytest.mark.slow
  def test_islands_in_processes_resume_and_report(self):
    self.check_islands(_run, 3, 6)

  def check_islands(self, run, first, last):
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory)
      code, out = run(directory, f'--generations={first}')
      self.assertEqual(code, 0, out)
      code, out = run(directory, f'--generations={last}')
      self.assertEqual(code, 0, out)
      self.assertIn(f'generation {last}', out)
      hall = json.loads((path / 'hall_of_fame.json').read_text())
      self.assertEqual(hall['target'], 'exp2')
      self.assertGreater(hall['fits'], 2 * (2 + last * 32))
      errors = [entry['error'] for entry in hall['programs']]
      self.assertEqual(errors, sorted(errors, reverse=True))
      self.assertLess(errors[-1], 0.05)
      plot = (path / 'pareto.png').read_bytes()
      self.assertTrue(plot.startswith(b'\x89PNG'))
      for island in range(2):
        text = (path / f'island_{island}' / 'log.csv').read_text()
        seconds = [
          float(row['seconds']) for row in csv.DictReader(text.splitlines())
        ]
        self.assertEqual(seconds, sorted(seconds))
      code, out = run(directory, f'--generations={last}', '--seed=1')
      self.assertEqual(code, 1, out)
      self.assertIn('belongs to another search: seed 0 -> 1', out)

  @pytest.mark.slow
  def test_fastest_program_is_emitted(self):
    with tempfile.TemporaryDirectory() as directory:
      flags = ('--objective=time', '--bound=1e6', '--generations=3')
      flags += ('--interval=-0.5,0.5', '--islands=1', '--ops=add,mul,fma')
      code, out = _run(directory, *flags)
      self.assertEqual(code, 0, out)
      self.assertIn('x the speed of lowbit_jax.special.exp2, which', out)
      path = pathlib.Path(directory)
      certificate = certify.Certificate.load(path / 'exp2.json')
      self.assertIn('--objective=time', certificate.provenance.command)
      exp2 = emit.load_python((path / 'exp2.py').read_text(), 'exp2')
      certify.check(certificate, exp2, np.exp2)
      self.assertIn('float lowbit_exp2(', (path / 'exp2.c').read_text())

  def test_bad_flags(self):
    with tempfile.TemporaryDirectory() as directory:
      for flag, message in (
        ('--interval=0', '--interval=0 must be two numbers'),
        ('--interval=1,0', 'must be finite with lo < hi'),
        ('--ops=add,plus', "ops has 'plus'"),
        ('--coordinator=localhost:1', 'needs --generations'),
      ):
        own = (f'--workdir={directory}', '--islands=1')
        code, out = scripts.run(script, *own, flag)
        self.assertEqual(code, 1, out)
        self.assertIn(message, out)

  def test_other_islands_end_with_the_first(self):
    sleep = [sys.executable, '-c', 'import time; time.sleep(600)']
    start = subprocess.Popen

    def started(arguments, **options):
      self.assertEqual(arguments[-1], f'--island={len(others) + 1}')
      others.append(start(sleep, **options))
      return others[-1]

    def end(number):
      for other in others:
        other.wait()  # killed
      raise SystemExit(number)

    self.enterContext(mock.patch.object(subprocess, 'Popen', started))
    previous = signal.getsignal(signal.SIGTERM)
    for error in (SystemExit, KeyboardInterrupt, ValueError):
      others = []
      with self.assertRaises(error), script.started(3):
        if error is SystemExit:
          with mock.patch.object(signal, 'raise_signal', end):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # in which the signal arrives
        raise error
      self.assertEqual([other.poll() for other in others], [-9, -9])
      self.assertEqual(signal.getsignal(signal.SIGTERM), previous)

  def test_island_without_its_parent_ends(self):
    with tempfile.TemporaryDirectory() as directory:
      flags = (*_TOY, f'--workdir={directory}', '--island=1', '--parent=1')
      with (
        mock.patch.object(evolve, 'init'),
        mock.patch.object(os, 'getppid', return_value=2),
      ):
        code, out = scripts.run(script, *flags)
    self.assertEqual(code, 1, out)
    self.assertIn('island 1 ends: process 1 is gone', out)

  @pytest.mark.slow
  def test_no_island_outlives_a_signal(self):
    for number, status in ((signal.SIGTERM, -15), (signal.SIGKILL, -9)):
      with tempfile.TemporaryDirectory() as directory:
        island = pathlib.Path(directory) / 'island_1'
        process = _start(directory, '--minutes=10')
        while process.poll() is None and not (island / '.lock').exists():
          time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=300)  # until both have ended
        self.assertEqual(process.returncode, status)
        with _results.lock(island, 'wait'):
          pass

  def test_log_goes_on_or_is_refused(self):
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'log.csv'
      state = mock.Mock(archive={}, generation=3, fits=7)
      log = script.Log(path, 2)
      log._start -= 50
      log.write(state)
      log = script.Log(path, 2)
      self.assertGreaterEqual(log.elapsed(), 50)
      log.write(state)
      rows = list(csv.DictReader(path.read_text().splitlines()))
      self.assertEqual([row['fits'] for row in rows], ['7', '7'])
      self.assertEqual(rows[0]['error_2'], 'inf')
      for text in ('', path.read_text()[:-5], '\0' * 9):
        path.write_text(text)
        with self.assertRaisesRegex(DamagedFileError, 'count its time from 0'):
          script.Log(path, 2)

  @pytest.mark.slow
  def test_bad_flag_ends_the_process(self):
    with tempfile.TemporaryDirectory() as directory:
      code, out = _run(directory, '--islands=1', '--interval=0')
    self.assertEqual(code, 1, out)
    self.assertNotIn('Traceback', out)


if __name__ == '__main__':
  absltest.main()
