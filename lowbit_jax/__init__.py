"""Low-bit numerics for JAX: exact formats, honest gradients, packed storage."""

from lowbit_jax import formats as formats
from lowbit_jax import numerics as numerics
from lowbit_jax import ops as ops
from lowbit_jax.ops import dequantize as dequantize
from lowbit_jax.ops import dot as dot
from lowbit_jax.ops import dot_general as dot_general
from lowbit_jax.ops import einsum as einsum
from lowbit_jax.ops import fake_quant as fake_quant
from lowbit_jax.ops import fake_quant_with as fake_quant_with
from lowbit_jax.ops import implementations as implementations
from lowbit_jax.ops import quantize as quantize
from lowbit_jax.ops import quantize_with as quantize_with
from lowbit_jax.ops import round_to as round_to
from lowbit_jax.ops import select_implementation as select_implementation
from lowbit_jax.qarray import QArray as QArray
