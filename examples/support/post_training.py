"""Post-training quantization of language models, by the name of the method.

Blocks are quantized one after the other, and in a block what meets the same
activations together; each layer on what the layers before it give, quantized.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import numerics, ptq
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ops import specs
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.transforms import Hadamard
from models import experts, llama, places
from models.llama_config import Config

METHODS = (
  *('search', 'importance', 'awq', 'adaround', 'gptq', 'mr_gptq'),
  *('duquant', 'recommended'),
)

# Linear layers of a block that are quantized together, in order.
_STAGES = (
  'attention/(query|key|value)/kernel',
  'attention/out/kernel',
  'mlp/(gate|up)/kernel',
  'mlp/down/kernel',
)
_ALL = 'kernel'  # the stage in which ranges move
_WINDOWS = 4  # of a batch
Rounding = Callable[[jax.Array], jax.Array]


class Recipe(NamedTuple):
  """What is done with each layer.

  Attributes:
    step: that quantizes it.
    rotation: inputs that are rotated together before that, 0 for none.
    is_known: whether nothing else happens to activations. If not, layers are
      calibrated with activations that are not quantized.
    smooths: whether ranges of activations first move into the weights of a
      block, and into what stands before them.
  """

  step: ptq.Step
  rotation: int = 0
  is_known: bool = True
  smooths: bool = False

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
  name: str, fmt: BlockFormat, config: Config, spec: QuantSpec | None = None
) -> Recipe:
  """A method by its name, with the defaults that suit a format.

  Args:
    name: one of `METHODS`.
    fmt: of the weights.
    config: of the model, whose layers must have inputs for whole rotations.
    spec: of the inputs of layers, None if they stay in float.
  """
  attention = config.heads * config.head_size
  inputs = config.width, config.hidden, attention
  rotation = math.gcd(fmt.block[0] or 32, *inputs)
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
    case 'recommended' if fmt.has_exponent_scale:
      rounded = ptq.chain(scales, ptq.gptq())
      return Recipe(rounded, rotation, smooths=spec is not None)
    case 'recommended':
      weighted = ptq.search_scales(weighted=True)
      rounded = ptq.chain(weighted, ptq.gptq(), ptq.refine())
      return Recipe(rounded, smooths=spec is not None)
    case 'duquant':
      turn = ptq.duquant(fmt.block[0] or 32, key=jax.random.key(0))
      return Recipe(ptq.chain(turn, scales, ptq.gptq()), is_known=False)
  raise ValueError(f'{name=} must be one of {METHODS}')


def rule_of_activations(fmt: BlockFormat) -> str | None:
  """The scale rule of activations beside weights of a method: their range is
  that of each block, so the best of a few scales is found as they come."""
  if fmt.has_exponent_scale:
    return 'mse'
  return (
    'four_over_six' if 'four_over_six' in numerics.scale_rules(fmt) else None
  )


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


class _Rounds(NamedTuple):
  """A product that quantizes what meets a stored weight."""

  spec: QuantSpec | None

  def __call__(
    self, lhs: jax.Array, rhs: Any, dimension_numbers: Any, **options: Any
  ) -> jax.Array:
    is_stored = not isinstance(rhs, jax.Array)
    product = lowbit.nn.dot_general(lhs=self.spec if is_stored else None)
    return product(lhs, rhs, dimension_numbers, **options)


class _Blocks:
  """The blocks of a model in float, one by one.

  Args:
    model: in float.
    spec: of the inputs of layers whose weight is stored.
  """

  def __init__(self, model: llama.Llama, spec: QuantSpec | None) -> None:
    self._config = model.config
    stacks = nnx.clone(model.stacks)
    for _, module in nnx.iter_modules(stacks):
      if spec is not None and isinstance(module, experts.Experts):
        raise ValueError('activations of a mixture of experts stay in float')
      if isinstance(module, nnx.Linear):
        module.dot_general = _Rounds(spec)
        module.promote_dtype = lowbit.nn.promote_dtype
    parts = [nnx.split(stack) for stack in stacks]
    self._graph, first = parts[0]
    self._shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), first
    )
    self._values = [
      {
        '/'.join(map(str, path)): variable.get_raw_value()
        for path, variable in nnx.to_flat_state(state)
      }
      for _, state in parts
    ]
    self.sizes = [len(next(iter(part.values()))) for part in self._values]

  def parameters(self, number: int) -> dict[str, Any]:
    """Of a block: its number, and arrays by path."""
    own, stack = number, 0
    while own >= self.sizes[stack]:
      own, stack = own - self.sizes[stack], stack + 1
    leaves = {path: leaf[own] for path, leaf in self._values[stack].items()}
    return {**leaves, 'number': jnp.int32(number)}

  def run(self, parameters: dict[str, Any], x: jax.Array) -> jax.Array:
    """What a block makes of x (batch, tokens, width)."""
    values, tokens = dict(parameters), x.shape[1]
    place = places.places(self._config, jnp.arange(tokens), tokens)
    place = place(values.pop('number'))
    block = nnx.merge(self._graph, self._shapes)
    return lowbit.nn.nnx.assign(block, values)(x, place, None)[0]


def weights(
  model: llama.Llama,
  fmt: BlockFormat,
  own: Recipe,
  tokens: np.ndarray,
  spec: QuantSpec | None = None,
  progress: Callable[[Any], Any] = lambda blocks: blocks,
) -> tuple[dict[str, Any], list[Error]]:
  """Parameters of blocks by path, for `lowbit.nn.nnx.assign`, and their errors.

  Args:
    model: in float.
    fmt: of the kernels of the linear layers of its blocks.
    own: what is done with each.
    tokens: (windows, length) that the model is calibrated with.
    spec: of the inputs of the layers, None if they stay in float.
    progress: wraps the sequence of blocks.
  """
  batches = [
    model.embed(jnp.asarray(tokens[first : first + _WINDOWS]))
    for first in range(0, len(tokens), _WINDOWS)
  ]
  blocks, errors, steps = _Blocks(model, spec), [], own.steps
  done: list[dict[str, Any]] = []

  def watch(layer: ptq.Layer) -> None:
    nearest = layer._replace(quantized=None).error()
    errors.append(Error(f'{len(done)}/{layer.path}', nearest, layer.error()))

  def quantize(
    parameters: dict[str, Any], select: str, observed: Mapping[str, Any]
  ) -> dict[str, Any]:
    if select == _ALL:
      followers, size = llama.FOLLOWERS, model.config.head_size
      return ptq.smooth(parameters, observed, followers, head_size=size)[0]
    method = ptq.method(steps, observed, watch)
    return lowbit.nn.quantize_params(parameters, select, fmt, method=method)

  for parameters in ptq.sequential(
    blocks.run,
    map(blocks.parameters, progress(range(sum(blocks.sizes)))),
    batches,
    quantize,
    (_ALL, *_STAGES) if own.smooths else _STAGES,
    rounding=own.rounding(spec),
  ):
    # Norms and biases change as well where something folds into them.
    done.append({k: v for k, v in parameters.items() if k != 'number'})
  return _stacked(done, blocks.sizes), errors


def _stacked(
  done: Sequence[dict[str, Any]], sizes: Sequence[int]
) -> dict[str, Any]:
  """Weights of blocks as those of stacks."""
  out, first = {}, 0
  for stack, size in enumerate(sizes):
    members = done[first : first + size]
    first += size
    for path in members[0]:
      out[f'stacks/{stack}/{path}'] = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(own[path] for own in members)
      )
  return out
