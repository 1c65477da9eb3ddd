"""Named recipes: each runs, and each branch of the field has one."""

import importlib

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax.training import recipes

# Norm of the error of y, dx and dw over that of the exact product of normal
# numbers; several times what a format's own noise explains, and far from the
# 1.0 of a gradient that is zero.
LIMITS = {'binaryconnect': 20.0, 'dorefa': 2.0, 'xnor': 1.2, 'bitnet158': 0.8}


def products(name, x, w, dy):
  recipe = recipes.get(name)
  f = lambda x, w: lowbit.qdot(x, w, recipe, key=jax.random.key(2))
  y, pull = jax.vjp(f, x, w)
  return y, *pull(dy)


compiled = jax.jit(products, static_argnums=0)


def gradients(name: str, products=compiled):
  rng = np.random.default_rng(0)
  x, w, dy = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((40, 128), (128, 128), (40, 128))
  )
  w /= 11
  return products(name, x, w, dy), (x @ w, dy @ w.T, x.T @ dy)


# Of every branch of the field and every kind of quantizer, the recipes that
# compile fastest. The others are for the slow run.
QUICK = (
  'mxfp8',
  'fp8_delayed',
  'jetfire_int8',
  'switchback',
  'quartet',
  'fp4_dge_occ',
  'binaryconnect',
  'dorefa',
  'bitnet158',
  'quest',
  'fixed_sr',
)


class RecipesTest(parameterized.TestCase):
  def check_gradients(self, name, products=compiled):
    for got, want in zip(*gradients(name, products), strict=True):
      self.assertTrue(np.isfinite(got).all())
      error = np.linalg.norm(got - want) / np.linalg.norm(want)
      self.assertLess(error, LIMITS.get(name, 0.85))
      cosine = np.vdot(got, want) / np.linalg.norm(got) / np.linalg.norm(want)
      self.assertGreater(cosine, 0.5)

  @parameterized.parameters(*QUICK)
  def test_gradients_point_the_right_way(self, name):
    self.check_gradients(name)

  def test_gradients_without_jit(self):
    self.check_gradients('xnor', products)

  @parameterized.parameters(*(n for n in recipes.names() if n not in QUICK))
  @pytest.mark.slow
  def test_gradients_of_every_other_recipe(self, name):
    self.check_gradients(name)

  @parameterized.parameters(*recipes.names())
  def test_has_its_name(self, name):
    self.assertEqual(recipes.get(name).name, name)
    self.assertEqual(hash(recipes.get(name)), hash(recipes.get(name)))

  def test_unknown_names_list_the_known(self):
    with self.assertRaisesRegex(ValueError, "'mxfp9'.*mxfp8.*nvfp4"):
      recipes.get('mxfp9')

  def test_every_branch_has_an_example(self):
    self.assertLen(recipes.TAXONOMY, 8)
    for branch, names in recipes.TAXONOMY.items():
      self.assertNotEmpty(names, branch)
      for name in names:
        if '.' in name:
          module, _, attribute = name.rpartition('.')
          module = importlib.import_module(f'lowbit_jax.training.{module}')
          self.assertTrue(callable(getattr(module, attribute)), name)
        else:
          recipes.get(name)


if __name__ == '__main__':
  absltest.main()
