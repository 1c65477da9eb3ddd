"""`packed` on several devices: shard_map, and meshes of both kinds.

The result has the sharding that the function of the dense weight has. Where
each device does what one would write by hand with `ops`, it has its bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import ops
from tests.ops.products import assert_product, data, dense as values, make
from tests.walk import programs

D = 64
X, W = data(4, D), make('mxfp4', D, D)


def mesh(kind=AxisType.Auto):
  return jax.make_mesh(
    (2, 2), ('x', 'y'), axis_types=(kind,) * 2, devices=jax.devices()[:4]
  )


def why(report) -> list[str]:
  """Why weights are decoded."""
  return [row.how for row in report if row.decoded]


def columns(dot, x, w):
  return dot(x, w)


def rows(dot, x, w):
  return lax.psum(dot(x, w), 'y')


def gathered(dot, x, w):
  w = jax.tree.map(lambda leaf: lax.all_gather(leaf, 'y', tiled=True), w)
  return dot(x, w)


def specs(x, w, out):
  return {'in_specs': (x, w), 'out_specs': out}


SHARDED = {
  'columns': (columns, specs(P('x'), P(None, 'y'), P('x', 'y'))),
  'rows': (rows, specs(P('x', 'y'), P('y'), P('x'))),
  'gathered': (
    gathered,
    {**specs(P('x'), P('y'), P('x')), 'check_vma': False},
  ),
}


class ShardMapTest(parameterized.TestCase):
  def functions(self, fn, options):
    """The function of arrays, packed, and the one of `ops` by hand."""

    def over(dot):
      def run(x, w):
        run = jax.shard_map(lambda x, w: fn(dot, x, w), mesh=mesh(), **options)
        return run(x, w)

      return run

    def by_ops(x, w):
      placed = lowbit.shardings(
        w, NamedSharding(mesh(), options['in_specs'][1])
      )
      w_specs = jax.tree.map(lambda s: s.spec, placed)
      in_specs = options['in_specs'][0], w_specs
      run = jax.shard_map(
        lambda x, w: fn(ops.dot, x, w),
        mesh=mesh(), **{**options, 'in_specs': in_specs},
      )  # fmt: skip
      return run(x, w)

    return lowbit.packed(over(jnp.matmul)), by_ops

  @parameterized.parameters([*SHARDED])
  def test_runs_as_ops_do(self, name):
    packed, by_ops = self.functions(*SHARDED[name])
    self.assertEqual(why(packed.report(X, W)), [])
    got, want = jax.jit(packed)(X, W), jax.jit(by_ops)(X, W)
    programs.assert_same_bits(got, want)
    self.assertEqual(got.sharding, want.sharding)

  @parameterized.parameters('mxfp4', 'nvfp4', 'int8_channel')
  def test_a_gathered_weight_is_whole(self, fmt):
    w = make(fmt, D, 4)

    def gather(spec, axis):
      def run(w):
        return lax.all_gather(w, 'y', axis=axis, tiled=True)

      return jax.shard_map(
        run, mesh=mesh(), in_specs=spec, out_specs=P(), check_vma=False
      )

    def fn(w):
      return gather(P('y'), 0)(w), gather(P(None, 'y'), 1)(w)

    for got in jax.jit(lowbit.packed(fn))(w):
      np.testing.assert_array_equal(got, programs.dense(w))

  def test_blocks_that_devices_would_cut_are_decoded(self):
    w = make('mxfp4', 96, 8)
    packed, _ = self.functions(*SHARDED['rows'])
    (reason,) = why(packed.report(data(4, 96), w))
    self.assertStartsWith(reason, 'shard_map: ')
    y = jax.jit(packed)(data(4, 96), w)
    assert_product(y, 'mk,kn->mn', data(4, 96), values(w))

  @parameterized.parameters('columns', 'rows')
  @pytest.mark.slow
  def test_gradients_are_those_of_ops(self, name):
    packed, by_ops = (
      jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2)))
      for f in self.functions(*SHARDED[name])
    )
    got, want = packed(X, W), by_ops(X, W)
    programs.assert_same_bits(got, want)
    self.assertEqual(got.sharding, want.sharding)

  def test_a_weight_of_all_devices(self):
    options = specs(P('x'), P(), P('x'))
    packed, by_ops = self.functions(columns, options)
    got, want = jax.jit(packed)(X, W), jax.jit(by_ops)(X, W)
    programs.assert_same_bits(got, want)


class AutoMeshTest(parameterized.TestCase):
  def test_constraints_place_the_leaves(self):
    sharding = NamedSharding(mesh(), P(None, 'y'))

    def fn(x, w):
      return x @ lax.with_sharding_constraint(w, sharding)

    def by_ops(x, w):
      placed = lowbit.shardings(w, sharding)
      return ops.dot(x, jax.tree.map(lax.with_sharding_constraint, w, placed))

    got = programs.lowered(lowbit.packed(fn), X, W)
    self.assertEqual(got, programs.lowered(by_ops, X, W))
    self.assertEqual(why(lowbit.packed(fn).report(X, W)), [])

  def test_shardings_of_an_inner_jit(self):
    by_rows, by_columns = (
      NamedSharding(mesh(), spec) for spec in (P('x'), P(None, 'y'))
    )
    both = NamedSharding(mesh(), P('x', 'y'))
    inner = jax.jit(
      jnp.matmul, in_shardings=(by_rows, by_columns), out_shardings=both
    )
    packed = jax.jit(lowbit.packed(lambda x, w: inner(x, w)))
    y = packed(X, W)
    assert_product(y, 'mk,kn->mn', X, values(W))
    self.assertTrue(y.sharding.is_equivalent_to(both, 2))


class ExplicitMeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (P(None, None), None),
    (P(None, 'y'), None),
    (P('y', None), P('x')),
    (P(None, None), P('x', 'y')),
  )
  def test_result_is_placed_as_that_of_arrays(self, spec, out):
    m = mesh(AxisType.Explicit)
    x = jax.device_put(X, NamedSharding(m, P('x', spec[0])))
    dense = jax.device_put(programs.dense(W), NamedSharding(m, spec))
    w = jax.device_put(W, lowbit.shardings(W, NamedSharding(m, spec)))

    def fn(x, w):
      return jnp.einsum('bk,kn->bn', x, w, out_sharding=out)

    with jax.set_mesh(m):
      packed = lowbit.packed(fn)
      got, want = jax.jit(packed)(x, w), jax.jit(fn)(x, dense)
      self.assertEqual(why(packed.report(x, w)), [])
    self.assertEqual(got.sharding, want.sharding)
    assert_product(got, 'mk,kn->mn', X, values(W))

  def test_views_have_the_sharding_of_arrays(self):
    m = mesh(AxisType.Explicit)
    w = jax.device_put(W, lowbit.shardings(W, NamedSharding(m, P(None, 'y'))))

    def fn(w):
      whole = jax.sharding.reshard(w, P())
      return w.T, w.reshape(D, 2, D // 2), whole[:, ::2], w[None]

    with jax.set_mesh(m):
      got = jax.jit(lowbit.packed(fn))(w)
      want = jax.jit(fn)(jax.jit(programs.dense)(w))
    programs.assert_same_bits(got, want)
    for a, b in zip(got, want, strict=True):
      self.assertEqual(a.sharding, b.sharding)

  def test_scan_over_layers(self):
    m = mesh(AxisType.Explicit)
    stack = make('mxfp4', 3, D, D)
    spec = P(None, None, 'y')

    def fn(x, ws):
      def step(c, w):
        return jax.sharding.reshard(jnp.tanh(c @ w), P('x')), None

      return lax.scan(step, x, ws)[0]

    with jax.set_mesh(m):
      x = jax.device_put(X, NamedSharding(m, P('x')))
      ws = jax.device_put(
        stack, lowbit.shardings(stack, NamedSharding(m, spec))
      )
      packed = lowbit.packed(fn)
      got = jax.jit(packed)(x, ws)
      want = jax.jit(fn)(x, jax.jit(programs.dense)(ws))
      self.assertEqual(why(packed.report(x, ws)), [])
    self.assertEqual(got.sharding, want.sharding)
    np.testing.assert_allclose(got, want, atol=1e-4)


if __name__ == '__main__':
  absltest.main()
