"""Tests of the TPU kernel in interpret mode, races detected."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas.wq_matmul import config, prepack, reference, tpu, tpu_config
from tests.pallas import races
from tests.pallas.wq_matmul import oracle

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
eager = functools.partial(tpu.run, interpret=races.TPU)
run = functools.partial(
  jax.jit(tpu.run, static_argnames=('config', 'out_dtype', 'interpret')),
  interpret=races.TPU,
)


def _tile(w):
  return tpu_config.tile_rows(w.k, w.spec)


class TpuTest(parameterized.TestCase):
  # One of each kind: the slow test takes all.
  @parameterized.parameters('uint4_g32', 'int8_channel')
  def test_agrees_with_oracle(self, name):
    self.check_agrees(name)

  @parameterized.parameters('int4_g128', 'nvfp4', 'int3_g32')
  @pytest.mark.slow
  def test_more_formats_agree_with_oracle(self, name):
    self.check_agrees(name)

  def check_agrees(self, name):
    w = oracle.quantized(name, 160, 24)
    x = oracle.normal(17, w.k, jnp.bfloat16)
    schedule = config.heuristic_schedule(w.spec)
    got = run(x, w.prepack(_tile(w)), out_dtype=jnp.float32)
    oracle.check(got, x, w, schedule)

  def test_several_tiles_along_every_axis(self):
    w = oracle.quantized('mxfp4', 320, 200)
    x = oracle.normal(40, w.k, jnp.bfloat16)
    c = tpu.Config(bm=16, bn=128, tile=128, schedule='pre')
    got = run(x, w.prepack(128), config=c, out_dtype=jnp.float32)
    oracle.check(got, x, w, 'pre')

  @pytest.mark.slow
  def test_wrong_block_is_caught(self):
    w = oracle.quantized('mxfp4', 256, 8)
    x = oracle.normal(3, w.k, jnp.bfloat16)
    c = tpu.Config(bm=16, bn=128, tile=128, schedule='pre')
    # The scales of the first tile for the second one, too.
    two = mock.PropertyMock(return_value=2)
    with mock.patch.object(prepack.Prepacked, 'tiles_per_block', two):
      got = eager(x, w.prepack(128), config=c, out_dtype=jnp.float32)
    with self.assertRaises(AssertionError):
      oracle.check(got, x, w, 'pre')

  def test_blocks_longer_than_tiles(self):
    w = oracle.quantized('int4_g128', 384, 8)
    w = oracle.Weight(
      oracle.formats.grouped(w.fmt.element, 384),
      w.k,
      w.codes,
      w.scale[:1],
      None,
    )
    x = oracle.normal(3, w.k, jnp.bfloat16)
    c = tpu.Config(bm=16, bn=128, tile=128, schedule='post')
    got = run(x, w.prepack(128), config=c, out_dtype=jnp.float32)
    oracle.check(got, x, w, 'post')

  def test_wide_x(self):
    self.check_wide_x('int4_g32', 'float32')

  @pytest.mark.slow
  def test_float16_x(self):
    self.check_wide_x('mxfp4', 'float16')

  def check_wide_x(self, name, dtype):
    w = oracle.quantized(name, 96, 8)
    x = oracle.normal(3, w.k, jnp.dtype(dtype))
    got = run(x, w.prepack(_tile(w)), out_dtype=jnp.float32)
    oracle.check(got, x, w, 'pre')

  def test_batch_invariance(self):
    self.check_batch_invariance('uint4_g32', 160, 24, 1)

  @parameterized.parameters(1, 16)
  @pytest.mark.slow
  def test_more_batch_invariance(self, m):
    self.check_batch_invariance('int4_g32', 96, 8, m)

  def check_batch_invariance(self, name, k, n, m):
    w = oracle.quantized(name, k, n)
    p = w.prepack(_tile(w))
    x = oracle.normal(17, w.k, jnp.bfloat16)
    whole = np.asarray(run(x, p, out_dtype=jnp.float32))
    part = np.asarray(run(x[:m], p, out_dtype=jnp.float32))
    np.testing.assert_array_equal(part, whole[:m])

  def test_exact_sums_are_exact(self):
    w = oracle.quantized('int3_g32', 256, 16)
    w = oracle.Weight(w.fmt, w.k, w.codes, np.ones_like(w.scale), None)
    x = np.random.default_rng(2).integers(-8, 9, (4, w.k))
    x = x.astype(jnp.bfloat16)
    c = tpu.Config(bm=16, bn=128, tile=256, schedule='pre')
    want, _ = oracle.product(x, w, 'pre')
    got = np.asarray(run(x, w.prepack(256), config=c))
    np.testing.assert_array_equal(got, want.astype(got.dtype))

  @parameterized.parameters((0, 8, 96), (3, 0, 96), (3, 8, 0))
  def test_empty(self, m, n, k):
    w = oracle.Weight(
      oracle.formats.get('mxfp4'),
      k,
      np.zeros((k // 2, n), np.uint8),
      np.zeros((k // 32, n), np.uint8),
      None,
    )
    out = run(jnp.zeros((m, k), jnp.bfloat16), w.prepack(128))
    self.assertEqual((out.shape, out.dtype), ((m, n), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)

  # The sum of a tile is that of the reference, which is tested with these.
  @pytest.mark.slow
  def test_extreme_scales(self):
    def kernel(x, w):
      return run(x, w.prepack(_tile(w)), out_dtype=jnp.float32)

    oracle.check_extreme_scales(kernel, 'pre')

  @pytest.mark.slow
  def test_nan_scale_stays_in_its_column(self):
    w = oracle.quantized('mxfp4', 96, 4)
    scale = w.scale.copy()
    scale[1, 2] = 255
    w = oracle.Weight(w.fmt, w.k, w.codes, scale, None)
    x = oracle.normal(3, w.k, jnp.bfloat16)
    got = np.asarray(run(x, w.prepack(128), out_dtype=jnp.float32))
    want = np.tile(np.arange(4) == 2, (3, 1))
    np.testing.assert_array_equal(np.isnan(got), want)

  def test_why_not(self):
    w = oracle.quantized('mxfp4', 96, 8)
    good = tpu.Config(bm=16, bn=128, tile=128, schedule='pre')
    bad = lambda **kwargs: good.__class__(**{**vars(good), **kwargs})
    for p, c, reason in (
      (w.prepack(128), good, None),
      (w.prepack(128, 'nk'), good, 'layout'),
      (w.prepack(256), good, 'tiles of 256'),
      (w.prepack(64), bad(tile=64), 'tiles of 64'),
      (w.prepack(128), bad(bm=8), 'config.bm=8'),
      (w.prepack(128), bad(schedule='mid'), 'mid'),
    ):
      why = tpu.why_not((2, 96), jnp.dtype(jnp.bfloat16), p, c)
      if reason is None:
        self.assertIsNone(why)
      else:
        self.assertIn(reason, why)
        with self.assertRaises(NotImplementedError):
          tpu.run(jnp.zeros((2, 96), jnp.bfloat16), p, config=c)

  @parameterized.product(
    name=FORMATS,
    schedule=reference.SCHEDULES,
    dtype=('bfloat16', 'float16', 'float32'),
  )
  @pytest.mark.slow
  def test_all(self, name, schedule, dtype):
    w = oracle.quantized(name, 544, 136)
    x = oracle.normal(19, w.k, jnp.dtype(dtype))
    c = tpu.heuristic(19, w.n, w.k, w.spec, x.dtype, schedule=schedule)
    got = run(x, w.prepack(c.tile), config=c, out_dtype=jnp.float32)
    oracle.check(got, x, w, schedule)


if __name__ == '__main__':
  absltest.main()
