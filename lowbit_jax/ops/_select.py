"""Asking which implementation an operation would use."""

import functools
import inspect
from typing import Any

from lowbit_jax._typing import Implementation
from lowbit_jax.ops import (
  _decode_attention,
  _dispatch,
  _dot,
  _quantize,
  _ragged,
  _softmax,
)

_OPS = {
  'quantize': (_quantize.TABLE, _quantize.operands),
  'dot': (_dot.TABLE, _dot.dot_operands),
  'dot_general': (_dot.TABLE, _dot.dot_general_operands),
  'einsum': (_dot.TABLE, _dot.einsum_operands),
  'ragged_dot': (_ragged.TABLE, _ragged.operands),
  'decode_attention': (_decode_attention.TABLE, _decode_attention.operands),
  **{
    kind: (_softmax.TABLE, functools.partial(_softmax.operands, kind))
    for kind in _softmax.forms.KINDS
  },
}


def implementations(op: str) -> tuple[str, ...]:
  """Names of the implementations of an operation, preferred first."""
  return tuple(_op(op)[0])


def select_implementation(
  op: str,
  *args: Any,
  implementation: Implementation = None,
  platform: str | None = None,
  **kwargs: Any,
) -> _dispatch.Choice:
  """What `op(*args, **kwargs)` would run on a platform, without running it.

  The first implementation that supports the operands is chosen:

    op        implementation   supports
    quantize  tpu, mosaic_gpu  blocks with scales along the last axis, without
                               zero points; scales of 8 bits or float32
              xla              everything
    dot...    tpu, mosaic_gpu  two QArray matrices in blocks along the axis that
                               is contracted, with values that bfloat16 or int8
                               holds exactly, or fp8 in 1x128 and 128x128;
                               any operand with a QArray in blocks along such
                               an axis, on either side of it, or times a
                               Prepacked weight
              cpu              float arrays, or QArrays that are decoded, times
                               a QArray in blocks along such an axis, which may
                               be tiles, or a Member of a stack of them
              xla              everything, by an int32 product, a scan over
                               tiles of the weight, or dequantized operands
    ragged    cpu              what cpu supports of dot, a matrix at a time
              xla              everything, one group after the other
    decode... cpu              keys and values of a multiple of 8 elements
              xla              everything, one chunk of positions at a time
    softmax   tpu, mosaic_gpu  rows that fit into the memory of a kernel, with
    and kin                    exp='degree5'
              xla              everything

  Args:
    op: 'quantize', 'dot', 'dot_general', 'einsum', 'ragged_dot', 'softmax',
      'log_softmax', 'logsumexp' or 'decode_attention'.
    *args: its arguments; `jax.ShapeDtypeStruct` leaves will do.
    implementation: as in the operation.
    platform: 'cpu', 'gpu' or 'tpu'; None for that of the default device.
    **kwargs: its keyword arguments.

  Returns:
    A `Choice`: the name, a sentence on how it computes, and the reasons of the
    implementations that refused.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> lowbit.select_implementation(
    ...   'dot', jnp.ones((1, 64)), w, implementation='xla'
    ... ).note
    'scan over tiles of the weight'
  """
  table, operands = _op(op)
  try:
    inspect.signature(operands).bind(*args, **kwargs)
  except TypeError as error:
    raise TypeError(
      f'select_implementation({op!r}, ...) takes the arguments of {op}: {error}'
    ) from None
  args = operands(*args, **kwargs)
  return _dispatch.select(op, table, implementation, *args, platform=platform)[
    0
  ]


def _op(op: str):
  if not isinstance(op, str) or op not in _OPS:
    raise ValueError(f'{op=} is not one of {tuple(_OPS)}')
  return _OPS[op]
