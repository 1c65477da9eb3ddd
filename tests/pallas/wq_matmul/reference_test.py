"""Tests of the contract of products with quantized weights."""

from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax.numerics._codec import spec
from lowbit_pallas.arith import codec, packing
from lowbit_pallas.wq_matmul import reference, tpu_config
from tests.pallas.wq_matmul import oracle

FORMATS = (
  'int4_g32',
  'int4_g128',
  'uint4_g32',
  'mxfp4',
  'nvfp4',
  'mxfp8_e4m3',
  'mxfp6_e2m3',
  'nf4_g64',
  'int3_g32',
  'int5_g32',
  'int7_g64',
  'int8_channel',
)


def _product(x, w, schedule):
  return reference.run(x, w, schedule, out_dtype=jnp.float32)


_compiled = jax.jit(_product, static_argnums=2)


def _run(x, w, schedule, tile=None, layout='kn', product=_compiled):
  tile = tile or tpu_config.tile_rows(w.k, w.spec)
  return product(x, w.prepack(tile, layout), schedule)


class ReferenceTest(parameterized.TestCase):
  # Kernels are tested with the schedule by heuristic: here, mostly the other.
  @parameterized.parameters(
    ('mxfp6_e2m3', 'pre'),
    ('nf4_g64', 'post'),
    ('int8_channel', 'post'),
  )
  def test_agrees_with_oracle(self, name, schedule):
    self.check_agrees(name, schedule)

  @parameterized.parameters(('int7_g64', 'post'))
  @pytest.mark.slow
  def test_widths_across_bytes_agree_with_oracle(self, name, schedule):
    self.check_agrees(name, schedule)

  def check_agrees(self, name, schedule):
    w = oracle.quantized(name, 544, 24)
    x = oracle.normal(5, w.k, jnp.bfloat16)
    oracle.check(_run(x, w, schedule), x, w, schedule)

  def test_float32(self):
    self.check_float32('nvfp4', 'pre')

  @pytest.mark.slow
  def test_float32_with_a_codebook(self):
    self.check_float32('nf4_g64', 'post')

  def check_float32(self, name, schedule):
    w = oracle.quantized(name, 160, 24)
    x = oracle.normal(5, w.k, jnp.float32)
    oracle.check(_run(x, w, schedule), x, w, schedule)

  @pytest.mark.slow
  def test_float16(self):
    w = oracle.quantized('mxfp4', 160, 8)
    x = oracle.normal(3, w.k, jnp.float16)
    oracle.check(_run(x, w, 'post'), x, w, 'post')

  @parameterized.parameters((17, 3, 1024), (1, 8, 32))
  @pytest.mark.slow
  def test_ragged_shapes_and_one_row(self, m, n, k):
    w = oracle.quantized('mxfp4', k, n)
    x = oracle.normal(m, k, jnp.bfloat16)
    oracle.check(_run(x, w, 'pre'), x, w, 'pre')

  @parameterized.product(
    name=FORMATS,
    schedule=reference.SCHEDULES,
    m=(1, 2, 8, 65, 300),
    shape=((8, 96), (100, 160), (64, 4096), (4104, 128)),
  )
  @pytest.mark.slow
  def test_shapes(self, name, schedule, m, shape):
    w = oracle.quantized(name, shape[1], shape[0])
    x = oracle.normal(m, w.k, jnp.bfloat16)
    oracle.check(_run(x, w, schedule), x, w, schedule)

  def test_layouts_and_tiles(self):
    self.check_layout('nk', 64)

  @parameterized.parameters(('kn', 64), ('kn', 128), ('nk', 128))
  @pytest.mark.slow
  def test_more_layouts_and_tiles(self, layout, tile):
    self.check_layout(layout, tile)

  def check_layout(self, layout, tile):
    w = oracle.quantized('int4_g32', 320, 8)
    x = oracle.normal(4, w.k, jnp.bfloat16)
    oracle.check(_run(x, w, 'post', tile, layout), x, w, 'post')

  @parameterized.parameters(
    ('int3_g32', 'post', 'float16'),
    ('int8_channel', 'pre', 'bfloat16'),
  )
  def test_exact_sums_are_exact(self, name, schedule, dtype):
    self.check_exact_sums(name, schedule, dtype)

  @parameterized.parameters(
    ('int3_g32', 'post', 'float32'), ('mxfp6_e2m3', 'pre', 'float32')
  )
  @pytest.mark.slow
  def test_exact_sums_of_float32_are_exact(self, name, schedule, dtype):
    self.check_exact_sums(name, schedule, dtype)

  def check_exact_sums(self, name, schedule, dtype):
    # Products are multiples of 2^-4 below 2^10: sums of 256 take 22 bits.
    w = oracle.quantized(name, 256, 16)
    scale = None
    if w.scale is not None:
      one = 127 if w.scale.dtype == np.uint8 else 1.0
      scale = np.full_like(w.scale, one)
    w = oracle.Weight(w.fmt, w.k, w.codes, scale, w.zero_point)
    x = np.random.default_rng(3).integers(-8, 9, (6, 256))
    x = x.astype(jnp.dtype(dtype))
    want, _ = oracle.product(x, w, schedule)
    np.testing.assert_array_equal(np.asarray(_run(x, w, schedule)), want)

  @parameterized.parameters(
    'e2m1', 'e4m3fn', 'e4m3fnuz', 'e5m2', 'e8m0', 'int4', 'nf4'
  )
  def test_decode_in_kernel_is_decode(self, name):
    self.check_decode_in_kernel(name)

  @parameterized.parameters('e2m3', 'e3m2', 'e4m3', 'ue5m3')
  @pytest.mark.slow
  def test_more_decode_in_kernel_is_decode(self, name):
    self.check_decode_in_kernel(name)

  def check_decode_in_kernel(self, name):
    element = oracle.formats.get(name)
    codes = np.arange(256, dtype=np.uint32) & ((1 << element.bits) - 1)

    @jax.jit
    def decoded(codes):
      decoders = codec.decode, codec.decode_in_kernel
      return [decode(codes, spec(element)) for decode in decoders]

    want, got = (np.asarray(v).view(np.uint32) for v in decoded(codes))
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters('e4m3fn', 'int3')
  def test_decode_field_is_decode(self, name):
    self.check_decode_field(name)

  @parameterized.parameters('e2m1', 'e2m3', 'int4', 'nf4')
  @pytest.mark.slow
  def test_more_decode_field_is_decode(self, name):
    self.check_decode_field(name)

  def check_decode_field(self, name):
    element = oracle.formats.get(name)
    bits, f = element.bits, spec(element)
    codes = np.arange(1 << bits, dtype=np.uint32)
    noise = np.array([[0], [0x5A5A], [0xA5A5], [0xFFFF]], np.uint32)

    @jax.jit
    def decoded(codes):
      want, got = codec.decode(codes, f), []
      for shift in range(8):
        outside = 0xFFFF & ~(((1 << bits) - 1) << shift)
        field = codes << shift | (noise & np.uint32(outside))
        for unit in (1.0, codec.unit_in_kernel(f)):
          got.append(codec.decode_field(field, shift, bits, f, unit) * unit)
      return want, got

    want, got = decoded(codes)
    want = np.tile(np.asarray(want).view(np.uint32), (4, 1))
    for value in got:
      np.testing.assert_array_equal(np.asarray(value).view(np.uint32), want)

  def test_wide_x_is_exact_in_parts(self):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, np.uint32)
    x = bits.view(np.float32)
    x = x[(np.abs(x) > 2.0**-102) | ~np.isfinite(x)]
    split = jax.jit(reference.bfloat16_parts)
    parts = np.asarray(split(x[:, None]))
    parts = parts.astype(float).reshape(3, -1)
    with np.errstate(invalid='ignore'):
      np.testing.assert_array_equal(parts.sum(0), x.astype(float))
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    parts = np.asarray(split(half[:, None]))
    parts = parts.astype(float).reshape(2, -1)
    with np.errstate(invalid='ignore'):
      np.testing.assert_array_equal(parts.sum(0), half.astype(float))

  @parameterized.parameters(*reference.SCHEDULES)
  def test_extreme_scales(self, schedule):
    oracle.check_extreme_scales(lambda x, w: _run(x, w, schedule), schedule)

  def test_zero_blocks_and_padded_scales(self):
    # K ends within a tile: what pads it must not poison the sum.
    k, n = 160, 4
    w = oracle.quantized('mxfp4', k, n)
    codes = w.codes.copy()
    codes[:16] = 0
    w = oracle.Weight(w.fmt, k, codes, w.scale, None)
    x = oracle.normal(3, k, jnp.bfloat16)
    oracle.check(_run(x, w, 'pre'), x, w, 'pre')
    none = oracle.Weight(w.fmt, k, 0 * codes, w.scale, None)
    np.testing.assert_array_equal(np.asarray(_run(x, none, 'pre')), 0)

  def test_inf_and_nan_stay_in_their_rows_and_columns(self):
    self.check_inf_and_nan('pre', 'float32')

  @pytest.mark.slow
  def test_inf_and_nan_stay_where_scales_come_later(self):
    self.check_inf_and_nan('post', 'bfloat16')

  def check_inf_and_nan(self, schedule, dtype):
    scale = np.full((4, 6), 127, np.uint8)
    scale[2, 5] = 255
    w = oracle.random_codes('mxfp8_e4m3', 128, 6, scale)
    codes = np.where(w.codes & 0x7F == 0x7F, 0, w.codes)
    codes[7, 1] = 0x7F
    w = oracle.Weight(w.fmt, w.k, codes, scale, None)
    x = np.asarray(oracle.normal(5, w.k, jnp.float32)).copy()
    x[1, 3], x[2, 70], x[3, 9] = np.inf, np.nan, -np.inf
    x = x.astype(jnp.dtype(dtype))
    want, size = oracle.product(x, w, schedule)
    got = np.asarray(_run(x, w, schedule), float)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    error = np.abs(got[finite] - want[finite])
    self.assertTrue((error <= 2 * w.k * oracle.U * size[finite]).all())
    self.assertFalse(finite.all() or not finite.any())

  @parameterized.parameters((0, 8, 96), (3, 0, 96), (3, 8, 0))
  def test_empty(self, m, n, k):
    w = oracle.Weight(
      oracle.formats.get('mxfp4'),
      k,
      np.zeros((k // 2, n), np.uint8),
      np.zeros((k // 32, n), np.uint8),
      None,
    )
    out = reference.run(jnp.zeros((m, k), jnp.bfloat16), w.prepack(128), 'pre')
    self.assertEqual((out.shape, out.dtype), ((m, n), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)

  def test_rounds_the_result_once(self):
    self.check_rounding(jax.jit(reference.run, static_argnums=2))

  @pytest.mark.slow
  def test_rounds_the_result_once_without_jit(self):
    self.check_rounding(reference.run)

  def check_rounding(self, run):
    w = oracle.quantized('mxfp4', 96, 8)
    x = oracle.normal(4, 96, jnp.bfloat16)
    p = w.prepack(128)
    wide = np.asarray(_compiled(x, p, 'pre'))
    narrow = run(x, p, 'pre')
    np.testing.assert_array_equal(
      np.asarray(narrow), wide.astype(ml_dtypes.bfloat16)
    )

  def test_refuses(self):
    p = oracle.quantized('mxfp4', 96, 8).prepack(128)
    for x, schedule, reason in (
      (jnp.zeros((2, 95), jnp.bfloat16), 'pre', r'\(m, 96\)'),
      (jnp.zeros((2, 96), jnp.int8), 'pre', 'int8'),
      (jnp.zeros((2, 96), jnp.bfloat16), 'mid', 'mid'),
    ):
      with self.assertRaisesRegex(ValueError, reason):
        reference.run(x, p, schedule)


def _check(name, schedule, product=_compiled):
  w = oracle.quantized(name, 288, 24)
  x = oracle.normal(5, w.k, jnp.bfloat16)
  got = _run(x, w, schedule, tile=128, product=product)
  oracle.check(got, x, w, schedule)


class MutantTest(parameterized.TestCase):
  """Faults that the check must see."""

  def _catch(self, module, attribute, mutant, name='int4_g32', schedule='post'):
    _check(name, schedule)
    # Another function, so that it is traced anew.
    product = jax.jit(lambda *args: _product(*args), static_argnums=2)
    with mock.patch.object(module, attribute, mutant):
      with self.assertRaises(AssertionError):
        _check(name, schedule, product)

  @pytest.mark.slow
  def test_swapped_nibbles(self):
    fields = packing.planes_to_fields
    self._catch(packing, 'planes_to_fields', lambda *a: fields(*a)[::-1])

  @pytest.mark.slow
  def test_no_sign_extension(self):
    decode = codec.decode_field
    self._catch(
      codec,
      'decode_field',
      lambda *a: decode(*a[:3], a[3]._replace(signed=False), *a[4:]),
    )

  @parameterized.product(
    schedule=reference.SCHEDULES, fault=('group', 'column')
  )
  @pytest.mark.slow
  def test_wrong_scale(self, schedule, fault):
    axis = 0 if fault == 'group' else 1
    product = reference.tile_product

    def mutant(acc, x, planes, scale, *rest):
      return product(acc, x, planes, jnp.roll(scale, 1, axis), *rest)

    self._catch(reference, 'tile_product', mutant, schedule=schedule)

  @pytest.mark.slow
  def test_last_tile_skipped(self):
    operands = reference.operands_of

    def mutant(x, w, schedule):
      x, wide = operands(x, w, schedule)
      return x.at[:, (w.steps - 1) * w.tile :].set(0), wide

    self._catch(reference, 'operands_of', mutant)

  @pytest.mark.slow
  def test_zero_point_after_the_scale(self):
    by_block = reference._by_block

    def mutant(op, value, per_block, *rest):
      if op is jnp.subtract:
        mutant.zero = per_block
        return value
      value = by_block(op, value, per_block, *rest)
      return by_block(jnp.subtract, value, mutant.zero, *rest)

    self._catch(
      reference, '_by_block', mutant, name='uint4_g32', schedule='pre'
    )

  @pytest.mark.slow
  def test_bfloat16_accumulation(self):
    product = reference.tile_product

    def mutant(*args):
      rounded = product(*args).astype(jnp.bfloat16)
      return rounded.astype(jnp.float32)

    self._catch(reference, 'tile_product', mutant)

  @pytest.mark.slow
  def test_half_decoded_as_zero(self):
    decode = codec.decode_field

    def mutant(*a):
      value = decode(*a)
      return jnp.where(jnp.abs(value) * a[-1] == 0.5, 0.0, value)

    self._catch(codec, 'decode_field', mutant, name='mxfp4', schedule='pre')

  @pytest.mark.slow
  def test_result_of_zeros(self):
    parts = reference.sum_of_parts
    self._catch(reference, 'sum_of_parts', lambda *a: 0 * parts(*a))

  @parameterized.parameters('int4_g32', 'mxfp4', 'uint4_g32')
  @pytest.mark.slow
  def test_bounds_are_met_twice_over(self, name):
    with mock.patch.object(oracle, 'U', oracle.U / 2):
      _check(name, 'pre')


if __name__ == '__main__':
  absltest.main()
