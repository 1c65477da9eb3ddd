"""Block scales: rules by name, their codes, and the factors they stand for.

A rule turns the maxima of blocks into one or more candidate scales. Rules with
one candidate are closed forms; 'mse', 'four_over_six' and 'sweep' name several,
from which the quantizer keeps the one with the least squared error per block.
'signed_absmax' and 'full_range' are closed forms for elements that reach
further on one side of zero, and 'least_squares' fits scales to codes.

Scales are leaves of a QArray: uint8 codes for formats of at most 8 bits (E8M0,
E4M3, ...), float32 or bfloat16 numbers otherwise.
"""

import math
from typing import overload

import jax
import jax.numpy as jnp

from lowbit_jax import formats
from lowbit_jax._typing import ScaleRule
from lowbit_jax.formats import BlockFormat, ElementFormat, FloatFormat
from lowbit_jax.formats._types import check_format
from lowbit_jax.numerics._codec import spec
from lowbit_pallas.arith import bits as fb, block, codec, scale as exact

block_max = exact.block_max
magnitude_bits = exact.magnitude_bits
reciprocal = exact.reciprocal
SMALLEST = exact.SMALLEST

EXPONENT_RULES = (*exact.EXPONENT_RULES, 'mse')
FLOAT_RULES = ('absmax', 'absmean', 'sweep')
UNEVEN_RULES = ('signed_absmax', 'full_range')
CODED_RULES = ('absmax', 'four_over_six', 'sweep')
ZERO_POINT_RULES = ('minmax',)
MINIMUM_RULES = ('minmax', 'least_squares')
TENSOR_RULES = ('absmax', 'absmean')
# Their codes are all those of the element, also of integers, which 'absmax'
# leaves the most negative one out of.
WHOLE_RANGE_RULES = (*UNEVEN_RULES, 'least_squares')

# Fractions of the absmax scale that 'sweep' tries on float scales, and steps of
# the scale code that it tries on coded scales, where +4 is half an octave of
# E4M3: the block maximum then lands on 4 instead of 6.
SWEEP_FRACTIONS = tuple(1 - i / 36 for i in range(19))
SWEEP_STEPS = tuple(range(-2, 7))
# Multiples of the scale of 'absmax' or 'signed_absmax' with whose codes
# 'least_squares' begins. Fitting moves scales, so that a coarse grid will do.
FIT_FACTORS = tuple(k / 20 for k in range(10, 26))


def scale_rules(fmt: BlockFormat) -> tuple[str, ...]:
  """The names of the rules that make sense for a block format."""
  check_format(fmt)
  if fmt.zero_point:
    return ZERO_POINT_RULES
  if fmt.minimum:
    return MINIMUM_RULES
  if fmt.scale is None:
    return TENSOR_RULES
  if fmt.has_exponent_scale:
    # 'even' rounds amax to the mantissa of the element, which integers lack.
    has_mantissa = isinstance(fmt.element, FloatFormat)
    return tuple(r for r in EXPONENT_RULES if has_mantissa or r != 'even')
  if not is_coded(fmt.scale):
    if fmt.tensor_scale:
      return FLOAT_RULES
    uneven = UNEVEN_RULES if longer_end(fmt.element) else ()
    return (*FLOAT_RULES, 'least_squares', *uneven)
  # Four over six is about the gap between the E2M1 values 4 and 6.
  six = fmt.element.max == 6.0
  return tuple(r for r in CODED_RULES if six or r != 'four_over_six')


@overload
def check_scale_rule(fmt: BlockFormat, rule: str | None) -> str: ...
@overload
def check_scale_rule(fmt: BlockFormat, rule: ScaleRule | None) -> ScaleRule: ...
def check_scale_rule(fmt: BlockFormat, rule: ScaleRule | None) -> ScaleRule:
  """The rule to use: `rule`, or the format's own default for None."""
  if rule is None:
    rule = fmt.scale_rule
  if callable(rule):
    hash(rule)
    if fmt.zero_point or fmt.minimum:
      others = 'zero points' if fmt.zero_point else 'minima'
      raise ValueError(
        f'scale_rule={rule!r}: a function gives scales, and {fmt} has {others}'
        f' too; compute both and use quantize_with'
      )
    return rule
  if rule not in scale_rules(fmt):
    raise ValueError(
      f'scale_rule={rule!r} does not fit {fmt.name}; its rules are'
      f' {", ".join(scale_rules(fmt))}'
    )
  return rule


def longer_end(element: ElementFormat) -> float | None:
  """The element of the largest magnitude, if its opposite is none.

  -8 of int4, whose largest is 7. None for elements as large on both sides, for
  those of one sign and for ternary numbers, whose fourth code is a spare one.
  """
  if isinstance(element, FloatFormat) or element == formats.ternary:
    return None
  values = element.values()
  low, high = float(values.min()), float(values.max())
  if low >= 0 or -low == high:
    return None
  return low if -low > high else high


def follows_maximum(rule: ScaleRule) -> bool:
  """Whether scales by this rule go with the largest magnitude of a block."""
  others = ('minmax', 'absmean', 'least_squares')
  return not callable(rule) and rule not in others


def reach(element: ElementFormat, rule: str) -> float:
  """What the largest magnitude of a block is mapped to, with its sign.

  'signed_absmax': to the longer end. 'full_range': to the middle of both ends.
  Others: to the largest element.
  """
  if rule == 'full_range':
    values = element.values()
    return float(values.max() - values.min()) / 2
  end = longer_end(element) if rule == 'signed_absmax' else None
  return end or element.max


def encoder(element: ElementFormat, rule: ScaleRule) -> codec.Element:
  """The element as it is encoded with scales by a rule."""
  static = spec(element)
  whole = not callable(rule) and rule in WHOLE_RANGE_RULES
  if isinstance(static, codec.Int) and longer_end(element):
    static = static._replace(lowest=whole)
  return static


def ends(encoder: codec.Element) -> tuple[float, float]:
  """The smallest and the largest number that encoding produces."""
  if isinstance(encoder, codec.Codebook):
    return encoder.table[0], encoder.table[-1]
  top = codec.largest(encoder)
  low = -top if encoder.signed else 0.0
  if isinstance(encoder, codec.Int) and encoder.lowest:
    low -= 2.0**-encoder.fraction_bits
  return low, top


def is_coded(scale: FloatFormat) -> bool:
  """Whether scales of this format are stored as uint8 codes."""
  return scale.bits <= 8


def tensor_scale_from(
  amax_bits: jax.Array, fmt: BlockFormat, target: float | None = None
) -> jax.Array:
  """The float32 scale of a whole tensor from the bits of its finite maximum.

  It maps the maximum to the largest product of element and block scale, or to
  that of the largest element and the block scale `target`; with block scales in
  the order of operations of TransformerEngine, 1 / (top / amax) with two
  roundings, so that codes agree bit for bit. At least 2^-126, and at most what
  keeps every product finite.
  """
  amax = fb.from_bits(amax_bits)
  live = amax_bits >= fb.MIN_NORMAL
  largest = fmt.element.max
  if fmt.scale is None:
    scale = amax * jnp.float32(1 / largest)
  else:
    top = jnp.float32(largest * (target or fmt.scale.max))
    scale = reciprocal(top / jnp.where(live, amax, 1.0))
    largest *= fmt.scale.max
  scale = jnp.clip(scale, exact.SMALLEST, exact.largest_scale(largest))
  return jnp.where(live, scale, 1.0)


def candidates(
  amax_bits: jax.Array,
  fmt: BlockFormat,
  rule: str,
  tensor_scale: jax.Array | None = None,
) -> list[jax.Array]:
  """Candidate block scales as stored, most ordinary first.

  Args:
    amax_bits: int32 bits of the block maxima.
    fmt: a format with a block scale and no zero point.
    rule: a name from `scale_rules(fmt)`, not 'absmean'.
    tensor_scale: float32, for two-level formats.

  Returns:
    A list of arrays of the shape of `amax_bits`: the NaN code or NaN where a
    block holds Inf or NaN.
  """
  bad = amax_bits >= fb.INF
  element = fmt.element
  if fmt.has_exponent_scale:
    base = 'floor' if rule == 'mse' else rule
    code = exact.exponent_code(
      amax_bits, base, element.emax, element.max, _mantissa_bits(element)
    )
    codes = [code]
    if rule == 'mse':
      live = (code < exact.NAN_CODE) & (amax_bits >= fb.MIN_NORMAL)
      top = exact.largest_exponent_code(element.emax)
      for step in (1, -1):
        neighbour = jnp.clip(code + step, 0, top)
        codes.append(jnp.where(live, neighbour, code))
    return [c.astype(jnp.uint8) for c in codes]

  assert fmt.scale is not None
  outer = tensor_scale if fmt.tensor_scale else None
  scale = block.absmax(amax_bits, element.max, outer)
  if is_coded(fmt.scale):
    code = _encode_scale(scale, fmt.scale)
    codes = [code]
    if rule == 'four_over_six':
      four = block.absmax(amax_bits, 4.0, outer)
      codes.append(_encode_scale(four, fmt.scale))
    if rule == 'sweep':
      top = fmt.scale.code_max
      steps = [jnp.clip(code + k, 1, top) for k in SWEEP_STEPS if k]
      codes += [jnp.where(code > 0, c, code) for c in steps]
    nan = fmt.scale.nan_code
    return [
      jnp.where(bad, nan, c).astype(jnp.uint8)  # pyright: ignore[reportArgumentType]
      for c in codes
    ]
  dtype = jnp.dtype(fmt.scale.name)
  fractions = SWEEP_FRACTIONS if rule == 'sweep' else (1.0,)
  scales = [scale * jnp.float32(f) for f in fractions]
  scales = [jnp.where(s > 0, bounded(s, fmt), 0) for s in scales]
  return [jnp.where(bad, math.nan, s).astype(dtype) for s in scales]


def bounded(
  scale: jax.Array, fmt: BlockFormat, largest: float | None = None
) -> jax.Array:
  """Positive float32 scales as near as they may come to `scale`.

  At least 2^-126 and the smallest number of their format; at most its largest
  and what keeps the largest element finite, `largest` in place of
  `fmt.element.max` where it is encoded.
  """
  return jnp.clip(scale, *bounds(fmt, largest))


def bounds(
  fmt: BlockFormat, largest: float | None = None
) -> tuple[float, float]:
  """The ends between which `bounded` keeps scales."""
  stored = formats.float32 if fmt.scale is None else fmt.scale
  top = exact.largest_scale(largest or fmt.element.max, stored.mantissa_bits)
  least = max(exact.SMALLEST, stored.min_subnormal)
  return least, min(top, stored.max)


def from_values(scale: jax.Array, fmt: FloatFormat) -> jax.Array:
  """Float scales in their stored form: the nearest code or number."""
  scale = scale.astype(jnp.float32)
  if is_coded(fmt):
    return codec.encode(scale, spec(fmt), saturate=True)
  if fmt.exponent_bits < 8:  # float16 ends where others round to Inf
    scale = jnp.clip(scale, -fmt.max, fmt.max)
  return scale.astype(jnp.dtype(fmt.name))


def factors(scale: jax.Array, fmt: FloatFormat) -> tuple[jax.Array, ...]:
  """Float32 factors whose product is the stored scale.

  E8M0 gives two, so that 2^-127 survives hardware that flushes subnormals.
  """
  return block.scale_factors(scale, spec(fmt) if is_coded(fmt) else None)


def value(scale: jax.Array, fmt: FloatFormat) -> jax.Array:
  """The stored scale as one float32 number."""
  if is_coded(fmt):
    return codec.decode(scale, spec(fmt))
  return scale.astype(jnp.float32)


def inverse_factors(
  scale: jax.Array | None,
  fmt: BlockFormat,
  tensor_scale: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
  """Float32 factors that quantize, see `arith.block.inverse_factors`."""
  scale_spec = None
  if fmt.scale is not None and is_coded(fmt.scale):
    scale_spec = spec(fmt.scale)
  return block.inverse_factors(scale, scale_spec, fmt.element.max, tensor_scale)


def _encode_scale(scale, fmt: FloatFormat):
  return codec.encode_float(scale, spec(fmt)).astype(jnp.int32)


def _mantissa_bits(element) -> int:
  return element.mantissa_bits if isinstance(element, FloatFormat) else 0
