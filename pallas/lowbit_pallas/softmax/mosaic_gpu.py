"""Softmax kernels for Hopper and Blackwell GPUs.

One warpgroup takes 256 columns at a time and keeps 256 independent sums. A row
that fits shared memory is read once and needs one kernel, which looks at the
sum of its row and goes on in the pair or the online form. Longer rows are
split: one kernel sums the pieces, their sums are joined in the order of the
pieces, and another one normalises. Between the two, rows that the pair form
lost are summed once more, in the online form: that kernel ends at once where a
row was not lost, which is cheaper than to ask the host whether to launch it. No
atomics, so the same bits in every run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.softmax import forms, mosaic_gpu_config as _config
from lowbit_pallas.softmax.mosaic_gpu_config import (
  Config,
  choose,
  heuristic as heuristic,
)

_SLICE = _config.SLICE
_DTYPES = ('float32', 'bfloat16', 'float16')
_LAYOUT = plgpu.Layout.WG_STRIDED((_SLICE,), vec_size=2)


class _Static(NamedTuple):
  """What a kernel knows at trace time."""

  kind: str
  scale: float
  algorithm: str
  slices: int
  masked: bool
  in_dtype: Any
  out_dtype: Any


def why_not(
  x: jax.Array | jax.ShapeDtypeStruct,
  out_dtype: DTypeLike | None = None,
  masked: bool = False,
  config: Config | None = None,
) -> str | None:
  """Why the kernels refuse, or None.

  Args:
    x: array or `jax.ShapeDtypeStruct`.
    out_dtype: dtype of the result; None for that of `x`.
    masked: whether there is a mask.
    config: how rows are cut; None for what `choose` says.
  """
  out_dtype = x.dtype if out_dtype is None else out_dtype
  if len(x.shape) != 2:
    return f'x.shape={x.shape} must be (rows, columns)'
  if x.shape[0] < 1 or x.shape[1] < _SLICE:
    return f'x.shape={x.shape} must have a row and {_SLICE} columns at least'
  for name, dtype in (('x.dtype', x.dtype), ('out_dtype', out_dtype)):
    if jnp.dtype(dtype).name not in _DTYPES:
      return f'{name}={jnp.dtype(dtype).name} is not one of {_DTYPES}'
  if config is None:
    return None
  size = _entry_bytes(x.dtype, out_dtype, masked)
  return _config.why_not(config, x.shape[1], size)


def _entry_bytes(x_dtype, out_dtype, masked: bool) -> int:
  """Shared memory for one entry; a result of another dtype has its own."""
  x_dtype, out_dtype = jnp.dtype(x_dtype), jnp.dtype(out_dtype)
  out = 0 if x_dtype == out_dtype else out_dtype.itemsize
  return x_dtype.itemsize + masked + out


def run(
  x: jax.Array,
  where: jax.Array | None = None,
  *,
  kind: str = 'softmax',
  scale: float = 1.0,
  algorithm: str = 'auto',
  out_dtype: DTypeLike | None = None,
  config: Config | None = None,
  interpret: Any = None,
) -> jax.Array:
  """softmax, log_softmax or logsumexp of rows, see `reference.run`.

  Args:
    x: `(rows, columns)`. Columns that are no multiple of 256 cost a copy.
    where: bool of that shape, or None.
    kind: one of `forms.KINDS`.
    scale: factor of x, in float32.
    algorithm: one of `forms.ALGORITHMS`.
    out_dtype: dtype of the result; None for that of `x`.
    config: how rows are cut; None for what `choose` says.
    interpret: parameters of the GPU interpreter, None to compile.

  Raises:
    NotImplementedError: with the reason of `why_not`.
  """
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  masked = where is not None
  if reason := why_not(x, out_dtype, masked, config):
    raise NotImplementedError(reason)
  rows, columns = x.shape
  if config is None:
    size = _entry_bytes(x.dtype, out_dtype, masked)
    config = choose(rows, columns, size)
  static = _Static(
    kind, scale, algorithm, config.slices, masked, x.dtype, out_dtype
  )
  missing = config.splits * config.slices * _SLICE - columns
  operands = (x,) if where is None else (x, where.astype(jnp.int8))
  cut = (rows, config.splits, config.slices, _SLICE)
  operands = tuple(
    jnp.pad(a, ((0, 0), (0, missing)), constant_values=fill).reshape(cut)
    for a, fill in zip(operands, (-jnp.inf, 0), strict=False)
  )
  if kind == 'logsumexp':
    return _logsumexp(operands, static, interpret)
  if config.splits == 1:
    y = _whole(operands, static, interpret)
  else:
    y = _split(operands, static, interpret)
  return y.reshape(rows, -1)[:, :columns]


def _in_place(static: _Static) -> bool:
  return static.in_dtype == static.out_dtype


def _logsumexp(operands, static: _Static, interpret):
  """The logarithms of the sums of rows."""
  totals = _totals(operands, static, interpret)
  if static.algorithm != 'auto':
    y = getattr(forms, static.algorithm.upper()).logsumexp(*totals)
  else:
    pair, online = totals
    y = jnp.where(
      jnp.isnan(pair[0]),
      forms.ONLINE.logsumexp(online),
      forms.PAIR.logsumexp(pair),
    )
  return y.astype(static.out_dtype)


def _split(operands, static: _Static, interpret):
  """Both passes over rows in pieces."""
  totals = _totals(operands, static, interpret)
  return _normalised(operands, totals, static, interpret)


def _totals(operands, static: _Static, interpret) -> list:
  """The sums of rows in the form of the algorithm; in 'auto' in both forms.

  The online sums of 'auto' are those of rows whose pair sums are NaN, and
  undefined for all others.
  """
  if static.algorithm != 'auto':
    form = getattr(forms, static.algorithm.upper())
    return [_total(form, operands, None, static, interpret)]
  pair = _total(forms.PAIR, operands, None, static, interpret)
  online = _total(forms.ONLINE, operands, pair[0], static, interpret)
  return [pair, online]


def _whole(operands, static: _Static, interpret):
  """Both passes over rows that lie in shared memory."""
  shape = operands[0].shape

  def body(*refs):
    *sources, out_ref, tiles, out_tile, barrier = refs
    row = lax.axis_index('row')
    _fetch([ref.at[row, 0] for ref in sources], tiles, barrier)
    out_tile = tiles[0] if out_tile is None else out_tile

    def write(form, total):
      _write(form, tiles, total, out_tile, static)

    if static.algorithm != 'auto':
      form = getattr(forms, static.algorithm.upper())
      write(form, _join(form, _sum(form, tiles, static)))
    else:
      pair = _join(forms.PAIR, _sum(forms.PAIR, tiles, static))
      lost = _is_lost(pair[0])

      @pl.when(lost)
      def _():
        online = _sum(forms.ONLINE, tiles, static)
        write(forms.ONLINE, _join(forms.ONLINE, online))

      @pl.when(jnp.logical_not(lost))
      def _():
        write(forms.PAIR, pair)

    _send(out_tile, out_ref.at[row, 0])

  return _kernel(
    body,
    jax.ShapeDtypeStruct(shape, static.out_dtype),
    (shape[0],),
    ('row',),
    [_tiles(static), _out_tile(static), _barrier(static)],
    interpret,
  )(*operands)


def _total(form, operands, lost, static: _Static, interpret):
  """The sums of rows, two `(rows,)` arrays.

  Args:
    form: of the sums.
    operands: x, and the mask if there is one.
    lost: None for all rows; or `(rows,)`, where only rows with a NaN are summed
      and the sums of others are undefined.
    static: see `_Static`.
    interpret: see `run`.
  """
  rows, splits, *_ = operands[0].shape
  lost_sums = () if lost is None else (lost,)

  def body(*refs):
    *refs, first_ref, second_ref, tiles, first, second, barrier = refs
    sources = refs[: len(operands)]
    row, split = lax.axis_index('row'), lax.axis_index('split')

    def add():
      _fetch([ref.at[row, split] for ref in sources], tiles, barrier)
      first[...], second[...] = _sum(form, tiles, static)
      _send(first, first_ref.at[row, split])
      _send(second, second_ref.at[row, split])

    if lost is None:
      add()
    else:
      pl.when(_is_lost(refs[-1][row]))(add)

  part = jax.ShapeDtypeStruct((rows, splits, _SLICE), jnp.float32)
  lanes = plgpu.SMEM((_SLICE,), jnp.float32)
  parts = _kernel(
    body,
    (part, part),
    (splits, rows),
    ('split', 'row'),
    [_tiles(static), lanes, lanes, _barrier(static)],
    interpret,
  )(*operands, *lost_sums)
  return form.total(form.total(form.state(*parts), 1), 1)


def _normalised(operands, totals, static: _Static, interpret):
  """The second pass over rows in pieces; `totals` as from `_totals`."""
  shape = operands[0].shape
  sums = [leaf for total in totals for leaf in total]

  def body(*refs):
    *refs, out_ref, tiles, out_tile, barrier = refs
    sources, sums = refs[: len(operands)], refs[len(operands) :]
    row, split = lax.axis_index('row'), lax.axis_index('split')
    _fetch([ref.at[row, split] for ref in sources], tiles, barrier)
    out_tile = tiles[0] if out_tile is None else out_tile

    def write(form, first_ref, second_ref):
      total = form.state(first_ref[row], second_ref[row])
      _write(form, tiles, total, out_tile, static)

    if static.algorithm != 'auto':
      write(getattr(forms, static.algorithm.upper()), *sums)
    else:
      lost = _is_lost(sums[0][row])
      pl.when(lost)(lambda: write(forms.ONLINE, *sums[2:]))
      pl.when(jnp.logical_not(lost))(lambda: write(forms.PAIR, *sums[:2]))
    _send(out_tile, out_ref.at[row, split])

  return _kernel(
    body,
    jax.ShapeDtypeStruct(shape, static.out_dtype),
    (shape[1], shape[0]),
    ('split', 'row'),
    [_tiles(static), _out_tile(static), _barrier(static)],
    interpret,
  )(*operands, *sums)


def _is_lost(first):
  """Whether the first number of a pair sum says that the row needs 'online'."""
  return first != first


def _kernel(body, out_type, grid, grid_names, scratch_types, interpret):
  options = {} if interpret is None else {'interpret': interpret}
  return _mosaic_gpu.kernel(
    body,
    out_type=out_type,
    grid=grid,
    grid_names=grid_names,
    scratch_types=scratch_types,
    **options,
  )


def _tiles(static: _Static):
  shape = (static.slices, _SLICE)
  tiles = [plgpu.SMEM(shape, static.in_dtype)]
  return tiles + [plgpu.SMEM(shape, jnp.int8)] * static.masked


def _out_tile(static: _Static):
  if _in_place(static):
    return None
  return plgpu.SMEM((static.slices, _SLICE), static.out_dtype)


def _barrier(static: _Static):
  return plgpu.Barrier(num_arrivals=1 + static.masked)


def _fetch(sources, tiles, barrier):
  """Copies a piece of a row, and of its mask, to shared memory."""
  for source, tile in zip(sources, tiles, strict=True):
    plgpu.copy_gmem_to_smem(source, tile, barrier)
  plgpu.barrier_wait(barrier)


def _send(tile, target):
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile, target)
  plgpu.wait_smem_to_gmem(0)


def _load(tiles, i, static: _Static):
  """Slice `i` of a piece in float32, and its mask or None."""
  x = _mosaic_gpu.load(tiles[0].at[i], _LAYOUT).astype(jnp.float32)
  if static.scale != 1.0:
    x = x * static.scale
  if not static.masked:
    return x, None
  mask = _mosaic_gpu.load(tiles[1].at[i], _LAYOUT)
  return x, mask.astype(jnp.int32) != 0


def _sum(form, tiles, static: _Static):
  """The 256 sums of a piece."""

  def step(i, state):
    return form.merge(state, form.exp(*_load(tiles, i, static)))

  state = form.state(
    *(plgpu.layout_cast(v, _LAYOUT) for v in form.identity((_SLICE,)))
  )
  return lax.fori_loop(0, static.slices, step, state)


def _join(form, state):
  """The sum of 256 sums, two scalars."""
  return form.total(state, 0)


def _write(form, tiles, total, out_tile, static: _Static):
  """Normalises a piece."""
  normalise = getattr(form, static.kind)
  total = form.state(*(lax.broadcast_in_dim(v, (_SLICE,), ()) for v in total))

  def step(i, _):
    x, where = _load(tiles, i, static)
    out_tile[i] = normalise(x, total, where, 0).astype(out_tile.dtype)

  lax.fori_loop(0, static.slices, step, None)
