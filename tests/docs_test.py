"""Runs the Python of the README, of the pages under docs/ and of docstrings.

The blocks of one file share a namespace and run in order, in an empty
directory. Files share processes, so that JAX starts twice and not twenty times,
but for those that change what others see. A block of prompts (`>>>`) is
compared with the output it shows. Tracebacks name the line of the page.
"""

import argparse
import contextlib
import doctest
import importlib
import io
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_README = _ROOT / 'README.md'
_FENCE = re.compile(r'^(?P<indent> *)```(?P<language>[^\s`{]*).*$')
_ALONE = re.compile(r'config\.update|formats\.register')  # global state
_SKIPPED = ('', 'bash', 'console', 'json', 'mermaid', 'sh', 'text', 'toml')


class Block(NamedTuple):
  language: str
  line: int  # of the first line inside the fence, counted from 1
  text: str


def blocks(text: str) -> Iterator[Block]:
  """The fenced blocks of a Markdown text."""
  lines = iter(enumerate(text.splitlines(), start=1))
  for number, line in lines:
    if fence := _FENCE.match(line):
      indent, language = fence['indent'], fence['language']
      body = []
      for _, inner in lines:
        if inner.strip() == '```':
          break
        body.append(inner.removeprefix(indent))
      yield Block(language, number + 1, '\n'.join(body) + '\n')


def run_page(path: pathlib.Path) -> None:
  """Executes the Python blocks of a page; raises at the first that fails."""
  namespace = {'__name__': '__main__'}
  for block in blocks(path.read_text('utf-8')):
    if block.language in _SKIPPED:
      continue
    if block.language != 'python':
      where = f'{path}:{block.line - 1}'
      raise ValueError(f'{where}: unknown language {block.language!r}')
    if block.text.startswith('>>>'):
      _run_prompts(block, path, namespace)
    else:
      padding = '\n' * (block.line - 1)
      exec(compile(padding + block.text, str(path), 'exec'), namespace)


def run_pages(paths: list[pathlib.Path]) -> int:
  """Runs every page, each in an empty directory; returns how many failed."""
  failed = 0
  for path in paths:
    with tempfile.TemporaryDirectory() as directory:
      with contextlib.chdir(directory):
        try:
          run_page(path)
        except Exception:
          traceback.print_exc()
          failed += 1
  return failed


def _run_prompts(block: Block, path: pathlib.Path, namespace: dict) -> None:
  test = doctest.DocTestParser().get_doctest(
    block.text, namespace, path.name, str(path), block.line - 1
  )
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  if runner.run(test, clear_globs=False).failed:
    raise AssertionError(f'{path}:{block.line}: output is not what is shown')
  namespace.update(test.globs)


def run_docstrings(package: str) -> int:
  """Runs every docstring example of a package; returns how many there are."""
  attempted = failed = 0
  root = importlib.import_module(package)
  modules = pkgutil.walk_packages(root.__path__, f'{package}.')
  for name in [package, *(module.name for module in modules)]:
    result = doctest.testmod(
      importlib.import_module(name), optionflags=doctest.ELLIPSIS
    )
    attempted += result.attempted
    failed += result.failed
  if failed:
    raise AssertionError(f'{failed} of {attempted} examples failed')
  return attempted


def _in_fresh_process(*arguments: str) -> subprocess.CompletedProcess:
  path = os.pathsep.join([str(_ROOT), str(_ROOT / 'pallas')])
  environment = os.environ | {
    'PYTHONPATH': path,
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # No page measures speed.
  }
  with tempfile.TemporaryDirectory() as directory:
    return subprocess.run(
      [sys.executable, __file__, *arguments],
      cwd=directory,
      env=environment,
      capture_output=True,
      text=True,
    )


def _has_python(page: pathlib.Path) -> bool:
  return any(
    block.language == 'python' for block in blocks(page.read_text('utf-8'))
  )


def _pages() -> list[str]:
  """The README and every page that has something to run or a wrong label."""
  pages = [
    page
    for page in sorted((_ROOT / 'docs').rglob('*.md'))
    if {block.language for block in blocks(page.read_text('utf-8'))}
    - set(_SKIPPED)
  ]
  return [str(page.relative_to(_ROOT)) for page in [_README, *pages]]


def _groups() -> list[list[str]]:
  """The pages of each process: two for those that leave no traces."""
  shared, alone = [], []
  for page in _pages():
    text = (_ROOT / page).read_text('utf-8')
    (alone if _ALONE.search(text) else shared).append(page)
  return [shared[::2], shared[1::2], *([page] for page in alone)]


class DocsTest(parameterized.TestCase):
  @parameterized.parameters((group,) for group in _groups())
  def test_pages_run(self, pages):
    result = _in_fresh_process('--pages', *(str(_ROOT / p) for p in pages))
    self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

  def test_every_page_is_in_one_group(self):
    grouped = [page for group in _groups() for page in group]
    self.assertCountEqual(grouped, _pages())

  def test_readme_has_code(self):
    self.assertTrue(_has_python(_README))

  def test_docstring_examples_run(self):
    packages = ('lowbit_jax', 'lowbit_pallas')
    result = _in_fresh_process('--docstrings', *packages)
    self.assertEqual(result.returncode, 0, result.stdout + result.stderr)


class RunnerTest(parameterized.TestCase):
  def _run(self, text: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as directory:
      page = pathlib.Path(directory) / 'page.md'
      page.write_text(text)
      return _in_fresh_process('--pages', str(page))

  def test_blocks_share_a_namespace(self):
    text = '```python\nx = 1\n```\ntext\n```python\nassert x == 1\n```\n'
    self.assertEqual(self._run(text).returncode, 0)

  def test_prompts_and_code_share_a_namespace(self):
    text = '```python\n>>> x = 1\n>>> x + 1\n2\n```\n```python\nx\n```\n'
    self.assertEqual(self._run(text).returncode, 0)

  def test_indented_block_runs(self):
    text = '1. Item\n\n    ```python\n    if True:\n      x = 1\n    ```\n'
    self.assertEqual(self._run(text).returncode, 0)

  def test_other_languages_do_not_run(self):
    text = '```bash\nexit 1\n```\n```text\n1 +\n```\n```\n1 +\n```\n'
    self.assertEqual(self._run(text).returncode, 0)

  @parameterized.named_parameters(
    (
      'exception',
      'a\n\n```python\nx = 1\n\nassert x == 2\n```\n',
      r'page\.md", line 6',
    ),
    ('second_block', '```python\n1\n```\n```python\ny\n```\n', r'line 5'),
    ('syntax', 'a\n```python\nx = \n```\n', r'page\.md", line 3'),
    ('output', '```python\n>>> 1 + 1\n3\n```\n', r'page\.md:2'),
    ('label', 'a\n```py\nx\n```\n', r"page\.md:2: unknown language 'py'"),
  )
  def test_failure_names_file_and_line(self, text, expected):
    result = self._run(text)
    self.assertNotEqual(result.returncode, 0)
    self.assertRegex(result.stdout + result.stderr, expected)

  def test_wrong_docstring_example_fails(self):
    with tempfile.TemporaryDirectory() as directory:
      package = pathlib.Path(directory) / 'planted_docstring'
      package.mkdir()
      (package / '__init__.py').write_text('')
      (package / 'module.py').write_text('"""\n>>> 1 + 1\n2\n"""\n')
      with _on_path(directory):
        self.assertEqual(run_docstrings('planted_docstring'), 1)
      (package / 'other.py').write_text('"""\n>>> 1 + 1\n3\n"""\n')
      importlib.invalidate_caches()
      with _on_path(directory), self.assertRaises(AssertionError):
        with contextlib.redirect_stdout(io.StringIO()):
          run_docstrings('planted_docstring')


@contextlib.contextmanager
def _on_path(directory: str):
  sys.path.insert(0, directory)
  try:
    yield
  finally:
    sys.path.remove(directory)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument('--pages', type=pathlib.Path, nargs='+')
  parser.add_argument('--docstrings', nargs='+')
  known, _ = parser.parse_known_args()
  if known.pages:
    sys.exit(run_pages(known.pages) > 0)
  elif known.docstrings:
    for package in known.docstrings:
      run_docstrings(package)
  else:
    absltest.main()
