"""Submodules that load on first use, and are listed before."""

import importlib
import sys
from collections.abc import Callable


def submodules(
  package: str, names: tuple[str, ...]
) -> tuple[Callable, Callable]:
  """`__getattr__` and `__dir__` of a package that imports `names` when used.

  Examples:
    `__getattr__, __dir__ = submodules(__name__, ('nnx',))`
  """

  def load(name: str):
    if name in names:
      return importlib.import_module(f'{package}.{name}')
    raise AttributeError(f'module {package!r} has no attribute {name!r}')

  def listed() -> list[str]:
    return sorted({*vars(sys.modules[package]), *names})

  return load, listed
