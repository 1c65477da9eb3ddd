"""Post-training quantization of models, by the name of the method.

Blocks are quantized one after the other, and in a block what meets the same
activations together; each layer on what the layers before it give, quantized.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import lowbit_jax as lowbit
from lowbit_jax import io, numerics, ptq
from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.ops import specs
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.transforms import Hadamard
from support.blocks import STAGES, Blocks

METHODS = (
  *('search', 'importance', 'awq', 'adaround', 'gptq', 'mr_gptq'),
  *('duquant', 'recommended'),
)

_ALL = 'kernel'  # the stage in which ranges move
Rounding = Callable[[jax.Array], jax.Array]


class Recipe(NamedTuple):
  """What is done with each layer.

  Attributes:
    step: that quantizes it.
    rotation: inputs that are rotated together before that, 0 for none.
    is_known: whether nothing else happens to inputs. If not, the step finds a
      transform of them for each layer, and layers are calibrated with inputs
      that are not quantized.
    smooths: whether ranges of activations first move into the weights of a
      block, and into what stands before them.
  """

  step: ptq.Step
  rotation: int = 0
  is_known: bool = True
  smooths: bool = False

  @property
  def transforms(self) -> bool:
    """Whether inputs of layers take a transform as they run."""
    return bool(self.rotation) or not self.is_known

  @property
  def steps(self) -> ptq.Step:
    """The rotation, and what follows."""
    if not self.rotation:
      return self.step
    return ptq.chain(ptq.hadamard(self.rotation), self.step)

  def rounding(self, spec: QuantSpec | None) -> Rounding | None:
    """From activations to what a layer meets where they are quantized."""
    if spec is None or not self.is_known:
      return None
    if not self.rotation:
      return lambda x: specs.fake_quant(x, spec, -1)
    rotation = Hadamard(self.rotation)

    def rounded(x):
      return rotation.inverse(specs.fake_quant(rotation.apply(x), spec, -1))

    return rounded


def recipe(
  name: str,
  fmt: BlockFormat,
  blocks: Blocks,
  spec: QuantSpec | None = None,
  *,
  has_transforms: bool = True,
) -> Recipe:
  """A method by its name, with the defaults that suit a format.

  Args:
    name: one of `METHODS`.
    fmt: of the weights.
    blocks: whose layers are quantized.
    spec: of the inputs of layers, None if they stay in float.
    has_transforms: whether the inputs of layers may take a transform as they
      run. What is recommended does without one if not.
  """
  rotation = math.gcd(fmt.block[0] or 32, *blocks.widths)
  rotation &= -rotation  # the largest power of two in it
  scales = ptq.rtn('mse') if fmt.has_exponent_scale else ptq.search_scales()
  match name:
    case 'search':
      return Recipe(scales)
    case 'importance':
      return Recipe(ptq.search_scales(weighted=True))
    case 'awq':
      return Recipe(ptq.awq(), is_known=False)
    case 'adaround':
      learned = ptq.adaround(steps=300, learning_rate=0.05)
      return Recipe(ptq.chain(scales, learned))
    case 'gptq':
      return Recipe(ptq.chain(scales, ptq.gptq()))
    case 'mr_gptq':
      return Recipe(ptq.chain(scales, ptq.gptq()), rotation)
    case 'recommended':
      return _recommended(fmt, blocks, rotation, spec, has_transforms)
    case 'duquant':
      turn = ptq.duquant(fmt.block[0] or 32, key=jax.random.key(0))
      return Recipe(ptq.chain(turn, scales, ptq.gptq()), is_known=False)
  raise ValueError(f'{name=} must be one of {METHODS}')


def _recommended(
  fmt: BlockFormat,
  blocks: Blocks,
  rotation: int,
  spec: QuantSpec | None,
  has_transforms: bool,
) -> Recipe:
  """What docs/ptq.md has the figures of."""
  # A rotation spreads outliers over blocks. Float elements under float scales,
  # as in NVFP4, have room for them as they are.
  has_room = not fmt.has_exponent_scale and isinstance(fmt.element, FloatFormat)
  gains = _has_blocks(fmt) and not has_room
  if not gains or not has_transforms:
    rotation = 0
  smooths = spec is not None or not gains
  steps = _scales_and_numbers(fmt)
  if spec is None or blocks.folds or not has_transforms:
    return Recipe(ptq.chain(*steps), rotation, smooths=smooths)
  # Ranges that nothing before a layer can take are divided out as it runs.
  turn = [ptq.hadamard(rotation)] if rotation else []
  scaled = ptq.chain(ptq.scale_inputs(), *turn, *steps)
  return Recipe(scaled, is_known=False, smooths=smooths)


def _scales_and_numbers(fmt: BlockFormat) -> list[ptq.Step]:
  if fmt.has_exponent_scale:
    return [ptq.rtn('mse'), ptq.gptq()]
  search = ptq.search_scales(weighted=True)
  if not _has_blocks(fmt):
    return [search, ptq.gptq()]
  # With a few thousand tokens to go by, other tokens lose least so.
  damping = 0.1
  return [search, ptq.gptq(damping), ptq.refine(damping=damping)]


def _has_blocks(fmt: BlockFormat) -> bool:
  """Whether scales are of blocks, small enough to be solved for."""
  return fmt.scale is not None and fmt.block[0] > 0


def spec_of_activations(fmt: BlockFormat) -> QuantSpec:
  """How activations are rounded beside weights of a method.

  Of each block the best of a few scales is found as it comes. A scale above
  those of blocks is that of one token, so that no token depends on others.
  """
  if fmt.has_exponent_scale:
    return QuantSpec(fmt, 'mse')
  has_rows = fmt.tensor_scale and fmt.scale is not None and not fmt.is_tile
  if 'four_over_six' not in numerics.scale_rules(fmt):
    return QuantSpec(fmt, row_scales=has_rows)
  # The scale that maps to 4 is half as large again: 256 leaves it room.
  target = 256.0 if fmt.tensor_scale else None
  return QuantSpec(fmt, 'four_over_six', target=target, row_scales=has_rows)


class Error(NamedTuple):
  """What quantizing a layer does to its outputs, as a share of their square.

  Attributes:
    path: of its weight.
    nearest: mean square error of the nearest numbers, where they are stored.
    error: of those that the method chose.
  """

  path: str
  nearest: float
  error: float


class Block(NamedTuple):
  """A block that is done.

  Attributes:
    parameters: by path. Norms and biases change as well where something folds
      into them.
    errors: of its layers.
  """

  parameters: dict[str, Any]
  errors: list[Error]


def one_by_one(
  blocks: Blocks,
  fmt: BlockFormat,
  own: Recipe,
  spec: QuantSpec | None = None,
  *,
  select: Callable[[int, str], bool] = lambda number, path: True,
  folder: pathlib.Path | None = None,
) -> Iterator[Block]:
  """Quantizes blocks, each on what the quantized ones before it give.

  Args:
    blocks: in float, with the states that they are calibrated with.
    fmt: of the kernels of their linear layers.
    own: what is done with each.
    spec: of the inputs of the layers, None if they stay in float.
    select: which kernels, by the number of the block and the path in it.
    folder: where blocks are kept when they are done. Those that it has are not
      made anew.

  Yields:
    The blocks in order.

  Raises:
    DamagedFileError: for a file in the folder that is damaged.
  """
  files = (
    [folder / f'{k:05}.lowbit' for k in range(len(blocks))] if folder else []
  )
  kept = list(itertools.takewhile(pathlib.Path.exists, files))
  states, run = blocks.states, jax.jit(blocks.run)
  for path in kept:
    parameters, errors = io.load(path)
    yield Block(parameters, [Error(*error) for error in errors])
    if len(kept) < len(blocks):
      states = [run(parameters, state) for state in states]
  number, errors = len(kept), []

  def watch(layer: ptq.Layer) -> None:
    nearest = layer._replace(quantized=None).error()
    errors.append(Error(f'{number}/{layer.path}', nearest, layer.error()))

  def quantize(
    parameters: dict[str, Any], stage: str, observed: Mapping[str, Any]
  ) -> dict[str, Any]:
    if stage == _ALL:
      followers, size = blocks.followers, blocks.head_size
      return ptq.smooth(parameters, observed, followers, head_size=size)[0]
    paths = {p for p in parameters if re.search(stage, p) and select(number, p)}
    if not paths:
      return parameters
    method = ptq.method(own.steps, observed, watch)
    return lowbit.nn.quantize_params(
      parameters, lambda path, leaf: path in paths, fmt, method=method
    )

  for parameters in ptq.sequential(
    blocks.run,
    itertools.islice(blocks, number, None),
    states,
    quantize,
    (_ALL, *STAGES) if own.smooths else STAGES,
    rounding=own.rounding(spec),
  ):
    block = Block(parameters, list(errors))
    if folder:
      folder.mkdir(parents=True, exist_ok=True)
      io.save(files[number], [parameters, [list(e) for e in block.errors]])
    yield block
    number += 1
    errors.clear()


def stacked(blocks: Sequence[Block], sizes: Sequence[int]) -> dict[str, Any]:
  """Parameters of blocks as those of stacks, for `lowbit.nn.nnx.assign`."""
  out, waiting = {}, iter(blocks)
  for stack, size in enumerate(sizes):
    members = [own.parameters for own in itertools.islice(waiting, size)]
    for path in members[0]:
      parts = [own[path] for own in members]
      out[f'stacks/{stack}/{path}'] = lowbit.ops.stack(parts)
  return out
