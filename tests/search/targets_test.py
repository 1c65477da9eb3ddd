"""Targets: values, weights and derivatives by independent functions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from scipy import special

from lowbit_jax.search import polish, targets
from lowbit_jax.search.program import ADD, DIV, MUL, SUB, Program

_ORACLE = {
  'exp': np.exp,
  'exp2': np.exp2,
  'expm1': np.expm1,
  'log': np.log,
  'log2': np.log2,
  'log1p': np.log1p,
  'sin': np.sin,
  'cos': np.cos,
  'tanh': np.tanh,
  'sigmoid': special.expit,
  'erf': special.erf,
  'gelu': lambda x: x * special.ndtr(x),
  'softplus': lambda x: np.logaddexp(0, x),
  'rsqrt': lambda x: x**-0.5,
  'airy_ai': lambda x: special.airy(x)[0],
}
_ALL = tuple(targets.TARGETS)
# Name, interval, error, operations around the core, and the best p / q with
# q_0 = 1, from a table of minimax approximations; p of gelu is z times one.
_RATIONALS = (
  ('tanh', None, 7.739314e-4, 2,
   (0.99922606856, 0.0892026193401, 3.75493130008e-4),
   (0.419287635133, 0.009321376659)),
  ('erf', (0.0, 1.0), 1.129424e-7, 2,
   (1.12837903965369, 0.11888956736153, 0.016280702048829),
   (0.43869021715081, 0.060714051751083)),
  ('sigmoid', None, 2.62146e-6, 3,
   (0.249994111268043, 0.00751545527299, 3.19426412764e-5, 1.15445924581e-8),
   (0.113377548364826, 0.0012464996112, 1.85001809874e-6)),
  ('gelu', None, 2.516247e-5, 3,
   (0, 0.398762479226, 0.0329916340216, 0.00372717744622, 2.6637026042e-5),
   (0.248443057089, 0.0263702606895, 0.00102400778234)),
  ('log2', None, 2.473689e-6, 0,
   (-3.849676918677, 1.4248489209917, 2.4248387574863),
   (2.8496985606376, 0.5000000878946)),
  ('exp2', None, 4.340299e-7, 0,
   (1.0000004340672, 0.3664808702594, 0.0477323062572),
   (-0.326644705229, 0.0337518174265)),
)  # fmt: skip


def _mine(**changes):
  arguments = {'exact': mpmath.exp, 'interval': (0.0, 1.0)}
  return targets.Target('mine', **{**arguments, **changes})


def _x(target, z):
  return np.sqrt(z) if target.parity in ('even', 'odd') else z


def _symmetric(target):
  return target.parity in ('even', 'odd') and target.interval[0] < 0


def _f(target, x, p):
  """f(x) from the value p of the core there."""
  if target.parity in ('root', 'odd'):
    return target.offset + x * p
  return target.offset * x + p


class TargetsTest(parameterized.TestCase):
  def test_all_have_an_oracle(self):
    self.assertEqual(set(_ORACLE), set(_ALL))

  @parameterized.parameters(*_ALL)
  def test_values(self, name):
    target = targets.get(name)
    s = targets.samples(target, points=41, dense=200)
    for z, p in ((s.x, s.f), (s.dense_x, s.dense_f)):
      # A quotient by x amplifies rounding of the oracle near x = 0.
      x = _x(target, z)
      f = _f(target, x, p)
      # SciPy's Airy function is the least accurate: 1e-14 near its zeros.
      np.testing.assert_allclose(f, _ORACLE[name](x), rtol=1e-14, atol=1e-14)
    if _symmetric(target):
      x = -_x(target, s.x)
      f = _f(target, x, s.f)
      np.testing.assert_allclose(f, _ORACLE[name](x), rtol=0, atol=1e-14)

  @parameterized.parameters(*_ALL)
  def test_reference(self, name):
    target = targets.get(name)
    lo, hi = target.interval
    x = np.linspace(lo, hi, 99)
    with mpmath.workdps(30):
      exact = np.array([float(target.exact(mpmath.mpf(v))) for v in x])
    y = targets.reference(target)(x)
    self.assertEqual(y.dtype, np.float64)
    # What `certify` allows, 2^9 units of float64.
    np.testing.assert_allclose(y, exact, rtol=2.0**-44, atol=0)

  def test_reference_of_a_user(self):
    exact = lambda x: x.context.sin(x) / x
    target = targets.Target('sin', exact, (1.0, 2.0))
    x = np.linspace(1, 2, 9)
    np.testing.assert_allclose(
      targets.reference(target)(x), np.sin(x) / x, rtol=1e-15
    )

  @parameterized.product(name=_ALL, weight=('rel', 'abs', 'ulp32', 'ulp_bf16'))
  def test_weight_of_an_error_is_that_of_the_function(self, name, weight):
    target = dataclasses.replace(targets.get(name), weight=weight)
    try:
      s = targets.samples(target, dense=50)
    except ValueError as error:
      self.assertEqual(weight, 'rel')
      self.assertIn('divides by', str(error))
      return
    d = 1e-3
    x = _x(target, s.x)
    worst = np.zeros_like(x)
    for side in (x, -x) if _symmetric(target) else (x,):
      f = _ORACLE[name](side)
      shifted = _f(target, side, s.f + d)
      exponent = np.floor(np.log2(np.abs(f)))
      unit = {
        'rel': np.abs(f),
        'abs': 1.0,
        'ulp32': np.exp2(np.maximum(exponent, -126) - 23),
        'ulp_bf16': np.exp2(np.maximum(exponent, -126) - 7),
      }[weight]
      worst = np.maximum(worst, np.abs(shifted - f) / unit)
    np.testing.assert_allclose(d * s.w, worst, rtol=1e-9)

  @parameterized.parameters(*_ALL)
  def test_derivative(self, name):
    target = targets.get(name)
    if target.derivative is None:
      self.skipTest('autodiff')
    lo, hi = target.interval
    x = np.linspace(lo, hi, 51).astype(np.float32)
    f = _ORACLE[name](x.astype(np.float64))
    names = {
      'x': jnp.asarray(x), 'f': jnp.asarray(f, jnp.float32), 'jnp': jnp,
      'lax': lax,
    }  # fmt: skip
    derivative = eval(target.derivative, names)
    self.assertEqual(jnp.result_type(derivative), jnp.float32)
    exact = [float(mpmath.diff(target.exact, mpmath.mpf(float(v)))) for v in x]
    np.testing.assert_allclose(
      derivative * np.ones_like(x), exact, rtol=1e-5, atol=3e-7
    )

  @parameterized.parameters(*_RATIONALS)
  def test_known_best_rationals(self, name, interval, error, extra, p, q):
    target = targets.get(name)
    if interval is not None:
      target = dataclasses.replace(target, interval=interval)
    self.assertEqual(targets.extra_operations(target), extra)
    s = targets.samples(target)
    ones = np.polynomial.polynomial.polyval(s.dense_x, (1, *q))
    core = np.polynomial.polynomial.polyval(s.dense_x, p) / ones
    worst = np.max(np.abs(core - s.dense_f) * s.dense_w)
    self.assertLess(abs(worst / error - 1), 2e-3)

  def test_minimax_with_the_weight_of_a_target(self):
    target = _mine(
      exact=lambda x: 3 + x + x**5, interval=(-1.0, 1.0), parity='odd',
      offset=3.0, weight='abs',
    )  # fmt: skip
    fit = polish.minimax(
      targets.model(Program(((MUL, 0, 1, 0), (ADD, 3, 2, 0)), (0.1, 0.2))),
      lambda z: 1 + z * z,
      targets.core_interval(target),
      [0.1, 0.2],
      weight=targets.core_weight(target),
    )
    # x^5 - a x^3 - b x is the Chebyshev polynomial T_5 / 16.
    np.testing.assert_allclose(fit.constants, [20 / 16, 1 - 5 / 16], rtol=1e-6)
    np.testing.assert_allclose(fit.error, 1 / 16, rtol=1e-6)

  def test_weights_where_terms_cancel(self):
    target = dataclasses.replace(
      targets.get('sigmoid'), interval=(-80.0, 80.0), weight='rel'
    )
    s = targets.samples(target)
    x = np.sqrt(s.x)
    np.testing.assert_allclose(s.w, x / special.expit(-x), rtol=1e-12)

  @parameterized.parameters(
    (None, 0.0), ('root', 0.0), ('even', 0.0), ('even', 0.3), ('odd', 0.0),
    ('odd', 0.3),
  )  # fmt: skip
  def test_assembles_a_program(self, parity, offset):
    target = _mine(parity=parity, offset=offset)
    x = np.linspace(-1, 1, 9)
    z = x * x if parity in ('even', 'odd') else x
    # z * (z + c1) - c2 / (z * (z + c1)), and the core that is z itself.
    rows = ((ADD, 0, 1, 0), (MUL, 0, 3, 0), (DIV, 2, 4, 0), (SUB, 4, 5, 0))
    for core in (Program(rows, (3.5, 0.7)), Program(())):
      program = targets.assemble(target, core)
      self.assertEqual(
        len(program.rows) - len(core.rows), targets.extra_operations(target)
      )
      with np.errstate(all='ignore'):
        expected = _f(target, x, core(z))
      np.testing.assert_allclose(program(x), expected, rtol=1e-14)

  def test_leaves_the_mode_of_the_process(self):
    targets.samples(_mine())
    self.assertFalse(jax.config.jax_enable_x64)

  @parameterized.parameters(
    ({'interval': (1.0, 1.0)}, 'finite with lo < hi'),
    ({'interval': (1.0, 0.0)}, 'finite with lo < hi'),
    ({'interval': (0.0, math.inf)}, 'finite with lo < hi'),
    ({'interval': (0.0, math.nan)}, 'finite with lo < hi'),
    ({'interval': 3}, 'two numbers'),
    ({'parity': 'oddly'}, "parity='oddly' must be one of"),
    ({'weight': 'ulp'}, "weight='ulp' must be one of"),
    ({'parity': 'odd', 'interval': (-1.0, 2.0)}, r'must be \(-2.0, 2.0\) or'),
    ({'parity': 'even', 'interval': (1.0, 2.0)}, r'must be \(-2.0, 2.0\) or'),
    ({'offset': 0.5}, "needs parity='even' or 'odd'"),
    ({'offset': math.nan, 'parity': 'odd'}, 'must be finite'),
    ({'wrapper': lambda core: core}, 'reduced=None must be two numbers'),
    ({'derivative': 'f +'}, 'must be a Python expression'),
    ({'derivative': 'f * y'}, r"uses \['y'\]"),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      _mine(**changes)

  def test_refuses_what_is_no_function_or_name(self):
    with self.assertRaisesRegex(TypeError, 'exact=1.0 must be a function'):
      _mine(exact=1.0)
    with self.assertRaisesRegex(TypeError, 'wrapper=2 must be a function'):
      _mine(wrapper=2)
    with self.assertRaisesRegex(ValueError, 'must be an ASCII identifier'):
      targets.Target('my target', mpmath.exp, (0.0, 1.0))
    with self.assertRaisesRegex(ValueError, "'expo' must be one of exp, exp2"):
      targets.get('expo')

  @parameterized.parameters(
    (mpmath.log, (-1.0, 1.0), 'is .*j.* at x=-0.9'),
    (lambda x: mpmath.nan if x > 0.5 else x + 1, (0.0, 1.0), 'nan at x=0.5'),
    (lambda x: 1 / (x - 1), (1.0, 2.0), 'fails at x=1.0 .*shrink'),
    (mpmath.gamma, (-1.0, 1.0), 'fails at x=-1.0'),
    (mpmath.sin, (-1.0, 1.0), r"weight='rel' divides by mine.*near x=0.00"),
    (mpmath.sin, (0.0, 1.0), "weight='rel' divides by mine.*near x=0;"),
    (mpmath.cos, (1.0, 2.0), "weight='rel' divides by mine.*near x=1.57"),
  )
  def test_refuses_to_sample(self, exact, interval, message):
    with self.assertRaisesRegex(ValueError, message):
      targets.samples(_mine(exact=exact, interval=interval))

  @parameterized.parameters('even', 'odd')
  def test_refuses_a_parity_that_is_none(self, parity):
    target = _mine(parity=parity, interval=(-1.0, 1.0))
    with self.assertRaisesRegex(ValueError, f"mine has no parity='{parity}'"):
      targets.samples(target)
    half = dataclasses.replace(target, interval=(0.0, 1.0))
    targets.samples(dataclasses.replace(half, offset=1.0), dense=9)

  def test_refuses_a_zero_inside_with_parity(self):
    target = _mine(exact=mpmath.sin, interval=(-4.0, 4.0), parity='odd')
    with self.assertRaisesRegex(ValueError, 'near x=3.14'):
      targets.samples(target)
    with self.assertRaisesRegex(ValueError, 'points=0 must be positive'):
      targets.samples(target, points=0)


if __name__ == '__main__':
  absltest.main()
