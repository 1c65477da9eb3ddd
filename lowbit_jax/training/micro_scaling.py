"""MicroScaling: every choice of a block-scaled 4-bit quantizer, in float32.

For studies of how to train in 4 bits. A block x has the statistic Z(x), its
largest magnitude or a smooth version of it, and Q rounds to an element format
with the largest number F. With the exact scale S = Z / F,

  f_j = S_d Q(v_j),   v_j = x_j / S_p,

where S_d decodes and S_p quantizes. Both are the stored scale, but with
payload='unrounded' S_p is S. Stored is u_q = q(u), where q rounds to the scale
format, in one of two forms; t is the tensor scale, or 1:

  decode   u = S / t,   S_d = t u_q
  encode   u = t / S,   S_d = t / u_q

The encode form stores the multiplier s = 1 / S, as the study below does;
hardware stores the decode form. The tensor scale t = g / (F T), with g the
largest Z, gives the block of g the code u = T in the decode form and 1 / T in
the encode form. T is the largest number of the scale format, or 1 where the
format has the exponent range of float32. The forms differ most there: in E4M3
1 / 448 is a subnormal of one bit, so the largest blocks get the worst scales.

Derivative, for a cotangent g_j of f_j. Q' and q' are surrogates for the
derivatives of the rounders, zero almost everywhere:

  dx_i = g_i Q'(v_i) S_d / S_p + (dL/dS / F) dZ/dx_i + dL/dt dt/dx_i

  dL/dS = D sum_j g_j Q(v_j) - P (S_d / S_p) sum_j g_j v_j Q'(v_j)
  D = dS_d/dS = q'(u)   decode,   q'(u) (S_d / S)^2   encode
  P = dS_p/dS = D, or 1 for payload='unrounded'

  dL/dt = sum over blocks of dS_d/dt (sum_j g_j Q(v_j) - sum_j g_j v_j Q'(v_j)),
          the second sum without its part for payload='unrounded'
  dS_d/dt = u_q - q'(u) u   decode,   (1 - q'(u) u / u_q) / u_q   encode

For S_p = S_d and s_q = 1 / S_d this is, in either form, the published

  df_j/dx_i = delta_ij Q'(s_q x_j)
              + (ds_q/dx_i) (s_q x_j Q'(s_q x_j) - Q(s_q x_j)) / s_q^2.

Q' = q' = 1 and Z = |x_k| give the absmax-aware straight-through estimator, with
exact scales dx_k = g_k + (sign(x_k) / F) sum_j g_j (Q(v_j) - v_j) and
dx_i = g_i elsewhere; dZ = 0 gives the plain one, dx = g. The plain one has
derivatives of any order, all others raise at the second.

Surrogates are in `lowbit_jax.training.surrogates`.

Sources: "Elucidating the Design Space of FP4 training" (2025), whose option
names are kept except that its 'ste' is 'identity' for rounders and 'ignore' for
statistics, and its 'rne' is 'nearest_even'; NVIDIA, "Pretraining LLMs with
NVFP4" (2025), for the decode form.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import _derivative, _quantize as core, formats, qarray
from lowbit_jax._typing import ArrayLike, Key
from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.numerics import _rounding, _scaling
from lowbit_jax.numerics._codec import as_float_array, spec
from lowbit_jax.ops._fake_quant import differentiable_once
from lowbit_jax.training.surrogates import (
  SURROGATES as SURROGATES,
  Dge as Dge,
  Identity as Identity,
  Lattice as Lattice,
  Sigmoid as Sigmoid,
  Spline as Spline,
  Surrogate as Surrogate,
  surrogate,
)
from lowbit_pallas.arith import bits as fb, codec

ue8m3 = FloatFormat('ue8m3', 8, 3, 127, 'ieee', signed=False)

# The scale formats of the study, by its names. `ideal` scales are not rounded.
SCALES = {
  'E8M0': formats.e8m0,
  'E4M3': formats.e4m3fn,
  'E5M2': formats.e5m2,
  'UE5M3': formats.ue5m3,
  'E8M3': ue8m3,
  'BF16': formats.bfloat16,
  'ideal': formats.float32,
}
SCALE_ROUNDINGS = ('nearest_even', 'up', 'down', 'zero', 'stochastic')
SCALE_FORMS = ('decode', 'encode')
ZERO_SCALES = ('nearest_subnormal', 'to_one')
PAYLOADS = ('rounded', 'unrounded')
TENSOR_SCALES = ('off', 'current')
TENSOR_SCALE_GRADS = ('ignore', 'absmax', 'full')
ROUNDINGS = ('nearest_even', 'stochastic')
STAT_GRADS = ('ignore', 'absmax', 'hardsoftmax', 'softsoftmax')

# Of 1 / S in the encode form, so that S is no less than the smallest scale.
_TOP = 1 / _scaling.SMALLEST


@dataclasses.dataclass(frozen=True)
class MicroScaling:
  """A quantizer `(x, axis, key=None) -> x_hat` with every choice open.

  The defaults are NVFP4, bit for bit but for blocks whose scale rounds to 0,
  which NVFP4 makes zero. Combinations in which an option would do nothing are
  refused.

  Attributes:
    element: format of the elements, a `FloatFormat`.
    block: elements that share a scale, or (b, b) for tiles.
    scale: format of the scales, a value such as those of `SCALES`; its sign is
      not used, and numbers below 2^-126 do not exist.
    scale_form: 'decode' stores Z / F, 'encode' its inverse.
    scale_round: rounding of the number that is stored: 'nearest_even', 'up',
      'down', 'zero' (down, as scales are positive) or 'stochastic'.
    zero_scale: what a scale becomes that rounds to 0.
    payload: whether elements are rounded in units of the stored scale or of
      the exact one.
    tensor_scale: 'current' for scales relative to the largest one.
    tensor_scale_grad: gradient of the tensor scale, which goes to the largest
      magnitude of the tensor. 'ignore' for none, 'absmax' with q' = 1, 'full'
      with that of `scale_grad`.
    rounding: of elements, 'nearest_even' or 'stochastic'.
    step_grad: Q', a surrogate or its name with default parameters: 'identity',
      'dge', 'spline' or 'sigmoid'. Beyond the largest element it is that at the
      largest element.
    stat_grad: dZ/dx. 'ignore' is 0; 'absmax' is sign(x) at the maximum, shared
      by ties; 'hardsoftmax' is softmax(alpha |x|) sign(x). 'softsoftmax' is the
      same and the derivative of Z = logsumexp(alpha |x|) / alpha, which it also
      uses for Z.
    scale_grad: q', as `step_grad`, on the lattice of scales.
    alpha: sharpness of the two softmax choices, in units of 1 / x.
    allow_underflow: accept scales of at most 4 exponent bits without a tensor
      scale. They reach down to 2^-9: blocks below that are lost.
  """

  element: FloatFormat = formats.e2m1
  block: int | tuple[int, int] = 16
  scale: FloatFormat = formats.e4m3fn
  scale_form: str = 'decode'
  scale_round: str = 'nearest_even'
  zero_scale: str = 'nearest_subnormal'
  payload: str = 'rounded'
  tensor_scale: str = 'current'
  tensor_scale_grad: str = 'ignore'
  rounding: str = 'nearest_even'
  step_grad: Surrogate | str = 'identity'
  stat_grad: str = 'ignore'
  scale_grad: Surrogate | str = 'identity'
  alpha: float = 1.0
  allow_underflow: bool = False

  def __post_init__(self) -> None:
    for name in ('element', 'scale'):
      if not isinstance(getattr(self, name), FloatFormat):
        raise TypeError(
          f'{name}={getattr(self, name)!r} must be a FloatFormat, a value such'
          ' as lowbit_jax.formats.e2m1'
        )
    if self.element.bits > 8 or not (self.element.zero and self.element.signed):
      raise ValueError(
        f'element={self.element} must have a sign, a zero and at most 8 bits'
      )
    sizes = self.block if isinstance(self.block, tuple) else (self.block,)
    if len(sizes) > 2 or not all(isinstance(b, int) and b > 0 for b in sizes):
      raise ValueError(
        f'block={self.block!r} must be a positive int, or two for tiles'
      )
    for name, allowed in (
      ('scale_form', SCALE_FORMS),
      ('scale_round', SCALE_ROUNDINGS),
      ('zero_scale', ZERO_SCALES),
      ('payload', PAYLOADS),
      ('tensor_scale', TENSOR_SCALES),
      ('tensor_scale_grad', TENSOR_SCALE_GRADS),
      ('rounding', ROUNDINGS),
      ('stat_grad', STAT_GRADS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not one of {allowed}'
        )
    for name in ('step_grad', 'scale_grad'):
      object.__setattr__(self, name, surrogate(name, getattr(self, name)))
    if not self.alpha > 0:
      raise ValueError(f'alpha={self.alpha!r} must be positive')
    self._check_combination()

  def _check_combination(self) -> None:
    """Refuses options that would do nothing, and scales that lose blocks."""
    if self.tensor_scale == 'off':
      self._check_without_tensor_scale()
    follows_maximum = self.stat_grad in ('ignore', 'absmax')
    if self.tensor_scale_grad != 'ignore' and not follows_maximum:
      raise ValueError(
        f'tensor_scale_grad={self.tensor_scale_grad!r} follows the largest'
        f' magnitude, stat_grad={self.stat_grad!r} does not: use'
        " tensor_scale_grad='ignore'"
      )
    unrounded = self.scale == formats.float32
    if unrounded:
      self._check_without_rounded_scales()
    if (unrounded or not self.scale.zero) and self.zero_scale == 'to_one':
      raise ValueError(
        f"zero_scale='to_one' has no effect: no scale rounds to 0 in"
        f' {self.scale}'
      )
    used = self.stat_grad != 'ignore' or self.tensor_scale_grad == 'full'
    if self.scale_grad != Identity() and not used:
      raise ValueError(
        f'scale_grad={self.scale_grad} has no effect where scales have no'
        " gradient: choose a stat_grad other than 'ignore'"
      )

  def _check_without_tensor_scale(self) -> None:
    narrow = self.scale.zero and self.scale.exponent_bits <= 4
    if narrow and not self.allow_underflow:
      raise ValueError(
        f'scale={self.scale} without a tensor scale reaches down to'
        f' {self.scale.min_subnormal:.2g} only, below which blocks become'
        " zero: use tensor_scale='current', a scale of more range (ue5m3,"
        ' e8m0), or allow_underflow=True to study that'
      )
    if self.tensor_scale_grad != 'ignore':
      raise ValueError(
        f'tensor_scale_grad={self.tensor_scale_grad!r} needs'
        " tensor_scale='current'"
      )

  def _check_without_rounded_scales(self) -> None:
    for name, value in (
      ('scale_round', 'nearest_even'),
      ('payload', 'rounded'),
      ('tensor_scale', 'off'),
      ('scale_grad', Identity()),
    ):
      if getattr(self, name) != value:
        raise ValueError(
          f'{name}={getattr(self, name)!r} has no effect on scales that are'
          f' not rounded: leave it at {value!r}'
        )

  @property
  def needs_key(self) -> bool:
    """Whether the rounding draws random bits."""
    return 'stochastic' in (self.rounding, self.scale_round)

  def __call__(
    self, x: ArrayLike, axis: int = -1, key: Key | None = None
  ) -> jax.Array:
    """The quantized values of `x` in its shape and dtype.

    Args:
      x: float16, bfloat16 or float32 of any rank but 0.
      axis: the block axis; tiles take it and the other of the last two. Sizes
        that blocks do not divide are padded with zeros inside.
      key: a JAX random key; without `needs_key` it is not used.

    Returns:
      Values; a block that holds Inf or NaN is NaN.

    Raises:
      TypeError, ValueError: for dtypes, axes and keys that do not fit.

    The derivative is stated in `lowbit_jax.training.micro_scaling`, in forward
    and reverse mode. With the defaults, straight through, it is of any order;
    where slopes depend on x, second derivatives raise NotImplementedError.
    """
    if self.needs_key and key is None:
      raise ValueError(f'{self.rounding=} needs key=jax.random.key(seed)')
    key = key if self.needs_key else None
    x = core.check_array(as_float_array(x), self._format)
    block_axis = axis
    if isinstance(self.block, tuple):
      block_axis = _tile_axes(axis, x.ndim)
    axes = qarray.block_axes(self._format, block_axis, x.ndim)
    return _compiled(x, key, self, axes)

  @property
  def _slopes(self) -> tuple[Surrogate, Surrogate]:
    """Q' and q'."""
    return (
      surrogate('step_grad', self.step_grad),
      surrogate('scale_grad', self.scale_grad),
    )

  @property
  def _format(self) -> BlockFormat:
    block = self.block if isinstance(self.block, tuple) else (self.block,)
    # The geometry of blocks; scales are computed here.
    return BlockFormat('micro_scaling', self.element, block, formats.float32)

  @property
  def _target(self) -> float:
    return 1.0 if self.scale.exponent_bits >= 8 else self.scale.max

  @property
  def _scale_has_gradient(self) -> bool:
    return self.stat_grad != 'ignore' or self.tensor_scale_grad != 'ignore'

  @property
  def _is_plain(self) -> bool:
    return (
      self.step_grad == Identity()
      and self.payload == 'rounded'
      and not self._scale_has_gradient
    )


class _Scales(NamedTuple):
  """Scales of blocks, in the axes of the view of blocks."""

  exact: Any  # S
  u: Any
  u_q: Any
  decode: Any  # S_d
  payload: Any  # S_p
  inverse: Any  # 1 / S_p, with the roundings of the form


class _Forward(NamedTuple):
  """What the derivative needs, in the axes of the view of blocks."""

  x: Any
  v: Any  # x / S_p
  q: Any  # Q(v)
  scales: _Scales


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(2, 3))
def _quantize(x, key, quantizer: MicroScaling, axes):
  return _run(x, key, quantizer, axes)[0]


@_quantize.defjvp
def _quantize_jvp(quantizer: MicroScaling, axes, primals, tangents):
  x, key = primals
  dx = tangents[0]
  if quantizer._is_plain:
    return _quantize(x, key, quantizer, axes), dx
  x = differentiable_once(
    f'{quantizer} has no second derivative: its slopes depend on x; use one'
    " with step_grad=Identity(), payload='rounded', stat_grad='ignore' and"
    " tensor_scale_grad='ignore'",
    x,
  )
  y, saved = _run(x, key, quantizer, axes)

  def push(saved, dx):
    pull = functools.partial(_pulled, quantizer, axes, saved)
    return jax.linear_transpose(pull, dx)(dx)[0]

  # Saved are the values of the forward pass, not what follows from them.
  return y, jax.checkpoint(push, prevent_cse=False)(saved, dx)


def _run(x, key, quantizer: MicroScaling, axes):
  """y, and the values that it was made of."""
  # Blocks that hold Inf or NaN are computed as zeros and become NaN at the end.
  blocks = core.split(x.astype(jnp.float32), quantizer._format, axes)
  bits = _scaling.magnitude_bits(blocks.view)
  amax_bits = _scaling.block_max(bits, blocks.inner)
  bad = amax_bits >= fb.INF
  view = jnp.where(bad, 0, blocks.view)

  # Scales: a statistic per block, exact and stored, relative to that of x.
  z, t = _statistics(view, bits, amax_bits, quantizer, blocks)
  scales = _scales(z, t, key, quantizer)

  # Elements: rounded in units of the scale S_p.
  v = view * scales.inverse
  q = _round_elements(v, key, quantizer, x.shape, axes)

  # The result, in the order of dequantization: element, block scale, tensor
  # scale. Another order would round differently.
  if quantizer.scale_form == 'decode':
    y = q * scales.u_q
    y = y if t is None else y * t
  else:
    y = q * scales.decode
  y = jnp.where(bad, jnp.float32(jnp.nan), y)
  return core.restore(y, blocks, x.dtype), _Forward(view, v, q, scales)


def _statistics(view, bits, amax_bits, quantizer: MicroScaling, blocks):
  """Z of every block, and the tensor scale t or None."""
  # Subnormal maxima count as zero, as everywhere in the library.
  dead = (amax_bits >= fb.INF) | (amax_bits < fb.MIN_NORMAL)
  if quantizer.stat_grad == 'softsoftmax':
    scores = _scores(view, quantizer, blocks)
    z = jax.nn.logsumexp(scores, axis=blocks.inner, keepdims=True)
    z = jnp.where(dead, 0, z / quantizer.alpha)
  else:
    z = jnp.where(dead, 0, fb.from_bits(amax_bits))
  if quantizer.tensor_scale == 'off':
    return z, None
  # g is the largest Z. Where Z is a maximum, so is g, of finite elements: those
  # of blocks that also hold Inf or NaN count.
  candidates = z
  if quantizer.stat_grad != 'softsoftmax':
    candidates = jnp.where(bits < fb.INF, fb.from_bits(bits), 0)
  return z, _tensor_scale(jnp.max(candidates, initial=0), quantizer)


def _scales(z, t, key, quantizer: MicroScaling) -> _Scales:
  """The scales of blocks with the statistic `z`, for the tensor scale `t`."""
  if quantizer.scale_round == 'stochastic':
    key = jax.random.fold_in(key, 1)
  largest = quantizer.element.max
  exact = z * jnp.float32(1 / largest)
  if quantizer.scale_form == 'decode':
    # u = S / t, S_d = t u_q
    factor, least = jnp.float32(1 / largest), jnp.float32(_scaling.SMALLEST)
    if t is not None:
      outer = _scaling.reciprocal(t)
      factor, least = outer * factor, outer * (2 * least)
    u = jnp.where(z > 0, jnp.maximum(z * factor, least), 0)
    u_q = _stored(u, quantizer, key)
    decode = u_q if t is None else u_q * t
    inverse = _scaling.reciprocal(decode)
  else:
    # u = t / S, S_d = t / u_q
    u = jnp.minimum(_scaling.reciprocal(z) * jnp.float32(largest), _TOP)
    u = u if t is None else u * t
    u_q = _stored(u, quantizer, key)
    decode = _scaling.reciprocal(u_q)
    decode = decode if t is None else decode * t
    inverse = u_q if t is None else u_q * _scaling.reciprocal(t)
  payload = decode
  if quantizer.payload == 'unrounded':
    payload, inverse = exact, _scaling.reciprocal(exact)
  return _Scales(exact, u, u_q, decode, payload, inverse)


def _round_elements(v, key, quantizer: MicroScaling, shape, axes):
  """Q(v), for `v` in the view of blocks of an array of this shape."""
  random = None
  if quantizer.rounding == 'stochastic':
    random = _rounding.random_words(key, shape)
    random = core.split(random, quantizer._format, axes).view
  rule = _rounding.rule(quantizer.rounding, random)
  element = spec(quantizer.element)
  return codec.decode(codec.encode(v, element, rule), element)


def _pulled(quantizer: MicroScaling, axes, saved: _Forward, g):
  """The cotangent of x for that of y, g."""
  blocks = core.split(g.astype(jnp.float32), quantizer._format, axes)
  view, f = blocks.view, saved
  slope = quantizer._slopes[0].slope(
    f.v, Lattice(spec(quantizer.element), quantizer.element.max)
  )
  ratio = jnp.float32(1)
  if quantizer.payload == 'unrounded':
    ratio = f.scales.decode * _scaling.reciprocal(f.scales.payload)
  dx = view * slope * ratio
  if quantizer._scale_has_gradient:
    dx = dx + _through_scales(quantizer, f, blocks, slope, ratio)
  return core.restore(dx, blocks, g.dtype)


_compiled = jax.jit(_quantize, static_argnums=(2, 3), inline=True)


def _through_scales(quantizer: MicroScaling, f: _Forward, blocks, slope, ratio):
  """(dL/dS / F) dZ/dx + dL/dt dt/dx."""
  scales, inner, largest = f.scales, blocks.inner, quantizer.element.max
  # dL/dS_d and dL/dS_p of every block; q' on the lattice of scales.
  d_decode = jnp.sum(blocks.view * f.q, axis=inner, keepdims=True)
  d_payload = -ratio * jnp.sum(
    blocks.view * f.v * slope, axis=inner, keepdims=True
  )
  q_slope = jnp.ones_like(scales.u)
  if quantizer.scale_grad != Identity():
    q_slope = quantizer._slopes[1].slope(
      scales.u, Lattice(_scale_spec(quantizer.scale), None)
    )

  dx = jnp.zeros_like(f.x)
  # Through the exact scale: S = Z / F.
  if quantizer.stat_grad != 'ignore':
    form = jnp.float32(1)
    if quantizer.scale_form == 'encode':
      form = jnp.square(scales.decode * _scaling.reciprocal(scales.exact))
    rounded = q_slope * form
    d_exact = d_decode * rounded
    d_exact += d_payload * (rounded if quantizer.payload == 'rounded' else 1)
    dx += d_exact / largest * _direction(f.x, quantizer, blocks)
  # Through the tensor scale, which depends on the largest magnitude only.
  if quantizer.tensor_scale_grad != 'ignore':
    if quantizer.tensor_scale_grad == 'absmax':
      q_slope = jnp.float32(1)
    if quantizer.scale_form == 'decode':
      d_t = scales.u_q - q_slope * scales.u
    else:
      inverse = _scaling.reciprocal(scales.u_q)
      d_t = (1 - q_slope * scales.u * inverse) * inverse
    d_scale = d_decode + (d_payload if quantizer.payload == 'rounded' else 0)
    d_g = jnp.sum(d_scale * d_t) / (largest * quantizer._target)
    dx += d_g * _at_max(f.x, tuple(range(f.x.ndim)))
  return dx


def _direction(x, quantizer: MicroScaling, blocks):
  """dZ/dx in the axes of the view."""
  if quantizer.stat_grad == 'absmax':
    return _at_max(x, blocks.inner)
  scores = _scores(x, quantizer, blocks)
  return jax.nn.softmax(scores, axis=blocks.inner) * jnp.sign(x)


def _at_max(x, axes):
  """sign(x) at the largest magnitude over `axes`, shared by ties."""
  magnitude = jnp.abs(x)
  amax = jnp.max(magnitude, axis=axes, keepdims=True, initial=0)
  at_max = (magnitude == amax) & (amax > 0)
  count = jnp.sum(at_max, axis=axes, keepdims=True).astype(jnp.float32)
  return jnp.where(at_max, jnp.sign(x) * _scaling.reciprocal(count), 0)


def _scores(x, quantizer: MicroScaling, blocks):
  """alpha |x|, -inf in the padding."""
  scores = jnp.float32(quantizer.alpha) * jnp.abs(x)
  if not any(blocks.pad):
    return scores
  shape = list(blocks.shape)
  for axis, pad in zip(blocks.axes, blocks.pad, strict=True):
    shape[axis] -= pad
  inside = core.split(
    jnp.ones(shape, jnp.float32), quantizer._format, blocks.axes
  ).view
  # Whole blocks of padding keep finite scores.
  inside = (inside > 0) | ~jnp.any(inside > 0, blocks.inner, keepdims=True)
  return jnp.where(inside, scores, -jnp.inf)


def _tensor_scale(top, quantizer: MicroScaling):
  """t = g / (F T), with the roundings of 1 / (F T / g)."""
  live = top >= jnp.float32(2.0**-126)
  full = jnp.float32(quantizer.element.max * quantizer._target)
  scale = _scaling.reciprocal(full / jnp.where(live, top, 1))
  return jnp.where(live, jnp.maximum(scale, _scaling.SMALLEST), 1)


def _stored(u, quantizer: MicroScaling, key):
  """u_q: the stored number."""
  if quantizer.scale == formats.float32:
    return u
  f = _scale_spec(quantizer.scale)
  rule = _SCALE_RULES.get(quantizer.scale_round)
  if rule is None:
    rule = codec.stochastic(_rounding.random_words(key, u.shape), 23)
  u_q = codec.decode_float(codec.encode_float(u, f, rule, dtype=jnp.int32), f)
  if quantizer.scale.zero:
    least = 2.0 ** (f.emin - f.mantissa_bits)
    zero = 1.0 if quantizer.zero_scale == 'to_one' else least
    u_q = jnp.where(u_q == 0, jnp.float32(zero), u_q)
  return u_q


def _up(t, odd=None):
  del odd
  return -fb.floor(-t)


def _down(t, odd=None):
  del odd
  return fb.floor(t)


_SCALE_RULES = {
  'nearest_even': codec.nearest_even,
  'up': _up,
  'down': _down,
  'zero': _down,
}


@functools.cache
def _scale_spec(scale: FloatFormat) -> codec.Float:
  """The positive numbers of a format from which 2^-126 and less are cut off."""
  m = scale.mantissa_bits
  emin = max(scale.emin, m - 126)
  cut = emin - scale.emin
  return codec.Float(
    exponent_bits=scale.exponent_bits,
    mantissa_bits=m,
    emin=emin,
    code_max=scale.code_max - (cut << m),
    inf_code=None,
    nan_code=None,
    signed=False,
    subnormals=scale.zero,
    negative_zero=False,
  )


def _tile_axes(axis: int, ndim: int) -> tuple[int, int]:
  if not isinstance(axis, int) or axis % ndim < ndim - 2:
    raise ValueError(f'{axis=} of a tile must be one of the last two')
  axis = axis % ndim - ndim
  return axis, -3 - axis
