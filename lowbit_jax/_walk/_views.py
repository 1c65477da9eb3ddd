"""Rules of the primitives that only rearrange: the result keeps the site."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax._typing import Key
from lowbit_jax._walk import _moves, _named, _versions
from lowbit_jax._walk._moves import NotAView, View, need
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._walker import NONE, Walk, rule
from lowbit_jax.ops import specs
from lowbit_jax.recipe import QuantSpec


def view(*primitives: str) -> Callable:
  """Registers a function (x, eqn, operands) -> Move for primitives whose first
  operand is what they rearrange."""

  def register(move: Callable) -> Callable:
    def apply(walk: Walk, eqn: Any, operands: list) -> Any:
      x, *others = operands
      if not isinstance(x, Named) or any(map(_named.is_named, others)):
        return NONE
      if not x.is_stored:
        values = [x.content, *others]
        return [x.of(y) for y in _versions.bind(eqn, values)]
      try:
        moved = _moves.apply(move(x, eqn, others), _named.viewed(x))
      except NotAView as reason:
        if x.is_part:
          return NONE
        why = f'{eqn.primitive.name}: {reason}'
        dense = walk.dense(eqn, x, why)
        return _versions.bind(eqn, [dense, *others])
      return [_marked(x, moved)]

    return rule(*primitives)(apply)

  return register


def _marked(x: Named, moved: Any) -> Named:
  """The view of x, which remembers a cast that would have rounded, and that it
  is one row of many: that is a look-up."""
  narrower = jnp.finfo(moved.dtype).bits < jnp.finfo(x.dtype).bits
  size, longest = math.prod(moved.shape), max(moved.shape, default=1)
  is_row = size == longest < math.prod(x.shape)
  return x.of(
    moved,
    is_narrowed=x.is_narrowed or narrower,
    is_part=x.is_part or is_row,
  )


@view('convert_element_type')
def _(x: Named, eqn: Any, others: list) -> View:
  dtype = eqn.params['new_dtype']
  need(jnp.issubdtype(dtype, jnp.floating), f'a cast to {dtype}')
  wider = jnp.finfo(dtype).bits > jnp.finfo(x.dtype).bits
  need(not (wider and x.is_narrowed), 'a cast there and back, which rounds')
  return _moves.cast(dtype)


@view('transpose')
def _(x, eqn, others) -> View:
  return _moves.transpose(eqn.params['permutation'])


@view('reshape')
def _(x, eqn, others) -> View:
  need(eqn.params.get('dimensions') is None, 'a reshape that transposes')
  return _moves.reshape(x.shape, eqn.outvars[0].aval.shape)


@view('squeeze')
def _(x, eqn, others) -> View:
  return _moves.squeeze(eqn.params['dimensions'], len(x.shape))


@view('broadcast_in_dim')
def _(x, eqn, others) -> View:
  need(not others, 'its shape is traced')
  params = eqn.params
  return _moves.broadcast(params['shape'], params['broadcast_dimensions'])


@view('slice')
def _(x, eqn, others) -> View:
  params = eqn.params
  strides = params['strides'] or [1] * len(x.shape)
  ends = zip(
    params['start_indices'], params['limit_indices'], strides, strict=True
  )
  return _moves.index([slice(*end) for end in ends])


@view('dynamic_slice')
def _(x, eqn, others) -> View:
  return _moves.dynamic_slice(others, eqn.params['slice_sizes'])


@view('stop_gradient')
def _(x, eqn, others) -> View:
  return _moves.leafwise(lax.stop_gradient)


@view('copy', 'copy_p', 'name', 'pvary', 'pcast')
def _(x, eqn, others) -> View:
  return _moves.leafwise(lambda leaf: _versions.bind(eqn, [leaf])[0])


@view('all_gather')
def _(x, eqn, others) -> View:
  params = eqn.params
  return _moves.gathered(
    lambda leaf: _versions.bind(eqn, [leaf])[0],
    params['all_gather_dimension'],
    params['tiled'],
  )


@view('sharding_constraint')
def _(x, eqn, others) -> View:
  place = lax.with_sharding_constraint
  return _moves.placed(place, eqn.params['sharding'])


@view('reshard')
def _(x, eqn, others) -> View:
  return _moves.placed(jax.sharding.reshard, eqn.params['dst_sharding'])


@rule('split')
def _split(walk: Walk, eqn: Any, operands: list) -> Any:
  (x,), params = operands, eqn.params
  if not x.is_stored:
    return [x.of(y) for y in _versions.bind(eqn, [x.content])]
  try:
    pieces = _moves.split(_named.viewed(x), params['axis'], params['sizes'])
  except NotAView as reason:
    return _versions.bind(eqn, [walk.dense(eqn, x, f'split: {reason}')])
  return [x.of(piece) for piece in pieces]


@rule('concatenate')
def _concatenate(walk: Walk, eqn: Any, operands: list) -> Any:
  if not all(map(_named.is_packed, operands)):
    return NONE
  try:
    parts = [_named.viewed(x) for x in operands]
    whole = _moves.concatenate(parts, eqn.params['dimension'])
  except NotAView as reason:
    dense = [walk.dense(eqn, x, f'concatenate: {reason}') for x in operands]
    return _versions.bind(eqn, dense)
  sites = dict.fromkeys(x.site for x in operands)
  return [operands[0].of(whole, site=' + '.join(sites))]


@rule('optimization_barrier')
def _barrier(walk: Walk, eqn: Any, operands: list) -> Any:
  del walk, eqn
  return list(lax.optimization_barrier(tuple(operands)))


@rule('gather')
def _gather(walk: Walk, eqn: Any, operands: list) -> Any:
  """A look-up gives the rows, still packed: only these are decoded."""
  x, indices = operands
  if not isinstance(x, Named) or isinstance(indices, Named):
    return NONE
  if not x.is_stored:
    outputs = walk.use.look_up(walk, eqn, x, indices)
    if outputs is not NONE:
      return outputs
    return [x.of(y) for y in _versions.bind(eqn, [x.content, indices])]
  params, (out,) = eqn.params, eqn.outvars
  q = _named.viewed(x)
  numbers, sizes = params['dimension_numbers'], params['slice_sizes']
  try:
    move = _moves.look_up(indices, numbers, sizes)
    rows = x.of(_moves.apply(move, q), is_part=True)
  except NotAView as reason:
    if x.is_part:
      return NONE
    dense = walk.dense(eqn, x, f'gather: {reason}')
    return _versions.bind(eqn, [dense, indices])
  walk.use.looks_up(walk, eqn, x)
  if params['mode'] != lax.GatherScatterMode.FILL_OR_DROP:
    return [rows]
  # Rows outside hold the fill value.
  ones = jnp.zeros(_moves.outline(q, numbers, sizes), bool)
  outside = lax.gather(
    ones,
    indices,
    numbers,
    tuple(min(n, m) for n, m in zip(sizes, ones.shape, strict=True)),
    mode='fill',
    fill_value=True,
  )
  fill = jnp.nan if params['fill_value'] is None else params['fill_value']
  filled = jnp.where(outside, jnp.asarray(fill, q.dtype), _named.dense(rows))
  return [filled.astype(out.aval.dtype)]


def quantized_rows(
  eqn: Any, x: Named, indices: Any, spec: QuantSpec, key: Key | None
) -> jax.Array:
  """A look-up in a fake-quantized table: only its rows are quantized where
  they do not depend on others."""
  sizes = eqn.params['slice_sizes']
  numbers = eqn.params['dimension_numbers']
  rows_are_whole = sizes[-1] == x.shape[-1] and numbers.offset_dims
  if spec.fmt.is_tile or spec.fmt.tensor_scale or not rows_are_whole:
    axis = (-2, -1) if spec.fmt.is_tile else -1
    table = specs.fake_quant(x.content, spec, axis, key=key)
    return _versions.bind(eqn, [table, indices])[0]
  (rows,) = _versions.bind(eqn, [x.content, indices])
  return specs.fake_quant(rows, spec, numbers.offset_dims[-1], key=key)
