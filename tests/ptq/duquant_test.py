"""Greedy rotations: orthogonal, of the least peak, and shared by all blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, ptq
from lowbit_jax.ptq import _rotation
from lowbit_jax.transforms import BlockAffine, Hadamard
from tests.ptq import problems

KEY = jax.random.key(3)


def activations(channels: int = 1, size: float = 50) -> jax.Array:
  """(512, 128) of a normal distribution, but for some larger channels."""
  large = 123 - 30 * np.arange(channels)
  x = jax.random.normal(jax.random.key(0), (512, 128))
  return x.at[:, large].multiply(size)


def orthogonal_error(rotation) -> float:
  rotation = np.asarray(rotation, np.float64)
  return abs(rotation @ rotation.T - np.eye(len(rotation))).max()


def error_of_activations(x) -> float:
  """Of MXFP4 in blocks of 32, relative to their square."""
  made = lowbit.dequantize(lowbit.quantize(x, formats.mxfp4, axis=-1))
  return float(jnp.sum((made - x) ** 2) / jnp.sum(x**2))


class GreedyRotationTest(parameterized.TestCase):
  def test_base_by_hand(self):
    a, b, c = 3**-0.5, (2 / 3) ** 0.5, 2**-0.5
    np.testing.assert_allclose(
      _rotation.base_rotation(3),
      [[a, a, a], [-b, b / 2, b / 2], [0, -c, c]],
      atol=1e-15,
    )
    np.testing.assert_allclose(
      _rotation.base_rotation(2), [[c, c], [-c, c]], atol=1e-15
    )

  @parameterized.parameters(2, 16, 32, 48)
  def test_base(self, n):
    base = _rotation.base_rotation(n)
    self.assertLess(orthogonal_error(base), 1e-14)
    np.testing.assert_allclose(base[0], n**-0.5)

  @parameterized.parameters((2, 3), (16, 64), (32, 256))
  def test_orthogonal(self, block, steps):
    rotation, peaks = _rotation.greedy_rotation(
      KEY, activations(), block, steps
    )
    self.assertEqual(rotation.shape, (block, block))
    self.assertEqual(peaks.shape, (steps + 1,))
    self.assertLess(orthogonal_error(rotation), 1e-5)

  def test_one_large_channel_is_spread(self):
    x = activations()
    rotation, peaks = _rotation.greedy_rotation(KEY, x, 32, 256)
    self.assertAlmostEqual(peaks[0], float(x.max() - x.min()), places=3)
    self.assertLess(peaks.min(), peaks[0] / 3)
    self.assertLess(abs(rotation[123 % 32]).max(), 3 * 32**-0.5)

  @parameterized.parameters(1, 7, 40)
  def test_keeps_the_prefix_of_the_least_peak(self, steps):
    x = activations(3)
    rotation, peaks = _rotation.greedy_rotation(KEY, x, 32, steps)
    y = np.asarray(x, np.float64).reshape(-1, 32) @ np.asarray(rotation)
    np.testing.assert_allclose(y.max() - y.min(), peaks.min(), rtol=1e-5)

  def test_what_no_rotation_spreads_better_stays(self):
    """One number for all is spread already."""
    x = jnp.ones((4, 32))
    rotation, peaks = _rotation.greedy_rotation(KEY, x, 32, 8)
    np.testing.assert_array_equal(rotation, np.eye(32))
    self.assertEqual(peaks[0], 0)

  def test_tokens_have_the_products_that_were_recorded(self):
    """Channels that are multiples of one number are that in all tokens."""
    size = jnp.array([[1.0, -2, 3], [0, 0, 0], [5, 0.5, -0.1]])
    moments = jnp.outer(size, size)
    x = _rotation.tokens_like(KEY, moments, 3).reshape(-1, 3, 3)
    factor = x[..., :1] / jnp.where(size == 0, 1, size)[:, :1]
    np.testing.assert_allclose(x, factor * size, atol=1e-2)
    # Of n tokens the mean square is within a few times (2 / n)^.5 of 1.
    square = jnp.mean(factor[:, jnp.array([0, 2])] ** 2, axis=0)
    np.testing.assert_allclose(square, 1, atol=0.5)


class DuquantTest(parameterized.TestCase):
  def test_layers_with_one_input_share_it(self):
    step = ptq.duquant(steps=8, key=KEY)
    x, w = activations(), problems.weights(128, 24)
    query, key = (
      step(problems.layer('mxfp4', x, part)) for part in (w[:, :8], w[:, 8:])
    )
    np.testing.assert_array_equal(
      query.transforms[0].matrix, key.transforms[0].matrix
    )
    other = ptq.duquant(steps=8, key=jax.random.key(4))
    again = other(problems.layer('mxfp4', x, w[:, :8]))
    self.assertTrue(
      (query.transforms[0].matrix != again.transforms[0].matrix).any()
    )

  def test_product_is_kept(self):
    layer = problems.layer('mxfp4')
    made = ptq.duquant(steps=16, key=KEY)(layer)
    x = problems.activations(tokens=32)
    (rotation,) = made.transforms
    rotated, weight = (
      np.asarray(part, np.float64) for part in (rotation.apply(x), made.weight)
    )
    want = np.asarray(x, np.float64) @ np.asarray(layer.weight, np.float64)
    np.testing.assert_allclose(
      rotated @ weight, want, atol=1e-5 * abs(want).max()
    )

  def test_error_of_activations(self):
    """As small as on the recorded tokens, and as behind a Hadamard matrix; with
    outliers of one sign smaller."""
    offset = 20 * jnp.zeros(128).at[jnp.array([5, 37, 90, 91])].set(
      jnp.array([1.5, -1, 0.75, 2])
    )
    for x, share in (
      (activations(), 1.15),
      (activations(4, 10), 1.15),
      (activations(0) + offset, 0.95),
    ):
      w = problems.weights(128, 8)
      made = ptq.duquant(steps=64, key=KEY)(problems.layer('mxfp4', x, w))
      seen, _ = _rotation.greedy_rotation(KEY, x, 32, 64)
      error, by_tokens, by_hadamard, plain = (
        error_of_activations(transform.apply(x) if transform else x)
        for transform in (
          *(made.transforms[0], BlockAffine(seen)),
          *(Hadamard(32), None),
        )
      )
      self.assertLess(error, 1.15 * by_tokens)
      self.assertLess(error, share * by_hadamard)
      self.assertLess(error, 0.7 * plain)

  def test_before_gptq(self):
    layer = problems.layer('mxfp4')
    rounding = ptq.search_scales(), ptq.gptq()
    made = ptq.chain(ptq.duquant(steps=16, key=KEY), *rounding)(layer)
    x = problems.activations()
    error = problems.output_error(x, layer.weight, made.stored())
    self.assertLess(error, 0.6 * layer.error())
    np.testing.assert_allclose(made.error(), error, rtol=1e-3)

  def test_layers_of_a_scan(self):
    w = jnp.stack([problems.weights(64, 64, seed) / 8 for seed in range(2)])
    x = problems.activations(64, 64)

    def model(params, x):
      layer = lambda x, w: (lowbit.dot(x, w), None)
      return jax.lax.scan(layer, x, params['kernel'])[0]

    observed = ptq.calibrate(model, {'kernel': w}, [x])
    step = ptq.chain(ptq.duquant(steps=8, key=KEY), ptq.permute())
    method = ptq.method(step, observed)
    made = nn.quantize_params(
      {'kernel': w}, None, formats.mxfp4, stacked='kernel', method=method
    )
    got = jax.jit(model)(made, x)
    want = x
    for i in range(2):
      alone = method(f'kernel/{i}', w[i], formats.mxfp4, -2)
      jax.tree.map(np.testing.assert_array_equal, made['kernel'][i], alone)
      want = lowbit.dot(want, alone)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())

  def test_without_statistics(self):
    layer = problems.layer('mxfp4')._replace(statistics=None)
    self.assertIs(ptq.duquant(key=KEY)(layer), layer)

  def test_wrong_calls(self):
    with self.assertRaisesRegex(ValueError, 'block=1'):
      ptq.duquant(1, key=KEY)
    with self.assertRaisesRegex(ValueError, 'steps=0'):
      ptq.duquant(steps=0, key=KEY)
    layer = problems.layer('mxfp4')._replace(weight=problems.weights(80))
    for step in (ptq.duquant(key=KEY), ptq.hadamard(32)):
      with self.assertRaisesRegex(
        ValueError, "'up/kernel' has 80 inputs.*block=32.*ptq.masked"
      ):
        step(layer)


if __name__ == '__main__':
  absltest.main()
