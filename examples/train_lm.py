"""Trains a small byte-level language model in low bits and shows its curve.

The model learns the source text of the Python standard library (nothing is
downloaded). All products of the linear layers of its blocks, forward and
backward, follow a recipe; the held-out loss is that of the quantized forward
pass, next to that of the same weights in float32.

  python examples/train_lm.py
  python examples/train_lm.py --recipe=nvfp4 --exempt_last=1 --monitor_every=20
  python examples/train_lm.py --recipe=mxfp4_sr_rht --optimizer=muon --steps=110

Several devices, here eight that a CPU pretends to have:

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python examples/train_lm.py --mesh=data=2,fsdp=2,model=2

Several processes, each with its devices (the same command in each, with its own
--process):

  python examples/train_lm.py --coordinator=localhost:1234 --processes=2 \
    --process=0 --mesh=data=2

Checkpoints go to WORKDIR/checkpoints every --save_every steps. The same command
goes on from the newest one, and on the same devices an interrupted run ends in
the same bits as an uninterrupted one. The log goes to WORKDIR/log.csv, a
summary to WORKDIR/summary.json and the curve to WORKDIR/curve.png.

With --monitor_every they also show the signal-to-noise ratio of the gradient,
and how many elements of activations x, weights w and cotangents dy the formats
of the recipe clip or flush to zero: the largest share over the layers.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

from lowbit_jax import doctor
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.training import recipes
from models import byte_lm
from support import command, data, model_flags, report, trainer
from support.checkpoints import CheckpointError, Checkpoints

_DEFAULTS = trainer.Settings()

_WORKDIR = flags.DEFINE_string(
  'workdir', 'train_lm_out', 'Directory of checkpoints and results.'
)
_RECIPE = flags.DEFINE_enum(
  'recipe', _DEFAULTS.recipe, recipes.names(), 'Recipe of the linear layers.'
)
_EXEMPT_FIRST = flags.DEFINE_integer(
  'exempt_first', 0, 'Blocks at the start in float32.', lower_bound=0
)
_EXEMPT_LAST = flags.DEFINE_integer(
  'exempt_last', 0, 'Blocks at the end in float32.', lower_bound=0
)
_OPTIMIZER = flags.DEFINE_enum(
  'optimizer', _DEFAULTS.optimizer, tuple(trainer.OPTIMIZERS), 'Optimizer.'
)
_ACCUMULATE = flags.DEFINE_integer(
  'accumulate', 1, 'Microbatches per step.', lower_bound=1
)
_SCAN = flags.DEFINE_bool(
  'scan', False, 'Compile one block for all, and recompute its activations.'
)
_CONFIG = model_flags.define()
_MESH = flags.DEFINE_string(
  'mesh',
  '',
  'Devices by axis, as data=4,fsdp=2,model=1; empty for all on data.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of process 0, for several processes.'
)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Index of this process.')
_SAVE_EVERY = flags.DEFINE_integer(
  'save_every', 40, 'Steps between checkpoints.', lower_bound=1
)
_MONITOR_EVERY = flags.DEFINE_integer(
  'monitor_every',
  0,
  'Steps between measures of the gradient and of clipped and flushed elements;'
  ' 0 for none.',
  lower_bound=0,
)
_EVAL_WINDOWS = flags.DEFINE_integer(
  'eval_windows', 256, 'Held-out windows.', lower_bound=1
)


def settings() -> trainer.Settings:
  """The run that the flags describe."""
  return trainer.Settings(
    _CONFIG(),
    recipe=_RECIPE.value,
    exempt_first=_EXEMPT_FIRST.value,
    exempt_last=_EXEMPT_LAST.value,
    optimizer=_OPTIMIZER.value,
    accumulate=_ACCUMULATE.value,
    scan=_SCAN.value,
  )


def _print_weights(run: trainer.Settings, state) -> None:
  """What the recipe's weight format does to the trained weights."""
  spec = recipes.get(run.recipe).fwd.rhs
  if not isinstance(spec, QuantSpec) or spec.fmt.is_tile or run.scan:
    return
  kernels = byte_lm.linear_kernels(state.params)
  print(doctor.report(kernels, spec.fmt, scale_rule=spec.scale_rule, axis=-2))


def _evaluate(run, state, corpus) -> dict[str, float]:
  """Mean held-out losses, printed."""
  own, plain = (
    trainer.evaluate(run, state, corpus, _EVAL_WINDOWS.value, quantized)
    for quantized in (True, False)
  )
  error = float(np.std(own, ddof=1) / len(own) ** 0.5) if len(own) > 1 else 0.0
  print(
    f'held-out loss, nats per byte: {own.mean():.4f} +- {error:.4f} with the'
    f' forward products of {run.recipe}, {plain.mean():.4f} in float32'
  )
  return {'loss': own.mean(), 'standard_error': error, 'float32': plain.mean()}


def train(run: trainer.Settings, workdir: pathlib.Path) -> None:
  """Trains, evaluates, and saves log, summary and curve."""
  started = time.perf_counter()
  corpus = data.load_corpus()
  mesh = trainer.make_mesh(_MESH.value or f'data={jax.device_count()}')
  checkpoints = Checkpoints(
    workdir / 'checkpoints', trainer.identity(run, corpus)
  )
  try:
    state, records = trainer.train(
      run,
      corpus,
      checkpoints,
      mesh=mesh,
      save_every=_SAVE_EVERY.value,
      monitor_every=_MONITOR_EVERY.value,
      log=workdir / 'log.csv',
    )
  except KeyboardInterrupt:
    saved = checkpoints.steps()
    kept = f'step {saved[-1]} is kept' if saved else 'nothing was saved yet'
    print(f'\ninterrupted: {kept} in {workdir}', file=sys.stderr)
    raise
  finally:
    checkpoints.close()
  losses = _evaluate(run, state, corpus)
  if jax.process_index() > 0:
    return
  if jax.process_count() == 1:
    _print_weights(run, state)
  monitored = [r.monitored for r in records if r.monitored]
  report.write_json(
    workdir / 'summary.json',
    trainer.identity(run, corpus) | losses | (monitored or [{}])[-1],
  )
  if not report.can_plot():
    print('no plot, because matplotlib is not installed')
  else:
    title = f'{run.recipe}, {run.optimizer}: held-out loss {losses["loss"]:.4f}'
    trainer.write_curve(workdir / 'curve.png', records, title)
  print(f'saved log, summary and curve in {workdir}')
  print(f'total time {time.perf_counter() - started:.0f} s')


def work() -> None:
  if _COORDINATOR.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
  run = settings()
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(command.own_directory(_WORKDIR.value))
    train(run, pathlib.Path(_WORKDIR.value))


def main(argv: Sequence[str]) -> int:
  errors = (byte_lm.ConfigError, trainer.NonFiniteError, CheckpointError)
  return command.main(argv, work, errors)


if __name__ == '__main__':
  app.run(main)
