"""Tests of examples/quantize_checkpoint.py and the modules beside it."""

import errno
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import unittest
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, parameterized
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import gguf, safetensors
from models import llama_config
from support import conversion, weights
from tests.examples import scripts

script = scripts.load('quantize_checkpoint')

_LINEARS = ('self_attn.q_proj', 'self_attn.o_proj')
_METADATA = {
  'general.architecture': 'llama',
  'general.file_type': np.uint32(3),
  'llama.rope.freq_base': np.float32(1e4),
  'tokenizer.ggml.tokens': ['a', 'b'],
  'tokenizer.ggml.token_type': np.array([1, 3], np.int32),
  'quantize.imatrix.file': 'text.dat',
  'general.quantization_version': np.uint32(2),
}


def _normal(seed, shape, dtype):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _folder_tensors():
  dtype = ml_dtypes.bfloat16
  tensors = {
    f'model.layers.{k}.{name}.weight': _normal(2 * k + i, (8, 256), dtype)
    for k in range(2)
    for i, name in enumerate(_LINEARS)
  }
  tensors['model.layers.0.input_layernorm.weight'] = np.ones(256, dtype)
  tensors['model.layers.1.mlp.gate.weight'] = _normal(7, (4, 256), dtype)
  tensors['model.embed_tokens.weight'] = _normal(8, (16, 256), dtype)
  tensors['lm_head.weight'] = _normal(9, (16, 160), dtype)
  return tensors


def _gguf_tensors():
  fmt = formats.get('uint4_g32_min_float16')
  packed = lowbit.quantize(_normal(1, (8, 256), np.float32), fmt)
  return {
    'token_embd.weight': _normal(0, (16, 256), np.float16),
    'blk.0.attn_q.weight': jax.device_get(packed),
    'blk.0.ffn_gate_exps.weight': _normal(2, (2, 4, 256), np.float32),
    'blk.0.ffn_gate_inp.weight': _normal(3, (2, 256), np.float32),
    'output_norm.weight': np.ones(256, np.float32),
  }


_GGUF_LINEARS = ('blk.0.attn_q.weight', 'blk.0.ffn_gate_exps.weight')


def _quantized(leaf, name):
  x = lowbit.dequantize(leaf) if isinstance(leaf, lowbit.QArray) else leaf
  return lowbit.quantize(x, formats.get(name))


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.home = pathlib.Path(folder)
    self.out = self.home / 'out'

  def write_folder(self):
    """A folder of two files, with an index and a tokenizer."""
    folder = self.home / 'model'
    folder.mkdir()
    tensors = _folder_tensors()
    index = {}
    for k in range(2):
      file = f'model-{k + 1:05}-of-00002.safetensors'
      part = {n: x for i, (n, x) in enumerate(tensors.items()) if i % 2 == k}
      safetensors.save(folder / file, part)
      index |= dict.fromkeys(part, file)
    self.write_json(
      folder / 'model.safetensors.index.json', {'weight_map': index}
    )
    self.write_json(folder / 'config.json', {'model_type': 'llama'})
    (folder / 'tokenizer.json').write_text('{"version": "1.0"}')
    return folder, tensors

  def write_gguf(self):
    path = self.home / 'model.gguf'
    tensors = _gguf_tensors()
    gguf.save(path, tensors, metadata=_METADATA)
    return path, tensors

  def write_json(self, path, node):
    path.write_text(json.dumps(node))

  def run_script(self, model, *more, fmt='mxfp4', out=None):
    out = out or self.out
    return scripts.run(
      script, f'--model={model}', f'--out={out}', f'--format={fmt}', *more
    )

  def convert(self, *arguments, **options):
    status, printed = self.run_script(*arguments, **options)
    self.assertEqual(status, 0, printed)
    return printed

  def assert_refused(self, message, *arguments, **options):
    before = sorted(self.home.rglob('*'))
    status, printed = self.run_script(*arguments, **options)
    self.assertEqual(status, 1, printed)
    self.assertRegex(printed, message)
    self.assertNotIn('Traceback', printed)
    self.assertEqual(sorted(self.home.rglob('*')), before)

  def assert_same(self, actual, expected):
    self.assertEqual(
      jax.tree.structure(actual), jax.tree.structure(expected), expected
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


class FolderTest(CheckpointTest):
  def test_linear_layers_are_quantized_and_all_else_goes_along(self):
    folder, tensors = self.write_folder()
    printed = self.convert(folder)
    self.assertIn('mxfp4-pack-quantized', printed)
    with safetensors.open(self.out) as result:
      self.assertEqual(result.keys(), tensors.keys())
      for name, x in tensors.items():
        is_linear = any(linear in name for linear in _LINEARS)
        if is_linear:
          # compressed-tensors does not say which floats they were.
          expected = _quantized(x, 'mxfp4').astype(np.float32)
        else:
          expected = x
        self.assert_same(result[name], expected)
    config = json.loads((self.out / 'config.json').read_text())
    self.assertEqual(config['model_type'], 'llama')
    self.assertEqual(
      config['quantization_config']['quant_method'], 'compressed-tensors'
    )
    self.assertEqual(
      (self.out / 'tokenizer.json').read_text(), '{"version": "1.0"}'
    )
    self.assertEqual(
      {path.name for path in self.home.iterdir()}, {'model', 'out'}
    )

  def test_other_modules_go_along(self):
    folder, _ = self.write_folder()
    (folder / '1_Pooling').mkdir()
    (folder / '1_Pooling' / 'config.json').write_text('{}')
    paths = [{'path': p} for p in ('', '1_Pooling', '1_Pooling', '../x')]
    self.write_json(folder / 'modules.json', [*paths, {'type': 'Normalize'}])
    self.convert(folder)
    self.assertEqual((self.out / '1_Pooling/config.json').read_text(), '{}')
    self.write_json(folder / 'modules.json', {})
    self.assertEqual(self.run_script(folder, out=self.home / 'b')[0], 1)

  def test_own_layout_and_passing_on(self):
    folder, tensors = self.write_folder()
    self.convert(folder)
    second = self.home / 'second'
    name = 'model.layers.0.self_attn.q_proj.weight'
    self.enterContext(mock.patch.object(conversion, 'CHUNK', 3 * 256))
    self.convert(
      *(self.out, '--layout=own', rf'--select={name}'), out=second, fmt='mxint8'
    )
    with (
      safetensors.open(self.out) as before,
      safetensors.open(second) as result,
    ):
      self.assertEqual(result.keys(), tensors.keys())
      for other in tensors.keys() - {name}:
        self.assert_same(result[other], before[other])
      self.assert_same(result[name], _quantized(before[name], 'mxint8'))
    config = json.loads((second / 'config.json').read_text())
    self.assertEqual(config, {'model_type': 'llama'})
    self.assertTrue((second / 'tokenizer.json').exists())
    self.assert_refused(
      f"'{name}'.*no layout", second, fmt='none', out=self.home / 'third'
    )


class GgufTest(CheckpointTest):
  @parameterized.parameters(('mxfp4', 38), ('int4_g32_float16', 2))
  def test_quantized_with_its_metadata(self, fmt, file_type):
    model, tensors = self.write_gguf()
    out = self.home / 'out.gguf'
    self.convert(model, fmt=fmt, out=out)
    with gguf.open(out) as result:
      self.assertEqual(list(result), list(tensors))
      for name, x in tensors.items():
        expected = _quantized(x, fmt) if name in _GGUF_LINEARS else x
        self.assert_same(result[name], expected)
      metadata = dict(result.metadata)
    self.assertEqual(metadata.pop('general.file_type'), file_type)
    expected = dict(_METADATA)
    for key in ('general.file_type', 'quantize.imatrix.file'):
      del expected[key]
    self.assertEqual(list(metadata), list(expected))
    for key, value in expected.items():
      np.testing.assert_array_equal(metadata[key], value)
      self.assertEqual(type(metadata[key]), type(value))

  def test_one_weight_of_many_does_not_change_the_file_type(self):
    model, tensors = self.write_gguf()
    out = self.home / 'out.gguf'
    select = '--select=attn_q'
    self.convert(model, select, fmt='int4_g32_float16', out=out)
    with gguf.open(out) as result:  # most matrices are as they were
      self.assertEqual(result.metadata['general.file_type'], 3)
      self.assert_same(
        result['blk.0.ffn_gate_exps.weight'],
        tensors['blk.0.ffn_gate_exps.weight'],
      )

  def test_without_a_format_the_bytes_are_the_same(self):
    model, _ = self.write_gguf()
    out = self.home / 'out.gguf'
    self.convert(model, fmt='none', out=out)
    self.assertEqual(out.read_bytes(), model.read_bytes())


_WIDTH, _HEADS = 32, 2
_LLAMA = {
  'general.architecture': 'llama',
  'llama.block_count': 2,
  'llama.context_length': 64,
  'llama.embedding_length': _WIDTH,
  'llama.feed_forward_length': 64,
  'llama.attention.head_count': _HEADS,
  'llama.attention.head_count_kv': 1,
  'llama.attention.layer_norm_rms_epsilon': np.float32(1e-5),
  'llama.rope.freq_base': np.float32(1e5),
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': ['a', 'b', 'ab', '<|im_end|>'],
  'tokenizer.ggml.token_type': np.array([1, 1, 1, 3], np.int32),
  'tokenizer.ggml.merges': ['a b'],
  'tokenizer.ggml.bos_token_id': np.uint32(3),
  'tokenizer.ggml.eos_token_id': np.uint32(3),
  'tokenizer.ggml.add_bos_token': np.bool_(True),
  'tokenizer.chat_template': '{{ messages }}',
}
_OF_BLOCK = {
  'attn_norm': ('input_layernorm', (_WIDTH,)),
  'attn_q': ('self_attn.q_proj', (_WIDTH, _WIDTH)),
  'attn_k': ('self_attn.k_proj', (_WIDTH // 2, _WIDTH)),
  'attn_v': ('self_attn.v_proj', (_WIDTH // 2, _WIDTH)),
  'attn_output': ('self_attn.o_proj', (_WIDTH, _WIDTH)),
  'ffn_norm': ('post_attention_layernorm', (_WIDTH,)),
  'ffn_gate': ('mlp.gate_proj', (64, _WIDTH)),
  'ffn_up': ('mlp.up_proj', (64, _WIDTH)),
  'ffn_down': ('mlp.down_proj', (_WIDTH, 64)),
}


def _llama_tensors():
  """Tensors of a GGUF file, and their names in a folder."""
  names = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm'}
  shapes = {'token_embd': (4, _WIDTH), 'output_norm': (_WIDTH,)}
  for k in range(2):
    for name, (other, shape) in _OF_BLOCK.items():
      names[f'blk.{k}.{name}'] = f'model.layers.{k}.{other}'
      shapes[f'blk.{k}.{name}'] = shape
  tensors = {
    f'{name}.weight': _normal(i, shape, np.float32)
    for i, (name, shape) in enumerate(shapes.items())
  }
  return tensors, {f'{a}.weight': f'{b}.weight' for a, b in names.items()}


class LlamaTest(CheckpointTest):
  def write_llama(self, *left_out, **changes):
    model = self.home / 'model.gguf'
    tensors, names = _llama_tensors()
    kept = {k: x for k, x in tensors.items() if k not in left_out}
    gguf.save(model, kept, metadata=_LLAMA | changes)
    return model, tensors, names


class TranslationTest(LlamaTest):
  """From a GGUF file to a folder."""

  @unittest.skipUnless(importlib.util.find_spec('tokenizers'), 'no tokenizers')
  def test_names_rows_configuration_and_tokenizer(self):
    from support import tokenizer

    model, tensors, names = self.write_llama()
    self.convert(model, fmt='none')
    with safetensors.open(self.out) as result:
      self.assertCountEqual(result, names.values())
      for name, other in names.items():
        x = tensors[name]
        if 'attn_q' in name or 'attn_k' in name:
          # Neighbouring channels of a head come half a head apart.
          rows = x.reshape(-1, 8, 2, _WIDTH).swapaxes(1, 2)
          x = rows.reshape(x.shape)
        self.assert_same(result[other], x)
    node = json.loads((self.out / 'config.json').read_text())
    self.assertEqual(node['architectures'], ['LlamaForCausalLM'])
    config = llama_config.from_huggingface(node)
    self.assertEqual((config.kv_heads, config.head_size), (1, 16))
    self.assertEqual(
      (config.rope.base, config.epsilon), (1e5, np.float32(1e-5))
    )
    self.assertTrue(config.tied)
    before, after = tokenizer.from_gguf(_LLAMA), tokenizer.from_folder(self.out)
    self.assertEqual(after.encode('ab<|im_end|>'), [2, 3])
    self.assertEqual(after.model.encode('ab').ids, [3, 2])  # as LLaMA begins
    self.assertEqual(
      (after.bos, after.eos, after.chat_template),
      (before.bos, before.eos, before.chat_template),
    )

  def test_rows_of_packed_weights_share_the_scale_of_the_tensor(self):
    x = _normal(0, (_WIDTH, 64), np.float32)
    q = jax.device_get(lowbit.quantize(x, formats.nvfp4))
    path = self.home / 'q.gguf'
    gguf.save(path, {'q.weight': q})
    with gguf.open(path) as file:
      moved = weights.Source('q.weight', heads=_HEADS).read(file, 0)
    self.assertEqual(moved.tensor_scale.shape, (1, 1))
    order = np.arange(_WIDTH).reshape(_HEADS, -1, 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(
      lowbit.dequantize(moved), lowbit.dequantize(q)[order]
    )

  def test_what_is_refused(self):
    with mock.patch.dict(sys.modules, {'tokenizers': None}):
      model, *_ = self.write_llama()
      self.assert_refused('install tokenizers', model)
    model.unlink()
    model, *_ = self.write_llama('blk.1.ffn_up.weight')
    self.assert_refused("there is no tensor 'blk.1.ffn_up.weight'", model)
    model.unlink()
    model, *_ = self.write_gguf()
    self.assert_refused('llama.embedding_length is missing', model)


@unittest.skipUnless(importlib.util.find_spec('tokenizers'), 'no tokenizers')
class MethodTest(LlamaTest):
  """Methods that run the model."""

  def setUp(self):
    super().setUp()
    self.text = self.home / 'text.txt'
    self.text.write_text('ab' * 50 + 'abb' * 20)
    self.flags = f'--calibration={self.text}', '--calibration_windows=1'

  def kernels(self, out):
    """Stored weights by path, those of a stack together."""
    from support import language_models

    model = language_models.load(out).model
    return {
      '/'.join(map(str, path)): variable.get_raw_value()
      for path, variable in nnx.to_flat_state(nnx.state(model))
      if path[-1] == 'kernel'
    }

  @pytest.mark.long('calibrates a model three times')
  def test_file_folder_and_own_folder_hold_the_same(self):
    model, *_ = self.write_llama()
    found = {}
    for name, method, *more in (
      ('a.gguf', 'gptq'),
      ('folder', 'gptq'),
      ('own', 'mr_gptq', '--layout=own'),
    ):
      out = self.home / name
      self.convert(model, f'--method={method}', *self.flags, *more, out=out)
      found[name] = self.kernels(out)
      self.assertLen(found[name], 7)
    for path, want in found['a.gguf'].items():
      got, rotated = found['folder'][path], found['own'][path]
      self.assertEqual(want.fmt, formats.mxfp4)
      self.assert_same(got, want)
      self.assertIsInstance(rotated, lowbit.ops.Transformed)
      self.assertEqual(rotated.weight.fmt, formats.mxfp4)

  @pytest.mark.long('calibrates a model twice')
  def test_ranges_that_move_are_written_too(self):
    from support import blocks, calibration, language_models, post_training

    model, *_ = self.write_llama()
    name = 'nvfp4'
    self.convert(model, '--method=recommended', *self.flags, fmt=name)
    found = language_models.load(model)
    tokens = calibration.windows(found, self.text, 1)
    made = blocks.of_llama(found.model, None, tokens)
    fmt = formats.get(name)
    recipe = post_training.recipe('recommended', fmt, made)
    self.assertTrue(recipe.smooths)
    done = post_training.one_by_one(made, fmt, recipe)
    want = post_training.stacked(list(done), made.sizes)
    result = language_models.load(self.out).model
    got = {
      '/'.join(map(str, path)): variable.get_raw_value()
      for path, variable in nnx.to_flat_state(nnx.state(result.stacks))
    }
    for path, leaf in want.items():
      self.assert_same(got[path.removeprefix('stacks/')], leaf)
    norm = found.model.stacks[0].mlp_norm.scale.get_raw_value()
    self.assertGreater(abs(got['0/mlp_norm/scale'] - norm).max(), 0.1)

  @pytest.mark.long('calibrates a model')
  def test_chosen_weights_alone(self):
    model, tensors, _ = self.write_llama()
    out = self.home / 'b.gguf'
    self.convert(
      *(model, '--method=gptq', '--select=blk.1.ffn_down', *self.flags),
      out=out,
    )
    with gguf.open(out) as result:
      for name, x in tensors.items():
        if 'blk.1.ffn_down' in name:
          self.assertEqual(result.tensors[name].fmt, formats.mxfp4)
        else:
          self.assert_same(result[name], x)

  def test_refusals(self):
    model, *_ = self.write_llama()
    for message, *arguments in (
      ('only --layout=own has room', '--method=duquant'),
      ('needs no --calibration', '--method=rtn'),
      ('is for --method=rtn', '--method=gptq', '--scale_rule=mse'),
      (
        "'model.embed_tokens.weight' is none",
        '--method=gptq',
        '--select=embed',
      ),
    ):
      with self.subTest(message):
        self.assert_refused(message, model, *self.flags, *arguments)
    for flag in ('--calibration=nowhere', '--calibration_windows=9'):
      with self.subTest(flag):
        more = *self.flags, '--method=gptq', flag
        self.assert_refused('--calibration', model, *more)
    self.assert_refused('quantizes nothing', model, '--method=gptq', fmt='none')
    folder, _ = self.write_folder()
    self.assert_refused(
      'methods other than rtn run the model', folder, '--method=gptq'
    )


class InterruptionTest(CheckpointTest):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(conversion, 'PART', 2 * 8 * 256))
    self.folder, _ = self.write_folder()
    self.count = 0

  def limited(self, limit, error):
    """Patches the method to fail after so many weights."""
    original = conversion.Nearest.quantized

    def method(*arguments):
      if self.count == limit:
        raise error
      self.count += 1
      return original(*arguments)

    return mock.patch.object(conversion.Nearest, 'quantized', method)

  def test_finished_parts_are_not_made_again(self):
    with self.limited(3, KeyboardInterrupt):
      status, printed = self.run_script(self.folder)
    self.assertEqual(status, 130)
    self.assertRegex(printed, r'1 of 2 parts are kept in .*out\.parts-')
    self.assertFalse(self.out.exists())
    with self.limited(99, KeyboardInterrupt):
      self.convert(self.folder)
    self.assertEqual(self.count, 3 + 2)
    other = self.home / 'other'
    self.convert(self.folder, out=other)
    for file in other.iterdir():
      self.assertEqual(file.read_bytes(), (self.out / file.name).read_bytes())
    self.assertLen(list(self.home.iterdir()), 3)

  def test_other_settings_and_damaged_parts_are_not_taken(self):
    with self.limited(3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
      status, printed = self.run_script(self.folder)
    self.assertEqual(status, 1)
    self.assertIn('No space left on device', printed)
    (parts,) = self.home.glob('*.parts-*')
    self.count_weights('--scale_rule=rceil', expected=4)
    (part,) = parts.glob('*.safetensors')
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    self.count_weights(expected=4)

  def count_weights(self, *more, expected):
    """Converts, and counts the weights that are quantized."""
    self.count = 0
    with self.limited(99, KeyboardInterrupt):
      self.convert(self.folder, *more)
    self.assertEqual(self.count, expected)
    shutil.rmtree(self.out)


class RefusalTest(CheckpointTest):
  @parameterized.parameters(
    ('nothing', 'nothing does not exist; --model is'),
    ('', r'has no file \*\.safetensors; --model is'),
    ('model/a.safetensors', 'name its folder'),
    ('tokenizer.json', "starts with b'.*', a GGUF file with GGUF"),
  )
  def test_wrong_model(self, model, message):
    (self.home / 'tokenizer.json').write_text('{"version": "1.0" }' * 2)
    self.assert_refused(message, self.home / model)

  @parameterized.parameters(
    ('fp8_128x128', '--layout=own', '--select=norm', "'.*norm.weight'"),
    ('mxfp4', '--select=nothing', "no tensor matches 'nothing'"),
    ('q4_k', "'model.layers.0.self_attn.q_proj.weight' is q4_k.*no layout"),
    ('q4_k', '--select=head', "'lm_head.weight': blocks of q4_k do not.* 160"),
    ('mxfp4', '--scale_rule=absmax', "scale_rule='absmax' does not fit mxfp4"),
    ('none', '--select=x', 'quantizes nothing; leave out --select'),
    ('mxfp4', '--layout=gguf', 'not translated to GGUF'),
  )
  def test_folder(self, fmt, *rest):
    folder, _ = self.write_folder()
    *more, message = rest
    self.assert_refused(message, folder, *more, fmt=fmt)

  @parameterized.parameters(
    ('int4_g32', 'no float16 numbers'),
    ('int4_g64', 'has the format int4_g64'),
  )
  def test_gguf(self, fmt, message):
    model, _ = self.write_gguf()
    out = self.home / 'out.gguf'
    self.assert_refused(message, model, fmt=fmt, out=out)

  def test_out_that_exists_and_out_nowhere(self):
    folder, _ = self.write_folder()
    self.assert_refused('exists; choose another', folder, out=folder)
    out = self.home / 'no' / 'out'
    self.assert_refused('its folder does not exist', folder, out=out)

  @parameterized.parameters(
    ('--format=mxfp5', 'mxfp5'),
    ('--format=e2m1', 'e2m1 is an element format'),
    ('--method=best', 'recommended'),
    ('--layout=onnx', 'compressed-tensors'),
    ('--select=(', 'unterminated'),
  )
  def test_flags(self, flag, message):
    with self.assertRaisesRegex(flags.Error, message):
      self.run_script('model', flag)

  def test_full_disk_while_writing(self):
    folder, _ = self.write_folder()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(safetensors, 'export', side_effect=[None, full]):
      status, printed = self.run_script(folder)
    self.assertEqual(status, 1)
    self.assertRegex(printed, 'parts are kept in(.|\n)*No space left')
    self.assertFalse(self.out.exists())


if __name__ == '__main__':
  absltest.main()
