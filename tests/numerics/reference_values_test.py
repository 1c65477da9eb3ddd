"""Codes and scales of two printed blocks, on which several programs agree.

The MX values are those of gfloat, microxcaling (round='even') and torchao; the
NVFP4 values those of torchao, TransformerEngine's reference and JAX.
"""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, numerics

NAN = np.float32(np.nan)
INF = np.float32(np.inf)

# fmt: off
A = np.float32([
  0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75,
  -2.5, -3.5, -5.0, 0.3, 0.1, 0.05, 7.5, -7.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0,
  0.5, 0.2, -0.3, 0.001, -6.5,
])
B = np.float32([
  2e-05, 0.00597, -0.00548, -0.01781, -0.00909, -0.01983, 0.0012, 0.0268,
  -0.00984, -0.01241, 0.0098, 0.00714, 0.00211, -0.01861, -0.00059, 0.01391,
  -0.02688, -0.00915, -0.03802, -0.02579, -0.03683, -0.0047, -0.02535, 0.00543,
  0.00314, -0.00374, -0.05034, -0.01077, -0.00097, 0.00227, -0.0306, -0.00956,
])
# format, input, scale codes, element codes.
MX = (
  ('mxfp4', A, 127,
   [0, 8, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 1, 0, 0, 7, 15, 7, 6,
    5, 4, 3, 2, 1, 0, 9, 0, 15]),
  ('mxfp8_e4m3', A, 121,
   [0, 128, 88, 100, 106, 110, 114, 118, 122, 216, 228, 234, 238, 242, 246, 250,
    90, 77, 69, 126, 254, 124, 120, 116, 112, 108, 104, 96, 85, 218, 24, 253]),
  ('mxint8', A, 129,
   [0, 0, 4, 12, 20, 28, 40, 56, 80, 252, 244, 236, 228, 216, 200, 176, 5, 2, 1,
    120, 144, 96, 64, 48, 32, 24, 16, 8, 3, 251, 0, 152]),
  ('mxfp4', B, 120,
   [0, 2, 9, 12, 10, 13, 0, 5, 11, 11, 3, 2, 1, 12, 8, 4, 13, 10, 14, 13, 14, 9,
    13, 1, 1, 9, 15, 11, 8, 1, 14, 10]),
  ('mxfp8_e4m3', B, 114,
   [34, 100, 227, 241, 233, 242, 82, 118, 234, 237, 106, 103, 89, 242, 202, 110,
    246, 233, 250, 245, 249, 226, 245, 99, 93, 223, 253, 235, 208, 89, 248,
    234]),
  ('mxint8', B, 122,
   [0, 12, 245, 220, 237, 215, 2, 55, 236, 231, 20, 15, 4, 218, 255, 28, 201,
    237, 178, 203, 181, 246, 204, 11, 6, 248, 153, 234, 254, 5, 193, 236]),
)
MX_DEQUANTIZED = (
  ('mxfp4',
   [0.0, -0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -1.0, -2.0, -2.0,
    -4.0, -4.0, 0.5, 0.0, 0.0, 6.0, -6.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5,
    0.0, -0.5, 0.0, -6.0]),
  ('mxfp8_e4m3',
   [0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25,
    -1.75, -2.5, -3.5, -5.0, 0.3125, 0.1015625, 0.05078125, 7.0, -7.0, 6.0, 4.0,
    3.0, 2.0, 1.5, 1.0, 0.5, 0.203125, -0.3125, 0.0009765625, -6.5]),
  ('mxint8',
   [0.0, 0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75,
    -2.5, -3.5, -5.0, 0.3125, 0.125, 0.0625, 7.5, -7.0, 6.0, 4.0, 3.0, 2.0, 1.5,
    1.0, 0.5, 0.1875, -0.3125, 0.0, -6.5]),
)
NVFP4 = (
  (A, 0.0027901786379516125, [121, 126],
   [0, 8, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0, 0, 0, 7, 15, 6, 5,
    4, 3, 2, 2, 1, 0, 8, 0, 15]),
  (B, 1.8727678252616897e-05, [119, 126],
   [0, 3, 10, 14, 12, 14, 1, 7, 12, 13, 4, 3, 1, 14, 8, 5, 13, 10, 14, 13, 14,
    9, 13, 1, 1, 9, 15, 11, 8, 1, 14, 10]),
)
NVFP4_A_PACKED = '8021436597badcfe00706f45231280f0'
NVFP4_A_DEQUANTIZED = [
  0.0, -0.0, 0.4017857313156128, 0.8035714626312256, 1.2053571939468384,
  1.6071429252624512, 2.4107143878936768, 3.2142858505249023,
  4.8214287757873535, -0.4017857313156128,
]
# amax: scale codes by floor, even, rceil, ceil in E2M1 and in E4M3, and by
# floor = rceil in INT8.
SCALES = (
  (1.0, (125, 125, 125, 125), (119, 119, 119, 119), 127),
  (3.0, (126, 126, 126, 127), (120, 120, 120, 121), 128),
  (5.0, (127, 127, 127, 128), (121, 121, 121, 122), 129),
  (6.0, (127, 127, 127, 128), (121, 121, 121, 122), 129),
  (6.5, (127, 127, 128, 128), (121, 121, 121, 122), 129),
  (7.0, (127, 128, 128, 128), (121, 121, 121, 122), 129),
  (7.0000005, (127, 128, 128, 128), (121, 121, 122, 122), 129),
  (8.0, (128, 128, 128, 128), (122, 122, 122, 122), 130),
  (448.0, (133, 134, 134, 134), (127, 127, 127, 128), 135),
  (449.0, (133, 134, 134, 134), (127, 127, 128, 128), 135),
  (480.0, (133, 134, 134, 134), (127, 127, 128, 128), 135),
  (512.0, (134, 134, 134, 134), (128, 128, 128, 128), 136),
  (2.0**-126, (0, 0, 0, 0), (0, 0, 0, 0), 1),
  # Here others give one more by rceil and ceil, and Inf in decoding.
  (3.4e38, (252, None, 252, 252), (246, None, 246, 246), 254),
)
# Scale codes of A and B by floor, even, rceil, ceil.
SCALES_OF_AB = (
  ('mxfp4', (127, 128, 128, 128), (120, 120, 121, 121)),
  ('mxfp8_e4m3', (121, 121, 122, 122), (114, 114, 114, 115)),
  ('mxint8', (129, None, 129, 130), (122, None, 122, 123)),
)
# Codes 0..7 as a little-endian bit stream.
PACKED = (
  (2, 'e4e4'), (3, '88c6fa'), (4, '10325476'), (5, '2088418a39'),
  (6, '40200c44611c'), (7, '808060402818 0e'.replace(' ', '')),
)
# fmt: on
RULES = ('floor', 'even', 'rceil', 'ceil')
# Formats that differ in the kind of their elements or of their scales.
BLOCK_FORMATS = (
  'mxfp4', 'mxfp8_e4m3', 'mxint8', 'nvfp4', 'uint4_g32', 'nf4_g64',
)  # fmt: skip
OTHER_FORMATS = (
  'mxfp6_e2m3', 'mxfp6_e3m2', 'mxfp8_e5m2', 'nvint4', 'int4_g32', 'int8_g32',
  'fp8_1x128', 'bfp4_g16',
)  # fmt: skip


def exponent_scaled(names):
  return tuple(n for n in names if formats.get(n).has_exponent_scale)


def with_float_elements(names):
  is_float = lambda f: isinstance(f.element, formats.FloatFormat)
  return tuple(n for n in names if is_float(formats.get(n)))


# All arrays have one shape, so that each operation is compiled few times.
SHAPE = (4, 256)


def embed(x) -> np.ndarray:
  """An array of zeros that begins with `x`."""
  out = np.zeros(SHAPE, np.float32)
  out.reshape(-1)[: x.size] = x.ravel()
  return out


# Tracing and compiling op by op is what costs time here.
@functools.partial(jax.jit, static_argnames=('name', 'scale_rule'))
def _quantize(x, name, scale_rule=None):
  fmt = formats.get(name)
  return lowbit_jax.quantize(x, fmt, scale_rule=scale_rule)


@jax.jit
def _read(q):
  """Values, and element codes, one in a byte."""
  codes = numerics.unpack(q.codes, q.fmt.element.bits)
  return lowbit_jax.dequantize(q), codes


def quantize(x, name, **kwargs):
  return _quantize(np.asarray(x), name, **kwargs)


def dequantize(q) -> np.ndarray:
  return np.array(_read(q)[0])


def codes_of(q) -> np.ndarray:
  return np.asarray(_read(q)[1])


def scale_codes(amax, name, rule) -> np.ndarray:
  """Scale codes of blocks with these maxima."""
  block = formats.get(name).block[0]
  rows = SHAPE[0] * SHAPE[1] // block
  out = []
  for i in range(0, len(amax), rows):
    some = np.float32(amax[i : i + rows])
    x = np.zeros((rows, block), np.float32)
    x[: len(some), 3] = -some
    q = quantize(x.reshape(SHAPE), name, scale_rule=rule)
    out.append(np.asarray(q.scale).ravel()[: len(some)])
  return np.concatenate(out)


def assert_bits(got, want):
  """Equal float32, the sign of zero included."""
  got, want = np.float32(got), np.float32(want)
  np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


class BlockTest(parameterized.TestCase):
  @parameterized.parameters(*MX)
  def test_mx(self, name, x, scale, codes):
    q = quantize(embed(x), name, scale_rule='floor')
    self.assertEqual(int(q.scale[0, 0]), scale)
    self.assertEqual(codes_of(q)[0, :32].tolist(), codes)

  @parameterized.parameters(*MX_DEQUANTIZED)
  def test_mx_dequantized(self, name, values):
    q = quantize(embed(A), name, scale_rule='floor')
    assert_bits(dequantize(q)[0, :32], values)

  @parameterized.parameters(*NVFP4)
  def test_nvfp4(self, x, tensor_scale, scales, codes):
    q = quantize(embed(x), 'nvfp4')
    assert_bits(np.asarray(q.tensor_scale).ravel(), [tensor_scale])
    self.assertEqual(np.asarray(q.scale)[0, :2].tolist(), scales)
    self.assertEqual(codes_of(q)[0, :32].tolist(), codes)

  def test_nvfp4_packed_and_dequantized(self):
    q = quantize(embed(A), 'nvfp4')
    packed = np.asarray(q.codes)[0, :16]
    self.assertEqual(packed.tobytes().hex(), NVFP4_A_PACKED)
    assert_bits(dequantize(q)[0, :10], NVFP4_A_DEQUANTIZED)

  @parameterized.parameters(*PACKED)
  def test_packing(self, bits, stream):
    codes = np.arange(8, dtype=np.uint8) % 2**bits

    @jax.jit
    def there_and_back(codes):
      packed = numerics.pack(codes, bits)
      return packed, numerics.unpack(packed, bits)

    packed, back = there_and_back(codes)
    self.assertEqual(np.asarray(packed).tobytes().hex(), stream)
    np.testing.assert_array_equal(back, codes)


class ScaleCodeTest(parameterized.TestCase):
  @parameterized.parameters(*enumerate(RULES))
  def test_table(self, i, rule):
    for column, name in ((1, 'mxfp4'), (2, 'mxfp8_e4m3')):
      rows = [row for row in SCALES if row[column][i] is not None]
      got = scale_codes([row[0] for row in rows], name, rule)
      self.assertEqual(got.tolist(), [row[column][i] for row in rows], name)

  @parameterized.parameters('floor', 'rceil')
  def test_int8(self, rule):
    got = scale_codes([row[0] for row in SCALES], 'mxint8', rule)
    self.assertEqual(got.tolist(), [row[3] for row in SCALES])

  @parameterized.parameters(*SCALES_OF_AB)
  def test_rules_on_the_printed_blocks(self, name, of_a, of_b):
    for x, want in ((A, of_a), (B, of_b)):
      for rule, code in zip(RULES, want, strict=True):
        if code is not None:
          q = quantize(embed(x), name, scale_rule=rule)
          self.assertEqual(int(q.scale[0, 0]), code, rule)

  @parameterized.parameters('mxfp4', 'mxfp8_e4m3', 'mxint8')
  def test_just_below_powers_of_two(self, name):
    # log2 in float32 rounds these up to k; the rules must not.
    k = np.arange(-100, 127)
    power = np.ldexp(np.float32(1), k)
    below = np.nextafter(power, np.float32(0))
    emax = formats.get(name).element.emax
    base = np.clip(k - emax + 127, 0, 254)
    self.assertEqual(scale_codes(power, name, 'floor').tolist(), base.tolist())
    self.assertEqual(
      scale_codes(below, name, 'floor').tolist(),
      np.clip(k - emax + 126, 0, 254).tolist(),
    )
    self.assertEqual(scale_codes(power, name, 'ceil').tolist(), base.tolist())
    self.assertEqual(scale_codes(below, name, 'ceil').tolist(), base.tolist())

  def test_maximum_below_eight_saturates_to_six(self):
    x = embed(np.nextafter(np.float32([8]), np.float32(0)))
    back = dequantize(quantize(x, 'mxfp4', scale_rule='floor'))
    self.assertEqual(back[0, 0], 6.0)

  @parameterized.parameters('mxfp4', 'mxfp8_e4m3', 'mxint8')
  def test_rceil_tells_neighbours_of_the_maximum_apart(self, name):
    self._neighbours_of_the_maximum(name)

  @parameterized.parameters('mxfp6_e3m2', 'mxint4')
  @pytest.mark.slow
  def test_rceil_tells_neighbours_apart_in_other_formats(self, name):
    self._neighbours_of_the_maximum(name)

  def _neighbours_of_the_maximum(self, name):
    largest = np.float32(formats.get(name).element.max)
    above = np.nextafter(largest, INF)
    below = np.nextafter(largest, np.float32(0))
    got = scale_codes([below, largest, above], name, 'rceil')
    self.assertEqual(got.tolist(), [127, 127, 128])


class EdgeCaseTest(parameterized.TestCase):
  """Block 1 of row 0 is special, all other blocks are ordinary."""

  def ordinary(self, n: int) -> tuple[np.ndarray, tuple]:
    """Ordinary numbers, and where the special block of size n is."""
    size = SHAPE[0] * SHAPE[1]
    x = np.linspace(-3, 2.5, size, dtype=np.float32).reshape(SHAPE)
    return x, (0, slice(n, 2 * n))

  @parameterized.product(name=BLOCK_FORMATS, bad=('nan', 'inf', '-inf'))
  def test_poison_stays_in_its_block(self, name, bad):
    self._poison_stays_in_its_block(name, bad)

  @parameterized.product(name=OTHER_FORMATS, bad=('nan', 'inf', '-inf'))
  @pytest.mark.slow
  def test_poison_stays_in_its_block_of_others(self, name, bad):
    self._poison_stays_in_its_block(name, bad)

  def _poison_stays_in_its_block(self, name, bad):
    fmt = formats.get(name)
    n = fmt.block[0]
    x, block = self.ordinary(n)
    # A zero in place of the poison leaves the tensor's finite maximum alone.
    x[0, n + 5] = 0.0
    want = dequantize(quantize(x, name))
    want[block] = NAN
    x[0, n + 5] = np.float32(bad)
    q = quantize(x, name)
    np.testing.assert_array_equal(dequantize(q), want)
    if fmt.scale.bits <= 8:
      self.assertEqual(int(q.scale[0, 1]), fmt.scale.nan_code)
    else:
      self.assertTrue(np.isnan(np.asarray(q.scale)[0, 1]))
    zero = np.nanargmin(np.abs(fmt.element.values()))
    np.testing.assert_array_equal(codes_of(q)[block], zero)

  @parameterized.parameters(('e4m3fn_tensor',))
  def test_poison_of_a_tensor_without_blocks(self, name):
    self._poison_without_blocks(name)

  @parameterized.parameters(('int8_tensor',))
  @pytest.mark.slow
  def test_poison_of_a_tensor_of_integers(self, name):
    self._poison_without_blocks(name)

  def _poison_without_blocks(self, name):
    x = embed(np.float32([1.0, NAN, 2.0, 3.0]))
    self.assertTrue(np.all(np.isnan(dequantize(quantize(x, name)))))

  @parameterized.parameters(*BLOCK_FORMATS)
  def test_zero_blocks(self, name):
    self._zero_blocks(name)

  @parameterized.parameters(*OTHER_FORMATS)
  @pytest.mark.slow
  def test_zero_blocks_in_others(self, name):
    self._zero_blocks(name)

  def _zero_blocks(self, name):
    fmt = formats.get(name)
    x, block = self.ordinary(fmt.block[0])
    x[block] = 0.0
    q = quantize(x, name)
    np.testing.assert_array_equal(dequantize(q)[block], 0.0)
    if fmt.scale.bits <= 8:
      self.assertEqual(int(q.scale[0, 1]), 0)
    whole = dequantize(quantize(np.zeros_like(x), name))
    np.testing.assert_array_equal(whole, 0.0)

  @parameterized.parameters(*BLOCK_FORMATS)
  def test_subnormal_blocks_are_zero_blocks(self, name):
    self._subnormal_blocks_are_zero_blocks(name)

  @parameterized.parameters(*OTHER_FORMATS)
  @pytest.mark.slow
  def test_subnormal_blocks_are_zero_blocks_in_others(self, name):
    self._subnormal_blocks_are_zero_blocks(name)

  def _subnormal_blocks_are_zero_blocks(self, name):
    x, block = self.ordinary(formats.get(name).block[0])
    x[block] = 1e-40
    got = dequantize(quantize(x, name))
    np.testing.assert_array_equal(got[block], 0.0)
    self.assertTrue(np.all(got[3, -100:]))

  @parameterized.parameters(*exponent_scaled(BLOCK_FORMATS))
  def test_smallest_normal_block_is_not_a_zero_block(self, name):
    self._smallest_normal_block_is_not_a_zero_block(name)

  @parameterized.parameters(*exponent_scaled(OTHER_FORMATS))
  @pytest.mark.slow
  def test_smallest_normal_block_is_not_a_zero_block_in_others(self, name):
    self._smallest_normal_block_is_not_a_zero_block(name)

  def _smallest_normal_block_is_not_a_zero_block(self, name):
    x = embed(np.float32([2.0**-126]))
    self.assertEqual(dequantize(quantize(x, name))[0, 0], x[0, 0])

  @parameterized.parameters(*with_float_elements(BLOCK_FORMATS))
  def test_negative_zero_is_kept(self, name):
    self._negative_zero_is_kept(name)

  @parameterized.parameters(*with_float_elements(OTHER_FORMATS))
  @pytest.mark.slow
  def test_negative_zero_is_kept_in_others(self, name):
    self._negative_zero_is_kept(name)

  def _negative_zero_is_kept(self, name):
    n = formats.get(name).block[0]
    x, block = self.ordinary(n)
    x[0, 0] = -0.0
    x[0, 1] = -1e-30
    x[block] = -0.0
    got = dequantize(quantize(x, name))
    assert_bits(got[0, :2], [-0.0, -0.0])
    assert_bits(got[block], np.full(n, -0.0))

  @parameterized.parameters(
    'mxfp4', 'mxfp8_e4m3', 'mxint8', 'nvfp4', 'nf4_g64', 'uint4_g32'
  )
  def test_largest_float32(self, name):
    largest = np.finfo(np.float32).max
    x = embed(np.float32([-largest]))
    got = dequantize(quantize(x, name))
    self.assertTrue(np.all(np.isfinite(got)))
    self.assertLess(got[0, 0], -0.7 * largest)


if __name__ == '__main__':
  absltest.main()
