"""Training in low bits: recipes, held scales, optimizers, methods.

`lowbit_jax.qdot` is the product that a recipe trains with; here are the
published recipes by name, and what stands around them. Submodules load on first
use.
"""

import importlib

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
)


def __getattr__(name: str):
  if name in _SUBMODULES:
    return importlib.import_module(f'lowbit_jax.training.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *_SUBMODULES})
