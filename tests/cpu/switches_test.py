"""Where kernels for CPUs are switched off, missing or left alone."""

from absl.testing import absltest, parameterized

from tests.cpu import processes

_PROGRAM = """
import numpy as np
import lowbit_jax as lowbit
from tests.ops import products

x, q = products.data(3, 64), products.make('mxfp4', 64, 24)
choice = lowbit.ops.select_implementation('dot', x, q)
print(choice.implementation)
print(choice.refusals.get('cpu', ''))
products.assert_product(lowbit.dot(x, q), 'mk,kn->mn', x, q)
try:
  lowbit.dot(x, q, implementation='cpu')
  print('runs by name')
except NotImplementedError as error:
  print(error)
"""

_MISSING = """
import importlib.util, sys
find = importlib.util.find_spec
def find_spec(name, *rest):
  return None if name == 'llvmlite' else find(name, *rest)
importlib.util.find_spec = find_spec
sys.modules['llvmlite'] = None
"""

_OLDER = """
from lowbit_jax.cpu import _compiler
_compiler.host = _compiler.generic
"""

_ELSEWHERE = """
from lowbit_jax.cpu import _compiler
_compiler.host = lambda: _compiler.generic()._replace(triple='riscv64-linux')
"""


def _answers(before: str = '', **environment: str) -> tuple[str, str, str]:
  """The implementation, why kernels were refused, and what the name gives."""
  lines = processes.output(before + _PROGRAM, **environment).split('\n')
  return lines[0], lines[1], lines[2]


class SwitchesTest(parameterized.TestCase):
  def test_kernels_run_unasked(self):
    """Also where nothing can be written: there is no cache on disk."""
    got = _answers(
      HOME='/proc/none', XDG_CACHE_HOME='/proc/none', TMPDIR='/proc/none'
    )
    self.assertEqual(got, ('cpu', '', 'runs by name'))

  @parameterized.named_parameters(
    ('switched off', '', {'LOWBIT_JAX_CPU': '0'}, 'LOWBIT_JAX_CPU=0 switches'),
    ('missing', _MISSING, {}, r"pip install 'lowbit-jax\[cpu\]'"),
  )
  def test_xla_runs_without_them(self, before, environment, remedy):
    implementation, refusal, named = _answers(before, **environment)
    self.assertEqual(implementation, 'xla')
    self.assertRegex(refusal, remedy)
    self.assertRegex(named, f'no implementation of .*{remedy}')

  @parameterized.named_parameters(
    ('older', _OLDER, 'has no avx2, f16c, fma'),
    ('another kind', _ELSEWHERE, 'not proven on riscv64: name it'),
  )
  def test_other_processors_are_not_asked(self, before, why):
    # Nothing is compiled here for a kind of processor that is not this one.
    program = _PROGRAM[: _PROGRAM.index('try:')]
    lines = processes.output(before + program).split('\n')
    self.assertEqual(lines[0], 'xla')
    self.assertIn(why, lines[1])


if __name__ == '__main__':
  absltest.main()
