"""What XLA for CPU does to float32 algebra, found out on jaxlib 0.10 and 0.11.

Kernels rest on some of these rewrites not happening and must fence themselves
from others. If a test here fails, a new jaxlib has other rules: measure every
certificate again (`certify.check`) and then correct the table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from lowbit_jax.search import certify

_F = np.float32
_MAGIC = _F(1.5 * 2**23)
_C, _D = _F(0.7), _F(1.3)
_RNG = np.random.default_rng(0)
_X, _Y, _Z = _RNG.uniform(0.5, 2, (3, 4096)).astype(_F)

# The same expression runs strictly in NumPy and compiled in XLA.
_REWRITTEN = {
  '(x + c) + d -> x + (c + d)': lambda x, y, z: (x + _C) + _D,
  '(x * c) * d -> x * (c * d)': lambda x, y, z: (x * _C) * _D,
  '(x * c) / d -> x * (c / d)': lambda x, y, z: (x * _C) / _D,
  'x / c -> x * (1 / c)': lambda x, y, z: x / _D,
  '(x / y) / z -> x / (y * z)': lambda x, y, z: (x / y) / z,
  'x / (y / z) -> (x * z) / y': lambda x, y, z: x / (y / z),
}
_KEPT = {
  'x / y': lambda x, y, z: x / y,
  'c / x': lambda x, y, z: _C / x,
  'x * (1 / y)': lambda x, y, z: x * (_F(1) / y),
  '(x * y) * z': lambda x, y, z: (x * y) * z,
  '(x + y) + z': lambda x, y, z: (x + y) + z,
  '(x + y) - y': lambda x, y, z: (x + y) - y,
  'c - (x + c)': lambda x, y, z: _MAGIC - (x + _MAGIC),
}


def _differing(fn, *arguments) -> float:
  """The fraction of results that differ from strict evaluation in NumPy."""
  strict = fn(*arguments)
  return float(np.mean(np.asarray(jax.jit(fn)(*arguments)) != strict))


class FencesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if jax.default_backend() != 'cpu':
      self.skipTest('the rules are those of the CPU backend')

  def _news(self, rule):
    return (
      f'jaxlib {jax.lib.__version__} has another rule than was found out:'
      f' {rule}. Certificates and fences depend on it; check all of them.'
    )

  @parameterized.named_parameters(
    (str(i), rule) for i, rule in enumerate(_REWRITTEN)
  )
  def test_rewritten(self, rule):
    self.assertGreater(
      _differing(_REWRITTEN[rule], _X, _Y, _Z),
      0.1,
      self._news(f'{rule} no longer happens'),
    )

  @parameterized.named_parameters(
    (str(i), rule) for i, rule in enumerate(_KEPT)
  )
  def test_kept(self, rule):
    self.assertEqual(
      _differing(_KEPT[rule], _X, _Y, _Z),
      0,
      self._news(f'{rule} is no longer evaluated as it stands'),
    )

  def test_root_and_its_quotient(self):
    root = np.asarray(jax.jit(jnp.sqrt)(_X))
    np.testing.assert_array_equal(root, np.sqrt(_X), self._news('sqrt'))
    quotient = np.asarray(jax.jit(lambda x, y: x / jnp.sqrt(y))(_X, _Y))
    self.assertGreater(
      np.mean(quotient != _X / np.sqrt(_Y)),
      0.1,
      self._news('x / sqrt(y) -> x * rsqrt(y) no longer happens'),
    )

  def test_double_reciprocal_is_folded(self):
    twice = lambda x: _F(1) / (_F(1) / x)
    self.assertGreater(np.mean(twice(_X) != _X), 0.1)
    np.testing.assert_array_equal(
      jax.jit(twice)(_X), _X, self._news('1 / (1 / x) is no longer x')
    )

  def test_product_and_sum_are_contracted(self):
    if 'fma' not in certify.Environment.current().instruction_set.split():
      self.skipTest('this processor has no fused multiply-add')
    fused = (_X.astype(np.float64) * _Y - _Z).astype(_F)
    plain = _X * _Y - _Z
    self.assertGreater(np.mean(fused != plain), 0.1)
    y = np.asarray(jax.jit(lambda x, y, z: x * y - z)(_X, _Y, _Z))
    # float64 holds the product exactly and rounds the difference twice, which
    # shows on a fraction 2^-29 of the points: on none of these.
    np.testing.assert_array_equal(
      y, fused, self._news('x * y - z is no longer one instruction')
    )

  def test_rounding_by_a_large_constant_vanishes(self):
    x = np.linspace(-100, 100, 4096, dtype=_F)
    bare = lambda x: (x + _MAGIC) - _MAGIC
    np.testing.assert_array_equal(bare(x), np.round(x))
    np.testing.assert_array_equal(
      jax.jit(bare)(x), x, self._news('(x + c) - c is no longer x')
    )

  @parameterized.parameters(1.0, 0.5)
  def test_reduce_precision_keeps_the_rounding(self, scale):
    x = np.linspace(-100, 100, 4096, dtype=_F)
    x = np.concatenate([x, np.arange(-50, 50, dtype=_F) + _F(0.5)])

    @jax.jit
    def fenced(x):
      return lax.reduce_precision(x * _F(scale) + _MAGIC, 8, 23) - _MAGIC

    expected = np.round(x * _F(scale))
    np.testing.assert_array_equal(
      fenced(x), expected, self._news('reduce_precision is no longer a fence')
    )

  def test_subnormal_numbers_are_flushed(self):
    tiny = np.array([2.0**-130], _F)
    half = jax.jit(lambda x: x * _F(0.5))
    two = jax.jit(lambda x: x * _F(2.0**20))
    for name, y in (
      ('input', two(tiny)),
      ('result', half(np.array([2.0**-126], _F))),
    ):
      self.assertEqual(
        float(y[0]), 0, self._news(f'a subnormal {name} is no longer 0')
      )

  def test_exp2_of_xla_is_inaccurate(self):
    lo, hi = -125.9, -120.0
    sweep = functools.partial(certify.sweep, reference=np.exp2, lo=lo, hi=hi)
    self.assertGreater(
      sweep(jnp.exp2, stride=101).max_ulp,
      60,
      self._news('jnp.exp2 is no longer exp(x log 2) in float32'),
    )


if __name__ == '__main__':
  absltest.main()
