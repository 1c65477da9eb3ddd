"""Functions that state their derivative keep it where JAX splits loops."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from lowbit_jax import _derivative


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(0,))
def rounded(slope, x, tree):
  """Has no derivative but the one that is stated, `slope` in x."""
  return {'y': jnp.round(x) + tree[0]}


def _rule(slope, primals, tangents):
  (x, tree), (dx, _) = primals, tangents
  # Of an integer that stands still, neither a number nor a derivative.
  assert tangents[1][0].dtype == jax.dtypes.float0
  return rounded(slope, x, tree), {'y': slope * dx}


rounded.defjvp(_rule)

# The loss is a square of x rounded twice, each with the slope 3.
ONE = np.int32(1)


def _step(x):
  return rounded(3, x, (ONE,))['y']


def _second(run):
  loss = lambda x: jnp.sum(run(x) ** 2)
  return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))


class DerivativeTest(parameterized.TestCase):
  @parameterized.parameters(
    lambda x: lax.scan(lambda x, _: (_step(x), None), x, length=2)[0],
    lambda x: lax.scan(
      jax.checkpoint(lambda x, _: (_step(x), None)), x, length=2
    )[0],
    lambda x: lax.scan(lambda x, _: (jax.vmap(_step)(x), None), x, length=2)[0],
    lambda x: jax.vmap(
      lambda x: lax.scan(lambda x, _: (_step(x), None), x, length=2)[0]
    )(x),
    lambda x: lax.cond(x[0] > 0, lambda x: _step(_step(x)), _step, x),
  )
  def test_second_derivative(self, run):
    x = jnp.float32([1.2, 2.6])
    np.testing.assert_array_equal(run(x), [3, 5])
    second = jax.jit(_second(run))
    np.testing.assert_array_equal(second(x), [2 * 81.0] * 2)
    np.testing.assert_array_equal(
      jax.vmap(_second(run))(x[None]), [[162.0] * 2]
    )

  def test_what_stands_still(self):
    x = jnp.float32([1.2, 2.6])
    f = lambda x, y: rounded(3, lax.stop_gradient(x), (ONE,))['y'] * y
    np.testing.assert_array_equal(jax.grad(lambda x: f(x, x).sum())(x), [2, 4])

  def test_the_library_states_all_derivatives_so(self):
    root = pathlib.Path(_derivative.__file__).parent
    others = {
      file.relative_to(root).as_posix()
      for file in root.rglob('*.py')
      if 'jax.custom_jvp' in file.read_text()
    }
    # This file speaks of it, a walk meets those of others, and functions that
    # are found stand for themselves.
    known = {'_derivative.py', '_walk/_control.py', 'search/emit.py'}
    self.assertEqual(others, known)

  def test_operands_by_name(self):
    out = rounded(3, jnp.float32(1.2), tree=(ONE,))
    self.assertEqual(out['y'], 2)


if __name__ == '__main__':
  absltest.main()
