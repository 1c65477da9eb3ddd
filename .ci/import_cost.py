"""Prints what `import lowbit_jax` costs over `import jax`, in CPU seconds.

  python .ci/import_cost.py FOLDER

Fails if lowbit_jax or lowbit_pallas is not imported from FOLDER, or if the cost
is more than three times the goal.
"""

import pathlib
import subprocess
import sys

_GOAL = 0.15
_REPEATS = 5
_PROGRAM = 'import time, {}; print(time.process_time())'


def cpu_seconds(module: str) -> float:
  """The fastest of several fresh interpreters that import a module."""
  command = [sys.executable, '-c', _PROGRAM.format(module)]
  return min(
    float(subprocess.run(command, stdout=-1, text=True, check=True).stdout)
    for _ in range(_REPEATS)
  )


def main(folder: pathlib.Path) -> None:
  import lowbit_jax
  import lowbit_pallas

  for package in (lowbit_jax, lowbit_pallas):
    file = pathlib.Path(package.__file__ or '').resolve()
    print(f'{package.__name__} comes from {file.relative_to(folder)}')
  base = cpu_seconds('jax')
  cost = cpu_seconds('lowbit_jax') - base
  print(f'import jax {base:.2f} s, lowbit_jax +{cost:.3f} s (goal {_GOAL} s)')
  if cost > 3 * _GOAL:
    raise SystemExit('import lowbit_jax has become slow')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).resolve())
