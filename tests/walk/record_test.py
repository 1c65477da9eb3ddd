"""`record`: what observers of the user see, against loops in NumPy.

Operands are small integers, so that all sums are exact and in any order the
same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats

TOKENS, WIDTH, LAYERS = 6, 32, 3


def integers(*shape, top: int = 1, seed: int = 0) -> np.ndarray:
  """Float32 integers from -top to top."""
  random = np.random.RandomState(seed + sum(shape))
  return random.randint(-top, top + 1, shape).astype(np.float32)


X = integers(TOKENS, WIDTH, top=3)
WEIGHTS = integers(LAYERS, WIDTH, WIDTH)


def clipped(x):
  """Keeps what comes from a layer small."""
  return jnp.clip(x, -3, 3)


def layer(x, w):
  return clipped(x @ w)


def inputs(x: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
  """What each layer is given."""
  out = []
  for w in weights:
    out.append(x)
    x = np.clip(x @ w, -3, 3)
  return out


class Largest:
  """The largest magnitude in each column of the activations of a weight."""

  def observe(self, product, lhs, rhs, *sizes):
    del rhs, sizes
    if product.weight != 'rhs':
      return None
    return jnp.max(jnp.abs(lhs), axis=range(lhs.ndim - 1))

  def merge(self, a, b):
    return jnp.maximum(a, b)


class Gram:
  """Number of rows, and x^T x, of matrices that meet a weight."""

  def observe(self, product, lhs, rhs):
    (left, right), _ = product.params['dimension_numbers']
    x, axis = (lhs, left) if product.weight == 'rhs' else (rhs, right)
    x = jnp.moveaxis(x, axis[0], -1).reshape(-1, x.shape[axis[0]])
    return {'count': jnp.float32(x.shape[0]), 'sums': x.T @ x}

  def merge(self, a, b):
    return jax.tree.map(jnp.add, a, b)


class Count:
  """How often each product runs, those without a weight as well."""

  def __init__(self):
    self.products = {}

  def observe(self, product, *operands):
    self.products[product.site] = product
    return jnp.int32(1)

  def merge(self, a, b):
    return a + b


class Groups:
  """The largest magnitude in each group of rows of a `ragged_dot`."""

  def observe(self, product, lhs, rhs, sizes):
    assert product.op == 'ragged_dot', product
    group = jnp.repeat(
      jnp.arange(sizes.shape[0]), sizes, total_repeat_length=lhs.shape[0]
    )
    rows = jnp.max(jnp.abs(lhs), axis=-1)
    return jnp.zeros(sizes.shape).at[group].max(rows)

  def merge(self, a, b):
    return jnp.maximum(a, b)


def grams(rows) -> dict:
  """The observation of `Gram` of some inputs, one after the other."""
  rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in rows])
  return {'count': len(rows), 'sums': rows.T @ rows}


def recorded(fn, observer, *args, **options):
  """Result and observations; the result is checked to be that of `fn`."""
  out, seen = jax.jit(lowbit.record(fn, observer, **options))(*args)
  assert_equal(out, jax.jit(fn)(*args))
  return out, seen


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class SiteTest(parameterized.TestCase):
  def test_sites_are_paths_of_weights(self):
    def mlp(params, x):
      for block in ('block_0', 'block_1'):
        x = clipped(x @ params[block]['up']['kernel'] + params[block]['bias'])
      return x

    bias = integers(WIDTH)
    blocks = [{'up': {'kernel': w}, 'bias': bias} for w in WEIGHTS[:2]]
    params = {f'block_{i}': block for i, block in enumerate(blocks)}
    _, seen = recorded(mlp, Gram(), params, X)
    second = np.clip(X @ WEIGHTS[0] + bias, -3, 3)
    assert_equal(
      seen,
      {
        'block_0/up/kernel': grams([X]),
        'block_1/up/kernel': grams([second]),
      },
    )

  def test_arguments_with_weights_are_named_if_there_are_several(self):
    def two(x, first, second):
      return layer(layer(x, first['w']), second)

    args = X, {'w': WEIGHTS[0]}, WEIGHTS[1]
    _, seen = recorded(two, Largest(), *args, argnums=(1, 2))
    self.assertCountEqual(seen, ['first/w', 'second'])
    _, seen = recorded(two, Largest(), *args, argnums=1)
    self.assertCountEqual(seen, ['w'])

  def test_products_without_a_weight_are_named_by_their_place(self):
    def attention(params, x):
      query = x @ params['query']
      with jax.named_scope('scores'):
        scores = query @ x.T
      mixed = scores @ x
      return mixed @ x.T

    count = Count()
    _, seen = recorded(attention, count, {'query': WEIGHTS[0]}, X)
    sites = 'query', 'scores/dot_general', 'dot_general', 'dot_general_1'
    assert_equal(seen, dict.fromkeys(sites, 1))
    weights = {site: p.weight for site, p in count.products.items()}
    self.assertEqual(weights, dict.fromkeys(sites, None) | {'query': 'rhs'})
    product = count.products['query']
    self.assertEqual(product.op, 'dot_general')
    self.assertEqual(product.lhs, jax.ShapeDtypeStruct(X.shape, X.dtype))
    self.assertEqual(
      product.rhs, jax.ShapeDtypeStruct(WEIGHTS[0].shape, X.dtype)
    )
    self.assertEqual(
      product.params['dimension_numbers'], (((1,), (0,)), ((), ()))
    )

  def test_a_weight_on_the_left_is_one(self):
    count = Count()
    jax.eval_shape(lowbit.record(lambda w, x: w @ x.T, count), WEIGHTS[0], X)
    (product,) = count.products.values()
    self.assertEqual((product.site, product.weight), ('w', 'lhs'))

  def test_what_the_function_closes_over_is_a_weight(self):
    closed = lambda x: layer(x, WEIGHTS[0])
    _, seen = recorded(closed, Largest(), X, argnums=())
    self.assertEqual(list(seen), ['dot_general'])
    np.testing.assert_array_equal(seen['dot_general'], np.abs(X).max(0))

  def test_uses_of_a_weight_are_merged_and_others_numbered(self):
    table = integers(8, WIDTH)

    def tied(params, ids):
      x = jax.nn.one_hot(ids, 8) @ params['table']
      y = clipped(x + x) @ params['table'].T
      return y, x @ params['table'].T

    ids = np.array([1, 5, 5, 2])
    _, seen = recorded(tied, Gram(), {'table': table}, ids)
    hot = np.eye(8, dtype=np.float32)[ids]
    x = table[ids]
    assert_equal(seen, {'table': grams([hot]), 'table#2': grams([2 * x, x])})

  def test_views_keep_the_site(self):
    def views(params, x):
      w = params['w'].astype(jnp.float32).reshape(2, -1, WIDTH)
      parts = jnp.split(w.reshape(WIDTH, WIDTH), 2, axis=-1)
      return [x @ part for part in parts], x @ params['w'][:, 3:5]

    _, seen = recorded(views, Count(), {'w': WEIGHTS[0]}, X)
    assert_equal(seen, {'w': 3})

  def test_what_an_observer_passes_over_is_left_out(self):
    _, seen = recorded(lambda w, x: x @ (x.T @ x), Largest(), WEIGHTS[0], X)
    self.assertEqual(seen, {})

  @parameterized.parameters([0.5], ['w'], [(0, 0)], [-1])
  def test_argnums_are_checked(self, argnums):
    with self.assertRaisesRegex((TypeError, ValueError), 'argnums'):
      lowbit.record(layer, Largest(), argnums=argnums)

  def test_observers_and_functions_are_checked(self):
    with self.assertRaisesRegex(TypeError, 'method observe'):
      lowbit.record(layer, 'absmax')
    with self.assertRaisesRegex(TypeError, 'must be a function'):
      lowbit.record(WEIGHTS, Largest())
    with self.assertRaisesRegex(ValueError, "site 'a/b'"):
      lowbit.record(lambda p: p['a/b'], Largest())({'a/b': X, 'a': {'b': X}})


class LoopTest(parameterized.TestCase):
  @parameterized.parameters(
    {}, {'reverse': True}, {'unroll': 2}, {'remat': True}
  )
  def test_scanned_weights_have_an_entry_for_each_layer(
    self, remat=False, **options
  ):
    def scanned(params, x):
      step = lambda x, w: (layer(x, w), None)
      step = jax.checkpoint(step) if remat else step
      return lax.scan(step, x, params['w'], **options)[0]

    _, seen = recorded(scanned, Gram(), {'w': WEIGHTS}, X)
    order = -1 if 'reverse' in options else 1
    layers = inputs(X, WEIGHTS[::order])[::order]
    each = [grams([x]) for x in layers]
    assert_equal(seen, {'w': jax.tree.map(lambda *x: np.stack(x), *each)})

  def test_scanned_twice_is_stacked_twice(self):
    def nested(params, x):
      def outer(x, ws):
        return lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0], None

      return lax.scan(outer, x, params['w'])[0]

    weights = integers(2, LAYERS, WIDTH, WIDTH)
    _, seen = recorded(nested, Largest(), {'w': weights}, X)
    layers = inputs(X, weights.reshape(-1, WIDTH, WIDTH))
    want = [np.abs(x).max(0) for x in layers]
    np.testing.assert_array_equal(
      seen['w'], np.reshape(want, (2, LAYERS, WIDTH))
    )

  def test_other_weights_are_merged_over_the_steps(self):
    def scanned(params, x):
      def step(x, w):
        return layer(layer(x, w), params['fixed']), None

      return lax.scan(step, x, params['w'])[0]

    fixed = WEIGHTS[0]
    params = {'w': WEIGHTS[1:], 'fixed': fixed}
    _, seen = recorded(scanned, Gram(), params, X)
    layers = inputs(X, np.stack([WEIGHTS[1], fixed, WEIGHTS[2], fixed]))
    each = [grams([x]) for x in layers[::2]]
    each = jax.tree.map(lambda *x: np.stack(x), *each)
    assert_equal(seen, {'w': each, 'fixed': grams(layers[1::2])})

  def test_products_of_activations_are_merged_over_the_steps(self):
    def scanned(ws, x):
      def step(x, w):
        return clipped(clipped(x @ x.T) @ layer(x, w)), None

      return lax.scan(step, x, ws)[0]

    _, seen = recorded(scanned, Count(), WEIGHTS, X)
    number = dict.fromkeys(['dot_general', 'dot_general_1'], LAYERS)
    assert_equal(seen, {'ws': np.ones(LAYERS), **number})

  @parameterized.parameters(0, 2, 5)
  def test_while_merges_and_leaves_zeros(self, count):
    def loop(params, x, count):
      def step(state):
        i, x = state
        return i + 1, layer(x, params['w'])

      return lax.while_loop(lambda s: s[0] < count, step, (0, x))[1]

    _, seen = recorded(loop, Gram(), {'w': WEIGHTS[0]}, X, count)
    layers = inputs(X, np.stack([WEIGHTS[0]] * count)) if count else [X[:0]]
    assert_equal(seen, {'w': grams(layers)})

  def test_layers_by_number_in_a_loop_are_merged(self):
    def loop(params, x):
      return lax.fori_loop(0, LAYERS, lambda i, x: layer(x, params['w'][i]), x)

    _, seen = recorded(loop, Gram(), {'w': WEIGHTS}, X)
    assert_equal(seen, {'w': grams(inputs(X, WEIGHTS))})

  @parameterized.parameters(0, 1, 2)
  def test_branches_that_do_not_run_leave_zeros(self, index):
    def branch(params, x, index):
      branches = [
        lambda x: layer(x, params['first']),
        lambda x: layer(x, params['second']),
        lambda x: x,
      ]
      return layer(lax.switch(index, branches, x), params['second'])

    params = {'first': WEIGHTS[0], 'second': WEIGHTS[1]}
    _, seen = recorded(branch, Gram(), params, X, index)
    first = [[X], [X[:0]], [X[:0]]][index]
    after = [layer(X, WEIGHTS[0]), layer(X, WEIGHTS[1]), X][index]
    second = [np.asarray(after), *([X] if index == 1 else [])]
    assert_equal(seen, {'first': grams(first), 'second': grams(second)})


class CallTest(parameterized.TestCase):
  def test_bodies_that_run_twice_are_merged(self):
    def twice(params, x):
      run = jax.jit(layer)
      return jax.checkpoint(run)(run(x, params['w']), params['w'])

    _, seen = recorded(twice, Gram(), {'w': WEIGHTS[0]}, X)
    layers = inputs(X, np.stack([WEIGHTS[0]] * 2))
    assert_equal(seen, {'w': grams(layers)})

  def test_functions_with_a_derivative_of_their_own_keep_it(self):
    one, two = jax.custom_jvp(layer), jax.custom_vjp(layer)
    one.defjvp(lambda p, t: (layer(*p), 2 * (t[0] @ p[1])))
    two.defvjp(
      lambda x, w: (layer(x, w), w), lambda w, ct: (3 * ct @ w.T, 0 * w)
    )

    def both(params, x):
      return jnp.sum(two(one(x, params['a']), params['b']))

    params = {'a': WEIGHTS[0], 'b': WEIGHTS[1]}
    _, seen = recorded(both, Gram(), params, X)
    a, b = inputs(X, WEIGHTS[:2])
    assert_equal(seen, {'a': grams([a]), 'b': grams([b])})
    grad = jax.jit(
      jax.grad(lambda x: lowbit.record(both, Gram())(params, x)[0])
    )
    want = 6 * np.ones_like(X) @ WEIGHTS[1].T @ WEIGHTS[0].T
    np.testing.assert_array_equal(grad(X), want)

  def test_derivatives_are_those_of_the_function(self):
    def loss(params, x):
      step = jax.checkpoint(lambda x, w: (layer(x, w), None))
      return jnp.sum(lax.scan(step, x, params['w'])[0] * X)

    params = {'w': WEIGHTS}
    record = lowbit.record(loss, Gram())
    got, seen = jax.jit(jax.grad(record, has_aux=True))(params, X)
    assert_equal(got, jax.jit(jax.grad(loss))(params, X))
    assert_equal(seen, jax.jit(record)(params, X)[1])

  def test_backward_products_are_seen_inside(self):
    def gradient(params, x):
      return jax.grad(lambda p: jnp.sum(layer(layer(x, p['a']), p['b'])))(
        params
      )

    params = {'a': WEIGHTS[0], 'b': WEIGHTS[1]}
    count = Count()
    _, seen = recorded(gradient, count, params, X)
    # Forward, dy b^T, and two products x^T dy that have no weight.
    self.assertEqual(int(sum(seen.values())), 5)
    self.assertEqual(int(seen['b']), 2)

  def test_vmap_inside_and_outside(self):
    batch = np.stack([X, X + 1])
    params = {'w': WEIGHTS[0]}

    def model(params, x):
      return layer(x, params['w'])

    inside = lambda params, x: jax.vmap(model, (None, 0))(params, x)
    _, seen = recorded(inside, Gram(), params, batch)
    assert_equal(seen, {'w': grams(batch)})
    outside = jax.vmap(lowbit.record(model, Gram()), (None, 0))
    _, seen = jax.jit(outside)(params, batch)
    each = [grams([x]) for x in batch]
    assert_equal(seen, {'w': jax.tree.map(lambda *x: np.stack(x), *each)})

  def test_shard_map_has_an_entry_for_each_device(self):
    mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(P('b'), P('a', 'b')),
      out_specs=P('a'),
    )
    def parts(w, x):
      return lax.psum(x @ w, 'b')

    _, seen = recorded(
      lambda params, x: parts(params['w'], x), Gram(), {'w': WEIGHTS[0]}, X
    )
    each = [
      grams([x]) for rows in np.split(X, 2) for x in np.split(rows, 2, axis=-1)
    ]
    assert_equal(seen, {'w': jax.tree.map(lambda *x: np.stack(x), *each)})

  @parameterized.parameters(False, True)
  def test_groups_of_a_ragged_dot(self, packed):
    sizes = np.array([2, 0, 3])

    def experts(params, x, sizes):
      return lax.ragged_dot(x, params['w'], sizes)

    w = lowbit.quantize(WEIGHTS, formats.mxfp4, axis=-2) if packed else WEIGHTS
    record = jax.jit(lowbit.record(experts, Groups()))
    _, seen = record({'w': w}, X[:5], sizes)
    want = [np.abs(X[:2]).max(), 0, np.abs(X[2:5]).max()]
    assert_equal(seen, {'w': np.array(want)})


class PackedTest(parameterized.TestCase):
  def test_observers_get_the_weight_as_it_is_stored(self):
    stored = []

    class Stored(Count):
      def observe(self, product, x, w):
        stored.append(w)
        return super().observe(product, x, w)

    def scanned(params, x):
      return lax.scan(lambda x, w: (x @ w, None), x, params['w'])[0]

    w = lowbit.quantize(WEIGHTS, formats.mxfp4, axis=-2)
    observer = Stored()
    record = lowbit.record(scanned, observer)
    out, seen = jax.jit(record)({'w': w}, X)
    assert_equal(seen, {'w': np.ones(LAYERS)})
    for q in stored:
      self.assertIsInstance(q, lowbit.QArray)
      self.assertEqual(q.shape, WEIGHTS.shape[1:])
    rhs = observer.products['w'].rhs
    self.assertEqual(rhs, jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32))
    # Weights of -1, 0 and 1 are exact in E2M1.
    np.testing.assert_array_equal(
      lowbit.dequantize(w).astype(np.float32), WEIGHTS
    )
    assert_equal(out, jax.jit(lowbit.packed(scanned))({'w': w}, X))
    np.testing.assert_array_equal(out, jax.jit(scanned)({'w': WEIGHTS}, X))

  def test_a_site_is_the_same_for_arrays_and_stored_weights(self):
    def model(params, x):
      x = jnp.take(params['table'], x, axis=0)
      x = lax.scan(lambda x, w: (layer(x, w), None), x, params['w'])[0]
      return x @ params['table'].T

    params = {'table': integers(64, WIDTH), 'w': WEIGHTS}
    q = {
      'table': lowbit.quantize(params['table'], formats.mxfp4),
      'w': lowbit.quantize(WEIGHTS, formats.mxfp4, axis=-2),
    }
    ids = np.array([3, 60, 7])
    record = jax.jit(lowbit.record(model, Gram()))
    dense, packed = record(params, ids)[1], record(q, ids)[1]
    self.assertCountEqual(dense, ['table', 'w'])
    assert_equal(packed, dense)


if __name__ == '__main__':
  absltest.main()
