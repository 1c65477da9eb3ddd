"""Rotations of the inputs of a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax._typing import Key
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.transforms import BlockAffine, Hadamard

# Tokens on which `duquant` looks for a rotation.
_TOKENS = 64

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def hadamard(block: int) -> Step:
  """Rotates runs of inputs, so that outliers spread over a block.

  Activations take the rotation when the layer runs. Behind it MXFP4 and INT4
  lose less; NVFP4, whose blocks are small, loses more (arXiv:2509.23202).

  Args:
    block: inputs of a run, a power of two that divides the inputs of every
      layer; the block of the format, or a multiple of it.

  Returns:
    A step. It raises ValueError for a layer whose inputs are no multiple of
    `block`.
  """
  rotation = Hadamard(block)

  def step(layer: Layer) -> Layer:
    _check_block(block, layer)
    return layer.transformed(rotation)

  return step


def duquant(block: int = 32, *, steps: int = 256, key: Key) -> Step:
  """Rotates runs of inputs by a matrix that spreads the outliers of a layer.

  All runs of a layer take one matrix, see `greedy_rotation`. Activations take
  it when the layer runs, a product with (block, block). It is found on tokens
  of a normal distribution with the mean products of those that were recorded,
  which does as well as the recorded tokens themselves; so layers that share
  their input share the rotation. A layer without statistics stays as it is.

  Where channels have large means, activations in MXFP4 lose less than behind
  `hadamard`; elsewhere about as much, and more if few tokens have outliers.

  Args:
    block: inputs of a run, at least 2; the block of the format.
    steps: random rotations that are tried one after the other, at least 1.
    key: of the rotations and the tokens, the same for all layers.

  Returns:
    A step. It raises ValueError for a layer whose inputs are no multiple of
    `block`.

  References: DuQuant, arXiv:2406.01721; DuQuant++, one rotation of the size of
    a block of MXFP4.

  Examples:
    >>> import jax
    >>> from lowbit_jax import ptq
    >>> step = ptq.chain(ptq.duquant(key=jax.random.key(0)), ptq.gptq())
  """
  if not isinstance(block, int) or block < 2:
    raise ValueError(f'{block=} must be an int of at least 2')
  if not isinstance(steps, int) or steps < 1:
    raise ValueError(f'{steps=} must be an int of at least 1')

  def step(layer: Layer) -> Layer:
    if layer.statistics is None:
      return layer
    _check_block(block, layer)
    turns, drawn = jax.random.split(key)
    x = tokens_like(drawn, layer.statistics.moments, block)
    rotation, _ = greedy_rotation(turns, x, block, steps)
    return layer.transformed(BlockAffine(rotation))

  return step


def _check_block(block: int, layer: Layer) -> None:
  inputs = len(layer.weight)
  if inputs % block:
    raise ValueError(
      f'{layer.path!r} has {inputs} inputs, which is no multiple of {block=}:'
      f' take a block that divides {inputs}, or leave this layer out by'
      ' ptq.masked'
    )


@functools.partial(jax.jit, static_argnums=2)
def tokens_like(key: Key, moments: jax.Array, block: int) -> jax.Array:
  """Tokens of a normal distribution, independent from block to block.

  Args:
    key: of the tokens.
    moments: (in, in), mean products of channels; those of different blocks do
      not count.
    block: channels of a block, which divides all of them.

  Returns:
    (tokens, in).
  """
  count = len(moments) // block
  parts = moments.reshape(count, block, count, block)
  parts = jnp.einsum('kikj->kij', parts)
  variances, axes = jnp.linalg.eigh(parts)
  roots = axes * jnp.sqrt(jnp.maximum(variances, 0))[:, None]
  normal = jax.random.normal(key, (_TOKENS, count, block, 1))
  return _matmul(roots, normal).reshape(_TOKENS, -1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def greedy_rotation(
  key: Key, x: jax.Array, block: int, steps: int
) -> tuple[jax.Array, jax.Array]:
  """A product of rotations, each of which spreads the largest number left.

  Each is random but for its row of the channel that has the largest magnitude:
  there that channel's own entry is 1 / sqrt(block). Of all products R_1 ... R_j
  the one is kept behind which largest and least number are closest, the first
  of equal ones.

  Args:
    key: of the random parts.
    x: activations (tokens, in), whose blocks are rotated alike.
    block: channels of a block, at least 2, which divides all of them.
    steps: how many rotations there are.

  Returns:
    The rotation (block, block), by which a block is multiplied as a row; and
    the distance of the largest from the least number before the first and
    after each of the `steps`, (steps + 1,). Both float32.
  """
  rows = x.astype(jnp.float32).reshape(-1, block)
  base = jnp.asarray(base_rotation(block), jnp.float32)
  shape = steps, block - 1, block - 1
  mixes, _ = jnp.linalg.qr(jax.random.normal(key, shape, jnp.float32))

  def turn(carry, mix):
    rows, rotation, kept, least = carry
    mixed = jnp.concatenate([base[:, :1], _matmul(base[:, 1:], mix)], axis=1)
    place = _swap(block, jnp.argmax(jnp.abs(rows)) % block)
    own = mixed[place][:, place]
    rows, rotation = _matmul(rows, own), _matmul(rotation, own)
    peak = _peak(rows)
    is_less = peak < least
    kept = jnp.where(is_less, rotation, kept)
    return (rows, rotation, kept, jnp.minimum(peak, least)), peak

  start, eye = _peak(rows), jnp.eye(block, dtype=jnp.float32)
  carry, peaks = lax.scan(turn, (rows, eye, eye, start), mixes)
  return carry[2], jnp.concatenate([start[None], peaks])


def base_rotation(n: int) -> np.ndarray:
  """A rotation (n, n) whose first row is 1 / sqrt(n) everywhere; float64.

  It is a product of rotations of the rows i and i + 1 for i from 0 to n - 2,
  with the first and last row and column swapped.
  """
  rotation = np.eye(n)
  for i in range(n - 1):
    c, s = np.array([1, np.sqrt(i + 1)]) / np.sqrt(i + 2)
    rotation[i : i + 2] = np.array([[c, -s], [s, c]]) @ rotation[i : i + 2]
  place = np.arange(n)
  place[[0, -1]] = place[[-1, 0]]
  return rotation[np.ix_(place, place)]


def _swap(n: int, i: jax.Array) -> jax.Array:
  """0 ... n - 1 with 0 and i in each other's place."""
  return jnp.arange(n, dtype=jnp.int32).at[0].set(i).at[i].set(0)


def _peak(x: jax.Array) -> jax.Array:
  return jnp.max(x) - jnp.min(x)
