"""From the tensors of a checkpoint to the parameters of a model.

A table says, for each parameter, where a checkpoint has it. Weights go into the
model as they are stored, packed ones too, one parameter after the other: of
those of a mesh, a process holds no more than its part of one at a time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

import lowbit_jax as lowbit
from lowbit_jax.io._checkpoint import Checkpoint, Tensor

Leaf = np.ndarray | lowbit.QArray


class CheckpointMismatch(ValueError):
  """A checkpoint that does not fit the model; the message says where."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a checkpoint has a parameter.

  Attributes:
    name: of the tensor, or of one for each '{block}' or '{expert}'.
    rows: first and last row but one of a tensor that holds several parameters.
    heads: of a tensor whose rows pair neighbouring channels of a head for their
      rotation, 0 for others. They come to stand n / 2 channels apart.
    experts: how many tensors the '{expert}' of a name stands for.
  """

  name: str
  rows: tuple[int, int] | None = None
  heads: int = 0
  experts: int = 0

  def names(self, block: int) -> list[str]:
    """The tensors that a block needs."""
    return [
      self.name.format(block=block, expert=expert)
      for expert in range(max(self.experts, 1))
    ]

  def read(self, checkpoint: Checkpoint, block: int) -> Leaf:
    """The parameter of a block, with outputs before inputs."""
    parts = [self._part(checkpoint[name]) for name in self.names(block)]
    if not self.experts:
      return parts[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

  def _part(self, leaf: Leaf) -> Leaf:
    if self.rows:
      leaf = leaf[slice(*self.rows)]
    if self.heads:
      rows = np.arange(leaf.shape[0]).reshape(self.heads, -1, 2)
      leaf = leaf[rows.swapaxes(1, 2).reshape(-1)]
    return leaf


Table = Mapping[str, Source]


def stacks(checkpoint: Checkpoint, block: Table, blocks: int) -> list[int]:
  """How many blocks follow each other whose parameters have equal formats.

  Args:
    checkpoint: that holds them.
    block: where it has the parameters of a block.
    blocks: how many.

  Raises:
    CheckpointMismatch: for a tensor that is not there.
  """
  formats = [
    [
      (info.fmt, None if info.fmt else info.layout)
      for source in block.values()
      for name in source.names(k)
      for info in [_known(checkpoint, name)]
    ]
    for k in range(blocks)
  ]
  starts = [k for k in range(blocks) if k == 0 or formats[k] != formats[k - 1]]
  ends = [*starts[1:], blocks]
  return [end - start for start, end in zip(starts, ends, strict=True)]


def load(
  make: Callable[[], nnx.Module],
  checkpoint: Checkpoint,
  whole: Table,
  block: Table,
  sizes: Sequence[int],
  *,
  mesh: Mesh | None = None,
  specs: Mapping[str, PartitionSpec] | None = None,
  progress: Callable[[Any], Any] = lambda paths: paths,
) -> nnx.Module:
  """A model with the parameters of a checkpoint.

  Args:
    make: makes the model; it is run for shapes only.
    checkpoint: that holds the parameters.
    whole: where it has those of the whole model, by path.
    block: the same of a block, by path inside of it; stack k of the model holds
      them at 'stacks/k/...'.
    sizes: of the stacks.
    mesh: devices to place the parameters on, None for the default device.
    specs: how parameters of a block, by path inside of it, and of the whole
      model are split over the mesh; whole on every device by default.
    progress: wraps the sequence of paths, such as tqdm.

  Returns:
    The model.

  Raises:
    CheckpointMismatch: for a tensor that is not there or has another shape than
      the parameter, and for a parameter that no table has.
  """
  model = nnx.eval_shape(make)
  wanted = {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  plan: dict[str, tuple[Source, range | None, PartitionSpec]] = {}
  specs = specs or {}
  for path, source in whole.items():
    plan[path] = source, None, specs.get(path, PartitionSpec())
  first = 0
  for k, size in enumerate(sizes):
    for path, source in block.items():
      spec = PartitionSpec(None, *specs.get(path, PartitionSpec()))
      plan[f'stacks/{k}/{path}'] = source, range(first, first + size), spec
    first += size
  if missing := wanted.keys() - plan.keys():
    raise CheckpointMismatch(f'no table has the parameter {min(missing)!r}')
  for path in progress(list(wanted)):
    source, blocks, spec = plan[path]
    like = wanted[path]
    if blocks is None:
      members = [_read(checkpoint, source, 0, path, like.shape, like.dtype)]
      value = _placed(members, None, mesh, spec)
    else:
      shape = like.shape[1:]
      members = (
        _read(checkpoint, source, k, path, shape, like.dtype) for k in blocks
      )
      value = _placed(members, len(blocks), mesh, spec)
    lowbit.nn.nnx.assign(model, {path: value})
  return model


def _known(checkpoint: Checkpoint, name: str) -> Tensor:
  if name not in checkpoint:
    raise CheckpointMismatch(
      f'{checkpoint.path!r} has no tensor {name!r}; is it of another'
      ' architecture, or is a file of it missing?'
    )
  return checkpoint.tensors[name]


def _read(
  checkpoint: Checkpoint,
  source: Source,
  block: int,
  path: str,
  shape: tuple[int, ...],
  dtype: DTypeLike,
) -> Leaf:
  """The parameter of a block, as the model has it; kernels take inputs first.

  Norms and biases of any float dtype are cast to that of the model.
  """
  for name in source.names(block):
    _known(checkpoint, name)
  leaf = source.read(checkpoint, block)
  if path.endswith('/kernel'):
    leaf = leaf.mT
  if leaf.shape != shape:
    raise CheckpointMismatch(
      f'{checkpoint.path!r}, {source.names(block)[0]!r}: it makes {path!r} of'
      f' shape {leaf.shape}, but the configuration says {shape}'
    )
  is_array = isinstance(leaf, np.ndarray)
  return leaf.astype(dtype, copy=False) if is_array else leaf


def _placed(
  members: Iterable[Leaf],
  count: int | None,
  mesh: Mesh | None,
  spec: PartitionSpec,
) -> Any:
  """A parameter on its devices, each of which gets its part.

  Args:
    members: of a stack, or one parameter.
    count: of members, None for one that is no stack.
    mesh: None for the default device.
    spec: how the parameter is split.
  """
  buffers, kind = [], None
  for k, member in enumerate(members):
    leaves, kind = jax.tree.flatten(member)
    if not k:  # what each device gets of each leaf
      lead = () if count is None else (count,)
      whole = kind.unflatten(
        jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype) for x in leaves
      )
      buffers = [_Buffers(x, s) for x, s in _leaves(whole, mesh, spec)]
    for buffer, leaf in zip(buffers, leaves, strict=True):
      buffer.write(leaf, k if count else None)
  assert kind is not None
  return kind.unflatten(buffer.array() for buffer in buffers)


def _leaves(whole: Any, mesh: Mesh | None, spec: PartitionSpec) -> Iterator:
  """Leaves and their shardings."""
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ((leaf, place) for leaf in jax.tree.leaves(whole))
  places = lowbit.shardings(whole, NamedSharding(mesh, spec))
  return zip(jax.tree.leaves(whole), jax.tree.leaves(places), strict=True)


class _Buffers:
  """The parts of a leaf that devices of this process get, as they are read."""

  def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> None:
    self.leaf, self.sharding = leaf, sharding
    parts = sharding.addressable_devices_indices_map(leaf.shape)
    self.parts = {self._key(index): None for index in parts.values()}
    for key in self.parts:
      shape = [stop - start for start, stop in key]
      self.parts[key] = np.empty(shape, leaf.dtype)

  def _key(self, index: Any) -> tuple[tuple[int, int], ...]:
    return tuple(
      s.indices(n)[:2] for s, n in zip(index, self.leaf.shape, strict=True)
    )

  def write(self, value: np.ndarray, member: int | None) -> None:
    """Copies a member of a stack, or all, to where it is wanted."""
    for key, part in self.parts.items():
      if member is None:
        part[...] = value[tuple(slice(*ends) for ends in key)]
      elif key[0][0] <= member < key[0][1]:
        rest = tuple(slice(*ends) for ends in key[1:])
        part[member - key[0][0]] = value[rest]

  def array(self) -> jax.Array:
    """The leaf on its devices."""
    return jax.make_array_from_callback(
      self.leaf.shape,
      self.sharding,
      lambda index: self.parts[self._key(index)],
    )
