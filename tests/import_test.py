"""What `import lowbit_jax` loads, and what it must not load."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys
import tomllib

from absl.testing import absltest, parameterized

import lowbit_jax

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_ROOTS = {
  'absl': 'absl-py',
  'orbax': 'orbax-checkpoint',
  'sklearn': 'scikit-learn',
}  # distributions by the module that they hold, where the names differ
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


@functools.cache
def _imported(folder: str) -> set[str]:
  """Distributions that the files of a folder import, now or when called."""
  own = {path.stem for path in (_ROOT / 'examples').iterdir()}
  own |= {'lowbit_jax', 'lowbit_pallas'}
  names = set()
  for path in (_ROOT / folder).rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
      if isinstance(node, ast.Import):
        names |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        names.add(node.module.split('.')[0])
  names -= own | sys.stdlib_module_names
  return {_ROOTS.get(name, name) for name in names}


def _declared(*extras: str) -> set[str]:
  """Distributions that the project and some of its extras require."""
  project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
  lists = {'': project['dependencies']} | project['optional-dependencies']
  result = set()
  for extra in ('', *extras):
    for line in lists[extra]:
      name, inner = re.fullmatch(
        r'([\w-]+)(?:\[(.*?)\])?.*', line, re.DOTALL
      ).groups()
      if name == project['name']:
        result |= _declared(*inner.split(','))
      else:
        result.add(name)
  return result


class DeclarationTest(absltest.TestCase):
  def test_what_is_imported_is_declared(self):
    library = _imported('lowbit_jax') | _imported('pallas')
    self.assertContainsSubset(library, _declared('cpu', 'search'))
    self.assertContainsSubset(
      library | _imported('examples'), _declared('examples')
    )

  def test_what_is_required_is_imported(self):
    used = _imported('lowbit_jax') | _imported('pallas')
    used |= _imported('examples')
    # Of jaxlib, which JAX loads, the version is set.
    self.assertContainsSubset(_declared('cpu', 'search') - {'jaxlib'}, used)


class ImportTest(parameterized.TestCase):
  def test_loads_nothing_heavy(self):
    _, loaded, *_ = _library()
    self.assertIn('lowbit_jax', loaded)
    self.assertContainsSubset(['lowbit_jax.formats', 'jax'], loaded)
    self.assertEmpty([name for name in _NEVER if name in loaded])

  def test_kernels_for_cpus_are_loaded_on_first_use(self):
    loaded, used = _modules_after(
      'import lowbit_jax, lowbit_jax.ops', 'import lowbit_jax.cpu._matmul'
    )
    self.assertIn('lowbit_jax.cpu', loaded)
    self.assertNotIn('llvmlite', loaded)
    self.assertNotIn('lowbit_jax.cpu._code', loaded)
    self.assertIn('llvmlite', used)

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
