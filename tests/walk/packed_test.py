"""`packed` on products and look-ups, what it reports, and what it refuses.

A product is the float64 product of the dequantized weight within the bound of
`tests/ops/products.py`, (k + 8) 2^-24 sum |x| |w|. It is also the same program
as the hand-written use of `ops` on the viewed weight, and so equal to it bit
for bit. Look-ups sum nothing: they have the bits of the function of the dense
weight.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import ops, qarray, transforms
from lowbit_jax.ops import Transformed
from tests.ops.products import (
  assert_product,
  data,
  dense as values,
  make,
)
from tests.walk import programs

K, N, E = 64, 12, 3
SIZES = np.array([3, 0, 5], np.int32)
IDS = np.array([[1, 5, 31], [0, 2, 3]])


class Product(NamedTuple):
  """A function of x and w, and the same written with `ops`.

  Attributes:
    fn: any function of arrays.
    by_ops: the same on a stored weight.
    spec: the einsum that it is, of x and the weight as it sees it.
    x: shape of x.
    w: shape of the weight.
    axis: of its blocks.
    view: from the weight to what is multiplied.
  """

  fn: Any
  by_ops: Any
  spec: str
  x: tuple[int, ...] = (4, K)
  w: tuple[int, ...] = (K, N)
  axis: int = -2
  view: Any = lambda w: w

  def operands(self, fmt: str) -> tuple[Any, Any]:
    return data(*self.x), make(fmt, *self.w, axis=self.axis)


def multiplied(x, w):
  return x @ w


def heads_by_ops(x, w):
  def split(leaf):
    return leaf.reshape(len(leaf), *((3, 4) if leaf.size > 1 else (1, 1)))

  w = qarray.with_axes(jax.tree.map(split, w), (-3,))
  return ops.einsum('btd,dhk->bthk', x, w)


def member_by_ops(x, w):
  parts = jax.tree.map(lambda leaf: leaf[1:2] if leaf.size > 1 else leaf, w)
  return ops.dot(x, jax.tree.map(lambda leaf: lax.squeeze(leaf, [0]), parts))


PRODUCTS = {
  'matmul': Product(multiplied, ops.dot, 'mk,kn->mn'),
  'vector': Product(multiplied, ops.dot, 'k,kn->n', x=(K,)),
  'transposed': Product(
    lambda x, w: x @ w.T,
    lambda x, w: ops.dot(x, w.T),
    'mk,nk->mn', w=(N, K), axis=-1,
  ),
  'heads': Product(
    lambda x, w: jnp.einsum('btd,dhk->bthk', x, w.reshape(K, 3, 4)),
    heads_by_ops,
    'btd,dhk->bthk', x=(2, 2, K), view=lambda w: w.reshape(K, 3, 4),
  ),
  'cut': Product(
    lambda x, w: x @ w[:32, ::2],
    lambda x, w: ops.dot(x, w[:32, ::2]),
    'mk,kn->mn', x=(4, 32), view=lambda w: w[:32, ::2],
  ),
  'member': Product(
    lambda x, w: x @ w[1],
    member_by_ops,
    'mk,kn->mn', w=(E, K, N), view=lambda w: w[1],
  ),
  'batch': Product(
    lambda x, w: jnp.einsum('ecd,edf->ecf', x, w),
    lambda x, w: ops.einsum('ecd,edf->ecf', x, w),
    'ecd,edf->ecf', x=(E, 4, K), w=(E, K, N),
  ),
  'two contracted axes': Product(
    lambda x, w: jnp.einsum('bhk,hkd->bd', x, w),
    lambda x, w: ops.einsum('bhk,hkd->bd', x, w),
    'bhk,hkd->bd', x=(4, E, K), w=(E, K, N),
  ),
  # A weight on the left is exchanged with what it multiplies.
  'left': Product(
    lambda x, w: w.T @ x,
    lambda x, w: ops.dot(w.T, x),
    'km,kn->nm', x=(K, 4),
  ),
}  # fmt: skip
NAMES = [*PRODUCTS]
# Why a format is decoded where others are not.
DECODED = {
  ('cut', 'q4_k'): 'must start and end at multiples of 256',
  ('two contracted axes', 'int8_channel'): 'along another contracted axis',
}


def why(report) -> list[str]:
  """Why weights are decoded."""
  return [row.how for row in report if row.decoded]


class ProductsTest(parameterized.TestCase):
  @parameterized.parameters(NAMES)
  def test_runs_as_ops_do(self, name):
    self.check_program(name, 'mxfp4')

  @parameterized.product(
    name=NAMES,
    fmt=('nvfp4', 'int4_g32', 'int8_channel', 'q4_k'),
  )
  @pytest.mark.slow
  def test_more_formats_run_as_ops_do(self, name, fmt):
    self.check_program(name, fmt)

  def check_program(self, name, fmt):
    p = PRODUCTS[name]
    x, w = p.operands(fmt)
    if reason := DECODED.get((name, fmt)):
      self.assertIn(reason, why(lowbit.packed(p.fn).report(x, w))[0])
      return
    want = programs.lowered(p.by_ops, x, w)
    self.assertEqual(programs.lowered(lowbit.packed(p.fn), x, w), want)

  def test_values(self):
    self.check_values(NAMES, 'mxfp4')

  @parameterized.parameters('nvfp4', 'q4_k')
  def test_values_of_formats(self, fmt):
    self.check_values(('matmul',), fmt)

  @parameterized.parameters('nvfp4', 'int4_g32', 'int8_channel', 'q4_k')
  @pytest.mark.slow
  def test_more_values_of_formats(self, fmt):
    self.check_values(NAMES, fmt)

  def check_values(self, names, fmt):
    chosen = [PRODUCTS[name] for name in names]
    operands = [p.operands(fmt) for p in chosen]

    @jax.jit
    def run(operands):
      pairs = zip(chosen, operands, strict=True)
      return [lowbit.packed(p.fn)(*each) for p, each in pairs]

    for p, (x, w), y in zip(chosen, operands, run(operands), strict=True):
      with self.subTest(p.spec):
        assert_product(y, p.spec, x, p.view(values(w)))

  @parameterized.parameters(NAMES)
  def test_reports_that_nothing_is_decoded(self, name):
    p = PRODUCTS[name]
    (row,) = lowbit.packed(p.fn).report(*p.operands('mxfp4'))
    self.assertEqual((row.site, row.operation), ('w', 'dot_general'))
    self.assertEqual(row.decoded, 0)
    self.assertStartsWith(row.how, 'xla: ')

  def test_ragged_dot(self):
    def ragged(x, w, sizes):
      return lax.ragged_dot(x, w, sizes)

    args = data(8, K), make('mxfp4', E, K, N), SIZES
    packed = lowbit.packed(ragged)
    want = programs.lowered(ops.ragged_dot, *args)
    self.assertEqual(programs.lowered(packed, *args), want)
    (row,) = packed.report(*args)
    self.assertEqual((row.operation, row.decoded), ('ragged_dot', 0))

  def test_tiles_are_decoded(self):
    self.check_values(('matmul',), 'mxfp4_32x32')
    p = PRODUCTS['matmul']
    report = lowbit.packed(p.fn).report(*p.operands('mxfp4_32x32'))
    self.assertEqual(report.decoded, 4 * K * N)
    self.assertIn('its blocks are tiles', report[0].how)

  def test_padded_blocks(self):
    x, w = data(4, 40), make('int4_g32', 40, N)
    packed = lowbit.packed(multiplied)
    assert_product(jax.jit(packed)(x, w), 'mk,kn->mn', x, values(w))
    self.assertEqual(why(packed.report(x, w)), [])

  def test_blocks_that_span_axes(self):
    def project(x, w):
      return jnp.einsum('bthk,hkd->btd', x, w)

    x, flat = data(1, 4, 4, 16), make('mxfp4', K, N)
    w = qarray.replace(flat, merged=(16,))
    by_ops = functools.partial(ops.einsum, 'bthk,hkd->btd')
    packed = lowbit.packed(project)
    want = programs.lowered(by_ops, x, w)
    self.assertEqual(programs.lowered(packed, x, w), want)
    self.assertEqual(why(packed.report(x, w)), [])
    dense = values(flat).reshape(4, 16, N)
    assert_product(jax.jit(packed)(x, w), 'bthk,hkd->btd', x, dense)

  def test_transformed(self):
    order = np.random.RandomState(0).permutation(K)
    q = make('mxfp4', K, N)
    w = Transformed(q, transforms.Permutation(order), -2)
    packed, x = lowbit.packed(multiplied), data(4, K)
    want = programs.lowered(ops.dot, x, w)
    self.assertEqual(programs.lowered(packed, x, w), want)
    self.assertEqual(why(packed.report(x, w)), [])
    dense = values(q)[np.argsort(order)]
    assert_product(jax.jit(packed)(x, w), 'mk,kn->mn', x, dense)

  def test_prepacked(self):
    q, x = make('int8_channel', K, N), data(4, K)
    w = jax.jit(functools.partial(lowbit.prepack, implementation='tpu'))(q)
    packed = lowbit.packed(multiplied)
    want = programs.lowered(ops.dot, x, w)
    self.assertEqual(programs.lowered(packed, x, w), want)
    assert_product(jax.jit(packed)(x, w), 'mk,kn->mn', x, values(q))

  def test_dtypes(self):
    """The product has the dtype that the function gives it."""

    def product(x, w):
      return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    def precise(x, w):
      dims = ((1,), (0,)), ((), ())
      return lax.dot_general(
        x.astype(jnp.bfloat16),
        w.astype(jnp.bfloat16),
        dims,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )

    def precise_by_ops(x, w):
      return ops.dot_general(
        x.astype(jnp.bfloat16),
        w.astype(jnp.bfloat16),
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )

    x, w = PRODUCTS['matmul'].operands('mxfp4')
    out = jax.eval_shape(lowbit.packed(product), x, w)
    self.assertEqual(out.dtype, jnp.bfloat16)
    got = programs.lowered(lowbit.packed(precise), x, w)
    self.assertEqual(got, programs.lowered(precise_by_ops, x, w))

  def test_a_scale_of_the_tensor_is_applied_once(self):
    x = data(4, K)
    w = make('nvfp4', K, N)
    double = qarray.replace(w, tensor_scale=2 * w.tensor_scale)
    packed = jax.jit(lowbit.packed(multiplied))
    programs.assert_same_bits(packed(x, double), 2 * packed(x, w))


def looked_up(table, ids):
  """Rows, in the ways that JAX treats indices outside of a table."""
  return [
    jnp.take(table, ids, axis=0),
    jnp.take(table, ids, axis=0, mode='clip'),
    jnp.take(table, ids, axis=0, mode='wrap'),
    jnp.take(table, ids, axis=0, mode='fill', fill_value=3.0),
    table[ids],
    table.at[ids].get(mode='fill', fill_value=7.0),
    table.T[:, ids],
    table.astype(jnp.bfloat16)[ids],
    jnp.tanh(table[ids]).sum(axis=0),
  ]


class LookUpsTest(parameterized.TestCase):
  IDS = np.array([[1, 5, 31], [-1, 32, -40]])

  def check(self, fmt):
    table = make(fmt, 32, K, axis=-1)
    packed = lowbit.packed(looked_up)
    dense = jax.jit(looked_up)(programs.dense(table), self.IDS)
    programs.assert_same_bits(jax.jit(packed)(table, self.IDS), dense)
    report = packed.report(table, self.IDS)
    self.assertEqual({row.operation for row in report}, {'gather'})
    self.assertEqual({row.how for row in report}, {'decodes what it looks up'})
    self.assertEqual(report.decoded, 0)

  def test_have_the_bits_of_the_dense_table(self):
    self.check('nvfp4')

  @parameterized.parameters('mxfp4', 'int4_g32', 'int8_channel', 'q4_k')
  @pytest.mark.slow
  def test_more_formats(self, fmt):
    self.check(fmt)

  # It counts as a decoded weight.
  def test_a_row_by_one_number(self):
    table = make('mxfp4', 32, K, axis=-1)
    packed = lowbit.packed(lambda table, i: table[i] * 2, strict=True)
    row = jax.jit(packed)(table, 3)
    np.testing.assert_array_equal(row, 2 * values(table)[3])

  def test_of_a_transformed_table(self):
    order = np.random.RandomState(0).permutation(K)
    q = make('mxfp4', 32, K, axis=-1)
    table = Transformed(q, transforms.Permutation(order), -1)
    packed = lowbit.packed(lambda table, ids: jnp.take(table, ids, axis=0))
    rows = jax.jit(packed)(table, self.IDS)
    want = values(q)[:, np.argsort(order)][self.IDS[0]]
    np.testing.assert_array_equal(rows[0], want)
    self.assertEqual(packed.report(table, self.IDS).decoded, 0)

  def test_a_table_that_is_tied_to_the_output(self):
    table = make('mxfp4', 32, K, axis=-1)

    def model(table, ids):
      return jnp.take(table, ids, axis=0) @ table.T

    packed = lowbit.packed(model, strict=True)
    y = jax.jit(packed)(table, IDS)
    assert_product(y, 'btk,vk->btv', values(table)[IDS], values(table))
    look_up, product = packed.report(table, IDS)
    self.assertEqual((look_up.site, product.site), ('table', 'table'))


if __name__ == '__main__':
  absltest.main()
