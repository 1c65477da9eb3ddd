"""Most tests compile with few optimizations: none looks at speed."""

import jax
import pytest

_OPTION = 'jax_disable_most_optimizations'
# They compare the bits of float32 arithmetic with those of an oracle.
_OPTIMIZED = ('micro_scaling_test.py', 'quantizers_test.py')


@pytest.fixture(autouse=True, scope='module')
def _quick_compilation(request: pytest.FixtureRequest):
  if request.path.name in _OPTIMIZED:
    yield
    return
  before = jax.config.read(_OPTION)
  jax.config.update(_OPTION, True)
  yield
  jax.config.update(_OPTION, before)
  jax.clear_caches()
