"""The operations of `gpu.py`: how they run, what is right, what they cost.

Checks compare with float64 on the host, or bit for bit with the quantizer on
the CPU. Times are device times of the kernels alone, medians over inputs that
are rotated through more memory than the L2 cache holds.
"""

import datetime
import functools
import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import profiler

import lowbit_jax as lowbit
from lowbit_jax import qarray, testing
from lowbit_jax.numerics._codec import blocked
from lowbit_jax.testing._dots import UNIT, exact_values
from lowbit_pallas import _tuned
from lowbit_pallas.block_matmul import config as block_config
from lowbit_pallas.quantize import config as quantize_config, task as _task
from lowbit_pallas.softmax import config as softmax_config
from lowbit_pallas.wq_matmul import config as weight_config

ROUNDS = 21
ROTATE_BYTES = 200 << 20
SAMPLE = 64  # rows of a result that are compared on the host
NT = (((1,), (1,)), ((), ()))
Fact = dict[str, Any]


class Setup(NamedTuple):
  """One operation on operands of one shape.

  Attributes:
    run: computes it.
    inputs: `seed -> arguments of run`.
    compare: `(result, inputs) -> fact`, whose 'ok' says whether it is right.
    check_inputs: what `compare` is to see when speed does not matter.
    entry: (kernel, key) in the table of tile sizes.
    bytes: that any implementation must move.
    flops: bfloat16 operations that it must do.
    others: what XLA has for it: functions and inputs.
    per_row: leading arguments whose rows are those of the result, and do not
      depend on each other; 0 if they do.
  """

  run: Callable
  inputs: Callable
  compare: Callable
  check_inputs: tuple | None = None
  entry: tuple[str, str] = ('', '')
  bytes: int = 0
  flops: float = 0.0
  others: dict[str, tuple[Callable, Callable]] = {}
  per_row: int = 1


# --- what a case does


def run(stage: str, operation: str, arguments: Fact, *, cpu: bool) -> Fact:
  """The facts of a case.

  Args:
    stage: 'env', 'check', 'time' or 'tune'.
    operation: a name from `OPERATIONS`.
    arguments: of that function; `sizes` and a list of `rows` are for 'tune'.
    cpu: whether XLA's implementation on CPU stands in for the kernels.
  """
  if stage == 'env':
    return device(cpu)
  make = functools.partial(
    OPERATIONS[operation], 'xla' if cpu else 'mosaic_gpu'
  )
  arguments = dict(arguments)
  if stage == 'check':
    return check(make(**arguments), cpu)
  if stage == 'time':
    return timed(make(**arguments), cpu)
  sizes, rows = arguments.pop('sizes'), arguments.get('rows')
  each = [arguments]
  if isinstance(rows, list):
    each = [dict(arguments, rows=n) for n in rows]
  return tuned([make(**a) for a in each], sizes, cpu)


def check(setup: Setup, cpu: bool = False) -> Fact:
  """Whether the result is right, and has the same bits again and row by row.

  XLA on CPU does not promise the last, kernels do.
  """
  inputs = setup.check_inputs or setup.inputs(0)
  f = jax.jit(setup.run)
  result = f(*inputs)
  fact = setup.compare(result, inputs)
  fact['repeats'] = same_bits(result, f(*inputs))
  fact['ok'] &= fact['repeats']
  if setup.per_row and inputs[0].shape[0] > 2 and not cpu:
    row = [x[2:3] for x in inputs[: setup.per_row]]
    alone = f(*row, *inputs[setup.per_row :])
    fact['row_alone'] = same_bits(alone, result[2:3])
    fact['ok'] &= fact['row_alone']
  return fact


def timed(setup: Setup, cpu: bool = False) -> Fact:
  """Device time beside the best of XLA."""
  fact = _measured(setup, cpu)
  if fact['ok']:
    fact['others'] = {
      name: device_time(f, rotated(inputs), cpu)[0]
      for name, (f, inputs) in setup.others.items()
    }
  return fact


def tuned(setups: list[Setup], sizes: dict, cpu: bool = False) -> Fact:
  """Device times under an entry of the table of sizes, none for {}."""
  op, key = setups[0].entry
  fact: Fact = dict(op=op, key=key, sizes=sizes, us=[])
  for setup in setups:
    with entry(op, key, sizes) as asked:
      one = _measured(setup, cpu)
    if not (cpu or asked):
      raise AssertionError(f'no kernel asked for the entry {key!r} of {op}')
    if not one['ok']:
      return {**fact, **one}
    fact['us'].append(one['us'])
  return dict(fact, ok=True)


def _measured(setup: Setup, cpu: bool) -> Fact:
  inputs = setup.inputs(0)
  fact = setup.compare(jax.jit(setup.run)(*inputs), inputs)
  if fact['ok']:
    seconds, timer, kernels = device_time(setup.run, rotated(setup.inputs), cpu)
    fact.update(
      us=seconds * 1e6,
      timer=timer,
      kernels=kernels,
      bytes=setup.bytes,
      flops=setup.flops,
    )
  return fact


class entry:
  """Within, the table of a kernel holds one entry; yields the keys asked for.

  `sizes` as a dict; an empty one stands for no entry.
  """

  def __init__(self, op: str, key: str, sizes: dict[str, int]):
    self._op, self._key, self._sizes = op, key, sizes
    self._asked: list[str] = []

  def __enter__(self) -> list[str]:
    find = _tuned.find

    def recording(op, implementation, key, make):
      if (op, key) == (self._op, self._key):
        self._asked.append(key)
      return find(op, implementation, key, make)

    def read(table):
      is_mine = table.parts[-3] == self._op and self._sizes
      return {self._key: self._sizes} if is_mine else {}

    self._patch = mock.patch.multiple(_tuned, find=recording, read=read)
    self._patch.__enter__()
    jax.clear_caches()
    return self._asked

  def __exit__(self, *error):
    self._patch.__exit__(*error)
    jax.clear_caches()


def same_bits(a, b) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
  )


# --- time


class Rotated:
  """A jitted function that takes the next of its inputs in every call.

  The profiler warms functions up with their arguments: these have none, so what
  it times has not been read just before.
  """

  def __init__(self, f: Callable, inputs: list[tuple]):
    self._f = jax.jit(f)
    self._inputs = itertools.cycle(inputs)

  def __call__(self):
    return self._f(*next(self._inputs))

  def trace(self):
    return self._f.trace(*next(self._inputs))

  def lower(self):
    return self._f.lower(*next(self._inputs))


def rotated(make: Callable) -> list[tuple]:
  """Enough different inputs to leave the cache cold."""
  first = make(0)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
  count = max(2, min(16, -(-ROTATE_BYTES // max(size, 1))))
  return [first, *(make(i) for i in range(1, count))]


def device_time(
  f: Callable, inputs: list[tuple], cpu: bool = False
) -> tuple[float, str, dict[str, float]]:
  """Median seconds, how they were measured, and microseconds by kernel.

  CUPTI times kernels alone; where it is missing or fails, the clock times 20
  calls in a row, with what the host adds to them.
  """
  rounds = 3 if cpu else ROUNDS
  call = Rotated(f, inputs if not cpu else inputs[:2])
  try:
    measure = profiler.measure(call, aggregate=False, iterations=rounds)
    _, runs = measure()
    if not runs:
      raise RuntimeError('no kernels')
  except Exception as error:
    why = f'{type(error).__name__}: {error}'.splitlines()[0][:100]
    return clock_time(call, rounds), f'clock ({why})', {}
  kernels = {}
  for name, milliseconds in runs[0]:
    kernels[name[:60]] = kernels.get(name[:60], 0) + milliseconds * 1e3
  seconds = [sum(ms for _, ms in kernels) / 1e3 for kernels in runs]
  return statistics.median(seconds), 'cupti', kernels


def clock_time(call: Callable, rounds: int, calls: int = 20) -> float:
  """Median seconds of a call among `calls` that are waited for together."""
  jax.block_until_ready(call())
  seconds = []
  for _ in range(max(rounds // 4, 1)):
    begin = time.perf_counter()
    jax.block_until_ready([call() for _ in range(calls)])
    seconds.append((time.perf_counter() - begin) / calls)
  return statistics.median(seconds)


def device(cpu: bool) -> Fact:
  """What this machine is, and its rooflines: a copy and a bfloat16 product."""
  it = jax.devices()[0]
  asked = 'name,driver_version,clocks.sm,clocks.mem,temperature.gpu'
  fact = dict(
    ok=True,
    device=it.device_kind,
    capability=getattr(it, 'compute_capability', None),
    jax=jax.__version__,
    date=datetime.date.today().isoformat(),
    nvidia_smi=_said(f'nvidia-smi --query-gpu={asked} --format=csv,noheader'),
    ptxas=_said('ptxas --version | tail -1'),
  )
  rows, n = (128, 512) if cpu else (1 << 20, 8192)

  def copied(seed):
    return (normal(seed, (rows, 128)),)

  def pairs(seed):
    return normal(seed, (n, n)), normal(seed + 9, (n, n))

  seconds, timer, _ = device_time(
    lambda x: x + jnp.bfloat16(1), rotated(copied), cpu
  )
  product, _, _ = device_time(jnp.dot, rotated(pairs), cpu)
  return dict(
    fact,
    timer=timer,
    copy_bytes=2 * copied(0)[0].nbytes / seconds,
    bf16_flops=2 * n**3 / product,
  )


def _said(command: str) -> str:
  done = subprocess.run(command, shell=True, capture_output=True, text=True)
  return done.stdout.strip()[:200]


# --- operations


def normal(seed: int, shape, dtype: Any = 'bfloat16') -> jax.Array:
  return _normal(seed, tuple(shape), str(jnp.dtype(dtype)))


# Compiled whole, like all that prepares operands: on a GPU every small program
# takes a tenth of a second to compile.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed, shape, dtype):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


_quantize = jax.jit(
  lowbit.quantize, static_argnames=('fmt', 'axis', 'implementation')
)
_dequantize = jax.jit(lowbit.dequantize, static_argnums=1)
_prepack = jax.jit(lowbit.prepack, static_argnames='implementation')


def softmax(
  implementation: str, kind: str, shape, dtype: str, masked: bool = False
) -> Setup:
  rows, columns = shape
  size = jnp.dtype(dtype).itemsize
  f = getattr(lowbit, kind)
  mask = jax.random.bernoulli(jax.random.key(1), 0.7, shape) if masked else None
  arguments = () if mask is None else (mask,)

  def run(x, *where):
    where = where[0] if where else None
    return f(x, where=where, implementation=implementation)

  def inputs(seed):
    return (normal(seed, shape, dtype), *arguments)

  # Checks see a row of the online form, -inf and NaN too.
  x = normal(0, shape, jnp.float32) * 3
  x = x.at[1 % rows].add(3e4).at[0, 3].set(-jnp.inf)
  x = x.at[3 % rows, 5].set(jnp.nan).astype(dtype)
  key = softmax_config.key(columns, size)
  return Setup(
    run,
    inputs,
    functools.partial(compare_softmax, kind),
    check_inputs=(x, *arguments),
    entry=('softmax', key),
    bytes=2 * rows * columns * size,
    others={'jax.nn.softmax': (jax.nn.softmax, inputs)},
    per_row=1 + masked,
  )


def compare_softmax(kind: str, result, inputs) -> Fact:
  """Errors of sampled rows against float64: relative for softmax, relative to
  max(1, magnitude) for logarithms. Entries below 2^-110 are not judged."""
  at = _sample(len(result))
  x = np.asarray(inputs[0][at].astype(jnp.float32), np.float64)
  got = np.asarray(result[at].astype(jnp.float32), np.float64)
  live = np.asarray(inputs[1][at]) if len(inputs) > 1 else np.isfinite(x) | True
  with np.errstate(all='ignore'):
    x = np.where(live, x, -np.inf)
    top = x.max(1, keepdims=True)
    e = np.where(live, np.exp(x - top), 0)
    total = e.sum(1, keepdims=True)
    want = {
      'softmax': lambda: np.where(live, e / total, 0),
      'log_softmax': lambda: np.where(live, x - top - np.log(total), -np.inf),
      'logsumexp': lambda: (top + np.log(total))[:, 0],
    }[kind]()
    size = want if kind == 'softmax' else np.maximum(np.abs(want), 1)
    judged = np.isfinite(want) & (size > 2.0**-110)
    error = np.where(judged, np.abs(got - want) / size, 0)
  special = all(
    np.array_equal(f(got), f(want))
    for f in (np.isnan, np.isposinf, np.isneginf)
  )
  narrow = result.dtype != jnp.float32
  # 24 units for exponentials and quotients, and additions along 40 at most;
  # then half a unit in the last place of a narrow result.
  tolerance = 64 * UNIT + (2.0**-8 if narrow else 0)
  worst = float(np.max(error)) if np.isfinite(error).all() else math.inf
  return dict(
    ok=bool(worst <= tolerance and special),
    worst=worst,
    tolerance=tolerance,
    special_entries=special,
  )


def weights(
  implementation: str,
  fmt: str,
  rows: int,
  n: int,
  k: int,
  dtype: str = 'bfloat16',
  probe: bool = False,
) -> Setup:
  """x in `dtype` times a prepacked weight; `probe` for the identity as x."""
  q = _weight(fmt, n, k)
  spec = blocked(q.fmt)
  schedule = weight_config.heuristic_schedule(spec)
  stored = q
  if implementation != 'xla':
    stored = _prepack(q, implementation=implementation)

  def run(x, w):
    return lowbit.dot(
      x,
      w,
      preferred_element_type=jnp.float32,
      implementation=implementation,
    )

  def pairs(w):
    return lambda seed: (
      normal(seed, (rows, k), dtype),
      jax.tree.map(jnp.copy, w),
    )

  def dequantize_then_dot(x, q):
    return jnp.dot(x, lowbit.dequantize(q, jnp.bfloat16))

  is_large = n * k > 1 << 22
  values = _dequantize(q, jnp.bfloat16)
  x = jnp.eye(k, dtype=dtype) if probe else normal(1, (rows, k), dtype)
  return Setup(
    run,
    pairs(stored),
    functools.partial(glance, values)
    if is_large
    else functools.partial(compare_weights, q, schedule, probe),
    check_inputs=(x, stored),
    entry=(
      'wq_matmul',
      weight_config.key(n, k, spec, jnp.dtype(dtype), schedule),
    ),
    bytes=stored.nbytes + 2 * rows * k + 4 * rows * n,
    flops=2.0 * rows * n * k,
    others={
      'jnp.dot of bfloat16': (jnp.dot, pairs(values)),
      'dequantize, then jnp.dot': (dequantize_then_dot, pairs(q)),
    },
  )


@functools.cache
def _weight(fmt: str, n: int, k: int) -> lowbit.QArray:
  return _quantize(
    normal(99, (k, n), jnp.float32), fmt=lowbit.formats.get(fmt), axis=-2
  )


def compare_weights(q, schedule: str, probe: bool, result, inputs) -> Fact:
  """Errors against float64, the weight rounded as the contract says.

  With the identity as x each result is one weight, two roundings away. Else the
  tolerance is that of `testing.dot_tolerance` twice, since tensor cores may
  truncate where float32 additions round.
  """
  x = np.asarray(inputs[0].astype(jnp.float32), np.float64)
  tensor_scale = 1.0
  if q.tensor_scale is not None:
    tensor_scale = float(q.tensor_scale.reshape(()))
    q = qarray.replace(q, tensor_scale=jnp.ones_like(q.tensor_scale))
  w = exact_values(q)
  if schedule == 'pre' and q.fmt.block[0]:
    rounded = jnp.asarray(w.astype(np.float32))
    if inputs[0].dtype == jnp.bfloat16:
      rounded = rounded.astype(jnp.bfloat16)
    w = np.asarray(rounded.astype(jnp.float32), np.float64)
  want = x @ w * tensor_scale
  tolerance = 4 * UNIT * np.abs(want)
  if not probe:
    tolerance = 2 * testing.dot_tolerance(x, w) * tensor_scale
  return compare(result, want, tolerance)


def blocks(implementation: str, formats, m: int, n: int, k: int) -> Setup:
  """Both operands quantized, (m, k) and (n, k), K last."""
  left, right = map(lowbit.formats.get, formats)
  axis = (-2, -1) if right.is_tile else -1

  def inputs(seed):
    return (
      _quantize(normal(seed, (m, k), jnp.float32), fmt=left),
      _quantize(normal(seed + 50, (n, k), jnp.float32), fmt=right, axis=axis),
    )

  def run(a, b):
    return lowbit.dot_general(
      a, b, dimension_numbers=NT, implementation=implementation
    )

  def dense(seed):
    return tuple(_dequantize(q, jnp.bfloat16) for q in inputs(seed))

  others = {'bfloat16': (product_nt, dense)}
  if formats[0] == formats[1] == 'mxfp8_e4m3' and implementation != 'xla':
    others['jax.nn.scaled_matmul'] = (scaled_matmul, inputs)
  is_fast = formats[0] in ('fp8_1x128', 'int8_channel')  # on 8-bit tensor cores
  a, b = jax.eval_shape(lambda: inputs(0))
  key = block_config.key(n, k, blocked(left), blocked(right), 'nt')
  return Setup(
    run,
    inputs,
    compare_blocks if m * n * k < 1 << 31 else glance_at_blocks,
    entry=('block_matmul', key) if is_fast else ('', ''),
    bytes=a.nbytes + b.nbytes + 4 * m * n,
    flops=2.0 * m * n * k / (2 if is_fast else 1),
    others=others,
  )


def compare_blocks(result, inputs) -> Fact:
  """Errors against float64.

  Tensor cores align the 32 FP8 products of a step and cut them 13 bits below
  the largest (DeepSeek-V3, section 3.3.2): about 2^-11 of the sum of
  magnitudes in the four steps of a block. Integers are exact up to the
  roundings of their scales.
  """
  a, b = map(exact_values, inputs)
  want = a @ b.T
  if inputs[0].fmt.name.startswith('int8'):
    tolerance = 4 * UNIT * np.abs(want)
  elif inputs[0].fmt.name.startswith('fp8'):
    tolerance = 2.0**-11 * (np.abs(a) @ np.abs(b).T)
  else:
    tolerance = 2 * testing.dot_tolerance(a, b.T)
  return compare(result, want, tolerance)


def product_nt(a, b):
  return lax.dot_general(a, b, NT, preferred_element_type=jnp.float32)


def scaled_matmul(lhs, rhs):
  codes = [
    lax.bitcast_convert_type(q.codes, jnp.float8_e4m3fn)[None]
    for q in (lhs, rhs)
  ]
  scales = [
    lax.bitcast_convert_type(q.scale, jnp.float8_e8m0fnu)[None]
    for q in (lhs, rhs)
  ]
  return jax.nn.scaled_matmul(*codes, *scales)[0]


def glance(values, result, inputs) -> Fact:
  """A large product against float32 on the device, see `compare_means`."""
  want = jnp.dot(
    inputs[0].astype(jnp.float32),
    values.astype(jnp.float32),
    precision='highest',
  )
  return compare_means(result, want)


def glance_at_blocks(result, inputs) -> Fact:
  """Sampled rows of a large product."""
  at = _sample(len(result))
  a, b = (_dequantize(q, jnp.float32) for q in inputs)
  want = lax.dot_general(a[at], b, NT, precision='highest')
  return compare_means(result[at], want)


def compare_means(result, want) -> Fact:
  """Errors against the root mean square of the result: 1 % on average, which
  one wrong column of 8192 exceeds, and 8 % at most."""
  want, got = (np.asarray(x, np.float32) for x in (want, result))
  error = np.abs(got - want) / np.sqrt(np.mean(want**2))
  mean, most = np.sqrt(np.mean(error**2)), np.max(error)
  return dict(
    ok=bool(mean <= 0.01 and most <= 0.08), worst=float(most), tolerance=0.08
  )


def quantize(
  implementation: str,
  fmt: str,
  shape,
  dtype: str,
  rotation: int = 0,
  rounding: str = 'nearest_even',
) -> Setup:
  f = lowbit.formats.get(fmt)
  options: dict[str, Any] = dict(rounding=rounding)
  if rotation:
    options['rotation'] = lowbit.transforms.Hadamard(rotation)
  if rounding == 'stochastic':
    options['key'] = jax.random.key(7)

  def run(x, how=implementation):
    return lowbit.quantize(x, f, implementation=how, **options)

  def inputs(seed):
    return (normal(seed, shape, dtype),)

  task = _task.Task(blocked(f), '', rounding, rotation=rotation)
  size = jnp.dtype(dtype).itemsize
  stored = jax.eval_shape(run, *jax.eval_shape(lambda: inputs(0)))
  return Setup(
    run,
    inputs,
    functools.partial(compare_codes, f, options),
    entry=('quantize', quantize_config.key(shape[1], size, task)),
    bytes=math.prod(shape) * size + stored.nbytes,
    others={'XLA': (functools.partial(run, how='xla'), inputs)},
    # Random bits and tensor scales are those of the whole array.
    per_row=int(rounding != 'stochastic' and not f.tensor_scale),
  )


def compare_codes(fmt, options, result, inputs) -> Fact:
  """Codes and scales that differ from the quantizer on the CPU: none; next to
  ties of a rotated array, whose sums have another order, 1 % of the codes."""
  at = _sample(len(inputs[0]))
  if 'key' in options:
    at = np.arange(len(inputs[0]))
  x = np.asarray(inputs[0][at])
  options = dict(options)
  if result.tensor_scale is not None:
    options['tensor_scale'] = np.asarray(result.tensor_scale).reshape(())
  with jax.default_device(jax.devices('cpu')[0]):
    if 'key' in options:
      options['key'] = jax.random.key(7)
    want = lowbit.quantize(jnp.asarray(x), fmt, implementation='xla', **options)
    want = jax.tree.map(np.asarray, want)
  got = jax.tree.map(np.asarray, result)
  codes = float(np.mean(got.codes[at] != want.codes))
  scales = float(np.mean(got.scale[at] != want.scale))
  share = 0.01 if 'rotation' in options else 0.0
  return dict(
    ok=codes <= share and scales <= share,
    worst=max(codes, scales),
    tolerance=share,
    wrong_codes=codes,
    wrong_scales=scales,
  )


OPERATIONS = {
  'softmax': softmax,
  'weights': weights,
  'blocks': blocks,
  'quantize': quantize,
}


# --- comparing


def _sample(rows: int) -> np.ndarray:
  """The first rows and the last one."""
  return np.unique(np.r_[0 : min(rows, SAMPLE), rows - 1])


def compare(result, want, tolerance) -> Fact:
  """The worst error in units of the tolerance, and where errors lie."""
  got = np.asarray(result, np.float64)
  error = np.abs(got - want)
  bad = ~(error <= tolerance)
  with np.errstate(all='ignore'):
    ratio = np.where(error > 0, error / tolerance, 0)
  fact: Fact = dict(
    ok=not bad.any(),
    worst=float(np.nan_to_num(ratio, nan=np.inf).max(initial=0)),
    tolerance=1.0,
  )
  if bad.any():
    i, j = np.nonzero(bad)
    fact['wrong'] = dict(
      share=float(bad.mean()),
      zeros=float(np.mean(got[bad] == 0)),
      nans=int(np.isnan(got).sum()),
      first=[
        [int(a), int(b), float(got[a, b]), float(want[a, b])]
        for a, b in zip(i[:6], j[:6], strict=True)
      ],
      rows_mod_64=pattern(i),
      columns_mod_64=pattern(j),
    )
  return fact


def pattern(index) -> str:
  """Which residues modulo 64 are wrong: tells a wrong lane, warp or tile."""
  counts = np.bincount(index % 64, minlength=64)
  most = counts.max()
  return ''.join('.' if not c else '#' if c == most else '+' for c in counts)
