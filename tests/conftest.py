"""Settings of every pytest run: CPU, eight devices, strict dtypes in the core.

Eight host devices let sharding tests run in the same process as all others.
They do not change what one device computes, nor how long it takes.
"""

import os
import pathlib

_DEVICES = '--xla_force_host_platform_device_count'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_TESTS = pathlib.Path(__file__).parent
_STRICT = ('formats', 'numerics', 'ops', 'pallas', 'qarray', 'transforms')

hypothesis.settings.register_profile(
  'reproducible', deadline=None, derandomize=True
)
hypothesis.settings.load_profile('reproducible')


def _is_core(path: pathlib.Path) -> bool:
  first = path.relative_to(_TESTS).parts[0]
  return first.removesuffix('_test.py').split('_')[0] in _STRICT


@pytest.fixture(autouse=True)
def _strict_dtypes_in_the_core(request: pytest.FixtureRequest):
  """Makes a silent mix of dtypes an error; optax could not live with that."""
  if not _is_core(request.path):
    yield
    return
  with jax.numpy_dtype_promotion('strict'):
    yield
