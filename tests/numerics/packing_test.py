"""Packing against a bit stream made of Python integers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import numerics

SHAPES = ((8,), (16, 3), (3, 24), (2, 8, 5), (5, 2, 40), (1, 64, 1))


def stream(codes, bits: int) -> list[int]:
  """Bytes of the integer sum(code_i * 2^(i bits)), little end first."""
  number = sum(int(c) << (i * bits) for i, c in enumerate(codes))
  return list(number.to_bytes(len(codes) * bits // 8, 'little'))


def packed_by_hand(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
  lines = np.moveaxis(codes, axis, -1)
  out = [stream(line, bits) for line in lines.reshape(-1, lines.shape[-1])]
  out = np.array(out, np.uint8).reshape(*lines.shape[:-1], -1)
  return np.moveaxis(out, -1, axis)


@functools.partial(jax.jit, static_argnames=('bits', 'axis'))
def round_trip(codes, bits: int, axis: int):
  packed = numerics.pack(codes, bits, axis)
  return packed, numerics.unpack(packed, bits, axis)


# The last axis, an inner one, and the first: one for each width, and all for
# codes that cross bytes and for those that do not.
COVER = (((3, 24), -1), ((2, 8, 5), 1), ((16, 3), -2))


def every_day(bits, shape, axis) -> bool:
  if (shape, axis) not in COVER:
    return False
  return bits in (3, 4) or COVER.index((shape, axis)) == bits % 3


def cases():
  for bits, shape in itertools.product(range(1, 9), SHAPES):
    group = numerics.codes_per_group(bits)
    for axis in range(-len(shape), len(shape)):
      if shape[axis] % group == 0 and (axis < 0 or shape == (2, 8, 5)):
        yield bits, shape, axis


class PackTest(parameterized.TestCase):
  @parameterized.parameters(*(c for c in cases() if every_day(*c)))
  def test_every_width_and_axis(self, bits, shape, axis):
    self._width_and_axis(bits, shape, axis)

  @parameterized.parameters(*(c for c in cases() if not every_day(*c)))
  @pytest.mark.slow
  def test_other_shapes(self, bits, shape, axis):
    self._width_and_axis(bits, shape, axis)

  def _width_and_axis(self, bits, shape, axis):
    codes = np.random.RandomState(bits).randint(0, 2**bits, shape)
    codes = codes.astype(np.uint8)
    want = packed_by_hand(codes, bits, axis)
    packed, back = round_trip(codes, bits, axis)
    self.assertEqual((packed.dtype, back.dtype), (jnp.uint8, jnp.uint8))
    np.testing.assert_array_equal(packed, want)
    np.testing.assert_array_equal(back, codes)

  def test_literals(self):
    for bits, codes, want in (
      (4, [1, 2, 15, 8], [0x21, 0x8F]),
      (2, [0, 1, 2, 3], [0b11100100]),
      (1, [1, 0, 0, 0, 0, 0, 0, 1], [0b10000001]),
      (3, [7, 0, 0, 0, 0, 0, 0, 0], [7, 0, 0]),
      (3, [0, 0, 5, 0, 0, 0, 0, 0], [0b01000000, 1, 0]),
      (6, [63, 0, 0, 1], [63, 0, 4]),
      (8, [255, 0, 7], [255, 0, 7]),
    ):
      whole = np.zeros(24, np.uint8)  # one size is compiled once
      whole[: len(codes)] = codes
      got, _ = round_trip(whole, bits, -1)
      self.assertEqual(got.tolist()[: len(want)], want)
      self.assertEqual(got.shape, (3 * bits,))

  @parameterized.parameters(*range(1, 9))
  def test_sizes(self, bits):
    group = numerics.codes_per_group(bits)
    self.assertEqual(group * bits % 8, 0)
    self.assertTrue(all(g * bits % 8 for g in range(1, group)))
    for n in (0, group, 5 * group):
      size = numerics.packed_size(n, bits)
      self.assertEqual(size, n * bits // 8)
      self.assertEqual(numerics.unpacked_size(size, bits), n)

  @parameterized.parameters(*itertools.product((1, 3, 4, 6), ((0, 8), (8, 0))))
  def test_empty(self, bits, shape):
    for axis in (0, 1):
      packed, codes = jax.eval_shape(
        lambda c, axis=axis: round_trip(c, bits, axis),
        np.zeros(shape, np.uint8),
      )
      self.assertEqual(packed.shape[axis], shape[axis] * bits // 8)
      self.assertEqual(codes.shape, shape)

  def test_under_jit_and_vmap(self):
    self._under_jit_and_vmap(3)

  @pytest.mark.slow
  def test_whole_nibbles_under_jit_and_vmap(self):
    self._under_jit_and_vmap(4)

  def _under_jit_and_vmap(self, bits):
    codes = np.random.RandomState(0).randint(0, 2**bits, (3, 16, 8))
    codes = codes.astype(np.uint8)
    for axis in (0, 1):
      inside = functools.partial(round_trip, bits=bits, axis=axis)
      got, back = jax.jit(jax.vmap(inside))(codes)
      want = packed_by_hand(codes, bits, axis + 1)
      np.testing.assert_array_equal(got, want)
      np.testing.assert_array_equal(back, codes)

  # Groups of codes from one to seven bytes long.
  @parameterized.parameters(4, 6, 7)
  def test_every_byte_unpacks_and_packs(self, bits):
    self._every_byte(bits)

  @parameterized.parameters(1, 2, 3, 5, 8)
  @pytest.mark.slow
  def test_every_byte_of_other_widths_unpacks_and_packs(self, bits):
    self._every_byte(bits)

  def _every_byte(self, bits):
    bytes_ = (
      np.random.RandomState(0)
      .permutation(np.arange(256 * bits) % 256)
      .astype(np.uint8)
    )

    @jax.jit
    def there_and_back(packed):
      codes = numerics.unpack(packed, bits)
      return codes, numerics.pack(codes, bits)

    codes, packed = there_and_back(bytes_)
    self.assertLess(int(np.max(codes)), 2**bits)
    np.testing.assert_array_equal(packed, bytes_)


if __name__ == '__main__':
  absltest.main()
