"""The training product against its definition, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.ops import _qdot
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import quantizers, recipes
from lowbit_pallas.arith import hadamard

U = 2.0**-24
M, K, N = 50, 128, 64
KEY = jax.random.key(7)


def data(*shape, seed: int = 0, dtype=jnp.float32) -> jax.Array:
  x = np.random.RandomState(seed).randn(*shape).astype(np.float32)
  return jnp.asarray(x, dtype)


def operands():
  """x, w and dy."""
  return data(M, K), data(K, N, seed=1), data(M, N, seed=2)


# What surrounds the quantizers is tested with one that compiles fast.
SPEC = QuantSpec(formats.get('int4_g32'))
PLAIN = Recipe('test', *[GemmSpec(SPEC)] * 3)


def eager(recipe: Recipe, x, w, dy, key=KEY, **options):
  """y, dx, dw."""
  f = functools.partial(lowbit.qdot, recipe=recipe, key=key, **options)
  y, pull = jax.vjp(lambda x, w: f(x, w), x, w)
  return y, *pull(dy)


def run(recipe: Recipe, x, w, dy, key=KEY, **options):
  """The same by one program for each recipe, which the tests share."""
  return _run(recipe, x, w, dy, key, **options)


_run = jax.jit(eager, static_argnums=0)
apart = jax.jit(_qdot.apart, static_argnums=1)


def quantized(t, spec, axis: int, key, rotation=(None, 'none', None)):
  """A site's values in float64, by the public fake_quant.

  `rotation` is the size of the blocks, the signs and their key.
  """
  if spec is None and not rotation[0]:
    return np.asarray(t, np.float64)
  y = np.asarray(_quantized(t, spec, axis, key, *rotation), np.float64)
  return y / getattr(spec, 'prescale', 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 4, 5))
def _quantized(t, spec, axis: int, key, block, signs, signs_key):
  """The same in float32, times the prescale."""
  t = rotated(t, axis, block, signs, signs_key) if block else t
  if spec is None:
    return t
  if not isinstance(spec, QuantSpec):
    return spec(t, axis, key)
  axis = (axis, 1 - axis) if spec.fmt.is_tile else axis
  options = {
    'axis': axis,
    'rounding': spec.rounding,
    'random_bits': spec.random_bits,
    'key': key if spec.needs_key else None,
  }
  t = jnp.float32(t)
  if spec.prescale == 1:
    return lowbit.fake_quant(t, spec.fmt, scale_rule=spec.scale_rule, **options)
  q = lowbit.quantize(t, spec.fmt, axis=axis, scale_rule=spec.scale_rule)
  return lowbit.fake_quant_with(t * spec.prescale, q.scale, spec.fmt, **options)


def rotated(t, axis: int, block: int, signs: str, key):
  """A site's operand after the rotation of its product, in float32."""
  pad = [(0, -n % block if i == axis else 0) for i, n in enumerate(t.shape)]
  t = jnp.pad(t, pad)
  words = jnp.array([0x243F6A88, 0x85A308D3], jnp.uint32)
  if signs == 'per_call':
    words = jax.random.key_data(key)
  if signs != 'none':
    signs = hadamard.random_signs(words, block)
    signs = jnp.tile(signs, t.shape[axis] // block)
    t = t * jnp.expand_dims(signs, 1 - axis)
  return hadamard.hadamard(t, block, axis)


@functools.cache
def keys_of(which: int):
  """Keys of both operands and of the signs, of one of the three products."""
  return [jax.random.fold_in(KEY, 3 * which + i) for i in range(3)]


def product(gemm: GemmSpec, which: int, a, axis_a: int, b, axis_b: int):
  """sum of products, and of their magnitudes, of two sites in float64."""
  keys = keys_of(which)
  rotation = gemm.hadamard, gemm.signs, keys[2]
  a = quantized(a, gemm.lhs, axis_a, keys[0], rotation)
  b = quantized(b, gemm.rhs, axis_b, keys[1], rotation)
  a = a if axis_a else a.T
  b = b.T if axis_b else b
  return a @ b, np.abs(a) @ np.abs(b)


def assert_products(recipe: Recipe):
  """All three within the rounding of float32 sums: (k + 8) u sum |a| |b|."""
  x, w, dy = operands()
  y, dx, dw = run(recipe, x, w, dy)
  for got, which, gemm, args in (
    (y, 0, recipe.fwd, (x, 1, w, 0)),
    (dx, 1, recipe.dgrad, (dy, 1, w, 1)),
    (dw, 2, recipe.wgrad, (x, 0, dy, 0)),
  ):
    want, size = product(gemm, which, *args)
    bound = (args[0].shape[args[1]] + 8) * U * size + 1e-30
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= bound), (which, np.max(error / bound))


# Random bits, and signs of every call, in the backward products.
DRAWN = dataclasses.replace(SPEC, rounding='stochastic')
RANDOM = Recipe(
  'test',
  GemmSpec(SPEC),
  GemmSpec(DRAWN, None, 32, 'per_call'),
  GemmSpec(DRAWN, DRAWN, 32, 'per_call'),
)
# Blocks of 32 do not divide the tokens.
PADDED = Recipe('test', wgrad=GemmSpec(SPEC, SPEC, 32, 'fixed'))
CENTERED = dataclasses.replace(PLAIN, center=True)


class DefinitionTest(parameterized.TestCase):
  def test_random_bits_and_signs(self):
    assert_products(RANDOM)

  @parameterized.parameters(
    'mxfp4_sr_rht', 'fp8_current', 'mxfp4_nv', 'nvfp4', 'fp8_block',
    'switchback', 'mxfp4_bwd', 'mxfp4_rotated', 'mxfp4_row_scaled',
  )  # fmt: skip
  @pytest.mark.slow
  def test_recipes(self, name):
    assert_products(recipes.get(name))

  @pytest.mark.slow
  def test_rows_with_scales_of_their_own(self):
    scaled = quantizers.RowScaled(SPEC)
    assert_products(Recipe('test', GemmSpec(scaled, scaled)))

  def test_centered(self):
    self.assert_centered(CENTERED)

  @pytest.mark.slow
  def test_centered_recipe(self):
    self.assert_centered(recipes.get('mxfp4_centered'))

  def assert_centered(self, recipe):
    x, w, dy = operands()
    x = np.asarray(x) + np.float32(1)
    centered, ((mean,),) = apart(x, recipe)
    mean, wide = np.float64(mean), np.float64(w)
    dy = np.asarray(dy)
    y, dx, dw = run(recipe, x, w, dy)

    want, size = product(recipe.fwd, 0, centered, 1, w, 0)
    bound = (K + 8) * U * (size + np.abs(mean) @ np.abs(wide))
    np.testing.assert_array_less(np.abs(y - (want + mean @ wide)), bound)

    total = np.asarray(dy, np.float64).sum(0, keepdims=True)
    want, size = product(recipe.wgrad, 2, centered, 0, dy, 0)
    bound = (M + 8) * U * (size + np.abs(mean).T @ np.sum(np.abs(dy), 0)[None])
    np.testing.assert_array_less(np.abs(dw - (want + mean.T @ total)), bound)

    g, size = product(recipe.dgrad, 1, dy, 1, w, 1)
    want = g - g.mean(0) + total @ wide.T / M
    size = size + size.mean(0) + np.abs(total) @ np.abs(wide).T / M
    bound = (M + N + 8) * U * size
    np.testing.assert_array_less(np.abs(dx - want), bound)

  def test_no_tokens(self):
    """An expert that nobody visits."""
    recipe = Recipe('test', center=True, principal=2)
    x, _, dy = (t[:0] for t in operands())
    _, dx, dw = run(recipe, x, operands()[1], dy)
    self.assertEqual(dx.shape, x.shape)
    np.testing.assert_array_equal(dw, 0)

  def test_centering_helps_where_the_mean_is_large(self):
    self.assert_centering_helps(CENTERED)

  @pytest.mark.slow
  def test_centering_helps_a_recipe(self):
    self.assert_centering_helps(recipes.get('mxfp4_centered'))

  def assert_centering_helps(self, recipe):
    x, w = data(M, K) + 4, data(K, N, seed=1)
    exact = np.float64(x) @ np.float64(w)
    centered, _, _ = run(recipe, x, w, data(M, N, seed=2))
    plain, _ = product(recipe.fwd, 0, x, 1, w, 0)
    errors = [np.linalg.norm(y - exact) for y in (centered, plain)]
    self.assertLess(errors[0], 0.5 * errors[1])

  def test_principal(self):
    self.assert_principal(PLAIN, True)

  @pytest.mark.slow
  def test_principal_without_a_mean(self):
    self.assert_principal(PLAIN, False)

  @parameterized.parameters(False, True)
  @pytest.mark.slow
  def test_principal_of_a_recipe(self, center):
    self.assert_principal(recipes.get('mxfp4_rotated'), center)

  def assert_principal(self, recipe, center):
    recipe = dataclasses.replace(recipe, center=center, principal=3)
    # Four directions well above the noise, none of them an axis.
    x = data(M, 4, seed=3) @ np.diag([9.0, 8.0, 7.0, 1.0]) @ data(4, K, seed=4)
    x = jnp.asarray(x + data(M, K) + 2, jnp.float32)
    w, dy = data(K, N, seed=1), data(M, N, seed=2)
    rest, terms = apart(x, recipe)
    exact = sum(functools.reduce(np.matmul, map(np.float64, t)) for t in terms)
    tolerance = 64 * U * np.abs(x).max()
    np.testing.assert_allclose(np.float64(rest) + exact, x, atol=tolerance)

    p = np.float64(terms[-1][1].T)
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=64 * U)
    relative = np.float64(x) - center * np.float64(x).mean(0)
    left = np.linalg.norm(relative - relative @ p @ p.T) ** 2
    least = np.sum(np.linalg.svd(relative, compute_uv=False)[3:] ** 2)
    self.assertLess(left, 1.02 * least)

    y, dx, dw = run(recipe, x, w, dy)
    w, dy = np.float64(w), np.float64(dy)
    # |a| |p| for a = x P has entries up to sqrt(K) times larger than |a p|.
    slack = (K + M) * U * K**0.5
    want, size = product(recipe.fwd, 0, rest, 1, w, 0)
    bound = slack * (size + np.abs(exact) @ np.abs(w))
    np.testing.assert_array_less(np.abs(y - (want + exact @ w)), bound)

    want, size = product(recipe.wgrad, 2, rest, 0, dy, 0)
    bound = slack * (size + np.abs(exact).T @ np.abs(dy))
    np.testing.assert_array_less(np.abs(dw - (want + exact.T @ dy)), bound)

    # With q the quantized product, P sees the plain one, and so does the mean.
    q, size = product(recipe.dgrad, 1, dy, 1, w, 1)
    want = q + (dy @ w.T - q) @ p @ p.T
    if center:
      want += np.mean(dy @ w.T - want, 0)
    bound = slack * np.max(size + np.abs(dy) @ np.abs(w).T)
    np.testing.assert_array_less(np.abs(dx - want), bound)

  def test_principal_directions_of_many_tokens(self):
    # Found from some of them, they serve the others of the same distribution.
    recipe = Recipe('split', principal=2)
    x = np.float32([5, 4]) * data(4096, 2, seed=3) @ data(2, K, seed=4)
    rest, _ = apart(jnp.asarray(x + data(4096, K)), recipe)
    self.assertLess(np.mean(np.square(rest)), 1.02)

  def test_principal_of_few_or_no_tokens(self):
    self.check_principal_of(2)

  @parameterized.parameters(0, M)
  @pytest.mark.slow
  def test_principal_of_no_tokens_or_zeros(self, m):
    self.check_principal_of(m)

  def test_principal_of_zeros(self):
    recipe = dataclasses.replace(PLAIN, center=True, principal=3)
    x, (_, w, dy) = np.zeros((M, K), np.float32), operands()
    y, dx, dw = run(recipe, x, w, dy)
    np.testing.assert_array_equal(y, 0)
    self.assertTrue(np.isfinite(dx).all() and np.isfinite(dw).all())

  def check_principal_of(self, m):
    recipe = Recipe('test', GemmSpec(SPEC), principal=4)
    few, w = np.asarray(data(2, K, seed=1)), np.asarray(data(K, N))
    for x in (few if m == 2 else np.zeros((m, K), few.dtype),):
      y, dx, dw = run(recipe, x, w, np.ones((len(x), N), x.dtype))
      np.testing.assert_allclose(y, x @ w, atol=1e-3)
      self.assertTrue(np.isfinite(dx).all() and np.isfinite(dw).all())

  def test_more_directions_than_there_are(self):
    recipe = dataclasses.replace(recipes.get('mxfp4_rtn'), principal=K + 1)
    with self.assertRaisesRegex(ValueError, f'principal={K + 1} .* use fewer'):
      lowbit.qdot(data(M, K), data(K, N), recipe)

  @pytest.mark.slow
  def test_signs_of_every_call(self):
    recipe = Recipe('test', *[GemmSpec(SPEC, None, 32, 'per_call')] * 3)
    assert_products(recipe)
    other = run(recipe, *operands(), key=jax.random.key(8))
    self.assertFalse(np.array_equal(other[0], run(recipe, *operands())[0]))

  def test_nothing_quantized_is_the_plain_product(self):
    x, w, dy = data(3, 5), data(5, 4, seed=1), data(3, 4, seed=2)
    y, pull = jax.vjp(jnp.matmul, x, w)
    for got, want in zip(
      run(Recipe('none'), x, w, dy), (y, *pull(dy)), strict=True
    ):
      np.testing.assert_allclose(got, want, rtol=0, atol=16 * U * 5 * 9)

  def test_leading_axes_are_tokens(self):
    x, w, dy = operands()
    folded = [np.asarray(t).reshape(2, 25, -1) for t in (x, dy)]
    y, dx, dw = map(np.asarray, run(PADDED, folded[0], w, folded[1]))
    flat = run(PADDED, x, w, dy)
    np.testing.assert_array_equal(y.reshape(M, N), flat[0])
    np.testing.assert_array_equal(dx.reshape(M, K), flat[1])
    np.testing.assert_array_equal(dw, flat[2])

  def test_without_jit(self):
    spec = QuantSpec(formats.get('int8_channel'))
    recipe = Recipe('test', GemmSpec(spec))
    x, w, dy = operands()
    got, want = eager(recipe, x, w, dy), run(recipe, x, w, dy)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_tokens_are_padded_with_zeros(self):
    x, w, dy = operands()
    more = [np.pad(t, [(0, 14), (0, 0)]) for t in (x, dy)]
    _, _, dw = run(PADDED, x, w, dy)
    np.testing.assert_array_equal(dw, run(PADDED, more[0], w, more[1])[2])

  def test_tiles_serve_both_directions(self):
    tile = QuantSpec(formats.get('mxfp4_32x32'))
    recipe = Recipe('test', GemmSpec(None, tile), GemmSpec(None, tile))
    eye = np.eye(N, dtype=np.float32)
    y, dx, _ = run(recipe, eye, data(N, N, seed=1), eye)
    np.testing.assert_array_equal(y, dx.T)

  def test_blocks_along_one_axis_do_not(self):
    recipe = Recipe('test', GemmSpec(None, SPEC), GemmSpec(None, SPEC))
    eye = np.eye(N, dtype=np.float32)
    y, dx, _ = run(recipe, eye, data(N, N, seed=1), eye)
    self.assertLess(np.mean(np.asarray(y) == np.asarray(dx).T), 0.5)

  def test_rotation_alone_changes_nothing(self):
    gemm = GemmSpec(hadamard=32, signs='fixed')
    x, w, dy = operands()
    got = run(Recipe('test', gemm, gemm, gemm), x, w, dy)
    want = run(Recipe('none'), x, w, dy)
    for a, b in zip(got, want, strict=True):
      error = np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)
      self.assertBetween(error, 1e-9, 1e-6)

  def test_half_precision_adds_one_rounding(self):
    self.check_half_precision(recipes.get('fp8_block').forward_only())

  @parameterized.parameters(
    recipes.get('nvfp4_rtn').forward_only(), recipes.get('fp8_block')
  )
  @pytest.mark.slow
  def test_half_precision_of_more_recipes(self, recipe):
    self.check_half_precision(recipe)

  def check_half_precision(self, recipe):
    x, w, dy = (np.asarray(t).astype(jnp.bfloat16) for t in operands())
    y, dx, dw = run(recipe, x, w, dy)
    self.assertEqual({t.dtype for t in (y, dx, dw)}, {jnp.dtype(jnp.bfloat16)})
    want, size = product(recipe.fwd, 0, x, 1, w, 0)
    bound = (K + 8) * U * size + 2.0**-8 * np.abs(want)
    self.assertTrue(np.all(np.abs(np.asarray(y, np.float64) - want) <= bound))


class StochasticTest(parameterized.TestCase):
  def test_gradients_have_no_bias(self):
    self.check_bias('mxfp4_bwd')

  @parameterized.parameters('mxfp4_sr_rht', 'mxfp4_nv', 'tetrajet')
  @pytest.mark.slow
  def test_gradients_of_more_recipes_have_no_bias(self, name):
    self.check_bias(name)

  def check_bias(self, name):
    """The mean over keys approaches the product of what is not random.

    With scales that are rounded to E4M3 (nvfp4) block maxima saturate, which
    has a bias; with those of 'rceil', or 3/4 x, nothing does.
    """
    recipe = recipes.get(name)
    x, w, dy = data(64, 64), data(64, 64, seed=1), data(64, 64, seed=2)
    if recipe.residuals == 'requantized':
      x = jnp.asarray(quantized(x, recipe.fwd.lhs, 1, None), jnp.float32)
      w = jnp.asarray(quantized(w, recipe.fwd.rhs, 0, None), jnp.float32)
    n = 200
    keys = jax.random.split(jax.random.key(3), n)
    each = jax.jit(jax.vmap(lambda key: run(recipe, x, w, dy, key=key)[1:]))(
      keys
    )
    for got, gemm, which, args in (
      (each[0], recipe.dgrad, 1, (dy, 1, w, 1)),
      (each[1], recipe.wgrad, 2, (x, 0, dy, 0)),
    ):
      still = dataclasses.replace(
        gemm, lhs=_still(gemm.lhs), rhs=_still(gemm.rhs)
      )
      want, _ = product(still, which, *args)
      got = np.asarray(got, np.float64)
      # 64 * 64 entries: the largest of that many normal numbers is below 5.
      limit = 5 * got.std(0, ddof=1) / n**0.5 + 1e-5
      self.assertLess(np.mean(np.abs(got.mean(0) - want) > limit), 1e-3)

  def test_rounding_to_nearest_has_one(self):
    """The test above can fail: MXFP4 shrinks what it rounds to nearest."""
    recipe = Recipe('test', dgrad=recipes.get('mxfp4_rtn').dgrad)
    x, w, dy = data(64, 64), data(64, 64, seed=1), data(64, 64, seed=2)
    dx = np.asarray(run(recipe, x, w, dy)[1], np.float64)
    want = np.asarray(dy, np.float64) @ np.asarray(w, np.float64).T
    self.assertLess(np.vdot(dx, want) / np.vdot(want, want), 0.99)

  def test_the_key_alone_decides(self):
    self.check_keys(RANDOM)

  @pytest.mark.slow
  def test_the_key_of_a_recipe_alone_decides(self):
    self.check_keys(recipes.get('mxfp4_sr_rht'))

  def check_keys(self, recipe):
    args = operands()
    first, again = run(recipe, *args), run(recipe, *args)
    other = run(recipe, *args, key=jax.random.key(1))
    for a, b in zip(first, again, strict=True):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first[0], other[0])
    self.assertFalse(np.array_equal(first[1], other[1]))
    self.assertFalse(np.array_equal(first[2], other[2]))


def _still(spec):
  """None for a random site: its expectation is the operand itself."""
  return None if spec is not None and spec.needs_key else spec


class ResidualTest(parameterized.TestCase):
  def test_codes_serve_both_directions(self):
    recipe = recipes.get('jetfire_int8')
    x, w, dy = operands()
    _, dx, dw = run(recipe, x, w, dy)
    qx = quantized(x, recipe.fwd.lhs, 1, None)
    qw = quantized(w, recipe.fwd.rhs, 0, None)
    g = quantized(dy, recipe.dgrad.lhs, 1, None)
    np.testing.assert_allclose(dx, g @ qw.T, atol=1e-3)
    np.testing.assert_allclose(dw, qx.T @ g, atol=1e-3)

  def test_what_is_saved(self):
    x, w = data(256, 128), data(128, 256, seed=1)
    sizes = {}
    for name in ('jetfire_int8', 'tetrajet', 'mxfp8'):
      f = functools.partial(lowbit.qdot, recipe=recipes.get(name), key=KEY)
      pull = jax.eval_shape(lambda x, w, f=f: jax.vjp(f, x, w)[1], x, w)
      leaves = jax.tree.leaves(pull)
      sizes[name] = sum(t.size * t.dtype.itemsize for t in leaves)
    full = 2 * 4 * 256 * 128
    self.assertLess(sizes['jetfire_int8'], 0.27 * full)
    self.assertLess(sizes['tetrajet'], 0.14 * full)
    self.assertBetween(sizes['mxfp8'], full, 1.01 * full)

  def test_requantized(self):
    """TetraJet: the backward products see what the forward product saw."""
    recipe = recipes.get('tetrajet')
    nearest = dataclasses.replace(recipe.dgrad.rhs, rounding='nearest_even')
    gemm = GemmSpec(nearest, nearest)
    recipe = dataclasses.replace(recipe, dgrad=gemm, wgrad=GemmSpec())
    x, w, dy = operands()
    _, dx, _ = run(recipe, x, w, dy)
    seen = quantized(w, recipe.fwd.rhs, 0, None)
    want, size = product(gemm, 1, dy, 1, jnp.asarray(seen, jnp.float32), 1)
    self.assertTrue(np.all(np.abs(dx - want) <= (N + 8) * U * size))


class DerivativeTest(parameterized.TestCase):
  def test_of_the_quantizer_multiplies_the_product(self):
    self.check_derivative('clipped')

  @parameterized.parameters('trust', 'absmax')
  @pytest.mark.slow
  def test_more_of_the_quantizer_multiply_the_product(self, backward):
    self.check_derivative(backward)

  def check_derivative(self, backward):
    spec = QuantSpec(formats.mxfp4, backward=backward)
    recipe = Recipe('test', GemmSpec(spec, spec))
    x, w, dy = operands()
    _, dx, dw = run(recipe, x, w, dy)

    @functools.partial(jax.jit, static_argnums=1)
    def pulled(t, axis, g):
      f = functools.partial(
        lowbit.fake_quant, fmt=spec.fmt, axis=axis, backward=backward
      )
      return jax.vjp(lambda t: f(t), t)[1](g)[0]

    plain = run(Recipe('none'), x, w, dy)
    np.testing.assert_allclose(dx, pulled(x, 1, plain[1]), atol=2e-4)
    np.testing.assert_allclose(dw, pulled(w, 0, plain[2]), atol=2e-4)
    self.assertGreater(np.abs(dx - plain[1]).max(), 0.1)

  def test_masks_lie_in_the_rotated_space(self):
    """Quartet: rotate the cotangent, mask, rotate back."""
    spec = QuantSpec(formats.mxfp4, backward='trust')
    recipe = Recipe('test', GemmSpec(spec, None, 32))
    x, w, dy = operands()

    def f(x):
      x = hadamard.hadamard(x, 32, 1)
      x = lowbit.fake_quant(x, spec.fmt, axis=1, backward='trust')
      return x @ hadamard.hadamard(w, 32, 0)

    def pulled(x):
      return jax.vjp(f, x)[1](dy)[0]

    _, dx, _ = run(recipe, x, w, dy)
    np.testing.assert_allclose(dx, jax.jit(pulled)(x), atol=3e-4)

  def test_of_a_gradient_penalty(self):
    """That of the same products of x + stop_gradient(q(x) - x)."""
    spec = QuantSpec(formats.get('int8_tensor'))
    gemm = GemmSpec(spec, spec)
    x, w = data(8, 16), data(16, 4, seed=1)

    def straight(t, axis):
      q = lowbit.fake_quant(jax.lax.stop_gradient(t), spec.fmt, axis=axis)
      return t + jax.lax.stop_gradient(q - t)

    def forward(x, w):
      return straight(x, 1) @ straight(w, 0), (x, w)

    def backward(saved, dy):
      x, w = saved
      dx = straight(dy, 1) @ straight(w, 1).T
      return dx, straight(x, 0).T @ straight(dy, 0)

    composed = jax.custom_vjp(lambda x, w: forward(x, w)[0])
    composed.defvjp(forward, backward)
    recipe = Recipe('test', gemm, gemm, gemm)

    def second(dot, x, w):
      gradient = jax.grad(lambda x, w: jnp.sum(dot(x, w) ** 3), (0, 1))

      def penalty(x, w):
        return sum(jnp.sum(g**2) for g in gradient(x, w))

      return jax.grad(penalty, (0, 1))(x, w)

    @jax.jit
    def both(x, w):
      low = functools.partial(lowbit.qdot, recipe=recipe)
      return second(low, x, w), second(composed, x, w)

    for got, want in zip(*both(x, w), strict=True):
      largest = np.abs(want).max()
      self.assertGreater(largest, 1)
      np.testing.assert_allclose(got, want, atol=1e-5 * largest)

  @parameterized.parameters('jetfire_int8', 'tetrajet')
  def test_of_saved_codes_has_none_itself(self, name):
    recipe = recipes.get(name)

    def gradient(w):
      f = functools.partial(lowbit.qdot, recipe=recipe, key=KEY)
      return jax.grad(lambda w: jnp.sum(f(data(32, 32), w) ** 2))(w)

    w = data(32, 32, seed=1)
    with self.assertRaisesRegex(NotImplementedError, f"'{name}'.*residuals="):
      jax.eval_shape(lambda w: jax.jvp(gradient, (w,), (w,)), w)

  def test_any_hashable_function_quantizes(self):
    recipe = Recipe('test', GemmSpec(_Halved(), None))
    x, w, dy = data(3, 8), data(8, 4, seed=1), data(3, 4, seed=2)
    y, dx, _ = run(recipe, x, w, dy)
    np.testing.assert_allclose(y, x / 2 @ w, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ w.T / 2, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class _Halved:
  needs_key = False

  def __call__(self, x, axis, key=None):
    return x / 2


# Random bits in both directions, and little else.
BOTH = Recipe('test', GemmSpec(DRAWN), GemmSpec(DRAWN))


class CompositionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.x, self.w, self.dy = operands()

  @pytest.mark.slow
  def test_remat_replays_the_same_bits(self):
    f = jax.checkpoint(lambda x, w, key: lowbit.qdot(x, w, BOTH, key=key))

    @jax.jit
    def replayed(x, w, dy, key):
      y, pull = jax.vjp(lambda x, w: f(x, w, key), x, w)
      return y, *pull(dy)

    args = self.x, self.w, self.dy
    got, want = replayed(*args, KEY), run(BOTH, *args)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_vmap_over_keys_and_rows(self):
    keys = jax.random.split(jax.random.key(1), 3)
    x = np.asarray(self.x)
    rows = jnp.asarray(np.stack([x, 2 * x, x - 1]))

    spec = QuantSpec(formats.get('int8_tensor'))
    recipe = Recipe('test', GemmSpec(spec), GemmSpec(DRAWN))

    def f(x, key):
      return run(recipe, x, self.w, self.dy, key=key)

    batch = jax.jit(jax.vmap(f))(rows, keys)
    for i in range(3):
      for a, b in zip(batch, f(rows[i], keys[i]), strict=True):
        np.testing.assert_allclose(a[i], b, rtol=0, atol=1e-4)

  @pytest.mark.slow
  def test_scan_over_layers(self):
    w = data(2, K, K, seed=3)
    keys = jax.random.split(KEY, 2)

    def layer(x, wk):
      return lowbit.qdot(x, wk[0], BOTH, key=wk[1]), None

    def scanned(w):
      return jnp.sum(jax.lax.scan(layer, self.x, (w, keys))[0] ** 2)

    def unrolled(w):
      x = self.x
      for i in range(2):
        x, _ = layer(x, (w[i], keys[i]))
      return jnp.sum(x**2)

    got, want = jax.jit(jax.grad(scanned))(w), jax.jit(jax.grad(unrolled))(w)
    np.testing.assert_allclose(
      got, want, rtol=0.05, atol=1e-3 * np.abs(want).max()
    )

  def test_held_magnitudes(self):
    spec = QuantSpec(formats.get('int8_tensor'))
    self.check_held(Recipe('test', GemmSpec(spec, spec)))

  @pytest.mark.slow
  def test_held_magnitudes_of_a_recipe(self):
    self.check_held(recipes.get('fp8_current'))

  def check_held(self, recipe):
    args = self.x, self.w, self.dy
    amax = [np.abs(t).max() for t in (self.x, self.w)]
    want = run(recipe, *args)
    got = run(recipe, *args, tensor_amax=amax)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
    other = run(recipe, *args, tensor_amax=(3.1 * amax[0], amax[1]))
    self.assertFalse(np.array_equal(other[0], want[0]))


class PaddingTest(parameterized.TestCase):
  M, K, N = 20, 40, 24

  def operands(self):
    return (
      data(self.M, self.K),
      data(self.K, self.N, seed=1),
      data(self.M, self.N, seed=2),
    )

  @parameterized.parameters('high_precision', 'forward')
  def test_rotations_pad_what_they_do_not_divide(self, residuals):
    gemm = GemmSpec(hadamard=32, signs='fixed')
    recipe = Recipe('test', gemm, gemm, gemm, residuals=residuals)
    x, w, dy = self.operands()
    exact = [np.asarray(t, np.float64) for t in (x, w, dy)]
    a, b, c = exact
    wants = a @ b, c @ b.T, a.T @ c
    for got, want in zip(run(recipe, x, w, dy), wants, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)

  @pytest.mark.slow
  def test_as_zeros_around_the_operands_would(self):
    # In all three products, and through a derivative in the rotated space.
    clipped = QuantSpec(formats.get('int4_g32'), backward='clipped')
    gemm = GemmSpec(SPEC, SPEC, hadamard=32, signs='fixed')
    recipe = Recipe('test', dataclasses.replace(gemm, lhs=clipped), gemm, gemm)
    x, w, dy = self.operands()

    def padded(t, rows, columns):
      return np.pad(t, [(0, rows - t.shape[0]), (0, columns - t.shape[1])])

    want = run(recipe, padded(x, 32, 64), padded(w, 64, 32), padded(dy, 32, 32))
    for got, full in zip(run(recipe, x, w, dy), want, strict=True):
      rows, columns = got.shape
      np.testing.assert_allclose(
        got, full[:rows, :columns], rtol=1e-5, atol=1e-5
      )

  @parameterized.parameters('quest', 'mxfp4_rotated')
  @pytest.mark.slow
  def test_rotated_recipes_take_any_size(self, name):
    x, w, dy = data(6, 12), data(12, 10), data(6, 10)
    run_recipe = functools.partial(eager, recipes.get(name))
    out = jax.eval_shape(run_recipe, x, w, dy)
    self.assertEqual([t.shape for t in out], [t.shape for t in (dy, x, w)])


class RefusalTest(parameterized.TestCase):
  def test_keys(self):
    with self.assertRaisesRegex(ValueError, "'nvfp4' draws random bits.*key="):
      lowbit.qdot(data(M, K), data(K, N), recipes.get('nvfp4'))

  def test_shapes(self):
    for w in (data(K + 1, N), data(K), data(1, K, N)):
      with self.assertRaisesRegex(ValueError, 'w.shape'):
        lowbit.qdot(data(M, K), w, recipes.get('mxfp8'))

  def test_recipes(self):
    with self.assertRaisesRegex(TypeError, "recipes.get\\('mxfp8'\\)"):
      lowbit.qdot(data(M, K), data(K, N), 'mxfp8')

  def test_batch_dimensions(self):
    from lowbit_jax.ops import _qdot

    with self.assertRaisesRegex(ValueError, 'batch dimensions.*vmap'):
      _qdot.matrices(data(2, 3, 4), data(2, 4, 5), (((2,), (1,)), ((0,), (0,))))


if __name__ == '__main__':
  absltest.main()
