"""Layers compile with few optimizations: no test here looks at speed."""

import jax
import pytest

_OPTION = 'jax_disable_most_optimizations'


@pytest.fixture(autouse=True, scope='module')
def _quick_compilation():
  before = jax.config.read(_OPTION)
  jax.config.update(_OPTION, True)
  yield
  jax.config.update(_OPTION, before)
  jax.clear_caches()
