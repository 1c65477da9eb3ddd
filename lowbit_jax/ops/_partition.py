"""Kernels under automatic partitioning, vmap and shard_map.

A kernel sees whole operands only. On GPU, under `jax.jit` of sharded arrays,
the product of (m, k) and a weight (k, n) is split along m and n as its operands
are, and along k where both are and the shards are whole tiles: the float32
partial results are summed over the mesh. Other layouts of k are gathered.

Inside `shard_map` a kernel runs on what it is given, and so it does on TPU,
where the partitioner does not know such rules (JAX issue 38196): with several
TPUs kernels are chosen inside `shard_map` only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax._typing import PyTree
from lowbit_pallas.wq_matmul.prepack import Prepacked


def is_manual() -> bool:
  """Whether this is traced inside `shard_map`."""
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def is_alone() -> bool:
  """Whether no partitioner will split what is traced."""
  return is_manual() or jax.device_count() == 1


def partitioned(
  run: Callable, x: jax.Array, w: Prepacked, *, has_rules: bool = True
) -> jax.Array:
  """run(x, w), float32 (m, n), wherever it is called.

  Args:
    run: a product of arrays on one device.
    x: (m, k).
    w: the weight.
    has_rules: whether the partitioner of the platform calls back.
  """
  if is_manual():
    return run(x, w)
  leaves, structure = jax.tree.flatten(w)
  columns = [_columns(w, i) for i in range(len(leaves))]

  def call(x, *leaves):
    return run(x, jax.tree.unflatten(structure, leaves))

  if not has_rules:
    return _with_batches(call)(x, *leaves)
  product = custom_partitioning(jax.jit(call))
  product.def_partition(
    partition=_partition(run, structure, columns),
    infer_sharding_from_operands=_infer(columns),
    **_rule(columns),
  )
  return _with_batches(product)(x, *leaves)


def _columns(w: Prepacked, leaf: int) -> int:
  """The axis of a leaf that runs along n."""
  return 1 if leaf == 0 and w.layout == 'nk' else 2


def _rule(columns) -> dict:
  """The sharding rule: m and n are shared, everything about k is not."""
  names = iter('abcdefgh')
  leaves, private = [], ['k']
  for axis in columns:
    factors = [next(names) for _ in range(2)]
    private += factors
    factors.insert(axis, 'n')
    leaves.append(' '.join(factors))
  operands = ', '.join(['m k', *leaves])
  return {
    'sharding_rule': f'{operands} -> m n',
    'need_replication_factors': tuple(private),
  }


def _spec(aval, ndim: int) -> tuple:
  return (*aval.sharding.spec, *(None,) * ndim)[:ndim]


def _infer(columns):
  def infer(mesh, operands, result):
    del result
    x, planes = operands[0], operands[1]
    spec = _spec(x, 2)[0], _spec(planes, 3)[columns[0]]
    return NamedSharding(mesh, PartitionSpec(*spec))

  return infer


def _partition(run: Callable, structure, columns):
  def partition(mesh, operands, result):
    m, n = _spec(result, 2)
    w = jax.tree.unflatten(structure, operands[1:])
    k = _shared_k(mesh, _spec(operands[0], 2)[1], w, columns, (m, n))
    specs = [(m, k)]
    for i, (leaf, axis) in enumerate(zip(operands[1:], columns, strict=True)):
      spec: list = [None] * 3
      spec[axis] = n
      if k is not None and (i == 0 or leaf.shape[0] == w.steps):
        spec[_rows(i, axis)] = k
      specs.append(tuple(spec))
    arguments = tuple(
      NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs
    )
    parts = 1 if k is None else mesh.shape[k]

    def lower(x, *leaves):
      local = jax.tree.unflatten(structure, leaves)
      local = dataclasses.replace(
        local, rows=local.rows // parts, k=local.k // parts
      )
      out = run(x, local)
      return out if k is None else lax.psum(out, k)

    out = NamedSharding(mesh, PartitionSpec(m, n))
    return mesh, lower, out, arguments

  return partition


def _rows(leaf: int, columns: int) -> int:
  """The axis of a leaf that runs along tiles of k."""
  if leaf:
    return 0
  return 3 - columns


def _shared_k(mesh, axis, w: Prepacked, columns, taken):
  """The mesh axis over which k stays split, or None to gather it."""
  if not isinstance(axis, str) or axis in taken:
    return None
  planes = _spec(w.planes, 3)
  if planes[_rows(0, columns[0])] != axis:
    return None
  parts = mesh.shape[axis]
  whole = w.rows == w.k == w.steps * w.tile and w.steps % parts == 0
  long_blocks = w.spec.block > w.tile
  return axis if whole and not long_blocks else None


def _with_batches(product: Callable) -> Callable:
  """Gives a product a rule for vmap: rows of x are folded, weights looped."""

  @custom_vmap
  def batched(x, *leaves):
    return product(x, *leaves)

  @batched.def_vmap
  def rule(size, in_batched, x, *leaves):
    x_batched, *leaves_batched = in_batched
    if not any(leaves_batched):
      out = batched(x.reshape(-1, x.shape[-1]), *leaves)
      return out.reshape(*x.shape[:2], -1), True

    def one(i):
      pick = [
        lax.dynamic_index_in_dim(a, i, keepdims=False) if b else a
        for a, b in zip((x, *leaves), in_batched, strict=True)
      ]
      return batched(*pick)

    del x_batched
    return lax.map(one, jnp.arange(size)), True

  return batched


def rows_and_extras(
  run: Callable,
  x: jax.Array,
  *extras: Any,
  split: bool = True,
  has_rules: bool = True,
) -> PyTree:
  """run(x, *extras), a tree of arrays with the rows of x, wherever it is
  called.

  Args:
    run: works on the rows of x one by one, on one device.
    x: (rows, columns).
    *extras: arrays of rank at most 1 that all rows share.
    split: whether rows may be split over devices; else they are gathered.
    has_rules: whether the partitioner of the platform calls back.
  """
  if is_manual():
    return run(x, *extras)
  shapes = jax.eval_shape(run, x, *extras)
  count, structure = len(jax.tree.leaves(shapes)), jax.tree.structure(shapes)

  def call(*operands):
    return tuple(jax.tree.leaves(run(*operands)))

  product = call
  if has_rules:
    product = _partitioned_extras(call, extras, count, split)

  @custom_vmap
  def batched(*operands):
    return product(*operands)

  @batched.def_vmap
  def loop(size, in_batched, *operands):
    if not any(in_batched[1:]) and split:
      x = operands[0]
      out = batched(x.reshape(-1, x.shape[-1]), *operands[1:])
      out = tuple(leaf.reshape(*x.shape[:2], -1) for leaf in out)
      return out, (True,) * count

    def one(i):
      pick = [
        lax.dynamic_index_in_dim(a, i, keepdims=False) if b else a
        for a, b in zip(operands, in_batched, strict=True)
      ]
      return batched(*pick)

    return lax.map(one, jnp.arange(size)), (True,) * count

  return jax.tree.unflatten(structure, batched(x, *extras))


def _partitioned_extras(call, extras, count: int, split: bool) -> Callable:
  def shardings(mesh, rows):
    first = NamedSharding(mesh, PartitionSpec(rows, None))
    rest = tuple(NamedSharding(mesh, PartitionSpec()) for _ in extras)
    return (first,) * count, (first, *rest)

  def infer(mesh, operands, result):
    del result
    return shardings(mesh, _spec(operands[0], 2)[0] if split else None)[0]

  def partition(mesh, operands, result):
    del result
    rows = _spec(operands[0], 2)[0] if split else None
    return mesh, call, *shardings(mesh, rows)

  names = [chr(ord('a') + i) for i in range(len(extras) + count)]
  shared = [n if e.ndim else '' for n, e in zip(names, extras, strict=False)]
  results = [f'r {n}' for n in names[len(extras) :]]
  rule = f'{", ".join(["r z", *shared])} -> {", ".join(results)}'
  gathered = ('z', *(n for n in shared if n), *names[len(extras) :])
  product = custom_partitioning(jax.jit(call))
  product.def_partition(
    partition=partition,
    infer_sharding_from_operands=infer,
    sharding_rule=rule,
    need_replication_factors=gathered if split else ('r', *gathered),
  )
  return product


def by_rows(
  run: Callable, reduces: bool, *operands: jax.Array, has_rules: bool = True
) -> jax.Array:
  """run(*operands), wherever it is called. Every axis but the last stays split.

  Args:
    run: a function of arrays `(..., columns)` of one shape, for any leading
      axes, to one of that shape or, if `reduces`, without the last axis.
    reduces: see `run`.
    *operands: the arrays.
    has_rules: whether the partitioner of the platform calls back.
  """
  if is_manual():
    return run(*operands)

  @custom_vmap
  def batched(*operands):
    if not has_rules:
      return run(*operands)
    shape = operands[0].ndim, len(operands)
    return _partitioned_rows(run, reduces, *shape)(*operands)

  @batched.def_vmap
  def rule(size, in_batched, *operands):
    whole = [
      a if b else jnp.broadcast_to(a, (size, *a.shape))
      for a, b in zip(operands, in_batched, strict=True)
    ]
    return by_rows(run, reduces, *whole, has_rules=has_rules), True

  del rule
  return batched(*operands)


def _partitioned_rows(
  run: Callable, reduces: bool, ndim: int, count: int
) -> Callable:
  leading = ' '.join(f'r{i}' for i in range(ndim - 1))
  sources = ', '.join([f'{leading} c'] * count)
  rule = f'{sources} -> {leading}' + ('' if reduces else ' c')

  def spec(sharding, out: bool):
    leading = (*sharding.spec, *(None,) * ndim)[: ndim - 1]
    return PartitionSpec(*leading, *(() if out and reduces else (None,)))

  def infer(mesh, operands, result):
    del result
    return NamedSharding(mesh, spec(operands[0].sharding, True))

  def partition(mesh, operands, result):
    source = NamedSharding(mesh, spec(result.sharding, False))
    target = NamedSharding(mesh, spec(result.sharding, True))
    return mesh, run, target, (source,) * len(operands)

  # Only positional parameters, and no constants, are understood.
  function = custom_partitioning(jax.jit(lambda *operands: run(*operands)))
  function.def_partition(
    partition=partition,
    infer_sharding_from_operands=infer,
    sharding_rule=rule,
    need_replication_factors=('c',),
  )
  return function
