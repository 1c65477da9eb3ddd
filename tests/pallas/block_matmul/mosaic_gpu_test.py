"""Tests of Hopper kernels, interpreted, and of what surrounds GPU kernels."""

import functools
import inspect
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas import _mosaic_gpu as mgpu
from lowbit_pallas.arith import codec
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul import (
  _blackwell,
  _hopper,
  mosaic_gpu,
  mosaic_gpu_config as config,
  reblock,
  reference,
)
from lowbit_pallas.wq_matmul import reference as wq_reference
from tests.pallas import races
from tests.pallas.block_matmul import operands as ops

needs_interpreter = pytest.mark.skipif(
  not races.GPU, reason='the interpreter takes these kernels from JAX 0.11'
)
M, N = 20, 130


def _run(a, b, layout='nt', mode='exact', target='h100', **kwargs):
  lk, rk = reference.k_axes(layout)
  arrays = (*a.arguments(lk), *b.arguments(rk))

  @jax.jit
  def run(*arrays):
    return mosaic_gpu.run(
      *arrays,
      a.spec,
      b.spec,
      layout=layout,
      mode=mode,
      target=target,
      **kwargs,
    )

  return np.asarray(run(*map(jnp.asarray, arrays)))


def _interpreted(a, b, layout, mode):
  return _run(a, b, layout, mode, interpret=races.GPU)


@needs_interpreter
class HopperTest(parameterized.TestCase):
  @parameterized.parameters(('nt', 'fp8_128_e5m2'), ('tn', 'fp8_128'))
  def test_promotion_agrees_with_float64(self, layout, right):
    a = ops.normal('fp8_128', M, 384, 0)
    b = ops.normal(right, N, 384, 1, tile=True)
    got = _interpreted(a, b, layout, 'fp8_128')
    exact = ops.promoted_product(a, b)
    self.assertEmpty(ops.violations(got, *exact, 131))

  @parameterized.parameters('nt', 'nn')
  def test_integers_are_exact(self, layout):
    a, b = ops.normal('int8', M, 288, 0), ops.normal('int8', N, 288, 1)
    total = (a.elements @ b.elements.T).astype(np.float32)
    got = _interpreted(a, b, layout, 'integer')
    np.testing.assert_array_equal(got, total * a.stored * b.stored.T)

  def test_rings_that_wrap(self):
    k = 1152  # nine steps in a ring of four
    a = ops.normal('fp8_128', M, k, 0)
    b = ops.normal('fp8_128', 66, k, 1, tile=True)
    got = _interpreted(a, b, 'nt', 'fp8_128')
    exact = ops.promoted_product(a, b)
    self.assertEmpty(ops.violations(got, *exact, k // 128 + 128))
    a, b = ops.normal('int8', 66, k, 0), ops.normal('int8', M, k, 1)
    got = _interpreted(a, b, 'nt', 'integer')
    total = (a.elements @ b.elements.T).astype(np.float32)
    np.testing.assert_array_equal(got, total * a.stored * b.stored.T)

  def test_scales_that_are_overwritten_while_read_are_seen(self):
    a = ops.normal('fp8_128', M, 640, 0)
    b = ops.normal('fp8_128', M, 640, 1, tile=True)
    with (
      races.recorded() as found,
      mock.patch.object(_hopper.plgpu, 'commit_smem', lambda: None),
    ):
      _interpreted(a, b, 'nt', 'fp8_128')
    self.assertTrue(any(state.races_found for state in found))

  def test_finds_missing_scales(self):
    a = ops.normal('fp8_128', M, 256, 0)
    b = ops.normal('fp8_128', N, 256, 1, tile=True)

    def without(acc, partial, sa, sb):
      del sa, sb
      return acc + partial

    with mock.patch.object(reference, 'promote', without):
      got = _interpreted(a, b, 'nt', 'fp8_128')
    exact = ops.promoted_product(a, b)
    self.assertNotEmpty(ops.violations(got, *exact, 130))

  def test_rows_of_scales_for_rhs_are_refused(self):
    a = ops.normal('fp8_128', M, 128, 0)
    b = ops.normal('fp8_128', N, 128, 1)
    with self.assertRaisesRegex(ValueError, r'\(130, 1\)'):
      _interpreted(a, b, 'nt', 'fp8_128')


class DecodedTest(parameterized.TestCase):
  @parameterized.parameters(
    ('nvfp4', 'mxint8', 'tn'),
  )
  def test_prepares_operands(self, left, right, layout):
    self.check_operands(left, right, layout)

  @parameterized.parameters(('mxfp8_e4m3', 'mxfp4', 'nt'))
  @pytest.mark.slow
  def test_prepares_operands_with_k_last(self, left, right, layout):
    self.check_operands(left, right, layout)

  def check_operands(self, left, right, layout):
    def emulate(x, w, *, config, out_dtype):
      return wq_reference.run(x, w, config.schedule, out_dtype=out_dtype)

    a, b = ops.normal(left, M, 288, 0), ops.normal(right, N, 288, 1)
    with (
      mock.patch.object(mosaic_gpu.wq_gpu, 'run', emulate),
      mock.patch.object(mosaic_gpu.wq_gpu, 'why_not', lambda *_: None),
    ):
      got = _run(a, b, layout)
    self.assertEmpty(ops.violations(got, *ops.exact_product(a, b), 288))

  def test_is_not_interpreted(self):
    a = ops.normal('fp8_128', M, 128, 0)
    a = a._replace(name='mxfp8_e4m3', stored=np.full((M, 4), 127, np.uint8))
    if mosaic_gpu.why_not(a.codes.shape, a.codes.shape, a.spec, a.spec):
      self.skipTest('the kernel needs JAX 0.11')
    with self.assertRaisesRegex(NotImplementedError, 'interpreted'):
      _run(a, a, interpret=True)


def _emulate(a, b, sa, sb, block, tiles):
  """The block-scaled MMA in jnp on what the Blackwell kernel is given."""
  values = []
  for x, s, rows in ((a, sa, tiles.bm), (b, sb, tiles.bn)):
    assert x.shape[0] % rows == 0 and x.shape[1] % tiles.bk == 0
    blocks = x.shape[1] // block
    r, c = np.meshgrid(np.arange(x.shape[0]), np.arange(blocks), indexing='ij')
    scale = s.astype(jnp.float32)
    scale = scale[r // 128, c // 4, r % 32, r % 128 // 32 * 4 + c % 4]
    values.append(x.astype(jnp.float32) * jnp.repeat(scale, block, axis=1))
  return jnp.dot(values[0], values[1].T, precision='highest')


@functools.partial(jax.jit, static_argnames=('element', 'wide'))
def _widened(code, element, wide):
  """Values of codes, before and after."""
  x = codec.decode_float(code, element)
  return x, codec.decode_float(codec.encode_float(x, wide), wide)


class BlackwellTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp6_e2m3', 'mxfp6_e3m2', 'tn'),
    ('nvfp4', 'nvfp4', 'nn'),
  )
  def test_prepares_operands(self, left, right, layout):
    self.check_operands(left, right, layout)

  @parameterized.parameters(
    ('mxfp8_e4m3', 'mxfp4', 'nn'),
    ('mxfp8_e4m3', 'mxfp8_e4m3', 'nt'),
    ('mxfp4', 'mxfp4', 'nt'),
  )
  @pytest.mark.slow
  def test_prepares_more_operands(self, left, right, layout):
    self.check_operands(left, right, layout)

  def check_operands(self, left, right, layout):
    a, b = ops.normal(left, M, 288, 0), ops.normal(right, N, 288, 1)
    with mock.patch.object(_blackwell, 'block_scaled', _emulate):
      got = _run(a, b, layout, target='b200')
    self.assertEmpty(ops.violations(got, *ops.exact_product(a, b), 288))

  def test_widening_keeps_every_value(self):
    for element, wide in mosaic_gpu.WIDENED.items():
      if element == wide:
        continue
      width = 1 + element.exponent_bits + element.mantissa_bits
      code = np.arange(1 << width, dtype=np.int32)
      x, y = _widened(code, element, wide)
      np.testing.assert_array_equal(x, y)


class WhyNotTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', 'mxfp4', 'exact', 'a100', 'is not one of'),
    ('int4', 'int8', 'integer', 'h100', 'int8, got 4 bits'),
    ('mxint8', 'mxint8', 'exact', 'b200', 'block-scaled MMA takes'),
    ('nvfp4', 'mxfp4', 'exact', 'b200', 'does not mix'),
    ('int8', 'int8', 'integer', 'b200', 'only Hopper'),
    ('int8', 'int8', 'integer', 'a100', 'is not one of'),
    ('int8', 'mxint8', 'integer', 'h100', 'one scale per row'),
  )
  def test_refuses(self, left, right, mode, target, reason):
    a, b = (ops.FORMATS[name][0] for name in (left, right))
    shapes = (4, 64 * a.bits // 8), (6, 64 * b.bits // 8)
    got = mosaic_gpu.why_not(*shapes, a, b, mode=mode, target=target)
    self.assertIn(reason, got)
    error = ValueError if 'per row' in reason else NotImplementedError
    with self.assertRaisesRegex(error, reason):
      x, y = (np.zeros(s, np.uint8) for s in shapes)
      scales = [
        np.zeros((len(s), 64 // spec.block), np.uint8) if spec.block else None
        for s, spec in ((x, a), (y, b))
      ]
      mosaic_gpu.run(x, scales[0], y, scales[1], a, b, mode=mode, target=target)

  def test_mixed_fp8_depends_on_jax(self):
    a, b = (ops.FORMATS[n][0] for n in ('fp8_128', 'fp8_128_e5m2'))
    got = mosaic_gpu.why_not((4, 128), (6, 128), a, b, mode='fp8_128')
    self.assertEqual(got is None, mgpu.mixes_fp8())

  @parameterized.parameters(
    (config.Config(64, 128, 64, 4), 'bk=64'),
    (config.Config(192, 128, 128, 4), 'bm=192'),
    (config.Config(64, 256, 128, 4), 'bn=256'),
    (config.Config(128, 128, 128, 9), 'bytes'),
    (config.Config(128, 128, 128, 1), 'stages=1'),
    (config.Config(128, 128, 256, 2, 4), 'of 4 bits'),
  )
  def test_refuses_tiles(self, tiles, reason):
    spec = ops.FORMATS['fp8_128'][0]
    shapes = (4, 128), (6, 128)
    got = mosaic_gpu.why_not(*shapes, spec, spec, mode='fp8_128', config=tiles)
    self.assertIn(reason, got)

  @parameterized.product(m=(1, 64, 65), bits=(4, 8), target=mosaic_gpu.TARGETS)
  def test_heuristic_fits(self, m, bits, target):
    spec = ops.FORMATS['mxfp8_e4m3'][0]
    tiles = config.heuristic(
      m, 128, 128, spec, spec, 'nt', bits=bits, target=target
    )
    self.assertIsNone(config.why_not(tiles, target))

  def test_arguments_are_those_of_the_reference(self):
    ours = list(inspect.signature(mosaic_gpu.run).parameters)
    theirs = list(inspect.signature(reference.run).parameters)
    self.assertEqual(ours[: len(theirs)], theirs)


@functools.partial(jax.jit, static_argnames=('spec', 'element', 'high'))
def _reblock(codes, scale, spec, element, high):
  return reblock.reblock(codes, scale, spec, element, high=high)


class ReblockTest(parameterized.TestCase):
  def _reblock(self, a, high=1, element=ops.E4M3):
    out = _reblock(*map(jnp.asarray, a.arguments(1)), a.spec, element, high)
    name = 'fp8_128' if element == ops.E4M3 else 'fp8_128_e5m2'
    scale = np.asarray(out.scale)
    return ops.Operand(
      name, np.asarray(out.codes), scale, scale.astype(np.float64)
    ), bool(out.lossless)

  def test_keeps_narrow_formats(self):
    self.check_kept('mxfp6_e2m3', 128)

  @parameterized.parameters(
    ('mxfp4', 1), ('mxfp4', 128), ('mxfp6_e2m3', 1), ('mxfp6_e3m2', 1),
    ('mxfp6_e3m2', 128),
  )  # fmt: skip
  @pytest.mark.slow
  def test_keeps_more_narrow_formats(self, name, high):
    self.check_kept(name, high)

  def check_kept(self, name, high):
    a = ops.normal(name, 200, 256, 0)
    got, lossless = self._reblock(a, high)
    self.assertTrue(lossless)
    self.assertEqual(got.scale.shape, (-(-200 // high), 2))
    values = got.elements * ops.spread(got.scale, got.codes.shape)
    np.testing.assert_array_equal(values, a.values)

  @parameterized.parameters(
    ('mxfp8_e4m3', ops.E4M3, 0, True),
    ('mxfp8_e4m3', ops.E4M3, 1, False),
    ('mxfp8_e5m2', ops.E5M2, 0, True),
    ('mxfp4', ops.E4M3, 14, True),
    ('mxfp4', ops.E4M3, 15, False),
    ('mxfp4', ops.E4M3, 200, False),
  )
  def test_tells_what_is_lost(self, name, element, spread, lossless):
    self.check_lost(name, element, spread, lossless)

  @pytest.mark.slow
  def test_tells_that_exponents_are_lost(self):
    self.check_lost('mxfp8_e5m2', ops.E4M3, 0, False)

  def check_lost(self, name, element, spread, lossless):
    """Every element in one block whose exponent is `spread` below the rest."""
    a = ops.unit_scales(name, 4, 256, 0)
    largest = ops.encode(np.array(ops.largest(name)), name)
    smallest = np.uint8(1)
    a.codes[1, :32], a.codes[1, 32:128] = smallest, largest
    a.stored[1, 0] = 227 - spread
    a.stored[1, 1:4] = 227
    self.assertEqual(self._reblock(a, element=element)[1], lossless)

  def test_extreme_scales(self):
    a = ops.unit_scales('mxfp4', 4, 256, 0)
    for stored, lossless in ((0, False), (20, True), (240, True), (255, False)):
      a.stored[0] = stored
      self.assertEqual(self._reblock(a)[1], lossless, stored)
    a.codes[0] = 0
    a.stored[0] = 0
    self.assertTrue(self._reblock(a)[1])

  @parameterized.parameters(
    ('nvfp4', 128, 'not powers of two'),
    ('mxint8', 128, 'integers'),
    ('mxfp4', 160, 'whole blocks of 128'),
  )
  def test_refuses(self, name, k, reason):
    a = ops.normal(name, 2, k, 0)
    with self.assertRaisesRegex(ValueError, reason):
      self._reblock(a)

  def test_refuses_large_blocks(self):
    spec = Blocked(ops.E2M1, 4, 256, ops.E8M0)
    self.assertIn('256', reblock.why_not((2, 128), spec))


if __name__ == '__main__':
  absltest.main()
