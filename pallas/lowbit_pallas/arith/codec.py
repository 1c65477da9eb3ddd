"""Element codes: minifloats, integers and codebooks.

The minifloat encoder works on magnitudes. With e = max(exponent of |x|, emin)
the scaled magnitude t = |x| * 2^(M - e) lies in [0, 2^(M+1)), and rounding t to
an integer k is rounding x to the format, in the normal and in the subnormal
range alike. The code is

    code = ((e - emin) << M) + k,

because a normal number has exponent field e - emin + 1 and mantissa k - 2^M;
a carry k = 2^(M+1) moves into the next binade by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from lowbit_pallas.arith import bits as fb

RANDOM_BITS = 23  # of an element that is rounded stochastically, by default


class Float(NamedTuple):
  """Static description of a minifloat, all fields as in its decode formula."""

  exponent_bits: int
  mantissa_bits: int
  emin: int
  code_max: int
  inf_code: int | None
  nan_code: int | None
  signed: bool
  subnormals: bool
  negative_zero: bool


def minifloat(
  exponent_bits: int, mantissa_bits: int, special: str = 'none'
) -> Float:
  """A signed minifloat with subnormals and the bias of IEEE 754.

  Args:
    exponent_bits: width of the exponent.
    mantissa_bits: width of the mantissa.
    special: which codes are not finite, as in `lowbit_jax.formats`. 'none': no
      code. 'fn': the all-ones magnitude, a NaN. 'ieee': the top binade, Inf and
      NaN, without mantissa bits Inf alone.
  """
  top = (1 << (exponent_bits + mantissa_bits)) - 1  # the all-ones magnitude
  inf = top + 1 - (1 << mantissa_bits)
  half = (1 << mantissa_bits) >> 1  # a quiet NaN has the first mantissa bit
  code_max, inf_code, nan_code = {
    'none': (top, None, None),
    'fn': (top - 1, None, top),
    'ieee': (inf - 1, inf, inf + half if half else None),
  }[special]
  return Float(
    exponent_bits=exponent_bits,
    mantissa_bits=mantissa_bits,
    emin=2 - (1 << (exponent_bits - 1)),
    code_max=code_max,
    inf_code=inf_code,
    nan_code=nan_code,
    signed=True,
    subnormals=True,
    negative_zero=True,
  )


class Int(NamedTuple):
  """Static description of an integer element; values are code * 2**-f.

  Attributes:
    bits: width of a code.
    signed: whether codes are two's complement.
    fraction_bits: f.
    lowest: whether encoding produces -2^(bits - 1), which has no opposite.
  """

  bits: int
  signed: bool
  fraction_bits: int
  lowest: bool = False


class Codebook(NamedTuple):
  """Static ascending table of values."""

  table: tuple[float, ...]


Element = Float | Int | Codebook

# Rounding rules: (t, odd) -> integer-valued float32. `t` is a value on the
# integer lattice; `odd` is None where the parity of an integer is the parity
# of its code, else the parity offset of the code lattice.
Rule = Callable[..., jax.Array]


def nearest_even(t: jax.Array, odd: ArrayLike | None = None) -> jax.Array:
  """Nearest integer; ties to the even code."""
  if odd is None:
    return fb.round_half_even(t)
  low = fb.floor(t)
  frac = t - low
  is_odd = (low.astype(jnp.int32) + odd) & 1
  up = (frac > 0.5) | ((frac == 0.5) & (is_odd == 1))
  return low + up.astype(t.dtype)


def toward_zero(t: jax.Array, odd: ArrayLike | None = None) -> jax.Array:
  """Truncation."""
  del odd
  return jnp.where(t < 0, -fb.floor(-t), fb.floor(t))


def stochastic(random: jax.Array, n: int) -> Rule:
  """Up with probability frac(t), from the top n <= 23 bits of `random`.

  j is an n-bit integer; t goes up iff j + 1/2 < frac * 2^n. That happens for
  exactly frac * 2^n values of j where this is an integer, so the rounding is
  unbiased there, and within 2^-(n+1) of unbiased elsewhere.
  """
  j = (random >> (32 - n)).astype(jnp.int32).astype(jnp.float32)

  def round_(t, odd=None):
    del odd
    low = fb.floor(t)
    return low + (j + 0.5 < (t - low) * float(1 << n)).astype(t.dtype)

  return round_


def rule(
  rounding: str, random: jax.Array | None = None, random_bits: int = RANDOM_BITS
) -> Rule:
  """The rounding rule for a name.

  Args:
    rounding: 'nearest_even', 'toward_zero' or 'stochastic'.
    random: uint32 bits for 'stochastic', of the shape of the rounded array.
    random_bits: how many of them are used.

  Raises:
    ValueError: for 'stochastic' without random bits.
  """
  if rounding == 'stochastic':
    if random is None:
      raise ValueError(
        "rounding='stochastic' needs random=, uint32 bits such as those of"
        ' arith.hashing.random_bits'
      )
    return stochastic(random, random_bits)
  if rounding == 'toward_zero':
    return toward_zero
  return nearest_even


def encode_float(
  x: jax.Array,
  f: Float,
  rounding: Rule = nearest_even,
  *,
  saturate: bool = True,
  dtype: DTypeLike = jnp.uint8,
) -> jax.Array:
  """Codes of float32 `x`.

  Args:
    x: float32.
    f: the format.
    rounding: a rounding rule.
    saturate: beyond the largest finite number give that number; otherwise Inf
      if the format has it, else NaN.
    dtype: integer dtype of the result; int32 saves kernels a conversion.

  Returns:
    Codes; NaN gives `nan_code`, or 0 where there is none.
  """
  m = f.mantissa_bits
  b = fb.to_bits(x)
  magnitude = fb.from_bits(b & fb.MAGNITUDE)
  top = _float_value(f.code_max + (not saturate), f)
  magnitude = jnp.minimum(magnitude, jnp.float32(top))
  e = jnp.maximum(fb.to_bits(magnitude) >> 23, f.emin + 127)
  offset = e - (f.emin + 127)
  if f.subnormals:
    t = magnitude * fb.from_bits((254 + m - e) << 23)
    k = _rounded(t, rounding, None if m else offset)
    code = (offset << m) + k
  else:
    t = _significand(fb.to_bits(magnitude))
    k = _rounded(t, rounding, offset - 1)
    code = jnp.maximum(offset + k - 1, 0)
  over = f.inf_code if f.inf_code is not None else f.nan_code
  if saturate or over is None:
    code = jnp.minimum(code, f.code_max)
  else:
    code = jnp.where(code > f.code_max, over, code)
  if f.signed:
    sign = (b >> 31) & (1 << (f.exponent_bits + m))
    if not f.negative_zero:
      sign = jnp.where(code == 0, 0, sign)
    code = code | sign
  else:
    code = jnp.where(b < 0, 0, code)
  code = jnp.where(x != x, f.nan_code or 0, code)
  return code.astype(dtype)


def _rounded(t, rounding, odd):
  """rounding(t, odd) as int32, for t in [0, 2^22)."""
  if rounding is nearest_even and odd is None:
    return fb.nearest_integer(t)
  return fb.nearest_integer(rounding(t, odd))


def _significand(b):
  """|x| / 2^exponent in [1, 2), over 2^-127 for subnormals: no flushing."""
  fraction = b & 0x7FFFFF
  small = fraction.astype(jnp.float32) * jnp.float32(2.0**-22)
  return jnp.where(b >> 23 == 0, small, fb.from_bits(fraction | (127 << 23)))


def _float_value(code: int, f: Float) -> float:
  """The number at `code` if every code were finite."""
  e, m = divmod(code, 1 << f.mantissa_bits)
  if e == 0 and f.subnormals:
    return m * 2.0 ** (f.emin - f.mantissa_bits)
  lead = 1 + m / (1 << f.mantissa_bits)
  return min(lead * 2.0 ** (e - f.subnormals + f.emin), 2.0**127 * 1.75)


def decode_float(code: jax.Array, f: Float) -> jax.Array:
  """float32 values of integer codes."""
  m, width = f.mantissa_bits, f.exponent_bits + f.mantissa_bits
  code = code.astype(jnp.uint32)
  magnitude = code & ((1 << width) - 1)
  shift = 127 + f.emin - f.subnormals
  bits = (magnitude << (23 - m)) + jnp.uint32(shift << 23)
  if f.subnormals:
    low = magnitude.astype(jnp.int32).astype(jnp.float32)
    low = low * jnp.float32(2.0 ** (f.emin - m))
    bits = jnp.where(
      magnitude < (1 << m), fb.to_bits(low), bits.astype(jnp.int32)
    )
    bits = bits.astype(jnp.uint32)
  elif shift == 0:
    bits = jnp.where(magnitude == 0, jnp.uint32(0x00400000), bits)
  if f.inf_code is not None:
    bits = jnp.where(magnitude == f.inf_code, jnp.uint32(fb.INF), bits)
    bits = jnp.where(magnitude > f.inf_code, jnp.uint32(0x7FC00000), bits)
  elif f.code_max < (1 << width) - 1:
    bits = jnp.where(magnitude > f.code_max, jnp.uint32(0x7FC00000), bits)
  if f.signed:
    sign = code >> width
    bits = bits | sign << 31
    if not f.negative_zero:
      bits = jnp.where(code == f.nan_code, jnp.uint32(0x7FC00000), bits)
  return fb.from_bits(bits)


def encode_int(
  x: jax.Array,
  f: Int,
  rounding: Rule = nearest_even,
  dtype: DTypeLike = jnp.uint8,
) -> jax.Array:
  """Codes of float32 `x`, clipped to the range, which is symmetric without
  `f.lowest`; NaN gives 0."""
  top = (1 << (f.bits - f.signed)) - 1
  k = rounding(x * jnp.float32(1 << f.fraction_bits))
  k = jnp.clip(k, -top - f.lowest if f.signed else 0, top)
  k = jnp.where(k != k, 0, k).astype(jnp.int32)
  return (k & ((1 << f.bits) - 1)).astype(dtype)


def decode_int(code: jax.Array, f: Int) -> jax.Array:
  """float32 values of integer codes."""
  k = code.astype(jnp.int32)
  if f.signed:
    k = (k << (32 - f.bits)) >> (32 - f.bits)
  return k.astype(jnp.float32) * jnp.float32(2.0**-f.fraction_bits)


def encode_codebook(
  x: jax.Array,
  f: Codebook,
  rounding: Rule = nearest_even,
  dtype: DTypeLike = jnp.uint8,
) -> jax.Array:
  """Index of the entry that `rounding` picks; NaN gives the entry nearest 0."""
  table = f.table
  if rounding is nearest_even:
    index = jnp.zeros(x.shape, jnp.int32)
    for a, b in zip(table, table[1:], strict=False):
      index = index + (x > _round_down((a + b) / 2)).astype(jnp.int32)
  else:
    index, low, high = _interval(x, table)
    t = jnp.clip((x - low) / (high - low), 0, 1)
    # Rounding acts on the distance from zero, so mirror negative intervals.
    mirrored = low < 0
    k = rounding(jnp.where(mirrored, 1 - t, t)).astype(jnp.int32)
    index = index + jnp.where(mirrored, 1 - k, k)
  zero = min(range(len(table)), key=lambda i: abs(table[i]))
  return jnp.where(x != x, zero, index).astype(dtype)


def _interval(x, table):
  """Index and ends of the interval of the table in which each x lies."""
  index = jnp.zeros(x.shape, jnp.int32)
  low = jnp.full(x.shape, table[0], jnp.float32)
  high = jnp.full(x.shape, table[1], jnp.float32)
  for v, w in zip(table[1:-1], table[2:], strict=True):
    above = x >= jnp.float32(v)
    index = index + above.astype(jnp.int32)
    low = jnp.where(above, jnp.float32(v), low)
    high = jnp.where(above, jnp.float32(w), high)
  return index, low, high


def _round_down(v: float) -> np.float32:
  """The largest float32 <= v: x is above v exactly if it is above this."""
  f = np.float32(v)
  return np.nextafter(f, np.float32(-np.inf)) if float(f) > v else f


def decode_codebook(code: jax.Array, f: Codebook) -> jax.Array:
  """float32 table entries, by selects for small tables and a gather else."""
  if len(f.table) > 16:
    return jnp.array(f.table, jnp.float32)[code.astype(jnp.int32)]
  code = code.astype(jnp.int32)
  level = [jnp.float32(v) for v in f.table]
  bit = 1
  while len(level) > 1:
    high = (code & bit) != 0
    level = [
      jnp.where(high, b, a)
      for a, b in zip(level[::2], level[1::2], strict=True)
    ]
    bit <<= 1
  return level[0]


def encode(
  x: jax.Array,
  f: Element,
  rounding: Rule = nearest_even,
  *,
  saturate: bool = True,
  dtype: DTypeLike = jnp.uint8,
) -> jax.Array:
  """Codes of float32 `x` in a `Float`, `Int` or `Codebook`."""
  if isinstance(f, Float):
    return encode_float(x, f, rounding, saturate=saturate, dtype=dtype)
  if isinstance(f, Int):
    return encode_int(x, f, rounding, dtype)
  return encode_codebook(x, f, rounding, dtype)


def largest(f: Element) -> float:
  """The largest finite magnitude of a `Float`, `Int` or `Codebook`."""
  if isinstance(f, Float):
    return _float_value(f.code_max, f)
  if isinstance(f, Int):
    return ((1 << (f.bits - f.signed)) - 1) * 2.0**-f.fraction_bits
  return max(abs(v) for v in f.table)


def decode(code: jax.Array, f: Element) -> jax.Array:
  """float32 values of codes of a `Float`, `Int` or `Codebook`."""
  if isinstance(f, Float):
    return decode_float(code, f)
  if isinstance(f, Int):
    return decode_int(code, f)
  return decode_codebook(code, f)


def unit_in_kernel(f: Element) -> float:
  """A power of two that `decode_in_kernel` saves work to leave out."""
  if not isinstance(f, Float) or _levels(f) is None:
    return 1.0
  return 2.0 ** (f.emin - f.mantissa_bits)


def _levels(f) -> list[int] | None:
  """Magnitudes as multiples of the smallest one that fit one word, or None."""
  if not isinstance(f, Float) or not f.subnormals or f.emin < -100:
    return None
  width = f.exponent_bits + f.mantissa_bits
  step = 2.0 ** (f.emin - f.mantissa_bits)
  levels = [int(_float_value(k, f) / step) for k in range(1 << width)]
  all_finite = f.code_max == (1 << width) - 1 and f.negative_zero
  return levels if all_finite and width <= 3 and levels[-1] <= 15 else None


def decode_field(
  field: jax.Array, shift: int, bits: int, f: Element, unit: float = 1.0
) -> jax.Array:
  """`decode_in_kernel` of codes within words, which are not cut out first.

  Args:
    field: uint32.
    shift: place of the lowest bit of the code.
    bits: width of the code; other bits may hold anything.
    f: a `Float`, `Int` or `Codebook`.
    unit: 1, or `unit_in_kernel(f)` to divide the numbers by it.
  """
  if isinstance(f, Int) and f.signed and f.bits == bits:
    k = (field << (32 - shift - bits)).astype(jnp.int32) >> (32 - bits)
    value = k.astype(jnp.float32)
    scale = 2.0**-f.fraction_bits
    return value if scale == 1 else value * jnp.float32(scale)
  levels = _levels(f)
  if (
    not isinstance(f, Float)
    or levels is None
    or not f.signed
    or len(levels) << 1 != 1 << bits
  ):
    return decode_in_kernel(field >> shift & ((1 << bits) - 1), f, unit)
  place = _moved(field, shift, 2) & (4 * len(levels) - 4)
  sign = _moved(field, shift + bits - 1, 31) & jnp.uint32(1 << 31)
  return _looked_up(levels, place, sign, f, unit)


def _looked_up(levels, place, sign, f: Float, unit: float):
  """The number of a level, four bits of a word, with its sign bit."""
  word = sum(v << (4 * k) for k, v in enumerate(levels))
  level = (jnp.uint32(word) >> place & 15).astype(jnp.int32)
  value = level.astype(jnp.float32)
  if unit == 1.0:
    value = value * jnp.float32(2.0 ** (f.emin - f.mantissa_bits))
  return fb.from_bits(_bits(value) | sign)


def _moved(word, start: int, end: int):
  """A word with its bit `start` in the place of bit `end`."""
  return word << (end - start) if end >= start else word >> (start - end)


def decode_in_kernel(
  code: jax.Array, f: Element, unit: float = 1.0
) -> jax.Array:
  """The numbers of `decode`, for vector units where selects are expensive.

  Finite minifloats whose magnitudes are at most 15 times the smallest one, in
  at most 8 codes, are fields of one word. Others are read as if their smallest
  exponent were normal: u is the value, or 2^(emin - 1) (1 + fraction) for a
  subnormal 2^emin fraction. Then 2u - 2^emin, exact as all of them, is the
  smaller number exactly for subnormals.

  Args:
    code: uint32.
    f: a `Float`, `Int` or `Codebook`.
    unit: 1, or `unit_in_kernel(f)` to divide the numbers by it.
  """
  if not isinstance(f, Float) or not f.subnormals or f.emin < -100:
    return decode(code, f)
  m, width = f.mantissa_bits, f.exponent_bits + f.mantissa_bits
  sign = jnp.uint32(0)
  if f.signed:
    sign = (code & (1 << width)) << (31 - width)
  magnitude = code & ((1 << width) - 1)
  if (levels := _levels(f)) is not None:
    return _looked_up(levels, magnitude << 2, sign, f, unit)
  u = (magnitude << (23 - m)) + jnp.uint32((126 + f.emin) << 23)
  u = fb.from_bits(u)
  bits = _bits(jnp.minimum(u, u + u - jnp.float32(2.0**f.emin)))
  if f.inf_code is not None:
    bits = jnp.where(magnitude >= f.inf_code, jnp.uint32(fb.INF), bits)
    bits = jnp.where(magnitude > f.inf_code, jnp.uint32(0x7FC00000), bits)
  elif f.code_max < (1 << width) - 1:
    bits = jnp.where(magnitude > f.code_max, jnp.uint32(0x7FC00000), bits)
  bits = bits | sign
  if f.signed and not f.negative_zero:
    bits = jnp.where(code == f.nan_code, jnp.uint32(0x7FC00000), bits)
  return fb.from_bits(bits)


def _bits(x):
  return lax.bitcast_convert_type(x, jnp.uint32)
