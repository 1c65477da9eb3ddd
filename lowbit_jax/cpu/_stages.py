"""Work in chunks, shared with the threads of XLA.

The thread of the call claims one chunk after the other, and so does every
thread of XLA's pool that comes to help. The call waits for chunks that somebody
has claimed, never for a thread to come: so a pool of one thread, or one that is
busy, only costs speed. What a thread that comes late may touch lives until the
last of them has left. Which thread computes a chunk changes nothing of it.
"""

from collections.abc import Callable, Mapping, Sequence

from lowbit_jax.cpu._code import (
  I64,
  Module,
  Value,
  Variable,
  address_of,
  atomic_add,
  atomic_load,
  call,
  done,
  least,
  load,
  loop,
  repeat,
  store,
  when,
)
from lowbit_jax.cpu._frame import Frame

# A job is a piece of memory: how many threads know it, chunks that are claimed,
# that are done and that there are, and what the chunks share.
_REFERENCES, _CLAIMED, _DONE, _COUNT, _SHARED = 0, 8, 16, 24, 32
_TASKS = 'waiting_tasks'  # of all calls, that no thread has begun
_MOST_TASKS = 64
_SPINS = 2000  # before a waiting thread leaves its core to others


def define(
  module: Module,
  names: Sequence[str],
  chunk: Callable[[dict[str, Value], Value], None],
) -> None:
  """Adds what `run` needs to a module.

  Args:
    module: of the kernel.
    names: of the integers that all chunks of a call share.
    chunk: writes the code of a chunk, from these integers and its number.
  """
  module.counter(_TASKS)
  with module.function('chunk', [I64, I64]) as (job, i):
    words = {
      name: load(job + _SHARED + 8 * place, I64)
      for place, name in enumerate(names)
    }
    chunk(words, i)
    done()
  with module.function('work', [I64]) as (job,):
    count = load(job + _COUNT, I64)
    with repeat() as stop:
      i = atomic_add(job + _CLAIMED, 1)
      stop(i >= count)
      call('chunk', None, job, i)
      atomic_add(job + _DONE, 1)
    done()
  with module.function('leave', [I64]) as (job,):
    with when(atomic_add(job + _REFERENCES, -1).equals(1)):
      call('free', None, job)
    done()
  with module.function('help', [I64]) as (job,):
    atomic_add(address_of(_TASKS), -1)
    call('work', None, job)
    call('leave', None, job)
    done()


def run(
  frame: Frame, count: Value, shared: Mapping[str, Value], is_large: Value
) -> None:
  """Computes all chunks, and returns when they are done.

  Args:
    frame: of the call.
    count: of the chunks.
    shared: the integers that `define` was told of, in that order.
    is_large: whether there is more to do than in the time, some 10 us, that
      another thread needs to wake up.
  """
  job = call('malloc', I64, I64.constant(_SHARED + 8 * len(shared)))
  frame.require(job.differs(0), 'no memory is left')
  for offset in (_CLAIMED, _DONE):
    store(I64.constant(0), job + offset)
  store(I64.constant(1), job + _REFERENCES)
  store(count, job + _COUNT)
  for place, word in enumerate(shared.values()):
    store(word, job + _SHARED + 8 * place)

  with when(is_large):
    with when(count > 1):
      _call_helpers(frame, job, count)
  call('work', None, job)
  spins = Variable(I64.constant(0))
  with repeat() as stop:
    stop(atomic_load(job + _DONE) >= count)
    spins.set(spins.get() + 1)
    with when(spins.get() > _SPINS):
      call('sched_yield', None)
      spins.set(I64.constant(0))
  call('leave', None, job)


def _call_helpers(frame: Frame, job: Value, count: Value) -> None:
  """Asks the other threads of the pool, unless many tasks wait already."""
  helpers = least(frame.threads() - 1, count - 1)
  room = I64.constant(_MOST_TASKS) - atomic_load(address_of(_TASKS))
  with loop(least(helpers, room)):
    atomic_add(address_of(_TASKS), 1)
    atomic_add(job + _REFERENCES, 1)
    is_taken = frame.schedule(address_of('help'), job)
    with when(is_taken.equals(0)):
      atomic_add(address_of(_TASKS), -1)
      atomic_add(job + _REFERENCES, -1)
