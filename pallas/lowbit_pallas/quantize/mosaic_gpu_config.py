"""The tile of the GPU kernel."""

import dataclasses
from collections.abc import Sequence

from lowbit_pallas import _tuned
from lowbit_pallas.quantize import config as _config
from lowbit_pallas.quantize.config import LANES
from lowbit_pallas.quantize.task import Task


@dataclasses.dataclass(frozen=True)
class Config:
  """The tile of the kernel.

  Attributes:
    columns: columns of 64 rows that a warpgroup takes, a multiple of 128.
  """

  columns: int = 256


def why_not(config: Config) -> str | None:
  """Why the kernel cannot use this tile, or None."""
  if config.columns % LANES or not LANES <= config.columns <= 512:
    return f'{config}: columns must be a multiple of {LANES} up to 512'
  return None


def choose(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """The tuned tile of this device, or that of `heuristic`.

  Arguments as `heuristic`.
  """

  def tuned(**sizes):
    config = Config(**sizes)
    if why := why_not(config):
      raise ValueError(why)
    return config

  return _tuned.find(
    'quantize', 'mosaic_gpu', _config.key(shape[1], dtype_bytes, task), tuned
  ) or heuristic(shape, dtype_bytes, task)


def heuristic(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """256 columns: up to 64 KiB of x in flight, several tiles on a processor.

  Args:
    shape: shape of x.
    dtype_bytes: bytes of a number of x.
    task: what to do.
  """
  del dtype_bytes, task
  return Config(min(256, -(-shape[1] // LANES) * LANES))
