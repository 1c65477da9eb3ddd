"""Flax: quantized parameters and quantized products in Linen and NNX modules.

Importing this package makes QArrays known to Linen, so that `model.apply` takes
a parameter tree that holds them. `nn.nnx` loads on first use.

- `dot_general`: A `lax.dot_general` that fake-quantizes arrays and takes
  QArrays packed.
- `einsum`: A `jnp.einsum` of two operands that fake-quantizes and takes
  QArrays.
- `promote_dtype`: `promote_dtype` of Flax that lets QArrays through.
- `quantize_params`: A parameter tree with QArrays in place of the selected
  leaves.
- `trainable_mask`: A tree of bools for `optax.masked`: False for QArrays and
  integers.
- `unbox`: `flax.linen.unbox` that leaves QArrays packed.
- `linen`: Linen: modules for fake quantization and packed weights.
- `nnx`: NNX: frozen quantized variables, and modules for fake quantization.
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
from lowbit_jax.nn._view import unbox as unbox

__getattr__, __dir__ = _lazy.submodules(__name__, ('nnx',))
