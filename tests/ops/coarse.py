"""Formats for the default run of tests whose slow run takes every format."""

from lowbit_jax import formats
from tests import kinds


def split(names=None) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Names of block formats, those of the default run apart from the others.

  The first differ in how they scale, in their blocks or in the type of their
  elements; the others repeat one of them with elements of another width.
  """
  names = kinds.block_formats() if names is None else names
  seen = {}
  for name in names:
    f = formats.get(name)
    coarse = f.scale is None or f.block[0] == 0
    scale = f.scale and (f.scale.bits > 8, f.has_exponent_scale)
    kind = type(f.element), scale, bool(f.tensor_scale), f.is_tile, coarse
    seen.setdefault((*kind, f.zero_point, f.scale_rule == 'absmean'), name)
  first = tuple(seen.values())
  return first, tuple(n for n in names if n not in first)
