"""QArrays of every format in a safetensors file: the layout of this library.

The leaves of a QArray `x` are the tensors `x.codes`, `x.scale` and so on, and
`x.scale.codes` where scales are quantized in their turn. What the leaves do not
say stands in the metadata of the file, as JSON under the name `KEY`:

  {"x": {"fmt": ..., "axis": -1, "pad": [0], "dtype": "float32", "merged": [],
         "leaves": {"codes": null, "scale": null}}}

where `fmt` is what `formats.to_dict` gives, and a leaf that is a QArray has
such an object in place of null. A weight behind a transform, `ops.Transformed`,
is the QArray `x.weight` and the arrays of the transform, such as
`x.transform.order`:

  {"x": {"weight": {"fmt": ...}, "axis": -1, "rank": 2, "arrays": ["order"],
         "transform": {"class": "Permutation", "axis": -1}}}
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lowbit_jax import formats, qarray
from lowbit_jax._low_rank import LowRank
from lowbit_jax._transformed import Transformed
from lowbit_jax.io import _container, _transforms
from lowbit_jax.io._checkpoint import Tensor
from lowbit_jax.io._container import Stored
from lowbit_jax.io._layouts import field
from lowbit_jax.qarray import QArray

KEY = 'lowbit_jax.qarrays'
_FIELDS = ('fmt', 'axis', 'pad', 'dtype', 'merged', 'leaves')
_TRANSFORMED = ('weight', 'transform', 'axis', 'rank', 'arrays')
_DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def as_array(name: object, value: Any) -> np.ndarray:
  """A tensor that is no QArray, as an array.

  Raises:
    TypeError: for a weight with a low-rank term, whose dense value would be
      written in place of its packed one.
  """
  if isinstance(value, LowRank):
    raise TypeError(
      f'{name!r} is {value!r}: write lora.merge(params), or the weight and the'
      ' adapter apart'
    )
  return np.asarray(value)


def arrays(name: str, q: QArray | Transformed) -> Iterator[tuple[str, Any]]:
  """The leaves of a QArray, or of a weight behind a transform, with names."""
  if isinstance(q, Transformed):
    yield from arrays(f'{name}.weight', q.weight)
    for leaf, value in _transforms.split(q.transform)[1].items():
      yield f'{name}.transform.{leaf}', value
    return
  for leaf, value in _leaves(q):
    if isinstance(value, QArray):
      yield from arrays(f'{name}.{leaf}', value)
    else:
      yield f'{name}.{leaf}', value


def description(q: QArray | Transformed) -> dict[str, Any]:
  """What the leaves do not say.

  Raises:
    TypeError, ValueError: for a QArray that is not whole, or a transform of a
      class that files do not know.
  """
  if isinstance(q, Transformed):
    node, leaves = _transforms.split(q.transform)
    weight = description(q.weight)
    own = {'axis': q.axis, 'rank': q.rank, 'arrays': sorted(leaves)}
    return {'weight': weight, 'transform': node, **own}
  qarray.validate(q)
  return {
    'fmt': formats.to_dict(q.fmt),
    'axis': q.axis,
    'pad': q.pad,
    'dtype': q.dtype.name,
    'merged': q.merged,
    'leaves': {
      leaf: description(value) if isinstance(value, QArray) else None
      for leaf, value in _leaves(q)
    },
  }


def encoded(descriptions: Mapping[str, Any]) -> dict[str, str]:
  """Descriptions as metadata, nothing for none of them."""
  if not descriptions:
    return {}
  return {KEY: json.dumps(descriptions, sort_keys=True)}


def tensors(
  stored: dict[str, Stored], text: str | None
) -> Iterator[tuple[str, Tensor]]:
  """The stored weights of a file; takes their leaves out of `stored`.

  Args:
    stored: the tensors of a file by name.
    text: the metadata under `KEY`, or None.

  Raises:
    ValueError: for a description that no QArray has, or leaves that do not fit
      it, with the name.
  """
  nodes = {} if text is None else _container.parse(text.encode())
  if not isinstance(nodes, dict):
    raise ValueError(f'its metadata {KEY!r} are no JSON object')
  for name, node in nodes.items():
    try:
      tensor, parts = _tensor(name, node, stored)
      for part in parts:
        del stored[part.name]
    except (TypeError, ValueError) as error:
      raise ValueError(f'{name!r}: {error}') from error
    yield name, tensor


def _tensor(
  name: str, node: Any, stored: Mapping[str, Stored]
) -> tuple[Tensor, list['_Part']]:
  """One stored weight, and its parts."""
  is_transformed = isinstance(node, dict) and set(node) == set(_TRANSFORMED)
  weight, leaves = node, {}
  parts = _parts(name, node, stored) if not is_transformed else {}
  if is_transformed:
    weight = node['weight']
    parts = _parts(f'{name}.weight', weight, stored)
    if not all(type(node[name]) is int for name in ('axis', 'rank')):
      raise ValueError('its axis and rank must be ints')
    names = field(node, 'arrays', list, [])
    leaves = {n: _part(f'{name}.transform.{n}', stored) for n in names}
  whole = qarray.validate(_qarray(weight, parts, _shape))

  def read() -> QArray | Transformed:
    q = _qarray(weight, parts, _Part.array)
    if not is_transformed:
      return q
    axis, rank = node['axis'], node['rank']
    arrays = {n: part.array() for n, part in leaves.items()}
    transform = _transforms.joined(node['transform'], arrays, q.ndim - rank)
    return Transformed(q, transform, axis, rank)

  found = jax.tree.leaves((parts, leaves))
  nbytes = sum(part.nbytes for part in found)
  return Tensor('lowbit_jax', whole.shape, nbytes, whole.fmt, read), found


def _leaves(q: QArray) -> Iterator[tuple[str, Any]]:
  for leaf in qarray.LEAVES:
    if getattr(q, leaf) is not None:
      yield leaf, getattr(q, leaf)


def _parts(name: str, node: Any, stored: Mapping[str, Stored]) -> dict:
  """The stored leaves of a QArray, nested as they are in its description."""
  if not isinstance(node, dict) or set(node) != set(_FIELDS):
    raise ValueError(f'its description is no object of {", ".join(_FIELDS)}')
  parts = {}
  for leaf, inner in field(node, 'leaves', dict, {}).items():
    part = f'{name}.{leaf}'
    if leaf not in qarray.LEAVES:
      raise ValueError(f'a QArray has no leaf {leaf!r:.80}')
    if inner is not None:
      parts[leaf] = _parts(part, inner, stored)
    else:
      parts[leaf] = _part(part, stored)
  return parts


def _part(name: str, stored: Mapping[str, Stored]) -> '_Part':
  if name not in stored:
    raise ValueError(f'its {name!r} is missing')
  return _Part(stored[name])


class _Part:
  """A stored leaf; unlike a tuple, a leaf of trees too."""

  def __init__(self, stored: Stored) -> None:
    self.name, self.nbytes = stored.name, stored.nbytes
    self.dtype, self.shape = _container.dtype(stored.dtype), stored.shape
    self._read = stored.read

  def array(self) -> np.ndarray:
    return self._read()


def _shape(part: _Part) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(part.shape, part.dtype.newbyteorder('='))


def _qarray(node: Mapping[str, Any], parts: Mapping[str, Any], make) -> QArray:
  """The QArray of a description, of leaves that `make` makes of parts."""
  leaves: dict[str, Any] = dict.fromkeys(qarray.LEAVES)
  for leaf, part in parts.items():
    inner = node['leaves'][leaf]
    leaves[leaf] = make(part) if inner is None else _qarray(inner, part, make)
  if leaves['codes'] is None or isinstance(leaves['codes'], QArray):
    raise ValueError('it has no codes')
  dtype = field(node, 'dtype', str)
  if dtype not in _DTYPES:
    raise ValueError(f'{dtype=} is none of {", ".join(_DTYPES)}')
  axis = node['axis']
  return QArray(
    **leaves,
    fmt=formats.from_dict(node['fmt']),
    axis=tuple(axis) if isinstance(axis, list) else axis,
    pad=tuple(field(node, 'pad', list, [])),
    dtype=np.dtype(jax.numpy.dtype(dtype)),
    merged=tuple(field(node, 'merged', list, [])),
  )
