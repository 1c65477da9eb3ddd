"""Tests of block_matmul: the contract and the TPU kernel against float64.

Tolerances are derived in `operands.violations`.
"""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

from lowbit_pallas.arith import codec
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul import reference, tpu, tpu_config as config
from tests.pallas import races
from tests.pallas.block_matmul import operands as ops

MX = (
  'mxfp8_e4m3',
  'mxfp8_e5m2',
  'mxfp6_e2m3',
  'mxfp6_e3m2',
  'mxfp4',
  'nvfp4',
  'mxint8',
)
# Neighbours on a ring: every format on both sides.
PAIRS = tuple(zip(MX, MX[1:] + MX[:1], strict=True))
M, N, K = 9, 130, 288  # ragged: 130 = 128 + 2, 288 = 2 * 128 + 32
STATIC = ('lhs_spec', 'rhs_spec', 'layout', 'mode', 'config')


@functools.partial(jax.jit, static_argnames=STATIC)
def _reference(*arrays, lhs_spec, rhs_spec, layout, mode, config=None):
  del config
  return reference.run(*arrays, lhs_spec, rhs_spec, layout=layout, mode=mode)


def _kernel(interpret):
  """The TPU kernel, with whatever is patched when it is first called."""

  @functools.partial(jax.jit, static_argnames=STATIC)
  def run(*arrays, lhs_spec, rhs_spec, layout, mode, config=None):
    return tpu.run(
      *arrays,
      lhs_spec,
      rhs_spec,
      layout=layout,
      mode=mode,
      config=config,
      interpret=interpret,
    )

  return run


_tpu = _kernel(races.TPU)


def _run(function, a, b, layout='nt', mode='exact', **kwargs):
  lk, rk = reference.k_axes(layout)
  arrays = (*a.arguments(lk), *b.arguments(rk))
  out = function(
    *arrays,
    lhs_spec=a.spec,
    rhs_spec=b.spec,
    layout=layout,
    mode=mode,
    **kwargs,
  )
  assert out.dtype == jnp.float32
  return np.asarray(out)


def _tiles(a, b, layout='nt', bm=M, bn=128):
  """The smallest tiles along K, so that there are several."""
  return config.Config(bm, bn, config.k_unit(a.spec, b.spec, layout))


class ReferenceTest(parameterized.TestCase):
  # Every format on one side.
  @parameterized.parameters(*PAIRS[::2])
  def test_agrees_with_float64(self, left, right):
    self.check_agrees(left, right)

  @parameterized.parameters(*PAIRS[1::2])
  @pytest.mark.slow
  def test_every_format_agrees_on_both_sides(self, left, right):
    self.check_agrees(left, right)

  def check_agrees(self, left, right):
    a, b = ops.normal(left, M, K, 0), ops.normal(right, N, K, 1)
    got = _run(_reference, a, b)
    self.assertEmpty(ops.violations(got, *ops.exact_product(a, b), K))

  @parameterized.parameters(('tt',))
  def test_layouts_agree_bit_for_bit_where_sums_are_exact(self, layout):
    self.check_layout(layout)

  @parameterized.parameters(('nn',), ('tn',))
  @pytest.mark.slow
  def test_more_layouts_agree_bit_for_bit(self, layout):
    self.check_layout(layout)

  def check_layout(self, layout):
    a, b = ops.unit_scales('mxfp4', M, K, 0), ops.unit_scales('nvfp4', N, K, 1)
    want, _ = ops.exact_product(a, b)
    np.testing.assert_array_equal(_run(_reference, a, b), want)
    np.testing.assert_array_equal(_run(_reference, a, b, layout), want)

  @parameterized.product(layout=('nt', 'nn'), tile=(False, True))
  @pytest.mark.slow
  def test_promotion_agrees_with_float64(self, layout, tile):
    a = ops.normal('fp8_128', M, 384, 0)
    b = ops.normal('fp8_128_e5m2', N, 384, 1, tile=tile)
    got = _run(_reference, a, b, layout, 'fp8_128')
    self.assertEmpty(ops.violations(got, *ops.promoted_product(a, b), 131))

  def test_promotion_rounds_in_the_documented_order(self):
    a = ops.normal('fp8_128', M, 256, 0)
    b = ops.normal('fp8_128', N, 256, 1, tile=True)
    # Small integers as elements: partial sums are exact in any order.
    rng = np.random.default_rng(2)
    whole = [
      x._replace(
        codes=ops.encode(rng.integers(-8, 9, x.codes.shape), 'fp8_128')
      )
      for x in (a, b)
    ]
    a, b = whole
    sa, sb = a.stored, ops.spread(b.stored, b.codes.shape)[:, ::128]
    want = np.zeros((M, N))
    for i in range(2):
      part = slice(128 * i, 128 * (i + 1))
      partial = a.elements[:, part] @ b.elements[:, part].T
      factor = np.float64(sa[:, i : i + 1] * sb[:, i])
      fused = np.float32(want + factor * partial)
      want = want.astype(np.float32) + np.float32(factor * partial)
      want = np.float64(want)
    got = _run(_reference, a, b, mode='fp8_128')
    # A compiler may fuse the last multiplication and addition.
    error = np.minimum(np.abs(got - want), np.abs(got - fused))
    self.assertLessEqual(error.max(), ops.U * np.abs(want).max())

  @parameterized.parameters(
    *zip(reference.LAYOUTS, ('int8', 'int4') * 2, strict=True)
  )
  def test_integers_are_exact(self, layout, left):
    self.check_integers(layout, left)

  @parameterized.parameters(
    *zip(reference.LAYOUTS, ('int4', 'int8') * 2, strict=True)
  )
  @pytest.mark.slow
  def test_more_integers_are_exact(self, layout, left):
    self.check_integers(layout, left)

  def check_integers(self, layout, left):
    a, b = ops.normal(left, M, K, 0), ops.normal('int8', N, K, 1)
    total = (a.elements @ b.elements.T).astype(np.float32)
    want = total * a.stored * b.stored.T
    got = _run(_reference, a, b, layout, 'integer')
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(0, 1, 2)
  def test_empty(self, axis):
    shape = [4, 6, 32]
    shape[axis] = 0
    a = ops.normal('mxfp4', shape[0], shape[2], 0)
    b = ops.normal('mxfp4', shape[1], shape[2], 0)
    for function in (_reference, _tpu):
      got = _run(function, a, b)
      np.testing.assert_array_equal(got, np.zeros(shape[:2]))

  @parameterized.parameters(
    ({'layout': 'NT'}, 'is not one of'),
    ({'mode': 'fast'}, 'is not one of'),
    ({'rhs_shape': (6, 32)}, 'rhs K=32'),
    ({'rhs_shape': (6, 64, 1)}, 'not matrices'),
    ({'mode': 'integer'}, 'takes integer elements'),
    ({'mode': 'fp8_128'}, 'scales of 128'),
    ({'layout': 'tt', 'rhs_shape': (4, 4)}, 'whole blocks of 32'),
  )
  def test_refuses(self, change, reason):
    spec = ops.FORMATS['mxfp8_e4m3'][0]
    arguments = {
      'lhs_shape': (4, 64),
      'rhs_shape': (6, 64),
      'lhs_spec': spec,
      'rhs_spec': spec,
      **change,
    }
    self.assertIn(reason, reference.why_not(**arguments))

  @parameterized.parameters(
    (codec.Codebook((-1.0, 0.0, 1.0, 2.0)), 2, 'exact', 'codebook'),
    (codec.Int(4, False, 0), 4, 'exact', 'unsigned'),
    (codec.Int(8, True, 0), 8, 'integer', 'overflow'),
    (ops.E8M0, 8, 'exact', 'no zero'),
  )
  def test_refuses_elements(self, element, bits, mode, reason):
    k = (1 << 17) * bits // 8
    spec = Blocked(element, bits, 0, None)
    got = reference.why_not((1, k), (1, k), spec, spec, mode=mode)
    self.assertIn(reason, got)
    with self.assertRaisesRegex(ValueError, reason):
      codes = jnp.zeros((1, k), jnp.uint8)
      reference.run(codes, None, codes, None, spec, spec, mode=mode)

  @parameterized.parameters(
    ('mxfp4', False, 'block=32 and no scale'),
    ('int8', True, 'block=0 and a scale'),
  )
  def test_refuses_scales(self, name, scaled, reason):
    a = ops.normal(name, 4, 32, 0)
    codes, scale = a.arguments(1)
    scale = scale if scaled else None
    for run in (reference.run, tpu.run):
      with self.assertRaisesRegex(ValueError, reason):
        run(codes, scale, codes, scale, a.spec, a.spec)


class PoisonTest(parameterized.TestCase):
  @parameterized.parameters((_reference, 'nt'), (_tpu, 'nt'))
  def test_extreme_scales(self, run, layout):
    self.check_extreme_scales('mxfp8_e5m2', run, layout)

  @parameterized.product(
    name=('mxfp8_e4m3', 'mxfp8_e5m2'),
    run=(_reference, _tpu),
    layout=('nt', 'tn'),
  )
  @pytest.mark.slow
  def test_extreme_scales_in_every_layout(self, name, run, layout):
    self.check_extreme_scales(name, run, layout)

  def check_extreme_scales(self, name, run, layout):
    """Scale codes 0, 254 and 255 on one row of lhs each, 255 on one of rhs."""
    a, b = (
      ops.unit_scales(name, rows, 64, seed) for seed, rows in enumerate((4, 6))
    )
    one, two = ops.encode(np.array([1.0, 2.0]), name)
    a.codes[:3] = 0
    a.codes[:3, :32] = two
    a.codes[1, :32] = one
    a.stored[:3, 0] = 0, 254, 255
    b.codes[:, :32] = two
    b.codes[:, 16:32] = 0
    b.codes[2, 33] = 0x7F
    b.stored[1, 1] = 255
    b.stored[0, 0] = 127 - 8
    got = _run(run, a, b, layout)
    want_nan = np.zeros((4, 6), bool)
    want_nan[2], want_nan[:, 1], want_nan[:, 2] = True, True, True
    np.testing.assert_array_equal(np.isnan(got), want_nan)
    # 16 products of 2 * 2^-127 or 1 * 2^127 with 2, in column 0 over 2^8.
    np.testing.assert_array_equal(got[0, 3:], np.float32(64 * 2.0**-127))
    np.testing.assert_array_equal(got[1, 3:], np.inf)
    self.assertEqual(got[1, 0], 2.0**124)
    self.assertTrue(np.all(np.isfinite(got[3, [0, 3, 4, 5]])))

  @parameterized.parameters((4, 6, 64))
  def test_infinite_elements_do_not_leak(self, m, n, k):
    self.check_infinite_elements(m, n, k)

  @parameterized.parameters((3, 5, K))
  @pytest.mark.slow
  def test_infinite_elements_do_not_leak_into_tiles(self, m, n, k):
    self.check_infinite_elements(m, n, k)

  def check_infinite_elements(self, m, n, k):
    a, b = (ops.unit_scales('mxfp8_e5m2', rows, k, rows) for rows in (m, n))
    a.codes[1, 40] = 0x7C
    b.codes[:, 40] = ops.encode(np.ones(n), 'mxfp8_e5m2')
    for run in (_reference, _tpu):
      got = _run(run, a, b)
      np.testing.assert_array_equal(got[1], np.inf)
      self.assertTrue(np.all(np.isfinite(got[np.arange(m) != 1])))


class TpuTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', 'nvfp4', 'nn'), ('mxint8', 'mxfp6_e2m3', 'tn')
  )
  def test_agrees_with_float64(self, left, right, layout):
    self.check_agrees(left, right, layout)

  @parameterized.parameters(('mxfp8_e5m2', 'mxfp4', 'nt'))
  @pytest.mark.slow
  def test_floats_along_the_lanes_agree(self, left, right, layout):
    self.check_agrees(left, right, layout)

  def check_agrees(self, left, right, layout):
    k = 2 * K
    a, b = ops.normal(left, M, k, 0), ops.normal(right, N, k, 1)
    got = _run(_tpu, a, b, layout, config=_tiles(a, b, layout))
    self.assertEmpty(ops.violations(got, *ops.exact_product(a, b), k))

  @parameterized.parameters('nt', 'nn', 'tn')
  @pytest.mark.slow
  def test_layouts_agree_bit_for_bit_where_sums_are_exact(self, layout):
    a, b = ops.unit_scales('mxfp4', M, K, 0), ops.unit_scales('nvfp4', 20, K, 1)
    got = _run(_tpu, a, b, layout)
    np.testing.assert_array_equal(got, ops.exact_product(a, b)[0])

  def test_promotion(self):
    self.check_promotion('nt', True)

  @pytest.mark.slow
  def test_promotion_across_the_lanes(self):
    self.check_promotion('tn', False)

  def check_promotion(self, layout, tile):
    a = ops.normal('fp8_128', M, 384, 0)
    b = ops.normal('fp8_128_e5m2', N, 384, 1, tile=tile)
    got = _run(_tpu, a, b, layout, 'fp8_128', config=_tiles(a, b, layout))
    self.assertEmpty(ops.violations(got, *ops.promoted_product(a, b), 131))

  @parameterized.parameters(('int4', 'tn'))
  def test_integers_are_exact(self, name, layout):
    a, b = ops.normal(name, M, K, 0), ops.normal('int8', N, K, 1)
    got = _run(_tpu, a, b, layout, 'integer', config=_tiles(a, b, layout))
    total = (a.elements @ b.elements.T).astype(np.float32)
    np.testing.assert_array_equal(got, total * a.stored * b.stored.T)

  def test_operands_without_scales(self):
    a, b = ops.unit_scales('mxfp4', M, K, 0), ops.unit_scales('mxfp4', N, K, 1)
    spec = a.spec._replace(block=0, scale=None)
    lhs, rhs = a.arguments(1)[0], b.arguments(1)[0]
    want, _ = ops.exact_product(a, b)
    for run in (reference.run, tpu.run):
      interpret = {'interpret': True} if run is tpu.run else {}
      product = jax.jit(
        lambda x, y: run(x, None, y, None, spec, spec, **interpret)
      )
      np.testing.assert_array_equal(product(lhs, rhs), want)

  def test_refuses(self):
    spec = ops.FORMATS['int8'][0]
    shapes = ((4, 64), (6, 64))
    facts = {'layout': 'nt', 'mode': 'integer'}
    self.assertIsNone(tpu.why_not(*shapes, spec, spec, target='v5e', **facts))
    reason = tpu.why_not(*shapes, spec, spec, target='tpu7x', **facts)
    self.assertIn('tpu7x does not multiply int8', reason)
    mx = ops.FORMATS['mxfp8_e4m3'][0]
    for tiles, reason in (
      (config.Config(4, 6, 96), 'bk=96'),
      (config.Config(4, 5, 128), 'bn=5'),
      (config.Config(4, 6, 8192), 'more than 128 blocks of 32'),
      (config.Config(4096, 4096, 512), 'bytes'),
    ):
      self.assertIn(
        reason,
        tpu.why_not((4096, 64), (6, 64), mx, mx, config=tiles)
        if tiles.bm == 4096
        else tpu.why_not(*shapes, mx, mx, config=tiles),
      )

  @parameterized.product(
    pair=PAIRS, layout=reference.LAYOUTS, m=(1, 300), n=(5, 4104)
  )
  def test_heuristic_fits(self, pair, layout, m, n):
    a, b = (ops.FORMATS[name][0] for name in pair)
    tiles = config.heuristic(m, n, 4096, a, b, layout)
    self.assertIsNone(config.why_not(tiles, m, n, a, b, layout))


class MutantTest(parameterized.TestCase):
  """Faults that the float64 comparison must find."""

  def setUp(self):
    super().setUp()
    self.a = ops.normal('mxfp8_e4m3', M, K, 0)
    self.b = ops.normal('mxfp8_e4m3', 64, K, 1)

  def _violations(self, layout='nt', interpret=True):
    tiles = _tiles(self.a, self.b, layout, bn=64)
    got = _run(_kernel(interpret), self.a, self.b, layout, config=tiles)
    return ops.violations(got, *ops.exact_product(self.a, self.b), K)

  @pytest.mark.slow
  def test_bounds_are_met_twice_over(self):
    with mock.patch.object(ops, 'U', ops.U / 2):
      self.assertEmpty(self._violations())

  @parameterized.parameters('along_lanes', 'along_sublanes')
  @pytest.mark.slow
  def test_scales_off_by_one_group(self, name):
    spread = getattr(tpu, name)

    def shifted(factor, k):
      return spread(jnp.roll(factor, 1, axis=0), k)

    with mock.patch.object(tpu, name, shifted):
      self.assertNotEmpty(self._violations('nn'))

  @pytest.mark.slow
  def test_last_tile_skipped(self):
    def skipping(*refs, **kwargs):
      @pl.when(pl.program_id(2) < pl.num_programs(2) - 1)
      def _():
        tpu._exact(*refs, **kwargs)

    with mock.patch.dict(tpu._BODIES, exact=skipping):
      # Only this interpreter knows its place inside of pl.when.
      self.assertNotEmpty(self._violations(interpret=races.TPU))

  @pytest.mark.slow
  def test_accumulation_in_bfloat16(self):
    def rounding(*refs, **kwargs):
      tpu._exact(*refs, **kwargs)
      refs[-1][...] = refs[-1][...].astype(jnp.bfloat16).astype(jnp.float32)

    with mock.patch.dict(tpu._BODIES, exact=rounding):
      self.assertNotEmpty(self._violations())

  @pytest.mark.slow
  def test_scales_transposed(self):
    a = ops.normal('fp8_128', M, 256, 0)
    b = ops.normal('fp8_128', 256, 256, 1, tile=True)
    wrong = b._replace(stored=b.stored.T.copy())
    for operand, caught in ((b, False), (wrong, True)):
      got = _run(_reference, a, operand, mode='fp8_128')
      found = ops.violations(got, *ops.promoted_product(a, b), 131)
      self.assertEqual(bool(found), caught)

  def test_scales_of_the_neighbouring_column(self):
    wrong = self.b._replace(stored=np.roll(self.b.stored, 1, axis=0))
    got = _run(_reference, self.a, wrong)
    exact = ops.exact_product(self.a, self.b)
    self.assertNotEmpty(ops.violations(got, *exact, K))


@pytest.mark.slow
class ExhaustiveTest(parameterized.TestCase):
  def test_integers_race_nowhere(self):
    a, b = ops.normal('int8', M, K, 0), ops.normal('int8', N, K, 1)
    got = _run(_tpu, a, b, mode='integer', config=_tiles(a, b))
    want = _run(_reference, a, b, mode='integer')
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(*itertools.product(MX, MX))
  def test_every_pair(self, left, right):
    for layout, (m, n, k) in zip(
      reference.LAYOUTS,
      ((1, 1, 32), (17, 64, 288), (64, 9, 1024), (8, 8, 96)),
      strict=True,
    ):
      a, b = ops.normal(left, m, k, 2), ops.normal(right, n, k, 3)
      exact = ops.exact_product(a, b)
      for run in (_reference, _tpu):
        got = _run(run, a, b, layout)
        with self.subTest(layout=layout, run=run):
          self.assertEmpty(ops.violations(got, *exact, k))

  @parameterized.product(
    m=(1, 7, 65), n=(8, 100, 300), k=(128, 640), layout=reference.LAYOUTS
  )
  def test_promotion(self, m, n, k, layout):
    a = ops.normal('fp8_128', m, k, 2)
    b = ops.normal('fp8_128', n, k, 3, tile=True)
    got = _run(_tpu, a, b, layout, 'fp8_128')
    additions = 128 + k // 128 + 2
    exact = ops.promoted_product(a, b)
    self.assertEmpty(ops.violations(got, *exact, additions))


if __name__ == '__main__':
  absltest.main()
