"""Choosing an implementation: by request, or the first that does not refuse.

An implementation is a name and a function `plan(*args, **kwargs)` that either
returns a `Plan` or raises `NotImplementedError` with the reason why it cannot.
Those for other devices than the default one are passed over, unless one is
named alone: then it is planned wherever it is, so that it can be compiled
there. This module knows no operation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lowbit_jax._typing import Implementation
from lowbit_pallas import _support

NAMES = ('xla', 'tpu', 'mosaic_gpu')


class Plan(NamedTuple):
  """What an implementation would do: a sentence for people, and a function."""

  note: str
  run: Callable


class Choice(NamedTuple):
  """The answer of `select_implementation`.

  Attributes:
    implementation: name of the implementation that would run.
    note: how it would compute the result.
    refusals: reasons of the implementations that were asked before it.
  """

  implementation: str
  note: str
  refusals: dict[str, str]


def requested(
  implementation: Implementation, table: dict[str, Callable]
) -> tuple[str, ...]:
  """Names to try, in order.

  Args:
    implementation: None for all of the table, a name, or a sequence of names.
    table: implementations of one operation in order of preference.
  """
  if implementation is None:
    return tuple(table)
  names = implementation
  if isinstance(names, str):
    names = (names,)
  if not isinstance(names, Sequence) or not names:
    raise TypeError(
      f'implementation={implementation!r} must be None, a name or a sequence of'
      f' names from {NAMES}'
    )
  for name in names:
    if name not in NAMES:
      raise ValueError(f'implementation={name!r} is not one of {NAMES}')
  return tuple(names)


def _why_unavailable(name: str, implementation) -> str | None:
  if isinstance(implementation, str):
    return None
  if implementation is not None:
    return _support.why_elsewhere(name)
  why = _support.why_unavailable(name)
  if why is None and name == 'tpu' and jax.device_count() > 1:
    if not jax.sharding.get_abstract_mesh().manual_axes:
      return 'on several TPUs kernels run inside shard_map, or by name'
  return why


def select(
  op: str,
  table: dict[str, Callable],
  implementation: Implementation,
  *args: Any,
  **kwargs: Any,
) -> tuple[Choice, Plan]:
  """The first plan that is not refused.

  Returns:
    (Choice, Plan).

  Raises:
    NotImplementedError: if every requested implementation refuses; the message
      holds all reasons.
  """
  refusals = {}
  for name in requested(implementation, table):
    if name not in table:
      refusals[name] = f'{op} has no {name!r} implementation'
      continue
    if why := _why_unavailable(name, implementation):
      refusals[name] = why
      continue
    try:
      plan = table[name](*args, **kwargs)
    except NotImplementedError as refusal:
      refusals[name] = str(refusal)
      continue
    return Choice(name, plan.note, refusals), plan
  reasons = '; '.join(f'{name}: {why}' for name, why in refusals.items())
  raise NotImplementedError(f'no implementation of {op} accepts: {reasons}')
