"""The NNX variable that holds a quantized weight."""

from flax import nnx

from lowbit_jax.qarray import QArray

nnx.register_data_type(QArray)


class QuantizedParam(nnx.Variable):
  """A quantized weight. Not a Param: gradients and optimizers pass it by."""


def frozen(variable: nnx.Variable, q: QArray) -> QuantizedParam:
  """A `QuantizedParam` with the metadata of another variable.

  Args:
    variable: the variable that it takes the place of.
    q: its quantized value.
  """
  metadata = variable.get_metadata(exclude_required=True)
  return QuantizedParam(q, eager_sharding=False, **metadata)
