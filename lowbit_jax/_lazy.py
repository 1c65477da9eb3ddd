"""Submodules and functions that load on first use, and are listed before."""

import importlib
import sys
from collections.abc import Callable, Mapping


def submodules(
  package: str,
  names: tuple[str, ...],
  functions: Mapping[str, str] | None = None,
) -> tuple[Callable, Callable]:
  """`__getattr__` and `__dir__` of a package that imports `names` when used.

  Args:
    package: its name.
    names: submodules.
    functions: of submodules, such as {'packed': '_walk'}.

  Examples:
    `__getattr__, __dir__ = submodules(__name__, ('nnx',))`
  """

  functions = functions or {}

  def load(name: str):
    if name in names:
      return importlib.import_module(f'{package}.{name}')
    if name in functions:
      module = importlib.import_module(f'{package}.{functions[name]}')
      return getattr(module, name)
    raise AttributeError(f'module {package!r} has no attribute {name!r}')

  def listed() -> list[str]:
    return sorted({*vars(sys.modules[package]), *names, *functions})

  return load, listed
