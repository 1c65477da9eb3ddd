"""Low-bit numerics for JAX: exact formats, honest gradients, packed storage.

Submodules that need Flax, or that most programs do not use, load on first use:
`nn`, `training`, `doctor`, `search`, `special`, `testing`.
"""

from lowbit_jax import (
  _lazy,
  formats as formats,
  io as io,
  numerics as numerics,
  ops as ops,
  transforms as transforms,
)
from lowbit_jax._tree import (
  combine as combine,
  partition as partition,
  shardings as shardings,
)
from lowbit_jax.ops import (
  dequantize as dequantize,
  dot as dot,
  dot_general as dot_general,
  einsum as einsum,
  fake_quant as fake_quant,
  fake_quant_with as fake_quant_with,
  implementations as implementations,
  log_softmax as log_softmax,
  logsumexp as logsumexp,
  prepack as prepack,
  qdot as qdot,
  quantize as quantize,
  quantize_with as quantize_with,
  round_to as round_to,
  select_implementation as select_implementation,
  softmax as softmax,
  unpack as unpack,
)
from lowbit_jax.qarray import QArray as QArray
from lowbit_jax.recipe import (
  GemmSpec as GemmSpec,
  Policy as Policy,
  QuantSpec as QuantSpec,
  Recipe as Recipe,
)

__version__ = '0.1.0'

__getattr__, __dir__ = _lazy.submodules(
  __name__, ('doctor', 'nn', 'search', 'special', 'testing', 'training')
)
