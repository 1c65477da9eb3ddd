"""What a policy does to one product: train it, quantize its operands, or
fake-quantize its weight."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import _held_scales, _quantize as core, ops
from lowbit_jax._typing import DotDims, Key
from lowbit_jax._walk import _named
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._products import Call, resharded
from lowbit_jax.ops import _qdot, specs
from lowbit_jax.qarray import QArray
from lowbit_jax.recipe import GemmSpec, Quantizer, QuantSpec, Recipe


def train(
  call: Call, recipe: Recipe, key: Key | None, scales: Any
) -> tuple[jax.Array, Any]:
  """The product as a recipe trains it.

  Args:
    call: a 'dot_general' of arrays, of which one is the weight.
    recipe: without switches.
    key: if the recipe draws random bits.
    scales: `DotScales` of held scales, or None.

  Returns:
    The result, and the largest magnitudes to be held of x and w.
  """
  x, w, dims, order = _oriented(call)
  precision = call.product.params['precision']
  out = call.eqn.outvars[0].aval

  def one(x, w, key):
    x, w, shape = _qdot.matrices(x, w, dims)
    options = {'key': key, 'precision': precision}
    if scales is None:
      return ops.qdot(x, w, recipe, **options).reshape(shape), (None, None)
    y, after = _held_scales.qdot(x, w, recipe, scales, **options)
    return y.reshape(shape), tuple(s and s.seen for s in after)

  # Members of a batch are products of their own.
  batch = len(dims[1][0])
  x, w, dims = _batch_first(x, w, dims)
  many, sizes = one, x.shape[:batch]
  for _ in range(batch):
    many = jax.vmap(many, (0, 0, None if key is None else 0))
  keys = key if key is None or not batch else jax.random.split(key, sizes)
  y, seen = many(x, w, keys)
  seen = jax.tree.map(lambda amax: jnp.max(amax), seen)
  y = y.transpose(order).astype(out.dtype)
  return resharded(y, out), seen


def _oriented(call: Call) -> tuple[Any, Any, DotDims, list[int]]:
  """(x, w, dimension numbers, order of axes of the result)."""
  lhs, rhs = (_named.dense(x) for x in call.operands)
  contracted, batch = call.product.params['dimension_numbers']
  count = len(batch[0])
  free = [lhs.ndim - len(contracted[0]) - count]
  free.append(rhs.ndim - len(contracted[1]) - count)
  order = list(range(count + sum(free)))
  if call.product.weight != 'lhs':
    return lhs, rhs, (contracted, batch), order
  # The result of the exchanged product has the axes of x first.
  order = [*range(count), *range(count + free[1], len(order))]
  order += range(count, count + free[1])
  return rhs, lhs, (contracted[::-1], batch[::-1]), order


def _batch_first(
  x: jax.Array, w: jax.Array, dims: DotDims
) -> tuple[jax.Array, jax.Array, DotDims]:
  """The same product with batch axes in front, and its numbers without them."""
  operands, contracted = [], []
  for t, k, b in zip((x, w), *dims, strict=True):
    rest = [d for d in range(t.ndim) if d not in b]
    operands.append(t.transpose(*b, *rest))
    contracted.append(tuple(rest.index(d) for d in k))
  return *operands, (tuple(contracted), ((), ()))


def quantized(call: Call, gemm: GemmSpec, key: Key | None) -> jax.Array:
  """The product of operands that are quantized while the program runs.

  Args:
    call: any product; weights that are stored stay as they are.
    gemm: `lhs` for activations, `rhs` for weights that are arrays.
    key: if one of them draws random bits.
  """
  left = call.product.weight == 'lhs'
  sides = (gemm.rhs, gemm.lhs) if left else (gemm.lhs, gemm.rhs)
  keys = (None, None) if key is None else tuple(jax.random.split(key))
  if call.product.op not in ('dot_general', 'ragged_dot'):
    left, right = map(_fake, (call, call), (0, 1), sides, keys)
    return call.of(left, right, *call.operands[2:]).plain()
  contents, scale = list(call.contents), 1.0
  for i, (spec, k) in enumerate(zip(sides, keys, strict=True)):
    if not isinstance(spec, QuantSpec):
      contents[i] = _content(_fake(call, i, spec, k))
    elif not _named.is_stored(contents[i]):
      contents[i] = _packed(call, i, spec, k)
      scale *= spec.prescale
  y = call.by_ops(*contents)
  return y if scale == 1 else y * jnp.asarray(1 / scale, y.dtype)


def _packed(call: Call, side: int, spec: QuantSpec, key: Key | None) -> QArray:
  x = call.contents[side]
  job = specs.quantization(x, spec, block_axes(call, side, spec), key=key)
  return core.pack(job, x.dtype)


def fake(call: Call, spec: QuantSpec, key: Key | None) -> jax.Array:
  """The product with a fake-quantized weight."""
  side = int(call.product.weight == 'rhs')
  operands = list(call.operands)
  operands[side] = _fake(call, side, spec, key)
  return call.of(*operands).plain()


def _fake(
  call: Call, side: int, spec: QuantSpec | Quantizer | None, key: Key | None
) -> Any:
  """An operand in the values that a quantizer gives it."""
  x = call.contents[side]
  if spec is None or _named.is_stored(x):
    return call.operands[side]
  if isinstance(spec, QuantSpec):
    return specs.fake_quant(x, spec, block_axes(call, side, spec), key=key)
  return spec(x, _axes(call, side)[0][-1], key)


def _content(x: Any) -> Any:
  return x.content if isinstance(x, Named) else x


def block_axes(call: Call, side: int, spec: QuantSpec) -> int | tuple[int, int]:
  """Along the last contracted axis of an operand; tiles also along its last
  free one."""
  contracted, free = _axes(call, side)
  if not spec.fmt.is_tile:
    return contracted[-1]
  if not free:
    raise ValueError(
      f'site {call.product.site!r}: tiles of {spec.fmt} span two axes, and the'
      f' operand {call.contents[side].shape} has none but those that are'
      ' contracted; use a format with blocks along one axis'
    )
  return contracted[-1], free[-1]


def _axes(call: Call, side: int) -> tuple[Sequence[int], Sequence[int]]:
  """Contracted and free axes of an operand."""
  op, params = call.product.op, call.product.params
  ndim = len(call.contents[side].shape)
  if op == 'conv_general_dilated':
    numbers = params['dimension_numbers']
    if side == 0:
      batch, features, *spatial = numbers.lhs_spec
      return (*spatial, features), (batch,)
    out, features, *spatial = numbers.rhs_spec
    return (*spatial, features), (out,)
  if op == 'dot_general':
    contracted, batch = params['dimension_numbers']
    gone = {*contracted[side], *batch[side]}
    free = [d for d in range(ndim) if d not in gone]
    return contracted[side], free
  numbers = params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  gone = {*contracted[side], *batch[side]}
  if side:
    gone |= {*numbers.rhs_group_dimensions}
  free = [d for d in range(ndim) if d not in gone]
  return contracted[side], free


def describe(treatment: Any) -> str:
  """A treatment in a few words."""
  if isinstance(treatment, Recipe):
    return f'trains by {treatment.name!r}'
  if isinstance(treatment, QuantSpec):
    return f'weight fake-quantized to {treatment.fmt}'
  names = [
    None if s is None else str(getattr(s, 'fmt', s))
    for s in (treatment.lhs, treatment.rhs)
  ]
  return (
    f'activations {names[0] or "as they are"}, weight {names[1] or "as it is"}'
  )
