"""Scale rules for elements that reach further on one side of zero, and fits.

The oracle is the scalar one in plain Python, encodings of ggml and of
compressed-tensors, and float64 where sums are rounded. `io_goldens/inputs.npz`
holds the random numbers of which the goldens beside it were made.
"""

import functools
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, io, numerics, ops, qarray, testing
from lowbit_jax.io import gguf
from lowbit_jax.numerics import oracle
from lowbit_jax.training import optimizers

GOLDENS = pathlib.Path(__file__).parent / 'io_goldens'
RULES = oracle.UNEVEN_RULES
FITTED = (*RULES, 'least_squares')
Q4_0 = formats.get('int4_g32_float16')


@functools.cache
def goldens(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDENS / f'{name}.npz') as file:
    return dict(file)


def data(*shape, seed: int = 0) -> np.ndarray:
  x = np.random.default_rng(seed).standard_normal(shape)
  return x.astype(np.float32)


def block(*numbers) -> np.ndarray:
  """A block of 32 that begins with these numbers."""
  return np.float32([*numbers, *[0.25] * (32 - len(numbers))])


def integers(q) -> np.ndarray:
  codes = np.asarray(numerics.unpack(q.codes, q.fmt.element.bits))
  return q.fmt.element.values()[codes]


quantize = jax.jit(ops.quantize, static_argnames=('fmt', 'scale_rule', 'axis'))


def error(x, fmt, rule) -> float:
  """Root mean square of the error over that of x."""
  y = np.asarray(ops.dequantize(quantize(x, fmt, scale_rule=rule)), np.float64)
  return float(np.sqrt(np.square(y - x).sum() / np.square(x).sum()))


class OracleTest(parameterized.TestCase):
  def test_quantize(self):
    self.check('int4_g32_float16', 'signed_absmax')

  @parameterized.product(
    name=(
      'int2_g32', 'int8_channel', 'iq4_nl', 'quaternary_g64_float16', 'q3_k',
      'q6_k', 'iq4_xs', 'int4_g32_float16',
    ),
    rule=RULES,
  )  # fmt: skip
  @pytest.mark.slow
  def test_quantize_more_formats(self, name, rule):
    self.check(name, rule)

  def check(self, name, rule):
    fmt = formats.get(name)
    quantize_ = functools.partial(quantize, fmt=fmt, scale_rule=rule)
    testing.check_quantizer(quantize_, fmt, scale_rule=rule)


class SignedTest(parameterized.TestCase):
  @parameterized.parameters(
    ((3, -7.5), 0.9375, -8),
    ((3, 7.5), -0.9375, -8),
    ((-7.5, 7.5), 0.9375, -8),  # the first of two counts
    ((7.5, -7.5), -0.9375, -8),
  )
  def test_the_largest_number_is_the_lowest_code(self, numbers, scale, code):
    q = quantize(block(*numbers), Q4_0, scale_rule='signed_absmax')
    self.assertEqual(float(q.scale[0]), scale)
    largest = np.argmax(np.abs(numbers))
    self.assertEqual(integers(q)[largest], code)
    self.assertEqual(ops.dequantize(q)[largest], np.float32(numbers[largest]))

  def test_tables_whose_longer_end_is_above_zero(self):
    fmt = formats.get('quaternary_g64_float16')
    x = np.float32([-3, 1.5, *[0.0] * 62])
    q = quantize(x, fmt, scale_rule='signed_absmax')
    self.assertEqual(float(q.scale[0]), -1.5)
    self.assertEqual(integers(q)[:2].tolist(), [2, -1])

  def test_columns(self):
    x = data(64, 3)
    a = quantize(x, Q4_0, axis=0, scale_rule='signed_absmax')
    b = quantize(x.T, Q4_0, scale_rule='signed_absmax')
    np.testing.assert_array_equal(a.scale.T, b.scale)
    np.testing.assert_array_equal(ops.dequantize(a).T, ops.dequantize(b))

  def test_full_range(self):
    q = quantize(block(7.5, -7.5), Q4_0, scale_rule='full_range')
    self.assertEqual(float(q.scale[0]), 1.0)
    # 7.5 would be 8, which there is not.
    self.assertEqual(integers(q)[:2].tolist(), [7, -8])

  @parameterized.parameters(*FITTED)
  def test_large_and_bad_numbers(self, rule):
    top = np.finfo(np.float32).max
    x = np.stack(
      [
        block(top, -top, top / 2),
        block(-top, top / 3),
        block(np.inf),
        block(np.nan, 1),
        0 * block(),
        block() * np.float32(2.0**-130),
      ]
    )
    q = quantize(x, formats.int4_g32, scale_rule=rule)
    y = np.asarray(ops.dequantize(qarray.validate(q)))
    self.assertTrue(np.isfinite(y[:2]).all())
    self.assertTrue(np.isnan(y[2:4]).all())
    np.testing.assert_array_equal(y[4:], 0)

  def test_formats_that_are_refused(self):
    for name in ('fp8_1x128', 'nf4_g64', 'ternary_channel', 'int8_tensor',
                 'nvint4', 'mxint8', 'uint4_g32', 'q4_k'):  # fmt: skip
      self.assertNotIn('signed_absmax', numerics.scale_rules(formats.get(name)))
      for rule in RULES:
        with self.assertRaisesRegex(ValueError, f'{rule}.*{name}.*rules are'):
          ops.quantize(data(32), formats.get(name), scale_rule=rule)
    for name in ('nvint4', 'mxint8', 'int8_tensor'):
      with self.assertRaisesRegex(ValueError, 'least_squares'):
        ops.quantize(
          data(32), formats.get(name), scale_rule='least_squares'
        )  # fmt: skip

  def test_ternary_numbers_stay_three(self):
    fmt = formats.get('ternary_g256_float16')
    q = quantize(data(1, 512), fmt, scale_rule='least_squares')
    self.assertEqual(set(integers(q).ravel()), {-1.0, 0.0, 1.0})


class PeerTest(parameterized.TestCase):
  @parameterized.parameters(
    ('Q4_0', 'int4_g32_float16'), ('Q5_0', 'int5_g32_float16')
  )
  def test_ggml(self, peer, name):
    x, found = goldens('inputs')['ggml'], goldens('gguf')
    want = found[f'c.{peer}.bytes'].reshape(2, 8, -1)[..., :2]
    want = np.ascontiguousarray(want).view(np.float16)[..., 0]
    q = quantize(x, formats.get(name), scale_rule='signed_absmax')
    # Its zero blocks have the scale -0, and its codes are those of scales that
    # are not yet rounded, which makes no difference here.
    got, live = np.asarray(q.scale), want != 0
    np.testing.assert_array_equal(got[live].view(np.uint16),
                                  want[live].view(np.uint16))  # fmt: skip
    np.testing.assert_array_equal(got[~live], 0)
    np.testing.assert_array_equal(ops.dequantize(q), found[f'c.{peer}.y'])

  @parameterized.parameters(
    ('int4_g32_sym', 'int4_g32'),
    ('int5_g32_sym', 'int5_g32'),
    ('int8_w8a8', 'int8_channel'),
    ('int8_channel_pack', 'int8_channel'),
  )
  def test_compressed_tensors(self, case, name):
    x, found = goldens('inputs')['ct'], goldens('quantized')
    q = quantize(x, formats.get(name), scale_rule='full_range')
    got, want = np.asarray(q.scale), found[f'ct/{case}/weight_scale']
    zero = want == 2.0**-23  # which it gives blocks of zeros
    np.testing.assert_array_equal(got[~zero], want[~zero])
    np.testing.assert_array_equal(got[zero], 0)
    # It divides by the scale and we multiply by its inverse: numbers as near
    # to the middle of two codes as three roundings may go either way.
    scale = np.repeat(got.astype(np.float64), x.size // got.size, axis=-1)
    with np.errstate(invalid='ignore'):
      exact = x / scale
    middle = np.abs(np.abs(exact) % 1 - 0.5) <= np.abs(exact) * 2.0**-22
    y, z = np.asarray(ops.dequantize(q)), found[f'ct/{case}/y']
    np.testing.assert_array_equal(y[~middle], z[~middle])
    self.assertLessEqual((y != z).sum(), 3)

  def test_least_squares_beat_ggml(self):
    self.check_fit('Q3_K', 'q3_k')

  @parameterized.parameters(
    ('Q6_K', 'q6_k'), ('IQ4_NL', 'iq4_nl'), ('IQ4_XS', 'iq4_xs'),
    ('Q4_0', 'int4_g32_float16'), ('Q5_0', 'int5_g32_float16'),
  )  # fmt: skip
  @pytest.mark.slow
  def test_least_squares_beat_ggml_in_more_formats(self, peer, name):
    self.check_fit(peer, name)

  def check_fit(self, peer, name):
    x, found = goldens('inputs')['ggml'], goldens('gguf')
    y = found[f'c.{peer}.y']
    theirs = np.sqrt(np.square(y - x).sum() / np.square(x).sum())
    ours = error(x, formats.get(name), 'least_squares')
    self.assertLess(ours, theirs)


class FitTest(parameterized.TestCase):
  @parameterized.parameters(
    ('int4_g32', 'signed_absmax'), ('nf4_g64', 'absmax')
  )
  def test_it_is_near_the_best_scale(self, name, first):
    fmt, x = formats.get(name), data(32, 64)
    size = fmt.block[0]
    rows = x.reshape(-1, 1, size).astype(np.float64)
    grid = np.sort(fmt.element.values())
    middles = (grid[1:] + grid[:-1]) / 2
    place = np.abs(rows).argmax(-1, keepdims=True)
    top = np.take_along_axis(rows, place, -1) / grid[0]
    top = top if first == 'signed_absmax' else np.abs(top)
    scales = top * np.linspace(0.5, 1.5, 1001)[:, None]
    nearest = grid[np.searchsorted(middles, rows / scales)] * scales
    best = np.square(nearest - rows).sum(-1).min(-1)

    def errors(rule):
      y = np.asarray(ops.dequantize(quantize(x, fmt, scale_rule=rule)))
      return np.square(y.reshape(-1, size) - rows[:, 0]).sum(-1)

    found = errors('least_squares')
    self.assertLess(found.sum(), 1.02 * best.sum())
    # It never loses against the scale that it begins with.
    self.assertTrue((found <= errors(first) * (1 + 1e-5)).all())

  def test_padding_does_not_count(self):
    # A table without zero, so that padding has an error.
    table = formats.CodebookFormat('thirds', (-1.0, -1 / 3, 1 / 3, 1.0))
    x = data(4, 8)
    short, whole = (
      quantize(x, formats.grouped(table, n), scale_rule='least_squares')
      for n in (32, 8)
    )
    np.testing.assert_allclose(short.scale, whole.scale, rtol=1e-6)


class UseTest(parameterized.TestCase):
  """Scales below zero, everywhere a scale goes."""

  def held(self, *shape, rule='signed_absmax', axis=-1):
    q = quantize(data(*shape), formats.int4_g32, scale_rule=rule, axis=axis)
    self.assertTrue((np.asarray(q.scale) < 0).any())
    return q

  def test_products(self):
    w, x = self.held(64, 8, axis=0), data(3, 64, seed=1)
    want = x.astype(np.float64) @ np.asarray(ops.dequantize(w), np.float64)
    np.testing.assert_allclose(ops.dot(x, w), want, rtol=1e-5, atol=1e-5)
    q = quantize(x, formats.int4_g32, scale_rule='signed_absmax')
    x = np.asarray(ops.dequantize(q), np.float64)
    want = x @ np.asarray(ops.dequantize(w), np.float64)
    np.testing.assert_allclose(ops.dot(q, w), want, rtol=1e-5, atol=1e-5)

  def test_parts_and_updates(self):
    q = self.held(4, 64)
    y = np.array(ops.dequantize(q))
    np.testing.assert_array_equal(ops.dequantize(q[1:, 32:]), y[1:, 32:])
    new = data(2, 32, seed=3)
    got = ops.update_slice(q, new, (1, 32), scale_rule='signed_absmax')
    part = quantize(new, q.fmt, scale_rule='signed_absmax')
    y[1:3, 32:] = ops.dequantize(part)
    np.testing.assert_array_equal(ops.dequantize(qarray.validate(got)), y)

  def test_files(self):
    q = quantize(data(4, 64), Q4_0, scale_rule='signed_absmax')
    self.assertEqual(float(integers(q).min()), -8)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'a.gguf')
      gguf.save(path, {'w': q})
      with gguf.open(path) as file:
        np.testing.assert_array_equal(
          ops.dequantize(file['w']), ops.dequantize(q)
        )
      path = os.path.join(folder, 'a.lowbit')
      io.save(path, {'w': q})
      testing.assert_bits_equal(io.load(path)['w'], q)

  def test_given_scales_are_symmetric(self):
    q = self.held(2, 64)
    again = ops.quantize_with(data(2, 64), q.scale, q.fmt)
    np.testing.assert_array_equal(again.scale, q.scale)
    want = np.maximum(integers(q), -7)
    np.testing.assert_array_equal(integers(again), want)

  def test_the_two_numbers_around_a_weight(self):
    w = data(4, 64)
    near, other = optimizers.grid_neighbours(
      w, formats.int4_g32, scale_rule='signed_absmax'
    )
    q = quantize(w, formats.int4_g32, scale_rule='signed_absmax')
    step = np.abs(np.repeat(np.asarray(q.scale), 32, axis=-1))
    exact = np.minimum(near, other) <= w
    exact &= w <= np.maximum(near, other)
    outside = integers(q) == 7  # the end at which numbers are cut off
    self.assertTrue((exact | outside).all())
    gap = np.abs(np.asarray(other) - np.asarray(near))
    same = gap == 0
    np.testing.assert_allclose(gap[~same], step[~same], rtol=1e-5)
    self.assertLess(same.mean(), 0.2)


class DerivativeTest(parameterized.TestCase):
  def fake(self, rule, backward):
    def run(x):
      return ops.fake_quant(
        x, formats.int4_g32, scale_rule=rule, backward=backward
      )

    return run

  @parameterized.parameters('signed_absmax', 'least_squares')
  def test_it_is_the_quantized_value(self, rule):
    x = data(2, 64)
    y = ops.dequantize(quantize(x, formats.int4_g32, scale_rule=rule))
    np.testing.assert_array_equal(self.fake(rule, 'identity')(x), y)

  def test_the_gradient_stops_outside_of_the_range(self):
    # Of scale -1: from -7 to 8.
    x = block(8, -7, -7.4, -8, 7.9)
    _, pullback = jax.vjp(self.fake('signed_absmax', 'clipped'), x)
    (dx,) = pullback(jnp.ones(32))
    self.assertEqual(np.asarray(dx)[:6].tolist(), [1, 1, 0, 0, 1, 1])
    _, pullback = jax.vjp(self.fake('signed_absmax', 'trust'), x)
    (dx,) = pullback(jnp.ones(32))
    self.assertEqual(np.asarray(dx)[:6].tolist(), [1, 1, 1, 0, 1, 1])

  @parameterized.parameters(
    ('signed_absmax', 8.0), ('signed_absmax', -8.0), ('full_range', -8.0)
  )
  def test_the_scale_follows_the_largest_number(self, rule, largest):
    # y = q s of codes that count as rounded: dy / ds = q - x / s, and s is
    # x_0 / -8 or |x_0| / 7.5.
    x = block(largest, 3.3, -2.2)
    q = quantize(x, formats.int4_g32, scale_rule=rule)
    scale = np.float64(q.scale[0])
    (rows,) = jax.vjp(self.fake(rule, 'absmax'), x)[1](jnp.ones(32))
    slope = -1 / 8 if rule == 'signed_absmax' else np.sign(largest) / 7.5
    want = np.ones(32)
    want[0] += slope * (integers(q) - x / scale).sum()
    np.testing.assert_allclose(rows, want, rtol=1e-5)

  def test_a_fit_does_not_follow_it(self):
    with self.assertRaisesRegex(ValueError, 'least_squares'):
      self.fake('least_squares', 'absmax')(data(32))


if __name__ == '__main__':
  absltest.main()
