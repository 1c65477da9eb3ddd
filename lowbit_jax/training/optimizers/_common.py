"""What optimizers share: names, parameters in states, dtypes, norms, checks."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core

from lowbit_jax import qarray
from lowbit_jax._transformed import is_quantized
from lowbit_jax._tree import path_name
from lowbit_jax._typing import PyTree
from lowbit_jax.qarray import QArray

_EMBEDDING = re.compile(r'(?<!un)embed|(^|[/_])w[tp]e($|/)', re.IGNORECASE)
_HEAD = re.compile(
  r'(^|/)((\w+_)?head|logits|unembed\w*|classifier)($|/)', re.IGNORECASE
)


def is_embedding(path: str, leaf: Any = None) -> bool:
  """Whether a path names an embedding: it holds 'embed', 'wte' or 'wpe'."""
  del leaf
  return _EMBEDDING.search(path) is not None


def is_head(path: str, leaf: Any = None) -> bool:
  """Whether a path names an output head.

  That is a component 'head', '..._head', 'logits', 'unembed...' or
  'classifier' of the path; 'multihead' is not one.
  """
  del leaf
  return _HEAD.search(path) is not None


def is_boxed(x: object) -> bool:
  """Whether `x` is a variable of NNX or a box of Linen around an array."""
  # By their methods: importing Flax takes a while.
  return not is_quantized(x) and (
    hasattr(type(x), 'get_raw_value') or hasattr(type(x), 'replace_boxed')
  )


def content(x: Any) -> Any:
  """What is in a variable or box, at any depth; other things as they are."""
  while is_boxed(x):
    x = x.get_raw_value() if hasattr(x, 'get_raw_value') else x.value
  return x


def reboxed(like: Any, value: Any) -> Any:
  """`value` in the variables and boxes around `like`."""
  if not is_boxed(like):
    return value
  if hasattr(like, 'get_raw_value'):
    return like.replace(reboxed(like.get_raw_value(), value))
  return like.replace_boxed(reboxed(like.value, value))


def _stops(x: object) -> bool:
  return isinstance(x, optax.MaskedNode) or is_boxed(x)


def map_moments(
  f: Callable[..., Any],
  params: PyTree,
  state: PyTree,
  *rest: PyTree,
  is_leaf: Callable[[Any], bool] = lambda x: False,
) -> PyTree:
  """Maps the leaves of a state that belong to parameters.

  These are the leaves of subtrees with the structure of the parameters, in
  which `optax.MaskedNode` may stand for any part: neither the names nor the
  shapes of parameters decide, but the place in such a subtree.

  Args:
    f: function of the name of the field that holds the subtree (None for the
      state itself), the path of the parameter, the parameter, and the leaf of
      the state and those of `rest` in the same place. Variables and boxes of
      Flax are leaves.
    params: the parameters, or a tree of the same structure such as gradients.
    state: state of an optimizer.
    *rest: trees of the structure of `state`.
    is_leaf: what else is a leaf of `state`.

  Returns:
    `state` with these leaves replaced; other leaves are kept, of the last tree
    of `rest` if there is one.
  """
  paths = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_boxed)
  ]
  # The place of a parameter in the tree, to be found by any part of it.
  numbers = jax.tree.structure(params, is_leaf=is_boxed).unflatten(
    range(len(paths))
  )

  def stops(x):
    return _stops(x) or is_leaf(x)

  def places(x):
    """The treedef of a copy, and numbers of its leaves or None where masked."""
    leaves, treedef = jax.tree.flatten(x, is_leaf=stops)
    try:
      parts = treedef.flatten_up_to(numbers)
    except (TypeError, ValueError):
      return None
    masked = [isinstance(leaf, optax.MaskedNode) for leaf in leaves]
    pairs = list(zip(masked, parts, strict=True))
    if not all(m or isinstance(part, int) for m, part in pairs):
      return None
    return treedef, [None if m else part for m, part in pairs]

  values = jax.tree.leaves(params, is_leaf=is_boxed)

  def apply(path, *trees):
    found = places(trees[0])
    if found is None:
      return trees[-1]
    treedef, own = found
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    out = [
      row[-1] if i is None else f(_field(path), paths[i], values[i], *row)
      for i, *row in zip(own, *columns, strict=True)
    ]
    return treedef.unflatten(out)

  return jax.tree_util.tree_map_with_path(
    apply,
    state,
    *rest,
    is_leaf=lambda x: stops(x) or places(x) is not None,
  )


def _field(path) -> str | None:
  """The last name in the path of a subtree of a state."""
  for key in reversed(path):
    name = getattr(key, 'name', getattr(key, 'key', None))
    if isinstance(name, str):
      return name
  return None


def wide_dtype(x: jax.Array) -> Any:
  """float32 for floats of fewer bits, otherwise the dtype of `x`."""
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
    return jnp.dtype(jnp.float32)
  return dtype


def wide(x: jax.Array) -> jax.Array:
  """Floats of fewer than 32 bits as float32; other arrays as they are."""
  dtype = wide_dtype(x)
  return x if dtype == jnp.result_type(x) else jnp.asarray(x, dtype)


def widened(tree: PyTree) -> PyTree:
  """A tree with floats of fewer than 32 bits as float32.

  QArrays stay QArrays; they stand for float32.
  """

  def apply(x):
    if has_codes(x):
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      return qarray.replace(x, dtype=dtype)
    return wide(x)

  return jax.tree.map(apply, tree, is_leaf=has_codes)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
  """A tree of arrays with the dtypes of another."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer that sees parameters and gradients in at least float32.

  Its state has the same dtypes whatever those of gradients and parameters are,
  and updates have the dtypes of the gradients.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return inner.init(widened(params))

  def update(updates, state, params=None, **extra_args):
    check_dense('updates', updates)
    out, state = inner.update(
      widened(updates), state, widened(params), **extra_args
    )
    return cast_like(out, updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def safe_norm(
  x: jax.Array, axis: int | tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
  """A norm that neither overflows nor underflows on the way.

  Args:
    x: array of at least float32.
    axis: axes over which the squares are added, None for all.

  Returns:
    (scale, norm) with size 1 along these axes: a power of two and the norm of
    x scale. The scale is 1 where the largest magnitude is between 2^-50 and
    2^50, so that such numbers are rounded as ever; otherwise, in float32, it
    takes the norm to within 2^-50 and 2^50 times the root of the size. For
    zeros the norm is zero.
  """
  top = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
  unit = jnp.finfo(top.dtype).maxexp // 128  # 1 in float32

  def power(exponent):
    return np.asarray(2.0 ** (exponent * unit), top.dtype)

  # Not for zeros: XLA takes the square of a constant scale out of the sum.
  is_small = (top > 0) & (top < power(-50))
  small = jnp.where(is_small, power(76), power(0))
  scale = jnp.where(top > power(50), power(-80), small)
  squares = jnp.square(jnp.abs(x * scale))
  return scale, jnp.sqrt(jnp.sum(squares, axis=axis, keepdims=True))


def has_codes(x: object) -> bool:
  """Whether `x` is a QArray, and not only the scales of one.

  `lowbit_jax.partition(scales=True)` makes those; they are trained like any
  other float array.
  """
  return isinstance(x, QArray) and hasattr(x.codes, 'dtype')


def increment(steps: jax.Array) -> jax.Array:
  """steps + 1, or the largest int32."""
  return jnp.asarray(optax.safe_increment(steps))


def check_range(
  name: str, value: float | jax.Array, low: float, high: float
) -> None:
  """Raises ValueError for a number outside [low, high), if it is known."""
  if not isinstance(value, core.Tracer) and not low <= value < high:
    raise ValueError(f'{name}={value!r} must be in [{low}, {high})')


def check_steps(name: str, value: int, least: int = 1) -> None:
  """Raises ValueError for a value that is not an int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    hint = ''
    if isinstance(value, jax.Array):
      hint = f"; optax.inject_hyperparams takes static_args='{name}'"
    raise ValueError(
      f'{name}={value!r} must be an int of at least {least}{hint}'
    )


def check_dense(name: str, tree: PyTree) -> None:
  """Raises TypeError for QArrays, whose codes no optimizer can change."""
  found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=has_codes)
  for path, x in found:
    if has_codes(x):
      raise TypeError(
        f'{name} holds a QArray at {path_name(path) or "its root"!r}, and steps'
        ' are not added to codes: give the trainable tree of'
        ' lowbit_jax.partition, or train QArrays by optimizers.direct'
      )


def check_real(where: str, tree: PyTree) -> None:
  """Raises TypeError for complex arrays and QArrays."""
  check_dense(f'what {where} gets', tree)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise TypeError(
        f'{where} takes real numbers, {path_name(path)} is {x.dtype}; leave it'
        ' out by optax.masked, or give its real and imaginary parts'
      )
