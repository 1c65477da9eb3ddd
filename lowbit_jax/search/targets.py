"""Targets of a search: functions of one variable, and their core problems.

Symmetry halves the work, so a program stands for a core p of z:

  parity None   f(x) = p(x)                    z = x
  'root'        f(x) = x p(x)                  z = x
  'even'        f(x) = offset x + p(x^2)       z = x^2
  'odd'         f(x) = offset + x p(x^2)       z = x^2

'root' is for functions with a zero at 0, whose relative error needs the factor.
An error of the core is weighted so that it counts as the error of f it causes.
Wrappers excepted, everything here is NumPy and mpmath and does not depend on
modes of JAX.
"""

import ast
import dataclasses
import functools
import keyword
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from lowbit_jax.search import certify, fit, polish
from lowbit_jax.search.program import ADD, MUL, OPS, Program
from lowbit_pallas.arith import elementary

_DIGITS = 40  # ten more than needed, for what subtracting an offset cancels
_TINY = 2.0**-60  # stands for z = 0 in quotients by x
_FRACTION_BITS = {'ulp32': 23, 'ulp_bf16': 7}
_PARITIES = (None, 'root', 'even', 'odd')
_WEIGHTS = ('rel', 'abs', *_FRACTION_BITS)


@dataclasses.dataclass(frozen=True)
class Target:
  """A function on an interval.

  Attributes:
    name: of the function, an ASCII identifier of Python that is no keyword.
    exact: f, from an mpmath number to one. It must follow the precision in
      force: `x.context.exp(x)`, not `math.exp(x)`.
    interval: (lo, hi) of x, finite. If parity is 'even' or 'odd' it must be
      (-hi, hi) or (0, hi), and the core is one on (0, hi^2) in both cases.
    parity: None, 'root', 'even' or 'odd'; see the module.
    weight: what divides the error: 'rel' |f|, 'abs' 1, 'ulp32' the unit in the
      last place of f in float32 (of `certify`), 'ulp_bf16' that in bfloat16.
    offset: see the module; 0 unless parity is 'even' or 'odd'.
    wrapper: from a float32 JAX function that is f on `reduced` to one that is f
      everywhere, or None. Those of sin and cos take |x| <= 1e5, and the other
      of the two from JAX: `functools.partial` can bind another.
    reduced: the interval of x on which the wrapper calls its argument.
    derivative: f' as a Python expression in x, f, jnp and lax, such as
      '1 - f * f', for emitted code; None for what autodiff makes of it.

  Raises:
    TypeError: if exact or wrapper is not a function.
    ValueError: for anything else that is not as above.

  Examples:
    >>> log2 = Target(
    ...   'log2_of_one_plus',
    ...   exact=lambda x: x.context.log(1 + x, 2),
    ...   interval=(-0.29, 0.41),
    ...   parity='root',
    ... )
    >>> samples(log2).x.shape
    (40,)
  """

  name: str
  exact: Callable[[Any], Any]
  interval: tuple[float, float]
  parity: str | None = None
  weight: str = 'rel'
  offset: float = 0.0
  wrapper: Callable[[Callable], Callable] | None = None
  reduced: tuple[float, float] | None = None
  derivative: str | None = None

  def __post_init__(self) -> None:
    if not (
      isinstance(self.name, str)
      and self.name.isascii()
      and self.name.isidentifier()
      and not keyword.iskeyword(self.name)
    ):
      raise ValueError(
        f'name={self.name!r} must be an ASCII identifier of Python and no'
        ' keyword'
      )
    if not callable(self.exact):
      raise TypeError(f'exact={self.exact!r} must be a function of mpmath mpf')
    _check_interval('interval', self.interval)
    if self.parity not in _PARITIES:
      raise ValueError(f'parity={self.parity!r} must be one of {_PARITIES}')
    if self.weight not in _WEIGHTS:
      raise ValueError(f'weight={self.weight!r} must be one of {_WEIGHTS}')
    lo, hi = self.interval
    if self.parity in ('even', 'odd'):
      if lo not in (0, -hi):
        raise ValueError(
          f'interval={self.interval} with parity={self.parity!r} must be'
          f' ({-hi}, {hi}) or (0, {hi})'
        )
    elif self.offset != 0:
      raise ValueError(
        f"offset={self.offset} needs parity='even' or 'odd'; add it in exact"
      )
    if not math.isfinite(self.offset):
      raise ValueError(f'offset={self.offset} must be finite')
    if self.wrapper is not None:
      if not callable(self.wrapper):
        raise TypeError(f'wrapper={self.wrapper!r} must be a function')
      _check_interval('reduced', self.reduced)
    if self.derivative is not None:
      _check_derivative(self.derivative)


def _check_interval(name, interval):
  try:
    lo, hi = (float(v) for v in interval)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{name}={interval!r} must be two numbers') from error
  if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
    raise ValueError(f'{name}={interval} must be finite with lo < hi')


def _check_derivative(text):
  try:
    tree = ast.parse(text, mode='eval')
  except (SyntaxError, TypeError) as error:
    raise ValueError(
      f'derivative={text!r} must be a Python expression'
    ) from error
  names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
  if unknown := names - {'x', 'f', 'jnp', 'lax'}:
    raise ValueError(
      f'derivative={text!r} uses {sorted(unknown)}; it has x, f, jnp and lax'
    )


_LN2 = math.log(2)

TARGETS = {
  target.name: target
  for target in (
    Target(
      'exp',
      lambda x: x.context.exp(x),
      (-0.3466, 0.3466),
      wrapper=elementary.exp_split,
      reduced=(-0.3466, 0.3466),
      derivative='f',
    ),
    Target(
      'exp2',
      lambda x: x.context.mpf(2) ** x,
      (0.0, 1.0),
      wrapper=elementary.exp2_split,
      reduced=(-0.5, 0.5),
      derivative=f'{_LN2!r} * f',
    ),
    Target(
      'expm1',
      lambda x: x.context.expm1(x),
      (-_LN2 / 2, _LN2 / 2),
      parity='root',
      derivative='1 + f',
    ),
    Target(
      'log',
      lambda x: x.context.log(x),
      (1.0, 2.0),
      weight='abs',
      derivative='1 / x',
    ),
    Target(
      'log2',
      lambda x: x.context.log(x, 2),
      (1.0, 2.0),
      weight='abs',
      wrapper=elementary.log2_split,
      reduced=(math.sqrt(0.5), math.sqrt(2)),
      derivative=f'{1 / _LN2!r} / x',
    ),
    Target(
      'log1p',
      lambda x: x.context.log1p(x),
      (math.sqrt(0.5) - 1, math.sqrt(2) - 1),
      parity='root',
      derivative='1 / (1 + x)',
    ),
    Target(
      'sin',
      lambda x: x.context.sin(x),
      (-math.pi / 4, math.pi / 4),
      parity='odd',
      wrapper=functools.partial(elementary.sin_pio2, cos_core=lax.cos),
      reduced=(-math.pi / 4, math.pi / 4),
      derivative='jnp.cos(x)',
    ),
    Target(
      'cos',
      lambda x: x.context.cos(x),
      (-math.pi / 4, math.pi / 4),
      parity='even',
      wrapper=functools.partial(elementary.sin_pio2, lax.sin, quarters=1),
      reduced=(-math.pi / 4, math.pi / 4),
      derivative='-jnp.sin(x)',
    ),
    Target(
      'tanh',
      lambda x: x.context.tanh(x),
      (-9.0, 9.0),
      parity='odd',
      wrapper=functools.partial(elementary.odd_clamp, limit=9.0),
      reduced=(0.0, 9.0),
      derivative='(1 - f) * (1 + f)',
    ),
    Target(
      'sigmoid',
      lambda x: 1 / (1 + x.context.exp(-x)),
      (-18.0, 18.0),
      parity='odd',
      weight='abs',
      offset=0.5,
      derivative='f * (1 - f)',
    ),
    Target(
      'erf',
      lambda x: x.context.erf(x),
      (-4.0, 4.0),
      parity='odd',
      wrapper=functools.partial(elementary.odd_clamp, limit=4.0),
      reduced=(0.0, 4.0),
      derivative=f'{2 / math.sqrt(math.pi)!r} * jnp.exp(-x * x)',
    ),
    Target(
      'gelu',
      lambda x: x * x.context.ncdf(x),
      (-5.5, 5.5),
      parity='even',
      weight='abs',
      offset=0.5,
      derivative=(
        f'0.5 * (1 + lax.erf({math.sqrt(0.5)!r} * x))'
        f' + {1 / math.sqrt(2 * math.pi)!r} * x * jnp.exp(-0.5 * x * x)'
      ),
    ),
    Target(
      'softplus',
      lambda x: x.context.log1p(x.context.exp(x)),
      (-18.0, 18.0),
      parity='even',
      weight='abs',
      offset=0.5,
      derivative='-jnp.expm1(-f)',
    ),
    Target(
      'rsqrt',
      lambda x: 1 / x.context.sqrt(x),
      (1.0, 4.0),
      derivative='-0.5 * f / x',
    ),
    Target(
      'airy_ai',
      lambda x: x.context.airyai(x),
      (-7.0, 0.0),
      weight='abs',
    ),
  )
}


def get(name: str) -> Target:
  """The target of a name in `TARGETS`.

  Another interval is `dataclasses.replace(target, interval=(lo, hi))`.

  Raises:
    ValueError: for another name, with those that exist.
  """
  if name not in TARGETS:
    raise ValueError(f'name={name!r} must be one of {", ".join(TARGETS)}')
  return TARGETS[name]


def reference(target: Target) -> Callable[[np.ndarray], np.ndarray]:
  """f in NumPy, from float64 to float64, as `certify` takes it.

  Of NumPy or SciPy for the functions in `TARGETS` that they have to within a
  few units of float64, else by mpmath, some 1e4 values a second.

  Raises:
    ImportError: without SciPy where that has the function, or without mpmath.
  """
  known = TARGETS.get(target.name)
  if known is not None and known.exact is target.exact:
    if target.name in _SCIPY:
      try:
        from scipy import special
      except ImportError as error:
        raise ImportError(
          f'the reference of {target.name} needs SciPy; install it with `pip'
          ' install lowbit-jax[search]`'
        ) from error
      return functools.partial(_SCIPY[target.name], special)
    if target.name in _NUMPY:
      return _NUMPY[target.name]
  plain = dataclasses.replace(target, parity=None, offset=0.0)
  exact = polish.extended(lambda x: _without_factor(plain, x, 1))
  return lambda x: exact(x).astype(np.float64)


_NUMPY = {
  name: getattr(np, name)
  for name in (
    'exp', 'exp2', 'expm1', 'log', 'log2', 'log1p', 'sin', 'cos', 'tanh',
  )
} | {
  'softplus': lambda x: np.logaddexp(0, x),
  'rsqrt': lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_SCIPY = {
  'erf': lambda special, x: special.erf(x),
  'gelu': lambda special, x: x * special.ndtr(x),
  'sigmoid': lambda special, x: special.expit(x),
}


def core_interval(target: Target) -> tuple[float, float]:
  """The interval of z."""
  lo, hi = (float(v) for v in target.interval)
  return (0.0, hi * hi) if _squared(target) else (lo, hi)


def extra_operations(target: Target) -> int:
  """Operations that lead from x to z and from the core to f."""
  count = {None: 0, 'root': 1, 'even': 1, 'odd': 2}[target.parity]
  if target.offset != 0:
    count += 1 if target.parity == 'odd' else 2
  return count


def is_wrappable(target: Target) -> bool:
  """Whether it has a wrapper, and a core on its interval is enough for that."""
  if target.wrapper is None or target.reduced is None:
    return False
  (lo, hi), (first, last) = target.interval, target.reduced
  return lo <= first and last <= hi


def assemble(target: Target, core: Program) -> Program:
  """f on the interval as a program of x, from a core as a program of z."""
  constants = core.constants
  if target.offset != 0:
    constants += (target.offset,)
  k = len(core.constants)
  first = 1 + len(constants)
  rows = [(MUL, 0, 0, 0)] if _squared(target) else []
  z = first if rows else 0
  shift = first - (1 + k) + len(rows)

  def register(r):
    return z if r == 0 else r if r <= k else r + shift

  for op, *operands in core.rows:
    arity = OPS[op].arity
    a, b, c = (*map(register, operands[:arity]), *operands[arity:])
    rows.append((op, a, b, c))
  p = register(k + len(core.rows) if core.rows else 0)
  if _product(target):
    rows.append((MUL, 0, p, 0))
    p = first + len(rows) - 1
  if target.offset != 0:
    term = first - 1
    if not _product(target):
      rows.append((MUL, 0, term, 0))
      term = first + len(rows) - 1
    rows.append((ADD, p, term, 0))
  return Program(tuple(rows), constants)


def samples(target: Target, points: int = 40, dense: int = 1000) -> fit.Samples:
  """The core at Chebyshev points of the first kind in z, which exclude ends.

  Args:
    target: the function.
    points: number of points to fit.
    dense: number of points to judge on.

  Returns:
    float64 arrays: z, p(z) rounded once, and the weights of the error of p. The
    dense z are float32 numbers.

  Raises:
    ImportError: without mpmath.
    ValueError: if a count is not positive, if f is not a finite real number at
      a point or an end, with that x, or if the weight is 'rel' and f has a zero
      that parity does not account for.
  """
  for name, value in (('points', points), ('dense', dense)):
    if value < 1:
      raise ValueError(f'{name}={value} must be positive')
  interval = core_interval(target)
  reference = core_reference(target)
  weight = core_weight(target)
  result = []
  for count, dtype in ((dense, np.float32), (points, np.float64)):
    z = polish.chebyshev(interval, count).astype(dtype).astype(np.float64)
    p = reference(z)
    _check_symmetry(target, z, p)
    _check_zeros(target, z, p)
    result.append([v.astype(np.float64) for v in (z, p, weight(z, p))])
  return fit.Samples(*result[1], *result[0])


def _check_symmetry(target, z, p):
  """At a few points, that the core at -x is the core at x."""
  if not (_squared(target) and target.interval[0] < 0):
    return
  few = slice(None, None, max(len(z) // 8, 1))
  other = polish.extended(lambda z: _core(target, z, -1))(z[few])
  wrong = abs(other - p[few]) > 1e-12 * abs(p[few])
  if wrong.any():
    raise ValueError(
      f'{target.name} has no parity={target.parity!r} with offset='
      f'{target.offset} at x=+-{np.sqrt(z[few][wrong][0]):.6g}; correct them,'
      f' or use interval=(0, {target.interval[1]})'
    )


def _check_zeros(target, z, p):
  """The ends, and for 'rel' zeros that are an end or where the sign changes."""
  ends = np.array(core_interval(target))
  limits = core_reference(target)(ends)
  if target.weight != 'rel':
    return
  z = np.concatenate([ends[:1], z, ends[1:]])
  p = np.concatenate([limits[:1], p, limits[1:]])
  for f in _sides(target, z, p):
    zero = f == 0
    zero[1:] |= f[1:] * f[:-1] < 0
    if zero.any():
      at = z[np.argmax(zero)]
      raise ValueError(
        f"weight='rel' divides by {target.name}, which is 0 near"
        f' x={math.sqrt(at) if _squared(target) else at:.6g}; use'
        " weight='abs', a parity or another interval"
      )


def core_reference(target: Target) -> Callable[[np.ndarray], np.ndarray]:
  """p in longdouble, from z (N,) to (N,), for `polish.minimax`.

  It raises ValueError where f is not a finite real number, with that x.
  """
  return polish.extended(lambda z: _core(target, z))


def _core(target, z, sign=1):
  f = _without_factor(target, z, sign)
  if target.offset == 0:
    return f
  mpmath = certify.import_mpmath()
  with mpmath.workdps(_DIGITS):
    x = sign * _variable(target, z, mpmath.sqrt)
    return f - target.offset * (1 / x if _product(target) else x)


def _without_factor(target, z, sign):
  """f(x) or, where the core is a quotient by x, f(x) / x, at x or -x."""
  mpmath = certify.import_mpmath()
  with mpmath.workdps(_DIGITS):
    x = sign * _variable(target, z, mpmath.sqrt)
    try:
      f = mpmath.mpmathify(target.exact(x))
    except (ArithmeticError, ValueError) as error:
      raise ValueError(
        f'{target.name} fails at x={mpmath.nstr(x, 17)} ({error});'
        ' shrink interval'
      ) from error
    if mpmath.im(f) != 0 or not mpmath.isfinite(f):
      raise ValueError(
        f'{target.name} is {mpmath.nstr(f)} at x={mpmath.nstr(x, 17)}; shrink'
        ' interval to where it is real and finite'
      )
    return mpmath.re(f) / x if _product(target) else mpmath.re(f)


def core_weight(target: Target) -> Callable[[np.ndarray, np.ndarray], Any]:
  """From z and p(z), (N,) both, to the weight (N,) of an error of p.

  On a symmetric interval the larger of the weights at x and -x.
  """

  def weight(z, p):
    factor = abs(_variable(target, z)) if _product(target) else np.ones_like(z)
    if target.weight == 'abs':
      return factor
    units = [_unit(target, f * factor) for f in _sides(target, z, p)]
    return factor / np.minimum.reduce(units)

  return weight


def _sides(target, z, p):
  """f at x, and at -x if that is another value, without the factor x."""
  if target.offset == 0:
    return [p]
  # Where the terms of f cancel, p does not determine it.
  signs = (1, -1) if target.interval[0] < 0 else (1,)
  return [
    polish.extended(lambda z, s=s: _without_factor(target, z, s))(z)
    for s in signs
  ]


def _variable(target, z, sqrt=np.sqrt):
  """x of z, not 0 where the core is a quotient by x."""
  if _product(target):
    z = z + _TINY * (z == 0)
  return sqrt(z) if _squared(target) else z


def _unit(target, f):
  if target.weight == 'rel':
    return abs(f)
  bits = _FRACTION_BITS['ulp32'] - _FRACTION_BITS[target.weight]
  return certify.ulp32(f.astype(np.float64)) * 2.0**bits


def model(program: Program) -> polish.Model:
  """A program as `polish.minimax` takes it; constants are those it is given."""
  return program.value_and_jacobian


def _squared(target) -> bool:
  return target.parity in ('even', 'odd')


def _product(target) -> bool:
  return target.parity in ('root', 'odd')
