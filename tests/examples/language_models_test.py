"""Loading language models: what is refused, and parts for devices of a mesh."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import Mesh

import lowbit_jax as lowbit
from lowbit_jax.io import gguf, safetensors
from models import llama_config
from models.llama_config import ConfigError
from support import language_models
from support.weights import CheckpointMismatch
from tests.examples import families

_ROPE = {'rope_type': 'yarn', 'factor': 4.0}


class ConfigTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('model_type', 'llama2', {'model_type': 'gpt2'}, "'gpt2'.*'mixtral'"),
    ('no_model_type', 'llama2', {'model_type': None}, 'model_type is missing'),
    ('activation', 'llama2', {'hidden_act': 'gelu'}, "'gelu'.*'silu'"),
    ('missing', 'llama2', {'rms_norm_eps': None}, 'rms_norm_eps is missing'),
    ('text', 'llama2', {'hidden_size': '64'}, "hidden_size is '64'"),
    ('truth', 'llama2', {'hidden_size': True}, 'hidden_size is True'),
    ('fraction', 'llama2', {'vocab_size': 9.5}, 'vocab_size is 9.5'),
    ('zero', 'llama2', {'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ('not_a_number', 'llama2', {'rms_norm_eps': float('nan')}, 'is nan'),
    ('flag', 'llama2', {'tie_word_embeddings': 1}, 'is 1; .*true or false'),
    ('heads', 'llama2', {'num_attention_heads': 5}, '64; .* of 5 heads'),
    ('groups', 'llama2', {'num_key_value_heads': 3}, 'kv_heads=3'),
    ('odd_head', 'llama2', {'head_dim': 15}, '15 channels'),
    ('partial', 'llama2', {'partial_rotary_factor': 0.5}, "1 for 'llama'"),
    ('rope', 'llama2', {'rope_scaling': {'type': 'dynamic'}}, "'dynamic'"),
    ('rope_kind', 'llama2', {'rope_scaling': 4}, 'rope_scaling is 4'),
    (
      'factor',
      'llama2',
      {'rope_scaling': {'type': 'linear'}},
      'factor is miss',
    ),
    (
      'rope_by_layer',
      'llama2',
      {'rope_parameters': {'full_attention': {}}},
      'full_attention is an object',
    ),
    (
      'truncate',
      'llama2',
      {'rope_scaling': {**_ROPE, 'truncate': False}},
      'truncate is False',
    ),
    (
      'unknown_of_rope',
      'llama2',
      {'rope_scaling': {**_ROPE, 'long_mscale': 1.25}},
      'rope_scaling/long_mscale is 1.25',
    ),
    (
      'two_contexts',
      'llama2',
      {
        'rope_scaling': {**_ROPE, 'original_max_position_embeddings': 8},
        'original_max_position_embeddings': 16,
      },
      'embeddings is 16; .*the same',
    ),
    (
      'few_factors',
      'phi3_long',
      {'partial_rotary_factor': 0.5},
      'short_factor is .*4 numbers',
    ),
    ('window', 'mistral', {'sliding_window': -1}, 'sliding_window is -1'),
    ('layers', 'qwen3', {'layer_types': ['full_attention']}, 'layer_types is'),
    ('no_window', 'qwen3', {'use_sliding_window': False}, 'layer_types is'),
    ('no_base', 'qwen2', {'rope_theta': None}, 'rope_theta is missing'),
    ('few', 'smollm3_listed', {'no_rope_layers': [1]}, 'no_rope_layers is'),
    ('step', 'qwen3_moe', {'decoder_sparse_step': 2}, 'sparse_step is 2'),
    ('plain', 'qwen3_moe', {'mlp_only_layers': [0]}, r'only_layers is \[0\]'),
    ('chosen', 'mixtral', {'num_experts_per_tok': 5}, 'chosen=5.*experts=4'),
  )
  def test_refuses(self, case, change, message):
    config = {**families.CASES[case], **change}
    with self.assertRaisesRegex(ConfigError, message):
      llama_config.from_huggingface(config)

  def test_window_of_mistral_must_be_said(self):
    config = dict(families.CASES['mistral'])
    del config['sliding_window']
    with self.assertRaisesRegex(ConfigError, 'sliding_window is missing'):
      llama_config.from_huggingface(config)
    config = llama_config.from_huggingface({**config, 'sliding_window': None})
    self.assertEqual(config.windows, ())

  @parameterized.named_parameters(
    ('architecture', {'general.architecture': 'gemma'}, "'gemma'.*'qwen3moe'"),
    ('missing', {'llama.block_count': None}, 'llama.block_count is missing'),
    ('list', {'llama.attention.head_count': np.array([4, 4])}, 'head_count is'),
    ('unknown', {'llama.attention.scale': 0.5}, 'attention.scale is 0.5'),
    ('scaling', {'llama.rope.scaling.type': 'ntk'}, "'ntk'.*'yarn'"),
    ('long', {'llama.rope.scaling.type': 'longrope'}, 'factors_long.*missing'),
    ('values', {'llama.attention.value_length': 8}, 'value_length is 8'),
    ('sigmoid', {'llama.expert_gating_func': 2}, 'gating_func is 2'),
  )
  def test_refuses_in_gguf(self, change, message):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = families.write_gguf(folder / 'a.gguf', families.CASES['llama2'])
    with gguf.open(path) as checkpoint:
      metadata = checkpoint.metadata | change
      metadata = {k: v for k, v in metadata.items() if v is not None}
      gguf.save(folder / 'b.gguf', dict(checkpoint), metadata=metadata)
    path = str(folder / 'b.gguf')
    with self.assertRaisesRegex(ConfigError, f'b.gguf.*{message}'):
      language_models.load(path)

  def test_what_is_off_in_gguf_may_be_there(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = families.write_gguf(folder / 'a.gguf', families.CASES['llama2'])
    with gguf.open(path) as checkpoint:
      checkpoint.metadata['llama.attention.scale'] = np.float32(0)
      self.assertEqual(llama_config.from_gguf(checkpoint).blocks, 2)


class RefusalTest(parameterized.TestCase):
  def folder(self, case, change=lambda tensors: tensors):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    families.write(folder, families.CASES[case])
    tensors = change(families.weights(families.CASES[case]))
    path = folder / 'model.safetensors'
    safetensors.save(path, tensors, overwrite=True)
    return folder

  @parameterized.named_parameters(
    ('missing', 'llama2', 'model.layers.1.mlp.up_proj.weight', None, 'no tens'),
    ('whole', 'llama2', 'lm_head.weight', None, 'has no tensor'),
    ('shape', 'llama2', 'model.norm.weight', (32,), r'\(32,\).*needs \(64,\)'),
    ('unknown', 'llama2', 'model.extra.weight', (4,), 'has a tensor'),
    ('bias', 'llama2', 'model.layers.0.mlp.up_proj.bias', (96,), 'has a tens'),
    ('third', 'llama2', 'model.layers.2.mlp.up_proj.weight', (96, 64), 'has a'),
    (
      'fused',
      'phi3_long',
      'model.layers.0.self_attn.qkv_proj.weight',
      (160, 64),
      r'\(160, 64\).*needs \(128, 64\)',
    ),
    (
      'expert',
      'mixtral',
      'model.layers.1.block_sparse_moe.experts.3.w2.weight',
      (96, 64),
      r'\(96, 64\).*needs \(64, 96\)',
    ),
  )
  def test_tensors(self, case, name, shape, message):
    def change(tensors):
      tensors = {**tensors, name: np.ones(shape or (), np.float32)}
      return {k: v for k, v in tensors.items() if k != name or shape}

    folder = self.folder(case, change)
    pattern = (
      f'{folder.name}.*{name}.*{message}|{folder.name}.*{message}.*{name}'
    )
    with self.assertRaisesRegex(CheckpointMismatch, pattern):
      language_models.load(folder)

  def test_harmless_tensors(self):
    def change(tensors):
      block = 'model.layers.0.self_attn'
      extra = {f'{block}.rotary_emb.inv_freq': np.ones(8, np.float32)}
      extra |= {f'{block}.k_scale': np.ones((), np.float32)}
      return tensors | extra | {'lm_head.weight': np.ones((96, 64), np.float32)}

    model = language_models.load(self.folder('llama3', change)).model
    self.assertIsNone(model.head)

  def test_paths(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / 'a.gguf').write_bytes(b'')
    with self.assertRaisesRegex(FileNotFoundError, "config.json.*'a.gguf'"):
      language_models.load(folder)
    with self.assertRaisesRegex(FileNotFoundError, 'nowhere'):
      language_models.load(folder / 'nowhere')
    with self.assertRaisesRegex(ValueError, 'a.gguf.*too few'):
      language_models.load(folder / 'a.gguf')
    with self.assertRaisesRegex(ValueError, 'name its folder'):
      language_models.load(folder / 'model.safetensors')
    for text, message in (('{', 'no JSON'), ('[]', 'no JSON object')):
      (folder / 'config.json').write_text(text)
      with self.assertRaisesRegex(ConfigError, f'config.json.*{message}'):
        language_models.load(folder)
    (folder / 'config.json').write_text(json.dumps(families.CASES['llama2']))
    with self.assertRaisesRegex(FileNotFoundError, 'safetensors'):
      language_models.load(folder)

  def test_mesh_needs_its_axis(self):
    mesh = Mesh(np.array(jax.devices()[:2]), ('data',))
    with self.assertRaisesRegex(ValueError, "axis 'model'"):
      language_models.load('nowhere', mesh=mesh)


def quantized(case: str) -> dict[str, Any]:
  """The tensors with the kernels of blocks in MXFP4."""
  fmt = lowbit.formats.mxfp4
  return {
    name: lowbit.quantize(w, fmt) if w.ndim == 2 and 'layers' in name else w
    for name, w in families.weights(families.CASES[case]).items()
  }


def leaves(model: nnx.Module) -> dict[str, jax.Array]:
  values = {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }
  flat = jax.tree.flatten_with_path(values)[0]
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


class ShardedTest(parameterized.TestCase):
  def folder(self, case, tensors):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    families.write(folder, families.CASES[case])
    path = folder / 'model.safetensors'
    safetensors.save(path, tensors, overwrite=True)
    return folder

  def check(self, case, tensors, devices, share):
    """Parameters on a mesh are those on one device, in parts."""
    folder = self.folder(case, tensors)
    mesh = Mesh(np.array(jax.devices()[:devices]), ('model',))
    model = language_models.load(folder, mesh=mesh).model
    found, expected = leaves(model), leaves(language_models.load(folder).model)
    self.assertEqual(found.keys(), expected.keys())
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value, name)
    parts = sum(x.addressable_shards[0].data.nbytes for x in found.values())
    self.assertLess(parts, share * sum(x.nbytes for x in found.values()))
    return model, mesh

  @parameterized.named_parameters(
    ('packed', 'llama3', quantized('llama3')),
    ('experts', 'qwen3_moe', quantized('qwen3_moe')),
    ('fewer_experts_than_devices', 'mixtral', quantized('mixtral')),
  )
  def test_each_device_has_its_part(self, case, tensors):
    self.check(case, tensors, 8, 0.2)

  def test_parts_are_whole_blocks(self):
    model, _ = self.check('phi3_long', quantized('phi3_long'), 2, 0.56)
    block = model.stacks[0]
    inputs = block.attention.out.kernel.get_raw_value().codes.sharding.spec
    self.assertEqual(inputs[:2], (None, 'model'))
    # Half of the 96 inputs are no whole blocks of 32: the outputs are split.
    outputs = block.mlp.down.kernel.get_raw_value().codes.sharding.spec
    self.assertEqual(outputs[:3], (None, None, 'model'))

  def logits(self, model, state=None):
    graph, parameters = nnx.split(model)

    @jax.jit
    def logits(state, tokens):
      return nnx.merge(graph, state)(tokens)

    state = parameters if state is None else state
    return np.asarray(logits(state, families.tokens()))

  def check_near(self, logits, expected):
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    self.assertLess(error, 2e-5)

  def test_logits(self):
    tensors = families.weights(families.CASES['llama3'])
    model, mesh = self.check('llama3', tensors, 8, 0.15)
    with jax.set_mesh(mesh):
      logits = self.logits(model)
    path = pathlib.Path(__file__).parents[1] / 'golden' / 'llama_families.npz'
    with np.load(path) as golden:
      self.check_near(logits, golden['llama3'])

  @parameterized.parameters('phi3_long', 'qwen2', 'mixtral', 'qwen3_moe')
  @pytest.mark.slow
  def test_logits_of_packed_parts(self, case):
    model, mesh = self.check(case, quantized(case), 8, 0.2)
    single = jax.device_put(nnx.state(model), jax.devices()[0])
    expected = self.logits(model, single)
    with jax.set_mesh(mesh):
      self.check_near(self.logits(model), expected)


# Loads the model of a folder over two processes, and says what they hold: the
# bytes of all parameters, of those on its device, and the most that NumPy had.
_PROCESS = """
import json, sys, tracemalloc
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from support import language_models
from tests.examples import families
language_models.load(sys.argv[3])  # what is imported and traced only once
mesh = Mesh(np.array(jax.devices()), ('model',))
tracemalloc.start()
model = language_models.load(sys.argv[3], mesh=mesh).model
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
leaves = jax.tree.leaves(nnx.state(model))
own = sum(x.addressable_data(0).nbytes for x in leaves)
graph, state = nnx.split(model)
with jax.set_mesh(mesh):
  logits = jax.jit(
    lambda state, tokens: nnx.merge(graph, state)(tokens),
    out_shardings=jax.NamedSharding(mesh, jax.P()),
  )(state, families.tokens())
logits = np.asarray(logits.addressable_data(0))
total = sum(x.nbytes for x in leaves)
np.save(sys.argv[4], logits)
print(json.dumps([len(jax.devices()), total, own, peak]))
"""


class ProcessesTest(absltest.TestCase):
  @pytest.mark.slow
  def test_no_process_holds_the_whole(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    config = {
      **families.CASES['llama2'],
      'hidden_size': 512,
      'intermediate_size': 1536,
      'num_hidden_layers': 6,
    }
    families.write(folder, config)
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(sys.path), 'XLA_FLAGS': ''
    }  # fmt: skip
    files = [folder / f'{i}.npy' for i in range(2)]
    processes = [
      subprocess.Popen(
        [sys.executable, '-c', _PROCESS, f'localhost:{port}', str(i)]
        + [str(folder), str(files[i])],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
      )
      for i in range(2)
    ]
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    model = language_models.load(folder).model
    expected = np.asarray(model(families.tokens()))
    for output, file in zip(outputs, files, strict=True):
      devices, total, own, peak = json.loads(output.splitlines()[-1])
      self.assertEqual(devices, 2)
      self.assertLess(own, 0.51 * total)
      # Its half, which NumPy made, and one parameter as it was read.
      self.assertLess(peak, 0.6 * total)
      error = np.abs(np.load(file) - expected).max() / np.abs(expected).max()
      self.assertLess(error, 2e-5)


if __name__ == '__main__':
  absltest.main()
