"""GPTQ and AWQ: codes and zero points in words of 32 bits, inputs first.

A module has `qweight`, `qzeros` and `scales`, and its weight stands for
(q - z) * scale. They are read as rows of outputs, as other weights are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.io import _bits, _layouts
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.io._layouts import Parts, choice, expect, field

_MARKER = 'qweight'
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word


def _gptq(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How one weight of GPTQ is read."""
  del module
  bits = choice(settings, 'bits', (2, 3, 4, 8))
  version = _version(settings)
  if field(settings, 'dynamic', dict):
    raise ValueError('configurations with dynamic rules are not read yet')
  words = expect(parts[_MARKER], ('I32',))
  height, outputs = _layouts.rows(words)
  if height % bits:
    raise ValueError(
      f'{words.name!r} has {height} rows of words of {bits} bits'
    )
  inputs = height * 32 // bits
  group, scale, fmt = _groups(parts, settings, bits, inputs, outputs)
  groups = -(-inputs // group)
  zeros = expect(parts['qzeros'], ('I32',), (groups, -(-outputs * bits // 32)))

  def codes() -> np.ndarray:
    # The bytes of a word, and then the words, follow each other along inputs.
    return np.ascontiguousarray(words.read().T).view(np.uint8)

  def zero_point() -> np.ndarray:
    stored = _bits.unpack(zeros.read().view(np.uint8), bits)[:, :outputs]
    if version == 1:
      if (stored == 2**bits - 1).any():
        raise ValueError(
          f'{zeros.name!r} holds {2**bits - 1}, which stands for {2**bits} in'
          ' some programs and for 0 in others'
        )
      stored = stored + np.uint8(1)
    return np.ascontiguousarray(stored.T)

  is_moved, order = field(settings, 'desc_act', bool, False), None
  if is_moved or 'g_idx' in parts:
    order = _layouts.order_of_groups(parts['g_idx'], inputs, group)
  leaves = _layouts.Leaves(
    codes, _transposed(scale, fmt.scale), zero_point=zero_point, order=order
  )
  tensor = _layouts.tensor(parts, (outputs, inputs), fmt, leaves)
  # With static groups columns are quantized, but not grouped, in that order.
  is_moved = is_moved and not field(settings, 'static_groups', bool, False)
  layout = f'GPTQ {bits} bits, version {version}'
  return tensor._replace(layout=layout + ', act-order' * is_moved)


def _awq(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How one weight of AWQ is read."""
  del module
  choice(settings, 'bits', (4,))
  choice(settings, 'zero_point', (True,))
  choice(settings, 'version', ('gemm', 'GEMM'))
  words = expect(parts[_MARKER], ('I32',))
  inputs, width = _layouts.rows(words)
  outputs = 8 * width
  group, scale, fmt = _groups(parts, settings, 4, inputs, outputs)
  zeros = expect(parts['qzeros'], ('I32',), (-(-inputs // group), width))

  def codes() -> np.ndarray:
    return _bits.pack(_awq_nibbles(words.read()), 4)

  def zero_point() -> np.ndarray:
    return _awq_nibbles(zeros.read())

  leaves = _layouts.Leaves(
    codes, _transposed(scale, fmt.scale), zero_point=zero_point
  )
  tensor = _layouts.tensor(parts, (outputs, inputs), fmt, leaves)
  return tensor._replace(layout='AWQ gemm')


def _version(settings: Mapping[str, Any]) -> int:
  """2 where zero points are stored as they are, 1 where less by one."""
  for name in ('checkpoint_format', 'format'):
    if settings.get(name) is not None:
      version = choice(settings, name, ('gptq', 'gptq_v2'))
      return 2 if version == 'gptq_v2' else 1
  return 1


def _groups(
  parts: Parts,
  settings: Mapping[str, Any],
  bits: int,
  inputs: int,
  outputs: int,
) -> tuple[int, Stored, BlockFormat]:
  """Inputs that share a scale, the scales, and the format."""
  size = field(settings, 'group_size', int, -1)
  if size != -1 and not 0 < size < 2**31:
    raise ValueError(f'{size=} is no size of a group')
  group = inputs if size == -1 else size
  part = parts['scales']
  scale = _layouts.float_scale(part)
  expect(part, (part.dtype,), (-(-inputs // group), outputs))
  element = _layouts.integer(bits, signed=False)
  if size == -1:
    return group, part, _layouts.channel(element, scale, True)
  return group, part, _layouts.group(element, size, scale)


def _transposed(part: Stored, fmt: FloatFormat | None) -> _layouts.Leaf:
  assert fmt is not None
  dtype = np.dtype(fmt.name)
  return lambda: np.ascontiguousarray(part.read().T.astype(dtype))


def _awq_nibbles(words: np.ndarray) -> np.ndarray:
  """Codes (outputs, n) of words (n, outputs / 8)."""
  codes = np.empty((8 * words.shape[1], words.shape[0]), np.uint8)
  for k, output in enumerate(_AWQ_OUTPUTS):
    codes[output::8] = (words >> (4 * k) & 15).T
  return codes


GPTQ = _layouts.Layout(_MARKER, ('qzeros', 'scales', 'g_idx'), _gptq)
AWQ = _layouts.Layout(_MARKER, ('qzeros', 'scales'), _awq)
