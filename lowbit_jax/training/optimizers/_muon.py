"""Muon: momentum whose singular values are all set to about one."""

import math
import re
import zlib
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lowbit_jax._tree import path_name
from lowbit_jax._typing import DTypeLike, PyTree
from lowbit_jax.formats import BlockFormat
from lowbit_jax.training.optimizers import _codecs, _polar
from lowbit_jax.training.optimizers._common import (
  check_dense,
  check_range,
  check_steps,
  content,
  in_float32,
  increment,
  is_boxed,
  is_embedding,
  is_head,
  reboxed,
  safe_norm,
  wide,
  wide_dtype,
  widened,
)
from lowbit_jax.training.optimizers._quantized import MIN_SIZE, quantized_state

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

# Leaves of layers that `nn.scan` stacks along their first axis. A component
# with an index, as in 'layers_0' and 'layers/0', is one layer.
STACKED = r'(?i)(^|/)(scan\w*|stacked\w*|layers|blocks)/(?!\d)'

_VECTOR = re.compile(
  r'(^|/)(\w*norm|ln)(_?([a-z]|\d+))?(/|$)'
  r'|(^|[/_])(bias|scale|gain|offset|shift|gamma|beta)$|(^|/)[bg]$',
  re.IGNORECASE,
)
_CONVOLUTION = re.compile('conv', re.IGNORECASE)
_ATTENTION = re.compile(r'(?i)att(entio)?n|mha')

Dimensions = Callable[[str, jax.Array], MuonDimensionNumbers | None]


class MuonState(NamedTuple):
  """Steps so far, and the momentum."""

  steps: jax.Array
  mu: optax.Updates


def hidden_matrices(
  path: str, leaf: jax.Array, *, stacked: str = STACKED
) -> MuonDimensionNumbers | None:
  """Which leaves Muon takes unless told otherwise, and as which matrices.

  The path tells what a leaf is, and its rank without the axis of a stack which
  matrices it holds; axes in front of those count matrices, each of which has
  its own polar factor:

    (in, out)                                     one matrix
    (n, in, out), such as grouped experts         n matrices
    (in, heads, size) of query, key and value     (in, heads size)
    (heads, size, out) of out in an attention     (heads size, out)
    the same behind the axis of a stack           one for each layer

  Another optimizer takes

    vectors, stacked or not: rank 1, leaves of normalizations (a component 'ln'
      or '...norm', also with a number or letter, as 'LayerNorm_0'), and leaves
      called b, g, or (also behind '_') bias, scale, gain, offset, shift, gamma
      or beta
    embeddings and output heads: paths that hold 'embed', 'wte' or 'wpe', or a
      component 'head', '..._head', 'logits', 'unembed...' or 'classifier'
    kernels of convolutions: paths that hold 'conv'
    complex numbers, empty leaves, matrices with a side of 1, and other ranks

  `muon_table` prints what this makes of a tree. Names cannot tell everything:
  stacks under other names need `functools.partial(hidden_matrices,
  stacked=r'decoder/')`, without which a stack of kernels (in, out) that are
  called query, key, value or out would pass for one kernel of rank 3.

  Args:
    path: as 'block_0/attention/kernel'.
    leaf: the parameter.
    stacked: regular expression that is searched in the path of a leaf and tells
      that its first axis counts layers. By default components 'scan...',
      'stacked...', 'layers' and 'blocks' with no index behind them.

  Returns:
    Its axes, or None where another optimizer is to take it.
  """
  if is_embedding(path) or is_head(path) or _VECTOR.search(path):
    return None
  if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
    return None
  layers = int(re.search(stacked, path) is not None)
  rank = leaf.ndim - layers
  is_attention = rank == 3 or (rank == 4 and not layers)
  parent = path.split('/')[-2:-1]
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  if is_attention and parent in (['query'], ['key'], ['value']):
    axes = (leaf.ndim - 3,), (leaf.ndim - 2, leaf.ndim - 1)
  elif is_attention and parent == ['out'] and _ATTENTION.search(path):
    axes = (leaf.ndim - 3, leaf.ndim - 2), (leaf.ndim - 1,)
  elif rank in (2, 3) and not _CONVOLUTION.search(path):
    axes = (leaf.ndim - 2,), (leaf.ndim - 1,)
  else:
    return None
  if min(math.prod(leaf.shape[a] for a in side) for side in axes) < 2:
    return None
  inner, outer = (side[0] if len(side) == 1 else side for side in axes)
  return MuonDimensionNumbers(inner, outer)


def muon_table(params: PyTree, dimensions: Dimensions | None = None) -> str:
  """What `muon` does with each leaf of a tree, as lines of text.

  Args:
    params: tree of arrays or their `jax.eval_shape`.
    dimensions: as in `muon`.

  Examples:
    >>> shapes = {
    ...   'kernel': jax.ShapeDtypeStruct((4, 64, 128), jnp.float32),
    ...   'scale': jax.ShapeDtypeStruct((4, 64), jnp.float32),
    ... }
    >>> print(muon_table({'layers': shapes}))
    layers/kernel  (4, 64, 128)  muon, 4 of (64, 128)
    layers/scale   (4, 64)       other
  """
  rows = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=is_boxed
  ):
    name, leaf = path_name(path), content(leaf)
    axes = _dimensions(dimensions)(name, leaf)
    what = 'other'
    if axes is not None:
      batch, inner, outer = _groups(leaf.shape, axes)
      count, *sides = (
        math.prod(leaf.shape[a] for a in group)
        for group in (batch, inner, outer)
      )
      what = f'muon, {count} of ({sides[0]}, {sides[1]})'
    rows.append((name, str(tuple(leaf.shape)), what))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows
  )


def _dimensions(value: Dimensions | None) -> Dimensions:
  return hidden_matrices if value is None else value


def scale_by_muon(
  *,
  beta: float = 0.95,
  nesterov: bool = True,
  mu_dtype: DTypeLike | None = None,
  polar: Literal['newton_schulz', 'randomized'] = 'newton_schulz',
  coefficients: _polar.Coefficients | None = None,
  steps: int | None = None,
  rank: int | None = None,
  oversample: int | None = None,
  power_iterations: int | None = None,
  sketch: Literal['gaussian', 'columns'] = 'gaussian',
  seed: int = 0,
  shape_scale: Literal['mup', 'max1', 'rms', 'none'] = 'max1',
  dimensions: Dimensions | None = None,
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
  rank = 200 if rank is None else rank
  check_steps('rank', rank)
  options = {
    'rank': rank,
    'oversample': 10 if oversample is None else oversample,
    'power_iterations': 1 if power_iterations is None else power_iterations,
    'coefficients': coefficients,
    'steps': steps,
    'sketch': sketch,
  }

  def stored(mu):
    return mu if mu_dtype is None else optax.tree.cast(mu, mu_dtype)

  def init(params):
    def zeros(p):
      dtype = wide_dtype(p) if mu_dtype is None else mu_dtype
      return jnp.zeros_like(p, dtype=dtype)

    mu = jax.tree.map(zeros, params)
    return MuonState(jnp.zeros([], jnp.int32), mu)

  def factor(x, key):
    """s polar(x) of matrices (..., in, out)."""
    if polar == 'newton_schulz':
      o = _polar.newton_schulz(x, coefficients, steps)
    else:
      o = _randomized_factor(x, key, **options)
    return o * _SHAPE_SCALES[shape_scale](*x.shape[-2:])

  def update(updates, state, params=None):
    del params
    count = increment(state.steps)
    grads = widened(updates)
    mu = optax.tree.update_moment(grads, widened(state.mu), beta, 1)
    momentum = _unbiased(mu, grads, beta, nesterov, count)
    # The key follows from the step and the path, so that a resumed run and a
    # tree with further leaves draw the same sketches.
    key = jax.random.fold_in(jax.random.key(seed), count)

    def orthogonal(path, box, m):
      name, g, m = path_name(path), content(box), content(m)
      axes = _dimensions(dimensions)(name, g)
      if axes is None:
        raise ValueError(
          f'{name} of shape {g.shape} is not a matrix: dimensions= gives None;'
          ' update it by another optimizer, as muon(other=...) does'
        )
      # Gradients in bfloat16 ask for matrix products in bfloat16.
      m = m.astype(jnp.bfloat16) if g.dtype == jnp.bfloat16 else m
      leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
      o = _as_matrices(m, axes, lambda x: factor(x, leaf_key))
      return reboxed(box, o.astype(g.dtype))

    out = jax.tree_util.tree_map_with_path(
      orthogonal, updates, momentum, is_leaf=is_boxed
    )
    return out, MuonState(count, stored(mu))

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


def _randomized_factor(x, key, *, rank: int, oversample: int, **options: Any):
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
  min_size: int | None = None,
  dimensions: Dimensions | None = None,
  beta: float = 0.95,
  nesterov: bool = True,
  mu_dtype: DTypeLike | None = None,
  polar: Literal['newton_schulz', 'randomized'] = 'newton_schulz',
  coefficients: _polar.Coefficients | None = None,
  steps: int | None = None,
  rank: int | None = None,
  oversample: int | None = None,
  power_iterations: int | None = None,
  sketch: Literal['gaussian', 'columns'] = 'gaussian',
  seed: int = 0,
  shape_scale: Literal['mup', 'max1', 'rms', 'none'] = 'max1',
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
  Nesterov momentum, here plain `optax.adamw`. `hidden_matrices` is the rule,
  and `print(muon_table(params))` shows what it makes of a model.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: times the learning rate; also `mask`, as in `optax.adamw`.
    other: for leaves that are not matrices; None for
      `optax.adamw(learning_rate, weight_decay=0)`, computed in float32.
    momentum: None, or the codec of mu, as `first` in `quantized_state`, in
      blocks of 128: 'lin8' and 'e4m3' keep it in 8 bits. Its direction is all
      that counts.
    min_size: as in `quantized_state`; None for its default.
    dimensions: function of a path and a leaf that gives the axes of a matrix,
      `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`, or None
      for leaves of `other`. Further axes count matrices. None for
      `hidden_matrices`.
    beta: decay of mu, in [0, 1).
    nesterov: whether M looks a step ahead; else it is mu^.
    mu_dtype: dtype in which mu is kept, None for at least float32, in which it
      is computed.
    polar: 'newton_schulz', or 'randomized' for `randomized_polar`.
    coefficients: as in `newton_schulz`; None for 'quintic_empirical', and
      'quintic_theory' where randomized.
    steps: as in `newton_schulz`; None for 5, and 7 where randomized.
    rank: as in `randomized_polar`; None for 200.
    oversample: as in `randomized_polar`; None for 10.
    power_iterations: as in `randomized_polar`; None for 1.
    sketch: as in `randomized_polar`.
    seed: sketches follow from it, the step and the path.
    shape_scale: the factor s.

  Returns:
    A transformation. Polar factors are computed in float32, and in bfloat16 for
    gradients in bfloat16; updates have the dtypes of the gradients. Randomized
    factors are multiplied by sqrt(min(m, n) / (rank + oversample)), which gives
    them the root mean square of full ones.
  """
  matrix = scale_by_muon(
    beta=beta,
    nesterov=nesterov,
    mu_dtype=mu_dtype,
    polar=polar,
    coefficients=coefficients,
    steps=steps,
    rank=rank,
    oversample=oversample,
    power_iterations=power_iterations,
    sketch=sketch,
    seed=seed,
    shape_scale=shape_scale,
    dimensions=dimensions,
  )
  if momentum is not None:
    _codecs.find(momentum, False, 'momentum')
    matrix = quantized_state(
      matrix,
      first=momentum,
      second=None,
      block=128,
      min_size=MIN_SIZE if min_size is None else min_size,
    )
  if other is None:
    other = in_float32(optax.adamw(learning_rate, weight_decay=0.0))

  def labels(params):
    check_dense('params', params)

    def label(path, leaf):
      axes = _dimensions(dimensions)(path_name(path), content(leaf))
      return 'other' if axes is None else 'muon'

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_boxed)

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
    if not d_in or not d_out:
      return jnp.zeros(shape, dtype)
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
    if u.ndim != 2 or not u.size or not chosen(path_name(path), u):
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
  if not update.size or not x.size:
    return update
  limit = rho * math.sqrt(d_out / d_in) * _rms(x)
  change = _rms(x @ update)
  scale = jnp.minimum(1, limit / jnp.where(change > 0, change, 1))
  return update * jnp.where(change > 0, scale, 1).astype(update.dtype)


def _rms(x):
  scale, norm = safe_norm(wide(x))
  return (norm / math.sqrt(x.size) / scale).reshape(())


def _groups(shape, axes: MuonDimensionNumbers) -> tuple[tuple[int, ...], ...]:
  """Axes that count matrices, those of the inputs and those of the outputs."""
  rank = len(shape)
  groups = []
  for axis in (axes.reduction_axis, axes.output_axis):
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    groups.append(tuple(a % rank for a in axis))
  inner, outer = groups
  batch = tuple(a for a in range(rank) if a not in inner + outer)
  if len(batch + inner + outer) != rank:
    raise ValueError(f'{axes} names an axis of an array of shape {shape} twice')
  return batch, inner, outer


def _as_matrices(x, axes: MuonDimensionNumbers, f):
  """f on `x` as (..., in, out), and the result in the shape of `x`."""
  batch, inner, outer = _groups(x.shape, axes)
  if not x.size:
    return x
  order = batch + inner + outer
  moved = x.transpose(order)
  sizes = moved.shape[: len(batch)]
  d_in = math.prod(x.shape[a] for a in inner)
  y = f(moved.reshape(*sizes, d_in, -1)).reshape(moved.shape)
  return y.transpose([order.index(a) for a in range(x.ndim)])
