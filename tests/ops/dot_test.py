"""dot, dot_general and einsum on Array | QArray, and their derivatives.

The oracle and its bound are in `products`.
"""

import functools
import itertools
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, ops, qarray
from lowbit_jax.ops import _dot_xla
from tests.ops import coarse
from tests.ops.products import (
  U,
  assert_product,
  codes_of,
  data,
  dense,
  make,
  one_device,
  stacked,
)  # fmt: skip

K, N = 300, 5  # ragged in every block, several tiles for few rows

BLOCK_FORMATS, MORE_FORMATS = coarse.split()
# Products see the leaves and the elements of these in others too.
SIMILAR = (
  'mxint8_32x32', 'nvint4', 'nvlloyd3', 'fp8_1x128', 'e5m2_channel',
  'ternary_channel',
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=('fmt', 'axis'))
def _quantize(x, fmt, axis):
  return lowbit_jax.quantize(x, fmt, axis=axis)


product = jax.jit(lowbit_jax.dot)
einsum = jax.jit(lowbit_jax.einsum, static_argnums=0)


class DotTest(parameterized.TestCase):
  @parameterized.parameters(*(n for n in BLOCK_FORMATS if n not in SIMILAR))
  def test_formats(self, name):
    self.check_format(name)

  @parameterized.parameters(*SIMILAR, *MORE_FORMATS)
  @pytest.mark.slow
  def test_every_format(self, name):
    self.check_format(name)

  def check_format(self, name):
    x = data(2, K)
    q = make(name, K, N)
    qarray.validate(q)
    out = product(x, q)
    assert_product(out, 'mk,kn->mn', x, q)
    self.assertEqual(out.dtype, jnp.float32)

  @parameterized.parameters('uint4_g32', 'mxfp4_32x32')
  def test_many_rows_and_either_side(self, name):
    self.check_either_side(name)

  @parameterized.parameters(
    'mxfp4', 'nvfp4', 'int8_channel', 'mxfp6_e2m3', 'nf4_g64', 'int3_g32',
    'e4m3fn_tensor',
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_rows_and_either_side(self, name):
    self.check_either_side(name)

  def check_either_side(self, name):
    many, w = data(6, K, seed=2), data(K, N, seed=3)
    right, left = make(name, K, N), make(name, 3, K, axis=-1)
    for a, b in (many, right), (left, w), (left, right):
      assert_product(product(a, b), 'mk,kn->mn', a, b)

  @parameterized.parameters('mxfp4', 'uint4_g32')
  def test_several_tiles_for_many_rows(self, name):
    self.check_tiles(name)

  @parameterized.parameters('int4_g32', 'int8_channel')
  @pytest.mark.slow
  def test_several_tiles_of_more_formats(self, name):
    self.check_tiles(name)

  def check_tiles(self, name):
    x, q = data(6, 2100), make(name, 2100, 3)
    assert_product(product(x, q), 'mk,kn->mn', x, q)

  def test_transposed_weights(self):
    self.check_transposed('uint4_g32')

  @parameterized.parameters('mxfp4_32x32', 'nvfp4', 'int3_g32')
  @pytest.mark.slow
  def test_more_transposed_weights(self, name):
    self.check_transposed(name)

  def check_transposed(self, name):
    stored = make(name, N, K, axis=-1)
    few, many = data(2, K), data(6, K, seed=2)

    @jax.jit
    def products(stored):
      d, e = lowbit_jax.dot, lowbit_jax.einsum
      return d(few, stored.T), d(many, stored.mT), e('mk,nk->mn', few, stored)

    a, b, c = products(stored)
    assert_product(a, 'mk,nk->mn', few, stored)
    assert_product(b, 'mk,nk->mn', many, stored)
    assert_product(c, 'mk,nk->mn', few, stored)

  def test_ranks(self):
    self.check_ranks('nvfp4')

  @pytest.mark.slow
  def test_ranks_of_integers(self):
    self.check_ranks('int8_channel')

  def check_ranks(self, name):
    q, left = make(name, K, N), make(name, 3, K, axis=-1)
    stack = make(name, 2, K, N)
    v, x = data(K), data(2, 3, K)
    row = make(name, K, axis=-1)

    @jax.jit
    def products(q, left, stack, row):
      d = lowbit_jax.dot
      return (
        d(v, q),
        d(x, q),
        d(left, v),
        d(row, v),
        d(row, row),
        d(row, q),
        d(x, stack),
        d(v, stack),
      )

    got = products(q, left, stack, row)
    want = (
      ('k,kn->n', v, q),
      ('bmk,kn->bmn', x, q),
      ('mk,k->m', left, v),
      ('k,k->', row, v),
      ('k,k->', row, row),
      ('k,kn->n', row, q),
      ('amk,bkn->ambn', x, stack),
      ('k,bkn->bn', v, stack),
    )
    for out, (spec, a, b) in zip(got, want, strict=True):
      assert_product(out, spec, a, b)

  def test_blocks_on_another_axis_are_dequantized(self):
    self.check_another_axis('uint4_g32')

  @pytest.mark.slow
  def test_more_blocks_on_another_axis_are_dequantized(self):
    self.check_another_axis('nvfp4')

  def check_another_axis(self, name):
    x, q = data(2, 64), make(name, 64, 40, axis=-1)
    assert_product(product(x, q), 'mk,kn->mn', x, q)

  def test_shard_map_over_rows_and_columns(self):
    self.check_shard_map('mxfp4', 6)

  @parameterized.parameters(
    ('mxfp4', 1), ('int8_channel', 1), ('int8_channel', 6)
  )
  @pytest.mark.slow
  def test_more_shards(self, name, m):
    self.check_shard_map(name, m)

  def check_shard_map(self, name, m):
    x, q = data(4 * m, 512), make(name, 512, 16)
    mesh = jax.make_mesh(
      (4, 2), ('rows', 'columns'), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    specs = jax.tree.map(lambda leaf: P(None, 'columns'), q)
    f = jax.shard_map(
      functools.partial(lowbit_jax.dot, implementation='xla'),
      mesh=mesh,
      in_specs=(P('rows'), specs),
      out_specs=P('rows', 'columns'),
    )
    got = np.asarray(jax.jit(f)(x, q))
    for i in range(4):
      for half in (slice(0, 8), slice(8, 16)):
        rows = slice(i * m, (i + 1) * m)
        want = product(x[rows], q[:, half])
        np.testing.assert_array_equal(got[rows, half], want)

  def test_stacks_under_vmap_and_scan(self):
    self.check_stacks('nvfp4')

  @parameterized.parameters('mxfp4', 'int4_g32')
  @pytest.mark.slow
  def test_more_stacks_under_vmap_and_scan(self, name):
    self.check_stacks(name)

  def check_stacks(self, name):
    x = data(3, 2, 64, seed=2)
    layers = [make(name, 64, 4, seed=i) for i in range(3)]
    if layers[0].tensor_scale is not None:
      scale = 2 * layers[1].tensor_scale
      layers[1] = replaced(layers[1], tensor_scale=scale)
    stack, values = stacked(*layers), np.stack([dense(q) for q in layers])
    got = jax.jit(jax.vmap(lowbit_jax.dot))(x, stack)
    assert_product(got, 'bmk,bkn->bmn', x, values)
    one = jax.jit(jax.vmap(lowbit_jax.dot, in_axes=(None, 0)))(x[0], stack)
    assert_product(one, 'mk,bkn->bmn', x[0], values)

    def body(i, layer):
      return i + 1, lowbit_jax.dot(x[0], layer)

    _, scanned = jax.jit(lambda s: jax.lax.scan(body, 0, s))(stack)
    assert_product(scanned, 'mk,bkn->bmn', x[0], values)

  def test_batch_dimensions(self):
    self.check_batch_dimensions('nvfp4')

  @pytest.mark.slow
  def test_batch_dimensions_of_integers(self):
    self.check_batch_dimensions('int8_channel')

  def check_batch_dimensions(self, name):
    a, b = make(name, 2, 3, 64, axis=-1), make(name, 2, 64, 4)
    x, w = data(2, 3, 64), data(2, 64, 4, seed=4)
    dims = ((2,), (1,)), ((0,), (0,))
    f = jax.jit(lambda a, b: lowbit_jax.dot_general(a, b, dims))
    for lhs, rhs in ((x, b), (a, w), (a, b)):
      assert_product(f(lhs, rhs), 'bmk,bkn->bmn', lhs, rhs)

  def test_poison_stays_in_its_columns(self):
    self.check_poison('nvfp4')

  @parameterized.parameters('uint4_g32', 'mxfp4', 'int8_tensor')
  @pytest.mark.slow
  def test_poison_in_more_formats_stays_in_its_columns(self, name):
    self.check_poison(name)

  def check_poison(self, name):
    fmt, q = formats.get(name), make(name, 64, 4)
    if fmt.scale is None:
      q = replaced(q, tensor_scale=jnp.full((1, 1), np.nan))
    else:
      scale = np.array(q.scale)
      nan = np.nan if scale.dtype == np.float32 else fmt.scale.nan_code
      scale[-1, 2] = nan
      q = replaced(q, scale=jnp.asarray(scale))
    for m in (1, 6):
      out = np.asarray(product(data(m, 64), q))
      bad = np.isnan(out).any(0)
      want = [True] * 4 if fmt.scale is None else [False, False, True, False]
      np.testing.assert_array_equal(bad, want)

  def test_arrays_alone_are_a_plain_product(self):
    x, w = data(2, 32), data(32, 4)
    want = np.asarray(jnp.dot(x, w))
    np.testing.assert_array_equal(lowbit_jax.dot(x, w), want)
    np.testing.assert_array_equal(lowbit_jax.einsum('mk,kn->nm', x, w), want.T)

  def test_empty_operands(self):
    self.check_empty('mxfp4')

  @pytest.mark.slow
  def test_empty_operands_of_integers(self):
    self.check_empty('int8_channel')

  def check_empty(self, name):
    q = make(name, 64, 4)
    out = product(np.zeros((0, 64), np.float32), q)
    self.assertEqual(out.shape, (0, 4))
    none = make(name, 64, 0)
    self.assertEqual(product(data(2, 64), none).shape, (2, 0))

  def test_matmul_operator(self):
    q, left = make('nvfp4', 64, 4), make('nvfp4', 3, 64, axis=-1)
    x, w = jnp.asarray(data(2, 64)), jnp.asarray(data(64, 4, seed=3))
    both = np.asarray(left, np.float64) @ np.asarray(q, np.float64)
    np.testing.assert_allclose(left @ q, both, 1e-5, 1e-4)
    stack, turned = make('mxfp4', 2, 64, 4), make('mxfp4', 2, 4, 64, axis=-1)
    y, z = jnp.asarray(data(2, 3, 64)), jnp.asarray(data(2, 64, 3))
    a, b = np.asarray(x), np.asarray(w)

    @jax.jit
    def products(x, w, y, z, q, left, stack, turned):
      return x @ q, left @ w, y @ stack, turned @ z

    got = products(x, w, y, z, q, left, stack, turned)
    for out, lhs, rhs in (
      (a @ q, x, q), (left @ b, left, w), (got[0], x, q), (got[1], left, w)
    ):  # fmt: skip
      assert_product(out, 'mk,kn->mn', lhs, rhs)
    assert_product(got[2], 'bmk,bkn->bmn', y, stack)
    assert_product(got[3], 'bmk,bkn->bmn', turned, z)


class TileTest(parameterized.TestCase):
  def test_every_number_of_rows_has_the_same_range(self):
    """Scales meet the elements first: 448 times x alone would be infinite."""
    q = make('mxfp8_e4m3', 64, 4)
    for m in (1, 2, 6):
      x = 1e37 * data(m, 64)
      assert_product(product(x, q), 'mk,kn->mn', x, q)

  def test_rows_in_groups_of_a_fixed_size_keep_their_bits(self):
    q, x = make('nvfp4', K, N), data(16, K)

    @jax.jit
    def grouped(x):
      rows = jnp.pad(x, ((0, -len(x) % 4), (0, 0))).reshape(-1, 4, K)
      return jax.lax.map(lambda r: lowbit_jax.dot(r, q), rows).reshape(-1, N)

    want = np.asarray(grouped(x))
    for m in (1, 7):
      np.testing.assert_array_equal(grouped(x[:m])[:m], want[:m])

  @parameterized.parameters('uint4_g32', 'int8_channel')
  def test_tiles_of_columns(self, name):
    """The last of them begins within the one before."""
    x, q = data(2, K), make(name, K, 150)
    stack = stacked(q, make(name, K, 150, seed=2))
    y = np.stack([x, data(2, K, seed=3)])

    def both(x, q, y, stack):
      return lowbit_jax.dot(x, q), jax.vmap(lowbit_jax.dot)(y, stack)

    with one_device(), mock.patch.object(_dot_xla, 'TILE_SIZE', 1 << 12):
      with mock.patch.object(_dot_xla, 'COLUMN_TILE_SIZE', 1):
        got, several = jax.jit(both)(x, q, y, stack)
    assert_product(got, 'mk,kn->mn', x, q)
    assert_product(several, 'bmk,bkn->bmn', y, stack)

  @parameterized.parameters('einsum', 'vmap', 'dot')
  def test_one_tile_is_decoded_at_a_time(self, kind):
    fmt = formats.mxfp4
    quantize = functools.partial(lowbit_jax.quantize, fmt=fmt, axis=-2)
    shape = {'dot': (512, 16384)}.get(kind, (16, 512, 1024))
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(jax.vmap(quantize) if len(shape) > 2 else quantize, w)
    x = jax.ShapeDtypeStruct((*shape[:-2], 5, 512), jnp.float32)
    f = {
      'einsum': functools.partial(lowbit_jax.einsum, 'ebk,ekn->ebn'),
      'vmap': jax.vmap(lowbit_jax.dot),
      'dot': lowbit_jax.dot,
    }[kind]
    with one_device():
      memory = jax.jit(f).lower(x, q).compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 2**23)  # the weight: 2^25


class RowsTest(parameterized.TestCase):
  """Weights that are stored as (n, k), as those of most files are."""

  def rows(self, name, n=300, seed=0):
    return _quantize(data(n, K, seed=seed), formats.get(name), -1)

  @parameterized.parameters(
    *('int8_channel', 'nf4_g64', 'mxfp6_e2m3', 'int3_g32', 'nvfp4'),
    *('uint4_g32', 'uint4_g32_min_float16', 'q4_k'),
  )
  def test_the_last_tile_begins_within_the_one_before(self, name):
    x, q = data(3, K), self.rows(name)
    with one_device():
      got = lowbit_jax.einsum('mk,nk->mn', x, q)
    assert_product(got, 'mk,nk->mn', x, q)

  def test_integers_are_summed_exactly(self):
    """Float32 holds the sum of 1024 products of two bytes, not of 16384."""
    codes = np.random.default_rng(0).integers(100, 128, (20, 16384))
    codes[:, 0] = 127
    q = lowbit_jax.quantize(codes.astype(np.float32), formats.int8_channel)
    with one_device():
      got = lowbit_jax.einsum('mk,nk->mn', q[:2], q)
    want = (codes[:2] @ codes.T).astype(np.float32)
    np.testing.assert_array_equal(got, want)

  def test_batches_and_vmap(self):
    x = np.stack([data(2, K), data(2, K, seed=3)])
    q = stacked(self.rows('int4_g32'), self.rows('int4_g32', seed=2))
    product = functools.partial(lowbit_jax.einsum, 'mk,nk->mn')
    with one_device():
      got = lowbit_jax.einsum('bmk,bnk->bmn', x, q)
      several = jax.vmap(product)(x, q)
      shared = jax.vmap(product, (0, None))(x, self.rows('int4_g32'))
    assert_product(got, 'bmk,bnk->bmn', x, q)
    assert_product(several, 'bmk,bnk->bmn', x, q)
    assert_product(shared, 'bmk,nk->bmn', x, self.rows('int4_g32'))

  def test_the_weight_is_not_transposed(self):
    x, q = jnp.ones((1, K)), self.rows('mxfp4')
    with one_device():
      product = functools.partial(lowbit_jax.einsum, 'mk,nk->mn')
      text = jax.jit(product).lower(x, q).as_text()
    n, size = q.codes.shape
    self.assertFalse(f'tensor<{size}x{n}xui8>' in text)


class SymbolicTest(absltest.TestCase):
  def test_one_program_serves_every_number_of_rows(self):
    int8, q, w = formats.int8_channel, make('mxfp4', 64, 4), data(64, 4)
    codes = _quantize(w, int8, 0)

    def f(x):
      rows = lowbit_jax.quantize(x, int8)
      key = jax.random.key(0)
      noisy = lowbit_jax.quantize(
        x, formats.mxfp4, rounding='stochastic', key=key
      )
      d = lowbit_jax.dot
      return d(x, q), d(rows, codes), d(noisy, w)

    batch = jax.export.symbolic_shape('b,64')
    x = jax.ShapeDtypeStruct(batch, jnp.float32)
    exported = jax.export.export(jax.jit(f))(x)
    x = data(1, 64)
    for got, want in zip(exported.call(x), jax.jit(f)(x), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class ExactTest(parameterized.TestCase):
  """Sums of integers below 2^24 have no rounding error in any order."""

  @parameterized.parameters('uint4_g32', 'mxfp4_32x32')
  def test_integer_data(self, name):
    fmt, random = formats.get(name), np.random.RandomState(0)

    def scaled(q):
      """With scales of 1 or 2: values are multiples of 1/2."""
      scale = random.randint(1, 3, q.scale.shape).astype(np.float32)
      if fmt.has_exponent_scale:
        scale = (scale + 126).astype(np.uint8)
      return replaced(q, scale=scale)

    q, left = scaled(make(name, K, N)), scaled(make(name, 3, K, axis=-1))
    x = random.randint(-8, 9, (6, K)).astype(np.float32)
    for a, b in ((x[:2], q), (x, q), (left, q)):
      size = np.abs(dense(a)) @ np.abs(dense(b))
      self.assertLess(size.max(), 2**22)  # in units of 1/4
      np.testing.assert_array_equal(product(a, b), dense(a) @ dense(b))

  @parameterized.parameters(
    'mxint8', 'mxfp4_32x32', 'mxfp4', 'mxfp6_e2m3', 'mxfp8_e4m3', 'bfp5_g16'
  )
  @pytest.mark.slow
  def test_quantized_integer_data(self, name):
    self.check_integer_data(name)

  def check_integer_data(self, name):
    fmt = formats.get(name)
    random = np.random.RandomState(0)
    w = random.choice([-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6], (K, N))
    w[::16] = 6  # every block has the same scale
    x = random.randint(-8, 9, (6, K))
    axis = (-2, -1) if fmt.is_tile else -2
    q = _quantize(w.astype(np.float32), fmt, axis)
    np.testing.assert_array_equal(dense(q), w)
    for m in (1, 6):
      got = product(x[:m].astype(np.float32), q)
      np.testing.assert_array_equal(got, x[:m] @ w)
    left = _quantize(
      w.T.astype(np.float32), fmt, (-2, -1) if fmt.is_tile else -1
    )
    np.testing.assert_array_equal(product(left, q), w.T @ w)

  def test_integer_products_are_exact_in_int32(self):
    self.check_integer_products('int5_channel', 'int8_tensor')

  @parameterized.parameters(
    ('int8_channel', 'int4_channel'),
    ('int8_channel', 'int8_channel'),
    ('int8_tensor', 'int3_channel'),
    ('int8_tensor', 'int4_tensor'),
    ('int8_channel', 'ternary_tensor'),
  )
  @pytest.mark.slow
  def test_more_integer_products(self, left, right):
    self.check_integer_products(left, right)

  def check_integer_products(self, left, right):
    a, b = make(left, 3, K, axis=-1), make(right, K, N)
    got = product(a, b)
    i, j = (q.fmt.element.values()[codes_of(q)].astype(int) for q in (a, b))
    total = i[:, :K] @ j[:K]
    want = total.astype(np.float32)
    for q in (a, b):
      want = want * np.asarray(q.tensor_scale if q.scale is None else q.scale)
    np.testing.assert_array_equal(got, want)
    self.assertIn('int32', self.note('dot', a, b))

  def note(self, op, *args) -> str:
    return lowbit_jax.select_implementation(op, *args).note

  def test_sums_beyond_24_bits_round_once(self):
    k = 4001
    b = np.full((k, 1), 127, np.uint8)
    b[0] = 126
    one = np.ones((1, 1), np.float32)
    qa = replaced(
      make('int8_channel', 1, k, axis=-1),
      codes=np.full((1, k), 127, np.uint8),
      scale=one,
    )
    qb = replaced(make('int8_channel', k, 1), codes=b, scale=one)
    got = product(qa, qb)
    self.assertEqual(
      float(got[0, 0]), float(np.float32(127 * 126 + 127 * 127 * (k - 1)))
    )

  def test_batched_and_shared_integer_products(self):
    a, b = (
      make('int8_channel', 2, 3, 64, axis=-1),
      make('int4_channel', 2, 64, 4),
    )
    f = jax.jit(lambda a, b: lowbit_jax.einsum('bmk,bkn->bmn', a, b))
    self.assertIn('int32', self.note('einsum', 'bmk,bkn->bmn', a, b))
    assert_product(f(a, b), 'bmk,bkn->bmn', a, b)
    c = make('int8_channel', 64, 4)
    f = jax.jit(lambda a, b: lowbit_jax.einsum('bmk,kn->nbm', a, b))
    assert_product(f(a, c), 'bmk,kn->nbm', a, c)

  def test_two_contracted_axes(self):
    """The scale of one axis varies along the other."""
    self.check_two_axes('int8_channel', 'mxfp4')

  @pytest.mark.slow
  def test_two_contracted_axes_of_tensors(self):
    self.check_two_axes('int8_tensor')

  def check_two_axes(self, *names):
    for name in names:
      a, b = make(name, 3, 4, 32, axis=-1), make(name, 4, 32, 5)
      got = jax.jit(lambda a, b: lowbit_jax.einsum('xab,abn->xn', a, b))(a, b)
      assert_product(got, 'xab,abn->xn', a, b)

  def test_two_integer_arrays_without_contraction(self):
    a, b = make('int8_tensor', 3, 32), make('int8_tensor', 2, 32, seed=5)
    got = jax.jit(lambda a, b: lowbit_jax.einsum('ab,cd->abcd', a, b))(a, b)
    assert_product(got, 'ab,cd->abcd', a, b)


class DtypeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ('int8_channel', jnp.bfloat16, jnp.bfloat16, None),
  )
  def test_narrow_operands_accumulate_in_float32(self, *case):
    self.check_narrow(*case)

  @parameterized.parameters(
    ('mxfp4', jnp.float16, jnp.float16, None),
    ('mxfp4', jnp.bfloat16, jnp.bfloat16, None),
    ('mxfp4', jnp.bfloat16, jnp.float32, jnp.float32),
    ('mxfp4_32x32', jnp.bfloat16, jnp.bfloat16, None),
    ('mxfp4_32x32', jnp.float16, jnp.bfloat16, jnp.float32),
    ('int8_channel', jnp.bfloat16, jnp.float32, jnp.float32),
  )
  @pytest.mark.slow
  def test_more_narrow_operands(self, *case):
    self.check_narrow(*case)

  def check_narrow(self, name, x_dtype, w_dtype, preferred):
    x = data(6, 64).astype(x_dtype)
    q = make(name, 64, 4).astype(w_dtype)
    left = make(name, 3, 64, axis=-1).astype(w_dtype)

    @jax.jit
    def products(x, q, left):
      d = functools.partial(lowbit_jax.dot, preferred_element_type=preferred)
      return d(x[:2], q), d(x, q), d(left, x.T), d(left, q)

    want = preferred or x_dtype
    # Rounded once, at the end, to a result of p bits: half an ulp.
    extra = float(jnp.finfo(want).eps) / 2 if want != jnp.float32 else 0.0
    pairs = (x[:2], q), (x, q), (left, x.T), (left, q)
    for out, (a, b) in zip(products(x, q, left), pairs, strict=True):
      self.assertEqual(out.dtype, want)
      reference = dense(a) @ dense(b)
      size = np.abs(dense(a)) @ np.abs(dense(b))
      bound = 72 * U * size + 1.001 * extra * np.abs(reference)
      error = np.abs(np.asarray(out, np.float64) - reference)
      self.assertTrue((error <= bound).all())

  def test_the_default_is_the_promoted_dtype(self):
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32)
    for a, b in itertools.product(dtypes, repeat=2):
      x = jax.ShapeDtypeStruct((2, 64), a)
      q = make('mxfp4', 64, 4).astype(b)
      with jax.numpy_dtype_promotion('standard'):
        want = jnp.promote_types(a, b)
      for promotion in ('standard', 'strict'):
        with jax.numpy_dtype_promotion(promotion):
          out = jax.eval_shape(lowbit_jax.dot, x, q)
        self.assertEqual(out.dtype, want)

  def test_preferred_element_type(self):
    q = make('mxfp4', 64, 4).astype(jnp.bfloat16)
    x = jnp.asarray(data(2, 64), jnp.bfloat16)
    w = jnp.asarray(data(64, 4), jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      kwargs = dict(preferred_element_type=dtype)
      for out in jax.eval_shape(
        lambda: (
          lowbit_jax.dot(x, q, **kwargs),  # noqa: B023
          lowbit_jax.einsum('mk,kn->nm', x, q, **kwargs),  # noqa: B023
          lowbit_jax.dot_general(x, q, (((1,), (0,)), ((), ())), **kwargs),  # noqa: B023
          lowbit_jax.dot(x, w, **kwargs),  # noqa: B023
        )
      ):
        self.assertEqual(out.dtype, dtype)

  def test_precision_is_passed_on(self):
    q, dims = make('mxfp4', 64, 4), (((1,), (0,)), ((), ()))
    for m in (2, 6):
      x = data(m, 64)
      out = jax.jit(
        lambda x, q: lowbit_jax.dot_general(
          x, q, dims, precision=jax.lax.Precision.HIGHEST
        )
      )(x, q)
      assert_product(out, 'mk,kn->mn', x, q)


class EinsumTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mk,nk->mn', (2, 64), (4, 64), -1),
    ('bqhd,bkhd->bhqk', (2, 3, 4, 32), (2, 5, 4, 32), -1),
    ('mk,k->m', (3, 64), (64,), -1),
    ('ab,cd->acbd', (2, 3), (4, 32), -1),
    ('mk,mk->m', (2, 64), (2, 64), -1),
  )
  def test_equals_float64(self, *case):
    self.check_float64(*case)

  @parameterized.parameters(
    ('mk,kn->mn', (2, 64), (64, 4), -2),
    ('mk,kn->nm', (2, 64), (64, 4), -2),
    ('bmk,kn->bmn', (2, 3, 64), (64, 4), -2),
    ('bmk,bkn->bmn', (2, 3, 64), (2, 64, 4), -2),
    ('bmk,bkn->nbm', (2, 3, 64), (2, 64, 4), -2),
    ('btd,dhf->bthf', (2, 3, 64), (64, 2, 4), -3),
    ('bthf,hfd->btd', (2, 3, 2, 32), (2, 32, 4), -2),
    ('k,kn->n', (64,), (64, 4), -2),
  )
  @pytest.mark.slow
  def test_more_subscripts_equal_float64(self, *case):
    self.check_float64(*case)

  def check_float64(self, spec, a_shape, b_shape, axis):
    x, q = data(*a_shape), make('mxfp4', *b_shape, axis=axis)
    left, right = spec.split('->')[0].split(',')
    turned = f'{right},{left}->{spec.split("->")[1]}'

    @jax.jit
    def both(x, q):
      e = lowbit_jax.einsum
      return e(spec, x, q), e(turned, q, x)

    got, other = both(x, q)
    assert_product(got, spec, x, q)
    assert_product(other, turned, q, x)

  @parameterized.parameters(
    ('...k,kn->...n', (64,), (64, 4)),
    ('...mk,...kn->...mn', (2, 3, 64), (2, 64, 4)),
    ('m...k,kn->n...m', (2, 5, 3, 64), (64, 4)),
    (' ...k , kn -> ...n ', (2, 64), (64, 4)),
  )
  def test_ellipsis(self, *case):
    self.check_ellipsis(*case)

  @pytest.mark.slow
  def test_ellipsis_of_two_axes(self):
    self.check_ellipsis('...k,kn->...n', (2, 3, 64), (64, 4))

  def check_ellipsis(self, spec, a_shape, b_shape):
    x, q = data(*a_shape), make('mxfp4', *b_shape)
    got = einsum(spec, x, q)
    want = np.einsum(spec.replace(' ', ''), dense(x), dense(q))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  @parameterized.parameters(
    ('mk,kn', 'form'),
    ('mk,kn,np->mp', 'form'),
    ('mk->m', 'form'),
    ('mmk,kn->mn', 'name each of the 2 axes of lhs once'),
    ('kk,kn->n', 'axes of lhs once'),
    ('mk,k->m', 'name each of the 2 axes of rhs once'),
    ('mk,kn->m', 'keep every letter'),
    ('mk,kn->mnz', 'keep every letter'),
    ('mk,kn->mnn', 'repeat none'),
  )
  def test_refusals(self, spec, message):
    q = make('mxfp4', 64, 4)
    for a, b in ((data(2, 64), q), (data(2, 64), data(64, 4))):
      with self.assertRaisesRegex(ValueError, message):
        lowbit_jax.einsum(spec, a, b)

  def test_sizes_must_match(self):
    q = make('mxfp4', 64, 4)
    with self.assertRaisesRegex(ValueError, r'\(2, 32\).*\(64, 4\)'):
      lowbit_jax.einsum('mk,kn->mn', data(2, 32), q)
    with self.assertRaisesRegex(ValueError, 'batch'):
      lowbit_jax.einsum('bmk,bkn->bmn', data(3, 2, 64), make('mxfp4', 2, 64, 4))

  def test_the_subscripts_are_a_string(self):
    with self.assertRaisesRegex((TypeError, ValueError), 'subscripts'):
      lowbit_jax.einsum(data(2, 64), make('mxfp4', 64, 4), data(4, 2))


class SelectTest(parameterized.TestCase):
  def choice(self, *args, op='dot', **kwargs):
    return lowbit_jax.select_implementation(op, *args, **kwargs)

  @parameterized.parameters(((1 << 17) - 1, 'int32'), (1 << 17, 'tiles'))
  def test_integer_sums_that_could_overflow_are_not_int32(self, k, how):
    """2^17 products of up to 2^14 reach 2^31."""
    quantize = functools.partial(lowbit_jax.quantize, fmt=formats.int8_channel)
    x = jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, k), jnp.float32))
    w = jax.ShapeDtypeStruct((k, 3), jnp.float32)
    w = jax.eval_shape(functools.partial(quantize, axis=-2), w)
    self.assertIn(how, self.choice(x, w, implementation='xla').note)

  def test_notes_say_how(self):
    q = make('mxfp4', 64, 4)
    cases = (
      ((data(1, 64), q), 'scan over tiles'),
      (
        (make('int8_channel', 3, 64, axis=-1), make('int8_channel', 64, 4)),
        'int32 product',
      ),
      ((q.T, data(64, 4)), 'exchanges the operands: scan over tiles'),
      ((q.T, data(64, 5)), 'dequantizes.*only the left operand'),
      (
        (data(2, 64), make('mxfp4', 64, 40, axis=-1)),
        'dequantizes.*axis -1, which is not contracted',
      ),
      ((data(2, 64), make('mxfp4_32x32', 64, 40)), 'dequantizes.*tiles'),
      ((data(2, 64), data(64, 4)), 'no operand is quantized'),
    )
    for args, note in cases:
      choice = self.choice(*args, implementation='xla')
      self.assertEqual(choice.implementation, 'xla')
      self.assertRegex(choice.note, note)
      self.assertEqual(choice.refusals, {})
    stack, dims = make('mxfp4', 2, 64, 4), (((2,), (1,)), ((0,), (0,)))
    choice = self.choice(data(2, 3, 64), stack, dims, op='dot_general')
    self.assertIn('scan over tiles', choice.note)
    with self.assertRaisesRegex(NotImplementedError, 'batch dimensions'):
      lowbit_jax.dot_general(data(2, 3, 64), stack, dims, implementation='tpu')

  @parameterized.parameters(
    ('bd,dhf->bhf', (2, 64), 'mxfp4', (64, 2, 4), -3, 'tiles of the weight'),
    ('bhf,hfd->bd', (2, 2, 32), 'mxfp4', (2, 32, 4), -2, 'tiles of the weight'),
    ('bfh,hfd->bd', (2, 32, 2), 'nvfp4', (2, 32, 4), -2, 'tiles of the weight'),
    ('bd,vd->bv', (2, 64), 'int4_g32', (5, 64), -1, 'tiles of the weight'),
    ('bhf,hfd->bd', (2, 2, 33), 'mxfp4', (2, 33, 4), -2, 'padded'),
    ('bhf,hfd->bd', (2, 2, 32), 'int8_channel', (2, 32, 4), -2, 'vary'),
  )
  def test_weights_of_several_axes(self, spec, x_shape, name, shape, axis, how):
    x, q = data(*x_shape), make(name, *shape, axis=axis)
    self.assertIn(how, self.choice(spec, x, q, op='einsum').note)
    assert_product(einsum(spec, x, q), spec, x, q)

  def test_a_stack_of_tensors_keeps_its_tensor_scales(self):
    one, other = (make('nvfp4', 32, 4, seed=i) for i in (1, 2))
    other = replaced(other, tensor_scale=64 * one.tensor_scale)
    stack, x = stacked(one, other), data(3, 2, 32)
    choice = self.choice('bhf,hfd->bd', x, stack, op='einsum')
    self.assertIn('stack of tensors', choice.note)
    got = einsum('bhf,hfd->bd', x, stack)
    assert_product(got, 'bhf,hfd->bd', x, stack)

  def test_shapes_are_enough(self):
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    q = jax.eval_shape(lambda q: q, make('mxfp4', 64, 4))
    self.assertIn('scan over tiles', self.choice(x, q).note)
    dims = (((1,), (0,)), ((), ()))
    for op, args in (
      ('dot_general', (x, q, dims)),
      ('einsum', ('mk,kn->mn', x, q)),
    ):
      self.assertIn('scan over tiles', self.choice(*args, op=op).note)

  def test_names_and_lists(self):
    x, q = data(2, 64), make('mxfp4', 64, 4)
    want = np.asarray(lowbit_jax.dot(x, q, implementation='xla'))
    for names in (
      None,
      ['xla'],
      ('xla', 'tpu'),
      ['tpu', 'xla'],
      ['mosaic_gpu', 'tpu', 'xla'],
    ):
      got = lowbit_jax.dot(x, q, implementation=names)
      np.testing.assert_array_equal(got, want)
    choice = self.choice(x, q, implementation=['tpu', 'mosaic_gpu', 'xla'])
    self.assertEqual(choice.implementation, 'xla')
    self.assertEqual(list(choice.refusals), ['tpu', 'mosaic_gpu'])
    self.assertTrue(all(choice.refusals.values()))

  def test_an_unavailable_one_refuses_loudly(self):
    x, q = data(2, 64), make('mxfp4', 64, 4)
    for names in (['tpu'], ['mosaic_gpu'], ['tpu', 'mosaic_gpu']):
      first = f'{names[0]}: the program is for cpu'
      for f in (
        lambda n=names: lowbit_jax.dot(x, q, implementation=n),
        lambda n=names: lowbit_jax.einsum('mk,kn->mn', x, q, implementation=n),
        lambda n=names: self.choice(x, q, implementation=n),
        lambda n=names: jax.jit(
          lambda x: lowbit_jax.dot(x, q, implementation=n)
        )(x),
      ):
        with self.assertRaisesRegex(NotImplementedError, first):
          f()

  def test_kernels_refuse_dense_weights(self):
    for name in ('tpu', 'mosaic_gpu'):
      with self.assertRaisesRegex(NotImplementedError, name):
        lowbit_jax.dot(data(2, 64), data(64, 4), implementation=name)

  def test_unknown_names(self):
    x, q = data(2, 64), make('mxfp4', 64, 4)
    for names in ('cuda', ['xla', 'cuda']):
      with self.assertRaisesRegex(ValueError, "'cuda'.*xla.*tpu.*mosaic_gpu"):
        lowbit_jax.dot(x, q, implementation=names)
    for names in ([], 3, ()):
      with self.assertRaisesRegex(TypeError, 'implementation'):
        lowbit_jax.dot(x, q, implementation=names)

  def test_implementations(self):
    for op in ('dot', 'dot_general', 'einsum'):
      self.assertEqual(lowbit_jax.implementations(op)[-1], 'xla')
    for f in (lowbit_jax.implementations, lowbit_jax.select_implementation):
      with self.assertRaisesRegex(ValueError, "op='matmul'.*'dot_general'"):
        f('matmul')


class MismatchTest(parameterized.TestCase):
  @parameterized.parameters((2, 32), (2, 65), (2, 4))
  def test_contraction_sizes(self, *shape):
    q = make('mxfp4', 64, 4)
    message = (
      r'contracting axes \(1,\) of lhs.shape=\({}, {}\) and \(0,\) of'
      r' rhs.shape=\(64, 4\)'
    ).format(*shape)
    for f in (lowbit_jax.dot, jax.jit(lowbit_jax.dot)):
      with self.assertRaisesRegex(ValueError, 'contracting'):
        f(data(*shape), q)
    with self.assertRaisesRegex(ValueError, message):
      lowbit_jax.dot(data(*shape), q)

  def test_scalars_have_nothing_to_contract(self):
    with self.assertRaisesRegex(ValueError, r'rank 1.*\(\)'):
      lowbit_jax.dot(jnp.float32(2), make('mxfp4', 64, 4))

  @parameterized.parameters(
    (((1,), (0, 1)), ((), ())),
    (((2,), (0,)), ((), ())),
    (((-1,), (0,)), ((), ())),
    (((1,), (0,)), ((0,), ())),
    ((1,), (0,)),
    'nonsense',
    (((1,), (0,)),),
  )
  def test_dimension_numbers(self, *dims):
    dims = dims[0] if len(dims) == 1 and dims[0] == 'nonsense' else dims
    message = 'contracting|batch|dimension_numbers'
    with self.assertRaisesRegex(ValueError, message):
      lowbit_jax.dot_general(data(2, 64), make('mxfp4', 64, 4), dims)

  def test_operands_are_floats(self):
    q = make('mxfp4', 64, 4)
    for x in (np.ones((2, 64), np.int32), np.ones((2, 64), bool)):
      with self.assertRaisesRegex(TypeError, f'lhs has dtype {x.dtype}'):
        lowbit_jax.dot(x, q)
    with self.assertRaisesRegex(TypeError, 'rhs has dtype uint8'):
      lowbit_jax.dot(data(2, 32), q.codes)


def replaced(q, **leaves):
  return qarray.replace(q, **leaves)


class DerivativeTest(parameterized.TestCase):
  @parameterized.parameters(('mxfp4', 6), ('mxfp4_32x32', 2))
  def test_gradient_of_activations(self, name, m):
    self.check_gradient(name, m)

  @parameterized.parameters(
    ('nvfp4', 2), ('int8_channel', 6), ('uint4_g32', 2), ('e4m3fn_tensor', 6),
    ('mxfp6_e2m3', 2), ('nf4_g64', 6), ('int3_g32', 6),
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_gradients_of_activations(self, name, m):
    self.check_gradient(name, m)

  def check_gradient(self, name, m):
    x, g = data(m, K), data(m, N, seed=5)
    q = make(name, K, N)

    @jax.jit
    def f(x, q, g):
      y, vjp = jax.vjp(lambda x: lowbit_jax.dot(x, q), x)
      return y, vjp(g)[0]

    y, dx = f(x, q, g)
    assert_product(y, 'mk,kn->mn', x, q)
    assert_product(dx, 'mn,kn->mk', g, q)

  def test_gradient_of_the_left_side(self):
    q, w = make('nvfp4', 3, K, axis=-1), data(K, N)
    g = data(3, N, seed=5)
    dw = jax.jit(lambda w: jax.vjp(lambda w: lowbit_jax.dot(q, w), w)[1](g)[0])(
      w
    )
    assert_product(dw, 'mk,mn->kn', q, g)

  @parameterized.parameters('uint4_g32', 'int8_channel')
  def test_gradient_of_float_scales(self, name):
    self.check_float_scales(name)

  @parameterized.parameters('int4_g32', 'nf4_g64')
  @pytest.mark.slow
  def test_gradient_of_more_float_scales(self, name):
    self.check_float_scales(name)

  def check_float_scales(self, name):
    """d sum(g (x @ w)) / d scale_b = sum of (x^T g) element over block b."""
    q = make(name, K, N)
    g = data(2, N, seed=5)
    for m in (2, 6):
      x, g = data(m, K), data(m, N, seed=5)
      ds = jax.jit(
        jax.grad(
          lambda s, q, x, g: jnp.sum(
            g * lowbit_jax.dot(x, replaced(q, scale=s))
          )
        )
      )(q.scale, q, x, g)
      self.assertEqual((ds.shape, ds.dtype), (q.scale.shape, jnp.float32))
      unit = dense(replaced(q, scale=jnp.ones_like(q.scale)))
      slope = (x.T.astype(np.float64) @ g) * unit
      size = q.fmt.block[0] or K
      pad = -K % size
      slope = np.pad(slope, ((0, pad), (0, 0))).reshape(-1, size, N).sum(1)
      np.testing.assert_allclose(ds, slope, rtol=1e-4, atol=1e-3)

  @parameterized.parameters('nvfp4', 'e4m3fn_tensor')
  def test_gradient_of_the_tensor_scale(self, name):
    q, x = make(name, K, N), data(2, K)
    g = data(2, N, seed=5)
    ds = jax.jit(
      jax.grad(
        lambda s: jnp.sum(g * lowbit_jax.dot(x, replaced(q, tensor_scale=s)))
      )
    )(q.tensor_scale)
    want = np.sum(g * (dense(x) @ dense(q))) / float(q.tensor_scale.item())
    np.testing.assert_allclose(ds, [[want]], rtol=1e-4)

  def test_gradient_of_the_scales_of_both_sides(self):
    a, b = make('int8_channel', 3, K, axis=-1), make('int8_channel', K, N)

    def loss(sa, sb):
      y = lowbit_jax.dot(replaced(a, scale=sa), replaced(b, scale=sb))
      return jnp.sum(y * y)

    da, db = jax.jit(jax.grad(loss, (0, 1)))(a.scale, b.scale)
    y = dense(a) @ dense(b)
    np.testing.assert_allclose(
      da, 2 * (y * y).sum(1, keepdims=True) / dense(a.scale), rtol=1e-4
    )
    np.testing.assert_allclose(
      db, 2 * (y * y).sum(0, keepdims=True) / dense(b.scale), rtol=1e-4
    )

  def test_a_tree_with_a_qarray(self):
    params = {'w': make('int4_g32', K, N), 'b': np.zeros(N, np.float32)}
    x = data(2, K)
    grads = jax.jit(
      jax.grad(
        lambda p: jnp.sum(lowbit_jax.dot(x, p['w']) + p['b']), allow_int=True
      )
    )(params)
    self.assertEqual(grads['w'].codes.dtype, jax.dtypes.float0)
    self.assertGreater(np.abs(grads['w'].scale).max(), 0)
    np.testing.assert_array_equal(grads['b'], 2)
    coded = jax.eval_shape(
      jax.grad(lambda q: jnp.sum(lowbit_jax.dot(x, q)), allow_int=True),
      make('mxfp4', K, N),
    )
    self.assertEqual(
      {leaf.dtype for leaf in jax.tree.leaves(coded)},
      {np.dtype(jax.dtypes.float0)},
    )

  @parameterized.parameters(
    ('mxfp4', jnp.float16), ('int8_channel', jnp.bfloat16)
  )
  def test_gradients_have_the_dtype_of_their_input(self, name, dtype):
    self.check_dtype_of_gradients(name, dtype)

  @parameterized.parameters(
    ('mxfp4', jnp.bfloat16), ('mxfp4_32x32', jnp.float16),
    ('mxfp4_32x32', jnp.bfloat16), ('int8_channel', jnp.float16),
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_dtypes_of_gradients(self, name, dtype):
    self.check_dtype_of_gradients(name, dtype)

  def check_dtype_of_gradients(self, name, dtype):
    q = make(name, 64, 4)
    for m in (2, 6):
      x = data(m, 64).astype(dtype)
      dx = jax.jit(
        jax.grad(
          lambda x: jnp.sum(
            lowbit_jax.dot(x, q, preferred_element_type=jnp.float32)
          )
        )
      )(x)
      self.assertEqual(dx.dtype, dtype)
      want = np.tile(dense(q).sum(1), (m, 1))
      np.testing.assert_allclose(
        np.asarray(dx, np.float64), want, rtol=2.0**-7, atol=2.0**-7
      )

  def test_forward_mode(self):
    self.check_forward_mode('uint4_g32')

  @parameterized.parameters('mxfp4_32x32', 'mxfp4', 'nvfp4')
  @pytest.mark.slow
  def test_more_forward_modes(self, name):
    self.check_forward_mode(name)

  def check_forward_mode(self, name):
    q = make(name, K, N)
    x, t = data(2, K), data(2, K, seed=6)
    y, dy = jax.jit(
      lambda x, t: jax.jvp(lambda x: lowbit_jax.dot(x, q), (x,), (t,))
    )(x, t)
    assert_product(y, 'mk,kn->mn', x, q)
    assert_product(dy, 'mk,kn->mn', t, q)

  def test_forward_mode_of_scales_and_both_operands(self):
    q, x = make('int4_g32', K, N), data(2, K)
    t, ts = data(2, K, seed=6), np.asarray(q.scale) * 0.5
    _, dy = jax.jit(
      lambda x, s, t, ts: jax.jvp(
        lambda x, s: lowbit_jax.dot(x, replaced(q, scale=s)), (x, s), (t, ts)
      )
    )(x, q.scale, t, ts)
    want = dense(t) @ dense(q) + 0.5 * dense(x) @ dense(q)
    np.testing.assert_allclose(dy, want, rtol=1e-4, atol=1e-4)

  @pytest.mark.slow
  def test_linearize(self):
    q, x = make('nvfp4', 64, 4), data(2, 64)
    t = data(2, 64, seed=6)

    @jax.jit
    def f(x, t):
      y, tangent = jax.linearize(lambda x: lowbit_jax.dot(x, q), x)
      return y, tangent(t)

    y, dy = f(x, t)
    assert_product(y, 'mk,kn->mn', x, q)
    assert_product(dy, 'mk,kn->mn', t, q)

  def test_hessian(self):
    self.check_hessian('nvfp4')

  @parameterized.parameters('mxfp4', 'mxfp4_32x32')
  @pytest.mark.slow
  def test_more_hessians(self, name):
    self.check_hessian(name)

  def check_hessian(self, name):
    q, x = make(name, 32, 4), data(32)
    h = jax.jit(
      jax.hessian(lambda x: jnp.sum(jnp.square(lowbit_jax.dot(x, q))))
    )(x)
    w = dense(q)
    np.testing.assert_allclose(h, 2 * w @ w.T, rtol=1e-4, atol=1e-4)

  def test_second_order_in_activation_and_scale(self):
    q, x = make('int8_channel', 32, 4), data(2, 32)

    def loss(x, s):
      return jnp.sum(jnp.square(lowbit_jax.dot(x, replaced(q, scale=s))))

    mixed = jax.jit(jax.jacrev(jax.grad(loss), 1))(x, q.scale)
    self.assertEqual(mixed.shape, (2, 32, 1, 4))
    w, y = dense(q), dense(x) @ dense(q)
    want = 4 * y[:, None] * (w / dense(q.scale))[None]
    np.testing.assert_allclose(mixed[:, :, 0], want, rtol=1e-3, atol=1e-3)

  @pytest.mark.slow
  def test_grad_of_jit_vmap_and_remat(self):
    q, x = make('nvfp4', 64, 4), data(3, 64)

    def loss(x):
      return jnp.sum(jnp.sin(lowbit_jax.dot(x, q)))

    want = np.cos(dense(x) @ dense(q)) @ dense(q).T
    for f in (
      jax.grad(jax.jit(loss)),
      jax.jit(jax.grad(loss)),
      jax.jit(jax.vmap(jax.grad(loss))),
      jax.jit(jax.grad(jax.checkpoint(loss))),
    ):
      np.testing.assert_allclose(f(x), want, rtol=1e-4, atol=1e-3)

  def test_gradients_through_einsum_and_matmul(self):
    q, x = make('mxfp4', 64, 4), jnp.asarray(data(3, 64))
    want = np.tile(dense(q).sum(1), (3, 1))
    functions = (
      lambda x: lowbit_jax.einsum('mk,kn->nm', x, q),
      lambda x: x @ q,
      lambda x: q.T @ x.T,
    )

    @jax.jit
    def slopes(x):
      return [jax.grad(lambda x, f=f: jnp.sum(f(x)))(x) for f in functions]

    for dx in slopes(x):
      np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-4)

  def test_gradients_through_a_scan_over_layers(self):
    stack = stacked(*(make('mxfp4', 32, 32, seed=i) for i in range(3)))
    stack = replaced(stack, scale=stack.scale - np.uint8(3))
    x = data(2, 32, seed=3)

    def loss(x):
      def body(x, q):
        return jnp.tanh(lowbit_jax.dot(x, q)), None

      return jnp.sum(jax.lax.scan(body, x, stack)[0])

    got = jax.jit(jax.grad(loss))(x)
    layers = [dense(jax.tree.map(lambda v, i=i: v[i], stack)) for i in range(3)]
    values = [dense(x)]
    for w in layers:
      values.append(np.tanh(values[-1] @ w))
    want = np.ones_like(values.pop())
    for w, x in zip(reversed(layers), reversed(values), strict=True):
      want = want / np.cosh(x @ w) ** 2 @ w.T
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(
    *itertools.product(('mxfp4', 'nvfp4', 'int4_g32', 'mxfp4_32x32'), (2, 6))
  )
  def test_residuals_hold_packed_codes_only(self, name, m):
    q, x = make(name, 256, 64), data(m, 256)
    _, vjp = jax.eval_shape(
      lambda x, q: jax.vjp(lambda x: lowbit_jax.dot(x, q), x), x, q
    )
    self.assert_packed(vjp, q, x)

  def test_residuals_outside_jit(self):
    q, x = make('mxfp4', 256, 64), data(2, 256)
    _, vjp = jax.vjp(lambda x: lowbit_jax.dot(x, q), x)
    self.assert_packed(vjp, q, x)

  def test_residuals_of_scale_gradients(self):
    q, x = make('int4_g32', 256, 64), data(2, 256)
    _, vjp = jax.eval_shape(
      lambda x, s: jax.vjp(
        lambda x, s: lowbit_jax.dot(x, replaced(q, scale=s)), x, s
      ),
      x,
      q.scale,
    )
    self.assert_packed(vjp, q, x)

  def assert_packed(self, vjp, q, x):
    leaves = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, 'shape')]
    self.assertNotEmpty(leaves)
    floats = [
      leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    self.assertLess(max([leaf.size for leaf in floats], default=0), q.size)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    self.assertLessEqual(total, 2 * q.nbytes + 2 * x.nbytes)


class PublicTest(absltest.TestCase):
  def test_verbs_are_at_the_top(self):
    for name in (
      'dot',
      'dot_general',
      'einsum',
      'implementations',
      'select_implementation',
      'quantize',
      'quantize_with',
      'dequantize',
      'fake_quant',
      'fake_quant_with',
      'round_to',
    ):
      self.assertIs(getattr(lowbit_jax, name), getattr(ops, name))


if __name__ == '__main__':
  absltest.main()
