"""Held tensor scales against a plain Python account of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import serialization

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe, TensorScaling
from lowbit_jax.training import recipes, scaling

# Magnitudes of nine steps, with a step of zeros and one beyond the range.
SEEN = (2.0, 8.0, 1.0, 0.0, 0.0, 4.0, 3.0, math.inf, 5.0)


def delayed(window: int, seen) -> list[float]:
  """The magnitude in force in each step."""
  out, current = [], 0.0
  for i, amax in enumerate(seen):
    out.append(amax if current == 0 else current)
    top = max(seen[max(0, i + 1 - window) : i + 1])
    current = top if 0 < top < math.inf else current
  return out


def held(every: int, seen) -> list[float]:
  out, current = [], 0.0
  for i, amax in enumerate(seen):
    if i % every == 0 or current == 0:
      out.append(amax)
    else:
      out.append(current)
    if i % every == 0 and 0 < amax < math.inf:
      current = amax
  return out


class InitTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.states = scaling.init_dot(recipes.get('fp8_delayed'))

  def test_can_be_donated(self):
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(self.states)]
    self.assertLen(set(buffers), len(buffers))

  def test_msgpack(self):
    state = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), self.states)
    written = serialization.to_bytes(state)
    read = serialization.from_bytes(self.states, written)
    self.assertEqual(jax.tree.structure(read), jax.tree.structure(state))
    jax.tree.map(np.testing.assert_array_equal, read, state)
    other = scaling.init(TensorScaling(window=3))
    with self.assertRaisesRegex(ValueError, 'window=3'):
      serialization.from_bytes({'x': other}, serialization.to_bytes(
        {'x': state.x}
      ))  # fmt: skip

  def test_names_in_files(self):
    """Those of files that were written before, which are read as well."""
    state = scaling.init(TensorScaling(window=3))
    names = serialization.to_state_dict(state)
    leaves = {'history', 'amax', 'count', 'seen'}
    self.assertEqual(set(names), leaves | {'static'})
    rule = {'scaling': 'TensorScaling(window=3, every=1)'}
    self.assertEqual(names['static'], rule)


def run(rule: TensorScaling, seen) -> list[float]:
  state, used = scaling.init(rule), []

  @jax.jit
  def step(state, amax):
    state, amax = state.record(amax)
    return state.advanced(), amax

  for amax in seen:
    state, now = step(state, jnp.float32(amax))
    used.append(float(now))
  return used


def normal(*shape) -> np.ndarray:
  random = np.random.default_rng(shape)
  return random.standard_normal(shape).astype(np.float32)


qdot = jax.jit(lowbit.qdot, static_argnums=2)
scaled_qdot = jax.jit(scaling.qdot, static_argnums=2)


class StateTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 16)
  def test_delayed(self, window):
    self.assertEqual(
      run(TensorScaling(window=window), SEEN), delayed(window, SEEN)
    )

  @parameterized.parameters(2, 3, 50)
  def test_sample_and_hold(self, every):
    finite = [a for a in SEEN if a < math.inf]
    self.assertEqual(
      run(TensorScaling(every=every), finite), held(every, finite)
    )

  def test_microbatches_leave_the_state_of_the_whole(self):
    rule = TensorScaling(window=2)
    whole = scaling.init(rule).record(jnp.float32(7.0))[0]
    parts = scaling.init(rule)
    for amax in (3.0, 7.0, 5.0):
      parts, _ = parts.record(jnp.float32(amax))
    a, b = (scaling.init(rule).record(jnp.float32(v))[0] for v in (7.0, 3.0))
    for other in (parts, scaling.merge(a, b), scaling.merge(b, a)):
      for x, y in zip(
        jax.tree.leaves(scaling.advance(other)),
        jax.tree.leaves(scaling.advance(whole)),
        strict=True,
      ):
        np.testing.assert_array_equal(x, y)

  def test_advance_leaves_other_leaves_alone(self):
    tree = {'a': jnp.ones(3), 'b': scaling.init(TensorScaling(every=2))}
    out = scaling.advance(tree)
    self.assertIs(out['a'], tree['a'])
    self.assertEqual(int(out['b'].count), 1)


class DotTest(parameterized.TestCase):
  def test_reads_and_notes(self):
    spec = QuantSpec(
      formats.get('e4m3fn_tensor'), tensor_scaling=TensorScaling(window=4)
    )
    recipe = Recipe('test', GemmSpec(spec, spec))
    x, w = normal(6, 32), normal(32, 8)
    state = scaling.init_dot(recipe)
    first, state = scaled_qdot(x, w, recipe, state)
    np.testing.assert_array_equal(first, qdot(x, w, recipe))
    state = jax.jit(scaling.advance)(state)
    self.assertEqual(float(state.x.amax), np.abs(x).max())
    # Twice the activations saturate at the magnitude of the first step.
    second, _ = scaled_qdot(2 * x, w, recipe, state)
    amax = np.abs(x).max(), np.abs(w).max()
    want = qdot(2 * x, w, recipe, tensor_amax=amax)
    np.testing.assert_array_equal(second, want)
    self.assertFalse(np.array_equal(second, 2 * first))

  def test_only_where_a_recipe_asks(self):
    self.assertEqual(scaling.init_dot(recipes.get('nvfp4')), (None, None))
    state = scaling.init_dot(recipes.get('fp8_delayed'))
    self.assertEqual(state.x.history.shape, (1024,))

  def test_remat_notes_once(self):
    recipe = recipes.get('fp8_delayed')
    x, w = normal(6, 32), normal(32, 8)

    def loss(w, state, wrap):
      f = wrap(lambda x, w, s: scaling.qdot(x, w, recipe, s))
      y, state = f(x, w, state)
      return jnp.sum(y**2), state

    state = scaling.init_dot(recipe)
    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    want = grad(w, state, lambda f: f)
    got = grad(w, state, jax.checkpoint)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_no_gradient_reaches_the_state(self):
    slope = jax.jit(jax.grad(scaling.largest))(np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(slope, 0)


if __name__ == '__main__':
  absltest.main()
