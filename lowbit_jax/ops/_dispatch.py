"""Choosing an implementation: by name, or the first that takes the operands.

An implementation is a name and a function `plan(*operands, *static)` that
either returns a `Plan` or raises `NotImplementedError` with the reason why it
cannot. One that is named alone is planned wherever it is, so that it can be
compiled there. Else the choice is made for each platform that has a device
here, and JAX takes one when it lowers the program: code that runs on another
device than the default one gets the implementation of that device. This module
knows no operation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from lowbit_jax import cpu
from lowbit_jax._typing import Implementation
from lowbit_pallas import _support

NAMES = ('xla', 'cpu', *_support.PLATFORMS)


class Plan(NamedTuple):
  """What an implementation would do.

  Attributes:
    note: a sentence for people.
    run: a function of the operands.
    is_portable: whether it is lowered for every platform, as those of XLA are.
  """

  note: str
  run: Callable
  is_portable: bool = False


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


def _why_unavailable(name: str, implementation, platform: str) -> str | None:
  """Why an implementation is passed over on a platform, or None."""
  if isinstance(implementation, str):
    return None
  if why := _support.why_elsewhere(name, platform):
    return why
  if implementation is not None:
    return None
  if name == 'cpu':
    return _why_not_on_cpu()
  why = _support.why_unproven(name)
  several = len(_support.devices(name)) > 1
  if why is None and several and not _support.has_rules(name):
    if not jax.sharding.get_abstract_mesh().manual_axes:
      return 'on several TPUs kernels run inside shard_map, or by name'
  return why


def _why_not_on_cpu() -> str | None:
  """Why kernels for CPUs do not run unasked, or None."""
  if why := cpu.why_not() or cpu.why_unproven():
    return why
  alone = jax.sharding.get_abstract_mesh().manual_axes
  if jax.device_count() > 1 and not alone:
    return 'on several devices kernels run inside shard_map, or by name'
  return None


def select(
  op: str,
  table: dict[str, Callable],
  implementation: Implementation,
  *args: Any,
  platform: str | None = None,
) -> tuple[Choice, Plan]:
  """The first plan that is not refused.

  Args:
    op: name of the operation, for messages.
    table: its implementations in order of preference.
    implementation: as in the operation.
    *args: those of the plans.
    platform: what would run it: 'cpu', 'gpu' (or 'cuda') or 'tpu'; None for the
      platform of the default device.

  Returns:
    (Choice, Plan).

  Raises:
    NotImplementedError: if every requested implementation refuses; the message
      holds all reasons.
  """
  platform = _support.platform(platform)
  refusals = {}
  for name in requested(implementation, table):
    if name not in table:
      refusals[name] = f'{op} has no {name!r} implementation'
      continue
    if why := _why_unavailable(name, implementation, platform):
      refusals[name] = why
      continue
    try:
      plan = table[name](*args)
    except NotImplementedError as refusal:
      refusals[name] = str(refusal)
      continue
    return Choice(name, plan.note, refusals), plan
  reasons = '; '.join(f'{name}: {why}' for name, why in refusals.items())
  raise NotImplementedError(
    f'no implementation of {op} supports the operands: {reasons}'
  )


def run(
  op: str,
  table: dict[str, Callable],
  implementation: Implementation,
  operands: tuple,
  *static: Any,
) -> Any:
  """What the chosen implementation computes.

  Args:
    op: name of the operation, for messages.
    table: its implementations; 'xla' takes all operands.
    implementation: as in the operation.
    operands: arguments of the plans and of what they run: trees of arrays and
      of anything static.
    *static: further arguments of the plans alone.

  Raises:
    NotImplementedError: as in `select`.
  """
  choose = functools.partial(select, op, table)
  if isinstance(implementation, str):
    _, plan = choose(implementation, *operands, *static)
    return plan.run(*operands)

  # A plan for each platform, and one for those that are not known yet.
  plans, portable = {}, None
  for platform in _platforms(implementation, table):
    choice, plan = choose(implementation, *operands, *static, platform=platform)
    if choice.implementation == 'xla' or plan.is_portable:
      portable = plan
    else:
      plans[platform] = plan
  if portable is None and 'xla' in requested(implementation, table):
    _, portable = choose('xla', *operands, *static)
  if portable and not plans:
    return portable.run(*operands)

  # JAX's lowering takes one of them.
  arrays, rebuild = _arrays(operands)
  programs = {
    platform: functools.partial(_run, plan, rebuild)
    for platform, plan in plans.items()
  }
  default = portable and functools.partial(_run, portable, rebuild)
  return lax.platform_dependent(*arrays, default=default, **programs)


def _platforms(implementation: Implementation, table) -> list[str]:
  """The platforms for which a program may be lowered, the default one first.

  Those that have a device here; of implementations that are listed by name,
  theirs too, so that they can be exported.
  """
  platforms = [_support.platform()]
  for name in requested(implementation, table):
    if implementation is not None or _support.devices(name):
      platforms.append(_support.PLATFORMS.get(name, 'cpu'))
  return list(dict.fromkeys(platforms))


def _run(plan: Plan, rebuild: Callable, *arrays: jax.Array) -> Any:
  return plan.run(*rebuild(arrays))


def _arrays(tree: Any) -> tuple[list[jax.Array], Callable]:
  """The arrays of a tree, and a function that puts others in their place.

  All other leaves stay where they are.
  """
  leaves, structure = jax.tree.flatten(tree)
  places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
  arrays = [leaves[i] for i in places]

  def rebuild(arrays: Sequence[jax.Array]) -> Any:
    whole = list(leaves)
    for i, array in zip(places, arrays, strict=True):
      whole[i] = array
    return jax.tree.unflatten(structure, whole)

  return arrays, rebuild
