"""Evolution of programs: `init` a state, `step` it, look at its archive.

A step varies parents of the archive, fits the constants of the children and
adds the better ones to it. At intervals it also shrinks the best: a row is
bypassed, or a square appended, and the rest fitted from many starts. Everything
that a step depends on is in the state, so the same state gives the same next
one, bit for bit, and a run that was saved and resumed equals one that was not.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lowbit_jax import _results
from lowbit_jax._typing import PathLike
from lowbit_jax.search import (
  archive as archives,
  fit as fitting,
  polish,
  program as programs,
  speed,
  targets,
  variation,
)
from lowbit_jax.search.archive import Archive, Entry
from lowbit_jax.search.program import Program
from lowbit_jax.search.targets import Target

OBJECTIVES = ('operations', 'ulp', 'time')
SELECTIONS = ('archive', 'nsga2', 'random')

_KIND = 'search 2'
_DENSE = 300
_REFITS = 6  # of one structure, over the whole run
_KEPT_STARTS = 2  # of those from inherited constants
_POPULATION = 64  # of NSGA-II
_MEASURED = 4  # new structures of a step whose time is measured
_SHRUNK = 4  # of each cost, that are shrunk
_SCREEN = (256, 24)  # starts and steps of the first look at a simpler program
_PROMISE = 100.0  # times the best error of its cost, to deserve a second
_SECOND = 2  # the most that get one
_STARTS, _STEPS = 128, 150  # of their fits
# Factors of constants where f(x)^2 = f(2 x) takes over half of x, and back.
_GROW = (1.0, 2.0, 4.0)
_SHRINK = (1.0, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Search:
  """A problem and the way it is searched.

  Attributes:
    target: the function.
    ops: names of the operations of programs, as in `program.OPS`.
    rows: the most operations of a core; see `targets.extra_operations`.
    constants: the most constants of a core.
    objective: the two costs of a program: 'operations' their number and
      the error over the reals; 'ulp' their number and the error in units in the
      last place when every operation rounds to float32; 'time' the same error
      and, for programs within the bound, measured time, see `speed`; for those
      beyond it the estimate `program.weighted_cost`.
    bound: of 'time', in ULP.
    batch: children of a step.
    select: parents come from all buckets of the archive ('archive') or from a
      population under NSGA-II ('nsga2'), or children are random ('random').
    pairs: whether variation inserts pairs that preserve the function.
    fit: whether constants are fitted; otherwise they change by mutation only.
    shrink_every: steps between two of shrinking; 0 for never.
    points: on which constants are fitted.
    steps: of Levenberg-Marquardt.
    rounds: of Lawson's reweighting.
    seed: of all choices.

  Raises:
    ValueError: for an unknown operation, objective or selection, or a size that
      is too small.
  """

  target: Target
  ops: tuple[str, ...] = ('add', 'sub', 'mul', 'div')
  rows: int = 10
  constants: int = 5
  objective: str = 'operations'
  bound: float = 1.0
  batch: int = 512
  select: str = 'archive'
  pairs: bool = True
  fit: bool = True
  shrink_every: int = 20
  points: int = 40
  steps: int = 24
  rounds: int = 6
  seed: int = 0

  def __post_init__(self) -> None:
    programs.op_codes(self.ops)
    for name, value, allowed in (
      ('objective', self.objective, OBJECTIVES),
      ('select', self.select, SELECTIONS),
    ):
      if value not in allowed:
        raise ValueError(f'{name}={value!r} must be one of {allowed}')
    for name, least in (
      ('rows', 1),
      ('constants', 1),
      ('batch', 1),
      ('points', self.constants + 1),
      ('steps', 1),
      ('rounds', 0),
      ('shrink_every', 0),
      ('seed', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f'{name}={getattr(self, name)} must be {least} or more'
        )

  @property
  def limits(self) -> variation.Limits:
    return variation.Limits(
      programs.op_codes(self.ops), self.rows, self.constants
    )

  @property
  def fitted_target(self) -> Target:
    """The target, with errors in ULP if the objective says so."""
    if self.objective == 'operations':
      return self.target
    return dataclasses.replace(self.target, weight='ulp32')

  def cost(self, program: Program) -> float:
    """What the objective counts of a core, before time is measured."""
    if self.objective == 'time':
      return programs.weighted_cost(program)
    return float(programs.operations(program))


class State(NamedTuple):
  """All that a step depends on.

  Attributes:
    archive: the best programs at every cost.
    population: parents of 'nsga2', else empty.
    seen: how often a structure was fitted, by its hash.
    shrunk: hashes of the structures that were shrunk.
    times: measured cost of a structure, by its hash; of 'time', else empty.
    rng: state of the generator.
    generation: steps so far.
    fits: programs fitted so far.
  """

  archive: Archive
  population: tuple[Entry, ...]
  seen: Mapping[int, int]
  shrunk: frozenset[int]
  times: Mapping[int, float]
  rng: Any
  generation: int
  fits: int


def init(search: Search, island: int = 0) -> State:
  """The state that knows x * c and x + c, fitted.

  Args:
    search: the problem.
    island: number of this one among several of the same search.

  Raises:
    ImportError: without mpmath.
    ValueError: if the target is not finite on its interval, see
      `targets.samples`.
  """
  sequence = np.random.SeedSequence(search.seed, spawn_key=(island,))
  rng = np.random.default_rng(sequence)
  ops = search.limits.ops
  first = [op for op in (programs.MUL, programs.ADD) if op in ops] or ops[:1]
  starts = []
  for op in first:
    others = [programs.Node(programs.CONSTANT, (), 1.5)] * 2
    x = programs.Node(programs.X)
    args = [x, *others][: programs.OPS[op].arity]
    starts.append(programs.from_graph(programs.Node(op, args)))
  entries = _fitted(search, starts, search.steps, search.rounds)
  archive = archives.insert({}, entries)
  if not archive:
    archive = archives.insert({}, [e._replace(error=1e300) for e in entries])
  return State(
    archive=archive,
    population=tuple(archives.entries(archive)),
    seen={},
    shrunk=frozenset(),
    times={},
    rng=rng.bit_generator.state,
    generation=0,
    fits=len(starts),
  )


def step(search: Search, state: State) -> State:
  """One generation: vary, fit, select; shrinking now and then."""
  rng = _generator(state)
  seen = dict(state.seen)
  children = _children(search, state, rng, seen)
  entries = _fitted(search, children, search.steps, search.rounds)
  state = merge(search, state, entries)._replace(
    seen=seen,
    rng=rng.bit_generator.state,
    generation=state.generation + 1,
    fits=state.fits + len(children),
  )
  if search.shrink_every and state.generation % search.shrink_every == 0:
    state = shrink(search, state)
  return state


def _generator(state: State) -> np.random.Generator:
  bits = np.random.PCG64()
  bits.state = state.rng
  return np.random.Generator(bits)


def _children(search, state, rng, seen) -> list[Program]:
  """A batch of programs, counted in `seen`."""
  limits = search.limits

  def parent(rng):
    if search.select == 'nsga2':
      return state.population[rng.integers(len(state.population))].program
    return archives.pick(state.archive, rng).program

  result: list[Program] = []
  attempts = 0
  while len(result) < search.batch:
    attempts += 1
    if search.select == 'random':
      child = variation.random_program(rng, limits)
    else:
      child = variation.vary(
        parent(rng), rng, limits, other=parent, pairs=search.pairs
      )
    key = programs.structure_hash(child.rows)
    count = seen.get(key, 0)
    if not search.fit:
      child = variation.jitter_constants(child, rng)
    elif count >= _REFITS and attempts < 8 * search.batch:
      continue
    elif count >= _KEPT_STARTS:
      child = variation.redraw_constants(child, rng)
    seen[key] = count + 1
    result.append(child)
  return result


@functools.lru_cache(maxsize=8)
def _samples(target: Target, points: int) -> fitting.Samples:
  return targets.samples(target, points=points, dense=_DENSE)


def _fitted(search, items, steps, rounds) -> list[Entry]:
  """Up to a batch of programs, with constants and errors, finite or not."""
  samples = _samples(search.fitted_target, search.points)
  ops = search.limits.ops
  padded = [*items, *items[:1] * (search.batch - len(items))]
  batch = fitting.pack(padded, search.rows, search.constants)
  reals = search.objective == 'operations'
  result = fitting.fit(
    batch,
    samples,
    ops=ops,
    steps=steps if search.fit else 0,
    rounds=rounds if search.fit else 0,
    dense='float64' if reals else 'float32',
  )
  # The points of the fit see poles between the dense ones.
  error = result.dense_error
  error = np.maximum(result.error, error) if reals else error
  return [
    Entry(
      item.replace_constants(c[: len(item.constants)]), search.cost(item), e
    )
    for item, c, e in zip(
      items, result.constants.tolist(), error.tolist(), strict=False
    )
  ]


def shrink(search: Search, state: State) -> State:
  """Tries one of the best programs with a row less, and squared.

  It is the best of a cost that was not shrunk before, else the second best of
  one, and so on: a program that hides a simpler form, in a factor that could be
  one, is often not the best of its size. All simpler forms are fitted from many
  starts, and the most promising again.
  """
  rng = _generator(state)
  ranked: list[list[Program]] = [
    [
      entries[rank].program
      for entries in state.archive.values()
      if len(entries) > rank
    ]
    for rank in range(_SHRUNK)
  ]
  ranked = [[p for p in group if p.rows] for group in ranked]
  fresh = [
    [p for p in group if _key(p) not in state.shrunk] for group in ranked
  ]
  candidates = next(filter(None, [*fresh, *ranked]), None)
  if not candidates or not search.fit:
    return state
  drawn = candidates[rng.integers(len(candidates))]
  squared = programs.MUL in search.limits.ops
  entries, fits = [], 0
  for forms, factors in (
    (_simpler(drawn), _SHRINK),
    ([variation.square(drawn)] * squared, _GROW),
  ):
    found, count = _screened(search, state, forms, factors, rng)
    entries += found
    fits += count
  return merge(search, state, entries)._replace(
    shrunk=state.shrunk | {_key(drawn)},
    rng=rng.bit_generator.state,
    fits=state.fits + fits,
  )


def _key(program: Program) -> int:
  return programs.structure_hash(program.rows)


def _screened(search, state, forms, factors, rng):
  """Entries of programs after a look at all and another at the promising few,
  and the number of fits."""
  forms = list({f.rows: f for f in forms if _fits(f, search.limits)}.values())
  starts, steps = _SCREEN
  entries = _best_of(search, forms, starts, steps, rng, factors)

  def promise(entry):
    return entry.error / archives.best_error(state.archive, entry.cost)

  second = [e for e in entries if promise(e) < _PROMISE]
  second = [e.program for e in sorted(second, key=promise)[:_SECOND]]
  entries += _best_of(search, second, _STARTS, _STEPS, rng, factors)
  return entries, starts * len(forms) + _STARTS * len(second)


def append_squares(search: Search, state: State) -> State:
  """Squares every program of the front until it has the most rows.

  For the end of a search: each square costs a row, and where f(x)^2 = f(2 x),
  or nearly so, it buys digits that evolution would find one by one.
  """
  rng = _generator(state)
  fits = 0
  for entry in archives.front(state.archive):
    program = variation.square(entry.program)
    while search.fit and _fits(program, search.limits):
      entries = _best_of(search, [program], 4 * _STARTS, _STEPS, rng, _GROW)
      fits += 4 * _STARTS
      state = merge(search, state, entries)
      program = variation.square(entries[0].program)
  return state._replace(rng=rng.bit_generator.state, fits=state.fits + fits)


def _simpler(program: Program) -> list[Program]:
  """The program without one of its rows, in all ways."""
  result = []
  for row, (op, *_) in enumerate(program.rows):
    for operand in range(programs.OPS[op].arity):
      try:
        result.append(variation.bypass(program, row, operand))
      except programs.Degenerate:
        continue
  return result


def _fits(program, limits) -> bool:
  try:
    limits.check(program)
  except variation.TooLarge:
    return False
  return bool(program.constants)


def _best_of(search, items, starts, steps, rng, factors) -> list[Entry]:
  """Each program with the best constants from several starts.

  Most multiply its constants by some of the factors.
  """
  items = [item.replace_constants(map(float, item.constants)) for item in items]
  trials = [
    item.replace_constants(c.tolist())
    for item in items
    for c in _starts(np.array(item.constants), starts, rng, factors)
  ]
  groups = collections.defaultdict(list)
  for i in range(0, len(trials), search.batch):
    part = trials[i : i + search.batch]
    for entry in _fitted(search, part, steps, search.rounds):
      groups[entry.program.rows].append(entry)
  return [min(group, key=_finite_error) for group in groups.values()]


def _finite_error(entry) -> float:
  return entry.error if np.isfinite(entry.error) else np.inf


def _starts(c: np.ndarray, count: int, rng, factors) -> np.ndarray:
  """Constants (count, K): as they are, near them, and anywhere."""
  far = count // 16
  near = 2.0 ** rng.integers(-2, 3, (count - 2 * far, len(c)))
  products = rng.choice(factors, (3 * len(near) // 4, len(c)))
  if len(factors) ** len(c) < 4 * len(near):
    every = np.array(list(itertools.product(factors, repeat=len(c))))
    products = rng.permutation(every)[: len(near)]
  near[: len(products)] = products
  near[0] = 1.0
  spread = rng.choice([0.1, 1.0, 2.0], (far, 1))
  other = np.exp(spread * rng.standard_normal((far, len(c))))
  size = 10 ** rng.uniform(-1, 3.5, (far, len(c)))
  signs = rng.choice([-1, 1], size.shape)
  return np.concatenate([c * near, c * other, size * signs])


def merge(search: Search, state: State, entries: list[Entry]) -> State:
  """The state with entries of this search, of this or of another island."""
  times = state.times
  if search.objective == 'time':
    entries, times = speed.measure(
      entries,
      _samples(search.fitted_target, search.points),
      times,
      bound=search.bound,
      count=_MEASURED,
    )
  population = state.population
  if search.select == 'nsga2':
    population = archives.nsga2([*population, *entries], _POPULATION)
  return state._replace(
    archive=archives.insert(state.archive, entries),
    population=population,
    times=times,
  )


def polished(search: Search, entry: Entry) -> tuple[Program, float]:
  """An entry with minimax constants in 80 bits, and their error over the reals.

  Returns:
    The program, with longdouble constants, and the error in the weight of the
    target; those of the entry if polishing does not improve it.

  Raises:
    ImportError: without SciPy or mpmath.
  """
  target = search.fitted_target
  try:
    fit = polish.minimax(
      targets.model(entry.program),
      targets.core_reference(target),
      targets.core_interval(target),
      entry.program.constants,
      weight=targets.core_weight(target),
    )
  except ValueError:  # a pole that the fit did not see
    return entry.program, entry.error
  return entry.program.replace_constants(fit.constants), fit.error


def save(path: PathLike, search: Search, state: State) -> None:
  """Writes a checkpoint, which appears complete or not at all.

  A checkpoint of the same search is replaced.

  Raises:
    FileExistsError: if the file is something else.
  """
  if os.path.exists(path):
    try:
      _read(path, search)
    except ValueError as error:
      raise FileExistsError(
        f'path={os.fspath(path)!r} exists and is not a checkpoint of this'
        f' search ({error}); choose another'
      ) from error
  arrays = {
    'search': np.array(identity(search)),
    'counts': np.array([state.generation, state.fits]),
    'rng': np.array(json.dumps(state.rng)),
    'seen': np.array(list(state.seen.items()), np.int64).reshape(-1, 2),
    'shrunk': np.array(sorted(state.shrunk), np.int64),
    'timed': np.array(list(state.times), np.int64),
    'times': np.array(list(state.times.values()), np.float64),
  }
  for name, items in (
    ('archive', archives.entries(state.archive)),
    ('population', state.population),
  ):
    stored = archives.to_arrays(items, search.rows, search.constants)
    arrays |= {f'{name}_{key}': value for key, value in stored.items()}
  _results.write_npz(path, _KIND, arrays)


def load(path: PathLike, search: Search) -> State:
  """Reads a state that `save` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, which its checksum says, or belongs to
      another search.
  """
  arrays = _read(path, search)
  items = {
    name: archives.from_arrays(
      {
        key: arrays[f'{name}_{key}']
        for key in ('rows', 'constants', 'sizes', 'costs', 'errors')
      }
    )
    for name in ('archive', 'population')
  }
  generation, fits = arrays['counts'].tolist()
  return State(
    archive=archives.insert({}, items['archive']),
    population=tuple(items['population']),
    seen=dict(arrays['seen'].tolist()),
    shrunk=frozenset(arrays['shrunk'].tolist()),
    times=dict(
      zip(arrays['timed'].tolist(), arrays['times'].tolist(), strict=True)
    ),
    rng=json.loads(str(arrays['rng'])),
    generation=generation,
    fits=fits,
  )


def _read(path, search) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint of this search."""
  path = os.fspath(path)
  arrays = _results.read_npz(path, _KIND, 'delete it to start again')
  saved = str(arrays['search'])
  if saved != identity(search):
    raise ValueError(
      f'path={path!r} belongs to another search: {_difference(saved, search)};'
      ' choose another path or the same settings'
    )
  return arrays


def identity(search: Search) -> str:
  """The settings as JSON; functions of the target by its name alone."""
  settings = {
    field.name: getattr(search, field.name)
    for field in dataclasses.fields(search)
    if field.name != 'target'
  }
  target = search.target
  settings['target'] = [
    target.name,
    list(map(float, target.interval)),
    target.parity,
    target.weight,
    float(target.offset),
  ]
  return json.dumps(settings, sort_keys=True)


def _difference(saved: str, search: Search) -> str:
  old, new = json.loads(saved), json.loads(identity(search))
  names = [name for name in new if new[name] != old.get(name)]
  return ', '.join(f'{name} {old.get(name)} -> {new[name]}' for name in names)
