"""Inputs that quantizers get wrong, and the answers of the scalar oracle."""

import math
from typing import NamedTuple

import numpy as np

from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics import oracle

ORACLE_RULES = (
  *oracle.EXPONENT_RULES,
  *oracle.UNEVEN_RULES,
  'absmax',
  'minmax',
)


class Expected(NamedTuple):
  """The oracle's answer, in the shapes of an unpacked QArray.

  Attributes:
    values: float32, the shape of the input.
    codes: uint8, the padded shape.
    scale: uint8 codes or float32 numbers, one per block; None without. Of two
      levels the numbers that they stand for.
    tensor_scale: float32 with the rank of the input, or None.
    zero_point: uint8 in the shape of `scale`, or None.
    minimum: float32 in the shape of `scale`, or None.
  """

  values: np.ndarray
  codes: np.ndarray
  scale: np.ndarray | None
  tensor_scale: np.ndarray | None
  zero_point: np.ndarray | None
  minimum: np.ndarray | None


def quantizer_cases(fmt: BlockFormat) -> dict[str, np.ndarray]:
  """Named float32 matrices to quantize along the last axis (the last two).

  blocks: bell-shaped, block maxima from 2^-20 to 2^20. boundaries: elements on,
  just below and just above the middle of neighbouring numbers of the format,
  in blocks whose maximum is that of the format. edges: zeros of both signs,
  zero blocks, subnormals, the smallest and the largest floats. nan, inf: one
  poisoned block among ordinary ones. ragged: a size that blocks do not divide.
  one: a single element.
  """
  rows, width = _geometry(check_format(fmt))
  boundaries = _boundaries(fmt, rows, width)
  edges = _edges(fmt, rows, width)
  columns = 2 * width
  if not fmt.is_tile:  # one shape for most cases: one compilation
    columns = max(columns, boundaries.shape[1], edges.shape[1])
    boundaries = _repeat(boundaries, columns)
    edges = _repeat(edges, columns)
  random = np.random.RandomState(11)
  bell = random.standard_normal((rows, columns)).astype(np.float32)
  exponents = random.randint(-20, 21, (rows, columns // width))
  if fmt.tensor_scale:  # the range of one tensor scale is smaller
    exponents //= 4
  blocks = np.ldexp(bell, np.repeat(exponents, width, axis=1))
  nan, inf = blocks.copy(), blocks.copy()
  nan[0, 3] = np.nan
  inf[-1, width + 1] = -np.inf
  ragged = bell[: max(rows - 1, 1), : width + max(width // 2 - 1, 1)]
  cases = {
    'blocks': blocks,
    'boundaries': boundaries,
    'edges': edges,
    'nan': nan,
    'inf': inf,
    'ragged': ragged,
    'one': np.full((1, 1), -0.75, np.float32),
  }
  return {k: np.ascontiguousarray(v, np.float32) for k, v in cases.items()}


def expected(x: np.ndarray, fmt: BlockFormat, rule: str) -> Expected:
  """Quantizes a matrix with the oracle, block after block.

  Args:
    x: float32 `(m, n)`; blocks lie along the last axis, tiles along both.
    fmt: a block format.
    rule: one of `ORACLE_RULES`.
  """
  if fmt.minimum or fmt.scale_blocks is not None:
    return _expected_rows(x, fmt, rule)
  height, width = _block_shape(fmt, x.shape)
  padded = _pad(x, height, width, _byte_group(fmt))
  tensor_scale = None
  if fmt.tensor_scale:
    tensor_scale = oracle.tensor_scale(x.ravel().tolist(), fmt)
  m, n = padded.shape
  values, codes = np.zeros((m, n), np.float32), np.zeros((m, n), np.uint8)
  shape = m // height, n // width
  coded = fmt.scale is not None and fmt.scale.bits <= 8
  scale = np.zeros(shape, np.uint8 if coded else np.float32)
  zero_point = np.zeros(shape, np.uint8)
  for i, j in np.ndindex(*shape):
    at = (
      slice(i * height, (i + 1) * height),
      slice(j * width, (j + 1) * width),
    )
    block = oracle.quantize_block(
      padded[at].ravel().tolist(), fmt, rule, tensor_scale=tensor_scale
    )
    back = oracle.dequantize_block(block, fmt)
    codes[at] = np.reshape(block.codes, (height, width))
    values[at] = np.reshape(back, (height, width))
    scale[i, j] = 0 if block.scale is None else block.scale
    zero_point[i, j] = block.zero_point or 0
  return Expected(
    values[: x.shape[0], : x.shape[1]],
    codes,
    None if fmt.scale is None else scale,
    None if tensor_scale is None else np.full((1, 1), tensor_scale, np.float32),
    zero_point if fmt.zero_point else None,
    None,
  )


def _expected_rows(x: np.ndarray, fmt: BlockFormat, rule: str) -> Expected:
  """`expected` where padding counts or blocks depend on their neighbours; codes
  without those of padding."""
  rows = [oracle.quantize(row.tolist(), fmt, rule) for row in x]

  def numbers(get):
    return np.array([[get(b) for b in row] for row in rows], np.float32)

  def elements(get):
    return [np.concatenate([get(b) for b in row]) for row in rows]

  values = elements(lambda b: oracle.dequantize_block(b, fmt.one_level))
  return Expected(
    np.array(values, np.float32),
    np.array(elements(lambda b: b.codes), np.uint8),
    numbers(lambda b: b.scale),
    None,
    None,
    numbers(lambda b: b.minimum) if fmt.minimum else None,
  )


def _geometry(fmt: BlockFormat) -> tuple[int, int]:
  """(rows, columns of one block) of the cases."""
  if fmt.is_tile:
    return fmt.block[0], fmt.block[1]
  return 3, (fmt.block[0] if fmt.scale is not None else 0) or 32


def _repeat(x: np.ndarray, columns: int) -> np.ndarray:
  """The first columns of x, x, ..."""
  return np.tile(x, (1, -(-columns // x.shape[1])))[:, :columns]


def _block_shape(fmt: BlockFormat, shape) -> tuple[int, int]:
  """(rows, columns) that share a scale; whole axes are padded to bytes."""
  whole = shape[1] + -shape[1] % _byte_group(fmt)[1]
  if fmt.scale is None:
    return shape[0], whole
  if fmt.is_tile:
    return fmt.block[0] or shape[0], fmt.block[1] or whole
  return 1, fmt.block[0] or whole


def _byte_group(fmt: BlockFormat) -> tuple[int, int]:
  """Padding to whole bytes happens along the first block axis."""
  group = 8 // math.gcd(8, fmt.element.bits)
  return (group, 1) if fmt.is_tile else (1, group)


def _pad(x, height: int, width: int, group) -> np.ndarray:
  steps = math.lcm(height, group[0]), math.lcm(width, group[1])
  return np.pad(x, [(0, -n % s) for n, s in zip(x.shape, steps, strict=True)])


def _boundaries(fmt: BlockFormat, rows: int, width: int) -> np.ndarray:
  """Middles of neighbouring numbers, their float neighbours, and the numbers.

  Element 0 of each block is the largest number, so that scales are close to a
  power of two, and exactly one for exponent scales.
  """
  values = fmt.element.values()
  values = np.unique(np.abs(values[np.isfinite(values)]))
  values = values[values <= fmt.element.max]
  middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
  points = np.concatenate(
    [
      middles,
      np.nextafter(middles, np.float32(0)),
      np.nextafter(middles, np.float32(np.inf)),
      values.astype(np.float32),
    ]
  )
  points = np.concatenate([points, -points])
  per_block = width * (rows if fmt.is_tile else 1) - 1
  limit = 40 * per_block  # of many numbers, every n-th
  points = points[:: max(len(points) // limit, 1)]
  blocks = -(-len(points) // per_block)
  if not fmt.is_tile:
    blocks += -blocks % rows
  points = np.resize(points, (blocks, per_block))
  top = np.full((blocks, 1), np.float32(fmt.element.max))
  data = np.concatenate([top, points], axis=1)
  if fmt.is_tile:
    return data.reshape(blocks * rows, width)
  return data.reshape(rows, -1)


def _edges(fmt: BlockFormat, rows: int, width: int) -> np.ndarray:
  tiny, huge = 2.0**-126, float(np.finfo(np.float32).max)
  top = fmt.element.max
  seeds = [
    [0.0, -0.0],
    [-0.0, 1.0, -1e-30, 1e-30],
    [2.0**-149, -(2.0**-130)],
    [tiny, -tiny / 2],
    [huge, 1.0, -huge],
    [2.0**127, 0.0],
    [top, np.nextafter(np.float32(top), np.float32(np.inf))],
    [np.nextafter(np.float32(2.0**20 * top), np.float32(0))],
    [1e-38, 1.5e-38],
  ]
  if isinstance(fmt.scale, FloatFormat) and fmt.tensor_scale:
    # Block maxima down to where scales are subnormal, and below.
    seeds = seeds[:4] + [[448 * 6 * 2.0**-k] for k in range(0, 24, 2)]
  size = width * (rows if fmt.is_tile else 1)
  blocks = [
    np.resize(np.array([*s, *[0.25 * s[-1]] * 2], np.float32), size)
    for s in seeds
  ]
  if not fmt.is_tile:
    blocks += [np.zeros(size, np.float32)] * (-len(blocks) % rows)
    return np.stack(blocks).reshape(rows, -1)
  return np.concatenate([b.reshape(rows, width) for b in blocks], axis=1)
