"""The table-lookup product against exact integers and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas.lut_matmul import reference

U = 2.0**-24

# (bits, signed); one bit has no sign.
ALL = tuple(
  (bits, signed)
  for bits in range(1, 9)
  for signed in (True, False)
  if bits > 1 or not signed
)
DEFAULT = ((1, False), (2, True), (4, True), (4, False), (7, True), (8, False))


def values(codes, bits, signed, zero=0.0):
  v = codes.astype(np.float64)
  if signed:
    return np.where(v >= 2 ** (bits - 1), v - 2**bits, v)
  return v - zero


def case(bits, groups=2, m=3, k=128, n=5):
  random = np.random.RandomState(bits)
  codes = random.randint(0, 2**bits, (k, n)).astype(np.uint8)
  scale = np.exp2(random.randint(-3, 3, (groups, n))).astype(np.float32)
  return random, codes, scale


class LutTest(parameterized.TestCase):
  @parameterized.parameters(*DEFAULT)
  def test_integers_are_exact(self, bits, signed):
    self.check_integers(bits, signed)

  @parameterized.parameters(*sorted(set(ALL) - set(DEFAULT)))
  @pytest.mark.slow
  def test_integers_of_every_width_are_exact(self, bits, signed):
    self.check_integers(bits, signed)

  def check_integers(self, bits, signed):
    random, codes, scale = case(bits)
    x = random.randint(-8, 9, (3, 128)).astype(np.float32)
    zero = random.randint(0, 2**bits, scale.shape).astype(np.uint8)
    spread = lambda a: np.repeat(a, 64, axis=0).astype(np.float64)
    w = values(codes, bits, signed, spread(zero)) * spread(scale)
    run = jax.jit(reference.run, static_argnames=('bits', 'signed'))
    zero_point = None if signed else zero
    got = run(x, codes, scale, zero_point, bits=bits, signed=signed)
    np.testing.assert_array_equal(got, x.astype(np.float64) @ w)

  @parameterized.parameters(1, 2, 4)
  def test_floats(self, bits):
    random, codes, scale = case(bits)
    x = random.randn(3, 128).astype(np.float32)
    w = values(codes, bits, False) * np.repeat(scale, 64, axis=0)
    got = reference.run(x, codes, scale, bits=bits, signed=False)
    # A table entry holds up to 4 roundings, a plane sums k / 4 of them, and
    # planes and the constant are of the size of 2^bits sum |x| scale.
    size = np.abs(x) @ np.repeat(scale, 64, axis=0) * 2**bits
    bound = (128 / 4 + 4 + bits + 8) * U * size
    self.assertTrue(np.all(np.abs(got - x.astype(np.float64) @ w) <= bound))

  @parameterized.parameters(1, 2, 4)
  def test_int8_tables(self, bits):
    random, codes, scale = case(bits)
    x = random.randn(3, 128).astype(np.float32)
    w = values(codes, bits, False) * np.repeat(scale, 64, axis=0)
    got = reference.run(
      x, codes, scale, bits=bits, signed=False, int8_tables=True
    )
    quads = np.abs(x).reshape(3, 2, 16, 4).sum(-1).max(-1)  # per 64
    step = quads / 127
    bound = (step / 2 * 16 * (2**bits - 1) / 2) @ scale * (1 + 1e-5)
    error = np.abs(got - x.astype(np.float64) @ w)
    self.assertTrue(np.all(error <= bound))
    self.assertGreater(error.max(), 0)

  def test_half_tables_mirror(self):
    x = np.float32([[1, 2, 4, 8]])
    table = np.asarray(reference.half_tables(x))[0, 0]
    self.assertEqual(table[0], -15)
    self.assertEqual(table[7], -1)  # + + + -

  def test_one_scale_per_column_and_none(self):
    random, codes, _ = case(2)
    x = random.randint(-8, 9, (3, 128)).astype(np.float32)
    column = np.float32([[1, 2, 3, 4, 5]])
    plain = reference.run(x, codes, None, bits=2, signed=True)
    scaled = reference.run(x, codes, column, bits=2, signed=True)
    np.testing.assert_array_equal(scaled, plain * column)

  @parameterized.parameters(
    ((3, 6), (6, 5), None, 'k=6'),
    ((3, 8), (4, 5), None, r'codes.shape=\(4, 5\)'),
    ((3, 8), (8, 5), (3, 5), r'scale.shape=\(3, 5\)'),
  )
  def test_shapes(self, x, codes, scale, message):
    scale = None if scale is None else jnp.ones(scale)
    with self.assertRaisesRegex(ValueError, message):
      reference.run(
        jnp.ones(x), jnp.ones(codes, jnp.uint8), scale, bits=2, signed=True
      )


if __name__ == '__main__':
  absltest.main()
