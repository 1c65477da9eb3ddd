"""The contract in jnp; also what runs where no kernel does.

Sums are taken along the rows of a `(chunks, CHAIN, LANES)` view of each row,
in that order, so that the longest chain of additions stays short.
"""

import jax
import jax.numpy as jnp
from jax import lax

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
  out_dtype=None,
) -> jax.Array:
  """softmax, log_softmax or logsumexp along the last axis.

  Args:
    x: float32, bfloat16 or float16, `(..., columns)`.
    where: bool of the shape of `x`, or None.
    kind: one of `forms.KINDS`.
    scale: factor of x, in float32.
    algorithm: one of `forms.ALGORITHMS`.
    out_dtype: dtype of the result; None for that of `x`.

  Returns:
    Array of the shape of `x`, for logsumexp without the last axis.

  Error of a softmax above 2^-120: (8 + h) u relative where multiply-add is
  fused, (10 + h) u for online rows, plus one rounding to `out_dtype`; h is
  `chain(columns)` and u = 2^-24.
  """
  out_dtype = x.dtype if out_dtype is None else out_dtype
  x = x.astype(jnp.float32)
  if scale != 1.0:
    x = x * scale
  if algorithm == 'online':
    return _finish(forms.ONLINE, kind, x, where).astype(out_dtype)
  total = _total(forms.PAIR, x, where)

  def pair(x, where, total):
    return _finish(forms.PAIR, kind, x, where, total)

  def by_row(x, where, total):
    lost = jnp.isnan(total.m)
    if kind != 'logsumexp':
      lost = lost[..., None]
    online = _finish(forms.ONLINE, kind, x, where)
    return jnp.where(lost, online, pair(x, where, total))

  if algorithm == 'pair':
    y = pair(x, where, total)
  else:
    lost = jnp.any(jnp.isnan(total.m))
    y = lax.cond(lost, by_row, pair, x, where, total)
  return y.astype(out_dtype)


def _finish(form, kind, x, where, total=None):
  total = _total(form, x, where) if total is None else total
  if kind == 'logsumexp':
    return form.logsumexp(total)
  return getattr(form, kind)(x, total, where, -1)


def _total(form, x, where):
  state = form.part(_fold(x, -jnp.inf), _fold(where, False), -2)
  return form.total(form.total(state, -2), -1)


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
