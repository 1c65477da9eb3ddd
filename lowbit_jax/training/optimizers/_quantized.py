"""Optimizers whose state is kept in a few bits."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowbit_jax import _serialization
from lowbit_jax._tree import path_name
from lowbit_jax._typing import PyTree
from lowbit_jax.formats import BlockFormat
from lowbit_jax.training.optimizers import _codecs
from lowbit_jax.training.optimizers._common import (
  check_dense,
  check_steps,
  content,
  in_float32,
  is_embedding,
  map_moments,
  reboxed,
)

MIN_SIZE = 4096

# Fields of the states of optax that hold averages of squares.
_SECOND = ('nu', 'nu_max', 'sum_of_squares', 'e_g', 'e_x')

Moment = str | BlockFormat | None
Exclude = Callable[[str, jax.Array], bool] | Literal['embeddings'] | None


def quantized_state(
  inner: optax.GradientTransformation,
  *,
  first: Moment = 'dyn8',
  second: Moment = 'dyn8',
  block: int | None = None,
  min_size: int = MIN_SIZE,
  exclude: Exclude = 'embeddings',
) -> optax.GradientTransformationExtraArgs:
  """Keeps the moments of an optimizer in few bits: decode, update, encode.

  A leaf of the state of `inner` is encoded if it is the place of a parameter in
  a subtree that has the structure of the parameters (parts may be masked), has
  its shape, holds floats, and has at least `min_size` elements. The name of the
  field that holds the subtree says what it is: nu, nu_max, sum_of_squares, e_g
  and e_x are second moments; all others, such as mu and trace, first moments.
  `inner` computes in float32 (float64 for such parameters) whatever the dtypes
  of parameters and gradients, and updates have the dtypes of the gradients.

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
      leaves where it is true are left as they are. 'embeddings' is
      `is_embedding`; None makes no exception.

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
  if not isinstance(inner, optax.GradientTransformation):
    raise TypeError(f'{inner=} must be an optax.GradientTransformation')
  check_steps('min_size', min_size, 0)
  if block is not None:
    check_steps('block', block)
  if isinstance(exclude, str):
    if exclude != 'embeddings':
      raise ValueError(
        f"exclude={exclude!r} must be 'embeddings', None or a function of a"
        ' path and a parameter'
      )
    exclude = is_embedding
  codecs = {}
  for name, value in (('first', first), ('second', second)):
    if value is not None:
      codecs[name] = _codecs.find(value, name == 'second', name, block)
  inner = in_float32(inner)

  def init(params):
    check_dense('params', params)
    _serialization.know_all()

    def encode(field, path, param, x):
      return _encode_first(
        codecs.get(_role(field)),
        content(param),
        x,
        positive=_role(field) == 'second',
        is_exempt=exclude is not None
        and exclude(path_name(path), content(param)),
        min_size=min_size,
      )

    return map_moments(encode, params, inner.init(params))

  def update(updates, state, params=None, **extra_args):
    decoded = map_moments(_decode, updates, state, is_leaf=_codecs.is_encoded)
    updates, new = inner.update(updates, decoded, params, **extra_args)
    return updates, map_moments(
      _encode_again, updates, state, new, is_leaf=_codecs.is_encoded
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _encode_first(
  codec, param, x, *, positive: bool, is_exempt: bool, min_size: int
):
  """A leaf of a new state, encoded if it is a moment that is to be."""
  value = content(x)
  if (
    codec is None
    or is_exempt
    or not param.ndim
    or param.size < min_size
    or jnp.shape(value) != param.shape
    or not jnp.issubdtype(value.dtype, jnp.floating)
  ):
    return x
  encoded = _codecs.encode(value, codec, positive)
  # A variable of NNX holds an array: with a pytree in it, `nnx.Optimizer` puts
  # a dict of its leaves in the place of the pytree.
  is_variable = hasattr(type(x), 'get_raw_value')
  return encoded if is_variable else reboxed(x, encoded)


def _decode(field, path, update, old):
  """A leaf of a state as floats, in the box that the gradient has."""
  del field, path
  encoded = content(old)
  if not _codecs.is_encoded(encoded):
    return old
  return reboxed(update, _codecs.decode(encoded))


def _encode_again(field, path, update, old, new):
  """The leaf `new`, encoded if `old` is."""
  del path, update
  encoded = content(old)
  if not _codecs.is_encoded(encoded):
    return new
  positive = _role(field) == 'second'
  return reboxed(old, _codecs.encode_like(encoded, content(new), positive))


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
  min_size: int | None = None,
  exclude: Exclude = 'embeddings',
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments of 8 bits, as `optax.adamw` otherwise.

  Args:
    learning_rate: a number or a schedule.
    b1: as in `optax.adamw`, as are `b2`, `eps`, `weight_decay`, `mask` and
      `nesterov`.
    first: as in `quantized_state`, as are `second`, `min_size`, None for its
      default, and `exclude`.
  """
  return optax.chain(
    quantized_state(
      optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
      first=first,
      second=second,
      min_size=MIN_SIZE if min_size is None else min_size,
      exclude=exclude,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def adamw_4bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
  first: Moment = 'de4',
  second: Moment = 'rank1_lin4',
  min_size: int | None = None,
  exclude: Exclude = 'embeddings',
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments of 4 bits: 'de4', and 'rank1_lin4' for the second.

  Args:
    learning_rate: a number or a schedule.
    b1: as in `adamw`, as are all other arguments.
  """
  return adamw(
    learning_rate,
    b1,
    b2,
    eps,
    weight_decay,
    mask,
    nesterov=nesterov,
    first=first,
    second=second,
    min_size=min_size,
    exclude=exclude,
  )


def state_bytes(state: PyTree) -> int:
  """Bytes of all arrays of a state, or of its `jax.eval_shape`."""
  return sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(state)
  )


def _role(field: str | None) -> str:
  return 'second' if field in _SECOND else 'first'
