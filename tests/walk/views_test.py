"""Views: what a function rearranges stays packed where blocks stay whole.

An observer keeps the weight that a product meets behind the view. Its values,
by the definition of a QArray in float64, are those of the weight at the
positions where the same view of a range of numbers finds them: bit for bit, as
nothing is computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lowbit_jax as lowbit
from lowbit_jax import qarray, transforms
from lowbit_jax.ops import Transformed
from tests.ops import products
from tests.walk import programs

L, K, N = 3, 512, 8
MEMBERS = np.array([[2, 0], [1, 1]])


def two() -> jax.Array:
  """A start that a program does not know."""
  return jnp.int32(2) + 0


VIEWS = {
  'transpose': lambda w: w.transpose(2, 0, 1),
  'swap': lambda w: w.mT,
  'cut free axis': lambda w: w.reshape(L, K, 2, N // 2),
  'cut block axis': lambda w: w.reshape(L, 2, K // 2, N),
  'join in front': lambda w: w.reshape(L * K, N),
  'join behind': lambda w: w.reshape(L, K * N),
  'expand': lambda w: w[:, None, :, None],
  'squeeze': lambda w: w[:1].squeeze(0),
  'broadcast': lambda w: jnp.broadcast_to(w, (2, *w.shape)),
  'repeat': lambda w: jnp.broadcast_to(w[:1], w.shape),
  'member': lambda w: w[1],
  'stride': lambda w: w[..., ::3],
  'slice of blocks': lambda w: w[:, K // 2 :],
  'slice in a block': lambda w: w[:, 8:],
  'dynamic member': lambda w: lax.dynamic_index_in_dim(w, two(), 0),
  'dynamic blocks': lambda w: lax.dynamic_slice_in_dim(w, two(), K // 2, 1),
  'split free axis': lambda w: jnp.split(w, 2, axis=-1)[1],
  'split block axis': lambda w: jnp.split(w, 2, axis=1)[1],
  'concatenate free axis': lambda w: jnp.concatenate([w, w[..., 4:]], -1),
  'concatenate blocks': lambda w: jnp.concatenate([w, w], 1),
  'copy': jnp.copy,
  'name': lambda w: checkpoint_name(w, 'weight'),
  'barrier': lax.optimization_barrier,
  'look up members': lambda w: jnp.take(w, MEMBERS, axis=0, mode='clip'),
  'index members': lambda w: w[MEMBERS],
  'look up columns': lambda w: jnp.take(w, MEMBERS, axis=-1, mode='clip'),
  'look up in blocks': lambda w: jnp.take(w, MEMBERS, axis=1, mode='clip'),
  'reverse': lambda w: w[::-1],
  'arithmetic': lambda w: w * 2,
}  # fmt: skip
CUT = 'must start and end at multiples of'
# Why a view of any format is no view of packed bytes,
REFUSED = {
  'join behind': 'reshape: its block axis is not the last of a group',
  'repeat': 'broadcast_in_dim: it is repeated along an axis of size 1',
  'slice in a block': CUT,
  'dynamic blocks': 'dynamic_slice: blocks are cut at a place that is traced',
  'look up in blocks': 'gather: it picks elements of its blocks',
  'reverse': 'rev has no packed form',
  'arithmetic': 'mul has no packed form',
}
WHOLE = 'its blocks are padded, or as long as the axis'
SCALES = 'concatenate: each of its parts has a tensor scale'
# and one of these formats; '' where blocks can be cut.
REFUSED_BY = {
  'nvfp4': {'concatenate free axis': SCALES, 'concatenate blocks': SCALES},
  'int8_channel': {
    'cut block axis': 'reshape: blocks of int8_channel would be cut',
    'join in front': 'reshape: blocks of int8_channel would be cut',
    'slice in a block': '',
    'concatenate blocks': WHOLE,
  },
  'mxfp4_32x32': {
    'cut free axis': 'reshape: blocks of mxfp4_32x32 would be cut',
    'stride': CUT,
    'split free axis': CUT,
    'concatenate free axis': CUT,
    'look up columns': 'gather: it picks elements of its blocks',
  },
}


def use(view):
  """A product with the viewed weight, which stands on the right."""

  def product(w):
    y = view(w)
    ones = jnp.ones(y.shape[-1:], y.dtype)
    return lax.dot_general(ones, y, (((0,), (y.ndim - 1,)), ((), ())))

  return product


def met(views, w):
  """The weight that a product meets behind each view; None for an array."""

  def run(w):
    seen = {k: programs.weights(use(view), w) for k, view in views.items()}
    return {k: weights.get('w') for k, weights in seen.items()}

  return jax.jit(run)(w)


def reasons(view, w) -> str:
  """Why a view is decoded, from the report."""
  rows = lowbit.packed(use(view)).report(w)
  dense = [r for r in rows if r.decoded and r.operation != 'dot_general']
  return '; '.join(row.how for row in dense)


def values(x) -> np.ndarray:
  """Float64 values of a QArray by its definition, or of a permuted one."""
  if isinstance(x, Transformed):
    order = np.argsort(x.transform.order)
    return np.take(values(x.weight), order, x.axis)
  return products.dense(qarray.flat(x)).reshape(x.shape)


class ViewsTest(parameterized.TestCase):
  def check(self, w, views, refused):
    numbers = jnp.arange(w.size).reshape(w.shape)
    own = values(w).ravel()
    for name, seen in met(views, w).items():
      with self.subTest(name):
        why = reasons(views[name], w)
        if expected := refused.get(name, ''):
          self.assertIn(expected, why)
          self.assertIsNone(seen)
          continue
        self.assertEqual(why, '')
        self.assertIs(type(seen), type(w))
        qarray.validate(getattr(seen, 'weight', seen))
        want = own[np.asarray(views[name](numbers))]
        np.testing.assert_array_equal(values(seen), want)

  def check_format(self, fmt):
    w = products.make(fmt, L, K, N)
    self.check(w, VIEWS, {**REFUSED, **REFUSED_BY.get(fmt, {})})

  @parameterized.parameters('nvfp4', 'int8_channel')
  def test_formats(self, fmt):
    self.check_format(fmt)

  @parameterized.parameters('mxfp4', 'int4_g32', 'q4_k', 'mxfp4_32x32')
  @pytest.mark.slow
  def test_more_formats(self, fmt):
    self.check_format(fmt)

  def test_two_levels_of_scales(self):
    names = ('swap', 'cut block axis', 'stride', 'concatenate blocks')
    w = products.make('q4_k', L, K, N)
    self.check(w, {k: VIEWS[k] for k in names}, {})

  def test_padded(self):
    w = products.make('mxfp4', 3, 40, 8)
    views = {
      'swap': lambda w: w.mT,
      'slice': lambda w: w[:, :32],
      'rest': lambda w: w[:, 32:],
      'cut free axis': lambda w: w.reshape(3, 40, 2, 4),
      'cut block axis': lambda w: w.reshape(3, 5, 8, 8),
      'concatenate': lambda w: jnp.concatenate([w, w], 1),
    }
    refused = {'cut block axis': 'would be cut', 'concatenate': WHOLE}
    self.check(w, views, refused)

  def test_blocks_that_span_axes(self):
    w = qarray.replace(products.make('mxfp4', 3, 64, 8), merged=(16,))
    self.assertEqual(w.shape, (3, 4, 16, 8))
    views = {
      'transpose': lambda w: w.transpose(3, 0, 1, 2),
      'separate': lambda w: w.transpose(1, 0, 2, 3),
      'join them': lambda w: w.reshape(3, 64, 8),
      'join all': lambda w: w.reshape(3 * 64, 8),
      'regroup': lambda w: w.reshape(3, 8, 8, 8),
      'cut behind': lambda w: w.reshape(3, 4, 16, 2, 4),
      'member': lambda w: w[1],
      'expand': lambda w: w[None],
      'slice': lambda w: w[:, :2],
      'concatenate': lambda w: jnp.concatenate([w, w], -1),
      'look up': lambda w: jnp.take(w, MEMBERS, axis=0, mode='clip'),
    }
    several = 'its blocks span several axes'
    refused = {
      'separate': 'transpose: blocks span axes that are separated',
      'join all': 'the axes that its blocks span are regrouped',
      'regroup': 'the axes that its blocks span are regrouped',
      'slice': 'slice',
      'expand': several,
      'concatenate': several,
      'look up': several,
    }
    self.check(w, views, refused)

  def test_transformed(self):
    order = np.random.RandomState(0).permutation(64)
    w = products.make('mxfp4', 3, 64, 8)
    w = Transformed(w, transforms.Permutation(order), -2)
    views = {
      'swap': lambda w: w.mT,
      'transpose': lambda w: w.transpose(2, 0, 1),
      'cut free axis': lambda w: w.reshape(3, 64, 2, 4),
      'cut its axis': lambda w: w.reshape(3, 2, 32, 8),
      'join': lambda w: w.reshape(3 * 64, 8),
      'expand': lambda w: w[:, None],
      'member': lambda w: w[1],
      'stride': lambda w: w[..., ::3],
      'slice its axis': lambda w: w[:, :32],
      'split': lambda w: jnp.split(w, 2, axis=-1)[1],
      'look up': lambda w: jnp.take(w, MEMBERS, axis=0, mode='clip'),
      'barrier': lax.optimization_barrier,
    }
    whole = 'its transform needs the axis whole'
    refused = {'cut its axis': whole, 'slice its axis': whole, 'join': whole}
    self.check(w, views, refused)

  def test_stack_of_transformed(self):
    orders = [np.random.RandomState(i).permutation(64) for i in range(3)]
    members = [
      Transformed(
        products.make('mxfp4', 64, 8, seed=i), transforms.Permutation(order), -2
      )
      for i, order in enumerate(orders)
    ]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    views = {
      'member': lambda w: w[1],
      'dynamic member': lambda w: lax.dynamic_index_in_dim(w, two(), 0, False),
      'swap': lambda w: w.mT,
      'join': lambda w: w.reshape(3 * 64, 8),
      'broadcast': lambda w: w[None],
    }
    seen = met(views, w)
    self.assertIn('needs the axis whole', reasons(views['join'], w))
    self.assertIn('a stack of transformed', reasons(views['broadcast'], w))
    for name, number in ('member', 1), ('dynamic member', 2):
      want = values(members[number])
      np.testing.assert_array_equal(values(seen[name]), want)
    for i, member in enumerate(members):
      got = values(seen['swap'][i])
      np.testing.assert_array_equal(got, values(member).T)

  def test_prepacked_is_viewed_as_a_qarray(self):
    q = products.make('int8_channel', 64, 8)
    w = jax.jit(functools.partial(lowbit.prepack, implementation='tpu'))(q)
    views = {'swap': lambda w: w.T, 'stride': lambda w: w[:, ::3]}
    seen = met(views, w)
    np.testing.assert_array_equal(values(seen['swap']), values(q).T)
    np.testing.assert_array_equal(values(seen['stride']), values(q)[:, ::3])

  def test_casts(self):
    w = products.make('mxfp4', 64, 8)

    def there(w):
      return w.astype(jnp.bfloat16)

    def there_and_back(w):
      return there(w).astype(jnp.float32)

    views = {'there': there, 'back': there_and_back}
    seen = met(views, w)
    self.assertEqual(seen['there'].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(values(seen['there']), values(w))
    self.assertIn('which rounds', reasons(there_and_back, w))
    self.assertIsNone(seen['back'])

  def test_members_of_one_block(self):
    views = {
      'join': lambda w: w.reshape(3 * 32, 8),
      'cut free axis': lambda w: w.reshape(3, 32, 2, 4),
      'join in part': lambda w: w.reshape(3, 1, 32, 8),
    }
    for fmt in ('mxfp4', 'nvfp4', 'int4_g32'):
      self.check(products.make(fmt, 3, 32, 8), views, {})

  def test_views_of_views(self):
    w = products.make('mxfp4', 2, 128, 12)

    def heads(w):
      q, k, v = jnp.split(w.reshape(2, 128, 3, 4), 3, axis=2)
      del q, v
      return k[1].squeeze(1).T[None].reshape(1, 2, 2, 128)

    self.check(w, {'heads': heads}, {})


if __name__ == '__main__':
  absltest.main()
