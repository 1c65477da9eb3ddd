"""Calls of kernels for CPUs without XLA: the call frame is built here.

So a test decides what is before and after an array in memory, which threads
come to help and when, and what a kernel is told that is not true.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from lowbit_jax import QArray
from lowbit_jax.cpu import _compiler, _frame, _matmul
from lowbit_jax.cpu._compiler import Target
from lowbit_jax.cpu._weights import LANES, Kind
from lowbit_jax.ops import _dot_cpu_matrices

_WORD = ctypes.c_int64
_TASK = ctypes.CFUNCTYPE(None, _WORD)


class Refused(Exception):  # noqa: N818
  """What a kernel answers in place of a result."""


class Scheduler:
  """A pool that is said to have some threads.

  Args:
    threads: how many it claims to have.
    accepts: whether it takes tasks; else it answers with an error.
    starts: whether a thread begins a task as soon as it is scheduled; else it
      waits for `run_late`.
  """

  def __init__(
    self, threads: int = 1, accepts: bool = True, starts: bool = True
  ) -> None:
    self.threads, self.accepts, self.starts = threads, accepts, starts
    self.tasks: list[Callable] = []
    self.running: list[threading.Thread] = []
    self.scheduled = 0

  def schedule(self, task: int, data: int) -> bool:
    self.scheduled += 1
    if not self.accepts:
      return False
    call = functools.partial(_TASK(task), data)
    if self.starts:
      self.running.append(threading.Thread(target=call))
      self.running[-1].start()
    else:
      self.tasks.append(call)
    return True

  def run_late(self) -> None:
    """Runs the tasks that wait."""
    while self.tasks:
      self.tasks.pop()()

  def join(self) -> None:
    """Waits for all threads."""
    for thread in self.running:
      thread.join()
    self.running.clear()


def call(
  address: int,
  arguments: Sequence[np.ndarray],
  results: Sequence[np.ndarray],
  pool: Scheduler | None = None,
) -> None:
  """Calls a kernel.

  Args:
    address: of the kernel.
    arguments: arrays that it reads, C-contiguous.
    results: arrays that it fills, C-contiguous.
    pool: None for one of one thread.

  Raises:
    Refused: if it answers with an error.
  """
  pool = pool or Scheduler()
  messages = []

  def words(address: int, count: int) -> ctypes.Array:
    return (_WORD * count).from_address(address)

  @ctypes.CFUNCTYPE(_WORD, _WORD)
  def create_error(request):
    size, extension, message, code = words(request, 4)
    assert (size, extension, code) == (32, 0, 3), (size, extension, code)
    messages.append(ctypes.string_at(message).decode())
    return len(messages)

  @ctypes.CFUNCTYPE(None, _WORD)
  def destroy_error(request):
    messages[words(request, 3)[2] - 1] = None

  @ctypes.CFUNCTYPE(_WORD, _WORD)
  def schedule(request):
    size, _, context, task, data = words(request, 5)
    assert (size, context) == (40, 7), (size, context)
    if pool.schedule(task, data):
      return 0
    messages.append('the pool is full')
    return len(messages)

  @ctypes.CFUNCTYPE(_WORD, _WORD)
  def threads(request):
    size, _, context, place = words(request, 4)
    assert (size, context) == (32, 7), (size, context)
    words(place, 1)[0] = pool.threads
    return 0

  def pointer(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value

  # The functions of XLA, all others of which would crash.
  api = (_WORD * 24)()
  api[0] = ctypes.sizeof(api)
  api[6], api[8] = pointer(create_error), pointer(destroy_error)
  api[17], api[18] = pointer(schedule), pointer(threads)

  # The arrays.
  kept = []

  def buffers(arrays):
    structs = (_WORD * max(1, len(arrays)))()
    for i, array in enumerate(arrays):
      assert array.flags.c_contiguous
      dims = (_WORD * max(1, array.ndim))(*array.shape)
      number = _number(array.dtype)
      struct = (_WORD * 6)(
        48, 0, number, array.ctypes.data, array.ndim, ctypes.addressof(dims)
      )
      structs[i] = ctypes.addressof(struct)
      kept.extend((dims, struct))
    kept.append(structs)
    return ctypes.addressof(structs)

  frame = (_WORD * 24)()
  frame[0], frame[2], frame[3], frame[4] = 192, ctypes.addressof(api), 7, 3
  frame[7], frame[9] = len(arguments), buffers(arguments)
  frame[12], frame[14] = len(results), buffers(results)
  error = ctypes.CFUNCTYPE(_WORD, _WORD)(address)(ctypes.addressof(frame))
  if error:
    raise Refused(messages[error - 1])
  left = [m for m in messages if m is not None]
  assert not left, f'errors that nobody destroyed: {left}'


def _number(dtype: np.dtype) -> int:
  others = {'bool': 1, 'int64': 5, 'uint16': 7, 'float64': 12, 'complex64': 15}
  return (_frame.DTYPES | others)[dtype.name]


def operands(x: np.ndarray, q: QArray) -> tuple[Kind, list[np.ndarray]]:
  """What a kernel is given for x (m, k) and a matrix, as `dot` gives it.

  Scales of columns that multiply the sum are left out.
  """
  q = _dot_cpu_matrices.along_k(q)
  kind = _dot_cpu_matrices.kind_of(q)
  x = np.pad(x, ((0, 0), (0, q.pad[0]))).astype(np.float32)
  groups = x.reshape(len(x), -1, LANES, kind.order)
  x = np.ascontiguousarray(groups.swapaxes(-1, -2)).reshape(x.shape)
  scale = None if _dot_cpu_matrices.is_after(q) else q.scale
  leaves = (q.codes, scale, q.zero_point, q.minimum)
  leaves = [np.asarray(leaf)[None] for leaf in leaves if leaf is not None]
  return kind, [x[None], np.zeros(1, np.int32), *leaves]


def result(kind: Kind, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
  """An array for the result, of which every element is NaN."""
  n = codes.shape[1 if kind.layout == 'nk' else 2]
  return np.full((*x.shape[:2], n), np.nan, np.float32)


def product(
  x: np.ndarray,
  q: QArray,
  target: Target | None = None,
  pool: Scheduler | None = None,
) -> np.ndarray:
  """x (m, k) times a matrix (k, n) in blocks along axis -2, or the transpose of
  one (n, k) in blocks along axis -1; float32 (m, n)."""
  kind, arrays = operands(x, q)
  out = result(kind, arrays[0], arrays[2])
  address = _matmul.kernel(kind, target or _compiler.host())
  call(address, arrays, [out], pool)
  out = out[0]
  if _dot_cpu_matrices.is_after(q):
    scale = _values(q.scale, q)
    out = out * (scale.T if q.axes == (-1,) else scale)
  return out if q.tensor_scale is None else out * np.asarray(q.tensor_scale)


def _values(scale, q: QArray) -> np.ndarray:
  scale = np.asarray(scale)
  if q.fmt.scale.bits <= 8:
    scale = q.fmt.scale.values()[scale]
  return scale.astype(np.float32)


@contextlib.contextmanager
def pool_of(threads: int):
  """A pool whose threads start at once, and have ended at the end."""
  pool = Scheduler(threads)
  yield pool
  pool.join()
