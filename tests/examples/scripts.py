"""Importing example scripts next to each other."""

import importlib
import types

from absl import flags


def load(name: str) -> types.ModuleType:
  """Imports a script and forgets its flags, whose names others use too."""
  before = set(flags.FLAGS)
  module = importlib.import_module(name)
  for flag in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, flag)
  return module
