"""What decides the shapes and the function of a model of the BERT family.

Read from config.json of Hugging Face folders and from the metadata of GGUF
files. What would make another function of a model than the one here is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowbit_jax.io._checkpoint import Checkpoint
from models.keys import ConfigError as ConfigError, Keys

ACTIVATIONS = ('gelu', 'gelu_new', 'relu')
POOLINGS = ('mean', 'cls', 'pooler')


@dataclasses.dataclass(frozen=True)
class Config:
  """What decides the shapes and the function of a model.

  Attributes:
    vocabulary: tokens.
    width: of states.
    hidden: width between `up` and `down`.
    blocks: how many.
    heads: that share the width.
    context: most tokens of a sequence.
    types: token types, 0 for a model without them.
    epsilon: of the norms.
    activation: between `up` and `down`: 'gelu', the exact one; 'gelu_new', its
      approximation by tanh; or 'relu'.
    pooling: what stands for a sequence: 'mean' of its states, the state of its
      first token ('cls'), or a linear layer and tanh of that ('pooler').
    normalized: whether embeddings have length 1.
    offset: rows of the position table of a checkpoint that stand before that
      of the first token, as of RoBERTa. The model does not have them.
  """

  vocabulary: int
  width: int
  hidden: int
  blocks: int
  heads: int
  context: int
  types: int = 2
  epsilon: float = 1e-12
  activation: str = 'gelu'
  pooling: str = 'mean'
  normalized: bool = False
  offset: int = 0

  def __post_init__(self) -> None:
    for name in ('vocabulary', 'width', 'hidden', 'blocks', 'heads', 'context'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')
    if self.width % self.heads:
      raise ConfigError(f'heads={self.heads} must divide width={self.width}')
    for name, known in (('activation', ACTIVATIONS), ('pooling', POOLINGS)):
      if (value := getattr(self, name)) not in known:
        raise ConfigError(f'{name}={value!r} is none of {", ".join(known)}')


# What `model_type` may be.
HUGGING_FACE = ('bert', 'camembert', 'distilbert', 'roberta', 'xlm-roberta')


def from_huggingface(config: Mapping[str, Any]) -> Config:
  """The configuration that a config.json describes, which says no pooling.

  Args:
    config: the object in config.json, of transformers 4 or 5.

  Raises:
    ConfigError: for a model type, activation function or kind of positions that
      is not known, a decoder, a key that is missing, a value of another kind
      and numbers that contradict each other.
  """
  keys = Keys(config)
  kind = keys.choice('model_type', HUGGING_FACE)
  keys.choice('position_embedding_type', ('absolute',), 'absolute')
  keys.choice('is_decoder', (False,), False)
  if kind == 'distilbert':
    return Config(
      vocabulary=keys.integer('vocab_size'),
      width=keys.integer('dim'),
      hidden=keys.integer('hidden_dim'),
      blocks=keys.integer('n_layers'),
      heads=keys.integer('n_heads'),
      context=keys.integer('max_position_embeddings'),
      types=0,
      activation=keys.choice('activation', ACTIVATIONS),
    )
  # All but BERT count positions from after the number of the padding token.
  offset = 0 if kind == 'bert' else 1 + keys.integer('pad_token_id', 1, least=0)
  return Config(
    vocabulary=keys.integer('vocab_size'),
    width=keys.integer('hidden_size'),
    hidden=keys.integer('intermediate_size'),
    blocks=keys.integer('num_hidden_layers'),
    heads=keys.integer('num_attention_heads'),
    context=keys.integer('max_position_embeddings') - offset,
    types=keys.integer('type_vocab_size'),
    epsilon=keys.number('layer_norm_eps'),
    activation=keys.choice('hidden_act', ACTIVATIONS),
    offset=offset,
  )


def from_gguf(checkpoint: Checkpoint) -> Config:
  """The configuration that the metadata of a GGUF file describes.

  They do not say which activation function a model has: the exact GELU, which
  those that are converted to this architecture were published with. llama.cpp
  itself runs its approximation.

  Args:
    checkpoint: that `lowbit_jax.io.gguf.open` gave.

  Raises:
    ConfigError: for another architecture, a pooling that is not known, a key
      that is missing or not known, a value of another kind and numbers that
      contradict each other.
  """
  Keys(checkpoint.metadata).choice('general.architecture', ('bert',))
  keys = Keys(checkpoint.metadata, 'bert.')
  keys.choice('attention.causal', (False,), False)
  tables = ('token_embd.weight', 'token_types.weight')
  rows = {
    name: checkpoint.tensors[name].shape[0]
    for name in tables
    if name in checkpoint
  }
  if tables[0] not in rows:
    raise ConfigError(f'{tables[0]!r} is missing')
  config = Config(
    vocabulary=rows[tables[0]],
    width=keys.integer('embedding_length'),
    hidden=keys.integer('feed_forward_length'),
    blocks=keys.integer('block_count'),
    heads=keys.integer('attention.head_count'),
    context=keys.integer('context_length'),
    types=rows.get(tables[1], 0),
    epsilon=keys.number('attention.layer_norm_epsilon'),
    # 0 leaves it to the program.
    pooling=('mean', 'mean', 'cls')[keys.choice('pooling_type', (0, 1, 2), 0)],
  )
  keys.check_all_read(('vocab_size',))
  return config
