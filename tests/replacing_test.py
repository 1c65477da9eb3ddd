"""Tests of files that appear complete or not at all."""

import errno
import os
import pathlib
import stat
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from lowbit_jax import _files


class ReplacingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.directory = pathlib.Path(directory.name)
    self.path = self.directory / 'file'

  def write(self, path, content=b'new'):
    with _files.replacing(path) as file:
      file.write(content)

  def names(self):
    return sorted(os.listdir(self.directory))

  @parameterized.parameters(0o022, 0o077, 0o002)
  def test_the_mode_of_a_new_file_is_that_of_the_umask(self, umask):
    self.addCleanup(os.umask, os.umask(umask))
    self.write(self.path)
    self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o666 & ~umask)

  @parameterized.parameters(0o600, 0o644, 0o666)
  def test_a_replaced_file_gives_its_mode(self, mode):
    self.path.touch()
    self.path.chmod(mode)
    self.write(self.path)
    self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), mode)
    self.assertEqual(self.path.read_bytes(), b'new')

  @parameterized.parameters(True, False)
  def test_a_link_keeps_pointing_to_its_file(self, exists):
    target = self.directory / 'below' / 'target'
    target.parent.mkdir()
    if exists:
      target.write_bytes(b'old')
    self.path.symlink_to(os.path.join('below', 'target'))
    self.write(self.path)
    self.assertEqual(os.readlink(self.path), os.path.join('below', 'target'))
    self.assertEqual(target.read_bytes(), b'new')
    self.assertEqual(self.names(), ['below', 'file'])
    self.assertEqual(os.listdir(target.parent), ['target'])

  def test_what_is_no_regular_file_is_kept(self):
    os.mkfifo(self.path)
    for path in (self.path, self.directory, '/dev/null'):
      with self.assertRaisesRegex(FileExistsError, 'no regular file') as raised:
        self.write(path)
      self.assertEqual(raised.exception.filename, os.fspath(path))
    self.assertTrue(stat.S_ISFIFO(self.path.stat().st_mode))

  def test_files_of_dead_writers_are_deleted(self):
    for name in ('.lowbit-0123456789abcdef.partial', 'other.partial'):
      (self.directory / name).touch()
    with _files.replacing(self.path) as file:
      file.write(b'new')
      # A writer that lives keeps its own.
      self.write(self.directory / 'second')
      self.assertLen(self.names(), 3)
    self.assertEqual(self.names(), ['file', 'other.partial', 'second'])

  def test_folders_of_dead_writers_are_deleted(self):
    dead = self.directory / '.lowbit-0123456789abcdef.partial'
    for make in (self.write, self.build):
      dead.mkdir()
      (dead / 'shard').touch()
      (self.directory / 'other.partial').mkdir(exist_ok=True)
      with _files.building(self.directory / make.__name__) as folder:
        self.assertEqual(os.listdir(folder), [])
        # A writer that lives keeps its own.
        make(self.directory / f'second_{make.__name__}')
        self.assertTrue(os.path.isdir(folder))
        self.assertFalse(dead.exists())
    self.assertEqual(
      self.names(),
      ['build', 'other.partial', 'second_build', 'second_write', 'write'],
    )

  def build(self, path):
    with _files.building(path) as folder:
      (pathlib.Path(folder) / 'shard').touch()

  def test_an_exception_leaves_no_folder(self):
    for error in (KeyboardInterrupt(), ValueError()):
      with self.assertRaises(type(error)):
        with _files.building(self.path) as folder:
          (pathlib.Path(folder) / 'shard').touch()
          raise error
      self.assertEmpty(self.names())

  def test_an_exception_keeps_the_old_file(self):
    self.path.write_bytes(b'old')
    for error in (KeyboardInterrupt(), FileNotFoundError(2, 'none', 'other')):
      with self.assertRaises(type(error)) as raised:
        with _files.replacing(self.path) as file:
          file.write(b'new')
          raise error
      self.assertIs(raised.exception, error)
      self.assertEqual(self.path.read_bytes(), b'old')
      self.assertEqual(self.names(), ['file'])

  @parameterized.parameters(
    ('open', errno.EROFS, OSError, 'read-only'),
    ('open', errno.EACCES, PermissionError, 'may not be written'),
    ('fsync', errno.ENOSPC, OSError, 'the disk is full'),
    ('fsync', errno.EDQUOT, OSError, 'quota'),
    ('fsync', errno.EIO, OSError, os.strerror(errno.EIO)),
  )
  def test_failures_name_the_file(self, call, number, kind, message):
    failure = OSError(number, os.strerror(number))
    with mock.patch.object(os, call, side_effect=failure):
      with self.assertRaisesRegex(kind, message) as raised:
        self.write(self.path)
    self.assertEqual(raised.exception.errno, number)
    self.assertEqual(raised.exception.filename, os.fspath(self.path))
    self.assertEmpty(self.names())

  def test_a_missing_directory_is_named(self):
    path = self.directory / 'missing' / 'file'
    with self.assertRaisesRegex(FileNotFoundError, 'directory does not exist'):
      self.write(path)
    self.path.touch()
    with self.assertRaisesRegex(NotADirectoryError, 'directory is a file'):
      self.write(self.path / 'file')


if __name__ == '__main__':
  absltest.main()
