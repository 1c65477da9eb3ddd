"""Types that arguments share, by the names that annotations use."""

import os
from collections.abc import Callable, Sequence
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
