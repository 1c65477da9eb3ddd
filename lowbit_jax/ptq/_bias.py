"""Biases that make up for the mean error of quantized weights."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import ops
from lowbit_jax._low_rank import is_operand
from lowbit_jax._transformed import is_quantized
from lowbit_jax._tree import by_name
from lowbit_jax._typing import PyTree
from lowbit_jax.ptq import _folding, _statistics


def correct_biases(
  params: PyTree,
  quantized: PyTree,
  observed: Mapping[str, Any],
  *,
  held_out: Mapping[str, Any] | None = None,
) -> PyTree:
  """Adds to biases what quantized weights take from the mean of outputs.

    b + E[x] (W - Q)

  The mean may be that of a few tokens with very large activations, such as the
  first one of a sequence. All others then get an error that they did not have,
  and the model may lose much more than the layer gains. Give `held_out` of
  batches without such tokens: with them it lets such corrections pass.

  Args:
    params: tree of float arrays, such as an NNX state or a dict by path.
    quantized: the tree with QArrays or `ops.Transformed` in place of kernels.
      Those with a 'bias' beside them are corrected, all others stay.
    observed: what `calibrate` returned for `params`.
    held_out: what it returned for other batches. The bias of a layer changes
      only if the mean square error of its outputs there becomes less. Layers of
      a stack and experts are judged one by one.

  Returns:
    `quantized` with other biases, in the dtypes that they had. Those of
    `params` are corrected, so that a second call changes nothing.

  Raises:
    ValueError: for trees that do not fit, and for a weight that was not
      observed.
  """
  floats, _ = by_name(params)
  leaves, structure = by_name(quantized)
  for path, q in list(leaves.items()):
    bias = _folding.sibling_bias(leaves, path)
    if not is_quantized(q) or bias is None or is_operand(leaves[bias]):
      continue
    _check_floats(floats, path, q.shape)
    _check_floats(floats, bias, leaves[bias].shape)
    lost = jnp.asarray(floats[path], jnp.float32)
    lost = lost - ops.dequantize(q, jnp.float32)
    old = leaves[bias]
    change = _mean_loss(lost, old.shape, observed, path)
    if held_out is not None:
      there = _mean_loss(lost, old.shape, held_out, path)
      change = _accepted(change, there)
    new = jnp.asarray(floats[bias], jnp.float32) + change.reshape(old.shape)
    leaves[bias] = new.astype(old.dtype)
  return structure.unflatten(leaves.values())


def _check_floats(
  floats: Mapping[str, Any], path: str, shape: tuple[int, ...]
) -> None:
  leaf = floats.get(path)
  if leaf is None or is_operand(leaf) or leaf.shape != shape:
    found = 'nothing' if leaf is None else repr(leaf)[:80]
    raise ValueError(
      f'params has {found} at {path!r}, where an array of shape {shape} is'
      ' quantized; pass the parameters before they were'
    )


def _mean_loss(
  lost: jax.Array,
  bias: tuple[int, ...],
  observed: Mapping[str, Any],
  path: str,
) -> jax.Array:
  """What the mean of the activations makes of W - Q: (*stack, outputs).

  Args:
    lost: W - Q, (*stack, *inputs, *outputs).
    bias: shape of the bias, (*stack, *outputs).
    observed: of the activations.
    path: of the weight.
  """
  mean = _statistics.of_leaf(observed, path).mean
  *members, inputs = mean.shape
  for axes in range(len(bias)):
    stack, outputs = bias[:axes], bias[axes:]
    own = lost.shape[axes : lost.ndim - len(outputs)]
    fits = lost.shape == (*stack, *own, *outputs)
    if (
      fits
      and math.prod(stack) == math.prod(members)
      and math.prod(own) == inputs
    ):
      return jnp.einsum(
        '...i,...io->...o',
        mean.reshape(*stack, inputs),
        lost.reshape(*stack, inputs, -1),
        precision=jax.lax.Precision.HIGHEST,
      )
  raise ValueError(
    f'activations of shape {mean.shape} were recorded for {path!r} of shape'
    f' {lost.shape} with a bias of shape {bias}; calibrate a function that'
    ' scans over the layers of a stack, and leave groups of convolutions in'
    ' float'
  )


def _accepted(change: jax.Array, there: jax.Array) -> jax.Array:
  """Changes of biases, 0 where they would make errors of outputs larger.

  With an error e = x (Q - W) before, the mean of |e + c|^2 is that of |e|^2 and
  c (c - 2 E[x] (W - Q)): the moments of x drop out.

  Args:
    change: c (*stack, outputs).
    there: E[x] (W - Q) of other batches.
  """
  difference = (change * (change - 2 * there)).sum(-1, keepdims=True)
  return jnp.where(difference < 0, change, 0)
