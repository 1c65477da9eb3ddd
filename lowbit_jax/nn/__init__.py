"""Flax: quantized parameters and quantized products in Linen and NNX modules.

Importing this package makes QArrays known to Linen, so that `model.apply` takes
a parameter tree that holds them. `nn.nnx` loads on first use.
"""

import importlib

from lowbit_jax.nn import linen as linen
from lowbit_jax.nn._dot import dot_general as dot_general
from lowbit_jax.nn._dot import einsum as einsum
from lowbit_jax.nn._dot import promote_dtype as promote_dtype
from lowbit_jax.nn._params import quantize_params as quantize_params
from lowbit_jax.nn._params import trainable_mask as trainable_mask


def __getattr__(name: str):
  if name == 'nnx':
    return importlib.import_module('lowbit_jax.nn.nnx')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), 'nnx'})
