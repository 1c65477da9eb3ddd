"""What is recorded of the activations of a model: values for `record`.

An observer looks at the operands of one product at a time and makes an
observation of it, a pytree of arrays; it also merges two observations of one
site, such as those of two batches. `absmax`, `moments`, `gram` and `samples`
measure activations per input channel of the weight that they meet, `several`
makes a dict of some of these:

  observer = observers.several(amax=observers.absmax, gram=observers.gram)

They record products that have a weight and take its activations as rows: see
`rows`. Observations have no derivative.

Shapes: K is the number of input channels, the axes of the weight that are
contracted, flattened in the order that they have in the weight. `members` are
the matrices that one weight holds: batch axes of a dot_general, groups of a
ragged_dot or of a convolution; without them there are no such axes.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax import _explicit
from lowbit_jax._low_rank import is_operand
from lowbit_jax._typing import PyTree, Shape
from lowbit_jax._walk import Observer as Observer, Product as Product

# Rows of a group of a ragged_dot that are measured at a time.
_WINDOW = 128
# Dtypes whose products are summed in float32 without a cast of the operands.
_AS_THEY_ARE = ('float32', 'bfloat16', 'float16')


class Rows(NamedTuple):
  """The activations of a product, as rows of its input channels.

  Attributes:
    x: (*members, rows, K), of the dtype of the activations where that is
      float32, bfloat16 or float16, else float32. Of a ragged_dot (m, K), in
      which the rows of its groups follow each other.
    sizes: None, or of a ragged_dot (groups,), how many rows each group has.
      Rows after the last group do not count.
  """

  x: jax.Array
  sizes: jax.Array | None = None

  def reduce(self, measure: Callable, merge: Callable) -> PyTree:
    """The observation of the rows of each member.

    Args:
      measure: of rows (r, K) and how many of them count, int32; those after
        are zeros. Returns the observation of one member.
      merge: as in `Observer`, for the rows of a group that are not measured
        together.

    Returns:
      What `measure` returns, with the axes of the members in front.
    """
    if self.sizes is None:
      count = jnp.int32(self.x.shape[-2])
      for _ in self.x.shape[:-2]:
        measure = jax.vmap(measure, (0, None))
      return measure(self.x, count)
    return _of_groups(self.x, self.sizes, measure, merge)


def rows(product: Product, *operands: Any) -> Rows | None:
  """The operand of a product that is not the weight, as rows of its channels.

  The product is that of these rows with the weight as (*members, K, N), whose
  axes keep the order that they have in the weight:

  - dot_general: contracted axes become K and free axes rows.
  - ragged_dot: groups are members.
  - convolutions: rows are patches, one for each output position, with zeros
    for the padding. K is (*window, in) for a kernel whose axes are
    (*window, in, out), and (in, *window) for one of (out, in, *window).
    Groups are members. Patches are copies: for a window of 3 by 3 that moves
    by one, they take nine times the memory of the activations.

  Args:
    product: what is multiplied.
    *operands: lhs, rhs and the group sizes of a ragged_dot. The operand that
      is not the weight may be stored as well.

  Returns:
    None where there are no such rows: without a weight, with a weight on the
    left of a ragged_dot or a convolution, for complex numbers, and for other
    operations.
  """
  lhs, rhs, *sizes = operands
  x = lhs if product.weight == 'rhs' else rhs
  if product.weight is None or jnp.issubdtype(x.dtype, jnp.complexfloating):
    return None
  x = lax.stop_gradient(jnp.asarray(x) if is_operand(x) else x)
  x = x if x.dtype.name in _AS_THEY_ARE else x.astype(jnp.float32)
  match product.op, product.weight:
    case 'dot_general', weight:
      dims = product.params['dimension_numbers']
      return Rows(_dot_rows(x, dims, weight))
    case 'ragged_dot', 'rhs':
      return Rows(x, *sizes)
    case 'conv_general_dilated', 'rhs':
      return Rows(_patches(x, product.rhs.shape, product.params))
  return None


def _dot_rows(x: jax.Array, dims: Any, weight: str) -> jax.Array:
  own, other = (0, 1) if weight == 'rhs' else (1, 0)
  inputs, members = (_in_order(axes[own], axes[other]) for axes in dims)
  free = [a for a in range(x.ndim) if a not in (*inputs, *members)]
  shape = [x.shape[a] for a in members]
  count, channels = (_size(x, axes) for axes in (free, inputs))
  return x.transpose(*members, *free, *inputs).reshape(*shape, count, channels)


def _in_order(axes: Shape, weight_axes: Shape) -> list[int]:
  """Axes of activations in the order of the axes of the weight they meet."""
  pairs = sorted(zip(weight_axes, axes, strict=True))
  return [axis for _, axis in pairs]


def _patches(
  x: jax.Array, kernel: Shape, params: Mapping[str, Any]
) -> jax.Array:
  """What a convolution multiplies with its kernel, place by place."""
  _, kernel_spec, _ = params['dimension_numbers']
  by_batch, by_feature = (
    params[f'{kind}_group_count'] for kind in ('batch', 'feature')
  )
  n, c, *space = (x := _windows(x, kernel, params)).shape
  x = x.reshape(by_batch, n // by_batch, by_feature, c // by_feature, *space)
  axes = dict(zip(kernel_spec[1:], (3, *range(5, x.ndim, 2)), strict=True))
  inputs = [axes[a] for a in sorted(axes)]
  free = [1, *range(4, x.ndim, 2)]
  groups = by_batch * by_feature
  members = () if groups == 1 else (groups,)
  count, channels = (_size(x, axes) for axes in (free, inputs))
  return x.transpose(0, 2, *free, *inputs).reshape(*members, count, channels)


def _windows(
  x: jax.Array, kernel: Shape, params: Mapping[str, Any]
) -> jax.Array:
  """The numbers under a kernel: (batch, in, *(places, window) of each axis).

  They are copied: a product with ones and zeros, as in
  `lax.conv_general_dilated_patches`, spreads NaN and takes longer.
  """
  lhs_spec, kernel_spec, _ = params['dimension_numbers']
  dilations = [d - 1 for d in params['lhs_dilation']]
  edges = [
    (low, high, interior)
    for (low, high), interior in zip(params['padding'], dilations, strict=True)
  ]
  zero = jnp.zeros((), x.dtype)
  x = lax.pad(x.transpose(lhs_spec), zero, [(0, 0, 0), (0, 0, 0), *edges])
  for i, axis in enumerate(kernel_spec[2:]):
    stride, step = params['window_strides'][i], params['rhs_dilation'][i]
    offsets = step * np.arange(kernel[axis])
    places = np.arange(0, x.shape[2 + 2 * i] - offsets[-1], stride)
    index = places[:, None] + offsets
    x = jnp.take(x, index, axis=2 + 2 * i, mode='clip')
  return x


def _size(x: jax.Array, axes: Shape) -> int:
  return math.prod(x.shape[a] for a in axes)


def _of_groups(
  x: jax.Array, sizes: jax.Array, measure: Callable, merge: Callable
) -> PyTree:
  """Measures windows of the rows of one group after the other."""
  window = max(1, min(_WINDOW, len(x)))
  x = jnp.pad(x, ((0, window), (0, 0)))
  sizes = sizes.astype(jnp.int32)

  def of_group(group):
    start, size = group

    def at(i):
      part = lax.dynamic_slice_in_dim(x, start + i * window, window)
      count = jnp.clip(size - i * window, 0, window)
      counts = jnp.arange(window, dtype=jnp.int32) < count
      return measure(jnp.where(counts[:, None], part, 0), count)

    windows = -(-size // window)
    return lax.fori_loop(1, windows, lambda i, s: merge(s, at(i)), at(0))

  return lax.map(of_group, (jnp.cumsum(sizes) - sizes, sizes))


class _OfRows(abc.ABC):
  """An observer that measures rows of activations."""

  def observe(self, product: Product, *operands: Any) -> PyTree | None:
    def run(*operands):
      found = rows(product, *operands)
      return None if found is None else found.reduce(self.measure, self.merge)

    return _explicit.automatic(run, _explicit.gathered, *operands)

  @abc.abstractmethod
  def measure(self, x: jax.Array, count: jax.Array) -> PyTree:
    """The observation of one member, see `Rows.reduce`."""

  @abc.abstractmethod
  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    """As in `Observer`."""


@dataclasses.dataclass(frozen=True)
class _Absmax(_OfRows):
  def measure(self, x: jax.Array, count: jax.Array) -> jax.Array:
    del count
    return jnp.max(jnp.abs(x), axis=0, initial=0).astype(jnp.float32)

  def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.maximum(a, b)


class Moments(NamedTuple):
  """Mean and spread of each channel; float32.

  Attributes:
    seen: (*members), how many rows; exact up to 2^24.
    mean: (*members, K).
    squares: (*members, K), sum of the squares of x - mean; the variance is
      `squares / seen`.
  """

  seen: jax.Array
  mean: jax.Array
  squares: jax.Array


@dataclasses.dataclass(frozen=True)
class _Moments(_OfRows):
  def measure(self, x: jax.Array, count: jax.Array) -> Moments:
    x, seen = x.astype(jnp.float32), count.astype(jnp.float32)
    mean = jnp.sum(x, axis=0) / jnp.maximum(seen, 1)
    counts = jnp.arange(len(x), dtype=jnp.int32) < count
    apart = jnp.where(counts[:, None], x - mean, 0)
    return Moments(seen, mean, jnp.sum(apart**2, axis=0))

  def merge(self, a: Moments, b: Moments) -> Moments:
    # Chan, Golub and LeVeque, 1983: what lies between the means is added.
    seen = a.seen + b.seen
    share = (b.seen / jnp.maximum(seen, 1))[..., None]
    step = b.mean - a.mean
    between = step**2 * (a.seen[..., None] * share)
    return Moments(seen, a.mean + step * share, a.squares + b.squares + between)


class Gram(NamedTuple):
  """Products of channels, summed over rows; float32.

  Attributes:
    seen: (*members), how many rows; exact up to 2^24.
    products: (*members, K, K), x^T x.
  """

  seen: jax.Array
  products: jax.Array


@dataclasses.dataclass(frozen=True)
class _Gram(_OfRows):
  def measure(self, x: jax.Array, count: jax.Array) -> Gram:
    products = lax.dot_general(
      x,
      x,
      (((0,), (0,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    return Gram(count.astype(jnp.float32), products)

  def merge(self, a: Gram, b: Gram) -> Gram:
    return Gram(a.seen + b.seen, a.products + b.products)


class Samples(NamedTuple):
  """The first rows, and how many there were.

  Attributes:
    seen: (*members), float32, how many rows; exact up to 2^24.
    rows: (*members, n, K), the first of them, in the dtype of `Rows.x`; zeros
      where there were fewer than n.
  """

  seen: jax.Array
  rows: jax.Array


@dataclasses.dataclass(frozen=True)
class _Samples(_OfRows):
  n: int

  def measure(self, x: jax.Array, count: jax.Array) -> Samples:
    first = x[: self.n]
    first = jnp.pad(first, ((0, self.n - len(first)), (0, 0)))
    return Samples(count.astype(jnp.float32), first)

  def merge(self, a: Samples, b: Samples) -> Samples:
    kept = jnp.minimum(a.seen, self.n).astype(jnp.int32)[..., None]
    place = jnp.arange(self.n, dtype=jnp.int32)
    source = jnp.where(place < kept, place, self.n + place - kept)
    both = jnp.concatenate([a.rows, b.rows], axis=-2)
    first = jnp.take_along_axis(both, source[..., None], axis=-2)
    return Samples(a.seen + b.seen, first)


@dataclasses.dataclass(frozen=True)
class _Several:
  observers: tuple[tuple[str, Observer], ...]

  def observe(self, product: Product, *operands: Any) -> PyTree | None:
    seen = {n: o.observe(product, *operands) for n, o in self.observers}
    seen = {name: s for name, s in seen.items() if s is not None}
    return seen or None

  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    return {n: o.merge(a[n], b[n]) for n, o in self.observers if n in a}


absmax: Observer = _Absmax()
"""The largest magnitude of each channel: float32 (*members, K)."""

moments: Observer = _Moments()
"""Mean and spread of each channel: `Moments`."""

gram: Observer = _Gram()
"""Products of channels, x^T x summed over rows: `Gram`."""


def samples(n: int) -> Observer:
  """The first n rows of each member: `Samples`.

  Args:
    n: rows to keep, at least 1.

  Raises:
    ValueError: for another n.
  """
  if not isinstance(n, int) or n < 1:
    raise ValueError(f'{n=} must be a positive int, how many rows to keep')
  return _Samples(n)


def several(**observers: Observer) -> Observer:
  """What each of some observers records, as a dict.

  Args:
    **observers: observers by the names of their observations. One that does
      not record a product is not in its dict.

  Raises:
    TypeError: for what is no observer.

  Examples:
    >>> from lowbit_jax import observers
    >>> both = observers.several(
    ...   amax=observers.absmax, rows=observers.samples(64)
    ... )
  """
  for name, observer in observers.items():
    if isinstance(observer, type) or not hasattr(observer, 'observe'):
      raise TypeError(
        f'{name}={observer!r} must be an observer, such as observers.absmax or'
        ' observers.samples(64)'
      )
  return _Several(tuple(observers.items()))
