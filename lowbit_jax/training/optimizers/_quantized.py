"""Optimizers whose state is kept in a few bits."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowbit_jax._tree import path_name
from lowbit_jax._typing import PyTree
from lowbit_jax.formats import BlockFormat
from lowbit_jax.training.optimizers import _codecs
from lowbit_jax.training.optimizers._common import (
  check_steps,
  is_embedding,
)

# Fields of the states of optax that hold averages of squares.
_SECOND = ('nu', 'nu_max', 'sum_of_squares')

Moment = str | BlockFormat | None


def quantized_state(
  inner: optax.GradientTransformation,
  *,
  first: Moment = 'dyn8',
  second: Moment = 'dyn8',
  block: int | None = None,
  min_size: int = 4096,
  exclude: Callable[[str, jax.Array], bool] | None = is_embedding,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the moments of an optimizer in few bits: decode, update, encode.

  A leaf of the state of `inner` is encoded if it has the path (below the field
  of the state) and the shape of a parameter, holds floats, and has at least
  `min_size` elements. Fields nu, nu_max and sum_of_squares are second moments;
  all others, such as mu and trace, first moments. The arithmetic of `inner` is
  that of its own dtypes.

  A codec stores x ~ element(code) * scale in blocks of B elements with float32
  scales. Codecs differ in the set of elements and in the scale:

    lin8, lin4   uniform elements
    dyn8, de4    the dynamic tree of 8-bit Adam: 2^i values spread evenly over
                 the decade 10^(i-D+1) [0.1, 1] for i = 0 ... D - 1, their
                 negatives, 0 and 1, with D = b - 1 for b bits
    e4m3, e5m2   minifloats
    coat         E4M3 of sign(x) |x|^k, k = ln(448 / 2^-9) / ln(max / min) of
                 the magnitudes in the block: its range becomes that of E4M3
    rank1_lin4,  uniform or dynamic elements with the scale
    rank1_de4    min(max over row i, max over column j) for element (i, j)

  A second moment is in a denominator: sqrt(v) must not vanish where v does not.
  Its elements are positive, and minifloats round positive numbers up to their
  smallest one. A block of zeros stays zero, its scale being zero; a zero beside
  other numbers becomes the smallest element.

  Args:
    inner: an optax transformation, such as `optax.scale_by_adam()`.
    first: codec of first moments: 'lin8', 'dyn8', 'e4m3', 'e5m2', 'coat',
      'lin4' or 'de4', a block format such as `formats.mxfp8_e4m3`, or None to
      leave them as they are.
    second: codec of second moments; also 'rank1_lin4' and 'rank1_de4'. Positive
      elements stay positive in blocks whose largest element is at least 2^-90.
    block: elements per scale of the named codecs; None for 256 with 'lin8' and
      'dyn8' and 128 with others.
    min_size: leaves with fewer elements are left as they are.
    exclude: predicate of a path such as 'block_0/kernel' and a parameter;
      leaves where it is true are left as they are. By default embeddings; None
      for no exception.

  Returns:
    A transformation whose state is that of `inner` with quantized leaves:
    QArrays, or pairs of a QArray and float scales for 'coat' and 'rank1_...'.
    It is a pytree of arrays of fixed shapes and dtypes.

  Raises:
    ValueError: for unknown codecs and sizes.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> tx = quantized_state(optax.scale_by_adam(), second='e5m2')
    >>> tx.init({'w': jnp.zeros((64, 128))}).nu['w'].nbytes
    8448

  Sources: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022);
  Li et al., Memory Efficient Optimizers with 4-bit States (2023); Xi et al.,
  COAT (2025).
  """
  check_steps('min_size', min_size, 0)
  if block is not None:
    check_steps('block', block)
  codecs = {}
  for name, value in (('first', first), ('second', second)):
    if value is not None:
      codecs[name] = _codecs.find(value, name == 'second', name, block)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    shapes = _quantized_shapes(params, min_size, exclude)
    return _encode_first(inner.init(params), shapes, codecs)

  def update(updates, state, params=None, **extra_args):
    updates, new = inner.update(updates, _decode(state), params, **extra_args)
    return updates, _encode_again(state, new)

  return optax.GradientTransformationExtraArgs(init, update)


def _quantized_shapes(params, min_size: int, exclude) -> dict[tuple, tuple]:
  """The shapes of the parameters whose moments are encoded, by path."""
  return {
    path: leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if leaf.size >= min_size
    and leaf.ndim
    and not (exclude is not None and exclude(path_name(path), leaf))
  }


def _encode_first(state, shapes: dict[tuple, tuple], codecs: dict):
  """A new state, with the moments of parameters of these shapes encoded."""

  def encode(path, x):
    # A moment has the path of its parameter below that of its field.
    suffixes = (path[i:] for i in range(len(path) + 1))
    shape = next((shapes[s] for s in suffixes if s in shapes), None)
    codec = codecs.get(_role(path))
    if (
      shape is None
      or codec is None
      or jnp.shape(x) != shape
      or not jnp.issubdtype(x.dtype, jnp.floating)
    ):
      return x
    return _codecs.encode(x, codec, _role(path) == 'second')

  return jax.tree_util.tree_map_with_path(encode, state)


def _decode(state):
  """A state with its encoded leaves as floats."""
  return jax.tree.map(
    lambda x: _codecs.decode(x) if _codecs.is_encoded(x) else x,
    state,
    is_leaf=_codecs.is_encoded,
  )


def _encode_again(old, new):
  """The state `new`, with the leaves encoded that are encoded in `old`."""

  def encode(path, old, x):
    if not _codecs.is_encoded(old):
      return x
    return _codecs.encode_like(old, x, _role(path) == 'second')

  return jax.tree_util.tree_map_with_path(
    encode, old, new, is_leaf=_codecs.is_encoded
  )


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
  first: Moment = 'dyn8',
  second: Moment = 'dyn8',
  min_size: int = 4096,
  exclude: Callable[[str, jax.Array], bool] | None = is_embedding,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments of 8 bits, as `optax.adamw` otherwise.

  Args:
    learning_rate: a number or a schedule.
    b1: as in `optax.adamw`, as are `b2`, `eps`, `weight_decay`, `mask` and
      `nesterov`.
    first: as in `quantized_state`, as are `second`, `min_size` and `exclude`.
  """
  return optax.chain(
    quantized_state(
      optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
      first=first,
      second=second,
      min_size=min_size,
      exclude=exclude,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def adamw_4bit(
  learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments of 4 bits: 'de4', and 'rank1_lin4' for the second.

  Args:
    learning_rate: a number or a schedule.
    **options: the other arguments of `adamw`.
  """
  options = {'first': 'de4', 'second': 'rank1_lin4'} | options
  return adamw(learning_rate, **options)


def state_bytes(state: PyTree) -> int:
  """Bytes of all arrays of a state, or of its `jax.eval_shape`."""
  return sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(state)
  )


def _role(path) -> str:
  names = {getattr(key, 'name', None) for key in path}
  return 'second' if names & set(_SECOND) else 'first'
