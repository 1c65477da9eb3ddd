"""decode_attention: the last tokens of sequences against a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lowbit_jax import ops
from tests.ops import attention
from tests.ops.attention import (
  CHUNK,
  Oracle,
  attend,
  normal,
  operands,
  visible,
)
from tests.ops.products import one_device


class ValuesTest(attention.Values):
  pass


class TransformationsTest(parameterized.TestCase):
  def test_vmap_over_sequences_layers_and_lengths(self):
    q, k, v = operands(batch=3, tokens=2, layers=3)
    lengths, windows = np.array([5, 133, 300]), np.array([3, 200, 20])
    oracles = [Oracle(q, k[i], v[i], lengths[i], windows[i]) for i in range(3)]
    layers = np.arange(3)

    def run(layer, length, window):
      return attend(q, k, v, length, layer=layer, window=window)

    out = jax.vmap(run)(layers, lengths, windows)
    for oracle, y in zip(oracles, out, strict=True):
      oracle.check(y)

    def alone(q, k, v, length):
      return attend(q[None], k[None], v[None], length)[0]

    out = jax.vmap(alone)(q, k[0], v[0], lengths)
    Oracle(q, k[0], v[0], lengths).check(out)

  def test_x64_gives_the_same_bits(self):
    q, k, v = operands(tokens=2, layers=2)
    out = attend(q, k, v, np.array([9, 200]), layer=1, window=20)
    with jax.enable_x64(True):
      wide = attend(q, k, v, np.array([9, 200]), layer=1, window=20)
      endless = attend(q, k, v, jnp.arange(199, 201), layer=1, window=2**40)
      traced = attend(
        q, k, v, jnp.arange(199, 201), layer=1, window=jnp.int64(2**40)
      )
    self.assertEqual(wide.dtype, jnp.float32)
    np.testing.assert_array_equal(out, wide)
    np.testing.assert_array_equal(endless, traced)
    Oracle(q, k[1], v[1], np.arange(199, 201)).check(traced)

  def test_shards_of_sequences_and_heads(self):
    q, k, v = operands(batch=4, heads=8, kv_heads=4, layers=2)
    lengths = np.array([3, 280, 30, 140], np.int32)
    oracle = Oracle(q, k[1], v[1], lengths, 130)
    specs = P('b', None, 'h'), *[P(None, 'b', None, 'h')] * 2, P('b')
    run = functools.partial(ops.decode_attention, layer=1, window=130)
    for kind in (AxisType.Auto, AxisType.Explicit):
      mesh = jax.make_mesh((2, 4), ('b', 'h'), axis_types=(kind, kind))
      with jax.set_mesh(mesh):
        arrays = [
          jax.device_put(x, NamedSharding(mesh, spec))
          for x, spec in zip((q, k, v, lengths), specs, strict=True)
        ]
        out = jax.jit(run)(*arrays)
        if kind == AxisType.Explicit:
          self.assertEqual(
            jax.typeof(out).sharding.spec, P('b', None, 'h', None)
          )
        oracle.check(out)
        parts = jax.shard_map(run, in_specs=specs, out_specs=specs[0])
        oracle.check(jax.jit(parts)(*arrays))

  @parameterized.product(
    dtype=('float32', 'bfloat16', 'float16'), positions=(CHUNK, 4 * CHUNK)
  )
  def test_no_copy_of_a_layer(self, dtype, positions):
    layers, size, kv_heads = 4, 64, 8
    cache = jax.ShapeDtypeStruct(
      (layers, 1, positions, kv_heads, size), jnp.dtype(dtype)
    )
    q = jax.ShapeDtypeStruct((1, 1, 8, size), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)

    # On CPU XLA updates no bfloat16 in place.
    writes = dtype != 'bfloat16'

    def step(q, k, v, length):
      def add(i, carry):
        x, k, v = carry
        at = i, 0, length - 1, 0, 0
        new = x[None].astype(dtype)
        if writes:
          k, v = (lax.dynamic_update_slice(old, new, at) for old in (k, v))
        return x + ops.decode_attention(x, k, v, length, layer=i), k, v

      return lax.fori_loop(0, layers, add, (q, k, v))

    with one_device():
      run = jax.jit(step, donate_argnums=(1, 2))
      compiled = run.lower(q, cache, cache, number).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    # Chunks of keys and values in float32, each in two layouts.
    chunk = CHUNK * kv_heads * size * 4
    self.assertLess(memory, 6 * chunk)
    self.assertLess(6 * chunk, 2 * layers * positions * kv_heads * size * 4)


class DerivativesTest(parameterized.TestCase):
  @parameterized.parameters((None, 1), (20, 3))
  def test_equal_those_of_the_formula(self, window, tokens):
    q, k, v = operands(tokens=tokens)
    lengths = np.array([1, 200])
    g = normal(5, *q.shape[:3], v.shape[-1])
    run = lambda *x: attend(*x, lengths, window=window)
    out, vjp = jax.vjp(run, q, k, v)
    oracle = Oracle(q, k, v, lengths, window)
    oracle.check(out)
    got, want = vjp(g), oracle.gradients(g)
    for x, (exact, bound) in zip(got, want, strict=True):
      oracle.within(x, exact, bound)
    # Forward mode is the transpose of it.
    moves = [normal(i, *x.shape) for i, x in enumerate((q, k, v), 6)]
    _, tangent = jax.jvp(run, (q, k, v), tuple(moves))
    products = [np.float64(m) * w[0] for m, w in zip(moves, want, strict=True)]
    slack = [
      np.abs(np.float64(m)) * w[1] for m, w in zip(moves, want, strict=True)
    ]
    left = np.sum(np.float64(tangent) * np.float64(g))
    slack = sum(map(np.sum, slack)) * 2
    self.assertLessEqual(abs(left - sum(map(np.sum, products))), slack)

  def test_of_a_layer(self):
    q, k, v = operands(layers=3)
    run = lambda q, k, v: jnp.sum(attend(q, k, v, 20, layer=jnp.int32(1)) ** 2)
    got = jax.grad(run, (0, 1, 2))(q, k, v)
    alone = lambda q, k, v: jnp.sum(attend(q, k, v, 20) ** 2)
    want = jax.grad(alone, (0, 1, 2))(q, k[1], v[1])
    np.testing.assert_array_equal(got[0], want[0])
    for stack, x in zip(got[1:], want[1:], strict=True):
      np.testing.assert_array_equal(stack[1], x)
      np.testing.assert_array_equal(stack[::2], 0)

  def test_what_no_token_sees_has_a_zero_gradient(self):
    q, k, v = operands(tokens=3)
    lengths = np.array([2, 200])
    used = visible(q, k, lengths).any(1)[..., None, None]
    soiled = [jnp.where(used, x, jnp.nan) for x in (k, v)]
    loss = lambda *x: jnp.sum(attend(*x, lengths) ** 2)
    dq, dk, dv = jax.grad(loss, (0, 1, 2))(q, *soiled)
    np.testing.assert_array_equal(dq[0, 0], 0)
    for x in (dq, dk, dv):
      self.assertTrue(np.isfinite(x).all())
    for x in (dk, dv):
      np.testing.assert_array_equal(np.where(used, 0, x), 0)


class RefusalsTest(parameterized.TestCase):
  def test_arguments(self):
    q, k, v = operands()
    stack = k[None], v[None]
    f = ops.decode_attention
    for error, message, args, options in (
      (ValueError, r'query=\(2, 6, 16\).*add axes', (q[:, 0], k, v, 3), {}),
      (ValueError, 'give layer', (q, *stack, 3), {}),
      (ValueError, 'leave layer out', (q, k, v, 3), {'layer': 0}),
      (ValueError, 'agree in batch', (q[:1], k, v, 3), {}),
      (ValueError, 'agree in batch', (q[..., :8], k, v, 3), {}),
      (ValueError, 'all axes but', (q, k, v[:, :5], 3), {}),
      (ValueError, 'heads=5 must be a multiple of kv_heads=2',
       (q[:, :, :5], k, v, 3), {}),
      (TypeError, 'keys.dtype=int8.*cast', (q, k.astype(jnp.int8), v, 3), {}),
      (TypeError, 'lengths=3.0 must be integers', (q, k, v, 3.0), {}),
      (TypeError, 'lengths=True must be integers', (q, k, v, True), {}),
      (ValueError, 'lengths=301 must be .* at most 300', (q, k, v, 301), {}),
      (ValueError, 'lengths=-1 must be at least 0', (q, k, v, -1), {}),
      (ValueError, r'lengths=.*shape \(3,\)', (q, k, v, np.ones(3, int)), {}),
      (ValueError, 'layer=1 must be .* at most 0', (q, *stack, 3),
       {'layer': 1}),
      (ValueError, 'layer=.*shape', (q, *stack, 3),
       {'layer': np.zeros(1, int)}),
      (ValueError, 'window=0 must be at least 1', (q, k, v, 3), {'window': 0}),
      (TypeError, 'window=0.5 must be integers', (q, k, v, 3),
       {'window': 0.5}),
      (TypeError, 'scale=.* multiply query', (q, k, v, 3),
       {'scale': jnp.ones(())}),
      (ValueError, 'scale=nan must be finite', (q, k, v, 3),
       {'scale': float('nan')}),
      (NotImplementedError, "no 'tpu' impl", (q, k, v, 3),
       {'implementation': 'tpu'}),
    ):  # fmt: skip
      with self.assertRaisesRegex(error, message):
        f(*args, **options)

  def test_what_would_run(self):
    shapes = jax.eval_shape(lambda: operands(layers=2))
    length = jax.ShapeDtypeStruct((), jnp.int32)
    choice = ops.select_implementation(
      'decode_attention', *shapes, length, layer=1, implementation=['xla']
    )
    self.assertEqual(choice.implementation, 'xla')
    self.assertIn('chunk', choice.note)


if __name__ == '__main__':
  absltest.main()
