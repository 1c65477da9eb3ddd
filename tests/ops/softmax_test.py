"""softmax, log_softmax and logsumexp against longdouble.

Bounds in units of u = 2^-24: (10 + h) u by derivation, with h the longest chain
of additions, and 12 u on the data used here, far below it.
"""

import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax.ops import _dispatch, _softmax
from lowbit_pallas.softmax import forms, reference
from tests.pallas.softmax import rows

_COUNT = itertools.count()
INF = np.inf
NAN = np.nan
OPS = {kind: getattr(lowbit, kind) for kind in forms.KINDS}
JAX_OPS = {
  'softmax': jax.nn.softmax,
  'log_softmax': jax.nn.log_softmax,
  'logsumexp': jax.nn.logsumexp,
}
# One entry, several chunks, leading axes. Tests of `WIDE` rows have ragged
# slices.
SHAPES = ((1, 1), (2, 50257), (2, 3, 4, 33))
MORE_SHAPES = (
  (1, 2),
  (8, 128),
  (3, 5),
  (5, 1000),
  (7, 127),
  (9, 129),
  (13, 300),
  (64, 4096),
  (1, 131072),
)
# Most tests have one of these shapes, and so share their programs.
WIDE = (16, 300)
SHORT = (256, 4)
MASKED = (8, 4)


def repeated(*row, shape=SHORT) -> np.ndarray:
  """A float32 matrix of equal rows."""
  return np.tile(np.float32(row), (shape[0], 1))


def _exact_gradient(kind, x, g, where=None):
  """Cotangent of x for the cotangent g of the result, in longdouble."""
  y = rows.exact('softmax', x, where)
  g = np.asarray(g).astype(rows.LONG)
  if kind == 'logsumexp':
    return y * g[..., None]
  if kind == 'softmax':
    return y * (g - (y * g).sum(-1, keepdims=True))
  live = 1.0 if where is None else where
  g = g * live
  return live * (g - y * g.sum(-1, keepdims=True))


class Accuracy(parameterized.TestCase):
  def check_shape(self, *shape):
    x = rows.draw('wide', shape)
    y = lowbit.softmax(x)
    self.assertEqual(y.shape, shape)
    self.assertLessEqual(rows.units(y, rows.exact('softmax', x)), 12)
    total = np.asarray(y).astype(rows.LONG).sum(-1)
    bound = (8 + reference.chain(shape[-1])) * rows.U
    self.assertLessEqual(np.abs(total - 1).max(), bound)

  def check_axis(self, kind, axis):
    x = rows.draw('wide', (6, 5, 7))
    y = OPS[kind](x, axis)
    want = rows.exact(kind, np.moveaxis(x, axis, -1))
    if kind != 'logsumexp':
      want = np.moveaxis(want, -1, axis)
    np.testing.assert_allclose(
      y, want.astype(np.float32), rtol=16 * rows.U, atol=16 * rows.U
    )


@pytest.mark.slow
class MatrixTest(Accuracy):
  @parameterized.parameters(*MORE_SHAPES)
  def test_shapes(self, *shape):
    self.check_shape(*shape)

  @parameterized.product(kind=forms.KINDS, axis=(0, 1, -1))
  def test_axis(self, kind, axis):
    self.check_axis(kind, axis)


class AccuracyTest(Accuracy):
  @parameterized.product(name=rows.NAMES, dtype=('float32', 'bfloat16'))
  def test_distributions(self, name, dtype):
    self.check_distribution(name, dtype)

  @parameterized.parameters(*rows.NAMES)
  @pytest.mark.slow
  def test_distributions_of_float16(self, name):
    self.check_distribution(name, 'float16')

  def check_distribution(self, name, dtype):
    if name == 'huge' and dtype == 'float16':
      self.skipTest('beyond float16')
    x = rows.draw(name, WIDE).astype(dtype)
    error = rows.units(
      lowbit.softmax(x, out_dtype=jnp.float32), rows.exact('softmax', x)
    )
    self.assertLessEqual(error, 12)

  def test_logarithms_of_few_entries(self):
    """One to four live entries: alone, equal, near, and far from each other."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=SHORT).astype(np.float32)
    x *= np.float32(10.0) ** rng.integers(-8, 4, (len(x), 1))
    x[3::5] = x[3::5, :1]
    x[:6, 0] = 5, 1e-7, -1e-7, 88.7, 1e-30, -22712
    live = np.arange(4) < 1 + np.arange(len(x))[:, None] % 4
    live[:6] = np.arange(4) < 1
    x[~live] = -INF
    h = reference.chain(4)
    for algorithm in 'auto', 'online':
      for kind, slack in ('log_softmax', 4), ('logsumexp', 3):
        y = np.asarray(OPS[kind](x, algorithm=algorithm))
        with np.errstate(divide='ignore', invalid='ignore'):
          want = rows.exact(kind, x)
        y, want = (t if t.ndim == 1 else t[live] for t in (y, want))
        bound = (8 + h + 2 * np.log(4) + slack * np.abs(want)) * rows.U
        np.testing.assert_array_less(np.abs(y - want), bound)
        alone = live.sum(-1) == 1
        if kind == 'logsumexp':
          np.testing.assert_array_equal(y[alone], x[alone, 0])
        else:
          self.assertLessEqual(y.max(), 0)
          np.testing.assert_array_equal(y[want == 0], 0)

  def test_certified_exponential_is_more_accurate(self):
    x = rows.draw('wide', WIDE)
    want = rows.exact('softmax', x)
    few, more = (
      rows.units(lowbit.softmax(x, exp=exp, algorithm='pair'), want)
      for exp in ('degree5', 'certified')
    )
    self.assertLess(more, few)

  @parameterized.parameters(*SHAPES)
  def test_shapes(self, *shape):
    self.check_shape(*shape)

  @parameterized.parameters(
    ('softmax', 'bfloat16', 'auto'),
    ('logsumexp', 'float16', 'online'),
  )
  def test_half_precision_is_rounded_once(self, kind, dtype, algorithm):
    self.check_half_precision(kind, dtype, algorithm)

  @pytest.mark.slow
  def test_half_precision_of_log_softmax_is_rounded_once(self):
    self.check_half_precision('log_softmax', 'bfloat16', 'pair')

  def check_half_precision(self, kind, dtype, algorithm):
    x = rows.draw('wide', WIDE).astype(dtype)
    y = OPS[kind](x, algorithm=algorithm)
    self.assertEqual(y.dtype, x.dtype)
    wide = np.asarray(OPS[kind](x.astype(np.float32), algorithm=algorithm))
    np.testing.assert_array_equal(y, wide.astype(dtype))
    np.testing.assert_array_equal(
      OPS[kind](x, algorithm=algorithm, out_dtype=jnp.float32), wide
    )

  @pytest.mark.slow
  def test_better_than_jax_on_wide_rows(self):
    x = rows.draw('wide', (64, 4096))
    want = rows.exact('softmax', x)
    self.assertLess(rows.units(lowbit.softmax(x), want), 8)
    self.assertGreater(rows.units(jax.nn.softmax(x), want), 24)

  def test_worked_values(self):
    y = lowbit.softmax(repeated(1000, 1000.5, -1000, 999))
    np.testing.assert_array_equal(
      y, repeated(0.33149892, 0.54654944, 0, 0.12195165)
    )

  def test_large_bfloat16(self):
    self.check_large('bfloat16', 1.0, 3e38)

  @pytest.mark.slow
  def test_large_float16(self):
    self.check_large('float16', -6e4, 6e4)

  def check_large(self, dtype, low, high):
    x = np.full(WIDE, low, dtype)
    x[:, 7:9] = high
    y = lowbit.softmax(x, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, np.where(x == x[0, 7], 0.5, 0))

  def test_temperature(self):
    op = functools.partial(lowbit.softmax, algorithm='pair')
    x = rows.draw('wide', WIDE)
    want = op(x * np.float32(1 / np.float32(0.7)))
    np.testing.assert_array_equal(op(x, temperature=0.7), want)
    traced = jax.jit(lambda t: op(x, temperature=t))(0.7)
    np.testing.assert_array_equal(traced, want)
    half = jax.ShapeDtypeStruct(WIDE, jnp.bfloat16)
    y = jax.eval_shape(
      lambda x, t: op(x, temperature=t), half, jnp.float32(0.7)
    )
    self.assertEqual(y.dtype, jnp.bfloat16)

  def test_numbers_share_a_program(self):
    x = rows.draw('wide', WIDE)
    sizes = []
    for temperature in (0.5, 0.25, 3.0):
      lowbit.softmax(x, temperature=temperature, algorithm='pair')
      sizes.append(_softmax._scaled._cache_size())
    self.assertEqual(sizes[0], sizes[2])

  @parameterized.parameters(*forms.KINDS)
  def test_several_axes(self, kind):
    x = rows.draw('wide', (2, 3, 4))
    where = x[:, :1] > 0
    f = functools.partial(OPS[kind], algorithm='pair')
    got = f(x, (0, -1), where=where)
    order = (1, 0, 2)
    whole = np.broadcast_to(where, x.shape)
    x, whole = (t.transpose(order).reshape(3, 8) for t in (x, whole))
    want = f(x, where=whole)
    if kind != 'logsumexp':
      want = want.reshape(3, 2, 4).transpose(order)
    np.testing.assert_array_equal(got, want)

  def test_several_axes_of_shapes(self):
    x, where = (jax.ShapeDtypeStruct((2, 3, 4), t) for t in (np.float32, bool))
    choice = lowbit.select_implementation('softmax', x, (0, 2), where=where)
    self.assertEqual(choice.implementation, 'xla')

  def test_gradient_of_temperature(self):
    x = rows.draw('normal', (8,))

    def f(t):
      return lowbit.softmax(x, temperature=t, algorithm='pair')[0]

    both = jax.jit(jax.value_and_grad(f))
    slope = (both(2.01)[0] - both(1.99)[0]) / 0.02
    np.testing.assert_allclose(both(2.0)[1], slope, rtol=1e-3)


class EdgeTest(parameterized.TestCase):
  def test_dead_entries_are_exactly_zero(self):
    x = np.resize(np.float32([[1, -INF, 2, 7], [1, 3, 2, 7]]), MASKED)
    where = np.resize([[1, 1, 1, 0], [1, 0, 1, 0]], MASKED) > 0
    y = lowbit.softmax(x, where=where)
    want = repeated(0.26894143, 0, 0.7310586, 0, shape=MASKED)
    np.testing.assert_allclose(y, want, rtol=12 * rows.U)
    np.testing.assert_array_equal(
      lowbit.log_softmax(x, where=where) == -INF, np.equal(want, 0)
    )

  @parameterized.parameters(*forms.ALGORITHMS)
  def test_rows_without_a_number(self, algorithm):
    self.check_rows_without_a_number(algorithm, True)

  @parameterized.parameters(*forms.ALGORITHMS)
  @pytest.mark.slow
  def test_rows_without_a_number_or_mask(self, algorithm):
    self.check_rows_without_a_number(algorithm, False)

  def check_rows_without_a_number(self, algorithm, masked):
    cases = {
      (-INF, -INF, -INF): (NAN, NAN, -INF),
      (INF, 1.0, 2.0): (NAN, NAN, INF),
      (INF, -INF, 2.0): (NAN, NAN, INF),
      (NAN, 1.0, 2.0): (NAN, NAN, NAN),
      (NAN, INF, -INF): (NAN, NAN, NAN),
    }
    x = np.array([*cases, *[(0.0, 0.0, 0.0)] * 3], np.float32)
    where = None
    if masked:
      x = np.concatenate([x, np.full((len(x), 1), NAN, np.float32)], 1)
      where = np.array([True] * 3 + [False])
    for kind, i in (('softmax', 0), ('log_softmax', 1), ('logsumexp', 2)):
      y = np.asarray(OPS[kind](x, where=where, algorithm=algorithm))
      y = y if kind == 'logsumexp' else y[:, :3]
      for row, want in zip(y, cases.values(), strict=False):
        np.testing.assert_array_equal(row, np.full_like(row, want[i]))
      self.assertTrue(np.isfinite(y[5:]).all())

  @parameterized.parameters('auto', 'online')
  def test_row_masked_as_a_whole(self, algorithm):
    self.check_row_masked(algorithm)

  @pytest.mark.slow
  def test_row_masked_as_a_whole_by_pair(self):
    self.check_row_masked('pair')

  def check_row_masked(self, algorithm):
    x = np.ones(MASKED, np.float32)
    x[::2, 1] = NAN
    where = np.broadcast_to(np.arange(MASKED[0])[:, None] % 2 > 0, MASKED)
    options = {'where': where, 'algorithm': algorithm}
    y = lowbit.softmax(x, **options)
    np.testing.assert_array_equal(y, np.where(where, 0.25, 0))
    y = np.asarray(lowbit.log_softmax(x, **options))
    np.testing.assert_array_equal(y[~where], -INF)
    y = np.asarray(lowbit.logsumexp(x, **options))
    np.testing.assert_array_equal(y[::2], -INF)

  def test_agrees_with_jax_on_what_is_not_a_number(self):
    values = (-INF, -1.0, INF, NAN)
    x = np.array(np.meshgrid(*[values] * 4), np.float32).reshape(4, -1).T
    self.assertEqual(x.shape, SHORT)
    wanted = jax.jit(lambda x: {k: f(x, axis=-1) for k, f in JAX_OPS.items()})
    for kind, want in wanted(x).items():
      y, want = np.asarray(OPS[kind](x)), np.asarray(want)
      for special in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(special(y), special(want), kind)

  @parameterized.parameters(*forms.KINDS)
  def test_empty(self, kind):
    reduced = kind == 'logsumexp'
    y = OPS[kind](jnp.zeros((3, 0)))
    self.assertEqual(y.shape, (3,) if reduced else (3, 0))
    self.assertTrue((y == -INF).all())
    y = OPS[kind](jnp.zeros((3, 0), jnp.bfloat16), 0, out_dtype=jnp.float16)
    self.assertEqual(y.shape, (0,) if reduced else (3, 0))
    self.assertEqual(y.dtype, jnp.float16)

  def test_pair_beyond_its_domain_is_nan(self):
    x = repeated(22712, 22711, -22712, 0)
    np.testing.assert_array_equal(
      lowbit.softmax(x, algorithm='pair'), lowbit.softmax(x)
    )
    x = repeated(22714, 22713, -22712, 0)
    self.assertTrue(np.isnan(lowbit.softmax(x, algorithm='pair')).all())
    error = rows.units(lowbit.softmax(x), rows.exact('softmax', x))
    self.assertLessEqual(error, 12)

  @parameterized.parameters('softmax', 'logsumexp')
  def test_masks_broadcast(self, kind):
    self.check_mask_broadcasts(kind)

  @pytest.mark.slow
  def test_masks_of_log_softmax_broadcast(self):
    self.check_mask_broadcasts('log_softmax')

  def check_mask_broadcasts(self, kind):
    x = rows.draw('wide', (3, 4, 5))
    where = np.array([True, False, True, True, False])
    full = np.broadcast_to(where, x.shape)
    op = functools.partial(OPS[kind], algorithm='pair')
    np.testing.assert_array_equal(op(x, where=where), op(x, where=full))
    y = op(x, 1, where=where[:4, None])
    want = rows.exact(kind, np.moveaxis(x, 1, -1), where[:4])
    y = np.asarray(y if kind == 'logsumexp' else np.moveaxis(y, 1, -1))
    np.testing.assert_allclose(
      y, want.astype(np.float32), rtol=16 * rows.U, atol=16 * rows.U
    )


class DerivativeTest(parameterized.TestCase):
  """Gradients are within 16 u of the largest term, and rounded once."""

  @parameterized.parameters(
    ('wide', True, 'bfloat16', 'softmax'),
    ('wide', True, 'bfloat16', 'log_softmax'),
    ('beyond', True, 'float32', 'logsumexp'),
  )
  def test_reverse_and_forward(self, *case):
    self.check_reverse_and_forward(*case)

  @pytest.mark.slow
  def test_reverse_and_forward_without_a_mask(self):
    self.check_reverse_and_forward('offset', False, 'float32', 'softmax')

  def check_reverse_and_forward(self, name, masked, dtype, kind):
    x = rows.draw(name, (3, 40)).astype(dtype)
    where = np.arange(40) % 3 > 0 if masked else None
    f = functools.partial(OPS[kind], where=where, out_dtype=jnp.float32)
    rng = np.random.default_rng(0)
    shape = (3,) if kind == 'logsumexp' else (3, 40)
    g = rng.normal(size=shape).astype(np.float32)
    dx = rng.normal(size=x.shape).astype(dtype)

    @jax.jit
    def derivatives(x, g, dx):
      _, forward = jax.linearize(f, x)
      return jax.linear_transpose(forward, x)(g)[0], forward(dx)

    got, tangent = derivatives(x, g, dx)
    self.assertEqual(got.dtype, x.dtype)
    want = _exact_gradient(kind, x, g, where)
    size = np.abs(want).max(-1, keepdims=True) + np.abs(g).max()
    bound = 64 * rows.U * size + rows.ROUNDING[dtype] * np.abs(want)
    self.assertTrue(
      (np.abs(np.asarray(got).astype(rows.LONG) - want) <= bound).all()
    )
    # <g, J dx> = <J^T g, dx>, with J^T g exact.
    left = (np.asarray(tangent).astype(rows.LONG) * g).sum()
    if kind == 'log_softmax' and masked:
      left = (np.where(where, tangent, 0.0).astype(rows.LONG) * g).sum()
    right = (want * np.asarray(dx).astype(rows.LONG)).sum()
    np.testing.assert_allclose(
      float(left), float(right), atol=1e-4 * float(np.abs(size).max())
    )

  @parameterized.parameters('softmax', 'log_softmax')
  def test_hessian(self, kind):
    self.check_hessian(kind)

  @pytest.mark.slow
  def test_hessian_of_logsumexp(self):
    self.check_hessian('logsumexp')

  def check_hessian(self, kind):
    x = rows.draw('normal', (5,))
    # Each entry of the result has its own nonlinear weight.
    powers = np.arange(1, 2 if kind == 'logsumexp' else 6)

    def exact(x):
      return np.sum(np.sin(powers * rows.exact(kind, x / 2.5)))

    def f(x):
      y = OPS[kind](x, temperature=2.5, algorithm='pair')
      return jnp.sum(jnp.sin(powers.astype(x.dtype) * y))

    # Second differences: off by h^2 times fourth derivatives, below 1e-5.
    steps = np.eye(5, dtype=rows.LONG) * 1e-4
    signs = (1, 1), (1, -1), (-1, 1), (-1, -1)
    want = [
      [sum(r * s * exact(x + r * a + s * b) for r, s in signs) for b in steps]
      for a in steps
    ]
    want = np.array(want) / (4 * 1e-4**2)
    outer = jax.jacfwd if kind == 'softmax' else jax.jacrev
    got = jax.jit(outer(jax.jacrev(f)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  @parameterized.parameters('softmax', 'log_softmax')
  def test_masked_places_have_no_gradient(self, kind):
    self.check_masked_places(kind)

  @pytest.mark.slow
  def test_masked_places_of_logsumexp_have_no_gradient(self):
    self.check_masked_places('logsumexp')

  def check_masked_places(self, kind):
    masked = rows.draw('normal', MASKED)
    where = masked > 0
    where[0] = False
    masked[0, 1], masked[2, ~where[2]] = NAN, INF

    @jax.jit  # the mask is traced
    def slope(x, where):
      def f(x):
        y = OPS[kind](x, where=where)
        y = y if kind == 'logsumexp' else y[:, 0]
        return jnp.where(jnp.isfinite(y), y, 0.0).sum()

      return jax.grad(f)(x)

    g = np.asarray(slope(masked, where))
    np.testing.assert_array_equal(g[~where], 0)
    self.assertTrue(np.isfinite(g).all())
    self.assertGreater(np.abs(g).max(), 0.1)

  @parameterized.parameters('softmax', 'log_softmax')
  def test_cotangents_of_masked_places_reach_nothing(self, kind):
    x, g = rows.draw('normal', MASKED), rows.draw('normal', MASKED)
    where = x > 0

    @jax.jit
    def pulled(x, where, g):
      return jax.vjp(lambda x: OPS[kind](x, where=where), x)[1](g)[0]

    want = pulled(x, where, np.where(where, g, 0))
    for poison in NAN, INF:
      got = pulled(x, where, np.where(where, g, np.float32(poison)))
      np.testing.assert_array_equal(got, want)


class TransformTest(parameterized.TestCase):
  def test_vmap(self):
    self.check_map(jax.vmap)

  @pytest.mark.slow
  def test_scan(self):
    self.check_map(
      lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1]
    )

  def check_map(self, mapped):
    x = rows.draw('wide', WIDE)
    x[:4] = rows.draw('beyond', (4, WIDE[1]))
    want = np.asarray(lowbit.softmax(x)).reshape(4, 4, -1)
    got = mapped(lowbit.softmax)(x.reshape(want.shape))
    # XLA compiles each form anew.
    np.testing.assert_allclose(got, want, rtol=16 * rows.U, atol=2.0**-126)

  @pytest.mark.slow
  def test_remat(self):
    x = rows.draw('wide', WIDE)

    def loss(op, x):
      return jnp.sum(jnp.cos(op(x)))

    @jax.jit
    def slopes(x):
      op = functools.partial(lowbit.softmax, algorithm='pair')
      ops = op, jax.checkpoint(op)
      return [jax.grad(functools.partial(loss, f))(x) for f in ops]

    plain, remat = slopes(x)
    np.testing.assert_allclose(plain, remat, rtol=1e-6, atol=1e-7)

  def test_shards_of_rows(self):
    self.check_shards(lambda f, mesh: f)

  @pytest.mark.slow
  def test_shard_map_over_rows(self):
    self.check_shards(
      functools.partial(jax.shard_map, in_specs=P('rows'), out_specs=P('rows'))
    )

  def check_shards(self, wrap):
    x = rows.draw('wide', WIDE)
    x[5] = rows.draw('beyond', (1, WIDE[1]))
    where = np.random.default_rng(0).random(x.shape) < 0.8
    mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))

    def f(x, where):
      return lowbit.logsumexp(x, where=where)

    sharding = jax.NamedSharding(mesh, P('rows'))
    got = jax.jit(wrap(f, mesh=mesh))(*jax.device_put((x, where), sharding))
    np.testing.assert_array_equal(got, f(x, where))
    self.assertEqual(got.sharding.spec[0], 'rows')

  def test_rows_do_not_see_each_other(self):
    self.check_rows()

  @pytest.mark.slow
  def test_a_row_alone(self):
    self.check_rows([0])

  def check_rows(self, *more):
    x = rows.draw('wide', WIDE)
    x[11] = rows.draw('beyond', (1, WIDE[1]))
    x[12] = NAN
    x[13] = -INF
    whole = np.asarray(lowbit.log_softmax(x))
    # XLA compiles every shape anew, so the last bits may differ; kernels are
    # bitwise the same.
    close = functools.partial(
      np.testing.assert_allclose, rtol=32 * rows.U, atol=12 * rows.U
    )
    order = np.random.default_rng(0).permutation(WIDE[0])
    for some in (order, *more):
      close(lowbit.log_softmax(x[some]), whole[some])

  def test_order_of_columns(self):
    x = rows.draw('wide', WIDE)
    order = np.random.default_rng(0).permutation(WIDE[1])
    y, z = np.asarray(lowbit.softmax(x)), lowbit.softmax(x[:, order])
    bound = 2 * reference.chain(WIDE[1]) * rows.U
    np.testing.assert_allclose(y[:, order], z, rtol=bound)


class DispatchTest(parameterized.TestCase):
  @parameterized.parameters(*forms.KINDS)
  def test_choice(self, kind):
    x = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    choice = lowbit.select_implementation(kind, x, axis=0)
    self.assertEqual(choice.implementation, 'xla')
    self.assertEqual(lowbit.implementations(kind)[-1], 'xla')

  def check_list_of_names(self, kind):
    x = np.ones(SHORT, np.float32)
    op = functools.partial(OPS[kind], algorithm='pair')
    np.testing.assert_array_equal(op(x, implementation=['xla']), op(x))

  def test_a_list_of_names(self):
    self.check_list_of_names('softmax')

  @parameterized.parameters('log_softmax', 'logsumexp')
  @pytest.mark.slow
  def test_a_list_of_names_for_more_kinds(self, kind):
    self.check_list_of_names(kind)

  def test_named_implementation_refuses(self):
    with self.assertRaises((NotImplementedError, ValueError)):
      lowbit.softmax(jnp.ones((2, 3)), implementation='cuda')

  @parameterized.parameters('tpu', 'mosaic_gpu')
  def test_kernels_are_passed_over_here(self, name):
    choice = lowbit.select_implementation('softmax', jnp.ones((2, 512)))
    self.assertIn('for cpu', choice.refusals[name])


def _as_kernel(seen):
  """The reference in the place of a kernel for matrices."""

  def run(x, where, **options):
    seen.append(x.shape)
    return reference.run(x, where, **options)

  def plan(x, where, call):
    del x, where
    by_rows = functools.partial(
      _softmax._last_axis, _softmax._by_rows(run), call=call
    )
    return _dispatch.Plan('', by_rows)

  return mock.patch.dict(_softmax.TABLE, {'tpu': plan})


class KernelTest(parameterized.TestCase):
  """What stands between the public functions and a kernel."""

  def _compare(self, f, *arguments):
    """f(op options, *arguments), with a kernel and without."""
    options = {'algorithm': 'pair'}
    want = jax.jit(functools.partial(f, options))(*arguments)
    seen = []
    # Compiled programs are kept, so each test asks for this in its own way.
    names = ['tpu'] * (1 + next(_COUNT))
    here = mock.patch.object(_dispatch, '_why_unavailable', lambda *_: None)
    with _as_kernel(seen), here:
      options = options | {'implementation': names}
      got = jax.jit(functools.partial(f, options))(*arguments)
    np.testing.assert_allclose(got, want, rtol=16 * rows.U, atol=4 * rows.U)
    return got, seen

  def test_kernels_get_matrices(self):
    self.check_matrices('logsumexp')

  @parameterized.parameters('softmax', 'log_softmax')
  @pytest.mark.slow
  def test_kernels_get_matrices_for_more_kinds(self, kind):
    self.check_matrices(kind)

  def check_matrices(self, kind):
    x = rows.draw('wide', (2, 5, 3))
    _, seen = self._compare(
      lambda options, x: OPS[kind](x, 1, where=x > 0, **options), x
    )
    self.assertEqual(set(seen), {(6, 5)})

  def test_vmap_makes_more_rows(self):
    x = rows.draw('wide', (4, 3, 50))
    where = x[0] > 0

    def f(options, x):
      return jax.vmap(lambda x: lowbit.softmax(x, where=where, **options))(x)

    _, seen = self._compare(f, x)
    self.assertIn((12, 50), seen)

  def test_derivatives(self):
    x = rows.draw('normal', (4,))

    def f(options, x):
      return jax.hessian(lambda x: lowbit.softmax(x, **options)[0])(x)

    self._compare(f, x)

  def test_sharded_rows_stay_where_they_are(self):
    self.check_sharded_rows('logsumexp')

  @pytest.mark.slow
  def test_sharded_rows_of_softmax_stay_where_they_are(self):
    self.check_sharded_rows('softmax')

  def check_sharded_rows(self, kind):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ('a', 'b'))
    x = rows.draw('wide', (8, 6, 40))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P('a', 'b')))
    got, seen = self._compare(
      lambda options, x: OPS[kind](x, **options), sharded
    )
    self.assertIn((2 * 3, 40), seen)
    self.assertEqual(tuple(got.sharding.spec)[:2], ('a', 'b'))

  def test_sharded_columns_are_gathered(self):
    mesh = Mesh(np.array(jax.devices()[:8]), ('a',))
    x = rows.draw('wide', (8, 40))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P(None, 'a')))
    self._compare(lambda options, x: lowbit.softmax(x, **options), sharded)


ERRORS = (
  ('no_axis', {'x': np.float32(1)}, ValueError, (r'x.shape=\(\)', 'x\\[None')),
  ('int', {'x': np.ones(3, int)}, TypeError, ('x.dtype=int', 'cast')),
  ('complex', {'x': np.ones(3, np.complex64)}, TypeError, ('complex64',)),
  ('axis', {'axis': 2}, ValueError, ('axis=2', r'\(2, 3\)')),
  ('axes', {'axis': (0, -2)}, ValueError, (r'axis=\(0, -2\)', 'none twice')),
  ('no_axes', {'axis': ()}, ValueError, (r'axis=\(\)', 'one axis or more')),
  ('where_dtype', {'where': np.ones((2, 3))}, TypeError, ('float', 'bool')),
  (
    'where_shape',
    {'where': np.ones((3, 2), bool)},
    ValueError,
    (r'where.shape=\(3, 2\)', r'x.shape=\(2, 3\)'),
  ),
  (
    'where_rank',
    {'where': np.ones((4, 2, 3), bool)},
    ValueError,
    (r'where.shape=\(4, 2, 3\)',),
  ),
  ('zero', {'temperature': 0.0}, ValueError, ('temperature=0.0', 'one_hot')),
  ('negative', {'temperature': -1}, ValueError, ('temperature=-1',)),
  ('tiny', {'temperature': 1e-45}, ValueError, ('temperature=1e-45',)),
  ('nan', {'temperature': NAN}, ValueError, ('temperature=nan',)),
  (
    'temperatures',
    {'temperature': np.ones(2, np.float32)},
    TypeError,
    ('temperature', r'\(2,\)'),
  ),
  ('out', {'out_dtype': jnp.int8}, TypeError, ('out_dtype=int8',)),
  (
    'algorithm',
    {'algorithm': 'fast'},
    ValueError,
    ("algorithm='fast'", "'auto', 'pair', 'online'"),
  ),
  ('exp', {'exp': 'fast'}, ValueError, ("exp='fast'", "'certified'")),
  (
    'exp_online',
    {'exp': 'certified', 'algorithm': 'online'},
    ValueError,
    ("exp='certified'", "algorithm='auto'"),
  ),
  (
    'exp_kernel',
    {'exp': 'certified', 'implementation': 'tpu'},
    NotImplementedError,
    (),
  ),
  (
    'implementation',
    {'implementation': 'cuda'},
    ValueError,
    ("implementation='cuda'", 'mosaic_gpu'),
  ),
)


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(*ERRORS)
  def test_message(self, change, error, words):
    arguments = {'x': np.ones((2, 3), np.float32), **change}
    x = arguments.pop('x')
    for op in OPS.values():
      for f in (op, lambda x, **kw: jax.jit(functools.partial(op, **kw))(x)):
        with self.assertRaisesRegex(error, '.*'.join(words)):
          f(x, **arguments)


class MutationTest(absltest.TestCase):
  """Faults that the checks above must see."""

  def test_mask_forgotten_in_the_derivative(self):
    x, where = jnp.array([1.0, 2.0, 3.0]), jnp.array([True, True, False])
    with mock.patch.object(reference, 'run', _forget_mask(reference.run)):
      y = lowbit.softmax(x, where=where, algorithm='pair')
    self.assertNotEqual(y[2], 0)


def _forget_mask(run):
  return lambda x, where, **options: run(x, None, **options)


if __name__ == '__main__':
  absltest.main()
