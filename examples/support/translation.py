"""GGUF files of the LLaMA family with what a Hugging Face folder has."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from lowbit_jax.io._checkpoint import Checkpoint, Tensor
from models import llama_config, llama_names
from models.llama_config import Config, ConfigError
from models.rotary import Rope
from support.conversion import ConversionError
from support.weights import Table

# The `model_type` of an architecture, and the class that has it.
_MODELS = {
  'llama': ('llama', 'LlamaForCausalLM'),
  'qwen2': ('qwen2', 'Qwen2ForCausalLM'),
  'qwen3': ('qwen3', 'Qwen3ForCausalLM'),
}
_ARCHITECTURE = 'general.architecture'


def to_folder(source: Checkpoint, folder: pathlib.Path) -> Checkpoint:
  """A GGUF file under the names and in the order of rows of a folder.

  Args:
    source: that `gguf.open` gave.
    folder: empty, into which configuration and tokenizer are written.

  Returns:
    The checkpoint; its tensors are read from `source`.

  Raises:
    ConversionError: for what is not translated.
  """
  architecture = source.metadata.get(_ARCHITECTURE)
  try:
    config = llama_config.from_gguf(source)
    if architecture not in _MODELS or config.experts:
      what = 'experts' if architecture in _MODELS else repr(architecture)
      raise ConfigError(
        f'models with {what} are not translated; known are {", ".join(_MODELS)}'
      )
    node = _configuration(config, source.metadata)
    tensors = dict(_tensors(source, config))
    _write_tokenizer(source.metadata, config, folder)
  except ValueError as error:
    raise ConversionError(
      f'{source.path}: to make a folder of it: {error}'
    ) from error
  _put(folder / 'config.json', node)
  return Checkpoint(source.path, tensors, {}, source.release)


def table(config: Config, architecture: str) -> Table:
  """Where the folder has the parameters of a block."""
  return llama_names.huggingface(config, _MODELS[architecture][0])[1]


def _tensors(
  source: Checkpoint, config: Config
) -> Iterator[tuple[str, Tensor]]:
  """The tensors under their new names."""
  architecture = source.metadata[_ARCHITECTURE]
  old = llama_names.gguf(config, architecture)
  new = llama_names.huggingface(config, _MODELS[architecture][0])
  used = set()
  for k, blocks in enumerate((1, config.blocks)):
    for block in range(blocks):
      for path, place in old[k].items():
        (name,), (renamed,) = place.names(block), new[k][path].names(block)
        if name not in source:
          raise ConfigError(f'there is no tensor {name!r}')
        used.add(name)
        read = functools.partial(place.read, source, block)
        yield renamed, source.tensors[name]._replace(read=read)
  harmless = llama_names.harmless(config)
  for name in source.tensors.keys() - used:
    if not harmless.fullmatch(name):
      raise ConfigError(f'the tensor {name!r} has no place in it')


def _configuration(
  config: Config, metadata: Mapping[str, Any]
) -> dict[str, Any]:
  """What config.json says, which is read again as a proof."""
  model_type, kind = _MODELS[metadata[_ARCHITECTURE]]
  node = {
    'architectures': [kind],
    'model_type': model_type,
    'vocab_size': config.vocabulary,
    'hidden_size': config.width,
    'intermediate_size': config.hidden,
    'num_hidden_layers': config.blocks,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_size,
    'hidden_act': 'silu',
    'max_position_embeddings': config.context,
    'rms_norm_eps': config.epsilon,
    'rope_theta': config.rope.base,
    'tie_word_embeddings': config.tied,
  }
  rope = config.rope
  if rope.kind == 'plain' and rope.gain == 1:
    config = dataclasses.replace(config, rope=Rope(rope.base, rope.channels))
  elif rope.kind == 'long':
    node['rope_scaling'] = {
      'rope_type': 'longrope',
      'original_max_position_embeddings': rope.original,
      'attention_factor': rope.gain,
      'short_factor': list(rope.short),
      'long_factor': list(rope.long),
    }
  if llama_config.from_huggingface(node) != config:
    raise ConfigError('config.json cannot say its rotation, biases or windows')
  for name in ('bos', 'eos'):
    if (key := f'tokenizer.ggml.{name}_token_id') in metadata:
      node[f'{name}_token_id'] = int(metadata[key])
  return node


def _write_tokenizer(
  metadata: Mapping[str, Any], config: Config, folder: pathlib.Path
) -> None:
  """Writes tokenizer.json and what is said beside it."""
  try:
    from tokenizers import processors

    from support import tokenizer
  except ImportError as error:
    raise ConfigError(f'{error}; install tokenizers') from error
  found = tokenizer.from_gguf(metadata)
  kind = metadata['tokenizer.ggml.model']
  begins = metadata.get('tokenizer.ggml.add_bos_token', kind == 'llama')
  if begins and found.bos is not None:
    found.model.post_processor = processors.TemplateProcessing(
      single=f'{found.bos_token} $A',
      special_tokens=[(found.bos_token, found.bos)],
    )
  found.model.save(str(folder / 'tokenizer.json'))
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': found.bos_token or None,
    'eos_token': found.eos_token or None,
    'chat_template': found.chat_template,
    'model_max_length': config.context,
    'clean_up_tokenization_spaces': False,
  }
  known = {key: value for key, value in settings.items() if value is not None}
  _put(folder / 'tokenizer_config.json', known)
  _put(folder / 'generation_config.json', {'eos_token_id': sorted(found.eos)})


def _put(path: pathlib.Path, node: Mapping[str, Any]) -> None:
  text = json.dumps(node, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, 'utf-8')
