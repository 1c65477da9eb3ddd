"""Scales of blocks against slow searches in float64, and by hand."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _grid, _layer, _scales
from tests.ptq import problems

_FOUR = BlockFormat('four', formats.int4, (4,), formats.float32)
_FIVE = BlockFormat('five', formats.int4, (5,), formats.float32)


def layer_of(w, fmt: BlockFormat) -> ptq.Layer:
  """Without statistics."""
  return _layer.Layer(problems.PATH, jnp.asarray(w, jnp.float32), fmt, None)


def nearest(w, scale, element, zero_point) -> np.ndarray:
  """Numbers of an element, times a scale, next to w; all float64."""
  values = element.values() - zero_point
  if element.is_signed:
    values = values[abs(values) <= element.max]
  table = values * scale
  return table[abs(w[:, None] - table).argmin(1)]


def least_errors(layer, shares, power, importance) -> np.ndarray:
  """(blocks, out): over all shares of the scales that the layer has."""
  q, size = layer.rounded(), layer.fmt.block[0]
  w = np.asarray(layer.weight, np.float64)
  blocks, outputs = q.scale.shape
  least = np.full((blocks, outputs), np.inf)
  scales = lowbit.quantize(layer.weight, layer.fmt, axis=-2).scale
  if layer.fmt.has_exponent_scale:
    scales = 2.0 ** (np.asarray(scales, np.float64) - 127)
  scales = np.asarray(scales, np.float64)
  for b in range(blocks):
    own = slice(b * size, (b + 1) * size)
    for o in range(outputs):
      zero = 0 if q.zero_point is None else int(q.zero_point[b, o])
      for share in shares:
        scale = float(np.float32(scales[b, o]) * np.float32(share))
        made = nearest(w[own, o], scale, layer.fmt.element, zero)
        difference = abs(made - w[own, o]) ** power * importance[own]
        least[b, o] = min(least[b, o], difference.sum())
  return least


def errors(layer, q, power, importance) -> np.ndarray:
  """(blocks, out)."""
  difference = np.asarray(lowbit.dequantize(q), np.float64) - layer.weight
  difference = abs(difference) ** power * importance[:, None]
  first = np.arange(0, len(difference), layer.fmt.block[0])
  return np.add.reduceat(difference, first)


class SearchTest(parameterized.TestCase):
  @parameterized.product(
    name=('mxfp4', 'int4_g128', 'uint4_g32'),
    power=(2.0, 2.4, 1.0),
    weighted=(False, True),
  )
  def test_against_all_shares(self, name, power, weighted):
    layer = problems.layer(
      name, problems.activations(144), problems.weights(144, 3)
    )
    importance = np.ones(144)
    if weighted:
      importance = np.diag(np.asarray(layer.statistics.moments, np.float64))
    fractions = (1, 2, 0.5) if name == 'mxfp4' else np.linspace(1, 0.4, 13)
    step = ptq.search_scales(
      power=power, weighted=weighted, fractions=tuple(fractions)
    )
    got = errors(layer, step(layer).rounded(), power, importance)
    want = least_errors(layer, fractions, power, importance)
    np.testing.assert_allclose(got, want, rtol=1e-4)

  def test_by_hand(self):
    """Of [.9, -.9, .9, 7] a scale of 1 costs .1 three times, one of .9 costs .7
    once: squares say 1, roots .9, and squares, too, if the last counts less."""
    layer = layer_of([[0.9], [-0.9], [0.9], [7]], _FOUR)
    for power, want in ((2.0, 1), (1.0, 1), (0.5, 0.9)):
      step = ptq.search_scales(fractions=(1, 0.9), power=power)
      scale = step(layer).rounded().scale
      np.testing.assert_allclose(scale, [[want]], rtol=1e-6)
    statistics = problems.layer(
      'int4_g128', jnp.diag(jnp.array([1, 1, 1, 0.1])), layer.weight
    ).statistics
    step = ptq.search_scales(fractions=(1, 0.9), weighted=True)
    scale = step(layer._replace(statistics=statistics)).rounded().scale
    np.testing.assert_allclose(scale, [[0.9]], rtol=1e-6)

  def test_blocks_of_padding(self):
    """Three blocks of 4 codes of 3 bits take the bytes of four."""
    fmt = BlockFormat('padded', formats.int3, (4,), formats.float32)
    layer = layer_of(problems.weights(12, 3), fmt)
    for step in (ptq.search_scales(), ptq.clip(90)):
      made = step(layer).rounded()
      self.assertEqual(made.scale.shape, layer.rounded().scale.shape)
      self.assertTrue(np.isfinite(made.scale).all())

  def test_first_of_equal_ones(self):
    for fractions in ((1, 0.5), (0.5, 1)):
      step = ptq.search_scales(fractions=fractions)
      scale = step(layer_of(np.zeros((4, 1)), _FOUR)).rounded().scale
      want = fractions[0] * layer_of(np.zeros((4, 1)), _FOUR).rounded().scale
      np.testing.assert_array_equal(scale, want)

  def test_floats_lose_as_little_as_by_the_rule_sweep(self):
    """Scales above that of the largest number are tried too."""
    layer = problems.layer('nvfp4')._replace(statistics=None)
    found, sweep = (
      step(layer) for step in (ptq.search_scales(), ptq.rtn('sweep'))
    )
    self.assertLessEqual(found.error(), sweep.error() * (1 + 1e-6))
    before, after = (
      np.asarray(_grid.grid(made.rounded()).scale) for made in (layer, found)
    )
    self.assertGreater((after > before).mean(), 0.1)

  def test_exponent_scales_move_by_one_at_most(self):
    """Of `floor` scales, which clip, some become twice as large."""
    layer = problems.layer('mxfp4')
    before = np.int32(layer.rounded().scale)
    for step in (ptq.search_scales(), ptq.search_scales(fractions=(1, 2, 0.5))):
      moved = np.int32(step(layer).rounded().scale) - before
      self.assertContainsSubset(np.unique(moved), (-1, 0, 1))
      self.assertGreater((moved != 0).sum(), 0)

  def test_error_of_weights_never_grows(self):
    for name in problems.FORMATS:
      layer = problems.layer(
        name, problems.activations(64), problems.weights(64, 8)
      )
      layer = layer._replace(statistics=None)
      self.assertLessEqual(ptq.search_scales()(layer).error(), layer.error())

  def test_wrong_calls(self):
    with self.assertRaisesRegex(ValueError, 'power=0'):
      ptq.search_scales(power=0)
    for fractions in ((), (1, -1)):
      with self.assertRaisesRegex(ValueError, 'fractions='):
        ptq.search_scales(fractions=fractions)


class ClipTest(parameterized.TestCase):
  def test_by_hand(self):
    """Magnitudes 1, 2, 3, 4, 8: three quarters lie at 4, a half at 3."""
    w = np.array([[-8.0], [1], [-2], [3], [4]])
    layer = layer_of(np.hstack([w, 0 * w]), _FIVE)
    for percentile, bound in ((100, 8), (75, 4), (50, 3), (62.5, 3.5)):
      q = ptq.clip(percentile)(layer).rounded()
      np.testing.assert_allclose(q.scale[0, 0], bound / 7, rtol=1e-6)
      self.assertEqual(q.scale[0, 1], layer.rounded().scale[0, 1])
      made = lowbit.dequantize(q)[:, 0]
      np.testing.assert_allclose(abs(made).max(), bound, rtol=1e-6)

  def test_zero_points_stay_and_minima_are_shared_out(self):
    w = np.array([[-2.0], [2], [1], [2], [6], [3]])  # 2 in the middle
    zero = formats.grouped(formats.uint4, 6)
    before = layer_of(w, zero).rounded()
    after = ptq.clip(50)(layer_of(w, zero)).rounded()
    np.testing.assert_array_equal(after.zero_point, before.zero_point)
    np.testing.assert_allclose(after.scale, before.scale / 3, rtol=1e-6)
    minimum = formats.grouped(formats.uint4, 6, minimum=True)
    before = layer_of(w, minimum).rounded()
    after = ptq.clip(50)(layer_of(w, minimum)).rounded()
    np.testing.assert_allclose(after.minimum, before.minimum / 3, rtol=1e-6)
    np.testing.assert_allclose(after.scale, before.scale / 3, rtol=1e-6)

  def test_padding_does_not_count(self):
    """The last block has 16 of 32 weights."""
    fmt = formats.grouped(formats.int4, 32)
    w = problems.weights(48, 5)
    q = ptq.clip(90)(layer_of(w, fmt)).rounded()
    for block, own in enumerate((w[:32], w[32:])):
      bound = np.percentile(abs(np.asarray(own, np.float64)), 90, 0)
      np.testing.assert_allclose(q.scale[block], bound / 7, rtol=1e-5)

  def test_of_all_it_is_what_the_layer_has(self):
    for name in problems.FORMATS:
      layer = problems.layer(
        name, problems.activations(64), problems.weights(64, 8)
      )
      made = ptq.clip(100)(layer).rounded()
      np.testing.assert_array_equal(
        jnp.asarray(made), jnp.asarray(layer.rounded())
      )

  def test_outliers_cost_less(self):
    """Of one large weight in 128, which alone is clipped."""
    w = problems.weights(128, 4).at[7].set(12)
    layer = layer_of(w, formats.get('int4_g128'))
    error = lambda layer: np.square(jnp.asarray(layer.stored()) - w)
    others = np.arange(128) != 7
    clipped, whole = error(ptq.clip(99)(layer)), error(layer)
    self.assertLess(clipped[others].mean(), 0.3 * whole[others].mean())

  def test_wrong_calls(self):
    for percentile in (0, 101, float('nan')):
      with self.assertRaisesRegex(ValueError, f'percentile={percentile} must'):
        ptq.clip(percentile)

  def test_share_of_blocks(self):
    w = problems.weights(70, 3)
    got = _scales._shares_of_percentile(w, 80.0, _scales._BlockShape(3, 32))
    for i, first in enumerate((0, 32, 64)):
      own = abs(np.asarray(w[first : first + 32], np.float64))
      want = np.percentile(own, 80, 0) / own.max(0)
      np.testing.assert_allclose(got[i], want, rtol=1e-5)


if __name__ == '__main__':
  absltest.main()
