"""A mixture of experts in the place of an MLP, as of Mixtral and Qwen3-MoE."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lowbit_jax as lowbit
from models.llama_config import Config


class Experts(nnx.Module):
  """An MLP for each expert, and for each token those that a router chooses.

  Tokens are sorted by expert, so that every product has the rows of one expert
  beside each other.
  """

  def __init__(self, config: Config, **options: Any) -> None:
    self.chosen, self.normalized = config.chosen, config.normalized
    self.router = nnx.Linear(
      config.width, config.experts, use_bias=False, **options
    )
    rngs, dtype = options['rngs'], options['param_dtype']
    for name, inputs, outputs in (
      ('gate', config.width, config.hidden),
      ('up', config.width, config.hidden),
      ('down', config.hidden, config.width),
    ):
      init = nnx.initializers.lecun_normal(batch_axis=0)
      shape = config.experts, inputs, outputs
      kernel = nnx.Param(init(rngs.params(), shape, dtype))
      setattr(self, name, nnx.Dict(kernel=kernel))

  def __call__(self, x: jax.Array) -> jax.Array:
    tokens = x.reshape(-1, x.shape[-1])
    router = jax.nn.softmax(self.router(tokens).astype(jnp.float32))
    weights, experts = jax.lax.top_k(router, self.chosen)
    if self.normalized:
      weights /= weights.sum(axis=-1, keepdims=True)
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=router.shape[-1])
    rows = tokens[order // self.chosen]

    def product(rows, layer):
      return lowbit.ragged_dot(rows, layer.kernel[...], sizes)

    hidden = nnx.silu(product(rows, self.gate)) * product(rows, self.up)
    out = product(hidden, self.down) * weights.reshape(-1)[order, None]
    out = jnp.zeros_like(out).at[order].set(out)
    out = out.reshape(*experts.shape, -1).sum(axis=1)
    return out.reshape(x.shape).astype(x.dtype)
