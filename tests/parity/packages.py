"""Which packages tests in this folder need: those of the extra `parity`."""

import importlib.util
from collections.abc import Callable
from typing import Any

from absl.testing import absltest


def needs(*names: str) -> Callable[[Any], Any]:
  """Skips a test class where one of these packages is missing."""
  missing = [name for name in names if importlib.util.find_spec(name) is None]
  reason = f"without {', '.join(missing)}: pip install '.[parity]'"
  return absltest.skipIf(missing, reason)
