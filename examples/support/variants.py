"""A language model in other formats than those of its checkpoint."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

import lowbit_jax as lowbit
from lowbit_jax.formats import BlockFormat
from lowbit_jax.recipe import QuantSpec

# Linear layers of the blocks, a router aside, and what the head may be.
LINEARS = re.compile(r'stacks/\d+/(attention|mlp)/(?!router)\w+/kernel')
HEADS = re.compile(r'head/kernel|embed/embedding')


def decoded(model: nnx.Module) -> nnx.Module:
  """A copy of a model whose parameters are float32 arrays."""
  copy = nnx.clone(model)
  values = {
    path: lowbit.dequantize(value, jnp.float32)
    for path, value in _parameters(copy).items()
    if isinstance(value, lowbit.QArray)
  }
  return lowbit.nn.nnx.assign(copy, values)


def quantized(
  model: nnx.Module,
  fmt: BlockFormat,
  *,
  head: bool = False,
  scale_rule: str | None = None,
) -> nnx.Module:
  """A copy of a float model whose linear layers are packed.

  Args:
    model: that `decoded` gave.
    fmt: of their kernels.
    head: whether the head, and the embedding where it is the same, is too.
    scale_rule: in place of that of the format.
  """

  def select(path, value):
    del value
    return bool(LINEARS.fullmatch(path) or (head and HEADS.fullmatch(path)))

  def axis(path, value):  # experts are no layers that the library knows
    return -2 if LINEARS.fullmatch(path) and value.ndim > 3 else None

  return lowbit.nn.nnx.quantize(
    nnx.clone(model), select, fmt, axis=axis, scale_rule=scale_rule
  )


def with_activations(model: nnx.Module, fmt: BlockFormat) -> nnx.Module:
  """A copy of a model whose linear layers round what they are given."""
  copy = nnx.clone(model)
  product = lowbit.nn.dot_general(lhs=QuantSpec(fmt))
  for path, module in nnx.iter_modules(copy):
    name = '/'.join(map(str, (*path, 'kernel')))
    if isinstance(module, nnx.Linear) and LINEARS.fullmatch(name):
      module.dot_general = product
      module.promote_dtype = lowbit.nn.promote_dtype
  return copy


def nbytes(model: nnx.Module) -> int:
  """Bytes of all parameters."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _parameters(model: nnx.Module) -> dict[str, jax.Array | lowbit.QArray]:
  return {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }
