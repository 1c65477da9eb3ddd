"""How Linen sees a stored weight, such as a QArray: as boxed metadata around an
array.

Linen compares the leaves of a parameter with the shapes that its initializer
makes, and packed codes have another shape. What it does first is to unbox
`AxisMetadata`. So a QArray is declared to be such a box, and unboxing gives an
`ArrayView`: one leaf, of the logical shape, that turns into an array where one
is needed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lowbit_jax import qarray
from lowbit_jax._low_rank import LowRank, Stored, is_operand
from lowbit_jax._transformed import Transformed
from lowbit_jax._typing import DTypeLike, PyTree
from lowbit_jax.ops._operand import Operand
from lowbit_jax.qarray import QArray


@qarray.with_dense_operators
class ArrayView:
  """A stored weight that looks like an array: not a pytree, dense when used.

  Attributes:
    q: the QArray, Transformed or LowRank.
  """

  def __init__(self, q: Stored) -> None:
    self.q = q

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q.shape

  @property
  def ndim(self) -> int:
    return self.q.ndim

  @property
  def size(self) -> int:
    return self.q.size

  @property
  def dtype(self) -> np.dtype:
    return self.q.dtype

  @property
  def T(self) -> jax.Array:
    return jnp.asarray(self).T

  def astype(self, dtype: DTypeLike) -> jax.Array:
    return qarray.dequantize(self.q, dtype)

  def reshape(self, *shape: Any) -> jax.Array:
    return jnp.asarray(self).reshape(*shape)

  def __getitem__(self, index: Any) -> jax.Array:
    return jnp.asarray(self)[index]

  def __jax_array__(self) -> jax.Array:
    return qarray.dequantize(self.q)

  def __array__(
    self, dtype: DTypeLike | None = None, copy: bool | None = None
  ) -> np.ndarray:
    return self.q.__array__(dtype, copy)

  def __repr__(self) -> str:
    return f'ArrayView({self.q!r})'


Viewed = Operand | ArrayView  # of a product


def unview(x: Any) -> Any:
  """The weight behind a view; anything else as it is."""
  return x.q if isinstance(x, ArrayView) else x


def unbox(tree: PyTree) -> PyTree:
  """`flax.linen.unbox` that leaves QArrays packed.

  Linen takes a QArray for a box around an array, so that its own `unbox` opens
  QArrays as well, into views that only a module can use: `jax.jit` and
  `io.save` refuse them.

  Args:
    tree: variables of a Linen model; boxes such as `nn.Partitioned` around
      arrays and QArrays, and views of QArrays, are opened.

  Returns:
    The tree with arrays and QArrays in place of boxes and views.

  Examples:
    >>> import jax.numpy as jnp
    >>> from flax import linen
    >>> from lowbit_jax import formats, nn
    >>> box = linen.Partitioned(jnp.ones((64, 8)), (None, 'model'))
    >>> params = nn.quantize_params({'kernel': box}, None, formats.mxfp4)
    >>> nn.unbox(params)['kernel'].shape
    (64, 8)
  """

  def is_box(x):
    return isinstance(x, ArrayView | meta.AxisMetadata)

  def content(x):
    if is_operand(x) or isinstance(x, ArrayView):
      return unview(x)
    if isinstance(x, meta.AxisMetadata):
      # QArrays have no value that a constraint could be put on as a whole.
      value = getattr(x, 'value', None)
      return content(value if is_operand(value) else x.unbox())
    return x

  return jax.tree.map(content, tree, is_leaf=is_box)


def _same_axes(self: Any, index: int, params) -> Any:
  """Adding or removing the axis of stacked layers: only a leading one, because
  block axes count from the end."""
  del params
  if index != 0:
    raise ValueError(
      f'a quantized parameter cannot be lifted over axis {index}: stack the'
      ' layers along axis 0 (variable_axes of nn.scan or nn.vmap)'
    )
  return self


_BOX = {
  'unbox': lambda self: ArrayView(self),
  'replace_boxed': lambda self, value: value,
  'add_axis': _same_axes,
  'remove_axis': _same_axes,
}


def register() -> None:
  """Declares stored weights `AxisMetadata`; more than once does no harm."""
  for cls in (QArray, Transformed, LowRank):
    for name, function in _BOX.items():
      setattr(cls, name, function)
    meta.AxisMetadata.register(cls)


register()
