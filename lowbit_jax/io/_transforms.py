"""Transforms as files hold them: a class by name, its numbers, its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowbit_jax.transforms import (
  BlockAffine,
  DiagonalSmoothing,
  Hadamard,
  Permutation,
  Transform,
)

CLASSES: dict[str, Any] = {
  cls.__name__: cls
  for cls in (BlockAffine, DiagonalSmoothing, Hadamard, Permutation)
}


def split(transform: Transform) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a file says of a transform, and its arrays by name.

  Raises:
    TypeError: for a transform of a class that files do not know.
  """
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
