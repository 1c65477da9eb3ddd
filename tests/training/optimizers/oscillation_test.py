"""deoscillate and q_ema: planted weights, and neighbours on every grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.training import optimizers

FORMATS = ('mxfp4', 'nvfp4', 'nf4_g64', 'mxfp4_32x32')
MORE_FORMATS = (
  'int4_g32',
  'mxint8',
  'mxfp8_e4m3',
  'e5m2_channel',
  'ternary_channel',
)


def grid(x):
  """Integers, ties to even."""
  return jnp.round(x)


def planted() -> tuple[np.ndarray, np.ndarray]:
  """Weights and updates: one swings about 1/2, one drifts, one rests.

  The first moves by .02 and crosses a middle of the grid in every step, the
  second moves as far in one direction and crosses none.
  """
  w = np.zeros(3, np.float32)
  w[:] = 0.49, 0.55, 0.25
  signs = np.array([[(-1) ** t * 0.02, 0.02, 0.0] for t in range(100)])
  return w, signs.astype(np.float32)


class DeoscillateTest(parameterized.TestCase):
  def _run(self, tx, w, steps):
    state = tx.init(w)
    path = [w]
    update = jax.jit(tx.update)
    for u in steps:
      u, state = update(u, state, w)
      w = w + np.asarray(u)
      path.append(w)
    return np.array(path), state

  def test_snaps_what_oscillates_and_nothing_else(self):
    w, steps = planted()
    tx = optimizers.deoscillate(grid, window=10, threshold=4.0, warmup=0)
    path, state = self._run(tx, w, steps[:10])
    free = w + np.cumsum(steps[:10], axis=0)
    np.testing.assert_allclose(path[1:-1], free[:-1], rtol=1e-6)
    # d_w = .2, d_Q = 10: a ratio of 50. Its last position is .49.
    self.assertEqual(path[-1, 0], 0.0)
    np.testing.assert_allclose(path[-1, 1:], free[-1, 1:], rtol=1e-6)
    np.testing.assert_array_equal(state.moved, 0)
    np.testing.assert_array_equal(state.jumped, 0)

  @parameterized.parameters((49.0, True), (51.0, False))
  def test_threshold(self, threshold, snaps):
    w, steps = planted()
    tx = optimizers.deoscillate(grid, window=10, threshold=threshold, warmup=0)
    path, _ = self._run(tx, w, steps[:10])
    self.assertEqual(path[-1, 0] == 0, snaps)

  def test_sums_of_the_window(self):
    w, steps = planted()
    tx = optimizers.deoscillate(grid, window=10, warmup=0)
    path, state = self._run(tx, w, steps[:9])
    x = path.astype(np.float64)
    moved = np.abs(np.diff(x, axis=0)).sum(0)
    jumped = np.abs(np.diff(np.rint(x), axis=0)).sum(0)
    np.testing.assert_allclose(state.moved, moved, rtol=1e-5)
    np.testing.assert_array_equal(state.jumped, jumped)

  @parameterized.parameters((5, 15), (0, 10), (3, 13))
  def test_warmup_delays_the_first_window(self, warmup, first):
    w, steps = planted()
    tx = optimizers.deoscillate(grid, window=10, warmup=warmup)
    path, _ = self._run(tx, w, steps[:16])
    off_grid = path[:, 0] != np.rint(path[:, 0])
    self.assertEqual(int(np.argmin(off_grid)), first)

  def test_spec_and_function_agree(self):
    spec = lowbit_jax.QuantSpec(formats.mxfp4)
    random = np.random.RandomState(0)
    w = random.randn(64, 4).astype(np.float32)
    steps = random.randn(6, 64, 4).astype(np.float32) * 0.1

    def function(x):
      return lowbit_jax.fake_quant(x, formats.mxfp4, axis=-2)

    paths = [
      self._run(tx, w, steps)[0]
      for tx in (
        optimizers.deoscillate(spec, axis=-2, window=3, threshold=1, warmup=0),
        optimizers.deoscillate(function, window=3, threshold=1, warmup=0),
      )
    ]
    np.testing.assert_array_equal(*paths)
    on_grid = paths[0][3] == np.asarray(jax.jit(function)(paths[0][3]))
    self.assertGreater(on_grid.mean(), 0.1)

  def test_mask_leaves_out_parameters(self):
    w = {
      'kernel': np.full((4, 4), 0.49, np.float32),
      'bias': np.full((4,), 0.49, np.float32),
    }
    tx = optax.masked(
      optimizers.deoscillate(grid, window=1, warmup=0),
      jax.tree.map(lambda x: x.ndim == 2, w),
    )
    u = jax.tree.map(lambda x: np.full_like(x, 0.02), w)
    updates, _ = jax.jit(lambda u, w: tx.update(u, tx.init(w), w))(u, w)
    w = jax.tree.map(np.add, w, updates)
    np.testing.assert_array_equal(w['kernel'], 1.0)
    np.testing.assert_allclose(w['bias'], 0.51, rtol=1e-6)

  def test_errors(self):
    deoscillate = optimizers.deoscillate
    stochastic = lowbit_jax.QuantSpec(formats.mxfp4, rounding='stochastic')
    for make, error, message in (
      (lambda: deoscillate(grid, window=0), ValueError, 'window=0'),
      (lambda: deoscillate(grid, warmup=-1), ValueError, 'warmup=-1'),
      (lambda: deoscillate(grid, threshold=0), ValueError, 'threshold=0'),
      (lambda: deoscillate(grid, axis=0), ValueError, 'axis=0'),
      (lambda: deoscillate(3), TypeError, 'quantize=3'),
      (lambda: deoscillate(stochastic), ValueError, 'nearest_even'),
    ):
      with self.assertRaisesRegex(error, message):
        make()
    tx = deoscillate(grid)
    with self.assertRaisesRegex(ValueError, 'params=None'):
      tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


# Eager calls would compile every operation on its own.
quantize = jax.jit(
  lowbit_jax.quantize, static_argnums=1, static_argnames='axis'
)
dequantize = jax.jit(lowbit_jax.dequantize)
fake_quant = jax.jit(lowbit_jax.fake_quant, static_argnums=1)
ema_quantize = jax.jit(optimizers.ema_quantize, static_argnums=2)
grid_neighbours = jax.jit(
  optimizers.grid_neighbours, static_argnums=1, static_argnames='axis'
)


@functools.cache
def weights(shape=(64, 96)) -> np.ndarray:
  return np.random.RandomState(3).randn(*shape).astype(np.float32)


def neighbours_by_table(w, fmt, axis):
  """Lower and upper grid point of each element, from the stored scales."""
  q = quantize(w, fmt, axis=axis)
  codes = np.full(q.codes.shape, code_of_one(fmt), q.codes.dtype)
  ones = lowbit_jax.qarray.replace(q, codes=codes)
  unit = np.asarray(dequantize(ones), np.float64)
  values = fmt.element.values()
  values = values[np.isfinite(values) & (np.abs(values) <= fmt.element.max)]
  values = np.unique(values)
  scale = unit / value_of_one(fmt)
  x = w.astype(np.float64) / scale
  upper = np.searchsorted(values, x, side='left').clip(0, len(values) - 1)
  lower = (np.searchsorted(values, x, side='right') - 1).clip(0)
  return values[lower] * scale, values[upper] * scale


def value_of_one(fmt) -> float:
  return float(fmt.element.values()[fmt.element.code_max])


def code_of_one(fmt) -> int:
  """A byte all of whose codes are the largest number."""
  bits, code = fmt.element.bits, fmt.element.code_max
  return sum(code << i for i in range(0, 8, bits))


class GridNeighboursTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  def test_are_the_two_numbers_around(self, name):
    self.check_neighbours(name)

  @parameterized.parameters(*MORE_FORMATS)
  @pytest.mark.slow
  def test_are_the_two_numbers_around_in_more_formats(self, name):
    self.check_neighbours(name)

  def check_neighbours(self, name):
    fmt = formats.get(name)
    axis = None if fmt.is_tile else -2
    w = weights()
    # The largest number of a block, whose scale is rounded, may lie beside the
    # grid by one rounding or on it: the same with and without jit.
    near, other = grid_neighbours(w, fmt, axis=axis)
    nearest = dequantize(quantize(w, fmt, axis=axis))
    np.testing.assert_array_equal(near, nearest)
    low, high = neighbours_by_table(w, fmt, axis)
    np.testing.assert_allclose(np.minimum(near, other), low, rtol=2e-7)
    np.testing.assert_allclose(np.maximum(near, other), high, rtol=2e-7)
    self.assertGreater(np.mean(np.asarray(near) != np.asarray(other)), 0.5)

  def test_padding_does_not_matter(self):
    w = weights((5, 70))
    near, other = grid_neighbours(w, formats.mxfp4)
    low, high = neighbours_by_table(w, formats.mxfp4, -1)
    np.testing.assert_array_equal(np.minimum(near, other), low)
    np.testing.assert_array_equal(np.maximum(near, other), high)

  def test_numbers_of_the_grid_have_no_other(self):
    w = np.tile(np.float32([[0.5], [-1.5], [6.0], [0.0]]), (16, 96))
    near, other = optimizers.grid_neighbours(w, formats.mxfp4, axis=-2)
    np.testing.assert_array_equal(near, w)
    np.testing.assert_array_equal(other, w)

  def test_refuses_zero_points(self):
    with self.assertRaisesRegex(ValueError, 'uint4_g32.*zero points'):
      optimizers.grid_neighbours(weights(), formats.uint4_g32)


class QEMATest(parameterized.TestCase):
  def test_mean_after_the_start(self):
    tx = optimizers.q_ema(0.9, start=2)
    w = np.float32([1.0, 2.0])
    state, update = jax.jit(tx.init)(w), jax.jit(tx.update)
    expected = None
    for step in range(6):
      u = np.float32([0.5, -1.0]) * (step + 1)
      updates, state = update(u, state, w)
      np.testing.assert_array_equal(updates, u)
      w = w + u
      expected = w if step < 2 else 0.9 * expected + 0.1 * w
      np.testing.assert_allclose(state.ema, expected, rtol=1e-6)

  def test_picks_the_neighbour_of_the_mean(self):
    w = np.tile(np.float32([[0.7, -2.2, 6.0, 0.0]]), 8)
    ema = np.tile(np.float32([[0.9, -2.6, 1.0, 0.3]]), 8)
    y = ema_quantize(w, ema, formats.mxfp4)
    # Pairs (.5, 1), (-2, -3), 6 and 0 alone.
    np.testing.assert_array_equal(y, np.tile([[1.0, -3.0, 6.0, 0.0]], 8))
    same = optimizers.ema_quantize(w, w, formats.mxfp4)  # without jit
    np.testing.assert_array_equal(same, fake_quant(w, formats.mxfp4))

  def test_gradient_is_straight_through(self):
    w, ema, c = weights(), weights() * 1.1, weights()[::-1]

    def loss(w, ema):
      return jnp.sum(c * optimizers.ema_quantize(w, ema, formats.mxfp4))

    dw, d_ema = jax.jit(jax.grad(loss, (0, 1)))(w, ema)
    np.testing.assert_array_equal(dw, c)
    np.testing.assert_array_equal(d_ema, 0)

  @pytest.mark.slow
  def test_a_weight_that_swings_keeps_its_value(self):
    # Between .745 and .765: their mean is above the middle of .5 and 1.
    tx = optax.chain(optax.sgd(1.0), optimizers.q_ema(0.9, start=0))
    w = np.tile(np.float32([[0.745, 6.0]]), 16)
    state, update = tx.init(w), jax.jit(tx.update)
    seen, plain = set(), set()
    for step in range(40):
      g = np.tile(np.float32([[(-1) ** (step + 1) * 0.02, 0.0]]), 16)
      updates, state = update(g, state, w)
      w = np.asarray(optax.apply_updates(w, updates))
      ema = optax.tree.get(state, 'ema')
      y = ema_quantize(w, ema, formats.mxfp4)
      if step >= 10:
        seen.add(float(np.asarray(y)[0, 0]))
        plain.add(float(np.asarray(fake_quant(w, formats.mxfp4))[0, 0]))
    self.assertLen(plain, 2)
    self.assertLen(seen, 1)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'decay=1.0'):
      optimizers.q_ema(1.0)
    with self.assertRaisesRegex(ValueError, 'ema.shape'):
      optimizers.ema_quantize(weights(), weights()[0], formats.mxfp4)
    tx = optimizers.q_ema()
    with self.assertRaisesRegex(ValueError, 'params=None'):
      tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


if __name__ == '__main__':
  absltest.main()
