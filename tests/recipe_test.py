"""Recipes as values: what they accept, and which one is in force."""

import dataclasses

from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.recipe import (
  GemmSpec,
  Policy,
  QuantSpec,
  Recipe,
  TensorScaling,
)

MXFP4 = QuantSpec(formats.mxfp4)
NVFP4 = QuantSpec(formats.nvfp4)


class QuantSpecTest(parameterized.TestCase):
  def test_default_rule_is_that_of_the_format(self):
    self.assertEqual(QuantSpec(formats.mxfp4).scale_rule, 'floor')
    self.assertEqual(
      QuantSpec(formats.mxfp4), QuantSpec(formats.mxfp4, scale_rule='floor')
    )

  def test_formats_with_other_default_rules_make_other_specs(self):
    a = formats.per_tensor(formats.int2)
    b = formats.per_tensor(formats.int2, scale_rule='absmean')
    self.assertNotEqual(a, b)  # else jit would compile one for both
    self.assertNotEqual(QuantSpec(a), QuantSpec(b))
    self.assertLen({QuantSpec(a), QuantSpec(b), QuantSpec(a)}, 2)

  @parameterized.parameters(
    ({'scale_rule': 'nearest'}, "scale_rule='nearest' .* floor, ceil"),
    ({'rounding': 'up'}, "rounding='up' is not one of .*'stochastic'"),
    ({'backward': 'lsq'}, "backward='lsq' is not one of .*'clipped'"),
  )
  def test_unknown_values(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      QuantSpec(formats.mxfp4, **kwargs)

  def test_not_a_block_format(self):
    with self.assertRaisesRegex(TypeError, 'fmt=.*block format'):
      QuantSpec('mxfp4')
    with self.assertRaisesRegex(TypeError, 'block format'):
      QuantSpec(formats.e2m1)

  def test_needs_key(self):
    self.assertFalse(QuantSpec(formats.mxfp4).needs_key)
    self.assertTrue(QuantSpec(formats.mxfp4, rounding='stochastic').needs_key)
    self.assertTrue(
      QuantSpec(formats.int8_channel, rounding='dithered').needs_key
    )


class ValueTest(parameterized.TestCase):
  def test_equal_recipes_are_one_static_argument(self):
    one = Recipe('a', GemmSpec(MXFP4, NVFP4, 16, 'fixed'))
    two = Recipe(
      'a', GemmSpec(QuantSpec(formats.mxfp4, 'floor'), NVFP4, 16, 'fixed')
    )
    self.assertEqual(one, two)
    self.assertEqual(hash(one), hash(two))

  def test_keys(self):
    noisy = dataclasses.replace(MXFP4, rounding='stochastic')
    self.assertFalse(Recipe('a', GemmSpec(MXFP4)).needs_key)
    recipe = Recipe('a', dgrad=GemmSpec(noisy))
    self.assertTrue(recipe.needs_key)
    self.assertFalse(recipe.forward_needs_key)
    self.assertFalse(recipe.forward_only().needs_key)
    signs = Recipe('a', wgrad=GemmSpec(hadamard=16, signs='per_call'))
    self.assertTrue(signs.needs_key)

  def test_switches(self):
    late = Recipe('late')
    recipe = Recipe('a', GemmSpec(MXFP4), switches=((0.5, late),))
    self.assertEqual(recipe.at(0.49).name, 'a')
    self.assertEqual(recipe.at(0.5), late)
    self.assertEqual(Policy(recipe).starts, (0.5,))


class PolicyTest(parameterized.TestCase):
  def test_first_rule_decides(self):
    other = Recipe('other')
    policy = Policy(
      Recipe('a'),
      (('qkv', other), ('block_1', None)),
      first=1,
      last=1,
      blocks=4,
    )
    names = {
      path: recipe and recipe.name
      for path in ('block_0/up', 'block_0/qkv', 'block_1/up', 'block_1/qkv',
                   'block_2/up', 'block_3/up', 'head')
      for recipe in (policy.at(path),)
    }  # fmt: skip
    self.assertEqual(names, {
      'block_0/up': None, 'block_0/qkv': 'other', 'block_1/up': None,
      'block_1/qkv': 'other', 'block_2/up': 'a', 'block_3/up': None,
      'head': 'a',
    })  # fmt: skip


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      lambda: Recipe(
        'a',
        GemmSpec(
          QuantSpec(formats.grouped(formats.e2m1, 16, formats.e4m3fn))
        ),
      ),
      'reach down to',
    ),
    (lambda: GemmSpec(MXFP4, hadamard=48), 'hadamard=48.*power of two'),
    (lambda: GemmSpec(MXFP4, signs='fixed'), 'set hadamard='),
    (lambda: GemmSpec(hadamard=16, signs='new'), "signs='new'.*per_call"),
    (lambda: Recipe('a', residuals='codes'), "'codes' is not one of"),
    (
      lambda: Recipe('a', GemmSpec(MXFP4, MXFP4), residuals='forward'),
      'use tiles',
    ),
    (
      lambda: Recipe('a', GemmSpec(hadamard=32), residuals='requantized'),
      'drop fwd.hadamard',
    ),
    (
      lambda: Recipe('a', wgrad=GemmSpec(MXFP4), residuals='forward'),
      'wgrad.lhs.*leave it None',
    ),
    (
      lambda: Recipe(
        'a',
        GemmSpec(QuantSpec(formats.mxfp4, backward='trust')),
        residuals='requantized',
      ),
      "use 'identity'",
    ),
    (
      lambda: Recipe(
        'a',
        GemmSpec(
          QuantSpec(formats.nvfp4, tensor_scaling=TensorScaling(every=2)),
          hadamard=16,
        ),
      ),
      'drop hadamard',
    ),
    (lambda: Recipe('a', switches=((0.5, Recipe('b')), (0.2, Recipe('c')))),
     'ascending'),
    (lambda: QuantSpec(formats.mxfp4, target=448.0), 'two-level'),
    (lambda: QuantSpec(formats.nvfp4, target=500.0), 'two-level'),
    (lambda: QuantSpec(formats.mxfp4, prescale=0.0), 'prescale'),
    (
      lambda: QuantSpec(formats.mxfp4, prescale=0.75, backward='trust'),
      "only 'identity'",
    ),
    (lambda: QuantSpec(formats.mxfp4, random_bits=0), 'random_bits'),
    (
      lambda: QuantSpec(formats.mxfp4, tensor_scaling=TensorScaling()),
      'needs a format with a tensor scale',
    ),
    (lambda: QuantSpec(formats.mxfp4, row_scales=True), 'two-level'),
    (lambda: QuantSpec(formats.int8_tensor, row_scales=True), 'two-level'),
    (lambda: QuantSpec(formats.nvfp4_16x16, row_scales=True), 'one axis'),
    (
      lambda: QuantSpec(
        formats.nvfp4, tensor_scaling=TensorScaling(2), row_scales=True
      ),
      'without tensor_scaling',
    ),
    (
      lambda: Recipe('a', GemmSpec(QuantSpec(formats.nvfp4, row_scales=True))),
      'fwd.lhs: row_scales=True is for nn.dot_general',
    ),
    (lambda: Recipe('a', principal=-1), 'principal=-1 must be a number'),
    (lambda: Recipe('a', principal=1.0), 'principal=1.0 must be a number'),
    (
      lambda: Recipe(
        'a',
        GemmSpec(QuantSpec(formats.nvfp4, tensor_scaling=TensorScaling())),
        principal=2,
      ),
      'principal=2 with tensor_scaling',
    ),
    (
      lambda: Recipe(
        'a',
        GemmSpec(QuantSpec(formats.nvfp4, tensor_scaling=TensorScaling())),
        center=True,
      ),
      'center=True with tensor_scaling',
    ),
    (lambda: TensorScaling(window=0), 'window=0'),
    (lambda: TensorScaling(window=4, every=2), 'use every=1'),
    (lambda: Policy(None, last=2), 'needs blocks='),
  )  # fmt: skip
  def test_values(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()

  @parameterized.parameters(
    (lambda: GemmSpec('mxfp4'), "lhs='mxfp4' must be None, a QuantSpec"),
    (lambda: GemmSpec(lambda x: x), 'needs_key'),
    (lambda: Recipe('a', MXFP4), 'fwd=.*must be a GemmSpec'),
    (lambda: Policy(None, (('up', 'mxfp8'),)), "up.*'mxfp8' must be a Recipe"),
  )
  def test_types(self, make, message):
    with self.assertRaisesRegex(TypeError, message):
      make()


if __name__ == '__main__':
  absltest.main()
