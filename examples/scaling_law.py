"""Measures how the loss gap of a weight format depends on size and data.

Trains byte-level language models (see models/byte_lm.py) of several widths for
several numbers of bytes, in float32 and with the weights of their linear layers
fake-quantized in every step, straight-through, in several element formats ExMy
and numbers of elements per float32 scale. Then it fits the law of
`lowbit_jax.training.laws`, prints a table, constants and predictions with
bootstrapped intervals, plots them, and checks the signs of the law: the gap to
float32 rises with data and scale block, and falls with size, exponent bits and
mantissa bits. Models this small say nothing about the constants of large ones.

  python examples/scaling_law.py           # 66 models, about 13 minutes
  python examples/scaling_law.py --quick   # 18 toy models, about a minute

Each finished run is a file in WORKDIR/runs; the same command after an
interruption goes on with the runs that are missing. Results go to
WORKDIR/table.csv and WORKDIR/plot.png.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from lowbit_jax import formats, nn
from lowbit_jax.recipe import QuantSpec
from lowbit_jax.training import laws
from models import byte_lm
from support import command, data, loop, report, runs
from support.checkpoints import CheckpointError

_LAYERS = 2
_LEVEL = 0.9  # of the intervals
_RESAMPLES = 100
_FLOAT32 = 'float32'

_WORKDIR = flags.DEFINE_string(
  'workdir', 'scaling_law_out', 'Directory of runs and results.'
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'A toy sweep, which replaces the five flags below.'
)
_WIDTHS = flags.DEFINE_list('widths', ['32', '64', '96'], 'Model widths.')
_STEPS = flags.DEFINE_list('steps', ['128', '512'], 'Training steps.')
_FORMATS = flags.DEFINE_list(
  'formats',
  ['e1m1', 'e2m1', 'e2m2', 'e3m2', 'e4m3'],
  'Elements ExMy without codes for infinity or NaN.',
)
_SCALE_BLOCKS = flags.DEFINE_list(
  'scale_blocks', ['4', '32'], 'Elements per scale; divisors of all widths.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', 1, 'Runs of each setting.', lower_bound=1
)
_CONTEXT = flags.DEFINE_integer(
  'context', 64, 'Bytes per window.', lower_bound=1
)
_BATCH = flags.DEFINE_integer('batch', 16, 'Windows per step.', lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
  'learning_rate', 4e-3, 'Peak learning rate.', lower_bound=0
)
_EVAL_WINDOWS = flags.DEFINE_integer(
  'eval_windows', 256, 'Held-out windows.', lower_bound=2
)

_QUICK_SWEEP = {
  'widths': ('16', '32'),
  'steps': ('30', '60', '90'),
  'formats': ('e2m1',),
  'scale_blocks': ('4', '16'),
  'seeds': 1,
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """One run.

  Attributes:
    width: model width.
    steps: training steps.
    element: 'float32' or ExMy.
    scale_block: elements per scale; 1 for float32.
    seed: of initial weights and data order.
  """

  width: int
  steps: int
  element: str
  scale_block: int
  seed: int

  @property
  def name(self) -> str:
    return (
      f'w{self.width}_s{self.steps}_{self.element}_g{self.scale_block}'
      f'_seed{self.seed}'
    )

  @property
  def bits(self) -> tuple[int, int]:
    """(E, M)."""
    if self.element == _FLOAT32:
      return 8, 23
    match = re.fullmatch(r'e(\d)m(\d)', self.element)
    assert match
    return int(match[1]), int(match[2])

  @property
  def baseline(self) -> 'Setting':
    """The float32 run with the same weights and data at the start."""
    return dataclasses.replace(self, element=_FLOAT32, scale_block=1)


class Sweep(NamedTuple):
  """What is trained.

  Attributes:
    settings: of all runs, baselines first.
    context: bytes per window.
    batch: windows per step.
    learning_rate: peak of the schedule.
    eval_windows: held-out windows.
  """

  settings: tuple[Setting, ...]
  context: int
  batch: int
  learning_rate: float
  eval_windows: int

  def config(self, setting: Setting) -> byte_lm.Config:
    return byte_lm.Config(
      width=setting.width,
      heads=max(1, setting.width // 32),
      blocks=_LAYERS,
      context=self.context,
      batch=self.batch,
      steps=setting.steps,
      learning_rate=self.learning_rate,
      seed=setting.seed,
    )

  def tokens(self, setting: Setting) -> int:
    """D, training bytes."""
    return setting.steps * self.batch * self.context


def weights(setting: Setting) -> int:
  """N: 3 h^2 in qkv, h^2 in out, 4 h^2 in up and down, of each block."""
  return 12 * _LAYERS * setting.width**2


def make_settings(
  widths: Sequence[int],
  steps: Sequence[int],
  elements: Sequence[str],
  scale_blocks: Sequence[int],
  seeds: int,
) -> tuple[Setting, ...]:
  """Returns the grid, with a baseline for each width, length and seed.

  Raises:
    byte_lm.ConfigError: for an element or a block that cannot be used.
  """
  for element in elements:
    if not re.fullmatch(r'e[1-5]m[0-5]', element):
      raise byte_lm.ConfigError(
        f'formats has {element!r}; name elements such as e2m1 or e4m3.'
      )
  for width, block in itertools.product(widths, scale_blocks):
    if block < 2 or width % block:
      raise byte_lm.ConfigError(
        f'scale_blocks has {block}, which must be 2 or more and divide all '
        f'widths ({width}).'
      )
  kinds = [(_FLOAT32, 1), *itertools.product(elements, scale_blocks)]
  return tuple(
    Setting(width, count, element, block, seed)
    for width in sorted(widths)
    for element, block in kinds
    for seed in range(seeds)
    for count in sorted(steps)
  )


def quantized_product(setting: Setting) -> Callable[..., jax.Array]:
  """Returns a dot_general whose right operand goes through the format."""
  if setting.element == _FLOAT32:
    return nn.dot_general()
  element = formats.minifloat(*setting.bits, 'none')
  fmt = formats.grouped(element, setting.scale_block)
  return nn.dot_general(rhs=QuantSpec(fmt))


class Program(NamedTuple):
  """Compiled functions of one width and format.

  Attributes:
    step: (state, windows, learning_rate=...) -> (state, loss).
    evaluate: (parameters, windows) -> one loss per window.
  """

  step: Callable[..., Any]
  evaluate: Callable[..., Any]


def _scale_by_given_rate() -> optax.GradientTransformation:
  """A learning rate that each update is given, so that one program fits all."""

  def update(updates, state, params=None, *, learning_rate):
    del params
    return jax.tree.map(lambda u: -learning_rate * u, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _transform() -> optax.GradientTransformation:
  return loop.adamw(_scale_by_given_rate())


def make_program(config: byte_lm.Config, setting: Setting) -> Program:
  """Returns the program; the number of steps is no part of it."""
  model = byte_lm.ByteLM(config, dot_general=quantized_product(setting))
  step = loop.make_step(model, _transform())
  return Program(jax.jit(step, donate_argnums=0), byte_lm.make_loss(model))


def learning_rates(config: byte_lm.Config) -> np.ndarray:
  """The schedule of the model in float64, one float32 per step."""
  with jax.enable_x64(True):
    rates = jax.vmap(loop.schedule(config))(np.arange(config.steps))
    return np.asarray(rates).astype(np.float32)


def train(
  program: Program,
  config: byte_lm.Config,
  params: Any,
  corpus: data.Corpus,
  held_out: np.ndarray,
) -> float:
  """Trains one model; returns its loss on the held-out windows."""
  state = loop.TrainState(
    params, _transform().init(params), jnp.zeros((), jnp.int32)
  )
  for step, rate in enumerate(learning_rates(config)):
    windows = data.train_batch(corpus, config, step)
    state, _ = program.step(state, windows, learning_rate=rate)
  losses = [
    program.evaluate(state.params, part)
    for part in np.split(held_out, len(held_out) // config.batch)
  ]
  return float(np.mean(np.concatenate(losses)))


def run_sweep(
  sweep: Sweep, corpus: data.Corpus, directory: pathlib.Path
) -> dict[Setting, float]:
  """Returns the loss of every setting, training those that are missing."""
  common = {
    'context': sweep.context,
    'batch': sweep.batch,
    'learning_rate': sweep.learning_rate,
    'eval_windows': sweep.eval_windows,
    'layers': _LAYERS,
    'corpus': corpus.digest,
  }
  plan = {s: (s.name, dataclasses.asdict(s) | common) for s in sweep.settings}
  count = -(-sweep.eval_windows // sweep.batch) * sweep.batch
  held_out = data.held_out_windows(corpus, sweep.context, count)

  # Neighbours in the list differ in steps and seed only.
  @functools.lru_cache(maxsize=1)
  def program(width: int, element: str, scale_block: int) -> Program:
    setting = Setting(width, 1, element, scale_block, 0)
    return make_program(sweep.config(setting), setting)

  @functools.cache
  def initial(width: int, seed: int) -> Any:
    """A copy on the host, since a step donates its state."""
    config = sweep.config(Setting(width, 1, _FLOAT32, 1, seed))
    return jax.device_get(byte_lm.init(config))

  def result(setting: Setting) -> float:
    return train(
      program(setting.width, setting.element, setting.scale_block),
      sweep.config(setting),
      jax.device_put(initial(setting.width, setting.seed)),
      corpus,
      held_out,
    )

  return runs.complete(runs.Store(directory, 'loss'), plan, result)


def make_record(sweep: Sweep, setting: Setting, loss: float) -> laws.Record:
  E, M = setting.bits
  return laws.Record(
    weights(setting), sweep.tokens(setting), E, M, setting.scale_block, loss
  )


class Sign(NamedTuple):
  """Evidence for the direction in which the gap moves with one factor.

  Attributes:
    factor: 'D', 'N', 'B', 'E' or 'M'.
    expected: +1 where the law rises with the factor, else -1.
    pairs: pairs of settings that differ in this factor only, by one level.
    right: those that move as expected.
    mean: mean difference of the gaps, higher minus lower level.
    error: its standard error, as if pairs were independent.
  """

  factor: str
  expected: int
  pairs: int
  right: int
  mean: float
  error: float

  @property
  def verdict(self) -> str:
    """'yes' or 'NO' where the mean is beyond two standard errors."""
    if not self.pairs:
      return 'not varied'
    if abs(self.mean) <= 2 * self.error:
      return 'unresolved'
    return 'yes' if self.expected * self.mean > 0 else 'NO'


def _standard_error(values: Sequence[float]) -> float:
  if len(values) < 2:
    return float('inf')
  return float(np.std(values, ddof=1)) / len(values) ** 0.5


def check_signs(gaps: dict[Setting, float], sweep: Sweep) -> list[Sign]:
  """Compares gaps of settings that differ in one factor.

  Args:
    gaps: loss minus that of the baseline, for each quantized setting.
    sweep: of the settings.
  """
  table: dict[tuple[float, ...], list[float]] = {}
  for setting, gap in gaps.items():
    key = make_record(sweep, setting, gap)[:-1]
    table.setdefault(tuple(key), []).append(gap)
  means = {key: float(np.mean(values)) for key, values in table.items()}
  signs = []
  for factor, expected in (('D', 1), ('N', -1), ('B', 1), ('E', -1), ('M', -1)):
    at = laws.Record._fields.index(factor)
    lines: dict[tuple[float, ...], list[tuple[float, float]]] = {}
    for key, gap in means.items():
      rest = (*key[:at], *key[at + 1 :])
      lines.setdefault(rest, []).append((key[at], gap))
    steps = [
      high - low
      for line in lines.values()
      for (_, low), (_, high) in itertools.pairwise(sorted(line))
    ]
    right = sum(expected * step > 0 for step in steps)
    mean = float(np.mean(steps)) if steps else 0.0
    error = _standard_error(steps)
    signs.append(Sign(factor, expected, len(steps), right, mean, error))
  return signs


def print_signs(signs: Sequence[Sign]) -> None:
  print('\nsigns of the gap (pairs differ in one factor by one level)')
  for sign in signs:
    word = 'rises' if sign.expected > 0 else 'falls'
    line = f'  {word} with {sign.factor}: {sign.verdict:<10}'
    if sign.pairs:
      line += (
        f' {sign.right} of {sign.pairs} pairs, mean difference '
        f'{sign.mean:+.4f} ± {sign.error:.4f}'
      )
    print(line)


def print_fit(fitted: laws.Fit, samples: Sequence[laws.FloatLaw]) -> None:
  percent = round(100 * _LEVEL)
  print(
    f'\nfit: residual {100 * fitted.rms:.2f} % of the loss (root mean square);'
    f' constants with {percent} % intervals'
  )
  for field in dataclasses.fields(laws.FloatLaw):
    value = getattr(fitted.law, field.name)
    low, high = laws.interval(
      samples, lambda law, name=field.name: getattr(law, name), _LEVEL
    )
    print(f'  {field.name:<8} {value:>11.4g}  [{low:.4g}, {high:.4g}]')


class Line(NamedTuple):
  """One row of the table; `low` to `high` is the interval of `fitted`."""

  N: float
  D: float
  element: str
  B: float
  loss: float
  gap: float
  fitted: float
  low: float
  high: float


def make_table(
  sweep: Sweep,
  losses: dict[Setting, float],
  fitted: laws.Fit,
  samples: Sequence[laws.FloatLaw],
) -> list[Line]:
  """Means over seeds, in the order of the sweep."""
  groups: dict[Setting, list[Setting]] = {}
  for setting in losses:
    groups.setdefault(dataclasses.replace(setting, seed=0), []).append(setting)
  lines = []
  for first, members in groups.items():
    loss = float(np.mean([losses[s] for s in members]))
    gap = loss - float(np.mean([losses[s.baseline] for s in members]))
    N, D, E, M, B, _ = make_record(sweep, first, loss)
    law_gap = float(fitted.law.gap(N, D, E, M, B))
    low, high = laws.interval(
      samples,
      lambda law, at=(N, D, E, M, B): law.gap(*at),
      _LEVEL,
    )
    lines.append(
      Line(N, D, first.element, B, loss, gap, law_gap, float(low), float(high))
    )
  return lines


def print_table(lines: Sequence[Line]) -> None:
  print(
    f'\n{"N":>8} {"D":>8} {"element":<8} {"B":>3} {"loss":>8} {"gap":>8} '
    f'{"fitted gap":>10} {"interval":>18}'
  )
  for line in lines:
    bounds = f'[{line.low:.4f}, {line.high:.4f}]'
    print(
      f'{line.N:>8,.0f} {line.D:>8,.0f} {line.element:<8} {line.B:>3.0f} '
      f'{line.loss:>8.4f} {line.gap:>+8.4f} {line.fitted:>10.4f} {bounds:>18}'
    )


def write_plot(path: pathlib.Path, lines: Sequence[Line]) -> None:
  """Saves gaps against D / N beside fitted against measured gaps, as PNG."""
  lines = [line for line in lines if line.element != _FLOAT32]
  elements = list(dict.fromkeys(line.element for line in lines))
  blocks = sorted({line.B for line in lines})
  figure = report.new_figure(12, 5)
  left, right = figure.subplots(1, 2)
  for i, element in enumerate(elements):
    for B, marker in zip(blocks, itertools.cycle('o^sv'), strict=False):
      chosen = [
        line for line in lines if (line.element, line.B) == (element, B)
      ]
      chosen.sort(key=lambda line: line.D / line.N)
      left.plot(
        [line.D / line.N for line in chosen],
        [line.gap for line in chosen],
        marker=marker,
        color=f'C{i}',
        lw=0.8,
        label=f'{element}, B={B:.0f}',
      )
      below = [line.fitted - line.low for line in chosen]
      above = [line.high - line.fitted for line in chosen]
      right.errorbar(
        [line.gap for line in chosen],
        [line.fitted for line in chosen],
        np.maximum([below, above], 0),
        fmt=marker,
        color=f'C{i}',
        ms=4,
        lw=0.8,
      )
  left.axhline(0, color='0.5', lw=0.8)
  left.set_xscale('log')
  left.set_xlabel('training bytes per weight, D / N')
  left.set_ylabel('held-out loss minus float32, nats per byte')
  left.legend(fontsize=8)
  end = max((line.gap for line in lines), default=0.0)
  right.plot([0, end], [0, end], color='0.5', lw=0.8)
  right.set_xlabel('measured gap')
  right.set_ylabel(f'fitted gap with {round(100 * _LEVEL)} % interval')
  for axes in (left, right):
    axes.grid(alpha=0.25)
  report.write_figure(path, figure, dpi=120)


def sweep_from_flags() -> Sweep:
  values = {
    'widths': _WIDTHS.value,
    'steps': _STEPS.value,
    'formats': _FORMATS.value,
    'scale_blocks': _SCALE_BLOCKS.value,
    'seeds': _SEEDS.value,
  }
  if _QUICK.value:
    values = _QUICK_SWEEP
  for name, value in values.items():
    if not value:
      raise byte_lm.ConfigError(f'--{name} names nothing.')
  try:
    widths, steps, blocks = (
      [int(text) for text in values[name]]
      for name in ('widths', 'steps', 'scale_blocks')
    )
  except ValueError as error:
    raise byte_lm.ConfigError(
      'widths, steps and scale_blocks are lists of integers.'
    ) from error
  settings = make_settings(
    widths, steps, values['formats'], blocks, values['seeds']
  )
  sweep = Sweep(
    settings,
    _CONTEXT.value,
    _BATCH.value,
    _LEARNING_RATE.value,
    _EVAL_WINDOWS.value,
  )
  for setting in settings:
    sweep.config(setting)  # refuses bad values before the first run
  return sweep


def run(sweep: Sweep, workdir: pathlib.Path) -> None:
  """Trains what is missing and writes the results."""
  started = time.perf_counter()
  corpus = data.load_corpus()
  losses = run_sweep(sweep, corpus, workdir / 'runs')
  records = [make_record(sweep, s, loss) for s, loss in losses.items()]
  try:
    fitted = laws.fit(records, starts=8)
    samples = laws.bootstrap(records, fitted, resamples=_RESAMPLES, seed=0)
  except ValueError as error:
    raise byte_lm.ConfigError(
      f'the law cannot be fitted to these runs, which are kept: {error}.'
    ) from error
  lines = make_table(sweep, losses, fitted, samples)
  print_table(lines)
  print_fit(fitted, samples)
  gaps = {
    setting: loss - losses[setting.baseline]
    for setting, loss in losses.items()
    if setting != setting.baseline
  }
  print_signs(check_signs(gaps, sweep))
  report.write_csv(workdir / 'table.csv', lines)
  write_plot(workdir / 'plot.png', lines)
  print(f'\ntotal time {time.perf_counter() - started:.0f} s')


def work() -> None:
  sweep = sweep_from_flags()
  with command.own_directory(_WORKDIR.value) as workdir:
    run(sweep, workdir)


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (byte_lm.ConfigError, CheckpointError))


if __name__ == '__main__':
  app.run(main)
