"""Blocks of a model one by one, as methods go through them."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax.recipe import QuantSpec
from models import bert, bert_names, experts, llama, places
from support.sentence_models import Packed

# Linear layers of a block that are quantized together, in order.
STAGES = (
  'attention/(query|key|value)/kernel',
  'attention/out/kernel',
  'mlp/(gate|up)/kernel',
  'mlp/down/kernel',
)
_WINDOWS = 4  # of a batch


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Blocks in float, which hand a state from one to the next.

  Attributes:
    states: of the first block, in batches.
    run: `run(parameters, state)` gives the state of the next block.
    members: parameters by path, of each stack of blocks, with an axis of blocks
      in front.
    followers: where ranges of a block can move, for `ptq.smooth`.
    head_size: channels of a head.
  """

  states: Sequence[Any]
  run: Callable[[dict[str, Any], Any], Any]
  members: Sequence[dict[str, jax.Array]]
  followers: Mapping[str, tuple[str, ...]]
  head_size: int

  def __len__(self) -> int:
    return sum(self.sizes)

  @property
  def sizes(self) -> list[int]:
    """Of the stacks."""
    return [len(next(iter(stack.values()))) for stack in self.members]

  @property
  def widths(self) -> list[int]:
    """Inputs of the linear layers."""
    return [
      leaf.shape[-2]
      for path, leaf in self.members[0].items()
      if path.endswith('kernel')
    ]

  @property
  def folds(self) -> bool:
    """Whether all inputs of linear layers have something that can take their
    ranges."""
    fed = {path for some in self.followers.values() for path in some}
    return all(
      path in fed
      for path in self.members[0]
      if any(re.search(stage, path) for stage in STAGES)
    )

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    """Parameters of the blocks by path, one block after the other."""
    for stack, size in zip(self.members, self.sizes, strict=True):
      for k in range(size):
        yield {path: leaf[k] for path, leaf in stack.items()}


def of_llama(
  model: llama.Llama, spec: QuantSpec | None, tokens: np.ndarray
) -> Blocks:
  """Those of a language model.

  Args:
    model: in float.
    spec: of the inputs of layers whose weight is stored, None for float.
    tokens: (windows, length) that it reads.

  Raises:
    ValueError: for a mixture of experts whose activations are quantized.
  """
  config, length = model.config, tokens.shape[1]
  place = places.places(config, jnp.arange(length), length)
  states = [
    (model.embed(jnp.asarray(tokens[first : first + _WINDOWS])), jnp.int32(0))
    for first in range(0, len(tokens), _WINDOWS)
  ]

  def run(block, state):
    x, number = state
    return block(x, place(number), None)[0], number + 1

  run, members = _split(model.stacks, spec, run)
  return Blocks(states, run, members, llama.FOLLOWERS, config.head_size)


def of_bert(model: bert.Bert, spec: QuantSpec | None, packed: Packed) -> Blocks:
  """Those of a model of sentences.

  Args:
    model: in float.
    spec: as in `of_llama`.
    packed: sentences that it reads.
  """
  states = []
  for first in range(0, len(packed.tokens), _WINDOWS):
    part = Packed(*(x[first : first + _WINDOWS] for x in packed))
    own = part.sentences
    seen = own[:, None, :, None] == own[:, None, None, :]
    x = model.embedded(jnp.asarray(part.tokens), jnp.asarray(part.places))
    states.append((x, jnp.asarray(seen)))

  def run(block, state):
    x, seen = state
    return block(x, seen), seen

  config = model.config
  run, members = _split(model.stacks, spec, run)
  head_size = config.width // config.heads
  return Blocks(states, run, members, bert_names.FOLLOWERS, head_size)


class _Rounds(NamedTuple):
  """A product that quantizes what meets a stored weight."""

  spec: QuantSpec | None

  def __call__(
    self, lhs: jax.Array, rhs: Any, dimension_numbers: Any, **options: Any
  ) -> jax.Array:
    is_stored = not isinstance(rhs, jax.Array)
    product = lowbit.nn.dot_general(lhs=self.spec if is_stored else None)
    return product(lhs, rhs, dimension_numbers, **options)


def _split(
  stacks: nnx.List, spec: QuantSpec | None, run: Callable[[Any, Any], Any]
) -> tuple[Callable[[dict[str, Any], Any], Any], list[dict[str, jax.Array]]]:
  """What runs a block by its parameters, and those of each stack by path.

  Args:
    stacks: modules with an axis of blocks.
    spec: of the inputs of layers.
    run: `run(block, state)` with the module of one block.
  """
  stacks = nnx.clone(stacks)
  for _, module in nnx.iter_modules(stacks):
    if spec is not None and isinstance(module, experts.Experts):
      raise ValueError('activations of a mixture of experts stay in float')
    if isinstance(module, nnx.Linear):
      module.dot_general = _Rounds(spec)
      module.promote_dtype = lowbit.nn.promote_dtype
  parts = [nnx.split(stack) for stack in stacks]
  graph, first = parts[0]
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), first
  )
  members = [
    {
      '/'.join(map(str, path)): variable.get_raw_value()
      for path, variable in nnx.to_flat_state(state)
    }
    for _, state in parts
  ]

  def block(parameters, state):
    module = nnx.merge(graph, shapes)
    return run(lowbit.nn.nnx.assign(module, parameters), state)

  return block, members
