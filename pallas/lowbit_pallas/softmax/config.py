"""Block sizes of the kernels, from the shape and what was timed.

Nothing here may depend on the number of rows in a way that changes the order
of additions within a row: a row's bits must not depend on its neighbours.
"""

import dataclasses

from lowbit_pallas import _tuned

LANES = 128

# Most columns that a TPU kernel handles at once: in both phases of a row in
# pieces, and of a row as a whole, whose steps need fewer registers.
CHUNK = 2048
WHOLE_CHUNK = 4096

# Bytes of an input or output block on TPU. Two of each, a mask and scratch
# stay below the 16 MiB of VMEM that XLA grants a kernel by default.
_VMEM_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class TpuConfig:
  """Block of the TPU kernel.

  Attributes:
    rows: rows of a block, a multiple of the sublanes of the narrowest operand.
    columns: columns of a block, a multiple of 128. Where a block holds the
      whole row, the input is read once; otherwise twice.
  """

  rows: int
  columns: int

  def __post_init__(self) -> None:
    if self.rows < 1 or self.rows % 8:
      raise ValueError(f'rows={self.rows} must be a multiple of 8')
    if self.columns < 1 or self.columns % LANES:
      raise ValueError(f'columns={self.columns} must be a multiple of 128')
    if self.rows * self.columns * 4 > 2 * _VMEM_BLOCK:
      raise ValueError(
        f'a float32 block of rows={self.rows} x columns={self.columns} is over'
        f' {2 * _VMEM_BLOCK} bytes; take a smaller one'
      )


def chunk(block: TpuConfig, most: int = CHUNK) -> int:
  """Columns of a chunk: as many as divide the block, at most `most`."""
  most = min(block.columns, most)
  return next(w for w in range(most, 0, -LANES) if block.columns % w == 0)


def sublanes(itemsize: int) -> int:
  """Rows of a TPU tile of elements of this many bytes."""
  return 32 // itemsize


def key(columns: int, bytes_per_entry: int) -> str:
  """What a tuned entry is for."""
  return f'columns={columns} bytes={bytes_per_entry}'


def tpu(rows: int, columns: int, itemsize: int) -> TpuConfig:
  """The tuned block of this device, or that of `heuristic_tpu`."""
  tile = sublanes(itemsize)

  def tuned(**sizes):
    config = TpuConfig(**sizes)
    if config.rows % tile:
      raise ValueError(f'rows={config.rows} must be a multiple of {tile}')
    tall = -(-rows // tile) * tile
    return dataclasses.replace(config, rows=min(config.rows, tall))

  return _tuned.find(
    'softmax', 'tpu', key(columns, itemsize), tuned
  ) or heuristic_tpu(rows, columns, itemsize)


def heuristic_tpu(rows: int, columns: int, itemsize: int) -> TpuConfig:
  """The block for a matrix.

  Args:
    rows: rows of the matrix.
    columns: its columns.
    itemsize: bytes of the narrowest of input, mask and output.

  Returns:
    The whole row where a tile of rows fits, or else 4096 columns. The columns
    follow from `columns` and `itemsize` alone.
  """
  tile = sublanes(itemsize)
  # The chunks that divide the result follow from `columns` alone.
  step = LANES if columns <= CHUNK else 1024 if columns <= 4096 else CHUNK
  whole = -(-columns // step) * step
  if tile * whole * 4 > _VMEM_BLOCK:
    whole = 4096
  most = max(tile, _VMEM_BLOCK // (whole * 4) // tile * tile)
  return TpuConfig(min(most, 512, -(-rows // tile) * tile), whole)


# Columns that one warpgroup takes at a time: two to a thread.
SLICE = 256

# Limits of one TMA copy and of a CTA of which four are to share an SM.
_MOST_SLICES = 256
_SHARED_BYTES = 56 << 10
_MOST_SHARED_BYTES = 220 << 10

# Slices of a CTA's share of a row that is split.
_SPLIT_SLICES = 32


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """How the GPU kernels cut a row.

  Attributes:
    slices: slices of 256 columns that a CTA holds in shared memory.
    splits: CTAs to a row. 1 reads the input once; more read it twice and join
      their partial sums in order.
  """

  slices: int
  splits: int = 1

  def __post_init__(self) -> None:
    if not 1 <= self.slices <= _MOST_SLICES:
      raise ValueError(f'slices={self.slices} is not in 1 ... {_MOST_SLICES}')
    if self.splits < 1:
      raise ValueError(f'splits={self.splits} must be positive')


def mosaic_gpu(columns: int, bytes_per_entry: int) -> GpuConfig:
  """The tuned cut of this device, or that of `heuristic_gpu`."""

  def tuned(**sizes):
    config = GpuConfig(**sizes)
    held = config.slices * SLICE
    if held * config.splits < columns:
      raise ValueError(f'{config} holds fewer than {columns} columns')
    if held * bytes_per_entry > _MOST_SHARED_BYTES:
      raise ValueError(f'{config} takes over {_MOST_SHARED_BYTES} bytes')
    return config

  return _tuned.find(
    'softmax', 'mosaic_gpu', key(columns, bytes_per_entry), tuned
  ) or heuristic_gpu(columns, bytes_per_entry)


def heuristic_gpu(columns: int, bytes_per_entry: int) -> GpuConfig:
  """How to cut rows of this length, whatever their number.

  Args:
    columns: columns of the matrix.
    bytes_per_entry: shared memory for one entry: input, mask, and output if
      its dtype is another one.

  Returns:
    The row in one piece where it takes a quarter of an SM at most, or else
    pieces of up to 8192 columns.
  """
  slices = -(-columns // SLICE)
  if slices <= _MOST_SLICES and (
    slices * SLICE * bytes_per_entry <= _SHARED_BYTES
  ):
    return GpuConfig(slices)
  splits = -(-slices // _SPLIT_SLICES)
  return GpuConfig(-(-slices // splits), splits)
