"""Weights in the order in which kernels read them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _explicit, formats, qarray
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics._codec import blocked
from lowbit_jax.qarray import QArray, check_qarray
from lowbit_pallas import _support
from lowbit_pallas.wq_matmul import prepack as _weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepacked:
  """A quantized (k, n) matrix as a kernel reads it. Made by `prepack`.

  `dot`, `dot_general` and `einsum` take it in place of the QArray on the right,
  and `unpack` gives that back. It is a pytree of uint8 and scale leaves.

  Attributes:
    weight: planes of codes, scales and zero points, in tiles of K.
    tensor_scale: float32 (1, 1), or None.
    fmt: the block format.
    pad: rows of padding at the end of K.
    dtype: dtype of the array that this one stands for.
  """

  weight: _weights.Prepacked
  tensor_scale: jax.Array | None
  fmt: BlockFormat = dataclasses.field(metadata={'static': True})
  pad: int = dataclasses.field(metadata={'static': True})
  dtype: np.dtype = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, int]:
    return self.weight.k, self.weight.n

  @property
  def ndim(self) -> int:
    return 2

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves on the device."""
    leaves = jax.tree.leaves(self)
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)

  def __repr__(self) -> str:
    return (
      f'Prepacked({self.fmt}, shape={self.shape}, dtype={self.dtype.name},'
      f' tile={self.weight.tile}, layout={self.weight.layout!r})'
    )


def prepack(q: QArray, *, implementation: str) -> Prepacked:
  """Reorders a weight once, so that a kernel need not do so in every call.

  Args:
    q: (k, n) QArray in blocks along k; stacks by vmap.
    implementation: the kernel it is for, 'tpu' or 'mosaic_gpu'.

  Returns:
    The same numbers; `unpack` is the inverse, bit for bit. On explicit mesh
    axes they are whole on every device.

  Examples:
    >>> import jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> q = lowbit.quantize(jnp.ones((512, 8)), lowbit.formats.mxfp4, axis=0)
    >>> lowbit.prepack(q, implementation='tpu')
    Prepacked(mxfp4, shape=(512, 8), dtype=float32, tile=512, layout='kn')
  """
  check_qarray(q)
  names = tuple(_support.PLATFORMS)
  if implementation not in names:
    raise ValueError(f'{implementation=} is not one of {names}')
  if q.ndim != 2 or q.axes != (-2,):
    raise ValueError(
      f'q has shape {q.shape} and blocks along axis {q.axis}; prepack takes'
      ' (k, n) in blocks along axis -2, stacks by vmap'
    )
  if q.fmt.minimum or q.fmt.scale_blocks:
    raise ValueError(
      f'{q.fmt} has minima or two levels of scales, which kernels do not read:'
      ' give q to dot as it is'
    )
  order = functools.partial(weight, implementation=implementation)
  weight_ = _explicit.automatic(order, _explicit.gathered, q)
  return Prepacked(weight_, q.tensor_scale, q.fmt, q.pad[0], q.dtype)


def unpack(p: Prepacked) -> QArray:
  """The QArray that `prepack` was given."""
  if not isinstance(p, Prepacked):
    raise TypeError(f'p must be Prepacked, got {type(p).__name__}')
  codes, scale, zero_point = _weights.unpack(p.weight)
  if p.fmt.scale == formats.float16:
    scale = scale.astype(jnp.float16)
  return QArray(
    codes, scale, p.tensor_scale, zero_point, p.fmt, -2, (p.pad,), p.dtype
  )


def weight(q: QArray, implementation: str) -> _weights.Prepacked:
  """The leaves of a (k, n) QArray, but its tensor scale, for a kernel."""
  k, _ = q.shape
  q = qarray.one_level(q)
  scale = q.scale
  if q.fmt.scale == formats.float16:  # which TPUs do not have
    scale = scale.astype(jnp.float32)
  spec = blocked(q.fmt)
  config = _support.find('wq_matmul', implementation).load_config()
  return _weights.prepack(
    q.codes,
    scale,
    q.zero_point,
    spec,
    tile=config.tile_rows(k, spec),
    k=k,
    layout=config.LAYOUT,
  )
