"""Files of results that are checked before anything in them is trusted.

Each has one mark, `lowbit_jax KIND sha256=DIGEST`: in JSON the first value, in
CSV the last cell of the header, in NPZ the comment of the archive. Whatever
opens JSON, CSV or NPZ opens these files too. The digest is that of all other
bytes and is compared before anything is parsed, so a file that was cut, changed
or edited, also by a spreadsheet that saves it, is refused and never half
understood. A kind ends in its version, such as 'run 1'.

A file appears complete or not at all. Writers of one directory exclude each
other by `lock`.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowbit_jax import _files
from lowbit_jax._typing import PathLike

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

_MARK = rb'lowbit_jax ([a-z ]+\d+) sha256=([0-9a-f]{64})'
_JSON_START = b'{\n  "seal": "'
_JSON = re.compile(rb'\A' + re.escape(_JSON_START) + _MARK + rb'",\n')
_CSV = re.compile(rb'\A[^\n]*,' + _MARK + rb'\n')
_NPZ = re.compile(_MARK + rb'\Z')
LOCK = '.lock'


def write_json(path: PathLike, kind: str, content: Mapping[str, Any]) -> None:
  """Replaces a file by a dict of JSON values, at least one."""
  text = json.dumps(content, indent=2) + '\n'
  _write(path, kind, _JSON_START, b'",\n' + text.removeprefix('{\n').encode())


def read_json(path: PathLike, kind: str, remedy: str) -> dict[str, Any]:
  """The dict that `write_json` wrote.

  Args:
    path: of the file.
    kind: as it was written.
    remedy: what the user can do about a damaged file.

  Raises:
    DamagedFileError: if the file is not what was written, or of another kind.
    OSError: if it cannot be read.
  """
  content = json.loads(_read(path, kind, _JSON, remedy))
  del content['seal']
  return content


def write_csv(
  path: PathLike, kind: str, names: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
  """Replaces a file by a table; floats keep all digits, None is empty."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerows([*row, None] for row in rows)
  before = (','.join(names) + ',').encode()
  _write(path, kind, before, b'\n' + text.getvalue().encode())


def read_csv(path: PathLike, kind: str, remedy: str) -> list[dict[str, str]]:
  """The rows that `write_csv` wrote, by name; errors as of `read_json`."""
  text = _read(path, kind, _CSV, remedy).decode()
  (*names, _), *rows = csv.reader(io.StringIO(text, newline=''))
  return [dict(zip(names, row[:-1], strict=True)) for row in rows]


def write_npz(
  path: PathLike, kind: str, arrays: Mapping[str, np.ndarray]
) -> None:
  """Replaces a file by arrays."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
  with zipfile.ZipFile(buffer, 'a') as archive:
    archive.comment = _mark(kind) + bytes(64)  # of the length of the true one
  _write(path, kind, buffer.getvalue().removesuffix(archive.comment), b'')


def read_npz(path: PathLike, kind: str, remedy: str) -> dict[str, np.ndarray]:
  """The arrays that `write_npz` wrote; errors as of `read_json`."""
  data = io.BytesIO(_read(path, kind, _NPZ, remedy))
  with np.load(data, allow_pickle=False) as file:
    return dict(file)


def _mark(kind: str) -> bytes:
  return f'lowbit_jax {kind} sha256='.encode()


def _write(path, kind, before, after) -> None:
  before += _mark(kind)
  digest = hashlib.sha256(before + after).hexdigest().encode()
  with _files.replacing(path) as file:
    file.write(before + digest + after)


def _read(path, kind, pattern, remedy) -> bytes:
  """All bytes of a file, whose kind and digest are right."""
  if not stat.S_ISREG(os.stat(path).st_mode):  # A pipe would wait for ever.
    raise _files.DamagedFileError(path, 'it is not a regular file', remedy)
  with open(path, 'rb') as file:
    data = file.read()
  mark = pattern.search(data)
  if mark is None:
    raise _files.DamagedFileError(path, 'it has no checksum', remedy)
  found = mark[1].decode()
  if found != kind:
    fault = f'it holds {found!r} and not {kind!r}'
    raise _files.DamagedFileError(path, fault, remedy)
  start, end = mark.span(2)
  if hashlib.sha256(data[:start] + data[end:]).hexdigest().encode() != mark[2]:
    raise _files.DamagedFileError(path, 'it was changed', remedy)
  return data


def is_left_over(name: str) -> bool:
  """Whether a file is one that a killed writer leaves behind, by its name."""
  return name == LOCK or name.endswith('.partial')


@contextlib.contextmanager
def lock(directory: PathLike, remedy: str) -> Iterator[None]:
  """Keeps other processes that `lock` this directory out of it.

  The system frees the lock of a process that dies. Where it has none of these
  locks, on Windows, nothing is locked.

  Args:
    directory: which exists.
    remedy: what the user can do while another process has it.

  Raises:
    BlockingIOError: if another process has it, with its number.
  """
  if fcntl is None:
    yield
    return
  path = os.path.join(directory, LOCK)
  handle = None
  while handle is None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.read(handle, 20).decode() or 'that just started'
      os.close(handle)
      raise BlockingIOError(
        f'{os.fspath(directory)!r} is in use by process {holder}; {remedy}'
      ) from None
    if not _is_open(handle, path):  # Its last holder removed it meanwhile.
      os.close(handle)
      handle = None
  try:
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    yield
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    os.close(handle)


def _is_open(handle: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(handle), os.stat(path))
  except FileNotFoundError:
    return False
