"""What a quantization kernel does, and how it cuts the work."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lowbit_pallas import _tuned
from lowbit_pallas.arith import block, codec, hash
from lowbit_pallas.arith.hash import Origin

BLOCKS = (16, 32, 64, 128)
ROTATIONS = (16, 32, 64, 128)
ROUNDINGS = ('nearest_even', 'toward_zero', 'stochastic')
DTYPES = ('float32', 'bfloat16', 'float16')
LANES = 128


class Task(NamedTuple):
  """Everything static about a quantization.

  Attributes:
    spec: elements, width of a code, block, format of the scales.
    rule: how a scale follows from a maximum, see `block.scale_rules`.
    rounding: a name from `ROUNDINGS`.
    random_bits: bits that stochastic rounding uses, 1 to 23.
    rotation: order of the Hadamard matrix, 0 for none.
  """

  spec: block.Blocked
  rule: str
  rounding: str = 'nearest_even'
  random_bits: int = codec.RANDOM_BITS
  rotation: int = 0


def why_not(shape: Sequence[int], dtype: DTypeLike, task: Task) -> str | None:
  """Why no kernel takes this, or None."""
  spec = task.spec
  if len(shape) != 2:
    return f'x.shape={tuple(shape)} must have two axes'
  if str(dtype) not in DTYPES:
    return f'x.dtype={dtype} is not one of {", ".join(DTYPES)}'
  if spec.block not in BLOCKS:
    return f'block={spec.block} is not one of {BLOCKS}'
  if isinstance(spec.element, codec.Codebook) and len(spec.element.table) > 16:
    return f'a codebook of {len(spec.element.table)} entries exceeds 16'
  if isinstance(spec.element, codec.Int) and not spec.element.signed:
    return 'unsigned integers need a zero point, which kernels do not find'
  if task.rule not in block.scale_rules(spec):
    return f'rule={task.rule!r} is not one of {block.scale_rules(spec)}'
  if task.rounding not in ROUNDINGS:
    return f'rounding={task.rounding!r} is not one of {ROUNDINGS}'
  if task.rotation and task.rotation not in ROTATIONS:
    return f'rotation={task.rotation} is not one of {ROTATIONS}'
  if task.rotation and shape[1] % task.rotation:
    return f'rotation={task.rotation} does not divide {shape[1]} columns'
  return None


def scale_dtype(task: Task) -> DTypeLike:
  """uint8 for codes, else float32."""
  return jnp.float32 if task.spec.scale is None else jnp.uint8


def nothing(shape: Sequence[int], task: Task) -> tuple:
  """The result for an x without rows or without columns."""
  rows, cols = shape
  return (
    jnp.zeros((rows, packed_columns(cols, task)), jnp.uint8),
    jnp.zeros((rows, scale_columns(cols, task)), scale_dtype(task)),
  )


def scalar(x: ArrayLike) -> jax.Array:
  """float32 (1,), as kernels read scalars."""
  return jnp.reshape(x, (1,)).astype(jnp.float32)


def given_key(key_words: jax.Array | None) -> jax.Array:
  """The key of stochastic rounding, or a ValueError where there is none."""
  if key_words is None:
    raise ValueError(
      "rounding='stochastic' needs key_words=, two uint32 words of a key"
    )
  return key_words


def words(key_words: jax.Array | None, origin: Origin | None) -> jax.Array:
  """What random bits depend on: the streams of the key, and the origin."""
  key_words = given_key(key_words)
  start = (0, 0) if origin is None else origin[0]
  start = [jnp.asarray(s).astype(jnp.uint32) for s in start]
  return jnp.stack([*hash.streams(key_words), *start])


def scale_columns(cols: int, task: Task) -> int:
  """Blocks in a row."""
  return -(-cols // task.spec.block)


def packed_columns(cols: int, task: Task) -> int:
  """Bytes in a row."""
  return scale_columns(cols, task) * task.spec.block * task.spec.bits // 8


def chunk(bits: int) -> int:
  """Columns that are worked on at a time: whole registers of lanes and bytes.

  Scales are computed for all blocks of a piece at once, one block per lane, so
  pieces are no narrower than 512 columns.
  """
  return max(LANES * 8 // math.gcd(bits, 8), 512)


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the TPU kernel.

  Attributes:
    bm: rows of a tile, a multiple of `rows`.
    bn: columns of a tile, a multiple of `chunk(bits)`, and of 128 blocks where
      there are several tiles side by side.
    rows: rows that are worked on at a time, a multiple of 32.
  """

  bm: int
  bn: int
  rows: int = 32


def key(cols: int, dtype_bytes: int, task: Task) -> str:
  """What a tuned entry is for."""
  return (
    f'columns={cols} bytes={dtype_bytes} {_tuned.operand(task.spec)}'
    f' {task.rounding} rotation={task.rotation}'
  )


def tpu(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """The tuned tiles of this device, or those of `heuristic`."""

  def tuned(**sizes):
    config = Config(**sizes)
    check(config, shape, task)
    if config.bm * config.bn * dtype_bytes > 1 << 21:
      raise ValueError(f'{config}: a tile of x is over 2 MiB')
    tall = -(-shape[0] // config.rows) * config.rows
    return dataclasses.replace(config, bm=min(config.bm, tall))

  return _tuned.find(
    'quantize', 'tpu', key(shape[1], dtype_bytes, task), tuned
  ) or heuristic(shape, dtype_bytes, task)


def heuristic(shape: Sequence[int], dtype_bytes: int, task: Task) -> Config:
  """Tiles of at most 2 MiB of x: whole rows up to 16384 columns.

  Pieces of 128 rows hide the latency of reductions and products best.
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


def check(config: Config, shape: Sequence[int], task: Task) -> None:
  """Raises ValueError for tiles that the TPU kernel cannot work with."""
  width = chunk(task.spec.bits)
  if config.rows % 32 or config.bm % config.rows:
    raise ValueError(f'{config}: rows must be a multiple of 32 and divide bm')
  whole = config.bn if config.bn >= shape[1] else LANES * task.spec.block
  if config.bn % width or config.bn % whole:
    raise ValueError(
      f'{config}: bn must be a multiple of {width}, and of'
      f' {LANES * task.spec.block} unless it covers all {shape[1]} columns'
    )


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """Tile size of the GPU kernel.

  Attributes:
    columns: columns of 64 rows that a warpgroup takes, a multiple of 128.
  """

  columns: int = 256


def mosaic_gpu(shape: Sequence[int], dtype_bytes: int, task: Task) -> GpuConfig:
  """The tuned tile of this device, or that of `gpu_heuristic`."""

  def tuned(columns: int):
    if columns % LANES or not LANES <= columns <= 512:
      raise ValueError(f'{columns=} must be a multiple of {LANES} up to 512')
    return GpuConfig(columns)

  return _tuned.find(
    'quantize', 'mosaic_gpu', key(shape[1], dtype_bytes, task), tuned
  ) or gpu_heuristic(shape)


def gpu_heuristic(shape: Sequence[int]) -> GpuConfig:
  """256 columns: up to 64 KiB of x in flight, several tiles on a processor."""
  return GpuConfig(min(256, -(-shape[1] // LANES) * LANES))
