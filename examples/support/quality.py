"""How far a language model is from its float original, token by token.

Of the float model, only the states after its last block are kept for a window.
Its logits are computed anew beside those of each other model, a slice at a
time: memory does not grow with the vocabulary, and a window costs one head
more.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import llama

WINDOW = 1024  # tokens at most
_SLICE = 256  # positions whose logits are there at a time


class TextTooShort(ValueError):
  """A text of fewer tokens than are to be read."""


class Scores(NamedTuple):
  """A model on one window.

  Attributes:
    nll: of each token but the first, in nats.
    kl: mean Kullback-Leibler divergence of its distributions from those of the
      float model, in nats per token.
    top1: share of the positions where both find the same token most likely.
    seconds: from tokens to logits, compilation aside.
  """

  nll: list[float]
  kl: float
  top1: float
  seconds: float


class Gap(NamedTuple):
  """A model over all windows; the attributes are columns of the table.

  Attributes:
    nll: mean over tokens, in nats.
    delta: what the model adds to that of the float model.
    stderr: of delta, paired, over tokens.
    kl: as in `Scores`, mean of the windows.
    top1: the same.
    tokens_per_second: through the model.
  """

  nll: float
  delta: float
  stderr: float
  kl: float
  top1: float
  tokens_per_second: float


def windows(tokens: Sequence[int], count: int, context: int) -> np.ndarray:
  """The first windows of a text (count, length), one after the other.

  Args:
    tokens: of the text.
    count: of windows.
    context: of the model, in tokens; windows have no more, and no more than
      `WINDOW`.

  Raises:
    TextTooShort: if the text has no so many windows.
  """
  length = min(WINDOW, context)
  if len(tokens) < count * length:
    raise TextTooShort(
      f'the text has {len(tokens)} tokens, so {len(tokens) // length} windows'
      f' of {length} fit, not {count}'
    )
  return np.array(tokens[: count * length], np.int32).reshape(count, length)


def gap(scores: Sequence[Scores], floats: Sequence[Scores]) -> Gap:
  """What the scores of a model, and of the float one, say over all windows."""
  nll = np.concatenate([s.nll for s in scores])
  deltas = nll - np.concatenate([s.nll for s in floats])
  tokens = sum(len(s.nll) + 1 for s in scores)
  return Gap(
    nll=float(nll.mean()),
    delta=float(deltas.mean()),
    stderr=float(deltas.std(ddof=1) / len(deltas) ** 0.5),
    kl=float(np.mean([s.kl for s in scores])),
    top1=float(np.mean([s.top1 for s in scores])),
    tokens_per_second=tokens / sum(s.seconds for s in scores),
  )


class Program:
  """A model that is compiled when it reads its first window."""

  def __init__(self, model: llama.Llama) -> None:
    graph, self._state = nnx.split(model)
    self._compiled: dict[Any, Callable[..., jax.Array]] = {}
    self._states = jax.jit(
      lambda state, tokens: nnx.merge(graph, state).states(tokens)[0]
    )
    self._logits = jax.jit(
      lambda state, states: nnx.merge(graph, state).logits(states)
    )

  def states(self, tokens: np.ndarray) -> tuple[jax.Array, float]:
    """States (tokens, width) of tokens (tokens,), and the seconds it took."""
    made, seconds = self._timed(self._states, tokens[None])
    return made[0], seconds

  def logits(self, states: jax.Array | np.ndarray) -> tuple[jax.Array, float]:
    """Logits (positions, vocabulary), and the seconds it took."""
    return self._timed(self._logits, states)

  def _timed(self, function: Any, argument: Any) -> tuple[jax.Array, float]:
    key = function, argument.shape
    if key not in self._compiled:
      lowered = function.lower(self._state, argument)
      self._compiled[key] = lowered.compile()
    begin = time.perf_counter()
    made = jax.block_until_ready(self._compiled[key](self._state, argument))
    return made, time.perf_counter() - begin


class Judge:
  """Compares models with the float one.

  Args:
    model: the float model.
    windows: (count, length) tokens.
  """

  def __init__(self, model: llama.Llama, windows: np.ndarray) -> None:
    self._windows = windows
    self._float = Program(model)
    self._states: dict[int, np.ndarray] = {}

  def scores(self, program: Program, window: int) -> Scores:
    """Of a model on a window, by number."""
    tokens = self._windows[window]
    if window not in self._states:
      self._states[window] = np.asarray(self._float.states(tokens)[0])
    states, seconds = program.states(tokens)
    columns = []
    following = np.roll(tokens, -1)  # the last has none, and does not count
    for first in range(0, len(tokens), _SLICE):
      part = slice(first, first + _SLICE)
      reference, _ = self._float.logits(self._states[window][part])
      logits, more = program.logits(states[part])
      columns.append(_compared(reference, logits, following[part]))
      seconds += more
    table = np.concatenate(columns, axis=1).astype(np.float64)
    nll, kl, same = table[:, :-1]
    kl, same = float(kl.mean()), float(same.mean())
    return Scores(nll.tolist(), kl, same, seconds)


@jax.jit
def _compared(
  reference: jax.Array, logits: jax.Array, targets: jax.Array
) -> jax.Array:
  """Loss, divergence and agreement (3, positions)."""
  expected, made = (
    jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, logits)
  )
  nll = -jnp.take_along_axis(made, targets[:, None], axis=-1)[:, 0]
  kl = (jnp.exp(expected) * (expected - made)).sum(axis=-1)
  same = expected.argmax(axis=-1) == made.argmax(axis=-1)
  return jnp.stack([nll, kl, same.astype(nll.dtype)])
