"""Where the blocks of a weight lie: what the name and shape of a leaf tell.

Blocks lie along the axes that a product contracts. Where a weight contracts
several, blocks lie along the last of them if they divide it, and run through
all of them together otherwise, so that small axes are not padded.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lowbit_jax import formats, qarray
from lowbit_jax._typing import Axis, Shape
from lowbit_jax.formats import BlockFormat

_ATTENTION = {'query': (-3,), 'key': (-3,), 'value': (-3,), 'out': (-3, -2)}


class Layout(NamedTuple):
  """How a weight is contracted.

  Attributes:
    contracted: the contracted axes, negative and ascending.
    rank: rank of the weight; axes in front of it are stacked layers.
  """

  contracted: tuple[int, ...]
  rank: int


def known_layout(
  path: str, leaves: Mapping[str, Any], layers: int = 0
) -> Layout | None:
  """The layout that the names of Flax and shapes tell, None if they do not.

  A bias has the shape of the axes that are not contracted.

  Args:
    path: of a leaf, such as 'block_0/attention/out/kernel'.
    leaves: all leaves by path.
    layers: leading axes of the leaf that are stacked layers.
  """
  *parents, name = path.split('/')
  parent = parents[-1] if parents else ''
  rank = leaves[path].ndim - layers
  if name == 'embedding' and rank == 2:
    return Layout((-1,), rank)
  if name != 'kernel' or re.match(r'Einsum(_\d+)?$', parent):
    return None
  is_conv = re.search('conv', parent, re.IGNORECASE) is not None
  if rank == 2 or (rank > 2 and is_conv):
    return Layout(tuple(range(-rank, -1)), rank)
  if rank == 3 and parent in _ATTENTION and _is_attention(parents, leaves):
    return Layout(_ATTENTION[parent], rank)
  bias = leaves.get('/'.join([*parents, 'bias']))
  if rank > 2 and bias is not None and bias.ndim > layers:
    outputs = bias.ndim - layers
    if outputs < rank and bias.shape == (
      *leaves[path].shape[:layers],
      *leaves[path].shape[-outputs:],
    ):
      return Layout(tuple(range(-rank, -outputs)), rank)
  return None


def _is_attention(parents, leaves) -> bool:
  """Whether the siblings are the four projections of an attention."""

  def heads(name, start):
    leaf = leaves.get('/'.join([*parents[:-1], name, 'kernel']))
    if leaf is None or leaf.ndim < 3:
      return name
    return leaf.shape[-3:][start : start + 2]

  own = {heads(n, 1) for n in ('query', 'key', 'value')} | {heads('out', 0)}
  return len(own) == 1


def block_axis(layout: Layout, fmt: BlockFormat, shape: Shape) -> Axis:
  """The `axis` of `quantize` for a weight.

  Args:
    layout: how it is contracted.
    fmt: the format. Tiles span the last contracted axis and the last one.
    shape: of the weight.
  """
  last = layout.contracted[-1]
  if fmt.is_tile:
    return (-2, -1) if last == -1 else (last, -1)
  adjacent = [last]
  for axis in reversed(layout.contracted[:-1]):
    if axis != adjacent[0] - 1:
      break
    adjacent.insert(0, axis)
  is_whole = qarray.padding(shape, fmt, (last,)) == (0,)
  return last if is_whole or len(adjacent) == 1 else tuple(adjacent)


def fitting_format(fmt: BlockFormat, size: int) -> BlockFormat | None:
  """The format like `fmt` with the largest blocks that divide `size`, or None.

  Args:
    fmt: a format with blocks along one axis.
    size: elements along the axis.
  """

  def kind(f):
    parts = f.tensor_scale, f.zero_point, f.minimum, f.scale_blocks, f.is_tile
    return f.element, f.scale, parts

  blocks = (formats.get(name) for name in formats.names('block'))
  same = [
    f
    for f in blocks
    if isinstance(f, BlockFormat)
    and kind(f) == kind(fmt)
    and f.block[0]
    and size % f.block[0] == 0
  ]
  return max(same, key=lambda f: f.block[0], default=None)
