"""Low-rank adapters beside frozen weights, packed or not (LoRA, QLoRA).

An adapter adds scale a b to a weight w, where a (in, r) and b (r, out) have
few numbers. These are trained; w stays as it is, packed if it is a QArray:

    params = nn.quantize_params(params, None, formats.nf4_g64)
    adapters = lora.init(key, params, rank=16)

    def loss(adapters):
      return of_model(lora.attach(params, adapters))

    grads = jax.grad(loss)(adapters)       # and any optimizer

`attach` puts an `ops.LowRank` in the place of each weight, which `dot` and its
relatives contract as w and two small products. Adapters are arrays by path:
`io.save` writes them without the model, and one model serves several of them.

LoRA is due to Hu et al. 2021, arXiv:2106.09685; on packed weights, QLoRA, to
Dettmers et al. 2023, arXiv:2305.14314.
"""

import difflib
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import _low_rank, _sites, _transformed, ops, qarray
from lowbit_jax._low_rank import Adapter as Adapter, LowRank, is_operand
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._tree import path_name
from lowbit_jax._typing import Key, PyTree, ScaleRule
from lowbit_jax.qarray import QArray

Select = str | Callable[[str, Any], bool]


def init(
  key: Key,
  params: PyTree,
  select: Select | None = None,
  *,
  rank: int = 8,
  alpha: float | None = None,
  stacked: Select | None = None,
) -> dict[str, Adapter]:
  """New adapters, which add nothing yet: a is random and b is zero.

  The inputs of a weight are the axes that its products contract. Names of Flax
  tell them as in `nn.quantize_params`; otherwise they are the axes along which
  blocks of a QArray lie, and the last but one of other weights. Outputs are the
  axes behind them (in front, if the inputs are the last axis), or all others
  where the names tell them. Further axes in front stack weights, each of which
  has an adapter of its own:

    weight (in, out)            a (in, 1, r)            b (1, out, r)
    weight (layers, in, out)    a (layers, in, 1, r)    b (layers, 1, out, r)

  Args:
    key: PRNG key; each adapter draws its own numbers, according to its path.
    params: tree of arrays and QArrays, also behind transforms; of a Linen model
      without boxes, see `nn.unbox`.
    select: regular expression that is searched in the path of a leaf, such as
      'layers/1/kernel', or a predicate of path and leaf. None selects all
      quantized weights of two or more axes.
    rank: the rank r of all adapters.
    alpha: the product of the factors is multiplied with alpha / rank; None for
      a factor of 1.
    stacked: regular expression or predicate for leaves that hold layers stacked
      along axis 0, where names tell the axes of one layer.

  Returns:
    Adapters by path, in float32. a is uniform within 1 / sqrt(inputs), as that
    of the authors of LoRA.

  Raises:
    ValueError: if nothing is selected, and for a leaf that is no matrix.
    TypeError: for a leaf that is no float array and not quantized.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> adapters = lowbit.lora.init(jax.random.key(0), {'up': w}, rank=4)
    >>> adapters['up'].a.shape, adapters['up'].b.shape
    ((64, 1, 4), (1, 8, 4))
  """
  if type(rank) is not int or rank < 1:
    raise ValueError(f'rank={rank!r} must be an int of 1 or more')
  if alpha is not None and (
    isinstance(alpha, bool) or not isinstance(alpha, int | float)
  ):
    raise TypeError(f'alpha={alpha!r} must be a Python number or None')
  for name, value in (('select', select), ('stacked', stacked)):
    if not (value is None or isinstance(value, str) or callable(value)):
      raise TypeError(
        f'{name}={value!r} must be a regular expression, a'
        ' function of path and leaf, or None'
      )
  leaves = _leaves(params)
  chosen = [path for path, w in leaves.items() if _selects(select, path, w)]
  if not chosen:
    raise ValueError(
      f'select={select!r} selects none of the leaves {_some(leaves)} of params;'
      " name them, as in select='kernel$'"
    )
  scale = 1.0 if alpha is None else alpha / rank
  adapters = {}
  for path in chosen:
    _check(path, leaves[path])
    layers = int(stacked is not None and _matches(stacked, path, leaves[path]))
    axes = _axes(path, leaves, layers)
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    adapters[path] = _new(own, leaves[path].shape, axes, rank, scale)
  return adapters


def attach(params: PyTree, adapters: Mapping[str, Adapter]) -> PyTree:
  """The parameters with an `ops.LowRank` in place of each adapted weight.

  Nothing is copied or computed: call it in a loss, also under `jax.jit` and
  `jax.grad`.

  Args:
    params: the tree that `init` was given, or one with the same weights in
      other formats.
    adapters: by path, from `init`.

  Raises:
    ValueError: for a path that params does not have, a weight that has an
      adapter already, and shapes that do not fit.
    TypeError: for what is no Adapter.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> params = {'up': jnp.ones((64, 8))}
    >>> adapters = lowbit.lora.init(jax.random.key(0), params, 'up', rank=4)
    >>> w = lowbit.lora.attach(params, adapters)['up']
    >>> lowbit.dot(jnp.ones((1, 64)), w).shape
    (1, 8)
  """
  leaves = _leaves(params)
  for path in adapters:
    if path not in leaves:
      known = ', '.join(difflib.get_close_matches(path, leaves)) or 'none'
      raise ValueError(
        f'params has no leaf {path!r:.200} for an adapter; similar are {known}'
      )

  def attached(path, w):
    if path not in adapters:
      return w
    adapter = adapters[path]
    if not isinstance(adapter, Adapter):
      raise TypeError(
        f'adapters[{path!r}] is a {type(adapter).__name__}, not an Adapter of'
        ' lora.init'
      )
    _check(path, w)
    try:
      return LowRank(w, adapter.a, adapter.b, adapter.scale)
    except (TypeError, ValueError) as error:
      raise type(error)(f'the adapter of {path!r} does not fit: {error}') from (
        error
      )

  return _mapped(attached, params)


def merge(
  params: PyTree,
  adapters: Mapping[str, Adapter] | None = None,
  *,
  scale_rule: ScaleRule | None = None,
) -> PyTree:
  """The parameters with adapters added to the weights.

  An array stays an array. A QArray is dequantized, added to in float32 and
  quantized again in its format and along its axes, with new scales: this rounds
  the weight a second time, so the model differs from that of `attach` by a
  rounding error. A weight behind a transform goes through it. To quantize by a
  method of your own, merge into dequantized weights and quantize the result.

  Args:
    params: the tree that `init` was given.
    adapters: by path, from `init`; None for those that `attach` has put into
      params.
    scale_rule: scale rule in place of that of the format.

  Returns:
    A tree like params, without adapters.

  Raises:
    ValueError, TypeError: as `attach`; also for a scale rule that the format of
      a weight does not have.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> w = lowbit.quantize(jnp.ones((64, 8)), lowbit.formats.mxfp4, axis=-2)
    >>> adapters = lowbit.lora.init(jax.random.key(0), {'up': w}, rank=4)
    >>> lowbit.lora.merge({'up': w}, adapters)['up'].fmt.name
    'mxfp4'
  """
  if adapters is not None:
    params = attach(params, adapters)

  def merged(path, w):
    if not isinstance(w, LowRank):
      return w
    try:
      return _merged(w, scale_rule)
    except (TypeError, ValueError) as error:
      error.add_note(f'This is the parameter {path!r}.')
      raise

  return _mapped(merged, params)


class _Axes(NamedTuple):
  """Axes of a weight, negative; those in front of them stack weights."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def _axes(path: str, leaves: Mapping[str, Any], layers: int) -> _Axes:
  w = leaves[path]
  if (layout := _sites.known_layout(path, leaves, layers)) is not None:
    own = range(-layout.rank, 0)
    outputs = tuple(axis for axis in own if axis not in layout.contracted)
    return _Axes(layout.contracted, outputs)
  if w.ndim - layers < 2:
    raise ValueError(
      f'{path!r} with shape {w.shape} has no inputs and outputs: narrow'
      ' select=, or stacked='
    )
  inputs = _block_axes(w)
  if inputs[-1] == -1:
    return _Axes(inputs, (inputs[0] - 1,))
  return _Axes(inputs, tuple(range(inputs[-1] + 1, 0)))


def _block_axes(w: Any) -> tuple[int, ...]:
  """Where blocks lie; the last axis but one of arrays, and in tiles."""
  q = w.weight if isinstance(w, Transformed) else w
  if not isinstance(q, QArray) or q.fmt.is_tile:
    return (-2,)
  return qarray.merged_axes(q) if q.merged else q.axes


def _new(key: Key, shape, axes: _Axes, rank: int, scale: float) -> Adapter:
  ndim = len(shape)

  def without(away):
    sizes = (1 if d - ndim in away else n for d, n in enumerate(shape))
    return *sizes, rank

  inputs = math.prod(shape[axis] for axis in axes.inputs)
  bound = 1 / math.sqrt(max(inputs, 1))
  a = jax.random.uniform(key, without(axes.outputs), jnp.float32, -bound, bound)
  return Adapter(a, jnp.zeros(without(axes.inputs), jnp.float32), scale)


def _merged(w: LowRank, scale_rule: ScaleRule | None) -> Any:
  weight, term = w.weight, _low_rank.term(w)
  if isinstance(weight, Transformed):
    q = _requantized(weight.weight, weight.dual(term), scale_rule)
    return _transformed.replace(weight, weight=q)
  if isinstance(weight, QArray):
    return _requantized(weight, term, scale_rule)
  return w.dequantize()


def _requantized(q: QArray, term, scale_rule: ScaleRule | None) -> QArray:
  """`q` with the term added, in the same format and layout."""
  axis = qarray.merged_axes(q) if q.merged else q.axis

  def quantize(x):
    return ops.quantize(x, q.fmt, axis=axis, scale_rule=scale_rule)

  for _ in range(_stacked(q)):
    quantize = jax.vmap(quantize)
  x = qarray.dequantize(q, jnp.float32) + term.astype(jnp.float32)
  return quantize(x).astype(q.dtype)


def _stacked(q: QArray) -> int:
  """How many leading axes stack tensors with a tensor scale of their own."""
  if q.tensor_scale is None:
    return 0
  return sum(n > 1 for n in q.tensor_scale.shape)


def _leaves(params: PyTree) -> dict[str, Any]:
  leaves = jax.tree.leaves_with_path(params, is_leaf=is_operand)
  return {path_name(path): leaf for path, leaf in leaves}


def _mapped(f: Callable[[str, Any], Any], params: PyTree) -> PyTree:
  return jax.tree.map_with_path(
    lambda path, leaf: f(path_name(path), leaf), params, is_leaf=is_operand
  )


def _check(path: str, w: Any) -> None:
  """Refuses what takes no adapter."""
  if isinstance(w, LowRank):
    raise ValueError(
      f'{path!r} has an adapter already: lora.merge(params) adds it to the'
      ' weight'
    )
  is_float = hasattr(w, 'dtype') and jnp.issubdtype(w.dtype, jnp.floating)
  if not (is_quantized(w) or is_float):
    raise TypeError(
      f'{path!r} is {getattr(w, "dtype", type(w).__name__)}; adapters go beside'
      ' float arrays and QArrays: narrow select='
    )


def _selects(select: Select | None, path: str, w: Any) -> bool:
  if select is None:
    return is_quantized(w) and w.ndim >= 2
  return _matches(select, path, w)


def _matches(which: Select, path: str, w: Any) -> bool:
  if isinstance(which, str):
    return re.search(which, path) is not None
  return bool(which(path, w))


def _some(leaves: Mapping[str, Any]) -> str:
  names = list(leaves)
  return ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
