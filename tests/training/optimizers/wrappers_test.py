"""All optimizers within what users of optax and Flax put around them.

One tree for all, large enough for encoded moments; most laws are about shapes
and dtypes, so that a trace shows them.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import nnx, serialization
from flax.training import train_state

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.training import optimizers

RATE = 1e-2
STEPS = 3


def shapes(dtype=jnp.float32):
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, dtype),
    {
      'embed': (16, 8),
      'layers': {'kernel': (2, 64, 64), 'scale': (2, 64)},
      'up': {'kernel': (64, 128), 'bias': (128,)},
      'empty': (0, 128),
    },
    is_leaf=lambda x: isinstance(x, tuple),
  )


def parts(learning_rate):
  """What is not a whole optimizer, one after the other."""
  return optax.chain(
    optimizers.qsgd(),
    optimizers.ef_sign(),
    optimizers.adaclip(),
    optimizers.adagn(),
    optimizers.momentum_reset(
      optimizers.direct(optimizers.quantized_state(optax.scale_by_adam())), 2
    ),
    optimizers.mup_head_scale(8),
    optax.scale_by_learning_rate(learning_rate),
    optimizers.q_ema(),
    optimizers.deoscillate(QuantSpec(formats.int4_g32)),
  )


FACTORIES = {
  'adamw': optimizers.adamw,
  'adamw_4bit': optimizers.adamw_4bit,
  'muon': optimizers.muon,
  'muon_8bit': functools.partial(optimizers.muon, momentum='e4m3'),
  'stable_spam': functools.partial(optimizers.stable_spam, decay_steps=None),
  'parts': parts,
}
NAMES = tuple(FACTORIES)
# Tested in the chains above, and within them.
INSIDE = {
  'adaclip', 'adagn', 'deoscillate', 'direct', 'dynamic_loss_scale', 'ef_sign',
  'momentum_reset', 'mup_head_scale', 'q_ema', 'qsgd', 'quantized_state',
  'scale_by_muon',
}  # fmt: skip


def layout(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return [(x.shape, x.dtype) for x in leaves], treedef


def filled(tree):
  """Arrays in place of shapes, each with other numbers."""
  counter = iter(range(1, 10000))
  return jax.tree.map(
    lambda x: np.full(x.shape, next(counter) % 100, x.dtype), tree
  )


class WrappersTest(parameterized.TestCase):
  def test_no_optimizer_is_left_out(self):
    public = {
      name
      for name, f in vars(optimizers).items()
      if inspect.isfunction(f)
      and 'GradientTransformation'
      in str(inspect.signature(f).return_annotation)
    }
    self.assertEqual(public, (set(NAMES) & public) | INSIDE)

  @parameterized.parameters(*NAMES)
  def test_hyperparameters_and_parts_of_a_tree(self, name):
    # Injected, masked, in a chain and in a partition.
    injected = optax.inject_hyperparams(FACTORIES[name])(learning_rate=RATE)
    tx = optax.partition(
      {
        'a': optax.chain(
          optax.clip_by_global_norm(1.0),
          optax.masked(
            injected, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
          ),
        ),
        'b': optax.set_to_zero(),
      },
      {'embed': 'b', 'layers': 'a', 'up': 'a', 'empty': 'a'},
    )
    w = shapes()
    state = jax.eval_shape(tx.init, w)
    updates, new = jax.eval_shape(tx.update, w, state, w)
    self.assertEqual(layout(updates), layout(w))
    self.assertEqual(layout(new), layout(state))
    size = optimizers.state_bytes(state)
    if name not in ('muon', 'parts'):
      self.assertLess(size, 8 * sum(x.size for x in jax.tree.leaves(w)) + 100)

  @parameterized.parameters(*NAMES)
  def test_half_precision_keeps_the_state(self, name):
    # float16 parameters, gradients in float32, steps in a scan with all that
    # chooses between an old and a new state.
    tx = optax.MultiSteps(
      optax.apply_if_finite(
        optimizers.dynamic_loss_scale(FACTORIES[name](RATE)), 5
      ),
      2,
    )

    def train(w, grads):
      def step(carry, _):
        w, state = carry
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

      return jax.lax.scan(step, (w, tx.init(w)), length=STEPS)[0]

    w = shapes(jnp.float16)
    new, state = jax.eval_shape(train, w, shapes())
    self.assertEqual(layout(new), layout(w))
    moments = jax.tree.leaves(state.inner_opt_state)
    self.assertEmpty([x for x in moments if x.dtype == jnp.float16])

  @parameterized.parameters(*NAMES)
  def test_nnx(self, name):
    class Model(nnx.Module):
      def __init__(self):
        self.up = nnx.Linear(64, 128, rngs=nnx.Rngs(0))

    @nnx.eval_shape
    def states():
      model = Model()
      optimizer = nnx.Optimizer(model, FACTORIES[name](RATE), wrt=nnx.Param)
      out = [nnx.state(optimizer)]
      for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))
        out.append(nnx.state(optimizer))
      return out

    first, *others = map(layout, states)
    for other in others:
      self.assertEqual(other, first)

  @parameterized.parameters(*NAMES)
  def test_train_state_and_msgpack(self, name):
    create = functools.partial(
      train_state.TrainState.create, apply_fn=None, tx=FACTORIES[name](RATE)
    )
    like = jax.eval_shape(lambda w: create(params=w), shapes())
    state = filled(like)
    read = serialization.from_bytes(like, serialization.to_bytes(state))
    self.assertEqual(jax.tree.structure(read), jax.tree.structure(state))
    jax.tree.map(np.testing.assert_array_equal, read, state)


class ExecutionTest(absltest.TestCase):
  def test_nnx_jit(self):
    model = nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
      model, optimizers.adamw(RATE, first='lin8', second=None), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
      grads = nnx.grad(lambda m: jnp.sum(m.kernel[...] ** 2))(model)
      optimizer.update(model, grads)

    before = np.asarray(model.kernel[...])
    for _ in range(2):
      step(model, optimizer)
    after = np.asarray(model.kernel[...])
    large = np.abs(before) > 2 * RATE
    share = (before - after)[large] * np.sign(before[large]) / RATE
    # Adam's first steps have the size of the rate.
    np.testing.assert_allclose(share, 2, atol=0.2)
    mu = nnx.as_pure(optimizer.opt_state)[0].mu['kernel']
    self.assertIsInstance(mu, lowbit_jax.QArray)

  def test_states_can_be_donated(self):
    w = {'up': jnp.ones((8, 8)), 'bias': jnp.ones(3)}
    tx = optimizers.dynamic_loss_scale(optimizers.stable_spam(RATE))
    state = w, tx.init(w), optimizers.q_ema().init(w)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    self.assertLen(set(buffers), len(buffers))

  def test_other_targets_are_refused(self):
    def like(fmt, shape=(4, 64)):
      return jax.eval_shape(lambda: lowbit_jax.quantize(jnp.ones(shape), fmt))

    q = filled(like(formats.mxfp4))
    written = serialization.to_bytes({'w': q})
    read = serialization.from_bytes({'w': like(formats.mxfp4)}, written)
    np.testing.assert_array_equal(read['w'].codes, q.codes)
    with self.assertRaisesRegex(ValueError, 'mxfp4.*mxfp6'):
      serialization.from_bytes({'w': like(formats.mxfp6_e2m3)}, written)
    with self.assertRaisesRegex(ValueError, 'shape'):
      serialization.from_bytes({'w': like(formats.mxfp4, (8, 64))}, written)


if __name__ == '__main__':
  absltest.main()
