"""A linear layer with outliers, as those of language models have them."""

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import formats, ptq
from lowbit_jax.ptq import _layer, _statistics

# One of each kind of scale and element that a method may meet.
FORMATS = (
  *('mxfp4', 'nvfp4', 'int4_g128', 'uint4_g32', 'q4_k', 'nf4_g64'),
  *('int3_g32', 'int8_channel', 'iq4_nl', 'uint4_g32_min_float16'),
)
INPUTS, OUTPUTS, TOKENS = 256, 48, 2048
PATH = 'up/kernel'


def activations(
  inputs: int = INPUTS, tokens: int = TOKENS, seed: int = 0
) -> jax.Array:
  """(tokens, inputs), correlated, of channels with very different ranges."""
  keys = jax.random.split(jax.random.key(seed), 3)
  mixed = jnp.eye(inputs) + jax.random.normal(keys[0], (inputs, inputs)) / 16
  spread = jnp.exp(jax.random.normal(keys[1], (inputs,)))
  return jax.random.normal(keys[2], (tokens, inputs)) @ mixed * spread


def weights(
  inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 1
) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), (inputs, outputs))


def model(params, x):
  return x @ params['up']['kernel']


def params(w: jax.Array):
  return {'up': {'kernel': w}}


def layer(
  name: str, x: jax.Array | None = None, w: jax.Array | None = None
) -> ptq.Layer:
  """A layer with the statistics of x, by default those of `activations`."""
  w = weights() if w is None else w
  x = activations(len(w)) if x is None else x
  observed = ptq.calibrate(model, params(w), [x])
  statistics = _statistics.of_leaf(observed, PATH)
  return _layer.Layer(PATH, w, formats.get(name), statistics)


def output_error(x: jax.Array, w: jax.Array, made) -> float:
  """Relative square error of the outputs of stored weights, in float64."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  difference = x @ (np.asarray(jnp.asarray(made), np.float64) - w)
  return (difference**2).sum() / ((x @ w) ** 2).sum()
