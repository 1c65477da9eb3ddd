"""The scripts that run tests: what they plant, and where they go on."""

import contextlib
import io
import pathlib
import subprocess
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from tests import mutants, slow

_ROOT = pathlib.Path(__file__).resolve().parents[1]


class MutantsTest(parameterized.TestCase):
  @parameterized.parameters(*mutants.MUTANTS)
  def test_plants_its_fault(self, part, what, file, right, wrong, test):
    del part, what
    text = (_ROOT / file).read_text('utf-8')
    self.assertEqual(text.count(right), 1)
    compile(text.replace(right, wrong), file, 'exec')
    self.assertTrue((_ROOT / test.split('::')[0]).is_file())

  def test_names_are_unique(self):
    names = [mutant.what for mutant in mutants.MUTANTS]
    self.assertLen(set(names), len(names))


class SlowTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    for name in 'abc':
      (root / f'{name}_test.py').write_text('@pytest.mark.slow')
    (root / 'quick_test.py').write_text('')
    self.commit, self.broken, self.ran = 'first', None, []
    self.enter_context(
      mock.patch.multiple(
        slow, _ROOT=root, _NOTES=root / 'notes.json', commit=lambda: self.commit
      )
    )
    self.enter_context(mock.patch.object(subprocess, 'run', self.pytest))

  def pytest(self, command, cwd):
    del cwd
    self.ran.append(command[-1])
    if command[-1] == self.broken == 'b_test.py':
      raise KeyboardInterrupt
    return subprocess.CompletedProcess(command, int(command[-1] == self.broken))

  def run_all(self) -> list[str]:
    """Files that a call runs."""
    self.ran.clear()
    with contextlib.redirect_stdout(io.StringIO()):
      slow.main(['.'])
    return list(self.ran)

  def test_goes_on_after_an_interruption(self):
    self.broken = 'b_test.py'
    with self.assertRaises(KeyboardInterrupt):
      self.run_all()
    self.broken = None
    self.assertEqual(self.run_all(), ['b_test.py', 'c_test.py'])
    self.assertEqual(self.run_all(), [])

  def test_runs_failures_and_other_commits_again(self):
    self.broken = 'c_test.py'
    with self.assertRaisesRegex(SystemExit, 'c_test.py'):
      self.run_all()
    self.broken = None
    self.assertEqual(self.run_all(), ['c_test.py'])
    self.commit = 'second'
    self.assertLen(self.run_all(), 3)

  def test_damaged_notes_are_no_notes(self):
    self.run_all()
    slow._NOTES.write_text('{"commit"')
    self.assertLen(self.run_all(), 3)


if __name__ == '__main__':
  absltest.main()
