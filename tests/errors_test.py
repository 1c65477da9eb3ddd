"""Mistakes raise ValueError or TypeError at trace time, with value and remedy.

Each case is called as it is and under `jax.jit`: shapes, dtypes and options are
all that checks look at, so tracing is enough to see them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import QArray, formats, numerics, transforms
from lowbit_jax.recipe import Policy, QuantSpec, Recipe
from lowbit_jax.training import optimizers, quantizers, recipes

mxfp4 = formats.mxfp4
nvfp4 = formats.nvfp4
int4_g32 = formats.get('int4_g32')
uint4_g32 = formats.get('uint4_g32')
tiles = formats.get('mxfp4_32x32')
e2m1 = formats.get('e2m1')
e4m3fn = formats.get('e4m3fn')
int4 = formats.get('int4')

quantize = lowbit_jax.quantize
fake_quant = lowbit_jax.fake_quant
round_to = lowbit_jax.round_to
KEY = jax.random.key(0)


def x(*shape, dtype=np.float32) -> np.ndarray:
  return np.ones(shape or (2, 64), dtype)


# (name, function of an array, the array, error, words of the message in order)
CASES = (
  ('format_name', lambda x: quantize(x, 'mxfp4'), x(), TypeError,
   ("fmt='mxfp4'", "formats.get('mxfp4')")),
  ('format_none', lambda x: quantize(x, None), x(), TypeError,
   ('fmt=None', 'block format')),
  ('format_is_an_element', lambda x: quantize(x, e2m1), x(), TypeError,
   ('fmt=e2m1', 'round_to', 'per_tensor')),
  ('fake_quant_with_an_element', lambda x: fake_quant(x, e2m1), x(), TypeError,
   ('fmt=e2m1', 'round_to')),
  ('fake_quant_with_a_name', lambda x: fake_quant(x, 'mxfp4'), x(), TypeError,
   ("fmt='mxfp4'", 'formats.get')),
  ('round_to_with_a_block_format', lambda x: round_to(x, mxfp4), x(),
   TypeError, ('element=', 'mxfp4', 'quantize and fake_quant')),
  ('round_to_with_a_name', lambda x: round_to(x, 'e2m1'), x(), TypeError,
   ("element='e2m1'", 'lowbit_jax.formats')),
  ('round_to_float32', lambda x: round_to(x, formats.float32), x(),
   ValueError, ('float32', '8 bits', 'x.astype')),

  ('axis_out_of_range', lambda x: quantize(x, mxfp4, axis=2), x(), ValueError,
   ('axis=2', 'rank 2')),
  ('axis_far_negative', lambda x: quantize(x, mxfp4, axis=-3), x(),
   ValueError, ('axis=-3', 'rank 2')),
  ('axis_not_an_int', lambda x: quantize(x, mxfp4, axis='last'), x(),
   TypeError, ("axis='last'", 'int')),
  ('axis_a_float', lambda x: quantize(x, mxfp4, axis=1.0), x(), TypeError,
   ('axis=1.0', 'int')),
  ('two_axes_in_descending_order', lambda x: quantize(x, mxfp4, axis=(1, 0)),
   x(), ValueError, ('axis=(1, 0)', 'adjacent', 'ascending', 'mxfp4')),
  ('axes_apart_for_lines', lambda x: quantize(x, mxfp4, axis=(0, 2)),
   x(2, 2, 64), ValueError, ('axis=(0, 2)', 'adjacent', 'mxfp4')),
  ('one_axis_for_tiles', lambda x: quantize(x, tiles, axis=0), x(),
   ValueError, ('axis=0', 'mxfp4_32x32', '2')),
  ('an_axis_twice', lambda x: quantize(x, tiles, axis=(0, -2)), x(),
   ValueError, ('axis', 'twice')),
  ('tiles_of_a_vector', lambda x: quantize(x, tiles), x(64), ValueError,
   ('x.shape=(64,)', 'mxfp4_32x32')),
  ('scalar', lambda x: quantize(x, mxfp4), x(1)[0], ValueError,
   ('x.shape=()', 'fake_quant take scalars')),

  ('integers', lambda x: quantize(x, mxfp4), x(dtype=np.int32), TypeError,
   ('int32', 'x.astype(jnp.float32)')),
  ('integers_in_fake_quant', lambda x: fake_quant(x, mxfp4),
   x(dtype=np.int32), TypeError, ('int32', 'x.astype')),
  ('integers_in_round_to', lambda x: round_to(x, e2m1), x(dtype=np.uint8),
   TypeError, ('uint8', 'x.astype')),
  ('booleans', lambda x: quantize(x, mxfp4), x(dtype=bool), TypeError,
   ('bool', 'x.astype')),
  ('complex', lambda x: quantize(x, mxfp4), x(dtype=np.complex64), TypeError,
   ('complex64', 'float32')),
  ('fp8_input', lambda x: quantize(x, mxfp4), x(dtype=jnp.float8_e4m3fn),
   TypeError, ('float8_e4m3fn', 'x.astype')),

  ('unknown_rule', lambda x: quantize(x, mxfp4, scale_rule='max'), x(),
   ValueError, ("scale_rule='max'", 'mxfp4', 'floor', 'rceil')),
  ('unknown_rounding', lambda x: quantize(x, mxfp4, rounding='up'), x(),
   ValueError, ("rounding='up'", 'nearest_even', 'stochastic')),
  ('missing_key', lambda x: quantize(x, mxfp4, rounding='stochastic'), x(),
   ValueError, ("rounding='stochastic'", 'key=jax.random.key')),
  ('missing_key_dithered', lambda x: quantize(x, int4_g32, rounding='dithered'),
   x(), ValueError, ("rounding='dithered'", 'key=jax.random.key')),
  ('missing_key_fake_quant',
   lambda x: fake_quant(x, mxfp4, rounding='stochastic'), x(), ValueError,
   ("rounding='stochastic'", 'key=')),
  ('missing_key_round_to', lambda x: round_to(x, e2m1, rounding='stochastic'),
   x(), ValueError, ("rounding='stochastic'", 'key=')),
  ('key_without_use', lambda x: quantize(x, mxfp4, key=KEY), x(), ValueError,
   ("rounding='nearest_even'", 'drop key', "'stochastic'")),
  ('key_is_a_seed',
   lambda x: quantize(x, mxfp4, rounding='stochastic', key=0), x(), TypeError,
   ('PRNG key', 'int32')),
  ('many_keys', lambda x: quantize(
    x, mxfp4, rounding='stochastic', key=jax.random.split(KEY, 3)), x(),
   TypeError, ('key', 'jax.vmap')),
  ('random_bits_zero', lambda x: quantize(
    x, mxfp4, rounding='stochastic', key=KEY, random_bits=0), x(), ValueError,
   ('random_bits=0', '1..23')),
  ('random_bits_many', lambda x: round_to(
    x, e2m1, rounding='stochastic', key=KEY, random_bits=24), x(), ValueError,
   ('random_bits=24', '1..23')),
  ('random_bits_a_float', lambda x: quantize(
    x, mxfp4, rounding='stochastic', key=KEY, random_bits=8.0), x(),
   ValueError, ('random_bits=8.0', 'int')),
  ('dithered_floats', lambda x: quantize(
    x, mxfp4, rounding='dithered', key=KEY), x(), ValueError,
   ('dithered', 'e2m1', 'stochastic')),
  ('origin_of_wrong_rank', lambda x: quantize(
    x, mxfp4, rounding='stochastic', key=KEY, origin=((0,), (4,))), x(),
   ValueError, ('origin=', 'rank 2')),
  ('origin_without_full_shape', lambda x: quantize(
    x, mxfp4, rounding='stochastic', key=KEY, origin=((0, 0), (4.0, 64))), x(),
   TypeError, ('origin', 'static ints')),
  ('overflow', lambda x: round_to(x, e4m3fn, overflow='wrap'), x(),
   ValueError, ("overflow='wrap'", 'saturate', 'special')),
  ('overflow_special_without_codes',
   lambda x: round_to(x, e2m1, overflow='special'), x(), ValueError,
   ("overflow='special'", 'e2m1', "overflow='saturate'")),

  ('backward', lambda x: fake_quant(x, mxfp4, backward='ste'), x(),
   ValueError, ("backward='ste'", 'identity', 'clipped', 'absmax', 'trust')),
  ('lsq_without_a_scale', lambda x: fake_quant(x, mxfp4, backward='lsq'), x(),
   ValueError, ("backward='lsq'", 'fake_quant_with')),
  ('tensor_scale_unwanted', lambda x: quantize(x, mxfp4, tensor_scale=1.0),
   x(), ValueError, ('mxfp4', 'tensor_scale')),
  ('tensor_scale_size', lambda x: quantize(
    x, nvfp4, tensor_scale=jnp.ones((2, 1))), x(), ValueError,
   ('tensor_scale', '(2, 1)')),
  ('scale_shape', lambda x: lowbit_jax.quantize_with(
    x, jnp.ones((2, 3)), mxfp4), x(), ValueError,
   ('scale.shape=(2, 3)', '(2, 2)', 'x.shape=(2, 64)', 'mxfp4')),
  ('zero_point_missing', lambda x: lowbit_jax.quantize_with(
    x, jnp.ones((2, 2)), uint4_g32), x(), ValueError,
   ('zero_point is needed', 'uint4_g32')),
  ('zero_point_float', lambda x: lowbit_jax.quantize_with(
    x, jnp.ones((2, 2)), uint4_g32, zero_point=jnp.full((2, 2), 0.5)), x(),
   TypeError, ('zero_point', 'float32', 'int')),

  ('dequantize_an_array', lowbit_jax.dequantize, x(), TypeError,
   ('q must be a QArray', 'got')),
  ('dot_sizes', lambda x: lowbit_jax.dot(x, quantize(x, mxfp4)), x(),
   ValueError, ('contracting', 'lhs.shape=(2, 64)', 'rhs.shape=(2, 64)')),
  ('dot_integers', lambda x: lowbit_jax.dot(x, quantize(
    jnp.ones((64, 4)), mxfp4, axis=0)), x(dtype=np.int32), TypeError,
   ('lhs has dtype int32', 'float')),
  ('einsum_form', lambda x: lowbit_jax.einsum('mk,kn', x, x), x(), ValueError,
   ("subscripts='mk,kn'", "'ab,bc->ac'")),
  ('implementation', lambda x: lowbit_jax.dot(
    x, x.T, implementation='cuda'), x(), ValueError,
   ("implementation='cuda'", 'xla')),

  ('precision', lambda x: lowbit_jax.dot_general(
    x, quantize(x, mxfp4), (((1,), (1,)), ((), ())), precision='nonsense'),
   x(), ValueError, ("precision='nonsense'", 'highest')),
  ('precision_of_arrays', lambda x: lowbit_jax.dot_general(
    x, x, (((1,), (1,)), ((), ())), precision='nonsense'), x(), ValueError,
   ("precision='nonsense'", 'highest')),
  ('precision_in_training', lambda x: lowbit_jax.qdot(
    x, x.T, recipes.get('mxfp8'), precision='nonsense'), x(), ValueError,
   ("precision='nonsense'", 'highest')),
  ('tensor_amax_of_three', lambda x: lowbit_jax.qdot(
    x, x.T, recipes.get('nvfp4'), key=KEY, tensor_amax=[1, 2, 3]), x(),
   TypeError, ('tensor_amax=[1, 2, 3]', 'a pair for x and w')),
  ('tensor_amax_of_rows', lambda x: lowbit_jax.qdot(
    x, x.T, recipes.get('nvfp4'), key=KEY, tensor_amax=(x[:, 0], None)), x(),
   ValueError, ('tensor_amax=', 'a pair for x and w')),
  ('axis_of_apply', lambda x: quantizers.apply(QuantSpec(mxfp4), x, axis=7),
   x(), ValueError, ('axis=7', 'rank 2')),
  ('axis_of_apply_to_tiles', lambda x: quantizers.apply(
    QuantSpec(tiles), x, axis=2), x(), ValueError, ('axis=2', 'rank 2')),
  ('axis_of_apply_as_a_name', lambda x: quantizers.apply(
    QuantSpec(mxfp4), x, axis='last'), x(), TypeError, ("axis='last'", 'int')),
  ('quantizer_by_name', lambda x: quantizers.apply('mxfp4', x), x(),
   TypeError, ("quantizer='mxfp4'", 'QuantSpec')),
  *((f'axis_of_{type(q).__name__}', lambda x, q=q: q(x, 7), x(), ValueError,
     ('axis=7', 'rank 2'))
    for q in (
      quantizers.DoReFaWeight(4), quantizers.DoReFaActivation(4),
      quantizers.Sign(), quantizers.Quartet(), quantizers.Quest(),
      quantizers.FixedPoint(2, 4, 'nearest_even'))),

  ('encode_integers', lambda x: numerics.encode(x, e2m1), x(dtype=np.int8),
   TypeError, ('int8', 'float32')),
  ('decode_floats', lambda x: numerics.decode(x, e2m1), x(), TypeError,
   ('codes has dtype float32', 'integers')),
  ('pack_floats', lambda x: numerics.pack(x, 4), x(), TypeError,
   ('uint8', 'float32')),
  ('pack_bits', lambda x: numerics.pack(x, 9), x(dtype=np.uint8), ValueError,
   ('bits=9', '1..8')),
  ('pack_axis', lambda x: numerics.pack(x, 4, axis=2), x(dtype=np.uint8),
   ValueError, ('axis=2', '(2, 64)')),
  ('pack_size', lambda x: numerics.pack(x, 3, axis=0), x(dtype=np.uint8),
   ValueError, ('codes.shape[0]=2', '8', 'pad')),
  ('unpack_size', lambda x: numerics.unpack(x, 3), x(dtype=np.uint8),
   ValueError, ('packed.shape[-1]=64', '3')),
)  # fmt: skip


class MistakeTest(parameterized.TestCase):
  @parameterized.named_parameters(*((c[0], *c[1:]) for c in CASES))
  def test_message(self, f, array, error, words):
    for call in (f, jax.jit(f)):
      with self.assertRaises(error) as raised:
        call(array)
      # A subclass, such as those of JAX, would not be a message of ours.
      self.assertIs(type(raised.exception), error)
      message = str(raised.exception)
      at = 0
      for word in words:
        self.assertIn(word, message[at:], message)
        at = message.index(word, at)

  def test_what_is_no_array(self):
    for thing in ('x', None, object(), {'a': 1}, mxfp4):
      for f, fmt in ((quantize, mxfp4), (fake_quant, mxfp4), (round_to, e2m1)):
        with self.assertRaisesRegex(TypeError, 'x must be an array.*got'):
          f(thing, fmt)

  def test_a_qarray_counts_as_the_array_it_stands_for(self):
    @jax.jit
    def twice(x):
      again = quantize(quantize(x, mxfp4), formats.get('int8_channel'))
      self.assertIsInstance(again, QArray)
      return lowbit_jax.dequantize(again)

    np.testing.assert_allclose(twice(x()), 1, rtol=1e-6)

  def test_dither_of_a_format_without_a_grid(self):
    q = jax.eval_shape(lambda x: quantize(x, mxfp4), x())
    with self.assertRaisesRegex(ValueError, 'uniform grid'):
      jax.eval_shape(lambda q: lowbit_jax.dequantize(q, dither=x()), q)

  def test_errors_come_before_any_computation(self):
    """Tracing with abstract values raises them too."""
    shape = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    with self.assertRaisesRegex(ValueError, 'axis=5'):
      jax.eval_shape(lambda x: quantize(x, mxfp4, axis=5), shape)

  def test_x64_inputs_are_refused(self):
    with jax.enable_x64(True):
      with self.assertRaisesRegex(TypeError, 'float64.*astype'):
        quantize(jnp.ones((2, 64), jnp.float64), mxfp4)

  def test_maps_of_impossible_bits(self):
    for bits in (0, 1, 9, -1, 4.0, '4'):
      with self.assertRaisesRegex(ValueError, f'bits={bits!r}.*2..8'):
        optimizers.dynamic_map(bits)
    for bits in (0, 9, 4.0):
      with self.assertRaisesRegex(ValueError, f'bits={bits!r}.*1..8'):
        optimizers.linear_map(bits)

  def test_floors_that_are_none(self):
    for floor in (float('nan'), float('inf'), 0, -1e-5):
      with self.assertRaisesRegex(ValueError, 'floor=.*positive'):
        transforms.smooth_quant(x(4), x(4), floor=floor)

  def test_policies_of_names(self):
    for make in (
      lambda: Policy('mxfp8'),
      lambda: Policy(None, rules=(('head', 'mxfp8'),)),
      lambda: Recipe('r', switches=((0.5, 'mxfp8'),)),
    ):
      with self.assertRaisesRegex(TypeError, "'mxfp8'.*recipes.get"):
        make()
    for name in ('first', 'last'):
      for count in (-1, 1.0, '1'):
        with self.assertRaisesRegex(ValueError, f'{name}={count!r}'):
          Policy(None, blocks=4, **{name: count})

  def test_fields_of_another_type(self):
    """What an `if` would take for true is no bool, and a text no number."""
    replace = dataclasses.replace
    for make, field in (
      (lambda: replace(e2m1, bias='1'), 'bias'),
      (lambda: replace(e2m1, signed='yes'), 'signed'),
      (lambda: replace(e2m1, exponent_bits=2.0), 'exponent_bits'),
      (lambda: replace(int4, fraction_bits='1'), 'fraction_bits'),
      (lambda: replace(mxfp4, tensor_scale='yes'), 'tensor_scale'),
      (lambda: replace(mxfp4, element='e2m1'), 'element'),
      (lambda: replace(mxfp4, scale='e8m0'), 'scale'),
      (lambda: formats.minifloat(2.0, 1, 'none'), 'exponent_bits'),
      (lambda: formats.grouped('int4', 32), 'element'),
      (lambda: QuantSpec(nvfp4, tensor_scaling='delayed'), 'tensor_scaling'),
      (lambda: Recipe('r', center='yes'), 'center'),
      (lambda: Policy(None, blocks='4'), 'blocks'),
      (lambda: recipes.get('mxfp8').at('half'), 'fraction'),
      (lambda: recipes.get('mxfp8').at(float('nan')), 'fraction'),
    ):
      with self.assertRaisesRegex((TypeError, ValueError), f'{field}=.*must'):
        make()

  def test_unknown_format_names_list_close_ones(self):
    with self.assertRaisesRegex(ValueError, "'mxfp5'.*mxfp4"):
      formats.get('mxfp5')
    with self.assertRaisesRegex(TypeError, 'string'):
      formats.get(mxfp4)


if __name__ == '__main__':
  absltest.main()
