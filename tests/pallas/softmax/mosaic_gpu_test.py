"""The GPU softmax kernels, interpreted, and what they refuse.

Bounds as for the TPU kernel, with the 256 sums of a slice in place of lanes.
JAX 0.10 cannot interpret loads with a layout.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_pallas.arith import exponential
from lowbit_pallas.softmax import (
  forms,
  mosaic_gpu,
  mosaic_gpu_config as config,
  reference,
)
from tests.pallas import races
from tests.pallas.softmax import rows

SPLIT = config.Config(1, 3)


def _run(x, where=None, **options):
  y = mosaic_gpu.run(jnp.asarray(x), where, interpret=races.GPU, **options)
  return np.asarray(y)


@absltest.skipUnless(races.GPU, 'JAX 0.10 cannot interpret these kernels')
class MosaicGpuTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('whole', 'pair', 'float32', None, 'wide'),
    ('split', 'online', 'bfloat16', SPLIT, 'increasing'),
  )
  def test_softmax(self, algorithm, dtype, cut, name):
    x = jnp.asarray(rows.draw(name, (2, 700)), dtype)
    y = _run(x, algorithm=algorithm, config=cut, out_dtype=jnp.float32)
    self.assertLessEqual(rows.units(y, rows.exact('softmax', x)), 24)

  @parameterized.parameters(
    (None, 'softmax'),
    (SPLIT, 'softmax'),
    (SPLIT, 'logsumexp'),
  )
  def test_auto_decides_row_by_row(self, cut, kind):
    x = rows.draw('wide', (3, 600))
    x[1] = rows.draw('beyond', (1, 600))
    y = _run(x, kind=kind, config=cut)
    pair = _run(x, kind=kind, config=cut, algorithm='pair')
    self.assertTrue(np.isnan(pair[1]).all())
    np.testing.assert_array_equal(y[[0, 2]], pair[[0, 2]])
    want = rows.exact(kind, x)
    np.testing.assert_allclose(
      y, want.astype(np.float32), rtol=24 * rows.U, atol=2.0**-126
    )

  @parameterized.parameters((None, 'softmax'), (SPLIT, 'log_softmax'))
  def test_special_rows_under_a_mask(self, cut, kind):
    x = rows.draw('wide', (5, 600))
    where = np.random.default_rng(0).random(x.shape) < 0.7
    where[0] = False
    x[1, ~where[1]] = np.nan
    where[2, 7], x[2, 7] = True, np.inf
    where[3, 590], x[3, 590] = True, np.nan
    x[4] = -np.inf
    y = _run(x, jnp.asarray(where), kind=kind, config=cut, algorithm='pair')
    run = jax.jit(reference.run, static_argnames='kind')
    want = np.asarray(run(jnp.asarray(x), jnp.asarray(where), kind=kind))
    for special in (np.isnan, np.isposinf, np.isneginf, lambda v: v == 0.0):
      np.testing.assert_array_equal(special(y), special(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(y[finite], want[finite], rtol=32 * rows.U)

  def test_skipped_rescale_is_seen(self):
    def merge(a, b):
      return exponential.Pair(a.m + b.m, jnp.maximum(a.n, b.n))

    x = rows.draw('wide', (2, 600))
    with mock.patch.object(forms, 'PAIR', forms.PAIR._replace(merge=merge)):
      y = _run(x, algorithm='pair')
    self.assertGreater(rows.units(y, rows.exact('softmax', x)), 1e3)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters('softmax', 'log_softmax', 'logsumexp')
  def test_many_rows_in_pieces_can_be_launched(self, kind):
    x = jax.ShapeDtypeStruct((1 << 20, 16384), jnp.float32)
    run = lambda x: mosaic_gpu.run(x, kind=kind)
    self.assertGreater(config.choose(2, 16384, 4).splits, 1)
    self.assertEqual(jax.eval_shape(run, x).shape[0], 1 << 20)

  @parameterized.parameters(
    ((3,), 'float32', r'x.shape=\(3,\)'),
    ((0, 512), 'float32', 'a row'),
    ((4, 255), 'float32', '256 columns'),
    ((2, 512), 'int32', 'x.dtype=int32'),
  )
  def test_why_not(self, shape, dtype, words):
    x = jax.ShapeDtypeStruct(shape, dtype)
    self.assertRegex(mosaic_gpu.why_not(x), words)
    with self.assertRaisesRegex(NotImplementedError, words):
      mosaic_gpu.run(jnp.zeros(shape, dtype))

  def test_config_too_small(self):
    with self.assertRaisesRegex(NotImplementedError, 'fewer than 700'):
      mosaic_gpu.run(jnp.zeros((2, 700)), config=config.Config(1, 2))
    self.assertIn('slices=300', config.why_not(config.Config(300), 700, 4))

  @parameterized.product(
    columns=(256, 4096, 14336, 14337, 50257, 131072), size=(2, 4, 8)
  )
  def test_heuristic_holds_the_row(self, columns, size):
    cut = config.heuristic(2, columns, size)
    held = cut.slices * cut.splits * config.SLICE
    self.assertGreaterEqual(held, columns)
    self.assertLess(held - columns, config.SLICE * cut.splits)


if __name__ == '__main__':
  absltest.main()
