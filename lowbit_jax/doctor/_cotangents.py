"""The two flows of the gradient audit.

`Backward` follows the cotangent of the output through the backward pass:

  kind        meaning                                      a narrow cast of it
  CONSTANT    literal                                      fine
  DECLARED    scale that the caller declares               fine
  PRIMAL      does not depend on the cotangent             fine
  STATISTIC   magnitude of a cotangent: a scale            fine
  CODES       rounded after scaling                        fine
  SCALED      cotangent times or over a scale              fine, gives CODES
  RESTORED    CODES times the scale again                  a finding
  MAGNITUDE   |g| or g^2 of a cotangent                    a finding
  COTANGENT   a cotangent as it comes                      a finding

A cotangent is scaled when it was multiplied or divided by a STATISTIC: a value
that was computed from cotangents and passed a maximum, or a sum of absolute
values or squares. The backward pass of a linear map never multiplies two values
that depend on the cotangent, so this does not happen by chance. Multiplying
codes by their own statistic restores the cotangent; the next cast needs a new
one, which is why states carry the origins of the statistics.

`Forward` follows the differentiated arguments through the undifferentiated
function, and finds integer casts that cut the derivative off.
"""

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowbit_jax import _derivative
from lowbit_jax._typing import DTypeLike
from lowbit_jax.doctor import _flow


class Kind(enum.IntEnum):
  """Kinds of values; where two meet, the larger one is kept."""

  CONSTANT = 0
  DECLARED = 1
  PRIMAL = 2
  STATISTIC = 3
  CODES = 4
  SCALED = 5
  RESTORED = 6
  MAGNITUDE = 7
  COTANGENT = 8


class State(NamedTuple):
  """A kind, and where the statistics in it come from."""

  kind: Kind
  origins: frozenset = frozenset()


class Place(NamedTuple):
  """A cast that was found, before it becomes a `Finding`."""

  primitive: str
  source: str
  target: str
  shape: tuple[int, ...]
  where: str


_SCALES = (Kind.DECLARED, Kind.STATISTIC)
_RAW = (Kind.RESTORED, Kind.MAGNITUDE, Kind.COTANGENT)
_MAXIMA = {
  'reduce_max', 'reduce_min', 'cummax', 'cummin', 'reduce_window_max',
  'reduce_window_min', 'pmax', 'pmin',
}  # fmt: skip
_SUMS = {'reduce_sum', 'cumsum', 'reduce_window_sum', 'psum', 'psum_invariant'}
_PRODUCTS = {'dot_general', 'conv_general_dilated', 'ragged_dot_general'}
_CASTS = {'convert_element_type', 'bitcast_convert_type', 'reduce_precision'}
_ROUNDINGS = {'round', 'floor', 'ceil'}
_INDICES = {'argmax', 'argmin'}


def width(dtype: DTypeLike) -> int:
  """Bits of a number of that dtype; 64 for dtypes that are not numbers."""
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.finfo(dtype).bits
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).bits
  return 64


def narrow(dtype: DTypeLike) -> bool:
  """Whether numbers of that dtype have fewer than 16 bits."""
  return width(dtype) < 16


def is_bool(v: Any) -> bool:
  """Whether a variable of a jaxpr is a mask."""
  return getattr(v.aval, 'dtype', None) == np.bool_


def cast_target(eqn: Any) -> str | None:
  """Name of the narrow type that an equation rounds a wide one to, or None."""
  name = eqn.primitive.name
  if name not in _CASTS:
    return None
  source = eqn.invars[0].aval.dtype
  if name == 'reduce_precision':
    e, m = eqn.params['exponent_bits'], eqn.params['mantissa_bits']
    small = 1 + e + m < 16 and not narrow(source)
    return f'1+{e}+{m} bits' if small else None
  target = eqn.outvars[0].aval.dtype
  return target.name if narrow(target) and not narrow(source) else None


class _Finder(_flow.Flow):
  """A flow that collects places."""

  def __init__(self):
    self.places: dict[tuple, Place] = {}
    self.opaque_calls: dict[tuple, str] = {}

  def found(self, eqn, target: str, path: tuple) -> None:
    if self.muted:
      return
    v = eqn.invars[0].aval
    where = _flow.source_line(eqn)
    place = Place(eqn.primitive.name, v.dtype.name, target, v.shape, where)
    self.places[path] = place


class Backward(_Finder):
  """Follows the cotangent; `places` are its casts without a scale."""

  constant = State(Kind.CONSTANT)
  captured = State(Kind.PRIMAL)

  def join(self, a: State, b: State) -> State:
    return State(max(a.kind, b.kind), a.origins | b.origins)

  def carried(self, state: State) -> State:
    # The statistics of one iteration do not belong to the next.
    if state.kind == Kind.RESTORED:
      return State(Kind.COTANGENT)
    return state

  def opaque(self, eqn: Any, states: list, path: tuple) -> list:
    if max(s.kind for s in states) >= Kind.CODES and not self.muted:
      self.opaque_calls[path] = (
        f'{eqn.primitive.name} at {_flow.source_line(eqn)}'
      )
    return [self._all(states)] * len(eqn.outvars)

  def step(self, eqn: Any, states: list, path: tuple) -> list:
    out = self._out(eqn, states, path)
    return [self._mask(out) if is_bool(v) else out for v in eqn.outvars]

  def _all(self, states) -> State:
    out = self.constant
    for state in states:
      out = self.join(out, state)
    return out

  def _mask(self, out: State) -> State:
    # What is summed from comparisons with thresholds is a code (nf4); a mask of
    # statistics is no scale.
    if out.kind < Kind.CODES:
      return State(min(out.kind, Kind.PRIMAL))
    return State(Kind.CODES, out.origins)

  def _out(self, eqn, states, path) -> State:
    name = eqn.primitive.name
    if name == 'select_n':
      # A mask picks among values; among constants the pick is the value.
      cases = self._all(states[1:])
      picks = states[0].kind >= Kind.CODES and cases.kind < Kind.STATISTIC
      return states[0] if picks else cases
    out = self._all(states)
    if out.kind <= Kind.STATISTIC and Kind.DECLARED not in {
      s.kind for s in states
    }:
      return out
    if name in _INDICES:
      return State(Kind.PRIMAL)
    if name in ('mul', 'div'):
      return self._product(eqn, states, out)
    if name in _MAXIMA and out.kind >= Kind.CODES:
      return State(Kind.STATISTIC, frozenset([path]))
    if name in _SUMS and out.kind == Kind.MAGNITUDE:
      return State(Kind.STATISTIC, frozenset([path]))
    if name in _PRODUCTS:
      if out.kind >= Kind.MAGNITUDE and self._same(eqn):
        return State(Kind.STATISTIC, frozenset([path]))
      return State(Kind.COTANGENT) if out.kind == Kind.RESTORED else out
    if 'scaled' in name and out.kind >= Kind.CODES:  # scaled_dot and the like
      return State(Kind.COTANGENT)
    if name == 'abs' or name == 'square' or name == 'integer_pow':
      even = eqn.params.get('y', 2) % 2 == 0
      return State(Kind.MAGNITUDE) if even and out.kind in _RAW else out
    if name in ('add', 'sub') and _is_integer(eqn):
      return self._exponent_sum(states, out)
    if name == 'sign':
      return State(Kind.CODES)
    if name in _ROUNDINGS and out.kind == Kind.SCALED:
      return State(Kind.CODES, out.origins)
    return self._cast(eqn, out, path)

  def _cast(self, eqn, out: State, path) -> State:
    target = cast_target(eqn)
    if target and out.kind in _RAW:
      self.found(eqn, target, path)
    if eqn.primitive.name == 'bitcast_convert_type' or out.kind != Kind.SCALED:
      return out
    to_integer = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)
    if eqn.primitive.name == 'convert_element_type' and to_integer:
      return State(Kind.CODES, out.origins)
    return State(Kind.CODES, out.origins) if target else out

  def _same(self, eqn) -> bool:
    return len(eqn.invars) > 1 and eqn.invars[0] is eqn.invars[1]

  def _exponent_sum(self, states, out: State) -> State:
    """Sums of integers that hold float bits: a product with a power of two."""
    if out.kind in _RAW and any(s.kind == Kind.STATISTIC for s in states):
      return State(Kind.SCALED, out.origins)
    return out

  def _product(self, eqn, states, out: State) -> State:
    a, b = states
    if a.kind in _SCALES and eqn.primitive.name == 'mul':
      a, b = b, a
    if b.kind in _SCALES:
      if a.kind in (Kind.COTANGENT, Kind.MAGNITUDE, Kind.SCALED):
        return State(Kind.SCALED, out.origins)
      if a.kind == Kind.CODES:
        return State(Kind.RESTORED, out.origins)
      if a.kind == Kind.RESTORED:
        known = b.origins <= a.origins
        return a if known else State(Kind.SCALED, b.origins)
      return out
    if out.kind in _RAW and self._same(eqn):
      return State(Kind.MAGNITUDE)
    if out.kind == Kind.RESTORED and Kind.PRIMAL in (a.kind, b.kind):
      return State(Kind.COTANGENT)
    return out


def _is_integer(eqn) -> bool:
  dtype = getattr(eqn.outvars[0].aval, 'dtype', None) if eqn.outvars else None
  return dtype is not None and jnp.issubdtype(dtype, jnp.integer)


class Path(NamedTuple):
  """Whether a value depends on the arguments, and the casts in between."""

  depends: bool = False
  cuts: frozenset = frozenset()


class Forward(_Finder):
  """Follows the arguments; `cuts` of the results are keys of `places`."""

  constant = Path()
  captured = Path()

  def join(self, a: Path, b: Path) -> Path:
    return Path(a.depends or b.depends, a.cuts | b.cuts)

  def skips(self, eqn: Any) -> bool:
    # These state their own derivative.
    own = 'custom_vjp_call', 'custom_jvp_call', _derivative.NAME
    return eqn.primitive.name in own

  def opaque(self, eqn: Any, states: list, path: tuple) -> list:
    return self.step(eqn, states, path)

  def step(self, eqn: Any, states: list, path: tuple) -> list:
    name = eqn.primitive.name
    out = self.constant
    for state in states[1:] if name == 'select_n' else states:
      out = self.join(out, state)
    if name == 'stop_gradient' or name in _INDICES:
      return [self.constant] * len(eqn.outvars)
    if out.depends and (target := cast_target(eqn)) and _is_integer(eqn):
      if name == 'convert_element_type':
        self.found(eqn, target, path)
        out = Path(False, out.cuts | {path})
    return [self.constant if is_bool(v) else out for v in eqn.outvars]
