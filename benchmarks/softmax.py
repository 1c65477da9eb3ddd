"""What `lowbit_jax.softmax` costs, relative to `jax.nn.softmax`.

Results are checked against float64 first.

  python benchmarks/softmax.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
import lowbit_jax as lowbit

_ROUNDS = flags.DEFINE_integer('rounds', 31, 'Timed calls of each candidate.')
_SHAPES = ((8, 128), (256, 1024), (1024, 4096), (4, 262144))


def check(x) -> None:
  """Within 8 u and the chain of the row's sum, as tests/ops/softmax_test.py."""
  wide = np.asarray(x, np.float64)
  want = np.exp(wide - wide.max(-1, keepdims=True))
  want /= want.sum(-1, keepdims=True)
  relative = np.abs(np.asarray(lowbit.softmax(x), np.float64) / want - 1)
  assert relative.max() <= (8 + np.log2(x.shape[-1])) * 2.0**-24


def main(argv):
  del argv
  print(f'{_timing.machine()}\n')
  rows = []
  for shape in _SHAPES:
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    check(x)
    ours, theirs = jax.jit(lowbit.softmax), jax.jit(jax.nn.softmax)
    ratios = _timing.compare(
      functools.partial(theirs, x),
      {str(shape): functools.partial(ours, x)},
      rounds=_ROUNDS.value,
    )
    for r in ratios[1:]:
      rows.append(
        [r.name, f'{r.wall:.2f}', f'{r.cpu:.2f}', f'{r.milliseconds:.2f}']
      )
  header = ['shape', 'wall ratio', 'CPU ratio', 'ms']
  print(_timing.table('softmax', header, rows))


if __name__ == '__main__':
  app.run(main)
