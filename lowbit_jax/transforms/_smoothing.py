"""Per-channel scales moved from activations into weights (SmoothQuant)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax.transforms import _base


@_base.pytree
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalSmoothing:
  """Divides the activation by a scale per channel, multiplies the weight.

    x @ w = (x / s) @ (diag(s) w)

  The division is ``x * (1/s)`` with the reciprocal rounded once, as XLA does
  it, so a round trip is within 3u of x, relative, u being the unit roundoff,
  and exact where s is a power of two.

  Attributes:
    scale: positive floats ``(n,)``. A list or NumPy array is checked for
      being positive and finite; a JAX array, which may be traced, is not.
    axis: negative.

  Raises:
    ValueError: if `scale` is not a vector or holds a bad number.
  """

  scale: jax.Array
  axis: int = dataclasses.field(default=-1, metadata={'static': True})

  def __post_init__(self) -> None:
    _base.check_axis(self.axis)
    if not isinstance(self.scale, jax.Array):
      object.__setattr__(self, 'scale', np.asarray(self.scale))
      if self.scale.dtype.kind not in 'fiuV':
        raise TypeError(f'scale must hold numbers, not {self.scale.dtype}')
      bad = np.flatnonzero(~((self.scale > 0) & np.isfinite(self.scale)))
      if bad.size:
        raise ValueError(
          f'scale must be positive and finite; entries {bad[:4].tolist()} are '
          f'{self.scale.ravel()[bad[:4]].tolist()}; clamp it, for example at '
          '1e-5'
        )
    if self.scale.ndim != 1:
      raise ValueError(
        f'scale must be a vector, not of shape {self.scale.shape}; build '
        'stacked ones with vmap'
      )

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns x / s along `axis`."""
    return self._divide(x, self.axis)

  def inverse(self, x: jax.Array) -> jax.Array:
    """Returns x s along `axis`."""
    return self._multiply(x, self.axis)

  def apply_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns w s along the contracted axis of a weight."""
    return self._multiply(w, axis)

  def inverse_dual(self, w: jax.Array, axis: int = -2) -> jax.Array:
    """Returns w / s along the contracted axis of a weight."""
    return self._divide(w, axis)

  def _multiply(self, x, axis):
    scale = self._scale_for(x, axis)
    return (x.astype(scale.dtype) * scale).astype(x.dtype)

  def _divide(self, x, axis):
    scale = self._scale_for(x, axis)
    return (x.astype(scale.dtype) * (1.0 / scale)).astype(x.dtype)

  def _scale_for(self, x, axis):
    n = _base.check_operand(x, axis)
    if self.scale.shape != (n,):
      raise ValueError(
        f'scale of shape {self.scale.shape} does not fit {axis=} of length '
        f'{n} of an array of shape {x.shape}; it must have shape ({n},)'
      )
    scale = jnp.asarray(self.scale).astype(_base.compute_dtype(x))
    return _base.along(scale, x, axis)


def smooth_quant(
  activation_amax: jax.Array,
  weight_amax: jax.Array,
  *,
  strength: float = 0.5,
  floor: float = 1e-5,
  axis: int = -1,
) -> DiagonalSmoothing:
  """Returns the smoothing that shares out the range of each channel.

    s_j = a_j^strength / b_j^(1 - strength)

  Strength 0.5 gives activation and weight the same maximum in each channel;
  1 flattens the activation, 0 the weight. Best chosen on calibration data.

  Args:
    activation_amax: ``(n,)``, a_j = max |x| of channel j.
    weight_amax: ``(n,)``, b_j = max |w| over all weights that take this
      activation.
    strength: in [0, 1].
    floor: lower bound for a, b and s.
    axis: negative axis of the activation.

  Returns:
    DiagonalSmoothing with a float32 scale.

  Raises:
    ValueError: if `strength` is outside [0, 1], `floor` is not positive and
      finite, or the shapes differ.

  Reference: SmoothQuant, arXiv:2211.10438.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'{strength=} must lie in [0, 1]')
  if not 0 < floor < float('inf'):
    raise ValueError(f'{floor=} must be positive and finite')
  floor = float(floor)
  shapes = np.shape(activation_amax), np.shape(weight_amax)
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'activation_amax has shape {shapes[0]} and weight_amax {shapes[1]}; '
      'both need one entry per channel of the contracted axis'
    )
  a = jnp.maximum(jnp.asarray(activation_amax, jnp.float32), floor)
  b = jnp.maximum(jnp.asarray(weight_amax, jnp.float32), floor)
  scale = jnp.maximum(a**strength / b ** (1 - strength), floor)
  return DiagonalSmoothing(scale, axis)
