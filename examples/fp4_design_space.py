"""Sweeps the choices of 4-bit training on small tasks: loss against overhead.

Every linear layer computes its three products with E2M1 operands, in blocks
along the reduced axis. Starting from NVFP4 rounded to nearest ("base"), a
setting changes one choice or several: how scales are stored and rounded, what
gradient rounders have, where rounding is stochastic, which products are
rotated, which optimizer is used. Each setting trains from the same weights on
the same batches as float32, seed by seed, and the table says by how much its
held-out loss is higher, with the standard error over seeds. Overhead is the
elementwise work of a setting, counted and not measured.

  python examples/fp4_design_space.py --quick    # 12 runs, under a minute
  python examples/fp4_design_space.py            # 3 tasks, about 20 minutes
  python examples/fp4_design_space.py --tasks=lm --settings=base,sr=grads \
    --seeds=5
  python examples/fp4_design_space.py --settings=base,sr=grads+hadamard=bwd

A setting is "base" or CHOICE=VALUE joined by +; --settings=list prints them
all. Each finished run (a task in a setting, all seeds) is a file in
WORKDIR/runs; the same command goes on with the runs that are missing. Results
go to WORKDIR/table.csv and WORKDIR/plot.png. Models this small rank nothing for
large ones, and gaps below two standard errors are no findings.
"""

import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from lowbit_jax import ops
from lowbit_jax.recipe import GemmSpec, Recipe
from lowbit_jax.training import micro_scaling, optimizers
from lowbit_jax.training.micro_scaling import MicroScaling
from models import byte_lm
from support import command, loop, report, runs, tasks
from support.checkpoints import CheckpointError

_FLOAT32 = 'float32'
_SURROGATES = tuple(micro_scaling.SURROGATES)

# Sites by their order: forward x and w, dgrad dy and w, wgrad x and dy.
_SR_SITES = {
  'none': (0, 0, 0, 0, 0, 0),
  'grads': (0, 0, 1, 0, 0, 1),
  'grads_x': (0, 0, 1, 0, 1, 1),
  'backward': (0, 0, 1, 1, 1, 1),
  'all': (1, 1, 1, 1, 1, 1),
}
# Products: forward, dgrad, wgrad.
_HADAMARD_PRODUCTS = {
  'none': (0, 0, 0),
  'fwd': (1, 0, 0),
  'bwd': (0, 1, 1),
  'all': (1, 1, 1),
  'wgrad': (0, 0, 1),
}

# Choices and their values, the one of "base" first.
CHOICES = {
  'step_grad': _SURROGATES,
  'stat_grad': micro_scaling.STAT_GRADS,
  'scale_grad': _SURROGATES,
  'scale': ('E4M3', *(s for s in micro_scaling.SCALES if s != 'E4M3')),
  'scale_form': micro_scaling.SCALE_FORMS,
  'scale_round': micro_scaling.SCALE_ROUNDINGS,
  'tensor_scale': ('current', 'off'),
  'tensor_scale_grad': micro_scaling.TENSOR_SCALE_GRADS,
  'zero_scale': micro_scaling.ZERO_SCALES,
  'payload': micro_scaling.PAYLOADS,
  'sr': tuple(_SR_SITES),
  'hadamard': tuple(_HADAMARD_PRODUCTS),
  'optimizer': ('adamw', 'stable_spam'),
  'loss_scale': ('1', '1024'),
  'block': ('auto', '16', '32', '64'),
}

SETTINGS = (
  'base',
  'step_grad=dge',
  'step_grad=spline',
  'step_grad=sigmoid',
  'stat_grad=absmax',
  'stat_grad=hardsoftmax',
  'stat_grad=softsoftmax',
  'stat_grad=absmax+scale_grad=dge',
  'stat_grad=absmax+scale_grad=spline',
  'stat_grad=absmax+scale_grad=sigmoid',
  'tensor_scale_grad=absmax',
  'scale=E5M2',
  'scale=UE5M3',
  'scale=E8M3',
  'scale=BF16',
  'scale=ideal+tensor_scale=off',
  'scale=E8M0+scale_round=up+tensor_scale=off',
  'scale=E8M0+tensor_scale=off',
  'scale=UE5M3+tensor_scale=off',
  'tensor_scale=off',
  'scale_round=up',
  'scale_round=down',
  'scale_round=stochastic',
  'scale_form=encode',
  'scale_form=encode+scale_round=up',
  'zero_scale=to_one',
  'payload=unrounded',
  'sr=grads',
  'sr=grads_x',
  'sr=backward',
  'sr=all',
  'hadamard=fwd',
  'hadamard=bwd',
  'hadamard=all',
  'hadamard=wgrad',
  'optimizer=stable_spam',
  'loss_scale=1024',
  'sr=grads+hadamard=bwd',
  'scale=UE5M3+sr=grads+hadamard=bwd',
)
_QUICK = {
  'tasks': ('regression', 'diffusion'),
  'settings': (
    'base',
    'step_grad=dge',
    'scale=E8M0+scale_round=up+tensor_scale=off',
    'scale_form=encode+scale_round=up',
    'sr=grads+hadamard=bwd',
  ),
  'seeds': 2,
  'steps': 120,
}

_WORKDIR = flags.DEFINE_string(
  'workdir', 'fp4_design_space_out', 'Directory of runs and results.'
)
_QUICK_FLAG = flags.DEFINE_bool(
  'quick', False, 'A toy sweep, which replaces the four flags below.'
)
_TASKS = flags.DEFINE_list(
  'tasks',
  ['regression', 'digits', 'diffusion'],
  f'What is trained, of {", ".join(tasks.TASKS)}.',
)
_SETTINGS = flags.DEFINE_list(
  'settings',
  list(SETTINGS),
  'What is compared with float32; "list" for the choices and values.',
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds of each run.', lower_bound=1)
_STEPS = flags.DEFINE_integer(
  'steps', 0, 'Training steps; 0 for those of the task.', lower_bound=0
)


class Overhead(NamedTuple):
  """Counted elementwise work, per element and mean over the six operands.

  Attributes:
    operations: elementwise operations; those of plain block scaling (absolute
      maximum, scale, product, rounding) are 4.
    passes: times that operands are read once more from memory.
  """

  operations: float
  passes: float


def parse(text: str) -> dict[str, str]:
  """The choices of a setting that differ from those of "base".

  Raises:
    ConfigError: for unknown choices and values, with the valid ones, and for
      combinations that make no sense.
  """
  changed = {}
  for part in () if text == 'base' else text.split('+'):
    name, _, value = part.partition('=')
    if name not in CHOICES:
      raise byte_lm.ConfigError(
        f'setting {text!r}: {name!r} is not "base" or one of the choices'
        f' {", ".join(CHOICES)}.'
      )
    if value not in CHOICES[name]:
      raise byte_lm.ConfigError(
        f'setting {text!r}: {name}={value!r} is not one of'
        f' {", ".join(CHOICES[name])}.'
      )
    if value != CHOICES[name][0]:
      changed[name] = value
  try:
    make_recipe(changed)
  except ValueError as error:
    raise byte_lm.ConfigError(f'setting {text!r}: {error}.') from error
  return changed


def _label(changed: dict[str, str]) -> str:
  parts = [f'{name}={changed[name]}' for name in CHOICES if name in changed]
  return '+'.join(parts) or 'base'


def _complete(changed: dict[str, str]) -> dict[str, str]:
  full = {name: values[0] for name, values in CHOICES.items()} | changed
  if full['block'] == 'auto':
    full['block'] = '32' if full['scale'] == 'E8M0' else '16'
  return full


def make_recipe(changed: dict[str, str]) -> Recipe:
  """The recipe of a setting; surrogates belong to the forward operands."""
  full = _complete(changed)
  same = {
    'block': int(full['block']),
    'scale': micro_scaling.SCALES[full['scale']],
    'allow_underflow': True,
  }
  names = ('tensor_scale', 'scale_round', 'scale_form', 'zero_scale', 'payload')
  same |= {name: full[name] for name in names}
  gradients = ('step_grad', 'stat_grad', 'scale_grad', 'tensor_scale_grad')
  forward = {name: full[name] for name in gradients}
  # The smooth maximum is another number: all operands use it.
  backward = {}
  if full['stat_grad'] == 'softsoftmax':
    backward['stat_grad'] = 'softsoftmax'
  sites = []
  for i, stochastic in enumerate(_SR_SITES[full['sr']]):
    rounding = 'stochastic' if stochastic else 'nearest_even'
    own = forward if i < 2 else backward
    sites.append(MicroScaling(rounding=rounding, **own, **same))
  rotated = _HADAMARD_PRODUCTS[full['hadamard']]
  size = int(full['block'])
  products = [
    GemmSpec(sites[2 * i], sites[2 * i + 1], size if rotated[i] else 0)
    for i in range(3)
  ]
  return Recipe(_label(changed), *products)


def overhead(changed: dict[str, str]) -> Overhead:
  """Counts of a setting.

  Extra operations: 1 for the maximum over the tensor, which also is one more
  pass over it; 1 for the random bits of stochastic rounding; log2 d additions
  for a rotation of size d; for the forward operands 3 for a surrogate (save,
  evaluate, multiply), 2 for the gradient of the maximum (a reduction and a
  scatter), 4 for that of a softmax (also exponentials and saved weights), 3 per
  block for a surrogate of the scale and 2 for the gradient of the tensor scale.
  """
  full = _complete(changed)
  block = int(full['block'])
  operations = 6 * 4.0
  passes = 0.0
  if full['tensor_scale'] == 'current':
    operations, passes = operations + 6, passes + 6
  operations += sum(_SR_SITES[full['sr']])
  operations += 2 * sum(_HADAMARD_PRODUCTS[full['hadamard']]) * math.log2(block)
  if full['scale_round'] == 'stochastic':
    operations += 6 / block
  if full['step_grad'] != 'identity':
    operations += 2 * 3
  statistic = {'ignore': 0, 'absmax': 2, 'hardsoftmax': 4, 'softsoftmax': 4}
  operations += 2 * statistic[full['stat_grad']]
  if full['stat_grad'] == 'softsoftmax':
    operations += 4  # exponentials of the backward operands
  if full['scale_grad'] != 'identity':
    operations += 2 * 3 / block
  if full['tensor_scale_grad'] != 'ignore':
    operations += 2 * 2
  return Overhead(operations / 6, passes / 6)


def _optimizer(name: str, learning_rate: float, steps: int):
  warmup = min(max(1, steps // 10), steps - 1)
  schedule = loop.cosine(learning_rate, steps, warmup)
  if name == 'stable_spam':
    return optimizers.stable_spam(schedule)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def make_train(task: tasks.Task, changed: dict[str, str] | None, steps: int):
  """The function (params, batches, held_out, key) -> held-out loss.

  Args:
    task: what is trained.
    changed: a setting as `parse` gives it, None for float32.
    steps: training steps.
  """
  recipe = None if changed is None else make_recipe(changed)
  full = _complete(changed or {})
  transform = _optimizer(full['optimizer'], task.learning_rate, steps)
  loss_scale = float(full['loss_scale'])

  def linear_for(key):
    layers = itertools.count()

    def linear(x, w):
      if recipe is None:
        return x @ w
      own = jax.random.fold_in(key, next(layers)) if recipe.needs_key else None
      return ops.qdot(x, w, recipe, key=own)

    return linear

  def loss_fn(params, batch, key):
    return loss_scale * task.loss(params, batch, linear_for(key))

  def train(params, batches, held_out, key):
    def step(state, inputs):
      params, optimizer = state
      batch, index = inputs
      own = jax.random.fold_in(key, index)
      gradients = jax.grad(loss_fn)(params, batch, own)
      gradients = jax.tree.map(lambda g: g / loss_scale, gradients)
      updates, optimizer = transform.update(gradients, optimizer, params)
      return (optax.apply_updates(params, updates), optimizer), None

    state = params, transform.init(params)
    inputs = batches, jnp.arange(steps)
    (params, _), _ = jax.lax.scan(step, state, inputs)
    return loss_fn(params, held_out, key) / loss_scale

  return train


def train_seeds(
  task: tasks.Task, changed: dict[str, str] | None, seeds: int, steps: int
) -> list[float]:
  """Held-out losses of all seeds, trained side by side."""

  def stacked(make):
    return jax.tree.map(
      lambda *leaves: np.stack(leaves), *map(make, range(seeds))
    )

  params = stacked(task.init)
  batches = stacked(lambda seed: task.batches(seed, steps))
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  train = jax.jit(
    jax.vmap(make_train(task, changed, steps), in_axes=(0, 0, None, 0))
  )
  return [float(x) for x in train(params, batches, task.held_out(), keys)]


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    task: its name.
    setting: "float32" or as in the flag.
    loss: mean held-out loss.
    gap: mean over seeds of the loss minus that of float32 with the same seed.
    standard_error: of the gap; NaN for one seed.
    operations: see `Overhead`.
    passes: see `Overhead`.
    on_front: whether no other setting is at least as good in gap, operations
      and passes, and better in one.
  """

  task: str
  setting: str
  loss: float
  gap: float
  standard_error: float
  operations: float
  passes: float
  on_front: bool


def make_rows(
  task: str, losses: dict[str, list[float]], settings: dict[str, dict[str, str]]
) -> list[Row]:
  """The table of one task, float32 first."""
  reference = np.array(losses[_FLOAT32])
  rows = []
  for name, values in losses.items():
    gaps = np.array(values) - reference
    error = gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
    cost = Overhead(0, 0) if name == _FLOAT32 else overhead(settings[name])
    mean, gap = float(np.mean(values)), float(gaps.mean())
    rows.append(Row(task, name, mean, gap, float(error), *cost, False))

  def costs(row):
    gap = row.gap if math.isfinite(row.gap) else math.inf
    return gap, row.operations, row.passes

  def is_beaten(row):
    return any(
      all(b <= a for a, b in zip(costs(row), costs(other), strict=True))
      and costs(other) != costs(row)
      for other in rows[1:]
    )

  return [
    row._replace(
      on_front=i > 0 and math.isfinite(row.gap) and not is_beaten(row)
    )
    for i, row in enumerate(rows)
  ]


def print_rows(rows: Sequence[Row]) -> None:
  width = max(len(row.setting) for row in rows)
  print(
    f'\n{rows[0].task:<{width}} {"loss":>8} {"gap to float32":>18} '
    f'{"ops/element":>11} {"passes":>6}  front'
  )
  for row in rows:
    gap = f'{row.gap:+.4f}'
    if not math.isnan(row.standard_error):
      gap += f' ± {row.standard_error:.4f}'
    print(
      f'{row.setting:<{width}} {row.loss:>8.4f} {gap:>18} '
      f'{row.operations:>11.2f} {row.passes:>6.1f}  '
      f'{"*" if row.on_front else ""}'
    )


def write_plot(path: pathlib.Path, tables: dict[str, list[Row]]) -> None:
  """Saves the gap against overhead as PNG.

  Args:
    path: file to write.
    tables: rows by the title of their panel. Settings of the front have a
      colour and a name, the others are grey.
  """
  figure = report.new_figure(7 * len(tables), 5.5)
  panels = figure.subplots(1, len(tables), squeeze=False)[0]
  for axes, (title, rows) in zip(panels, tables.items(), strict=True):
    rows = [r for r in rows[1:] if math.isfinite(r.gap)]
    labelled = [r for r in rows if r.on_front or len(rows) <= 10]
    for row in rows:
      axes.errorbar(
        row.operations,
        row.gap,
        None if math.isnan(row.standard_error) else row.standard_error,
        fmt='s' if row.passes else 'o',
        ms=6 if row.on_front else 4.5,
        lw=1,
        color='tab:blue' if row.on_front else '0.6',
        ecolor='0.8',
        zorder=3 if row.on_front else 2,
      )
    axes.axhline(0, color='0.4', lw=1, ls='--', zorder=1)
    low = min((r.gap for r in rows), default=0)
    high = max((r.gap for r in rows), default=1)
    typical = float(np.median([abs(r.gap) for r in rows])) if rows else 1.0
    if high > 10 * typical:  # A few settings are far away.
      axes.set_yscale('symlog', linthresh=max(2 * typical, 1e-6))
    margin = 0.15 * max(high - min(low, 0), 1e-6)
    axes.set_ylim(min(low, 0) - margin, high + 2 * margin)
    operations = [r.operations for r in rows]
    axes.set_xlim(
      min(operations, default=4) - 0.4, max(operations, default=8) + 1.6
    )
    axes.set_xlabel('elementwise operations per operand element')
    axes.set_ylabel('held-out loss minus float32')
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    handles = [
      axes.plot([], [], marker, color='0.4', label=label)[0]
      for marker, label in (
        ('o', 'one pass over operands'),
        ('s', 'two passes (tensor scale)'),
      )
    ]
    axes.legend(handles=handles, fontsize=8, loc='upper right')
    if labelled:
      report.place_labels(
        axes,
        [(r.operations, r.gap) for r in labelled],
        [r.setting.replace('+', '\n+') for r in labelled],
        7,
      )
  report.write_figure(path, figure, dpi=130)


def run(
  task_names: Sequence[str],
  settings: dict[str, dict[str, str]],
  seeds: int,
  steps: int,
  workdir: pathlib.Path,
) -> None:
  """Trains what is missing, prints the tables and writes the results."""
  started = time.perf_counter()
  store = runs.Store(workdir / 'runs', 'losses')
  known = {name: tasks.TASKS[name]() for name in task_names}
  plan = {
    (task, setting): (
      f'{task}_{setting}',
      {
        'task': task,
        'setting': setting,
        'seeds': seeds,
        'steps': steps or known[task].steps,
      },
    )
    for task in task_names
    for setting in (_FLOAT32, *settings)
  }

  def result(key: tuple[str, str]) -> list[float]:
    task, setting = key
    changed = None if setting == _FLOAT32 else settings[setting]
    return train_seeds(known[task], changed, seeds, plan[key][1]['steps'])

  results: dict[str, dict[str, list[float]]] = {name: {} for name in task_names}
  for (task, setting), losses in runs.complete(store, plan, result).items():
    results[task][setting] = losses
  tables = {
    task: make_rows(task, losses, settings) for task, losses in results.items()
  }
  for rows in tables.values():
    print_rows(rows)
  table, plot = workdir / 'table.csv', workdir / 'plot.png'
  report.write_csv(table, list(itertools.chain(*tables.values())))
  if not report.can_plot():
    print(f'\nsaved {table}; no plot, because matplotlib is not installed')
  else:
    titles = {task: f'{task}: {known[task].measure}' for task in tables}
    write_plot(plot, {titles[task]: rows for task, rows in tables.items()})
    print(f'\nsaved {table} and {plot}')
  print(f'total time {time.perf_counter() - started:.0f} s')


def print_choices() -> None:
  """Prints the choices with their values, that of "base" first."""
  for name, values in CHOICES.items():
    print(f'{name:<18} {", ".join(values)}')


def work() -> None:
  if _SETTINGS.value == ['list']:
    print_choices()
    return
  values = _QUICK
  if not _QUICK_FLAG.value:
    values = {
      'tasks': _TASKS.value,
      'settings': _SETTINGS.value,
      'seeds': _SEEDS.value,
      'steps': _STEPS.value,
    }
  if not values['tasks']:
    raise byte_lm.ConfigError('--tasks names nothing.')
  for task in values['tasks']:
    if task not in tasks.TASKS:
      raise byte_lm.ConfigError(
        f'task {task!r} is not one of {", ".join(tasks.TASKS)}.'
      )
  parsed = map(parse, values['settings'])
  settings = {_label(changed): changed for changed in parsed}
  with command.own_directory(_WORKDIR.value) as workdir:
    run(values['tasks'], settings, values['seeds'], values['steps'], workdir)


def main(argv: Sequence[str]) -> int:
  errors = byte_lm.ConfigError, CheckpointError, ImportError
  return command.main(argv, work, errors)


if __name__ == '__main__':
  app.run(main)
