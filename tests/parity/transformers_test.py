"""Models that `export` and `gguf.save` write, loaded by transformers.

A tiny LLaMA of random weights is quantized, written, and loaded again; it must
be the dense model of the dequantized weights.
"""

import functools
import os
import warnings

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import gguf, safetensors
from tests import checkpoints
from tests.parity import packages

pytestmark = pytest.mark.slow

_int4_bfloat16 = formats.grouped(formats.int4, 32, formats.bfloat16)
_int8_bfloat16 = formats.per_channel(formats.int8, formats.bfloat16)
_e4m3fn_bfloat16 = formats.per_channel(formats.e4m3fn, formats.bfloat16)
# Scales are loaded in the dtype of the model.
FLOAT32 = (
  *(formats.int4_g32, formats.get('int8_g32'), formats.int8_channel),
  *(formats.grouped(formats.get('int3'), 64), formats.int8_tensor),
  *(formats.e4m3fn_channel, formats.e4m3fn_tensor, formats.fp8_128x128),
)
# Layouts with scales of 8 bits are decompressed to bfloat16.
BFLOAT16 = (
  *(_int4_bfloat16, _int8_bfloat16, _e4m3fn_bfloat16),
  *(formats.nvfp4, formats.mxfp4, formats.mxfp6_e2m3, formats.mxfp8_e4m3),
)
# Names of the layers of a LLaMA here and in GGUF files.
NAMES = {
  'model.layers.': 'blk.',
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
}
HEADS = {'attn_q': 4, 'attn_k': 2}
GGUF = ('int8_g32_float16', 'uint4_g32_min_float16', 'q4_k', 'q6_k', 'mxfp4')


class ModelTest(checkpoints.FolderTest):
  def path_of(self, name) -> str:
    return os.path.join(self.folder, name)

  def make(self, dtype, hidden_size):
    """Writes the folder 'model'; gives its configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
      vocab_size=96,
      hidden_size=hidden_size,
      intermediate_size=2 * hidden_size,
      num_hidden_layers=2,
      num_attention_heads=HEADS['attn_q'],
      num_key_value_heads=HEADS['attn_k'],
      max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(self.path_of('model'))
    return config

  def load(self, folder, dtype, **options):
    """A model of which each tensor was found, and nothing else was there."""
    import torch
    import transformers

    with warnings.catch_warnings():
      # That options of loading take the place of those in the file.
      warnings.filterwarnings('ignore', 'You passed `quantization_config`')
      model, report = transformers.AutoModelForCausalLM.from_pretrained(
        self.path_of(folder),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        **options,
      )
    self.assertEqual({k: v for k, v in report.items() if v}, {})
    return model

  def assert_same_models(self, actual, expected, *, edges=False):
    """Whether two models have equal weights, and then equal logits.

    Args:
      actual: a model that was quantized; its first call decompresses it.
      expected: the dense model.
      edges: whether the two may round a number at an edge apart.
    """
    import torch

    ids = torch.tensor([[1, 5, 90, 33, 7, 7, 2, 64]])
    with torch.no_grad():
      logits = [model(ids).logits for model in (actual, expected)]
    weights = dict(actual.named_parameters())
    for name, x in expected.named_parameters():
      x, y = (t.detach().float().numpy() for t in (x, weights[name]))
      np.testing.assert_allclose(y, x, rtol=2**-7 if edges else 0, atol=0)
    if not edges:
      self.assertTrue(torch.equal(*logits))


@packages.needs('torch', 'transformers', 'compressed_tensors')
class ExportedTest(ModelTest):
  """Folders of compressed-tensors."""

  def write(self, dtype, format_of, **options):
    """Writes 'packed' and, of what it stands for, 'dense'; gives the former.

    Args:
      dtype: of the model.
      format_of: from the name of a weight of a linear layer to its format.
      **options: of `export`.
    """
    self.make(dtype, 64)
    source = self.path_of('model')
    packed, dense = {}, {}
    with safetensors.open(source) as checkpoint:
      for name, x in checkpoint.items():
        packed[name] = dense[name] = x
        if name.endswith('_proj.weight'):
          packed[name] = lowbit.quantize(x, format_of(name))
          dense[name] = lowbit.dequantize(packed[name])
    safetensors.export(self.path_of('packed'), packed, source, **options)
    safetensors.export(self.path_of('dense'), dense, source)
    return packed

  @parameterized.parameters(*FLOAT32)
  def test_float32(self, fmt):
    self.write('float32', lambda name: fmt)
    dense = self.load('dense', 'float32')
    self.assert_same_models(self.load('packed', 'float32'), dense)

  @parameterized.parameters(*BFLOAT16)
  def test_bfloat16(self, fmt):
    self.write('bfloat16', lambda name: fmt)
    dense = self.load('dense', 'bfloat16')
    packed = self.load('packed', 'bfloat16')
    self.assert_same_models(packed, dense, edges=fmt == formats.nvfp4)

  def test_zero_points(self):
    # Unless it dequantizes while it loads, compressed-tensors 0.20 makes no
    # room for packed zero points, those of its own files included.
    import transformers

    config = transformers.CompressedTensorsConfig(dequantize=True)
    self.write('float32', lambda name: formats.uint4_g32)
    packed = self.load('packed', 'float32', quantization_config=config)
    self.assert_same_models(packed, self.load('dense', 'float32'))

  def test_mixed_precision_in_shards(self):
    def format_of(name):
      return formats.int4_g32 if 'mlp' in name else formats.e4m3fn_channel

    self.write('float32', format_of, shard_bytes=40_000)
    index = self.path_of('packed/model.safetensors.index.json')
    self.assertTrue(os.path.exists(index))
    packed = self.load('packed', 'float32')
    self.assert_same_models(packed, self.load('dense', 'float32'))

  @parameterized.parameters(
    (formats.int4_g32,), (formats.e4m3fn_channel,), (formats.fp8_128x128,)
  )
  def test_what_transformers_saves_again(self, fmt):
    before = self.write('float32', lambda name: fmt)
    self.load('packed', 'float32').save_pretrained(self.path_of('again'))
    with safetensors.open(self.path_of('again')) as after:
      self.assertCountEqual(after, before)
      for name in before:
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])


def interleaved(weight, heads):
  """Rows in the order of GGUF files, for rotary embeddings of pairs."""
  rows = weight.reshape(heads, 2, -1, weight.shape[-1])
  return rows.swapaxes(1, 2).reshape(weight.shape)


def halves(weight, heads):
  """The inverse of `interleaved`."""
  rows = weight.reshape(heads, -1, 2, weight.shape[-1])
  return rows.swapaxes(1, 2).reshape(weight.shape)


@packages.needs('torch', 'transformers', 'accelerate', 'gguf')
class GgufTest(ModelTest):
  """GGUF files."""

  def write(self, fmt):
    """Writes 'gguf/model.gguf' and, of what it stands for, 'dense'."""
    config = self.make('float32', 256)
    packed, dense = {}, {}
    with safetensors.open(self.path_of('model')) as checkpoint:
      for name, x in checkpoint.items():
        stored = functools.reduce(
          lambda text, pair: text.replace(*pair), NAMES.items(), name
        )
        packed[stored] = dense[name] = x
        if name.endswith('_proj.weight'):
          heads = HEADS.get(stored.split('.')[2])
          q = lowbit.quantize(interleaved(x, heads) if heads else x, fmt)
          y = np.asarray(lowbit.dequantize(q))
          packed[stored] = q
          dense[name] = halves(y, heads) if heads else y
    safetensors.export(self.path_of('dense'), dense, self.path_of('model'))
    os.mkdir(self.path_of('gguf'))
    metadata = {
      'block_count': config.num_hidden_layers,
      'context_length': config.max_position_embeddings,
      'embedding_length': config.hidden_size,
      'feed_forward_length': config.intermediate_size,
      'attention.head_count': HEADS['attn_q'],
      'attention.head_count_kv': HEADS['attn_k'],
      'attention.layer_norm_rms_epsilon': config.rms_norm_eps,
      'rope.freq_base': 10_000.0,
      'vocab_size': config.vocab_size,
    }
    metadata = {f'llama.{key}': value for key, value in metadata.items()}
    metadata['general.architecture'] = 'llama'
    gguf.save(self.path_of('gguf/model.gguf'), packed, metadata=metadata)

  @parameterized.parameters(*GGUF)
  def test_models(self, name):
    self.write(formats.get(name))
    packed = self.load('gguf', 'float32', gguf_file='model.gguf')
    self.assert_same_models(packed, self.load('dense', 'float32'))


if __name__ == '__main__':
  absltest.main()
