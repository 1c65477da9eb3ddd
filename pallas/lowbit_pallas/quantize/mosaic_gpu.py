"""Quantization on Hopper GPUs.

A warpgroup takes 64 rows by `columns` of x, loaded by one bulk copy per unit of
64 or 128 columns. A unit is worked on block by block: rows of a block lie in
groups of four threads, which have its maximum after a few shuffles. Codes of
neighbouring columns sit in different threads; the matrix unit brings them
together, as in `arith.packing.products`: bytes are products of codes with a
constant matrix, which is exact. Scales are written one block after the other
and transposed outside.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.arith import (
  bits as fb,
  block,
  codec,
  hadamard,
  hashing,
  packing,
  scale as exact,
)
from lowbit_pallas.arith.hashing import Origin
from lowbit_pallas.quantize import mosaic_gpu_config as _config, task as _task
from lowbit_pallas.quantize.mosaic_gpu_config import (
  LANES,
  Config,
  choose,
  heuristic as heuristic,
)
from lowbit_pallas.quantize.task import Task

ROWS = 64
_WGMMA = plgpu.Layout.WGMMA


def why_not(
  shape: Sequence[int],
  dtype: DTypeLike,
  task: Task,
  config: Config | None = None,
) -> str | None:
  """Why the kernel refuses x, or None.

  Args:
    shape: shape of x.
    dtype: dtype of x.
    task: what to do.
    config: tile sizes; None for those of `choose`.
  """
  reason = _task.why_not(shape, dtype, task)
  if reason is None and config is not None:
    reason = _config.why_not(config)
  columns = LANES if config is None else config.columns
  return reason or _mosaic_gpu.why_not_grid(_grid(shape, columns))


def run(
  x: jax.Array,
  task: Task,
  *,
  key_words: jax.Array | None = None,
  origin: Origin | None = None,
  tensor_scale: jax.Array | None = None,
  signs: jax.Array | None = None,
  config: Config | None = None,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Quantizes and packs, see `reference.run` for arguments and results.

  Args:
    config: tile sizes; None for those of `choose`.
    interpret: False, or `InterpretGPUParams`.

  Raises:
    NotImplementedError: with the reason of `why_not`.
  """
  rows, cols = x.shape
  if not rows or not cols:
    return _task.nothing(x.shape, task)
  spec = task.spec
  config = config or choose(x.shape, x.dtype.itemsize, task)
  if reason := why_not(x.shape, x.dtype, task, config):
    raise NotImplementedError(reason)
  # Bulk copies need whole 8x8 tiles and rows of whole 16 bytes, packed ones
  # included; what they read beyond the array is zero.
  x = jnp.pad(x, ((0, -rows % 8), (0, -cols % LANES)))
  operands = {'x': x}
  if task.rounding == 'stochastic':
    operands['words'] = _task.words(key_words, origin)
  if tensor_scale is not None:
    operands['tensor_scale'] = _task.scalar(tensor_scale)
  if signs is not None:
    operands['signs'] = jnp.pad(signs.astype(jnp.float32), (0, -cols % LANES))
  width = max(task.spec.block, task.rotation)
  unit = max(64, task.spec.block)
  for name, matrix in _matrices(task, width, unit).items():
    operands[name] = jnp.asarray(matrix, jnp.bfloat16)
  full = None if origin is None else tuple(origin[1])
  tile = _Tile(task, config.columns, width, unit, cols, full, rows)
  grid = _grid(x.shape, config.columns)
  padded_rows = grid[0] * ROWS
  packed, scale = _mosaic_gpu.kernel(
    functools.partial(_kernel, tile, tuple(operands)),
    out_type=[
      jax.ShapeDtypeStruct((len(x), x.shape[1] * spec.bits // 8), jnp.uint8),
      jax.ShapeDtypeStruct(
        (x.shape[1] // spec.block, padded_rows), _task.scale_dtype(task)
      ),
    ],
    grid=grid,
    grid_names=('i', 'j'),
    scratch_types=_scratch(tile, operands),
    interpret=interpret,
  )(*operands.values())
  packed = packed[:rows, : _task.packed_columns(cols, task)]
  return packed, scale[: _task.scale_columns(cols, task), :rows].T


def _grid(shape, columns: int) -> tuple[int, int]:
  """Tiles along both axes."""
  return -(-shape[0] // ROWS), -(-shape[1] // columns)


class _Tile(NamedTuple):
  """What a warpgroup works on.

  Attributes:
    task: what to do.
    columns: columns of the tile.
    width: columns that are rotated together, or a block.
    unit: columns that are packed at a time.
    cols: columns of x without padding.
    full: shape of the whole array if x is a slice of it.
    rows: rows of x.
  """

  task: Task
  columns: int
  width: int
  unit: int
  cols: int
  full: tuple[int, ...] | None
  rows: int

  @property
  def copies(self) -> int:
    """How many bulk copies bring the tile."""
    return self.columns // max(64, self.width)

  @property
  def step(self) -> int:
    """Columns of x that are in registers at a time."""
    return min(32, self.width) if self.task.rotation else self.width


def _matrices(task: Task, width: int, unit: int) -> dict[str, np.ndarray]:
  """Constant right sides of products, transposed: (n, k)."""
  out = {}
  bits = task.spec.bits
  if bits < 8:
    low, carry = packing.byte_matrices(bits, unit)
    out['low'] = low.T
    if carry is not None:
      out['carry'] = carry.T
  if task.rotation:
    eye = np.eye(width // task.rotation, dtype=np.float32)
    out['matrix'] = np.kron(eye, hadamard.hadamard_matrix(task.rotation))
  return out


def _shared(shape, dtype, width: int):
  """Shared memory whose slices of `width` columns are conflict-free."""
  size = jnp.dtype(dtype).itemsize
  columns = min(width, 128 // size)
  transforms = (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(columns * size),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def _scratch(tile: _Tile, operands) -> dict:
  spec = tile.task.spec
  units = tile.copies
  x = operands['x'].dtype
  out = {
    'x': _shared((units, ROWS, tile.columns // units), x, tile.step),
    'packed': plgpu.SMEM((ROWS, tile.columns * spec.bits // 8), jnp.uint8),
    'scale': plgpu.SMEM(
      (tile.columns // spec.block, ROWS), _task.scale_dtype(tile.task)
    ),
    'loaded': plgpu.Barrier(num_arrivals=1, num_barriers=units),
  }
  constants = 0
  for name in ('low', 'carry', 'matrix', 'signs'):
    if name not in operands:
      continue
    constants += 1
    shape = operands[name].shape
    if name == 'signs':
      out[name] = plgpu.SMEM((tile.columns,), jnp.float32)
    else:
      narrow = tile.step if name == 'matrix' else spec.block
      out[name] = _shared(shape, jnp.bfloat16, narrow)
  if tile.task.rotation:
    shape = ROWS, tile.columns
    out['rotated'] = _shared(shape, jnp.float32, spec.block)
  if constants:
    out['ready'] = plgpu.Barrier(num_arrivals=constants)
  return out


def _kernel(tile: _Tile, names, *refs, **scratch):
  """Quantizes 64 rows by `columns`."""
  inputs = dict(zip(names, refs, strict=False))
  packed_ref, scale_ref = refs[len(names) :]
  task, spec = tile.task, tile.task.spec
  top = jax.lax.axis_index('i') * ROWS
  left = jax.lax.axis_index('j') * tile.columns
  # All copies start at once: constants, and x unit by unit, so that the first
  # unit is worked on while the others are on their way.
  for name in ('low', 'carry', 'matrix', 'signs'):
    if name in scratch:
      source = inputs[name]
      if name == 'signs':
        source = source.at[pl.ds(left, tile.columns)]
      plgpu.copy_gmem_to_smem(source, scratch[name], scratch['ready'])
  size = tile.columns // tile.copies
  for u in range(tile.copies):
    plgpu.copy_gmem_to_smem(
      inputs['x'].at[pl.ds(top, ROWS), pl.ds(left + u * size, size)],
      scratch['x'].at[u],
      scratch['loaded'].at[u],
    )
  if 'ready' in scratch:
    plgpu.barrier_wait(scratch['ready'])
  tensor_scale = None
  if 'tensor_scale' in inputs:
    tensor_scale = inputs['tensor_scale'][0]
  # A rotation mixes columns of several blocks, so all of them come before.
  if task.rotation:

    @pl.loop(0, tile.copies)
    def _(u):
      plgpu.barrier_wait(scratch['loaded'].at[u])
      for start in range(0, size, tile.width):
        _rotate(tile, u, start, scratch)

    plgpu.commit_smem()

  # Scales and bytes, a unit at a time, into shared memory.
  @pl.loop(0, tile.columns // tile.unit)
  def _(u):
    if not task.rotation:
      plgpu.barrier_wait(scratch['loaded'].at[u])
    _unit(tile, u, top, left, tensor_scale, inputs, scratch)

  # Both results leave by bulk copies.
  plgpu.commit_smem()
  size = tile.columns * spec.bits // 8
  plgpu.copy_smem_to_gmem(
    scratch['packed'],
    packed_ref.at[
      pl.ds(top, ROWS), pl.ds(jax.lax.axis_index('j') * size, size)
    ],
  )
  count = tile.columns // spec.block
  plgpu.copy_smem_to_gmem(
    scratch['scale'],
    scale_ref.at[
      pl.ds(jax.lax.axis_index('j') * count, count), pl.ds(top, ROWS)
    ],
  )
  plgpu.wait_smem_to_gmem(0)


def _unit(tile, u, top, left, tensor_scale, inputs, scratch):
  """Quantizes and packs the columns of one unit."""
  task, spec = tile.task, tile.task.spec
  size = tile.unit * spec.bits // 8

  def codes_of(b):
    if task.rotation:
      column = u * tile.unit + b * spec.block
      x_ref = scratch['rotated'].at[:, pl.ds(column, spec.block)]
    else:
      x_ref = scratch['x'].at[u, :, pl.ds(b * spec.block, spec.block)]
    x = _mosaic_gpu.load(x_ref, _WGMMA).astype(jnp.float32)
    amax = jnp.max(exact.magnitude(x), 1)
    scale = block.stored_scale(fb.to_bits(amax), spec, task.rule, tensor_scale)
    index = u * (tile.unit // spec.block) + b
    stored = scratch['scale']
    stored[index] = scale.astype(stored.dtype)
    inverse = block.inverse_factors(
      scale, spec.scale, codec.largest(spec.element), tensor_scale
    )
    inverse = tuple(jax.lax.broadcast_in_dim(f, x.shape, (0,)) for f in inverse)
    column = left + u * tile.unit + b * spec.block
    random = _random(tile, top, column, inputs)
    rule = codec.rule(task.rounding, random, task.random_bits)
    return codec.encode(
      block.scaled(x, inverse), spec.element, rule, dtype=jnp.int32
    )

  # Codes of 8 bits are bytes already; narrower ones meet in the matrix unit.
  blocks = range(tile.unit // spec.block)
  if spec.bits == 8:
    for b in blocks:
      column = u * tile.unit + b * spec.block
      scratch['packed'][:, pl.ds(column, spec.block)] = codes_of(b).astype(
        jnp.uint8
      )
    return

  packed = _sum_of_products(
    (ROWS, size),
    (
      pair
      for b in blocks
      for pair in _packing_products(codes_of(b), b * spec.block, spec, scratch)
    ),
  )
  packed = fb.nearest_integer(packed).astype(jnp.uint8)
  scratch['packed'][:, pl.ds(u * size, size)] = packed


def _packing_products(codes, start: int, spec, scratch):
  """Pairs whose products are the parts of bytes from columns at `start`."""
  parts = {'low': codes}
  if 'carry' in scratch:
    column = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    mask = packing.low_mask(plgpu.layout_cast(column, _WGMMA), spec.bits)
    parts = {'low': codes & mask, 'carry': codes & ~mask}
  for name, part in parts.items():
    matrix = scratch[name].at[:, pl.ds(start, spec.block)]
    yield part.astype(jnp.float32).astype(jnp.bfloat16), matrix


def _sum_of_products(shape, pairs):
  """Sum of a b^T in float32 for bfloat16 a in registers and b in shared memory.

  `pairs` is consumed inside the scope of the accumulator.
  """

  def add(acc):
    for a, b in pairs:
      plgpu.wgmma(acc, a, _mosaic_gpu.transpose(b))
      plgpu.wgmma_wait(0)
    return acc[...]

  return pl.run_scoped(add, _mosaic_gpu.accumulator(shape, jnp.float32))


def _rotate(tile, u, start: int, scratch):
  """Rotates `width` columns of copy u into shared memory."""
  column = u * (tile.columns // tile.copies) + start

  def pairs():
    for k in range(0, tile.width, tile.step):
      step = pl.ds(start + k, tile.step)
      x_ref = scratch['x'].at[u, :, step]
      x = _mosaic_gpu.load(x_ref, _WGMMA).astype(jnp.float32)
      if 'signs' in scratch:
        signs = _mosaic_gpu.load(
          scratch['signs'].at[pl.ds(column + k, tile.step)], _WGMMA.reduce(0)
        )
        x = x * jax.lax.broadcast_in_dim(signs, x.shape, (1,))
      matrix = scratch['matrix'].at[:, pl.ds(k, tile.step)]
      for part in fb.bfloat16_parts(x):
        yield part, matrix

  y = _sum_of_products((ROWS, tile.width), pairs())
  scratch['rotated'][:, pl.ds(column, tile.width)] = (
    y * tile.task.rotation**-0.5
  )


def _random(tile, top, column, inputs):
  """Random bits of a block by the index of its elements in the whole array."""
  if tile.task.rounding != 'stochastic':
    return None
  words = inputs['words']
  shape = ROWS, tile.task.spec.block
  start = (
    words[2] + top.astype(jnp.uint32),
    words[3] + column.astype(jnp.uint32),
  )
  index = hashing.element_index(
    shape, (start, tile.full or (tile.rows, tile.cols))
  )
  bits = hashing.bits_of((words[0], words[1]), *index)
  if tile.cols % tile.task.spec.block:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    bits = jnp.where(lane < tile.cols - column, bits, jnp.uint32(0))
  return plgpu.layout_cast(bits, _WGMMA)
