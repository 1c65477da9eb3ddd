"""A tensor under advice, and other ways to quantize it."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import formats, ops, qarray, transforms
from lowbit_jax._quantize import check_array
from lowbit_jax._typing import Axis, ScaleRule
from lowbit_jax.doctor import _measure
from lowbit_jax.doctor._measure import Measures
from lowbit_jax.formats import BlockFormat, IntFormat

FLOAT_TWINS = {
  'mxint8': formats.mxfp8_e4m3,
  'mxint4': formats.mxfp4,
  'nvint4': formats.nvfp4,
}
STATIC = ('fmt', 'axis', 'scale_rule')
quantize = jax.jit(ops.quantize, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnames=STATIC)
def _round_trip(x, fmt, axis, scale_rule):
  q = ops.quantize(x, fmt, axis=axis, scale_rule=scale_rule)
  return ops.dequantize(q, jnp.float32)


def _apply(transform, x):
  return transform.apply(x)


class Case(NamedTuple):
  """A tensor that a rule looks at.

  Attributes:
    path: its name.
    fmt: its format.
    scale_rule: the rule of its scales; None where it came quantized.
    axis: its block axis.
    m: its measures.
    x: the original, or None.
  """

  path: str
  fmt: BlockFormat
  scale_rule: ScaleRule | None
  axis: Any
  m: Measures
  x: Any

  def gain(
    self,
    fmt: BlockFormat | None = None,
    axis: Axis = None,
    scale_rule: ScaleRule | None = None,
    transform: Any = None,
  ) -> float:
    """QSNR in dB that another choice has more than this one."""
    if self.x is None:
      return -math.inf
    x = self.x if transform is None else jax.jit(_apply)(transform, self.x)
    fmt = self.fmt if fmt is None else fmt
    axis = self.axis if axis is None else axis
    if scale_rule is None:
      # Explicit: formats that differ in their rule alone are equal to jit.
      scale_rule = (fmt == self.fmt and self.scale_rule) or fmt.scale_rule
    y = _round_trip(x, fmt, axis=axis, scale_rule=scale_rule)
    return _measure.qsnr_db(x, y) - self.m.qsnr_db


def rotation(case: Case) -> transforms.Hadamard | None:
  """A Hadamard rotation over one block, where the axis allows it."""
  if case.x is None or not isinstance(case.axis, int):
    return None
  axis = case.axis
  n = case.x.shape[axis]
  block = min(n & -n, block_size(case), 128)
  block = 1 << (block.bit_length() - 1)
  return transforms.Hadamard(block, axis) if block >= 16 else None


def finer(fmt: BlockFormat) -> list[BlockFormat]:
  """Formats of the same element width with smaller blocks."""
  if fmt.zero_point or fmt.minimum:
    return []
  out = []
  if fmt.element.bits == 4 and fmt.block != (16,):
    out.append(formats.nvfp4)
  if fmt.is_tile:
    return out
  wide = fmt.block[0] > 32 or fmt.block == (0,) or fmt.scale is None
  if wide and isinstance(fmt.element, IntFormat):
    out.append(formats.grouped(fmt.element, 32))
  return out


def block_size(case: Case) -> int:
  """Elements that share a scale."""
  fmt = case.fmt
  if fmt.scale is None:
    return max(case.x.size, 1) if case.x is not None else 1
  size = math.prod(fmt.block)
  axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
  return size or math.prod(case.x.shape[a] for a in axes)


def padding_of(case: Case, axis: int) -> float:
  """Padding over elements, with blocks along `axis`."""
  x = check_array(case.x, case.fmt)
  pads = qarray.padding(x.shape, case.fmt, (axis,))
  return pads[0] / x.shape[axis]
