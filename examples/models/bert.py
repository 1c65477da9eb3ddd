"""The BERT family in Flax NNX: BERT, MiniLM, RoBERTa, DistilBERT.

`Bert` maps tokens to a state for each, or to one embedding for each sequence.
Its blocks lie in stacks, in each of which every parameter has a leading axis of
blocks, so that one compiled block serves all of a stack.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import lowbit_jax as lowbit
from models import stacked
from models.bert_config import Config

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
}


class Attention(nnx.Module):
  """Queries that see all tokens of their sequence."""

  def __init__(self, config: Config, **options: Any) -> None:
    width = config.width
    self.heads = config.heads
    self.query = nnx.Linear(width, width, **options)
    self.key = nnx.Linear(width, width, **options)
    self.value = nnx.Linear(width, width, **options)
    self.out = nnx.Linear(width, width, **options)

  def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
    """x is (batch, tokens, width); `seen` bool (batch, 1, 1 or tokens, tokens),
    which tokens each sees."""
    query, key, value = (
      layer(x).reshape(*x.shape[:2], self.heads, -1)
      for layer in (self.query, self.key, self.value)
    )
    out = jax.nn.dot_product_attention(query, key, value, mask=seen)
    return self.out(out.reshape(x.shape))


class Mlp(nnx.Module):
  """down(activation(up(x)))."""

  def __init__(self, config: Config, **options: Any) -> None:
    self.activation = config.activation
    self.up = nnx.Linear(config.width, config.hidden, **options)
    self.down = nnx.Linear(config.hidden, config.width, **options)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(_ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
  """Attention and MLP, each added to its input before a norm."""

  def __init__(self, config: Config, **options: Any) -> None:
    self.attention = Attention(config, **options)
    self.attention_norm = norm(config, **options)
    self.mlp = Mlp(config, **options)
    self.mlp_norm = norm(config, **options)

  def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
    x = self.attention_norm(x + self.attention(x, seen))
    return self.mlp_norm(x + self.mlp(x))


class Bert(nnx.Module):
  """An encoder of sequences.

  Args:
    config: of the model.
    stacks: how many blocks each stack has, which add up to all; one stack by
      default. Blocks of a stack hold parameters of the same formats.
    dtype: of activations.
    param_dtype: of parameters.
    rngs: source of initial parameters.
  """

  def __init__(
    self,
    config: Config,
    stacks: Sequence[int] = (),
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    self.config = config
    options = {'dtype': dtype, 'param_dtype': param_dtype}

    def block(rngs):
      return Block(config, rngs=rngs, **options)

    def table(rows):
      return lowbit.nn.nnx.Embed(rows, config.width, rngs=rngs, **options)

    self.embed = table(config.vocabulary)
    self.positions = table(config.context)
    self.types = table(config.types) if config.types else None
    self.norm = norm(config, rngs=rngs, **options)
    self.stacks = stacked.blocks(block, config.blocks, stacks, rngs)
    self.pooler = (
      nnx.Linear(config.width, config.width, rngs=rngs, **options)
      if config.pooling == 'pooler'
      else None
    )

  def embeddings(
    self,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    """One for each sequence, as `pooled`; arguments as those of `states`."""
    return self.pooled(self.states(tokens, mask, types), mask)

  def pooled(
    self, states: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """States (batch, tokens, width) in one (batch, width), float32."""
    if self.config.pooling == 'mean':
      mask = _as_bool(mask, states.shape[:2])[..., None]
      total = jnp.where(mask, states, 0).sum(axis=1, dtype=jnp.float32)
      pooled = total / jnp.maximum(mask.sum(axis=1), 1)
    else:
      pooled = states[:, 0]
      if self.pooler is not None:
        pooled = jnp.tanh(self.pooler(pooled))
    pooled = pooled.astype(jnp.float32)
    if self.config.normalized:
      length = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
      pooled /= jnp.maximum(length, 1e-12)
    return pooled

  def states(
    self,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    """Tokens after all blocks: (batch, tokens, width).

    Args:
      tokens: (batch, tokens), padded at their ends.
      mask: (batch, tokens), 0 where a sequence is padded; None for no padding.
        States of padding have no meaning.
      types: (batch, tokens), types of tokens, None for type 0.

    Raises:
      ValueError: for more tokens than the model has positions, and types for a
        model without them.
    """
    count, context = tokens.shape[1], self.config.context
    if count > context:
      raise ValueError(
        f'sequences of {count} tokens are longer than {context=}; cut them'
      )
    if self.types is None and types is not None:
      raise ValueError('the model has no token types: pass types=None')
    x = self.embedded(tokens, jnp.arange(count), types)
    seen = _as_bool(mask, tokens.shape)[:, None, None]
    for blocks in self.stacks:
      graph, parameters = nnx.split(blocks)

      def step(x, parameters, graph=graph):
        return nnx.merge(graph, parameters)(x, seen), None

      x, _ = jax.lax.scan(step, x, parameters)
    return x

  def embedded(
    self,
    tokens: jax.Array,
    places: jax.Array,
    types: jax.Array | None = None,
  ) -> jax.Array:
    """What the first block takes: (batch, tokens, width).

    Args:
      tokens: (batch, tokens).
      places: of the tokens in their sequences, (tokens,) or (batch, tokens).
      types: as in `states`.
    """
    x = self.embed(tokens) + self.positions(places)
    if self.types is not None:
      x += self.types(jnp.zeros_like(tokens) if types is None else types)
    return self.norm(x)


def norm(config: Config, **options: Any) -> nnx.LayerNorm:
  # The fast variance loses digits where a few channels are far from the mean.
  return nnx.LayerNorm(
    config.width, epsilon=config.epsilon, use_fast_variance=False, **options
  )


def _as_bool(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, bool) if mask is None else mask != 0
