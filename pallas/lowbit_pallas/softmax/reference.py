"""The contract in jnp; also what runs where no kernel does.

Sums are taken along the rows of a `(chunks, CHAIN, LANES)` view of each row,
in that order, so that the longest chain of additions stays short.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lowbit_pallas.arith import exponential, softmax as sm
from lowbit_pallas.softmax import forms

LANES = 128
CHAIN = 64


def chain(columns: int) -> int:
  """The longest chain of float32 additions for rows of this length."""
  if columns <= LANES:
    return columns
  slices = -(-columns // LANES)
  return min(slices, CHAIN) + -(-slices // CHAIN) + LANES


def run(
  x: jax.Array,
  where: jax.Array | None = None,
  *,
  kind: str = 'softmax',
  scale: float = 1.0,
  algorithm: str = 'auto',
  out_dtype: DTypeLike | None = None,
  exp: str = 'degree5',
) -> jax.Array:
  """softmax, log_softmax or logsumexp along the last axis.

  Args:
    x: float32, bfloat16 or float16, `(..., columns)`.
    where: bool of the shape of `x`, or None.
    kind: one of `forms.KINDS`.
    scale: factor of x, in float32.
    algorithm: one of `forms.ALGORITHMS`.
    out_dtype: dtype of the result; None for that of `x`.
    exp: one of `EXPONENTIALS` of the algebra, for the pair form.

  Returns:
    Array of the shape of `x`, for logsumexp without the last axis.

  Error of a softmax above 2^-120: (8 + h) u relative where multiply-add is
  fused, (10 + h) u for online rows, plus one rounding to `out_dtype`; h is
  `chain(columns)` and u = 2^-24. Of its logarithm: (8 + h) u absolute and 4u
  |result|; of a logsumexp: (8 + h) u, 2u ln(columns) and u |result|. Rows of
  one live entry have the logarithm 0, exactly, and that entry as logsumexp.
  """
  out_dtype = x.dtype if out_dtype is None else out_dtype

  def wide(x):
    x = x.astype(jnp.float32)
    return x if scale == 1.0 else x * scale

  if algorithm == 'online':
    return _online(kind, wide(x), where).astype(out_dtype)
  terms, m, n, top = _pair(wide(x), where, exp)
  if kind == 'softmax':
    y = _normalised(terms, m, where)
  elif kind == 'log_softmax':
    y = sm.online_log_normalise(wide(x), sm.row_peak(m, n, top, exp), where)
  else:
    y = sm.online_logsumexp(sm.row_peak(m, n, top, exp))
  y = y.astype(out_dtype)
  if algorithm == 'pair':
    return y
  lost = jnp.isnan(m)

  def by_row(x, y):
    rows = lost if kind == 'logsumexp' else lost[..., None]
    return jnp.where(rows, _online(kind, wide(x), where).astype(out_dtype), y)

  return lax.cond(jnp.any(lost), by_row, lambda x, y: y, x, y)


def _pair(x, where, exp):
  """The scaled exponentials of rows, their sums M, exponents E and maxima.

  The maximum comes first, so that no entry has an exponent of its own: XLA
  makes one loop of the exponentials, and one of their sum.
  """
  x = x if where is None else jnp.where(where, x, -jnp.inf)
  top = jnp.max(x, -1)
  n = exponential.row_exponent(top)
  terms = exponential.scaled_exp(x, n[..., None], exp)
  return terms, _sum(terms), n, top


def _normalised(terms, total, where):
  inverse = jnp.where(total < jnp.inf, 1.0 / total, jnp.nan)
  y = terms * inverse[..., None]
  return y if where is None else jnp.where(where, y, 0.0)


def _online(kind, x, where):
  form = forms.ONLINE
  state = form.part(_fold(x, -jnp.inf), _fold(where, False), -2)
  total = form.total(form.total(state, -2), -1)
  if kind == 'logsumexp':
    return form.logsumexp(total)
  return getattr(form, kind)(x, total, where, -1)


def _sum(x) -> Any:
  """The sum of rows, in short chains: of whole chunks, slices and lanes."""
  *rows, columns = x.shape
  slices = columns // LANES
  chunked = slices - slices % CHAIN
  lanes = []
  if chunked:
    part = x[..., : chunked * LANES].reshape(*rows, -1, CHAIN, LANES)
    lanes.append(_part_sum(_part_sum(part)))
  if slices > chunked:
    part = x[..., chunked * LANES : slices * LANES]
    lanes.append(_part_sum(part.reshape(*rows, -1, LANES)))
  sums = [jnp.sum(sum(lanes), -1)] if lanes else []
  if columns % LANES:
    sums.append(_part_sum(x[..., slices * LANES :, None])[..., 0])
  return sum(sums)


def _part_sum(x):
  """A sum along an axis that XLA does not join with the next one."""
  return lax.optimization_barrier(jnp.sum(x, -2))


def _fold(x, fill):
  """`(..., columns)` as `(..., chunks, slices, lanes)`, filled up."""
  if x is None:
    return None
  *rows, columns = x.shape
  if columns <= LANES:
    return x.reshape(*rows, 1, 1, columns)
  slices = -(-columns // LANES)
  slices_per_chunk = min(slices, CHAIN)
  chunks = -(-slices // slices_per_chunk)
  missing = chunks * slices_per_chunk * LANES - columns
  pads = [(0, 0)] * len(rows) + [(0, missing)]
  x = jnp.pad(x, pads, constant_values=fill) if missing else x
  return x.reshape(*rows, chunks, slices_per_chunk, LANES)
