"""Quantization on TPUs.

A tile is worked on in pieces of a few rows by `chunk(bits)` columns. The
maximum of a block is a reduction over masked lanes, whose result every lane
has; scales are collected into 128 lanes of blocks. Lanes cannot be shuffled
cheaply, so bytes are products of codes with constant matrices, which is exact
(`arith.packing.products`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

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
from lowbit_pallas.quantize import task as _task, tpu_config as _config
from lowbit_pallas.quantize.task import Task
from lowbit_pallas.quantize.tpu_config import (
  LANES,
  Config,
  choose,
  heuristic as heuristic,
)

# TPUs have no float16; kernels read its bits.
_FLOAT16 = codec.minifloat(5, 10, 'ieee')


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
  if reason is not None or config is None:
    return reason
  return _config.why_not(config, shape, task)


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
    interpret: False, or `pltpu.InterpretParams`.

  Raises:
    NotImplementedError: with the reason of `why_not`.
  """
  rows, cols = x.shape
  if not rows or not cols:
    return _task.nothing(x.shape, task)
  config = config or choose(x.shape, x.dtype.itemsize, task)
  if reason := why_not(x.shape, x.dtype, task, config):
    raise NotImplementedError(reason)
  operands = _operands(x, task, key_words, origin, tensor_scale, signs)
  # Several tiles in a row have whole groups of 128 scales each.
  width = -(-config.bn // (LANES * task.spec.block)) * LANES
  grid = pl.cdiv(rows, config.bm), pl.cdiv(cols, config.bn)
  full = None if origin is None else tuple(origin[1])
  packed, scale = pl.pallas_call(
    functools.partial(_kernel, task, config, x.shape, full, tuple(operands)),
    grid=grid,
    in_specs=[_block_spec(name, a, config) for name, a in operands.items()],
    out_specs=[
      pl.BlockSpec((config.bm, config.bn * task.spec.bits // 8), _tile),
      pl.BlockSpec((config.bm, width), _tile),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((rows, _task.packed_columns(cols, task)), jnp.uint8),
      jax.ShapeDtypeStruct((rows, grid[1] * width), _task.scale_dtype(task)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel')
    ),
    interpret=interpret,
    name='quantize',
  )(*operands.values())
  return packed, scale[:, : _task.scale_columns(cols, task)]


def _operands(x, task: Task, key_words, origin, tensor_scale, signs) -> dict:
  """What the kernel reads, by name."""
  spec = task.spec
  if x.dtype == jnp.float16:
    x = lax.bitcast_convert_type(x, jnp.uint16)
  out = {'x': x}
  if task.rounding == 'stochastic':
    out['words'] = _task.words(key_words, origin)
  if tensor_scale is not None:
    out['tensor_scale'] = _task.scalar(tensor_scale)
  spread = _spread_matrix(_config.chunk(spec.bits), spec.block)
  out['spread'] = jnp.asarray(spread, jnp.bfloat16)
  if spec.bits < 8:
    plan = packing.products(spec.bits)
    out['pack'] = jnp.asarray(plan.matrices, jnp.bfloat16)
    if plan.masks is not None:
      out['masks'] = jnp.asarray(plan.masks)
  if task.rotation:
    out['matrix'] = jnp.asarray(_matrix(task.rotation))
    out['within'] = jnp.asarray(_within(task.rotation), jnp.bfloat16)
    if signs is not None:
      out['signs'] = signs.astype(jnp.float32).reshape(1, -1)
  return out


def _tile(i, j):
  return i, j


def _block_spec(name: str, a, config: Config) -> pl.BlockSpec:
  if name in ('words', 'tensor_scale'):
    return pl.BlockSpec(memory_space=pltpu.SMEM)
  if name == 'x':
    return pl.BlockSpec((config.bm, config.bn), _tile)
  if name == 'signs':
    return pl.BlockSpec((1, config.bn), lambda i, j: (0, j))
  return pl.BlockSpec(a.shape, lambda i, j: (0,) * a.ndim)


def _matrix(order: int) -> np.ndarray:
  """The Hadamard matrices of the blocks in 128 lanes."""
  return np.kron(
    np.eye(LANES // order, dtype=np.float32), hadamard.hadamard_matrix(order)
  )


def _spread_matrix(width: int, size: int) -> np.ndarray:
  """One where a lane is the number of the block of a column."""
  return np.equal.outer(np.arange(LANES), np.arange(width) // size)


def _within(order: int) -> np.ndarray:
  """One where two of 128 lanes are in the same block."""
  lane = np.arange(LANES) // order
  return (lane[:, None] == lane).astype(np.float32)


def _kernel(task, config, shape, full, names, *refs):
  """Quantizes a tile, some rows and `chunk` columns at a time."""
  inputs = dict(zip(names, refs, strict=False))
  packed_ref, scale_ref = refs[len(names) :]
  spec = task.spec
  chunk = _config.chunk(spec.bits)
  span = LANES * spec.block  # columns whose scales fill 128 lanes
  scale_dtype = jnp.float32 if spec.scale is None else jnp.int32
  top, left = pl.program_id(0) * config.bm, pl.program_id(1) * config.bn
  tensor_scale = None
  if 'tensor_scale' in inputs:
    tensor_scale = inputs['tensor_scale'][0]

  def band(i, _):
    row = pl.ds(pl.multiple_of(i * config.rows, config.rows), config.rows)

    def piece(start, j, collected):
      col = pl.multiple_of(start + j * chunk, chunk)
      # The maximum of each block, its scale, its codes, and their bytes.
      x = _read(task, shape, inputs, row, col, left, chunk)
      scale = block.stored_scale(
        fb.to_bits(_block_max(x, spec.block)), spec, task.rule, tensor_scale
      )
      random = _random(task, shape, full, inputs, top, left, i, col, x.shape)
      codes = _codes(
        task, x, scale, random, tensor_scale, inputs['spread'][...]
      )
      size = chunk * spec.bits // 8
      out = pl.multiple_of(start * spec.bits // 8 + j * size, size)
      packed_ref[row, pl.ds(out, size)] = _pack(codes, spec.bits, inputs)
      return _collect(collected, scale, j * (chunk // spec.block))

    # Scales are collected in registers until they fill the lanes of a store.
    for k, start in enumerate(range(0, config.bn, span)):
      count = min(span, config.bn - start) // chunk
      scale = lax.fori_loop(
        0,
        count,
        functools.partial(piece, start),
        jnp.zeros((config.rows, LANES), scale_dtype),
      )
      scale_ref[row, k * LANES : (k + 1) * LANES] = scale.astype(
        scale_ref.dtype
      )

  lax.fori_loop(0, config.bm // config.rows, band, None)


def _lane(shape):
  return lax.broadcasted_iota(jnp.int32, shape, 1)


def _read(task, shape, inputs, row, col, left, width):
  """A piece of x in float32, rotated, with zeros beyond the last column."""
  x = inputs['x'][row, pl.ds(col, width)]
  if x.dtype == jnp.uint16:
    x = codec.decode_float(x, _FLOAT16)
  x = x.astype(jnp.float32)
  if shape[1] % width:
    x = jnp.where(_lane(x.shape) < shape[1] - left - col, x, 0.0)
  if not task.rotation:
    return x
  if 'signs' in inputs:
    signs = inputs['signs'][:, pl.ds(col, width)]
    if shape[1] % width:
      signs = jnp.where(_lane(signs.shape) < shape[1] - left - col, signs, 0.0)
    x = x * signs
  matrix, within = inputs['matrix'][...], inputs['within'][...]
  parts = [
    _rotate(x[:, s : s + LANES], matrix, within, task.rotation**-0.5)
    for s in range(0, width, LANES)
  ]
  return jnp.concatenate(parts, 1)


def _rotate(x, matrix, within, scale: float):
  """The transform of blocks in 128 lanes; NaN where a block is not finite."""
  finite = jnp.abs(x) < jnp.inf
  y = lax.dot(
    jnp.where(finite, x, 0.0),
    matrix,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  poison = jnp.where(finite, 0.0, 1.0).astype(jnp.bfloat16)
  bad = lax.dot(poison, within, preferred_element_type=jnp.float32)
  return jnp.where(bad > 0.0, jnp.nan, y * scale)


def _groups(width: int, size: int):
  """(block, its 128 lanes, its first lane there) of each block in `width`."""
  for b in range(width // size):
    yield b, b * size // LANES, b * size % LANES


def _block_max(x, size: int):
  """max |x| of block b in lane b of 128, zero beyond."""
  out = jnp.zeros((x.shape[0], LANES), jnp.float32)
  lane = _lane(out.shape)
  for b, tile, start in _groups(x.shape[1], size):
    a = exact.magnitude(x[:, tile * LANES : (tile + 1) * LANES])
    if size < LANES:
      a = jnp.where((lane >= start) & (lane < start + size), a, 0.0)
    out = jnp.where(lane == b, jnp.max(a, 1, keepdims=True), out)
  return out


def _spread(codes, matrix):
  """Lane b of int32 `codes` of 8 bits in all lanes of block b: (rows, width).

  Products of integers that bfloat16 holds exactly with 0 and 1 are exact.
  """
  codes = codes.astype(jnp.float32).astype(jnp.bfloat16)
  codes = lax.dot(codes, matrix, preferred_element_type=jnp.float32)
  return fb.nearest_integer(codes)


def _spread_bits(values, matrix):
  """The same for any float32, NaN included, by the bytes of its bits."""
  bits = fb.to_bits(values)
  low, high = (
    _spread(half & 0xFF, matrix) | _spread(half & 0xFF00, matrix)
    for half in (bits, bits >> 16)
  )
  return fb.from_bits(high << 16 | low)


def _collect(collected, scale, first):
  """The first lanes of `scale` at lane `first` of `collected`."""
  moved = pltpu.roll(scale, first, 1)
  return jnp.where(_lane(moved.shape) < first, collected, moved)


def _random(task, shape, full, inputs, top, left, i, col, piece):
  """Random bits of a piece by the index of its elements in the whole array."""
  if task.rounding != 'stochastic':
    return None
  words = inputs['words']
  rows = piece[0]
  row = words[2] + (top + i * rows).astype(jnp.uint32)
  start = row, words[3] + (left + col).astype(jnp.uint32)
  index = hashing.element_index(piece, (start, full or shape))
  bits = hashing.bits_of((words[0], words[1]), *index)
  if shape[1] % task.spec.block:
    inside = _lane(piece) < shape[1] - left - col
    bits = jnp.where(inside, bits, jnp.uint32(0))
  return bits


def _codes(task, x, scale, random, tensor_scale, matrix):
  """int32 codes of a piece."""
  spec = task.spec
  largest = codec.largest(spec.element)
  if block.is_exponent(spec.scale):
    scale = _spread(scale, matrix)
    inverse = block.inverse_factors(scale, spec.scale, largest)
  else:
    inverse = block.inverse_factors(scale, spec.scale, largest, tensor_scale)
    inverse = tuple(_spread_bits(f, matrix) for f in inverse)
  rule = codec.rule(task.rounding, random, task.random_bits)
  return codec.encode(
    block.scaled(x, inverse), spec.element, rule, dtype=jnp.int32
  )


def _pack(codes, bits: int, inputs):
  """uint8 bytes of a piece."""
  if bits == 8:
    return codes.astype(jnp.uint8)
  plan = packing.products(bits)
  group = packing.codes_per_group(bits) * LANES
  parts = [
    _pack_group(codes[:, s : s + group], plan, inputs)
    for s in range(0, codes.shape[1], group)
  ]
  out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
  return out.astype(jnp.uint8)


def _pack_group(codes, plan, inputs):
  """int32 bytes of the fewest whole tiles."""
  codes = [codes[:, s : s + LANES] for s in range(0, codes.shape[1], LANES)]
  low, high = codes, []
  if plan.masks is not None:
    masks = inputs['masks']
    low = [c & masks[i : i + 1, :] for i, c in enumerate(codes)]
    high = [c - v for c, v in zip(codes, low, strict=True)]
  out = []
  for steps, carries in zip(plan.steps, plan.carries, strict=True):
    total = None
    for source, pairs in ((low, steps), (high, carries)):
      for i, k in pairs:
        factor = source[i].astype(jnp.float32).astype(jnp.bfloat16)
        part = lax.dot(
          factor, inputs['pack'][k], preferred_element_type=jnp.float32
        )
        total = part if total is None else total + part
    assert total is not None
    out.append(fb.nearest_integer(total))
  return out[0] if len(out) == 1 else jnp.concatenate(out, 1)
