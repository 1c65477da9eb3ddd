"""Runs the Python of the README, of the pages under docs/ and of docstrings.

The blocks of one file share a namespace and run in order, in an empty
directory and in this process, but for files that change what others see. A
block of prompts (`>>>`) is called `pycon`, so that the pages leave the prompts
out of what they copy, and compared with the output it shows. Tracebacks name
the line of the page.
"""

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

import pytest
from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_README = _ROOT / 'README.md'
_FENCE = re.compile(r'^(?P<indent> *)```(?P<language>[^\s`{]*).*$')
_ALONE = re.compile(r'config\.update|formats\.register')  # global state
_RUN = ('python', 'pycon')
_SKIPPED = ('', 'bash', 'console', 'json', 'sh', 'text', 'toml')


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
  with _empty_directory():
    for block in blocks(path.read_text('utf-8')):
      if block.language in _SKIPPED:
        continue
      where = f'{path}:{block.line - 1}'
      if block.language not in _RUN:
        raise ValueError(f'{where}: unknown language {block.language!r}')
      prompts = block.text.startswith('>>>')
      if prompts != (block.language == 'pycon'):
        raise ValueError(f'{where}: {_RUN} are without and with prompts')
      if prompts:
        _run_prompts(block, path, namespace)
      else:
        padding = '\n' * (block.line - 1)
        exec(compile(padding + block.text, str(path), 'exec'), namespace)


@contextlib.contextmanager
def _empty_directory():
  with tempfile.TemporaryDirectory() as directory:
    with contextlib.chdir(directory):
      yield


def _run_prompts(block: Block, path: pathlib.Path, namespace: dict) -> None:
  test = doctest.DocTestParser().get_doctest(
    block.text, namespace, path.name, str(path), block.line - 1
  )
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  if runner.run(test, clear_globs=False).failed:
    raise AssertionError(f'{path}:{block.line}: output is not what is shown')
  namespace.update(test.globs)


def run_docstrings(modules: list[str]) -> int:
  """Runs every docstring example of modules; returns how many there are."""
  attempted = failed = 0
  for name in modules:
    result = doctest.testmod(
      importlib.import_module(name), optionflags=doctest.ELLIPSIS
    )
    attempted += result.attempted
    failed += result.failed
  if failed:
    raise AssertionError(f'{failed} of {attempted} examples failed')
  return attempted


def modules_by_part(package: pathlib.Path) -> dict[str, list[str]]:
  """The modules of a package, those of each subpackage together."""
  parts = {}
  for path in sorted(package.rglob('*.py')):
    names = path.relative_to(package.parent).with_suffix('').parts
    names = names[:-1] if names[-1] == '__init__' else names
    parts.setdefault('.'.join(names[:2]), []).append('.'.join(names))
  return parts


def _in_fresh_process(page: pathlib.Path) -> subprocess.CompletedProcess:
  path = os.pathsep.join([str(_ROOT), str(_ROOT / 'pallas')])
  environment = os.environ | {
    'PYTHONPATH': path,
    'JAX_PLATFORMS': 'cpu',
  }
  with tempfile.TemporaryDirectory() as directory:
    return subprocess.run(
      [sys.executable, __file__, '--page', str(page)],
      cwd=directory,
      env=environment,
      capture_output=True,
      text=True,
    )


def _has_python(page: pathlib.Path) -> bool:
  return any(
    block.language in _RUN for block in blocks(page.read_text('utf-8'))
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


class DocsTest(parameterized.TestCase):
  @parameterized.parameters((page,) for page in _pages())
  @pytest.mark.docs
  def test_page_runs(self, page):
    path = _ROOT / page
    if _ALONE.search(path.read_text('utf-8')):
      result = _in_fresh_process(path)
      self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
    else:
      run_page(path)

  def test_readme_has_code(self):
    self.assertTrue(_has_python(_README))

  @parameterized.parameters(
    (part,)
    for package in ('lowbit_jax', 'pallas/lowbit_pallas')
    for part in modules_by_part(_ROOT / package).items()
  )
  @pytest.mark.docs
  def test_docstring_examples_run(self, part):
    with _empty_directory():
      run_docstrings(part[1])

  def test_every_module_is_in_a_part(self):
    parts = modules_by_part(_ROOT / 'lowbit_jax')
    listed = [name for names in parts.values() for name in names]
    package = importlib.import_module('lowbit_jax')
    walked = pkgutil.walk_packages(package.__path__, 'lowbit_jax.')
    self.assertCountEqual(listed, ['lowbit_jax', *(m.name for m in walked)])


class RunnerTest(parameterized.TestCase):
  def _page(self, text: str) -> pathlib.Path:
    directory = self.enterContext(tempfile.TemporaryDirectory())
    page = pathlib.Path(directory) / 'page.md'
    page.write_text(text)
    return page

  @parameterized.named_parameters(
    (
      'blocks_share_a_namespace',
      '```python\nx = 1\n```\ntext\n```python\nassert x == 1\n```\n',
    ),
    (
      'prompts_and_code_share_a_namespace',
      '```pycon\n>>> x = 1\n>>> x + 1\n2\n```\n```python\nx\n```\n',
    ),
    (
      'indented_block',
      '1. Item\n\n    ```python\n    if True:\n      x = 1\n    ```\n',
    ),
    (
      'other_languages_do_not_run',
      '```bash\nexit 1\n```\n```text\n1 +\n```\n```\n1 +\n```\n',
    ),
  )
  def test_runs(self, text):
    run_page(self._page(text))

  @parameterized.named_parameters(
    (
      'exception',
      'a\n\n```python\nx = 1\n\nassert x == 2\n```\n',
      r'page\.md", line 6',
    ),
    ('second_block', '```python\n1\n```\n```python\ny\n```\n', r'line 5'),
    ('syntax', 'a\n```python\nx = \n```\n', r'page\.md", line 3'),
    ('output', '```pycon\n>>> 1 + 1\n3\n```\n', r'page\.md:2'),
    ('prompts', '```python\n>>> 1\n1\n```\n', r'page\.md:1: .*prompts'),
    ('label', 'a\n```py\nx\n```\n', r"page\.md:2: unknown language 'py'"),
  )
  def test_failure_names_file_and_line(self, text, expected):
    page = self._page(text)
    with contextlib.redirect_stdout(io.StringIO()):
      try:
        run_page(page)
      except Exception:
        self.assertRegex(traceback.format_exc(), expected)
      else:
        self.fail('nothing was raised')

  def test_failure_in_a_fresh_process_is_seen(self):
    result = _in_fresh_process(self._page('\n```python\nassert 0\n```\n'))
    self.assertNotEqual(result.returncode, 0)
    self.assertRegex(result.stderr, r'page\.md", line 3')

  def test_pages_run_in_an_empty_directory(self):
    text = '```python\nimport os\nassert not os.listdir()\n```\n'
    run_page(self._page(text))

  def test_wrong_docstring_example_fails(self):
    with tempfile.TemporaryDirectory() as directory:
      package = pathlib.Path(directory) / 'planted_docstring'
      package.mkdir()
      (package / '__init__.py').write_text('')
      (package / 'module.py').write_text('"""\n>>> 1 + 1\n2\n"""\n')
      (package / 'other.py').write_text('"""\n>>> 1 + 1\n3\n"""\n')
      right, wrong = 'planted_docstring.module', 'planted_docstring.other'
      with _on_path(directory):
        self.assertEqual(run_docstrings([right]), 1)
        with self.assertRaises(AssertionError):
          with contextlib.redirect_stdout(io.StringIO()):
            run_docstrings([right, wrong])


@contextlib.contextmanager
def _on_path(directory: str):
  sys.path.insert(0, directory)
  try:
    yield
  finally:
    sys.path.remove(directory)


if __name__ == '__main__':
  if sys.argv[1:2] == ['--page']:
    run_page(pathlib.Path(sys.argv[2]))
  else:
    absltest.main()
