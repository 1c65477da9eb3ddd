"""Tests of the elementary functions: errors, edges, derivatives, certificates.

The oracle for values is that of the certificates, float64 and mpmath; for
derivatives it is mpmath's numerical differentiation with 40 digits.
"""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import special
from lowbit_jax.search import adopted, certify
from lowbit_pallas.arith import bits, elementary

_F = np.float32
_NAMES = [(name,) for name in adopted.FUNCTIONS]
_U = 2.0**-24
_INF, _NAN = np.inf, np.nan
_SIZE = 2**18
_compiled = functools.cache(jax.jit)


def _values(name, x) -> np.ndarray:
  """Values in float32 at up to _SIZE points, by one program, without `jit`."""
  x = np.asarray(x, _F)
  y = adopted.FUNCTIONS[name].function(np.resize(x, _SIZE))
  return np.asarray(y)[: x.size].reshape(x.shape)


def _error(fn, name, lo, hi):
  """Largest error in ulp over values of [lo, hi]."""
  x = np.linspace(lo, hi, _SIZE).astype(_F)
  y = np.asarray(jax.jit(fn)(x))
  f = adopted.FUNCTIONS[name].reference(x.astype(np.float64))
  return np.max(certify.ulp_error(y, f))


class CertificateTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_still_holds(self, name):
    entry = adopted.FUNCTIONS[name]
    certificate = adopted.load(name)
    with mock.patch.object(certify, 'CHUNK', _SIZE):  # as many inputs, in parts
      certify.check(certificate, entry.function, entry.reference)
    self.assertLess(certificate.max_ulp, special.MAX_ULP[name])

  @parameterized.parameters(*_NAMES)
  def test_is_of_these_constants(self, name):
    certified = [
      float.fromhex(c) for c in adopted.load(name).program['constants']
    ]
    self.assertEqual(certified, list(adopted.FUNCTIONS[name].constants))
    self.assertEqual(certified, [float(_F(c)) for c in certified])

  @parameterized.parameters(*_NAMES)
  def test_says_how_to_repeat_it(self, name):
    provenance = adopted.load(name).provenance
    self.assertIn(f'certify_special.py --function={name}', provenance.command)
    self.assertEqual(provenance.seed, adopted.SEED)

  @parameterized.parameters('sin', 'tanh', 'erf')
  def test_odd_functions_are_odd(self, name):
    """So that half of their arguments stand for all."""
    x = np.linspace(0, 20, _SIZE)
    np.testing.assert_array_equal(_values(name, -x), -_values(name, x))

  def test_cos_is_even(self):
    x = np.linspace(0, 1e5, _SIZE)
    np.testing.assert_array_equal(_values('cos', -x), _values('cos', x))

  def test_every_tier_has_a_function(self):
    self.assertEqual(list(special.MAX_ULP), list(adopted.FUNCTIONS))


@pytest.mark.slow
class EveryArgumentTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_stays_within_the_tier(self, name):
    entry = adopted.FUNCTIONS[name]
    result = certify.tiered(entry.function, entry.reference, entry.interval)
    self.assertLess(result.max_ulp, special.MAX_ULP[name])


@pytest.mark.slow
class PolishTest(absltest.TestCase):
  def test_starts_from_the_minimax_constants(self):
    start = [float(c) for c in adopted.FUNCTIONS['exp2'].start()]
    np.testing.assert_allclose(start, elementary.EXP2, 1e-4)


_HALF = (jnp.bfloat16, jnp.float16)
# All take other dtypes by one function, and other shapes element by element but
# for those with a slow path, of which sin is one.
_OTHERS = [name for (name,) in _NAMES if name != 'sin']


class ValueTest(parameterized.TestCase):
  @parameterized.parameters(
    ('exp2', [1, 1, _INF, 0, _NAN, 0, _INF]),
    ('exp', [1, 1, _INF, 0, _NAN, 0, _INF]),
    ('log2', [-_INF, -_INF, _INF, _NAN, _NAN, _NAN, 7.643856]),
    ('sin', [0, -0.0, _NAN, _NAN, _NAN, 0.873297, -0.873297]),
    ('cos', [1, 1, _NAN, _NAN, _NAN, 0.487188, 0.487188]),
    ('tanh', [0, -0.0, 1, -1, _NAN, -1, 1]),
    ('sigmoid', [0.5, 0.5, 1, 0, _NAN, 0, 1]),
    ('erf', [0, -0.0, 1, -1, _NAN, -1, 1]),
    ('gelu', [0, -0.0, _INF, -0.0, _NAN, -0.0, 200]),
    ('softplus', [0.693147, 0.693147, _INF, 0, _NAN, 0, 200]),
  )
  def test_special_values(self, name, expected):
    x = np.array([0, -0.0, _INF, -_INF, _NAN, -200, 200], _F)
    y = _values(name, x)
    for given, got, want in zip(x, y, expected, strict=True):
      np.testing.assert_allclose(got, want, 1e-6, err_msg=str(given))
      if not np.isnan(want):
        self.assertEqual(np.signbit(got), np.signbit(want), given)

  @parameterized.parameters(*_NAMES)
  def test_subnormal_arguments_are_near_those_at_zero(self, name):
    y, at_zero = _values(name, [2.0**-130, 0])
    if name == 'log2':
      self.assertEqual(y, -_INF)
    else:
      self.assertLessEqual(abs(float(y) - float(at_zero)), 2.0**-126)

  @parameterized.parameters(*_NAMES)
  def test_every_kind_of_nan_stays_nan(self, name):
    x = np.array([0x7FC00001, 0x7F800001, 0xFFC12345], np.uint32).view(_F)
    np.testing.assert_array_equal(_values(name, x), _NAN)

  @parameterized.parameters(('sin', np.sin), ('cos', np.cos))
  def test_large_angles_take_the_slow_path(self, name, reference):
    x = np.array([1e5, 1.1e5, -3e7, 1e20, 3e38, 0.5], _F)
    want = reference(x.astype(np.float64))
    # NumPy reduces float64 arguments exactly, which float32 numbers are.
    rows = jax.jit(jax.vmap(adopted.FUNCTIONS[name].function))
    for got in (_values(name, x), rows(x)):
      np.testing.assert_allclose(got, want, 2 * _U, 2 * _U)

  def assert_half_precision_is_rounded_once(self, name):
    fn = adopted.FUNCTIONS[name].function
    xs = [np.linspace(0.1, 8, 1001).astype(t) for t in _HALF]
    for x, y in zip(xs, jax.jit(lambda *xs: [*map(fn, xs)])(*xs), strict=True):
      self.assertEqual(y.dtype, x.dtype)
      np.testing.assert_array_equal(y, _values(name, x).astype(x.dtype))

  def test_half_precision_is_rounded_once(self):
    self.assert_half_precision_is_rounded_once('sin')

  @parameterized.parameters(*_OTHERS)
  @pytest.mark.slow
  def test_half_precision_is_rounded_once_by_others(self, name):
    self.assert_half_precision_is_rounded_once(name)

  def assert_transformations_change_nothing(self, name):
    fn = adopted.FUNCTIONS[name].function
    x = np.linspace(0.1, 9, 48).astype(_F).reshape(6, 8)
    y = _values(name, x)
    self.assertEqual(jax.eval_shape(fn, x).shape, x.shape)
    twice = jax.jit(jax.vmap(jax.vmap(fn)))
    np.testing.assert_allclose(twice(x), y, 4 * _U)
    np.testing.assert_allclose(fn(float(x[0, 0])), y[0, 0], 4 * _U)

  def test_transformations_change_nothing(self):
    self.assert_transformations_change_nothing('sin')

  @parameterized.parameters(*_OTHERS)
  @pytest.mark.slow
  def test_transformations_change_nothing_in_others(self, name):
    self.assert_transformations_change_nothing(name)

  def assert_is_the_same_with_jit(self, name):
    x = np.linspace(-30, 30, _SIZE).astype(_F)
    y = jax.jit(adopted.FUNCTIONS[name].function)(x)
    np.testing.assert_array_equal(y, _values(name, x))

  def test_is_the_same_with_jit(self):
    self.assert_is_the_same_with_jit('tanh')
    self.assert_is_the_same_with_jit('sin')

  @parameterized.parameters(*_OTHERS)
  @pytest.mark.slow
  def test_is_the_same_with_jit_in_others(self, name):
    self.assert_is_the_same_with_jit(name)

  @parameterized.parameters(*_NAMES)
  def test_other_dtypes_are_refused(self, name):
    with self.assertRaisesRegex(TypeError, r'x\.dtype=int32 must be one of'):
      adopted.FUNCTIONS[name].function(jnp.arange(3))


_POINTS = (-9.7, -2.3, -0.4, 0.3, 1.6, 7.1)


@functools.cache
def _reverse(name):
  """The first and second derivative by reverse mode at points, compiled."""
  first = jax.grad(adopted.FUNCTIONS[name].function)
  return jax.jit(jax.vmap(jax.value_and_grad(first)))


class DerivativeTest(parameterized.TestCase):
  def assert_is_derivative(self, order, name, derivative):
    entry = adopted.FUNCTIONS[name]
    x = np.abs(_POINTS) if name == 'log2' else np.array(_POINTS)
    x = x.astype(_F)
    with mpmath.workdps(40):
      want = [float(mpmath.diff(entry.exact, float(v), order)) for v in x]
    # Sums in the derivatives of gelu cancel near their zeros.
    absolute = 1e-8 if name == 'gelu' else 2.0**-126
    np.testing.assert_allclose(derivative(x), want, 1e-5, absolute)

  @parameterized.parameters(*_NAMES)
  def test_of_points(self, name):
    for order in (1, 2):
      self.assert_is_derivative(
        order, name, lambda x, i=order - 1: _reverse(name)(x)[i]
      )

  def assert_is_derivative_forward(self, name):
    twice = jax.jacfwd(jax.jacfwd(adopted.FUNCTIONS[name].function))
    self.assert_is_derivative(2, name, jax.jit(jax.vmap(twice)))

  def test_of_points_by_forward_mode(self):
    self.assert_is_derivative_forward('gelu')

  @parameterized.parameters(*(name for (name,) in _NAMES if name != 'gelu'))
  @pytest.mark.slow
  def test_of_points_by_forward_mode_in_others(self, name):
    self.assert_is_derivative_forward(name)

  @parameterized.parameters(
    ('tanh', _INF, 0),
    ('tanh', 40, 0),
    ('erf', -_INF, 0),
    ('sigmoid', -_INF, 0),
    ('gelu', _INF, 1),
    ('gelu', -_INF, 0),
    ('gelu', 0, 0.5),
    ('gelu', 2.0**-126, 0.5),
    ('gelu', -1.9 * 2.0**-126, 0.5),
    ('erf', 2.0**-126, 2 / math.sqrt(math.pi)),
    ('tanh', 2.0**-126, 1),
    ('softplus', 2.0**-126, 0.5),
    ('gelu', 60, 1),
    ('softplus', _INF, 1),
    ('exp', -_INF, 0),
    ('log2', _INF, 0),
    ('tanh', 0, 1),
  )
  def test_at_the_ends(self, name, x, want):
    got, _ = _reverse(name)(np.full(len(_POINTS), x, _F))
    np.testing.assert_allclose(got, want, 1e-6, 1e-30)

  def test_of_arrays_in_bfloat16(self):
    x = np.array([0.5, 1.5], jnp.bfloat16)
    slope = jax.jit(jax.grad(lambda x: special.tanh(x).sum()))(x)
    self.assertEqual(slope.dtype, jnp.bfloat16)
    np.testing.assert_allclose(
      slope.astype(_F), 1 - np.tanh([0.5, 1.5]) ** 2, 2**-8
    )


def _unfenced(x):
  magic = 12582912.0
  shifted = x + magic
  return bits.to_bits(shifted), shifted - magic


@pytest.mark.slow
class MutantTest(parameterized.TestCase):
  """Faults that the measure of error must see."""

  def test_without_the_fence_rounding_vanishes(self):
    self.assertLess(_error(elementary.exp2, 'exp2', -20, 20), 1)
    with mock.patch.object(elementary, '_nearest', _unfenced):
      self.assertGreater(
        _error(lambda x: elementary.exp2(x), 'exp2', -20, 20), 1e3
      )

  def test_without_the_second_part_of_ln_2(self):
    high, low = elementary._LN2
    with mock.patch.object(elementary, '_LN2', (high, 0.0)):
      error = _error(lambda x: elementary.exp(x), 'exp', -80, 80)
    self.assertGreater(error, 1.5)
    self.assertGreater(low, 0)

  @parameterized.parameters(2, 3)
  def test_without_a_part_of_pi_2(self, part):
    kept = list(elementary._PI_2)
    kept[part] = 0.0
    # Nearest multiples of pi/2, where the last parts decide.
    x = (np.arange(1, 60000) * (math.pi / 2)).astype(_F)
    f = np.sin(x.astype(np.float64))
    whole = np.asarray(_compiled(elementary.sin)(x))
    self.assertLess(np.max(certify.ulp_error(whole, f)), 1)
    with mock.patch.object(elementary, '_PI_2', tuple(kept)):
      y = np.asarray(jax.jit(lambda x: elementary.sin(x))(x))
    self.assertGreater(np.max(certify.ulp_error(y, f)), 2)

  def test_with_equal_products(self):
    """One of them would be rounded where it must not be."""
    x = (np.arange(1, 60000) * (math.pi / 2)).astype(_F)
    f = np.sin(x.astype(np.float64))
    with mock.patch.object(elementary, '_PI_2_REST', elementary._PI_2[2]):
      y = np.asarray(jax.jit(lambda x: elementary.sin(x))(x))
    self.assertGreater(np.max(certify.ulp_error(y, f)), 2)

  def test_another_last_digit(self):
    changed = list(elementary.TANH)
    changed[0] *= 1 + 2.0**-20
    error = _error(lambda x: elementary.tanh(x, changed), 'tanh', 0.1, 5)
    self.assertGreater(error, special.MAX_ULP['tanh'])


if __name__ == '__main__':
  absltest.main()
