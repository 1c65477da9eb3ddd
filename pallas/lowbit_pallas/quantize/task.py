"""What a quantization kernel does, and what it reads and writes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lowbit_pallas.arith import block, codec, hashing
from lowbit_pallas.arith.hashing import Origin

BLOCKS = (16, 32, 64, 128)
ROTATIONS = (16, 32, 64, 128)
ROUNDINGS = ('nearest_even', 'toward_zero', 'stochastic')
DTYPES = ('float32', 'bfloat16', 'float16')


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
  return jnp.stack([*hashing.streams(key_words), *start])


def scale_columns(cols: int, task: Task) -> int:
  """Blocks in a row."""
  return -(-cols // task.spec.block)


def packed_columns(cols: int, task: Task) -> int:
  """Bytes in a row."""
  return scale_columns(cols, task) * task.spec.block * task.spec.bits // 8
