"""Element formats, code by code: tables, ml_dtypes, gfloat, and the oracle.

The boundary inputs of a format are its values, the midpoints of neighbours, the
overflow midpoint, one float32 ulp to either side of all these, and both signs.
"""

import functools
import statistics

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, numerics
from lowbit_jax.numerics import oracle

try:
  import gfloat
  import gfloat.formats as gfloat_formats
except ImportError:
  gfloat = gfloat_formats = None

# Inputs have one common size, so that each operation is compiled once.
SIZE = 4096
NONFINITE = np.float32([np.inf, -np.inf, np.nan, -np.nan])

ML_DTYPES = {
  'e4m3fn': ml_dtypes.float8_e4m3fn,
  'e5m2': ml_dtypes.float8_e5m2,
  'e4m3': ml_dtypes.float8_e4m3,
  'e3m4': ml_dtypes.float8_e3m4,
  'e4m3fnuz': ml_dtypes.float8_e4m3fnuz,
  'e5m2fnuz': ml_dtypes.float8_e5m2fnuz,
  'e4m3b11fnuz': ml_dtypes.float8_e4m3b11fnuz,
  'e2m3': ml_dtypes.float6_e2m3fn,
  'e3m2': ml_dtypes.float6_e3m2fn,
  'e2m1': ml_dtypes.float4_e2m1fn,
}
ML_INTEGERS = {
  'int2': ml_dtypes.int2,
  'int4': ml_dtypes.int4,
  'uint2': ml_dtypes.uint2,
  'uint4': ml_dtypes.uint4,
}
GFLOATS = {
  'e4m3fn': 'format_info_ocp_e4m3',
  'e5m2': 'format_info_ocp_e5m2',
  'e2m3': 'format_info_ocp_e2m3',
  'e3m2': 'format_info_ocp_e3m2',
  'e2m1': 'format_info_ocp_e2m1',
}
# name, bits, bias, max, smallest normal, smallest subnormal, distinct finite
# values (+0 and -0 counted once).
TABLE = (
  ('e4m3fn', 8, 7, 448, 2**-6, 2**-9, 253),
  ('e5m2', 8, 15, 57344, 2**-14, 2**-16, 247),
  ('e4m3', 8, 7, 240, 2**-6, 2**-9, 239),
  ('e3m4', 8, 3, 15.5, 2**-2, 2**-6, 223),
  ('e4m3fnuz', 8, 8, 240, 2**-7, 2**-10, 255),
  ('e5m2fnuz', 8, 16, 57344, 2**-15, 2**-17, 255),
  ('e4m3b11fnuz', 8, 11, 30, 2**-10, 2**-13, 255),
  ('e2m3', 6, 1, 7.5, 1, 0.125, 63),
  ('e3m2', 6, 3, 28, 0.25, 0.0625, 63),
  ('e2m1', 4, 1, 6, 1, 0.5, 15),
  ('e8m0', 8, 127, 2.0**127, 2.0**-127, None, 255),
  ('ue4m3', 7, 7, 448, 2**-6, 2**-9, 127),
  ('ue5m3', 8, 15, 61440, 2**-14, 2**-17, 248),
)
# Formats whose codes are all finite: max, smallest normal, smallest subnormal.
NONE_TABLE = (
  ('e1m2', 3.5, 2, 0.5),
  ('e3m0', 16, 0.25, None),
  ('e2m2', 7, 1, 0.25),
  ('e3m1', 24, 0.25, 0.125),
  ('e4m0', 256, 2**-6, None),
  ('e4m1', 384, 2**-6, 2**-7),
  ('e2m4', 7.75, 1, 0.0625),
  ('e3m3', 30, 0.25, 2**-5),
  ('e4m2', 448, 2**-6, 2**-8),
  ('e2m5none', 7.875, 1, 2**-5),
  ('e3m4none', 31, 0.25, 2**-6),
  ('e4m3none', 480, 2**-6, 2**-9),
  ('e5m2none', 114688, 2**-14, 2**-16),
)


def all_elements() -> dict[str, formats.ElementFormat]:
  """Every registered element, and the elements of registered blocks."""
  named = {name: formats.get(name) for name in formats.names('element')}
  for name in formats.names('block'):
    element = formats.get(name).element
    named.setdefault(element.name, element)
  return named


ELEMENTS = all_elements()
# Each kind of special values at few and at many bits, each number of exponent
# bits, and what has a name elsewhere: enough for every day.
EVERY_DAY = (
  'e1m1', 'e2m0fn', 'e1m1ieee', 'e3m0fnuz', 'e1m2', 'e2m1', 'e3m0', 'e2m2',
  'e4m0ieee', 'e2m3', 'e3m2', 'e1m4fn', 'e4m1fnuz', 'e5m0', 'e3m3', 'e2m4fn',
  'e1m5fnuz', 'e6m0ieee', 'e1m6fnuz', 'e2m5none', 'e3m4', 'e4m3', 'e4m3fn',
  'e4m3fnuz', 'e5m2', 'e5m2fnuz', 'e6m1', 'e7m0none', 'e4m3b11fnuz', 'e8m0',
  'ue4m3', 'ue5m3', 'int2', 'int3', 'int8', 'uint2', 'uint5', 'uint8',
  'ternary', 'nf4', 'lloyd3', 'int8f6', 'int4f2', 'int2f0',
)  # fmt: skip
OTHER_ELEMENTS = tuple(n for n in ELEMENTS if n not in EVERY_DAY)


def has_special_codes(name: str) -> bool:
  fmt = ELEMENTS[name]
  special = getattr(fmt, 'special', 'none') != 'none'
  return special and not (fmt.inf_code is None and fmt.nan_code is None)


@functools.cache
def boundaries(fmt: formats.ElementFormat) -> np.ndarray:
  """float32 boundary inputs, padded to `SIZE` with ordinary numbers."""
  values = fmt.values()
  grid = np.unique(np.abs(values[np.isfinite(values)]))
  beyond = 2 * grid[-1] - grid[-2] if len(grid) > 1 else 2 * grid[-1]
  grid = np.append(grid, min(beyond, 2.0**127))
  points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
  if isinstance(fmt, formats.CodebookFormat):
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
  points = np.unique(points.astype(np.float32))
  largest = np.float32(3e38)
  x = np.concatenate(
    [
      points,
      np.nextafter(points, largest),
      np.nextafter(points, -largest),
      np.float32([0.0, 1e-30, largest]),
    ]
  )
  x = x[(x == 0) | (np.abs(x) >= np.float32(2.0**-126))]
  x = np.concatenate([x, -x])
  if len(x) > SIZE - len(NONFINITE):
    raise ValueError(f'{fmt} has {len(x)} boundaries; raise SIZE')
  return np.resize(x, SIZE)


def with_nonfinite(fmt) -> np.ndarray:
  """`boundaries`; the last ones, which repeat the first, are not finite."""
  x = boundaries(fmt).copy()
  x[-len(NONFINITE) :] = NONFINITE
  return x


def same_numbers(a, b) -> np.ndarray:
  """Elementwise equality; NaN equals NaN, the signs of zeros are compared."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  nan = np.isnan(a) & np.isnan(b)
  return nan | ((a == b) & (np.signbit(a) == np.signbit(b)))


def encode(x, fmt, **kwargs) -> np.ndarray:
  return np.asarray(numerics.encode(jnp.asarray(x), fmt, **kwargs))


def decode_all(fmt) -> np.ndarray:
  """float32 values of all codes."""
  codes = (np.arange(256) % 2**fmt.bits).astype(np.uint8)
  return np.asarray(numerics.decode(jnp.asarray(codes), fmt))[: 2**fmt.bits]


def explain(x, got, want) -> str:
  bad = np.flatnonzero(got != want)[:5]
  return '; '.join(
    f'{x[i]!r} ({float(x[i]).hex()}): {got[i]}, want {want[i]}' for i in bad
  )


def assert_codes(x, got, want):
  got, want = np.asarray(got), np.asarray(want)
  if not np.array_equal(got, want):
    raise AssertionError(explain(x, got, want))


class TableTest(parameterized.TestCase):
  def test_lloyd3_is_best_for_a_normal_distribution(self):
    """Each number is the mean of what is nearest to it."""
    table = formats.lloyd3.values() * 2.1519457045369873  # Max 1960, table I
    edges = (table[1:] + table[:-1]) / 2
    below = [0.0, *(statistics.NormalDist().cdf(e) for e in edges), 1.0]
    density = [0.0, *(statistics.NormalDist().pdf(e) for e in edges), 0.0]
    means = -np.diff(density) / np.diff(below)
    # Numbers are rounded to float32, and edges move by as much at most.
    np.testing.assert_allclose(table, means, atol=4 * 2.0**-24)

  def test_scales_that_cannot_mark_poisoned_blocks_are_refused(self):
    for scale in (formats.e2m1, formats.minifloat(4, 0, 'ieee')):
      with self.assertRaisesRegex(ValueError, f'scale={scale} has no NaN.*fn'):
        formats.BlockFormat('mine', formats.e2m1, (16,), scale)

  @parameterized.parameters(*TABLE)
  def test_numbers(self, name, bits, bias, largest, normal, subnormal, count):
    fmt = formats.get(name)
    self.assertEqual(fmt.bits, bits)
    self.assertEqual(fmt.bias, bias)
    self.assertEqual(fmt.max, largest)
    self.assertEqual(fmt.min_normal, normal)
    if subnormal is not None:
      self.assertEqual(fmt.min_subnormal, subnormal)
    values = fmt.values()
    self.assertLen(np.unique(values[np.isfinite(values)]), count)

  @parameterized.parameters(*NONE_TABLE)
  def test_formats_without_specials(self, name, largest, normal, subnormal):
    fmt = formats.get(name)
    self.assertTrue(np.all(np.isfinite(fmt.values())))
    self.assertEqual(fmt.max, largest)
    self.assertEqual(fmt.min_normal, normal)
    if subnormal is not None:
      self.assertEqual(fmt.min_subnormal, subnormal)

  @parameterized.parameters(
    ('e4m3fn', {0x7F, 0xFF}, set()),
    ('e5m2', {0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}, {0x7C, 0xFC}),
    ('e4m3', {*range(0x79, 0x80), *range(0xF9, 0x100)}, {0x78, 0xF8}),
    ('e3m4', {*range(0x71, 0x80), *range(0xF1, 0x100)}, {0x70, 0xF0}),
    ('e4m3fnuz', {0x80}, set()),
    ('e5m2fnuz', {0x80}, set()),
    ('e4m3b11fnuz', {0x80}, set()),
    ('e8m0', {0xFF}, set()),
    ('ue4m3', {0x7F}, set()),
    ('e2m1', set(), set()),
  )
  def test_special_codes(self, name, nans, infinities):
    values = decode_all(formats.get(name))
    self.assertEqual(set(np.flatnonzero(np.isnan(values))), nans)
    self.assertEqual(set(np.flatnonzero(np.isinf(values))), infinities)

  def test_e2m1_codes(self):
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = decode_all(formats.e2m1)
    self.assertTrue(np.all(same_numbers(values, np.append(half, -half))))

  def test_mxint8(self):
    fmt = formats.mxint8.element
    self.assertEqual(fmt.max, 127 / 64)
    self.assertEqual(decode_all(fmt)[128], -2.0)
    self.assertEqual(encode(np.resize(np.float32(-9), SIZE), fmt)[0], 129)

  @parameterized.parameters(2, 3, 4, 5, 6, 7, 8)
  def test_e1m_is_the_sign_magnitude_integer_grid(self, bits):
    if bits == 2:
      return
    suffix = 'none' if bits == 8 else ''
    fmt = formats.get(f'e1m{bits - 2}{suffix}')
    largest = 2 ** (bits - 1) - 1
    grid = np.arange(largest + 1) * 2.0 ** (1 - fmt.mantissa_bits)
    np.testing.assert_array_equal(fmt.values()[: largest + 1], grid)

  def test_positive_codes_are_in_the_order_of_the_numbers(self):
    for fmt in ELEMENTS.values():
      if isinstance(fmt, formats.FloatFormat):
        self.assertTrue(np.all(np.diff(fmt.values()[: fmt.code_max + 1]) > 0))


class MlDtypesTest(parameterized.TestCase):
  @parameterized.parameters(*ML_DTYPES)
  def test_decode(self, name):
    fmt = formats.get(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    want = codes.view(ML_DTYPES[name]).astype(np.float32)
    self.assertTrue(np.all(same_numbers(decode_all(fmt), want)))
    self.assertTrue(np.all(same_numbers(fmt.values(), want)))

  @parameterized.parameters(*ML_DTYPES)
  def test_saturating_cast(self, name):
    fmt, dtype = formats.get(name), ML_DTYPES[name]
    x = boundaries(fmt)
    want = np.clip(x, -fmt.max, fmt.max).astype(dtype).view(np.uint8)
    assert_codes(x, encode(x, fmt), want)

  @parameterized.parameters(*ML_DTYPES)
  def test_cast_with_special_values(self, name):
    fmt, dtype = formats.get(name), ML_DTYPES[name]
    if fmt.special == 'none':
      self.skipTest('all codes are finite')
    x = with_nonfinite(fmt)
    got = encode(x, fmt, overflow='special')
    with np.errstate(over='ignore'):
      want = x.astype(dtype)
    # The NaN code is ours to choose; which inputs become NaN is not.
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(fmt.values()[got]), nan)
    assert_codes(x[~nan], got[~nan], want.view(np.uint8)[~nan])

  @parameterized.parameters(*ML_INTEGERS)
  def test_integers(self, name):
    fmt, dtype = formats.get(name), ML_INTEGERS[name]
    codes = np.arange(2**fmt.bits)
    want = codes.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode_all(fmt), want)
    x = boundaries(fmt)
    clipped = np.clip(np.rint(x), -fmt.max if fmt.is_signed else 0, fmt.max)
    want = clipped.astype(dtype).astype(np.int32) & (2**fmt.bits - 1)
    assert_codes(x, encode(x, fmt), want)

  def test_e8m0(self):
    want = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    values = decode_all(formats.e8m0)
    self.assertTrue(np.all(same_numbers(values, want.astype(np.float32))))


class GfloatTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if gfloat is None:
      self.skipTest('gfloat is not installed')

  @parameterized.parameters(*GFLOATS)
  def test_decode(self, name):
    info = getattr(gfloat_formats, GFLOATS[name])
    fmt = formats.get(name)
    want = gfloat.decode_ndarray(info, np.arange(2**fmt.bits))
    self.assertTrue(np.all(same_numbers(decode_all(fmt), want)))

  @parameterized.product(name=tuple(GFLOATS), saturate=(True, False))
  def test_encode(self, name, saturate):
    info = getattr(gfloat_formats, GFLOATS[name])
    fmt = formats.get(name)
    if fmt.special == 'none' and not saturate:
      self.skipTest('all codes are finite')
    x = boundaries(fmt)
    rounded = gfloat.round_ndarray(
      info, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=saturate
    )
    got = encode(x, fmt, overflow='saturate' if saturate else 'special')
    self.assertTrue(np.all(same_numbers(fmt.values()[got], rounded)))
    finite = np.isfinite(rounded)
    want = gfloat.encode_ndarray(info, rounded[finite])
    assert_codes(x[finite], got[finite], want)

  @parameterized.parameters('e3m0', 'e4m0')
  def test_ties_of_powers_of_two_go_to_the_even_code(self, name):
    fmt = formats.get(name)
    info = gfloat.FormatInfo(
      name,
      fmt.bits,
      1,
      bias=fmt.bias,
      is_signed=True,
      domain=gfloat.Domain.Finite,
      has_nz=True,
      num_high_nans=0,
      has_subnormals=True,
      is_twos_complement=False,
    )
    x = boundaries(fmt)
    x = x[np.abs(x) >= fmt.min_normal]
    want = gfloat.round_ndarray(
      info, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True
    )
    got = fmt.values()[encode(np.resize(x, SIZE), fmt)][: len(x)]
    np.testing.assert_array_equal(got, want)


class OracleTest(parameterized.TestCase):
  @parameterized.parameters(*EVERY_DAY)
  def test_decode(self, name):
    self.check_decode(name)

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_decode_of_other_elements(self, name):
    self.check_decode(name)

  def check_decode(self, name):
    fmt = ELEMENTS[name]
    want = [float(v) for v in oracle.values(fmt)]
    self.assertTrue(np.all(same_numbers(decode_all(fmt), want)))
    self.assertTrue(np.all(same_numbers(fmt.values(), want)))

  @parameterized.parameters(*EVERY_DAY)
  def test_encode_inverts_decode(self, name):
    self.check_encode_inverts_decode(name)

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_encode_inverts_decode_of_other_elements(self, name):
    self.check_encode_inverts_decode(name)

  def check_encode_inverts_decode(self, name):
    fmt = ELEMENTS[name]
    values = decode_all(fmt)
    codes = np.arange(2**fmt.bits)
    if isinstance(fmt, formats.IntFormat) and fmt.signed:
      values = np.delete(values, fmt.code_max + 1)
      codes = np.delete(codes, fmt.code_max + 1)
    keep = np.isfinite(values)
    got = encode(np.resize(values[keep], SIZE), fmt)[: keep.sum()]
    assert_codes(values[keep], got, codes[keep])

  @parameterized.parameters(*EVERY_DAY)
  def test_nearest_even(self, name):
    self.assert_agrees(with_nonfinite, name)

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_nearest_even_in_other_elements(self, name):
    self.assert_agrees(with_nonfinite, name)

  @parameterized.parameters(*EVERY_DAY)
  def test_toward_zero(self, name):
    self.assert_agrees(boundaries, name, rounding='toward_zero')

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_toward_zero_in_other_elements(self, name):
    self.assert_agrees(boundaries, name, rounding='toward_zero')

  @parameterized.parameters(*(n for n in EVERY_DAY if has_special_codes(n)))
  def test_special(self, name):
    self.assert_agrees(with_nonfinite, name, overflow='special')

  @parameterized.parameters(
    *(n for n in OTHER_ELEMENTS if has_special_codes(n))
  )
  @pytest.mark.slow
  def test_special_in_other_elements(self, name):
    self.assert_agrees(with_nonfinite, name, overflow='special')

  def assert_agrees(self, data, name, **kwargs):
    fmt = ELEMENTS[name]
    x = data(fmt)
    assert_codes(x, encode(x, fmt, **kwargs), oracle_codes(x, fmt, **kwargs))


def oracle_codes(x, fmt, **kwargs) -> np.ndarray:
  """Codes of the oracle; equal inputs are computed once."""
  bits, inverse = np.unique(x.view(np.uint32), return_inverse=True)
  unique = bits.view(np.float32)
  codes = [oracle.encode(float(v), fmt, **kwargs) for v in unique]
  return np.array(codes)[inverse.reshape(-1)]


if __name__ == '__main__':
  absltest.main()
