"""Operations on Array | QArray with stated derivatives.

Implementations are chosen by `implementation=` or by themselves; what would be
chosen can be asked with `select_implementation`.
"""

from lowbit_jax.numerics import round_to as round_to
from lowbit_jax.ops._dispatch import Choice as Choice
from lowbit_jax.ops._dot import dot as dot
from lowbit_jax.ops._dot import dot_general as dot_general
from lowbit_jax.ops._dot import einsum as einsum
from lowbit_jax.ops._fake_quant import fake_quant as fake_quant
from lowbit_jax.ops._fake_quant import fake_quant_with as fake_quant_with
from lowbit_jax.ops._lmul import lmul as lmul
from lowbit_jax.ops._lmul import lmul_attention as lmul_attention
from lowbit_jax.ops._lmul import lmul_dot as lmul_dot
from lowbit_jax.ops._prepack import Prepacked as Prepacked
from lowbit_jax.ops._prepack import prepack as prepack
from lowbit_jax.ops._prepack import unpack as unpack
from lowbit_jax.ops._qdot import qdot as qdot
from lowbit_jax.ops._quantize import dequantize as dequantize
from lowbit_jax.ops._quantize import quantize as quantize
from lowbit_jax.ops._quantize import quantize_with as quantize_with
from lowbit_jax.ops._select import implementations as implementations
from lowbit_jax.ops._select import (
  select_implementation as select_implementation,
)
from lowbit_jax.ops._softmax import log_softmax as log_softmax
from lowbit_jax.ops._softmax import logsumexp as logsumexp
from lowbit_jax.ops._softmax import softmax as softmax
