"""Muon: equality with optax, what goes where, muP, momentum of 8 bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from optax.contrib import MuonDimensionNumbers

import lowbit_jax
from lowbit_jax.training import optimizers

newton_schulz = jax.jit(optimizers.newton_schulz)
mup_normal = jax.jit(optimizers.mup_normal(), static_argnums=1)
activation_cap = jax.jit(optimizers.activation_cap)


def params():
  random = np.random.RandomState(0)
  shapes = {
    'embed': {'table': (10, 8)},
    'block': {'kernel': (8, 24), 'bias': (24,)},
    'down': {'kernel': (24, 8)},
    'lm_head': {'kernel': (8, 10)},
  }
  return jax.tree.map(
    lambda s: random.randn(*s).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients(seed: int, like):
  random = np.random.RandomState(seed)
  return jax.tree.map(lambda x: random.randn(*x.shape).astype(x.dtype), like)


def run(tx, w, steps: int = 3):
  """Updates of every step."""
  state, out = jax.jit(tx.init)(w), []
  update = jax.jit(tx.update)
  for step in range(steps):
    updates, state = update(gradients(step, w), state, w)
    out.append(jax.tree.map(np.asarray, updates))
    w = jax.tree.map(np.add, w, out[-1])
  return out, state


def norm2(x) -> float:
  return float(np.linalg.norm(np.asarray(x, np.float64), 2))


class OptaxTest(parameterized.TestCase):
  def test_equals_optax_where_both_apply(self):
    self.check_equals_optax(True, 'max1', None)

  @parameterized.parameters(
    (False, 'rms', 0.2), (False, 'max1', None), (True, 'rms', 0.2)
  )
  @pytest.mark.slow
  def test_equals_optax_in_other_pairs(self, *case):
    self.check_equals_optax(*case)

  def check_equals_optax(self, nesterov, ours, consistent_rms):

    def dimensions(tree):
      return jax.tree_util.tree_map_with_path(
        lambda path, x: optimizers.hidden_matrices(
          jax.tree_util.keystr(path, simple=True, separator='/'), x
        ),
        tree,
      )

    theirs = optax.contrib.muon(
      0.02,
      weight_decay=0.1,
      nesterov=nesterov,
      consistent_rms=consistent_rms,
      muon_weight_dimension_numbers=dimensions,
    )
    adam = optax.adamw(0.02, weight_decay=0.0, nesterov=nesterov)
    mine = optimizers.muon(
      0.02, 0.1, other=adam, nesterov=nesterov, shape_scale=ours
    )
    for a, b in zip(
      run(mine, params())[0], run(theirs, params())[0], strict=True
    ):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        a,
        b,
      )

  def test_equals_optax_on_axes_of_kernels(self):
    axes = MuonDimensionNumbers((0, 2), 3)
    w = {'w': gradients(1, jnp.zeros((4, 2, 3, 5)))}
    theirs = optax.contrib.muon(
      0.02, muon_weight_dimension_numbers=lambda p: {'w': axes}
    )
    mine = optimizers.muon(0.02, dimensions=lambda path, leaf: axes)
    for a, b in zip(run(mine, w)[0], run(theirs, w)[0], strict=True):
      np.testing.assert_allclose(a['w'], b['w'], atol=1e-6)

  def test_unscaled_momentum_has_the_same_direction(self):
    w = {'w': jnp.zeros((8, 24))}
    tx = optimizers.scale_by_muon(beta=0.5, nesterov=False, shape_scale='none')
    c = np.zeros((8, 24))
    state, update = tx.init(w), jax.jit(tx.update)
    for step in range(4):
      g = gradients(step, w)
      c = 0.5 * c + np.asarray(g['w'], np.float64)
      expected = newton_schulz(c.astype(np.float32))
      actual, state = update(g, state)
      np.testing.assert_allclose(actual['w'], expected, atol=2e-5)


class PartsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('block_0/attention/query/kernel', (8, 8), True),
    ('block_0/multihead/out', (8, 8), True),
    ('heads/kernel', (8, 8), True),
    ('block_0/bias', (8,), False),
    ('conv/kernel', (3, 3, 8, 8), False),
    ('embed/embedding', (8, 8), False),
    ('token_embedder', (8, 8), False),
    ('transformer/wte', (8, 8), False),
    ('lm_head/kernel', (8, 8), False),
    ('head', (8, 8), False),
    ('logits/kernel', (8, 8), False),
    ('unembed', (8, 8), False),
    ('classifier/kernel', (8, 8), False),
    ('LayerNorm_0/scale', (12, 8), False),
    ('blocks/pre_norm/weight', (12, 8), False),
    ('blocks/LoRA_0/a', (12, 8), False),
    ('lora_b', (8, 8), True),
    ('PreNormBlock_0/kernel', (8, 8), True),
    ('up_bias', (12, 8), False),
    ('Conv_0/kernel', (3, 8, 8), False),
    ('kernel', (0, 8), False),
    ('class_token', (1, 1, 8), False),
  )
  def test_hidden_matrices(self, path, shape, expected):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    axes = optimizers.hidden_matrices(path, leaf)
    self.assertEqual(axes is not None, expected)

  @parameterized.parameters(
    ('moe/experts', (4, 8, 16), 1, 2),
    ('attention/query/kernel', (8, 2, 4), 0, (1, 2)),
    ('attn/out/kernel', (2, 4, 8), (0, 1), 2),
    ('out/kernel', (2, 4, 8), 1, 2),
    ('layers_0/mlp/kernel', (8, 16), 0, 1),
    ('layers/0/query/kernel', (8, 2, 4), 0, (1, 2)),
    ('layers/query/kernel', (12, 8, 8), 1, 2),
    ('layers/query/kernel', (12, 8, 2, 4), 1, (2, 3)),
    ('ScanBlock_0/MultiHeadDotProductAttention_0/out/kernel',
     (12, 2, 4, 8), (1, 2), 3),
    ('decoder/query/kernel', (12, 8, 2, 4), 1, (2, 3)),
    ('blocks/moe/experts', (12, 4, 8, 16), 2, 3),
  )  # fmt: skip
  def test_stacked_and_grouped_matrices(self, path, shape, inner, outer):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    axes = optimizers.hidden_matrices(path, leaf)
    self.assertEqual(axes, MuonDimensionNumbers(inner, outer))

  def test_a_complex_matrix_is_not_taken(self):
    leaf = jax.ShapeDtypeStruct((8, 8), jnp.complex64)
    self.assertIsNone(optimizers.hidden_matrices('kernel', leaf))

  def test_table(self):
    leaf = jax.ShapeDtypeStruct
    w = {
      'attn': {'query': {'kernel': leaf((8, 2, 4), jnp.float32)}},
      'layers': {
        'norm': leaf((3, 8), jnp.float32),
        'up': leaf((3, 8, 16), jnp.float32),
      },
    }
    self.assertEqual(
      optimizers.muon_table(w).splitlines(),
      [
        'attn/query/kernel  (8, 2, 4)   muon, 1 of (8, 8)',
        'layers/norm        (3, 8)      other',
        'layers/up          (3, 8, 16)  muon, 3 of (8, 16)',
      ],
    )
    table = optimizers.muon_table(w, lambda path, leaf: None)
    self.assertEqual(table.count('other'), 3)
    self.assertEqual(optimizers.muon_table({}), '')

  def test_each_matrix_of_a_stack_has_its_own_factor(self):
    a, b = (gradients(i, jnp.zeros((8, 24))) for i in range(2))
    b = 100 * b
    grads = {
      'layers': {'kernel': np.stack([a, b]), 'scale': np.ones((2, 8))},
      'query': {'kernel': a.reshape(8, 4, 6)},
      'plain': [a, b],
      'empty': np.zeros((0, 8), np.float32),
    }
    tx = optimizers.muon(1.0, dimensions=lambda path, leaf: (
      MuonDimensionNumbers() if path == 'empty'
      else optimizers.hidden_matrices(path, leaf)
    ))  # fmt: skip
    u, _ = jax.jit(lambda g: tx.update(g, tx.init(g), g))(grads)
    for i in range(2):
      np.testing.assert_allclose(
        u['layers']['kernel'][i], u['plain'][i], atol=1e-5
      )
    np.testing.assert_allclose(
      u['query']['kernel'].reshape(8, 24), u['plain'][0], atol=1e-5
    )
    # The first step of AdamW.
    np.testing.assert_allclose(u['layers']['scale'], -1.0, rtol=1e-5)
    self.assertEqual(u['empty'].shape, (0, 8))

  def test_dtype_of_the_momentum(self):
    w = {'w': jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}
    for dtype, expected in ((None, 'float32'), ('bfloat16', 'bfloat16')):
      tx = optimizers.scale_by_muon(mu_dtype=dtype)
      state = jax.eval_shape(tx.init, w)
      updates, new = jax.eval_shape(tx.update, w, state)
      self.assertEqual(updates['w'].dtype, jnp.bfloat16)
      for s in (state, new):
        self.assertEqual(s.mu['w'].dtype, jnp.dtype(expected))

  def test_other_leaves_are_those_of_adamw(self):
    tx = optimizers.muon(0.02, weight_decay=0.1)
    adam = optax.adamw(0.02, weight_decay=0.0)
    ours, theirs = run(tx, params())[0][-1], run(adam, params())[0][-1]
    for get in (
      lambda t: t['embed']['table'],
      lambda t: t['block']['bias'],
      lambda t: t['lm_head']['kernel'],
    ):
      np.testing.assert_allclose(get(ours), get(theirs), rtol=1e-6)
    self.assertFalse(
      np.allclose(ours['down']['kernel'], theirs['down']['kernel'], atol=1e-3)
    )

  # Other tests see 'max1' and 'none'.
  @parameterized.parameters(
    ('mup', lambda i, o: math.sqrt(o / i)),
    ('rms', lambda i, o: 0.2 * math.sqrt(max(i, o))),
  )
  def test_shape_scale(self, name, factor):
    self.check_shape_scale(name, factor)

  @parameterized.parameters(
    ('max1', lambda i, o: math.sqrt(max(1, o / i))), ('none', lambda i, o: 1.0)
  )
  @pytest.mark.slow
  def test_another_shape_scale(self, name, factor):
    self.check_shape_scale(name, factor)

  def check_shape_scale(self, name, factor):
    for shape in ((8, 24), (24, 8)):
      w = {'w': gradients(0, jnp.zeros(shape))}
      tx = optimizers.scale_by_muon(
        shape_scale=name, coefficients='quintic_theory', steps=20
      )
      o, _ = jax.jit(lambda w: tx.update(w, tx.init(w)))(w)
      s = np.linalg.svd(o['w'], compute_uv=False)
      np.testing.assert_allclose(s, factor(*shape), rtol=1e-4)

  def test_randomized(self):
    w = {'a': gradients(0, jnp.zeros((48, 64)))}
    w['b'] = w['a']

    zero, one = (
      optimizers.muon(1.0, polar='randomized', rank=10, oversample=2, seed=seed)
      for seed in range(2)
    )
    ours = run(zero, w)[0]
    first = ours[0]
    s = np.linalg.svd(first['a'], compute_uv=False)
    self.assertEqual(np.sum(s > 1e-4), 12)
    # Root mean square of a full factor: sqrt(48 / 12) sqrt(12 / (48 64)), with
    # the singular values of seven steps close to one.
    rms = np.sqrt(np.mean(np.square(first['a']))) / math.sqrt(64 / 48)
    self.assertBetween(rms, 0.9 / 8, 1.05 / 8)
    # Equal leaves draw their own sketches, which repeat.
    self.assertFalse(np.allclose(first['a'], first['b']))
    for a, b in zip(ours, run(zero, w)[0], strict=True):
      jax.tree.map(np.testing.assert_array_equal, a, b)
    self.assertFalse(np.allclose(first['a'], run(one, w, 1)[0][0]['a']))

  def test_momentum_of_8_bits(self):
    self.check_momentum('e4m3', 2e-2)

  @pytest.mark.slow
  def test_momentum_of_8_bits_of_integers(self):
    self.check_momentum('lin8', 2e-3)

  def check_momentum(self, codec, loss):
    w = {'w': gradients(9, jnp.zeros((64, 96)))}
    low = optimizers.muon(0.02, momentum=codec, min_size=0)
    full = optimizers.muon(0.02)
    ours, state = run(low, w, 6)
    theirs, _ = run(full, w, 6)
    mu = state.inner_states['muon'].inner_state[0].mu['w']
    self.assertIsInstance(mu, lowbit_jax.QArray)
    self.assertLess(mu.bits_per_element, 8.5)
    a, b = ours[-1]['w'], theirs[-1]['w']
    cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    self.assertGreater(cosine, 1 - loss)
    self.assertLess(cosine, 1 - 1e-7)

  def test_errors(self):
    muon = optimizers.muon
    for make, message in (
      (lambda: muon(1.0, polar='svd'), "polar='svd'.*newton_schulz"),
      (lambda: muon(1.0, shape_scale='x'), "shape_scale='x'.*mup"),
      (lambda: muon(1.0, beta=1.0), 'beta=1.0'),
      (lambda: muon(1.0, rank=0), 'rank=0'),
      (lambda: muon(1.0, momentum='int8'), "momentum='int8'"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        make()
    tx = optimizers.scale_by_muon()
    w = {'bias': np.ones(3, np.float32)}
    with self.assertRaisesRegex(ValueError, 'bias of shape.*other='):
      jax.eval_shape(lambda w: tx.update(w, tx.init(w)), w)
    tx = muon(1.0, dimensions=lambda p, x: MuonDimensionNumbers(0, -2))
    w = {'w': np.ones((3, 3), np.float32)}
    with self.assertRaisesRegex(ValueError, 'twice'):
      jax.eval_shape(lambda w: tx.update(w, tx.init(w), w), w)


class MuPTest(parameterized.TestCase):
  @parameterized.parameters((64, 256), (256, 64))
  def test_initial_norm(self, d_in, d_out):
    self.check_initial_norm(d_in, d_out)

  @pytest.mark.slow
  def test_initial_norm_of_squares(self):
    self.check_initial_norm(128, 128)

  def check_initial_norm(self, d_in, d_out):
    w = mup_normal(jax.random.key(0), (d_in, d_out))
    # The norm of a Gaussian matrix is within a few n^(-2/3) of its limit.
    self.assertAlmostEqual(norm2(w) / math.sqrt(d_out / d_in), 1, delta=0.1)

  def test_bound_of_the_norm(self):
    self.check_bound(0.1)

  @pytest.mark.slow
  def test_bound_of_the_norm_without_decay(self):
    self.check_bound(0.0)

  def check_bound(self, decay):
    shape, lr, steps = (32, 128), 0.05, 60
    unit = math.sqrt(shape[1] / shape[0])
    w = {'w': mup_normal(jax.random.key(1), shape)}
    tx = optimizers.muon(lr, decay, shape_scale='mup')
    state = jax.jit(tx.init)(w)
    bound = norm2(w['w'])
    update = jax.jit(tx.update)
    # Gradients of one direction, for which the bound is nearly met.
    g = gradients(3, w)
    for _ in range(steps):
      updates, state = update(g, state, w)
      step = np.asarray(updates['w']) + lr * decay * np.asarray(w['w'])
      bound = (1 - lr * decay) * bound + norm2(step)
      self.assertLessEqual(norm2(step), lr * unit * 1.21)
      w = jax.tree.map(np.add, w, updates)
    norm = norm2(w['w'])
    self.assertLessEqual(norm, bound * (1 + 1e-5))
    self.assertGreater(norm, 0.3 * bound)
    if decay:
      self.assertLessEqual(norm, unit * max(1.21 / decay, 1.2))

  @pytest.mark.slow
  def test_same_rate_for_all_widths(self):
    """Hidden activations and norms do not grow with the width for 'mup'."""
    small, large = (trained_norm(width, 'mup') for width in (32, 128))
    self.assertLess(large, 3.5)
    self.assertLess(large, 1.5 * small)

  @pytest.mark.slow
  def test_another_scale_has_another_rate_for_each_width(self):
    small, large = (trained_norm(width, 'rms') for width in (32, 128))
    self.assertGreater(large, 1.5 * small)

  def test_head_scale(self):
    tx = optimizers.mup_head_scale(4)
    w = params()
    u, _ = jax.jit(lambda w: tx.update(w, tx.init(w), w))(w)
    np.testing.assert_array_equal(
      u['lm_head']['kernel'], w['lm_head']['kernel'] * 0.5
    )
    np.testing.assert_array_equal(u['embed']['table'], w['embed']['table'])
    np.testing.assert_array_equal(u['down']['kernel'], w['down']['kernel'])
    empty = {'head': jnp.zeros((0, 4))}
    self.assertEqual(tx.update(empty, tx.init(empty), empty)[0], empty)
    with self.assertRaisesRegex(ValueError, 'base_width=0'):
      optimizers.mup_head_scale(0)

  def test_activation_cap(self):
    random = np.random.RandomState(0)
    x = random.randn(50, 16).astype(np.float32)
    update = random.randn(16, 64).astype(np.float32)

    def rms(x):
      return np.sqrt(np.mean(np.square(x)))

    capped = activation_cap(update, x, 0.1)
    self.assertAlmostEqual(rms(x @ capped) / rms(x), 0.1 * 2, delta=1e-5)
    same = activation_cap(update, x, 100.0)
    np.testing.assert_array_equal(same, update)
    zero = activation_cap(update * 0, x, 0.1)
    np.testing.assert_array_equal(zero, 0)
    with self.assertRaisesRegex(ValueError, 'x.shape'):
      optimizers.activation_cap(update, x.T, 0.1)


@functools.cache
def initial(sizes: tuple[int, ...]):
  @jax.jit
  def make(key):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
      f'layer_{i}': optimizers.mup_normal()(key, sizes[i : i + 2])
      for i, key in enumerate(keys)
    }

  return make(jax.random.key(0))


def trained_norm(width: int, shape_scale: str) -> float:
  """Largest ||W||_2 / sqrt(d_out / d_in) of a small MLP after training."""
  random = np.random.RandomState(0)
  teacher = random.randn(32, 8) / math.sqrt(32)
  x = random.randn(60, 64, 32)
  target = np.tanh(x @ teacher)
  tx = optimizers.muon(0.05, beta=0.9, shape_scale=shape_scale)

  def loss(w, x, target):
    y = x
    for i in range(len(w)):
      y = y @ w[f'layer_{i}']
      y = jax.nn.relu(y) if i < len(w) - 1 else y
    return jnp.mean(jnp.square(y - target))

  @jax.jit
  def train(w, *batches):
    def step(carry, batch):
      w, state = carry
      updates, state = tx.update(jax.grad(loss)(w, *batch), state, w)
      return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, tx.init(w)), batches)[0][0]

  w = initial((32, width, width // 4, width, 8))
  w = train(w, x.astype(np.float32), target.astype(np.float32))
  return max(norm2(x) / math.sqrt(x.shape[1] / x.shape[0]) for x in w.values())


if __name__ == '__main__':
  absltest.main()
