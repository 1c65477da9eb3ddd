"""The product on TPU: weights are decoded in VMEM, next to the matrix unit."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from lowbit_pallas.arith import block, packing
from lowbit_pallas.wq_matmul import reference, tpu_config as _config
from lowbit_pallas.wq_matmul.prepack import Prepacked
from lowbit_pallas.wq_matmul.tpu_config import (
  LAYOUT,
  Config,
  choose,
  heuristic as heuristic,
)


def why_not(
  x_shape: Sequence[int],
  x_dtype: DTypeLike,
  w: Prepacked,
  config: Config | None = None,
) -> str | None:
  """Why the kernel refuses, or None.

  Args:
    x_shape: shape of x.
    x_dtype: dtype of x.
    w: the weight, arrays or `jax.ShapeDtypeStruct`.
    config: tile sizes; None for those of `choose`.
  """
  config = config or _chosen(x_shape, x_dtype, w)
  refusal = reference.why_not(x_shape, x_dtype, w, config.schedule)
  if refusal is not None:
    return refusal
  if w.layout != LAYOUT:
    return f'the weight has layout {w.layout!r}; prepack it with {LAYOUT!r}'
  if w.tile != config.tile:
    return f'the weight has tiles of {w.tile} rows, config.tile={config.tile}'
  lane = w.tile // packing.codes_per_group(w.spec.bits)
  if w.tile % 128 or lane % 32:
    return (
      f'tiles of {w.tile} rows in lanes of {lane}: not multiples of 128 and 32'
    )
  return _config.why_not(config)


def _chosen(x_shape, x_dtype, w: Prepacked) -> Config:
  return choose(x_shape[0], w.n, w.k, w.spec, x_dtype, tile=w.tile)


def run(
  x: jax.Array,
  w: Prepacked,
  *,
  config: Config | None = None,
  out_dtype: DTypeLike | None = None,
  interpret: Any = False,
) -> jax.Array:
  """x @ dequantize(w).

  Args:
    x: (m, k) in bfloat16, float16 or float32.
    w: the weight in the layout 'kn'.
    config: tile sizes; None for those of `choose`.
    out_dtype: dtype of the result, which is rounded to it once; None for that
      of x.
    interpret: as in `pl.pallas_call`.

  Returns:
    (m, n).
  """
  config = config or _chosen(x.shape, x.dtype, w)
  refusal = why_not(x.shape, x.dtype, w, config)
  if refusal is not None:
    raise NotImplementedError(refusal)
  out_dtype = x.dtype if out_dtype is None else out_dtype
  m = x.shape[0]
  if not (m and w.n and w.steps):
    return jnp.zeros((m, w.n), out_dtype)
  operands, wide = reference.operands_of(x, w, config.schedule)
  # Mosaic packs no float16; parts are summed in float32.
  half = operands.shape[0] == m and out_dtype == jnp.bfloat16
  stored = jnp.bfloat16 if half else jnp.float32
  out = _call(operands, w, config, wide, stored, interpret)
  return reference.sum_of_parts(out, m).astype(out_dtype)


def _call(x, w: Prepacked, config: Config, wide, out_dtype, interpret):
  bm, bn, tile = config.bm, config.bn, config.tile
  m, n = x.shape[0], w.n
  size, lane = w.planes.shape[0], tile // packing.codes_per_group(w.spec.bits)
  grid = (pl.cdiv(m, bm), pl.cdiv(n, bn), w.steps)
  per_block = [leaf for leaf in (w.scale, w.zero_point) if leaf is not None]
  tiles_per_block = w.tiles_per_block
  in_specs = [
    pl.BlockSpec((bm, tile), lambda i, j, k: (i, k)),
    pl.BlockSpec((size, lane, bn), lambda i, j, k: (0, k, j)),
  ]

  def block_index(i, j, k):
    return lax.div(k, tiles_per_block), 0, j

  in_specs += [
    pl.BlockSpec((None, leaf.shape[1], bn), block_index) for leaf in per_block
  ]
  return pl.pallas_call(
    functools.partial(
      _kernel,
      spec=w.spec,
      has_scale=w.scale is not None,
      schedule=config.schedule,
      wide=wide,
    ),
    grid=grid,
    in_specs=in_specs,
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
    scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='wq_matmul',
  )(x, w.planes, *per_block)


def _kernel(x, planes, *rest, spec, has_scale, schedule, wide):
  *per_block, out, acc = rest
  per_block = [ref[...] for ref in per_block]
  scale = per_block.pop(0) if has_scale else None
  zero = per_block[0] if per_block else None
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  acc[...] = reference.tile_product(
    acc[...],
    x[...],
    planes[...],
    scale if spec.block else None,
    zero,
    spec,
    schedule,
    wide,
  )

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    total = acc[...]
    if not spec.block and scale is not None:
      total = block.times_scale(total, scale, spec.scale)
    out[...] = total.astype(out.dtype)
