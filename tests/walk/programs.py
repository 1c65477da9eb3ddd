"""What tests of the walk look at: the weights that products meet, programs and
their memory."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import lowbit_jax as lowbit
from lowbit_jax.ops import Prepacked, Transformed


def is_stored(x: object) -> bool:
  return isinstance(x, lowbit.QArray | Transformed | Prepacked)


def dense(tree: Any) -> Any:
  """The tree with arrays in the place of stored weights."""

  def array(x):
    x = lowbit.unpack(x) if isinstance(x, Prepacked) else x
    return lowbit.dequantize(x) if is_stored(x) else x

  return jax.tree.map(array, tree, is_leaf=is_stored)


class Weights:
  """An observer that keeps the weights as products meet them."""

  def observe(self, product, lhs, rhs, *rest):
    return {'lhs': lhs, 'rhs': rhs}.get(product.weight)

  def merge(self, a, b):
    raise AssertionError('a weight is used once in such a test')


def weights(fn: Callable, *args: Any) -> dict[str, Any]:
  """The weights that the products of fn(*args) meet, by site."""
  return lowbit.record(fn, Weights())(*args)[1]


def lowered(fn: Callable, *args: Any) -> str:
  """The program of a function before it is compiled, without its name."""
  text = jax.jit(fn).lower(*args).as_text()
  return re.sub(r'^module @\w+', 'module', text)


def compiled(fn: Callable, *args: Any) -> str:
  """The compiled program, without its name and the lines of its source."""
  text = jax.jit(fn).lower(*args).compile().as_text()
  text = re.sub(r', metadata=\{[^}]*\}', '', text[text.index('\n') :])
  tables = 'FileNames|FunctionNames|FileLocations|StackFrames'
  return re.sub(rf'\n(?:{tables})\n(?:.+\n)*', '\n', text)


def temporaries(fn: Callable, *args: Any) -> int:
  """Bytes that the compiled program needs beside arguments and results."""
  program = jax.jit(fn).lower(*args).compile()
  return program.memory_analysis().temp_size_in_bytes


def assert_same_bits(got: Any, want: Any) -> None:
  """Trees of arrays that are equal, bit for bit."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
