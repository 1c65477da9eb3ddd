"""A linear layer on its way to low bits, and the steps that take it there.

A `Layer` is a weight, what is known of the activations that meet it, and what
was made of it so far. A step is a pure function from layer to layer: it looks
for scales, rounds, rotates. `chain` makes one step of several, and `method`
what `nn.quantize_params` takes.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _transformed, ops
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ops import Transformed
from lowbit_jax.ptq._statistics import Statistics, of_leaf
from lowbit_jax.qarray import QArray
from lowbit_jax.transforms import Chain, Transform


class Layer(NamedTuple):
  """A linear layer: activations (tokens, in) times a weight (in, out).

  Attributes:
    path: of the weight in the parameters.
    weight: float32 (in, out), in blocks along axis -2, which `quantized` is to
      stand for.
    fmt: of `quantized`.
    statistics: of the activations that meet `weight`, None where none were
      recorded.
    transforms: what activations take before they meet `weight`, in order.
    quantized: what was made of the weight, (in, out); None before the first
      step that rounds.
  """

  path: str
  weight: jax.Array
  fmt: BlockFormat
  statistics: Statistics | None
  transforms: tuple[Transform, ...] = ()
  quantized: QArray | None = None

  def transformed(self, transform: Transform) -> 'Layer':
    """The layer behind one more transform, not rounded any more.

    Args:
      transform: of activations, along axis -1.
    """
    statistics = self.statistics
    return self._replace(
      weight=transform.apply_dual(self.weight, -2),
      statistics=statistics and statistics.transformed(transform),
      transforms=(*self.transforms, transform),
      quantized=None,
    )

  def rounded(self) -> QArray:
    """What was made of the weight; by default its nearest neighbour in the
    format."""
    if self.quantized is not None:
      return self.quantized
    return ops.quantize(self.weight, self.fmt, axis=-2)

  def stored(self) -> QArray | Transformed:
    """What stands for the weight that the layer had at first."""
    weight = self.rounded()
    if not self.transforms:
      return weight
    first, *others = self.transforms
    transform = Chain((first, *others)) if others else first
    return Transformed(weight, transform, -2)

  def error(self) -> float:
    """The relative error of what the layer gives, see `relative_error`."""
    moments = None if self.statistics is None else self.statistics.moments
    return relative_error(self.weight, self.rounded(), moments)


Step = Callable[[Layer], Layer]
Stored = QArray | Transformed
Method = Callable[[str, jax.Array, BlockFormat, Any], Stored]


def relative_error(
  weight: jax.Array, quantized: QArray, moments: jax.Array | None = None
) -> float:
  """Mean square error of the outputs of a layer, as a share of their square.

    tr((Q - W)' H (Q - W)) / tr(W' H W)

  Args:
    weight: W (in, out).
    quantized: Q, of that shape.
    moments: H (in, in), mean products of activations; None for the identity.

  Returns:
    The share; 0 for a layer that gives zeros.
  """
  weight = weight.astype(jnp.float32)
  difference = ops.dequantize(quantized, jnp.float32) - weight
  whole = float(_energy(weight, moments))
  return float(_energy(difference, moments)) / whole if whole else 0.0


@jax.jit
def _energy(weight: jax.Array, moments: jax.Array | None) -> jax.Array:
  outputs = weight if moments is None else moments @ weight
  return jnp.sum(weight * outputs)


def chain(*steps: Step) -> Step:
  """One step after the other.

  Examples:
    >>> from lowbit_jax import ptq
    >>> step = ptq.chain(ptq.hadamard(32), ptq.rtn('mse'), ptq.gptq())
  """
  _check_steps(steps)
  return functools.partial(_run, steps)


def _run(steps: tuple[Step, ...], layer: Layer) -> Layer:
  for step in steps:
    layer = step(layer)
  return layer


def masked(step: Step, select: str | Callable[[str], bool]) -> Step:
  """A step that leaves other layers as they are.

  Args:
    step: to be taken.
    select: where: a regular expression that is searched in the path of a
      layer, or a predicate of the path.
  """
  _check_steps((step,))
  if not isinstance(select, str) and not callable(select):
    raise TypeError(
      f'{select=} must be a regular expression or a predicate of the path'
    )

  def where(layer: Layer) -> Layer:
    if isinstance(select, str):
      is_selected = re.search(select, layer.path) is not None
    else:
      is_selected = select(layer.path)
    return step(layer) if is_selected else layer

  return where


def _check_steps(steps: tuple[Step, ...]) -> None:
  for step in steps:
    if not callable(step):
      raise TypeError(
        f'{step!r} is no step; call what makes one, such as ptq.gptq()'
      )


def method(
  step: Step,
  observed: Mapping[str, Any] | None = None,
  watch: Callable[[Layer], None] | None = None,
) -> Method:
  """What `nn.quantize_params` and `nn.nnx.quantize` take as `method`.

  Weights with several matrices (experts) are taken one by one. One that no
  token met has no statistics, and steps that need some round it to the nearest.

  Args:
    step: what is done with each layer.
    observed: what `calibrate` returns; None for steps that need no statistics.
    watch: is called with each layer when it is done, for reports.

  Returns:
    A method. It raises ValueError for a weight that was not observed, though
    others were, and for formats whose blocks are tiles.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> from lowbit_jax import ptq
    >>> def model(params, x):
    ...   return jax.nn.relu(x @ params['up']['kernel'])
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 64))
    >>> params = {'up': {'kernel': w}}
    >>> method = ptq.method(ptq.gptq(), ptq.calibrate(model, params, [x]))
    >>> q = lowbit.nn.quantize_params(
    ...   params, None, lowbit.formats.mxfp4, method=method
    ... )
    >>> q['up']['kernel'].shape
    (64, 64)
  """
  _check_steps((step,))

  def run(path: str, w: jax.Array, fmt: BlockFormat, axis: Any) -> Stored:
    if not isinstance(axis, int):
      raise ValueError(
        f'{axis=}: a method quantizes along one axis; use a format without'
        ' tiles, whose blocks divide it'
      )
    statistics = None if observed is None else of_leaf(observed, path)
    shape = _Shape.of(w.shape, axis, statistics)

    def one(matrix, statistics, path):
      seen = statistics is not None and float(statistics.seen) > 0
      layer = Layer(path, matrix, fmt, statistics if seen else None)
      layer = step(layer)
      if watch is not None:
        watch(layer)
      return layer.stored()

    matrices = shape.matrices(w.astype(jnp.float32))
    if shape.members == 1:
      return shape.restored(one(matrices[0], statistics, path), w.dtype)
    parts = []
    for i, matrix in enumerate(matrices):
      own = statistics and statistics.member(i)
      parts.append(one(matrix, own, f'{path}/{i}'))
    return shape.restored(_transformed.stack(parts), w.dtype)

  return run


class _Shape(NamedTuple):
  """How a weight is a stack of matrices (in, out).

  Attributes:
    weight: its shape.
    axis: its block axis, negative.
    members: how many matrices there are.
    inputs: rows of each.
  """

  weight: tuple[int, ...]
  axis: int
  members: int
  inputs: int

  @classmethod
  def of(
    cls, shape: tuple[int, ...], axis: int, statistics: Statistics | None
  ) -> '_Shape':
    """Of what the activations tell, else of all axes in front of the blocks."""
    inputs, first = shape[axis], len(shape) + axis
    if statistics is not None:
      inputs, size = statistics.moments.shape[-1], shape[axis]
      while size < inputs and first:
        first -= 1
        size *= shape[first]
      if size != inputs:
        raise ValueError(
          f'activations of {inputs} channels do not fit a weight of shape'
          f' {shape} with blocks along axis {axis}; give axis='
        )
    is_last = axis == -1 and len(shape) > 1
    if is_last and (first != len(shape) - 1 or len(shape) > 2):
      raise ValueError(
        f'a weight of shape {shape} with blocks along its last axis is no'
        ' matrix; give axis='
      )
    members = 1 if is_last else math.prod(shape[:first])
    return cls(shape, axis, members, inputs)

  def matrices(self, w: jax.Array) -> jax.Array:
    """(members, in, out)."""
    if self.axis == -1 and w.ndim > 1:
      return w.T[None]
    return w.reshape(self.members, self.inputs, -1)

  def restored(self, stored: Stored, dtype: np.dtype) -> Stored:
    """Of matrices (in, out), or a stack of them, what stands for the weight."""
    if self.axis == -1 and len(self.weight) > 1:
      if isinstance(stored, Transformed):
        weight = stored.weight.T
        return Transformed(weight, stored.transform, -1).astype(dtype)
      return stored.T.astype(dtype)
    if stored.shape == self.weight:
      return stored.astype(dtype)
    if isinstance(stored, Transformed):
      raise ValueError(
        f'a weight of shape {self.weight} takes no transform: activations do'
        ' not meet it along one axis'
      )
    return stored.reshape(self.weight).astype(dtype)
