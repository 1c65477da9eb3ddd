"""Scales that move from the outputs of a layer into the inputs of the next.

Where the outputs of a leader are the inputs of its followers, and nothing but
sums and products with other numbers lies between, the outputs may be divided by
a scale per channel and the rows of the followers multiplied by it: what the
model computes stays the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lowbit_jax._low_rank import is_operand
from lowbit_jax._tree import by_name
from lowbit_jax._typing import PyTree

# Leaves of a tree by path.
Leaves = Mapping[str, Any]
# Kernels by the parameter that leads them.
Followers = Mapping[str, Sequence[str]]


class Fold(NamedTuple):
  """Where one scale moves; `stack` are axes of layers or experts.

  Attributes:
    leader: path of a kernel (*stack, in, channels) or a vector
      (*stack, channels).
    bias: path of its bias (*stack, channels), None without one.
    followers: paths of kernels (*stack, *members, inputs, out).
    shape: of the scale, (*stack, channels).
    head_size: channels of a head. One of the leader goes to several of a
      follower with more inputs; None where all have the same number.
  """

  leader: str
  bias: str | None
  followers: tuple[str, ...]
  shape: tuple[int, ...]
  head_size: int | None

  def to_inputs(self, scale: jax.Array, ndim: int, inputs: int) -> jax.Array:
    """A scale along the inputs of a follower.

    Args:
      scale: (*stack, channels).
      ndim: axes of what it is for, its inputs the last one.
      inputs: of the follower.

    Returns:
      (*stack, 1, ..., inputs).
    """
    *stack, channels = self.shape
    if inputs != channels:
      assert self.head_size is not None
      heads = scale.reshape(*stack, -1, 1, self.head_size)
      scale = jnp.repeat(heads, inputs // channels, axis=-2)
    ones = [1] * (ndim - len(self.shape))
    return scale.reshape(*stack, *ones, inputs)

  def to_channels(self, x: jax.Array, reduce: Callable) -> jax.Array:
    """Numbers of the inputs of a follower, reduced to those of the channels.

    Args:
      x: (*stack, *members, inputs).
      reduce: such as jnp.max, over the inputs and members that share a channel.

    Returns:
      (*stack, channels).
    """
    *stack, channels = self.shape
    inputs = x.shape[-1]
    size = channels if inputs == channels else self.head_size
    assert size is not None
    x = x.reshape(*stack, -1, channels // size, inputs // channels, size)
    return reduce(x, axis=(-4, -2)).reshape(self.shape)

  def apply(self, leaves: Leaves, scale: jax.Array) -> dict[str, Any]:
    """The leaves with a scale moved, in order."""
    new = dict(leaves)
    ones = [1] * (leaves[self.leader].ndim - len(self.shape))
    *stack, channels = self.shape
    along = scale.reshape(*stack, *ones, channels)
    new[self.leader] = _multiplied(leaves[self.leader], 1 / along)
    if self.bias is not None:
      new[self.bias] = _multiplied(leaves[self.bias], 1 / scale)
    for path in self.followers:
      kernel = leaves[path]
      rows = self.to_inputs(scale, kernel.ndim - 1, kernel.shape[-2])
      new[path] = _multiplied(kernel, rows[..., None])
    return new


def _multiplied(x: jax.Array, scale: jax.Array) -> jax.Array:
  return (x * scale).astype(x.dtype)


def fold(
  params: PyTree,
  followers: Followers,
  scales: Mapping[str, Any],
  *,
  head_size: int | None = None,
) -> PyTree:
  """Moves scales from the outputs of layers into the inputs of those behind.

  Outputs of the leader are divided by a scale per channel, and rows of its
  followers multiplied by it. The function of the model stays the same where
  the followers are all that takes these outputs, and where a factor goes
  through what lies between: sums over tokens, products with other numbers. A
  norm must multiply by its scale, not by 1 + scale.

  Args:
    params: tree of float arrays, such as an NNX state or a dict by path.
    followers: by the path of a leader those of the kernels (in, out) that take
      its outputs. Paths may begin in any module: 'up/kernel' leads
      'down/kernel' in 'blocks/3/mlp' and in 'blocks/4/mlp'. A leader named
      'kernel' is a matrix (in, channels), any other a vector (channels,), such
      as the scale of a norm; a 'bias' beside it is divided as well. All may
      have axes in front, of stacked layers or experts. Followers that params
      lacks are passed over.
    scales: by the full path of a leader a positive scale (*stack, channels),
      with the axes that the leader has in front.
    head_size: channels of a head, where each head of values goes to several
      heads of queries, which lie beside each other.

  Returns:
    The same tree with other numbers, in the dtypes that they had.

  Raises:
    ValueError: if nothing folds, for shapes that do not fit, for weights that
      are quantized, and for a scale that is not positive or leads nothing.

  Examples:
    >>> import jax.numpy as jnp
    >>> from lowbit_jax import ptq
    >>> params = {'up': {'kernel': jnp.ones((3, 2))}}
    >>> params['down'] = {'kernel': jnp.ones((2, 3))}
    >>> followers = {'up/kernel': ('down/kernel',)}
    >>> scale = {'up/kernel': jnp.array([2.0, 0.5])}
    >>> folded = ptq.fold(params, followers, scale)
    >>> folded['up']['kernel'][0].tolist()
    [0.5, 2.0]
  """
  leaves, structure = by_name(params)
  folds = {f.leader: f for f in find(leaves, followers, head_size)}
  for path, scale in scales.items():
    if path not in folds:
      raise ValueError(
        f'scales[{path!r}] leads nothing; leaders are {_some(folds)}'
      )
    _check_scale(scale, folds[path])
    scale = jnp.asarray(scale, jnp.float32)
    leaves = folds[path].apply(leaves, scale)
  return structure.unflatten(leaves.values())


def _check_scale(scale: Any, fold: Fold) -> None:
  if np.shape(scale) != fold.shape:
    raise ValueError(
      f'scales[{fold.leader!r}] of shape {np.shape(scale)} must have the shape'
      f' {fold.shape}, a number for each output'
    )
  if isinstance(scale, Tracer):
    return
  if not ((np.asarray(scale) > 0) & np.isfinite(scale)).all():
    raise ValueError(
      f'scales[{fold.leader!r}] must be positive and finite; clamp it'
    )


def find(
  leaves: Leaves, followers: Followers, head_size: int | None = None
) -> list[Fold]:
  """All places where a scale can move, in the order of `followers`.

  Raises:
    ValueError: as `fold` does.
  """
  if head_size is not None and head_size < 1:
    raise ValueError(f'{head_size=} must be at least 1, the channels of a head')
  folds = []
  for leader, names in followers.items():
    if isinstance(names, str):
      raise ValueError(
        f'followers[{leader!r}]={names!r} must be a tuple of paths'
      )
    for prefix in _prefixes(leaves, leader):
      found = tuple(prefix + name for name in names if prefix + name in leaves)
      if found:
        folds.append(_fold(leaves, prefix + leader, found, head_size))
  if not folds:
    raise ValueError(
      f'followers= with the leaders {_some(followers)} folds nothing: params'
      f' has none of them with a follower, but {_some(leaves)}'
    )
  return folds


def _prefixes(leaves: Leaves, name: str) -> Iterator[str]:
  """What stands in front of a name in the paths that end in it."""
  for path in leaves:
    if f'/{path}'.endswith(f'/{name}'):
      yield path.removesuffix(name)


def is_kernel(path: str) -> bool:
  return path.rpartition('/')[2] == 'kernel'


def sibling_bias(leaves: Leaves, path: str) -> str | None:
  """The path of the bias beside a parameter, if there is one."""
  module, slash, _ = path.rpartition('/')
  bias = f'{module}{slash}bias'
  return bias if bias in leaves and bias != path else None


def _fold(
  leaves: Leaves,
  leader: str,
  followers: tuple[str, ...],
  head_size: int | None,
) -> Fold:
  bias = sibling_bias(leaves, leader)
  for path in filter(None, (leader, bias, *followers)):
    _check_float(path, leaves[path])
  shape = np.shape(leaves[leader])
  axes = 2 if is_kernel(leader) else 1
  if len(shape) < axes:
    raise ValueError(f'{leader!r} of shape {shape} must have {axes} axes')
  shape = (*shape[:-axes], shape[-1])
  if bias is not None and np.shape(leaves[bias]) != shape:
    raise ValueError(
      f'{bias!r} of shape {np.shape(leaves[bias])} does not fit the outputs'
      f' {shape} of {leader!r}'
    )
  for path in followers:
    _check_follower(path, np.shape(leaves[path]), leader, shape, head_size)
  return Fold(leader, bias, followers, shape, head_size)


def _check_float(path: str, leaf: Any) -> None:
  if is_operand(leaf):
    raise ValueError(f'{path!r} is {leaf!r}: fold before weights are quantized')
  if not (hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)):
    raise ValueError(f'{path!r} must be an array of floats')


def _check_follower(
  path: str,
  shape: tuple[int, ...],
  leader: str,
  outputs: tuple[int, ...],
  head_size: int | None,
) -> None:
  *stack, channels = outputs
  fits = len(shape) > len(outputs) and shape[: len(stack)] == tuple(stack)
  if not fits or shape[-2] % channels:
    raise ValueError(
      f'{path!r} of shape {shape} does not take the outputs {outputs} of'
      f' {leader!r} as rows; correct followers='
    )
  if shape[-2] != channels and (head_size is None or channels % head_size):
    raise ValueError(
      f'{path!r} has {shape[-2]} rows for the {channels} outputs of'
      f' {leader!r}: {head_size=} must be the channels of a head, which go to'
      f' {shape[-2] // channels} heads each'
    )


def _some(names: Mapping[str, Any]) -> str:
  shown = list(map(repr, names))[:4]
  return ', '.join([*shown, '...'] if len(names) > 4 else shown) or 'none'
