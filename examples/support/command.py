"""What the `main` of every example does around its work."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tqdm
from absl import app, logging

from lowbit_jax import _files, _results
from support import wheels


def main(
  argv: Sequence[str],
  work: Callable[[], None],
  errors: tuple[type[Exception], ...] = (),
) -> int:
  """Works, and returns the status of the process.

  Args:
    argv: what absl leaves of the command line.
    work: what the script does.
    errors: those whose message tells the user what to do, without a traceback.
      Damaged files and refusals of the system (a full disk, a folder that
      cannot be written) always count.
  """
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}; use flags.')
  logging.set_verbosity(logging.FATAL)
  try:
    work()
  except (_files.DamagedFileError, *errors) as error:
    return _failed(argv, error)
  except OSError as error:
    message = error.strerror or error
    where = f': {error.filename}' if error.filename else ''
    return _failed(argv, f'{message}{where}')
  except KeyboardInterrupt:
    return 130
  return 0


def keep_programs() -> None:
  """Keeps compiled programs in the user's cache for the next run."""
  with contextlib.suppress(wheels.FetchError):  # without a home directory
    folder = wheels.cache() / 'programs'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _failed(argv: Sequence[str], message: Any) -> int:
  print(f'{pathlib.Path(argv[0]).stem}: {message}', file=sys.stderr)
  return 1


@contextlib.contextmanager
def own_directory(
  path: str | pathlib.Path, flag: str = '--workdir'
) -> Iterator[pathlib.Path]:
  """The directory, made if it does not exist, for this process alone.

  Args:
    path: of the directory.
    flag: that names it on the command line.
  """
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  with _results.lock(path, f'wait for it, or give another {flag}'):
    yield path


def progress(*args: Any, **options: Any) -> tqdm.tqdm:
  """A progress bar that writes few lines where it goes to a file."""
  interval = 0.2 if sys.stderr.isatty() else 15.0
  return tqdm.tqdm(*args, mininterval=interval, **options)
