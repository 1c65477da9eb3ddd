"""Types of GGUF tensors: which array or QArray each stands for, and back."""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lowbit_jax import formats, qarray
from lowbit_jax.formats import BlockFormat
from lowbit_jax.io import _bits
from lowbit_jax.io._checkpoint import Leaf
from lowbit_jax.io._gguf_blocks import CHUNK, Block, Parts, join, split
from lowbit_jax.io._gguf_types import BLOCKS
from lowbit_jax.io._gguf_values import Order
from lowbit_jax.qarray import QArray


def _named(name: str) -> BlockFormat:
  fmt = formats.get(name)
  assert isinstance(fmt, BlockFormat)
  return fmt


class Layout(NamedTuple):
  """A type of tensors in files.

  Attributes:
    name: of the type.
    elements: in a block along the last axis.
    nbytes: of a block.
    dtype: of an array that is stored as it is.
    block: how blocks hold codes and scales.
    fmt: the format of the QArray.
    is_decoded: whether the package `gguf` makes a float32 array of it.
  """

  name: str
  elements: int
  nbytes: int
  dtype: np.dtype | None = None
  block: Block | None = None
  fmt: BlockFormat | None = None
  is_decoded: bool = False

  def size(self, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises:
      ValueError: for rows that are not whole blocks.
    """
    if (shape[-1] if shape else 1) % self.elements:
      raise ValueError(
        f'has the shape {shape}, whose rows are no whole blocks of'
        f' {self.elements}, as {self.name} needs'
      )
    return math.prod(shape) // self.elements * self.nbytes

  @property
  def arrival(self) -> str:
    """The name, and where so that it cannot be read."""
    if self.is_decoded and importlib.util.find_spec('gguf') is None:
      return f'{self.name} (not read)'
    return self.name


def _dense(name: str, dtype: Any) -> Layout:
  dtype = np.dtype(dtype)
  return Layout(name, 1, dtype.itemsize, dtype=dtype)


def _packed(name: str, fmt: BlockFormat) -> Layout:
  block = BLOCKS[name]
  return Layout(
    name, block.elements, block.fields.itemsize, block=block, fmt=fmt
  )


def _decoded(name: str, nbytes: int) -> Layout:
  return Layout(name, 256, nbytes, is_decoded=True)


LAYOUTS = {
  0: _dense('F32', np.float32),
  1: _dense('F16', np.float16),
  2: _packed('Q4_0', _named('int4_g32_float16')),
  3: _packed('Q4_1', _named('uint4_g32_min_float16')),
  6: _packed('Q5_0', _named('int5_g32_float16')),
  7: _packed('Q5_1', _named('uint5_g32_min_float16')),
  8: _packed('Q8_0', _named('int8_g32_float16')),
  10: _packed('Q2_K', formats.q2_k),
  11: _packed('Q3_K', formats.q3_k),
  12: _packed('Q4_K', formats.q4_k),
  13: _packed('Q5_K', formats.q5_k),
  14: _packed('Q6_K', formats.q6_k),
  16: _decoded('IQ2_XXS', 66),
  17: _decoded('IQ2_XS', 74),
  18: _decoded('IQ3_XXS', 98),
  19: _decoded('IQ1_S', 50),
  20: _packed('IQ4_NL', formats.iq4_nl),
  21: _decoded('IQ3_S', 110),
  22: _decoded('IQ2_S', 82),
  23: _packed('IQ4_XS', formats.iq4_xs),
  24: _dense('I8', np.int8),
  25: _dense('I16', np.int16),
  26: _dense('I32', np.int32),
  27: _dense('I64', np.int64),
  28: _dense('F64', np.float64),
  29: _decoded('IQ1_M', 56),
  30: _dense('BF16', ml_dtypes.bfloat16),
  # Of two layouts with one format the first is written.
  35: _packed('TQ2_0', _named('ternary_g256_float16')),
  34: _packed('TQ1_0', _named('ternary_g256_float16')),
  39: _packed('MXFP4', formats.mxfp4),
  40: _packed('NVFP4', formats.nvfp4),
  41: _packed('Q1_0', _named('sign_g128_float16')),
  42: _packed('Q2_0', _named('quaternary_g64_float16')),
}
CODES = {layout.name: code for code, layout in LAYOUTS.items()}


def read(
  layout: Layout,
  data: np.ndarray,
  shape: tuple[int, ...],
  order: Order,
  tensor_scale: np.ndarray | None,
) -> Leaf:
  """The array or QArray that bytes of a file stand for.

  Args:
    layout: of the bytes.
    data: uint8.
    shape: of the array.
    order: '<' or '>', the byte order of numbers.
    tensor_scale: for formats that have it, None for 1.

  Raises:
    ValueError: for a type that is not read, or codes that its format lacks.
  """
  if layout.dtype is not None:
    return _array(data, layout.dtype, order).reshape(shape)
  if layout.is_decoded:
    return _decode(layout, data, order).reshape(shape)
  assert layout.fmt is not None and layout.block is not None
  fields = layout.block.fields.newbyteorder(order)
  parts = split(data.view(fields), layout.block)
  _check_parts(layout, parts)
  return _qarray(layout.fmt, parts, shape, tensor_scale)


def little(layout: Layout, data: np.ndarray, order: Order) -> np.ndarray:
  """Bytes of a tensor with all numbers in little-endian order."""
  if order == '<':
    return data
  if layout.is_decoded:
    raise ValueError(f'is of type {layout.name} in a big-endian file')
  if layout.block is None:
    stored = np.dtype(f'u{layout.nbytes}')
  else:
    stored = layout.block.fields
  swapped = data.view(stored.newbyteorder('>'))
  return swapped.astype(stored.newbyteorder('<')).view(np.uint8)


def layout_of(leaf: Any) -> Layout:
  """The layout in which a leaf is written.

  Raises:
    TypeError: for a leaf, dtype or format that files cannot hold.
    ValueError: for a QArray whose blocks lie otherwise than in files.
  """
  if isinstance(leaf, QArray):
    return _layout_of_qarray(leaf)
  dtype = np.dtype(leaf.dtype).newbyteorder('=')
  for layout in LAYOUTS.values():
    # NumPy takes None for float64 when it compares.
    if layout.dtype is not None and layout.dtype == dtype:
      return layout
  known = ', '.join(x.dtype.name for x in LAYOUTS.values() if x.dtype)
  raise TypeError(f'has dtype {leaf.dtype}, and a file holds {known}')


def write(layout: Layout, leaf: Any) -> Iterator[bytes | memoryview]:
  """The bytes of a leaf, piece by piece.

  Raises:
    ValueError: for numbers that the layout cannot hold exactly.
  """
  if not isinstance(leaf, QArray):
    array = np.ascontiguousarray(leaf, layout.dtype).view(f'u{layout.nbytes}')
    yield _bytes(array.astype(f'<u{layout.nbytes}', copy=False))
    return
  fmt, block = leaf.fmt, layout.block
  assert block is not None
  blocks = math.prod(leaf.shape) // block.elements
  scale, sub_scale = _stored_level(leaf.scale, blocks)
  minimum, sub_minimum = _stored_level(leaf.minimum, blocks)
  codes = _rows(leaf.codes, blocks)
  whole = Parts(codes, scale, sub_scale, minimum, sub_minimum)
  step = CHUNK // block.elements
  for start in range(0, blocks, step):
    chunk = slice(start, start + step)
    leaves: Any = (x if x is None else x[chunk] for x in whole)
    part = Parts(*leaves)
    part = part._replace(
      scale=_stored_scale(part.scale, layout),
      minimum=_stored_scale(part.minimum, layout),
      sub_scale=_integers(part.sub_scale, fmt.scale_blocks),
      sub_minimum=_integers(part.sub_minimum, fmt.scale_blocks),
    )
    _check_parts(layout, part)
    yield _bytes(join(part, block))


def _bytes(array: Any) -> memoryview:
  return memoryview(array.reshape(-1).view(np.uint8))


def _array(data: np.ndarray, dtype: np.dtype, order: Order) -> np.ndarray:
  """Bytes as numbers, swapped where the machine has another order."""
  stored = np.dtype(f'{order}u{dtype.itemsize}')
  native = stored.newbyteorder('=')
  return data.view(stored).astype(native, copy=False).view(dtype)


def _decode(layout: Layout, data: np.ndarray, order: Order) -> np.ndarray:
  """Float32 numbers of grids and signs, by the package that has the tables."""
  if order == '>':
    raise ValueError(f'is of type {layout.name} in a big-endian file')
  if importlib.util.find_spec('gguf') is None:
    raise ValueError(
      f'is of type {layout.name}, whose tables the package gguf has: install it'
    )
  package = importlib.import_module('gguf')
  code = package.GGMLQuantizationType(CODES[layout.name])
  return package.quants.dequantize(data, code)


def _qarray(
  fmt: BlockFormat,
  parts: Parts,
  shape: tuple[int, ...],
  tensor_scale: np.ndarray | None,
) -> QArray:
  rows = shape[:-1]
  if fmt.tensor_scale:
    ones = (1,) * (len(shape) - 1)
    given = np.ones(1, np.float32) if tensor_scale is None else tensor_scale
    tensor_scale = given.reshape(-1, *ones)
  result = QArray(
    parts.codes.reshape(*rows, -1),  # pyright: ignore[reportArgumentType]
    _level(parts.scale, parts.sub_scale, fmt.scale_blocks, rows),
    tensor_scale,  # pyright: ignore[reportArgumentType]
    None,
    fmt,
    -1,
    (0,),
    np.dtype(np.float32),
    minimum=_level(parts.minimum, parts.sub_minimum, fmt.scale_blocks, rows),
  )
  return qarray.validate(result)


def _level(
  scale: np.ndarray | None,
  integers: np.ndarray | None,
  fmt: BlockFormat | None,
  rows: tuple[int, ...],
) -> Any:
  """Scales or minima: an array, or a QArray where they have two levels."""
  if scale is None:
    return None
  scale = scale.reshape(*rows, -1)
  if integers is None or fmt is None:
    return scale
  bits = fmt.element.bits
  codes = _bits.pack(integers.view(np.uint8) & np.uint8(2**bits - 1), bits)
  return QArray(
    codes.reshape(*rows, -1),  # pyright: ignore[reportArgumentType]
    scale,
    None,
    None,
    fmt,
    -1,
    (0,),
    np.dtype(np.float32),
  )


def _rows(leaf: Any, blocks: int) -> np.ndarray:
  return np.ascontiguousarray(leaf).reshape(blocks, -1)


def _stored_level(leaf: Any, blocks: int) -> tuple[Any, Any]:
  """Numbers and, of two levels, packed integers; the inverse of `_level`."""
  if leaf is None:
    return None, None
  if isinstance(leaf, QArray):
    return _rows(leaf.scale, blocks), _rows(leaf.codes, blocks)
  return _rows(leaf, blocks), None


def _integers(
  codes: np.ndarray | None, fmt: BlockFormat | None
) -> np.ndarray | None:
  """Packed codes as the integers that they stand for."""
  if codes is None or fmt is None:
    return None
  values = fmt.element.values().astype(np.int16)
  return values[_bits.unpack(codes, fmt.element.bits)]


def _check_parts(layout: Layout, parts: Parts) -> None:
  """Refuses codes that the file's type and the format take for different."""
  if layout.fmt is None:
    return
  if layout.fmt.element == formats.ternary:
    step = CHUNK // layout.elements
    for start in range(0, len(parts.codes), step):
      codes = parts.codes[start : start + step]
      if ((codes >> 1) & ~codes & 0x55).any():
        raise ValueError('holds a code that is none of -1, 0 and 1')
  if layout.name == 'NVFP4' and (parts.scale & 0x80).any():
    raise ValueError('holds a negative scale')


def _layout_of_qarray(q: QArray) -> Layout:
  for layout in LAYOUTS.values():
    if layout.fmt is not None and _is_stored_as(q.fmt, layout.fmt):
      break
  else:
    known = ', '.join(
      dict.fromkeys(str(x.fmt) for x in LAYOUTS.values() if x.fmt)
    )
    raise TypeError(f'has the format {q.fmt}, and a file holds {known}')
  if q.merged or q.axis != -1 or q.pad != (0,):
    raise ValueError(
      f'has blocks along axis {q.axis} with padding {q.pad}; in a file they'
      f' fill the last axis'
    )
  qarray.validate(q)
  return layout


def _is_stored_as(fmt: BlockFormat, stored: BlockFormat) -> bool:
  """Whether formats differ at most in how they hold float scales."""
  floats = (formats.float32, formats.bfloat16, formats.float16)
  if fmt.scale_blocks is None and fmt.scale in floats:
    fmt = dataclasses.replace(fmt, scale=formats.float16)
  alike = dataclasses.replace(
    fmt, name=stored.name, scale_rule=stored.scale_rule
  )
  return alike == stored


def _stored_scale(scale: Any, layout: Layout) -> Any:
  """Scales or minima as a file has them."""
  if scale is None or scale.dtype in (np.uint8, np.float16):
    return scale
  wide = scale.astype(np.float32)
  with np.errstate(over='ignore'):
    half = wide.astype(np.float16)
  if not np.array_equal(half.astype(np.float32), wide, equal_nan=True):
    raise ValueError(
      f'has scales that are no float16 numbers, as {layout.name} stores them'
    )
  return half
