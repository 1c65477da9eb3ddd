"""Tests of the GPU kernel in interpret mode.

The interpreter takes both operands of WGMMA from SMEM only, so decoded weights
go there first.
"""

import contextlib
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.wq_matmul import mosaic_gpu, mosaic_gpu_config as config
from tests.pallas import races
from tests.pallas.wq_matmul import oracle


def _multiply(acc, weights, xs):
  transforms = (
    plgpu.TilingTransform((8, 64)),
    plgpu.SwizzleTransform(128),
  )

  def scope(smem):
    for weight, x in zip(weights, xs, strict=True):
      smem[...] = weight
      plgpu.commit_smem()
      plgpu.wgmma(acc, smem, _mosaic_gpu.transpose(x))
      plgpu.wgmma_wait(0)

  memory = plgpu.SMEM(weights[0].shape, jnp.bfloat16, transforms=transforms)
  pl.run_scoped(scope, memory)


@contextlib.contextmanager
def _interpreted():
  with plgpu.force_gpu_interpret_mode(races.GPU):
    with mock.patch.object(mosaic_gpu, '_multiply', _multiply):
      yield


class MosaicGpuTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', 5, 70, 256, 'pre', 'bfloat16'),
    ('int4_g128', 3, 64, 384, 'post', 'bfloat16'),
    ('int3_g32', 3, 64, 544, 'pre', 'bfloat16'),
    ('uint4_g32', 3, 64, 160, 'pre', 'bfloat16'),
    ('int8_channel', 2, 64, 128, 'pre', 'float32'),
    ('mxfp4', 3, 64, 1152, 'pre', 'bfloat16'),  # the ring of four wraps
    ('int4_g128', 3, 64, 1152, 'post', 'bfloat16'),
  )
  @pytest.mark.skipif(
    not races.GPU, reason='Mosaic GPU is interpreted from JAX 0.11 on'
  )
  def test_agrees_with_oracle(self, name, m, n, k, schedule, dtype):
    w = oracle.quantized(name, k, n)
    x = oracle.normal(m, k, jnp.dtype(dtype))
    c = config.heuristic(m, n, k, w.spec, x.dtype, schedule=schedule)
    p = w.prepack(c.tile, 'nk')
    with _interpreted():
      got = mosaic_gpu.run(x, p, config=c, out_dtype=jnp.float32)
    oracle.check(got, x, w, schedule)

  def test_parts_of_k_are_summed_in_float32(self):
    w = oracle.quantized('mxfp4', 1024, 24)
    x = oracle.normal(5, w.k, jnp.bfloat16)
    c = config.Config(8, 64, 128, 'pre', split_k=8)
    values = oracle.elements(w) * np.repeat(oracle.scales(w), 32, 0)

    def parts(dtype):
      def call(x, p, config):
        del p
        out = np.zeros((config.split_k, 64, 8), np.float32)
        for i, rows in enumerate(np.split(np.arange(w.k), config.split_k)):
          part = np.asarray(x, float)[:, rows] @ values[rows]
          out[i, : w.n, : len(x)] = part.T
        return jnp.asarray(out).astype(dtype).astype(jnp.float32)

      with mock.patch.object(mosaic_gpu, '_call', call):
        with mock.patch.object(mosaic_gpu, 'why_not', lambda *_: None):
          p = w.prepack(128, 'nk')
          return mosaic_gpu.run(x, p, config=c, out_dtype=jnp.float32)

    oracle.check(parts(jnp.float32), x, w, 'pre')
    with self.assertRaises(AssertionError):
      oracle.check(parts(jnp.bfloat16), x, w, 'pre')

  @parameterized.parameters((0, 8, 96), (3, 0, 96), (3, 8, 0))
  def test_empty(self, m, n, k):
    w = oracle.Weight(
      oracle.formats.get('int8_channel'),
      k,
      np.zeros((k, n), np.uint8),
      np.ones((1, n), np.float32),
      None,
    )
    x = jnp.zeros((m, k), jnp.bfloat16)
    out = mosaic_gpu.run(x, w.prepack(64, 'nk'))
    self.assertEqual((out.shape, out.dtype), ((m, n), jnp.bfloat16))

  def test_why_not(self):
    w = oracle.quantized('int4_g128', 256, 8)
    good = config.Config(bm=8, bn=64, tile=128, schedule='post')
    bad = lambda **kwargs: good.__class__(**{**vars(good), **kwargs})
    nk = w.prepack(128, 'nk')
    for p, dtype, c, reason in (
      (nk, 'bfloat16', good, None),
      (w.prepack(128), 'bfloat16', good, 'layout'),
      (w.prepack(256, 'nk'), 'bfloat16', good, 'tiles of 256'),
      (w.prepack(64, 'nk'), 'bfloat16', bad(tile=64), 'lanes of 32'),
      (nk, 'bfloat16', bad(bn=128), 'bn=128'),
      (nk, 'bfloat16', bad(bm=264), 'bm=264'),
      (nk, 'bfloat16', bad(split_k=3), 'split_k=3'),
      (nk, 'bfloat16', bad(stages=1), 'stages=1'),
      (nk, 'float32', bad(schedule='pre'), 'float32'),
    ):
      why = mosaic_gpu.why_not((2, 256), jnp.dtype(dtype), p, c)
      if reason is None:
        self.assertIsNone(why)
      else:
        self.assertIn(reason, why)
        with self.assertRaises(NotImplementedError):
          mosaic_gpu.run(jnp.zeros((2, 256), jnp.dtype(dtype)), p, config=c)

  @parameterized.parameters(('nvfp4',))
  def test_narrow_blocks_name_the_version_that_they_need(self, name):
    self.check_narrow_blocks(name)

  @parameterized.parameters('int4_g32', 'mxfp4', 'int3_g32')
  @pytest.mark.slow
  def test_more_narrow_blocks_name_the_version_that_they_need(self, name):
    self.check_narrow_blocks(name)

  def check_narrow_blocks(self, name):
    w = oracle.quantized(name, 256, 8)
    c = config.heuristic(2, 8, 256, w.spec, jnp.bfloat16)
    p = w.prepack(c.tile, 'nk')
    x = jnp.zeros((2, 256), jnp.bfloat16)
    with mock.patch.object(_mosaic_gpu, 'concatenates', lambda: False):
      with self.assertRaisesRegex(NotImplementedError, 'JAX 0.11'):
        mosaic_gpu.run(x, p, config=c)

  @parameterized.parameters('int4_g128', 'mxfp4', 'int3_g32', 'int8_channel')
  def test_order_of_sums_does_not_depend_on_rows(self, name):
    spec = oracle.blocked(oracle.formats.get(name))
    for n, k in ((64, 512), (4096, 4096)):
      order = set()
      for m in (1, 17, 300, 5000):
        c = config.heuristic(m, n, k, spec, jnp.bfloat16)
        order.add((c.tile, c.schedule, c.split_k))
        self.assertLessEqual(config.smem_bytes(c, spec), config.SMEM_BYTES)
        self.assertBetween(c.bm, 8, 256)
        self.assertEqual(c.bm % 8, 0)
      self.assertLen(order, 1)


if __name__ == '__main__':
  absltest.main()
