"""Quantizers that block formats cannot express, with their gradients.

Each is a frozen, hashable function `(x, axis=-1, key=None) -> x_hat` of the
shape and dtype of x with a property `needs_key`, so that a `GemmSpec` takes it
in place of a `QuantSpec`. Its derivative is the straight-through rule of its
source, stated with it. Some methods are block formats and need no code: BitNet
b1.58 is `QuantSpec(formats.ternary_tensor)` for weights and
`QuantSpec(formats.int8_channel)` for activations, symmetric INT8 is
`formats.mxint8`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax import (
  _derivative,
  _explicit,
  _quantize as core,
  formats,
  qarray,
)
from lowbit_jax._typing import ArrayLike, Key
from lowbit_jax.numerics import _rounding, _scaling
from lowbit_jax.numerics._codec import as_float_array, round_to
from lowbit_jax.ops import specs
from lowbit_jax.recipe import Quantizer, QuantSpec, check_quantizer
from lowbit_pallas.arith import bits as fb

# The clip c, in units of the standard deviation, of a centred uniform grid of
# 2^b numbers on [-c, c] with the least squared error for a Gaussian, as the
# code of QuEST has it; the exact optima are within 1 %.
GAUSSIAN_CLIPS = {
  1: 0.7978845587140913,
  2: 1.4935346200015913,
  3: 2.051068354131873,
  4: 2.513930578568423,
  5: 2.9160938834961225,
  6: 3.276597282593217,
  7: 3.6010497188221655,
  8: 3.884938678807525,
}
# The same for the largest number of E2M1.
_GAUSSIAN_E2M1 = 2.92247856


@dataclasses.dataclass(frozen=True)
class _Deterministic:
  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return False


@dataclasses.dataclass(frozen=True)
class DoReFaWeight(_Deterministic):
  """DoReFa-Net weights, one scale per tensor.

    x_hat = 2 q(tanh x / (2 max |tanh x|) + 1/2) - 1,
    q(r) = round(r n) / n,  n = 2^bits - 1

  with dq/dr = 1: the gradient passes tanh and the maximum.

  Attributes:
    bits: 1 to 16.
  """

  bits: int

  def __post_init__(self) -> None:
    _check_bits(self.bits)

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    t = jnp.tanh(x)
    top = jnp.max(jnp.abs(t), initial=0)
    r = t / (2 * jnp.where(top > 0, top, 1)) + 0.5
    return (2 * _straight(_uniform(r, self.bits), r) - 1).astype(dtype)


@dataclasses.dataclass(frozen=True)
class DoReFaActivation(_Deterministic):
  """DoReFa-Net activations: x_hat = q(clip(x, 0, 1)).

  dx = g where 0 <= x <= 1, else 0.

  Attributes:
    bits: 1 to 16.
  """

  bits: int

  def __post_init__(self) -> None:
    _check_bits(self.bits)

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    y = _uniform(jnp.clip(x, 0, 1), self.bits)
    return _masked(y, x, (x >= 0) & (x <= 1)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class DoReFaGradient:
  """DoReFa-Net gradients, stochastic, one scale per tensor.

    x_hat = 2 m (q(x / (2 m) + 1/2 + N) - 1/2),  m = max |x|,

  N uniform on (-1/2, 1/2) / (2^bits - 1). Unbiased; dx = g.

  Attributes:
    bits: 1 to 16.
  """

  bits: int

  def __post_init__(self) -> None:
    _check_bits(self.bits)

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return True

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    if key is None:
      raise ValueError('DoReFaGradient needs key=jax.random.key(seed)')
    x, dtype = _widened(x, axis)
    top = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    noise = _rounding.dither(key, x.shape) / (2**self.bits - 1)
    r = x / (2 * jnp.where(top > 0, top, 1)) + 0.5 + noise
    y = 2 * top * (_uniform(jnp.clip(r, 0, 1), self.bits) - 0.5)
    return _straight(y, x).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Sign(_Deterministic):
  """One bit: x_hat = alpha sign(x), with sign(0) = 1.

  BinaryConnect has alpha = 1 and dx = g where |x| <= 1, else 0. XNOR-Net has
  alpha = mean |x| along `axis`, for a weight the n inputs of an output, and
  dx_i = g_i (1 / n + alpha [|x_i| <= 1]).

  Attributes:
    scale: 'one' or 'mean'.
  """

  scale: str = 'one'

  def __post_init__(self) -> None:
    if self.scale not in ('one', 'mean'):
      raise ValueError(f"scale={self.scale!r} is not one of ('one', 'mean')")

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    # NaN is neither, and stays.
    sign = jnp.where(x >= 0, jnp.float32(1), jnp.where(x < 0, -1, x))
    inside = jnp.abs(x) <= 1
    if self.scale == 'one':
      return _masked(sign, x, inside).astype(dtype)
    axis = qarray.check_axis(axis, x.ndim)
    alpha = jnp.mean(jnp.abs(x), axis=axis, keepdims=True)
    slope = 1 / max(x.shape[axis], 1) + jnp.where(inside, alpha, 0)
    return _with_slope(alpha * sign, x, slope).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Quartet(_Deterministic):
  """The forward quantizer of Quartet: E2M1 with a scale fitted to a Gaussian.

    s = 2^floor(log2(2.92247856 / 6 std + 1e-8)),  x_hat = s e2m1(x / s),

  std over a block about its mean. dx = g where |x| < 6 s, else 0. The source
  rotates both operands by a Hadamard matrix of the block, `GemmSpec.hadamard`.

  Attributes:
    block: elements that share a scale; it divides the axis.
  """

  block: int = 32

  def __post_init__(self) -> None:
    if not isinstance(self.block, int) or self.block < 1:
      raise ValueError(f'block={self.block!r} must be a positive int')

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    axis = qarray.check_axis(axis, x.ndim)
    n = x.shape[axis]
    if n % self.block:
      raise ValueError(
        f'block={self.block} does not divide axis {axis} of x.shape={x.shape};'
        ' pad it'
      )
    shape = (*x.shape[:axis], n // self.block, self.block, *x.shape[axis + 1 :])
    view = x.reshape(shape)
    std = jnp.std(view, axis=axis + 1, keepdims=True)
    target = std * jnp.float32(_GAUSSIAN_E2M1 / 6) + jnp.float32(1e-8)
    # The exponent field alone is 2^floor(log2 .).
    s = lax.stop_gradient(fb.from_bits(fb.to_bits(target) & fb.INF))
    v = view * _scaling.reciprocal(s)
    y = round_to(v, formats.e2m1) * s
    y = _masked(y, view, jnp.abs(v) < 6)
    return y.reshape(x.shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Quest(_Deterministic):
  """QuEST: a centred uniform grid fitted to a Gaussian, with a trust mask.

  With r the root mean square along `axis` and c_b of `GAUSSIAN_CLIPS`,

    c = c_b r + 1e-8,  step = 2 c / (2^b - 1),
    x_hat = step (round(clip(x, -c, c) / step + 1/2) - 1/2)

  and dx = g where |x_hat - x| <= trust r, else 0. The source rotates operands
  first by a Hadamard matrix of 128, `GemmSpec.hadamard`.

  Attributes:
    bits: b, 1 to 8.
    trust: None for c_b / (2^b - 1), half a step: no gradient where x is clipped
      by more than the error of rounding.
  """

  bits: int = 4
  trust: float | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.bits, int) or self.bits not in GAUSSIAN_CLIPS:
      raise ValueError(f'bits={self.bits!r} must be an int in 1..8')
    if self.trust is not None and not self.trust > 0:
      raise ValueError(f'trust={self.trust!r} must be positive or None')

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    axis = qarray.check_axis(axis, x.ndim)
    clip, steps = GAUSSIAN_CLIPS[self.bits], 2**self.bits - 1
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True))
    rms = lax.stop_gradient(rms)
    c = clip * rms + jnp.float32(1e-8)
    step = 2 * c / steps
    y = step * (jnp.round(jnp.clip(x, -c, c) / step + 0.5) - 0.5)
    trust = clip / steps if self.trust is None else self.trust
    return _masked(y, x, jnp.abs(y - x) <= trust * rms).astype(dtype)


@dataclasses.dataclass(frozen=True)
class OutlierCompensated:
  """OCC: adds what clipping removes, in high precision.

    x_hat = inner(c) + (x - c),  c = clip(x, -t, t)

  with t the quantile of |x| over the tensor. The residual x - c is sparse, in
  hardware a second, sparse product. dx is that of `inner` where |x| <= t, and g
  beyond.

  Attributes:
    inner: a `QuantSpec` or a quantizer.
    quantile: of |x|, in (0, 1].
  """

  inner: QuantSpec | Quantizer
  quantile: float = 0.99

  def __post_init__(self) -> None:
    check_quantizer('inner', self.inner)
    if self.inner is None:
      raise TypeError('inner=None quantizes nothing; give a QuantSpec')
    if not 0 < self.quantile <= 1:
      raise ValueError(f'quantile={self.quantile!r} must be in (0, 1]')

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return self.inner.needs_key

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    x, dtype = _widened(x, axis)
    if x.size == 0:  # nothing has no quantile
      return apply(self.inner, x, axis, key).astype(dtype)
    t = _explicit.automatic(self._threshold, _explicit.of_scalar, x)
    t = lax.stop_gradient(t)
    outside = jnp.abs(x) > t
    clamped = jnp.where(outside, lax.stop_gradient(jnp.sign(x) * t), x)
    y = apply(self.inner, clamped, axis, key)
    return (y + jnp.where(outside, x - clamped, 0)).astype(dtype)

  def _threshold(self, x) -> jax.Array:
    return jnp.quantile(jnp.abs(x), jnp.float32(self.quantile))


@dataclasses.dataclass(frozen=True)
class _PerRow(_Deterministic):
  """A quantizer with one more number per row than its block format."""

  inner: QuantSpec

  def __post_init__(self):
    spec = self.inner
    if not isinstance(spec, QuantSpec):
      raise TypeError(f'inner={spec!r} must be a QuantSpec')
    plain = spec.rounding == 'nearest_even' and spec.backward == 'identity'
    if not plain or spec.fmt.is_tile or spec.prescale != 1:
      raise ValueError(
        f'inner={spec} must round to nearest with backward="identity", no'
        ' prescale, and blocks along one axis'
      )

  @property
  def is_straight_through(self) -> bool:
    """Whether its derivative is the identity, so that none is taken."""
    return True


@dataclasses.dataclass(frozen=True)
class RowScaled(_PerRow):
  """A block format with one more scale c for each row, by least squares.

    x_hat = q(c x) / c,  c = 2^(i / candidates),  0 <= i < candidates

  with q to nearest and i the one of the least squared error along `axis`. Where
  the scales of blocks are powers of two, c decides where in its binade the row
  lies. Codes and block scales are those of the format; c does not vary along
  the axis that a product reduces, so that its inverse multiplies the result.
  dx = g.

  Attributes:
    inner: a `QuantSpec` that rounds to nearest, straight through.
    candidates: values of c within a factor of two.
  """

  candidates: int = 4

  def __post_init__(self) -> None:
    super().__post_init__()
    if not isinstance(self.candidates, int) or self.candidates < 2:
      raise ValueError(f'candidates={self.candidates!r} must be an int above 1')

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    t = lax.stop_gradient(x)
    best, least = jnp.float32(1), jnp.float32(jnp.inf)
    for i in range(self.candidates):
      c = jnp.float32(2.0 ** (i / self.candidates))
      error = core.sum_of_squares(self._rounded(t, c, axis) - t, axis)
      best = jnp.where(least <= error, best, c)
      least = jnp.minimum(error, least)
    return _straight(self._rounded(t, best, axis), x).astype(dtype)

  def _rounded(self, x, c, axis: int):
    return apply(self.inner, x * c, axis) * (1 / c)


@dataclasses.dataclass(frozen=True)
class Eden(_PerRow):
  """A block format with a factor for each row in place of stochastic rounding.

    x_hat = q(x) |x|^2 / <x, q(x)>

  with q to nearest and sums along `axis`. The error is then orthogonal to x:
  what nearest rounding shrinks is given back. After a random rotation,
  `GemmSpec.signs='per_call'`, nothing but noise around zero remains, less than
  half of that of stochastic rounding (EDEN, 2022; Quartet II, 2026, has the
  factor in the scales of blocks). In blocks the rotation is not uniform and a
  small bias is left: below 0.1 % of the norm of Gaussian rows behind rotations
  of 32, 1.4 % for cubes of Gaussians. The factor does not vary along the axis
  that a product reduces and can multiply its result. dx = g.

  Attributes:
    inner: a `QuantSpec` that rounds to nearest, straight through.
  """

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    del key
    x, dtype = _widened(x, axis)
    t = lax.stop_gradient(x)
    y = apply(self.inner, t, axis)
    top = jnp.max(jnp.abs(t), axis=axis, keepdims=True, initial=0)
    # A power of two keeps squares of small gradients from underflow.
    unit = _scaling.reciprocal(fb.from_bits(fb.to_bits(top) & fb.INF))
    u, v = t * unit, y * unit
    along = jnp.sum(u * v, axis=axis, keepdims=True)
    whole = core.sum_of_squares(u, axis)
    factor = jnp.where(along > 0, whole / jnp.where(along > 0, along, 1), 1)
    return _straight(y * factor, x).astype(dtype)


@dataclasses.dataclass(frozen=True)
class FixedPoint:
  """Fixed point without a scale: multiples of 2^-f on [-2^(i-1), 2^(i-1) -
  2^-f].

  dx = g inside the range, 0 where x saturated.

  Attributes:
    integer_bits: i, with the sign.
    fraction_bits: f; i + f is at most 24, so that float32 holds the lattice.
    rounding: 'nearest_even' or 'stochastic', which is unbiased.
  """

  integer_bits: int
  fraction_bits: int
  rounding: str = 'stochastic'

  def __post_init__(self) -> None:
    for name in ('integer_bits', 'fraction_bits'):
      if not isinstance(getattr(self, name), int):
        raise TypeError(f'{name}={getattr(self, name)!r} must be an int')
    if not 1 <= self.integer_bits + self.fraction_bits <= 24:
      raise ValueError(
        f'{self.integer_bits=} and {self.fraction_bits=} must add up to 1..24'
      )
    if self.rounding not in ('nearest_even', 'stochastic'):
      raise ValueError(
        f"rounding={self.rounding!r} is not one of ('nearest_even',"
        " 'stochastic')"
      )

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return self.rounding == 'stochastic'

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    x, dtype = _widened(x, axis)
    random = None
    if self.needs_key:
      if key is None:
        raise ValueError("rounding='stochastic' needs key=jax.random.key(seed)")
      random = _rounding.random_words(key, x.shape)
    top = 2.0 ** (self.integer_bits - 1)
    step = 2.0**-self.fraction_bits
    clipped = jnp.clip(x, -top, top - step)
    k = _rounding.rule(self.rounding, random)(clipped / step)
    return _masked(k * step, x, (x >= -top) & (x <= top - step)).astype(dtype)


def apply(
  quantizer: QuantSpec | Quantizer | None,
  x: jax.Array,
  axis: int = -1,
  key: Key | None = None,
) -> jax.Array:
  """The values that an operand of a product has after quantization.

  Args:
    quantizer: None, a `QuantSpec`, or a function of (x, axis, key).
    x: float16, bfloat16 or float32; of two axes for tiles.
    axis: the axis along which blocks lie.
    key: a JAX random key, if the quantizer needs one.

  Returns:
    An array of the shape and dtype of x, a prescale undone, with the derivative
    of the quantizer.
  """
  if quantizer is None:
    return x
  if not isinstance(quantizer, QuantSpec):
    if not callable(quantizer):
      check_quantizer('quantizer', quantizer)
    return quantizer(x, axis, key)
  spec, x = quantizer, as_float_array(x)
  specs.check_stateless('quantizer', spec)
  axes = qarray.check_axis(axis, x.ndim)
  if spec.fmt.is_tile:
    if x.ndim != 2:
      raise ValueError(f'{spec.fmt} needs a matrix, not x.shape={x.shape}')
    axes = (axes, 1 - axes)
  return specs.fake_quant(x, spec, axes, key=key)


def _widened(x, axis):
  x = as_float_array(x)
  if x.ndim:  # a number has no axis, and needs none
    qarray.check_axis(axis, x.ndim)
  return x.astype(jnp.float32), x.dtype


def _uniform(r, bits: int):
  n = 2**bits - 1
  return jnp.round(r * n) / n


def _straight(y, x):
  """The value y with the derivative of x."""
  return _with_slope(y, x, jnp.ones_like(x))


def _masked(y, x, mask):
  """The value y with the derivative of x where `mask`, 0 elsewhere."""
  return _with_slope(y, x, mask.astype(jnp.float32))


@_derivative.custom_jvp
def _with_slope(y, x, slope):
  """The value y with the derivative `slope` with respect to x, all float32."""
  del x, slope
  return y


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
  y, x, slope = primals
  return _with_slope(y, x, slope), jnp.where(slope == 0, 0, tangents[1] * slope)


def _check_bits(bits: int) -> None:
  if not isinstance(bits, int) or not 1 <= bits <= 16:
    raise ValueError(f'bits={bits!r} must be an int in 1..16')
