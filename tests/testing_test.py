"""The installed test suites: they pass what is right and reject mutants."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, testing
from lowbit_jax.testing import _blocks

KEYS = tuple(jax.random.split(jax.random.key(5), 2))
SHAPES = tuple(
  testing.SHAPES[name]
  for name in ('two_blocks', 'ragged_everything', 'no_rows', 'no_contraction')
)

# The first case that shows a fault, where that is not the first of all.
SEEN_BY = {
  'lost_negative_zero': 'boundaries',
  'nan_to_zero': 'nan',
  'spread_poison': 'nan',
}
# A test of its own shows the bias of one random bit.
BIASED = ('nearest', 'toward_zero', 'one_random_bit')


dot = jax.jit(lowbit_jax.dot)


def quantizer(fmt, **kwargs):
  return lambda x: lowbit_jax.quantize(x, fmt, **kwargs)


def padded(f, fmt):
  """`f` compiled for one shape, which holds each of the cases of `fmt`.

  Zeros in blocks of their own, or at the end of one, change no other number,
  and narrow dtypes are exact in float32.
  """
  sizes = [x.shape for x in testing.quantizer_cases(fmt).values()]
  blocks = fmt.block if fmt.is_tile else (1, fmt.block[0] or 1)
  size = np.max(sizes, axis=0)
  size += -size % np.array(blocks)
  compiled = jax.jit(f)

  def call(x):
    m, n = x.shape
    whole = np.zeros(size, np.float32)
    whole[:m, :n] = np.asarray(x)
    return np.asarray(compiled(whole))[:m, :n].astype(x.dtype)

  return call


def stochastic(x, key, fmt):
  return lowbit_jax.quantize(x, fmt, rounding='stochastic', key=key)


def cases(mutants, *names):
  """(format, mutant) of all mutants of the formats."""
  return [
    (name, mutant) for name in names for mutant in mutants(formats.get(name))
  ]


class AssertsTest(parameterized.TestCase):
  def test_equal_bits(self):
    for dtype in (
      np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
      np.int8, ml_dtypes.int4, np.uint8, np.float64, np.bool_,
    ):  # fmt: skip
      x = np.arange(6).reshape(2, 3).astype(dtype)
      testing.assert_bits_equal(x, x.copy())
      testing.assert_bits_equal(x[:, :0], x[:, :0])
      y = x.copy()
      y[1, 2] = 0
      with self.assertRaisesRegex(AssertionError, r'1 of 6 .* \(1, 2\)'):
        testing.assert_bits_equal(x, y)

  def test_message(self):
    a = np.float32([[0, 1], [2, 3]])
    b = np.float32([[-0.0, 1], [2, 4]])
    with self.assertRaises(AssertionError) as caught:
      testing.assert_bits_equal(a, b, 'layer')
    self.assertEqual(
      str(caught.exception),
      'layer: 2 of 4 differ, first at (0, 0): 0x00000000 (0.0), want 0x80000000'
      ' (-0.0)',
    )

  def test_scalars_and_views(self):
    testing.assert_bits_equal(np.float32(1), np.float32(1))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    testing.assert_bits_equal(x.T, np.ascontiguousarray(x.T))

  def test_nan(self):
    quiet = np.uint32([0x7FC00000]).view(np.float32)
    other = np.uint32([0x7FC00001]).view(np.float32)
    testing.assert_bits_equal(quiet, quiet)
    testing.assert_bits_equal(quiet, other, any_nan=True)
    with self.assertRaises(AssertionError):
      testing.assert_bits_equal(quiet, other)
    with self.assertRaises(AssertionError):
      testing.assert_bits_equal(quiet, np.float32([1]), any_nan=True)

  def test_shape_and_dtype(self):
    with self.assertRaisesRegex(AssertionError, 'shape'):
      testing.assert_bits_equal(np.zeros(2), np.zeros((2, 1)))
    with self.assertRaisesRegex(AssertionError, 'dtype is float16'):
      testing.assert_bits_equal(np.zeros(2, np.float16), np.zeros(2))

  def test_qarrays(self):
    x = np.ones((4, 64), np.float32)
    q = quantizer(formats.nvfp4)(x)
    testing.assert_bits_equal(q, quantizer(formats.nvfp4)(x))
    with self.assertRaisesRegex(AssertionError, 'tensor_scale: 1 of 1 differ'):
      testing.assert_bits_equal(q, quantizer(formats.nvfp4)(2 * x))
    other = jax.eval_shape(quantizer(formats.mxfp4), x)
    with self.assertRaisesRegex(AssertionError, 'fmt is nvfp4, want mxfp4'):
      testing.assert_bits_equal(q, other)
    with self.assertRaisesRegex(AssertionError, 'a QArray'):
      testing.assert_bits_equal(x, q)

  def test_trees(self):
    q = quantizer(formats.nvfp4)(np.ones((4, 64), np.float32))
    other = quantizer(formats.mxfp4)(np.ones((4, 64), np.float32))
    tree = {'b': np.zeros(2), 'w': [q]}
    equal = testing.assert_trees_bits_equal
    equal(tree, tree)
    for message, want in (
      (r"m\['b'\]: 1 of 2 differ", {'b': np.array([0, -0.0]), 'w': [q]}),
      (r"\['b'\]: shape", {'b': np.zeros((2, 1)), 'w': [q]}),
      (r"\['w'\]\[0\]: fmt is nvfp4, want mxfp4", tree | {'w': [other]}),
      ('structs', tree | {'w': (q,)}),
      ('structs', {'w': [q]}),
    ):
      with self.assertRaisesRegex(AssertionError, message):
        equal(tree, want, 'm')

  def test_ulp(self):
    a = np.float32([1, 2, np.nan, 0])
    b = a.copy()
    b[1] = np.nextafter(np.nextafter(a[1], np.inf), np.inf)
    testing.assert_within_ulp(a, b, 2)
    with self.assertRaisesRegex(
      AssertionError, r'1 of 4 .* more than 1 ulp, first at \(1,\).* 2 ulp'
    ):
      testing.assert_within_ulp(a, b, 1)
    b[2] = 0
    with self.assertRaisesRegex(AssertionError, r'worst at \(2,\).* inf ulp'):
      testing.assert_within_ulp(a, b, 2)


class QuantizerSuiteTest(parameterized.TestCase):
  def test_own_quantizer_passes(self):
    fmt = formats.get('uint2_g32')
    testing.check_quantizer(quantizer(fmt), fmt)

  @parameterized.parameters(
    'nvfp4',
    'mxfp4',
    'int8_channel',
    'uint4_g32',
    'e4m3fn_tensor',
    'nvfp4_16x16',
  )
  @pytest.mark.slow
  def test_own_quantizer_passes_in_more_formats(self, name):
    fmt = formats.get(name)
    testing.check_quantizer(quantizer(fmt), fmt)

  def test_values_pass(self):
    fmt = formats.mxfp4

    fake = padded(
      lambda x: lowbit_jax.fake_quant(x, fmt, scale_rule='rceil'), fmt
    )
    testing.check_quantizer(fake, fmt, scale_rule='rceil')
    with self.assertRaisesRegex(AssertionError, 'mxfp4 floor .* values'):
      testing.check_quantizer(fake, fmt)

  @parameterized.parameters('e2m1_tensor', 'mxfp4_4x8')
  def test_values_of_other_layouts_pass(self, name):
    fmt = {
      'e2m1_tensor': formats.per_tensor(formats.e2m1),
      'mxfp4_4x8': dataclasses.replace(
        formats.get('mxfp4_32x32'), name='mxfp4_4x8', block=(4, 8)
      ),
    }[name]
    fake = padded(
      lambda x: lowbit_jax.dequantize(lowbit_jax.quantize(x, fmt)), fmt
    )
    testing.check_quantizer(fake, fmt)
    with self.assertRaisesRegex(AssertionError, 'blocks values'):
      testing.check_quantizer(lambda x: fake(x) * x.dtype.type(2), fmt)

  def assert_rule_is_that_of_quantize(self, fmt, rule):
    run = quantizer(fmt, scale_rule=rule)
    testing.check_quantizer(run, fmt, scale_rule=rule)
    with self.assertRaisesRegex(AssertionError, f'{rule} blocks'):
      testing.check_quantizer(quantizer(fmt), fmt, scale_rule=rule)

  def test_rules_without_oracle(self):
    fmt = formats.get('int8_channel')
    few = {
      name: testing.quantizer_cases(fmt)[name] for name in ('blocks', 'nan')
    }
    with mock.patch.object(_blocks, 'quantizer_cases', return_value=few):
      self.assert_rule_is_that_of_quantize(fmt, 'absmean')

  @pytest.mark.slow
  def test_rules_without_oracle_in_all_cases(self):
    self.assert_rule_is_that_of_quantize(formats.get('int8_channel'), 'absmean')

  @pytest.mark.slow
  def test_four_over_six(self):
    self.assert_rule_is_that_of_quantize(formats.nvfp4, 'four_over_six')

  def test_wrong_format_or_layout(self):
    fmt = formats.mxfp4
    other = quantizer(formats.get('bfp4_g32'))
    with self.assertRaisesRegex(AssertionError, 'want mxfp4'):
      testing.check_quantizer(lambda x: jax.eval_shape(other, x), fmt)
    with self.assertRaises(AssertionError):
      testing.check_quantizer(quantizer(fmt, axis=-2), fmt)

  @parameterized.parameters(*cases(testing.quantizer_mutants, 'nvfp4'))
  def test_mutants_are_rejected(self, name, mutant):
    self._mutant_is_rejected(name, mutant)

  @parameterized.parameters(*cases(testing.quantizer_mutants, 'mxfp4'))
  @pytest.mark.slow
  def test_mutants_of_exponent_scales_are_rejected(self, name, mutant):
    self._mutant_is_rejected(name, mutant)

  def _mutant_is_rejected(self, name, mutant):
    fmt = formats.get(name)
    fault = testing.quantizer_mutants(fmt)[mutant]
    # What is wrong for some numbers only passes where there are none.
    case = SEEN_BY.get(mutant, '.*')
    with self.assertRaisesRegex(
      AssertionError, f'^{fmt} {fmt.scale_rule} {case} '
    ):
      testing.check_quantizer(fault, fmt)

  def test_mutants_cover_the_named_faults(self):
    self.assertContainsSubset(
      {
        'toward_zero', 'ties_away', 'swapped_nibbles', 'dropped_tensor_scale',
        'wrong_group', 'nan_to_zero', 'lost_negative_zero',
      },
      testing.quantizer_mutants(formats.nvfp4),
    )  # fmt: skip

  @parameterized.parameters(*formats.names('block'))
  def test_cases_are_float32_and_poisoned_only_where_named(self, name):
    fmt = formats.get(name)
    if fmt.is_tile and fmt.block[0] > 32:
      self.skipTest('large tiles are slow to build')
    for case, x in testing.quantizer_cases(fmt).items():
      self.assertEqual((x.dtype, x.ndim), (np.dtype(np.float32), 2))
      self.assertEqual(np.isfinite(x).all(), case not in ('nan', 'inf'))
    edges = testing.quantizer_cases(fmt)['edges']
    self.assertTrue(np.signbit(edges[edges == 0]).any())

  def test_unknown_arguments(self):
    with self.assertRaisesRegex(TypeError, 'per_tensor'):
      testing.check_quantizer(lambda x: x, formats.e2m1)
    with self.assertRaisesRegex(ValueError, 'floor'):
      testing.check_quantizer(lambda x: x, formats.mxfp4, scale_rule='absmax')


class StochasticSuiteTest(parameterized.TestCase):
  def test_own_rounding_passes(self):
    self._own_rounding_passes('nvfp4_16x16')

  @parameterized.parameters(
    'nvfp4', 'uint4_g32', 'nf4_g64', 'uint4_g32_min_float16', 'q6_k', 'iq4_nl'
  )
  @pytest.mark.slow
  def test_own_rounding_passes_in_more_formats(self, name):
    self._own_rounding_passes(name)

  def _own_rounding_passes(self, name):
    fmt = formats.get(name)
    run = jax.jit(lambda x, key: stochastic(x, key, fmt))
    rows = 512 if fmt.is_tile else 4096
    testing.check_stochastic(run, fmt, keys=KEYS, rows=rows)

  def test_few_random_bits_need_to_be_declared(self):
    fmt = formats.nvfp4
    run = jax.jit(testing.stochastic_mutants(fmt)['one_random_bit'])
    testing.check_stochastic(run, fmt, keys=KEYS, random_bits=1)
    with self.assertRaisesRegex(AssertionError, 'biased'):
      testing.check_stochastic(run, fmt, keys=KEYS)

  @parameterized.parameters(
    *(m for m in testing.stochastic_mutants(formats.nvfp4) if m not in BIASED)
  )
  def test_mutants_are_rejected(self, mutant):
    self._mutant_is_rejected(mutant)

  @parameterized.parameters(*BIASED)
  @pytest.mark.slow
  def test_biased_mutants_are_rejected(self, mutant):
    self._mutant_is_rejected(mutant)

  def _mutant_is_rejected(self, mutant):
    fmt = formats.nvfp4
    fault = testing.stochastic_mutants(fmt)[mutant]
    if mutant != 'fresh_noise_each_call':
      fault = jax.jit(fault)
    expected = {
      'ignored_key': 'two keys gave the same result',
      'fresh_noise_each_call': 'one key gave two results',
      'one_random_bit': 'biased',
      'shared_columns': 'the noise is shared',
    }
    message = expected.get(mutant, 'stochastic')
    with self.assertRaisesRegex(AssertionError, message):
      testing.check_stochastic(fault, fmt, keys=KEYS)

  def test_values_off_the_grid(self):
    fmt = formats.mxfp4

    def noisy(x, key):
      seed = np.asarray(jax.random.key_data(key))
      noise = np.random.RandomState(seed).uniform(size=x.shape)
      return np.asarray(x) + noise.astype(np.float32)

    with self.assertRaisesRegex(AssertionError, 'not one of its neighbours'):
      testing.check_stochastic(noisy, fmt, keys=KEYS)


class DotSuiteTest(parameterized.TestCase):
  def test_own_product_passes(self):
    testing.check_dot(dot, formats.nvfp4, shapes=SHAPES[:2])

  @parameterized.parameters('nvfp4', 'uint4_g32', 'nvfp4_16x16')
  @pytest.mark.slow
  def test_own_product_passes_in_more_formats(self, name):
    testing.check_dot(dot, formats.get(name), shapes=SHAPES)

  @parameterized.parameters('e4m3fn_tensor', 'mxfp8_e4m3')
  @pytest.mark.slow
  def test_all_small_shapes(self, name):
    testing.check_dot(dot, formats.get(name))

  def test_quantized_activations(self):
    fmt = formats.int8_channel
    testing.check_dot(dot, fmt, lhs_fmt=fmt, shapes=SHAPES[:1])

  def test_rounded_operands_need_to_be_declared(self):
    fmt = formats.nvfp4
    run = jax.jit(testing.dot_mutants(fmt)['bfloat16_operands'])
    testing.check_dot(run, fmt, shapes=SHAPES[:1], operand_unit=2.0**-8)
    with self.assertRaises(AssertionError):
      testing.check_dot(run, fmt, shapes=SHAPES[:1])

  def test_narrow_results(self):
    fmt = formats.nvfp4

    @jax.jit
    def run(x, q):
      return lowbit_jax.dot(x, q, preferred_element_type=jnp.bfloat16)

    testing.check_dot(run, fmt, shapes=SHAPES[:1])

  @parameterized.parameters(*cases(testing.dot_mutants, 'nvfp4'))
  def test_mutants_are_rejected(self, name, mutant):
    self._mutant_is_rejected(name, mutant)

  @parameterized.parameters(*cases(testing.dot_mutants, 'int8_channel'))
  @pytest.mark.slow
  def test_mutants_of_whole_axes_are_rejected(self, name, mutant):
    self._mutant_is_rejected(name, mutant)

  def _mutant_is_rejected(self, name, mutant):
    fmt = formats.get(name)
    fault = jax.jit(testing.dot_mutants(fmt)[mutant])
    with self.assertRaisesRegex(AssertionError, f'^{name} two_blocks'):
      testing.check_dot(fault, fmt, shapes=SHAPES[:1])

  def test_one_lost_term_is_seen_at_large_k(self):
    # The tolerance grows with sqrt(k), a lost term does not shrink.
    fmt = formats.int8_channel
    shape = testing.MatmulShape('long', 2, 4096, 8)
    fault = jax.jit(testing.dot_mutants(fmt)['last_row_forgotten'])
    testing.check_dot(dot, fmt, shapes=[shape])
    with self.assertRaises(AssertionError):
      testing.check_dot(fault, fmt, shapes=[shape])

  def test_tolerance(self):
    a, b = np.ones((1, 4)), -np.ones((4, 1))
    self.assertEqual(testing.dot_tolerance(a, b)[0, 0], 10 * 4 * 2.0**-24)
    a, b = np.ones((1, 400)), np.ones((400, 1))
    self.assertEqual(testing.dot_tolerance(a, b)[0, 0], 166 * 400 * 2.0**-24)

  def test_message(self):
    def off(x, q):
      return np.asarray(dot(x, q)) + np.float32(1)

    with self.assertRaisesRegex(
      AssertionError, r'two_blocks random \(3x256x16\): 48 of 48 .* \(0, 0\)'
    ):
      testing.check_dot(off, formats.nvfp4, shapes=SHAPES[:1])


class ShapesTest(absltest.TestCase):
  def test_names_are_unique(self):
    shapes = (*testing.SMALL_SHAPES, *testing.LARGE_SHAPES)
    self.assertLen(testing.SHAPES, len(shapes))
    for shape in shapes:
      self.assertIs(testing.SHAPES[shape.name], shape)

  def test_what_small_shapes_must_hold(self):
    shapes = testing.dot_cases()
    self.assertTrue(any(s.k % 16 and s.k > 16 for s in shapes))
    for axis in ('m', 'k', 'n'):
      self.assertTrue(any(getattr(s, axis) == 0 for s in shapes), axis)
      self.assertTrue(any(getattr(s, axis) == 1 for s in shapes), axis)
    self.assertLess(max(s.flops for s in shapes), 1e6)

  def test_large_shapes(self):
    large = testing.dot_cases(large=True)
    self.assertEqual(large, testing.LARGE_SHAPES)
    few = testing.dot_cases(large=True, max_elements=1 << 22)
    self.assertLess(0, len(few))
    self.assertLess(len(few), len(large))
    self.assertTrue(any(s.k % 128 for s in large))


if __name__ == '__main__':
  absltest.main()
