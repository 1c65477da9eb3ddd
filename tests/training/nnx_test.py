"""Recipes in unmodified NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.recipe import GemmSpec, Policy, QuantSpec, Recipe
from lowbit_jax.training import nnx as low, recipes

X = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
NOISY = Recipe(
  'noisy',
  dgrad=GemmSpec(QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')),
)


def normal(key, shape, dtype, **kwargs):
  """Kernels like those of `lecun_normal`, without compiling it."""
  random = np.random.default_rng(shape)
  return jnp.asarray(random.standard_normal(shape) / shape[0] ** 0.5, dtype)


def zeros(key, shape, dtype, **kwargs):
  return jnp.asarray(np.zeros(shape), dtype)


INIT = {'kernel_init': normal, 'bias_init': zeros}


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(32, 64, rngs=rngs, **INIT)
    self.down = nnx.Linear(64, 32, rngs=rngs, **INIT)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


def model(recipe=None, **options) -> Mlp:
  out = Mlp(nnx.Rngs(1))
  if recipe is not None:
    low.quantize(out, recipe, **options)
  return out


@nnx.jit
def run(m, x):
  return m(x)


@nnx.jit
def step(m, x):
  def loss(m):
    return jnp.sum(m(x) ** 2)

  value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(
    m
  )
  low.advance(m)
  return value, grads


class NnxTest(absltest.TestCase):
  def test_is_qdot(self):
    layer = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0), **INIT)
    low.quantize(layer, recipes.get('mxfp8'))
    qdot = jax.jit(lowbit.qdot, static_argnums=2)
    want = qdot(X, layer.kernel[...], recipes.get('mxfp8'))
    np.testing.assert_array_equal(run(layer, X), want)

  def test_policy_goes_by_path(self):
    recipe = recipes.get('xnor')
    plain, both = run(model(), X), run(model(recipe), X)
    one = run(model(Policy(recipe, (('down', None),))), X)
    self.assertFalse(np.array_equal(both, one))
    self.assertFalse(np.array_equal(one, plain))
    off = model(recipe)
    low.quantize(off, Policy(None))
    np.testing.assert_array_equal(run(off, X), plain)

  def test_what_is_left_out_is_listed(self):
    class Mixed(nnx.Module):
      def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs, **INIT)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs, **INIT)])

    recipe = recipes.get('mxfp8')
    layers = low.quantize(Mixed(nnx.Rngs(0)), recipe)
    self.assertEqual(layers, {'conv': None, 'layers/0': recipe})

  def test_what_matches_nothing_is_refused(self):
    recipe = recipes.get('mxfp8')
    with self.assertRaisesRegex(ValueError, "'lost' is found in none.*up"):
      model(Policy(recipe, (('lost', None),)))
    with self.assertRaisesRegex(ValueError, 'LayerNorm has no Linear'):
      low.quantize(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), recipe)
    with self.assertRaisesRegex(TypeError, 'nnx.Module'):
      low.quantize('nonsense', recipe)

  def test_keys_advance(self):
    m = model(NOISY, rngs=nnx.Rngs(quant=3))
    _, first = step(m, X)
    _, second = step(m, X)
    self.assertFalse(
      np.array_equal(first.up.kernel[...], second.up.kernel[...])
    )

  def test_held_scales(self):
    m = model(recipes.get('fp8_delayed'))
    step(m, X)
    state = m.up.dot_general.scales.get_value().x
    self.assertEqual(float(state.amax), float(np.abs(X).max()))
    self.assertEqual(int(state.count), 1)
    self.assertNotIn('scales', str(nnx.state(m, nnx.Param)))

  def test_random_recipes_need_a_stream(self):
    with self.assertRaisesRegex(ValueError, 'rngs=nnx.Rngs'):
      model(recipes.get('nvfp4'))


if __name__ == '__main__':
  absltest.main()
