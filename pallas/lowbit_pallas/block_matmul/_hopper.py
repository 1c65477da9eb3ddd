"""Hopper kernels of block_matmul: a ring filled by TMA, and WGMMA.

The last warpgroup loads; every other one multiplies 64 rows of the tile. All
sizes are multiples of the tiles. A slot of the ring is released once for every
time that it is filled, and the loader waits for all of it before it ends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.block_matmul import reference
from lowbit_pallas.block_matmul.mosaic_gpu_config import (
  SWIZZLE_BYTES,
  WGMMA_ROWS,
  Config,
)

# Registers per thread; two or three warpgroups share 64 Ki of them.
LOAD_REGISTERS = 40
MULTIPLY_REGISTERS = 232

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)


def promoted(
  a: jax.Array,
  b: jax.Array,
  sa: jax.Array,
  sb: jax.Array,
  config: Config,
  interpret: Any = None,
) -> jax.Array:
  """'fp8_128': FP8 products of 128 elements, scaled and summed in float32.

  Args:
    a: FP8 (M, K).
    b: FP8 (N, K).
    sa: float32 (K / 128, M).
    sb: float32 (K / 128, N / 128).
    config: tiles with bn = bk = 128.
    interpret: see `mosaic_gpu.run`.

  Returns:
    float32 (M, N).
  """
  scratch = [
    *_rings(a, b, config),
    plgpu.SMEM((config.stages, config.bm), jnp.float32),
    plgpu.SMEM((config.bm, config.bn), jnp.float32),
    plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=_groups(config), num_barriers=config.stages),
  ]
  return _call(_promoted, (a, b, sa, sb), scratch, config, interpret)


def integer(
  a: jax.Array,
  b: jax.Array,
  row: jax.Array,
  column: jax.Array,
  config: Config,
  interpret: Any = None,
) -> jax.Array:
  """'integer': int32 sums of int8 products, then a scale per row and column.

  Args:
    a: int8 (M, K).
    b: int8 (N, K).
    row: float32 (M,).
    column: float32 (N,).
    config: tiles.
    interpret: see `mosaic_gpu.run`.

  Returns:
    float32 (M, N).
  """
  scratch = [
    *_rings(a, b, config),
    plgpu.SMEM((config.bm,), jnp.float32),
    plgpu.SMEM((config.bn,), jnp.float32),
    plgpu.SMEM((config.bm, config.bn), jnp.float32),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=_groups(config), num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=2),
  ]
  return _call(_integer, (a, b, row, column), scratch, config, interpret)


def _groups(config: Config) -> int:
  """Warpgroups that multiply."""
  return config.bm // WGMMA_ROWS


def _call(body, operands, scratch, config: Config, interpret):
  """A block of threads for every tile of the result, float32 (M, N)."""
  m, n = operands[0].shape[0], operands[1].shape[0]
  return _mosaic_gpu.kernel(
    functools.partial(body, config=config),
    out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
    grid=(m // config.bm, n // config.bn),
    grid_names=('m', 'n'),
    num_threads=_groups(config) + 1,
    thread_name='group',
    scratch_types=scratch,
    interpret=interpret,
  )(*operands)


def _promoted(
  a, b, sa, sb, out, a_s, b_s, sa_s, out_s, full, empty, *, config: Config
):
  """A tile of 'fp8_128'."""
  i, j, group = (lax.axis_index(name) for name in ('m', 'n', 'group'))
  rows = pl.ds(group * WGMMA_ROWS, WGMMA_ROWS)
  bm, steps = config.bm, a.shape[1] // config.bk

  # The last warpgroup fills the ring; it needs few registers.
  @pl.when(group == _groups(config))
  def _():
    plgpu.set_max_registers(LOAD_REGISTERS, action='decrease')

    def load(step, slot):
      _load_tiles((a, b), (a_s, b_s), (i, j), config, step, slot, full)
      plgpu.copy_gmem_to_smem(
        sa.at[step, pl.ds(i * bm, bm)], sa_s.at[slot], full.at[slot]
      )

    _fill_ring(load, steps, config.stages, empty)

  # Every other one multiplies 64 rows, and scales each product before the sum.
  @pl.when(group < _groups(config))
  def _():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action='increase')

    def step(index, carry):
      acc, column = carry
      slot = lax.rem(index, config.stages)
      # The scale of rhs comes from global memory: a whole step ahead, so that
      # no product waits for it.
      next_column = sb[lax.min(index + 1, steps - 1), j]
      plgpu.barrier_wait(full.at[slot])
      row = _mosaic_gpu.load(sa_s.at[slot, rows], ROW_LAYOUT) * column
      partial = _fresh_product(a_s.at[slot, rows], b_s.at[slot])
      # Threads read the row scales, TMA writes the next ones over them.
      plgpu.commit_smem()
      plgpu.barrier_arrive(empty.at[slot])
      row = lax.broadcast_in_dim(row, partial.shape, (0,))
      return reference.promote(acc, partial, row, 1), next_column

    zero = jnp.zeros((WGMMA_ROWS, config.bn), jnp.float32)
    zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    out_s[rows], _ = lax.fori_loop(0, steps, step, (zero, sb[0, j]))
    _store(out_s.at[rows], out, i * bm + group * WGMMA_ROWS, j * config.bn)


def _fresh_product(a, b):
  """a b^T in an accumulator of its own."""

  def product(acc):
    plgpu.wgmma(acc, a, _mosaic_gpu.transpose(b))
    plgpu.wgmma_wait(0)
    return acc[...]

  shape = a.shape[0], b.shape[0]
  return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _integer(
  a,
  b,
  row,
  column,
  out,
  a_s,
  b_s,
  row_s,
  column_s,
  out_s,
  full,
  empty,
  once,
  *,
  config: Config,
):
  """A tile of 'integer'."""
  i, j, group = (lax.axis_index(name) for name in ('m', 'n', 'group'))
  rows = pl.ds(group * WGMMA_ROWS, WGMMA_ROWS)
  bm, bn, steps = config.bm, config.bn, a.shape[1] // config.bk

  # The last warpgroup loads the scales once, and fills the ring.
  @pl.when(group == _groups(config))
  def _():
    plgpu.set_max_registers(LOAD_REGISTERS, action='decrease')
    plgpu.copy_gmem_to_smem(row.at[pl.ds(i * bm, bm)], row_s, once)
    plgpu.copy_gmem_to_smem(column.at[pl.ds(j * bn, bn)], column_s, once)

    def load(step, slot):
      _load_tiles((a, b), (a_s, b_s), (i, j), config, step, slot, full)

    _fill_ring(load, steps, config.stages, empty)

  # Every other one sums 64 rows in int32, and scales the sums at the end.
  @pl.when(group < _groups(config))
  def _():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action='increase')
    sum_ring = functools.partial(
      _sum_ring, (a_s, b_s), rows, full, empty, steps, config.stages
    )
    total = pl.run_scoped(
      sum_ring, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, bn), jnp.int32)
    )
    plgpu.barrier_wait(once)
    r = _mosaic_gpu.load(row_s.at[rows], ROW_LAYOUT)
    c = _mosaic_gpu.load(column_s, COLUMN_LAYOUT)
    out_s[rows] = reference.scaled(
      total,
      lax.broadcast_in_dim(r, total.shape, (0,)),
      lax.broadcast_in_dim(c, total.shape, (1,)),
    )
    _store(out_s.at[rows], out, i * bm + group * WGMMA_ROWS, j * bn)


def _sum_ring(rings, rows, full, empty, steps: int, stages: int, total):
  """Adds the products of all tiles to `total`, one always in flight."""
  a_s, b_s = rings

  def step(index, _):
    slot = lax.rem(index, stages)
    plgpu.barrier_wait(full.at[slot])
    plgpu.wgmma(total, a_s.at[slot, rows], _mosaic_gpu.transpose(b_s.at[slot]))
    plgpu.wgmma_wait(1)  # the product before this one is done

    @pl.when(index > 0)
    def _():
      plgpu.barrier_arrive(empty.at[lax.rem(index - 1, stages)])

  lax.fori_loop(0, steps, step, None)
  plgpu.wgmma_wait(0)
  plgpu.barrier_arrive(empty.at[lax.rem(steps - 1, stages)])
  return total[...]


def _rings(a, b, config: Config):
  tiled = (
    plgpu.TilingTransform((8, SWIZZLE_BYTES)),
    plgpu.SwizzleTransform(SWIZZLE_BYTES),
  )
  return [
    plgpu.SMEM((config.stages, rows, config.bk), x.dtype, transforms=tiled)
    for x, rows in ((a, config.bm), (b, config.bn))
  ]


def _load_tiles(sources, rings, tile, config, step, slot, full):
  columns = pl.ds(step * config.bk, config.bk)
  for x, ring, index, rows in zip(
    sources, rings, tile, (config.bm, config.bn), strict=True
  ):
    plgpu.copy_gmem_to_smem(
      x.at[pl.ds(index * rows, rows), columns], ring.at[slot], full.at[slot]
    )


def _fill_ring(load, steps: int, stages: int, empty):
  """Calls load(step, slot) as slots become free, and waits until all are."""

  def fill(index, _):
    slot = lax.rem(index, stages)

    @pl.when(index >= stages)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    load(index, slot)

  def drain(index, _):
    plgpu.barrier_wait(empty.at[lax.rem(index, stages)])

  lax.fori_loop(0, steps, fill, None)
  lax.fori_loop(max(steps - stages, 0), steps, drain, None)


def _store(tile, out, row, column):
  plgpu.commit_smem()
  rows, columns = tile.shape
  plgpu.copy_smem_to_gmem(
    tile, out.at[pl.ds(row, rows), pl.ds(column, columns)]
  )
  plgpu.wait_smem_to_gmem(0)
