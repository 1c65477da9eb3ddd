"""Training of the byte-level model in low bits, on one device or a mesh.

`Settings` say everything that decides the result; `train` goes through the
steps with checkpoints, a log and monitors. A step is a pure function of the
state and the batch, and a batch one of (seed, step), so an interrupted run that
goes on ends in the same bits as one that was not interrupted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from lowbit_jax import _files, _results
from lowbit_jax.recipe import Policy
from lowbit_jax.training import (
  linen as low,
  monitors,
  optimizers,
  recipes,
  scaling,
)
from models import byte_lm
from support import data, loop, report
from support.checkpoints import Checkpoints

AXES = ('data', 'fsdp', 'model')
_LOG = 'training log 1'
# Columns of these lie on 'model' and of the others their rows, so that each
# block of a layer pair needs one reduction.
_COLUMNS = ('qkv', 'up', 'head')
_ROWS = ('out', 'down')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides a run.

  Attributes:
    model: sizes, steps, learning rate and seed.
    recipe: name of the recipe of the linear layers of all blocks.
    exempt_first: blocks at the start that stay in float32.
    exempt_last: blocks at the end that do.
    optimizer: a name from `OPTIMIZERS`.
    accumulate: microbatches whose gradients make one step.
    scan: whether the blocks are one stacked block, as in `byte_lm.ByteLM`.
    recompute: whether that recomputes activations.
  """

  model: byte_lm.Config = byte_lm.Config()
  recipe: str = 'mxfp8'
  exempt_first: int = 0
  exempt_last: int = 0
  optimizer: str = 'adamw'
  accumulate: int = 1
  scan: bool = False
  recompute: bool = True

  def __post_init__(self):
    try:
      recipes.get(self.recipe)
    except ValueError as error:
      raise byte_lm.ConfigError(str(error)) from error
    if self.optimizer not in OPTIMIZERS:
      raise byte_lm.ConfigError(
        f'optimizer={self.optimizer!r} is not one of {", ".join(OPTIMIZERS)}'
      )
    if self.accumulate < 1 or self.model.batch % self.accumulate:
      raise byte_lm.ConfigError(
        f'accumulate={self.accumulate} must divide batch={self.model.batch}'
      )
    exempt = self.exempt_first + self.exempt_last
    if self.scan and exempt:
      raise byte_lm.ConfigError(
        'scan makes all blocks alike: drop exempt_first and exempt_last'
      )
    if exempt > self.model.blocks:
      raise byte_lm.ConfigError(
        f'exempt_first={self.exempt_first} and exempt_last={self.exempt_last}'
        f' are more than blocks={self.model.blocks}'
      )


class TrainState(NamedTuple):
  """Parameters, held tensor scales, optimizer state, steps done (int32)."""

  params: Any
  lowbit: Any
  optimizer: Any
  step: jax.Array


class Metrics(NamedTuple):
  """What a step reports; `finite` has one flag for each parameter."""

  loss: jax.Array
  gradient_norm: jax.Array
  finite: jax.Array


class NonFiniteError(Exception):
  """A loss or gradient is NaN or infinite; the message names it."""


def _adamw8(config: byte_lm.Config) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optimizers.adamw(
      loop.schedule(config), b2=0.95, weight_decay=0.1, mask=loop.matrices
    ),
  )


def _stable_spam(config: byte_lm.Config) -> optax.GradientTransformation:
  return optimizers.stable_spam(loop.schedule(config), b2=0.95)


def _muon(config: byte_lm.Config) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optimizers.muon(loop.schedule(config), weight_decay=0.1),
  )


OPTIMIZERS = {
  'adamw': loop.optimizer,
  'adamw8': _adamw8,
  'stable_spam': _stable_spam,
  'muon': _muon,
}


def policy(settings: Settings) -> Policy:
  """Which layers train by the recipe."""
  return Policy(
    recipes.get(settings.recipe),
    first=settings.exempt_first,
    last=settings.exempt_last,
    blocks=settings.model.blocks,
  )


def model(
  settings: Settings,
  fraction: float = 0.0,
  *,
  quantized: bool = True,
  watch: bool = False,
  mesh: Mesh | None = None,
):
  """The network after `fraction` of the training, or the one in float32."""
  chosen = policy(settings) if quantized else None
  return byte_lm.ByteLM(
    settings.model,
    dot_general_cls=low.dot_general_cls(chosen, fraction, watch=watch),
    activations=None if mesh is None else _batch_sharding(mesh),
    scan=settings.scan,
    recompute=settings.recompute,
  )


def init(settings: Settings) -> TrainState:
  """The state before the first step."""
  tokens = jnp.zeros((1, settings.model.context), jnp.int32)
  key = jax.random.key(settings.model.seed)
  variables = model(settings).init({'params': key, 'quant': key}, tokens)
  params = variables['params']
  return TrainState(
    params,
    variables.get(low.COLLECTION, {}),
    OPTIMIZERS[settings.optimizer](settings.model).init(params),
    jnp.zeros((), jnp.int32),
  )


def make_step(
  settings: Settings, fraction: float = 0.0, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
  """The `(state, windows) -> (state, metrics)` of one step, not jitted."""
  network = model(settings, fraction, mesh=mesh)
  transform = OPTIMIZERS[settings.optimizer](settings.model)

  def loss_fn(params, lowbit, windows, key):
    logits, updated = network.apply(
      {'params': params, low.COLLECTION: lowbit},
      windows[:, :-1],
      rngs={'quant': key},
      mutable=[low.COLLECTION],
    )
    loss = byte_lm.cross_entropy(logits, windows[:, 1:])
    return loss, updated.get(low.COLLECTION, {})

  gradient = jax.value_and_grad(loss_fn, has_aux=True)

  def step(state: TrainState, windows: jax.Array):
    key = jax.random.key(settings.model.seed)
    key = jax.random.fold_in(key, state.step)
    n = settings.accumulate

    def part(carry, microbatch):
      lowbit, total, sums = carry
      index, windows = microbatch
      (loss, lowbit), g = gradient(
        state.params, lowbit, windows, jax.random.fold_in(key, index)
      )
      return (lowbit, total + loss, jax.tree.map(jnp.add, sums, g)), None

    if n == 1:
      (loss, lowbit), g = gradient(state.params, state.lowbit, windows, key)
    else:
      zeros = jax.tree.map(jnp.zeros_like, state.params)
      parts = windows.reshape(-1, n, windows.shape[-1]).swapaxes(0, 1)
      (lowbit, loss, g), _ = jax.lax.scan(
        part, (state.lowbit, jnp.float32(0), zeros), (jnp.arange(n), parts)
      )
      loss, g = loss / n, jax.tree.map(lambda x: x / n, g)
    finite = [jnp.isfinite(x).all() for x in (loss, *jax.tree.leaves(g))]
    updates, optimizer = transform.update(g, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = Metrics(loss, optax.tree.norm(g), jnp.stack(finite))
    lowbit = scaling.advance(lowbit)
    return TrainState(params, lowbit, optimizer, state.step + 1), metrics

  return step


def make_mesh(description: str) -> Mesh:
  """A mesh from text such as 'data=4,fsdp=2'; axes left out have size 1.

  Raises:
    ConfigError: for unknown axes, and sizes that are not the device count.
  """
  sizes = dict.fromkeys(AXES, 1)
  for part in filter(None, description.split(',')):
    name, _, size = part.partition('=')
    if name not in sizes or not size.isdecimal() or int(size) < 1:
      raise byte_lm.ConfigError(
        f'mesh={description!r}: {part!r} is not AXIS=SIZE with an axis of'
        f' {AXES}'
      )
    sizes[name] = int(size)
  if math.prod(sizes.values()) != jax.device_count():
    raise byte_lm.ConfigError(
      f'mesh={description!r} has {math.prod(sizes.values())} places for'
      f' {jax.device_count()} devices'
    )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, (jax.sharding.AxisType.Auto,) * len(AXES)
  )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
  """Where each leaf of a state lies, by the layer that its path names.

  Kernels are split over 'fsdp' and 'model', optimizer states as the parameters
  they belong to. An axis that a size does not divide stays whole.
  """

  def place(path, leaf):
    names = [getattr(key, 'key', getattr(key, 'name', '')) for key in path]
    spec = (None, None)
    if any(name in _COLUMNS for name in names):
      spec = ('fsdp', 'model')
    elif any(name in _ROWS for name in names):
      spec = ('model', 'fsdp')
    spec = (None,) * (len(leaf.shape) - 2) + spec[: len(leaf.shape)]
    whole = len(leaf.shape) < 2
    sizes = () if whole else zip(spec, leaf.shape, strict=True)
    return NamedSharding(
      mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in sizes))
    )

  return jax.tree_util.tree_map_with_path(place, state)


def put_batch(windows: np.ndarray, mesh: Mesh) -> jax.Array:
  """A batch on the mesh; every process knows all of it and gives its part."""
  return jax.make_array_from_callback(
    windows.shape, _batch_sharding(mesh), lambda index: windows[index]
  )


def _batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(('data', 'fsdp')))


class Record(NamedTuple):
  """One line of the log; what monitors measure is None between their steps."""

  step: int
  loss: float
  gradient_norm: float
  snr_db: float | None = None
  x_clipped: float | None = None
  x_flushed: float | None = None
  w_clipped: float | None = None
  w_flushed: float | None = None
  dy_clipped: float | None = None
  dy_flushed: float | None = None

  @property
  def monitored(self) -> dict[str, float]:
    """The fields that were measured."""
    values = self._asdict() | dict.fromkeys(Record._fields[:3])
    return {name: v for name, v in values.items() if v is not None}


class Monitored(NamedTuple):
  """What a recipe does to a step.

  Attributes:
    snr_db: signal-to-noise ratio of the gradient of each parameter,
      10 log10(|g|^2 / |g_q - g|^2), with g in float32. Below 4.8 dB,
      |g| < sqrt(3) |noise|, training by quantized gradients stalls ('FP4 All
      the Way', 2025).
    lost: a `monitors.Lost` of the largest share over the layers.
  """

  snr_db: Any
  lost: monitors.Lost


def make_monitor(
  settings: Settings,
) -> Callable[[TrainState, jax.Array], Monitored]:
  """The jitted map of (state, windows) to what the recipe does to them."""
  rough, exact = model(settings, watch=True), model(settings, quantized=False)
  tokens = jnp.zeros((1, settings.model.context), jnp.int32)

  @jax.jit
  def monitor(state, windows):
    key = jax.random.key(settings.model.seed)

    def loss(params, watched, network):
      variables = {
        'params': params,
        low.COLLECTION: state.lowbit,
        low.WATCHED: watched,
      }
      logits = network.apply(variables, windows[:, :-1], rngs={'quant': key})
      return byte_lm.cross_entropy(logits, windows[:, 1:])

    def ratio(g, h):
      noise = jnp.sum(jnp.square(g - h))
      return 10 * jnp.log10(jnp.sum(jnp.square(h)) / noise)

    shapes = jax.eval_shape(rough.init, {'params': key, 'quant': key}, tokens)
    probes = jax.tree.map(jnp.zeros_like, shapes.get(low.WATCHED, {}))
    g, shares = jax.grad(loss, (0, 1))(state.params, probes, rough)
    h = jax.grad(loss)(state.params, {}, exact)
    return Monitored(jax.tree.map(ratio, g, h), _largest(shares))

  return monitor


def _largest(shares) -> monitors.Lost:
  """The largest share at each site over layers, stacked or not."""
  leaves = jax.tree.leaves(shares, is_leaf=_is_lost)
  leaves = leaves or [monitors.zeros()]
  rows = [[t.reshape(-1, t.shape[-1]) for t in leaf] for leaf in leaves]
  return monitors.Lost(
    *(jnp.concatenate(t).max(0) for t in zip(*rows, strict=True))
  )


def _is_lost(leaf) -> bool:
  return isinstance(leaf, monitors.Lost)


def _summary(monitored: Monitored) -> dict[str, float]:
  """The fields of a record: the median ratio, and for each operand the larger
  share of its two sites, without those that are not known."""
  ratios = [float(r) for r in jax.tree.leaves(monitored.snr_db)]
  fields = {'snr_db': float(np.median(ratios))}
  for name, shares in monitored.lost._asdict().items():
    for operand, sites in monitors.OPERANDS.items():
      known = [s for s in np.asarray(shares)[list(sites)] if np.isfinite(s)]
      if known:
        fields[f'{operand}_{name}'] = float(max(known))
  return fields


def _postfix(loss: float, monitored: dict[str, float]) -> dict[str, str]:
  """The progress line: loss, ratio, and the largest shares of any operand."""
  shown = {'loss': f'{loss:.3f}'}
  if monitored:
    shown['snr'] = f'{monitored["snr_db"]:.1f}dB'
  for name in monitors.Lost._fields:
    shares = [v for key, v in monitored.items() if key.endswith(f'_{name}')]
    if shares:
      shown[name] = f'{max(shares):.1%}'
  return shown


def train(
  settings: Settings,
  corpus: data.Corpus,
  checkpoints: Checkpoints | None = None,
  *,
  mesh: Mesh | None = None,
  save_every: int = 40,
  monitor_every: int = 0,
  log: pathlib.Path | None = None,
) -> tuple[TrainState, list[Record]]:
  """Trains from the newest checkpoint on, with a progress bar.

  Args:
    settings: of the run.
    corpus: whose training part is read.
    checkpoints: where the state is kept; None for nowhere.
    mesh: devices; None for one.
    save_every: steps between checkpoints; the last step is always saved.
    monitor_every: steps between measures of what the recipe loses, 0 for none.
    log: CSV file that goes with the checkpoints. It has a checksum: one that
      was edited is refused.

  Returns:
    The last state and the log.

  Raises:
    ConfigError: if the recipe cannot train a model of these sizes.
    DamagedFileError: if the newest checkpoint or the log is damaged.
    NonFiniteError: if a loss or gradient is not finite. The state before is
      that of the last checkpoint.
  """
  config = settings.model
  mesh = make_mesh(f'data={jax.device_count()}') if mesh is None else mesh
  with _refusals(settings):
    shapes = jax.eval_shape(lambda: init(settings))
  shardings = state_shardings(shapes, mesh)
  start, state = 0, None
  if checkpoints is not None:
    start, state = checkpoints.restore(shapes, shardings)
  if state is None:
    state = jax.jit(lambda: init(settings), out_shardings=shardings)()
  records = _read_log(log, start)
  monitor = make_monitor(settings) if monitor_every else None
  names = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)
  ]
  compiled = _compiled_steps(settings, mesh, shardings)
  shown: dict[str, float] = {}

  def step(state, index):
    nonlocal shown
    measured = {}
    with _refusals(settings):
      windows = put_batch(data.train_batch(corpus, config, index), mesh)
      if monitor is not None and index % monitor_every == 0:
        measured = shown = _summary(monitor(state, windows))
      state, metrics = compiled(index)(state, windows)
    _check_finite(metrics, names, index)
    loss, norm = float(metrics.loss), float(metrics.gradient_norm)
    records.append(Record(index, loss, norm, **measured))
    return state, _postfix(loss, shown)

  def save(done, state):
    if checkpoints is not None:
      _write_log(log, records)
      checkpoints.save(done, state)

  state = loop.take_steps(
    state, start, config.steps, step, settings.recipe, save, save_every
  )
  return state, records


@contextlib.contextmanager
def _refusals(settings: Settings) -> Iterator[None]:
  """What the library refuses while it traces a model of these settings."""
  try:
    yield
  except byte_lm.ConfigError:
    raise
  except (NotImplementedError, ValueError) as error:
    raise byte_lm.ConfigError(
      f'recipe={settings.recipe!r} cannot train with these settings: {error};'
      ' choose other sizes or another recipe'
    ) from error


def _compiled_steps(settings, mesh, shardings) -> Callable[[int], Callable]:
  """The compiled function of each step; it lasts until recipes switch."""
  steps, starts = settings.model.steps, (0.0, *policy(settings).starts)

  @functools.lru_cache(maxsize=1)
  def compiled(fraction: float):
    return jax.jit(
      make_step(settings, fraction, mesh),
      in_shardings=(shardings, None),
      out_shardings=(shardings, None),
      donate_argnums=0,
    )

  return lambda index: compiled(max(s for s in starts if index / steps >= s))


def _check_finite(metrics: Metrics, names, step: int) -> None:
  finite = np.asarray(metrics.finite)
  if finite.all():
    return
  flags = zip(('loss', *names), finite, strict=True)
  bad = [name for name, ok in flags if not ok]
  raise NonFiniteError(
    f'step {step}: not finite: {", ".join(bad[:4])}'
    + (f' and {len(bad) - 4} more' if len(bad) > 4 else '')
    + '. Lower --learning_rate, or take a recipe of more range.'
  )


def make_loss(network) -> Callable[..., jax.Array]:
  """The jitted map of (state, windows) to one loss per window."""

  @jax.jit
  def loss(state, windows):
    variables = {'params': state.params, low.COLLECTION: state.lowbit}
    key = jax.random.key(0)
    logits = network.apply(variables, windows[:, :-1], rngs={'quant': key})
    return jax.vmap(byte_lm.cross_entropy)(logits, windows[:, 1:])

  return loss


def evaluate(
  settings: Settings,
  state: TrainState,
  corpus: data.Corpus,
  count: int,
  quantized: bool = True,
) -> np.ndarray:
  """Losses (count,) of held-out windows, float64 nats per byte.

  Args:
    settings: of the run.
    state: of the trained model.
    corpus: whose held-out part is read.
    count: windows, a multiple of the batch.
    quantized: whether with the forward products of the recipe or in float32.
  """
  loss = make_loss(model(settings, 1.0, quantized=quantized))
  return held_out(loss, settings.model, state, corpus, count)


def held_out(
  loss: Callable[..., jax.Array],
  config: byte_lm.Config,
  state: TrainState,
  corpus: data.Corpus,
  count: int,
) -> np.ndarray:
  """As `evaluate`, of a `make_loss` of a network with these sizes."""
  windows = data.held_out_windows(corpus, config.context, count)
  parts = np.split(windows, range(config.batch, count, config.batch))
  return np.concatenate([np.asarray(loss(state, w), np.float64) for w in parts])


def identity(settings: Settings, corpus: data.Corpus) -> dict[str, Any]:
  """What decides the trained weights, as JSON values.

  A recipe counts by what it does, not by its name alone.
  """
  values = dataclasses.asdict(settings)
  recipe = hashlib.sha256(repr(recipes.get(settings.recipe)).encode())
  values |= {'corpus': corpus.digest, 'recipe_digest': recipe.hexdigest()[:16]}
  return values.pop('model') | values


def _read_log(path: pathlib.Path | None, start: int) -> list[Record]:
  """The records before `start`; later ones are of steps that are repeated.

  Where the log was deleted they start later than with step 0.

  Raises:
    DamagedFileError: if the log is damaged, or older than the checkpoint.
  """
  if path is None or start == 0 or not path.exists():
    return []
  remedy = f'delete it to go on with a log that starts at step {start}'
  records = [
    Record(
      int(row.pop('step')),
      **{name: float(value) for name, value in row.items() if value},
    )
    for row in _results.read_csv(path, _LOG, remedy)
  ]
  kept = [record for record in records if record.step < start]
  if kept and kept[-1].step != start - 1:
    fault = f'it ends before step {start - 1}, where the checkpoint is'
    raise _files.DamagedFileError(path, fault, remedy)
  return kept


def _write_log(path: pathlib.Path | None, records: list[Record]) -> None:
  if path is None or jax.process_index() > 0:
    return
  _results.write_csv(path, _LOG, Record._fields, records)


def write_curve(path: pathlib.Path, records: list[Record], title: str) -> None:
  """Saves a plot of loss, gradient norm and monitors against steps as PNG."""
  monitored = [r for r in records if r.snr_db is not None]
  heights = (2, 1, 1) if monitored else (2, 1)
  figure = report.new_figure(8, 2 * sum(heights))
  steps = [r.step for r in records]
  losses = np.array([r.loss for r in records])
  panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
  upper, lower = panels[:2]
  upper.plot(steps, losses, color='0.75', lw=0.8, label='step')
  width = max(1, len(records) // 25)
  if len(records) >= 2 * width:
    mean = np.convolve(losses, np.ones(width) / width, 'valid')
    upper.plot(steps[width - 1 :], mean, color='tab:blue', label='running mean')
  upper.set_ylabel('training loss, nats per byte')
  upper.set_title(title, fontsize=11)
  upper.legend(frameon=False)
  lower.semilogy(steps, [r.gradient_norm for r in records], color='tab:blue')
  lower.set_ylabel('gradient norm')
  if monitored:
    twin = lower.twinx()
    at = [r.step for r in monitored]
    twin.plot(at, [r.snr_db for r in monitored], 'o', ms=3, color='tab:orange')
    twin.set_ylabel('gradient SNR, dB', color='tab:orange')
    _plot_shares(panels[2], monitored)
  panels[-1].set_xlabel('step')
  for axes in panels:
    axes.grid(alpha=0.25)
  report.write_figure(path, figure)


def _plot_shares(axes, records: list[Record]) -> None:
  """What is lost of each operand, in percent."""
  for name, style in (('flushed', '-o'), ('clipped', '--s')):
    for index, operand in enumerate(monitors.OPERANDS):
      points = [
        (r.step, 100 * r.monitored[f'{operand}_{name}'])
        for r in records
        if f'{operand}_{name}' in r.monitored
      ]
      if points:
        label = f'{operand} {name}'
        axes.plot(
          *zip(*points, strict=True),
          style, ms=3, lw=1, color=f'C{index}', label=label,
        )  # fmt: skip
  axes.set_yscale('symlog', linthresh=0.1)
  axes.set_ylim(bottom=0)
  axes.set_ylabel('% of elements')
  axes.legend(frameon=False, fontsize=8, ncols=2)
