"""Tests of the layout of prepacked weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas.arith import codec, packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import prepack, tpu_config as config
from tests.pallas.wq_matmul import oracle


def _spec(bits: int, block: int) -> Blocked:
  return Blocked(codec.Int(bits, True, 0), bits, block, None)


@functools.partial(jax.jit, static_argnums=1)
def _lanes(planes, bits: int):
  return packing.planes_to_lanes(list(planes), bits)


def _leaves(bits: int, block: int, rows: int, n: int, seed: int = 0):
  rng = np.random.default_rng([seed, bits, rows, n])
  blocks = rows // block if block else 1
  return (
    rng.integers(0, 256, (rows * bits // 8, n), np.uint8),
    rng.normal(size=(blocks, n)).astype(np.float32),
    rng.integers(0, 256, (blocks, n), np.uint8),
  )


# Widths that do and do not divide a byte, and both layouts of four bits.
ALL = tuple(itertools.product(range(1, 9), prepack.LAYOUTS))
DEFAULT = ((3, 'nk'), (4, 'kn'), (8, 'kn'))

_prepack = jax.jit(
  prepack.prepack, static_argnames=('spec', 'tile', 'k', 'layout')
)
_unpack = jax.jit(prepack.unpack)


class PrepackTest(parameterized.TestCase):
  @parameterized.parameters(*DEFAULT)
  def test_unpack_inverts_prepack(self, bits, layout):
    self.check_unpack_inverts_prepack(bits, layout)

  @parameterized.parameters(*sorted(set(ALL) - set(DEFAULT)))
  @pytest.mark.slow
  def test_unpack_inverts_prepack_in_all_layouts(self, bits, layout):
    self.check_unpack_inverts_prepack(bits, layout)

  def check_unpack_inverts_prepack(self, bits, layout):
    for block, rows, tile in ((32, 160, 128), (0, 136, 128)):
      tile = max(tile, 32 * packing.codes_per_group(bits))
      with self.subTest(block=block, rows=rows, tile=tile):
        leaves = _leaves(bits, block, rows, 5)
        w = _prepack(
          *leaves, _spec(bits, block), tile=tile, k=rows - 3, layout=layout
        )
        self.assertEqual((w.n, w.k, w.rows), (5, rows - 3, rows))
        self.assertEqual(w.steps, -(-rows // tile))
        for got, want in zip(_unpack(w), leaves, strict=True):
          np.testing.assert_array_equal(np.asarray(got), want)
          self.assertEqual(got.dtype, want.dtype)

  @parameterized.parameters((3,))
  def test_lanes_are_runs_of_rows(self, bits):
    self.check_lanes(bits)

  @parameterized.parameters(1, 2, 4, 5, 6, 7, 8)
  @pytest.mark.slow
  def test_lanes_of_other_widths_are_runs_of_rows(self, bits):
    self.check_lanes(bits)

  def check_lanes(self, bits):
    rows, tile, n = 512, 256, 3
    codes, _, _ = _leaves(bits, 0, rows, n)
    w = _prepack(codes, None, None, _spec(bits, 0), tile=tile)
    lanes = _lanes(w.planes, bits)
    run = tile // len(lanes)
    want = oracle.codes(codes, bits)
    want = want.reshape(rows // tile, len(lanes), run, n)
    for j, lane in enumerate(lanes):
      got = np.asarray(lane).reshape(rows // tile, run, n)
      np.testing.assert_array_equal(got, want[:, j])

  def test_blocks_longer_than_tiles(self):
    leaves = _leaves(4, 256, 768, 5)
    w = _prepack(*leaves, _spec(4, 256), tile=128)
    self.assertEqual((w.steps, w.tiles_per_block), (6, 2))
    self.assertEqual(w.scale.shape, (3, 1, 5))
    for got, want in zip(_unpack(w), leaves, strict=True):
      np.testing.assert_array_equal(np.asarray(got), want)

  def test_empty(self):
    for rows, n in ((0, 4), (128, 0)):
      leaves = _leaves(4, 32, rows, n)
      w = _prepack(*leaves, _spec(4, 32), tile=128)
      for got, want in zip(_unpack(w), leaves, strict=True):
        self.assertEqual(got.shape, want.shape)

  def test_stacks_by_vmap_and_traces(self):
    stack = [np.stack([a, a]) for a in _leaves(3, 32, 96, 4)]
    make = lambda *a: prepack.prepack(*a, _spec(3, 32), tile=256)
    back = jax.jit(jax.vmap(lambda *a: prepack.unpack(make(*a))))(*stack)
    for got, want in zip(back, stack, strict=True):
      np.testing.assert_array_equal(np.asarray(got), want)

  def test_refuses(self):
    codes, scale, zero = _leaves(4, 32, 64, 4)
    spec = _spec(4, 32)
    for reason, leaves, kwargs in (
      ('packing group', (codes, scale, zero), dict(tile=3)),
      ('divide each other', (codes, scale, zero), dict(tile=80)),
      ('lanes of 48', (codes, scale, zero), dict(tile=96)),
      ('k=65', (codes, scale, zero), dict(tile=128, k=65)),
      ('layout', (codes, scale, zero), dict(tile=128, layout='x')),
      ('scale has shape', (codes, scale[1:], zero), dict(tile=128)),
      ('zero_point has shape', (codes, scale, zero.T), dict(tile=128)),
      ('whole blocks', (codes[1:], scale, zero), dict(tile=128)),
    ):
      with self.assertRaisesRegex(ValueError, reason):
        prepack.prepack(*leaves, spec, **kwargs)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    'int4_g32', 'mxfp4', 'nvfp4', 'int3_g128', 'mxfp6_e2m3', 'int8_channel'
  )
  def test_fits_and_sums_do_not_depend_on_rows(self, name):
    spec = blocked(formats.get(name))
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
      for n, k in ((1, 1), (100, 160), (4096, 11008)):
        order = set()
        for m in (1, 17, 256, 5000):
          c = config.heuristic(m, n, k, spec, dtype)
          self.assertIsNone(prepack.why_not(spec, c.tile))
          self.assertLessEqual(
            config.vmem_bytes(c, spec, dtype), config.VMEM_BYTES
          )
          order.add((c.tile, c.schedule))
        self.assertLen(order, 1)

  def test_refuses_blocks_that_fit_no_tile(self):
    with self.assertRaisesRegex(ValueError, 'blocks of 131'):
      config.tile_rows(262, _spec(4, 131))


if __name__ == '__main__':
  absltest.main()
