"""Operations on meshes that have axes of type Explicit.

On such axes JAX wants to know the sharding of every intermediate result. An
operation of ours states that of its results alone: inside it the axes are
automatic, and the compiler splits the work as over axes of type Auto.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lowbit_jax._typing import PyTree


def automatic(run: Callable, specs: Callable, *operands: PyTree) -> PyTree:
  """run(*operands), with explicit mesh axes automatic inside.

  Args:
    run: a function of trees of arrays.
    specs: `(result, *operands)` to a PartitionSpec for each array of the
      result; called where an axis is explicit. A part that does not divide its
      axis, or that an earlier axis has taken, is dropped: the result is
      gathered along this axis.
    *operands: trees of arrays.
  """
  mesh = _mesh(operands)
  if not mesh.explicit_axes:
    return run(*operands)

  # What `jax.sharding.auto_axes` does, with the shapes of the result at hand.
  automatic_axes = {name: AxisType.Auto for name in mesh.explicit_axes}
  with jax.sharding.use_abstract_mesh(mesh.update_axis_types(automatic_axes)):
    unstated = jax.tree.map(lambda x: _whole(jnp.ndim(x)), operands)
    result = run(*jax.sharding.reshard(operands, unstated))
  shardings = jax.tree.map(
    lambda x, spec: _fitting(mesh, x.shape, spec),
    result,
    specs(result, *operands),
  )
  return jax.sharding.reshard(result, shardings)


def as_first(result: PyTree, x: jax.Array, *rest: PyTree) -> PyTree:
  """Specs of results that are all split as the first operand is."""
  del rest
  return jax.tree.map(lambda _: PartitionSpec(*parts(x)), result)


def of_scalar(result: jax.Array, *operands: PyTree) -> PartitionSpec:
  """The spec of a number."""
  del result, operands
  return PartitionSpec()


def gathered(result: PyTree, *operands: PyTree) -> PyTree:
  """Specs of results that are whole on every device."""
  del operands
  return jax.tree.map(lambda x: _whole(x.ndim), result)


def parts(x: jax.Array) -> list[Any]:
  """What splits each axis of an array: a mesh axis, several, or None."""
  spec = jax.typeof(x).sharding.spec
  return [*spec, *[None] * (x.ndim - len(spec))]


def shards(part: str | Sequence[str] | None, sizes: Any) -> int:
  """How many shards of an axis a part of a spec makes.

  Args:
    part: a mesh axis, several, or None.
    sizes: of the mesh axes by name.
  """
  if part is None:
    return 1
  names = (part,) if isinstance(part, str) else part
  return math.prod(sizes[name] for name in names)


def _mesh(operands: PyTree) -> AbstractMesh:
  """The mesh with explicit axes that operands are split over, or the one that
  is set."""
  for leaf in jax.tree.leaves(operands):
    mesh = jax.typeof(leaf).sharding.mesh
    if mesh.explicit_axes:
      return mesh
  return jax.sharding.get_abstract_mesh()


def _whole(ndim: int) -> PartitionSpec:
  return PartitionSpec(*[None] * ndim)


def _fitting(mesh: AbstractMesh, shape: tuple, spec: PartitionSpec):
  taken, out = set(), []
  for n, part in zip(shape, spec, strict=True):
    names = {part} if isinstance(part, str) else set(part or ())
    fits = n % shards(part, mesh.shape) == 0 and not names & taken
    taken |= names if fits else set()
    out.append(part if fits else None)
  return NamedSharding(mesh, PartitionSpec(*out))
