"""Differences between JAX versions in Mosaic GPU, in one place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_OLD = tuple(map(int, jax.__version__.split('.')[:2])) < (0, 11)


# CUDA launches that many blocks along every axis but its first, our last.
MOST_BLOCKS = 65535


def why_not_grid(grid: Sequence[int]) -> str | None:
  """Why no device launches this grid, or None."""
  if any(blocks > MOST_BLOCKS for blocks in grid[:-1]):
    return f'grid={tuple(grid)}: over {MOST_BLOCKS} blocks along a leading axis'
  return None


def kernel(body: Callable, *, grid: Sequence[int], **kwargs: Any) -> Callable:
  """`plgpu.kernel` with warpgroup semantics, the default since JAX 0.11.

  Raises:
    ValueError: for a grid that no device launches.
  """
  if reason := why_not_grid(grid):
    raise ValueError(f'{reason}; cut the operands')
  kwargs['grid'] = grid
  if _OLD:
    semantics = plgpu.LoweringSemantics.Warpgroup
    kwargs['compiler_params'] = plgpu.CompilerParams(
      lowering_semantics=semantics
    )
  return plgpu.kernel(body, **kwargs)


def load(ref: Any, layout: Any) -> jax.Array:
  """A whole SMEM ref in registers, in the given layout."""
  indices = ((),) if _OLD else ()
  return plgpu.load(ref, *indices, layout=layout)


def transpose(ref: Any) -> Any:
  """A matrix ref with its axes swapped: a view."""
  return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.T


def mixes_fp8() -> bool:
  """Whether an MMA takes e4m3fn with e5m2."""
  return not _OLD


def concatenates() -> bool:
  """Whether arrays in registers can be concatenated."""
  return not _OLD


def accumulator(shape: tuple[int, int], dtype: Any) -> Any:
  """Registers that WGMMA adds to, an argument of `pl.run_scoped`."""
  return plgpu.ACC(shape, dtype)  # pyright: ignore[reportPrivateImportUsage]
