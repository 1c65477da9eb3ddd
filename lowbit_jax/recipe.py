"""What is done to an operand of a product, as a value."""

import dataclasses

from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _rounding, _scaling

BACKWARDS = ('identity', 'clipped', 'absmax', 'trust')
_KEYED = ('stochastic', 'dithered')


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How one operand is fake-quantized; hashable, so static under jit.

  Attributes:
    fmt: block format, a value such as `formats.mxfp4`.
    scale_rule: how scales follow from the data. None becomes the rule of the
      format, so that equal specs do the same.
    rounding: 'nearest_even', 'toward_zero', or 'stochastic' and 'dithered',
      which need a key in every call.
    backward: gradient of the rounding: 'identity', 'clipped', 'absmax' or
      'trust', see `fake_quant`.

  Examples:
    >>> from lowbit_jax import formats
    >>> QuantSpec(formats.mxfp4, scale_rule='rceil').rounding
    'nearest_even'
  """

  fmt: BlockFormat
  scale_rule: str | None = None
  rounding: str = 'nearest_even'
  backward: str = 'identity'

  def __post_init__(self):
    if not isinstance(self.fmt, BlockFormat):
      raise TypeError(
        f'fmt={self.fmt!r} must be a block format, a value such as'
        " lowbit_jax.formats.mxfp4 or lowbit_jax.formats.get('mxfp4')"
      )
    rule = _scaling.check_scale_rule(self.fmt, self.scale_rule)
    object.__setattr__(self, 'scale_rule', rule)
    for name, allowed in (
      ('rounding', _rounding.ROUNDINGS),
      ('backward', BACKWARDS),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(f'{name}={value!r} is not one of {allowed}')

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return self.rounding in _KEYED
