"""Tile sizes and schedules.

Everything that the order of sums depends on follows from the weight alone; only
`bm` follows from the rows of x. So a row of the result does not depend on the
rows beside it.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from lowbit_pallas import _tuned
from lowbit_pallas.arith import block, packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import prepack

VMEM_BYTES = 12 << 20  # of the 16 MiB of v5e; the rest is the compiler's
SMEM_BYTES = 220 << 10  # of the 227 KiB of a block on H100
COLUMNS = 64  # of the weight in a tile on Hopper: the rows of a WGMMA
PARTS = {'bfloat16': 1, 'float16': 2, 'float32': 3}


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a kernel.

  Attributes:
    bm: rows of x in a tile.
    bn: columns of the weight in a tile.
    tile: rows of K in a tile, as in `prepack`.
    schedule: 'pre' or 'post'.
    split_k: parts of K that are summed apart; 1 on TPU.
    stages: tiles in flight; 2 on TPU.
  """

  bm: int
  bn: int
  tile: int
  schedule: str
  split_k: int = 1
  stages: int = 2


def key(n: int, k: int, spec: Blocked, dtype: DTypeLike, schedule: str) -> str:
  """What a tuned entry is for."""
  name = jnp.dtype(dtype).name
  return f'n={n} k={k} {_tuned.operand(spec)} {name} {schedule}'


def why_not_tpu(config: Config) -> str | None:
  """Why the TPU kernel cannot use these sizes, or None."""
  if config.split_k != 1:
    return f'config.split_k={config.split_k}; the TPU kernel sums K in one part'
  if config.bm % 16 or config.bn % 128:
    return (
      f'config.bm={config.bm}, config.bn={config.bn}: not multiples of 16, 128'
    )
  return None


def why_not_gpu(config: Config, steps: int) -> str | None:
  """Why the GPU kernel cannot use these sizes for `steps` tiles, or None."""
  if config.bn != COLUMNS:
    return f'config.bn={config.bn}, not {COLUMNS}'
  if config.bm % 8 or not 8 <= config.bm <= 256:
    return f'config.bm={config.bm} is not a multiple of 8 from 8 to 256'
  if steps % config.split_k:
    return f'config.split_k={config.split_k} does not divide {steps} tiles'
  if config.stages < 2:
    return f'config.stages={config.stages}: one is filled while another is read'
  return None


def tpu(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype: DTypeLike,
  *,
  tile: int | None = None,
  schedule: str | None = None,
) -> Config:
  """The tuned sizes of this device, or those of `heuristic`; arguments alike.

  An entry has `bm` and `bn`, `bm` for any number of rows.
  """
  plain = heuristic(m, n, k, spec, dtype, tile=tile, schedule=schedule)
  rows = _round_up(m * PARTS[jnp.dtype(dtype).name], 16)

  def tuned(bm: int, bn: int):
    config = dataclasses.replace(plain, bm=bm, bn=bn)
    if why := why_not_tpu(config):
      raise ValueError(why)
    if vmem_bytes(config, spec, dtype) > VMEM_BYTES:
      raise ValueError(f'{config} takes over {VMEM_BYTES} bytes')
    return dataclasses.replace(config, bm=min(bm, rows))

  entry = key(n, k, spec, dtype, plain.schedule)
  return _tuned.find('wq_matmul', 'tpu', entry, tuned) or plain


def mosaic_gpu(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype: DTypeLike,
  *,
  tile: int | None = None,
  schedule: str | None = None,
) -> Config:
  """The tuned sizes of this device, or those of `gpu_heuristic`.

  Arguments as `heuristic`. An entry has `bm`, the most rows in a tile, `stages`
  and `split_k`.
  """
  plain = gpu_heuristic(m, n, k, spec, dtype, tile=tile, schedule=schedule)
  rows = m * PARTS[jnp.dtype(dtype).name]

  def tuned(bm: int, stages: int, split_k: int):
    config = dataclasses.replace(plain, bm=bm, stages=stages, split_k=split_k)
    if why := why_not_gpu(config, -(-k // plain.tile)):
      raise ValueError(why)
    if bm > _most_rows(plain.schedule, spec):
      raise ValueError(f'{bm=} needs more registers than there are')
    if smem_bytes(config, spec) > SMEM_BYTES:
      raise ValueError(f'{config} takes over {SMEM_BYTES} bytes')
    return dataclasses.replace(config, bm=_even_tiles(rows, bm))

  entry = key(n, k, spec, dtype, plain.schedule)
  return _tuned.find('wq_matmul', 'mosaic_gpu', entry, tuned) or plain


def heuristic(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype: DTypeLike,
  *,
  tile: int | None = None,
  schedule: str | None = None,
) -> Config:
  """A configuration for (m, k) x (k, n) on TPU.

  Args:
    m: rows of x.
    n: columns of the weight.
    k: rows of the weight.
    spec: what codes and scales stand for.
    dtype: dtype of x.
    tile: rows of K in a tile, where the weight has them already.
    schedule: 'pre' or 'post', where it is given.
  """
  m *= PARTS[jnp.dtype(dtype).name]
  tile = tpu_tile(k, n, spec) if tile is None else tile
  schedule = heuristic_schedule(spec) if schedule is None else schedule
  bm, bn = min(512, _round_up(m, 16)), min(512, _round_up(n, 128))
  config = Config(bm, bn, tile, schedule)
  while vmem_bytes(config, spec, dtype) > VMEM_BYTES and config.bn > 128:
    config = dataclasses.replace(config, bn=_round_up(config.bn // 2, 128))
  return config


def tpu_tile(k: int, n: int, spec: Blocked) -> int:
  """Rows of K in a tile, a function of the weight alone.

  Raises:
    ValueError: where no tile fits the blocks.
  """
  del n
  unit = math.lcm(128, 32 * packing.codes_per_group(spec.bits))
  return _tile(k, spec, unit, 512)


def gpu_heuristic(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype: DTypeLike,
  *,
  tile: int | None = None,
  schedule: str | None = None,
) -> Config:
  """A configuration for (m, k) x (k, n) on Hopper; arguments as `heuristic`.

  K is split until there are about two blocks for each of 132 processors.
  """
  m *= PARTS[jnp.dtype(dtype).name]
  tile = gpu_tile(k, n, spec) if tile is None else tile
  schedule = heuristic_schedule(spec) if schedule is None else schedule
  columns, steps = -(-n // COLUMNS) or 1, max(-(-k // tile), 1)
  splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and s * columns <= 264]
  split_k = splits[-1] if splits else 1
  bm = _even_tiles(m, _most_rows(schedule, spec))
  config = Config(bm, COLUMNS, tile, schedule, split_k, stages=4)
  while smem_bytes(config, spec) > SMEM_BYTES and config.stages > 2:
    config = dataclasses.replace(config, stages=config.stages - 1)
  while smem_bytes(config, spec) > SMEM_BYTES:
    config = dataclasses.replace(config, bm=config.bm // 16 * 8)
  return config


def _most_rows(schedule: str, spec: Blocked) -> int:
  """Rows of a tile on Hopper: 'post' holds two results in registers."""
  return 128 if schedule == 'post' and spec.block else 256


def _even_tiles(rows: int, most: int) -> int:
  """Rows of a tile, a multiple of 8, for as few tiles of `most` as will do."""
  return _round_up(-(-rows // -(-max(rows, 1) // most)), 8)


def gpu_tile(k: int, n: int, spec: Blocked) -> int:
  """Rows of K in a tile on Hopper: lanes of 64.

  Raises:
    ValueError: where it does not fit the blocks.
  """
  del k, n
  tile = 64 * packing.codes_per_group(spec.bits)
  refusal = prepack.why_not(spec, tile)
  if refusal is not None:
    raise ValueError(refusal)
  return tile


def smem_bytes(config: Config, spec: Blocked) -> int:
  """Bytes of SMEM: the ring of operands, and the result."""
  bm, bn, tile = config.bm, config.bn, config.tile
  codes = bn * tile * spec.bits // 8
  scales = 2 * 4 * bn * max(1, tile // spec.block) if spec.block else 0
  return config.stages * (2 * bm * tile + codes + scales) + 4 * bm * bn


def _tile(k: int, spec: Blocked, unit: int, target: int) -> int:
  """The smallest tile of whole units that holds k or `target` rows."""
  limit = 4 * max(unit, target)
  tiles = range(unit, limit + 1, unit)
  fits = [tile for tile in tiles if prepack.why_not(spec, tile) is None]
  if not fits:
    raise ValueError(
      f'blocks of {spec.block} and codes of {spec.bits} bits fit no tile of'
      f' {unit}, {2 * unit}, ... up to {limit} rows'
    )
  enough = [tile for tile in fits if tile >= min(k, target)]
  return enough[0] if enough else fits[-1]


def heuristic_schedule(spec: Blocked) -> str:
  """'post' where it costs nothing and keeps float scales unrounded."""
  if not spec.block or block.is_exponent(spec.scale):
    return 'pre'
  return 'post' if spec.block % 128 == 0 else 'pre'


def vmem_bytes(config: Config, spec: Blocked, dtype: DTypeLike) -> int:
  """Bytes of VMEM: two buffers of each operand, the sums, a decoded tile."""
  bm, bn, tile = config.bm, config.bn, config.tile
  wide = jnp.dtype(dtype).itemsize
  x = bm * tile * wide
  codes = tile * bn * spec.bits // 8
  scales = 2 * 4 * bn * max(8, tile // spec.block) if spec.block else 0
  out = bm * bn * 4
  return 2 * (x + codes + scales + out) + out + tile * bn * (4 + wide)


def _round_up(n: int, unit: int) -> int:
  return max(-(-n // unit), 1) * unit
