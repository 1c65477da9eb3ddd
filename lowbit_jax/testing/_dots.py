"""The suite of a product with a quantized weight."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import numerics, ops, qarray
from lowbit_jax._quantize import check_format
from lowbit_jax._typing import ArrayLike
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray
from lowbit_jax.testing._shapes import MatmulShape, dot_cases

_quantize = jax.jit(ops.quantize, static_argnames=('fmt', 'axis', 'scale_rule'))
UNIT = 2.0**-24  # unit roundoff of float32


def check_dot(
  dot_fn: Callable,
  fmt: BlockFormat,
  *,
  lhs_fmt: BlockFormat | None = None,
  shapes: Iterable[MatmulShape] | None = None,
  operand_unit: float = 0.0,
) -> None:
  """Asserts that a product agrees with float64 up to float32 accumulation.

  Each shape is run on bell-shaped data whose columns differ in size, with one
  zero block; one shape also on zero activations, on small and large data, and
  with a poisoned block, whose column alone may be NaN.

  The tolerance. Let a_i be the activations and b_i = element * scale *
  tensor_scale the weights as real numbers, u = 2^-24. Computing b_i costs two
  roundings, the product one, the scale of a partial sum one, the tensor scale
  of the result one: each changes a term by a factor 1 + d, |d| <= u. A sum of k
  terms in any order passes each term through at most k - 1 additions. To first
  order in u the error is at most (k + 4) u sum |a_i b_i|. For large k that
  bound is never attained: rounding errors of additions are close to independent
  with mean zero, and with probability above 1 - 2 k exp(-32) their sum stays
  below 8 sqrt(k) u (Higham and Mary, 2019). So

    |computed - exact| <= (min(k, 8 sqrt(k)) + 6) u sum |a_i b_i|
                          + 2 operand_unit sum |a_i b_i| + eps |exact|

  where operand_unit is the roundoff of operands that a unit rounds first (2^-8
  for bfloat16, 2^-11 for TF32; 0 for exact products) and eps that of a result
  dtype shorter than float32.

  Args:
    dot_fn: `(x, q) -> (m, n)`, with `x` of `(m, k)` in float32, or a QArray if
      `lhs_fmt` is given, and `q` a QArray of `(k, n)` in blocks along k.
    fmt: format of the weight.
    lhs_fmt: format of the activation, in blocks along k.
    shapes: shapes to run; None for `dot_cases()`.
    operand_unit: see above.

  Raises:
    AssertionError: at the first shape that differs, with the coordinate, the
      error and the tolerance.

  Reference: Higham and Mary, A new approach to probabilistic rounding error
  analysis, SIAM J. Sci. Comput. 41(5), 2019.

  Examples:
    >>> import lowbit_jax as lowbit
    >>> check_dot(lowbit.dot, lowbit.formats.nvfp4, shapes=dot_cases()[:1])
  """
  fmt = check_format(fmt)
  lhs_fmt = None if lhs_fmt is None else check_format(lhs_fmt)
  shapes = tuple(dot_cases() if shapes is None else shapes)
  for shape in shapes:
    for name, x, w in _data(shape, fmt, special=shape is shapes[0]):
      axis = (-2, -1) if fmt.is_tile else -2
      q = _quantized(w, fmt, axis)
      lhs = jnp.asarray(x)
      if lhs_fmt is not None:
        lhs = _quantized(x, lhs_fmt, None)
      label = f'{fmt} {shape.name} {name} ({shape.m}x{shape.k}x{shape.n})'
      _compare(dot_fn(lhs, q), lhs, q, operand_unit, label)


def dot_tolerance(
  lhs: ArrayLike, rhs: ArrayLike, *, operand_unit: float = 0.0
) -> np.ndarray:
  """The tolerance of `check_dot` for a float32 result.

  Args:
    lhs: `(m, k)` array of real numbers.
    rhs: `(k, n)` array of real numbers.
    operand_unit: roundoff of the operands.

  Returns:
    float64 of shape `(m, n)`.
  """
  for name, x in (('lhs', lhs), ('rhs', rhs)):
    if np.iscomplexobj(x):
      raise TypeError(f'{name} must hold real numbers, not complex')
  a, b = (
    np.abs(np.asarray(lhs, np.float64)),
    np.abs(np.asarray(rhs, np.float64)),
  )
  if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
    raise ValueError(
      f'lhs.shape={a.shape} and rhs.shape={b.shape} must be (m, k) and (k, n)'
    )
  k = a.shape[-1]
  units = (min(k, 8 * math.sqrt(k)) + 6) * UNIT + 2 * operand_unit
  return units * (a @ b)


def exact_values(q: ArrayLike | QArray) -> np.ndarray:
  """element * scale * tensor_scale in float64, unrounded."""
  if not isinstance(q, QArray):
    return np.asarray(q, np.float64)
  if q.merged:
    return exact_values(qarray.flat(q)).reshape(q.shape)
  fmt = q.fmt
  codes = np.asarray(numerics.unpack(q.codes, fmt.element.bits, q.axes[0]))
  view, inner = qarray.split_blocks(codes.shape, fmt, q.axes)
  y = fmt.element.values()[codes].reshape(view)
  if q.zero_point is not None:
    y = y - np.expand_dims(np.asarray(q.zero_point, np.float64), inner)
  if q.scale is not None:
    assert fmt.scale is not None
    scale = _numbers(q.scale)
    if _scaling.is_coded(fmt.scale):
      scale = fmt.scale.values()[scale]
    y = y * np.expand_dims(scale.astype(np.float64), inner)
  if q.tensor_scale is not None:
    y = y * np.expand_dims(np.asarray(q.tensor_scale, np.float64), inner)
  if q.minimum is not None:
    y = y + np.expand_dims(_numbers(q.minimum).astype(np.float64), inner)
  at = tuple(slice(0, n) for n in q.shape)
  return y.reshape(codes.shape)[at]


def _numbers(leaf) -> np.ndarray:
  """Scales as they are stored; two levels as numbers."""
  return exact_values(leaf) if isinstance(leaf, QArray) else np.asarray(leaf)


def _quantized(x, fmt: BlockFormat, axis) -> QArray:
  # The rule is named: formats that differ in it alone are equal to jit.
  return _quantize(jnp.asarray(x), fmt, axis=axis, scale_rule=fmt.scale_rule)


def _compare(got, lhs, rhs, operand_unit: float, label: str) -> None:
  a, b = exact_values(lhs), exact_values(rhs)
  want = a @ b
  tolerance = dot_tolerance(a, b, operand_unit=operand_unit)
  got = np.asarray(got)
  if got.shape != want.shape:
    raise AssertionError(f'{label}: shape is {got.shape}, want {want.shape}')
  if got.dtype.itemsize < 4:
    tolerance = tolerance + float(jnp.finfo(got.dtype).eps) * np.abs(want)
  got = got.astype(np.float64)
  nan, finite = np.isnan(want), np.isfinite(want)
  good = np.where(finite, np.abs(got - want) <= tolerance, nan & np.isnan(got))
  if good.all():
    return
  at = tuple(int(i) for i in np.argwhere(~good)[0])
  raise AssertionError(
    f'{label}: {int((~good).sum())} of {good.size} are wrong, first at {at}:'
    f' {got[at]!r}, want {want[at]!r} within {tolerance[at]:.3g}'
  )


def _data(shape: MatmulShape, fmt: BlockFormat, special: bool):
  """(name, activations, weight) to run."""
  random = np.random.RandomState(shape.m + 7 * shape.k + 31 * shape.n)
  x = random.standard_normal((shape.m, shape.k)).astype(np.float32)
  w = random.standard_normal((shape.k, shape.n)).astype(np.float32)
  sizes = np.ldexp(np.float32(1), random.randint(-6, 7, shape.n))
  w = w * sizes.astype(np.float32)
  block = fmt.block[0] or shape.k
  if shape.n and shape.k > block and fmt.scale is not None:
    w[:block, 0] = 0
  yield 'random', x, w
  if not special:
    return
  yield 'zero activations', np.zeros_like(x), w
  yield 'small', x, w * np.float32(2.0**-40)
  yield 'large', x, w * np.float32(2.0**40)
  w = w.copy()
  w[0, -1] = np.nan
  yield 'poisoned', x, w
