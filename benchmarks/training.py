"""What recipes and optimizers add to a training step, relative to float32.

A step is that of the byte-level model (1.2 million parameters, 2048 bytes),
forward, backward and update. Stochastic rounding is measured on its own, next
to rounding to nearest.

  python benchmarks/training.py
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

import _timing
import lowbit_jax as lowbit

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'examples'))

from models import byte_lm  # noqa: E402
from support import data, trainer  # noqa: E402

_ROUNDS = flags.DEFINE_integer('rounds', 11, 'Timed calls of each candidate.')
_RECIPES = flags.DEFINE_list(
  'recipes',
  ['mxfp8', 'mxint8', 'mxfp4_rtn', 'mxfp4_sr_rht', 'mxfp4_rotated',
   'mxfp4_unbiased', 'mxfp4_lowbit', 'nvfp4', 'nvfp4_rtn', 'nvfp4_lowbit',
   'fp8_current', 'fp8_block', 'jetfire_int8', 'switchback'],
  'Recipes to time.',
)  # fmt: skip
_OPTIMIZERS = flags.DEFINE_list(
  'optimizers', ['adamw8', 'muon', 'stable_spam'], 'Optimizers to time.'
)
_GOALS = {'muon': 1.3} | dict.fromkeys(
  ['mxfp8', 'mxint8', 'mxfp4_rtn', 'mxfp4_sr_rht', 'nvfp4', 'nvfp4_rtn',
   'fp8_current', 'fp8_block', 'jetfire_int8', 'switchback'],
  1.5,
)  # fmt: skip


def step(windows, **settings):
  """A thunk that repeats the first step."""
  run = trainer.Settings(byte_lm.Config(), scan=True, **settings)
  state = jax.jit(lambda: trainer.init(run))()
  return functools.partial(jax.jit(trainer.make_step(run)), state, windows)


def rounding(name: str):
  key = jax.random.key(1) if name == 'stochastic' else None
  x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)
  f = functools.partial(
    lowbit.fake_quant, fmt=lowbit.formats.mxfp4, rounding=name, key=key
  )
  return functools.partial(jax.jit(f), x)


def main(argv):
  del argv
  print(f'{_timing.machine()}\n')
  windows = data.train_batch(data.load_corpus(), byte_lm.Config(), 0)
  thunks = {r: step(windows, recipe=r) for r in _RECIPES.value}
  thunks |= {
    o: step(windows, recipe='float32', optimizer=o) for o in _OPTIMIZERS.value
  }
  ratios = _timing.compare(
    step(windows, recipe='float32'), thunks, rounds=_ROUNDS.value
  )
  ratios += _timing.compare(
    rounding('nearest_even'),
    {'stochastic rounding': rounding('stochastic')},
    rounds=_ROUNDS.value,
  )[1:]
  goals = _GOALS | {'stochastic rounding': 1.5}
  rows = [
    [r.name, f'{r.cpu:.2f}', f'{r.wall:.2f}', f'{goals.get(r.name, "")}',
     f'{r.milliseconds:.1f}']
    for r in ratios
  ]  # fmt: skip
  header = ['step', 'CPU ratio', 'wall ratio', 'goal (CPU)', 'ms']
  print(_timing.table('training step', header, rows))


if __name__ == '__main__':
  app.run(main)
