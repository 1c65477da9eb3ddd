"""The LLaMA family against logits of transformers, file by file.

The golden logits are those of `tests/golden/make_llama_families.py`.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from lowbit_jax.io import gguf, safetensors
from models import llama, llama_config, llama_names
from support import language_models
from tests.examples import families

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'llama_families.npz'
# Half of the families run all at once and the others token by token; both ways
# for all, and these variants, take three times as long to compile.
_WHOLE = ('llama2', 'llama_linear', 'qwen2', 'smollm3_listed', 'phi3_long')
_SLOW = ('llama_linear', 'smollm3_listed', 'phi3_short', 'mixtral')
_SLOW += ('qwen3_moe_raw',)
_CASES = [(name, name) for name in families.CASES]
_QUICK = [(name, name) for name in families.CASES if name not in _SLOW]
# What a GGUF file cannot say: which blocks have a window, other blocks without
# rotation than each fourth, and weights of experts that do not add up to 1.
_NO_GGUF = ('mistral', 'qwen2', 'qwen3', 'smollm3_listed', 'qwen3_moe_raw')


def golden(case: str) -> np.ndarray:
  with np.load(_GOLDEN) as arrays:
    return arrays[case]


def whole(model: llama.Llama):
  """Logits of all tokens at once, as a function of the parameters."""
  graph, state = nnx.split(model)

  @jax.jit
  def logits(state, tokens):
    return nnx.merge(graph, state)(tokens)

  return logits, state


def stepwise(model: llama.Llama):
  """The same token by token, with a cache."""
  graph, state = nnx.split(model)

  @jax.jit
  def logits(state, tokens):
    model = nnx.merge(graph, state)

    def step(carry, token):
      cache, position = carry
      states, cache = model.states(token[:, None], cache, position)
      return (cache, position + 1), model.logits(states)[:, 0]

    carry = model.cache(tokens.shape[0], tokens.shape[1]), 0
    return jax.lax.scan(step, carry, tokens.T)[1].swapaxes(0, 1)

  return logits, state


def folded(model: llama.Llama) -> nnx.State:
  """Parameters with a random scale moved from each entry to its followers."""
  config, random = model.config, np.random.default_rng(1)
  state = nnx.state(model)
  flat = {'/'.join(map(str, p)): v for p, v in nnx.to_flat_state(state)}

  def multiply(path, scale, axis):
    value = flat[path].get_raw_value()
    shape = [1] * value.ndim
    shape[axis] = value.shape[axis]
    shape[: scale.ndim - 1] = scale.shape[:-1]
    product = np.asarray(value) * scale.reshape(shape)
    flat[path].set_value(jax.device_put(product, value.sharding))

  for prefix in ('', 'stacks/0/'):
    for leader, followers in llama.FOLLOWERS.items():
      followers = [f'{prefix}{f}' for f in followers if prefix + f in flat]
      if prefix + leader not in flat or not followers:
        continue
      leader_value = flat[prefix + leader].get_raw_value()
      lead = leader_value.shape[: bool(prefix)]
      scale = random.uniform(0.5, 2, (*lead, leader_value.shape[-1]))
      scale = scale.astype(np.float32)
      multiply(prefix + leader, 1 / scale, -1)
      bias = prefix + leader.replace('kernel', 'bias')
      if bias.endswith('bias') and bias in flat:
        multiply(bias, 1 / scale, -1)
      if leader == 'attention/value/kernel':
        groups = config.heads // config.kv_heads
        heads = scale.reshape(*lead, config.kv_heads, 1, config.head_size)
        scale = heads.repeat(groups, -2).reshape(*lead, -1)
      for path in followers:
        multiply(path, scale, -2)
  return state


class LogitsTest(parameterized.TestCase):
  def load(self, case):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    families.write(folder, families.CASES[case])
    return language_models.load(folder).model

  def check_near(self, logits, expected, tolerance=2e-5):
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    self.assertLess(error, tolerance)

  def check(self, case, way):
    model = self.load(case)
    logits, state = way(model)
    out = logits(state, families.tokens())
    self.check_near(out, golden(case))
    again = logits(folded(model), families.tokens())
    self.check_near(again, out, 1e-5)
    self.assertGreater(np.abs(again - out).max(), 0)

  @parameterized.named_parameters(*_QUICK)
  def test_equal_those_of_transformers(self, case):
    self.check(case, whole if case in _WHOLE else stepwise)

  @parameterized.named_parameters(*_CASES)
  @pytest.mark.slow
  def test_equal_those_of_transformers_in_every_way(self, case):
    for way in whole, stepwise:
      self.check(case, way)


class FolderTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CASES)
  def test_as_transformers_saves_it(self, case):
    """The configuration in its newest form, and the names of all tensors."""
    saved = json.loads(_GOLDEN.with_suffix('.json').read_text())[case]
    config = llama_config.from_huggingface(saved['config'])
    self.assertEqual(
      config, llama_config.from_huggingface(families.CASES[case])
    )
    kind = saved['config']['model_type']
    table, block = llama_names.huggingface(config, kind)
    names = {name for s in table.values() for name in s.names(0)}
    for k in range(config.blocks):
      names |= {name for s in block.values() for name in s.names(k)}
    self.assertEqual(sorted(names), saved['tensors'])


def parameters(config, checkpoint, tables) -> dict[str, np.ndarray]:
  """What the tables find in a checkpoint, by path and block."""
  table, block = tables
  found = {path: source.read(checkpoint, 0) for path, source in table.items()}
  for k in range(config.blocks):
    for path, source in block.items():
      found[f'{k}/{path}'] = source.read(checkpoint, k)
  return found


class GgufTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CASES)
  def test_holds_the_model_of_the_folder(self, case):
    """Equal parameters and configurations make equal logits."""
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    node = families.CASES[case]
    expected = llama_config.from_huggingface(node)
    tables = llama_names.huggingface(expected, node['model_type'])
    with safetensors.open(families.write(path / 'folder', node)) as folder:
      arrays = parameters(expected, folder, tables)
    file = families.write_gguf(path / 'model.gguf', node)
    with gguf.open(file) as checkpoint:
      config = llama_config.from_gguf(checkpoint)
      kind = checkpoint.metadata['general.architecture']
      tables = llama_names.gguf(config, kind)
      found = parameters(config, checkpoint, tables)
    self.assertEqual(found.keys(), arrays.keys())
    for name, value in arrays.items():
      np.testing.assert_array_equal(found[name], value, name)
    for tokens in (16, 24, 40):
      np.testing.assert_allclose(
        config.rope.speeds(tokens), expected.rope.speeds(tokens), 1e-6
      )
    self.assertAlmostEqual(config.rope.gain, expected.rope.gain, 6)
    self.assertAlmostEqual(config.epsilon, expected.epsilon, 12)
    lost = {'rope': config.rope, 'epsilon': config.epsilon}
    if case in _NO_GGUF:
      lost |= {'windows': (), 'normalized': True, 'still': config.still}
    self.assertEqual(config, dataclasses.replace(expected, **lost))

  def test_loads(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    node = families.CASES['qwen3_moe']
    folder = language_models.load(families.write(path / 'folder', node))
    file = language_models.load(families.write_gguf(path / 'a.gguf', node))
    found = jax.tree.leaves_with_path(nnx.state(file.model))
    expected = jax.tree.leaves_with_path(nnx.state(folder.model))
    for (path, value), (same, array) in zip(found, expected, strict=True):
      self.assertEqual(path, same)
      np.testing.assert_array_equal(value, array)


if __name__ == '__main__':
  absltest.main()
