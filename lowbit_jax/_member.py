"""A member of a stack of quantized matrices, found where it is used.

A loop over the layers of a model takes one member of each stack in each step.
`q[i]` and `jax.lax.scan` copy it first; a `Member` is the stack and a number,
so that a kernel reads the member where it lies.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import qarray
from lowbit_jax._typing import ArrayLike, DTypeLike
from lowbit_jax.qarray import QArray

_Tree = TypeVar('_Tree')


@qarray.with_dense_operators
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Member:
  """One quantized array of a stack. Made by `ops.member`.

  Products take it in place of `stack[index]`, without a derivative with respect
  to the scales. In all other uses it is its dense value.

  Attributes:
    stack: QArray (members, ...).
    index: int32 number of the member.
  """

  stack: QArray
  index: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.stack.shape[1:]

  @property
  def ndim(self) -> int:
    return self.stack.ndim - 1

  @property
  def dtype(self) -> np.dtype:
    return self.stack.dtype

  def astype(self, dtype: DTypeLike) -> 'Member':
    """The same numbers standing for an array of another dtype."""
    return Member(self.stack.astype(dtype), self.index)

  def unpack(self) -> QArray:
    """The member by itself, a copy."""
    return jax.tree.map(lambda leaf: _at(leaf, self.index), self.stack)

  def __getitem__(self, index: Any) -> Any:
    if index is Ellipsis:
      return self
    return self.unpack()[index]

  def __jax_array__(self) -> jax.Array:
    return qarray.dequantize(self.unpack())

  def __repr__(self) -> str:
    return f'Member({self.stack!r}, index={self.index})'


def member(tree: _Tree, index: ArrayLike) -> _Tree:
  """A member of a tree of stacks, such as the parameters of one layer of many.

  Of `jax.tree.map(lambda leaf: leaf[index], tree)` it differs in that QArrays
  are not copied: products on CPU read them where they lie.

  Args:
    tree: of arrays and QArrays with a leading axis of members, along which no
      blocks lie.
    index: integer scalar; outside of the stack it is that of the nearest
      member.

  Returns:
    A tree with a `Member` in place of each QArray.

  Raises:
    ValueError: for an index that is no scalar, or blocks along the leading
      axis.
    TypeError: for an index that is no integer.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> stack = jax.vmap(
    ...   lambda w: lowbit.quantize(w, lowbit.formats.mxfp4, axis=-2)
    ... )(jnp.ones((4, 64, 64)))
    >>> def layer(x, i):
    ...   return lowbit.dot(x, lowbit.ops.member(stack, i)) / 64, None
    >>> jax.lax.scan(layer, jnp.ones((1, 64)), jnp.arange(4))[0][0, 0].item()
    1.0
  """
  number = jnp.asarray(index)
  if number.ndim:
    raise ValueError(f'{index=} must be one integer, got shape {number.shape}')
  if not jnp.issubdtype(number.dtype, jnp.integer):
    raise TypeError(f'index has dtype {number.dtype}; it must be an integer')
  number = number.astype(jnp.int32)

  def pick(x):
    if not isinstance(x, QArray):
      return _at(x, number)
    if -x.ndim in (*x.axes, *qarray.merged_axes(x)):
      raise ValueError(f'{x!r} has blocks along its leading axis, no members')
    return Member(x, number)

  return jax.tree.map(pick, tree, is_leaf=qarray.is_qarray)


def _at(leaf: jax.Array, index: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(
    leaf, index, keepdims=False, allow_negative_indices=False
  )
