"""Text to the ids of a model's vocabulary and back, as its checkpoint says.

The pieces come from the package `tokenizers`. A folder holds the whole recipe
as `tokenizer.json`. The metadata of a GGUF file names it: `tokenizer.ggml.pre`
is how text is split before pairs are merged. The splits here are those of
llama.cpp's `llama-vocab.cpp` and of the models' own `tokenizer.json`. Others
are refused by name, because a wrong split gives a model that looks plausible.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_KEY = 'tokenizer.ggml.'
_CONTROL, _USER = 3, 4  # of tokenizer.ggml.token_type: recognised in text
# Control tokens that end an answer, whatever the one `eos_token_id` is.
_ENDS = (
  '<|endoftext|>',
  '<|end_of_text|>',
  '<|im_end|>',
  '<|eot_id|>',
  '<|eom_id|>',
  '<|end|>',
  '<end_of_turn>',
  '</s>',
)
_INCOMPLETE = '\N{REPLACEMENT CHARACTER}'
_SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # as SentencePiece writes it


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
  """Splits words, and numbers into so many digits; bytes become letters."""
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _GPT2])
_LLAMA3 = _words('{1,3}')
_QWEN2 = _words('')
_SPLITS = {
  'gpt-2': _GPT2,
  'smollm': _DIGITS,
  'starcoder': _DIGITS,
  'refact': _DIGITS,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary, and what a chat needs to know of it.

  Attributes:
    model: of the package `tokenizers`.
    bos: the id that begins a text, None for none.
    eos: the ids that end an answer.
    bos_token: the text of `bos`, '' for none, as chat templates take it.
    eos_token: that of the one id that the checkpoint calls its end.
    chat_template: how a chat becomes a prompt, in Jinja; None for none.
  """

  model: tokenizers.Tokenizer
  bos: int | None
  eos: frozenset[int]
  bos_token: str
  eos_token: str
  chat_template: str | None

  @property
  def vocabulary(self) -> int:
    """The number of ids: one more than the highest."""
    return 1 + max(self.model.get_vocab().values())

  def encode(self, text: str) -> list[int]:
    """The ids of a text; no beginning or end is added to it.

    Special tokens that stand in the text become their ids. A byte that the
    vocabulary lacks, of control characters say, has none and is left out.

    Raises:
      UnicodeEncodeError: a ValueError, if the text has half a character, as
        arguments of a program that are no UTF-8 do.
    """
    text.encode()
    return self.model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids, special tokens included.

    Bytes that are no UTF-8 become replacement characters.
    """
    return self.model.decode(list(ids), skip_special_tokens=False)

  def stream(self, before: Iterable[int] = ()) -> 'Stream':
    """A decoder of ids that arrive one by one.

    Args:
      before: ids that stand before them, such as a prompt. After nothing,
        SentencePiece drops the space before the first word.
    """
    return Stream(self, before)


class Stream:
  """Decodes ids one by one, and gives only characters that are complete."""

  def __init__(self, tokenizer: Tokenizer, before: Iterable[int]) -> None:
    self._decode = tokenizer.decode
    # What was given last: a token may look otherwise at the start of a text.
    self._before = list(before)
    self._waiting: list[int] = []

  def push(self, token: int) -> str:
    """The text that an id completes, '' while a character is incomplete."""
    self._waiting.append(token)
    return '' if self._text().endswith(_INCOMPLETE) else self.flush()

  def flush(self) -> str:
    """The text that waits, complete or not."""
    text = self._text()
    if self._waiting:
      self._before, self._waiting = self._waiting, []
    return text

  def _text(self) -> str:
    before = self._decode(self._before)
    return self._decode(self._before + self._waiting)[len(before) :]


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer of a GGUF file.

  Args:
    metadata: of the file, as `lowbit_jax.io.gguf.open` gives it.

  Raises:
    ValueError: if the metadata has no tokenizer, one of a kind that is not
      known here, or one that contradicts itself; with the key and its value.
  """
  kind = _value(metadata, 'model')
  tokens = list(_value(metadata, 'tokens'))
  builders = {'gpt2': _byte_level, 'llama': _sentence_piece}
  if kind not in builders:
    raise _unknown('model', kind, builders)
  if len(set(tokens)) != len(tokens):
    raise ValueError(f'metadata {_KEY + "tokens"!r} has a token twice')
  model = builders[kind](metadata, {t: i for i, t in enumerate(tokens)})
  types = _per_token(metadata, 'token_type', len(tokens))
  recognised = [
    tokenizers.AddedToken(
      token, normalized=False, special=bool(type_ == _CONTROL)
    )
    for token, type_ in zip(tokens, types, strict=True)
    if type_ in (_CONTROL, _USER)
  ]
  model.add_tokens(recognised)
  bos, eos, *others = (
    _id(metadata, name, len(tokens)) for name in ('bos', 'eos', 'eot', 'eom')
  )
  special = {token.content for token in recognised if token.special}
  named = [i for i, t in enumerate(tokens) if t in _ENDS and t in special]
  return Tokenizer(
    model,
    bos,
    frozenset(i for i in (eos, *others, *named) if i is not None),
    '' if bos is None else tokens[bos],
    '' if eos is None else tokens[eos],
    metadata.get('tokenizer.chat_template'),
  )


def from_folder(path: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a checkpoint folder.

  Reads `tokenizer.json`, and where they are there `tokenizer_config.json`,
  `generation_config.json` and `chat_template.jinja`, which outranks the
  template of the configuration.

  Args:
    path: of the folder.

  Raises:
    ValueError: if there is no `tokenizer.json`, or a file is not understood,
      with its name.
  """
  folder = pathlib.Path(path)
  file = folder / 'tokenizer.json'
  if not file.is_file():
    raise ValueError(
      f'{folder} has no {file.name}; write one by'
      ' transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)'
    )
  try:
    model = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # The package has no class of its own.
    raise ValueError(f'{file} is not understood: {error}') from error
  model.no_truncation()
  model.no_padding()
  config = _json(folder / 'tokenizer_config.json')
  bos_token, bos = _special(model, config, 'bos_token')
  eos_token, eos = _special(model, config, 'eos_token')
  ends = _json(folder / 'generation_config.json').get('eos_token_id')
  ends = [eos, *ends] if isinstance(ends, list) else [eos, ends]
  template = folder / 'chat_template.jinja'
  return Tokenizer(
    model,
    bos,
    frozenset(i for i in ends if i is not None),
    bos_token,
    eos_token,
    template.read_text('utf-8') if template.is_file() else _template(config),
  )


def _value(metadata: Mapping[str, Any], name: str) -> Any:
  if _KEY + name not in metadata:
    raise ValueError(f'metadata has no {_KEY + name!r}, so no tokenizer')
  return metadata[_KEY + name]


def _per_token(metadata: Mapping[str, Any], name: str, count: int) -> Any:
  values = _value(metadata, name)
  if len(values) != count:
    raise ValueError(
      f'metadata {_KEY + name!r} has {len(values)} values for {count} tokens'
    )
  return values


def _unknown(name: str, value: str, known: Iterable[str]) -> ValueError:
  return ValueError(
    f'metadata {_KEY + name!r} is {value!r}; known are {", ".join(known)}:'
    ' take the folder with the tokenizer.json of this model'
  )


def _id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
  """The id of a special token, None for none."""
  key = f'{_KEY}{name}_token_id'
  if key not in metadata:
    return None
  if not 0 <= metadata[key] < count:
    raise ValueError(f'metadata {key!r} is {metadata[key]}, of {count} tokens')
  return int(metadata[key])


def _bpe(
  vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
  except Exception as error:  # The package has no class of its own.
    raise ValueError(f'metadata of the tokenizer: {error}') from error


def _byte_level(
  metadata: Mapping[str, Any], vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
  """Merges the bytes of words, as GPT-2 does."""
  pre = metadata.get(_KEY + 'pre', 'default')
  if pre not in _SPLITS:
    raise _unknown('pre', pre, _SPLITS)
  merges = [tuple(merge.split(' ', 1)) for merge in _value(metadata, 'merges')]
  split = _SPLITS[pre]
  # A word of LLaMA 3 that is a token becomes it, whatever the merges.
  model = _bpe(vocabulary, merges, ignore_merges=split is _LLAMA3)
  if split is _QWEN2:
    model.normalizer = normalizers.NFC()
  model.pre_tokenizer = split
  model.decoder = decoders.ByteLevel()
  return model


def _sentence_piece(
  metadata: Mapping[str, Any], vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
  """Merges characters into the piece of the highest score, as SentencePiece."""
  scores = _per_token(metadata, 'scores', len(vocabulary))
  merges = [
    (-scores[i], vocabulary[piece[:k]], vocabulary[piece[k:]], piece, k)
    for piece, i in vocabulary.items()
    for k in range(1, len(piece))
    if piece[:k] in vocabulary and piece[k:] in vocabulary
  ]
  model = _bpe(
    vocabulary,
    [(piece[:k], piece[k:]) for *_, piece, k in sorted(merges)],
    unk_token=list(vocabulary)[int(_value(metadata, 'unknown_token_id'))],
    fuse_unk=True,
    byte_fallback=True,
  )
  prefix = bool(metadata.get(_KEY + 'add_space_prefix', True))
  model.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE)] * prefix + [normalizers.Replace(' ', _SPACE)]
  )
  model.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *[decoders.Strip(' ', 1, 0)] * prefix,
    ]
  )
  return model


def _json(path: pathlib.Path) -> dict[str, Any]:
  """What a file of JSON holds, nothing where there is none."""
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}, and no object')
  return content


def _special(
  model: tokenizers.Tokenizer, config: Mapping[str, Any], name: str
) -> tuple[str, int | None]:
  """The text and the id of a special token; '' and None for none."""
  value = config.get(name) or ''
  text = value['content'] if isinstance(value, dict) else value
  token = model.token_to_id(text)
  if text and token is None:
    raise ValueError(
      f'tokenizer_config.json: its {name} {text!r} is not in tokenizer.json'
    )
  return text, token


def _template(config: Mapping[str, Any]) -> str | None:
  """The chat template of a configuration; of several, the default one."""
  value = config.get('chat_template')
  if isinstance(value, list):
    named = {entry['name']: entry['template'] for entry in value}
    return named.get('default')
  return value
