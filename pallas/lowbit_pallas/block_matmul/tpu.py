"""block_matmul on TPU: both operands are decoded in VMEM, then the MXU.

Operands of the same width are read as they are stored; where widths differ, XLA
first reorders each tile of K, as `prepack` does.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowbit_pallas.arith import block, codec, packing
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.block_matmul import reference, tpu_config as _config
from lowbit_pallas.block_matmul.tpu_config import (
  LANES,
  Config,
  choose,
  heuristic as heuristic,
)
from lowbit_pallas.wq_matmul import prepack

# The MXU of these multiplies int8; TPU7x replaced int8 by FP8.
INTEGER_TARGETS = ('v5e', 'v6e')


def why_not(
  lhs_shape: Sequence[int],
  rhs_shape: Sequence[int],
  lhs_spec: Blocked,
  rhs_spec: Blocked,
  *,
  layout: str = 'nt',
  mode: str = 'exact',
  target: str | None = None,
  config: Config | None = None,
) -> str | None:
  """Why the kernel refuses these operands, or None.

  Args:
    lhs_shape: shape of the packed codes of lhs.
    rhs_shape: shape of the packed codes of rhs.
    lhs_spec: static description of lhs.
    rhs_spec: static description of rhs.
    layout: see the package.
    mode: see the package.
    target: 'v5e', 'v6e' or 'tpu7x'; None if it is not known.
    config: tiles; None for those of `choose`.
  """
  reason = reference.why_not(
    lhs_shape, rhs_shape, lhs_spec, rhs_spec, layout=layout, mode=mode
  )
  if reason is not None:
    return reason
  if mode == 'integer' and target not in (None, *INTEGER_TARGETS):
    return f'the matrix unit of {target} does not multiply int8'
  for name, spec in (('lhs', lhs_spec), ('rhs', rhs_spec)):
    if mode == 'exact' and spec.block and not _is_fit(spec.block):
      return f'{name} has blocks of {spec.block}, not a power of two from 8'
  m, n, k, _ = reference.sizes(lhs_shape, rhs_shape, lhs_spec, rhs_spec, layout)
  tiles = config or choose(m, n, k, lhs_spec, rhs_spec, layout)
  return _config.why_not(tiles, m, n, lhs_spec, rhs_spec, layout)


def _is_fit(block_size: int) -> bool:
  return block_size >= 8 and block_size & (block_size - 1) == 0


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
  config: Config | None = None,
  interpret: Any = False,
) -> jax.Array:
  """`reference.run` on a TPU.

  Args:
    lhs: see `reference.run`, like all arguments up to `mode`.
    lhs_scale: see `reference.run`.
    rhs: see `reference.run`.
    rhs_scale: see `reference.run`.
    lhs_spec: see `reference.run`.
    rhs_spec: see `reference.run`.
    layout: see the package.
    mode: see the package.
    config: tiles; None for those of `choose`.
    interpret: as in `pl.pallas_call`.

  Raises:
    ValueError: for operands that do not fit each other.
    NotImplementedError: with the reason of `why_not`.
  """
  reference.check(
    lhs, lhs_scale, rhs, rhs_scale, lhs_spec, rhs_spec, layout, mode
  )
  m, n, k, _ = reference.sizes(lhs.shape, rhs.shape, lhs_spec, rhs_spec, layout)
  if 0 in (m, n, k):
    return jnp.zeros((m, n), jnp.float32)
  if config is None:
    config = choose(m, n, k, lhs_spec, rhs_spec, layout)
  reason = why_not(
    lhs.shape,
    rhs.shape,
    lhs_spec,
    rhs_spec,
    layout=layout,
    mode=mode,
    config=config,
  )
  if reason is not None:
    raise NotImplementedError(reason)
  # Scales that multiply the result or its parts, in float32.
  lk, rk = reference.k_axes(layout)
  post = None
  if mode == 'integer':
    post = reference.row_scales(
      lhs_scale, rhs_scale, lhs_spec, rhs_spec, layout
    )
    lhs_scale = rhs_scale = None
  elif mode == 'fp8_128':
    assert lhs_scale is not None and rhs_scale is not None
    sa, sb = reference.promotion_scales(lhs_scale, rhs_scale, n, layout)
    lhs_scale = sa.T if lk == 0 else sa
    rhs_scale = sb if rk == 0 else sb.T
  # Tiles of K, reordered only where the widths of the codes differ.
  in_order = not keeps_storage(lhs_spec, rhs_spec)
  a = prepare(lhs, lhs_scale, lhs_spec, lk, config.bk, in_order)
  b = prepare(rhs, rhs_scale, rhs_spec, rk, config.bk, in_order)
  return _call(a, b, post, m, n, (lk, rk), mode, config, in_order, interpret)


class Tiled(NamedTuple):
  """An operand as the kernel reads it, K in `steps` tiles.

  Attributes:
    planes: uint8, byte b of each packing group: (B, m, K / L) for K on axis 1,
      (B, K / L, m) for K on axis 0.
    scale: stored scales (steps, blocks in a tile, m), or None.
    spec: static description.
    tile: elements of K in a tile.
    steps: tiles.
  """

  planes: jax.Array
  scale: jax.Array | None
  spec: Blocked
  tile: int
  steps: int


def keeps_storage(lhs: Blocked, rhs: Blocked) -> bool:
  """Whether the kernel reads codes in the order in which they are stored.

  Lane j of a tile then holds its codes j, j + L, ... The sum does not care, as
  long as both operands have the same order and packing groups are one byte.
  """
  group = packing.codes_per_group(lhs.bits)
  fills_registers = all(s.block // group % 8 == 0 for s in (lhs, rhs))
  return lhs.bits == rhs.bits and group * lhs.bits == 8 and fills_registers


def prepare(
  codes: jax.Array,
  scale: jax.Array | None,
  spec: Blocked,
  axis: int,
  tile: int,
  in_order: bool,
) -> Tiled:
  """An operand in the order in which the kernel reads it.

  Args:
    codes: uint8, packed along `axis`.
    scale: stored scales, or None.
    spec: static description.
    axis: axis of K.
    tile: elements of K in a tile.
    in_order: whether lanes hold runs of K, as `prepack` orders them, or codes
      stay as they are stored.
  """
  if axis == 1:
    scale = None if scale is None else scale.T
  if in_order:
    layout = 'nk' if axis == 1 else 'kn'
    codes = codes.T if axis == 1 else codes
    w = prepack.prepack(codes, scale, None, spec, tile=tile, layout=layout)
    return Tiled(w.planes, w.scale, spec, tile, w.steps)
  steps = -(-packing.unpacked_size(codes.shape[axis], spec.bits) // tile)
  codes = _grown(codes, packing.packed_size(steps * tile, spec.bits), axis)
  if scale is not None:
    blocks = tile // spec.block
    scale = _grown(scale, steps * blocks, 0).reshape(steps, blocks, -1)
  return Tiled(codes[None], scale, spec, tile, steps)


def _grown(x, size: int, axis: int):
  """`x` with zeros up to `size`."""
  pad = [(0, 0), (0, 0)]
  pad[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pad)


def _call(a, b, post, m, n, axes, mode, config, in_order, interpret):
  inputs, specs = [], []
  for x, axis, tile, dim in (
    (a, axes[0], config.bm, 0),
    (b, axes[1], config.bn, 1),
  ):
    inputs.append(x.planes)
    specs.append(_planes_spec(x, axis, tile, dim))
    if x.scale is not None:
      inputs.append(x.scale)
      specs.append(_scale_spec(x, tile, dim))
  scratch = []
  if mode == 'integer':
    inputs += [
      jnp.broadcast_to(post[0], (m, 1)),
      jnp.broadcast_to(post[1], (1, n)),
    ]
    specs += [
      pl.BlockSpec((config.bm, 1), lambda i, j, k: (i, 0)),
      pl.BlockSpec((1, config.bn), lambda i, j, k: (0, j)),
    ]
    scratch = [pltpu.VMEM((config.bm, config.bn), jnp.int32)]
  steps = a.steps
  return pl.pallas_call(
    functools.partial(
      _BODIES[mode],
      specs=(a.spec, b.spec),
      scaled=(a.scale is not None, b.scale is not None),
      axes=axes,
      in_order=in_order,
    ),
    grid=(pl.cdiv(m, config.bm), pl.cdiv(n, config.bn), steps),
    in_specs=specs,
    out_specs=pl.BlockSpec((config.bm, config.bn), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name=f'block_matmul_{mode}',
  )(*inputs)


def _planes_spec(x, axis, tile, dim):
  size = x.planes.shape[0]
  rows = x.tile // packing.codes_per_group(x.spec.bits)
  if axis == 1:
    return pl.BlockSpec((size, tile, rows), lambda *ijk: (0, ijk[dim], ijk[2]))
  return pl.BlockSpec((size, rows, tile), lambda *ijk: (0, ijk[2], ijk[dim]))


def _scale_spec(x, tile, dim):
  shape = (None, x.scale.shape[1], tile)
  return pl.BlockSpec(shape, lambda *ijk: (ijk[2], 0, ijk[dim]))


def tile_codes(planes: jax.Array, bits: int) -> list:
  """Lanes of codes from the planes of a tile."""
  rows = [planes[b] for b in range(planes.shape[0])]
  return packing.planes_to_lanes(rows, bits)


def along_sublanes(factor: jax.Array, k: int) -> jax.Array:
  """Factors (blocks, n) repeated over blocks of k rows: (k, n)."""
  blocks, n = factor.shape
  size = k // blocks
  wide = jnp.broadcast_to(factor[:, None, :], (blocks, size, n))
  return wide.reshape(k, n)


def along_lanes(factor: jax.Array, k: int) -> jax.Array:
  """Factors (blocks, m) repeated over blocks of k columns: (m, k).

  A gather within registers: selecting among broadcast columns took twice the
  instructions of the whole kernel.
  """
  blocks, m = factor.shape
  log_size = (k // blocks).bit_length() - 1
  rest = jnp.zeros((LANES - blocks, m), factor.dtype)
  columns = jnp.concatenate([factor, rest]).T
  lane = lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
  parts = [
    jnp.take_along_axis(
      columns, (lane + start) >> log_size, axis=1, mode='promise_in_bounds'
    )
    for start in range(0, k, LANES)
  ]
  return jnp.concatenate(parts, axis=1)


def tile_values(
  planes: jax.Array,
  scale: jax.Array | None,
  spec: Blocked,
  axis: int,
  in_order: bool,
) -> jax.Array:
  """Values of a tile in bfloat16, lanes one after the other.

  Args:
    planes: uint8 planes of the tile.
    scale: stored scales (blocks, m), or None.
    spec: static description.
    axis: 1 for a result of shape (m, k), 0 for (k, m).
    in_order: see `prepare`.
  """
  runs = [codec.decode(c, spec.element) for c in tile_codes(planes, spec.bits)]
  x = jnp.concatenate(runs, axis=axis) if len(runs) > 1 else runs[0]
  if scale is not None:
    spread = along_lanes if axis == 1 else along_sublanes
    for factor in block.scale_factors(scale, spec.scale):
      if in_order:
        x = x * spread(factor, x.shape[axis])
      else:
        lane = spread(factor, runs[0].shape[axis])
        x = x * jnp.concatenate([lane] * len(runs), axis=axis)
  return x.astype(jnp.bfloat16)


def _dot(a, b, axes, dtype=jnp.float32):
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _operands(refs, scaled):
  """(planes, scale or None) of lhs and rhs, and the refs after them."""
  refs = list(refs)
  out = []
  for has_scale in scaled:
    planes = refs.pop(0)
    out.append((planes, refs.pop(0) if has_scale else None))
  return *out, refs


def _exact(*refs, specs, scaled, axes, in_order):
  (a, sa), (b, sb), (out,) = _operands(refs, scaled)

  @pl.when(pl.program_id(2) == 0)
  def _():
    out[...] = jnp.zeros_like(out)

  x, y = [
    tile_values(c[...], s if s is None else s[...], specs[i], axes[i], in_order)
    for i, (c, s) in enumerate(((a, sa), (b, sb)))
  ]
  out[...] += _dot(x, y, axes)


def _fp8_128(*refs, specs, scaled, axes, in_order):
  (a, sa), (b, sb), (out,) = _operands(refs, scaled)

  @pl.when(pl.program_id(2) == 0)
  def _():
    out[...] = jnp.zeros_like(out)

  a = tile_values(a[...], None, specs[0], axes[0], in_order)
  b = tile_values(b[...], None, specs[1], axes[1], in_order)
  sa, sb = sa[...].T, sb[...]
  acc = out[...]
  for i in range(sb.shape[0]):
    start = i * reference.PROMOTION
    stop = start + reference.PROMOTION
    partial = _dot(
      lax.slice_in_dim(a, start, stop, axis=axes[0]),
      lax.slice_in_dim(b, start, stop, axis=axes[1]),
      axes,
    )
    acc = reference.promote(acc, partial, sa[:, i : i + 1], sb[i : i + 1])
  out[...] = acc


def _integer(a, b, row, column, out, acc, *, specs, scaled, axes, in_order):
  del scaled, in_order

  @pl.when(pl.program_id(2) == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  def codes(planes, spec, axis):
    runs = [
      reference.integers(c, spec.element)
      for c in tile_codes(planes[...], spec.bits)
    ]
    return jnp.concatenate(runs, axis=axis) if len(runs) > 1 else runs[0]

  acc[...] += _dot(
    codes(a, specs[0], axes[0]), codes(b, specs[1], axes[1]), axes, jnp.int32
  )

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    out[...] = reference.scaled(acc[...], row[...], column[...])


_BODIES = {'exact': _exact, 'fp8_128': _fp8_128, 'integer': _integer}
