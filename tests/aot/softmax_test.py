"""The softmax kernels compile for every target, without spills on GPU."""

import concurrent.futures
import functools
import multiprocessing

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas.softmax import forms, mosaic_gpu, tpu
from tests.aot import targets

# (kind, algorithm, masked, dtype, out_dtype)
CASES = (
  ('softmax', 'auto', False, 'float32', None),
  ('log_softmax', 'online', True, 'bfloat16', 'float32'),
  ('logsumexp', 'auto', True, 'float16', None),
)
# A row in one piece, ragged; a row in several.
SHAPES = ((13, 300), (4, 40000))
MATRIX = tuple(
  (kind, algorithm, masked, dtype, None)
  for kind in forms.KINDS
  for algorithm in forms.ALGORITHMS
  for masked in (False, True)
  for dtype in ('float32', 'bfloat16', 'float16')
)


def _skip_without(target):
  if reason := targets.why_not(target):
    pytest.skip(reason)


def _function(module, shape, case):
  kind, algorithm, masked, dtype, out_dtype = case
  run = functools.partial(
    module.run,
    kind=kind,
    algorithm=algorithm,
    out_dtype=None if out_dtype is None else jnp.dtype(out_dtype),
  )
  arguments = [jax.ShapeDtypeStruct(shape, dtype)]
  if masked:
    arguments.append(jax.ShapeDtypeStruct(shape, bool))
  return run, arguments


def _gpu(target, cases, shapes=SHAPES):
  """Spill bytes and registers of every case."""
  reports = []
  for case in cases:
    for shape in shapes:
      run, arguments = _function(mosaic_gpu, shape, case)
      reports.append(targets.gpu_report(target, run, *arguments)[1])
  return reports


def _in_new_process(function, *arguments):
  # The plug-in compiles for the first GPU that its process compiled for.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
  with pool as executor:
    return executor.submit(function, *arguments).result()


class TpuTest(parameterized.TestCase):
  @parameterized.product(case=CASES, target=tuple(targets.TPUS))
  def test_compiles(self, case, target):
    _skip_without(target)
    for shape in SHAPES:
      run, arguments = _function(tpu, shape, case)
      compiled = targets.compile_for(target, run, *arguments)
      self.assertIn('tpu_custom_call', compiled.as_text())

  def test_pair_result_is_not_copied(self):
    _skip_without('v5e')
    run, arguments = _function(tpu, (256, 131072), CASES[0])
    text = targets.compile_for('v5e', run, *arguments).as_text()
    self.assertIn('conditional(', text)
    self.assertNotIn(' copy(', text)


class GpuTest(parameterized.TestCase):
  def _check(self, reports):
    for report in reports:
      self.assertGreater(report['registers'], 0)
      self.assertEqual((report['spill_stores'], report['spill_loads']), (0, 0))

  @pytest.mark.long('six kernels by ptxas, one after the other')
  def test_hopper(self):
    _skip_without('h100')
    self._check(_gpu('h100', CASES))

  def test_blackwell(self):
    _skip_without('b200')
    self._check(_in_new_process(_gpu, 'b200', CASES[1:2]))


@pytest.mark.slow
class MatrixTest(parameterized.TestCase):
  @parameterized.product(case=MATRIX, target=tuple(targets.TPUS))
  def test_tpu(self, case, target):
    _skip_without(target)
    for shape in (*SHAPES, (1, 1), (9, 129), (64, 4096), (2, 50257)):
      run, arguments = _function(tpu, shape, case)
      targets.compile_for(target, run, *arguments)

  @parameterized.parameters(*targets.GPUS)
  def test_gpu(self, target):
    _skip_without(target)
    shapes = (*SHAPES, (64, 4096), (2, 50257))
    for report in _in_new_process(_gpu, target, MATRIX, shapes):
      self.assertEqual((report['spill_stores'], report['spill_loads']), (0, 0))


if __name__ == '__main__':
  absltest.main()
