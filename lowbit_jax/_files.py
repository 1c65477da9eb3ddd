"""Files that appear complete or not at all, and are refused when damaged."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from lowbit_jax._typing import PathLike


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

  It is flushed to disk first. After an exception `path` is as it was.

  Args:
    path: of the file; its directory must exist.
  """
  directory = os.path.dirname(os.path.abspath(path))
  handle, temporary = tempfile.mkstemp(dir=directory, suffix='.partial')
  try:
    with os.fdopen(handle, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
