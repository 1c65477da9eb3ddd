"""What `jax.export` writes of the pytrees of stored weights, as JSON."""

import json

import jax.export
import ml_dtypes
import numpy as np

from lowbit_jax import formats
from lowbit_jax._low_rank import Adapter, LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax.io import _transforms
from lowbit_jax.qarray import QArray


def _serialize_static(static) -> bytes:
  fmt, axis, pad, dtype, merged = static
  description = [formats.to_dict(fmt), axis, pad, np.dtype(dtype).name, merged]
  return json.dumps(description).encode()


def _deserialize_static(data: bytes):
  fmt, axis, pad, dtype, merged = json.loads(data)
  axis = tuple(axis) if isinstance(axis, list) else axis
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  return formats.from_dict(fmt), axis, tuple(pad), dtype, tuple(merged)


jax.export.register_pytree_node_serialization(
  QArray,
  serialized_name='lowbit_jax.QArray',
  serialize_auxdata=_serialize_static,
  deserialize_auxdata=_deserialize_static,
)
# Of these only numbers are static.
for _cls in (Transformed, LowRank, Adapter, *_transforms.CLASSES.values()):
  jax.export.register_pytree_node_serialization(
    _cls,
    serialized_name=f'lowbit_jax.{_cls.__name__}',
    serialize_auxdata=lambda numbers: json.dumps(numbers).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
  )
