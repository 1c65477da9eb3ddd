"""Tests of the reductions of the range, with Taylor series for cores.

The oracle is NumPy in float64. A degree-8 Taylor core is exact to 2^-28 on its
interval, so that the errors are those of rounding: half an ulp for the result,
half of one for the last step of the core, and less for what comes before.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

from lowbit_pallas.arith import elementary

_F = np.float32
_MAX = float(np.finfo(_F).max)
_STEPS = 2**19


def _series(coefficients, x):
  y = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    y = y * x + _F(c)
  return y


def _exp2_core(r):
  return _series([math.log(2) ** k / math.factorial(k) for k in range(9)], r)


def _exp_core(r):
  return _series([1 / math.factorial(k) for k in range(9)], r)


def _log2_core(m):
  s = (m - 1.0) / (m + 1.0)
  return 2 / math.log(2) * s * _series([1, 1 / 3, 1 / 5, 1 / 7, 1 / 9], s * s)


def _sin_core(r):
  u = r * r
  return r * _series([1, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880], u)


def _cos_core(r):
  u = r * r
  return 1.0 + u * _series([-1 / 2, 1 / 24, -1 / 720, 1 / 40320], u)


def _inputs(lo, hi):
  """Both every so many values and every so many bit patterns of [lo, hi]."""
  values = np.linspace(lo, hi, _STEPS).astype(_F)
  largest = np.log2(max(abs(lo), abs(hi)))
  sizes = np.exp2(np.linspace(-126, largest, _STEPS)).astype(_F)
  sizes = np.concatenate([sizes, -sizes])
  sizes = np.clip(sizes, _F(lo), _F(hi))
  return np.concatenate([values, sizes[np.abs(sizes) >= _F(2.0**-126)]])


def _largest_error(fn, reference, lo, hi):
  """In ulp of the true result; subnormal results count as zero."""
  x = _inputs(lo, hi)
  y = np.asarray(jax.jit(fn)(x)).astype(np.float64)
  with np.errstate(over='ignore'):
    f = reference(x.astype(np.float64))
  f = np.where(np.abs(f) < 2.0**-126, 0, np.where(f > _MAX, np.inf, f))
  same = f == y
  with np.errstate(invalid='ignore', divide='ignore'):
    ulp = np.exp2(np.floor(np.log2(np.abs(f))) - 23)
    error = np.where(same, 0, np.abs(y - f) / ulp)
  return np.max(np.where(np.isnan(error), np.inf, error))


_EXP2 = elementary.exp2_split(_exp2_core)
_EXP = elementary.exp_split(_exp_core)
_LOG2 = elementary.log2_split(_log2_core)
_SIN = elementary.sin_pio2(_sin_core, _cos_core)
_COS = elementary.sin_pio2(_sin_core, _cos_core, 1)


class SplitTest(parameterized.TestCase):
  # e^x near overflow would count an overflow half an ulp early as infinite.
  @parameterized.named_parameters(
    ('exp2', _EXP2, np.exp2, -_MAX, 127.999, 1.1),
    ('exp2_near_zero', _EXP2, np.exp2, -2, 2, 1.1),
    ('exp', _EXP, np.exp, -_MAX, 88.72, 1.2),
    ('exp_near_zero', _EXP, np.exp, -2, 2, 1.2),
    ('log2', _LOG2, np.log2, 2.0**-126, _MAX, 4),
    ('sin', _SIN, np.sin, -1e5, 1e5, 2),
    ('cos', _COS, np.cos, -1e5, 1e5, 2),
    ('sin_turn', _SIN, np.sin, -7, 7, 2),
    ('cos_turn', _COS, np.cos, -7, 7, 2),
  )
  def test_error(self, fn, reference, lo, hi, bound):
    self.assertLess(_largest_error(fn, reference, lo, hi), bound)

  @parameterized.named_parameters(
    ('exp2', _EXP2, [1, 1, np.inf, 0, 0, np.inf, 0]),
    ('exp', _EXP, [1, 1, np.inf, 0, 0, np.inf, 0]),
    ('log2', _LOG2, [-np.inf, -np.inf, np.inf, np.nan, np.nan, 7, np.nan]),
    ('sin', _SIN, [0, -0.0, np.nan, np.nan, np.sin(-127), np.sin(128), None]),
    ('odd', elementary.odd_clamp(lambda a: a, 1), [0, -0.0, 1, -1, -1, 1, -1]),
  )
  def test_special_values(self, fn, expected):
    x = np.array([0, -0.0, np.inf, -np.inf, -127, 128, -_MAX], _F)
    y = np.asarray(jax.jit(fn)(x))
    for given, got, want in zip(x, y, expected, strict=True):
      if want is not None:
        np.testing.assert_allclose(got, want, 2e-7, err_msg=str(given))
        if not np.isnan(want):
          self.assertEqual(np.signbit(got), np.signbit(want), given)

  @parameterized.parameters(_EXP2, _EXP, _LOG2, _SIN, _COS)
  def test_every_kind_of_nan_stays_nan(self, fn):
    x = np.array([0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC12345], np.uint32)
    np.testing.assert_array_equal(jax.jit(fn)(x.view(_F)), np.nan)

  def test_nan_of_odd(self):
    odd = elementary.odd_clamp(jnp.tanh, 9.0)
    self.assertTrue(np.isnan(odd(_F(np.nan))))

  def test_powers_of_two_are_exact(self):
    n = np.arange(-126, 128)
    power = np.ldexp(1.0, n).astype(_F)
    np.testing.assert_array_equal(jax.jit(_EXP2)(n.astype(_F)), power)
    np.testing.assert_array_equal(jax.jit(_LOG2)(power), n)

  def test_ends_of_exp(self):
    largest, above = _F(88.72283), _F(88.72284)
    lowest, below = _F(-87.33654), _F(-87.33655)
    y = np.asarray(jax.jit(_EXP)(np.array([largest, above, lowest, below])))
    self.assertTrue(np.isfinite(y[0]) and y[0] > 3.4e38)
    self.assertEqual(y[1], np.inf)
    self.assertGreaterEqual(y[2], 2.0**-126)
    self.assertEqual(y[3], 0)

  def test_nearest_multiples_of_pi_2(self):
    """252.8982 is 161 pi/2 but for 2^-27.8, the nearest of all to 1e5."""
    n = np.arange(1, 63663)
    x = (n * (np.pi / 2)).astype(_F)
    y = np.asarray(jax.jit(_SIN)(x)).astype(np.float64)
    f = np.sin(x.astype(np.float64))
    ulp = np.exp2(np.floor(np.log2(np.abs(f))) - 23)
    self.assertLess(np.max(np.abs(y - f) / ulp), 2)


class KernelTest(parameterized.TestCase):
  @parameterized.parameters(
    'exp2',
    'exp',
    'log2',
    'sin',
    'cos',
    'tanh',
    'sigmoid',
    'erf',
    'gelu',
    'softplus',
  )
  def test_lowers_inside_a_kernel_for_tpu(self, name):
    def kernel(x_ref, y_ref):
      y_ref[...] = getattr(elementary, name)(x_ref[...])

    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    traced = jax.jit(pl.pallas_call(kernel, out_shape=x)).trace(x)
    lowered = traced.lower(lowering_platforms=('tpu',))
    self.assertIn('tpu_custom_call', lowered.as_text())


if __name__ == '__main__':
  absltest.main()
