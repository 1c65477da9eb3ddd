"""What flags that name formats have in common."""

from absl import flags

from lowbit_jax import formats


def is_block_format(name: str | None) -> bool:
  """A validator of a flag; no name is one too.

  Raises:
    flags.ValidationError: for a name that is none of a block format.
  """
  if not name:
    return True
  try:
    fmt = formats.get(name)
  except ValueError as error:
    raise flags.ValidationError(str(error)) from error
  if not isinstance(fmt, formats.BlockFormat):
    raise flags.ValidationError(
      f'{name} is an element format; name a block format such as mxfp4 or'
      ' int4_g32'
    )
  return True
