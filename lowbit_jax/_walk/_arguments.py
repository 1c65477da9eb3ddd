"""Arguments that the uses of the walk share, checked."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def check_function(fn: object) -> None:
  if not callable(fn):
    raise TypeError(f'fn={fn!r} must be a function')


def positions(argnums: int | Sequence[int]) -> tuple[int, ...]:
  """`argnums` as a tuple of ints of 0 or more."""
  numbers = argnums if isinstance(argnums, Sequence) else (argnums,)
  try:
    found = tuple(map(operator.index, numbers))
  except TypeError:
    raise TypeError(f'{argnums=} must be an int or a tuple of ints') from None
  if any(n < 0 for n in found) or len(set(found)) != len(found):
    raise ValueError(
      f'{argnums=} must be the positions of the arguments that hold weights,'
      ' each once and counted from 0; () if none does'
    )
  return found


def is_key(key: object) -> bool:
  """Whether `key` is a PRNG key, typed or of raw words."""
  dtype = getattr(key, 'dtype', None)
  if dtype is None:
    return False
  kinds = jax.dtypes.prng_key, jnp.integer
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)
