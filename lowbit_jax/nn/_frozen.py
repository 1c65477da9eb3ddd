"""The NNX variable that holds a quantized weight."""

from typing import Any

import jax
from flax import nnx

from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._tree import shardings
from lowbit_jax.qarray import QArray

nnx.register_data_type(QArray)
nnx.register_data_type(Transformed)


class QuantizedParam(nnx.Variable):
  """A quantized weight. Not a Param: gradients and optimizers pass it by.

  Where NNX puts a shape with a sharding in place of an abstract weight
  (`nnx.eval_shape` on a mesh, `nnx.as_abstract`), the leaves of the QArray get
  their part of the sharding. A weight may also be an `ops.Transformed`.
  """

  def set_value(self, value: Any, **kwargs: Any) -> None:
    super().set_value(_with_sharding(self.get_raw_value(), value), **kwargs)

  def replace(self, *args: Any, **kwargs: Any) -> Any:
    old = self.get_raw_value()
    args = tuple(_with_sharding(old, value) for value in args)
    return super().replace(*args, **kwargs)


def _with_sharding(old: Any, value: Any) -> Any:
  """`old` with the sharding of `value`, where that is no more than a shape."""
  if not is_quantized(old) or not isinstance(value, jax.ShapeDtypeStruct):
    return value
  if value.sharding is None:
    return old

  def place(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, old, shardings(old, value.sharding))


def frozen(variable: nnx.Variable, q: QArray | Transformed) -> QuantizedParam:
  """A `QuantizedParam` with the metadata of another variable.

  Args:
    variable: the variable that it takes the place of.
    q: its quantized value.
  """
  metadata = variable.get_metadata(exclude_required=True)
  return QuantizedParam(q, eager_sharding=False, **metadata)
