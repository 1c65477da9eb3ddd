"""Where checkpoints have the parameters of the BERT family.

For Hugging Face folders and for GGUF files: a table for the whole model, and
one for a block, whose number takes the place of '{block}'.
"""

import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from lowbit_jax.io._checkpoint import Checkpoint
from models.bert_config import Config
from support.weights import CheckpointMismatch, Rows, Source, Table

# What stands before the linear layers of a block: a scale of the one, along its
# outputs, can be folded into the others, along their inputs. Norms are not
# among them: what follows them is added to what the next layers make of it. Nor
# is `mlp/up`, whose outputs go through a function that is not linear.
FOLLOWERS: Mapping[str, tuple[str, ...]] = {
  'attention/value/kernel': ('attention/out/kernel',),
}

# How parameters of a block are split over the axis 'model' of a mesh: outputs
# of the first linear layers, inputs of the last ones.
_FIRST = ('attention/query', 'attention/key', 'attention/value', 'mlp/up')
SPECS = {
  **{f'{name}/kernel': PartitionSpec(None, 'model') for name in _FIRST},
  **{f'{name}/bias': PartitionSpec('model') for name in _FIRST},
  'attention/out/kernel': PartitionSpec('model'),
  'mlp/down/kernel': PartitionSpec('model'),
}

_WORDS = 'embeddings.word_embeddings.weight'
_BLOCK = {
  'attention/query': 'encoder.layer.{block}.attention.self.query',
  'attention/key': 'encoder.layer.{block}.attention.self.key',
  'attention/value': 'encoder.layer.{block}.attention.self.value',
  'attention/out': 'encoder.layer.{block}.attention.output.dense',
  'attention_norm': 'encoder.layer.{block}.attention.output.LayerNorm',
  'mlp/up': 'encoder.layer.{block}.intermediate.dense',
  'mlp/down': 'encoder.layer.{block}.output.dense',
  'mlp_norm': 'encoder.layer.{block}.output.LayerNorm',
}
_DISTILBERT = {
  'attention/query': 'transformer.layer.{block}.attention.q_lin',
  'attention/key': 'transformer.layer.{block}.attention.k_lin',
  'attention/value': 'transformer.layer.{block}.attention.v_lin',
  'attention/out': 'transformer.layer.{block}.attention.out_lin',
  'attention_norm': 'transformer.layer.{block}.sa_layer_norm',
  'mlp/up': 'transformer.layer.{block}.ffn.lin1',
  'mlp/down': 'transformer.layer.{block}.ffn.lin2',
  'mlp_norm': 'transformer.layer.{block}.output_layer_norm',
}
_GGUF = {
  'attention/query': 'blk.{block}.attn_q',
  'attention/key': 'blk.{block}.attn_k',
  'attention/value': 'blk.{block}.attn_v',
  'attention/out': 'blk.{block}.attn_output',
  'attention_norm': 'blk.{block}.attn_output_norm',
  'mlp/up': 'blk.{block}.ffn_up',
  'mlp/down': 'blk.{block}.ffn_down',
  'mlp_norm': 'blk.{block}.layer_output_norm',
}


def huggingface(config: Config, checkpoint: Checkpoint) -> tuple[Table, Table]:
  """The tables of a Hugging Face folder, for the whole model and for a block.

  A model with a head has its encoder behind a prefix, such as 'bert.'; old
  files call scales and biases of norms gamma and beta.

  Raises:
    CheckpointMismatch: for a checkpoint of another family.
  """
  prefix = _prefix(checkpoint)
  old = f'{prefix}embeddings.LayerNorm.gamma' in checkpoint
  is_distilbert = any(
    name.startswith(f'{prefix}transformer.layer.') for name in checkpoint
  )
  end = config.offset + config.context
  whole = {
    'embed/embedding': Source(prefix + _WORDS),
    'positions/embedding': Source(
      f'{prefix}embeddings.position_embeddings.weight',
      rows=Rows(config.offset, end, end),
    ),
    'types/embedding': Source(
      f'{prefix}embeddings.token_type_embeddings.weight'
    ),
    **_norm('norm', f'{prefix}embeddings.LayerNorm', old),
    **_linear('pooler', f'{prefix}pooler.dense'),
  }
  names = _DISTILBERT if is_distilbert else _BLOCK
  return whole, _block(names, prefix, old)


def harmless(checkpoint: Checkpoint) -> re.Pattern[str]:
  """Names of tensors of a Hugging Face folder that the tables leave out.

  Whatever is no part of the encoder comes after it: heads, and a pooler that
  the model does not have.
  """
  encoder = re.escape(_prefix(checkpoint)) + r'(embeddings|encoder|transformer)'
  counted = r'.*\.(position_ids|token_type_ids)'
  scales = r'.*\.(input_scale|input_global_scale)'
  return re.compile(rf'(?!{encoder}\.).*|{counted}|{scales}')


# The same of a GGUF file: a classifier of the whole sequence.
GGUF_HARMLESS = re.compile(r'cls(\.output)?\.(weight|bias)')


def _prefix(checkpoint: Checkpoint) -> str:
  found = [name for name in checkpoint if name.endswith(_WORDS)]
  if len(found) != 1:
    raise CheckpointMismatch(
      f'{checkpoint.path!r} has {len(found)} tensors {"..." + _WORDS!r}, and a'
      ' model of the BERT family has one; is it of another architecture?'
    )
  return found[0].removesuffix(_WORDS)


def gguf() -> tuple[Table, Table]:
  """The tables of a GGUF file, for the whole model and for a block."""
  whole = {
    'embed/embedding': Source('token_embd.weight'),
    'positions/embedding': Source('position_embd.weight'),
    'types/embedding': Source('token_types.weight'),
    **_norm('norm', 'token_embd_norm'),
  }
  return whole, _block(_GGUF)


def _block(
  names: Mapping[str, str], prefix: str = '', old: bool = False
) -> Table:
  table: dict[str, Source] = {}
  for path, name in names.items():
    if path.endswith('norm'):
      table |= _norm(path, prefix + name, old)
    else:
      table |= _linear(path, prefix + name)
  return table


def _linear(path: str, name: str) -> dict[str, Source]:
  return {
    f'{path}/kernel': Source(f'{name}.weight'),
    f'{path}/bias': Source(f'{name}.bias'),
  }


def _norm(path: str, name: str, old: bool = False) -> dict[str, Source]:
  scale, bias = ('gamma', 'beta') if old else ('weight', 'bias')
  return {
    f'{path}/scale': Source(f'{name}.{scale}'),
    f'{path}/bias': Source(f'{name}.{bias}'),
  }
