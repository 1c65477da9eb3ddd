"""A byte-level transformer on the Python standard library: data, model, step.

The examples share this module. It needs no download: the corpus is the source
text of the standard library of the running interpreter. The model is made of
stock Flax Linen layers; `dot_general` and `promote_dtype` are passed to its
linear layers unchanged, which is all that quantized weights need.

A batch is a pure function of (seed, step), so a resumed run sees the same data
as an uninterrupted one.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import linen as nn
from flax.linen.dtypes import promote_dtype as linen_promote_dtype

VOCABULARY = 256
QUANTIZED = r'(qkv|out|up|down)/kernel$'  # paths of the weights to quantize


class ConfigError(ValueError):
  """A configuration that makes no model; the message says which value."""


class Corpus(NamedTuple):
  """Training and held-out bytes (uint8 vectors) and what identifies them."""

  train: np.ndarray
  held_out: np.ndarray
  files: int
  digest: str


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
    if self.width % (2 * self.heads):
      raise ConfigError(
        f'width={self.width} must be a multiple of 2 * heads '
        f'(heads={self.heads}): rotary embedding pairs the channels.'
      )


class TrainState(NamedTuple):
  """Parameters, optimizer state and the number of steps done (int32)."""

  params: Any
  optimizer: Any
  step: jax.Array


def load_corpus() -> Corpus:
  """Reads the `.py` files of the running interpreter's standard library.

  Files are sorted by path; each 20th (index % 20 == 7) is held out.

  Returns:
    The corpus; its digest covers both parts.

  Raises:
    FileNotFoundError: if the interpreter ships too little source text.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'site-packages', 'dist-packages'}
  paths = sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob('*.py')
    if skipped.isdisjoint(path.relative_to(root).parts) and path.is_file()
  )
  parts = {False: [], True: []}
  for index, path in enumerate(paths):
    parts[index % 20 == 7].append((root / path).read_bytes())
  train, held_out = b''.join(parts[False]), b''.join(parts[True])
  if min(len(train), len(held_out)) < 1 << 16:
    raise FileNotFoundError(
      f'Only {len(paths)} source files of the standard library were found; '
      'run with a Python that ships its library as .py files.'
    )
  digest = hashlib.sha256(
    hashlib.sha256(train).digest() + hashlib.sha256(held_out).digest()
  ).hexdigest()[:16]
  return Corpus(
    np.frombuffer(train, np.uint8),
    np.frombuffer(held_out, np.uint8),
    len(paths),
    digest,
  )


def _windows(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
  return data[starts[:, None] + np.arange(length)].astype(np.int32)


def train_batch(corpus: Corpus, config: Config, step: int) -> np.ndarray:
  """Returns the int32 (batch, context + 1) windows of a step."""
  rng = np.random.Generator(np.random.Philox(key=[config.seed, step]))
  last = len(corpus.train) - config.context - 1
  starts = rng.integers(0, last, config.batch, endpoint=True)
  return _windows(corpus.train, starts, config.context + 1)


def held_out_windows(corpus: Corpus, context: int, count: int) -> np.ndarray:
  """Returns int32 (count, context + 1) windows spread evenly over the text."""
  last = len(corpus.held_out) - context - 1
  starts = np.linspace(0, last, count).astype(np.int64)
  return _windows(corpus.held_out, starts, context + 1)


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


def optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW with warm-up, cosine decay to 10 %, and clipping at norm 1."""
  warmup = config.steps // 8
  schedule = optax.warmup_cosine_decay_schedule(
    0.0 if warmup else config.learning_rate,
    config.learning_rate,
    warmup,
    config.steps,
    0.1 * config.learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule,
      b2=0.95,
      weight_decay=0.1,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
  )


def init(config: Config) -> TrainState:
  """Returns the state before the first step."""
  tokens = jnp.zeros((1, config.context), jnp.int32)
  key = jax.random.key(config.seed)
  params = jax.jit(ByteLM(config).init)(key, tokens)['params']
  return TrainState(
    params, optimizer(config).init(params), jnp.zeros((), jnp.int32)
  )


@functools.cache
def make_train_step(
  config: Config,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]:
  """Returns the jitted `(state, windows) -> (state, loss)` of one step."""
  model, transform = ByteLM(config), optimizer(config)

  def loss_fn(params, windows):
    logits = model.apply({'params': params}, windows[:, :-1])
    return cross_entropy(logits, windows[:, 1:])

  @jax.jit
  def train_step(state, windows):
    loss, gradients = jax.value_and_grad(loss_fn)(state.params, windows)
    updates, optimizer_state = transform.update(
      gradients, state.optimizer, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state, state.step + 1), loss

  return train_step


def progress_interval() -> float:
  """Seconds between updates of progress bars: few lines in log files."""
  return 0.2 if sys.stderr.isatty() else 15.0


def train(
  config: Config,
  corpus: Corpus,
  checkpoints: Any,
  save_every: int,
) -> Any:
  """Trains from the newest checkpoint on, with a progress bar.

  Args:
    config: of the model and its training.
    corpus: whose training part is read.
    checkpoints: a `Checkpoints`.
    save_every: steps between checkpoints; the last step is always saved.

  Returns:
    The trained parameters.

  Raises:
    CheckpointError: if the newest checkpoint is damaged.
  """
  start, state = checkpoints.restore(jax.eval_shape(lambda: init(config)))
  if state is None:
    state = init(config)
  else:
    done = 'reused' if start == config.steps else 'resumed'
    print(f'training: step {start} of {config.steps} {done}')
  train_step = make_train_step(config)
  with tqdm.tqdm(
    total=config.steps,
    initial=start,
    desc='training',
    unit='step',
    mininterval=progress_interval(),
    disable=start == config.steps,
  ) as bar:
    for step in range(start, config.steps):
      windows = train_batch(corpus, config, step)
      state, loss = train_step(state, windows)
      bar.set_postfix(loss=f'{float(loss):.3f}', refresh=False)
      bar.update()
      if (step + 1) % save_every == 0 or step + 1 == config.steps:
        checkpoints.save(step + 1, state)
  return state.params


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


def quantized_kernels(params: Mapping[str, Any]) -> list[Any]:
  """Returns the kernels that QUANTIZED matches."""
  return [
    params[block][layer]['kernel']
    for block in sorted(params)
    if block.startswith('block_')
    for layer in ('qkv', 'out', 'up', 'down')
  ]


def identity(config: Config, corpus: Corpus) -> dict[str, Any]:
  """Returns what decides the trained weights, as JSON values."""
  state = jax.eval_shape(lambda: init(config))
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  shapes = [f'{jax.tree_util.keystr(path)} {leaf}' for path, leaf in leaves]
  digest = hashlib.sha256('\n'.join(shapes).encode()).hexdigest()[:16]
  return dataclasses.asdict(config) | {
    'corpus': corpus.digest,
    'parameters': digest,
  }
