"""Which formats differ enough to be tested one by one."""

from lowbit_jax import formats


def block_formats() -> tuple[str, ...]:
  """Names of block formats that differ in more than the size of their block.

  Scales of a whole axis or tensor do not care about widths: one integer and one
  float element stand for all.
  """
  seen = {}
  for name in formats.names('block'):
    f = formats.get(name)
    coarse = f.scale is None or f.block[0] == 0
    element = type(f.element) if coarse else f.element
    kind = element, f.scale, f.tensor_scale, f.is_tile, coarse, f.scale_rule
    if coarse or kind not in seen:
      seen[kind] = name
  return tuple(seen.values())
