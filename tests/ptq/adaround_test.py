"""AdaRound against all roundings of small layers, in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _adaround, _grid
from tests.ptq import problems

_INTEGERS = BlockFormat('integers', formats.int4, (0,), formats.float32)
# As good as 1500 steps for these layers.
_FAST = {'steps': 300, 'learning_rate': 0.05}


def integers(w) -> lowbit.QArray:
  """The nearest integers."""
  return lowbit.quantize_with(w, jnp.ones((1, w.shape[1])), _INTEGERS, axis=-2)


def errors(w, q, moments) -> np.ndarray:
  """Mean square error of each output, in float64."""
  difference = np.asarray(q, np.float64) - np.asarray(w, np.float64)
  return (difference * (np.asarray(moments, np.float64) @ difference)).sum(0)


def least_errors(w, moments) -> np.ndarray:
  """Of each output over all ways to round inputs up or down to integers."""
  low = np.floor(np.asarray(w, np.float64))
  ways = itertools.product((0, 1), repeat=len(w))
  found = [errors(w, low + np.array(way)[:, None], moments) for way in ways]
  return np.min(found, 0)


def choice_of(layer: ptq.Layer) -> _adaround.Choice:
  like = layer.rounded()
  return _adaround.choice_of(
    layer.weight,
    _grid.grid_of_inputs(like),
    layer.statistics.moments,
    like.fmt.element,
  )


def small_layer(name: str, inputs: int = 128, size: float = 1) -> ptq.Layer:
  x, w = problems.activations(inputs), problems.weights(inputs, 12)
  return problems.layer(name, x * size, w)


class AdaRoundTest(parameterized.TestCase):
  def test_by_hand(self):
    """H = [[2, 1], [1, 2]], w = [.6, .55]: [1, 0] costs .485, [0, 1] .585, the
    nearest [1, 1] 1.085."""
    moments = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    w = jnp.array([[0.6], [0.55]])
    q = _adaround.round_adaptively(w, integers(w), moments)
    np.testing.assert_array_equal(lowbit.dequantize(q), [[1], [0]])
    self.assertAlmostEqual(least_errors(w, moments)[0], 0.485)

  def test_against_all_roundings(self):
    """8 weights of each of 48 outputs have 2^8 each."""
    root = problems.weights(8, 8)
    moments = root @ root.T / 8 + jnp.eye(8) / 10
    w = 2 * problems.weights(8, 48)
    q = _adaround.round_adaptively(w, integers(w), moments)
    got = errors(w, lowbit.dequantize(q), moments)
    least = least_errors(w, moments)
    nearest = errors(w, np.round(w), moments)
    self.assertGreater(np.isclose(got, least, rtol=1e-4).mean(), 0.6)
    self.assertLess(got.sum(), 1.15 * least.sum())
    self.assertGreater(nearest.sum(), 1.3 * least.sum())

  def test_slope(self):
    """With r = 1 it is that of the mean over weights that go up by chance."""
    rng = np.random.default_rng(0)
    w, h = rng.normal(size=(5, 1)), rng.uniform(size=(5, 1))
    root = rng.normal(size=(5, 5))
    moments = root.T @ root

    def mean_error(h):
      total = 0
      for way in itertools.product((0, 1), repeat=5):
        up = np.array(way)[:, None]
        chance = np.where(up, h, 1 - h).prod()
        total += chance * errors(w, np.floor(w) + up, moments)[0]
      return total

    step = 1e-4 * np.eye(5)[:, :, None]
    slope = [(mean_error(h + d) - mean_error(h - d)) / 2e-4 for d in step]
    w = jnp.float32(w)
    choice = _adaround.choice_of(
      w, _grid.grid_of_inputs(integers(w)), jnp.float32(moments), formats.int4
    )
    want = np.array(slope) / np.diag(moments)
    got = choice.slope(jnp.float32(h), 1.0)[:, 0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  @parameterized.parameters('mxfp4', 'uint4_g32')
  def test_error_of_outputs_it_has_not_seen(self, name):
    """The claim of the paper."""
    x, w = problems.activations(), problems.weights(outputs=12)
    layer = problems.layer(name, x[:1536], w)
    made = ptq.adaround(**_FAST)(layer)
    self.assertLess(made.error(), 0.75 * layer.error())
    seen = problems.output_error(x[1536:], w, made.stored())
    nearest = problems.output_error(x[1536:], w, layer.stored())
    self.assertLess(seen, 0.8 * nearest)

  @parameterized.parameters(
    ('int4_g128', 128, 1.0), ('nvfp4', 32, 1e3), ('mxfp4', 384, 1e-3)
  )
  def test_decides_about_all_weights(self, name, inputs, size):
    """Less than .5 % are left between, for layers of any size and unit."""
    layer = small_layer(name, inputs, size)
    shares = _adaround.learned_shares(choice_of(layer), 1e-2, 2.0, 1500)
    self.assertLess(np.mean((shares > 0.01) & (shares < 0.99)), 0.005)

  def test_units_of_activations(self):
    """Powers of two change no bit."""
    one, other = (
      ptq.adaround(**_FAST)(small_layer('mxfp4', size=size)).rounded()
      for size in (1, 2.0**20)
    )
    np.testing.assert_array_equal(one.codes, other.codes)

  @parameterized.parameters('mxfp4', 'uint4_g32', 'q4_k', 'nf4_g64', 'iq4_nl')
  def test_one_of_two_neighbours(self, name):
    layer = small_layer(name)
    choice = choice_of(layer)
    low, high = np.sort([choice.low, choice.low + choice.gap], 0)
    made = np.asarray(ptq.adaround(**_FAST)(layer).stored())
    is_end = [
      np.isclose(made, end, rtol=1e-5, atol=1e-6) for end in (low, high)
    ]
    self.assertTrue(np.any(is_end, 0).all())
    # The nearest is one of them, and weights lie between but at the ends.
    nearest = np.asarray(layer.stored())
    is_end = [
      np.isclose(nearest, end, rtol=1e-5, atol=1e-6) for end in (low, high)
    ]
    self.assertTrue(np.any(is_end, 0).all())
    w, free = np.asarray(layer.weight), low < high
    slack = 1e-6 * abs(w).max()
    self.assertTrue(((low - slack <= w) & (w <= high + slack))[free].all())
    self.assertGreater(free.mean(), 0.8)

  def test_no_output_is_worse(self):
    layer = small_layer('mxfp4')
    made = ptq.adaround(steps=3)(layer)
    moments = layer.statistics.moments
    before, after = (
      errors(layer.weight, jnp.asarray(q), moments)
      for q in (layer.rounded(), made.rounded())
    )
    self.assertTrue((after <= before * (1 + 1e-6)).all())

  def test_keeps_searched_scales(self):
    scales = ptq.search_scales()(small_layer('int4_g128'))
    made = ptq.chain(ptq.search_scales(), ptq.adaround(**_FAST))(
      small_layer('int4_g128')
    )
    np.testing.assert_array_equal(made.rounded().scale, scales.rounded().scale)
    self.assertLess(made.error(), scales.error())

  def test_of_uncorrelated_inputs_it_is_the_nearest(self):
    layer = small_layer('int4_g128')
    variances = jnp.diag(jnp.arange(128.0))
    statistics = layer.statistics._replace(moments=variances)
    layer = layer._replace(statistics=statistics)
    made = ptq.adaround(**_FAST)(layer)
    np.testing.assert_array_equal(
      jnp.asarray(made.stored()), jnp.asarray(layer.stored())
    )

  def test_inputs_without_activations(self):
    x = problems.activations(64).at[:, 5].set(0)
    layer = problems.layer('mxfp4', x, problems.weights(64, 12))
    made = jnp.asarray(ptq.adaround(**_FAST)(layer).stored())
    np.testing.assert_array_equal(made[5], jnp.asarray(layer.stored())[5])

  def test_blocks_of_zeros(self):
    w = problems.weights(64, 12).at[:32].set(0)
    layer = problems.layer('nf4_g64', problems.activations(64), w)
    zeros = layer._replace(weight=jnp.zeros_like(w))
    for case in (layer, zeros):
      made = ptq.adaround(**_FAST)(case)
      self.assertTrue(np.isfinite(jnp.asarray(made.stored())).all())

  def test_wrong_calls(self):
    for setting, value in (
      *(('steps', value) for value in (0, 1.5)),
      *(('learning_rate', value) for value in (0, float('inf'))),
      *(('regularizer', value) for value in (-1, float('nan'))),
    ):
      with self.assertRaisesRegex(ValueError, f'{setting}={value} must be'):
        ptq.adaround(**{setting: value})


if __name__ == '__main__':
  absltest.main()
