"""Advice: rules with a threshold and a reason each.

Where a rule names an alternative, the alternative was tried on the tensor and
is named only if its QSNR is higher; the numbers are in the advice.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from lowbit_jax.doctor import _alternatives, _measure
from lowbit_jax.doctor._alternatives import Case
from lowbit_jax.formats import FloatFormat
from lowbit_jax.numerics import scale_rules


class Rule(NamedTuple):
  """One piece of advice.

  Attributes:
    name: short name, in `Row.rules`.
    threshold: the number that a measure is compared with.
    reason: why this number.
    advise: `(case, threshold)` to a sentence, or None where all is well.
  """

  name: str
  threshold: float
  reason: str
  advise: Callable[[Case, float], str | None]


def advise(case: Case) -> list[tuple[str, str]]:
  """(name, sentence) of every rule that applies, the most severe first."""
  out = []
  for rule in RULES:
    if rule.name == 'low-qsnr' and out:
      continue
    if sentence := rule.advise(case, rule.threshold):
      out.append((rule.name, sentence))
  return out


def _nonfinite(case: Case, limit: float) -> str | None:
  m = case.m
  if m.nan + m.inf <= limit and m.nonfinite_blocks <= limit:
    return None
  if m.nan + m.inf == 0:
    return (
      f'{m.nonfinite_blocks} blocks of {case.path!r} are NaN: it was quantized'
      ' from NaN or Inf; find them in the original'
    )
  return (
    f'{case.path!r} holds {m.nan} NaN and {m.inf} Inf, the first at index'
    f' {m.first_nonfinite} ({m.nonfinite_blocks} NaN blocks): repair the tensor'
    ' before quantizing'
  )


def _no_op(case: Case, limit: float) -> str | None:
  if not case.m.qsnr_db > limit:
    return None
  return (
    f'nothing changed: every element is already a number of {case.fmt}; it was'
    ' quantized before, or a step that should change it was not run'
  )


def _lost_blocks(case: Case, limit: float) -> str | None:
  if not case.m.lost_blocks > limit:
    return None
  remedy = 'rescale the tensor'
  if case.fmt.tensor_scale:
    remedy = 'use a format without tensor scale, such as mxfp4, or rotate'
  return (
    f'{_percent(case.m.lost_blocks)} of the blocks became zero though they are'
    f' not, because their scale underflows: {remedy}'
  )


def _tensor_scale(case: Case, limit: float) -> str | None:
  if not case.m.rho[0] < limit:
    return None
  excess = 1 / case.m.rho[0] if case.m.rho[0] else math.inf
  return (
    'the tensor scale is too small: a block maximum is'
    f' {excess:.3g} times what it covers (rho < 1) and saturates;'
    ' compute the tensor scale from this tensor'
  )


def _saturation(case: Case, limit: float) -> str | None:
  if not case.m.saturated > limit:
    return None
  finding = f'{_percent(case.m.saturated)} of the elements are clipped'
  if case.scale_rule is None:
    if (gain := case.gain()) > 0:
      return f'{finding}: fresh scales give {_gain(case, gain)}'
    return None
  rules = [r for r in ('rceil', 'even') if r in scale_rules(case.fmt)]
  gains = {r: case.gain(scale_rule=r) for r in rules if r != case.scale_rule}
  best = max(gains, key=gains.__getitem__, default=None)
  if best is None or gains[best] < 0.05:
    return None
  return (
    f'{finding} by scale_rule={case.scale_rule!r}: {best!r} gives'
    f' {_gain(case, gains[best])}'
  )


def _outliers(case: Case, limit: float) -> str | None:
  if not case.m.spiky_blocks > limit:
    return None
  options = []
  if (rotation := _alternatives.rotation(case)) is not None:
    gain = case.gain(transform=rotation)
    options.append((gain, f'rotating with Hadamard({rotation.block}) gives'))
  twin = _alternatives.FLOAT_TWINS.get(case.fmt.name)
  if twin is not None:
    options.append((case.gain(fmt=twin), f'{twin} instead of {case.fmt} gives'))
  tried = [
    f'{remedy} {_gain(case, gain)}'
    for gain, remedy in options
    if gain > _MIN_GAIN
  ]
  if not tried:
    return None
  crest = _measure.crest_limit(_alternatives.block_size(case))
  return (
    f'{_percent(case.m.spiky_blocks)} of the blocks are ruled by an outlier'
    f' (crest above {crest:.2g}):'
    f' {"; ".join(tried)}'
  )


def _flush(case: Case, limit: float) -> str | None:
  if not case.m.flushed > limit or case.fmt.element.bits < 3:
    return None
  if case.m.lost_blocks > 0 or case.m.subnormal_scales > 0.01:
    return None  # a matter of scales, which other rules name
  finding = f'{_percent(case.m.flushed)} of the nonzero elements became zero'
  options = []
  for fmt in _alternatives.finer(case.fmt):
    axis = -1 if case.fmt.is_tile else case.axis
    options.append((case.gain(fmt=fmt, axis=axis), f'{fmt} gives'))
  if (rotation := _alternatives.rotation(case)) is not None:
    gain = case.gain(transform=rotation)
    options.append((gain, f'rotating with Hadamard({rotation.block}) gives'))
  gain, remedy = max(options, default=(-math.inf, ''))
  if gain > _MIN_GAIN:
    return f'{finding}: {remedy} {_gain(case, gain)}'
  return f'{finding}: use a format with more bits'


def _scale_precision(case: Case, limit: float) -> str | None:
  if not case.m.subnormal_scales > limit:
    return None
  scale = case.fmt.scale
  assert isinstance(scale, FloatFormat)
  reach = scale.max / scale.min_normal
  finding = (
    f'{_percent(case.m.subnormal_scales)} of the block scales are subnormal'
    f' {scale} and lose precision'
  )
  if not math.isnan(case.m.rho[1]):
    finding += (
      f' (tensor maximum / block maximum is up to {case.m.rho[1]:.3g}, beyond'
      f' {reach:g})'
    )
  return (
    f'{finding}: rotate, or use a format with exponent scales such as mxfp4'
  )


def _scale_range(case: Case, limit: float) -> str | None:
  if not case.m.end_scales > limit:
    return None
  return (
    f'{_percent(case.m.end_scales)} of the block scales are 2^-127 or 2^127,'
    ' the ends of e8m0: multiply the tensor by a power of two first'
  )


def _padding(case: Case, limit: float) -> str | None:
  if not case.m.padding > limit or case.x is None:
    return None
  finding = f'padding adds {_percent(case.m.padding)}'
  if case.fmt.is_tile:
    return f'{finding}: use the format without tiles, or pad the model itself'
  ndim = jnp.ndim(case.x)
  costs = {a: _alternatives.padding_of(case, a) for a in range(-ndim, 0)}
  best = min(costs, key=costs.__getitem__)
  if costs[best] < case.m.padding:
    return (
      f'{finding}: axis={best} adds {_percent(costs[best])} (a product is fast'
      ' where the block axis is the contracted one)'
    )
  return f'{finding}: use a smaller block, or keep the tensor in bfloat16'


def _zero_blocks(case: Case, limit: float) -> str | None:
  lost = 0.0 if math.isnan(case.m.lost_blocks) else case.m.lost_blocks
  if not case.m.zero_blocks - lost > limit:
    return None
  return (
    f'{_percent(case.m.zero_blocks)} of the blocks are zero: the tensor is'
    ' unused, masked or not loaded'
  )


def _low_qsnr(case: Case, limit: float) -> str | None:
  if case.fmt.element.bits < 4:
    limit /= 2
  if not case.m.qsnr_db < limit:
    return None
  return (
    f'QSNR is below {limit:g} dB: use a format with more bits, or train with'
    ' fake_quant'
  )


def _percent(share: float) -> str:
  return f'{100 * share:.2g} %' if share < 0.995 else f'{100 * share:.0f} %'


def _gain(case: Case, gain: float) -> str:
  return f'{case.m.qsnr_db + gain:.1f} dB instead of {case.m.qsnr_db:.1f} dB'


_MIN_GAIN = 0.5

RULES = (
  Rule('nonfinite', 0, 'one NaN makes a whole block NaN', _nonfinite),
  Rule('no-op', 300, 'float32 data has finite QSNR unless it is exact', _no_op),
  Rule('lost-blocks', 0, 'a block of zeros has no signal left', _lost_blocks),
  Rule(
    'tensor-scale',
    0.99,
    'rho < 1 saturates block scales; the last percent is rounding',
    _tensor_scale,
  ),
  Rule(
    'saturation',
    1e-3,
    'clipped elements are the largest ones: 1 in 1000 off by a tenth of the'
    ' maximum costs as much as all rounding at 30 dB',
    _saturation,
  ),
  Rule(
    'outliers',
    0.01,
    'Gaussian blocks exceed 1.5 times the expected maximum in less than 1 %',
    _outliers,
  ),
  Rule(
    'flush-to-zero',
    0.25,
    'a Gaussian loses 7 % in MXFP4 and 16 % in int4 with groups of 128',
    _flush,
  ),
  Rule(
    'scale-precision',
    0.01,
    'subnormal block scales have fewer than their 3 mantissa bits',
    _scale_precision,
  ),
  Rule('scale-range', 0, 'scales beyond 2^+-127 do not exist', _scale_range),
  Rule('padding', 0.1, 'a tenth is more than block scales cost', _padding),
  Rule('zero-blocks', 0.5, 'weights are rarely zero in blocks', _zero_blocks),
  Rule(
    'low-qsnr',
    10,
    'a tenth of the energy is error (5 dB below 4 bits); a Gaussian has 19 dB'
    ' in 4-bit formats',
    _low_qsnr,
  ),
)
