"""Tests of the invertible transforms and of the Hadamard core below them.

u = 2^-24; bounds are those of the docstrings.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import transforms as tr
from lowbit_jax.transforms._unit import unit
from lowbit_pallas.arith import hadamard as core
from tests import compilation

U = 2.0**-24
N = 64
BLOCK = 16


def _rng(seed=0):
  return np.random.default_rng(seed)


def _normal(*shape, seed=0, dtype=np.float32):
  return _rng(seed).normal(size=shape).astype(dtype)


def _matrices(*shape, seed=0):
  noise = _normal(*shape, seed=seed) * 0.3 / np.sqrt(shape[-1])
  return np.eye(shape[-1], dtype=np.float32) + noise


# Tracing and compiling op by op is what costs time here.
hadamard = jax.jit(core.hadamard, static_argnames=('block', 'axis', 'inverse'))
random_signs = jax.jit(core.random_signs, static_argnums=1)
random_hadamard = jax.jit(tr.random_hadamard, static_argnames=('size', 'block'))


@jax.jit
def apply(t, x):
  return t.apply(x)


@jax.jit
def inverse(t, x):
  return t.inverse(x)


@functools.partial(jax.jit, static_argnames='axis')
def apply_dual(t, w, axis=-2):
  return t.apply_dual(w, axis)


@functools.cache
def _make(name):
  signs = _rng(3).choice([-1, 1], N).astype(np.int8)
  make = {
    'hadamard': lambda: tr.Hadamard(32),
    'signed': lambda: tr.Hadamard(BLOCK, signs=jnp.asarray(signs)),
    'signed_block': lambda: tr.Hadamard(BLOCK, signs=jnp.asarray(signs[:16])),
    'permutation': lambda: tr.Permutation(_rng(4).permutation(N)),
    'smoothing': lambda: tr.DiagonalSmoothing(_rng(5).uniform(0.1, 9, N)),
    'affine': lambda: tr.BlockAffine(_matrices(N // BLOCK, BLOCK, BLOCK)),
    'shared': lambda: tr.BlockAffine(_matrices(BLOCK, BLOCK)),
    'chain': lambda: tr.Chain(
      (
        tr.DiagonalSmoothing(_rng(6).uniform(0.5, 2, N)),
        tr.Permutation(_rng(7).permutation(N)),
        random_hadamard(jax.random.key(9), N, 32),
      )
    ),
    'long_chain': lambda: tr.Chain(
      (
        tr.DiagonalSmoothing(_rng(6).uniform(0.5, 2, N)),
        tr.Permutation(_rng(7).permutation(N)),
        tr.BlockAffine(_matrices(4, BLOCK, BLOCK, seed=8)),
        random_hadamard(jax.random.key(9), N, 32),
      )
    ),
  }
  return make[name]()


ORTHOGONAL = (
  'hadamard',
  'signed',
  'signed_block',
  'permutation',
)
SKEW = ('smoothing', 'affine', 'shared', 'chain', 'long_chain')
ALL = (*ORTHOGONAL, *SKEW)
# A sign or a matrix for every block alike; a chain of more; no signs.
VARIANTS = ('signed_block', 'shared', 'long_chain', 'hadamard')
KINDS = tuple(name for name in ALL if name not in VARIANTS)
# The members of the chain are of all other kinds.
FEW = ('affine', 'chain')
OTHERS = tuple(name for name in ALL if name not in FEW)


def _round_trip_bound(name):
  """Largest error of an entry, in units of the norm of its row."""
  if name == 'permutation':
    return 0
  if name == 'smoothing':
    return 3 * U
  if name in ORTHOGONAL:
    block = _make(name).block
    return (block + 1) * (np.sqrt(block) + 1) * U
  if name in ('affine', 'shared'):
    condition = np.linalg.cond(_make(name).matrix.astype(float)).max()
    return 4 * condition**2 * BLOCK * U
  rotation = 33 * (np.sqrt(32) + 1)
  if name == 'chain':
    return 4 * (rotation + 6) * U
  condition = np.linalg.cond(_matrices(4, BLOCK, BLOCK, seed=8)).max()
  return 4 * (4 * condition**2 * BLOCK + condition * rotation + 6) * U


def _sylvester(order):
  """The +-1 matrix from the parity of the common bits."""
  i = np.arange(order)
  common = i[:, None] & i
  bits = sum(common >> k & 1 for k in range(order.bit_length()))
  return 1.0 - 2.0 * (bits % 2)


def _hadamard_oracle(x, block):
  blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, block)
  return (blocks @ _sylvester(block) / np.sqrt(block)).reshape(x.shape)


class HadamardCoreTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4, 16, 64, 256)
  def test_matrix(self, order):
    matrix = core.hadamard_matrix(order)
    np.testing.assert_array_equal(matrix, _sylvester(order))
    np.testing.assert_array_equal(matrix @ matrix, order * np.eye(order))

  def test_order_four(self):
    np.testing.assert_array_equal(
      core.hadamard_matrix(4),
      [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]],
    )
    got = core.hadamard(np.float32([1, 2, 3, 4]), 4)
    np.testing.assert_array_equal(got, [5, -1, -2, 0])

  @parameterized.parameters(1, 2, 16, 32, 256, 1024)
  def test_against_float64(self, block):
    self._against_float64(block)

  @parameterized.parameters(8, 64, 128)
  @pytest.mark.slow
  def test_other_blocks_against_float64(self, block):
    self._against_float64(block)

  def _against_float64(self, block):
    x = _normal(5, 2 * block, seed=block)
    got = np.asarray(hadamard(x, block), np.float64)
    error = np.abs(got - _hadamard_oracle(x, block)).reshape(5, 2, block)
    norm = np.linalg.norm(x.reshape(5, 2, block), axis=-1, keepdims=True)
    chain = sum(r - 1 for r in core._radices(block)) + 2
    self.assertLessEqual((error / norm).max() / U, chain)

  @parameterized.parameters(0, -1, -2)
  def test_axes(self, axis):
    self._axes(axis)

  @parameterized.parameters(1, 2, -3)
  @pytest.mark.slow
  def test_axes_from_the_other_end(self, axis):
    self._axes(axis)

  def _axes(self, axis):
    x = _normal(32, 48, 64)
    got = hadamard(x, 16, axis)
    moved = _hadamard_oracle(np.moveaxis(x, axis, -1), 16)
    want = np.moveaxis(moved, -1, axis)
    np.testing.assert_allclose(got, want, atol=17 * 20 * U)

  @parameterized.parameters(4, 16, 64)
  def test_even_orders_invert_integers_bit_for_bit(self, block):
    top = int(2**24 / block**1.5)
    x = _rng(1).integers(-top, top + 1, (7, 4 * block)).astype(np.float32)
    there = hadamard(x, block)
    np.testing.assert_array_equal(hadamard(there, block), x)

  @parameterized.parameters(16, 32, 256, 2048)
  def test_round_trip(self, block):
    self._round_trip(block)

  @parameterized.parameters(64, 128)
  @pytest.mark.slow
  def test_round_trip_of_other_blocks(self, block):
    self._round_trip(block)

  def _round_trip(self, block):
    x = _normal(16, 2048, seed=block)
    back = np.asarray(hadamard(hadamard(x, block), block))
    error = np.abs(back - x).reshape(16, -1, block).max(-1)
    norm = np.linalg.norm(x.reshape(16, -1, block), axis=-1)
    bound = (block + 1) * (np.sqrt(block) + 1)
    self.assertLessEqual((error / norm).max() / U, min(bound, 12))

  def test_narrow_dtypes_round_once(self):
    self._narrow_dtypes_round_once(jnp.bfloat16)

  @pytest.mark.slow
  def test_float16_rounds_once(self):
    self._narrow_dtypes_round_once(jnp.float16)

  def _narrow_dtypes_round_once(self, dtype):
    x = _normal(4, 128).astype(dtype)
    got = hadamard(x, 128)
    want = np.asarray(hadamard(x.astype(np.float32), 128)).astype(dtype)
    self.assertEqual(got.dtype, dtype)
    np.testing.assert_array_equal(got, want)

  def test_float64(self):
    with jax.enable_x64(True):
      x = jnp.asarray(_normal(4, 64, dtype=np.float64))
      got = hadamard(x, 32)
      np.testing.assert_allclose(got, _hadamard_oracle(x, 32), atol=1e-14)

  def test_an_outlier_is_spread_evenly(self):
    y = hadamard(8 * np.eye(64, dtype=np.float32)[13], 64)
    np.testing.assert_array_equal(np.abs(y), np.ones(64))

  @parameterized.parameters(0, 3, -4, 48)
  def test_order_must_be_a_power_of_two(self, block):
    with self.assertRaisesRegex(ValueError, f'block={block} is not a power'):
      core.hadamard(np.zeros(48, np.float32), block)

  def test_block_must_divide(self):
    with self.assertRaisesRegex(ValueError, 'length 40 .*block=16.* 48 .* 8$'):
      core.hadamard(np.zeros((2, 40), np.float32), 16)

  @parameterized.parameters(((3, 256, 8), 1))
  def test_signs_in_the_matrix(self, shape, axis):
    self._signs_in_the_matrix(shape, axis)

  @parameterized.parameters(((5, 256), -1), ((256, 48), 0), ((3, 256, 48), 1))
  @pytest.mark.slow
  def test_signs_in_the_matrix_of_other_shapes(self, shape, axis):
    self._signs_in_the_matrix(shape, axis)

  def _signs_in_the_matrix(self, shape, axis):
    x = _normal(*shape)
    for block in (16, 256):  # one factor and two
      signs = np.where(_rng(2).random(block) < 0.5, -1, 1).astype(np.float32)
      rows = np.moveaxis(x, axis, -1)
      rows = _hadamard_oracle(rows * np.tile(signs, 256 // block), block)
      got = hadamard(x, block, axis, signs=signs)
      bound = (block + 1) * 7 * np.sqrt(block) * U
      want = np.moveaxis(rows, -1, axis)
      np.testing.assert_allclose(got, want, atol=bound)
      back = hadamard(got, block, axis, signs=signs, inverse=True)
      np.testing.assert_allclose(back, x, atol=2 * bound)

  def test_signs(self):
    words = np.array([7, 11], np.uint32)
    signs = np.asarray(random_signs(words, 4096))
    np.testing.assert_array_equal(np.abs(signs), np.ones(4096))
    self.assertLess(abs(signs.sum()), 5 * 64)
    self.assertLess(abs((signs[1:] * signs[:-1]).sum()), 5 * 64)
    np.testing.assert_array_equal(random_signs(words, 100), signs[:100])
    other = random_signs(words + np.array([0, 1], np.uint32), 4096)
    self.assertLess(abs((signs * np.asarray(other)).sum()), 5 * 64)


class QuickTestCase(parameterized.TestCase):
  """Compiles with few optimizations: tests of algebra, within tolerances."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(compilation.few_optimizations())


class LawsTest(QuickTestCase):
  def test_equal_values_are_equal(self):
    for name in ('hadamard', 'affine', 'chain'):
      t = _make(name)
      copy = pickle.loads(pickle.dumps(t))
      self.assertEqual(copy, t)
      self.assertEqual(hash(copy), hash(t))
      self.assertNotEqual(
        t, jax.tree.map(lambda leaf: leaf + 1, _make('affine'))
      )
    self.assertEqual(tr.Hadamard(32), tr.Hadamard(32))
    self.assertNotEqual(tr.Hadamard(32), tr.Hadamard(32, -2))
    self.assertNotEqual(tr.Hadamard(2, signs=np.ones(2)), tr.Hadamard(2))

  def test_unit(self):
    """Of the same kind, also of a stack, and without an effect."""
    x = _normal(3, N)
    for name in ('affine', 'permutation', 'smoothing'):
      t = _make(name)
      one = unit(t)
      self.assertEqual(jax.tree.structure(one), jax.tree.structure(t))
      np.testing.assert_array_equal(one.apply(x), x)
      stack = jax.tree.map(lambda leaf: np.stack([leaf] * 2), t)
      stacked_one = jax.tree.map(lambda leaf: leaf[1], unit(stack))
      self.assertEqual(stacked_one, one)
    self.assertIsNone(unit(tr.Hadamard(2)))

  def test_equal_transforms_share_a_program(self):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def f(t, x):
      traces.append(t)
      return t.apply(x)

    for _ in range(2):
      f(tr.Hadamard(2), np.ones(2, np.float32))
    self.assertLen(traces, 1)

  """What every transform promises."""

  @parameterized.parameters(*FEW)
  def test_inverse(self, name):
    self._inverse(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_inverse_of_others(self, name):
    self._inverse(name)

  def _inverse(self, name):
    t = _make(name)
    x, w = _normal(9, N, seed=1), _normal(N, 9, seed=2)
    bound = _round_trip_bound(name)

    @jax.jit
    def round_trips(t, x, w):
      return (
        (x, t.inverse(t.apply(x)), -1),
        (x, t.apply(t.inverse(x)), -1),
        (w, t.inverse_dual(t.apply_dual(w)), 0),
        (w, t.apply_dual(t.inverse_dual(w)), 0),
      )

    for want, got, axis in round_trips(t, x, w):
      scale = np.linalg.norm(want, axis=axis, keepdims=True)
      if name == 'smoothing':
        scale = np.abs(want)
      self.assertLessEqual((np.abs(got - want) / scale).max(), bound)

  @parameterized.parameters(*FEW)
  def test_product_is_unchanged(self, name):
    self._product_is_unchanged(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_product_is_unchanged_of_others(self, name):
    self._product_is_unchanged(name)

  def _product_is_unchanged(self, name):
    with jax.enable_x64(True):
      t = _make.__wrapped__(name)  # with float64 leaves
      x = jnp.asarray(_normal(9, N, seed=1, dtype=np.float64))
      w = jnp.asarray(_normal(N, 7, seed=2, dtype=np.float64))

      @jax.jit
      def products(t, x, w):
        y = t.apply(x)
        return y @ t.apply_dual(w), y @ t.apply_dual(w.T, axis=-1).T

      for got in products(t, x, w):
        np.testing.assert_allclose(got, x @ w, rtol=0, atol=1e-12)

  @parameterized.parameters(*(n for n in SKEW if n in KINDS))
  def test_the_dual_is_not_the_map_itself(self, name):
    self._the_dual_is_not_the_map_itself(name)

  @parameterized.parameters(*(n for n in SKEW if n in VARIANTS))
  @pytest.mark.slow
  def test_the_dual_is_not_the_map_itself_of_variants(self, name):
    self._the_dual_is_not_the_map_itself(name)

  def _the_dual_is_not_the_map_itself(self, name):
    t = _make(name)
    x, w = _normal(9, N, seed=1), _normal(N, 7, seed=2)
    wrong = np.asarray(apply(t, x)) @ np.asarray(apply(t, w.T)).T
    self.assertGreater(np.abs(wrong - x @ w).max(), 0.1)

  @parameterized.parameters(*(n for n in ALL if n in KINDS))
  def test_the_map_is_not_the_identity(self, name):
    self._the_map_is_not_the_identity(name)

  @parameterized.parameters(*(n for n in ALL if n in VARIANTS))
  @pytest.mark.slow
  def test_the_map_is_not_the_identity_of_variants(self, name):
    self._the_map_is_not_the_identity(name)

  def _the_map_is_not_the_identity(self, name):
    x = _normal(9, N, seed=1)
    self.assertGreater(np.abs(apply(_make(name), x) - x).max(), 0.1)

  @parameterized.parameters(*ORTHOGONAL)
  def test_orthogonal(self, name):
    t = _make(name)
    matrix = np.asarray(apply(t, np.eye(N, dtype=np.float32)), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(N), atol=4 * U)
    w = _normal(N, 9)
    got = apply_dual(t, w, axis=-2)
    np.testing.assert_array_equal(got, np.asarray(apply(t, w.T)).T)

  @parameterized.parameters(*FEW)
  def test_cotangents_go_through_the_transpose(self, name):
    self._cotangents_go_through_the_transpose(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_cotangents_go_through_the_transpose_of_others(self, name):
    self._cotangents_go_through_the_transpose(name)

  def _cotangents_go_through_the_transpose(self, name):
    t = _make(name)
    x, c = _normal(9, N, seed=1), _normal(9, N, seed=2)

    @jax.jit
    def cotangents(t, x, c):
      (left,) = jax.vjp(t.apply, x)[1](c)
      (right,) = jax.vjp(t.apply_dual, x.T)[1](c.T)
      return (left, t.inverse_dual(c, -1)), (right.T, t.inverse(c))

    for got, want in cotangents(t, x, c):
      np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)

  @parameterized.parameters('signed', 'permutation', 'smoothing')
  def test_other_axes(self, name):
    self._other_axes(name)

  @parameterized.parameters('affine', 'chain', *VARIANTS)
  @pytest.mark.slow
  def test_other_axes_of_others(self, name):
    self._other_axes(name)

  def _other_axes(self, name):
    t = _make(name)
    x = _normal(5, 3, N)
    want = np.moveaxis(apply_dual(t, x, -1), -1, 0)
    got = apply_dual(t, np.moveaxis(x, -1, 0), -3)
    np.testing.assert_allclose(got, want, atol=3e-5)

  @parameterized.parameters('signed', 'smoothing')
  def test_jit(self, name):
    self._jit(name)

  @parameterized.parameters(
    *(n for n in ALL if n not in ('signed', 'smoothing'))
  )
  @pytest.mark.slow
  def test_jit_of_others(self, name):
    self._jit(name)

  def _jit(self, name):
    t = _make(name)
    x = _normal(9, N, seed=1)
    np.testing.assert_allclose(apply(t, x), t.apply(x), rtol=0, atol=2e-5)

  @parameterized.parameters(*FEW)
  def test_vmap_and_scan(self, name):
    self._vmap_and_scan(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_vmap_and_scan_of_others(self, name):
    self._vmap_and_scan(name)

  def _vmap_and_scan(self, name):
    t = _make(name)
    x = _normal(4, 3, N, seed=1)
    stacked = jax.tree.map(lambda a: np.stack([a, a[::-1], a, a]), t)

    @jax.jit
    def in_turn(t, x):
      _, rows = jax.lax.scan(lambda c, tx: (c, tx[0].apply(tx[1])), 0, (t, x))
      return rows

    want = np.asarray(apply(t, x))
    for f in (jax.jit(jax.vmap(lambda t, x: t.apply(x))), in_turn):
      rows = np.asarray(f(stacked, x))
      np.testing.assert_allclose(rows[2:], want[2:], rtol=0, atol=2e-5)
    if jax.tree.leaves(t):
      self.assertGreater(np.abs(rows[1] - want[1]).max(), 0.01)

  @parameterized.parameters(*FEW)
  def test_narrow_dtypes_are_kept(self, name):
    self._narrow_dtypes_are_kept(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_narrow_dtypes_are_kept_of_others(self, name):
    self._narrow_dtypes_are_kept(name)

  def _narrow_dtypes_are_kept(self, name):
    t = _make(name)
    x = _normal(9, N).astype(jnp.bfloat16)
    for f in (t.apply, t.inverse, lambda x: t.apply_dual(x, -1)):
      y = jax.eval_shape(f, x)
      self.assertEqual((y.dtype, y.shape), (x.dtype, x.shape))
    wide = apply(t, x.astype(np.float32))
    narrow = np.float32(apply(t, x))
    np.testing.assert_allclose(narrow, wide, rtol=0.02, atol=0.1)

  @parameterized.parameters(*ALL)
  def test_strict_promotion(self, name):
    def everything(x):
      t = _make.__wrapped__(name)
      return t.inverse_dual(t.apply_dual(t.inverse(t.apply(x)), -1), -1)

    with (
      jax.numpy_dtype_promotion('strict'),
      jax.numpy_rank_promotion('raise'),
    ):
      for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((2, N), dtype)
        self.assertEqual(jax.eval_shape(everything, x), x)

  @parameterized.parameters(*ALL)
  def test_placeholders_may_stand_for_leaves(self, name):
    t = _make(name)
    shapes = jax.eval_shape(lambda: t)
    mask = jax.tree.map(lambda _: np.array(False), t)
    for tree in (shapes, mask):
      self.assertEqual(jax.tree.structure(tree), jax.tree.structure(t))
    self.assertIsInstance(t, tr.Transform)


class HadamardTest(QuickTestCase):
  def test_signs_come_first(self):
    signs = _rng(1).choice([-1.0, 1.0], N).astype(np.float32)
    x = _normal(3, N)
    want = _hadamard_oracle(x * signs, BLOCK)
    got = apply(tr.Hadamard(BLOCK, signs=signs), x)
    np.testing.assert_allclose(got, want, atol=17 * 8 * U)
    got = apply(tr.Hadamard(BLOCK, signs=signs[:BLOCK]), x)
    want = _hadamard_oracle(x * np.tile(signs[:BLOCK], 4), BLOCK)
    np.testing.assert_allclose(got, want, atol=17 * 8 * U)

  def test_operands_must_share_the_signs(self):
    x, w = _normal(9, N), _normal(N, 9, seed=1)
    left, right = (random_hadamard(jax.random.key(k), N, BLOCK) for k in (0, 1))
    product = np.asarray(apply(left, x)) @ np.asarray(apply_dual(right, w))
    self.assertGreater(np.abs(product - x @ w).max(), 1)

  def test_keys(self):
    raw = np.array([[0, 2], [7, 2], [2, 0]], np.uint32)
    make = functools.partial(random_hadamard, size=N, block=BLOCK)
    stacked = jax.vmap(make)(raw)
    self.assertEqual(stacked.signs.dtype, jnp.int8)
    signs = np.asarray(stacked.signs)
    for i in range(3):
      np.testing.assert_array_equal(signs[i], make(raw[i]).signs)
    self.assertFalse(np.array_equal(signs[0], signs[1]))
    typed = make(jax.random.wrap_key_data(raw[0])).signs
    np.testing.assert_array_equal(typed, signs[0])

  def test_an_outlier_channel_shrinks_by_the_root_of_the_block(self):
    x = _normal(256, N) * 0.01
    x[:, 5] = 10.0
    y = np.asarray(apply(random_hadamard(jax.random.key(0), N, N), x))
    self.assertLess(np.abs(y).max(), 1.1 * 10 / np.sqrt(N))

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'block=24 is not a power of two'):
      tr.Hadamard(24)
    with self.assertRaisesRegex(ValueError, 'axis=0 must be negative'):
      tr.Hadamard(16, axis=0)
    with self.assertRaisesRegex(
      ValueError, r'signs must be a vector.*\(2, 8\)'
    ):
      tr.Hadamard(16, signs=jnp.ones((2, 8)))
    t = tr.Hadamard(32)
    with self.assertRaisesRegex(ValueError, 'axis=-1 of length 72.*96.*8$'):
      jax.jit(t.apply)(jnp.zeros((2, 72)))
    with self.assertRaisesRegex(ValueError, 'axis=-2 of length 2 '):
      t.apply_dual(jnp.zeros((2, 64)))
    with self.assertRaisesRegex(
      ValueError, r'axis=-2 is out of range.*\(64,\)'
    ):
      t.apply_dual(jnp.zeros(64))
    with self.assertRaisesRegex(TypeError, 'int32'):
      t.apply(jnp.zeros(64, jnp.int32))
    t = tr.Hadamard(32, signs=jnp.ones(96))
    with self.assertRaisesRegex(
      ValueError, r'signs of shape \(96,\).*length 64'
    ):
      t.apply(jnp.zeros((2, 64)))
    with self.assertRaisesRegex(ValueError, 'size=40 is not a multiple'):
      tr.random_hadamard(jax.random.key(0), 40, 16)


class PermutationTest(QuickTestCase):
  def test_direction(self):
    t = tr.Permutation([2, 0, 1])
    x = np.float32([10, 11, 12])
    np.testing.assert_array_equal(t.apply(x), [12, 10, 11])
    np.testing.assert_array_equal(t.inverse(x), [11, 12, 10])

  def test_small_integers_give_the_same_product_exactly(self):
    x = _rng(1).integers(-8, 9, (5, N)).astype(np.float32)
    w = _rng(2).integers(-8, 9, (N, 5)).astype(np.float32)
    t = tr.Permutation(_rng(3).permutation(N))
    product = np.asarray(apply(t, x)) @ np.asarray(apply_dual(t, w))
    np.testing.assert_array_equal(product, x @ w)

  def test_traced_order(self):
    w = _normal(N, 7)

    @jax.jit
    def sort_rows(w):
      t = tr.Permutation(jnp.argsort(jnp.linalg.norm(w, axis=1)))
      return t.apply_dual(w)

    norms = np.linalg.norm(sort_rows(w), axis=1)
    self.assertTrue((np.diff(norms) >= 0).all())

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'not a permutation of 0 ... 2'):
      tr.Permutation([0, 2, 2])
    for bad in ([0, 1, 3], [-1, 0, 1]):
      with self.assertRaisesRegex(ValueError, 'not a permutation'):
        tr.Permutation(np.array(bad))
    with self.assertRaisesRegex(ValueError, r'vector, not of shape \(2, 2\)'):
      tr.Permutation(jnp.zeros((2, 2), jnp.int32))
    with self.assertRaisesRegex(TypeError, 'integers, not float32'):
      tr.Permutation(jnp.arange(3.0))
    with self.assertRaisesRegex(TypeError, 'integers, not float'):
      tr.Permutation([0.0, 1.0])
    t = tr.Permutation([1, 0, 2])
    with self.assertRaisesRegex(
      ValueError, r'order of shape \(3,\).*axis=-1 of length 4'
    ):
      jax.jit(t.apply)(jnp.zeros((2, 4)))


class SmoothingTest(QuickTestCase):
  def test_sides(self):
    t = tr.DiagonalSmoothing([2.0, 0.5])
    np.testing.assert_array_equal(t.apply(jnp.ones((1, 2))), [[0.5, 2]])
    np.testing.assert_array_equal(t.apply_dual(jnp.ones((2, 1))), [[2], [0.5]])

  def test_powers_of_two_are_exact(self):
    t = tr.DiagonalSmoothing(2.0 ** _rng(1).integers(-6, 7, N))
    x, w = _normal(5, N), _normal(N, 5)
    np.testing.assert_array_equal(inverse(t, apply(t, x)), x)
    back = jax.jit(lambda t, w: t.inverse_dual(w))(t, apply_dual(t, w))
    np.testing.assert_array_equal(back, w)

  @parameterized.parameters(
    (0.0, None, 1.0), (0.5, 'equal', None), (1.0, 1.0, None)
  )
  def test_strength(self, strength, activation, weight):
    a = _rng(1).uniform(0.1, 50, N).astype(np.float32)
    b = _rng(2).uniform(0.01, 2, N).astype(np.float32)
    t = tr.smooth_quant(a, b, strength=strength)
    smooth_a = np.asarray(apply(t, a))
    smooth_b = np.asarray(apply_dual(t, b, axis=-1))
    if activation == 'equal':
      np.testing.assert_allclose(smooth_a, smooth_b, rtol=1e-5)
    elif activation is not None:
      np.testing.assert_allclose(smooth_a, np.full(N, activation), rtol=1e-5)
    if weight is not None:
      np.testing.assert_allclose(smooth_b, np.full(N, weight), rtol=1e-5)

  def test_dead_channels_get_a_finite_scale(self):
    t = tr.smooth_quant(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))
    self.assertTrue(np.isfinite(t.scale).all())
    self.assertGreaterEqual(np.min(t.scale), 1e-5)

  def test_gradient_of_the_scale(self):
    x = _normal(5, N)
    scale = _rng(1).uniform(0.5, 2, N).astype(np.float32)
    total = lambda s: tr.DiagonalSmoothing(s).apply(x).sum()
    got = jax.jit(jax.grad(total))(scale)
    np.testing.assert_allclose(got, -x.sum(0) / scale**2, rtol=1e-4, atol=1e-5)

  def test_errors(self):
    for bad in (0.0, -1.0, np.inf, np.nan):
      with self.assertRaisesRegex(ValueError, r'entries \[1\].*clamp'):
        tr.DiagonalSmoothing([1.0, bad])
    with self.assertRaisesRegex(ValueError, r'vector, not of shape \(1, 2\)'):
      tr.DiagonalSmoothing(jnp.ones((1, 2)))
    t = tr.DiagonalSmoothing([1.0, 2.0])
    with self.assertRaisesRegex(ValueError, r'scale of shape \(2,\).*length 3'):
      jax.jit(t.apply)(jnp.zeros((2, 3)))
    with self.assertRaisesRegex(ValueError, 'strength=1.5'):
      tr.smooth_quant(jnp.ones(2), jnp.ones(2), strength=1.5)
    with self.assertRaisesRegex(ValueError, r'\(2,\) and weight_amax \(3,\)'):
      tr.smooth_quant(jnp.ones(2), jnp.ones(3))


class BlockAffineTest(QuickTestCase):
  def test_blocks_are_rows(self):
    p = _matrices(4, BLOCK, BLOCK)
    x, w = _normal(3, N), _normal(N, 3)
    t = tr.BlockAffine(p)
    blocks = x.reshape(3, 4, 1, BLOCK).astype(np.float64)
    np.testing.assert_allclose(
      apply(t, x), (blocks @ p).reshape(3, N), atol=1e-5
    )
    blocks = w.reshape(4, BLOCK, 3).astype(np.float64)
    want = np.linalg.solve(p.astype(np.float64), blocks).reshape(N, 3)
    np.testing.assert_allclose(apply_dual(t, w), want, atol=1e-5)
    self.assertEqual(t.block, BLOCK)

  def test_the_product_has_no_gradient_in_the_matrix(self):
    x, w, c = _normal(5, N), _normal(N, 6, seed=1), _normal(5, 6, seed=2)
    p = jnp.asarray(_matrices(4, BLOCK, BLOCK))

    def loss(p, both):
      t = tr.BlockAffine(p)
      return (t.apply(x) @ (t.apply_dual(w) if both else w) * c).sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    gradient = gradients(p, True)
    np.testing.assert_allclose(gradient, np.zeros(p.shape), atol=1e-3)
    gradient = gradients(p, False)
    blocks = x.reshape(5, 4, BLOCK), (c @ w.T).reshape(5, 4, BLOCK)
    want = np.einsum('rki,rkj->kij', *blocks)
    np.testing.assert_allclose(gradient, want, atol=1e-3)
    self.assertGreater(np.abs(want).max(), 1)

  def test_errors(self):
    for shape in ((4, 16, 8), (16,), (2, 2, 4, 4), (4, 0, 0)):
      with self.assertRaisesRegex(ValueError, 'square so that it can be inv'):
        tr.BlockAffine(jnp.ones(shape))
    singular = _matrices(3, 4, 4)
    singular[1, 0] = singular[1, 1]
    with self.assertRaisesRegex(
      ValueError, r'singular in float32: blocks \[1\]'
    ):
      tr.BlockAffine(singular)
    t = tr.BlockAffine(_matrices(4, BLOCK, BLOCK))
    with self.assertRaisesRegex(
      ValueError, 'length 72 is not a.*block 16.*80$'
    ):
      jax.jit(t.apply)(jnp.zeros((2, 72)))
    with self.assertRaisesRegex(ValueError, r'has 4 blocks.*\(2, 16, 16\)'):
      t.apply(jnp.zeros((2, 32)))


class ChainTest(QuickTestCase):
  def test_order(self):
    first = tr.Permutation(_rng(1).permutation(N))
    second = tr.DiagonalSmoothing(_rng(2).uniform(0.5, 2, N))
    chain = tr.Chain([first, second])
    x = _normal(3, N)
    got = apply(chain, x)
    np.testing.assert_array_equal(got, apply(second, apply(first, x)))
    np.testing.assert_array_equal(
      apply_dual(chain, x, -1),
      apply_dual(second, apply_dual(first, x, -1), -1),
    )
    other = apply(tr.Chain([second, first]), x)
    self.assertGreater(np.abs(got - other).max(), 0.1)
    self.assertEqual(chain.axis, -1)

  def test_chains_nest(self):
    a, b = _make('chain'), _make('signed')
    x = _normal(3, N)
    np.testing.assert_array_equal(
      apply(tr.Chain((a, b)), x), apply(tr.Chain((*a.transforms, b)), x)
    )

  def test_leaves_are_named(self):
    paths, _ = jax.tree_util.tree_flatten_with_path(
      tr.Chain((_make('signed'), _make('affine')))
    )
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    self.assertEqual(names, ['.transforms[0].signs', '.transforms[1].matrix'])

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'at least one'):
      tr.Chain(())
    with self.assertRaisesRegex(ValueError, r'different axes \[-1, -2\]'):
      tr.Chain((tr.Hadamard(16), tr.Hadamard(16, axis=-2)))
    with self.assertRaisesRegex(TypeError, r'transforms\[1\] is a function'):
      tr.Chain((tr.Hadamard(16), lambda x: x))


if __name__ == '__main__':
  absltest.main()
