"""Quantization kernels through the compilers of their targets."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas.arith import block
from lowbit_pallas.quantize import mosaic_gpu, tpu
from lowbit_pallas.quantize.task import DTYPES, ROTATIONS, ROUNDINGS, Task
from tests.aot import targets

# What differs in how it lowers: width of a code, format of scales, rounding,
# rotation.
CASES = (
  ('mxfp4', {}),
  ('mxfp6_e2m3', {'rounding': 'stochastic'}),
  ('nvfp4', {'rotation': 128}),
  ('fp8_1x128', {}),
)
ALL_FORMATS = (
  'mxfp4', 'mxfp8_e4m3', 'mxfp8_e5m2', 'mxfp6_e2m3', 'mxfp6_e3m2', 'mxint8',
  'nvfp4', 'nvint4', 'int4_g128', 'int2_g64', 'int3_g32', 'int7_g32',
  'fp8_1x128', 'nf4_g64', 'bfp5_g16',
)  # fmt: skip


def compiled(
  target, module, name, how, shape=(128, 1024), dtype='bfloat16', **kwargs
):
  """Compiles a kernel; for GPUs, its PTX and what its registers cost."""
  fmt = formats.get(name)
  task = Task(blocked(fmt), **{'rule': fmt.scale_rule, **how})
  arguments = {'x': jax.ShapeDtypeStruct(shape, dtype)}
  if task.rounding == 'stochastic':
    arguments['key_words'] = jax.ShapeDtypeStruct((2,), jnp.uint32)
  if fmt.tensor_scale:
    arguments['tensor_scale'] = jax.ShapeDtypeStruct((), jnp.float32)
  if task.rotation:
    arguments['signs'] = jax.ShapeDtypeStruct(shape[1:], jnp.int8)

  def f(arguments):
    return module.run(**arguments, task=task, **kwargs)

  if target in targets.TPUS:
    return targets.compile_for(target, f, arguments)
  return targets.gpu_report(target, f, arguments)


def tasks():
  """Every format with every rule, rounding and some rotations."""
  for name in ALL_FORMATS:
    for rule in block.scale_rules(blocked(formats.get(name))):
      yield name, {'rule': rule}
    for rounding in ROUNDINGS[1:]:
      yield name, {'rounding': rounding}
  for rotation in ROTATIONS:
    for name in ('mxfp4', 'nvfp4', 'nf4_g64', 'fp8_1x128'):
      yield name, {'rotation': rotation}


class QuantizeTest(parameterized.TestCase):
  def require(self, target):
    reason = targets.why_not(target)
    if reason is not None:
      self.skipTest(reason)

  @parameterized.product(target=tuple(targets.TPUS), case=CASES)
  def test_tpu(self, target, case):
    self.require(target)
    compiled(target, tpu, *case)

  @parameterized.parameters('v5e', 'v6e', 'tpu7x')
  def test_tpu_ragged(self, target):
    self.require(target)
    how = {'rounding': 'stochastic'}
    compiled(target, tpu, 'nf4_g64', how, (5, 300), 'float32')
    # Indices of more than 32 bits, and several tiles in a row.
    origin = (2**17, 0), (2**18, 2**15)
    shape = 256, 2**15
    compiled(target, tpu, 'int3_g32', how, shape, 'float16', origin=origin)

  @parameterized.parameters(*CASES)
  def test_h100(self, name, how):
    self.require('h100')
    self.check_gpu(name, how)

  def test_h100_ragged(self):
    self.require('h100')
    how = {'rounding': 'toward_zero'}
    self.check_gpu('mxfp4', how, (70, 300), 'float32')

  def check_gpu(self, name, how, *rest):
    ptx, cost = compiled('h100', mosaic_gpu, name, how, *rest)
    self.assertEqual((cost['spill_stores'], cost['spill_loads']), (0, 0))
    narrow = formats.get(name).element.bits < 8
    self.assertEqual('wgmma' in ptx, narrow or bool(how.get('rotation')))

  @pytest.mark.slow
  def test_everything(self):
    for name, how in tasks():
      for dtype in DTYPES:
        for target in targets.TPUS:
          with self.subTest(name=name, how=how, dtype=dtype, target=target):
            self.require(target)
            compiled(target, tpu, name, how, (40, 384), dtype)
        with self.subTest(name=name, how=how, dtype=dtype):
          self.require('h100')
          self.check_gpu(name, how, (128, 384), dtype)


if __name__ == '__main__':
  absltest.main()
