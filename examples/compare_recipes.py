"""What recipes and optimizers cost in held-out loss, paired by seed.

Runs of the byte-level model that share a seed share initial weights and data.
Each finished run is one JSON file, so an interrupted comparison goes on where
it stopped. The gap is that of the loss with the recipe's own forward products
to the run of the same seed in float32 with the first optimizer, in nats per
byte.

  python examples/compare_recipes.py
  python examples/compare_recipes.py --recipes=nvfp4 --seeds=0 --steps=110
  python examples/compare_recipes.py --recipes=float32 \
    --optimizers=adamw,adamw8,stable_spam

With --forward_only no recipe trains: the networks that were trained in float32
are evaluated with the forward product of each recipe, of both operands and of
each alone.

  python examples/compare_recipes.py --forward_only --recipes=mxfp4_rtn,nvfp4

The table is printed, and kept as Markdown in WORKDIR/recipes.md or
WORKDIR/forward_only.md.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import linen as low, optimizers, recipes
from models import byte_lm
from support import command, data, report, runs, trainer
from support.checkpoints import CheckpointError, Checkpoints

_RECIPES = flags.DEFINE_list(
  'recipes',
  ['mxfp8', 'mxint8', 'nvfp4', 'nvfp4_rtn', 'nvfp4_lowbit', 'mxfp4_rtn',
   'mxfp4_sr_rht', 'mxfp4_rotated', 'mxfp4_centered', 'mxfp4_unbiased',
   'mxfp4_lowbit'],
  'Recipes to compare with float32.',
)  # fmt: skip
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds.')
_STEPS = flags.DEFINE_integer('steps', 320, 'Steps of each run.')
_OPTIMIZERS = flags.DEFINE_list(
  'optimizers', ['adamw'], 'Optimizers to train each recipe with.'
)
_EXEMPT_LAST = flags.DEFINE_integer(
  'exempt_last', 0, 'Blocks at the end that stay in float32.'
)
_FORWARD_ONLY = flags.DEFINE_bool(
  'forward_only', False, 'Evaluate networks trained in float32.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'compare_recipes_out', 'Where finished runs are kept.'
)
_EVAL_WINDOWS = 256


def _settings(recipe: str, optimizer: str, seed: int) -> trainer.Settings:
  return trainer.Settings(
    byte_lm.Config(steps=_STEPS.value, seed=seed),
    recipe=recipe,
    optimizer=optimizer,
    exempt_last=_EXEMPT_LAST.value,
    # Stacked blocks start from other weights, so all runs of a table have them
    # or none.
    scan=not _EXEMPT_LAST.value,
    recompute=False,
  )


def _name(run: trainer.Settings) -> str:
  steps, seed = run.model.steps, run.model.seed
  exempt = f'-last{run.exempt_last}' if run.exempt_last else ''
  return f'{run.recipe}-{run.optimizer}-{steps}-{seed}{exempt}'


def _train(run: trainer.Settings, corpus: data.Corpus):
  """The last state and the log; networks in float32 are kept."""
  if run.recipe != 'float32':
    return trainer.train(run, corpus)
  path = pathlib.Path(_WORKDIR.value) / _name(run)
  checkpoints = Checkpoints(path, trainer.identity(run, corpus))
  with contextlib.closing(checkpoints):
    return trainer.train(
      run,
      corpus,
      checkpoints,
      save_every=run.model.steps,
      log=path.with_name(f'{path.name}.csv'),
    )


def one_run(run: trainer.Settings, corpus: data.Corpus) -> dict:
  """What was measured of the run: the finished one on disk, or a new one.

  Raises:
    DamagedFileError: if the file on disk is damaged; it is left as it is.
    CheckpointError: if it is of other text or of another recipe of that name.
  """
  store = runs.Store(pathlib.Path(_WORKDIR.value), 'measured')
  name, identity = _name(run), trainer.identity(run, corpus)
  if measured := store.load(name, identity):
    return measured
  start = time.process_time()
  state, records = _train(run, corpus)
  own, plain = (
    trainer.evaluate(run, state, corpus, _EVAL_WINDOWS, quantized)
    for quantized in (True, False)
  )
  measured = {
    'loss': own.mean(),
    'float32': plain.mean(),
    'training_loss': float(np.mean([r.loss for r in records[-50:]])),
    'cpu_seconds': time.process_time() - start,
    'jax': jax.__version__,
  }
  store.save(name, identity, measured)
  return measured


def _state_bytes(run: trainer.Settings) -> float:
  """Bytes of optimizer state for each parameter."""
  state = jax.eval_shape(lambda: trainer.init(run))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  return optimizers.state_bytes(state.optimizer) / parameters


def _spread(gaps: np.ndarray) -> str:
  return f'{gaps.std(ddof=1):.4f}' if len(gaps) > 1 else ''


def compare(corpus: data.Corpus, seeds: Sequence[int]) -> Iterator[list]:
  """Rows of the table of trained runs, its header first."""
  several = len(_OPTIMIZERS.value) > 1
  header = ['recipe']
  if several:
    header += ['optimizer', 'state bytes per weight']
  header += [f'seed {seed}' for seed in seeds]
  base = np.array(
    [
      one_run(_settings('float32', _OPTIMIZERS.value[0], s), corpus)['loss']
      for s in seeds
    ]
  )
  print('float32 losses:', ' '.join(f'{loss:.4f}' for loss in base))
  yield [*header, 'mean gap', 'spread', 'float32 forward']
  for recipe, optimizer in itertools.product(_RECIPES.value, _OPTIMIZERS.value):
    settings = [_settings(recipe, optimizer, seed) for seed in seeds]
    runs = [one_run(run, corpus) for run in settings]
    gaps = np.array([run['loss'] for run in runs]) - base
    plain = np.array([run['float32'] for run in runs]) - base
    row = [recipe]
    if several:
      row += [optimizer, f'{_state_bytes(settings[0]):.2f}']
    row += [f'{gap:+.4f}' for gap in gaps]
    yield [*row, f'{gaps.mean():+.4f}', _spread(gaps), f'{plain.mean():+.4f}']


def _current(spec):
  """A site that takes its tensor scale, if any, from its own data."""
  if isinstance(spec, QuantSpec):
    return dataclasses.replace(spec, tensor_scaling=None)
  return spec


def compare_forward(
  corpus: data.Corpus, seeds: Sequence[int]
) -> Iterator[list]:
  """Rows of the table of forward products, its header first."""
  yield ['forward product', 'mean gap', 'spread', 'activations', 'weights']
  runs = [_settings('float32', _OPTIMIZERS.value[0], seed) for seed in seeds]
  states = [_train(run, corpus)[0] for run in runs]

  def losses(recipe: Recipe | None) -> np.ndarray:
    network = byte_lm.ByteLM(
      runs[0].model,
      dot_general_cls=low.dot_general_cls(recipe),
      scan=runs[0].scan,
      recompute=False,
    )
    loss = trainer.make_loss(network)
    return np.array(
      [
        trainer.held_out(loss, network.config, s, corpus, _EVAL_WINDOWS)
        for s in states
      ]
    ).mean(axis=1)

  base = losses(None)
  for name in _RECIPES.value:
    recipe = recipes.get(name)
    forward = recipe.fwd
    lhs, rhs = _current(forward.lhs), _current(forward.rhs)
    both, activations, weights = (
      losses(
        Recipe(
          name,
          GemmSpec(*operands, forward.hadamard, forward.signs),
          center=recipe.center,
          principal=recipe.principal,
        )
      )
      - base
      for operands in ((lhs, rhs), (lhs, None), (None, rhs))
    )
    yield [
      name,
      f'{both.mean():+.4f}',
      _spread(both),
      f'{activations.mean():+.4f}',
      f'{weights.mean():+.4f}',
    ]


def _seeds() -> list[int]:
  """The seeds, after every setting that will be run was made once.

  Raises:
    ConfigError: for values that no run can have.
  """
  for flag in (_RECIPES, _OPTIMIZERS, _SEEDS):
    if not flag.value:
      raise byte_lm.ConfigError(f'--{flag.name} names nothing')
  if not all(seed.isdecimal() for seed in _SEEDS.value):
    raise byte_lm.ConfigError(
      f'--seeds={",".join(_SEEDS.value)} are not integers from 0 on'
    )
  seeds = [int(seed) for seed in _SEEDS.value]
  for recipe, optimizer, seed in itertools.product(
    ('float32', *_RECIPES.value), _OPTIMIZERS.value, seeds
  ):
    _settings(recipe, optimizer, seed)
  return seeds


def work() -> None:
  seeds = _seeds()
  with command.own_directory(_WORKDIR.value) as workdir:
    tabulate(seeds, workdir)


def tabulate(seeds: Sequence[int], workdir: pathlib.Path) -> None:
  """Prints the table that the flags ask for, and writes it."""
  corpus = data.load_corpus()
  print(
    f'{_STEPS.value} steps, {",".join(_OPTIMIZERS.value)}, corpus'
    f' {corpus.digest}, jax {jax.__version__}'
  )
  if _FORWARD_ONLY.value:
    rows, name = compare_forward(corpus, seeds), 'forward_only.md'
  else:
    rows, name = compare(corpus, seeds), 'recipes.md'
  lines = []
  for row in rows:
    lines.append('| ' + ' | '.join(row) + ' |')
    print(lines[-1], flush=True)
    if len(lines) == 1:
      lines.append('|---' * len(row) + '|')
      print(lines[-1])
  report.write_atomically(
    workdir / name, ''.join(f'{line}\n' for line in lines).encode()
  )


def main(argv: Sequence[str]) -> int:
  errors = (byte_lm.ConfigError, trainer.NonFiniteError, CheckpointError)
  return command.main(argv, work, errors)


if __name__ == '__main__':
  app.run(main)
