"""The gradient audit: which casts touch a cotangent without a scale."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.doctor import _cotangents, _flow
from lowbit_jax.doctor._cotangents import Backward, Forward, Kind, Path, State

_CAST_REMEDY = (
  'divide the cotangent by a scale computed from its own maximum before the'
  ' cast, or keep the cast out of the backward pass with lowbit_jax.fake_quant'
)
_CUT_REMEDY = (
  'an integer has no derivative, so the gradient stops here; use'
  ' lowbit_jax.fake_quant, or x + stop_gradient(rounded - x)'
)


class GradientAuditError(ValueError):
  """Raised by `Audit.raise_if_bad`."""


@dataclasses.dataclass(frozen=True)
class Finding:
  """One cast that damages a gradient.

  Attributes:
    kind: 'cast': a cotangent is rounded to fewer than 16 bits without a scale.
      'cut': an argument is rounded to a narrow integer, which ends its
      derivative.
    primitive: the primitive of the cast.
    source: dtype before the cast.
    dtype: dtype after it, or the bits of a reduce_precision.
    shape: shape of the value.
    where: 'file:line (function)' of the user's code.
    remedy: what to do instead.
  """

  kind: str
  primitive: str
  source: str
  dtype: str
  shape: tuple[int, ...]
  where: str
  remedy: str

  def __str__(self) -> str:
    value = 'cotangent' if self.kind == 'cast' else 'differentiated value'
    shape = ','.join(map(str, self.shape))
    return (
      f'{self.kind}: {self.primitive} rounds the {value} {self.source}[{shape}]'
      f' to {self.dtype} at {self.where}: {self.remedy}'
    )


@dataclasses.dataclass(frozen=True)
class Audit:
  """The result of `audit_gradients`.

  Attributes:
    findings: the casts that damage a gradient.
    notes: observations that are not faults: arguments that get no gradient,
      kernels that could not be followed.
  """

  findings: tuple[Finding, ...]
  notes: tuple[str, ...]

  @property
  def ok(self) -> bool:
    """Whether there are no findings."""
    return not self.findings

  def raise_if_bad(self) -> 'Audit':
    """Returns the audit, or raises `GradientAuditError` with all findings."""
    if self.findings:
      raise GradientAuditError(str(self))
    return self

  def __str__(self) -> str:
    n = len(self.findings)
    lines = [f'gradient audit: {n} finding{"s" * (n != 1)}']
    lines += [f'  {finding}' for finding in self.findings]
    lines += [f'  note: {note}' for note in self.notes]
    return '\n'.join(lines)


def audit_gradients(
  fn: Callable,
  *args: Any,
  argnums: int | Sequence[int] = 0,
  scale_argnums: int | Sequence[int] = (),
) -> Audit:
  """Finds casts that round a cotangent to a few bits without a scale.

  The transpose of `x.astype(float8_e4m3fn).astype(float32)` rounds the
  cotangent to float8: 1e-3 becomes 0.00195 and 1e4 becomes NaN. The audit
  traces `fn` and its gradient, runs neither, and follows the cotangent through
  calls, loops, branches, remat and shard_map.

  A cotangent may be cast to fewer than 16 bits (convert_element_type,
  reduce_precision, bitcast_convert_type) after it was multiplied or divided by
  a scale: a number computed from cotangents by a maximum, or by a sum of
  absolute values or squares, or an argument named in `scale_argnums`. Constants
  and other arguments (fixed loss scales, scales of activations) do not count.

  Also found are casts of `fn` itself to integers of fewer than 16 bits through
  which an argument reaches the result: their derivative is zero.

  Args:
    fn: a function of `args` that returns a tree with floating-point arrays.
    *args: arrays, trees of arrays or `jax.ShapeDtypeStruct`s; other leaves
      (Python ints, bools, strings) are static.
    argnums: int or tuple of ints, the arguments to differentiate.
    scale_argnums: int or tuple of ints: arguments that hold scales, such as
      the state of delayed scaling.

  Returns:
    An `Audit`; `audit_gradients(...).raise_if_bad()` turns findings into an
    error.

  Raises:
    TypeError, ValueError: if `fn` is not callable, an index is out of range, or
      there is nothing to differentiate.

  Not followed are the insides of Pallas kernels (the notes name them). That a
  scale fits the cotangent that it multiplies is taken for granted.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> def loss(x):
    ...   return jnp.sum(x.astype(jnp.float8_e4m3fn).astype(jnp.float32) ** 2)
    >>> lowbit.doctor.audit_gradients(loss, jnp.ones(4)).ok
    False
    >>> def loss(x):
    ...   return jnp.sum(lowbit.fake_quant(x, lowbit.formats.mxfp8_e4m3) ** 2)
    >>> lowbit.doctor.audit_gradients(loss, jnp.ones(32)).ok
    True
  """
  if not callable(fn):
    raise TypeError(f'fn={fn!r} must be a function')
  differentiated = _indices('argnums', argnums, len(args))
  scales = _indices('scale_argnums', scale_argnums, len(args))
  if both := sorted(set(differentiated) & set(scales)):
    raise ValueError(
      f'arguments {both} are in argnums and in scale_argnums; a scale is not'
      ' differentiated here'
    )
  leaves = _Leaves(args, differentiated, scales)
  if not leaves.roles.count('differentiated'):
    raise ValueError(
      f'argnums={argnums!r} names no floating-point array to differentiate'
    )
  forward = jax.make_jaxpr(lambda *xs: _floats(fn(*leaves.rebuild(xs))))(
    *leaves.arrays
  )
  if not forward.out_avals:
    raise ValueError(
      'fn returns no floating-point array, so it has no gradient'
    )
  findings = [*_cuts(forward, leaves), *_narrow_outputs(forward)]
  casts, notes = _casts(fn, leaves, forward.out_avals)
  unique = {
    (f.kind, f.primitive, f.source, f.dtype, f.where): f
    for f in (*findings, *casts)
  }
  return Audit(tuple(unique.values()), tuple(notes))


class _Leaves:
  """The array leaves of the arguments, their roles and names."""

  def __init__(self, args, differentiated, scales):
    self.arrays, self.roles, self.names = [], [], []
    self._slots = []
    paths, self._treedef = jax.tree_util.tree_flatten_with_path(args)
    for path, leaf in paths:
      index = path[0].idx
      if not _is_array(leaf):
        self._slots.append((None, leaf))
        continue
      self._slots.append((len(self.arrays), None))
      floating = jnp.issubdtype(_dtype(leaf), jnp.floating)
      role = 'scale' if index in scales else 'other'
      self.roles.append(
        'differentiated' if index in differentiated and floating else role
      )
      self.names.append(f'args[{index}]{jax.tree_util.keystr(path[1:])}')
      self.arrays.append(leaf)

  def rebuild(self, arrays):
    """The arguments with other arrays."""
    leaves = [x if i is None else arrays[i] for i, x in self._slots]
    return self._treedef.unflatten(leaves)

  def split(self):
    """Positions of the differentiated leaves, and of the others."""
    at = [i for i, role in enumerate(self.roles) if role == 'differentiated']
    return at, [i for i in range(len(self.roles)) if i not in set(at)]


def _cuts(forward, leaves: _Leaves) -> list[Finding]:
  flow = Forward()
  states = [Path(role == 'differentiated') for role in leaves.roles]
  outs = _flow.run(forward, states, flow)
  cuts = sorted({c for out in outs for c in out.cuts})
  return [_finding('cut', flow.places[c], _CUT_REMEDY) for c in cuts]


def _narrow_outputs(forward) -> list[Finding]:
  """A result of a narrow type has a cotangent of that type."""
  return [
    Finding(
      'cast', 'output', a.dtype.name, a.dtype.name, a.shape,
      f'result {i} of fn', 'return it in a dtype of 16 bits or more',
    )
    for i, a in enumerate(forward.out_avals)
    if _cotangents.narrow(a.dtype)
  ]  # fmt: skip


def _casts(fn, leaves: _Leaves, out_avals):
  """Findings and notes of the backward pass."""
  differentiated, others = leaves.split()

  def backward(xs, constants, cts):
    def outputs(*xs):
      merged = dict(zip(differentiated, xs, strict=True))
      merged.update(zip(others, constants, strict=True))
      arrays = [merged[i] for i in range(len(merged))]
      return _floats(fn(*leaves.rebuild(arrays)))

    return jax.vjp(outputs, *xs)[1](cts)

  cts = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out_avals]
  arrays = leaves.arrays
  jaxpr = jax.make_jaxpr(backward)(
    [arrays[i] for i in differentiated], [arrays[i] for i in others], cts
  )
  states = [State(Kind.PRIMAL)] * len(differentiated)
  for i in others:
    declared = State(Kind.DECLARED, frozenset([leaves.names[i]]))
    scale = leaves.roles[i] == 'scale'
    states.append(declared if scale else State(Kind.PRIMAL))
  states += [State(Kind.COTANGENT)] * len(cts)
  flow = Backward()
  outs = _flow.run(jaxpr, states, flow)
  notes = [f'not followed: {call}' for call in flow.opaque_calls.values()]
  for i, out in zip(differentiated, outs, strict=True):
    if out.kind < Kind.CODES:
      notes.append(f'{leaves.names[i]} gets no gradient: it is zero')
  places = flow.places.values()
  return [_finding('cast', p, _CAST_REMEDY) for p in places], notes


def _finding(kind: str, place: _cotangents.Place, remedy: str) -> Finding:
  return Finding(kind, *place, remedy=remedy)


def _floats(tree) -> list:
  """The floating-point leaves of a result, as arrays."""
  leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def _is_array(x) -> bool:
  return isinstance(x, float) or hasattr(x, 'dtype')


def _dtype(x):
  return x.dtype if hasattr(x, 'dtype') else np.result_type(type(x))


def _indices(name: str, value, n: int) -> tuple[int, ...]:
  values = value if isinstance(value, tuple | list) else (value,)
  try:
    values = tuple(operator.index(v) for v in values)
  except TypeError as error:
    raise TypeError(
      f'{name}={value!r} must be an int or a tuple of ints'
    ) from error
  if bad := [v for v in values if not -n <= v < n]:
    raise ValueError(
      f'{name}={value!r} names argument {bad[0]}, but there are {n} arguments'
    )
  return tuple(v % n for v in values)
