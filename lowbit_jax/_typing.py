"""Types that arguments share, by the names that annotations use."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike as ArrayLike, DTypeLike as DTypeLike

from lowbit_pallas.arith.hashing import Origin as Origin

Axis = int | tuple[int, ...] | None
DotDims = jax.lax.DotDimensionNumbers
Implementation = str | Sequence[str] | None
Key = jax.Array  # a typed PRNG key, or its raw uint32 data
OutSharding = NamedSharding | PartitionSpec | None
PathLike = str | os.PathLike[str]
Precision = jax.lax.PrecisionLike
PyTree = Any
ScaleRule = str | Callable[[jax.Array, jax.Array], jax.Array]
Shape = Sequence[int]


def as_tuple(name: str, values: object) -> tuple[Any, ...]:
  """The entries of an argument that is a sequence, or an error that says so."""
  if isinstance(values, Iterable) and not isinstance(values, str | bytes):
    try:
      return tuple(values)
    except TypeError:  # an array without axes
      pass
  raise TypeError(f'{name}={values!r} must be a sequence')
