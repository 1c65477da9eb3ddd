"""`with_policy`: the same bits as the product that a policy names, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.recipe import (
  GemmSpec,
  Policy,
  QuantSpec,
  Recipe,
  TensorScaling,
)
from lowbit_jax.training import linen as low, recipes, scaling
from models import byte_lm
from tests.compilation import quick_jit

TOKENS, WIDTH, LAYERS = 6, 64, 3
MXFP8 = recipes.get('mxfp8')
INT8 = GemmSpec(
  QuantSpec(formats.int8_channel), QuantSpec(formats.int8_channel)
)
FP4 = QuantSpec(formats.mxfp4)
NOISY = QuantSpec(formats.mxfp4, rounding='stochastic')
HELD = QuantSpec(formats.nvfp4, tensor_scaling=TensorScaling(window=4))
DELAYED = Recipe('delayed', GemmSpec(HELD, HELD))


def normal(*shape, seed: int = 0) -> np.ndarray:
  random = np.random.RandomState(seed + sum(shape))
  return random.standard_normal(shape).astype(np.float32)


X = normal(TOKENS, WIDTH)
W = normal(WIDTH, WIDTH, seed=1)
STACK = normal(LAYERS, WIDTH, WIDTH) / 8


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def value_and_slopes(fn, *args):
  """The result, and the gradient of the sum of its squares in all arguments."""
  positions = tuple(range(len(args)))

  def loss(*args):
    y = fn(*args)
    return jnp.sum(y**2), y

  return quick_jit(jax.grad(loss, positions, has_aux=True))(*args)


def assert_same(fn, by_hand, *args):
  """Two functions have the same value and derivative, bit for bit."""
  assert_equal(value_and_slopes(fn, *args), value_and_slopes(by_hand, *args))


def matmul(w, x):
  return x @ w


def scanned(ws, x, **options):
  return lax.scan(lambda x, w: (x @ w, None), x, ws, **options)[0]


class LanguageModelTest(parameterized.TestCase):
  """The byte-level model trains as by `training.linen`."""

  def check(self, name, scan, steps=3, **sizes):
    config = byte_lm.Config(
      **{'width': 32, 'heads': 2, 'blocks': 1, 'context': 8, 'batch': 2} | sizes
    )
    recipe = recipes.get(name)
    policy = Policy(recipe, rules=(('head', None),))
    # Flax does not ask for the head, which has a product of its own.
    flax = byte_lm.ByteLM(
      config, dot_general_cls=low.dot_general_cls(recipe), scan=scan
    )
    plain = byte_lm.ByteLM(config, scan=scan)

    def loss(model, params, windows, **options):
      out = model.apply(params, windows[:, :-1], **options)
      logits, updated = out if options else (out, None)
      value = byte_lm.cross_entropy(logits, windows[:, 1:])
      return (value, updated) if options else value

    def by_flax(params, scales, windows):
      variables = {'params': params, low.COLLECTION: scales}
      value, updated = loss(flax, variables, windows, mutable=[low.COLLECTION])
      return value, updated.get(low.COLLECTION, {})

    def by_policy(params, scales, windows):
      model = lambda params, windows: loss(plain, {'params': params}, windows)
      run = lowbit.with_policy(model, policy, scales=scales or None)
      value = run(params, windows)
      return value if scales else (value, {})

    random = np.random.RandomState(0)
    shape = steps, config.batch, config.context + 1
    windows = random.randint(0, 256, shape).astype(np.int32)
    variables = jax.eval_shape(flax.init, jax.random.key(0), windows[0, :, 1:])
    params = jax.tree.map(
      lambda s: random.standard_normal(s.shape).astype(s.dtype) / 4,
      variables['params'],
    )
    scales = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), variables.get(low.COLLECTION, {})
    )
    curve = self.curve(by_flax, params, scales, windows)
    if scales:
      model = lambda params, windows: loss(plain, {'params': params}, windows)
      scales = lowbit.with_policy(model, policy).init(params, windows[0])
    own = self.curve(by_policy, params, scales, windows)
    for got, want in zip(own, curve, strict=True):
      assert_equal(got[:2], want[:2])
      held = self.by_site(want[2])
      assert_equal(got[2], held)
    self.assertLen({float(value) for value, *_ in curve}, steps)

  def curve(self, loss, params, scales, windows):
    """(loss, parameters, scales) after each step."""

    @quick_jit
    def step(params, scales, windows):
      gradient = jax.value_and_grad(loss, has_aux=True)
      (value, scales), grads = gradient(params, scales, windows)
      params = jax.tree.map(lambda p, g: p - g / 8, params, grads)
      return value, params, scaling.advance(scales)

    out = []
    for batch in windows:
      out.append(step(params, scales, batch))
      _, params, scales = out[-1]
    return out

  def by_site(self, collection):
    """The collection of Flax as a dict by path of the kernel."""
    return {
      '/'.join([block, layer, 'kernel']): inner['QDotGeneral_0']['scales']
      for block, layers in collection.items()
      for layer, inner in layers.items()
    }

  def test_nvfp4(self):
    self.check('nvfp4_rtn', scan=False)

  def test_held_scales_in_a_scan(self):
    self.check('fp8_delayed', scan=True, blocks=2)

  @parameterized.product(
    name=('mxfp8', 'mxfp4_forward', 'nvfp4_rtn', 'fp8_delayed', 'fp8_current'),
    scan=(False, True),
  )
  @pytest.mark.slow
  def test_more_recipes_and_steps(self, name, scan):
    self.check(name, scan, steps=8, blocks=3, context=16)


class RecipeTest(parameterized.TestCase):
  """`dot_general` of arrays trains as `ops.qdot` does."""

  def test_a_matrix(self):
    by_hand = lambda w, x: lowbit.qdot(x, w, MXFP8)
    assert_same(lowbit.with_policy(matmul, MXFP8), by_hand, W, X)

  def test_a_weight_on_the_left(self):
    fn = lambda w, x: w.T @ x.T
    by_hand = lambda w, x: lowbit.qdot(x, w, MXFP8).T
    assert_same(lowbit.with_policy(fn, MXFP8), by_hand, W, X)

  def test_several_contracted_and_free_axes(self):
    fn = lambda w, x: jnp.einsum('bthk,hkd->btd', x, w)
    x, w = normal(2, 3, 4, 32), normal(4, 32, 8)
    by_hand = lambda w, x: lowbit.qdot(
      x.reshape(2, 3, 128), w.reshape(128, 8), MXFP8
    )
    assert_same(lowbit.with_policy(fn, MXFP8), by_hand, w, x)

  def test_batch_axes_are_products_of_their_own(self):
    fn = lambda w, x: jnp.einsum('ecd,edf->ecf', x, w)
    x = normal(LAYERS, TOKENS, WIDTH)
    by_hand = lambda w, x: jax.vmap(lambda x, w: lowbit.qdot(x, w, MXFP8))(x, w)
    assert_same(lowbit.with_policy(fn, MXFP8), by_hand, STACK, x)

  def test_scan_and_remat(self):
    step = jax.checkpoint(lambda x, w: (x @ w, None))
    fn = lambda ws, x: lax.scan(step, x, ws)[0]
    hand_step = jax.checkpoint(lambda x, w: (lowbit.qdot(x, w, MXFP8), None))
    by_hand = lambda ws, x: lax.scan(hand_step, x, ws)[0]
    assert_same(lowbit.with_policy(fn, MXFP8), by_hand, STACK, X)

  def test_other_products_stay(self):
    def model(params, x):
      y = x @ params['w']
      return (y @ y.T) @ x

    def by_hand(params, x):
      y = lowbit.qdot(x, params['w'], MXFP8)
      return (y @ y.T) @ x

    assert_same(lowbit.with_policy(model, MXFP8), by_hand, {'w': W}, X)

  def test_switches_by_the_share_of_the_training(self):
    later = recipes.get('mxfp4_rtn')
    recipe = Recipe('two', *MXFP8.gemms, switches=((0.5, later),))
    for fraction, own in ((0.25, MXFP8), (0.5, later)):
      run = lowbit.with_policy(matmul, recipe, fraction=fraction)
      by_hand = quick_jit(lambda w, x, own=own: lowbit.qdot(x, w, own))
      assert_equal(quick_jit(run)(W, X), by_hand(W, X))

  def test_stored_weights_run_packed(self):
    def model(params, x):
      return (x @ params['stored']) @ params['trained']

    q = lowbit.quantize(W, formats.mxfp4, axis=-2)
    by_hand = lambda params, x: lowbit.qdot(
      lowbit.dot(x, params['stored']), params['trained'], MXFP8
    )
    params = {'stored': q, 'trained': W}
    got = quick_jit(lowbit.with_policy(model, MXFP8))(params, X)
    assert_equal(got, quick_jit(by_hand)(params, X))


class ActivationTest(parameterized.TestCase):
  """A GemmSpec quantizes both operands and multiplies them packed."""

  def test_int8_products_are_exact(self):
    run = jax.jit(lowbit.with_policy(matmul, INT8))
    text = run.lower(W, X).as_text()
    self.assertRegex(
      text, r'dot_general.*tensor<[\dx]*xi8>.*tensor<[\dx]*xi8>.*xi32>'
    )
    self.assertNotRegex(text, r'dot_general.*xf32>')
    x = lowbit.quantize(X, formats.int8_channel, axis=-1)
    w = lowbit.quantize(W, formats.int8_channel, axis=-2)
    codes = (np.asarray(q.codes).view(np.int8) for q in (x, w))
    whole = np.matmul(*(c.astype(np.int64) for c in codes))
    scales = np.asarray(x.scale, np.float64) * np.asarray(w.scale, np.float64)
    # The sum is exact in int32 and float32, and two scales multiply it.
    self.assertLess(np.abs(whole).max(), 2**24)
    np.testing.assert_allclose(run(W, X), whole * scales, rtol=3 * 2.0**-24)

  @parameterized.parameters(False, True)
  def test_is_the_packed_product(self, is_stored):
    fmt = formats.mxfp8_e4m3
    spec = QuantSpec(fmt)
    q = lowbit.quantize(W, fmt, axis=-2)
    run = quick_jit(lowbit.with_policy(matmul, GemmSpec(spec, spec)))
    by_hand = quick_jit(lambda x: lowbit.dot(lowbit.quantize(x, fmt), q))
    assert_equal(run(q if is_stored else W, X), by_hand(X))

  def test_sides_follow_the_weight(self):
    a8 = GemmSpec(QuantSpec(formats.mxfp8_e4m3), None)
    left = lowbit.with_policy(lambda w, x: w.T @ x.T, a8)
    q = lowbit.quantize(X, formats.mxfp8_e4m3)
    by_hand = quick_jit(lambda w: lowbit.dot(q, w).T)
    np.testing.assert_allclose(
      quick_jit(left)(W, X),
      by_hand(W),
      rtol=0,
      atol=2 * WIDTH * 2.0**-24 * float(np.max(np.abs(X) @ np.abs(W))),
    )

  def test_experts_and_groups(self):
    x, sizes = normal(7, WIDTH), np.array([2, 0, 5])
    fn = lambda w, x: lax.ragged_dot(x, w, sizes)
    run = quick_jit(lowbit.with_policy(fn, INT8))

    def by_hand(w, x):
      q = lowbit.quantize(x, formats.int8_channel)
      w = lowbit.quantize(w, formats.int8_channel, axis=-2)
      return lowbit.ragged_dot(q, w, sizes)

    assert_equal(run(STACK, x), quick_jit(by_hand)(STACK, x))

  def test_products_of_activations_by_a_function(self):
    def attention(params, x):
      y = x @ params['w']
      return jnp.einsum('bd,td->bt', y, x)

    policy = lambda p: None if p.weight else INT8
    run = quick_jit(lowbit.with_policy(attention, policy))

    def by_hand(params, x):
      q = functools.partial(lowbit.quantize, fmt=formats.int8_channel)
      return lowbit.einsum('bd,td->bt', q(x @ params['w']), q(x))

    assert_equal(run({'w': W}, X), quick_jit(by_hand)({'w': W}, X))


class FakeQuantTest(parameterized.TestCase):
  """A QuantSpec fake-quantizes weights, for any product and look-up."""

  def check(self, fn, w, axis, *args, spec=FP4):
    by_hand = lambda w, *args: fn(
      lowbit.fake_quant(w, spec.fmt, axis=axis), *args
    )
    run = lowbit.with_policy(fn, spec)
    value = lambda fn: value_and_slopes(lambda w: fn(w, *args), w)
    assert_equal(value(run), value(by_hand))
    plain = value(fn)[1]
    self.assertFalse(np.array_equal(value(run)[1], plain))

  def test_dense(self):
    self.check(matmul, W, -2, X)

  def test_dense_on_the_left(self):
    self.check(lambda w, x: w @ x.T, W, -1, X)

  def test_convolution(self):
    kernel, image = normal(3, 3, 32, 8), normal(2, 5, 5, 32)

    def convolve(w, x):
      numbers = 'NHWC', 'HWIO', 'NHWC'
      return lax.conv_general_dilated(
        x, w, (1, 1), 'SAME', dimension_numbers=numbers
      )

    self.check(convolve, kernel, 2, image)

  def test_look_up(self):
    table, ids = normal(10, WIDTH), np.array([[1, 9], [1, 0]])
    self.check(lambda t, i: jnp.take(t, i, axis=0), table, -1, ids)

  def test_tied_table(self):
    table, ids = normal(10, WIDTH), np.array([3, 3, 8])
    tied = lambda t, i: jnp.take(t, i, axis=0) @ t.T
    self.check(tied, table, -1, ids)

  def test_tiles(self):
    spec = QuantSpec(formats.get('mxfp4_32x32'))
    self.check(matmul, W, (-2, -1), X, spec=spec)

  def test_ragged(self):
    x, sizes = normal(7, WIDTH), np.array([2, 0, 5])
    fn = lambda w, x: lax.ragged_dot(x, w, sizes)
    self.check(fn, STACK, -2, x)

  def test_scanned(self):
    self.check(scanned, STACK, -2, X)


class KeyTest(parameterized.TestCase):
  def run_(self, fn, key, *args, **options):
    return lowbit.with_policy(fn, NOISY, key=jax.random.key(key), **options)(
      *args
    )

  def test_a_key_decides_the_bits(self):
    run = lambda key: self.run_(matmul, key, W, X)
    once = run(0)
    assert_equal(once, run(0))
    self.assertFalse(np.array_equal(once, run(1)))

  def test_sites_draw_bits_of_their_own(self):
    both = lambda params, x: (x @ params['a'], x @ params['b'])
    a, b = self.run_(both, 0, {'a': W, 'b': W}, X)
    self.assertFalse(np.array_equal(a, b))

  def test_layers_of_a_scan_draw_bits_of_their_own(self):
    def each(ws, x):
      return lax.scan(lambda x, w: (x, x @ w), x, ws)[1]

    ys = self.run_(each, 0, np.stack([W] * 3), X)
    self.assertLen({y.tobytes() for y in np.asarray(ys)}, 3)

  def test_steps_of_a_while_draw_bits_of_their_own(self):
    def each(w, x):
      def step(state):
        i, ys = state
        return i + 1, ys.at[i].set(x @ w)

      ys = jnp.zeros((3, *x.shape))
      return lax.while_loop(lambda s: s[0] < 3, step, (0, ys))[1]

    ys = self.run_(each, 0, W, X)
    self.assertLen({y.tobytes() for y in np.asarray(ys)}, 3)

  def test_members_of_a_batched_product_draw_bits_of_their_own(self):
    recipe = Recipe('noisy', GemmSpec(None, NOISY))
    fn = lambda w, x: jnp.einsum('ecd,edf->ecf', x, w)
    run = lowbit.with_policy(fn, recipe, key=jax.random.key(0))
    a, b = quick_jit(run)(np.stack([W] * 2), np.stack([X] * 2))
    self.assertFalse(np.array_equal(a, b))

  @parameterized.parameters({'unroll': True}, {'unroll': 2})
  def test_an_unrolled_scan_draws_the_same(self, **options):
    x = X.round()
    unrolled = functools.partial(scanned, **options)
    a = self.run_(scanned, 0, STACK, x)
    b = self.run_(unrolled, 0, STACK, x)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

  def test_jit_and_vmap_around_draw_the_same(self):
    # Sums of these are exact, in any order.
    x = np.stack([X.round(), 2 * X.round()])
    w = W.round()
    run = lambda x: self.run_(matmul, 0, w, x)
    each = np.stack([run(x[0]), run(x[1])])
    assert_equal(np.asarray(jax.jit(jax.vmap(run))(x)), each)

  def test_recomputation_draws_the_same(self):
    noisy = Recipe('noisy', GemmSpec(NOISY, NOISY), GemmSpec(NOISY, NOISY))

    def slopes(kept):
      step = lambda x, w: (jnp.tanh(x @ w), None)
      step = jax.checkpoint(step, policy=kept)
      loss = lambda ws, x: jnp.sum(lax.scan(step, x, ws)[0] ** 2)
      run = lowbit.with_policy(loss, noisy, key=jax.random.key(0))
      return quick_jit(jax.grad(run))(STACK, X)

    kept = jax.checkpoint_policies
    again, once = map(slopes, (kept.nothing_saveable, kept.everything_saveable))
    # Other bits would change every slope by a part of it.
    bound = 2.0**-16 * float(jnp.max(jnp.abs(once)))
    np.testing.assert_allclose(again, once, rtol=0, atol=bound)


class ScaleTest(parameterized.TestCase):
  def test_scales_are_those_of_hand_written_steps(self):
    def model(params, x):
      return lax.scan(
        lambda x, w: (x @ w, None), x @ params['in'], params['w']
      )[0]

    params = {'in': W, 'w': STACK}
    run = lambda scales, x: lowbit.with_policy(model, DELAYED, scales=scales)(
      params, x
    )
    scales = lowbit.with_policy(model, DELAYED).init(params, X)
    self.assertEqual(scales['w'].x.history.shape, (LAYERS, 4))
    self.assertEqual(scales['in'].w.amax.shape, ())
    first = scaling.init_dot(DELAYED)
    stacked = jax.tree.map(lambda s: jnp.stack([s] * LAYERS), first)

    def by_hand(scales, x):
      x, one = scaling.qdot(x, params['in'], DELAYED, scales['in'])

      def step(x, layer):
        return scaling.qdot(x, layer[0], DELAYED, layer[1])

      x, each = lax.scan(step, x, (params['w'], scales['w']))
      return x, {'in': one, 'w': each}

    hand = {'in': first, 'w': stacked}
    run, by_hand = quick_jit(run), quick_jit(by_hand)
    for i in range(3):
      got, scales = run(scales, (i + 1) * X)
      want, hand = by_hand(hand, (i + 1) * X)
      assert_equal((got, scales), (want, hand))
      scales, hand = scaling.advance((scales, hand))

  def test_uses_of_one_weight_share_its_scale(self):
    twice = lambda w, x: (2 * x) @ w + x @ w
    scales = lowbit.with_policy(twice, DELAYED).init(W, X)
    run = lowbit.with_policy(twice, DELAYED, scales=scales)
    _, after = quick_jit(run)(W, X)
    self.assertEqual(list(after), ['w'])
    np.testing.assert_array_equal(after['w'].x.seen, 2 * np.abs(X).max())
    np.testing.assert_array_equal(after['w'].w.seen, np.abs(W).max())


class SelectionTest(parameterized.TestCase):
  def test_functions_see_every_product(self):
    def model(params, x, ids, sizes, image):
      table = jnp.take(params['table'], ids, axis=0)
      y = params['left'] @ x.T
      return (
        *(table, y, x @ x.T, lax.ragged_dot(x, params['experts'], sizes)),
        lax.conv(image, params['kernel'], (1, 1), 'SAME'),
      )

    products = {}

    def policy(product):
      products[product.site] = product
      return INT8 if product.site == 'left' else None

    params = {
      'table': normal(8, WIDTH),
      'left': W,
      'experts': STACK,
      'kernel': normal(8, 4, 3, 3),
    }
    args = X, np.array([1, 2]), np.array([2, 2, 2]), normal(1, 4, 6, 6)
    report = lowbit.with_policy(model, policy).report(params, *args)
    fields = {
      site: (p.op, p.weight, p.lhs.shape, p.rhs.shape)
      for site, p in products.items()
    }
    self.assertEqual(
      fields,
      {
        'table': ('gather', 'lhs', (8, WIDTH), (2, 1)),
        'left': ('dot_general', 'lhs', W.shape, X.T.shape),
        'dot_general': ('dot_general', None, X.shape, X.T.shape),
        'experts': ('ragged_dot', 'rhs', X.shape, STACK.shape),
        'kernel': (
          *('conv_general_dilated', 'rhs'),
          *(args[-1].shape, params['kernel'].shape),
        ),
      },
    )
    for p in products.values():
      self.assertEqual(p.lhs.dtype, np.float32)
    numbers = products['left'].params['dimension_numbers']
    self.assertEqual(numbers, (((1,), (0,)), ((), ())))
    convolution = products['kernel'].params
    self.assertEqual(convolution['window_strides'], (1, 1))
    self.assertEqual(convolution['feature_group_count'], 1)
    how = {row.site: row.how for row in report}
    self.assertEqual(
      how.pop('left'), 'activations int8_channel, weight int8_channel'
    )
    self.assertEqual(set(how.values()), {'as it is'})

  def test_rules(self):
    def model(params, x):
      for block in ('block_0', 'block_1', 'block_2'):
        x = x @ params[block]['kernel']
      return x @ params['head']['kernel']

    params = {f'block_{i}': {'kernel': w} for i, w in enumerate(STACK)}
    params['head'] = {'kernel': W}
    rtn = recipes.get('mxfp4_rtn')
    policy = Policy(
      MXFP8, rules=(('head', None), ('block_1/', rtn)), first=1, blocks=3
    )
    report = lowbit.with_policy(model, policy).report(params, X)
    self.assertEqual(
      {row.site: row.how for row in report},
      {
        'block_0/kernel': 'as it is',
        'block_1/kernel': "trains by 'mxfp4_rtn'",
        'block_2/kernel': "trains by 'mxfp8'",
        'head/kernel': 'as it is',
      },
    )

  def test_what_the_function_closes_over(self):
    closed = lambda x: x @ W
    run = lowbit.with_policy(closed, INT8, argnums=())
    by_hand = lowbit.with_policy(matmul, INT8)
    assert_equal(quick_jit(run)(X), quick_jit(by_hand)(W, X))

  def test_functions_with_a_derivative_of_their_own_stay(self):
    own = jax.custom_vjp(lambda x, w: x @ w)
    own.defvjp(
      lambda x, w: (x @ w, w), lambda w, ct: (3 * ct @ w.T, jnp.zeros_like(w))
    )

    def model(params, x):
      return own(x @ params['trained'], params['own'])

    def by_hand(params, x):
      return own(lowbit.qdot(x, params['trained'], MXFP8), params['own'])

    params = {'trained': W, 'own': STACK[0]}
    run = lowbit.with_policy(model, MXFP8)
    assert_same(run, by_hand, params, X)
    with self.assertRaisesRegex(ValueError, 'selects no product'):
      lowbit.with_policy(lambda w, x: own(x, w), MXFP8)(W, X)


class ErrorTest(parameterized.TestCase):
  def fails(self, error, message, fn=matmul, policy=MXFP8, **options):
    with self.assertRaisesRegex(error, message):
      jax.eval_shape(lowbit.with_policy(fn, policy, **options), W, X)

  def test_forgotten_keys_and_scales_name_the_site(self):
    block = lambda params, x: x @ params['up']
    for policy, message in (
      (NOISY, "site 'up'.*key=jax.random.key"),
      (GemmSpec(NOISY), "site 'up'.*key="),
      (recipes.get('mxfp4_sr_rht'), "site 'up'.*key="),
      (DELAYED, r"site 'up'.*scales=.*init\(\*args\)"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        lowbit.with_policy(block, policy)({'up': W}, X)

  def test_scales_of_another_function(self):
    scales = {'lost': scaling.init_dot(DELAYED)}
    self.fails(ValueError, "entries for \\['lost'\\]", scales=scales)

  def test_policies_that_select_nothing(self):
    self.fails(ValueError, 'selects no product.*: w;', policy=lambda p: None)
    self.fails(ValueError, 'selects no product', fn=lambda w, x: x @ x.T)
    self.fails(ValueError, 'selects no product.*: none;', fn=lambda w, x: x)
    lost = Policy(MXFP8, rules=(('lost', None),))
    self.fails(ValueError, "'lost' is found in none", policy=lost)

  def test_products_that_a_policy_does_not_fit(self):
    explicit = lambda policy: lambda product: policy
    products = lambda w, x: x @ x.T
    self.fails(ValueError, 'has no weight', products, explicit(FP4))
    ragged = lambda w, x: lax.ragged_dot(x, w[None], np.array([TOKENS]))
    self.fails(ValueError, 'no training product', ragged, explicit(MXFP8))
    q = lowbit.quantize(W, formats.mxfp4)
    with self.assertRaisesRegex(ValueError, 'of a stored weight'):
      lowbit.with_policy(matmul, explicit(MXFP8))(q, X)
    self.fails(
      TypeError, "gives 'mxfp8' for site 'w'", policy=explicit('mxfp8')
    )

  def test_arguments(self):
    self.fails(TypeError, 'recipes.get', policy='mxfp8')
    self.fails(TypeError, 'policy=', policy=QuantSpec)
    self.fails(TypeError, 'PRNG key', key='seed')
    self.fails(TypeError, 'scales', scales=[1])
    self.fails(ValueError, 'argnums', argnums=-1)
    self.fails(ValueError, 'hadamard', policy=GemmSpec(FP4, FP4, hadamard=32))
    self.fails(ValueError, 'tensor_scaling', policy=HELD)
    with self.assertRaisesRegex(TypeError, 'fn='):
      lowbit.with_policy('matmul', MXFP8)


def run_held(fn, scales, *args):
  return lowbit.with_policy(fn, DELAYED, scales=scales)(*args)


class DeviceTest(parameterized.TestCase):
  """Integers of a few bits are exact in MXFP8, and so are their sums."""

  X, W = (np.clip(2 * a, -4, 4).round() for a in (normal(8, WIDTH), W))

  @parameterized.parameters(
    ('Auto', MXFP8, True), ('Explicit', INT8, True), ('Explicit', FP4, False)
  )
  def test_meshes(self, *case):
    self.check_mesh(*case)

  @parameterized.product(
    kind=('Auto', 'Explicit'), policy=(MXFP8, INT8, FP4), columns=(False, True)
  )
  @pytest.mark.slow
  def test_more_meshes(self, **case):
    self.check_mesh(**case)

  def check_mesh(self, kind, policy, columns):
    mesh = jax.make_mesh(
      (2, 2), ('a', 'b'), axis_types=(getattr(AxisType, kind),) * 2
    )
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    fn = lambda w, x: jnp.einsum('bk,kn->bn', x, w)
    w = place(self.W, None, 'b') if columns else place(self.W, None, None)
    x = place(self.X, 'a', None)
    want = jax.jit(lowbit.with_policy(fn, policy))(self.W, self.X)
    with jax.set_mesh(mesh):
      got = jax.jit(lowbit.with_policy(fn, policy))(w, x)
      dense = jax.jit(fn)(w, x)
    np.testing.assert_array_equal(got, want)
    self.assertEqual(got.sharding.spec, dense.sharding.spec)

  @parameterized.parameters(MXFP8, INT8, FP4)
  def test_shard_map(self, policy):
    mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    parts = jax.shard_map(
      matmul,
      mesh=mesh,
      in_specs=(P(None, 'b'), P('a')),
      out_specs=P('a', 'b'),
    )
    run = jax.jit(lowbit.with_policy(parts, policy))
    want = jax.jit(lowbit.with_policy(matmul, policy))
    np.testing.assert_array_equal(run(self.W, self.X), want(self.W, self.X))

  def test_held_scales_are_those_of_the_whole_tensors(self):
    mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    parts = jax.shard_map(
      matmul,
      mesh=mesh,
      in_specs=(P(None, 'b'), P('a')),
      out_specs=P('a', 'b'),
    )
    scales = lowbit.with_policy(parts, DELAYED).init(self.W, self.X)
    whole = lowbit.with_policy(matmul, DELAYED).init(self.W, self.X)
    assert_equal(scales, whole)
    run, by_hand = (
      jax.jit(lambda s, fn=fn: run_held(fn, s, self.W, self.X))
      for fn in (parts, matmul)
    )
    _, scales = run(scales)
    _, whole = by_hand(whole)
    assert_equal(scales, whole)
    # From the second step on, all devices take the scale that was held.
    scales, whole = scaling.advance((scales, whole))
    assert_equal(*map(np.asarray, (run(scales)[0], by_hand(whole)[0])))

  def test_x64(self):
    want = jax.jit(lowbit.with_policy(matmul, MXFP8))(self.W, self.X)
    with jax.enable_x64(True):
      got = jax.jit(lowbit.with_policy(matmul, MXFP8))(self.W, self.X)
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_array_equal(got, want)


if __name__ == '__main__':
  absltest.main()
