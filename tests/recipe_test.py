"""QuantSpec: validation, equality, hashing."""

from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.ops import _fake_quant
from lowbit_jax.recipe import BACKWARDS, QuantSpec


class QuantSpecTest(parameterized.TestCase):
  def test_default_rule_is_that_of_the_format(self):
    self.assertEqual(QuantSpec(formats.mxfp4).scale_rule, 'floor')
    self.assertEqual(
      QuantSpec(formats.mxfp4), QuantSpec(formats.mxfp4, scale_rule='floor')
    )

  def test_formats_with_other_default_rules_make_other_specs(self):
    a = formats.per_tensor(formats.int2)
    b = formats.per_tensor(formats.int2, scale_rule='absmean')
    self.assertNotEqual(a, b)  # else jit would compile one for both
    self.assertNotEqual(QuantSpec(a), QuantSpec(b))
    self.assertLen({QuantSpec(a), QuantSpec(b), QuantSpec(a)}, 2)

  @parameterized.parameters(
    ({'scale_rule': 'nearest'}, "scale_rule='nearest' .* floor, ceil"),
    ({'rounding': 'up'}, "rounding='up' is not one of .*'stochastic'"),
    ({'backward': 'lsq'}, "backward='lsq' is not one of .*'clipped'"),
  )
  def test_unknown_values(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      QuantSpec(formats.mxfp4, **kwargs)

  def test_not_a_block_format(self):
    with self.assertRaisesRegex(TypeError, 'fmt=.*block format'):
      QuantSpec('mxfp4')
    with self.assertRaisesRegex(TypeError, 'block format'):
      QuantSpec(formats.e2m1)

  def test_needs_key(self):
    self.assertFalse(QuantSpec(formats.mxfp4).needs_key)
    self.assertTrue(QuantSpec(formats.mxfp4, rounding='stochastic').needs_key)
    self.assertTrue(
      QuantSpec(formats.int8_channel, rounding='dithered').needs_key
    )

  def test_backwards_are_those_of_fake_quant(self):
    self.assertEqual(BACKWARDS, _fake_quant.BACKWARDS)


if __name__ == '__main__':
  absltest.main()
