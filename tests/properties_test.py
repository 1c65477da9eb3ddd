"""Laws of quantization on generated arrays.

Let x' = dequantize(quantize(x)). Rounding to nearest has these round trips:

  * every format: x' quantized with the scales it has gives the same codes.
  * power-of-two scales by 'floor', or by 'even' for floats: quantize(x') ==
    quantize(x), codes and scales. The block maximum keeps the exponent that
    chose the scale.
  * 'ceil' and 'rceil': dequantize(quantize(x')) == x'. The maximum may have
    been rounded down to a number that a smaller scale holds, and a smaller
    scale holds whatever the larger one held in that range.
  * 'round', and scales that are floats: none of this. With 'round' a block may
    saturate, and then saturate again; float scales move by an ulp.

They hold where nothing is a subnormal float32, which counts as zero.
"""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

import lowbit_jax
from lowbit_jax import formats, numerics

SHAPE = (2, 96)
EXAMPLES = 6
FORMATS = ('mxfp8_e4m3', 'mxfp4', 'mxint4', 'nvfp4', 'int4_g32', 'uint4_g32')
EXPONENT_FORMATS = tuple(
  n for n in FORMATS if formats.get(n).has_exponent_scale
)
FLOOR_AND_EVEN = (('mxfp4', 'floor'),)
MORE_FLOOR_AND_EVEN = tuple(
  (n, r)
  for n in EXPONENT_FORMATS
  for r in ('floor', 'even')
  if r in numerics.scale_rules(formats.get(n)) and (n, r) not in FLOOR_AND_EVEN
)
# Scales that are powers of two, in two levels, and beside zero points.
SCALE_KINDS = ('mxfp4', 'nvfp4', 'uint4_g32')
TWO_KINDS = ('mxfp4', 'nvfp4')
OTHER_FORMATS = tuple(n for n in FORMATS if n not in SCALE_KINDS)
SYMMETRIC_FORMATS = tuple(n for n in FORMATS if not formats.get(n).zero_point)
SHAPES = (
  (0,), (37,), (2, 40), (3, 0), (0, 7), (2, 1, 33),
)  # fmt: skip
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

few_examples = hypothesis.settings(
  max_examples=EXAMPLES, deadline=None, derandomize=True
)


@st.composite
def arrays(draw, shape=SHAPE, octaves: int = 30) -> np.ndarray:
  """float32: wide or narrow, short or long mantissas, some zeros of each sign.

  Short mantissas fall on ties; a narrow spread makes neighbours alike.
  """
  random = np.random.RandomState(draw(st.integers(0, 2**31 - 1)))
  spread = draw(st.integers(0, octaves))
  mantissa_bits = draw(st.sampled_from((1, 2, 4, 23)))
  zeros = draw(st.sampled_from((0.0, 0.3)))
  fraction = random.randint(0, 2**mantissa_bits, shape)
  exponent = random.randint(-spread, spread + 1, shape)
  x = np.ldexp(1 + fraction / 2**mantissa_bits, exponent)
  x = np.where(random.random_sample(shape) < zeros, 0.0, x)
  return (x * random.choice((-1.0, 1.0), shape)).astype(np.float32)


@functools.cache
def round_trip_of(name: str, rule: str | None):
  """Compiled x -> (quantized, dequantized), shared by all tests."""
  fmt = formats.get(name)

  def there_and_back(x, tensor_scale):
    q = lowbit_jax.quantize(x, fmt, scale_rule=rule, tensor_scale=tensor_scale)
    return q, lowbit_jax.dequantize(q)

  return jax.jit(there_and_back)


def round_trip(x, name, rule=None, tensor_scale=None):
  """(quantized, dequantized as a NumPy array)."""
  rule = rule or formats.get(name).scale_rule
  q, back = round_trip_of(name, rule)(x, tensor_scale)
  return q, np.asarray(back)


def restore(x, name, rule=None, tensor_scale=None) -> np.ndarray:
  return round_trip(x, name, rule, tensor_scale)[1]


def assert_same_bits(got, want):
  np.testing.assert_array_equal(
    np.asarray(got).view(np.uint32), np.asarray(want).view(np.uint32)
  )


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters(*TWO_KINDS)
  def test_with_its_own_scales(self, name):
    self._with_its_own_scales(name)

  @parameterized.parameters(*(n for n in FORMATS if n not in TWO_KINDS))
  @pytest.mark.slow
  def test_with_its_own_scales_in_other_formats(self, name):
    self._with_its_own_scales(name)

  def _with_its_own_scales(self, name):
    @jax.jit
    def with_scales_of(q, x):
      return lowbit_jax.quantize_with(
        x,
        q.scale,
        q.fmt,
        tensor_scale=q.tensor_scale,
        zero_point=q.zero_point,
      )

    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      q, back = round_trip(x, name)
      again = with_scales_of(q, jnp.asarray(back))
      np.testing.assert_array_equal(again.codes, q.codes)

    law()

  @parameterized.parameters(*FLOOR_AND_EVEN)
  def test_codes(self, name, rule):
    self._codes(name, rule)

  @parameterized.parameters(*MORE_FLOOR_AND_EVEN)
  @pytest.mark.slow
  def test_codes_of_other_formats(self, name, rule):
    self._codes(name, rule)

  def _codes(self, name, rule):
    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      q, back = round_trip(x, name, rule)
      again, _ = round_trip(back, name, rule)
      np.testing.assert_array_equal(again.scale, q.scale)
      np.testing.assert_array_equal(again.codes, q.codes)

    law()

  @parameterized.parameters(('mxfp4', 'rceil'))
  def test_values(self, name, rule):
    self._values(name, rule)

  @parameterized.parameters(
    ('mxfp4', 'ceil'),
    *((n, r) for n in ('mxfp8_e4m3', 'mxint4') for r in ('ceil', 'rceil')),
  )
  @pytest.mark.slow
  def test_values_of_other_formats(self, name, rule):
    self._values(name, rule)

  def _values(self, name, rule):
    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      back = restore(x, name, rule)
      assert_same_bits(restore(back, name, rule), back)

    law()


class NumbersTest(parameterized.TestCase):
  @parameterized.parameters(*SCALE_KINDS)
  def test_order_is_kept_within_a_block(self, name):
    self._order_is_kept_within_a_block(name)

  @parameterized.parameters(*OTHER_FORMATS)
  @pytest.mark.slow
  def test_order_is_kept_within_a_block_in_other_formats(self, name):
    self._order_is_kept_within_a_block(name)

  def _order_is_kept_within_a_block(self, name):
    block = formats.get(name).block[0]

    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      back = restore(x, name).reshape(-1, block)
      x = x.reshape(-1, block)
      order = np.argsort(x, axis=1)
      steps = np.diff(np.take_along_axis(back, order, axis=1), axis=1)
      self.assertTrue(np.all(steps >= 0))

    law()

  @parameterized.parameters('mxfp4', 'nvfp4')
  def test_negation(self, name):
    self._negation(name)

  @parameterized.parameters(
    *(n for n in OTHER_FORMATS if n in SYMMETRIC_FORMATS)
  )
  @pytest.mark.slow
  def test_negation_in_other_formats(self, name):
    self._negation(name)

  def _negation(self, name):
    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      np.testing.assert_array_equal(restore(-x, name), -restore(x, name))

    law()

  @parameterized.parameters(*SCALE_KINDS)
  def test_powers_of_two_pass_through(self, name):
    self._powers_of_two_pass_through(name)

  @parameterized.parameters(*OTHER_FORMATS)
  @pytest.mark.slow
  def test_powers_of_two_pass_through_in_other_formats(self, name):
    self._powers_of_two_pass_through(name)

  def _powers_of_two_pass_through(self, name):
    @few_examples
    @hypothesis.given(arrays(octaves=20), st.integers(-40, 40))
    def law(x, k):
      factor = np.float32(2.0**k)
      assert_same_bits(restore(x * factor, name), restore(x, name) * factor)

    law()

  @parameterized.parameters('mxfp4', 'uint4_g32')
  def test_rows_do_not_see_each_other(self, name):
    self._rows_do_not_see_each_other(name)

  @parameterized.parameters('nvfp4', *OTHER_FORMATS)
  @pytest.mark.slow
  def test_rows_do_not_see_each_other_in_other_formats(self, name):
    self._rows_do_not_see_each_other(name)

  def _rows_do_not_see_each_other(self, name):
    # But for the scale of the whole tensor, which is given here.
    scale = jnp.float32(2.0**-3) if formats.get(name).tensor_scale else None

    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      swapped = restore(x[::-1], name, None, scale)
      got = np.ascontiguousarray(swapped[::-1])
      assert_same_bits(got, restore(x, name, None, scale))

    law()

  @parameterized.parameters(('nvfp4',))
  def test_fake_quant_is_the_round_trip(self, name):
    self._fake_quant_is_the_round_trip(name)

  @parameterized.parameters(*(n for n in FORMATS if n != 'nvfp4'))
  @pytest.mark.slow
  def test_fake_quant_is_the_round_trip_in_other_formats(self, name):
    self._fake_quant_is_the_round_trip(name)

  def _fake_quant_is_the_round_trip(self, name):
    fmt = formats.get(name)
    fake_quant = jax.jit(lambda x: lowbit_jax.fake_quant(x, fmt))

    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      assert_same_bits(fake_quant(jnp.asarray(x)), restore(x, name))

    law()

  @parameterized.parameters(('mxfp4',))
  def test_rceil_errs_by_at_most_half_a_step(self, name):
    self._rceil_errs_by_at_most_half_a_step(name)

  @parameterized.parameters(*(n for n in EXPONENT_FORMATS if n != 'mxfp4'))
  @pytest.mark.slow
  def test_rceil_errs_by_at_most_half_a_step_in_other_formats(self, name):
    self._rceil_errs_by_at_most_half_a_step(name)

  def _rceil_errs_by_at_most_half_a_step(self, name):
    fmt = formats.get(name)
    values = fmt.element.values()
    values = np.unique(values[np.isfinite(values)])
    gap = np.max(np.diff(values[values >= 0]))

    @few_examples
    @hypothesis.given(arrays())
    def law(x):
      q, back = round_trip(x, name, 'rceil')
      scale = np.exp2(np.asarray(q.scale, np.float64) - 127)
      bound = np.repeat(scale, fmt.block[0], axis=-1) * gap / 2
      error = np.abs(x.astype(np.float64) - back)
      self.assertTrue(np.all(error <= bound))

    law()


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('nvfp4', (37,), 0, jnp.bfloat16),
    ('int8_channel', (0, 7), 1, jnp.float32),
    ('int8_channel', (2, 1, 33), 2, jnp.float16),
  )
  def test_shape_axis_and_dtype(self, name, shape, axis, dtype):
    self._shape_axis_and_dtype(name, shape, axis, dtype)

  @parameterized.parameters(
    ('int3_g32', (2, 1, 33), 1, jnp.float32),
    ('int8_channel', (0,), 0, jnp.float32),
    ('mxfp4', (2, 40), 1, jnp.float16),
    ('int3_g32', (3, 0), 0, jnp.bfloat16),
    ('nvfp4', (0, 7), 1, jnp.float32),
  )
  @pytest.mark.slow
  def test_more_shapes_axes_and_dtypes(self, name, shape, axis, dtype):
    self._shape_axis_and_dtype(name, shape, axis, dtype)

  @parameterized.parameters('mxfp4', 'int3_g32', 'nvfp4', 'int8_channel')
  @pytest.mark.slow
  def test_any_shape_axis_and_dtype(self, name):
    @few_examples
    @hypothesis.given(
      st.sampled_from(SHAPES), st.integers(0, 2), st.sampled_from(DTYPES)
    )
    def law(shape, axis, dtype):
      self._shape_axis_and_dtype(name, shape, axis % len(shape), dtype)

    law()

  def _shape_axis_and_dtype(self, name, shape, axis, dtype):
    fmt = formats.get(name)
    x = np.linspace(-3, 4, math.prod(shape)).reshape(shape).astype(dtype)

    @jax.jit
    def there_and_back(x):
      q = lowbit_jax.quantize(x, fmt, axis=axis)
      return q, lowbit_jax.dequantize(q)

    q, back = there_and_back(x)
    self.assertEqual((q.shape, back.shape), (shape, shape))
    self.assertEqual((q.dtype, back.dtype), (dtype, dtype))
    self.assertEqual(q.axis, axis - len(shape))
    error = np.abs(np.float64(x) - np.float64(back))
    self.assertTrue(np.all(error <= 1.0))  # saturation is 1 - 6 / 8

  @pytest.mark.slow
  def test_tiles(self):
    shapes = tuple(s for s in SHAPES if len(s) > 1)

    @few_examples
    @hypothesis.given(st.sampled_from(shapes))
    def law(shape):
      x = np.linspace(-3, 4, math.prod(shape), dtype=np.float32)
      q, back = round_trip(x.reshape(shape), 'mxfp4_32x32')
      self.assertEqual((q.shape, back.shape), (shape, shape))

    law()


if __name__ == '__main__':
  absltest.main()
