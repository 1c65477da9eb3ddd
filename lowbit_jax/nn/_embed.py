"""Tables whose rows are looked up, and which are attended to."""

import jax

from lowbit_jax import ops
from lowbit_jax._low_rank import Stored
from lowbit_jax._typing import ArrayLike, DTypeLike, Key
from lowbit_jax.nn import _dot
from lowbit_jax.recipe import QuantSpec


def take_rows(
  table: jax.Array | Stored,
  ids: ArrayLike,
  dtype: DTypeLike | None,
  spec: QuantSpec | None = None,
  key: Key | None = None,
) -> jax.Array:
  """`ops.take` from a table that `spec` is applied to if it is an array.

  Args:
    table: `(n, features)` array or stored operand, such as a QArray.
    ids: integers of any shape.
    dtype: dtype of the result, None for that of the table.
    spec: fake quantization of an array.
    key: PRNG key, if `spec` needs one.

  Returns:
    An array of shape `(*ids.shape, features)`.
  """
  if spec is None or isinstance(table, Stored):
    return ops.take(table, ids, dtype=dtype)
  if spec.fmt.tensor_scale or spec.fmt.is_tile:
    axis = (-2, -1) if spec.fmt.is_tile else -1
    return ops.take(_dot.fake_quant(table, spec, axis, key), ids, dtype=dtype)
  rows = _dot.fake_quant(ops.take(table, ids), spec, -1, key)
  return rows if dtype is None else rows.astype(dtype)


def attend(
  query: jax.Array,
  table: jax.Array | Stored,
  specs: _dot.Specs,
  key: Key | None = None,
) -> jax.Array:
  """Scores of queries against all rows: query @ table.T.

  Args:
    query: `(..., features)`.
    table: `(n, features)` array or stored operand, such as a QArray.
    specs: fake quantization of query and table.
    key: PRNG key, if a spec needs one.
  """
  dims = (((query.ndim - 1,), (1,)), ((), ()))
  return _dot.contract(query, table, dims, specs, key=key)
