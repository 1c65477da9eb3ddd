"""block_matmul compiles for every target, on machines without any of them."""

import concurrent.futures
import functools
import multiprocessing
import re

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas import _mosaic_gpu as mgpu
from lowbit_pallas.block_matmul import (
  mosaic_gpu,
  reference,
  tpu,
  tpu_config as config,
)
from tests.aot import targets
from tests.pallas.block_matmul import operands as ops

MX = tuple(
  name for name, (spec, _) in ops.FORMATS.items() if 0 < spec.block < 128
)
TPU_CASES = (
  ('mxfp8_e4m3', 'mxfp4', 'nt', 'exact'),
  ('nvfp4', 'mxfp4', 'nt', 'exact'),
  ('mxfp6_e3m2', 'mxfp6_e2m3', 'tn', 'exact'),
  ('fp8_128', 'fp8_128_e5m2', 'nn', 'fp8_128'),
  ('int8', 'int8', 'nt', 'integer'),
)
HOPPER_CASES = (
  (20, 'fp8_128', 'fp8_128', 'nt', 'fp8_128', 'f32.e4m3.e4m3'),
  (200, 'fp8_128_e5m2', 'fp8_128_e5m2', 'nn', 'fp8_128', 'f32.e5m2.e5m2'),
  (200, 'int8', 'int8', 'nt', 'integer', 's32.s8.s8'),
)
BLACKWELL_CASES = (
  ('mxfp8_e4m3', 'mxfp8_e4m3', 'nt', 'mxf8f6f4.block_scale.scale_vec::1X'),
  ('mxfp6_e3m2', 'mxfp4', 'nn', 'mxf8f6f4.block_scale.scale_vec::1X'),
  ('mxfp4', 'mxfp4', 'nt', 'block_scale.scale_vec::2X'),
  ('nvfp4', 'nvfp4', 'tn', 'mxf4nvf4.block_scale.scale_vec::4X'),
)


def _skip_without(target):
  reason = targets.why_not(target)
  if reason is not None:
    pytest.skip(reason)


def _arguments(left, right, layout, mode, m, n, k):
  """Abstract operands, and their static descriptions."""
  out, specs = [], []
  for name, rows, axis, high in zip(
    (left, right),
    (m, n),
    reference.k_axes(layout),
    (1, 128 if mode == 'fp8_128' else 1),
    strict=True,
  ):
    spec = ops.FORMATS[name][0]
    codes = (rows, k * spec.bits // 8)
    scale = (-(-rows // high), k // spec.block if spec.block else 1)
    dtype = jnp.float32 if spec.scale is None else jnp.uint8
    order = 1 if axis == 1 else -1
    out.append(jax.ShapeDtypeStruct(codes[::order], jnp.uint8))
    out.append(jax.ShapeDtypeStruct(scale[::order], dtype))
    specs.append(spec)
  return out, specs


def _compile_tpu(target, left, right, layout, mode, m=264, n=256, k=1024):
  arguments, (a, b) = _arguments(left, right, layout, mode, m, n, k)
  facts = {'layout': layout, 'mode': mode}
  shapes = arguments[0].shape, arguments[2].shape
  tiles = config.Config(128, 128, config.k_unit(a, b, layout))
  reason = tpu.why_not(*shapes, a, b, target=target, config=tiles, **facts)
  if reason is not None:
    return reason
  targets.compile_for(
    target, lambda *x: tpu.run(*x, a, b, config=tiles, **facts), *arguments
  )
  return None


def _gpu(target, left, right, layout, mode, m, n=300, k=1024):
  """PTX and costs, or why not."""
  arguments, (a, b) = _arguments(left, right, layout, mode, m, n, k)
  facts = {'layout': layout, 'mode': mode, 'target': target}
  shapes = arguments[0].shape, arguments[2].shape
  reason = mosaic_gpu.why_not(*shapes, a, b, **facts)
  if reason is not None:
    return reason
  run = functools.partial(mosaic_gpu.run, **facts)
  return targets.gpu_report(target, lambda *x: run(*x, a, b), *arguments)


def _blackwell(cases):
  # A kernel compiled before is not dumped again: each has a K of its own.
  return [
    _gpu('b200', *case, 'exact', 200, k=256 * (i + 4))
    for i, case in enumerate(cases)
  ]


def _in_new_process(function, *arguments):
  # The plug-in compiles for the first GPU that its process compiled for.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
  with pool as executor:
    return executor.submit(function, *arguments).result()


class TpuTest(parameterized.TestCase):
  @parameterized.product(case=TPU_CASES, target=tuple(targets.TPUS))
  def test_compiles(self, case, target):
    _skip_without(target)
    reason = _compile_tpu(target, *case)
    if case[-1] == 'integer' and target == 'tpu7x':
      self.assertIn('int8', reason)
    else:
      self.assertIsNone(reason)


@pytest.mark.slow
class ExhaustiveTest(parameterized.TestCase):
  @parameterized.product(
    pair=tuple(zip(MX, MX[1:] + MX[:1], strict=True)),
    layout=reference.LAYOUTS,
    target=tuple(targets.TPUS),
  )
  def test_compiles(self, pair, layout, target):
    _skip_without(target)
    self.assertIsNone(_compile_tpu(target, *pair, layout, 'exact'))


class GpuTest(parameterized.TestCase):
  @parameterized.parameters(*HOPPER_CASES)
  def test_hopper(self, m, left, right, layout, mode, kind):
    _skip_without('h100')
    ptx, report = _gpu('h100', left, right, layout, mode, m)
    self.assertRegex(ptx, rf'wgmma\.mma_async\S*m64n128k32\.{kind}')
    self.assertEqual((report['spill_stores'], report['spill_loads']), (0, 0))

  @parameterized.parameters(
    ('mxfp8_e4m3', 'mxfp8_e4m3', 'nt'), ('mxfp4', 'nvfp4', 'tn')
  )
  def test_hopper_decodes(self, left, right, layout):
    _skip_without('h100')
    out = _gpu('h100', left, right, layout, 'exact', 20)
    if not mgpu.concatenates():
      self.assertIn('JAX 0.11', out)
      return
    self.assertIn('f32.bf16.bf16', out[0])
    spills = out[1]['spill_stores'], out[1]['spill_loads']
    self.assertEqual(spills, (0, 0))

  def test_hopper_mixed(self):
    _skip_without('h100')
    out = _gpu('h100', 'fp8_128', 'fp8_128_e5m2', 'nt', 'fp8_128', 64)
    if mgpu.mixes_fp8():
      self.assertIn('f32.e4m3.e5m2', out[0])
    else:
      self.assertIn('JAX 0.11', out)

  @pytest.mark.long('four kernels by ptxas in a process of their own')
  def test_blackwell(self):
    _skip_without('b200')
    cases = [case[:3] for case in BLACKWELL_CASES]
    outputs = _in_new_process(_blackwell, cases)
    for case, (ptx, report) in zip(BLACKWELL_CASES, outputs, strict=True):
      with self.subTest(case=case):
        self.assertRegex(ptx, rf'tcgen05\.mma\S*{re.escape(case[-1])}')
        spills = report['spill_stores'], report['spill_loads']
        self.assertEqual(spills, (0, 0))


if __name__ == '__main__':
  absltest.main()
