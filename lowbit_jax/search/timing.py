"""Which of two functions of one variable is faster once compiled.

Candidate and base run in turns, A B B A, so that a busy machine slows both, and
what counts is the ratio within a round. CPU time of the process is measured:
the work runs on threads of the runtime, and time of the calling thread would
be that of dispatch. The kernel books it late: a call of 0.2 ms may read as a
quarter of that and leave the rest to the next, so a call should take 5 ms or
more, and lower quartiles stand for the shortest times. Times of code that
computes something else mean nothing: certify the same function, see `certify`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Repeat:
  """Rounds of one run.

  Attributes:
    nanoseconds: time of the candidate per element and application, the lower
      quartile.
    base_nanoseconds: the same of the base.
    speedup: median over rounds of base time / candidate time.
    quartiles: of the same ratios, (lower, upper).
  """

  nanoseconds: float
  base_nanoseconds: float
  speedup: float
  quartiles: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Several runs, which must agree before a candidate is called faster.

  Attributes:
    size: elements per application.
    applications: per call.
    rounds: A B B A sequences per run.
    repeats: the runs.
  """

  size: int
  applications: int
  rounds: int
  repeats: tuple[Repeat, ...]

  @property
  def speedup(self) -> float:
    """Base time / candidate time, the median of those of the runs."""
    return statistics.median(repeat.speedup for repeat in self.repeats)

  @property
  def faster(self) -> bool:
    """Whether in every run three quarters of the ratios exceed 1."""
    return all(repeat.quartiles[0] > 1 for repeat in self.repeats)


def compare(
  candidate: Callable,
  base: Callable,
  interval: tuple[float, float],
  *,
  size: int = 2**14,
  applications: int = 512,
  rounds: int = 40,
  repeats: int = 3,
  clock: Callable[[], float] = time.process_time,
) -> Comparison:
  """Times two functions of float32 arrays in one process.

  The defaults keep all data in the second-level cache. Another question is
  `size=2**20, applications=8`, passes over a larger array.

  Args:
    candidate: from float32 (N,) to float32 (N,), traceable.
    base: the same.
    interval: (lo, hi) of the inputs, which are equispaced.
    size: elements per application.
    applications: per call, each needing the result of the one before.
    rounds: A B B A sequences per run.
    repeats: runs.
    clock: seconds, from any origin.

  Raises:
    ValueError: if a count is not positive or the interval is not finite.
  """
  for name, value in (
    ('size', size),
    ('applications', applications),
    ('rounds', rounds),
    ('repeats', repeats),
  ):
    if value < 1:
      raise ValueError(f'{name}={value} must be 1 or more')
  if not (np.all(np.isfinite(interval)) and interval[0] <= interval[1]):
    raise ValueError(f'interval={interval} must be finite with lo <= hi')
  x = jnp.asarray(np.linspace(*interval, size, dtype=np.float32))
  first, second = (_thunk(fn, x, applications) for fn in (candidate, base))
  runs = [interleave(first, second, rounds, clock) for _ in range(repeats)]
  scale = 1e9 / (size * applications)
  return Comparison(
    size, applications, rounds, tuple(_summary(run * scale) for run in runs)
  )


def _thunk(fn: Callable, x: jax.Array, applications: int) -> Callable[[], None]:
  """A warm call of the compiled loop."""
  compiled = jax.jit(dependent(fn, applications)).lower(x).compile()

  def thunk():
    compiled(x).block_until_ready()

  thunk()
  return thunk


def dependent(fn: Callable, applications: int) -> Callable:
  """A loop of applications to x, each of which needs the one before.

  The dependence is too small to change an input other than zero, but XLA cannot
  know that, and so takes nothing out of the loop.
  """

  def loop(x):
    def body(_, y):
      return fn(x + y * np.float32(1e-30)) * np.float32(1e-8)

    return lax.fori_loop(0, applications, body, jnp.zeros_like(x))

  return loop


def interleave(
  first: Callable[[], None],
  second: Callable[[], None],
  rounds: int,
  clock: Callable[[], float],
) -> np.ndarray:
  """Seconds of two thunks, run in the order A B B A.

  Returns:
    (rounds, 2, 2): for every round the two times of `first`, then of `second`.
  """
  seconds = np.empty((rounds, 2, 2))
  for i in range(rounds):
    for which, turn in ((0, 0), (1, 0), (1, 1), (0, 1)):
      start = clock()
      (first, second)[which]()
      seconds[i, which, turn] = clock() - start
  return seconds


def _summary(times: np.ndarray) -> Repeat:
  candidate, base = times.sum(-1).T
  lower, median, upper = np.quantile(base / candidate, (0.25, 0.5, 0.75))
  quartile = np.quantile(times, 0.25, axis=(0, 2))
  return Repeat(
    nanoseconds=float(quartile[0]),
    base_nanoseconds=float(quartile[1]),
    speedup=float(median),
    quartiles=(float(lower), float(upper)),
  )
