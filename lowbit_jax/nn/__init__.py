"""Flax: quantized parameters and quantized products in Linen and NNX modules.

Importing this package makes QArrays known to Linen, so that `model.apply` takes
a parameter tree that holds them. `nn.nnx` loads on first use.
"""

from lowbit_jax import _lazy
from lowbit_jax.nn import linen as linen
from lowbit_jax.nn._dot import (
  dot_general as dot_general,
  einsum as einsum,
  promote_dtype as promote_dtype,
)
from lowbit_jax.nn._params import (
  quantize_params as quantize_params,
  trainable_mask as trainable_mask,
)

__getattr__, __dir__ = _lazy.submodules(__name__, ('nnx',))
