"""How fast quantize and dequantize are, relative to `x + 1` on the same array.

`x + 1` reads and writes the array once, so a ratio below one means that
quantizing costs less than touching the data. Codes are checked against the
scalar oracle first. qwix and torchao are timed too where they are installed.

  python benchmarks/quantize.py
  python benchmarks/quantize.py --size 2048 --formats mxfp4,nvfp4 --rounds 5
  LOWBIT_JAX_CPU=0 python benchmarks/quantize.py  # without kernels
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
import lowbit_jax as lowbit

_SIZE = flags.DEFINE_integer('size', 4096, 'Rows and columns of the array.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timed calls of each candidate.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['mxfp4', 'mxfp8_e4m3', 'mxfp6_e2m3', 'mxint8', 'nvfp4', 'int4_g128',
   'uint4_g128', 'nf4_g64', 'int8_channel', 'fp8_1x128', 'e4m3fn_tensor'],
  'Block formats.',
)  # fmt: skip
_AXES = flags.DEFINE_list('axes', ['-1', '-2'], 'Block axes.')
_PEERS = flags.DEFINE_bool('peers', True, 'Time installed peers too.')

# What we set out to reach: CPU time relative to x + 1 along the last axis.
GOALS = {'mxfp4': 0.5, 'mxfp8_e4m3': 0.5, 'nvfp4': 0.8, 'int4_g128': 0.5}
DEQUANTIZE_GOAL = 1.0
_STATIC = 'fmt', 'axis', 'implementation'


def check(x, fmt, axis: int) -> None:
  """Codes of a few rows or columns equal those of the scalar oracle, and those
  of all equal those of XLA."""
  from lowbit_jax.numerics import oracle

  size = max(fmt.block[0], 32)
  part = x[:1, :size] if axis == -1 else x[:size, :1]
  q = lowbit.quantize(part, fmt, axis=axis)
  blocks = oracle.quantize([float(v) for v in np.ravel(part)], fmt)
  expected = [v for b in blocks for v in oracle.dequantize_block(b, fmt)]
  np.testing.assert_array_equal(
    np.asarray(lowbit.dequantize(q)).reshape(-1), np.array(expected, np.float32)
  )
  quantize = jax.jit(lowbit.quantize, static_argnames=_STATIC)
  ours = quantize(x, fmt=fmt, axis=axis)
  xlas = quantize(x, fmt=fmt, axis=axis, implementation='xla')
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
    np.testing.assert_array_equal(a, b)


def ours(x, axis: int) -> dict:
  thunks = {}
  for name in _FORMATS.value:
    fmt = lowbit.formats.get(name)
    quantize = jax.jit(functools.partial(lowbit.quantize, fmt=fmt, axis=axis))
    dequantize = jax.jit(lowbit.dequantize)
    q = quantize(x)
    thunks[f'{name} quantize'] = functools.partial(quantize, x)
    thunks[f'{name} dequantize'] = functools.partial(dequantize, q)
  return thunks


def qwix_thunks(x) -> dict:
  from qwix._src.core import qarray

  thunks = {}
  for name, tile in (
    ('mxfp4', 32),
    ('mxfp8', 32),
    ('nvfp4', 16),
    ('int4', 128),
  ):
    how = qarray.HowToQuantize(
      qtype=name, channelwise_axes=[0], tiled_axes={1: tile}
    )
    quantize = jax.jit(lambda x, how=how: qarray.quantize(x, how))
    q = quantize(x)
    thunks[f'qwix {name} quantize'] = functools.partial(quantize, x)
    thunks[f'qwix {name} dequantize'] = functools.partial(
      jax.jit(qarray.dequantize), q
    )
  return thunks


def torchao_thunks(x) -> dict:
  import torch
  from torchao.prototype.mx_formats import mx_tensor

  t = torch.from_numpy(np.asarray(x).copy())
  mode = mx_tensor.ScaleCalculationMode.FLOOR
  kinds = {'mxfp8': torch.float8_e4m3fn, 'mxfp4': torch.float4_e2m1fn_x2}
  return {
    f'torchao {name} quantize': lambda d=dtype: mx_tensor.to_mx(t, d, 32, mode)[
      0
    ].numel()
    for name, dtype in kinds.items()
  }


def main(argv):
  del argv
  n = _SIZE.value
  x = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
  base = jax.jit(lambda x: x + 1)
  print(f'{_timing.machine()}; array {n} x {n} float32\n')
  for axis in map(int, _AXES.value):
    for name in _FORMATS.value:
      check(x, lowbit.formats.get(name), axis)
    thunks = ours(x, axis)
    if axis == -1 and _PEERS.value:
      if importlib.util.find_spec('qwix'):
        thunks |= qwix_thunks(x)
      if importlib.util.find_spec('torchao'):
        thunks |= torchao_thunks(x)
    ratios = _timing.compare(lambda: base(x), thunks, rounds=_ROUNDS.value)
    rows = []
    for r in ratios:
      name, _, verb = r.name.rpartition(' ')
      goal = DEQUANTIZE_GOAL if verb == 'dequantize' else GOALS.get(name)
      if axis != -1 or name.startswith(('qwix', 'torchao')):
        goal = None
      gigabytes = x.nbytes / r.milliseconds / 1e6
      rows.append([
        r.name, f'{r.cpu:.2f}', f'{r.wall:.2f}',
        '' if goal is None else f'<= {goal}', f'{gigabytes:.1f}',
      ])  # fmt: skip
    header = [
      'call',
      'CPU ratio',
      'wall ratio',
      'goal (CPU)',
      'GB/s of float32',
    ]
    print(_timing.table(f'blocks along axis {axis}', header, rows) + '\n')


if __name__ == '__main__':
  app.run(main)
