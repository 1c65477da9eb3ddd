"""Compiles products with quantized weights for TPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, quantize
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas.wq_matmul import mosaic_gpu, prepack, tpu
from tests.aot import targets

FORMATS = (
  'int4_g32',
  'int4_g128',
  'uint4_g32',
  'mxfp4',
  'nvfp4',
  'mxfp8_e4m3',
  'mxfp6_e2m3',
  'nf4_g64',
  'int3_g32',
  'int5_g32',
  'int7_g64',
  'int8_channel',
)
DTYPES = ('bfloat16', 'float16', 'float32')


def _abstract(name: str, n: int, k: int, tile: int, layout: str):
  """A prepacked weight of shapes alone."""
  fmt = formats.get(name)

  def make(w):
    q = quantize(w, fmt, axis=0)
    leaves = (q.codes, q.scale, q.zero_point)
    return prepack.prepack(*leaves, blocked(fmt), tile=tile, k=k, layout=layout)

  return jax.eval_shape(make, jax.ShapeDtypeStruct((k, n), jnp.float32))


def _arguments(kernel, name, m, n, k, dtype, schedule=None):
  """The function to compile and its arguments."""
  spec = blocked(formats.get(name))
  c = kernel.heuristic(m, n, k, spec, dtype, schedule=schedule)
  w = _abstract(name, n, k, c.tile, kernel.LAYOUT)
  refusal = kernel.why_not((m, k), jnp.dtype(dtype), w, c)
  if refusal is not None:
    raise absltest.SkipTest(refusal)
  x = jax.ShapeDtypeStruct((m, k), jnp.dtype(dtype))
  return lambda x, w: kernel.run(x, w, config=c), x, w


class WqMatmulTest(parameterized.TestCase):
  def _tpu(self, target, *shape, **kwargs):
    if why := targets.why_not(target):
      self.skipTest(why)
    targets.compile_for(target, *_arguments(tpu, *shape, **kwargs))

  def _gpu(self, *shape, **kwargs):
    if why := targets.why_not('h100'):
      self.skipTest(why)
    arguments = _arguments(mosaic_gpu, *shape, **kwargs)
    ptx, report = targets.gpu_report('h100', *arguments)
    self.assertIn('wgmma', ptx)
    self.assertEqual(report['spill_stores'] + report['spill_loads'], 0, report)

  @parameterized.product(
    target=tuple(targets.TPUS), name=('int8_channel', 'int4_g128', 'mxfp4')
  )
  def test_tpu(self, target, name):
    self._tpu(target, name, 16, 100, 544, 'bfloat16')

  @parameterized.parameters(
    ('int3_g32', 'bfloat16'), ('uint4_g32', 'float32'), ('mxfp4', 'float16')
  )
  def test_tpu_widths_and_dtypes(self, name, dtype):
    self._tpu('v5e', name, 1, 8, 96, dtype)

  @parameterized.parameters(
    ('int8_channel', 16, 'float32'),
    ('int4_g128', 104, 'bfloat16'),
    ('mxfp4', 16, 'bfloat16'),
  )
  def test_h100(self, name, m, dtype):
    self._gpu(name, m, 100, 512, dtype)

  @pytest.mark.slow
  def test_matrix(self):
    for target in targets.TPUS:
      for name in FORMATS:
        for dtype in DTYPES:
          for schedule in ('pre', 'post'):
            for shape in ((1, 8, 32), (300, 4104, 4096)):
              with self.subTest(
                target=target, name=name, dtype=dtype, schedule=schedule
              ):
                self._tpu(target, name, *shape, dtype, schedule=schedule)

  @pytest.mark.slow
  def test_h100_matrix(self):
    for name in FORMATS:
      for dtype in DTYPES:
        for m in (1, 64, 300):
          with self.subTest(name=name, dtype=dtype, m=m):
            self._gpu(name, m, 4104, 4096, dtype)


if __name__ == '__main__':
  absltest.main()
