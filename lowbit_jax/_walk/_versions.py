"""What the walk reads of JAX that its documentation does not promise.

Everything else that the walk uses is public. Tested with JAX 0.10.2 and 0.11.2,
see `tests/walk/versions_test.py`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jax_core, source_info_util

DIFFERENTIATED = 'differentiated'


def body(jaxpr: Any) -> Any:
  """The Jaxpr of a Jaxpr or ClosedJaxpr, which are one class in JAX 0.11."""
  return getattr(jaxpr, 'jaxpr', jaxpr)


def constants(jaxpr: Any) -> Sequence[Any]:
  """The values of its `constvars`."""
  return getattr(jaxpr, 'consts', ())


def inner(eqn: Any) -> list[Any]:
  """The jaxprs among the parameters of an equation."""
  return list(jax_core.jaxprs_in_params(eqn.params))


@contextlib.contextmanager
def place(eqn: Any) -> Iterator[None]:
  """Equations that are made inside stand where `eqn` does: its line in the
  user's program, its name scopes, and its configuration of JAX."""
  stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
  traceback = eqn.source_info.traceback
  with source_info_util.user_context(traceback, name_stack=stack):
    with eqn.ctx.manager:
      yield


def scope(eqn: Any) -> str:
  """The name scopes of an equation within its jaxpr, such as 'block/mlp'."""
  return str(eqn.source_info.name_stack)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """The equation as it is, of other values."""
  params = eqn.primitive.get_bind_params(eqn.params)
  outputs = eqn.primitive.bind(*values, **params)
  return list(outputs) if eqn.primitive.multiple_results else [outputs]


def is_unspecified(sharding: Any) -> bool:
  """Whether `in_shardings` or `out_shardings` of a jit leave one open."""
  return sharding is None or type(sharding).__name__ == 'UnspecifiedValue'


def scanned(eqn: Any) -> tuple[int, int]:
  """Of a scan: how many operands are constants, and how many are carried.
  Ranks tell: what is scanned has an axis more than in the body."""
  jaxpr = body(eqn.params['jaxpr'])

  def same(outer, inside):
    pairs = zip(outer, inside, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

  kept = same(eqn.invars, jaxpr.invars)
  carried = same(eqn.outvars, jaxpr.outvars)
  return kept - carried, carried
