"""Compilation in half the time, for tests that do not look at its result.

Never for those that compare the bits of float arithmetic with an oracle: what
users run is compiled with all optimizations.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from unittest import mock

import jax

_OPTION = 'jax_disable_most_optimizations'

quick_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
  """Here and in the processes that are started from here."""
  before = jax.config.read(_OPTION)
  jax.config.update(_OPTION, True)
  try:
    with mock.patch.dict(os.environ, {_OPTION.upper(): '1'}):
      yield
  finally:
    jax.config.update(_OPTION, before)
    jax.clear_caches()  # They do not tell the two kinds of programs apart.
