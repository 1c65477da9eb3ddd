"""Gradients in a few bits, for the exchange between workers.

Both transformations give the numbers that the other workers would decode. They
belong before the mean over workers, inside `shard_map` or `pmap`, with another
seed for each worker.

Sources: Alistarh et al., QSGD (2017); Karimireddy et al., Error Feedback Fixes
SignSGD (2019).
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowbit_jax import _quantize as core, ops, qarray
from lowbit_jax._tree import path_name
from lowbit_jax._typing import Key
from lowbit_jax.formats import BlockFormat, IntFormat, float32 as _float32
from lowbit_jax.qarray import QArray
from lowbit_jax.training.optimizers._common import (
  check_real,
  check_steps,
  increment,
  safe_norm,
)

_FLOAT32 = jnp.finfo(jnp.float32)


class QSGDState(NamedTuple):
  """Steps so far."""

  steps: jax.Array


class EFSignState(NamedTuple):
  """The part of the gradients that was not sent yet, float32."""

  error: optax.Updates


def qsgd_encode(
  x: jax.Array, key: Key, *, bits: int = 4, bucket: int = 512
) -> QArray:
  """The message of a worker: integers in [-s, s] and a norm for each bucket.

  x_i ~ ||x|| / s k_i with s = 2^(bits - 1) - 1 and k_i = s x_i / ||x||, rounded
  stochastically, so that the mean over keys is x_i.

  Args:
    x: float array of any magnitude, flattened for this. (That nothing overflows
      costs a twelfth of the time.)
    key: PRNG key.
    bits: bits of an integer with its sign, 2 to 8.
    bucket: elements that share a norm.

  Returns:
    A QArray of shape (x.size,); `nbytes` is the size of the message. Norms
    outside of float32 count as its ends, which leaves the mean as it is;
    subnormal x_i count as zero.
  """
  if not isinstance(bits, int) or not 2 <= bits <= 8:
    raise ValueError(f'bits={bits!r} must be an int in 2..8')
  check_steps('bucket', bucket)
  check_real('qsgd_encode', x)
  flat = x.reshape(-1)
  fmt = BlockFormat(
    f'qsgd{bits}',
    IntFormat(f'int{bits}', bits),
    (max(min(bucket, flat.size), 1),),
    _float32,
  )
  blocks = core.split(flat.astype(jnp.float32), fmt, (-1,))
  power, norm = safe_norm(blocks.view, blocks.inner)
  # Any step that takes the largest number is as unbiased.
  top = fmt.element.code_max
  least = jnp.where(norm > 0, float(_FLOAT32.tiny) * power, 0)
  step = jnp.maximum(norm / top, least)
  step = jnp.minimum(step, float(_FLOAT32.max) / top * power)
  q = ops.quantize_with(
    core.restore(blocks.view * power, blocks, jnp.float32),
    blocks.squeeze(step),
    fmt,
    rounding='stochastic',
    key=key,
  ).astype(x.dtype)
  return qarray.replace(q, scale=blocks.squeeze(step / power))


def qsgd(
  bits: int = 4, *, bucket: int = 512, seed: int | jax.Array = 0
) -> optax.GradientTransformation:
  """Rounds gradients as QSGD does: unbiased, and different in every step.

  Args:
    bits: as in `qsgd_encode`.
    bucket: as in `qsgd_encode`.
    seed: an int, which may be traced, such as `jax.lax.axis_index` of a worker.

  Returns:
    A transformation whose state is the number of steps.
  """
  if not isinstance(bits, int) or not 2 <= bits <= 8:
    raise ValueError(f'bits={bits!r} must be an int in 2..8')
  check_steps('bucket', bucket)

  def init(params):
    del params
    return QSGDState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    del params
    check_real('qsgd', updates)
    key = jax.random.fold_in(jax.random.key(seed), state.steps)

    def encode(path, g):
      name = path_name(path)
      leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
      if not g.size:
        return g
      q = qsgd_encode(g, leaf_key, bits=bits, bucket=bucket)
      return qarray.dequantize(q).reshape(g.shape)

    updates = jax.tree_util.tree_map_with_path(encode, updates)
    return updates, QSGDState(increment(state.steps))

  return optax.GradientTransformation(init, update)


def ef_sign() -> optax.GradientTransformation:
  """One bit per element, with error feedback.

  For each tensor of d elements, p = g + e; sends ||p||_1 / d sign(p), with
  sign(0) = 1, and keeps the rest e = p - sent. Up to any step, the sum of the
  messages and the rest is the sum of the gradients.

  Returns:
    A transformation with a float32 array of the shape of each parameter.
  """

  def init(params):
    return EFSignState(optax.tree.zeros_like(params, dtype=jnp.float32))

  def update(updates, state, params=None):
    del params
    check_real('ef_sign', updates)
    total = jax.tree.map(
      lambda g, e: g.astype(jnp.float32) + e, updates, state.error
    )
    sent = jax.tree.map(_signs, total)
    error = optax.tree.sub(total, sent)
    sent = jax.tree.map(lambda s, g: s.astype(g.dtype), sent, updates)
    return sent, EFSignState(error)

  return optax.GradientTransformation(init, update)


def _signs(p):
  # Not a sum of |p|, which may overflow where their mean does not.
  scale = jnp.sum(jnp.abs(p) / max(p.size, 1))
  return jnp.where(p < 0, -scale, scale)
