"""Kernels on a GPU: correctness first, then device time against XLA's best.

Needs JAX with CUDA, Flax and NumPy and nothing else. From a bare checkout:

  PYTHONPATH=.:pallas python benchmarks/gpu.py
  PYTHONPATH=.:pallas python benchmarks/gpu.py --only softmax,w4a16

Times are device times of the kernels alone, medians over inputs that are
rotated through more memory than the L2 cache holds. The rooflines, a copy and a
bfloat16 product, are measured in the same run.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import lowbit_jax as lowbit

ROTATE_BYTES = 200 << 20
ROUNDS = 21
GPU = 'mosaic_gpu'


class Row(NamedTuple):
  case: str
  microseconds: float
  roofline: str
  other: str


def device_time(f: Callable, inputs: list[tuple]) -> float:
  """Median device seconds of jitted `f` over rotated inputs."""
  jax.block_until_ready(f(*inputs[0]))
  times = []
  for i in range(ROUNDS):
    _, milliseconds = profiler.measure(f)(*inputs[i % len(inputs)])
    times.append(milliseconds / 1e3)
  return statistics.median(times)


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
  f = jax.jit(lambda x: x + jnp.bfloat16(1))
  inputs = [(normal(i, (128, 1 << 20)),) for i in range(2)]
  return 2 * inputs[0][0].nbytes / device_time(f, inputs)


@functools.cache
def bf16_rate() -> float:
  """Floating-point operations per second of a bfloat16 product."""
  n = 8192
  inputs = [(normal(i, (n, n)), normal(i + 9, (n, n))) for i in range(2)]
  return 2 * n**3 / device_time(jax.jit(jnp.dot), inputs)


def check(got, want, tolerance: float) -> None:
  """Largest error relative to the largest result."""
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  error = np.max(np.abs(got - want)) / np.max(np.abs(want))
  if not error <= tolerance:
    raise AssertionError(f'error {error} of the result, allowed {tolerance}')


def softmax_rows() -> list[Row]:
  rows = []
  shapes = ((8192, 1024), (4096, 4096), (4096, 32768), (64, 131072))
  for shape in shapes:
    for dtype in (jnp.float32, jnp.bfloat16):
      ours = jax.jit(functools.partial(lowbit.softmax, implementation=GPU))
      theirs = jax.jit(jax.nn.softmax)
      inputs = rotated(lambda i, s=shape, d=dtype: (normal(i, s, d),))
      x = inputs[0][0].astype(jnp.float32)
      limit = 1e-2 if dtype == jnp.bfloat16 else 1e-5
      check(ours(*inputs[0]), jax.nn.softmax(x), limit)
      seconds, base = device_time(ours, inputs), device_time(theirs, inputs)
      bytes_ = 2 * inputs[0][0].nbytes
      share = bytes_ / seconds / copy_bandwidth()
      name = f'softmax {shape} {jnp.dtype(dtype).name}'
      faster = f'{base / seconds:.2f}x'
      rows.append(Row(name, seconds * 1e6, f'{share:.0%} of copy', faster))
  return rows


def product_rows() -> list[Row]:
  rows = []
  for n in (4096, 8192):
    for name in ('int4_g128', 'int4_g32', 'mxfp4', 'nvfp4', 'mxfp8_e4m3',
                 'int8_channel'):  # fmt: skip
      fmt = lowbit.formats.get(name)
      dense = normal(99, (n, n))
      q = lowbit.quantize(dense.astype(jnp.float32), fmt, axis=-2)
      weight = lowbit.prepack(q, implementation=GPU)
      values = lowbit.dequantize(q, jnp.bfloat16)
      for m in (1, 16, 64, 256):
        ours = jax.jit(functools.partial(lowbit.dot, implementation=GPU))

        def make(w, i, shape=(m, n)):
          return normal(i, shape), jax.tree.map(jnp.copy, w)

        inputs = rotated(functools.partial(make, weight))
        plain = rotated(functools.partial(make, values))
        want = jnp.dot(
          inputs[0][0].astype(jnp.float32),
          values.astype(jnp.float32),
          precision='highest',
        )
        check(ours(*inputs[0]), want, 3e-2)
        seconds = device_time(ours, inputs)
        base = device_time(jax.jit(jnp.dot), plain)
        bytes_ = weight.nbytes + 4 * m * n
        floor = max(bytes_ / copy_bandwidth(), 2 * m * n * n / bf16_rate())
        rows.append(
          Row(
            f'{name} m={m} n=k={n}',
            seconds * 1e6,
            f'{floor / seconds:.0%} of floor',
            f'{base / seconds:.2f}x',
          )
        )
  return rows


def quantize_rows() -> list[Row]:
  rows = []
  for n in (4096, 8192):
    for name in ('mxfp4', 'mxfp8_e4m3', 'nvfp4'):
      fmt = lowbit.formats.get(name)
      inputs = rotated(lambda i, n=n: (normal(i, (n, n)),))
      plain = jax.jit(
        functools.partial(lowbit.quantize, fmt=fmt, implementation='xla')
      )
      ours = jax.jit(
        functools.partial(lowbit.quantize, fmt=fmt, implementation=GPU)
      )
      got, want = ours(*inputs[0]), plain(*inputs[0])
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
      seconds, base = device_time(ours, inputs), device_time(plain, inputs)
      share = (inputs[0][0].nbytes + got.nbytes) / seconds / copy_bandwidth()
      rows.append(
        Row(
          f'quantize {name} {n}x{n} bfloat16',
          seconds * 1e6,
          f'{share:.0%} of copy',
          f'{base / seconds:.2f}x',
        )
      )
  return rows


CASES = {
  'softmax': (softmax_rows, 'jax.nn.softmax'),
  'w4a16': (product_rows, 'jnp.dot of bfloat16'),
  'quantize': (quantize_rows, 'XLA'),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default=','.join(CASES))
  only = parser.parse_args().only.split(',')
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}')
  print(
    f'copy {copy_bandwidth() / 1e12:.2f} TB/s, bfloat16 product'
    f' {bf16_rate() / 1e12:.0f} TFLOP/s\n'
  )
  for name in only:
    rows, other = CASES[name]
    print(f'| {name} | us | roofline | faster than {other} |')
    print('|---|---|---|---|')
    for row in rows():
      print(
        f'| {row.case} | {row.microseconds:.1f} | {row.roofline} |'
        f' {row.other} |',
        flush=True,
      )
    print()


if __name__ == '__main__':
  main()
