"""What quantizers lose, against the doctor and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.doctor import _measure
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import linen as low, monitors, quantizers, recipes

X, W, DY = (
  np.random.RandomState(0).standard_t(3, (3, 64, 64)).astype(np.float32)
)
lost = jax.jit(monitors.lost, static_argnames='recipe')
# Tracing op by op is what costs time here.
quantize = jax.jit(
  lowbit.quantize, static_argnames=('fmt', 'axis', 'scale_rule')
)


def by_doctor(t, fmt, axis, scale_rule=None) -> tuple[float, float]:
  q = quantize(t, fmt, axis=axis, scale_rule=scale_rule)
  measures = _measure.measure(q, t)
  return measures.saturated, measures.flushed


def hadamard(n: int) -> np.ndarray:
  h = np.ones((1, 1))
  while len(h) < n:
    h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
  return h


def variables_of(model, *args) -> dict:
  """Random parameters and zeros for the rest, without compiling `init`."""
  keys = {'params': jax.random.key(0), 'quant': jax.random.key(1)}
  shapes = jax.eval_shape(model.init, keys, *args)
  random = np.random.default_rng(0)
  return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes) | {
    'params': jax.tree.map(
      lambda s: random.standard_normal(s.shape).astype(s.dtype) / 8,
      shapes['params'],
    )
  }


class LostTest(parameterized.TestCase):
  def check_against_doctor(self, recipe):
    specs = []
    for gemm in (recipe.fwd, recipe.dgrad, recipe.wgrad):
      specs += [gemm.lhs, gemm.rhs]
    operands = ((X, 1), (W, 0), (DY, 1), (W, 1), (X, 0), (DY, 0))
    want = [
      by_doctor(t, spec.fmt, axis, spec.scale_rule) if spec else (0, 0)
      for spec, (t, axis) in zip(specs, operands, strict=True)
    ]
    got = lost(X, W, DY, recipe)
    np.testing.assert_allclose(np.stack(got, 1), want, rtol=1e-6)
    return got

  def test_is_what_the_doctor_measures(self):
    got = self.check_against_doctor(recipes.get('mxfp4_rtn'))
    # 'floor' clips what lies beyond 7/4 of a power.
    self.assertGreater(float(got.clipped.min()), 0)

  @pytest.mark.slow
  def test_is_what_the_doctor_measures_forward(self):
    self.check_against_doctor(Recipe('', recipes.get('nvfp4_rtn').fwd))

  @pytest.mark.slow
  def test_is_what_the_doctor_measures_with_tensor_scales(self):
    self.check_against_doctor(recipes.get('nvfp4_rtn'))

  def test_rotated_and_centered(self):
    spec = QuantSpec(formats.mxfp4)
    gemm = GemmSpec(spec, spec, hadamard=32)
    recipe = Recipe('rotated', fwd=gemm, wgrad=gemm, center=True)
    x = X + 3
    got = lost(x, W, DY, recipe)
    x = (x - x.mean(0, dtype=np.float64)).astype(np.float32)
    h = hadamard(32)
    rotated = (
      (x.reshape(-1, 32) @ h).reshape(64, 64),
      (W.T.reshape(-1, 32) @ h).reshape(64, 64).T,
    )
    want = [
      by_doctor(t.astype(np.float32), spec.fmt, axis)
      for t, axis in zip(rotated, (1, 0), strict=True)
    ]
    # A rotation in float32 may round a number to the other side of a limit.
    np.testing.assert_allclose(np.stack(got, 1)[:2], want, atol=2 / W.size)
    np.testing.assert_array_equal(np.stack(got, 1)[2:4], 0)

  def test_stochastic_rounding_flushes_as_often_as_it_should(self):
    spec = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')
    recipe = Recipe('', dgrad=GemmSpec(spec))
    dy = np.random.RandomState(0).standard_normal((512, 32)).astype(np.float32)
    x, w = np.ones((512, 8), np.float32), np.ones((8, 32), np.float32)
    got = lost(x, w, dy, recipe, key=jax.random.key(0))
    amax = np.abs(dy).max(1, keepdims=True).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(amax / 6))
    p = np.clip(1 - np.abs(dy) / scale / 0.5, 0, 1)
    error = np.sqrt((p * (1 - p)).sum()) / p.size
    self.assertLess(abs(float(got.flushed[2]) - p.mean()), 4 * error)
    self.assertEqual(float(got.clipped[2]), 0)

  def test_held_scales_clip(self):
    recipe = recipes.get('fp8_delayed')
    amax = np.float32(2)
    got = lost(X, W, DY, recipe, tensor_amax=(amax, None))
    # The largest step of E4M3 is 32 of 448.
    want = np.mean(np.abs(X) > amax * np.float32(464 / 448))
    self.assertGreater(want, 0.05)
    np.testing.assert_allclose(np.asarray(got.clipped)[[0, 4]], want, rtol=1e-6)
    self.assertEqual(float(got.clipped[1]), 0)

  def test_other_quantizers(self):
    rows = quantizers.RowScaled(QuantSpec(formats.mxfp4), 2)
    got = lost(X, W, DY, Recipe('', GemmSpec(rows)))
    self.assertTrue(np.isnan(got.clipped[0]))
    np.testing.assert_array_equal(got.clipped[1:], 0)
    rounded = jax.jit(rows, static_argnums=1)(X, 1)
    self.assertEqual(float(got.flushed[0]), np.mean(np.asarray(rounded) == 0))

  def test_values_of_the_forward_product_lose_nothing_again(self):
    spec = QuantSpec(formats.mxfp4, 'rceil')
    gemm = GemmSpec(spec)
    recipe = Recipe('', gemm, wgrad=gemm, residuals='requantized')
    got = lost(X, W, DY, recipe)
    self.assertLess(float(got.flushed[4]), float(got.flushed[0]))

  @pytest.mark.slow
  def test_random_values_of_the_forward_product_lose_less_again(self):
    got = lost(X, W, DY, recipes.get('tetrajet'), key=jax.random.key(0))
    self.assertLess(float(got.flushed[4]), float(got.flushed[0]))


class WatchTest(parameterized.TestCase):
  def test_comes_out_as_the_gradient_of_a_probe(self):
    # Each of x, w and dy once; what is not rounded loses nothing.
    spec = QuantSpec(formats.mxfp4)
    recipe = Recipe(
      'each', GemmSpec(spec), GemmSpec(None, spec), GemmSpec(None, spec)
    )

    def layer(watch):
      cls = low.dot_general_cls(recipe, watch=watch)
      return linen.Dense(64, use_bias=False, dot_general_cls=cls)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(watch, params, probes, x):
      def loss(params, probes, x):
        variables = {'params': params, 'watched': probes}
        y = layer(watch).apply(variables, x)
        return jnp.sum(y**2), y

      return jax.grad(loss, (0, 1, 2), has_aux=True)(params, probes, x)

    variables = variables_of(layer(True), X)
    (plain, _, dx), y = gradient(False, variables['params'], {}, X)
    (watched, shares, dx_watched), _ = gradient(
      True, variables['params'], variables['watched'], X
    )
    np.testing.assert_array_equal(watched['kernel'], plain['kernel'])
    np.testing.assert_array_equal(dx_watched, dx)
    (share,) = jax.tree.leaves(shares, is_leaf=lambda s: isinstance(s, tuple))
    w = variables['params']['kernel']
    want = lost(X, w, 2 * np.asarray(y), recipe)
    np.testing.assert_allclose(share.flushed, want.flushed, rtol=1e-6)
    np.testing.assert_allclose(share.clipped, want.clipped, rtol=1e-6)

  def test_scanned_layers_are_stacked(self):
    spec = QuantSpec(formats.mxfp4, 'rceil', rounding='stochastic')
    shares = self.scanned(Recipe('noisy', GemmSpec(spec)))
    flushed = np.asarray(jax.tree.leaves(shares)[1])
    self.assertTrue((flushed[:, 0] > 0).all())

  @parameterized.parameters('mxfp4_sr_rht', 'fp8_delayed')
  @pytest.mark.slow
  def test_scanned_layers_of_recipes_are_stacked(self, name):
    shares = self.scanned(recipes.get(name))
    if name == 'mxfp4_sr_rht':
      self.assertTrue((np.asarray(jax.tree.leaves(shares)[1]) > 0).all())

  def scanned(self, recipe):
    class Body(linen.Module):
      @linen.compact
      def __call__(self, x, _):
        cls = low.dot_general_cls(recipe, watch=True)
        return linen.Dense(64, dot_general_cls=cls)(x), None

    scanned = linen.scan(
      linen.remat(Body, prevent_cse=False),
      variable_axes={'params': 0, 'lowbit': 0, 'watched': 0},
      split_rngs={'params': True, 'quant': True},
      length=3,
    )()
    variables = variables_of(scanned, X, None)

    def loss(probes):
      state = variables | {'watched': probes}
      rngs = {'quant': jax.random.key(1)}
      return jnp.sum(scanned.apply(state, X, None, rngs=rngs)[0] ** 2)

    shares = jax.jit(jax.grad(loss))(variables['watched'])
    for share in jax.tree.leaves(shares):
      self.assertEqual(share.shape, (3, 6))
      self.assertTrue(np.isfinite(share).all())
    return shares


if __name__ == '__main__':
  absltest.main()
