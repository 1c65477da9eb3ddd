"""Transforms as files hold them: a class by name, its numbers, its arrays.

A `Chain` is the list of its transforms; arrays of the first are '0.scale'.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowbit_jax.transforms import (
  BlockAffine,
  Chain,
  DiagonalSmoothing,
  Hadamard,
  Permutation,
  Transform,
)

CLASSES: dict[str, Any] = {
  cls.__name__: cls
  for cls in (BlockAffine, DiagonalSmoothing, Hadamard, Permutation)
}

_CHAIN, _MEMBERS = Chain.__name__, 'transforms'
_LONGEST = 100  # transforms of a chain


def split(transform: Transform) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a file says of a transform, and its arrays by name.

  Raises:
    TypeError: for a transform of a class that files do not know, and for a
      chain of chains.
  """
  if not isinstance(transform, Chain):
    return _split_one(transform)
  nodes, arrays = [], {}
  for i, own in enumerate(transform.transforms):
    node, found = _split_one(own)
    nodes.append(node)
    arrays |= {f'{i}.{name}': array for name, array in found.items()}
  return {'class': _CHAIN, _MEMBERS: nodes}, arrays


def _split_one(transform: Transform) -> tuple[dict[str, Any], dict[str, Any]]:
  name = type(transform).__name__
  if CLASSES.get(name) is not type(transform):
    raise TypeError(
      f'its transform is a {name}; files know {", ".join(CLASSES)}'
    )
  numbers, arrays = _fields(type(transform))
  node = {'class': name, **{n: getattr(transform, n) for n in numbers}}
  found = {n: getattr(transform, n) for n in arrays}
  return node, {n: array for n, array in found.items() if array is not None}


def joined(
  node: Any, arrays: Mapping[str, np.ndarray], stacked: int
) -> Transform:
  """The transform that `split` took apart.

  Args:
    node: what the file says.
    arrays: by name.
    stacked: how many leading axes of the arrays stack transforms.

  Raises:
    ValueError: for what no transform is made of.
  """
  members = node.get(_MEMBERS) if isinstance(node, dict) else None
  if members is None:
    return _joined_one(node, arrays, stacked)
  if node.keys() != {'class', _MEMBERS} or node['class'] != _CHAIN:
    raise ValueError(f'its transform is no {_CHAIN} of {_MEMBERS}')
  if not isinstance(members, list) or not 0 < len(members) <= _LONGEST:
    raise ValueError(
      f'its transform is a {_CHAIN} of {members!r:.80}, not of 1 to {_LONGEST}'
      ' transforms'
    )
  own: list[dict[str, Any]] = [{} for _ in members]
  for key, array in arrays.items():
    number, _, name = key.partition('.')
    if number not in map(str, range(len(members))):
      raise ValueError(f'its transform has an array {key!r:.80} too many')
    own[int(number)][name] = array
  return Chain(
    tuple(
      _joined_one(member, found, stacked)
      for member, found in zip(members, own, strict=True)
    )
  )


def _joined_one(
  node: Any, arrays: Mapping[str, np.ndarray], stacked: int
) -> Transform:
  node = dict(node) if isinstance(node, dict) else {}
  name = node.pop('class', None)
  if not isinstance(name, str) or name not in CLASSES:
    raise ValueError(
      f'its transform {name!r:.80} is none of {", ".join(CLASSES)}'
    )
  numbers, known = _fields(CLASSES[name])
  is_known = set(node) == set(numbers) and set(arrays) <= set(known)
  if not is_known or not all(type(n) is int for n in node.values()):
    raise ValueError(f'its transform is no {name} of {numbers} and {known}')
  try:
    return _made(CLASSES[name], node, arrays, stacked)
  except (TypeError, ValueError) as error:
    raise ValueError(f'its transform is no {name}: {error}') from error


def _made(cls: Any, node: dict, arrays: Mapping, stacked: int) -> Any:
  # One by one, so that the class checks each member of a stack.
  if stacked <= 0 or not arrays:
    return cls(**node, **arrays)
  members = [
    _made(cls, node, dict(zip(arrays, rows, strict=True)), stacked - 1)
    for rows in zip(*arrays.values(), strict=True)
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _fields(cls: Any) -> tuple[list[str], list[str]]:
  """The fields of a class that are numbers, and those that are arrays."""
  numbers, arrays = [], []
  for field in dataclasses.fields(cls):
    (numbers if field.metadata.get('static') else arrays).append(field.name)
  return numbers, arrays
