"""Where tokens stand in a block of a language model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import rotary
from models.llama_config import Config


class Place(NamedTuple):
  """Where tokens stand: positions (tokens,), and how they are rotated."""

  positions: jax.Array
  rotation: rotary.Rotation
  rotates: jax.Array  # a bool of the block
  window: jax.Array  # positions that the block sees
  block: jax.Array  # its number in the cache


def places(
  config: Config, positions: jax.Array, capacity: int
) -> Callable[[jax.Array], Place]:
  """Where tokens stand in each block, by its number.

  Args:
    config: of the model.
    positions: of the tokens, (tokens,).
    capacity: how many positions there are.
  """
  rotation = config.rope.rotation(positions, capacity)
  rotates = jnp.array([k not in config.still for k in range(config.blocks)])
  windows = jnp.array(config.windows or (2**30,) * config.blocks)

  def place(number: jax.Array) -> Place:
    return Place(positions, rotation, rotates[number], windows[number], number)

  return place
