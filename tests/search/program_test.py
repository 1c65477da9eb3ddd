"""Straight-line programs: evaluation, derivatives and the canonical form."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax.search import program as programs
from lowbit_jax.search.program import ADD, DIV, FMA, MUL, SUB, Program

_X = np.linspace(0.3, 1.7, 100)


def random_program(rng, ops=(ADD, SUB, MUL, DIV, FMA)) -> Program:
  k, n = rng.integers(1, 4), rng.integers(1, 9)
  rows = []
  for i in range(n):
    op = int(rng.choice(ops))
    operands = [int(j) for j in rng.integers(0, 1 + k + i, 3)]
    operands[programs.OPS[op].arity :] = [0] * (3 - programs.OPS[op].arity)
    rows.append((op, *operands))
  constants = rng.uniform(0.5, 2, k) * rng.choice([-1, 1], k)
  return Program(tuple(rows), tuple(constants.tolist()))


class ProgramTest(parameterized.TestCase):
  def test_evaluates_in_the_arithmetic_of_its_argument(self):
    square = Program(((MUL, 0, 0, 0), (ADD, 2, 1, 0)), (0.1,))
    self.assertEqual(square(2.0), 4.1)
    self.assertEqual(square(np.longdouble(2)), np.longdouble(0.1) + 4)
    self.assertEqual(square(jnp.float32(2)).dtype, jnp.float32)
    self.assertEqual(str(square), 'x * x + c1')

  def test_jacobian(self):
    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(50):
      p = random_program(rng)
      c = np.array(p.constants)
      y, jacobian = p.value_and_jacobian(_X, c)
      np.testing.assert_allclose(y, p(_X) * np.ones_like(_X), rtol=1e-12)
      for i, unit in enumerate(np.eye(len(c))):
        up, down = (
          p.value_and_jacobian(_X, c + s * step * unit)[0] for s in (1, -1)
        )
        size = np.max(np.abs([up, down, y]), 0)
        smooth = np.isfinite(size) & (size < 1e3)
        error = np.abs((up - down) / (2 * step) - jacobian[:, i])
        bound = 1e-3 * (1 + np.abs(jacobian[:, i]) + size)
        self.assertTrue(
          (error <= bound)[smooth & (np.abs(jacobian[:, i]) < 1e3)].all(), p
        )

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'has operation 99'):
      Program(((99, 0, 0, 0),))
    with self.assertRaisesRegex(ValueError, 'only registers 0 to 0'):
      Program(((ADD, 0, 1, 0),))
    with self.assertRaisesRegex(ValueError, "'pow'; choose from add"):
      programs.op_codes(['add', 'pow'])


class CanonicalTest(parameterized.TestCase):
  def assert_same_function_and_fixed_point(self, count):
    rng, kept = np.random.default_rng(1), 0
    for _ in range(count):
      p = random_program(rng)
      try:
        c = programs.canonical(p)
      except programs.Degenerate:
        continue
      self.assertEqual(programs.canonical(c).rows, c.rows)
      self.assertLessEqual(len(c.rows), len(p.rows))
      # Rounding is amplified where terms cancel: judge by longdouble.
      a, b = (q(_X.astype(np.longdouble)) for q in (p, c))
      fine = np.isfinite(a) & (np.abs(a) < 1e6) & (np.abs(a) > 1e-6)
      kept += fine.any()
      if fine.any():
        np.testing.assert_allclose(b[fine], a[fine], rtol=1e-9)
    self.assertGreater(kept, count // 2)

  def test_same_function_and_fixed_point(self):
    self.assert_same_function_and_fixed_point(2000)

  @pytest.mark.slow
  def test_same_function_and_fixed_point_of_many(self):
    self.assert_same_function_and_fixed_point(10_000)

  def test_notations_of_one_program(self):
    one = Program(((MUL, 1, 0, 0), (ADD, 3, 2, 0)), (2.0, 3.0))
    # Dead rows, swapped operands, another numbering, x - c and x / c.
    other = Program(
      ((SUB, 0, 1, 0), (DIV, 0, 2, 0), (SUB, 5, 3, 0), (MUL, 4, 4, 0),
       (ADD, 3, 6, 0), (SUB, 6, 1, 0)),
      (0.0, 0.5, -3.0),
    )  # fmt: skip
    self.assertEqual(
      programs.canonical(one).rows, programs.canonical(other).rows[:2]
    )

  def test_constants_fold_and_equal_rows_merge(self):
    p = Program(
      ((ADD, 1, 2, 0), (MUL, 0, 0, 0), (MUL, 0, 0, 0), (ADD, 4, 5, 0),
       (MUL, 6, 3, 0)),
      (1.0, 2.0),
    )  # fmt: skip
    c = programs.canonical(p)
    self.assertLen(c.rows, 3)
    self.assertEqual(c.constants, (3.0,))
    np.testing.assert_allclose(c(_X), 6 * _X**2)

  def test_a_constant_is_refused(self):
    with self.assertRaises(programs.Degenerate):
      programs.canonical(Program(((SUB, 0, 0, 0),)))


if __name__ == '__main__':
  absltest.main()
