"""Ratios of running times in one process.

A candidate and its base run alternately, so that drift of the machine hits both
alike; medians of process CPU seconds over all threads and of wall seconds are
compared. Results are waited for, and the first two calls are not counted.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata

import jax

from lowbit_jax.search import timing


@dataclasses.dataclass(frozen=True)
class Ratio:
  """A candidate relative to its base."""

  name: str
  cpu: float
  wall: float
  milliseconds: float


def compare(
  base: Callable, candidates: dict[str, Callable], *, rounds: int = 15
) -> list[Ratio]:
  """Times thunks against `base`, interleaved."""
  thunks = {'base': base, **candidates}
  for thunk in thunks.values():
    for _ in range(2):
      jax.block_until_ready(thunk())
  cpu = {name: [] for name in thunks}
  wall = {name: [] for name in thunks}
  for _ in range(rounds):
    for name, thunk in thunks.items():
      c, w = time.process_time(), time.perf_counter()
      jax.block_until_ready(thunk())
      cpu[name].append(time.process_time() - c)
      wall[name].append(time.perf_counter() - w)
  cpu = {name: statistics.median(v) for name, v in cpu.items()}
  wall = {name: statistics.median(v) for name, v in wall.items()}
  return [
    Ratio(
      name,
      cpu[name] / cpu['base'],
      wall[name] / wall['base'],
      wall[name] * 1e3,
    )
    for name in thunks
  ]


def speed(comparison: timing.Comparison) -> str:
  """Speed over the base, with the widest quartiles of the runs."""
  lower = min(r.quartiles[0] for r in comparison.repeats)
  upper = max(r.quartiles[1] for r in comparison.repeats)
  return f'{comparison.speedup:.2f} [{lower:.2f}, {upper:.2f}]'


def machine() -> str:
  """Processor, cores, load, and the versions that matter."""
  model = platform.processor() or platform.machine()
  try:
    with open('/proc/cpuinfo') as f:
      model = next(
        line.split(':')[1].strip()
        for line in f
        if line.startswith('model name')
      )
  except (OSError, StopIteration):
    pass
  versions = ', '.join(
    f'{p} {v}'
    for p in ('jax', 'jaxlib', 'qwix', 'torch', 'torchao')
    if (v := _version(p))
  )
  load = f'{os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else 'unknown'
  return (
    f'{model}, {os.cpu_count()} cores, load {load},'
    f' Python {platform.python_version()}, {versions},'
    f' {time.strftime("%Y-%m-%d")}'
  )


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
  """A Markdown table with aligned columns."""
  widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

  def line(row):
    cells = (c.ljust(w) for c, w in zip(row, widths, strict=True))
    return '| ' + ' | '.join(cells) + ' |'

  rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
  return '\n'.join([f'### {title}', '', line(header), rule, *map(line, rows)])
