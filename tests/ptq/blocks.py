"""Stacked blocks with all that scales fold into, and their calibration."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import ptq

FOLLOWERS = {
  'norm/scale': ('value/kernel', 'gate/kernel', 'up/kernel', 'absent/kernel'),
  'value/kernel': ('out/kernel',),
  'up/kernel': ('down/kernel',),
}
BLOCKS, WIDTH, HIDDEN = 2, 16, 24
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 6


def params() -> dict[str, jax.Array]:
  """By path; channels have different ranges."""
  values = KV_HEADS * HEAD_SIZE
  kernels = {
    'value': (WIDTH, values),
    'out': (HEADS * HEAD_SIZE, WIDTH),
    'gate': (WIDTH, HIDDEN),
    'up': (WIDTH, HIDDEN),
    'down': (HIDDEN, WIDTH),
  }
  vectors = {'norm': WIDTH, 'value': values, 'up': HIDDEN}
  random = np.random.default_rng(0)

  def ranges(n):
    return np.exp(random.standard_normal((BLOCKS, n)))

  def unit(*shape):
    return random.standard_normal((BLOCKS, *shape))

  out = {'norm/scale': ranges(WIDTH)}
  for name, (rows, columns) in kernels.items():
    kernel = unit(rows, columns) * ranges(columns)[:, None]
    out[f'{name}/kernel'] = kernel / rows
  out |= {f'{name}/bias': unit(n) / 8 for name, n in vectors.items()}
  return {f'blocks/{k}': jnp.asarray(v, jnp.float32) for k, v in out.items()}


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
  """x is (tokens, width)."""

  def linear(p, name, x):
    return x @ p[f'blocks/{name}/kernel'] + p.get(f'blocks/{name}/bias', 0)

  def block(x, p):
    rms = jnp.sqrt((x**2).mean(-1, keepdims=True))
    normed = x / rms * p['blocks/norm/scale'] + p['blocks/norm/bias']
    heads = linear(p, 'value', normed).reshape(-1, KV_HEADS, 1, HEAD_SIZE)
    heads = heads.repeat(HEADS // KV_HEADS, 2).reshape(len(x), -1)
    hidden = jax.nn.silu(linear(p, 'gate', normed)) * linear(p, 'up', normed)
    return x + linear(p, 'out', heads) + linear(p, 'down', hidden), None

  return jax.lax.scan(block, x, params)[0]


def activations(tokens: int = 256, seed: int = 1) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), (tokens, WIDTH))


def observed(params: dict[str, Any]) -> dict[str, Any]:
  return ptq.calibrate(apply, params, [activations()])


def relative(got: Any, want: Any) -> float:
  """The largest difference over the largest number."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return abs(got - want).max() / abs(want).max()
