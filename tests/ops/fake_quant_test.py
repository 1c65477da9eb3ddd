"""fake_quant and fake_quant_with: forward equality and backward equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from tests import kinds

SHAPE = (3, 70)
TILE_SHAPE = (40, 70)
COTANGENTS = (1e-8, 1.0, 1e8)

BLOCK_FORMATS = kinds.block_formats()
KINDS = (
  'mxfp4', 'nvfp4', 'nf4_g64', 'uint4_g32', 'int8_channel', 'e4m3fn_tensor',
  'mxfp4_32x32',
)  # fmt: skip
# Each equation has a default run for every branch in it, and a slow one for
# the other kinds. These scale as one of the above does.
MORE_KINDS = 'mxfp8_e4m3', 'mxint8', 'int4_g32'
EVERY_KIND = (*KINDS, *MORE_KINDS)
FORWARD = 'mxfp4', 'nvfp4', 'uint4_g32', 'e4m3fn_tensor'
CLIPPED = 'mxfp4', 'uint4_g32', 'int6_g32', 'e4m3fn_tensor'
TRUST = 'mxfp4', 'nf4_g64'
# The formats whose scale follows the largest magnitude.
ABSMAX = 'mxfp4', 'nvfp4', 'mxfp4_32x32'
WITH = 'mxfp4', 'nvfp4', 'uint4_g32', 'e4m3fn_tensor'


def others(*names: str) -> tuple[str, ...]:
  return tuple(n for n in EVERY_KIND if n not in names)


NARROW = (jnp.float16, jnp.bfloat16)


@functools.cache
def data(shape=SHAPE, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def placed(*numbers) -> np.ndarray:
  """The beginning of an array of zeros."""
  x = np.zeros(SHAPE, np.float32)
  x[0, : len(numbers)] = numbers
  return x


def input_for(name: str) -> np.ndarray:
  return data(TILE_SHAPE if formats.get(name).is_tile else SHAPE)


@functools.partial(
  jax.jit,
  static_argnames=('fmt', 'axis', 'scale_rule', 'rounding', 'backward'),
)
def fake(x, g, fmt, **kwargs):
  """The result and the gradient of sum(g * result)."""
  y, vjp = jax.vjp(lambda x: lowbit_jax.fake_quant(x, fmt, **kwargs), x)
  return y, vjp(g)[0]


@functools.partial(jax.jit, static_argnames=('fmt', 'axis', 'backward'))
def fake_with(x, scale, g, fmt, **kwargs):
  def f(x, scale):
    return lowbit_jax.fake_quant_with(x, scale, fmt, **kwargs)

  y, vjp = jax.vjp(f, x, scale)
  return y, *vjp(g)


@functools.partial(jax.jit, static_argnames=('fmt', 'axis', 'scale_rule'))
def _round_trip(x, fmt, **kwargs):
  q = lowbit_jax.quantize(x, fmt, **kwargs)
  return q, lowbit_jax.dequantize(q)


def quantize(x, fmt, scale_rule=None, **kwargs):
  """The default rule goes by its name: tests of either share a program."""
  rule = scale_rule or fmt.scale_rule
  return _round_trip(x, fmt, scale_rule=rule, **kwargs)[0]


def round_trip(x, fmt, scale_rule=None, **kwargs):
  rule = scale_rule or fmt.scale_rule
  return _round_trip(x, fmt, scale_rule=rule, **kwargs)[1]


def scales_of(q) -> np.ndarray:
  """The whole scale of each element, float64, in the shape of the array."""
  out = np.ones(q.codes.shape)
  padded = [n for n in q.shape]
  for axis, pad in zip(q.axes, q.pad, strict=True):
    padded[axis] += pad
  out = np.ones(padded)
  if q.scale is not None:
    scale = np.asarray(q.scale)
    if scale.dtype == np.uint8:
      scale = q.fmt.scale.values()[scale]
    for axis, block in zip(q.axes, q.fmt.block, strict=True):
      scale = np.repeat(scale, block or padded[axis], axis)
    out = out * scale
  if q.tensor_scale is not None:
    out = out * np.asarray(q.tensor_scale, np.float64)
  return out[tuple(slice(n) for n in q.shape)]


def block_ids(fmt, shape) -> np.ndarray:
  if fmt.scale is None:
    return np.zeros(shape, int)
  sizes = (1, *fmt.block) if len(fmt.block) == 1 else fmt.block
  row, column = np.indices(shape)
  return row // (sizes[0] or shape[0]) * 1000 + column // (sizes[1] or shape[1])


def assert_bits(got, want):
  got, want = np.asarray(got), np.asarray(want)
  assert got.dtype == want.dtype, (got.dtype, want.dtype)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


class ForwardTest(parameterized.TestCase):
  @parameterized.parameters(*FORWARD)
  def test_equals_dequantized_quantize_and_passes_gradients(self, name):
    self.check_forward(name)

  @parameterized.parameters(*(n for n in BLOCK_FORMATS if n not in FORWARD))
  @pytest.mark.slow
  def test_more_formats(self, name):
    self.check_forward(name)

  def check_forward(self, name):
    fmt, x = formats.get(name), input_for(name)
    want = round_trip(x, fmt)
    for c in COTANGENTS:
      g = np.full(x.shape, c, np.float32)
      y, dx = fake(x, g, fmt)
      assert_bits(y, want)
      assert_bits(dx, g)

  def test_narrow_dtypes(self):
    self.check_narrow('int8_channel', jnp.float16)

  @parameterized.parameters(
    ('mxfp4', jnp.bfloat16),
    ('nvfp4', jnp.bfloat16),
    ('uint4_g32', jnp.bfloat16),
    ('e4m3fn_tensor', jnp.bfloat16),
    ('mxfp4_32x32', jnp.bfloat16),
    ('mxfp8_e4m3', jnp.bfloat16),
    ('mxint8', jnp.bfloat16),
    ('nf4_g64', jnp.bfloat16),
    ('int4_g32', jnp.bfloat16),
    ('int8_channel', jnp.bfloat16),
    ('mxfp4', jnp.float16),
  )
  @pytest.mark.slow
  def test_more_narrow_dtypes(self, name, dtype):
    self.check_narrow(name, dtype)

  def check_narrow(self, name, dtype):
    fmt, x = formats.get(name), input_for(name).astype(dtype)
    want = round_trip(x, fmt)
    for c in COTANGENTS if dtype == jnp.bfloat16 else (1.0, 2.0**-14):
      g = np.full(x.shape, c, dtype)
      y, dx = fake(x, g, fmt)
      assert_bits(y, want)
      assert_bits(dx, g)

  @parameterized.parameters(
    ('mxfp4', dict(scale_rule='rceil', axis=0)),
    ('mxfp4_32x32', dict(axis=(-1, -2))),
  )
  def test_takes_the_arguments_of_quantize(self, name, kwargs):
    self.check_arguments(name, kwargs)

  @parameterized.parameters(
    ('mxfp8_e4m3', dict(scale_rule='mse')), ('nvfp4', dict(scale_rule='sweep'))
  )
  @pytest.mark.slow
  def test_takes_the_rules_that_take_longest(self, name, kwargs):
    self.check_arguments(name, kwargs)

  def check_arguments(self, name, kwargs):
    fmt, x = formats.get(name), input_for(name)
    y, _ = fake(x, np.ones_like(x), fmt, **kwargs)
    assert_bits(y, round_trip(x, fmt, **kwargs))

  @pytest.mark.slow
  def test_held_tensor_scale(self):
    x, scale = data(), jnp.float32(2.0**-8)
    y, dx = fake(x, np.ones_like(x), formats.nvfp4, tensor_scale=scale)
    assert_bits(y, round_trip(x, formats.nvfp4, tensor_scale=scale))
    assert_bits(dx, np.ones_like(x))

  @parameterized.parameters('stochastic', 'dithered')
  def test_random_roundings_have_the_same_gradient(self, rounding):
    x, fmt = data(), formats.get('int4_g32')
    g = data(seed=3)
    y, dx = fake(x, g, fmt, rounding=rounding, key=jax.random.key(0))
    z, _ = fake(x, g, fmt, rounding=rounding, key=jax.random.key(1))
    assert_bits(dx, g)
    self.assertFalse((np.asarray(y) == np.asarray(z)).all())

  def test_origin_is_that_of_random_words(self):
    x, key = data((4, 32)), jax.random.key(0)

    def f(x, origin=None):
      return lowbit_jax.fake_quant(
        x, formats.mxfp4, rounding='stochastic', key=key, origin=origin
      )

    got = jax.jit(lambda x, i: f(x, ((i, 0), (4, 32))))(x[2:], 2)
    assert_bits(got, jax.jit(f)(x)[2:])

  def test_scalars(self):
    self.check_scalar('mxfp4_32x32', 'absmax')

  @pytest.mark.slow
  def test_scalars_of_integers(self):
    self.check_scalar('int8_tensor', 'identity')

  def check_scalar(self, name, backward):
    fmt = formats.get(name)
    y, dx = fake(np.float32(0.75), np.float32(3), fmt, backward=backward)
    self.assertEqual((y.shape, dx.shape), ((), ()))
    self.assertAlmostEqual(float(y), 0.75, delta=0.1)

  def test_scalars_of_a_learned_step(self):
    y, dx, ds = fake_with(
      jnp.float32(0.8),
      np.full((1,), 0.25, np.float32),
      jnp.float32(2),
      formats.get('int4_g32'),
      backward='lsq',
    )
    self.assertEqual((float(y), float(dx)), (0.75, 2.0))
    self.assertEqual(ds.shape, (1,))

  @parameterized.parameters('mxfp4', 'nvfp4', 'int8_tensor')
  def test_empty_arrays(self, name):
    x = np.zeros((0, 32), np.float32)
    y, dx = fake(x, x, formats.get(name))
    self.assertEqual((y.shape, dx.shape), ((0, 32), (0, 32)))


class EquationTest(parameterized.TestCase):
  @parameterized.parameters(*CLIPPED)
  def test_clipped(self, name):
    self.check_clipped(name)

  @parameterized.parameters(*others(*CLIPPED))
  @pytest.mark.slow
  def test_clipped_in_more_kinds(self, name):
    self.check_clipped(name)

  def check_clipped(self, name):
    fmt = formats.get(name)
    x, g = input_for(name), data(input_for(name).shape, seed=1)
    rule = 'floor' if fmt.has_exponent_scale else None  # saturates
    held = {}
    if fmt.scale is None:
      held = dict(tensor_scale=jnp.float32(0.5 / fmt.element.max))
    q = quantize(x, fmt, scale_rule=rule, **held)
    _, dx = fake(x, g, fmt, scale_rule=rule, backward='clipped', **held)
    s, top = scales_of(q), fmt.element.max
    inside = np.abs(x) <= top * s
    if not (fmt.has_exponent_scale or held):
      # A scale that follows from the block clips nothing, however it, and the
      # zero point, are rounded.
      inside = np.full(x.shape, True)
    # The bounds themselves are rounded to float32.
    sure = inside | (np.abs(np.abs(x) / (top * s) - 1) > 1e-6)
    want = np.where(inside, g, 0)
    np.testing.assert_array_equal(np.asarray(dx)[sure], want[sure])
    if name in ('mxfp4', 'mxfp8_e4m3', 'e4m3fn_tensor', 'mxfp4_32x32'):
      self.assertGreater(np.mean(~inside), 0)

  def test_clipped_by_hand(self):
    x = placed(7.9, -6.5, 6.0, -6.0, 1.2, 0.0, -0.1, 4.0)
    g = placed(*range(1, 9))
    fake_clipped = functools.partial(fake, x, g, formats.mxfp4)
    _, dx = fake_clipped(scale_rule='floor', backward='clipped')
    np.testing.assert_array_equal(dx, placed(0, 0, 3, 4, 5, 6, 7, 8))
    _, dx = fake_clipped(scale_rule='rceil', backward='clipped')
    np.testing.assert_array_equal(dx, g)

  @parameterized.parameters(*TRUST)
  def test_trust(self, name):
    self.check_trust(name)

  @parameterized.parameters(*others(*TRUST))
  @pytest.mark.slow
  def test_trust_in_more_kinds(self, name):
    self.check_trust(name)

  def check_trust(self, name):
    fmt = formats.get(name)
    x, g = input_for(name), data(input_for(name).shape, seed=1)
    rule = 'floor' if fmt.has_exponent_scale else None
    q = quantize(x, fmt, scale_rule=rule)
    y, dx = fake(x, g, fmt, scale_rule=rule, backward='trust')
    values = fmt.element.values()
    gap = np.diff(np.unique(values[np.isfinite(values)])).max()
    bound = gap / 2 * scales_of(q)
    error = np.abs(x.astype(np.float64) - np.asarray(y, np.float64))
    sure = np.abs(error / bound - 1) > 1e-5
    want = np.where(error <= bound, g, 0)
    np.testing.assert_array_equal(np.asarray(dx)[sure], want[sure])

  def test_trust_by_hand(self):
    # E2M1: the largest gap is 2, so an error up to 1 is explained by rounding.
    x = placed(7.9, -6.9, 7.0, 5.0, 0.3)
    g = np.ones_like(x)
    _, dx = fake(x, g, formats.mxfp4, scale_rule='floor', backward='trust')
    want = np.ones_like(x)
    want[0, 0] = 0
    np.testing.assert_array_equal(dx, want)

  def absmax_gradient(self, x, y, g, s, fmt) -> np.ndarray:
    """dx_i = g_i, and at the maximum k of a block in addition
    sign(x_k) F s^2 / amax^2 sum_j g_j (y_j - x_j) / s."""
    x, y, g = (np.asarray(a, np.float64) for a in (x, y, g))
    out = g.copy()
    ids = block_ids(fmt, x.shape)
    for i in np.unique(ids):
      at = ids == i
      amax = np.abs(x[at]).max()
      if amax == 0:
        continue
      total = np.sum(g[at] * (y[at] - x[at]) / s[at])
      peak = at & (np.abs(x) == amax)
      share = fmt.element.max * (s[peak] / amax) ** 2 / peak.sum()
      out[peak] += np.sign(x[peak]) * share * total
    return out

  @parameterized.parameters(*ABSMAX)
  def test_absmax(self, name):
    self.check_absmax(name)

  @parameterized.parameters(*others(*ABSMAX, 'uint4_g32'))
  @pytest.mark.slow
  def test_absmax_in_more_kinds(self, name):
    self.check_absmax(name)

  def check_absmax(self, name):
    fmt, x = formats.get(name), input_for(name).copy()
    x[1] = 0
    x[0, 3] = -x[0, 5]
    g = data(x.shape, seed=1)
    y, dx = fake(x, g, fmt, backward='absmax')
    s = scales_of(quantize(x, fmt))
    s[s == 0] = 1
    want = self.absmax_gradient(x, y, g, s, fmt)
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)
    self.assertGreater(np.abs(np.asarray(dx) - g).max(), 1e-3)

  def test_absmax_worked_example(self):
    """F / amax as scale: X = (.3, -.7, 1.1, -2), g = (1, 2, -1, .5)."""
    fmt = formats.per_channel(formats.get('e2m1'))
    x = np.array([[0.3, -0.7, 1.1, -2.0]], np.float32)
    g = np.array([[1, 2, -1, 0.5]], np.float32)
    y, dx = fake(x, g, fmt, backward='absmax')
    np.testing.assert_allclose(y, [[1 / 3, -2 / 3, 1, -2]], rtol=1e-6)
    np.testing.assert_allclose(dx, [[1, 2, -1, 0.4]], rtol=1e-5)

  def test_absmax_shares_ties_evenly(self):
    fmt = formats.per_channel(formats.get('e2m1'))
    x = np.array([[2.0, -2.0, 1.1, 0.3]], np.float32)
    g = np.array([[1, 1, 1, 1]], np.float32)
    y, dx = fake(x, g, fmt, backward='absmax')
    total = float(np.sum((np.asarray(y) - x) * 3))
    extra = np.asarray(dx) - g
    np.testing.assert_allclose(
      extra, [[total / 12, -total / 12, 0, 0]], atol=1e-6
    )

  def test_absmax_is_the_derivative_of_its_surrogate(self):
    """Rounding of elements and scale held fixed: y = (x / s + e) s(x)."""
    x = np.array([[0.3, -0.7, 0.45, -2.0]], np.float32)
    g = np.array([[1, 2, -1, 0.5]], np.float32)
    fmt = formats.per_channel(formats.get('e2m1'))
    y, dx = fake(x, g, fmt, backward='absmax')
    x, y = x.astype(np.float64), np.asarray(y, np.float64)
    residual = (y - x) / (2 / 6)

    def loss(x):
      return np.sum(g * (x + residual * np.abs(x).max() / 6))

    h = 1e-6
    for i in range(4):
      step = np.zeros_like(x)
      step[0, i] = h
      slope = (loss(x + step) - loss(x - step)) / (2 * h)
      self.assertAlmostEqual(float(dx[0, i]), slope, places=5)

  @pytest.mark.slow
  def test_absmax_vanishes_with_precision(self):
    names = 'int3_channel', 'int5_channel', 'int8_channel'
    x, g = data(), data(seed=1)
    size = []
    for name in names:
      _, dx = fake(x, g, formats.get(name), backward='absmax')
      size.append(float(np.abs(np.asarray(dx) - g).max()))
    self.assertEqual(size, sorted(size, reverse=True))
    self.assertGreater(size[0], 10 * size[-1])

  @parameterized.parameters('clipped', 'absmax')
  def test_gradients_keep_their_bits_where_nothing_is_masked(self, backward):
    self.check_bits_of_gradients(backward, jnp.bfloat16)

  @pytest.mark.slow
  def test_trusted_gradients_keep_their_bits(self):
    self.check_bits_of_gradients('trust', jnp.bfloat16)

  @parameterized.parameters('clipped', 'trust', 'absmax')
  @pytest.mark.slow
  def test_float32_gradients_keep_their_bits(self, backward):
    self.check_bits_of_gradients(backward, jnp.float32)

  def check_bits_of_gradients(self, backward, dtype):
    # Numbers of the format: no rounding error, nothing beyond the range.
    x = np.tile([6, -4, 3, -2, 1.5, 1, -0.5, 0], (2, 4)).astype(dtype)
    for c in COTANGENTS:
      g = np.full(x.shape, c, dtype)
      y, dx = fake(x, g, formats.mxfp4, backward=backward)
      assert_bits(y, x)
      assert_bits(dx, g)

  def test_poisoned_blocks(self):
    x = data().copy()
    x[0, 3] = np.nan
    for backward, options in (
      ('identity', {}),
      ('clipped', {'scale_rule': 'floor', 'backward': 'clipped'}),
      ('trust', {'scale_rule': 'floor', 'backward': 'trust'}),
      ('absmax', {'backward': 'absmax'}),
    ):
      y, dx = fake(x, np.ones_like(x), formats.mxfp4, **options)
      self.assertTrue(np.isnan(y[0, :32]).all())
      self.assertTrue(np.isfinite(np.asarray(dx)[:, 32:]).all(), backward)
      self.assertTrue(np.isfinite(np.asarray(dx)[1]).all(), backward)


class LearnedStepTest(parameterized.TestCase):
  # x / s = -6.5, -2.1, -.25, .55, 1.3, 4.5 with s = .2, int3: F = 3.
  X = np.array([[-1.3, -0.42, -0.05, 0.11, 0.26, 0.9, 0, 0]], np.float32)
  S = np.full((1, 1), 0.2, np.float32)

  def test_by_hand(self):
    fmt = formats.get('int3_channel')
    factor = 1 / math.sqrt(8 * 3)
    slopes = np.array([-3, 0.1, 0.25, 0.45, -0.3, 3, 0, 0])
    inside = [0, 1, 1, 1, 1, 0, 1, 1]
    for i in range(8):
      g = np.zeros((1, 8), np.float32)
      g[0, i] = 1
      y, dx, ds = fake_with(self.X, self.S, g, fmt, backward='lsq')
      np.testing.assert_allclose(dx, g * inside, atol=0)
      np.testing.assert_allclose(ds, [[slopes[i] * factor]], atol=2e-6)
    np.testing.assert_allclose(
      y, [[-0.6, -0.4, 0, 0.2, 0.2, 0.6, 0, 0]], rtol=1e-6
    )

  def test_finite_differences_of_the_surrogate(self):
    """y = s (clip(x / s) + e) with the rounding error e held fixed."""
    fmt = formats.get('int4_g32')
    x, g = data((2, 64)) * 3, data((2, 64), seed=1)
    s = np.array([[0.5, 0.25], [1, 0.3]], np.float32)
    y, _, ds = fake_with(x, s, g, fmt, backward='lsq')
    blocks = x.reshape(2, 2, 32).astype(np.float64)
    scale = s[..., None].astype(np.float64)
    v = blocks / scale
    error = np.asarray(y, np.float64).reshape(v.shape) / scale
    error = error - np.clip(v, -7, 7)

    def loss(scale):
      y = scale * (np.clip(blocks / scale, -7, 7) + error)
      return np.sum(g.reshape(v.shape) * y, -1)

    h = 1e-7
    slope = (loss(scale + h) - loss(scale - h)) / (2 * h)
    np.testing.assert_allclose(
      ds, slope / math.sqrt(32 * 7), rtol=1e-4, atol=1e-5
    )

  def test_the_count_leaves_padding_out(self):
    """n elements share a scale, not the padding that fills their block."""
    x = np.array([[0.3, -0.8, 1.1, 0.26, 0.9]], np.float32)
    g = np.ones_like(x)
    slope = (np.clip(np.round(x / 0.2), -7, 7) - x / 0.2).sum()
    for name in ('int4_channel', 'int4_g32'):
      _, _, ds = fake_with(x, self.S, g, formats.get(name), backward='lsq')
      want = slope / math.sqrt(5 * 7)
      np.testing.assert_allclose(ds, [[want]], rtol=1e-4, err_msg=name)

  def test_two_level_scales(self):
    """dy / d(block scale) carries the tensor scale."""
    x, g = data((1, 16)), data((1, 16), seed=1)
    s, outer = np.full((1, 1), 2.0, np.float32), 0.125
    y, _, ds = fake_with(
      x, s, g, formats.nvfp4, tensor_scale=outer, backward='lsq'
    )
    one, _, whole = fake_with(
      x, s * outer, g, formats.grouped(formats.get('e2m1'), 16), backward='lsq'
    )
    np.testing.assert_array_equal(y, one)
    np.testing.assert_allclose(ds, outer * np.asarray(whole), rtol=1e-6)

  @pytest.mark.slow
  def test_a_step_down_the_gradient_reduces_the_loss(self):
    fmt = formats.get('int3_channel')
    x = data((1, 64))
    s = np.full((1, 1), 0.2, np.float32)
    losses = []
    for _ in range(30):
      y, _, _ = fake_with(x, s, x, fmt, backward='lsq')
      losses.append(float(np.mean((np.asarray(y) - x) ** 2)))
      g = 2 * (np.asarray(y) - x) / x.size
      _, _, ds = fake_with(x, s, g, fmt, backward='lsq')
      s = s - 3 * np.asarray(ds)
    self.assertLess(losses[-1], 0.5 * losses[0])

  def test_misuse(self):
    x = jnp.ones((2, 32))
    with self.assertRaisesRegex(ValueError, "backward='lsq'.*fake_quant_with"):
      lowbit_jax.fake_quant(x, formats.get('int4_g32'), backward='lsq')
    with self.assertRaisesRegex(ValueError, "'absmax'.*use fake_quant"):
      lowbit_jax.fake_quant_with(
        x, jnp.ones((2, 1)), formats.get('int4_g32'), backward='absmax'
      )
    codes = jnp.full((2, 1), 127, jnp.uint8)
    with self.assertRaisesRegex(TypeError, 'lsq.*float'):
      lowbit_jax.fake_quant_with(x, codes, formats.mxfp4, backward='lsq')
    with self.assertRaisesRegex(TypeError, 'lsq.*float'):
      lowbit_jax.fake_quant_with(
        x, None, formats.get('int8_tensor'), tensor_scale=1.0, backward='lsq'
      )
    for f, args in (
      (lowbit_jax.fake_quant, ()),
      (lowbit_jax.fake_quant_with, (jnp.ones((2, 1)),)),
    ):
      with self.assertRaisesRegex(ValueError, "backward='ste' is not one of"):
        f(x, *args, formats.get('int4_g32'), backward='ste')


class WithTest(parameterized.TestCase):
  @parameterized.parameters(*WITH)
  def test_every_kind_of_scale(self, name):
    self.check_scale(name)

  @parameterized.parameters(*others(*WITH))
  @pytest.mark.slow
  def test_more_kinds_of_scale(self, name):
    self.check_scale(name)

  def check_scale(self, name):
    fmt, x = formats.get(name), input_for(name)
    g = data(x.shape, seed=1)
    q = quantize(x, fmt)
    want = round_trip(x, fmt)
    kwargs = dict(tensor_scale=q.tensor_scale, zero_point=q.zero_point)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    stored = [q.scale]
    if q.scale is not None and q.scale.dtype == jnp.uint8:
      table = fmt.scale.values().astype(np.float32)
      stored.append(table[np.asarray(q.scale)])

    @functools.partial(jax.jit, static_argnames='backward')
    def f(x, scale, g, backward):
      y, vjp = jax.vjp(
        lambda x: lowbit_jax.fake_quant_with(
          x, scale, fmt, backward=backward, **kwargs
        ),
        x,
      )
      return y, vjp(g)[0]

    for scale, backward in zip(stored, ('identity', 'clipped'), strict=False):
      y, dx = f(x, scale, g, backward)
      assert_bits(y, want)
      if backward == 'identity':
        assert_bits(dx, g)
      else:
        passed = np.asarray(dx) == g
        self.assertTrue((passed | (np.asarray(dx) == 0)).all())
        self.assertGreater(passed.mean(), 0.8)

  def test_the_scale_gets_no_gradient_but_from_lsq(self):
    x, g = data((2, 64)), data((2, 64), seed=1)
    s = np.full((2, 2), 0.5, np.float32)

    @jax.jit
    def slopes(x, s, g):
      fmt = formats.get('int4_g32')
      kinds = 'identity', 'clipped', 'trust'
      return [fake_with(x, s, g, fmt, backward=kind)[2] for kind in kinds]

    for ds in slopes(x, s, g):
      np.testing.assert_array_equal(ds, np.zeros_like(s))

  def test_learned_power_of_two_scales(self):
    """The rounding of the scale to E8M0 counts as the identity."""
    x, g = data((1, 32)), data((1, 32), seed=1)
    rough = np.full((1, 1), 0.3, np.float32)  # rounds to 1/4
    exact = np.full((1, 1), 0.25, np.float32)
    y, _, ds = fake_with(x, rough, g, formats.mxfp4, backward='lsq')
    z, _, dz = fake_with(x, exact, g, formats.mxfp4, backward='lsq')
    assert_bits(y, z)
    assert_bits(ds, dz)
    self.assertNotEqual(float(ds[0, 0]), 0)

  def test_bfloat16_scales_get_bfloat16_gradients(self):
    fmt = formats.grouped(formats.get('int4'), 32, formats.bfloat16)
    x, g = jnp.asarray(data((1, 32))), jnp.asarray(data((1, 32), seed=1))
    scale = jnp.full((1, 1), 0.25, jnp.bfloat16)
    _, dx, ds = fake_with(x, scale, g, fmt, backward='lsq')
    self.assertEqual((dx.dtype, ds.dtype), (jnp.float32, jnp.bfloat16))

  def test_narrow_inputs(self):
    scale = np.full((3, 3), 0.25, np.float32)
    for dtype in NARROW:
      x, g = data().astype(dtype), data(seed=1).astype(dtype)
      for backward in ('identity', 'lsq'):
        y, dx, ds = jax.eval_shape(
          functools.partial(
            fake_with, fmt=formats.get('int4_g32'), backward=backward
          ),
          x,
          scale,
          g,
        )
        self.assertEqual((y.dtype, dx.dtype), (dtype, dtype))
        self.assertEqual(ds.dtype, jnp.float32)


def equations(jaxpr):
  """All equations, those of inner jaxprs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for param in eqn.params.values():
      for inner in param if isinstance(param, (tuple, list)) else (param,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


class CotangentTest(parameterized.TestCase):
  def assert_wide(self, vjp, g):
    """No cotangent passes through a dtype narrower than that of `g`."""
    jaxpr = jax.make_jaxpr(vjp)(g)
    tainted = set(jaxpr.jaxpr.invars)
    dtypes = {v.aval.dtype for v in tainted}
    for eqn in equations(jaxpr.jaxpr):
      for v in eqn.outvars:
        dtypes.add(v.aval.dtype)
    narrow = {
      d
      for d in dtypes
      if jnp.issubdtype(d, jnp.floating) and d.itemsize < g.dtype.itemsize
    }
    self.assertEmpty(narrow)
    casts = [
      e
      for e in equations(jaxpr.jaxpr)
      if e.primitive.name == 'convert_element_type'
      and jnp.issubdtype(e.invars[0].aval.dtype, jnp.floating)
      and not jnp.issubdtype(e.outvars[0].aval.dtype, jnp.floating)
    ]
    self.assertEmpty(casts)

  @parameterized.parameters('identity', 'clipped', 'trust', 'absmax')
  def test_of_fake_quant(self, backward):
    self.check_fake_quant('mxfp4', backward)

  @parameterized.parameters(
    ('nvfp4', 'absmax'), ('nf4_g64', 'absmax'), ('uint4_g32', 'clipped'),
    ('e4m3fn_tensor', 'absmax'), ('mxfp4_32x32', 'trust'),
  )  # fmt: skip
  def test_of_other_kinds(self, name, backward):
    self.check_fake_quant(name, backward)

  @parameterized.product(
    name=(*KINDS, *MORE_KINDS),
    backward=('identity', 'clipped', 'trust', 'absmax'),
  )
  @pytest.mark.slow
  def test_of_every_kind(self, name, backward):
    if name != 'uint4_g32' or backward != 'absmax':
      self.check_fake_quant(name, backward)

  def check_fake_quant(self, name, backward):
    fmt, dtype = formats.get(name), jnp.dtype(jnp.bfloat16)
    x = jax.ShapeDtypeStruct((3, 70), dtype)

    def f(x, g):
      y, vjp = jax.vjp(
        lambda x: lowbit_jax.fake_quant(x, fmt, backward=backward), x
      )
      self.assert_wide(vjp, jax.ShapeDtypeStruct(y.shape, y.dtype))
      return vjp(g)

    (dx,) = jax.eval_shape(f, x, x)
    self.assertEqual(dx.dtype, dtype)

  @parameterized.parameters('identity', 'clipped', 'trust', 'lsq')
  def test_of_fake_quant_with(self, backward):
    def f(x, scale):
      y, vjp = jax.vjp(
        lambda x, s: lowbit_jax.fake_quant_with(
          x, s, formats.mxfp4, backward=backward
        ),
        x,
        scale,
      )
      self.assert_wide(vjp, jax.ShapeDtypeStruct(y.shape, y.dtype))
      return vjp(y)

    dx, ds = jax.eval_shape(
      f,
      jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16),
      jax.ShapeDtypeStruct((3, 3), jnp.float32),
    )
    self.assertEqual((dx.dtype, ds.dtype), (jnp.bfloat16, jnp.float32))

  def test_a_planted_cast_is_seen(self):
    x = jnp.ones((2, 2))
    y, vjp = jax.vjp(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x)
    with self.assertRaises(AssertionError):
      self.assert_wide(vjp, y)


class TransformTest(parameterized.TestCase):
  def test_vmap_is_a_loop(self):
    self.check_vmap('int8_tensor')

  @parameterized.parameters('mxfp4', 'nvfp4')
  @pytest.mark.slow
  def test_vmap_is_a_loop_over_blocks(self, name):
    self.check_vmap(name)

  def check_vmap(self, name):
    fmt = formats.get(name)
    x, g = data((3, 2, 40)), data((3, 2, 40), seed=1)

    def f(x, g):
      y, vjp = jax.vjp(
        lambda x: lowbit_jax.fake_quant(x, fmt, backward='absmax'), x
      )
      return y, vjp(g)[0]

    y, dx = map(np.asarray, jax.jit(jax.vmap(f))(x, g))
    one = jax.jit(f)
    for i in range(3):
      z, dz = one(x[i], g[i])
      assert_bits(y[i], z)
      np.testing.assert_allclose(dx[i], dz, rtol=1e-6, atol=1e-6)

  @pytest.mark.slow
  def test_scan_and_remat(self):
    w, x = data((3, 32, 32)) / 8, data((2, 32), seed=1)

    def loss(w, wrap):
      def layer(x, w):
        fmt = formats.get('int4_g32')
        w = lowbit_jax.fake_quant(w, fmt, axis=-2, backward='clipped')
        return jnp.tanh(x @ w), None

      return jnp.sum(jax.lax.scan(wrap(layer), x, w)[0])

    plain = jax.jit(jax.grad(lambda w: loss(w, lambda f: f)))(w)
    remat = jax.jit(jax.grad(lambda w: loss(w, jax.checkpoint)))(w)
    np.testing.assert_allclose(plain, remat, rtol=1e-5, atol=1e-7)
    self.assertGreater(float(jnp.abs(plain).max()), 0)

  @pytest.mark.slow
  def test_grad_of_jit_and_jit_of_grad(self):
    x = jnp.asarray(data())

    def f(x):
      return jnp.sum(x * lowbit_jax.fake_quant(x, formats.get('int4_g32')))

    a = jax.grad(jax.jit(f))(x)
    b = jax.jit(jax.grad(f))(x)
    np.testing.assert_allclose(a, b, rtol=1e-6)


class HigherOrderTest(parameterized.TestCase):
  """Derivatives of x + stop_gradient(fake_quant(x) - x) and its like, with the
  slopes of every estimator held fixed."""

  def test_forward_over_reverse(self):
    self.check(('clipped', 'lsq'), 'forward')

  def test_reverse_over_reverse(self):
    self.check(('identity', 'absmax'), 'reverse')

  @parameterized.parameters('forward', 'reverse')
  @pytest.mark.slow
  def test_every_estimator(self, mode):
    self.check(('identity', 'clipped', 'trust', 'absmax', 'lsq'), mode)

  def check(self, backwards, mode):
    """Derivatives of a gradient, and of the loss itself in forward mode."""
    x, t, c = (data((2, 64), seed=i) for i in range(3))
    fmt = formats.mxfp4
    u = 2 * x
    s = scales_of(quantize(u, fmt)).astype(np.float32)
    y = round_trip(u, fmt)
    # E2M1 reaches 6, and its numbers are at most 2 apart.
    inside = np.abs(u) <= 6 * s
    trusted = np.abs(u - y) <= s
    blocks = u.reshape(2, 2, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    peak = np.where(np.abs(blocks) == amax, np.sign(blocks), 0)
    peak *= 6 * (s.reshape(blocks.shape) / amax) ** 2
    error = ((y - u) / s).reshape(blocks.shape)
    step = np.where(inside, (y - u) / s, np.sign(u) * 6) / np.sqrt(32 * 6)

    def absmax(u):
      b = u.reshape(blocks.shape)
      move = error * jnp.sum(peak * b, -1, keepdims=True)
      return (b + move).reshape(u.shape)

    def lsq(u, scale):
      return jnp.where(inside, u, 0) + step * jnp.repeat(scale, 32, -1)

    linear = {
      'identity': lambda u: u,
      'clipped': lambda u: jnp.where(inside, u, 0),
      'trust': lambda u: jnp.where(trusted, u, 0),
      'absmax': absmax,
      'lsq': lsq,
    }

    def estimators(backward):
      if backward == 'lsq':
        fake = functools.partial(lowbit_jax.fake_quant_with, fmt=fmt)
        given = (u, s[:, ::32])
      else:
        fake = functools.partial(lowbit_jax.fake_quant, fmt=fmt)
        given = (u,)
      move = linear[backward]
      return (
        lambda *u: fake(*u, backward=backward),
        lambda *u: y + (move(*u) - move(*given)),
      )

    def derivatives(f, point, tangent):
      def loss(x, *scale):
        return jnp.sum(c * f(2 * x, *scale) ** 3)

      gradient = jax.grad(loss, range(len(point)))
      if mode == 'forward':
        both = lambda *point: (loss(*point), gradient(*point))
        return jax.jvp(both, point, tangent)[1]
      return jax.vjp(gradient, *point)[1](tangent)

    @jax.jit
    def everything(x, scale, t):
      out = {}
      for backward in backwards:
        point, tangent = (x,), (t,)
        if backward == 'lsq':
          point, tangent = (x, scale), (t, 0.1 * scale)
        out[backward] = [
          derivatives(f, point, tangent) for f in estimators(backward)
        ]
      return out

    results = everything(x, jnp.asarray(s[:, ::32]), t)
    for backward, (got, want) in results.items():
      for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        largest = np.abs(b).max()
        self.assertGreater(largest, 1, backward)
        np.testing.assert_allclose(a, b, 1e-4, 1e-5 * largest, err_msg=backward)

  @parameterized.parameters(
    ('identity', 0), ('clipped', 1), ('trust', 1), ('absmax', 8)
  )
  def test_what_is_saved(self, backward, per_element):
    """Masks take a byte for each element, absmax two numbers."""
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)

    def pull(x):
      f = functools.partial(lowbit_jax.fake_quant, fmt=formats.mxfp4)
      return jax.vjp(lambda x: f(x, backward=backward), x)[1]

    saved = jax.tree.leaves(jax.eval_shape(pull, x))
    size = sum(t.size * t.dtype.itemsize for t in saved)
    self.assertEqual(size, per_element * 4 * 64)


if __name__ == '__main__':
  absltest.main()
