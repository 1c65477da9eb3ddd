"""Recipes in unmodified Linen models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.recipe import GemmSpec, Policy, QuantSpec, Recipe
from lowbit_jax.training import linen as low, recipes, scaling

X = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
NOISY = Recipe(
  'noisy',
  fwd=GemmSpec(QuantSpec(formats.mxfp4)),
  dgrad=GemmSpec(QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')),
)
RNGS = {'params': jax.random.key(1), 'quant': jax.random.key(2)}


PARAMS = {'params': RNGS['params']}


class Plain(linen.Module):
  @linen.compact
  def __call__(self, x):
    x = linen.Dense(64, name='up')(x)
    return linen.Dense(32, name='down')(linen.relu(x))


class Mlp(linen.Module):
  recipe: object = None

  @linen.compact
  def __call__(self, x):
    cls = low.dot_general_cls(self.recipe)
    x = linen.Dense(64, dot_general_cls=cls, name='up')(x)
    return linen.Dense(32, dot_general_cls=cls, name='down')(linen.relu(x))


@functools.partial(jax.jit, static_argnums=0)
def init(model):
  return model.init(RNGS, X)


def variables_of(model, *args) -> dict:
  """Random parameters and zeros for the rest, without compiling `init`."""
  shapes = jax.eval_shape(model.init, RNGS, X, *args)
  random = np.random.default_rng(1)
  return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes) | {
    'params': jax.tree.map(
      lambda s: random.standard_normal(s.shape).astype(s.dtype) / 8,
      shapes['params'],
    )
  }


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables):
  return model.apply(variables, X)


@functools.partial(jax.jit, static_argnums=(0, 2))
def loss(model, variables, mutable=(), **rngs):
  y, updated = model.apply(variables, X, rngs=rngs, mutable=list(mutable))
  return jnp.sum(y**2), updated


qdot = jax.jit(lowbit.qdot, static_argnums=2)


class LinenTest(parameterized.TestCase):
  def test_is_qdot(self):
    recipe = recipes.get('mxfp8')
    layer = linen.Dense(
      16, use_bias=False, dot_general_cls=low.dot_general_cls(recipe)
    )
    variables = variables_of(layer)
    want = qdot(X, variables['params']['kernel'], recipe)
    np.testing.assert_array_equal(apply(layer, variables), want)

  def test_several_contracted_axes(self):
    recipe = recipes.get('mxfp8')
    layer = linen.DenseGeneral(
      (4, 8),
      axis=(-2, -1),
      use_bias=False,
      dot_general_cls=low.dot_general_cls(recipe),
    )
    variables = variables_of(layer)
    kernel = variables['params']['kernel']
    want = qdot(X.reshape(2, 96), kernel.reshape(96, 32), recipe)
    np.testing.assert_array_equal(
      apply(layer, variables), want.reshape(2, 4, 8)
    )

  def test_parameters_are_those_of_the_plain_model(self):
    shapes = functools.partial(jax.tree.map, jnp.shape)
    plain = jax.eval_shape(Mlp().init, RNGS, X)
    model = jax.eval_shape(Mlp(recipes.get('fp8_delayed')).init, RNGS, X)
    self.assertEqual(shapes(plain['params']), shapes(model['params']))
    self.assertEqual(set(model), {'params', 'lowbit'})
    self.assertEqual(set(plain), {'params'})

  def test_policy_goes_by_path(self):
    recipe = recipes.get('xnor')
    variables = variables_of(Mlp())
    both = apply(Mlp(Policy(recipe)), variables)
    one = apply(Mlp(Policy(recipe, (('down', None),))), variables)
    none = apply(Mlp(Policy(None)), variables)
    np.testing.assert_array_equal(none, apply(Mlp(), variables))
    self.assertFalse(np.array_equal(both, one))
    self.assertFalse(np.array_equal(one, none))

  def test_random_bits_come_from_the_stream(self):
    model = Mlp(NOISY)
    variables = variables_of(Mlp())
    grad = jax.jit(jax.grad(lambda v, key: loss(model, v, quant=key)[0]))
    a, b, c = (
      grad(variables, jax.random.key(seed))['params']['up']['kernel']
      for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(a, b)
    self.assertFalse(np.array_equal(a, c))

  def test_a_missing_stream_is_refused(self):
    """Gradients without random bits would be those of another recipe."""
    variables = variables_of(Mlp())
    for recipe in (NOISY, Policy(NOISY)):
      with self.assertRaisesRegex(ValueError, "'up' .*'quant'.*forward_only"):
        jax.eval_shape(Mlp(recipe).apply, variables, X)
      with low.quantized(recipe):
        with self.assertRaisesRegex(ValueError, "rngs={'quant': key}"):
          jax.eval_shape(Plain().apply, variables, X)
      # Other streams do not stand in for it, and `init` needs none.
      with self.assertRaisesRegex(ValueError, 'quant'):
        apply = functools.partial(Mlp(recipe).apply, rngs=PARAMS)
        jax.eval_shape(apply, variables, X)
      jax.eval_shape(Mlp(recipe).init, PARAMS, X)

  def test_scan_without_the_stream_is_refused(self):
    class Body(linen.Module):
      @linen.compact
      def __call__(self, x, _):
        cls = low.dot_general_cls(NOISY)
        return linen.Dense(32, dot_general_cls=cls)(x), None

    options = {'variable_axes': {'params': 0}, 'length': 3}
    forgets = linen.scan(Body, split_rngs={'params': True}, **options)()
    splits = linen.scan(
      Body, split_rngs={'params': True, 'quant': True}, **options
    )()
    variables = jax.eval_shape(splits.init, RNGS, X, None)
    apply = lambda model, v: model.apply(v, X, None, rngs=RNGS)
    jax.eval_shape(functools.partial(apply, splits), variables)
    with self.assertRaisesRegex(ValueError, 'split_rngs'):
      jax.eval_shape(functools.partial(apply, forgets), variables)

  def test_evaluation_by_name_needs_no_stream(self):
    variables = variables_of(Mlp())
    want, _ = loss(Mlp(NOISY), variables, quant=jax.random.key(9))
    for recipe in (NOISY.forward_only(), Policy(NOISY).forward_only()):
      got, _ = loss(Mlp(recipe), variables)
      np.testing.assert_array_equal(got, want)

  def test_a_missing_collection_is_refused(self):
    params = {'params': variables_of(Mlp())['params']}
    held = Mlp(recipes.get('fp8_delayed'))
    with self.assertRaisesRegex(ValueError, "'up' .*'lowbit'.*init"):
      jax.eval_shape(held.apply, params, X)
    watch = low.QDotGeneral(recipes.get('mxfp8'), watch=True)
    with self.assertRaisesRegex(ValueError, "'watched'"):
      watch.apply({}, X, X[0].T, (((2,), (0,)), ((), ())))

  def test_held_scales_are_noted(self):
    model = Mlp(recipes.get('fp8_delayed'))
    variables = init(model)
    _, updated = loss(model, variables, ('lowbit',))
    before = variables['lowbit']['up']['QDotGeneral_0']['scales'].x
    after = updated['lowbit']['up']['QDotGeneral_0']['scales'].x
    self.assertEqual(float(before.seen), 0)
    self.assertEqual(float(after.seen), float(np.abs(X).max()))
    turned = jax.jit(scaling.advance)(updated['lowbit'])
    state = turned['up']['QDotGeneral_0']['scales'].x
    self.assertEqual(float(state.amax), float(np.abs(X).max()))
    self.assertEqual(int(state.count), 1)

  def test_shared_layers_note_the_larger(self):
    class Shared(linen.Module):
      @linen.compact
      def __call__(self, x):
        cls = low.dot_general_cls(recipes.get('fp8_delayed'))
        layer = linen.Dense(32, dot_general_cls=cls)
        return layer(layer(x) * 0.01)

    model = Shared()
    variables = variables_of(model)
    _, updated = loss(model, variables, ('lowbit',))
    (state,) = jax.tree.leaves(
      updated['lowbit'], is_leaf=lambda s: isinstance(s, scaling.DotScales)
    )
    self.assertEqual(float(state.x.seen), float(np.abs(X).max()))

  def test_scan_stacks_states(self):
    class Body(linen.Module):
      @linen.compact
      def __call__(self, x, _):
        cls = low.dot_general_cls(recipes.get('fp8_delayed'))
        return linen.Dense(32, dot_general_cls=cls)(x), None

    scanned = linen.scan(
      linen.remat(Body, prevent_cse=False),
      variable_axes={'params': 0, 'lowbit': 0},
      split_rngs={'params': True, 'quant': True},
      length=3,
    )()
    variables = variables_of(scanned, None)

    def f(params):
      (y, _), updated = scanned.apply(
        {'params': params, 'lowbit': variables['lowbit']},
        X,
        None,
        mutable=['lowbit'],
      )
      return jnp.sum(y**2), updated

    grads, updated = jax.jit(jax.grad(f, has_aux=True))(variables['params'])
    self.assertTrue(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))
    states = jax.tree.leaves(
      updated['lowbit'], is_leaf=lambda s: isinstance(s, scaling.ScaleState)
    )
    self.assertEqual(states[0].seen.shape, (3,))
    self.assertTrue((np.asarray(states[0].seen) > 0).all())

  def test_models_of_others(self):
    model = linen.MultiHeadDotProductAttention(num_heads=4)
    variables = variables_of(model)
    plain = jax.jit(model.apply)(variables, X)
    xnor = recipes.get('xnor')
    policy = Policy(xnor, (('out', None),))
    with low.quantized(policy) as layers:
      y = jax.jit(model.apply)(variables, X)
    want = {'query': xnor, 'key': xnor, 'value': xnor, 'out': None}
    self.assertEqual(layers, want)
    self.assertFalse(np.array_equal(y, plain))
    again = jax.jit(model.apply)(variables, X)
    np.testing.assert_array_equal(again, plain)

  def test_what_is_left_out_is_listed(self):
    class Mixed(linen.Module):
      @linen.compact
      def __call__(self, x):
        x = linen.Conv(32, (3,), name='conv')(x)
        x = linen.Einsum((32, 16), 'btk,kn->btn', name='mix')(x)
        x = linen.LayerNorm()(x)
        own = linen.Dense(8, dot_general=jax.lax.dot_general, name='own')
        return linen.Dense(8, name='last')(own(x))

    recipe = recipes.get('mxfp8')
    with low.quantized(Policy(recipe, (('last', recipe),))) as layers:
      jax.eval_shape(Mixed().init, RNGS, X)
    self.assertEqual(
      layers, {'conv': None, 'mix': None, 'own': None, 'last': recipe}
    )
    with self.assertRaisesRegex(ValueError, "'lost' is found in none.*last"):
      with low.quantized(Policy(recipe, (('lost', None),))):
        jax.eval_shape(Mixed().init, RNGS, X)

  def test_refusals(self):
    with self.assertRaisesRegex(TypeError, 'recipes.get'):
      Mlp('mxfp8').init(RNGS, X)
    layer = low.QDotGeneral(recipes.get('mxfp8'))
    with self.assertRaisesRegex(TypeError, 'out_sharding'):
      layer.apply(
        {}, X, jnp.ones((32, 4)), (((2,), (0,)), ((), ())), out_sharding=1
      )


if __name__ == '__main__':
  absltest.main()
