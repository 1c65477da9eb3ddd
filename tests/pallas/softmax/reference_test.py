"""The softmax contract in jnp against longdouble.

Bounds are those of the docstrings in units of u = 2^-24: 8 + h for the pair
form where multiply-add is fused, 10 + h for the online form, with h the longest
chain of additions. Random data stays below half of them: `GUARD` holds there.
"""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_pallas.arith import exponential, softmax as sm
from lowbit_pallas.softmax import forms, reference, tpu_config as config
from tests.pallas.softmax import rows

GUARD = 12
SHAPES = ((1, 1), (2, 9000))
MORE_SHAPES = (
  (1, 2),
  (3, 5),
  (9, 129),
  (7, 127),
  (8, 128),
  (5, 1000),
  (13, 300),
)


@functools.cache
def _compiled(**options):
  return jax.jit(functools.partial(reference.run, **options))


class ReferenceTest(parameterized.TestCase):
  @parameterized.product(name=rows.NAMES, algorithm=forms.ALGORITHMS)
  def test_error_of_softmax(self, name, algorithm):
    x = rows.draw(name, (3, 300))
    if algorithm == 'pair' and name in ('beyond', 'huge'):
      y = _compiled(algorithm=algorithm)(x)
      self.assertTrue(np.isnan(y).all())
      return
    y = _compiled(algorithm=algorithm)(x)
    error = rows.units(y, rows.exact('softmax', x))
    self.assertLessEqual(error, GUARD)

  def test_guard_is_well_within_the_bound(self):
    for columns in (300, 1000, 9000):
      self.assertLessEqual(2 * GUARD, 8 + reference.chain(columns))

  @parameterized.parameters(*SHAPES)
  def test_shapes(self, *shape):
    self.check_shape(shape)

  @parameterized.parameters(*MORE_SHAPES)
  @pytest.mark.slow
  def test_more_shapes(self, *shape):
    self.check_shape(shape)

  def check_shape(self, shape):
    x = rows.draw('wide', shape)
    y = _compiled()(x)
    self.assertEqual(y.shape, shape)
    self.assertLessEqual(rows.units(y, rows.exact('softmax', x)), GUARD)

  @parameterized.parameters('wide', 'offset', 'beyond')
  def test_logarithms(self, name):
    x = rows.draw(name, (3, 300))
    h = reference.chain(300)
    want = rows.exact('log_softmax', x)
    log_sum = np.log(rows.LONG(300)) + 1
    # (8 + h) u for the sum, 2 u for its logarithm, 4 u of the result.
    bound = ((8 + h) + 2 * log_sum + 4 * np.abs(want)) * rows.U
    y = np.asarray(_compiled(kind='log_softmax')(x)).astype(rows.LONG)
    self.assertTrue(np.all(np.abs(y - want) <= bound))
    want = rows.exact('logsumexp', x)
    bound = ((8 + h) + 2 * log_sum + np.abs(want)) * rows.U
    y = np.asarray(_compiled(kind='logsumexp')(x)).astype(rows.LONG)
    self.assertEqual(y.shape, (3,))
    self.assertTrue(np.all(np.abs(y - want) <= bound))

  def test_auto_decides_row_by_row(self):
    x = rows.draw('wide', (3, 300))
    x[1] = rows.draw('huge', (1, 300))
    y = np.asarray(_compiled(algorithm='auto')(x))
    pair = np.asarray(_compiled(algorithm='pair')(x))
    online = np.asarray(_compiled(algorithm='online')(x))
    np.testing.assert_array_equal(y[[0, 2]], pair[[0, 2]])
    np.testing.assert_array_equal(y[1], online[1])

  @pytest.mark.slow
  def test_skipped_rescale_is_seen(self):
    x = rows.draw('wide', (3, 300))

    with mock.patch.object(exponential, '_scaled', lambda pair, n: pair.m):
      y = jax.jit(functools.partial(reference.run, algorithm='pair'))(x)
    self.assertGreater(rows.units(y, rows.exact('softmax', x)), 1e3)


class OnlineTotalTest(absltest.TestCase):
  def test_joins_partial_sums(self):
    x = rows.draw('huge', (5, 64))

    @jax.jit
    def joined(x):
      state = sm.online_reduce(x.reshape(5, 8, 8), None, 1)
      return sm.online_logsumexp(sm.online_total(state, 1))

    want = rows.exact('logsumexp', x)
    np.testing.assert_allclose(joined(x), want, rtol=4 * rows.U)

  def test_special_partial_sums(self):
    peak = np.float32([[-np.inf, -np.inf], [np.inf, 3.0], [1.0, 3.0]])
    total = np.float32([[0.0, 0.0], [1.0, 2.0], [np.nan, 1.0]])
    join = lambda state: sm.online_logsumexp(sm.online_total(state, 1))
    got = jax.jit(join)(sm.Peak(peak, total))
    np.testing.assert_array_equal(got, [-np.inf, np.inf, np.nan])


class ConfigTest(parameterized.TestCase):
  @parameterized.product(
    shape=((1, 1), (3, 5), (13, 300), (64, 4096), (2, 50257), (1024, 131072)),
    itemsize=(1, 2, 4),
  )
  def test_tpu_blocks(self, shape, itemsize):
    block = config.heuristic(*shape, itemsize)
    self.assertEqual(block.rows % config.sublanes(itemsize), 0)
    more = config.heuristic(7 * shape[0], shape[1], itemsize)
    self.assertEqual(more.columns, block.columns)
    wide = config.heuristic(*shape, 4)
    self.assertEqual(config.chunk(wide), config.chunk(block))

  @parameterized.parameters(
    (12, 128, 'rows=12'), (8, 100, 'columns=100'), (512, 4096, '2097152 bytes')
  )
  def test_bad_tpu_blocks(self, block_rows, columns, words):
    block = config.Config(block_rows, columns)
    self.assertRegex(config.why_not(block, 4), words)


if __name__ == '__main__':
  absltest.main()
