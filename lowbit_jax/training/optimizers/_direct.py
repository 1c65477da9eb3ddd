"""Training quantized weights without a copy in high precision."""

import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lowbit_jax import ops, qarray
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._tree import path_name
from lowbit_jax._typing import Key, PyTree
from lowbit_jax.qarray import QArray, is_qarray
from lowbit_jax.training.optimizers._common import check_dense


def dequantized(params: PyTree) -> PyTree:
  """A tree with the values of its QArrays, at which gradients are taken."""
  return jax.tree.map(
    lambda x: qarray.dequantize(x) if is_quantized(x) else x,
    params,
    is_leaf=is_quantized,
  )


def direct(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Lets an optimizer see QArrays among the parameters as their values.

  The parameters are QArrays without a copy in high precision:
  w <- SR(w - lr u), where stochastic rounding keeps updates smaller than a step
  on average.

    params = quantize_params(...)                     # QArrays
    tx = direct(optax.adamw(1e-3))
    state = tx.init(params)
    grads = jax.grad(loss)(dequantized(params))
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates, key)      # a new key in every step

  Args:
    inner: an optax transformation.

  Returns:
    One whose `init` and `update` take parameters with QArrays, and gradients
    with respect to `dequantized(params)`.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return inner.init(dequantized(params))

  def update(updates, state, params=None, **extra_args):
    check_dense('updates', updates)
    values = None if params is None else dequantized(params)
    return inner.update(updates, state, values, **extra_args)

  return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(
  params: PyTree,
  updates: PyTree,
  key: Key | None = None,
  *,
  scales: Literal['current', 'held'] = 'current',
) -> PyTree:
  """w + u, stochastically rounded to the format of w.

  Parameters without an update, None in its place, stay as they are: with the
  `trainable` tree of `lowbit_jax.partition`, whose holes are None,

    updates, state = tx.update(grads, state, trainable)
    params = apply_updates(params, updates)

  leaves the QArrays alone. (`optax.apply_updates` would add codes to codes if
  the holes were filled by `lowbit_jax.combine`.)

  The mean over keys is w + u exactly (to 2^-24 of a step) where nothing
  saturates. With 'current' float32 scales and E8M0 scales, which take the rule
  'rceil' here, nothing does.

  Args:
    params: tree of QArrays and float arrays; the latter are added to as usual.
    updates: tree of float arrays of the shapes of the parameters, or None.
    key: PRNG key, a new one for every step, where a QArray has an update. Each
      leaf draws its own numbers, according to its path.
    scales: 'current' for new scales from w + u, 'held' for those that w has:
      then a code changes with probability |u| / step and weights cannot leave
      the range of their block, nor a block of zeros leave zero.

  Returns:
    A tree like `params`, with QArrays of the same formats and layouts.

  Raises:
    TypeError: for a QArray among the updates.
    ValueError: for shapes that do not agree, or a missing key.
  """
  if scales not in ('current', 'held'):
    raise ValueError(f"scales={scales!r} is not one of ('current', 'held')")

  check_dense('updates', updates)

  def apply(path, w, u):
    if u is None:
      return w
    if isinstance(w, Transformed):
      raise TypeError(
        f'{path_name(path)} is Transformed, which is not updated; freeze it by'
        ' lowbit_jax.partition'
      )
    if not is_qarray(w):
      return optax.apply_updates(w, u)
    if jnp.shape(u) != w.shape:
      raise ValueError(
        f'updates of {path_name(path)} have shape {jnp.shape(u)}, the parameter'
        f' has {w.shape}; take gradients at dequantized(params)'
      )
    if key is None:
      raise ValueError(
        f'{path_name(path)} is a QArray, whose update is rounded'
        ' stochastically: pass key=, a new one in every step'
      )
    leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
    return _rounded(w, u, leaf_key, scales)

  return jax.tree_util.tree_map_with_path(
    apply, params, updates, is_leaf=is_quantized
  )


def _rounded(w: QArray, u, key, scales: str) -> QArray:
  value = qarray.dequantize(w, jnp.float32) + u.astype(jnp.float32)
  fmt = w.fmt
  if scales == 'held':
    new = ops.quantize_with(
      value,
      w.scale,
      fmt,
      axis=w.axis,
      tensor_scale=w.tensor_scale,
      zero_point=w.zero_point,
      minimum=w.minimum,
      rounding='stochastic',
      key=key,
    )
  else:
    rule = 'rceil' if fmt.has_exponent_scale else None
    new = ops.quantize(
      value,
      fmt,
      axis=w.axis,
      scale_rule=rule,
      rounding='stochastic',
      key=key,
    )
  return new.astype(w.dtype)
