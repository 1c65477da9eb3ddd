"""`packed` through calls and control flow.

Each case is written once for a product `dot`: with `jnp.matmul` it is any
function, with `ops.dot` what one would write by hand. Packed, the first is the
program of the second, or where JAX puts it together in another order, has its
bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import ops, qarray, transforms
from tests.ops.products import data, make
from tests.walk import programs

D, L = 64, 3
X = data(4, D)
W, U = make('mxfp4', D, D), make('mxfp4', D, D, seed=2)
STACK = make('mxfp4', L, D, D)
CASES = {}


def transformed(count):
  """A stack of weights, each with a permutation of its own."""
  members = [
    ops.Transformed(
      make('mxfp4', D, D, seed=i),
      transforms.Permutation(np.random.RandomState(i).permutation(D)),
      -2,
    )
    for i in range(count)
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def case(*args, rows=1):
  """Registers a function dot -> fn with the arguments of fn, and how many uses
  its report lists."""

  def register(build):
    CASES[build.__name__] = build, args, rows
    return build

  return register


def layer(dot):
  return lambda x, w: jnp.tanh(dot(x, w))


@case(X, W, U, rows=2)
def jit(dot):
  run = jax.jit(layer(dot))
  return lambda x, a, b: run(run(x, a), b)


@case(X, W)
def jit_of_a_tree(dot):
  half = jax.jit(lambda tree: {'w': tree['w'].astype(jnp.float16)})
  return lambda x, w: dot(x.astype(jnp.float16), half({'w': w})['w'])


@case(X, STACK)
def scan(dot):
  body = layer(dot)
  return lambda x, ws: lax.scan(lambda c, w: (body(c, w), c[0]), x, ws)


@case(X, STACK)
def scan_in_reverse(dot):
  body = layer(dot)

  def fn(x, ws):
    def step(c, w):
      return body(c, w), None

    return lax.scan(step, x, ws, reverse=True, unroll=2)[0]

  return fn


@case(X, transformed(L))
def scan_of_transformed(dot):
  return scan(dot)


@case(X, STACK)
def map_over_weights(dot):
  return lambda x, ws: lax.map(lambda w: dot(x, w), ws)


@case(X, W)
def scan_constant(dot):
  body = layer(dot)

  def fn(x, w):
    return lax.scan(lambda c, _: (body(c, w), None), x, None, length=3)[0]

  return fn


@case(X, W)
def scan_carry(dot):
  def step(carry, _):
    x, w = carry
    return (dot(x, w), w), None

  return lambda x, w: lax.scan(step, (x, w), None, length=3)[0][0]


@case(X, W, U)
def scan_carry_in_turn(dot):
  def step(carry, _):
    x, w, u = carry
    return (dot(x, w), u, w), None

  return lambda *carry: lax.scan(step, carry, None, length=3)[0][0]


@case(X, W, 3)
def while_loop(dot):
  def fn(x, w, n):
    def step(carry):
      i, x, w = carry
      return i + 1, dot(x, w), w

    return lax.while_loop(lambda c: c[0] < n, step, (0, x, w))[1]

  return fn


@case(X, W)
def while_with_a_weight_in_its_condition(dot):
  def fn(x, w):
    return lax.while_loop(
      lambda x: jnp.sum(dot(x, w)) > 1e6, lambda x: x * 0.5, x
    )

  return fn


@case(X, STACK)
def fori_loop(dot):
  def fn(x, ws):
    def step(i, x):
      w = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0), ws)
      return dot(x, jax.tree.map(lambda leaf: lax.squeeze(leaf, [0]), w))

    return lax.fori_loop(0, L, step, x)

  return fn


@case(X, W, U, rows=2)
def cond(dot):
  def fn(x, w, u):
    return lax.cond(x[0, 0] > 0, lambda: dot(x, w), lambda: dot(x + 1, u))

  return fn


@case(X, W, U, 1, rows=3)
def switch(dot):
  def fn(x, w, u, i):
    branches = [dot, lambda x, w: x, lambda x, w: dot(x, w) + 1]
    return dot(lax.switch(i, branches, x, w), u)

  return fn


@case(X, W)
def remat(dot):
  return jax.checkpoint(layer(dot))


@case(X, W)
def remat_with_a_policy(dot):
  policy = jax.checkpoint_policies.dots_saveable
  return jax.checkpoint(layer(dot), policy=policy, prevent_cse=False)


@case(X, STACK)
def scan_of_remat(dot):
  body = jax.checkpoint(lambda c, w: (layer(dot)(c, w), None))
  return lambda x, ws: lax.scan(body, x, ws)[0]


@case(data(2, 4, D), STACK)
def vmap_of_scan(dot):
  return lambda xs, ws: jax.vmap(lambda x: scan(dot)(x, ws)[0])(xs)


@case(data(2, 4, D), W)
def vmap_over_activations(dot):
  return jax.vmap(dot, (0, None))


@case(X, W, STACK, rows=3)
def all_nested(dot):
  @jax.jit
  def block(x, w, ws):
    step = jax.checkpoint(lambda c, v: (jnp.tanh(dot(c, v)), None))
    y = lax.scan(step, x, ws)[0]
    y = lax.fori_loop(0, 2, lambda i, y: dot(y, w), y)
    return lax.cond(y[0, 0] > 0, lambda: y, lambda: dot(x, w))

  return block


def why(report) -> list[str]:
  """Why weights are decoded."""
  return [row.how for row in report if row.decoded]


class ControlTest(parameterized.TestCase):
  @parameterized.parameters([*CASES])
  def test_runs_as_ops_do(self, name):
    build, args, rows = CASES[name]
    packed, by_ops = lowbit.packed(build(jnp.matmul)), build(ops.dot)
    program = programs.lowered(packed, *args)
    if program != programs.lowered(by_ops, *args):
      got, want = jax.jit(packed)(*args), jax.jit(by_ops)(*args)
      programs.assert_same_bits(got, want)
    report = packed.report(*args)
    self.assertLen(report, rows)
    self.assertEqual(why(report), [])

  def assert_decodes(self, reason, fn, *args):
    """All bits are those of decoded weights, for a reason."""
    packed = lowbit.packed(fn)
    self.assertEqual(why(packed.report(*args)), [reason])

    def by_hand(*args):
      return fn(*programs.dense(args))

    got, want = jax.jit(packed)(*args), jax.jit(by_hand)(*args)
    programs.assert_same_bits(got, want)

  def test_a_carry_that_changes_is_decoded(self):
    def fn(x, w):
      def step(carry, _):
        x, w = carry
        return (x @ w, w * 0.5), None

      return lax.scan(step, (x, w), None, length=3)[0]

    reason = 'a loop that carries it changes it'
    self.assertIn(reason, why(lowbit.packed(fn).report(X, W)))
    got = jax.jit(lowbit.packed(fn))(X, W)
    programs.assert_same_bits(got, jax.jit(fn)(X, programs.dense(W)))

  # Rows of a trial that is not run are listed too.
  def test_a_carry_that_changes_has_one_row(self):
    def fn(x, w):
      return lax.while_loop(
        lambda carry: carry[0].sum() < 9.0,
        lambda carry: (carry[0] @ carry[1], carry[1] * 0.5),
        (x, w),
      )[0]

    (row,) = lowbit.packed(fn).report(X, W)
    self.assertEqual((row.operation, row.decoded), ('while', 4 * D * D))

  def test_a_weight_that_a_branch_gives_is_decoded(self):
    def fn(x, w):
      return x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: jnp.zeros((D, D)))

    self.assert_decodes('it is a result of cond', fn, X, W)

  def test_a_choice_of_platforms_is_left_to_jax(self):
    def fn(x, w):
      def other(x, w):
        return x

      return lax.platform_dependent(x, w, cpu=jnp.matmul, default=other)

    self.assert_decodes('cond has no packed form', fn, X, W)

  def test_blocks_along_the_scanned_axis_are_decoded(self):
    w = make('mxfp4', D, D, axis=-2)

    def fn(x, w):
      return lax.scan(lambda c, row: (c + x @ row, None), x[:, 0], w)[0]

    reason = 'scan: blocks lie across layers'
    self.assert_decodes(reason, fn, X, w)

  def test_one_tensor_scale_for_all_layers(self):
    def by_ops(x, ws):
      scales = jnp.broadcast_to(ws.tensor_scale, (L, 1, 1))
      return scan(ops.dot)(x, qarray.replace(ws, tensor_scale=scales))

    ws = make('nvfp4', L, D, D)
    packed = lowbit.packed(scan(jnp.matmul))
    got, want = jax.jit(packed)(X, ws), jax.jit(by_ops)(X, ws)
    programs.assert_same_bits(got, want)

  def test_vmap_outside(self):
    xs = data(L, 4, D)
    for axes, w in ((0, None), W), ((0, 0), STACK):
      got, want = (
        programs.lowered(jax.vmap(dot, axes), xs, w)
        for dot in (lowbit.packed(jnp.matmul), ops.dot)
      )
      self.assertEqual(got, want)


if __name__ == '__main__':
  absltest.main()
