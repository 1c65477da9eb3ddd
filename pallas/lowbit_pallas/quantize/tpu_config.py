"""Tiles of the TPU kernel."""

import dataclasses
import math
from collections.abc import Sequence

from lowbit_pallas import _tuned
from lowbit_pallas.quantize import config as _config
from lowbit_pallas.quantize.config import LANES
from lowbit_pallas.quantize.task import Task


@dataclasses.dataclass(frozen=True)
class Config:
  """Tiles of the kernel.

  Attributes:
    bm: rows of a tile, a multiple of `rows`.
    bn: columns of a tile, a multiple of `chunk(bits)`, and of 128 blocks where
      there are several tiles side by side.
    rows: rows that are worked on at a time, a multiple of 32.
  """

  bm: int
  bn: int
  rows: int = 32


def why_not(config: Config, shape: Sequence[int], task: Task) -> str | None:
  """Why the kernel cannot use these tiles for an x of `shape`, or None."""
  width = chunk(task.spec.bits)
  if config.rows % 32 or config.bm % config.rows:
    return f'{config}: rows must be a multiple of 32 and divide bm'
  multiple = config.bn if config.bn >= shape[1] else LANES * task.spec.block
  if config.bn % width or config.bn % multiple:
    return (
      f'{config}: bn must be a multiple of {width}, and of'
      f' {LANES * task.spec.block} unless it covers all {shape[1]} columns'
    )
  return None


def choose(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """The tuned tiles of this device, or those of `heuristic`.

  Arguments as `heuristic`.
  """

  def tuned(**sizes):
    config = Config(**sizes)
    if why := why_not(config, shape, task):
      raise ValueError(why)
    if config.bm * config.bn * dtype_bytes > 1 << 21:
      raise ValueError(f'{config}: a tile of x is over 2 MiB')
    padded_rows = -(-shape[0] // config.rows) * config.rows
    return dataclasses.replace(config, bm=min(config.bm, padded_rows))

  return _tuned.find(
    'quantize', 'tpu', _config.key(shape[1], dtype_bytes, task), tuned
  ) or heuristic(shape, dtype_bytes, task)


def heuristic(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """Tiles of at most 2 MiB of x: whole rows up to 16384 columns.

  Pieces of 128 rows hide the latency of reductions and products best.

  Args:
    shape: shape of x.
    dtype_bytes: bytes of a number of x.
    task: what to do.
  """
  m, n = shape
  width = chunk(task.spec.bits)
  bn = -(-n // width) * width
  if bn > 16384:
    bn = LANES * task.spec.block
  most = min((1 << 21) // (bn * dtype_bytes), 512)
  rows = next(r for r in (128, 64, 32) if r == 32 or r <= min(most, m))
  bm = min(max(most // rows, 1), -(-m // rows)) * rows
  return Config(bm, bn, rows)


def chunk(bits: int) -> int:
  """Columns that are worked on at a time: whole registers of lanes and bytes.

  Scales are computed for all blocks of a piece at once, one block per lane, so
  pieces are no narrower than 512 columns.
  """
  return max(LANES * 8 // math.gcd(bits, 8), 512)
