"""AdaRound: for each weight it is learned whether it goes up or down.

A weight w has a number of the grid on each side. With h the share of the way
from the lower to the upper one, in [0, 1], D = lower + h (upper - lower) - w
and H the mean products of the activations, what is made small is

  tr(D' H D)  +  r sum of e (1 - (2 h - 1)^2),
  e  =  H[k, k] (upper - lower)^2 / 4,

first with r = 0, and then with more and more of the second sum, which drives h
to 0 or 1. With r = 1 the whole is the mean error of weights that go up by
chance, each with probability h. That is linear in each h, and beyond r = 1 it
is concave in each: all its minima are at zeros and ones, for layers and
activations of any size. Adam takes each slope in units of 4 e, which makes
weights alike.

The paper holds r, and lowers the power of |2 h - 1| from 20 to 2. With H in
place of samples the errors of that are larger, by up to a fifth.

Reference: AdaRound, arXiv:2004.10568.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowbit_jax import ops
from lowbit_jax.formats import ElementFormat
from lowbit_jax.ptq import _grid
from lowbit_jax.ptq._grid import Grid
from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.qarray import QArray

# The sigmoid reaches beyond [0, 1] by that much on both sides.
_MARGIN = 0.1


def adaround(
  *,
  steps: int = 1500,
  learning_rate: float = 1e-2,
  regularizer: float = 2.0,
) -> Step:
  """Rounds weights up or down, as is learned for the outputs of a layer.

  Scales are those that the layer has, by default of the nearest neighbour.
  Outputs for which it finds nothing better keep what the layer has; so does a
  layer without statistics.

  Args:
    steps: of Adam, at least 1.
    learning_rate: of Adam; `steps` times it should be 10 or more, for weights
      to get from one side to the other.
    regularizer: r at the end, in front of what drives weights to a number of
      the grid. From 1.5 on all but 1 in 200 get there, by measurement, and go
      to the nearer end; larger ones decide earlier.
  """
  if not (isinstance(steps, int) and steps >= 1):
    raise ValueError(f'{steps=} must be an integer of at least 1')
  for name, value in (
    ('learning_rate', learning_rate),
    ('regularizer', regularizer),
  ):
    if not 0 < value < float('inf'):
      raise ValueError(f'{name}={value} must be a positive number')

  def step(layer: Layer) -> Layer:
    like = layer.rounded()
    if layer.statistics is None:
      return layer._replace(quantized=like)
    quantized = round_adaptively(
      layer.weight,
      like,
      layer.statistics.moments,
      steps=steps,
      learning_rate=learning_rate,
      regularizer=regularizer,
    )
    return layer._replace(quantized=quantized)

  return step


def round_adaptively(
  weight: jax.Array,
  like: QArray,
  moments: jax.Array,
  *,
  steps: int = 1500,
  learning_rate: float = 1e-2,
  regularizer: float = 2.0,
) -> QArray:
  """Rounds each weight up or down, so that outputs change least.

  Args:
    weight: (in, out).
    like: a QArray of the same shape in blocks along axis -2, whose scales are
      kept, and whose numbers are for outputs for which they are better.
    moments: H (in, in).
    steps: as in `adaround`; also `learning_rate`, `regularizer`.

  Returns:
    A QArray with the scales of `like`.
  """
  grid = _grid.grid_of_inputs(like)
  choice = choice_of(weight, grid, moments, like.fmt.element)
  shares = learned_shares(choice, learning_rate, regularizer, steps)
  given = ops.dequantize(like, jnp.float32)
  return _grid.with_values(_better(choice, shares, given, moments), like)


class Choice(NamedTuple):
  """Between two numbers for each weight; (in, out) each.

  Attributes:
    weight: what they stand for.
    low: the lower one, or the only one.
    gap: from there to the upper one; 0 where there is no choice.
    couplings: (in, in), what a difference of one input costs with those of the
      others, in units of what it costs alone.
  """

  weight: jax.Array
  low: jax.Array
  gap: jax.Array
  couplings: jax.Array

  def shares(self) -> jax.Array:
    """Of the gap below the weight; 0 without a gap."""
    shares = self._over_gap(self.weight - self.low)
    return jnp.clip(shares, 0, 1)

  def slope(self, h: jax.Array, r: jax.Array | float) -> jax.Array:
    """The derivative of what is made small by h, over 4 e."""
    difference = self.low + h * self.gap - self.weight
    of_error = 2 * self._over_gap(_product(self.couplings, difference))
    return jnp.where(self.gap == 0, 0, of_error - r * (2 * h - 1))

  def _over_gap(self, x: jax.Array) -> jax.Array:
    is_free = self.gap != 0
    return jnp.where(is_free, x / jnp.where(is_free, self.gap, 1), 0)


@functools.partial(jax.jit, static_argnums=3)
def choice_of(
  weight: jax.Array, grid: Grid, moments: jax.Array, element: ElementFormat
) -> Choice:
  """Between neighbours in a grid that has the scales of each weight."""
  low, high = grid.neighbours(weight, element)
  diagonal = jnp.diagonal(moments)[:, None]
  couplings = moments / jnp.where(diagonal > 0, diagonal, 1)
  gap = (high - low) * grid.scale
  return Choice(weight, grid.values(low), gap, couplings)


@functools.partial(jax.jit, static_argnums=3)
def learned_shares(
  choice: Choice, learning_rate: float, regularizer: float, steps: int
) -> jax.Array:
  """How far weights go from the lower to the upper number; (in, out).

  Those of an input without activations go to the nearest. Arguments are those
  of `adaround`.
  """
  adam = optax.adam(learning_rate)

  def descend(carry, r):
    v, state = carry
    h, pull_back = jax.vjp(_rectified, v)
    (gradient,) = pull_back(choice.slope(h, r))
    update, state = adam.update(gradient, state)
    return (v + update, state), ()

  start = -jnp.log((1 + 2 * _MARGIN) / (choice.shares() + _MARGIN) - 1)
  strengths = regularizer * jnp.linspace(0, 1, steps)
  (v, _), _ = lax.scan(descend, (start, adam.init(start)), strengths)
  return _rectified(v)


def _rectified(v: jax.Array) -> jax.Array:
  h = (1 + 2 * _MARGIN) * jax.nn.sigmoid(v) - _MARGIN
  return jnp.clip(h, 0, 1)


@jax.jit
def _better(
  choice: Choice, shares: jax.Array, given: jax.Array, moments: jax.Array
) -> jax.Array:
  """For each output what was learned, if its error is less, else `given`."""
  learned = choice.low + jnp.where(shares >= 0.5, choice.gap, 0)

  def errors(values):
    difference = values - choice.weight
    return jnp.sum(difference * _product(moments, difference), 0)

  return jnp.where(errors(learned) < errors(given), learned, given)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return lax.dot(a, b, precision=lax.Precision.HIGHEST)
