"""What decides the shapes and the function of a model of the LLaMA family.

Read from config.json of Hugging Face folders and from the metadata of GGUF
files. What would make another function of a model than the one here is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowbit_jax.io._checkpoint import Checkpoint
from models import rope_config, rotary
from models.keys import ConfigError as ConfigError, Keys


@dataclasses.dataclass(frozen=True)
class Config:
  """What decides the shapes and the function of a model.

  Attributes:
    vocabulary: tokens.
    width: of the residual stream.
    hidden: width between `up` and `down`, of each expert.
    blocks: how many.
    heads: of queries.
    kv_heads: of keys and values; each serves heads / kv_heads queries.
    head_size: channels of a head.
    context: positions that the model was made for.
    rope: rotation of queries and keys.
    epsilon: of the norms.
    tied: whether the embedding is the head too.
    biases: linear layers of a block with a bias, of 'query', 'key', 'value',
      'out', 'gate', 'up' and 'down'.
    head_norms: whether heads of queries and keys are normalized.
    still: blocks that rotate nothing.
    windows: positions back that each block sees, its own included; none for
      all.
    experts: how many, 0 for a plain MLP.
    chosen: experts of a token.
    normalized: whether the weights of the chosen experts add up to 1.
  """

  vocabulary: int
  width: int
  hidden: int
  blocks: int
  heads: int
  kv_heads: int
  head_size: int
  context: int
  rope: rotary.Rope
  epsilon: float = 1e-5
  tied: bool = False
  biases: tuple[str, ...] = ()
  head_norms: bool = False
  still: tuple[int, ...] = ()
  windows: tuple[int, ...] = ()
  experts: int = 0
  chosen: int = 0
  normalized: bool = True

  def __post_init__(self) -> None:
    for name in ('vocabulary', 'width', 'hidden', 'blocks', 'heads'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ConfigError(
        f'kv_heads={self.kv_heads} must divide heads={self.heads}'
      )
    if self.windows and len(self.windows) != self.blocks:
      raise ConfigError(f'{len(self.windows)} windows for blocks={self.blocks}')
    if min(self.windows, default=1) < 1:
      raise ConfigError(f'windows={self.windows} must be at least 1')
    channels = self.rope.channels
    if channels % 2 or not 0 < channels <= self.head_size:
      raise ConfigError(
        f'{channels} channels that rotate must be even and at most'
        f' head_size={self.head_size}'
      )
    if not 0 <= self.chosen <= self.experts or bool(self.experts) != bool(
      self.chosen
    ):
      raise ConfigError(
        f'chosen={self.chosen} must be from 1 to experts={self.experts}'
      )


def from_huggingface(config: Mapping[str, Any]) -> Config:
  """The configuration that a config.json describes.

  As the class of its `model_type` in transformers reads it; keys that the class
  does not know are passed over, as they are there.

  Args:
    config: the object in config.json, of transformers 4 or 5.

  Raises:
    ConfigError: for a model type, activation function or rotation that is not
      known, blocks without experts between those with experts, a key that is
      missing, a value of another kind and numbers that contradict each other.
  """
  keys = Keys(config)
  kind = keys.choice('model_type', HUGGING_FACE)
  keys.choice('hidden_act', ('silu', 'swish'), 'silu')
  width, heads = (
    keys.integer('hidden_size'),
    keys.integer('num_attention_heads'),
  )
  if 'head_dim' not in keys and width % heads:
    raise keys.error(
      'hidden_size', f'a multiple of num_attention_heads={heads}'
    )
  size = keys.integer('head_dim', width // heads)
  context = keys.integer('max_position_embeddings')
  blocks = keys.integer('num_hidden_layers')
  still = rope_config.still(keys, blocks) if kind == 'smollm3' else ()
  hidden, experts = 'intermediate_size', 0
  if kind in ('mixtral', 'qwen3_moe'):
    name = 'num_experts' if 'num_experts' in keys else 'num_local_experts'
    experts = keys.integer(name)
    hidden = hidden if kind == 'mixtral' else 'moe_intermediate_size'
    keys.choice('decoder_sparse_step', (1,), 1)
    keys.choice('mlp_only_layers', ([],), [])
  return Config(
    vocabulary=keys.integer('vocab_size'),
    width=width,
    hidden=keys.integer(hidden),
    blocks=blocks,
    heads=heads,
    kv_heads=keys.integer('num_key_value_heads', heads),
    head_size=size,
    context=context,
    rope=rope_config.from_huggingface(keys, kind, size, context),
    epsilon=keys.number('rms_norm_eps'),
    tied=keys.flag('tie_word_embeddings', kind == 'smollm3'),
    biases=_biases(keys, kind),
    head_norms=kind in ('qwen3', 'qwen3_moe'),
    still=still,
    windows=_windows(keys, kind, blocks, still),
    experts=experts,
    chosen=keys.integer('num_experts_per_tok') if experts else 0,
    normalized=kind != 'qwen3_moe' or keys.flag('norm_topk_prob', False),
  )


# What `model_type` may be.
HUGGING_FACE = (
  'llama',
  'mistral',
  'mixtral',
  'phi3',
  'qwen2',
  'qwen3',
  'qwen3_moe',
  'smollm3',
)
# What `general.architecture` may be; 'llama' has Mistral and Mixtral in it.
GGUF = ('llama', 'phi3', 'qwen2', 'qwen3', 'qwen3moe', 'smollm3')


def _biases(keys: Keys, kind: str) -> tuple[str, ...]:
  biases = ()
  if kind == 'qwen2':
    biases = 'query', 'key', 'value'
  elif kind in ('llama', 'qwen3', 'qwen3_moe', 'smollm3'):
    if keys.flag('attention_bias', False):
      biases = 'query', 'key', 'value', 'out'
  if kind in ('llama', 'smollm3') and keys.flag('mlp_bias', False):
    biases += 'gate', 'up', 'down'
  return biases


def _windows(
  keys: Keys, kind: str, blocks: int, still: tuple[int, ...]
) -> tuple[int, ...]:
  """Of each block; none where all blocks see everything."""
  if kind == 'llama':
    return ()
  size = keys.integer('sliding_window', None)
  switched = kind in ('qwen2', 'qwen3', 'qwen3_moe', 'smollm3')
  if switched and not keys.flag('use_sliding_window', False):
    size = None
  by_block = kind in ('qwen2', 'qwen3', 'smollm3')
  if by_block and 'layer_types' in keys:
    kinds = keys.list('layer_types', ('full_attention', 'sliding_attention'))
    if len(kinds) != blocks or (size is None and len(set(kinds)) > 1):
      raise keys.error(
        'layer_types',
        f'one for each of num_hidden_layers={blocks}, and all'
        " 'full_attention' without use_sliding_window and sliding_window",
      )
    slides = [k for k in range(blocks) if kinds[k] == 'sliding_attention']
  elif kind == 'smollm3':
    slides = still
  elif by_block:
    slides = range(keys.integer('max_window_layers', 28, least=0), blocks)
  else:
    slides = range(blocks)
  if size is None or not slides:
    return ()
  return tuple(size if k in slides else EVERYTHING for k in range(blocks))


def from_gguf(checkpoint: Checkpoint) -> Config:
  """The configuration that the metadata of a GGUF file describes.

  A model has the biases that the file has tensors for in its first block, and
  no head of its own without 'output.weight'.

  Args:
    checkpoint: that `lowbit_jax.io.gguf.open` gave.

  Raises:
    ConfigError: for an architecture or rotation that is not known, a key that
      is missing or not known, a value of another kind and numbers that
      contradict each other.
  """
  metadata = checkpoint.metadata
  kind = Keys(metadata).choice('general.architecture', GGUF)
  keys = Keys(metadata, f'{kind}.')
  width = keys.integer('embedding_length')
  heads = keys.integer('attention.head_count')
  if 'attention.key_length' not in keys and width % heads:
    raise keys.error('embedding_length', f'a multiple of {heads} heads')
  size = keys.integer('attention.key_length', width // heads)
  keys.choice('attention.value_length', (size,), size)
  context, blocks = keys.integer('context_length'), keys.integer('block_count')
  experts = keys.integer('expert_count', 0, least=0)
  keys.choice('expert_gating_func', (0, 1), 1)  # softmax, or not said
  keys.choice('expert_weights_norm', (True,), True)
  chosen = keys.integer('expert_used_count', 0, least=0)
  if bool(experts) != (kind == 'qwen3moe') and kind != 'llama':
    raise keys.error('expert_count', f'another number in {kind!r}')
  window = keys.integer('attention.sliding_window', 0, least=0)
  hidden = keys.integer('feed_forward_length')
  if kind == 'qwen3moe':
    hidden = keys.integer('expert_feed_forward_length')
  embedding = 'token_embd.weight'
  if embedding not in checkpoint:
    raise ConfigError(f'{embedding!r} is missing')
  config = Config(
    vocabulary=checkpoint.tensors[embedding].shape[0],
    width=width,
    hidden=hidden,
    blocks=blocks,
    heads=heads,
    kv_heads=keys.integer('attention.head_count_kv', heads),
    head_size=size,
    context=context,
    rope=rope_config.from_gguf(keys, checkpoint, size, context),
    epsilon=keys.number('attention.layer_norm_rms_epsilon'),
    tied='output.weight' not in checkpoint,
    biases=tuple(
      name
      for name, tensor in GGUF_LINEARS.items()
      if f'blk.0.{tensor}.bias' in checkpoint
    ),
    head_norms=kind in ('qwen3', 'qwen3moe'),
    still=tuple(range(3, blocks, 4)) if kind == 'smollm3' else (),
    windows=(window,) * blocks if window else (),
    experts=experts,
    chosen=chosen,
  )
  keys.check_all_read(_HARMLESS)
  return config


EVERYTHING = 2**30  # a window that no context reaches
GGUF_LINEARS = {
  'query': 'attn_q',
  'key': 'attn_k',
  'value': 'attn_v',
  'out': 'attn_output',
  'gate': 'ffn_gate',
  'up': 'ffn_up',
  'down': 'ffn_down',
}
# Keys of an architecture that say nothing about its function, or say it twice.
_HARMLESS = (
  'rope.scaling.finetuned',
  'tensor_data_layout',
  'vocab_size',
)
