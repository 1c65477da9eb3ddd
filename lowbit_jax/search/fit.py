"""Constants of many programs at once: Levenberg-Marquardt, then Lawson.

The residuals of program b at point n are e = w (p(x_n; c) - f_n). A step d
minimises |[J D^-1; sqrt(lambda) I] D d + [e; 0]| with D the column norms of J
(Moré, "The Levenberg-Marquardt algorithm", 1978). It comes from a QR
factorisation by modified Gram-Schmidt with the right-hand side as one more
column, which solves least squares as accurately as Householder reflections
(Björck, 1967). J^T J would square the condition numbers, which exceed 1e8 for
the formulas worth finding. Lawson's reweighting w <- w sqrt|e| (1961) turns
least squares into minimax.

Arrays have the batch in their last, contiguous axis, and every operation is
elementwise over it: a row of a program is a chain of selections among the rows
before it, and the factorisation is unrolled over the constants. Everything is
float64 in a scope of its own.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

from lowbit_jax._typing import ArrayLike
from lowbit_jax.search import program as programs

_LANES = 64  # programs at a time on a device: what its cache holds
_FLOOR = 1e-20  # of lambda
_TAKE, _REFUSE = 0.1, 8.0  # factors of lambda


class Batch(NamedTuple):
  """Programs of one size, padded.

  Attributes:
    rows: (B, L, 4) int32 with operands as in `Program`, for K constants each;
      rows beyond the program repeat its output.
    constants: (B, K) float64.
  """

  rows: np.ndarray
  constants: np.ndarray


class Samples(NamedTuple):
  """Points, values and weights of a fit.

  Attributes:
    x: (N,) points.
    f: (N,) values of the target.
    w: (N,) weights of the error.
    dense_x: (M,) points on which the result is judged.
    dense_f: (M,) values there.
    dense_w: (M,) weights there.
  """

  x: np.ndarray
  f: np.ndarray
  w: np.ndarray
  dense_x: np.ndarray
  dense_f: np.ndarray
  dense_w: np.ndarray


class Result(NamedTuple):
  """Fitted constants.

  Attributes:
    constants: (B, K) with the smallest largest error that was seen.
    error: (B,) that error on the points; inf where it is not finite.
    dense_error: (B,) error on the dense points, NaN where it was not asked for.
  """

  constants: np.ndarray
  error: np.ndarray
  dense_error: np.ndarray


def pack(items: list[programs.Program], rows: int, constants: int) -> Batch:
  """Pads programs to `rows` rows and `constants` constants.

  Raises:
    ValueError: for a program that is larger.
  """
  table = np.zeros((len(items), rows, 4), np.int32)
  values = np.ones((len(items), constants))
  for i, item in enumerate(items):
    n, k = len(item.rows), len(item.constants)
    if n > rows or k > constants:
      raise ValueError(
        f'program {i} has {n} rows and {k} constants; the batch holds {rows}'
        f' and {constants}'
      )
    if n:
      item_rows = np.array(item.rows, np.int32)
      operands = item_rows[:, 1:]
      operands[operands > k] += constants - k
      table[i, :n] = item_rows
    # max(r, r) = r for the output r, x if there are no rows.
    last = constants + n if n else 0
    table[i, n:] = (programs.MAX, last, last, 0)
    values[i, :k] = item.constants
  return Batch(table, values)


def fit(
  batch: Batch,
  samples: Samples,
  *,
  ops: tuple[int, ...],
  steps: int,
  rounds: int = 0,
  dense: str | None = None,
) -> Result:
  """Fits the constants of a batch, from where they are.

  Devices of this process share the batch if it divides among them.

  Args:
    batch: programs; B that is a multiple of 64 for each device is fastest.
    samples: the target.
    ops: codes of the operations that occur.
    steps: of Levenberg-Marquardt with the weights of the samples.
    rounds: of Lawson with two further steps each.
    dense: arithmetic in which the error on the dense points is taken: None not
      at all, 'float64', or 'float32' with constants and points rounded to it.

  Returns:
    The result, NumPy arrays.
  """
  devices = jax.local_devices()
  count = len(batch.rows)
  shards = max(d for d in range(1, len(devices) + 1) if count % d == 0)
  run = _compiled(shards, ops, steps, rounds, dense)
  # Programs of one size beside each other, so that their padding is skipped.
  order = np.argsort(_lengths(batch.rows), kind='stable')
  rows = np.ascontiguousarray(np.transpose(batch.rows[order], (1, 2, 0)))
  with jax.enable_x64(True):
    constants, error, dense_error = run(
      rows,
      np.ascontiguousarray(batch.constants[order].T, np.float64),
      *(np.asarray(v, np.float64) for v in samples),
    )
    results = (np.asarray(v) for v in (constants.T, error, dense_error))
    back = np.argsort(order)
    return Result(*(v[back] for v in results))


def _is_padding(rows):
  """Where a row (..., 4) takes the maximum of a register and itself."""
  equal = rows[..., 1] == rows[..., 2]
  return (rows[..., 0] == programs.MAX) & equal


def _lengths(rows: np.ndarray) -> np.ndarray:
  return np.sum(~_is_padding(rows), -1)


@functools.lru_cache(maxsize=64)
def _compiled(shards, ops, steps, rounds, dense):
  body = functools.partial(
    _fit_shard, ops=ops, steps=steps, rounds=rounds, dense=dense
  )
  if shards == 1:
    return jax.jit(body)
  mesh = Mesh(np.array(jax.local_devices()[:shards]), ('batch',))
  split, whole = P(None, 'batch'), P()
  mapped = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(P(None, None, 'batch'), split, *[whole] * len(Samples._fields)),
    out_specs=(split, P('batch'), P('batch')),
  )
  return jax.jit(mapped)


def _fit_shard(rows, constants, *samples, ops, steps, rounds, dense):
  """All programs of a device, _LANES at a time."""
  count = rows.shape[-1]
  lanes = max(d for d in range(1, _LANES + 1) if count % d == 0)

  def chunk(part):
    rows, constants = part
    target = Samples(*samples)
    return _fit_chunk(rows, constants, target, ops, steps, rounds, dense)

  if count == lanes:
    return chunk((rows, constants))
  parts = [
    jnp.moveaxis(v.reshape(*v.shape[:-1], -1, lanes), -2, 0)
    for v in (rows, constants)
  ]
  c, error, dense_error = lax.map(chunk, tuple(parts))
  return (
    jnp.moveaxis(c, 0, -2).reshape(c.shape[1], count),
    error.reshape(count),
    dense_error.reshape(count),
  )


def evaluate(
  rows: jax.Array,
  constants: jax.Array,
  x: jax.Array,
  ops: Iterable[int],
  *,
  tangents: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Values (N, B) and derivatives by the constants (K, N, B) of a batch.

  Args:
    rows: (L, 4, B).
    constants: (K, B).
    x: (N,).
    ops: codes that may occur.
    tangents: whether derivatives are wanted; else None stands for them.
  """
  length, _, lanes = rows.shape
  k = constants.shape[0]
  unit = jnp.arange(1, k + 1)[:, None]
  arity = max(programs.OPS[op].arity for op in ops)
  results = []  # of rows: value and tangent

  def operand(index):
    """The register `index` (B,), by selection."""
    leaf = jnp.take_along_axis(
      constants, jnp.clip(index - 1, 0, k - 1)[None], 0
    )
    value = jnp.where(index == 0, x[:, None], leaf)
    for j, (result, _) in enumerate(results):
      value = jnp.where(index == 1 + k + j, result, value)
    if not tangents:
      return value, None
    tangent = jnp.where(index == unit, 1.0, 0.0)[:, None]
    tangent = jnp.broadcast_to(tangent, (k, x.shape[0], lanes))
    for j, (_, result) in enumerate(results):
      tangent = jnp.where(index == 1 + k + j, result, tangent)
    return value, tangent

  def apply(row):
    """The row (4, B), with all results before it."""
    # Every operation is computed, and each program selects its own.
    arguments = [operand(row[1 + j]) for j in range(arity)]
    value, partials = arguments[0][0], [1.0] + [0.0] * (arity - 1)  # padding
    for code in ops:
      entry = programs.OPS[code]
      inputs = [a for a, _ in arguments[: entry.arity]]
      y = entry.value(jnp, *inputs)
      new = [*entry.partials(jnp, y, *inputs), *[0.0] * (arity - entry.arity)]
      selected = row[0] == code
      value = jnp.where(selected, y, value)
      partials = [
        jnp.where(selected, p, q) for p, q in zip(new, partials, strict=True)
      ]
    if not tangents:
      return value, None
    _, inner = zip(*arguments, strict=True)
    return value, sum(map(operator.mul, partials, inner))

  # Row by row, all programs at once.
  result = operand(0 * rows[0, 0])
  for row in rows:
    # Rows that are padding in all programs cost nothing. The branch also keeps
    # XLA from computing a row again in every row that reads it.
    result = lax.cond(
      jnp.all(_is_padding(row.T)),
      lambda result=result: result,
      lambda row=row: apply(row),
    )
    results.append(result)
  return result


def least_squares(
  a: Sequence[jax.Array] | jax.Array, b: jax.Array
) -> jax.Array:
  """Solutions d (K, B) of min |a d - b| for a (K, M, B) and b (M, B)."""
  columns = [*a, b]
  k = len(a)
  r = {}
  for i in range(k):
    r[i, i] = jnp.sqrt(jnp.sum(columns[i] * columns[i], 0))
    q = lax.optimization_barrier(columns[i] / r[i, i])
    for j in range(i + 1, k + 1):
      r[i, j] = jnp.sum(q * columns[j], 0)
      columns[j] = columns[j] - r[i, j] * q
  d = [jnp.zeros_like(r[0, 0])] * k
  for i in reversed(range(k)):
    rest = sum(r[i, j] * d[j] for j in range(i + 1, k))
    d[i] = (r[i, k] - rest) / r[i, i]
  return jnp.stack(d)


def _largest(e):
  """max |e| over points, inf where an entry is not finite."""
  worst = jnp.max(jnp.abs(e), 0)
  return jnp.where(jnp.isfinite(worst), worst, jnp.inf)


def damped_step(
  jacobian: jax.Array,
  e: jax.Array,
  damping: ArrayLike,
  solve: Callable[..., jax.Array] = least_squares,
) -> jax.Array:
  """The step (K, B) of Levenberg and Marquardt with columns scaled to 1."""
  k, _, lanes = jacobian.shape
  norm = jnp.sqrt(jnp.sum(jacobian * jacobian, 1))
  scale = jnp.where(norm > 0, norm, 1.0)
  root = jnp.eye(k)[:, :, None] * jnp.sqrt(damping)
  stacked = jnp.concatenate([jacobian / scale[:, None], root], axis=1)
  return solve(stacked, jnp.concatenate([-e, jnp.zeros((k, lanes))])) / scale


def _fit_chunk(rows, c, samples, ops, steps, rounds, dense):
  x, f, w = samples.x, samples.f[:, None], samples.w[:, None]
  lanes = c.shape[1]

  def residuals(c):
    y, jacobian = evaluate(rows, c, x, ops)
    return (y - f) * w, jacobian * w

  def cost(e, u):
    total = jnp.sum((u * e) ** 2, 0)
    return jnp.where(jnp.isfinite(total), total, jnp.inf)

  def step(state, lawson):
    current, best, u, damping = state
    # A Lawson step: weight the points by the errors of the best constants, and
    # continue from these.
    u_new = u * jnp.sqrt(jnp.abs(best[1]) / best[3] + 1e-3)
    u = jnp.where(lawson & jnp.isfinite(best[3]), u_new / jnp.max(u_new, 0), u)
    current = tuple(
      jnp.where(lawson, b, n) for b, n in zip(best[:3], current, strict=True)
    )
    damping = jnp.where(lawson, 1e-3, damping)
    # A step of Levenberg and Marquardt, kept where it lowers the cost.
    c, e, jacobian = current
    d = damped_step(jacobian * u, e * u, damping)
    c_new = c + d
    e_new, jacobian_new = residuals(c_new)
    finite = jnp.all(jnp.isfinite(jacobian_new), (0, 1))
    better = finite & (cost(e_new, u) < cost(e, u))
    trial = (c_new, e_new, jacobian_new)
    current = tuple(
      jnp.where(better, t, n) for t, n in zip(trial, current, strict=True)
    )
    # Keep the constants with the smallest largest error.
    worst = _largest(current[1])
    record = worst < best[3]
    best = tuple(
      jnp.where(record, n, b)
      for n, b in zip((*current, worst), best, strict=True)
    )
    damping = jnp.maximum(damping * jnp.where(better, _TAKE, _REFUSE), _FLOOR)
    return (current, best, u, damping), None

  current = (c, *residuals(c))
  u = jnp.ones((x.shape[0], lanes)) + 0 * c[0]
  state = (current, (*current, _largest(current[1])), u, 1e-2 + 0 * c[0])
  lawson = np.r_[np.zeros(steps, bool), np.tile([True, False], rounds)]
  state, _ = lax.scan(step, state, lawson)
  c, _, _, error = state[1]
  if dense is None:
    return c, error, jnp.full_like(error, jnp.nan)
  # The error between the points, with the dtype `dense`.
  dense_c, dense_x = (v.astype(dense) for v in (c, samples.dense_x))
  y, _ = evaluate(rows, dense_c, dense_x, ops, tangents=False)
  dense_e = (y - samples.dense_f[:, None]) * samples.dense_w[:, None]
  return c, error, _largest(dense_e)
