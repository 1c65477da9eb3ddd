"""Searches for formulas of a function, from nothing, and reports them.

Programs of a few operations evolve (see lowbit_jax.search): varied, their
constants fitted, the best of every size kept. Islands are processes of this
script that exchange their best through WORKDIR. WORKDIR gets

  island_*/checkpoint.npz   from which the same command goes on
  island_*/log.csv          the front over time
  hall_of_fame.json         the best programs, constants in full, polished
  pareto.png                error against operations, with classical formulas

  python examples/evolve.py                              # 2^x on [0, 1]
  python examples/evolve.py --target=erf --minutes=20 --rows=12
  python examples/evolve.py --objective=time --interval=-0.5,0.5

Under jax.distributed (--coordinator, --processes, --process) every process is
an island and programs travel in a ring, which is reproducible.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from lowbit_jax import _results, special
from lowbit_jax.search import (
  archive as archives,
  certify,
  emit,
  evolve,
  islands,
  polish,
  program as programs,
  speed,
  targets,
  timing,
)
from support import command, report

_TARGET = flags.DEFINE_enum(
  'target', 'exp2', sorted(targets.TARGETS), 'Function.'
)
_INTERVAL = flags.DEFINE_list(
  'interval', None, 'LO,HI of x; by default that of the target.'
)
_WEIGHT = flags.DEFINE_enum(
  'weight', None, ['rel', 'abs', 'ulp32', 'ulp_bf16'], 'Unit of the error.'
)
_OPS = flags.DEFINE_list(
  'ops', ['add', 'sub', 'mul', 'div'], 'Operations of programs.'
)
_ROWS = flags.DEFINE_integer('rows', 10, 'Most operations.', lower_bound=1)
_CONSTANTS = flags.DEFINE_integer(
  'constants', 5, 'Most constants.', lower_bound=1
)
_OBJECTIVE = flags.DEFINE_enum(
  'objective', 'operations', evolve.OBJECTIVES, 'What is traded for error.'
)
_BOUND = flags.DEFINE_float(
  'bound', 1.0, 'ULP that programs must meet under --objective=time.'
)
_SELECT = flags.DEFINE_enum(
  'select', 'archive', evolve.SELECTIONS, 'Where parents come from.'
)
_PAIRS = flags.DEFINE_bool(
  'pairs', True, 'Insert pairs of rows that preserve the function.'
)
_FIT = flags.DEFINE_bool(
  'fit', True, 'Fit constants; otherwise they change by mutation only.'
)
_BATCH = flags.DEFINE_integer(
  'batch', 512, 'Programs per generation.', lower_bound=1
)
_MINUTES = flags.DEFINE_float(
  'minutes', 10, 'Time to search, over all runs in WORKDIR.', lower_bound=0
)
_GENERATIONS = flags.DEFINE_integer(
  'generations', None, 'Generations to search, instead of --minutes.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of all choices.', lower_bound=0)
_ISLANDS = flags.DEFINE_integer(
  'islands', 2, 'Processes, each with a search of its own.', lower_bound=1
)
_EXCHANGE = flags.DEFINE_integer(
  'exchange', 20, 'Generations between exchanges.', lower_bound=1
)
_WORKDIR = flags.DEFINE_string('workdir', 'evolve_out', 'Directory of results.')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0 under jax.distributed.'
)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'Processes of all hosts.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Number of this process.')
_ISLAND = flags.DEFINE_integer('island', 0, 'Number of this island.')
_PARENT = flags.DEFINE_integer(
  'parent', None, 'Process that started this island, which ends with it.'
)

_SAVE_SECONDS = 30.0
_REPORT_SECONDS = 1.0
_POLISHED = 3  # of each cost
_LOG = 'search log 1'


class UserError(Exception):
  """The command cannot be carried out; the message says what to do."""


def search_of_flags() -> evolve.Search:
  """The search that the flags describe."""
  target = targets.get(_TARGET.value)
  if _INTERVAL.value is not None:
    try:
      lo, hi = map(float, _INTERVAL.value)
    except ValueError as error:
      raise UserError(
        f'--interval={",".join(_INTERVAL.value)} must be two numbers LO,HI'
      ) from error
    target = dataclasses.replace(target, interval=(lo, hi))
  if _WEIGHT.value:
    target = dataclasses.replace(target, weight=_WEIGHT.value)
  return evolve.Search(
    target=target,
    ops=tuple(_OPS.value),
    rows=_ROWS.value,
    constants=_CONSTANTS.value,
    objective=_OBJECTIVE.value,
    bound=_BOUND.value,
    batch=_BATCH.value,
    select=_SELECT.value,
    pairs=_PAIRS.value,
    fit=_FIT.value,
    seed=_SEED.value,
  )


class Log:
  """The front over time, as CSV; what it says of time outlives a run.

  The file has a checksum: one that was edited is refused, one that was deleted
  starts the time anew.
  """

  def __init__(self, path: pathlib.Path, rows: int):
    self.path = path
    self.names = ['seconds', 'cpu_seconds', 'generation', 'fits']
    self.names += [f'error_{n}' for n in range(rows + 1)]
    self._lines: list[list[str]] = []
    before = cpu_before = 0.0
    if path.exists():
      remedy = 'delete it to go on with the search and count its time from 0'
      found = _results.read_csv(path, _LOG, remedy)
      self._lines = [list(line.values()) for line in found]
      before, cpu_before = map(float, self._lines[-1][:2])
    self._start = time.perf_counter() - before
    self._cpu_start = time.process_time() - cpu_before

  def elapsed(self) -> float:
    return time.perf_counter() - self._start

  def write(self, state: evolve.State) -> None:
    errors = [
      f'{archives.best_error(state.archive, n):.4e}'
      for n in range(len(self.names) - 4)
    ]
    self._lines.append(
      [
        f'{self.elapsed():.1f}',
        f'{time.process_time() - self._cpu_start:.1f}',
        str(state.generation),
        str(state.fits),
        *errors,
      ]
    )
    _results.write_csv(self.path, _LOG, self.names, self._lines)


def evolve_island(
  search: evolve.Search, workdir: pathlib.Path, island: int, shared: bool
) -> evolve.State:
  """Evolves one island until its budget is spent; saves and exchanges."""
  own = workdir / f'island_{island}'
  checkpoint = own / 'checkpoint.npz'
  if checkpoint.exists():
    state = evolve.load(checkpoint, search)
  else:
    state = evolve.init(search, island)
  log = Log(own / 'log.csv', search.rows)
  saved = reported = time.perf_counter()
  finished = False
  while not finished:
    if _GENERATIONS.value is not None:
      finished = state.generation >= _GENERATIONS.value
    else:
      finished = log.elapsed() >= 60 * _MINUTES.value
    if _PARENT.value not in (None, os.getppid()):
      raise UserError(f'island {island} ends: process {_PARENT.value} is gone')
    if not finished:
      state = evolve.step(search, state)
    if not finished and state.generation % _EXCHANGE.value == 0:
      state = islands.ring(search, state)
      if shared:
        state = islands.directory(search, state, workdir, island)
    now = time.perf_counter()
    if now - reported > _REPORT_SECONDS or finished:
      reported = now
      if island == 0:
        _progress(state, log, finished)
    if now - saved > _SAVE_SECONDS or finished:
      saved = now
      log.write(state)
      evolve.save(checkpoint, search, state)
  return state


def _progress(state, log, finished) -> None:
  front = archives.front(state.archive)[-6:]
  best = '  '.join(f'{e.cost:g}: {e.error:.2e}' for e in front)
  line = (
    f'{log.elapsed():6.0f} s  generation {state.generation}'
    f'  {state.fits:,} fits  {best}'
  )
  if sys.stdout.isatty():
    print(f'\r{line:<110}', end='\n' if finished else '', flush=True)
  elif finished:
    print(line, flush=True)


@contextlib.contextmanager
def started(count: int) -> Iterator[list[subprocess.Popen]]:
  """Islands 1 ... count - 1, as this script in processes of their own.

  None of them outlives the block, or this process if SIGTERM ends it. What they
  write is whole at any time, so they need no warning.
  """
  command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:]]
  command += [f'--parent={os.getpid()}']
  others: list[subprocess.Popen] = []

  def terminated(number, frame):
    for other in others:
      other.kill()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)

  previous = signal.signal(signal.SIGTERM, terminated)
  with contextlib.ExitStack() as stack:
    stack.callback(signal.signal, signal.SIGTERM, previous)
    for i in range(1, count):
      other = subprocess.Popen(
        [*command, f'--island={i}'], stdin=subprocess.DEVNULL
      )
      stack.callback(other.wait)
      stack.callback(other.kill)
      others.append(other)
    yield others


def merged(search, states) -> evolve.State:
  """The first island with all that was found, its front shrunk and squared."""
  state, *others = states
  for other in others:
    state = evolve.merge(search, state, archives.entries(other.archive))
  fits = sum(s.fits for s in states)
  state = state._replace(fits=fits)
  for _ in archives.front(state.archive):
    state = evolve.shrink(search, state)
  if search.objective == 'operations' and 'mul' in search.ops:
    state = evolve.append_squares(search, state)
  return state


def collect(search, state) -> list[dict]:
  """The hall of fame of all islands: the front, polished, by operations.

  Where errors are over the reals, the best few of every cost are polished: what
  was fitted in float64 to its last digits is in no order.
  """
  extra = targets.extra_operations(search.target)
  reals = search.objective == 'operations'
  costs = [[entry] for entry in archives.front(state.archive)]
  if reals:
    costs = [own[:_POLISHED] for own in state.archive.values()]
  hall: list[dict] = []
  for entries in costs:
    few = [(evolve.polished(search, e), e) for e in entries]
    (program, error), entry = min(few, key=lambda pair: pair[0][1])
    if reals and hall and error >= hall[-1]['error']:
      continue
    hall.append(
      {
        'operations': programs.operations(program) + extra,
        'cost': entry.cost,
        'error': error,
        'error_of_the_search': entry.error,
        'formula': str(program),
        'rows': [list(row) for row in program.rows],
        'constants': [
          np.format_float_scientific(c, unique=True) for c in program.constants
        ],
      }
    )
  return hall


def classical(search) -> dict[str, list[tuple[int, float]]]:
  """(operations, error) of minimax polynomials and rational functions.

  A polynomial of degree n takes n products and n sums by Horner's scheme.
  Rational functions as continued fractions take 3 m operations for R[m/m], one
  less for R[m-1/m], and two more for R[m+1/m].
  """
  target = search.target
  reference = _remembered(targets.core_reference(target))
  interval = targets.core_interval(target)
  weight = targets.core_weight(target)
  extra = targets.extra_operations(target)
  most = search.rows + extra
  families = {
    'polynomials': [(n, 0, 2 * n) for n in range(1, 12)],
    'rational functions': [
      (n + k, n, 3 * n + more)
      for n in range(1, 8)
      for k, more in ((-1, -1), (0, 0), (1, 2))
    ],
  }
  result = {}
  for name, members in families.items():
    points = []
    for m, n, cost in members:
      if cost + extra > most:
        continue
      start = polish.rational_start(m, n, reference, interval)
      try:
        fit = polish.minimax(
          polish.rational(m, n), reference, interval, start, weight=weight
        )
      except ValueError:  # the start has a pole
        continue
      points.append((cost + extra, fit.error))
    result[name] = points
  return result


def _remembered(reference):
  """The same function of arrays, evaluated once for each of them."""
  known = {}

  def call(x):
    key = x.tobytes()
    if key not in known:
      known[key] = reference(x)
    return known[key]

  return call


def write_results(search, workdir, state) -> None:
  """Writes the hall of fame and the plot, and prints the table."""
  hall = collect(search, state)
  reals = search.objective == 'operations'
  families = classical(search) if reals else {}
  content = {
    'target': search.target.name,
    'interval': search.target.interval,
    'weight': search.fitted_target.weight,
    'objective': search.objective,
    'seed': search.seed,
    'fits': state.fits,
    'programs': hall,
    'classical': families,
  }
  report.write_json(workdir / 'hall_of_fame.json', content)
  print(f'{"operations":>10}  {"error":>10}  {"classical":>10}  formula')
  for entry in hall:
    count, error = entry['operations'], entry['error']
    known = [e for own in families.values() for n, e in own if n <= count]
    best = f'{min(known):.3e}' if known else ''
    print(f'{count:>10}  {error:>10.3e}  {best:>10}  {entry["formula"]}')
  if not report.can_plot():
    print('no plot, because matplotlib is not installed')
  elif reals:
    plot(search, workdir / 'pareto.png', hall, families)
  if not reals:
    race(search, workdir, state)
  print(f'saved {workdir / "hall_of_fame.json"}')


def plot(search, path, hall, families) -> None:
  """Error against operations, ours and the classical ones."""
  figure = report.new_figure(7, 4.5)
  axes = figure.add_subplot()
  for (name, points), marker in zip(families.items(), 'os', strict=True):
    if points:
      axes.plot(*zip(*points, strict=True), marker=marker, ls='', label=name)
  axes.step(
    [e['operations'] for e in hall],
    [e['error'] for e in hall],
    where='post',
    color='black',
    marker='.',
    label='found',
  )
  lo, hi = search.target.interval
  axes.set(
    yscale='log',
    xlabel='operations',
    ylabel=f'largest error ({search.target.weight})',
    title=f'{search.target.name} on [{lo:.4g}, {hi:.4g}]',
  )
  axes.grid(alpha=0.3)
  axes.legend()
  report.write_figure(path, figure)


def race(search, workdir, state) -> None:
  """Prints what the fastest programs within the bound win over XLA.

  The fastest is also compared with `lowbit_jax.special`, where it has the
  function, and written with its certificate.
  """
  target = search.target
  if target.name == 'gelu':
    base = functools.partial(jax.nn.gelu, approximate=False)
  else:
    modules = (jax.numpy, jax.nn, jax.lax)
    have = [m for m in modules if hasattr(m, target.name)]
    if not have:
      print(f'no race: JAX has no {target.name}')
      return
    base = getattr(have[0], target.name)
  if not targets.is_wrappable(target):
    target = dataclasses.replace(target, wrapper=None)
  reference = targets.reference(target)
  interval = tuple(map(float, target.interval))
  finalists = speed.finalists(
    target, state.archive, base, reference, interval, bound=search.bound
  )
  for finalist in finalists:
    comparison = finalist.comparison
    print(
      f'{finalist.max_ulp:.3f} ULP, {comparison.speedup:.2f} x the speed of'
      f' XLA{"" if comparison.faster else " (not certain)"}:'
      f' {finalist.program}'
    )
  if not finalists:
    print(f'no program is within {search.bound:g} ULP once compiled')
    return
  fastest = finalists[0].program
  if target.name in special.MAX_ULP:
    ours = getattr(special, target.name)
    comparison = timing.compare(emit.function(fastest, target), ours, interval)
    print(
      f'the first has {comparison.speedup:.2f} x the speed of'
      f' lowbit_jax.special.{target.name}, which is within'
      f' {special.MAX_ULP[target.name]:g} ULP'
    )
  publish(search, workdir, target, fastest)


def publish(search, workdir, target, program) -> None:
  """Certifies a program and writes its certificate and its source."""
  name = target.name
  emit.check(program, target)
  certificate = certify.certify(
    emit.function(program, target),
    name=name,
    reference=targets.reference(target),
    exact=target.exact,
    interval=target.interval,
    provenance=certify.Provenance(
      command=shlex.join(['python', *sys.argv]), seed=search.seed
    ),
    tier='2^16',
    bound=search.bound,
    program=program,
  )
  for suffix, text in (
    ('json', certificate.to_json()),
    ('py', emit.python(program, target, certificate)),
    ('c', emit.c99(program, target)),
  ):
    path = workdir / f'{name}.{suffix}'
    report.write_atomically(path, text.encode())
    print(f'saved {path}')


def work() -> None:
  workdir = pathlib.Path(_WORKDIR.value)
  search = search_of_flags()
  island, count = _ISLAND.value, _ISLANDS.value
  if _COORDINATOR.value:
    if _GENERATIONS.value is None:
      raise UserError(
        '--coordinator needs --generations: all islands of a ring must do'
        ' the same number'
      )
    jax.distributed.initialize(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
    island, count = jax.process_index(), jax.process_count()
  alone = bool(island or _COORDINATOR.value)
  shared = count > 1 and not _COORDINATOR.value
  with (
    command.own_directory(workdir / f'island_{island}'),
    started(1 if alone else count) as others,
  ):
    state = evolve_island(search, workdir, island, shared)
    for number, other in enumerate(others, 1):
      if other.wait():
        raise UserError(f'island {number} failed; see above')
    if island == 0:
      paths = [workdir / f'island_{i}' / 'checkpoint.npz' for i in range(count)]
      states = [state, *(evolve.load(path, search) for path in paths[1:])]
      write_results(search, workdir, merged(search, states))


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (UserError, ValueError, ImportError))


if __name__ == '__main__':
  app.run(main)
