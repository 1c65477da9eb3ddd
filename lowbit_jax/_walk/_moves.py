"""Views of stored operands: the same weight, seen in another shape.

A move is what a primitive does to an array that it only rearranges. Done to the
leaves of a QArray it gives the QArray of the result, as long as blocks and
bytes stay whole; where they would not, `NotAView` says why.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax import _low_rank, _transformed, _tree, qarray
from lowbit_jax._low_rank import LowRank, Stored
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax.qarray import QArray

_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


class NotAView(Exception):
  """Why a result cannot be stored as the operand is."""


@dataclasses.dataclass(frozen=True)
class Move:
  """A rearrangement of an array.

  Attributes:
    weight: what it does to a QArray.
    axis: where an axis is found in the result, both counted from the front;
      raises NotAView if it does not stay whole.
    array: what it does to an array that has sizes of the second argument, or 1
      in their place, along its first axes; more axes follow. None if it has no
      such form.
    stack: what it does to a leaf that has only the first axes, as many as the
      second argument says; None if it may touch later ones.
  """

  weight: Callable[[QArray], QArray]
  axis: Callable[[int], int]
  array: Callable[[jax.Array, Sequence[int]], jax.Array] | None = None
  stack: Callable[[jax.Array, int], jax.Array] | None = None


# A function is what a view does to a stored operand of any kind.
View = Move | Callable[[Any], Any]


def apply(move: View, x: Stored) -> Any:
  """The view of a stored operand."""
  if not isinstance(move, Move):
    return move(x)
  if isinstance(x, QArray):
    return move.weight(x)
  if isinstance(x, Transformed):
    return _behind_transform(move, x)
  return _beside_term(move, x)


def _behind_transform(move: Move, x: Transformed) -> Transformed:
  """The transform stays with the axis that it acts on, and with its stack."""
  weight = move.weight(x.weight)
  axis = move.axis(x.ndim + x.axis) - weight.ndim
  if weight.shape[axis] != x.shape[x.axis]:
    raise NotAView('its transform needs the axis whole')
  if not x.stacked:
    return _transformed.replace(x, weight=weight, axis=axis, rank=weight.ndim)
  stack = move.stack
  if stack is None:
    raise NotAView('it is a stack of transformed weights')
  moved = _transformed.replace(x, weight=weight, axis=axis)
  return moved.with_transform(lambda leaf: stack(leaf, x.stacked))


def _beside_term(move: Move, x: LowRank) -> LowRank:
  """The factors move with the weight; their last axis stays."""
  array = move.array
  if array is None:
    raise NotAView('it has a low-rank term')
  weight: Any = x.weight
  if is_quantized(weight):
    weight = apply(move, weight)
  else:
    weight = array(weight, x.shape)
  a, b = array(x.a, x.shape), array(x.b, x.shape)
  return _low_rank.replace(x, weight=weight, a=a, b=b)


def refuse(reason: str) -> NoReturn:
  raise NotAView(reason)


def need(condition: bool, reason: str) -> None:
  if not condition:
    raise NotAView(reason)


def _axes(q: QArray) -> list[int]:
  """Block axes of the leaves, counted from the front."""
  return [len(q.codes.shape) + a for a in q.axes]


def _from_leaves(q: QArray, leaf: Callable, axes: Sequence[int]) -> QArray:
  """`q` with other leaves, whose block axes are counted from the front."""
  moved = jax.tree.map(leaf, q)
  rank = len(moved.codes.shape)
  return qarray.with_axes(moved, [a - rank for a in axes])


def _spanned(q: QArray) -> tuple[int, int]:
  """(first, count) of the axes that blocks span together; count 1 for one."""
  if not q.merged:
    return q.ndim + q.axes[0], 1
  axes = qarray.merged_axes(q)
  return q.ndim + axes[0], len(axes)


def _leaf_axis(q: QArray) -> Callable[[int], int]:
  """From an axis of the array to that of the leaves."""
  first, count = _spanned(q)
  return lambda d: d if d <= first else max(first, d - count + 1)


def _check_whole(q: QArray, keeps: Callable[[int], bool]) -> None:
  """Refuses what touches the axes that blocks span together."""
  if q.merged:
    first, count = _spanned(q)
    whole = all(keeps(d) for d in range(first, first + count))
    need(whole, 'its blocks span axes together that are not kept whole')


def cast(dtype: Any) -> Callable:
  """As `convert_element_type`."""
  need(jnp.dtype(dtype) in map(jnp.dtype, _FLOATS), f'a cast to {dtype}')
  return lambda x: x.astype(dtype)


def transpose(permutation: Sequence[int]) -> Move:
  def weight(q):
    order = permutation
    first, count = _spanned(q)
    if q.merged:
      group = list(range(first, first + count))
      at = permutation.index(first)
      together = list(permutation[at : at + count]) == group
      need(together, 'blocks span axes that are separated')
      of_leaf = _leaf_axis(q)
      order = [of_leaf(d) for d in permutation if d not in group[1:]]
    axes = [order.index(a) for a in _axes(q)]
    return _from_leaves(q, lambda leaf: leaf.transpose(order), axes)

  def stack(leaf, stacked):
    kept = tuple(permutation[:stacked]) == tuple(range(stacked))
    need(kept, 'a stack of transformed weights')
    return leaf

  def array(x, shape):
    return x.transpose(*permutation, *range(len(shape), x.ndim))

  permutation = tuple(permutation)
  return Move(weight, permutation.index, array, stack)


def squeeze(dimensions: Sequence[int], ndim: int) -> Move:
  kept = [d for d in range(ndim) if d not in dimensions]

  def axis(d):
    need(d in kept, 'its block axis has size 1')
    return kept.index(d)

  def weight(q):
    _check_whole(q, kept.__contains__)
    own = _leaf_axis(q)
    gone = [own(d) for d in dimensions]
    rest = [d for d in range(len(q.codes.shape)) if d not in gone]
    need(all(a in rest for a in _axes(q)), 'its block axis has size 1')
    axes = [rest.index(a) for a in _axes(q)]
    return _from_leaves(q, lambda leaf: lax.squeeze(leaf, gone), axes)

  def array(x, shape):
    del shape
    return lax.squeeze(x, dimensions)

  def stack(leaf, stacked):
    return lax.squeeze(leaf, [d for d in dimensions if d < stacked])

  return Move(weight, axis, array, stack)


def broadcast(shape: Sequence[int], dimensions: Sequence[int]) -> Move:
  """As `broadcast_in_dim` that adds axes and repeats nothing else."""

  def weight(q):
    need(not q.merged, 'its blocks span several axes')
    sizes = [shape[n] for n in dimensions]
    need(sizes == list(q.shape), 'it is repeated along an axis of size 1')

    def leaf(x):
      own = [1 if x.size == 1 else n for n in shape]
      for d, n in enumerate(dimensions):
        own[n] = x.shape[d]
      return lax.broadcast_in_dim(x, own, dimensions)

    return _from_leaves(q, leaf, [dimensions[a] for a in _axes(q)])

  def array(x, old):
    need([shape[n] for n in dimensions] == list(old), 'it is repeated')
    own = [*shape, *x.shape[len(old) :]]
    for d, n in enumerate(dimensions):
      own[n] = x.shape[d]
    extra = range(len(shape), len(own))
    return lax.broadcast_in_dim(x, own, (*dimensions, *extra))

  return Move(weight, lambda d: dimensions[d], array)


def index(slices: Sequence[slice]) -> Callable:
  """As `slice`, one slice for each axis."""

  def part(x):
    # All of an axis by name: axes that blocks span are not cut.
    parts = [
      slice(None) if s.indices(n) == (0, n, 1) else s
      for s, n in zip(slices, x.shape, strict=True)
    ]
    if isinstance(x, Transformed) and parts[x.axis] != slice(None):
      refuse('its transform needs the axis whole')
    try:
      return x[tuple(parts)]
    except (IndexError, ValueError) as error:
      raise NotAView(str(error)) from None

  return part


def dynamic_slice(starts: Sequence[Any], sizes: Sequence[int]) -> Move:
  def weight(q):
    ndim, own = q.ndim, _leaf_axis(q)
    cut = [d for d in range(ndim) if sizes[d] != q.shape[d]]
    _check_whole(q, lambda d: d not in cut)
    at = {own(d): d for d in cut}
    need(
      not set(at) & set(_axes(q)), 'blocks are cut at a place that is traced'
    )

    def leaf(x):
      return _dynamic(x, {a: (starts[d], sizes[d]) for a, d in at.items()})

    return _from_leaves(q, leaf, _axes(q))

  def stack(leaf, stacked):
    cut = {
      d: (starts[d], sizes[d])
      for d in range(stacked)
      if sizes[d] != leaf.shape[d]
    }
    return _dynamic(leaf, cut)

  def array(x, shape):
    cut = [d for d, n in enumerate(shape) if sizes[d] != n]
    return _dynamic(x, {d: (starts[d], sizes[d]) for d in cut})

  return Move(weight, lambda d: d, array, stack)


def _dynamic(x: jax.Array, cuts: dict[int, tuple[Any, int]]) -> jax.Array:
  """A part of x; along axes of size 1 of all of it."""
  for axis, (start, size) in cuts.items():
    if x.shape[axis] != 1:
      x = lax.dynamic_slice_in_dim(x, start, size, axis)
  return x


def leafwise(f: Callable[[jax.Array], jax.Array]) -> Callable:
  """The same for each leaf, such as a copy."""
  return lambda x: jax.tree.map(f, x)


def placed(place: Callable, sharding: Any) -> Callable:
  """As `sharding_constraint` and `reshard`."""

  def move(x):
    try:
      return jax.tree.map(place, x, _tree.shardings(x, sharding))
    except ValueError as error:
      raise NotAView(str(error)) from None

  return move


def gathered(f: Callable, axis: int, is_tiled: bool) -> Move:
  """As `all_gather` along an axis that devices share."""

  def weight(q):
    need(is_tiled and not q.merged, 'it is gathered along a new axis')
    padded = axis in _axes(q) and any(q.pad)
    need(not padded, 'its blocks are padded')

    # Scales of the whole axis, and those of the tensor, are on all devices.
    whole = axis in _axes(q) and not q.fmt.block[_axes(q).index(axis)]

    def scales(tree):
      return tree if whole else jax.tree.map(f, tree)

    return qarray.replace(
      q,
      codes=f(q.codes),
      scale=scales(q.scale),
      zero_point=scales(q.zero_point),
      minimum=scales(q.minimum),
    )

  return Move(weight, lambda d: d)


def reshape(old: Sequence[int], new: Sequence[int]) -> Move:
  """Axes regroup freely; a block axis is the last of its group, and is cut and
  joined at whole blocks."""
  shape = tuple(new)

  def weight(q):
    return (_reshape_spanned if q.merged else _reshape)(q, shape)

  def axis(d):
    for before, after in _groups(old, shape):
      if list(before) == [d]:
        kept = [n for n in after if shape[n] == old[d]]
        need(bool(kept), 'its transform needs the axis whole')
        return kept[0]
    refuse('its transform needs the axis whole')

  def stack(leaf, stacked):
    kept = tuple(old[:stacked]) == shape[:stacked]
    need(kept, 'a stack of transformed weights')
    return leaf

  def array(x, before):
    own = []
    for group, after in _groups(before, shape):
      sizes = [x.shape[d] for d in group]
      whole = sizes == [before[d] for d in group]
      need(whole or set(sizes) == {1}, 'axes of both factors become one')
      own += [shape[n] if whole else 1 for n in after]
    return x.reshape(*own, *x.shape[len(before) :])

  return Move(weight, axis, array, stack)


def _groups(
  old: Sequence[int], new: Sequence[int]
) -> list[tuple[range, range]]:
  """The axes that a reshape turns into each other, in smallest groups."""
  out, i, j = [], 0, 0
  while i < len(old) or j < len(new):
    i0, j0, a, b = i, j, 1, 1
    while a != b or (i, j) == (i0, j0):
      if i < len(old) and (a <= b or j == len(new)):
        a, i = a * old[i], i + 1
      else:
        b, j = b * new[j], j + 1
    out.append((range(i0, i), range(j0, j)))
  return out


def _reshape(q: QArray, shape: tuple[int, ...]) -> QArray:
  need(0 not in q.shape, 'it is empty')
  need(
    q.tensor_scale is None or q.tensor_scale.size == 1,
    'it is a stack of tensors',
  )
  # Where each block axis is found in the new shape.
  found: dict[int, int] = {}
  for old, new in _groups(q.shape, shape):
    for k, d in enumerate(_axes(q)):
      if d in old:
        found[d] = _block_axis(q, k, d, old, [(n, shape[n]) for n in new])
  need(len(set(found.values())) == len(found), 'two block axes become one')

  # Leaves have another size there, and size 1 everywhere or nowhere else. One
  # of the whole axis keeps its size 1, as such an axis keeps its own.
  origin = {n: d for d, n in found.items()}

  def leaf(x):
    if x.size == 1:
      return x.reshape((1,) * len(shape))
    own = list(shape)
    for n, d in origin.items():
      own[n] = x.shape[d] * shape[n] // q.shape[d]
    return x.reshape(own)

  return _from_leaves(q, leaf, [found[d] for d in _axes(q)])


def _block_axis(q: QArray, k: int, d: int, old: range, new: list) -> int:
  """The new axis of block axis number k, axis d of the group `old`."""
  last = [n for n, size in new if size != 1]
  behind = math.prod(q.shape[e] for e in range(d + 1, old.stop))
  need(bool(last) and behind == 1, 'its block axis is not the last of a group')
  size, unit = dict(new)[last[-1]], qarray.unit(q, k)
  if size != q.shape[d]:
    need(
      q.fmt.block[k] != 0
      and not q.pad[k]
      and size % unit == 0
      and q.shape[d] % unit == 0,
      f'blocks of {q.fmt} would be cut',
    )
  return last[-1]


def _reshape_spanned(q: QArray, shape: tuple[int, ...]) -> QArray:
  """A reshape that joins the axes that blocks span together, or keeps them."""
  first, count = _spanned(q)
  spanned = list(range(first, first + count))
  for old, new in _groups(q.shape, shape):
    inside = [d for d in old if d in spanned]
    if not inside:
      continue
    sizes = [shape[n] for n in new]
    if [q.shape[d] for d in old] == sizes:
      continue  # this axis stays
    joined = list(old) == spanned and len(new) == 1
    need(joined, 'the axes that its blocks span are regrouped')
    return _reshape(qarray.flat(q), shape)
  # All of them stay: what is around them moves.
  whole = math.prod(q.shape[d] for d in spanned)
  before = math.prod(q.shape[:first])
  position, product = 0, 1
  while product < before or (position < len(shape) and shape[position] == 1):
    product, position = product * shape[position], position + 1
  kept = shape[position : position + count] == q.shape[first : first + count]
  need(kept, 'the axes that its blocks span are regrouped')
  flat_shape = (*shape[:position], whole, *shape[position + count :])
  moved = _reshape(qarray.flat(q), flat_shape)
  return qarray.replace(moved, merged=q.merged)


def stacked(x: Stored, length: int) -> Any:
  """A stack of weights whose leaves all have an entry for each of them."""
  if isinstance(x, LowRank):
    weight = stacked(x.weight, length) if is_quantized(x.weight) else x.weight
    a, b = (
      jnp.broadcast_to(factor, (length, *factor.shape[1:]))
      for factor in (x.a, x.b)
    )
    return _low_rank.replace(x, weight=weight, a=a, b=b)
  if isinstance(x, Transformed):
    need(x.stacked > 0, 'one transform for all layers')
    return _transformed.replace(x, weight=stacked(x.weight, length))
  need(_spanned(x)[0] > 0 and 0 not in _axes(x), 'blocks lie across layers')

  def repeated(leaf):
    return jnp.broadcast_to(leaf, (length, *leaf.shape[1:]))

  return jax.tree.map(repeated, x)


def concatenate(parts: Sequence[Any], axis: int) -> QArray:
  """As `concatenate`, of arrays that are stored alike."""
  first = parts[0]
  structure = jax.tree.structure(first)
  alike = all(
    isinstance(q, QArray) and jax.tree.structure(q) == structure for q in parts
  )
  need(alike, 'its parts are not stored alike')
  need(not first.merged, 'its blocks span several axes')
  own_scale = first.tensor_scale is not None
  need(not own_scale, 'each of its parts has a tensor scale')
  if axis in _axes(first):
    k = _axes(first).index(axis)
    whole = all(not q.pad[k] and first.fmt.block[k] for q in parts)
    need(whole, 'its blocks are padded, or as long as the axis')

  def join(*leaves):
    return lax.concatenate(leaves, axis)

  return jax.tree.map(join, *parts)


def split(x: Stored, axis: int, sizes: Sequence[int]) -> list[Any]:
  """As `split`."""
  ends = [0, *itertools.accumulate(map(int, sizes))]
  pieces = []
  for start, stop in itertools.pairwise(ends):
    slices = [slice(None)] * x.ndim
    slices[axis] = slice(start, stop)
    pieces.append(apply(index(slices), x))
  return pieces


def outline(x: Stored, numbers: Any, sizes: Sequence[int]) -> list[int]:
  """The shape of an array with size 1 along axes that a look-up keeps whole."""
  cut = _looked_up(x.shape, numbers, sizes)
  return [n if d in cut else 1 for d, n in enumerate(x.shape)]


def _looked_up(
  shape: Sequence[int], numbers: Any, sizes: Sequence[int]
) -> set[int]:
  """The axes of which a look-up takes a part."""
  parts = {d for d, n in enumerate(shape) if sizes[d] != n}
  dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  return parts | dropped


def look_up(indices: jax.Array, numbers: Any, sizes: Sequence[int]) -> Move:
  """As `gather` with indices inside, or clipped; blocks stay whole."""
  dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}

  def axis(d):
    need(d not in dropped, 'it picks elements of its blocks')
    kept = [e for e in range(len(sizes)) if e not in dropped]
    return numbers.offset_dims[kept.index(d)]

  def weight(q):
    need(not q.merged, 'its blocks span several axes')
    cut = _looked_up(q.shape, numbers, sizes)
    need(not cut & set(_axes(q)), 'it picks elements of its blocks')

    def leaf(x):
      # One scale for all rows is repeated first.
      own = [n if d in cut else x.shape[d] for d, n in enumerate(q.shape)]
      x = jnp.broadcast_to(x, own)
      part = [sizes[d] if d in cut else own[d] for d in range(q.ndim)]
      return lax.gather(x, indices, numbers, tuple(part), mode='clip')

    return _from_leaves(q, leaf, [axis(a) for a in _axes(q)])

  return Move(weight, axis)
