"""What a transform is, and the checks that all of them share."""

import dataclasses
import operator
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar('T')


@runtime_checkable
class Transform(Protocol):
  """An invertible linear map T of the entries along one axis of an array.

  Transforms are pytrees: arrays such as signs, scales or matrices are leaves,
  the axis and block size are static. The laws, up to rounding:

    inverse(apply(x)) = x = apply(inverse(x))
    inverse_dual(apply_dual(w)) = w
    x @ w = apply(x) @ apply_dual(w)

  The last one says which operand takes what: with T as a matrix acting on
  columns, `apply` is T along `axis` of the activation and `apply_dual` is
  inv(T)' along the axis of the weight that is contracted with it. Orthogonal
  transforms (Hadamard, Permutation) have inv(T)' = T: both operands take the
  same map.
  """

  @property
  def axis(self) -> int:
    """The axis of the activation that is transformed, counted from the end."""
    ...

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns T x along `axis`, in the shape and dtype of `x`."""
    ...

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns inv(T) x along `axis`."""
    ...

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns inv(T)' w along `axis`, the contracted axis of a weight."""
    ...

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns T' w along `axis`, which undoes `apply_dual`."""
    ...


def pytree(cls: type[T]) -> type[T]:
  """Makes a frozen dataclass a pytree; fields marked `static` are metadata.

  Two are equal if their metadata and the bits of their leaves are; traced
  leaves equal themselves alone. The hash is that of types and metadata.

  Unflattening does not run ``__post_init__``, whose checks are for users:
  JAX also rebuilds trees around masks, shapes and other placeholders.
  """
  dataclass: Any = cls
  fields = dataclasses.fields(dataclass)
  static = [f.name for f in fields if f.metadata.get('static')]
  leaves = [f.name for f in fields if not f.metadata.get('static')]

  def flatten_with_keys(t):
    children = [(jax.tree_util.GetAttrKey(k), getattr(t, k)) for k in leaves]
    return children, tuple(getattr(t, k) for k in static)

  def unflatten(values, children):
    t = object.__new__(cls)
    for name, value in zip(static + leaves, (*values, *children), strict=True):
      object.__setattr__(t, name, value)
    return t

  def flatten(t):
    return [getattr(t, k) for k in leaves], tuple(getattr(t, k) for k in static)

  def equals(t, other):
    if type(other) is not cls:
      return NotImplemented
    mine, others = map(jax.tree.flatten, (t, other))
    return mine[1] == others[1] and all(map(_same, mine[0], others[0]))

  jax.tree_util.register_pytree_with_keys(
    cls, flatten_with_keys, unflatten, flatten
  )
  dataclass.__eq__ = equals
  dataclass.__hash__ = lambda t: hash((cls, jax.tree.structure(t)))
  return cls


def _same(a: Any, b: Any) -> bool:
  if a is b:
    return True
  if any(isinstance(leaf, Tracer) for leaf in (a, b)):
    return False
  if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in (a, b)):
    return a == b
  a, b = np.asarray(a), np.asarray(b)
  return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def check_axis(axis: int) -> int:
  """Returns `axis` as a negative int."""
  try:
    axis = operator.index(axis)
  except TypeError:
    raise TypeError(f'{axis=} must be a negative int') from None
  if axis >= 0:
    raise ValueError(
      f'{axis=} must be negative: transforms count axes from the end, so that '
      'they keep their meaning under vmap and scan; pass axis - x.ndim'
    )
  return axis


def check_operand(x: jax.Array, axis: int) -> int:
  """Returns the length of `axis` of the floating-point array `x`."""
  if not hasattr(x, 'ndim') or not jnp.issubdtype(x.dtype, jnp.floating):
    kind = getattr(x, 'dtype', type(x).__name__)
    raise TypeError(
      f'transforms take floating-point arrays, not {kind}; cast first'
    )
  check_axis(axis)
  if -axis > x.ndim:
    raise ValueError(
      f'{axis=} is out of range for an array of shape {x.shape}; for a vector '
      'use axis=-1'
    )
  return x.shape[axis]


def compute_dtype(x: jax.Array) -> jax.typing.DTypeLike:
  """Returns the dtype to compute in: float64 for float64, else float32."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def along(v: jax.Array, x: jax.Array, axis: int) -> jax.Array:
  """Returns the vector `v` shaped to broadcast along a negative axis of `x`."""
  shape = [1] * x.ndim
  shape[axis] = v.size
  return v.reshape(shape)
