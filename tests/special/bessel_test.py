"""log I_v and log K_v against 20-digit values, mpmath identities and bounds."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import special

from lowbit_jax.special import _bessel, log_iv, log_kv

# 15 x 17 points, computed with 45 digits: I by its series, K by the trapezoidal
# rule on its integral; the Wronskian holds to 2e-40.
_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_TABLE = np.genfromtxt(
  _GOLDEN / 'log_bessel_reference.csv', delimiter=',', names=True
)
_V, _X = _TABLE['v'], _TABLE['x']
_FUNCTIONS = {'iv': log_iv, 'kv': log_kv}
_COMPILED = {name: jax.jit(f) for name, f in _FUNCTIONS.items()}
_POINTS = 4000
# Derivatives are long programs: fusion is most of the time to compile them.
_jit_unfused = functools.partial(
  jax.jit, compiler_options={'xla_disable_hlo_passes': 'fusion'}
)


def evaluate(name: str, v, x) -> np.ndarray:
  """The function at up to 4000 points, by one program for each dtype."""
  v, x = np.broadcast_arrays(v, x)
  got = _COMPILED[name](np.resize(v, _POINTS), np.resize(x, _POINTS))
  return np.asarray(got)[: v.size]


@functools.cache
def derivatives_along(name: str):
  """The compiled (v, x, dv, dx) -> change of the function."""
  f = _FUNCTIONS[name]
  return _jit_unfused(lambda v, x, dv, dx: jax.jvp(f, (v, x), (dv, dx))[1])


def error(got, want, floor: float = 1.0) -> float:
  """The largest error over max(floor, |want|)."""
  got = np.asarray(got, np.float64)
  assert np.isfinite(got).all()
  return float(np.max(np.abs(got - want) / np.maximum(floor, np.abs(want))))


def points(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """v and x, log-uniform from 1e-8 to 1e6."""
  rng = np.random.default_rng(seed)
  return tuple(10 ** rng.uniform(-8, 6, (2, _POINTS)))


def whole_range(dtype) -> tuple[np.ndarray, np.ndarray]:
  """v and x over the normal numbers of a dtype, and of about the same size."""
  limits = np.finfo(dtype)
  ends = np.log10(float(limits.tiny)) + 0.1, np.log10(float(limits.max)) - 3
  rng = np.random.default_rng(4)
  v, x = 10 ** rng.uniform(*ends, (2, 100))
  v[:40] = 10 ** rng.uniform(-2, 2, 40)
  x[20:60] = 10 ** rng.uniform(-2, 2, 40)
  x[80:] = v[80:] * 10 ** rng.uniform(-3, 3, 20)
  corners = [(5, 1e-20), (0, limits.max), (0.3, limits.tiny)]
  corners += [(13, limits.max), (30, limits.tiny)]
  v, x = np.concatenate([(v, x), np.transpose(corners)], 1).astype(dtype)
  inside = (x >= limits.tiny) & (x <= limits.max)
  return v[inside], x[inside]


def exact(name: str, v, x):
  """The logarithm with 40 digits: the uniform expansion, or near 0 mpmath."""
  v, x = mpmath.mpf(float(v)), mpmath.mpf(float(x))
  h, sign = mpmath.hypot(v, x), 1 if name == 'iv' else -1
  if h < 100:
    f = mpmath.besseli if name == 'iv' else mpmath.besselk
    return mpmath.log(f(v, x))
  w, y = sign / h, (v / h) ** 2
  terms = [
    w**k * sum(c * y**i for i, c in enumerate(q))
    for k, q in enumerate(_bessel._debye(12), 1)
  ]
  tail = 1 + sum(terms)  # the next is below 1e-22
  factor = 2 * mpmath.pi if name == 'iv' else 2 / mpmath.pi
  exponent = sign * (h - v * mpmath.asinh(v / x))
  return exponent - mpmath.log(factor * h) / 2 + mpmath.log(tail)


def forward_in_x(f):
  """The function (v, x) -> value and d/dx, by forward mode."""
  return lambda v, x: jax.jvp(lambda x: f(v, x), (x,), (jnp.ones_like(x),))


def reverse_in_x(f):
  """The same by reverse mode."""
  return jax.value_and_grad(f, 1)


class TableTest(parameterized.TestCase):
  @parameterized.parameters(('iv', 1e-13), ('kv', 2e-13))
  def test_float64(self, name, bound):
    with jax.enable_x64(True):
      got = evaluate(name, _V, _X)
    self.assertEqual(got.dtype, np.float64)
    self.assertLess(error(got, _TABLE[f'log_{name}']), bound)

  @parameterized.parameters(('iv', 5e-6), ('kv', 2e-5))
  def test_float32(self, name, bound):
    got = evaluate(name, np.float32(_V), np.float32(_X))
    self.assertEqual(got.dtype, np.float32)
    # The reference is at the decimal; rounding v and x moves the logarithm.
    moved = np.abs(_V * _TABLE[f'dlog_{name}_dv']) + np.abs(
      _X * _TABLE[f'dlog_{name}_dx']
    )
    want = _TABLE[f'log_{name}']
    slack = 2.0**-24 * moved / np.maximum(1, np.abs(want))
    off = np.abs(np.asarray(got) - want) / np.maximum(1, np.abs(want))
    np.testing.assert_array_less(off, bound + slack)

  # Those of log_iv are in the modified Bessel equation.
  @parameterized.product(name=('kv',), argument=(0, 1))
  def test_derivatives(self, name, argument):
    self.assert_derivatives(name, argument)

  @parameterized.product(name=('iv',), argument=(0, 1))
  @pytest.mark.slow
  def test_derivatives_of_iv(self, name, argument):
    self.assert_derivatives(name, argument)

  def assert_derivatives(self, name, argument):
    tangents = [np.zeros_like(_V), np.zeros_like(_X)]
    tangents[argument][:] = 1
    with jax.enable_x64(True):
      got = derivatives_along(name)(_V, _X, *tangents)
    want = _TABLE[f'dlog_{name}_d{"vx"[argument]}']
    self.assertLess(error(got, want, 1e-3), 1e-10)
    if (name, argument) == ('kv', 0):
      np.testing.assert_array_equal(np.asarray(got)[_V == 0], 0)


class WholeRangeTest(parameterized.TestCase):
  @parameterized.product(
    name=('iv', 'kv'), dtype_bound=((np.float32, 2e-6), (np.float64, 2e-14))
  )
  def test_against_mpmath(self, name, dtype_bound):
    dtype, bound = dtype_bound
    v, x = whole_range(dtype)
    with jax.enable_x64(dtype == np.float64):
      got = evaluate(name, v, x)
    self.assertEqual(got.dtype, dtype)
    with mpmath.workdps(40):
      want = [exact(name, *point) for point in zip(v, x, strict=True)]
    with np.errstate(over='ignore'):
      want = np.array([float(w) for w in want])
    self.assertLess(error(got, want), bound)

  def test_derivatives_of_kv(self):
    self.assert_derivatives('kv')

  @pytest.mark.slow
  def test_derivatives_of_iv(self):
    self.assert_derivatives('iv')

  def assert_derivatives(self, name):
    # Where v is far above x, log I is v log(x / 2) - log Gamma(v + 1), and
    # log K minus that but for log(2 v).
    tiny = np.finfo(np.float64).tiny
    v = np.array([3.0, 7, 1e3, 1e150, 30, 4.4, 0.4])
    x = np.array([1e-200, 1e-200, 1e-12, 1e-3, 1e-300, 2 * tiny, 4 * tiny])
    sign = 1 if name == 'iv' else -1
    in_v = np.log(x / 2) - special.digamma(v + 1)
    in_v = sign * in_v - (0 if name == 'iv' else 1 / v)
    sizes = np.resize(v, _V.shape), np.resize(x, _V.shape)
    ones, zeros = np.ones_like(_V), np.zeros_like(_V)
    with jax.enable_x64(True):
      f = derivatives_along(name)
      along_v = np.asarray(f(*sizes, ones, zeros))[: len(v)]
      along_x = np.asarray(f(*sizes, zeros, ones))[: len(v)]
      nothing = np.asarray(f(*np.nan * np.array(sizes), ones, ones))
    # K_v is even in v, which counts where x^2v does not vanish beside 1.
    np.testing.assert_allclose(along_v, in_v, rtol=1e-12)
    np.testing.assert_allclose(along_x, sign * v / x, rtol=1e-13)
    self.assertTrue(np.isnan(nothing).all())


class IdentityTest(parameterized.TestCase):
  def test_wronskian(self):
    # x (I_v K_{v+1} + I_{v+1} K_v) = 1; errors of the logarithms add up.
    v, x = points(1)
    with jax.enable_x64(True):
      parts = [
        evaluate('iv', v, x),
        evaluate('kv', v + 1, x),
        evaluate('iv', v + 1, x),
        evaluate('kv', v, x),
      ]
    total = np.logaddexp(parts[0] + parts[1], parts[2] + parts[3]) + np.log(x)
    size = 1 + sum(map(np.abs, parts))
    np.testing.assert_array_less(np.abs(total), 1e-13 * size)

  def test_half_order(self):
    x = 10 ** np.linspace(-6, 5, 500)
    with jax.enable_x64(True):
      got = evaluate('kv', 0.5, x)
    want = 0.5 * np.log(np.pi / (2 * x)) - x
    self.assertLess(error(got, want), 2e-15 * 8)

  def test_bounds_of_the_ratio(self):
    # Amos, "Computation of modified Bessel functions and their ratios" (1974).
    v, x = points(2)
    with jax.enable_x64(True):
      ratio = np.asarray(jax.jit(_bessel.iv_ratio)(v, x))
    low = x / (v + 0.5 + np.sqrt((v + 1.5) ** 2 + x * x))
    high = x / (v + 0.5 + np.sqrt((v + 0.5) ** 2 + x * x))
    slack = 1e-12
    self.assertTrue((ratio >= low * (1 - slack)).all())
    self.assertTrue((ratio <= high * (1 + slack)).all())

  def test_k_is_even_in_its_order(self):
    v, x = np.float32(points(3))
    np.testing.assert_allclose(
      evaluate('kv', -v, x), evaluate('kv', v, x), rtol=1e-6, atol=1e-6
    )

  @pytest.mark.slow
  @pytest.mark.long('second derivatives of long programs, in both arguments')
  def test_second_derivatives_are_finite(self):
    v = np.float32([0, 0, 1e5, 1e5])
    x = np.float32([1e-8, 1e5, 1e-8, 1e5])
    with jax.enable_x64(True):
      for f in _FUNCTIONS.values():
        hessian = _jit_unfused(jax.vmap(jax.hessian(f, (0, 1))))
        for leaf in jax.tree.leaves(hessian(np.float64(v), np.float64(x))):
          self.assertTrue(np.isfinite(leaf).all())

  def test_modified_bessel_equation_in_float32(self):
    # With r = d/dx log I: r' = 1 + v^2 / x^2 - r / x - r^2.
    v, x = np.float32([[0, 0.7, 3, 20], [0.5, 3, 8, 40]])
    f = forward_in_x(jax.grad(log_iv, 1))
    in_v = jax.grad(log_iv, 0)
    both = _jit_unfused(jax.vmap(lambda v, x: (*f(v, x), in_v(v, x))))
    r, slope, along_v = map(np.float64, both(v, x))
    v, x = np.float64(v), np.float64(x)
    want = v / x + special.ive(v + 1, x) / special.ive(v, x)
    # A few roundings of results and terms, none of which is above 2.
    np.testing.assert_allclose(r, want, rtol=8 * 2.0**-24)
    want = 1 + (v / x) ** 2 - want / x - want * want
    np.testing.assert_allclose(slope, want, rtol=0, atol=16 * 2.0**-24)
    # d/dv by central differences with errors below 1e-8. It sums log(x / 2),
    # digamma(v + 1) and a part of the series, each below 4.
    v, x, h = v[1:], x[1:], 1e-4
    low, high = (np.log(special.ive(v + d, x)) for d in (-h, h))
    want = (high - low) / (2 * h)
    np.testing.assert_allclose(along_v[1:], want, rtol=0, atol=64 * 2.0**-24)

  @parameterized.product(
    name=('iv', 'kv'), derivative=(forward_in_x, reverse_in_x)
  )
  @pytest.mark.slow
  def test_modified_bessel_equation(self, name, derivative):
    v, x = np.array([0.0, 0.7, 3.0, 20.0]), np.array([0.5, 3.0, 8.0, 40.0])
    first = jax.grad(_FUNCTIONS[name], 1)
    with jax.enable_x64(True):
      both = _jit_unfused(jax.vmap(derivative(first)))(v, x)
    r, slope = map(np.asarray, both)
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
    ('iv', 2, 1e-40, -np.inf),
    ('kv', 2, 1e-40, np.inf),
    ('iv', np.inf, 1, -np.inf),
  )
  def test_values(self, name, v, x, want):
    got = evaluate(name, np.float32(v), np.float32(x))
    np.testing.assert_equal(got, np.float32([want]))

  def test_takes_integers(self):
    for f in _FUNCTIONS.values():
      self.assertEqual(jax.eval_shape(f, 1, 0).dtype, np.float32)

  def test_composes(self):
    v, x = np.float32([0.5, 7]), np.float32([[1], [2], [30]])
    rows = jax.jit(jax.vmap(lambda x: log_iv(v, x)))(x)
    self.assertEqual(rows.shape, (3, 2))
    want = evaluate('iv', *map(np.ravel, np.broadcast_arrays(v, x)))
    np.testing.assert_allclose(np.ravel(rows), want, rtol=1e-6)
    for f in _FUNCTIONS.values():
      self.assertEqual(jax.eval_shape(f, v, x).shape, (3, 2))

  @pytest.mark.slow
  def test_is_the_same_without_jit(self):
    v, x = np.float32([0.5, 7]), np.float32([[1], [2], [30]])
    for f in _FUNCTIONS.values():
      want = f(v, x)
      self.assertEqual(want.shape, (3, 2))
      np.testing.assert_allclose(jax.jit(f)(v, x), want, rtol=1e-6)
      rows = jax.jit(jax.vmap(lambda x, f=f: f(v, x)))(x)
      np.testing.assert_allclose(rows, want, rtol=1e-6)

  def test_refuses(self):
    with self.assertRaisesRegex(TypeError, 'x.dtype=float16'):
      log_iv(1, np.float16(1))
    with self.assertRaisesRegex(ValueError, 'does not broadcast'):
      log_kv(np.ones(2), np.ones(3))


if __name__ == '__main__':
  absltest.main()
