"""Models that make an embedding of a sentence, from the folders they come in.

A folder of sentence-transformers, or a plain one of Hugging Face: config.json,
the weights as safetensors, tokenizer.json; and what says how states of tokens
become one embedding.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from lowbit_jax.io import gguf, safetensors
from lowbit_jax.io._checkpoint import Checkpoint
from models import bert, bert_config, bert_names
from support import weights

_SHORTEST = 16  # tokens that sentences are padded to at least


class FolderError(ValueError):
  """A folder that makes no model of sentences; the message says why."""


class Packed(NamedTuple):
  """Sentences one behind the other in windows, all of (windows, length) int32.

  Attributes:
    tokens: of the sentences.
    places: of the tokens in their sentences.
    sentences: of the tokens, by number.
  """

  tokens: np.ndarray
  places: np.ndarray
  sentences: np.ndarray


@dataclasses.dataclass(frozen=True)
class SentenceModel:
  """A model, its configuration, and the tokenizer that makes its tokens.

  Attributes:
    model: maps tokens to embeddings.
    config: of the model.
    tokenizer: of the package `tokenizers`; it cuts what is too long.
    block: where the checkpoint has the parameters of a block.
  """

  model: bert.Bert
  config: bert_config.Config
  tokenizer: Any
  block: weights.Table

  def embed(self, sentences: Sequence[str], batch: int = 32) -> np.ndarray:
    """Embeddings (sentences, width) in float32.

    Sentences of similar lengths are padded to a power of two of tokens
    together, so that few programs are compiled, one for each length.

    Args:
      sentences: of any lengths; the tokenizer cuts them.
      batch: how many go through the model at a time.
    """
    if isinstance(sentences, str) or batch < 1:
      raise ValueError(
        f'{sentences=!r:.80} must be a sequence of strings, and {batch=} at'
        ' least 1'
      )
    rows = [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]
    lengths = [_padded(len(row), self.config.context) for row in rows]
    embeddings = np.zeros((len(rows), self.config.width), np.float32)
    graph, state = nnx.split(self.model)
    for length in sorted(set(lengths)):
      same = [k for k in range(len(rows)) if lengths[k] == length]
      for first in range(0, len(same), batch):
        chosen = same[first : first + batch]
        tokens = np.zeros((min(batch, len(rows)), length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, k in enumerate(chosen):
          tokens[row, : len(rows[k])] = rows[k]
          mask[row, : len(rows[k])] = True
        made = _embeddings(graph, state, tokens, mask)
        embeddings[chosen] = made[: len(chosen)]
    return embeddings

  def packed(
    self, sentences: Sequence[str], count: int | None = None
  ) -> Packed:
    """Sentences without padding, to calibrate with.

    Args:
      sentences: of any lengths; the tokenizer cuts them, and a window ends
        where it is full.
      count: windows at most, None for all that are full, of as many tokens as
        the model sees, or of all tokens where there are fewer.
    """
    rows = [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]
    if not (total := sum(map(len, rows))):
      raise ValueError(f'{sentences=!r:.80} has no token')
    length = min(total, self.config.context)
    count = min(count or total, total // length)
    numbers = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    places = np.concatenate([np.arange(len(row)) for row in rows])
    return Packed(
      *(
        x[: count * length].reshape(count, length).astype(np.int32)
        for x in (np.concatenate(rows), places, numbers)
      )
    )


@functools.partial(jax.jit, static_argnums=0)
def _embeddings(graph, state, tokens, mask):
  return nnx.merge(graph, state).embeddings(tokens, mask)


def _padded(length: int, context: int) -> int:
  """The power of two that so many tokens are padded to, or all the context."""
  return min(max(_SHORTEST, 1 << (length - 1).bit_length()), context)


def mean_cosine(a: ArrayLike, b: ArrayLike) -> float:
  """The mean cosine between rows of a and b (rows, width), in float64.

  Raises:
    ValueError: for other shapes than those of two equal matrices.
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  if a.shape != b.shape or a.ndim != 2 or not a.size:
    raise ValueError(
      f'{a.shape=} and {b.shape=} must be the same (rows, width)'
    )
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return float(np.mean((a * b).sum(axis=1) / lengths))


def load(
  path: str | os.PathLike[str], *, mesh: Mesh | None = None
) -> SentenceModel:
  """A model and its tokenizer, packed where its weights are.

  Args:
    path: a folder, or a GGUF file beside which the tokenizer.json of the model
      lies. What a GGUF file embeds has the length that pooling gives it.
    mesh: devices with an axis 'model' to split the model over, None for the
      default device.

  Raises:
    FolderError: for a file that is not there or cannot be used.
    models.bert_config.ConfigError: for a configuration of another family.
    support.weights.CheckpointMismatch: for a tensor that is not there or has
      another shape than the configuration says.
    ImportError: without the package `tokenizers`.
  """
  if mesh is not None and 'model' not in mesh.axis_names:
    raise ValueError(f"{mesh.axis_names=} must have an axis 'model'")
  path = pathlib.Path(path)
  if path.is_file():
    with gguf.open(path) as checkpoint:
      with _naming(path):
        config = bert_config.from_gguf(checkpoint)
      tables = bert_names.gguf()
      model = _model(config, checkpoint, tables, bert_names.GGUF_HARMLESS, mesh)
    tokenizer = _tokenizer(path.parent, config)
    return SentenceModel(model, config, tokenizer, tables[1])
  folder, pooling, normalized = _modules(path)
  values = _json(folder / 'config.json')
  with _naming(folder / 'config.json'):
    config = bert_config.from_huggingface(values)
  config = dataclasses.replace(config, pooling=pooling, normalized=normalized)
  tokenizer = _tokenizer(folder, config)
  with safetensors.open(folder) as checkpoint:
    tables = bert_names.huggingface(config, checkpoint)
    harmless = bert_names.harmless(checkpoint)
    model = _model(config, checkpoint, tables, harmless, mesh)
  return SentenceModel(model, config, tokenizer, tables[1])


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Errors of a configuration with the file that has it."""
  try:
    yield
  except bert_config.ConfigError as error:
    raise bert_config.ConfigError(f'{str(path)!r}: {error}') from error


def _model(
  config: bert_config.Config,
  checkpoint: Checkpoint,
  tables: tuple[weights.Table, weights.Table],
  harmless: re.Pattern[str],
  mesh: Mesh | None,
) -> bert.Bert:
  whole, block = tables
  sizes = weights.stacks(checkpoint, block, config.blocks)
  return weights.load(
    lambda: bert.Bert(config, sizes, rngs=nnx.Rngs(0)),
    checkpoint,
    whole,
    block,
    sizes,
    harmless=harmless.fullmatch,
    mesh=mesh,
    specs=bert_names.SPECS,
  )


# Kinds of pooling of sentence-transformers by the keys of older releases.
_KINDS = {
  'pooling_mode_cls_token': 'cls',
  'pooling_mode_mean_tokens': 'mean',
  'pooling_mode_max_tokens': 'max',
  'pooling_mode_mean_sqrt_len_tokens': 'mean_sqrt_len_tokens',
  'pooling_mode_weightedmean_tokens': 'weightedmean',
  'pooling_mode_lasttoken': 'lasttoken',
}


def _modules(folder: pathlib.Path) -> tuple[pathlib.Path, str, bool]:
  """What modules.json of sentence-transformers says.

  Returns:
    The folder of the transformer, its pooling, and whether embeddings have
    length 1; a folder without modules.json has the mean of its states.

  Raises:
    FolderError: for modules, and kinds of pooling, that are not supported.
  """
  path = folder / 'modules.json'
  if not path.exists():
    return folder, 'mean', False
  stages = _json(path, list)
  if not all(
    isinstance(s, dict) and {'type', 'path'} <= s.keys() for s in stages
  ):
    raise FolderError(f'{path}: a module lacks type or path; fetch it again')
  names = [str(stage['type']).rpartition('.')[2] for stage in stages]
  plain = ['Transformer', 'Pooling']
  if names not in (plain, [*plain, 'Normalize']):
    raise FolderError(
      f'{path}: modules {", ".join(names)} are not supported, only'
      ' Transformer, Pooling and then Normalize or nothing'
    )
  path = folder / stages[1]['path'] / 'config.json'
  values = _json(path)
  kinds = [kind for key, kind in _KINDS.items() if values.get(key)]
  kinds = values.get('pooling_mode', kinds or 'mean')
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if kinds not in (['mean'], ['cls']):
    raise FolderError(
      f'{path}: pooling {kinds} is not supported, only one of mean and cls'
    )
  return folder / stages[0]['path'], kinds[0], len(names) == 3


def _tokenizer(folder: pathlib.Path, config: bert_config.Config) -> Any:
  """The tokenizer of a folder, which cuts but does not pad."""
  from tokenizers import Tokenizer, normalizers

  path = folder / 'tokenizer.json'
  if not path.exists():
    raise FolderError(
      f'{path} does not exist; save the tokenizer again with a release of'
      ' transformers that writes it'
    )
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as error:  # the package has no class of its own for them
    raise FolderError(
      f'{path} cannot be used ({error}); fetch it again'
    ) from error
  if (size := tokenizer.get_vocab_size()) > config.vocabulary:
    raise FolderError(
      f'{path} has {size} tokens and the model {config.vocabulary}; it is the'
      ' tokenizer of another model'
    )
  settings = folder / 'sentence_bert_config.json'
  settings = _json(settings) if settings.exists() else {}
  if settings.get('do_lower_case'):
    steps = [normalizers.Lowercase(), tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([s for s in steps if s])
  longest = settings.get('max_seq_length') or config.context
  # The file may fix lengths of its own.
  tokenizer.enable_truncation(min(longest, config.context))
  tokenizer.no_padding()
  return tokenizer


def _json(path: pathlib.Path, kind: type = dict) -> Any:
  try:
    values = json.loads(path.read_text('utf-8'))
  except FileNotFoundError as error:
    raise FolderError(
      f'{path} does not exist; is it the folder of a model?'
    ) from error
  except ValueError as error:
    raise FolderError(
      f'{path} is not JSON ({error}); fetch it again'
    ) from error
  if not isinstance(values, kind):
    raise FolderError(f'{path} must hold a {kind.__name__}; fetch it again')
  return values
