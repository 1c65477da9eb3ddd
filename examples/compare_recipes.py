"""What recipes cost in held-out loss, paired with float32 by seed.

Runs of the byte-level model that share a seed share initial weights and data.
Each finished run is one JSON file, so an interrupted comparison goes on where
it stopped. The gap is that of the loss with the recipe's own forward products
to the float32 run of the same seed, in nats per byte.

  python examples/compare_recipes.py
  python examples/compare_recipes.py --recipes=nvfp4 --seeds=0 --steps=110
"""

import json
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

import byte_lm
import lm_trainer

_RECIPES = flags.DEFINE_list(
  'recipes',
  ['mxfp8', 'mxint8', 'nvfp4', 'nvfp4_rtn', 'mxfp4_rtn', 'mxfp4_sr_rht',
   'mxfp4_rotated', 'mxfp4_lowbit'],
  'Recipes to compare with float32.',
)  # fmt: skip
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
_STEPS = flags.DEFINE_integer('steps', 320, 'Steps of each run.')
_OPTIMIZER = flags.DEFINE_string('optimizer', 'adamw', 'Optimizer of all runs.')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'compare_recipes_out', 'Where finished runs are kept.'
)
_EVAL_WINDOWS = 256


def one_run(recipe: str, seed: int, corpus: byte_lm.Corpus) -> dict:
  """The finished run from disk, or a new one."""
  steps, optimizer = _STEPS.value, _OPTIMIZER.value
  name = f'{recipe}-{optimizer}-{steps}-{seed}.json'
  path = pathlib.Path(_WORKDIR.value) / name
  if path.exists():
    return json.loads(path.read_text())
  settings = lm_trainer.Settings(
    byte_lm.Config(steps=steps, seed=seed),
    recipe=recipe,
    optimizer=optimizer,
    scan=True,
  )
  start = time.process_time()
  state, records = lm_trainer.train(settings, corpus)
  own, plain = (
    lm_trainer.evaluate(settings, state, corpus, _EVAL_WINDOWS, quantized)
    for quantized in (True, False)
  )
  run = lm_trainer.identity(settings, corpus) | {
    'loss': own.mean(),
    'float32': plain.mean(),
    'training_loss': float(np.mean([r.loss for r in records[-50:]])),
    'cpu_seconds': time.process_time() - start,
    'jax': jax.__version__,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  lm_trainer.write_summary(path, run)
  return run


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}; use flags.')
  corpus = byte_lm.load_corpus()
  seeds = [int(seed) for seed in _SEEDS.value]
  for seed in seeds:
    for recipe in ('float32', *_RECIPES.value):
      one_run(recipe, seed, corpus)
  base = np.array([one_run('float32', s, corpus)['loss'] for s in seeds])
  print(
    f'{_STEPS.value} steps, {_OPTIMIZER.value}, corpus {corpus.digest}, jax'
    f' {jax.__version__}; float32: {" ".join(f"{loss:.4f}" for loss in base)}'
  )
  print(
    f'{"recipe":<16} {"gap":>8} {"spread":>7} {"float32 forward":>15}  seeds'
  )
  for recipe in _RECIPES.value:
    runs = [one_run(recipe, seed, corpus) for seed in seeds]
    gaps = np.array([run['loss'] for run in runs]) - base
    plain = np.array([run['float32'] for run in runs]) - base
    spread = gaps.std(ddof=1) if len(gaps) > 1 else float('nan')
    print(
      f'{recipe:<16} {gaps.mean():>+8.4f} {spread:>7.4f} {plain.mean():>+15.4f}'
      f'  {" ".join(f"{gap:+.4f}" for gap in gaps)}'
    )


if __name__ == '__main__':
  app.run(main)
