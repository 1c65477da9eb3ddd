"""Products for the `dot_general`, `einsum_op` and `promote_dtype` arguments of
Flax modules."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes as flax_dtypes
from jax import lax

from lowbit_jax import ops
from lowbit_jax._low_rank import is_operand
from lowbit_jax._typing import (
  DotDims,
  DTypeLike,
  Key,
  OutSharding,
  Precision,
  PyTree,
)
from lowbit_jax.nn._view import Viewed, unview
from lowbit_jax.numerics._codec import as_dtype, as_float_array
from lowbit_jax.ops import _dot, specs as quant_specs
from lowbit_jax.ops._operand import untransformed
from lowbit_jax.recipe import QuantSpec, check_spec


class _Specs(NamedTuple):
  lhs: QuantSpec | None
  rhs: QuantSpec | None


class Specs(_Specs):
  """What is done to the operands of a product."""

  def __new__(cls, lhs: QuantSpec | None, rhs: QuantSpec | None) -> 'Specs':
    return super().__new__(cls, check_spec('lhs', lhs), check_spec('rhs', rhs))

  @property
  def need_key(self) -> bool:
    return any(s is not None and s.needs_key for s in self)


def dot_general(
  lhs: QuantSpec | None = None, rhs: QuantSpec | None = None
) -> 'DotGeneral':
  """A `lax.dot_general` that fake-quantizes arrays and takes QArrays packed.

  For the `dot_general` argument of Linen and NNX modules. Arrays are
  fake-quantized along their last contracted axis (tiles: along that and the
  last free axis); QArrays are used as they are stored. Flax turns all operands
  into arrays first: give the module `promote_dtype=nn.promote_dtype` as well
  if its parameters are QArrays. An `ops.Transformed` or an `ops.LowRank` is
  taken as a QArray is; the left operand is quantized after it took the
  transform.

  Args:
    lhs: what is done to the left operand, the activations; None for nothing.
    rhs: what is done to the right operand, the weights.

  Returns:
    A hashable function `(lhs, rhs, dimension_numbers, precision=None,
    preferred_element_type=None, **kwargs)`. `out_sharding` means what it means
    in `lax.dot_general`.

  Raises:
    ValueError: for specs with random rounding. Their keys come from
      `nn.linen.DotGeneral` and `nn.nnx.DotGeneral`.

  Examples:
    >>> from flax import linen
    >>> import lowbit_jax as lowbit
    >>> from lowbit_jax.recipe import QuantSpec
    >>> spec = QuantSpec(lowbit.formats.mxfp4)
    >>> layer = linen.Dense(8, dot_general=lowbit.nn.dot_general(rhs=spec))
  """
  return DotGeneral(Specs(*check_specs(lhs, rhs)))


def einsum(
  lhs: QuantSpec | None = None, rhs: QuantSpec | None = None
) -> 'Einsum':
  """A `jnp.einsum` of two operands that fake-quantizes and takes QArrays.

  For the `einsum_op` argument of `nnx.Einsum`; otherwise as `dot_general`.

  Returns:
    A hashable function `(subscripts, lhs, rhs, precision=None,
    preferred_element_type=None, **kwargs)`.
  """
  return Einsum(Specs(*check_specs(lhs, rhs)))


def promote_dtype(
  *args: Any, dtype: DTypeLike | None = None, inexact: bool = True
) -> Any:
  """`promote_dtype` of Flax that lets QArrays through.

  QArrays, also behind transforms, stay packed and only take on the dtype that
  they stand for.

  Args:
    *args: arrays, QArrays and None (Linen), or one tuple of these (NNX).
    dtype: dtype of the result; None to infer it.
    inexact: whether the inferred dtype must be a float.

  Returns:
    The operands in one dtype, a list (Linen) or a tuple (NNX).
  """
  is_nnx = len(args) == 1 and isinstance(args[0], tuple)
  values = [unview(x) for x in (args[0] if is_nnx else args)]
  stand_ins = [np.zeros((), x.dtype) if is_operand(x) else x for x in values]
  common = flax_dtypes.canonicalize_dtype(
    *stand_ins, dtype=dtype, inexact=inexact
  )

  def cast(x):
    if x is None or is_operand(x):
      return x if x is None else x.astype(common)
    return jnp.asarray(x, common)

  promoted = [cast(x) for x in values]
  return tuple(promoted) if is_nnx else promoted


@dataclasses.dataclass(frozen=True)
class DotGeneral:
  """What `dot_general` returns."""

  specs: Specs

  def __call__(
    self,
    lhs: Viewed,
    rhs: Viewed,
    dimension_numbers: DotDims,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    return contract(
      lhs,
      rhs,
      dimension_numbers,
      self.specs,
      precision=precision,
      preferred_element_type=preferred_element_type,
      **kwargs,
    )


@dataclasses.dataclass(frozen=True)
class Einsum:
  """What `einsum` returns."""

  specs: Specs

  def __call__(
    self,
    subscripts: str,
    lhs: Viewed,
    rhs: Viewed,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    return contract_einsum(
      subscripts,
      lhs,
      rhs,
      self.specs,
      precision=precision,
      preferred_element_type=preferred_element_type,
      **kwargs,
    )


def contract(
  lhs: Viewed,
  rhs: Viewed,
  dimension_numbers: DotDims,
  specs: Specs,
  *,
  key: Key | None = None,
  precision: Precision = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  **kwargs: Any,
) -> jax.Array:
  """`dot_general` of operands that `specs` are applied to.

  Args:
    lhs: array, QArray or view of one.
    rhs: the same.
    dimension_numbers: as in `lax.dot_general`.
    specs: what is done to arrays.
    key: PRNG key, if a spec needs one.
    precision: as in `lax.dot_general`; also `preferred_element_type`.
    out_sharding: sharding of the result on explicit mesh axes.
    **kwargs: further keywords of `lax.dot_general`.
  """
  if preferred_element_type is not None:
    preferred_element_type = as_dtype(
      preferred_element_type, 'preferred_element_type'
    )
  left, right = _quantized(lhs, rhs, dimension_numbers, specs, key)
  if not (is_operand(left) or is_operand(right)):
    return lax.dot_general(
      left,
      right,
      dimension_numbers,
      precision=precision,
      preferred_element_type=preferred_element_type,
      out_sharding=out_sharding,
      **kwargs,
    )
  _refuse(kwargs)

  def product(lhs, rhs):
    return ops.dot_general(
      lhs,
      rhs,
      dimension_numbers,
      precision=precision,
      preferred_element_type=preferred_element_type,
    )

  return sharded(product, out_sharding, left, right)


def contract_einsum(
  subscripts: str,
  lhs: Viewed,
  rhs: Viewed,
  specs: Specs,
  *,
  key: Key | None = None,
  precision: Precision = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  **kwargs: Any,
) -> jax.Array:
  """As `contract`, by subscripts."""
  left, right = _operand(lhs, 'lhs'), _operand(rhs, 'rhs')
  if specs == Specs(None, None) and not (is_operand(left) or is_operand(right)):
    return jnp.einsum(
      subscripts,
      left,
      right,
      precision=precision,
      preferred_element_type=preferred_element_type,
      out_sharding=out_sharding,
      **kwargs,
    )
  _refuse(kwargs)
  dims, order = _dot.einsum_dims(subscripts, left.ndim, right.ndim)

  def product(lhs, rhs):
    out = contract(
      lhs,
      rhs,
      dims,
      specs,
      key=key,
      precision=precision,
      preferred_element_type=preferred_element_type,
    )
    return out.transpose(order)

  return sharded(product, out_sharding, left, right)


def fake_quant(
  x: jax.Array,
  spec: QuantSpec | None,
  axis: int | tuple[int, ...],
  key: Key | None = None,
) -> jax.Array:
  """`ops.fake_quant` as `spec` says; `x` itself for None.

  Args:
    x: array.
    spec: what is done to it.
    axis: block axis, or block axes for tiles.
    key: PRNG key; used only if the rounding is random.
  """
  if spec is None:
    return x
  quant_specs.check_stateless('QuantSpec', spec)
  return quant_specs.fake_quant(x, spec, axis, key=key)


def _quantized(lhs, rhs, dims, specs: Specs, key):
  """The operands after fake quantization of those that are arrays."""
  keys = (None, None)
  if specs.need_key:
    if key is None:
      raise ValueError('random rounding needs key=jax.random.key(seed)')
    keys = jax.random.split(key)
  out = []
  operands = _operand(lhs, 'lhs'), _operand(rhs, 'rhs')
  are_stored = tuple(map(is_operand, operands))
  if any(specs):
    dims = _dot.check_dims(*operands, dims)
    # What a product multiplies is quantized: activations behind a transform.
    operands = untransformed(*operands, dims)
  for i, x in enumerate(operands):
    spec = specs[i]
    if spec is not None and not are_stored[i]:
      contracted, batch = dims[0][i], dims[1][i]
      axis = _spec_axis(spec, x, contracted, batch)
      x = as_float_array(x, ('lhs', 'rhs')[i])
      x = fake_quant(x, spec, axis, keys[i])
    out.append(x)
  return out


def _operand(x: Viewed, side: str) -> Any:
  """An array or QArray, or an error that says that it is none."""
  x = unview(x)
  if not hasattr(x, 'ndim'):
    raise TypeError(f'{side} must be an array or a QArray, got {x!r}')
  return x


def _spec_axis(spec: QuantSpec, x, contracted, batch):
  """Block axes of an operand: the last contracted one, for tiles also the last
  free one."""
  free = [d for d in range(x.ndim) if d not in (*contracted, *batch)]
  if not contracted or (spec.fmt.is_tile and not free):
    raise ValueError(
      f'{spec.fmt} has no place in an operand of shape {x.shape} that is'
      f' contracted over axes {tuple(contracted)}; use another format or None'
    )
  last = contracted[-1]
  return (last, free[-1]) if spec.fmt.is_tile else last


def sharded(
  f: Callable, out_sharding: OutSharding, *operands: PyTree
) -> PyTree:
  """`f(*operands)` with the given sharding of the result."""
  if out_sharding is None:
    return f(*operands)
  auto = jax.sharding.auto_axes(f, out_sharding=out_sharding)
  # auto_axes does nothing where no axis is explicit; reshard says so.
  return jax.sharding.reshard(auto(*operands), out_sharding)


def check_specs(
  lhs: QuantSpec | None, rhs: QuantSpec | None
) -> tuple[QuantSpec | None, QuantSpec | None]:
  for name, spec in (('lhs', lhs), ('rhs', rhs)):
    spec = check_spec(name, spec)
    if spec is not None and spec.needs_key:
      raise ValueError(
        f'{name} has rounding={spec.rounding!r}, which needs a new key in every'
        f' call; use nn.linen.DotGeneral or nn.nnx.DotGeneral, which draw them'
      )
  return lhs, rhs


def _refuse(kwargs) -> None:
  given = {k: v for k, v in kwargs.items() if v is not None}
  if given:
    raise TypeError(f'a quantized product has no keywords {sorted(given)}')
