"""Stochastic rounding: unbiased, reproducible on any device, well mixed bits.

Bounds are multiples of standard errors of the sample sizes used; keys are
fixed, so every test is deterministic.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )

import functools  # noqa: E402
import math  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl.testing import absltest, parameterized  # noqa: E402
from jax.sharding import (
  NamedSharding,  # noqa: E402
  PartitionSpec as P,  # noqa: E402
)

import lowbit_jax  # noqa: E402
from lowbit_jax import formats, numerics, qarray  # noqa: E402
from lowbit_pallas.arith import codec, hashing  # noqa: E402
from tests import kinds  # noqa: E402

KEYS = 4096

# Each kind of scale; `ELEMENTS` has the elements.
BLOCK_FORMATS = 'mxfp4', 'nvfp4', 'uint4_g32', 'mxfp4_32x32'
MORE_FORMATS = tuple(n for n in kinds.block_formats() if n not in BLOCK_FORMATS)
ELEMENTS = 'e4m3fn', 'e3m2', 'e3m0', 'e8m0', 'int4', 'uint4', 'nf4'
MORE_ELEMENTS = (
  'e5m2', 'e4m3', 'e3m4', 'e4m3fnuz', 'e2m3', 'e2m1', 'e1m2', 'e4m0', 'ue4m3',
  'int8', 'int2', 'uint8', 'ternary',
)  # fmt: skip
# Fractions of the block maximum, which comes first and fixes the scale.
FRACTIONS = (1, -0.43, 0.11, 0.77, -0.88, 0.3, -0.015, 0.6)


@functools.cache
def keys(n: int = KEYS, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), n)


def neighbours(t, grid):
  """The largest grid value <= t and the smallest >= t."""
  low = grid[np.searchsorted(grid, t, side='right') - 1]
  high = grid[np.searchsorted(grid, t, side='left')]
  return low, high


def assert_unbiased(test, draws, t, grid):
  """Checks `draws` (n, k) of values `t` (k,) on the lattice `grid`.

  Each draw is one of two neighbours a <= t <= b; b with probability
  p = (t - a) / (b - a). The mean of n draws has standard error
  (b - a) sqrt(p (1 - p) / n).
  """
  n = draws.shape[0]
  for i, ti in enumerate(t):
    a, b = neighbours(ti, grid)
    got = np.unique(draws[:, i])
    test.assertContainsSubset(got.tolist(), [a, b], f't={ti}')
    p = (ti - a) / (b - a) if b > a else 0.0
    error = (b - a) * math.sqrt(p * (1 - p) / n)
    # The float32 product x * (1 / s) is off by at most 2^-23 of t.
    slack = abs(ti) * 2.0**-22
    bias = abs(np.mean(draws[:, i], dtype=np.float64) - ti)
    test.assertLessEqual(bias, 4 * error + slack, f't={ti} a={a} b={b}')
    if 0.01 < p < 0.99:
      test.assertLen(got, 2, f't={ti}')


class UnbiasedTest(parameterized.TestCase):
  @parameterized.parameters(*BLOCK_FORMATS)
  def test_block_format(self, name):
    self.check_block_format(name)

  @parameterized.parameters(*MORE_FORMATS)
  @pytest.mark.slow
  def test_more_block_formats(self, name):
    self.check_block_format(name)

  def check_block_format(self, name):
    fmt = formats.get(name)
    rule = 'rceil' if fmt.has_exponent_scale else fmt.scale_rule
    rule = 'absmax' if rule == 'absmean' else rule  # absmean saturates
    # 128 x 128 elements per key are many: let 32 rows share a key.
    rows = 32 if math.prod(fmt.block) > 2**12 else 1
    x = np.tile(np.float32(0.9) * np.array(FRACTIONS, np.float32), (rows, 1))

    @jax.jit
    @jax.vmap
    def draw(key):
      q = lowbit_jax.quantize(
        x, fmt, rounding='stochastic', key=key, scale_rule=rule
      )
      return qarray.element_values(q)[:rows, : x.shape[1]], q

    elements, q = draw(keys(KEYS // rows))
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0, 0], q)
    scale = 1.0
    if fmt.scale is not None:
      coded = one.scale.dtype == np.uint8
      scale = float(fmt.scale.values()[one.scale] if coded else one.scale)
    if fmt.tensor_scale:
      scale *= float(one.tensor_scale)
    zero = float(one.zero_point) if fmt.zero_point else 0.0
    t = x[0].astype(np.float64) / scale + zero
    values = fmt.element.values()
    grid = np.unique(values[np.isfinite(values)])
    grid = grid[np.abs(grid) <= fmt.element.max]
    # The scale itself is rounded: the maximum may lie beyond the range.
    inside = (t > grid[0]) & (t < grid[-1])
    self.assertGreaterEqual(inside.sum(), len(FRACTIONS) - 1)
    draws = np.asarray(elements).reshape(-1, x.shape[1])
    self.assertEqual(draws.shape[0], KEYS)
    assert_unbiased(self, draws[:, inside], t[inside], grid)

  @pytest.mark.slow
  def test_floor_is_biased_where_it_saturates(self):
    x = np.full((1, 32), 7.0, np.float32)

    def mean(rule):
      q = jax.jit(
        jax.vmap(
          lambda key: lowbit_jax.dequantize(
            lowbit_jax.quantize(
              x, formats.mxfp4, rounding='stochastic', key=key, scale_rule=rule
            )
          )
        )
      )(keys(128))
      return float(q.mean())

    self.assertEqual(mean('floor'), 6.0)
    self.assertAlmostEqual(mean('rceil'), 7.0, delta=4 / math.sqrt(128 * 32))

  @parameterized.parameters(*ELEMENTS)
  def test_element_format(self, name):
    self.check_element(name)

  @parameterized.parameters(*MORE_ELEMENTS)
  @pytest.mark.slow
  def test_more_element_formats(self, name):
    self.check_element(name)

  def check_element(self, name):
    element = formats.get(name)
    values = element.values()
    grid = np.unique(values[np.isfinite(values)])
    grid = grid[np.abs(grid) <= min(element.max, 2.0**100)]
    grid = grid[np.abs(grid) >= 2.0**-100] if name == 'e8m0' else grid
    at = np.linspace(0, len(grid) - 2, 5).astype(int)
    x = [
      grid[i] + f * (grid[i + 1] - grid[i])
      for i, f in zip(at, (0.125, 0.3, 0.5, 0.77, 0.95), strict=True)
    ]
    x = np.array([*x, grid[at[2]]], np.float32)
    draw = jax.jit(
      jax.vmap(
        lambda key: lowbit_jax.round_to(
          x, element, rounding='stochastic', key=key
        )
      )
    )
    draws = np.asarray(draw(keys()))
    grid = grid.astype(np.float32).astype(np.float64)
    assert_unbiased(self, draws, x.astype(np.float64), grid)

  def test_numbers_of_the_format_never_move(self):
    self.check_numbers('e4m3fn')

  @pytest.mark.slow
  def test_numbers_of_more_formats_never_move(self):
    self.check_numbers('int8', 'nf4', 'e2m1', 'e3m2', 'e3m0')

  def check_numbers(self, *names):
    for name in names:
      element = formats.get(name)
      values = element.values()
      x = np.unique(values[np.isfinite(values)]).astype(np.float32)
      x = x[np.abs(x) <= element.max]
      draw = jax.jit(
        jax.vmap(
          lambda key: lowbit_jax.round_to(
            x,
            element,
            rounding='stochastic',  # noqa: B023
            key=key,
          )
        )
      )
      np.testing.assert_array_equal(draw(keys(64)), np.tile(x, (64, 1)), name)

  def test_fake_quant_draws_the_same(self):
    self.check_fake_quant(formats.mxfp4)

  @pytest.mark.slow
  def test_fake_quant_of_nvfp4_draws_the_same(self):
    self.check_fake_quant(formats.nvfp4)

  def check_fake_quant(self, fmt):
    x, key = data(4, 64), jax.random.key(0)
    got = jax.jit(
      lambda x: lowbit_jax.fake_quant(x, fmt, rounding='stochastic', key=key)
    )(x)
    want = dequantize(quantize(x, key, fmt))
    np.testing.assert_array_equal(got, want)


class RandomBitsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5, 8, 12)
  def test_every_draw_of_a_few_bits(self, n):
    """Over all 2^n numbers, up happens for |p - frac| <= 2^-(n + 1)."""
    j = np.arange(2**n, dtype=np.uint32)
    # Bits below the n used ones must not matter.
    random = (j << (32 - n)) | np.uint32((1 << (32 - n)) - 1 if n % 2 else 0)
    fractions = np.arange(97, dtype=np.float32) / 96
    rule = jax.jit(lambda random, x: codec.stochastic(random, n)(x))
    up = np.asarray(rule(random[:, None], fractions[None] + np.float32(4))) - 4
    # A fraction that float32 cannot hold next to 4 is the one that counts.
    fractions = (fractions + np.float32(4)).astype(np.float64) - 4
    self.assertContainsSubset(np.unique(up).tolist(), [0.0, 1.0])
    p = up.mean(0)
    self.assertLessEqual(np.abs(p - fractions).max(), 2.0 ** -(n + 1))
    exact = fractions * 2**n == np.round(fractions * 2**n)
    self.assertGreater(exact.sum(), 1)
    np.testing.assert_array_equal(p[exact], fractions[exact])
    # Odd and even draws mirror each other: no bias on average.
    self.assertAlmostEqual(np.mean(p - fractions), 0, delta=2.0 ** -(n + 3))

  def test_two_bits_give_quarters(self):
    x = np.array([0.25, 0.3, 0.5, 0.9], np.float32)
    draw = jax.jit(
      jax.vmap(
        lambda key: lowbit_jax.round_to(
          x, formats.get('int4'), rounding='stochastic', key=key, random_bits=2
        )
      )
    )
    p = np.asarray(draw(keys())).mean(0)
    # j + 1/2 < 4 frac: 0.3 rounds up for j = 0 only, 0.9 for all four.
    np.testing.assert_allclose(p, [0.25, 0.25, 0.5, 1], atol=4 * 0.5 / 64)
    self.assertEqual(p[3], 1)

  def test_argument_of_quantize(self):
    self.check_argument((2, 0.25))

  @pytest.mark.slow
  def test_the_fewest_and_the_most_bits(self):
    self.check_argument((1, 0.5), (23, 0.3))

  def check_argument(self, *cases):
    x = np.tile(np.array([7, 0.3], np.float32), (1, 16))
    for bits, p in cases:
      q = jax.jit(
        jax.vmap(
          lambda key: qarray.element_values(
            lowbit_jax.quantize(
              x,
              formats.get('int4_g32'),
              rounding='stochastic',
              key=key,
              random_bits=bits,
            )
          )
        )
      )(keys(512))  # noqa: B023
      got = np.asarray(q)[..., 1::2].mean()
      self.assertAlmostEqual(got, p, delta=4 * 0.5 / math.sqrt(512 * 16))


@functools.partial(jax.jit, static_argnames=('fmt', 'axis'))
def quantize(x, key, fmt, axis=None):
  return lowbit_jax.quantize(x, fmt, axis=axis, rounding='stochastic', key=key)


@functools.partial(jax.jit, static_argnums=1)
def random_words(key, shape, *origin):
  return numerics.random_words(key, shape, *origin)


@jax.jit
def dequantize(q):
  return lowbit_jax.dequantize(q)


def data(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


class SameBitsTest(parameterized.TestCase):
  def test_jit_and_eager(self):
    self.check_eager('mxfp4')

  @pytest.mark.slow
  def test_jit_and_eager_with_zero_points(self):
    self.check_eager('uint4_g32')

  def check_eager(self, name):
    fmt, x, key = formats.get(name), data(4, 64), jax.random.key(1)
    assert_same(
      lowbit_jax.quantize(x, fmt, rounding='stochastic', key=key),
      quantize(x, key, fmt),
    )

  def test_vmap_over_keys_is_a_loop(self):
    self.check_vmap('nvfp4')

  @pytest.mark.slow
  def test_more_vmaps_over_keys_are_loops(self):
    self.check_vmap('int3_g32')

  def check_vmap(self, name):
    fmt, x, ks = formats.get(name), data(3, 5, 40), keys(3)
    got = jax.jit(
      jax.vmap(
        lambda x, k: lowbit_jax.quantize(x, fmt, rounding='stochastic', key=k)
      )
    )(x, ks)
    got = jax.tree.map(np.asarray, got)
    for i in range(3):
      one = quantize(x[i], ks[i], fmt)
      assert_same(jax.tree.map(lambda leaf: leaf[i], got), one)  # noqa: B023

  def test_one_key_under_vmap_repeats_its_bits(self):
    x = np.tile(data(1, 64), (3, 1))

    def f(x):
      return lowbit_jax.round_to(
        x, formats.get('int4'), rounding='stochastic', key=jax.random.key(0)
      )

    got, whole = jax.jit(jax.vmap(f))(x), jax.jit(f)(x)
    np.testing.assert_array_equal(got[0], got[1])
    self.assertFalse((whole[0] == whole[1]).all())

  def test_typed_and_raw_keys_agree(self):
    x = data(4, 64)
    raw, typed = jax.random.PRNGKey(7), jax.random.key(7)
    assert_same(
      quantize(x, raw, formats.mxfp4), quantize(x, typed, formats.mxfp4)
    )
    four = jax.random.key(7, impl='rbg')
    a, b = (np.asarray(random_words(k, x.shape)) for k in (four, typed))
    self.assertFalse((a == b).any())

  def test_different_keys_differ(self):
    x = data(8, 64)
    codes = [
      np.asarray(quantize(x, key, formats.get('int8_g32')).codes)
      for key in (
        jax.random.key(0),
        jax.random.key(1),
        jax.random.fold_in(jax.random.key(0), 0),
        jax.random.fold_in(jax.random.key(0), 1),
      )
    ]
    for i in range(4):
      for j in range(i):
        # Rounding up or down is a coin of bias frac: equal in 2/3 of cases.
        same = (codes[i] == codes[j]).mean()
        self.assertBetween(same, 2 / 3 - 0.1, 2 / 3 + 0.1)

  def test_the_same_bits_on_1_and_8_devices(self):
    self.check_devices((8, P(None, 'd')))

  @pytest.mark.slow
  def test_the_same_bits_on_other_numbers_of_devices(self):
    specs = P('d'), P(None, 'd')
    self.check_devices(*((n, spec) for n in (1, 2, 4, 8) for spec in specs))

  def check_devices(self, *cases):
    x, key, fmt = data(16, 256), jax.random.key(3), formats.nvfp4
    want = quantize(x, key, fmt)
    for n, spec in cases:
      mesh = jax.make_mesh(
        (n,), ('d',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n]
      )
      put = jax.device_put(x, NamedSharding(mesh, spec))
      self.assertLen(put.addressable_shards, n)
      assert_same(quantize(put, key, fmt), want)

  def test_shard_map_with_origin(self):
    self.check_shard_map('mxfp4', (8, P(None, 'd')))

  @parameterized.parameters('mxfp4', 'uint4_g32')
  @pytest.mark.slow
  def test_more_shard_maps_with_origin(self, name):
    self.check_shard_map(name, (2, P('d')), (8, P('d')), (8, P(None, 'd')))

  def check_shard_map(self, name, *cases):
    fmt = formats.get(name)
    x, key = data(16, 256), jax.random.key(3)
    want = quantize(x, key, fmt)
    for n, spec in cases:
      mesh = jax.make_mesh(
        (n,), ('d',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n]
      )
      rows = spec[0] == 'd'

      @jax.jit
      @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec, P()), out_specs=spec
      )
      def f(x, key):
        i = jax.lax.axis_index('d')
        start = (i * x.shape[0], 0) if rows else (0, i * x.shape[1])  # noqa: B023
        return lowbit_jax.quantize(
          x, fmt, rounding='stochastic', key=key, origin=(start, (16, 256))
        )

      assert_same(f(x, key), want)

  def test_origin_of_a_slice(self):
    x, key = data(8, 96), jax.random.key(0)
    whole = np.asarray(dequantize(quantize(x, key, formats.mxfp4)))

    @functools.partial(jax.jit, static_argnames='full')
    def part(x, full, start):
      origin = None if full is None else (start, full)
      return lowbit_jax.dequantize(
        lowbit_jax.quantize(
          x, formats.mxfp4, rounding='stochastic', key=key, origin=origin
        )
      )

    for r, c in ((3, 32), (0, 64)):
      want = whole[r : r + 2, c : c + 32]
      got = part(x[r : r + 2, c : c + 32], (8, 96), (r, c))
      np.testing.assert_array_equal(got, want)
    wrong = part(x[:2, 64:], None, (0, 64))
    self.assertFalse((wrong == want).all())

  def test_bits_belong_to_logical_elements(self):
    # int3 pads 5 to 8 on one axis, 3 to 8 on the other: the numbers agree.
    fmt = formats.get('int3_tensor')
    x, key = data(3, 5), jax.random.key(2)
    a, b = quantize(x, key, fmt, axis=-1), quantize(x, key, fmt, axis=0)
    self.assertEqual((a.pad, b.pad), ((3,), (5,)))
    np.testing.assert_array_equal(dequantize(a), dequantize(b))

  def test_bits_depend_on_the_index_alone(self):
    key = jax.random.key(2)
    flat, *others, one = jax.jit(
      lambda key: [
        numerics.random_words(key, shape)
        for shape in ((24,), (4, 6), (2, 3, 4), (24, 1), ())
      ]
    )(key)
    for words in others:
      np.testing.assert_array_equal(np.ravel(words), flat)
    np.testing.assert_array_equal(one, np.asarray(flat)[0])
    # Row-major: a transposed array has other bits.
    x = data(4, 6)
    f = jax.jit(
      lambda x: lowbit_jax.round_to(
        x, formats.get('int8'), rounding='stochastic', key=key
      )
    )
    self.assertFalse((np.asarray(f(x)) == np.asarray(f(x.T)).T).all())


def join(low, high) -> np.ndarray:
  """64-bit indices as Python integers."""
  low, high = (np.asarray(w).astype(object) for w in (low, high))
  return low + high * 2**32


class ElementIndexTest(parameterized.TestCase):
  def expected(self, shape, start, full):
    index = np.zeros(shape, object)
    for at in np.ndindex(*shape):
      flat = 0
      for i, s, n in zip(at, start, full, strict=True):
        flat = flat * n + (i + s)
      index[at] = flat
    return index

  @parameterized.parameters(
    ((2, 3), (0, 0), (2, 3)),
    ((2, 3), (5, 7), (40, 50)),
    ((2, 3), (65534, 65533), (2**16, 2**16)),
    ((3, 4), (69990, 69995), (70000, 70000)),
    ((3, 4), (61356, 47294), (70000, 70000)),  # crosses 2^32
    ((2, 2, 2), (2**20 - 2, 2**20 - 2, 2**20 - 2), (2**20, 2**20, 2**20)),
    ((2, 3), (3, 2**30), (1000, 2**31 - 1)),
    ((5,), (2**31 - 5,), (2**31,)),
    ((1, 4), (12345, 2**31 - 100), (2**20, 2**33)),
    ((4,), (2**31 + 5,), (2**33,)),
  )
  def test_against_python_integers(self, shape, start, full):
    want = self.expected(shape, start, full)
    low, high = jax.jit(lambda: hashing.element_index(shape, (start, full)))()
    if math.prod(full) <= 2**32:
      self.assertIsNone(high)
      high = np.zeros(shape, np.uint32)
    got = join(low, high)
    np.testing.assert_array_equal(got, want)

  def test_traced_starts(self):
    shape, full = (3, 4), (70000, 70000)
    f = jax.jit(lambda a, b: hashing.element_index(shape, ((a, b), full)))
    low, high = f(61356, 47294)
    got = join(low, high)
    want = self.expected(shape, (61356, 47294), full)
    np.testing.assert_array_equal(got, want)

  def test_the_high_word_changes_the_bits(self):
    key, full = jax.random.key(0), (2**20, 2**20)
    words = jax.jit(
      lambda row: numerics.random_words(key, (1, 64), ((row, 0), full))
    )
    a, b = words(0), words(4096)  # + 2^32
    self.assertEqual(int((np.asarray(a) == np.asarray(b)).sum()), 0)


N = 2**15


@functools.cache
def words(key: tuple[int, int] = (0, 0), start: int = 0) -> np.ndarray:
  """N consecutive words of raw key data."""
  raw = np.array(key, np.uint32)
  return np.asarray(_words(raw, start))


@jax.jit
def _words(raw, start):
  return numerics.random_words(raw, (N,), ((start,), (2**31,)))


def bit_matrix(w: np.ndarray) -> np.ndarray:
  """(n, 32) of 0 and 1."""
  return (w[:, None] >> np.arange(32, dtype=np.uint32)) & 1


KEY_DATA = (
  (0, 0),
  (0, 1),
  (0, 12345),
  (2**32 - 1, 2**32 - 1),
  (1, 0),
  (0x9E3779B9, 0xDEADBEEF),
)
FLIPS = tuple(1 << i for i in (0, 1, 5, 8, 14))


class HashTest(parameterized.TestCase):
  def assert_balanced(self, bits, z: float = 5):
    """Each column is a fair coin: |mean - 1/2| < z / (2 sqrt(n))."""
    worst = np.abs(bits.mean(0) - 0.5).max()
    self.assertLess(worst, z / 2 / math.sqrt(bits.shape[0]))

  @parameterized.parameters(*KEY_DATA)
  def test_bytes_are_uniform(self, *key):
    w = words(key)
    for shift in (0, 8, 16, 24):
      counts = np.bincount((w >> shift) & 255, minlength=256)
      chi2 = np.sum((counts - N / 256) ** 2) / (N / 256)
      # Chi-square of 255 degrees: mean 255, deviation sqrt(510) = 22.6.
      self.assertBetween(chi2, 255 - 5 * 22.6, 255 + 5 * 22.6)

  @parameterized.parameters(*KEY_DATA)
  def test_bits_are_fair_and_pairwise_independent(self, *key):
    bits = bit_matrix(words(key))
    self.assert_balanced(bits)
    r = np.corrcoef(bits.T) - np.eye(32)
    self.assertLess(np.abs(r).max(), 5 / math.sqrt(N))

  @parameterized.parameters(*KEY_DATA)
  def test_neighbouring_indices_are_independent(self, *key):
    w = words(key)
    for lag in (1, 2, 16, 32, 1024):
      flipped = bit_matrix(w[lag:] ^ w[:-lag])
      self.assert_balanced(flipped)
      r = np.corrcoef(w[lag:] / 2**32, w[:-lag] / 2**32)[0, 1]
      self.assertLess(abs(r), 5 / math.sqrt(N))

  @parameterized.parameters(0, 1)
  def test_neighbouring_keys_are_independent(self, word):
    for base in (0, 77, 2**31):
      for flip in (*FLIPS, 1 << 31):
        key, other = [5, 5], [5, 5]
        key[word], other[word] = base, base ^ flip
        a, b = words(tuple(key)), words(tuple(other))
        self.assert_balanced(bit_matrix(a ^ b))
        for lag in (1, 2, 32):
          same = max((a[lag:] == b[:-lag]).mean(), (a[:-lag] == b[lag:]).mean())
          self.assertLess(same, 0.01, f'{key} and {other} are one stream')

  def test_seeds_and_folds_are_independent(self):
    base = jax.random.key(0)
    streams = [jax.random.key(s) for s in range(4)]
    streams += [jax.random.fold_in(base, i) for i in range(4)]
    w = [np.asarray(random_words(k, (N,))) for k in streams]
    for i in range(len(w)):
      for j in range(i):
        self.assert_balanced(bit_matrix(w[i] ^ w[j]))
        r = np.corrcoef(w[i] / 2**32, w[j] / 2**32)[0, 1]
        self.assertLess(abs(r), 5 / math.sqrt(N))

  def test_avalanche(self):
    """Flipping one bit of the index flips each output bit half of the time."""
    base = words((3, 9))
    for flip in FLIPS:
      other = base[np.arange(N) ^ flip]
      self.assert_balanced(bit_matrix(base ^ other))

  def test_no_repeats(self):
    # A hash of N distinct indices has about N^2 / 2^33 collisions.
    collisions = N - np.unique(words((1, 2))).size
    self.assertLessEqual(collisions, 3)

  def test_sites_differ(self):
    i, key = np.arange(N, dtype=np.uint32), np.uint32([3, 4])
    draw = jax.jit(
      lambda s: hashing.random_bits(key, i, site=s), static_argnums=0
    )
    a, b = (np.asarray(draw(s)) for s in (0, 1))
    self.assert_balanced(bit_matrix(a ^ b))

  def test_dither_is_uniform_on_the_open_interval(self):
    u = jax.jit(lambda key: numerics.dither(key, (N,)))(jax.random.key(0))
    u = np.asarray(u, np.float64)
    self.assertGreaterEqual(u.min(), -0.5)
    self.assertLess(u.max(), 0.5)
    self.assertLess(abs(u.mean()), 5 * math.sqrt(1 / 12 / N))
    d = np.abs(np.sort(u) + 0.5 - (np.arange(N) + 0.5) / N).max()
    self.assertLess(d * math.sqrt(N), 2.3)


if __name__ == '__main__':
  absltest.main()
