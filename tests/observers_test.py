"""Observers of activations, against NumPy in float64.

A float32 sum of r numbers, each with a rounding or two of its own, is within
(r + 4) 2^-24 of the sum of their magnitudes, in any order. A mean that is e
beside the true one adds r e^2 to the sum of squares around it, and as much
again where parts are merged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, observers
from lowbit_jax._walk import Product

N = 4
U = 2.0**-24
ALL = observers.several(
  absmax=observers.absmax,
  moments=observers.moments,
  gram=observers.gram,
  samples=observers.samples(N),
)


def data(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def integers(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randint(-8, 9, shape).astype(np.float32)


def shape_of(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def dot(x, w, dims, weight='rhs') -> tuple[Product, tuple]:
  """A product, and its operands."""
  operands = (x, w) if weight == 'rhs' else (w, x)
  shapes = map(shape_of, operands)
  params = {'dimension_numbers': dims}
  return Product('w', 'dot_general', *shapes, weight, params), operands


def matmul(x) -> tuple[Product, tuple]:
  w = np.ones((x.shape[-1], 3), np.float32)
  return dot(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def ragged(x, sizes) -> tuple[Product, tuple]:
  w = np.ones((len(sizes), x.shape[1], 3), np.float32)
  product = Product('w', 'ragged_dot', shape_of(x), shape_of(w), 'rhs', {})
  return product, (x, w, sizes)


def conv(x, w, **options) -> tuple[Product, tuple]:
  """With the parameters that JAX notes for a convolution."""
  (equation,) = jax.make_jaxpr(
    functools.partial(lax.conv_general_dilated, **options)
  )(x, w).eqns
  name, params = equation.primitive.name, equation.params
  return Product('w', name, shape_of(x), shape_of(w), 'rhs', params), (x, w)


def observe(observer, product, operands):
  return jax.jit(lambda *xs: observer.observe(product, *xs))(*operands)


def assert_close(got, want, tolerance):
  want, got = np.float64(want), np.float64(got)
  np.testing.assert_array_less(np.abs(got - want), tolerance + 1e-30)


def assert_observed(got, rows):
  """Observations of one member are those of the rows in float64."""
  x = np.float64(rows)
  r, k = x.shape
  sum_error = (r + 4) * U
  np.testing.assert_array_equal(
    got['absmax'], np.max(np.abs(x), axis=0, initial=0)
  )
  for name in ('moments', 'gram', 'samples'):
    np.testing.assert_array_equal(got[name].seen, r)

  mean = x.sum(0) / max(r, 1)
  mean_error = sum_error * np.abs(x).sum(0) / max(r, 1)
  assert_close(got['moments'].mean, mean, mean_error)
  squares = ((x - mean) ** 2).sum(0)
  error = sum_error * squares + r * mean_error**2
  assert_close(got['moments'].squares, squares, 2 * error)

  products = sum_error * (np.abs(x).T @ np.abs(x))
  assert_close(got['gram'].products, x.T @ x, products)

  samples = np.zeros((N, k))
  samples[: min(N, r)] = x[:N]
  np.testing.assert_array_equal(got['samples'].rows, samples)


def assert_members_observed(got, rows):
  for member in np.ndindex(rows.shape[:-2]):
    one = jax.tree.map(lambda x, member=member: x[member], got)
    assert_observed(one, rows[member])
  leaves = jax.tree.leaves(got)
  for leaf in leaves:
    assert leaf.shape[: rows.ndim - 2] == rows.shape[:-2]
  assert all(leaf.dtype == np.float32 for leaf in leaves)


# Activations, weight, dimension numbers with the activations first, and what
# the rows are.
DOTS = {
  'matrix': ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ())),
             lambda x: x.reshape(6, 4)),
  'a_vector': ((4,), (4, 5), (((0,), (0,)), ((), ())), lambda x: x[None]),
  'contracted_axes_out_of_order': (
    (3, 4, 2, 5), (4, 6, 5), (((3, 1), (2, 0)), ((), ())),
    lambda x: x.transpose(0, 2, 1, 3).reshape(6, 20)),
  'members': ((7, 3, 4), (3, 4, 5), (((2,), (1,)), ((1,), (0,))),
              lambda x: x.transpose(1, 0, 2)),
  'members_out_of_order': (
    (3, 2, 7, 4), (2, 3, 5, 4), (((3,), (3,)), ((0, 1), (1, 0))),
    lambda x: x.transpose(1, 0, 2, 3)),
}  # fmt: skip


class DotTest(parameterized.TestCase):
  @parameterized.parameters(*DOTS)
  def test_weight_on_the_right(self, name):
    x_shape, w_shape, dims, rows = DOTS[name]
    x = data(*x_shape)
    product, operands = dot(x, np.ones(w_shape, np.float32), dims)
    assert_members_observed(observe(ALL, product, operands), rows(x))

  @parameterized.parameters(*DOTS)
  def test_weight_on_the_left_gives_the_same_rows(self, name):
    x_shape, w_shape, dims, rows = DOTS[name]
    x, w = data(*x_shape), np.ones(w_shape, np.float32)
    dims = tuple(pair[::-1] for pair in dims)
    product, operands = dot(x, w, dims, weight='lhs')
    found = observers.rows(product, *operands)
    self.assertIsNone(found.sizes)
    np.testing.assert_array_equal(found.x, rows(x))

  def test_rows_times_the_weight_are_the_product(self):
    for x_shape, w_shape, dims, _ in DOTS.values():
      x, w = integers(*x_shape), integers(*w_shape, seed=1)
      (_, inputs), (_, members) = dims
      own = *sorted(members), *sorted(inputs)
      free = [a for a in range(w.ndim) if a not in own]
      product, operands = dot(x, w, dims)
      rows = np.asarray(observers.rows(product, *operands).x)
      matrix = w.transpose(*own, *free)
      matrix = matrix.reshape(*rows.shape[:-2], rows.shape[-1], -1)
      y = np.asarray(lax.dot_general(x, w, dims))
      y = y.transpose(*np.argsort(members), *range(len(members), y.ndim))
      np.testing.assert_array_equal(np.ravel(rows @ matrix), np.ravel(y))

  def test_no_rows_give_zeros(self):
    product, operands = matmul(data(0, 3))
    found = observe(ALL, product, operands)
    assert_observed(found, np.zeros((0, 3)))

  def test_a_large_mean_leaves_the_squares_exact(self):
    x = 1000 + integers(100, 3) / 8
    product, operands = matmul(x)
    found = observe(ALL, product, operands)
    assert_observed(found, x)


# Activations, kernel, their layouts, strides, padding, dilation of activations
# and of the kernel, feature groups, batch groups.
CONVS = {
  'same': ((2, 5, 6, 3), (3, 2, 3, 4), 'NHWC', 'HWIO', (2, 1),
           ((1, 1), (0, 1)), (1, 1), (1, 1), 1, 1),
  'outputs_first': ((2, 3, 7, 5), (4, 3, 3, 2), 'NCHW', 'OIHW', (1, 2),
                    ((2, 0), (0, 3)), (1, 1), (2, 1), 1, 1),
  'dilated': ((6, 2, 3), (2, 3, 4), 'WNC', 'WIO', (2,), ((-1, 2),), (3,),
              (2,), 1, 1),
  'other_layouts': ((3, 2, 6), (2, 4, 3), 'CNW', 'WOI', (1,), ((0, 0),), (1,),
                    (1,), 1, 1),
  'depthwise': ((2, 4, 4, 3), (2, 2, 1, 6), 'NHWC', 'HWIO', (1, 1),
                ((0, 0), (1, 0)), (1, 1), (1, 1), 3, 1),
  'feature_groups': ((2, 6, 5), (4, 3, 2), 'NCW', 'OIW', (1,), ((1, 1),),
                     (1,), (2,), 2, 1),
  'batch_groups': ((6, 5, 2), (3, 2, 9), 'NWC', 'WIO', (2,), ((0, 1),), (1,),
                   (1,), 1, 3),
}  # fmt: skip


def patches(x, w, x_layout, w_layout, *window) -> np.ndarray:
  """(groups, rows, K), number by number."""
  strides, pads, x_steps, w_steps, features, batches = window
  space = [s for s in x_layout if s not in 'NC']
  space, offsets = ''.join(space), ''.join(space).lower()
  x = np.einsum(f'{x_layout}->NC{space}', x)
  sizes = [w.shape[w_layout.index(s)] for s in space]
  out = [
    ((n - 1) * x_step + sum(pad) - (size - 1) * w_step) // stride + 1
    for n, size, stride, pad, x_step, w_step in zip(
      x.shape[2:], sizes, strides, pads, x_steps, w_steps, strict=True
    )
  ]
  found = np.zeros((*x.shape[:2], *out, *sizes))
  for place in np.ndindex(*out, *sizes):
    pairs = zip(place[: len(out)], place[len(out) :], strict=True)
    wide = np.array(
      [
        p * stride + k * w_step - pad[0]
        for (p, k), stride, w_step, pad in zip(
          pairs, strides, w_steps, pads, strict=True
        )
      ]
    )
    at = wide // x_steps
    if np.all(wide % x_steps == 0) and np.all((at >= 0) & (at < x.shape[2:])):
      found[(..., *place)] = x[(..., *at)]
  n, c, *rest = found.shape
  found = found.reshape(batches, n // batches, features, c // features, *rest)
  inputs = w_layout.replace('O', '').lower().replace('i', 'c')
  rows = np.einsum(f'bnfc{space}{offsets}->bfn{space}{inputs}', found)
  channels = c // features * np.prod(sizes)
  return rows.reshape(features * batches, -1, channels)


class ConvTest(parameterized.TestCase):
  @parameterized.parameters(*CONVS)
  def test_patches(self, name):
    x_shape, w_shape, x_layout, w_layout, *window = CONVS[name]
    x, w = integers(*x_shape), integers(*w_shape, seed=1)
    names = ('window_strides', 'padding', 'lhs_dilation', 'rhs_dilation',
             'feature_group_count', 'batch_group_count')  # fmt: skip
    options = dict(zip(names, window, strict=True))
    options['dimension_numbers'] = x_layout, w_layout, x_layout
    product, operands = conv(x, w, **options)

    @jax.jit
    def run(x, w):
      rows = observers.rows(product, x, w).x
      return rows, lax.conv_general_dilated(x, w, **options)

    got, y = run(x, w)
    rows = patches(x, w, x_layout, w_layout, *window)
    groups = len(rows)
    want = rows[0] if groups == 1 else rows
    np.testing.assert_array_equal(got, want)
    if name == 'depthwise':
      assert_members_observed(observe(ALL, product, operands), want)

    # JAX agrees that these are the rows of the convolution.
    inputs = w_layout.replace('O', '')
    matrix = np.einsum(f'{w_layout}->{inputs}O', w)
    matrix = matrix.reshape(rows.shape[2], groups, -1)
    space = x_layout.replace('N', '').replace('C', '')
    y = np.einsum(f'{x_layout}->N{space}C', y)
    y = y.reshape(rows.shape[1], groups, -1)
    np.testing.assert_array_equal(np.einsum('grk,kgo->rgo', rows, matrix), y)

  def test_nan_stays_in_its_patches(self):
    x = np.zeros((1, 6, 1), np.float32)
    x[0, 0] = np.nan
    w = np.ones((2, 1, 1), np.float32)
    product, operands = conv(
      x, w, window_strides=(1,), padding='VALID',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )  # fmt: skip
    found = np.isnan(observers.rows(product, *operands).x)
    self.assertEqual(np.argwhere(found).tolist(), [[0, 0]])


class RaggedTest(parameterized.TestCase):
  def test_each_group_sees_its_rows(self):
    # Groups without rows, of one window, of several, and with a last window
    # that reaches beyond the five rows that are left.
    sizes = np.array([0, 3, 300, 0, 1, 128, 0, 50], np.int32)
    m = sizes.sum()
    x = data(m + 5, 6)
    x[m:] = np.nan
    found = observe(ALL, *ragged(x, sizes))
    for e, end in enumerate(np.cumsum(sizes)):
      one = jax.tree.map(lambda leaf, e=e: leaf[e], found)
      assert_observed(one, x[end - sizes[e] : end])

  def test_no_copy_for_every_group(self):
    product, operands = ragged(data(512, 64), np.full(100, 5, np.int32))
    compiled = (
      jax.jit(lambda *xs: observers.moments.observe(product, *xs))
      .lower(*operands)
      .compile()
    )
    self.assertLess(
      compiled.memory_analysis().temp_size_in_bytes, 4 * 4 * 512 * 64
    )

  def test_runs_within_shard_map(self):
    mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Auto,))
    x, sizes = data(12, 4), np.array([2, 3, 1, 4], np.int32)

    def run(x, sizes):
      product, operands = ragged(x, sizes)
      return observers.gram.observe(product, *operands)

    found = jax.jit(
      jax.shard_map(run, mesh=mesh, in_specs=P('d'), out_specs=P('d'))
    )(x, sizes)
    np.testing.assert_array_equal(found.seen, sizes)
    part = np.float64(x[6:7])
    want = part.T @ part
    assert_close(found.products[2], want, 5 * U * np.abs(want))


class OperandTest(parameterized.TestCase):
  def test_bfloat16(self):
    x = jnp.asarray(data(40, 6), jnp.bfloat16)
    found = observe(ALL, *matmul(x))
    self.assertEqual(found['samples'].rows.dtype, jnp.bfloat16)
    rest = {k: v for k, v in found.items() if k != 'samples'}
    for leaf in jax.tree.leaves(rest):
      self.assertEqual(leaf.dtype, np.float32)
    assert_observed(found, np.asarray(x, np.float64))

  @parameterized.parameters(np.int8, jnp.float8_e4m3fn)
  def test_others_become_float32(self, dtype):
    x = integers(3, 4).astype(dtype)
    product, operands = matmul(x)
    found = observers.rows(product, *operands)
    self.assertEqual(found.x.dtype, np.float32)
    np.testing.assert_array_equal(found.x, x.astype(np.float32))

  def test_stored_activations(self):
    q = lowbit_jax.quantize(data(2, 5, 32), formats.mxfp4)
    product, (_, w) = matmul(q)
    np.testing.assert_array_equal(
      observers.rows(product, q, w).x,
      lowbit_jax.dequantize(q).reshape(10, 32),
    )

  def test_what_is_not_recorded(self):
    x = data(3, 4)
    product, operands = matmul(x)
    grouped, of_groups = ragged(x, np.array([3], np.int32))
    for case, values in (
      (product._replace(weight=None), operands),
      (product._replace(op='gather'), operands),
      (grouped._replace(weight='lhs'), of_groups),
      (product, (x.astype(np.complex64), operands[1])),
    ):
      self.assertIsNone(observers.rows(case, *values))
      self.assertIsNone(ALL.observe(case, *values))
      self.assertIsNone(observers.gram.observe(case, *values))

  def test_has_no_derivative(self):
    product, (x, *rest) = ragged(data(6, 4), np.array([2, 4], np.int32))

    @jax.grad
    def gradient(x):
      return jnp.sum(observers.moments.observe(product, x, *rest).mean)

    np.testing.assert_array_equal(gradient(x), 0)

  def test_gram_is_as_precise_as_the_device_can(self):
    product, operands = matmul(data(3, 4))
    jaxpr = jax.make_jaxpr(lambda *xs: observers.gram.observe(product, *xs))
    (dot,) = (
      e for e in jaxpr(*operands).eqns if e.primitive.name == 'dot_general'
    )
    self.assertEqual(set(dot.params['precision']), {lax.Precision.HIGHEST})

  def test_explicit_meshes(self):
    mesh = jax.make_mesh(
      (2, 2), ('d', 't'), axis_types=(AxisType.Explicit,) * 2
    )
    x = data(4, 6, 8)
    product, (_, w) = matmul(x)
    with jax.set_mesh(mesh):
      x = jax.device_put(x, NamedSharding(mesh, P('d', None, 't')))
      w = jax.device_put(w, NamedSharding(mesh, P('t', None)))
      found = observe(ALL, product, (x, w))
    assert_observed(found, np.asarray(x).reshape(24, 8))


@functools.cache
def parts():
  """Observations of three runs of rows with members, and these rows."""
  dims = ((2,), (1,)), ((0,), (0,))
  w = np.ones((2, 6, 3), np.float32)
  # The first has fewer rows than samples are kept.
  rows = [data(2, n, 6, seed=i) + i for i, n in enumerate((2, 5, 5))]
  return [observe(ALL, *dot(x, w, dims)) for x in rows], rows


merge = jax.jit(ALL.merge)


class MergeTest(parameterized.TestCase):
  def test_zeros_are_those_of_nothing(self):
    for s in parts()[0]:
      zeros = jax.tree.map(np.zeros_like, s)
      for merged in (merge(zeros, s), merge(s, zeros)):
        jax.tree.map(np.testing.assert_array_equal, merged, s)

  def test_is_associative(self):
    (a, b, c), rows = parts()
    rows = np.concatenate(rows, axis=1)
    assert_members_observed(merge(merge(a, b), c), rows)
    assert_members_observed(merge(a, merge(b, c)), rows)

  def test_samples_keep_the_first(self):
    (a, b, _), (x, y, _) = parts()
    for merged, rows in ((merge(b, a), (y, x)), (merge(a, b), (x, y))):
      want = np.concatenate(rows, axis=1)[:, :N]
      np.testing.assert_array_equal(merged['samples'].rows, want)
      np.testing.assert_array_equal(merged['samples'].seen, [7, 7])


class ValueTest(absltest.TestCase):
  def test_are_hashable_values(self):
    self.assertEqual(observers.samples(3), observers.samples(3))
    self.assertNotEqual(observers.samples(3), observers.samples(4))
    both = observers.several(a=observers.absmax, b=observers.samples(3))
    self.assertEqual(
      hash(both), hash(observers.several(**dict(both.observers)))
    )

  def test_mistakes(self):
    for n in (0, -1, 2.0, '3'):
      with self.assertRaisesRegex(ValueError, f'n={n!r}.*positive int'):
        observers.samples(n)
    for value in (observers.samples, type(observers.gram), 'gram'):
      with self.assertRaisesRegex(TypeError, 'rows=.*observers.absmax'):
        observers.several(rows=value)


if __name__ == '__main__':
  absltest.main()
