"""How fast `ragged_dot` with quantized matrices is, relative to float32.

x is (m, 256) float32, the groups have one matrix of 256 x 256 each, quantized
beforehand along k; the rows are shared evenly among the groups, but for one
group in four, which has none. The base is `lax.ragged_dot` on float32 matrices.
Results are checked against it on the dequantized ones first.

  python benchmarks/ragged.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
import lowbit_jax as lowbit

_SIZE = flags.DEFINE_integer('size', 256, 'Rows and columns of a matrix.')
_GROUPS = flags.DEFINE_list('groups', ['8', '64'], 'Numbers of groups.')
_ROWS = flags.DEFINE_list('rows', ['8', '64', '512'], 'Rows of x.')
_FORMAT = flags.DEFINE_string('format', 'mxfp4', 'Block format.')
_ROUNDS = flags.DEFINE_integer('rounds', 21, 'Timed calls of each.')


def group_sizes(groups: int, rows: int) -> np.ndarray:
  """Rows of each group."""
  busy = np.flatnonzero(np.arange(groups) % 4 != 3)
  return np.bincount(busy[np.arange(rows) % len(busy)], minlength=groups)


def ratio(groups: int, rows: int) -> _timing.Ratio:
  """Time of `ragged_dot` over that of float32."""
  n = _SIZE.value
  fmt = lowbit.formats.get(_FORMAT.value)
  w = jax.random.normal(jax.random.key(1), (groups, n, n))
  x = jax.random.normal(jax.random.key(0), (rows, n))
  q = lowbit.quantize(w, fmt, axis=-2)
  sizes = jnp.asarray(group_sizes(groups, rows), jnp.int32)
  dense = jax.jit(jax.lax.ragged_dot)
  packed = jax.jit(lowbit.ragged_dot)
  w = lowbit.dequantize(q)
  bound = 2 * (n + 8) * 2.0**-24 * dense(abs(x), abs(w), sizes)
  assert bool(jnp.all(abs(packed(x, q, sizes) - dense(x, w, sizes)) <= bound))
  base = functools.partial(dense, x, w, sizes)
  thunks = {'packed': functools.partial(packed, x, q, sizes)}
  return _timing.compare(base, thunks, rounds=_ROUNDS.value)[1]


def main(argv):
  del argv
  n = _SIZE.value
  print(f'{_timing.machine()}; {_FORMAT.value}, matrices of {n} x {n}\n')
  rows = []
  for groups in map(int, _GROUPS.value):
    for m in map(int, _ROWS.value):
      r = ratio(groups, m)
      cells = str(groups), str(m), f'{r.wall:.2f}', f'{r.cpu:.2f}'
      rows.append([*cells, f'{r.milliseconds:.2f}'])
  header = ['groups', 'rows', 'wall ratio', 'CPU ratio', 'ms']
  print(_timing.table('ragged_dot over lax.ragged_dot', header, rows))


if __name__ == '__main__':
  app.run(main)
