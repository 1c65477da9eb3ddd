"""Contractions by kernels that decode operands next to the matrix unit.

Two QArray matrices in blocks along the reduction go to `block_matmul` where it
takes their formats. Otherwise the right operand is the weight of `wq_matmul`, a
QArray in blocks along a contracted axis or a `Prepacked` one. Tensor scales
multiply the float32 accumulator.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import qarray
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.formats import IntFormat
from lowbit_jax.numerics._codec import blocked
from lowbit_jax.ops import _dot_xla, _operand, _partition, _prepack
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.ops._prepack import Prepacked
from lowbit_jax.qarray import QArray
from lowbit_pallas import _support
from lowbit_pallas._support import Kernel


def plan_tpu(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product on TPU with a float32 result."""
  return _plan('tpu', lhs, rhs, dimension_numbers, precision)


def plan_mosaic_gpu(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product on GPU with a float32 result."""
  return _plan('mosaic_gpu', lhs, rhs, dimension_numbers, precision)


def plan_xla(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product in XLA, which reads QArrays; other storage is unpacked."""
  dims = dimension_numbers
  if not any(
    _operand.is_stored(x) and not isinstance(x, QArray) for x in (lhs, rhs)
  ):
    return _dot_xla.plan_dot_general(lhs, rhs, dims, precision)
  left, right = jax.eval_shape(
    lambda: tuple(map(_operand.unpacked, (lhs, rhs)))
  )
  note, run, _ = _dot_xla.plan_dot_general(left, right, dims, precision)
  return Plan(
    f'unpacks the weight: {note}',
    lambda lhs, rhs: run(_operand.unpacked(lhs), _operand.unpacked(rhs)),
  )


def _plan(implementation: str, lhs, rhs, dims, precision) -> Plan:
  del precision  # products are exact and sums float32
  blocks = _plan_blocks(implementation, lhs, rhs, dims)
  if blocks is not None:
    return blocks
  kernel = _support.require('wq_matmul', implementation)
  as_qarray = jax.eval_shape(_operand.unpacked, rhs)
  why = _dot_xla.why_not_tiles(lhs, as_qarray, dims)
  if dims[1][0]:
    why = 'it has batch dimensions'
  if why is None and rhs.fmt.minimum:
    why = 'it has minima'
  if why is not None:
    raise NotImplementedError(why)
  module, product = kernel.load(), _Product(kernel, dims)
  try:
    x, w, _ = jax.eval_shape(product.operands, lhs, rhs)
  except ValueError as error:  # no tile fits the blocks
    raise NotImplementedError(str(error)) from error
  sizes = module.choose(x.shape[0], w.n, w.k, w.spec, x.dtype, tile=w.tile)
  why = module.why_not(x.shape, x.dtype, w, sizes)
  if why is not None:
    raise NotImplementedError(why)
  order = 'prepacked' if isinstance(rhs, Prepacked) else 'reordered here'
  return Plan(
    f'decodes tiles of {w.tile} rows of the weight ({order}), scales'
    f" '{sizes.schedule}' product",
    product,
  )


class _Product:
  def __init__(self, kernel: Kernel, dims):
    self.kernel, self.dims = kernel, dims

  def __call__(self, lhs, rhs):
    lhs, lhs_scale = _dot_xla.without_tensor_scale(lhs)
    x, w, shape = self.operands(lhs, rhs)
    run = functools.partial(self.kernel.load().run, out_dtype=jnp.float32)
    has_rules = self.kernel.has_rules
    out = _partition.partitioned(run, x, w, has_rules=has_rules).reshape(shape)
    rhs_scale = rhs.tensor_scale
    rhs_scale = None if rhs_scale is None else rhs_scale.reshape(())
    return _dot_xla.times(out, lhs_scale, rhs_scale)

  def operands(self, lhs, rhs):
    """x (m, k), the weight as the kernel takes it, and the result's shape."""
    x = lhs
    if isinstance(lhs, QArray):
      x = qarray.decode(lhs, _dot_xla.exact_dtype(lhs.fmt))
    if not isinstance(rhs, Prepacked):
      x, matrix, shape = _dot_xla.as_matrices(x, rhs, self.dims)
      return x, _prepack.weight(matrix, self.kernel.implementation), shape
    ((contracted,), _), _ = self.dims
    x = jnp.moveaxis(x, contracted, -1)
    shape = (*x.shape[:-1], rhs.shape[1])
    return x.reshape(-1, x.shape[-1]), rhs.weight, shape


def _plan_blocks(implementation: str, lhs, rhs, dims) -> Plan | None:
  """A plan with `block_matmul`, None where it is not for these operands."""
  if not (isinstance(lhs, QArray) and isinstance(rhs, QArray)):
    return None
  if lhs.merged or rhs.merged:
    return None
  if _support.why_not('block_matmul', implementation) is not None:
    return None
  kernel = _support.require('block_matmul', implementation)
  if kernel.has_rules and not _partition.is_alone():
    return None  # only wq_matmul has a rule for the partitioner
  (contracted, batch), mode = dims, _mode(lhs, rhs)
  matrices = lhs.ndim == rhs.ndim == 2 and contracted[0] and not batch[0]
  if not matrices or mode is None:
    return None
  (lhs_k,), (rhs_k,) = contracted
  if lhs.axes[0] != lhs_k - 2:
    return None
  if rhs.axes[0] != rhs_k - 2 and mode != 'fp8_128':  # whose tiles are square
    return None
  layout = 'tn'[lhs_k] + 'nt'[rhs_k]
  module = kernel.load()
  specs = blocked(lhs.fmt), blocked(rhs.fmt)
  options: dict[str, Any] = {'layout': layout, 'mode': mode}
  device = _support.device_of(implementation)
  if device is not None:
    options['target'] = _support.target_of(device)
  if module.why_not(lhs.codes.shape, rhs.codes.shape, *specs, **options):
    return None

  def run(lhs, rhs):
    out = module.run(
      lhs.codes,
      lhs.scale,
      rhs.codes,
      rhs.scale,
      *specs,
      layout=layout,
      mode=mode,
    )
    out = out[: lhs.shape[1 - lhs_k], : rhs.shape[1 - rhs_k]]  # tiles pad both
    scales = [q.tensor_scale for q in (lhs, rhs)]
    scales = [None if s is None else s.reshape(()) for s in scales]
    return _dot_xla.times(out, *scales)

  return Plan(f"block-scaled product, layout '{layout}', mode '{mode}'", run)


def _mode(lhs: QArray, rhs: QArray) -> str | None:
  """How `block_matmul` computes a product, None where it would round it."""
  formats = lhs.fmt, rhs.fmt
  if any(f.zero_point or f.minimum or f.scale_blocks for f in formats):
    return None
  stacks = [q.tensor_scale for q in (lhs, rhs) if q.tensor_scale is not None]
  if any(scale.size != 1 for scale in stacks):
    return None
  if all(isinstance(f.element, IntFormat) for f in formats):
    if all(f.scale is None or not f.block[0] for f in formats):
      return 'integer'
  if all(f.scale is not None and f.scale.bits > 8 for f in formats):
    right = not lhs.fmt.is_tile and rhs.fmt.block == (128, 128)
    return 'fp8_128' if right else None
  if any(f.is_tile for f in formats):
    return None
  exact = all(_dot_xla.exact_dtype(f) == jnp.bfloat16 for f in formats)
  return 'exact' if exact else None
