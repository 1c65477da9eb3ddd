"""Minimax constants against printed errors of classical approximations."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax.search import polish
from lowbit_jax.search.program import ADD, DIV, MUL, SUB, Program

_LONG = np.longdouble
_UNIT = (0.0, 1.0)


def exp2(x):
  return np.exp2(np.asarray(x, _LONG))


def symmetric(squarings: int) -> Program:
  """(c4 / (c1 / u + c2 + u) - c5)^(2^squarings), u = c3 / x + x.

  A [4/4] rational with f(x) f(-x) = 1 in seven operations ('AutoNumerics-Zero',
  2023). The start matches kappa coth(a x / 2) through x^3, a = ln 2 / 2^k.
  """
  a, q = np.log(_LONG(2)) / 2**squarings, 15 + np.sqrt(_LONG(45))
  kappa = q / a
  constants = (kappa**3 * a / 90, -kappa, 2 * kappa / a, 2 * kappa, -_LONG(1))
  rows = [
    (DIV, 3, 0, 0),
    (ADD, 6, 0, 0),
    (DIV, 1, 7, 0),
    (ADD, 8, 2, 0),
    (ADD, 9, 7, 0),
    (DIV, 4, 10, 0),
    (SUB, 11, 5, 0),
  ]
  rows += [(MUL, 12 + i, 12 + i, 0) for i in range(squarings)]
  return Program(tuple(rows), constants)


class MinimaxTest(parameterized.TestCase):
  def test_polynomial(self):
    fit = polish.minimax(polish.polynomial(5), exp2, _UNIT, [0] * 6)
    self.assertAlmostEqual(fit.error / 7.4936e-8, 1, delta=1e-3)

  @parameterized.parameters((2, 4.3403e-7), (3, 9.3094e-11))
  def test_rational(self, n, error):
    start = polish.rational_start(n, n, exp2, _UNIT)
    fit = polish.minimax(polish.rational(n, n), exp2, _UNIT, start)
    self.assertAlmostEqual(fit.error / error, 1, delta=1e-3)
    if n == 2:
      self.assertAlmostEqual(
        float(fit.constants[0]), 1.00000043403, delta=1e-10
      )

  @parameterized.parameters((0, 5.636e-10), (3, 2.192e-15))
  def test_ten_operations_for_fourteen_digits(self, squarings, error):
    program = symmetric(squarings)
    fit = polish.minimax(
      program.value_and_jacobian, exp2, _UNIT, program.constants
    )
    self.assertLess(fit.error / error, 1.001)
    self.assertGreater(fit.error / error, 0.99)

  def test_error_alternates(self):
    # Chebyshev: degree n is best if n + 2 extrema of one size change sign.
    model = polish.polynomial(3)
    fit = polish.minimax(model, exp2, _UNIT, [0] * 4)
    x = np.linspace(0, 1, 5001, dtype=_LONG)
    e = model(x, fit.constants)[0] / exp2(x) - 1
    near = np.sign(e[np.abs(e) > 0.999 * fit.error])
    self.assertEqual(1 + np.sum(near[1:] != near[:-1]), 5)

  def test_weight_and_parity(self):
    model = polish.polynomial(3, parity='odd')
    interval = (-np.pi / 4, np.pi / 4)
    fit = polish.minimax(model, np.sin, interval, [1, 0, 0, 0])
    self.assertAlmostEqual(fit.error / 3.2e-9, 1, delta=0.03)
    absolute = polish.minimax(
      model, np.sin, interval, [1, 0, 0, 0], weight='abs'
    )
    self.assertLess(absolute.error, fit.error)

  def test_refuses(self):
    model = polish.polynomial(1)
    with self.assertRaisesRegex(ValueError, "weight='ulp'"):
      polish.minimax(model, exp2, _UNIT, [0, 0], weight='ulp')
    with self.assertRaisesRegex(ValueError, 'lo < hi'):
      polish.minimax(model, exp2, (1.0, 0.0), [0, 0])
    with self.assertRaisesRegex(ValueError, 'not finite'):
      polish.minimax(model, lambda x: x * np.inf, _UNIT, [0, 0])


class Float32Test(absltest.TestCase):
  def test_lowers_the_error_of_the_compiled_function(self):
    def fn(c, x):
      total = c[-1]
      for i in range(len(c) - 2, -1, -1):
        total = total * x + c[i]
      return total

    start = polish.minimax(
      polish.polynomial(4), exp2, (0.0, 0.5), [0] * 5
    ).constants
    options = {'samples': 2**12, 'evaluations': 150}
    runs = [
      polish.float32_coefficients(fn, start, np.exp2, (0.0, 0.5), **options)
      for _ in range(2)
    ]
    first = polish.float32_coefficients(
      fn, start, np.exp2, (0.0, 0.5), samples=2**12, evaluations=1
    )
    self.assertLess(runs[0].error, first.error)
    np.testing.assert_array_equal(runs[0].constants, runs[1].constants)
    self.assertEqual(jnp.asarray(runs[0].constants).dtype, jnp.float32)


if __name__ == '__main__':
  absltest.main()
