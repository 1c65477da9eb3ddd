"""Decoding that a program shows.

A stored array is decoded by a jitted function with a name of its own. Whoever
reads the program of a function finds the name in `DECODERS`, and so knows the
stored arrays that the function decodes, also those that it closes over.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Decoder(NamedTuple):
  """A decoding function of a program.

  Attributes:
    structure: of the pytree that it decodes, whose leaves are its operands.
    dtype: of its result.
  """

  structure: Any
  dtype: np.dtype


# By the name of the jitted function.
DECODERS: dict[str, Decoder] = {}


def run(decode: Callable, stored: Any, dtype: np.dtype) -> jax.Array:
  """`decode(stored, dtype)` as a jitted function with a name of its own.

  Args:
    decode: of a stored array and a dtype.
    stored: a pytree that stands for an array.
    dtype: of the result.
  """
  leaves, structure = jax.tree.flatten(stored)
  return _named(decode, structure, dtype)(*leaves)


@functools.cache
def _named(decode: Callable, structure: Any, dtype: np.dtype) -> Callable:
  def decode_leaves(*leaves):
    return decode(structure.unflatten(leaves), dtype)

  # The same name in every process: compiled programs are cached by it.
  name = f'dequantize_{zlib.crc32(f"{structure} {dtype}".encode()):08x}'
  own = Decoder(structure, dtype)
  while DECODERS.setdefault(name, own) != own:
    name += '_'
  decode_leaves.__name__ = decode_leaves.__qualname__ = name
  return jax.jit(decode_leaves)
