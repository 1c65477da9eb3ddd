"""Table look-up that decodes only what it looks up."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowbit_jax import _explicit, qarray
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import ArrayLike, DTypeLike, Key
from lowbit_jax.nn import _dot
from lowbit_jax.qarray import QArray
from lowbit_jax.recipe import QuantSpec


def take_rows(
  table: jax.Array | QArray | Transformed,
  ids: ArrayLike,
  dtype: DTypeLike | None,
  spec: QuantSpec | None = None,
  key: Key | None = None,
) -> jax.Array:
  """Rows of a table; NaN for ids outside of it, as in `jnp.take`.

  Args:
    table: `(n, features)` array, QArray or Transformed. With blocks, and a
      transform, along the features only the rows are decoded, otherwise the
      whole table.
    ids: integers of any shape.
    dtype: dtype of the result, None for that of the table.
    spec: fake quantization of an array.
    key: PRNG key, if `spec` needs one.

  Returns:
    An array of shape `(*ids.shape, features)`.
  """
  if isinstance(table, QArray | Transformed):
    run = functools.partial(_decoded_rows, dtype=dtype)
    return _explicit.automatic(run, _rows_and_features, table, jnp.asarray(ids))
  if spec is None:
    rows = jnp.take(table, ids, axis=0)
  elif spec.fmt.tensor_scale or spec.fmt.is_tile:
    axis = (-2, -1) if spec.fmt.is_tile else -1
    rows = jnp.take(_dot.fake_quant(table, spec, axis, key), ids, axis=0)
  else:
    rows = _dot.fake_quant(jnp.take(table, ids, axis=0), spec, -1, key)
  return rows if dtype is None else rows.astype(dtype)


def _decoded_rows(table: QArray | Transformed, ids, dtype) -> jax.Array:
  q = table.weight if isinstance(table, Transformed) else table
  is_rows = not isinstance(table, Transformed) or table.axis == -1
  if q.axes != (-1,) or q.merged or not is_rows:
    return jnp.take(qarray.dequantize(table, dtype), ids, axis=0)
  row = jnp.take(jnp.arange(table.shape[0]), ids, fill_value=-1)
  rows = qarray.dequantize(table[jnp.maximum(row, 0)], dtype)
  return jnp.where(row[..., None] < 0, jnp.nan, rows)


def _rows_and_features(rows, table: QArray | Transformed, ids) -> PartitionSpec:
  del rows
  q = table.weight if isinstance(table, Transformed) else table
  return PartitionSpec(*_explicit.parts(ids), qarray.parts(q)[-1])


def attend(
  query: jax.Array,
  table: jax.Array | QArray | Transformed,
  specs: _dot.Specs,
  key: Key | None = None,
) -> jax.Array:
  """Scores of queries against all rows: query @ table.T.

  Args:
    query: `(..., features)`.
    table: `(n, features)` array, QArray or Transformed.
    specs: fake quantization of query and table.
    key: PRNG key, if a spec needs one.
  """
  dims = (((query.ndim - 1,), (1,)), ((), ()))
  return _dot.contract(query, table, dims, specs, key=key)
