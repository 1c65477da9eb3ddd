"""Contractions by kernels for CPUs, on any number of matrices of a stack.

A product is a primitive. On CPU it is lowered to a kernel; on other platforms,
where a partitioner splits its operands, and in programs that are exported,
since other processes do not know the kernel, to the scan over tiles of
`_dot_xla`. There are three:

  integers  Of both operands, whose scales are constant along the contraction:
            exact int32 sums, with the bits of `_dot_xla`.
  blocks    Of integers in blocks with integers in blocks: exact within a unit,
            a part of a block of both.
  floats    Everything else: weights are decoded next to the product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lowbit_jax import cpu
from lowbit_jax._member import Member
from lowbit_jax._typing import DotDims, Precision
from lowbit_jax.ops import (
  _dot_cpu_floats as floats,
  _dot_cpu_integers as integers,
  _dot_cpu_matrices as matrices,
  _dot_xla,
)
from lowbit_jax.ops._dispatch import Plan
from lowbit_jax.ops._operand import Shaped
from lowbit_jax.qarray import QArray


def plan(
  lhs: Shaped, rhs: Shaped, dimension_numbers: DotDims, precision: Precision
) -> Plan:
  """Plans a product on CPU with a float32 result."""
  dims = dimension_numbers
  weight = rhs
  if isinstance(rhs, Member):
    weight = jax.eval_shape(Member.unpack, rhs)
  is_exact = _dot_xla.why_not_integer(lhs, weight, dims) is None
  why = cpu.why_not() or _why_not(lhs, weight, dims, is_exact)
  if why is not None:
    raise NotImplementedError(why)

  if is_exact:
    note, run = 'int32 product of the codes, scales on the result', _Exact(dims)
  elif (why_floats := integers.why_not(lhs, weight, dims)) is None:
    note = 'multiplies integers, exactly within blocks'
    run = _Blocks(dims, precision)
  else:
    note, run = 'decodes weights next to the product', _Floats(dims, precision)
    if isinstance(lhs, QArray):
      note = f'{note}, lhs as float32 ({why_floats})'
  return Plan(f'{note}, on the threads of XLA', run, is_portable=True)


def _why_not(
  lhs: Shaped, rhs: Shaped, dims: DotDims, is_exact: bool
) -> str | None:
  """Why there is no kernel for these operands, or None."""
  from lowbit_jax.cpu import _matmul

  if not isinstance(rhs, QArray):
    return _dot_xla.why_not_tiles(lhs, rhs, dims)
  if not all(isinstance(n, int) for n in (*lhs.shape, *rhs.shape)):
    return 'shapes are symbolic'
  if is_exact:
    if not _dot_xla.is_few(_dot_xla.rows(lhs, dims)) or dims[1][0]:
      return 'XLA multiplies the integers of many rows'
    if (why := integers.why_not(lhs, rhs, dims, is_exact=True)) is not None:
      return f'XLA multiplies the integers of both operands: {why}'
  if rhs.fmt.is_tile and rhs.pad[1]:
    return 'tiles are padded along an axis that is not contracted'
  along_k = jax.eval_shape(matrices.along_k, rhs)
  if (why := _dot_xla.why_not_tiles(lhs, along_k, dims)) is not None:
    return why
  return _matmul.why_not(*matrices.sizes(lhs, along_k, dims))


class _Exact:
  def __init__(self, dims):
    self.dims = dims

  def __call__(self, lhs, rhs):
    multiply, rhs = _where_it_lies(integers.exact_product, rhs, self.dims)
    return _dot_xla.Integer(self.dims, multiply)(lhs, rhs)


class _Blocks:
  def __init__(self, dims, precision):
    self.dims, self.precision = dims, precision

  def __call__(self, lhs, rhs):
    lhs, scale = _dot_xla.without_tensor_scale(lhs)
    multiply = functools.partial(
      integers.product, block=lhs.fmt.block[0], precision=self.precision
    )
    multiply, rhs = _where_it_lies(multiply, rhs, self.dims)
    run = _dot_xla.Tiles(self.dims, multiply, integers.codes_and_scales)
    return _dot_xla.times(run(lhs, matrices.along_k(rhs)), scale)


class _Floats:
  def __init__(self, dims, precision):
    self.dims, self.precision = dims, precision

  def __call__(self, lhs, rhs):
    multiply = functools.partial(floats.product, precision=self.precision)
    multiply, rhs = _where_it_lies(multiply, rhs, self.dims)
    return _dot_xla.Tiles(self.dims, multiply)(lhs, matrices.along_k(rhs))


def _where_it_lies(
  multiply: Callable, rhs: Any, dims: DotDims
) -> tuple[Callable, QArray]:
  """A product that reads a member in its stack, and the member by itself."""
  if not isinstance(rhs, Member):
    return multiply, rhs
  if matrices.is_in_place(rhs, dims):
    multiply = functools.partial(multiply, member=rhs)
  return multiply, rhs.unpack()
