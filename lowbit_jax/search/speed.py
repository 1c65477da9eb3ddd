"""Time as the objective: the bound first, then the speed of compiled code.

`measure` replaces the estimated cost of programs within the bound by measured
time, in units of an addition: that of Horner's scheme of degree 6 counts as its
6 multiply-adds, so costs of other machines and moments compare. `finalists`
polishes float32 constants on the compiled function and races the best against
what exists. Measured time is not reproducible, and neither is a search by it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.search import (
  archive as archives,
  certify,
  emit,
  fit as fitting,
  polish,
  program as programs,
  timing,
)
from lowbit_jax.search.archive import Archive, Entry
from lowbit_jax.search.program import Program
from lowbit_jax.search.targets import Target

_YARDSTICK = tuple(1 / (2.0 + k) for k in range(7))  # any coefficients
_ROUNDS = 6  # of a measurement within a search
# What of the error of unfused operations with rounded constants may go when
# the compiler fuses products and the constants are polished.
_SLACK = 4.0


class Finalist(NamedTuple):
  """A program that met the bound and was raced.

  Attributes:
    program: with float32 constants.
    max_ulp: its largest error on the tier that was swept.
    comparison: with the base.
  """

  program: Program
  max_ulp: float
  comparison: timing.Comparison


def _yardstick(x):
  y = jnp.full_like(x, _YARDSTICK[-1])
  for c in reversed(_YARDSTICK[:-1]):
    y = y * x + c
  return y


def measure(
  entries: Sequence[Entry],
  samples: fitting.Samples,
  known: Mapping[int, float],
  *,
  bound: float,
  count: int,
) -> tuple[list[Entry], dict[int, float]]:
  """Entries with measured costs and errors where they are within the bound.

  Args:
    entries: of a search by time, with errors in ULP.
    samples: whose dense points judge the compiled core.
    known: measured cost of structures, by hash.
    bound: ULP; up to four times as much is measured, see `_SLACK`.
    count: how many structures to measure at most, the cheapest first.

  Returns:
    The entries that are beyond the bound or measured, and `known` with what was
    measured now.
  """
  known = dict(known)
  within = sorted(
    (e for e in entries if e.error <= bound), key=lambda e: e.cost
  )
  result = [e for e in entries if not e.error <= bound]
  interval = tuple(samples.dense_x[[0, -1]])
  for entry in within:
    key = programs.structure_hash(entry.program.rows)
    if key not in known:
      if count == 0:
        continue
      count -= 1
      known[key] = _relative_time(entry.program, interval)
    y = np.asarray(jax.jit(entry.program)(samples.dense_x.astype(np.float32)))
    error = np.max(np.abs(y - samples.dense_f) * samples.dense_w)
    result.append(entry._replace(cost=known[key], error=float(error)))
  return result, known


def _relative_time(program: Program, interval) -> float:
  comparison = timing.compare(
    program, _yardstick, interval, rounds=_ROUNDS, repeats=1
  )
  return (len(_YARDSTICK) - 1) / comparison.speedup


def finalists(
  target: Target,
  archive: Archive,
  base: Callable,
  reference: Callable[[np.ndarray], np.ndarray],
  interval: tuple[float, float],
  *,
  bound: float = 1.0,
  tier: str = '2^16',
  rounds: int = 40,
  seed: int = 0,
) -> list[Finalist]:
  """Programs of the front that meet a bound, raced against a base.

  Args:
    target: of the search.
    archive: of a search by 'ulp' or 'time'.
    base: from float32 to float32, what a user would otherwise run.
    reference: the function in NumPy, from float64 to float64.
    interval: (lo, hi) of x that is certified and timed; the interval of the
      target unless it has a wrapper.
    bound: ULP of the compiled function.
    tier: density of the sweep.
    rounds: of timing.
    seed: of polishing.

  Returns:
    Those that met the bound, fastest first.
  """
  result = []
  for entry in archives.front(archive):
    if entry.error > _SLACK * bound:
      continue
    program = entry.program
    fit = polish.float32_coefficients(
      emit.with_constants(program, target),
      program.constants,
      reference,
      interval,
      samples=2**16,
      evaluations=400,
      seed=seed,
    )
    polished = program.replace_constants(map(float, fit.constants))
    fn = emit.function(polished, target)
    sweep = certify.tiered(fn, reference, interval, tier=tier, bound=bound)
    if sweep.max_ulp <= bound:
      race = timing.compare(fn, base, interval, rounds=rounds)
      result.append(Finalist(polished, sweep.max_ulp, race))
  return sorted(result, key=lambda f: -f.comparison.speedup)
