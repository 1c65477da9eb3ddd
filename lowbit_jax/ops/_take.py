"""take: rows of a table, of which only those that are looked up are decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowbit_jax import _explicit, _low_rank, qarray
from lowbit_jax._low_rank import LowRank, Stored
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import ArrayLike, DTypeLike
from lowbit_jax.numerics._codec import as_dtype


def take(
  table: ArrayLike | Stored,
  indices: ArrayLike,
  *,
  dtype: DTypeLike | None = None,
) -> jax.Array:
  """Rows of an array or QArray by their indices, as `jnp.take` along axis 0.

  Args:
    table: `(n, ...)` float array, QArray, `ops.Transformed` or `ops.LowRank`.
      Where neither blocks nor a transform run along axis 0, only the rows that
      are looked up are decoded, otherwise the whole table.
    indices: integers of any shape. Negative ones count from the end.
    dtype: dtype of the result; None for that of the table.

  Returns:
    An array of shape `(*indices.shape, *table.shape[1:])`, NaN for indices
    outside of the table. On explicit mesh axes, those of a table that is not an
    array are split as the indices are, then as the other axes of the table; an
    array follows the rules of JAX.

  Raises:
    TypeError: for a table that is none, or indices that are not integers.
    ValueError: for a table without rows.

  Derivative: that of `jnp.take` on the dequantized table.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax import formats, ops
    >>> table = ops.quantize(jnp.ones((8, 64)), formats.mxfp4)
    >>> ops.take(table, jnp.array([5, 8]))[:, 0].tolist()
    [1.0, nan]
  """
  is_packed = isinstance(table, Stored)
  rows = table if is_packed else _array('table', table, jnp.floating)
  if not rows.ndim or rows.shape[0] == 0:
    raise ValueError(f'table.shape={rows.shape} has no rows')
  index = _array('indices', indices, jnp.integer)
  dtype = rows.dtype if dtype is None else as_dtype(dtype)
  if isinstance(rows, jax.Array):
    return jnp.take(rows, index, axis=0).astype(dtype)
  run = functools.partial(_decoded, dtype=dtype)
  return _explicit.automatic(run, _parts, rows, index)


def _array(name: str, x: ArrayLike, kind: type) -> jax.Array:
  """`x` as an array of dtypes of this kind, or an error that names it."""
  try:
    array = jnp.asarray(x)
  except (TypeError, ValueError, OverflowError):
    raise TypeError(
      f'{name} must be an array of {kind.__name__} type, got {type(x).__name__}'
    ) from None
  if not jnp.issubdtype(array.dtype, kind):
    raise TypeError(
      f'{name} has dtype {array.dtype}; it must be of {kind.__name__} type'
    )
  return array


def _decoded(table: Stored, indices: jax.Array, dtype: np.dtype) -> jax.Array:
  if not _has_rows(table):
    return jnp.take(_low_rank.decode(table, dtype), indices, axis=0)
  # Leaves that were read from a file are NumPy's, which no tracer indexes.
  table = jax.tree.map(jnp.asarray, table)
  row = jnp.take(jnp.arange(table.shape[0]), indices, fill_value=-1)
  values = _low_rank.decode(table[jnp.maximum(row, 0)], dtype)
  is_outside = jnp.expand_dims(row < 0, range(indices.ndim, values.ndim))
  return jnp.where(is_outside, jnp.nan, values)


def _has_rows(table: jax.Array | Stored) -> bool:
  """Whether a row can be decoded without the others."""
  if isinstance(table, LowRank):
    return _has_rows(table.weight)
  if not isinstance(table, Stored):
    return True
  q = table.weight if isinstance(table, Transformed) else table
  axes = {*q.axes, *qarray.merged_axes(q)}
  if isinstance(table, Transformed):
    axes.add(table.axis)
  return -table.ndim not in axes


def _parts(rows: jax.Array, table: Stored, indices: jax.Array) -> PartitionSpec:
  """The spec of rows: as the indices, then as the other axes of the table."""
  del rows
  own = _low_rank.parts(table)[1:]
  return PartitionSpec(*_explicit.parts(indices), *own)
