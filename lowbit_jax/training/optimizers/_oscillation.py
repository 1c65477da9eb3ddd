"""Weights that swing between two grid points: snapping and smoothing them.

Source: Chen et al., TetraJet (Q-EMA, 2025) and TetraJet-v2 (OsciReset, 2025).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowbit_jax import _derivative, numerics, ops, qarray
from lowbit_jax._typing import Axis
from lowbit_jax.formats import BlockFormat, ElementFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics import _scaling
from lowbit_jax.numerics._codec import as_float_array
from lowbit_jax.ops import specs
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.training.optimizers._common import (
  check_range,
  check_real,
  check_steps,
  increment,
)
from lowbit_pallas.arith import codec


class DeoscillateState(NamedTuple):
  """Steps so far, and d_w and d_Q for each weight."""

  steps: jax.Array
  moved: optax.Params
  jumped: optax.Params


class QEMAState(NamedTuple):
  """Steps so far, and the mean of each weight."""

  steps: jax.Array
  ema: optax.Params


def deoscillate(
  quantize: Callable[[jax.Array], jax.Array] | QuantSpec,
  *,
  axis: Axis = None,
  window: int = 200,
  threshold: float = 4.0,
  warmup: int = 2000,
) -> optax.GradientTransformationExtraArgs:
  """Puts weights that oscillate between grid points onto one of them.

  A weight near the middle of two numbers of its format can change its quantized
  value in every step while it hardly moves itself. With Q the quantizer and
  window P, this accumulates

    d_w = sum_P |w_t - w_{t-1}|,  d_Q = sum_P |Q(w_t) - Q(w_{t-1})|

  and sets w <- Q(w) at the end of the window where d_Q / d_w >= tau.

  Put it last in a chain: its input is the update of the parameters. Use
  `optax.masked` to leave out the parameters that are not quantized.

  Args:
    quantize: function of a leaf that gives its quantized values, or a QuantSpec
      that rounds to nearest.
    axis: block axis of a QuantSpec, -2 for kernels of shape (in, out); None for
      the last one (the last two for tiles).
    window: steps P between decisions.
    threshold: tau; 4, or 16 in TetraJet-v2.
    warmup: steps before the first window begins; 2000 at batch size 16, 800 at
      64.

  Returns:
    A transformation with two float32 arrays of the shape of each parameter.
    `update` needs `params`.
  """
  q = _leaf_quantizer(quantize, axis)
  check_steps('window', window)
  check_steps('warmup', warmup, 0)
  if not threshold > 0:
    raise ValueError(f'threshold={threshold!r} must be positive, such as 4')

  def init(params):
    check_real('deoscillate', params)

    def zeros():
      return optax.tree.zeros_like(params, dtype=jnp.float32)

    return DeoscillateState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(updates, state, params=None, **extra_args):
    del extra_args
    _check_params('deoscillate', params)
    count = increment(state.steps)
    counts = count > warmup
    ends = counts & ((count - warmup) % window == 0)

    def step(u, w, moved, jumped):
      new = _applied(w, u)
      rounded = q(new)
      moved = moved + jnp.where(counts, _distance(new, w), 0)
      jumped = jumped + jnp.where(counts, _distance(rounded, q(w)), 0)
      snaps = ends & (moved > 0) & (jumped >= threshold * moved)
      u = jnp.where(snaps, (rounded - w).astype(u.dtype), u)
      return u, jnp.where(ends, 0, moved), jnp.where(ends, 0, jumped)

    updates, moved, jumped = _unzip(
      jax.tree.map(step, updates, params, state.moved, state.jumped), updates, 3
    )
    return updates, DeoscillateState(count, moved, jumped)

  return optax.GradientTransformationExtraArgs(init, update)


def q_ema(
  decay: float = 0.998, *, start: int = 10
) -> optax.GradientTransformationExtraArgs:
  """Keeps the mean of each parameter for `ema_quantize`; changes no update.

  With `ema_quantize` the forward pass takes, of the two grid points around w,
  the one that is nearer to the mean. Put the transformation last in a chain.
  After the first `start` steps, in which the mean is w_t itself,
  ema_t = decay ema_{t-1} + (1 - decay) w_t.

  Args:
    decay: beta, in [0, 1).
    start: steps without averaging.

  Returns:
    A transformation whose state has the means in its field `ema`, which
    `optax.tree.get(state, 'ema')` finds. `update` needs `params`.
  """
  check_range('decay', decay, 0, 1)
  check_steps('start', start, 0)

  def init(params):
    check_real('q_ema', params)
    ema = optax.tree.cast(params, jnp.float32)
    # A copy, so that parameters can be donated.
    ema = jax.tree.map(lambda x: jnp.array(x, copy=True), ema)
    return QEMAState(jnp.zeros([], jnp.int32), ema)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    _check_params('q_ema', params)
    count = increment(state.steps)
    beta = jnp.where(count > start, jnp.float32(decay), 0)

    def mean(ema, w, u):
      new = _applied(w, u).astype(jnp.float32)
      return beta * ema + (1 - beta) * new

    ema = jax.tree.map(mean, state.ema, params, updates)
    return updates, QEMAState(count, ema)

  return optax.GradientTransformationExtraArgs(init, update)


def grid_neighbours(
  w: jax.Array,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  scale_rule: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The two numbers of a block format that enclose each element of `w`.

  `w` is quantized to nearest, which fixes the scales and one of the two. The
  other is the next element of the format on the side of the remainder, looked
  up in its table and multiplied by the same scales: exact for every format.

  Args:
    w: float array.
    fmt: a block format without zero points.
    axis: block axis, as in `lowbit_jax.quantize`.
    scale_rule: as in `lowbit_jax.quantize`.

  Returns:
    (nearest, other) of the shape and dtype of `w`. Both are the same where `w`
    is on the grid or beyond its ends.
  """
  if check_format(fmt).zero_point:
    raise ValueError(
      f'fmt={fmt} has zero points, so its numbers are not those of a table;'
      ' use a symmetric format such as lowbit_jax.formats.int4_g32'
    )
  w = jax.lax.stop_gradient(as_float_array(w, 'w'))
  q = ops.quantize(w, fmt, axis=axis, scale_rule=scale_rule)
  nearest = qarray.dequantize(q, jnp.float32)
  codes = numerics.unpack(q.codes, fmt.element.bits, q.axes[0])
  encoder = _scaling.encoder(fmt.element, scale_rule or fmt.scale_rule)

  def value_of(table):
    codes_ = numerics.pack(table[codes], fmt.element.bits, q.axes[0])
    return qarray.dequantize(qarray.replace(q, codes=codes_), jnp.float32)

  # Where a scale is negative the next larger element is the smaller number.
  sides = [value_of(t) for t in _next_codes(fmt.element, encoder)]
  # Comparisons, because a compiler may fuse a difference with the product in
  # `nearest` into one rounding, whose sign is that of the rounding error.
  value = w.astype(jnp.float32)
  other = jnp.where(value > nearest, jnp.maximum(*sides), nearest)
  other = jnp.where(value < nearest, jnp.minimum(*sides), other)
  return nearest.astype(w.dtype), other.astype(w.dtype)


@_derivative.custom_jvp
def _straight_through(w, value):
  """`value` with the derivative of `w`."""
  del w
  return value


@_straight_through.defjvp
def _(primals, tangents):
  return _straight_through(*primals), tangents[0]


def ema_quantize(
  w: jax.Array,
  ema: jax.Array,
  fmt: BlockFormat,
  *,
  axis: Axis = None,
  scale_rule: str | None = None,
) -> jax.Array:
  """Rounds each weight to the grid point beside it that is nearer to its mean.

  Args:
    w: weights, float.
    ema: their means from `q_ema`, of the same shape.
    fmt: as in `grid_neighbours`.
    axis: as in `grid_neighbours`.
    scale_rule: as in `grid_neighbours`.

  Returns:
    Quantized weights of the shape and dtype of `w`, to be used in the forward
    pass as they are. In ties the grid point nearest to `w` is taken. The
    gradient goes to `w` unchanged; `ema` gets none.
  """
  if np.shape(ema) != np.shape(w):
    raise ValueError(
      f'ema.shape={np.shape(ema)} must be w.shape={np.shape(w)}; take the'
      " means of this leaf from optax.tree.get(state, 'ema')"
    )
  nearest, other = grid_neighbours(w, fmt, axis=axis, scale_rule=scale_rule)
  near, far = (jnp.abs(ema - v.astype(jnp.float32)) for v in (nearest, other))
  return _straight_through(w, jnp.where(far < near, other, nearest))


def _next_codes(
  element: ElementFormat, encoder: codec.Element
) -> tuple[jax.Array, jax.Array]:
  """Code of the next larger and of the next smaller number, for each code.

  Ends stay, as encoding would not go beyond them; so do NaN and Inf.
  """
  values = element.values()
  codes = np.arange(len(values), dtype=np.uint8)
  low, high = _scaling.ends(encoder)
  usable = (values >= low) & (values <= high)
  distinct, index = np.unique(values[usable], return_index=True)
  ordered = codes[usable][index]
  up, down = codes.copy(), codes.copy()
  for code in codes[usable]:
    i = int(np.searchsorted(distinct, values[code]))
    up[code] = ordered[min(i + 1, len(ordered) - 1)]
    down[code] = ordered[max(i - 1, 0)]
  return jnp.asarray(up), jnp.asarray(down)


def _leaf_quantizer(quantize, axis):
  if not isinstance(quantize, QuantSpec):
    if not callable(quantize):
      raise TypeError(
        f'quantize={quantize!r} must be a QuantSpec or a function of an array'
      )
    if axis is not None:
      raise ValueError(
        f'axis={axis!r} is for a QuantSpec; drop it with a function of arrays'
      )
    return quantize
  spec = quantize
  if spec.needs_key:
    raise ValueError(
      f'quantize.rounding={spec.rounding!r} jumps by itself; use the QuantSpec'
      " with rounding='nearest_even'"
    )
  specs.check_stateless('quantize', spec)
  return functools.partial(specs.fake_quant, spec=spec, axis=axis)


def _check_params(name: str, params) -> None:
  if params is None:
    raise ValueError(
      f'params=None: {name} needs the parameters; call'
      ' update(updates, state, params)'
    )


def _applied(w: jax.Array, u: jax.Array) -> jax.Array:
  """The leaf `w` after `optax.apply_updates`."""
  return (w + u).astype(w.dtype)


def _distance(a, b):
  return jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))


def _unzip(tree, template, n: int):
  """A tree of n-tuples as n trees of the structure of `template`."""
  structure = jax.tree.structure(template)
  leaves = structure.flatten_up_to(tree)
  return tuple(
    structure.unflatten([leaf[i] for leaf in leaves]) for i in range(n)
  )
