"""Values that a walk follows: an array or a stored operand, and its site.

Inside a walk a weight is such a value until something other than a view or a
product uses it. A pytree, so that it passes through the control flow of JAX.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import qarray
from lowbit_jax._low_rank import Stored, is_operand
from lowbit_jax.ops import _operand


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['content'],
  meta_fields=['site', 'is_narrowed', 'is_part'],
)
@dataclasses.dataclass(frozen=True)
class Named:
  """A value with a site.

  Attributes:
    content: an array, or what is stored in its place.
    site: the path of the weight that it is, or is a view of; '' if unknown.
    is_narrowed: whether a cast to a narrower dtype was left out so far.
    is_part: whether it holds rows that were looked up, not the whole weight.
  """

  content: Any
  site: str
  is_narrowed: bool = False
  is_part: bool = False

  @property
  def shape(self) -> tuple[int, ...]:
    return self.content.shape

  @property
  def dtype(self) -> np.dtype:
    return self.content.dtype

  @property
  def is_stored(self) -> bool:
    return is_stored(self.content)

  def of(self, content: Any, **changes: Any) -> 'Named':
    """The same site with another content."""
    return dataclasses.replace(self, content=content, **changes)


def is_stored(x: object) -> bool:
  """Whether `x` is an operand that stands for a dense array."""
  return _operand.is_stored(x) or is_operand(x)


def is_named(x: object) -> bool:
  return isinstance(x, Named)


def is_packed(x: object) -> bool:
  """Whether `x` is a Named with a stored operand."""
  return isinstance(x, Named) and x.is_stored


def dense(x: Any) -> Any:
  """The array that a value is or stands for."""
  if not isinstance(x, Named):
    return x
  return decoded(x.content) if x.is_stored else x.content


def decoded(stored: Any) -> jax.Array:
  return qarray.dequantize(_operand.unpacked(stored))


def viewed(x: Named) -> Stored:
  """The content as views see it: of a prepacked weight its QArray."""
  return _operand.unpacked(x.content)


def decoded_bytes(x: Named) -> int:
  """Bytes of the dense array."""
  return int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a value."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def sites(values: Iterable[Any]) -> set[str]:
  """The sites among values."""
  return {x.site for x in values if isinstance(x, Named) and x.site}
