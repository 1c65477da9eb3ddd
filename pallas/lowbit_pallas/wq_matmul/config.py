"""What the sizes of both kernels share.

Everything that the order of sums depends on follows from the weight alone; only
`bm` follows from the rows of x. So a row of the result does not depend on the
rows beside it.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from lowbit_pallas import _tuned
from lowbit_pallas.arith import block
from lowbit_pallas.arith.block import Blocked

PARTS = {'bfloat16': 1, 'float16': 2, 'float32': 3}


def key(n: int, k: int, spec: Blocked, dtype: DTypeLike, schedule: str) -> str:
  """What a tuned entry is for."""
  name = jnp.dtype(dtype).name
  return f'n={n} k={k} {_tuned.operand(spec)} {name} {schedule}'


def heuristic_schedule(spec: Blocked) -> str:
  """'post' where it costs nothing and keeps float scales unrounded."""
  if not spec.block or block.is_exponent(spec.scale):
    return 'pre'
  return 'post' if spec.block % 128 == 0 else 'pre'


def round_up(n: int, unit: int) -> int:
  """The smallest positive multiple of `unit` that is at least n."""
  return max(-(-n // unit), 1) * unit
