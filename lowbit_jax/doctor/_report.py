"""report: every tensor of a tree, measured and advised."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import _sites, qarray
from lowbit_jax._low_rank import LowRank, is_operand
from lowbit_jax._quantize import check_array, check_format
from lowbit_jax._transformed import Transformed, is_quantized
from lowbit_jax._tree import path_name
from lowbit_jax._typing import PyTree, ScaleRule
from lowbit_jax.doctor import _advice, _alternatives, _measure
from lowbit_jax.doctor._table import Report, Row
from lowbit_jax.formats import BlockFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.numerics._codec import FLOAT_DTYPES, as_float_array
from lowbit_jax.qarray import QArray

# A vector in a tree that is smaller than this is a bias or a norm scale, which
# costs nothing to keep.
SMALL_VECTOR = 1 << 16

Axis = int | tuple[int, ...] | Callable[[str, Any], Any] | None


def report(
  params: PyTree,
  fmt: BlockFormat | None = None,
  *,
  select: Callable[[str, Any], bool] | None = None,
  scale_rule: ScaleRule | None = None,
  axis: Axis = None,
  reference: PyTree = None,
) -> Report:
  """Measures the error of tensors in a format, and advises what to change.

  Args:
    params: an array, a QArray, or a tree of them, boxed or not (Flax metadata
      boxes and NNX variables are opened). QArrays are measured as they are
      stored, also behind a transform, and of an `ops.LowRank` the weight is.
    fmt: the block format for arrays; may be None if all are QArrays.
    select: `(path, x) -> bool`, which leaves to measure; None for all floating
      arrays except, in a tree, vectors below 2^16 elements and leaves named
      'bias' or 'scale'.
    scale_rule: as in `quantize`.
    axis: block axis as in `quantize`, or `(path, x) -> axis`. In a tree None
      stands for the axis that `nn.quantize_params` takes, for other kernels
      for -2, and for the last axis otherwise (the last two for tiles).
    reference: for QArrays, the original array or tree with the same paths; it
      gives the QSNR and everything else that needs the original.

  Returns:
    A `Report`: iterable rows, `.to_dicts()`, and a table when printed. Its
    columns are bits per element with scales and padding; QSNR in dB; clipped
    elements; elements that became zero; scales that are subnormal or at the
    end of their range; zero blocks; NaN blocks; crest factor max |x| / rms; and
    rho, the largest ratio of the tensor maximum to a block maximum. Leaves that
    are not measured have a row with the reason.

  Raises:
    TypeError: for leaves that are not arrays, and for traced values.
    ValueError: for formats, rules and axes that do not fit.

  Examples:
    >>> import jax
    >>> import lowbit_jax as lowbit
    >>> x = jax.random.normal(jax.random.key(0), (64, 256))
    >>> report = lowbit.doctor.report(x, lowbit.formats.nvfp4)
    >>> report['array'].measures.bits_per_element
    4.501953125
  """
  if fmt is not None:
    check_format(fmt)
    _scaling.check_scale_rule(fmt, scale_rule)
  elif scale_rule is not None:
    raise ValueError(f'{scale_rule=} needs fmt=')
  if not (axis is None or isinstance(axis, int | tuple) or callable(axis)):
    raise TypeError(f'{axis=} must be an int, a tuple of ints or a function')
  if select is not None and not callable(select):
    raise TypeError(f'{select=} must be a function (path, x) -> bool')
  entries = _entries(params, 'params')
  originals = {} if reference is None else _entries(reference, 'reference')
  plan = _Plan(fmt, select, scale_rule, axis, originals, entries)
  bare = list(entries) == [BARE]
  return Report(tuple(_row(p, x, plan, bare) for p, x in entries.items()))


BARE = 'array'


class _Plan:
  """The arguments of a report that hold for all leaves."""

  def __init__(self, fmt, select, scale_rule, axis, originals, entries):
    self.fmt, self.select, self.scale_rule = fmt, select, scale_rule
    self.axis, self.originals, self.entries = axis, originals, entries

  def original(self, path: str, q: QArray | Transformed):
    """What a QArray was made of, or None if there is no reference."""
    if not self.originals:
      return None
    if path not in self.originals:
      raise ValueError(
        f'reference has no array at {path!r}; give a tree with the paths of'
        ' params'
      )
    x = as_float_array(self.originals[path], f'reference at {path!r}')
    if x.shape != q.shape:
      raise ValueError(
        f'reference at {path!r} has shape {x.shape}, the QArray {q.shape}'
      )
    return q.dual(x) if isinstance(q, Transformed) else x

  def axis_of(self, path: str, x, bare: bool) -> Any:
    if callable(self.axis):
      return self.axis(path, x)
    if self.axis is not None or bare:
      return self.axis
    layout = _sites.known_layout(path, self.entries)
    if layout is not None:
      return _sites.block_axis(layout, self.fmt, x.shape)
    if _name(path) == 'kernel' and x.ndim > 2 and not self.fmt.is_tile:
      return -2
    return None


def _row(path: str, x, plan: _Plan, bare: bool) -> Row:
  if is_quantized(x):
    shape, dtype = x.shape, x.dtype.name
  else:
    shape, dtype = tuple(np.shape(x)), _dtype_name(x)
  base = Row(path, shape, dtype)
  if reason := _why_skipped(path, x, plan, bare):
    return _replace(base, skipped=reason)
  if not _measure.is_concrete(x):
    raise TypeError(
      f'{path!r} has no values ({type(x).__name__}); call report outside jit,'
      ' on concrete arrays'
    )
  # A QArray is measured against its reference, an array after quantization.
  if isinstance(x, QArray | Transformed):
    q = x.weight if isinstance(x, Transformed) else x
    fmt, rule, x = q.fmt, None, plan.original(path, x)
  else:
    fmt = plan.fmt
    if fmt is None:
      raise TypeError(
        f'fmt=None, but {path!r} is an array that is not quantized; name a'
        ' format such as lowbit_jax.formats.mxfp4'
      )
    x = check_array(x, fmt)
    axis = plan.axis_of(path, x, bare)
    rule = _scaling.check_scale_rule(fmt, plan.scale_rule)
    q = _alternatives.quantize(x, fmt, axis=axis, scale_rule=rule)
  m = _measure.measure(q, x)
  axis = qarray.merged_axes(q) if q.merged else q.axis
  case = _alternatives.Case(path, fmt, rule, axis, m, x)
  advice = _advice.advise(case)
  return _replace(
    base,
    fmt=fmt.name,
    axis=axis,
    measures=m,
    rules=tuple(name for name, _ in advice),
    advice='; '.join(sentence for _, sentence in advice),
  )


def _replace(row: Row, **changes) -> Row:
  return Row(**{**row.__dict__, **changes})


def _why_skipped(path: str, x, plan: _Plan, bare: bool) -> str:
  """Why a leaf is not measured, '' if it is."""
  if plan.select is not None and not plan.select(path, x):
    return 'not selected'
  if math.prod(x.shape) == 0:
    return 'empty'
  if is_quantized(x) or bare:
    return ''
  dtype = np.dtype(x.dtype) if not _is_key(x) else None
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    return f'{_dtype_name(x)} is not floating-point'
  if dtype.name not in FLOAT_DTYPES:
    return f'{dtype.name}: cast it to float32 first'
  if plan.fmt is not None and x.ndim < len(plan.fmt.block):
    return f'{plan.fmt} needs {max(len(plan.fmt.block), 1)} axes'
  if plan.select is None and x.ndim < 2 and x.size < SMALL_VECTOR:
    return 'small vector'
  if plan.select is None and _name(path) in ('bias', 'scale'):
    return f'a {_name(path)}'
  return ''


def _entries(tree, name: str) -> dict[str, Any]:
  """Arrays and QArrays by path; boxes are opened, and factors left away."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_operand)
  out = {}
  for keys, leaf in leaves:
    leaf = _unbox(leaf)
    leaf = leaf.weight if isinstance(leaf, LowRank) else leaf
    if keys and _key_name(keys[-1]) == 'value' and len(keys) > 1:
      keys = keys[:-1]  # the content of a box
    path = path_name(keys) or BARE
    if not hasattr(leaf, 'dtype'):
      if not isinstance(leaf, bool | int | float | complex) or not keys:
        raise TypeError(
          f'{name} at {path!r} is a {type(leaf).__name__}, not an array; give'
          ' an array, a QArray or a tree of them'
        )
      leaf = np.asarray(leaf)
    out[path] = leaf
  if not out:
    raise ValueError(f'{name} holds no arrays')
  return out


def _unbox(leaf):
  if hasattr(leaf, 'dtype'):
    return leaf
  if callable(getattr(leaf, 'unbox', None)):
    return leaf.unbox()
  return getattr(leaf, 'value', leaf)


def _name(path: str) -> str:
  return path.rsplit('/', 1)[-1]


def _key_name(key) -> str:
  return str(getattr(key, 'name', ''))


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _dtype_name(x) -> str:
  return str(getattr(x.dtype, 'name', x.dtype))
