"""Flax's `serialization` for the pytrees of this library.

`flax.serialization.to_bytes` and `from_bytes` treat classes they do not know as
arrays. Classes are handed over when Flax is there, which is asked again
whenever a state is made: importing Flax only for this would take a while.
"""

import sys
from typing import Any, NamedTuple

import numpy as np

from lowbit_jax import qarray, transforms
from lowbit_jax._low_rank import Adapter, LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax.qarray import QArray

_STATIC = 'static'


class _Fields(NamedTuple):
  data: tuple[str, ...]
  static: tuple[str, ...]


_waiting = {
  QArray: _Fields(qarray.LEAVES, ('fmt', 'axis', 'pad', 'dtype', 'merged')),
  Transformed: _Fields(('weight', 'transform'), ('axis', 'rank')),
  LowRank: _Fields(('weight', 'a', 'b'), ('scale',)),
  Adapter: _Fields(('a', 'b'), ('scale',)),
  transforms.Permutation: _Fields(('order',), ('axis',)),
  transforms.DiagonalSmoothing: _Fields(('scale',), ('axis',)),
  transforms.Hadamard: _Fields(('signs',), ('block', 'axis')),
  transforms.BlockAffine: _Fields(('matrix',), ('axis',)),
  transforms.Chain: _Fields(('transforms',), ()),
}


def know(
  cls: type, data: tuple[str, ...], static: tuple[str, ...] = ()
) -> None:
  """Makes a frozen dataclass known to Flax, now or as soon as Flax is there.

  Args:
    cls: the class.
    data: fields that hold arrays or trees of them.
    static: fields that describe them. They are written as text, and must be
      those of the target where a state is read.
  """
  _waiting[cls] = _Fields(data, static)
  know_all()


def know_all() -> None:
  """Hands over the classes that wait, if Flax is there."""
  serialization = sys.modules.get('flax.serialization')
  if serialization is None:
    return
  while _waiting:
    cls, fields = _waiting.popitem()
    _register(serialization, cls, fields)


def _register(serialization: Any, cls: type, fields: _Fields) -> None:
  def to_state(x):
    state = {n: serialization.to_state_dict(getattr(x, n)) for n in fields.data}
    return state | {_STATIC: _static(x, fields)}

  def from_state(x, state):
    want = _static(x, fields)
    got = state.get(_STATIC) if isinstance(state, dict) else None
    if got != want:
      raise ValueError(
        f'the state of a {cls.__name__} was written for {got}, the target is'
        f' for {want}; make the target as the state was made'
      )
    new = {}
    for name in fields.data:
      old = getattr(x, name)
      new[name] = serialization.from_state_dict(old, state[name], name)
      shapes = [np.shape(t) for t in (new[name], old) if hasattr(t, 'shape')]
      if len(set(shapes)) > 1:
        raise ValueError(
          f'{name} of a {cls.__name__} has shape {shapes[0]} in the state and'
          f' {shapes[1]} in the target'
        )
    static = {name: getattr(x, name) for name in fields.static}
    return cls(**new, **static)

  serialization.register_serialization_state(cls, to_state, from_state)


def _static(x, fields: _Fields) -> dict[str, str]:
  return {name: str(getattr(x, name)) for name in fields.static}
