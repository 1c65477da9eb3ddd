"""benchmarks/gpu.py on a CPU: what it checks, survives, chooses and writes."""

import contextlib
import functools
import importlib
import io
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import stages

import lowbit_jax
from lowbit_jax.ops import _partition
from lowbit_pallas import _tuned

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PATH = str(_ROOT / 'benchmarks')
with mock.patch.object(sys, 'path', [_PATH, *sys.path]):
  gpu = importlib.import_module('gpu')
  cases = importlib.import_module('_gpu_cases')
  plan = importlib.import_module('_gpu_plan')
  report = importlib.import_module('_gpu_report')

CHECKS = {
  f'{family} {name}': (family.split('.')[0], arguments)
  for family, members in plan.families('check', small=True).items()
  if family != 'planted'
  for name, arguments in members
}

# One of each family.
DEFAULT = tuple(
  f'{family} {name}'
  for family, name in (
    ('softmax', 'log_softmax 5x512 float32 masked'),
    ('weights.0', 'uint4_g128 m=5 n=40 k=256 float32'),
    ('blocks', 'fp8 m=5 n=130 k=256'),
    ('blocks', 'int8 m=5 n=130 k=256'),
    ('quantize', 'int3_g32 64x128 float32 rounding=stochastic'),
  )
)


def on_gpu():
  """A process that takes its device for an H100."""
  device = types.SimpleNamespace(
    platform='gpu', device_kind='Fake GPU', compute_capability='9.0'
  )
  stack = contextlib.ExitStack()
  stack.enter_context(mock.patch.object(jax, 'devices', lambda *_: [device]))
  alone = mock.patch.object(_partition, 'is_alone', lambda: True)
  stack.enter_context(alone)
  return stack


def scratch(test) -> pathlib.Path:
  return pathlib.Path(test.enter_context(tempfile.TemporaryDirectory()))


class DriverTest(absltest.TestCase):
  def test_faults_are_isolated(self):
    out = scratch(self)
    with contextlib.redirect_stdout(io.StringIO()):
      driver = gpu.Driver(
        out, 60, cpu=True, patience=gpu.Patience(first=20, later=1)
      )
      planted = plan.families('check', small=True)['planted']
      planted.append(('right again', {'kind': 'right'}))
      driver.run('check', {'planted': planted})
      driver.run('time', {'planted': [('unknown', {'kind': 1, 'what': 2})]})
      driver.close()
    facts = [
      json.loads(line)
      for line in (out / 'results.jsonl').read_text().splitlines()
    ]
    ends = {x['case']: x for x in facts if x['event'] == 'end'}
    self.assertEqual(
      {name: x['ok'] for name, x in ends.items()},
      {
        'right': True,
        'wrong': False,
        'hang': False,
        'crash': False,
        'right again': True,
        'unknown': False,
      },
    )
    self.assertIn('silent', ends['hang']['error'])
    self.assertIn('exit code', ends['crash']['error'])
    self.assertIn('TypeError', ends['unknown']['error'])
    self.assertEmpty(driver.wrong())

  def test_what_there_is_no_time_for_is_named(self):
    out = scratch(self)
    driver = gpu.Driver(out, 0, cpu=True)
    driver.run('check', {'planted': [('hang', {'kind': 'hang'})]})
    driver.close()
    self.assertEqual([x['event'] for x in driver.facts], ['skipped'])
    self.assertIn('planted hang', report.summary(driver.facts))

  def test_a_worker_that_does_not_start_is_named(self):
    out = scratch(self)
    missing = mock.patch.object(gpu, '_WORKER', out / 'missing.py')
    with missing, contextlib.redirect_stdout(io.StringIO()):
      driver = gpu.Driver(out, 30, cpu=True)
      driver.run('check', {'planted': [('right', {'kind': 'right'})] * 2})
      driver.close()
    self.assertIn('did not start', driver.facts[0]['error'])
    self.assertEqual(driver.wrong(), {'planted'})

  def test_the_driver_imports_no_jax(self):
    code = 'import sys, gpu; sys.exit("jax" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=_PATH, check=True)


class CasesTest(parameterized.TestCase):
  @parameterized.named_parameters((name, *CHECKS[name]) for name in DEFAULT)
  def test_right_results_pass_and_spoilt_ones_do_not(
    self, operation, arguments
  ):
    self.check_case(operation, arguments)

  @parameterized.named_parameters(
    (name, *case) for name, case in CHECKS.items() if name not in DEFAULT
  )
  @pytest.mark.slow
  def test_more_right_results_pass_and_spoilt_ones_do_not(
    self, operation, arguments
  ):
    self.check_case(operation, arguments)

  def check_case(self, operation, arguments):
    seen = []
    make = cases.OPERATIONS[operation]

    def made(*args, **kwargs):
      setup = make(*args, **kwargs)

      def compare(result, inputs):
        seen.append((setup, result, inputs))
        return setup.compare(result, inputs)

      return setup._replace(compare=compare)

    with mock.patch.dict(cases.OPERATIONS, {operation: made}):
      fact = cases.run('check', operation, arguments, cpu=True)
    self.assertTrue(fact['ok'], fact)
    ((setup, result, inputs),) = seen
    self.assertFalse(setup.compare(self.spoilt(result), inputs)['ok'])

  def spoilt(self, result):
    """One wrong column, or one wrong byte of codes in eight rows."""
    if isinstance(result, lowbit_jax.QArray):
      codes = np.array(result.codes)
      codes[:8, :] ^= 0x22
      return lowbit_jax.QArray(**{**vars(result), 'codes': jnp.asarray(codes)})
    result = np.array(result)
    result[..., -1] = 1.01 * result[..., -1] + 1e-3
    return jnp.asarray(result)

  def test_a_wrong_column_of_a_large_product_is_seen(self):
    want = np.random.RandomState(0).randn(64, 8192).astype(np.float32)
    got = want.copy()
    self.assertTrue(cases.compare_means(got, want)['ok'])
    got[:, 7] = want[:, 8]
    self.assertFalse(cases.compare_means(got, want)['ok'])

  def test_errors_are_located(self):
    want = np.ones((128, 128))
    got = want.copy()
    got[3::64, 5] = 0
    fact = cases.compare(got, want, 1e-3 * want)
    self.assertEqual(fact['wrong']['rows_mod_64'].index('#'), 3)
    self.assertEqual(fact['wrong']['columns_mod_64'].index('#'), 5)
    self.assertEqual(fact['wrong']['zeros'], 1.0)

  def test_other_bits_are_seen(self):
    calls = iter(range(9))

    def run(x):
      return jax.pure_callback(
        lambda x: np.float32(x + next(calls)), x, x, vmap_method='sequential'
      )

    setup = cases.Setup(
      run, lambda seed: (jnp.zeros((4, 2)),), lambda *_: {'ok': True}
    )
    fact = cases.check(setup)
    self.assertEqual(fact, {'ok': False, 'repeats': False, 'row_alone': False})

  @parameterized.parameters('softmax', 'blocks', 'quantize')
  def test_entries_are_those_that_kernels_ask_for(self, operation):
    self.check_entries(operation)

  @pytest.mark.slow
  def test_entries_of_weights_are_those_that_kernels_ask_for(self):
    self.check_entries('weights')

  def check_entries(self, operation):
    name, arguments = plan.families('tune', small=True)[operation][1]
    arguments = dict(arguments)
    sizes, rows = arguments.pop('sizes'), arguments.get('rows')
    if rows:
      arguments['rows'] = rows[0]
    with on_gpu():
      setup = cases.OPERATIONS[operation]('mosaic_gpu', **arguments)
      inputs = jax.eval_shape(lambda: setup.inputs(0))
      for entry in ({}, sizes):
        with cases.entry(*setup.entry, entry) as asked:
          jax.eval_shape(setup.run, *inputs)
        self.assertNotEmpty(asked, name)
      with cases.entry(*setup.entry, {'unknown': 1}):
        with self.assertRaisesRegex(ValueError, 'unknown'):
          jax.eval_shape(setup.run, *inputs)

  def test_sizes_that_no_kernel_asks_for_are_an_error(self):
    setup = cases.Setup(
      functools.partial(lowbit_jax.softmax, implementation='xla'),
      lambda seed: (np.full((4, 8), seed, np.float32),),
      lambda *_: {'ok': True},
      entry=('softmax', 'row'),
    )
    timing = mock.patch.object(cases, 'device_time', lambda *_: (1.0, '', {}))
    with timing, self.assertRaisesRegex(AssertionError, 'no kernel asked'):
      cases.tuned([setup], {})

  def test_plans_name_each_case_once_and_fit_the_operations(self):
    for small in (False, True):
      for stage in ('check', 'time', 'tune'):
        for family, members in plan.families(stage, small).items():
          names = [name for name, _ in members]
          self.assertLen(set(names), len(names), family)
          self.assertIn(family.split('.')[0], {*cases.OPERATIONS, 'planted'})
          if stage == 'tune':
            self.assertEqual(members[0][1]['sizes'], {}, family)


class TimeTest(absltest.TestCase):
  def test_inputs_rotate_and_pass_for_jitted(self):
    f = cases.Rotated(lambda x: x, [(jnp.float32(i),) for i in range(3)])
    self.assertIsInstance(f, stages.Wrapped)
    seen = [float(f()) for _ in range(5)]
    self.assertEqual(seen, [0, 1, 2, 0, 1])

  def test_kernels_are_added_up(self):
    def measure(call, *, aggregate, iterations):
      self.assertFalse(aggregate)
      call()
      runs = [
        [('a', i / 1e3), ('b', 1.0), ('a', 1.0)] for i in range(iterations)
      ]
      return lambda: (None, runs)

    with mock.patch.object(cases.profiler, 'measure', measure):
      seconds, timer, kernels = cases.device_time(
        lambda x: x, [(jnp.zeros(1),)]
      )
    self.assertEqual(timer, 'cupti')
    self.assertAlmostEqual(seconds, (2 + 0.01) / 1e3)
    self.assertEqual(kernels, {'a': 1000.0, 'b': 1000.0})

  def test_the_clock_stands_in(self):
    def nothing(call, **_):
      return lambda: (None, None)

    with mock.patch.object(cases.profiler, 'measure', nothing):
      seconds, timer, kernels = cases.device_time(
        jnp.sin, [(jnp.zeros(1),)], cpu=True
      )
    self.assertStartsWith(timer, 'clock (RuntimeError: no kernels')
    self.assertGreater(seconds, 0)
    self.assertEqual(kernels, {})


def end(stage, **fact):
  fact = {'family': 'softmax', 'case': 'this', 'ok': True, **fact}
  return dict(event='end', stage=stage, **fact)


DEVICE = end(
  'env', family='env', device='NVIDIA  H100 (80GB) HBM3', jax='0.11.2',
  nvidia_smi='', date='2026-01-01', timer='cupti', copy_bytes=3e12,
  bf16_flops=8e14,
)  # fmt: skip


def tuning(us, **sizes):
  return end('tune', op='softmax', key='row', sizes=sizes, us=us)


class ReportTest(parameterized.TestCase):
  @parameterized.parameters(
    ([tuning([1.0]), tuning([0.7], n=3), tuning([0.5], n=2)], {'n': 2}),
    ([tuning([1.0]), tuning([0.99], n=2)], None),
    ([tuning([1.0, 4.0]), tuning([0.5, 9.0], n=2)], None),
    ([tuning([1.0, 4.0]), tuning([0.5, 7.0], n=2)], {'n': 2}),
  )
  def test_the_fastest_sizes_are_kept_where_they_pay(self, facts, kept):
    self.assertEqual(report.best_sizes(facts), {'softmax': {'row': kept}})

  def test_sizes_without_the_heuristic_or_wrong_do_not_count(self):
    self.assertEqual(report.best_sizes([tuning([0.5], n=2)]), {})
    wrong = dict(tuning([0.1], n=2), ok=False)
    facts = [tuning([1.0]), wrong]
    self.assertEqual(report.best_sizes(facts), {'softmax': {'row': None}})

  def test_tables_are_merged(self):
    old = {'b': {'n': 1}, 'a': {'n': 2}}
    got = report.merged(old, {'b': None, 'c': {'n': 3}})
    self.assertEqual(list(got.items()), [('a', {'n': 2}), ('c', {'n': 3})])

  def test_tables_are_those_that_kernels_read(self):
    out = scratch(self)
    report.write([DEVICE, tuning([1.0]), tuning([0.5], n=2)], out)
    with mock.patch.object(_tuned, 'ROOT', out):
      path = _tuned.path('softmax', DEVICE['device'])
    self.assertEqual(_tuned.read(path), {'row': {'n': 2}})

  def test_summary(self):
    facts = [
      DEVICE,
      end('check', worst=1e-7, tolerance=2e-7, repeats=True, row_alone=False),
      end('check', case='that', ok=False, error='Bad:\n| news'),
      end(
        'time', us=2e6, bytes=3e12, flops=0.0,
        others={'slow': 9.0, 'fast': 3.0},
      ),
      end('time', case='that', ok=False, worst=math.inf),
      tuning([2.0, 4.0]),
      tuning([1.0, 2.0], n=2),
      dict(event='skipped', stage='tune', family='blocks', case='big'),
    ]  # fmt: skip
    text = report.summary(facts)
    for line in (
      '# NVIDIA  H100 (80GB) HBM3',
      '## Checks: 1 of 2 right',
      '| softmax | this | right | 1e-07 | 2e-07 | other bits for a row alone |',
      '| softmax | that | **WRONG** | - | - | Bad: / news |',
      '| softmax | this | 2000000.0 | 50% | 1.50x | fast |',
      '| softmax | that | - | - | - | wrong: error inf |',
      '| softmax | this | 1.0, 2.0 | 50%, 50% |',
      'Not reached: tune blocks big.',
    ):
      self.assertIn(line, text)


if __name__ == '__main__':
  absltest.main()
