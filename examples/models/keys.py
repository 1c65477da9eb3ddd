"""Values of configurations; errors name their keys."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_REQUIRED: Any = object()


class ConfigError(ValueError):
  """A configuration that makes no model; the message says which value."""


class Keys:
  """Values by key, each of the kind that is asked for.

  A key with the value None counts as one that is not there. All methods raise
  ConfigError for a value of another kind, and for a key that is not there and
  has no default.

  Args:
    values: by key.
    prefix: of all keys.
  """

  def __init__(self, values: Mapping[str, Any], prefix: str = '') -> None:
    self._values, self._prefix = values, prefix
    self._asked: set[str] = set()

  def __contains__(self, key: str) -> bool:
    return self._values.get(self._prefix + key) is not None

  def integer(
    self, key: str, default: Any = _REQUIRED, *, least: int = 1
  ) -> Any:
    """A whole number."""

    def fits(value):
      return _is(value, numbers.Integral) and value >= least

    kind = f'a whole number of at least {least}'
    return self._value(key, default, kind, fits, int)

  def number(self, key: str, default: Any = _REQUIRED) -> float:
    """A finite number above 0."""

    def fits(value):
      return _is(value, numbers.Real) and 0 < value < float('inf')

    return self._value(key, default, 'a number above 0', fits, float)

  def numbers(self, key: str, count: int) -> tuple[float, ...]:
    """So many numbers above 0."""

    def fits(value):
      return (
        isinstance(value, Sequence)
        and len(value) == count
        and all(_is(x, numbers.Real) and 0 < x < float('inf') for x in value)
      )

    kind = f'{count} numbers above 0'
    values = self._value(key, _REQUIRED, kind, fits)
    return tuple(map(float, values))

  def flag(self, key: str, default: bool) -> bool:
    def fits(value):
      return isinstance(value, bool)

    return self._value(key, default, 'true or false', fits)

  def list(self, key: str, options: Sequence[Any]) -> Sequence[Any]:
    """A list whose members are among the options."""

    def fits(value):
      return isinstance(value, Sequence) and all(x in options for x in value)

    kind = f'a list with members of {_listed(options)}'
    return self._value(key, _REQUIRED, kind, fits)

  def choice(
    self, key: str, options: Sequence[Any], default: Any = _REQUIRED
  ) -> Any:
    """One of the options; other values are not read here."""
    return self._value(key, default, _listed(options), options.__contains__)

  def section(self, key: str) -> 'Keys':
    """The values under a key, none where it is not there."""
    values = self._value(
      key, {}, 'an object', lambda value: isinstance(value, Mapping)
    )
    for name, value in values.items():
      if isinstance(value, Mapping):
        raise ConfigError(
          f'{self._prefix}{key}/{name} is an object; one for all blocks is read'
        )
    return Keys({f'{key}/{k}': v for k, v in values.items()}, f'{key}/')

  def error(self, key: str, kind: str) -> ConfigError:
    """That the value of a key is not as it must be."""
    name = self._prefix + key
    value = repr(self._values.get(name))
    return ConfigError(f'{name} is {value:.200}; what is read is {kind}')

  def check_all_read(self, harmless: Sequence[str]) -> None:
    """Refuses a key that nobody asked for, unless its value switches it off.

    Args:
      harmless: keys that say nothing about the function of a model.
    """
    known = self._asked | {self._prefix + key for key in harmless}
    for name, value in self._values.items():
      if name.startswith(self._prefix) and name not in known:
        if isinstance(value, str) or np.ndim(value) or value:
          raise ConfigError(
            f'{name} is {value!r:.200}, and is not known; a model without it is'
            ' read'
          )

  def _value(self, key, default, kind, fits, cast=lambda value: value):
    name = self._prefix + key
    self._asked.add(name)
    value = self._values.get(name)
    if value is None:
      if default is _REQUIRED:
        raise ConfigError(f'{name} is missing; what is read is {kind}')
      return default
    if not fits(value):
      raise self.error(key, kind)
    return cast(value)


def _is(value: Any, kind: type) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)


def _listed(options: Sequence[Any]) -> str:
  return ' or '.join(map(repr, options))
