"""dot, dot_general and einsum on Array | QArray, and their derivative.

The derivative stands above the choice of implementation. The product P is
bilinear in the dequantized operands, so with A, B their dense values

    dP = P(dA, B) + P(A, dB).

dA is the tangent of an array, or, for a QArray, that of its float leaves (scale
and tensor_scale: codes have no tangent). Dense values of the other operand are
recomputed in the backward pass, so residuals hold packed codes only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit
from lowbit_jax._low_rank import LowRank
from lowbit_jax._typing import DotDims, DTypeLike, Implementation, Precision
from lowbit_jax.numerics._codec import as_dtype, promoted
from lowbit_jax.ops import (
  _dispatch,
  _dot_kernels,
  _low_rank,
  _operand,
)
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Operand, Shaped, dense

# (lhs, rhs, dimension numbers, precision).
PlanArguments = tuple[Any, Any, DotDims, Precision]


def _from_either_side(plan: Callable[..., Plan]) -> Callable[..., Plan]:
  """A plan that takes a weight on the left as one on the right."""

  def plan_either(lhs, rhs, dims: DotDims, precision: Precision) -> Plan:
    if not _is_left_weight(lhs, rhs):
      return plan(lhs, rhs, dims, precision)
    (lhs_k, rhs_k), (lhs_b, rhs_b) = dims
    exchanged = (rhs_k, lhs_k), (rhs_b, lhs_b)
    note, product, is_portable = plan(rhs, lhs, exchanged, precision)
    first, n = len(rhs_b), rhs.ndim - len(rhs_k) - len(rhs_b)

    def run(lhs, rhs):
      # The axes of the array stand before those of the weight.
      out = product(rhs, lhs)
      return jnp.moveaxis(out, range(first, first + n), range(-n, 0))

    return Plan(f'exchanges the operands: {note}', run, is_portable)

  return plan_either


def _is_left_weight(lhs: Shaped, rhs: Shaped) -> bool:
  """Whether the left operand is stored and meets an array that is no larger.

  Activations that are stored meet a larger one, next to which their dense
  values are small. A symbolic number of elements is that of activations.
  """
  if not _operand.is_stored(lhs) or _operand.is_stored(rhs):
    return False
  ours, others = math.prod(lhs.shape), math.prod(rhs.shape)
  if not isinstance(others, int):
    return True
  return isinstance(ours, int) and ours >= others


def _plan_cpu(*arguments: Any) -> Plan:
  from lowbit_jax.ops import _dot_cpu

  return _dot_cpu.plan(*arguments)


TABLE = {
  'tpu': _from_either_side(_dot_kernels.plan_tpu),
  'mosaic_gpu': _from_either_side(_dot_kernels.plan_mosaic_gpu),
  'cpu': _from_either_side(_plan_cpu),
  'xla': _from_either_side(_dot_kernels.plan_xla),
}


class _Call(NamedTuple):
  """Static part of a product."""

  dims: DotDims
  precision: Precision
  implementation: Implementation


def dot(
  lhs: Operand,
  rhs: Operand,
  *,
  preferred_element_type: DTypeLike | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """`jnp.dot` on arrays and QArrays: the last axis of `lhs` with the last but
  one of `rhs`.

  Args:
    lhs: `(..., k)` array or QArray.
    rhs: `(k,)` or `(..., k, n)` array or QArray. Blocks along k are what is
      fast; other layouts are dequantized first. Either operand may also be an
      `ops.Transformed` or an `ops.LowRank`, and a QArray on the left is
      contracted as one on the right where it has as many elements as the
      array.
    preferred_element_type: dtype of the result; None for the promoted dtype.
    implementation: 'tpu', 'mosaic_gpu', 'cpu' or 'xla', or a list of names; the
      first that supports the operands runs. None tries all of them, kernels
      first. If none does, NotImplementedError says why.

  Returns:
    The product, accumulated in float32 (or int32 and then float32). With a
    QArray it is split, on explicit mesh axes, as the axes that are not
    contracted; two arrays follow the rules of JAX.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> lowbit.dot(jnp.ones((2, 64)), w).shape
    (2, 8)
  """
  left, right, dims = _dot_dims(lhs, rhs)
  return dot_general(
    left,
    right,
    dims,
    preferred_element_type=preferred_element_type,
    implementation=implementation,
  )


def dot_general(
  lhs: Operand,
  rhs: Operand,
  dimension_numbers: DotDims,
  *,
  precision: Precision = None,
  preferred_element_type: DTypeLike | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """`lax.dot_general` on arrays and QArrays.

  Args:
    lhs: array or QArray.
    rhs: array or QArray.
    dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch,
      rhs_batch))`.
    precision: as in `lax.dot_general`.
    preferred_element_type: dtype of the result; None for the promoted dtype.
    implementation: as in `dot`.

  Returns:
    The product, see `dot`.

  Raises:
    TypeError: for float64 beside a QArray; also for operands that are neither
      QArrays nor float arrays.
    ValueError: for dimension numbers that do not fit.

  Derivative: that of the product of the dequantized operands, with respect to
  arrays and to the float scales of QArrays; forward and reverse mode.
  """
  if preferred_element_type is not None:
    dtype = as_dtype(preferred_element_type, 'preferred_element_type')
  else:
    dtype = promoted(
      *(_operand.checked(x, s).dtype for x, s in ((lhs, 'lhs'), (rhs, 'rhs')))
    )
  check_precision(precision)
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  if isinstance(lhs, LowRank) or isinstance(rhs, LowRank):
    dims = check_dims(
      _operand.checked(lhs, 'lhs'),
      _operand.checked(rhs, 'rhs'),
      dimension_numbers,
    )
    call = _Call(dims, precision, implementation)
    return _with_term(lhs, rhs, call, dtype)
  left, right, dims, _ = dot_general_operands(lhs, rhs, dimension_numbers)
  call = _Call(dims, precision, implementation)
  if not (_operand.is_stored(left) or _operand.is_stored(right)):
    _dispatch.select(
      'dot_general', TABLE, implementation, left, right, dims, None
    )
    return lax.dot_general(
      left, right, dims, precision=precision, preferred_element_type=dtype
    )
  return _compiled(left, right, call).astype(dtype)


def _with_term(lhs: Any, rhs: Any, call: _Call, dtype: np.dtype) -> jax.Array:
  """The product of operands of which one is a LowRank, or both are."""
  side = 0 if isinstance(lhs, LowRank) else 1
  large = dot_general(
    *_low_rank.large(lhs, rhs, side, call.dims),
    call.dims,
    precision=call.precision,
    preferred_element_type=promoted(dtype, jnp.float32),
    implementation=call.implementation,
  )
  small = _low_rank.small(lhs, rhs, side, call.dims, call.precision)
  return (large + small).astype(dtype)


def einsum(
  subscripts: str,
  lhs: Operand,
  rhs: Operand,
  *,
  preferred_element_type: DTypeLike | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """`jnp.einsum` of two operands, arrays or QArrays.

  Args:
    subscripts: such as 'btd,df->btf' or '...k,kn->...n'. Each letter occurs at
      most once in an operand, and every letter that is in just one operand is
      in the output.
    lhs: array or QArray.
    rhs: array or QArray.
    preferred_element_type: as in `dot`.
    implementation: as in `dot`.
  """
  left, right = _operand.checked(lhs, 'lhs'), _operand.checked(rhs, 'rhs')
  dims, order = einsum_dims(subscripts, left.ndim, right.ndim)
  out = dot_general(
    left,
    right,
    dims,
    preferred_element_type=preferred_element_type,
    implementation=implementation,
  )
  return out if order == tuple(range(out.ndim)) else out.transpose(order)


def check_precision(precision: Precision) -> None:
  """Refuses what `lax.dot_general` does, also where it plays no part."""
  if precision is None or isinstance(precision, lax.Precision):
    return
  x = jax.ShapeDtypeStruct((1,), jnp.float32)
  dims = (((0,), (0,)), ((), ()))
  product = functools.partial(
    lax.dot_general, dimension_numbers=dims, precision=precision
  )
  try:
    jax.eval_shape(product, x, x)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'precision={precision!r} is none of lax.dot_general, such as'
      " jax.lax.Precision.HIGHEST or 'highest'"
    ) from error


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(2, 3, 4))
def product(
  lhs: Operand,
  rhs: Operand,
  dims: DotDims,
  precision: Precision,
  contract: Callable,
) -> jax.Array:
  """contract(lhs, rhs), a product in float32, whose derivative is the equation
  at the top of this module."""
  del dims, precision
  return contract(lhs, rhs)


def _product_jvp(dims, precision, contract, primals, tangents):
  lhs, rhs = primals
  out = product(lhs, rhs, dims, precision, contract)

  def of_dense(a, b):
    return lax.dot_general(
      dense(a),
      dense(b),
      dims,
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  @jax.checkpoint
  def from_lhs(tangent, lhs, rhs):
    return of_dense(_operand.dense_tangent(lhs, tangent), rhs)

  @jax.checkpoint
  def from_rhs(tangent, lhs, rhs):
    return of_dense(lhs, _operand.dense_tangent(rhs, tangent))

  total = jnp.zeros_like(out)
  for x, t, part in zip(primals, tangents, (from_lhs, from_rhs), strict=True):
    if (tangent := _operand.moving(x, t)) is not None:
      total = total + part(tangent, lhs, rhs)
  return out, total


product.defjvp(_product_jvp, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _compiled(lhs, rhs, call: _Call):
  def contract(lhs, rhs):
    return _dispatch.run(
      'dot_general',
      TABLE,
      call.implementation,
      (lhs, rhs),
      call.dims,
      call.precision,
    )

  def run(lhs, rhs):
    return product(lhs, rhs, call.dims, call.precision, contract)

  specs = functools.partial(_free_parts, call.dims)
  return _explicit.automatic(run, specs, lhs, rhs)


def _free_parts(dims: DotDims, result, lhs: Operand, rhs: Operand):
  """The spec of a product: axes that are not contracted stay split."""
  del result
  contracted, batch = dims
  out = []
  for i, x in enumerate((lhs, rhs)):
    parts = _operand.parts(x)
    if not i:
      out += [parts[d] for d in batch[i]]
    away = (*contracted[i], *batch[i])
    out += [part for d, part in enumerate(parts) if d not in away]
  return PartitionSpec(*out)


def dot_operands(
  lhs: Operand | jax.ShapeDtypeStruct,
  rhs: Operand | jax.ShapeDtypeStruct,
  **_: Any,
) -> PlanArguments:
  """Arguments of the plan of a `dot`."""
  return dot_general_operands(*_dot_dims(lhs, rhs))


def _dot_dims(lhs: Any, rhs: Any) -> tuple[Any, Any, DotDims]:
  """The operands of a `dot`, checked, and its dimension numbers."""
  left, right = _operand.checked(lhs, 'lhs'), _operand.checked(rhs, 'rhs')
  if left.ndim < 1 or right.ndim < 1:
    raise ValueError(
      f'dot needs operands of rank 1 or more, got lhs.shape={left.shape} and'
      f' rhs.shape={right.shape}'
    )
  return left, right, (((left.ndim - 1,), (max(right.ndim - 2, 0),)), ((), ()))


def dot_general_operands(
  lhs: Operand | jax.ShapeDtypeStruct,
  rhs: Operand | jax.ShapeDtypeStruct,
  dimension_numbers: DotDims,
  *,
  precision: Precision = None,
  **_: Any,
) -> PlanArguments:
  """Arguments of the plan of a `dot_general`."""
  left, right = _operand.checked(lhs, 'lhs'), _operand.checked(rhs, 'rhs')
  dims = check_dims(left, right, dimension_numbers)
  left, right = _low_rank.plain(left, right, dims)
  left, right = _operand.untransformed(left, right, dims)
  _check_widths(left, right)
  return *_operand.joined(left, right, dims), precision


def einsum_operands(
  subscripts: str,
  lhs: Operand | jax.ShapeDtypeStruct,
  rhs: Operand | jax.ShapeDtypeStruct,
  **_: Any,
) -> PlanArguments:
  """Arguments of the plan of an `einsum`."""
  left, right = _operand.checked(lhs, 'lhs'), _operand.checked(rhs, 'rhs')
  dims = einsum_dims(subscripts, left.ndim, right.ndim)[0]
  return dot_general_operands(left, right, dims)


def _check_widths(lhs, rhs) -> None:
  """Refuses float64 beside stored operands, whose products are in float32."""
  for side, x, other in (('lhs', lhs, rhs), ('rhs', rhs, lhs)):
    if x.dtype == jnp.float64 and not _operand.is_stored(x):
      if _operand.is_stored(other):
        raise TypeError(
          f'{side} has dtype float64; products with quantized operands are in'
          f' float32: cast it with {side}.astype(jnp.float32)'
        )


def check_dims(lhs: Any, rhs: Any, dimension_numbers: Any) -> DotDims:
  """Dimension numbers as tuples, or an error that says how they do not fit."""
  try:
    (lhs_k, rhs_k), (lhs_b, rhs_b) = (
      tuple(tuple(int(d) for d in side) for side in part)
      for part in dimension_numbers
    )
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{dimension_numbers=} must be ((lhs_contracting, rhs_contracting),'
      ' (lhs_batch, rhs_batch))'
    ) from error
  for name, a, b in (('contracting', lhs_k, rhs_k), ('batch', lhs_b, rhs_b)):
    bad_rank = any(not 0 <= d < lhs.ndim for d in a) or any(
      not 0 <= d < rhs.ndim for d in b
    )
    sizes = None
    if not bad_rank and len(a) == len(b):
      sizes = [lhs.shape[d] for d in a], [rhs.shape[d] for d in b]
    if sizes is None or sizes[0] != sizes[1]:
      raise ValueError(
        f'{name} axes {a} of lhs.shape={lhs.shape} and {b} of'
        f' rhs.shape={rhs.shape} do not match'
      )
  return (lhs_k, rhs_k), (lhs_b, rhs_b)


def einsum_dims(
  subscripts: str, lhs_ndim: int, rhs_ndim: int
) -> tuple[DotDims, tuple[int, ...]]:
  """Dimension numbers, and the transposition into the order of the output."""
  if not isinstance(subscripts, str):
    raise TypeError(
      f'subscripts={subscripts!r} must be a string, followed by two operands'
    )
  text = subscripts.replace(' ', '')
  inputs, arrow, output = text.partition('->')
  terms = inputs.split(',')
  if not arrow or len(terms) != 2:
    raise ValueError(f"{subscripts=} must have the form 'ab,bc->ac'")
  # Ellipses stand for digits, counted from the end as in broadcasting.
  dots = 0
  for i, ndim in enumerate((lhs_ndim, rhs_ndim)):
    if '...' in terms[i]:
      n = ndim - (len(terms[i]) - 3)
      dots = max(dots, n)
      names = ''.join(str(d) for d in range(n))[::-1]
      terms[i] = terms[i].replace('...', names)
    if len(terms[i]) != ndim or len(set(terms[i])) != ndim:
      raise ValueError(
        f'{subscripts=} does not name each of the {ndim} axes of'
        f' {("lhs", "rhs")[i]} once'
      )
  output = output.replace('...', ''.join(str(d) for d in range(dots))[::-1])
  lhs, rhs = terms
  batch = [c for c in lhs if c in rhs and c in output]
  contracted = [c for c in lhs if c in rhs and c not in output]
  free = [c for c in lhs + rhs if c not in batch + contracted]
  if sorted(batch + free) != sorted(output):
    raise ValueError(
      f'{subscripts=} must keep every letter that is in one operand only, and'
      ' repeat none in the output'
    )
  dims = (
    (
      tuple(lhs.index(c) for c in contracted),
      tuple(rhs.index(c) for c in contracted),
    ),
    (tuple(lhs.index(c) for c in batch), tuple(rhs.index(c) for c in batch)),
  )
  produced = batch + free
  return dims, tuple(produced.index(c) for c in output)
