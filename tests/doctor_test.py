"""The doctor: measures, advice, tables, and the gradient audit."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import linen, nnx
from jax.sharding import Mesh, PartitionSpec

import lowbit_jax
from lowbit_jax import doctor, formats
from lowbit_jax.doctor import _measure

SHAPE = (16, 128)

# Tracing op by op is what costs time here.
quantize = jax.jit(
  lowbit_jax.quantize, static_argnames=('fmt', 'axis', 'scale_rule')
)


@functools.cache
def gaussian(shape=SHAPE, seed: int = 0) -> np.ndarray:
  random = np.random.RandomState(seed)
  return random.standard_normal(shape).astype(np.float32)


def rows_scaled(scales) -> np.ndarray:
  """Gaussian with the rows multiplied by the scales, again and again."""
  column = np.resize(np.float32(scales), (SHAPE[0], 1))
  return gaussian() * column


def advice(x, fmt, **kwargs) -> doctor.Row:
  (row,) = doctor.report(jnp.asarray(x), fmt, **kwargs)
  return row


class MeasuresTest(absltest.TestCase):
  def test_by_hand(self):
    # MXFP4 with floor: maximum 7.5, scale 1, elements 0 .5 1 1.5 2 3 4 6.
    # 7.5 is clipped (beyond 7), 6.5 is rounded; .2 becomes zero, .3 does not.
    x = np.zeros(SHAPE, np.float32)
    x[0, :7] = 7.5, -6.5, 0.2, 0.3, 1, -4, 3
    m = advice(x, formats.mxfp4).measures
    noise = 1.5**2 + 0.5**2 + 0.2**2 + 0.2**2
    signal = 7.5**2 + 6.5**2 + 0.2**2 + 0.3**2 + 1 + 16 + 9
    self.assertAlmostEqual(m.qsnr_db, 10 * math.log10(signal / noise), 5)
    self.assertEqual(m.saturated, 1 / x.size)
    self.assertEqual(m.at_max, 2 / x.size)
    self.assertAlmostEqual(m.flushed, 1 / 7)
    self.assertEqual(m.zero_blocks, 63 / 64)
    self.assertEqual(m.lost_blocks, 0)
    self.assertEqual(m.bits_per_element, 4.25)
    self.assertAlmostEqual(m.crest, 7.5 / math.sqrt(signal / x.size), 5)
    # One live block of 32 elements.
    self.assertAlmostEqual(m.block_crest, 7.5 / math.sqrt(signal / 32), 5)

  def test_qsnr_of_large_offsets_keeps_its_digits(self):
    # 10^6 elements: float32 sums would lose the small errors.
    x = np.full((1000, 1024), 3.0, np.float32)
    x[:, ::32] = 3.25
    m = advice(x, formats.mxfp4).measures
    signal = 9 * 1000 * 1024 + 1000 * 32 * (3.25**2 - 9)
    noise = 1000 * 32 * 0.25**2
    self.assertAlmostEqual(m.qsnr_db, 10 * math.log10(signal / noise), 6)

  def test_rho_and_subnormal_scales_of_nvfp4(self):
    x = np.ones(SHAPE, np.float32)
    x[1, 16:48] = 2.0**-15
    row = advice(x, formats.nvfp4)
    self.assertAlmostEqual(row.measures.rho[0], 1, 5)
    self.assertAlmostEqual(row.measures.rho[1], 2**15, -1)
    self.assertEqual(row.measures.subnormal_scales, 2 / 128)
    self.assertIn('scale-precision', row.rules)

  def test_a_tensor_scale_is_one_block(self):
    m = advice(gaussian(), formats.int8_tensor).measures
    self.assertAlmostEqual(m.crest, m.block_crest, 5)

  def test_nonfinite_blocks_do_not_count(self):
    x = gaussian().copy()
    x[3, 40] = np.nan
    m = advice(x, formats.mxfp8_e4m3).measures
    clean = advice(gaussian(), formats.mxfp8_e4m3).measures
    self.assertEqual((m.nan, m.inf, m.nonfinite_blocks), (1, 0, 1))
    self.assertEqual(m.first_nonfinite, (3, 40))
    self.assertAlmostEqual(m.qsnr_db, clean.qsnr_db, delta=0.5)

  def test_every_kind_of_format(self):
    self._formats('nvfp4_16x16', 'nf4_g64')

  @pytest.mark.slow
  def test_more_formats(self):
    self._formats('mxint8_32x32', 'uint4_g32', 'e4m3fn_tensor', 'fp8_1x128')
    self._formats('int3_channel', 'int4_channel', 'ternary_tensor')

  def _formats(self, *names):
    for name in names:
      m = advice(gaussian(), formats.get(name)).measures
      self.assertBetween(m.qsnr_db, 3, 60, name)
      self.assertEqual(m.nonfinite_blocks, 0, name)
      self.assertGreater(m.bits_per_element, 2 - 1e-9, name)

  def test_stored_tensor_equals_its_array(self):
    self._stored_tensor_equals_its_array('nvfp4', 'uint4_g32')

  @pytest.mark.slow
  def test_stored_tensor_of_one_scale_equals_its_array(self):
    self._stored_tensor_equals_its_array('mxfp4', 'int8_tensor')

  def _stored_tensor_equals_its_array(self, *names):
    x = jnp.asarray(gaussian())
    for name in names:
      fmt = formats.get(name)
      q = quantize(x, fmt)
      stored = doctor.report(q, reference=x)['array'].measures
      direct = doctor.report(x, fmt)['array'].measures
      self.assertEqual(str(stored), str(direct))

  def test_stored_tensor_alone(self):
    x = gaussian().copy()
    x[0, 0] = np.inf
    x[1] = 0
    q = quantize(jnp.asarray(x), formats.nvfp4)
    report = doctor.report(q)
    m = report['array'].measures
    self.assertTrue(math.isnan(m.qsnr_db))
    self.assertEqual(m.nonfinite_blocks, 1)
    self.assertEqual(m.zero_blocks, 8 / 128)
    self.assertGreater(m.rho[1], 1)
    self.assertIn('nonfinite', report['array'].rules)
    self.assertIn('reference=', str(report))

  def test_stacked_tensor_scales(self):
    x = jnp.asarray(np.stack([gaussian(), 1000 * gaussian(seed=1)]))
    stack = jax.vmap(functools.partial(quantize, fmt=formats.nvfp4))
    m = doctor.report(stack(x), reference=x)['array'].measures
    self.assertGreater(m.qsnr_db, 19)
    self.assertLess(m.rho[1], 50)


class AdviceTest(parameterized.TestCase):
  def test_nothing_to_say(self):
    for name in ('nvfp4', 'int8_channel', 'int4_g32'):
      row = advice(gaussian(), formats.get(name))
      self.assertEqual((row.rules, row.advice), ((), ''), name)
    self.assertTrue(doctor.report(jnp.asarray(gaussian()), formats.nvfp4).ok)

  def test_nonfinite(self):
    x = gaussian().copy()
    x[2, 3], x[4, 5] = np.nan, -np.inf
    report = doctor.report({'w': jnp.asarray(x)}, formats.mxfp8_e4m3)
    self.assertIn('nonfinite', report['w'].rules)
    self.assertIn("'w' holds 1 NaN and 1 Inf", report['w'].advice)
    self.assertIn('(2, 3)', report['w'].advice)

  def test_floor_saturates(self):
    row = advice(gaussian(), formats.mxfp4)
    self.assertEqual(row.rules, ('saturation',))
    self.assertIn("scale_rule='floor'", row.advice)
    self.assertRegex(row.advice, "'(even|rceil)' gives")
    better = advice(gaussian(), formats.mxfp4, scale_rule='rceil')
    self.assertNotIn('saturation', better.rules)
    self.assertEqual(better.measures.saturated, 0)

  def test_rules_that_clip_on_purpose(self):
    row = advice(gaussian(), formats.mxfp4, scale_rule='mse')
    self.assertNotIn('saturation', row.rules)
    row = advice(gaussian(), formats.ternary_tensor)
    self.assertNotIn('saturation', row.rules)

  def test_held_scale_saturates(self):
    x = jnp.asarray(gaussian())
    q = quantize(x, formats.int8_channel)
    q = jax.jit(
      lambda x, scale: lowbit_jax.quantize_with(x, scale, formats.int8_channel)
    )(x, np.asarray(q.scale) / 4)
    row = doctor.report(q, reference=x)['array']
    self.assertIn('saturation', row.rules)
    self.assertIn('fresh scales give', row.advice)

  def test_small_tensor_scale(self):
    x = jnp.asarray(gaussian())
    scale = np.asarray(quantize(x, formats.nvfp4).tensor_scale) / 8
    q = quantize(x, formats.nvfp4, tensor_scale=scale)
    row = doctor.report(q, reference=x)['array']
    self.assertIn('tensor-scale', row.rules)
    self.assertIn('rho < 1', row.advice)
    q = quantize(x, formats.nvfp4, tensor_scale=0 * scale)
    row = doctor.report(q, reference=x)['array']
    self.assertIn('inf times what it covers', row.advice)

  def test_tiny_and_huge_numbers(self):
    row = advice(np.full(SHAPE, 1e-36), formats.nvfp4)
    self.assertGreater(row.measures.qsnr_db, 20)
    row = advice(np.full(SHAPE, 3e38), formats.mxfp4)
    self.assertGreater(row.measures.qsnr_db, 10)
    self.assertNotIn('nan', row.advice)
    self.assertEqual(_measure.qsnr_db([1, 3e38], [1, math.inf]), -math.inf)

  def test_outliers(self):
    row = advice(gaussian() ** 3, formats.mxint4)
    self.assertIn('outliers', row.rules)
    self.assertIn('Hadamard(32)', row.advice)
    self.assertIn('mxfp4 instead of mxint4', row.advice)

  def test_flush_to_zero(self):
    x = gaussian() ** 5
    row = advice(x, formats.int4_channel)
    self.assertIn('flush-to-zero', row.rules)
    self.assertRegex(row.advice, r'became zero: (nvfp4|int4_g32|rotating)')
    # Zero is half of the numbers of int2: nothing to advise.
    self.assertNotIn('flush-to-zero', advice(x, formats.get('int2_g32')).rules)

  def test_scale_precision_and_lost_blocks(self):
    row = advice(rows_scaled([1, 2e-5]), formats.nvfp4)
    self.assertEqual(row.rules, ('scale-precision',))
    self.assertIn('beyond 28672', row.advice)
    row = advice(rows_scaled([1, 1e-9]), formats.nvfp4)
    self.assertIn('lost-blocks', row.rules)
    self.assertIn('mxfp4', row.advice)
    row = advice(rows_scaled([1, 1e-9]), formats.mxfp4, scale_rule='even')
    self.assertEqual(row.rules, ())

  def test_scale_range(self):
    row = advice(gaussian() * np.float32(2.0**-126), formats.mxfp4)
    self.assertIn('scale-range', row.rules)
    self.assertIn('power of two', row.advice)

  def test_padding(self):
    row = advice(gaussian(), formats.mxint4, axis=-2)
    self.assertIn('padding', row.rules)
    self.assertIn('adds 100 %: axis=-1 adds 0 %', row.advice)
    row = advice(gaussian(), formats.mxint4)
    self.assertNotIn('padding', row.rules)
    row = advice(gaussian((33, 33)), formats.mxint4)
    self.assertIn('adds 94 %: use a smaller block', row.advice)

  def test_zero_blocks(self):
    x = gaussian().copy()
    x[4:] = 0
    row = advice(x, formats.nvfp4)
    self.assertEqual(row.rules, ('zero-blocks',))
    self.assertIn('75 %', row.advice)

  def test_no_op(self):
    x = lowbit_jax.dequantize(quantize(gaussian(), formats.mxfp4))
    row = advice(x, formats.mxfp4)
    self.assertIn('no-op', row.rules)
    self.assertEqual(row.measures.qsnr_db, math.inf)

  def test_low_qsnr(self):
    row = advice(gaussian() ** 3, formats.get('int2_channel'))
    self.assertEqual(row.rules, ('low-qsnr',))
    self.assertIn('more bits', row.advice)

  def test_every_rule_has_a_test(self):
    tested = {
      'nonfinite', 'no-op', 'lost-blocks', 'tensor-scale', 'saturation',
      'outliers', 'flush-to-zero', 'scale-precision', 'scale-range', 'padding',
      'zero-blocks', 'low-qsnr',
    }  # fmt: skip
    self.assertEqual({rule.name for rule in doctor.RULES}, tested)
    for rule in doctor.RULES:
      self.assertNotEmpty(rule.reason)


class _Box:
  """A box as Flax makes them, without being a pytree."""

  def __init__(self, value):
    self.value = value

  def unbox(self):
    return self.value


class TreeTest(parameterized.TestCase):
  def test_axes_paths_and_skipped_leaves(self):
    x = jnp.asarray(gaussian((32, 64)))
    tree = {
      'dense': {'kernel': x, 'bias': np.zeros(64, np.float32)},
      'embed': [x],
      'step': np.int32(3),
      'double': np.ones((32, 32)),
      'empty': np.zeros((0, 32), np.float32),
      'key': jax.random.key(0),
      'none': None,
    }
    report = doctor.report(tree, formats.int8_channel)
    self.assertEqual(report['dense/kernel'].axis, -2)
    self.assertEqual(report['embed/0'].axis, -1)
    skipped = {row.path: row.skipped for row in report if row.skipped}
    self.assertEqual(
      skipped,
      {
        'dense/bias': 'small vector',
        'step': 'int32 is not floating-point',
        'double': 'float64: cast it to float32 first',
        'empty': 'empty',
        'key': 'key<fry> is not floating-point',
      },
    )
    self.assertLen(report, 7)
    self.assertLen(report.to_dicts(), 7)
    self.assertEqual(report.to_dicts()[1]['path'], 'dense/kernel')
    self.assertGreater(report.to_dicts()[1]['qsnr_db'], 20)

  def test_select_and_axis(self):
    x = jnp.asarray(gaussian((32, 64)))
    tree = {'a': x, 'b': x, 'bias': jnp.asarray(gaussian((64,)))}
    report = doctor.report(
      tree,
      formats.int8_channel,
      select=lambda path, x: path != 'b',
      axis=lambda path, x: -2 if path == 'a' else -1,
    )
    self.assertEqual(report['a'].axis, -2)
    self.assertEqual(report['b'].skipped, 'not selected')
    self.assertEqual(report['bias'].skipped, '')

  def test_flax_boxes(self):
    x = jnp.asarray(gaussian((32, 64)))
    tree = {
      'linen': {'kernel': linen.Partitioned(x, names=('in', 'out'))},
      'other': {'kernel': _Box(x)},
    }
    report = doctor.report(tree, formats.int8_channel)
    self.assertEqual(report['linen/kernel'].axis, -2)
    self.assertEqual(report['other/kernel'].axis, -2)
    model = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
    report = doctor.report(nnx.state(model), formats.int8_channel)
    self.assertEqual(report['kernel'].axis, -2)
    self.assertEqual(report['bias'].skipped, 'small vector')

  def test_trees_of_qarrays(self):
    x = jnp.asarray(gaussian())
    q = quantize(x, formats.mxfp4)
    tree = {'q': q, 'boxed': linen.Partitioned(q, names=(None,)), 'x': x}
    report = doctor.report(
      tree, formats.nvfp4, reference={'q': x, 'boxed': x, 'x': x}
    )
    self.assertEqual([r.fmt for r in report], ['mxfp4', 'mxfp4', 'nvfp4'])
    self.assertEqual(report['q'].measures, report['boxed'].measures)
    lines = str(report).splitlines()
    self.assertEqual((lines[0], lines[4]), ('mxfp4', 'nvfp4'))

  def test_vectors_alone_are_measured(self):
    row = advice(gaussian((64,)), formats.int8_channel)
    self.assertEqual(row.skipped, '')

  @parameterized.named_parameters(
    ('text', lambda x: doctor.report('w', formats.mxfp4), 'not an array'),
    ('object', lambda x: doctor.report({'a': object()}, formats.mxfp4), "'a'"),
    ('no_format', lambda x: doctor.report(x), 'mxfp4'),
    ('element', lambda x: doctor.report(x, formats.e2m1), 'per_tensor'),
    ('select', lambda x: doctor.report(x, formats.mxfp4, select='a'), 'select'),
    ('integers', lambda x: doctor.report(x.astype(int), formats.mxfp4), 'cast'),
    (
      'traced',
      lambda x: jax.jit(lambda y: len(doctor.report(y, formats.mxfp4)))(x),
      'outside jit',
    ),
    (
      'struct',
      lambda x: doctor.report(
        {'w': jax.ShapeDtypeStruct(x.shape, x.dtype)}, formats.mxfp4
      ),
      'concrete',
    ),
  )
  def test_wrong_types(self, call, message):
    with self.assertRaisesRegex(TypeError, message):
      call(jnp.asarray(gaussian()))

  @parameterized.named_parameters(
    ('nothing', lambda x, q: doctor.report({}, formats.mxfp4), 'no arrays'),
    (
      'rule',
      lambda x, q: doctor.report(x, formats.mxfp4, scale_rule='absmax'),
      'floor',
    ),
    ('lone_rule', lambda x, q: doctor.report(q, scale_rule='even'), 'fmt='),
    ('axis', lambda x, q: doctor.report(x, formats.mxfp4, axis=5), 'axis=5'),
    (
      'reference_path',
      lambda x, q: doctor.report({'a': q}, reference={'b': x}),
      "no array at 'a'",
    ),
    (
      'reference_shape',
      lambda x, q: doctor.report(q, reference=x[:2]),
      'has shape',
    ),
  )
  def test_wrong_values(self, call, message):
    x = jnp.asarray(gaussian())
    with self.assertRaisesRegex(ValueError, message):
      call(x, quantize(x, formats.mxfp4))

  def test_unknown_row(self):
    report = doctor.report(jnp.asarray(gaussian()), formats.nvfp4)
    with self.assertRaisesRegex(KeyError, 'array'):
      report['kernel']


class TableTest(absltest.TestCase):
  def test_golden(self):
    x = np.zeros((2, 64), np.float32)
    x[:, :8] = 7.5, -6.5, 0.2, 0.3, 1, -4, 3, 2
    x[1] *= 2
    tree = {'layer': {'kernel': jnp.asarray(x.T), 'bias': jnp.zeros(2)}}
    report = doctor.report(tree, formats.mxfp4)
    self.assertEqual(str(report).splitlines()[:3], [
      'mxfp4',
      'tensor                  shape  bits    dB clip% flush%  sub%  top% zero%'
      ' bad crest   rho',
      'layer/kernel           [64]x2  4.25  17.0   1.6   12.5     0   3.1  50.0'
      '   0   6.7     -',
    ])  # fmt: skip
    self.assertEqual(
      str(report).splitlines()[-1], 'skipped (small vector): layer/bias'
    )

  def test_width_and_shortening(self):
    x = jnp.asarray(gaussian())
    tree = {
      'a_rather_long_encoder_name': {
        f'layers_{i}': {'self_attention': {'query_projection': {'kernel': x}}}
        for i in range(5)
      }
    }
    report = doctor.report(
      {'tree': tree, 'q': quantize(x, formats.nvfp4)}, formats.mxfp4
    )
    lines = str(report).splitlines()
    self.assertLessEqual(max(map(len, lines)), 100)
    # The layers can be told apart.
    self.assertIn('\nt/a/layers_0/s/q/kernel ', str(report))
    self.assertIn('\nt/a/layers_4/s/q/kernel ', str(report))
    self.assertIn(
      'also saturation, padding: t/a/layers_3/s/query_projection/kernel',
      str(report),
    )

  def test_only_skipped(self):
    report = doctor.report({'b': jnp.zeros(3)}, formats.mxfp4)
    self.assertEqual(str(report), 'skipped (small vector): b')


FP8 = jnp.float8_e4m3fn
X = jax.ShapeDtypeStruct((4, 64), jnp.float32)


def round_trip(x):
  return x.astype(FP8).astype(jnp.float32)


def backward_only(quantize):
  """The identity whose cotangent goes through `quantize`."""

  @jax.custom_vjp
  def f(x):
    return x

  f.defvjp(lambda x: (x, None), lambda _, g: (quantize(g),))
  return f


def scaled_round_trip(g):
  scale = jnp.max(jnp.abs(g), axis=-1, keepdims=True) / 448
  scale = jnp.where(scale == 0, 1.0, scale)
  return round_trip(g / scale) * scale


def absmean_int8(g):
  scale = jnp.mean(jnp.abs(g)) * 0.1
  codes = jnp.clip(jnp.round(g / scale), -127, 127).astype(jnp.int8)
  return codes.astype(jnp.float32) * scale


def twice(g):
  return scaled_round_trip(scaled_round_trip(g))


def scaled_then_plain(g):
  return round_trip(scaled_round_trip(g))


def scale_of_previous_row(g):
  def body(scale, row):
    new = jnp.maximum(jnp.max(jnp.abs(row)) / 448, 1e-9)
    return new, round_trip(row / scale) * scale

  return jax.lax.scan(body, jnp.float32(1), g)[1]


def late_rows(g):
  """Casts each row two iterations after it was read."""

  def body(carry, row):
    before, last = carry
    return (last, row), round_trip(before)

  zeros = jnp.zeros_like(g[0])
  return jax.lax.scan(body, (zeros, zeros), g)[1]


def int8_quantize_dequantize(x):
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
  return jnp.round(x / scale).astype(jnp.int8).astype(jnp.float32) * scale


def straight_through(x):
  return x + jax.lax.stop_gradient(int8_quantize_dequantize(x) - x)


def in_scan(f):
  def g(x):
    return jax.lax.scan(lambda c, w: (f(c) * w, None), x, jnp.ones((3, 64)))[0]

  return g


def in_cond(f):
  return lambda x: jax.lax.cond(x[0, 0] > 0, f, lambda x: x, x)


def in_shard_map(f):
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  spec = PartitionSpec('d')
  return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


def in_while(f):
  """Used in a backward pass: reverse mode does not enter a while loop."""

  def g(x):
    def body(state):
      i, x = state
      return i + 1, f(x)

    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]

  return g


WRAPPERS = {
  'plain': lambda f: f,
  'jit': jax.jit,
  'scan': in_scan,
  'cond': in_cond,
  'remat': jax.checkpoint,
  'shard_map': in_shard_map,
  'vmap': jax.vmap,
  'nested': lambda f: jax.jit(in_scan(in_cond(jax.checkpoint(f)))),
}


def audit(f, *args, **kwargs) -> doctor.Audit:
  return doctor.audit_gradients(
    lambda x, *rest: jnp.sum(jnp.sin(f(x, *rest))), X, *args, **kwargs
  )


# Formats and backward passes: each of both, and the rest.
PAIRS = (
  ('mxfp4', 'identity'),
  ('mxfp4', 'absmax'),
  ('nvfp4', 'absmax'),
  ('int8_channel', 'identity'),
  ('nf4_g64', 'trust'),
  ('uint4_g32', 'clipped'),
)
MORE_PAIRS = tuple(
  pair
  for pair in itertools.product(
    ('mxfp4', 'nvfp4', 'int8_channel', 'nf4_g64', 'uint4_g32'),
    ('identity', 'clipped', 'absmax', 'trust'),
  )
  # A zero point has no absmax backward.
  if pair not in (*PAIRS, ('uint4_g32', 'absmax'))
)


class AuditTest(parameterized.TestCase):
  @parameterized.parameters(*WRAPPERS)
  def test_plain_cast_is_found(self, name):
    result = audit(WRAPPERS[name](round_trip))
    self.assertFalse(result.ok)
    (finding,) = result.findings
    self.assertEqual(finding.kind, 'cast')
    self.assertEqual(finding.primitive, 'convert_element_type')
    self.assertEqual(finding.source, 'float32')
    self.assertEqual(finding.dtype, 'float8_e4m3fn')
    self.assertIn('doctor_test.py', finding.where)
    self.assertIn('round_trip', finding.where)
    self.assertIn('fake_quant', finding.remedy)
    with self.assertRaisesRegex(doctor.GradientAuditError, 'float8_e4m3fn'):
      result.raise_if_bad()

  @parameterized.parameters(*WRAPPERS)
  def test_fake_quant_passes(self, name):
    def f(x):
      return lowbit_jax.fake_quant(x, formats.mxfp8_e4m3)

    result = audit(WRAPPERS[name](f))
    self.assertEqual((result.findings, result.notes), ((), ()))
    self.assertIs(result.raise_if_bad(), result)

  @parameterized.parameters(*PAIRS)
  def test_every_backward_of_fake_quant_passes(self, name, backward):
    self.check_backward_of_fake_quant(name, backward)

  @parameterized.parameters(*MORE_PAIRS)
  @pytest.mark.slow
  def test_every_backward_passes_in_more_formats(self, name, backward):
    self.check_backward_of_fake_quant(name, backward)

  def check_backward_of_fake_quant(self, name, backward):
    fmt = formats.get(name)
    result = audit(lambda x: lowbit_jax.fake_quant(x, fmt, backward=backward))
    self.assertEqual((result.findings, result.notes), ((), ()))

  @parameterized.parameters(
    scaled_round_trip, absmean_int8, twice, in_while(scaled_round_trip),
    in_scan(scaled_round_trip), jax.jit(twice),
    lambda g: in_while(scaled_round_trip)(scaled_round_trip(g)),
    scale_of_previous_row,
  )  # fmt: skip
  def test_scaled_gradient_quantizer_passes(self, quantize):
    result = audit(backward_only(quantize))
    self.assertEqual((result.findings, result.notes), ((), ()))

  @parameterized.parameters(
    'mxfp4', 'nvfp4', 'mxint8', 'nf4_g64', 'uint4_g32', 'e4m3fn_tensor'
  )
  def test_own_gradient_quantizer_passes_and_restores(self, name):
    fmt = formats.get(name)
    f = backward_only(lambda g: lowbit_jax.fake_quant(g, fmt))
    result = audit(lambda x: f(f(x) * 2))
    self.assertEqual((result.findings, result.notes), ((), ()))
    # What comes out is a cotangent again: the next cast needs a scale.
    self.assertFalse(audit(lambda x: f(round_trip(x))).ok)
    # So does the cast after a product with something else.
    self.assertFalse(audit(lambda x: f(jnp.cos(round_trip(x)))).ok)

  @parameterized.named_parameters(
    ('round_trip', round_trip),
    ('constant_scale', lambda g: round_trip(g * 1024) / 1024),
    ('after_restoring', scaled_then_plain),
    ('in_while', in_while(round_trip)),
    ('late', late_rows),
    ('emulated', lambda g: lowbit_jax.round_to(g, formats.e2m1)),
    (
      'int8',
      lambda g: jnp.round(g * 10).astype(jnp.int8).astype(jnp.float32),
    ),
    ('reduce_precision', lambda g: jax.lax.reduce_precision(g, 4, 3)),
    (
      'bitcast',
      lambda g: jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(g, jnp.uint8), jnp.float32
      ),
    ),
    (
      'mask_is_no_scale',
      lambda g: round_trip(g * (jnp.max(jnp.abs(g)) > 1).astype(g.dtype)),
    ),
  )
  def test_gradient_quantizer_without_scale_is_found(self, quantize):
    self.assertLen(audit(backward_only(quantize)).findings, 1)

  def test_sixteen_bits_are_enough(self):
    self.assertTrue(audit(lambda x: x.astype(jnp.bfloat16)).ok)

  def test_scales_of_the_forward_pass_do_not_count(self):
    # The usual mistake: x / s is scaled, its cotangent is not.
    self.assertFalse(audit(scaled_round_trip).ok)

  def test_each_cast_has_a_finding(self):
    def f(x):
      y = x.astype(jnp.float8_e5m2).astype(jnp.float32)
      return round_trip(jnp.tanh(y))

    found = {finding.dtype for finding in audit(f).findings}
    self.assertEqual(found, {'float8_e4m3fn', 'float8_e5m2'})

  def test_integer_quantize_dequantize_is_found(self):
    result = audit(int8_quantize_dequantize)
    (finding,) = result.findings
    self.assertEqual((finding.kind, finding.dtype), ('cut', 'int8'))
    self.assertIn('int8_quantize_dequantize', finding.where)
    self.assertIn('no derivative', str(result))

  @parameterized.named_parameters(
    ('int4', jnp.int4), ('uint8', jnp.uint8), ('int2', jnp.int2)
  )
  def test_integer_casts(self, dtype):
    result = audit(lambda x: x + x.astype(dtype).astype(jnp.float32))
    self.assertLen(result.findings, 1)

  def test_straight_through_passes(self):
    self.assertTrue(audit(straight_through).ok)

  def test_float4_is_found(self):
    result = audit(lambda x: x.astype(jnp.float4_e2m1fn).astype(jnp.float32))
    self.assertEqual(result.findings[0].dtype, 'float4_e2m1fn')

  def test_masks_and_indices_are_no_casts(self):
    def f(x):
      mask = (x > 0).astype(jnp.int8).astype(jnp.float32)
      best = jnp.argmax(x, axis=-1).astype(jnp.uint8)
      return x * mask + jax.nn.one_hot(best, 64) * jax.nn.relu(x)

    self.assertTrue(audit(f).ok)

  def test_declared_scales(self):
    def loss(x, scale):
      @jax.custom_vjp
      def q(x, scale):
        return x

      q.defvjp(
        lambda x, s: (x, s),
        lambda s, g: (round_trip(g * s) / s, jnp.zeros_like(s)),
      )
      return jnp.sum(jnp.sin(q(x, scale)))

    scale = jnp.float32(8)
    self.assertLen(doctor.audit_gradients(loss, X, scale).findings, 1)
    declared = doctor.audit_gradients(loss, X, scale, scale_argnums=1)
    self.assertTrue(declared.ok)

  def test_narrow_result(self):
    result = doctor.audit_gradients(lambda x: x.astype(FP8), X)
    self.assertEqual([f.primitive for f in result.findings], ['output'])

  def test_zero_gradients_are_noted(self):
    def f(x, tree):
      q = quantize(x, formats.mxfp4)
      return jnp.sum(lowbit_jax.dequantize(q) * tree['w'])

    result = doctor.audit_gradients(f, X, {'w': X, 'i': 3}, argnums=(0, 1))
    self.assertTrue(result.ok)
    self.assertEqual(result.notes, ('args[0] gets no gradient: it is zero',))

  def test_kernels_are_noted(self):
    def kernel(x_ref, o_ref):
      o_ref[...] = x_ref[...] * 2

    from jax.experimental import pallas as pl

    call = pl.pallas_call(kernel, out_shape=X, interpret=True)
    result = audit(backward_only(call))
    self.assertLen(result.notes, 1)
    self.assertIn('pallas_call', result.notes[0])

  def test_models_with_products_pass(self):
    w = jnp.ones((64, 64))

    def f(x, w):
      w = lowbit_jax.fake_quant(w, formats.mxfp4, axis=-2)
      h = jax.nn.gelu(lowbit_jax.fake_quant(x, formats.mxfp4) @ w)
      h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
      return jax.nn.softmax(h)

    result = audit(f, w, argnums=(0, 1))
    self.assertEqual((result.findings, result.notes), ((), ()))

  def test_qarrays_are_arguments(self):
    q = quantize(jnp.ones((64, 64)), formats.mxfp4, axis=-2)
    result = audit(lowbit_jax.dot, q)
    self.assertEqual((result.findings, result.notes), ((), ()))

  @parameterized.named_parameters(
    ('not_callable', lambda: doctor.audit_gradients(3), TypeError, 'function'),
    (
      'argnums',
      lambda: doctor.audit_gradients(jnp.sum, X, argnums=1),
      ValueError,
      'names argument 1',
    ),
    (
      'argnums_type',
      lambda: doctor.audit_gradients(jnp.sum, X, argnums='x'),
      TypeError,
      'ints',
    ),
    (
      'integers',
      lambda: doctor.audit_gradients(jnp.sum, jnp.arange(3)),
      ValueError,
      'floating-point',
    ),
    (
      'no_result',
      lambda: doctor.audit_gradients(lambda x: 3, X),
      ValueError,
      'no gradient',
    ),
    (
      'both',
      lambda: doctor.audit_gradients(jnp.sum, X, scale_argnums=0),
      ValueError,
      'scale',
    ),
  )
  def test_wrong_input(self, call, error, message):
    with self.assertRaisesRegex(error, message):
      call()

  def test_findings_are_data(self):
    (finding,) = audit(round_trip).findings
    fields = dataclasses.asdict(finding)
    self.assertEqual(fields['shape'], (4, 64))


if __name__ == '__main__':
  absltest.main()
