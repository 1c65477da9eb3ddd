"""The exponential function, from additions and multiplications.

With n the integer that is nearest to x / ln 2, and r = x - n ln 2,

  exp(x) = 2^n exp(r),  |r| <= ln 2 / 2 = .3466,

and exp(r) is its Taylor series up to r^7 / 7!, of which each step is rounded
once. With u = 2^-24, what is lost is, relative to exp(x), at most

  .25 u   of r: n ln 2 is subtracted in two parts, of which the first is exact,
          and the difference is less than .5;
  .13 u   of the rest of the series, .3466^8 / 8! / exp(r) and less;
  .52 u   of the sum t = (exp(r) - 1) / r, which is off by less than 1.24 u t,
          where r t is .42 exp(r) at most;
  1 u     of 1 + r t, which is rounded once,

less than 2 u = 2^-23 in all. Multiplying by 2^n adds n to the exponent.
"""

import math

from lowbit_jax.cpu._code import I32, LANES, I32x8, Value, choose, fma

ERROR = 2.0**-23  # relative
# Beyond these, of float32, results are less than the least normal number, or
# more than the largest one.
LEAST, MOST = -87.33654, 88.72283
_DEGREE = 7
# Adding and subtracting it rounds to an integer, the last bits of the sum.
_ROUNDER = 1.5 * 2**23
# ln 2 in two parts: the first has 15 bits, so that its products with n are
# exact.
_HIGH = 22713 / 2**15
_LOW = math.log(2) - _HIGH


def exponential(x: Value) -> Value:
  """exp(x) of float32, with a relative error less than 2^-23.

  Results that would be less than 2^-126 are 0, those beyond float32 are inf,
  and that of NaN is NaN.
  """
  number = x.type
  integer = I32x8 if number.lanes == LANES else I32

  # x = n ln 2 + r.
  rounded = fma(x, number.constant(1 / math.log(2)), number.constant(_ROUNDER))
  n = rounded - _ROUNDER
  r = fma(n, number.constant(-_HIGH), x)
  r = fma(n, number.constant(-_LOW), r)

  # exp(r), from its last term on.
  y = number.constant(1 / math.factorial(_DEGREE))
  for power in reversed(range(_DEGREE)):
    y = fma(y, r, number.constant(1 / math.factorial(power)))

  # Times 2^n, and what that is not right for.
  y = (y.bits(integer) + (rounded.bits(integer) << 23)).bits(number)
  y = choose(x < LEAST, number.constant(0.0), y)
  y = choose(x > MOST, number.constant(math.inf), y)
  return choose(x.equals(x), y, x)
