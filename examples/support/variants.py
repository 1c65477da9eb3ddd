"""A model in other formats than those of its checkpoint."""

import functools
import itertools
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.formats import BlockFormat
from lowbit_jax.recipe import QuantSpec
from models import experts
from support import command, post_training
from support.blocks import Blocks

# Linear layers of the blocks, a router aside, and what the head may be.
LINEARS = re.compile(r'stacks/\d+/(attention|mlp)/(?!router)\w+/kernel')
HEADS = re.compile(r'head/kernel|embed/embedding')


def decoded(model: nnx.Module) -> nnx.Module:
  """A copy of a model whose parameters are float32 arrays."""
  copy = nnx.clone(model)
  values = {
    path: lowbit.dequantize(value, jnp.float32)
    for path, value in _parameters(copy).items()
    if isinstance(value, lowbit.QArray | lowbit.ops.Transformed)
  }
  return lowbit.nn.nnx.assign(copy, values)


def quantized(
  model: nnx.Module,
  fmt: BlockFormat,
  *,
  head: bool = False,
  scale_rule: str | None = None,
) -> nnx.Module:
  """A copy of a float model whose linear layers are packed.

  Args:
    model: that `decoded` gave.
    fmt: of their kernels.
    head: whether the head, and the embedding where it is the same, is too.
    scale_rule: in place of that of the format.
  """

  def select(path, value):
    del value
    return bool(LINEARS.fullmatch(path) or (head and HEADS.fullmatch(path)))

  def axis(path, value):  # experts are no layers that the library knows
    return -2 if LINEARS.fullmatch(path) and value.ndim > 3 else None

  return lowbit.nn.nnx.quantize(
    nnx.clone(model), select, fmt, axis=axis, scale_rule=scale_rule
  )


def with_activations(model: nnx.Module, spec: QuantSpec) -> nnx.Module:
  """A copy of a model whose linear layers round what they are given.

  Raises:
    ValueError: for a mixture of experts, whose products are no linear layers.
  """
  return _with_products(model, lowbit.nn.dot_general(lhs=spec))


def with_stored_activations(model: nnx.Module, fmt: BlockFormat) -> nnx.Module:
  """The same without a derivative: inputs are stored in the format, so that
  kernels can multiply their integers."""
  return _with_products(model, _StoresInputs(fmt))


class _StoresInputs(NamedTuple):
  """A product that quantizes its left operand."""

  fmt: BlockFormat

  def __call__(
    self, lhs: jax.Array, rhs: Any, dimension_numbers: Any, **options: Any
  ) -> jax.Array:
    (contracted, _), _ = dimension_numbers
    lhs = lowbit.quantize(lhs, self.fmt, axis=contracted[-1])
    return lowbit.nn.dot_general()(lhs, rhs, dimension_numbers, **options)


def _with_products(model: nnx.Module, product: Callable) -> nnx.Module:
  """A copy of a model whose linear layers compute products in another way."""
  copy = nnx.clone(model)
  for path, module in nnx.iter_modules(copy):
    if isinstance(module, experts.Experts):
      raise ValueError('activations of a mixture of experts stay in float')
    name = '/'.join(map(str, (*path, 'kernel')))
    if isinstance(module, nnx.Linear) and LINEARS.fullmatch(name):
      module.dot_general = product
      module.promote_dtype = lowbit.nn.promote_dtype
  return copy


def nbytes(model: nnx.Module) -> int:
  """Bytes of all parameters."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


class Pair(NamedTuple):
  """Formats of linear layers and of their inputs by name, 'none' for float, and
  the method that quantizes weights, 'rtn' for rounding to the nearest."""

  weights: str
  activations: str
  method: str = 'rtn'


def pairs(
  weights: Sequence[str],
  activations: Sequence[str],
  methods: Sequence[str] = ('rtn',),
) -> list[Pair]:
  """Every pair of two lists once with each method, the float model first.

  Args:
    weights: formats by name, 'none' for float, which needs no method.
    activations: the same, and 'same' for the format of the weights.
    methods: by name.
  """
  every = [
    Pair(w, w if a == 'same' else a, 'rtn' if w == 'none' else method)
    for w, a, method in itertools.product(weights, activations, methods)
  ]
  return list(dict.fromkeys([Pair('none', 'none'), *every]))


class Calibration(NamedTuple):
  """What methods other than 'rtn' need.

  Attributes:
    blocks: `blocks(model, spec)` gives those of a model in float with what they
      are calibrated with; the spec is that of the inputs of their layers.
    folder: where the blocks of a pair are kept.
    report: is called with a pair, and what its method did to each layer.
  """

  blocks: Callable[[Any, QuantSpec | None], Blocks]
  folder: Callable[[Pair], pathlib.Path]
  report: Callable[[Pair, Sequence[post_training.Error]], None]


class Variants:
  """A model in pairs of formats, each made when it is asked for.

  Args:
    loaded: the model as its checkpoint has it.
    head: whether the head is quantized too. If not, it and the embedding stay
      as they are, packed or not.
    scale_rule: of weights, and of activations in their format; None for that of
      each format.
    calibration: for methods other than 'rtn'.
  """

  def __init__(
    self,
    loaded: nnx.Module,
    head: bool = False,
    scale_rule: str | None = None,
    calibration: Calibration | None = None,
  ) -> None:
    self._loaded, self._head, self._rule = loaded, head, scale_rule
    self._calibration = calibration
    self._nearest = functools.lru_cache(1)(
      lambda name: self._quantized(self.floats, name)
    )

  @functools.cached_property
  def floats(self) -> Any:
    """The model with float32 parameters."""
    return decoded(self._loaded)

  def __call__(self, pair: Pair) -> Any:
    """The model in a pair of formats."""
    if pair.weights == 'none':
      model = self.floats
    elif pair.method == 'rtn':
      model = self._nearest(pair.weights)
    else:
      model = self._by_method(pair)
    return self._rounding(model, pair)

  def check(self, pair: Pair, run: Callable[[Any], Any]) -> None:
    """Makes sure that a pair fits, without computing anything.

    Args:
      pair: of formats.
      run: what is to be done with the model.

    Raises:
      ValueError: if it does not; also where a kernel would be padded much.
    """

    def traced():
      model = decoded(self._loaded)
      if pair.weights != 'none':
        model = self._quantized(model, pair.weights)
      return run(self._rounding(model, pair))

    try:
      with warnings.catch_warnings():
        warnings.filterwarnings('error', 'padding adds', UserWarning)
        nnx.eval_shape(traced)
    except (TypeError, ValueError, UserWarning) as error:
      raise ValueError(
        f'weights in {pair.weights} with activations in {pair.activations}:'
        f' {error}'
      ) from error

  def sizes(self, model: nnx.Module) -> dict[str, float]:
    """'bits' per weight of what is quantized, and 'bytes' of all parameters."""
    chosen = [
      value
      for path, value in _parameters(model).items()
      if LINEARS.fullmatch(path) or (self._head and HEADS.fullmatch(path))
    ]
    held, count = sum(w.nbytes for w in chosen), sum(w.size for w in chosen)
    return {'bits': 8 * held / count, 'bytes': nbytes(model)}

  def _by_method(self, pair: Pair) -> Any:
    if self._calibration is None or self._rule is not None:
      raise ValueError(
        f'method {pair.method!r} chooses scales by itself and is calibrated:'
        ' leave out scale_rule, and give calibration'
      )
    fmt, spec = block_format(pair.weights), self._spec(pair)
    blocks = self._calibration.blocks(self.floats, spec)
    recipe = post_training.recipe(pair.method, fmt, blocks, spec)
    folder = self._calibration.folder(pair)
    done = command.progress(
      post_training.one_by_one(blocks, fmt, recipe, spec, folder=folder),
      total=len(blocks),
      unit='block',
      leave=False,
    )
    done = list(done)
    self._calibration.report(pair, [e for own in done for e in own.errors])
    values = post_training.stacked(done, blocks.sizes)
    model = lowbit.nn.nnx.assign(nnx.clone(self.floats), values)
    return self._with_head(model, fmt)

  def _quantized(self, floats: nnx.Module, name: str) -> nnx.Module:
    fmt = block_format(name)
    model = quantized(floats, fmt, scale_rule=self._rule)
    return self._with_head(model, fmt)

  def _with_head(self, model: nnx.Module, fmt: BlockFormat) -> nnx.Module:
    """The model with a quantized head, or with that of the checkpoint."""
    if self._head:
      model = quantized(model, fmt, head=True, scale_rule=self._rule)
    else:
      kept = {
        path: value
        for path, value in _parameters(self._loaded).items()
        if HEADS.fullmatch(path)
      }
      lowbit.nn.nnx.assign(model, kept)
    return model

  def _rounding(self, model: Any, pair: Pair) -> Any:
    spec = self._spec(pair)
    if spec is None:
      return model
    return with_activations(model, spec)

  def _spec(self, pair: Pair) -> QuantSpec | None:
    """What is done to the inputs of linear layers."""
    if pair.activations == 'none':
      return None
    fmt = block_format(pair.activations)
    if pair.method != 'rtn':
      return post_training.spec_of_activations(fmt)
    rule = self._rule if pair.activations == pair.weights else None
    return QuantSpec(fmt, scale_rule=rule)


def block_format(name: str) -> BlockFormat:
  """A block format by its name."""
  fmt = formats.get(name)
  assert isinstance(fmt, BlockFormat)
  return fmt


def _parameters(model: nnx.Module) -> dict[str, Any]:
  return {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }
