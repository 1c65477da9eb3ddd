"""Where checkpoints have the parameters of the LLaMA family.

For Hugging Face folders and for GGUF files: a table for the whole model, and
one for a block, whose number takes the place of '{block}'.
"""

from jax.sharding import PartitionSpec

from models.llama_config import Config
from support.weights import Source, Table

# How parameters of a block are split over the axis 'model' of a mesh: outputs
# of the first linear layers, inputs of the last ones.
SPECS = {
  **{
    f'{name}/kernel': PartitionSpec(None, 'model')
    for name in (
      'attention/query',
      'attention/key',
      'attention/value',
      'mlp/gate',
      'mlp/up',
    )
  },
  'attention/out/kernel': PartitionSpec('model'),
  'mlp/down/kernel': PartitionSpec('model'),
}


def gguf(config: Config, architecture: str) -> tuple[Table, Table]:
  """The tables of a GGUF file, for the whole model and for a block."""
  paired = architecture in PAIRED
  whole = {
    'embed/embedding': Source('token_embd.weight'),
    'norm/scale': Source('output_norm.weight'),
    'head/kernel': Source('output.weight'),
  }
  block = {
    'attention_norm/scale': Source('blk.{block}.attn_norm.weight'),
    'mlp_norm/scale': Source('blk.{block}.ffn_norm.weight'),
    'attention/value/kernel': Source('blk.{block}.attn_v.weight'),
    'attention/out/kernel': Source('blk.{block}.attn_output.weight'),
  }
  for path, name, heads in (
    ('query', 'attn_q', config.heads),
    ('key', 'attn_k', config.kv_heads),
  ):
    source = Source(f'blk.{{block}}.{name}.weight', heads=paired * heads)
    block[f'attention/{path}/kernel'] = source
  for path in ('gate', 'up', 'down'):
    block[f'mlp/{path}/kernel'] = Source(f'blk.{{block}}.ffn_{path}.weight')
  return whole, block


# Architectures whose rows of queries and keys pair neighbouring channels.
PAIRED = ('llama',)
