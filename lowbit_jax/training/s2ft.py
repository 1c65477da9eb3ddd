"""Structured sparse fine-tuning on a frozen quantized model (S2FT).

"S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured
Sparsity" trains, of each coupled structure of a network, a few randomly chosen
units: channels of an MLP, heads of an attention. Coupled matrices are reordered
together, which leaves the output as it is, so that the chosen units are a dense
slice. For y = x w with x (..., K) and w (K, N) the trained slice is

  sink    D (s, N):  y = x w_q + x[..., a:b] D     w is `down` or `o`, s = b - a
          dD = x[..., a:b]^T dy
  source  D (K, s):  y = x w_q, y[..., a:b] += x D     w is `up`, `gate` or `v`
          dD = x^T dy[..., a:b]
  both    dx = dy w_q^T + the same with D on its slice

w_q is a frozen QArray of any format, or an array. It needs no gradient, so a
sink saves x[..., a:b] for the backward pass and no more of x; the paper trains
sinks for this reason. There are two forms of the same product:

  dense    `split` takes the slice out of w_q (zeros are left there) and trains
           it in float from its value before quantization: the trained part of
           the model has no rounding error
  adapter  D starts at zero beside an unchanged w_q; `make_adapter` turns the
           first form into this one

Blocks of w_q lie along K, so for sinks a and b are multiples of the block, and
a matrix is reordered before it is quantized. Without this, the blocks at the
ends of the slice would mix trained rows and frozen ones.

The trained slice is a plain array, for jax.grad and an optimizer. w_q is an
argument like x and is not trained. For one block of a model with 4096 channels
and 14336 in its gated MLP, with 448 rows of `down` trained and float32 for
value, gradient and both moments of Adam (16 bytes per trained number):

  full fine-tuning of its seven matrices    218.1 M numbers   3490 MB
  LoRA of rank 16 on the seven                1.31 M numbers    21 MB
  S2FT on `down`                              1.84 M numbers    29 MB

and numbers saved per token for weight gradients, with distinct inputs counted
once: 26624 for the first two and 448 for S2FT.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import ops, qarray
from lowbit_jax._typing import Key, PyTree
from lowbit_jax.formats import BlockFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics._codec import as_float_array, promoted
from lowbit_jax.qarray import QArray

KINDS = ('sink', 'source')

Order = Sequence[int] | np.ndarray | jax.Array


def select(
  key: Key, layers: int, units: int, ratio: float, *, multiple: int = 1
) -> tuple[np.ndarray, ...]:
  """Draws units uniformly from all (layer, unit) pairs.

  Args:
    key: PRNG key.
    layers: number of layers.
    units: channels or heads (with grouped queries: key-value heads) per layer.
    ratio: int(ratio layers units) pairs are drawn, 0 to 1.
    multiple: the count of each layer is rounded up to a multiple of it with
      further units of that layer, so that the slice of a sink consists of whole
      blocks: the block size for channels, lcm(block, w) / w for heads of w
      rows. Layers without a drawn unit stay without.

  Returns:
    Rising unit indices, one int array per layer. They decide shapes, so this
    runs outside jit.
  """
  for name, count in (
    ('layers', layers),
    ('units', units),
    ('multiple', multiple),
  ):
    _check_int(name, count)
  if layers < 1 or units < 1:
    raise ValueError(f'layers={layers} and units={units} must be at least 1')
  if not 0 <= ratio <= 1:
    raise ValueError(f'ratio={ratio} must be between 0 and 1')
  if multiple < 1 or units % multiple:
    raise ValueError(
      f'multiple={multiple} must divide units={units}, or whole blocks cannot'
      ' be selected; use a format with smaller blocks'
    )
  # A rank for each pair decides both the draw and the units that fill up.
  rank = np.asarray(jax.random.permutation(key, layers * units))
  rank = rank.reshape(layers, units)
  drawn = np.sum(rank < int(ratio * layers * units), axis=1)
  counts = -(-drawn // multiple) * multiple
  order = np.argsort(rank, axis=1)
  return tuple(
    np.sort(row[:count]) for row, count in zip(order, counts, strict=True)
  )


class Arrangement(NamedTuple):
  """An order of units in which both selections are contiguous.

  Attributes:
    order: new position -> old unit.
    sink: (a, b), the units trained in the sinks.
    source: (a, b), the units trained in the sources.
  """

  order: np.ndarray
  sink: tuple[int, int]
  source: tuple[int, int]


def arrange(
  units: int, sink: Sequence[int] = (), source: Sequence[int] = ()
) -> Arrangement:
  """Orders units as [only sink, both, only source, rest].

  The sink's slice starts at 0, at a block boundary whatever the source's size
  is. Within each part old indices rise.

  Args:
    units: number of units.
    sink: units that are trained in sinks, such as rows of `down`.
    source: units that are trained in sources, such as columns of `up`.
  """
  in_sink = _members(units, sink, 'sink')
  in_source = _members(units, source, 'source')
  group = np.where(in_sink, np.where(in_source, 1, 0), 3 - in_source)
  order = np.argsort(group, kind='stable')
  stop, both = int(in_sink.sum()), int((in_sink & in_source).sum())
  start = stop - both
  return Arrangement(order, (0, stop), (start, start + int(in_source.sum())))


def co_permute(
  sources: PyTree, sinks: PyTree, order: Order, *, width: int = 1
) -> tuple[PyTree, PyTree]:
  """Reorders the units between two products, which leaves the output as it is.

  Args:
    sources: pytree of kernels (..., units * width) and biases (units * width,)
      that make the units: `up` and `gate`. Reordered along the last axis.
    sinks: pytree of kernels (units * width, n) that take them: `down`, without
      its bias. Reordered along the last axis but one.
    order: new position -> old unit.
    width: consecutive entries of a unit.

  Returns:
    (sources, sinks), reordered. Sums over units change in order only.
  """
  order = expand(order, width)
  is_leaf = qarray.is_qarray
  return (
    jax.tree.map(lambda w: _take(w, order, -1), sources, is_leaf=is_leaf),
    jax.tree.map(lambda w: _take(w, order, -2), sinks, is_leaf=is_leaf),
  )


def co_permute_heads(
  q: PyTree, k: PyTree, v: PyTree, o: PyTree, order: Order, *, head_dim: int
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
  """Reorders the heads of an attention, which leaves the output as it is.

  With grouped queries the units are key-value heads; each moves together with
  the query heads that it serves, stored one after another.

  Args:
    q: kernel (n, heads * head_dim), or a pytree of it and its bias.
    k: the same with key-value heads.
    v: as `k`.
    o: kernel (heads * head_dim, n), without its bias.
    order: new position -> old key-value head.
    head_dim: channels of a head.

  Returns:
    (q, k, v, o), reordered.
  """
  _check_int('head_dim', head_dim)
  order = expand(order, 1)
  leaves = jax.tree.leaves(o, is_leaf=qarray.is_qarray)
  if len(leaves) != 1 or np.ndim(leaves[0]) < 2:
    raise ValueError(
      f'o must be one kernel (heads * head_dim, n), got {len(leaves)} arrays'
      f' of shapes {[np.shape(leaf) for leaf in leaves]}'
    )
  rows, group = leaves[0].shape[-2], len(order) * head_dim
  if not group or rows % group:
    raise ValueError(
      f'o has {rows} rows, no multiple of {len(order)} key-value heads of'
      f' head_dim={head_dim}, as many as order has'
    )
  q, o = co_permute(q, o, order, width=rows // len(order))
  (k, v), _ = co_permute((k, v), (), order, width=head_dim)
  return q, k, v, o


def expand(order: Order, width: int) -> np.ndarray:
  """The order of entries that belongs to an order of units of some width."""
  order = np.asarray(order)
  _check_int('width', width)
  if order.ndim != 1 or not np.array_equal(
    np.sort(order), np.arange(order.size)
  ):
    raise ValueError(
      f'order={order} is not a permutation of 0 ... {order.size - 1}'
    )
  return (order[:, None] * width + np.arange(width)).reshape(-1)


class Split(NamedTuple):
  """A matrix in two.

  Attributes:
    slice: (s, N) or (K, s), the trained values.
    frozen: the QArray (K, N), zero where the slice was.
  """

  slice: jax.Array
  frozen: QArray


def split(
  w: jax.Array,
  fmt: BlockFormat,
  start: int,
  stop: int,
  *,
  kind: str = 'sink',
  scale_rule: str | None = None,
) -> Split:
  """Takes a slice of a reordered matrix out and quantizes the rest.

  Args:
    w: (K, N).
    fmt: format of the rest, in blocks along K.
    start: a, first row of the slice (sink) or column (source).
    stop: b, one past the last.
    kind: 'sink' for rows, 'source' for columns.
    scale_rule: as in `quantize`.

  Returns:
    The slice in the dtype of `w`, and the rest. The codes of the rest are those
    of `quantize(w, fmt)`.

  Raises:
    ValueError: where a block would reach over an end of the slice.
  """
  w = as_float_array(w, 'w')
  check_format(fmt)
  _check_kind(kind)
  _check_range('w', w, start, stop, kind)
  axis = (-2, -1) if fmt.is_tile else -2
  q = ops.quantize(w, fmt, axis=axis, scale_rule=scale_rule)
  _check_blocks(q, start, stop, kind)
  inside = _at(w.shape, start, stop, kind)
  rest = ops.quantize(
    w.at[inside].set(0),
    fmt,
    axis=axis,
    scale_rule=scale_rule,
    tensor_scale=q.tensor_scale,
  )
  return Split(w[inside], rest)


def s2ft_dot(
  x: jax.Array,
  slice_: jax.Array,
  frozen: QArray | jax.Array,
  *,
  start: int = 0,
  kind: str = 'sink',
  rounded_x: jax.Array | None = None,
) -> jax.Array:
  """The product of x with a frozen matrix and its trained slice.

  Args:
    x: (..., K).
    slice_: D, (s, N) for a sink and (K, s) for a source; float.
    frozen: w_q, (K, N).
    start: a, where the slice begins.
    kind: 'sink' or 'source'.
    rounded_x: operand of the frozen product in place of `x`, such as
      `fake_quant(x, fmt)`. The slice always takes `x`.

  Returns:
    y, (..., N), in the promoted dtype of the operands.

  Derivative: of `x` and `slice_`, and of `rounded_x` by its own rule; none of
  `frozen`. Reverse mode; gradients differentiate in both modes. Saved for it:
  `slice_`, `frozen`, and x[..., a:b] (sink) or x (source).
  """
  _check_kind(kind)
  x = as_float_array(x)
  frozen = _matrix('frozen', frozen)
  across = 0 if kind == 'sink' else 1
  slice_, stop = _stop('slice_', slice_, start, kind)
  _check_range('frozen', frozen, start, stop, kind)
  expected = list(frozen.shape)
  expected[across] = stop - start
  if slice_.shape != tuple(expected) or x.shape[-1:] != frozen.shape[:1]:
    raise ValueError(
      f'slice_.shape={slice_.shape} and x.shape={x.shape} do not fit'
      f' frozen.shape={frozen.shape}: x is (..., K) and slice_ is'
      f' {"(s, N)" if kind == "sink" else "(K, s)"} for kind={kind!r}'
    )
  if rounded_x is not None:
    rounded_x = as_float_array(rounded_x, 'rounded_x')
    if rounded_x.shape != x.shape:
      raise ValueError(
        f'rounded_x.shape={rounded_x.shape} must be x.shape={x.shape}'
      )
  y = _frozen_dot(x if rounded_x is None else rounded_x, frozen)
  if kind == 'sink':
    return y + _slice_dot(x[..., start:stop], slice_)
  part = _slice_dot(x, slice_)
  dtype = promoted(y.dtype, part.dtype)
  return y.astype(dtype).at[..., start:stop].add(part.astype(dtype))


class Merged(NamedTuple):
  """A matrix with its slice quantized back into it.

  Attributes:
    weights: the QArray; outside of the slice the codes of the frozen one.
    error: |Q(A) - A| / |A| of the slice, Frobenius norms: what merging costs.
      Compare it with |A - A_0| / |A|, what training moved.
  """

  weights: QArray
  error: jax.Array


def merge(
  slice_: jax.Array,
  frozen: QArray,
  *,
  start: int = 0,
  kind: str = 'sink',
  scale_rule: str | None = None,
) -> Merged:
  """Quantizes the slice with the format of the frozen matrix, into it.

  Args:
    slice_: trained slice, or the delta of an adapter.
    frozen: the matrix it was trained beside.
    start: as in `s2ft_dot`.
    kind: as in `s2ft_dot`.
    scale_rule: that of `split`.
  """
  _check_kind(kind)
  qarray.check_qarray(frozen, 'frozen')
  slice_, stop = _stop('slice_', slice_, start, kind)
  _check_range('frozen', frozen, start, stop, kind)
  _check_fits('slice_', slice_, 'frozen', frozen, kind)
  _check_blocks(frozen, start, stop, kind)
  at = _at(frozen.shape, start, stop, kind)
  total = qarray.dequantize(frozen[at], jnp.float32) + slice_
  begin = (start, 0) if kind == 'sink' else (0, start)
  weights = ops.update_slice(
    frozen, total.astype(frozen.dtype), begin, scale_rule=scale_rule
  )
  part = weights[at]
  change = jnp.linalg.norm(qarray.dequantize(part, jnp.float32) - total)
  return Merged(weights, change / jnp.linalg.norm(total))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('order', 'delta'),
  meta_fields=('start', 'kind'),
)
@dataclasses.dataclass(frozen=True)
class Adapter:
  """The change that fine-tuning made to one matrix.

  Attributes:
    order: order of the matrix's K rows (sink) or N columns (source), new
      position -> old.
    delta: D, (s, N) or (K, s), in the reordered layout.
    start: a; the slice is `order[start:start + s]`.
    kind: 'sink' or 'source'.
  """

  order: jax.Array
  delta: jax.Array
  start: int
  kind: str


def make_adapter(
  slice_: jax.Array,
  frozen: QArray,
  base: QArray | jax.Array,
  order: Order,
  *,
  start: int = 0,
  kind: str = 'sink',
  width: int = 1,
) -> Adapter:
  """The trained slice as a difference to a base matrix.

  Args:
    slice_: trained slice.
    frozen: the matrix it was trained beside.
    base: the reordered matrix, quantized or not, that the adapter is for;
      `s2ft_dot(x, adapter.delta, base, ...)` then equals
      `s2ft_dot(x, slice_, frozen, ...)`.
    order: order of units that was applied before.
    start: as in `s2ft_dot`.
    kind: as in `s2ft_dot`.
    width: entries of a unit.
  """
  _check_kind(kind)
  frozen, base = qarray.check_qarray(frozen, 'frozen'), _matrix('base', base)
  slice_, stop = _stop('slice_', slice_, start, kind)
  _check_range('frozen', frozen, start, stop, kind)
  _check_fits('slice_', slice_, 'frozen', frozen, kind)
  if base.shape != frozen.shape:
    raise ValueError(
      f'base.shape={base.shape} must be frozen.shape={frozen.shape}'
    )
  at = _at(frozen.shape, start, stop, kind)
  order = expand(order, width)
  if len(order) != frozen.shape[0 if kind == 'sink' else 1]:
    raise ValueError(
      f'order has {len(order)} entries, which do not fit'
      f' frozen.shape={frozen.shape} and kind={kind!r}; width={width} is the'
      ' number of entries of a unit'
    )
  frozen_slice, base_slice = (
    jnp.asarray(w, slice_.dtype)[at] for w in (frozen, base)
  )
  delta = slice_ + (frozen_slice - base_slice)
  return Adapter(jnp.asarray(order, jnp.int32), delta, start, kind)


def fuse(w: jax.Array, adapter: Adapter) -> jax.Array:
  """Adds an adapter to a matrix in its original order.

  Args:
    w: (K, N), not reordered.
    adapter: made against a base of the same values.
  """
  w = as_float_array(w, 'w')
  if not isinstance(adapter, Adapter):
    raise TypeError(f'{adapter=} must be an Adapter, one of make_adapter')
  _check_kind(adapter.kind)
  count = adapter.delta.shape[0 if adapter.kind == 'sink' else 1]
  chosen = adapter.order[adapter.start : adapter.start + count]
  _check_fits('adapter.delta', adapter.delta, 'w', w, adapter.kind)
  delta = adapter.delta.astype(w.dtype)
  if adapter.kind == 'sink':
    return w.at[chosen].add(delta)
  return w.at[:, chosen].add(delta)


@jax.custom_vjp
def _frozen_dot(x, frozen):
  return ops.dot(x, frozen)


def _frozen_forward(x, frozen):
  # What is frozen has no derivative of second order either.
  frozen = jax.tree.map(lax.stop_gradient, frozen)
  # The empty array carries the dtype of x.
  return ops.dot(x, frozen), (frozen, jnp.zeros((0,), x.dtype))


def _frozen_backward(residuals, dy):
  frozen, empty = residuals
  dims = (((dy.ndim - 1,), (1,)), ((), ()))
  return ops.dot_general(dy, frozen, dims).astype(empty.dtype), None


_frozen_dot.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def _slice_dot(x, d):
  """x D; sums are in float32."""
  dtype = promoted(x.dtype, d.dtype)
  return jnp.dot(x, d, preferred_element_type=jnp.float32).astype(dtype)


def _slice_forward(x, d):
  return _slice_dot(x, d), (x, d)


def _slice_backward(residuals, dy):
  x, d = residuals
  wide = jnp.float32
  common = promoted(x.dtype, dy.dtype)
  dx = jnp.dot(dy, d.T, preferred_element_type=wide)
  leading = tuple(range(x.ndim - 1))
  dd = lax.dot_general(
    x.astype(common),
    dy.astype(common),
    ((leading, leading), ((), ())),
    preferred_element_type=wide,
  )
  return dx.astype(x.dtype), dd.astype(d.dtype)


_slice_dot.defvjp(_slice_forward, _slice_backward)


def _members(units: int, chosen, name: str) -> np.ndarray:
  _check_int('units', units)
  chosen = np.asarray(chosen).reshape(-1)
  if chosen.size and chosen.dtype.kind not in 'iu':
    raise TypeError(f'{name}={chosen!r} must be ints')
  chosen = chosen.astype(np.int64)
  inside = np.all((chosen >= 0) & (chosen < units))
  if not inside or len(np.unique(chosen)) != len(chosen):
    raise ValueError(
      f'{name}={chosen} must be different units of 0 ... {units - 1}'
    )
  mask = np.zeros(units, bool)
  mask[chosen] = True
  return mask


def _take(w, order: np.ndarray, axis: int):
  if isinstance(w, QArray):
    raise TypeError(
      'a QArray cannot be reordered, because its blocks would have to mix:'
      ' reorder the array and quantize it then'
    )
  if not hasattr(w, 'ndim'):
    raise TypeError(f'{w!r} is no array to reorder')
  if w.ndim < -axis or w.shape[axis] != len(order):
    raise ValueError(
      f'an array of shape {w.shape} has no axis {axis} of {len(order)} entries'
      ' to reorder, units of order times their width: sources are (..., units),'
      ' sinks (units, n)'
    )
  return jnp.take(w, order, axis=axis)


def _at(shape, start: int, stop: int, kind: str):
  inside = slice(start, stop)
  return (inside, slice(None)) if kind == 'sink' else (slice(None), inside)


def _check_kind(kind: str) -> None:
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r} is not one of {KINDS}')


def _matrix(name: str, w) -> QArray | jax.Array:
  return w if isinstance(w, QArray) else as_float_array(w, name)


def _stop(name: str, d, start: int, kind: str) -> tuple[jax.Array, int]:
  """A slice as an array, and where it ends."""
  d = as_float_array(d, name)
  if d.ndim != 2:
    raise ValueError(f'{name}.shape={d.shape} must be (s, N) or (K, s)')
  _check_int('start', start)
  return d, start + d.shape[0 if kind == 'sink' else 1]


def _check_fits(name: str, d, of: str, w, kind: str) -> None:
  along = 1 if kind == 'sink' else 0
  if d.ndim != 2 or w.ndim != 2 or d.shape[along] != w.shape[along]:
    raise ValueError(
      f'{name}.shape={d.shape} does not fit {of}.shape={w.shape}: it is'
      f' {"(s, N)" if kind == "sink" else "(K, s)"} for kind={kind!r}'
    )


def _check_int(name: str, value: object) -> None:
  if not isinstance(value, int | np.integer) or isinstance(value, bool):
    raise TypeError(f'{name}={value!r} must be an int')
  if abs(value) >= 1 << 31:
    raise ValueError(f'{name}={value!r} is too large')


def _check_range(name: str, w, start: int, stop: int, kind: str) -> None:
  if w.ndim != 2:
    raise ValueError(f'{name}.shape={w.shape} must be (K, N)')
  for end, value in (('start', start), ('stop', stop)):
    _check_int(end, value)
  size = w.shape[0 if kind == 'sink' else 1]
  if not 0 <= start < stop <= size:
    raise ValueError(
      f'the slice {start}:{stop} must be within the {size}'
      f' {"rows" if kind == "sink" else "columns"} of {name}'
    )


def _check_blocks(q: QArray, start: int, stop: int, kind: str) -> None:
  """Raises ValueError where a block of `q` reaches over an end of a slice."""
  axis = -2 if kind == 'sink' else -1
  sizes = dict(zip(q.axes, q.fmt.block, strict=True))
  if sizes.get(axis) == 0 and q.fmt.scale is not None:
    raise ValueError(
      f'{q.fmt} has one scale for the whole axis, so rows cannot leave it: use'
      ' a format with blocks'
    )
  try:
    jax.eval_shape(lambda q: q[_at(q.shape, start, stop, kind)], q)
  except IndexError as error:
    raise ValueError(
      f'blocks of {q.fmt} straddle the ends of the slice: {error}. Choose start'
      ' and stop so, with the argument multiple of select'
    ) from error
