"""How the loss of a trained model depends on its floating-point format.

The scaling law of "Scaling Laws for Floating-Point Quantization Training" (ICML
2025), fitted there to 358 language models whose weights (forward and for the
input gradient) and activations (for the weight gradient) were fake-quantized:

  L(N, D, E, M, B) = n / N^alpha + d / D^beta + epsilon
      + (D^beta / N^alpha) log2(B) / (gamma (E + 1/2)^delta (M + 1/2)^nu)

N is the number of weights in the matrices of the blocks, without embeddings, D
the number of training tokens, E and M the exponent and mantissa bits of the
elements, and B the number of elements that share a scale, in float32. Arguments
are numbers or NumPy arrays that broadcast. An unquantized model is E8M23.

The constants belong to one family of models, data and tokenizer, 41 to 679
million weights and 10 to 100 billion tokens; the paper checked predictions up
to 70 billion. `fit` finds those of another family. Single exponents are poorly
determined by a sweep of usual size, predictions far better, so intervals come
from `bootstrap`.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize

CHANNEL_BLOCK = 2**13.1567  # B that stands for one scale per channel
_COST_PER_BIT = 6 / 16  # C = 6 N D operations at P = 16 bits
_LOG_RANGE = 60.0  # constants stay within e^-60 ... e^60 in a fit


Numbers = np.float64 | np.ndarray  # a float64 for numbers, else an array


@dataclasses.dataclass(frozen=True)
class FloatLaw:
  """The law with its constants; those of the paper by default.

  Attributes:
    n: scale of the term of model size.
    alpha: exponent of N.
    d: scale of the term of data size.
    beta: exponent of D.
    epsilon: loss at infinite N and D, in the unit of the loss.
    gamma: scale of the precision term.
    delta: exponent of E + 1/2.
    nu: exponent of M + 1/2.

  Examples:
    >>> law = FloatLaw()
    >>> round(float(law.loss(N=1.2e9, D=100e9, E=4, M=3, B=CHANNEL_BLOCK)), 4)
    2.5418
    >>> law.split(8)
    (4, 3)
  """

  n: float = 69.2343
  alpha: float = 0.2368
  d: float = 68973.0621
  beta: float = 0.5162
  epsilon: float = 1.9061
  gamma: float = 11334.5197
  delta: float = 3.1926
  nu: float = 2.9543

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not (isinstance(value, numbers.Real) and 0 < float(value) < np.inf):
        raise ValueError(
          f'{field.name}={value} must be a positive number: the terms of the'
          ' law are positive and fall with N, D, E and M'
        )

  def unquantized_loss(self, N: npt.ArrayLike, D: npt.ArrayLike) -> Numbers:
    """n / N^alpha + d / D^beta + epsilon.

    Args:
      N: weights in matrices.
      D: training tokens.
    """
    N, D = _positive('N', N), _positive('D', D)
    return self.n / N**self.alpha + self.d / D**self.beta + self.epsilon

  def precision(self, E: npt.ArrayLike, M: npt.ArrayLike) -> Numbers:
    """gamma (E + 1/2)^delta (M + 1/2)^nu, what a format divides the gap by.

    Args:
      E: exponent bits, 0 or more.
      M: mantissa bits without the implied one, 0 or more.
    """
    E, M = _at_least(0, 'E', E), _at_least(0, 'M', M)
    return self.gamma * (E + 0.5) ** self.delta * (M + 0.5) ** self.nu

  def gap(
    self,
    N: npt.ArrayLike,
    D: npt.ArrayLike,
    E: npt.ArrayLike,
    M: npt.ArrayLike,
    B: npt.ArrayLike,
  ) -> Numbers:
    """The last term: what the format costs.

    Args:
      N: weights in matrices.
      D: training tokens.
      E: exponent bits.
      M: mantissa bits.
      B: elements per scale, 1 or more; CHANNEL_BLOCK for one per channel.
    """
    N, D = _positive('N', N), _positive('D', D)
    B = _at_least(1, 'B', B)
    ratio = D**self.beta / N**self.alpha
    return ratio * np.log2(B) / self.precision(E, M)

  def loss(
    self,
    N: npt.ArrayLike,
    D: npt.ArrayLike,
    E: npt.ArrayLike,
    M: npt.ArrayLike,
    B: npt.ArrayLike,
  ) -> Numbers:
    """L(N, D, E, M, B); arguments as in `gap`."""
    return self.unquantized_loss(N, D) + self.gap(N, D, E, M, B)

  def critical_data(
    self, N: npt.ArrayLike, E: npt.ArrayLike, M: npt.ArrayLike, B: npt.ArrayLike
  ) -> Numbers:
    """Tokens beyond which more data make the loss worse.

    The minimum over D of d / D^beta + gap:

      D_crit = [d gamma N^alpha (E+1/2)^delta (M+1/2)^nu / log2 B]^(1/(2 beta))

    Args:
      N: weights in matrices; also E, M as in `gap`.
      E: exponent bits.
      M: mantissa bits.
      B: elements per scale, more than 1 (scales for single elements have no
        gap).
    """
    N, B = _positive('N', N), _at_least(1, 'B', B)
    if np.any(B <= 1):
      raise ValueError('B=1 has no critical data size; give a B above 1')
    ratio = self.d * N**self.alpha * self.precision(E, M) / np.log2(B)
    return ratio ** (1 / (2 * self.beta))

  def optimal_mantissa(self, bits: npt.ArrayLike) -> Numbers:
    """M* = nu P / (delta + nu) - 1/2 of P = E + M + 1 bits, a real number.

    The exponent gets the rest: E* = delta P / (delta + nu) - 1/2.

    Args:
      bits: P, with the sign.
    """
    bits = _at_least(1, 'bits', bits)
    return self.nu * bits / (self.delta + self.nu) - 0.5

  def split(self, bits: int) -> tuple[int, int]:
    """The integers (E, M), E + M + 1 = bits, of the smallest gap."""
    if not isinstance(bits, numbers.Real) or not 2 <= bits <= 64 or bits % 1:
      raise ValueError(
        f'bits={bits!r} must be an integer of at least 2, a sign and E + M, and'
        ' at most 64'
      )
    options = [(E, int(bits) - 1 - E) for E in range(int(bits))]
    return max(options, key=lambda option: float(self.precision(*option)))

  def optimal_precision(self, D: npt.ArrayLike, B: npt.ArrayLike) -> Numbers:
    """Bits P that are worth computing with at a given size of data.

    At the cost C = k N P D a smaller P buys a larger N. With the best split,
    precision(E*, M*) = gamma_rho P^(delta+nu), and

      P^(delta+nu) = gamma_D D^beta log2 B
      gamma_D = (delta + nu - alpha) / (n alpha gamma_rho)
      gamma_rho = gamma delta^delta nu^nu / (delta + nu)^(delta+nu).

    It does not depend on C.

    Args:
      D: training tokens.
      B: elements per scale.

    Returns:
      P, a real number that counts the sign bit.
    """
    D, B = _positive('D', D), _at_least(1, 'B', B)
    power = self._gamma_data * D**self.beta * np.log2(B)
    return power ** (1 / (self.delta + self.nu))

  def compute_optimal_precision(
    self, C: npt.ArrayLike, B: npt.ArrayLike, k: float = _COST_PER_BIT
  ) -> Numbers:
    """Bits P where N, D and P are free at the cost C = k N P D.

      P^((delta+nu)(alpha+beta)/beta + alpha)
          = lam (gamma_D log2 B)^((alpha+beta)/beta) (C/k)^alpha
      lam = (d beta / (n alpha)) (delta+nu-alpha) / (delta+nu+beta)

    Args:
      C: cost in operations of 16-bit multiplications and additions.
      B: elements per scale, more than 1.
      k: cost of a bit, a weight and a token: 6 operations at 16 bits.

    Returns:
      P, a real number that counts the sign bit.
    """
    C, B = _positive('C', C), _at_least(1, 'B', B)
    a, b, e = self.alpha, self.beta, self.delta + self.nu
    lam = self.d * b / (self.n * a) * (e - a) / (e + b)
    scale = self._gamma_data * np.log2(B)
    power = lam * scale ** ((a + b) / b) * (C / k) ** a
    return power ** (1 / (e * (a + b) / b + a))

  @property
  def _gamma_data(self) -> float:
    """gamma_D of `optimal_precision`."""
    e = self.delta + self.nu
    if e <= self.alpha:
      raise ValueError(
        f'delta + nu = {e} must be larger than alpha = {self.alpha}: otherwise'
        ' more weights are always worth more than more bits'
      )
    shares = (self.delta / e) ** self.delta * (self.nu / e) ** self.nu
    return (e - self.alpha) / (self.n * self.alpha * self.gamma * shares)


class Record(NamedTuple):
  """One trained model.

  Attributes:
    N: weights in matrices.
    D: training tokens.
    E: exponent bits (8 for an unquantized model).
    M: mantissa bits (23 for an unquantized model).
    B: elements per scale.
    loss: its measured loss.
  """

  N: float
  D: float
  E: float
  M: float
  B: float
  loss: float


class Fit(NamedTuple):
  """A fitted law.

  Attributes:
    law: the law with the smallest cost.
    residuals: log of predicted over measured loss, one per record.
    cost: the Huber cost that was minimized, in units of huber^2.
    huber: its scale, log-loss.
  """

  law: FloatLaw
  residuals: np.ndarray
  cost: float
  huber: float

  @property
  def rms(self) -> float:
    """Root mean square of the residuals: about the relative noise."""
    return float(np.sqrt(np.mean(np.square(self.residuals))))


def fit(
  records: Sequence[Record],
  starts: int | Sequence[FloatLaw] = 16,
  huber: float = 1e-3,
  *,
  seed: int = 0,
) -> Fit:
  """Fits the eight constants to measured losses.

  Minimizes the Huber function of log L_hat - log L over the logarithms of the
  constants, from several starts, and keeps the best. A random start draws the
  four exponents and gets n, d, epsilon and 1 / gamma, in which the law is
  linear, by non-negative least squares.

  Args:
    records: at least eight measurements. Constants of which the records do not
      vary the factor (only one M, say) are not determined; predictions at those
      values still are.
    starts: a number of random starts, or the laws to start from.
    huber: residual, in log-loss, above which the cost grows linearly; about
      the noise of a measurement.
    seed: of the random starts.

  Returns:
    The fit. The same records and seed give the same bits on one machine.

  Raises:
    ValueError: for too few records or values outside of their range.
  """
  table = _table(records)
  if not huber > 0:
    raise ValueError(f'huber={huber} must be positive, in units of log-loss')
  if isinstance(starts, int):
    if starts < 1:
      raise ValueError(f'starts={starts} must be at least 1')
    generator = np.random.default_rng(seed)
    thetas = [_random_start(table, generator) for _ in range(starts)]
  else:
    thetas = [_theta(law) for law in starts]
    if not thetas:
      raise ValueError('starts is empty; give a law or a number of starts')
  results = [_minimize(table, theta, huber) for theta in thetas]
  best = min(results, key=lambda result: result.cost)
  residuals = _log_loss(best.x, table) - np.log(table.loss)
  return Fit(_law(best.x), residuals, float(best.cost), huber)


def bootstrap(
  records: Sequence[Record], fitted: Fit, *, resamples: int = 200, seed: int
) -> list[FloatLaw]:
  """Laws fitted to resampled residuals; their spread is the uncertainty.

  The residuals of the fit, inflated by sqrt(n / (n - 8)) for the eight fitted
  constants, are drawn with replacement, multiplied onto the fitted losses, and
  fitted again from the fitted law.

  Args:
    records: those of the fit, more than eight.
    fitted: their fit.
    resamples: number of laws.
    seed: of the draws.

  Returns:
    The laws; pass them to `interval`.
  """
  table = _table(records)
  count = len(table.loss)
  if count != len(fitted.residuals):
    raise ValueError(
      f'records has {count} entries, but the fit {len(fitted.residuals)}; pass'
      ' the records of the fit'
    )
  if count <= _CONSTANTS:
    raise ValueError(
      f'records has {count} entries: the residuals of {_CONSTANTS} constants'
      ' say nothing about the noise; measure more'
    )
  if resamples < 2:
    raise ValueError(f'resamples={resamples} must be at least 2')
  generator = np.random.default_rng(seed)
  start = _theta(fitted.law)
  center = _log_loss(start, table)
  residuals = fitted.residuals - np.mean(fitted.residuals)
  residuals *= np.sqrt(count / (count - _CONSTANTS))
  laws = []
  for _ in range(resamples):
    noise = generator.choice(residuals, count)
    resampled = table._replace(loss=np.exp(center - noise))
    laws.append(_law(_minimize(resampled, start, fitted.huber).x))
  return laws


def interval(
  laws: Sequence[FloatLaw],
  quantity: Callable[[FloatLaw], Any],
  level: float = 0.9,
) -> tuple[np.ndarray, np.ndarray]:
  """Percentile interval of a quantity over bootstrapped laws.

  Args:
    laws: from `bootstrap`.
    quantity: function of a law, such as `lambda law: law.nu` or
      `lambda law: law.loss(N, D, E, M, B)`; a number or an array.
    level: mass between the bounds.

  Returns:
    (low, high), of the shape of the quantity. It is about the law; a single
    new measurement adds its own noise.
  """
  if not 0 < level < 1:
    raise ValueError(f'level={level} must be between 0 and 1')
  values = np.stack([np.asarray(quantity(law), np.float64) for law in laws])
  tail = (1 - level) / 2
  low, high = np.quantile(values, [tail, 1 - tail], axis=0)
  return low, high


_CONSTANTS = len(dataclasses.fields(FloatLaw))


class _Table(NamedTuple):
  """Records as columns."""

  N: np.ndarray
  D: np.ndarray
  E: np.ndarray
  M: np.ndarray
  B: np.ndarray
  loss: np.ndarray


def _table(records: Sequence[Record]) -> _Table:
  columns = np.asarray([tuple(record) for record in records], np.float64)
  if columns.ndim != 2 or columns.shape[1] != len(Record._fields):
    raise ValueError(
      'records must be a sequence of Record(N, D, E, M, B, loss)'
    )
  if len(columns) < _CONSTANTS:
    raise ValueError(
      f'records has {len(columns)} entries; the law has {_CONSTANTS} constants'
      ' and needs as many measurements at least'
    )
  table = _Table(*columns.T)
  _positive('N', table.N)
  _positive('D', table.D)
  _at_least(0, 'E', table.E)
  _at_least(0, 'M', table.M)
  _at_least(1, 'B', table.B)
  _positive('loss', table.loss)
  return table


def _theta(law: FloatLaw) -> np.ndarray:
  """Logarithms of the constants in the order of the fields."""
  return np.log(np.asarray(dataclasses.astuple(law), np.float64))


def _law(theta: np.ndarray) -> FloatLaw:
  return FloatLaw(*(float(value) for value in np.exp(theta)))


def _terms(theta: np.ndarray, table: _Table):
  """The size, data and precision terms of the law, and epsilon."""
  alpha, beta, delta, nu = np.exp(theta[[1, 3, 6, 7]])
  size = np.exp(theta[0] - alpha * np.log(table.N))
  data = np.exp(theta[2] - beta * np.log(table.D))
  exponent = beta * np.log(table.D) - alpha * np.log(table.N) - theta[5]
  exponent -= delta * np.log(table.E + 0.5) + nu * np.log(table.M + 0.5)
  gap = np.exp(exponent) * np.log2(table.B)
  return size, data, np.exp(theta[4]), gap


def _log_loss(theta: np.ndarray, table: _Table) -> np.ndarray:
  size, data, epsilon, gap = _terms(theta, table)
  return np.log(size + data + epsilon + gap)


def _jacobian(theta: np.ndarray, table: _Table) -> np.ndarray:
  """d log L_hat / d theta, (records, constants)."""
  size, data, epsilon, gap = _terms(theta, table)
  alpha, beta, delta, nu = np.exp(theta[[1, 3, 6, 7]])
  columns = (
    size,
    -alpha * np.log(table.N) * (size + gap),
    data,
    beta * np.log(table.D) * (gap - data),
    np.full_like(size, epsilon),
    -gap,
    -delta * np.log(table.E + 0.5) * gap,
    -nu * np.log(table.M + 0.5) * gap,
  )
  total = size + data + epsilon + gap
  return np.stack(columns, axis=1) / total[:, None]


def _minimize(table: _Table, theta: np.ndarray, huber: float):
  target = np.log(table.loss)
  # Exponents above e^4 only overflow.
  upper = np.full(_CONSTANTS, _LOG_RANGE)
  upper[[1, 3, 6, 7]] = 4.0
  lower = np.full(_CONSTANTS, -_LOG_RANGE)
  lower[[1, 3, 6, 7]] = -8.0
  # In units of the Huber scale, because the tolerance of gradients is absolute.
  return optimize.least_squares(
    lambda t: (_log_loss(t, table) - target) / huber,
    np.clip(theta, lower + 1e-6, upper - 1e-6),
    lambda t: _jacobian(t, table) / huber,  # pyright: ignore[reportArgumentType]
    bounds=(lower, upper),
    loss='huber',
    x_scale='jac',
    max_nfev=400,
  )


def _random_start(table: _Table, generator: np.random.Generator) -> np.ndarray:
  """Random exponents and the best linear constants for them."""
  alpha, beta = np.exp(generator.uniform(np.log(0.05), np.log(1.0), 2))
  delta, nu = np.exp(generator.uniform(np.log(0.3), np.log(6.0), 2))
  theta = np.log([1.0, alpha, 1.0, beta, 1.0, 1.0, delta, nu])
  size, data, one, gap = _terms(theta, table)
  design = np.stack([size, data, np.full_like(size, one), gap], axis=1)
  design = design / table.loss[:, None]
  norms = np.linalg.norm(design, axis=0)
  norms = np.where(norms > 0, norms, 1.0)
  weights, _ = optimize.nnls(design / norms, np.ones_like(table.loss))
  n, d, epsilon, inverse = np.maximum(weights, 1e-4 * np.max(weights)) / norms
  theta[[0, 2, 4, 5]] = np.log([n, d, epsilon, 1 / inverse])
  return theta


def _real(name: str, value) -> np.ndarray:
  if np.iscomplexobj(value):
    raise TypeError(f'{name}={value!r} must be real')
  return np.asarray(value, np.float64)


def _positive(name: str, value) -> np.ndarray:
  value = _real(name, value)
  if not np.all((value > 0) & np.isfinite(value)):
    raise ValueError(f'{name} must be positive and finite, got {value}')
  return value


def _at_least(bound: float, name: str, value) -> np.ndarray:
  value = _real(name, value)
  if not np.all((value >= bound) & np.isfinite(value)):
    raise ValueError(f'{name} must be at least {bound} and finite, got {value}')
  return value
