"""Files that appear complete or not at all, and are refused when damaged."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import BinaryIO

from lowbit_jax._typing import PathLike

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

_PARTIAL = re.compile(r'\.lowbit-[0-9a-f]{16}\.partial')
_REASONS = {
  errno.ENOENT: 'its directory does not exist; make it first',
  errno.ENOTDIR: 'its directory is a file; name a directory',
  errno.EACCES: 'its directory may not be written; change its mode',
  errno.EPERM: 'its directory may not be written; change its mode',
  errno.EROFS: 'its file system is read-only; choose another',
  errno.ENOSPC: 'the disk is full; free space or choose another',
  errno.EDQUOT: 'the quota of the disk is used up; free space',
}


class DamagedFileError(ValueError):
  """A file does not hold what was written to it.

  Args:
    path: of the file.
    fault: what is wrong with it, such as 'leaf 3 has another checksum'.
    remedy: what the user can do.
  """

  def __init__(self, path: PathLike, fault: str, remedy: str) -> None:
    super().__init__(f'{os.fspath(path)!r} is damaged: {fault}; {remedy}')


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
  """A file open for writing that takes the place of `path` at the end.

  It is flushed to disk first. After an exception `path` is as it was. A file
  that is replaced gives its mode to the new one; where `path` is a symbolic
  link, the file that it names is replaced. What writers that were killed left
  in the directory is deleted.

  Args:
    path: of the file; its directory must exist.

  Raises:
    FileExistsError: if `path` is a directory, a device or a pipe.
    OSError: if the file cannot be written, with its name and the reason.
  """
  target = os.path.realpath(path)
  try:
    handle, temporary = _temporary(target)
  except OSError as error:
    raise _unwritten(error, path) from error
  try:
    with os.fdopen(handle, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
      if fcntl is None:
        file.close()  # Windows renames closed files only.
      # Renamed while it is locked, so that nobody takes it for abandoned.
      os.replace(temporary, target)
  except BaseException as error:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    # Errors of this file bear no name; others come from the caller's code.
    if isinstance(error, OSError) and error.errno and error.filename is None:
      raise _unwritten(error, path) from error
    raise


@contextlib.contextmanager
def building(path: PathLike) -> Iterator[str]:
  """A new folder that is renamed to `path` at the end.

  After an exception it is deleted. What writers that were killed left in the
  directory is deleted too.

  Args:
    path: of the folder; there is nothing of that name, and its directory
      exists.
  """
  target = os.path.abspath(path)
  directory = os.path.dirname(target)
  _sweep(directory)
  while True:
    temporary = _name(directory)
    os.mkdir(temporary)
    with contextlib.suppress(FileNotFoundError):  # Swept before it was opened.
      handle = None if fcntl is None else os.open(temporary, os.O_RDONLY)
      if _is_kept(handle, temporary):
        break
  try:
    yield temporary
    # Renamed while it is locked, so that nobody takes it for abandoned.
    os.rename(temporary, target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  finally:
    if handle is not None:
      os.close(handle)


def _temporary(target: str) -> tuple[int, str]:
  """Makes a locked file beside `target`, with the mode that it is to have."""
  mode = None
  with contextlib.suppress(FileNotFoundError):
    mode = os.stat(target).st_mode
  if mode is not None and not stat.S_ISREG(mode):
    raise FileExistsError(errno.EEXIST, 'it is no regular file')
  directory = os.path.dirname(target)
  _sweep(directory)
  flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0)
  while True:
    temporary = _name(directory)
    handle = os.open(temporary, flags, 0o666 if mode is None else 0o600)
    if _is_kept(handle, temporary):
      break
  if mode is not None:
    os.chmod(temporary, stat.S_IMODE(mode))
  return handle, temporary


def _name(directory: str) -> str:
  return os.path.join(directory, f'.lowbit-{secrets.token_hex(8)}.partial')


def _is_kept(handle: int | None, temporary: str) -> bool:
  """Locks what was made; closes it if it was swept before."""
  if handle is None or fcntl is None:
    return True
  with contextlib.suppress(OSError):  # File systems without locks.
    fcntl.flock(handle, fcntl.LOCK_EX)
  if os.path.exists(temporary):
    return True
  os.close(handle)
  return False


def _sweep(directory: str) -> None:
  """Deletes files and folders whose writers are gone: nobody locks them."""
  if fcntl is None:
    return
  for name in os.listdir(directory):
    if not _PARTIAL.fullmatch(name):
      continue
    # Those of other users, or gone in the meantime, are not ours to delete.
    with contextlib.suppress(OSError):
      temporary = os.path.join(directory, name)
      is_folder = stat.S_ISDIR(os.lstat(temporary).st_mode)
      flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_NONBLOCK
      handle = os.open(temporary, flags)
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (shutil.rmtree if is_folder else os.unlink)(temporary)
      finally:
        os.close(handle)


def _unwritten(error: OSError, path: PathLike) -> OSError:
  reason = _REASONS.get(error.errno or 0, error.strerror)
  return OSError(
    error.errno, f'cannot write this file: {reason}', os.fspath(path)
  )
