"""The contract of block_matmul in jnp, and what its kernels check and share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_pallas.arith import block, codec, packing
from lowbit_pallas.arith.block import Blocked

MODES = ('exact', 'fp8_128', 'integer')
LAYOUTS = ('nt', 'nn', 'tn', 'tt')
PROMOTION = 128  # elements between float32 promotions in 'fp8_128'


def k_axes(layout: str) -> tuple[int, int]:
  """The axes of lhs and rhs that are summed."""
  return (1 if layout[0] == 'n' else 0), (0 if layout[1] == 'n' else 1)


def sizes(
  lhs_shape: Sequence[int],
  rhs_shape: Sequence[int],
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  layout: str,
) -> tuple[int, int, int, int]:
  """M, N and the two values of K that the shapes of packed codes imply."""
  lk, rk = k_axes(layout)
  return (
    lhs_shape[1 - lk],
    rhs_shape[1 - rk],
    packing.unpacked_size(lhs_shape[lk], lhs_spec.bits),
    packing.unpacked_size(rhs_shape[rk], rhs_spec.bits),
  )


def why_not(
  lhs_shape: Sequence[int],
  rhs_shape: Sequence[int],
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  *,
  layout: str = 'nt',
  mode: str = 'exact',
) -> str | None:
  """Why block_matmul does not take these operands, or None.

  Args:
    lhs_shape: shape of the packed codes of lhs.
    rhs_shape: shape of the packed codes of rhs.
    lhs_spec: static description of lhs.
    rhs_spec: static description of rhs.
    layout: one of `LAYOUTS`.
    mode: one of `MODES`.
  """
  if layout not in LAYOUTS:
    return f'layout={layout!r} is not one of {LAYOUTS}'
  if mode not in MODES:
    return f'mode={mode!r} is not one of {MODES}'
  if len(lhs_shape) != 2 or len(rhs_shape) != 2:
    return f'operands {lhs_shape} and {rhs_shape} are not matrices'
  _, _, lhs_k, rhs_k = sizes(lhs_shape, rhs_shape, lhs_spec, rhs_spec, layout)
  if lhs_k != rhs_k:
    return f'lhs has K={lhs_k} and rhs K={rhs_k} in layout {layout!r}'
  for name, spec in (('lhs', lhs_spec), ('rhs', rhs_spec)):
    reason = _why_not_operand(spec, mode, lhs_k)
    if reason is not None:
      return f'{name}: {reason}'
  return None


def _why_not_operand(spec: Blocked, mode: str, k: int) -> str | None:
  element = spec.element
  if k % packing.codes_per_group(spec.bits):
    return f'K={k} codes of {spec.bits} bits do not fill whole bytes'
  if isinstance(element, codec.Codebook):
    return 'code 0 of a codebook is not zero, so blocks cannot be padded'
  if isinstance(element, codec.Float) and not element.subnormals:
    return 'the element has no zero, so blocks cannot be padded'
  if isinstance(element, codec.Int) and not element.signed:
    return 'unsigned integers need a zero point, which is not taken here'
  if mode == 'integer':
    if not isinstance(element, codec.Int):
      return f"mode='integer' takes integer elements, got {element}"
    if spec.block:
      return f"mode='integer' takes one scale per row, got block={spec.block}"
    if k << (2 * element.bits - 2) >= 1 << 31:
      return f'sums of K={k} products can overflow int32'
  elif mode == 'fp8_128':
    if not isinstance(element, codec.Float) or spec.bits != 8:
      return f"mode='fp8_128' takes 8-bit floating point, got {element}"
    if spec.block != PROMOTION or spec.scale is not None:
      return (
        f"mode='fp8_128' takes float32 scales of {PROMOTION} elements, got"
        f' block={spec.block}, scale={spec.scale}'
      )
  if spec.block and k % spec.block:
    return f'K={k} is not whole blocks of {spec.block}'
  return None


def values(
  codes: jax.Array, scale: jax.Array | None, spec: Blocked, axis: int
) -> jax.Array:
  """element * scale in bfloat16.

  Args:
    codes: uint8, packed along `axis`.
    scale: stored scales, K / block along `axis`; None for 1.
    spec: static description.
    axis: axis of the blocks.
  """
  x = codec.decode(packing.unpack(codes, spec.bits, axis), spec.element)
  if scale is not None:
    stored = jnp.repeat(scale, spec.block, axis)
    x = block.times_scale(x, stored, spec.scale)
  return x.astype(jnp.bfloat16)


def run(
  lhs: jax.Array,
  lhs_scale: jax.Array | None,
  rhs: jax.Array,
  rhs_scale: jax.Array | None,
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  *,
  layout: str = 'nt',
  mode: str = 'exact',
) -> jax.Array:
  """The product of two blocked operands.

  Args:
    lhs: uint8 codes of shape (M, K) or (K, M), packed along K.
    lhs_scale: stored scales, K / block in the place of K. Where block is 0:
      None, or in 'integer' one for each row.
    rhs: uint8 codes of shape (N, K) or (K, N), packed along K.
    rhs_scale: stored scales; in 'fp8_128' with ceil(N / 128) or N in the place
      of N.
    lhs_spec: static description of lhs.
    rhs_spec: static description of rhs.
    layout: see the package.
    mode: see the package.

  Returns:
    float32 (M, N).

  Raises:
    ValueError: for operands that `why_not` refuses.
  """
  check(lhs, lhs_scale, rhs, rhs_scale, lhs_spec, rhs_spec, layout, mode)
  lk, rk = k_axes(layout)
  dims = (((lk,), (rk,)), ((), ()))
  if mode == 'integer':
    left, right = lhs_spec.element, rhs_spec.element
    assert isinstance(left, codec.Int) and isinstance(right, codec.Int)
    a = integers(packing.unpack(lhs, lhs_spec.bits, lk), left)
    b = integers(packing.unpack(rhs, rhs_spec.bits, rk), right)
    total = lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
    scales = row_scales(lhs_scale, rhs_scale, lhs_spec, rhs_spec, layout)
    return scaled(total, *scales)
  if mode == 'fp8_128':
    return _promoted(lhs, lhs_scale, rhs, rhs_scale, lhs_spec, rhs_spec, layout)
  return lax.dot_general(
    values(lhs, lhs_scale, lhs_spec, lk),
    values(rhs, rhs_scale, rhs_spec, rk),
    dims,
    preferred_element_type=jnp.float32,
  )


def check(
  lhs: jax.Array,
  lhs_scale: jax.Array | None,
  rhs: jax.Array,
  rhs_scale: jax.Array | None,
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  layout: str,
  mode: str,
) -> None:
  """Checks operands and scales.

  Raises:
    ValueError: for operands that `why_not` refuses, and for scales that do not
      fit the specs.
  """
  reason = why_not(
    lhs.shape, rhs.shape, lhs_spec, rhs_spec, layout=layout, mode=mode
  )
  if reason is not None:
    raise ValueError(f'block_matmul: {reason}')
  if mode == 'integer':
    return
  for name, spec, scale in (
    ('lhs', lhs_spec, lhs_scale),
    ('rhs', rhs_spec, rhs_scale),
  ):
    if bool(spec.block) != (scale is not None):
      raise ValueError(
        f'block_matmul: {name} has block={spec.block} and'
        f' {"a" if spec.block == 0 else "no"} scale; one scale for a whole row'
        ' multiplies the result'
      )


def integers(code: jax.Array, element: codec.Int) -> jax.Array:
  """Signed integers of codes, as int8."""
  shift = 32 - element.bits
  return ((code.astype(jnp.int32) << shift) >> shift).astype(jnp.int8)


def row_scales(
  lhs_scale: jax.Array | None,
  rhs_scale: jax.Array | None,
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  layout: str,
) -> tuple[jax.Array, jax.Array]:
  """Scales of 'integer' as float32 (M or 1, 1) and (1, N or 1).

  The step of the elements, a power of two, is part of them.
  """
  lk, rk = k_axes(layout)
  out = []
  for scale, spec, k_axis, minor in (
    (lhs_scale, lhs_spec, lk, 1),
    (rhs_scale, rhs_spec, rk, 0),
  ):
    assert isinstance(spec.element, codec.Int)
    factor = jnp.full((1, 1), 2.0**-spec.element.fraction_bits, jnp.float32)
    if scale is not None:
      factor = block.times_scale(factor, scale, spec.scale)
    out.append(factor.T if k_axis != minor else factor)
  return tuple(out)


def scaled(total: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
  """The float32 result of 'integer' from its int32 sums."""
  return total.astype(jnp.float32) * row * column


def promotion_scales(
  lhs_scale: jax.Array, rhs_scale: jax.Array, n: int, layout: str
) -> tuple[jax.Array, jax.Array]:
  """Scales of 'fp8_128' as float32 (M, K / 128) and (K / 128, N)."""
  lk, rk = k_axes(layout)
  sa = lhs_scale.T if lk == 0 else lhs_scale
  sb = rhs_scale.T if rk == 1 else rhs_scale
  if sb.shape[1] != n:
    sb = jnp.repeat(sb, PROMOTION, axis=1)[:, :n]
  return sa.astype(jnp.float32), sb.astype(jnp.float32)


def promote(
  acc: jax.Array, partial: jax.Array, sa: jax.Array, sb: jax.Array | int
) -> jax.Array:
  """One step of 'fp8_128': sa (M, 1), sb (1, N)."""
  return acc + (sa * sb) * partial


def _promoted(lhs, lhs_scale, rhs, rhs_scale, lhs_spec, rhs_spec, layout):
  lk, rk = k_axes(layout)
  m, n, k, _ = sizes(lhs.shape, rhs.shape, lhs_spec, rhs_spec, layout)
  a = _blocks_first(values(lhs, None, lhs_spec, lk), lk)
  b = _blocks_first(values(rhs, None, rhs_spec, rk), rk)
  sa, sb = promotion_scales(lhs_scale, rhs_scale, n, layout)

  def step(acc, operands):
    a, b, sa, sb = operands
    partial = lax.dot_general(
      a, b, (((lk,), (rk,)), ((), ())), preferred_element_type=jnp.float32
    )
    return promote(acc, partial, sa[:, None], sb[None]), None

  start = jnp.zeros((m, n), jnp.float32)
  if k == 0:
    return start
  return lax.scan(step, start, (a, b, sa.T, sb))[0]


def _blocks_first(x, axis: int):
  """Blocks of 128 along `axis` as a new leading axis."""
  shape = list(x.shape)
  shape[axis : axis + 1] = [shape[axis] // PROMOTION, PROMOTION]
  return jnp.moveaxis(x.reshape(shape), axis, 0)
