"""Sizes of the TPU kernel."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from lowbit_pallas import _tuned
from lowbit_pallas.arith import packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import config as _config, prepack

LAYOUT = 'kn'  # of the weight, see `prepack`
VMEM_BYTES = 12 << 20  # of the 16 MiB of v5e; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the kernel.

  Attributes:
    bm: rows of x in a tile.
    bn: columns of the weight in a tile.
    tile: rows of K in a tile, as in `prepack`.
    schedule: 'pre' or 'post'.
  """

  bm: int
  bn: int
  tile: int
  schedule: str


def why_not(config: Config) -> str | None:
  """Why the kernel cannot use these sizes, or None."""
  if config.bm % 16 or config.bn % 128:
    return (
      f'config.bm={config.bm}, config.bn={config.bn}: not multiples of 16, 128'
    )
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

  Arguments as `heuristic`. An entry has `bm` and `bn`, `bm` for any number of
  rows.
  """
  plain = heuristic(m, n, k, spec, dtype, tile=tile, schedule=schedule)
  rows = _config.round_up(m * _config.PARTS[jnp.dtype(dtype).name], 16)

  def tuned(bm: int, bn: int):
    config = dataclasses.replace(plain, bm=bm, bn=bn)
    if why := why_not(config):
      raise ValueError(why)
    if vmem_bytes(config, spec, dtype) > VMEM_BYTES:
      raise ValueError(f'{config} takes over {VMEM_BYTES} bytes')
    return dataclasses.replace(config, bm=min(bm, rows))

  entry = _config.key(n, k, spec, dtype, plain.schedule)
  return _tuned.find('wq_matmul', 'tpu', entry, tuned) or plain


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
  """Sizes for (m, k) x (k, n).

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
  bm, bn = min(512, _config.round_up(m, 16)), min(512, _config.round_up(n, 128))
  config = Config(bm, bn, tile, schedule)
  while vmem_bytes(config, spec, dtype) > VMEM_BYTES and config.bn > 128:
    half = _config.round_up(config.bn // 2, 128)
    config = dataclasses.replace(config, bn=half)
  return config


def tile_rows(k: int, spec: Blocked) -> int:
  """Rows of K in a tile, a function of the weight alone.

  Raises:
    ValueError: where no tile fits the blocks.
  """
  unit = math.lcm(128, 32 * packing.codes_per_group(spec.bits))
  return _tile(k, spec, unit, 512)


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


def vmem_bytes(config: Config, spec: Blocked, dtype: DTypeLike) -> int:
  """Bytes of VMEM: two buffers of each operand, the sums, a decoded tile."""
  bm, bn, tile = config.bm, config.bn, config.tile
  wide = jnp.dtype(dtype).itemsize
  x = bm * tile * wide
  codes = tile * bn * spec.bits // 8
  scales = 2 * 4 * bn * max(8, tile // spec.block) if spec.block else 0
  out = bm * bn * 4
  return 2 * (x + codes + scales + out) + out + tile * bn * (4 + wide)
