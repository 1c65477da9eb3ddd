"""Small training tasks that need no download, as pure functions.

A task sees its linear layers only through an argument `linear(x, w)`, so that
one definition trains in float32 and in any recipe. Everything random is a
function of a seed: runs of one seed share initial weights and batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import byte_lm
from support import data

Linear = Callable[[jax.Array, jax.Array], jax.Array]

_WIDTH = 128
_FEATURES = 64


@dataclasses.dataclass(frozen=True)
class Task:
  """A model, its data and how long it trains.

  Attributes:
    name: of the task.
    measure: what the loss is.
    init: seed -> parameters.
    batches: (seed, steps) -> arrays with a leading axis of steps.
    held_out: () -> one batch to measure the loss on.
    loss: (params, batch, linear) -> scalar.
    steps: training steps.
    learning_rate: peak of a cosine schedule.
  """

  name: str
  measure: str
  init: Callable[[int], Any]
  batches: Callable[[int, int], Any]
  held_out: Callable[[], Any]
  loss: Callable[[Any, Any, Linear], jax.Array]
  steps: int
  learning_rate: float


def _init_mlp(inputs: int, outputs: int, seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng([seed, 0])

  def kernel(n, m):
    return (rng.standard_normal((n, m)) * np.sqrt(2 / n)).astype(np.float32)

  return {
    'first': kernel(inputs, _WIDTH),
    'hidden': kernel(_WIDTH, _WIDTH),
    'head': 0.5 * kernel(_WIDTH, outputs),
    'bias': np.zeros((2, _WIDTH), np.float32),
  }


def _mlp(params, x, linear: Linear):
  """Two quantizable layers and a head in float32."""
  x = jax.nn.gelu(linear(x, params['first']) + params['bias'][0])
  x = jax.nn.gelu(linear(x, params['hidden']) + params['bias'][1])
  return x @ params['head']


def regression() -> Task:
  """A smooth random function of 64 Gaussian inputs, with noise."""
  rng = np.random.default_rng(0)
  inner = rng.standard_normal((_FEATURES, 32)) / np.sqrt(_FEATURES)
  outer = rng.standard_normal((32, 1)) / np.sqrt(32)

  def sample(rng, *shape):
    x = rng.standard_normal((*shape, _FEATURES))
    noise = 0.1 * rng.standard_normal((*shape, 1))
    y = np.sin(2 * x @ inner) @ outer + noise
    return x.astype(np.float32), y.astype(np.float32)

  def loss(params, batch, linear):
    x, y = batch
    return jnp.mean(jnp.square(_mlp(params, x, linear) - y))

  return Task(
    'regression',
    'mean squared error',
    functools.partial(_init_mlp, _FEATURES, 1),
    lambda seed, steps: sample(np.random.default_rng([seed, 1]), steps, 128),
    lambda: sample(np.random.default_rng(1), 2048),
    loss,
    600,
    3e-3,
  )


def digits() -> Task:
  """Classification of the 8x8 digits of scikit-learn.

  Raises:
    ImportError: where scikit-learn is not installed, with the remedy.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError(
      'the task "digits" takes its images from scikit-learn: install it, or '
      'leave the task out of --tasks.'
    ) from error
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 8 - 1).astype(np.float32)
  labels = labels.astype(np.int32)
  kept = np.arange(len(labels)) % 5 != 0
  train_x, train_y = images[kept], labels[kept]

  def batches(seed, steps):
    rng = np.random.default_rng([seed, 1])
    index = rng.integers(0, len(train_y), (steps, 128))
    return train_x[index], train_y[index]

  def loss(params, batch, linear):
    x, y = batch
    logits = _mlp(params, x, linear)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return Task(
    'digits',
    'cross-entropy, nats',
    functools.partial(_init_mlp, _FEATURES, 10),
    batches,
    lambda: (images[~kept], labels[~kept]),
    loss,
    300,
    1e-3,
  )


def diffusion() -> Task:
  """Denoising of points on a two-armed spiral in the plane.

  With x_t = cos(pi t / 2) x_0 + sin(pi t / 2) e the model predicts the noise e
  from random Fourier features of (x_t, t).
  """
  frequencies = np.random.default_rng(2).standard_normal((3, _FEATURES // 2))
  frequencies = (2.0 * frequencies).astype(np.float32)

  def sample(rng, *shape):
    angle = rng.uniform(1, 3 * np.pi, shape)
    arm = rng.choice([-1.0, 1.0], shape)
    spiral = angle * np.stack([np.cos(angle), np.sin(angle)])
    x0 = np.moveaxis(arm * spiral, 0, -1) / 5
    t = rng.uniform(0.02, 0.98, (*shape, 1))
    e = rng.standard_normal(x0.shape)
    x_t = np.cos(np.pi * t / 2) * x0 + np.sin(np.pi * t / 2) * e
    return np.concatenate([x_t, t], -1).astype(np.float32), e.astype(np.float32)

  def loss(params, batch, linear):
    x, e = batch
    phase = x @ frequencies
    features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)
    return jnp.mean(jnp.square(_mlp(params, features, linear) - e))

  return Task(
    'diffusion',
    'mean squared error of the noise',
    functools.partial(_init_mlp, _FEATURES, 2),
    lambda seed, steps: sample(np.random.default_rng([seed, 1]), steps, 256),
    lambda: sample(np.random.default_rng(3), 4096),
    loss,
    600,
    3e-3,
  )


def lm() -> Task:
  """The byte-level language model, two blocks of width 64."""
  corpus = data.load_corpus()
  config = byte_lm.Config(width=64, heads=2, blocks=2, context=64, batch=16)

  def batches(seed, steps):
    seeded = dataclasses.replace(config, seed=seed)
    return np.stack(
      [data.train_batch(corpus, seeded, step) for step in range(steps)]
    )

  def loss(params, windows, linear):
    def dot_general(lhs, rhs, dimensions, precision=None, **kwargs):
      del (
        dimensions,
        precision,
        kwargs,
      )  # a Dense layer contracts (..., K), (K, N)
      return linear(lhs, rhs)

    model = byte_lm.ByteLM(config, dot_general=dot_general)
    logits = model.apply({'params': params}, windows[:, :-1])
    return byte_lm.cross_entropy(logits, windows[:, 1:])

  return Task(
    'lm',
    'nats per byte',
    lambda seed: byte_lm.init(dataclasses.replace(config, seed=seed)),
    batches,
    lambda: data.held_out_windows(corpus, config.context, 128),
    loss,
    200,
    4e-3,
  )


TASKS = {
  'regression': regression,
  'digits': digits,
  'diffusion': diffusion,
  'lm': lm,
}
