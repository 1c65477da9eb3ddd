"""Tensor scales that are held or delayed, as explicit state.

A `QuantSpec` with `tensor_scaling` takes its tensor scale not from the largest
magnitude a_t of the current step but from

  delayed        max(a_(t-1), ..., a_(t-L)),  L = window
  sample, hold   a_r, r the latest of steps 0, D, 2D, ...,  D = every

and saturates beyond. A step quantizes with its states and records in them the
largest magnitudes of its operands; `advance` then starts the next step:

  y, state = scaling.qdot(x, w, recipe, state, key=key)   # as often as needed
  state = scaling.advance(state)                           # once per step

A state records a maximum, so microbatches, weights that several layers share
and recomputation leave the same state. In the first step, and where a history
holds only zeros or infinities, the current magnitude is used.
"""

from lowbit_jax._held_scales import (
  DotScales as DotScales,
  ScaleState as ScaleState,
  advance as advance,
  check_state as check_state,
  init as init,
  init_dot as init_dot,
  largest as largest,
  merge as merge,
  qdot as qdot,
  record as record,
)
