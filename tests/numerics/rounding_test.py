"""Rounding rules on the integer lattice against exact fractions."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import numerics
from lowbit_jax.numerics import _rounding
from lowbit_pallas.arith import codec

# Quarters, and the neighbours of halves that float32 can tell from them.
VALUES = np.unique(
  np.concatenate(
    [
      np.arange(0, 9, 0.25),
      np.nextafter(np.float32(np.arange(0.5, 8)), np.float32(-1)),
      np.nextafter(np.float32(np.arange(0.5, 8)), np.float32(99)),
      np.float32([2.0**-30, 2.0**23 - 0.5, 2.0**23 + 1, 2.0**24 - 2]),
    ]
  ).astype(np.float32)
)


nearest_even = jax.jit(codec.nearest_even)
toward_zero = jax.jit(codec.toward_zero)


def half_even(t: float, odd: int = 0) -> int:
  """Nearest integer of an exact fraction; ties where integer + odd is even."""
  exact = fractions.Fraction(t)
  low = math.floor(exact)
  rest = exact - low
  if rest == fractions.Fraction(1, 2):
    return low + (low + odd) % 2
  return low + (rest > fractions.Fraction(1, 2))


class RuleTest(parameterized.TestCase):
  def test_nearest_even(self):
    got = nearest_even(VALUES)
    np.testing.assert_array_equal(got, [half_even(float(t)) for t in VALUES])

  @parameterized.parameters(0, 1, 2, 7)
  def test_nearest_even_code(self, odd):
    x = VALUES[VALUES < 100]
    got = nearest_even(x, np.int32(odd))
    want = [half_even(float(t), odd) for t in x]
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(-1, 1)
  def test_toward_zero(self, sign):
    got = toward_zero(sign * VALUES)
    want = [math.trunc(float(sign * t)) for t in VALUES]
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(1, 3, 23)
  def test_stochastic(self, n):
    """Up iff j + 1/2 < frac 2^n, j the top n bits."""
    random = np.random.RandomState(0).randint(
      0, 2**32, (50, VALUES.size), dtype=np.uint64
    )
    random[0], random[1] = 0, 2**32 - 1
    random = random.astype(np.uint32)
    rule = jax.jit(lambda random, x: codec.stochastic(random, n)(x))
    got = np.asarray(rule(random, VALUES))
    for row, out in zip(random, got, strict=True):
      for r, t, k in zip(row, VALUES, out, strict=True):
        exact = fractions.Fraction(float(t))
        rest = exact - math.floor(exact)
        j = int(r) >> (32 - n)
        up = j + fractions.Fraction(1, 2) < rest * 2**n
        self.assertEqual(int(k), math.floor(exact) + up, (r, t))

  def test_names(self):
    self.assertEqual(
      numerics.ROUNDINGS,
      ('nearest_even', 'toward_zero', 'stochastic', 'dithered'),
    )
    x = jnp.float32(2.5)
    for name, want in (
      ('nearest_even', 2),
      ('toward_zero', 2),
      ('dithered', 2),
    ):
      self.assertEqual(float(_rounding.rule(name)(x)), want)
    with self.assertRaisesRegex(ValueError, 'random='):
      _rounding.rule('stochastic')
    up = _rounding.rule('stochastic', jnp.uint32(0), 8)
    self.assertEqual(float(up(x)), 3)


class KeyWordsTest(parameterized.TestCase):
  def test_words_of_a_key(self):
    raw = jnp.array([7, 9], jnp.uint32)
    np.testing.assert_array_equal(_rounding.key_words(raw), [7, 9])
    typed = jax.random.wrap_key_data(raw)
    np.testing.assert_array_equal(_rounding.key_words(typed), [7, 9])

  def test_longer_keys_fold_into_two_words(self):
    raw = jnp.array([1, 2, 4, 8], jnp.uint32)
    np.testing.assert_array_equal(_rounding.key_words(raw), [5, 10])

  @parameterized.parameters(
    (np.zeros(3, np.uint32),),
    (np.zeros((2, 2), np.uint32),),
    (np.zeros(2, np.int32),),
    (0,),
    (1.5,),
  )
  def test_what_is_no_key(self, key):
    with self.assertRaisesRegex(TypeError, 'one JAX PRNG key'):
      _rounding.key_words(key)


if __name__ == '__main__':
  absltest.main()
