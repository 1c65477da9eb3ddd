"""Rotations of the inputs of a layer."""

from lowbit_jax.ptq._layer import Layer, Step
from lowbit_jax.transforms import Hadamard


def hadamard(block: int) -> Step:
  """Rotates runs of inputs, so that outliers spread over a block.

  Activations take the rotation when the layer runs. Behind it MXFP4 and INT4
  lose less; NVFP4, whose blocks are small, loses more (arXiv:2509.23202).

  Args:
    block: inputs of a run, a power of two that divides the inputs of every
      layer; the block of the format, or a multiple of it.
  """
  rotation = Hadamard(block)

  def step(layer: Layer) -> Layer:
    return layer.transformed(rotation)

  return step
