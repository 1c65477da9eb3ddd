"""benchmarks/gpu.py on a CPU: what it checks, chooses and writes."""

import functools
import importlib
import json
import pathlib
import sys
import tempfile
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import stages

import lowbit_jax
from lowbit_jax.ops import _partition
from lowbit_pallas import _tuned

_ROOT = pathlib.Path(__file__).resolve().parents[2]
with mock.patch.object(sys, 'path', [str(_ROOT / 'benchmarks'), *sys.path]):
  _tuning = importlib.import_module('_tuning')
  gpu = importlib.import_module('gpu')


class CasesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    small = dict(
      GPU='xla',
      ROTATE_BYTES=0,
      SOFTMAX=((8, 512),),
      WEIGHTS=('int4_g128', 'int8_channel'),
      SIZES=(256,),
      ROWS=(1, 16),
      QUANTIZE=(('nvfp4', 0), ('mxfp4', 32)),
    )
    self.enter_context(mock.patch.multiple(gpu, **small))

  @parameterized.parameters('softmax', 'weights', 'blocks', 'quantize')
  def test_cases_run_and_are_checked(self, name):
    for group in gpu.GROUPS[name]():
      for case in group.cases:
        right = case.run(*case.inputs[0])
        case.check(right)
        self.assertGreater(case.bytes, 0)
        for f, inputs in case.others.values():
          if f is not gpu.scaled_matmul or jax.__version__ > '0.11':
            jax.eval_shape(f, *inputs[0])
        with self.assertRaises(AssertionError):
          case.check(self.spoilt(right))

  def spoilt(self, result):
    """One wrong column, or one wrong byte of codes."""
    if isinstance(result, lowbit_jax.QArray):
      codes = np.array(result.codes)
      codes[:8, :] ^= 0x22
      return lowbit_jax.QArray(**{**vars(result), 'codes': jnp.asarray(codes)})
    return result.at[..., 0].set(2 * result[..., 1])

  @parameterized.parameters('softmax', 'weights', 'blocks', 'quantize')
  def test_keys_are_those_that_kernels_ask_for(self, name):
    groups = [g for g in gpu.GROUPS[name]() if g.candidates]
    self.assertNotEmpty(groups)
    device = types.SimpleNamespace(
      platform='gpu', device_kind='Fake GPU', compute_capability='9.0'
    )
    self.enter_context(mock.patch.object(jax, 'devices', lambda: [device]))
    alone = mock.patch.object(_partition, 'is_alone', lambda: True)
    self.enter_context(alone)
    for group in groups:
      with mock.patch.object(_tuned, 'find', return_value=None) as find:
        for case in group.cases:
          run = functools.partial(case.run, implementation='mosaic_gpu')
          jax.eval_shape(run, *case.inputs[0])
      asked = {call.args[:3] for call in find.call_args_list}
      self.assertEqual(asked, {(group.op, 'mosaic_gpu', group.key)})

  def test_inputs_rotate_and_pass_for_jitted(self):
    f = gpu.Rotated(lambda x: x, [(jnp.float32(i),) for i in range(3)])
    self.assertIsInstance(f, stages.Wrapped)
    seen = [float(f()) for _ in range(5)]
    self.assertEqual(seen, [0, 1, 2, 0, 1])

  def test_rows_hold_the_best_of_xla(self):
    case = gpu.Case(
      'this', jnp.sin, [(1.0,)], lambda got: None, 3e12, 0.0,
      {'slow': (jnp.cos, []), 'fast': (jnp.tan, [])},
    )  # fmt: skip
    times = {jnp.sin: 2.0, jnp.cos: 9.0, jnp.tan: 3.0}
    with mock.patch.multiple(
      gpu,
      device_time=lambda f, inputs: times[f],
      copy_bandwidth=lambda: 3e12,
    ):
      self.assertEqual(
        gpu.row(case), '| this | 2000000.0 | 50% | 1.50x | fast |'
      )


class TuningTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.enter_context(mock.patch.object(_tuned, 'ROOT', root))
    self.addCleanup(_tuned.read.cache_clear)
    device = types.SimpleNamespace(platform='gpu', device_kind='Fake GPU')
    self.enter_context(mock.patch.object(jax, 'devices', lambda: [device]))
    self.table = _tuned.path('softmax', 'Fake GPU')

  def sizes(self):
    """What the kernel would take now."""
    return _tuned.find('softmax', 'mosaic_gpu', 'row', lambda n: n)

  def best(self, seconds, *candidates):
    lines = []

    def trial():
      return seconds(self.sizes())

    job = _tuning.Job('softmax', 'row', candidates, [trial, trial])
    return _tuning.best(job, lines.append), lines

  def test_the_fastest_right_candidate_is_kept(self):
    def seconds(n):
      if n == 1:
        raise AssertionError('wrong result')
      return {None: 1.0, 2: 0.5, 3: 0.7}[n]

    found, lines = self.best(seconds, *({'n': n} for n in (3, 1, 2, 0)))
    self.assertEqual(found, {'n': 2})
    self.assertLen(lines, 4)
    self.assertIn('wrong result', lines[1])
    self.assertIn('positive', lines[3])

  def test_small_gains_leave_the_heuristic(self):
    found, _ = self.best(lambda n: 1.0 if n is None else 0.99, {'n': 2})
    self.assertIsNone(found)

  def test_a_wrong_heuristic_is_an_error(self):
    def seconds(n):
      raise AssertionError('wrong result')

    with self.assertRaisesRegex(AssertionError, 'wrong'):
      self.best(seconds, {'n': 2})

  def test_old_entries_do_not_disturb(self):
    _tuning.write(self.table, {'row': {'n': 3}})
    self.assertEqual(self.sizes(), 3)
    found, _ = self.best(lambda n: 1.0 if n is None else 0.5, {'n': 2})
    self.assertEqual(found, {'n': 2})
    self.assertEqual(self.sizes(), 3)

  def test_tables_are_updated(self):
    _tuning.write(self.table, {'b': {'n': 1}, 'a': {'n': 2}})
    _tuning.write(self.table, {'b': None, 'c': {'n': 3}})
    got = json.loads(self.table.read_text())
    self.assertEqual(list(got.items()), [('a', {'n': 2}), ('c', {'n': 3})])
    self.assertEqual(list(self.table.parent.iterdir()), [self.table])

  def test_a_table_that_cannot_be_written_stays(self):
    _tuning.write(self.table, {'a': {'n': 2}})
    with self.assertRaises(TypeError):
      _tuning.write(self.table, {'a': {'n': object()}})
    self.assertEqual(json.loads(self.table.read_text()), {'a': {'n': 2}})
    self.assertEqual(list(self.table.parent.iterdir()), [self.table])


if __name__ == '__main__':
  absltest.main()
