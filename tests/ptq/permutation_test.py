"""Inputs in the order of their size."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, ptq
from lowbit_jax.ptq import _permutation
from tests.ptq import problems


def activations() -> jax.Array:
  """(2048, 256), one channel of each block of 32 twenty times the others."""
  x = jax.random.normal(jax.random.key(0), (2048, 256))
  return x.at[:, 5::35].multiply(20)


def rows(spread: float) -> jax.Array:
  """Weights (256, 48) whose rows differ in size."""
  normal = jax.random.normal(jax.random.key(9), (256, 1))
  return problems.weights() * jnp.exp(spread * normal)


def errors(x: jax.Array, layer: ptq.Layer) -> tuple[float, float]:
  """Relative square errors of activations in MXFP4, and of the outputs of a
  layer with such activations and weights."""
  moved = x
  for transform in layer.transforms:
    moved = transform.apply(moved)
  rounded = lowbit.dequantize(lowbit.quantize(moved, formats.mxfp4, axis=-1))
  outputs = rounded @ lowbit.dequantize(layer.rounded())
  pairs = (rounded, moved), (outputs, moved @ layer.weight)
  return tuple(
    float(jnp.sum((made - want) ** 2) / jnp.sum(want**2))
    for made, want in pairs
  )


class PermuteTest(parameterized.TestCase):
  def test_by_hand(self):
    size = jnp.array([1.0, 3, 2, 3])
    np.testing.assert_array_equal(_permutation.by_size(size), [1, 3, 2, 0])

  def test_orders(self):
    x = jnp.array([[2.0, -4, 0, 1], [-2, 4, 0, 1]])
    w = jnp.array([[1.0, 0], [0, 8], [3, 4], [0, 0]])
    layer = problems.layer('mxfp4', x, w)
    for by, want in (('activations', [1, 0, 3, 2]), ('ratios', [0, 1, 2, 3])):
      made = ptq.permute(by)(layer)
      np.testing.assert_array_equal(made.transforms[0].order, want)
      np.testing.assert_array_equal(made.weight, w[np.array(want)])
      # What is known of the activations goes along, the largest ones too.
      own = problems.layer('mxfp4', x[:, np.array(want)], made.weight)
      jax.tree.map(
        np.testing.assert_array_equal, made.statistics, own.statistics
      )

  def test_layers_with_one_input_share_it(self):
    query, key = (
      ptq.permute()(problems.layer('mxfp4', w=problems.weights(seed=seed)))
      for seed in (1, 2)
    )
    np.testing.assert_array_equal(
      query.transforms[0].order, key.transforms[0].order
    )

  @parameterized.parameters('activations', 'ratios')
  def test_product_is_kept(self, by):
    layer = problems.layer('mxfp4')
    made = ptq.permute(by)(layer)
    x = problems.activations(tokens=32)
    moved, weight = (
      np.asarray(part, np.float64)
      for part in (made.transforms[0].apply(x), made.weight)
    )
    want = np.asarray(x, np.float64) @ np.asarray(layer.weight, np.float64)
    np.testing.assert_allclose(moved @ weight, want, rtol=1e-12, atol=1e-9)

  @parameterized.parameters('activations', 'ratios')
  def test_scattered_outliers(self, by):
    """In blocks of their own they no longer cost the others their bits."""
    x, w = activations(), problems.weights()
    layer = problems.layer('mxfp4', x, w)
    before, after = errors(x, layer), errors(x, ptq.permute(by)(layer))
    self.assertLess(after[0], 0.6 * before[0])
    self.assertLess(after[1], 0.75 * before[1])

  def test_ratios_spare_the_rows(self):
    x, w = activations(), rows(0.5)
    layer = problems.layer('mxfp4', x, w)
    none, plain, ratios = (
      errors(x, made)[1]
      for made in (layer, ptq.permute()(layer), ptq.permute('ratios')(layer))
    )
    self.assertLess(plain, 0.8 * none)
    self.assertLess(ratios, plain)

  def test_without_statistics(self):
    layer = problems.layer('mxfp4')._replace(statistics=None)
    self.assertIs(ptq.permute()(layer), layer)

  def test_wrong_calls(self):
    with self.assertRaisesRegex(ValueError, "by='outputs' must be"):
      ptq.permute('outputs')


class StacksTest(parameterized.TestCase):
  def test_experts_without_tokens(self):
    """What others learned of their activations changes nothing in these."""
    w = jnp.stack([problems.weights(64, 8, seed) for seed in range(3)])
    x = problems.activations(64, 40)
    sizes = jnp.array([30, 0, 10])
    model = lambda params, x: lowbit.ragged_dot(x, params['experts'], sizes)
    observed = ptq.calibrate(model, {'experts': w}, [x])
    rotation = ptq.duquant(steps=4, key=jax.random.key(0))
    step = ptq.chain(ptq.hadamard(32), rotation, ptq.permute())
    made = nn.quantize_params(
      {'experts': w},
      'experts',
      formats.mxfp4,
      axis=-2,
      method=ptq.method(step, observed),
    )
    dense = jnp.asarray(made['experts'])
    alone = ptq.Layer('experts/1', w[1], formats.mxfp4, None)
    want = jnp.asarray(ptq.hadamard(32)(alone).stored())
    np.testing.assert_allclose(dense[1], want, atol=1e-6)
    got, want = model(made, x), model({'experts': dense}, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())
    exact = model({'experts': w}, x)
    error = jnp.sum((got - exact) ** 2) / jnp.sum(exact**2)
    self.assertLess(float(error), 0.05)

  def test_some_layers_of_a_stack(self):
    w = jnp.stack([problems.weights(64, 64, seed) / 8 for seed in range(2)])
    x = problems.activations(64, 64)

    def model(params, x):
      layer = lambda x, w: (lowbit.dot(x, w), None)
      return jax.lax.scan(layer, x, params['kernel'])[0]

    observed = ptq.calibrate(model, {'kernel': w}, [x])
    quantize = lambda step: nn.quantize_params(
      {'kernel': w},
      None,
      formats.mxfp4,
      stacked='kernel',
      method=ptq.method(step, observed),
    )
    made = quantize(ptq.masked(ptq.permute(), '/1$'))
    orders = made['kernel'].transform.order
    np.testing.assert_array_equal(orders[0], np.arange(64))
    self.assertTrue((orders[1] != np.arange(64)).any())
    want = model({'kernel': jnp.asarray(made['kernel'])}, x)
    np.testing.assert_allclose(
      jax.jit(model)(made, x), want, atol=1e-5 * abs(want).max()
    )
    with self.assertRaisesRegex(ValueError, 'cannot be stacked.*same kinds'):
      quantize(ptq.masked(ptq.hadamard(32), '/1$'))


if __name__ == '__main__':
  absltest.main()
