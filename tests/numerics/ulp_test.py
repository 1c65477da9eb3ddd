"""Distances and neighbours of floats against Python integers."""

import fractions
import itertools
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import numerics

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def order(value: float) -> int:
  """The place of a float32 among all float32 numbers."""
  (bits,) = struct.unpack('<I', struct.pack('<f', value))
  return bits if bits < 1 << 31 else (1 << 31) - bits


class UlpDistanceTest(parameterized.TestCase):
  def test_literals(self):
    one = np.float32(1)
    up, down = np.nextafter(one, np.float32(2)), np.nextafter(one, 0 * one)
    for a, b, want in (
      (one, one, 0),
      (one, up, 1),
      (down, up, 2),
      (one, 2 * one, 1 << 23),
      (0.0 * one, -0.0 * one, 0),
      (np.float32(1e-45), np.float32(-1e-45), 2),
      (np.finfo(np.float32).max, np.float32(np.inf), 1),
      (np.float32(-np.inf), np.float32(np.inf), 2 * 0x7F800000),
      (np.float32(np.nan), np.float32(np.nan), 0),
      (np.float32(np.nan), one, np.inf),
      (np.float32(np.inf), np.float32(np.nan), np.inf),
    ):
      self.assertEqual(numerics.ulp_distance(a, b), want, f'{a} {b}')
      self.assertEqual(numerics.ulp_distance(b, a), want, f'{b} {a}')

  def test_against_integers(self):
    random = np.random.RandomState(0)
    bits = random.randint(0, 2**32, (2, 500), dtype=np.uint64)
    a, b = bits.astype(np.uint32).view(np.float32)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    want = [abs(order(p) - order(q)) for p, q in zip(a, b, strict=True)]
    np.testing.assert_array_equal(numerics.ulp_distance(a, b), want)

  @parameterized.parameters(*DTYPES)
  def test_neighbours_of_all_16_bit_numbers(self, dtype):
    if np.dtype(dtype).itemsize != 2:
      return
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    x = np.sort(x[np.isfinite(x.astype(np.float32))].astype(np.float32))
    x = np.unique(x).astype(dtype)
    np.testing.assert_array_equal(numerics.ulp_distance(x[1:], x[:-1]), 1)
    self.assertEqual(numerics.ulp_distance(x[0], x[-1]), x.size - 1)

  def test_broadcasts_and_takes_jax_arrays(self):
    a = jnp.ones((3, 1), jnp.bfloat16)
    b = jnp.full((1, 4), 1 + 2.0**-7, jnp.bfloat16)
    got = numerics.ulp_distance(a, b)
    self.assertEqual((got.shape, got.dtype), ((3, 4), np.float64))
    np.testing.assert_array_equal(got, 1)

  def test_one_dtype_only(self):
    for a, b in (
      (np.float32(1), np.float16(1)),
      (1.0, 1.0),
      (np.float64(1), np.float64(1)),
    ):
      with self.assertRaisesRegex(TypeError, 'one 2- or 4-byte float dtype'):
        numerics.ulp_distance(a, b)


class NextFloatTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(DTYPES, (0.0, 1.0, -2.5, 6e4)))
  def test_is_one_ulp_away(self, dtype, value):
    x = np.asarray(value, dtype)
    for toward in (-np.inf, np.inf):
      y = numerics.next_float(x, toward)
      self.assertEqual(y.dtype, x.dtype)
      self.assertEqual(numerics.ulp_distance(x, y), 1)
      a, b = (fractions.Fraction(float(v)) for v in (x, y))
      self.assertEqual(b > a, toward > 0)
    np.testing.assert_array_equal(numerics.next_float(x, x), x)


class AllFloat32Test(absltest.TestCase):
  def test_runs_of_bit_patterns(self):
    for start in (0, 0x3F800000, 0x7F7FFFFE, 0x80000000, 2**32 - 4):
      x = np.asarray(numerics.all_float32(start, start + 4))
      self.assertEqual(x.dtype, np.float32)
      np.testing.assert_array_equal(x.view(np.uint32), start + np.arange(4))
    self.assertEqual(numerics.all_float32(5, 5).shape, (0,))

  def test_limits(self):
    for start, stop in ((-1, 3), (3, 2), (0, 2**32 + 1)):
      with self.assertRaisesRegex(ValueError, f'start={start} stop={stop}'):
        numerics.all_float32(start, stop)


if __name__ == '__main__':
  absltest.main()
