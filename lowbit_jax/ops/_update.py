"""update_slice: new numbers in a part of a quantized array."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowbit_jax import _explicit, qarray
from lowbit_jax._typing import ArrayLike, Key, ScaleRule, as_tuple
from lowbit_jax.ops._quantize import quantize
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith.codec import RANDOM_BITS


def update_slice(
  q: QArray,
  x: ArrayLike,
  start: Sequence[Any],
  *,
  scale_rule: ScaleRule | None = None,
  rounding: str = 'nearest_even',
  key: Key | None = None,
  random_bits: int = RANDOM_BITS,
) -> QArray:
  """`lax.dynamic_update_slice` on a QArray: x is quantized and put at `start`.

  The blocks of x get scales of their own. A tensor scale belongs to all of q:
  x is encoded with it, so that no other number changes, and saturates beyond
  `tensor_scale * fmt.scale.max * fmt.element.max`. So make q from numbers as
  large as those that will come, or with `quantize(..., tensor_scale=)`. To
  write the leaves of one QArray into those of another would decode all of them
  with the newest tensor scale.

  Args:
    q: a quantized array, a cache for example.
    x: float16, bfloat16 or float32, of the rank of `q`.
    start: where x begins, an int for each axis, traced or not; as in
      `lax.dynamic_update_slice`, x is moved to where it fits. Along a block
      axis a multiple of the block, and no tracer unless x has all of the axis.
    scale_rule: as in `quantize`; also `rounding`, `key`, `random_bits`.

  Returns:
    A QArray like `q`. It has no gradient with respect to `x`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax import formats, ops
    >>> cache = ops.quantize(jnp.full((8, 64), 3.0), formats.mxfp8_e4m3)
    >>> cache = ops.update_slice(cache, jnp.ones((1, 64)), (5, 0))
    >>> ops.dequantize(cache)[4:7, 0].tolist()
    [3.0, 1.0, 3.0]
  """
  qarray.check_qarray(q)
  if q.merged:
    raise ValueError(
      f'blocks of {q!r} span axes {qarray.merged_axes(q)} together; quantize'
      ' along one axis to update parts'
    )
  x = jnp.asarray(x)
  if x.ndim != q.ndim or any(
    n > m for n, m in zip(x.shape, q.shape, strict=True)
  ):
    raise ValueError(
      f'x.shape={x.shape} must have the rank of q.shape={q.shape} and fit into'
      ' it'
    )
  start = as_tuple('start', start)
  if len(start) != q.ndim:
    raise ValueError(f'{start=} must have one int for each axis of {q.shape}')
  if q.tensor_scale is not None and q.tensor_scale.size != 1:
    raise ValueError(
      f'tensor_scale.shape={q.tensor_scale.shape}: q is a stack of tensors; use'
      ' jax.vmap(update_slice)'
    )
  for k in range(len(q.axes)):
    start = _check_block_axis(q, k, x.shape, start)
  new = quantize(
    x,
    q.fmt,
    axis=q.axis,
    scale_rule=scale_rule,
    rounding=rounding,
    key=key,
    random_bits=random_bits,
    tensor_scale=q.tensor_scale,
  )

  return _explicit.automatic(_with_part, _as_leaves, q, new, start)


def _with_part(q: QArray, new: QArray, start) -> QArray:
  def put(old, part):
    """The part of a leaf, at the same fraction of each axis."""
    if old is None:
      return None
    at = list(start)
    if isinstance(old, QArray):  # scales, one for each block
      (axis,), (block,) = q.axes, q.fmt.block
      at[axis] //= block
      return _with_part(old, part, at)
    for axis in q.axes:
      at[axis] = start[axis] * old.shape[axis] // max(_padded(q, axis), 1)
    at = [jnp.asarray(i, jnp.int32) for i in at]  # of one dtype
    return jax.lax.dynamic_update_slice(old, part, at)

  return qarray.replace(
    q,
    codes=put(q.codes, new.codes),
    scale=put(q.scale, new.scale),
    zero_point=put(q.zero_point, new.zero_point),
    minimum=put(q.minimum, new.minimum),
  )


def _as_leaves(result: QArray, q: QArray, *rest) -> QArray:
  del result, rest
  return jax.tree.map(lambda leaf: PartitionSpec(*_explicit.parts(leaf)), q)


def _padded(q: QArray, axis: int) -> int:
  return q.shape[axis] + q.pad[q.axes.index(axis)]


def _check_block_axis(q: QArray, k: int, shape, start: tuple) -> tuple:
  """`start` with that of block axis number `k` known, or an error."""
  axis = q.axes[k]
  size, full, first = shape[axis], q.shape[axis], start[axis]
  if size == full:
    first = 0
  unit = qarray.unit(q, k) if q.fmt.block[k] or q.scale is None else full
  if not isinstance(first, int | np.integer):
    raise TypeError(
      f'start={start}: that of block axis {axis} must be an int, not'
      f' {type(first).__name__}, unless x has all of the axis'
    )
  end = first + size
  if (
    not 0 <= first <= end <= full or first % unit or end % unit and end != full
  ):
    raise ValueError(
      f'start={start} with x.shape={shape}: along block axis {axis} of {q.fmt}'
      f' x must begin and end at multiples of {unit} in 0 ... {full}'
    )
  known = list(start)
  known[axis] = int(first)
  return tuple(known)
