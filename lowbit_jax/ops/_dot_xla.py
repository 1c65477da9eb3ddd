"""Contractions of Array | QArray in plain XLA.

Three ways to contract with quantized operands:

  integer   Both operands are integers whose scales are constant along the
            contraction: one int32 product, scales on the result.
  tiles     A weight in blocks along a contracted axis, seen as (k, n): a scan
            over tiles that decodes one, scales and multiplies it, and forgets
            it. So for any number of rows the same products are summed, and of
            the weight one tile exists in float32: at most TILE_SIZE elements,
            or one column of blocks. Members of a batch follow each other.
            Where the partitioner may split columns or batches they stay
            together, and a tile is TILE_MANY_ROWS rows of all of them.
            A weight that is stored as (n, k), as those of most files are, is
            not transposed: its tiles are OUTPUTS whole rows.
  dense     Everything else: dequantize, then one product.

Tensor scales multiply the float32 accumulator in all of them. Packed codes are
read lane by lane (see `packing.lanes`): codes j, j + L, j + 2L, ... of a tile
meet the same rows of x, so nothing is interleaved.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lowbit_jax import _quantize as core, qarray
from lowbit_jax._typing import DotDims, DTypeLike, Precision
from lowbit_jax.formats import BlockFormat, FloatFormat, IntFormat
from lowbit_jax.numerics import _packing, _scaling
from lowbit_jax.numerics._codec import spec
from lowbit_jax.ops import _partition
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith import codec, loops

# Rows of the weight in a tile, for few and for many rows of x, and the elements
# of a tile that is cut into columns and of the largest one that is not;
# measured on CPU, see docs/benchmarks.md.
FEW_ROWS = 4
TILE_FEW_ROWS = 256
TILE_MANY_ROWS = 1024
COLUMN_TILE_SIZE = 1 << 19
TILE_SIZE = 1 << 22
# Rows of a tile of a weight (n, k), fewer where they have many elements.
OUTPUTS = 256
OUTPUTS_SIZE = 1 << 20
# Products of two int8 whose sum float32 holds exactly.
EXACT_PRODUCTS = 256


def plan_dot_general(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product with float32 accumulation and a float32 result."""
  dims = dimension_numbers
  if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
    return Plan(
      'no operand is quantized: lax.dot_general', _Dense(dims, precision)
    )
  refusal = why_not_integer(lhs, rhs, dims)
  if refusal is None:
    return Plan(
      'int32 product of the codes, scales on the result', Integer(dims)
    )
  why_dense = why_not_tiles(lhs, rhs, dims)
  if why_dense is None:
    multiply = functools.partial(product, precision=precision)
    return Plan('scan over tiles of the weight', Tiles(dims, multiply))
  return Plan(
    f'dequantizes to float32 first: {why_dense}', _Dense(dims, precision)
  )


class _Dense:
  def __init__(self, dims, precision):
    self.dims, self.precision = dims, precision

  def __call__(self, lhs, rhs):
    lhs, lhs_scale = without_tensor_scale(lhs)
    rhs, rhs_scale = without_tensor_scale(rhs)
    out = lax.dot_general(
      _dense(lhs),
      _dense(rhs),
      self.dims,
      precision=self.precision,
      preferred_element_type=jnp.float32,
    )
    return times(out, lhs_scale, rhs_scale)


class Integer:
  """A product of two operands of integers whose scales multiply the result.

  Args:
    dims: dimension numbers.
    multiply: of int8 (m, k) and a QArray (k, n) or (n, k) of integers without
      scale, where rows are few; int32 (m, n). By default that of `product`.
  """

  def __init__(
    self, dims: DotDims, multiply: Callable[..., jax.Array] | None = None
  ) -> None:
    self.dims = dims
    self.multiply = multiply or integers_of_tiles

  def __call__(self, lhs: Any, rhs: Any) -> jax.Array:
    out = self.codes_product(lhs, rhs).astype(jnp.float32)
    (lhs_k, rhs_k), (lhs_b, rhs_b) = self.dims
    step = lhs.fmt.element.step * rhs.fmt.element.step
    out = out * jnp.float32(step) if step != 1 else out
    free_l = lhs.ndim - len(lhs_k) - len(lhs_b)
    free_r = rhs.ndim - len(rhs_k) - len(rhs_b)
    for q, k, b, before, after in (
      (lhs, lhs_k, lhs_b, 0, free_r),
      (rhs, rhs_k, rhs_b, free_l, 0),
    ):
      out = out * _result_scale(q, k, b, before, after)
    return out

  def codes_product(self, lhs: Any, rhs: Any) -> jax.Array:
    """The int32 product of the codes."""
    is_batched = bool(self.dims[1][0])
    takes_tiles = is_few(rows(lhs, self.dims)) and not is_batched
    if not takes_tiles or why_not_tiles(lhs, rhs, self.dims) is not None:
      return lax.dot_general(
        int8(lhs), int8(rhs), self.dims, preferred_element_type=jnp.int32
      )
    codes = qarray.replace(
      rhs, scale=None, tensor_scale=None, fmt=_integer_codes(rhs.fmt.element)
    )
    x, codes, shape = as_matrices(int8(lhs), codes, self.dims)
    return self.multiply(x, codes).reshape(shape)


def integers_of_tiles(x: jax.Array, codes: QArray) -> jax.Array:
  """int8 (m, k) times integers, int32: XLA:CPU's own is slow at few rows.

  Sums of a tile are exact in float32: at most EXACT_PRODUCTS below 2^14.
  """
  return product(x.astype(jnp.float32), codes, None, jnp.int32)


class Tiles:
  """A product with a weight whose blocks lie along a contracted axis.

  Args:
    dims: dimension numbers.
    multiply: of arrays (m, k) and a QArray (k, n) or (n, k) in blocks along k,
      without tensor scale; float32 (m, n).
    arrays: from the left operand to arrays of its shape; by default it is
      itself, in float32.
  """

  def __init__(
    self,
    dims: DotDims,
    multiply: Callable,
    arrays: Callable | None = None,
  ) -> None:
    self.dims, self.multiply = dims, multiply
    self.arrays = arrays or (lambda x: [_dense(x).astype(jnp.float32)])

  def __call__(self, lhs: Any, rhs: QArray) -> jax.Array:
    (_, rhs_k), (_, rhs_b) = self.dims
    tensor_scale = rhs.tensor_scale
    stored = qarray.replace(rhs, tensor_scale=None)
    seen = [as_matrices(x, stored, self.dims) for x in self.arrays(lhs)]
    xs, (_, w, shape) = [x for x, _, _ in seen], seen[0]
    multiply = jax.vmap(self.multiply) if rhs_b else self.multiply
    out = multiply(*xs, w).reshape(shape)
    if tensor_scale is None:
      return out
    # One for each member of the batch, or one for all.
    rest = [d for d in range(rhs.ndim) if d not in rhs_b]
    scale = tensor_scale.transpose(*rhs_b, *rest)
    ones = [1] * (out.ndim - len(rhs_b))
    return out * scale.reshape(*scale.shape[: len(rhs_b)], *ones)


def rows(lhs: Shaped, dims: DotDims) -> int:
  """Elements of the left operand that each weight meets."""
  others = (*dims[0][0], *dims[1][0])
  return math.prod(n for d, n in enumerate(lhs.shape) if d not in others)


def is_few(rows: int) -> bool:
  """Whether there are few rows; of a symbolic number that is not known."""
  return isinstance(rows, int) and rows <= FEW_ROWS


def as_matrices(
  x: jax.Array, q: QArray, dims: DotDims
) -> tuple[jax.Array, QArray, list[int]]:
  """Operands as (m, k) and (k, n) with blocks along k, and the shape of their
  product; batch dimensions are one axis in front of both. A weight whose last
  axis is contracted stays (n, k)."""
  if q.shape[q.axes[0]] % qarray.unit(q, 0):  # scales have padding of their own
    q = qarray.one_level(q)
  x_b, q_b = dims[1]
  pairs = zip(*dims[0], strict=True)
  block_axis = q.ndim + q.axes[0]
  x_k, q_k = zip(*sorted(pairs, key=lambda p: p[1] == block_axis), strict=True)
  x_free = [d for d in range(x.ndim) if d not in (*x_k, *x_b)]
  q_free = [d for d in range(q.ndim) if d not in (*q_k, *q_b)]
  shape = [x.shape[d] for d in (*x_b, *x_free)] + [q.shape[d] for d in q_free]
  batch = [math.prod(shape[: len(x_b)])] if x_b else []
  has_rows = q_k == (q.ndim - 1,) and _partition.is_alone()

  def matrix(leaf):
    k = math.prod(leaf.shape[d] for d in q_k)
    if has_rows:
      return leaf.transpose(*q_b, *q_free, *q_k).reshape(*batch, -1, k)
    return leaf.transpose(*q_b, *q_k, *q_free).reshape(*batch, k, -1)

  k = math.prod(x.shape[d] for d in x_k)
  x = x.transpose(*x_b, *x_free, *x_k).reshape(*batch, -1, k)
  axes = [-1 if has_rows else -2]
  return x, qarray.with_axes(jax.tree.map(matrix, q), axes), shape


def product(
  x: jax.Array, q: QArray, precision: Precision, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """x @ dequantize(q) for q of shape (k, n), or that of its transpose for
  (n, k), in blocks along k, accumulated in `dtype`. Under vmap one member of
  the batch follows the other."""
  scan = _scan_rows if q.axes == (-1,) else _scan_tiles
  scan = functools.partial(scan, precision=precision, dtype=dtype)
  call = custom_vmap(scan)

  @call.def_vmap
  def rule(size, in_batched, x, q):
    x_batched, q_batched = in_batched
    if not any(jax.tree.leaves(q_batched)):
      out = product(x.reshape(-1, x.shape[-1]), q, precision, dtype)
      return out.reshape(*x.shape[:2], -1), True
    if not _partition.is_alone():
      axes = jax.tree.map(lambda b: 0 if b else None, (x_batched, q_batched))
      return jax.vmap(scan, axes, axis_size=size)(x, q), True

    def member(i):
      def pick(leaf, batched):
        if not batched:
          return leaf
        return lax.dynamic_index_in_dim(leaf, i, keepdims=False)

      one, matrix = jax.tree.map(pick, (x, q), (x_batched, q_batched))
      return product(one, matrix, precision, dtype)

    return lax.map(member, jnp.arange(size)), True

  return call(x, q)


class _Tiling(NamedTuple):
  """How `_scan_tiles` cuts a weight (k, n).

  Attributes:
    steps: tiles along k.
    blocks: blocks of a tile.
    rows: rows of a block in each lane of packed codes.
    group: lanes, the rows that pack together.
    along_k: whether a column has more than one scale.
    columns: columns of a tile.
  """

  steps: int
  blocks: int
  rows: int
  group: int
  along_k: bool
  columns: int


def _tiling(q: QArray, few: bool) -> _Tiling:
  group = _packing.codes_per_group(q.fmt.element.bits)
  (k, n), (pad,) = q.shape, q.pad
  target = TILE_FEW_ROWS if few else TILE_MANY_ROWS
  along_k = q.scale is not None and q.scale.shape[0] > 1
  # Without scales along k a tile is one block.
  block = q.fmt.block[0] if along_k else _tilerows(k + pad, group, target)
  tile = _tilerows(k + pad, qarray.unit(q, 0) if along_k else block, target)
  columns = n
  if tile * n > TILE_SIZE and _partition.is_alone():
    columns = min(n, max(64, COLUMN_TILE_SIZE // tile // 64 * 64))
  return _Tiling(
    (k + pad) // tile, tile // block, block // group, group, along_k, columns
  )


def _scan_tiles(x, q: QArray, precision, dtype):
  """`product` of one matrix."""
  m, n = x.shape[0], q.shape[1]
  steps, blocks, rows, group, along_k, columns = _tiling(q, is_few(m))

  # Rows of x by (step, lane, m, block, row): those that meet each lane.
  if q.pad[0]:
    x = jnp.pad(x, ((0, 0), (0, q.pad[0])))
  x = x.reshape(m, steps, blocks, rows, group).transpose(1, 4, 0, 2, 3)

  # Codes and scales by tile. One scale for a column multiplies the sum instead,
  # unless a minimum is added to what it multiplies.
  codes = q.codes.reshape(steps, -1, n)
  scales = q.scale, q.zero_point, q.minimum
  after = not along_k and q.minimum is None
  if not along_k:
    scales = None if after else q.scale, q.zero_point, q.minimum
    scales = jax.tree.map(lambda leaf: jnp.tile(leaf, (steps, 1)), scales)
  scales = jax.tree.map(lambda leaf: leaf.reshape(steps, -1, n), scales)

  # One tile after the other, so that one of them is decoded at a time.
  body = functools.partial(_add_tile_product, q.fmt, precision)

  def of_columns(weight):
    operands = x, *weight
    width = weight[0].shape[-1]
    start = loops.carry(jnp.zeros((m, width), dtype), operands)
    if steps == 1:
      return body(start, jax.tree.map(lambda leaf: leaf[0], operands))[0]
    return lax.scan(body, start, operands)[0]

  def add_columns(out, start):
    part = jax.tree.map(
      lambda leaf: lax.dynamic_slice_in_dim(leaf, start, columns, axis=-1),
      (codes, scales),
    )
    part = of_columns(part)
    return lax.dynamic_update_slice_in_dim(out, part, start, axis=-1), None

  if columns == n:
    out = of_columns((codes, scales))
  else:  # slices stay within n: the last begins where it ends with the columns
    starts = jnp.arange(0, n, columns)
    out = loops.carry(jnp.zeros((m, n), dtype), x, codes, scales)
    out = lax.scan(add_columns, out, starts)[0]
  if after:
    for f in _factors(q.scale, q.fmt):
      out = out * f
  return out


def _scan_rows(x, q: QArray, precision, dtype):
  """`product` of one matrix that is stored as (n, k)."""
  m, n = x.shape[0], q.shape[0]
  group = _packing.codes_per_group(q.fmt.element.bits)
  k = q.shape[1] + q.pad[0]
  along_k = q.scale is not None and q.scale.shape[1] > 1
  block = q.fmt.block[0] if along_k else k
  outputs = min(n, OUTPUTS, max(32, OUTPUTS_SIZE // k // 32 * 32))

  # Inputs by (lane, m, k / lanes): those that meet each lane.
  if q.pad[0]:
    x = jnp.pad(x, ((0, 0), (0, q.pad[0])))
  x = x.reshape(m, -1, group).transpose(2, 0, 1)

  # One scale for a row multiplies the sum instead, as in `_scan_tiles`.
  after = not along_k and q.minimum is None
  scales = None if after else q.scale, q.zero_point, q.minimum

  def add_rows(out, start):
    part = jax.tree.map(
      lambda leaf: lax.dynamic_slice_in_dim(leaf, start, outputs),
      (q.codes, scales),
    )
    part = _rows_product(x, *part, q.fmt, block // group, precision, dtype)
    return lax.dynamic_update_slice_in_dim(out, part, start, axis=1), None

  starts = jnp.arange(0, n, outputs)
  out = loops.carry(jnp.zeros((m, n), dtype), x, q.codes, scales)
  out = lax.scan(add_rows, out, starts)[0]
  if after:
    for f in _factors(q.scale, q.fmt):
      out = out * f.T
  return out


def _rows_product(x, packed, scales, fmt: BlockFormat, width, precision, dtype):
  """The product with some rows: each lane is decoded, scaled and multiplied.

  Args:
    x: (lanes, m, k / lanes).
    packed: codes of the rows.
    scales: scales, zero points and minima of the rows, or None.
    fmt: their format.
    width: inputs of a block in each lane.
    precision: of the product.
    dtype: of the sum.
  """
  scale, zero, minimum = scales
  # A scale is decoded once, not where it meets each element.
  scale, minimum = map(_decoded, (scale, minimum))
  factors = [core.once(f)[..., None] for f in _factors(scale, fmt)]
  total = 0
  lanes = _packing.lanes(packed, fmt.element.bits, 1)
  for lane, codes in zip(x, lanes, strict=True):
    w = codec.decode(codes, spec(fmt.element))
    w = w.reshape(w.shape[0], -1, width)
    if zero is not None:
      w = w - zero.astype(jnp.float32)[..., None]
    for f in factors:
      w = w * f
    if minimum is not None:
      w = w + minimum.astype(jnp.float32)[..., None]
    w = w.reshape(w.shape[0], -1)
    step = w.shape[1] if dtype == jnp.float32 else EXACT_PRODUCTS
    for k in range(0, w.shape[1], step):
      part = lax.dot_general(
        lane[:, k : k + step],
        w[:, k : k + step],
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
      )
      total = total + part.astype(dtype)
  return total


def _add_tile_product(fmt: BlockFormat, precision, acc, operands):
  """The product of a tile: each lane is decoded, scaled and multiplied."""
  x, packed, (scale, zero, minimum) = operands
  scale, minimum = map(_decoded, (scale, minimum))
  _, m, blocks, rows = x.shape
  for lane, w in zip(x, _lane_values(packed, fmt, (blocks, rows)), strict=True):
    if zero is not None:
      w = w - zero.astype(jnp.float32)[:, None]
    for f in _factors(scale, fmt):
      w = w * f[:, None]
    if minimum is not None:
      w = w + minimum.astype(jnp.float32)[:, None]
    part = lax.dot_general(
      lane.reshape(m, blocks * rows),
      w.reshape(blocks * rows, -1),
      (((1,), (0,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    acc = acc + part.astype(acc.dtype)
  return acc, None


def _lane_values(packed, fmt: BlockFormat, shape):
  """The elements of each lane of a tile, (block, row, n)."""
  return [
    codec.decode(codes, spec(fmt.element)).reshape(*shape, -1)
    for codes in _packing.lanes(packed, fmt.element.bits, 0)
  ]


def _decoded(scale):
  """Scales that are quantized in their turn in float32, others as they are."""
  if not isinstance(scale, QArray):
    return scale
  return core.once(qarray.decode(scale))


def _factors(scale, fmt: BlockFormat):
  if scale is None:
    return ()
  assert fmt.scale is not None
  return _scaling.factors(scale, fmt.scale)


def _tilerows(k: int, block: int, target: int) -> int:
  """The largest divisor of k that is whole blocks and at most `target` rows."""
  blocks = k // block
  best = 1
  for d in range(1, blocks + 1):
    if blocks % d == 0 and d * block <= max(target, block):
      best = d
  return best * block


def why_not_tiles(lhs: Shaped, rhs: Shaped, dims: DotDims) -> str | None:
  (_, rhs_k), (_, rhs_b) = dims
  if not isinstance(rhs, QArray):
    which = 'only the left' if isinstance(lhs, QArray) else 'no'
    return f'{which} operand is quantized'
  if rhs.merged:
    return 'its blocks span axes that are not contracted together'
  if rhs.fmt.is_tile:
    return 'its blocks are tiles'
  if rhs.ndim + rhs.axes[0] not in rhs_k:
    return f'blocks lie on axis {rhs.axis}, which is not contracted'
  if len(rhs_k) > 1 and rhs.pad[0]:
    return 'blocks are padded and another axis is contracted too'
  if len(rhs_k) > 1 and rhs.fmt.scale is not None and not rhs.fmt.block[0]:
    return 'scales vary along another contracted axis'
  if rhs.tensor_scale is not None:
    sizes = enumerate(rhs.tensor_scale.shape)
    if any(n != 1 for d, n in sizes if d not in rhs_b):
      return 'it is a stack of tensors'
  group = _packing.codes_per_group(rhs.fmt.element.bits)
  if rhs.fmt.scale is not None and rhs.fmt.block[0] % group:
    return 'packing groups straddle blocks'
  if rhs.size == 0 or 0 in lhs.shape:
    return 'an operand is empty'
  return None


def why_not_integer(lhs: Shaped, rhs: Shaped, dims: DotDims) -> str | None:
  (lhs_k, rhs_k), _ = dims
  for q, contracted in ((lhs, lhs_k), (rhs, rhs_k)):
    if not isinstance(q, QArray):
      return 'an operand is not quantized'
    if q.merged:
      return 'its blocks span axes that are not contracted together'
    element = q.fmt.element
    if not isinstance(element, IntFormat) or not element.signed:
      return f'{element} is not a signed integer'
    if q.scale is not None and any(q.scale.shape[d] != 1 for d in contracted):
      return 'scales vary along the contraction'
    if q.minimum is not None:
      return 'it has minima'
    if q.tensor_scale is None and q.scale is None:
      return 'it has no scale'
    if q.tensor_scale is not None and (
      q.scale is not None or math.prod(q.tensor_scale.shape) != 1
    ):
      return 'it has two levels of scales or is a stack of tensors'
    size = math.prod(q.shape[d] for d in contracted)
    if size * 128**2 >= 1 << 31:
      return f'{size} products can overflow int32'
  return None


def _result_scale(q: QArray, contracted, batch, before: int, after: int):
  """Scales of an operand in the axes (batch, lhs free, rhs free)."""
  scale = q.scale
  if scale is None:
    return q.tensor_scale.reshape(())
  assert q.fmt.scale is not None
  free = [d for d in range(q.ndim) if d not in (*contracted, *batch)]
  scale = _scaling.value(scale, q.fmt.scale)
  scale = scale.transpose(*batch, *free, *contracted)
  shape = [scale.shape[i] for i in range(len(batch))]
  shape += [1] * before
  shape += scale.shape[len(batch) : len(batch) + len(free)]
  return scale.reshape(*shape, *[1] * after)


def int8(q: QArray) -> jax.Array:
  """The integers of an operand of signed ones."""
  codes = _packing.unpack_unchecked(q.codes, q.fmt.element.bits, q.axes[0])
  codes = qarray.unpadded(codes, q.axes, q.pad)
  shift = 8 - q.fmt.element.bits
  k = lax.bitcast_convert_type(codes << shift if shift else codes, jnp.int8)
  return k >> shift if shift else k


def without_tensor_scale(q: Shaped) -> tuple[Any, jax.Array | None]:
  """(q without its tensor scale, the scale as a scalar) where it is one."""
  if not isinstance(q, QArray) or q.tensor_scale is None:
    return q, None
  if math.prod(q.tensor_scale.shape) != 1:
    return q, None
  ones = jnp.ones_like(q.tensor_scale)
  scalar = q.tensor_scale.reshape(())
  return qarray.replace(q, tensor_scale=ones), scalar


def _integer_codes(element: IntFormat) -> BlockFormat:
  """The format of bare codes: integers without fraction and scale."""
  bare = IntFormat(f'{element.name}_codes', element.width, element.signed)
  return BlockFormat(bare.name, bare, (0,), None)


def times(out: jax.Array, *scales: jax.Array | None) -> jax.Array:
  for s in scales:
    if s is not None:
      out = out * s
  return out


def _dense(x):
  return qarray.decode(x, jnp.float32) if isinstance(x, QArray) else x


def exact_dtype(fmt: BlockFormat) -> DTypeLike:
  """bfloat16 where it holds element times block scale exactly, else float32."""
  element, scale = fmt.element, fmt.scale
  if scale is None or not isinstance(element, FloatFormat | IntFormat):
    return jnp.float32
  if fmt.minimum:
    return jnp.float32
  bits = element.width if isinstance(element, IntFormat) else 1
  if isinstance(element, FloatFormat):
    bits += element.mantissa_bits
  bits += scale.mantissa_bits + (0 if fmt.has_exponent_scale else 1)
  return jnp.bfloat16 if bits <= 8 else jnp.float32
