"""The LLaMA family in Flax NNX: LLaMA, Mistral, Qwen, SmolLM, Phi-3, Mixtral.

`Llama` maps tokens to logits, all at once or with a cache that holds what came
before. Its blocks lie in stacks, in each of which every parameter has a leading
axis of blocks, so that one compiled block serves all of a stack.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import lowbit_jax as lowbit
from models import experts, places, stacked
from models.llama_config import Config
from models.places import Place

# What stands before the linear layers of a block, and of the model: a scale of
# the one, along its outputs, can be folded into the others, along their inputs.
# A value head goes to all heads of `out` that share it. A model need not have
# all followers; without any, as where the embedding is the head, nothing folds.
FOLLOWERS: Mapping[str, tuple[str, ...]] = {
  'attention_norm/scale': (
    'attention/query/kernel',
    'attention/key/kernel',
    'attention/value/kernel',
  ),
  'attention/value/kernel': ('attention/out/kernel',),
  'mlp_norm/scale': ('mlp/gate/kernel', 'mlp/up/kernel', 'mlp/router/kernel'),
  'mlp/up/kernel': ('mlp/down/kernel',),
  'norm/scale': ('head/kernel',),
}

# Tokens of a decoding step; more of them are a prompt.
_FEW = 8


class Cache(NamedTuple):
  """Keys and values (blocks, batch, positions, kv_heads, head_size)."""

  keys: jax.Array
  values: jax.Array


class Attention(nnx.Module):
  """Queries that see their own position and those before it."""

  def __init__(self, config: Config, **options: Any) -> None:
    size = config.head_size
    self.heads, self.kv_heads = config.heads, config.kv_heads

    def linear(name, inputs, outputs):
      bias = name in config.biases
      return nnx.Linear(inputs, outputs, use_bias=bias, **options)

    self.query = linear('query', config.width, config.heads * size)
    self.key = linear('key', config.width, config.kv_heads * size)
    self.value = linear('value', config.width, config.kv_heads * size)
    self.out = linear('out', config.heads * size, config.width)
    normed = config.head_norms
    self.query_norm = norm(config, size, options) if normed else None
    self.key_norm = norm(config, size, options) if normed else None

  def __call__(
    self, x: jax.Array, place: Place, cache: Cache | None
  ) -> tuple[jax.Array, Cache | None]:
    """x is (batch, tokens, width)."""
    heads = (*x.shape[:2], self.heads, -1)
    kv_heads = (*x.shape[:2], self.kv_heads, -1)
    query = self.query(x).reshape(heads)
    key = self.key(x).reshape(kv_heads)
    value = self.value(x).reshape(kv_heads)
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = (
      jnp.where(place.rotates, place.rotation.apply(h), h) for h in (query, key)
    )
    if cache is None:
      out = _attend((query, key, value), place, place.positions)
    else:
      cache = _written(cache, place, key, value)
      out = _attend_cached(query, cache, place)
    return self.out(out.reshape(*x.shape[:2], -1)), cache


class Mlp(nnx.Module):
  """down(silu(gate(x)) * up(x))."""

  def __init__(self, config: Config, **options: Any) -> None:
    for name, inputs, outputs in (
      ('gate', config.width, config.hidden),
      ('up', config.width, config.hidden),
      ('down', config.hidden, config.width),
    ):
      bias = name in config.biases
      layer = nnx.Linear(inputs, outputs, use_bias=bias, **options)
      setattr(self, name, layer)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Attention and MLP, each behind a norm and added to its input."""

  def __init__(self, config: Config, **options: Any) -> None:
    self.attention_norm = norm(config, config.width, options)
    self.attention = Attention(config, **options)
    self.mlp_norm = norm(config, config.width, options)
    self.mlp = (experts.Experts if config.experts else Mlp)(config, **options)

  def __call__(
    self, x: jax.Array, place: Place, cache: Cache | None
  ) -> tuple[jax.Array, Cache | None]:
    out, cache = self.attention(self.attention_norm(x), place, cache)
    x = x + out
    return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
  """A language model.

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

    own = {'rngs': rngs, **options}
    vocabulary, width = config.vocabulary, config.width
    self.embed = lowbit.nn.nnx.Embed(vocabulary, width, **own)
    self.stacks = stacked.blocks(block, config.blocks, stacks, rngs)
    self.norm = norm(config, width, own)
    head = nnx.Linear(width, vocabulary, use_bias=False, **own)
    self.head = None if config.tied else head

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits (batch, tokens, vocabulary) of what follows each of the tokens
    (batch, tokens)."""
    return self.logits(self.states(tokens)[0])

  def states(
    self,
    tokens: jax.Array,
    cache: Cache | None = None,
    start: jax.Array | int = 0,
  ) -> tuple[jax.Array, Cache | None]:
    """Tokens (batch, tokens) after all blocks: (batch, tokens, width).

    Args:
      tokens: those at positions `start` and after it.
      cache: of the positions before `start`, None without any; it must have
        room for the tokens.
      start: position of the first of them.

    Returns:
      The states, and the cache with the tokens.
    """
    capacity = tokens.shape[1] if cache is None else cache.keys.shape[2]
    positions = start + jnp.arange(tokens.shape[1])
    place = places.places(self.config, positions, capacity)
    x, first = self.embed(tokens), 0
    for blocks in self.stacks:
      graph, parameters = nnx.split(blocks)
      numbers = first + jnp.arange(jax.tree.leaves(parameters)[0].shape[0])

      def step(carry, block, graph=graph, parameters=parameters):
        own, number = block
        block = nnx.merge(graph, lowbit.ops.member(parameters, own))
        return block(carry[0], place(number), carry[1]), None

      (x, cache), _ = jax.lax.scan(step, (x, cache), (numbers - first, numbers))
      first += numbers.size
    return self.norm(x), cache

  def logits(self, states: jax.Array) -> jax.Array:
    """Logits (..., vocabulary) of states (..., width)."""
    return (self.embed.attend if self.head is None else self.head)(states)

  def cache(
    self, batch: int, positions: int, dtype: DTypeLike = jnp.float32
  ) -> Cache:
    """An empty cache with room for so many positions."""
    config = self.config
    shape = (batch, positions, config.kv_heads, config.head_size)
    zeros = jnp.zeros((config.blocks, *shape), dtype)
    return Cache(zeros, jnp.zeros_like(zeros))


def norm(config: Config, size: int, options: Mapping[str, Any]) -> nnx.RMSNorm:
  return nnx.RMSNorm(size, epsilon=config.epsilon, **options)


def _attend(
  heads: Sequence[jax.Array], place: Place, seen: jax.Array
) -> jax.Array:
  """Attention of queries to keys and values at the positions `seen`."""
  distance = place.positions[:, None] - seen
  mask = (0 <= distance) & (distance < place.window)
  return jax.nn.dot_product_attention(*heads, mask=mask[None, None])


def _attend_cached(query: jax.Array, cache: Cache, place: Place) -> jax.Array:
  """The same to the cache, of which a few tokens read the filled part alone."""
  if query.shape[1] <= _FEW:
    length = place.positions[-1] + 1
    return lowbit.ops.decode_attention(
      query, *cache, length, layer=place.block, window=place.window
    )
  heads = query, *(leaf[place.block].astype(query.dtype) for leaf in cache)
  return _attend(heads, place, jnp.arange(heads[1].shape[1]))


def _written(
  cache: Cache, place: Place, key: jax.Array, value: jax.Array
) -> Cache:
  """The cache with keys and values (batch, tokens, ...) in their place."""
  at = place.block, 0, place.positions[0], 0, 0
  return Cache(
    *(
      jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
      for old, new in zip(cache, (key, value), strict=True)
    )
  )
