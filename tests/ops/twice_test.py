"""Second derivatives of the ops in loops.

Products are of small integers, so that float32 holds all sums: the oracle is
the float64 derivative of the product with the dequantized weight, to the bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

import lowbit_jax
from lowbit_jax import formats, ops, qarray

K, ROWS, STEPS = 32, 3, 2
SIZES = np.array([2, 0, 1], np.int32)


def _weight(axis: int, groups: int = 1):
  """Weights of few integers, whose blocks all have the scale 1."""
  random = np.random.RandomState(groups)
  w = np.float32(random.randint(-1, 2, (groups, K, K)))
  w *= random.rand(groups, K, K) < 0.2
  along = np.moveaxis(w, axis, -1)  # a view
  along[..., ::16] = 6
  w = w if groups > 1 else w[0]
  q = lowbit_jax.quantize(
    w, formats.nvfp4, axis=axis, tensor_scale=np.float32(1)
  )
  np.testing.assert_array_equal(lowbit_jax.dequantize(q), w)
  return q, w


COLUMNS, ROWED, STACK = _weight(-2), _weight(-1), _weight(-2, len(SIZES))
X, V = (
  np.random.RandomState(i).randint(-1, 2, (ROWS, K)).astype(np.float32)
  for i in range(2)
)


def _by(q, scale):
  return qarray.replace(q, tensor_scale=jnp.full_like(q.tensor_scale, scale))


def _straight(x):
  y = ops.fake_quant(x.astype(jnp.float32), formats.mxfp4).astype(x.dtype)
  return x + lax.stop_gradient(y - x)


# Operations of (rows, scale of the weight), and what has their derivative.
EXACT = {
  'dot': (
    lambda x, s: lowbit_jax.dot(x, _by(COLUMNS[0], s)),
    lambda x, s: x @ (s * COLUMNS[1].astype(x.dtype)),
  ),
  'einsum': (
    lambda x, s: lowbit_jax.einsum('bk,nk->bn', x, _by(ROWED[0], s)),
    lambda x, s: x @ (s * ROWED[1].T.astype(x.dtype)),
  ),
  'ragged_dot': (
    lambda x, s: lowbit_jax.ragged_dot(x, _by(STACK[0], s), SIZES),
    lambda x, s: jnp.einsum(
      'bk,bkn->bn',
      x,
      s * np.repeat(STACK[1], SIZES, axis=0).astype(x.dtype),
    ),
  ),
  # Of 5, 4 remains.
  'fake_quant': (
    lambda x, s: ops.fake_quant(5 * x, formats.mxfp4) * s,
    lambda x, s: _straight(5 * x) * s,
  ),
}
CACHE = np.random.RandomState(2).normal(size=(2, ROWS, 5, 1, K))


def _decoded(x, scale):
  keys, values = CACHE.astype(x.dtype)
  y = ops.decode_attention(x[:, None, None], keys, scale * values, 4)
  return y[:, 0, 0]


def _attended(x, scale):
  keys, values = CACHE[:, :, :4, 0].astype(x.dtype)
  scores = jnp.einsum('bh,bsh->bs', x, keys) * K**-0.5
  return jnp.einsum('bs,bsh->bh', jax.nn.softmax(scores), scale * values)


ROUNDED = {
  'decode_attention': (_decoded, _attended),
  'softmax': (
    lambda x, s: ops.softmax(x) * s,
    lambda x, s: jax.nn.softmax(x) * s,
  ),
  'log_softmax': (
    lambda x, s: ops.log_softmax(x) * s,
    lambda x, s: jax.nn.log_softmax(x) * s,
  ),
  'logsumexp': (
    lambda x, s: ops.logsumexp(x)[:, None] * s,
    lambda x, s: jax.nn.logsumexp(x, -1, keepdims=True) * s,
  ),
}


def _body(operation, scale, x, _):
  return x + operation(x, scale) * x, None


def _scan(operation, x, scale):
  return lax.scan(functools.partial(_body, operation, scale), x, length=STEPS)[
    0
  ]


def _remat(operation, x, scale):
  body = functools.partial(_body, operation, scale)
  return lax.scan(jax.checkpoint(body), x, length=STEPS)[0]


def _vmap(operation, x, scale):
  run = functools.partial(_scan, operation)
  return jax.vmap(run, (0, None))(x[None], scale)[0]


def _vmap_weights(operation, x, scale):
  run = functools.partial(_scan, operation)
  return jax.vmap(run)(x[None], scale[None])[0]


def _vmap_inside(operation, x, scale):
  def mapped(x, scale):
    return jax.vmap(operation)(x[None], scale[None])[0]

  return _scan(mapped, x, scale)


def _fori(operation, x, scale):
  step = lambda _, x: _body(operation, scale, x, None)[0]
  return lax.fori_loop(0, STEPS, step, x)


def _while(operation, x, scale):
  def step(state):
    return state[0] + 1, _body(operation, scale, state[1], None)[0]

  # A bound that is not known, so that no scan stands for the loop.
  bound = jnp.where(x[0, 0] > 2**20, STEPS + 1, STEPS)
  return lax.while_loop(lambda s: s[0] < bound, step, (0, x))[1]


def _orders(loop, operation):
  """The loss, and its Hessian times a direction, in three orders."""

  def loss(x, scale):
    return jnp.sum(loop(operation, x, scale))

  slope = jax.grad(loss, (0, 1))

  def reverse_reverse(point, direction):
    def along(point):
      slopes = slope(*point)
      return sum(map(jnp.vdot, slopes, direction))

    return jax.grad(along)(point)

  def forward_reverse(point, direction):
    return jax.jvp(slope, point, direction)[1]

  def reverse_forward(point, direction):
    return jax.grad(lambda *p: jax.jvp(loss, p, direction)[1], (0, 1))(*point)

  return reverse_reverse, forward_reverse, reverse_forward


def _points(dtype):
  point = X, np.float32(1)
  direction = V, np.float32(1)
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), (point, direction))


@functools.cache
def _wanted(operation):
  """The Hessian times the direction, in float64."""
  with jax.enable_x64(True):
    f = jax.jit(_orders(_scan, operation)[1])
    return jax.tree.map(np.asarray, f(*_points(jnp.float64)))


def _some(loop, operation, orders: slice):
  chosen = _orders(loop, operation)[orders]
  return jax.jit(lambda *args: [f(*args) for f in chosen])


class TwiceTest(parameterized.TestCase):
  @parameterized.parameters('dot', 'fake_quant')
  def test_reverse_over_reverse(self, name):
    self.check_exact(name, _scan, slice(1))

  @parameterized.product(
    name=list(EXACT), loop=[_scan, _remat, _vmap, _vmap_weights, _vmap_inside]
  )
  @pytest.mark.slow
  def test_all_orders(self, name, loop):
    self.check_exact(name, loop, slice(3))

  def check_exact(self, name, loop, orders):
    ours, dense = EXACT[name]
    want = _wanted(dense)
    self.assertGreater(np.abs(want[0]).max(), 0)
    for got in _some(loop, ours, orders)(*_points(jnp.float32)):
      jax.tree.map(np.testing.assert_array_equal, got, want)

  @parameterized.product(name=list(EXACT), loop=[_fori, _while])
  @pytest.mark.slow
  def test_forward_over_forward(self, name, loop):
    ours, dense = EXACT[name]
    point, direction = _points(jnp.float32)

    def twice(*point):
      loss = lambda *point: jnp.sum(loop(ours, *point))
      once = lambda *point: jax.jvp(loss, point, direction)[1]
      return jax.jvp(once, point, direction)[1]

    want = sum(map(np.vdot, _wanted(dense), direction))
    self.assertEqual(jax.jit(twice)(*point), want)

  @parameterized.product(name=list(ROUNDED), loop=[_scan, _remat, _vmap])
  @pytest.mark.slow
  def test_rounded(self, name, loop):
    ours, dense = ROUNDED[name]
    want = _wanted(dense)
    largest = max(np.abs(b).max() for b in want)
    for got in _some(loop, ours, slice(3))(*_points(jnp.float32)):
      for a, b in zip(got, want, strict=True):
        # A few dozen roundings; the slope of the scale is a sum that cancels.
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-18 * largest)

  def test_a_product_is_transposed(self):
    q, w = COLUMNS
    transpose = jax.linear_transpose(lambda x: lowbit_jax.dot(x, q), X)
    np.testing.assert_array_equal(jax.jit(transpose)(V)[0], V @ w.T)


if __name__ == '__main__':
  absltest.main()
