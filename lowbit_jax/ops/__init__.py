"""Operations on Array | QArray with stated derivatives.

Implementations are chosen by `implementation=` or by themselves; what would be
chosen can be asked with `select_implementation`.
"""

from lowbit_jax.numerics import round_to as round_to
from lowbit_jax.ops._dispatch import Choice as Choice
from lowbit_jax.ops._dot import (
  dot as dot,
  dot_general as dot_general,
  einsum as einsum,
)
from lowbit_jax.ops._fake_quant import (
  fake_quant as fake_quant,
  fake_quant_with as fake_quant_with,
)
from lowbit_jax.ops._lmul import (
  lmul as lmul,
  lmul_attention as lmul_attention,
  lmul_dot as lmul_dot,
)
from lowbit_jax.ops._prepack import (
  Prepacked as Prepacked,
  prepack as prepack,
  unpack as unpack,
)
from lowbit_jax.ops._qdot import qdot as qdot
from lowbit_jax.ops._quantize import (
  dequantize as dequantize,
  quantize as quantize,
  quantize_with as quantize_with,
)
from lowbit_jax.ops._select import (
  implementations as implementations,
  select_implementation as select_implementation,
)
from lowbit_jax.ops._softmax import (
  log_softmax as log_softmax,
  logsumexp as logsumexp,
  softmax as softmax,
)
