"""Comparisons that say where, and in which bits, two arrays differ."""

import numbers

import chex
import jax
import numpy as np

from lowbit_jax import numerics
from lowbit_jax._typing import ArrayLike, PyTree
from lowbit_jax.qarray import LEAVES, QArray, is_qarray


def assert_bits_equal(
  actual: ArrayLike | QArray,
  expected: ArrayLike | QArray,
  message: str = '',
  *,
  any_nan: bool = False,
) -> None:
  """Asserts that two arrays, or two QArrays, are the same bits.

  Other than with `==`, -0 differs from +0 and NaN equals NaN.

  Args:
    actual: an array of any dtype, or a QArray.
    expected: what it should be; shape and dtype count.
    message: put before the report.
    any_nan: whether NaNs with different payloads count as equal.

  Raises:
    AssertionError: with the number of mismatches, and the coordinate, bit
      patterns and values of the first one.

  Examples:
    >>> import numpy as np
    >>> assert_bits_equal(np.float16([1, 0]), np.float16([1, -0.0]))
    Traceback (most recent call last):
    AssertionError: 1 of 2 differ, first at (1,): 0x0000 (0.0), ...
  """
  prefix = f'{message}: ' if message else ''
  if is_qarray(actual) or is_qarray(expected):
    _assert_qarrays(actual, expected, prefix, any_nan)
    return
  actual, expected = _check_pair(actual, expected, prefix)
  a, b = _bits(actual), _bits(expected)
  different = a != b
  if any_nan:
    nans = np.logical_and(*(np.not_equal(v, v) for v in (actual, expected)))
    different &= ~nans
  if not different.any():
    return
  at, count = _first(different)
  raise AssertionError(
    f'{prefix}{count} of {different.size} differ, first at {at}:'
    f' {_show(actual, a, at)}, want {_show(expected, b, at)}'
  )


def assert_trees_bits_equal(
  actual: PyTree, expected: PyTree, message: str = '', *, any_nan: bool = False
) -> None:
  """Asserts that two trees have one structure and leaves of the same bits.

  Args:
    actual: a tree of arrays and QArrays.
    expected: what it should be.
    message: put before the report.
    any_nan: whether NaNs with different payloads count as equal.

  Raises:
    AssertionError: with what differs in the structures, or the path of the
      first leaf that differs and the report of `assert_bits_equal`.

  Examples:
    >>> import numpy as np
    >>> assert_trees_bits_equal({'w': np.ones(2)}, {'w': np.zeros(2)})
    Traceback (most recent call last):
    AssertionError: ['w']: 2 of 2 differ, first at (0,): ...
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(
    actual, is_leaf=is_qarray
  )
  leaves, other = jax.tree.flatten(expected, is_leaf=is_qarray)
  if structure != other:
    chex.assert_trees_all_equal_structs(actual, expected)
  for (path, leaf), want in zip(flat, leaves, strict=True):
    where = f'{message}{jax.tree_util.keystr(path)}'
    assert_bits_equal(leaf, want, where, any_nan=any_nan)


def assert_within_ulp(
  actual: ArrayLike, expected: ArrayLike, ulp: float, message: str = ''
) -> None:
  """Asserts that at most `ulp - 1` floats lie between the two arrays.

  Args:
    actual: float16, bfloat16 or float32.
    expected: an array of the same shape and dtype.
    ulp: the allowed distance; +0 and -0 have distance 0, NaN and NaN too.
    message: put before the report.

  Raises:
    AssertionError: with the number of mismatches, the first and the worst.
  """
  prefix = f'{message}: ' if message else ''
  if not isinstance(ulp, numbers.Real):
    raise TypeError(f'{ulp=} must be a number')
  actual, expected = _check_pair(actual, expected, prefix)
  distance = numerics.ulp_distance(actual, expected)
  far = ~(distance <= ulp)
  if not far.any():
    return
  at, count = _first(far)
  worst = np.unravel_index(int(np.argmax(distance)), distance.shape)
  worst = tuple(int(i) for i in worst)
  a, b = _bits(actual), _bits(expected)

  def describe(i):
    return (
      f'{i}: {_show(actual, a, i)}, want {_show(expected, b, i)},'
      f' {distance[i]:g} ulp'
    )

  raise AssertionError(
    f'{prefix}{count} of {far.size} are off by more than {ulp:g} ulp, first at'
    f' {describe(at)}; worst at {describe(worst)}'
  )


def _assert_qarrays(actual, expected, prefix: str, any_nan: bool) -> None:
  for name, q in (('actual', actual), ('expected', expected)):
    if not isinstance(q, QArray):
      raise AssertionError(
        f'{prefix}{name} is a {type(q).__name__}, the other one a QArray'
      )
  for name in ('fmt', 'axis', 'pad', 'dtype', 'merged'):
    a, b = getattr(actual, name), getattr(expected, name)
    if a != b:
      raise AssertionError(f'{prefix}{name} is {a}, want {b}')
  for name in LEAVES:
    a, b = getattr(actual, name), getattr(expected, name)
    if (a is None) != (b is None):
      raise AssertionError(f'{prefix}{name} is {a!r}, want {b!r}')
    if a is not None:
      assert_bits_equal(a, b, f'{prefix}{name}', any_nan=any_nan)


def _check_pair(actual, expected, prefix: str):
  actual, expected = np.asarray(actual), np.asarray(expected)
  for name in ('shape', 'dtype'):
    a, b = getattr(actual, name), getattr(expected, name)
    if a != b:
      raise AssertionError(f'{prefix}{name} is {a}, want {b}')
  return actual, expected


def _bits(x: np.ndarray) -> np.ndarray:
  if x.dtype == np.bool_:
    return x.view(np.uint8)
  if x.dtype.itemsize > 8:
    raise TypeError(f'{x.dtype} has no bit pattern of at most 64 bits')
  unsigned = np.dtype(f'uint{8 * x.dtype.itemsize}')
  return np.ascontiguousarray(x).view(unsigned).reshape(x.shape)


def _first(mask: np.ndarray) -> tuple[tuple[int, ...], int]:
  """(coordinate of the first True, number of Trues)."""
  at = np.unravel_index(int(np.argmax(mask)), mask.shape)
  return tuple(int(i) for i in at), int(mask.sum())


def _show(x: np.ndarray, bits: np.ndarray, at) -> str:
  value = x[at]
  width = 2 * bits.dtype.itemsize
  text = repr(float(value)) if value.dtype.kind in 'fV' else str(value)
  return f'0x{int(bits[at]):0{width}x} ({text})'
