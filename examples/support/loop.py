"""Parts of all training: schedule, AdamW, a step, and the loop over steps."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from models import byte_lm
from support import command, data

State = TypeVar('State')


class TrainState(NamedTuple):
  """Parameters, optimizer state and the number of steps done (int32)."""

  params: Any
  optimizer: Any
  step: jax.Array


def cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Linear warm-up, then a cosine to 10 %."""
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup else peak, peak, warmup, steps, 0.1 * peak
  )


def schedule(config: byte_lm.Config) -> optax.Schedule:
  """The learning rate of the language model, an eighth of it warm-up."""
  return cosine(config.learning_rate, config.steps, config.steps // 8)


def matrices(params: Any) -> Any:
  """Which parameters decay."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(rate: optax.GradientTransformation) -> optax.GradientTransformation:
  """AdamW with clipping at norm 1; `rate` multiplies by the learning rate."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.chain(
      optax.scale_by_adam(b2=0.95),
      optax.add_decayed_weights(0.1, matrices),
      rate,
    ),
  )


def optimizer(config: byte_lm.Config) -> optax.GradientTransformation:
  """AdamW by the schedule of the model."""
  return adamw(optax.scale_by_learning_rate(schedule(config)))


def init(config: byte_lm.Config) -> TrainState:
  """Returns the state before the first step."""
  params = byte_lm.init(config)
  return TrainState(
    params, optimizer(config).init(params), jnp.zeros((), jnp.int32)
  )


def make_step(
  model: byte_lm.ByteLM, transform: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, jax.Array]]:
  """Returns the `(state, windows) -> (state, loss)` of one step, not jitted.

  Keyword arguments of a step go to the transform.
  """

  def loss_fn(params, windows):
    logits = model.apply({'params': params}, windows[:, :-1])
    return byte_lm.cross_entropy(logits, windows[:, 1:])

  def step(state, windows, **options):
    loss, gradients = jax.value_and_grad(loss_fn)(state.params, windows)
    updates, optimizer_state = transform.update(
      gradients, state.optimizer, state.params, **options
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state, state.step + 1), loss

  return step


@functools.cache
def _compiled_step(config: byte_lm.Config):
  return jax.jit(make_step(byte_lm.ByteLM(config), optimizer(config)))


def take_steps(
  state: State,
  start: int,
  steps: int,
  step: Callable[[State, int], tuple[State, Mapping[str, str]]],
  description: str,
  save: Callable[[int, State], None],
  save_every: int,
) -> State:
  """Returns the state after the last step, with a progress bar on the way.

  Args:
    state: after `start` steps.
    start: steps that are done.
    steps: of the whole training.
    step: maps a state and the number of a step to the next state and to what
      the bar shows.
    description: of the bar.
    save: is called with the number of steps done and the state.
    save_every: steps between saves; the last step is always saved.
  """
  with command.progress(
    total=steps,
    initial=start,
    desc=description,
    unit='step',
    disable=start == steps or jax.process_index() > 0,
  ) as bar:
    for index in range(start, steps):
      state, shown = step(state, index)
      bar.set_postfix(shown, refresh=False)
      bar.update()
      done = index + 1
      if done % save_every == 0 or done == steps:
        save(done, state)
  return state


def train(
  config: byte_lm.Config,
  corpus: data.Corpus,
  checkpoints: Any,
  save_every: int,
) -> Any:
  """Trains in float32 from the newest checkpoint on.

  Args:
    config: of the model and its training.
    corpus: whose training part is read.
    checkpoints: a `checkpoints.Checkpoints`.
    save_every: steps between checkpoints; the last step is always saved.

  Returns:
    The trained parameters.

  Raises:
    CheckpointError: if the newest checkpoint is damaged.
  """
  start, state = checkpoints.restore(jax.eval_shape(lambda: init(config)))
  if state is None:
    state = init(config)
  else:
    done = 'reused' if start == config.steps else 'resumed'
    print(f'training: step {start} of {config.steps} {done}')
  compiled = _compiled_step(config)

  def step(state, index):
    windows = data.train_batch(corpus, config, index)
    state, loss = compiled(state, windows)
    return state, {'loss': f'{float(loss):.3f}'}

  state = take_steps(
    state, start, config.steps, step, 'training', checkpoints.save, save_every
  )
  return state.params


def identity(config: byte_lm.Config, corpus: data.Corpus) -> dict[str, Any]:
  """Returns what decides the trained weights, as JSON values."""
  params = jax.eval_shape(lambda: byte_lm.init(config))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shapes = [f'{jax.tree_util.keystr(path)} {leaf}' for path, leaf in leaves]
  digest = hashlib.sha256('\n'.join(shapes).encode()).hexdigest()[:16]
  return dataclasses.asdict(config) | {
    'corpus': corpus.digest,
    'parameters': digest,
  }
