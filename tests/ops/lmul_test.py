"""lmul, lmul_dot and lmul_attention."""

import functools
import math
from unittest import mock

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.ops import _lmul
from lowbit_jax.ops._lmul import lmul, lmul_attention, lmul_dot
from lowbit_pallas.arith import lmul as arith

U = 2.0**-24
FORMATS = (formats.float32, formats.bfloat16, formats.e4m3fn, formats.e5m2)
OPTIONS = (
  {},
  {'reading': 'formula'},
  {'fmt': formats.bfloat16},
  {'fmt': formats.e4m3fn},
  {'fmt': formats.e5m2, 'reading': 'formula'},
  {'mantissa_bits': 3},
)


# Under jit; the tests of jit and of derivatives call them without.
_OPTIONS = 'fmt', 'mantissa_bits', 'reading'
multiply = jax.jit(lmul, static_argnames=_OPTIONS)
dot = jax.jit(lmul_dot, static_argnames=_OPTIONS)
attend = jax.jit(lmul_attention, static_argnames=(*_OPTIONS, 'is_causal'))


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _exact_sum(x, y, axis: int, **options) -> tuple[np.ndarray, np.ndarray]:
  """The float64 sum of L-Mul products, and that of their magnitudes."""
  products = np.asarray(multiply(x, y, **options), np.float64)
  return products.sum(axis), np.abs(products).sum(axis)


class ElementsTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, 1.0625, 1.0625),
    (1.5, 1.5, 2.125, 2.0625),
    (1.25, 1.25, 1.5625, 1.5625),
    (1.75, 1.75, 3.125, 2.5625),
    (-3, 5, -14.5, -14.5),
    (2, 2, 4.25, 4.25),
    (0, 5, 0, 0),
    (1e30, -1e30, -3.4028235e38, -3.4028235e38),
    (1e-30, 1e-30, 0, 0),
    (1e-45, 1e38, 0, 0),
    (math.inf, -2, -math.inf, -math.inf),
    (math.inf, 0, math.nan, math.nan),
    (math.nan, 1, math.nan, math.nan),
  )
  def test_by_hand(self, x, y, integer, formula):
    x, y = np.float32(x), np.float32(y)
    want = np.float32([integer, formula])
    got = [multiply(x, y, reading=reading) for reading in arith.READINGS]
    np.testing.assert_array_equal(got, want)

  def test_worst_case(self):
    # Where the mantissas sum to the carry: 2 against (47/32)^2.
    x = jnp.float32(47 / 32)
    self.assertEqual(lmul(x, x), 2)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 2, (2, 200_000)).astype(np.float32)
    error = np.asarray(lmul(x, y), np.float64) / (x.astype(float) * y) - 1
    bound = 1 - 2 * (32 / 47) ** 2
    self.assertLessEqual(np.abs(error).max(), bound)
    self.assertGreater(np.abs(error).max(), bound - 0.002)

  @parameterized.parameters(*FORMATS)
  def test_rounds_operands_to_the_format(self, fmt):
    x, y = _normal(1, 2, 1000)
    layout = _lmul._LAYOUTS[fmt]

    @jax.jit
    def wanted(x, y):
      a, b = (arith.to_codes(v, layout) for v in (x, y))
      return arith.from_codes(arith.multiply(a, b, layout), layout)

    want = wanted(x, y)
    np.testing.assert_array_equal(multiply(x, y, fmt=fmt), want)

  def test_narrow_float32_is_a_narrow_format(self):
    # Inside the range of E4M3, its codes are float32 with 3 mantissa bits.
    x, y = np.exp2(np.random.default_rng(2).uniform(-2, 2, (2, 1000)))
    x, y = x.astype(np.float32), y.astype(np.float32)
    for reading in arith.READINGS:
      wide = multiply(x, y, mantissa_bits=3, reading=reading)
      narrow = multiply(x, y, fmt=formats.e4m3fn, reading=reading)
      if reading == 'formula':  # a format of 3 bits rounds the product
        wide = jax.jit(lowbit_jax.round_to, static_argnums=1)(
          wide, formats.e4m3fn
        )
      np.testing.assert_array_equal(wide, narrow)

  def test_dtypes(self):
    x, y = _normal(3, 2, 100)
    narrow = multiply(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    self.assertEqual(narrow.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      np.asarray(narrow, np.float32), multiply(x, y, fmt=formats.bfloat16)
    )
    mixed = multiply(x.astype(jnp.bfloat16), y)
    self.assertEqual(mixed.dtype, jnp.float32)
    half = multiply(x.astype(jnp.float16), y.astype(jnp.float16))
    self.assertEqual(half.dtype, jnp.float16)

  def test_jit_and_vmap_give_the_same_bits(self):
    self.check_jit_and_vmap(**OPTIONS[4])

  @parameterized.parameters(*OPTIONS[:4], OPTIONS[5])
  @pytest.mark.slow
  def test_jit_and_vmap_of_more_options(self, **options):
    self.check_jit_and_vmap(**options)

  def check_jit_and_vmap(self, **options):
    x, y = _normal(4, 2, 7, 9)
    run = functools.partial(lmul, **options)
    want = run(x, y)
    for wrapped in (jax.jit(run), jax.vmap(run)):
      np.testing.assert_array_equal(wrapped(x, y), want)

  def test_derivative_is_that_of_the_product(self):
    self.check_derivative(**OPTIONS[4])

  @parameterized.parameters(*OPTIONS[:4], OPTIONS[5])
  @pytest.mark.slow
  def test_more_derivatives_are_those_of_the_product(self, **options):
    self.check_derivative(**options)

  def check_derivative(self, **options):
    x, y, dx, dy = _normal(5, 4, 3, 5)
    y, dy = y[:1], dy[:1]  # broadcasts
    run = functools.partial(lmul, **options)

    @jax.jit
    def derivatives(x, y, dx, dy):
      gradients = jax.grad(lambda x, y: run(x, y).sum(), (0, 1))(x, y)
      second = jax.grad(jax.grad(lambda x: run(x, x)))(jnp.float32(3.0))
      return jax.jvp(run, (x, y), (dx, dy)), gradients, second

    (out, tangent), gradients, second = derivatives(x, y, dx, dy)
    np.testing.assert_array_equal(out, multiply(x, y, **options))
    exact = dx * y + x * dy
    np.testing.assert_allclose(tangent, exact, rtol=0, atol=1e-6)
    exact = np.broadcast_to(y, x.shape), x.sum(0, keepdims=True)
    for got, want in zip(gradients, exact, strict=True):
      np.testing.assert_allclose(got, want, rtol=8 * U)
    self.assertEqual(second, 2)


SHAPES = (
  ((5, 33), (33, 7)), ((2, 1, 4, 10), (3, 10, 6)), ((1, 1), (1, 1)),
)  # fmt: skip


class DotTest(parameterized.TestCase):
  @parameterized.parameters(
    (OPTIONS[5], 100, SHAPES[1]),
    (OPTIONS[4], 1 << 20, SHAPES[0]),
  )
  def test_is_the_sum_of_products(self, options, tile, shapes):
    self.check_sum(options, tile, shapes)

  @parameterized.product(options=OPTIONS, tile=(1, 100, 1 << 20), shapes=SHAPES)
  @pytest.mark.slow
  def test_every_sum_of_products(self, options, tile, shapes):
    self.check_sum(options, tile, shapes)

  def check_sum(self, options, tile, shapes):
    x, y = (_normal(i, *shape) for i, shape in enumerate(shapes))
    how = {'fmt': None, 'mantissa_bits': None, 'reading': 'integer', **options}
    how = _lmul._Options(**how).for_operands(x, y)
    with mock.patch.object(_lmul, '_TILE', tile):
      got = jax.jit(lambda x, y: _lmul._dot(x, y, how))(x, y)
    want, scale = _exact_sum(x[..., None], y[..., None, :, :], -2, **options)
    depth = x.shape[-1]
    self.assertEqual(got.shape, want.shape)
    np.testing.assert_array_less(np.abs(got - want), depth * U * scale + 1e-30)

  def test_memory_is_a_tile(self):
    def sizes(jaxpr):
      for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in eqn.params.values():
          if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
            yield from sizes(getattr(inner, 'jaxpr', inner))

    x, y = np.zeros((256, 4096), np.float32), np.zeros((4096, 256), np.float32)
    jaxpr = jax.make_jaxpr(lmul_dot)(x, y).jaxpr
    self.assertEqual(max(sizes(jaxpr)), 1 << 20)  # operands have as many
    compiled = jax.jit(lmul_dot).lower(x, y).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(temporary, 6 * 4 << 20)  # codes of x and y, slabs, a tile

  def test_nothing(self):
    x = jnp.zeros((3, 0))
    np.testing.assert_array_equal(lmul_dot(x, x.T), np.zeros((3, 3)))
    self.assertEqual(lmul_dot(x.T, jnp.zeros((3, 2))).shape, (0, 2))

  def test_infinity_and_nan_stay_in_their_row(self):
    x = np.ones((3, 5), np.float32)
    x[0, 1], x[1, 2] = np.inf, np.nan
    y = dot(x, np.ones((5, 2), np.float32))
    np.testing.assert_array_equal(
      y, [[np.inf] * 2, [np.nan] * 2, [5 * 1.0625] * 2]
    )

  def test_bfloat16_is_rounded_once(self):
    x, y = (_normal(i, 64, 64).astype(jnp.bfloat16) for i in (0, 1))
    got = dot(x, y)
    wide = dot(x.astype(np.float32), y.astype(np.float32), fmt=formats.bfloat16)
    np.testing.assert_array_equal(got, np.asarray(wide).astype(jnp.bfloat16))

  def test_derivative_is_that_of_the_product(self):
    self.check_derivative(**OPTIONS[0])

  @parameterized.parameters(*OPTIONS[1:])
  @pytest.mark.slow
  def test_more_derivatives_are_those_of_the_product(self, **options):
    self.check_derivative(**options)

  def check_derivative(self, **options):
    x, dx = _normal(6, 2, 2, 3, 5)
    y, dy = _normal(7, 2, 5, 4)  # broadcasts
    run = functools.partial(lmul_dot, **options)
    cotangent = _normal(8, 2, 3, 4)

    @jax.jit
    def derivatives(x, y, dx, dy):
      return jax.jvp(run, (x, y), (dx, dy)), jax.vjp(run, x, y)[1](cotangent)

    (out, tangent), gradients = derivatives(x, y, dx, dy)
    np.testing.assert_array_equal(out, dot(x, y, **options))
    want = dx @ y + x @ dy
    np.testing.assert_allclose(tangent, want, rtol=0, atol=1e-5)
    exact = (
      (cotangent @ y.swapaxes(-1, -2)).reshape(x.shape),
      np.sum(x.swapaxes(-1, -2) @ cotangent, 0).reshape(y.shape),
    )
    for got, want in zip(gradients, exact, strict=True):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def _attention(q, k, v, live, **options):
  """The same in float64 around the products."""
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
  logits, _ = _exact_sum(q[..., :, None, :], k[..., None, :, :], -1, **options)
  logits = np.where(live, logits / math.sqrt(q.shape[-1]), -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out, _ = _exact_sum(
    weights.astype(np.float32)[..., None], v[..., None, :, :], -2, **options
  )
  return out.swapaxes(1, 2)


@jax.jit
def _derivatives(mask, arrays, tangents, cotangent):
  """The attention of three arrays, forward and reverse."""
  run = functools.partial(lmul_attention, mask=mask)
  out, tangent = jax.jvp(run, tuple(arrays), tuple(tangents))
  return out, tangent, jax.vjp(run, *arrays)[1](cotangent)


class AttentionTest(parameterized.TestCase):
  def test_against_float64(self):
    self.check_attention({'reading': 'formula'}, 'both')

  @parameterized.product(
    options=({}, {'reading': 'formula'}, {'mantissa_bits': 23}),
    case=('plain', 'causal', 'mask', 'both'),
  )
  @pytest.mark.slow
  def test_every_case_against_float64(self, options, case):
    self.check_attention(options, case)

  def check_attention(self, options, case):
    q, v = _normal(9, 2, 6, 3, 8), _normal(10, 2, 6, 3, 4)
    k = _normal(11, 2, 6, 3, 8)
    mask = np.random.default_rng(12).random((2, 1, 6, 6)) < 0.7
    mask |= np.eye(6, dtype=bool)
    live = np.ones((6, 6), bool)
    arguments = {}
    if case in ('causal', 'both'):
      arguments['is_causal'], live = True, np.tri(6, dtype=bool) & live
    if case in ('mask', 'both'):
      arguments['mask'], live = mask, live & mask
    got = attend(q, k, v, **arguments, **options)
    want = _attention(q, k, v, live, **options)
    # Logits are off by 8 u sum |q k| / sqrt(8), below 60 u; weights by that and
    # 16 u of the softmax; L-Mul doubles a relative error at most.
    self.assertLess(np.abs(got - want).max(), 200 * U * np.abs(v).max())

  def error(self, **options) -> float:
    """Relative to the exact attention."""
    q, k, v = _normal(13, 3, 2, 24, 2, 8)
    exact = jax.jit(jax.nn.dot_product_attention, static_argnames='is_causal')
    exact = np.asarray(exact(q, k, v, is_causal=True))
    got = attend(q, k, v, is_causal=True, **options)
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)

  @pytest.mark.slow
  def test_is_near_the_exact_one(self):
    self.assertLess(self.error(), 0.05)

  @pytest.mark.slow
  def test_the_reading_and_the_bits_matter(self):
    self.assertLess(self.error(), self.error(reading='formula'))
    bits = 5, 2
    self.assertLess(*(self.error(mantissa_bits=n) for n in bits))

  def test_masked_rows_are_zero(self):
    mask = np.ones((5, 5), bool)
    mask[1] = False
    arrays = _normal(14, 3, 1, 5, 2, 8)
    out, _, gradients = _derivatives(mask, arrays, arrays, arrays[0])
    self.assertEqual(np.abs(out[0, 1]).max(), 0)
    for gradient in gradients:
      self.assertTrue(np.isfinite(gradient).all())

  def test_forward_and_reverse_derivatives_agree(self):
    arrays, tangents = _normal(15, 2, 3, 1, 5, 2, 8)
    dq, dk, dv = tangents
    cotangent = _normal(16, *dv.shape)
    mask = np.tri(5, dtype=bool)
    _, tangent, backward = _derivatives(mask, arrays, tangents, cotangent)
    left = np.vdot(tangent, cotangent)
    right = sum(map(np.vdot, backward, (dq, dk, dv)))
    self.assertAlmostEqual(left, right, delta=1e-4)
    self.assertGreater(abs(left), 0.1)

  def test_dtype_of_the_query(self):
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.bfloat16)
    self.assertEqual(jax.eval_shape(lmul_attention, x, x, x).dtype, x.dtype)

  @pytest.mark.slow
  def test_narrow_queries_are_rounded_once(self):
    q, k, v = _normal(17, 3, 1, 4, 1, 8).astype(jnp.bfloat16)
    out = attend(q, k, v)
    self.assertEqual(out.dtype, jnp.bfloat16)
    wide = (a.astype(np.float32) for a in (q, k, v))
    wide = np.asarray(attend(*wide, fmt=formats.bfloat16))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


class ErrorsTest(parameterized.TestCase):
  X = jnp.ones((2, 2))

  @parameterized.parameters(
    ({'fmt': formats.e2m1}, ValueError, 'fmt=.*float32, bfloat16, e4m3fn'),
    ({'fmt': 'e4m3fn'}, ValueError, "fmt='e4m3fn'"),
    ({'mantissa_bits': 0}, ValueError, 'mantissa_bits=0.*1 ... 23'),
    ({'mantissa_bits': 2.0}, TypeError, 'mantissa_bits=2.0'),
    (
      {'fmt': formats.e5m2, 'mantissa_bits': 3},
      ValueError,
      'mantissa_bits=3.*1 ... 2 of e5m2',
    ),
    ({'reading': 'exact'}, ValueError, "reading='exact'.*integer"),
  )
  def test_options(self, options, error, message):
    for run in (lmul, lmul_dot):
      with self.assertRaisesRegex(error, message):
        run(self.X, self.X, **options)
    x = jnp.ones((1, 2, 1, 2))
    with self.assertRaisesRegex(error, message):
      lmul_attention(x, x, x, **options)

  def test_operands(self):
    with self.assertRaisesRegex(TypeError, 'x has dtype int32'):
      lmul(jnp.ones(2, jnp.int32), self.X)
    with self.assertRaisesRegex(ValueError, r'x.shape=\(3,\).*broadcast'):
      lmul(jnp.ones(3), self.X)
    with self.assertRaisesRegex(ValueError, r'\(\.\.\., m, k\)'):
      lmul_dot(self.X, jnp.ones((3, 2)))
    with self.assertRaisesRegex(ValueError, r'\(\.\.\., m, k\)'):
      lmul_dot(self.X, jnp.ones(2))
    with self.assertRaisesRegex(ValueError, 'broadcast'):
      lmul_dot(jnp.ones((2, 2, 2)), jnp.ones((3, 2, 2)))

  def test_attention(self):
    x = np.ones((1, 4, 2, 8), np.float32)
    with self.assertRaisesRegex(ValueError, 'add axes'):
      lmul_attention(x[0], x, x)
    with self.assertRaisesRegex(ValueError, 'repeat them'):
      lmul_attention(x, x[:, :, :1], x[:, :, :1])
    with self.assertRaisesRegex(TypeError, 'mask.dtype'):
      lmul_attention(x, x, x, mask=jnp.ones((4, 4)))
    with self.assertRaisesRegex(ValueError, 'mask.shape'):
      lmul_attention(x, x, x, mask=jnp.ones((3, 4), bool))


if __name__ == '__main__':
  absltest.main()
