"""L-Mul, products by integer addition: elementwise, matrices, attention.

The arithmetic is that of `lowbit_pallas.arith.lmul`. It is an emulation for the
study of accuracy: on hardware that multiplies it is slower than a product.

The derivative is straight-through, that of the exact product of the operands as
they were given, in float32:

    d lmul(x, y) = dx y + x dy
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit
from lowbit_jax._typing import ArrayLike
from lowbit_jax.formats import FloatFormat, bfloat16, e4m3fn, e5m2, float32
from lowbit_jax.numerics._codec import as_float_array, promoted
from lowbit_jax.ops._softmax import softmax
from lowbit_pallas.arith import lmul as arith

_LAYOUTS = {
  float32: arith.FLOAT32,
  bfloat16: arith.BFLOAT16,
  e4m3fn: arith.E4M3,
  e5m2: arith.E5M2,
}

# Products that a matrix product forms at once, unless its result is larger.
_TILE = 1 << 20


class _Options(NamedTuple):
  """How to multiply; None stands for what the operands say."""

  fmt: FloatFormat | None
  mantissa_bits: int | None
  reading: str

  def for_operands(self, x, y) -> '_Options':
    """Checked and with a format."""
    fmt = self.fmt
    if fmt is None:
      both_narrow = x.dtype == y.dtype == jnp.bfloat16
      fmt = bfloat16 if both_narrow else float32
    if not isinstance(fmt, FloatFormat) or fmt not in _LAYOUTS:
      names = ', '.join(f.name for f in _LAYOUTS)
      raise ValueError(f'fmt={fmt!r} is not one of lowbit_jax.formats {names}')
    most, bits = fmt.mantissa_bits, self.mantissa_bits
    if bits is None:
      bits = most
    elif isinstance(bits, bool) or not isinstance(bits, int):
      raise TypeError(f'mantissa_bits={bits!r} must be an integer or None')
    elif not 1 <= bits <= most:
      raise ValueError(
        f'mantissa_bits={bits} is outside 1 ... {most} of {fmt.name}; name a'
        ' wider fmt'
      )
    if self.reading not in arith.READINGS:
      raise ValueError(f'reading={self.reading!r} is not in {arith.READINGS}')
    return _Options(fmt, bits, self.reading)


def lmul(
  x: ArrayLike,
  y: ArrayLike,
  *,
  fmt: FloatFormat | None = None,
  mantissa_bits: int | None = None,
  reading: str = 'integer',
) -> jax.Array:
  """x * y by one integer addition (L-Mul, Luo & Sun 2024).

  Args:
    x: float32, bfloat16 or float16.
    y: likewise, of a shape that broadcasts with that of `x`.
    fmt: the element format whose codes are added: `formats.float32`,
      `bfloat16`, `e4m3fn` or `e5m2`. Operands are rounded to it, to nearest
      even and saturating; products stay in it, with its range. None for
      bfloat16 if both operands are bfloat16, and float32 otherwise.
    mantissa_bits: round the operands to so many bits first, which also fixes
      the offset; None for all of the format.
    reading: 'integer', where a mantissa carry moves into the exponent, or
      'formula', the published equation as it is written, which is less
      accurate.

  Returns:
    Array in the promoted dtype of the operands. With the integer reading of
    float32 or bfloat16 operands the relative error is at most 7.3 %
    (1 - 2 (32/47)^2), and 3.1 % rms. Numbers below the smallest normal one of
    the format are zero, as operands and as results; results saturate; infinity
    and NaN pass as in a product.

  Raises:
    TypeError, ValueError: for operands and options that do not fit.

  Derivative: forward and reverse mode, of any order, that of the exact x * y.

  Examples:
    >>> import lowbit_jax as lowbit
    >>> import jax.numpy as jnp
    >>> from lowbit_jax.ops import lmul
    >>> float(lmul(jnp.float32(1.5), jnp.float32(1.5)))
    2.125
    >>> float(lmul(jnp.float32(-3), jnp.float32(5)))
    -14.5
  """
  x, y = as_float_array(x, 'x'), as_float_array(y, 'y')
  _checked_broadcast(x.shape, y.shape)
  options = _Options(fmt, mantissa_bits, reading).for_operands(x, y)
  return _compiled_elements(x, y, options)


def lmul_dot(
  x: ArrayLike,
  y: ArrayLike,
  *,
  fmt: FloatFormat | None = None,
  mantissa_bits: int | None = None,
  reading: str = 'integer',
) -> jax.Array:
  """x @ y with `lmul` for every product of elements, summed in float32.

  Never more than max(2^20, size of the result) products exist at once: slabs
  of the contracted axis are summed one after the other, so the memory beyond
  operands and result is at most 4 times so many bytes for every intermediate
  that the compiler does not fuse away.

  Args:
    x: (..., m, k) of float32, bfloat16 or float16.
    y: (..., k, n), with leading axes that broadcast with those of `x`.
    fmt: as in `lmul`; also `mantissa_bits` and `reading`.

  Returns:
    (..., m, n) in the promoted dtype, rounded once.

  Raises:
    TypeError, ValueError: for operands and options that do not fit.

  Derivative: forward and reverse mode, of any order, that of the exact x @ y.
  """
  x, y = as_float_array(x, 'x'), as_float_array(y, 'y')
  _checked_matrices(x.shape, y.shape)
  options = _Options(fmt, mantissa_bits, reading).for_operands(x, y)
  return _compiled_dot(x, y, options)


def lmul_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  mask: ArrayLike | None = None,
  is_causal: bool = False,
  scale: float | None = None,
  fmt: FloatFormat | None = None,
  mantissa_bits: int | None = None,
  reading: str = 'integer',
) -> jax.Array:
  """Attention whose two matrix products are `lmul_dot`.

  softmax(scale * (Q . K^T)) . V with "." by L-Mul; the scale, the softmax and
  all sums are exact up to float32.

  Args:
    query: (batch, time, heads, channels), as in `jax.nn.dot_product_attention`.
    key: (batch, source, heads, channels).
    value: (batch, source, heads, channels of the result).
    mask: bool array that broadcasts to (batch, heads, time, source); false
      leaves an entry out. None for all true.
    is_causal: leave out the entries with source > time.
    scale: of the logits; None for 1 / sqrt(channels).
    fmt: as in `lmul`; also `mantissa_bits` and `reading`.

  Returns:
    (batch, time, heads, channels of the result) in the dtype of `query`.

  Raises:
    TypeError, ValueError: for operands and options that do not fit.

  Derivative: forward and reverse mode, of any order, straight through both
  products.
  """
  query, key, value = (
    as_float_array(a, name)
    for a, name in ((query, 'query'), (key, 'key'), (value, 'value'))
  )
  _checked_attention(query.shape, key.shape, value.shape)
  if fmt is None:
    narrow = all(a.dtype == jnp.bfloat16 for a in (query, key, value))
    fmt = bfloat16 if narrow else float32
  options = {'fmt': fmt, 'mantissa_bits': mantissa_bits, 'reading': reading}
  q, k, v = (
    jnp.swapaxes(a.astype(jnp.float32), 1, 2) for a in (query, key, value)
  )
  if scale is None:
    scale = 1 / math.sqrt(query.shape[-1])
  logits = lmul_dot(q, jnp.swapaxes(k, -1, -2), **options) * scale
  where = _checked_mask(mask, logits.shape)
  if is_causal:
    causal = jnp.tri(*logits.shape[-2:], dtype=bool)
    where = causal if where is None else where & causal
  out = lmul_dot(softmax(logits, where=where), v, **options)
  return jnp.swapaxes(out, 1, 2).astype(query.dtype)


def _codes(x, options: _Options):
  assert options.fmt is not None and options.mantissa_bits is not None
  f = _LAYOUTS[options.fmt]
  codes = arith.to_codes(x.astype(jnp.float32), f)
  return arith.round_mantissa(codes, f, options.mantissa_bits)


def _products(x, y, options: _Options):
  """float32 products of codes."""
  assert options.fmt is not None and options.mantissa_bits is not None
  f, bits = _LAYOUTS[options.fmt], options.mantissa_bits
  offset = 1 << (f.mantissa_bits - arith.offset_bits(bits))
  code = arith.multiply(x, y, f, options.reading, offset)
  return arith.from_codes(code, f)


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(2,))
def _elements(x, y, options: _Options):
  out = _products(_codes(x, options), _codes(y, options), options)
  return out.astype(promoted(x.dtype, y.dtype))


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(2,))
def _dot(x, y, options: _Options):
  dtype = promoted(x.dtype, y.dtype)
  batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
  shape = (*batch, x.shape[-2], y.shape[-1])
  depth = x.shape[-1]
  if depth == 0 or 0 in shape:
    return jnp.zeros(shape, dtype)
  known = math.prod(n for n in shape if isinstance(n, int))
  width = min(max(_TILE // known, 1), depth)
  # Slabs of the contracted axis come first; those of zeros add zeros.
  slabs = -(-depth // width)
  left = _slabs(_codes(jnp.swapaxes(x, -1, -2), options), slabs, width)
  right = _slabs(_codes(y, options), slabs, width)

  def add(total, pair):
    a, b = pair
    products = _products(a[..., :, None], b[..., None, :], options)
    return total + jnp.sum(products, -3), None

  total, _ = lax.scan(add, jnp.zeros(shape, jnp.float32), (left, right))
  return total.astype(dtype)


def _slabs(codes, slabs, width):
  """(..., k, n) codes as (slabs, ..., width, n)."""
  *batch, depth, columns = codes.shape
  padding = [(0, 0)] * len(batch) + [(0, slabs * width - depth), (0, 0)]
  codes = jnp.pad(codes, padding).reshape(*batch, slabs, width, columns)
  return jnp.moveaxis(codes, -3, 0)


def _straight_through(apply, product):
  """The derivative rule of an operation that stands for a product."""

  def rule(options: _Options, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    out = apply(x, y, options)
    x, y, dx, dy = (a.astype(jnp.float32) for a in (x, y, dx, dy))
    return out, (product(dx, y) + product(x, dy)).astype(out.dtype)

  return rule


_elements.defjvp(_straight_through(_elements, jnp.multiply))
_dot.defjvp(
  _straight_through(_dot, functools.partial(jnp.matmul, precision='highest'))
)
_compiled_elements = jax.jit(_elements, static_argnums=2, inline=True)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _compiled_dot(x, y, options: _Options):
  def specs(result, x, y):
    rows, columns = _explicit.parts(x), _explicit.parts(y)
    batch = result.ndim - 2
    longer = rows if x.ndim >= y.ndim else columns
    return PartitionSpec(*longer[:batch], rows[-2], columns[-1])

  run = functools.partial(_dot, options=options)
  return _explicit.automatic(run, specs, x, y)


def _checked_broadcast(x: tuple, y: tuple) -> None:
  try:
    jnp.broadcast_shapes(x, y)
  except ValueError as error:
    raise ValueError(
      f'x.shape={x} and y.shape={y} do not broadcast; add axes of size 1'
    ) from error


def _checked_matrices(x: tuple, y: tuple) -> None:
  if min(len(x), len(y)) < 2 or x[-1] != y[-2]:
    raise ValueError(
      f'x.shape={x} and y.shape={y} must be (..., m, k) and (..., k, n);'
      ' reshape vectors to matrices'
    )
  _checked_broadcast(x[:-2], y[:-2])


def _checked_attention(query: tuple, key: tuple, value: tuple) -> None:
  shapes = f'query.shape={query}, key.shape={key}, value.shape={value}'
  if not len(query) == len(key) == len(value) == 4:
    raise ValueError(
      f'{shapes} must all be (batch, time, heads, channels); add axes of size 1'
    )
  same_sources = key[:3] == value[:3]
  same_heads = (query[0], *query[2:]) == (key[0], *key[2:])
  if not (same_sources and same_heads):
    raise ValueError(
      f'{shapes} must agree in batch and heads, query and key in channels, key'
      ' and value in source; for fewer heads of key and value, repeat them'
    )


def _checked_mask(mask, shape: tuple):
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  if mask.dtype != jnp.bool_:
    raise TypeError(f'mask.dtype={mask.dtype} must be bool; compare it first')
  try:
    return jnp.broadcast_to(mask, shape)
  except ValueError as error:
    raise ValueError(
      f'mask.shape={mask.shape} does not broadcast to (batch, heads, time,'
      f' source)={shape}; add axes of size 1'
    ) from error
