"""Training in low bits: recipes, held scales, optimizers, methods.

`lowbit_jax.qdot` is the product that a recipe trains with. This package has the
published recipes by name, layers and optimizers that use them, and quantizers
of published methods. Submodules load on first use.
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
