"""The training product: a linear layer whose three products are quantized.

With x (M, K), w (K, N) and Q_s the quantizer of site s of a `Recipe`,

  y  = Q(x) Q(w)          fwd
  dx = Q(dy) Q(w)^T       dgrad, times the derivative of fwd's quantizer of x
  dw = Q(x)^T Q(dy)       wgrad, times the derivative of fwd's quantizer of w

each quantizer in blocks along the axis that its product reduces. With
`Recipe.center` and `Recipe.principal`, x here is what `apart` leaves of it. A
Hadamard rotation R of both operands along that axis cancels before rounding,
(a R)(R^T b) = a b; an axis that its blocks do not divide is padded with zeros,
which are cut off behind R^T. Products accumulate in float32; tensor scales and
the inverse of prescales multiply the float32 result, so that operands stay
exact in bfloat16.

Where a kernel takes the operands it gets them packed; elsewhere they are
rounded in place, which gives the same numbers without the packing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lowbit_jax import _derivative, _explicit, _quantize as core, qarray
from lowbit_jax._typing import (
  ArrayLike,
  DotDims,
  Implementation,
  Key,
  Precision,
)
from lowbit_jax.numerics import _rounding
from lowbit_jax.numerics._codec import as_float_array, promoted
from lowbit_jax.ops import (
  _dispatch,
  _dot,
  _dot_kernels,
  _dot_xla,
  _fake_quant,
  specs,
)
from lowbit_jax.qarray import QArray
from lowbit_jax.recipe import (
  GemmSpec,
  Quantizer,
  QuantSpec,
  Recipe,
  check_recipe,
)
from lowbit_pallas.arith import hadamard

_SAMPLED = 512  # rows from which leading directions are found, up to twice
_FIXED_SIGNS = (0x243F6A88, 0x85A308D3)  # any two words
_FWD, _DGRAD, _WGRAD = range(3)
_SIGNS = 2


class _Call(NamedTuple):
  """Everything about a call that is not an array."""

  recipe: Recipe
  precision: Any
  implementation: Any


class _Quantized(NamedTuple):
  """A quantization that is not yet run, and the dtype it stands for."""

  job: core.Job
  dtype: jnp.dtype

  def packed(self) -> QArray:
    return core.pack(self.job, self.dtype)

  def values(self):
    """Values without the tensor scale, and that scale."""
    blocks, fmt, scales = self.job.blocks, self.job.fmt, self.job.scales
    half = self.dtype == jnp.bfloat16
    dtype = _dot_xla.exact_dtype(fmt) if half else jnp.float32
    view = self.job.values(scales._replace(tensor_scale=None))
    outer = scales.tensor_scale
    outer = None if outer is None else outer.reshape(())
    return core.restore(view, blocks, dtype), outer


def qdot(
  x: ArrayLike,
  w: ArrayLike,
  recipe: Recipe,
  *,
  key: Key | None = None,
  tensor_amax: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
  precision: Precision = None,
  implementation: Implementation = None,
) -> jax.Array:
  """x @ w as a recipe trains it, with quantized products in both directions.

  Args:
    x: activations (..., K), float16, bfloat16 or float32. Leading axes count as
      one axis of tokens M. Blocks and rotations pad M, K and N with zeros, up
      to whole ones.
    w: weight (K, N).
    recipe: what is done to the six operands.
    key: PRNG key, if the recipe draws random bits. Give each call its own, and
      give it as an argument, so that scan and remat replay it.
    tensor_amax: largest magnitudes of x and w from which tensor scales follow,
      where they are held (see `training.scaling`); None for those of the data,
      which rotated operands always take.
    precision: as in `lax.dot_general`, for operands that are not quantized.
    implementation: as in `dot`.

  Returns:
    (..., N) in the promoted dtype of x and w. On explicit mesh axes it is split
    as the axes of x and w that are not contracted.

  The derivative is the one at the top of this module, in reverse mode.
  Differentiated again, once more or more often and in both modes, quantizers
  count as straight-through there too, and products of derivatives are not
  quantized. Recipes that save codes (`Recipe.residuals`) raise instead.

  Raises:
    ValueError: for shapes that do not fit, or a missing key.
    NotImplementedError: for second derivatives where codes are saved.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
    >>> spec = QuantSpec(lowbit.formats.mxfp8_e4m3, 'rceil')
    >>> gemm = GemmSpec(spec, spec)
    >>> recipe = Recipe('mxfp8', gemm, gemm, gemm)
    >>> lowbit.qdot(jnp.ones((2, 64)), jnp.ones((64, 8)), recipe).shape
    (2, 8)
  """
  check_recipe(recipe)
  x, w = as_float_array(x), as_float_array(w, 'w')
  _check(x, w, recipe, key)
  tensor_amax = checked_amax(tensor_amax)
  _dot.check_precision(precision)
  if isinstance(implementation, list):
    implementation = tuple(implementation)
  call = _Call(recipe, precision, implementation)
  key = key if recipe.needs_key else None
  run = functools.partial(_linear, call)
  return _explicit.automatic(run, _specs, x, w, key, tensor_amax)


def _linear(call: _Call, x, w, key, tensor_amax):
  """The layer: the quantized product, and what is apart from it."""
  rows = x.reshape(-1, x.shape[-1])
  rest, terms = apart(rows, call.recipe)
  y = _compiled(call, rest, w=w, key=key, tensor_amax=tensor_amax)
  for term in terms:
    exact = w.astype(jnp.float32)
    for factor in reversed(term):
      exact = jnp.matmul(factor, exact, precision=call.precision)
    y = (y + exact).astype(y.dtype)
  return y.reshape(*x.shape[:-1], w.shape[1])


def _specs(result, x, w, *rest) -> PartitionSpec:
  del result, rest
  return PartitionSpec(*_explicit.parts(x)[:-1], _explicit.parts(w)[1])


def apart(
  x: jax.Array, recipe: Recipe
) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
  """Splits off what is multiplied in high precision.

  Args:
    x: rows (M, K).
    recipe: whose `center` and `principal` say what that is.

  Returns:
    (rest, terms): x is the sum of `rest`, of its dtype, and of the terms, each
    the product of a tuple of float32 matrices: (m,) for the mean of the rows
    and (x P, P^T) for the leading directions P.
  """
  rest, terms = x.astype(jnp.float32), []
  if x.shape[0] == 0:
    return x, terms  # nothing has no mean
  if recipe.center:
    mean = jnp.mean(rest, axis=0, keepdims=True)
    rest = rest - mean
    terms.append((mean,))
  if recipe.principal:
    p = _leading(lax.stop_gradient(rest), recipe.principal)
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    coordinates = matmul(rest, p)
    rest = rest - matmul(coordinates, p.T)
    terms.append((coordinates, p.T))
  return rest.astype(x.dtype), terms


def _leading(x, count: int):
  """Orthonormal columns (K, count) near the leading right singular vectors.

  Two subspace iterations from fixed signs (Halko et al., 2011) over some of the
  rows. For any P that does not depend on what is differentiated the split is
  exact.
  """
  x = x[:: max(1, len(x) // _SAMPLED)]
  matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  words = jnp.array(_FIXED_SIGNS, jnp.uint32)
  signs = hadamard.random_signs(words, x.shape[1] * count, x.dtype)
  p = signs.reshape(x.shape[1], count)
  for _ in range(2):
    p, _ = jnp.linalg.qr(matmul(x.T, matmul(x, p)))
  return p


def matrices(
  lhs: jax.Array, rhs: jax.Array, dimension_numbers: DotDims
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
  """Operands of `lax.dot_general` without batch dimensions as x and w of a
  linear layer.

  Args:
    lhs: array.
    rhs: array.
    dimension_numbers: `((lhs_contracting, rhs_contracting), ((), ()))`.

  Returns:
    x (..., K), w (K, N), and the shape of the result; `x @ w` holds its entries
    in order.
  """
  (left, right), batch = dimension_numbers
  if any(map(tuple, batch)):
    raise ValueError(
      f'dimension_numbers={dimension_numbers} have batch dimensions; a training'
      ' product has none: use jax.vmap'
    )
  free = [
    [d for d in range(t.ndim) if d not in c]
    for t, c in ((lhs, left), (rhs, right))
  ]
  x = lhs.transpose(*free[0], *left)
  shape = x.shape[: len(free[0])]
  x = x.reshape(*shape, -1)
  w = rhs.transpose(*right, *free[1])
  columns = w.shape[len(right) :]
  return x, w.reshape(x.shape[-1], -1), (*shape, *columns)


def _check(x, w, recipe: Recipe, key) -> None:
  if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      f'x.shape={x.shape} and w.shape={w.shape} must be (..., K) and (K, N)'
    )
  if recipe.principal > w.shape[0]:
    raise ValueError(
      f'recipe.principal={recipe.principal} directions do not fit in the K ='
      f' {w.shape[0]} of w.shape={w.shape}; use fewer'
    )
  if recipe.needs_key and key is None:
    raise ValueError(
      f'recipe {recipe.name!r} draws random bits: pass key=jax.random.key(..),'
      ' folded with the step and the layer'
    )


def checked_amax(tensor_amax: Any) -> tuple[Any, Any]:
  """Refuses what is not a pair of numbers or None."""
  remedy = 'must be a pair for x and w, of None or one number each'
  if not isinstance(tensor_amax, tuple | list) or len(tensor_amax) != 2:
    raise TypeError(f'tensor_amax={tensor_amax!r} {remedy}')
  if any(amax is not None and np.size(amax) != 1 for amax in tensor_amax):
    raise ValueError(f'tensor_amax={tensor_amax!r} {remedy}')
  return tuple(tensor_amax)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _qdot(call: _Call, x, w, key, tensor_amax):
  return _forward(call, x, w, key, tensor_amax)[0]


def _forward(call: _Call, x, w, key, tensor_amax):
  recipe, gemm = call.recipe, call.recipe.fwd
  keys = _keys(key, gemm, _FWD)
  rotate = _rotation(gemm, keys)
  saves = recipe.residuals != 'high_precision'
  dtype = promoted(x.dtype, w.dtype)
  primals = x[:0], w[:, :0]  # Their dtypes, and the size K.
  if saves:
    why = (
      f'recipe {recipe.name!r} has no second derivative: with'
      f' residuals={recipe.residuals!r} its backward pass starts from codes;'
      " use a recipe with residuals='high_precision'"
    )
    x, w = (_fake_quant.differentiable_once(why, t) for t in (x, w))
  operands, sites, pulls = [], [], []
  for t, spec, axis, k, amax in zip(
    (rotate(x, 1), rotate(w, 0)),
    (gemm.lhs, gemm.rhs),
    (1, 0),
    keys,
    tensor_amax,
    strict=False,
  ):
    operand, site, pull = t, _Site(spec, axis), None
    amax = None if gemm.hadamard else amax  # a held one is of t unrotated
    if _has_derivative(spec):
      simulate = functools.partial(_simulated, spec, axis, k, amax)
      operand, pull = jax.vjp(simulate, t)
      site = _Site(None, axis)
    elif saves and isinstance(spec, QuantSpec):
      operand = _quantized(t, spec, axis, k, amax).packed()
    elif saves and spec is not None:
      operand, site = _rounded(site, _Operand(t, k, amax)), _Site(None, axis)
    operands.append(_Operand(operand, k, amax))
    sites.append(site)
    pulls.append(pull)
  y = _product(call, tuple(sites), dtype, tuple(operands))
  saved = tuple(operand.array for operand in operands) if saves else (x, w)
  return y, (saved, tuple(pulls), key, tensor_amax, primals)


def _backward(call: _Call, residual, dy):
  saved, pulls, key, (amax_x, amax_w), primals = residual
  x, w = saved
  fwd, dgrad, wgrad = call.recipe.gemms
  dx = _gradient(
    call, _DGRAD, (dy, dgrad.lhs, 1, None), (w, dgrad.rhs, 1, amax_w), key
  )
  dw = _gradient(
    call, _WGRAD, (x, wgrad.lhs, 0, amax_x), (dy, wgrad.rhs, 0, None), key
  )
  rotate = _rotation(fwd, _keys(key, fwd, _FWD))
  is_rotated = call.recipe.residuals == 'forward'
  out = []
  for g, pull, axis, primal in zip(
    (dx, dw), pulls, (1, 0), primals, strict=True
  ):
    if pull is not None:
      # The quantizer and its derivative live in the rotated space.
      g = g if is_rotated else rotate(g, axis)
      (g,) = pull(g.astype(primal.dtype))
    if pull is not None or is_rotated:
      g = rotate(g, axis, inverse=True)
      g = lax.slice_in_dim(g, 0, primal.shape[axis], axis=axis)
    out.append(g.astype(primal.dtype))
  return *out, None, (None, None)


_qdot.defvjp(_forward, _backward)
_compiled = jax.jit(_qdot, static_argnums=0, inline=True)


def _gradient(call: _Call, which: int, lhs, rhs, key):
  """A backward product in float32; operands are (array, spec, axis, amax)."""
  gemm = call.recipe.gemms[which]
  keys = _keys(key, gemm, which)
  rotate = _rotation(gemm, keys)
  operands, sites = [], []
  for (t, spec, axis, amax), k in zip((lhs, rhs), keys, strict=False):
    if isinstance(t, QArray) and spec is not None:
      t = qarray.decode(t)
    t = t if isinstance(t, QArray) else rotate(t, axis)
    operands.append(_Operand(t, k, None if gemm.hadamard else amax))
    sites.append(_Site(spec, axis))
  return _product(call, tuple(sites), jnp.float32, tuple(operands))


class _Site(NamedTuple):
  """How an operand is quantized, and the axis that its product reduces."""

  spec: QuantSpec | Quantizer | None
  axis: int


class _Operand(NamedTuple):
  """What is quantized, and with what; a QArray is already."""

  array: Any
  key: Any
  amax: Any


@functools.partial(_derivative.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(call: _Call, sites, dtype, operands) -> jax.Array:
  """The product of two operands, each quantized as its site says.

  Its derivative, which only second derivatives of `qdot` take, is that of the
  product of straight-through quantizers.
  """
  dims = _dims(sites)
  a, b = map(_rounded, sites, operands)
  if isinstance(a, jax.Array) and isinstance(b, jax.Array):
    y = _plan_values(a, b, dims, call.precision).run(a, b)
  else:
    y = _dispatch.run(
      'qdot', TABLE, call.implementation, (a, b), dims, call.precision
    )
  scale = math.prod(_prescale(site.spec) for site in sites)
  y = y if scale == 1 else y * jnp.float32(1 / scale)
  return y.astype(dtype)


@_product.defjvp
def _product_jvp(call: _Call, sites, dtype, primals, tangents):
  (operands,), (movements,) = primals, tangents
  moving = [i for i in range(2) if not isinstance(operands[i].array, QArray)]

  def straight(*arrays):
    values = [_dot.dense(operand.array) for operand in operands]
    for i, t in zip(moving, arrays, strict=True):
      (spec, axis), (_, key, amax) = sites[i], operands[i]
      values[i] = t.astype(jnp.float32)
      if spec is not None:
        values[i] = _simulated(spec, axis, key, amax, values[i])
    return lax.dot_general(
      values[0],
      values[1],
      _dims(sites),
      precision=call.precision,
      preferred_element_type=jnp.float32,
    ).astype(dtype)

  arrays, tangents = (
    tuple(group[i].array for i in moving) for group in (operands, movements)
  )
  y = _product(call, sites, dtype, operands)
  return y, jax.jvp(straight, arrays, tangents)[1]


def _dims(sites) -> DotDims:
  return ((sites[0].axis,), (sites[1].axis,)), ((), ())


def _rounded(site: _Site, operand: _Operand):
  """An operand of a plan: an array, a QArray, or a quantization to be run."""
  (spec, axis), (t, key, amax) = site, operand
  if isinstance(t, QArray) or spec is None:
    return t
  if isinstance(spec, QuantSpec):
    return _quantized(t, spec, axis, key, amax)
  return spec(t, axis, key)


def _plan_values(a, b, dims: DotDims, precision: Precision) -> _dispatch.Plan:
  """Plans a product of operands that are rounded but not packed."""
  del a, b

  def run(a, b):
    (a, outer_a), (b, outer_b) = _values(a), _values(b)
    common = promoted(a.dtype, b.dtype)
    y = lax.dot_general(
      a.astype(common),
      b.astype(common),
      dims,
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    return _dot_xla.times(y, outer_a, outer_b)

  return _dispatch.Plan('product of rounded values', run)


def _plan_packed(
  plan: Callable, a, b, dims: DotDims, precision: Precision
) -> _dispatch.Plan:
  """Plans a product of packed operands by a kernel of `dot`."""
  lhs, rhs = jax.eval_shape(lambda: (_packed(a), _packed(b)))
  note, contract, _ = plan(lhs, rhs, dims, precision)

  def run(a, b):
    return _dot.product(_packed(a), _packed(b), dims, precision, contract)

  return _dispatch.Plan(note, run)


TABLE = {
  'tpu': functools.partial(_plan_packed, _dot_kernels.plan_tpu),
  'mosaic_gpu': functools.partial(_plan_packed, _dot_kernels.plan_mosaic_gpu),
  'xla': _plan_values,
}


def _packed(operand):
  return operand.packed() if isinstance(operand, _Quantized) else operand


def _values(operand):
  """An array, and the tensor scale that multiplies the result or None."""
  if isinstance(operand, _Quantized):
    return operand.values()
  if isinstance(operand, QArray):
    operand, outer = _dot_xla.without_tensor_scale(operand)
    return qarray.decode(operand), outer
  return operand, None


def _quantized(t, spec: QuantSpec, axis: int, key, amax=None) -> _Quantized:
  axes = _axes(spec, axis)
  job = specs.quantization(t, spec, axes, key=key, tensor_amax=amax)
  return _Quantized(job, t.dtype)


def _simulated(spec, axis: int, key, amax, t) -> jax.Array:
  """A quantizer as a function with a derivative."""
  if not isinstance(spec, QuantSpec):
    return spec(t, axis, key)
  axes = _axes(spec, axis)
  return specs.fake_quant(t, spec, axes, key=key, tensor_amax=amax)


def _axes(spec: QuantSpec, axis: int):
  return (axis, 1 - axis) if spec.fmt.is_tile else axis


def _has_derivative(spec) -> bool:
  """Whether a quantizer's derivative is more than the identity."""
  if isinstance(spec, QuantSpec):
    return spec.backward != 'identity'
  return spec is not None and not getattr(spec, 'is_straight_through', False)


def _prescale(spec) -> float:
  return spec.prescale if isinstance(spec, QuantSpec) else 1.0


def _keys(key, gemm: GemmSpec, which: int):
  """Keys of the left side, the right side and the signs; None where unused."""
  if not gemm.needs_key:
    return None, None, None
  return tuple(jax.random.fold_in(key, 3 * which + i) for i in range(3))


def _rotation(gemm: GemmSpec, keys):
  """A function (x, axis, inverse=False) that rotates a matrix along an axis."""

  def rotate(x, axis: int, inverse: bool = False):
    if not gemm.hadamard:
      return x
    pad = -x.shape[axis] % gemm.hadamard
    if pad:
      x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(2)])
    signs = _signs(gemm, keys[_SIGNS], x.dtype)
    return hadamard.hadamard(
      x, gemm.hadamard, axis, signs=signs, inverse=inverse
    )

  return rotate


def _signs(gemm: GemmSpec, key, dtype):
  """One sign for each place of a block of the rotation, None for no signs."""
  if gemm.signs == 'none':
    return None
  words = jnp.array(_FIXED_SIGNS, jnp.uint32)
  if gemm.signs == 'per_call':
    words = _rounding.key_words(key)
  return hadamard.random_signs(words, gemm.hadamard, dtype)
