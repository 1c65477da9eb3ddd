"""Muon: momentum whose singular values are all set to about one."""

import math
import zlib
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lowbit_jax._tree import path_name
from lowbit_jax.formats import BlockFormat
from lowbit_jax.training.optimizers import _codecs, _polar
from lowbit_jax.training.optimizers._common import (
  check_range,
  check_steps,
  increment,
  is_embedding,
  is_head,
)
from lowbit_jax.training.optimizers._quantized import quantized_state

_SHAPE_SCALES = {
  'mup': lambda d_in, d_out: math.sqrt(d_out / d_in),
  'max1': lambda d_in, d_out: math.sqrt(max(1, d_out / d_in)),
  'rms': lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
  'none': lambda d_in, d_out: 1.0,
}
_POLARS = {
  'newton_schulz': ('quintic_empirical', 5),
  'randomized': ('quintic_theory', 7),
}

Dimensions = Callable[[str, jax.Array], MuonDimensionNumbers | None]


class MuonState(NamedTuple):
  """Steps so far, and the momentum."""

  steps: jax.Array
  mu: optax.Updates


def hidden_matrices(path: str, leaf: jax.Array) -> MuonDimensionNumbers | None:
  """Which leaves Muon takes unless told otherwise.

  Those of rank 2, (in, out), but for embeddings and output heads: paths that
  hold 'embed', 'wte' or 'wpe', or a component 'head', '..._head', 'logits',
  'unembed...' or 'classifier'.

  Args:
    path: as 'block_0/attention/kernel'.
    leaf: the parameter.

  Returns:
    Its axes, or None where another optimizer is to take it.
  """
  if leaf.ndim != 2 or is_embedding(path) or is_head(path):
    return None
  return MuonDimensionNumbers(0, 1)


def scale_by_muon(
  *,
  beta: float = 0.95,
  nesterov: bool = True,
  polar: Literal['newton_schulz', 'randomized'] = 'newton_schulz',
  coefficients: _polar.Coefficients | None = None,
  steps: int | None = None,
  rank: int = 200,
  oversample: int = 10,
  power_iterations: int = 1,
  sketch: Literal['gaussian', 'columns'] = 'gaussian',
  seed: int = 0,
  shape_scale: Literal['mup', 'max1', 'rms', 'none'] = 'max1',
  dimensions: Dimensions = hidden_matrices,
) -> optax.GradientTransformation:
  """Momentum, polar factor and shape factor of `muon`; takes its arguments.

  Every leaf has to be a matrix for `dimensions`.
  """
  check_range('beta', beta, 0, 1)
  if shape_scale not in _SHAPE_SCALES:
    raise ValueError(
      f'shape_scale={shape_scale!r} is not one of {tuple(_SHAPE_SCALES)}'
    )
  coefficients, steps = _iteration(polar, coefficients, steps)
  check_steps('rank', rank)

  def init(params):
    zero = jnp.zeros([], jnp.int32)
    return MuonState(zero, optax.tree.zeros_like(params))

  def factor(x, key):
    """s polar(x) of matrices (..., in, out)."""
    if polar == 'newton_schulz':
      o = _polar.newton_schulz(x, coefficients, steps)
    else:
      o = _randomized_factor(
        x,
        key,
        rank=rank,
        oversample=oversample,
        power_iterations=power_iterations,
        coefficients=coefficients,
        steps=steps,
        sketch=sketch,
      )
    return o * _SHAPE_SCALES[shape_scale](*x.shape[-2:])

  def update(updates, state, params=None):
    del params
    count = increment(state.steps)
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    momentum = _unbiased(mu, updates, beta, nesterov, count)
    # The key follows from the step and the path, so that a resumed run and a
    # tree with further leaves draw the same sketches.
    key = jax.random.fold_in(jax.random.key(seed), count)

    def orthogonal(path, m):
      name = path_name(path)
      axes = dimensions(name, m)
      if axes is None:
        raise ValueError(
          f'{name} of shape {m.shape} is not a matrix: dimensions= gives None;'
          ' update it by another optimizer, as muon(other=...) does'
        )
      leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
      return _as_matrices(m, axes, lambda x: factor(x, leaf_key))

    updates = jax.tree_util.tree_map_with_path(orthogonal, momentum)
    return updates, MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def _iteration(polar: str, coefficients, steps: int | None):
  """Coefficients and steps of the iteration, those of `polar` for None."""
  if polar not in _POLARS:
    raise ValueError(f'polar={polar!r} is not one of {tuple(_POLARS)}')
  default, default_steps = _POLARS[polar]
  steps = default_steps if steps is None else steps
  check_steps('steps', steps)
  return default if coefficients is None else coefficients, steps


def _unbiased(mu, updates, beta: float, nesterov: bool, count):
  """M, the momentum without the bias of its start at zero."""
  momentum = optax.tree.bias_correction(mu, beta, count + nesterov)
  if not nesterov:
    return momentum
  return jax.tree.map(
    lambda m, g: beta * m + (1 - beta) * g,
    momentum,
    optax.tree.bias_correction(updates, beta, count),
  )


def _randomized_factor(x, key, *, rank: int, oversample: int, **options):
  """A randomized polar factor with the root mean square of a full one."""
  o = _polar.randomized_polar(
    x, key, rank=rank, oversample=oversample, **options
  )
  k = _polar.sketch_size(x.shape, rank, oversample)
  return o * math.sqrt(min(x.shape[-2:]) / k)


def muon(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  mask: Any = None,
  *,
  other: optax.GradientTransformation | None = None,
  momentum: str | BlockFormat | None = None,
  min_size: int = 4096,
  dimensions: Dimensions = hidden_matrices,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Muon for hidden matrices, another optimizer for all other parameters.

    mu = beta mu + (1 - beta) g
    M  = beta mu^ + (1 - beta) g^   (Nesterov; hats correct the bias)
    W <- W - lr (s polar(M) + weight_decay W)

  The unscaled momentum mu = beta mu + g of some sources has the same direction.
  The factor s follows the shape (d_in, d_out) of a kernel, by `shape_scale`:

    mup   sqrt(d_out / d_in): updates keep the spectral condition of muP,
          ||dW||_2 of the order of sqrt(d_out / d_in), so that one lr fits all
          widths
    max1  sqrt(max(1, d_out / d_in)), K. Jordan's
    rms   0.2 sqrt(max(d_in, d_out)): root mean square of AdamW updates
    none  1

  Muon++ (towards a principled Muon under muP) is 'mup' with the initializer
  `mup_normal`: as updates obey the condition, weights do, with no spectral
  normalization of their own, ||W_T||_2 <= ||W_0||_2 + sqrt(d_out / d_in) sum_t
  lr_t smax(O_t). That, the initial norm and the factor are stated by its
  authors; the variance of `mup_normal`, `mup_head_scale` and `activation_cap`
  are our reading of them.

  With the default options the update of a matrix is that of
  `optax.contrib.muon`. The leaves that it takes differ: that one also takes
  embeddings and heads. So do those of `other`: there the inner Adam uses
  Nesterov momentum, here plain `optax.adamw`.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: times the learning rate; also `mask`, as in `optax.adamw`.
    other: for leaves that are not matrices; None for
      `optax.adamw(learning_rate, weight_decay=0)`.
    momentum: None, or the codec of mu, as `first` in `quantized_state`, in
      blocks of 128: 'lin8' and 'e4m3' keep it in 8 bits. Its direction is all
      that counts.
    min_size: as in `quantized_state`.
    dimensions: function of a path and a leaf that gives the axes of a matrix,
      `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`, or None
      for leaves of `other`. Further axes count matrices.
    **options: of `scale_by_muon`. `beta`=0.95 and `nesterov`=True; `polar`,
      'newton_schulz' or 'randomized'; `coefficients` and `steps`, as in
      `newton_schulz`, by default quintic_empirical x 5, and quintic_theory x 7
      where randomized; `rank`=200, `oversample`=10, `power_iterations`=1,
      `sketch`='gaussian', as in `randomized_polar`, and `seed`=0, from which
      sketches follow with the step and the path; `shape_scale`='max1', 'mup',
      'rms' or 'none'.

  Returns:
    A transformation. Randomized factors are multiplied by
    sqrt(min(m, n) / (rank + oversample)), which gives them the root mean square
    of full ones.
  """
  matrix = scale_by_muon(dimensions=dimensions, **options)
  if momentum is not None:
    _codecs.find(momentum, False, 'momentum')
    matrix = quantized_state(
      matrix, first=momentum, second=None, block=128, min_size=min_size
    )
  if other is None:
    other = optax.adamw(learning_rate, weight_decay=0.0)

  def labels(params):
    def label(path, leaf):
      axes = dimensions(path_name(path), leaf)
      return 'other' if axes is None else 'muon'

    return jax.tree_util.tree_map_with_path(label, params)

  transforms: dict[Hashable, optax.GradientTransformation] = {
    'muon': optax.chain(
      matrix,
      optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate),
    ),
    'other': other,
  }
  return optax.partition(transforms, labels)


def mup_normal(
  in_axis: int = -2, out_axis: int = -1
) -> jax.nn.initializers.Initializer:
  """Initializer of hidden matrices for muP: N(0, sigma^2).

  sigma = sqrt(d_out / d_in) / (sqrt(d_in) + sqrt(d_out)); as a Gaussian matrix
  has a norm of about sigma (sqrt(d_in) + sqrt(d_out)), ||W||_2 is about
  sqrt(d_out / d_in).

  Args:
    in_axis: axis of size d_in.
    out_axis: axis of size d_out.

  Returns:
    A function of (key, shape, dtype), as those of `jax.nn.initializers`.
  """

  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    d_in, d_out = shape[in_axis], shape[out_axis]
    sigma = math.sqrt(d_out / d_in) / (math.sqrt(d_in) + math.sqrt(d_out))
    return jax.random.normal(key, shape, dtype) * jnp.asarray(sigma, dtype)

  return init


def mup_head_scale(
  base_width: int, chosen: Callable[[str, jax.Array], bool] = is_head
) -> optax.GradientTransformation:
  """Multiplies the updates of output heads by base_width / d_in.

  In muP, Adam's learning rate of a head falls with the width while that of
  embeddings, gains and biases does not change. For `muon(other=...)`, after
  `optax.adamw`; our reading of muP.

  Args:
    base_width: width at which the learning rate was found.
    chosen: predicate of a path and a leaf; of those where it is true, matrices
      (d_in, d_out) are scaled. By default heads, see `hidden_matrices`.
  """
  check_steps('base_width', base_width)

  def scale(path, u):
    if u.ndim != 2 or not chosen(path_name(path), u):
      return u
    return u * jnp.asarray(base_width / u.shape[0], u.dtype)

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates)
  )


def activation_cap(update: jax.Array, x: jax.Array, rho: float) -> jax.Array:
  """An update that changes the output of a layer by a bounded share.

  Multiplies dW by min(1, rho sqrt(d_out / d_in) rms(x) / rms(x dW)), measured
  on a batch. Experimental: our reading of data-dependent Muon++.

  Args:
    update: dW, (d_in, d_out).
    x: inputs of the layer, (tokens, d_in).
    rho: bound of rms(x dW) in units of sqrt(d_out / d_in) rms(x).

  Returns:
    The update, scaled.
  """
  if update.ndim != 2 or x.ndim != 2 or x.shape[1] != update.shape[0]:
    raise ValueError(
      f'x.shape={x.shape} and update.shape={update.shape} must be'
      ' (tokens, d_in) and (d_in, d_out); reshape them'
    )
  d_in, d_out = update.shape
  limit = rho * math.sqrt(d_out / d_in) * _rms(x)
  change = _rms(x @ update)
  scale = jnp.minimum(1, limit / jnp.where(change > 0, change, 1))
  return update * jnp.where(change > 0, scale, 1).astype(update.dtype)


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _as_matrices(x, axes: MuonDimensionNumbers, f):
  """f on `x` as (..., in, out), and the result in the shape of `x`."""
  groups = []
  for axis in (axes.reduction_axis, axes.output_axis):
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    groups.append(tuple(a % x.ndim for a in axis))
  inner, outer = groups
  batch = tuple(a for a in range(x.ndim) if a not in inner + outer)
  order = batch + inner + outer
  if len(order) != x.ndim:
    raise ValueError(
      f'{axes} names an axis of an array of shape {x.shape} twice'
    )
  moved = x.transpose(order)
  sizes = moved.shape[: len(batch)]
  d_in = math.prod(x.shape[a] for a in inner)
  y = f(moved.reshape(*sizes, d_in, -1)).reshape(moved.shape)
  return y.transpose([order.index(a) for a in range(x.ndim)])
