"""Kernels for CPUs and threads: those of Python, of XLA, and none.

No bit of a result depends on them, and nothing waits for a thread that may
never come. Programs run in processes of their own, where a hang is an error
after some minutes.
"""

import functools

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.cpu import frames, processes
from tests.ops import products

# Of 240 kB, more than what one thread computes alone.
_PROGRAM = """
import functools, hashlib, os, threading, time
import jax, jax.numpy as jnp, numpy as np
import lowbit_jax as lowbit
from tests.ops import products

def digest(a):
  return hashlib.sha256(np.asarray(a).tobytes()).hexdigest()

x = products.data(7, 640)
q = products.make('int3_g32', 1000, 640, axis=-1)

@jax.jit
def product(x, q):
  return lowbit.einsum('mk,nk->mn', x, q, implementation='cpu')

one, several = product(x[:1], q), product(x, q)
bits = digest(one), digest(several)
"""

_BITS = '\nprint(*bits)'

# Four threads of Python at once, each with programs of its own; while it can
# be, the pool is full of other work.
_STRESS = """
heavy = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda i, a: a @ a / 9, a))
square = jnp.ones((400, 400))
wrong = []

def work(number):
  others = products.make('int3_g32', 1000, 640, axis=-1, seed=number + 5)
  f = jax.jit(lambda x, q: jnp.tanh(product(x, q)) + number)
  want = f(x, others)
  for i in range(10):
    rest = heavy(square) if number % 2 else None
    many = [product(x[:1], q), product(x, q), f(x, others)]
    for got, right in zip(many, (one, several, want)):
      if digest(got) != digest(right):
        wrong.append((number, i))
    jax.block_until_ready(rest)

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong
print(*bits)
"""

# A fork inherits the kernels but none of XLA's threads, so a child calls them
# without XLA, as one that comes from a call frame.
_FORK = """
import sys, warnings
warnings.simplefilter('ignore')
from tests.cpu import frames
with products.one_device():
  x, q = np.asarray(x), jax.tree.map(np.asarray, q)
  want = frames.product(x, q)
  for _ in range(3):
    child = os.fork()
    if not child:
      pool = frames.Scheduler(4, starts=False)
      got = frames.product(x, q, pool=pool)
      os._exit(0 if (got == want).all() and pool.scheduled else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert digest(product(x, q)) == bits[1]
print(*bits)
"""

# The interpreter ends while a result is on its way.
_LEAVE = """
print(*bits, flush=True)
for _ in range(30):
  last = product(x, q)
"""


@functools.cache
def _bits(cores: int) -> str:
  return processes.output(_PROGRAM + _BITS, cores)


class ProcessTest(parameterized.TestCase):
  def test_the_number_of_threads_changes_no_bit(self):
    self.assertEqual(_bits(1), _bits(2))

  @parameterized.parameters(1, 2)
  def test_calls_from_several_threads(self, cores):
    got = processes.output(_PROGRAM + _STRESS, cores)
    self.assertEqual(got, _bits(2))

  @parameterized.parameters(1, 2)
  @pytest.mark.slow
  def test_more_calls_from_several_threads(self, cores):
    longer = _STRESS.replace('range(10)', 'range(1000)')
    got = processes.output(_PROGRAM + longer, cores)
    self.assertEqual(got, _bits(2))

  def test_after_a_fork(self):
    self.assertEqual(processes.output(_PROGRAM + _FORK), _bits(2))

  @parameterized.parameters(1, 2)
  def test_the_interpreter_may_end_before_a_call(self, cores):
    got = processes.output(_PROGRAM + _LEAVE, cores)
    self.assertEqual(got, _bits(2))


class PoolTest(absltest.TestCase):
  """Pools that are built here."""

  def setUp(self):
    super().setUp()
    self.enterContext(products.one_device())
    self.x = products.data(7, 640)
    self.q = products.make('int3_g32', 1000, 640, axis=-1)
    self.want = frames.product(self.x, self.q)

  def check(self, pool):
    got = frames.product(self.x, self.q, pool=pool)
    np.testing.assert_array_equal(got, self.want)

  def test_no_thread_comes(self):
    pool = frames.Scheduler(4, starts=False)
    self.check(pool)
    self.assertEqual(pool.scheduled, 3)
    # Later they find no work, and nothing that has been freed.
    pool.run_late()

  def test_threads_come_in_the_next_call(self):
    pool = frames.Scheduler(4, starts=False)
    self.check(pool)
    late, pool.tasks = pool.tasks, []
    pool.starts = True
    self.check(pool)
    for task in late:
      task()
    pool.join()

  def test_the_pool_refuses(self):
    pool = frames.Scheduler(4, accepts=False)
    self.check(pool)
    self.assertEqual(pool.scheduled, 3)
    # What was refused does not count as waiting.
    for _ in range(30):
      self.check(pool)
    self.assertEqual(pool.scheduled, 93)

  def test_tasks_that_wait_have_a_limit(self):
    pool = frames.Scheduler(1000, starts=False)
    for _ in range(20):
      self.check(pool)
    self.assertEqual(pool.scheduled, 64)
    pool.run_late()
    self.check(pool)
    self.assertGreater(len(pool.tasks), 0)
    pool.run_late()

  def test_many_threads(self):
    for _ in range(20):
      with frames.pool_of(16) as pool:
        self.check(pool)

  def test_little_work_asks_nobody(self):
    pool = frames.Scheduler(4)
    q = products.make('int3_g32', 40, 640, axis=-1)
    frames.product(self.x[:1], q, pool=pool)
    self.assertEqual(pool.scheduled, 0)


if __name__ == '__main__':
  absltest.main()
