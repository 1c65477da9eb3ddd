"""AWQ against slow searches in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.ptq import _awq, _scales
from tests.ptq import problems


def layer_with_large_channels(name: str, inputs: int = 64) -> ptq.Layer:
  """Every 16th channel is 30 times as large as the others."""
  x = jax.random.normal(jax.random.key(3), (512, inputs))
  x = x.at[:, ::16].multiply(30)
  return problems.layer(name, x, problems.weights(inputs, 16))


def error(w, made, moments) -> float:
  """tr(D' H D) in float64."""
  difference = np.asarray(made, np.float64) - np.asarray(w, np.float64)
  return np.sum(difference * (np.asarray(moments, np.float64) @ difference))


class ScalesOfInputsTest(parameterized.TestCase):
  def test_by_hand(self):
    rms = jnp.array([1.0, 4.0, 16.0])
    for exponent, want in (
      (0, [1, 1, 1]),
      (0.5, [0.5, 1, 2]),
      (1, [0.25, 1, 4]),
    ):
      got = _awq.input_scales(rms, exponent)
      np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_units_do_not_count(self):
    rms = jnp.exp(problems.weights(40, 1)[:, 0])
    for unit in (2.0**-60, 2.0**60):
      np.testing.assert_allclose(
        _awq.input_scales(rms * unit, 0.5), _awq.input_scales(rms, 0.5), 1e-5
      )

  def test_bounds(self):
    scale = _awq.input_scales(jnp.array([0, 1e-30, 1.0, 1e30]), 0.9)
    np.testing.assert_allclose(scale, [1e-4, 1e-4, 1, 1e4], rtol=1e-5)
    for exponent in (0, 0.5):
      zeros = _awq.input_scales(jnp.zeros(3), exponent)
      np.testing.assert_array_equal(zeros, [1, 1, 1])

  @parameterized.parameters('mxfp4', 'int4_g128', 'uint4_g32')
  def test_exponent_against_all_others(self, name):
    layer = layer_with_large_channels(name)
    w, moments = layer.weight, layer.statistics.moments
    x = np.sqrt(np.diag(np.asarray(moments, np.float64)))
    found = []
    for i in range(8):
      scale = x ** (i / 8)
      scale = (scale / np.sqrt(scale.max() * scale.min()))[:, None]
      q = lowbit.quantize(jnp.float32(w * scale), layer.fmt, axis=-2)
      made = np.asarray(lowbit.dequantize(q), np.float64) / scale
      found.append((error(w, made, moments), scale[:, 0]))
    least, scale = min(found, key=lambda pair: pair[0])
    made = ptq.awq(grid=8, clip=False)(layer)
    (smoothing,) = made.transforms
    np.testing.assert_allclose(smoothing.scale, scale, rtol=1e-4)
    stored = jnp.asarray(made.stored())
    self.assertAlmostEqual(error(w, stored, moments) / least, 1, delta=0.02)


class AwqTest(parameterized.TestCase):
  @parameterized.parameters('int3_g32', 'int4_g128', 'nvfp4')
  def test_few_large_activations(self, name):
    """The claim of the paper, for activations that it has not seen, too."""
    layer = layer_with_large_channels(name)
    made = ptq.awq()(layer)
    self.assertLess(made.error(), 0.6 * layer.error())
    x = jax.random.normal(jax.random.key(4), (512, 64))
    x = x.at[:, ::16].multiply(30)
    seen, nearest = (
      problems.output_error(x, layer.weight, each.stored())
      for each in (made, layer)
    )
    self.assertLess(seen, 0.6 * nearest)

  def test_outputs(self):
    """Activations are divided when the layer runs."""
    layer = layer_with_large_channels('nvfp4')
    x = jax.random.normal(jax.random.key(3), (8, 64)).at[:, ::16].multiply(30)
    weight = ptq.awq()(layer).stored()
    dense = np.asarray(jnp.asarray(weight), np.float64)
    want = np.asarray(x, np.float64) @ dense
    np.testing.assert_allclose(
      lowbit.dot(x, weight), want, atol=1e-5 * abs(want).max()
    )

  def test_equal_activations_take_no_transform(self):
    layer = layer_with_large_channels('int4_g128')
    statistics = layer.statistics._replace(moments=jnp.eye(64))
    layer = layer._replace(statistics=statistics)
    self.assertEqual(ptq.awq()(layer).transforms, ())
    self.assertIs(ptq.awq(clip=False)(layer), layer)
    self.assertEqual(ptq.awq(grid=1)(layer).transforms, ())

  def test_without_statistics(self):
    layer = layer_with_large_channels('int4_g128')._replace(statistics=None)
    self.assertIs(ptq.awq()(layer), layer)

  @parameterized.parameters('mxfp4', 'q4_k', 'int4_g128')
  def test_inputs_without_activations(self, name):
    x = problems.activations(64).at[:, 5].set(0)
    layer = problems.layer(name, x, problems.weights(64, 12))
    made = ptq.awq()(layer)
    self.assertTrue(np.isfinite(jnp.asarray(made.stored())).all())
    self.assertLessEqual(made.error(), layer.error())

  def test_in_front_of_other_steps(self):
    layer = layer_with_large_channels('int3_g32')
    alone = ptq.awq(clip=False)(layer).error()
    made = ptq.chain(ptq.awq(), ptq.gptq())(layer)
    self.assertLen(made.transforms, 1)
    self.assertLess(made.error(), alone)

  def test_wrong_calls(self):
    for grid in (0, 2.5):
      with self.assertRaisesRegex(ValueError, f'grid={grid} must be'):
        ptq.awq(grid=grid)


class ClippingTest(parameterized.TestCase):
  @parameterized.parameters('mxfp4', 'int4_g128', 'uint4_g32')
  def test_shares_against_all_others(self, name):
    """Of each block the share with the least error of its own outputs."""
    w = problems.weights(160, 4)
    layer = problems.layer(name, problems.activations(160), w)
    like, moments = layer.rounded(), np.asarray(layer.statistics.moments)
    exponents = layer.fmt.has_exponent_scale
    shares = (1, 2, 0.5) if exponents else 1 - np.arange(10) / 20
    size = layer.fmt.block[0]

    def of_blocks(q):
      difference = np.asarray(lowbit.dequantize(q), np.float64) - w
      parts = []
      for first in range(0, 160, size):
        own = slice(first, first + size)
        d = difference[own]
        parts.append((d * (moments[own, own] @ d)).sum(0))
      return np.array(parts)

    tried = [_scales.with_shares(w, like, float(share)) for share in shares]
    least = np.min([of_blocks(q) for q in tried], 0)
    got = _scales.clipped_for_outputs(w, like, layer.statistics.moments)
    np.testing.assert_allclose(of_blocks(got), least, rtol=1e-4)
    self.assertLess(least.sum(), of_blocks(like).sum())

  def test_is_kept_where_the_layer_gains(self):
    layer = layer_with_large_channels('int3_g32')
    made, scaled = ptq.awq()(layer), ptq.awq(clip=False)(layer)
    self.assertLess(made.error(), 0.95 * scaled.error())

  def test_formats_without_scales_of_blocks(self):
    fmt = formats.per_tensor(formats.int8)
    layer = layer_with_large_channels('int4_g128')._replace(fmt=fmt)
    made = ptq.awq()(layer)
    self.assertLess(made.error(), layer.error())


if __name__ == '__main__':
  absltest.main()
