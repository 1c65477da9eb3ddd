"""Abstract interpretation of jaxprs: a state for every value, nothing is run.

A `Flow` says what one equation does to states. Calls, loops and branches are
walked here: a call maps operands one to one, branches join, and a loop repeats
until the states of its carry no longer change.
"""

import abc
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

_JAX = os.path.dirname(os.path.abspath(str(jax.__file__)))
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SKIPPED = (_JAX, os.path.join(os.path.dirname(_JAX), 'jaxlib'))


class Flow(abc.ABC):
  """States of values, and how equations change them.

  States form a lattice of finite height under `join`. While `muted` is not
  zero a loop is still searching for the states of its carry, and what `step`
  sees may be too optimistic or too pessimistic to report.
  """

  muted: int = 0
  constant: Any = None  # state of literals
  captured: Any = None  # state of arrays that a function closes over

  @abc.abstractmethod
  def join(self, a: Any, b: Any) -> Any:
    """The least state that covers both."""

  @abc.abstractmethod
  def step(self, eqn: Any, states: list, path: tuple) -> list:
    """States of the outputs of an equation without a jaxpr inside."""

  @abc.abstractmethod
  def opaque(self, eqn: Any, states: list, path: tuple) -> list:
    """The same for an equation whose inside cannot be followed."""

  def skips(self, eqn: Any) -> bool:
    """Whether an equation is a `step` although it has a jaxpr inside."""
    del eqn
    return False

  def carried(self, state: Any) -> Any:
    """The state of a value at the border of an iteration."""
    return state


def run(jaxpr: Any, states: Sequence, flow: Flow, path: tuple = ()) -> list:
  """States of the outputs of a jaxpr.

  Args:
    jaxpr: a (closed) jaxpr.
    states: states of its inputs.
    flow: the rules.
    path: names the place of the jaxpr among its callers.
  """
  jaxpr = _open(jaxpr)
  env = dict(zip(jaxpr.invars, states, strict=True))
  env.update({v: flow.captured for v in jaxpr.constvars})

  def read(v):
    return flow.constant if isinstance(v, jex.Literal) else env[v]

  for i, eqn in enumerate(jaxpr.eqns):
    inputs = [read(v) for v in eqn.invars]
    outputs = _equation(eqn, inputs, flow, (*path, i))
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def source_line(eqn: Any) -> str:
  """'file:line (function)' of the user's code behind an equation."""
  traceback = eqn.source_info.traceback
  frames = [] if traceback is None else list(traceback.frames)
  frames = [f for f in frames if not f.file_name.startswith(_SKIPPED)]
  users = [f for f in frames if not f.file_name.startswith(_OURS)]
  for f in users or frames:
    return f'{f.file_name}:{f.line_num} ({f.function_name})'
  return 'unknown source line'


def _open(jaxpr):
  return getattr(jaxpr, 'jaxpr', jaxpr)


def _is_jaxpr(x) -> bool:
  return isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)


def _equation(eqn, inputs, flow: Flow, path) -> list:
  name, params = eqn.primitive.name, eqn.params
  if flow.skips(eqn):
    return flow.step(eqn, inputs, path)
  if name == 'scan':
    return _scan(eqn, inputs, flow, path)
  if name == 'while':
    return _while(eqn, inputs, flow, path)
  if name == 'cond':
    outs = [run(b, inputs[1:], flow, path) for b in params['branches']]
    return [_join_all(flow, states) for states in zip(*outs, strict=True)]
  inner = [p for p in params.values() if _is_jaxpr(p)]
  if not inner:
    return flow.step(eqn, inputs, path)
  jaxpr = _open(inner[0])
  one_to_one = len(jaxpr.invars) == len(inputs) and len(jaxpr.outvars) == len(
    eqn.outvars
  )
  if len(inner) == 1 and one_to_one:
    return run(jaxpr, inputs, flow, path)
  return flow.opaque(eqn, inputs, path)


def _join_all(flow: Flow, states):
  out, *rest = states
  for state in rest:
    out = flow.join(out, state)
  return out


def _scan(eqn, inputs, flow: Flow, path) -> list:
  """Operands are (consts, carry, slices), results (carry, slices).

  A slice has one axis less inside than outside, which tells it from the carry.
  """
  body = _open(eqn.params['jaxpr'])
  pairs = zip(eqn.invars, body.invars, strict=True)
  slices = sum(len(a.aval.shape) != len(b.aval.shape) for a, b in pairs)
  pairs = zip(eqn.outvars, body.outvars, strict=True)
  carry = sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)
  start = len(inputs) - slices - carry
  consts, rest = inputs[:start], inputs[start + carry :]

  def iterate(states):
    return run(body, [*consts, *states, *rest], flow, path)

  states = _fixpoint(flow, inputs[start : start + carry], iterate)
  outs = iterate(states)
  return [*states, *outs[carry:]]


def _while(eqn, inputs, flow: Flow, path) -> list:
  skip, consts = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  fixed, carry = inputs[skip : skip + consts], inputs[skip + consts :]
  body = eqn.params['body_jaxpr']

  def iterate(states):
    return run(body, [*fixed, *states], flow, path)

  states = _fixpoint(flow, carry, iterate)
  iterate(states)
  return states


def _fixpoint(flow: Flow, states, iterate) -> list:
  flow.muted += 1
  states = [flow.carried(s) for s in states]
  while True:
    after = iterate(states)[: len(states)]
    pairs = zip(states, after, strict=True)
    joined = [flow.carried(flow.join(a, b)) for a, b in pairs]
    if joined == states:
      break
    states = joined
  flow.muted -= 1
  return states
