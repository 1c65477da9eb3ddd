"""What tests of decode_attention share, whatever computes it.

The oracle is masked attention in float64. With u = 2^-24, h channels, n
positions, c chunks and A the largest sum of |query key scale|, a score is off
by at most (h + 2) u A, and so is the largest one. An exponential adds 2 ulp =
4 u and the rounding of its argument, which is at most 2 A; it is multiplied
with one more for each later chunk. Sums of n terms and c partial ones, and a
quotient, add n + c + 2 units. Numerator and denominator have that error each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax import lax

from lowbit_jax import ops
from lowbit_jax.ops import _decode_attention

U = 2.0**-24
CHUNK = _decode_attention.CHUNK
ROUNDING = {'float32': 2.0**-24, 'bfloat16': 2.0**-8, 'float16': 2.0**-11}

attend = jax.jit(ops.decode_attention, static_argnames=('scale',))


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def operands(
  batch=2, positions=300, tokens=1, heads=6, kv_heads=2, size=16, value_size=8,
  layers=None, dtypes=('float32',) * 3,
):  # fmt: skip
  """Query, keys and values."""
  stack = () if layers is None else (layers,)
  cache = (*stack, batch, positions, kv_heads)
  shapes = (
    (batch, tokens, heads, size),
    (*cache, size),
    (*cache, value_size),
  )
  pairs = zip(shapes, dtypes, strict=True)
  return [normal(i, *shape, dtype=d) for i, (shape, d) in enumerate(pairs)]


def visible(query, keys, lengths, window=None) -> np.ndarray:
  """Which positions each token sees: (batch, tokens, positions)."""
  batch, tokens = query.shape[:2]
  lengths = np.broadcast_to(np.asarray(lengths), (batch,))
  own = lengths[:, None, None] - tokens + np.arange(tokens)[:, None]
  place = np.arange(keys.shape[-3])
  return (place <= own) & (place > own - (window or 2**40))


class Oracle:
  """Attention in float64, and its derivatives.

  Attributes:
    out: the result.
    bound: how far float32 may be from it.
  """

  def __init__(self, query, keys, values, lengths, window=None, scale=None):
    mask = visible(query, keys, lengths, window)
    self.scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[2] // keys.shape[-2]
    self.groups = groups
    self.q, k, v = (np.asarray(x, np.float64) for x in (query, keys, values))
    used = mask.any(1)[..., None, None]
    k, v = (np.where(used, x, 0) for x in (k, v))
    self.k, self.v = (np.repeat(x, groups, 2) for x in (k, v))
    self.mask = mask[:, None]
    self.p = self.weights(self.q, self.k)
    self.out = np.einsum('bnts,bsnh->btnh', self.p, self.v)
    # The bound of the docstring.
    sizes = np.einsum('btnh,bsnh->bnts', abs(self.q), abs(self.k))
    most = abs(self.scale) * np.max(np.where(self.mask, sizes, 0), initial=0)
    positions, size = keys.shape[-3], query.shape[-1]
    chunks = -(-positions // CHUNK)
    one = 2 * (size + 2) * most + (chunks + 1) * (2 * most + 4)
    self.error = 2 * (one + positions + chunks + 2) * U * (1 + 2**-6)
    spread = np.einsum('bnts,bsnh->btnh', self.p, abs(self.v))
    rounding = ROUNDING[query.dtype.name]
    tiny = 2.0**-25 if query.dtype == jnp.float16 else 2.0**-126
    self.bound = self.error * spread + rounding * abs(self.out) + tiny

  def weights(self, q, k):
    scores = np.einsum('btnh,bsnh->bnts', q, k) * self.scale
    scores = np.where(self.mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0))
    return e / np.where(
      self.mask.any(-1, keepdims=True), e.sum(-1, keepdims=True), 1
    )

  def check(self, out):
    self.within(out, self.out, self.bound)

  def within(self, got, want, bound):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    excess = np.max(np.abs(got - want) - bound, initial=-np.inf)
    assert excess <= 0, f'{excess} above the bound'

  def gradients(self, g):
    """Those of sum(g * out), each with its bound: the terms of each sum have a
    product of three numbers of relative error `error`."""
    g = np.asarray(g, np.float64)
    terms = {}
    for name, of in (('want', lambda x: x), ('size', abs)):
      q, k, v, g_ = of(self.q), of(self.k), of(self.v), of(g)
      gv = np.einsum('btnh,bsnh->bnts', g_, v)
      mean = np.sum(self.p * gv, -1, keepdims=True)
      ds = self.p * (gv - mean if name == 'want' else gv + mean)
      terms[name] = (
        np.einsum('bnts,bsnh->btnh', ds, k) * of(self.scale),
        self.shared(np.einsum('bnts,btnh->bsnh', ds, q) * of(self.scale)),
        self.shared(np.einsum('bnts,btnh->bsnh', self.p, g_)),
      )
    wants, sizes = terms['want'], terms['size']
    error = 3 * self.error + (self.q.shape[-1] + self.v.shape[-1]) * U
    return [
      (w, error * s + 2.0**-126) for w, s in zip(wants, sizes, strict=True)
    ]

  def shared(self, x):
    """The sum over the heads that share one of the cache."""
    return x.reshape(*x.shape[:2], -1, self.groups, x.shape[-1]).sum(3)


CASES = {
  'one_token': ({}, 37, None),
  'one_position': ({}, 1, None),
  'one_short_of_a_chunk': ({'positions': CHUNK}, CHUNK - 1, None),
  'a_whole_chunk': ({'positions': CHUNK}, CHUNK, None),
  'all_positions': ({'positions': 300}, 300, None),
  'lengths': ({'batch': 4}, [1, CHUNK, CHUNK + 1, 300], None),
  'tokens': ({'tokens': 5}, [5, 133], None),
  'window': ({}, 290, 7),
  'window_of_one': ({'tokens': 2}, [130, 290], 1),
  'window_over_chunks': ({'tokens': 3, 'positions': 500}, [490, 350], 200),
  'wide_window': ({}, 290, 2**31 - 1),
  'one_head': ({'heads': 3, 'kv_heads': 1}, 60, None),
  'a_head_each': ({'heads': 3, 'kv_heads': 3}, 60, None),
  'narrow': ({'dtypes': ('bfloat16',) * 3}, 290, None),
  'half': ({'dtypes': ('float16', 'float16', 'bfloat16')}, 290, 100),
  'wide_query': ({'dtypes': ('float32', 'bfloat16', 'float16')}, 200, None),
}  # fmt: skip


class Values(parameterized.TestCase):
  """Laws of the results of `attend`."""

  @parameterized.named_parameters((n, *c) for n, c in CASES.items())
  def test_equals_float64(self, shape, lengths, window):
    q, k, v = operands(**shape)
    out = attend(q, k, v, np.asarray(lengths), window=window)
    self.assertEqual(out.dtype, q.dtype)
    Oracle(q, k, v, lengths, window).check(out)

  def test_scale(self):
    q, k, v = operands()
    for scale in (0.0, -1.5, 30.0):
      out = attend(q, k, v, 200, scale=scale)
      Oracle(q, k, v, 200, scale=scale).check(out)

  def test_a_layer_is_read_in_place(self):
    q, k, v = operands(layers=3, tokens=2)
    for layer in range(3):
      for number in (layer, jnp.int32(layer)):
        out = attend(q, k, v, np.array([9, 200]), layer=number)
        alone = attend(q, k[layer], v[layer], np.array([9, 200]))
        np.testing.assert_array_equal(out, alone)
    for number, layer in ((7, 2), (-1, 0)):
      out = attend(q, k, v, 20, layer=jnp.int32(number))
      np.testing.assert_array_equal(out, attend(q, k[layer], v[layer], 20))

  def test_equals_dot_product_attention_with_a_mask(self):
    q, k, v = operands(tokens=3, value_size=16)
    lengths, window = np.array([9, 222]), 40
    mask = visible(q, k, lengths, window)[:, None]
    oracle = Oracle(q, k, v, lengths, window)
    oracle.check(jax.nn.dot_product_attention(q, k, v, mask=mask))
    oracle.check(attend(q, k, v, lengths, window=window))

  @parameterized.parameters((None, [3, 200]), (50, [90, 260]), (50, [0, 1]))
  def test_what_no_token_sees_has_no_influence(self, window, lengths):
    q, k, v = operands(layers=2, tokens=2)
    lengths = np.asarray(lengths)
    used = visible(q, k, lengths, window).any(1)[..., None, None]
    run = functools.partial(attend, window=window, layer=1)
    clean = run(q, *(jnp.where(used, x, 0) for x in (k, v)), lengths)
    for bad in (np.nan, np.inf, 3e38):
      soiled = [jnp.where(used, x, bad).at[0].set(np.nan) for x in (k, v)]
      np.testing.assert_array_equal(run(q, *soiled, lengths), clean)

  def test_tokens_without_positions_give_zeros(self):
    q, k, v = operands(tokens=3)
    out = attend(q, k, v, np.array([0, 2]))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1, 0], 0)
    Oracle(q, k, v, np.array([0, 2])).check(out)
    for lengths, window in ((20, -1), (20, 0), (-4, 3), (340, 5)):
      out = attend(q, k, v, jnp.int32(lengths), window=jnp.int32(window))
      np.testing.assert_array_equal(out, 0)

  def test_positions_beyond_the_cache_are_not_seen(self):
    q, k, v = operands(tokens=2)
    out = attend(q, k, v, jnp.int32(310), window=jnp.int32(40))
    Oracle(q, k, v, 310, 40).check(out)

  @parameterized.parameters('keys', 'values')
  def test_special_values_as_in_dot_product_attention(self, which):
    q, k, v = operands(batch=5, tokens=1, positions=200, value_size=16)
    lengths = np.full(5, 180)
    x = k if which == 'keys' else v
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 3e38)):
      x = x.at[i, 40 * i, 1, 3].set(bad)
    k, v = (x, v) if which == 'keys' else (k, x)
    mask = visible(q, k, lengths)[:, None]
    want = jax.nn.dot_product_attention(q, k, v, mask=mask)
    out = attend(q, k, v, lengths)
    special = ~np.isfinite(want)
    self.assertTrue(special[:3].any())
    np.testing.assert_array_equal(out[special], want[special])
    self.assertTrue(np.isfinite(out[~special]).all())

  def test_steps_equal_one_masked_pass(self):
    steps = CHUNK + 20
    q, k, v = operands(positions=steps, tokens=steps)

    @jax.jit
    def decode(q, k, v):
      def step(cache, i):
        new = (lax.dynamic_slice_in_dim(x, i, 1, 1) for x in (k, v))
        cache = [
          lax.dynamic_update_slice(old, x[None], (1, 0, i, 0, 0))
          for old, x in zip(cache, new, strict=True)
        ]
        row = lax.dynamic_slice_in_dim(q, i, 1, 1)
        return cache, ops.decode_attention(row, *cache, i + 1, layer=1)[:, 0]

      cache = [jnp.full((2, *x.shape), jnp.nan) for x in (k, v)]
      places = jnp.arange(steps, dtype=jnp.int32)
      return lax.scan(step, cache, places)[1].swapaxes(0, 1)

    oracle = Oracle(q, k, v, steps)
    oracle.check(decode(q, k, v))
    oracle.check(attend(q, k, v, steps))

  def test_empty(self):
    for shape in ({'batch': 0}, {'tokens': 0}, {'positions': 0}, {'heads': 0},
                  {'value_size': 0}):  # fmt: skip
      q, k, v = operands(**shape)
      out = attend(q, k, v, 0)
      self.assertEqual(out.shape, (*q.shape[:3], v.shape[-1]))
      np.testing.assert_array_equal(out, 0)
