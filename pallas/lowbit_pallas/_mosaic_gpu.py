"""Differences between JAX versions in Mosaic GPU, in one place."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_OLD = tuple(map(int, jax.__version__.split('.')[:2])) < (0, 11)


def kernel(body, **kwargs):
  """`plgpu.kernel` with warpgroup semantics, the default since JAX 0.11."""
  if _OLD:
    semantics = plgpu.LoweringSemantics.Warpgroup
    kwargs['compiler_params'] = plgpu.CompilerParams(
      lowering_semantics=semantics
    )
  return plgpu.kernel(body, **kwargs)


def load(ref, layout):
  """A whole SMEM ref in registers, in the given layout."""
  indices = ((),) if _OLD else ()
  return plgpu.load(ref, *indices, layout=layout)


def transpose(ref):
  """A matrix ref with its axes swapped: a view."""
  return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.T


def mixes_fp8() -> bool:
  """Whether an MMA takes e4m3fn with e5m2."""
  return not _OLD


def concatenates() -> bool:
  """Whether arrays in registers can be concatenated."""
  return not _OLD


def accumulator(shape, dtype):
  """Registers that WGMMA adds to, an argument of `pl.run_scoped`."""
  return plgpu.ACC(shape, dtype)  # pyright: ignore[reportPrivateImportUsage]
