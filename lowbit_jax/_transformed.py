"""Quantized weights behind a transform that their activations take.

A weight that was rotated, smoothed or reordered before it was quantized is
contracted as it is stored, and the transform goes to the other side:

  x @ w = transform.apply(x) @ weight

Files in act-order come this way, where rows of a weight were sorted into
blocks by a permutation; so do weights behind a Hadamard rotation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _decoders, qarray
from lowbit_jax._typing import DTypeLike
from lowbit_jax.numerics._codec import as_dtype
from lowbit_jax.qarray import QArray
from lowbit_jax.transforms import Chain, Transform
from lowbit_jax.transforms._unit import unit


@qarray.with_dense_operators
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Transformed:
  """A quantized weight whose activations take a transform when it is used.

  It stands for `transform.inverse_dual(dequantize(weight), axis)`.
  `dot`, `dot_general`, `einsum` and `ragged_dot` contract `weight` as it is
  stored where they contract `axis` with an array, which takes
  `transform.apply` first. In all other uses it is its dense value.

  A pytree: stack layers by `jax.tree.map`, use them in `jax.vmap` and
  `jax.lax.scan`. Transforms are stacked with their weights.

  Attributes:
    weight: the quantized weight, after `transform.apply_dual`.
    transform: what activations take; it acts on one axis, whichever it names.
    axis: the axis of `weight` that was transformed, negative.
    rank: axes of a weight that has a transform of its own; weights stacked
      later have more. 0, as an argument, for those of `weight`.

  Raises:
    TypeError: for a weight or a transform of another type.
    ValueError: for an axis that is none, or not of the length of the transform.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> rotation, w = lowbit.transforms.Hadamard(32), jnp.ones((64, 8))
    >>> q = lowbit.quantize(
    ...   rotation.apply_dual(w), lowbit.formats.mxfp4, axis=-2
    ... )
    >>> weight = lowbit.ops.Transformed(q, rotation, -2)
    >>> lowbit.dot(jnp.ones((1, 64)), weight).shape
    (1, 8)
  """

  weight: QArray
  transform: Transform
  axis: int
  rank: int = 0

  def __post_init__(self) -> None:
    qarray.check_qarray(self.weight, 'weight')
    if not isinstance(self.transform, Transform):
      raise TypeError(
        'transform must be one of lowbit_jax.transforms, got'
        f' {type(self.transform).__name__}'
      )
    if type(self.rank) is not int or not 0 <= self.rank <= self.ndim:
      raise ValueError(
        f'rank={self.rank!r} must be at most that of {self.shape}'
      )
    if not self.rank:
      object.__setattr__(self, 'rank', self.ndim)
    qarray.check_axis(self.axis, self.rank)
    if self.axis >= 0:
      raise ValueError(f'axis={self.axis} must count from the end: < 0')
    # The transform refuses a row of another length than its own.
    stacks = range(self.stacked)
    shape = (*self.shape[: self.stacked], self.shape[self.axis])
    row = jax.ShapeDtypeStruct(shape, jnp.float32)
    jax.eval_shape(lambda x: self.facing(x, len(stacks), stacks), row)

  def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
    key = jax.tree_util.GetAttrKey
    children = (
      (key('weight'), self.weight),
      (key('transform'), self.transform),
    )
    return children, (self.axis, self.rank)

  @classmethod
  def tree_unflatten(cls, static: tuple, children: Sequence) -> 'Transformed':
    t = object.__new__(cls)  # unchecked: leaves may be placeholders
    names = ('axis', 'rank', 'weight', 'transform')
    for name, value in zip(names, (*static, *children), strict=True):
      object.__setattr__(t, name, value)
    return t

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def ndim(self) -> int:
    return self.weight.ndim

  @property
  def size(self) -> int:
    return self.weight.size

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the array that this one stands for."""
    return self.weight.dtype

  @property
  def stacked(self) -> int:
    """How many leading axes stack weights, each with its own transform."""
    return max(self.ndim - self.rank, 0)

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves, those of the transform too."""
    leaves = jax.tree.leaves(self.transform)
    own = (math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
    return self.weight.nbytes + sum(own)

  @property
  def T(self) -> 'Transformed':
    """All axes reversed."""
    if self.stacked:
      raise ValueError(f'{self!r} is a stack, whose members have a T: use mT')
    axis = -1 - (self.ndim + self.axis)
    return replace(self, weight=self.weight.T, axis=axis)

  @property
  def mT(self) -> 'Transformed':
    """The last two axes swapped."""
    axis = {-1: -2, -2: -1}.get(self.axis, self.axis)
    return replace(self, weight=self.weight.mT, axis=axis)

  def astype(self, dtype: DTypeLike) -> 'Transformed':
    """The same numbers standing for an array of another dtype."""
    return replace(self, weight=self.weight.astype(dtype))

  def facing(
    self, x: jax.Array, axis: int, stacks: Sequence[int] = ()
  ) -> jax.Array:
    """What `weight` is contracted with in place of x.

    Args:
      x: float array.
      axis: that of x which `axis` of this weight is contracted with.
      stacks: axes of x that go with the axes along which weights are stacked.
    """
    # The transform has an axis of its own; x is turned until it is there.
    trailing = range(self.transform.axis + 1, 0)
    places = (*range(len(stacks)), -1)
    turned = jnp.moveaxis(x, (*stacks, axis), places)
    turned = jnp.expand_dims(turned, tuple(trailing))
    apply = _per_member(lambda f, x: f.apply(x), len(stacks))
    turned = apply(self.transform, turned)
    turned = jnp.squeeze(turned, tuple(trailing))
    return jnp.moveaxis(turned, places, (*stacks, axis))

  def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
    """The array that this one stands for, transformed back in float32."""
    dtype = self.dtype if dtype is None else as_dtype(dtype)
    return _decoders.run(decode, self, dtype)

  def with_transform(self, change: Callable[[Any], Any]) -> 'Transformed':
    """The same weight behind a transform whose leaves are changed."""
    return replace(self, transform=jax.tree.map(change, self.transform))

  def dual(self, w: jax.Array) -> jax.Array:
    """What `weight` stands for where this one stands for w."""
    f = _per_member(lambda f, w: f.apply_dual(w, self.axis), self.stacked)
    return f(self.transform, w)

  def __getitem__(self, index: Any) -> 'Transformed':
    """NumPy's indexing of the axes in front of `axis`, and slices behind it."""
    return _getitem(self, index)

  def __len__(self) -> int:
    return len(self.weight)

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __array__(
    self, dtype: DTypeLike | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    return np.asarray(self.dequantize(), dtype=dtype)

  def __repr__(self) -> str:
    name = type(self.transform).__name__
    return f'Transformed({self.weight!r}, {name}, axis={self.axis})'


def is_quantized(x: object) -> TypeGuard[QArray | Transformed]:
  """Whether `x` is a QArray or Transformed; the `is_leaf` of tree functions."""
  return isinstance(x, QArray | Transformed)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def decode(t: Transformed, dtype: np.dtype) -> jax.Array:
  """`t.dequantize(dtype)` without a name, for operations of this library."""
  w = qarray.decode(t.weight, jnp.float32)
  invert = _per_member(lambda f, w: f.inverse_dual(w, t.axis), t.stacked)
  return invert(t.transform, w).astype(dtype)


def _per_member(f: Callable, stacked: int) -> Callable:
  """`f(transform, x)` of each member of a stack."""
  for _ in range(stacked):
    f = jax.vmap(f)
  return f


def stack(
  parts: Sequence[jax.Array | QArray | Transformed],
) -> Any:
  """Weights of one shape and format as one, with their axis in front.

  Where some have transforms that others lack, those get such as change nothing:
  layers, or experts, one of which is stored as it was.

  Args:
    parts: at least one; arrays, QArrays and such behind transforms.

  Returns:
    What holds all of them: an array, a QArray or a Transformed.

  Raises:
    TypeError: for arrays beside quantized weights.
    ValueError: for no parts, for transforms of different kinds or orders, and
      where only some have a rotation that holds no array.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> lowbit.ops.stack([w, w, w]).shape
    (3, 64, 8)
  """
  if not parts:
    raise ValueError('parts is empty: give one weight at least')
  if len({is_quantized(part) for part in parts}) > 1:
    raise TypeError(
      'parts has arrays beside quantized weights: quantize all or none'
    )
  longest = max(parts, key=lambda part: len(_steps(part)))
  if isinstance(longest, Transformed):
    parts = [_beside(longest, part) for part in parts]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _steps(x: Any) -> tuple[Transform, ...]:
  """The transforms of a weight, in order."""
  if not isinstance(x, Transformed):
    return ()
  chain = x.transform
  return chain.transforms if isinstance(chain, Chain) else (chain,)


def _beside(like: Transformed, part: Any) -> Transformed:
  """A weight behind transforms of the kinds that another one has."""
  own, steps = list(_steps(part)), []
  for t in _steps(like):
    is_own = own and jax.tree.structure(own[0]) == jax.tree.structure(t)
    steps.append(own.pop(0) if is_own else unit(t))
  if own or any(t is None for t in steps):
    raise ValueError(
      f'{part!r} cannot be stacked with {like!r}: give all of them transforms'
      ' of the same kinds in the same order'
    )
  is_chain = isinstance(like.transform, Chain)
  transform = Chain(tuple(steps)) if is_chain else steps[0]
  weight = part.weight if isinstance(part, Transformed) else part
  return replace(like, weight=weight, transform=transform)


def _getitem(t: Transformed, key: Any) -> Transformed:
  index = tuple(qarray.index_per_axis(t.weight, key))
  if t.stacked:
    kept, sliced = index[t.stacked :], ()
  else:
    own = t.ndim + t.axis
    kept, sliced = index[own : own + 1], index[own + 1 :]
  if not all(isinstance(i, slice) for i in sliced) or any(
    not isinstance(i, slice) or i != slice(None) for i in kept
  ):
    raise IndexError(
      f'{t!r} cannot be indexed by {key!r}: axis {t.axis} stays whole, axes'
      ' behind it take slices, and stacks take indices of their members; use'
      ' dequantize(t)[...]'
    )
  weight = t.weight[index]
  if not t.stacked:
    return replace(t, weight=weight, rank=weight.ndim)
  members = index[: t.stacked]
  return replace(t, weight=weight).with_transform(lambda x: x[members])


def replace(t: Transformed, **changes: Any) -> Transformed:
  """`t` with other fields, unchecked."""
  fields = [f.name for f in dataclasses.fields(t)]
  weight, transform, *static = (
    changes.get(name, getattr(t, name)) for name in fields
  )
  return t.tree_unflatten(tuple(static), (weight, transform))
