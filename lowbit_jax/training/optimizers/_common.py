"""Names of embeddings and heads, step counts, checks of arguments."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

_EMBEDDING = re.compile(r'(?<!un)embed|(^|[/_])w[tp]e($|/)', re.IGNORECASE)
_HEAD = re.compile(
  r'(^|/)((\w+_)?head|logits|unembed\w*|classifier)($|/)', re.IGNORECASE
)


def is_embedding(path: str, leaf: Any = None) -> bool:
  """Whether a path names an embedding: it holds 'embed', 'wte' or 'wpe'."""
  del leaf
  return _EMBEDDING.search(path) is not None


def is_head(path: str, leaf: Any = None) -> bool:
  """Whether a path names an output head.

  That is a component 'head', '..._head', 'logits', 'unembed...' or
  'classifier' of the path; 'multihead' is not one.
  """
  del leaf
  return _HEAD.search(path) is not None


def increment(steps: jax.Array) -> jax.Array:
  """steps + 1, or the largest int32."""
  return jnp.asarray(optax.safe_increment(steps))


def check_range(
  name: str, value: float | jax.Array, low: float, high: float
) -> None:
  """Raises ValueError for a number outside [low, high)."""
  if not low <= value < high:
    raise ValueError(f'{name}={value!r} must be in [{low}, {high})')


def check_steps(name: str, value: int, least: int = 1) -> None:
  """Raises ValueError for a value that is not an int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f'{name}={value!r} must be an int of at least {least}')
