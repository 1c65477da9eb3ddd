"""quantize, quantize_with and dequantize: policies, scales, roundings, quality.

Bit-exact agreement with the scalar oracle is in qarray_oracle_test.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, numerics, qarray

# One format of each kind of scale, element and block.
KINDS = (
  'mxfp4', 'nvfp4', 'int3_g32', 'uint4_g32', 'int8_channel', 'e4m3fn_tensor',
  'nvfp4_16x16',
)  # fmt: skip
# Of each kind of leaf one, where scales are given.
GIVEN = 'mxfp4', 'uint4_g32', 'e4m3fn_tensor', 'nvfp4_16x16'
# Other pairs of these, for slow tests.
MORE_KINDS = (
  'mxfp8_e4m3', 'mxint8', 'nf4_g64', 'int8_tensor', 'mxfp6_e3m2', 'nvint4',
  'mxfp4_32x32', 'bfp5_g16',
)  # fmt: skip
SHAPE = (64, 96)  # whole tiles, and a ragged last block for blocks of 64
LARGE = (1, 64, 1024)
ONES = np.ones((2, 64), np.float32)
BAD = (math.nan, math.inf, -math.inf)


@functools.cache
def data(shape=SHAPE, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


@functools.partial(
  jax.jit, static_argnames=('fmt', 'axis', 'scale_rule', 'rounding')
)
def quantize(x, fmt, **kwargs):
  return lowbit_jax.quantize(x, fmt, **kwargs)


@functools.partial(jax.jit, static_argnames=('fmt', 'scale_rule', 'rounding'))
def _round_trip(x, fmt, **options):
  q = lowbit_jax.quantize(x, fmt, **options)
  return q, lowbit_jax.dequantize(q)


def round_trip(x, name: str, scale_rule=None, **options):
  """The default rule goes by its name: tests of either share a program."""
  fmt = formats.get(name)
  rule = scale_rule or fmt.scale_rule
  q, y = _round_trip(x, fmt, scale_rule=rule, **options)
  return q, np.asarray(y)


@functools.partial(jax.jit, static_argnames=('fmt', 'axis'))
def quantize_with(x, scale, fmt, **kwargs):
  return lowbit_jax.quantize_with(x, scale, fmt, **kwargs)


element_values = jax.jit(qarray.element_values)


@functools.partial(jax.jit, static_argnames='dtype')
def dequantize(q, dtype=None, dither=None):
  return lowbit_jax.dequantize(q, dtype, dither=dither)


def block_ids(name: str, shape=SHAPE) -> np.ndarray:
  """A number for each element, equal within a block."""
  fmt = formats.get(name)
  if fmt.scale is None:
    return np.zeros(shape, int)
  blocks = (1, *fmt.block) if len(fmt.block) == 1 else fmt.block
  row, column = np.indices(shape)
  row = row // (blocks[0] or shape[0])
  column = column // (blocks[1] or shape[1])
  return row * shape[1] + column


def qsnr(x, y) -> float:
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return 10 * math.log10(np.sum(x**2) / np.sum((x - y) ** 2))


class PoisonTest(parameterized.TestCase):
  def check_poison(self, name):
    ids = block_ids(name)
    for bad, at in zip(BAD, ((0, 0), (63, 95), (40, 33)), strict=True):
      x = data().copy()
      x[at] = bad
      _, y = round_trip(x, name)
      poisoned = ids == ids[at]
      self.assertTrue(np.isnan(y[poisoned]).all(), bad)
      # The others are what they are when the bad element is zero.
      x[at] = 0
      _, clean = round_trip(x, name)
      np.testing.assert_array_equal(y[~poisoned], clean[~poisoned])
      self.assertTrue(np.isfinite(clean).all())

  @parameterized.parameters(*KINDS)
  def test_poison_is_visible_and_confined(self, name):
    self.check_poison(name)

  @parameterized.parameters(*MORE_KINDS)
  @pytest.mark.slow
  def test_poison_in_more_kinds(self, name):
    self.check_poison(name)

  def check_tensor_scale(self, name):
    fmt = formats.get(name)
    x = data().copy()
    x[3, 5] = 1000
    want, _ = round_trip(x, name)
    for bad in BAD:
      x[:2, 40] = bad
      q, y = round_trip(x, name)
      np.testing.assert_array_equal(q.tensor_scale, want.tensor_scale)
      top = fmt.element.max * fmt.scale.max
      self.assertAlmostEqual(float(q.tensor_scale.item()) * top / 1000, 1, 5)
      nan = np.asarray(q.scale) == fmt.scale.nan_code
      np.testing.assert_array_equal(
        nan.any(1).nonzero()[0], [0] if fmt.is_tile else [0, 1]
      )
      self.assertEqual(y[3, 5], np.max(y[np.isfinite(y)]))

  @parameterized.parameters('nvfp4', 'nvfp4_16x16')
  def test_tensor_scale_is_that_of_finite_entries(self, name):
    self.check_tensor_scale(name)

  @pytest.mark.slow
  def test_tensor_scale_of_integers_is_that_of_finite_entries(self):
    self.check_tensor_scale('nvint4')

  @parameterized.parameters('mxfp4', 'nvfp4', 'int3_g32', 'uint4_g32')
  def test_an_array_of_nothing_but_poison(self, name):
    for bad in BAD:
      q, y = round_trip(np.full(SHAPE, bad, np.float32), name)
      self.assertTrue(np.isnan(y).all())
      if q.tensor_scale is not None:
        self.assertTrue(np.isfinite(q.tensor_scale).all())

  @parameterized.parameters('e4m3fn_tensor', 'nvfp4')
  def test_poison_is_visible_with_a_held_tensor_scale(self, name):
    self.check_held_tensor_scale(name)

  @pytest.mark.slow
  def test_poison_in_integers_is_visible_with_a_held_tensor_scale(self):
    self.check_held_tensor_scale('int8_tensor')

  def check_held_tensor_scale(self, name):
    fmt = formats.get(name)
    for bad in BAD:
      x = data().copy()
      x[0, 0] = bad
      _, y = round_trip(x, name, tensor_scale=np.float32(2.0**-4))
      self.assertTrue(np.isnan(y[0, 0]), bad)
      self.assertTrue(np.isfinite(y[1:]).all() or fmt.scale is None)

  def check_narrow(self, name, dtype):
    x = data().astype(dtype)
    x[0, 0] = np.inf
    _, y = round_trip(x, name)
    self.assertEqual(y.dtype, dtype)
    self.assertTrue(np.isnan(y[0, :32].astype(np.float32)).all())
    self.assertTrue(np.isfinite(y[0, 32:].astype(np.float32)).all())

  @parameterized.parameters(
    ('mxfp8_e4m3', jnp.float16), ('mxfp4', jnp.bfloat16)
  )
  def test_poison_survives_float16_and_bfloat16(self, name, dtype):
    self.check_narrow(name, dtype)

  @parameterized.parameters(
    ('mxfp8_e4m3', jnp.bfloat16), ('mxfp4', jnp.float16)
  )
  @pytest.mark.slow
  def test_poison_survives_other_narrow_dtypes(self, name, dtype):
    self.check_narrow(name, dtype)


class ZeroTest(parameterized.TestCase):
  def check_zero_blocks(self, name):
    ids = block_ids(name)
    x = data().copy()
    zero = ids == ids[0, 0]
    x[zero] = 0
    q, y = round_trip(x, name)
    np.testing.assert_array_equal(y[zero], 0)
    if formats.get(name).scale is not None:
      self.assertTrue((y[~zero] != 0).any())
    q, y = round_trip(np.zeros(SHAPE, np.float32), name)
    np.testing.assert_array_equal(y, 0)
    for leaf in jax.tree.leaves(q):
      self.assertTrue(np.isfinite(np.asarray(leaf, np.float64)).all())

  def check_signs_of_zero(self, name):
    fmt = formats.get(name)
    x = data().copy()
    x[::2, ::3] = -0.0
    x[1::2, ::3] = 0.0
    x[:, 32:64] = np.where(np.arange(32) % 2, np.float32(-0.0), np.float32(0.0))
    _, y = round_trip(x, name)
    at_zero = x == 0
    np.testing.assert_array_equal(y[at_zero], 0)
    if isinstance(fmt.element, formats.FloatFormat):
      np.testing.assert_array_equal(
        np.signbit(y[at_zero]), np.signbit(x[at_zero])
      )
      flushed = y == 0
      np.testing.assert_array_equal(
        np.signbit(y[flushed]), np.signbit(x[flushed])
      )
    else:
      self.assertFalse(np.signbit(y[at_zero]).any())

  def check_subnormals(self, name):
    ids = block_ids(name)
    x = data().copy()
    at = ids == ids[0, 0]
    x[at] = np.float32(2.0**-127) * np.sign(x[at])
    _, y = round_trip(x, name)
    np.testing.assert_array_equal(y[at], 0)
    _, y = round_trip(np.full(SHAPE, 1e-40, np.float32), name)
    np.testing.assert_array_equal(y, 0)

  @parameterized.parameters(*KINDS)
  def test_zero_blocks_decode_to_zero(self, name):
    self.check_zero_blocks(name)

  @parameterized.parameters(*KINDS)
  def test_the_sign_of_zero_is_kept_by_float_elements(self, name):
    self.check_signs_of_zero(name)

  @parameterized.parameters(*KINDS)
  def test_blocks_of_subnormals_are_zero(self, name):
    self.check_subnormals(name)

  @parameterized.parameters(*MORE_KINDS)
  @pytest.mark.slow
  def test_more_kinds(self, name):
    self.check_zero_blocks(name)
    self.check_signs_of_zero(name)
    self.check_subnormals(name)


class SaturationTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', 'floor', 7.5, 6.0),
    ('mxfp4', 'rceil', 7.5, 8.0),
    ('mxfp4', 'even', 7.5, 8.0),
    ('mxfp4', 'ceil', 7.5, 8.0),
    ('mxint8', 'floor', 1.999, 127 / 64),
  )
  def test_the_rule_decides_whether_the_maximum_saturates(
    self, name, rule, x, want
  ):
    self.check_maximum(name, rule, x, want)

  @parameterized.parameters(
    ('mxint8', 'rceil', 1.999, 2.0),
    ('mxfp6_e2m3', 'floor', 7.9, 7.5),
    ('mxfp8_e4m3', 'floor', 500.0, 448.0),
    ('mxfp8_e4m3', 'rceil', 500.0, 512.0),
  )
  @pytest.mark.slow
  def test_the_rule_decides_in_more_kinds(self, name, rule, x, want):
    self.check_maximum(name, rule, x, want)

  def check_maximum(self, name, rule, x, want):
    block = np.full(SHAPE, 0.25, np.float32)
    block[0, 7] = x
    _, y = round_trip(block, name, rule)
    self.assertEqual(y[0, 7], want)
    _, y = round_trip(-block, name, rule)
    self.assertEqual(y[0, 7], -want)

  @parameterized.parameters(*KINDS)
  def test_normal_numbers_survive(self, name):
    self.check_small(name)

  @parameterized.parameters(*MORE_KINDS)
  @pytest.mark.slow
  def test_normal_numbers_of_more_kinds_survive(self, name):
    self.check_small(name)

  def check_small(self, name):
    # Errors are those of rounding, and of results below the smallest number.
    fmt = formats.get(name)
    values = fmt.element.values()
    step = np.diff(np.unique(values[np.isfinite(values)])).max()
    share = step / 2 / fmt.element.max
    if fmt.zero_point:
      share *= 4  # twice the range, and the rounding of the zero point
    # A maximum that saturates, and scales that are rounded to E4M3.
    share = max(share, fmt.has_exponent_scale / 4) * 1.07
    x = np.sign(data()) * np.random.RandomState(1).uniform(1, 2, SHAPE)
    for e in (-126, -124, -119, -115):
      small = np.ldexp(x, e).astype(np.float32)
      _, y = round_trip(small, name)
      error = np.abs(y.astype(np.float64) - small).max()
      self.assertLessEqual(error, share * 2.0 ** (e + 1) + 2.0**-126, e)

  @parameterized.parameters(*((n, None) for n in KINDS), ('mxfp4', 'rceil'))
  def test_finite_numbers_stay_finite(self, name, rule):
    self.check_large(name, rule)

  @parameterized.parameters(
    ('mxfp4', 'ceil'), ('mxfp4', 'even'), ('mxfp4', 'mse'),
    ('int4_g32', 'absmean'), ('int4_g32', 'sweep'), ('nvfp4', 'sweep'),
    *((n, None) for n in MORE_KINDS),
  )  # fmt: skip
  @pytest.mark.slow
  def test_finite_numbers_of_more_kinds_stay_finite(self, name, rule):
    self.check_large(name, rule)

  def check_large(self, name, rule):
    top = np.finfo(np.float32).max
    x = np.sign(data()) * np.random.RandomState(1).uniform(0.5, 1, SHAPE) * top
    x[::2] = np.abs(x[::2])
    x[:, ::7] = np.sign(x[:, ::7]) * top
    _, y = round_trip(x.astype(np.float32), name, rule)
    self.assertTrue(np.isfinite(y).all())
    self.assertLess(np.abs(y.astype(np.float64) - x).max(), 0.51 * float(top))

  def check_clipping(self, name):
    fmt = formats.get(name)
    if fmt.zero_point:
      return
    x = data() * 100
    x[0, 0], x[0, 1] = np.inf, -np.inf
    q, _ = round_trip(data(), name)
    held = quantize_with(
      x, q.scale, fmt, tensor_scale=q.tensor_scale, zero_point=q.zero_point
    )
    elements = np.asarray(element_values(held))
    self.assertEqual(elements.max(), fmt.element.max)
    self.assertEqual(elements.min(), -fmt.element.max)
    self.assertEqual(elements[0, 0], fmt.element.max)
    self.assertEqual(elements[0, 1], -fmt.element.max)

  @parameterized.parameters(*GIVEN)
  def test_given_scales_clip_to_the_range(self, name):
    self.check_clipping(name)

  @parameterized.parameters(*(n for n in KINDS if n not in GIVEN), *MORE_KINDS)
  @pytest.mark.slow
  def test_given_scales_clip_more_kinds(self, name):
    self.check_clipping(name)


class ScaleRuleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', 'absmax', 'floor, ceil, even, rceil, round, mse'),
    ('mxfp4', 'sweep', 'floor'),
    ('mxfp4', 'Floor', 'floor'),
    ('mxint8', 'even', 'floor, ceil, rceil, round, mse'),
    ('int4_g32', 'floor', 'absmax, absmean, sweep'),
    ('int4_g32', 'minmax', 'absmax'),
    ('uint4_g32', 'absmax', 'minmax'),
    ('nvint4', 'four_over_six', 'absmax, sweep'),
    ('nvfp4', 'mse', 'absmax, four_over_six, sweep'),
    ('nvfp4', 'rceil', 'absmax'),
    ('e4m3fn_tensor', 'sweep', 'absmax, absmean'),
  )
  def test_rules_that_do_not_fit_are_refused(self, name, rule, remedy):
    fmt = formats.get(name)
    for f in (lowbit_jax.quantize, lowbit_jax.fake_quant):
      with self.assertRaisesRegex(ValueError, f'{rule}.*{name}.*{remedy}'):
        f(ONES, fmt, scale_rule=rule)

  @parameterized.parameters('mxfp4', 'nvfp4', 'uint4_g32', 'int8_tensor')
  def test_none_is_the_rule_of_the_format(self, name):
    fmt = formats.get(name)
    self.assertIn(fmt.scale_rule, numerics.scale_rules(fmt))
    q, y = _round_trip(data(), fmt)
    named, z = round_trip(data(), name, fmt.scale_rule)
    np.testing.assert_array_equal(y, z)
    self.assertEqual(jax.tree.structure(q), jax.tree.structure(named))

  def check_search(self, name, rule):
    fmt = formats.get(name)
    search = 'mse' if fmt.has_exponent_scale else 'sweep'
    x = data()
    ids = block_ids(name)

    def errors(rule):
      _, y = round_trip(x, name, rule)
      return np.bincount(ids.ravel(), (y - x).ravel().astype(np.float64) ** 2)

    least, plain = errors(search), errors(rule)
    # mse tries the exponents next to that of floor, so it covers rceil too.
    self.assertTrue((least <= plain * (1 + 1e-5)).all())
    if rule != 'rceil':  # e4m3 with rceil leaves nothing to find
      self.assertLess(least.sum(), 0.999 * plain.sum())

  def test_padding_does_not_count_in_a_search(self):
    # A table without zero, so that padding has an error.
    table = formats.CodebookFormat('thirds', (-1.0, -1 / 3, 1 / 3, 1.0))
    fmt = formats.BlockFormat('thirds', table, (32,), formats.e8m0)
    x = np.random.RandomState(4).standard_normal((8, 9)).astype(np.float32)
    _, y = _round_trip(x, fmt, scale_rule='mse')
    errors = []
    for k in np.frexp(np.abs(x).max(1))[1][:, None] + np.arange(-2, 1):
      values = np.float64(table.table) * 2.0 ** k[:, None]
      error = np.abs(x[len(errors)][:, None] - values[:, None]).min(-1)
      errors.append(np.square(error).sum(1).min())
    error = np.square(np.asarray(y, np.float64) - x).sum(1)
    np.testing.assert_allclose(error, errors, rtol=1e-5)

  @parameterized.parameters(('mxfp4', 'floor'), ('nvfp4', 'absmax'))
  def test_searching_rules_never_lose(self, name, rule):
    self.check_search(name, rule)

  @parameterized.parameters(
    ('mxfp4', 'rceil'),
    ('mxfp8_e4m3', 'floor'),
    ('mxfp8_e4m3', 'rceil'),
    ('nf4_g64', 'absmax'),
    ('int4_g32', 'absmax'),
  )
  @pytest.mark.slow
  def test_searching_rules_never_lose_in_more_kinds(self, name, rule):
    self.check_search(name, rule)


class TensorScaleTest(parameterized.TestCase):
  def check_holding(self, name, shape):
    q, y = round_trip(data(), name)
    scale = np.asarray(q.tensor_scale).reshape(shape)
    held, z = round_trip(data(), name, tensor_scale=scale)
    np.testing.assert_array_equal(y, z)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(held), strict=True):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(('nvfp4', (1, 1)), ('int8_tensor', ()))
  def test_holding_the_current_scale_changes_nothing(self, name, shape):
    self.check_holding(name, shape)

  @parameterized.product(
    name=('nvfp4', 'nvint4', 'nvfp4_16x16', 'int8_tensor'),
    shape=((), (1,), (1, 1)),
  )
  @pytest.mark.slow
  def test_holding_more_scales_changes_nothing(self, name, shape):
    self.check_holding(name, shape)

  def test_a_held_scale_is_stored_and_used(self):
    q, y = round_trip(data(), 'nvfp4')
    twice = 2 * np.asarray(q.tensor_scale)
    held, z = round_trip(data(), 'nvfp4', tensor_scale=twice)
    np.testing.assert_array_equal(held.tensor_scale, twice)
    # Block scales halve: one step of the exponent field of E4M3.
    np.testing.assert_array_equal(np.asarray(held.scale) + 8, q.scale)
    np.testing.assert_array_equal(held.codes, q.codes)
    np.testing.assert_array_equal(z, y)

  def test_a_small_held_scale_saturates(self):
    _, y = round_trip(
      data(), 'e4m3fn_tensor', tensor_scale=np.float32(2.0**-10)
    )
    self.assertEqual(y.max(), 448 * 2.0**-10)
    self.assertEqual(y.min(), -448 * 2.0**-10)

  def test_one_scale_for_slices_of_a_tensor(self):
    q, y = round_trip(data(), 'nvfp4')
    rest = data().copy()
    rest[32:] = 0  # and so has a tensor scale of its own
    _, part = round_trip(rest, 'nvfp4', tensor_scale=q.tensor_scale)
    np.testing.assert_array_equal(part[:32], y[:32])

  def test_refused_where_the_format_has_none(self):
    with self.assertRaisesRegex(ValueError, 'mxfp4.*drop tensor_scale'):
      lowbit_jax.quantize(ONES, formats.mxfp4, tensor_scale=1.0)

  def test_its_size_is_checked(self):
    with self.assertRaisesRegex(ValueError, 'tensor_scale'):
      lowbit_jax.quantize(
        ONES, formats.nvfp4, tensor_scale=np.ones(2, np.float32)
      )


class QuantizeWithTest(parameterized.TestCase):
  def check_again(self, name):
    fmt = formats.get(name)
    q, _ = round_trip(data(), name)
    value = q.scale
    if value is not None and value.dtype == np.uint8:
      value = fmt.scale.values()[np.asarray(value)].astype(np.float32)
    for scale in (q.scale, value):
      same = quantize_with(
        data(),
        scale,
        fmt,
        tensor_scale=q.tensor_scale,
        zero_point=q.zero_point,
      )
      self.assertEqual(jax.tree.structure(same), jax.tree.structure(q))
      for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(a, b)

  @parameterized.parameters(*GIVEN)
  def test_the_scales_of_quantize_give_its_codes(self, name):
    self.check_again(name)

  @parameterized.parameters(*(n for n in KINDS if n not in GIVEN), *MORE_KINDS)
  @pytest.mark.slow
  def test_the_scales_of_more_kinds_give_their_codes(self, name):
    self.check_again(name)

  def test_float_scales_round_to_the_nearest_code(self):
    x = np.ones((1, 32), np.float32)
    for scale, code in ((1.4, 127), (1.6, 128), (2.0**-3, 124), (0.5, 126)):
      q = quantize_with(x, np.full((1, 1), scale, np.float32), formats.mxfp4)
      self.assertEqual(int(q.scale.item()), code, scale)

  def test_a_nan_scale_poisons_its_block(self):
    q = quantize_with(
      np.ones((1, 64), np.float32),
      np.array([[255, 127]], np.uint8),
      formats.mxfp4,
    )
    y = np.asarray(dequantize(q))
    self.assertTrue(np.isnan(y[0, :32]).all())
    np.testing.assert_array_equal(y[0, 32:], 1)

  def test_nan_is_nan_where_elements_have_it(self):
    x = np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)
    for name, want in (
      ('e4m3fn_tensor', [np.nan, 448, -448, 1]),
      ('int8_tensor', [0, 127, -127, 1]),
    ):
      q = quantize_with(x, None, formats.get(name), tensor_scale=1.0)
      np.testing.assert_array_equal(dequantize(q), [want])

  def test_ragged_and_other_axes(self):
    x = data()[:5, :7].T * 3
    scale = np.full((1, 5), 0.5, np.float32)
    q = quantize_with(x, scale, formats.get('int8_g32'), axis=0)
    self.assertEqual((q.shape, q.axis, q.scale.shape), ((7, 5), -2, (1, 5)))
    want = np.clip(np.round(x * 2), -127, 127) / 2
    np.testing.assert_array_equal(dequantize(q), want)

  def test_zero_points(self):
    x = np.linspace(-1, 2, 32, dtype=np.float32).reshape(1, 32)
    q = quantize_with(
      x,
      np.full((1, 1), 0.25, np.float32),
      formats.get('uint4_g32'),
      zero_point=np.full((1, 1), 5),
    )
    self.assertEqual(q.zero_point.dtype, jnp.uint8)
    want = (np.clip(np.round(x * 4) + 5, 0, 15) - 5) / 4
    np.testing.assert_array_equal(dequantize(q), want)

  @parameterized.parameters((-1, 0), (300, 15), (2**31, 15))
  def test_zero_points_beyond_the_codes_are_clipped(self, given, stored):
    x = np.linspace(-1, 2, 32, dtype=np.float32).reshape(1, 32)
    dtype = np.int16 if given < 2**15 else np.uint32
    q = quantize_with(
      x,
      np.full((1, 1), 0.25, np.float32),
      formats.get('uint4_g32'),
      zero_point=np.full((1, 1), given, dtype),
    )
    self.assertEqual(q.zero_point.item(), stored)
    want = (np.clip(np.round(x * 4) + stored, 0, 15) - stored) / 4
    np.testing.assert_array_equal(dequantize(q), want)

  @parameterized.parameters(
    ('mxfp4', (2, 1), {}, ValueError, r'\(2, 1\) must be \(2, 2\).*mxfp4'),
    ('mxfp4', (), {}, ValueError, r'scale.shape=\(\) must be'),
    ('mxfp4', None, {}, ValueError, 'scale is needed for mxfp4'),
    (
      'e4m3fn_tensor',
      (1, 1),
      dict(tensor_scale=1.0),
      ValueError,
      'scale is not a part of the format for e4m3fn_tensor',
    ),
    ('nvfp4', (2, 4), {}, ValueError, 'tensor_scale is needed for nvfp4'),
    (
      'nvfp4',
      (2, 4),
      dict(tensor_scale=np.ones(2)),
      ValueError,
      r'tensor_scale.shape=\(2,\)',
    ),
    (
      'mxfp4',
      (2, 2),
      dict(tensor_scale=1.0),
      ValueError,
      'tensor_scale is not a part',
    ),
    ('uint4_g32', (2, 2), {}, ValueError, 'zero_point is needed'),
    (
      'int4_g32',
      (2, 2),
      dict(zero_point=np.zeros((2, 2))),
      ValueError,
      'zero_point is not a part',
    ),
    (
      'uint4_g32',
      (2, 2),
      dict(zero_point=np.zeros((2, 1))),
      ValueError,
      r'zero_point.shape=\(2, 1\) must be \(2, 2\)',
    ),
  )
  def test_wrong_scales_say_what_they_should_be(
    self, name, shape, kwargs, error, message
  ):
    scale = None if shape is None else np.ones(shape, np.float32)
    for f in (lowbit_jax.quantize_with, lowbit_jax.fake_quant_with):
      with self.assertRaisesRegex(error, message):
        f(ONES, scale, formats.get(name), **kwargs)

  @parameterized.parameters(
    ('int4_g32', jnp.uint8, 'uint8 must be float$'),
    ('int4_g32', jnp.int32, 'int32 must be float$'),
    ('mxfp4', jnp.int32, 'int32 must be float or uint8 codes'),
    ('mxfp4', jnp.int8, 'int8 must be float or uint8 codes'),
  )
  def test_wrong_scale_dtypes(self, name, dtype, message):
    with self.assertRaisesRegex(TypeError, message):
      lowbit_jax.quantize_with(ONES, np.ones((2, 2), dtype), formats.get(name))


class QualityTest(parameterized.TestCase):
  def quality(self, name, rule=None, c=1) -> float:
    """QSNR of Gaussian data; wide blocks need other programs than SHAPE."""
    size = formats.get(name).block[-1]
    whole = size and SHAPE[1] % size == 0
    parts = [np.float32(c) * x for x in data((10, *SHAPE) if whole else LARGE)]
    return qsnr(parts, [round_trip(x, name, rule)[1] for x in parts])

  def test_nvfp4_does_not_depend_on_the_input_scale(self):
    quality = [self.quality('nvfp4', c=10.0**k) for k in range(-6, 7)]
    self.assertGreater(min(quality), 20.4 - 0.1)
    self.assertLess(max(quality) - min(quality), 0.05)

  def check_gaussian(self, name, rule, at_least):
    for c in (1, 0.02):
      self.assertGreater(self.quality(name, rule, c), at_least)

  @parameterized.parameters(
    ('nvfp4', 'four_over_six', 21.1),
    ('nvfp4', 'sweep', 21.7),
    ('mxfp4', 'mse', 18.95),
    ('mxfp4', 'floor', 18.6),
    ('mxfp4', 'even', 18.9),
  )
  def test_gaussian_data(self, name, rule, at_least):
    self.check_gaussian(name, rule, at_least)

  @parameterized.parameters(
    ('mxint8', 'floor', 41.5),
    ('mxfp8_e4m3', 'rceil', 31.4),
    ('nf4_g64', 'absmax', 20.6),
    ('int8_channel', 'absmax', 40.5),
    ('int4_g128', 'absmax', 18.4),
  )
  @pytest.mark.slow
  def test_gaussian_data_in_more_kinds(self, name, rule, at_least):
    self.check_gaussian(name, rule, at_least)

  def test_the_order_of_rules(self):
    rules = ('absmax', 'four_over_six', 'sweep')
    nv = [self.quality('nvfp4', r) for r in rules]
    self.assertEqual(nv, sorted(nv))
    mx = [self.quality('mxfp4', r) for r in ('ceil', 'floor', 'mse')]
    self.assertEqual(mx, sorted(mx))
    self.assertGreaterEqual(mx[-1], self.quality('mxfp4', 'even'))


class DtypeTest(parameterized.TestCase):
  def check_narrow(self, name, dtype):
    x = data().astype(dtype)
    q, y = round_trip(x, name)
    wide, z = round_trip(x.astype(np.float32), name)
    self.assertEqual(q.dtype, dtype)
    self.assertEqual(y.dtype, dtype)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(wide), strict=True):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(y, z.astype(dtype))

  @parameterized.parameters(
    ('mxfp4', jnp.bfloat16), ('int8_tensor', jnp.float16)
  )
  def test_narrow_inputs_quantize_as_their_float32_values(self, name, dtype):
    self.check_narrow(name, dtype)

  @parameterized.parameters(
    ('mxfp4', jnp.float16),
    ('nvfp4', jnp.float16),
    ('nvfp4', jnp.bfloat16),
    ('uint4_g32', jnp.float16),
    ('uint4_g32', jnp.bfloat16),
    ('int8_tensor', jnp.bfloat16),
  )
  @pytest.mark.slow
  def test_other_narrow_inputs(self, name, dtype):
    self.check_narrow(name, dtype)

  def test_results_in_any_dtype(self):
    q, y = round_trip(data(), 'nvfp4')
    for dtype in (jnp.bfloat16, 'float16', jnp.float32):
      out = dequantize(q, dtype)
      self.assertEqual(out.dtype, jnp.dtype(dtype))
      np.testing.assert_array_equal(out, y.astype(out.dtype))


class TowardZeroTest(parameterized.TestCase):
  def check_toward_zero(self, name):
    fmt = formats.get(name)
    x = data()
    q, y = round_trip(x, name, rounding='toward_zero')
    near, z = round_trip(x, name)
    np.testing.assert_array_equal(np.asarray(q.scale), np.asarray(near.scale))
    # r = 1 / s and x * r are rounded, so y may pass x by two roundings.
    slack = 0 if fmt.has_exponent_scale else 2.0**-22
    self.assertTrue((np.abs(y) <= np.abs(x) * (1 + slack)).all())
    self.assertTrue((np.sign(y) * np.sign(x) >= 0).all())
    differ = y != z
    self.assertBetween(differ.mean(), 0.2, 0.7)
    self.assertTrue((np.abs(z) > np.abs(y))[differ].all())

  @parameterized.parameters('mxfp4', 'int8_tensor')
  def test_never_moves_away_from_zero(self, name):
    self.check_toward_zero(name)

  @parameterized.parameters(
    'mxfp8_e4m3', 'mxint8', 'int3_g32', 'nvfp4', 'nf4_g64'
  )
  @pytest.mark.slow
  def test_more_kinds_never_move_away_from_zero(self, name):
    self.check_toward_zero(name)


def largest(x, mask):
  """The rule 'absmax' of E2M1, whose largest number is 6."""
  del mask
  return jnp.max(jnp.abs(x), axis=-1) * jnp.float32(1 / 6)


def mean(x, mask):
  return jnp.sum(jnp.abs(x), axis=-1) / jnp.sum(mask, axis=-1, dtype=x.dtype)


class FunctionRuleTest(parameterized.TestCase):
  @parameterized.parameters(
    formats.nvfp4,
    formats.BlockFormat('own', formats.get('e2m1'), (32,), formats.float32),
    formats.per_tensor(formats.get('e2m1')),
  )
  def test_is_the_rule_of_the_same_name(self, fmt):
    x = data()[:6, :70]
    got = quantize(x, fmt, scale_rule=largest)
    want = quantize(x, fmt, scale_rule='absmax')
    # Two roundings in another order: a last place of a float scale.
    np.testing.assert_allclose(dequantize(got), dequantize(want), 2e-7)

  def test_padding_is_masked_and_poison_stays(self):
    x = np.abs(data()[:2, :40])
    x[1, 3] = np.nan
    fmt = formats.get('int8_g32')
    q = quantize(x, fmt, scale_rule=mean, axis=-1)
    want = [x[0, :32].mean(), x[0, 32:].mean()]
    np.testing.assert_allclose(q.scale[0], want, 1e-6)
    np.testing.assert_array_equal(np.isnan(q.scale), [[0, 0], [1, 0]])
    tiles = formats.get('fp8_128x128')
    q = quantize(x[:1], tiles, scale_rule=mean)
    np.testing.assert_allclose(q.scale, [[x[0].mean()]], 1e-6)

  def test_refusals(self):
    for fmt, rule, message in (
      (formats.get('uint4_g32'), mean, 'quantize_with'),
      (formats.mxfp4, lambda x, mask: jnp.max(x), 'one float for each'),
      (formats.mxfp4, lambda x, mask: jnp.argmax(x, -1), 'one float for each'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        jax.eval_shape(
          lambda x, fmt=fmt, rule=rule: lowbit_jax.quantize(
            x, fmt, scale_rule=rule
          ),
          ONES,
        )


class DitheredTest(parameterized.TestCase):
  def check_error(self, name):
    fmt = formats.get(name)
    rule = dict(scale_rule='rceil') if fmt.has_exponent_scale else {}
    # Few distinct values: without dither their errors would be few as well.
    x = np.resize(
      np.array([1, 0.3, -0.45, 0.07, -0.8, 0.8, -1], np.float32), SHAPE
    )
    key = jax.random.key(5)
    q = quantize(x, fmt, rounding='dithered', key=key, **rule)
    y = dequantize(q, dither=numerics.dither(key, x.shape))
    s = self.steps(q)
    error = (np.asarray(y, np.float64) - x) / s
    # A rounded zero point leaves half a step at the ends to saturation.
    inside = (np.abs(x) < 1) | (not fmt.zero_point)
    x, s, error = x[inside], s[inside], error[inside]
    n = error.size
    self.assertLessEqual(np.abs(error).max(), 0.5 + 1e-4)
    # Uniform on [-1/2, 1/2): variance 1/12, fourth moment 1/80.
    self.assertLess(abs(error.mean()), 5 * math.sqrt(1 / 12 / n))
    spread = math.sqrt((1 / 80 - 1 / 144) / n)
    self.assertLess(abs(np.mean(error**2) - 1 / 12), 5 * spread)
    # Kolmogorov: P(sqrt(n) D > 2.3) < 6e-5.
    grid = np.sort(error) + 0.5
    d = np.max(np.abs(grid - (np.arange(n) + 0.5) / n))
    self.assertLess(d * math.sqrt(n), 2.3)
    # Independent of the signal and of its neighbour: |r| sqrt(n) < 5.
    for other in (x, np.roll(error, 1), np.roll(error, SHAPE[1])):
      r = np.corrcoef(error, other)[0, 1]
      self.assertLess(abs(r) * math.sqrt(n), 5)

  @parameterized.parameters('mxint8', 'uint4_g32')
  def test_the_error_is_uniform_and_independent(self, name):
    self.check_error(name)

  @parameterized.parameters('int8_channel', 'mxint4', 'int4_g32', 'int8_tensor')
  @pytest.mark.slow
  def test_the_error_of_more_kinds_is_uniform_and_independent(self, name):
    self.check_error(name)

  def steps(self, q) -> np.ndarray:
    """The distance of neighbouring values, for each element."""
    one = np.ones(q.shape, np.float64)
    step = q.fmt.element.step
    if q.tensor_scale is not None:
      step = step * float(q.tensor_scale.item())
    if q.scale is None:
      return one * step
    scale = np.asarray(q.scale)
    if scale.dtype == np.uint8:
      scale = 2.0 ** (scale.astype(np.float64) - 127)
    size = q.fmt.block[0] or q.shape[-1]
    return np.repeat(scale, size, -1)[:, : q.shape[-1]] * step

  def test_needs_the_key_to_decode(self):
    fmt = formats.get('uint4_g32')
    x, key = data(), jax.random.key(1)
    q = quantize(x, fmt, rounding='dithered', key=key)
    offsets = [numerics.dither(k, x.shape) for k in (key, jax.random.key(2))]
    errors = [
      np.mean((np.asarray(dequantize(q, dither=d)) - x) ** 2)
      for d in (offsets[0], None, offsets[1])
    ]
    self.assertLess(errors[0], 0.6 * errors[1])
    self.assertLess(errors[1], 0.9 * errors[2])

  def test_parts_take_the_same_part_of_the_offsets(self):
    x, key = data()[:8], jax.random.key(1)
    q = quantize(x, formats.get('int8_g32'), rounding='dithered', key=key)
    offsets = numerics.dither(key, x.shape)
    whole = np.asarray(dequantize(q, dither=offsets))
    for part in (lambda a: a[4:], lambda a: a.T, lambda a: a[2]):
      got = lowbit_jax.dequantize(part(q), dither=part(offsets))
      np.testing.assert_array_equal(got, part(whole))
    with self.assertRaisesRegex(ValueError, 'dither.shape.*indexed'):
      lowbit_jax.dequantize(q[4:], dither=offsets)

  def test_padding_and_another_axis(self):
    self.check_padding(0)

  @pytest.mark.slow
  def test_padding_of_the_last_axis(self):
    self.check_padding(1)

  def check_padding(self, *axes):
    x, key = data()[:7, :5], jax.random.key(1)
    for axis in axes:
      q = quantize(
        x, formats.get('int8_g32'), axis=axis, rounding='dithered', key=key
      )
      y = dequantize(q, dither=numerics.dither(key, x.shape))
      self.assertEqual(y.shape, x.shape)
      bound = np.asarray(q.scale).max() * 0.5001
      self.assertLess(np.abs(np.asarray(y) - x).max(), bound)

  def test_refused_without_a_uniform_grid(self):
    for name in ('mxfp4', 'nvfp4', 'nf4_g64'):
      with self.assertRaisesRegex(ValueError, 'uniform grid.*stochastic'):
        lowbit_jax.quantize(
          ONES,
          formats.get(name),
          rounding='dithered',
          key=jax.random.key(0),
        )


if __name__ == '__main__':
  absltest.main()
