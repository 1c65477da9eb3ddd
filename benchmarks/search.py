"""Fits per second of the search, and what of a generation is not the fit.

  PYTHONPATH=.:pallas python benchmarks/search.py

512 programs of 10 rows and 5 constants with the settings of `evolve`: 24 steps
of Levenberg-Marquardt and 6 rounds of Lawson on 40 points. Programs of all ten
rows take longest; those of a search have fewer on average. Seconds are of CPU
time, so N idle cores fit about N times as many in a second.
"""

import statistics
import time

import jax
import numpy as np

from lowbit_jax.search import evolve, fit, program, targets
from lowbit_jax.search.program import ADD, DIV, MUL

_ROUNDS = 7
# (c4 / (c1 / u + u + c2) + c5)^8 with u = c3 / x + x.
_ROWS = (
  (DIV, 3, 0, 0), (ADD, 6, 0, 0), (DIV, 1, 7, 0), (ADD, 8, 7, 0),
  (ADD, 9, 2, 0), (DIV, 4, 10, 0), (ADD, 11, 5, 0), (MUL, 12, 12, 0),
  (MUL, 13, 13, 0), (MUL, 14, 14, 0),
)  # fmt: skip


def cpu_seconds(f) -> float:
  """Median over rounds, after a first call."""
  f()
  seconds = []
  for _ in range(_ROUNDS):
    start = time.process_time()
    f()
    seconds.append(time.process_time() - start)
  return statistics.median(seconds)


def main() -> None:
  search = evolve.Search(targets.get('exp2'), shrink_every=0)
  rng = np.random.default_rng(0)
  constants = rng.standard_normal((search.batch, search.constants))
  full = [program.Program(_ROWS, tuple(c)) for c in constants.tolist()]
  samples = targets.samples(search.target, search.points, dense=300)
  batch = fit.pack(full, search.rows, search.constants)

  def run():
    fit.fit(
      batch,
      samples,
      ops=search.limits.ops,
      steps=search.steps,
      rounds=search.rounds,
      dense='float64',
    )

  state = evolve.init(search)
  for _ in range(20):
    state = evolve.step(search, state)
  fitting = cpu_seconds(run)
  stepping = cpu_seconds(lambda: evolve.step(search, state))
  print(f'jax {jax.__version__}, {jax.local_device_count()} device(s)')
  print(f'fit of full programs  {search.batch / fitting:7.0f} per CPU second')
  print(f'whole generations     {search.batch / stepping:7.0f} per CPU second')


if __name__ == '__main__':
  main()
