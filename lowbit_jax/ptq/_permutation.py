"""The order of the inputs of a layer."""

from typing import Literal

import jax
import jax.numpy as jnp

from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.transforms import Permutation

By = Literal['activations', 'ratios']


def permute(by: By = 'activations') -> Step:
  """Sorts inputs by their size, so that large ones share blocks.

  Activations are gathered in that order when the layer runs. A layer without
  statistics stays as it is.

  Args:
    by: the size of input i, largest first; equal ones keep their order.
      'activations': rms(x_i), the root mean square. Layers that share their
      input get one order, so that one gather does for them.
      'ratios': rms(x_i) / |w_i|, with the norm of row i of the weight. The
      outputs lose most where a large activation shares a block with a large
      row of another input, so these are kept apart. Some better where rows
      differ by themselves, but not after smoothing, which evens ratios out.
  """
  if by not in ('activations', 'ratios'):
    raise ValueError(f"{by=} must be 'activations' or 'ratios'")

  def step(layer: Layer) -> Layer:
    if layer.statistics is None:
      return layer
    size = layer.statistics.rms
    if by == 'ratios':
      # A row of zeros goes last: whatever meets it, nothing comes of it.
      norm = jnp.linalg.norm(layer.weight, axis=1)
      size = jnp.where(norm > 0, size / jnp.where(norm > 0, norm, 1), 0)
    return layer.transformed(Permutation(by_size(size)))

  return step


def by_size(size: jax.Array) -> jax.Array:
  """Numbers (n,) of entries, largest first; int32."""
  return jnp.argsort(-size, stable=True).astype(jnp.int32)
