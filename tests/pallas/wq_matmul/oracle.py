"""Weights, and products with them in float64 under the same contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowbit_jax import formats
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas.arith.block import Blocked
from lowbit_pallas.wq_matmul import prepack

U = 2.0**-24

# An eager call would compile every operation on its own.
_prepack = jax.jit(
  prepack.prepack, static_argnames=('spec', 'tile', 'k', 'layout')
)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
  """A weight in standard storage with its format."""

  fmt: formats.BlockFormat
  k: int
  codes: np.ndarray
  scale: np.ndarray | None
  zero_point: np.ndarray | None

  @property
  def spec(self) -> Blocked:
    return blocked(self.fmt)

  @property
  def n(self) -> int:
    return self.codes.shape[1]

  def prepack(self, tile: int, layout: str = 'kn') -> prepack.Prepacked:
    leaves = (self.codes, self.scale, self.zero_point)
    leaves = [None if v is None else jnp.asarray(v) for v in leaves]
    return _prepack(*leaves, self.spec, tile=tile, k=self.k, layout=layout)


@functools.cache
def quantized(name: str, k: int, n: int) -> Weight:
  """A quantized N(0, 1) weight without a tensor scale.

  In NumPy, which compiles nothing: scales that let the largest number of a
  block be about the largest element, and the nearest element to each number.
  """
  fmt = formats.get(name)
  w = np.random.default_rng([k, n]).normal(size=(k, n))
  size = fmt.block[0] or k
  w = np.pad(w, ((0, -k % size), (0, 0))).reshape(-1, size, n)
  values = fmt.element.values().astype(float)
  zero = None
  if fmt.zero_point:
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = (high - low) / values.max()
    zero = np.rint(-low / scale).astype(np.uint8)
    values = values[:, None, None, None] - zero[:, None]
  else:
    top = np.nanmax(np.where(np.isfinite(values), values, np.nan))
    scale, values = np.abs(w).max(1) / top, values[:, None, None, None]
  if fmt.scale.bits > 8:
    stored = scale = scale.astype(np.float32)
  else:
    table = fmt.scale.values().astype(float)
    stored = _nearest(scale, table[:, None, None])
    scale = table[stored]
  codes = _nearest(w / scale[:, None], values).reshape(-1, n)
  bits = fmt.element.bits
  stream = codes[:, None] >> np.arange(bits, dtype=np.uint8)[:, None] & 1
  packed = np.packbits(stream.reshape(-1, n), axis=0, bitorder='little')
  return Weight(fmt, k, packed, stored, zero)


def _nearest(x, values) -> np.ndarray:
  """uint8 indices along the first axis of `values` of the nearest to x."""
  best, found = np.full(x.shape, np.inf), np.zeros(x.shape, np.uint8)
  for i, value in enumerate(values):
    error = np.abs(x - value)
    closer = error < best  # False for NaN.
    best, found = np.where(closer, error, best), np.where(closer, i, found)
  return found.astype(np.uint8)


def random_codes(name: str, k: int, n: int, scale, seed: int = 0) -> Weight:
  """A weight of random codes, every bit pattern, with given scales."""
  fmt = formats.get(name)
  rng = np.random.default_rng([seed, k, n])
  codes = rng.integers(0, 256, (k * fmt.element.bits // 8, n), np.uint8)
  return Weight(fmt, k, codes, scale, None)


def codes(packed, bits: int) -> np.ndarray:
  """Codes (rows, n) of bytes that are packed along the first axis."""
  stream = np.unpackbits(packed, axis=0, bitorder='little')
  stream = stream.reshape(-1, bits, packed.shape[1]).astype(int)
  return (stream << np.arange(bits)[:, None]).sum(1)


def elements(w: Weight) -> np.ndarray:
  """Float64 (rows, n): values of the codes minus zero points."""
  values = w.fmt.element.values().astype(float)
  values = values[codes(w.codes, w.fmt.element.bits)]
  if w.zero_point is not None:
    values = values - _rows(w.zero_point.astype(float), len(values))
  return values


def scales(w: Weight) -> np.ndarray:
  """Float64 (blocks, n): the scales as numbers."""
  if w.scale is None:
    return np.ones((1, w.n))
  if w.scale.dtype == np.uint8:
    return w.fmt.scale.values().astype(float)[w.scale]
  return w.scale.astype(float)


def product(x, w: Weight, schedule: str):
  """Float64 y and S, the sum of |x| |w|.

  Weights are rounded as the contract says: in 'pre' the scaled ones to float32,
  and for bfloat16 x to bfloat16 whatever the schedule.
  """
  rounded = np.asarray(x).dtype == ml_dtypes.bfloat16
  x = np.asarray(x).astype(float)
  values, scale = elements(w), scales(w)
  whole = w.fmt.scale is None or not w.fmt.block[0]
  with np.errstate(all='ignore'):
    outer = scale
    if schedule == 'pre' and not whole:
      values = (values * _rows(scale, len(values))).astype(np.float32)
      outer = np.ones((1, w.n))
    if rounded:
      values = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    values = values.astype(float) * _rows(outer, len(values))
    values = values[: w.k]
    return x @ values, np.abs(x) @ np.abs(values)


def check(got, x, w: Weight, schedule: str, *, chain: int | None = None):
  """Raises AssertionError unless a float32 result is within both bounds.

  |y - y*| <= (2h + 2) u S, h the longest chain of additions: K where the order
  of sums is unknown. And rms(y - y*) <= 4 u rms(S) for N(0, 1) data.
  """
  want, size = product(x, w, schedule)
  got = np.asarray(got, float)
  assert got.shape == want.shape, (got.shape, want.shape)
  h = w.k if chain is None else chain
  error = np.abs(got - want)
  worst = (error / np.maximum(size, 1e-300)).max() / U
  assert (error <= (2 * h + 2) * U * size).all(), f'{worst} u of S, {h=}'
  rms = np.sqrt((error**2).mean() / (size**2).mean()) / U
  assert rms <= 4, f'rms error {rms} u'


def check_extreme_scales(run, schedule: str):
  """Scale codes 0 (2^-127), 254 (2^127) and 255 (NaN), one column each; codes
  whose product with the scale is a normal number."""
  codes = np.tile(np.array([[0x44], [0x6C]], np.uint8), (8, 4))  # +-2, 4
  codes[:, 1] = 0x2A  # +-1
  scale = np.array([[0, 254, 255, 127]], np.uint8)
  w = Weight(formats.get('mxfp4'), 32, codes, scale, None)
  x = normal(3, 32, jnp.bfloat16)
  x = np.array(x, np.float32)
  x[:, 1::2] = x[:, ::2] * 2.0**-8  # no overflow in column 1
  for column, factor in ((0, 2.0**40), (1, 2.0**-4), (3, 1)):
    y = (x * np.float32(factor)).astype(jnp.bfloat16)
    got = np.asarray(run(y, w), float)
    want, size = product(y, w, schedule)
    assert np.isnan(got[:, 2]).all()
    error = np.abs(got[:, column] - want[:, column])
    assert (error <= 70 * U * size[:, column]).all(), column


def normal(m: int, k: int, dtype, seed: int = 1):
  x = np.random.default_rng([seed, m, k]).normal(size=(m, k))
  return x.astype(np.float32).astype(dtype)


def _rows(per_block, rows: int):
  return np.repeat(per_block, rows // len(per_block), axis=0)
