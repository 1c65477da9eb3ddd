"""Rotary position embedding, with the scalings that published models use."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
  """Cosines and sines (positions, channels / 2) of angles."""

  cos: jax.Array
  sin: jax.Array

  def apply(self, heads: jax.Array) -> jax.Array:
    """Rotates heads (batch, positions, heads, channels).

    Channel i turns with channel i + n / 2 of the first n channels, where n is
    twice the number of angles; channels after them stay.
    """
    half = self.cos.shape[-1]
    cos, sin = (a[:, None].astype(heads.dtype) for a in self)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([*turned, heads[..., 2 * half :]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rope:
  """How fast each pair of channels turns.

  Attributes:
    base: of the frequencies base^(-2 i / channels).
    channels: of a head that are rotated.
    kind: 'plain'; 'linear', all slower by `factor`; 'llama3', slow ones slower
      by `factor`; 'yarn', with a ramp from slow to fast ones; 'long', each by
      its own factor.
    factor: how many times longer the context is than it was in training.
    original: positions in training, before the context was made longer.
    low: of llama3, turns in `original` positions of pairs that are slowed
      fully; of yarn, turns at the slow end of the ramp.
    high: the same of pairs that keep their speed.
    gain: what cosines and sines are multiplied by.
    short: of 'long', a factor for each pair, for up to `original` positions.
    long: of 'long', for more positions.
  """

  base: float
  channels: int
  kind: str = 'plain'
  factor: float = 1.0
  original: int = 0
  low: float = 1.0
  high: float = 4.0
  gain: float = 1.0
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()

  def rotation(self, positions: jax.Array, capacity: int) -> Rotation:
    """The rotation at positions (n,), of at most `capacity` of them."""
    speeds = jnp.asarray(self.speeds(capacity), jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * speeds
    return Rotation(jnp.cos(angles) * self.gain, jnp.sin(angles) * self.gain)

  def speeds(self, capacity: int) -> np.ndarray:
    """Radians per position of each pair of channels."""
    return _SPEEDS[self.kind](self, capacity)


def _plain(rope: Rope, capacity: int) -> np.ndarray:
  del capacity
  return rope.base ** (-np.arange(0, rope.channels, 2) / rope.channels)


def _linear(rope: Rope, capacity: int) -> np.ndarray:
  return _plain(rope, capacity) / rope.factor


def _llama3(rope: Rope, capacity: int) -> np.ndarray:
  speeds = _plain(rope, capacity)
  turns = rope.original * speeds / (2 * math.pi)
  kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
  return kept * speeds + (1 - kept) * speeds / rope.factor


def _yarn(rope: Rope, capacity: int) -> np.ndarray:
  speeds = _plain(rope, capacity)

  def pair(turns):  # the one that makes so many turns in `original` positions
    exponent = math.log(rope.original / (2 * math.pi * turns))
    return rope.channels * exponent / (2 * math.log(rope.base))

  first = max(math.floor(pair(rope.high)), 0)
  last = min(math.ceil(pair(rope.low)), rope.channels - 1)
  ramp = (np.arange(speeds.size) - first) / ((last - first) or 1e-3)
  slowed = np.clip(ramp, 0, 1)
  return (1 - slowed) * speeds + slowed * speeds / rope.factor


def _long(rope: Rope, capacity: int) -> np.ndarray:
  factors = rope.long if capacity > rope.original else rope.short
  return _plain(rope, capacity) / np.array(factors)


_SPEEDS = {
  'plain': _plain,
  'linear': _linear,
  'llama3': _llama3,
  'yarn': _yarn,
  'long': _long,
}
