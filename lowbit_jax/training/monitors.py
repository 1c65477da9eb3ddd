"""Shares of elements that quantizers clip and flush to zero in training.

`lost` measures the six operands of one product. `tap` measures them inside a
network, where the third of them, the cotangent dy, exists in the backward pass
only: the result comes out as the gradient of a probe, so that scan, remat, jit
and meshes need nothing more. `training.linen.dot_general_cls(..., watch=True)`
puts it into the layers of a model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import _quantize as core, qarray
from lowbit_jax._typing import ArrayLike, Key
from lowbit_jax.doctor import _blocks
from lowbit_jax.numerics import _scaling
from lowbit_jax.numerics._codec import as_float_array
from lowbit_jax.ops import _qdot
from lowbit_jax.recipe import QuantSpec, Recipe, check_recipe

SITES = (
  'fwd.lhs', 'fwd.rhs', 'dgrad.lhs', 'dgrad.rhs', 'wgrad.lhs', 'wgrad.rhs',
)  # fmt: skip
OPERANDS = {'x': (0, 4), 'w': (1, 3), 'dy': (2, 5)}
"""Operand -> its places in `SITES`."""


class Lost(NamedTuple):
  """Shares of elements as `lowbit_jax.doctor` defines them; float32, per site.

  Attributes:
    clipped: of all elements, those beyond the range of their block by more than
      half of its largest step. NaN for quantizers that are not block formats,
      and for formats with zero points.
    flushed: of the nonzero elements, those that became zero.
  """

  clipped: jax.Array
  flushed: jax.Array


def zeros() -> Lost:
  """A probe for `tap`."""
  return Lost(*(jnp.zeros(len(SITES), jnp.float32) for _ in Lost._fields))


def lost(
  x: jax.Array,
  w: jax.Array,
  dy: jax.Array,
  recipe: Recipe,
  *,
  key: Key | None = None,
  tensor_amax: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
) -> Lost:
  """Measures the operands of `ops.qdot` and its derivative.

  Operands are split, rotated and rounded as the recipe says. A site that is
  not quantized loses nothing.

  Args:
    x: activations (..., K).
    w: weight (K, N).
    dy: cotangent of the product (..., N).
    recipe: the recipe that quantizes them.
    key: as in `ops.qdot`.
    tensor_amax: as in `ops.qdot`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from lowbit_jax.training import recipes
    >>> x, w, dy = jax.random.normal(jax.random.key(0), (3, 64, 64))
    >>> measure = jax.jit(lost, static_argnums=3)
    >>> share = measure(x, w, dy, recipes.get('mxfp8'))
    >>> float(share.clipped.max()), share.flushed.shape
    (0.0, (6,))
  """
  check_recipe(recipe)
  x, w, dy = (
    as_float_array(t, name) for name, t in (('x', x), ('w', w), ('dy', dy))
  )
  if not (
    x.ndim
    and w.ndim == 2
    and x.shape[-1] == w.shape[0]
    and dy.shape == (*x.shape[:-1], w.shape[1])
  ):
    raise ValueError(
      f'x.shape={x.shape}, w.shape={w.shape} and dy.shape={dy.shape} must be'
      ' (..., K), (K, N) and (..., N)'
    )
  tensor_amax = _qdot.checked_amax(tensor_amax)
  x, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dy))
  x, _ = _qdot.apart(x, recipe)
  amax_x, amax_w = tensor_amax
  forward = _sites(recipe, 0, key, (x, 1, amax_x), (w, 0, amax_w))
  if recipe.residuals == 'requantized':
    x, w = (_values(*site) for site in forward)
  sites = (
    *forward,
    *_sites(recipe, 1, key, (dy, 1, None), (w, 1, amax_w)),
    *_sites(recipe, 2, key, (x, 0, amax_x), (dy, 0, None)),
  )
  shares = [_lost(*site) for site in sites]
  return Lost(*(jnp.stack(share) for share in zip(*shares, strict=True)))


def tap(
  recipe: Recipe,
  y: jax.Array,
  x: jax.Array,
  w: jax.Array,
  key: Key | None,
  tensor_amax: tuple[ArrayLike | None, ArrayLike | None],
  probe: Lost,
) -> jax.Array:
  """Returns y, and gives `probe` the measures of `lost` as its gradient.

  The cotangent of y passes unchanged. The other arguments are those of `lost`
  and get no gradient; any `Lost` serves as the probe.
  """
  check_recipe(recipe)
  return _tap(recipe, y, x, w, key, tensor_amax, probe)


def _passed(recipe, y, x, w, key, tensor_amax, probe) -> jax.Array:
  del recipe, x, w, key, tensor_amax, probe
  return y


def _forward(recipe, y, x, w, key, tensor_amax, probe):
  del recipe, probe
  return y, (x, w, key, tensor_amax)


def _backward(recipe, residual, dy):
  x, w, key, tensor_amax = residual
  # Shares count elements, which has no derivative.
  x, w, dy_now = jax.lax.stop_gradient((x, w, dy))
  share = lost(x, w, dy_now, recipe, key=key, tensor_amax=tensor_amax)
  none = jax.tree.map(jnp.zeros_like, (x, w, tensor_amax))
  return dy, *none[:2], None, none[2], share


_tap = jax.custom_vjp(_passed, nondiff_argnums=(0,))
_tap.defvjp(_forward, _backward)


def _sites(recipe: Recipe, product: int, key, lhs, rhs):
  """(rotated operand, quantizer, axis, key, amax) of both sides."""
  gemm = recipe.gemms[product]
  keys = _qdot._keys(key, gemm, product)
  rotate = _qdot._rotation(gemm, keys)
  return [
    (rotate(t, axis), spec, axis, k, None if gemm.hadamard else amax)
    for (t, axis, amax), spec, k in zip(
      (lhs, rhs), (gemm.lhs, gemm.rhs), keys, strict=False
    )
  ]


def _values(t, spec, axis: int, key, amax):
  """The values that an operand of the forward product had."""
  if spec is None:
    return t
  return qarray.dequantize(_qdot._quantized(t, spec, axis, key, amax).packed())


def _lost(t, spec, axis: int, key, amax):
  if spec is None:
    return jnp.float32(0), jnp.float32(0)
  if not isinstance(spec, QuantSpec):
    return jnp.float32(jnp.nan), _flushed(t, spec(t, axis, key))
  job = _qdot._quantized(t, spec, axis, key, amax).job
  flushed = _flushed(job.blocks.view, job.values())
  if job.scales.zero_point is not None or job.scales.minimum is not None:
    return jnp.float32(jnp.nan), flushed
  _, step = _blocks.top_and_step(spec.fmt)
  low, high = _scaling.ends(job.encoder)
  element = core._scaled(
    job.elements.x,
    job.blocks,
    job.fmt,
    job.scales.scale,
    job.scales.tensor_scale,
  )
  is_beyond = (element < low - step / 2) | (element > high + step / 2)
  beyond = jnp.sum(is_beyond, dtype=jnp.float32)
  return beyond / t.size, flushed


def _flushed(x, y):
  live = jnp.sum(x != 0, dtype=jnp.float32)
  gone = jnp.sum((x != 0) & (y == 0), dtype=jnp.float32)
  return gone / jnp.maximum(live, 1)
