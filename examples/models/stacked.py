"""Blocks of a model in stacks, so that one compiled block serves all of one."""

from collections.abc import Callable, Sequence

from flax import nnx

from models.keys import ConfigError


def blocks(
  make: Callable[[nnx.Rngs], nnx.Module],
  count: int,
  sizes: Sequence[int],
  rngs: nnx.Rngs,
) -> nnx.List:
  """Stacks of blocks: every parameter has a leading axis of blocks.

  Args:
    make: makes a block.
    count: of all blocks.
    sizes: of the stacks, () for one of all. Blocks of a stack hold parameters
      of the same formats.
    rngs: source of initial parameters.

  Raises:
    ConfigError: for sizes that do not add up to `count`.
  """
  sizes = tuple(sizes) or (count,)
  if sum(sizes) != count or min(sizes) < 1:
    raise ConfigError(f'stacks={sizes} do not add up to blocks={count}')

  def stack(size):
    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=0)
    def members(rngs):
      return make(rngs)

    return members(rngs)

  return nnx.List([stack(size) for size in sizes])
