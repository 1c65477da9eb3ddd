"""L-Mul on codes, against its definition in exact integers."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

from lowbit_pallas.arith import codec, lmul


class Format(NamedTuple):
  """A format as its standard gives it."""

  exponent_bits: int
  mantissa_bits: int
  bias: int
  max_code: int
  inf: int | None


STANDARD = {
  'FLOAT32': Format(8, 23, 127, 0x7F7FFFFF, 0x7F800000),
  'BFLOAT16': Format(8, 7, 127, 0x7F7F, 0x7F80),
  'E4M3': Format(4, 3, 7, 0x7E, None),
  'E5M2': Format(5, 2, 15, 0x7B, 0x7C),
}
ELL = {1: 1, 2: 2, 3: 3, 7: 4, 23: 4}


def oracle(x: int, y: int, f: Format, reading: str) -> int | None:
  """The code of the product, None for NaN, by the definition of L-Mul."""
  m, top = f.mantissa_bits, f.exponent_bits + f.mantissa_bits
  one = 1 << m
  sign = ((x ^ y) >> top & 1) << top
  x, y = (v & (1 << top) - 1 for v in (x, y))
  if any(v > f.max_code and v != f.inf for v in (x, y)):
    return None
  is_zero = x < one or y < one
  if f.inf in (x, y):
    return None if is_zero else sign | f.inf
  if is_zero:
    return sign
  s = x % one + y % one + (one >> ELL[m])
  if s < one or reading == 'formula':
    significand = one + s
  elif s < 2 * one:
    significand = 2 * s
  else:
    significand = 4 * (s - one)
  exponent = x // one + y // one - 2 * f.bias
  # significand 2^(exponent - m), to m bits by nearest even.
  drop = significand.bit_length() - 1 - m
  whole, rest = divmod(significand, 1 << drop)
  half = (1 << drop) / 2
  whole += rest > half or (rest == half and whole % 2 == 1 and drop > 0)
  code = ((exponent + drop + f.bias) << m) + whole - one
  if code < one:
    return sign
  return sign | min(code, f.max_code)


def _check(test, name: str, reading: str, x, y):
  f, standard = getattr(lmul, name), STANDARD[name]
  top = f.exponent_bits + f.mantissa_bits
  run = jax.jit(lambda x, y: lmul.multiply(x, y, f, reading))
  signed = lambda v: jnp.asarray(np.array(v, np.uint32).view(np.int32))
  got = np.asarray(run(signed(x), signed(y))).view(np.uint32)
  got = got & np.uint32((2 << top) - 1)
  for a, b, code in zip(x, y, got.tolist(), strict=True):
    want = oracle(a, b, standard, reading)
    if want is None:
      magnitude = code & ((1 << top) - 1)
      test.assertGreater(magnitude, standard.inf or standard.max_code)
    elif want != code:
      test.fail(
        f'{name} {reading}: {a:#x} * {b:#x} is {code:#x}, not {want:#x}'
      )


def _edges(f: Format) -> list[int]:
  one, top = 1 << f.mantissa_bits, f.exponent_bits + f.mantissa_bits
  magnitudes = [0, 1, one - 1, one, one + 1, f.max_code, f.max_code - 1]
  magnitudes += [(f.bias << f.mantissa_bits) + d for d in (-1, 0, 1, one // 2)]
  magnitudes += [(f.bias // 2 << f.mantissa_bits) + d for d in (0, one - 1)]
  magnitudes += [f.max_code + 1, (1 << top) - 1]
  return [m | s << top for m in magnitudes for s in (0, 1)]


class MultiplyTest(parameterized.TestCase):
  @parameterized.parameters(*zip(('E4M3', 'E5M2'), lmul.READINGS, strict=True))
  def test_every_pair_of_codes(self, name, reading):
    self.check_every_pair(name, reading)

  @parameterized.parameters(*zip(('E5M2', 'E4M3'), lmul.READINGS, strict=True))
  @pytest.mark.slow
  def test_every_pair_of_codes_in_the_other_reading(self, name, reading):
    self.check_every_pair(name, reading)

  def check_every_pair(self, name, reading):
    x, y = zip(*itertools.product(range(256), repeat=2), strict=True)
    _check(self, name, reading, x, y)

  @parameterized.parameters(
    *zip(('FLOAT32', 'BFLOAT16'), lmul.READINGS, strict=True)
  )
  def test_edges_and_random_codes(self, name, reading):
    self.check_edges_and_random_codes(name, reading)

  @parameterized.parameters(
    *zip(('BFLOAT16', 'FLOAT32'), lmul.READINGS, strict=True)
  )
  @pytest.mark.slow
  def test_edges_and_random_codes_in_the_other_reading(self, name, reading):
    self.check_edges_and_random_codes(name, reading)

  def check_edges_and_random_codes(self, name, reading):
    f = STANDARD[name]
    x, y = zip(*itertools.product(_edges(f), repeat=2), strict=True)
    _check(self, name, reading, x, y)
    codes = 1 << (1 + f.exponent_bits + f.mantissa_bits)
    rng = np.random.default_rng(0)
    _check(self, name, reading, *rng.integers(0, codes, (2, 20000)).tolist())
    # Exponents so near the bias that no product leaves the range.
    low, high = ((f.bias + d) << f.mantissa_bits for d in (-20, 20))
    _check(self, name, reading, *rng.integers(low, high, (2, 20000)).tolist())

  def test_a_format_without_nan(self):
    x, y = np.indices((16, 16), np.int32).reshape(2, -1)
    got = lmul.multiply(x, y, codec.minifloat(2, 1))
    f = Format(2, 1, 1, 7, None)
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    want = [oracle(a, b, f, 'integer') for a, b in pairs]
    np.testing.assert_array_equal(got, want)

  def test_the_addition_itself(self):
    rng = np.random.default_rng(1)
    x, y = rng.integers(0x3F800000, 0x40800000, (2, 1000), np.int32)
    got = jax.jit(lambda x, y: lmul.multiply(x, y, lmul.FLOAT32))(x, y)
    want = x.astype(np.int64) + y - 0x3F780000
    np.testing.assert_array_equal(got, want)

  def test_no_offset_is_mitchell(self):
    @jax.jit
    def squared(x):
      codes = lmul.to_codes(x, lmul.FLOAT32)
      codes = lmul.multiply(codes, codes, lmul.FLOAT32, offset=0)
      return lmul.from_codes(codes, lmul.FLOAT32)

    got = squared(np.float32([1, 1.5, 1.75]))
    np.testing.assert_array_equal(got, [1, 2, 3])


WIDTHS = (1, 2, 3, 4, 7, 22, 23)


@jax.jit
def _rounded(x):
  """x with each of `WIDTHS` bits of mantissa."""
  f = lmul.FLOAT32
  codes = lmul.to_codes(x, f)
  return {
    k: lmul.from_codes(lmul.round_mantissa(codes, f, k), f) for k in WIDTHS
  }


class CodesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('BFLOAT16', ml_dtypes.bfloat16),
    ('E4M3', ml_dtypes.float8_e4m3fn),
    ('E5M2', ml_dtypes.float8_e5m2),
  )
  def test_rounds_to_nearest_even_and_back(self, name, dtype):
    f = getattr(lmul, name)
    rng = np.random.default_rng(2)
    x = rng.normal(size=20000) * np.exp2(rng.uniform(-20, 8, 20000))
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.clip(x, -largest, largest).astype(np.float32)
    codes = jax.jit(lambda x: lmul.to_codes(x, f))(x)
    want = x.astype(dtype)
    bits = np.asarray(codes) & ((2 << (f.exponent_bits + f.mantissa_bits)) - 1)
    integer = np.uint8 if want.itemsize == 1 else np.uint16
    np.testing.assert_array_equal(bits, want.view(integer))
    back = jax.jit(lambda c: lmul.from_codes(c, f))(codes)
    np.testing.assert_array_equal(back, want.astype(np.float32))

  @parameterized.parameters(
    ('FLOAT32', np.finfo(np.float32).max, np.inf),
    ('BFLOAT16', float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), np.inf),
    ('E4M3', 448, 448),
    ('E5M2', 57344, np.inf),
  )
  def test_ends(self, name, largest, of_infinity):
    f = getattr(lmul, name)
    x = np.float32([3.4028235e38, np.inf, -np.inf, np.nan])
    y = jax.jit(lambda x: lmul.from_codes(lmul.to_codes(x, f), f))(x)
    want = np.array([largest, of_infinity, -of_infinity, np.nan], np.float32)
    np.testing.assert_array_equal(y, want)

  @parameterized.parameters(*WIDTHS)
  def test_mantissa_width(self, k):
    x = np.random.default_rng(3).normal(size=20000).astype(np.float32)
    x = np.concatenate([x, np.float32(1 + np.arange(64) / 64)])  # with ties
    fraction, exponent = np.frexp(x.astype(np.float64))
    want = np.ldexp(np.rint(np.ldexp(fraction, k + 1)), exponent - k - 1)
    np.testing.assert_array_equal(_rounded(x)[k], want)

  def test_mantissa_width_at_the_ends(self):
    x = np.float32([3.4028235e38, np.inf, -np.inf, np.nan, 0])
    got = _rounded(np.resize(x, 20064))[3][:5]  # one program for both tests
    largest = 1.875 * 2.0**127
    np.testing.assert_array_equal(got, [largest, np.inf, -np.inf, np.nan, 0])

  def test_offsets_of_the_paper(self):
    self.assertEqual(
      [lmul.offset_bits(m) for m in range(1, 8)], [1, 2, 3, 3, 4, 4, 4]
    )


class LoweringTest(parameterized.TestCase):
  """The block functions lower inside Pallas kernels, on any machine."""

  @parameterized.parameters(*zip(STANDARD, lmul.READINGS * 2, strict=True))
  def test_tpu(self, name, reading):
    self.check(name, reading)

  @parameterized.parameters(
    *zip(STANDARD, lmul.READINGS[::-1] * 2, strict=True)
  )
  @pytest.mark.slow
  def test_tpu_in_the_other_reading(self, name, reading):
    self.check(name, reading)

  def check(self, name, reading):
    f = getattr(lmul, name)
    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)

    def body(x_ref, o_ref):
      code = lmul.to_codes(x_ref[...], f)
      product = lmul.multiply(code, code, f, reading)
      o_ref[...] = lmul.from_codes(product, f)

    kernel = jax.jit(pl.pallas_call(body, out_shape=shape))
    exported = jax.export.export(kernel, platforms=['tpu'])(shape)
    self.assertIn('tpu_custom_call', exported.mlir_module())


if __name__ == '__main__':
  absltest.main()
