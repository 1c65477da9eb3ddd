"""The contract in jnp, and the arithmetic of a tile that kernels share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lowbit_pallas.arith import block, codec, loops, packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul.prepack import Prepacked

SCHEDULES = ('pre', 'post')
RUN = 256  # rows of K that are decoded at once


def run(
  x: jax.Array,
  w: Prepacked,
  schedule: str,
  *,
  out_dtype: DTypeLike | None = None,
) -> jax.Array:
  """x @ dequantize(w), a scan over the tiles of w.

  Args:
    x: (m, k) in bfloat16, float16 or float32.
    w: the weight, in either layout.
    schedule: 'pre' or 'post'.
    out_dtype: dtype of the result, which is rounded to it once; None for that
      of x.

  Returns:
    (m, n).
  """
  refusal = why_not(x.shape, x.dtype, w, schedule)
  if refusal is not None:
    raise ValueError(refusal)
  out_dtype = x.dtype if out_dtype is None else out_dtype
  m, steps = x.shape[0], w.steps
  if not (m and w.n and steps):
    return jnp.zeros((m, w.n), out_dtype)
  operands, wide = operands_of(x, w, schedule)
  tiles = operands.reshape(-1, steps, w.tile).swapaxes(0, 1)
  planes = w.planes.swapaxes(1, 2) if w.layout == 'nk' else w.planes
  planes = planes.reshape(planes.shape[0], steps, -1, w.n).swapaxes(0, 1)

  def per_step(leaf):
    return (
      None if leaf is None else leaf[jnp.arange(steps) // w.tiles_per_block]
    )

  def step(acc, leaves):
    x_tile, planes_tile, scale, zero = leaves
    return tile_product(
      acc, x_tile, planes_tile, scale, zero, w.spec, schedule, wide
    ), None

  start = jnp.zeros((operands.shape[0], w.n), jnp.float32)
  start = loops.carry(start, operands, w)
  scale = w.scale if w.spec.block else None
  leaves = (tiles, planes, per_step(scale), per_step(w.zero_point))
  acc, _ = lax.scan(step, start, leaves)
  acc = sum_of_parts(acc, m)
  if not w.spec.block and w.scale is not None:
    acc = block.times_scale(acc, w.scale[0], w.spec.scale)
  return acc.astype(out_dtype)


def why_not(
  x_shape: Sequence[int], x_dtype: DTypeLike, w: Prepacked, schedule: str
) -> str | None:
  """Why operands do not fit each other, or None."""
  if schedule not in SCHEDULES:
    return f'{schedule=} is not one of {SCHEDULES}'
  if len(x_shape) != 2 or x_shape[1] != w.k:
    return f'x has shape {x_shape}, expected (m, {w.k})'
  if x_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'x has dtype {x_dtype}, not bfloat16, float16 or float32'
  return None


def fits_bfloat16(w: Prepacked, schedule: str) -> bool:
  """Whether bfloat16 holds every weight that the matrix unit sees."""
  spec = w.spec
  bits = _significant_bits(spec.element)
  if schedule == 'pre' and spec.block and w.scale is not None:
    if spec.scale is None:
      return False
    bits += _significant_bits(spec.scale) - 1
  return bits <= 8


def _significant_bits(element) -> int:
  """Significant bits that hold every value, also minus a zero point."""
  if isinstance(element, codec.Float):
    return element.mantissa_bits + 1
  if isinstance(element, codec.Int):
    return element.bits
  table = np.array(element.table, np.float32)
  return 8 if (table == table.astype(jnp.bfloat16)).all() else 24


def operands_of(
  x: jax.Array, w: Prepacked, schedule: str
) -> tuple[jax.Array, bool]:
  """x as the matrix unit takes it, K padded to whole tiles.

  A product with weights that bfloat16 holds is exact for bfloat16 x. Wider x
  then becomes the exact sum of bfloat16 parts, which are rows of their own.

  Returns:
    (parts * m, steps * tile) in bfloat16 or float32, and whether the weights
    are float32 as well.
  """
  wide = x.dtype != jnp.bfloat16 and not fits_bfloat16(w, schedule)
  if wide:
    x = x.astype(jnp.float32)
  elif x.dtype != jnp.bfloat16:
    x = bfloat16_parts(x)
  return jnp.pad(x, ((0, 0), (0, w.steps * w.tile - w.k))), wide


def bfloat16_parts(x: jax.Array) -> jax.Array:
  """Bfloat16 parts, stacked along axis 0, whose sum is x.

  Each takes the leading 8 of the bits that are left, by truncation, which never
  overflows: two parts hold a float16 and three a float32 of at least 2^-102.
  Inf and NaN are in the first part alone.
  """
  count = 2 if x.dtype == jnp.float16 else 3
  rest = x.astype(jnp.float32)
  parts = []
  for _ in range(count):
    head = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
    head = lax.bitcast_convert_type(head, jnp.float32)
    finite = jnp.abs(rest) < jnp.inf
    head = jnp.where(finite, head, rest)
    parts.append(head.astype(jnp.bfloat16))
    rest = jnp.where(finite, rest - head, 0)
  return jnp.concatenate(parts)


def sum_of_parts(acc: jax.Array, m: int) -> jax.Array:
  """Float32 (m, n) from products (parts * m, n), the smallest part first."""
  if acc.shape[0] == m:
    return acc
  parts = [acc[i : i + m] for i in range(0, acc.shape[0], m)]
  total = parts[-1]
  for part in parts[-2::-1]:
    total = total + part
  return total


def tile_product(
  acc: jax.Array,
  x: jax.Array,
  planes: jax.Array,
  scale: jax.Array | None,
  zero: jax.Array | None,
  spec: Blocked,
  schedule: str,
  wide: bool,
) -> jax.Array:
  """acc + x @ w for a tile of K rows.

  Args:
    acc: float32 (m, n).
    x: (m, K).
    planes: uint8 (bytes in a packing group, K / codes in it, n).
    scale: (blocks in the tile, n) as stored, or None.
    zero: uint8 in the shape of `scale`, or (1, n), or None.
    spec: what codes and scales stand for.
    schedule: 'pre' or 'post'.
    wide: whether weights are float32 instead of bfloat16.

  Returns:
    float32 (m, n).
  """
  lanes = packing.planes_to_fields(
    [planes[b] for b in range(planes.shape[0])], spec.bits
  )
  tile = x.shape[1]
  block_size = tile if scale is None else tile // scale.shape[0]
  post = schedule == 'post' and scale is not None
  factors, unit = (), 1.0
  if not post and scale is not None:
    factors = block.scale_factors(scale, spec.scale)
    # The last factor of a stored scale has room for another power of two; it
    # comes first, or else 2^127 would overflow.
    if spec.scale is not None and zero is None:
      unit = codec.unit_in_kernel(spec.element)
      factors = (factors[-1] * jnp.float32(unit), *factors[:-1])
  # Rows are decoded in runs: a block in 'post', else as many as overlap best.
  size = block_size if post else _rows_at_once(tile, block_size)
  for first in range(0, tile, size):
    parts = []
    for code, shift, rows in _pieces(lanes, first, first + size):
      value = codec.decode_field(code, shift, spec.bits, spec.element, unit)
      if zero is not None:
        value = _by_block(jnp.subtract, value, _float(zero), rows, tile)
      for factor in factors:
        value = _by_block(jnp.multiply, value, factor, rows, tile)
      parts.append(value if wide else value.astype(jnp.bfloat16))
    part = _dot(x[:, first : first + size], jnp.concatenate(parts))
    if post and scale is not None:
      g = first // size
      part = block.times_scale(part, scale[g : g + 1], spec.scale)
    acc = acc + part
  return acc


def _rows_at_once(tile: int, block_size: int) -> int:
  """Rows to decode before they meet x.

  Short runs let the compiler decode one while the matrix unit takes another.
  """
  fits = block_size % RUN == 0 or RUN % block_size == 0
  return RUN if fits and tile % RUN == 0 else tile


def _pieces(lanes, first: int, last: int):
  """Fields of rows first ... last - 1 of a tile, and the rows of each piece."""
  size = lanes[0][0].shape[0]
  for j, (code, shift) in enumerate(lanes):
    start, stop = max(first, j * size), min(last, (j + 1) * size)
    if start < stop:
      rows = range(start, stop)
      yield code[start - j * size : stop - j * size], shift, rows


def _by_block(op, value, per_block, rows: range, tile: int):
  """op(value, the entry of its block) for some rows of a tile."""
  size = tile // per_block.shape[0]
  count = max(len(rows) // size, 1)
  entries = per_block[rows.start // size : rows.start // size + count]
  if count == 1:
    return op(value, entries)
  n = value.shape[1]
  value = value.reshape(count, len(rows) // count, n)
  return op(value, entries[:, None, :]).reshape(len(rows), n)


def _float(code):
  return code.astype(jnp.int32).astype(jnp.float32)


def _dot(x, w):
  return lax.dot_general(
    x,
    w,
    (((1,), (0,)), ((), ())),
    precision=None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
