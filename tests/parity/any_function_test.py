"""Models of Equinox and Haiku, which know nothing of this library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax.training import recipes
from tests.compilation import quick_jit
from tests.parity import packages
from tests.walk.zoo import Model, ModelTest, dense, random_like

pytestmark = pytest.mark.slow

WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY = 256, 1024, 4, 4, 96
TOKENS = np.arange(6).reshape(2, 3)
X = np.random.RandomState(0).standard_normal((2, 3, WIDTH)).astype(np.float32)


def check_training(model: Model) -> None:
  """A recipe trains every weight, and gives a gradient of each."""
  recipe = recipes.get('mxfp8')
  loss = lambda params, *args: jnp.mean(model.fn(params, *args) ** 2)
  run = lowbit.with_policy(loss, recipe)
  rows = run.report(model.params, *model.args)
  sites = {row.site for row in rows if row.how == "trains by 'mxfp8'"}
  assert sites >= model.sites(), rows
  gradients = quick_jit(jax.grad(run))(model.params, *model.args)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@packages.needs('equinox')
class EquinoxTest(ModelTest):
  """Weights (out, in), and layers that multiply from the left."""

  def setUp(self):
    super().setUp()
    import equinox

    self.eqx = equinox

  def model(self, module, fn, args, weights) -> Model:
    """A function of the arrays of a module; `fn` has the module itself."""
    eqx = self.eqx
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    of_arrays = lambda arrays, *args: fn(eqx.combine(arrays, static), *args)
    return Model(of_arrays, random_like(arrays), args, weights)

  def block(self, key):
    eqx = self.eqx

    class Block(eqx.Module):
      attention: eqx.nn.MultiheadAttention
      norm: eqx.nn.LayerNorm
      mlp: eqx.nn.MLP

      def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        return x + self.attention(y, y, y) + jax.vmap(self.mlp)(y)

    return Block(
      eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key),
      eqx.nn.LayerNorm(WIDTH),
      eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, jax.nn.gelu, key=key),
    )

  def test_mlp(self):
    make = lambda: self.eqx.nn.MLP(
      WIDTH, WIDTH, HIDDEN, 2, key=jax.random.key(0)
    )
    fn = lambda mlp, x: jax.vmap(mlp)(x)
    model = self.model(make(), fn, (X[0],), {'weight': -1})
    self.check(model)
    self.check_policy(model)
    check_training(model)

  def test_transformer_block(self):
    block = self.block(jax.random.key(0))
    weights = {'(attention|mlp).*weight': -1}
    fn = lambda block, x: jax.vmap(block)(x)
    model = self.model(block, fn, (X,), weights)
    self.check(model)
    self.check_policy(model)
    check_training(model)

  def test_stacked_blocks_in_a_scan_with_remat(self):
    eqx = self.eqx
    keys = jax.random.split(jax.random.key(0), LAYERS)
    arrays, static = eqx.partition(
      eqx.filter_vmap(self.block)(keys), eqx.is_inexact_array
    )

    def fn(arrays, x):
      def step(x, layer):
        return jax.vmap(eqx.combine(layer, static))(x), None

      return lax.scan(jax.checkpoint(step), x, arrays)[0]

    weights = {'(attention|mlp).*weight': -1}
    params = random_like(arrays)
    model = Model(fn, params, (X,), weights)
    self.check(model)
    self.check_policy(model)
    check_training(model)
    q = model.stored()
    slope = lambda run, q: quick_jit(
      jax.grad(lambda x: jnp.sum(run(q, x) ** 2))
    )(X)
    got, want = slope(lowbit.packed(fn), q), slope(fn, dense(q))
    # Sums of up to HIDDEN products, forward and backward.
    bound = 2 * HIDDEN * 2.0**-24 * float(np.max(np.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@packages.needs('haiku')
class HaikuTest(ModelTest):
  def setUp(self):
    super().setUp()
    import haiku

    self.hk = haiku

  def model(self, forward, arg, weights) -> Model:
    module = self.hk.without_apply_rng(self.hk.transform(forward))
    shapes = jax.eval_shape(module.init, jax.random.key(0), arg)
    return Model(module.apply, random_like(shapes), (arg,), weights)

  def test_transformer_with_a_tied_table(self):
    hk = self.hk

    def forward(tokens):
      embed = hk.Embed(VOCABULARY, WIDTH)
      x = embed(tokens)
      for _ in range(2):
        y = hk.LayerNorm(-1, True, True)(x)
        init = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(
          HEADS, WIDTH // HEADS, w_init=init, model_size=WIDTH
        )
        x += attention(y, y, y)
        x += hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(HIDDEN)(x)))
      return x @ embed.embeddings.T

    model = self.model(forward, TOKENS, {'embed': -1, 'w$': -2})
    self.check(model)
    self.check_policy(model)
    check_training(model)

  def test_layer_stack(self):
    hk = self.hk

    def block(x):
      return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(HIDDEN)(x)))

    def forward(x):
      return hk.experimental.layer_stack(LAYERS)(block)(x)

    model = self.model(forward, X, {'w$': -2})
    self.check(model)
    self.check_policy(model)
    check_training(model)


if __name__ == '__main__':
  absltest.main()
