"""Operations on Array | QArray with stated derivatives.

Implementations are chosen by `implementation=` or by themselves; what would be
chosen can be asked with `select_implementation`.

- `Choice`: The answer of `select_implementation`.
- `LowRank`: A weight with a low-rank term beside it.
- `Member`: One quantized array of a stack. Made by `ops.member`.
- `Prepacked`: A quantized (k, n) matrix as a kernel reads it. Made by
  `prepack`.
- `Transformed`: A quantized weight whose activations take a transform when it
  is used.
- `decode_attention`: Attention of the last tokens of sequences, of whose cache
  the filled part alone is read.
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
- `lmul`: x * y by one integer addition (L-Mul, Luo & Sun 2024).
- `lmul_attention`: Attention whose two matrix products are `lmul_dot`.
- `lmul_dot`: x @ y with `lmul` for every product of elements, summed in
  float32.
- `log_softmax`: The logarithm of `softmax`, never positive.
- `logsumexp`: log(sum(exp(x / temperature))) over an axis, without overflow.
- `member`: A member of a tree of stacks, such as the parameters of one layer of
  many.
- `prepack`: Reorders a weight once, so that a kernel need not do so in every
  call.
- `qdot`: x @ w as a recipe trains it, with quantized products in both
  directions.
- `quantize`: Quantizes an array into packed codes and stored scales.
- `quantize_with`: Quantizes with given scales: calibrated, learned or held.
- `ragged_dot`: `lax.ragged_dot` on arrays and QArrays: rows sorted by group
  times the matrix of their group.
- `round_to`: The nearest number of the format, as a value.
- `select_implementation`: What `op(*args, **kwargs)` would run on a platform,
  without running it.
- `softmax`: exp(x / temperature), normalised to sum to one along an axis.
- `stack`: Weights of one shape and format as one, with their axis in front.
- `take`: Rows of an array or QArray by their indices, as `jnp.take` along axis
  0.
- `unpack`: The QArray that `prepack` was given.
- `update_slice`: `lax.dynamic_update_slice` on a QArray: x is quantized and put
  at `start`.
- `specs`: QuantSpecs as functions: the one place that reads all of their
  fields.
"""

from lowbit_jax._low_rank import LowRank as LowRank
from lowbit_jax._member import Member as Member, member as member
from lowbit_jax._transformed import Transformed as Transformed, stack as stack
from lowbit_jax.numerics import round_to as round_to
from lowbit_jax.ops._decode_attention import (
  decode_attention as decode_attention,
)
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
from lowbit_jax.ops._ragged import ragged_dot as ragged_dot
from lowbit_jax.ops._select import (
  implementations as implementations,
  select_implementation as select_implementation,
)
from lowbit_jax.ops._softmax import (
  log_softmax as log_softmax,
  logsumexp as logsumexp,
  softmax as softmax,
)
from lowbit_jax.ops._take import take as take
from lowbit_jax.ops._update import update_slice as update_slice
