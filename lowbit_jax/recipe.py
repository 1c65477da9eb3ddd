"""What is done to the operands of the products of a network, as values.

A linear layer y = x w, with x (M, K) and w (K, N), is three products in
training. Each has two operands, and every one of the six sites is quantized in
blocks along the axis that its product reduces:

  fwd     y  = x w      over K    lhs x,   rhs w
  dgrad   dx = dy w^T   over N    lhs dy,  rhs w
  wgrad   dw = x^T dy   over M    lhs x,   rhs dy

Everything here is frozen and hashable, hence static under `jax.jit`. `ops.qdot`
computes with it, and `training.recipes` names the published ones.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable
from typing import Any, Protocol

import jax

from lowbit_jax._typing import Key, ScaleRule, as_tuple
from lowbit_jax.formats import BlockFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics import _rounding, _scaling
from lowbit_pallas.arith.codec import RANDOM_BITS
from lowbit_pallas.arith.hadamard import check_power_of_two

BACKWARDS = ('identity', 'clipped', 'absmax', 'trust')
SIGNS = ('none', 'fixed', 'per_call')
RESIDUALS = ('high_precision', 'forward', 'requantized')
_KEYED = ('stochastic', 'dithered')


def check_quantizer(name: str, value: object) -> None:
  """Refuses what is neither None, a QuantSpec nor a hashable quantizer."""
  if value is None or isinstance(value, QuantSpec):
    return
  if not callable(value) or not hasattr(value, 'needs_key'):
    raise TypeError(
      f'{name}={value!r} must be None, a QuantSpec or a quantizer: a hashable'
      ' function of (x, axis, key) with a property needs_key'
    )
  hash(value)


def check_recipe(recipe: object, name: str = 'recipe') -> 'Recipe':
  """Refuses what is not a recipe, with the remedy."""
  if isinstance(recipe, Recipe):
    return recipe
  raise TypeError(
    f'{name}={recipe!r} must be a Recipe, such as'
    " lowbit_jax.training.recipes.get('mxfp8')"
  )


def check_policy(recipe: object) -> 'Recipe | Policy | None':
  """Refuses what is neither a recipe, a policy nor None, with the remedy."""
  if recipe is None or isinstance(recipe, Recipe | Policy):
    return recipe
  raise TypeError(
    f'recipe={recipe!r} must be a Recipe, a Policy or None; by name it is'
    ' lowbit_jax.training.recipes.get(name)'
  )


def check_spec(name: str, spec: object) -> 'QuantSpec | None':
  """Refuses what is neither None nor a QuantSpec."""
  if spec is None or isinstance(spec, QuantSpec):
    return spec
  raise TypeError(
    f'{name}={spec!r} must be a QuantSpec or None; for a format pass'
    ' QuantSpec(fmt)'
  )


def _check_site(name: str, spec) -> None:
  if not isinstance(spec, QuantSpec):
    return
  fmt = spec.fmt
  if spec.row_scales:
    raise ValueError(
      f'{name}: row_scales=True is for nn.dot_general; the products of a'
      ' recipe store operands with one tensor scale: drop it'
    )
  if fmt.scale is None or fmt.tensor_scale:
    return
  if fmt.scale.bits <= 8 and fmt.scale.exponent_bits <= 4:
    raise ValueError(
      f'{name}: the scales of {fmt} reach down to {fmt.scale.min_subnormal:.2g}'
      ' only, below which gradients become zero: use a format with a tensor'
      ' scale (formats.nvfp4) or scales of more range (ue5m3, e8m0)'
    )


def _check_rotation(name: str, gemm) -> None:
  for spec in (gemm.lhs, gemm.rhs):
    held = isinstance(spec, QuantSpec) and spec.tensor_scaling is not None
    if gemm.hadamard and held:
      raise ValueError(
        f'{name}: tensor_scaling holds the magnitude of the operand, not of its'
        ' rotation; drop hadamard or tensor_scaling'
      )


def _check_saved(residuals: str, side: str, spec) -> None:
  if spec is None:
    return
  if not isinstance(spec, QuantSpec):
    if residuals == 'requantized':
      raise TypeError(f'residuals={residuals!r} needs QuantSpecs, not {spec!r}')
    return
  if spec.backward != 'identity':
    raise ValueError(
      f'residuals={residuals!r} with backward={spec.backward!r} on fwd.{side}:'
      " the derivative of the quantizer needs the operand; use 'identity'"
    )
  fmt = spec.fmt
  if residuals == 'forward' and not fmt.is_tile and fmt.scale and fmt.block[0]:
    raise ValueError(
      f"residuals='forward' with {fmt} on fwd.{side}: its blocks lie along one"
      ' axis and the backward product reduces the other; use tiles, a scale per'
      " tensor or row, or residuals='requantized'"
    )


def _one_of(name: str, value, allowed) -> None:
  if value not in allowed:
    raise ValueError(f'{name}={value!r} is not one of {allowed}')


@dataclasses.dataclass(frozen=True)
class TensorScaling:
  """Where the tensor scale of an operand comes from, if not from its own data.

  Attributes:
    window: the largest magnitude is that of the last `window` steps.
    every: it is renewed every so many steps and held in between.

  `TensorScaling(window=1024)` is delayed scaling, `TensorScaling(every=50)`
  sample and hold. Its state is that of `training.scaling`.
  """

  window: int = 1
  every: int = 1

  def __post_init__(self) -> None:
    for name in ('window', 'every'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}={value!r} must be a positive number of steps')
    if self.window > 1 and self.every > 1:
      raise ValueError(
        f'window={self.window} and every={self.every}: delayed scaling renews'
        ' its scale in every step; use every=1'
      )


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How one operand is fake-quantized; hashable, so static under jit.

  Attributes:
    fmt: block format, a value such as `formats.mxfp4`.
    scale_rule: how scales follow from the data. None becomes the rule of the
      format, so that equal specs do the same.
    rounding: 'nearest_even', 'toward_zero', or 'stochastic' and 'dithered',
      which need a key in every call.
    backward: gradient of the rounding: 'identity', 'clipped', 'absmax' or
      'trust', see `fake_quant`.
    random_bits: random bits per element for 'stochastic', 1 to 23.
    prescale: elements are multiplied by it once their scale is chosen, and a
      product by its inverse: with 3/4 and the rule 'floor' nothing saturates in
      E2M1, so that stochastic rounding has no bias.
    target: the block scale to which the largest block of a two-level format is
      mapped; None for the largest of the scale format. Less leaves headroom
      where the tensor scale is held.
    tensor_scaling: None for a tensor scale from the data, else how it is held.
    row_scales: whether each row of a two-level format, which is all elements
      along the block axis, has a tensor scale of its own. The values of a token
      then do not depend on those beside it.

  Examples:
    >>> from lowbit_jax import formats
    >>> QuantSpec(formats.mxfp4, scale_rule='rceil').rounding
    'nearest_even'
  """

  fmt: BlockFormat
  scale_rule: ScaleRule | None = None
  rounding: str = 'nearest_even'
  backward: str = 'identity'
  random_bits: int = RANDOM_BITS
  prescale: float = 1.0
  target: float | None = None
  tensor_scaling: TensorScaling | None = None
  row_scales: bool = False

  def __post_init__(self) -> None:
    check_format(self.fmt)
    rule = _scaling.check_scale_rule(self.fmt, self.scale_rule)
    object.__setattr__(self, 'scale_rule', rule)
    for name, allowed in (
      ('rounding', _rounding.ROUNDINGS),
      ('backward', BACKWARDS),
    ):
      _one_of(name, getattr(self, name), allowed)
    _rounding.check_rounding('nearest_even', None, self.random_bits)
    if not self.prescale > 0:
      raise ValueError(f'prescale={self.prescale!r} must be positive')
    if self.prescale != 1 and self.backward != 'identity':
      raise ValueError(
        f'prescale={self.prescale!r} with backward={self.backward!r}: only'
        " 'identity' is defined for it"
      )
    two_levels = self.fmt.tensor_scale and self.fmt.scale is not None
    if self.target is not None:
      if not two_levels or not 0 < self.target <= self.fmt.scale.max:
        raise ValueError(
          f'target={self.target!r} is a scale of a two-level format such as'
          f' nvfp4, at most its largest; {self.fmt} has none that large'
        )
    if not isinstance(self.tensor_scaling, TensorScaling | None):
      raise TypeError(
        f'tensor_scaling={self.tensor_scaling!r} must be a TensorScaling or'
        ' None'
      )
    if self.tensor_scaling is not None and not self.fmt.tensor_scale:
      raise ValueError(
        f'tensor_scaling={self.tensor_scaling} needs a format with a tensor'
        f' scale; {self.fmt} has none'
      )
    if not isinstance(self.row_scales, bool):
      raise TypeError(f'row_scales={self.row_scales!r} must be a bool')
    if self.row_scales and (
      not two_levels or self.fmt.is_tile or self.tensor_scaling is not None
    ):
      raise ValueError(
        f'row_scales=True is for two-level formats with blocks along one axis,'
        f' such as nvfp4, without tensor_scaling; got {self.fmt} and'
        f' tensor_scaling={self.tensor_scaling}'
      )

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return self.rounding in _KEYED


class Quantizer(Protocol):
  """Anything else that quantizes, as a hashable value.

  Its own derivative is its rule. It may have a bool `is_straight_through`:
  whether that is the identity, so that none is taken. Missing counts as false.
  """

  @property
  def needs_key(self) -> bool:
    """Whether it draws random bits."""
    ...

  def __call__(self, x: jax.Array, axis: int, key: Key | None) -> Any:
    """An array of the shape and dtype of x, quantized along `axis`."""
    ...


@dataclasses.dataclass(frozen=True)
class GemmSpec:
  """One product of two operands that share a reduction axis.

  Attributes:
    lhs: what is done to the left operand, None for nothing.
    rhs: what is done to the right operand.
    hadamard: 0, or the block size, a power of two, of a Hadamard rotation of
      both operands along the reduction axis, which leaves their product as it
      is and spreads outliers before they are quantized.
    signs: random signs of the rotation: 'none', 'fixed' for the same in every
      call, 'per_call' for new ones from the key.
  """

  lhs: QuantSpec | Quantizer | None = None
  rhs: QuantSpec | Quantizer | None = None
  hadamard: int = 0
  signs: str = 'none'

  def __post_init__(self) -> None:
    for name in ('lhs', 'rhs'):
      check_quantizer(name, getattr(self, name))
    _one_of('signs', self.signs, SIGNS)
    if self.hadamard:
      check_power_of_two(self.hadamard, 'hadamard')
    elif self.signs != 'none':
      raise ValueError(f'signs={self.signs!r} need a rotation: set hadamard=')

  @property
  def needs_key(self) -> bool:
    """Whether a call draws random bits."""
    sites = any(s is not None and s.needs_key for s in (self.lhs, self.rhs))
    return sites or self.signs == 'per_call'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a linear layer is trained: three products, and what they share.

  Attributes:
    name: for people.
    fwd: y = x w.
    dgrad: dx = dy w^T.
    wgrad: dw = x^T dy.
    residuals: what the backward products start from. 'high_precision' is the
      operands as they came, 'requantized' those that the forward product used,
      quantized once more along the other axis, and 'forward' those as they
      are: the derivative of quantization-aware training. Both save codes
      instead of numbers. Blocks along one axis cannot serve the other, so
      'forward' needs tiles, or scales of whole tensors or rows.
    center: whether x is taken relative to its mean over all tokens of a call,
      x w = (x - m) w + m w with the row m w in high precision, in forward and
      backward products alike. Features whose mean is far from zero, as behind a
      GELU, then no longer fix the scales of their blocks. The rounding of a
      token depends on the others of its batch.
    principal: how many leading directions of x, about its mean with `center`,
      are multiplied in high precision, x w = (x - x P P^T) w + (x P) (P^T w)
      with orthonormal columns P (K, principal) from two subspace iterations
      over some of the tokens of a call, in forward and backward products alike.
      A few directions hold much of the activations of trained networks
      ('Metis', 2025). Adds principal (2 / N + 1 / K) of the multiplications of
      x w and the search of P, which takes at most 1024 tokens; depends on the
      other tokens as `center` does.
    switches: ((fraction, recipe), ...) in ascending order: from that fraction
      of the training on another recipe takes over, see `at`.

  Examples:
    >>> from lowbit_jax import formats
    >>> mxfp8 = QuantSpec(formats.mxfp8_e4m3, 'rceil')
    >>> both = GemmSpec(mxfp8, mxfp8)
    >>> Recipe('mxfp8', both, both, both).needs_key
    False
  """

  name: str
  fwd: GemmSpec = GemmSpec()
  dgrad: GemmSpec = GemmSpec()
  wgrad: GemmSpec = GemmSpec()
  residuals: str = 'high_precision'
  center: bool = False
  principal: int = 0
  switches: tuple[tuple[float, 'Recipe'], ...] = ()

  def __post_init__(self) -> None:
    for name in ('fwd', 'dgrad', 'wgrad'):
      gemm = getattr(self, name)
      if not isinstance(gemm, GemmSpec):
        raise TypeError(f'{name}={gemm!r} must be a GemmSpec')
      for side in ('lhs', 'rhs'):
        _check_site(f'{name}.{side}', getattr(gemm, side))
      _check_rotation(name, gemm)
    _one_of('residuals', self.residuals, RESIDUALS)
    for name, kind in (('name', str), ('center', bool)):
      value = getattr(self, name)
      if not isinstance(value, kind):
        raise TypeError(f'{name}={value!r} must be of type {kind.__name__}')
    if self.residuals == 'forward':
      for name, side in (('wgrad', 'lhs'), ('dgrad', 'rhs')):
        if getattr(getattr(self, name), side) is not None:
          raise ValueError(
            f"residuals='forward' takes {name}.{side} from the forward product:"
            ' leave it None'
          )
    if self.residuals != 'high_precision':
      for side in ('lhs', 'rhs'):
        _check_saved(self.residuals, side, getattr(self.fwd, side))
      if self.fwd.hadamard and self.residuals == 'requantized':
        raise ValueError(
          "residuals='requantized' saves what the forward product used, which"
          ' is rotated; drop fwd.hadamard'
        )
    if not isinstance(self.principal, int) or self.principal < 0:
      raise ValueError(
        f'principal={self.principal!r} must be a number of directions, or 0'
      )
    lhs = self.fwd.lhs
    held = isinstance(lhs, QuantSpec) and lhs.tensor_scaling
    for name in ('center', 'principal'):
      if held and getattr(self, name):
        raise ValueError(
          f'{name}={getattr(self, name)} with tensor_scaling on fwd.lhs: the'
          ' magnitude that is held is that of x, not of what remains of it;'
          ' drop one of them'
        )
    for switch in as_tuple('switches', self.switches):
      if not isinstance(switch, tuple) or len(switch) != 2:
        raise TypeError(f'switches: {switch!r} must be (fraction, recipe)')
      check_recipe(switch[1], f'switches: {switch[0]!r}, recipe')
    starts = [start for start, _ in self.switches]
    if starts != sorted(starts) or not all(0 < s <= 1 for s in starts):
      raise ValueError(
        f'switches start at {starts}; use ascending fractions in (0, 1]'
      )

  @property
  def gemms(self) -> tuple[GemmSpec, GemmSpec, GemmSpec]:
    return self.fwd, self.dgrad, self.wgrad

  @property
  def needs_key(self) -> bool:
    """Whether a call, or its derivative, draws random bits."""
    return any(gemm.needs_key for gemm in self.gemms)

  @property
  def forward_needs_key(self) -> bool:
    """Whether the product itself draws random bits."""
    return self.fwd.needs_key

  def at(self, fraction: float) -> 'Recipe':
    """The recipe in force after `fraction` of the training."""
    if not isinstance(fraction, numbers.Real) or not 0 <= fraction < math.inf:
      raise ValueError(f'{fraction=} must be a number, a share of the training')
    recipe = dataclasses.replace(self, switches=())
    for start, later in self.switches:
      if fraction >= start:
        recipe = later
    return recipe

  def forward_only(self) -> 'Recipe':
    """The same forward product with a derivative in high precision."""
    switches = tuple((at, later.forward_only()) for at, later in self.switches)
    return Recipe(
      f'{self.name}, forward only',
      fwd=self.fwd,
      center=self.center,
      principal=self.principal,
      switches=switches,
    )


@dataclasses.dataclass(frozen=True)
class Policy:
  """Which recipe each layer takes.

  Attributes:
    recipe: what layers take unless said otherwise; None for none.
    rules: ((regular expression, recipe or None), ...); the first that is found
      in the path of a layer, as 'block_3/attention/qkv', decides.
    first: how many blocks at the start stay in high precision.
    last: how many blocks at the end do.
    blocks: number of blocks, needed for `last`. The first number in a path is
      the index of its block.

  Examples:
    >>> policy = Policy(Recipe('mxfp8'), rules=(('head', None),), first=1)
    >>> paths = ('block_0/up', 'block_1/up', 'head')
    >>> [policy.at(path) is None for path in paths]
    [True, False, True]
  """

  recipe: Recipe | None
  rules: tuple[tuple[str, Recipe | None], ...] = ()
  first: int = 0
  last: int = 0
  blocks: int | None = None

  def __post_init__(self) -> None:
    if self.recipe is not None:
      check_recipe(self.recipe)
    for rule in as_tuple('rules', self.rules):
      if not isinstance(rule, tuple) or len(rule) != 2:
        raise TypeError(f'rules: {rule!r} must be (regular expression, recipe)')
      pattern, recipe = rule
      if not isinstance(pattern, str):
        raise TypeError(f'rules: {pattern!r} must be a regular expression')
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(f'rules: {pattern!r}: {error}') from error
      if recipe is not None:
        check_recipe(recipe, f'rules: {pattern!r}, recipe')
    for name in ('first', 'last'):
      count = getattr(self, name)
      if not isinstance(count, int) or count < 0:
        raise ValueError(f'{name}={count!r} must be a number of blocks, or 0')
    if not isinstance(self.blocks, int | None):
      raise TypeError(f'blocks={self.blocks!r} must be an int or None')
    if self.last and self.blocks is None:
      raise ValueError(f'last={self.last} needs blocks=, their number')

  def at(self, path: str, fraction: float = 0.0) -> Recipe | None:
    """The recipe of the layer at `path` after `fraction` of the training."""
    if not isinstance(path, str):
      raise TypeError(f"{path=} must be a string such as 'block_0/up'")
    recipe = self.recipe
    number = re.search(r'\d+', path)
    if number is not None:
      index = int(number.group())
      ends = self.last and index >= self.blocks - self.last
      if index < self.first or ends:
        recipe = None
    for pattern, ruled in self.rules:
      if re.search(pattern, path):
        recipe = ruled
        break
    return None if recipe is None else recipe.at(fraction)

  def forward_only(self) -> 'Policy':
    """The same forward products, for evaluation: see `Recipe.forward_only`."""

    def forward(recipe):
      return None if recipe is None else recipe.forward_only()

    rules = tuple((pattern, forward(recipe)) for pattern, recipe in self.rules)
    return dataclasses.replace(self, recipe=forward(self.recipe), rules=rules)

  def check_rules(self, paths: Iterable[str]) -> None:
    """Raises ValueError for a rule that is found in none of the paths."""
    paths = as_tuple('paths', paths)
    for pattern, _ in self.rules:
      if not any(re.search(pattern, path) for path in paths):
        raise ValueError(
          f'rules: {pattern!r} is found in none of the layers'
          f' {", ".join(paths)}; correct it or drop it'
        )

  @property
  def starts(self) -> tuple[float, ...]:
    """Fractions of the training at which some recipe changes."""
    recipes = [self.recipe, *(recipe for _, recipe in self.rules)]
    switches = (r.switches for r in recipes if r is not None)
    return tuple(sorted({start for part in switches for start, _ in part}))
