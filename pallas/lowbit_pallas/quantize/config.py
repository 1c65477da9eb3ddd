"""What the sizes of both kernels share."""

from lowbit_pallas import _tuned
from lowbit_pallas.quantize.task import Task

LANES = 128


def key(cols: int, dtype_bytes: int, task: Task) -> str:
  """What a tuned entry is for."""
  return (
    f'columns={cols} bytes={dtype_bytes} {_tuned.operand(task.spec)}'
    f' {task.rounding} rotation={task.rotation}'
  )
