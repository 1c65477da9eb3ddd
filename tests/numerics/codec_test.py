"""encode, decode and round_to where the conformance test does not look.

That test proves rounding to nearest at every code point and boundary; here are
dtypes, shapes and the relations between the functions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, numerics

# A signed float and one without a sign, an integer, and a table.
ELEMENTS = ('e4m3fn', 'e8m0', 'int8', 'nf4')
OTHER_ELEMENTS = (
  'e5m2', 'e4m3fnuz', 'e2m1', 'uint4', 'e4m3', 'e3m4', 'e5m2fnuz',
  'e4m3b11fnuz', 'e2m3', 'e3m2', 'e1m2', 'e3m0', 'e4m0', 'ue4m3', 'ue5m3',
  'int4', 'int3', 'int2', 'uint8', 'ternary',
)  # fmt: skip
ROUNDINGS = ('nearest_even', 'toward_zero', 'stochastic')
SIZE = 256


@functools.partial(jax.jit, static_argnames=('element', 'rounding', 'overflow'))
def encode(x, element, **kwargs):
  return numerics.encode(x, element, **kwargs)


@functools.partial(jax.jit, static_argnames=('element', 'dtype'))
def decode(codes, element, dtype=jnp.float32):
  return numerics.decode(codes, element, dtype)


@functools.partial(jax.jit, static_argnames='element')
def _round_trips(x, element):
  out = {}
  for rounding in ROUNDINGS:
    key = jax.random.key(0) if rounding == 'stochastic' else None
    codes = numerics.encode(x, element, rounding=rounding, key=key)
    out[rounding] = codes, numerics.decode(codes, element)
  return out


def round_trips(x, element):
  """(rounding, codes, decoded) of every rounding; all sizes are compiled
  once."""
  out = _round_trips(np.resize(x, SIZE), element)
  for rounding, (codes, back) in jax.tree.map(np.asarray, out).items():
    yield rounding, codes[: x.size], back[: x.size]


def finite(element) -> np.ndarray:
  """Finite values that encoding produces, ascending, as float32."""
  values = element.values()
  values = np.unique(values[np.isfinite(values)])
  values = values[np.abs(values) <= element.max]
  return values.astype(np.float32)


class CodecTest(parameterized.TestCase):
  @parameterized.parameters(*ELEMENTS)
  def test_beyond_the_range(self, name):
    self._beyond_the_range(name)

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_beyond_the_range_of_other_elements(self, name):
    self._beyond_the_range(name)

  def _beyond_the_range(self, name):
    element = formats.get(name)
    grid = finite(element)
    x = np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)
    for rounding, _, got in round_trips(x, element):
      if rounding == 'stochastic':
        continue
      want = [grid[-1], grid[0], grid[-1], grid[0]]
      if name == 'e8m0':
        got, want = got[:1], want[:1]
      np.testing.assert_array_equal(got, want, rounding)

  @parameterized.parameters(*ELEMENTS)
  def test_codes_of_values_under_every_rounding(self, name):
    self._codes_of_values(name)

  @parameterized.parameters(*OTHER_ELEMENTS)
  @pytest.mark.slow
  def test_codes_of_values_of_other_elements(self, name):
    self._codes_of_values(name)

  def _codes_of_values(self, name):
    element = formats.get(name)
    x = finite(element)
    x = x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)]
    for rounding, codes, back in round_trips(x, element):
      self.assertEqual(codes.dtype, jnp.uint8)
      self.assertLess(int(np.max(codes)), 2**element.bits)
      np.testing.assert_array_equal(back, x, rounding)

  @parameterized.parameters(('e2m1', jnp.bfloat16), ('int4', jnp.float16))
  def test_round_to_keeps_the_dtype_and_the_value(self, name, dtype):
    self._round_to_keeps_the_dtype_and_the_value(name, dtype)

  @parameterized.parameters(
    ('e4m3fn', jnp.float16), ('e4m3fn', jnp.bfloat16), ('e2m1', jnp.float16),
    ('int4', jnp.bfloat16), ('nf4', jnp.float16), ('nf4', jnp.bfloat16),
  )  # fmt: skip
  @pytest.mark.slow
  def test_round_to_keeps_the_other_dtype(self, name, dtype):
    self._round_to_keeps_the_dtype_and_the_value(name, dtype)

  def _round_to_keeps_the_dtype_and_the_value(self, name, dtype):
    element = formats.get(name)
    x = np.linspace(-1.2, 1.2, 301, dtype=np.float32) * np.float32(element.max)
    x = x.astype(dtype)

    @jax.jit
    def round_to(x, wide):
      codes = numerics.encode(x, element)
      return (
        numerics.round_to(x, element),
        numerics.round_to(wide, element),
        numerics.decode(codes, element, dtype),
      )

    got, wide, back = round_to(x, x.astype(np.float32))
    self.assertEqual(got.dtype, dtype)
    np.testing.assert_array_equal(got, np.asarray(wide).astype(dtype))
    np.testing.assert_array_equal(back, got)

  def test_round_to_keeps_nan(self):
    x = np.array([np.nan, 1, -np.nan], np.float32)
    elements = [formats.get(n) for n in ('e2m1', 'e4m3fn', 'int4', 'nf4')]

    @jax.jit
    def round_to(x):
      return [numerics.round_to(x, element) for element in elements]

    for y in round_to(x):
      np.testing.assert_array_equal(np.isnan(y), [True, False, True])

  def test_round_to_dithered_is_subtractive(self):
    element, key = formats.get('int8'), jax.random.key(0)
    x = np.full(4096, 3.3, np.float32)
    y = np.asarray(
      jax.jit(
        lambda x: numerics.round_to(x, element, rounding='dithered', key=key)
      )(x)
    )
    error = y - x
    self.assertLessEqual(np.abs(error).max(), 0.5 + 1e-5)
    # Uniform errors: standard deviation 1 / sqrt(12).
    self.assertAlmostEqual(error.std(), 12**-0.5, delta=0.01)
    self.assertGreater(np.unique(y).size, 1000)

  def test_the_derivative_of_round_to_is_zero(self):
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    total = lambda x: jnp.sum(numerics.round_to(x, formats.e2m1))
    grad = jax.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(grad, 0)

  def test_shapes_and_scalars(self):
    element = formats.e2m1
    round_to = jax.jit(lambda x: numerics.round_to(x, element))
    scalars = jax.eval_shape(lambda: numerics.round_to(2.7, element))
    self.assertEqual(scalars.shape, ())
    self.assertEqual(float(round_to(np.float32(2.7))), 3)
    self.assertEqual(int(encode(np.float32(-0.0), element)), 8)
    self.assertEqual(
      encode(np.zeros((0, 3), np.float32), element).shape, (0, 3)
    )
    minus_half = jax.jit(lambda: numerics.decode(9, element))()
    self.assertEqual(float(minus_half), -0.5)
    ones = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(jax.vmap(round_to)(ones), ones)

  @parameterized.parameters(jnp.uint8, jnp.int32, jnp.int8, jnp.uint32)
  def test_codes_of_any_integer_dtype(self, dtype):
    codes = np.arange(16, dtype=dtype)
    np.testing.assert_array_equal(
      decode(codes, formats.e2m1), formats.e2m1.values()
    )

  @parameterized.parameters(
    ('e4m3fn', [465.0, np.inf, -np.inf, 464.0], [np.nan] * 3 + [448]),
    (
      'e5m2',
      [61440.0, np.inf, -np.inf, 61439.0],
      [np.inf, np.inf, -np.inf, 57344],
    ),
    ('e4m3fnuz', [248.0, np.inf, -np.inf, 247.0], [np.nan] * 3 + [240]),
  )
  def test_overflow_special(self, name, x, want):
    element = formats.get(name)
    codes = encode(np.float32(x), element, overflow='special')
    np.testing.assert_array_equal(decode(codes, element), want)


if __name__ == '__main__':
  absltest.main()
