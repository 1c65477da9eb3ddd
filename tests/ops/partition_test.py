"""Products by kernels under sharded jit, vmap and shard_map, on 8 host devices.

The reference stands for the kernel: only what surrounds it is tested here.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.ops import _partition
from lowbit_jax.ops._prepack import blocked
from lowbit_pallas.quantize import mosaic_gpu, reference as quantize
from lowbit_pallas.quantize.task import Task
from lowbit_pallas.wq_matmul import prepack, reference

M, N, K, TILE = 8, 16, 1024, 256
RUN = functools.partial(
  reference.run, schedule='pre', out_dtype=np.dtype(np.float32)
)


def product(x, w):
  return _partition.partitioned(RUN, x, w)


_plain = jax.jit(RUN)


def plain(x, w) -> np.ndarray:
  """The product by itself."""
  return np.asarray(_plain(x, w))


def integers(seed: int, shape) -> np.ndarray:
  """Small integers: float32 sums of their products are exact in any order."""
  return np.random.RandomState(seed).randint(-3, 4, shape).astype(np.float32)


def operands(name: str, layout: str):
  w = _weight(integers(0, (K, N)), formats.get(name), layout)
  return jnp.asarray(integers(1, (M, K)), jnp.bfloat16), w


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(w, fmt, layout: str):
  q = lowbit_jax.quantize(w, fmt, axis=-2)
  # Powers of two keep shards that are scaled one by one exact.
  scale = q.scale
  if scale.dtype == np.float32:
    scale = jnp.exp2(jnp.round(jnp.log2(scale)))
  return prepack.prepack(
    q.codes, scale, q.zero_point, blocked(fmt), tile=TILE, layout=layout
  )


def place(mesh, x, w, x_spec, planes_spec, scale_spec=None):
  """Operands on a mesh; specs in the axes (m, k) and (planes, k, n)."""
  everywhere = NamedSharding(mesh, P())
  w = jax.device_put(w, jax.tree.map(lambda leaf: everywhere, w))
  if w.layout == 'nk':
    planes_spec = P(planes_spec[0], planes_spec[2], planes_spec[1])
  planes = jax.device_put(w.planes, NamedSharding(mesh, planes_spec))
  if scale_spec is not None:
    scale = jax.device_put(w.scale, NamedSharding(mesh, scale_spec))
    w = dataclasses.replace(w, scale=scale)
  x = jax.device_put(x, NamedSharding(mesh, x_spec))
  return x, dataclasses.replace(w, planes=planes)


CASES = (('uint4_g32', 'nk'),)
MORE_CASES = (
  ('mxfp4', 'kn'), ('mxfp4', 'nk'), ('uint4_g32', 'kn'), ('int8_channel', 'kn'),
  ('int8_channel', 'nk'),
)  # fmt: skip


class PartitionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    auto = (jax.sharding.AxisType.Auto,) * 2
    self.mesh = jax.make_mesh((4, 2), ('d', 't'), axis_types=auto)

  @parameterized.parameters(*CASES)
  def test_rows_and_columns_stay_split(self, name, layout):
    self.check_rows_and_columns(name, layout)

  @parameterized.parameters(*MORE_CASES)
  @pytest.mark.slow
  def test_more_rows_and_columns(self, name, layout):
    self.check_rows_and_columns(name, layout)

  def check_rows_and_columns(self, name, layout):
    x, w = operands(name, layout)
    want = plain(x, w)
    scale = P(None, None, 't')
    x, w = place(self.mesh, x, w, P('d', None), P(None, None, 't'), scale)
    f = jax.jit(product).lower(x, w).compile()
    out = f(x, w)
    np.testing.assert_array_equal(out, want)
    self.assertEqual(out.sharding.spec, P('d', 't'))
    text = f.as_text()
    for collective in ('all-gather', 'all-reduce', 'collective-permute'):
      self.assertNotIn(f'{collective}(', text)

  @parameterized.parameters(*CASES)
  def test_shards_of_k_are_summed(self, name, layout):
    self.check_shards_of_k(name, layout)

  @parameterized.parameters(*MORE_CASES)
  @pytest.mark.slow
  def test_more_shards_of_k(self, name, layout):
    self.check_shards_of_k(name, layout)

  def check_shards_of_k(self, name, layout):
    x, w = operands(name, layout)
    want = plain(x, w)
    x, w = place(self.mesh, x, w, P(None, 'd'), P(None, 'd', None))
    f = jax.jit(product).lower(x, w).compile()
    np.testing.assert_array_equal(f(x, w), want)
    text = f.as_text()
    self.assertIn('all-reduce(', text)
    self.assertNotIn('all-gather(', text)

  def test_other_layouts_of_k_are_gathered(self):
    self.check_gathered((P(None, 't'), P(None, 'd', None)))

  @pytest.mark.slow
  def test_more_layouts_of_k_are_gathered(self):
    self.check_gathered(
      (P(None, 'd'), P(None, None, None)),
      (P(None, None), P(None, 'd', None)),
      (P(None, ('d', 't')), P(None, ('d', 't'), None)),
    )

  def check_gathered(self, *cases):
    for x_spec, planes in cases:
      x, w = operands('mxfp4', 'kn')
      want = plain(x, w)
      x, w = place(self.mesh, x, w, x_spec, planes)
      np.testing.assert_array_equal(jax.jit(product)(x, w), want)

  def test_vmap(self):
    self.check_vmap(jax.jit, 0, 0)

  @pytest.mark.slow
  def test_vmap_over_weights(self):
    self.check_vmap(jax.jit, None, 0)

  def test_vmap_without_jit(self):
    self.check_vmap(lambda f: f, 0, None)

  @parameterized.parameters((None, 0), (0, 0))
  @pytest.mark.slow
  def test_more_vmaps_without_jit(self, rows, weights):
    self.check_vmap(lambda f: f, rows, weights)

  def check_vmap(self, wrap, rows, weights):
    x, w = operands('uint4_g32', 'nk')
    want = plain(x, w)
    x = np.asarray(x)
    x = x if rows is None else np.stack([x, 2 * x])
    if weights is not None:
      w = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), w)
    got = wrap(jax.vmap(product, in_axes=(rows, weights)))(x, w)
    second = want if rows is None else 2 * want
    np.testing.assert_array_equal(got, np.stack([want, second]))

  def test_shard_map(self):
    x, w = operands('mxfp4', 'kn')
    f = jax.shard_map(
      product, mesh=self.mesh, in_specs=(P('d'), P()), out_specs=P('d')
    )
    np.testing.assert_array_equal(jax.jit(f)(x, w), plain(x, w))

  @pytest.mark.slow
  def test_donated_operands(self):
    x, w = operands('mxfp4', 'kn')
    want = plain(x, w)
    x, w = place(self.mesh, x, w, P('d', None), P(None, None, 't'))
    got = jax.jit(product, donate_argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(got, want)

  def test_block_scaled_products_leave_splitting_to_others(self):
    fmt = formats.int8_channel
    choose = functools.partial(
      lowbit_jax.select_implementation,
      'dot',
      lowbit_jax.quantize(integers(1, (M, K)), fmt),
      lowbit_jax.quantize(integers(0, (K, N)), fmt, axis=-2),
      implementation='mosaic_gpu',
    )
    self.assertIn('decodes', choose().note)
    with mock.patch.object(_partition, 'is_alone', lambda: True):
      self.assertIn('block-scaled', choose().note)


NVFP4 = Task(blocked(formats.nvfp4), formats.nvfp4.scale_rule)


@jax.jit
def _quantized(x, scale, signs):
  """What is split, as a whole."""
  return quantize.run(x * signs, NVFP4, tensor_scale=scale)


class RowsTest(parameterized.TestCase):
  """Quantization, whose extras all rows share."""

  def setUp(self):
    super().setUp()
    auto = (jax.sharding.AxisType.Auto,) * 2
    self.mesh = jax.make_mesh((4, 2), ('d', 't'), axis_types=auto)
    self.x = np.random.RandomState(0).randn(16, 64).astype(np.float32)
    self.shapes = []

  def quantize(self, split, x, scale, signs):
    def run(x, scale, signs):
      self.shapes.append(x.shape)
      return quantize.run(x * signs, NVFP4, tensor_scale=scale)

    return _partition.rows_and_extras(run, x, scale, signs, split=split)

  def arguments(self, *spec):
    signs = np.where(np.arange(64) % 3, 1, -1).astype(np.float32)
    x = jax.device_put(self.x, NamedSharding(self.mesh, P(*spec)))
    return x, jnp.float32(0.01), signs

  @parameterized.parameters((True, ('d', 't')), (False, ('d',)))
  def test_bits_do_not_depend_on_the_mesh(self, split, spec):
    self.check_mesh(split, spec)

  @parameterized.product(
    split=(True, False), spec=(('d',), (('d', 't'),), (None, 't'), ('d', 't'))
  )
  @pytest.mark.slow
  def test_bits_do_not_depend_on_any_mesh(self, split, spec):
    self.check_mesh(split, spec)

  def check_mesh(self, split, spec):
    f = functools.partial(self.quantize, split)
    want = _quantized(*self.arguments())
    got = jax.jit(f)(*self.arguments(*spec))
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
    parts = {'d': 4, ('d', 't'): 8, None: 1}[spec[0]] if split else 1
    self.assertEqual(self.shapes[-1], (16 // parts, 64))
    for leaf in got if split else ():
      self.assertEqual((*leaf.sharding.spec, None)[0], spec[0])

  def test_vmap_and_shard_map(self):
    self.check_vmap_and_shard_map(True)

  @pytest.mark.slow
  def test_vmap_and_shard_map_without_splits(self):
    self.check_vmap_and_shard_map(True, False)

  def check_vmap_and_shard_map(self, *splits):
    x, *extras = self.arguments()
    for split in splits:
      f = functools.partial(self.quantize, split)
      want = _quantized(x, *extras)
      some = self.x.reshape(2, -1, 64)
      got = jax.jit(jax.vmap(f, (0, None, None)))(some, *extras)
      for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.reshape(b.shape), b)
      scales = np.float32([0.01, 0.02])
      got = jax.jit(jax.vmap(f, (None, 0, None)))(x, scales, extras[1])
      np.testing.assert_array_equal(got[0][0], want[0])
    inside = jax.shard_map(
      functools.partial(self.quantize, True),
      mesh=self.mesh,
      in_specs=(P('d'), P(), P()),
      out_specs=P('d'),
    )
    for a, b in zip(jax.jit(inside)(x, *extras), want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_kernels_of_quantize_go_this_way(self):
    x = self.arguments('d')[0]
    f = functools.partial(lowbit_jax.quantize, fmt=formats.nvfp4)
    want = jax.jit(functools.partial(f, implementation='xla'))(x)

    def kernel(x, task, *, config=None, **options):
      self.shapes.append(x.shape)
      return quantize.run(x, task, **options)

    with mock.patch.object(mosaic_gpu, 'run', kernel):
      got = jax.jit(functools.partial(f, implementation='mosaic_gpu'))(x)
    self.assertEqual(self.shapes[-1], (4, 64))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)


if __name__ == '__main__':
  absltest.main()
