"""Tiles of the GPU kernels and the memory that they take."""

import dataclasses

from lowbit_pallas import _tuned
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul import config as _config

# Shared memory that one block may use on Hopper and Blackwell, less what
# barriers and alignment take.
SMEM_BYTES = (227 << 10) - 2048
SWIZZLE_BYTES = 128  # of K in a row of a shared memory tile
WGMMA_ROWS = 64
BLACKWELL_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """Tiles of the kernels: (bm, bk) of lhs, (bn, bk) of rhs.

  Attributes:
    bm: rows of lhs in a tile.
    bn: rows of rhs, K minor, in a tile.
    bk: elements of K in a tile.
    stages: tiles in flight.
    bits: width of codes in shared memory.
  """

  bm: int
  bn: int
  bk: int
  stages: int
  bits: int = 8


def why_not(config: Config, target: str) -> str | None:
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


def smem_bytes(config: Config) -> int:
  """Bytes of the ring, 4 or a scale for 16 codes to a row, and the result."""
  rows = config.bm + config.bn
  stage = rows * (SWIZZLE_BYTES + max(config.bk // 16, 4))
  return config.stages * stage + 4 * config.bm * config.bn


def choose(
  m: int,
  n: int,
  k: int,
  lhs: Blocked,
  rhs: Blocked,
  layout: str,
  *,
  bits: int,
  target: str,
) -> Config:
  """The tuned tiles of this device, or those of `heuristic`.

  Arguments as `heuristic`.
  """
  plain = heuristic(m, n, k, lhs, rhs, layout, bits=bits, target=target)

  def tuned(bm: int, bn: int, stages: int):
    config = Config(bm, bn, plain.bk, stages, bits)
    if why := why_not(config, target):
      raise ValueError(why)
    return dataclasses.replace(config, bm=min(bm, plain.bm))

  found = _tuned.find(
    'block_matmul', 'mosaic_gpu', _config.key(n, k, lhs, rhs, layout), tuned
  )
  return found or plain


def heuristic(
  m: int,
  n: int,
  k: int,
  lhs: Blocked,
  rhs: Blocked,
  layout: str,
  *,
  bits: int,
  target: str,
) -> Config:
  """The largest tile whose sums fit the registers, and the ring that fits.

  Args:
    m: rows of the result.
    n: columns of the result.
    k: elements that are summed.
    lhs: static description of lhs.
    rhs: static description of rhs.
    layout: see the package.
    bits: width of the codes that the tensor cores read.
    target: 'h100' or 'b200'.
  """
  del n, k, lhs, rhs, layout
  rows = 2 * WGMMA_ROWS if m > WGMMA_ROWS else WGMMA_ROWS
  if target == 'b200':
    rows = BLACKWELL_ROWS
  return Config(rows, 128, SWIZZLE_BYTES * 8 // bits, 4, bits)
