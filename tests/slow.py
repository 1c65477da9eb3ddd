"""Runs the slow tests file by file, and goes on where it was interrupted.

  python tests/slow.py                    all of them, several hours
  python tests/slow.py tests/ops          those of some files and folders

A file whose slow tests have passed is noted in `.slow_tests.json` and not run
again until the commit changes. Arguments that begin with a dash go to pytest.
"""

import json
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NOTES = _ROOT / '.slow_tests.json'
_NO_TESTS = 5  # exit code of pytest


def commit() -> str:
  """The commit that is checked out, empty outside of git."""
  done = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=_ROOT, capture_output=True, text=True
  )
  return done.stdout.strip()


def passed() -> list[str]:
  """Files that have passed at this commit."""
  try:
    notes = json.loads(_NOTES.read_text('utf-8'))
    return notes['passed'] if notes['commit'] == commit() else []
  except (FileNotFoundError, ValueError, KeyError):
    return []


def note(files: list[str]) -> None:
  temporary = _NOTES.with_suffix('.tmp')
  temporary.write_text(json.dumps({'commit': commit(), 'passed': files}))
  os.replace(temporary, _NOTES)


def slow_files(places: list[str]) -> list[str]:
  """Files with slow tests in these files and folders."""
  found = set()
  for place in map(pathlib.Path, places):
    place = _ROOT / place
    found |= {place} if place.is_file() else set(place.rglob('*_test.py'))
  return sorted(
    path.relative_to(_ROOT).as_posix()
    for path in found
    if 'pytest.mark.slow' in path.read_text('utf-8')
  )


def main(arguments: list[str]) -> None:
  options = [a for a in arguments if a.startswith('-')]
  places = [a for a in arguments if not a.startswith('-')] or ['tests']
  done, failed = passed(), []
  for file in slow_files(places):
    if file in done:
      print(f'{file}: passed before')
      continue
    print(f'{file}:', flush=True)
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'slow', file]
    code = subprocess.run([*command, *options], cwd=_ROOT).returncode
    if code in (0, _NO_TESTS):
      done.append(file)
      note(done)
    else:
      failed.append(file)
  if failed:
    raise SystemExit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
  main(sys.argv[1:])
