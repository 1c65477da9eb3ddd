"""softmax, log_softmax and logsumexp, and their derivatives.

Sums of exponentials are taken in the (mantissa, exponent) form of
`lowbit_pallas.arith.softmax`, in float32 whatever the dtype of the input, and
the result is rounded once. The derivative stands above the choice of
implementation, in float32 too: with y = softmax(x) and s = 1 / temperature

    dy = y (s dx - sum(y s dx))
    d log_softmax = s dx - sum(y s dx)
    d logsumexp = sum(y s dx)

where dx is zero in masked places. Residuals: y or log y in float32, for
logsumexp x alone.
"""

import functools
import math
import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit
from lowbit_jax._typing import ArrayLike, DTypeLike, Implementation
from lowbit_jax.numerics._codec import as_dtype
from lowbit_jax.ops import _dispatch, _partition
from lowbit_pallas import _support
from lowbit_pallas.arith import exponential
from lowbit_pallas.softmax import forms, reference

_DTYPES = ('float32', 'bfloat16', 'float16')


class _Call(NamedTuple):
  """Everything about a call that is not an array."""

  kind: str
  axis: int
  scale: float
  algorithm: str
  exp: str
  out_dtype: Any
  implementation: Any


def softmax(
  x: ArrayLike,
  axis: int | tuple[int, ...] = -1,
  *,
  where: ArrayLike | None = None,
  temperature: float | np.floating | jax.Array = 1.0,
  out_dtype: DTypeLike | None = None,
  algorithm: str = 'auto',
  exp: str = 'degree5',
  implementation: Implementation = None,
) -> jax.Array:
  """exp(x / temperature), normalised to sum to one along an axis.

  Accurate to (10 + h) u for every result above 2^-120, whatever the size of
  the inputs, with u = 2^-24 and h the longest chain of additions (at most 208
  for rows up to 131072): half-precision inputs are not rounded on the way.

  Args:
    x: float32, bfloat16 or float16, of any shape but 0-d.
    axis: the axis to normalise along, or a tuple of axes.
    where: bool array that broadcasts to the shape of `x`; entries where it is
      false take no part and give 0. None for all true.
    temperature: a positive number; or a float32 scalar array, which may be
      traced and differentiated. `x * (1 / temperature)` is taken in float32.
      Inside `jit` and other transformations a number is a part of the program,
      which is compiled for each: give many of them as arrays.
    out_dtype: dtype of the result, of the same three; None for that of `x`.
    algorithm: 'pair' (rescales by powers of two alone; NaN for rows with a
      finite entry beyond 22712), 'online' (for every row), or 'auto', which
      takes 'pair' and, for the rows where it does not hold, 'online'.
    exp: the polynomial for exponentials in the pair form: 'degree5', or
      'certified' for that of `special.exp`, of degree six, whose error is lower
      by u or so; the 'xla' implementation alone has it.
    implementation: 'tpu', 'mosaic_gpu' or 'xla', or a list of names; the first
      that supports the operands runs. None tries all of them, kernels first.

  Returns:
    Array of the shape of `x`. A row with NaN or +inf among its live entries is
    NaN, and so is one whose live entries are all -inf; -inf gives exactly 0; a
    row that is masked as a whole is 0, with zero gradient.

  Raises:
    TypeError, ValueError: for arguments that do not fit, with the remedy.
    NotImplementedError: if no requested implementation supports the operands.

  Derivative: forward and reverse mode, of any order, computed in float32.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> y = lowbit.softmax(jnp.array([1e4, 1e4, -jnp.inf]))
    >>> [float(v) for v in y]
    [0.5, 0.5, 0.0]
  """
  return _run(
    'softmax',
    x,
    axis,
    where=where,
    temperature=temperature,
    out_dtype=out_dtype,
    algorithm=algorithm,
    exp=exp,
    implementation=implementation,
  )


def log_softmax(
  x: ArrayLike,
  axis: int | tuple[int, ...] = -1,
  *,
  where: ArrayLike | None = None,
  temperature: float | np.floating | jax.Array = 1.0,
  out_dtype: DTypeLike | None = None,
  algorithm: str = 'auto',
  exp: str = 'degree5',
  implementation: Implementation = None,
) -> jax.Array:
  """The logarithm of `softmax`, never positive.

  Accurate to (8 + h) u + 2u ln n + 4u |result| for rows of n entries, with u
  and h as in `softmax`: the error is relative to the result where that is
  large, and absolute near zero. Where one entry of a row is live, it is exactly
  0 unless a kernel takes the row in pieces.

  Arguments as in `softmax`. Masked entries and -inf give -inf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> float(lowbit.log_softmax(jnp.array([0.0, -1e4]))[1])
    -10000.0
  """
  return _run(
    'log_softmax',
    x,
    axis,
    where=where,
    temperature=temperature,
    out_dtype=out_dtype,
    algorithm=algorithm,
    exp=exp,
    implementation=implementation,
  )


def logsumexp(
  x: ArrayLike,
  axis: int | tuple[int, ...] = -1,
  *,
  where: ArrayLike | None = None,
  temperature: float | np.floating | jax.Array = 1.0,
  out_dtype: DTypeLike | None = None,
  algorithm: str = 'auto',
  exp: str = 'degree5',
  implementation: Implementation = None,
) -> jax.Array:
  """log(sum(exp(x / temperature))) over an axis, without overflow.

  Accurate to (8 + h) u + 2u ln n + 3u |result| for rows of n entries, with u
  and h as in `softmax`: absolute near zero, where exponentials below and above
  one cancel. Where one entry of a row is live, it is the result exactly, unless
  a kernel takes the row in pieces.

  Arguments as in `softmax`. The result lacks the axes; it is -inf where no
  entry is live or all of them are -inf, NaN where one is NaN, and else +inf
  where one is +inf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> round(float(lowbit.logsumexp(jnp.zeros(8))), 4)
    2.0794
  """
  return _run(
    'logsumexp',
    x,
    axis,
    where=where,
    temperature=temperature,
    out_dtype=out_dtype,
    algorithm=algorithm,
    exp=exp,
    implementation=implementation,
  )


def _run(
  kind: str, x, axis, *, where, temperature, out_dtype, **options
) -> jax.Array:
  if not isinstance(temperature, numbers.Real):
    x, out_dtype = _divided(x, temperature, out_dtype)
    temperature = 1.0
  shape = np.shape(x)
  x, where, call = operands(
    kind,
    x,
    axis,
    where=where,
    temperature=temperature,
    out_dtype=out_dtype,
    **options,
  )
  if where is not None:
    where = jnp.broadcast_to(where, x.shape)
  if x.size == 0:
    y = _of_nothing(x, call)
  elif call.scale == 1.0 or isinstance(x, Tracer):
    y = _compiled(x, where, call)
  else:
    # Outside of other programs an operand, lest every number compile its own.
    y = _scaled(x, where, np.float32(call.scale), call._replace(scale=1.0))
  if isinstance(axis, tuple) and kind != 'logsumexp':
    y = _apart(y, shape, _checked_axes(axis, shape))
  return y


def operands(
  kind: str,
  x: ArrayLike | jax.ShapeDtypeStruct,
  axis: int | tuple[int, ...] = -1,
  *,
  where: ArrayLike | None = None,
  temperature: float | numbers.Real | jax.Array = 1.0,
  out_dtype: DTypeLike | None = None,
  algorithm: str = 'auto',
  exp: str = 'degree5',
  implementation: Implementation = None,
) -> tuple[Any, Any, _Call]:
  """Checked arguments of the plans: (x, where, call).

  Several axes are one axis of x, the last.
  """
  array = _checked_array(x)
  mask = _checked_mask(where, array.shape)
  if isinstance(axis, tuple):
    axes = _checked_axes(axis, array.shape)
    array, mask = _together(array, mask, axes)
    row_axis = len(array.shape) - 1
  else:
    row_axis = _checked_axis(axis, array.shape)
  if algorithm not in forms.ALGORITHMS:
    raise ValueError(f'{algorithm=} is not one of {forms.ALGORITHMS}')
  if exp not in exponential.EXPONENTIALS:
    raise ValueError(f'{exp=} is not one of {exponential.EXPONENTIALS}')
  if exp != 'degree5' and algorithm == 'online':
    raise ValueError(
      f"{exp=} is for the pair form; choose algorithm='auto' or 'pair'"
    )
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  out_dtype = array.dtype if out_dtype is None else out_dtype
  dtype = _checked_dtype('out_dtype', out_dtype)
  is_number = isinstance(temperature, numbers.Real)
  scale = _checked_scale(temperature) if is_number else 1.0
  call = _Call(kind, row_axis, scale, algorithm, exp, dtype, implementation)
  return array, mask, call


def _plan_xla(x, where, call: _Call) -> _dispatch.Plan:
  del x, where
  by_polynomial = functools.partial(reference.run, exp=call.exp)
  run = functools.partial(_last_axis, by_polynomial, call=call)
  return _dispatch.Plan('maxima, exponentials and quotients of rows', run)


def _plan_kernel(implementation: str, note: str, x, where, call: _Call):
  kernel = _support.require('softmax', implementation)
  if call.exp != 'degree5':
    raise NotImplementedError(f"exp={call.exp!r} is for 'xla' alone")
  module = kernel.load()
  columns = x.shape[call.axis]
  matrix = (math.prod(x.shape) // max(columns, 1), columns)
  x = jax.ShapeDtypeStruct(matrix, x.dtype)
  if why := module.why_not(x, call.out_dtype, where is not None):
    raise NotImplementedError(why)
  by_rows = _by_rows(module.run, has_rules=kernel.has_rules)
  run = functools.partial(_last_axis, by_rows, call=call)
  return _dispatch.Plan(note, run)


def _kernel_plan(implementation: str, note: str):
  return functools.partial(_plan_kernel, implementation, note)


TABLE = {
  'tpu': _kernel_plan('tpu', 'two phases over blocks of rows in VMEM'),
  'mosaic_gpu': _kernel_plan(
    'mosaic_gpu', 'rows, or pieces of rows, in shared memory'
  ),
  'xla': _plan_xla,
}


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(2,))
def _apply(x, where, call: _Call) -> jax.Array:
  return _dispatch.run(call.kind, TABLE, call.implementation, (x, where), call)


@_apply.defjvp
def _apply_jvp(call: _Call, primals, tangents):
  x, where = primals
  dx = tangents[0].astype(jnp.float32)
  if call.scale != 1.0:
    dx = dx * call.scale
  if where is not None:
    dx = _live(where, dx)
  wide = call._replace(out_dtype=jnp.dtype(jnp.float32))

  if call.kind == 'logsumexp':

    @jax.checkpoint
    def weighted(x, where, dx):
      y = _apply(x, where, wide._replace(kind='softmax'))
      return jnp.sum(y * dx, call.axis)

    out, tangent = _apply(x, where, wide), weighted(x, where, dx)
  else:
    out = _apply(x, where, wide)
    is_log = call.kind == 'log_softmax'
    y = jnp.exp(out) if is_log else out
    tangent = dx - jnp.sum(y * dx, call.axis, keepdims=True)
    tangent = tangent if is_log else y * tangent
    if where is not None:
      # Of the result too: a cotangent of NaN there must not reach the row.
      tangent = _live(where, tangent)
  return out.astype(call.out_dtype), tangent.astype(call.out_dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _live(where, t):
  """t, and 0 where it is masked; saves the mask alone."""
  return jnp.where(where, t, 0.0)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _compiled(x, where, call: _Call) -> jax.Array:
  def specs(result, x, where):
    del result, where
    parts = _explicit.parts(x)
    if call.kind == 'logsumexp':
      parts.pop(call.axis)
    return PartitionSpec(*parts)

  run = functools.partial(_apply, call=call)
  return _explicit.automatic(run, specs, x, where)


@functools.partial(jax.jit, static_argnums=3)
def _scaled(x, where, scale, call: _Call):
  return _compiled(x.astype(jnp.float32) * scale, where, call)


def _last_axis(run, x, where, *, call: _Call):
  """Runs an implementation, which knows the last axis only."""
  axis = call.axis
  x = jnp.moveaxis(x, axis, -1)
  where = None if where is None else jnp.moveaxis(where, axis, -1)
  y = run(
    x,
    where,
    kind=call.kind,
    scale=call.scale,
    algorithm=call.algorithm,
    out_dtype=call.out_dtype,
  )
  return y if call.kind == 'logsumexp' else jnp.moveaxis(y, -1, axis)


def _by_rows(run, has_rules: bool = True):
  """An implementation for matrices, on arrays of any rank and sharding."""

  def on_matrix(x, where=None, *, kind, **options):
    shape = x.shape[:-1] if kind == 'logsumexp' else x.shape
    matrix = (math.prod(x.shape[:-1]), x.shape[-1])
    where = None if where is None else where.reshape(matrix)
    return run(x.reshape(matrix), where, kind=kind, **options).reshape(shape)

  def anywhere(x, where, *, kind, **options):
    operands = (x,) if where is None else (x, where)
    on_rows = functools.partial(on_matrix, kind=kind, **options)
    return _partition.by_rows(
      on_rows, kind == 'logsumexp', *operands, has_rules=has_rules
    )

  return anywhere


def _of_nothing(x, call: _Call) -> jax.Array:
  if call.kind != 'logsumexp':
    return jnp.zeros(x.shape, call.out_dtype)
  shape = x.shape[: call.axis] + x.shape[call.axis + 1 :]
  return jnp.full(shape, -jnp.inf, call.out_dtype)


def _divided(x, temperature, out_dtype):
  """x / temperature for a temperature that may be traced, and the out_dtype."""
  x, temperature = jnp.asarray(x), jnp.asarray(temperature)
  _checked_array(x)
  if temperature.shape or not jnp.issubdtype(temperature.dtype, jnp.floating):
    raise TypeError(
      f'temperature has shape {temperature.shape} and dtype'
      f' {temperature.dtype}; it must be a number or a float scalar: divide x'
      ' yourself by temperatures that differ from row to row'
    )
  inverse = 1.0 / temperature.astype(jnp.float32)
  dtype = x.dtype if out_dtype is None else out_dtype
  return x.astype(jnp.float32) * inverse, dtype


def _checked_array(x):
  if not isinstance(x, jax.ShapeDtypeStruct):
    x = jnp.asarray(x)
  _checked_dtype('x.dtype', x.dtype)
  if x.ndim == 0:
    raise ValueError(
      'x.shape=() has no axis; use x[None] for a row of one entry'
    )
  return x


def _checked_dtype(name: str, dtype) -> np.dtype:
  dtype = as_dtype(dtype, name)
  if dtype.name not in _DTYPES:
    raise TypeError(
      f'{name}={dtype.name} is not one of {_DTYPES}: cast it first'
    )
  return dtype


def _checked_axis(axis, shape) -> int:
  try:
    index = operator.index(axis)
  except TypeError as error:
    raise TypeError(
      f'{axis=} must be an integer, or a tuple of them'
    ) from error
  if not -len(shape) <= index < len(shape):
    raise ValueError(
      f'{axis=} is out of range for x.shape={shape}; take one of'
      f' {-len(shape)} ... {len(shape) - 1}'
    )
  return index % len(shape)


def _checked_axes(axes: tuple, shape) -> tuple[int, ...]:
  checked = tuple(_checked_axis(axis, shape) for axis in axes)
  if not axes or len(set(checked)) < len(axes):
    raise ValueError(
      f'axis={axes} must name one axis or more of x.shape={shape}, none twice'
    )
  return checked


def _together(x, where, axes: tuple[int, ...]):
  """x and its mask with these axes as one, behind the others."""
  kept = [d for d in range(x.ndim) if d not in axes]
  columns = math.prod(x.shape[d] for d in axes)
  matrix = (*(x.shape[d] for d in kept), columns)

  def merged(t):
    if isinstance(t, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(matrix, t.dtype)
    t = jnp.broadcast_to(t, x.shape)
    return t.transpose(*kept, *axes).reshape(matrix)

  return merged(x), None if where is None else merged(where)


def _apart(y, shape, axes: tuple[int, ...]):
  """The inverse of `_together`, of a result of the shape of x."""
  order = [d for d in range(len(shape)) if d not in axes] + list(axes)
  y = y.reshape([shape[d] for d in order])
  return y.transpose([order.index(d) for d in range(len(shape))])


def _checked_mask(where, shape):
  if where is None:
    return None
  if not isinstance(where, jax.ShapeDtypeStruct):
    where = jnp.asarray(where)
  if where.dtype != jnp.bool_:
    raise TypeError(
      f'where.dtype={where.dtype} must be bool; compare it, as in where != 0'
    )
  try:
    fits = np.broadcast_shapes(where.shape, shape) == tuple(shape)
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f'where.shape={where.shape} does not broadcast to x.shape={shape}; add'
      ' axes of size 1'
    )
  return where


def _checked_scale(temperature) -> float:
  with np.errstate(all='ignore'):
    scale = float(np.float32(1.0) / np.float32(temperature))
  if not 0.0 < scale < math.inf:
    raise ValueError(
      f'{temperature=} must be a positive number with a float32 reciprocal; for'
      ' temperature 0 use jax.nn.one_hot(jnp.argmax(x), n)'
    )
  return scale
