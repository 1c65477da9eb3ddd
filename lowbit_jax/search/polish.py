"""The last digits of a formula: minimax constants, and their float32 values.

`minimax` is successive linear programming (Osborne and Watson, "An algorithm
for minimax approximation in the nonlinear case", 1969) in 80-bit arithmetic.
At constants c with weighted errors e and Jacobian J it solves

  minimise t  subject to  |e_i + J_i d| <= t,  |d_k| <= rho max(|c_k|, 1e-3)

and moves to c + d if the largest error falls. The program sees every local
extremum of e and every fourth point between; the error is that of all points.

`float32_coefficients` starts where rounding those constants leaves off. It is
a coordinate search in units in the last place whose score is the error of the
compiled function, so that rounding in the evaluation is part of the problem
(the idea of Brisebarre and Chevillard, "Efficient polynomial L-infinity
approximations", 2007, there with lattice reduction and exact evaluation).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import numpy.typing as npt

from lowbit_jax.search import certify

Model = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Weight = Callable[[np.ndarray, np.ndarray], np.ndarray]

_LONG = np.longdouble
_POINTS = 1200  # even, so that no Chebyshev point is the middle of the interval
_REPORT = 16  # times as many points for the error that a fit reports
_GAIN = 1e-6  # relative fall of the error that still counts as progress
_STEPS = (1, 2, 3, 5, 9, 17, 40)  # units in the last place
_HARD = 2**12  # worst inputs, on which most moves fail already


@dataclasses.dataclass(frozen=True)
class Fit:
  """Constants and their errors.

  Attributes:
    constants: (K,) longdouble of `minimax`, float32 of `float32_coefficients`.
    error: largest error, in the unit of the weight, or in ULP of float32.
    iterations: linear programs solved, or calls of the compiled function.
  """

  constants: np.ndarray
  error: float
  iterations: int

  def decimals(self) -> tuple[str, ...]:
    """The constants as the shortest decimal strings that read back exactly."""
    return tuple(
      np.format_float_scientific(c, unique=True) for c in self.constants
    )


def polynomial(degree: int, *, parity: str | None = None) -> Model:
  """P(x), or with a parity P(x^2) ('even') or x P(x^2) ('odd').

  Args:
    degree: of P; the constants are c_0 ... c_degree.
    parity: None, 'even' or 'odd'.
  """
  return rational(degree, 0, parity=parity)


def rational(m: int, n: int, *, parity: str | None = None) -> Model:
  """R = P/Q of degrees m and n in x, or as in `polynomial` in x^2.

  Args:
    m: degree of P = c_0 + ... + c_m x^m, the first m + 1 constants.
    n: degree of Q = 1 + q_1 x + ... + q_n x^n, the other n.
    parity: None, 'even' for R(x^2) or 'odd' for x R(x^2).
  """
  for name, value in (('m', m), ('n', n)):
    if value < 0:
      raise ValueError(f'{name}={value} must be a degree, 0 or more')
  if parity not in (None, 'even', 'odd'):
    raise ValueError(f"parity={parity!r} must be None, 'even' or 'odd'")

  def model(x, c):
    z = x if parity is None else x * x
    factor = x if parity == 'odd' else np.ones_like(x)
    powers = z[:, None] ** np.arange(max(m, n) + 1)
    p = factor * (powers[:, : m + 1] @ c[: m + 1])
    q = 1 + powers[:, 1 : n + 1] @ c[m + 1 :]
    y = p / q
    jacobian = np.concatenate(
      [
        factor[:, None] * powers[:, : m + 1],
        -y[:, None] * powers[:, 1 : n + 1],
      ],
      axis=1,
    )
    return y, jacobian / q[:, None]

  return model


def rational_start(
  m: int,
  n: int,
  reference: Callable[[np.ndarray], np.ndarray],
  interval: tuple[float, float],
  *,
  parity: str | None = None,
) -> np.ndarray:
  """Constants for `rational` by linear least squares on P - f (Q - 1) = f.

  Arguments as in `rational` and `minimax`. The equations are divided by f.

  Returns:
    (m + n + 1,) longdouble, near enough for `minimax` to find the rest.
  """
  x = chebyshev(interval, _POINTS)
  f, w = _weighted(reference, x, 'rel')
  zeros = np.zeros(m + n + 1, _LONG)
  p = rational(m, 0, parity=parity)(x, zeros[: m + 1])[1]
  q = rational(n, 0, parity=None if parity is None else 'even')(x, zeros[m:])[1]
  a = (np.concatenate([p, -f[:, None] * q[:, 1:]], axis=1)) * w[:, None]
  scale = np.max(np.abs(a), axis=0)
  solution = np.linalg.lstsq(
    (a / scale).astype(np.float64), (f * w).astype(np.float64), rcond=None
  )
  return solution[0] / scale


def extended(exact: Callable) -> Callable[[np.ndarray], np.ndarray]:
  """A longdouble reference from a function of mpmath numbers.

  Args:
    exact: from mpf to mpf, such as `mpmath.erf`; evaluated with 30 digits.

  Raises:
    ImportError: without mpmath, when it is called.
  """

  def reference(x):
    mpmath = certify.import_mpmath()
    with mpmath.workdps(30):
      return np.array([_to_long(exact(_to_mpf(mpmath, v))) for v in x])

  return reference


def _to_mpf(mpmath, value):
  high = float(value)
  return mpmath.mpf(high) + mpmath.mpf(float(value - _LONG(high)))


def _to_long(value):
  high = float(value)
  return _LONG(high) + _LONG(float(value - high))


def minimax(
  model: Model,
  reference: Callable[[np.ndarray], np.ndarray],
  interval: tuple[float, float],
  start: Iterable[float | str],
  *,
  weight: str | Weight = 'rel',
) -> Fit:
  """Constants with the smallest largest error, near a start.

  Linear models have one minimum, which any start reaches, zeros too. Others
  may have several; their result is the minimum of the basin of `start`.

  Args:
    model: from longdouble x (N,) and constants (K,) to values (N,) and their
      derivatives by the constants (N, K).
    reference: the function, from longdouble to longdouble (N,); `extended`
      makes one from mpmath.
    interval: (lo, hi), finite; the end points themselves are not evaluated.
    start: (K,) numbers or decimal strings.
    weight: 'rel' divides the error by |f(x)|, 'abs' does not; or a function of
      x and f, (N,) both, to what the error is multiplied with, (N,).

  Returns:
    The fit; its error is the largest on 16 times as many points as were fitted.

  Raises:
    ImportError: without SciPy.
    ValueError: for arguments that do not fit, a reference that is not finite
      or, with 'rel', zero inside, or a start whose error is not finite.
  """
  c = np.array([_LONG(v) for v in start])
  if weight not in ('rel', 'abs') and not callable(weight):
    raise ValueError(f"weight={weight!r} must be 'rel', 'abs' or a function")
  # Chebyshev points are dense at the ends, where the error changes fastest.
  x = chebyshev(interval, _POINTS)
  f, w = _weighted(reference, x, weight)

  def errors(c):
    with np.errstate(all='ignore'):
      y, jacobian = model(x, c)
      e, jacobian = (y - f) * w, jacobian * w[:, None]
    finite = np.all(np.isfinite(e)) and np.all(np.isfinite(jacobian))
    return e, jacobian, np.max(np.abs(e)) if finite else _LONG(np.inf)

  e, jacobian, error = errors(c)
  if not np.isfinite(error):
    raise ValueError(
      f'start={[str(v) for v in c]} has errors that are not finite on'
      f' {interval}; give constants without poles there'
    )
  # Steps of linear programs within a trust region of relative size rho, which
  # grows where a step lowers the error and shrinks where it does not.
  rho, iterations = 1.0, 0
  while rho > 1e-12 and error > 0:
    d, predicted = _linear_program(e, jacobian, rho * np.maximum(abs(c), 1e-3))
    iterations += 1
    trial = errors(c + d)
    gain = (error - trial[2]) / error
    if gain > 0:
      c, (e, jacobian, error) = c + d, trial
      rho *= 2
    else:
      rho /= 4
    if predicted < _GAIN or 0 < gain < _GAIN:
      break
  # The reported error is that between the points, too.
  fine = chebyshev(interval, _REPORT * _POINTS)
  f, w = _weighted(reference, fine, weight)
  with np.errstate(all='ignore'):
    error = np.max(np.abs((model(fine, c)[0] - f) * w))
  return Fit(c, float(error), iterations)


def chebyshev(interval: tuple[float, float], points: int) -> np.ndarray:
  """Chebyshev points of the first kind, longdouble (points,), increasing.

  Raises:
    ValueError: if the interval is not finite or empty.
  """
  lo, hi = (_LONG(v) for v in interval)
  if not (np.isfinite(lo) and np.isfinite(hi) and lo < hi):
    raise ValueError(f'interval={interval} must be finite with lo < hi')
  angle = (2 * np.arange(points, dtype=_LONG) + 1) / (2 * points)
  return (lo + hi) / 2 - (hi - lo) / 2 * np.cos(angle * _LONG(np.pi))


def _weighted(reference, x, weight):
  f = np.asarray(reference(x), _LONG)
  if not np.all(np.isfinite(f)):
    at = x[~np.isfinite(f)][0]
    raise ValueError(f'the reference is not finite at x={at}; shrink interval')
  if callable(weight):
    return f, np.asarray(weight(x, f), _LONG)
  if weight == 'abs':
    return f, np.ones_like(f)
  if np.any(f == 0):
    raise ValueError(
      f"the reference is 0 at x={x[f == 0][0]}; use weight='abs' or an interval"
      ' without zeros'
    )
  return f, 1 / np.abs(f)


def _linear_program(e, jacobian, radius):
  """The step d and the relative fall of the error that it promises.

  In units of the error and with columns of maximum 1, since HiGHS works in
  float64 with absolute tolerances.
  """
  try:
    from scipy import optimize
  except ImportError as error:
    raise ImportError(
      'minimax needs SciPy; install it with `pip install lowbit-jax[search]`'
    ) from error

  error = np.max(np.abs(e))
  size = np.abs(e)
  peak = np.r_[True, size[1:] >= size[:-1]] & np.r_[size[:-1] >= size[1:], True]
  peak[::4] = True
  scale = np.max(np.abs(jacobian), axis=0) / error
  scale[scale == 0] = 1
  a = (jacobian[peak] / (error * scale)).astype(np.float64)
  b = (e[peak] / error).astype(np.float64)
  ones = np.ones((len(b), 1))
  bound = (radius * scale).astype(np.float64)
  result = optimize.linprog(
    np.r_[np.zeros(a.shape[1]), 1],
    A_ub=np.block([[a, -ones], [-a, -ones]]),
    b_ub=np.r_[-b, b],
    bounds=[*zip(-bound, bound, strict=True), (0, None)],
    method='highs',
    options={
      'primal_feasibility_tolerance': 1e-10,
      'dual_feasibility_tolerance': 1e-10,
    },
  )
  if result.x is None:
    return np.zeros_like(radius), np.inf
  return result.x[:-1] / scale, 1 - result.x[-1]


def float32_coefficients(
  fn: Callable,
  start: npt.ArrayLike,
  reference: Callable[[np.ndarray], np.ndarray],
  interval: tuple[float, float],
  *,
  samples: int = 2**21,
  evaluations: int = 2000,
  seed: int = 0,
) -> Fit:
  """Float32 constants that minimise the largest ULP error of compiled code.

  Moves one or two constants by up to 40 units in the last place, takes the
  first move that lowers the score and begins again, until none does or
  `evaluations` are spent. The constants are an argument of the compiled code;
  baked in, they are subject to constant folding: certify that code afterwards.

  Args:
    fn: from float32 constants (K,) and x (N,) to float32 (N,), traceable.
    start: (K,) numbers, rounded to float32.
    reference: the function in NumPy, from float64 to float64.
    interval: (lo, hi) of x.
    samples: inputs to score on, half of them uniform in x, half in bits.
    evaluations: limit on the moves that are tried.
    seed: of the inputs and of the order of moves.

  Returns:
    The fit, its error in ULP on the samples.

  Raises:
    ValueError: if constants or interval are not finite, or counts not positive.
  """
  c = np.array(start, np.float64).astype(np.float32)
  if c.ndim != 1 or not np.all(np.isfinite(c)):
    raise ValueError(f'start={start} must be a list of finite numbers')
  for name, value in (('samples', samples), ('evaluations', evaluations)):
    if value < 1:
      raise ValueError(f'{name}={value} must be positive')
  rng = np.random.default_rng(seed)
  x = _samples(rng, interval, samples)
  f = reference(x.astype(np.float64))
  compiled = jax.jit(fn)

  def errors(c, x, f):
    return certify.ulp_error(np.asarray(compiled(c, x)), f)

  def hardest(size):
    worst = np.argpartition(size, -min(_HARD, samples))[-_HARD:]
    return x[worst], f[worst]

  # Moves are first tried on the hardest samples, which reject most of them.
  size = errors(c, x, f)
  score, hard, count = np.max(size), hardest(size), 1
  moves = _moves(rng, len(c))
  while count < evaluations and (move := next(moves, None)) is not None:
    trial = _shifted(c, move)
    count += 1
    if not np.max(errors(trial, *hard)) < score:
      continue
    size = errors(trial, x, f)
    if np.max(size) < score:
      c, score, hard = trial, np.max(size), hardest(size)
      moves = _moves(rng, len(c))
  return Fit(c, float(score), count)


def _samples(rng, interval, count: int) -> np.ndarray:
  lo, hi = certify.positions(interval)
  bits = certify.from_position(rng.integers(lo, hi + 1, count - count // 2))
  value = rng.uniform(*interval, count // 2).astype(np.float32)
  return np.concatenate(
    [bits, np.clip(value, *certify.from_position([lo, hi]))]
  )


def _moves(rng, count: int) -> Iterator[tuple[tuple[int, int], ...]]:
  """Steps of one constant, then of two, as (index, units in the last place)."""
  steps = [sign * step for step in _STEPS for sign in (1, -1)]
  for size in (1, 2):
    moves = [
      tuple(zip(where, by, strict=True))
      for where in itertools.combinations(range(count), size)
      for by in itertools.product(steps, repeat=size)
    ]
    for i in rng.permutation(len(moves)):
      yield moves[i]


def _shifted(c, move):
  bits = c.view(np.int32).copy()  # of one sign, so units are steps of bits
  for index, by in move:
    bits[index] += by
  return bits.view(np.float32)
