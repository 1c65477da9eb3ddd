"""Files that appear complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from lowbit_jax._typing import PathLike


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
