"""The contract of the quantization kernels in plain jnp."""

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import (
  block,
  codec,
  hadamard,
  hashing,
  packing,
  scale as exact,
)
from lowbit_pallas.arith.hashing import Origin
from lowbit_pallas.quantize.task import Task, given_key


def run(
  x: jax.Array,
  task: Task,
  *,
  key_words: jax.Array | None = None,
  origin: Origin | None = None,
  tensor_scale: jax.Array | None = None,
  signs: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Quantizes and packs.

  Args:
    x: (rows, cols), float32, bfloat16 or float16.
    task: what to do.
    key_words: uint32 (2,), for stochastic rounding.
    origin: None, or `(start, full_shape)` where x is the slice of a larger
      array that begins at `start`, two ints or scalars.
    tensor_scale: None, or a float32 scalar by which block scales are divided.
    signs: None, or +-1 (cols,), multiplied in before the rotation.

  Returns:
    (packed, scales), see the package.
  """
  spec = task.spec
  x = x.astype(jnp.float32)
  if task.rotation:
    if signs is not None:
      x = x * signs.astype(jnp.float32)
    x = hadamard.hadamard(x, task.rotation)
  random = None
  if task.rounding == 'stochastic':
    index = hashing.element_index(x.shape, origin)
    random = hashing.random_bits(given_key(key_words), *index)
  x = _split(x, spec.block)
  random = None if random is None else _split(random, spec.block)
  amax = jnp.max(exact.magnitude_bits(x), -1, keepdims=True, initial=0)
  scale = block.stored_scale(amax, spec, task.rule, tensor_scale)
  inverse = block.inverse_factors(
    scale, spec.scale, codec.largest(spec.element), tensor_scale
  )
  rule = codec.rule(task.rounding, random, task.random_bits)
  codes = codec.encode(block.scaled(x, inverse), spec.element, rule)
  codes = codes.reshape(len(codes), codes.shape[1] * spec.block)
  scale = scale[..., 0].astype(jnp.float32 if spec.scale is None else jnp.uint8)
  return packing.pack(codes, spec.bits), scale


def _split(a, size: int):
  """(rows, cols) as (rows, blocks, size), padded with zeros."""
  a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)))
  return a.reshape(len(a), a.shape[1] // size, size)
