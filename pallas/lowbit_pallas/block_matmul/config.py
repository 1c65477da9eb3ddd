"""What the sizes of both kernels share."""

from lowbit_pallas import _tuned
from lowbit_pallas.arith.block import Blocked


def key(n: int, k: int, lhs: Blocked, rhs: Blocked, layout: str) -> str:
  """What a tuned entry is for."""
  operands = f'{_tuned.operand(lhs)} {_tuned.operand(rhs)}'
  return f'n={n} k={k} {operands} {layout}'
