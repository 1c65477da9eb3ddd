"""Finished runs of a sweep: what is kept, refused and trained."""

import contextlib
import io
import math
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from lowbit_jax import _files
from support import runs
from support.checkpoints import CheckpointError

_RUN = {'task': 'regression', 'setting': 'base', 'seeds': 2, 'steps': 3}


class StoreTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.directory = pathlib.Path(directory) / 'runs'
    self.store = runs.Store(self.directory, 'losses')

  def test_round_trip(self):
    self.assertIsNone(self.store.load('base', _RUN))
    self.store.save('base', _RUN, [0.5, math.nan])
    np.testing.assert_array_equal(
      self.store.load('base', _RUN), [0.5, math.nan]
    )
    single = runs.Store(self.directory, 'loss')
    single.save('other', _RUN, 2.5)
    self.assertEqual(single.load('other', _RUN), 2.5)

  def test_other_sweeps_and_damage_are_refused(self):
    self.store.save('base', _RUN, [0.5, 0.25])
    with self.assertRaisesRegex(
      CheckpointError, r'another sweep \(seeds: 2 there, 3 now\)'
    ):
      self.store.load('base', _RUN | {'seeds': 3})
    (path,) = self.directory.iterdir()
    whole = path.read_text()
    other = whole.replace('0.25', '0.75')
    for text in (whole[:20], '[]', '{"losses": [1.0]}', '{"run": {}}', other):
      path.write_text(text)
      with self.assertRaisesRegex(_files.DamagedFileError, 'repeat the run'):
        self.store.load('base', _RUN)
    runs.Store(self.directory, 'loss').save('base', _RUN, 0.5)
    with self.assertRaisesRegex(_files.DamagedFileError, 'holds'):
      self.store.load('base', _RUN)

  def test_trains_what_is_missing_and_keeps_it(self):
    plan = {i: (f'run{i}', {'seed': i}) for i in range(3)}
    trained = []

    def train(key):
      if len(trained) == 2:
        raise KeyboardInterrupt
      trained.append(key)
      return [float(key)]

    out = io.StringIO()
    with contextlib.redirect_stderr(out):
      with self.assertRaises(KeyboardInterrupt):
        runs.complete(self.store, plan, train)
    self.assertIn('interrupted: 2 finished runs are kept', out.getvalue())
    trained.clear()
    results = runs.complete(self.store, plan, train)
    self.assertEqual(trained, [2])
    self.assertEqual(results, {0: [0.0], 1: [1.0], 2: [2.0]})


if __name__ == '__main__':
  absltest.main()
