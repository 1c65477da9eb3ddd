"""What `help` and the reference show of public modules."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import types

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r'^- `(\w+)`: (.*(?:\n  .*)*)', re.MULTILINE)
_ALIAS = re.compile(r'\b(\w+) as \1\b')
# Flax classes fill many pages of help, so these list what they have first.
_LISTED = ('nn.linen', 'nn.nnx', 'training.linen', 'training.nnx')


def _modules() -> list[str]:
  """The public modules of the library."""
  names = []
  for path in sorted((_ROOT / 'lowbit_jax').rglob('*.py')):
    parts = path.relative_to(_ROOT).with_suffix('').parts
    parts = parts[:-1] if parts[-1] == '__init__' else parts
    if not any(part.startswith('_') for part in parts):
      names.append('.'.join(parts))
  return names


def _public(module: types.ModuleType) -> dict[str, object]:
  values = {name: getattr(module, name) for name in dir(module)}
  return {k: v for k, v in values.items() if not k.startswith('_')}


def _has_help(value) -> bool:
  return inspect.isfunction(value) or inspect.isclass(value)


def _first(value) -> str:
  """The first paragraph of a docstring in one line."""
  text = inspect.getdoc(value) or ''
  return ' '.join(text.split('\n\n')[0].split())


def _own(module: types.ModuleType) -> dict[str, object]:
  """Functions, classes and submodules that a module offers."""
  home = module.__name__
  offered = set(_ALIAS.findall(inspect.getsource(module)))
  own = {
    key: value
    for key, value in _public(module).items()
    if _has_help(value) and (key in offered or value.__module__ == home)
  }
  for found in pkgutil.iter_modules(getattr(module, '__path__', ())):
    if not found.name.startswith('_'):
      own[found.name] = importlib.import_module(f'{home}.{found.name}')
  return own


class HelpTest(parameterized.TestCase):
  @parameterized.parameters(
    (name,)
    for name in _modules()
    if name.removeprefix('lowbit_jax.') in _LISTED
    or (_ROOT / name.replace('.', '/')).is_dir()
  )
  def test_module_lists_what_it_has(self, name):
    module = importlib.import_module(name)
    entries = _ENTRY.findall(inspect.getdoc(module))
    listed = {key: ' '.join(text.split()) for key, text in entries}
    own = {key: _first(value) for key, value in _own(module).items()}
    hint = f'repeat the first lines of docstrings in that of {name}'
    self.assertEqual(listed, own, hint)

  @parameterized.parameters(
    (name,) for name in _modules() if (_ROOT / name.replace('.', '/')).is_dir()
  )
  def test_package_names_its_constants(self, name):
    module = importlib.import_module(name)
    text = inspect.getdoc(module)
    for key, value in _public(module).items():
      if not _has_help(value) and not isinstance(value, types.ModuleType):
        self.assertIn(f'`{key}`', text)

  @parameterized.parameters((name,) for name in _modules())
  def test_all_have_a_first_line(self, name):
    module = importlib.import_module(name)
    self.assertTrue(_first(module))
    for key, value in _own(module).items():
      self.assertTrue(_first(value), key)

  def test_reference_has_every_module(self):
    pages = sorted((_ROOT / 'docs' / 'api').glob('*.md'))
    text = '\n'.join(page.read_text('utf-8') for page in pages)
    named = re.findall(r'^::: (lowbit_jax[\w.]*)$', text, re.MULTILINE)
    self.assertCountEqual(named, _modules())


if __name__ == '__main__':
  absltest.main()
