"""Tests of lowbit_jax.training.s2ft against dense products and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import formats, ops, qarray
from lowbit_jax.training import s2ft

_EPS = 2.0**-24


# Eager calls would compile every operation on its own.
_split = jax.jit(s2ft.split, static_argnums=(1, 2, 3), static_argnames='kind')
_merge = jax.jit(s2ft.merge, static_argnames=('start', 'kind'))
_dot = jax.jit(s2ft.s2ft_dot, static_argnames=('start', 'kind'))
_quantize = jax.jit(ops.quantize, static_argnums=1, static_argnames='axis')
_fake_quant = jax.jit(ops.fake_quant, static_argnums=1)
_dequantize = jax.jit(qarray.dequantize)
_matmul = jax.jit(ops.dot)
_fuse = jax.jit(s2ft.fuse)
_rows = jax.jit(lambda q, start, stop: q[start:stop], static_argnums=(1, 2))


def _normal(seed: int, *shape: int) -> np.ndarray:
  generator = np.random.default_rng(seed)
  return generator.standard_normal(shape).astype(np.float32)


def _float64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def _leaves(q):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(q)]


class SelectTest(parameterized.TestCase):
  def test_counts_and_range(self):
    chosen = s2ft.select(jax.random.key(0), 8, 16, 0.3)
    self.assertLen(chosen, 8)
    self.assertEqual(sum(map(len, chosen)), int(0.3 * 8 * 16))
    for units in chosen:
      self.assertTrue(np.all(np.diff(units) > 0))
      self.assertTrue(np.all((units >= 0) & (units < 16)))

  def test_multiple_rounds_each_layer_up(self):
    key = jax.random.key(1)
    plain = s2ft.select(key, 8, 16, 0.12)
    rounded = s2ft.select(key, 8, 16, 0.12, multiple=4)
    self.assertNotEqual(*(sum(map(len, x)) for x in (plain, rounded)))
    for few, many in zip(plain, rounded, strict=True):
      self.assertLen(many, -(-len(few) // 4) * 4)
      self.assertTrue(set(few) <= set(many))

  def test_draw_is_uniform_over_pairs(self):
    keys = map(jax.random.key, range(120))
    counts = np.zeros((3, 8))
    layers = np.zeros(3)
    for key in keys:
      for layer, units in enumerate(s2ft.select(key, 3, 8, 0.25)):
        counts[layer, units] += 1
        layers[layer] += len(units) == 2
    # Each pair is in with probability 1/4: the largest of 24 counts deviates
    # by 4.5 deviations with probability 2e-4.
    self.assertLess(np.max(np.abs(counts - 30)), 4.5 * np.sqrt(120 * 3 / 16))
    # Layers share one draw of six: two of them are in a given layer with
    # probability C(8, 2) C(16, 4) / C(24, 6), not always.
    p = 28 * 1820 / 134596
    spread = np.sqrt(p * (1 - p) / 120)
    self.assertLess(np.max(np.abs(layers / 120 - p)), 4.5 * spread)

  def test_same_key_same_units(self):
    a = s2ft.select(jax.random.key(3), 8, 16, 0.3)
    b = s2ft.select(jax.random.key(3), 8, 16, 0.3)
    c = s2ft.select(jax.random.key(4), 8, 16, 0.3)
    self.assertEqual([list(x) for x in a], [list(x) for x in b])
    self.assertNotEqual([list(x) for x in a], [list(x) for x in c])

  def test_all_or_none(self):
    key = jax.random.key(0)
    self.assertEqual([len(u) for u in s2ft.select(key, 3, 8, 0.0)], [0] * 3)
    self.assertEqual([len(u) for u in s2ft.select(key, 3, 8, 1.0)], [8] * 3)

  def test_errors(self):
    key = jax.random.key(0)
    with self.assertRaisesRegex(ValueError, 'ratio=1.5'):
      s2ft.select(key, 2, 8, 1.5)
    with self.assertRaisesRegex(ValueError, 'multiple=3 must divide units=8'):
      s2ft.select(key, 2, 8, 0.5, multiple=3)
    with self.assertRaisesRegex(ValueError, 'layers=0'):
      s2ft.select(key, 0, 8, 0.5)


class ArrangeTest(parameterized.TestCase):
  def test_order_of_the_parts(self):
    order, sink, source = s2ft.arrange(8, sink=[6, 1, 3], source=[3, 0, 6])
    np.testing.assert_array_equal(order, [1, 3, 6, 0, 2, 4, 5, 7])
    self.assertEqual((sink, source), ((0, 3), (1, 4)))

  @parameterized.parameters(0, 1, 2)
  def test_slices_are_the_selections(self, seed):
    generator = np.random.default_rng(seed)
    sink = generator.permutation(32)[:8]
    source = generator.permutation(32)[:5]
    order, (a, b), (c, d) = s2ft.arrange(32, sink, source)
    self.assertEqual(sorted(order), list(range(32)))
    self.assertEqual(sorted(order[a:b]), sorted(sink))
    self.assertEqual(sorted(order[c:d]), sorted(source))

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'sink='):
      s2ft.arrange(4, sink=[4])
    with self.assertRaisesRegex(ValueError, 'source='):
      s2ft.arrange(4, source=[1, 1])


def _mlp(weights, x):
  weights = jax.tree.map(_float64, weights)
  gate = x @ weights['gate'] + weights['bias']
  return gate / (1 + np.exp(-gate)) * (x @ weights['up']) @ weights['down']


def _attention(q, k, v, o, x, head_dim):
  """Causal attention in float64, query head i on key-value head i // group."""

  def heads(w):
    y = x @ _float64(w['kernel']) + _float64(w['bias'])
    return y.reshape(*x.shape[:2], -1, head_dim)

  q, k, v = heads(q), heads(k), heads(v)
  group = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
  scores = np.exp(np.einsum('bthd,bshd->bhts', q, k) / np.sqrt(head_dim))
  scores = np.tril(scores)
  scores /= scores.sum(axis=-1, keepdims=True)
  mixed = np.einsum('bhts,bshd->bthd', scores, v)
  return mixed.reshape(*x.shape[:2], -1) @ _float64(o)


class PermuteTest(parameterized.TestCase):
  def test_mlp_output_is_unchanged(self):
    x = _float64(_normal(0, 5, 24))
    weights = {
      'up': _normal(1, 24, 64),
      'gate': _normal(2, 24, 64),
      'bias': _normal(3, 64),
      'down': _normal(4, 64, 24) / 8,
    }
    order, _, _ = s2ft.arrange(64, sink=[5, 40, 41, 9])
    sources = {name: weights[name] for name in ('up', 'gate', 'bias')}
    sources, down = s2ft.co_permute(sources, weights['down'], order)
    moved = _mlp(sources | {'down': down}, x)
    expected = _mlp(weights, x)
    np.testing.assert_allclose(
      moved, expected, atol=1e-13 * np.abs(expected).max(), rtol=0
    )
    first = np.array([5, 9, 40, 41])
    np.testing.assert_array_equal(down[:4], weights['down'][first])
    np.testing.assert_array_equal(
      sources['gate'][:, :4], weights['gate'][:, first]
    )
    wrong = _mlp(sources | {'down': weights['down']}, x)
    self.assertGreater(np.abs(wrong - expected).max(), 0.1)

  def test_attention_output_is_unchanged(self):
    self.check_attention(8, 2)

  @parameterized.parameters((4, 4), (4, 1))
  @pytest.mark.slow
  def test_attention_output_is_unchanged_in_other_groups(self, *heads):
    self.check_attention(*heads)

  def check_attention(self, heads, kv_heads):
    n, head_dim = 24, 8
    x = _float64(_normal(0, 2, 6, n))

    def dense(seed, count):
      width = count * head_dim
      return {
        'kernel': _normal(seed, n, width) / 5,
        'bias': _normal(seed + 10, width),
      }

    q, k, v = dense(1, heads), dense(2, kv_heads), dense(3, kv_heads)
    o = _normal(4, heads * head_dim, n) / 5
    order = np.roll(np.arange(kv_heads), 1)
    moved = s2ft.co_permute_heads(q, k, v, o, order, head_dim=head_dim)
    expected = _attention(q, k, v, o, x, head_dim)
    np.testing.assert_allclose(
      _attention(*moved, x, head_dim),
      expected,
      atol=1e-13 * np.abs(expected).max(),
      rtol=0,
    )
    if kv_heads > 1:
      self.assertGreater(np.abs(moved[3] - o).max(), 0.1)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'not a permutation'):
      s2ft.expand([0, 0, 1], 2)
    with self.assertRaisesRegex(ValueError, r'shape \(3, 4\) has no axis -1'):
      s2ft.co_permute(np.ones((3, 4)), (), [0, 1, 2])
    q = _quantize(_normal(0, 32, 32), formats.mxfp4, axis=-2)
    with self.assertRaisesRegex(TypeError, 'quantize it then'):
      s2ft.co_permute(q, (), np.arange(32))
    with self.assertRaisesRegex(ValueError, 'o has 30 rows'):
      o = np.ones((30, 4))
      s2ft.co_permute_heads(o.T, o.T, o.T, o, [1, 0], head_dim=8)


_TILES = 'nvfp4_16x16'
# Powers of two, a tensor scale, zero points.
_FORMATS = ('mxfp4', 'nvfp4', 'uint4_g32')
_MORE_FORMATS = ('int4_g32', 'mxfp6_e2m3')


def _middle():
  """The middle of a matrix, and the matrix without it."""
  return _split(_normal(0, 128, 48), formats.mxfp4, 32, 96, kind='sink')


class SplitTest(parameterized.TestCase):
  def test_rest_has_the_codes_of_the_whole(self):
    self.check_rest('mxfp4')

  @parameterized.parameters(*_FORMATS[1:], *_MORE_FORMATS)
  @pytest.mark.slow
  def test_rest_has_the_codes_of_the_whole_in_more_formats(self, name):
    self.check_rest(name)

  def check_rest(self, name):
    w, fmt = _normal(0, 128, 48), formats.get(name)
    part, frozen = _split(w, fmt, 32, 96, kind='sink')
    whole = _quantize(w, fmt, axis=-2)
    np.testing.assert_array_equal(part, w[32:96])
    for a, b in ((0, 32), (96, 128)):
      for x, y in zip(
        _leaves(_rows(frozen, a, b)), _leaves(_rows(whole, a, b)), strict=True
      ):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(_dequantize(frozen)[32:96], 0)

  def test_columns(self):
    self.check_columns('int4_channel')

  @parameterized.parameters('mxfp4', 'nvfp4')
  @pytest.mark.slow
  def test_columns_of_blocks(self, name):
    self.check_columns(name)

  def check_columns(self, name):
    w, fmt = _normal(0, 64, 48), formats.get(name)
    part, frozen = _split(w, fmt, 5, 12, kind='source')
    whole = _dequantize(_quantize(w, fmt, axis=-2))
    dense = np.asarray(_dequantize(frozen))
    np.testing.assert_array_equal(part, w[:, 5:12])
    np.testing.assert_array_equal(dense[:, 5:12], 0)
    np.testing.assert_array_equal(dense[:, :5], whole[:, :5])
    np.testing.assert_array_equal(dense[:, 12:], whole[:, 12:])

  def test_straddling_blocks_are_refused(self):
    w = np.ones((128, 48), np.float32)
    with self.assertRaisesRegex(ValueError, 'multiples of 32.*multiple'):
      s2ft.split(w, formats.mxfp4, 0, 40)
    with self.assertRaisesRegex(ValueError, 'one scale for the whole axis'):
      s2ft.split(w, formats.int4_channel, 0, 32)
    with self.assertRaisesRegex(ValueError, 'within the 128 rows'):
      s2ft.split(w, formats.mxfp4, 96, 160)
    with self.assertRaisesRegex(ValueError, "kind='rows'"):
      s2ft.split(w, formats.mxfp4, 0, 32, kind='rows')
    w = np.ones((100, 8), np.float32)
    split = lambda w: s2ft.split(w, formats.mxfp4, 96, 100)
    _, frozen = jax.eval_shape(split, w)
    self.assertEqual(frozen.shape, (100, 8))


def _problem(kind: str, start: int, stop: int, dtype=jnp.float32):
  """x, slice, frozen and the dense matrix that they stand for."""
  w = _normal(1, 96, 40)
  part, frozen = _split(w, formats.mxfp4, start, stop, kind=kind)
  dense = np.array(_dequantize(frozen), np.float64)
  inside = slice(start, stop)
  dense[inside if kind == 'sink' else (slice(None), inside)] += _float64(part)
  return _normal(2, 3, 7, 96).astype(dtype), part, frozen, dense


class DotTest(parameterized.TestCase):
  @parameterized.parameters(('sink', 32, 96), ('source', 11, 40))
  def test_value_and_gradients_are_those_of_the_dense_matrix(self, *case):
    self.check_value_and_gradients(*case)

  @parameterized.parameters(('sink', 0, 32), ('source', 0, 8))
  @pytest.mark.slow
  def test_value_and_gradients_of_the_first_slice(self, *case):
    self.check_value_and_gradients(*case)

  def check_value_and_gradients(self, kind, start, stop):
    x, part, frozen, dense = _problem(kind, start, stop)
    dy = _normal(3, 3, 7, 40)

    @jax.jit
    def f(x, part, dy):
      dot = lambda x, part: s2ft.s2ft_dot(
        x, part, frozen, start=start, kind=kind
      )
      y, pull = jax.vjp(dot, x, part)
      return y, *pull(dy)

    y, dx, d_part = f(x, part, dy)
    x64, dy64 = _float64(x).reshape(21, 96), _float64(dy).reshape(21, 40)
    full = x64.T @ dy64
    inside = slice(start, stop)
    wanted = full[inside] if kind == 'sink' else full[:, inside]

    def close(found, expected, a, b):
      # A sum of k products in float32: k eps times the sum of magnitudes.
      bound = (a.shape[1] + 2) * _EPS * (np.abs(a) @ np.abs(b))
      found = _float64(found).reshape(expected.shape)
      self.assertTrue(np.all(np.abs(found - expected) <= bound))

    close(y, x64 @ dense, x64, dense)
    close(dx, dy64 @ dense.T, dy64, dense.T)
    slack = (21 + 2) * _EPS * (np.abs(x64.T) @ np.abs(dy64))
    slack = slack[inside] if kind == 'sink' else slack[:, inside]
    self.assertTrue(np.all(np.abs(_float64(d_part) - wanted) <= slack))

  def test_jit_and_bfloat16(self):
    self.check_bfloat16('sink')

  @pytest.mark.slow
  def test_jit_and_bfloat16_of_columns(self):
    self.check_bfloat16('source')

  def check_bfloat16(self, kind):
    x, part, frozen, dense = _problem(kind, 0, 32, jnp.bfloat16)
    part = np.asarray(part).astype(jnp.bfloat16)
    frozen = frozen.astype(jnp.bfloat16)

    @jax.jit
    def f(x, part):
      dot = lambda x, part: s2ft.s2ft_dot(x, part, frozen, kind=kind)
      y, pull = jax.vjp(dot, x, part)
      return y, *pull(y)

    y, dx, d_part = f(x, part)
    self.assertEqual((y.dtype, dx.dtype, d_part.dtype), (jnp.bfloat16,) * 3)
    # bfloat16 of D, and of both parts and the sum of y: 4 roundings of 2^-9.
    bound = 4 * 2.0**-9 * (np.abs(_float64(x)) @ np.abs(dense)) + 1e-6
    self.assertTrue(np.all(np.abs(_float64(y) - _float64(x) @ dense) <= bound))

  def _residuals(self, f, *args):
    """Shapes of what f saves for its backward pass, by size."""
    pull = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
    return [leaf.shape for leaf in jax.tree.leaves(pull)]

  def test_sink_saves_its_slice_of_x_only(self):
    x, part, frozen, _ = _problem('sink', 0, 32)
    for f in (s2ft.s2ft_dot, jax.jit(s2ft.s2ft_dot)):
      shapes = self._residuals(lambda x, part: f(x, part, frozen), x, part)
      large = [shape for shape in shapes if np.prod(shape) >= 21 * 33]
      codes = [leaf.shape for leaf in jax.tree.leaves(frozen)]
      self.assertIn((3, 7, 32), shapes)
      self.assertNotIn(x.shape, shapes)
      self.assertTrue(set(large) <= {*codes, part.shape}, large)

  def test_dense_product_saves_all_of_x(self):
    x, _, _, dense = _problem('sink', 0, 32)
    w = jnp.asarray(dense, jnp.float32)
    self.assertIn(x.shape, self._residuals(lambda x, w: x @ w, x, w))

  def test_chain_saves_slices_only(self):
    """Two layers under jit: no full activation stays beside relu's mask."""
    x, part, frozen, _ = _problem('sink', 0, 32)
    up = _quantize(_normal(5, 96, 96), formats.mxfp4, axis=-2)

    def f(part):
      hidden = ops.dot(x, up)
      return s2ft.s2ft_dot(hidden, part, frozen)

    shapes = self._residuals(jax.jit(f), part)
    self.assertIn((3, 7, 32), shapes)
    self.assertNotIn((3, 7, 96), shapes)

  def test_rounded_x_enters_the_frozen_product_only(self):
    x, part, frozen, _ = _problem('sink', 0, 32)
    rounded = _fake_quant(x, formats.mxfp4)
    y = _dot(x, part, frozen, rounded_x=rounded)
    expected = _float64(rounded) @ _float64(_dequantize(frozen))
    expected += _float64(x[..., :32]) @ _float64(part)
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=0)

    def f(x):
      rounded = ops.fake_quant(x, formats.mxfp4)
      return jnp.sum(s2ft.s2ft_dot(x, part, frozen, rounded_x=rounded))

    def g(x):
      return jnp.sum(s2ft.s2ft_dot(x, part, frozen))

    got, want = jax.jit(lambda x: (jax.grad(f)(x), jax.grad(g)(x)))(x)
    np.testing.assert_array_equal(got, want)

  def test_float_base(self):
    x, part = _normal(0, 4, 64), _normal(1, 16, 8)
    w = _normal(2, 64, 8)
    y = np.asarray(_dot(x, part, w, start=8))
    w[8:24] += part
    np.testing.assert_allclose(y, x @ w, atol=1e-4, rtol=0)

  def test_shapes_are_checked(self):
    x, part, frozen, _ = _problem('sink', 0, 32)
    with self.assertRaisesRegex(ValueError, 'within the 96 rows'):
      s2ft.s2ft_dot(x, part, frozen, start=80)
    with self.assertRaisesRegex(ValueError, r'slice_.shape=\(32, 39\)'):
      s2ft.s2ft_dot(x, part[:, 1:], frozen)
    with self.assertRaisesRegex(ValueError, r'x.shape=\(3, 7, 95\)'):
      s2ft.s2ft_dot(x[..., 1:], part, frozen)
    with self.assertRaisesRegex(ValueError, 'rounded_x.shape'):
      s2ft.s2ft_dot(x, part, frozen, rounded_x=x[0])


class MergeTest(parameterized.TestCase):
  @parameterized.parameters(
    *((name, 'sink') for name in (*_FORMATS, _TILES)), ('mxfp4', 'source')
  )
  def test_untrained_slice_merges_into_the_plain_quantization(self, name, kind):
    self.check_merge(name, kind)

  @parameterized.parameters(
    *((name, 'sink') for name in _MORE_FORMATS), (_TILES, 'source')
  )
  @pytest.mark.slow
  def test_untrained_slice_merges_in_more_formats(self, name, kind):
    self.check_merge(name, kind)

  def check_merge(self, name, kind):
    w, fmt = _normal(0, 128, 48), formats.get(name)
    part, frozen = _split(
      w, fmt, 16 * 2, 16 * 3 if kind == 'source' else 96, kind=kind
    )
    merged = _merge(part, frozen, start=32, kind=kind)
    axis = (-2, -1) if fmt.is_tile else -2
    whole = _quantize(w, fmt, axis=axis)
    for x, y in zip(_leaves(merged.weights), _leaves(whole), strict=True):
      np.testing.assert_array_equal(x, y)
    qarray.validate(merged.weights)
    inside = slice(32, 48 if kind == 'source' else 96)
    at = (slice(None), inside) if kind == 'source' else inside
    error = _float64(_dequantize(whole)[at]) - _float64(w[at])
    relative = np.linalg.norm(error) / np.linalg.norm(w[at])
    self.assertLess(abs(float(merged.error) / relative - 1), 1e-5)

  def test_frozen_codes_stay(self):
    part, frozen = _middle()
    part = 3 * np.asarray(part)
    merged = _merge(part, frozen, start=32, kind='sink').weights
    for a, b in ((0, 32), (96, 128)):
      for x, y in zip(
        _leaves(_rows(merged, a, b)), _leaves(_rows(frozen, a, b)), strict=True
      ):
        np.testing.assert_array_equal(x, y)
    expected = _quantize(part, formats.mxfp4, axis=-2)
    middle = _leaves(_rows(merged, 32, 96))
    for x, y in zip(middle, _leaves(expected), strict=True):
      np.testing.assert_array_equal(x, y)

  @pytest.mark.slow
  def test_one_block_is_the_whole_matrix(self):
    part, frozen = _split(_normal(0, 32, 8), formats.mxfp4, 0, 32)
    merged = _merge(part, frozen).weights
    expected = _quantize(part, formats.mxfp4, axis=-2)
    for x, y in zip(_leaves(merged), _leaves(expected), strict=True):
      np.testing.assert_array_equal(x, y)

  def test_padded_matrix(self):
    self.check_padded(64, 100)

  @pytest.mark.slow
  def test_padded_matrix_trained_elsewhere(self):
    self.check_padded(32, 64)

  def check_padded(self, start, stop):
    w = _normal(0, 100, 8)
    part, frozen = _split(w, formats.mxfp4, start, stop)
    merged = _merge(part, frozen, start=start).weights
    expected = _quantize(w, formats.mxfp4, axis=-2)
    for x, y in zip(_leaves(merged), _leaves(expected), strict=True):
      np.testing.assert_array_equal(x, y)

  @parameterized.parameters('sink', 'source')
  def test_adapter_beside_the_base(self, kind):
    w = _normal(0, 96, 64)
    x = _normal(1, 5, 96)
    order = np.random.default_rng(0).permutation(96 if kind == 'sink' else 64)
    axis = 0 if kind == 'sink' else 1
    moved = np.take(w, order, axis=axis)
    base = _quantize(moved, formats.mxfp4, axis=-2)
    part, frozen = _split(moved, formats.mxfp4, 0, 32, kind=kind)
    part = np.asarray(part) + np.float32(0.1) * _normal(2, *part.shape)
    make = functools.partial(s2ft.make_adapter, order=order, kind=kind)
    adapter = jax.jit(make)(part, frozen, base)
    beside = _dot(
      x, adapter.delta, base, start=adapter.start, kind=adapter.kind
    )
    expected = _dot(x, part, frozen, kind=kind)
    np.testing.assert_allclose(beside, expected, atol=1e-4, rtol=0)
    # In the order of the float matrix the fused rows are the trained ones.
    values = np.asarray(_dequantize(base))
    original = np.take(values, np.argsort(order), axis=axis)
    fused = np.take(np.asarray(_fuse(original, adapter)), order, axis=axis)
    inside = slice(0, 32)
    at = inside if kind == 'sink' else (slice(None), inside)
    np.testing.assert_allclose(fused[at], part, atol=1e-6, rtol=0)
    rest = np.delete(fused - values, np.arange(32), axis=axis)
    np.testing.assert_array_equal(rest, 0)

  def test_adapter_is_a_pytree(self):
    adapter = s2ft.Adapter(jnp.arange(4), jnp.ones((2, 3)), 1, 'sink')
    doubled = jax.jit(lambda a: jax.tree.map(lambda x: 2 * x, a))(adapter)
    self.assertEqual((doubled.start, doubled.kind), (1, 'sink'))
    np.testing.assert_array_equal(doubled.delta, 2)

  def test_order_must_fit(self):
    part, frozen = _middle()
    with self.assertRaisesRegex(ValueError, 'order has 16 entries'):
      s2ft.make_adapter(part, frozen, frozen, np.arange(8), width=2)
    make = functools.partial(s2ft.make_adapter, order=np.arange(8), width=16)
    found = jax.eval_shape(make, part, frozen, frozen)
    self.assertEqual(found.order.shape, (128,))


class MemoryTest(absltest.TestCase):
  def test_stated_figures(self):
    """The table at the top of the module."""
    h, ffn, kv = 4096, 14336, 1024
    shapes = [(h, h), (h, kv), (h, kv), (h, h), (h, ffn), (h, ffn), (ffn, h)]
    full = sum(a * b for a, b in shapes)
    lora = sum(16 * (a + b) for a, b in shapes)
    trained = 448 * h
    self.assertEqual((full, lora, trained), (218103808, 1310720, 1835008))
    self.assertEqual(
      [round(16 * n / 1e6) for n in (full, lora, trained)], [3490, 21, 29]
    )
    self.assertEqual(h + h + h + ffn, 26624)

  def test_optimizer_state_is_that_of_the_slice(self):
    part, _ = _middle()
    state = jax.eval_shape(optax.adam(1e-3).init, {'down': part})
    leaves = jax.tree.leaves(state)
    sizes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    self.assertEqual(sizes, 2 * part.nbytes + 4)  # two moments and a count


class TrainTest(absltest.TestCase):
  @pytest.mark.slow
  def test_mlp_learns_a_shifted_target(self):
    width, hidden, fmt = 32, 128, formats.mxfp4
    up, down = _normal(0, width, hidden) / 6, _normal(1, hidden, width) / 11
    target_up = up
    target_down = down + 0.03 * _normal(2, hidden, width)
    x = _normal(3, 256, width)
    target = np.maximum(x @ target_up, 0) @ target_down

    (chosen,) = s2ft.select(jax.random.key(4), 1, hidden, 0.25, multiple=32)
    order, (a, b), _ = s2ft.arrange(hidden, sink=chosen)
    up, down = s2ft.co_permute(up, down, order)
    up_frozen = _quantize(up, fmt, axis=-2)
    part, frozen = _split(down, fmt, a, b)
    before = [leaf.copy() for leaf in _leaves((up_frozen, frozen))]
    tx = optax.adam(2e-2)
    relu_rows = np.maximum(_matmul(x, up_frozen), 0)

    @jax.jit
    def train(part, frozen, rows, target):
      def loss_fn(part):
        y = s2ft.s2ft_dot(rows, part, frozen, start=a)
        return jnp.mean(jnp.square(y - target))

      def step(carry, _):
        part, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(part)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(part, updates), state), loss

      (part, _), losses = jax.lax.scan(step, (part, tx.init(part)), length=100)
      return part, losses

    part, losses = train(part, frozen, relu_rows, target)
    losses = np.asarray(losses)
    # Least squares gives the best that the slice can do.
    rows = _float64(relu_rows)
    rest = _float64(target) - rows @ _float64(_dequantize(frozen))
    best = np.linalg.lstsq(rows[:, a:b], rest, rcond=None)[0]
    floor = np.mean((rest - rows[:, a:b] @ best) ** 2)
    self.assertLess(losses[-1] - floor, 0.1 * (losses[0] - floor))
    self.assertLess(losses[-1], 0.8 * losses[0])
    after = _leaves((up_frozen, frozen))
    for old, new in zip(before, after, strict=True):
      np.testing.assert_array_equal(old, new)

    merged = _merge(part, frozen, start=a)
    y = _matmul(relu_rows, merged.weights)
    merged_loss = np.mean(np.square(y - target))
    self.assertGreater(merged_loss, losses[-1])
    self.assertLess(float(merged.error), 0.2)


if __name__ == '__main__':
  absltest.main()
