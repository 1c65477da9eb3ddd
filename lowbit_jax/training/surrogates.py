"""Surrogate derivatives of rounders, for training through quantizers.

A rounder is constant between the numbers of its lattice and jumps at the
midpoints m of its bins, whose width is delta: its derivative is zero almost
everywhere. A surrogate gives a slope to use in its place:

  Identity  1, the straight-through estimator
  Dge       large near midpoints
  Sigmoid   that of a logistic step in every bin
  Spline    that of a piecewise linear interpolant of the rounder

Sources: "Elucidating the Design Space of FP4 training" (2025); Wang et al.,
"Optimizing LLM training using FP4" (2025), for `Dge`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits as fb, codec


def _check_positive(name: str, value: float) -> None:
  if not value > 0:
    raise ValueError(f'{name}={value!r} must be positive')


def _check_order(low: float, high: float) -> None:
  if not 0 <= low <= high:
    raise ValueError(f'{low=} and {high=} must satisfy 0 <= low <= high')


class Lattice(NamedTuple):
  """The numbers of a format as surrogates see them.

  Attributes:
    numbers: its description; exponents that make subnormal float32 are cut off.
    span: (-span, span) is where a rounder lives, None for scales, whose lattice
      repeats from binade to binade.
  """

  numbers: codec.Float
  span: float | None


@dataclasses.dataclass(frozen=True)
class Identity:
  """The straight-through estimator, Q' = 1 everywhere."""

  def slope(self, v: jax.Array, lattice: Lattice) -> jax.Array:
    del lattice
    return jnp.ones_like(v)


@dataclasses.dataclass(frozen=True)
class Dge:
  """The differentiable gradient estimator.

    Q'(v) = min((1 / k) |2 (v - m) / delta|^(1/k - 1), ceiling)

  in the bin [m - delta/2, m + delta/2) between neighbours of the lattice. Its
  mean over a bin is .593 for the defaults, and 3 near every midpoint.

  Attributes:
    power: k, at least 1; 1 is the straight-through estimator.
    ceiling: largest slope.
  """

  power: float = 5.0
  ceiling: float = 3.0

  def __post_init__(self) -> None:
    if not self.power >= 1:
      raise ValueError(f'power={self.power!r} must be at least 1')
    _check_positive('ceiling', self.ceiling)

  def slope(self, v: jax.Array, lattice: Lattice) -> jax.Array:
    distance = jnp.abs(2 * _position(v, lattice) - 1)
    slope = distance ** (1 / self.power - 1) / self.power
    return jnp.minimum(slope, self.ceiling)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
  """A logistic step in every bin, clipped.

    Q'(v) = clip(12 sigma(u) (1 - sigma(u)) / T, low, high),
    u = 12 (v - m) / (delta T)

  Attributes:
    temperature: T.
    low: smallest slope.
    high: largest slope.
  """

  temperature: float = 1.0
  low: float = 0.3
  high: float = 1.5

  def __post_init__(self) -> None:
    _check_positive('temperature', self.temperature)
    _check_order(self.low, self.high)

  def slope(self, v: jax.Array, lattice: Lattice) -> jax.Array:
    u = 12 * (_position(v, lattice) - 0.5) / self.temperature
    sigma = jax.nn.sigmoid(u)
    slope = 12 * sigma * (1 - sigma) / self.temperature
    return jnp.clip(slope, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Spline:
  """Slope of the linear interpolant of the rounder between knots, clipped.

  The knots are `points` numbers spaced evenly over [-F, F] for elements, and
  over a binade for scales.

  Attributes:
    points: number of knots.
    low: smallest slope.
    high: largest slope.
  """

  points: int = 40
  low: float = 0.3
  high: float = 1.5

  def __post_init__(self) -> None:
    if not self.points >= 2:
      raise ValueError(f'points={self.points!r} must be at least 2')
    _check_order(self.low, self.high)

  def slope(self, v: jax.Array, lattice: Lattice) -> jax.Array:
    pieces = self.points - 1
    if lattice.span is None:
      # Every binade is like [1, 2), on which the rounder has steps of 2^-m.
      steps = 2.0**lattice.numbers.mantissa_bits
      h = 1 / pieces
      left = jnp.floor(_in_steps(v, lattice.numbers) / (steps * h)) * h
      ends = (fb.round_half_even(a * steps) / steps for a in (left, left + h))
    else:
      h = 2 * lattice.span / pieces
      i = jnp.clip(jnp.floor((v + lattice.span) / h), 0, pieces - 1)
      left = i * h - lattice.span
      ends = (_nearest(a, lattice.numbers) for a in (left, left + h))
    low, high = ends
    slope = (high - low) / h
    return jnp.clip(slope, self.low, self.high)


Surrogate = Identity | Dge | Sigmoid | Spline
SURROGATES = {
  'identity': Identity(),
  'dge': Dge(),
  'spline': Spline(),
  'sigmoid': Sigmoid(),
}


def surrogate(name: str, value: Surrogate | str) -> Surrogate:
  """The surrogate `value` or the one of that name, for the argument `name`."""
  if isinstance(value, Surrogate):
    return value
  if not isinstance(value, str) or value not in SURROGATES:
    raise ValueError(
      f'{name}={value!r} is neither a surrogate nor one of {(*SURROGATES,)}'
    )
  return SURROGATES[value]


def _in_steps(v, f: codec.Float):
  """|v| in units of the distance of neighbours in its binade."""
  b = fb.to_bits(v) & fb.MAGNITUDE
  e = jnp.maximum(b >> 23, f.emin + 127)
  return fb.from_bits(b) * fb.from_bits((254 + f.mantissa_bits - e) << 23)


def _position(v, lattice: Lattice):
  """Where |v| is in its bin, in [0, 1)."""
  if lattice.span is not None:
    v = jnp.clip(v, -lattice.span, lattice.span)
  t = _in_steps(v, lattice.numbers)
  return t - fb.floor(t)


def _nearest(v, f: codec.Float):
  return codec.decode_float(codec.encode_float(v, f), f)
