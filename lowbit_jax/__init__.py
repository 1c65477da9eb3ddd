"""Low-bit numerics for JAX: exact formats, stated gradients, packed storage.

What needs Flax, or what most programs do not use, loads on first use: `nn`,
`training`, `doctor`, `lora`, `observers`, `ptq`, `search`, `special`,
`testing`, and the functions `packed`, `with_policy` and `record`.

- `GemmSpec`: One product of two operands that share a reduction axis.
- `Policy`: Which recipe each layer takes.
- `QArray`: A quantized array. Made by `lowbit_jax.quantize`.
- `QuantSpec`: How one operand is fake-quantized; hashable, so static under jit.
- `Recipe`: How a linear layer is trained: three products, and what they share.
- `combine`: Joins trees of one structure, taking the first entry that is not
  None.
- `dequantize`: The array that `q` stands for.
- `dot`: `jnp.dot` on arrays and QArrays: the last axis of `lhs` with the last
  but one of `rhs`.
- `dot_general`: `lax.dot_general` on arrays and QArrays.
- `einsum`: `jnp.einsum` of two operands, arrays or QArrays.
- `fake_quant`: `dequantize(quantize(x, ...))` with a straight-through gradient.
- `fake_quant_with`: `dequantize(quantize_with(x, ...))` with a straight-through
  gradient.
- `implementations`: Names of the implementations of an operation, preferred
  first.
- `log_softmax`: The logarithm of `softmax`, never positive.
- `logsumexp`: log(sum(exp(x / temperature))) over an axis, without overflow.
- `packed`: `fn` on quantized weights, which stay packed in its products.
- `partition`: Splits a tree into (trainable, frozen), each with None in the
  holes.
- `prepack`: Reorders a weight once, so that a kernel need not do so in every
  call.
- `qdot`: x @ w as a recipe trains it, with quantized products in both
  directions.
- `quantize`: Quantizes an array into packed codes and stored scales.
- `quantize_with`: Quantizes with given scales: calibrated, learned or held.
- `ragged_dot`: `lax.ragged_dot` on arrays and QArrays: rows sorted by group
  times the matrix of their group.
- `record`: A function that also returns what its products see.
- `round_to`: The nearest number of the format, as a value.
- `select_implementation`: What `op(*args, **kwargs)` would run on a platform,
  without running it.
- `shardings`: The sharding of every leaf that belongs to a sharding of the
  whole.
- `softmax`: exp(x / temperature), normalised to sum to one along an axis.
- `unpack`: The QArray that `prepack` was given.
- `with_policy`: `fn` with low-bit products in place of those that a policy
  selects.
- `cpu`: Kernels for CPUs: machine code that is written in Python and called by
  XLA.
- `doctor`: Measures of quantized tensors, and an audit of casts of gradients.
- `formats`: Number formats as values: elements, blocks, and their names.
- `io`: Files: trees of arrays and QArrays, saved and loaded with their formats.
- `lora`: Low-rank adapters beside frozen weights, packed or not (LoRA, QLoRA).
- `nn`: Flax: quantized parameters and quantized products in Linen and NNX
  modules.
- `numerics`: Rounding, codes, packing and scales of arrays, and tools to check
  them.
- `observers`: What is recorded of the activations of a model: values for
  `record`.
- `ops`: Operations on Array | QArray with stated derivatives.
- `qarray`: A quantized array as a pytree.
- `ptq`: Post-training quantization: low bits for a model that is trained.
- `recipe`: What is done to the operands of the products of a network, as
  values.
- `search`: Formulas for functions of one variable: programs, their constants,
  proofs.
- `special`: Elementary and special functions with known accuracy.
- `testing`: Test suites for quantizers and dot products, of this library or of
  others.
- `training`: Training in low bits: recipes, held scales, optimizers, methods.
- `transforms`: Invertible maps of an axis that leave a matrix product
  unchanged.
"""

import typing as _t

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
  ragged_dot as ragged_dot,
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

if _t.TYPE_CHECKING:
  from lowbit_jax._walk import (
    packed as packed,
    record as record,
    with_policy as with_policy,
  )

__getattr__, __dir__ = _lazy.submodules(
  __name__,
  (
    'doctor',
    'lora',
    'nn',
    'observers',
    'ptq',
    'search',
    'special',
    'testing',
    'training',
  ),
  dict.fromkeys(('packed', 'record', 'with_policy'), '_walk'),
)
