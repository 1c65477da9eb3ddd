"""The scalar oracle against numbers printed in standards and papers."""

import math
import struct
from fractions import Fraction

from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.numerics import oracle

INF = math.inf
NAN = math.nan
E2M1_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def same(a, b) -> bool:
  """Equal, with NaN equal to NaN and the sign of zero told apart."""
  if a != a or b != b:
    return a != a and b != b
  return a == b and oracle.is_negative(a) == oracle.is_negative(b)


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters(
    # OCP 8-bit Floating Point Specification 1.0, table 2.
    ('e4m3fn', 0x00, 0),
    ('e4m3fn', 0x80, -0.0),
    ('e4m3fn', 0x01, 2**-9),
    ('e4m3fn', 0x07, 0.875 * 2**-6),
    ('e4m3fn', 0x08, 2**-6),
    ('e4m3fn', 0x7E, 448),
    ('e4m3fn', 0x7F, NAN),
    ('e4m3fn', 0xFF, NAN),
    ('e5m2', 0x01, 2**-16),
    ('e5m2', 0x03, 0.75 * 2**-14),
    ('e5m2', 0x04, 2**-14),
    ('e5m2', 0x7B, 57344),
    ('e5m2', 0x7C, INF),
    ('e5m2', 0xFC, -INF),
    ('e5m2', 0x7D, NAN),
    # OCP Microscaling Formats 1.0, tables 3 to 7.
    ('e3m2', 0x1F, 28),
    ('e3m2', 0x04, 0.25),
    ('e3m2', 0x03, 0.1875),
    ('e3m2', 0x01, 0.0625),
    ('e2m3', 0x1F, 7.5),
    ('e2m3', 0x08, 1),
    ('e2m3', 0x07, 0.875),
    ('e2m3', 0x01, 0.125),
    ('e8m0', 0x00, 2**-127),
    ('e8m0', 0x7F, 1),
    ('e8m0', 0xFE, 2**127),
    ('e8m0', 0xFF, NAN),
    # The other special policies.
    ('e4m3', 0x77, 240),
    ('e4m3', 0x78, INF),
    ('e3m4', 0x6F, 15.5),
    ('e4m3fnuz', 0x7F, 240),
    ('e4m3fnuz', 0x80, NAN),
    ('e4m3fnuz', 0x01, 2**-10),
    ('e5m2fnuz', 0x7F, 57344),
    ('e5m2fnuz', 0x01, 2**-17),
    ('e4m3b11fnuz', 0x7F, 30),
    ('e4m3b11fnuz', 0x01, 2**-13),
    ('e4m3none', 0x7F, 480),
    ('e3m0', 0x00, 0),
    ('e3m0', 0x01, 0.25),
    ('e3m0', 0x07, 16),
    ('e1m2', 0x07, 3.5),
    ('ue4m3', 0x7E, 448),
    ('ue5m3', 0xF7, 61440),
    ('ue5m3', 0xF8, INF),
    # Integers.
    ('int4', 0x7, 7),
    ('int4', 0x8, -8),
    ('int4', 0xF, -1),
    ('uint4', 0xF, 15),
    ('ternary', 0x3, -1),
    ('nf4', 0x7, 0),
    ('nf4', 0xF, 1),
  )
  def test_code_points(self, name, code, value):
    self.assertTrue(
      same(oracle.decode(code, formats.get(name)), value),
      oracle.decode(code, formats.get(name)),
    )

  def test_all_of_e2m1(self):
    expected = [*E2M1_VALUES, *(-v if v else -0.0 for v in E2M1_VALUES)]
    for value, want in zip(oracle.values(formats.e2m1), expected, strict=True):
      self.assertTrue(same(value, want), (value, want))

  def test_mxint8_is_in_64ths(self):
    element = formats.mxint8.element
    self.assertEqual(oracle.decode(127, element), Fraction(127, 64))
    self.assertEqual(oracle.decode(128, element), -2)
    self.assertEqual(oracle.decode(255, element), Fraction(-1, 64))

  def test_refuses_what_is_no_code(self):
    with self.assertRaisesRegex(ValueError, 'code=16'):
      oracle.decode(16, formats.e2m1)


class EncodeTest(parameterized.TestCase):
  @parameterized.parameters(
    # Ties of E2M1 go to the even code.
    (0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4),
  )  # fmt: skip
  def test_ties_of_e2m1(self, tie, magnitude):
    code = {0: 0, 0.5: 1, 1: 2, 1.5: 3, 2: 4, 3: 5, 4: 6, 6: 7}[magnitude]
    self.assertEqual(oracle.encode(tie, formats.e2m1), code)
    self.assertEqual(oracle.encode(-tie, formats.e2m1), code + 8)
    above = Fraction(tie) + Fraction(1, 10**30)
    below = Fraction(tie) - Fraction(1, 10**30)
    lower = max(i for i, v in enumerate(E2M1_VALUES) if v < tie)
    self.assertEqual(oracle.encode(above, formats.e2m1), lower + 1)
    self.assertEqual(oracle.encode(below, formats.e2m1), lower)

  @parameterized.parameters(
    ('e4m3fn', 464, 0x7E),
    ('e4m3fn', 464.00003, 0x7F),
    ('e4m3fn', INF, 0x7F),
    ('e5m2', 61439.996, 0x7B),
    ('e5m2', 61440, 0x7C),
    ('e5m2', -INF, 0xFC),
    ('e4m3', 247.99998, 0x77),
    ('e4m3', 248, 0x78),
    ('e4m3fnuz', 248, 0x80),
    ('e4m3fnuz', -248, 0x80),
    ('e2m1', 7, 0x7),
    ('e2m1', -INF, 0xF),
    ('int4', 100, 0x7),
    ('int4', -100, 0x9),
  )
  def test_overflow_special(self, name, value, code):
    fmt = formats.get(name)
    self.assertEqual(oracle.encode(value, fmt, overflow='special'), code)

  @parameterized.parameters(
    ('e4m3fn', 0x7E), ('e5m2', 0x7B), ('e4m3fnuz', 0x7F), ('e2m1', 0x7),
    ('int4', 0x7), ('uint4', 0xF), ('nf4', 0xF), ('e8m0', 0xFE),
    ('ue5m3', 0xF7),
  )  # fmt: skip
  def test_overflow_saturate(self, name, code):
    for value in (1e30 if name != 'e8m0' else 3.4e38, INF):
      self.assertEqual(oracle.encode(value, formats.get(name)), code)

  def test_nan(self):
    self.assertEqual(oracle.encode(NAN, formats.e4m3fn), 0x7F)
    self.assertEqual(oracle.encode(NAN, formats.e5m2), 0x7E)
    self.assertEqual(oracle.encode(NAN, formats.e4m3fnuz), 0x80)
    self.assertEqual(oracle.encode(NAN, formats.e8m0), 0xFF)

  def test_negative_zero(self):
    self.assertEqual(oracle.encode(-0.0, formats.e4m3fn), 0x80)
    self.assertEqual(oracle.encode(Fraction(-1, 10**9), formats.e4m3fn), 0x80)
    self.assertEqual(oracle.encode(-0.0, formats.e4m3fnuz), 0)
    self.assertEqual(oracle.encode(-0.0, formats.int4), 0)

  def test_integers_are_symmetric(self):
    self.assertEqual(oracle.encode(-2, formats.mxint8.element), 0x81)
    self.assertEqual(oracle.encode(-8, formats.int4), 0x9)
    self.assertEqual(oracle.encode(-1, formats.uint4), 0)
    self.assertEqual(
      [oracle.encode(v, formats.int4) for v in (0.5, 1.5, 2.5, -0.5, -1.5)],
      [0, 2, 2, 0, 14],
    )

  def test_toward_zero(self):
    for value, code in ((5.99, 6), (-5.99, 14), (0.49, 0), (100, 7)):
      self.assertEqual(
        oracle.encode(value, formats.e2m1, 'toward_zero'), code, value
      )

  def test_stochastic_rounds_up_for_its_share_of_the_integers(self):
    # 2.25 lies a quarter of the way from 2 (code 4) to 3 (code 5).
    codes = [
      oracle.encode(2.25, formats.e2m1, 'stochastic', random=j, random_bits=4)
      for j in range(16)
    ]
    self.assertEqual(codes, [5] * 4 + [4] * 12)

  def test_stochastic_never_moves_a_representable_value(self):
    for code, value in enumerate(oracle.values(formats.e2m1)):
      for j in (0, 2**23 - 1):
        self.assertEqual(
          oracle.encode(value, formats.e2m1, 'stochastic', random=j), code
        )

  def test_stochastic_refuses_a_wide_integer(self):
    with self.assertRaisesRegex(ValueError, 'random=16'):
      oracle.encode(1, formats.e2m1, 'stochastic', random=16, random_bits=4)

  @parameterized.parameters('nearest', 'up')
  def test_refuses_unknown_names(self, name):
    with self.assertRaisesRegex(ValueError, name):
      oracle.encode(1, formats.e2m1, name)
    with self.assertRaisesRegex(ValueError, name):
      oracle.encode(1, formats.e2m1, overflow=name)

  def test_codebook_takes_the_nearest_entry(self):
    table = formats.nf4.table
    self.assertEqual(oracle.encode(0.03, formats.nf4), 7)
    self.assertEqual(oracle.encode(0.04, formats.nf4), 8)
    self.assertEqual(oracle.encode(-5, formats.nf4), 0)
    for code, entry in enumerate(table):
      self.assertEqual(oracle.encode(entry, formats.nf4), code)


class Float32Test(parameterized.TestCase):
  @parameterized.parameters(
    0.0, -0.0, 1.0, 1 / 3, -0.1, 3.4e38, 1.17e-38 * 2, 2.0**-126, 16777217.0,
    16777219.0, 1 + 2.0**-24, 1 + 3 * 2.0**-24,
  )  # fmt: skip
  def test_rounds_like_the_machine(self, value):
    machine = struct.unpack('<f', struct.pack('<f', value))[0]
    self.assertTrue(same(oracle.to_float32(value), machine))
    exact = Fraction(value) if value else value
    self.assertTrue(same(oracle.to_float32(exact), machine))

  def test_overflow_and_flush(self):
    self.assertEqual(oracle.to_float32(Fraction(10) ** 39), INF)
    self.assertTrue(same(oracle.to_float32(-1e-40), -0.0))
    self.assertEqual(oracle.to_float32(2.0**-126), 2.0**-126)

  def test_float32_bits(self):
    self.assertEqual(oracle.float32_bits(1.0), 0x3F800000)
    self.assertEqual(oracle.float32_bits(-6.0), 0xC0C00000)

  def test_products_and_reciprocals(self):
    third = oracle.reciprocal(3.0)
    self.assertEqual(oracle.float32_bits(third), 0x3EAAAAAB)
    self.assertEqual(oracle.multiply(third, 3.0), 1.0)
    self.assertEqual(oracle.multiply(2.0**-100, 2.0**-100), 0.0)
    self.assertTrue(same(oracle.multiply(-0.0, 2.0), -0.0))
    self.assertEqual(oracle.reciprocal(-0.0), -INF)

  def test_the_inverse_of_a_scale_is_never_flushed(self):
    self.assertEqual(oracle.inverse_scale(0.0), 0.0)
    self.assertEqual(oracle.inverse_scale(3.0), oracle.reciprocal(3.0))
    self.assertEqual(oracle.inverse_scale(2.0**127), 2.0**-127)


class SharedExponentTest(parameterized.TestCase):
  def test_rceil_is_the_smallest_scale_that_fits(self):
    for name in ('mxfp4', 'mxfp8_e4m3', 'mxfp6_e2m3', 'mxint8', 'mxint4'):
      element = formats.get(name).element
      largest = Fraction(element.max)
      for amax in (1.0, 1.99, 5.0, 6.5, 7.0, 7.000000477, 1e-20, 3e38):
        k = oracle.shared_exponent(amax, element, 'rceil')
        self.assertLessEqual(Fraction(amax), largest * Fraction(2) ** k)
        self.assertGreater(Fraction(amax), largest * Fraction(2) ** (k - 1))

  def test_rceil_equals_the_rule_on_the_float32_quotient(self):
    # The definition of cuBLAS: ceil(log2(float32(amax / max))).
    for name in ('mxfp4', 'mxfp8_e4m3', 'mxfp8_e5m2', 'mxint8', 'mxint4'):
      element = formats.get(name).element
      bits = oracle.float32_bits(element.max)
      for step in range(-3, 4):
        amax = struct.unpack('<f', struct.pack('<I', bits + step))[0]
        quotient = oracle.to_float32(Fraction(amax) / Fraction(element.max))
        want = math.ceil(math.log2(quotient))
        self.assertEqual(
          oracle.shared_exponent(amax, element, 'rceil'), want, (name, step)
        )

  def test_round(self):
    e = formats.e2m1
    self.assertEqual(oracle.shared_exponent(6.0, e, 'round'), 0)
    self.assertEqual(oracle.shared_exponent(6 * 1.41421, e, 'round'), 0)
    self.assertEqual(oracle.shared_exponent(6 * 1.41422, e, 'round'), 1)
    self.assertEqual(oracle.shared_exponent(6 / 1.41422, e, 'round'), -1)

  def test_even_is_for_floats(self):
    with self.assertRaisesRegex(ValueError, 'int8f6'):
      oracle.shared_exponent(1.0, formats.mxint8.element, 'even')

  def test_unknown_rule(self):
    with self.assertRaisesRegex(ValueError, 'nearest'):
      oracle.shared_exponent(1.0, formats.e2m1, 'nearest')


class BlockTest(parameterized.TestCase):
  def test_bfp4_example(self):
    # Step 2^(floor(log2 1) - 2) = 1/4.
    fmt = formats.bfp(4, 32)
    block = oracle.quantize_block([1, -0.3, 0.06, 0.5], fmt)
    self.assertEqual(block.codes, (4, 15, 0, 2))
    self.assertEqual(
      oracle.dequantize_block(block, fmt), [1.0, -0.25, 0.0, 0.5]
    )

  def test_asymmetric_example(self):
    # [-1, .2, .5, 2] in 4 bits: s = .2 and z = 5; round(x / s) + z.
    fmt = formats.uint4_g32
    block = oracle.quantize_block([-1.0, 0.2, 0.5, 2.0], fmt)
    self.assertEqual(block.zero_point, 5)
    self.assertEqual(block.codes, (0, 6, 7, 15))
    self.assertAlmostEqual(block.scale, 0.2, places=7)

  def test_asymmetric_keeps_zero_exact(self):
    fmt = formats.uint4_g32
    for values in ([0.0, 3.0, 7.1], [-7.1, -3.0, 0.0]):
      block = oracle.quantize_block(values, fmt)
      back = oracle.dequantize_block(block, fmt)
      self.assertEqual(back[values.index(0.0)], 0.0)

  def test_symmetric_integers(self):
    block = oracle.quantize_block([7.0, -3.5, 1.0], formats.int4_g32)
    self.assertEqual(block.codes, (7, 12, 1))
    self.assertEqual(block.scale, 1.0)

  def test_nf4(self):
    block = oracle.quantize_block([2.0, -2.0, 0.0, 0.5], formats.nf4_g64)
    self.assertEqual(block.codes, (15, 0, 7, 10))
    self.assertEqual(block.scale, 2.0)

  def test_tensor_and_channel(self):
    values = [448.0, -1.0, 3.0]
    (block,) = oracle.quantize(values, formats.e4m3fn_tensor)
    self.assertEqual((block.scale, block.tensor_scale), (None, 1.0))
    self.assertEqual(block.codes, (0x7E, 0xB8, 0x44))
    (block,) = oracle.quantize(values, formats.e4m3fn_channel)
    self.assertEqual((block.scale, block.tensor_scale), (1.0, None))

  def test_rules_without_oracle_are_named(self):
    with self.assertRaisesRegex(ValueError, 'absmean'):
      oracle.quantize([1.0], formats.ternary_tensor)


if __name__ == '__main__':
  absltest.main()
