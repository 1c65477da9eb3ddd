"""The suite of a quantizer."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import numerics, ops, qarray
from lowbit_jax._quantize import check_format
from lowbit_jax._typing import Key
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray
from lowbit_jax.testing import _blocks
from lowbit_jax.testing._asserts import assert_bits_equal
from lowbit_pallas.arith.codec import RANDOM_BITS

_quantize = jax.jit(ops.quantize, static_argnames=('fmt', 'scale_rule'))


@jax.jit
def _dequantize(q: QArray) -> jax.Array:
  return ops.dequantize(q, jnp.float32)


@jax.jit
def _decode(q: QArray):
  """Codes and values."""
  codes = numerics.unpack(q.codes, q.fmt.element.bits, q.axes[0])
  return codes, ops.dequantize(q, jnp.float32)


SIGMAS = 5.0  # a sound generator fails one check in two million


def check_quantizer(
  quantize_fn: Callable, fmt: BlockFormat, *, scale_rule: str | None = None
) -> None:
  """Asserts that a quantizer computes what the format defines, bit for bit.

  It gets the cases of `quantizer_cases` and the ordinary blocks in bfloat16.
  The expected result is that of the scalar oracle in plain Python; for scale
  rules without an oracle ('mse', 'sweep', 'four_over_six', 'absmean' and
  'least_squares') that of `lowbit_jax.quantize`.

  Args:
    quantize_fn: `x -> QArray`, or `x -> array` of dequantized values. `x` is a
      float matrix; blocks lie along its last axis, tiles along both.
    fmt: the block format that it implements.
    scale_rule: its scale rule; None for that of the format.

  Raises:
    AssertionError: at the first case that differs, with its name, the leaf, the
      coordinate and both bit patterns.

  Examples:
    >>> import lowbit_jax as lowbit
    >>> fmt = lowbit.formats.mxfp4
    >>> check_quantizer(lambda x: lowbit.quantize(x, fmt), fmt)
  """
  fmt = check_format(fmt)
  rule = _scaling.check_scale_rule(fmt, scale_rule)
  cases = _blocks.quantizer_cases(fmt)
  for name, x in cases.items():
    _check_case(quantize_fn, jnp.asarray(x), fmt, rule, f'{fmt} {rule} {name}')
  narrow = jnp.asarray(cases['blocks']).astype(jnp.bfloat16)
  _check_case(quantize_fn, narrow, fmt, rule, f'{fmt} {rule} bfloat16')


def check_stochastic(
  quantize_fn: Callable,
  fmt: BlockFormat,
  *,
  keys: Sequence[Key] | Key,
  scale_rule: str | None = None,
  random_bits: int = RANDOM_BITS,
  rows: int = 4096,
) -> None:
  """Asserts that a stochastic quantizer is unbiased, independent and keyed.

  One block is repeated `rows` times. For an element x between the neighbours
  a < b of the format, p = (x - a) / (b - a), every result is a or b, and with N
  rows the mean of the results satisfies

    |mean - x| <= (5 sqrt(p (1 - p) / N) + 2^-random_bits) (b - a).

  Two elements with p = 1/2 agree in half of the rows, and so does an element
  with itself in the next row, up to 5 / (2 sqrt(N)). One key gives the same
  result twice, the other key another one. Nothing saturates: the largest
  element of the block is the largest number of the format.

  Args:
    quantize_fn: `(x, key) -> QArray` or array of dequantized values.
    fmt: the block format.
    keys: two different keys for it.
    scale_rule: its scale rule; 'floor' is fine here.
    random_bits: random bits per element of the quantizer.
    rows: N.

  Raises:
    AssertionError: naming the property that fails.
  """
  fmt = check_format(fmt)
  pattern, low, high = _stochastic_block(fmt, scale_rule)
  x = jnp.asarray(_spread(np.tile(pattern, (rows, 1)), fmt))

  def draw(key) -> np.ndarray:
    got = np.asarray(_values(quantize_fn(x, key)), np.float32)
    return _gather(got, fmt, rows).astype(np.float64)

  # A key says which numbers are drawn.
  y = draw(keys[0])
  label = f'{fmt} stochastic'
  if not np.array_equal(y, draw(keys[0])):
    raise AssertionError(f'{label}: one key gave two results')
  if np.array_equal(y, draw(keys[1])):
    raise AssertionError(f'{label}: two keys gave the same result')
  # Every result is one of the two neighbours, but for roundings of the scale.
  gap = high - low
  slack = 1e-3 * gap + 4e-6 * np.abs(pattern)
  up, down = np.abs(y - high) <= slack, np.abs(y - low) <= slack
  if not (up | down).all():
    i, j = (int(v) for v in np.argwhere(~(up | down))[0])
    raise AssertionError(
      f'{label}: {pattern[j]!r} became {y[i, j]!r}, which is not one of its'
      f' neighbours {low[j]!r} and {high[j]!r}'
    )
  _check_bias(y, pattern, low, gap, 2.0**-random_bits, label)
  # Elements draw bits of their own: two with p = 1/2 agree by chance only.
  for name, a, b in (
    ('two elements of a block', up[:, 1], up[:, 2]),
    ('an element and its next row', up[:-1, 1], up[1:, 1]),
  ):
    agreement = float(np.mean(a == b))
    if abs(agreement - 0.5) > SIGMAS * 0.5 / np.sqrt(len(a)):
      raise AssertionError(
        f'{label}: {name} agree in {100 * agreement:.0f} % of the draws, not in'
        ' half of them: the noise is shared'
      )


def _check_bias(y, pattern, low, gap, resolution: float, label: str) -> None:
  """Asserts that the mean over the rows of `y` is `pattern`, or the end of the
  range where the rounding of the scale left it outside."""
  rows = len(y)
  pattern = np.clip(pattern, low, low + gap)
  p = np.where(gap > 0, (pattern - low) / np.where(gap > 0, gap, 1), 0)
  allowed = SIGMAS * np.sqrt(p * (1 - p) / rows) + resolution
  bias = np.abs(y.mean(axis=0) - pattern)
  bad = bias > allowed * gap + 4e-6 * np.abs(pattern)
  if bad.any():
    j = int(np.argmax(bad))
    raise AssertionError(
      f'{label}: biased: the mean of {rows} results for {pattern[j]!r} is'
      f' {y[:, j].mean()!r}, off by more than {allowed[j] * gap[j]:.3g}'
    )


def _check_case(quantize_fn, x, fmt, rule: str, label: str) -> None:
  got = quantize_fn(x)
  if rule not in _blocks.ORACLE_RULES:
    reference = _quantize(x, fmt, scale_rule=rule)
    if isinstance(got, QArray):
      assert_bits_equal(got, reference, label, any_nan=True)
    else:
      want = _dequantize(reference).astype(got.dtype)
      assert_bits_equal(got, want, label, any_nan=True)
    return
  want = _blocks.expected(np.asarray(x.astype(jnp.float32)), fmt, rule)
  if not isinstance(got, QArray):
    values = jnp.asarray(want.values).astype(got.dtype)
    assert_bits_equal(got, values, f'{label} values', any_nan=True)
    return
  if got.fmt != fmt or got.shape != x.shape or got.dtype != x.dtype:
    raise AssertionError(
      f'{label}: got {got!r}, want {fmt} of {x.dtype}{x.shape}'
    )
  codes, values = _decode(got)
  codes = codes[:, : want.codes.shape[1]]
  got = qarray.one_level(got)
  pairs = {
    'scale': (got.scale, want.scale),
    'tensor_scale': (got.tensor_scale, want.tensor_scale),
    'zero_point': (got.zero_point, want.zero_point),
    'minimum': (got.minimum, want.minimum),
    'codes': (codes, want.codes),
    'values': (values, want.values),
  }
  for leaf, (a, b) in pairs.items():
    if (a is None) != (b is None):
      raise AssertionError(f'{label} {leaf} is {a!r}, want {b!r}')
    if a is not None:
      if leaf in ('scale', 'minimum') and not _scaling.is_coded(fmt.scale):
        a = a.astype(jnp.float32)
      assert_bits_equal(a, b, f'{label} {leaf}', any_nan=True)


def _values(result):
  return _dequantize(result) if isinstance(result, QArray) else result


def _block_elements(fmt: BlockFormat) -> int:
  if fmt.is_tile:
    return fmt.block[0] * fmt.block[1]
  return (fmt.block[0] if fmt.scale is not None else 0) or 32


def _spread(blocks: np.ndarray, fmt: BlockFormat) -> np.ndarray:
  """(N, elements) as a matrix with blocks where the format has them."""
  if not fmt.is_tile:
    return blocks
  tiles = blocks.reshape(-1, *fmt.block)
  return tiles.transpose(1, 0, 2).reshape(fmt.block[0], -1)


def _gather(x: np.ndarray, fmt: BlockFormat, rows: int) -> np.ndarray:
  if not fmt.is_tile:
    return x
  tiles = x.reshape(fmt.block[0], rows, fmt.block[1])
  return tiles.transpose(1, 0, 2).reshape(rows, -1)


def _stochastic_block(fmt: BlockFormat, scale_rule: str | None):
  """A block, and the lower and upper neighbours of its elements."""
  n = min(_block_elements(fmt), 256)
  random = np.random.RandomState(3)
  grid = fmt.element.values()
  grid = np.unique(grid[np.isfinite(grid)])
  symmetric = -fmt.element.max if grid[0] < 0 else 0.0
  grid = grid[(grid >= symmetric) & (grid <= fmt.element.max)]
  below = random.randint(0, len(grid) - 1, n)
  share = random.uniform(0.05, 0.95, n)
  below[1:3], share[1:3] = 3 * len(grid) // 4, 0.5
  x = grid[below] + share * (grid[below + 1] - grid[below])
  x[0] = fmt.element.max
  pattern = np.resize(x, _block_elements(fmt)).astype(np.float32)
  if len(pattern) > n:  # repeats of the largest number
    pattern[n::n] = fmt.element.max
  x = jnp.asarray(_spread(pattern[None], fmt))
  q = _quantize(x, fmt, scale_rule=scale_rule or fmt.scale_rule)
  step = _unit(q)
  least = 0.0 if q.minimum is None else float(np.ravel(q.minimum)[0])
  points = grid * step + least
  at = np.searchsorted(points, pattern * (1 - 1e-6 * np.sign(pattern)), 'right')
  at = np.clip(at, 1, len(points) - 1)
  low, high = points[at - 1], points[at]
  nearest = np.where(pattern - low < high - pattern, low, high)
  exact = np.abs(pattern - nearest) <= 1e-6 * np.abs(pattern)
  low, high = (np.where(exact, pattern, v) for v in (low, high))
  return pattern.astype(np.float64), low, high


def _unit(q: QArray) -> float:
  """The whole scale of a QArray of one block."""
  scale = 1.0
  if q.scale is not None:
    assert q.fmt.scale is not None
    value = np.asarray(q.scale)  # of two levels the numbers
    if _scaling.is_coded(q.fmt.scale):
      value = q.fmt.scale.values()[value]
    scale *= float(np.ravel(value)[0])
  if q.tensor_scale is not None:
    scale *= float(np.ravel(q.tensor_scale)[0])
  return scale
