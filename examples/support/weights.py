"""From the tensors of a checkpoint to the parameters of a model.

A table says, for each parameter, where a checkpoint has it. Weights go into the
model as they are stored, packed ones too, one parameter after the other: of
those of a mesh, a process holds no more than its part of one at a time.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


class Rows(NamedTuple):
  """First and last row but one of a part of a tensor that has `all` rows."""

  first: int
  end: int
  all: int


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a checkpoint has a parameter.

  Attributes:
    name: of the tensor, or of one for each '{block}' or '{expert}'.
    rows: the part of a tensor that holds several parameters.
    heads: of a tensor whose rows pair neighbouring channels of a head for their
      rotation, 0 for others. They come to stand n / 2 channels apart.
    experts: how many tensors the '{expert}' of a name stands for.
  """

  name: str
  rows: Rows | None = None
  heads: int = 0
  experts: int = 0

  def names(self, block: int) -> list[str]:
    """The tensors that a block needs."""
    return [
      self.name.format(block=block, expert=expert)
      for expert in range(max(self.experts, 1))
    ]

  def shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of its tensors, of a parameter with a path and shape."""
    if self.experts:
      shape = shape[1:]
    if path.endswith('/kernel'):
      shape = *shape[:-2], shape[-1], shape[-2]
    return (self.rows.all, *shape[1:]) if self.rows else shape

  def read(self, checkpoint: Checkpoint, block: int) -> Leaf:
    """The parameter of a block, with outputs before inputs."""
    parts = [self._part(checkpoint[name]) for name in self.names(block)]
    if not self.experts:
      return parts[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

  def _part(self, leaf: Leaf) -> Leaf:
    if self.rows:
      leaf = leaf[self.rows.first : self.rows.end]
    if self.heads:
      rows = np.arange(leaf.shape[0]).reshape(self.heads, -1, 2)
      leaf = _taken(leaf, rows.swapaxes(1, 2).reshape(-1))
    return leaf


def _taken(leaf: Leaf, rows: np.ndarray) -> Leaf:
  """Rows of a leaf, all of which share the scale of the tensor."""
  taken = leaf[rows]
  if isinstance(leaf, lowbit.QArray) and isinstance(taken, lowbit.QArray):
    taken = dataclasses.replace(taken, tensor_scale=leaf.tensor_scale)
  return taken


Table = Mapping[str, Source]


def tensors(
  block: Table, number: int, parameters: Mapping[str, Any]
) -> dict[str, Any]:
  """What `Source.read` takes parameters from, by the names of a checkpoint.

  Args:
    block: where it has the parameters of a block.
    number: of the block.
    parameters: of the block by path, kernels with inputs before outputs. Those
      that share a tensor are all there.

  Raises:
    ValueError: for kernels that cannot be one tensor.
  """
  parts = collections.defaultdict(list)
  for path, leaf in parameters.items():
    source = block[path]
    leaf = leaf.mT if path.endswith('/kernel') else leaf
    for k, name in enumerate(source.names(number)):
      part = leaf[k] if source.experts else leaf
      if source.heads:
        rows = np.arange(part.shape[0]).reshape(source.heads, 2, -1)
        part = _taken(part, rows.swapaxes(1, 2).reshape(-1))
      parts[name].append((source.rows.first if source.rows else 0, part))
  joined = {}
  for name, some in parts.items():
    leaves = [part for _, part in sorted(some, key=lambda pair: pair[0])]
    if leaves[1:] and getattr(leaves[0], 'tensor_scale', None) is not None:
      raise ValueError(
        f'{name!r} holds {len(leaves)} kernels, which have a scale of the'
        ' tensor each: take a format without one'
      )
    joined[name] = jax.tree.map(lambda *x: np.concatenate(x), *leaves)
  return joined


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
  harmless: Callable[[str], Any] = lambda name: False,
  mesh: Mesh | None = None,
  specs: Mapping[str, PartitionSpec] | None = None,
  progress: Callable[[Any], Any] = lambda paths: paths,
) -> nnx.Module:
  """A model with the parameters of a checkpoint.

  Names and shapes of all tensors are compared before the first is read.

  Args:
    make: makes the model; it is run for shapes only.
    checkpoint: that holds the parameters.
    whole: where it has those of the whole model, by path.
    block: the same of a block, by path inside of it; stack k of the model holds
      them at 'stacks/k/...'.
    sizes: of the stacks.
    harmless: whether a tensor of the checkpoint, by name, may be left out.
    mesh: devices to place the parameters on, None for the default device.
    specs: how parameters of a block, by path inside of it, and of the whole
      model are split over the mesh; whole on every device by default. Where
      parts would be unequal or cut blocks, another axis is split.
    progress: wraps the sequence of paths, such as tqdm.

  Returns:
    The model.

  Raises:
    CheckpointMismatch: for a tensor that is not there, has another shape than
      the parameter, or is in no table; and for a parameter that no table has.
  """
  model = nnx.eval_shape(make)
  wanted = {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  plan = _plan(wanted, whole, block, sizes, specs or {})
  used = {
    name
    for path, part in plan.items()
    for name in _checked(checkpoint, path, part)
  }
  for name in checkpoint:
    if name not in used and not harmless(name):
      raise CheckpointMismatch(
        f'{checkpoint.path!r} has a tensor {name!r}, which the model has no'
        ' parameter for; is it of another architecture?'
      )
  for path in progress(list(plan)):
    part = plan[path]
    dtype = wanted[path].dtype
    members = (_read(checkpoint, part, k, path, dtype) for k in part.blocks)
    value = _placed(members, part.count, mesh, part.spec)
    lowbit.nn.nnx.assign(model, {path: value})
  return model


class _Part(NamedTuple):
  """Where a parameter comes from and goes to.

  Attributes:
    source: its place in the checkpoint.
    shape: of one block.
    blocks: its blocks; one of the whole model has one.
    count: of a stack's blocks, None for a parameter of the whole model.
    spec: how it is split.
  """

  source: Source
  shape: tuple[int, ...]
  blocks: range
  count: int | None
  spec: PartitionSpec


def _plan(
  wanted: Mapping[str, Any],
  whole: Table,
  block: Table,
  sizes: Sequence[int],
  specs: Mapping[str, PartitionSpec],
) -> dict[str, _Part]:
  """A part for each parameter."""
  ends = np.cumsum(sizes)
  plan = {}
  for path, like in wanted.items():
    if path in whole:
      spec = specs.get(path, PartitionSpec())
      plan[path] = _Part(whole[path], like.shape, range(1), None, spec)
      continue
    stack, _, rest = path.removeprefix('stacks/').partition('/')
    if not path.startswith('stacks/') or rest not in block:
      raise CheckpointMismatch(f'no table has the parameter {path!r}')
    size, end = sizes[int(stack)], int(ends[int(stack)])
    spec = PartitionSpec(None, *specs.get(rest, ()))
    blocks = range(end - size, end)
    plan[path] = _Part(block[rest], like.shape[1:], blocks, size, spec)
  return plan


def _known(checkpoint: Checkpoint, name: str) -> Tensor:
  if name not in checkpoint:
    raise CheckpointMismatch(
      f'{checkpoint.path!r} has no tensor {name!r}; is it of another'
      ' architecture, or is a file of it missing?'
    )
  return checkpoint.tensors[name]


def _checked(checkpoint: Checkpoint, path: str, part: _Part) -> Iterator[str]:
  """The tensors of a parameter, which have the shapes that it wants."""
  shape = part.source.shape(path, part.shape)
  for k in part.blocks:
    for name in part.source.names(k):
      found = _known(checkpoint, name).shape
      if found != shape:
        raise CheckpointMismatch(
          f'{checkpoint.path!r}, {name!r} has the shape {found}, but by the'
          f' configuration {path!r} needs {shape}'
        )
      yield name


def _read(
  checkpoint: Checkpoint, part: _Part, block: int, path: str, dtype: DTypeLike
) -> Leaf:
  """The parameter of a block, as the model has it; kernels take inputs first.

  Arrays of any float dtype are cast to that of the model.
  """
  leaf = part.source.read(checkpoint, block)
  if path.endswith('/kernel'):
    leaf = leaf.mT
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
      places = _places(whole, count is not None, mesh, spec)
      buffers = list(map(_Buffers, jax.tree.leaves(whole), places))
    for buffer, leaf in zip(buffers, leaves, strict=True):
      buffer.write(leaf, k if count else None)
  assert kind is not None
  return kind.unflatten(buffer.array() for buffer in buffers)


def _places(
  whole: Any, stacked: bool, mesh: Mesh | None, spec: PartitionSpec
) -> list[Sharding]:
  """Shardings of the leaves of a parameter."""
  leaves = jax.tree.leaves(whole)
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return [place] * len(leaves)
  for candidate in _specs(spec, whole.ndim, stacked):
    try:
      places = lowbit.shardings(whole, NamedSharding(mesh, candidate))
      places = jax.tree.leaves(places)
      for leaf, place in zip(leaves, places, strict=True):
        place.shard_shape(leaf.shape)
      return places
    except ValueError:  # The parts would cut blocks or be unequal.
      continue
  return [NamedSharding(mesh, PartitionSpec())] * len(leaves)


def _specs(
  spec: PartitionSpec, rank: int, stacked: bool
) -> Iterator[PartitionSpec]:
  """How a parameter may be split: as wanted, or along its last axes."""
  yield spec
  if names := [name for name in spec if name is not None]:
    for axis in reversed(range(stacked, rank)):
      yield PartitionSpec(*[None] * axis, *names)


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
