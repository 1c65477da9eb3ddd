"""Files of results: what was written comes back, or is refused."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import _files, _results

_REMEDY = 'delete it'
_CONTENT = {'run': {'seed': 3, 'name': 'a "b"\n'}, 'losses': [0.1, 1e-300]}
_ROWS = [(0, 0.1, None, 'a'), (1, float('inf'), 2.5, 'two, "lines"\nof text')]
_ARRAYS = {'x': np.arange(3), 'empty': np.zeros((0, 2)), 'text': np.array('a')}


# A name, what writes, what reads, and what is read.
_FORMATS = (
  ('json', _results.write_json, _results.read_json, [_CONTENT], _CONTENT),
  (
    'csv',
    _results.write_csv,
    _results.read_csv,
    [('step', 'loss', 'snr', 'name'), _ROWS],
    [
      {'step': '0', 'loss': '0.1', 'snr': '', 'name': 'a'},
      {'step': '1', 'loss': 'inf', 'snr': '2.5', 'name': _ROWS[1][3]},
    ],
  ),
  ('npz', _results.write_npz, _results.read_npz, [_ARRAYS], _ARRAYS),
)


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(directory) / 'file'

  @parameterized.named_parameters(*_FORMATS)
  def test_round_trip(self, write, read, content, want):
    write(self.path, 'run 1', *content)
    np.testing.assert_equal(read(self.path, 'run 1', _REMEDY), want)
    first = self.path.read_bytes()
    write(self.path, 'run 1', *content)
    self.assertEqual(self.path.read_bytes(), first)

  @parameterized.named_parameters(*_FORMATS)
  def test_any_damage_is_refused(self, write, read, content, want):
    del want
    write(self.path, 'run 1', *content)
    whole = self.path.read_bytes()
    rng = np.random.default_rng(0)
    damages = [whole[:n] for n in range(0, len(whole), 4)]
    damages += [whole + b'\n', whole + whole, b'\0' * len(whole)]
    for place in range(0, len(whole), 2):
      bit = 1 << int(rng.integers(8))
      damages.append(
        whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
      )
    for start, end in rng.integers(len(whole), size=(60, 2)):
      start, end = sorted((start, end))
      part = whole[start:end]
      damages += [
        whole[:start] + whole[end:],  # lost
        whole[:end] + part + whole[end:],  # doubled
        whole[:start] + part[::-1] + whole[end:],  # in another order
        whole[:start] + rng.bytes(len(part)) + whole[end:],  # replaced
      ]
    for damaged in set(damages) - {whole}:
      self.path.write_bytes(damaged)
      with self.assertRaisesRegex(_files.DamagedFileError, 'file.*delete it'):
        read(self.path, 'run 1', _REMEDY)

  @parameterized.named_parameters(*_FORMATS)
  def test_other_kinds_and_versions_are_refused(
    self, write, read, content, want
  ):
    del want
    write(self.path, 'run 2', *content)
    message = "holds 'run 2' and not 'run 1'; delete it"
    with self.assertRaisesRegex(_files.DamagedFileError, message):
      read(self.path, 'run 1', _REMEDY)

  def test_other_programs_read_them(self):
    _results.write_json(self.path, 'run 1', _CONTENT)
    content = json.loads(self.path.read_text())
    self.assertEqual(list(content), ['seal', *_CONTENT])
    _results.write_csv(self.path, 'log 1', ['step', 'loss'], [(0, 2.5)])
    with self.path.open(newline='') as file:
      (row,) = csv.DictReader(file)
    self.assertEqual(list(row.values()), ['0', '2.5', ''])
    _results.write_npz(self.path, 'search 1', _ARRAYS)
    with np.load(self.path) as arrays:
      np.testing.assert_array_equal(arrays['x'], _ARRAYS['x'])

  def test_edited_tables_are_refused(self):
    _results.write_csv(self.path, 'log 1', ['step', 'loss'], [(0, 2.5)])
    with self.path.open(newline='') as file:
      rows = list(csv.reader(file))
    with self.path.open('w', newline='') as file:
      csv.writer(file).writerows(rows)  # with other ends of lines
    with self.assertRaisesRegex(_files.DamagedFileError, 'no checksum'):
      _results.read_csv(self.path, 'log 1', _REMEDY)

  def test_what_is_no_file_is_refused(self):
    with self.assertRaises(FileNotFoundError):
      _results.read_json(self.path, 'run 1', _REMEDY)
    os.mkfifo(self.path)
    with self.assertRaisesRegex(_files.DamagedFileError, 'not a regular file'):
      _results.read_json(self.path, 'run 1', _REMEDY)


class LockTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.enterContext(tempfile.TemporaryDirectory())

  def test_one_at_a_time(self):
    for _ in range(2):
      with _results.lock(self.directory, 'wait'):
        message = f'is in use by process {os.getpid()}; wait'
        with self.assertRaisesRegex(BlockingIOError, message):
          with _results.lock(self.directory, 'wait'):
            self.fail()
      self.assertEqual(os.listdir(self.directory), [])

  def test_a_holder_that_leaves_meanwhile(self):
    first = _results.lock(self.directory, 'wait')
    flock = _results.fcntl.flock

    def late(handle, operation):
      first.__exit__(None, None, None)  # Its file is no longer in the folder.
      lock.stop()
      flock(handle, operation)

    first.__enter__()
    lock = mock.patch.object(_results.fcntl, 'flock', late)
    lock.start()
    with _results.lock(self.directory, 'wait'):
      with self.assertRaisesRegex(BlockingIOError, 'wait'):
        with _results.lock(self.directory, 'wait'):
          self.fail()

  def test_a_holder_that_is_killed(self):
    code = (
      'import fcntl, os, sys, time\n'
      'handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n'
      'fcntl.flock(handle, fcntl.LOCK_EX)\n'
      'os.write(handle, b"7")\n'
      'print(flush=True)\n'
      'time.sleep(600)'
    )
    path = os.path.join(self.directory, _results.LOCK)
    with subprocess.Popen(
      [sys.executable, '-c', code, path], stdout=subprocess.PIPE
    ) as process:
      process.stdout.readline()
      with self.assertRaisesRegex(BlockingIOError, 'by process 7; wait'):
        with _results.lock(self.directory, 'wait'):
          self.fail()
      process.send_signal(signal.SIGKILL)
      process.wait()
    with _results.lock(self.directory, 'wait'):
      pass
    self.assertEqual(os.listdir(self.directory), [])


if __name__ == '__main__':
  absltest.main()
