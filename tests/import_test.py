"""What `import lowbit_jax` loads, and what it must not load."""

import functools
import os
import pathlib
import subprocess
import sys
import tomllib

from absl.testing import absltest, parameterized

import lowbit_jax

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NEVER = ('chex', 'flax', 'optax', 'orbax', 'jax.experimental.pallas')


@functools.cache
def _modules_after(*statements: str) -> tuple[frozenset[str], ...]:
  """Names of the modules after each statement, in one fresh interpreter."""
  program = '; '.join(
    f'{statement}; print(*sys.modules)' for statement in statements
  )
  path = os.pathsep.join([str(_ROOT), str(_ROOT / 'pallas')])
  environment = os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
  result = subprocess.run(
    [sys.executable, '-c', f'import sys; {program}'],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return tuple(frozenset(line.split()) for line in result.stdout.splitlines())


def _library() -> tuple[frozenset[str], ...]:
  """Modules after the formats, the facade, layers, and what is heavy."""
  return _modules_after(
    'import lowbit_jax.formats',
    'import lowbit_jax',
    'lowbit_jax.nn',
    'import flax',
    'import optax',
  )


class ImportTest(parameterized.TestCase):
  def test_loads_nothing_heavy(self):
    _, loaded, *_ = _library()
    self.assertIn('lowbit_jax', loaded)
    self.assertContainsSubset(['lowbit_jax.formats', 'jax'], loaded)
    self.assertEmpty([name for name in _NEVER if name in loaded])

  def test_formats_need_no_jax_of_their_own(self):
    formats, facade, *_ = _library()
    self.assertEqual(formats, facade)

  def test_nn_is_loaded_on_first_use(self):
    _, facade, layers, *_ = _library()
    self.assertNotIn('lowbit_jax.nn', facade)
    self.assertIn('lowbit_jax.nn', layers)

  @parameterized.parameters((3, 'flax'), (4, 'optax'))
  def test_would_see_a_heavy_module(self, i, name):
    self.assertIn(name, _library()[i])

  def test_version_is_that_of_the_project(self):
    project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
    self.assertEqual(lowbit_jax.__version__, project['version'])

  def test_kernels_never_load_the_library(self):
    (loaded,) = _modules_after('import lowbit_pallas.arith')
    self.assertIn('lowbit_pallas.arith', loaded)
    self.assertNotIn('lowbit_jax', loaded)


if __name__ == '__main__':
  absltest.main()
