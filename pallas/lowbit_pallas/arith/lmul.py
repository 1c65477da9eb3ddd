"""L-Mul: multiplication by one integer addition (Luo & Sun 2024).

A positive floating-point number x = (1 + p) 2^i with m mantissa bits and bias b
has the code X = (i + b + p) 2^m. Read as a fixed-point number, the code is the
exponent plus Mitchell's logarithm log2(1 + p) ~ p, so adding codes multiplies:

    X + Y - (b << m) + (2^m >> l)

is the code of L-Mul of x and y = (1 + q) 2^j. The last term makes up for the
lost product p q on average; l(m) = m for m <= 3, 3 for m = 4, 4 above. With
s = p + q + 2^-l the two readings of the definition are

    integer  (1 + s) 2^(i+j) for s < 1, 2 s 2^(i+j) for 1 <= s < 2, and
             4 (s - 1) 2^(i+j) above: what the addition gives, since a mantissa
             carry moves into the exponent
    formula  (1 + s) 2^(i+j) for every s: the equation as it is written, rounded
             to nearest even, as it takes one more mantissa bit for s >= 1

They agree for s < 1; the integer reading is the accurate one.

Around the addition: a code with exponent field 0 is zero, as an operand and as
a result, so there are no subnormal numbers; zero times a finite number is zero;
results beyond the largest finite number are that number; infinity and NaN pass
as in a multiplication (infinity times zero is NaN); the sign is the exclusive
or of the signs. Only 32-bit integer operations are used.

"Addition is All You Need for Energy-efficient Language Models", H. Luo and
W. Sun, 2024. "Computer Multiplication and Division Using Binary Logarithms",
J. N. Mitchell, 1962.
"""

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits as fb, codec

FLOAT32 = codec.minifloat(8, 23, 'ieee')
BFLOAT16 = codec.minifloat(8, 7, 'ieee')
E4M3 = codec.minifloat(4, 3, 'fn')
E5M2 = codec.minifloat(5, 2, 'ieee')

READINGS = ('integer', 'formula')


def offset_bits(mantissa_bits: int) -> int:
  """l(m), the negative logarithm of the offset."""
  return min(mantissa_bits, 3 if mantissa_bits <= 4 else 4)


def to_codes(x: jax.Array, f: codec.Float) -> jax.Array:
  """Codes (int32) of float32 `x`, rounded to nearest even.

  Finite numbers saturate; infinity stays where the format has it.
  """
  if f.exponent_bits == 8:
    code = fb.to_bits(x)
    return round_mantissa(code, FLOAT32, f.mantissa_bits) >> _shift(f)
  code = codec.encode_float(x, f, dtype=jnp.int32)
  if f.inf_code is None:
    return code
  sign = code & (1 << _width(f))
  is_inf = (fb.to_bits(x) & fb.MAGNITUDE) == fb.INF
  return jnp.where(is_inf, sign | f.inf_code, code)


def from_codes(code: jax.Array, f: codec.Float) -> jax.Array:
  """float32 values of codes (int32)."""
  if f.exponent_bits == 8:
    return fb.from_bits(code << _shift(f))
  return codec.decode_float(code, f)


def round_mantissa(
  code: jax.Array, f: codec.Float, mantissa_bits: int
) -> jax.Array:
  """Codes with all but the first mantissa bits zero, by nearest even.

  Finite numbers stay finite; infinity and NaN stay.
  """
  drop = f.mantissa_bits - mantissa_bits
  if drop == 0:
    return code
  magnitude = _magnitude(code, f)
  keep = -1 << drop
  half = (1 << (drop - 1)) - 1
  rounded = (magnitude + half + ((magnitude >> drop) & 1)) & keep
  rounded = jnp.minimum(rounded, f.code_max & keep)
  rounded = jnp.where(magnitude > f.code_max, magnitude, rounded)
  return (code - magnitude) | rounded


def multiply(
  x: jax.Array,
  y: jax.Array,
  f: codec.Float,
  reading: str = 'integer',
  offset: int | None = None,
) -> jax.Array:
  """L-Mul on codes.

  Args:
    x, y: int32 codes; those of float32 are bit patterns.
    f: the format, with subnormals and signed zeros; with or without NaN, but
      with one where there are infinities.
    reading: 'integer' or 'formula'.
    offset: the last term of the sum, in units of 2^-mantissa_bits; None for
      the 2^-l(m) of the paper.

  Returns:
    int32 codes of the products.
  """
  m, one = f.mantissa_bits, 1 << f.mantissa_bits
  if offset is None:
    offset = one >> offset_bits(m)
  a, b = _magnitude(x, f), _magnitude(y, f)
  # The bias goes first and the other operand is limited to what fits: two
  # 31-bit magnitudes would overflow.
  partial = a - (((1 - f.emin) << m) - offset)
  if reading == 'formula':
    carried = (a & (one - 1)) + (b & (one - 1)) + (offset - one)
    partial = partial - _excess(jnp.maximum(carried, 0))
  total = partial + jnp.minimum(b, f.code_max - jnp.maximum(partial, 0))
  is_zero = (a < one) | (b < one)
  total = jnp.where(is_zero | (total < one), 0, total)

  largest = jnp.maximum(a, b)
  is_nan = largest > f.code_max
  if f.inf_code is not None:
    total = jnp.where(largest == f.inf_code, f.inf_code, total)
    is_nan = (largest > f.inf_code) | (is_nan & is_zero)
  width = _width(f)
  sign = ((x ^ y) >> width) << width
  total = total | sign
  return total if f.nan_code is None else jnp.where(is_nan, f.nan_code, total)


def _excess(carried):
  """carried - carried / 2, the quotient rounded to nearest even."""
  return carried - ((carried + ((carried >> 1) & 1)) >> 1)


def _magnitude(code, f: codec.Float):
  return code & ((1 << _width(f)) - 1)


def _width(f: codec.Float) -> int:
  return f.exponent_bits + f.mantissa_bits


def _shift(f: codec.Float) -> int:
  return FLOAT32.mantissa_bits - f.mantissa_bits
