"""Training in low bits: recipes, held scales, optimizers, methods.

`lowbit_jax.qdot` is the product that a recipe trains with. This package has the
published recipes by name, layers and optimizers that use them, and quantizers
of published methods. Submodules load on first use.

- `laws`: How the loss of a trained model depends on its floating-point format.
- `linen`: Linen: recipes in the linear layers of any model.
- `micro_scaling`: MicroScaling: every choice of a block-scaled 4-bit quantizer,
  in float32.
- `monitors`: Shares of elements that quantizers clip and flush to zero in
  training.
- `nnx`: NNX: recipes in the linear layers of any model.
- `optimizers`: Optimizers for low-bit training, as optax transformations.
- `qat`: Quantization-aware training with parameters of its own: LSQ and PACT.
- `quantizers`: Quantizers that block formats cannot express, with their
  gradients.
- `recipes`: Published recipes for low-bit training, by name.
- `s2ft`: Structured sparse fine-tuning on a frozen quantized model (S2FT).
- `scaling`: Tensor scales that are held or delayed, as explicit state.
- `surrogates`: Surrogate derivatives of rounders, for training through
  quantizers.
"""

from lowbit_jax import _lazy

_SUBMODULES = (
  'laws',
  'linen',
  'micro_scaling',
  'monitors',
  'nnx',
  'optimizers',
  'qat',
  'quantizers',
  'recipes',
  's2ft',
  'scaling',
  'surrogates',
)

__getattr__, __dir__ = _lazy.submodules(__name__, _SUBMODULES)
