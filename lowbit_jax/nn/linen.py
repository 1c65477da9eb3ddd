"""Linen: modules for fake quantization and packed weights.

A parameter tree from `nn.quantize_params` goes to `model.apply` of unmodified
modules as it is: they decode a weight before they use it. To contract packed
weights instead, without decoding all of them,

  - give a Dense or DenseGeneral `dot_general=nn.dot_general()` and
    `promote_dtype=nn.promote_dtype`, or
  - call `lowbit_jax.packed(model.apply)`, for any unmodified model.

- `Dense`: `linen.Dense` on arrays with fake quantization, or on packed QArrays.
- `DotGeneral`: `nn.dot_general` with random rounding, for `dot_general_cls`
  arguments.
- `Einsum`: `linen.Einsum` on arrays with fake quantization, or on packed
  QArrays.
- `Embed`: `linen.Embed` that decodes only the rows that it looks up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax.linen import module as flax_module

from lowbit_jax import _serialization
from lowbit_jax._typing import DotDims, DTypeLike, Precision
from lowbit_jax.nn import _dot, _embed
from lowbit_jax.nn._view import Viewed
from lowbit_jax.recipe import QuantSpec

_serialization.know_all()

RNG = 'quant'


class DotGeneral(flax_linen.Module):
  """`nn.dot_general` with random rounding, for `dot_general_cls` arguments.

  Keys come from the rng stream 'quant': `model.apply(variables, x,
  rngs={'quant': key})`.

  Attributes:
    lhs: what is done to activations, None for nothing.
    rhs: what is done to weights.

  Examples:
    `linen.Dense(8, dot_general_cls=functools.partial(DotGeneral, rhs=spec))`
  """

  lhs: QuantSpec | None = None
  rhs: QuantSpec | None = None

  def __call__(
    self,
    lhs: Viewed,
    rhs: Viewed,
    dimension_numbers: DotDims,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
  ) -> jax.Array:
    specs = _dot.Specs(self.lhs, self.rhs)
    return _dot.contract(
      lhs,
      rhs,
      dimension_numbers,
      specs,
      key=_key(self, specs),
      precision=precision,
      preferred_element_type=preferred_element_type,
      **kwargs,
    )


class Dense(flax_linen.Dense):
  """`linen.Dense` on arrays with fake quantization, or on packed QArrays.

  Its parameters have the names and shapes of those of `linen.Dense`.

  Attributes:
    lhs: what is done to the inputs, None for nothing.
    rhs: what is done to a kernel that is an array.
  """

  lhs: QuantSpec | None = None
  rhs: QuantSpec | None = None
  promote_dtype: Any = _dot.promote_dtype

  def __post_init__(self) -> None:
    if self.dot_general is None and self.dot_general_cls is None:
      if _dot.Specs(self.lhs, self.rhs).need_key:
        cls = functools.partial(DotGeneral, self.lhs, self.rhs)
        self.dot_general_cls = cls
      else:
        self.dot_general = _dot.dot_general(self.lhs, self.rhs)
    super().__post_init__()


class Einsum(flax_linen.Einsum):
  """`linen.Einsum` on arrays with fake quantization, or on packed QArrays.

  Attributes:
    lhs: what is done to the inputs, None for nothing.
    rhs: what is done to a kernel that is an array.
  """

  lhs: QuantSpec | None = None
  rhs: QuantSpec | None = None
  promote_dtype: Any = _dot.promote_dtype

  @flax_linen.compact
  def __call__(
    self, inputs: jax.Array, einsum_str: str | None = None
  ) -> jax.Array:
    subscripts = flax_module.merge_param(
      'einsum_str', self.einsum_str, einsum_str
    ).replace(' ', '')
    kernel = self.param(
      'kernel', self.kernel_init, self.shape, self.param_dtype
    )
    bias = None
    shape = ()
    if self.use_bias:
      own, shape = self._get_bias_shape(subscripts, inputs, kernel)
      bias = self.param('bias', self.bias_init, own, self.param_dtype)
    inputs, kernel, bias = self.promote_dtype(
      inputs, kernel, bias, dtype=self.dtype
    )
    specs = _dot.Specs(self.lhs, self.rhs)
    y = _dot.contract_einsum(
      subscripts,
      inputs,
      kernel,
      specs,
      key=_key(self, specs),
      precision=self.precision,
      preferred_element_type=self.preferred_element_type,
    )
    return y if bias is None else y + jnp.reshape(bias, shape)


class Embed(flax_linen.Embed):
  """`linen.Embed` that decodes only the rows that it looks up.

  Attributes:
    lhs: what is done to the queries of `attend`, None for nothing.
    rhs: what is done to a table that is an array.
  """

  lhs: QuantSpec | None = None
  rhs: QuantSpec | None = None
  promote_dtype: Any = _dot.promote_dtype

  def __call__(self, inputs: jax.Array) -> jax.Array:
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise ValueError(f'{inputs.dtype=} must be an integer type')
    (table,) = self.promote_dtype(
      self.embedding, dtype=self.dtype, inexact=False
    )
    specs = _dot.Specs(None, self.rhs)
    key = _key(self, specs)
    return _embed.take_rows(table, inputs, None, self.rhs, key)

  def attend(self, query: jax.Array) -> jax.Array:
    query, table = self.promote_dtype(query, self.embedding, dtype=self.dtype)
    specs = _dot.Specs(self.lhs, self.rhs)
    return _embed.attend(query, table, specs, _key(self, specs))


def _key(module: flax_linen.Module, specs: _dot.Specs):
  return module.make_rng(RNG) if specs.need_key else None
