"""Public operations through TPU kernels in interpret mode, against XLA.

The kernels have tests of their own; here it is about what leads to them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

import lowbit_jax
from lowbit_jax import formats, transforms

U = 2.0**-24
M, K, N = 5, 256, 40


def data(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def interpreted(f, *arguments, **options):
  with pltpu.force_tpu_interpret_mode():
    return jax.block_until_ready(f(*arguments, implementation='tpu', **options))


quantized = jax.jit(lowbit_jax.quantize, static_argnames=('fmt', 'axis'))
dequantized = jax.jit(lowbit_jax.dequantize)


@functools.cache
def weight(name: str, k: int = K, n: int = N):
  fmt = formats.get(name)
  axis = (-2, -1) if fmt.is_tile else -2
  return quantized(data(k, n, seed=1), fmt, axis=axis)


def assert_product(got, a, b, rounding: float = 0.0):
  """Within (k + 8) u sum |a| |b|, as tests/ops/dot_test.py derives it, and the
  rounding of weights."""
  a, b = (
    np.asarray(dequantized(v) if is_quantized(v) else v, np.float64)
    for v in (a, b)
  )
  bound = ((a.shape[-1] + 8) * U + rounding) * (np.abs(a) @ np.abs(b)) + 1e-30
  error = np.abs(np.asarray(got, np.float64) - a @ b)
  assert np.all(error <= bound), np.max(error / bound)


def is_quantized(x) -> bool:
  return isinstance(x, lowbit_jax.QArray)


class DotTest(parameterized.TestCase):
  # Weights with float scales are rounded to bfloat16 after scaling.
  def test_weights(self):
    self.check_weights('uint4_g32', 2.0**-9)

  @parameterized.parameters(
    ('mxfp6_e2m3', 0.0), ('int4_tensor', 0.0),
    ('int4_g32_float16', 2.0**-9), ('q6_k', 2.0**-9),
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_weights(self, name, rounding):
    self.check_weights(name, rounding)

  def check_weights(self, name, rounding):
    x = data(M, K).astype(jnp.bfloat16)
    q = weight(name)
    got = interpreted(lowbit_jax.dot, x, q, preferred_element_type=jnp.float32)
    assert_product(got, x, q, rounding)

  def test_float32_activations_lose_nothing(self):
    x, q = data(M, K), weight('nvfp4')
    assert_product(interpreted(lowbit_jax.dot, x, q), x, q)

  @pytest.mark.slow
  def test_ragged_reduction(self):
    x, q = data(M, 250), weight('mxfp4', 250)
    assert_product(interpreted(lowbit_jax.dot, x, q), x, q)

  def test_prepacked(self):
    x, q = data(M, K), weight('nvfp4')
    p = jax.jit(lambda q: lowbit_jax.prepack(q, implementation='tpu'))(q)
    want = interpreted(lowbit_jax.dot, x, q)
    np.testing.assert_array_equal(interpreted(lowbit_jax.dot, x, p), want)

  def test_einsum_of_several_axes(self):
    x = data(2, 64, 3, seed=2)
    q = quantized(data(3, 64, 8), formats.mxfp4, axis=1)
    f = functools.partial(lowbit_jax.einsum, 'bkh,hkn->nb')
    want = np.einsum('bkh,hkn->nb', x, dequantized(q))
    np.testing.assert_allclose(interpreted(f, x, q), want, rtol=0, atol=1e-4)

  @parameterized.parameters(
    ('fp8_1x128', 'fp8_128x128', 200),
    ('nvfp4', 'nvfp4', N),
    ('int8_channel', 'int8_channel', N),
  )
  @pytest.mark.slow
  def test_two_quantized_operands(self, left, right, n):
    self.check_two_operands(left, right, n)

  def check_two_operands(self, left, right, n):
    x = quantized(data(M, K), formats.get(left))
    q = weight(right, n=n)
    note = lowbit_jax.select_implementation(
      'dot', x, q, implementation='tpu'
    ).note
    self.assertIn('block-scaled', note)
    got = interpreted(lowbit_jax.dot, x, q)
    assert_product(got, x, q)

  def test_square_tiles_fit_both_layouts(self):
    x = quantized(data(M, K), formats.fp8_1x128)
    w = data(200, K, seed=1)
    q = quantized(w, formats.fp8_128x128, axis=(-2, -1))
    f = functools.partial(
      lowbit_jax.dot_general, dimension_numbers=(((1,), (1,)), ((), ()))
    )
    choice = lowbit_jax.select_implementation(
      'dot_general', x, q, f.keywords['dimension_numbers'],
      implementation='tpu',
    )  # fmt: skip
    self.assertIn("'nt', mode 'fp8_128'", choice.note)
    assert_product(interpreted(f, x, q), x, np.asarray(dequantized(q)).T)

  def test_gradient_of_a_ragged_reduction(self):
    x, q = data(M, 250), weight('mxfp4', 250)

    @functools.partial(jax.jit, static_argnames='implementation')
    @jax.grad
    def slope(x, implementation):
      y = lowbit_jax.dot(x, q, implementation=implementation)
      return jnp.sum(jnp.sin(y))

    got, want = interpreted(slope, x), slope(x, implementation='xla')
    np.testing.assert_allclose(got, want, atol=1e-4)


def stochastic() -> dict:
  return {'rounding': 'stochastic', 'key': jax.random.key(3)}


class QuantizeTest(parameterized.TestCase):
  def check_bits(self, name, shape, **options):
    x = data(*shape)
    quantize = functools.partial(
      lowbit_jax.quantize, fmt=formats.get(name), **options
    )
    got, want = interpreted(quantize, x), jax.jit(quantize)(x)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
    ('nvfp4', (2, 3, 50), {}),
    ('nvfp4', (3, 64), {'tensor_scale': np.float32(0.01)}),
    ('mxfp8_e4m3', (2, 3, 40), {'scale_rule': 'rceil'}),
    ('mxfp8_e4m3', (40,), {'scale_rule': 'rceil'}),
    ('mxfp8_e4m3', (40,), {}),
    ('mxfp6_e2m3', (3, 64), {}),
  )
  @pytest.mark.slow
  def test_same_bits(self, name, shape, options):
    self.check_bits(name, shape, **options)

  def test_held_tensor_scale_and_stochastic_rounding(self):
    self.check_bits(
      'nvfp4', (2, 3, 50), tensor_scale=jnp.float32(0.01), **stochastic()
    )

  @pytest.mark.slow
  def test_rule_and_stochastic_rounding(self):
    self.check_bits('mxfp4', (2, 3, 64), scale_rule='rceil', **stochastic())

  # As many signs as there are numbers, or as there are in a block, or none.
  def test_rotation(self):
    self.check_rotation('mxfp4', 128)

  @parameterized.parameters(
    ('mxfp4', None), ('nvfp4', 32), ('mxfp4', 32), ('nvfp4', None),
    ('nvfp4', 128),
  )  # fmt: skip
  @pytest.mark.slow
  def test_more_rotations(self, name, signs):
    self.check_rotation(name, signs)

  def check_rotation(self, name, signs):
    fmt, x = formats.get(name), data(24, 128)
    rotation = transforms.Hadamard(32)
    if signs is not None:
      signs = np.sign(data(signs, seed=1))
      rotation = transforms.Hadamard(32, -1, jnp.asarray(signs))

    @functools.partial(jax.jit, static_argnames='implementation')
    def quantize(x, implementation):
      q = lowbit_jax.quantize(
        x, fmt, rotation=rotation, implementation=implementation
      )
      return q.codes, lowbit_jax.dequantize(q)

    @jax.jit
    def want(x):
      q = lowbit_jax.quantize(rotation.apply(x), fmt)
      return *quantize(x, 'xla'), q.codes

    _, got = interpreted(quantize, x)
    codes, numbers, rotated_codes = want(x)
    np.testing.assert_array_equal(codes, rotated_codes)
    # Sums of another order: an element next to a tie may go either way.
    self.assertLess(np.mean(np.asarray(got) != np.asarray(numbers)), 0.01)

  def test_rotations_fit(self):
    x = data(4, 96)
    for rotation, why in (
      (transforms.Hadamard(64), 'multiple of block=64'),
      (transforms.Hadamard(32, -2), 'must be the block axis'),
      (transforms.Hadamard(32, -1, jnp.ones(48)), 'fit neither'),
    ):
      with self.assertRaisesRegex(ValueError, why):
        lowbit_jax.quantize(x, formats.mxfp4, rotation=rotation)
    with self.assertRaisesRegex(TypeError, 'must be a transforms.Hadamard'):
      lowbit_jax.quantize(x, formats.mxfp4, rotation=32)

  def test_refusals(self):
    for name, axis, why in (
      ('mxfp4', -2, 'along'),
      ('int8_channel', -1, 'no blocks'),
      ('uint4_g32', -1, 'zero point'),
    ):
      with self.assertRaisesRegex(NotImplementedError, why):
        lowbit_jax.quantize(
          data(32, 32), formats.get(name), axis=axis, implementation='tpu'
        )


if __name__ == '__main__':
  absltest.main()
