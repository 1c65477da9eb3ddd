"""Small models of the examples with random parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import bert, bert_config, bert_names, llama, llama_config, rotary

HEAD_SIZE = 8
# What scales fold into.
OF_LLAMA, OF_BERT = llama.FOLLOWERS, bert_names.FOLLOWERS


def llamas(**options: Any) -> llama.Llama:
  """Four heads for two of keys, each block in a stack of its own."""
  config = llama_config.Config(
    vocabulary=40,
    width=32,
    hidden=48,
    blocks=2,
    heads=4,
    kv_heads=2,
    head_size=HEAD_SIZE,
    context=32,
    rope=rotary.Rope(1e4, HEAD_SIZE),
    **options,
  )
  return _random(lambda: llama.Llama(config, (1, 1), rngs=nnx.Rngs(0)))


def berts() -> bert.Bert:
  config = bert_config.Config(40, 32, 64, 2, 4, 16)
  return _random(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))


def _random(make: Callable[[], Any]) -> Any:
  """A model whose biases are not 0, nor its scales 1."""
  graph, state = nnx.split(nnx.eval_shape(make))
  source = np.random.default_rng(0)

  def values(path, leaf):
    out = source.uniform(-0.5, 0.5, leaf.shape).astype(np.float32)
    return jnp.asarray(out + ('scale' in jax.tree_util.keystr(path)))

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(values, state))


def logits(model: llama.Llama) -> tuple[Callable, Any]:
  """A function of parameters and tokens, and the parameters."""
  graph, state = nnx.split(model)
  return jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state


def states(model: bert.Bert) -> tuple[Callable, Any]:
  """The same of an encoder."""
  graph, state = nnx.split(model)
  return jax.jit(lambda state, x: nnx.merge(graph, state).states(x)), state


def tokens() -> jax.Array:
  return jnp.arange(24).reshape(2, 12) * 7 % 40
