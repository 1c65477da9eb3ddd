"""Python programs in processes of their own, so that a crash is a result."""

import os
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEVICES = r'--xla_force_host_platform_device_count=\d+'


def run(
  program: str, cores: int | None = None, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
  """Runs a program with one device.

  Args:
    program: in Python.
    cores: how many of the cores here it may use, None for all. XLA has as many
      threads.
    timeout: seconds, after which it is said to hang.
    **environment: variables, beside those here.
  """
  if cores is not None:
    some = sorted(os.sched_getaffinity(0))[:cores]
    program = f'import os; os.sched_setaffinity(0, {some})\n{program}'
  variables = os.environ | {'JAX_PLATFORMS': 'cpu'}
  flags = variables.get('XLA_FLAGS', '')
  variables['XLA_FLAGS'] = re.sub(_DEVICES, '', flags).strip()
  variables['PYTHONPATH'] = os.pathsep.join([str(_ROOT), str(_ROOT / 'pallas')])
  return subprocess.run(
    [sys.executable, '-c', program],
    cwd=_ROOT,
    env=variables | environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def output(program: str, cores: int | None = None, **environment: str) -> str:
  """What a program prints that must end well."""
  done = run(program, cores, **environment)
  if done.returncode:
    raise AssertionError(f'{done.returncode=}\n{done.stdout}\n{done.stderr}')
  return done.stdout
