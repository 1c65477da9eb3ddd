"""Operands of products, and what their product is.

The oracle is the float64 product of the dequantized operands. A float32 sum of
k products, each with a few more roundings for scales, is within
(k + 8) 2^-24 sum |a| |b| of it, in any order of summation.
"""

import functools
from unittest import mock

import jax
import numpy as np

from lowbit_jax import QArray, formats, ops, qarray
from lowbit_jax.ops import _partition

U = 2.0**-24


@functools.cache
def data(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


@functools.cache
def make(name: str, *shape, axis=-2, seed: int = 1) -> QArray:
  """Random leaves, with values of about one: nothing is quantized."""
  fmt = formats.get(name)
  axes = (-2, -1) if fmt.is_tile and len(shape) > 1 else (axis,)
  random = np.random.RandomState(seed)
  pad = qarray.padding(shape, fmt, axes)
  padded = list(shape)
  for a, n in zip(axes, pad, strict=True):
    padded[a] += n
  values = fmt.element.values()
  values = np.where(np.abs(values) <= fmt.element.max, values, np.nan)
  codes = random.choice(np.flatnonzero(np.isfinite(values)), padded)
  scale = zero = tensor = minimum = None
  unit = 2 / fmt.element.max
  if fmt.tensor_scale:
    tensor = np.full((1,) * len(shape), 0.3, np.float32)
    if fmt.scale is None:
      tensor *= np.float32(unit / 0.3)
    unit /= 0.3
  if fmt.scale is not None:
    blocks = qarray.scale_shape(padded, fmt, axes)
    scale = random.uniform(unit / 4, unit, blocks).astype(np.float32)
    if fmt.scale.bits <= 8:
      table = fmt.scale.values()
      near = np.flatnonzero((table >= unit / 4) & (table <= unit))
      scale = random.choice(near, blocks).astype(np.uint8)
    if fmt.zero_point:
      zero = random.randint(0, 2**fmt.element.bits, blocks).astype(np.uint8)
    if fmt.minimum:
      minimum = -scale * random.uniform(0, fmt.element.max, blocks)
    scale, minimum = _stored(fmt, scale, axes), _stored(fmt, minimum, axes)
  leaves = scale, tensor, zero
  leaves = [leaf if leaf is None else jax.device_put(leaf) for leaf in leaves]
  packed = jax.device_put(pack(codes, fmt.element.bits, axes[0]))
  axis = axes if len(axes) > 1 else axes[0]
  return QArray(
    packed, *leaves, fmt, axis, pad, np.dtype(np.float32), minimum=minimum
  )


def _stored(fmt, numbers, axes):
  """Scales as a format stores them; those of two levels are quantized."""
  if numbers is None or fmt.scale.bits <= 8:
    return numbers
  if fmt.scale_blocks is None:
    return numbers.astype(fmt.scale.name)
  sign = -1 if numbers.min() < 0 else 1
  q = ops.quantize(np.float32(sign * numbers), fmt.scale_blocks, axis=axes[0])
  return qarray.replace(q, scale=sign * q.scale)


def pack(codes, bits: int, axis: int) -> np.ndarray:
  """Bytes of codes that follow each other along an axis."""
  axis %= codes.ndim
  stream = np.moveaxis(codes[..., None] >> np.arange(bits) & 1, -1, axis + 1)
  shape = list(codes.shape)
  shape[axis] *= bits
  stream = stream.reshape(shape).astype(np.uint8)
  return np.packbits(stream, axis=axis, bitorder='little')


def codes_of(q: QArray) -> np.ndarray:
  """The inverse of `pack`, with the padding."""
  axis, bits = q.axes[0] % q.ndim, q.fmt.element.bits
  stream = np.unpackbits(np.asarray(q.codes), axis=axis, bitorder='little')
  shape = list(stream.shape)
  shape[axis : axis + 1] = [-1, bits]
  stream = np.moveaxis(stream.reshape(shape), axis + 1, -1).astype(int)
  return stream @ (1 << np.arange(bits))


def stacked(*arrays: QArray) -> QArray:
  """As vmap stacks them: each keeps its tensor scale."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *arrays)


def dense(x) -> np.ndarray:
  """Values in float64, those of a QArray by their definition."""
  if not isinstance(x, QArray):
    return np.asarray(x, np.float64)
  fmt, codes = x.fmt, codes_of(x)

  def spread(leaf):
    for axis, n in enumerate(codes.shape):
      leaf = np.repeat(leaf, n // leaf.shape[axis], axis)
    return leaf

  w = fmt.element.values()[codes]
  if x.zero_point is not None:
    w = w - spread(np.asarray(x.zero_point))
  if x.scale is not None:
    scale = _numbers(x.scale)
    coded = fmt.scale.bits <= 8
    w = w * spread(fmt.scale.values()[scale.astype(int)] if coded else scale)
  if x.tensor_scale is not None:
    w = w * np.asarray(x.tensor_scale, np.float64)
  if x.minimum is not None:
    w = w + spread(_numbers(x.minimum))
  return w[tuple(slice(n) for n in x.shape)]


def _numbers(scale) -> np.ndarray:
  """Scales in float64, codes as they are."""
  return np.float64(dense(scale) if isinstance(scale, QArray) else scale)


def assert_product(got, spec: str, a, b, extra: float = 0.0):
  """`got` is the einsum of `a` and `b` within the bound of the module."""
  a, b = dense(a), dense(b)
  want = np.einsum(spec, a, b)
  size = np.einsum(spec, np.abs(a), np.abs(b))
  inputs, output = spec.split('->')
  sizes = dict(zip(inputs.replace(',', ''), a.shape + b.shape, strict=True))
  k = np.prod([n for c, n in sizes.items() if c not in output])
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  bound = ((k + 8) * U + extra) * size + 1e-30
  worst = np.max(np.abs(got - want) / bound, initial=0)
  assert worst <= 1, f'{worst} times the bound'


def one_device():
  """As in a process with one device, where no partitioner splits columns."""
  return mock.patch.object(_partition, 'is_alone', lambda: True)
