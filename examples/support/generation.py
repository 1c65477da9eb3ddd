"""Tokens that a language model adds to others, one after the other.

One compiled program reads a prompt, padded to one of a few lengths, and one
makes a token. Both write keys and values into a cache that grows by doubling.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import llama

_LENGTHS = (16, 64, 256)  # of the pieces in which a prompt is read
_CAPACITY = 256  # positions of the smallest cache


class PromptTooLong(ValueError):
  """A prompt that leaves no room in the context of a model."""


class Sampling(NamedTuple):
  """How a token follows from logits.

  Attributes:
    temperature: that they are divided by; 0 takes the most likely token.
    top_k: how many of the most likely tokens can be drawn, 0 for all.
    top_p: the least probability that the tokens which can be drawn have
      together, the most likely ones first.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """A token (batch,) from logits (batch, vocabulary)."""
    if not self.temperature:
      return jnp.argmax(logits, axis=-1)
    logits = logits / self.temperature
    if self.top_k:
      least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1]
      logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    if self.top_p < 1:
      ordered = -jnp.sort(-logits, axis=-1)
      shares = jax.nn.softmax(ordered)
      before = jnp.cumsum(shares, axis=-1) - shares
      # The first token has nothing before it, so that one always remains.
      some = max(self.top_p, 1e-9)
      least = jnp.where(before < some, ordered, jnp.inf).min(axis=-1)
      logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


GREEDY = Sampling()


class Generator:
  """A model with a cache of the tokens that it has seen.

  Attributes:
    seen: tokens whose keys and values are in the cache.
    compile_seconds: what compilation took in all.
    prompt_tokens: tokens of prompts that were read.
    prompt_seconds: that reading them took, compilation aside.
    tokens: that were made.
    seconds: that making them took, compilation aside.
  """

  def __init__(self, model: llama.Llama, sampling: Sampling = GREEDY) -> None:
    self.seen: list[int] = []
    self.compile_seconds = self.prompt_seconds = self.seconds = 0.0
    self.prompt_tokens = self.tokens = 0
    self._context = model.config.context
    self._sampling = sampling
    self._key = jax.random.key(0)
    graph, self._state = nnx.split(model)
    self._model = model
    self._cache: llama.Cache | None = None
    self._programs: dict[Any, Callable] = {}

    def run(state, tokens, cache, start, last, key):
      model = nnx.merge(graph, state)
      states, cache = model.states(tokens, cache, start)
      states = jax.lax.dynamic_index_in_dim(states, last, 1, keepdims=False)
      key = jax.random.fold_in(key, start + last)
      return sampling.draw(model.logits(states), key), cache

    self._run = jax.jit(run, donate_argnums=2)

  def generate(
    self,
    prompt: Sequence[int],
    most: int,
    ends: frozenset[int] = frozenset(),
    seed: int = 0,
  ) -> Iterator[int]:
    """Tokens that follow a prompt, as they are made.

    Args:
      prompt: at least one token. Of what it shares with `seen` at its start
        nothing is computed anew.
      most: how many tokens at most; fewer where the context ends.
      ends: tokens that end an answer, the last one that is given.
      seed: of what is drawn; the same one draws the same tokens.

    Raises:
      PromptTooLong: if the prompt leaves no room.
    """
    if not prompt:
      raise ValueError('the prompt is empty; the model needs a token to follow')
    if len(prompt) >= self._context:
      raise PromptTooLong(
        f'the prompt has {len(prompt)} tokens, and the context of the model'
        f' {self._context} positions; shorten it'
      )
    most = min(most, self._context - len(prompt))
    self._key = jax.random.key(seed)
    self._reserve(len(prompt) + most)
    token = self._read(prompt)
    for count in range(1, most + 1):
      yield token
      if token in ends or count == most:
        return
      token = self._next(token)

  def _read(self, prompt: Sequence[int]) -> int:
    """Reads what is new of a prompt, and makes the token after it."""
    shared = 0
    for old, new in zip(self.seen, prompt[:-1], strict=False):
      if old != new:
        break
      shared += 1
    self.seen = list(prompt[:shared])
    token = None
    while (start := len(self.seen)) < len(prompt):
      rest = prompt[start:]
      length = next((n for n in _LENGTHS if n >= len(rest)), _LENGTHS[-1])
      length = min(length, self._capacity - start)
      piece = list(rest[:length])
      padded = piece + [0] * (length - len(piece))
      seconds, token = self._step(padded, start, len(piece) - 1)
      self.prompt_seconds += seconds
      self.prompt_tokens += len(piece)
      self.seen += piece
    assert token is not None
    return token

  def _next(self, token: int) -> int:
    """Makes the token after another."""
    seconds, made = self._step([token], len(self.seen), 0)
    self.seen.append(token)
    self.seconds += seconds
    self.tokens += 1
    return made

  def _step(
    self, tokens: list[int], start: int, last: int
  ) -> tuple[float, int]:
    """Runs the program for so many tokens; seconds and the token that it
    makes."""
    arguments = (
      self._state,
      np.array([tokens], np.int32),
      self._cache,
      np.int32(start),
      np.int32(last),
      self._key,
    )
    kind = len(tokens), self._capacity
    if kind not in self._programs:
      begin = time.perf_counter()
      self._programs[kind] = self._run.lower(*arguments).compile()
      self.compile_seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    made, self._cache = self._programs[kind](*arguments)
    token = int(made[0])
    return time.perf_counter() - begin, token

  @property
  def _capacity(self) -> int:
    return 0 if self._cache is None else self._cache.keys.shape[2]

  def _reserve(self, positions: int) -> None:
    """Makes room for so many positions."""
    capacity = max(self._capacity, _CAPACITY)
    while capacity < positions:
      capacity *= 2
    capacity = min(capacity, self._context)
    if self._cache is None:
      self._cache = self._model.cache(1, capacity)
    elif more := capacity - self._capacity:
      widths = [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)]
      grown = (jnp.pad(leaf, widths) for leaf in self._cache)
      self._cache = llama.Cache(*grown)
