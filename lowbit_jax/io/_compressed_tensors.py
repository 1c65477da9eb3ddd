"""The layouts of compressed-tensors.

Each quantized module has a `weight_scale`. The configuration sorts modules into
groups by name or by class; a group says how many bits a weight has, which
numbers share a scale, and how all that is packed.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowbit_jax import formats
from lowbit_jax.formats import BlockFormat, ElementFormat
from lowbit_jax.io import _bits, _layouts
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.io._layouts import Leaf, Parts, choice, expect, field

_MARKER = 'weight_scale'
_STEPS = 1e7  # of matching a regular expression

_Layout = Callable[[Parts, Mapping[str, Any]], Tensor]


def _plan(module: str, parts: Parts, settings: Mapping[str, Any]) -> Tensor:
  """How one weight is read, as its group in the configuration says."""
  if field(settings, 'transform_config', dict):
    raise ValueError('it is to be used with transforms, which are not read')
  if sparsity := field(settings, 'sparsity_config', dict):
    choice(sparsity, 'format', ('dense',))
  group = _group(module, settings)
  named = group if group.get('format') is not None else settings
  name = choice(named, 'format', tuple(_LAYOUTS))
  tensor = _LAYOUTS[name](parts, group['weights'])
  layout = f'compressed-tensors {name}'
  return tensor._replace(
    layout=layout + ', act-order' * _is_moved(group['weights'])
  )


def _group(module: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration of the group that a module belongs to."""
  for pattern in field(settings, 'ignore', list, []):
    if _rank(module, pattern) in (0, 1):
      raise ValueError(
        f'the configuration ignores its module ({pattern!r:.80}), but it has a'
        f' {_MARKER}'
      )
  ranked: dict[int, list[dict[str, Any]]] = {}
  for group in field(settings, 'config_groups', dict, {}).values():
    if not isinstance(group, dict):
      raise ValueError('a group of its configuration is no object')
    if not field(group, 'weights', dict):
      continue  # of activations or caches
    ranks = [_rank(module, t) for t in field(group, 'targets', list, [])]
    rank = min((r for r in ranks if r is not None), default=None)
    if rank is not None:
      ranked.setdefault(rank, []).append(group)
  if not ranked:
    raise ValueError('no group of its configuration has it as a target')
  best = ranked[min(ranked)]
  if any(group != best[0] for group in best):
    raise ValueError('several groups of its configuration have it as a target')
  return best[0]


def _rank(module: str, target: Any) -> int | None:
  """How a target names a module: 0 itself, 1 a pattern, 2 perhaps its class,
  which files do not tell; None not at all."""
  if not isinstance(target, str):
    raise ValueError(f'the target {target!r:.80} is no string')
  if target == module:
    return 0
  if target.startswith('re:'):
    return 1 if _matches(target[3:], module) else None
  return 2 if target.isidentifier() and target[0].isupper() else None


def _matches(pattern: str, name: str) -> bool:
  """Whether a pattern of the configuration matches, in bounded time."""
  # Unless quantifiers are nested, backtracking tries at most all ends of all
  # that is repeated, for each choice of branches.
  plain = re.sub(r'\(\?[:=!<]+', '(', pattern)
  plain = re.sub(r'\[[^]]*\]', 'x', re.sub(r'\\.', 'x', plain))
  quantifiers = len(re.findall(r'[*+?{]', plain))
  steps = math.comb(len(name) + quantifiers, quantifiers)
  if bars := plain.count('|'):
    steps *= (1 + bars) ** (1 + plain.count('('))
  if steps > _STEPS or re.search(r'\)[*+{]', plain):
    raise ValueError(f'the pattern {pattern!r:.80} may take too long to match')
  try:
    return re.match(pattern, name) is not None
  except (re.error, RecursionError, OverflowError) as error:
    raise ValueError(f'the pattern {pattern!r:.80}: {error}') from error


def _scaled(
  parts: Parts,
  weights: Mapping[str, Any],
  shape: tuple[int, ...],
  element: ElementFormat,
  codes: Leaf,
  zero_point: Callable[[tuple[int, ...]], Leaf] | None = None,
) -> Tensor:
  """A weight of integers or floats with the scales that `weights` describe.

  Args:
    parts: of the weight.
    weights: the configuration of its group.
    shape: of the weight.
    element: of its codes.
    codes: reads them.
    zero_point: from the shape of the scales to what reads the zero points.
  """
  part = parts[_MARKER]
  scale = _layouts.float_scale(part)
  # The codes of tiles would have to be packed along columns.
  known = ('tensor', 'channel', 'group') + ('block',) * (element.bits == 8)
  strategy = choice(_with_strategy(weights), 'strategy', known)
  if zero_point and strategy not in ('channel', 'group'):
    raise ValueError(f'zero points with {strategy=} are not read')
  if not zero_point:
    codes = _without_zeros(parts, codes)
  order = _order(parts, weights, shape[-1])
  if strategy == 'tensor':
    number = _layouts.numbers(_layouts.scalar(part))
    leaves = _layouts.Leaves(codes, tensor_scale=number)
    fmt = formats.per_tensor(element)
    return _layouts.tensor(parts, shape, fmt, leaves)
  if strategy == 'channel':
    fmt = _layouts.channel(element, scale, zero_point is not None)
    block = shape[-1:]
  elif strategy == 'group':
    size = _positive(weights.get('group_size'))
    fmt, block = _layouts.group(element, size, scale), (size,)
  else:
    structure = field(weights, 'block_structure', list, [])
    if len(structure) != 2:
      raise ValueError(f'block_structure={structure!r:.80} is no tile')
    block = (_positive(structure[0]), _positive(structure[1]))
    fmt = _layouts.tile(element, block, scale)
  counts = _layouts.blocks(shape, block)
  expect(part, tuple(_layouts.FLOAT_SCALES), counts)
  leaves = _layouts.Leaves(
    codes,
    _layouts.numbers(part),
    zero_point=zero_point and zero_point(counts),
    order=order,
  )
  return _layouts.tensor(parts, shape, fmt, leaves)


def _with_strategy(weights: Mapping[str, Any]) -> Mapping[str, Any]:
  """`weights` with the strategy that its group size means, if it has none."""
  if weights.get('strategy') is not None:
    return weights
  size = weights.get('group_size')
  name = 'tensor' if size is None else 'channel' if size == -1 else 'group'
  return {**weights, 'strategy': name}


def _positive(value: Any) -> int:
  if type(value) is not int or not 0 < value < 2**31:
    raise ValueError(f'its blocks have the size {value!r:.80}')
  return value


def _is_symmetric(weights: Mapping[str, Any]) -> bool:
  return field(weights, 'symmetric', bool, True)


def _is_moved(weights: Mapping[str, Any]) -> bool:
  """Whether columns are grouped in another order than they lie in."""
  return weights.get('actorder') in (True, 'group', 'dynamic')


def _order(parts: Parts, weights: Mapping[str, Any], size: int) -> Leaf | None:
  """What reads the columns in the order of their groups."""
  if 'weight_g_idx' not in parts and not _is_moved(weights):
    return None
  choice(_with_strategy(weights), 'strategy', ('group',))
  group = _positive(weights.get('group_size'))
  return _layouts.order_of_groups(parts['weight_g_idx'], size, group)


def _without_zeros(parts: Parts, leaf: Leaf) -> Leaf:
  """`leaf` of a symmetric weight, whose zero points, if stored, are zero."""
  if 'weight_zero_point' not in parts:
    return leaf
  part = parts['weight_zero_point']

  def check() -> None:
    if part.read().astype(np.float32).any():
      raise ValueError(f'{part.name!r} of a symmetric weight is not zero')

  return _layouts.after(check, leaf)


def _pack_quantized(parts: Parts, weights: Mapping[str, Any]) -> Tensor:
  choice({'type': 'int', **weights}, 'type', ('int',))
  widths = (2, 3, 4, 5, 6, 7, 8)
  bits = choice({'num_bits': 8, **weights}, 'num_bits', widths)
  symmetric = _is_symmetric(weights)
  packed = expect(parts['weight_packed'], ('I32',))
  shape = _shape(parts['weight_shape'], packed)
  is_dense = _is_dense(packed, shape[-1], bits)

  def codes() -> np.ndarray:
    data = _dense(packed.read(), bits, is_dense)
    return data ^ sign_bits(bits, data.shape[-1]) if symmetric else data

  def zero_point(counts: tuple[int, ...]) -> Leaf:
    # Packed along the rows of the weight.
    *lead, size, groups = counts
    part = parts['weight_zero_point']
    expect(part, ('I32',), (*lead, _words(size, bits, is_dense), groups))

    def read() -> np.ndarray:
      words = np.ascontiguousarray(part.read().swapaxes(-1, -2))
      zeros = _bits.unpack(_dense(words, bits, is_dense), bits)
      return zeros[..., :size].swapaxes(-1, -2)

    return read

  element = _layouts.integer(bits, signed=symmetric)
  zeros = None if symmetric else zero_point
  return _scaled(parts, weights, shape, element, codes, zeros)


def _shape(part: Stored, packed: Stored) -> tuple[int, ...]:
  """The shape of a packed weight, which has a tensor of its own."""
  expect(part, ('I64', 'I32'), (len(packed.shape),))
  shape = tuple(part.read().tolist())
  if len(shape) < 2 or shape[:-1] != packed.shape[:-1] or min(shape) < 1:
    raise ValueError(
      f'{part.name!r} is {shape}, {packed.name!r} has the shape {packed.shape}'
    )
  return shape


def _words(size: int, bits: int, is_dense: bool) -> int:
  """Words of 32 bits that so many codes fill."""
  return -(-size * bits // 32) if is_dense else -(-size // (32 // bits))


def _is_dense(packed: Stored, size: int, bits: int) -> bool:
  """Whether codes run on from word to word.

  Files of before June 2026 have as many whole codes of 3, 5, 6 or 7 bits in
  each word as fit, and say so nowhere: the width tells.
  """
  widths = [_words(size, bits, is_dense) for is_dense in (True, False)]
  if packed.shape[-1] not in widths:
    raise ValueError(
      f'{packed.name!r} has rows of {packed.shape[-1]} words; {size} numbers of'
      f' {bits} bits fill {widths[0]}, or in old files {widths[1]}'
    )
  if is_ambiguous(size, bits):
    raise ValueError(
      f'{packed.name!r} may be packed as in old or in new files: its rows of'
      f' {size} numbers of {bits} bits have the same width in both'
    )
  return packed.shape[-1] == widths[0]


def is_ambiguous(size: int, bits: int) -> bool:
  """Whether rows have one width, but other words, in old and in new files."""
  dense, padded = (_words(size, bits, d) for d in (True, False))
  return dense == padded > 1 and 32 % bits != 0


def _dense(words: np.ndarray, bits: int, is_dense: bool) -> np.ndarray:
  """The bytes of words, whose codes then run on without gaps."""
  if is_dense:
    return words.view(np.uint8)
  codes = np.empty((*words.shape, 32 // bits), np.uint8)
  for k in range(32 // bits):
    codes[..., k] = words >> (k * bits) & (2**bits - 1)
  return _bits.pack(codes.reshape(*words.shape[:-1], -1), bits)


def sign_bits(bits: int, size: int) -> np.ndarray:
  """Bytes with the top bit of each code: what offset binary differs by."""
  period = _bits.pack(np.full(8, 2 ** (bits - 1), np.uint8), bits)
  return np.resize(period, size)


def _int_quantized(parts: Parts, weights: Mapping[str, Any]) -> Tensor:
  choice({'type': 'int', **weights}, 'type', ('int',))
  symmetric = _is_symmetric(weights)
  weight = expect(parts['weight'], ('I8',))
  shape = _layouts.rows(weight)
  if symmetric:
    return _scaled(parts, weights, shape, formats.int8, _layouts.raw(weight))

  def zero_point(counts: tuple[int, ...]) -> Leaf:
    return _offset(expect(parts['weight_zero_point'], ('I8',), counts))

  codes = _offset(weight)
  return _scaled(parts, weights, shape, formats.uint8, codes, zero_point)


def _offset(part: Stored) -> Leaf:
  """Reads signed bytes as unsigned ones, larger by 128."""
  return lambda: part.read().view(np.uint8) ^ 0x80


def _float_quantized(parts: Parts, weights: Mapping[str, Any]) -> Tensor:
  _check_float(weights, 8)
  weight = expect(parts['weight'], ('F8_E4M3',))
  shape = _layouts.rows(weight)
  return _scaled(parts, weights, shape, formats.e4m3fn, _layouts.raw(weight))


def _nvfp4(parts: Parts, weights: Mapping[str, Any]) -> Tensor:
  _check_float(weights, 4)
  choice(weights, 'strategy', ('tensor_group',))
  choice(weights, 'group_size', (16,))
  packed = expect(parts['weight_packed'], ('U8',))
  *lead, width = _layouts.rows(packed)
  shape = (*lead, 2 * width)
  scale = expect(parts[_MARKER], ('F8_E4M3',), _layouts.blocks(shape, (16,)))
  divisor = expect(parts['weight_global_scale'], ('F32',), (), (1,))

  def tensor_scale() -> np.ndarray:
    number = divisor.read()
    if not (number > 0).all():
      raise ValueError(f'{divisor.name!r} is {number}; it divides')
    with np.errstate(over='ignore'):
      return 1 / number

  leaves = _layouts.Leaves(
    _layouts.raw(packed), _layouts.raw(scale), tensor_scale
  )
  return _layouts.tensor(parts, shape, formats.nvfp4, leaves)


def _microscaling(role: str, dtype: str, fmt: BlockFormat) -> _Layout:
  """A layout of OCP microscaling formats, whose codes lie in `role`."""
  bits = fmt.element.bits

  def read(parts: Parts, weights: Mapping[str, Any]) -> Tensor:
    _check_float(weights, bits)
    choice(weights, 'group_size', (32,))
    packed = expect(parts[role], (dtype,))
    *lead, width = _layouts.rows(packed)
    if width * 8 % bits:
      raise ValueError(f'{packed.name!r} has rows of {width} bytes')
    shape = (*lead, width * 8 // bits)
    scale = expect(
      parts[_MARKER], _layouts.EXPONENT_SCALES, _layouts.blocks(shape, (32,))
    )
    leaves = _layouts.Leaves(_layouts.raw(packed), _layouts.raw(scale))
    return _layouts.tensor(parts, shape, fmt, leaves)

  return read


def _check_float(weights: Mapping[str, Any], bits: int) -> None:
  choice(weights, 'type', ('float',))
  choice({'num_bits': 8, **weights}, 'num_bits', (bits,))
  if not _is_symmetric(weights):
    raise ValueError('floats with zero points are not read')


_PACKED = ('weight_packed', 'U8')
_LAYOUTS: dict[str, _Layout] = {
  'pack-quantized': _pack_quantized,
  'int-quantized': _int_quantized,
  'float-quantized': _float_quantized,
  'nvfp4-pack-quantized': _nvfp4,
  'mxfp4-pack-quantized': _microscaling(*_PACKED, formats.mxfp4),
  'mxfp6-pack-quantized': _microscaling(*_PACKED, formats.mxfp6_e2m3),
  'mxfp8-quantized': _microscaling('weight', 'F8_E4M3', formats.mxfp8_e4m3),
}
LAYOUT = _layouts.Layout(
  _MARKER,
  (
    *('weight', 'weight_packed', 'weight_shape', 'weight_zero_point'),
    *('weight_global_scale', 'weight_g_idx'),
  ),
  _plan,
)
