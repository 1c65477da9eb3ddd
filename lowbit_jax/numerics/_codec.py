"""Element codes of arrays: encode, decode, and rounding to a format."""

import functools
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax._typing import ArrayLike, DTypeLike, Key, Origin
from lowbit_jax.formats import (
  BlockFormat,
  CodebookFormat,
  ElementFormat,
  FloatFormat,
  IntFormat,
  _types,
)
from lowbit_jax.numerics import _rounding
from lowbit_pallas.arith import block, codec
from lowbit_pallas.arith.codec import RANDOM_BITS

FLOAT_DTYPES = ('float16', 'bfloat16', 'float32')
OVERFLOWS = ('saturate', 'special')


def as_float_array(x: ArrayLike, name: str = 'x') -> jax.Array:
  """`x` as a JAX array of float16, bfloat16 or float32.

  Raises:
    TypeError: for other dtypes and for what is no array.
  """
  try:
    x = jnp.asarray(x)
  except (TypeError, ValueError, OverflowError) as error:
    raise TypeError(
      f'{name} must be an array of {", ".join(FLOAT_DTYPES)}, got'
      f' {type(x).__name__}'
    ) from error
  if x.dtype.name not in FLOAT_DTYPES:
    raise TypeError(
      f'{name} has dtype {x.dtype}; quantization takes'
      f' {", ".join(FLOAT_DTYPES)}: cast it with {name}.astype(jnp.float32)'
    )
  return x


def promoted(x: DTypeLike, y: DTypeLike) -> np.dtype:
  """The promoted dtype, also where JAX is told to promote nothing."""
  with jax.numpy_dtype_promotion('standard'):
    return jnp.promote_types(x, y)


def as_dtype(dtype: DTypeLike, name: str = 'dtype') -> np.dtype:
  """A dtype, or an error that says which argument is none."""
  # NumPy takes None for float64, and an array for its dtype.
  if not isinstance(dtype, jax.Array | np.ndarray | None):
    try:
      return np.dtype(dtype)
    except (TypeError, ValueError):
      pass
  raise TypeError(f'{name}={dtype!r} must be a dtype, such as jnp.float32')


def check_element(element: object) -> ElementFormat:
  """Refuses what is not an element format of at most 8 bits."""
  element = _types.check_element(element)
  if element.bits > 8:
    raise ValueError(f'{element.name} has more than 8 bits; use x.astype')
  return element


@overload
def spec(element: FloatFormat) -> codec.Float: ...
@overload
def spec(element: ElementFormat) -> codec.Element: ...
@functools.cache
def spec(element: ElementFormat) -> codec.Element:
  """The static description that the arithmetic layer takes."""
  if isinstance(element, FloatFormat):
    return codec.Float(
      exponent_bits=element.exponent_bits,
      mantissa_bits=element.mantissa_bits,
      emin=element.emin,
      code_max=element.code_max,
      inf_code=element.inf_code,
      nan_code=element.nan_code,
      signed=element.signed,
      subnormals=element.zero,
      negative_zero=element.special != 'fnuz',
    )
  if isinstance(element, IntFormat):
    return codec.Int(element.width, element.signed, element.fraction_bits)
  if isinstance(element, CodebookFormat):
    return codec.Codebook(element.table)
  raise TypeError(f'unknown element format {element!r}')


def blocked(fmt: BlockFormat) -> block.Blocked:
  """The static description of a one-axis block format that kernels take."""
  scale = fmt.scale
  return block.Blocked(
    element=spec(fmt.element),
    bits=fmt.element.bits,
    block=fmt.block[0] if scale is not None else 0,
    scale=spec(scale) if scale is not None and scale.bits <= 8 else None,
  )


def encode(
  x: ArrayLike,
  element: ElementFormat,
  *,
  rounding: str = 'nearest_even',
  overflow: str = 'saturate',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
  origin: Origin | None = None,
) -> jax.Array:
  """Element codes of `x`, without any scale.

  Args:
    x: float16, bfloat16 or float32 of any shape.
    element: the format.
    rounding: 'nearest_even' (ties to the even code), 'toward_zero',
      'stochastic' or, for integers, 'dithered'.
    overflow: 'saturate' gives the largest finite number beyond the range, for
      Inf too. 'special' gives the format's Inf, or NaN where it has no Inf, as
      ml_dtypes casts do.
    key: PRNG key for 'stochastic' and 'dithered'.
    random_bits: random bits per element for 'stochastic', 1 to 23.
    origin: see `random_words`.

  Returns:
    uint8 codes of the shape of `x`. NaN becomes the NaN code, or the code of
    zero in formats without NaN.
  """
  x = as_float_array(x).astype(jnp.float32)
  check_element(element)
  _rounding.check_rounding(rounding, key, random_bits)
  if overflow not in OVERFLOWS:
    raise ValueError(f'overflow={overflow!r} is not one of {OVERFLOWS}')
  special = isinstance(element, FloatFormat) and (
    element.inf_code is not None or element.nan_code is not None
  )
  if overflow == 'special' and not special:
    raise ValueError(
      f"overflow='special' needs an Inf or NaN code, which {element.name} does"
      " not have; use overflow='saturate'"
    )
  random = None
  if rounding == 'stochastic':
    assert key is not None
    random = _rounding.random_words(key, x.shape, origin)
  if rounding == 'dithered':
    x = x + _dither_offset(element, key, x.shape, origin)
  rule = _rounding.rule(rounding, random, random_bits)
  return codec.encode(x, spec(element), rule, saturate=overflow == 'saturate')


def decode(
  codes: ArrayLike, element: ElementFormat, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Values of element codes.

  Args:
    codes: integer codes, one element each (see `unpack`).
    element: the format.
    dtype: dtype of the result.
  """
  check_element(element)
  dtype = as_dtype(dtype)
  codes = jnp.asarray(codes)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise TypeError(f'codes has dtype {codes.dtype}; codes are integers')
  return codec.decode(codes, spec(element)).astype(dtype)


def round_to(
  x: ArrayLike,
  element: ElementFormat,
  *,
  rounding: str = 'nearest_even',
  overflow: str = 'saturate',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
  origin: Origin | None = None,
) -> jax.Array:
  """The nearest number of the format, as a value.

  Takes the arguments of `encode` and returns the dtype of `x`; NaN stays NaN.
  A format whose numbers exceed the dtype (e5m2 in none of them, e8m0 in
  float16) follows that dtype's own overflow. The derivative is zero almost
  everywhere; `fake_quant` is the straight-through version.
  """
  x = as_float_array(x)
  codes = encode(
    x,
    element,
    rounding=rounding,
    overflow=overflow,
    key=key,
    random_bits=random_bits,
    origin=origin,
  )
  values = decode(codes, element)
  if rounding == 'dithered':
    values = values - _dither_offset(element, key, x.shape, origin)
  return jnp.where(jnp.isnan(x), x, values.astype(x.dtype))


def _dither_offset(element: ElementFormat, key, shape, origin) -> jax.Array:
  return _rounding.dither(key, shape, origin) * dither_step(element)


def dither_step(element: ElementFormat) -> float:
  """The uniform step that subtractive dithering spans."""
  if not isinstance(element, IntFormat):
    raise ValueError(
      f"rounding='dithered' needs a uniform grid, which {element.name} is not;"
      " use 'stochastic'"
    )
  return element.step
