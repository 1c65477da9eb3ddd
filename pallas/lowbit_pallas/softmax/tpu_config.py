"""Blocks of the TPU kernel."""

import dataclasses

from lowbit_pallas import _tuned
from lowbit_pallas.softmax import config as _config

LANES = 128

# Most columns that the kernel handles at once: in both phases of a row in
# pieces, and of a row as a whole, whose steps need fewer registers.
CHUNK = 2048
WHOLE_CHUNK = 4096

# Bytes of an input or output block. Two of each, a mask and scratch stay below
# the 16 MiB of VMEM that XLA grants a kernel by default.
_VMEM_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Config:
  """Block of the kernel.

  Attributes:
    rows: rows of a block, a multiple of the sublanes of the narrowest operand.
    columns: columns of a block, a multiple of 128. Where a block holds the
      whole row, the input is read once; otherwise twice.
  """

  rows: int
  columns: int


def why_not(config: Config, entry_bytes: int = 4) -> str | None:
  """Why the kernel cannot use this block, or None; see `heuristic`."""
  tile = sublanes(entry_bytes)
  if config.rows < 1 or config.rows % tile:
    return f'rows={config.rows} must be a multiple of {tile}'
  if config.columns < 1 or config.columns % LANES:
    return f'columns={config.columns} must be a multiple of {LANES}'
  if config.rows * config.columns * 4 > 2 * _VMEM_BLOCK:
    return (
      f'a float32 block of rows={config.rows} x columns={config.columns}'
      f' is over {2 * _VMEM_BLOCK} bytes; take a smaller one'
    )
  return None


def chunk(block: Config, most: int = CHUNK) -> int:
  """Columns of a chunk: as many as divide the block, at most `most`."""
  most = min(block.columns, most)
  return next(w for w in range(most, 0, -LANES) if block.columns % w == 0)


def sublanes(itemsize: int) -> int:
  """Rows of a TPU tile of elements of this many bytes."""
  return 32 // itemsize


def choose(rows: int, columns: int, entry_bytes: int) -> Config:
  """The tuned block of this device, or that of `heuristic`.

  Arguments as `heuristic`.
  """
  tile = sublanes(entry_bytes)

  def tuned(**sizes):
    config = Config(**sizes)
    if why := why_not(config, entry_bytes):
      raise ValueError(why)
    padded_rows = -(-rows // tile) * tile
    return dataclasses.replace(config, rows=min(config.rows, padded_rows))

  return _tuned.find(
    'softmax', 'tpu', _config.key(columns, entry_bytes), tuned
  ) or heuristic(rows, columns, entry_bytes)


def heuristic(rows: int, columns: int, entry_bytes: int) -> Config:
  """The block for a matrix.

  Args:
    rows: rows of the matrix.
    columns: its columns.
    entry_bytes: bytes of the narrowest of input, mask and output.

  Returns:
    The whole row where a tile of rows fits, or else 4096 columns. The columns
    follow from `columns` and `entry_bytes` alone.
  """
  tile = sublanes(entry_bytes)
  # The chunks that divide the result follow from `columns` alone.
  step = LANES if columns <= CHUNK else 1024 if columns <= 4096 else CHUNK
  width = -(-columns // step) * step
  if tile * width * 4 > _VMEM_BLOCK:
    width = 4096
  limit = max(tile, _VMEM_BLOCK // (width * 4) // tile * tile)
  return Config(min(limit, 512, -(-rows // tile) * tile), width)
