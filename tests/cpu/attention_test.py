"""The kernel of decode attention.

It passes the tests of the values of the operation, with their oracle in
float64. Its exponential is within 2^-23 = 2 u, half of what their bound grants,
and its pieces are as many as the chunks there, or one more if the first
position that is seen is not the first of a piece: the units that the first
saves are more than those that the second costs.
"""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from lowbit_jax import cpu, ops
from tests.ops import attention as common

if (why := cpu.why_not()) is not None:
  pytest.skip(why, allow_module_level=True)

from lowbit_jax.cpu import _attention, _compiler, _registry  # noqa: E402
from lowbit_jax.ops import _decode_attention_cpu  # noqa: E402

attend = jax.jit(
  functools.partial(ops.decode_attention, implementation='cpu'),
  static_argnames=('scale',),
)
_count = itertools.count()


def by_kernel(target, query, keys, values):
  """A function of lengths that runs a kernel that is compiled anew."""
  names = keys.dtype.name, values.dtype.name
  kind = _attention.Kind(*names, keys.shape[-1], values.shape[-1])
  name = f'test.decode_attention.{next(_count)}'
  _registry.register(name, _attention.kernel.__wrapped__(kind, target))
  shape = *query.shape[:3], values.shape[-1]
  call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))
  arrays = query, keys[None], values[None]
  integers = np.int32([0]), np.int32([2**31 - 1])
  return jax.jit(lambda lengths: call(*arrays, lengths, *integers))


class ValuesTest(common.Values):
  def setUp(self):
    super().setUp()
    run = functools.partial(ops.decode_attention, implementation=['cpu', 'xla'])
    run = jax.jit(run, static_argnames=('scale',))
    self.enter_context(mock.patch.object(common, 'attend', run))

  @parameterized.product(
    dtype=('float32', 'float16', 'bfloat16'),
    shape=(
      (1, 1, 64, 64),
      (3, 9, 64, 64),
      (2, 8, 8, 24),
      (1, 20, 40, 16),
      (5, 15, 128, 8),
    ),
  )
  def test_shapes(self, dtype, shape):
    kv_heads, heads, size, value_size = shape
    q, k, v = common.operands(
      batch=3, tokens=2, heads=heads, kv_heads=kv_heads, size=size,
      value_size=value_size, dtypes=('float32', dtype, dtype),
    )  # fmt: skip
    for lengths, window in (([300, 1, 131], None), ([257, 0, 290], 133)):
      out = attend(q, k, v, np.asarray(lengths), window=window)
      common.Oracle(q, k, v, lengths, window).check(out)

  def test_without_instructions_for_halves(self):
    q, k, v = common.operands(
      size=16, dtypes=('float32', 'float16', 'bfloat16')
    )
    lengths = np.int32([9, 200])
    out = by_kernel(_compiler.generic(), q, k, v)(lengths)
    common.Oracle(q, k, v, lengths, scale=1).check(out)

  @parameterized.parameters('keys', 'values')
  def test_special_values_as_in_xla(self, which):
    q, k, v = common.operands(batch=6, tokens=2)
    x = k if which == 'keys' else v
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0)):
      x = x.at[i, 40 * i, 1, 3].set(bad)
      x = x.at[i, 131, 0, 5].set(bad)
    k, v = (x, v) if which == 'keys' else (k, x)
    lengths = np.full(6, 280)
    out = attend(q, k, v, lengths)
    want = ops.decode_attention(q, k, v, lengths, implementation='xla')
    self.assertTrue(np.isnan(want).any())
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))

  def test_scores_of_minus_infinity_alone_give_nan_as_in_xla(self):
    q, k, v = common.operands()
    q, k = jnp.abs(q), jnp.full_like(k, -jnp.inf)
    out = attend(q, k, v, 140)
    want = ops.decode_attention(q, k, v, 140, implementation='xla')
    self.assertTrue(np.isnan(want).all())
    np.testing.assert_array_equal(out, want)

  def test_scores_of_minus_infinity_have_no_weight(self):
    q, k, v = common.operands()
    q, first = jnp.abs(q), 140
    out = attend(q, k.at[:, :first].set(-jnp.inf), v, 290)
    common.Oracle(q, k, v, 290, window=290 - first).check(out)


class BitsTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16')
  def test_do_not_depend_on_threads(self, dtype):
    q, k, v = common.operands(
      batch=4, tokens=2, heads=12, kv_heads=3, size=32, value_size=32,
      dtypes=('float32', dtype, dtype),
    )  # fmt: skip
    lengths = np.int32([300, 3, 177, 0])
    outs = []
    for work in (1 << 60, -1):
      with mock.patch.object(_attention, 'SOLO', work):
        run = by_kernel(_compiler.host(), q, k, v)
      outs += [run(lengths) for _ in range(20)]
    for out in outs[1:]:
      np.testing.assert_array_equal(out, outs[0])

  def test_do_not_depend_on_other_sequences_or_heads(self):
    q, k, v = common.operands(batch=3, tokens=3, heads=12, kv_heads=3)
    lengths = np.array([300, 31, 150])
    out = attend(q, k, v, lengths)
    for i in range(3):
      part = slice(i, i + 1)
      alone = attend(q[part], k[part], v[part], lengths[part])
      np.testing.assert_array_equal(out[part], alone)
      own = slice(4 * i, 4 * i + 4)
      alone = attend(q[:, :, own], k[:, :, part], v[:, :, part], lengths)
      np.testing.assert_array_equal(out[:, :, own], alone)


class TransformationsTest(parameterized.TestCase):
  @parameterized.product(
    query=(0, 3, None),
    cache=((0, 0), (2, 1), (None, None), (None, 0)),
    integers=((None,) * 3, (0, None, None), (0, 0, 0), (None, 0, None)),
  )
  def test_vmap(self, query, cache, integers):
    size, axes = 3, (query, *cache, *integers)
    if not any(axis is not None for axis in axes):
      self.skipTest('nothing is mapped')
    shapes = (2, 2, 6, 16), (2, 2, 40, 3, 16), (2, 2, 40, 3, 8)
    arrays = []
    for i, (shape, axis) in enumerate(zip(shapes, axes, strict=False)):
      if axis is not None:
        shape = *shape[:axis], size, *shape[axis:]
      arrays.append(common.normal(i, *shape))
    ints = (([5, 40], [17, 9], [0, 33]), ([0], [1], [7]), ([9], [4], [50]))
    for values, axis in zip(ints, integers, strict=True):
      arrays.append(np.asarray(values if axis == 0 else values[0], np.int32))

    def run(*arrays):
      by_xla = ops._decode_attention._by_chunks
      return _decode_attention_cpu._attention.bind(*arrays, by_xla=by_xla)

    out = jax.vmap(run, axes)(*arrays)
    for i in range(size):
      own = (
        a if axis is None else jnp.take(a, i, axis)
        for a, axis in zip(arrays, axes, strict=True)
      )
      np.testing.assert_array_equal(out[i], run(*own))

  def test_exported_programs_and_other_platforms_have_the_loop_of_xla(self):
    q, k, v = common.operands(layers=2)
    run = functools.partial(attend, layer=1)
    exported = jax.export.export(jax.jit(run))(q, k, v, 200)
    self.assertNotIn('lowbit_jax.decode', exported.mlir_module())
    common.Oracle(q, k[1], v[1], 200).check(exported.call(q, k, v, 200))
    traced = jax.jit(run).trace(q, k, v, 200)
    for platform, has in (('tpu', False), ('cpu', True)):
      lowered = traced.lower(lowering_platforms=(platform,)).as_text()
      self.assertEqual('lowbit_jax.decode' in lowered, has)

  def test_derivatives_are_those_of_the_operation(self):
    q, k, v = common.operands(batch=1, positions=9, tokens=2)

    def loss(implementation):
      def f(*arrays):
        out = ops.decode_attention(*arrays, 7, implementation=implementation)
        return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out)

      return jax.grad(f, (0, 1, 2))

    for got, want in zip(
      loss('cpu')(q, k, v), loss('xla')(q, k, v), strict=True
    ):
      np.testing.assert_array_equal(got, want)


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'size': 12}, 'the size of keys, 12, is no multiple of 8'),
    ({'value_size': 4}, 'the size of values, 4, is no multiple of 8'),
    ({'size': 2048}, 'up to 1024'),
  )
  def test_name_the_reason(self, shape, message):
    q, k, v = common.operands(**shape)
    with self.assertRaisesRegex(NotImplementedError, message):
      attend(q, k, v, 9)

  @parameterized.parameters(
    (0, (1, 1, 4, 16), 'query.shape.3.'),
    (0, (1, 1, 3, 8), 'heads are no multiple'),
    (0, (2, 1, 4, 8), r'keys.shape\[1\] is not the size of the batch'),
    (2, (1, 1, 6, 2, 8), 'the number of positions'),
    (2, (1, 1, 5, 1, 8), 'the number of heads'),
    (3, (2,), 'lengths'),
    (4, (2,), 'layer'),
  )
  def test_a_kernel_refuses_other_shapes(self, place, shape, message):
    arrays = [
      jnp.ones((1, 1, 4, 8)),
      jnp.ones((1, 1, 5, 2, 8)),
      jnp.ones((1, 1, 5, 2, 8)),
      *(jnp.ones(1, jnp.int32) for _ in range(3)),
    ]
    arrays[place] = jnp.ones(shape, arrays[place].dtype)
    kind = _attention.Kind('float32', 'float32', 8, 8)
    out = jax.ShapeDtypeStruct((*arrays[0].shape[:3], 8), jnp.float32)
    run = jax.ffi.ffi_call(_attention.target_name(kind), out)
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, message):
      jax.block_until_ready(jax.jit(run)(*arrays))

  def test_what_would_run(self):
    shapes = jax.eval_shape(lambda: common.operands(layers=2))
    length = jax.ShapeDtypeStruct((), jnp.int32)
    with mock.patch.object(jax, 'device_count', lambda: 1):
      choice = ops.select_implementation(
        'decode_attention', *shapes, length, layer=1
      )
    name = 'xla' if cpu.why_unproven() else 'cpu'
    self.assertEqual(choice.implementation, name)


if __name__ == '__main__':
  absltest.main()
