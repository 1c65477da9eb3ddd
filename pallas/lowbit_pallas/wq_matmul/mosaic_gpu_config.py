"""Sizes of the GPU kernel."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from lowbit_pallas import _tuned
from lowbit_pallas.arith import packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import config as _config, prepack

LAYOUT = 'nk'  # of the weight, see `prepack`
SMEM_BYTES = 220 << 10  # of the 227 KiB of a block on H100
COLUMNS = 64  # of the weight in a tile: the rows of a WGMMA


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the kernel.

  Attributes:
    bm: rows of x in a tile.
    bn: columns of the weight in a tile.
    tile: rows of K in a tile, as in `prepack`.
    schedule: 'pre' or 'post'.
    split_k: parts of K that are summed apart.
    stages: tiles in flight.
  """

  bm: int
  bn: int
  tile: int
  schedule: str
  split_k: int = 1
  stages: int = 2


def why_not(config: Config, steps: int) -> str | None:
  """Why the kernel cannot use these sizes for `steps` tiles, or None."""
  if config.bn != COLUMNS:
    return f'config.bn={config.bn}, not {COLUMNS}'
  if config.bm % 8 or not 8 <= config.bm <= 256:
    return f'config.bm={config.bm} is not a multiple of 8 from 8 to 256'
  if steps % config.split_k:
    return f'config.split_k={config.split_k} does not divide {steps} tiles'
  if config.stages < 2:
    return f'config.stages={config.stages}: one is filled while another is read'
  return None


def choose(
  m: int,
  n: int,
  k: int,
  spec: Blocked,
  dtype: DTypeLike,
  *,
  tile: int | None = None,
  schedule: str | None = None,
) -> Config:
  """The tuned sizes of this device, or those of `heuristic`.

  Arguments as `heuristic`. An entry has `bm`, the most rows in a tile, `stages`
  and `split_k`.
  """
  plain = heuristic(m, n, k, spec, dtype, tile=tile, schedule=schedule)
  rows = m * _config.PARTS[jnp.dtype(dtype).name]

  def tuned(bm: int, stages: int, split_k: int):
    config = dataclasses.replace(plain, bm=bm, stages=stages, split_k=split_k)
    if why := why_not(config, -(-k // plain.tile)):
      raise ValueError(why)
    if bm > _most_rows(plain.schedule, spec):
      raise ValueError(f'{bm=} needs more registers than there are')
    if smem_bytes(config, spec) > SMEM_BYTES:
      raise ValueError(f'{config} takes over {SMEM_BYTES} bytes')
    return dataclasses.replace(config, bm=_even_tiles(rows, bm))

  entry = _config.key(n, k, spec, dtype, plain.schedule)
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
  """Sizes for (m, k) x (k, n) on Hopper.

  K is split until there are about two blocks for each of 132 processors.

  Args:
    m: rows of x.
    n: columns of the weight.
    k: rows of the weight.
    spec: what codes and scales stand for.
    dtype: dtype of x.
    tile: rows of K in a tile, where the weight has them already.
    schedule: 'pre' or 'post', where it is given.
  """
  m *= _config.PARTS[jnp.dtype(dtype).name]
  tile = tile_rows(k, spec) if tile is None else tile
  schedule = _config.heuristic_schedule(spec) if schedule is None else schedule
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
  return _config.round_up(-(-rows // -(-max(rows, 1) // most)), 8)


def tile_rows(k: int, spec: Blocked) -> int:
  """Rows of K in a tile: lanes of 64.

  Raises:
    ValueError: where it does not fit the blocks.
  """
  del k
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
