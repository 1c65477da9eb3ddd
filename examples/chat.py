"""Chats with a language model, on packed weights.

The model is SmolLM2-135M-Instruct, fetched on the first run (98 MB), or any of
the LLaMA family in a GGUF file or in a Hugging Face folder:

  python examples/chat.py --prompt="Are dogs real?"
  python examples/chat.py --model=FOLDER

Without --prompt, questions are read from the terminal until it ends. Weights
stay as the file has them, or take another format of the library:

  python examples/chat.py --format=nvfp4 --prompt="Are dogs real?"

With --activations=int8_g32 the inputs of linear layers are quantized too, and
meet the weights as integers where a kernel can do so, which is faster.

Standard output holds the answers alone; what the run needed goes to standard
error, and with --stats to a JSON file. The answer to the same question is the
same on every run; --temperature=0.7 draws it, from --seed.
"""

import json
import sys
import time
from collections.abc import Sequence

import jax
from absl import app, flags

from lowbit_jax import _files
from support import (
  chat_template,
  command,
  format_flags,
  generation,
  language_models,
  smollm2,
  variants,
  wheels,
)

_MODEL = flags.DEFINE_string(
  'model', '', 'GGUF file or folder; "" fetches SmolLM2-135M-Instruct.'
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'Question to answer; none asks at the terminal.'
)
_RAW = flags.DEFINE_bool(
  'raw', False, 'Go on with the prompt itself, without a chat template.'
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 256, 'Of an answer.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, '0 takes the most likely token.', lower_bound=0.0
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Tokens that can be drawn; 0 for all.', lower_bound=0
)
_TOP_P = flags.DEFINE_float(
  'top_p',
  1.0,
  'Probability of the tokens that can be drawn.',
  lower_bound=0.0,
  upper_bound=1.0,
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.', lower_bound=0)
_FORMAT = flags.DEFINE_string(
  'format', '', 'Format of the linear layers; "" leaves them as they are.'
)
_ACTIVATIONS = flags.DEFINE_string(
  'activations', '', 'Format of the inputs of linear layers; "" for float.'
)
_STATS = flags.DEFINE_string('stats', '', 'JSON file for figures of the run.')


flags.register_validator('format', format_flags.is_block_format)
flags.register_validator('activations', format_flags.is_block_format)


class _Chat:
  """A conversation, and the figures of it."""

  def __init__(self, path: str) -> None:
    begin = time.perf_counter()
    self.language_model = language_models.load(path)
    self.tokenizer = self.language_model.tokenizer
    model = self.language_model.model
    if _FORMAT.value:
      pair = variants.Pair(_FORMAT.value, 'none')
      model = variants.Variants(model)(pair)
    if _ACTIVATIONS.value:
      fmt = variants.block_format(_ACTIVATIONS.value)
      model = variants.with_stored_activations(model, fmt)
    self.bytes = variants.nbytes(jax.block_until_ready(model))
    self.load_seconds = time.perf_counter() - begin
    sampling = generation.Sampling(
      _TEMPERATURE.value, _TOP_K.value, _TOP_P.value
    )
    self.generator = generation.Generator(model, sampling)
    self.messages: list[dict[str, str]] = []

  def answer(self, question: str) -> None:
    """Prints an answer as it is made."""
    prompt = question
    if not _RAW.value:
      self.messages.append({'role': 'user', 'content': question})
      prompt = chat_template.render(
        self.tokenizer.chat_template,
        self.messages,
        bos_token=self.tokenizer.bos_token,
        eos_token=self.tokenizer.eos_token,
      )
    ids, text = self.tokenizer.encode(prompt), ''
    stream, ends = self.tokenizer.stream(ids), self.tokenizer.eos
    made = self.generator.generate(ids, _MAX_TOKENS.value, ends, _SEED.value)
    for token in made:
      if token not in ends:
        text += (piece := stream.push(token))
        print(piece, end='', flush=True)
    print(stream.flush(), flush=True)
    self.messages.append({'role': 'assistant', 'content': text})

  def stats(self) -> dict[str, float]:
    """What the run needed."""
    generator = self.generator
    return {
      'prompt_tokens': generator.prompt_tokens,
      'prompt_seconds': generator.prompt_seconds,
      'tokens': generator.tokens,
      'seconds': generator.seconds,
      'tokens_per_second': generator.tokens / max(generator.seconds, 1e-9),
      'bytes': self.bytes,
      'load_seconds': self.load_seconds,
      'compile_seconds': generator.compile_seconds,
    }


def _questions():
  """The one of the command line, or those of the terminal."""
  if _PROMPT.value is not None:
    yield _PROMPT.value
    return
  while True:
    if sys.stdin.isatty():
      print('> ', end='', file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
      return
    if line.strip():
      yield line.strip()


def _run() -> None:
  command.keep_programs()
  chat = _Chat(_MODEL.value or str(smollm2.fetch()))
  print(
    f'{chat.bytes / 1e6:.1f} MB of weights in {chat.load_seconds:.1f} s',
    file=sys.stderr,
  )
  for question in _questions():
    chat.answer(question)
    _tell(chat.stats())
  if _STATS.value:
    with _files.replacing(_STATS.value) as file:
      file.write(json.dumps(chat.stats(), indent=2).encode() + b'\n')


def _tell(stats: dict[str, float]) -> None:
  """Prints what the run needed so far."""
  print(
    f'{stats["prompt_tokens"]} tokens read in {stats["prompt_seconds"]:.1f} s,'
    f' {stats["tokens"]} made in {stats["seconds"]:.1f} s'
    f' ({stats["tokens_per_second"]:.1f} a second), compilation'
    f' {stats["compile_seconds"]:.1f} s',
    file=sys.stderr,
  )


def main(argv: Sequence[str]) -> int:
  errors = wheels.FetchError, ValueError
  return command.main(argv, _run, errors)


if __name__ == '__main__':
  app.run(main)
