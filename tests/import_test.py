"""What `import lowbit_jax` loads, and what it must not load."""

import os
import pathlib
import subprocess
import sys
import tomllib

from absl.testing import absltest, parameterized

import lowbit_jax

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NEVER = ('chex', 'flax', 'optax', 'orbax', 'jax.experimental.pallas')


def _modules_after(statement: str) -> set[str]:
  """Names of the modules in a fresh interpreter that ran `statement`."""
  program = f'import sys; {statement}; print(*sys.modules, sep="\\n")'
  path = os.pathsep.join([str(_ROOT), str(_ROOT / 'pallas')])
  environment = os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
  result = subprocess.run(
    [sys.executable, '-c', program],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(result.stdout.split())


class ImportTest(parameterized.TestCase):
  def test_loads_nothing_heavy(self):
    loaded = _modules_after('import lowbit_jax')
    self.assertIn('lowbit_jax', loaded)
    self.assertContainsSubset(['lowbit_jax.formats', 'jax'], loaded)
    self.assertEmpty([name for name in _NEVER if name in loaded])

  def test_formats_need_no_jax_of_their_own(self):
    facade = _modules_after('import lowbit_jax')
    self.assertEqual(_modules_after('import lowbit_jax.formats'), facade)

  def test_nn_is_loaded_on_first_use(self):
    loaded = _modules_after('import lowbit_jax; lowbit_jax.nn')
    self.assertIn('lowbit_jax.nn', loaded)

  @parameterized.parameters('flax', 'optax')
  def test_would_see_a_heavy_module(self, name):
    self.assertIn(name, _modules_after(f'import {name}'))

  def test_version_is_that_of_the_project(self):
    project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
    self.assertEqual(lowbit_jax.__version__, project['version'])

  def test_kernels_never_load_the_library(self):
    loaded = _modules_after('import lowbit_pallas.arith')
    self.assertIn('lowbit_pallas.arith', loaded)
    self.assertNotIn('lowbit_jax', loaded)


if __name__ == '__main__':
  absltest.main()
