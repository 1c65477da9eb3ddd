"""Number formats as frozen, hashable values.

An element format names a set of numbers and their codes; a block format says
which elements share a scale and how that scale is stored. Both are plain data:
few primitive fields, everything else derived, no JAX. Being hashable they are
static arguments of `jax.jit` and static metadata of a pytree.
"""

import dataclasses
import functools
import math
import typing
from typing import Any

import numpy as np

SPECIALS = ('none', 'fn', 'ieee', 'fnuz')


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _check_types(fmt: Any) -> None:
  """Raises TypeError for a field whose value is not what it is annotated as."""
  for field in dataclasses.fields(fmt):
    value = getattr(fmt, field.name)
    expected: Any = field.type
    if isinstance(expected, str):  # scale_blocks, which is checked where it is
      continue
    if typing.get_origin(expected) is tuple:
      kind = typing.get_args(expected)[0]
      good = isinstance(value, tuple) and all(_is_a(v, kind) for v in value)
    else:
      good = _is_a(value, expected)
    if not good:
      wanted = expected.__name__ if isinstance(expected, type) else expected
      raise TypeError(
        f'{field.name}={value!r} of a {type(fmt).__name__} must be of type'
        f' {wanted}'
      )


def _is_a(value: object, expected: Any) -> bool:
  """isinstance, except that a bool is no int and an int is a float."""
  if isinstance(value, bool):
    return expected is bool
  return isinstance(value, int | float if expected is float else expected)


def check_int(name: str, value: object, low: int, high: int) -> None:
  """Refuses what is no int in low ... high."""
  _require(
    isinstance(value, int) and low <= value <= high,
    f'{name}={value!r} must be an int in {low}..{high}',
  )


@dataclasses.dataclass(frozen=True)
class ElementFormat:
  """A set of at most 2**bits numbers, each with an unsigned integer code.

  Subclasses: `FloatFormat`, `IntFormat`, `CodebookFormat`.
  """

  name: str

  @property
  def bits(self) -> int:
    """Width of a code."""
    raise NotImplementedError(type(self).__name__)

  def values(self) -> np.ndarray:
    """Decode table: float64 of shape (2**bits,), NaN and Inf where coded."""
    raise NotImplementedError(type(self).__name__)

  @property
  def max(self) -> float:
    """Largest finite magnitude that encoding produces."""
    raise NotImplementedError(type(self).__name__)

  @property
  def code_max(self) -> int:
    """Code of the largest finite number."""
    values = self.values()
    return int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))

  @property
  def is_signed(self) -> bool:
    """Whether negative numbers can be represented."""
    return bool(np.any(self.values() < 0))

  @property
  def emax(self) -> int:
    """floor(log2(max)): the exponent that the OCP floor rule subtracts."""
    return math.frexp(self.max)[1] - 1

  def __str__(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True)
class FloatFormat(ElementFormat):
  """A binary minifloat: sign, exponent field e, mantissa field m.

  The value of a code is (-1)^s * m * 2^(emin - M) for e = 0 and
  (-1)^s * (1 + m / 2^M) * 2^(e - bias) otherwise, with emin = 1 - bias.

  Attributes:
    exponent_bits: E, at least 1.
    mantissa_bits: M, stored mantissa bits, at least 0.
    bias: exponent bias.
    special: which codes are not finite. 'none': no code. 'fn': the all-ones
      magnitude is NaN. 'ieee': the top exponent holds Inf (m = 0) and NaN.
      'fnuz': only NaN, at the code of negative zero.
    signed: whether the top bit is a sign.
    zero: False where e = 0 is an ordinary exponent (E8M0): no zero, no
      subnormals.
  """

  exponent_bits: int
  mantissa_bits: int
  bias: int
  special: str = 'none'
  signed: bool = True
  zero: bool = True

  def __post_init__(self) -> None:
    _check_types(self)
    check_int('exponent_bits', self.exponent_bits, 1, 11)
    check_int('mantissa_bits', self.mantissa_bits, 0, 52)
    _require(
      isinstance(self.special, str) and self.special in SPECIALS,
      f'special={self.special!r} is not one of {SPECIALS}',
    )
    _require(
      self.signed or self.special != 'fnuz',
      "special='fnuz' puts NaN on the sign bit and needs signed=True",
    )
    # Decode tables are float64.
    largest = (self.code_max >> self.mantissa_bits) - self.bias
    _require(
      self.emin - self.mantissa_bits >= -1074 and largest <= 1023,
      f'{self.bias=} leaves the range of float64',
    )

  @property
  def bits(self) -> int:
    return self.signed + self.exponent_bits + self.mantissa_bits

  @property
  def is_signed(self) -> bool:
    return self.signed

  @property
  def emin(self) -> int:
    """Exponent of the smallest normal number."""
    return 1 - self.bias if self.zero else -self.bias

  @property
  def magnitude_mask(self) -> int:
    """All exponent and mantissa bits."""
    return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

  @property
  def code_max(self) -> int:
    """Code of the largest finite number."""
    if self.special == 'ieee':
      return self.magnitude_mask - (1 << self.mantissa_bits)
    return self.magnitude_mask - (self.special == 'fn')

  @property
  def inf_code(self) -> int | None:
    """Code of +Inf, None where there is none."""
    return self.code_max + 1 if self.special == 'ieee' else None

  @property
  def nan_code(self) -> int | None:
    """Code of the canonical NaN, None where there is none."""
    if self.special == 'fn':
      return self.magnitude_mask
    if self.special == 'fnuz':
      return self.magnitude_mask + 1
    if self.special == 'ieee' and self.mantissa_bits:
      return self.code_max + 1 + (1 << (self.mantissa_bits - 1))
    return None

  @property
  def max(self) -> float:
    return self._decode(self.code_max)

  @property
  def min_normal(self) -> float:
    """Smallest positive normal number."""
    return 2.0**self.emin

  @property
  def min_subnormal(self) -> float:
    """Smallest positive number."""
    return 2.0 ** (self.emin - self.mantissa_bits)

  def _decode(self, magnitude: int) -> float:
    e, m = divmod(magnitude, 1 << self.mantissa_bits)
    if e == 0 and self.zero:
      return math.ldexp(m, self.emin - self.mantissa_bits)
    return math.ldexp(
      m + (1 << self.mantissa_bits), e - self.bias - self.mantissa_bits
    )

  def values(self) -> np.ndarray:
    if self.bits > 8:
      raise ValueError(
        f'{self.name} has 2**{self.bits} codes; decode tables exist for'
        ' formats of at most 8 bits'
      )
    return _float_values(self).copy()


@functools.cache
def _float_values(fmt: FloatFormat) -> np.ndarray:
  magnitudes = np.arange(fmt.magnitude_mask + 1)
  table = np.array([fmt._decode(int(c)) for c in magnitudes])
  if fmt.special == 'ieee':
    table[fmt.code_max + 1 :] = np.nan
    table[fmt.code_max + 1] = np.inf
  elif fmt.special == 'fn':
    table[fmt.code_max + 1 :] = np.nan
  if fmt.signed:
    table = np.concatenate([table, -table])
    if fmt.special == 'fnuz':
      table[fmt.nan_code] = np.nan
  return table


@dataclasses.dataclass(frozen=True)
class IntFormat(ElementFormat):
  """Integers with an implied step of 2**-fraction_bits.

  Signed codes are two's complement. Encoding is symmetric, it produces
  -(2^(b-1) - 1) .. 2^(b-1) - 1; decoding knows every code.

  Attributes:
    width: bits of a code, 1 to 8.
    signed: two's complement if True, else 0 .. 2^b - 1.
    fraction_bits: f; a code k stands for k * 2^-f.
  """

  width: int
  signed: bool = True
  fraction_bits: int = 0

  def __post_init__(self) -> None:
    _check_types(self)
    check_int('width', self.width, 1, 8)
    _require(
      abs(self.fraction_bits) <= 1000,
      f'{self.fraction_bits=} must be in -1000..1000',
    )
    _require(
      not (self.signed and self.width < 2), 'a signed integer needs width >= 2'
    )

  @property
  def bits(self) -> int:
    return self.width

  @property
  def is_signed(self) -> bool:
    return self.signed

  @property
  def step(self) -> float:
    """Distance of neighbouring values."""
    return 2.0**-self.fraction_bits

  @property
  def code_max(self) -> int:
    """Code of the largest value."""
    return (1 << (self.width - self.signed)) - 1

  @property
  def max(self) -> float:
    return self.code_max * self.step

  def values(self) -> np.ndarray:
    codes = np.arange(1 << self.width)
    if self.signed:
      codes = np.where(codes > self.code_max, codes - (1 << self.width), codes)
    return codes * self.step


@dataclasses.dataclass(frozen=True)
class CodebookFormat(ElementFormat):
  """A fixed table of numbers in ascending order; the code is the index."""

  table: tuple[float, ...]

  def __post_init__(self) -> None:
    _check_types(self)
    size = len(self.table)
    _require(
      2 <= size <= 256 and size & (size - 1) == 0,
      f'len(table)={size} must be a power of two in 2..256',
    )
    _require(
      all(a < b for a, b in zip(self.table, self.table[1:], strict=False))
      and all(math.isfinite(v) for v in (self.table[0], self.table[-1])),
      'table must be finite and strictly ascending',
    )

  @property
  def bits(self) -> int:
    return len(self.table).bit_length() - 1

  @property
  def max(self) -> float:
    return max(abs(v) for v in self.table)

  def values(self) -> np.ndarray:
    return np.array(self.table)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
  """Elements in blocks that share a scale: x ~ element * scale * tensor_scale.

  Attributes:
    name: registry name.
    element: format of the elements.
    block: elements per block along each block axis; one entry for blocks along
      one axis, two for tiles. 0 stands for the whole axis.
    scale: format of the block scale, with a NaN; None for no block scale.
      Formats of at most 8 bits are stored as codes, float32, bfloat16 and
      float16 as themselves.
    tensor_scale: whether one float32 scale covers the whole tensor.
    zero_point: whether each block also has an unsigned integer zero point z,
      so that x ~ (element - z) * scale.
    scale_rule: the scale rule used where the caller names none.
    minimum: whether each block also has a minimum m, stored as the scale is, so
      that x ~ element * scale + m. The product is exact where the scale has at
      most 16 bits; of others some processors round it before the sum.
    scale_blocks: for two levels of scales the format in which float32 scales,
      and minima, are quantized in their turn, in blocks along the block axis;
      None for one level.
  """

  name: str
  element: ElementFormat
  block: tuple[int, ...]
  scale: FloatFormat | None
  tensor_scale: bool = False
  zero_point: bool = False
  scale_rule: str = 'absmax'
  minimum: bool = False
  scale_blocks: 'BlockFormat | None' = None

  def __post_init__(self) -> None:
    check_element(self.element)
    if self.scale is not None:
      check_float(self.scale, 'scale')
    if self.scale_blocks is not None:
      check_format(self.scale_blocks, 'scale_blocks')
    _require(
      isinstance(self.block, tuple)
      and 1 <= len(self.block) <= 2
      and all(_is_a(b, int) and b >= 0 for b in self.block),
      f'{self.block=} must be a tuple of one or two sizes, 0 for a whole axis',
    )
    _check_types(self)
    for name in ('zero_point', 'minimum'):
      _require(
        not getattr(self, name)
        or (isinstance(self.element, IntFormat) and not self.element.signed),
        f'{name} needs an unsigned integer element, got {self.element}',
      )
    _require(
      not self.zero_point or self.scale is not None,
      'zero_point needs a block scale',
    )
    _require(
      self.scale is None or self.scale.nan_code is not None,
      f'scale={self.scale} has no NaN, which marks blocks that hold NaN or Inf;'
      " use a format with special='fn' or 'ieee', such as e4m3fn or ue5m3",
    )
    _require(
      not self.minimum
      or (not self.zero_point and not self.tensor_scale and _is_wide(self)),
      'minimum needs float32, bfloat16 or float16 scales, without tensor_scale'
      ' and zero_point',
    )
    _require(
      self.scale_blocks is None
      or (_is_simple(self.scale_blocks) and self._may_have_two_levels()),
      f'scale_blocks={self.scale_blocks} must have blocks along one axis and'
      ' scales that are float32, bfloat16 or float16, and the format itself'
      ' such blocks and scales in float32, without tensor_scale and zero_point',
    )

  def _may_have_two_levels(self) -> bool:
    one_level = dataclasses.replace(self, scale_blocks=None, minimum=False)
    return _is_simple(one_level) and self.scale.bits == 32

  @property
  def is_tile(self) -> bool:
    """Whether a block spans two axes."""
    return len(self.block) == 2

  @property
  def has_exponent_scale(self) -> bool:
    """Whether block scales are powers of two (E8M0)."""
    return self.scale is not None and not self.scale.zero

  @property
  def bits_per_element(self) -> float:
    """Stored bits per element, whole-axis and tensor scales left out."""
    size = math.prod(self.block)
    if self.scale is None or size == 0:
      return float(self.element.bits)
    extra = float(max(self.scale.bits, 8))
    if self.scale_blocks is not None:
      extra = self.scale_blocks.bits_per_element
    extra = extra * (1 + self.minimum) + 8 * self.zero_point
    return self.element.bits + extra / size

  @property
  def one_level(self) -> 'BlockFormat':
    """The format with scales that are not quantized in their turn."""
    return dataclasses.replace(self, scale_blocks=None)

  def __str__(self) -> str:
    return self.name


def _is_wide(fmt: BlockFormat) -> bool:
  """Whether there are block scales that are stored as numbers."""
  return fmt.scale is not None and fmt.scale.bits > 8


def _is_simple(fmt: BlockFormat) -> bool:
  """Whether blocks lie along one axis and have such a scale and no more."""
  parts = fmt.tensor_scale, fmt.zero_point, fmt.minimum, fmt.scale_blocks
  return (
    _is_wide(fmt)
    and not any(parts)
    and len(fmt.block) == 1
    and bool(fmt.block[0])
  )


Format = ElementFormat | BlockFormat


def check_format(fmt: object, name: str = 'fmt') -> BlockFormat:
  """Refuses what is not a block format, with the remedy."""
  if isinstance(fmt, BlockFormat):
    return fmt
  if isinstance(fmt, ElementFormat):
    raise TypeError(
      f'{name}={fmt.name} is an element format without a scale; use'
      f' round_to(x, {fmt.name}), or a block format such as'
      f' formats.per_tensor({fmt.name})'
    )
  raise TypeError(
    f'{name}={fmt!r} must be a block format, a value such as'
    " lowbit_jax.formats.mxfp4 or lowbit_jax.formats.get('mxfp4')"
  )


def check_element(element: object, name: str = 'element') -> ElementFormat:
  """Refuses what is not an element format, with the remedy."""
  if isinstance(element, ElementFormat):
    return element
  raise TypeError(
    f'{name}={element!r} must be an element format, a value such as'
    " lowbit_jax.formats.e4m3fn or lowbit_jax.formats.get('e4m3fn'); block"
    ' formats go to quantize and fake_quant'
  )


def check_float(element: object, name: str) -> FloatFormat:
  """Refuses what is not a minifloat, with the remedy."""
  if isinstance(element, FloatFormat):
    return element
  raise TypeError(
    f'{name}={element!r} must be a FloatFormat, a value such as'
    " lowbit_jax.formats.e8m0 or lowbit_jax.formats.get('e8m0')"
  )
