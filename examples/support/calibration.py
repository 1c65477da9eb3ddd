"""What methods calibrate a model with: a text, or sentences."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from support import blocks, quality
from support.blocks import Blocks
from support.language_models import LanguageModel
from support.sentence_models import SentenceModel

_DATA = pathlib.Path(__file__).parents[1] / 'data'
_TEXT = _DATA / 'sherlock_holmes.txt'
_SENTENCES = _DATA / 'sentences_calibration.txt'
_WINDOWS = 8


class Calibration(NamedTuple):
  """A model with what it is calibrated with.

  Attributes:
    blocks: `blocks(model, spec)` gives those of the model in float, by the spec
      of the inputs of their layers.
    digest: of the tokens.
  """

  blocks: Callable[..., Blocks]
  digest: str


def of_file(
  found: LanguageModel | SentenceModel,
  path: pathlib.Path | None,
  count: int | None,
) -> Calibration:
  """A model with windows of a file.

  Args:
    found: the model.
    path: a text, or for a model of sentences one on each line; None for ours.
    count: windows, of 1024 tokens or of as many as the model sees. A text must
      have as many; of sentences there may be fewer. None for 8 of a text, and
      for all sentences.

  Raises:
    ValueError: for a file that is not UTF-8, or too short.
  """
  if isinstance(found, SentenceModel):
    packed = found.packed(sentences(path or _SENTENCES), count)
    make, tokens = functools.partial(blocks.of_bert, packed=packed), packed
  else:
    tokens = windows(found, path or _TEXT, count or _WINDOWS)
    make = functools.partial(blocks.of_llama, tokens=tokens)
  return Calibration(make, digest(np.asarray(tokens)))


def windows(found: LanguageModel, path: pathlib.Path, count: int) -> np.ndarray:
  """Tokens (count, length) of a text.

  Raises:
    ValueError: for a file that is not UTF-8, or too short.
  """
  tokens = found.tokenizer.encode(read(path))
  return quality.windows(tokens, count, found.config.context)


def sentences(path: pathlib.Path) -> list[str]:
  """The lines of a file that are not empty.

  Raises:
    ValueError: if there are none, or it is not UTF-8.
  """
  lines = [line for line in read(path).splitlines() if line.strip()]
  if not lines:
    raise ValueError(f'{str(path)!r} has no sentence')
  return lines


def read(path: pathlib.Path) -> str:
  """The text of a file.

  Raises:
    ValueError: if it is not UTF-8.
  """
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{str(path)!r} is not UTF-8 text: {error}') from error


def digest(data: bytes | np.ndarray) -> str:
  """What tells data apart from others."""
  return hashlib.sha256(data).hexdigest()[:16]
