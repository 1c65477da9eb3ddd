"""What kernels for CPUs do with calls that do not fit, and where they reach.

Each test is a process of its own, so that a crash is a failed test.
"""

import functools
import signal

import pytest
from absl.testing import absltest, parameterized

from tests.cpu import processes

_LAYOUTS = ('kn', 'nk')
_SCALES = ('float32', 'float16', 'bfloat16', 'e8m0', 'e4m3fn')
_WRONG = (
  *('fewer arrays', 'more arrays', 'no arrays', 'two results', 'other dtype'),
  *('fewer axes', 'other k', 'other batch', 'other stack', 'no stack'),
  *('other m', 'other n', 'other result'),
)


def _guarded(call: str, before: str = '') -> str:
  return f'from tests.cpu import guarded\n{before}\nguarded.{call}'


# Faults: reads of 4 bytes where fewer are left, a part of a product that is a
# column longer, and sizes that are not compared.
_READS_MORE = """
from lowbit_jax.cpu import _decode
from lowbit_jax.cpu._code import I32, load
_decode._bytes = lambda address, count: load(address, I32)
"""
_BELIEVES_SIZES = """
from lowbit_jax.cpu._frame import Frame
Frame.require_size = lambda *arguments: None
"""
_WRITES_MORE = """
from lowbit_jax.cpu import _rows
def write(weights, part, *others):
  part.end = part.end + 1
  original(weights, part, *others)
original, _rows.write = _rows.write, write
"""


@functools.cache
def _wrong_calls(layout: str) -> tuple[list[str], list[str]]:
  """What is printed of calls by XLA, and of random ones, in one process."""
  calls = (
    f"through_xla({layout!r}); print('---'); guarded.fuzz({layout!r}, 600)"
  )
  first, second = processes.output(_guarded(calls)).split('---\n')
  return first.splitlines(), second.splitlines()


class WrongCallsTest(parameterized.TestCase):
  @parameterized.parameters(*_LAYOUTS)
  def test_xla_raises_what_kernels_answer(self, layout):
    lines, _ = _wrong_calls(layout)
    answers = dict(line.split(': ', 1) for line in lines[:-1])
    self.assertEqual(lines[-1], 'right values after all')
    for name in _WRONG:
      self.assertRegex(
        answers.pop(name), r'INVALID_ARGUMENT: lowbit_jax wq_matmul: \w', name
      )
    self.assertEqual(answers, {'no rows': 'done', 'no batch': 'done'})

  @parameterized.parameters(*_LAYOUTS)
  def test_random_calls_are_refused_or_right(self, layout):
    _, (fitting, *messages) = _wrong_calls(layout)
    self.assertGreater(int(fitting), 100)
    # Of every array the dtype, the axes and each size.
    self.assertGreater(len(messages), 20)

  @parameterized.product(layout=_LAYOUTS, seed=(1, 2, 3))
  @pytest.mark.slow
  def test_more_random_calls(self, layout, seed):
    processes.output(_guarded(f'fuzz({layout!r}, 20000, {seed})'))


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters(
    ('kn', [3]), ('nk', [5, 7]), ('nk', [6], 'bfloat16')
  )
  def test_nothing_outside_of_arrays_is_touched(self, *arguments):
    self.check(*arguments)

  @parameterized.product(layout=_LAYOUTS, bits=([1, 4, 8], [3, 6]))
  def test_integer_products_touch_nothing_outside(self, layout, bits):
    out = processes.output(_guarded(f'check_integers({layout!r}, {bits})'))
    self.assertEqual(out, 'nothing outside was touched\n')

  @parameterized.product(layout=_LAYOUTS, scale=_SCALES)
  @pytest.mark.slow
  def test_of_all_bits_and_scales(self, layout, scale):
    self.check(layout, list(range(1, 9)), scale)

  def check(self, *arguments):
    out = processes.output(_guarded(f'check(*{arguments!r})'))
    self.assertEqual(out, 'nothing outside was touched\n')

  @parameterized.parameters(
    ("check('nk', [3])", _READS_MORE, -signal.SIGSEGV),
    ("check('nk', [8])", _WRITES_MORE, -signal.SIGSEGV),
    (
      "check_integers('nk', [8])",
      _WRITES_MORE.replace('_rows', '_integer_rows'),
      -signal.SIGSEGV,
    ),
    ("fuzz('nk', 600)", _BELIEVES_SIZES, 1),
  )
  def test_finds_planted_faults(self, call, fault, code):
    done = processes.run(_guarded(call, fault))
    self.assertEqual(done.returncode, code, done.stderr)


if __name__ == '__main__':
  absltest.main()
