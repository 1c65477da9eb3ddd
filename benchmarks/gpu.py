"""Kernels on a GPU: correctness first, then device time against XLA's best.

Needs JAX with CUDA, Flax and NumPy and nothing else. From a bare checkout:

  PYTHONPATH=.:pallas python benchmarks/gpu.py
  PYTHONPATH=.:pallas python benchmarks/gpu.py --only softmax,weights
  PYTHONPATH=.:pallas python benchmarks/gpu.py --tune

Times are device times of the kernels alone, medians over inputs that are
rotated through more memory than the L2 cache holds. The rooflines, a copy and a
bfloat16 product, are measured in the same run. `--tune` times tile sizes and
writes the table of this device, `pallas/lowbit_pallas/<op>/tuned/`. On a
machine with several GPUs let it see one: CUDA_VISIBLE_DEVICES=0.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import profiler

import _tuning
import lowbit_jax as lowbit
from lowbit_jax.numerics._codec import blocked
from lowbit_pallas import _tuned
from lowbit_pallas.block_matmul import config as block_config
from lowbit_pallas.quantize import config as quantize_config
from lowbit_pallas.softmax import config as softmax_config
from lowbit_pallas.wq_matmul import config as weight_config

GPU = 'mosaic_gpu'
ROTATE_BYTES = 200 << 20
ROUNDS = 21

SOFTMAX = (
  (8192, 1024), (4096, 4096), (4096, 32768), (64, 131072), (512, 262144),
)  # fmt: skip
WEIGHTS = (
  'int4_g128', 'int4_g32', 'mxfp4', 'nvfp4', 'mxfp8_e4m3', 'int8_channel',
)  # fmt: skip
SIZES = 4096, 8192
ROWS = 1, 16, 64, 256
BLOCKS = (
  ('fp8_1x128', 'fp8_128x128'),
  ('mxfp8_e4m3', 'mxfp8_e4m3'),
  ('mxfp4', 'mxfp4'),
  ('nvfp4', 'nvfp4'),
  ('int8_channel', 'int8_channel'),
)
QUANTIZE = (
  ('mxfp4', 0), ('mxfp8_e4m3', 0), ('nvfp4', 0), ('mxfp4', 32), ('mxfp4', 128),
)  # fmt: skip


class Case(NamedTuple):
  """One row of the table.

  Attributes:
    name: what is computed.
    run: computes it by a kernel.
    inputs: arguments of `run`, several of them.
    check: raises AssertionError for a wrong result of the first ones.
    bytes: that any implementation must move.
    flops: bfloat16 operations that it must do.
    others: what XLA has for it: functions and inputs.
  """

  name: str
  run: Callable
  inputs: list[tuple]
  check: Callable
  bytes: int
  flops: float
  others: dict[str, tuple[Callable, list[tuple]]]


class Group(NamedTuple):
  """Cases that share one entry of a table, if they have one."""

  cases: list[Case]
  op: str = ''
  key: str = ''
  candidates: list[dict[str, int]] = []


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


def device_time(f: Callable, inputs: list[tuple]) -> float:
  """Median device seconds of `f` over rotated inputs."""
  _, times = profiler.measure(Rotated(f, inputs), iterations=ROUNDS)()
  return statistics.median(times) / 1e3


def rotated(make: Callable) -> list[tuple]:
  """Enough different inputs to leave the cache cold."""
  first = make(0)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
  count = max(2, min(24, -(-ROTATE_BYTES // max(size, 1))))
  return [first, *(make(i) for i in range(1, count))]


def normal(seed: int, shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.cache
def copy_bandwidth() -> float:
  """Bytes per second of a copy that reads and writes 512 MiB."""
  inputs = [(normal(i, (128, 1 << 20)),) for i in range(2)]
  seconds = device_time(lambda x: x + jnp.bfloat16(1), inputs)
  return 2 * inputs[0][0].nbytes / seconds


@functools.cache
def bf16_rate() -> float:
  """Floating-point operations per second of a bfloat16 product."""
  n = 8192
  inputs = [(normal(i, (n, n)), normal(i + 9, (n, n))) for i in range(2)]
  return 2 * n**3 / device_time(jnp.dot, inputs)


def check_product(want, got) -> None:
  """Errors against the root mean square of the result: 1 % on average, which
  one wrong column of 8192 exceeds, and 8 % at most."""
  want, got = np.asarray(want, np.float32), np.asarray(got, np.float32)
  size = np.sqrt(np.mean(want**2))
  error = np.abs(got - want) / size
  mean, most = np.sqrt(np.mean(error**2)), np.max(error)
  if not (mean <= 0.01 and most <= 0.08):
    raise AssertionError(f'error {mean} on average, {most} at most')


def check_entries(want, got, *, tolerance: float) -> None:
  """Errors relative to every entry."""
  want, got = np.asarray(want, np.float32), np.asarray(got, np.float32)
  error = np.max(np.abs(got - want) / np.maximum(want, 1e-30))
  if not error <= tolerance:
    raise AssertionError(f'error {error}, allowed {tolerance}')


def check_codes(want, got, *, share: float) -> None:
  """Values that differ: none, or next to ties those of another summation."""
  a, b = (np.asarray(lowbit.dequantize(q, jnp.float32)) for q in (want, got))
  differ = np.mean(a != b)
  if not differ <= share:
    raise AssertionError(f'{differ} of the values differ, allowed {share}')


def softmax_groups() -> Iterator[Group]:
  for shape in SOFTMAX:
    for dtype in (jnp.float32, jnp.bfloat16):
      inputs = rotated(lambda i, s=shape, d=dtype: (normal(i, s, d),))
      want = jax.nn.softmax(inputs[0][0].astype(jnp.float32))
      tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
      case = Case(
        f'softmax {shape} {jnp.dtype(dtype).name}',
        functools.partial(lowbit.softmax, implementation=GPU),
        inputs,
        functools.partial(check_entries, want, tolerance=tolerance),
        2 * inputs[0][0].nbytes,
        0,
        {'jax.nn.softmax': (jax.nn.softmax, inputs)},
      )
      slices = -(-shape[1] // softmax_config.SLICE)
      splits = [s for s in (1, 2, 4, 8, 16, 32, 64) if s <= slices]
      candidates = [{'slices': -(-slices // s), 'splits': s} for s in splits]
      key = softmax_config.key(shape[1], jnp.dtype(dtype).itemsize)
      yield Group([case], 'softmax', key, candidates)


def weight_groups() -> Iterator[Group]:
  for n in SIZES:
    for name in WEIGHTS:
      dense = normal(99, (n, n), jnp.float32)
      q = lowbit.quantize(dense, lowbit.formats.get(name), axis=-2)
      weight = lowbit.prepack(q, implementation='mosaic_gpu')
      cases = [weight_case(name, m, n, q, weight) for m in ROWS]
      spec = weight.weight.spec
      schedule = weight_config.heuristic_schedule(spec)
      key = weight_config.key(n, n, spec, jnp.bfloat16, schedule)
      candidates = [
        {'bm': bm, 'stages': stages, 'split_k': split_k}
        for bm in (64, 128, 256)
        for stages in (2, 4, 6)
        for split_k in (1, 2, 4, 8)
      ]
      yield Group(cases, 'wq_matmul', key, candidates)


def weight_case(name: str, m: int, n: int, q, weight) -> Case:
  values = lowbit.dequantize(q, jnp.bfloat16)

  def pairs(w):
    return rotated(lambda i: (normal(i, (m, n)), jax.tree.map(jnp.copy, w)))

  def dequantize_then_dot(x, q):
    return jnp.dot(x, lowbit.dequantize(q, jnp.bfloat16))

  inputs = pairs(weight)
  return Case(
    f'{name} m={m} n=k={n}',
    functools.partial(
      lowbit.dot, preferred_element_type=jnp.bfloat16, implementation=GPU
    ),
    inputs,
    functools.partial(check_product, exact_product(inputs[0][0], values)),
    weight.nbytes + 4 * m * n,
    2 * m * n * n,
    {
      'jnp.dot of bfloat16': (jnp.dot, pairs(values)),
      'dequantize, then jnp.dot': (dequantize_then_dot, pairs(q)),
    },
  )


def exact_product(x, w):
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  return jnp.dot(x, w, precision='highest')


def block_groups() -> Iterator[Group]:
  for n in SIZES:
    for names in BLOCKS:
      left, right = map(lowbit.formats.get, names)
      rhs_axis = (-2, -1) if right.is_tile else -1

      def make(i, n=n, left=left, right=right, axis=rhs_axis):
        a, b = (normal(s, (n, n), jnp.float32) for s in (i, i + 50))
        return lowbit.quantize(a, left), lowbit.quantize(b, right, axis=axis)

      inputs = rotated(make)
      lhs, rhs = inputs[0]
      dense = [
        tuple(lowbit.dequantize(q, jnp.bfloat16) for q in pair)
        for pair in inputs[:2]
      ]
      want = exact_product(dense[0][0], dense[0][1].T)
      others = {'bfloat16': (product_nt, dense)}
      if names == ('mxfp8_e4m3', 'mxfp8_e4m3'):
        others['jax.nn.scaled_matmul'] = (scaled_matmul, inputs)
      narrow = names[0] in ('fp8_1x128', 'int8_channel')
      case = Case(
        f'{names[0]} x {names[1]}, m=n=k={n}',
        functools.partial(
          lowbit.dot_general, dimension_numbers=NT, implementation=GPU
        ),
        inputs,
        functools.partial(check_product, want),
        lhs.nbytes + rhs.nbytes + 4 * n * n,
        2 * n**3 / (2 if narrow else 1),  # 8-bit products at twice the rate
        others,
      )
      if not narrow:  # decoded by wq_matmul on Hopper, whose entries they use
        yield Group([case])
        continue
      key = block_config.key(n, n, blocked(left), blocked(right), 'nt')
      candidates = [
        {'bm': bm, 'bn': 128, 'stages': stages}
        for bm in (64, 128)
        for stages in (2, 3, 4, 5, 6)
      ]
      yield Group([case], 'block_matmul', key, candidates)


NT = (((1,), (1,)), ((), ()))


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


def quantize_groups() -> Iterator[Group]:
  for n in SIZES:
    for name, rotation in QUANTIZE:
      fmt = lowbit.formats.get(name)
      options = {}
      if rotation:
        options['rotation'] = lowbit.transforms.Hadamard(rotation)
      quantize = functools.partial(lowbit.quantize, fmt=fmt, **options)
      plain = functools.partial(quantize, implementation='xla')
      inputs = rotated(lambda i, n=n: (normal(i, (n, n)),))
      want = jax.jit(plain)(*inputs[0])
      case = Case(
        f'quantize {name} {n}x{n} bfloat16'
        + (f', rotation {rotation}' if rotation else ''),
        functools.partial(quantize, implementation=GPU),
        inputs,
        functools.partial(check_codes, want, share=0.01 if rotation else 0.0),
        inputs[0][0].nbytes + want.nbytes,
        0,
        {'XLA': (plain, inputs)},
      )
      task = quantize_config.Task(blocked(fmt), '', rotation=rotation)
      key = quantize_config.key(n, 2, task)
      candidates = [{'columns': c} for c in (128, 256, 512)]
      yield Group([case], 'quantize', key, candidates)


GROUPS = {
  'softmax': softmax_groups,
  'weights': weight_groups,
  'blocks': block_groups,
  'quantize': quantize_groups,
}


def checked_time(case: Case) -> float:
  """Device seconds of a kernel whose result is right."""
  case.check(jax.jit(case.run)(*case.inputs[0]))
  return device_time(case.run, case.inputs)


def row(case: Case) -> str:
  """Time, share of what the roofline allows, and XLA's best beside it."""
  seconds = checked_time(case)
  floor = case.bytes / copy_bandwidth()
  if case.flops:
    floor = max(floor, case.flops / bf16_rate())
  others = {k: device_time(*v) for k, v in case.others.items()}
  other = min(others, key=others.get)
  return (
    f'| {case.name} | {seconds * 1e6:.1f} | {floor / seconds:.0%} |'
    f' {others[other] / seconds:.2f}x | {other} |'
  )


def measure(names: list[str]) -> None:
  print(
    f'copy {copy_bandwidth() / 1e12:.2f} TB/s, bfloat16 product'
    f' {bf16_rate() / 1e12:.0f} TFLOP/s\n'
  )
  print('| case | us | of the roofline | faster than XLA | which |')
  print('|---|---|---|---|---|')
  for name in names:
    for group in GROUPS[name]():
      for case in group.cases:
        print(row(case), flush=True)


def tune(names: list[str]) -> None:
  kind = jax.devices()[0].device_kind
  for name in names:
    for group in GROUPS[name]():
      if not group.candidates:
        continue
      print(f'{group.op}: {group.key}', flush=True)
      trials = [functools.partial(checked_time, case) for case in group.cases]
      sizes = _tuning.best(_tuning.Job(*group[1:], trials))
      print(f'  kept: {sizes or "the heuristic"}', flush=True)
      _tuning.write(_tuned.path(group.op, kind), {group.key: sizes})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default=','.join(GROUPS))
  parser.add_argument('--tune', action='store_true')
  options = parser.parse_args()
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  (tune if options.tune else measure)(options.only.split(','))


if __name__ == '__main__':
  main()
