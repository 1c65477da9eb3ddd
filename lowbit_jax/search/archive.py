"""The results of a search: the best programs at every cost.

An `Archive` has one bucket for each cost, as MAP-Elites has for each behaviour
(Mouret and Clune, "Illuminating search spaces by mapping elites", 2015), and
keeps the best of each: with two objectives, that needs no crowding distance.
`nsga2` is selection by non-dominated sorting for comparison (Deb et al., "A
fast and elitist multiobjective genetic algorithm: NSGA-II", 2002).
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lowbit_jax.search.program import Program

BUCKET = 40  # programs of one cost
_SAME = 1e-6  # difference of log errors of the same solution
_RANK = 8.0  # scale of the exponential rank of parents


class Entry(NamedTuple):
  """A program, its cost and its largest weighted error."""

  program: Program
  cost: float
  error: float


Archive = Mapping[float, tuple[Entry, ...]]  # by bucket, best first


def bucket(cost: float) -> float:
  """The cost to two significant digits, which keeps counts of rows apart."""
  return float(f'{cost:.2g}')


def insert(archive: Archive, entries: Iterable[Entry]) -> Archive:
  """Adds the entries that are new and among the best of their cost.

  Of entries in a bucket whose errors agree to 1e-6 the first stays: they are
  the same solution in another notation.
  """
  changed: dict[float, list[Entry]] = {}
  for entry in entries:
    if not (np.isfinite(entry.error) and entry.error > 0):
      continue
    key = bucket(entry.cost)
    members = changed.setdefault(key, list(archive.get(key, ())))
    i = bisect.bisect_left(members, entry.error, key=lambda e: e.error)
    beside = members[max(i - 1, 0) : i + 1]
    if any(abs(math.log(e.error / entry.error)) < _SAME for e in beside):
      continue
    members.insert(i, entry)
    del members[BUCKET:]
  merged = dict(archive) | {k: tuple(v) for k, v in changed.items()}
  return {k: merged[k] for k in sorted(merged) if merged[k]}


def entries(archive: Archive, best: int = BUCKET) -> list[Entry]:
  """The best few of every bucket."""
  return [entry for members in archive.values() for entry in members[:best]]


def front(archive: Archive) -> list[Entry]:
  """Entries that no cheaper one equals in error, by increasing cost."""
  result: list[Entry] = []
  for entry in sorted(entries(archive, 1), key=lambda e: (e.cost, e.error)):
    if not result or entry.error < result[-1].error:
      result.append(entry)
  return result


def best_error(archive: Archive, cost: float) -> float:
  """The smallest error at this cost or below, inf if there is none."""
  errors = [e.error for e in front(archive) if e.cost <= cost]
  return min(errors, default=math.inf)


def pick(archive: Archive, rng: np.random.Generator) -> Entry:
  """An entry of a uniformly drawn bucket, by exponential rank within it."""
  members = archive[list(archive)[rng.integers(len(archive))]]
  return members[int(rng.exponential(_RANK)) % len(members)]


def ranks(points: np.ndarray) -> np.ndarray:
  """Fronts of (N, 2) points to be minimised: 0 for those none dominates.

  Points are sorted by the first objective and put into the first front whose
  last point does not dominate them, found by bisection: O(N log N).
  """
  order = np.lexsort((points[:, 1], points[:, 0]))
  result = np.zeros(len(points), int)
  last: list[tuple[float, float]] = []  # (second, first) of each front
  for i in order:
    first, second = points[i]

    def dominated(f, first=first, second=second):
      s, g = last[f]
      return s < second or (s == second and g < first)

    f = bisect.bisect_left(
      range(len(last)), True, key=lambda f: not dominated(f)
    )
    if f == len(last):
      last.append((second, first))
    else:
      last[f] = (second, first)
    result[i] = f
  return result


def crowding(points: np.ndarray) -> np.ndarray:
  """Crowding distances of the (N, 2) points of one front."""
  distance = np.zeros(len(points))
  for values in points.T:
    order = np.argsort(values, kind='stable')
    span = values[order[-1]] - values[order[0]]
    distance[order[[0, -1]]] = np.inf
    if span > 0 and len(points) > 2:
      gaps = (values[order[2:]] - values[order[:-2]]) / span
      distance[order[1:-1]] += gaps
  return distance


def nsga2(candidates: Sequence[Entry], size: int) -> tuple[Entry, ...]:
  """The `size` best by front, then by crowding distance, duplicates removed.

  Objectives are cost and log error.
  """
  unique = {(e.program.rows, e.error): e for e in candidates}
  pool = [e for e in unique.values() if np.isfinite(e.error) and e.error > 0]
  if not pool:
    return ()
  points = np.array([(e.cost, math.log(e.error)) for e in pool])
  rank = ranks(points)
  order: list[int] = []
  for f in range(rank.max() + 1):
    members = np.flatnonzero(rank == f)
    order += members[
      np.argsort(-crowding(points[members]), kind='stable')
    ].tolist()
    if len(order) >= size:
      break
  return tuple(pool[i] for i in order[:size])


def to_arrays(
  items: Sequence[Entry], rows: int, constants: int
) -> dict[str, np.ndarray]:
  """Entries as arrays of fixed sizes, for files and for other processes.

  Returns:
    A dict of rows (N, rows, 4) int32, constants (N, constants) float64, sizes
    (N, 2) int32, costs and errors (N,) float64.
  """
  programs = [e.program for e in items]
  table = np.zeros((len(items), rows, 4), np.int32)
  values = np.zeros((len(items), constants))
  for i, program in enumerate(programs):
    table[i, : len(program.rows)] = np.reshape(program.rows, (-1, 4))
    values[i, : len(program.constants)] = program.constants
  sizes = [(len(p.rows), len(p.constants)) for p in programs]
  return {
    'rows': table,
    'constants': values,
    'sizes': np.array(sizes, np.int32).reshape(-1, 2),
    'costs': np.array([e.cost for e in items], np.float64),
    'errors': np.array([e.error for e in items], np.float64),
  }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Entry]:
  """Entries that `to_arrays` stored; those without constants and rows too."""
  result = []
  for rows, constants, (n, k), cost, error in zip(
    arrays['rows'],
    arrays['constants'],
    arrays['sizes'],
    arrays['costs'],
    arrays['errors'],
    strict=True,
  ):
    program = Program(
      tuple(tuple(row) for row in rows[:n].tolist()),
      tuple(constants[:k].tolist()),
    )
    result.append(Entry(program, float(cost), float(error)))
  return result
