"""Quantizing the parameters of a model, leaf by leaf."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from lowbit_jax import (
  _low_rank,
  _quantize as core,
  _sites,
  _transformed,
  ops,
  qarray,
)
from lowbit_jax._low_rank import LowRank, is_operand
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._tree import path_name
from lowbit_jax._typing import Axis, PyTree, ScaleRule
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray

# Of (path, w, fmt, axis).
Method = Callable[[str, jax.Array, BlockFormat, Any], QArray | Transformed]

_PADDING = 0.25  # more than that is not quantized without a word
_REMEDY = 'pass axis=, narrow select=, or name stacked layers in stacked='


def quantize_params(
  params: PyTree,
  select: str | Callable[[str, Any], bool] | None,
  fmt: BlockFormat | Callable[[str, Any], BlockFormat | None],
  *,
  axis: Axis | Callable[[str, Any], Axis] = None,
  stacked: str | Callable[[str, Any], bool] | None = None,
  scale_rule: ScaleRule | None = None,
  method: Method | None = None,
) -> PyTree:
  """A parameter tree with QArrays in place of the selected leaves.

  The result goes to `model.apply` of a Linen model, `nnx.merge` of an NNX state
  and to `lowbit_jax.io.save`; `partition` and `trainable_mask` keep it away
  from gradients and optimizers.

  Blocks lie along the last contracted axis, which follows from the names that
  Flax gives:

    kernel (in, out)                        axis -2
    kernel (..., in, out) of a module named conv...  axis -2, input channels
    kernel (in, heads, size) of query, key and value of an attention  axis -3
    kernel (heads, size, out) of its out                              axis -2
    kernel (..., out) beside a bias of shape (out)  axis -2; so for more axes
    embedding (n, features)                 axis -1

  Where blocks do not divide that axis and others in front of it are contracted
  as well, (heads, size) or those of a convolution, they run through all of them
  as through one. Tiles span that axis and the last one. Other leaves are
  refused: DenseGeneral and Einsum do not say in their parameters what they
  contract (the modules of NNX do: see `nn.nnx.quantize`).

  Args:
    params: tree of arrays: the params of a Linen model, boxed in
      `nn.Partitioned` or not, an NNX state, or any other.
    select: regular expression that is searched in the path of a leaf, such as
      'layers/1/kernel', or a predicate of path and leaf. None selects all
      leaves named 'kernel' with two or more axes, so no embeddings.
    fmt: block format, or a function of path and leaf that returns one, or None
      to leave the leaf as it is.
    axis: block axis (a tuple as in `quantize`) of all selected leaves, or a
      function of path and leaf; where it is None, the table above applies.
    stacked: regular expression or predicate for leaves that hold layers stacked
      along axis 0 (`nn.scan`, `nn.vmap`); each layer is quantized by itself.
    scale_rule: scale rule in place of that of the format.
    method: `method(path, w, fmt, axis)` gives the QArray of a leaf, of its
      shape and dtype, or an `ops.Transformed`, in place of `quantize`: by
      calibration, see `lowbit_jax.ptq.method`. Of stacked layers it gets one
      after the other, the index behind the path.

  Returns:
    The same tree. Leaves that are quantized already stay as they are. Where
    padding makes a leaf more than a quarter larger, a UserWarning names the
    format that fits.

  Raises:
    ValueError: if nothing is selected, or for a leaf whose axis is not known.
    TypeError, ValueError: for a result of `method` that does not stand for the
      leaf.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> import lowbit_jax as lowbit
    >>> model = linen.Dense(8)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 64)))['params']
    >>> q = lowbit.nn.quantize_params(params, None, lowbit.formats.mxfp4)
    >>> model.apply({'params': q}, jnp.ones((1, 64))).shape
    (1, 8)
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_stop)
  paths = [path_name(path) for path, _ in leaves]
  values = [leaf for _, leaf in leaves]
  choose = Choice(select, fmt, axis, stacked, scale_rule, method)
  new = choose.quantize(dict(zip(paths, map(_content, values), strict=True)))
  return treedef.unflatten(
    [
      _replaced(old, new[path]) if path in new else old
      for path, old in zip(paths, values, strict=True)
    ]
  )


def trainable_mask(params: PyTree) -> PyTree:
  """A tree of bools for `optax.masked`: False for QArrays and integers.

  Of an `ops.LowRank` the factors are True and its weight is False.

  Examples:
    `optax.masked(optax.adam(1e-3), trainable_mask)`
  """

  def trainable(x):
    if isinstance(x, LowRank):
      return _low_rank.replace(x, weight=False, a=True, b=True)
    is_float = hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)
    return not is_quantized(x) and is_float

  return jax.tree.map(trainable, params, is_leaf=is_operand)


class Choice(NamedTuple):
  """The arguments of `quantize_params`."""

  select: Any
  fmt: Any
  axis: Any
  stacked: Any
  scale_rule: ScaleRule | None
  method: Method | None

  def quantize(
    self, leaves: dict[str, Any], known: dict[str, _sites.Layout] | None = None
  ) -> dict[str, QArray | Transformed]:
    """Quantized leaves by path.

    Args:
      leaves: all leaves by path.
      known: layouts of leaves by path, where they do not follow from names.
    """
    for name in ('select', 'stacked', 'method'):
      value = getattr(self, name)
      named = isinstance(value, str) and name != 'method'
      if not (value is None or named or callable(value)):
        raise TypeError(f'{name}={value!r} must be a function or None')
    chosen = [
      path for path, leaf in leaves.items() if self._selects(path, leaf)
    ]
    if not chosen:
      raise ValueError(
        f'select={self.select!r} selects none of the leaves {_some(leaves)} of'
        ' params'
      )
    out = {}
    for path in chosen:
      if is_quantized(leaves[path]):
        continue
      if isinstance(leaves[path], LowRank):
        raise ValueError(
          f'{path!r} has an adapter: quantize the weight first, then'
          ' lora.attach the adapter'
        )
      if (q := self._leaf(path, leaves, known or {})) is not None:
        _warn_of_padding(path, q)
        out[path] = q
    return out

  def _selects(self, path: str, leaf) -> bool:
    if self.select is None:
      return _name(path) == 'kernel' and jnp.ndim(leaf) >= 2
    return _matches(self.select, path, leaf)

  def _leaf(self, path: str, leaves, known) -> QArray | Transformed | None:
    leaf = leaves[path]
    fmt: Any = self.fmt(path, leaf) if callable(self.fmt) else self.fmt
    if fmt is None:
      return None
    core.check_format(fmt)
    is_stack = self.stacked is not None and _matches(self.stacked, path, leaf)
    axis: Any = self.axis(path, leaf) if callable(self.axis) else self.axis
    layers = int(is_stack)
    if axis is None:
      layout = known.get(path) or _sites.known_layout(path, leaves, layers)
      if layout is None:
        raise ValueError(
          f'the block axis of {path!r} with shape {leaf.shape} is not known:'
          f' {_REMEDY}'
        )
      layers = leaf.ndim - layout.rank
      axis = _sites.block_axis(layout, fmt, leaf.shape)
    elif not all(a < 0 for a in (axis if isinstance(axis, tuple) else (axis,))):
      raise ValueError(f'{axis=} of {path!r} must count from the end: < 0')
    try:
      rule = _scaling.check_scale_rule(fmt, self.scale_rule)
      if self.method is None:
        return _quantize(leaf, fmt, axis, rule, layers)
      if self.scale_rule is not None:
        raise ValueError(
          f'scale_rule={self.scale_rule!r} is for the quantization that method='
          ' replaces; give it to the method'
        )
      return _by_method(self.method, path, leaf, fmt, axis, layers)
    except (TypeError, ValueError) as error:
      error.add_note(f'This is the parameter {path!r}.')
      raise


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
  x, fmt: BlockFormat, axis, scale_rule: str, layers: int
) -> QArray:
  """`ops.quantize` of each layer."""

  def quantize(x):
    return ops.quantize(x, fmt, axis=axis, scale_rule=scale_rule)

  for _ in range(layers):
    quantize = jax.vmap(quantize)
  return quantize(x)


def _warn_of_padding(path: str, q: QArray | Transformed) -> None:
  """Warns where padding costs more than a quarter."""
  q = q.weight if isinstance(q, Transformed) else q
  whole = qarray.flat(q)
  sizes = [whole.shape[axis] for axis in q.axes]
  shares = [pad / n for n, pad in zip(sizes, q.pad, strict=True) if n]
  cost = math.prod(1 + share for share in shares) - 1
  if cost <= _PADDING:
    return
  fits = None if q.fmt.is_tile else _sites.fitting_format(q.fmt, sizes[0])
  remedy = 'leave it in bfloat16' if fits is None else f'use {fits}'
  warnings.warn(
    f'padding adds {100 * cost:.0f} % to {path!r} of shape {q.shape}, whose'
    f' blocks of {q.fmt} have {q.bits_per_element:.3g} bits per element:'
    f' {remedy}, or pad the model',
    stacklevel=2,
  )


def _by_method(
  method: Method, path: str, w, fmt: BlockFormat, axis, layers: int
) -> QArray | Transformed:
  """What a method makes of each layer, checked and stacked again."""
  if layers:
    parts = [
      _by_method(method, f'{path}/{i}', layer, fmt, axis, layers - 1)
      for i, layer in enumerate(w)
    ]
    return _transformed.stack(parts)
  q = method(path, w, fmt, axis)
  if not is_quantized(q):
    raise TypeError(
      f'method returned {type(q).__name__} for {path!r}; return a QArray, such'
      ' as quantize_with(w, scale, fmt, axis=axis), or one in ops.Transformed'
    )
  if (q.shape, q.dtype) != (w.shape, w.dtype):
    raise ValueError(
      f'method returned {q} for {path!r} of shape {w.shape} and dtype'
      f' {w.dtype}; both must agree'
    )
  return q


def _matches(which, path: str, leaf) -> bool:
  if isinstance(which, str):
    return re.search(which, path) is not None
  return bool(which(path, leaf))


def _stop(x) -> bool:
  """What stays whole in a tree: QArrays, boxes of Linen, variables of NNX."""
  return isinstance(x, meta.AxisMetadata) or hasattr(type(x), 'get_raw_value')


def _content(x):
  """The array in a box or variable."""
  if is_operand(x):
    return x
  if isinstance(x, meta.AxisMetadata):
    return _content(x.value)  # pyright: ignore[reportAttributeAccessIssue]
  if hasattr(type(x), 'get_raw_value'):
    return x.get_raw_value()
  return x


def _replaced(old, q: QArray | Transformed):
  """`q` in the box or variable of `old`."""
  if isinstance(old, meta.AxisMetadata):
    value = old.value  # pyright: ignore[reportAttributeAccessIssue]
    return old.replace_boxed(_replaced(value, q))
  if hasattr(type(old), 'get_raw_value'):
    from lowbit_jax.nn import _frozen  # importing NNX takes a while

    return _frozen.frozen(old, q)
  return q


def _name(path: str) -> str:
  return path.rsplit('/', 1)[-1]


def _some(leaves) -> str:
  names = list(leaves)
  return ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
