"""What the `main` of every example does around its work."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tqdm
from absl import app, logging


def main(
  argv: Sequence[str],
  work: Callable[[], None],
  errors: tuple[type[Exception], ...],
) -> int:
  """Works, and returns the status of the process.

  Args:
    argv: what absl leaves of the command line.
    work: what the script does.
    errors: those whose message tells the user what to do, without a traceback.
  """
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}; use flags.')
  logging.set_verbosity(logging.FATAL)
  try:
    work()
  except errors as error:
    print(f'{pathlib.Path(argv[0]).stem}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 130
  return 0


def progress(*args: Any, **options: Any) -> tqdm.tqdm:
  """A progress bar that writes few lines where it goes to a file."""
  interval = 0.2 if sys.stderr.isatty() else 15.0
  return tqdm.tqdm(*args, mininterval=interval, **options)
