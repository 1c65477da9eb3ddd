"""How the functions of `special` got their constants and certificates.

Each function of `lowbit_pallas.arith.elementary` has an entry: what it
approximates, in float64 and exactly; where; which minimax fits its constants
start from; and what its certificate vouches for.

`polish` repeats the search: `polish.minimax` for the constants of every core,
then `polish.float32_coefficients` on the compiled function. `certify` measures
the function that users call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import special
from lowbit_jax.search import certify as certificates, polish as polisher
from lowbit_pallas.arith import elementary

_LONG = np.longdouble
_LOG2_E = float(np.float32(1 / math.log(2)))
_HALF_LN2 = math.log(2) / 2
_INF = math.inf
_MAX = float(np.finfo(np.float32).max)
_TINY = 2.0**-126
SEED = 0


@dataclasses.dataclass(frozen=True)
class Adopted:
  """A function of `special` and what it is measured against.

  Attributes:
    name: of the function.
    base: what XLA offers in its place.
    reference: in NumPy, from float64 to float64.
    exact: of mpmath numbers.
    interval: of the arguments that are certified; for even and odd functions
      those of one sign.
    timed: interval of arguments for timing.
    wrapper: how the cores become the function.
    start: gives the constants of minimax fits.
    polished: interval for the polish in float32.
    edges: inputs and the results that they must give bit for bit.
    samples: inputs of the polish.
    evaluations: limit on the moves that it tries.
  """

  name: str
  base: Callable
  reference: Callable
  exact: Callable
  interval: tuple[float, float]
  timed: tuple[float, float]
  wrapper: str
  start: Callable[[], Sequence[float] | np.ndarray]
  polished: tuple[float, float]
  edges: tuple[tuple[float, float], ...]
  samples: int = 2**21
  evaluations: int = 2000

  @property
  def function(self) -> Callable:
    """The public function."""
    return getattr(special, self.name)

  @property
  def core(self) -> Callable:
    """The function of an array and its constants."""
    return getattr(elementary, self.name)

  @property
  def constants(self) -> tuple[float, ...]:
    """Those in the code."""
    name = 'sin_cos' if self.name in ('sin', 'cos') else self.name
    return getattr(elementary, name.upper())

  @property
  def bound(self) -> float:
    """The tier, in ULP."""
    return special.MAX_ULP[self.name]


def polish(name: str, *, seed: int = SEED) -> polisher.Fit:
  """The constants of a function, from minimax fits and the float32 search.

  Args:
    name: one of FUNCTIONS.
    seed: of the samples and the order of moves.

  Returns:
    The fit; equal arguments give equal constants on one kind of processor.
  """
  # sin and cos share their constants.
  entry = FUNCTIONS['sin' if name == 'cos' else name]
  return polisher.float32_coefficients(
    lambda c, x: entry.core(x, c),
    entry.start(),
    entry.reference,
    entry.polished,
    samples=entry.samples,
    evaluations=entry.evaluations,
    seed=seed,
  )


def certify(
  name: str, command: str, *, tier: str = 'all', seed: int = SEED
) -> certificates.Certificate:
  """Measures a function of `special` over its interval.

  Args:
    name: one of FUNCTIONS.
    command: that repeats the search and this measurement, for the record.
    tier: density of the inputs, as in `search.certify`.
    seed: that `polish` was given.
  """
  entry = FUNCTIONS[name]
  return certificates.certify(
    entry.function,
    name=name,
    reference=entry.reference,
    exact=entry.exact,
    interval=entry.interval,
    provenance=certificates.Provenance(command, seed, entry.wrapper),
    tier=tier,
    bound=entry.bound,
    edges=entry.edges,
    program=_Constants((), entry.constants),
  )


def load(name: str) -> certificates.Certificate:
  """The certificate that the package carries."""
  folder = resources.files('lowbit_jax.special') / 'certificates'
  return certificates.Certificate.from_json(
    (folder / f'{name}.json').read_text('utf-8')
  )


@dataclasses.dataclass(frozen=True)
class _Constants:
  rows: tuple
  constants: tuple[float, ...]


def _linear(powers, offset=None, scale=None) -> polisher.Model:
  """offset(x) + scale(x) sum_k c_k x^powers[k]."""

  def model(x, c):
    jacobian = x[:, None] ** np.array(powers)
    if scale is not None:
      jacobian = jacobian * scale(x)[:, None]
    y = jacobian @ c
    return (y if offset is None else y + offset(x)), jacobian

  return model


def _fit(powers, exact, interval, *, offset=None, weight='rel'):
  zeros = [0] * len(powers)
  reference = polisher.extended(exact)
  model = _linear(powers, offset)
  return polisher.minimax(
    model, reference, interval, zeros, weight=weight
  ).constants


def _mp():
  return certificates.import_mpmath()


def _exp_start():
  interval = (-_HALF_LN2, _HALF_LN2)
  return _fit(
    range(1, 7), lambda x: _mp().exp(x), interval, offset=np.ones_like
  )


def _expm1_start():
  interval = (-_HALF_LN2, _HALF_LN2)

  def exact(x):
    return _mp().expm1(x)

  return _fit(range(2, 7), exact, interval, offset=lambda x: x)


def _exp2_start():

  def exact(x):
    return _mp().mpf(2) ** x

  return _fit(range(1, 7), exact, (-0.5, 0.5), offset=np.ones_like)


def _log2_start():

  def exact(t):
    return _mp().log(1 + t, 2)

  def model(t, c):
    powers = t[:, None] ** np.arange(3)
    q = powers @ np.append(c[4:], 1)
    quotient = powers @ c[1:4] / q
    inner = (t**3 / q)[:, None] * powers
    jacobian = [t**2, *inner.T, *(-quotient[:, None] * inner[:, :2]).T]
    y = t * _LOG2_E + t**2 * (c[0] + t * quotient)
    return y, np.stack(jacobian, axis=1)

  def weight(t, f):
    # Errors in ULP, small at the ends, where those of rounding are large.
    return (0.1 + abs(t)) / certificates.ulp32(f)

  interval = (math.sqrt(0.5) - 1, math.sqrt(2) - 1)
  start = [-0.7213, 1.0, 0.68, 0.0048, 2.08, 2.98]
  return polisher.minimax(
    model, polisher.extended(exact), interval, start, weight=weight
  ).constants


def _sin_start():
  interval = (-math.pi / 4, math.pi / 4)
  sin = _fit((3, 5, 7), lambda x: _mp().sin(x), interval, offset=lambda x: x)
  cos = _fit(
    (4, 6, 8),
    lambda x: _mp().cos(x),
    interval,
    offset=lambda x: 1 - x * x / 2,
  )
  return [*sin, *cos]


def _softplus_start():
  """P is rounded one constant after the other; the rest makes up for it."""
  reference = polisher.extended(lambda e: _mp().log1p(e))
  terms, log = 9, []

  def model(e, c):
    jacobian = (e * e)[:, None] * (e - 1)[:, None] ** np.arange(terms)
    return e + jacobian @ [*log, *c], jacobian[:, len(log) :]

  while len(log) < terms:
    zeros = [0] * (terms - len(log))
    c = polisher.minimax(model, reference, (0, 1), zeros).constants
    log.append(np.float32(c[0]))
  return [*log, *_expm1_start()]


def _mills(t):
  """(1 + a) e^(a^2/2) Phi(-a) - 1/2 for t = (a - 3) / (a + 3)."""
  mp = _mp()
  a = 3 * (1 + t) / (1 - t)
  normal = mp.erfc(a / mp.sqrt(2)) / 2
  return (1 + a) * normal * mp.exp(a * a / 2) - mp.mpf(1) / 2


def _gelu_start():
  interval = (-1, (13.3 - 3) / (13.3 + 3))
  mills = _fit(range(11), _mills, interval, weight='abs')
  return [*mills, *_expm1_start()]


def _leading(terms: int) -> polisher.Model:
  """1 + u P(u) / (1 + u Q(u)), u = x^2, with `terms` constants in P."""

  def model(x, c):
    others = len(c) - terms
    powers = (x * x)[:, None] ** np.arange(1, max(terms, others) + 1)
    p, q = powers[:, :terms], powers[:, :others]
    denominator = 1 + q @ c[terms:]
    y = p @ c[:terms] / denominator
    jacobian = np.concatenate([p, -y[:, None] * q], axis=1)
    return 1 + y, jacobian / denominator[:, None]

  return model


def _saturating_start(reference, inverse, slope, limit, terms, start):
  """Minimax for z / x in the relative error of f(z), where it saturates.

  Args:
    reference: f(z(x)).
    inverse: of f.
    slope: derivative of f, by which an error of z is multiplied; times f, if it
      is the absolute error of f(z).
    limit: of x.
    terms: constants in P.
    start: constants of P and Q as in `_leading`.

  Returns:
    The constants of P and Q divided by the last, which is 1 and left out.
  """
  model = _leading(terms)

  @functools.cache
  def tables(x):
    x = np.frombuffer(x, _LONG)
    y = reference(x)
    z = inverse(y)
    return z / x, slope(z) * x / y

  def weighted(x, c):
    weight = tables(x.tobytes())[1]
    y, jacobian = model(x, c)
    return y * weight, jacobian * weight[:, None]

  def target(x):
    return np.prod(tables(x.tobytes()), axis=0)

  interval = (limit * 1e-4, limit)
  *c, last = polisher.minimax(
    weighted, target, interval, start, weight='abs'
  ).constants
  return np.array([*c[:terms], 1, *c[terms:]]) / last


def _tanh_start():
  start = [-0.08333, -9.746e-4, -6.96e-8, 0.111695, 0.00105151]
  c = _saturating_start(
    np.tanh,
    lambda y: 2 * y / (1 + np.sqrt((1 - y) * (1 + y))),
    lambda z: (1 - z * z / 4) / (1 + z * z / 4) ** 2,
    10.0,  # so far that z at the limit of `tanh` gives 1
    3,
    start,
  )
  return [*(-4 * c[:3]), *c[3:]]


def _erf_start():
  alpha, beta = (_LONG(c) for c in elementary.ERF_CUBIC)
  flat = np.sqrt((1 + alpha) / (3 * beta))  # where the cubic is largest
  top = flat * (1 + alpha) * 2 / 3
  start = [-0.1447, -0.00698, -5.395e-4, 0.1734, 0.01361, 5.169e-4, 1.185e-6]
  return _saturating_start(
    polisher.extended(lambda x: _mp().erf(x)),
    lambda y: 2 * flat * np.sin(np.arcsin(y / top) / 3),
    # Absolute errors, because rounding leaves least room where erf is near 1.
    lambda z: (1 + alpha - 3 * beta * z * z) * ((1 + alpha - beta * z * z) * z),
    3.93,
    3,
    start,
  )


def _sigmoid(x):
  with np.errstate(over='ignore'):
    return 1 / (1 + np.exp(-x))


def _special(name):
  """A function of SciPy, imported when it is called."""

  def function(x):
    try:
      from scipy import special as scipy_special
    except ImportError as error:
      raise ImportError(
        f'{name} is measured against SciPy; install it with'
        ' `pip install lowbit-jax[search]`'
      ) from error
    return getattr(scipy_special, name)(x)

  return function


def _gelu(x):
  return x * _special('ndtr')(x)


def _exact_gelu(x):
  mp = _mp()
  return x * mp.erfc(-x / mp.sqrt(2)) / 2


def _exact_softplus(x):
  return _mp().log1p(_mp().exp(x))


_ODD = ((0.0, 0.0), (-0.0, -0.0), (math.nan, math.nan))
_POWERS = (
  (0.0, 1.0),
  (-0.0, 1.0),
  (_INF, _INF),
  (-_INF, 0.0),
  (math.nan, math.nan),
  (_MAX, _INF),
  (-_MAX, 0.0),
)
_TURNS = ((_INF, math.nan), (-_INF, math.nan), (math.nan, math.nan))
_SATURATING = (*_ODD, (_INF, 1.0), (-_INF, -1.0), (_MAX, 1.0), (-_MAX, -1.0))

FUNCTIONS = {
  entry.name: entry
  for entry in (
    Adopted(
      name='exp2',
      base=jnp.exp2,
      reference=np.exp2,
      exact=lambda x: _mp().mpf(2) ** x,
      interval=(-126.0, 127.99999),
      timed=(-100, 100),
      wrapper='exp2_split: 2^x = 2^n (1 + r P(r)), r = x - n',
      start=_exp2_start,
      polished=(-1, 1),
      edges=(*_POWERS, (1.0, 2.0), (-126.0, _TINY), (127.0, 2.0**127)),
    ),
    Adopted(
      name='exp',
      base=jnp.exp,
      reference=np.exp,
      exact=lambda x: _mp().exp(x),
      interval=(-87.33654, 88.72283),
      timed=(-80, 80),
      wrapper='exp_split: e^x = 2^n (1 + r P(r)), r = x - n ln 2',
      start=_exp_start,
      polished=(-20, 20),
      edges=(*_POWERS, (88.72284, _INF), (-87.33655, 0.0)),
    ),
    Adopted(
      name='log2',
      base=jnp.log2,
      reference=np.log2,
      exact=lambda x: _mp().log(x, 2),
      interval=(_TINY, _MAX),
      timed=(0.01, 100),
      wrapper='log2_split: n + t log2(e) + t^2 (c + t P(t) / Q(t))',
      start=_log2_start,
      polished=(0.68, 1.5),
      edges=(
        (0.0, -_INF),
        (-0.0, -_INF),
        (_INF, _INF),
        (-_INF, math.nan),
        (-1.0, math.nan),
        (math.nan, math.nan),
        (1.0, 0.0),
        (2.0, 1.0),
        (_TINY, -126.0),
        (2.0**127, 127.0),
      ),
    ),
    Adopted(
      name='sin',
      base=jnp.sin,
      reference=np.sin,
      exact=lambda x: _mp().sin(x),
      interval=(0.0, 1e5),
      timed=(-100, 100),
      wrapper='reduce_pio2 and quadrant; r + r u P(u) and 1 - u/2 + u^2 Q(u)',
      start=_sin_start,
      polished=(-100, 100),
      edges=(*_TURNS, *_ODD),
    ),
    Adopted(
      name='cos',
      base=jnp.cos,
      reference=np.cos,
      exact=lambda x: _mp().cos(x),
      interval=(0.0, 1e5),
      timed=(-100, 100),
      wrapper='as sin, a quarter of a turn further',
      start=_sin_start,
      polished=(-100, 100),
      edges=(*_TURNS, (0.0, 1.0), (-0.0, 1.0)),
    ),
    Adopted(
      name='tanh',
      base=jnp.tanh,
      reference=np.tanh,
      exact=lambda x: _mp().tanh(x),
      interval=(0.0, 20.0),
      timed=(-6, 6),
      wrapper='4 z / (4 + z^2), z = x - x u P(u) / Q(u)',
      start=_tanh_start,
      polished=(0.7, 4.0),
      edges=_SATURATING,
    ),
    Adopted(
      name='sigmoid',
      base=jax.nn.sigmoid,
      reference=_sigmoid,
      exact=lambda x: 1 / (1 + _mp().exp(-x)),
      interval=(-87.33654, 30.0),
      timed=(-15, 15),
      wrapper='1 / (1 + s (1 + q)), e^-x = s (1 + q), and a Newton step',
      start=_expm1_start,
      polished=(-20, 20),
      edges=(
        (0.0, 0.5),
        (-0.0, 0.5),
        (_INF, 1.0),
        (-_INF, 0.0),
        (math.nan, math.nan),
        (-100.0, 0.0),
        (_MAX, 1.0),
      ),
    ),
    Adopted(
      name='erf',
      base=jax.lax.erf,
      reference=_special('erf'),
      exact=lambda x: _mp().erf(x),
      interval=(0.0, 10.0),
      timed=(-4, 4),
      wrapper='z + z (a - b z^2), z = x + x u P(u) / Q(u)',
      start=_erf_start,
      polished=(1.1, 2.0),
      samples=2**23,
      evaluations=1500,
      edges=_SATURATING,
    ),
    Adopted(
      name='gelu',
      base=functools.partial(jax.nn.gelu, approximate=False),
      reference=_gelu,
      exact=_exact_gelu,
      interval=(-13.2, 20.0),
      timed=(-6, 6),
      wrapper='max(x, 0) - a R(a) e^(-a^2/2), a = |x|, compensated',
      start=_gelu_start,
      polished=(-13.1, 6),
      edges=(*_ODD, (_INF, _INF), (-_INF, -0.0), (_MAX, _MAX), (-_MAX, -0.0)),
    ),
    Adopted(
      name='softplus',
      base=jax.nn.softplus,
      reference=functools.partial(np.logaddexp, 0),
      exact=_exact_softplus,
      interval=(-87.33654, 30.0),
      timed=(-15, 15),
      wrapper='max(x, 0) + e + e^2 P(e - 1), e = e^-|x| and what it rounds off',
      start=_softplus_start,
      polished=(-20, 20),
      edges=(
        (_INF, _INF),
        (-_INF, 0.0),
        (math.nan, math.nan),
        (-100.0, 0.0),
        (_MAX, _MAX),
      ),
    ),
  )
}
