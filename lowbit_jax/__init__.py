"""Low-bit numerics for JAX: exact formats, honest gradients, packed storage.

Submodules that need Flax, or that most programs do not use, load on first use:
`nn`, `training`, `doctor`, `search`, `special`, `testing`.
"""

import importlib

from lowbit_jax import formats as formats
from lowbit_jax import io as io
from lowbit_jax import numerics as numerics
from lowbit_jax import ops as ops
from lowbit_jax import transforms as transforms
from lowbit_jax._tree import combine as combine
from lowbit_jax._tree import partition as partition
from lowbit_jax._tree import shardings as shardings
from lowbit_jax.ops import dequantize as dequantize
from lowbit_jax.ops import dot as dot
from lowbit_jax.ops import dot_general as dot_general
from lowbit_jax.ops import einsum as einsum
from lowbit_jax.ops import fake_quant as fake_quant
from lowbit_jax.ops import fake_quant_with as fake_quant_with
from lowbit_jax.ops import implementations as implementations
from lowbit_jax.ops import log_softmax as log_softmax
from lowbit_jax.ops import logsumexp as logsumexp
from lowbit_jax.ops import prepack as prepack
from lowbit_jax.ops import qdot as qdot
from lowbit_jax.ops import quantize as quantize
from lowbit_jax.ops import quantize_with as quantize_with
from lowbit_jax.ops import round_to as round_to
from lowbit_jax.ops import select_implementation as select_implementation
from lowbit_jax.ops import softmax as softmax
from lowbit_jax.ops import unpack as unpack
from lowbit_jax.qarray import QArray as QArray
from lowbit_jax.recipe import GemmSpec as GemmSpec
from lowbit_jax.recipe import Policy as Policy
from lowbit_jax.recipe import QuantSpec as QuantSpec
from lowbit_jax.recipe import Recipe as Recipe

__version__ = '0.1.0'

_LAZY = ('doctor', 'nn', 'search', 'special', 'testing', 'training')


def __getattr__(name: str):
  if name in _LAZY:
    return importlib.import_module(f'lowbit_jax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *_LAZY})
