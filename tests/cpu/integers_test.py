"""Products of integers on CPU: both operands stay integers within blocks.

The oracle is the float64 product of the dequantized operands. Sums of a unit
are exact, so that a product is within (units + 8) 2^-24 sum |a| |b| of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ops, qarray
from lowbit_jax.cpu import _compiler, _integer_matmul
from lowbit_jax.formats import BlockFormat, IntFormat
from lowbit_jax.ops import _dot_cpu, _dot_cpu_integers, _dot_cpu_matrices
from tests import kinds
from tests.cpu import frames
from tests.ops import products

_LAYOUTS = {'kn': -2, 'nk': -1}
_X = 'int8_g32'
# Elements with an offset, a table, planes and a few bits; every kind of scale.
_FORMATS = (
  *('int4_g128', 'uint4_g32', 'uint4_g32_min_float16', 'mxfp4', 'nvfp4'),
  *('iq4_nl', 'int8_g32', 'int8_channel', 'quaternary_g64_float16', 'q4_k'),
  *('sign_g128_float16', 'mxint8', 'int3_g32', 'uint3_g32', 'q3_k'),
  *('uint5_g32_min_float16', 'int6_g32', 'bfp7_g16', 'mxfp6_e2m3'),
)
# Of all sizes of integers, and with the most of them that 16 bits hold.
_LARGE = (
  *('int2_g32', 'uint3_g32', 'uint4_g32', 'mxfp4', 'iq4_nl', 'uint5_g32'),
  *('int6_g32', 'uint7_g32', 'int8_g32', 'mxfp6_e2m3'),
)
_ALONG_K = [
  name for name in kinds.block_formats() if not formats.get(name).is_tile
]
_N = 200


@functools.cache
def _operands(name, layout, m, k, n=_N, x_format=_X):
  shape = (k, n) if layout == 'kn' else (n, k)
  w = products.make(name, *shape, axis=_LAYOUTS[layout])
  return products.make(x_format, m, k, axis=-1, seed=2), w


def _dims(layout):
  return ((1,), (0 if layout == 'kn' else 1,)), ((), ())


def _product(x, w, layout, implementation='cpu'):
  return ops.dot_general(x, w, _dims(layout), implementation=implementation)


def _kernel_of(x, w, layout):
  plan = _dot_cpu.plan(x, w, _dims(layout), None)
  return 'integers' if plan.note.startswith('multiplies integers') else 'floats'


def _dense(q):
  return np.asarray(lowbit.dequantize(q), np.float64)


def _check(x, w, layout, got=None):
  got = np.asarray(_product(x, w, layout) if got is None else got)
  a, b = _dense(x), _dense(w) if layout == 'kn' else _dense(w).T
  units = a.shape[1] // 4  # of which none is smaller
  bound = (units + 8) * products.U * (abs(a) @ abs(b))
  error = abs(got - a @ b)
  assert (error <= bound).all(), (error / bound).max()


class IntegersTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Traces do not know how many devices there are said to be.
    jax.clear_caches()
    cls.addClassCleanup(jax.clear_caches)
    cls.enterClassContext(products.one_device())

  @parameterized.product(name=_FORMATS, layout=tuple(_LAYOUTS))
  def test_products(self, name, layout):
    for m in (1, 3, 70):
      x, w = _operands(name, layout, m, 512)
      assert _kernel_of(x, w, layout) == 'integers'
      _check(x, w, layout)

  @parameterized.product(
    name=_ALONG_K,
    layout=tuple(_LAYOUTS),
  )
  @pytest.mark.slow
  def test_products_of_every_format(self, name, layout):
    for m in (1, 6):
      _check(*_operands(name, layout, m, 768), layout)

  @parameterized.product(
    x_format=('int4_g128', 'int8_g64', 'int8_channel', 'mxint8'),
    layout=tuple(_LAYOUTS),
  )
  def test_formats_of_x(self, x_format, layout):
    x, w = _operands('nvfp4', layout, 5, 768, x_format=x_format)
    assert _kernel_of(x, w, layout) == 'integers'
    _check(x, w, layout)

  @parameterized.parameters(*_LAYOUTS)
  def test_one_scale_for_each_row_and_column(self, layout):
    """The bits of XLA's int32 product, which is as fast for many rows."""
    x, w = _operands('int8_channel', layout, 5, 4096, x_format='int8_channel')
    with self.assertRaisesRegex(NotImplementedError, 'many rows'):
      _product(x, w, layout)
    whole = np.asarray(_product(x, w, layout, 'xla'))
    for m in (1, 4):
      part = qarray.replace(x, codes=x.codes[:m], scale=x.scale[:m])
      got = np.asarray(_product(part, w, layout))
      np.testing.assert_array_equal(got, whole[:m])
      stack = jax.tree.map(lambda leaf: jnp.stack([leaf[::-1], leaf]), w)
      got = _product(part, ops.member(stack, 1), layout)
      np.testing.assert_array_equal(got, whole[:m])
      got = jax.vmap(lambda w, x=part: _product(x, w, layout))(stack)
      np.testing.assert_array_equal(got[1], whole[:m])

  @parameterized.product(
    bits=(2, 3, 4, 6, 7, 8), fraction=(0, 3), layout=tuple(_LAYOUTS)
  )
  def test_exact_sums(self, bits, fraction, layout):
    """Of as many elements as int32 holds the products of."""
    k, n, axis = (1 << 17) - 128, 40, _LAYOUTS[layout]
    element = IntFormat('own', bits, fraction_bits=fraction)
    fmt = BlockFormat('own', element, (0,), formats.float32)
    w = np.random.default_rng(bits).integers(0, 1 << bits, (k, n))
    w[:, 0] = 1 << (bits - 1)  # the least
    values = (w ^ 1 << (bits - 1)) - (1 << (bits - 1))
    w = w if layout == 'kn' else w.T
    codes = jnp.asarray(products.pack(w, bits, axis))
    q = lowbit.quantize(jnp.ones(w.shape), fmt, axis=axis)
    q = qarray.replace(q, codes=codes, scale=jnp.ones_like(q.scale))
    x = lowbit.quantize(jnp.ones((1, k)), formats.int8_channel, axis=-1)
    least = jnp.full_like(x.codes, 0x80)
    x = qarray.replace(x, codes=least, scale=jnp.ones_like(x.scale))
    want = -128 * values.sum(0, keepdims=True) * 2.0**-fraction
    np.testing.assert_array_equal(
      _product(x, q, layout), want.astype(np.float32)
    )

  @parameterized.product(name=_LARGE, layout=tuple(_LAYOUTS))
  def test_integers_as_large_as_they_get(self, name, layout):
    """No sum of 16 bits overflows."""
    x, w = _operands(name, layout, 2, 512)
    values = w.fmt.element.values()
    for code in (values.argmax(), values.argmin()):
      packed = products.pack(
        np.full(w.shape, code), w.fmt.element.bits, w.axes[0]
      )
      full = qarray.replace(w, codes=jnp.asarray(packed))
      for byte in (0x80, 0x7F):
        worst = qarray.replace(x, codes=jnp.full_like(x.codes, byte))
        _check(worst, full, layout)

  @parameterized.parameters(*_LAYOUTS)
  def test_no_bit_depends_on_other_rows_and_columns(self, layout):
    x, w = _operands('mxfp4', layout, 70, 512)
    whole = np.asarray(_product(x, w, layout))
    for m in (1, 2, 5, 65):
      part = qarray.replace(x, codes=x.codes[:m], scale=x.scale[:m])
      np.testing.assert_array_equal(_product(part, w, layout), whole[:m])
    for n in (32, 33, 63, 65, 130):
      at = (slice(None), slice(n)) if layout == 'kn' else slice(n)
      part = qarray.replace(w, codes=w.codes[at], scale=w.scale[at])
      got = np.asarray(_product(x, part, layout))
      np.testing.assert_array_equal(got, whole[:, :n], f'{n=}')

  @parameterized.parameters(*_LAYOUTS)
  def test_no_bit_depends_on_threads(self, layout):
    x, w = _operands('int4_g128', layout, 3, 1024, 1000)
    task, arrays, out = _frame(x, w, layout)
    address = _integer_matmul.kernel(task, _compiler.host())
    frames.call(address, arrays, [out])
    _check(x, w, layout, out[0])
    for threads in (2, 5):
      again = np.full_like(out, np.nan)
      with frames.pool_of(threads) as pool:
        frames.call(address, arrays, [again], pool)
      np.testing.assert_array_equal(again, out)

  @parameterized.parameters(*_LAYOUTS)
  def test_wrong_arrays_are_refused(self, layout):
    x, w = _operands('int4_g128', layout, 3, 512)
    task, arrays, out = _frame(x, w, layout)
    address = _integer_matmul.kernel(task, _compiler.host())
    for i, array in enumerate(arrays):
      for axis in range(array.ndim):
        wrong = list(arrays)
        wrong[i] = np.delete(array, 0, axis)
        with self.assertRaises(frames.Refused):
          frames.call(address, wrong, [out])
      wrong = list(arrays)
      wrong[i] = array.astype(np.int64)
      with self.assertRaises(frames.Refused):
        frames.call(address, wrong, [out])

  @parameterized.parameters(*_LAYOUTS)
  def test_nan_and_inf_of_scales(self, layout):
    x, w = _operands('int4_g32_float16', layout, 2, 512)
    scale = np.array(x.scale)
    scale[0, 3], scale[1, 2] = np.nan, np.inf
    got = np.asarray(_product(qarray.replace(x, scale=scale), w, layout))
    self.assertTrue(np.isnan(got[0]).all())
    self.assertFalse(np.isfinite(got[1]).any())

  @parameterized.parameters(*_LAYOUTS)
  def test_transformations(self, layout):
    x, w = _operands('mxfp4', layout, 6, 256)
    want = np.asarray(_product(x, w, layout))
    rows = jax.tree.map(lambda leaf: leaf.reshape(3, 2, -1), x)
    got = jax.vmap(lambda x: _product(x, w, layout))(rows)
    np.testing.assert_array_equal(got.reshape(6, -1), want)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), w)
    got = jax.vmap(lambda w: _product(x, w, layout))(stack)
    np.testing.assert_array_equal(got[0], want)

    def loss(scale, implementation):
      own = qarray.replace(x, scale=scale)
      return jnp.sum(_product(own, w, layout, implementation) ** 2)

    got = jax.grad(loss)(x.scale, 'cpu')
    want = jax.grad(loss)(x.scale, 'xla')
    np.testing.assert_allclose(got, want, rtol=1e-4)

  def test_members_of_stacks(self):
    x, w = _operands('mxfp4', 'kn', 2, 256)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), w)
    for i in range(2):
      own = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
      got = jax.jit(lambda i: _product(x, ops.member(stack, i), 'kn'))(i)
      np.testing.assert_array_equal(got, _product(x, own, 'kn'))

  def test_exported_programs_hold_no_kernel(self):
    x, w = _operands('mxfp4', 'kn', 2, 256)
    run = jax.jit(lambda x: _product(x, w, 'kn'))
    self.assertIn('lowbit_jax.integer_matmul', run.lower(x).as_text())
    text = jax.export.export(run)(x).mlir_module()
    self.assertNotIn('lowbit_jax.integer_matmul', text)

  @parameterized.parameters(
    ('nf4_g64', _X, 512, 'is no integer of 8 bits times a power of two'),
    ('mxfp4', 'mxfp8_e4m3', 512, 'is no signed integer'),
    ('mxfp4', 'uint8_g32', 512, 'is no signed integer'),
  )
  def test_others_are_decoded(self, name, x_format, k, why):
    x, w = _operands(name, 'kn', 3, k, x_format=x_format)
    note = _dot_cpu.plan(x, w, _dims('kn'), None).note
    self.assertIn(why, note)
    products.assert_product(
      np.asarray(_product(x, w, 'kn')), 'mk,kn->mn', lowbit.dequantize(x), w
    )

  @parameterized.product(
    name=('int3_g32', 'int5_g32', 'bfp6_g16'),
    case=(('kn', 96), ('kn', 576), ('nk', 576), ('nk', 1536)),
  )
  def test_codes_across_bytes_in_few_elements(self, name, case):
    layout, k = case
    x, w = _operands(name, layout, 2, k, 40)
    assert _kernel_of(x, w, layout) == 'integers'
    _check(x, w, layout)

  def test_k_that_does_not_fit(self):
    """Of codes of 3 bits 64 are read together."""
    x, w = _operands('int3_g32', 'nk', 2, 96)
    self.assertIn(
      'k=96 is no multiple of 64', _dot_cpu.plan(x, w, _dims('nk'), None).note
    )
    _check(x, w, 'nk')

  @parameterized.parameters(*_LAYOUTS)
  def test_blocks_that_do_not_fit(self, layout):
    """Such products decode, too, and are right."""
    own = BlockFormat('own', formats.int8, (10,), formats.float32)
    x = lowbit.quantize(products.data(2, 320), own, axis=-1)
    _, w = _operands('mxfp4', layout, 2, 320)
    self.assertEqual(_kernel_of(x, w, layout), 'floats')
    products.assert_product(
      np.asarray(_product(x, w, layout)),
      f'mk,{layout}->mn',
      lowbit.dequantize(x),
      w,
    )


def _frame(x, w, layout):
  """The task of a product, and what its kernel is given."""
  (m, k), n = x.shape, w.shape[1 if layout == 'kn' else 0]
  task = _integer_matmul.task(
    _dot_cpu_matrices.kind_of(w), x.fmt.block[0], k, n
  )
  assert isinstance(task, _integer_matmul.Task)
  integers, scale = _dot_cpu_integers.codes_and_scales(x)
  units = np.asarray(integers, np.float32).reshape(1, m, -1, task.unit)
  arrays = [
    _dot_cpu_integers._in_order(jnp.asarray(x.codes)[None], task),
    scale[None, :, :: task.unit],
    units.sum(-1),
    np.zeros(1, np.int32),
    *(leaf[None] for leaf in (w.codes, w.scale)),
  ]
  arrays = [np.ascontiguousarray(array) for array in arrays]
  return task, arrays, np.full((1, m, n), np.nan, np.float32)


if __name__ == '__main__':
  absltest.main()
