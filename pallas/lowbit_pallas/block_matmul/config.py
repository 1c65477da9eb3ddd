"""Tile sizes of block_matmul and the memory that they take."""

import dataclasses
import math

from lowbit_pallas import _tuned
from lowbit_pallas.arith import packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul.reference import k_axes

# What a kernel may use of the vector memory by default; all TPUs since v5e
# give 16 MiB without asking.
VMEM_BYTES = 14 << 20
LANES = 128
SUBLANES_8BIT = 32


# Shared memory that one block may use on Hopper and Blackwell, less what
# barriers and alignment take.
SMEM_BYTES = (227 << 10) - 2048
SWIZZLE_BYTES = 128  # of K in a row of a shared memory tile
WGMMA_ROWS = 64
BLACKWELL_ROWS = 128


@dataclasses.dataclass(frozen=True)
class TpuConfig:
  """Tiles of the TPU kernel: (bm, bk) of lhs, (bk, bn) of rhs."""

  bm: int
  bn: int
  bk: int


def why_not_tpu(
  config: TpuConfig, m: int, n: int, lhs: Blocked, rhs: Blocked, layout: str
) -> str | None:
  """Why the TPU kernel cannot use these tiles, or None."""
  unit = k_unit(lhs, rhs, layout)
  if config.bk % unit:
    return f'bk={config.bk} is not a multiple of {unit}'
  for name, size, tile in (('bm', m, config.bm), ('bn', n, config.bn)):
    if tile % LANES and tile != size:
      return f'{name}={tile} is neither a multiple of {LANES} nor all {size}'
  for spec in (lhs, rhs):
    if spec.block and config.bk > spec.block * LANES:
      return f'bk={config.bk} has more than {LANES} blocks of {spec.block}'
  used = vmem_bytes(config, lhs, rhs)
  if used > VMEM_BYTES:
    return f'tiles {config} take {used} bytes of {VMEM_BYTES}'
  return None


def k_unit(lhs: Blocked, rhs: Blocked, layout: str) -> int:
  """What bk is a multiple of: whole registers in each lane, whole blocks."""
  lk, rk = k_axes(layout)
  units = []
  for spec, minor in ((lhs, lk == 1), (rhs, rk == 1)):
    width = LANES if minor else SUBLANES_8BIT
    units += [width * packing.codes_per_group(spec.bits), spec.block or 1]
  return math.lcm(*units)


def vmem_bytes(config: TpuConfig, lhs: Blocked, rhs: Blocked) -> int:
  """Double-buffered inputs and output, and values on their way to bfloat16."""
  total = 2 * 4 * config.bm * config.bn
  for spec, size in ((lhs, config.bm), (rhs, config.bn)):
    scales = config.bk // spec.block * 4 if spec.block else 4
    codes = config.bk * spec.bits // 8
    total += size * (2 * (codes + scales) + (4 + 2) * config.bk)
  return total


def key(n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str) -> str:
  """What a tuned entry is for."""
  operands = f'{_tuned.operand(lhs)} {_tuned.operand(rhs)}'
  return f'n={n} k={k} {operands} {layout}'


def tpu(
  m: int, n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str
) -> TpuConfig:
  """The tuned tiles of this device, or those of `heuristic_tpu`."""

  def tuned(**sizes):
    config = TpuConfig(**sizes)
    if why := why_not_tpu(config, m, n, lhs, rhs, layout):
      raise ValueError(why)
    return dataclasses.replace(config, bm=min(m, config.bm))

  return _tuned.find(
    'block_matmul', 'tpu', key(n, k, lhs, rhs, layout), tuned
  ) or heuristic_tpu(m, n, k, lhs, rhs, layout)


def heuristic_tpu(
  m: int, n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str
) -> TpuConfig:
  """Tiles that keep the matrix unit busy: each lhs tile is decoded once per
  column of tiles and each rhs tile once per row of tiles."""
  unit = k_unit(lhs, rhs, layout)
  bk = unit * max(1, min(512 // unit, -(-k // unit)))
  bm = m if m <= 512 else 512
  bn = n if n <= 512 else 512
  config = TpuConfig(bm, bn, bk)
  while vmem_bytes(config, lhs, rhs) > VMEM_BYTES and max(bm, bn) > LANES:
    if bm >= bn:
      bm = max(bm // 2 // LANES * LANES, LANES)
    else:
      bn = max(bn // 2 // LANES * LANES, LANES)
    config = TpuConfig(bm, bn, bk)
  return config


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """Tiles of the GPU kernels: (bm, bk) of lhs, (bn, bk) of rhs.

  `bits` is the width of codes in shared memory, `stages` the tiles in flight.
  """

  bm: int
  bn: int
  bk: int
  stages: int
  bits: int = 8


def why_not_gpu(config: GpuConfig, target: str) -> str | None:
  """Why a GPU kernel cannot use these tiles, or None."""
  if config.bk * config.bits != 8 * SWIZZLE_BYTES:
    return f'bk={config.bk} codes are not {SWIZZLE_BYTES} bytes'
  rows = (BLACKWELL_ROWS,) if target == 'b200' else (WGMMA_ROWS, 2 * WGMMA_ROWS)
  if config.bm not in rows:
    return f'bm={config.bm} is not in {rows}'
  columns = (128, 256) if target == 'b200' else (128,)
  if config.bn not in columns:
    return f'bn={config.bn} is not in {columns}'
  if config.stages < 2:
    return f'stages={config.stages}: one is filled while another is read'
  used = smem_bytes(config)
  if used > SMEM_BYTES:
    return f'tiles {config} take {used} bytes of {SMEM_BYTES}'
  return None


def smem_bytes(config: GpuConfig) -> int:
  """The ring, with a scale for every 16 codes or 4 bytes a row, and the
  result."""
  rows = config.bm + config.bn
  stage = rows * (SWIZZLE_BYTES + max(config.bk // 16, 4))
  return config.stages * stage + 4 * config.bm * config.bn


def mosaic_gpu(
  m: int,
  n: int,
  k: int,
  lhs: Blocked,
  rhs: Blocked,
  layout: str,
  *,
  bits: int,
  target: str,
) -> GpuConfig:
  """The tuned tiles of this device, or those of `heuristic_gpu`."""
  plain = heuristic_gpu(m, bits, target)

  def tuned(bm: int, bn: int, stages: int):
    config = GpuConfig(bm, bn, plain.bk, stages, bits)
    if why := why_not_gpu(config, target):
      raise ValueError(why)
    return dataclasses.replace(config, bm=min(bm, plain.bm))

  found = _tuned.find(
    'block_matmul', 'mosaic_gpu', key(n, k, lhs, rhs, layout), tuned
  )
  return found or plain


def heuristic_gpu(m: int, bits: int, target: str) -> GpuConfig:
  """The largest tile whose sums fit the registers, and the ring that fits."""
  rows = 2 * WGMMA_ROWS if m > WGMMA_ROWS else WGMMA_ROWS
  if target == 'b200':
    rows = BLACKWELL_ROWS
  return GpuConfig(rows, 128, SWIZZLE_BYTES * 8 // bits, 4, bits)
