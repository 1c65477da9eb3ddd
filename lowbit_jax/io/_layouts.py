"""What the layouts of quantized weights share.

A layout is a function from the parts of one weight, as they lie in a file, and
the configuration beside it to a `Tensor`. It looks at dtypes, shapes and tiny
tensors only, and refuses what it does not expect; the rest is done when the
tensor is read.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowbit_jax import formats, qarray
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import DTypeLike
from lowbit_jax.formats import (
  BlockFormat,
  ElementFormat,
  FloatFormat,
  IntFormat,
)
from lowbit_jax.io import _bits
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.qarray import QArray
from lowbit_jax.transforms import Permutation

# The formats in which scales of these dtypes are held.
FLOAT_SCALES = {
  'F16': formats.float16,
  'BF16': formats.bfloat16,
  'F32': formats.float32,
}
EXPONENT_SCALES = ('U8', 'F8_E8M0')

Leaf = Callable[[], np.ndarray]


class Parts(dict[str, Stored]):
  """The tensors of one weight, by what follows the name of the module.

  Attributes:
    used: those that a layout asked for.
  """

  def __init__(self, parts: Mapping[str, Stored]) -> None:
    super().__init__(parts)
    self.used: set[str] = set()

  def __getitem__(self, role: str) -> Stored:
    if role not in self:
      raise ValueError(f'its {role} is missing')
    self.used.add(role)
    return super().__getitem__(role)


class Layout(NamedTuple):
  """Where weights of a layout lie, and how they are read.

  Attributes:
    marker: the end of the name of a tensor that each weight has.
    roles: the ends of the names of its other tensors.
    plan: from the name of a module, its parts and the configuration to its
      weight; raises ValueError for what is not as the layout wants it.
    weight: what takes the place of the marker in the name of the weight.
  """

  marker: str
  roles: tuple[str, ...]
  plan: Callable[[str, Parts, Any], Tensor]
  weight: str = 'weight'


class Leaves(NamedTuple):
  """What reads the leaves of a QArray.

  Attributes:
    codes: bytes (..., bytes of a row), of which those beyond the row are cut
      off; padding is added.
    scale: of the shape and dtype of the leaf.
    tensor_scale: one number.
    zero_point: of the shape of the scales.
    order: columns in the order of their groups (act-order), if they may lie in
      another one.
  """

  codes: Leaf
  scale: Leaf | None = None
  tensor_scale: Leaf | None = None
  zero_point: Leaf | None = None
  order: Leaf | None = None


def field(
  node: Mapping[str, Any], name: str, kind: type, default: Any = None
) -> Any:
  """A field of a configuration; `default` where it is absent or null."""
  value = node.get(name)
  if value is None:
    return default
  # A bool is no int.
  if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
    raise ValueError(
      f'{name}={value!r:.80} of its configuration must be of type'
      f' {kind.__name__}'
    )
  return value


def choice(node: Mapping[str, Any], name: str, known: Sequence[Any]) -> Any:
  """A field of a configuration that has one of the known values."""
  value = node.get(name)
  if not any(value == k and type(value) is type(k) for k in known):
    raise ValueError(
      f'{name}={value!r:.80} of its configuration is not read; known are'
      f' {", ".join(map(repr, known))}'
    )
  return value


def expect(
  part: Stored, dtypes: Sequence[str], *shapes: Sequence[int]
) -> Stored:
  """Refuses a part of another dtype or, where shapes are named, shape."""
  shapes_ = [tuple(shape) for shape in shapes]
  if part.dtype not in dtypes or (shapes_ and part.shape not in shapes_):
    wanted = ' or '.join(map(str, shapes_))
    raise ValueError(
      f'{part.name!r} is {part.dtype} {part.shape}; expected'
      f' {"/".join(dtypes)} {wanted}'.rstrip()
    )
  return part


def rows(part: Stored) -> tuple[int, ...]:
  """The shape of a weight, which has rows of outputs."""
  if len(part.shape) < 2 or 0 in part.shape:
    raise ValueError(f'{part.name!r} has the shape {part.shape}; expected rows')
  return part.shape


def tensor(
  parts: Parts,
  shape: Sequence[int],
  fmt: BlockFormat,
  leaves: Leaves,
  dtype: DTypeLike = np.float32,
) -> Tensor:
  """A weight whose blocks lie along its last axis, or its last two.

  Args:
    parts: of the weight.
    shape: of the weight.
    fmt: its format.
    leaves: what reads it.
    dtype: that the QArray stands for.

  Returns:
    The tensor, with an empty name of its layout. It becomes a QArray, or in
    act-order a `Transformed` with the columns of a group side by side.

  Raises:
    ValueError: if it has parts that nothing asked for.
  """
  if unused := parts.keys() - parts.used:
    raise ValueError(f'its {min(unused)} is not known to this layout')
  shape = tuple(shape)
  axes = qarray.block_axes(fmt, None, len(shape))
  pad = qarray.padding(shape, fmt, axes)

  def read() -> QArray | Transformed:
    arrays: dict[str, Any] = {
      name: leaf and leaf() for name, leaf in leaves._asdict().items()
    }
    order: Any = arrays.pop('order')
    if order is not None and (np.diff(order) == 1).all():
      order = None
    if order is not None:
      arrays['codes'] = reordered(arrays['codes'], fmt.element.bits, order)
    arrays['codes'] = _fitted(arrays['codes'], shape, fmt, axes, pad)
    if leaves.tensor_scale:
      arrays['tensor_scale'] = _single(arrays['tensor_scale'], len(shape))
    q = qarray.validate(
      QArray(
        **arrays,
        fmt=fmt,
        axis=axes if fmt.is_tile else axes[0],
        pad=pad,
        dtype=np.dtype(dtype),
      )
    )
    return q if order is None else Transformed(q, Permutation(order), -1)

  nbytes = sum(part.nbytes for part in parts.values())
  return Tensor('', shape, nbytes, fmt, read)


def _fitted(codes, shape, fmt: BlockFormat, axes, pad) -> np.ndarray:
  """Codes of whole blocks: cut, and padded with zeros."""
  size = list(shape)
  for axis, n in zip(axes, pad, strict=True):
    size[axis] += n
  size[-1] = size[-1] * fmt.element.bits // 8
  codes = codes[..., : size[-1]]
  widths = [(0, n - k) for n, k in zip(size, codes.shape, strict=True)]
  return np.pad(codes, widths) if any(n for _, n in widths) else codes


def _single(number: np.ndarray, ndim: int) -> np.ndarray:
  """A tensor scale as a leaf."""
  if not np.isfinite(number).all():
    raise ValueError(f'its tensor scale is {number}')
  return number.astype(np.float32).reshape((1,) * ndim)


def reordered(data: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
  """Packed codes (..., bytes of a row) with their columns in another order."""
  return _bits.pack(_bits.unpack(data, bits)[..., order], bits)


def float_scale(part: Stored) -> FloatFormat:
  """The format of scales that are stored as numbers."""
  return FLOAT_SCALES[expect(part, tuple(FLOAT_SCALES)).dtype]


def numbers(part: Stored) -> Leaf:
  """Reads scales that are stored as numbers."""
  dtype = np.dtype(float_scale(part).name)
  return lambda: part.read().astype(dtype, copy=False)


def raw(part: Stored) -> Leaf:
  """Reads the bytes of a tensor of bytes or of words, along its last axis."""
  return lambda: part.read().view(np.uint8)


def scalar(part: Stored) -> Stored:
  """Refuses what is no single number."""
  return expect(part, tuple(FLOAT_SCALES), (), (1,), (1, 1))


def integer(bits: int, *, signed: bool) -> IntFormat:
  """The integers of so many bits."""
  return IntFormat(f'{"" if signed else "u"}int{bits}', bits, signed)


@functools.lru_cache
def channel(
  element: ElementFormat, scale: FloatFormat, zero_point: bool
) -> BlockFormat:
  """`element` with a scale, and perhaps a zero point, for each row."""
  fmt = formats.per_channel(element, scale)
  if not zero_point:
    return fmt
  return BlockFormat(
    fmt.name, element, (0,), scale, zero_point=True, scale_rule='minmax'
  )


@functools.lru_cache
def group(element: ElementFormat, size: int, scale: FloatFormat) -> BlockFormat:
  """`element` with a scale, and for unsigned integers a zero point, for so many
  inputs."""
  if (element, size, scale) == (formats.e4m3fn, 128, formats.float32):
    return formats.fp8_1x128
  return formats.grouped(element, size, scale)


@functools.lru_cache
def tile(
  element: ElementFormat, block: tuple[int, int], scale: FloatFormat
) -> BlockFormat:
  """`element` with a scale for each tile of so many rows and columns."""
  if block[0] == 1:
    is_mx = (element, block[1], scale) == (formats.e4m3fn, 32, formats.e8m0)
    return formats.mxfp8_e4m3 if is_mx else group(element, block[1], scale)
  if (element, block, scale) == (formats.e4m3fn, (128, 128), formats.float32):
    return formats.fp8_128x128
  suffix = '' if scale == formats.float32 else f'_{scale.name}'
  name = f'{element.name}_{block[0]}x{block[1]}{suffix}'
  return BlockFormat(name, element, block, scale)


def blocks(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
  """How many blocks lie along each of the last axes."""
  lead = len(shape) - len(block)
  counts = (-(-n // b) for n, b in zip(shape[lead:], block, strict=True))
  return (*shape[:lead], *counts)


def order_of_groups(part: Stored, size: int, group: int) -> Leaf:
  """Reads the columns in the order of their groups: those of group 0, and so
  on, of each as the file has them.

  Args:
    part: the group of each column, or -1 everywhere, where they are in order.
    size: number of columns.
    group: columns of a group; the last has the rest.
  """
  expect(part, ('I32', 'I64'), (size,))

  def read() -> np.ndarray:
    groups, in_order = part.read(), np.arange(size) // group
    if (groups == -1).all():
      groups = in_order
    order = np.argsort(groups, kind='stable')
    if not np.array_equal(groups[order], in_order):
      raise ValueError(
        f'{part.name!r} is to put {group} columns into each group but the last,'
        ' and does not'
      )
    return order

  return read


def after(check: Callable[[], None], leaf: Leaf) -> Leaf:
  """`leaf`, read after a check."""

  def read() -> np.ndarray:
    check()
    return leaf()

  return read
