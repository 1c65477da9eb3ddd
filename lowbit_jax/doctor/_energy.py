"""energy: counts of arithmetic operations, and an estimate of their energy."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

# Picojoules per operation in 45 nm at 0.9 V. M. Horowitz, "Computing's energy
# problem (and what we can do about it)", ISSCC 2014.
PICOJOULES = {
  ('add', 'int8'): 0.03,
  ('add', 'int16'): 0.05,
  ('add', 'int32'): 0.1,
  ('add', 'float16'): 0.4,
  ('add', 'float32'): 0.9,
  ('mul', 'int8'): 0.2,
  ('mul', 'int32'): 3.1,
  ('mul', 'float16'): 1.1,
  ('mul', 'float32'): 3.7,
}

# Additions of an L-Mul, which replace a multiplication.
_LMUL = {'float16': 'int16', 'float32': 'int32'}

_PRICED_AS = {
  'bfloat16': 'float16',
  'uint8': 'int8',
  'uint16': 'int16',
  'uint32': 'int32',
}

_ELEMENTWISE = {
  'add': 'add',
  'add_any': 'add',
  'sub': 'add',
  'mul': 'mul',
  'square': 'mul',
}

# Arithmetic without a price. What is in no list moves, selects, compares or
# converts, and is not counted.
_UNPRICED = frozenset(
  """
  acos acosh asin asinh atan atan2 atanh cbrt cholesky cos cosh cumlogsumexp
  cumprod digamma div eigh erf erf_inv erfc exp exp2 expm1 fft
  householder_product igamma lgamma log log1p logistic lu pallas_call pow qr
  ragged_dot_general reduce_window reduce_window_sum rem rsqrt scatter_mul
  select_and_scatter_add sin sinh sqrt svd tan tanh triangular_solve
  """.split()
)


@dataclasses.dataclass(frozen=True)
class Energy:
  """Counts of arithmetic and their price; `print` shows it as a table.

  Attributes:
    counts: operations by ('mul' or 'add', dtype).
    unpriced: elements of results of arithmetic without a price, by name.
    loops: while loops, whose trips are unknown and which count once.
  """

  counts: Mapping[tuple[str, str], int]
  unpriced: Mapping[str, int]
  loops: int = 0

  def total(self, op: str) -> int:
    """How many 'mul' or 'add' there are."""
    return sum(n for (o, _), n in self.counts.items() if o == op)

  @property
  def picojoules(self) -> float:
    """Energy of all priced operations."""
    return sum(n * _price(*key) for key, n in self.counts.items())

  @property
  def lmul_picojoules(self) -> float:
    """The same with an L-Mul for every float multiplication."""
    return sum(n * _lmul_price(*key) for key, n in self.counts.items())

  @property
  def saving(self) -> float:
    """The share of the energy that L-Mul would save."""
    before = self.picojoules
    return 1 - self.lmul_picojoules / before if before else 0.0

  def __str__(self) -> str:
    row = '{:<14} {:>16} {:>8} {:>8}'.format
    lines = [row('operation', 'count', 'pJ', 'L-Mul')]
    for (op, dtype), n in sorted(self.counts.items()):
      prices = _price(op, dtype), _lmul_price(op, dtype)
      lines.append(row(f'{op} {dtype}', f'{n:,}', *prices))
    lines.append(
      f'{self.picojoules:.4g} pJ, with L-Mul {self.lmul_picojoules:.4g} pJ'
      f' ({-self.saving:+.1%}); memory traffic not included'
    )
    for name, n in sorted(self.unpriced.items()):
      lines.append(f'no price: {name} {n:,}')
    if self.loops:
      lines.append(f'counted once: {self.loops:,} while loops')
    return '\n'.join(lines)


def energy(fn: Callable, *args: Any) -> Energy:
  """Counts the arithmetic of a function and estimates its energy.

  Reads the jaxpr; nothing is run. A product (m, k) @ (k, n) is m n k
  multiplications in the dtype of its operands and m n (k - 1) additions in that
  of its result. A scan counts every trip, a cond its dearest branch, a while
  loop one trip (`loops` says how many there are).

  The estimate is of arithmetic alone. It leaves out memory traffic, which
  dominates on real machines, control, conversions and comparisons, and the
  functions listed in `unpriced` (divisions, exponentials, 8-bit floats,
  kernels). Prices are those of one process (45 nm); their ratios are what may
  carry over. An L-Mul is priced as one integer addition of the width of its
  operands, without its guards. Give `fn` with ordinary products: an emulation
  by `lmul_dot` is counted as the integer operations that it is.

  Args:
    fn: a function of arrays.
    *args: its arguments; `jax.ShapeDtypeStruct` will do.

  Returns:
    An `Energy`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax.doctor import energy
    >>> x = jnp.ones((8, 64))
    >>> cost = energy(lambda x: x @ x.T, x)
    >>> cost.total('mul'), cost.total('add'), round(cost.saving, 3)
    (4096, 4032, 0.785)
  """
  if not callable(fn):
    raise TypeError(f'{fn=} must be a function, followed by its arguments')
  tally = _count(jax.make_jaxpr(fn)(*args).jaxpr)
  return Energy(dict(tally.counts), dict(tally.unpriced), tally.loops)


def _price(op: str, dtype: str) -> float:
  return PICOJOULES[op, _PRICED_AS.get(dtype, dtype)]


def _lmul_price(op: str, dtype: str) -> float:
  width = _LMUL.get(_PRICED_AS.get(dtype, dtype))
  if op == 'mul' and width:
    return PICOJOULES['add', width]
  return _price(op, dtype)


class _Tally:
  def __init__(self):
    self.counts = collections.Counter()
    self.unpriced = collections.Counter()
    self.loops = 0

  def put(self, op: str, dtype, n: int) -> None:
    name = jnp.dtype(dtype).name
    if not n:
      return
    if (op, _PRICED_AS.get(name, name)) in PICOJOULES:
      self.counts[op, name] += n
    else:
      self.unpriced[f'{op} {name}'] += n

  def include(self, other: '_Tally', times: int = 1) -> None:
    for key, n in other.counts.items():
      self.counts[key] += n * times
    for name, n in other.unpriced.items():
      self.unpriced[name] += n * times
    self.loops += other.loops * times

  def cost(self) -> tuple[float, int]:
    priced = sum(n * _price(*key) for key, n in self.counts.items())
    return priced, sum(self.unpriced.values())


def _count(jaxpr) -> _Tally:
  tally = _Tally()
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    name = name.replace('-', '_')
    if name in _UNPRICED:
      tally.unpriced[name] += math.prod(eqn.outvars[0].aval.shape)
    elif name == 'cond':
      branches = [_count(branch) for branch in params['branches']]
      tally.include(max(branches, key=_Tally.cost))
    elif name == 'scan':
      tally.include(_count(params['jaxpr']), params['length'])
    elif name in _RULES:
      _RULES[name](tally, eqn)
    elif name in _ELEMENTWISE:
      out = eqn.outvars[0].aval
      tally.put(_ELEMENTWISE[name], out.dtype, out.size)
    else:
      tally.loops += name == 'while'
      for inner in params.values():
        if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
          tally.include(_count(inner))
  return tally


def _dot_general(tally: _Tally, eqn) -> None:
  x, y = (v.aval for v in eqn.invars)
  out = eqn.outvars[0].aval
  contracted = eqn.params['dimension_numbers'][0][0]
  depth = math.prod(x.shape[axis] for axis in contracted)
  _products(tally, x, y, out, depth)


def _convolution(tally: _Tally, eqn) -> None:
  # Counts taps that fall on padding too.
  x, kernel = (v.aval for v in eqn.invars[:2])
  out = eqn.outvars[0].aval
  outputs = eqn.params['dimension_numbers'].rhs_spec[0]
  depth = math.prod(kernel.shape) // max(kernel.shape[outputs], 1)
  _products(tally, x, kernel, out, depth)


def _products(tally: _Tally, x, y, out, depth: int) -> None:
  dtype = x.dtype if x.dtype == y.dtype else out.dtype
  tally.put('mul', dtype, out.size * depth)
  tally.put('add', out.dtype, out.size * max(depth - 1, 0))


def _reduction(op: str):
  def rule(tally: _Tally, eqn) -> None:
    x, out = eqn.invars[0].aval, eqn.outvars[0].aval
    tally.put(op, out.dtype, max(x.size - out.size, 0))

  return rule


def _running_sum(tally: _Tally, eqn) -> None:
  out = eqn.outvars[0].aval
  length = max(out.shape[eqn.params['axis']], 1)
  tally.put('add', out.dtype, out.size - out.size // length)


def _scatter_add(tally: _Tally, eqn) -> None:
  updates = eqn.invars[2].aval
  tally.put('add', updates.dtype, updates.size)


def _integer_power(tally: _Tally, eqn) -> None:
  """By repeated squaring."""
  out, power = eqn.outvars[0].aval, eqn.params['y']
  steps = abs(power).bit_length() + abs(power).bit_count() - 2
  tally.put('mul', out.dtype, max(steps, 0) * out.size)
  if power < 0:
    tally.unpriced['div'] += out.size


_RULES = {
  'conv_general_dilated': _convolution,
  'cumsum': _running_sum,
  'dot_general': _dot_general,
  'integer_pow': _integer_power,
  'reduce_prod': _reduction('mul'),
  'reduce_sum': _reduction('add'),
  'scatter_add': _scatter_add,
}
