"""What a product needs to know of a type that stores an operand.

`dot` and its relatives take arrays and stored operands: pytrees with `shape`,
`ndim` and `dtype` that stand for a dense array. A new kind of storage is one
entry of `STORAGES`; the derivative and the XLA implementation follow from it.
Kernels that read its leaves as they are have plans of their own. `Transformed`
is none of them: it is rewritten into a QArray and a transform of the other
operand before anything else. Nor is `LowRank`, which becomes its weight and two
small products beside the large one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit, _transformed, qarray
from lowbit_jax._low_rank import LowRank
from lowbit_jax._member import Member
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import ArrayLike, DotDims, Shape
from lowbit_jax.ops import _prepack
from lowbit_jax.ops._prepack import Prepacked
from lowbit_jax.qarray import QArray


class Storage(NamedTuple):
  """A kind of stored operand.

  Attributes:
    unpack: gives the same numbers as a QArray.
    float_leaves: names of the attributes that have a derivative, or hold leaves
      that do.
    sides: operands of a product that it can be, 'lhs' and 'rhs'.
  """

  unpack: Callable[[Any], QArray]
  float_leaves: tuple[str, ...] = ()
  sides: tuple[str, ...] = ('lhs', 'rhs')


STORAGES: dict[type, Storage] = {
  QArray: Storage(lambda q: q, ('scale', 'tensor_scale', 'minimum')),
  Member: Storage(Member.unpack),
  Prepacked: Storage(_prepack.unpack, sides=('rhs',)),
}

# Of a product, as users give them.
Operand = ArrayLike | QArray | Member | Prepacked | Transformed | LowRank
Shaped = (  # of a plan
  jax.Array | jax.ShapeDtypeStruct | QArray | Member | Prepacked
)


def is_stored(x: object) -> bool:
  """Whether an operand, rewritten by `untransformed`, is not an array."""
  return type(x) in STORAGES


def checked(x: Operand | jax.ShapeDtypeStruct, side: str) -> Any:
  """An operand of a product, or an error that says why it is none.

  Args:
    x: what the user gave.
    side: 'lhs' or 'rhs'.
  """
  if is_stored(x):
    if side not in STORAGES[type(x)].sides:
      raise TypeError(
        f'a {type(x).__name__} weight is the right operand of a product'
      )
    return x
  if isinstance(x, jax.ShapeDtypeStruct | Transformed | LowRank):
    return x
  try:
    x = jnp.asarray(x)
  except (TypeError, ValueError, OverflowError):
    raise TypeError(
      f'{side} must be a float array or a QArray, got {type(x).__name__}'
    ) from None
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'{side} has dtype {x.dtype}; operands are float arrays or QArrays'
    )
  return x


def unpacked(x: Any) -> Any:
  """A stored operand as a QArray; others as they are, shapes too."""
  if not is_stored(x):
    return x
  return STORAGES[type(x)].unpack(x)


def untransformed(lhs: Any, rhs: Any, dims: DotDims) -> tuple[Any, Any]:
  """Operands without `Transformed` of a product with the same result.

  Where the transformed axis is contracted with an array, the array takes the
  transform, and the weight stays packed; otherwise the weight is dense.

  Args:
    lhs: operand of a product.
    rhs: operand of a product.
    dims: dimension numbers, checked.
  """
  operands = [lhs, rhs]
  for side in (0, 1):
    t, other = operands[side], operands[1 - side]
    if not isinstance(t, Transformed):
      continue
    axes = _facing_axes(t, [(part[side], part[1 - side]) for part in dims])
    if axes is None or is_stored(other) or isinstance(other, Transformed):
      operands[side] = computed(lambda t: _transformed.decode(t, t.dtype), t)
    else:
      face = functools.partial(_face, axes=axes)
      operands[1 - side] = computed(face, t, other)
      operands[side] = t.weight
  return operands[0], operands[1]


def _face(t: Transformed, x: jax.Array, axes) -> jax.Array:
  return t.facing(x, *axes)


def _facing_axes(t: Transformed, pairs) -> tuple[int, tuple[int, ...]] | None:
  """The axes of the other operand that face the transformed axis of `t` and
  those along which it is stacked; None unless they are contracted and batched.

  Args:
    t: operand of a product.
    pairs: contracted and batch axes, each of `t` and of the other operand.
  """
  contracted, batch = (dict(zip(*pair, strict=True)) for pair in pairs)
  axis, stacks = t.ndim + t.axis, range(t.stacked)
  if axis not in contracted or not all(s in batch for s in stacks):
    return None
  return contracted[axis], tuple(batch[s] for s in stacks)


def computed(f: Callable, *operands: Any) -> Any:
  """`f(*operands)`, of which the shape will do where theirs are given."""
  leaves = jax.tree.leaves(operands)
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
    return jax.eval_shape(f, *operands)
  return f(*operands)


def joined(lhs: Any, rhs: Any, dims: DotDims) -> tuple[Any, Any, DotDims]:
  """The same product with one axis for those that blocks span together.

  Args:
    lhs: operand of a product.
    rhs: operand of a product.
    dims: dimension numbers, checked.

  Returns:
    Operands and dimension numbers of a product with the same result. A QArray
    whose blocks span other axes than those that are contracted stays as it is.
  """
  operands = [lhs, rhs]
  contracted, batch = (list(map(tuple, part)) for part in dims)
  for side in (0, 1):
    q, other = operands[side], operands[1 - side]
    if not isinstance(q, QArray) or not q.merged:
      continue
    axes = tuple(a + q.ndim for a in qarray.merged_axes(q))
    n, start = len(axes), _position(axes, contracted[side])
    facing = contracted[1 - side]
    if start is None or not _can_join(other, facing[start : start + n]):
      continue
    partner = facing[start : start + n]
    for own, group in ((side, axes), (1 - side, partner)):
      operands[own] = _flattened(operands[own], group)
      new = _numbers_after(group[0], n)
      kept = (a for a in contracted[own] if a not in group[1:])
      contracted[own] = tuple(map(new, kept))
      batch[own] = tuple(map(new, batch[own]))
  (lhs_k, rhs_k), (lhs_b, rhs_b) = contracted, batch
  return *operands, ((lhs_k, rhs_k), (lhs_b, rhs_b))


def _numbers_after(first: int, n: int) -> Callable[[int], int]:
  """Axis numbers once `n` axes from `first` on are one."""
  return lambda axis: axis - n + 1 if axis > first else axis


def _position(axes: Shape, contracted: Shape) -> int | None:
  """Where `axes` stand in `contracted` one after the other, or None."""
  for i in range(len(contracted) - len(axes) + 1):
    if contracted[i : i + len(axes)] == axes:
      return i
  return None


def _can_join(x: Any, axes: Shape) -> bool:
  """Whether axes of the other operand can become one as well."""
  if axes != tuple(range(axes[0], axes[0] + len(axes))):
    return False
  if isinstance(x, QArray):
    return tuple(a - x.ndim for a in axes) == qarray.merged_axes(x)
  return not is_stored(x)


def _flattened(x: Any, axes: Shape) -> Any:
  if isinstance(x, QArray):
    return qarray.flat(x)
  return qarray.merge(x, tuple(a - x.ndim for a in axes))


def dense(x: Any) -> jax.Array:
  """An operand in float32."""
  x = unpacked(x)
  return qarray.decode(x, jnp.float32) if isinstance(x, QArray) else x


def parts(x: Any) -> list[Any]:
  """What splits each axis of an operand, as `_explicit.parts` of an array."""
  if not is_stored(x):
    return _explicit.parts(x)
  return qarray.parts(x) if isinstance(x, QArray) else [None] * x.ndim


def moving(x: Any, tangent: Any) -> Any:
  """What moves of an operand, None where nothing does.

  Args:
    x: an operand.
    tangent: its tangent, with symbolic zeros.

  Returns:
    The tangent of an array; of a stored operand a dict with those of its float
    leaves.
  """
  if not is_stored(x):
    return None if _is_zero(tangent) else tangent
  names = STORAGES[type(x)].float_leaves
  leaves = {
    name: jax.tree.map(_instantiated, getattr(tangent, name), is_leaf=_is_zero)
    for name in names
    if getattr(x, name) is not None and not _is_still(getattr(tangent, name))
  }
  if not names and not _is_still(tangent):
    kind = type(x).__name__
    raise TypeError(
      f'the scales of a {kind} weight have no derivative: differentiate with'
      ' respect to those of the QArray, unpack(w)'
    )
  return leaves or None


def dense_tangent(x: Any, tangent: Any) -> jax.Array:
  """The tangent of `dense(x)`, from that of `moving`."""
  if not is_stored(x):
    return tangent

  def values(leaves):
    return dense(qarray.replace(x, **leaves))

  primals = {name: getattr(x, name) for name in tangent}
  return jax.jvp(values, (primals,), (tangent,))[1]


def _is_still(tangent: Any) -> bool:
  """Whether nothing moves in a tree of tangents."""
  return all(map(_is_zero, jax.tree.leaves(tangent, is_leaf=_is_zero)))


def _instantiated(t: Any) -> Any:
  """A tangent as an array, zeros of integer leaves included."""
  if not isinstance(t, jax.custom_derivatives.SymbolicZero):
    return t
  aval: Any = t.aval
  shape, dtype = aval.shape, aval.dtype
  return (np if dtype == jax.dtypes.float0 else jnp).zeros(shape, dtype)


def _is_zero(t: Any) -> bool:
  zero = isinstance(t, jax.custom_derivatives.SymbolicZero)
  return zero or t is None or getattr(t, 'dtype', None) == jax.dtypes.float0
