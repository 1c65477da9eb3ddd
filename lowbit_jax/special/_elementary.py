"""Elementary functions in float32, with certified errors and derivatives.

The arithmetic is that of `lowbit_pallas.arith.elementary`. Half-precision
arguments are computed in float32 and rounded once. Derivatives are expressed by
functions of this module, and so are accurate and may be taken again.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax import _derivative
from lowbit_jax._typing import ArrayLike
from lowbit_pallas.arith import elementary

_DTYPES = ('float32', 'bfloat16', 'float16')
_LN2 = math.log(2)
_LOG2_E = 1 / math.log(2)
_INF = float('inf')
_FAR = 30.0  # Phi is 0 or 1 from here on

# Bounds of the error in float32, in units in the last place of the true result.
MAX_ULP = {
  'exp2': 1.0,
  'exp': 1.0,
  'log2': 1.0,
  'sin': 1.0,
  'cos': 1.0,
  'tanh': 1.5,
  'sigmoid': 1.5,
  'erf': 1.5,
  'gelu': 1.5,
  'softplus': 1.5,
}


def _with_derivative(fn: Callable, derivative: Callable) -> Callable:
  """`fn` of float32 arrays with d fn = derivative(x, fn(x)) dx."""
  # Constants are no arguments of the public function, nor of its derivative.
  wrapped = _derivative.custom_jvp(lambda x: fn(x))
  # Compiled as a whole, lest the bounds depend on a `jit` around the call.
  compiled = jax.jit(wrapped, inline=True)

  @wrapped.defjvp
  def jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = compiled(x)
    return y, derivative(x, y) * dx

  return compiled


def _apply(fn: Callable, x) -> jax.Array:
  """`fn` in float32 on an argument of any dtype that is allowed."""
  x = jnp.asarray(x)
  if x.dtype.name not in _DTYPES:
    raise TypeError(
      f'x.dtype={x.dtype.name} must be one of {_DTYPES}: cast x, or use the'
      ' function of jax.numpy'
    )
  return fn(x.astype(jnp.float32)).astype(x.dtype)


def exp2(x: ArrayLike) -> jax.Array:
  """2^x, within 1 ULP; whole numbers give exact powers.

  Args:
    x: float32, bfloat16 or float16 array of any shape.

  Returns:
    Array of the shape and dtype of `x`, rounded once from float32. inf from
    x = 128 on, 0 below -126: results that would be subnormal are zero.

  Raises:
    TypeError: for another dtype.

  Derivative: ln(2) 2^x, forward and reverse mode, of any order.

  Examples:
    >>> exp2(jnp.array([-1.0, 0.0, 10.0])).tolist()
    [0.5, 1.0, 1024.0]
  """
  return _apply(_exp2, x)


def exp(x: ArrayLike) -> jax.Array:
  """e^x, within 1 ULP.

  Arguments, results and errors as in `exp2`: inf above 88.7228, 0 below
  -87.3365.

  Derivative: e^x, forward and reverse mode, of any order.

  Examples:
    >>> float(exp(0.0))
    1.0
  """
  return _apply(_exp, x)


def log2(x: ArrayLike) -> jax.Array:
  """log2(x), within 1 ULP; powers of two give whole numbers.

  Arguments and errors as in `exp2`. -inf at zero and for subnormal numbers, NaN
  below.

  Derivative: 1 / (x ln 2), forward and reverse mode, of any order.

  Examples:
    >>> log2(jnp.array([0.25, 1.0, 1024.0])).tolist()
    [-2.0, 0.0, 10.0]
  """
  return _apply(_log2, x)


def sin(x: ArrayLike) -> jax.Array:
  """sin(x), within 1 ULP for every x.

  Arguments and errors as in `exp2`. If any element exceeds 1e5 in size, the
  whole array is computed twice, the second time by `jnp.sin`; under `vmap`
  always.

  Derivative: cos(x), forward and reverse mode, of any order.

  Examples:
    >>> round(float(sin(1.0)), 6)
    0.841471
  """
  return _apply(_sin, x)


def cos(x: ArrayLike) -> jax.Array:
  """cos(x), within 1 ULP for every x. As `sin`.

  Derivative: -sin(x), forward and reverse mode, of any order.

  Examples:
    >>> float(cos(0.0))
    1.0
  """
  return _apply(_cos, x)


def tanh(x: ArrayLike) -> jax.Array:
  """tanh(x), within 1.5 ULP.

  Arguments and errors as in `exp2`. +-1 for |x| > 9.5.

  Derivative: 1 / cosh(x)^2 = 4 sigmoid(2 x) sigmoid(-2 x), forward and reverse
  mode, of any order.

  Examples:
    >>> float(tanh(jnp.inf))
    1.0
  """
  return _apply(_tanh, x)


def sigmoid(x: ArrayLike) -> jax.Array:
  """1 / (1 + e^-x), within 1.5 ULP.

  Arguments and errors as in `exp2`. Results below 2^-126 are 0.

  Derivative: sigmoid(x) sigmoid(-x), forward and reverse mode, of any order.

  Examples:
    >>> float(sigmoid(0.0))
    0.5
  """
  return _apply(_sigmoid, x)


def erf(x: ArrayLike) -> jax.Array:
  """The error function, within 1.5 ULP.

  Arguments and errors as in `exp2`. +-1 for |x| > 3.93.

  Derivative: 2 / sqrt(pi) e^(-x^2), forward and reverse mode, of any order.

  Examples:
    >>> round(float(erf(0.5)), 6)
    0.5205
  """
  return _apply(_erf, x)


def gelu(x: ArrayLike) -> jax.Array:
  """x Phi(x) with the normal distribution function Phi, within 1.5 ULP.

  Arguments and errors as in `exp2`. Accurate in the negative tail too, down to
  results of 2^-126 in size; smaller ones are -0.

  Derivative: Phi(x) + x e^(-x^2/2) / sqrt(2 pi), forward and reverse mode, of
  any order.

  Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; without
  their approximations.

  Examples:
    >>> round(float(gelu(1.0)), 6)
    0.841345
  """
  return _apply(_gelu, x)


def softplus(x: ArrayLike) -> jax.Array:
  """log(1 + e^x), within 1.5 ULP.

  Arguments and errors as in `exp2`. Results below 2^-126 are 0.

  Derivative: sigmoid(x), forward and reverse mode, of any order.

  Examples:
    >>> round(float(softplus(0.0)), 6)
    0.693147
  """
  return _apply(_softplus, x)


def _turning(fast: Callable, slow: Callable) -> Callable:
  """`fast` up to SIN_LIMIT, and `slow` where there is more."""

  def fn(x):
    far = (jnp.abs(x) > elementary.SIN_LIMIT) & (jnp.abs(x) < _INF)
    return lax.cond(
      jnp.any(far), lambda x: jnp.where(far, slow(x), fast(x)), fast, x
    )

  return fn


_exp2 = _with_derivative(elementary.exp2, lambda x, y: _LN2 * y)
_exp = _with_derivative(elementary.exp, lambda x, y: y)
_log2 = _with_derivative(elementary.log2, lambda x, y: _LOG2_E / x)
_sin = _with_derivative(_turning(elementary.sin, jnp.sin), lambda x, y: _cos(x))
_cos = _with_derivative(
  _turning(elementary.cos, jnp.cos), lambda x, y: -_sin(x)
)
_sigmoid = _with_derivative(elementary.sigmoid, lambda x, y: y * _sigmoid(-x))
_softplus = _with_derivative(elementary.softplus, lambda x, y: _sigmoid(x))
_tanh = _with_derivative(
  elementary.tanh, lambda x, y: 4.0 * _sigmoid(2.0 * x) * _sigmoid(-2.0 * x)
)
# e^(-k x^2)
_bell = {
  k: _with_derivative(
    functools.partial(elementary.bell, k=k),
    lambda x, y, k=k: (-2.0 * k * x) * y,
  )
  for k in (0.5, 1.0)
}
_erf = _with_derivative(
  elementary.erf, lambda x, y: (2 / math.sqrt(math.pi)) * _bell[1.0](x)
)


def _density(x):
  return _bell[0.5](x) / math.sqrt(2 * math.pi)


def _distribution(x):
  """Phi(x) for |x| <= _FAR."""
  # Near 0 it is 1/2, and gelu(x) may be subnormal.
  near_0 = jnp.abs(x) < 2.0**-40
  quotient = elementary.gelu(x) / jnp.where(near_0, 1.0, x)
  return jnp.where(near_0, 0.5, quotient)


_normal = _with_derivative(_distribution, lambda x, y: _density(x))


def _gelu_slope(x, y):
  del y
  x = jnp.where(x > _FAR, _FAR, jnp.where(x < -_FAR, -_FAR, x))
  return _normal(x) + x * _density(x)


_gelu = _with_derivative(elementary.gelu, _gelu_slope)
