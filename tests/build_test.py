"""Keeps BUILD honest without Bazel: runs it with stub rules and compares.

Bazel would see an upward import or an undeclared kernel, because its sandbox
holds declared sources only. It would not see a Python file that no target
lists, or a test whose file never runs its cases. This finds all of them.
"""

import ast
import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_RULES = ('filegroup', 'py_binary', 'py_library', 'py_test')
_STARLARK = (any, all, dict, enumerate, len, list, range, reversed, sorted)
_STARLARK += (str, tuple, zip)
_TESTS_RUN = 'absltest.main()'


@dataclasses.dataclass(frozen=True)
class Target:
  rule: str
  name: str
  srcs: tuple[str, ...] = ()
  deps: tuple[str, ...] = ()
  data: tuple[str, ...] = ()
  imports: tuple[str, ...] = ()
  main: str = ''

  @property
  def label(self) -> str:
    return f':{self.name}'

  @property
  def runs(self) -> str:
    return self.main or f'{self.name}.py'


@dataclasses.dataclass
class Build:
  """The targets of one BUILD file in order, and its globs without a match."""

  targets: list[Target] = dataclasses.field(default_factory=list)
  empty_globs: list[list[str]] = dataclasses.field(default_factory=list)


def run_build(root: pathlib.Path) -> Build:
  """Executes `root`/BUILD with rules that only record their arguments."""
  build = Build()

  def rule_of(kind: str):
    def rule(name: str, **attributes: Any):
      known = {field.name for field in dataclasses.fields(Target)}
      lists = {
        key: value if isinstance(value, str) else tuple(value)
        for key, value in attributes.items()
        if key in known
      }
      build.targets.append(Target(kind, name, **lists))

    return rule

  def glob(
    include: Sequence[str],
    exclude: Sequence[str] = (),
    allow_empty: bool = False,
  ) -> list[str]:
    files = _matches(root, include) - _matches(root, exclude)
    if not (files or allow_empty):
      build.empty_globs.append(list(include))
    return sorted(files)

  ignore = ('exports_files', 'licenses', 'load', 'package')
  scope = {name: lambda *_, **__: None for name in ignore}
  scope |= {name: rule_of(name) for name in _RULES}
  scope |= {'glob': glob, '__builtins__': {f.__name__: f for f in _STARLARK}}
  exec(compile((root / 'BUILD').read_text('utf-8'), 'BUILD', 'exec'), scope)
  return build


def _matches(root: pathlib.Path, patterns: Sequence[str]) -> set[str]:
  return {
    path.relative_to(root).as_posix()
    for pattern in patterns
    for path in root.glob(f'{pattern}/*' if pattern.endswith('**') else pattern)
    if path.is_file()
  }


def faults(root: pathlib.Path) -> list[str]:
  """Everything that is wrong with `root`/BUILD, one line each."""
  foreign = list(_not_starlark(root))
  if foreign:
    return foreign
  build = run_build(root)
  found = [f'glob {patterns} has no match' for patterns in build.empty_globs]
  for check in (_names, _files, _mains, _deps, _imports, _circles):
    found += check(root, build.targets)
  return found


def _not_starlark(root: pathlib.Path) -> Iterator[str]:
  """Python that BUILD files may not hold (statements, f-strings, lambda)."""
  tree = ast.parse((root / 'BUILD').read_text('utf-8'))
  for statement in tree.body:
    if not isinstance(statement, ast.Expr | ast.Assign):
      yield f'BUILD:{statement.lineno}: {type(statement).__name__} statement'
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr | ast.Lambda | ast.Starred):
      yield f'BUILD:{node.lineno}: {type(node).__name__} expression'


def _names(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  del root
  counts = collections.Counter(target.name for target in targets)
  yield from (f'{name} is defined twice' for name in counts if counts[name] > 1)


def _files(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  """Missing files, and Python files that are not in exactly one target."""
  labels = {target.label for target in targets}
  for target in targets:
    for file in target.srcs + target.data:
      if file not in labels and not (root / file).is_file():
        yield f'{target.label} lists {file}, which does not exist'
  counts = collections.Counter(
    file for target in targets for file in target.srcs
  )
  for file in _python_files(root):
    if counts[file] != 1:
      yield f'{file} is listed {counts[file]} times, not once'


def _python_files(root: pathlib.Path) -> Iterator[str]:
  """Python files of the tree, without hidden folders and environments."""
  for path in sorted(root.iterdir()):
    if path.name.startswith('.') or (path / 'pyvenv.cfg').exists():
      continue
    files = [path] if path.is_file() else sorted(path.rglob('*'))
    for file in files:
      relative = file.relative_to(root)
      hidden = any(part.startswith('.') for part in relative.parts)
      if file.suffix == '.py' and not hidden:
        yield relative.as_posix()


def _mains(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  """Programs whose main file is not theirs; tests that would run nothing."""
  for target in targets:
    if target.rule not in ('py_binary', 'py_test'):
      continue
    if target.runs not in target.srcs:
      yield f'{target.label} does not list its main file {target.runs}'
    elif target.rule == 'py_test' and (root / target.runs).is_file():
      if _TESTS_RUN not in (root / target.runs).read_text('utf-8'):
        yield f'{target.runs} never calls {_TESTS_RUN}'


def _deps(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  del root
  labels = {target.label for target in targets}
  for target in targets:
    for dep in target.deps:
      if dep not in labels:
        yield f'{target.label} depends on {dep}, which is not defined'


def _imports(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  """First-party imports whose owning target is not a direct dependency."""
  owners = {
    file: target for target in reversed(targets) for file in target.srcs
  }
  everywhere = [folder for target in targets for folder in target.imports]
  for target in targets:
    folders = ['', *_search_path(target, targets), *everywhere]
    folders = list(dict.fromkeys(folders))
    for file in target.srcs:
      if not file.endswith('.py') or not (root / file).is_file():
        continue
      for line, module, names in _imported(root / file, file):
        for imported in _resolve(root, folders, module, names):
          owner = owners.get(imported)
          if imported.endswith('.py') and owner is None:
            continue  # reported as a file that no target lists
          if owner is None:
            yield f'{file}:{line}: there is no module {imported}'
          elif owner != target and owner.label not in target.deps:
            yield (
              f'{file}:{line}: imports {imported}, but {target.label} does '
              f'not depend on {owner.label}'
            )


def _search_path(target: Target, targets: list[Target]) -> list[str]:
  """Import folders of a target and of all that it depends on."""
  by_label = {target.label: target for target in targets}
  reached = {target.label: target}
  queue = [target]
  for current in queue:
    for dep in current.deps:
      if dep in by_label and dep not in reached:
        reached[dep] = by_label[dep]
        queue.append(by_label[dep])
  return [folder for target in reached.values() for folder in target.imports]


def _imported(
  path: pathlib.Path, file: str
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
  """(line, module, names imported from it) for each import in a file."""
  for node in ast.walk(ast.parse(path.read_text('utf-8'))):
    match node:
      case ast.Import():
        for alias in node.names:
          yield node.lineno, alias.name, ()
      case ast.ImportFrom():
        names = tuple(alias.name for alias in node.names)
        package = file.split('/')[: -node.level] if node.level else []
        module = [node.module] if node.module else []
        yield node.lineno, '.'.join(package + module), names
      case ast.Call(
        func=ast.Attribute(attr='import_module'),
        args=[ast.Constant(value=str(module))],
      ):
        yield node.lineno, module, ()


def _resolve(
  root: pathlib.Path, folders: list[str], module: str, names: tuple[str, ...]
) -> set[str]:
  """Files that an import reads; the module's name where it has no file.

  `folders` is the search path; the first folder that has a module wins.
  """

  def file_of(dotted: str) -> str | None:
    for folder in folders:
      stem = '/'.join(filter(None, [folder, *dotted.split('.')]))
      for candidate in (f'{stem}.py', f'{stem}/__init__.py'):
        if (root / candidate).is_file():
          return candidate
    return None

  whole = file_of(module)
  parts = [file_of(f'{module}.{name}') or whole for name in names] or [whole]
  top = module.split('.')[0]
  first_party = any((root / folder / top).is_dir() for folder in folders)
  return {part or module for part in parts if part or (first_party and top)}


def _circles(root: pathlib.Path, targets: list[Target]) -> Iterator[str]:
  del root
  deps = {target.label: target.deps for target in targets}
  state = dict.fromkeys(deps, 'new')

  def visit(label: str, path: tuple[str, ...]) -> Iterator[str]:
    if state.get(label, 'done') == 'done':
      return
    if state[label] == 'open':
      yield ' -> '.join([*path[path.index(label) :], label]) + ' is a circle'
      return
    state[label] = 'open'
    for dep in deps[label]:
      yield from visit(dep, (*path, label))
    state[label] = 'done'

  for label in deps:
    yield from visit(label, ())


class RepositoryTest(absltest.TestCase):
  def test_build_has_no_faults(self):
    self.assertEqual(faults(_ROOT), [])

  def test_every_test_file_is_a_test_target(self):
    targets = run_build(_ROOT).targets
    tests = {target.runs for target in targets if target.rule == 'py_test'}
    files = {
      path.relative_to(_ROOT).as_posix()
      for path in (_ROOT / 'tests').rglob('*_test.py')
    }
    self.assertEqual(tests, files)


_TOY_BUILD = """
py_library(name = "low", srcs = glob(["lib/low/*.py"]))
py_library(name = "high", srcs = glob(["lib/high/*.py"]), deps = [":low"])
py_library(
    name = "kernels",
    srcs = ["kernels/fast/one.py"],
    imports = ["kernels"],
)
py_library(
    name = "lib",
    srcs = ["lib/__init__.py"],
    deps = [":high", ":kernels"],
)
[
    py_test(name = file[:-len(".py")], srcs = [file], deps = [":lib"])
    for file in glob(["tests/**/*_test.py"])
]
"""
_TOY_FILES = {
  'BUILD': _TOY_BUILD,
  'lib/__init__.py': 'from lib import high\nimport fast.one\n',
  'lib/low/__init__.py': 'import numpy\n',
  'lib/low/a.py': 'from . import __name__\n',
  'lib/high/__init__.py': 'from lib.low import a as a\n',
  'kernels/fast/one.py': '',
  'tests/low/a_test.py': 'import lib\nabsltest.main()\n',
  '.cache/unlisted.py': '',
  'venv/pyvenv.cfg': '',
  'venv/unlisted.py': '',
}


def _toy_faults(changes: dict[str, str | None]) -> list[str]:
  """Faults of the toy tree after files were replaced, added or removed."""
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    for file, text in (_TOY_FILES | changes).items():
      if text is not None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return faults(root)


class PlantedFaultTest(parameterized.TestCase):
  def test_toy_has_no_faults(self):
    self.assertEqual(_toy_faults({}), [])

  @parameterized.named_parameters(
    (
      'upward_import',
      {'lib/low/a.py': '\nfrom lib.high import a\n'},
      'lib/low/a.py:2: imports lib/high/__init__.py, but :low does not depend '
      'on :high',
    ),
    (
      'import_inside_a_function',
      {'lib/low/a.py': 'def f():\n  import lib.high\n'},
      'lib/low/a.py:2: imports lib/high/__init__.py, but :low does not depend '
      'on :high',
    ),
    (
      'relative_import',
      {'lib/low/a.py': 'from .. import high\n'},
      'lib/low/a.py:1: imports lib/high/__init__.py, but :low does not depend '
      'on :high',
    ),
    (
      'import_by_name',
      {'lib/low/a.py': 'import importlib\nimportlib.import_module("lib")\n'},
      'lib/low/a.py:2: imports lib/__init__.py, but :low does not depend on '
      ':lib',
    ),
    (
      'undeclared_kernel',
      {'lib/high/b.py': 'from fast import one\n'},
      'lib/high/b.py:1: imports kernels/fast/one.py, but :high does not depend '
      'on :kernels',
    ),
    (
      'indirect_dependency_of_a_test',
      {'tests/low/a_test.py': 'import lib.low.a\nabsltest.main()\n'},
      'tests/low/a_test.py:1: imports lib/low/a.py, but :tests/low/a_test does '
      'not depend on :low',
    ),
    (
      'unknown_module',
      {'lib/high/b.py': 'import lib.lower\n'},
      'lib/high/b.py:1: there is no module lib.lower',
    ),
    (
      'unlisted_file',
      {'lib/extra.py': ''},
      'lib/extra.py is listed 0 times, not once',
    ),
    (
      'unlisted_file_at_the_top',
      {'setup.py': ''},
      'setup.py is listed 0 times, not once',
    ),
    (
      'missing_file',
      {'kernels/fast/one.py': None, 'lib/__init__.py': ''},
      ':kernels lists kernels/fast/one.py, which does not exist',
    ),
    (
      'empty_glob',
      {'tests/low/a_test.py': None},
      "glob ['tests/**/*_test.py'] has no match",
    ),
    (
      'test_that_runs_nothing',
      {'tests/low/b_test.py': 'import lib\n'},
      'tests/low/b_test.py never calls absltest.main()',
    ),
  )
  def test_finds_fault_in_files(self, changes, expected):
    self.assertEqual(_toy_faults(changes), [expected])

  @parameterized.named_parameters(
    (
      'file_listed_twice',
      'py_library(name = "more", srcs = ["lib/low/a.py"], deps = [":low"])',
      ['lib/low/a.py is listed 2 times, not once'],
    ),
    (
      'missing_data',
      'filegroup(name = "more", data = ["lib/table.npz"])',
      [':more lists lib/table.npz, which does not exist'],
    ),
    (
      'unknown_dependency',
      'py_library(name = "more", deps = [":low", ":lowest"])',
      [':more depends on :lowest, which is not defined'],
    ),
    (
      'name_defined_twice',
      'filegroup(name = "low")',
      ['low is defined twice'],
    ),
    (
      'main_not_listed',
      'py_binary(name = "tool", deps = [":lib"])',
      [':tool does not list its main file tool.py'],
    ),
    (
      'circle',
      'py_library(name = "x", deps = [":y"])\n'
      'py_library(name = "y", deps = [":z", ":low"])\n'
      'py_library(name = "z", deps = [":x"])',
      [':x -> :y -> :z -> :x is a circle'],
    ),
    (
      'circle_of_one',
      'py_library(name = "x", deps = [":x"])',
      [':x -> :x is a circle'],
    ),
    ('function', 'def f(): pass', ['BUILD:18: FunctionDef statement']),
    ('f_string', 'filegroup(name = f"x")', ['BUILD:18: JoinedStr expression']),
  )
  def test_finds_fault_in_build(self, addition, expected):
    changes = {'BUILD': f'{_TOY_BUILD}{addition}\n'}
    self.assertEqual(_toy_faults(changes), expected)

  @parameterized.parameters((':one', 0), (':two', 0), (':low', 1))
  def test_module_of_two_folders_is_that_of_the_dependency(self, dep, count):
    build = f"""
py_library(name = "one", srcs = ["one/same.py"], imports = ["one"])
py_library(name = "two", srcs = ["two/same.py"], imports = ["two"])
py_binary(name = "run/it", srcs = ["run/it.py"], deps = ["{dep}"])
"""
    changes = {
      'BUILD': _TOY_BUILD + build,
      'one/same.py': '',
      'two/same.py': '',
      'run/it.py': 'import same\n',
    }
    self.assertLen(_toy_faults(changes), count)

  def test_python_that_bazel_lacks_does_not_run(self):
    with self.assertRaises(NameError):
      _toy_faults({'BUILD': 'filegroup(name = open("BUILD").read())'})


if __name__ == '__main__':
  absltest.main()
