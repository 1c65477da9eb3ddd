"""A quantized array as a pytree.

`fmt`, `axis`, `pad` and `dtype` are static. Shape is derived from the leaves
and axes count from the end, so inside vmap, scan, shard_map and donation a
QArray has the shape of its part. Unflattening checks nothing, because
transformations put placeholders into the leaves.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowbit_jax import _decoders, _explicit, formats
from lowbit_jax._typing import ArrayLike, Axis, DTypeLike, Shape, as_tuple
from lowbit_jax.formats import BlockFormat, IntFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics import _packing, _scaling
from lowbit_jax.numerics._codec import as_dtype, dither_step, spec
from lowbit_pallas.arith import codec

LEAVES = ('codes', 'scale', 'tensor_scale', 'zero_point', 'minimum')

_BINARY = ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'matmul')
_COMPARISONS = ('lt', 'le', 'gt', 'ge')
_UNARY = ('neg', 'pos', 'abs')
_Class = TypeVar('_Class', bound=type)


def with_dense_operators(cls: _Class) -> _Class:
  """Gives a class with `__jax_array__` the operators of its dense value.

  Without them `numpy_array @ x` would convert x to NumPy, which fails under
  jit: the priority makes NumPy leave the operation to x.
  """

  def set_method(name, function):
    method = f'__{name}__'
    function.__name__ = method
    function.__qualname__ = f'{cls.__name__}.{method}'
    setattr(cls, method, function)

  def forward(apply):
    return lambda self, other: apply(self.__jax_array__(), _dense(other))

  def reflected(apply):
    return lambda self, other: apply(_dense(other), self.__jax_array__())

  def unary(apply):
    return lambda self: apply(self.__jax_array__())

  for name in _BINARY:
    set_method(name, forward(getattr(operator, name)))
    set_method(f'r{name}', reflected(getattr(operator, name)))
  for name in _COMPARISONS:
    set_method(name, forward(getattr(operator, name)))
  for name in _UNARY:
    set_method(name, unary(getattr(operator, name)))
  cls.__array_priority__ = 100  # pyright: ignore[reportAttributeAccessIssue]
  return cls


def _dense(x: Any) -> Any:
  # Tracers have the attribute too, and it is None.
  convert = getattr(x, '__jax_array__', None)
  return x if convert is None else convert()


@with_dense_operators
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QArray:
  """A quantized array. Made by `lowbit_jax.quantize`.

  Invariants, in the order in which `lowbit_jax.qarray.validate` checks them:

  1. Elements have at most 8 bits, as have scales that are not float32 or
     bfloat16. `axis` names the axes of a block, counted from the end. `pad` has
     an entry for each of them, fewer elements than are kept together (whole
     blocks and bytes). `dtype` is a real floating-point type.
  2. Leaves have equal rank: codes, and scale, tensor_scale, zero_point and
     minimum where the format has them; absent ones are None.
  3. `codes` is uint8. Codes of b bits are packed along the first block axis,
     little end first, so this axis has b / 8 of the padded logical size.
  4. Along a block axis `scale` has one entry per block; along others it has the
     size of the array. `zero_point` (uint8) and `minimum` (stored as scales
     are) have the shape of `scale`. `tensor_scale` (float32) has size 1 along
     every axis, except that along leading axes of a stack, as vmap(quantize)
     makes, it has their size.
  5. Scales of at most 8 bits are uint8 codes, others float32, bfloat16 or
     float16 numbers; with two levels of scales `scale` and `minimum` are
     QArrays of float32 in the format `fmt.scale_blocks`.
  6. x = (element - zero_point) * scale * tensor_scale + minimum, without the
     absent ones.

  Attributes:
    codes: packed element codes, uint8.
    scale: block scales, or None.
    tensor_scale: float32 scale of the whole tensor, or None.
    zero_point: uint8 zero points, or None.
    minimum: minima of blocks, or None.
    fmt: the block format.
    axis: block axis as a negative int, or a tuple of them for tiles.
    pad: elements of padding at the end of each block axis, a tuple.
    dtype: dtype of the array that this one stands for.
    merged: () where blocks lie along one axis. Blocks that run through several
      axes at once, as through (heads, size), lie in leaves that have one axis
      in their place, which is `axis`; `merged` are the sizes of these axes but
      for the first, which follows from the leaves.
  """

  codes: jax.Array
  scale: Any
  tensor_scale: jax.Array | None
  zero_point: jax.Array | None
  fmt: BlockFormat = dataclasses.field(metadata={'static': True})
  axis: int | tuple[int, ...] = dataclasses.field(metadata={'static': True})
  pad: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  dtype: np.dtype = dataclasses.field(metadata={'static': True})
  merged: tuple[int, ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )
  minimum: Any = None

  @property
  def axes(self) -> tuple[int, ...]:
    """The block axes as a tuple, the packed one first."""
    return self.axis if isinstance(self.axis, tuple) else (self.axis,)

  @property
  def ndim(self) -> int:
    return len(self.codes.shape) + len(self.merged)

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.codes.shape)
    packed = self.axes[0]
    shape[packed] = _packing.unpacked_size(shape[packed], self.fmt.element.bits)
    for axis, pad in zip(self.axes, self.pad, strict=True):
      shape[axis] -= pad
    if self.merged:
      at, inner = len(shape) + packed, math.prod(self.merged)
      first = shape[at] // inner if inner else 0
      shape[at : at + 1] = (first, *self.merged)
    return tuple(shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves on the device."""
    return sum(
      math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
      for leaf in jax.tree.leaves(self)
    )

  @property
  def bits_per_element(self) -> float:
    """8 * nbytes / size, padding and scales included."""
    return 8 * self.nbytes / self.size if self.size else 0.0

  @property
  def sharding(self) -> jax.sharding.Sharding:
    """Sharding of the codes."""
    return self.codes.sharding

  @property
  def T(self) -> 'QArray':
    """All axes reversed."""
    _check_apart(self, 'transposed')
    moved = jax.tree.map(lambda leaf: leaf.T, self)
    return with_axes(moved, [-1 - (self.ndim + a) for a in self.axes])

  @property
  def mT(self) -> 'QArray':
    """The last two axes swapped."""
    if self.ndim < 2:
      raise ValueError(f'mT needs at least 2 axes, got shape {self.shape}')
    _check_apart(self, 'transposed')
    moved = jax.tree.map(lambda leaf: leaf.swapaxes(-1, -2), self)
    return with_axes(moved, [{-1: -2, -2: -1}.get(a, a) for a in self.axes])

  def astype(self, dtype: DTypeLike) -> 'QArray':
    """The same numbers standing for an array of another dtype."""
    return replace(self, dtype=as_dtype(dtype))

  def block_until_ready(self) -> 'QArray':
    return jax.block_until_ready(self)

  def reshape(self, *shape: int | Shape) -> 'QArray':
    """A reshape that keeps blocks whole.

    Axes before the (first) block axis regroup freely; the block axis itself may
    split at block boundaries; later axes stay. Axes that blocks span together
    become one.
    """
    if len(shape) == 1 and not isinstance(shape[0], int):
      shape = as_tuple('shape', shape[0])
    return _reshape(flat(self), shape)

  @classmethod
  def from_codes(
    cls,
    codes: ArrayLike,
    scale: 'ArrayLike | QArray | None',
    fmt: BlockFormat,
    *,
    axis: Axis = None,
    tensor_scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    minimum: 'ArrayLike | QArray | None' = None,
    dtype: DTypeLike = jnp.float32,
  ) -> 'QArray':
    """A QArray of codes and scales that were made elsewhere, checked.

    Args:
      codes: one element each, of the shape of the array: unsigned integers 0 to
        2^bits - 1, or for signed integer elements of any signed dtype, the
        integers themselves.
      scale: one per block: numbers of the dtype of the scale format, for
        formats of at most 8 bits uint8 codes, for two levels of scales a QArray
        in `fmt.scale_blocks`; None where the format has none.
      fmt: the block format.
      axis: as in `quantize`.
      tensor_scale: one float32 number, for formats that have it.
      zero_point: uint8 of the shape of `scale`, for formats that have it.
      minimum: as `scale`, for formats that have it.
      dtype: dtype of the array that this one stands for.

    Raises:
      ValueError: for shapes and codes that do not fit. Codes that are traced
        are cut to their bits.
      TypeError: for dtypes that do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowbit_jax import QArray, formats
      >>> codes, scale = jnp.full((2, 32), -3, jnp.int8), jnp.ones((2, 1))
      >>> fmt = formats.grouped(formats.int4, 32)
      >>> jnp.asarray(QArray.from_codes(codes, scale, fmt))[0, 0].item()
      -3.0
    """
    leaves = scale, tensor_scale, zero_point, minimum
    return _from_codes(codes, fmt, axis, leaves, as_dtype(dtype))

  def __getitem__(self, index: Any) -> 'QArray':
    """NumPy's indexing by ints, slices and integer arrays.

    Slices of a block axis must fall on block boundaries.
    """
    return _getitem(self, index)

  def __len__(self) -> int:
    if not self.ndim:
      raise TypeError('len() of a QArray without axes')
    return self.shape[0]

  def __iter__(self) -> Iterator['QArray']:
    return (self[i] for i in range(len(self)))

  def __jax_array__(self) -> jax.Array:
    return dequantize(self)

  def __array__(
    self, dtype: DTypeLike | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    return np.asarray(dequantize(self), dtype=dtype)

  def __hash__(self) -> int:
    raise TypeError(
      f'{self!r} has no hash: pass it to jax.jit as an argument that is traced,'
      ' not in static_argnums or static_argnames'
    )

  def __repr__(self) -> str:
    try:
      shape = self.shape
      size = f'{self.bits_per_element:.4g} bits/element, {self.nbytes} bytes'
    except (AttributeError, TypeError):  # placeholders in the leaves
      return f'QArray({self.fmt}, axis={self.axis}, leaves={self.codes!r})'
    axis = merged_axes(self) if self.merged else self.axis
    return (
      f'QArray({self.fmt}, shape={shape}, dtype={self.dtype.name},'
      f' axis={axis}, {size})'
    )


def flat(q: QArray) -> QArray:
  """`q` with one axis in place of those that its blocks span together."""
  return replace(q, merged=()) if q.merged else q


def merged_axes(q: QArray) -> tuple[int, ...]:
  """The axes that blocks span together, negative and ascending; the block axis
  where it is one."""
  return tuple(range(q.axes[0] - len(q.merged), q.axes[0] + 1))


def _check_apart(q: QArray, verb: str) -> None:
  if q.merged:
    raise ValueError(
      f'{q!r} cannot be {verb}: its blocks span axes {merged_axes(q)} together;'
      ' use dequantize(q)'
    )


def is_qarray(x: object) -> bool:
  """Whether `x` is a QArray; the `is_leaf` of tree functions."""
  return isinstance(x, QArray)


replace = dataclasses.replace


def check_qarray(q: object, name: str = 'q') -> QArray:
  """Refuses what is not a QArray."""
  if isinstance(q, QArray):
    return q
  raise TypeError(f'{name} must be a QArray, got {type(q).__name__}')


def validate(q: QArray) -> QArray:
  """Checks the invariants of `QArray` and returns `q`.

  Raises:
    TypeError: for a field or leaf of another type.
    ValueError: for one with another value or shape.
  """
  check_qarray(q)
  # Axes that blocks span together multiply to the one of the leaves.
  if q.merged:
    whole = validate(flat(q))
    known = isinstance(q.merged, tuple) and all(
      type(n) is int and n > 0 for n in q.merged
    )
    if (
      not known or q.fmt.is_tile or whole.shape[q.axes[0]] % math.prod(q.merged)
    ):
      raise ValueError(
        f'merged={q.merged} must be sizes of axes that divide the axis'
        f' {q.axes[0]} of {whole.shape}, in a format without tiles'
      )
    return q
  _check_static(q)
  # Leaves are there as the format has them, with equal rank.
  fmt, ndim = q.fmt, q.ndim
  present = {
    'scale': fmt.scale is not None,
    'tensor_scale': fmt.tensor_scale,
    'zero_point': fmt.zero_point,
    'minimum': fmt.minimum,
  }
  for name, expected in present.items():
    leaf = getattr(q, name)
    if (leaf is not None) != expected:
      raise ValueError(
        f'{name} of a {fmt} array must be {"given" if expected else "None"}'
      )
    if leaf is not None and len(leaf.shape) != ndim:
      raise ValueError(
        f'{name}.shape={leaf.shape} must have the rank of'
        f' codes.shape={q.codes.shape}'
      )
  # Codes: bytes, of whole blocks along the block axes.
  if q.codes.dtype != jnp.uint8:
    raise TypeError(f'codes.dtype={q.codes.dtype} must be uint8')
  padded = list(q.shape)
  for k, (axis, pad) in enumerate(zip(q.axes, q.pad, strict=True)):
    padded[axis] += pad
    if padded[axis] < pad or padded[axis] % alignment(q, k):
      raise ValueError(
        f'codes.shape={q.codes.shape} holds {padded[axis]} elements along axis'
        f' {axis} for {pad=}, no multiple of {alignment(q, k)} as {fmt} needs'
      )
  # Scales, minima and zero points: one per block.
  expected = scale_shape(padded, fmt, q.axes)
  scale_dtype = np.dtype(np.uint8)
  if fmt.scale is not None and not _scaling.is_coded(fmt.scale):
    scale_dtype = jnp.dtype(fmt.scale.name)
  for name, leaf in (('scale', q.scale), ('minimum', q.minimum)):
    _check_leaf(name, leaf, expected, scale_dtype, fmt)
    if leaf is not None:
      _check_level(name, leaf, q)
  _check_leaf('zero_point', q.zero_point, expected, np.dtype(np.uint8), fmt)
  # Tensor scales: one, or one for each member of a stack.
  if q.tensor_scale is not None:
    sizes = zip(q.tensor_scale.shape, q.shape, strict=True)
    expected = tuple(1 if t == 1 else n for t, n in sizes)
    float32 = np.dtype(np.float32)
    _check_leaf('tensor_scale', q.tensor_scale, expected, float32, fmt)
  return q


def _check_level(name: str, leaf: Any, q: QArray) -> None:
  """Checks that scales are a QArray where they are quantized in their turn."""
  scales = q.fmt.scale_blocks
  if isinstance(leaf, QArray) != (scales is not None):
    kind = 'an array' if scales is None else f'a QArray of {scales}'
    raise TypeError(f'{name} of a {q.fmt} array must be {kind}, got {leaf!r}')
  if scales is not None and (validate(leaf).fmt, leaf.axis) != (scales, q.axis):
    raise ValueError(f'{name}={leaf!r} must be {scales} along axis {q.axis}')


def _check_static(q: QArray) -> None:
  """Checks fmt, axis, pad and dtype."""
  fmt = q.fmt
  if not isinstance(fmt, BlockFormat):
    raise TypeError(f'{fmt=} of a QArray must be a BlockFormat')
  if fmt.element.bits > 8:
    raise ValueError(f'{fmt} has elements of {fmt.element.bits} bits, not 1..8')
  stored = (None, formats.float32, formats.bfloat16, formats.float16)
  if fmt.scale not in stored and not _scaling.is_coded(fmt.scale):
    raise ValueError(
      f'{fmt} has scales of {fmt.scale}; a QArray stores scales of at most 8'
      ' bits, float32, bfloat16 and float16'
    )
  if block_axes(fmt, q.axis, q.ndim) != q.axes:
    raise ValueError(f'axis={q.axis} must count from the end')
  good = isinstance(q.pad, tuple) and len(q.pad) == len(q.axes)
  for k, pad in enumerate(q.pad if good else ()):
    good = good and type(pad) is int and 0 <= pad < alignment(q, k)
  if not good:
    raise ValueError(
      f'pad={q.pad} must be a tuple with an int for each axis of axis={q.axis},'
      f' from 0 to below the elements that {fmt} keeps together,'
      f' {[alignment(q, k) for k in range(len(q.axes))]}'
    )
  if not isinstance(q.dtype, np.dtype) or not jnp.issubdtype(
    q.dtype, jnp.floating
  ):
    raise TypeError(
      f'dtype={q.dtype} of a QArray must be a real floating-point dtype'
    )


def _check_leaf(name: str, leaf, shape, dtype: np.dtype, fmt) -> None:
  if leaf is None:
    return
  if leaf.shape != tuple(shape):
    raise ValueError(f'{name}.shape={leaf.shape} must be {shape} in {fmt}')
  if leaf.dtype != dtype:
    raise TypeError(f'{name}.dtype={leaf.dtype} must be {dtype} in {fmt}')


def _from_codes(codes, fmt, axis, scales, dtype) -> QArray:
  check_format(fmt)
  leaves: Any = (
    x if x is None or isinstance(x, QArray) else jnp.asarray(x) for x in scales
  )
  codes = _unsigned(codes, fmt.element)
  axes = block_axes(fmt, axis, codes.ndim)
  pad = padding(codes.shape, fmt, axes)
  scale, tensor_scale, zero_point, minimum = leaves
  widths = [(0, 0)] * codes.ndim
  for block_axis, p in zip(axes, pad, strict=True):
    widths[block_axis] = (0, p)
  codes = jnp.pad(codes, widths)
  if tensor_scale is not None and tensor_scale.size == 1:
    tensor_scale = tensor_scale.reshape((1,) * codes.ndim)
  q = QArray(
    codes=_packing.pack_unchecked(codes, fmt.element.bits, axes[0]),
    scale=scale,
    tensor_scale=tensor_scale,
    zero_point=zero_point,
    minimum=minimum,
    fmt=fmt,
    axis=axes if fmt.is_tile else axes[0],
    pad=pad,
    dtype=dtype,
  )
  return validate(q)


def _unsigned(codes, element) -> jax.Array:
  """Codes as uint8; the integers of a signed element as their codes."""
  codes = codes if isinstance(codes, jax.Array) else np.asarray(codes)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise TypeError(f'codes.dtype={codes.dtype} must be an integer dtype')
  is_value = (
    isinstance(element, IntFormat)
    and element.signed
    and jnp.issubdtype(codes.dtype, jnp.signedinteger)
  )
  low, high = 0, 2**element.bits - 1
  if is_value:
    low, high = -(2 ** (element.bits - 1)), 2 ** (element.bits - 1) - 1
  return _packing.check_codes(codes, low, high).astype(jnp.uint8) & (
    2**element.bits - 1
  )


def check_axis(axis: int, ndim: int) -> int:
  """`axis` counted from the front; refuses what is no axis of an array."""
  try:
    axis = operator.index(axis)
  except TypeError:
    raise TypeError(f'{axis=} must be an int') from None
  if not -ndim <= axis < ndim:
    raise ValueError(f'{axis=} is out of range for an array of rank {ndim}')
  return axis % ndim


def block_axes(fmt: BlockFormat, axis: Axis, ndim: int) -> tuple[int, ...]:
  """Block axes as negative ints.

  Args:
    fmt: the format.
    axis: an int, a tuple as long as the format's block, or None for the last
      axis (the last two for tiles).
    ndim: rank of the array.
  """
  k = len(fmt.block)
  if axis is None:
    axis = -1 if k == 1 else (-2, -1)
  axes = axis if isinstance(axis, tuple) else (axis,)
  if not all(isinstance(a, int) for a in axes):
    raise TypeError(f'{axis=} must be an int or a tuple of ints')
  if len(axes) != k:
    raise ValueError(
      f'{axis=} names {len(axes)} axes, but blocks of {fmt} span {k}'
    )
  if any(not -ndim <= a < ndim for a in axes):
    raise ValueError(f'{axis=} is out of range for an array of rank {ndim}')
  axes = tuple(a - ndim if a >= 0 else a for a in axes)
  if len(set(axes)) != k:
    raise ValueError(f'{axis=} names an axis twice')
  return axes


def spanned_axes(
  fmt: BlockFormat, axis: Axis, ndim: int
) -> tuple[int, ...] | None:
  """The axes that blocks of one dimension span together, None for one axis.

  Args:
    fmt: the format.
    axis: as in `quantize`.
    ndim: rank of the array.

  Returns:
    Negative axes, ascending and adjacent.
  """
  if fmt.is_tile or not isinstance(axis, tuple) or len(axis) < 2:
    return None
  if not all(isinstance(a, int) for a in axis):
    raise TypeError(f'{axis=} must be an int or a tuple of ints')
  if any(not -ndim <= a < ndim for a in axis):
    raise ValueError(f'{axis=} is out of range for an array of rank {ndim}')
  axes = tuple(a - ndim if a >= 0 else a for a in axis)
  if axes != tuple(range(axes[0], axes[0] + len(axes))):
    raise ValueError(
      f'{axis=} must name adjacent axes in ascending order, along which blocks'
      f' of {fmt} run together'
    )
  return axes


def merge(x: Any, axes: tuple[int, ...] | None) -> Any:
  """`x` with one axis in place of `axes`, from `spanned_axes`.

  Args:
    x: an array or a `jax.ShapeDtypeStruct`.
    axes: adjacent axes, or None to leave x as it is.
  """
  if axes is None:
    return x
  first, end = axes[0] + x.ndim, axes[-1] + 1 + x.ndim
  size = math.prod(x.shape[first:end])
  shape = (*x.shape[:first], size, *x.shape[end:])
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, x.dtype)

  def specs(merged, x):
    del merged
    split = _explicit.parts(x)
    return PartitionSpec(*split[: first + 1], *split[end:])

  return _explicit.automatic(lambda x: x.reshape(shape), specs, x)


def padding(
  shape: Shape, fmt: BlockFormat, axes: Sequence[int]
) -> tuple[int, ...]:
  """Elements that fill each block axis up to whole blocks and whole bytes."""
  group = _packing.codes_per_group(fmt.element.bits)
  out = []
  for i, (axis, block) in enumerate(zip(axes, fmt.block, strict=True)):
    multiple = max(block, 1)
    if i == 0:
      multiple = math.lcm(multiple, group)
    out.append(-shape[axis] % multiple)
  return tuple(out)


def split_blocks(
  shape: Shape, fmt: BlockFormat, axes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shape that separates blocks from their elements.

  Args:
    shape: padded shape.
    fmt: the format.
    axes: negative block axes.

  Returns:
    (view shape, positions of the axes inside a block). Each block axis n
    becomes (n / g, g); without block scales it becomes (1, n).
  """
  sizes = fmt.block if fmt.scale is not None else (0,) * len(axes)
  blocks = dict(zip(axes, sizes, strict=True))
  view, inner = [], []
  for i, n in enumerate(shape):
    block = blocks.get(i - len(shape))
    if block is None:
      view.append(n)
      continue
    size = block or n
    view += [n // size if size else 1, size]
    inner.append(len(view) - 1)
  return tuple(view), tuple(inner)


def scale_shape(
  shape: Shape, fmt: BlockFormat, axes: Sequence[int]
) -> tuple[int, ...]:
  """Shape of the block scales of a padded shape."""
  view, inner = split_blocks(shape, fmt, axes)
  return tuple(n for i, n in enumerate(view) if i not in inner)


def unpadded(
  x: jax.Array, axes: Sequence[int], pad: Sequence[int]
) -> jax.Array:
  """`x` without `pad` elements at the end of each axis."""
  for axis, p in zip(axes, pad, strict=True):
    if p:
      x = jax.lax.slice_in_dim(x, 0, x.shape[axis] - p, axis=axis)
  return x


def element_values(q: QArray) -> jax.Array:
  """Decoded elements in float32, padded, without any scale."""
  codes = _packing.unpack_unchecked(q.codes, q.fmt.element.bits, q.axes[0])
  return codec.decode(codes, spec(q.fmt.element))


@runtime_checkable
class Decodes(Protocol):
  """What holds QArrays and decodes itself, as `ops.Transformed`."""

  def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array: ...


def dequantize(
  q: QArray | Decodes,
  dtype: DTypeLike | None = None,
  *,
  dither: ArrayLike | None = None,
) -> jax.Array:
  """The array that `q` stands for.

  Multiplies the element by the block scale, then by the tensor scale, and adds
  the minimum, in float32, and casts the result.

  Args:
    q: a quantized array, or an `ops.Transformed` of one.
    dtype: dtype of the result; None for `q.dtype`.
    dither: the offsets of `quantize(..., rounding='dithered')`, which are
      subtracted: `numerics.dither(key, shape)` with the key and the shape that
      `quantize` was given. Of a part or a transpose of its result it takes the
      same part or transpose of the offsets.

  Returns:
    An array of shape `q.shape`. Poisoned blocks are NaN.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from lowbit_jax import dequantize, formats, numerics, quantize
    >>> key, x = jax.random.key(0), jnp.full((8, 32), 0.3)
    >>> fmt = formats.grouped(formats.int4, 32)
    >>> q = quantize(x, fmt, rounding='dithered', key=key)
    >>> offsets = numerics.dither(key, x.shape)
    >>> dequantize(q[4:], dither=offsets[4:]).shape
    (4, 32)
  """
  if isinstance(q, Decodes) and dither is None:
    return q.dequantize(dtype)
  q = check_qarray(q)
  dtype = q.dtype if dtype is None else as_dtype(dtype)
  if dither is None:
    return _decoders.run(_decode_whole, q, dtype)
  dither_step(q.fmt.element)  # refuses elements that are not dithered
  dither = jnp.asarray(dither)
  if dither.shape != q.shape:
    raise ValueError(
      f'dither.shape={dither.shape} must be that of q, {q.shape}: the offsets'
      ' numerics.dither(key, shape) of the whole array, indexed and'
      ' transposed as q was'
    )
  return _compiled(q, dtype, dither)


def _decode_whole(q: QArray, dtype: np.dtype) -> jax.Array:
  """`decode` by a kernel, where there is one."""
  from lowbit_jax import _dequantize_cpu

  if not _dequantize_cpu.takes(q.codes, q.fmt, q.axes, dtype):
    return decode(q, dtype)

  def run(q):
    x = _dequantize_cpu.values(q.codes, q.scale, q.fmt, q.axes)
    return unpadded(x, q.axes, q.pad).reshape(q.shape)

  return _explicit.automatic(run, lambda x, q: PartitionSpec(*parts(q)), q)


def decode(q: QArray, dtype: DTypeLike | None = None) -> jax.Array:
  """`dequantize` without checks and without a name, for use inside the
  operations of this library."""
  return _compiled(q, q.dtype if dtype is None else np.dtype(dtype), None)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _compiled(q: QArray, dtype: np.dtype, dither) -> jax.Array:
  def run(q, dither):
    return _dequantize(q, dtype, dither)

  def specs(x, q, dither):
    return PartitionSpec(*parts(q))

  return _explicit.automatic(run, specs, q, dither)


def _dequantize(q: QArray, dtype: np.dtype, dither) -> jax.Array:
  if q.merged:
    if dither is not None:
      dither = merge(dither, merged_axes(q))
    return _dequantize(flat(q), dtype, dither).reshape(q.shape)
  q = one_level(q)
  x = element_values(q)
  if dither is not None:
    offset = dither * dither_step(q.fmt.element)
    widths = [(0, 0)] * q.ndim
    for axis, pad in zip(q.axes, q.pad, strict=True):
      widths[axis] = (0, pad)
    x = x - jnp.pad(offset, widths)
  view, inner = split_blocks(x.shape, q.fmt, q.axes)

  def per_block(leaf):
    return jnp.expand_dims(leaf, inner)

  y = x.reshape(view)
  if q.zero_point is not None:
    y = y - per_block(q.zero_point).astype(jnp.float32)
  if q.scale is not None:
    assert q.fmt.scale is not None
    for factor in _scaling.factors(q.scale, q.fmt.scale):
      y = y * per_block(factor)
  if q.tensor_scale is not None:
    y = y * per_block(q.tensor_scale)
  if q.minimum is not None:
    y = y + per_block(q.minimum).astype(jnp.float32)
  return unpadded(y.reshape(x.shape), q.axes, q.pad).astype(dtype)


def parts(q: QArray) -> list[Any]:
  """What splits each axis of the array, as `_explicit.parts` of an array."""
  out = _explicit.parts(q.codes)
  end = len(out) + q.axes[0] + 1
  return [*out[:end], *[None] * len(q.merged), *out[end:]]


def leaf_specs(q: QArray, parts: Sequence[Any]) -> QArray:
  """The PartitionSpec of every leaf, where it is.

  Args:
    q: a QArray; shapes will do.
    parts: what splits each axis of the array.
  """

  def place(leaf):
    is_whole = [a == 1 != n for a, n in zip(leaf.shape, q.shape, strict=True)]
    own = zip(is_whole, parts, strict=True)
    return PartitionSpec(*(None if whole else part for whole, part in own))

  return jax.tree.map(place, q)


def cuts(q: QArray, k: int, shards: int) -> bool:
  """Whether so many shards of block axis number `k` would cut a block, one of
  scales, or a byte."""
  return q.shape[q.axes[k]] % (shards * unit(q, k)) != 0


def with_axes(q: QArray, axes: Sequence[int]) -> QArray:
  """`q` with other block axes, which are those of its scales too."""
  axis = tuple(axes) if len(axes) > 1 else axes[0]
  if q.fmt.scale_blocks is None:
    return replace(q, axis=axis)
  scale, minimum = (
    None if leaf is None else replace(leaf, axis=axis)
    for leaf in (q.scale, q.minimum)
  )
  return replace(q, axis=axis, scale=scale, minimum=minimum)


def one_level(q: QArray) -> QArray:
  """`q` with float32 scales and minima where they are quantized in turn."""
  if q.fmt.scale_blocks is None:
    return q
  scale, minimum = (
    None if leaf is None else _dequantize(leaf, np.dtype(np.float32), None)
    for leaf in (q.scale, q.minimum)
  )
  return replace(q, fmt=q.fmt.one_level, scale=scale, minimum=minimum)


def alignment(q: QArray, i: int) -> int:
  """Elements of block axis number `i` that fill whole blocks and bytes."""
  return _alignment(q.fmt, i)


def _alignment(fmt: BlockFormat, i: int) -> int:
  block = max(fmt.block[i], 1)
  if i:
    return block
  return math.lcm(block, _packing.codes_per_group(fmt.element.bits))


def unit(q: QArray, i: int) -> int:
  """Elements of block axis number `i` between the places where it can be cut:
  those of `alignment`, and of whole blocks of scales."""
  whole, scales = alignment(q, i), q.fmt.scale_blocks
  if scales is None:
    return whole
  return math.lcm(whole, q.fmt.block[i] * _alignment(scales, 0))


def _reshape(q: QArray, shape) -> QArray:
  rest = -min(q.axes) - 1  # axes after the first block axis
  known = math.prod(n for n in shape if n != -1)
  shape = tuple(
    (q.size // known if known else 0) if n == -1 else n for n in shape
  )
  n, new = q.shape[-1 - rest], shape[-1 - rest] if len(shape) > rest else None
  first = q.axes.index(min(q.axes))
  aligned = (
    new == n
    or new is not None
    and n % unit(q, first) == 0
    and q.fmt.block[first] != 0
    and new % unit(q, first) == 0
  )
  if q.tensor_scale is not None and q.tensor_scale.size > 1:
    raise ValueError(
      f'cannot reshape a stack of tensors with {q.tensor_scale.size} tensor'
      ' scales; reshape its members'
    )
  same_tail = shape[len(shape) - rest :] == q.shape[q.ndim - rest :]
  if math.prod(shape) != q.size or not same_tail or not aligned:
    raise ValueError(
      f'cannot reshape {q.shape} to {shape=} without breaking blocks of {q.fmt}'
      f' on axis {q.axis}; dequantize first'
    )

  def move(leaf):
    if leaf.size == 1:
      return leaf.reshape((1,) * len(shape))
    tail = leaf.shape[leaf.ndim - rest :]
    width = leaf.shape[-1 - rest] * new // n if n else leaf.shape[-1 - rest]
    return leaf.reshape(*shape[: len(shape) - rest - 1], width, *tail)

  return jax.tree.map(move, q)


def _getitem(q: QArray, key) -> QArray:
  index = index_per_axis(q, key)
  if q.merged:
    return _getitem_merged(q, index)
  if all(isinstance(i, slice) and i == slice(None) for i in index):
    return q
  leaf_index, pad = _index_leaves(q, index)

  def take(leaf, indices):
    return None if leaf is None else leaf[indices]

  out = replace(
    q,
    codes=take(q.codes, leaf_index.codes),
    scale=take(q.scale, leaf_index.scale),
    zero_point=take(q.zero_point, leaf_index.scale),
    minimum=take(q.minimum, leaf_index.scale),
    tensor_scale=take(q.tensor_scale, leaf_index.tensor_scale),
    pad=pad,
  )
  return with_axes(out, _indexed_axes(q, index))


def _getitem_merged(q: QArray, index: list) -> QArray:
  """Indexing around the axes that blocks span together."""
  axes = merged_axes(q)
  first, end = axes[0] + q.ndim, axes[-1] + 1 + q.ndim
  if any(
    not isinstance(i, slice) or i != slice(None) for i in index[first:end]
  ):
    raise IndexError(
      f'blocks of {q!r} span axes {axes} together, which are not indexed; use'
      ' dequantize(q)[...]'
    )
  whole = flat(q)[(*index[:first], slice(None), *index[end:])]
  return replace(whole, merged=q.merged)


class _LeafIndex(NamedTuple):
  """The index of each leaf; zero points and minima take that of scales."""

  codes: tuple
  scale: tuple
  tensor_scale: tuple


def index_per_axis(q: Any, key: Any) -> list[Any]:
  """One index per axis of a QArray, or of what has its shape: an ellipsis,
  written or not, becomes full slices."""
  index: list[Any] = list(key) if isinstance(key, tuple) else [key]
  if any(i is None for i in index):
    raise IndexError('a QArray cannot be indexed with None; use reshape')
  # By identity: arrays have no single truth value to compare with.
  ellipses = [d for d, i in enumerate(index) if i is Ellipsis]
  if not ellipses:
    ellipses = [len(index)]
    index.append(Ellipsis)
  if len(index) - 1 > q.ndim:
    raise IndexError(f'{len(index) - 1} indices for shape {q.shape}')
  at = ellipses[0]
  index[at : at + 1] = [slice(None)] * (q.ndim - len(index) + 1)
  return index


def _index_leaves(
  q: QArray, index: Sequence[Any]
) -> tuple[_LeafIndex, tuple[int, ...]]:
  """The indices of the leaves, and the new padding."""
  pad = list(q.pad)
  codes, scale, tensor_scale = [], [], []
  for d, i in enumerate(index):
    axis, n = d - q.ndim, q.shape[d]
    if axis in q.axes:
      # A block axis: packed codes have fewer elements, scales one per block.
      k = q.axes.index(axis)
      start, stop, pad[k] = _block_slice(q, k, i, n)
      unit = q.codes.shape[d] / (n + q.pad[k]) if k == 0 else 1
      block = q.fmt.block[k]
      codes.append(slice(round(start * unit), round(stop * unit)))
      scale.append(
        slice(start // block, stop // block) if block else slice(None)
      )
      tensor_scale.append(slice(None))
      continue
    # Another axis: codes and scales alike; a single tensor scale stays, but its
    # axis goes or grows as that of the codes.
    _check_index(i, d, n)
    codes.append(i)
    scale.append(i)
    if q.tensor_scale is not None and q.tensor_scale.shape[d] != 1:
      tensor_scale.append(i)
    elif isinstance(i, slice):
      tensor_scale.append(slice(None))
    else:
      tensor_scale.append(jnp.zeros_like(jnp.asarray(i)))
  leaf_index = _LeafIndex(tuple(codes), tuple(scale), tuple(tensor_scale))
  return leaf_index, tuple(pad)


def _check_index(i, axis: int, n: int) -> None:
  """Refuses what is no index of axis `axis`, of size `n`."""
  if isinstance(i, slice):
    return
  kind = i.dtype if hasattr(i, 'dtype') else np.dtype(type(i))
  if not jnp.issubdtype(kind, jnp.integer):
    raise IndexError(
      f'index {i!r} of axis {axis} must be an int, a slice or an array of'
      ' integers; for a mask use jnp.flatnonzero(mask)'
    )
  if isinstance(i, int | np.integer) and not -n <= i < n:
    raise IndexError(f'index {i} is out of bounds for axis {axis} of size {n}')


def _indexed_axes(q: QArray, index: Sequence[Any]) -> list[int]:
  """The block axes of `q[index]`, counted from the end.

  As in NumPy, ints drop their axes; with an array among the indices, ints and
  arrays broadcast together, and their axes stand where the first of them was,
  or in front of all others if a slice separates them.
  """
  picked = [d for d, i in enumerate(index) if not isinstance(i, slice)]
  rank = max((jnp.ndim(index[d]) for d in picked), default=0)
  is_separated = picked and picked[-1] - picked[0] >= len(picked)
  first = -1 if is_separated else min(picked, default=-1)

  def behind(axis):
    later = range(axis + q.ndim + 1, q.ndim)
    slices = sum(isinstance(index[d], slice) for d in later)
    return slices + (rank if first in later else 0)

  return [-1 - behind(axis) for axis in q.axes]


def _block_slice(q: QArray, k: int, i, n: int) -> tuple[int, int, int]:
  """(start, stop, new pad) of an index on block axis number `k`."""
  whole = unit(q, k)
  if not isinstance(i, slice):
    raise IndexError(
      f'index {i!r} picks single elements of block axis {q.axes[k]}; use'
      ' dequantize(q)[...]'
    )
  start, stop, step = i.indices(n)
  stop = max(start, stop)
  if step != 1 or start % whole or (stop % whole and stop != n):
    raise IndexError(
      f'slice {start}:{stop}:{step} of block axis {q.axes[k]} must start and'
      f' end at multiples of {whole}; use dequantize(q)[...]'
    )
  if stop == n:
    return start, n + q.pad[k], q.pad[k]
  return start, stop, 0
