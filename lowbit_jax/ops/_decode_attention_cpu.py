"""Decode attention by a kernel for CPUs.

It is a primitive. On CPU it is lowered to the kernel; on other platforms, where
a partitioner splits its operands, and in programs that are exported, since
other processes do not know the kernel, to the loop over chunks of XLA.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from lowbit_jax import cpu
from lowbit_jax.cpu import _primitive
from lowbit_jax.ops._dispatch import Plan

_ENDLESS = np.iinfo(np.int32).max  # a window


def plan(
  by_xla: Callable,
  query: Any,
  keys: Any,
  values: Any,
  lengths: Any,
  layer: Any,
  window: Any,
  scale: float,
) -> Plan:
  """Plans a kernel.

  Args:
    by_xla: the operation of these operands, from `query` to `window`, and of
      the keyword `scale`, by XLA.
    query, keys, values, lengths, layer, window, scale: as in the operation.
  """
  del lengths, layer, window
  if (why := cpu.why_not()) is None:
    why = _why_not(query, keys, values)
  if why is not None:
    raise NotImplementedError(why)
  return Plan(
    'reads each position once, on the threads of XLA',
    functools.partial(_attend, by_xla=by_xla, scale=scale),
    is_portable=True,
  )


def _why_not(query: Any, keys: Any, values: Any) -> str | None:
  """Why there is no kernel for these operands, or None."""
  from lowbit_jax.cpu import _attention

  shapes = query.shape, keys.shape, values.shape
  if not all(isinstance(n, int) for shape in shapes for n in shape):
    return 'shapes are symbolic'
  return _attention.why_not(_kind(keys, values))


def _kind(keys: Any, values: Any):
  """What the kernel for a cache must know of it."""
  from lowbit_jax.cpu._attention import Kind

  names = keys.dtype.name, values.dtype.name
  return Kind(*names, keys.shape[-1], values.shape[-1])


def _attend(
  query, keys, values, lengths, layer, window, *, by_xla: Callable, scale: float
) -> jax.Array:
  if layer is None:
    keys, values, layer = keys[None], values[None], 0
  if window is None:
    window = _ENDLESS
  lengths = jnp.broadcast_to(lengths, query.shape[:1])
  layer, window = (
    jnp.broadcast_to(jnp.asarray(n, jnp.int32), (1,)) for n in (layer, window)
  )
  rows = query.astype(jnp.float32) * scale
  arrays = rows, keys, values, lengths, layer, window
  return _attention.bind(*arrays, by_xla=by_xla).astype(query.dtype)


def _shape(query, keys, values, *integers, by_xla):
  del keys, integers, by_xla
  return ShapedArray((*query.shape[:3], values.shape[-1]), jnp.float32)


def _by_loop(query, keys, values, lengths, layer, window, *, by_xla):
  layer = jnp.clip(layer[0], 0, keys.shape[0] - 1)
  arrays = query, keys, values, lengths, layer, window[0]
  return by_xla(*arrays, scale=1.0)


def _by_kernel(query, keys, values, *integers, by_xla):
  del by_xla
  from lowbit_jax.cpu import _attention as kernels

  shape = *query.shape[:3], values.shape[-1]
  name = kernels.target_name(_kind(keys, values))
  out = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.ffi.ffi_call(name, out)(query, keys, values, *integers)


def _batched(operands, axes, **how):
  """More queries share a cache; or there are more sequences; or, where members
  differ in their layer, window or lengths alone, one after the other."""
  query, keys, values, *integers = operands
  is_shared = [axis is None for axis in axes]
  size = next(
    a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None
  )
  attend = functools.partial(_attention.bind, **how)

  if all(is_shared[1:]):
    # (tokens, kv_heads, members, groups).
    batch, tokens, heads, width = np.delete(query.shape, axes[0])
    kv_heads = keys.shape[3]
    query = jnp.moveaxis(query, axes[0], 0)
    query = query.reshape(size, batch, tokens, kv_heads, -1, width)
    query = jnp.moveaxis(query, 0, 3).reshape(batch, tokens, -1, width)
    out = attend(query, keys, values, *integers)
    out = out.reshape(batch, tokens, kv_heads, size, -1, values.shape[-1])
    return jnp.moveaxis(out, 3, 0).reshape(size, batch, tokens, heads, -1), 0

  lengths, layer, window = integers
  if is_shared[4] and is_shared[5] and not (is_shared[1] and is_shared[2]):
    query, keys, values, lengths = (
      _together(a, axis, size, place)
      for a, axis, place in zip(
        (query, keys, values, lengths), axes, (0, 1, 1, 0), strict=False
      )
    )
    out = attend(query, keys, values, lengths, layer, window)
    return out.reshape(size, -1, *out.shape[1:]), 0

  moving = [
    jnp.moveaxis(a, d, 0)
    for a, d in zip(operands, axes, strict=True)
    if d is not None
  ]

  def member(some):
    rest = iter(some)
    return attend(
      *(
        a if same else next(rest)
        for a, same in zip(operands, is_shared, strict=True)
      )
    )

  return lax.map(member, moving), 0


def _together(x: jax.Array, axis: int | None, size: int, place: int):
  """Members of a batch along an axis that there is already."""
  if axis is None:
    shape = x.shape
    x = jnp.broadcast_to(
      jnp.expand_dims(x, place), (*shape[:place], size, *shape[place:])
    )
  else:
    x = jnp.moveaxis(x, axis, place)
  return x.reshape(*x.shape[:place], -1, *x.shape[place + 2 :])


# Of query (batch, tokens, heads, size), keys and values (layers, batch,
# positions, kv_heads, size), lengths (batch,), layer (1,) and window (1,).
_attention = _primitive.primitive(
  'lowbit_decode_attention', _shape, _by_loop, _by_kernel, _batched
)
