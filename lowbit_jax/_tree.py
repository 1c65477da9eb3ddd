"""Trees that hold QArrays: what is trained, what is frozen, and where it lives.

`jax.grad` refuses uint8 leaves and an optimizer would make moments for them, so
a mixed tree is split before differentiation and joined inside the loss:

    trainable, frozen = partition(params)
    grads = jax.grad(lambda t: loss(combine(t, frozen)))(trainable)
    updates, state = tx.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)

Gradients and updates keep their holes: joined with `frozen` they would be codes
that are added to codes. `training.optimizers.apply_updates(params, updates)`
updates the whole tree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax import _explicit, _low_rank, _transformed, qarray
from lowbit_jax._low_rank import LowRank, is_operand
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._typing import PyTree
from lowbit_jax.qarray import QArray


def path_name(path: tuple[Any, ...]) -> str:
  """A key path of `jax.tree_util` as 'block_0/attention/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def leaf_name(path: tuple[Any, ...]) -> str:
  """The same without the attribute in which a variable of NNX, or a box of
  Linen, holds its value."""
  is_box = path[-1:] == (jax.tree_util.GetAttrKey('value'),)
  return path_name(path[:-1] if is_box else path)


def by_name(tree: PyTree) -> tuple[dict[str, Any], Any]:
  """Arrays and stored weights of a tree by their names, and its structure.

  `structure.unflatten(leaves.values())` is the tree.

  Raises:
    ValueError: if two leaves have the same name.
  """
  pairs, structure = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=is_operand
  )
  leaves = {}
  for path, leaf in pairs:
    name = leaf_name(path)
    if name in leaves:
      raise ValueError(f'two leaves have the path {name!r}; rename a key')
    leaves[name] = leaf
  return leaves, structure


def partition(tree: PyTree, *, scales: bool = False) -> tuple[PyTree, PyTree]:
  """Splits a tree into (trainable, frozen), each with None in the holes.

  Args:
    tree: a pytree of arrays and QArrays.
    scales: whether the float scales of QArrays are trainable. Their QArray then
      stands in both trees, with None for the leaves of the other.

  Returns:
    Two trees; `combine` joins them again. Float arrays are trainable, QArrays,
    transforms of activations and everything else is frozen. Of an `ops.LowRank`
    the factors are trainable and its weight is frozen, an array too.
  """

  def split(x):
    if isinstance(x, LowRank):
      is_scaled = scales and is_quantized(x.weight)
      trainable, frozen = split(x.weight) if is_scaled else (None, x.weight)
      held = _low_rank.replace(x, weight=trainable)
      return held, _low_rank.replace(x, weight=frozen, a=None, b=None)
    if isinstance(x, Transformed) and scales:
      trainable, frozen = split(x.weight)
      held = _transformed.replace(x, weight=trainable, transform=None)
      return held, _transformed.replace(x, weight=frozen)
    if not is_quantized(x):
      return (x, None) if _is_float(x) else (None, x)
    if not scales:
      return None, x
    parts = {n: split(getattr(x, n)) for n in qarray.LEAVES}
    return tuple(
      qarray.replace(x, **{n: part[i] for n, part in parts.items()})
      for i in (0, 1)
    )

  leaves, treedef = jax.tree.flatten(tree, is_leaf=is_operand)
  pairs = [split(x) for x in leaves]
  return tuple(treedef.unflatten([p[i] for p in pairs]) for i in (0, 1))


def combine(*trees: PyTree) -> PyTree:
  """Joins trees of one structure, taking the first entry that is not None.

  For parameters; gradients and updates are not joined with what is frozen.
  """

  def pick(*xs):
    xs = [x for x in xs if x is not None]
    if not xs or not is_operand(xs[0]):
      return xs[0] if xs else None
    if isinstance(xs[0], LowRank):
      names = ('weight', 'a', 'b')
      parts = {n: pick(*(getattr(x, n) for x in xs)) for n in names}
      return _low_rank.replace(xs[0], **parts)
    if isinstance(xs[0], Transformed):
      weight = pick(*(x.weight for x in xs))
      transform = pick(*(x.transform for x in xs))
      return _transformed.replace(xs[0], weight=weight, transform=transform)
    merged = {n: pick(*(getattr(x, n) for x in xs)) for n in qarray.LEAVES}
    return qarray.replace(xs[0], **merged)

  def is_leaf(x):
    return x is None or is_operand(x)

  return jax.tree.map(pick, *trees, is_leaf=is_leaf)


def shardings(tree: PyTree, sharding: PyTree) -> PyTree:
  """The sharding of every leaf that belongs to a sharding of the whole.

  Args:
    tree: a QArray, or a tree of arrays and QArrays; `jax.eval_shape` output
      will do.
    sharding: a `NamedSharding` or a `PartitionSpec` for an array of the shape
      of the QArray; for a tree the same tree with one of them in place of each
      array and QArray, or of a part of the tree, whose leaves all get it.

  Returns:
    The tree with a `NamedSharding` (or a `PartitionSpec`, for `in_specs` of
    shard_map) in place of each leaf, those of QArrays too. Every shard of a
    QArray is a valid QArray.

  Raises:
    TypeError: for what is no sharding.
    ValueError: where a shard would cut a block or a byte, or an axis with
      padding is sharded; for a sharding of more axes than a leaf has; for trees
      that differ.

  Examples:
    `jax.device_put(q, shardings(q, NamedSharding(mesh, P(None, 'model'))))`
  """

  def place(start, part, subtree):
    return jax.tree.map_with_path(
      lambda path, leaf: _placed(leaf, part, (*start, *path)),
      subtree,
      is_leaf=is_operand,
    )

  return jax.tree.map_with_path(place, sharding, tree, is_leaf=_is_sharding)


def _is_sharding(x) -> bool:
  return isinstance(x, NamedSharding | PartitionSpec)


def _placed(leaf, sharding, path):
  try:
    if isinstance(leaf, LowRank):
      return _beside_factors(leaf, sharding)
    if isinstance(leaf, Transformed):
      return _behind_transform(leaf, sharding)
    if isinstance(leaf, QArray):
      return _leaf_shardings(leaf, sharding)
    _mesh_and_parts(sharding, np.shape(leaf))
    return sharding
  except (TypeError, ValueError) as error:
    if path:
      error.add_note(f'This is the leaf {path_name(path)!r}.')
    raise


def _mesh_and_parts(sharding, shape):
  """The mesh, if any, and what each axis is sharded over."""
  if isinstance(sharding, NamedSharding):
    mesh, spec = sharding.mesh, sharding.spec
  elif isinstance(sharding, PartitionSpec):
    mesh, spec = None, sharding
  else:
    raise TypeError(
      f'sharding={sharding!r} must be a NamedSharding or a PartitionSpec'
    )
  if len(spec) > len(shape):
    raise ValueError(f'{spec} names more axes than shape {tuple(shape)} has')
  return mesh, (*spec, *[None] * (len(shape) - len(spec)))


def _leaf_shardings(q: QArray, sharding) -> QArray:
  mesh, parts = _mesh_and_parts(sharding, q.shape)
  if q.merged:
    return _merged_shardings(q, mesh, parts)
  for k, axis in enumerate(q.axes):
    _check_shards(q, k, axis, parts[axis], mesh)

  specs = qarray.leaf_specs(q, parts)
  if mesh is None:
    return specs
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _beside_factors(x: LowRank, sharding) -> LowRank:
  """Those of the weight, and of factors that are split along their own axes."""
  mesh, parts = _mesh_and_parts(sharding, x.shape)

  def place(factor):
    own = _low_rank.spanned(factor, x.shape)
    spec = PartitionSpec(
      *(part if d in own else None for d, part in enumerate(parts))
    )
    return spec if mesh is None else NamedSharding(mesh, spec)

  weight = _placed(x.weight, sharding, ())
  return _low_rank.replace(x, weight=weight, a=place(x.a), b=place(x.b))


def _behind_transform(t: Transformed, sharding) -> Transformed:
  """Those of the weight, and of a transform that each device has whole."""
  mesh, parts = _mesh_and_parts(sharding, t.shape)
  if parts[t.axis] is not None:
    raise ValueError(
      f'axis {t.axis} of {t!r} cannot be sharded over {parts[t.axis]!r}: its'
      ' transform needs it whole; shard another axis'
    )
  spec = PartitionSpec(*parts[: t.stacked])
  place = spec if mesh is None else NamedSharding(mesh, spec)
  transform = jax.tree.map(lambda _: place, t.transform)
  weight = _leaf_shardings(t.weight, sharding)
  return _transformed.replace(t, weight=weight, transform=transform)


def _merged_shardings(q: QArray, mesh, parts) -> QArray:
  """Those of leaves with one axis for several, of which the first is split."""
  axes = qarray.merged_axes(q)
  first, end = axes[0] + q.ndim, axes[-1] + 1 + q.ndim
  if any(part is not None for part in parts[first + 1 : end]):
    raise ValueError(
      f'blocks of {q!r} span axes {axes} together: shard the first of them, or'
      ' other axes'
    )
  spec = PartitionSpec(*parts[: first + 1], *parts[end:])
  whole = spec if mesh is None else NamedSharding(mesh, spec)
  placed = _leaf_shardings(qarray.flat(q), whole)
  return qarray.replace(placed, merged=q.merged)


def _check_shards(q: QArray, k: int, axis: int, part, mesh) -> None:
  if part is None:
    return
  if q.pad[k]:
    raise ValueError(
      f'axis {axis} of {q!r} has {q.pad[k]} elements of padding and cannot be'
      f' sharded over {part!r}; choose another axis or a shape that blocks of'
      f' {q.fmt} divide'
    )
  if mesh is None:
    return
  shards = _explicit.shards(part, mesh.shape)
  if qarray.cuts(q, k, shards):
    raise ValueError(
      f'{shards} shards of axis {axis}, of size {q.shape[axis]}, would cut'
      f' blocks of {qarray.unit(q, k)} elements of {q.fmt}'
    )


def _is_float(x) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)
