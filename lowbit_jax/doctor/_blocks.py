"""NumPy views of a quantized array as rows of one block each."""

import math
from collections.abc import Sequence

import numpy as np

from lowbit_jax import qarray
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray


class Layout:
  """Rearranges arrays of the padded shape into rows of one block each."""

  def __init__(self, q: QArray, padded: Sequence[int]) -> None:
    self._padded = padded
    self._view, inner = _view(q, padded)
    outer = [i for i in range(len(self._view)) if i not in inner]
    self._order = (*outer, *inner)
    self._n = math.prod(self._view[i] for i in inner)

  def pad(self, x: np.ndarray) -> np.ndarray:
    """`x` with zeros up to the padded shape."""
    widths = [(0, p - n) for p, n in zip(self._padded, x.shape, strict=True)]
    return np.pad(x, widths) if any(w[1] for w in widths) else x

  def rows(self, x: np.ndarray) -> np.ndarray:
    """`x` of the padded shape as (B, n)."""
    blocks = x.reshape(self._view).transpose(self._order)
    return blocks.reshape(-1, self._n)


def _view(q: QArray, padded):
  """As `qarray.split_blocks`; a tensor scale alone makes one large block."""
  if q.fmt.scale is not None or q.tensor_scale is None:
    return qarray.split_blocks(padded, q.fmt, q.axes)
  shared = tuple(i for i, n in enumerate(q.tensor_scale.shape) if n == 1)
  return tuple(padded), shared


def scale_blocks(q: QArray) -> np.ndarray:
  """The whole scale of each block as float64 of shape (B,)."""
  outer = 1.0
  if q.tensor_scale is not None:
    outer = np.asarray(q.tensor_scale, np.float64)
  if q.scale is None:
    return np.ravel(outer)
  return np.ravel(scale_values(q) * outer)


def scale_values(q: QArray) -> np.ndarray:
  """Block scales as float64 numbers, in the shape of the leaf."""
  scale, fmt = np.asarray(q.scale), q.fmt.scale  # of two levels the values
  if fmt is not None and _scaling.is_coded(fmt):
    return fmt.values()[scale]
  return scale.astype(np.float64)


def top_and_step(fmt: BlockFormat) -> tuple[float, float]:
  """The largest element and its distance to the next smaller magnitude."""
  values = fmt.element.values()
  values = np.unique(np.abs(values[np.isfinite(values)]))
  values = values[values <= fmt.element.max]
  return float(values[-1]), float(values[-1] - values[-2])
