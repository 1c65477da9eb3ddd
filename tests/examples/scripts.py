"""Importing example scripts next to each other, and running them here."""

import contextlib
import importlib
import io
import types
from unittest import mock

from absl import flags

from support import command

_flags: dict[types.ModuleType, dict[str, flags.Flag]] = {}


def load(name: str) -> types.ModuleType:
  """Imports a script and forgets its flags, whose names others use too."""
  before = set(flags.FLAGS)
  module = importlib.import_module(name)
  own = {n: flags.FLAGS[n] for n in set(flags.FLAGS) - before}
  _flags.setdefault(module, own)
  for flag in own:
    delattr(flags.FLAGS, flag)
  return module


def run(script: types.ModuleType, *arguments: str) -> tuple[int, str]:
  """Calls `main` of a loaded script; returns its status and what it prints.

  It shares its devices and what it compiles with the tests of this process, and
  keeps nothing of that for its user.
  """
  parsed = flags.FLAGS.is_parsed()
  out = io.StringIO()
  try:
    for name, flag in _flags[script].items():
      flags.FLAGS[name] = flag
    rest = flags.FLAGS([script.__name__, *arguments])
    with (
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(out),
      mock.patch.object(command, 'keep_programs'),
    ):
      status = script.main(rest)
  finally:
    for name, flag in _flags[script].items():
      flag.unparse()
      delattr(flags.FLAGS, name)
    if not parsed:
      flags.FLAGS.unparse_flags()
  return status or 0, out.getvalue()
