"""How the GPU kernels cut a row."""

import dataclasses

from lowbit_pallas import _tuned
from lowbit_pallas.softmax import config as _config

# Columns that one warpgroup takes at a time: two to a thread.
SLICE = 256

# Limits of one TMA copy and of a CTA of which four are to share an SM.
_MOST_SLICES = 256
_SHARED_BYTES = 56 << 10
_MOST_SHARED_BYTES = 220 << 10

# Slices of a CTA's share of a row that is split.
_SPLIT_SLICES = 32


@dataclasses.dataclass(frozen=True)
class Config:
  """How the kernels cut a row.

  Attributes:
    slices: slices of 256 columns that a CTA holds in shared memory.
    splits: CTAs to a row. 1 reads the input once; more read it twice and join
      their partial sums in order.
  """

  slices: int
  splits: int = 1


def why_not(config: Config, columns: int, entry_bytes: int) -> str | None:
  """Why the kernels cannot cut rows like this, or None; see `heuristic`."""
  if not 1 <= config.slices <= _MOST_SLICES:
    return f'slices={config.slices} is not in 1 ... {_MOST_SLICES}'
  if config.splits < 1:
    return f'splits={config.splits} must be positive'
  held = config.slices * SLICE
  if held * config.splits < columns:
    return f'{config} holds fewer than {columns} columns'
  if held * entry_bytes > _MOST_SHARED_BYTES:
    return f'{config} takes over {_MOST_SHARED_BYTES} bytes'
  return None


def choose(rows: int, columns: int, entry_bytes: int) -> Config:
  """The tuned cut of this device, or that of `heuristic`.

  Arguments as `heuristic`.
  """

  def tuned(**sizes):
    config = Config(**sizes)
    if why := why_not(config, columns, entry_bytes):
      raise ValueError(why)
    return config

  return _tuned.find(
    'softmax', 'mosaic_gpu', _config.key(columns, entry_bytes), tuned
  ) or heuristic(rows, columns, entry_bytes)


def heuristic(rows: int, columns: int, entry_bytes: int) -> Config:
  """How to cut rows of this length, whatever their number.

  Args:
    rows: rows of the matrix.
    columns: its columns.
    entry_bytes: shared memory for one entry: input, mask, and output if
      its dtype is another one.

  Returns:
    The row in one piece where it takes a quarter of an SM at most, or else
    pieces of up to 8192 columns.
  """
  del rows
  slices = -(-columns // SLICE)
  if slices <= _MOST_SLICES and (slices * SLICE * entry_bytes <= _SHARED_BYTES):
    return Config(slices)
  splits = -(-slices // _SPLIT_SLICES)
  return Config(-(-slices // splits), splits)
