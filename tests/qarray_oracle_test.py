"""Quantized arrays against the scalar oracle, bit for bit.

Every block format of the registry, with every scale rule that the oracle knows.
Data: block maxima over the whole range of float32, zero and subnormal blocks,
blocks whose maximum is at the edge of a scale, NaN and Inf, signed zeros.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, numerics
from lowbit_jax.numerics import oracle

SHAPE = (2, 256)
RANDOM_BITS = 3
ORACLE_RULES = (
  *oracle.EXPONENT_RULES,
  'absmax',
  'minmax',
  *oracle.UNEVEN_RULES,
)
BLOCK_FORMATS = formats.names('block')
# Blocks of two levels of scales depend on each other: see minima_test.
LINE_FORMATS = tuple(
  n
  for n in BLOCK_FORMATS
  if not formats.get(n).is_tile and formats.get(n).scale_blocks is None
)
# Each kind of element, of block and of scale. The slow tests take the whole
# registry, and try every rule.
EVERY_DAY = (
  'mxfp8_e5m2', 'mxfp4', 'mxint8', 'nvfp4', 'nf4_g64', 'fp8_1x128',
  'e4m3fn_tensor', 'int8_tensor', 'uint4_g32',
)  # fmt: skip
TILE_FORMATS = tuple(n for n in BLOCK_FORMATS if formats.get(n).is_tile)
# Rules beside that of the format; reference_values_test has a table of 'even'.
OTHER_RULES = (
  ('mxfp4', 'rceil', 'round'),
  ('mxint8', 'ceil'),
)
# One format of each kind of element, for what depends on little else; more of
# them, and of scales.
KINDS = ('mxfp4', 'nf4_g64', 'uint4_g32')
MORE_KINDS = (
  'nvfp4', 'int8_channel', 'e4m3fn_tensor', 'mxint8', 'nvint4', 'fp8_1x128',
  'int3_g32',
)  # fmt: skip
OTHER_SCALES = (
  (formats.int4, 32, formats.bfloat16),
  (formats.e2m1, 16, formats.ue5m3),
)
MORE_SCALES = (
  (formats.uint4, 32, formats.bfloat16),
  (formats.int4, 16, formats.e8m0),
)


unpack = jax.jit(numerics.unpack, static_argnums=(1, 2))
random_words = jax.jit(numerics.random_words, static_argnums=1)


def rules_of(fmt: formats.BlockFormat) -> tuple[str, ...]:
  """The scale rules of a format that the oracle knows."""
  return tuple(r for r in numerics.scale_rules(fmt) if r in ORACLE_RULES)


@functools.cache
def ordinary(shape=SHAPE, octaves: int = 12) -> np.ndarray:
  """Bell-shaped numbers of either sign, 16 neighbours sharing an exponent."""
  random = np.random.RandomState(7)
  x = random.randint(-(2**22), 2**22, (*shape, 3)).sum(axis=-1)
  runs = random.randint(-octaves, octaves + 1, math.prod(shape) // 16)
  exponent = np.repeat(runs, 16).reshape(shape) - 23
  return np.ldexp(x.astype(np.float64), exponent).astype(np.float32)


@functools.cache
def extreme(shape=SHAPE) -> np.ndarray:
  """The whole range of float32, subnormals, zeros and edges of scales."""
  random = np.random.RandomState(8)
  bits = random.randint(0, 2**32, shape, dtype=np.uint64).astype(np.uint32)
  exponent = np.repeat(
    random.randint(0, 255, math.prod(shape) // 64).astype(np.uint32), 64
  ).reshape(shape)
  drop = random.randint(0, 30, shape).astype(np.uint32)
  exponent = np.where(exponent > drop, exponent - drop, 0).astype(np.uint32)
  bits = (bits & np.uint32(0x807FFFFF)) | exponent << np.uint32(23)
  x = bits.view(np.float32).copy()
  flat = x.reshape(-1, 16)
  flat[3::11] = np.where(np.arange(16) % 2, np.float32(-0.0), np.float32(0.0))
  flat[5::11, 2] = np.float32(448 * 2.0**-20)
  flat[7::11, 3] = np.nextafter(np.float32(-6 * 2.0**30), np.float32(-np.inf))
  return x


def poisoned(shape=SHAPE) -> np.ndarray:
  """`ordinary` with NaN and infinities in some blocks."""
  x = ordinary(shape).copy()
  flat = x.reshape(-1)
  flat[5] = np.nan
  flat[300] = np.inf
  flat[400:404] = -np.inf
  return x


def blocks_of(x: np.ndarray, fmt: formats.BlockFormat) -> np.ndarray:
  """(blocks, elements) of an array of whole blocks along its last axes."""
  if fmt.scale is None:
    return x.reshape(1, -1)
  if fmt.is_tile:
    (m, n), (p, q) = x.shape, fmt.block
    tiles = x.reshape(m // p, p, n // q, q).swapaxes(1, 2)
    return tiles.reshape(-1, p * q)
  return x.reshape(-1, fmt.block[0] or x.shape[-1])


def oracle_blocks(x, fmt, rule, **kwargs) -> list[oracle.Block]:
  scale = None
  if fmt.tensor_scale:
    scale = oracle.tensor_scale(x.ravel().tolist(), fmt)
  return [
    oracle.quantize_block(
      block.tolist(), fmt, rule, tensor_scale=scale, **kwargs
    )
    for block in blocks_of(x, fmt)
  ]


def codes_of(q) -> np.ndarray:
  return np.asarray(unpack(q.codes, q.fmt.element.bits, q.axes[0]))


def assert_bits(got, want, message):
  """Equal as float32 bit patterns, any NaN equal to any other."""
  got = np.asarray(got, np.float32)
  want = np.asarray(want, np.float32).reshape(got.shape)
  same = (got.view(np.uint32) == want.view(np.uint32)) | (
    np.isnan(got) & np.isnan(want)
  )
  if not same.all():
    bad = np.argwhere(~same)[0]
    raise AssertionError(
      f'{message}: {np.sum(~same)} differ, first at {bad.tolist()}:'
      f' {got[tuple(bad)]!r}, want {want[tuple(bad)]!r}'
    )


def assert_agrees(x, fmt, rule, **kwargs):
  """quantize and dequantize equal the oracle on float32 `x`."""
  oracle_kwargs = kwargs.pop('oracle_kwargs', {})
  q = lowbit_jax.quantize(jnp.asarray(x), fmt, scale_rule=rule, **kwargs)
  want = oracle_blocks(x, fmt, rule, **oracle_kwargs)
  label = f'{fmt} {rule}'
  if fmt.scale is not None:
    assert_bits(q.scale, [b.scale for b in want], f'{label} scale')
  if fmt.tensor_scale:
    assert_bits(q.tensor_scale, [want[0].tensor_scale], f'{label} tensor_scale')
  if fmt.zero_point:
    assert_bits(q.zero_point, [b.zero_point for b in want], f'{label} zero')
  codes = blocks_of(codes_of(q), fmt)
  assert_bits(codes, [b.codes for b in want], f'{label} codes')
  back = np.asarray(lowbit_jax.dequantize(q))
  values = [oracle.dequantize_block(b, fmt) for b in want]
  assert_bits(blocks_of(back, fmt), values, f'{label} values')


def assert_lines_agree(fmt, *rules):
  """`ordinary` by the first rule, `poisoned` by the last, `extreme` by each."""
  assert_agrees(ordinary(), fmt, rules[0])
  assert_agrees(poisoned(), fmt, rules[-1])
  for rule in rules:
    assert_agrees(extreme(), fmt, rule)


def assert_tiles_agree(fmt, *rules):
  """`poisoned` by the first rule, `extreme` by the last."""
  p, q = fmt.block
  shape = (p, q) if p == 128 else (p, 2 * q)
  assert_agrees(poisoned(shape), fmt, rules[0])
  if p < 128:
    assert_agrees(extreme(shape), fmt, rules[-1])


class RegistryTest(parameterized.TestCase):
  @parameterized.parameters(*EVERY_DAY)
  def test_lines(self, name):
    fmt = formats.get(name)
    assert_lines_agree(fmt, rules_of(fmt)[0])

  @parameterized.parameters(*OTHER_RULES)
  def test_other_rules(self, name, *rules):
    for rule in rules:
      assert_agrees(extreme(), formats.get(name), rule)

  @parameterized.parameters(*LINE_FORMATS)
  @pytest.mark.slow
  def test_all_lines_and_rules(self, name):
    fmt = formats.get(name)
    assert_lines_agree(fmt, *rules_of(fmt))

  def test_tiles(self):
    assert_tiles_agree(formats.get('nvfp4_16x16'), 'absmax')

  @parameterized.parameters(*TILE_FORMATS)
  @pytest.mark.slow
  def test_all_tiles(self, name):
    fmt = formats.get(name)
    assert_tiles_agree(fmt, *rules_of(fmt))

  def test_every_format_has_a_rule_with_an_oracle(self):
    without = {n for n in BLOCK_FORMATS if not rules_of(formats.get(n))}
    self.assertEmpty(without)

  @parameterized.parameters('ternary_tensor', 'ternary_channel')
  def test_ternary(self, name):
    # BitNet b1.58: s = mean |x|, q = clip(round(x / s), -1, 1). The sum is
    # exact here, and padding takes no part in the mean.
    x = np.float32([[1, -0.75, 0.25, 2, -1], [-1, 0.5, 0.75, 0, 2.75]])
    q = lowbit_jax.quantize(jnp.asarray(x), formats.get(name))
    self.assertEqual(
      np.asarray(lowbit_jax.dequantize(q)).tolist(),
      [
        [1, -1, 0, 1, -1],
        [-1, 0, 1, 0, 1],
      ],
    )


class ArgumentsTest(parameterized.TestCase):
  def assert_agrees_toward_zero(self, name):
    fmt = formats.get(name)
    assert_agrees(
      ordinary(),
      fmt,
      rules_of(fmt)[0],
      rounding='toward_zero',
      oracle_kwargs={'rounding': 'toward_zero'},
    )

  @parameterized.parameters(*KINDS)
  def test_toward_zero(self, name):
    self.assert_agrees_toward_zero(name)

  @parameterized.parameters(*MORE_KINDS)
  @pytest.mark.slow
  def test_toward_zero_in_more_formats(self, name):
    self.assert_agrees_toward_zero(name)

  @parameterized.parameters('mxfp4', 'uint4_g32')
  def test_stochastic(self, name):
    self.assert_agrees_stochastically(name)

  @parameterized.parameters('nvfp4', 'int4_g32')
  @pytest.mark.slow
  def test_stochastic_in_more_formats(self, name):
    self.assert_agrees_stochastically(name)

  def assert_agrees_stochastically(self, name):
    fmt = formats.get(name)
    key = jax.random.key(3)
    x = ordinary()
    words = np.asarray(random_words(key, x.shape))
    integers = blocks_of(words >> (32 - RANDOM_BITS), fmt).tolist()
    q = lowbit_jax.quantize(
      jnp.asarray(x),
      fmt,
      rounding='stochastic',
      key=key,
      random_bits=RANDOM_BITS,
    )
    scale = None
    if fmt.tensor_scale:
      scale = oracle.tensor_scale(x.ravel().tolist(), fmt)
    want = [
      oracle.quantize_block(
        block.tolist(),
        fmt,
        tensor_scale=scale,
        rounding='stochastic',
        random=random,
        random_bits=RANDOM_BITS,
      ).codes
      for block, random in zip(blocks_of(x, fmt), integers, strict=True)
    ]
    assert_bits(blocks_of(codes_of(q), fmt), want, name)

  def assert_exact_in_float32(self, name, dtype):
    fmt = formats.get(name)
    x = ordinary(SHAPE, 4).astype(dtype)
    q = lowbit_jax.quantize(x, fmt)
    wide = lowbit_jax.quantize(x.astype(np.float32), fmt)
    np.testing.assert_array_equal(q.codes, wide.codes)
    self.assertEqual(q.dtype, dtype)
    back = np.asarray(lowbit_jax.dequantize(wide)).astype(dtype)
    np.testing.assert_array_equal(lowbit_jax.dequantize(q), back)

  @parameterized.parameters(('nvfp4', jnp.float16))
  def test_sixteen_bit_inputs_are_exact_float32(self, name, dtype):
    self.assert_exact_in_float32(name, dtype)

  @parameterized.product(
    name=(*KINDS, *MORE_KINDS), dtype=(jnp.float16, jnp.bfloat16)
  )
  @pytest.mark.slow
  def test_sixteen_bit_inputs_in_more_formats(self, name, dtype):
    self.assert_exact_in_float32(name, dtype)

  def assert_agrees_with_scales_of(self, element, block, scale):
    fmt = formats.grouped(element, block, scale)
    if fmt.has_exponent_scale:
      fmt = dataclasses.replace(fmt, scale_rule='rceil')
    assert_agrees(ordinary(), fmt, fmt.scale_rule)
    assert_agrees(extreme(), fmt, fmt.scale_rule)

  @parameterized.parameters(*OTHER_SCALES)
  def test_other_scale_formats(self, element, block, scale):
    self.assert_agrees_with_scales_of(element, block, scale)

  @parameterized.parameters(*MORE_SCALES)
  @pytest.mark.slow
  def test_more_scale_formats(self, element, block, scale):
    self.assert_agrees_with_scales_of(element, block, scale)

  def assert_jit_on_an_odd_axis_agrees(self, name):
    # Padding with zeros changes no code, and compiling nothing at all.
    fmt = formats.get(name)
    x = ordinary()[:, :150]

    @jax.jit
    def there_and_back(x):
      return lowbit_jax.dequantize(lowbit_jax.quantize(x, fmt, axis=0))

    back = np.ascontiguousarray(there_and_back(jnp.asarray(x.T)).T)
    assert_bits(back, oracle_odd(x, fmt), name)

  @parameterized.parameters('nvfp4', 'int8_channel')
  def test_another_axis_an_odd_size_and_jit(self, name):
    self.assert_jit_on_an_odd_axis_agrees(name)

  @parameterized.parameters(
    'mxfp4', 'nf4_g64', 'uint4_g32', 'e4m3fn_tensor', 'mxint8', 'nvint4',
    'fp8_1x128', 'int3_g32',
  )  # fmt: skip
  @pytest.mark.slow
  def test_another_axis_and_jit_in_more_formats(self, name):
    self.assert_jit_on_an_odd_axis_agrees(name)

  @parameterized.parameters('nf4_g64', 'mxfp4', 'int8_tensor')
  def test_numbers_near_the_end_of_float32(self, name):
    self.assert_agrees_near_the_end(name)

  @pytest.mark.slow
  def test_numbers_of_two_bits_near_the_end_of_float32(self):
    self.assert_agrees_near_the_end('int2_g32')

  def assert_agrees_near_the_end(self, name):
    fmt = formats.get(name)
    x = ordinary(SHAPE, 0)
    x = np.ldexp(x, 127 - np.frexp(np.abs(x).max())[1] + 1)
    self.assertGreater(np.abs(x).max(), 2.0**127)
    assert_agrees(x, fmt, rules_of(fmt)[0])

  def test_given_tensor_scale(self):
    x = ordinary()
    scale = 2.0**-9
    q = lowbit_jax.quantize(
      jnp.asarray(x), formats.nvfp4, tensor_scale=jnp.float32(scale)
    )
    want = [
      oracle.quantize_block(b.tolist(), formats.nvfp4, tensor_scale=scale)
      for b in blocks_of(x, formats.nvfp4)
    ]
    assert_bits(q.scale, [b.scale for b in want], 'scale')
    codes = blocks_of(codes_of(q), formats.nvfp4)
    assert_bits(codes, [b.codes for b in want], 'codes')


def oracle_odd(x, fmt) -> np.ndarray:
  """Dequantized rows of `x`, whose last blocks are short."""
  scale = None
  if fmt.tensor_scale:
    scale = oracle.tensor_scale(x.ravel().tolist(), fmt)
  size = (fmt.scale is not None and fmt.block[0]) or x.shape[-1]
  rows = []
  for row in x.tolist():
    values = []
    for i in range(0, len(row), size):
      block = oracle.quantize_block(row[i : i + size], fmt, tensor_scale=scale)
      values += oracle.dequantize_block(block, fmt)
    rows.append(values)
  return np.float32(rows)


if __name__ == '__main__':
  absltest.main()
