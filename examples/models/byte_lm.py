"""A byte-level transformer of stock Flax Linen layers.

`dot_general` and `promote_dtype` are passed to its linear layers unchanged,
which is all that quantized weights need.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype as linen_promote_dtype

VOCABULARY = 256
LINEAR_LAYERS = ('qkv', 'out', 'up', 'down')  # of each block


class ConfigError(ValueError):
  """A configuration that makes no model; the message says which value."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides the trained weights.

  Attributes:
    width: model width.
    heads: attention heads; must divide width into even head sizes.
    blocks: transformer blocks.
    context: bytes per window.
    batch: windows per step.
    steps: training steps (also the length of the learning-rate schedule).
    learning_rate: peak of the schedule.
    seed: seed of initial weights and data order.
  """

  width: int = 128
  heads: int = 4
  blocks: int = 6
  context: int = 128
  batch: int = 16
  steps: int = 320
  learning_rate: float = 2e-3
  seed: int = 0

  def __post_init__(self):
    for name in ('width', 'heads', 'blocks', 'context', 'batch', 'steps'):
      if getattr(self, name) < 1:
        raise ConfigError(
          f'{name} must be at least 1, got {getattr(self, name)}.'
        )
    if not 0 <= self.seed < 1 << 63:
      raise ConfigError(f'seed={self.seed} must be from 0 to 2^63 - 1.')
    if self.width % (2 * self.heads):
      raise ConfigError(
        f'width={self.width} must be a multiple of 2 * heads '
        f'(heads={self.heads}): rotary embedding pairs the channels.'
      )


def _rotate(x: jax.Array) -> jax.Array:
  """Applies rotary position embedding to (batch, time, heads, channels)."""
  half = x.shape[-1] // 2
  frequencies = 10000.0 ** (-jnp.arange(half) / half)
  angles = jnp.arange(x.shape[1])[:, None] * frequencies
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate(
    [first * cos - second * sin, first * sin + second * cos], axis=-1
  )


class Block(nn.Module):
  """A pre-norm attention and MLP block; fields as in `ByteLM`."""

  config: Config
  dot_general: Callable[..., jax.Array] | None = None
  promote_dtype: Callable[..., Any] = linen_promote_dtype
  dot_general_cls: Callable[[], Any] | None = None
  activations: jax.sharding.Sharding | None = None
  attention: Callable[..., jax.Array] = jax.nn.dot_product_attention

  def _placed(self, x: jax.Array) -> jax.Array:
    if self.activations is None:
      return x
    return jax.lax.with_sharding_constraint(x, self.activations)

  def _dense(self, features: int, name: str, variance: float = 1.0):
    return nn.Dense(
      features,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(
        variance, 'fan_in', 'normal'
      ),
      dot_general=self.dot_general,
      dot_general_cls=self.dot_general_cls,
      promote_dtype=self.promote_dtype,
      name=name,
    )

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, time, width) to the same shape."""
    width, heads = self.config.width, self.config.heads
    small = 0.5 / self.config.blocks
    x = self._placed(x)
    qkv = self._dense(3 * width, 'qkv')(nn.RMSNorm(name='attention_norm')(x))
    q, k, v = jnp.split(
      qkv.reshape(*x.shape[:2], 3 * heads, width // heads), 3, axis=2
    )
    mixed = self.attention(_rotate(q), _rotate(k), v, is_causal=True)
    x += self._dense(width, 'out', small)(mixed.reshape(x.shape))
    x = self._placed(x)
    up = self._dense(4 * width, 'up')(nn.RMSNorm(name='mlp_norm')(x))
    return self._placed(x + self._dense(width, 'down', small)(nn.gelu(up)))


class _Repeated(Block):
  """A block as the body of a scan."""

  def __call__(self, x: jax.Array, _) -> tuple[jax.Array, None]:
    return super().__call__(x), None


class ByteLM(nn.Module):
  """Pre-norm transformer: RMSNorm, rotary attention, GELU MLP, untied head.

  Attributes:
    config: sizes.
    dot_general: passed to the Dense layers of the blocks; None is Linen's own.
    promote_dtype: likewise; also `dot_general_cls`.
    activations: where (batch, time, width) lies between the layers, so that a
      partitioner gathers weights and not batches; None to leave it open.
    attention: mixes values, in place of `jax.nn.dot_product_attention`.
    scan: one stacked block instead of several, which compiles once.
    recompute: with `scan`, whether the backward pass recomputes activations,
      which large models need and small ones wait for.
  """

  config: Config
  dot_general: Callable[..., jax.Array] | None = None
  promote_dtype: Callable[..., Any] = linen_promote_dtype
  dot_general_cls: Callable[[], Any] | None = None
  activations: jax.sharding.Sharding | None = None
  attention: Callable[..., jax.Array] = jax.nn.dot_product_attention
  scan: bool = False
  recompute: bool = True

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps int32 (batch, time) bytes to float32 (batch, time, 256) logits."""
    x = nn.Embed(VOCABULARY, self.config.width, name='embed')(tokens)
    fields = (
      self.config,
      self.dot_general,
      self.promote_dtype,
      self.dot_general_cls,
      self.activations,
      self.attention,
    )
    if self.scan:
      body = _Repeated
      if self.recompute:
        body = nn.remat(body, prevent_cse=False)
      repeated = nn.scan(
        body,
        variable_axes={'params': 0, 'lowbit': 0, 'watched': 0},
        split_rngs={'params': True, 'quant': True},
        in_axes=nn.broadcast,
        length=self.config.blocks,
      )
      x, _ = repeated(*fields, name='blocks')(x, None)
    else:
      for index in range(self.config.blocks):
        x = Block(*fields, name=f'block_{index}')(x)
    head = nn.Dense(
      VOCABULARY,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(1.0, 'fan_in', 'normal'),
      name='head',
    )
    return head(nn.RMSNorm(name='norm')(x))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean negative log-likelihood in nats per byte."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def init(config: Config) -> Any:
  """Returns the parameters before the first step."""
  tokens = jnp.zeros((1, config.context), jnp.int32)
  key = jax.random.key(config.seed)
  return jax.jit(ByteLM(config).init)(key, tokens)['params']


def make_loss(model: ByteLM) -> Any:
  """Returns the jitted map of (params, windows) to one loss per window."""

  @jax.jit
  def loss(params, windows):
    logits = model.apply({'params': params}, windows[:, :-1])
    return jax.vmap(cross_entropy)(logits, windows[:, 1:])

  return loss


def sample(
  model: ByteLM,
  params: Any,
  prompt: bytes,
  count: int,
  temperature: float,
  seed: int,
) -> bytes:
  """Returns `count` bytes that the model writes after a prompt."""
  context = model.config.context
  window = np.frombuffer(prompt.rjust(context, b'\n')[-context:], np.uint8)

  @jax.jit
  def write(params, window, keys):
    def step(window, key):
      logits: Any = model.apply({'params': params}, window[None])
      byte = jax.random.categorical(key, logits[0, -1] / temperature)
      return jnp.roll(window, -1).at[-1].set(byte), byte

    return jax.lax.scan(step, window, keys)[1]

  keys = jax.random.split(jax.random.key(seed), count)
  return bytes(
    np.asarray(write(params, window.astype(np.int32), keys), np.uint8)
  )


def linear_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the kernels of the LINEAR_LAYERS of blocks that are not stacked."""
  return {
    f'{block}/{layer}': params[block][layer]['kernel']
    for block in sorted(params)
    if block.startswith('block_')
    for layer in LINEAR_LAYERS
  }
