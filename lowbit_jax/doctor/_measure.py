"""Numbers about one quantized tensor, computed on the host.

A block is the elements that share a scale; there are B blocks of n elements.
Elements of float32 are summed in float64, tile by tile, into one accumulator
per block, so that memory does not grow with the tensor and large sums keep
their digits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lowbit_jax import qarray
from lowbit_jax._typing import ArrayLike, PyTree
from lowbit_jax.doctor import _blocks
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray

TILE = 1 << 20  # elements that are in float64 at a time

NAN = math.nan


class Measures(NamedTuple):
  """Measures of a tensor; NaN where undefined, or where the original is needed.

  Attributes:
    qsnr_db: 10 log10(sum x^2 / sum (x - x')^2) over blocks that are finite;
      Inf if nothing changed.
    saturated: share of elements that are off by more than half of the largest
      element step because they lie beyond the range of their block.
    flushed: share of nonzero elements that became zero.
    at_max: share of elements with the largest code of either sign.
    subnormal_scales: share of live blocks with a subnormal scale (8-bit float
      scales).
    end_scales: share of live blocks with scale 2^-127 or 2^127 (E8M0).
    zero_blocks: share of blocks that are zero after quantization.
    lost_blocks: share of blocks that became zero and were not.
    nonfinite_blocks: number of blocks that are NaN.
    nan: number of NaN in the original.
    inf: number of infinities in the original.
    first_nonfinite: index of the first of them, or None.
    rho: smallest and largest ratio of the tensor maximum to a block maximum
      (two-level formats); below 1 the block scale saturates.
    crest: max |x| / rms x.
    spiky_blocks: share of live blocks whose own crest exceeds `crest_limit`.
    block_crest: median crest of live blocks.
    bits_per_element: stored bits over logical elements.
    padding: stored elements over logical elements, minus 1.
  """

  qsnr_db: float = NAN
  saturated: float = NAN
  flushed: float = NAN
  at_max: float = NAN
  subnormal_scales: float = NAN
  end_scales: float = NAN
  zero_blocks: float = NAN
  lost_blocks: float = NAN
  nonfinite_blocks: int = 0
  nan: int = 0
  inf: int = 0
  first_nonfinite: tuple[int, ...] | None = None
  rho: tuple[float, float] = (NAN, NAN)
  crest: float = NAN
  spiky_blocks: float = NAN
  block_crest: float = NAN
  bits_per_element: float = NAN
  padding: float = NAN


def crest_limit(n: int) -> float:
  """1.5 times the largest of n Gaussian numbers, sqrt(2 ln n), over the rms."""
  return 1.5 * math.sqrt(2 * math.log(max(n, 2)))


def measure(q: QArray, x: ArrayLike | None = None) -> Measures:
  """Measures a stored tensor, against its original where there is one.

  Args:
    q: a quantized array with concrete leaves.
    x: the array that was quantized, of the same shape, or None.
  """
  if q.merged:
    whole = qarray.flat(q)
    m = measure(whole, None if x is None else jnp.reshape(x, whole.shape))
    if m.first_nonfinite is None:
      return m
    flat_index = np.ravel_multi_index(m.first_nonfinite, whole.shape)
    first = map(int, np.unravel_index(flat_index, q.shape))
    return m._replace(first_nonfinite=tuple(first))
  # Kinds of blocks: poisoned (NaN), zero after quantization, live.
  sums = _Sums(_blocks.scale_blocks(q), q, x)
  blocks = sums.count > 0
  total = int(blocks.sum())
  poisoned = blocks & (sums.bad > 0)
  clean = blocks & ~poisoned
  zero = clean & (sums.live_codes == 0)
  live = clean & ~zero
  elements = max(float(sums.count[clean].sum()), 1.0)
  # Measures of the stored array.
  out = Measures(
    rho=_stored_rho(q, live),
    at_max=float(sums.at_max[clean].sum()) / elements,
    zero_blocks=_share(zero, total),
    nonfinite_blocks=int(poisoned.sum()),
    bits_per_element=q.bits_per_element,
    padding=sums.padded / q.size - 1,
    **_scale_shares(q, sums, live),
  )
  if x is None:
    return out
  # Measures that compare with the original.
  signal = sums.energy[clean].sum()
  noise = sums.noise[clean].sum()
  nonzero = sums.nonzero[clean].sum()
  lost = zero & (sums.nonzero > 0)
  return out._replace(
    qsnr_db=_decibel(signal, noise),
    saturated=float(sums.saturated[clean].sum()) / elements,
    flushed=_share(sums.flushed[clean], nonzero),
    lost_blocks=_share(lost, total),
    rho=_rho(q, sums.amax, clean & (sums.amax > 0)),
    **_crests(sums, clean),
    **_nonfinite(x),
  )


class _Sums:
  """Sums over the elements of each block, arrays of shape (B,)."""

  def __init__(self, scale: np.ndarray, q: QArray, x):
    elements, values = _decode(q)
    self.padded = elements.size
    layout = _blocks.Layout(q, elements.shape)
    top, step = _blocks.top_and_step(q.fmt)
    self._top, self._limit = top, top + step / 2
    self._has_uneven_ends = bool(_scaling.longer_end(q.fmt.element))
    self._has_offset = q.zero_point is not None or q.minimum is not None
    element_rows = layout.rows(np.asarray(elements))
    value_rows = layout.rows(layout.pad(np.asarray(values)))
    real = layout.rows(layout.pad(np.ones(q.shape, np.bool_)))
    x_rows = None
    if x is not None:
      x = np.asarray(jnp.asarray(x).astype(jnp.float32))
      x_rows = layout.rows(layout.pad(x))
    b, n = element_rows.shape
    self.n = n
    self.count, self.bad, self.live_codes = (np.zeros(b) for _ in range(3))
    self.energy, self.noise, self.amax = (np.zeros(b) for _ in range(3))
    self.nonzero, self.flushed = np.zeros(b), np.zeros(b)
    self.saturated, self.at_max = np.zeros(b), np.zeros(b)
    rows, columns = max(TILE // max(n, 1), 1), max(min(n, TILE), 1)
    for i in range(0, b, rows):
      for j in range(0, n, columns):
        at = slice(i, i + rows), slice(j, j + columns)
        x_tile = None if x_rows is None else x_rows[at]
        tiles = (element_rows[at], value_rows[at], real[at], x_tile)
        self._add(slice(i, i + rows), scale[i : i + rows, None], *tiles)

  def _add(self, at, scale, elements, values, real, x) -> None:
    y = values.astype(np.float64)
    self.count[at] += real.sum(axis=1)
    self.bad[at] += (real & ~np.isfinite(y)).sum(axis=1)
    self.live_codes[at] += (real & (y != 0)).sum(axis=1)
    self.at_max[at] += (real & (np.abs(elements) >= self._top)).sum(axis=1)
    if x is None:
      return
    x = x.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    magnitude = np.abs(x)
    self.energy[at] += np.square(x).sum(axis=1)
    self.noise[at] += np.square(x - y).sum(axis=1)
    self.nonzero[at] += (x != 0).sum(axis=1)
    self.flushed[at] += ((x != 0) & (y == 0)).sum(axis=1)
    step = np.abs(scale)
    beyond = magnitude > self._limit * step
    if self._has_uneven_ends:
      beyond &= np.abs(x - y) > (self._limit - self._top) * step
    if self._has_offset:  # the range is not symmetric
      beyond = np.abs(x - y) > step
    self.saturated[at] += (beyond & (step > 0)).sum(axis=1)
    amax = magnitude.max(axis=1, initial=0)
    self.amax[at] = np.maximum(self.amax[at], amax)


@jax.jit
def _decode(q: QArray):
  """Elements of the padded shape, and values."""
  return qarray.element_values(q), qarray.dequantize(q, jnp.float32)


def qsnr_db(x: ArrayLike, y: ArrayLike) -> float:
  """10 log10(sum x^2 / sum (x - y)^2) where x is finite and y is not NaN.

  -Inf where a finite x became Inf.
  """
  x = np.ravel(np.asarray(jnp.asarray(x).astype(jnp.float32)))
  y = np.ravel(np.asarray(y))
  signal = noise = 0.0
  for i in range(0, x.size, TILE):
    a, b = (v[i : i + TILE].astype(np.float64) for v in (x, y))
    finite = np.isfinite(a) & ~np.isnan(b)
    signal += float(np.square(a[finite]).sum())
    noise += float(np.square(a[finite] - b[finite]).sum())
  return _decibel(signal, noise)


def _scale_shares(q: QArray, sums: _Sums, live) -> dict:
  """Shares of scales at the limits of their format."""
  fmt = q.fmt
  if fmt.scale is None or not _scaling.is_coded(fmt.scale):
    return {}
  codes = np.ravel(np.asarray(q.scale))
  total = int(live.sum())
  if fmt.has_exponent_scale:
    ends = (codes == 0) | (codes == fmt.scale.code_max)
    return {'end_scales': _share(ends & live, total)}
  subnormal = (codes > 0) & (codes < 1 << fmt.scale.mantissa_bits)
  return {'subnormal_scales': _share(subnormal & live, total)}


def _stored_rho(q: QArray, live) -> tuple[float, float]:
  """Range of rho from the block scales, where there is no original."""
  scale = q.fmt.scale
  if scale is None or not q.fmt.tensor_scale or not live.any():
    return NAN, NAN
  rho = scale.max / np.ravel(_blocks.scale_values(q))[live]
  return float(rho.min()), float(rho.max())


def _rho(q: QArray, amax, live) -> tuple[float, float]:
  """Range of tensor maximum over block maximum, from the original."""
  fmt = q.fmt
  if q.tensor_scale is None or q.scale is None or not live.any():
    return NAN, NAN
  outer = np.asarray(q.tensor_scale, np.float64)
  top = np.ravel(np.broadcast_to(outer, q.scale.shape))
  rho = top * fmt.element.max * (fmt.scale.max if fmt.scale else 1.0)
  rho = rho[live] / amax[live]
  return float(rho.min()), float(rho.max())


def _crests(sums: _Sums, clean) -> dict:
  live = clean & (sums.amax > 0)
  if not live.any():
    return {}
  rms = math.sqrt(sums.energy[live].sum() / sums.count[clean].sum())
  block_crests = sums.amax[live] / np.sqrt(sums.energy[live] / sums.count[live])
  return {
    'crest': float(sums.amax[live].max()) / rms if rms else NAN,
    'block_crest': float(np.median(block_crests)),
    'spiky_blocks': float(np.mean(block_crests > crest_limit(sums.n))),
  }


def _nonfinite(x) -> dict:
  x = np.asarray(jnp.asarray(x).astype(jnp.float32))
  nan, inf = int(np.isnan(x).sum()), int(np.isinf(x).sum())
  first = None
  if nan or inf:
    flat = int(np.argmax(~np.isfinite(x.ravel())))
    first = tuple(int(i) for i in np.unravel_index(flat, x.shape))
  return {'nan': nan, 'inf': inf, 'first_nonfinite': first}


def _decibel(signal: float, noise: float) -> float:
  if signal == 0:
    return NAN
  if math.isinf(noise):
    return -math.inf
  return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _share(part, whole) -> float:
  return float(np.sum(part)) / float(whole) if whole else 0.0


def is_concrete(x: PyTree) -> bool:
  """Whether the values of an array or QArray are known."""
  leaves = jax.tree.leaves(x)
  return all(
    isinstance(v, jax.Array | np.ndarray | np.generic)
    and not isinstance(v, Tracer)
    for v in leaves
  )
