"""Models as they are, on packed weights: nothing in them knows of `packed`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from flax import linen, nnx
from jax import lax

import lowbit_jax as lowbit
from lowbit_jax import formats
from models import bert, bert_config, byte_lm, llama, llama_config, rotary
from tests.walk.zoo import Model, ModelTest, dense, random_like

WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY = 128, 256, 4, 4, 96
TOKENS = np.arange(10).reshape(2, 5) * 9


def normal(*shape, seed: int = 0) -> np.ndarray:
  random = np.random.RandomState(seed + sum(shape))
  x = random.standard_normal(shape).astype(np.float32)
  return x / shape[-2] ** 0.5


class Block(linen.Module):
  @linen.compact
  def __call__(self, x, _):
    y = linen.LayerNorm()(x)
    x += linen.MultiHeadDotProductAttention(HEADS, name='attention')(y, y)
    y = linen.Dense(HIDDEN, name='up')(linen.LayerNorm()(x))
    return x + linen.Dense(WIDTH, name='down')(linen.gelu(y)), None


class Transformer(linen.Module):
  @linen.compact
  def __call__(self, tokens):
    embed = linen.Embed(VOCABULARY, WIDTH, name='embed')
    blocks = linen.scan(
      linen.remat(Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=LAYERS,
    )
    x, _ = blocks(name='blocks')(embed(tokens), None)
    return embed.attend(x)


class Mixer(nnx.Module):
  """Parameters that no linear layer owns, and one layer."""

  def __init__(self, rngs):
    self.query = nnx.Param(normal(WIDTH, HEADS, 32))
    self.out = nnx.Param(normal(HEADS, 32, WIDTH) / 11)
    self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
    self.down = nnx.Param(normal(HIDDEN, WIDTH))

  def __call__(self, x):
    y = jnp.einsum('btd,dhk->bthk', x, self.query[...])
    x += jnp.einsum('bthk,hkd->btd', jnp.tanh(y), self.out[...])
    return x + jax.nn.gelu(self.up(x)) @ self.down[...]


def linen_model(module, tokens, weights, **options) -> Model:
  """A Linen model as a function of its params."""
  fn = lambda params, tokens: module.apply({'params': params}, tokens)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)['params']
  return Model(fn, random_like(shapes), (tokens,), weights, **options)


def nnx_model(make, args, weights, method='__call__', **options) -> Model:
  """A method of an NNX model as a function of its state."""
  graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  fn = lambda state, *args: getattr(nnx.merge(graph, state), method)(*args)
  return Model(fn, random_like(state), args, weights, **options)


MIXER = {'query': -3, 'out': -2, 'up/kernel': -2, 'down': -2}
ATTENTION = {'(query|key|value)/kernel': -3, 'out/kernel': -2}
LINEARS = {'(up|down)/kernel': -2}
PROJECTIONS = {r'(query|key|value|out|gate|up|down)/kernel': -2}


class LinenTest(ModelTest):
  def transformer(self) -> Model:
    weights = {'embedding': -1, **ATTENTION, **LINEARS}
    return linen_model(Transformer(), TOKENS, weights)

  def test_scanned_transformer_with_a_tied_table(self):
    self.check(self.transformer())

  @pytest.mark.slow
  def test_scanned_transformer_by_a_policy(self):
    self.check_policy(self.transformer())

  def byte_lm(self, width=WIDTH, **options) -> Model:
    config = byte_lm.Config(width, HEADS, LAYERS, 8, 2)
    weights = {'(qkv|out|up|down)/kernel': -2, 'head': -2, 'embedding': -1}
    module = byte_lm.ByteLM(config, **options)
    return linen_model(module, TOKENS, weights, alone='embedding', terms=512)

  def test_byte_lm(self):
    self.check(self.byte_lm(scan=True))

  @pytest.mark.slow
  def test_byte_lm_in_single_blocks(self):
    self.check(self.byte_lm(width=256))
    self.check_policy(self.byte_lm(width=256))


class NnxTest(ModelTest):
  def setUp(self):
    super().setUp()
    self.x = normal(2, 3, WIDTH) * 2
    self.model = nnx_model(Mixer, (self.x,), MIXER)

  def test_split_and_merged(self):
    self.check(self.model)
    self.check_policy(self.model)

  def test_as_argument_and_closed_over(self):
    graph, _ = nnx.split(nnx.eval_shape(lambda: Mixer(nnx.Rngs(0))))
    q = self.model.stored()
    module = nnx.merge(graph, q)
    call = lambda module, x: module(x)
    want, bound = self.expected(self.model, dense(q))
    got = jax.jit(lowbit.packed(call))(module, self.x)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    report = lowbit.packed(call, strict=True).report(module, self.x)
    self.assertLen(report, 4)
    closed = lowbit.packed(lambda x: nnx.merge(graph, q)(x))
    self.assertLen({row.site for row in closed.report(self.x)}, 4)
    self.assertEqual(closed.report(self.x).decoded, 0)
    np.testing.assert_array_equal(jax.jit(closed)(self.x), got)


class ExampleTest(ModelTest):
  """The NNX models of the examples, with toy sizes."""

  def llama(self, weights, fmt=formats.mxfp4, **options) -> Model:
    sizes = {'vocabulary': 96, 'width': WIDTH, 'hidden': HIDDEN, 'heads': 4}
    sizes |= {'blocks': LAYERS, 'kv_heads': 2, 'head_size': 32, 'context': 16}
    config = llama_config.Config(rope=rotary.Rope(1e4, 32), **(sizes | options))
    make = lambda rngs: llama.Llama(config, rngs=rngs)
    return nnx_model(make, (TOKENS,), weights, fmt=fmt, terms=512)

  @pytest.mark.slow
  def test_llama_with_weights_as_of_gguf_files(self):
    weights = {
      '(query|key|out|gate|up)/kernel': -2,
      '(value|down)/kernel': -2,
      'embedding': -1,
    }
    fmt = dict(
      zip(weights, map(formats.get, ('q4_k', 'q6_k', 'q6_k')), strict=True)
    )
    sizes = {'width': 256, 'head_size': 64, 'blocks': 16, 'tied': True}
    self.check(self.llama(weights, fmt, **sizes))

  @pytest.mark.slow
  def test_mixture_of_experts(self):
    sizes = {'experts': 4, 'chosen': 2, 'blocks': 2, 'hidden': WIDTH}
    model = self.llama(PROJECTIONS | {'head/kernel': -2}, **sizes)
    self.check(model)
    self.check_policy(model)

  @pytest.mark.slow
  def test_bert(self):
    config = bert_config.Config(96, WIDTH, HIDDEN, LAYERS, HEADS, 16)
    weights = PROJECTIONS | {'embed/embedding': -1}
    make = lambda rngs: bert.Bert(config, rngs=rngs)
    options = {'method': 'embeddings', 'alone': 'embedding'}
    model = nnx_model(make, (TOKENS,), weights, **options)
    self.check(model)
    self.check_policy(model)


def routed(params, x):
  """The rows of each expert beside each other."""
  expert = jnp.argmax(x @ params['router'], axis=-1)
  order = jnp.argsort(expert)
  sizes = jnp.bincount(expert, length=params['up'].shape[0])
  y = jax.nn.gelu(lax.ragged_dot(x[order], params['up'], sizes))
  y = lax.ragged_dot(y, params['down'], sizes)
  return x + jnp.zeros_like(x).at[order].set(y)


def mixed(params, x):
  """Every expert sees every row."""
  share = jax.nn.softmax(x @ params['router'])
  y = jax.nn.gelu(jnp.einsum('td,edf->etf', x, params['up']))
  return x + jnp.einsum('etf,efd,te->td', y, params['down'], share)


def attention(query, key, value):
  scores = jnp.einsum('td,sd->ts', query, key) / WIDTH**0.5
  return jax.nn.softmax(scores) @ value


def split_after(params, x):
  query, key, value = jnp.split(x @ params['qkv'], 3, axis=-1)
  return attention(query, key, value) @ params['out']


def split_before(params, x):
  parts = jnp.split(params['qkv'], 3, axis=-1)
  return attention(*(x @ w for w in parts)) @ params['out']


def decode(params, tokens):
  """Logits of the tokens chosen one after another, with a cache."""
  steps, batch = 8, tokens.shape[0]

  def layer(i, state):
    x, keys, values, t = state
    query, key, value = jnp.split(x @ params['qkv'][i], 3, axis=-1)
    at = i, 0, t, 0
    keys = lax.dynamic_update_slice(keys, key[None, :, None], at)
    values = lax.dynamic_update_slice(values, value[None, :, None], at)
    scores = jnp.einsum('bd,btd->bt', query, keys[i]) / WIDTH**0.5
    weights = jax.nn.softmax(jnp.where(jnp.arange(steps) <= t, scores, -1e9))
    mixed = jnp.einsum('bt,btd->bd', weights, values[i])
    return x + mixed @ params['out'][i], keys, values, t

  def step(state):
    t, tokens, keys, values, seen = state
    x = jnp.take(params['table'], tokens, axis=0)
    x, keys, values, _ = lax.fori_loop(0, LAYERS, layer, (x, keys, values, t))
    logits = x @ params['table'].T
    seen = seen.at[t].set(logits)
    return t + 1, jnp.argmax(logits, -1), keys, values, seen

  cache = jnp.zeros((LAYERS, batch, steps, WIDTH))
  seen = jnp.zeros((steps, batch, VOCABULARY))
  start = 0, tokens, cache, cache, seen
  return lax.while_loop(lambda state: state[0] < steps, step, start)[-1]


class PlainTest(ModelTest):
  """Functions of arrays and dicts."""

  def experts(self, fn) -> Model:
    params = {
      'router': normal(HIDDEN, 4),
      'up': normal(4, HIDDEN, HIDDEN),
      'down': normal(4, HIDDEN, HIDDEN),
    }
    weights = {'up': -2, 'down': -2}
    return Model(fn, params, (normal(6, HIDDEN) * 2,), weights)

  def test_experts_by_ragged_dot(self):
    self.check(self.experts(routed))
    self.check_policy(self.experts(routed))

  def test_experts_by_einsum(self):
    self.check(self.experts(mixed))

  def fused(self, fn) -> Model:
    params = {'qkv': normal(WIDTH, 3 * WIDTH), 'out': normal(WIDTH, WIDTH)}
    return Model(fn, params, (normal(6, WIDTH),), {'qkv': -2, 'out': -2})

  def test_fused_weights_split_after_the_product(self):
    self.check(self.fused(split_after))

  def test_fused_weights_split_before_the_product(self):
    self.check(self.fused(split_before))
    self.check_policy(self.fused(split_before))

  def test_decoding_with_a_cache_in_a_while_loop(self):
    params = {
      'qkv': normal(LAYERS, WIDTH, 3 * WIDTH),
      'out': normal(LAYERS, WIDTH, WIDTH),
      'table': normal(VOCABULARY, WIDTH) * 4,
    }
    weights = {'qkv': -2, 'out': -2, 'table': -1}
    self.check(Model(decode, params, (np.array([1, 2]),), weights))

  def test_a_transform_of_the_weight_is_decoded(self):
    def normed(params, x):
      w = params['up'] / jnp.linalg.norm(params['up'], axis=0)
      return jax.nn.relu(x @ w) @ params['down']

    params = {'up': normal(WIDTH, HIDDEN), 'down': normal(HIDDEN, WIDTH)}
    weights = {'up': -2, 'down': -2}
    decoded = {'up': 'has no packed form'}
    x = normal(6, WIDTH)
    self.check(
      Model(normed, params, (x,), weights, decoded=decoded, alone='up')
    )


if __name__ == '__main__':
  absltest.main()
