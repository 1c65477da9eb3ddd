"""Blackwell kernel of block_matmul: block-scaled MMA of codes and scales.

Compiled for B200 and not yet run. One warp fills a ring by TMA; one copies a
tile of scales to tensor memory and issues the MMA that reads it; then the whole
warpgroup stores. There is one buffer of scales: the tensor core takes copies
and MMAs of one thread in the order in which they are issued.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.block_matmul.mosaic_gpu_config import SWIZZLE_BYTES, Config

# A scale tile holds the scales of 128 rows and 4 blocks as 32 x 16 bytes.
SCALE_ROWS, SCALE_BLOCKS = 128, 4
SCALE_TILE = (32, 16)

TMA_WARP, MMA_WARP = 0, 1


def scale_tiles(scale: jax.Array) -> jax.Array:
  """Scales in the order in which the tensor memory takes them.

  The scale of row r and block c is at [r // 128, c // 4, r % 32,
  r % 128 // 32 * 4 + c % 4].

  Args:
    scale: one byte each, (rows, blocks), multiples of 128 and 4.

  Returns:
    (rows / 128, blocks / 4, 32, 16).
  """
  rows, blocks = scale.shape
  rows, blocks = rows // SCALE_ROWS, blocks // SCALE_BLOCKS
  scale = scale.reshape(rows, 4, 32, blocks, SCALE_BLOCKS)
  return scale.transpose(0, 3, 2, 1, 4).reshape(rows, blocks, *SCALE_TILE)


def block_scaled(
  a: jax.Array,
  b: jax.Array,
  sa: jax.Array,
  sb: jax.Array,
  block: int,
  config: Config,
) -> jax.Array:
  """The product of two block-scaled operands.

  Args:
    a: FP8 or FP4 (M, K).
    b: FP8 or FP4 (N, K).
    sa: E8M0 or E4M3 of M rows in `scale_tiles`.
    sb: the same of N rows.
    block: elements that share a scale.
    config: tiles that divide the operands.

  Returns:
    float32 (M, N).
  """
  (m, _), n = a.shape, b.shape[0]
  # Warps of a warpgroup copy scales under each version's own default semantics.
  return plgpu.kernel(
    functools.partial(_kernel, block=block, config=config),
    out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
    grid=(m // config.bm, n // config.bn),
    grid_names=('m', 'n'),
    scratch_types=_scratch(a, b, sa, sb, block, config),
  )(a, b, sa, sb)


def _scratch(a, b, sa, sb, block: int, config: Config) -> list:
  """Rings of operands and scales, the result, tensor memory, barriers."""
  bm, bn, stages = config.bm, config.bn, config.stages
  blocks = config.bk // block
  tiled = (
    plgpu.TilingTransform((8, SWIZZLE_BYTES * 8 // config.bits)),
    plgpu.SwizzleTransform(SWIZZLE_BYTES),
  )

  def ring(x, rows):
    return plgpu.SMEM((stages, rows, config.bk), x.dtype, transforms=tiled)

  def scale_ring(x, rows):
    tiles = rows // SCALE_ROWS, blocks // SCALE_BLOCKS
    return plgpu.SMEM((stages, *tiles, *SCALE_TILE), x.dtype)

  def scale_tmem(x, rows):
    layout = plgpu.TMEMLayout.SCALES_LAYOUT
    return plgpu.TMEM((rows, blocks), x.dtype, layout=layout)

  return [
    ring(a, bm),
    ring(b, bn),
    scale_ring(sa, bm),
    scale_ring(sb, bn),
    plgpu.SMEM((bm, bn), jnp.float32),
    plgpu.TMEM((bm, bn), jnp.float32),
    scale_tmem(sa, bm),
    scale_tmem(sb, bn),
    plgpu.Barrier(num_arrivals=4, num_barriers=stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=stages, orders_tensor_core=True),
    plgpu.Barrier(num_arrivals=1, orders_tensor_core=True),
  ]


def _kernel(a, b, sa, sb, out, *scratch, block: int, config: Config):
  """A tile of the result: one warp loads, another one multiplies."""
  *rings, out_s, acc, sa_t, sb_t, full, empty, done = scratch
  i, j = lax.axis_index('m'), lax.axis_index('n')
  steps = a.shape[1] // config.bk
  fill = functools.partial(
    _fill_slot, (a, b, sa, sb), rings, (i, j), full, empty, block, config
  )
  multiply = functools.partial(
    _multiply_slot, rings, acc, (sa_t, sb_t), full, empty, config
  )

  @plgpu.warp_map
  def _(warp):
    # Fills the ring as slots become free.
    @pl.when(warp == TMA_WARP)
    def _():
      lax.fori_loop(0, steps, fill, None)

    # Issues one MMA for each slot; the tensor core frees the slot itself.
    @pl.when(warp == MMA_WARP)
    def _():
      lax.fori_loop(0, steps, multiply, None)
      plgpu.tcgen05_commit_arrive(done)

  # The whole warpgroup stores the sums, by way of shared memory.
  plgpu.barrier_wait(done)
  out_s[...] = plgpu.async_load_tmem(acc)
  plgpu.commit_smem()
  rows, columns = (
    pl.ds(i * config.bm, config.bm),
    pl.ds(j * config.bn, config.bn),
  )
  plgpu.copy_smem_to_gmem(out_s, out.at[rows, columns])
  plgpu.wait_smem_to_gmem(0)


def _fill_slot(sources, rings, place, full, empty, block, config, step, _):
  """Copies tile `step` of operands and scales to its slot once that is free."""
  (a, b, sa, sb), (i, j) = sources, place
  bm, bn, bk = config.bm, config.bn, config.bk
  slot = lax.rem(step, config.stages)

  @pl.when(step >= config.stages)
  def _():
    plgpu.barrier_wait(empty.at[slot])

  per_step = bk // block // SCALE_BLOCKS
  columns = pl.ds(step * bk, bk)
  tiles = pl.ds(step * per_step, per_step)
  for source, ring in zip(
    (
      a.at[pl.ds(i * bm, bm), columns],
      b.at[pl.ds(j * bn, bn), columns],
      sa.at[pl.ds(i * (bm // SCALE_ROWS), bm // SCALE_ROWS), tiles],
      sb.at[pl.ds(j * (bn // SCALE_ROWS), bn // SCALE_ROWS), tiles],
    ),
    rings,
    strict=True,
  ):
    plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])


def _multiply_slot(rings, acc, scales, full, empty, config, step, _):
  """Adds the product of tile `step`, whose scales go to tensor memory first."""
  slot = lax.rem(step, config.stages)
  a_s, b_s, sa_s, sb_s = (ring.at[slot] for ring in rings)
  sa_t, sb_t = scales
  plgpu.barrier_wait(full.at[slot])
  plgpu.async_copy_scales_to_tmem(sa_s, sa_t)
  plgpu.async_copy_scales_to_tmem(sb_s, sb_t)
  plgpu.tcgen05_mma(
    acc,
    a_s,
    _mosaic_gpu.transpose(b_s),
    empty.at[slot],
    a_scale=sa_t,
    b_scale=sb_t,
    accumulate=step > 0,
  )
