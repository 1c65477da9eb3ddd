"""Tile sizes and schedules.

Everything that the order of sums depends on follows from the weight alone; only
`bm` follows from the rows of x. So a row of the result does not depend on the
rows beside it.
"""

import dataclasses
import math

import jax.numpy as jnp

from lowbit_pallas.arith import block, packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import prepack

VMEM_BYTES = 12 << 20  # of the 16 MiB of v5e; the rest is the compiler's
SMEM_BYTES = 220 << 10  # of the 227 KiB of a block on H100
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


def heuristic(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype,
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
  dtype,
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
  columns, steps = _round_up(n, 64) // 64, max(-(-k // tile), 1)
  splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and s * columns <= 264]
  split_k = splits[-1] if splits else 1
  # 'post' holds two results in registers.
  most = 128 if schedule == 'post' and spec.block else 256
  bm = _round_up(-(-m // -(-max(m, 1) // most)), 8)
  config = Config(bm, 64, tile, schedule, split_k, stages=4)
  while smem_bytes(config, spec) > SMEM_BYTES and config.stages > 2:
    config = dataclasses.replace(config, stages=config.stages - 1)
  while smem_bytes(config, spec) > SMEM_BYTES:
    config = dataclasses.replace(config, bm=config.bm // 16 * 8)
  return config


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


def vmem_bytes(config: Config, spec: Blocked, dtype) -> int:
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
