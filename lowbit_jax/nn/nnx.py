"""NNX: frozen quantized variables, and modules for fake quantization.

Unmodified NNX modules take QArrays: they decode a weight before they use it.
`quantize` replaces the weights of a model and lets Linear, LinearGeneral and
Einsum contract them packed.

- `DotGeneral`: `nn.dot_general` with random rounding, for `dot_general`
  arguments.
- `Embed`: `nnx.Embed` that decodes only the rows that it looks up.
- `QuantizedParam`: A quantized weight. Not a Param: gradients and optimizers
  pass it by.
- `assign`: Puts arrays and QArrays into the parameters of a model, in place.
- `frozen`: A `QuantizedParam` with the metadata of another variable.
- `quantize`: Replaces the selected parameters of a model by `QuantizedParam`s,
  in place.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax import lax

from lowbit_jax import _sites
from lowbit_jax._low_rank import LowRank
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._typing import (
  Axis,
  DotDims,
  DTypeLike,
  OutSharding,
  Precision,
  ScaleRule,
)
from lowbit_jax.formats import BlockFormat
from lowbit_jax.nn import _dot, _embed, _params
from lowbit_jax.nn._frozen import (
  QuantizedParam as QuantizedParam,
  frozen as frozen,
)
from lowbit_jax.nn._view import Viewed
from lowbit_jax.qarray import QArray
from lowbit_jax.recipe import QuantSpec


def quantize(
  model: flax_nnx.Module,
  select: str | Callable[[str, Any], bool] | None,
  fmt: BlockFormat | Callable[[str, Any], BlockFormat | None],
  *,
  axis: Axis | Callable[[str, Any], Axis] = None,
  scale_rule: ScaleRule | None = None,
  method: _params.Method | None = None,
) -> flax_nnx.Module:
  """Replaces the selected parameters of a model by `QuantizedParam`s, in place.

  Blocks lie along the last contracted axis, as the modules tell: Linear,
  LinearGeneral (so also MultiHeadAttention), Einsum, Conv, ConvTranspose and
  Embed. Layers stacked along leading axes (`nnx.vmap`) are quantized one by
  one. Linear, LinearGeneral and Einsum get `nn.dot_general()` or `nn.einsum()`
  and `nn.promote_dtype` where they had the defaults, so that weights stay
  packed in products.

  Args:
    model: an NNX module.
    select: as in `nn.quantize_params`; also `fmt`, `axis`, `scale_rule` and
      `method`.

  Returns:
    `model`.

  Raises:
    TypeError: for what is no module.
    ValueError: if nothing is selected, or for a parameter whose axis is not
      known.

  Examples:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowbit_jax as lowbit
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> _ = lowbit.nn.nnx.quantize(model, None, lowbit.formats.mxfp4)
    >>> model(jnp.ones((1, 64))).shape
    (1, 8)
  """
  if not isinstance(model, flax_nnx.Module):
    raise TypeError(f'{model=} must be an nnx.Module')
  holders = _holders(model)
  first = {}  # a shared variable counts where it is found first
  for path, module, name, variable in holders:
    first.setdefault(id(variable), (path, module, name, variable))
  values = {path: v.get_raw_value() for path, _, _, v in first.values()}
  known = {
    path: layout
    for path, module, name, _ in first.values()
    if (layout := _layout(module, name)) is not None
  }
  choice = _params.Choice(select, fmt, axis, None, scale_rule, method)
  new = choice.quantize(values, known)
  new = {
    key: frozen(variable, new[path])
    for key, (path, _, _, variable) in first.items()
    if path in new
  }
  for _, module, name, variable in holders:
    if id(variable) in new:
      setattr(module, name, new[id(variable)])
      _use_packed(module)
  return model


def assign(
  model: flax_nnx.Module, values: Mapping[str, jax.Array | QArray | Transformed]
) -> flax_nnx.Module:
  """Puts arrays and QArrays into the parameters of a model, in place.

  For weights that were quantized elsewhere, such as those of a file. Parameters
  that get a QArray or an `ops.Transformed` become `QuantizedParam`s, and
  Linear, LinearGeneral and Einsum contract them packed, as after `quantize`;
  `QuantizedParam`s that get an array become Params.

  Args:
    model: an NNX module; that of `nnx.eval_shape` will do.
    values: by the path of the parameter, such as 'blocks/0/up/kernel', of its
      shape.

  Returns:
    `model`.

  Raises:
    TypeError: for what is no module, and for weights with adapters.
    ValueError: for a path that the model does not have, and for another shape.

  Examples:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowbit_jax as lowbit
    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> model = lowbit.nn.nnx.assign(model, {'kernel': w})
    >>> model(jnp.ones((1, 64))).shape
    (1, 8)
  """
  if not isinstance(model, flax_nnx.Module):
    raise TypeError(f'{model=} must be an nnx.Module')
  holders = _holders(model, (flax_nnx.Param, QuantizedParam))
  shapes = {path: v.get_raw_value().shape for path, _, _, v in holders}
  for path, value in values.items():
    if path not in shapes:
      known = ', '.join(difflib.get_close_matches(path, shapes)) or 'none'
      raise ValueError(f'the model has no {path!r:.200}; similar are {known}')
    if isinstance(value, LowRank):
      raise TypeError(
        f'{path!r} is {value!r}, whose factors no variable of NNX could train:'
        ' pass the value of lora.merge(params)'
      )
    if value.shape != shapes[path]:
      raise ValueError(
        f'{path!r} has the shape {shapes[path]}, its value {value.shape}'
      )
  new = {}  # a shared variable counts where it is found first
  for path, module, name, variable in holders:
    if path in values:
      new[id(variable)] = _holding(variable, values[path])
    if id(variable) in new:
      setattr(module, name, new[id(variable)])
      if isinstance(new[id(variable)], QuantizedParam):
        _use_packed(module)
  return model


def _holding(variable: flax_nnx.Variable, value: Any) -> flax_nnx.Variable:
  """A variable in place of another, for its new value."""
  if is_quantized(value):
    return frozen(variable, value)
  metadata = variable.get_metadata(exclude_required=True)
  return flax_nnx.Param(value, **metadata)


class DotGeneral(flax_nnx.Module):
  """`nn.dot_general` with random rounding, for `dot_general` arguments.

  Args:
    lhs: what is done to activations, None for nothing.
    rhs: what is done to weights.
    rngs: source of a stream of keys, forked from its stream 'quant'.

  Examples:
    `nnx.Linear(64, 8, dot_general=DotGeneral(rhs=spec, rngs=rngs), rngs=rngs)`
  """

  def __init__(
    self,
    lhs: QuantSpec | None = None,
    rhs: QuantSpec | None = None,
    *,
    rngs: flax_nnx.Rngs,
  ) -> None:
    self.specs = _dot.Specs(lhs, rhs)
    self.rngs = rngs.fork()

  def __call__(
    self,
    lhs: Viewed,
    rhs: Viewed,
    dimension_numbers: DotDims,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    return _dot.contract(
      lhs,
      rhs,
      dimension_numbers,
      self.specs,
      key=self.rngs.quant() if self.specs.need_key else None,
      precision=precision,
      preferred_element_type=preferred_element_type,
      **kwargs,
    )


class Embed(flax_nnx.Embed):
  """`nnx.Embed` that decodes only the rows that it looks up.

  Args:
    num_embeddings: rows of the table.
    features: columns of the table.
    lhs: what is done to the queries of `attend`, None for nothing.
    rhs: what is done to a table that is an array.
    **kwargs: further arguments of `nnx.Embed`.
  """

  def __init__(
    self,
    num_embeddings: int,
    features: int,
    *,
    lhs: QuantSpec | None = None,
    rhs: QuantSpec | None = None,
    promote_dtype: Any = _dot.promote_dtype,
    **kwargs: Any,
  ) -> None:
    super().__init__(
      num_embeddings, features, promote_dtype=promote_dtype, **kwargs
    )
    self.specs = _dot.Specs(*_dot.check_specs(lhs, rhs))

  def __call__(
    self, inputs: jax.Array, out_sharding: OutSharding = None
  ) -> jax.Array:
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise ValueError(f'{inputs.dtype=} must be an integer type')
    (table,) = self.promote_dtype(
      (self.embedding[...],), dtype=self.dtype, inexact=False
    )

    def take(table, inputs):
      return _embed.take_rows(table, inputs, None, self.specs.rhs)

    return _dot.sharded(take, out_sharding, table, inputs)

  def attend(
    self, query: jax.Array, out_sharding: OutSharding = None
  ) -> jax.Array:
    query, table = self.promote_dtype(
      (query, self.embedding[...]), dtype=self.dtype
    )

    def score(query, table):
      return _embed.attend(query, table, self.specs)

    return _dot.sharded(score, out_sharding, query, table)


def _holders(model, kinds: Any = flax_nnx.Param):
  """(path, module, name, variable) of every Param attribute of every module."""
  return [
    ('/'.join(map(str, (*path, name))), module, name, variable)
    for path, module in flax_nnx.iter_modules(model)
    for name, variable in vars(module).items()
    if isinstance(variable, kinds)
  ]


def _layout(module, name: str) -> _sites.Layout | None:
  """Where the module itself tells how its parameter is contracted."""
  if isinstance(module, flax_nnx.Embed):
    return _sites.Layout((-1,), 2) if name == 'embedding' else None
  if name != 'kernel':
    return None
  if isinstance(module, flax_nnx.Linear):
    return _sites.Layout((-2,), 2)
  if isinstance(module, flax_nnx.LinearGeneral):
    n_in, n_out = len(module.in_features), len(module.out_features)
    rank = len(module.batch_axis) + n_in + n_out
    return _sites.Layout(tuple(range(-n_out - n_in, -n_out)), rank)
  if isinstance(module, flax_nnx.Conv | flax_nnx.ConvTranspose):
    rank = len(module.kernel_size) + 2
    if getattr(module, 'transpose_kernel', False):
      return _sites.Layout((-1,), rank)
    return _sites.Layout(tuple(range(-rank, -1)), rank)
  if isinstance(module, flax_nnx.Einsum) and '...' not in module.einsum_str:
    operands, output = module.einsum_str.replace(' ', '').split('->')
    inputs, kernel = operands.split(',')
    rank = len(kernel)
    axes = [
      i - rank for i, c in enumerate(kernel) if c in inputs and c not in output
    ]
    if axes:
      return _sites.Layout(tuple(axes), rank)
  return None


def _use_packed(module: Any) -> None:
  """Puts packed products in place of default ones."""
  if isinstance(module, flax_nnx.Linear | flax_nnx.LinearGeneral):
    own_class = getattr(module, 'dot_general_cls', None)
    if module.dot_general not in (None, lax.dot_general) or own_class:
      return
    if module.promote_dtype is flax_dtypes.promote_dtype:
      module.dot_general = _dot.dot_general()
      module.promote_dtype = _dot.promote_dtype  # pyright: ignore
  elif isinstance(module, flax_nnx.Einsum):
    defaults = (jnp.einsum, flax_dtypes.promote_dtype)
    if (module.einsum_op, module.promote_dtype) == defaults:
      module.einsum_op = _dot.einsum()
      module.promote_dtype = _dot.promote_dtype  # pyright: ignore
