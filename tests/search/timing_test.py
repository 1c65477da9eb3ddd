"""Tests of the order and arithmetic of timings, with invented clocks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax.search import timing


class _World:
  """A clock, and functions that take their time by it."""

  def __init__(self):
    self.now = 0.0
    self.order = []

  def clock(self):
    return self.now

  def thunk(self, name, durations):
    durations = itertools.cycle(durations)

    def run():
      self.order.append(name)
      self.now += next(durations)

    return run


def _compare(repeats=3, **options):
  defaults = {'size': 64, 'applications': 2, 'rounds': 3}
  return timing.compare(
    jnp.exp2, jnp.tanh, (0, 1), repeats=repeats, **{**defaults, **options}
  )


class TimingTest(parameterized.TestCase):
  def test_order_and_times(self):
    world = _World()
    a = world.thunk('A', [1.0, 2.0])
    b = world.thunk('B', [4.0, 8.0])
    seconds = timing.interleave(a, b, 3, world.clock)
    self.assertEqual(''.join(world.order), 'ABBA' * 3)
    np.testing.assert_array_equal(seconds, [[[1, 2], [4, 8]]] * 3)

  def test_drift_cancels(self):
    # Both take the time since the start: a machine that slows down.
    world = _World()

    def drifting():
      world.now += 1 + world.now / 1000

    seconds = timing.interleave(drifting, drifting, 50, world.clock)
    ratio = seconds[:, 1].sum(-1) / seconds[:, 0].sum(-1)
    # Steps grow by q = 1.001: (q + q^2) / (1 + q^3) = q / (1 - q + q^2),
    # short of 1 by (q - 1)^2 alone.
    np.testing.assert_allclose(ratio, 1, atol=1.1e-6)
    self.assertGreater(seconds[-1, 0, 0] / seconds[0, 0, 0], 1.2)

  def test_summary(self):
    times = np.array([[[1, 1], [3, 3]], [[2, 2], [2, 2]], [[1, 3], [8, 8]]])
    repeat = timing._summary(times.astype(float))
    self.assertEqual(repeat.speedup, 3)  # of 3, 1 and 4
    self.assertEqual(repeat.quartiles, (2, 3.5))
    self.assertEqual(repeat.nanoseconds, 1)  # of 1 1 1 2 2 3
    self.assertEqual(repeat.base_nanoseconds, 2.25)  # of 2 2 3 3 8 8

  @parameterized.parameters(
    ((1.1, 1.2, 1.3), True),
    ((1.1, 1.0, 1.3), False),
    ((0.9, 0.8, 0.7), False),
  )
  def test_faster_needs_every_run(self, quartiles, faster):
    repeats = tuple(timing.Repeat(1, 2, q + 0.1, (q, q + 1)) for q in quartiles)
    comparison = timing.Comparison(64, 2, 10, repeats)
    self.assertEqual(comparison.faster, faster)
    self.assertAlmostEqual(comparison.speedup, sorted(quartiles)[1] + 0.1)

  def test_unit_is_an_element_of_an_application(self):
    ticks = itertools.count()
    comparison = _compare(clock=lambda: float(next(ticks)))
    self.assertLen(comparison.repeats, 3)
    for repeat in comparison.repeats:
      self.assertEqual(repeat.nanoseconds, 1e9 / (64 * 2))
      self.assertEqual(repeat.base_nanoseconds, 1e9 / (64 * 2))
      self.assertEqual(repeat.quartiles, (1, 1))
    self.assertFalse(comparison.faster)

  def test_applications_depend_on_one_another(self):
    # With f(x) = 1e38 x, y <- f(x + 1e-30 y) / 1e8 adds 1e30 x to y.
    x = jnp.linspace(0.5, 1, 64)
    y = jax.jit(timing.dependent(lambda x: x * np.float32(1e38), 5))(x)
    np.testing.assert_allclose(y, 5e30 * x, rtol=1e-5)

  @parameterized.parameters('size', 'applications', 'rounds', 'repeats')
  def test_counts_are_positive(self, name):
    with self.assertRaisesRegex(ValueError, f'{name}=0'):
      _compare(**{name: 0})

  @parameterized.parameters((1.0, 0.0), (0.0, np.inf), (np.nan, 1.0))
  def test_interval_is_finite(self, lo, hi):
    with self.assertRaisesRegex(ValueError, 'interval'):
      timing.compare(jnp.exp2, jnp.exp2, (lo, hi))


if __name__ == '__main__':
  absltest.main()
