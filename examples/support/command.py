"""What the `main` of every example does around its work."""

import pathlib
import sys
from collections.abc import Callable, Sequence

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
