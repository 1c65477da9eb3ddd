"""How fast quantize and dequantize are, relative to `x + 1` on the same array.

`x + 1` reads and writes the array once, so a ratio below one means that
quantizing costs less than touching the data. Codes are checked against the
scalar oracle and with those of XLA first. qwix and torchao are timed too where
they are installed.

  python benchmarks/quantize.py
  python benchmarks/quantize.py --size 2048 --formats mxfp4,nvfp4 --rounds 5
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
import lowbit_jax as lowbit
from lowbit_jax import qarray

_SIZE = flags.DEFINE_integer('size', 4096, 'Rows and columns of the array.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timed calls of each candidate.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['mxfp4', 'mxfp8_e4m3', 'mxfp6_e2m3', 'mxint8', 'nvfp4', 'int4_g128',
   'uint4_g128', 'nf4_g64', 'int8_channel', 'fp8_1x128', 'e4m3fn_tensor'],
  'Block formats.',
)  # fmt: skip
_AXES = flags.DEFINE_list('axes', ['-1', '-2'], 'Block axes.')
_XLA = flags.DEFINE_bool('xla', True, 'Time XLA where kernels run too.')
_PEERS = flags.DEFINE_bool('peers', True, 'Time installed peers too.')

# What we set out to reach: CPU time relative to x + 1 along the last axis.
GOALS = {'mxfp4': 0.5, 'mxfp8_e4m3': 0.5, 'nvfp4': 0.8, 'int4_g128': 0.5}
DEQUANTIZE_GOAL = 1.0


def check(x, fmt, axis: int) -> None:
  """Codes of a few rows or columns equal those of the scalar oracle."""
  from lowbit_jax.numerics import oracle

  size = max(fmt.block[0], 32)
  part = x[:1, :size] if axis == -1 else x[:size, :1]
  q = lowbit.quantize(part, fmt, axis=axis)
  blocks = oracle.quantize([float(v) for v in np.ravel(part)], fmt)
  expected = [v for b in blocks for v in oracle.dequantize_block(b, fmt)]
  np.testing.assert_array_equal(
    np.asarray(lowbit.dequantize(q)).reshape(-1), np.array(expected, np.float32)
  )


def ours(x, axis: int) -> dict:
  """What the library runs here, and XLA, of which it must have the bits."""
  thunks = {}
  for name in _FORMATS.value:
    quantize = functools.partial(
      lowbit.quantize, fmt=lowbit.formats.get(name), axis=axis
    )
    xlas = functools.partial(quantize, implementation='xla')
    quantize, xlas = jax.jit(quantize), jax.jit(xlas)
    dequantize, decode = jax.jit(lowbit.dequantize), jax.jit(qarray.decode)
    q = quantize(x)
    pairs = zip(jax.tree.leaves(q), jax.tree.leaves(xlas(x)), strict=True)
    for a, b in (*pairs, (dequantize(q), decode(q))):
      np.testing.assert_array_equal(a, b)
    thunks[f'{name} quantize'] = functools.partial(quantize, x)
    thunks[f'{name} dequantize'] = functools.partial(dequantize, q)
    if _XLA.value:
      thunks[f'{name} quantize_xla'] = functools.partial(xlas, x)
      thunks[f'{name} dequantize_xla'] = functools.partial(decode, q)
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
      if axis != -1 or name.startswith(('qwix', 'torchao')) or '_' in verb:
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
