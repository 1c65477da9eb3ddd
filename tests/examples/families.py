"""Small models of the LLaMA family: configurations, and weights by a seed.

`CASES` are objects as in config.json, some as transformers 4 writes them and
some as transformers 5 does. Weights are made of integers of NumPy's frozen
`RandomState` stream, without any elementary function, and have the names of
Hugging Face folders.
"""

import json
import math
import pathlib
import zlib
from typing import Any

import numpy as np

from lowbit_jax.io import safetensors

TOKENS = 24
_SIZES = {
  'vocab_size': 96,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'hidden_act': 'silu',
  'pad_token_id': None,
}
_GROUPED = {**_SIZES, 'num_key_value_heads': 2}
_PLAIN = {'rope_type': 'default', 'rope_theta': 1e4}
_LONG = {
  'type': 'longrope',
  'short_factor': [1.0, 1.1, 1.25, 1.5, 2.0, 3.0],
  'long_factor': [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}
_PHI3 = {
  **_GROUPED,
  'model_type': 'phi3',
  'tie_word_embeddings': False,
  'rope_theta': 1e4,
  'partial_rotary_factor': 0.75,
  'rope_scaling': _LONG,
}

CASES: dict[str, dict[str, Any]] = {
  # As files of 2023 are: all heads have keys, and the base goes without saying.
  'llama2': {**_SIZES, 'model_type': 'llama', 'tie_word_embeddings': False},
  'llama3': {
    **_GROUPED,
    'model_type': 'llama',
    'tie_word_embeddings': True,
    'attention_bias': True,
    'mlp_bias': True,
    'rope_theta': 1e4,
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32,
    },
  },
  'llama_linear': {
    **_GROUPED,
    'model_type': 'llama',
    'tie_word_embeddings': False,
    'head_dim': 32,
    'rope_theta': 1e4,
    'rope_scaling': {'type': 'linear', 'factor': 4.0},
  },
  'mistral': {
    **_GROUPED,
    'model_type': 'mistral',
    'tie_word_embeddings': False,
    'sliding_window': 7,
    'rope_parameters': _PLAIN,
  },
  'qwen2': {
    **_GROUPED,
    'model_type': 'qwen2',
    'tie_word_embeddings': True,
    'use_sliding_window': True,
    'sliding_window': 7,
    'max_window_layers': 1,
    'rope_theta': 100.0,
    'rope_scaling': {
      'type': 'yarn',
      'factor': 4.0,
      'original_max_position_embeddings': 16,
      'beta_fast': 2.0,
    },
  },
  'qwen3': {
    **_GROUPED,
    'model_type': 'qwen3',
    'tie_word_embeddings': False,
    'attention_bias': True,
    'head_dim': 32,
    'use_sliding_window': True,
    'sliding_window': 5,
    'layer_types': ['sliding_attention', 'full_attention'],
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
  },
  # Each fourth block does not rotate; the head is the embedding unless said.
  'smollm3': {
    **_GROUPED,
    'model_type': 'smollm3',
    'num_hidden_layers': 4,
    'no_rope_layer_interval': 4,
    'rope_theta': 1e4,
  },
  'smollm3_listed': {
    **_GROUPED,
    'model_type': 'smollm3',
    'tie_word_embeddings': False,
    'no_rope_layers': [0, 1],
    'use_sliding_window': True,
    'sliding_window': 9,
    'rope_theta': 1e4,
  },
  # No more positions than in training, and more.
  'phi3_short': {
    **_PHI3,
    'original_max_position_embeddings': 32,
    'sliding_window': 11,
  },
  'phi3_long': {**_PHI3, 'original_max_position_embeddings': 16},
  'mixtral': {
    **_GROUPED,
    'model_type': 'mixtral',
    'tie_word_embeddings': False,
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
    'rope_theta': 1e6,
  },
  'qwen3_moe': {
    **_GROUPED,
    'model_type': 'qwen3_moe',
    'tie_word_embeddings': False,
    'head_dim': 16,
    'num_experts': 8,
    'num_experts_per_tok': 3,
    'moe_intermediate_size': 32,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'norm_topk_prob': True,
    'rope_theta': 1e4,
  },
  'qwen3_moe_raw': {
    **_GROUPED,
    'model_type': 'qwen3_moe',
    'tie_word_embeddings': False,
    'head_dim': 16,
    'num_experts': 8,
    'num_experts_per_tok': 3,
    'moe_intermediate_size': 32,
    'norm_topk_prob': False,
    'rope_theta': 1e4,
  },
}


def tokens() -> np.ndarray:
  """(1, TOKENS) int32."""
  random = np.random.RandomState(20261128)
  return random.randint(0, _SIZES['vocab_size'], (1, TOKENS)).astype(np.int32)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Of the tensors of a Hugging Face folder, by name."""
  kind, width = config['model_type'], config['hidden_size']
  heads = config['num_attention_heads']
  size = config.get('head_dim', width // heads)
  queries = heads * size
  keys = config.get('num_key_value_heads', heads) * size
  hidden = config.get('moe_intermediate_size', config['intermediate_size'])
  experts = config.get('num_experts', config.get('num_local_experts', 0))
  gates = {'gate_proj': 'w1', 'down_proj': 'w2', 'up_proj': 'w3'}
  both = config.get('attention_bias', False)
  table = {'model.embed_tokens.weight': (config['vocab_size'], width)}

  def linear(name, outputs, inputs, bias=False):
    table[f'{name}.weight'] = (outputs, inputs)
    if bias:
      table[f'{name}.bias'] = (outputs,)

  for k in range(config['num_hidden_layers']):
    block = f'model.layers.{k}'
    table[f'{block}.input_layernorm.weight'] = (width,)
    table[f'{block}.post_attention_layernorm.weight'] = (width,)
    attention = f'{block}.self_attn'
    if kind == 'phi3':
      linear(f'{attention}.qkv_proj', queries + 2 * keys, width)
    else:
      first = both or kind == 'qwen2'
      linear(f'{attention}.q_proj', queries, width, first)
      linear(f'{attention}.k_proj', keys, width, first)
      linear(f'{attention}.v_proj', keys, width, first)
    linear(f'{attention}.o_proj', width, queries, both)
    if kind in ('qwen3', 'qwen3_moe'):
      table[f'{attention}.q_norm.weight'] = (size,)
      table[f'{attention}.k_norm.weight'] = (size,)
    if kind == 'phi3':
      linear(f'{block}.mlp.gate_up_proj', 2 * hidden, width)
      linear(f'{block}.mlp.down_proj', width, hidden)
      continue
    part = 'block_sparse_moe' if kind == 'mixtral' else 'mlp'
    mlps = [f'{block}.{part}.experts.{e}' for e in range(experts)]
    if experts:
      linear(f'{block}.{part}.gate', experts, width)
    for mlp in mlps or [f'{block}.mlp']:
      for name, short in gates.items():
        ends = (width, hidden) if name == 'down_proj' else (hidden, width)
        name = short if kind == 'mixtral' else name
        linear(f'{mlp}.{name}', *ends, config.get('mlp_bias', False))
  table['model.norm.weight'] = (width,)
  if not config.get('tie_word_embeddings', kind == 'smollm3'):
    linear('lm_head', config['vocab_size'], width)
  return table


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
  """The tensors in float32; kernels keep the variance of their inputs."""
  random = np.random.RandomState(zlib.crc32(json.dumps(config).encode()))
  tensors = {}
  for name, shape in shapes(config).items():
    uniform = random.randint(-(2**12), 2**12, shape).astype(np.float32) / 2**12
    if 'norm' in name:
      tensors[name] = 1 + uniform / 2
    elif name.endswith('.bias') or 'embed' in name:
      tensors[name] = uniform
    else:
      tensors[name] = uniform * np.float32(math.sqrt(3 / shape[-1]))
  return tensors


def write(folder: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
  """A Hugging Face folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.save(folder / 'model.safetensors', weights(config))
  return folder
