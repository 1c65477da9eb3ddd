"""Fits per second of the search, and what of a generation is not the fit.

  PYTHONPATH=.:pallas python benchmarks/search.py

512 programs of 10 rows and 5 constants with the settings of `evolve`: 24 steps of
Levenberg-Marquardt and 6 rounds of Lawson on 40 points. Programs of all ten rows
take longest; those of a search have fewer on average. Seconds are of CPU time, so
N idle cores fit about N times as many in a second.
"""

import statistics
import time

import jax
import numpy as np

from lowbit_jax.search import evolve, fit, targets, variation

_ROUNDS = 7


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
  limits = search.limits
  rng = np.random.default_rng(0)
  full = []
  while len(full) < search.batch:
    program = variation.random_program(rng, limits)
    if len(program.rows) == search.rows:
      full.append(program)
  samples = targets.samples(search.target, search.points, dense=300)
  batch = fit.pack(full, search.rows, search.constants)

  def run():
    fit.fit(
      batch,
      samples,
      ops=limits.ops,
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
