"""The energy estimate: counts by hand, prices by the table."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax import lax

from lowbit_jax.doctor import _energy
from lowbit_jax.doctor._energy import energy

F32 = 'float32'


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


class CountsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('mul', lambda x: x * x, {('mul', F32): 24}),
    ('sub', lambda x: 1 - x, {('add', F32): 24}),
    ('moves', lambda x: jnp.maximum(-x.T, 0), {}),
    ('power', lambda x: x**7, {('mul', F32): 4 * 24}),
    ('sum', lambda x: x.sum(0), {('add', F32): 3 * 6}),
    ('prod', lambda x: x.prod(), {('mul', F32): 23}),
    ('cumsum', lambda x: lax.cumsum(x, 1), {('add', F32): 4 * 5}),
    (
      'product',
      lambda x: x @ x.T,
      {('mul', F32): 4 * 4 * 6, ('add', F32): 4 * 4 * 5},
    ),
    (
      'two_contracted_axes',
      lambda x: jnp.tensordot(x, x, 2),
      {('mul', F32): 24, ('add', F32): 23},
    ),
    ('scatter', lambda x: x.at[:2].add(x[2:]), {('add', F32): 12}),
    (
      'jit_and_remat',
      lambda x: jax.jit(jax.checkpoint(lambda x: x * x))(x),
      {('mul', F32): 24},
    ),
    ('custom_jvp', jax.nn.relu, {}),
    (
      'scan',
      lambda x: lax.scan(lambda c, r: (c + r * r, None), x[0], x)[0],
      {('mul', F32): 24, ('add', F32): 24},
    ),
    (
      'nested_scan',
      lambda x: lax.fori_loop(
        0, 5, lambda i, c: lax.scan(lambda c, _: (c * c, None), c, length=3)[0],
        x,
      ),
      {('mul', F32): 15 * 24, ('add', 'int32'): 5},
    ),
    (
      'dearest_branch',
      lambda x: lax.cond(
        x[0, 0] > 0, lambda x: x + x, lambda x: x * x + x, x
      ),
      {('mul', F32): 24, ('add', F32): 24},
    ),
  )  # fmt: skip
  def test_by_hand(self, fn, want):
    cost = energy(fn, shaped(4, 6))
    self.assertEqual(cost.counts, want)
    self.assertEqual((cost.unpriced, cost.loops), ({}, 0))

  def test_convolution(self):
    fn = lambda x, k: lax.conv(x, k, (1, 1), 'VALID')
    cost = energy(fn, shaped(2, 3, 8, 8), shaped(5, 3, 3, 3))
    outputs = 2 * 5 * 6 * 6
    want = {('mul', F32): outputs * 27, ('add', F32): outputs * 26}
    self.assertEqual(cost.counts, want)

  def test_narrow_operands_and_wide_sums(self):
    for dtype, wide in ((jnp.int8, jnp.int32), (jnp.bfloat16, jnp.float32)):
      fn = lambda x: jnp.matmul(x, x, preferred_element_type=wide)
      counts = energy(fn, shaped(4, 4, dtype=dtype)).counts
      narrow, wide = jnp.dtype(dtype).name, jnp.dtype(wide).name
      self.assertEqual(counts, {('mul', narrow): 64, ('add', wide): 48})

  def test_what_has_no_price_is_named(self):
    cost = energy(lambda x: jnp.exp(x) / x**-2, shaped(10))
    self.assertEqual(cost.unpriced, {'exp': 10, 'div': 20})
    small = shaped(4, 4, dtype=jnp.float8_e4m3fn)
    fn = lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)
    cost = energy(fn, small)
    self.assertEqual(cost.unpriced, {'mul float8_e4m3fn': 64})
    self.assertIn('no price: mul float8_e4m3fn 64', str(cost))

  def test_while_counts_once_and_says_so(self):
    fn = lambda x: lax.while_loop(lambda x: x[0] > 0, lambda x: x * x, x)
    cost = energy(fn, shaped(3))
    self.assertEqual((cost.counts, cost.loops), ({('mul', F32): 3}, 1))
    self.assertIn('counted once: 1 while', str(cost))

  def test_gradients_are_counted(self):
    fn = jax.value_and_grad(lambda w, x: (x @ w).sum())
    cost = energy(fn, shaped(4, 5), shaped(3, 4))
    self.assertEqual(cost.total('mul'), 2 * 4 * 5 * 3)

  def test_refuses_what_is_no_function(self):
    with self.assertRaisesRegex(TypeError, 'must be a function'):
      energy(3)


class PricesTest(absltest.TestCase):
  def test_elementwise_and_product(self):
    cost = energy(lambda x: x * x, shaped(100))
    self.assertAlmostEqual(cost.picojoules, 370)
    self.assertAlmostEqual(cost.lmul_picojoules, 10)
    self.assertAlmostEqual(cost.saving, 3.6 / 3.7)
    k = 64
    cost = energy(lambda x: x @ x, shaped(k, k))
    self.assertAlmostEqual(cost.saving, 3.6 / (3.7 + 0.9 * (k - 1) / k))
    self.assertIn('-78.5%', str(cost))

  def test_sixteen_bits_and_integers(self):
    half = energy(lambda x: x * x + x, shaped(10, dtype=jnp.bfloat16))
    self.assertAlmostEqual(half.picojoules, 10 * (1.1 + 0.4))
    self.assertAlmostEqual(half.lmul_picojoules, 10 * (0.05 + 0.4))
    whole = energy(lambda x: x * x, shaped(10, dtype=jnp.int32))
    self.assertAlmostEqual(whole.picojoules, 31)
    self.assertEqual(whole.saving, 0)

  def test_nothing_costs_nothing(self):
    cost = energy(lambda x: x, shaped(3))
    self.assertEqual((cost.picojoules, cost.saving), (0, 0))

  def test_names_of_arithmetic_are_disjoint(self):
    self.assertEmpty(_energy._UNPRICED & set(_energy._RULES))
    self.assertEmpty(_energy._UNPRICED & set(_energy._ELEMENTWISE))


if __name__ == '__main__':
  absltest.main()
