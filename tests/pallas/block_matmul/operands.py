"""Random blocked operands, float64 oracles and tolerances for block_matmul.

Nothing here uses the arithmetic of the library: elements come from ml_dtypes,
packing from NumPy's bits.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from lowbit_pallas.arith import codec
from lowbit_pallas.arith.block import Blocked

U = 2.0**-24

E4M3 = codec.Float(4, 3, -6, 126, None, 127, True, True, True)
E5M2 = codec.Float(5, 2, -14, 123, 124, 126, True, True, True)
E2M3 = codec.Float(2, 3, 0, 31, None, None, True, True, True)
E3M2 = codec.Float(3, 2, -2, 31, None, None, True, True, True)
E2M1 = codec.Float(2, 1, 0, 7, None, None, True, True, True)
E8M0 = codec.Float(8, 0, -127, 254, None, 255, False, False, False)
UE4M3 = E4M3

# Format: static description, and the ml_dtypes name of floating elements.
FORMATS = {
  'mxfp8_e4m3': (Blocked(E4M3, 8, 32, E8M0), 'float8_e4m3fn'),
  'mxfp8_e5m2': (Blocked(E5M2, 8, 32, E8M0), 'float8_e5m2'),
  'mxfp6_e2m3': (Blocked(E2M3, 6, 32, E8M0), 'float6_e2m3fn'),
  'mxfp6_e3m2': (Blocked(E3M2, 6, 32, E8M0), 'float6_e3m2fn'),
  'mxfp4': (Blocked(E2M1, 4, 32, E8M0), 'float4_e2m1fn'),
  'nvfp4': (Blocked(E2M1, 4, 16, UE4M3), 'float4_e2m1fn'),
  'mxint8': (Blocked(codec.Int(8, True, 6), 8, 32, E8M0), None),
  'fp8_128': (Blocked(E4M3, 8, 128, None), 'float8_e4m3fn'),
  'fp8_128_e5m2': (Blocked(E5M2, 8, 128, None), 'float8_e5m2'),
  'int8': (Blocked(codec.Int(8, True, 0), 8, 0, None), None),
  'int4': (Blocked(codec.Int(4, True, 0), 4, 0, None), None),
}


class Operand(NamedTuple):
  """Rows of K elements: codes (rows, K), stored scales, float64 scales."""

  name: str
  codes: np.ndarray
  stored: np.ndarray
  scale: np.ndarray

  @property
  def spec(self) -> Blocked:
    return FORMATS[self.name][0]

  @property
  def elements(self) -> np.ndarray:
    return decode(self.codes, self.name)

  @property
  def values(self) -> np.ndarray:
    """float64 element * scale, rounded to bfloat16 where it is not exact."""
    x = self.elements * spread(self.scale, self.codes.shape)
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)

  def arguments(self, k_axis: int) -> tuple:
    """(packed codes, stored scales) with K on `k_axis`."""
    packed = pack(self.codes, self.spec.bits)
    if k_axis == 0:
      return packed.T.copy(), self.stored.T.copy()
    return packed, self.stored


def decode(codes, name: str) -> np.ndarray:
  """float64 values of codes."""
  spec, dtype = FORMATS[name]
  if dtype is not None:
    return codes.view(getattr(ml_dtypes, dtype)).astype(np.float64)
  bits = spec.element.bits
  k = codes.astype(np.int64)
  k = np.where(k >= 1 << (bits - 1), k - (1 << bits), k)
  return k * 2.0**-spec.element.fraction_bits


def encode(x, name: str) -> np.ndarray:
  """Codes of float64 numbers within the range of the element."""
  spec, dtype = FORMATS[name]
  if dtype is not None:
    dtype = getattr(ml_dtypes, dtype)
    return np.asarray(x, np.float32).astype(dtype).view(np.uint8)
  k = np.rint(x * 2.0**spec.element.fraction_bits).astype(np.int64)
  return (k & ((1 << spec.bits) - 1)).astype(np.uint8)


def largest(name: str) -> float:
  """The largest element."""
  spec, dtype = FORMATS[name]
  if dtype is not None:
    return float(ml_dtypes.finfo(getattr(ml_dtypes, dtype)).max)
  top = (1 << (spec.element.bits - 1)) - 1
  return top * 2.0**-spec.element.fraction_bits


def pack(codes, bits: int) -> np.ndarray:
  """Packs the minor axis, least significant bit first."""
  stream = np.unpackbits(codes[..., None], axis=-1, bitorder='little')
  width = codes.shape[-1] * bits
  stream = stream[..., :bits].reshape(*codes.shape[:-1], width)
  return np.packbits(stream, axis=-1, bitorder='little')


def spread(scale, shape) -> np.ndarray:
  """Scales repeated over the elements of a (rows, K) operand."""
  for axis, size in enumerate(shape):
    repeat = -(-size // scale.shape[axis]) if scale.shape[axis] else 1
    if axis == 0 and repeat > 1:
      repeat = 128
    scale = np.repeat(scale, repeat, axis)
  return scale[: shape[0], : shape[1]]


def normal(name: str, rows: int, k: int, seed: int, *, tile: bool = False):
  """An operand that quantizes N(0, 1), rows of different size, a zero block.

  Args:
    name: a format.
    rows: M or N.
    k: K.
    seed: of the generator.
    tile: scales of 128 x 128 instead of 1 x 128.
  """
  spec = FORMATS[name][0]
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, k))
  block = spec.block or max(k, 1)
  x[:1, :block] = 0
  high = 128 if tile else 1
  shape = (-(-rows // high), k // block)
  amax = np.zeros(shape)
  for i in range(shape[0]):
    for j in range(shape[1]):
      part = x[i * high : (i + 1) * high, j * block : (j + 1) * block]
      amax[i, j] = np.abs(part).max()
  ratio = np.where(amax == 0, 1, amax) / largest(name)
  if spec.scale == E8M0:
    stored = np.ceil(np.log2(ratio)).astype(np.int64) + 127
    scale = 2.0 ** (stored - 127)
    stored = stored.astype(np.uint8)
  elif spec.scale == UE4M3:
    coded = (ratio * 64).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    stored, scale = coded.view(np.uint8), coded.astype(np.float64)
    x = x * 64
  else:
    stored = ratio.astype(np.float32)
    scale = stored.astype(np.float64)
  top = largest(name)
  codes = encode(np.clip(x / spread(scale, x.shape), -top, top), name)
  return Operand(name, codes, stored, scale)


def unit_scales(name: str, rows: int, k: int, seed: int) -> Operand:
  """Random elements in an operand whose scales are all one."""
  spec = FORMATS[name][0]
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 1 << spec.bits, (rows, k)).astype(np.uint8)
  codes[~np.isfinite(decode(codes, name))] = 0
  shape = (rows, k // spec.block)
  one = {E8M0: 127, UE4M3: 0x38}[spec.scale]
  return Operand(name, codes, np.full(shape, one, np.uint8), np.ones(shape))


def exact_product(a: Operand, b: Operand) -> tuple[np.ndarray, np.ndarray]:
  """The float64 product (M, N) of values and S = sum |a| |b|."""
  a, b = a.values, b.values
  return a @ b.T, np.abs(a) @ np.abs(b).T


def promoted_product(a: Operand, b: Operand) -> tuple[np.ndarray, np.ndarray]:
  """The same for 'fp8_128', where scales are not rounded into elements."""
  a = a.elements * spread(a.scale, a.codes.shape)
  b = b.elements * spread(b.scale, b.codes.shape)
  return a @ b.T, np.abs(a) @ np.abs(b).T


def violations(got, exact, s, additions: int) -> list[str]:
  """What is wrong with a product, empty if nothing.

  A chain of h float32 additions, each of which may truncate, and the two
  roundings of scales change each term by at most (2 h + 2) u. For N(0, 1) data
  errors are close to independent and their rms stays below 4 u of S: kernels.md
  8.4 measured 0.1 to 0.5 u.
  """
  error = np.abs(np.asarray(got, np.float64) - exact)
  out = []
  if not np.all(error <= (2 * additions + 2) * U * s):
    worst = np.nanmax(error / np.where(s > 0, s, 1)) / U
    out.append(f'error {worst} u S exceeds {2 * additions + 2} u S')
  rms, scale = (np.sqrt(np.mean(x**2)) for x in (error, s))
  if not rms <= 4 * U * scale:
    out.append(f'rms error {rms} exceeds 4 u rms S = {4 * U * scale}')
  return out
