"""Text for the byte-level model: the standard library of this interpreter.

A batch is a pure function of (seed, step), so a resumed run sees the same data
as an uninterrupted one.
"""

import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from models import byte_lm


class Corpus(NamedTuple):
  """Training and held-out bytes (uint8 vectors) and what identifies them."""

  train: np.ndarray
  held_out: np.ndarray
  files: int
  digest: str


def load_corpus() -> Corpus:
  """Reads the `.py` files of the running interpreter's standard library.

  Files are sorted by path; each 20th (index % 20 == 7) is held out.

  Returns:
    The corpus; its digest covers both parts.

  Raises:
    FileNotFoundError: if the interpreter ships too little source text.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'site-packages', 'dist-packages'}
  paths = sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob('*.py')
    if skipped.isdisjoint(path.relative_to(root).parts) and path.is_file()
  )
  parts = {False: [], True: []}
  for index, path in enumerate(paths):
    parts[index % 20 == 7].append((root / path).read_bytes())
  train, held_out = b''.join(parts[False]), b''.join(parts[True])
  if min(len(train), len(held_out)) < 1 << 16:
    raise FileNotFoundError(
      f'Only {len(paths)} source files of the standard library were found; '
      'run with a Python that ships its library as .py files.'
    )
  digest = hashlib.sha256(
    hashlib.sha256(train).digest() + hashlib.sha256(held_out).digest()
  ).hexdigest()[:16]
  return Corpus(
    np.frombuffer(train, np.uint8),
    np.frombuffer(held_out, np.uint8),
    len(paths),
    digest,
  )


def _windows(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
  return data[starts[:, None] + np.arange(length)].astype(np.int32)


def _last(data: np.ndarray, context: int) -> int:
  """Where the last window of `context` + 1 bytes starts."""
  if len(data) <= context:
    raise byte_lm.ConfigError(
      f'context={context} must be less than the {len(data)} bytes of the text.'
    )
  return len(data) - context - 1


def train_batch(
  corpus: Corpus, config: byte_lm.Config, step: int
) -> np.ndarray:
  """Returns the int32 (batch, context + 1) windows of a step."""
  rng = np.random.Generator(np.random.Philox(key=[config.seed, step]))
  last = _last(corpus.train, config.context)
  starts = rng.integers(0, last, config.batch, endpoint=True)
  return _windows(corpus.train, starts, config.context + 1)


def held_out_windows(corpus: Corpus, context: int, count: int) -> np.ndarray:
  """Returns int32 (count, context + 1) windows spread evenly over the text."""
  last = _last(corpus.held_out, context)
  starts = np.linspace(0, last, count).astype(np.int64)
  return _windows(corpus.held_out, starts, context + 1)
