"""log I_v and log K_v against 20-digit values, mpmath identities and bounds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax.special import _bessel, log_iv, log_kv

# 15 x 17 points, computed with 45 digits: I by its series, K by the trapezoidal
# rule on its integral; the Wronskian holds to 2e-40.
_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_TABLE = np.genfromtxt(
  _GOLDEN / 'log_bessel_reference.csv', delimiter=',', names=True
)
_V, _X = _TABLE['v'], _TABLE['x']
_FUNCTIONS = {'iv': log_iv, 'kv': log_kv}


def error(got, want, floor: float = 1.0) -> float:
  """The largest error over max(floor, |want|)."""
  got = np.asarray(got, np.float64)
  assert np.isfinite(got).all()
  return float(np.max(np.abs(got - want) / np.maximum(floor, np.abs(want))))


def points(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """v and x, log-uniform from 1e-8 to 1e6."""
  rng = np.random.default_rng(seed)
  return tuple(10 ** rng.uniform(-8, 6, (2, n)))


class TableTest(parameterized.TestCase):
  @parameterized.parameters(('iv', 1e-13), ('kv', 2e-13))
  def test_float64(self, name, bound):
    with jax.enable_x64(True):
      got = _FUNCTIONS[name](jnp.asarray(_V), jnp.asarray(_X))
    self.assertEqual(got.dtype, np.float64)
    self.assertLess(error(got, _TABLE[f'log_{name}']), bound)

  @parameterized.parameters(('iv', 5e-6), ('kv', 2e-5))
  def test_float32(self, name, bound):
    got = _FUNCTIONS[name](np.float32(_V), np.float32(_X))
    self.assertEqual(got.dtype, np.float32)
    # The reference is at the decimal; rounding v and x moves the logarithm.
    moved = np.abs(_V * _TABLE[f'dlog_{name}_dv']) + np.abs(
      _X * _TABLE[f'dlog_{name}_dx']
    )
    want = _TABLE[f'log_{name}']
    slack = 2.0**-24 * moved / np.maximum(1, np.abs(want))
    off = np.abs(np.asarray(got) - want) / np.maximum(1, np.abs(want))
    np.testing.assert_array_less(off, bound + slack)

  @parameterized.product(name=('iv', 'kv'), argument=(0, 1))
  def test_derivatives(self, name, argument):
    f = _FUNCTIONS[name]
    with jax.enable_x64(True):
      v, x = jnp.asarray(_V), jnp.asarray(_X)
      tangents = [jnp.zeros_like(v), jnp.zeros_like(x)]
      tangents[argument] = jnp.ones_like(v)
      got = jax.jit(lambda v, x: jax.jvp(f, (v, x), tuple(tangents))[1])(v, x)
    want = _TABLE[f'dlog_{name}_d{"vx"[argument]}']
    self.assertLess(error(got, want, 1e-3), 1e-10)
    if (name, argument) == ('kv', 0):
      np.testing.assert_array_equal(np.asarray(got)[_V == 0], 0)


class IdentityTest(parameterized.TestCase):
  def test_no_overflow(self):
    v, x = points(4000, 0)
    for dtype in (np.float32, np.float64):
      with jax.enable_x64(dtype == np.float64):
        for f in _FUNCTIONS.values():
          got = np.asarray(f(v.astype(dtype), x.astype(dtype)))
          self.assertTrue(np.isfinite(got).all())

  def test_wronskian(self):
    # x (I_v K_{v+1} + I_{v+1} K_v) = 1; errors of the logarithms add up.
    v, x = points(4000, 1)
    with jax.enable_x64(True):
      parts = [np.asarray(g) for g in (
        log_iv(v, x), log_kv(v + 1, x), log_iv(v + 1, x), log_kv(v, x)
      )]  # fmt: skip
    total = np.logaddexp(parts[0] + parts[1], parts[2] + parts[3]) + np.log(x)
    size = 1 + sum(map(np.abs, parts))
    np.testing.assert_array_less(np.abs(total), 1e-13 * size)

  def test_half_order(self):
    x = 10 ** np.linspace(-6, 5, 500)
    with jax.enable_x64(True):
      got = log_kv(0.5, x)
    want = 0.5 * np.log(np.pi / (2 * x)) - x
    self.assertLess(error(got, want), 2e-15 * 8)

  def test_bounds_of_the_ratio(self):
    # Amos, "Computation of modified Bessel functions and their ratios" (1974).
    v, x = points(4000, 2)
    with jax.enable_x64(True):
      ratio = np.asarray(jax.jit(_bessel.iv_ratio)(v, x))
    low = x / (v + 0.5 + np.sqrt((v + 1.5) ** 2 + x * x))
    high = x / (v + 0.5 + np.sqrt((v + 0.5) ** 2 + x * x))
    slack = 1e-12
    self.assertTrue((ratio >= low * (1 - slack)).all())
    self.assertTrue((ratio <= high * (1 + slack)).all())

  def test_k_is_even_in_its_order(self):
    v, x = np.float32(points(500, 3))
    np.testing.assert_allclose(
      log_kv(-v, x), log_kv(v, x), rtol=1e-6, atol=1e-6
    )

  @pytest.mark.slow
  def test_second_derivatives_are_finite(self):
    v = np.float32([0, 0, 1e5, 1e5])
    x = np.float32([1e-8, 1e5, 1e-8, 1e5])
    with jax.enable_x64(True):
      for f in _FUNCTIONS.values():
        hessian = jax.jit(jax.vmap(jax.hessian(f, (0, 1))))
        for leaf in jax.tree.leaves(hessian(np.float64(v), np.float64(x))):
          self.assertTrue(np.isfinite(leaf).all())

  def test_modified_bessel_equation(self):
    # With r = d/dx log B: r' = 1 + v^2 / x^2 - r / x - r^2.
    v, x = np.array([0.0, 0.7, 3.0, 20.0]), np.array([0.5, 3.0, 8.0, 40.0])
    with jax.enable_x64(True):
      for f in _FUNCTIONS.values():
        first = jax.grad(lambda v, x, f=f: f(v, x), 1)
        r = np.asarray(jax.vmap(first)(v, x))
        slope = np.asarray(jax.vmap(jax.grad(first, 1))(v, x))
        want = 1 + (v / x) ** 2 - r / x - r * r
        np.testing.assert_allclose(slope, want, rtol=1e-8, atol=1e-10)


class EdgesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('iv', 0, 0, 0),
    ('iv', 1, 0, -np.inf),
    ('iv', 1, -1, np.nan),
    ('iv', -1, 1, np.nan),
    ('iv', 1, np.inf, np.inf),
    ('kv', 0, 0, np.inf),
    ('kv', 2, 0, np.inf),
    ('kv', 1, -1, np.nan),
    ('kv', 1, np.inf, -np.inf),
    ('kv', np.nan, 1, np.nan),
  )
  def test_values(self, name, v, x, want):
    np.testing.assert_equal(float(_FUNCTIONS[name](v, x)), want)

  def test_composes(self):
    v, x = np.float32([0.5, 7]), np.float32([[1], [2], [30]])
    for f in _FUNCTIONS.values():
      want = f(v, x)
      self.assertEqual(want.shape, (3, 2))
      np.testing.assert_allclose(jax.jit(f)(v, x), want, rtol=1e-6)
      rows = jax.vmap(lambda x, f=f: f(v, x))(x)
      np.testing.assert_allclose(rows, want, rtol=1e-6)

  def test_refuses(self):
    with self.assertRaisesRegex(TypeError, 'x.dtype=float16'):
      log_iv(1, np.float16(1))
    with self.assertRaisesRegex(ValueError, 'does not broadcast'):
      log_kv(np.ones(2), np.ones(3))


if __name__ == '__main__':
  absltest.main()
