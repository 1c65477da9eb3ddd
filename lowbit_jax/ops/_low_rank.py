"""Products with weights that have a low-rank term.

The product with the weight as it is stored, and two small products beside it:

  x . (w + scale a b) = x . w + (scale (x . a)) . b

where the axes that are contracted are those of one factor, which comes first.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _explicit, _low_rank
from lowbit_jax._low_rank import LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.numerics._codec import promoted
from lowbit_jax.ops import _operand


class _Call(NamedTuple):
  """Static part of the small products.

  Attributes:
    dims: contracted and batch axes, each of x and of the weight.
    shape: of the weight.
    scale: that of the term.
    side: which operand the weight is, 0 or 1.
    precision: of both products.
  """

  dims: DotDims
  shape: tuple[int, ...]
  scale: float
  side: int
  precision: Precision


def plain(lhs: Any, rhs: Any, dims: DotDims) -> tuple[Any, Any]:
  """The operands of the large product, none of them a LowRank.

  Args:
    lhs: operand of a product.
    rhs: operand of a product.
    dims: dimension numbers, checked.
  """
  for side in (0, 1):
    if isinstance((lhs, rhs)[side], LowRank):
      lhs, rhs = large(lhs, rhs, side, dims)
  return lhs, rhs


def large(lhs: Any, rhs: Any, side: int, dims: DotDims) -> tuple[Any, Any]:
  """The operands of the large product that one LowRank makes.

  It is there without its factors, or as a dense value where they do not go
  beside it.

  Args:
    lhs: operand of a product.
    rhs: operand of a product.
    side: which of them is the LowRank, 0 or 1.
    dims: dimension numbers, checked.
  """
  w = (lhs, rhs)[side]
  apart = _factors(w, *(part[side] for part in dims)) is not None
  new = w.weight if apart else _operand.computed(decoded, w)
  return (lhs, new) if side else (new, rhs)


def small(
  lhs: Any, rhs: Any, side: int, dims: DotDims, precision: Precision
) -> jax.Array | float:
  """What is added to the product of `large`: 0 if it is all there.

  Args:
    lhs: operand of a product.
    rhs: operand of a product.
    side: which of them is the LowRank, 0 or 1.
    dims: dimension numbers, checked.
    precision: as in `lax.dot_general`.
  """
  w, x = (lhs, rhs)[side], (lhs, rhs)[1 - side]
  contracted, batch = ((part[1 - side], part[side]) for part in dims)
  factors = _factors(w, contracted[1], batch[1])
  if factors is None:
    return 0.0
  call = _Call((contracted, batch), w.shape, w.scale, side, precision)
  return _small(_array(x), *factors, call)


def small_by_group(
  x: Any, w: LowRank, group_sizes: jax.Array, precision: Precision
) -> jax.Array | float:
  """As `small`, in a `ragged_dot` of x (m, k) and w (g, k, n)."""
  factors = _factors(w, (1,), (0,))
  if factors is None:
    return 0.0
  return _small_by_group(_array(x), *factors, group_sizes, w.scale, precision)


def _factors(
  w: LowRank, contracted: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array, jax.Array] | None:
  """The factors of w in the order of their products, None if there is none:
  the first has no free axis, the second no contracted one."""
  free = [d for d in range(w.ndim) if d not in (*contracted, *batch)]
  for first, second in ((w.a, w.b), (w.b, w.a)):
    if all(first.shape[d] == 1 for d in free):
      if all(second.shape[d] == 1 for d in contracted):
        return first, second
  return None


def decoded(w: LowRank) -> jax.Array:
  """The dense value of an operand."""
  return _low_rank.decode(w, w.dtype)


def _array(x: Any) -> jax.Array:
  """An operand of any kind as an array."""
  if isinstance(x, Transformed | LowRank):
    return _low_rank.decode(x, promoted(x.dtype, jnp.float32))
  return _operand.dense(x)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _small(x, first, second, call: _Call) -> jax.Array:
  """(scale (x . first)) . second in float32, its axes those of the product."""
  (x_k, w_k), (x_b, w_b) = call.dims
  ndim = len(call.shape)
  # The axes of x have the numbers of those of w that they meet, or new ones.
  facing = dict(zip((*x_k, *x_b), (*w_k, *w_b), strict=True))
  of_x = [facing.get(d, ndim + 1 + d) for d in range(x.ndim)]
  free_x = [of_x[d] for d in range(x.ndim) if d not in facing]
  free_w = [d for d in range(ndim) if d not in (*w_k, *w_b)]
  inner = [*w_b, *free_x, ndim]
  free = free_x + free_w if call.side else free_w + free_x
  outer = [*w_b, *free]

  def run(x, first, second):
    inward = _low_rank.narrowed(first, call.shape, free_w)
    outward = _low_rank.narrowed(second, call.shape, w_k)
    h = _einsum((x, of_x), inward, inner, call.precision)
    return _einsum((h * call.scale, inner), outward, outer, call.precision)

  def specs(result, x, first, second):
    del result, first
    split = dict(enumerate(_explicit.parts(second)[:-1]))
    split |= dict(zip(of_x, _explicit.parts(x), strict=True))
    return PartitionSpec(*(split[d] for d in outer))

  return _explicit.automatic(run, specs, x, first, second)


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _small_by_group(x, first, second, sizes, scale: float, precision):
  groups = sizes.shape[0]

  def matrices(factor):
    return jnp.broadcast_to(factor, (groups, *factor.shape[1:]))

  def run(x, first, second, sizes):
    first, second = matrices(first)[:, :, 0], matrices(second)[:, 0].mT
    h = _ragged(x, first, sizes, precision)
    return _ragged(h * scale, second, sizes, precision)

  def specs(result, x, first, second, sizes):
    del result, first, sizes
    return PartitionSpec(_explicit.parts(x)[0], _explicit.parts(second)[2])

  return _explicit.automatic(run, specs, x, first, second, sizes)


def _einsum(lhs, rhs, output: list[int], precision: Precision) -> jax.Array:
  """Einsum of (array, numbers of its axes), accumulated in float32 or wider."""
  (x, of_x), (y, of_y) = lhs, rhs
  common = promoted(x.dtype, y.dtype)
  return jnp.einsum(
    x.astype(common),
    of_x,
    y.astype(common),
    of_y,
    output,
    precision=precision,
    preferred_element_type=promoted(common, jnp.float32),
  )


def _ragged(x, matrices, sizes, precision: Precision) -> jax.Array:
  common = promoted(x.dtype, matrices.dtype)
  return lax.ragged_dot(
    x.astype(common),
    matrices.astype(common),
    sizes,
    precision=precision,
    preferred_element_type=promoted(common, jnp.float32),
  )
