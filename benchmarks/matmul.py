"""How fast products with quantized weights are, relative to float32 `jnp.dot`.

x is (m, 4096) float32, w is (4096, 4096), quantized beforehand along k. Each
implementation that takes the operands here is timed. Results are checked
against a float64 product of the dequantized operands first. qwix is timed too
where it is installed.

  python benchmarks/matmul.py
  python benchmarks/matmul.py --rows 1 --formats int4_g128 --rounds 31
  python benchmarks/matmul.py --stored nk
  python benchmarks/matmul.py --k 576 --n 1536 --rows 1
  python benchmarks/matmul.py --activations int8_g32
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
import lowbit_jax as lowbit

_K = flags.DEFINE_integer('k', 4096, 'Rows of the weight.')
_N = flags.DEFINE_integer('n', 4096, 'Columns of the weight.')
_ROWS = flags.DEFINE_list('rows', ['1', '8', '256'], 'Rows of x.')
_ROUNDS = flags.DEFINE_integer('rounds', 21, 'Timed calls of each candidate.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['int8_channel', 'int8_g128', 'int4_g128', 'uint4_g128', 'mxfp4', 'nvfp4',
   'mxfp6_e2m3', 'mxfp8_e4m3', 'nf4_g64', 'int2_g32', 'int3_g32'],
  'Block formats of the weight.',
)  # fmt: skip
_STORED = flags.DEFINE_enum(
  'stored', 'kn', ['kn', 'nk'], 'Axes of the weight, the last one contiguous.'
)
_ACTIVATIONS = flags.DEFINE_string(
  'activations',
  '',
  'Format to which x is quantized in each call; none by default.',
)
_PEERS = flags.DEFINE_bool('peers', True, 'Time installed peers too.')

# What we set out to reach: wall time relative to float32 jnp.dot on idle cores.
_FOUR_BITS = ['int4_g128', 'uint4_g128', 'mxfp4', 'nvfp4', 'nf4_g64']
GOALS = {
  1: dict.fromkeys(_FOUR_BITS, 0.15)
  | dict.fromkeys(['int8_channel', 'int8_g128', 'mxfp8_e4m3'], 0.22)
  | dict.fromkeys(['int2_g32', 'int3_g32'], 0.12),
  8: dict.fromkeys(_FOUR_BITS, 0.35),
  256: dict.fromkeys(_FOUR_BITS, 0.8) | {'int8 x int8': 0.65},
}


def product(x, q, implementation=None):
  """x times the weight, which stands for (k, n) however it is stored."""
  subscripts = f'mk,{_STORED.value}->mn'
  return lowbit.einsum(subscripts, x, q, implementation=implementation)


def stored(x):
  """x as --activations has it."""
  if not _ACTIVATIONS.value or isinstance(x, lowbit.QArray):
    return x
  return lowbit.quantize(x, lowbit.formats.get(_ACTIVATIONS.value))


def check(x, w, implementation) -> None:
  """The product is within the rounding of a float32 sum of k terms."""

  def dense(a):
    a = lowbit.dequantize(a) if isinstance(a, lowbit.QArray) else a
    return np.asarray(a, np.float64)

  w_kn = dense(w) if _STORED.value == 'kn' else dense(w).T
  a, b = dense(x)[:4], w_kn[:, :64]
  bound = (np.abs(a) @ np.abs(b)) * (b.shape[0] + 8) * 2.0**-24
  actual = product(x, w, implementation)[:4, :64]
  assert np.all(np.abs(np.asarray(actual, np.float64) - a @ b) <= bound)


def candidates(x, w) -> tuple[dict, dict]:
  thunks, notes = {}, {}

  def add(name, x, q):
    subscripts = f'mk,{_STORED.value}->mn'
    for implementation in ('cpu', 'xla'):
      select = functools.partial(
        lowbit.select_implementation, implementation=implementation
      )
      try:
        choice = select('einsum', subscripts, stored(x), q)
      except NotImplementedError:
        continue
      check(stored(x), q, implementation)
      run = jax.jit(lambda x, q, by=implementation: product(stored(x), q, by))
      key = name, implementation
      thunks[key] = functools.partial(run, x, q)
      notes[key] = choice.note

  axis = _STORED.value.index('k') - 2
  w = w if axis == -2 else w.T
  for name in _FORMATS.value:
    add(name, x, lowbit.quantize(w, lowbit.formats.get(name), axis=axis))
  int8 = lowbit.formats.int8_channel
  q = lowbit.quantize(w, int8, axis=axis)
  add('int8 x int8', lowbit.quantize(x, int8), q)
  dynamic = jax.jit(lambda x, q: product(lowbit.quantize(x, int8), q))
  thunks['int8 x int8, x quantized too', ''] = functools.partial(dynamic, x, q)
  return thunks, notes


def qwix_candidates(x, w) -> dict:
  import qwix
  from qwix._src.core import qarray

  thunks = {}
  for name, tiles in (('int8', {}), ('int4', {0: 128}), ('mxfp4', {0: 32})):
    how = qarray.HowToQuantize(
      qtype=name, channelwise_axes=[1], tiled_axes=tiles
    )
    q = jax.jit(lambda w, how=how: qarray.quantize(w, how))(w)
    thunks[f'qwix {name}', ''] = functools.partial(jax.jit(qwix.dot), x, q)
  return thunks


def main(argv):
  del argv
  k, n = _K.value, _N.value
  w = jax.random.normal(jax.random.key(1), (k, n), jnp.float32)
  base = jax.jit(jnp.dot)
  print(f'{_timing.machine()}; weight {k} x {n}\n')
  for m in map(int, _ROWS.value):
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.float32)
    thunks, notes = candidates(x, w)
    if _PEERS.value and importlib.util.find_spec('qwix'):
      thunks |= qwix_candidates(x, w)
    ratios = _timing.compare(
      lambda x=x: base(x, w), thunks, rounds=_ROUNDS.value
    )
    rows = []
    for r in ratios:
      name, by = r.name if isinstance(r.name, tuple) else (r.name, '')
      goal = GOALS.get(m, {}).get(name)
      rows.append([
        name, by, f'{r.wall:.2f}', f'{r.cpu:.2f}',
        '' if goal is None else f'<= {goal}', f'{r.milliseconds:.2f}',
        notes.get(r.name, ''),
      ])  # fmt: skip
    header = [
      'weight', 'by', 'wall ratio', 'CPU ratio', 'goal (wall)', 'ms', 'how',
    ]  # fmt: skip
    print(_timing.table(f'm = {m}', header, rows) + '\n')


if __name__ == '__main__':
  app.run(main)
