"""Kernels on a GPU: are they right, how fast are they, with which tiles.

Needs JAX with CUDA, Flax and NumPy and nothing else. From a bare checkout:

  PYTHONPATH=.:pallas python benchmarks/gpu.py --out gpu_out
  PYTHONPATH=.:pallas python benchmarks/gpu.py --out gpu_out --only weights
  PYTHONPATH=.:pallas python benchmarks/gpu.py --out gpu_out --cpu

Checks come first, for all kernels; then times against XLA's best; then sizes of
tiles; each in the order of importance, until --seconds are over. Nothing that
fails stops the rest: cases run in worker processes, each result is on disk
before the next case starts, and a worker that crashes or is silent for too long
is replaced by one that goes on behind the case. This process imports no JAX.

Into the folder --out go `results.jsonl` with every fact, `summary.md`,
`log.txt`, and tables of tile sizes that are ready for
`cp -r gpu_out/*/ pallas/lowbit_pallas/`. `--cpu` runs all cases in miniature on
XLA's CPU implementations and plants a crash, a hang and a wrong result: a test
of this script, not of kernels. On a machine with several GPUs let it see one:
CUDA_VISIBLE_DEVICES=0.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import _gpu_plan
import _gpu_report

_WORKER = pathlib.Path(__file__).with_name('_gpu_worker.py')
_TOGETHER = {'env': 1, 'check': 8, 'time': 1, 'tune': 1}  # workers at once


class Patience(NamedTuple):
  """Seconds of silence after which a worker counts as hung."""

  first: float = 75  # until its first result: JAX starts, CUDA too
  later: float = 40


class Job:
  """A worker process on the cases of one family, and what it said."""

  def __init__(self, command: list[str], part: pathlib.Path, log, env: dict):
    self.part = part
    self.lines: list[dict[str, Any]] = []
    self.heard = time.monotonic()
    self.process = subprocess.Popen(
      command, env=env, stdout=log, stderr=log, start_new_session=True
    )

  def listen(self) -> list[dict[str, Any]]:
    """New facts."""
    text = self.part.read_text() if self.part.exists() else ''
    whole = text[: text.rfind('\n') + 1].splitlines()
    new = [json.loads(line) for line in whole[len(self.lines) :]]
    if new:
      self.lines += new
      self.heard = time.monotonic()
    return new

  def silence(self) -> float:
    return time.monotonic() - self.heard

  def named(self, event: str) -> list[str]:
    return [x['case'] for x in self.lines if x['event'] == event]

  def kill(self) -> None:
    try:
      os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait(20)
    except (ProcessLookupError, subprocess.TimeoutExpired):
      pass  # a kernel without end can hold its process for a while


class Driver:
  """Runs stages of cases and keeps their results."""

  def __init__(
    self,
    out: pathlib.Path,
    seconds: float,
    *,
    cpu: bool = False,
    patience: Patience | None = None,
  ):
    out.mkdir(parents=True, exist_ok=True)
    self.out, self.cpu = out, cpu
    self.patience = patience or Patience()
    self.end = time.monotonic() + seconds
    self.facts: list[dict[str, Any]] = []
    self._results = open(out / 'results.jsonl', 'w', encoding='utf-8')
    self._log = open(out / 'log.txt', 'wb')
    self._parts = tempfile.TemporaryDirectory(prefix='gpu_')

  def close(self) -> None:
    self._results.close()
    self._log.close()
    self._parts.cleanup()

  def keep(self, **fact) -> None:
    """Adds a fact, on disk before this returns."""
    self.facts.append(fact)
    self._results.write(json.dumps(fact) + '\n')
    self._results.flush()
    os.fsync(self._results.fileno())
    if fact['event'] == 'end' and not fact['ok']:
      text = str(fact.get('error', fact))[:300]
      print(f'WRONG {fact["stage"]} {fact["case"]}: {text}', flush=True)

  def run(self, stage: str, families: dict[str, list]) -> None:
    """Runs the families of a stage, as many at once as the stage allows."""
    todo = {name: list(cases) for name, cases in families.items() if cases}
    jobs: dict[str, Job] = {}
    while (todo or jobs) and time.monotonic() < self.end:
      for family in list(todo):
        if len(jobs) < _TOGETHER[stage] and family not in jobs:
          jobs[family] = self._start(stage, family, todo[family])
      time.sleep(0.1)
      for family, job in list(jobs.items()):
        if self._is_over(job):
          del jobs[family]
          todo[family] = self._rest(stage, family, job, todo[family])
          if not todo[family]:
            del todo[family]
    for job in jobs.values():
      job.kill()
      for fact in job.listen():
        self.keep(**fact)
    for family, cases in todo.items():
      done = jobs[family].named('end') if family in jobs else []
      for name, _ in cases:
        if name not in done:
          self.keep(event='skipped', stage=stage, family=family, case=name)

  def _start(self, stage: str, family: str, cases: list) -> Job:
    part = pathlib.Path(self._parts.name) / f'{stage}_{family}.jsonl'
    part.unlink(missing_ok=True)
    task = dict(
      stage=stage, family=family, cases=cases, part=str(part), cpu=self.cpu
    )
    env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    if self.cpu:
      env['JAX_PLATFORMS'] = 'cpu'
    command = [sys.executable, '-u', str(_WORKER), json.dumps(task)]
    return Job(command, part, self._log, env)

  def _is_over(self, job: Job) -> bool:
    """Takes what a worker said; whether it ended or had to be ended."""
    ended = job.process.poll() is not None  # before its last words are read
    for fact in job.listen():
      self.keep(**fact)
    if not ended:
      patience = (
        self.patience.later if job.named('end') else self.patience.first
      )
      if job.silence() < patience:
        return False
      job.kill()
    return True

  def _rest(self, stage: str, family: str, job: Job, cases: list) -> list:
    """Cases that a worker which is over has left, its last one marked."""
    done, begun = job.named('end'), job.named('start')
    code = job.process.returncode
    why = f'exit code {code}'
    if code in (None, -signal.SIGKILL):
      why = f'silent for {job.silence():.0f} s, killed'
    lost = [name for name in begun if name not in done]
    if not begun:  # it would not start again either
      lost = [name for name, _ in cases]
      why = f'the worker did not start: {why}, see log.txt'
    for name in lost:
      self.keep(
        event='end', stage=stage, family=family, case=name, ok=False, error=why
      )
    return [case for case in cases if case[0] not in {*done, *lost}]

  def wrong(self) -> set[str]:
    """Operations of which no check was right."""
    right = {True: set(), False: set()}
    for x in self.facts:
      if x['event'] == 'end' and x['stage'] == 'check':
        right[bool(x['ok'])].add(x['family'].split('.')[0])
    return right[False] - right[True]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default='gpu_out')
  parser.add_argument('--seconds', type=float, default=500)
  parser.add_argument('--only', default='', help='operations, by commas')
  parser.add_argument('--stages', default='check,time,tune')
  parser.add_argument('--cpu', action='store_true')
  options = parser.parse_args()
  patience = Patience(60, 10) if options.cpu else Patience()
  driver = Driver(
    options.out, options.seconds, cpu=options.cpu, patience=patience
  )
  only = set(filter(None, options.only.split(',')))
  for stage in ('env', *options.stages.split(',')):
    families = {
      family: cases
      for family, cases in _gpu_plan.families(stage, options.cpu).items()
      if stage == 'env' or not only or family.split('.')[0] in only
    }
    if stage in ('time', 'tune'):  # what is wrong is not timed
      for family in driver.wrong() & set(families):
        del families[family]
    driver.run(stage, families)
    text = _gpu_report.write(driver.facts, options.out)
  driver.close()
  print(text)


if __name__ == '__main__':
  main()
