"""Elementary functions of float32 with certified errors, and their parts.

A core approximates a function on a short interval. A reduction turns a core
into a function of every float32 by exact steps around it:

  exp2_split   2^x = 2^n 2^r             r = x - n in [-1/2, 1/2]
  exp_split    e^x = 2^n e^r             r = x - n ln 2, |r| <= 0.3466
  log2_split   log2(x) = n + log2(m)     m in [sqrt(1/2), sqrt(2))
  sin_pio2     sin(x) by x = n pi/2 + r  |r| <= 0.7854, |x| <= 1e5
  odd_clamp    f(-x) = -f(x), +-1 beyond a limit

All steps are elementwise, without tables, and lower in Pallas kernels for TPU
and GPU. Subnormal arguments may count as zero, and so may subnormal results:
CPU back ends flush both.

The functions take their constants as an argument, so that the search can polish
them; the defaults are what it found. Errors are those of XLA for CPU with fused
multiply-add, measured on the compiled functions; `lowbit_jax.special` has the
certificates. Other back ends round sums and products as they please.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import bits

Core = Callable[[jax.Array], jax.Array]

# Adding 1.5 2^23 leaves the nearest integer in the low bits, for |n| < 2^22.
_INTEGER = 12582912.0
_INTEGER_BITS = 0x4B400000
# With 127 more they are the biased exponent of 2^n.
_EXPONENT = _INTEGER + 127.0
_SQRT_HALF_BITS = 0x3F3504F3
_SIGN = -(2**31)
_MIN_NORMAL = 2.0**-126
_INF = float('inf')

_LOG2_E = float.fromhex('0x1.715476p+0')
# ln 2 = _LN2[0] + _LN2[1] to 2.3e-14. The first has 15 significant bits, so its
# product with an integer below 2^9 is exact.
_LN2 = (float.fromhex('0x1.62E4p-1'), float.fromhex('0x1.7F7D1Cp-20'))
# Largest x with finite e^x, and smallest with e^x >= 2^-126.
_EXP_MAX = float.fromhex('0x1.62e42ep+6')
_EXP_MIN = float.fromhex('-0x1.5d589ep+6')

# pi/2 to 2^-69. The first two parts have 8 significant bits or less, so that
# their products with an integer below 2^16 are exact, and none is negative, so
# that -0 stays -0.
_PI_2 = (
  float.fromhex('0x1.92p+0'),
  float.fromhex('0x1.fap-12'),
  float.fromhex('0x1.54442cp-20'),
  float.fromhex('0x1.184698p-44'),
)
# The last two in one, rounded up: as a constant of its own, because products
# that are equal would be computed once, and not fused.
_PI_2_REST = float.fromhex('0x1.54442ep-20')
_TWO_OVER_PI = float.fromhex('0x1.45f306p-1')
SIN_LIMIT = 1e5

# 2^r = 1 + r P(r)
EXP2 = (
  float.fromhex('0x1.62e43p-1'),
  float.fromhex('0x1.ebfbd8p-3'),
  float.fromhex('0x1.c6aef8p-5'),
  float.fromhex('0x1.3b2d74p-7'),
  float.fromhex('0x1.5f3e02p-10'),
  float.fromhex('0x1.41fbb8p-13'),
)
# e^r = 1 + r P(r)
EXP = (
  float.fromhex('0x1p+0'),
  float.fromhex('0x1.fffffcp-2'),
  float.fromhex('0x1.55544p-3'),
  float.fromhex('0x1.5558p-5'),
  float.fromhex('0x1.126782p-7'),
  float.fromhex('0x1.6ae72cp-10'),
)
# log2(1 + t) = t log2(e) + t^2 (c + t P(t) / Q(t)), with log2(e) in float32 and
# the highest coefficient of Q one
LOG2 = (
  float.fromhex('-0x1.715476p-1'),
  float.fromhex('0x1.0045f8p+0'),
  float.fromhex('0x1.5e9c22p-1'),
  float.fromhex('0x1.3ca354p-8'),
  float.fromhex('0x1.0a73c2p+1'),
  float.fromhex('0x1.7e1afcp+1'),
)
# sin(r) = r + r u P(u) and cos(r) = 1 - u / 2 + u^2 Q(u), u = r^2
SIN_COS = (
  float.fromhex('-0x1.555546p-3'),
  float.fromhex('0x1.11074cp-7'),
  float.fromhex('-0x1.9943e2p-13'),
  float.fromhex('0x1.55554ap-5'),
  float.fromhex('-0x1.6c0c34p-10'),
  float.fromhex('0x1.99eb9ep-16'),
)
# 4 (x - z) = x u P(u) / Q(u), u = x^2, where Q is u^2 + ...: see `tanh`.
TANH = (
  float.fromhex('0x1.3df65p+8'),
  float.fromhex('0x1.dab5e2p+1'),
  float.fromhex('0x1.0f456ap-12'),
  float.fromhex('0x1.dcf198p+9'),
  float.fromhex('0x1.aa0e38p+6'),
)
# e^r = 1 + r + r^2 Q(r)
SIGMOID = (
  float.fromhex('0x1.fffffep-2'),
  float.fromhex('0x1.55549ep-3'),
  float.fromhex('0x1.555674p-5'),
  float.fromhex('0x1.122768p-7'),
  float.fromhex('0x1.6bec08p-10'),
)
# z = x + x u P(u) / Q(u), u = x^2, where Q is u^4 + ...: see `erf`.
ERF = (
  float.fromhex('-0x1.dbf01ap+16'),
  float.fromhex('-0x1.70295p+12'),
  float.fromhex('-0x1.c887f4p+8'),
  float.fromhex('0x1.9b204ep+19'),
  float.fromhex('0x1.1d5f44p+17'),
  float.fromhex('0x1.66f01ap+13'),
  float.fromhex('0x1.b5d522p+8'),
)
# (1 + a) R(a) = 1/2 + P(t), t = (a - 3) / (a + 3); e^r = 1 + r + r^2 Q(r)
GELU = (
  float.fromhex('-0x1.c8ec7ap-7'),
  float.fromhex('-0x1.8b5facp-4'),
  float.fromhex('-0x1.0d3a1p-6'),
  float.fromhex('0x1.71fd5ep-5'),
  float.fromhex('-0x1.745d92p-6'),
  float.fromhex('0x1.2e6fccp-10'),
  float.fromhex('0x1.88642ep-9'),
  float.fromhex('-0x1.5ed0a6p-12'),
  float.fromhex('-0x1.ee0068p-12'),
  float.fromhex('0x1.2d52ep-18'),
  float.fromhex('0x1.67eee2p-15'),
  float.fromhex('0x1.fffffcp-2'),
  float.fromhex('0x1.5554bp-3'),
  float.fromhex('0x1.555674p-5'),
  float.fromhex('0x1.122768p-7'),
  float.fromhex('0x1.6bec08p-10'),
)
# log(1 + e) = e + e^2 P(e - 1); e^r = 1 + r + r^2 Q(r)
SOFTPLUS = (
  float.fromhex('-0x1.3a37ap-2'),
  float.fromhex('0x1.d1bcaep-4'),
  float.fromhex('-0x1.755566p-5'),
  float.fromhex('0x1.356022p-6'),
  float.fromhex('-0x1.34a2a8p-7'),
  float.fromhex('-0x1.120f4ep-12'),
  float.fromhex('-0x1.1922f4p-7'),
  float.fromhex('-0x1.874fap-8'),
  float.fromhex('-0x1.a5f552p-9'),
  float.fromhex('0x1.fffffep-2'),
  float.fromhex('0x1.5554acp-3'),
  float.fromhex('0x1.555674p-5'),
  float.fromhex('0x1.122768p-7'),
  float.fromhex('0x1.6bec08p-10'),
)
_GELU_TERMS = 11
_SOFTPLUS_TERMS = 9
_TANH_LIMIT = 9.5
_ERF_LIMIT = 3.93
_GELU_LIMIT = 13.25
_EXP_LIMIT = 88.0  # e^-88 is subnormal, e^88 finite


# alpha and beta of `erf`: 1 + alpha is its slope at zero, and beta makes 1 the
# largest value of the cubic.
ERF_CUBIC = (
  float.fromhex('0x1.06eba8p-3'),
  float.fromhex('0x1.b3e78ep-3'),
)


def exp2_split(core: Core) -> Core:
  """2^x for every float32 from 2^r on [-1/2, 1/2].

  Args:
    core: approximates 2^r; positive and within a factor of two of it, and
      exactly 1 at zero, so that whole numbers have exact powers.

  Returns:
    Function of a float32 array. 0 where x < -126, inf where x >= 128, NaN for
    NaN. The scaling by 2^n is exact.
  """

  def exp2(x: jax.Array) -> jax.Array:
    shifted, n = _nearest(x)
    return _guarded(x, -126.0, 128.0, _scaled(core(x - n), shifted))

  return exp2


def exp_split(core: Core) -> Core:
  """e^x for every float32 from e^r on [-0.3466, 0.3466].

  ln 2 is subtracted in two parts (Cody and Waite, "Software Manual for the
  Elementary Functions", 1980).

  Args:
    core: approximates e^r; as in `exp2_split`.

  Returns:
    Function of a float32 array. 0 where e^x < 2^-126, inf where it exceeds the
    largest float32, NaN for NaN.
  """

  def exp(x: jax.Array) -> jax.Array:
    shifted, r = _reduce_ln2(x)
    above = float.fromhex('0x1.62e430p+6')
    return _guarded(x, _EXP_MIN, above, _scaled(core(r), shifted))

  return exp


def log2_split(core: Core) -> Core:
  """log2(x) for every float32 from log2(m) on [sqrt(1/2), sqrt(2)].

  Args:
    core: approximates log2(m); exactly 0 at one, so that powers of two have
      exact logarithms.

  Returns:
    Function of a float32 array. -inf for zero and subnormal numbers, NaN below
    and for NaN, inf for inf.
  """

  def log2(x: jax.Array) -> jax.Array:
    n, m = binade(x)
    # Before the sum, where the guards need not wait for the core.
    return guarded_log(x, n) + core(m)

  return log2


def sin_pio2(sin_core: Core, cos_core: Core, quarters: int = 0) -> Core:
  """sin(x + quarters pi/2) for |x| <= SIN_LIMIT.

  Args:
    sin_core: approximates sin(r) on [-pi/4, pi/4].
    cos_core: approximates cos(r) there.
    quarters: 0 for the sine of x, 1 for its cosine.

  Returns:
    Function of a float32 array. Beyond the limit it is meaningless, and NaN for
    infinities and NaN.
  """

  def sin(x: jax.Array) -> jax.Array:
    r, excess, k = reduce_pio2(x)
    r = r - excess
    return quadrant(sin_core(r), cos_core(r), k + quarters)

  return sin


def odd_clamp(core: Core, limit: float) -> Core:
  """An odd function that is +-1 from a limit on.

  Args:
    core: the function on [0, limit); what it gives elsewhere is not used.
    limit: positive.

  Returns:
    Function of a float32 array; NaN for NaN, and of the sign of x otherwise.
  """

  def odd(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    y = jnp.where(size >= limit, jnp.ones_like(x), core(size))
    sign = bits.to_bits(x) & _SIGN
    return bits.from_bits(bits.to_bits(y) ^ sign)

  return odd


def exp2(x: jax.Array, c: Sequence = EXP2) -> jax.Array:
  """2^x within 1 ulp, exact at whole numbers; float32."""
  return exp2_split(lambda r: 1.0 + r * _horner(c, r))(x)


def exp(x: jax.Array, c: Sequence = EXP) -> jax.Array:
  """e^x within 1 ulp; float32."""
  return exp_split(lambda r: exp_core(r, c))(x)


def exp_core(r: jax.Array, c: Sequence = EXP) -> jax.Array:
  """e^r for |r| <= 0.3476, to 2^-28.9 but for rounding; float32."""
  return 1.0 + r * _horner(c, r)


def log2(x: jax.Array, c: Sequence = LOG2) -> jax.Array:
  """log2(x) within 1 ulp, exact at powers of two; float32.

  The leading term is split, so that its product rounds together with the sum.
  The quotient comes third, where its own rounding counts for little.
  """

  def core(m):
    t = m - 1.0
    quotient = _horner(c[1:4], t) / _horner((*c[4:], 1.0), t)
    return t * _LOG2_E + (t * t) * (c[0] + t * quotient)

  return log2_split(core)(x)


def sin(x: jax.Array, c: Sequence = SIN_COS) -> jax.Array:
  """sin(x) within 1 ulp for |x| <= SIN_LIMIT; float32."""
  return _sin(x, c, 0)


def cos(x: jax.Array, c: Sequence = SIN_COS) -> jax.Array:
  """cos(x) within 1 ulp for |x| <= SIN_LIMIT; float32."""
  return _sin(x, c, 1)


def _sin(x, c, quarters: int):
  r, excess, k = reduce_pio2(x)
  u = r * r
  cube = r * u
  sin_r = r - (excess - cube * _horner(c[:3], u))
  # r / 2 is exact in the difference, where u / 2 would carry the rounding of u.
  cos_r = 1.0 - r * (0.5 * r - (excess + cube * _horner(c[3:], u)))
  return quadrant(sin_r, cos_r, k + quarters)


def tanh(x: jax.Array, c: Sequence = TANH) -> jax.Array:
  """tanh(x) within 1.5 ulp, +-1 beyond +-9.5; float32.

  With z ~ 2 tanh(x / 2) it is 4 z / (4 + z^2), which is flat where |z| = 2: the
  error of a rational function for z dies out where tanh saturates. To round
  little, what is divided is the distance from m, x within +-1:

    m - tanh(x) = (m z^2 + 4 (m - z)) / (4 + z^2)
  """
  m = _clamped(x, 1.0)
  u = x * x
  q = (x * u) * (_horner(c[:3], u) / _horner((*c[3:], 1.0), u))
  z = x - 0.25 * q
  # The last product, m z times z, does not round: it is fused with the sum.
  y = m - ((m * z) * z + (4.0 * (m - x) + q)) / (z * z + 4.0)
  return jnp.where(u > _TANH_LIMIT**2, m, y)


def erf(x: jax.Array, c: Sequence = ERF) -> jax.Array:
  """erf(x) within 1.5 ulp, +-1 beyond +-3.93; float32.

  It is z + z (alpha - beta z^2), which is flat where erf saturates: there the
  error of a rational function for z dies out.
  """
  alpha, beta = ERF_CUBIC
  x = _clamped(x, _ERF_LIMIT)
  # 2^-60 is nothing but the sign of the product at zero.
  u = x * x - 2.0**-60
  z = x + (x * u) * (_horner(c[:3], u) / _horner((*c[3:], 1.0), u))
  return z + z * (alpha - beta * (z * z))


def sigmoid(x: jax.Array, c: Sequence = SIGMOID) -> jax.Array:
  """1 / (1 + e^-x) within 1.5 ulp; float32.

  With e^-x = s (1 + q) the quotient y has one Newton step, with the residual
  1 - y - y s - y s q. Since q is not rounded to 1 + q in it, nor s to 1 + s,
  it makes good what the denominator has rounded off.
  """
  s, q = _exp_of_minus(_clamped(x, _EXP_LIMIT), c)
  y = 1.0 / (1.0 + s * (1.0 + q))
  return y + y * (((1.0 - y) - y * s) - y * (s * q))


def softplus(x: jax.Array, c: Sequence = SOFTPLUS) -> jax.Array:
  """log(1 + e^x) within 1.5 ulp; float32.

  It is max(x, 0) + log(1 + e) with e = e^-|x|. What e rounds off counts half
  in log(1 + e) where the error is largest, near e = 1, and so it does here.
  """
  p, q = c[:_SOFTPLUS_TERMS], c[_SOFTPLUS_TERMS:]
  a = jnp.abs(x)
  s, q = _exp_of_minus(jnp.where(a > _EXP_LIMIT, _EXP_LIMIT, a), q)
  d = 1.0 + q
  low = q + (1.0 - d)
  e = s * d
  u = e - 1.0
  # The largest term of e P is added last: the others round less.
  rest = e * (u * _horner(p[1:], u)) + 0.5 * low
  return e + (jnp.where(x < 0.0, 0.0, x) + e * (e * p[0] + rest))


def gelu(x: jax.Array, c: Sequence = GELU) -> jax.Array:
  """x Phi(x) within 1.5 ulp, Phi the normal distribution function; float32.

  With a = |x| and R(a) = e^(a^2/2) Phi(-a), Mills' ratio but for a factor,

    x Phi(x) = max(x, 0) - a R(a) e^(-a^2/2)

  (1 + a) R(a) varies little, from 1/2 to 0.4: its product with a and the
  quotient by 1 + a are taken with what they round off. The square does not
  round where it is large, given fused multiply-add; without that the error of
  e^(-a^2/2) grows to 5e-6.
  """
  p, q = c[:_GELU_TERMS], c[_GELU_TERMS:]
  a = jnp.abs(x)
  a = jnp.where(a > _GELU_LIMIT, _GELU_LIMIT, a)
  h = 0.5 * a
  shifted = (h * h) * (-2.0 * _LOG2_E) + _EXPONENT
  minus_n = _EXPONENT - shifted
  # Of two products LLVM fuses the first: the square, for the other is exact.
  r = minus_n * _LN2[1] - (h * a - minus_n * _LN2[0])
  w = (r * r) * _horner(q, r)
  scale = bits.from_bits(bits.to_bits(shifted) << 23)
  # XLA fuses a product with a reciprocal into one loop, but not a quotient.
  t = (a - 3.0) * (1.0 / (a + 3.0))
  u = t * t
  rest = a * (_horner(p[0::2], u) + t * _horner(p[1::2], u))
  numerator = h + rest
  numerator_low = rest - (numerator - h)
  d, d_low = _plus_one(a)
  inverse = 1.0 / d
  y = numerator * inverse
  low = inverse * ((numerator - y * d) + (numerator_low - y * d_low))
  tail = scale * (y + (y * r + (y * w + (low + low * r))))
  # Half of x twice, so that all of a subnormal result is flushed.
  half = jnp.where(x < 0.0, -0.0, 0.5 * x)
  return half + (half - tail)


def bell(x: jax.Array, k: float, c: Sequence = GELU) -> jax.Array:
  """e^(-k x^2) for k = 1/2 or 1 within 2 ulp; float32, NaN for NaN."""
  a = jnp.abs(x)
  limit = _GELU_LIMIT * (0.5 / k) ** 0.5
  a = jnp.where(a > limit, limit, a)
  r, w, scale = _gauss(a, c[_GELU_TERMS:], k)
  return scale + scale * (r + w)


def _gauss(a, c, k: float):
  """(r, w, s) with e^(-k a^2) = (1 + r + w) s, for k a^2 <= 87.8.

  The square is exact where it is large, since the leading 12 bits of `a` have
  an exact square.
  """
  head = bits.from_bits(bits.to_bits(a) & -4096)
  shifted, n = _nearest((a * a) * (-k * _LOG2_E))
  high = (-k * head) * head - n * _LN2[0]
  low = n * _LN2[1] + (k * (a - head)) * (a + head)
  r = high - low
  w = (r * r) * _horner(c, r) + ((high - r) - low)
  return r, w, _power(shifted)


def _plus_one(a):
  """a + 1 and what it rounds off (Knuth)."""
  d = a + 1.0
  one = d - a
  return d, (a - (d - one)) + (1.0 - one)


def _exp_of_minus(x, c):
  """(s, q) with e^-x = s (1 + q), for |x| <= _EXP_LIMIT; q is NaN for NaN.

  s is a power of two, or 0 where that is subnormal.
  """
  shifted = x * -_LOG2_E + _EXPONENT
  # XLA simplifies (x + c) - c to x, but leaves c - (x + c).
  minus_n = _EXPONENT - shifted
  r = (minus_n * _LN2[0] - x) + minus_n * _LN2[1]
  s = bits.from_bits(bits.to_bits(shifted) << 23)
  return s, r + (r * r) * _horner(c, r)


def _horner(c: Sequence, x: jax.Array) -> jax.Array:
  """c[0] + c[1] x + c[2] x^2 + ..."""
  y = c[len(c) - 1]
  for k in range(len(c) - 2, -1, -1):
    y = y * x + c[k]
  return y


def _clamped(x, limit: float):
  """x within +-limit, NaN for NaN; one instruction each on a CPU."""
  x = jnp.where(x > limit, limit, x)
  return jnp.where(x < -limit, -limit, x)


def binade(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n, m) with x = 2^n m and m in [sqrt(1/2), sqrt(2)), for positive normal x.

  Returns:
    Two float32 arrays, `n` integer-valued; anything for other x.
  """
  b = bits.to_bits(x)
  n = (b - _SQRT_HALF_BITS) >> 23
  return n.astype(jnp.float32), bits.from_bits(b - (n << 23))


def guarded_log(x: jax.Array, y: jax.Array) -> jax.Array:
  """`y` for positive normal x, and the limits of the logarithm elsewhere."""
  y = jnp.where(x < _INF, y, x)
  y = jnp.where(x < _MIN_NORMAL, -_INF, y)
  return jnp.where(x > -_MIN_NORMAL, y, float('nan'))


def reduce_pio2(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(r, excess, k): x = k pi/2 + r - excess, |r| < 0.7855, |x| <= SIN_LIMIT.

  Cody and Waite's reduction in four parts. The first two leave no error. What
  the next difference rounds off is found with a fused product and taken along,
  since x may be as near to a multiple of pi/2 as 2^-27.8 (found by visiting
  them all). Without fused products the error is 2^-28 or less.

  Returns:
    `r` and `excess` float32, with |excess| <= 2^-24; `k` int32. For x = -0, `r`
    is -0 and `excess` +0, whose difference is -0.
  """
  shifted, n = _nearest(x * _TWO_OVER_PI)
  a = (x - n * _PI_2[0]) - n * _PI_2[1]  # exact
  # The last bit is cleared lest the product be fused: a - r must be exact.
  w = bits.from_bits(bits.to_bits(n * _PI_2_REST) & -2)
  r = a - w
  return r, n * _PI_2[3] - ((a - r) - n * _PI_2[2]), shifted


def quadrant(sin: jax.Array, cos: jax.Array, k: jax.Array) -> jax.Array:
  """sin(r + k pi/2) from sin(r), cos(r) and int32 `k`."""
  y = jnp.where((k & 1) == 0, sin, cos)
  return bits.from_bits(bits.to_bits(y) ^ ((k & 2) << 30))


def _reduce_ln2(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Bits of 1.5 2^23 + n, and r, with x = n ln 2 + r."""
  shifted, n = _nearest(x * _LOG2_E)
  return shifted, (x - n * _LN2[0]) - n * _LN2[1]


def _nearest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The nearest integer n to |x| < 2^22: bits of 1.5 2^23 + n, and n itself.

  By way of integers, because XLA simplifies (x + c) - c to x, and
  lax.reduce_precision, which keeps it from that, has no lowering in Pallas.
  """
  shifted = bits.to_bits(x + _INTEGER)
  return shifted, (shifted - _INTEGER_BITS).astype(jnp.float32)


def _scaled(p: jax.Array, shifted: jax.Array) -> jax.Array:
  """p 2^n for p in (1/2, 2), by addition to the exponent bits."""
  return bits.from_bits(bits.to_bits(p) + (shifted << 23))


def _power(shifted: jax.Array) -> jax.Array:
  """2^n, 0 for n = -127; wrong beyond -127 <= n <= 127."""
  return bits.from_bits((shifted + 127) << 23)


def _guarded(x, lowest: float, above: float, y: jax.Array) -> jax.Array:
  """y, but 0 for x < lowest, inf for x >= above, and NaN for NaN."""
  y = jnp.where(x < above, y, x + _INF)
  return jnp.where(x < lowest, 0.0, y)
