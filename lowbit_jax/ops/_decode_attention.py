"""decode_attention: the last tokens of sequences against a cache.

A loop over chunks of positions keeps, for every row of the result, the largest
score m so far and the sums that are taken against it (Milakov and
Gimelshein 2018):

    m'   = max(m, s)               s: scores of a chunk
    l'   = l exp(m - m') + sum(exp(s - m'))
    acc' = acc exp(m - m') + exp(s - m') values

and acc / l is the result. The loop runs from the first position that a query
sees to the last one, and each step slices its chunk out of the whole cache, so
that nothing else of the cache is read. The derivative stands above the choice
of implementation: it is that of the same formula over all positions.

Axes: b batch, t tokens, k heads of the cache, g heads of a query that share one
of them, s positions of a chunk, h channels.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit
from lowbit_jax._typing import ArrayLike, Implementation
from lowbit_jax.numerics._codec import FLOAT_DTYPES
from lowbit_jax.ops import _dispatch, _operand
from lowbit_jax.ops._softmax import softmax
from lowbit_pallas.arith import loops

# Positions of a chunk.
CHUNK = 128
# A window without an end, which no sum of positions overflows.
_ENDLESS = 1 << 30

# (query, keys, values, lengths, layer, window, scale).
PlanArguments = tuple[Any, Any, Any, Any, Any, Any, float]


def decode_attention(
  query: ArrayLike,
  keys: ArrayLike,
  values: ArrayLike,
  lengths: ArrayLike,
  *,
  layer: ArrayLike | None = None,
  scale: float | np.floating | None = None,
  window: ArrayLike | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """Attention of the last tokens of sequences, of whose cache the filled part
  alone is read.

  Token t of a sequence stands at position `length - tokens + t` and sees the
  positions up to its own, as in `jax.nn.dot_product_attention` with that mask.
  Scores, softmax and sums are in float32, and the result is rounded once.

  Args:
    query: (batch, tokens, heads, size) of float32, bfloat16 or float16: one
      token or a few of each sequence, the last ones.
    keys: the cache (batch, positions, kv_heads, size) of the same dtypes, the
      tokens themselves included. `heads` is a multiple of `kv_heads`: with
      n = heads / kv_heads the first n heads share the first one, and so on.
      With `layer` it has a leading axis of layers.
    values: the cache (batch, positions, kv_heads, value_size), likewise.
    lengths: int32 scalar or (batch,): how many positions are filled, those of
      the tokens included.
    layer: which layer of the cache to read, in place; an integer, which may be
      traced. None for a cache without an axis of layers.
    scale: number that multiplies the scores; None for 1 / sqrt(size).
    window: how many positions a token sees, its own included: those after
      `position - window`. A positive integer, which may be traced; None for all
      of them.
    implementation: 'cpu', 'xla', or a list of names; the first that supports
      the operands runs. None tries all of them.

  Returns:
    (batch, tokens, heads, value_size) in the dtype of `query`. A token that
    sees no position, since its own is negative or its (traced) window not
    positive, gives 0. What no token of a sequence sees has no influence on it,
    NaN included; a NaN or an infinity of `values` at a position that one of its
    tokens sees may reach all of them, as in `jax.nn.dot_product_attention`.

  Raises:
    TypeError, ValueError: for arguments that do not fit, with the remedy. Of
      lengths, layer and window that are JAX arrays the value is not looked at:
      positions beyond the cache are not seen, a layer is clipped.
    NotImplementedError: if no requested implementation supports the operands.

  Derivative: forward and reverse mode, of any order, with respect to `query`,
  `keys` and `values`, in float32. It reads all positions of the layer; what no
  token of a sequence sees has a zero gradient.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax.ops import decode_attention
    >>> query = jnp.ones((1, 1, 4, 8))
    >>> keys = jnp.ones((3, 1, 512, 2, 8))  # of 3 layers, for 512 positions
    >>> values = jnp.full((3, 1, 512, 2, 8), jnp.nan).at[2, :, :5].set(7.0)
    >>> y = decode_attention(query, keys, values, 5, layer=2)
    >>> y.shape, float(y[0, 0, 0, 0])
    ((1, 1, 4, 8), 7.0)
  """
  *arrays, scale = operands(
    query, keys, values, lengths, layer=layer, scale=scale, window=window
  )
  _dispatch.requested(implementation, TABLE)
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  return _compiled(*arrays, scale, implementation)


def operands(
  query: ArrayLike | jax.ShapeDtypeStruct,
  keys: ArrayLike | jax.ShapeDtypeStruct,
  values: ArrayLike | jax.ShapeDtypeStruct,
  lengths: ArrayLike | jax.ShapeDtypeStruct,
  *,
  layer: ArrayLike | jax.ShapeDtypeStruct | None = None,
  scale: float | np.floating | None = None,
  window: ArrayLike | jax.ShapeDtypeStruct | None = None,
  **_: Any,
) -> PlanArguments:
  """Checked arguments of the plans, with integers in int32."""
  q = _checked_floats('query', query)
  k, v = _checked_floats('keys', keys), _checked_floats('values', values)
  _check_shapes(q.shape, k.shape, v.shape, layer is not None)
  batch, positions = k.shape[-4:-2]
  lengths = _checked_integers(
    'lengths', lengths, ((), (batch,)), 0, positions, 'positions of the cache'
  )
  if layer is not None:
    last = k.shape[0] - 1
    layer = _checked_integers('layer', layer, ((),), 0, last, 'last layer')
  if window is not None:
    window = _checked_integers('window', window, ((),), 1)
  return q, k, v, lengths, layer, window, _checked_scale(scale, q.shape[-1])


def plan_xla(
  query: Any,
  keys: Any,
  values: Any,
  lengths: Any,
  layer: Any,
  window: Any,
  scale: float,
) -> _dispatch.Plan:
  """Plans a loop over chunks."""
  del query, keys, values, lengths, layer, window
  run = functools.partial(_by_chunks, scale=scale)
  return _dispatch.Plan('one chunk of positions after the other', run)


def _plan_cpu(*arguments: Any) -> _dispatch.Plan:
  from lowbit_jax.ops import _decode_attention_cpu

  return _decode_attention_cpu.plan(_by_chunks, *arguments)


TABLE = {
  'cpu': _plan_cpu,
  'xla': plan_xla,
}


@functools.partial(jax.jit, static_argnums=(6, 7), inline=True)
def _compiled(
  query, keys, values, lengths, layer, window, scale: float, implementation
) -> jax.Array:
  def attend(*operands):
    return _dispatch.run(
      'decode_attention', TABLE, implementation, operands, scale
    )

  def run(*operands):
    return _attention(*operands, scale, attend)

  if layer is not None:
    layer = jnp.clip(layer, 0, keys.shape[0] - 1)
  arrays = query, keys, values, lengths, layer, window
  return _explicit.automatic(run, _specs, *arrays)


def _specs(result, query, keys, values, *rest) -> PartitionSpec:
  """The spec of the result: sequences, tokens and heads stay split."""
  del result, keys, rest
  return PartitionSpec(*_explicit.parts(query)[:3], _explicit.parts(values)[-1])


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(6, 7))
def _attention(
  query, keys, values, lengths, layer, window, scale, attend
) -> jax.Array:
  del scale
  return attend(query, keys, values, lengths, layer, window)


def _attention_jvp(scale, attend, primals, tangents):
  out = _attention(*primals, scale, attend)
  arrays, places = list(primals[:3]), primals[3:]
  moves = map(_operand.moving, arrays, tangents)
  moving = {i: move for i, move in enumerate(moves) if move is not None}

  def formula(*some):
    for i, x in zip(moving, some, strict=True):
      arrays[i] = x
    return _at_once(*arrays, *places, scale=scale)

  moved = tuple(primals[i] for i in moving)
  return out, jax.jvp(formula, moved, tuple(moving.values()))[1]


_attention.defjvp(_attention_jvp, symbolic_zeros=True)


def _by_chunks(
  query, keys, values, lengths, layer, window, *, scale: float
) -> jax.Array:
  """The result, of which each step of a loop adds one chunk."""
  batch, positions, kv_heads, size = values.shape[-4:]
  tokens, heads = query.shape[1:3]
  if 0 in (*query.shape, positions, size):
    return jnp.zeros((*query.shape[:3], size), query.dtype)

  # What the loop runs over: from the first position to the last that are seen.
  low, high = _seen(query, keys, lengths, window)
  sees = low < high
  first = jnp.min(jnp.where(sees, low, positions))
  last = jnp.max(high)
  chunk = min(CHUNK, positions)
  chunks = lax.div(last - first + (chunk - 1), jnp.int32(chunk))
  rows = _grouped(query, kv_heads, scale)

  def add_chunk(i, state):
    # A chunk that would reach beyond the cache begins before its turn.
    turn = first + i * chunk
    start = jnp.minimum(turn, positions - chunk)
    place = start + jnp.arange(chunk, dtype=jnp.int32)
    live = _between(place, jnp.maximum(low, turn), high)
    used = jnp.any(live, 1)
    key = _chunk(keys, layer, start, chunk)
    value = lax.cond(
      jnp.all(used),
      lambda value, used: value,
      _only,
      _chunk(values, layer, start, chunk),
      used,
    )
    return _added(state, rows, key, value, live[:, None, None])

  # The largest score, the sum of exponentials, and that times the values.
  shape = (batch, kv_heads, heads // kv_heads, tokens)
  starts = (shape, -jnp.inf), (shape, 0.0), ((*shape, size), 0.0)
  state = tuple(jnp.full(*start, jnp.float32) for start in starts)
  state = tuple(loops.carry(x, query, keys, values, low, layer) for x in state)
  _, total, out = lax.fori_loop(jnp.int32(0), chunks, add_chunk, state)

  # The quotients, and 0 where a token sees nothing.
  sees = sees[:, None, None]
  out = out / jnp.where(sees, total, 1.0)[..., None]
  return _ungrouped(jnp.where(sees[..., None], out, 0.0), query)


def _at_once(
  query, keys, values, lengths, layer, window, *, scale: float
) -> jax.Array:
  """The result by scores of all positions."""
  low, high = _seen(query, keys, lengths, window)
  if layer is not None:
    keys, values = (
      lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values)
    )
  positions, kv_heads = keys.shape[1:3]
  live = _between(jnp.arange(positions, dtype=jnp.int32), low, high)
  used = jnp.any(live, 1)
  key, value = (_only(x.astype(jnp.float32), used) for x in (keys, values))
  scores = _scores(_grouped(query, kv_heads, scale), key)
  shares = softmax(scores, where=live[:, None, None], implementation='xla')
  return _ungrouped(_weighted(shares, value), query)


def _seen(query, keys, lengths, window) -> tuple[jax.Array, jax.Array]:
  """The first position that each token (b, t) sees, and the one after the last,
  which is greater unless the token sees none."""
  batch, tokens = query.shape[:2]
  lengths = jnp.broadcast_to(lengths, (batch,))[:, None]
  steps = jnp.arange(1 - tokens, 1, dtype=jnp.int32)[None]
  after = lengths + steps
  low = jnp.zeros_like(after)
  if window is not None:
    low = jnp.maximum(low, after - jnp.minimum(window, _ENDLESS))
  return low, jnp.minimum(after, keys.shape[-3])


def _between(place: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """Which of the positions (s,) each token sees: (b, t, s)."""
  place = place[None, None]
  return (low[..., None] <= place) & (place < high[..., None])


def _chunk(cache, layer, start, chunk: int) -> jax.Array:
  """Positions of a layer in float32: (b, chunk, k, h)."""
  at, sizes = [jnp.int32(0)] * cache.ndim, list(cache.shape)
  at[-3], sizes[-3] = start, chunk
  if layer is not None:
    at[0], sizes[0] = layer, 1
  # Else XLA may take what it does to the chunk out of the loop, to the whole
  # cache: to float32 where it slices no bfloat16, to another layout.
  cache, at = lax.optimization_barrier((cache, at))
  part = lax.dynamic_slice(cache, at, sizes)
  return part.reshape(sizes[-4:]).astype(jnp.float32)


def _only(x: jax.Array, used: jax.Array) -> jax.Array:
  """Keys or values (b, s, k, h), and 0 where no token sees the position."""
  return jnp.where(used[..., None, None], x, 0.0)


def _added(state, rows, key, value, live):
  """The state with the scores of a chunk, as at the top of this module."""
  top, total, out = state
  scores = jnp.where(live, _scores(rows, key), -jnp.inf)
  new_top = jnp.maximum(top, jnp.max(scores, -1))
  # Where nothing was seen yet, -inf less -inf would be NaN.
  shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
  kept = jnp.exp(top - shift)
  weights = jnp.exp(scores - shift[..., None])
  total = total * kept + jnp.sum(weights, -1)
  return new_top, total, out * kept[..., None] + _weighted(weights, value)


def _grouped(query: jax.Array, kv_heads: int, scale: float) -> jax.Array:
  """Queries times the scale: (b, k, g, t, h) in float32."""
  batch, tokens, heads, size = query.shape
  x = query.astype(jnp.float32) * scale
  x = x.reshape(batch, tokens, kv_heads, heads // kv_heads, size)
  return x.transpose(0, 2, 3, 1, 4)


def _scores(rows: jax.Array, key: jax.Array) -> jax.Array:
  """(b, k, g, t, s)."""
  return jnp.einsum('bkgth,bskh->bkgts', rows, key, precision='highest')


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
  """(b, k, g, t, h)."""
  return jnp.einsum('bkgts,bskh->bkgth', weights, value, precision='highest')


def _ungrouped(out: jax.Array, query: jax.Array) -> jax.Array:
  """(b, k, g, t, h) as (b, t, heads, h) in the dtype of the query."""
  shape = (*query.shape[:3], out.shape[-1])
  return out.transpose(0, 3, 1, 2, 4).reshape(shape).astype(query.dtype)


def _checked_floats(name: str, x: Any) -> Any:
  if not isinstance(x, jax.ShapeDtypeStruct):
    x = jnp.asarray(x)
  if x.dtype.name not in FLOAT_DTYPES:
    raise TypeError(
      f'{name}.dtype={x.dtype.name} is not one of {FLOAT_DTYPES}: cast it first'
    )
  return x


def _check_shapes(
  query: tuple, keys: tuple, values: tuple, has_layer: bool
) -> None:
  shapes = f'query.shape={query}, keys.shape={keys}, values.shape={values}'
  if len(query) != 4:
    raise ValueError(
      f'{query=} must be the shape (batch, tokens, heads, size); add axes of'
      ' size 1'
    )
  rank = 5 if has_layer else 4
  if not len(keys) == len(values) == rank:
    remedy = 'add one, or leave layer out' if has_layer else 'give layer'
    raise ValueError(
      f'{shapes}: keys and values must be (batch, positions, kv_heads, size),'
      f' with an axis of layers before these if layer is given, and only then;'
      f' {remedy}'
    )
  batch, _, heads, size = query
  if keys[:-1] != values[:-1] or (keys[-4], keys[-1]) != (batch, size):
    raise ValueError(
      f'{shapes} must agree in batch, keys and values in all axes but the last,'
      ' query and keys in the last; broadcast or transpose them'
    )
  kv_heads = keys[-2]
  if size == 0 or kv_heads == 0 or heads % kv_heads:
    raise ValueError(
      f'{shapes}: {heads=} must be a multiple of {kv_heads=}, and {size=} must'
      ' be positive; repeat heads of keys and values until it is'
    )


def _checked_integers(
  name: str,
  x: Any,
  shapes: tuple[tuple[int, ...], ...],
  least: int,
  most: int | None = None,
  what: str = '',
) -> Any:
  """An int32 array, whose value is looked at where it is no array of JAX."""
  is_known = not isinstance(x, jax.Array | jax.ShapeDtypeStruct)
  array: Any = np.asarray(x) if is_known else x
  if array.dtype == object or not jnp.issubdtype(array.dtype, jnp.integer):
    raise TypeError(
      f'{name}={x!r} must be integers, as an int, a NumPy or a JAX array; cast'
      ' with astype(int)'
    )
  if array.shape not in shapes:
    raise ValueError(
      f'{name}={x!r} has shape {array.shape}, which must be one of {shapes}'
    )
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, jnp.int32)
  if is_known and array.size:
    if array.min() < least or (most is not None and array.max() > most):
      upper = '' if most is None else f' and at most {most}, the {what}'
      raise ValueError(f'{name}={x!r} must be at least {least}{upper}')
  array = jnp.asarray(np.minimum(array, _ENDLESS) if is_known else array)
  if array.dtype in (jnp.int64, jnp.uint64, jnp.uint32):
    array = jnp.minimum(array, _ENDLESS)
  return array.astype(jnp.int32)


def _checked_scale(scale: Any, size: int) -> float:
  if scale is None:
    return 1 / math.sqrt(size)
  if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
    raise TypeError(
      f'{scale=} must be a number or None: multiply query by an array and give'
      ' scale=1'
    )
  if not math.isfinite(scale):
    raise ValueError(f'{scale=} must be finite')
  return float(scale)
