"""Softmax kernels for TPU.

Rows that a block holds, in the pair form: one grid step takes the largest entry
of each row, then the exponentials by it, kept in VMEM, and their sum, then the
quotients. Blocks whose entries are all near zero need no guards.

Longer rows, and the online form: grid (row blocks, 2, column blocks). Phase 0
sums a row block's exponentials in VMEM scratch, lane by lane, 128 independent
sums to a row, and joins the lanes at its end; phase 1 normalises. The output
block stays parked at column 0 during phase 0, so nothing is written before
there is something to write.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from lowbit_pallas.arith import exponential, softmax as sm
from lowbit_pallas.softmax import forms, tpu_config as _config
from lowbit_pallas.softmax.tpu_config import (
  Config,
  choose,
  heuristic as heuristic,
)

_LANES = _config.LANES
_DTYPES = ('float32', 'bfloat16', 'float16')


class _Static(NamedTuple):
  """What a kernel knows at trace time."""

  form: forms.Form
  kind: str
  scale: float
  columns: int
  config: Config
  chunk: int
  tile: int
  masked: bool
  out_dtype: Any


def why_not(
  x: jax.Array | jax.ShapeDtypeStruct,
  out_dtype: DTypeLike | None = None,
  masked: bool = False,
  config: Config | None = None,
) -> str | None:
  """Why the kernel refuses, or None.

  Args:
    x: array or `jax.ShapeDtypeStruct`.
    out_dtype: dtype of the result; None for that of `x`.
    masked: whether there is a mask.
    config: block sizes; None for those of `choose`.
  """
  out_dtype = x.dtype if out_dtype is None else out_dtype
  if len(x.shape) != 2:
    return f'x.shape={x.shape} must be (rows, columns)'
  if 0 in x.shape:
    return f'x.shape={x.shape} is empty'
  for name, dtype in (('x.dtype', x.dtype), ('out_dtype', out_dtype)):
    if jnp.dtype(dtype).name not in _DTYPES:
      return f'{name}={jnp.dtype(dtype).name} is not one of {_DTYPES}'
  if config is None:
    return None
  return _config.why_not(config, _entry_bytes(x.dtype, out_dtype, masked))


def _entry_bytes(x_dtype, out_dtype, masked: bool) -> int:
  """Bytes of the narrowest operand: a mask has one, float16 becomes float32."""
  sizes = [jnp.dtype(d).itemsize for d in map(_stored, (x_dtype, out_dtype))]
  return 1 if masked else min(sizes)


def _stored(dtype):
  """The dtype in the kernel: Mosaic has no float16, and sums are float32."""
  return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def run(
  x: jax.Array,
  where: jax.Array | None = None,
  *,
  kind: str = 'softmax',
  scale: float = 1.0,
  algorithm: str = 'auto',
  out_dtype: DTypeLike | None = None,
  config: Config | None = None,
  interpret: Any = False,
) -> jax.Array:
  """softmax, log_softmax or logsumexp of rows, see `reference.run`.

  Args:
    x: `(rows, columns)`.
    where: bool of that shape, or None.
    kind: one of `forms.KINDS`.
    scale: factor of x, in float32.
    algorithm: one of `forms.ALGORITHMS`. 'auto' runs the pair kernel, and the
      online kernel on top where it lost a row.
    out_dtype: dtype of the result; None for that of `x`.
    config: block sizes; None for those of `choose`.
    interpret: as in `pl.pallas_call`.

  Raises:
    NotImplementedError: with the reason of `why_not`.
  """
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  masked = where is not None
  if reason := why_not(x, out_dtype, masked, config):
    raise NotImplementedError(reason)
  entry_bytes = _entry_bytes(x.dtype, out_dtype, masked)
  if config is None:
    config = choose(x.shape[0], x.shape[1], entry_bytes)
  x = x.astype(_stored(x.dtype))
  operands = (x,) if where is None else (x, where.astype(jnp.int8))

  def call(form):
    static = _Static(
      form,
      kind,
      scale,
      x.shape[1],
      config,
      _config.chunk(config),
      _config.sublanes(entry_bytes),
      masked,
      _stored(out_dtype),
    )
    *y, log_sum = _call(operands, static, interpret)
    return (*y, log_sum[:, 0])

  if algorithm != 'auto':
    return call(getattr(forms, algorithm.upper()))[0].astype(out_dtype)
  y, *_ = pair = call(forms.PAIR)
  lost = jnp.isnan(pair[-1])

  def online(y):
    rows = lost if kind == 'logsumexp' else lost[:, None]
    return jnp.where(rows, call(forms.ONLINE)[0], y)

  return lax.cond(jnp.any(lost), online, lambda y: y, y).astype(out_dtype)


def _call(operands, static: _Static, interpret):
  """(y, logsumexp (rows, 1)), or the latter alone."""
  rows, columns = operands[0].shape
  bm, bn = static.config.rows, static.config.columns
  if static.form is forms.PAIR and columns <= bn:
    return _call_whole(operands, static, interpret)
  phases = 1 if static.kind == 'logsumexp' else 2
  in_block = pl.BlockSpec((bm, bn), lambda i, phase, j: (i, j))
  specs = [pl.BlockSpec((bm, 1), lambda i, phase, j: (i, 0))]
  shape_of = _shape_like(operands[0])
  shapes = [shape_of((rows, 1), jnp.float32)]
  if phases == 2:
    specs.insert(0, pl.BlockSpec((bm, bn), lambda i, phase, j: (i, j * phase)))
    shapes.insert(0, shape_of((rows, columns), static.out_dtype))
  return pl.pallas_call(
    functools.partial(_kernel, static=static),
    grid=(pl.cdiv(rows, bm), phases, pl.cdiv(columns, bn)),
    in_specs=[in_block] * len(operands),
    out_specs=specs,
    out_shape=shapes,
    scratch_shapes=[pltpu.VMEM((bm, _LANES), jnp.float32)] * 2,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary')
    ),
    interpret=interpret,
    name=f'softmax_{static.kind}',
  )(*operands)


def _shape_like(x):
  # Inside shard_map the result varies over the mesh as the input does.
  return functools.partial(
    jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def _call_whole(operands, static: _Static, interpret):
  """`_call` of the pair form for rows that a block holds."""
  rows, columns = operands[0].shape
  bm, bn = static.config.rows, static.config.columns
  static = static._replace(
    chunk=_config.chunk(static.config, _config.WHOLE_CHUNK)
  )
  block = pl.BlockSpec((bm, bn), lambda i: (i, 0))
  specs = [pl.BlockSpec((bm, 1), lambda i: (i, 0))]
  shape_of = _shape_like(operands[0])
  shapes = [shape_of((rows, 1), jnp.float32)]
  scratch = [pltpu.VMEM((bm, _LANES), jnp.float32)] * 2
  if static.kind != 'logsumexp':
    specs.insert(0, block)
    shapes.insert(0, shape_of((rows, columns), static.out_dtype))
  if static.kind == 'softmax' and static.out_dtype != jnp.float32:
    scratch.append(pltpu.VMEM((bm, bn), jnp.float32))
  return pl.pallas_call(
    functools.partial(_whole_kernel, static=static),
    grid=(pl.cdiv(rows, bm),),
    in_specs=[block] * len(operands),
    out_specs=specs,
    out_shape=shapes,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name=f'softmax_{static.kind}',
  )(*operands)


def _whole_kernel(x_ref, *refs, static: _Static):
  where_ref = None
  if static.masked:
    where_ref, *refs = refs
  y_ref = None
  if static.kind != 'logsumexp':
    y_ref, *refs = refs
  log_sum_ref, first_ref, second_ref, *terms_ref = refs
  source = x_ref, where_ref
  terms_ref = terms_ref[0] if terms_ref else y_ref
  stored = terms_ref if static.kind == 'softmax' else None

  # The exponent of each row follows from its largest entry.
  _extremes(source, (first_ref, second_ref), static)
  top = jnp.max(first_ref[...], axis=1, keepdims=True)
  near = exponential.is_near(jnp.max(first_ref[...]), jnp.min(second_ref[...]))
  n = exponential.row_exponent(top)
  first_ref[...] = _to_lanes(n)

  # Exponentials relative to it are kept and summed, without guards where no
  # entry of the block needs one.
  @pl.when(near)
  def _():
    _sum_terms(
      exponential.scaled_exp_near, source, first_ref, second_ref, stored, static
    )

  @pl.when(jnp.logical_not(near))
  def _():
    _sum_terms(
      exponential.scaled_exp, source, first_ref, second_ref, stored, static
    )

  # The sum joins the lanes, and divides what was kept.
  m = _sum_of_lanes(second_ref[...], static.tile)
  total = sm.row_peak(m, n, top)
  log_sum_ref[...] = sm.online_logsumexp(total)
  if static.kind == 'softmax':
    inverse = jnp.where(m < jnp.inf, 1.0 / m, jnp.nan)
    second_ref[...] = _to_lanes(inverse)
    _write_quotients(source, terms_ref, second_ref, y_ref, static)
  elif static.kind == 'log_softmax':
    first_ref[...], second_ref[...] = map(_to_lanes, total)
    relative = static._replace(form=forms.ONLINE)
    _write_block(source, (first_ref, second_ref), y_ref, 0, relative)


def _to_lanes(v):
  """(rows, 1) in every lane."""
  return jnp.broadcast_to(v, (v.shape[0], _LANES))


def _extremes(source, scratch, static: _Static):
  """The largest and the smallest live entries of the rows, lane by lane."""

  def per_chunk(rows, c, state):
    x = _live(source, rows, c, static)
    top, low = state
    return jnp.maximum(top, jnp.max(x, 0)), jnp.minimum(low, jnp.min(x, 0))

  _over_chunks(per_chunk, (-jnp.inf, jnp.inf), scratch, static)


def _sum_terms(exp, source, n_ref, sum_ref, terms_ref, static: _Static):
  """Sums `exp(x, n)` lane by lane and stores it."""

  def per_chunk(rows, c, state):
    terms = exp(_live(source, rows, c, static), n_ref[rows, :])
    if terms_ref is not None:
      _store(terms, terms_ref, rows, c, static)
    return (state[0] + jnp.sum(terms, 0),)

  _over_chunks(per_chunk, (0.0,), (sum_ref,), static)


def _sum_of_lanes(v, tile: int):
  """The sum of each row, (rows, 1), in an order that the tile alone decides.

  On a TPU that is so anyway. XLA:CPU, which interprets, sums the rows of
  (32, 128) in another order than those of (24, 128).
  """
  tiles = (v[i : i + tile] for i in range(0, len(v), tile))
  return jnp.concatenate([jnp.sum(t, axis=1, keepdims=True) for t in tiles])


def _write_quotients(source, terms_ref, inverse_ref, y_ref, static: _Static):
  """Multiplies stored exponentials by the inverse sum of their row."""

  def per_chunk(rows, c, state):
    y = _slices(terms_ref, rows, c, static) * inverse_ref[rows, :]
    if static.masked:
      _, where = _load(source, rows, c, 0, static)
      assert where is not None
      y = jnp.where(where, y, 0.0)
    _store(y, y_ref, rows, c, static)
    return state

  _over_chunks(per_chunk, (), (), static)


def _over_chunks(per_chunk, init, scratch, static: _Static):
  """Folds `per_chunk(rows, chunk, state)` over a block, into scratch."""
  steps = static.config.columns // static.chunk

  def per_tile(rows):
    state = tuple(jnp.full((static.tile, _LANES), v, jnp.float32) for v in init)
    state = lax.fori_loop(
      0, steps, lambda c, state: per_chunk(rows, c, state), state
    )
    for ref, v in zip(scratch, state, strict=True):
      ref[rows, :] = v

  _for_tiles(per_tile, static)


def _live(source, rows, c, static: _Static):
  """A chunk with -inf in masked places."""
  x, where = _load(source, rows, c, 0, static)
  return x if where is None else jnp.where(where, x, -jnp.inf)


def _kernel(x_ref, *refs, static: _Static):
  where_ref = None
  if static.masked:
    where_ref, *refs = refs
  *y_refs, log_sum_ref, first_ref, second_ref = refs
  scratch = first_ref, second_ref
  source = x_ref, where_ref
  phase, j = pl.program_id(1), pl.program_id(2)

  # Phase 0 sums the blocks of a row lane by lane, and in the end joins lanes.
  @pl.when((phase == 0) & (j == 0))
  def _():
    first_ref[...], second_ref[...] = static.form.identity(first_ref.shape)

  @pl.when(phase == 0)
  def _():
    _sum_block(source, scratch, j, static)

  @pl.when((phase == 0) & (j == pl.num_programs(2) - 1))
  def _():
    _join_lanes(scratch, log_sum_ref, static)

  # Phase 1 reads the blocks again and normalises them.
  if y_refs:

    @pl.when(phase == 1)
    def _():
      _write_block(source, scratch, y_refs[0], j, static)


def _sum_block(source, scratch, j, static: _Static):
  """Adds a block to the sums of its rows."""
  form = static.form

  def per_tile(rows):
    def per_chunk(c, state):
      x, where = _load(source, rows, c, j, static)
      return form.merge(state, form.part(x, where, 0))

    state = form.state(*(ref[rows, :] for ref in scratch))
    steps = static.config.columns // static.chunk
    state = lax.fori_loop(0, steps, per_chunk, state)
    for ref, v in zip(scratch, state, strict=True):
      ref[rows, :] = v

  _for_tiles(per_tile, static)


def _join_lanes(scratch, log_sum_ref, static: _Static):
  """Replaces the sums of the lanes by that of the row, in every lane."""
  form = static.form

  def per_tile(rows):
    lanes = form.state(*(ref[rows, :] for ref in scratch))
    total = form.state(
      *(
        lax.broadcast_in_dim(v, lanes[0].shape, (0,))
        for v in form.total(lanes, 1)
      )
    )
    for ref, v in zip(scratch, total, strict=True):
      ref[rows, :] = v
    log_sum_ref[rows, :] = form.logsumexp(total)[:, :1]

  _for_tiles(per_tile, static)


def _write_block(source, scratch, y_ref, j, static: _Static):
  """Normalises a block."""
  normalise = getattr(static.form, static.kind)

  def per_tile(rows):
    total = static.form.state(*(ref[rows, :] for ref in scratch))

    def per_chunk(c, _):
      x, where = _load(source, rows, c, j, static)
      y = normalise(x, total, where, 0)
      _store(y, y_ref, rows, c, static)
      return 0

    lax.fori_loop(0, static.config.columns // static.chunk, per_chunk, 0)

  _for_tiles(per_tile, static)


def _for_tiles(per_tile, static: _Static):
  def step(r, _):
    start = pl.multiple_of(r * static.tile, static.tile)
    per_tile(pl.ds(start, static.tile))
    return 0

  lax.fori_loop(0, static.config.rows // static.tile, step, 0)


def _load(source, rows, c, j, static: _Static):
  """Chunk `c` of a tile of rows of block `j`, as (slices, rows, lanes).

  Columns beyond the matrix become -inf, which adds nothing.
  """
  x_ref, where_ref = source
  start = c * static.chunk
  x = _slices(x_ref, rows, c, static).astype(jnp.float32)
  if static.scale != 1.0:
    x = x * static.scale
  where = None
  if where_ref is not None:
    where = _slices(where_ref, rows, c, static).astype(jnp.int32) != 0
  bn = static.config.columns
  if static.columns % bn:
    column = lax.broadcasted_iota(jnp.int32, x.shape, 2)
    column += lax.broadcasted_iota(jnp.int32, x.shape, 0) * _LANES
    x = jnp.where(column < static.columns - j * bn - start, x, -jnp.inf)
  return x, where


def _slices(ref, rows, c, static: _Static):
  """Chunk `c` of a tile of rows, as (slices, rows, lanes)."""
  chunk, lanes = _chunk(ref, rows, c, static)
  return jnp.stack([chunk[:, at] for at in lanes])


def _store(values, ref, rows, c, static: _Static):
  """Writes what `_slices` reads."""
  chunk, lanes = _chunk(ref, rows, c, static)
  for s, at in enumerate(lanes):
    chunk[:, at] = values[s].astype(ref.dtype)


def _chunk(ref, rows, c, static: _Static):
  """Chunk `c` of a tile of rows, and where its slices are.

  One address to a chunk: those of the slices differ from it by constants.
  """
  start = pl.multiple_of(c * static.chunk, _LANES)
  slices = [pl.ds(s, _LANES) for s in range(0, static.chunk, _LANES)]
  return ref.at[rows, pl.ds(start, static.chunk)], slices
