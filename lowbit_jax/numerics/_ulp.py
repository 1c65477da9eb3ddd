"""Distances between floating-point numbers in units of the last place."""

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax._typing import ArrayLike

_WORDS = {2: (np.uint16, np.int32), 4: (np.uint32, np.int64)}


def _ordered(x: np.ndarray) -> np.ndarray:
  """Integers in the order of the numbers; neighbours differ by one."""
  unsigned, wide = _WORDS[x.dtype.itemsize]
  bits = x.view(unsigned).astype(wide)
  half = 1 << (8 * x.dtype.itemsize - 1)
  return np.where(bits >= half, half - bits, bits)


def _check_shapes(**arrays: np.ndarray) -> None:
  try:
    np.broadcast_shapes(*(x.shape for x in arrays.values()))
  except ValueError:
    shapes = ' and '.join(f'{n}.shape={x.shape}' for n, x in arrays.items())
    raise ValueError(f'{shapes} do not broadcast') from None


def ulp_distance(a: ArrayLike, b: ArrayLike) -> np.ndarray:
  """How many representable numbers lie between `a` and `b`.

  Args:
    a: float16, bfloat16 or float32 array.
    b: array of the same dtype and a broadcastable shape.

  Returns:
    float64: 0 for equal numbers (+0 and -0 are equal, NaN equals NaN), Inf
    where just one of the two is NaN.
  """
  a, b = np.asarray(a), np.asarray(b)
  if a.dtype != b.dtype or a.dtype.itemsize not in _WORDS:
    raise TypeError(
      f'ulp_distance takes two arrays of one 2- or 4-byte float dtype, got'
      f' {a.dtype} and {b.dtype}'
    )
  _check_shapes(a=a, b=b)
  a, b = np.broadcast_arrays(a, b)
  distance = np.abs(
    _ordered(np.ascontiguousarray(a)) - _ordered(np.ascontiguousarray(b))
  ).astype(np.float64)
  nan_a, nan_b = np.isnan(a), np.isnan(b)
  distance = np.where(nan_a & nan_b, 0.0, distance)
  return np.where(nan_a ^ nan_b, np.inf, distance)


def next_float(x: ArrayLike, toward: ArrayLike) -> np.ndarray:
  """The neighbour of `x` in the direction of `toward`, in the dtype of `x`."""
  x = np.asarray(x)
  if x.dtype.itemsize not in _WORDS or x.dtype.kind not in 'fV':
    raise TypeError(f'x.dtype={x.dtype} must be a 2- or 4-byte float dtype')
  if np.iscomplexobj(toward):
    raise TypeError(f'{toward=} must be real')
  toward = np.asarray(toward, x.dtype)
  _check_shapes(x=x, toward=toward)
  return np.nextafter(x, toward)


def all_float32(start: int, stop: int) -> jax.Array:
  """The float32 numbers with bit patterns start, start + 1, ..., stop - 1."""
  if not 0 <= start <= stop <= 1 << 32:
    raise ValueError(f'need 0 <= start <= stop <= 2**32, got {start=} {stop=}')
  bits = np.arange(start, stop, dtype=np.uint64).astype(np.uint32)
  return jnp.asarray(bits.view(np.float32))
