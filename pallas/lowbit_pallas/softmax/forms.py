"""The two representations of a partial sum, under one set of names.

'pair' is valid where the finite live entries of a row are at most
`arith.exponential.DOMAIN` in magnitude: a row beyond has a NaN for its sum, and
that is how 'auto' notices. 'online' is valid for every row.
"""

from collections.abc import Callable
from typing import NamedTuple

from lowbit_pallas.arith import exponential, softmax as sm

KINDS = ('softmax', 'log_softmax', 'logsumexp')
ALGORITHMS = ('auto', 'pair', 'online')


class Form(NamedTuple):
  """Block functions of one form; states are tuples of two float32 arrays.

  Attributes:
    state: the type of a state, of two arrays of one shape.
    identity: `(shape) -> state` worth zero.
    exp: `(x, where) -> state`, exp(x) entry by entry.
    part: `(x, where, axis) -> state`, the sum of exp(x) along an axis.
    merge: `(state, state) -> state`.
    total: `(state, axis) -> state`, the sum of states along an axis.
    softmax: `(x, state, where, axis) -> array`.
    log_softmax: the same, of the logarithm.
    logsumexp: `(state) -> array`.
  """

  state: Callable
  identity: Callable
  exp: Callable
  part: Callable
  merge: Callable
  total: Callable
  softmax: Callable
  log_softmax: Callable
  logsumexp: Callable


def _pair_part(x, where, axis):
  return sm.reduce(exponential.exp_pair(x, where), axis)


def _pair_softmax(x, total, where=None, axis=-1):
  return sm.normalise(exponential.exp_pair(x, where), total, where, axis)


PAIR = Form(
  exponential.Pair,
  sm.identity,
  exponential.exp_pair,
  _pair_part,
  sm.merge,
  sm.reduce,
  _pair_softmax,
  sm.log_normalise,
  sm.logsumexp,
)
ONLINE = Form(
  sm.Peak,
  sm.online_identity,
  sm.online_exp,
  sm.online_reduce,
  sm.online_merge,
  sm.online_total,
  sm.online_normalise,
  sm.online_log_normalise,
  sm.online_logsumexp,
)
