"""The product on Hopper: weights are decoded in registers.

The transposed result is summed, (64, bm) tiles of w^T x^T: decoded weights are
the operand of WGMMA that may live in registers, and rows of x, which are few,
its minor dimension. TMA brings tiles of codes, scales and x into a ring of
buffers. K is cut into `split_k` parts, so that few columns still fill the
device; float32 partial results are added in a fixed order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.arith import block, codec, packing
from lowbit_pallas.wq_matmul import mosaic_gpu_config as _config, reference
from lowbit_pallas.wq_matmul.mosaic_gpu_config import (
  LAYOUT,
  Config,
  choose,
  heuristic as heuristic,
)
from lowbit_pallas.wq_matmul.prepack import Prepacked

ROWS = _config.COLUMNS  # of w^T in a tile


def why_not(
  x_shape: Sequence[int],
  x_dtype: DTypeLike,
  w: Prepacked,
  config: Config | None = None,
) -> str | None:
  """Why the kernel refuses, or None.

  Args:
    x_shape: shape of x.
    x_dtype: dtype of x.
    w: the weight, arrays or `jax.ShapeDtypeStruct`.
    config: tile sizes; None for those of `choose`.
  """
  config = config or _chosen(x_shape, x_dtype, w)
  refusal = reference.why_not(x_shape, x_dtype, w, config.schedule)
  if refusal is not None:
    return refusal
  if w.layout != LAYOUT:
    return f'the weight has layout {w.layout!r}; prepack it with {LAYOUT!r}'
  if w.tile != config.tile:
    return f'the weight has tiles of {w.tile} rows, config.tile={config.tile}'
  lane = w.tile // packing.codes_per_group(w.spec.bits)
  if lane not in (64, 128):
    return f'tiles of {w.tile} rows have lanes of {lane}, not 64 or 128'
  refusal = _config.why_not(config, w.steps)
  if refusal is None:
    refusal = _mosaic_gpu.why_not_grid(_grid(x_shape[0], w.n, config))
  if refusal is not None:
    return refusal
  is_wide = x_dtype != jnp.bfloat16
  if is_wide and not reference.fits_bfloat16(w, config.schedule):
    return (
      f'x is {jnp.dtype(x_dtype).name} and bfloat16 does not hold the weights'
      f' of the schedule {config.schedule!r}'
    )
  if w.spec.block % lane == 0:
    return None
  if config.schedule == 'post':
    return f"blocks of {w.spec.block} are not whole lanes of {lane} for 'post'"
  if not _mosaic_gpu.concatenates():
    return (
      f'blocks of {w.spec.block} in lanes of {lane} need concatenation, which'
      ' Mosaic GPU has from JAX 0.11 on'
    )
  return None


def _chosen(x_shape, x_dtype, w: Prepacked) -> Config:
  return choose(x_shape[0], w.n, w.k, w.spec, x_dtype, tile=w.tile)


def run(
  x: jax.Array,
  w: Prepacked,
  *,
  config: Config | None = None,
  out_dtype: DTypeLike | None = None,
) -> jax.Array:
  """x @ dequantize(w).

  Args:
    x: (m, k) in bfloat16, float16 or float32.
    w: the weight in the layout 'nk'.
    config: tile sizes; None for those of `choose`.
    out_dtype: dtype of the result, which is rounded to it once; None for that
      of x.

  Returns:
    (m, n).
  """
  config = config or _chosen(x.shape, x.dtype, w)
  refusal = why_not(x.shape, x.dtype, w, config)
  if refusal is not None:
    raise NotImplementedError(refusal)
  out_dtype = x.dtype if out_dtype is None else out_dtype
  m = x.shape[0]
  if not (m and w.n and w.steps):
    return jnp.zeros((m, w.n), out_dtype)
  operands, _ = reference.operands_of(x, w, config.schedule)
  parts = _call(operands, w, config)
  out = parts[0]
  for part in parts[1:]:
    out = out + part
  out = out[: w.n, : operands.shape[0]].T
  out = reference.sum_of_parts(out, m)
  if w.scale is not None and not w.spec.block:
    out = block.times_scale(out, w.scale[0], w.spec.scale)
  return out.astype(out_dtype)


class _Tile(NamedTuple):
  """What a block of threads works on.

  Attributes:
    spec: what codes and scales stand for.
    config: tile sizes.
    steps: tiles along K.
    tiles_per_block: tiles that read the same row of scales.
    has_scale: whether there are block scales.
  """

  spec: block.Blocked
  config: Config
  steps: int
  tiles_per_block: int
  has_scale: bool

  @property
  def lanes(self) -> int:
    """Lanes of a tile, see `prepack`."""
    return packing.codes_per_group(self.spec.bits)

  @property
  def lane(self) -> int:
    """Rows of K in a lane."""
    return self.config.tile // self.lanes


class _Buffers(NamedTuple):
  """A tile in shared memory.

  Attributes:
    xs: the columns of x that each lane meets.
    codes: planes.
    scale: stored scales (blocks, 64), or None.
    zero: zero points (blocks, 64), or None.
  """

  xs: Sequence[Any]
  codes: Sequence[Any]
  scale: Any
  zero: Any


def _call(x, w: Prepacked, config: Config):
  """Partial results (split_k, n, m), n and m padded to whole tiles."""
  bm = config.bm
  m, n = _round_up(x.shape[0], bm), _round_up(w.n, ROWS)
  x = jnp.pad(x, ((0, m - x.shape[0]), (0, 0)))
  # TMA wants rows of whole 16 bytes, and tiled layouts multiples of 8 columns.
  planes = w.planes
  if w.n % 8:
    planes = jnp.pad(planes, ((0, 0), (0, n - w.n), (0, 0)))
  per_block = [
    None if leaf is None else jnp.pad(leaf, ((0, 0), (0, 0), (0, n - w.n)))
    for leaf in (w.scale if w.spec.block else None, w.zero_point)
  ]
  inputs = [x, planes, *[leaf for leaf in per_block if leaf is not None]]
  tile = _Tile(
    spec=w.spec,
    config=config,
    steps=w.steps // config.split_k,
    tiles_per_block=w.tiles_per_block,
    has_scale=per_block[0] is not None,
  )
  return _mosaic_gpu.kernel(
    functools.partial(_kernel, tile),
    out_type=jax.ShapeDtypeStruct((config.split_k, n, m), jnp.float32),
    grid=_grid(m, n, config),
    grid_names=('n', 'part', 'm'),
    scratch_types=[plgpu.SMEM((ROWS, bm), jnp.float32)],
  )(*inputs)


def _grid(m: int, n: int, config: Config) -> tuple[int, int, int]:
  """Tiles of the weight's columns, parts of K, tiles of the rows of x."""
  return -(-n // ROWS), config.split_k, -(-m // config.bm)


def _kernel(tile: _Tile, x, planes, *refs):
  """The sums of a tile of w^T x^T over one part of K."""
  *per_block, out, out_smem = refs
  column, part, row = (lax.axis_index(a) for a in ('n', 'part', 'm'))
  # The tiles of this part come into a ring of buffers, ahead of their product.
  pipeline = _pipeline(tile, x, planes, per_block, (column, part, row))
  # 'post' needs the sum of every block by itself, 'pre' one sum for all of K.
  if tile.has_scale and tile.config.schedule == 'post':
    total = _sum_by_block(tile, pipeline)
  else:
    add = functools.partial(_sum_decoded, tile, pipeline)
    total = pl.run_scoped(add, _accumulator(tile))
  # By way of shared memory, from which TMA writes whole tiles.
  out_smem[...] = total
  plgpu.commit_smem()
  bm = tile.config.bm
  columns, rows = pl.ds(column * ROWS, ROWS), pl.ds(row * bm, bm)
  plgpu.copy_smem_to_gmem(out_smem, out.at[part, columns, rows])
  plgpu.wait_smem_to_gmem(0)


def _pipeline(tile: _Tile, x, planes, per_block, place) -> Callable:
  """`(step, carry) -> carry`: runs `step(buffers, carry)` on the tiles of K.

  Without a carry the step takes the buffers alone.
  """
  column, part, row = place
  first = part * tile.steps
  bm, lane, lanes = tile.config.bm, tile.lane, tile.lanes

  def block_of(k):
    return lax.div(first + k, tile.tiles_per_block), 0, column

  in_specs = [
    _tiled((bm, lane), 2, lambda k, j=j: (row, (first + k) * lanes + j))
    for j in range(lanes)
  ]
  in_specs += [
    _tiled((ROWS, lane), 1, lambda k: (column, first + k))
    for _ in range(planes.shape[0])
  ]
  in_specs += [
    plgpu.BlockSpec((None, leaf.shape[1], ROWS), block_of) for leaf in per_block
  ]

  def buffers(refs) -> _Buffers:
    xs, refs = refs[:lanes], refs[lanes:]
    codes, leaves = refs[: planes.shape[0]], list(refs[planes.shape[0] :])
    scale = leaves.pop(0) if tile.has_scale else None
    return _Buffers(xs, codes, scale, leaves[0] if leaves else None)

  def run(step, carry=None):
    def on_refs(_, *refs):
      if carry is None:
        return step(buffers(refs))
      *refs, total = refs
      return step(buffers(refs), total)

    return plgpu.emit_pipeline(
      on_refs,
      grid=(tile.steps,),
      in_specs=in_specs,
      max_concurrent_steps=min(tile.config.stages, tile.steps),
      init_carry=carry,
    )(
      *[x] * lanes,
      *[planes.at[b] for b in range(planes.shape[0])],
      *per_block,
    )

  return run


def _accumulator(tile: _Tile):
  return _mosaic_gpu.accumulator((ROWS, tile.config.bm), jnp.float32)


def _sum_decoded(tile: _Tile, pipeline, acc):
  """'pre': the sum of products with weights that have their scale."""

  def step(buffers: _Buffers):
    codes, scale, zero = buffers.codes, buffers.scale, buffers.zero
    weights = _weights(codes, scale, zero, tile.spec, tile.lane)
    _multiply(acc, weights, buffers.xs)
    plgpu.commit_smem()  # what threads read is about to be overwritten

  pipeline(step)
  return acc[...]


def _sum_by_block(tile: _Tile, pipeline):
  """'post': the sum of the products of blocks, each times its scale."""
  spec, accumulator = tile.spec, _accumulator(tile)

  def step(buffers: _Buffers, total):
    xs, scale = buffers.xs, buffers.scale
    weights = _weights(buffers.codes, None, buffers.zero, spec, tile.lane)
    per_block = tile.lanes // scale.shape[0]  # lanes in a block
    for g in range(scale.shape[0]):
      lanes = slice(g * per_block, (g + 1) * per_block)

      def block_sum(acc, lanes=lanes):
        _multiply(acc, weights[lanes], xs[lanes])
        return acc[...]

      # A block has an accumulator of its own, which its scale then multiplies.
      part = pl.run_scoped(block_sum, accumulator)
      stored = _mosaic_gpu.load(scale.at[g], plgpu.Layout.WGMMA.reduce(1))
      for factor in block.scale_factors(stored, spec.scale):
        part = part * _along_rows(factor, part.shape)
      total = total + part
    plgpu.commit_smem()  # as in 'pre'
    return total

  zeros = jnp.zeros((ROWS, tile.config.bm), jnp.float32)
  return pipeline(step, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))


def _multiply(acc, weights, xs):
  for weight, x in zip(weights, xs, strict=True):
    plgpu.wgmma(acc, weight, _mosaic_gpu.transpose(x))
  plgpu.wgmma_wait(0)


def _tiled(shape, itemsize: int, index_map):
  """A block in the swizzled layout that WGMMA and its loads take."""
  swizzle = min(128, shape[1] * itemsize)
  transforms = (
    plgpu.TilingTransform((8, swizzle // itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.BlockSpec(shape, index_map, transforms=transforms)


def _weights(planes, scale, zero, spec: block.Blocked, lane: int):
  """Decoded lanes of a tile in bfloat16, (64, lane) in registers."""
  stream = []
  for ref in planes:
    codes = _mosaic_gpu.load(ref, plgpu.Layout.WGMMA_UPCAST_2X)
    stream.append(plgpu.layout_cast(codes, plgpu.Layout.WGMMA))
  lanes = packing.planes_to_lanes(stream, spec.bits)
  tile = lane * len(lanes)
  out = []
  for j, code in enumerate(lanes):
    value = codec.decode_in_kernel(code, spec.element)
    rows = range(j * lane, (j + 1) * lane)
    if zero is not None:
      value = value - _expand(zero, lambda z: (_float(z),), rows, tile)[0]
    if scale is not None:
      factors = functools.partial(block.scale_factors, scale=spec.scale)
      for factor in _expand(scale, factors, rows, tile):
        value = value * factor
    out.append(value.astype(jnp.bfloat16))
  return out


def _expand(ref, numbers, rows: range, tile: int):
  """Arrays (64, rows) of the numbers of their blocks, from (blocks, 64)."""
  size = tile // ref.shape[0]
  runs = []
  for g in range(rows.start // size, -(-rows.stop // size)):
    stored = _mosaic_gpu.load(ref.at[g], plgpu.Layout.WGMMA.reduce(1))
    shape = (ROWS, min(size, len(rows)))
    runs.append([_along_rows(v, shape) for v in numbers(stored)])
  return [_concatenate(parts) for parts in zip(*runs, strict=True)]


def _along_rows(v, shape):
  v = lax.broadcast_in_dim(v, shape, (0,))
  return plgpu.layout_cast(v, plgpu.Layout.WGMMA)


def _concatenate(parts):
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _float(code):
  return code.astype(jnp.int32).astype(jnp.float32)


def _round_up(n: int, unit: int) -> int:
  return -(-n // unit) * unit
