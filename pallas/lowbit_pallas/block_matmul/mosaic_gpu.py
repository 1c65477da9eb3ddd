"""block_matmul on NVIDIA GPUs.

Hopper: 'fp8_128' is FP8 WGMMA with float32 promotion every 128 elements of K,
the scheme of DeepGEMM: the tensor cores keep about 14 bits of an FP8 sum, so
each 128 get a fresh accumulator that is scaled and added up in float32
registers. 'integer' is int8 WGMMA with int32 sums. 'exact' decodes lhs in XLA
and rhs in the registers of the kernel of wq_matmul; `reblock` tells operands
for which 'fp8_128' loses nothing but precision of the sums.

Blackwell: block-scaled MMA on codes and scales as they are. FP6, and FP4 that
meets FP8, are widened to E4M3, which holds all their values. That kernel has
been compiled for B200 and not yet run.

The tensor cores read both operands with K minor: XLA transposes operands that
have K on axis 0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_pallas import _mosaic_gpu
from lowbit_pallas.arith import codec, packing
from lowbit_pallas.arith.block import Blocked, is_exponent
from lowbit_pallas.block_matmul import (
  _blackwell,
  _hopper,
  mosaic_gpu_config as _config,
  reference,
)
from lowbit_pallas.block_matmul.mosaic_gpu_config import (
  Config,
  choose,
  heuristic as heuristic,
)
from lowbit_pallas.wq_matmul import (
  mosaic_gpu as wq_gpu,
  mosaic_gpu_config as wq_config,
  prepack,
)

TARGETS = ('h100', 'b200')

E4M3 = codec.minifloat(4, 3, 'fn')
E5M2 = codec.minifloat(5, 2, 'ieee')
E2M3 = codec.minifloat(2, 3)
E3M2 = codec.minifloat(3, 2)
E2M1 = codec.minifloat(2, 1)
FP8 = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}
# The FP8 format that holds every value of an element.
WIDENED = {E4M3: E4M3, E5M2: E5M2, E2M3: E4M3, E3M2: E4M3, E2M1: E4M3}


def why_not(
  lhs_shape: Sequence[int],
  rhs_shape: Sequence[int],
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  *,
  layout: str = 'nt',
  mode: str = 'exact',
  target: str = 'h100',
  config: Config | None = None,
) -> str | None:
  """Why the kernels refuse these operands, or None.

  Args:
    lhs_shape: shape of the packed codes of lhs.
    rhs_shape: shape of the packed codes of rhs.
    lhs_spec: static description of lhs.
    rhs_spec: static description of rhs.
    layout: see the package.
    mode: see the package.
    target: 'h100' or 'b200'.
    config: tiles; None for those of `choose`. 'exact' on Hopper
      takes none: it has those of wq_matmul.
  """
  reason = reference.why_not(
    lhs_shape, rhs_shape, lhs_spec, rhs_spec, layout=layout, mode=mode
  )
  if reason is not None:
    return reason
  if target not in TARGETS:
    return f'{target=} is not one of {TARGETS}'
  specs = lhs_spec, rhs_spec
  if target == 'b200':
    reason = _why_not_blackwell(specs, mode)
  else:
    reason = _why_not_hopper(specs, mode)
  if reason is not None:
    return reason
  m, n, k, _ = reference.sizes(lhs_shape, rhs_shape, lhs_spec, rhs_spec, layout)
  if (target, mode) == ('h100', 'exact'):
    return _why_not_decoded(m, n, k, rhs_spec, config)
  bits = _mma_bits(specs, mode)
  if config is None:
    config = choose(m, n, k, *specs, layout, bits=bits, target=target)
  elif config.bits != bits:
    return f'tiles for codes of {config.bits} bits, not {bits}'
  grid = -(-m // config.bm), -(-n // config.bn)
  return _config.why_not(config, target) or _mosaic_gpu.why_not_grid(grid)


def _why_not_hopper(specs, mode) -> str | None:
  if mode == 'exact':
    return None
  if mode == 'integer':
    widths = [s.bits for s in specs if s.bits != 8]
    return f'WGMMA multiplies int8, got {widths[0]} bits' if widths else None
  for spec in specs:
    if spec.element not in (E4M3, E5M2):
      return f'FP8 WGMMA takes e4m3fn and e5m2, got {spec.element}'
  return _why_not_mixed([s.element for s in specs])


def _why_not_decoded(m, n, k, spec, config) -> str | None:
  """Why wq_matmul does not take rhs of K x N as a weight."""
  if config is not None:
    return "mode='exact' takes no tiles on Hopper"
  try:
    tile = wq_config.tile_rows(k, spec)
  except ValueError as error:
    return str(error)
  codes = jax.ShapeDtypeStruct((k * spec.bits // 8, n), jnp.uint8)
  scale = None
  if spec.block:
    dtype = jnp.float32 if spec.scale is None else jnp.uint8
    scale = jax.ShapeDtypeStruct((k // spec.block, n), dtype)
  pack = functools.partial(
    prepack.prepack,
    zero_point=None,
    spec=spec,
    tile=tile,
    layout=wq_config.LAYOUT,
  )
  weight = jax.eval_shape(pack, codes, scale)
  tiles = _decoded_tiles(m, n, k, spec)
  return wq_gpu.why_not((m, k), jnp.bfloat16, weight, tiles)


def _decoded_tiles(m, n, k, spec):
  return wq_gpu.choose(m, n, k, spec, jnp.bfloat16, schedule='pre')


def _why_not_mixed(elements) -> str | None:
  if _mosaic_gpu.mixes_fp8() or len(set(elements)) == 1:
    return None
  return 'e4m3fn with e5m2 needs JAX 0.11'


def _why_not_blackwell(specs, mode) -> str | None:
  if mode != 'exact':
    return f'mode={mode!r} runs on WGMMA, which only Hopper has'
  kinds = {_mma_kind(s) for s in specs}
  if None in kinds:
    return (
      'block-scaled MMA takes FP8, FP6 or FP4 in blocks of 32 with E8M0 scales'
      f' and E2M1 in blocks of 16 with E4M3 scales, got {specs}'
    )
  if 'nvfp4' in kinds and len(kinds) > 1:
    return 'block-scaled MMA does not mix NVFP4 with MX formats'
  if 'mxfp8' in kinds:
    return _why_not_mixed([WIDENED[s.element] for s in specs])
  return None


def _mma_kind(spec: Blocked) -> str | None:
  """The class of operands of the block-scaled MMA that codes belong to."""
  if is_exponent(spec.scale) and spec.block == 32:
    if spec.element == E2M1:
      return 'mxfp4'
    return 'mxfp8' if spec.element in WIDENED else None
  if spec.scale is not None and spec.block == 16 and spec.element == E2M1:
    return 'nvfp4' if spec.scale._replace(signed=True) == E4M3 else None
  return None


def _mma_bits(specs, mode) -> int:
  """Width of the codes that the tensor cores read."""
  if mode == 'exact' and all(s.element == E2M1 for s in specs):
    return 4
  return 8


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
  target: str = 'h100',
  config: Config | None = None,
  interpret: Any = False,
) -> jax.Array:
  """`reference.run` on a GPU.

  Args:
    lhs: see `reference.run`, like all arguments up to `mode`.
    lhs_scale: in 'fp8_128', 1 x 128.
    rhs: see `reference.run`.
    rhs_scale: in 'fp8_128', 128 x 128.
    lhs_spec: see `reference.run`.
    rhs_spec: see `reference.run`.
    layout: see the package.
    mode: see the package.
    target: 'h100' or 'b200'.
    config: tiles; None for those of `choose`.
    interpret: False, or `plgpu.InterpretGPUParams` from JAX 0.11 on, which
      knows neither operands in registers nor block-scaled MMA: not in 'exact'.

  Raises:
    ValueError: for operands that do not fit each other, and in 'fp8_128' for
      scales of rhs that are not 128 x 128.
    NotImplementedError: with the reason of `why_not`.
  """
  reference.check(
    lhs, lhs_scale, rhs, rhs_scale, lhs_spec, rhs_spec, layout, mode
  )
  kind: dict[str, Any] = dict(layout=layout, mode=mode, target=target)
  shapes = lhs.shape, rhs.shape
  if reason := why_not(*shapes, lhs_spec, rhs_spec, **kind, config=config):
    raise NotImplementedError(reason)
  if interpret and mode == 'exact':
    raise NotImplementedError("mode='exact' cannot be interpreted")
  m, n, k, _ = reference.sizes(lhs.shape, rhs.shape, lhs_spec, rhs_spec, layout)
  if 0 in (m, n, k):
    return jnp.zeros((m, n), jnp.float32)
  # Without a kernel of its own: lhs is decoded here, rhs by wq_matmul.
  lk, rk = reference.k_axes(layout)
  if (target, mode) == ('h100', 'exact'):
    x = reference.values(lhs, lhs_scale, lhs_spec, lk)
    x = x.T if lk == 0 else x
    return _decoded(x, rhs, rhs_scale, rhs_spec, rk)
  # The others read codes, K minor, in whole tiles; what pads them is cut off.
  specs = lhs_spec, rhs_spec
  if config is None:
    config = choose(
      m, n, k, *specs, layout, bits=_mma_bits(specs, mode), target=target
    )
  a = _k_minor(lhs, lhs_spec.bits, lk)
  b = _k_minor(rhs, rhs_spec.bits, rk)
  if mode == 'integer':
    row, column = reference.row_scales(lhs_scale, rhs_scale, *specs, layout)
    row = jnp.broadcast_to(row[:, 0], (m,))
    column = jnp.broadcast_to(column[0], (n,))
    out = _integer(a, b, row, column, config, interpret)
  else:
    sa = lhs_scale.T if lk == 0 else lhs_scale
    sb = rhs_scale.T if rk == 0 else rhs_scale
    if mode == 'fp8_128':
      out = _promoted(a, b, sa, sb, specs, config, interpret)
    else:
      out = _block_scaled(a, b, sa, sb, specs, config)
  return out[:m, :n]


def _k_minor(codes, bits: int, axis: int):
  """Packed codes with K on axis 1."""
  if axis == 1:
    return codes
  return packing.pack(packing.unpack(codes, bits, 0).T, bits, 1)


def _decoded(x, codes, scale, spec, axis):
  if axis == 1:
    codes = codes.T
    scale = None if scale is None else scale.T
  (m, k), n = x.shape, codes.shape[1]
  tiles = _decoded_tiles(m, n, k, spec)
  weight = prepack.prepack(
    codes, scale, None, spec, tile=tiles.tile, layout=wq_config.LAYOUT
  )
  return wq_gpu.run(x, weight, config=tiles, out_dtype=jnp.float32)


def _padded(x, rows: int, columns: int):
  """`x` with zeros up to multiples of rows and columns."""
  return jnp.pad(x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))


def _integer(a, b, row, column, config, interpret):
  a = _padded(lax.bitcast_convert_type(a, jnp.int8), config.bm, config.bk)
  b = _padded(lax.bitcast_convert_type(b, jnp.int8), config.bn, config.bk)
  row = jnp.pad(row, (0, a.shape[0] - row.shape[0]))
  column = jnp.pad(column, (0, b.shape[0] - column.shape[0]))
  return _hopper.integer(a, b, row, column, config, interpret or None)


def _promoted(a, b, sa, sb, specs, config, interpret):
  if sb.shape[0] != -(-b.shape[0] // reference.PROMOTION):
    raise ValueError(
      f'block_matmul: scales of rhs have shape {sb.shape}, which is not one for'
      f' 128 x 128 of N={b.shape[0]}'
    )
  a, b = (
    lax.bitcast_convert_type(_padded(x, rows, config.bk), FP8[spec.element])
    for x, rows, spec in zip((a, b), (config.bm, config.bn), specs, strict=True)
  )
  sa = _padded(sa.T.astype(jnp.float32), 1, config.bm)
  sb = sb.T.astype(jnp.float32)
  return _hopper.promoted(a, b, sa, sb, config, interpret or None)


def _block_scaled(a, b, sa, sb, specs, config):
  operands, scales = [], []
  for x, s, spec, rows in zip(
    (a, b), (sa, sb), specs, (config.bm, config.bn), strict=True
  ):
    if config.bits == 4:
      x = _padded(x, rows, config.bk // 2)
      x = lax.bitcast_convert_type(x, jnp.float4_e2m1fn)
      x = x.reshape(x.shape[0], -1)
    else:
      fp8 = WIDENED[spec.element]
      x = packing.unpack(x, spec.bits, 1)
      if spec.element != fp8:
        x = codec.encode_float(codec.decode_float(x, spec.element), fp8)
      x = _padded(x, rows, config.bk)
      x = lax.bitcast_convert_type(x, FP8[fp8])
    s = _blackwell.scale_tiles(_padded(s, rows, config.bk // spec.block))
    dtype = jnp.float8_e8m0fnu if is_exponent(spec.scale) else jnp.float8_e4m3fn
    operands.append(x)
    scales.append(lax.bitcast_convert_type(s, dtype))
  (a, b), (sa, sb) = operands, scales
  return _blackwell.block_scaled(a, b, sa, sb, specs[0].block, config)
