"""Where checkpoints have the parameters of the LLaMA family.

For Hugging Face folders and for GGUF files: a table for the whole model, and
one for a block, whose number takes the place of '{block}'.
"""

import re
from collections import Counter
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from models.llama_config import GGUF_LINEARS, Config
from support.weights import Rows, Source, Table

_ATTENTION = ('query', 'key', 'value', 'out')
_NORMS = {
  'attention_norm': 'attention_norm',
  'mlp_norm': 'mlp_norm',
  'query_norm': 'attention/query_norm',
  'key_norm': 'attention/key_norm',
}
# Architectures whose GGUF files have the rows of queries and keys in another
# order: channels that are rotated together are neighbours.
_PAIRED = ('llama', 'smollm3')


def huggingface(config: Config, model_type: str) -> tuple[Table, Table]:
  """The tables of a Hugging Face folder, for the whole model and a block.

  Args:
    config: of the model.
    model_type: as in config.json.
  """
  names = {name: f'self_attn.{name[0]}_proj' for name in _ATTENTION}
  names |= {name: f'mlp.{name}_proj' for name in ('gate', 'up', 'down')}
  if model_type == 'phi3':
    names |= dict.fromkeys(('query', 'key', 'value'), 'self_attn.qkv_proj')
    names |= dict.fromkeys(('gate', 'up'), 'mlp.gate_up_proj')
  elif model_type == 'mixtral':
    experts = 'block_sparse_moe.experts.{expert}'
    names |= {'router': 'block_sparse_moe.gate', 'gate': f'{experts}.w1'}
    names |= {'down': f'{experts}.w2', 'up': f'{experts}.w3'}
  elif model_type == 'qwen3_moe':
    experts = 'mlp.experts.{expert}'
    names |= {k: f'{experts}.{k}_proj' for k in ('gate', 'up', 'down')}
    names['router'] = 'mlp.gate'
  names |= {
    'attention_norm': 'input_layernorm',
    'mlp_norm': 'post_attention_layernorm',
    'query_norm': 'self_attn.q_norm',
    'key_norm': 'self_attn.k_norm',
  }
  whole = _whole(config, 'model.embed_tokens', 'model.norm', 'lm_head')
  return whole, _block(config, 'model.layers.{block}.', names, paired=False)


def gguf(config: Config, architecture: str) -> tuple[Table, Table]:
  """The tables of a GGUF file, for the whole model and for a block.

  Args:
    config: of the model.
    architecture: as in its metadata.
  """
  names = dict(GGUF_LINEARS)
  if architecture == 'phi3':
    names |= dict.fromkeys(('query', 'key', 'value'), 'attn_qkv')
    names |= dict.fromkeys(('gate', 'up'), 'ffn_up')
  if config.experts:
    names |= {k: f'ffn_{k}_exps' for k in ('gate', 'up', 'down')}
    names['router'] = 'ffn_gate_inp'
  names |= {
    'attention_norm': 'attn_norm',
    'mlp_norm': 'ffn_norm',
    'query_norm': 'attn_q_norm',
    'key_norm': 'attn_k_norm',
  }
  whole = _whole(config, 'token_embd', 'output_norm', 'output')
  paired = architecture in _PAIRED
  return whole, _block(config, 'blk.{block}.', names, paired)


def harmless(config: Config) -> re.Pattern[str]:
  """Names of tensors that the tables leave out.

  They say nothing that the configuration does not say, or only programs that
  quantize activations or caches read them.
  """
  patterns = [
    r'(.*\.)?rotary_emb\.inv_freq',
    r'.*\.attn_rot_embd(\.weight)?',
    r'rope_(freqs|factors_long|factors_short)\.weight',
    r'.*\.(input_scale|input_global_scale|k_scale|v_scale)',
  ]
  return re.compile('|'.join(patterns + config.tied * [r'lm_head\.weight']))


def specs(config: Config) -> Mapping[str, PartitionSpec]:
  """How parameters are split over the axis 'model' of a mesh.

  Of the embedding and the head the tokens; of a block the outputs of the first
  linear layers and the inputs of the last ones; of experts the experts.
  """
  outputs, first = PartitionSpec(None, 'model'), PartitionSpec('model')
  if config.experts:
    mlp = dict.fromkeys(('mlp/gate', 'mlp/up', 'mlp/down'), first)
  else:
    mlp = {'mlp/gate': outputs, 'mlp/up': outputs, 'mlp/down': first}
  attention = {f'attention/{name}': outputs for name in _ATTENTION}
  linears = {**attention, 'attention/out': first, **mlp, 'head': outputs}
  kernels = {f'{path}/kernel': spec for path, spec in linears.items()}
  return {'embed/embedding': first, **kernels}


def _whole(config: Config, embedding: str, norm: str, head: str) -> Table:
  table = {
    'embed/embedding': Source(f'{embedding}.weight'),
    'norm/scale': Source(f'{norm}.weight'),
  }
  if not config.tied:
    table['head/kernel'] = Source(f'{head}.weight')
  return table


def _block(
  config: Config, prefix: str, names: Mapping[str, str], paired: bool
) -> Table:
  """The table of a block; layers of the same name lie in it one by one."""
  table = {
    f'{path}/scale': Source(f'{prefix}{names[name]}.weight')
    for name, path in _NORMS.items()
    if config.head_norms or path == name
  }
  heads = {'query': config.heads, 'key': config.kv_heads}
  outputs = {
    'query': config.heads * config.head_size,
    **dict.fromkeys(('key', 'value'), config.kv_heads * config.head_size),
    **dict.fromkeys(('gate', 'up'), config.hidden),
  }
  totals, first = Counter(), Counter()
  for name, size in outputs.items():
    totals[names[name]] += size
  layers = (*GGUF_LINEARS, 'router') if config.experts else GGUF_LINEARS
  for name in layers:
    module, rows = names[name], None
    if size := outputs.get(name, 0):
      if size < totals[module]:
        end = first[module] + size
        rows = Rows(first[module], end, totals[module])
        first[module] = end
    path = f'attention/{name}' if name in _ATTENTION else f'mlp/{name}'
    for leaf, tensor in (('kernel', 'weight'), ('bias', 'bias')):
      if leaf == 'kernel' or name in config.biases:
        table[f'{path}/{leaf}'] = Source(
          f'{prefix}{module}.{tensor}',
          rows=rows,
          heads=paired * heads.get(name, 0),
          experts=config.experts * ('{expert}' in module),
        )
  return table
