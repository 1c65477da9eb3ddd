"""Small models of the BERT family, of which transformers made goldens."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl.testing import absltest
from flax import nnx

from lowbit_jax.io import safetensors
from models import bert, bert_config, bert_names
from support import weights

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bert.npz'
CASES = ('bert', 'bert_with_head', 'roberta', 'distilbert')


def parameters(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """Float32 weights of tensors by name, the same bits everywhere.

  Scales of norms are near 1. Weights of linear layers are so large that what a
  layer leaves out is seen in the outputs.
  """
  random = np.random.RandomState(18)
  result = {}
  for name, shape in sorted(shapes.items()):
    unit = random.randint(-(2**16), 2**16, shape).astype(np.float32) / 2**16
    is_scale = 'norm' in name.lower() and name.endswith('weight')
    result[name] = unit / 2 + 1 if is_scale else unit / 2
  return result


@functools.cache
def golden(case: str) -> dict[str, Any]:
  """What transformers computes, as the script says, with 'weights'."""
  with np.load(GOLDEN) as arrays:
    found = {
      name.removeprefix(f'{case}.'): arrays[name]
      for name in arrays
      if name.startswith(f'{case}.')
    }
  found['config'] = json.loads(str(found['config']))
  shapes = json.loads(str(found.pop('shapes')))
  return found | {'weights': parameters(shapes)}


@functools.cache
def model(case: str) -> bert.Bert:
  """The model of a golden, with its pooler if it has one."""
  found = golden(case)
  config = bert_config.from_huggingface(found['config'])
  if 'pooled' in found:
    config = dataclasses.replace(config, pooling='pooler')
  with tempfile.TemporaryDirectory() as folder:
    save(pathlib.Path(folder), found['weights'])
    return read(config, folder)


def read(config: bert_config.Config, folder: Any) -> bert.Bert:
  """The model of a folder with model.safetensors."""
  with safetensors.open(folder) as checkpoint:
    whole, block = bert_names.huggingface(config, checkpoint)
    sizes = weights.stacks(checkpoint, block, config.blocks)
    return weights.load(
      lambda: bert.Bert(config, sizes, rngs=nnx.Rngs(0)),
      checkpoint,
      whole,
      block,
      sizes,
      harmless=bert_names.harmless(checkpoint).fullmatch,
    )


def leaves(model: bert.Bert) -> dict[str, np.ndarray]:
  """Parameters by path."""
  return {
    '/'.join(map(str, path)): np.asarray(variable.get_raw_value())
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens, mask, types):
  model = nnx.merge(graph, state)
  states = model.states(tokens, mask, types)
  return states, model.pooled(states, mask)


def run(
  model: bert.Bert, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """States and embeddings, by one program for models of the same kind."""
  chosen = types if model.config.types else None
  states, pooled = _run(*nnx.split(model), tokens, mask != 0, chosen)
  return np.asarray(states), np.asarray(pooled)


def relative(a: Any, b: Any) -> float:
  """The largest difference over the largest number of b."""
  return float(np.abs(a - b).max() / np.abs(b).max())


def save(folder: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  path = folder / 'model.safetensors'
  safetensors.save(path, tensors, overwrite=True)


class FolderTest(absltest.TestCase):
  """Tests with a folder of their own."""

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
