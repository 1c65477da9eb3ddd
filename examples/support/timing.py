"""Losses of a model beside a baseline, timed fairly."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def _timed(function: Callable[..., jax.Array], *args: Any):
  start = time.perf_counter()
  result = jax.block_until_ready(function(*args))
  return np.asarray(result), time.perf_counter() - start


def measure(
  baseline: tuple[Callable[..., jax.Array], Any],
  candidate: tuple[Callable[..., jax.Array], Any],
  batches: Sequence[jax.Array],
  rounds: int,
) -> tuple[np.ndarray, float, float]:
  """Measures the losses of a candidate and its time beside the baseline.

  Baseline and candidate run on the same batches, in turn and in alternating
  order, after each was compiled and run once.

  Args:
    baseline: the float32 (loss, params).
    candidate: the (loss, params) to measure.
    batches: held-out windows, all of one shape.
    rounds: timed pairs.

  Returns:
    Losses of all windows, median seconds of the candidate, and the median of
    its time relative to the baseline.
  """
  pair = [baseline, candidate]
  for loss, params in pair:
    jax.block_until_ready(loss(params, batches[0]))
  losses: list[Any] = [None] * len(batches)
  seconds: tuple[list[float], list[float]] = ([], [])
  for index in range(max(rounds, len(batches))):
    batch = batches[index % len(batches)]
    for side in (0, 1) if index % 2 else (1, 0):
      if side == 1 or index < rounds:
        result, elapsed = _timed(pair[side][0], pair[side][1], batch)
        if index < rounds:
          seconds[side].append(elapsed)
        if side == 1:
          losses[index % len(batches)] = result
  return (
    np.concatenate(losses),
    statistics.median(seconds[1]),
    statistics.median(b / a for a, b in zip(*seconds, strict=True)),
  )
