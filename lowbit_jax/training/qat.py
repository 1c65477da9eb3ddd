"""Quantization-aware training with parameters of its own: LSQ and PACT.

Each is a frozen description with `init`, which makes its parameters, and a call
`(params, x) -> x_hat`. Parameters are dicts of float32 arrays to be trained
beside the weights. Methods without parameters are quantizers, in
`training.quantizers`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax import _derivative
from lowbit_jax._typing import ArrayLike
from lowbit_jax.numerics._codec import as_float_array
from lowbit_jax.qarray import check_axis

PARAMETERS = ('log', 'clipped')
# A clipped step never gets smaller.
LEAST_STEP = 2.0**-24

_STEPS = ('step', 'log_step')


@dataclasses.dataclass(frozen=True)
class Lsq:
  """Learned step size quantization.

    v = x / s,  x_hat = s round(clip(v, -Q_n, Q_p))
    dx_hat/dx = 1 for -Q_n < v < Q_p, else 0
    dx_hat/ds = -Q_n for v <= -Q_n, Q_p for v >= Q_p, else round(v) - v

  and ds times 1 / sqrt(n Q_p), n elements per step. Q_n = Q_p = 2^(bits-1) - 1,
  or 0 and 2^bits - 1 without sign: the numbers that `quantize_with` encodes
  with the step s as scale. (The source has Q_n = 2^(bits-1), a number more,
  which symmetric integer formats have not.)

  Attributes:
    bits: 2 to 16, or 1 without sign.
    signed: False for activations after a ReLU.
    axis: None for one step per tensor, or the axis whose elements share one,
      for a kernel (in, out) -2.
    parameter: how s stays positive. 'log' trains log s, 'clipped' trains s and
      uses max(s, LEAST_STEP), counted as the identity.

  Source: Esser et al., "Learned Step Size Quantization" (2020).

  Examples:
    >>> lsq = Lsq(3)
    >>> params = lsq.init(jnp.array([-1.0, 0.5]))
    >>> lsq(params, jnp.array([-1.0, 0.5])).shape
    (2,)
  """

  bits: int
  signed: bool = True
  axis: int | None = None
  parameter: str = 'log'

  def __post_init__(self) -> None:
    if not isinstance(self.signed, bool):
      raise TypeError(f'signed={self.signed!r} must be a bool')
    if not isinstance(self.bits, int) or not 1 + self.signed <= self.bits <= 16:
      raise ValueError(
        f'bits={self.bits!r} must be an int in {1 + self.signed}..16'
      )
    if self.axis is not None and not isinstance(self.axis, int):
      raise TypeError(f'axis={self.axis!r} must be an int or None')
    if self.parameter not in PARAMETERS:
      raise ValueError(
        f'parameter={self.parameter!r} is not one of {PARAMETERS}'
      )

  def _shared(self, x: jax.Array) -> int:
    """How many elements share a step."""
    if self.axis is None:
      return x.size
    return x.shape[check_axis(self.axis, x.ndim)]

  @property
  def range(self) -> tuple[int, int]:
    """Q_n and Q_p."""
    if not self.signed:
      return 0, 2**self.bits - 1
    top = 2 ** (self.bits - 1) - 1
    return top, top

  def init(self, x: ArrayLike) -> dict[str, jax.Array]:
    """The step 2 mean |x| / sqrt(Q_p) of the source.

    Args:
      x: the weight, or a batch of activations.

    Returns:
      {'log_step': log s} or {'step': s}, float32; of shape () or, with `axis`,
      that of x with size 1 there.
    """
    x = as_float_array(x).astype(jnp.float32)
    keep = self.axis is not None
    n = self._shared(x)
    mean = jnp.sum(jnp.abs(x), axis=self.axis, keepdims=keep) / max(n, 1)
    step = jnp.maximum(2 * mean / math.sqrt(self.range[1]), LEAST_STEP)
    if self.parameter == 'log':
      return {'log_step': jnp.log(step)}
    return {'step': step}

  def step(self, params: dict[str, jax.Array]) -> jax.Array:
    """s, positive."""
    name = 'log_step' if self.parameter == 'log' else 'step'
    _check_params(params)
    if name not in params:
      raise ValueError(
        f'params has {sorted(params)}, but parameter={self.parameter!r} trains'
        f' {name!r}: make them with init'
      )
    if self.parameter == 'log':
      return jnp.exp(params[name])
    step = params[name]
    return _with_value(jnp.maximum(step, LEAST_STEP), step)

  def __call__(self, params: dict[str, jax.Array], x: ArrayLike) -> jax.Array:
    """x_hat of the shape and dtype of x."""
    x = as_float_array(x)
    low, high = self.range
    s = self.step(params)
    n = self._shared(x)
    s = _with_value(s, s / math.sqrt(max(n, 1) * high))
    v = x.astype(jnp.float32) / s
    # Where it is clipped v is a constant, so that only the factor s counts.
    v = jnp.where(v <= -low, -float(low), jnp.where(v >= high, float(high), v))
    return (s * _with_value(jnp.round(v), v)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Pact:
  """Parameterized clipping of activations.

    x_hat = alpha / n round(clip(x, 0, alpha) n / alpha),  n = 2^bits - 1
    dx = g where 0 <= x < alpha, else 0;  dalpha = sum of g where x >= alpha

  Attributes:
    bits: 1 to 16.
    decay: lambda of the penalty lambda alpha^2, which pulls alpha down.

  Source: Choi et al., "PACT" (2018).
  """

  bits: int
  decay: float = 1e-3

  def __post_init__(self) -> None:
    if not isinstance(self.bits, int) or not 1 <= self.bits <= 16:
      raise ValueError(f'bits={self.bits!r} must be an int in 1..16')
    if not self.decay >= 0:
      raise ValueError(f'decay={self.decay!r} must not be negative')

  def init(self, alpha: float = 6.0) -> dict[str, jax.Array]:
    """{'alpha': alpha}, float32 of shape ()."""
    if not alpha > 0:
      raise ValueError(f'alpha={alpha!r} must be positive')
    return {'alpha': jnp.float32(alpha)}

  def penalty(self, params: dict[str, jax.Array]) -> jax.Array:
    """decay alpha^2, to be added to the loss."""
    return self.decay * jnp.square(params['alpha'])

  def __call__(self, params: dict[str, jax.Array], x: ArrayLike) -> jax.Array:
    """x_hat of the shape and dtype of x."""
    x = as_float_array(x)
    _check_params(params)
    if 'alpha' not in params:
      raise ValueError(f'params has {sorted(params)}: make them with init')
    alpha = params['alpha']
    top = jnp.maximum(jax.lax.stop_gradient(alpha), LEAST_STEP)
    wide = x.astype(jnp.float32)
    # The derivative is that of the clip; rounding counts as the identity.
    clip = jnp.where(wide >= top, alpha, jnp.where(wide < 0, 0, wide))
    n = 2**self.bits - 1
    y = jnp.round(jnp.clip(wide, 0, top) * (n / top)) * (top / n)
    return _with_value(y, clip).astype(x.dtype)


def decay_mask(params: Any) -> Any:
  """True for every leaf but the steps of `Lsq`, which weight decay would
  shrink.

  Args:
    params: a tree of parameters; steps are found by their names.

  Returns:
    A tree of bools, a `mask` for optax.adamw.
  """

  def decays(path, leaf):
    del leaf
    return not any(getattr(entry, 'key', None) in _STEPS for entry in path)

  return jax.tree_util.tree_map_with_path(decays, params)


def _check_params(params: object) -> None:
  if not isinstance(params, Mapping):
    raise TypeError(f'{params=} must be a dict: make it with init')


@_derivative.custom_jvp
def _with_value(value, x):
  """`value` with the derivative of x."""
  del x
  return value


@_with_value.defjvp
def _with_value_jvp(primals, tangents):
  return _with_value(*primals), tangents[1]
