"""Tiles of the TPU kernel and the memory that they take."""

import dataclasses
import math

from lowbit_pallas import _tuned
from lowbit_pallas.arith import packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul import config as _config
from lowbit_pallas.block_matmul.reference import k_axes

# What a kernel may use of the vector memory by default; all TPUs since v5e
# give 16 MiB without asking.
VMEM_BYTES = 14 << 20
LANES = 128
SUBLANES_8BIT = 32


@dataclasses.dataclass(frozen=True)
class Config:
  """Tiles of the kernel: (bm, bk) of lhs, (bk, bn) of rhs."""

  bm: int
  bn: int
  bk: int


def why_not(
  config: Config, m: int, n: int, lhs: Blocked, rhs: Blocked, layout: str
) -> str | None:
  """Why the kernel cannot use these tiles, or None."""
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


def vmem_bytes(config: Config, lhs: Blocked, rhs: Blocked) -> int:
  """Double-buffered inputs and output, and values on their way to bfloat16."""
  total = 2 * 4 * config.bm * config.bn
  for spec, size in ((lhs, config.bm), (rhs, config.bn)):
    scales = config.bk // spec.block * 4 if spec.block else 4
    codes = config.bk * spec.bits // 8
    total += size * (2 * (codes + scales) + (4 + 2) * config.bk)
  return total


def choose(
  m: int, n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str
) -> Config:
  """The tuned tiles of this device, or those of `heuristic`.

  Arguments as `heuristic`.
  """

  def tuned(**sizes):
    config = Config(**sizes)
    if why := why_not(config, m, n, lhs, rhs, layout):
      raise ValueError(why)
    return dataclasses.replace(config, bm=min(m, config.bm))

  return _tuned.find(
    'block_matmul', 'tpu', _config.key(n, k, lhs, rhs, layout), tuned
  ) or heuristic(m, n, k, lhs, rhs, layout)


def heuristic(
  m: int, n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str
) -> Config:
  """Tiles that keep the matrix unit busy.

  Each lhs tile is decoded once per column of tiles and each rhs tile once per
  row of tiles.

  Args:
    m: rows of the result.
    n: columns of the result.
    k: elements that are summed.
    lhs: static description of lhs.
    rhs: static description of rhs.
    layout: see the package.
  """
  unit = k_unit(lhs, rhs, layout)
  bk = unit * max(1, min(512 // unit, -(-k // unit)))
  bm = m if m <= 512 else 512
  bn = n if n <= 512 else 512
  config = Config(bm, bn, bk)
  while vmem_bytes(config, lhs, rhs) > VMEM_BYTES and max(bm, bn) > LANES:
    if bm >= bn:
      bm = max(bm // 2 // LANES * LANES, LANES)
    else:
      bn = max(bn // 2 // LANES * LANES, LANES)
    config = Config(bm, bn, bk)
  return config
