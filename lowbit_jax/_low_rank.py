"""Weights with a low-rank term, such as the adapters of LoRA.

A weight w and two thin factors a and b are kept apart, and so are their
products:

  x @ (w + scale a b) = x @ w + scale (x @ a) @ b

so w may stay packed, and a and b are trained beside it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowbit_jax import _decoders, _explicit, _transformed, qarray
from lowbit_jax._member import Member
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._typing import DTypeLike
from lowbit_jax.numerics._codec import as_dtype, promoted
from lowbit_jax.qarray import QArray

Weight = jax.Array | QArray | Transformed


@qarray.with_dense_operators
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank:
  """A weight with a low-rank term beside it.

  It stands for `dequantize(weight) + scale * sum_r a[..., r] * b[..., r]`.
  `dot`, `dot_general`, `einsum` and `ragged_dot` contract `weight` as it is
  stored and the factors one after the other, where all axes that they contract
  belong to one factor and all others, but for batch axes, to the other one. In
  all other uses it is its dense value.

  The factors have the axes of the weight, and the rank behind them. Each has
  the sizes of the weight along its own axes and 1 along those of the other:

    weight (in, out)            a (in, 1, r)            b (1, out, r)
    weight (layers, in, out)    a (layers, in, 1, r)    b (layers, 1, out, r)
    weight (in, heads, size)    a (in, 1, 1, r)         b (1, heads, size, r)

  A pytree: stack layers by `jax.tree.map`, use them in `jax.vmap` and
  `jax.lax.scan`. `lowbit_jax.partition` puts the factors into the trainable
  tree and the weight into the frozen one, be it an array or not.

  Attributes:
    weight: float array, QArray or Transformed.
    a: float factor, of one axis more than the weight.
    b: the other one.
    scale: a number that the product of the factors is multiplied with.

  Raises:
    TypeError: for a weight, factor or scale of another type.
    ValueError: for factors whose shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> a, b = jnp.ones((64, 1, 2)), jnp.ones((1, 8, 2))
    >>> weight = lowbit.ops.LowRank(w, a, b, scale=0.5)
    >>> float(lowbit.dot(jnp.ones(64), weight)[0])
    128.0
  """

  weight: Weight
  a: jax.Array
  b: jax.Array
  scale: float = 1.0

  def __post_init__(self) -> None:
    if not (is_quantized(self.weight) or _is_float_array(self.weight)):
      raise TypeError(
        'weight must be a float array, a QArray or a Transformed, got'
        f' {type(self.weight).__name__}'
      )
    if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
      raise TypeError(f'scale={self.scale!r} must be a Python number')
    object.__setattr__(self, 'scale', float(self.scale))
    for name, factor in (('a', self.a), ('b', self.b)):
      if not _is_float_array(factor):
        raise TypeError(
          f'{name} must be a float array, got {type(factor).__name__}'
        )
      if len(factor.shape) != self.ndim + 1:
        raise ValueError(
          f'{name}.shape={factor.shape} must have the axes of the weight of'
          f' shape {self.shape}, and one for the rank behind them'
        )
    sizes = zip(self.a.shape, self.b.shape, self.shape, strict=False)
    fit = all({m, n} <= {1, size} and size in (m, n) for m, n, size in sizes)
    if not fit or self.a.shape[-1] != self.b.shape[-1]:
      raise ValueError(
        f'a.shape={self.a.shape} and b.shape={self.b.shape} must agree in the'
        f' rank and have, along each axis of the weight of shape {self.shape},'
        ' its size or 1, and one of them its size'
      )

  def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
    key = jax.tree_util.GetAttrKey
    names = ('weight', 'a', 'b')
    children = tuple((key(name), getattr(self, name)) for name in names)
    return children, (self.scale,)

  @classmethod
  def tree_unflatten(cls, static: tuple, children: Sequence) -> 'LowRank':
    x = object.__new__(cls)  # unchecked: leaves may be placeholders
    names = ('weight', 'a', 'b', 'scale')
    for name, value in zip(names, (*children, *static), strict=True):
      object.__setattr__(x, name, value)
    return x

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.weight.shape)

  @property
  def ndim(self) -> int:
    return self.weight.ndim

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def rank(self) -> int:
    """The rank of the term: the last size of the factors."""
    return self.a.shape[-1]

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the array that this one stands for."""
    return np.dtype(self.weight.dtype)

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves, those of the factors too."""
    leaves = jax.tree.leaves(self)
    sizes = (math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
    return sum(sizes)

  @property
  def T(self) -> 'LowRank':
    """All axes reversed."""
    axes = (*reversed(range(self.ndim)), self.ndim)
    a, b = self.a.transpose(axes), self.b.transpose(axes)
    return replace(self, weight=self.weight.T, a=a, b=b)

  @property
  def mT(self) -> 'LowRank':
    """The last two axes swapped."""
    weight = self.weight.mT  # refuses a weight of one axis
    a, b = (factor.swapaxes(-2, -3) for factor in (self.a, self.b))
    return replace(self, weight=weight, a=a, b=b)

  def astype(self, dtype: DTypeLike) -> 'LowRank':
    """The same numbers standing for an array of another dtype.

    An array is cast; the factors stay as they are.
    """
    return replace(self, weight=self.weight.astype(as_dtype(dtype)))

  def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
    """The array that this one stands for, added in float32."""
    dtype = self.dtype if dtype is None else as_dtype(dtype)
    return _decoders.run(decode, self, dtype)

  def __getitem__(self, index: Any) -> 'LowRank':
    """NumPy's indexing by integers and slices, as far as the weight goes."""
    return _getitem(self, index)

  def __len__(self) -> int:
    return self.shape[0]

  def __iter__(self) -> Iterator['LowRank']:
    return (self[i] for i in range(len(self)))

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __array__(
    self, dtype: DTypeLike | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    return np.asarray(self.dequantize(), dtype=dtype)

  def __repr__(self) -> str:
    weight = self.weight
    if _is_float_array(weight):
      weight = f'Array({weight.dtype}, shape={tuple(weight.shape)})'
    rank = self.rank if _is_float_array(self.a) else None
    return f'LowRank({weight!s}, rank={rank}, scale={self.scale:g})'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
  """The low-rank term of one weight. Made by `lowbit_jax.lora.init`.

  A pytree with the leaves `a` and `b`; the scale is not trained.

  Attributes:
    a: float factor, as in `ops.LowRank`; that of the inputs.
    b: that of the outputs.
    scale: what their product is multiplied with, alpha / rank.
  """

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(default=1.0, metadata={'static': True})


Stored = QArray | Transformed | LowRank


def is_operand(x: object) -> TypeGuard[Stored | Member]:
  """Whether `x` is a QArray, Transformed, LowRank or Member: what products take
  beside arrays; the `is_leaf` of tree functions."""
  return is_quantized(x) or isinstance(x, LowRank | Member)


def replace(x: LowRank, **changes: Any) -> LowRank:
  """`x` with other fields, unchecked."""
  weight, a, b, scale = (
    changes.get(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)
  )
  return x.tree_unflatten((scale,), (weight, a, b))


def spanned(factor: jax.Array, shape: Sequence[int]) -> tuple[int, ...]:
  """The axes along which a factor has the size of the weight.

  Args:
    factor: a or b.
    shape: of the weight.
  """
  return tuple(d for d, n in enumerate(shape) if factor.shape[d] == n)


def narrowed(
  factor: jax.Array, shape: Sequence[int], away: Sequence[int] = ()
) -> tuple[jax.Array, list[int]]:
  """A factor without axes that are not its own, an operand of `jnp.einsum`.

  Args:
    factor: a or b.
    shape: of the weight.
    away: axes of size 1 that are left out in any case.

  Returns:
    The factor, and the numbers of its axes: those of the weight, then the rank.
  """
  own = [d for d in spanned(factor, shape) if d not in away]
  others = [d for d in range(len(shape)) if d not in own]
  return jnp.squeeze(factor, others), [*own, len(shape)]


def term(x: LowRank) -> jax.Array:
  """`scale * sum_r a[..., r] * b[..., r]`, in float32 or wider."""
  wide = promoted(jnp.float32, promoted(x.a.dtype, x.b.dtype))
  a, b = x.a.astype(wide) * x.scale, x.b.astype(wide)
  operands = (*narrowed(a, x.shape), *narrowed(b, x.shape))
  return jnp.einsum(
    *operands, list(range(x.ndim)), precision=jax.lax.Precision.HIGHEST
  )


def parts(weight: Any) -> list[Any]:
  """What splits each axis of a weight, as `_explicit.parts` of an array.

  Args:
    weight: an array, QArray, Transformed or LowRank.
  """
  while isinstance(weight, Transformed | LowRank):
    weight = weight.weight
  if isinstance(weight, QArray):
    return qarray.parts(weight)
  return _explicit.parts(weight)


def decode(x: Stored, dtype: DTypeLike) -> jax.Array:
  """`dequantize` of any stored operand without a name, for operations of this
  library."""
  if isinstance(x, Transformed):
    return _transformed.decode(x, np.dtype(dtype))
  if isinstance(x, QArray):
    return qarray.decode(x, dtype)
  return _decode(x, np.dtype(dtype))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _decode(x: LowRank, dtype: np.dtype) -> jax.Array:
  def run(x):
    added = term(x)
    wide = promoted(x.dtype, added.dtype)
    weight = x.weight
    weight = decode(weight, wide) if is_quantized(weight) else weight
    return (weight.astype(wide) + added.astype(wide)).astype(dtype)

  def specs(result, x):
    del result
    return PartitionSpec(*parts(x))

  return _explicit.automatic(run, specs, x)


def _getitem(x: LowRank, key: Any) -> LowRank:
  index = tuple(qarray.index_per_axis(x, key))

  def take(factor):
    own = spanned(factor, x.shape)
    picks = (i if d in own else _of_one(i) for d, i in enumerate(index))
    return factor[tuple(picks)]

  return replace(x, weight=x.weight[index], a=take(x.a), b=take(x.b))


def _of_one(index: Any) -> Any:
  """An index of an axis of size 1 in place of that of a longer one."""
  if isinstance(index, slice):
    return slice(None)
  kind = index.dtype if hasattr(index, 'dtype') else np.asarray(index).dtype
  if not jnp.issubdtype(kind, jnp.integer):
    raise IndexError(
      f'index {index!r} of a LowRank must be an int, a slice or an array of'
      ' integers; use dequantize(w)[...]'
    )
  return jnp.zeros_like(jnp.asarray(index))


def _is_float_array(x: Any) -> bool:
  is_array = isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
  return is_array and jnp.issubdtype(x.dtype, jnp.floating)
