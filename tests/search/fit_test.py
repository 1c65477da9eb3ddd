"""Constants of many programs at once."""

import jax
import numpy as np
from absl.testing import absltest

from lowbit_jax.search import fit as fitting
from lowbit_jax.search.program import ADD, DIV, MUL, Program

_OPS = (ADD, MUL, DIV)


def chebyshev(n: int) -> np.ndarray:
  return 0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n)


def samples(slope: float) -> fitting.Samples:
  """2^(slope x) on [0, 1], relative errors."""
  x, dense = chebyshev(40), chebyshev(300)
  f, g = np.exp2(slope * x), np.exp2(slope * dense)
  return fitting.Samples(x, f, 1 / f, dense, g, 1 / g)


# c1 / (c2 + c3 / x + x) + c4, whose minimax error of 2^(x / 8) is about
# 1.1e-9 / 8; three squarings make it 2^x.
_SKELETON = (
  (DIV, 3, 0, 0), (ADD, 5, 0, 0), (ADD, 6, 2, 0), (DIV, 1, 7, 0),
  (ADD, 8, 4, 0),
)  # fmt: skip


def _fit(items: list[Program], slope: float) -> fitting.Result:
  """512 programs of up to 5 rows and 4 constants, by one compiled fit."""
  batch = fitting.pack(items, rows=5, constants=4)
  return fitting.fit(
    batch, samples(slope), ops=_OPS, steps=60, rounds=20, dense='float64'
  )


class FitTest(absltest.TestCase):
  def test_finds_the_minimax_error_of_an_ill_conditioned_formula(self):
    # From random starts; the condition number of J exceeds 1e8 at the solution.
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-1, 2.5, (512, 4))
    start = size * rng.choice([-1, 1], size.shape)
    result = _fit([Program(_SKELETON, tuple(c)) for c in start.tolist()], 1 / 8)
    self.assertGreater(np.mean(result.error < 1.3e-9 / 8), 0.03)
    self.assertGreater(result.error.min(), 1.0e-9 / 8)
    self.assertFalse(jax.config.jax_enable_x64)

  def test_polynomials(self):
    # The program is linear in its constants: the minimax error of degree 2.
    rows = ((MUL, 3, 0, 0), (ADD, 4, 2, 0), (MUL, 5, 0, 0), (ADD, 6, 1, 0))
    result = _fit([Program(rows, (1.0, 1.0, 1.0))] * 512, 1)
    np.testing.assert_allclose(result.dense_error, 1.72e-3, rtol=0.03)
    np.testing.assert_array_equal(np.ptp(result.constants, axis=0), 0)

  def test_the_batch_must_hold_the_program(self):
    with self.assertRaisesRegex(ValueError, 'program 0 has 5 rows'):
      fitting.pack([Program(_SKELETON, (1.0,) * 4)], rows=4, constants=4)


if __name__ == '__main__':
  absltest.main()
